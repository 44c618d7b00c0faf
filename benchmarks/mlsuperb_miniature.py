"""ML-SUPERB on its miniature: the demo's stages, a random encoder, log-mel and a Hugging Face HuBERT in one table.

    make pretrain                                                            # the stages, in work/demo
    python -m data_pipelines miniature demo_corpus --out work/mlsuperb
    PYTHONPATH=. .venv/bin/python benchmarks/mlsuperb_miniature.py --mlsuperb work/mlsuperb --workdir work/demo

Every track for each model, as `python -m experiments superb MODEL --mlsuperb work/mlsuperb --workdir work/demo` does it
with the options that this prints; here models take turns track by track, and those of one shape share their compiled
programs. A tiny HuBERT with random weights is written by transformers, and judged on the first track by the command
itself, as is the table. What was finished is kept; run it again to go on. `--track` and `--sets` choose some, so that
two of it can run side by side, a core each; `--write docs/mlsuperb.md` puts the table into that file.

The published downstream model would learn nothing in the time that a laptop has. This one is an eighth as wide, and is
updated after each batch, at a higher rate.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from data_pipelines.mlsuperb.batches import TrackBatchesConfig
from experiments.mlsuperb.benchmark import run_benchmark, tracks_of
from experiments.mlsuperb.encoders import LOG_MEL, read_encoder
from experiments.mlsuperb.protocol import BATCH, ITERATIONS, ProtocolConfig
from experiments.mlsuperb.results import read_results
from experiments.run import configure_jax
from wavlab_jax.sharding import MeshConfig, make_mesh

STAGES = ("wavlab_mk", "wavlab_ms", "wavlab_mk_continued")
BEGIN, END = "<!-- benchmarks/mlsuperb_miniature.py -->", "<!-- end -->"
STEP = 2.5  # seconds; lengths are 2.5, 5, 10 and 20: few programs to compile
LEARNING_RATE, WIDTH, ACCUMULATE = 5e-3, 32, 1
BATCHES = {"identification": 1_200, "monolingual": 250, "multilingual": 800, "joint": 800}  # of each training


def scale(task: str) -> float:
    """Of the published iterations."""
    return BATCHES[task] / ITERATIONS[task == "monolingual", "10min"]


def options(task: str) -> list[str]:
    """Of `superb`, the same as those of the models here."""
    values = {
        "--scale": scale(task),
        "--learning-rate": LEARNING_RATE,
        "--accumulate": ACCUMULATE,
        "--width": WIDTH,
        "--batches.step": STEP,
        "--batches.doubling": True,
        "--batches.fillers": True,
    }
    return [str(each) for pair in values.items() for each in pair]


def write_hubert(folder: Path) -> None:
    """A Hugging Face folder of a HuBERT of 2 layers of 64 channels with random weights."""
    import torch
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        conv_dim=(32,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    HubertModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)


def write_table(workdir: Path, page: Path, *, given: list[str]) -> None:
    """The table of the workdir between the page's two marks, and what it took."""
    seconds = sum(results["seconds"] for results in read_results(workdir))
    table = (workdir / "mlsuperb" / "leaderboard.md").read_text("utf-8").replace("\n## ", "\n#### ")
    table = "###" + table.removeprefix("#")
    machine = next(read_results(workdir))["machine"]
    command = " ".join(["benchmarks/mlsuperb_miniature.py", *given])
    said = (
        f"`{command}`: {seconds / 60:.0f} minutes of training and judging,\n"
        f"summed over its runs, on {machine['cores']} shared cores ({machine['processor']}).\n"
        "Stage 1 is `wavlab_mk`, stage 2 `wavlab_ms`, the control `wavlab_mk_continued`; `hubert_tiny_random` is the\n"
        "Hugging Face folder.\n"
    )
    before, rest = page.read_text("utf-8").split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{said}\n{table}\n{END}{after}", "utf-8")


def main() -> None:
    """Runs what is left, and the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mlsuperb", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--track", nargs="+", choices=BATCHES, default=tuple(BATCHES))
    parser.add_argument("--sets", nargs="+", default=())
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    workdir = arguments.workdir
    configure_jax(workdir)
    mesh = make_mesh(MeshConfig())
    batches = TrackBatchesConfig(size=BATCH, step=STEP, doubling=True, fillers=True)
    models = (*STAGES, f"random:{STAGES[0]}", LOG_MEL)
    encoders = [read_encoder(model, workdir=workdir, mesh=mesh) for model in models]
    for track in tracks_of(arguments.track, arguments.sets):
        cfg = ProtocolConfig(
            scale=scale(track[0]), learning_rate=LEARNING_RATE, batches=batches, accumulate=ACCUMULATE, width=WIDTH
        )
        for encoder in encoders:
            run_benchmark(
                encoder,
                root=arguments.mlsuperb,
                workdir=workdir,
                tracks=[track],
                duration="10min",
                cfg=cfg,
                mesh=mesh,
            )
    folder = workdir / "hubert_tiny_random"
    if not folder.exists():
        write_hubert(folder)
    command = [sys.executable, "-m", "experiments"]
    first = arguments.track[0]
    track = ["--track", "lid" if first == "identification" else first]
    track += ["--sets", *arguments.sets] if arguments.sets else []
    superb = [*command, "superb", str(folder), "--mlsuperb", str(arguments.mlsuperb), "--workdir", str(workdir)]
    superb += [*track, *options(first)]
    print(" ".join(superb), flush=True)
    subprocess.run(superb, check=True)
    subprocess.run([*command, "leaderboard", "--workdir", str(workdir)], check=True)
    if arguments.write:
        some = [] if set(arguments.track) == set(BATCHES) else ["--track", *arguments.track]
        some += ["--sets", *arguments.sets] if arguments.sets else []
        write_table(workdir, arguments.write, given=some)


if __name__ == "__main__":
    main()
