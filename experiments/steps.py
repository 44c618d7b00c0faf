"""What the steps of a recipe do; each returns a line for the table of times, and may be run again."""

import shutil
import sys
from pathlib import Path

import numpy as np

from data_pipelines.manifest import Manifest
from data_pipelines.prepare import OtherPlan, prepare
from experiments.evaluate import evaluate_stage, probe_stages
from experiments.export import export_stage
from experiments.run import shares_table, train_stage
from experiments.stage import StageConfig, StageError
from experiments.stage_files import StageFiles, write_json
from experiments.targets import UnitSetConfig, is_online
from experiments.units import fitted_centroids, make_units
from wavlab_jax.evaluation.masked_accuracy import times_trivial
from wavlab_jax.metrics import JSON_LINES, read_lines
from wavlab_jax.objectives import objective_of
from wavlab_jax.sharding import make_mesh
from wavlab_jax.targets.kmeans import usage
from wavlab_jax.targets.random_projection import RandomProjectionConfig


def prepare_corpus(audio: Path, corpus: Path) -> str:
    """Shards and a manifest from a folder of audio."""
    try:
        made = prepare(audio, out=corpus, progress=sys.stderr.isatty())
    except OtherPlan as error:
        advice = "give the recipe another --workdir, or the audio that it began with"
        raise StageError(f"{error.reason}; {advice}") from error
    hours = float(made.manifest.samples.sum()) / 16_000 / 3600
    return f"{made.tally.clips:,} clips, {hours:.2f} h, {len(made.rejected)} left out"


def units(cfg: StageConfig, sort: UnitSetConfig, workdir: Path, corpus: Path) -> str:
    """One set of units that a stage trains on: its store, or the centroids of one that is computed in the step."""
    if isinstance(sort, RandomProjectionConfig):
        return f"{sort.units} entries of a random codebook: nothing to make"
    manifest = Manifest.load(corpus)
    shares_table(cfg, manifest)  # raises SamplingError, before the long work, if the stage cannot draw from this corpus
    if is_online(sort):
        centers = fitted_centroids(sort, workdir, manifest, make_mesh(cfg.mesh))
        return f"{len(centers)} centroids; labels are computed in the step"
    store = make_units(sort, workdir, manifest, make_mesh(cfg.mesh))
    used = usage(np.asarray(store.counts()))
    return f"{store.units} units, perplexity {used.perplexity:.0f}, {used.dead} unused"


def train(cfg: StageConfig, workdir: Path, corpus: Path) -> str:
    """A stage, to its last step."""
    train_stage(cfg, workdir=workdir, corpus=corpus)
    last = list(read_lines(StageFiles(workdir, cfg.name).metrics / JSON_LINES))[-1]
    _, *shown = objective_of(cfg.learner.objective).SHOWN
    said = ", ".join(f"{name.replace('_', ' ')} {last[name]:.3f}" for name in shown if last.get(name) is not None)
    return f"{last['step']} steps, {last['audio_hours']:.2f} h of audio, {said} on training rows"


def evaluate(cfg: StageConfig, workdir: Path, corpus: Path) -> str:
    """Masked accuracy on held-out clips."""
    total = evaluate_stage(cfg, workdir=workdir, corpus=corpus).get("total")
    if total is None:
        return "no held-out data"
    ratio = times_trivial(total)
    if ratio is None:
        if total["majority"] is None:
            return f"positive picked at {total['accuracy']:.3f} of the hidden frames of {total['clips']} held-out clips"
        return f"{total['clips']} held-out clips, but no frame of them that the trivial predictors get right"
    return (
        f"masked accuracy {total['accuracy']:.3f} on {total['clips']} held-out clips; majority unit "
        f"{total['majority']:.3f}, nearest visible unit {total['copy']:.3f}: {ratio:.2f}x the better of the two"
    )


def probe(stages: list[StageConfig], workdir: Path, corpus: Path) -> str:
    """The language probe across sources."""
    result = probe_stages(stages, workdir=workdir, corpus=corpus)
    write_json(Path(workdir) / "probe.json", result)
    if "rows" not in result:
        return result["note"]
    rows = result["rows"]
    shown = ", ".join(f"{row['name']} {row['accuracy']:.2f}" for row in rows)
    return f"accuracy on {rows[0]['clips']} clips, chance {rows[0]['chance']:.2f}: {shown}"


def export(cfg: StageConfig, workdir: Path, corpus: Path) -> str:
    """A Hugging Face folder, checked against PyTorch if that is installed."""
    out = Path(workdir) / "export"
    shutil.rmtree(out, ignore_errors=True)  # of a step that was killed before it was marked done
    result = export_stage(cfg.name, workdir=workdir, corpus=corpus, out=out)
    write_json(Path(workdir) / "export.json", result)
    if result["largest_difference"] is None:
        return result["checked_with"]
    return f"largest difference of any hidden state to {result['checked_with']}: {result['largest_difference']:.1e}"
