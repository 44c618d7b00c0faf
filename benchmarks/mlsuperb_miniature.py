"""ML-SUPERB on its miniature: the demo's stages, a random encoder, log-mel and a Hugging Face HuBERT in one table.

    make pretrain                                                            # the stages, in work/demo
    python -m data_pipelines miniature demo_corpus --out work/mlsuperb
    PYTHONPATH=. .venv/bin/python benchmarks/mlsuperb_miniature.py --mlsuperb work/mlsuperb --workdir work/demo

Every track for each model, as `python -m experiments superb MODEL --mlsuperb work/mlsuperb` does it with the options
that this prints; here models take turns track by track, and those of one shape share their compiled programs. A tiny
HuBERT with random weights is written by transformers, and judged on the first track by the command itself, as is the
table. What was finished is kept; run it again to go on. `--track` and `--sets` choose some, so that two of it can run
side by side, a core each; `--write docs/mlsuperb.md` puts the table into that file.

The downstream model is the published one, which learns nothing in the time that a laptop has, but goes every way that a
real run goes. With `--narrow` it is an eighth as wide, and is updated after each batch at a higher rate: it learns.
Those results lie in WORKDIR/narrow.
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

TASKS = ("identification", "multilingual", "joint", "monolingual")
STAGES = ("wavlab_mk", "wavlab_ms", "wavlab_mk_continued")
BEGIN, END = "<!-- benchmarks/mlsuperb_miniature.py{} -->", "<!-- end -->"
STEP = 2.5  # seconds; lengths are 2.5, 5, 10 and 20: few programs to compile
SCALE = 0.00003
NARROW = {"identification": 1_200, "multilingual": 800, "joint": 800, "monolingual": 250}  # batches of each training


def protocol(task: str, *, narrow: bool) -> ProtocolConfig:
    """What a track is trained by."""
    batches = TrackBatchesConfig(size=BATCH, step=STEP, doubling=True, fillers=True)
    if not narrow:
        return ProtocolConfig(SCALE, 1e-3, batches)
    scale = NARROW[task] / ITERATIONS[task == "monolingual", "10min"]
    return ProtocolConfig(scale, 5e-3, batches, accumulate=1, width=32)


def options(cfg: ProtocolConfig) -> list[str]:
    """The same for `superb`."""
    values = {
        "--scale": cfg.scale,
        "--learning-rate": cfg.learning_rate,
        "--accumulate": cfg.accumulate,
        "--width": cfg.width,
        "--batches.step": cfg.batches.step,
        "--batches.doubling": cfg.batches.doubling,
        "--batches.fillers": cfg.batches.fillers,
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


def write_table(results: Path, page: Path, *, narrow: bool, given: list[str]) -> None:
    """The table of the results between the page's two marks, and what it took, under a title of its own."""
    seconds = sum(each["seconds"] for each in read_results(results))
    table = (
        (results / "mlsuperb" / "leaderboard.md")
        .read_text("utf-8")
        .split("\n", maxsplit=1)[1]
        .replace("\n## ", "\n#### ")
    )
    title = "A downstream model that is small enough to learn" if narrow else "Every track, hardly trained"
    machine = next(read_results(results))["machine"]
    about = "So few updates teach nothing: differences mean nothing. It shows that the paths run.\n"
    if narrow:
        about = "One seed. Where nothing is written (100.0, of languages 0.0), updates may be too few as well as the "
        about += "model poor.\n"
    said = (
        f"`{' '.join(['benchmarks/mlsuperb_miniature.py', *given])}`:\n"
        f"{seconds / 60:.0f} minutes of training and judging, summed, on {machine['cores']} shared cores "
        f"({machine['processor']}).\n{about}"
        "Stage 1 is `wavlab_mk`, stage 2 `wavlab_ms`, the control `wavlab_mk_continued`; `hubert_tiny_random` is the\n"
        "Hugging Face folder.\n"
    )
    begin = BEGIN.format(" --narrow" * narrow)
    before, rest = page.read_text("utf-8").split(begin)
    _, after = rest.split(END, maxsplit=1)
    page.write_text(
        f"{before}{begin}\n\n### {title}: not by the published protocol\n\n{said}{table}\n{END}{after}", "utf-8"
    )


def main() -> None:
    """Runs what is left, and the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mlsuperb", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--track", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--sets", nargs="+", default=())
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    workdir, narrow = arguments.workdir, arguments.narrow
    results = workdir / "narrow" if narrow else workdir
    configure_jax(workdir)
    mesh = make_mesh(MeshConfig())
    models = (*STAGES, f"random:{STAGES[0]}", LOG_MEL)
    encoders = [read_encoder(model, workdir=workdir, mesh=mesh) for model in models]
    for track in tracks_of(arguments.track, arguments.sets):
        for encoder in encoders:
            run_benchmark(
                encoder,
                root=arguments.mlsuperb,
                workdir=results,
                tracks=[track],
                duration="10min",
                cfg=protocol(track[0], narrow=narrow),
                mesh=mesh,
            )
    folder = workdir / "hubert_tiny_random"
    if not folder.exists():
        write_hubert(folder)
    command = [sys.executable, "-m", "experiments"]
    first = arguments.track[0]
    superb = [*command, "superb", str(folder), "--mlsuperb", str(arguments.mlsuperb), "--workdir", str(results)]
    superb += ["--track", "lid" if first == "identification" else first]
    superb += ["--sets", *arguments.sets[:1]] if first == "monolingual" and arguments.sets else []
    superb += options(protocol(first, narrow=narrow))
    print(" ".join(superb), flush=True)
    subprocess.run(superb, check=True)
    subprocess.run([*command, "leaderboard", "--workdir", str(results)], check=True)
    if arguments.write:
        some = [] if arguments.track == TASKS else ["--track", *arguments.track]
        some += ["--sets", *arguments.sets] if arguments.sets else []
        write_table(results, arguments.write, narrow=narrow, given=["--narrow"] * narrow + some)


if __name__ == "__main__":
    main()
