"""Training the downstream model of one track, and the mean of its best checkpoints: batches, step, loop, validation."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines.batch import Batch
from data_pipelines.mlsuperb.batches import track_batches
from data_pipelines.mlsuperb.layout import PARTS
from data_pipelines.mlsuperb.tracks import Track
from experiments.machine import git_commit, versions
from experiments.mlsuperb.encoders import FrozenEncoder, draws_noise
from experiments.mlsuperb.protocol import (
    ProtocolConfig,
    ProtocolError,
    Schedule,
    downstream_of,
    loop_of,
    optimizer_of,
    schedule_of,
)
from experiments.run import write_json
from experiments.stage import flatten
from wavlab_jax.checkpoint import Checkpoints, average, restore_parameters, start, steps_of, write_parameters
from wavlab_jax.downstream import DownstreamConfig
from wavlab_jax.metrics import MetricsWriter, read_lines
from wavlab_jax.model import Parameters, abstract_parameters
from wavlab_jax.objectives import RecognitionConfig, recognition
from wavlab_jax.sharding import abstract_on, place_batch
from wavlab_jax.step import (
    EvaluationStep,
    LearnerConfig,
    TrainStep,
    abstract_state,
    initial_state,
    make_predict_step,
    make_train_step,
    make_validation_step,
)
from wavlab_jax.train import train


def judged_set(track: Track) -> str | None:
    """Of the challenge's track the development set that is judged, which changes nothing of training; else None."""
    return track.name.split()[1] if track.name.startswith("challenge ") else None


class TrackFiles:
    """Where one model's training on one track keeps what; none need exist.

    One training on the challenge is judged on two sets: of each, results lie in a folder of that of the training.
    """

    def __init__(self, workdir: Path, model: str, track: Track):
        judged = judged_set(track)
        name = track.name.replace(" ", "-") if judged is None else "challenge"
        self.folder = Path(workdir) / "mlsuperb" / model / track.duration / name
        self.judged = self.folder if judged is None else self.folder / judged
        self.inputs = self.folder / "inputs.json"
        self.checkpoints = self.folder / "checkpoints"
        self.average = self.folder / "average"
        self.finished = self.folder / "finished.json"
        self.hypotheses = self.judged / "hypotheses.tsv"
        self.left_out = self.judged / "left_out.tsv"
        self.results = self.judged / "results.json"


class Trained(NamedTuple):
    """A downstream model, ready to be judged.

    Attributes:
        learner: what it is.
        params: of what was trained, on the mesh: the mean of the best checkpoints.
        averaged: step -> validation loss of each of these.
        losses: of the whole run: rows of "step" with "ctc_loss" (training) or "valid_loss".
    """

    learner: LearnerConfig
    params: Parameters
    averaged: dict[int, float]
    losses: list[dict]


@dataclass(frozen=True)
class Run:
    """One training: what is trained on what, how, and where.

    Attributes:
        track, encoder, cfg, mesh, files: of it.
        downstream: the shape of the model, but for the number of tokens; by default that of `cfg`.
    """

    track: Track
    encoder: FrozenEncoder
    cfg: ProtocolConfig
    mesh: Mesh
    files: TrackFiles
    downstream: DownstreamConfig | None = None

    @property
    def schedule(self) -> Schedule:
        """Iterations and validations."""
        task = self.track.task if judged_set(self.track) is None else "challenge"
        return schedule_of(self.cfg, task, self.track.duration)

    @property
    def learner(self) -> LearnerConfig:
        """What the step computes. Log-mel features have 80 channels already, and no encoder."""
        tokens = len(self.track.tokens)
        head = replace(self.downstream or downstream_of(self.cfg, tokens=tokens), tokens=tokens)
        if self.encoder.config is None:
            head = replace(head, projection=0)
        return LearnerConfig(
            encoder=self.encoder.config,
            head=head,
            objective=RecognitionConfig(encoder_noise=draws_noise(self.encoder.config)),
            optimizer=optimizer_of(self.cfg),
            seed=self.cfg.seed,
            frozen_encoder=self.encoder.config is not None,
        )

    @property
    def inherited(self) -> Parameters | None:
        """What training begins with, in place of fresh values."""
        return None

    def steps(self) -> "Steps":
        """The programs; those of the run before are taken again where only the encoder's numbers are others."""
        return programs(self.learner, self.mesh, self.track, encoder=self.encoder.params)

    def place(self, batch: Batch, *, training: bool = False) -> Batch:
        """Host rows -> global arrays, in one pass: rows hear how long their batch's longest is."""
        return place_batch(batch, mesh=self.mesh, passes=1)


class Steps(NamedTuple):
    """Of one learner: an update, the sums of a validation, a judgement."""

    train: TrainStep
    validate: EvaluationStep
    predict: EvaluationStep


def programs(learner: LearnerConfig, mesh: Mesh, track: Track, *, encoder: Parameters | None) -> Steps:
    """Of a run on a track; `encoder`: the parameters of a frozen one. The last ones stay at hand."""
    languages = len({each.utterance.language for each in track.parts["train"]})
    made = _steps(learner, mesh, languages)
    return made if encoder is None else Steps(*(step.of_encoder(encoder) for step in made))


@lru_cache(maxsize=1)
def _steps(learner: LearnerConfig, mesh: Mesh, languages: int) -> Steps:
    """For the shape of an encoder, which `programs` puts in."""
    shapes = None
    if learner.frozen_encoder:
        model = abstract_parameters(learner.encoder, learner.head)
        shapes = abstract_on({"encoder": model["encoder"]}, mesh)["encoder"]
    return Steps(
        make_train_step(learner, mesh, encoder=shapes, languages=languages),
        make_validation_step(learner, mesh, encoder=shapes),
        make_predict_step(learner, mesh, encoder=shapes),
    )


