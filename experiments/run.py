"""Training one stage, linearly: corpus, units, mesh, state, batches, loop."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines.atomic import whole_file
from data_pipelines.identity import data_digest, data_identity, what_changed
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import describe_rows, train_batches
from data_pipelines.sampling import Draw
from data_pipelines.units import UnitStore
from experiments.hosts import agree, check_shared, is_first, peer_lost, wait_for_all
from experiments.machine import git_commit, versions
from experiments.probe_clips import check_alignments
from experiments.probes import make_probes
from experiments.stage import StageConfig, StageError, as_text, beginning, check_unchanged, flatten
from experiments.stage_files import StageFiles, write_json
from experiments.targets import Labels, make_labels
from experiments.trained import check_corpus, imported_model, is_finished, lineage, load_model
from wavlab_jax.checkpoint import Checkpoints, restore_state, start, steps_of
from wavlab_jax.chips import chip_of
from wavlab_jax.clock import Work
from wavlab_jax.compiling import return_memory_after_compiling
from wavlab_jax.convert.continuing import continued, disagreements
from wavlab_jax.convert.heads import head_parameters
from wavlab_jax.convert.layouts import read_checkpoint
from wavlab_jax.flops import row_flops
from wavlab_jax.metrics import MetricsWriter
from wavlab_jax.model import Parameters, count, parameters, read_description, write_description
from wavlab_jax.objectives import objective_of
from wavlab_jax.sharding import make_mesh, micro_batches, place_batch
from wavlab_jax.step import abstract_state, initial_state, make_train_step
from wavlab_jax.train import train
from wavlab_jax.weights_and_biases import WandbTracker


def configure_jax(workdir: Path) -> None:
    """Compiled programs are kept beside the runs, so that a restart does not compile again."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(workdir).absolute() / "compiled")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return_memory_after_compiling()


