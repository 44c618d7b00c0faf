"""The rules of the house that a reader cannot be asked to check by eye, read from the source with `ast`.

Nothing here imports the packages, so these tests say what is wrong even when a module does not load.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data_pipelines", "wavlab_jax", "experiments")

MAX_FILE_LINES = 400
MAX_LOOP_LINES = 300  # wavlab_jax/train.py, which is read top to bottom
MAX_FUNCTION_LINES = 120
# Files and functions over the limit, each with the reason why splitting it would read worse.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

# Distributions that requirements.txt names though no module imports them, each with the reason.
DECLARED_ON_PURPOSE = {
    "librosa": "the reference that the feature tests compare with",
}

# Modules of a distribution of another name, where it need not be installed.
OTHER_NAMES = {"faiss": "faiss-cpu", "espnet2": "espnet"}

DEVICE_SIDE = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers", "tensorflow"}
HOST_SIDE = {"grain", "array_record", "tfds", "tensorflow_datasets", "librosa", "soundfile", "soxr"}
FROM_THE_LEFT = {"batch", "atomic"}  # what wavlab_jax takes: the contract of batches; files that are whole or absent
NO_FLAX = (
    *("wavlab_jax/losses.py", "wavlab_jax/masking.py", "wavlab_jax/metrics.py", "wavlab_jax/quantizer.py"),
    *("wavlab_jax/objectives/", "wavlab_jax/targets/"),
)
VAGUE_NAMES = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
RUNS_FOREIGN_CODE = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}


class Import(NamedTuple):
    """One imported module as a dotted name (`from a.b import c` counts as `a.b.c`), and its line."""

    name: str
    line: int

    @property
    def top(self) -> str:
        """The package that the module belongs to."""
        return self.name.split(".")[0]


@cache
def sources(*folders: str) -> tuple[str, ...]:
    """Paths of the Python files under these folders, relative to the repository, sorted."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return tuple(sorted(path.relative_to(ROOT).as_posix() for path in found))


@cache
def parse(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path)