def train_track(run: Run) -> Trained:
    """Trains to the last iteration, or continues, or takes what was trained; the same command does any of it.

    What is left in the folder is the mean of the best checkpoints; the checkpoints themselves are deleted.

    Raises ProtocolError (the folder holds another run), NonFinite, Interrupted, AudioError, CheckpointError.
    """
    files, learner = run.files, run.learner
    like = abstract_state(learner, run.mesh)
    if not files.finished.exists():
        scores = _trained(run)
        best = sorted(scores, key=scores.get)[: run.schedule.averaged]
        mean = average(files.checkpoints, best, like.params)
        about = {"mean of steps": sorted(best), "versions": versions(), "commit": git_commit()}
        if files.average.exists():
            shutil.rmtree(files.average)  # of a run that was killed before it could say that it is finished
        write_parameters(files.average, mean, step=run.schedule.iterations, about=about)
        write_json(files.finished, {"averaged": {str(step): scores[step] for step in sorted(best)}})
    if files.checkpoints.exists():
        shutil.rmtree(files.checkpoints)
    params = restore_parameters(files.average, abstract_on(like.params, run.mesh))
    averaged = {int(step): loss for step, loss in json.loads(files.finished.read_text())["averaged"].items()}
    wanted = ("step", "ctc_loss", "infeasible", "valid_loss")
    losses = [{key: row[key] for key in wanted if key in row} for row in read_lines(files.folder / "metrics.jsonl")]
    return Trained(learner, params, averaged, losses)


def _trained(run: Run) -> dict[int, float]:
    """Runs the loop; returns the validation loss at each checkpoint that was kept."""
    files, learner, loop = run.files, run.learner, loop_of(run.schedule)
    like = abstract_state(learner, run.mesh)
    languages = sorted({each.utterance.language for each in run.track.parts["train"]})
    with ExitStack() as opened:
        checkpoints = Checkpoints(
            files.checkpoints,
            keep=loop.keep,
            keep_best=loop.keep_best,
            data={"digest": track_digest(run.track)},
            about={"versions": versions(), "commit": git_commit()},
        )
        opened.enter_context(closing(checkpoints))
        restored = start(
            checkpoints, like=like, fresh=lambda: initial_state(learner, run.mesh), inherited=run.inherited
        )
        first = int(restored.state.step)
        writer = opened.enter_context(closing(MetricsWriter(files.folder, resume_step=first)))
        batches = opened.enter_context(track_batches(run.track, "train", run.cfg.batches, start=first, training=True))
        train(
            restored.state,
            run.steps().train,
            batches,
            place=partial(run.place, training=True),
            describe=lambda batch: [
                str(run.track.parts["train"][index].utterance.path) for index in batch.utterance if index >= 0
            ],
            checkpoints=checkpoints,
            writer=writer,
            folder=files.folder,
            cfg=loop,
            record=restored.record,
            title=f"{run.encoder.name}, {run.track.name}",
            languages=languages,
            shown=recognition.SHOWN,
            validate=_validation(run),
        )
    return steps_of(files.checkpoints)


def _validation(run: Run) -> Callable[[Parameters], float]:
    """Parameters -> the loss on the dev set, in batches sorted by length as ESPnet has them."""
    validate = run.steps().validate
    batches = -(-len(run.track.parts["dev"]) // run.cfg.batches.size)

    def loss(params: Parameters) -> float:
        total = weight = 0.0
        with track_batches(run.track, "dev", run.cfg.batches) as dev:
            shown = {"desc": "validate", "unit": "batch", "leave": False, "mininterval": 1.0, "dynamic_ncols": True}
            for batch in tqdm(dev, total=batches, **shown):
                found = jax.device_get(validate(params, run.place(batch))["ctc_loss"])
                total, weight = total + float(found.total), weight + float(found.weight)
        return total / weight

    return loss


def track_digest(track: Track) -> str:
    """What the batches of a track depend on: utterances, lengths, texts and tokens of all parts.

    Of the challenge, without the part that is judged: one training has two of these.
    """
    digest = hashlib.sha256(json.dumps(track.tokens).encode())
    for part in PARTS if judged_set(track) is None else ("train", "dev"):
        for each in track.parts[part]:
            digest.update(f"{part}\t{each.utterance.id}\t{each.utterance.seconds}\t{each.text}\n".encode())
    return digest.hexdigest()[:16]


def check_unchanged(run: Run, *, begins: bool = True) -> None:
    """Raises ProtocolError naming in what the folder's run is another; of none, writes what this is if it `begins`."""
    loads = ("threads", "prefetch", "step", "doubling", "fillers")  # how batches are made, not what is in them
    now = {
        "model": run.encoder.identity,
        "data": track_digest(run.track),
        **{f"learner.{name}": value for name, value in flatten(run.learner).items()},
        **{f"protocol.{name}": value for name, value in flatten(run.cfg).items() if name.split(".")[-1] not in loads},
    }
    if not run.files.inputs.exists():
        return write_json(run.files.inputs, now) if begins else None
    then = json.loads(run.files.inputs.read_text())
    changed = [f"  {name}: {then.get(name)} then, {now.get(name)} now" for name in {**then, **now}
               if then.get(name) != now.get(name)]  # fmt: skip
    if changed:
        raise ProtocolError(
            f"{run.files.folder} holds another run:\n" + "\n".join(changed) + "\ngive another --name or --workdir, or "
            "delete that folder"
        )
