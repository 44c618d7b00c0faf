"""A training step beside transformers: time, memory, and from launch to the first step.

    PYTHONPATH=. .venv/bin/python benchmarks/train_step.py [--only forward step memory start peak] \
        [--models hubert_base wavlm_base_plus wavlm_large] [--threads 2] [--repeats 5] [--out FILE.json]

A step is a whole update of masked prediction (cosine scores of 500 units at hidden frames, feature penalty, clipping,
AdamW) with dropout and layerdrop off, whose random numbers are another subject; `--regularised` has them as published.
Ours is `make_train_step`, with everything that a run measures of itself. Theirs is the model of transformers with the
same loss and masks written beside it, `clip_grad_norm_` and the fused AdamW of PyTorch, attention by `sdpa` where
the model has it (WavLM does not), and no gradient of the waveform, which transformers would ask for.

The sections, each of which can be run alone:

    peak      the fastest matrix product of either library here and now: what "of peak" means
    forward   every hidden state (benchmarks/forward_throughput.py), without a gradient
    step      turn and turn about in one process, on the same batch; medians; the ratio is theirs over ours
    memory    the largest resident set of a process that takes two steps, one process a side
    start     seconds from the launch of a process to the end of its first step: nothing compiled before, then again
              with the cache of compiled programs that the first one left

Both sides have huge pages from the C library's allocator and the same threads. Without torch and transformers (on
another interpreter) ours is measured alone, without `forward`; `--dtype bfloat16` is ours in bfloat16 and theirs under
autocast.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.beside import environment, machine, prepare, ratios, take_turns
from data_pipelines.atomic import whole_file
from data_pipelines.batch import SAMPLE_RATE, Batch, num_frames

UNITS, DIM = 500, 256
SIZES = {"hubert_base": (4, 10.0), "wavlm_base_plus": (4, 10.0), "wavlm_large": (1, 15.0)}  # rows, seconds
OFF = ("dropout", "attention_dropout", "activation_dropout", "projection_dropout", "layerdrop")
SIDES = ("wavlab_jax", "transformers")
SECTIONS = ("peak", "forward", "step", "memory", "start")


class Case(NamedTuple):
    """What one measurement is of: an architecture by name, rows of so many seconds, precision, dropout or none."""

    model: str
    rows: int
    seconds: float
    dtype: str
    regularised: bool

    @property
    def samples(self) -> int:
        """Of a row."""
        return round(self.seconds * SAMPLE_RATE)

    def learner(self):
        """Our configuration of it: HuBERT's and WavLM's objective and optimizer."""
        from wavlab_jax.encoder.architectures import architecture
        from wavlab_jax.heads import HeadConfig
        from wavlab_jax.objectives import PredictionConfig
        from wavlab_jax.optim import OptimizerConfig
        from wavlab_jax.step import LearnerConfig

        rates = {} if self.regularised else dict.fromkeys(OFF, 0.0)
        encoder = dataclasses.replace(architecture(self.model), compute_dtype=self.dtype, **rates)
        return LearnerConfig(encoder, HeadConfig(units=UNITS, dim=DIM), PredictionConfig(), OptimizerConfig())

    def batch(self) -> Batch:
        """Noise with random units."""
        import numpy as np

        rng, frames = np.random.default_rng(0), num_frames(self.samples)
        count = np.arange(self.rows, dtype=np.int32)
        return Batch(
            waveform=rng.normal(scale=0.1, size=(self.rows, self.samples)).astype(np.float32),
            clean=np.zeros((self.rows, 0), np.float32),
            units=rng.integers(0, UNITS, (self.rows, frames, 1)).astype(np.int32),
            valid=np.ones((self.rows, frames), bool),
            samples=np.full(self.rows, self.samples, np.int32),
            language=0 * count,
            utterance=count,
            partner=0 * count - 1,
            start=0 * count,
            seed=count.astype(np.uint32),
        )


def our_step(case: Case) -> Callable[[], float]:
    """Takes a step at each call; returns its loss."""
    import jax

    from wavlab_jax.compiling import return_memory_after_compiling
    from wavlab_jax.sharding import MeshConfig, make_mesh, place_batch
    from wavlab_jax.step import initial_state, make_train_step

    return_memory_after_compiling()  # as a run does
    learner, mesh = case.learner(), make_mesh(MeshConfig(), devices=jax.devices()[:1])
    step = make_train_step(learner, mesh)
    kept = [initial_state(learner, mesh)]
    batch = place_batch(case.batch(), mesh=mesh, passes=1)

    def run() -> float:
        kept[0], result = step(kept[0], batch)
        jax.block_until_ready(kept[0])
        return float(result.loss)

    return run


def their_step(case: Case) -> Callable[[], float]:
    """The same with transformers and PyTorch, from initial values of its own."""
    import torch
    import transformers
    from torch.nn import functional as F

    from wavlab_jax.convert.settings import huggingface_config
    from wavlab_jax.masking import MaskConfig

    learner, batch, mask = case.learner(), case.batch(), MaskConfig()
    config = transformers.AutoConfig.for_model(**huggingface_config(learner.encoder))
    try:
        model = transformers.AutoModel.from_config(config, attn_implementation="sdpa").train()
    except ValueError:  # WavLM has one spelling of attention
        model = transformers.AutoModel.from_config(config, attn_implementation="eager").train()
    model.feature_extractor._requires_grad = False  # else the waveform gets a gradient
    projection = torch.nn.Linear(learner.encoder.width, DIM)
    embeddings = torch.nn.Parameter(torch.rand(UNITS, DIM))
    parameters = [*model.parameters(), *projection.parameters(), embeddings]
    optimizer = torch.optim.AdamW(parameters, lr=1e-8, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True)
    waveform, units = torch.from_numpy(batch.waveform), torch.from_numpy(batch.units[..., 0]).long()
    hidden_frames = transformers.models.hubert.modeling_hubert._compute_mask_indices(
        tuple(units.shape), mask.probability, mask.length, min_masks=2
    )
    hidden_frames = torch.from_numpy(hidden_frames).bool()
    if learner.encoder.normalize_waveform:
        waveform = F.layer_norm(waveform, waveform.shape[1:])

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            features = model.feature_extractor(waveform)
            found = model.feature_projection(features.transpose(1, 2))
            found = found[0] if isinstance(found, tuple) else found
            found = torch.where(hidden_frames[..., None], model.masked_spec_embed.to(found.dtype), found)
            found = projection(model.encoder(found).last_hidden_state)
        cosine = F.normalize(found.float(), dim=-1) @ F.normalize(embeddings, dim=-1).T
        loss = F.cross_entropy(cosine[hidden_frames] / 0.1, units[hidden_frames])
        loss = loss + 10.0 * features.float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return run


STEPS = dict(zip(SIDES, (our_step, their_step), strict=True))


def sides() -> tuple[str, ...]:
    """Those that can be measured in this environment."""
    return SIDES if all(map(importlib.util.find_spec, ("torch", "transformers"))) else SIDES[:1]


def products(dtype: str) -> dict[str, Callable[[], object]]:
    """Of each side a product of 2048 x 2048 matrices, larger than any of a layer."""
    import jax
    import jax.numpy as jnp

    ours = jnp.ones((2048, 2048), dtype)
    multiply = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    found: dict[str, Callable[[], object]] = {"wavlab_jax": lambda: multiply(ours).block_until_ready()}
    if "transformers" in sides():
        import torch

        theirs = torch.ones((2048, 2048), dtype=getattr(torch, dtype))

        def torch_product():
            with torch.inference_mode():
                return theirs @ theirs

        found["transformers"] = torch_product
    return found


def peak(dtype: str, *, repeats: int = 20) -> dict[str, float]:
    """Operations a second of the fastest product of each side, and of both."""
    tried = products(dtype)
    take_turns(tried, repeats=3)
    best = {name: 2 * 2048**3 / min(turns.wall) for name, turns in take_turns(tried, repeats=repeats).items()}
    return {**best, "best": max(best.values())}


def measure_step(case: Case, *, repeats: int) -> dict[str, Any]:
    """Both sides take turns, after a step each that is not counted (it compiles)."""
    from wavlab_jax.flops import row_flops

    learner = case.learner()
    flops = case.rows * row_flops(learner.encoder, learner.head, samples=case.samples).training
    running = {name: STEPS[name](case) for name in sides()}
    losses = {name: run() for name, run in running.items()}
    before = peak(case.dtype)["best"]
    turns = take_turns(running, repeats=repeats)
    fastest = max(before, peak(case.dtype)["best"])
    summaries = {name: turn.summary(case.rows * case.seconds) for name, turn in turns.items()}
    for summary in summaries.values():
        summary["of_peak"] = round(flops / summary["median_seconds"] / fastest, 3)
    both = ratios(turns["wavlab_jax"], turns["transformers"]) if len(turns) == 2 else {}
    return {**both, "first_loss": losses, "flops": flops, "peak_flops_per_second": fastest, **summaries}


def measure_forward(case: Case, *, repeats: int) -> dict[str, Any]:
    """As benchmarks/forward_throughput.py measures it, and of the peak."""
    from benchmarks.forward_throughput import compare, pair_of
    from wavlab_jax.flops import row_flops

    found = compare(*pair_of(case.model), case.batch().waveform, repeats=repeats, dtype=case.dtype)
    flops = case.rows * row_flops(case.learner().encoder, samples=case.samples).forward
    fastest = peak(case.dtype)["best"]
    for name in SIDES:
        found[name]["of_peak"] = round(flops / found[name]["median_seconds"] / fastest, 3)
    return {**found, "peak_flops_per_second": fastest}


def one_process(case: Case, side: str, *, threads: int, cache: str | None = None, steps: int = 2) -> dict[str, float]:
    """A process that takes `steps` steps: seconds from its launch to the end of the first one, peak of memory."""
    arguments = [sys.executable, os.path.abspath(__file__), "--alone", side, *map(str, case), str(steps)]
    more = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | ({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {})
    started = time.time()
    done = subprocess.run(
        [*arguments, "--threads", str(threads)], env=environment(threads) | more, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return {"seconds_to_first_step": round(said["first"] - started, 1), "peak_bytes": said["peak_bytes"]}


def alone(side: str, words: list[str], threads: int) -> None:
    """What the process of `one_process` does."""
    model, rows, seconds, dtype, regularised, steps = words
    case = Case(model, int(rows), float(seconds), dtype, regularised == "True")
    run = STEPS[side](case)
    run()
    first = time.time()
    for _ in range(int(steps) - 1):
        run()
    print(json.dumps({"first": first, "peak_bytes": peak_resident()}))


def peak_resident() -> int:
    """Largest resident set of this process so far, in bytes. (`getrusage` begins with that of its parent.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024


def measure_memory(case: Case, *, threads: int) -> dict[str, Any]:
    """The largest resident set of each side."""
    found = {name: one_process(case, name, threads=threads)["peak_bytes"] for name in sides()}
    return {name: round(size / 2**30, 2) for name, size in found.items()}


def measure_start(case: Case, *, threads: int) -> dict[str, Any]:
    """Ours twice, with an empty cache of compiled programs and with a full one; theirs once."""
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (one_process(case, "wavlab_jax", threads=threads, cache=cache, steps=1) for _ in range(2))
    found = {"cold": cold["seconds_to_first_step"], "warm": warm["seconds_to_first_step"]}
    if "transformers" in sides():
        theirs = one_process(case, "transformers", threads=threads, steps=1)
        found["transformers"] = theirs["seconds_to_first_step"]
    return found


def said(section: str, case: Case, found: dict[str, Any]) -> str:
    """A line for people."""
    what = f"{section} {case.model} {case.rows} x {case.seconds:g} s {case.dtype}"
    if section in ("memory", "start"):
        unit = "GiB" if section == "memory" else "s"
        return f"{what}: " + ", ".join(f"{name} {value:g} {unit}" for name, value in found.items())
    times = ", ".join(
        f"{name} {found[name]['median_seconds']:.2f} s ({100 * found[name]['of_peak']:.0f} % of peak)"
        for name in SIDES
        if name in found
    )
    if "ratio" not in found:
        return f"{what}: {times}"
    return (
        f"{what}: {times}: {found['ratio']:.2f}x (bests {found['ratio_of_bests']:.2f}x, processor time "
        f"{found['ratio_of_processor_time']:.2f}x, pairs {found['median_of_paired_ratios']:.2f}x)"
    )


def main() -> None:
    """Measures what is asked for, prints a line each, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="by default all that this environment can measure")
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--regularised", action="store_true", help="dropout and layerdrop as published")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", nargs=7, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prepare(arguments.threads)
    if arguments.alone:
        return alone(arguments.alone[0], arguments.alone[1:], arguments.threads)

    if "forward" in (arguments.only or ()) and len(sides()) == 1:
        parser.error("the section `forward` needs torch and transformers (make test-venv); leave it out with --only")
    sections = arguments.only or [name for name in SECTIONS if name != "forward" or len(sides()) == 2]

    measured: dict[str, Any] = {"machine": machine(arguments.threads)}
    print(f"{measured['machine']['processor']}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}")
    if not arguments.only and "forward" not in sections:
        print("without torch and transformers (make test-venv): ours alone, and not the section `forward`")
    if "peak" in sections:
        measured["peak"] = peak(arguments.dtype)
        print("peak: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in measured["peak"].items()))
    for model in arguments.models:
        case = Case(model, *SIZES[model], arguments.dtype, arguments.regularised)
        for section in sections:
            if section == "forward":
                found = measure_forward(case, repeats=arguments.repeats)
            elif section == "step":
                found = measure_step(case, repeats=arguments.repeats)
            elif section == "memory":
                found = measure_memory(case, threads=arguments.threads)
            elif section == "start":
                found = measure_start(case, threads=arguments.threads)
            else:
                continue
            measured.setdefault(section, {})[model] = found
            print(said(section, case, found), flush=True)
    if arguments.out:
        with whole_file(arguments.out) as temporary:
            temporary.write_text(json.dumps(measured, indent=1) + "\n")
        print(arguments.out)


if __name__ == "__main__":
    main()
