"""`python -m experiments`: list, show, train, units, evaluate, export, recipe.

    list                           every stage, in a line each
    show STAGE [--size demo]       a stage's configuration, and what follows from it
    train STAGE                    train a stage, or continue it
    units STAGE                    make the units that a stage trains on
    evaluate STAGE                 masked accuracy of a trained stage on held-out clips
    export STAGE --out DIR         a trained stage as a Hugging Face folder
    recipe NAME                    a whole chain of stages, judged, exported and reported

Stages come in --size paper (the default) and --size demo. Any value that `show` prints can be given anew:
`--learner.optimizer.peak-learning-rate 1e-3`.
"""

import difflib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from experiments.stage import StageConfig, as_text
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
class StageCommand:
    """A stage's configuration, value by value, and where things are."""

    config: Annotated[StageConfig, tyro.conf.arg(name="")]
    places: Annotated[Places, tyro.conf.arg(name="")] = field(default_factory=Places)


@dataclass(frozen=True)
class ExportCommand:
    """A trained stage as a folder that `transformers.AutoModel.from_pretrained` loads."""

    out: Path
    """The folder to write; must not exist."""
    places: Annotated[Places, tyro.conf.arg(name="")] = field(default_factory=Places)


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
    """Name and first docstring line of each stage."""
    width = max(map(len, STAGES))
    for name, module in STAGES.items():
        print(f"{name:<{width}}  {module.__doc__.splitlines()[0]}")


def show(arguments: list[str]) -> None:
    """The flat text of a configuration, and what follows from it."""
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
    print(steps.units(command.config, command.places.workdir, command.places.corpus_folder()))


def evaluate(arguments: list[str]) -> None:
    """Judges a trained stage."""
    command = parse_stage("evaluate", arguments)
    from experiments.evaluate import evaluate_stage, table
    from experiments.run import configure_jax

    configure_jax(command.places.workdir)
    print(table(evaluate_stage(command.config, workdir=command.places.workdir, corpus=command.places.corpus_folder())))


def export(arguments: list[str]) -> None:
    """Writes a trained stage for PyTorch."""
    name, arguments = _take_name("export", "STAGE", arguments)
    _, arguments = _take_size(arguments)  # the stage was trained in one size; its files say which
    stage_function(name)
    command = tyro.cli(ExportCommand, args=arguments, prog=f"python -m experiments export {name}")
    from experiments.export import export_stage

    corpus = command.places.corpus_folder()
    given = command.places.corpus is not None or corpus.exists()
    result = export_stage(name, workdir=command.places.workdir, corpus=corpus if given else None, out=command.out)
    difference = result["largest_difference"]
    checked = "" if difference is None else f"largest difference of any hidden state {difference:.1e}, "
    print(f"{result['folder']}: {', '.join(result['files'])}\n{checked}{result['checked_with']}")


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
    "export": export,
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
