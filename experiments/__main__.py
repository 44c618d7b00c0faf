"""`python -m experiments`: list, show, train, units, evaluate, import, export, features, recipe.

    list                           every stage and every architecture, in a line each
    show STAGE [--size demo]       a stage's configuration, and what follows from it
    show ARCHITECTURE              a published encoder's configuration and parameter counts
    train STAGE                    train a stage, or continue it
    units STAGE                    make the units that a stage trains on
    evaluate STAGE                 masked accuracy of a trained stage on held-out clips
    import PATH --out DIR          a published model of any layout as a Hugging Face folder
    export MODEL --out DIR         a trained stage, or such a model, in any layout for PyTorch
    features MODEL AUDIO...        hidden states of audio files, as an .npz
    recipe NAME                    a whole chain of stages, judged, exported and reported

Stages come in --size paper (the default) and --size demo. Any value that `show` prints can be given anew:
`--learner.optimizer.peak-learning-rate 1e-3`.
"""

import difflib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.stage import StageConfig, StageError, as_text
from experiments.stages import SIZES, STAGES, stage_function

WORKDIR = Path("work")
RECIPE_NAMES = ("demo",)  # of experiments.recipes, named here so that help needs no import of it


@dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
        workdir: of all stages, units and compiled programs.
        corpus: prepared by `python -m data_pipelines prepare`; by default the folder corpus in the workdir.
    """

    workdir: Path = WORKDIR
    corpus: Path | None = None

    def corpus_folder(self) -> Path:
        """The prepared corpus."""
        return self.corpus or self.workdir / "corpus"


@dataclass(frozen=True)
class Unsaid:
    """What a model's file may not say.

    Attributes:
        architecture: of the table that `list` prints; for files that do not say it themselves.
        normalize_waveform: overrules what the file says, or what is assumed where it says nothing.
    """

    architecture: str | None = None
    normalize_waveform: bool | None = None

    def arguments(self) -> dict:
        """As `read_checkpoint` takes them."""
        from wavlab_jax.encoder.architectures import architecture

        named = None if self.architecture is None else architecture(self.architecture)
        return {"architecture": named, "normalize_waveform": self.normalize_waveform}


@dataclass(frozen=True)
class StageCommand:
    """A stage's configuration, value by value, and where things are."""

    config: Annotated[StageConfig, tyro.conf.arg(name="")]
    places: Annotated[Places, tyro.conf.arg(name="")] = field(default_factory=Places)


@dataclass(frozen=True)
class ImportCommand:
    """A published model as a Hugging Face folder; prints what was found in it."""

    model: tyro.conf.Positional[Path]
    """A file or folder of Hugging Face, fairseq, unilm, s3prl, torchaudio or ESPnet; which, is found out."""
    out: Path
    """The folder to write; must not exist."""
    licence: str | None = None
    """Of the weights, for the card, as Hugging Face spells it: cc-by-4.0. By default what the model's own card says."""
    unsaid: Annotated[Unsaid, tyro.conf.arg(name="")] = field(default_factory=Unsaid)


@dataclass(frozen=True)
class ExportCommand:
    """A model for PyTorch: a folder with weights, settings, a card, and what the layout has no place for."""

    model: tyro.conf.Positional[str]
    """A stage that was trained in the workdir, or anything that `import` takes."""
    out: Path
    """The folder to write; must not exist."""
    layout: Literal["huggingface", "fairseq", "unilm", "s3prl", "torchaudio", "espnet"] = "huggingface"
    """Whose code is to load it."""
    verify: bool = False
    """Run PyTorch's models on it, and print the largest difference of each hidden state. Needs transformers."""
    licence: str | None = None
    """Of the weights, for the card; by default what the model's own card says."""
    unsaid: Annotated[Unsaid, tyro.conf.arg(name="")] = field(default_factory=Unsaid)
    places: Annotated[Places, tyro.conf.arg(name="")] = field(default_factory=Places)


