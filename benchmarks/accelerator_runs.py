"""The parts of benchmarks/accelerator_check.py that start runs as a user does, in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# openxla/xla docs/determinism.md: deterministic kernels, and no autotuning, which may choose another one each time.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
STAGES = {True: "best_rq_base", False: "hubert_base_it1"}  # the small form's needs no units to be made


def train(out: Path, *, small: bool) -> dict:
    """A demo-size stage from audio to its last step, as a user starts it; its curves are drawn."""
    steps = 6 if small else 300
    _remove(out / "train")
    ended = _train(out / "train", _audio(out, small=small), steps=steps, small=small)
    lines = _lines(out / "train", small)
    failed = (
        [] if ended.returncode == 0 and lines else [f"the run ended with {ended.returncode}: {ended.stderr[-600:]}"]
    )
    losses = [line["masked_loss"] for line in lines]
    if losses and not small and not losses[-1] < losses[0]:
        failed.append(f"the loss did not fall: {losses[0]:.3f} to {losses[-1]:.3f}")
    return {"steps": steps, "lines": lines, "failed": failed}


def resume(out: Path, *, small: bool) -> dict:
    """The same stage twice with deterministic kernels: once whole, once killed with -9 and started again.

    Metrics but for times, and every parameter, must be the same bit for bit. On GPUs that takes `DETERMINISTIC`.
    """
    from wavlab_jax.clock import TIMES

    platform_name = json.loads((out / "machine.json").read_text())["platform"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip() if platform_name in ("gpu", "cuda") else None
    environment = {} if flags is None else {"XLA_FLAGS": flags}
    steps, audio = 6 if small else 60, _audio(out, small=small)
    _remove(out / "whole", out / "killed")
    whole = _train(out / "whole", audio, steps=steps, small=small, **environment)
    killed = _train(out / "killed", audio, steps=steps, small=small, kill_after=1, **environment)
    again = _train(out / "killed", audio, steps=steps, small=small, **environment)
    failed = [f"a run ended with {run.returncode}: {run.stderr[-600:]}" for run in (whole, again) if run.returncode]
    if killed.returncode != -signal.SIGKILL:
        failed.append(f"the run to be killed ended with {killed.returncode} before it was: {killed.stderr[-600:]}")
    told = {"killed_with": killed.returncode, "XLA_FLAGS": flags, "steps": steps}
    if not failed:
        timeless = [
            [{k: v for k, v in line.items() if k not in TIMES} for line in _lines(out / name, small)]
            for name in ("whole", "killed")
        ]
        told["largest_weight_difference"] = _weights_differ(out / "whole", out / "killed", small)
        if timeless[0] != timeless[1]:
            failed.append("metrics after the kill are not those of the run that was never killed")
        if told["largest_weight_difference"] != 0:
            failed.append(f"weights differ by up to {told['largest_weight_difference']:.2g}")
    return {**told, "failed": failed}


def _audio(out: Path, *, small: bool) -> Path:
    """The demo corpus; for the small form a dozen clips of the languages that have most."""
    corpus = ROOT / "demo_corpus"
    if not small:
        return corpus
    for language in ("spa", "fra", "rus"):
        for clip in sorted(path for path in (corpus / language).rglob("*") if path.is_file())[:24]:
            copy = out / "audio" / clip.relative_to(corpus)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(clip, copy)
    return out / "audio"


def _remove(*workdirs: Path) -> None:
    """What another device, jax or driver left there would be gone on from, and shown."""
    for workdir in workdirs:
        shutil.rmtree(workdir, ignore_errors=True)


def _train(workdir: Path, audio: Path, *, steps: int, small: bool, kill_after: int = 0, **environment: str):
    """Prepares and trains in processes of their own; kills with -9 after `kill_after` lines of metrics, if given."""
    corpus = workdir.parent / ("corpus-small" if small else "corpus")
    if not (corpus / "manifest.arrow").exists():
        prepared = [sys.executable, "-m", "data_pipelines", "prepare", str(audio), "--out", str(corpus)]
        subprocess.run(prepared, cwd=ROOT, check=True, capture_output=True)
    every = max(steps // 30, 1)
    command = [sys.executable, "-m", "experiments", "train", STAGES[small], "--size", "demo", "--workdir", str(workdir),
               "--corpus", str(corpus), "--loop.steps", str(steps), "--loop.log-every", str(every),
               "--loop.save-every", str(every)]  # fmt: skip
    if small:
        command += ["--data.seconds-per-step", "16", "--learner.encoder.layers", "1"]
    env = {**os.environ, "TQDM_DISABLE": "1", **environment}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while kill_after and process.poll() is None:
        if len(_lines(workdir, small)) > kill_after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    _, said = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, "", said)


def _lines(workdir: Path, small: bool) -> list[dict]:
    from wavlab_jax.metrics import JSON_LINES, read_lines

    return list(read_lines(workdir / "stages" / STAGES[small] / JSON_LINES))


def _weights_differ(one: Path, other: Path, small: bool) -> float:
    import jax
    import numpy as np

    jax.config.update("jax_platforms", "cpu")
    from experiments.trained import load_model
    from wavlab_jax.model import parameters
    from wavlab_jax.sharding import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    pair = [jax.tree.leaves(parameters(load_model(workdir, STAGES[small], mesh))) for workdir in (one, other)]
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(*pair, strict=True))
