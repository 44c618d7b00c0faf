"""Fine-tuning on a track: an encoder and a linear layer of its last hidden state, by CTC.

    finetune MODEL --mlsuperb DIR ─▶ WORKDIR/mlsuperb/NAME/HOURS/TRACK: results.json, hypotheses.tsv, ...
                                       │   (of the challenge in a folder of that, by the set that is judged)
                                       └ export THAT_FOLDER ─▶ HubertForCTC or WavLMForCTC, with its processor

Loop and step are those of pre-training; batches, validation, decoding and figures those of `superb`
(`training`, `judging`, `scoring`), whose results lie beside these. `recipe` says how, `recogniser` reads a run back.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from jax.sharding import Mesh

from data_pipelines.atomic import whole_file
from data_pipelines.batch import Batch, num_frames
from data_pipelines.mlsuperb.tracks import Track
from experiments.commands import Unsaid
from experiments.mlsuperb.encoders import LOG_MEL, RANDOM, FrozenEncoder
from experiments.mlsuperb.faults import Folder, challenge_folder, faults_of, read_folder
from experiments.mlsuperb.judging import decode, write_hypotheses
from experiments.mlsuperb.protocol import ProtocolError, Schedule
from experiments.mlsuperb.recipe import RecipeConfig
from experiments.mlsuperb.results import Followed, data_facts, results_of, write
from experiments.mlsuperb.scoring import Judged, averages, judge
from experiments.mlsuperb.training import (
    Steps,
    TrackFiles,
    Trained,
    check_unchanged,
    judged_set,
    programs,
    train_track,
)
from experiments.run import say, write_json
from experiments.stage import as_text
from experiments.stage_card import flat_config
from experiments.stage_files import StageFiles
from experiments.trained import imported_model
from wavlab_jax.convert.layouts import read_checkpoint
from wavlab_jax.model import Parameters, count, write_description
from wavlab_jax.sharding import micro_batches, place_batch
from wavlab_jax.step import LearnerConfig, abstract_state


class RecogniserFiles(TrackFiles):
    """`TrackFiles`, and what an export needs beside the parameters."""

    def __init__(self, workdir: Path, model: str, track: Track):
        super().__init__(workdir, model, track)
        self.recogniser = self.folder / "recogniser.json"
        self.model = self.folder / "model.json"
        self.config = self.folder / "config.txt"


@dataclass(frozen=True)
class FineTuning:
    """One fine-tuning, with the properties of `training.Run`.

    Attributes:
        track, mesh, files: of it.
        encoder: as it was read: what training begins with, or what stays frozen.
        model: what that was read from, as it was named.
        cfg: how.
        unsaid: what had to be said of the model's file.
    """

    track: Track
    encoder: FrozenEncoder
    model: str
    cfg: RecipeConfig
    mesh: Mesh
    files: RecogniserFiles
    unsaid: Unsaid = Unsaid()

    @property
    def schedule(self) -> Schedule:
        """Iterations and validations."""
        return self.cfg.schedule()

    @property
    def learner(self) -> LearnerConfig:
        """What the step computes."""
        return self.cfg.learner(self.encoder.config, tokens=len(self.track.tokens))

    @property
    def frozen(self) -> Parameters | None:
        """The encoder's parameters, where an adapter is trained in their place."""
        return self.encoder.params if self.learner.frozen_encoder else None

    @property
    def inherited(self) -> Parameters | None:
        """The encoder's parameters, where they are trained, which takes these arrays over."""
        return None if self.learner.frozen_encoder else {"encoder": self.encoder.params}

    def steps(self) -> Steps:
        """The programs."""
        return programs(self.learner, self.mesh, self.track, encoder=self.frozen)

    def place(self, batch: Batch, *, training: bool = False) -> Batch:
        """Host rows -> global arrays; in training in as many passes as the devices need."""
        rows, samples = batch.waveform.shape
        seconds = self.cfg.seconds_per_device
        passes = micro_batches(rows, samples, seconds_per_device=seconds, devices=self.mesh.size) if training else 1
        return place_batch(batch, mesh=self.mesh, passes=passes)


