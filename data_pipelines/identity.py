"""What decides batch k, said in words: so that a run which would go on with other data is refused with what changed."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from data_pipelines.manifest import Manifest, Split
from data_pipelines.pipeline import DataConfig
from data_pipelines.recordings import files_digest
from data_pipelines.sampling import ORDER_VERSION

FREE = ("workers", "threads", "prefetch")  # fields of DataConfig that change no batch


def corpus_identity(manifest: Manifest) -> dict[str, object]:
    """The corpus by its fingerprint, and beside it what a person can compare: utterances, and hours by language."""
    said: dict[str, object] = {"corpus": manifest.fingerprint, "training utterances": len(manifest.rows(Split.TRAIN))}
    hours = {name: round(seconds / 3600, 6) for name, seconds in manifest.seconds(Split.TRAIN).items()}
    return said | {f"hours of {name}": amount for name, amount in sorted(hours.items())}


def data_identity(manifest: Manifest, cfg: DataConfig) -> dict[str, object]:
    """Everything that batch k depends on besides k and the units, as plain JSON.

    `corpus_identity`, the version of the rules of the draw, the configuration field by field, and the files of its
    folders of noise and rooms. Hosts, workers and threads are not in it. Raises SourceError: a folder without audio.
    """
    said = corpus_identity(manifest) | {"draw rules": ORDER_VERSION}
    fields = _flat("data", dataclasses.asdict(cfg))
    said |= {key: value for key, value in fields.items() if key.split(".")[-1] not in FREE}
    if cfg.mixing is not None and cfg.mixing.noise_folder is not None:
        said["files of noise"] = files_digest(cfg.mixing.noise_folder, what="noise")
    if cfg.reverb.probability and cfg.reverb.folder is not None:
        said["files of rooms"] = files_digest(cfg.reverb.folder, what="room response")
    return json.loads(json.dumps(said))


def data_digest(manifest: Manifest, cfg: DataConfig) -> str:
    """Hex sha256 of `data_identity`: two runs with the same one hear the same batches."""
    return hashlib.sha256(json.dumps(data_identity(manifest, cfg), sort_keys=True).encode()).hexdigest()


def what_changed(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """One line for each entry in which two identities differ, in a fixed order; none if they are the same."""
    return [
        f"{key}: {then.get(key, '(absent)')} then, {now.get(key, '(absent)')} now"
        for key in sorted({*then, *now})
        if then.get(key, "(absent)") != now.get(key, "(absent)")
    ]


def _flat(prefix: str, value) -> dict[str, object]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat |= _flat(f"{prefix}.{key}", inner)
    return flat