def train_stage(cfg: StageConfig, *, workdir: Path, corpus: Path, launched: bool = False) -> None:
    """Trains `cfg` to its last step, or continues it; returns at once if that is done.

    With several processes (`experiments.hosts`) all of them call this, and the first writes what there is one of.
    `launched`: this is what the process was launched for, and it says when, after that, its first step ended.

    Raises StageError (changed configuration), CorpusChanged, SamplingError (too little to draw from), CheckpointError,
    UnitQualityError (too few alignments to probe phones), UnitsError, ManifestError, HostsError (processes that were
    not started alike), PeerLost, NonFinite, Interrupted.
    """
    agree("the configuration", as_text(cfg))
    agree("what is installed", json.dumps(versions()))
    files = StageFiles(workdir, cfg.name)
    check_unchanged(cfg, files)
    manifest = Manifest.load(corpus)
    agree("the corpus' fingerprint", manifest.fingerprint)
    check_corpus(files, manifest)
    finished = is_finished(files)
    agree("whether the stage is trained already", str(finished))
    if finished:
        return
    shares = shares_table(cfg, manifest)  # before units are made: not every corpus can be drawn from as asked
    check_alignments(manifest, cfg.probes)
    mesh = make_mesh(cfg.mesh)
    labels = make_labels(cfg.unit_sets, workdir, manifest, mesh)
    check_units(cfg, labels.stores)
    fork = fork_of(cfg, workdir)
    _remember(cfg, workdir, manifest, labels, shares, fork)

    like = abstract_state(cfg.learner, mesh)
    train_step = make_train_step(cfg.learner, mesh, labels.targets, languages=len(manifest.languages))

    def place(batch):
        rows, samples = batch.waveform.shape
        passes = micro_batches(
            rows * jax.process_count(), samples, seconds_per_device=cfg.seconds_per_device, devices=mesh.size
        )
        return place_batch(batch, mesh=mesh, passes=passes)

    with _everything_closed() as opened:
        checkpoints = opened.enter_context(
            closing(
                Checkpoints(
                    files.checkpoints,
                    keep=cfg.loop.keep,
                    keep_every=cfg.loop.keep_every,
                    keep_best=cfg.loop.keep_best,
                    data={"digest": data_digest(manifest, cfg.data)},
                    about={"configuration": as_text(cfg), "versions": versions(), "commit": git_commit()},
                )
            )
        )
        own = checkpoints.latest()
        agree("the newest checkpoint", str(own))
        restored = start(
            checkpoints,
            like=like,
            fresh=lambda: initial_state(cfg.learner, mesh),
            forked=fork and (lambda: restore_state(fork.checkpoints, like, step=fork.step)),
            inherited=inherit(cfg, workdir, mesh) if cfg.init_from and own is None else None,
        )
        first, host, hosts = int(restored.state.step), jax.process_index(), jax.process_count()
        say(
            f"{cfg.name}: {count(like.params):,} parameters, {cfg.data.seconds_per_step:g} s of audio a step on "
            f"{mesh.size} device(s){f' of {hosts} processes' if hosts > 1 else ''}, "
            + (f"from step {first}" if own is not None else f"from {fork or cfg.init_from or 'scratch'}")
        )
        tracker = None
        if cfg.loop.wandb and is_first():
            tracker = WandbTracker(files.folder, project=cfg.loop.wandb, name=cfg.name, config=flatten(cfg))
        # a run without a checkpoint of its own writes all its lines, that of the probe before its first step as well
        written = first if own is not None else -1
        writer = opened.enter_context(
            closing(MetricsWriter(files.metrics, resume_step=written, active=is_first(), tracker=tracker))
        )
        probes = make_probes(cfg, labels, manifest, mesh, at_start=own is None, files=files)
        batches = opened.enter_context(
            train_batches(cfg.data, manifest, labels.stores, start=first, host=host, hosts=hosts)
        )
        train(
            restored.state,
            train_step,
            batches,
            place=place,
            describe=lambda batch: describe_rows(batch, manifest),
            checkpoints=checkpoints,
            writer=writer,
            folder=files.folder,
            cfg=cfg.loop,
            record=restored.record,
            title=cfg.name,
            languages=manifest.languages,
            work=work_of(cfg, mesh),
            probes=probes,
            shown=objective_of(cfg.learner.objective).SHOWN,
            say_start=launched and is_first(),
        )
    if is_first():
        write_json(files.finished, {"step": cfg.loop.steps})
    wait_for_all("stage finished")


def say(line: str) -> None:
    """A line beside the bar, once for all processes."""
    if is_first():
        tqdm.write(line)


@contextmanager
def _everything_closed() -> Iterator[ExitStack]:
    """A stack that is closed whatever fails, so that a save in flight is finished.

    Unless another process is gone: closing would wait for it. What devices report then becomes PeerLost.
    """
    with ExitStack() as opened:
        try:
            yield opened
        except Exception as error:
            lost = peer_lost(error)
            if lost is None:
                raise
            opened.pop_all()
            raise lost from error


class Fork(NamedTuple):
    """A run that goes on from another one's whole state: of `stage`, at `step`."""

    stage: str
    step: int
    checkpoints: Path

    def __str__(self) -> str:
        return f"step {self.step} of {self.stage}: its parameters, its optimizer's state, its number of steps"


