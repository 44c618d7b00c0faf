"""Chains of stages, each step resumable: run the same command again and it goes on where it was."""

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments.ledger import COUNTED, Ledger
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
    from experiments.units import UnitFiles
    from wavlab_jax.targets.random_projection import RandomProjectionConfig

    corpus = Path(workdir) / "corpus"
    names = ("hubert_base_it1", "hubert_base_it2", "wavlab_mk", "wavlab_ms", "wavlab_mk_continued")
    stages = {name: stage_function(name, size=size)() for name in names}
    chain: list[Step] = []

    def add(name: str, run: Callable[[], str], product: Path, config: str) -> None:
        before = chain[-1].made_with if chain else ""
        chain.append(Step(name, run, product, hashlib.sha256((before + config).encode()).hexdigest()[:16]))

    add("prepare", lambda: steps.prepare_corpus(audio, corpus), corpus / "manifest.arrow", _listing(audio))
    made: set[str] = set()
    for name, cfg in stages.items():
        files, text = StageFiles(workdir, name), as_text(cfg)
        for sort in cfg.unit_sets:
            if sort.name not in made and not isinstance(sort, RandomProjectionConfig):
                made.add(sort.name)
                units = UnitFiles(workdir, sort.name)
                store = units.centroids if sort.online else units.store
                make = partial(steps.units, cfg, sort, workdir, corpus)
                add(f"units {sort.name}", make, store, text)
        add(f"train {name}", lambda cfg=cfg: steps.train(cfg, workdir, corpus), files.finished, text)
        add(f"evaluate {name}", lambda cfg=cfg: steps.evaluate(cfg, workdir, corpus), files.evaluation, text)
    judged = [stages["wavlab_mk"], stages["wavlab_mk_continued"], stages["wavlab_ms"]]
    last = stages["wavlab_ms"]
    add("probe languages", lambda: steps.probe(judged, workdir, corpus), Path(workdir) / "probe.json", "")
    add("export wavlab_ms", lambda: steps.export(last, workdir, corpus), Path(workdir) / "export" / "config.json", "")
    return chain


def _listing(audio: Path) -> str:
    """The folder's path, and every file's name and size: other audio is noticed, whatever it costs to decode."""
    files = (path for path in sorted(audio.rglob("*")) if path.is_file())
    return f"{audio} {[(path.relative_to(audio).as_posix(), path.stat().st_size) for path in files]}"


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

    def done(step: Step) -> bool:
        return ledger.done(step.name, made_with=step.made_with) and step.product.exists()

    print(f"recipe {name} in {workdir}, {len(steps)} steps:")
    for number, step in enumerate(steps, 1):
        print(f"  {number:>2}  {step.name:<32} {'done' if done(step) else 'to do'}")
    origin = {"commit": git_commit(), "machine": describe_machine()}  # of the code as it is loaded, not as it ends up
    for number, step in enumerate(steps, 1):
        if done(step):
            continue
        print(f"\n[{number}/{len(steps)}] {step.name}", flush=True)
        with ledger.timing(step.name, made_with=step.made_with, **origin) as entry:
            entry["note"] = step.run()
        print(f"  {entry['note']} ({ledger.seconds(step.name):.0f} s)", flush=True)
    names = [step.name for step in steps]
    results = collect_results(f"recipe {name}", workdir, ledger.rows(names))
    # Of what was measured, not of who draws it again: nothing here changes when all steps are done.
    results |= {"time_counted": COUNTED, **ledger.origin(names)}
    write_json(workdir / "results.json", results)
    return write_report(results, workdir / "report.html")