def imports(path: str) -> list[Import]:
    """Every import of a file, those inside functions too, with relative ones made absolute."""
    package = list(Path(path).parent.parts)
    found = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, node.module] if node.module else base
            found += [Import(".".join([*base, alias.name]), node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and dotted(node.func) in {"importlib.import_module", "__import__"}:
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "<computed name>"
            found.append(Import(str(name), node.lineno))
    return found


def dotted(node: ast.AST) -> str:
    """`pytest.mark.skip` of the expression that spells it; empty for what is not a plain dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def report(problems: list[str]) -> str:
    return "\n  " + "\n  ".join(problems)


def requirements(name: str) -> list[Requirement]:
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def names(parsed: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in parsed}


@cache
def providers() -> Mapping[str, list[str]]:
    return packages_distributions()  # reads every installed package's list of files: seconds


def distributions(module: str) -> set[str]:
    """Distributions that provide a top-level module, as installed here; the module's own name if none does."""
    return {canonicalize_name(name) for name in providers().get(module, [OTHER_NAMES.get(module, module)])}


def third_party(path: str) -> list[Import]:
    own = {*PACKAGES, "tests", "benchmarks", "__future__"}
    return [found for found in imports(path) if found.top not in own and found.top not in sys.stdlib_module_names]


def test_the_rules_have_something_to_read():
    for package in PACKAGES:
        assert sources(package), f"no Python file under {package}/"
    for path in NO_FLAX:
        assert (ROOT / path).exists(), f"{path} is gone: mend NO_FLAX"


def test_imports_run_the_way_the_audio_runs():
    problems = []
    for path in sources("data_pipelines"):
        forbidden = DEVICE_SIDE | {"wavlab_jax", "experiments"}
        problems += [f"{path}:{i.line} imports {i.name}" for i in imports(path) if i.top in forbidden]
    for path in sources("wavlab_jax"):
        for i in imports(path):
            from_the_left = i.top == "data_pipelines" and not FROM_THE_LEFT.intersection(i.name.split(".")[1:2])
            if i.top in HOST_SIDE | {"experiments"} or from_the_left:
                problems.append(f"{path}:{i.line} imports {i.name}")
    # Whoever imports data_pipelines.batch runs this file first.
    problems += [f"data_pipelines/__init__.py:{i.line} imports {i.name}" for i in imports("data_pipelines/__init__.py")]
    assert not problems, report(problems)


def test_losses_masks_metrics_and_targets_know_no_flax():
    problems = [
        f"{path}:{i.line} imports {i.name}"
        for path in sources("wavlab_jax")
        if path.startswith(NO_FLAX)
        for i in imports(path)
        if i.top == "flax"
    ]
    assert not problems, report(problems)


def test_no_file_is_named_for_nothing():
    assert not [path for path in sources(*PACKAGES, "tests", "benchmarks") if Path(path).name in VAGUE_NAMES]


def test_files_and_functions_stay_readable():
    problems, needed = [], set()
    for path in sources(*PACKAGES, "benchmarks"):
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        limit = MAX_LOOP_LINES if path == "wavlab_jax/train.py" else MAX_FILE_LINES
        if lines > limit:
            needed.add(path)
            if path not in LONG_FILES:
                problems.append(f"{path} has {lines} lines, {limit} are allowed")
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                needed.add(f"{path}:{node.name}")
                if f"{path}:{node.name}" not in LONG_FUNCTIONS:
                    where = f"{path}:{node.lineno} {node.name}"
                    problems.append(f"{where} has {length} lines, {MAX_FUNCTION_LINES} are allowed")
    problems += [f"{name} needs its exception no more" for name in {*LONG_FILES, *LONG_FUNCTIONS} - needed]
    assert not problems, report(problems)


def test_no_foreign_code_is_run():
    problems = []
    for path in sources(*PACKAGES, "benchmarks"):
        problems += [f"{path}:{i.line} imports {i.name}" for i in imports(path) if i.top in RUNS_FOREIGN_CODE]
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.Call):
                continue
            if dotted(node.func) in {"eval", "exec", "builtins.eval", "builtins.exec"}:
                problems.append(f"{path}:{node.lineno} calls {dotted(node.func)}")
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if (keyword.arg, value) in {("allow_pickle", True), ("weights_only", False)}:
                    problems.append(f"{path}:{node.lineno} passes {keyword.arg}={value}")
    assert not problems, report(problems)


def test_everything_public_has_a_docstring():
    problems = []

    def visit(node: ast.Module | ast.ClassDef, path: str, prefix: str):
        for child in node.body:
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if child.name.startswith("_"):
                continue
            if ast.get_docstring(child) is None:
                problems.append(f"{path}:{child.lineno} {prefix}{child.name}")
            if isinstance(child, ast.ClassDef):
                visit(child, path, f"{prefix}{child.name}.")

    for path in sources(*PACKAGES):
        module = parse(path)
        if module.body and ast.get_docstring(module) is None:
            problems.append(f"{path}:1 the module itself")
        visit(module, path, "")
    assert not problems, "without a docstring:" + report(problems)


def test_no_test_is_skipped():
    banned = {"skip", "skipif", "importorskip", "xfail", "SkipTest", "skipTest", "skipIf", "skipUnless"}
    problems = []
    for path in sources("tests"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and node.attr in banned:
                problems.append(f"{path}:{node.lineno} {dotted(node) or node.attr}")
        problems += [f"{path}:{i.line} {i.name}" for i in imports(path) if i.name.split(".")[-1] in banned]
    assert not problems, report(problems)


def test_a_test_file_that_needs_torch_is_marked_as_a_whole():
    """A file that imports torch at its top cannot be collected without it, so all its tests carry the mark."""
    problems = []
    for path in sources("tests"):
        top_level = {id(node) for node in parse(path).body}
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.Import | ast.ImportFrom) or id(node) not in top_level:
                continue
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            needs_torch = any({"torch", "transformers"} & set(module.split(".")) for module in modules)
            text = (ROOT / path).read_text(encoding="utf-8")
            if needs_torch and not re.search(r"^pytestmark = .*\bpytest\.mark\.torch\b", text, re.MULTILINE):
                problems.append(f"{path}:{node.lineno} imports torch, but has no `pytestmark = pytest.mark.torch`")
    assert not problems, report(problems)


def test_what_is_imported_is_declared():
    """In requirements.txt; for tests, those of the tests too; inside a function, an extra of pyproject.toml too."""
    run = names(requirements("requirements.txt"))
    test = names(requirements("requirements-test.txt")) | names(requirements("requirements-oracles.txt"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = names([Requirement(line) for lines in project["optional-dependencies"].values() for line in lines])
    problems = []
    for path in sources(*PACKAGES, "tests", "benchmarks"):
        at_the_top = {node.lineno for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)}
        for found in third_party(path):
            declared = run if path.split("/")[0] in PACKAGES else run | test
            if found.line not in at_the_top:
                declared = declared | extras
            if not distributions(found.top) & declared:
                problems.append(f"{path}:{found.line} imports {found.top}, which no requirement brings in")
    assert not problems, report(problems)


def test_what_is_declared_is_imported():
    used = {name for path in sources(*PACKAGES) for found in third_party(path) for name in distributions(found.top)}
    unused = names(requirements("requirements.txt")) - used
    assert unused <= set(DECLARED_ON_PURPOSE), f"requirements.txt names {sorted(unused - set(DECLARED_ON_PURPOSE))}"


@pytest.mark.parametrize(("pins_name", "python"), [("constraints-3.11.txt", "3.11"), ("constraints-3.12.txt", "3.12")])
def test_every_requirement_is_pinned_inside_its_range(pins_name, python):
    pins = {canonicalize_name(pin.name): pin.specifier for pin in requirements(pins_name)}
    problems = []
    for requirement in requirements("requirements.txt") + requirements("requirements-test.txt"):
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None:
            problems.append(f"{requirement.name} is not in {pins_name}")
        elif not requirement.specifier.contains(next(iter(pin)).version):
            problems.append(f"{requirement.name}{pin} in {pins_name} is outside {requirement.specifier}")
    assert not problems, report(problems)


def test_tests_that_the_docs_name_exist():
    """`tests/….py::test_name` in README and docs, so that a table of what is held by which test stays true."""
    problems = []
    for path in ("README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))):
        text = (ROOT / path).read_text(encoding="utf-8")
        for name, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
            if not (ROOT / name).exists():
                problems.append(f"{path} names {name}, which does not exist")
            elif test and not re.search(rf"^def {test}\(", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE):
                problems.append(f"{path} names {test}, which {name} does not have")
    assert not problems, report(problems)