def fork_of(cfg: StageConfig, workdir: Path) -> Fork | None:
    """What `cfg.continue_from` names: a stage of the workdir, finished or not, and a step of which it has a checkpoint.

    Without a step it is the newest one when the run was begun. Raises StageError, CheckpointError.
    """
    if cfg.continue_from is None:
        return None
    stage, _, step = cfg.continue_from.partition("@")
    if step and not step.isdecimal():
        raise StageError(
            f"continue_from {cfg.continue_from}: give a stage, or a stage@step; of an average there is no optimizer: "
            "init_from takes it"
        )
    if stage == cfg.name:
        raise StageError(f"continue_from {cfg.continue_from} is this stage itself: give the fork another --name")
    source, inputs = StageFiles(workdir, stage), StageFiles(workdir, cfg.name).inputs
    if inputs.exists():  # the source may have gone on since
        return Fork(stage, json.loads(inputs.read_text()).get("continue_from", {}).get("step"), source.checkpoints)
    kept = steps_of(source.checkpoints)
    taken = int(step) if step else max(kept, default=0)
    if taken not in kept or taken >= cfg.loop.steps:
        raise StageError(
            f"continue_from {cfg.continue_from}: step {taken}; {stage} keeps {', '.join(map(str, kept)) or 'none'}, "
            f"and this stage makes {cfg.loop.steps} steps"
        )
    _check_architecture(cfg, source)
    return Fork(stage, taken, source.checkpoints)


def _check_architecture(cfg: StageConfig, source: StageFiles) -> None:
    """Raises StageError where the parameters of `source` would compute something else in `cfg`; shapes do not tell."""
    wrong = disagreements(read_description(source.model).encoder, cfg.learner.encoder)
    if wrong:
        raise StageError(
            f"{cfg.name} cannot go on from {source.folder.name}: {'; '.join(wrong)}. Its parameters would compute "
            "something else: give learner.encoder these settings"
        )


def work_of(cfg: StageConfig, mesh: Mesh) -> Work:
    """What utilisation is measured with: operations by formula, and what the devices can do if they are known."""
    negatives = getattr(cfg.learner.objective, "negatives", 0)

    @cache
    def operations(samples: int) -> float:
        return row_flops(cfg.learner.encoder, cfg.learner.head, samples=samples, negatives=negatives).training

    chip = chip_of(mesh.devices.flat[0])
    return Work(operations, mesh.size, None if chip is None else chip.peak_flops)


def inherit(cfg: StageConfig, workdir: Path, mesh: Mesh) -> Callable[[Parameters], Parameters]:
    """What a stage takes over from `cfg.init_from`, as a function of its fresh parameters; says so.

    Of a stage: the encoder, and the head too if it predicts the same units. Of an imported model: every tensor of the
    encoder that fits, and the head if `cfg.init_head`. Raises StageError, CheckpointError, ConvertError.
    """
    imported = imported_model(workdir, cfg.init_from)
    if imported is not None:
        return lambda fresh: continue_imported(cfg, imported, fresh)
    lineage(workdir, cfg.init_from)  # for what it raises where that stage is not trained to its end
    _check_architecture(cfg, StageFiles(workdir, cfg.init_from))
    params = parameters(load_model(workdir, cfg.init_from, mesh))
    before, now = (json.loads(StageFiles(workdir, name).inputs.read_text()) for name in (cfg.init_from, cfg.name))
    same = all(before.get(key) == now.get(key) for key in ("units", "more_units"))
    same = same and read_description(StageFiles(workdir, cfg.init_from).model).head == cfg.learner.head
    taken = "encoder and head" if same else "its encoder; the head is fresh, because it predicts something else"
    say(f"{cfg.name}: continues {cfg.init_from}: {taken}")
    return lambda fresh: params if same else {"encoder": params["encoder"]}


def continue_imported(cfg: StageConfig, path: Path, fresh: Parameters) -> Parameters:
    """The parameters of `cfg` that the model at `path` has, and what it has not, said. Raises ConvertError."""
    checkpoint = read_checkpoint(path)
    found = continued(checkpoint, cfg.learner.encoder, fresh=fresh["encoder"])
    say(f"{cfg.name}: continues {path} ({checkpoint.layout}): {found.taken} tensors of the encoder")
    for title, names in (("fresh", found.fresh), ("not used", found.unused), ("trained otherwise", found.differing)):
        if names:
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            say(f"  {title}: {', '.join(names[:12])}{more}")
    if not cfg.init_head:
        say("  fresh: the head (--init-head True takes it over, if this stage predicts the same units)")
        return {"encoder": found.params}
    return {"encoder": found.params, "head": head_parameters(checkpoint, like=fresh["head"])}


