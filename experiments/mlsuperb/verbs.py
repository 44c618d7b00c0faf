"""What `python -m experiments superb`, `finetune` and `leaderboard` take, and how they are wired."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_pipelines.interrupts import interrupts_end_at_once

with interrupts_end_at_once():
    from jax.sharding import Mesh

    from data_pipelines.mlsuperb.batches import TrackBatchesConfig
    from data_pipelines.mlsuperb.challenge import Development, read_challenge
    from data_pipelines.mlsuperb.layout import Duration
    from data_pipelines.mlsuperb.tracks import MONOLINGUAL_SETS, Task, Track, read_track
    from experiments.commands import WORKDIR, Unsaid
    from experiments.mlsuperb.benchmark import run_benchmark, summary, tracks_of
    from experiments.mlsuperb.encoders import FrozenEncoder, read_encoder, shape_of
    from experiments.mlsuperb.estimate import DEFAULT_UTILISATION, estimate, table
    from experiments.mlsuperb.finetuning import FineTuning, RecogniserFiles, fine_tune
    from experiments.mlsuperb.gathered import write_leaderboard
    from experiments.mlsuperb.protocol import (
        ACCUMULATE,
        BATCH,
        CHALLENGE_LEARNING_RATE,
        LEARNING_RATE,
        WIDTH,
        ProtocolConfig,
        ProtocolError,
    )
    from experiments.mlsuperb.recipe import RecipeConfig
    from experiments.run import configure_jax
    from wavlab_jax.chips import chip_named
    from wavlab_jax.sharding import MeshConfig, make_mesh

TrackName = Literal["monolingual", "multilingual", "lid", "joint"]
TASKS: dict[TrackName, Task] = {
    "monolingual": "monolingual",
    "multilingual": "multilingual",
    "lid": "identification",
    "joint": "joint",
}


@dataclass(frozen=True)
class SuperbCommand:
    """ML-SUPERB for one model: a small recogniser on its frozen layers, trained and judged on each track.

    Results go to WORKDIR/mlsuperb/NAME/HOURS/TRACK/results.json. The same command goes on where it was killed.
    """

    model: tyro.conf.Positional[str]
    """A stage that was trained in the workdir; a file or folder that `import` takes, such as a Hugging Face folder;
    random:MODEL, for a fresh encoder of that shape, or random:ARCHITECTURE; or log-mel."""
    mlsuperb: Path | None = None
    """The benchmark's folder, as unpacked, or a miniature of it (`python -m data_pipelines miniature`)."""
    plan: str | None = None
    """A chip, such as a100-80 or v5e: nothing is run, and the hours that the tracks would take on one are estimated by
    formula. MODEL may also be an architecture of `list`; without --mlsuperb, rows are by the published sizes. The
    challenge too: --track challenge."""
    utilisation: float = DEFAULT_UTILISATION
    """Of a plan: the share of the chip's bfloat16 peak that is assumed to be reached."""
    track: tuple[TrackName | Literal["challenge"], ...] = tuple(TASKS)
    """One or more; by default all four of the benchmark. Or ML-SUPERB 2.0's challenge, by its baseline's recipe; then
    --mlsuperb is what `data_pipelines challenge` writes, or ESPnet's egs2/ml_superb2/asr1."""
    hours: Duration | None = None
    """Of the benchmark's tracks, the training set: so much of each language; by default 10min."""
    judged_on: Development | None = None
    """Of the challenge, the development set that is judged; by default dev. Both are judged of one training."""
    sets: tuple[str, ...] = ()
    """Of the monolingual track, some of its sets (eng1 eng2 ...); by default all 13."""
    scale: float = 1.0
    """Share of the published iterations. Below 1 it is not the published protocol, and every output says so."""
    learning_rate: float | None = None
    """The one thing that the benchmark leaves open; by default 1e-4, and of the challenge 2e-4."""
    accumulate: int = ACCUMULATE
    """Batches an update. Any but the published 4 is not the published protocol, and every output says so."""
    width: int = WIDTH
    """Channels of the downstream model; published is 256. A narrow one, such as 32, learns in minutes on a laptop, and
    every output says so."""
    name: str | None = None
    """Of the model, in the table and of its folder; by default it follows from MODEL."""
    workdir: Path = WORKDIR
    """Of the stage, where MODEL is one, and of the results."""
    batches: TrackBatchesConfig = field(default_factory=lambda: TrackBatchesConfig(size=BATCH))
    mesh: MeshConfig = field(default_factory=MeshConfig)
    unsaid: Annotated[Unsaid, tyro.conf.arg(name="")] = field(default_factory=Unsaid)
    seed: int = 0
    """Of initial values, of what is dropped and masked; --batches.seed is that of the order."""


