"""What `python -m experiments superb` and `leaderboard` take, and how they are wired."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_pipelines.interrupts import interrupts_end_at_once

with interrupts_end_at_once():
    from data_pipelines.mlsuperb.batches import TrackBatchesConfig
    from data_pipelines.mlsuperb.layout import Duration
    from data_pipelines.mlsuperb.tracks import Task
    from experiments.commands import WORKDIR, Unsaid
    from experiments.mlsuperb.benchmark import run_benchmark, tracks_of
    from experiments.mlsuperb.encoders import read_encoder
    from experiments.mlsuperb.gathered import write_leaderboard
    from experiments.mlsuperb.protocol import BATCH, LEARNING_RATE, ProtocolConfig
    from experiments.run import configure_jax
    from wavlab_jax.sharding import MeshConfig, make_mesh

Track = Literal["monolingual", "multilingual", "lid", "joint"]
TASKS: dict[Track, Task] = {
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
    random:MODEL, for a fresh encoder of that shape; or log-mel."""
    mlsuperb: Path
    """The benchmark's folder, as unpacked, or a miniature of it (`python -m data_pipelines miniature`)."""
    track: tuple[Track, ...] = tuple(TASKS)
    """One or more; by default all."""
    hours: Duration = "10min"
    """The training set: so much of each language."""
    sets: tuple[str, ...] = ()
    """Of the monolingual track, some of its sets (eng1 eng2 ...); by default all 13."""
    scale: float = 1.0
    """Share of the published iterations. Below 1 it is not the published protocol, and every output says so."""
    learning_rate: float = LEARNING_RATE
    """The one thing that the benchmark leaves open."""
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
    tracks = tracks_of([TASKS[each] for each in command.track], command.sets)
    cfg = ProtocolConfig(command.scale, command.learning_rate, command.batches, command.seed)
    configure_jax(command.workdir)
    mesh = make_mesh(command.mesh)
    encoder = read_encoder(
        command.model, workdir=command.workdir, mesh=mesh, name=command.name, **command.unsaid.arguments()
    )
    for note in encoder.notes:
        print(f"note: {note}")
    run_benchmark(
        encoder,
        root=command.mlsuperb,
        workdir=command.workdir,
        tracks=tracks,
        duration=command.hours,
        cfg=cfg,
        mesh=mesh,
    )
    print(f"results: {command.workdir / 'mlsuperb' / encoder.name / command.hours}")


def leaderboard(arguments: Sequence[str]) -> None:
    """Writes the table of a workdir's ML-SUPERB results, and prints it; and the page."""
    # matplotlib takes a second to import, and the other verb draws nothing
    from experiments.mlsuperb.page import write_page

    command = tyro.cli(LeaderboardCommand, args=arguments, prog="python -m experiments leaderboard")
    path = command.out or command.workdir / "mlsuperb" / "leaderboard.md"
    print(write_leaderboard(command.workdir, path, pool=command.pool))
    print(path)
    print(write_page(command.workdir, path.with_suffix(".html"), pool=command.pool))