def fine_tune(run: FineTuning, *, root: Path, workdir: Path) -> dict:
    """Trains, or goes on, or takes what was trained; judges it, and returns its results.json.

    Raises ProtocolError (no encoder, a layer that it has not, another run in the folder), MlSuperbError, NonFinite,
    Interrupted, AudioError, CheckpointError.
    """
    config = run.encoder.config
    if config is None:
        raise ProtocolError(f"{LOG_MEL} has no encoder to fine-tune: name a stage, a model, or {RANDOM}MODEL")
    layers = run.cfg.optimizer.layers
    if layers and max(layers) > config.layers:
        raise ProtocolError(f"optimizer.layers names layer {max(layers)}, but {run.model} has {config.layers}")
    check_unchanged(run)
    if (judged_on := judged_set(run.track)) is None:
        folder = read_folder(root, duration=run.track.duration)
    else:
        folder = challenge_folder(root, judged_on=judged_on)
    _describe(run, workdir)
    every, trained_parameters = run.cfg.optimizer.accumulate, count(abstract_state(run.learner, run.mesh).params)
    say(
        f"{run.encoder.name}, {run.track.name}: {run.schedule.iterations // every:,} updates of {every} batches, "
        f"{len(run.track.tokens):,} tokens, {trained_parameters:,} parameters"
        + ("" if run.frozen is None else f" on the {count(run.encoder.params):,} frozen ones of the encoder")
    )
    began = time.monotonic()
    trained = train_track(run)
    judged = judge(run.track, decode(run, trained))
    write_hypotheses(run.files.hypotheses, judged)
    return _write_results(run, trained, judged, folder=folder, seconds=time.monotonic() - began)


def _describe(run: FineTuning, workdir: Path) -> None:
    """What an export reads, beside the parameters."""
    drawn = RANDOM if run.model.startswith(RANDOM) else ""
    name = run.model.removeprefix(drawn)
    imported = imported_model(workdir, name)
    if imported is not None:
        name, kind = str(imported.absolute()), read_checkpoint(imported, **run.unsaid.arguments()).model_type
    else:
        contrastive = "learner.objective.negatives" in flat_config(StageFiles(workdir, name).config)
        kind = "wav2vec2" if contrastive else "hubert"
    write_description(run.files.model, run.learner.encoder, run.learner.head)
    with whole_file(run.files.config) as temporary:
        temporary.write_text(as_text(run.cfg))
    about = {
        "model": drawn + name,
        "unsaid": asdict(run.unsaid),
        "identity": run.encoder.identity,
        "model_type": kind,
        "languages": sorted({each.utterance.group_language for each in run.track.parts["train"]}),
        "tokens": run.track.tokens,
        "token": run.track.token_kind,
        "texts": written_as(run.track),
    }
    write_json(run.files.recogniser, about)


def written_as(track: Track) -> str:
    """How the texts look that a model of this track writes, for its card."""
    kinds = {
        "character": "Texts are in capitals, without ASCII's punctuation",
        "phone": "Phones are written, with spaces between them",
        "language": "The language alone is written",
    }
    said = kinds[track.token_kind]
    if judged_set(track) is not None:
        said = "Texts have capitals, small letters and punctuation, as in the challenge's data"
    return f"{said}; a token such as `{track.symbols[0]}` names a language." if track.symbols else f"{said}."


def _write_results(run: FineTuning, trained: Trained, judged: list[Judged], *, folder: Folder, seconds: float) -> dict:
    """results.json and left_out.tsv, as `results` has them; a token is spelled in a frame of the encoder."""
    faults = faults_of(run.track, folder, frames_of=num_frames)
    facts = data_facts(run.track, folder, faults)
    miniature = ["a miniature in the benchmark's layout, not its data"] if folder.miniature else []
    optimizer = run.cfg.optimizer
    followed = Followed(
        False,
        [*miniature, *run.cfg.deviations(), *folder.lacks(run.track)],
        [],
        optimizer.accumulate,
        optimizer.peak_learning_rate,
    )
    results = results_of(run, trained, judged, followed, data=facts, layer_weights=[], seconds=seconds)
    if run.track.task == "joint":
        results["challenge"] = averages(judged)
    return write(run, results, faults)
