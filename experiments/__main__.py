"""The command line: `python -m experiments VERB ...`.

    list                           every stage and every architecture, in a line each
    show STAGE [--size demo]       a stage's configuration, and what follows from it
    show ARCHITECTURE              a published encoder's configuration and parameter counts
    plan STAGE --topology T        what training it takes on devices that are not at hand: memory, exchanges, time, cost
    train STAGE                    train a stage, or continue it
    units STAGE                    make the units that a stage trains on
    quality STAGE                  how evenly they are used, and what they say of language and phone
    evaluate STAGE                 masked accuracy of a trained stage on held-out clips
    average STAGE --last N         the mean of its checkpoints, as the stage STAGE@average
    import PATH --out DIR          a published model of any layout as a Hugging Face folder
    export MODEL --out DIR         a trained stage, a recogniser, or such a model, in any layout for PyTorch
    features MODEL AUDIO...        hidden states of audio files, as an .npz
    superb MODEL --mlsuperb DIR    ML-SUPERB: a small recogniser on its frozen layers, trained and judged on each track
    finetune MODEL --mlsuperb DIR  a recogniser of the model itself and a linear layer, trained and judged on a track
    leaderboard                    all ML-SUPERB results of a workdir in one table, beside the published rows
    recipe NAME                    a whole chain of stages, judged, exported and reported

Stages come in --size paper (the default) and --size demo. Any value that `show` prints can be given anew:
`--learner.optimizer.peak-learning-rate 1e-3`. `units` and `evaluate` take a stage that was begun as it was begun.
STAGE may also be a run of the workdir under a `--name` of its own: it is taken as it was begun (not by `plan`).

`train` and `units` run on several hosts, the same command on each: experiments/launch.sh, docs/scaling.md.
"""

import contextlib
import difflib
import io
import os
import sys
import traceback
from dataclasses import replace

from data_pipelines.interrupts import SAID, interrupts_end_at_once

with interrupts_end_at_once():  # these take seconds
    import tyro

    from experiments.commands import (
        RECIPE_NAMES,
        AverageCommand,
        ExportCommand,
        FeaturesCommand,
        ImportCommand,
        PlanCommand,
        QualityCommand,
        RecipeCommand,
        StageCommand,
        take,
        workdir_of,
    )
    from experiments.stage import StageConfig, StageError, as_started, as_text
    from experiments.stage_files import StageFiles
    from experiments.stages import SIZES, STAGES, run_of, stage_function


def parse_stage(
    verb: str,
    arguments: list[str],
    kind: type[StageCommand | QualityCommand | PlanCommand] = StageCommand,
    *,
    as_it_was: bool = False,
) -> StageCommand | QualityCommand | PlanCommand:
    """`STAGE [--size S] [--workdir W] [--corpus C] [overrides]`; tyro ends the process on a value it cannot read.

    `as_it_was`: values that are not given are those that the stage in the workdir was started with, if it was.
    So are those of a run that has a name of its own, for every verb with a workdir.
    Raises what the configuration says of values that it refuses.
    """
    name, arguments = _take_name(verb, "STAGE", arguments)
    size, arguments = take("--size", arguments, "paper")
    base, _, mean = name.partition("@")
    if mean and not as_it_was:
        raise StageError(f"{name} is a mean of checkpoints, which is not trained: {verb} {base}")
    default = None if kind is PlanCommand else run_of(workdir_of(arguments), name)
    default = default or replace(stage_function(base, size=size)(), name=name)

    def parsed(config: StageConfig) -> StageCommand | QualityCommand | PlanCommand:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return tyro.cli(
                    kind,
                    default=kind(config=config),
                    args=arguments,
                    prog=f"python -m experiments {verb} {name} [--size {{{','.join(SIZES)}}}]",
                    config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
                )
        except SystemExit as ended:
            own: BaseException | None = ended  # tyro draws a box round a refusal; one line is as good
            while own is not None and not _is_ours(own):
                own = own.__context__
            if own is not None:
                raise own from None
            sys.stderr.write(said.getvalue())
            raise

    command = parsed(default)
    if not as_it_was:
        return command
    return parsed(as_started(default, StageFiles(command.places.workdir, command.config.name)))


