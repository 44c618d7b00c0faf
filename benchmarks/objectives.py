"""The objectives at equal compute on the demo corpus: loss, masked accuracy beside trivial predictors, language probe.

    PYTHONPATH=. .venv/bin/python benchmarks/objectives.py --workdir work/objectives --write docs/objectives.md

Equal compute is equal training time on this machine: the seconds of a step of each objective are measured first,
interleaved, and every run gets as many steps as fit into `--minutes`. The encoder, the data and their order, the
optimizer and the number of seeds are the same for all; seeds change initial values, crops, masks and dropout. A run
that was finished is kept, so the command may be interrupted.

Losses of different objectives answer different questions, as do accuracies; what compares is the language probe: each
encoder's middle layer, fixed beforehand, across sources. For the verdict, an objective is compared with HuBERT's cosine
prediction seed by seed, on the same clips.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax

from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import train_batches
from data_pipelines.prepare import prepare
from experiments.evaluate import evaluate_stage, probe_stages
from experiments.machine import describe_machine
from experiments.recipes import DEMO_CORPUS
from experiments.run import configure_jax, train_stage, write_json
from experiments.stage import StageConfig
from experiments.stage_files import StageFiles
from experiments.stages import stage_function
from experiments.stages.presets import NATURAL
from experiments.targets import make_labels
from wavlab_jax.evaluation.masked_accuracy import times_trivial
from wavlab_jax.metrics import JSON_LINES, read_lines
from wavlab_jax.sharding import make_mesh, place_batch
from wavlab_jax.step import initial_state, make_train_step

REFERENCE = "HuBERT, cosine"
TIMED_STEPS = 12


def cosine() -> StageConfig:
    """HuBERT's iteration 1: MFCC units, cosine scores."""
    return stage_function("hubert_base_it1", size="demo")()


def linear() -> StageConfig:
    """The same units, predicted by a plain softmax layer."""
    cfg = cosine()
    head = dataclasses.replace(cfg.learner.head, scoring="linear")
    return dataclasses.replace(cfg, learner=dataclasses.replace(cfg.learner, head=head))


def contrastive() -> StageConfig:
    """XLS-R's objective."""
    return stage_function("xlsr_300m", size="demo")()


def random_projection() -> StageConfig:
    """BEST-RQ's targets."""
    return stage_function("best_rq_base", size="demo")()


def teacher() -> StageConfig:
    """Units of layer 2 of the cosine model of seed 0, computed in the step; from scratch."""
    cfg = cosine()
    units = dataclasses.replace(cfg.units, name="of_the_teacher", teacher=_name(REFERENCE, 0), layer=2, online=True)
    return dataclasses.replace(cfg, units=units)


OBJECTIVES: dict[str, Callable[[], StageConfig]] = {
    REFERENCE: cosine,
    "plain softmax": linear,
    "contrastive": contrastive,
    "random projection": random_projection,
    "online teacher": teacher,
}


def _name(objective: str, seed: int) -> str:
    return f"{objective.replace(',', '').replace(' ', '_')}_seed{seed}"


