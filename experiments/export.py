"""Writing a model for PyTorch, in any layout: a trained stage, or one that was imported."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import wavlab_jax.model as models
from data_pipelines.manifest import Manifest, Split
from data_pipelines.sources import ShardSource
from experiments import stage_card
from experiments.mlsuperb import recogniser
from experiments.stage_files import StageFiles
from experiments.trained import imported_model, load_model
from experiments.verify import Comparison, VerifyError, verify
from wavlab_jax.convert.card import model_card
from wavlab_jax.convert.checkpoint import Checkpoint, from_encoder
from wavlab_jax.convert.heads import stored_head
from wavlab_jax.convert.huggingface import HEAD_FILE
from wavlab_jax.convert.layouts import differences, read_checkpoint, write_checkpoint
from wavlab_jax.convert.names import ConvertError
from wavlab_jax.convert.source_card import read_source_card
from wavlab_jax.encoder import Encoder, EncoderConfig
from wavlab_jax.sharding import MeshConfig, make_mesh

LABEL_RATE = 50.0  # units a second: one every 20 ms, which is what every stage trains on


class Exported(NamedTuple):
    """`checkpoint` was written to `folder`, which holds `files`; `notes`: where the peers' numbers may differ.

    `encoder`: with the adapter that `checkpoint` has among its heads; None where its tensors are all of the encoder.
    """

    checkpoint: Checkpoint
    folder: Path
    layout: str
    files: tuple[str, ...]
    notes: tuple[str, ...]
    encoder: Encoder | None = None


def export_model(
    name: str,
    *,
    workdir: Path,
    corpus: Path | None,
    out: Path,
    layout: str = "huggingface",
    licence: str | None = None,
    architecture: EncoderConfig | None = None,
    normalize_waveform: bool | None = None,
) -> Exported:
    """Writes a model and its card into the folder `out`, whole or not at all.

    Args:
        name: a stage that was trained in `workdir`, whose newest parameters are taken; the path of a folder that
            `finetune` wrote; or that of any model that `read_checkpoint` takes, with `architecture` and
            `normalize_waveform`. What the card beside it says is carried over.
        workdir: of the stages.
        corpus: prepared; names its parts in the card. None: they are left out.
        out: must not exist, or be an empty folder.
        layout: one of `wavlab_jax.convert.layouts.LAYOUTS`.
        licence: of the weights, for the card; by default what the card beside the model says.

    Raises CheckpointError, ConvertError, ProtocolError, CannotWrite.
    """
    path, encoder = imported_model(workdir, name), None
    if path is not None and recogniser.matches(path):
        _require_transformers(layout, path)
        found = recogniser.read_recogniser(path)
        checkpoint, encoder = found.checkpoint, found.encoder
        card = {"sections": found.sections, "languages": found.languages}
    elif path is not None:
        checkpoint = read_checkpoint(path, architecture=architecture, normalize_waveform=normalize_waveform)
        card = {"source": read_source_card(path)}
    else:
        checkpoint = stage_checkpoint(workdir, name)
        card = {
            "sections": stage_card.sections(workdir, name, corpus),
            "languages": stage_card.languages(workdir, name),
            "papers": stage_card.papers(workdir, name),
        }
    notes = differences(checkpoint, layout=layout)
    text = model_card(
        checkpoint, notes=notes, head_file=HEAD_FILE, licence=licence, in_transformers=layout == "huggingface", **card
    )
    files = write_checkpoint(checkpoint, out, layout=layout, card=text)
    return Exported(checkpoint, Path(out), layout, files, notes, encoder)


def _require_transformers(layout: str, path: Path) -> None:
    if layout != "huggingface":
        raise ConvertError(
            f"{path} is a recogniser, which transformers has classes for, and {layout} no file that is known here: "
            "leave --layout out"
        )


def stage_checkpoint(workdir: Path, stage: str) -> Checkpoint:
    """The newest model of a trained stage, head and all."""
    model = load_model(workdir, stage, make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    config = stage_card.flat_config(StageFiles(workdir, stage).config)
    settings = {"sample_rate": 16_000, "temperature": config["learner.objective.temperature"]}
    contrastive = "learner.objective.negatives" in config
    if contrastive:
        settings |= {name: config[f"learner.objective.{name}"] for name in ("negatives", "diversity_weight")}
    else:
        settings["label_rate"] = LABEL_RATE
        sets = (config["learner.head.units"], *config.get("learner.head.more_units", ()))
        if sets[1:]:
            settings["dictionaries"] = [[str(unit) for unit in range(units)] for units in sets]
        if sets[1:] and config["learner.head.split_projection"]:
            settings["untie_final_proj"] = True
    return from_encoder(
        model.encoder,
        head=stored_head(models.parameters(model.head)),
        settings=settings,
        model_type="wav2vec2" if contrastive else "hubert",
    )


def check(exported: Exported, corpus: Path | None) -> list[Comparison]:
    """`verify` of what was exported, on a held-out clip. Deletes the folder if it does not compute the same."""
    try:
        clip = _clip(corpus)
        return verify(exported.checkpoint, exported.folder, clip, layout=exported.layout, encoder=exported.encoder)
    except VerifyError as error:
        if not can_verify():
            raise
        shutil.rmtree(exported.folder)  # nothing wrong stays under the name that was asked for
        raise VerifyError(
            f"{error}\n{exported.folder} was deleted: what computes something else is not kept"
        ) from error


def can_verify() -> bool:
    """Whether transformers and PyTorch are installed."""
    return all(find_spec(name) is not None for name in ("torch", "transformers"))


def export_stage(stage: str, *, workdir: Path, corpus: Path | None, out: Path) -> dict:
    """A trained stage as a Hugging Face folder, checked where that is possible: what results.json says of it."""
    exported = export_model(stage, workdir=workdir, corpus=corpus, out=out)
    peers = check(exported, corpus) if can_verify() else []
    return {
        "folder": str(out),
        "files": list(exported.files),
        "bytes": sum(path.stat().st_size for path in Path(out).iterdir()),
        "notes": list(exported.notes),
        "largest_difference": max((peer.largest for peer in peers), default=None),
        "checked_with": peers[0].peer if peers else "not checked: transformers and PyTorch are not installed",
    }


def _clip(corpus: Path | None) -> np.ndarray:
    """A held-out clip of at least a second, or noise where there is none; float32 [samples]."""
    if corpus is not None:
        manifest = Manifest.load(corpus)
        for i in np.concatenate([manifest.rows(Split.TEST), manifest.rows(Split.DEV)]):
            if manifest.samples[i] >= 16_000:
                return ShardSource(manifest).read(int(i))[: 16_000 * 10]
    return np.random.default_rng(0).normal(scale=0.1, size=32_000).astype(np.float32)