def list_stages() -> None:
    """Name and first docstring line of each stage; name and model of each architecture."""
    from experiments.architectures import list_architectures

    width = max(map(len, STAGES))
    print("Stages, for show, plan, train, units, quality, evaluate, export:")
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
    if name and not name.startswith("-") and name not in STAGES and run_of(workdir_of(arguments), name) is None:
        every = (*STAGES, *ARCHITECTURES)
        near = difflib.get_close_matches(name, every, n=4, cutoff=0.3) or every
        raise StageError(f"no stage or architecture is called {name!r}; the nearest: {', '.join(near)}")
    config = parse_stage("show", arguments).config
    print(STAGES[name].__doc__ if name in STAGES else f"A run of {workdir_of(arguments)}, as it was begun.\n")
    print(as_text(config), end="")
    import wavlab_jax.model as models

    abstract = models.abstract_parameters(config.learner.encoder, config.learner.head)
    hours = config.loop.steps * config.data.seconds_per_step / 3600
    print(
        f"\n{models.count(abstract['encoder']):,} parameters in the encoder, {models.count(abstract['head']):,} in the "
        f"head; {hours:,.2f} h of audio in {config.loop.steps:,} steps"
    )


def plan(arguments: list[str]) -> None:
    """Plans a run; `--json` prints it for programs. What is being compiled is said on standard error."""
    as_json = "--json" in arguments
    command = parse_stage("plan", [each for each in arguments if each != "--json"], PlanCommand)
    from experiments import plan as plans

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = plans.plan_stage(command.config, command.devices, corpus=command.corpus, say=say)
    print(plans.as_json(found) if as_json else plans.table(found))


def train(arguments: list[str]) -> None:
    """Trains or continues a stage."""
    command = parse_stage("train", arguments)
    from experiments.hosts import connect
    from experiments.run import configure_jax, say, train_stage

    connect()
    configure_jax(command.places.workdir)
    places = command.places
    train_stage(command.config, workdir=places.workdir, corpus=places.corpus_folder(), launched=True)
    say(f"trained: {StageFiles(command.places.workdir, command.config.name).folder}")


def units(arguments: list[str]) -> None:
    """Makes a stage's units."""
    command = parse_stage("units", arguments, as_it_was=True)
    from experiments import steps
    from experiments.hosts import connect
    from experiments.run import configure_jax, say

    connect()
    configure_jax(command.places.workdir)
    workdir, corpus = command.places.workdir, command.places.corpus_folder()
    for sort in command.config.unit_sets:
        say(f"{sort.name}: {steps.units(command.config, sort, workdir, corpus)}")
    if not command.config.unit_sets:
        say(f"{command.config.name} learns its own targets: no units to make")


def quality(arguments: list[str]) -> None:
    """Measures a stage's units."""
    command = parse_stage("quality", arguments, QualityCommand, as_it_was=True)
    from experiments.targets import is_online
    from experiments.unit_quality import measure_units, table

    stored = [sort.name for sort in command.config.unit_sets if not is_online(sort)]
    if not stored:
        raise StageError(
            f"{command.config.name} has no label store: its units are learned, or computed in the step; `quality` "
            "measures stores"
        )
    workdir, corpus = command.places.workdir, command.places.corpus_folder()
    for name in stored:
        result = measure_units(name, workdir=workdir, corpus=corpus, alignments=command.alignments)
        print(f"{name}:\n{table(result)}" if stored[1:] else table(result))


def evaluate(arguments: list[str]) -> None:
    """Judges a trained stage."""
    command = parse_stage("evaluate", arguments, as_it_was=True)
    from experiments.evaluate import evaluate_stage, table
    from experiments.run import configure_jax

    configure_jax(command.places.workdir)
    print(table(evaluate_stage(command.config, workdir=command.places.workdir, corpus=command.places.corpus_folder())))


def average(arguments: list[str]) -> None:
    """Averages a stage's checkpoints."""
    command = tyro.cli(AverageCommand, args=arguments, prog="python -m experiments average")
    from experiments.average import average_stage

    stage, workdir = command.stage, command.workdir
    made = average_stage(stage, workdir=workdir, last=command.last, best=command.best, name=command.name)
    steps = ", ".join(f"{step:,}" for step in made.steps)
    print(f"{made.name}: the mean of {len(made.steps)} checkpoints of {stage}, steps {steps}")


def import_(arguments: list[str]) -> None:
    """Takes over a published model."""
    command = tyro.cli(ImportCommand, args=arguments, prog="python -m experiments import")
    from experiments.import_model import import_model

    print(import_model(command.model, command.out, licence=command.licence, **command.unsaid.arguments()))