@dataclass(frozen=True)
class FineTuneCommand:
    """Fine-tune a model, and a linear layer on it, to recognise a track; judge it as `superb` does.

    Results go to WORKDIR/mlsuperb/NAME/HOURS/TRACK, a folder that `export` takes. The same command goes on where it was
    killed.
    """

    model: tyro.conf.Positional[str]
    """A stage that was trained in the workdir; a file or folder that `import` takes, such as a Hugging Face folder; or
    random:MODEL, for a fresh encoder of that shape."""
    mlsuperb: Path
    """The benchmark's folder, as unpacked, or a miniature of it; for the challenge, what `data_pipelines challenge`
    writes, or ESPnet's egs2/ml_superb2/asr1."""
    track: TrackName | Literal["challenge"] = "multilingual"
    """Of the benchmark; or ML-SUPERB 2.0's challenge."""
    hours: Duration | None = None
    """Of the benchmark's tracks, the training set: so much of each language; by default 10min."""
    language: str | None = None
    """Of the monolingual track, one of its sets: eng1, ..., cmn."""
    judged_on: Development | None = None
    """Of the challenge, the development set that is judged; by default dev."""
    name: str | None = None
    """Of the folder, and in the table; by default that of MODEL and what is tuned."""
    recipe: Annotated[RecipeConfig, tyro.conf.arg(name="")] = field(default_factory=RecipeConfig)
    workdir: Path = WORKDIR
    """Of the stage, where MODEL is one, and of the results."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    unsaid: Annotated[Unsaid, tyro.conf.arg(name="")] = field(default_factory=Unsaid)


@dataclass(frozen=True)
class LeaderboardCommand:
    """All ML-SUPERB results of a workdir in one Markdown table, beside the published rows where they are comparable.

    Beside it, with the ending .html, a page of all there is to see: layers, languages, confusions, texts.
    """

    workdir: Path = WORKDIR
    """Of the results: WORKDIR/mlsuperb."""
    pool: Literal["2023", "2024"] = "2024"
    """Of published rows, against the best of which SUPERB points are taken."""
    out: Path | None = None
    """By default WORKDIR/mlsuperb/leaderboard.md."""


def superb(arguments: Sequence[str]) -> None:
    """Judges a model by ML-SUPERB."""
    command = tyro.cli(
        SuperbCommand,
        args=arguments,
        prog="python -m experiments superb",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    tracks, hours = _tracks(command), command.hours or "10min"
    rate = CHALLENGE_LEARNING_RATE if "challenge" in command.track else LEARNING_RATE
    rate = rate if command.learning_rate is None else command.learning_rate
    cfg = ProtocolConfig(command.scale, rate, command.batches, command.accumulate, command.width, command.seed)
    if command.plan is not None:
        return print(_planned(command, tracks, cfg))
    if command.mlsuperb is None:
        raise ProtocolError("give --mlsuperb DIR, the benchmark's folder; or --plan CHIP, for an estimate of the time")
    mesh, encoder = _encoder(command)
    run_benchmark(
        encoder,
        root=command.mlsuperb,
        workdir=command.workdir,
        tracks=tracks,
        duration=hours,
        cfg=cfg,
        mesh=mesh,
    )
    print(f"results: {command.workdir / 'mlsuperb' / encoder.name / ('1h' if 'challenge' in command.track else hours)}")


def _tracks(command: SuperbCommand) -> list:
    """What `run_benchmark` takes. Raises ProtocolError: an option of another track, or tracks of two folders."""
    _check_options(command, command.track, judged_on=["challenge"], hours=list(TASKS))
    if "challenge" not in command.track:
        return tracks_of([TASKS[each] for each in command.track], command.sets)
    if len(set(command.track)) > 1 or command.sets:
        raise ProtocolError("--track challenge is of a folder of its own: give it alone, without --sets")
    return [("challenge", command.judged_on or "dev")]


def _check_options(command: SuperbCommand | FineTuneCommand, tracks: Sequence[str], **of: list[str]) -> None:
    """Raises ProtocolError: an option is given, and none of the tracks that it is of."""
    for option, own in of.items():
        if getattr(command, option) is not None and not set(own) & set(tracks):
            said = f"--{option.replace('_', '-')} is of --track {', '.join(own)}, and not of {', '.join(tracks)}"
            raise ProtocolError(f"{said}: leave it out, or give another track")


def _encoder(command: SuperbCommand | FineTuneCommand) -> tuple[Mesh, FrozenEncoder]:
    """The devices, and on them the model that is named; what was noted about its file is printed."""
    configure_jax(command.workdir)
    mesh = make_mesh(command.mesh)
    encoder = read_encoder(
        command.model, workdir=command.workdir, mesh=mesh, name=command.name, **command.unsaid.arguments()
    )
    for note in encoder.notes:
        print(f"note: {note}")
    return mesh, encoder


def _planned(command: SuperbCommand, tracks, cfg: ProtocolConfig) -> str:
    """What `--plan` prints."""
    if not 0 < command.utilisation <= 1:
        raise ProtocolError(f"utilisation is {command.utilisation:g}; it is a share of the peak, up to 1")
    chip, root = chip_named(command.plan), command.mlsuperb
    encoder = shape_of(command.model, workdir=command.workdir, **command.unsaid.arguments())
    found = estimate(encoder, tracks, duration=command.hours or "10min", cfg=cfg, root=root)
    return table(command.model, found, chip=chip, utilisation=command.utilisation, root=root)


def finetune(arguments: Sequence[str]) -> None:
    """Fine-tunes a model to recognise a track, and judges it."""
    config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    command = tyro.cli(FineTuneCommand, args=arguments, prog="python -m experiments finetune", config=config)
    track = _track(command)
    mesh, encoder = _encoder(command)
    if command.name is None:
        tuned = "finetuned" if command.recipe.adapter == "none" else command.recipe.adapter
        encoder = encoder._replace(name=f"{encoder.name}-{tuned}")
    files = RecogniserFiles(command.workdir, encoder.name, track)
    run = FineTuning(track, encoder, command.model, command.recipe, mesh, files, command.unsaid)
    results = fine_tune(run, root=command.mlsuperb, workdir=command.workdir)
    print(summary(results))
    print(f"results: {files.judged}\nfor transformers: python -m experiments export {files.folder} --out FOLDER")


def _track(command: FineTuneCommand) -> Track:
    """What is trained on. Raises ProtocolError (an option of another track), and what the readers raise."""
    _check_options(command, [command.track], judged_on=["challenge"], language=["monolingual"], hours=list(TASKS))
    if command.track == "challenge":
        return read_challenge(command.mlsuperb, judged_on=command.judged_on or "dev")
    name = command.language
    if command.track == "monolingual" and name is None:
        raise ProtocolError(f"--track monolingual has sets: give --language {', '.join(MONOLINGUAL_SETS)}")
    return read_track(command.mlsuperb, TASKS[command.track], duration=command.hours or "10min", monolingual=name)


def leaderboard(arguments: Sequence[str]) -> None:
    """Writes the table of a workdir's ML-SUPERB results, and prints it; and the page."""
    # matplotlib takes a second to import, and the other verb draws nothing
    from experiments.mlsuperb.page import write_page

    command = tyro.cli(LeaderboardCommand, args=arguments, prog="python -m experiments leaderboard")
    path = command.out or command.workdir / "mlsuperb" / "leaderboard.md"
    print(write_leaderboard(command.workdir, path, pool=command.pool))
    print(path)
    print(write_page(command.workdir, path.with_suffix(".html"), pool=command.pool))
