"""A benchmark folder of 48 beeps, a downstream model to match, and `superb` on them; a program that kill -9 can hit.

python -m tests.experiments.small_mlsuperb ROOT WORKDIR
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import soundfile

from data_pipelines.mlsuperb.batches import TrackBatchesConfig
from data_pipelines.mlsuperb.layout import few_shot_utterances
from experiments.mlsuperb.benchmark import run_benchmark
from experiments.mlsuperb.encoders import FrozenEncoder
from experiments.mlsuperb.protocol import ProtocolConfig
from experiments.run import configure_jax
from tests.wavlab_jax import tiny
from wavlab_jax.downstream import DownstreamConfig, SpecAugmentConfig
from wavlab_jax.encoder import make_encoder
from wavlab_jax.model import parameters
from wavlab_jax.sharding import MeshConfig, make_mesh, parameter_shardings

DOWNSTREAM = DownstreamConfig(
    tokens=3, projection=20, channels=20, width=16, layers=1, heads=2, feed_forward=24,
    augment=SpecAugmentConfig(channel_masks=1, channel_mask_width=4, time_masks=2),
)  # fmt: skip
CFG = ProtocolConfig(
    scale=50 / 300_000, learning_rate=1e-2, batches=TrackBatchesConfig(size=3, step=1.0, threads=0, fillers=True)
)
TEXTS = {
    "eng": ("AB", "A BA", "BAB", "AA", "B"),
    "deu": ("ÄB", "B", "ÄÄ", "BÄ", "B B"),
    "tur": ("IB", "B", "I", "BB", "II"),
}
HERTZ = {"eng": 300, "deu": 1_000, "tur": 3_000}  # at which each language beeps


def write_folder(root: Path) -> Path:
    """Two sources, three languages of which one is few-shot, and a fault of each kind."""
    few_shot = sorted(id for id in few_shot_utterances() if "_tur_" in id)  # the five that the benchmark names
    rng, heard = np.random.default_rng(0), {}
    for source, prefix, language in (("mls", "mls", "eng"), ("commonvoice", "cv", "deu"), ("commonvoice", "cv", "tur")):
        folder = root / source / language
        (folder / "wav").mkdir(parents=True)
        for part, name in (("train", "10min_train"), ("dev", "10min_dev"), ("test", "10min_test")):
            lines = []
            for number, text in enumerate(TEXTS[language]):
                few = language == "tur" and part == "train"
                id = few_shot[number] if few else f"{prefix}_{language}_{len(part)}{number:05d}"
                time = np.arange(5_000 + 900 * number) / 16_000
                beep = np.abs(time - rng.uniform(0.1, time[-1] - 0.1)) < 0.06  # once, as the language is said
                samples = rng.uniform(0.05, 0.3) * beep * np.sin(2 * np.pi * HERTZ[language] * time)
                heard[language] = samples
                soundfile.write(folder / "wav" / f"{id}.wav", samples, 16_000)
                lines.append(f"{id} x {text}\n")
            (folder / f"transcript_{name}.txt").write_text("".join(lines), "utf-8")
    soundfile.write(root / "mls" / "eng" / "wav" / "mls_eng_900000.wav", rng.normal(0, 0.1, 5_000), 16_000)  # untold
    soundfile.write(root / "mls" / "eng" / "wav" / "mls_eng_900001.wav", heard["eng"][:5_000], 16_000)
    with open(root / "mls" / "eng" / "transcript_10min_train.txt", "a") as file:
        file.write(f"mls_eng_900001 x {'AB' * 30}\nmls_eng_900002 x A\nmls_eng_900003 x\n")
    with open(root / "mls" / "eng" / "transcript_10min_test.txt", "a") as file:
        file.write("mls_eng_900001 x Q\n")
    return root


def write_challenge(out: Path, root: Path) -> Path:
    """ML-SUPERB 2.0's challenge, of a folder's recordings: two utterances of each of two languages, dialects of one."""
    for split, languages in (("train", ("eng", "deu")), ("dev", ("eng", "deu")), ("dev_dialect", ("deu",))):
        folder, texts, places = out / "data" / split, [], []
        folder.mkdir(parents=True)
        for language in languages:
            for path, text in zip(sorted(root.glob(f"*/{language}/wav/*.wav"))[:2], TEXTS[language], strict=False):
                texts.append(f"{path.stem}_{split} [{language}] {text}\n")
                places.append(f"{path.stem}_{split} {path}\n")
        (folder / "text").write_text("".join(texts), "utf-8")
        (folder / "wav.scp").write_text("".join(places))
    return out


def encoder(mesh, name="tiny"):
    params = {"encoder": parameters(make_encoder(jax.random.key(0), tiny.encoder(layers=1)))}
    placed = jax.device_put(params, parameter_shardings(params, mesh))["encoder"]
    return FrozenEncoder(name, "random", "of this test", tiny.encoder(layers=1), placed)


def run(root, workdir, *, devices=1, fsdp=1, track="joint", **changes):
    mesh = make_mesh(MeshConfig(fsdp=fsdp), devices=jax.devices()[:devices])
    return run_benchmark(
        encoder(mesh), root=root, workdir=workdir, tracks=[(track, None)], duration="10min",
        cfg=dataclasses.replace(CFG, **changes), mesh=mesh, downstream=DOWNSTREAM,
    )[0]  # fmt: skip


if __name__ == "__main__":
    configure_jax(Path(sys.argv[2]))
    run(Path(sys.argv[1]), Path(sys.argv[2]))
