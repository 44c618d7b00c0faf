"""What each verb of `python -m experiments` takes: the command line is made from these dataclasses by tyro."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.plan import PlanConfig
from experiments.stage import StageConfig

WORKDIR = Path("work")
# of experiments.recipes, named here so that help needs no import of it
RECIPE_NAMES = ("demo", "wavlablm", "cv_hubert")


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
class QualityCommand:
    """A stage whose units are measured, and where things are."""

    config: Annotated[StageConfig, tyro.conf.arg(name="")]
    alignments: Path | None = None
    """A folder of .phn files, named as the clips: `start<TAB>end<TAB>phone` in seconds, a line a phone."""
    places: Annotated[Places, tyro.conf.arg(name="")] = field(default_factory=Places)


@dataclass(frozen=True)
class AverageCommand:
    """The mean of a stage's checkpoints, as the stage STAGE@NAME."""

    stage: tyro.conf.Positional[str]
    """A stage of the workdir; it need not be finished."""
    last: int | None = None
    """So many of the newest checkpoints."""
    best: int | None = None
    """So many of those with the lowest training loss."""
    name: str = "average"
    """Of the mean, after the @."""
    workdir: Path = WORKDIR
    """Of the stage."""


@dataclass(frozen=True)
class PlanCommand:
    """A stage's configuration, value by value, and the devices that it is planned for."""

    config: Annotated[StageConfig, tyro.conf.arg(name="")]
    devices: Annotated[PlanConfig, tyro.conf.arg(name="")] = field(default_factory=PlanConfig)
    corpus: Path | None = None
    """Prepared by `python -m data_pipelines prepare`: hours and epochs of each language are worked out for it."""


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
    corpus: Path | None = None
    """Prepared by `python -m data_pipelines prepare`; only the demo has one of its own."""
    plan_only: bool = False
    """Print the steps, and which of them are done, and stop."""


def take(option: str, arguments: list[str], default: str) -> tuple[str, list[str]]:
    """The value of `option` in a command line, or `default`, and the arguments without it."""
    for place, argument in enumerate(arguments):
        if argument == option and place + 1 < len(arguments):
            return arguments[place + 1], arguments[:place] + arguments[place + 2 :]
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1], arguments[:place] + arguments[place + 1 :]
    return default, arguments


def workdir_of(arguments: list[str]) -> Path:
    """What tyro will read of a command line as its workdir: which defaults there are depends on what lies there."""
    return Path(take("--workdir", arguments, str(WORKDIR))[0])
