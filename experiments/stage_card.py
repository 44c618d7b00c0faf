"""What the card of a trained stage says beside the model: which stages led to it, and what they heard."""

import ast
import json
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.languages import name_of
from data_pipelines.manifest import Manifest
from experiments.stage_files import StageFiles
from experiments.trained import imported_model

# Instead of names, where another corpus lies there now. (The hours were counted when the stage was begun.)
NOT_THERE = "The prepared corpus that the stage heard was not at hand when this was written: its parts are not named."


class Lineage(NamedTuple):
    """`configs`: name -> flat configuration of each stage that led to a model, oldest first, the model's own last.

    `imported`: name -> path of the models from elsewhere that it began with, or whose hidden states made its units.
    """

    configs: dict[str, dict[str, Any]]
    imported: dict[str, Path]


def lineage_of(workdir: Path, stage: str) -> Lineage:
    """The stages that a stage came from, through `init_from` and the teachers of its units."""
    found = Lineage({}, {})
    _add(workdir, stage, found)
    return found


def sections(workdir: Path, stage: str, corpus: Path | None) -> dict[str, str]:
    """Heading -> Markdown: the stages, and the data of the last one. `corpus`: prepared, for the names of its parts."""
    lineage = lineage_of(workdir, stage)
    return {"Training": _training(lineage) + _mean(workdir, stage), "Data": _data(workdir, stage, corpus)}


def languages(workdir: Path, stage: str) -> list[str]:
    """ISO 639 codes of the languages that the stage heard."""
    return sorted(_shares(workdir, stage))


def papers(workdir: Path, stage: str) -> tuple[str, ...]:
    """What to cite beside the paper of the model's kind: most predict units, some as WavLabLM does."""
    lineage = lineage_of(workdir, stage).configs
    predicts = any("units.units" in config for config in lineage.values())
    wavlab = any(name.startswith("wavlab") for name in lineage)
    return (*(["hubert"] if predicts else []), *(["wavlablm"] if wavlab else []))


def flat_config(path: Path) -> dict[str, Any]:
    """What `as_text` wrote: "learner.optimizer.beta1" -> 0.9, ..."""
    lines = (line.split(" = ", 1) for line in path.read_text().splitlines())
    return {name: ast.literal_eval(value) for name, value in lines}


def _add(workdir: Path, stage: str, found: Lineage) -> None:
    imported = imported_model(workdir, stage)
    if imported is not None:
        found.imported.setdefault(imported.name, imported)
        return
    if stage in found.configs:
        return
    config = flat_config(StageFiles(workdir, stage).config)
    teachers = [value for name, value in config.items() if name.endswith(".teacher")]
    forked = config.get("continue_from") and config["continue_from"].partition("@")[0]
    for before in (*teachers, config["init_from"], forked):
        if before is not None:
            _add(workdir, before, found)
    found.configs[stage] = config


def _training(lineage: Lineage) -> str:
    lines = [
        "Stages, oldest first; each was trained with masked prediction of its targets. Hours are of audio heard, clips "
        "heard again counted again.",
        "",
        "| stage | begins with | units | steps | hours | peak rate | language exponent | mixed in |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, config in lineage.configs.items():
        hours = config["loop.steps"] * config["data.seconds_per_step"] / 3600
        cells = (
            name,
            _begins_with(config),
            _targets(config),
            f"{config['loop.steps']:,}",
            f"{hours:,.2f}",
            f"{config['learner.optimizer.peak_learning_rate']:g}",
            f"{config['data.draw.language_exponent']:g}",
            f"{config.get('data.mixing.probability', 0.0):.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    for name in lineage.imported:
        lines += ["", f"`{name}` was trained elsewhere and imported; its own card says how."]
    return "\n".join(lines)


def _begins_with(config: dict[str, Any]) -> str:
    if config.get("continue_from"):
        return f"the whole state of {config['continue_from']}"
    return _short(config["init_from"]) if config["init_from"] else "random values"


def _mean(workdir: Path, stage: str) -> str:
    """A sentence, where the model is a mean of checkpoints (`experiments.average`)."""
    of = json.loads(StageFiles(workdir, stage).inputs.read_text()).get("average_of")
    if of is None:
        return ""
    steps = ", ".join(f"{step:,}" for step in of["steps"])
    return f"\n\nThe model is the mean of the parameters of {len(of['steps'])} checkpoints, steps {steps}."


def _targets(config: dict[str, Any]) -> str:
    """What a stage predicted."""
    if "units.units" not in config:
        return "its own quantizer's"
    if "units.mels" in config:
        return f"{config['units.units']} of a random projection"
    teacher = config["units.teacher"]
    source = "MFCC" if teacher is None else f"layer {config['units.layer']} of {_short(teacher)}"
    return f"{config['units.units']} k-means of {source}"


def _data(workdir: Path, stage: str, corpus: Path | None) -> str:
    shares = _shares(workdir, stage)
    hours = sum(row["hours"] for row in shares.values())
    lines = [
        f"{hours:,.2f} hours of training audio in {len(shares)} languages, and how often the last stage heard them.",
        "",
        "| language | code | hours | natural share | drawn share | times heard |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for code, row in sorted(shares.items(), key=lambda item: -item[1]["hours"]):
        cells = f"{row['hours']:,.3f} | {row['natural']:.2%} | {row['drawn']:.2%} | {row['epochs']:,.2f}"
        lines.append(f"| {name_of(code)} | {code} | {cells} |")
    heard = json.loads(StageFiles(workdir, stage).inputs.read_text())["corpus"]
    if corpus is not None:
        manifest = Manifest.load(corpus)
        names = sorted({name for _, name in manifest.seconds(by=("language", "corpus"))})
        same = manifest.fingerprint == heard
        lines += ["", f"Corpora: {', '.join(names)}." if same else NOT_THERE]
    lines += ["", f"Fingerprint of the prepared corpus: `{heard}`."]
    return "\n".join(lines)


def _shares(workdir: Path, stage: str) -> dict[str, dict[str, float]]:
    return json.loads((StageFiles(workdir, stage).folder / "shares.json").read_text())


def _short(name: str) -> str:
    """A stage's name, or the last part of a path: where a model lay on one machine says nothing elsewhere."""
    return Path(name).name