@dataclass(frozen=True)
class FeaturesCommand:
    """Hidden states of audio files: an .npz with one array [layers, frames, width] a file, whole or absent.

    Arrays are called by the file's path below the deepest folder that all of AUDIO share. Files that cannot be used are
    listed at the end; the exit status is then 1.
    """

    model: tyro.conf.Positional[str]
    """A file or folder that `import` takes or `export` made, or a stage that was trained in the workdir."""
    audio: tyro.conf.Positional[tuple[Path, ...]]
    """Audio files of any length, rate and channels (wav, flac, ogg, opus, mp3, ...), or folders of them."""
    out: Path
    """The .npz to write; must not exist."""
    layers: str = "all"
    """Numbers, `mean` (of all layers) and `all`, between commas: 6,9,mean. 0 is the first layer's input, n the output
    of layer n, after the final norm for the last one."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the arrays."""
    window: float = 30.0
    """Seconds. Longer files are encoded in windows of this length; 0: every file in one piece."""
    context: float = 5.0
    """Seconds on each side of such a window that are heard, but kept from its neighbours."""
    workdir: Path = WORKDIR
    """Of the stage, where MODEL is one."""
    unsaid: Annotated[Unsaid, tyro.conf.arg(name="")] = field(default_factory=Unsaid)


@dataclass(frozen=True)
class RecipeCommand:
    """A whole chain of stages."""

    workdir: Path = WORKDIR
    """Of everything the recipe makes; run it again with the same one to continue."""


def parse_stage(verb: str, arguments: list[str]) -> StageCommand:
    """`STAGE [--size S] [--workdir W] [--corpus C] [overrides]`; tyro ends the process on a value it cannot read."""
    name, arguments = _take_name(verb, "STAGE", arguments)
    size, arguments = _take_size(arguments)
    default = StageCommand(config=stage_function(name, size=size)())
    return tyro.cli(
        StageCommand,
        default=default,
        args=arguments,
        prog=f"python -m experiments {verb} {name} [--size {{{','.join(SIZES)}}}]",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )


def list_stages() -> None:
    """Name and first docstring line of each stage; name and model of each architecture."""
    from experiments.architectures import list_architectures

    width = max(map(len, STAGES))
    print("Stages, for show, train, units, evaluate, export:")
    for name, module in STAGES.items():
        print(f"{name:<{width}}  {module.__doc__.splitlines()[0]}")
    print(f"\nArchitectures, for show and --architecture:\n{list_architectures()}")


def show(arguments: list[str]) -> None:
    """The flat text of a stage's or an architecture's configuration, and what follows from it."""
    from experiments.architectures import show_architecture
    from wavlab_jax.encoder.architectures import ARCHITECTURES

    name = arguments[0] if arguments else ""
    if name in ARCHITECTURES:
        if arguments[1:]:
            raise StageError(f"an architecture has no sizes and no values to change: show {name}, and nothing after it")
        return print(show_architecture(name))
    if name and not name.startswith("-") and name not in STAGES:
        every = (*STAGES, *ARCHITECTURES)
        near = difflib.get_close_matches(name, every, n=4, cutoff=0.3) or every
        raise StageError(f"no stage or architecture is called {name!r}; the nearest: {', '.join(near)}")
    config = parse_stage("show", arguments).config
    print(STAGES[config.name].__doc__)
    print(as_text(config), end="")
    import wavlab_jax.model as models

    abstract = models.abstract_parameters(config.learner.encoder, config.learner.head)
    hours = config.loop.steps * config.data.seconds_per_step / 3600
    print(
        f"\n{models.count(abstract['encoder']):,} parameters in the encoder, {models.count(abstract['head']):,} in the "
        f"head; {hours:,.2f} h of audio in {config.loop.steps:,} steps"
    )


def train(arguments: list[str]) -> None:
    """Trains or continues a stage."""
    command = parse_stage("train", arguments)
    from experiments.run import configure_jax, train_stage
    from experiments.stage_files import StageFiles

    configure_jax(command.places.workdir)
    train_stage(command.config, workdir=command.places.workdir, corpus=command.places.corpus_folder())
    print(f"trained: {StageFiles(command.places.workdir, command.config.name).folder}")


def units(arguments: list[str]) -> None:
    """Makes a stage's units."""
    command = parse_stage("units", arguments)
    from experiments import steps
    from experiments.run import configure_jax

    configure_jax(command.places.workdir)
    workdir, corpus = command.places.workdir, command.places.corpus_folder()
    for sort in command.config.unit_sets:
        print(f"{sort.name}: {steps.units(command.config, sort, workdir, corpus)}")


def evaluate(arguments: list[str]) -> None:
    """Judges a trained stage."""
    command = parse_stage("evaluate", arguments)
    from experiments.evaluate import evaluate_stage, table
    from experiments.run import configure_jax

    configure_jax(command.places.workdir)
    print(table(evaluate_stage(command.config, workdir=command.places.workdir, corpus=command.places.corpus_folder())))


