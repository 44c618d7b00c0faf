"""What every test shares: the devices that JAX shows, its compilation cache, and Hypothesis's patience.

JAX is set up through the environment, before anything imports it: tests of the data side never pay for the import, and
the programs that tests start as subprocesses inherit the same setting unless the test gives them another.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Tests compile more than they compute: no optimisation, and the emitters that compile soonest where XLA has others.
OLDER_XLA = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
FLAGS = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * OLDER_XLA
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # a forgotten axis is an error here, not a broadcast
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# No deadline: the first example compiles, and the machine may be busy. In CI the examples are the same at every run.
hypothesis.settings.register_profile(
    "house",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("house")

RECIPE = ("test_recipes", "test_run", "test_probes", "test_hosts", "test_objective_stages")  # of tests/experiments
HAS_TORCH = importlib.util.find_spec("torch") is not None


def pytest_report_header():
    """Names the interpreter, and says what its lack of torch means for this run."""
    torch = "torch is here" if HAS_TORCH else "no torch: tests that compare with it need `-m 'not torch'`"
    return f"python {platform.python_version()}, {torch}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile`, a process takes whole files; all that look at the one small recipe go to one process.

    Its stages are trained once then, which takes two minutes.
    """
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


class ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return "recipe" if Path(file).stem in RECIPE else file


def pytest_ignore_collect(collection_path: Path, config):
    """Leaves out whole files marked `torch` where torch is missing and the tests marked so are not asked for.

    Such a file imports torch at its top and cannot be collected at all, not even to be deselected. Asked for, it fails.
    """
    if HAS_TORCH or collection_path.suffix != ".py" or "not torch" not in config.option.markexpr:
        return None
    marked = re.search(r"^pytestmark = .*\bpytest\.mark\.torch\b", collection_path.read_text(), re.MULTILINE)
    return True if marked else None
