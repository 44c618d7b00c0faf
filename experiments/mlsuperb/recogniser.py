"""A fine-tuned recogniser read back from its folder, as a checkpoint for transformers."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.languages import name_of
from data_pipelines.mlsuperb.texts import SPACE
from data_pipelines.mlsuperb.tracks import BLANK, END, UNKNOWN
from experiments.commands import Unsaid
from experiments.mlsuperb.encoders import read_encoder
from experiments.mlsuperb.protocol import ProtocolError
from experiments.mlsuperb.recipe import RecipeConfig
from experiments.mlsuperb.results import read_result
from experiments.stage import as_started
from wavlab_jax.adapters import BottleneckConfig, LoraConfig, adapted
from wavlab_jax.checkpoint import restore_parameters
from wavlab_jax.convert.adapters import stored_adapter
from wavlab_jax.convert.checkpoint import Checkpoint, from_encoder
from wavlab_jax.convert.tokenizer import DELIMITER, bar_for, fine_tuned_settings, tokenizer_files
from wavlab_jax.encoder import Encoder
from wavlab_jax.model import assemble, read_description
from wavlab_jax.sharding import MeshConfig, abstract_on, make_mesh
from wavlab_jax.step import abstract_state

ABOUT = "recogniser.json"


class Recogniser(NamedTuple):
    """Attributes:
    checkpoint: encoder (LoRA merged into it), CTC head, vocabulary.
    encoder: as it computes, a bottleneck in it.
    sections: heading -> Markdown, for the card.
    languages: ISO 639 codes of those that it was fine-tuned on.
    """

    checkpoint: Checkpoint
    encoder: Encoder
    sections: dict[str, str]
    languages: list[str]


class _Files:
    def __init__(self, folder: Path):
        self.folder, self.config = folder, folder / "config.txt"


def matches(folder: Path) -> bool:
    """Whether `folder` is one that `finetune` wrote."""
    return (Path(folder) / ABOUT).is_file()


def read_recogniser(folder: Path) -> Recogniser:
    """The model in a folder that `finetune` wrote: the mean of its best checkpoints.

    Raises ProtocolError (it is not trained to its end, or the frozen encoder under an adapter is another one now),
    ConvertError (a bottleneck that transformers has no place for).
    """
    folder = Path(folder)
    if not (folder / "finished.json").exists():
        raise ProtocolError(f"{folder} is not trained to its end: give the same `finetune` command again, it goes on")
    about = json.loads((folder / ABOUT).read_text())
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    cfg = as_started(RecipeConfig(), _Files(folder))
    learner = cfg.learner(read_description(folder / "model.json").encoder, tokens=len(about["tokens"]))
    params = restore_parameters(folder / "average", abstract_on(abstract_state(learner, mesh).params, mesh))
    if learner.adapter is None:
        merged = whole = learner.model(params).encoder
    else:
        said = Unsaid(**about["unsaid"]).arguments()
        frozen = read_encoder(about["model"], workdir=folder.parents[3], mesh=mesh, **said)
        if frozen.identity != about["identity"]:
            raise ProtocolError(
                f"{about['model']} is not the model that {folder} was fine-tuned on: put that one back there"
            )
        merged = assemble({"encoder": frozen.params, "head": params["head"]}, learner.encoder, learner.head).encoder
        whole = adapted(merged, params["adapter"], learner.adapter)
        merged = whole if isinstance(learner.adapter, LoraConfig) else merged
    kind, output = about["model_type"], params["head"]["output"]
    head = {"lm_head.weight": np.asarray(output["kernel"]).T, "lm_head.bias": np.asarray(output["bias"])}
    if isinstance(learner.adapter, BottleneckConfig):
        head |= stored_adapter(params["adapter"], learner.adapter, encoder=merged.config, model_type=kind)
    parts = {"blank": BLANK, "unknown": UNKNOWN, "end": END, "space": SPACE}
    tokenizer = tokenizer_files(about["tokens"], **parts, phones=about["token"] != "character")
    settings = {
        "sample_rate": SAMPLE_RATE,
        "tokenizer": tokenizer,
        "fine_tuning": fine_tuned_settings(tokenizer, dropout=learner.head.dropout),
    }
    checkpoint = from_encoder(merged, head=head, settings=settings, model_type=kind)
    return Recogniser(checkpoint, whole, _sections(folder, about), about["languages"])


def _sections(folder: Path, about: dict) -> dict[str, str]:
    """Where the model comes from, and how well it recognised the track."""
    languages = ", ".join(f"{name_of(code)} ({code})" for code in about["languages"])
    told = [
        f"`{Path(about['model']).name}`, fine-tuned with a linear layer by CTC, on ML-SUPERB's batches and texts, with "
        f"WavLab-JAX. {about.get('texts', '')}".rstrip(),
        "",
        f"Languages: {languages}.",
    ]
    if {DELIMITER, SPACE} <= set(about["tokens"]):
        told += ["", f"`{bar_for(about['tokens'])}` stands for `{DELIMITER}`, which is a space in vocab.json."]
    found = [read_result(path) for path in (*folder.glob("results.json"), *sorted(folder.glob("*/results.json")))]
    return {"Fine-tuning": "\n".join(told)} | ({"Results": "\n\n".join(map(_results, found))} if found else {})


def _results(results: dict) -> str:
    """How well it recognised a track, or a judged set of it."""
    rows = ["| test utterances | group | error rate, % | language right, % |", "|---:|---|---:|---:|"]
    for group, row in results["groups"].items():
        rate, right = (f"{row[key]:.1f}" if key in row else "" for key in ("error_rate", "accuracy"))
        rows.append(f"| {row['utterances']:,} | {group} | {rate} | {right} |")
    said = [f"Track: {results['track']}, {results['set']}; errors of {results['token']}s.", "", *rows, ""]
    said += [f"- {each}" for each in results["protocol"]["deviations"]]
    return "\n".join(said)
