"""Chains of stages, each step resumable: run the same command again and it goes on where it was."""

import difflib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from experiments.machine import describe_machine, git_commit
from experiments.stage import as_text
from experiments.stage_files import StageFiles
from experiments.stages import stage_function

DEMO_CORPUS = Path(__file__).resolve().parent.parent / "demo_corpus"


@dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Attributes:
        name: unique in the recipe; what the table of times shows.
        run: does it, or what is left of it; returns a note for the table of times.
        product: what it leaves behind; without that the step is not done, whatever the ledger says.
        made_with: digest of the configurations of this step and all before it; a step done with others is done again.
    """

    name: str
    run: Callable[[], str]
    product: Path
    made_with: str


class RecipeError(ValueError):
    """An unknown recipe."""


def demo(workdir: Path, audio: Path = DEMO_CORPUS) -> list[Step]:
    """The whole multi-stage recipe on the demo corpus: minutes on two cores."""
    return multi_stage(workdir, audio, size="demo")


def multi_stage(workdir: Path, audio: Path, *, size: str) -> list[Step]:
    """Prepare, two iterations of HuBERT, stage 1, stage 2 and its control, judged, exported, reported."""
    from experiments import steps

    corpus = Path(workdir) / "corpus"
    names = ("hubert_base_it1", "hubert_base_it2", "wavlab_mk", "wavlab_ms", "wavlab_mk_continued")
    stages = {name: stage_function(name, size=size)() for name in names}
    chain: list[Step] = []

    def add(name: str, run: Callable[[], str], product: Path, config: str) -> None:
        before = chain[-1].made_with if chain else ""
        chain.append(Step(name, run, product, hashlib.sha256((before + config).encode()).hexdigest()[:16]))

    add("prepare", lambda: steps.prepare_corpus(audio, corpus), corpus / "manifest.arrow", str(audio))
    made: set[str] = set()
    for name, cfg in stages.items():
        files, text = StageFiles(workdir, name), as_text(cfg)
        if cfg.units.name not in made:
            made.add(cfg.units.name)
            store = Path(workdir) / "units" / cfg.units.name
            add(f"units {cfg.units.name}", lambda cfg=cfg: steps.units(cfg, workdir, corpus), store, text)
        add(f"train {name}", lambda cfg=cfg: steps.train(cfg, workdir, corpus), files.finished, text)
        add(f"evaluate {name}", lambda cfg=cfg: steps.evaluate(cfg, workdir, corpus), files.evaluation, text)
    judged = [stages["wavlab_mk"], stages["wavlab_mk_continued"], stages["wavlab_ms"]]
    last = stages["wavlab_ms"]
    add("probe languages", lambda: steps.probe(judged, workdir, corpus), Path(workdir) / "probe.json", "")
    add("export wavlab_ms", lambda: steps.export(last, workdir, corpus), Path(workdir) / "export" / "config.json", "")
    return chain


RECIPES = {"demo": demo}


def run_recipe(name: str, workdir: Path) -> Path:
    """Runs what is left of a recipe; returns the report's path. Raises RecipeError with the nearest names."""
    from experiments.report import write_report
    from experiments.results import collect_results
    from experiments.run import write_json

    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.3) or list(RECIPES)
        raise RecipeError(f"no recipe is called {name!r}; the nearest: {', '.join(near)}")
    workdir.mkdir(parents=True, exist_ok=True)
    steps = RECIPES[name](workdir)
    ledger = Ledger(workdir / "times.json")
    print(f"recipe {name} in {workdir}, {len(steps)} steps:")
    for number, step in enumerate(steps, 1):
        state = "done" if ledger.done(step) else "to do"
        print(f"  {number:>2}  {step.name:<32} {state}")
    for number, step in enumerate(steps, 1):
        if ledger.done(step):
            continue
        print(f"\n[{number}/{len(steps)}] {step.name}", flush=True)
        with ledger.timing(step) as entry:
            entry["note"] = step.run()
        print(f"  {entry['note']} ({ledger.seconds(step.name):.0f} s)", flush=True)
    results = collect_results(f"recipe {name}", workdir, ledger.rows([step.name for step in steps]))
    results |= {
        "machine": describe_machine(),
        "commit": git_commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(workdir / "results.json", results)
    return write_report(results, workdir / "report.html")


class Ledger:
    """Which steps of a recipe are done and how long they took, over all the processes that worked on them."""

    def __init__(self, path: Path):
        self.path = path
        self._entries: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}

    def done(self, step: Step) -> bool:
        """Whether the step ran to its end with these configurations and its product is still there."""
        entry = self._entries.get(step.name, {})
        return entry.get("done", False) and entry.get("made_with") == step.made_with and step.product.exists()

    def seconds(self, name: str) -> float:
        """Time spent on the step; what a killed process spent since its last step is not known and not counted."""
        return self._entries.get(name, {}).get("seconds", 0.0)

    def rows(self, names: list[str]) -> list[dict]:
        """name, seconds and note of each step, in order."""
        return [
            {"name": n, "seconds": self.seconds(n), "note": self._entries.get(n, {}).get("note", "")} for n in names
        ]

    def timing(self, step: Step) -> "_Timing":
        """A context that adds the time inside it, also when it ends with an error, and marks the step done if not."""
        return _Timing(self, step)

    def write(self, name: str, entry: dict) -> None:
        """Keeps an entry, atomically."""
        from experiments.run import write_json

        self._entries[name] = entry
        write_json(self.path, self._entries)


class _Timing:
    def __init__(self, ledger: Ledger, step: Step):
        self._ledger, self._name, self._made_with = ledger, step.name, step.made_with

    def __enter__(self) -> dict:
        self._began = time.monotonic()
        self._entry = {
            "seconds": self._ledger.seconds(self._name),
            "note": "",
            "done": False,
            "made_with": self._made_with,
        }
        return self._entry

    def __exit__(self, kind, error, trace) -> None:
        self._entry["seconds"] += time.monotonic() - self._began
        self._entry["done"] = kind is None
        self._ledger.write(self._name, self._entry)