def configured(objective: str, *, seed: int, steps: int) -> StageConfig:
    """One run: the objective's stage with this seed and length, on the natural draw, without mixing."""
    cfg = OBJECTIVES[objective]()
    optimizer = dataclasses.replace(cosine().learner.optimizer, warmup_steps=max(steps // 10, 1), total_steps=steps)
    objective_cfg = cfg.learner.objective
    if hasattr(objective_cfg, "gumbel_decay"):
        ratio = objective_cfg.gumbel_floor / objective_cfg.gumbel_start
        objective_cfg = dataclasses.replace(objective_cfg, gumbel_decay=ratio ** (1 / steps))
    return dataclasses.replace(
        cfg,
        name=_name(objective, seed),
        learner=dataclasses.replace(cfg.learner, optimizer=optimizer, objective=objective_cfg, seed=seed),
        data=dataclasses.replace(cosine().data, draw=NATURAL, mixing=None, seed=100 + seed),
        loop=dataclasses.replace(cfg.loop, steps=steps, save_every=max(steps // 2, 1)),
        init_from=None,
    )


def seconds_per_step(objectives: list[str], workdir: Path, corpus: Path) -> dict[str, float]:
    """Median time of a step of each objective, compiled and warm, in turns so that they share the machine's moods."""
    manifest = Manifest.load(corpus)
    running = {}
    for objective in objectives:
        cfg = configured(objective, seed=0, steps=100)
        mesh = make_mesh(cfg.mesh)
        labels = make_labels(cfg.unit_sets, workdir, manifest, mesh)
        step = make_train_step(cfg.learner, mesh, labels.targets)
        with train_batches(cfg.data, manifest, labels.stores) as batches:
            batch = place_batch(next(batches), mesh=mesh, passes=1)
        state, _ = jax.block_until_ready(step(initial_state(cfg.learner, mesh), batch))
        running[objective] = [step, state, batch, []]
    for _ in range(TIMED_STEPS):
        for entry in running.values():
            step, state, batch, times = entry
            began = time.perf_counter()
            entry[1], _ = jax.block_until_ready(step(state, batch))
            times.append(time.perf_counter() - began)
    return {objective: statistics.median(times) for objective, (*_, times) in running.items()}


def judged(cfg: StageConfig, workdir: Path, corpus: Path) -> dict:
    """Last losses and metrics on training rows, accuracy on held-out clips."""
    files = StageFiles(workdir, cfg.name)
    last = list(read_lines(files.metrics / JSON_LINES))[-1]
    total = evaluate_stage(cfg, workdir=workdir, corpus=corpus)["total"]
    return {
        "loss": total["loss"],
        "clips": total["clips"],
        "accuracy": total["accuracy"],
        "majority": total["majority"],
        "copy": total["copy"],
        "times_trivial": None if total["majority"] is None else times_trivial(total),
        "code_perplexity": last.get("code_perplexity"),
    }


def table(results: dict) -> str:
    """The Markdown page."""
    lines = [__doc__.split("\n\n")[0].replace("The objectives", "# The objectives", 1), ""]
    lines += [
        f"Written by `benchmarks/objectives.py`; {results['seeds']} seeds each, {results['minutes']:g} minutes of "
        f"training a run, {results['machine']}. {results['clips']} held-out clips for losses and accuracies, "
        f"{results['probe_clips']} for the probe (chance {results['chance']:.3f}); log-mel {results['log_mel']:.3f}, "
        f"an untrained encoder {results['untrained']:.3f}. Mean over seeds, and (smallest to largest).",
        "",
        "| objective | ms a step | steps | loss, nats | accuracy | majority | nearest visible copied "
        "| x better trivial | probe | probe against cosine |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in results["objectives"].items():
        cells = [
            name,
            f"{1000 * row['seconds_per_step']:.0f}",
            f"{row['steps']:,}",
            *(_spread(row["runs"], key) for key in ("loss", "accuracy", "majority", "copy")),
            _spread(row["runs"], "times_trivial", digits=2),
            _spread(row["runs"], "probe"),
            row["verdict"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    perplexities = [run["code_perplexity"] for run in results["objectives"]["contrastive"]["runs"]]
    lines += [
        "",
        f"Code perplexity of the contrastive runs at their end: {', '.join(f'{p:.0f}' for p in perplexities)} of 80 "
        "(2 groups of 40 codes; 2 would be collapse). Its accuracy is that of picking the positive among 50 negatives "
        "(chance 0.02), about targets that it learned itself. Verdicts name the seeds in which the 95 % bootstrap "
        "interval of the paired difference leaves out 0; all else is not distinguishable. The teacher's own "
        "training is not counted.",
        "",
    ]
    return "\n".join(lines)


def _spread(runs: list[dict], key: str, *, digits: int = 3) -> str:
    values = [run[key] for run in runs]
    if None in values:
        return "-"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _verdict(differences: list[dict]) -> str:
    told = [(seed, d["verdict"]) for seed, d in enumerate(differences) if d["verdict"] != "not distinguishable"]
    said = [f"{verdict} (seed {seed})" for seed, verdict in told]
    return ", ".join(said) or "not distinguishable"


def main() -> None:
    """Times, trains, judges, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("work/objectives"))
    parser.add_argument("--minutes", type=float, default=0.75, help="training time of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="Markdown page to write")
    arguments = parser.parse_args()
    workdir, corpus = arguments.workdir, arguments.workdir / "corpus"
    configure_jax(workdir)
    if not (corpus / "manifest.arrow").exists():
        prepare(DEMO_CORPUS, out=corpus)

    plan_file = workdir / "plan.json"
    plan = json.loads(plan_file.read_text()) if plan_file.exists() else {}

    def steps_of(objective: str) -> int:
        return max(int(arguments.minutes * 60 / plan[objective]), 10)

    def run(objective: str, seed: int) -> StageConfig:
        cfg = configured(objective, seed=seed, steps=steps_of(objective))
        train_stage(cfg, workdir=workdir, corpus=corpus)
        return cfg

    if set(plan) != set(OBJECTIVES):
        # the teacher must exist before its step can be timed; the others are timed again with it
        plan = seconds_per_step([name for name in OBJECTIVES if name != "online teacher"], workdir, corpus)
        train_stage(configured(REFERENCE, seed=0, steps=steps_of(REFERENCE)), workdir=workdir, corpus=corpus)
        reference = plan[REFERENCE]
        timed = seconds_per_step(list(OBJECTIVES), workdir, corpus)
        # ratios of one sitting, in the first sitting's seconds: the reference run keeps its length
        plan = {name: seconds / timed[REFERENCE] * reference for name, seconds in timed.items()}
        write_json(plan_file, plan)
    configs = {name: [run(name, seed) for seed in range(arguments.seeds)] for name in OBJECTIVES}

    rows: dict[str, dict] = {}
    for name, stages in configs.items():
        runs = [judged(cfg, workdir, corpus) for cfg in stages]
        rows[name] = {"seconds_per_step": plan[name], "steps": steps_of(name), "runs": runs, "differences": []}
    for seed in range(arguments.seeds):
        # the last one is compared with all others
        order = [name for name in OBJECTIVES if name != REFERENCE] + [REFERENCE]
        probe = probe_stages([configs[name][seed] for name in order], workdir=workdir, corpus=corpus, seed=seed)
        by_name = {row["name"]: row for row in probe["rows"]}
        against = {d["against"]: d for d in probe["differences"]}
        turned = {"better": "worse", "worse": "better"}
        for name in OBJECTIVES:
            stage = _name(name, seed)
            rows[name]["runs"][seed]["probe"] = by_name[stage]["accuracy"]
            if name != REFERENCE:
                verdict = against[stage]["verdict"]
                rows[name]["differences"].append({"verdict": turned.get(verdict, verdict)})
    for name, row in rows.items():
        row["verdict"] = "-" if name == REFERENCE else _verdict(row["differences"])
    machine = describe_machine()
    results = {
        "seeds": arguments.seeds,
        "minutes": arguments.minutes,
        "machine": ", ".join(f"{key} {value}" for key, value in machine.items()),
        "clips": rows[REFERENCE]["runs"][0]["clips"],
        "probe_clips": probe["rows"][0]["clips"],
        "chance": probe["rows"][0]["chance"],
        "log_mel": by_name["log-mel"]["accuracy"],
        "untrained": by_name["untrained encoder"]["accuracy"],
        "objectives": rows,
    }
    write_json(workdir / "objectives.json", results)
    page = table(results)
    print(page)
    if arguments.write:
        arguments.write.write_text(page)


if __name__ == "__main__":
    main()
