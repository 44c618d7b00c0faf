"""Chains of stages, each step resumable: run the same command again and it goes on where it was."""

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from experiments.ledger import COUNTED, Ledger
from experiments.machine import describe_machine, git_commit
from experiments.stage import StageConfig, as_text
from experiments.stage_files import StageFiles, write_json
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
    """An unknown recipe, or one without a corpus to train on."""


def demo(workdir: Path, corpus: Path | None) -> list[Step]:
    """The multi-stage recipe in minutes on two cores, on the demo corpus unless another prepared one is given."""
    return multi_stage(workdir, size="demo", audio=None if corpus else DEMO_CORPUS, corpus=corpus)


def wavlablm(workdir: Path, corpus: Path | None) -> list[Step]:
    """The multi-stage recipe in the paper's size: MFCC units, two iterations of HuBERT Base, MK, MS and the control."""
    return multi_stage(workdir, size="paper", corpus=corpus)


def cv_hubert(workdir: Path, corpus: Path | None) -> list[Step]:
    """CV-HuBERT Base for 4 GPUs: MFCC units, iteration 1 and 2, all on Common Voice."""
    second = stage_function("cv_hubert_base", size="paper")()
    first = stage_function("hubert_base_it1", size="paper")()
    draw = replace(first.data.draw, corpora=second.data.draw.corpora)
    first = replace(
        first,
        data=replace(first.data, draw=draw),
        units=replace(first.units, fit_corpora=draw.corpora),
        seconds_per_device=second.seconds_per_device,
    )
    return chain(workdir, [first, second], judged=[first.name, second.name], exported=second.name, corpus=corpus)


def multi_stage(workdir: Path, audio: Path | None = None, *, size: str, corpus: Path | None = None) -> list[Step]:
    """Two iterations of HuBERT, stage 1, stage 2 and its control, judged, exported, reported."""
    names = ("hubert_base_it1", "hubert_base_it2", "wavlab_mk", "wavlab_ms", "wavlab_mk_continued")
    stages = [stage_function(name, size=size)() for name in names]
    judged = ["wavlab_mk", "wavlab_mk_continued", "wavlab_ms"]
    return chain(workdir, stages, judged=judged, exported="wavlab_ms", audio=audio, corpus=corpus)


def chain(
    workdir: Path,
    stages: Sequence[StageConfig],
    *,
    judged: Sequence[str],
    exported: str,
    audio: Path | None = None,
    corpus: Path | None = None,
) -> list[Step]:
    """The steps of these stages, in order: units and training and masked accuracy of each, then probe and export.

    Args:
        workdir: of everything that is made.
        stages: each after those whose units or encoders it takes.
        judged: names of the stages that are probed for languages; the last is compared with the others.
        exported: name of the stage that becomes a Hugging Face folder.
        audio: folder to prepare first. corpus: a prepared one in its place.

    Raises RecipeError if neither is given.
    """
    from experiments import steps
    from experiments.units import UnitFiles
    from wavlab_jax.targets.random_projection import RandomProjectionConfig

    made: list[Step] = []

    def add(name: str, run: Callable[[], str], product: Path, config: str) -> None:
        before = made[-1].made_with if made else ""
        made.append(Step(name, run, product, hashlib.sha256((before + config).encode()).hexdigest()[:16]))

    if corpus is None:
        if audio is None:
            raise RecipeError(
                "this recipe trains on a prepared corpus: python -m data_pipelines prepare AUDIO --out CORPUS, then "
                "give --corpus CORPUS"
            )
        corpus = Path(workdir) / "corpus"
        add("prepare", partial(steps.prepare_corpus, audio, corpus), corpus / "manifest.arrow", _listing(audio))
    unit_sets: set[str] = set()
    for cfg in stages:
        files, text = StageFiles(workdir, cfg.name), as_text(cfg)
        for sort in cfg.unit_sets:
            if sort.name not in unit_sets and not isinstance(sort, RandomProjectionConfig):
                unit_sets.add(sort.name)
                units = UnitFiles(workdir, sort.name)
                make = partial(steps.units, cfg, sort, workdir, corpus)
                add(f"units {sort.name}", make, units.centroids if sort.online else units.store, text)
        add(f"train {cfg.name}", partial(steps.train, cfg, workdir, corpus), files.finished, text)
        add(f"evaluate {cfg.name}", partial(steps.evaluate, cfg, workdir, corpus), files.evaluation, text)
    by_name = {cfg.name: cfg for cfg in stages}
    probed = [by_name[name] for name in judged]
    add("probe languages", partial(steps.probe, probed, workdir, corpus), Path(workdir) / "probe.json", "")
    export = partial(steps.export, by_name[exported], workdir, corpus)
    add(f"export {exported}", export, Path(workdir) / "export" / "config.json", "")
    return made


def _listing(audio: Path) -> str:
    """The folder's path, and every file's name and size: other audio is noticed, whatever it costs to decode."""
    files = (path for path in sorted(audio.rglob("*")) if path.is_file())
    return f"{audio} {[(path.relative_to(audio).as_posix(), path.stat().st_size) for path in files]}"


RECIPES = {"demo": demo, "wavlablm": wavlablm, "cv_hubert": cv_hubert}


def run_recipe(name: str, workdir: Path, *, corpus: Path | None = None, plan_only: bool = False) -> Path | None:
    """Prints the plan, runs what is left of it, and returns the report's path; None if only the plan was wanted.

    Raises RecipeError with the nearest names, or if the recipe needs a prepared `corpus` and has none.
    """
    from experiments.report import write_report
    from experiments.results import collect_results

    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.3) or list(RECIPES)
        raise RecipeError(f"no recipe is called {name!r}; the nearest: {', '.join(near)}")
    steps = RECIPES[name](workdir, corpus)
    ledger = Ledger(workdir / "times.json")

    def done(step: Step) -> bool:
        return ledger.done(step.name, made_with=step.made_with) and step.product.exists()

    print(f"recipe {name} in {workdir}, {len(steps)} steps:")
    for number, step in enumerate(steps, 1):
        print(f"  {number:>2}  {step.name:<32} {'done' if done(step) else 'to do'}")
    if plan_only:
        return None
    workdir.mkdir(parents=True, exist_ok=True)
    origin = {"commit": git_commit(), "machine": describe_machine()}  # of the code as it is loaded, not as it ends up
    for number, step in enumerate(steps, 1):
        if done(step):
            continue
        print(f"\n[{number}/{len(steps)}] {step.name}", flush=True)
        with ledger.timing(step.name, made_with=step.made_with, **origin) as entry:
            entry["note"] = step.run()
        print(f"  {entry['note']} ({ledger.seconds(step.name):.0f} s)", flush=True)
    names = [step.name for step in steps]
    results = collect_results(f"recipe {name}", workdir, ledger.rows(names), corpus=corpus)
    # Of what was measured, not of who draws it again: nothing here changes when all steps are done.
    results |= {"time_counted": COUNTED, **ledger.origin(names)}
    write_json(workdir / "results.json", results)
    return write_report(results, workdir / "report.html")