def export(arguments: list[str]) -> None:
    """Writes a model for PyTorch."""
    _, arguments = take("--size", arguments, "paper")  # a stage was trained in one size; its files say which
    command = tyro.cli(ExportCommand, args=arguments, prog="python -m experiments export")
    from experiments.export import check, export_model
    from experiments.trained import imported_model
    from experiments.verify import table

    workdir, corpus = command.places.workdir, command.places.corpus_folder()
    if imported_model(workdir, command.model) is None and not StageFiles(workdir, command.model).folder.exists():
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


def mlsuperb(verb: str, arguments: list[str]) -> None:
    """Judges a model by ML-SUPERB, fine-tunes it on a track, or writes the table of a workdir's results."""
    from experiments.mlsuperb import verbs

    getattr(verbs, verb)(arguments)


def recipe(arguments: list[str]) -> None:
    """Runs what is left of a recipe and prints the report's path last."""
    name, arguments = _take_name("recipe", "NAME", arguments)
    command = tyro.cli(RecipeCommand, args=arguments, prog=f"python -m experiments recipe {name}")
    from experiments.recipes import run_recipe
    from experiments.run import configure_jax

    configure_jax(command.workdir)
    report = run_recipe(name, command.workdir, corpus=command.corpus, plan_only=command.plan_only)
    if report is not None:
        print(f"\nreport: {report.absolute()}")


ON_SEVERAL_HOSTS = ("list", "show", "plan", "train", "units")  # the first three read alone
VERBS = {
    "list": lambda arguments: list_stages(),
    "show": show,
    "plan": plan,
    "train": train,
    "units": units,
    "quality": quality,
    "evaluate": evaluate,
    "average": average,
    "import": import_,
    "export": export,
    "features": features,
    "superb": lambda arguments: mlsuperb("superb", arguments),
    "finetune": lambda arguments: mlsuperb("finetune", arguments),
    "leaderboard": lambda arguments: mlsuperb("leaderboard", arguments),
    "recipe": recipe,
}


def main() -> int:
    """Runs a verb; errors that name what to do become one line and exit status 1, Ctrl-C 130.

    75: stopped by a scheduler's signal; 69: another process is gone. `experiments/launch.sh` runs the command again.
    """
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
        if verb not in ON_SEVERAL_HOSTS:
            from experiments.hosts import refuse_several

            refuse_several(verb)
        VERBS[verb](arguments[1:])
    except BrokenPipeError:
        from experiments.hosts import leave

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(141)
        return 141
    except KeyboardInterrupt:
        from experiments.hosts import leave

        print(f"\n{SAID}", file=sys.stderr)
        leave(130)
        return 130
    except Exception as error:  # of whatever class: other processes may wait for this one
        return _told(error)
    return 0


def _told(error: Exception) -> int:
    """Prints an error; returns the exit status. What does not concern all of several processes ends this one here."""
    from experiments.hosts import LOST, HostsError, PeerLost, is_first, leave, peer_lost
    from wavlab_jax.train import Interrupted, NonFinite

    together = isinstance(error, Interrupted | NonFinite | HostsError)  # in all processes at once
    error = error if together else peer_lost(error) or error
    if not _is_ours(error) and not isinstance(error, OSError):
        traceback.print_exception(error)  # not one of ours: the traceback is worth more than a line
        if "RESOURCE_EXHAUSTED" in str(error):
            from experiments.plan import LESS_MEMORY

            print(f"error: out of memory. {LESS_MEMORY}", file=sys.stderr)
        status = 1
    elif isinstance(error, Interrupted):
        status = error.status
        if is_first():
            print(error, file=sys.stderr)
    else:
        status = LOST if isinstance(error, PeerLost) else 1
        print(f"error: {error}", file=sys.stderr)
    if not together:
        leave(status)
    return status


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.startswith(("data_pipelines", "wavlab_jax", "experiments"))


def _take_name(verb: str, what: str, arguments: list[str]) -> tuple[str, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        choices = ", ".join(STAGES if what == "STAGE" else RECIPE_NAMES)
        print(f"usage: python -m experiments {verb} {what} ...\n{what}: {choices}", file=sys.stderr)
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    return arguments[0], arguments[1:]


if __name__ == "__main__":
    sys.exit(main())