def check_units(cfg: StageConfig, stores: Sequence[UnitStore]) -> None:
    """Before step 1: the classes of the head are those of the stores, and most of them occur.

    Of units that are computed in the step nothing is known yet; their usage is seen in evaluation.
    """
    classes_of = {each.name: each.units for each in cfg.unit_sets}
    for store in stores:
        classes = classes_of[store.directory.name]
        if store.units != classes:
            raise StageError(f"{cfg.name}: {store.directory} has {store.units} units, the head {classes}")
        used = int((store.counts() > 0).sum())
        if used < store.units / 2:
            raise StageError(
                f"{cfg.name}: only {used} of {store.units} units of {store.directory} occur; a teacher that has "
                "collapsed makes such units: look at its metrics, delete the folder and make them again"
            )


def shares_table(cfg: StageConfig, manifest: Manifest) -> dict[str, dict[str, float]]:
    """By language: hours, its natural share, the share this stage draws, and epochs over it in the whole run."""
    from data_pipelines.pipeline import rows_per_step

    rows = [rows_per_step(length, cfg=cfg.data) for length in cfg.data.lengths]
    draw = Draw(manifest, lengths=cfg.data.lengths, rows=rows, cfg=cfg.data.draw, seed=cfg.data.seed)
    table: dict[str, dict[str, float]] = {}
    for share in draw.shares(steps=cfg.loop.steps):
        row = table.setdefault(share.language, {"hours": 0.0, "natural": 0.0, "drawn": 0.0, "heard": 0.0})
        row["hours"] += share.hours
        row["natural"] += share.natural
        row["drawn"] += share.drawn
        row["heard"] += share.hours * share.epochs
    return {name: {**row, "epochs": row["heard"] / row["hours"]} for name, row in table.items()}


def _remember(
    cfg: StageConfig,
    workdir: Path,
    manifest: Manifest,
    labels: Labels,
    shares: dict[str, dict[str, float]],
    fork: Fork | None,
) -> None:
    """Writes what this run is, or checks that it is still that."""
    files = StageFiles(workdir, cfg.name)
    first = labels.sources[0] if labels.sources else None
    inputs: dict[str, object] = {"corpus": manifest.fingerprint, "units": first}
    if labels.sources[1:]:
        inputs["more_units"] = labels.sources[1:]
    if cfg.init_from:
        inputs["init_from"] = lineage(workdir, cfg.init_from)
    if fork is not None:
        begun = beginning(StageFiles(workdir, fork.stage))
        inputs["continue_from"] = {"stage": fork.stage, "step": fork.step, "begun": begun}
    if files.inputs.exists() and json.loads(files.inputs.read_text()) != inputs:
        raise StageError(
            f"{files.folder} was trained on other units or from another parent: then "
            f"{files.inputs.read_text()}, now {json.dumps(inputs)}; give another --workdir"
        )
    identity, heard = data_identity(manifest, cfg.data), files.data
    then = identity
    if heard.exists():
        then = json.loads(heard.read_text())
    elif files.checkpoints.exists():
        then = identity | {"draw rules": "those before they were noted"}
    changed = what_changed(then, identity)
    if changed:
        raise StageError(
            f"{files.folder} would go on with other batches:\n  " + "\n  ".join(changed) + "\ngive another --workdir"
        )
    wait_for_all("the run looked at")  # before it changes
    if is_first():
        files.folder.mkdir(parents=True, exist_ok=True)
        write_json(heard, identity)
        write_description(files.model, cfg.learner.encoder, cfg.learner.head)
        write_json(files.folder / "shares.json", shares)
        write_json(files.inputs, inputs)
        with whole_file(files.config) as temporary:
            temporary.write_text(as_text(cfg))
    check_shared(files.config, as_text(cfg))