def import_(arguments: list[str]) -> None:
    """Takes over a published model."""
    command = tyro.cli(ImportCommand, args=arguments, prog="python -m experiments import")
    from experiments.import_model import import_model

    print(import_model(command.model, command.out, licence=command.licence, **command.unsaid.arguments()))


def export(arguments: list[str]) -> None:
    """Writes a model for PyTorch."""
    _, arguments = _take_size(arguments)  # a stage was trained in one size; its files say which
    command = tyro.cli(ExportCommand, args=arguments, prog="python -m experiments export")
    from experiments.export import check, export_model
    from experiments.trained import imported_model
    from experiments.verify import table

    workdir, corpus = command.places.workdir, command.places.corpus_folder()
    if imported_model(workdir, command.model) is None:
        stage_function(command.model)
    corpus = corpus if command.places.corpus is not None or corpus.exists() else None
    exported = export_model(
        command.model,
        workdir=workdir,
        corpus=corpus,
        out=command.out,
        layout=command.layout,
        licence=command.licence,
        **command.unsaid.arguments(),
    )
    print(f"{exported.folder} ({exported.layout}): {', '.join(exported.files)}")
    for note in (*exported.checkpoint.notes, *exported.notes):
        print(f"note: {note}")
    if command.verify:
        print(table(check(exported, corpus)))


def features(arguments: list[str]) -> None:
    """Writes hidden states of audio files."""
    command = tyro.cli(FeaturesCommand, args=arguments, prog="python -m experiments features")
    from experiments.features import load_model, write_features
    from experiments.run import configure_jax
    from wavlab_jax.streaming import WindowConfig

    if command.workdir.is_dir():
        configure_jax(command.workdir)
    windows = WindowConfig(command.window, command.context)
    model = load_model(command.model, workdir=command.workdir, **command.unsaid.arguments())
    for note in model.notes:
        print(f"note: {note}")
    try:
        count = write_features(
            model, command.audio, command.out, layers=command.layers, dtype=command.dtype, windows=windows
        )
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"{command.out}: {count} files")


def recipe(arguments: list[str]) -> None:
    """Runs what is left of a recipe and prints the report's path last."""
    name, arguments = _take_name("recipe", "NAME", arguments)
    command = tyro.cli(RecipeCommand, args=arguments, prog=f"python -m experiments recipe {name}")
    from experiments.recipes import run_recipe
    from experiments.run import configure_jax

    configure_jax(command.workdir)
    print(f"\nreport: {run_recipe(name, command.workdir).absolute()}")


VERBS = {
    "list": lambda arguments: list_stages(),
    "show": show,
    "train": train,
    "units": units,
    "evaluate": evaluate,
    "import": import_,
    "export": export,
    "features": features,
    "recipe": recipe,
}


def main() -> int:
    """Runs a verb; errors that name what to do become one line and exit status 1, Ctrl-C 130."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=2, cutoff=0.3) or list(VERBS)
        print(f"error: no verb is called {verb!r}; the nearest: {', '.join(near)}", file=sys.stderr)
        return 2
    try:
        VERBS[verb](arguments[1:])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        from wavlab_jax.train import Interrupted

        if not type(error).__module__.startswith(("data_pipelines", "wavlab_jax", "experiments")) and not isinstance(
            error, OSError
        ):
            raise  # not one of ours: the traceback is worth more than the line
        print(f"{'' if isinstance(error, Interrupted) else 'error: '}{error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 1
    return 0


def _take_name(verb: str, what: str, arguments: list[str]) -> tuple[str, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        choices = ", ".join(STAGES if what == "STAGE" else RECIPE_NAMES)
        print(f"usage: python -m experiments {verb} {what} ...\n{what}: {choices}", file=sys.stderr)
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    return arguments[0], arguments[1:]


def _take_size(arguments: list[str]) -> tuple[str, list[str]]:
    for place, argument in enumerate(arguments):
        if argument == "--size" and place + 1 < len(arguments):
            return arguments[place + 1], arguments[:place] + arguments[place + 2 :]
        if argument.startswith("--size="):
            return argument.split("=", 1)[1], arguments[:place] + arguments[place + 1 :]
    return "paper", arguments


if __name__ == "__main__":
    sys.exit(main())
