"""The parts of benchmarks/accelerator_check.py; each returns what it measured and, as "failed", what did not hold.

Each runs in a process of its own: a GPU's memory is then free for the next one, and an XLA that aborts ends one part.
"""

import dataclasses
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.accelerator_runs import resume, train

# Norm of a difference over that of what is compared with: another order of summation; 2 ** -8 a rounding of bfloat16.
FLOAT32, FLOAT32_GRADIENT, BFLOAT16, BFLOAT16_GRADIENT = 1e-4, 1e-3, 0.03, 0.15
STEP_LOSS, STEP_NORM, STEP_WEIGHTS = 1e-5, 1e-3, 2e-4  # as tests/wavlab_jax/test_step.py; the last one is absolute
HELD = 1.25  # of the planned memory
STEADY = 5  # steps before any is timed


def machine(out: Path, *, small: bool) -> dict:
    """Devices, versions, driver."""
    import jax

    from wavlab_jax.chips import chip_of

    device = jax.devices()[0]
    versions = {}
    for name in ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin",
                 "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13"):  # fmt: skip
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    driver = shutil.which("nvidia-smi") and subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
        capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    chip = chip_of(device)
    return {
        "platform": device.platform,
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "runtime": " ".join(str(getattr(device.client, "platform_version", "")).split()),
        "driver": driver or "",
        "chip": chip and chip.name,
        "peak_bfloat16_tflops": chip and chip.peak_flops / 1e12,
        "memory": {k: v for k, v in (device.memory_stats() or {}).items() if k in ("bytes_limit", "bytes_in_use")},
        "python": platform.python_version(),
        "versions": versions,
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("XLA_", "JAX_", "NCCL_", "LIBTPU_"))},
        "failed": [] if chip or device.platform == "cpu" else [f"{device.device_kind} is not in wavlab_jax/chips.py"],
    }


def encoders(out: Path, *, small: bool) -> dict:
    """Every hidden state and the gradient of small encoders against the CPU's, which the test suite holds to PyTorch's.

    On a machine without an accelerator the accelerators' formulations run on the CPU.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from wavlab_jax.encoder import EncoderConfig, encode, formulation_for, make_encoder

    jax.config.update("jax_default_matmul_precision", "highest")
    size = _size(small)
    kinds = {
        "HuBERT Base": {},
        "HuBERT Large": dict(extractor_norm="layer", pre_norm=True, normalize_waveform=True),
        "WavLM Base": dict(relative_bias=True),
    }
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    here = "gpu" if device.platform == "cpu" else device.platform
    waveform = np.random.default_rng(0).normal(scale=0.1, size=(2, 16_000 if small else 64_000)).astype(np.float32)

    def both(cfg, formulation) -> Callable:
        def loss(encoder, waveform):
            hidden = encode(encoder, waveform, formulation=formulation).hidden
            return sum(jnp.mean(jnp.square(h.astype(jnp.float32) - 0.1)) for h in hidden), hidden

        return jax.jit(jax.grad(loss, has_aux=True))

    rows, failed = [], []
    for kind, changes in kinds.items():
        cfg = EncoderConfig(**size, **changes)
        with jax.default_device(cpu):
            encoder = jax.device_put(make_encoder(jax.random.key(0), cfg), cpu)
        expected = _leaves(both(cfg, formulation_for("cpu"))(encoder, jax.device_put(waveform, cpu)))
        for dtype, bounds in (
            ("float32", (FLOAT32, FLOAT32_GRADIENT)), ("bfloat16", (BFLOAT16, BFLOAT16_GRADIENT))):  # fmt: skip
            computed = dataclasses.replace(cfg, compute_dtype=dtype)
            there = jax.device_put(encoder, device)
            there.config = computed
            found = _leaves(both(computed, formulation_for(here))(there, jax.device_put(waveform, device)))
            hidden = max(_relative(a, b) for a, b in zip(found[1], expected[1], strict=True))
            gradient = _relative(np.concatenate(found[0]), np.concatenate(expected[0]))
            rows.append({"encoder": kind, "dtype": dtype, "hidden": hidden, "gradient": gradient, "bounds": bounds})
            if not (hidden <= bounds[0] and gradient <= bounds[1]):
                failed.append(f"{kind} in {dtype}: hidden states differ by {hidden:.2g}, gradients by {gradient:.2g}")
    return {"device": str(device), "spelled_for": here, "rows": rows, "failed": failed}


def meshes(out: Path, *, small: bool) -> dict:
    """Two updates with dropout on every mesh that the devices at hand make, and in passes, against one device."""
    import jax
    import numpy as np

    from wavlab_jax.sharding import MeshConfig, make_mesh, place_batch
    from wavlab_jax.step import initial_state, make_train_step

    jax.config.update("jax_default_matmul_precision", "highest")
    cfg = _small_learner(small=small)
    count = jax.device_count()
    layouts = [(1, 1, 1), (1, 1, 2), *((count, fsdp, 1) for fsdp in (1, 2, 4, 8) if count > 1 and count % fsdp == 0)]
    rows, failed, expected = [], [], None
    for devices, fsdp, passes in layouts[:3] if small else layouts:
        mesh = make_mesh(MeshConfig(fsdp=fsdp), devices=jax.devices()[:devices])
        state, step = initial_state(cfg, mesh), make_train_step(cfg, mesh, languages=3)
        for number in range(2):
            batch = random_batch(8, 16_000, seed=number)
            state, result = step(state, place_batch(batch, mesh=mesh, passes=passes))
        found = jax.device_get((result.loss, result.gradient_norm, jax.tree.leaves(state.params)))
        expected = expected or found
        loss, norm = (abs(float(a) / float(b) - 1) for a, b in zip(found[:2], expected[:2], strict=True))
        weights = max(float(np.abs(a - b).max()) for a, b in zip(found[2], expected[2], strict=True))
        name = f"data {devices // fsdp}, fsdp {fsdp}, {passes} pass{'es' * (passes > 1)}"
        rows.append({"layout": name, "loss": loss, "gradient_norm": norm, "largest_weight_difference": weights})
        if not (loss <= STEP_LOSS and norm <= STEP_NORM and weights <= STEP_WEIGHTS):
            failed.append(f"{name}: loss off by {loss:.2g}, gradient norm by {norm:.2g}, a weight by {weights:.2g}")
    return {"rows": rows, "failed": failed}


def attention(out: Path, *, small: bool) -> dict:
    """cuDNN's attention beside XLA's: forward and gradients; no bias, one for all rows, and one a row as WavLM has it.

    What cuDNN refuses is told, not counted as a failure: the encoder does not use it. Known of jax 0.10: no float32;
    gradients with a bias for even numbers of frames only; gradients of the bias for a single row only (jax-ml/jax issue
    30593); a float32 bias gives NaN (issue 32242).
    """
    import jax
    import jax.numpy as jnp

    shapes = [(2, 50, 2, 16)] if small else [(8, 500, 12, 64), (4, 750, 16, 64)]
    rows, failed = [], []
    for batch, frames, heads, size in shapes:
        keys = jax.random.split(jax.random.key(0), 5)
        query, key, value, weight = (
            jax.random.normal(k, (batch, frames, heads, size), jnp.bfloat16) for k in keys[:4]
        )  # fmt: skip
        biases = {"none": None, "shared": (1, heads, frames, frames), "a row's own": (batch, heads, frames, frames)}
        for name, shape in biases.items():
            bias = None if shape is None else jax.random.normal(keys[4], shape, jnp.bfloat16)
            for gradient in (False, True):
                row = {"shape": f"{batch} x {frames} x {heads} x {size}", "bias": name, "gradient": gradient}
                found = {}
                for implementation in ("xla", "cudnn"):
                    program = _attend(implementation, weight, gradient=gradient, biased=bias is not None)
                    try:
                        found[implementation] = jax.block_until_ready(program(query, key, value, bias))
                    except Exception as error:  # of what it cannot do, cuDNN's wrapper tells by several classes
                        row[implementation] = f"refused: {str(error).splitlines()[0][:160]}"
                        continue
                    seconds = _median_seconds(program, query, key, value, bias, repeats=3 if small else 30)
                    row[f"{implementation}_ms"] = 1e3 * seconds
                if len(found) == 2:
                    pairs = zip(_leaves(found["cudnn"]), _leaves(found["xla"]), strict=True)
                    row["difference"] = max(_relative(a, b) for a, b in pairs)
                    if not row["difference"] <= BFLOAT16:
                        failed.append(f"cuDNN's attention, {row['bias']} bias, differs by {row['difference']:.2g}")
                rows.append(row)
    return {"rows": rows, "failed": failed}


def _attend(implementation: str, weight, *, gradient: bool, biased: bool) -> Callable:
    import jax
    import jax.numpy as jnp

    def attend(query, key, value, bias):
        return jax.nn.dot_product_attention(query, key, value, bias=bias, implementation=implementation)

    def loss(*given):
        return jnp.sum(attend(*given).astype(jnp.float32) * weight)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3) if biased else (0, 1, 2)) if gradient else attend)


def nonfinite(out: Path, *, small: bool) -> dict:
    """Of three updates the second hears an infinite sample: it says so and changes neither weights nor moments."""
    import jax
    import numpy as np

    from wavlab_jax.sharding import MeshConfig, make_mesh, place_batch
    from wavlab_jax.skipped import first_place
    from wavlab_jax.step import initial_state, make_train_step

    cfg, mesh = _small_learner(small=small), make_mesh(MeshConfig())
    state, step = initial_state(cfg, mesh), make_train_step(cfg, mesh, languages=3)
    held, results = [], []
    for number in range(3):
        batch = random_batch(2 * mesh.size, 16_000, seed=number)
        if number == 1:
            batch.waveform[0, 5] = np.inf
        state, result = step(state, place_batch(batch, mesh=mesh, passes=1))
        leaves = jax.tree.leaves(jax.device_get((state.params, state.optimizer)))
        held.append([leaf for leaf in leaves if leaf.ndim])  # the schedule's position moves on
        results.append(jax.device_get(result))
    same = [all(map(np.array_equal, *pair)) for pair in (held[:2], held[1:])]
    finite = [bool(result.finite) for result in results]
    failed = [] if finite == [True, False, True] else [f"of three updates the second is not finite; found {finite}"]
    if same != [True, False] or not all(np.isfinite(leaf).all() for leaf in held[2]):
        failed.append(f"weights and moments stay, then move, and are finite; unchanged: {same}")
    return {"finite": finite, "unchanged": same, "where": first_place(results[1]), "failed": failed}


def memory(out: Path, *, small: bool) -> dict:
    """HuBERT Base's update in bfloat16: what its compiled program says it takes, beside the most that was held of it.

    A process of its own, for the largest is that since its start. Other spellings may be tried while compiling, and
    blocks are rounded up: `HELD` times the plan is a failure. A CPU does not tell what it held.
    """
    import jax

    from experiments.stages import stage_function
    from wavlab_jax.clock import device_memory
    from wavlab_jax.sharding import make_mesh, place_batch, place_flag
    from wavlab_jax.step import initial_state, make_train_step

    stage = stage_function("hubert_base_it1")()
    mesh = make_mesh(stage.mesh)
    learner = _small_learner(small=True) if small else stage.learner
    if not small:
        learner = dataclasses.replace(learner, encoder=dataclasses.replace(learner.encoder, compute_dtype="bfloat16"))
    samples, rows = (16_000, 2 * mesh.size) if small else (240_000, 6 * mesh.size)
    step, state = make_train_step(learner, mesh), initial_state(learner, mesh)
    placed = place_batch(random_batch(rows, samples, seed=0), mesh=mesh, passes=1)
    program = step.lower(state, placed).compile()
    said = program.memory_analysis()
    parts = {
        "arguments": said.argument_size_in_bytes,
        "outputs": max(said.output_size_in_bytes - said.alias_size_in_bytes, 0),
        "temporaries": said.temp_size_in_bytes,
        "program": said.generated_code_size_in_bytes,
    }
    planned = sum(parts.values())
    for _ in range(2):
        state, _ = jax.block_until_ready(program(state, placed, place_flag(0, mesh=mesh), step.frozen))
    held = device_memory()
    failed = [] if held is None or held <= HELD * planned else [f"{held / planned:.2f} times what was planned was held"]
    row = {f"{part}_gb": size / 1e9 for part, size in parts.items()}
    row |= {"planned_gb": planned / 1e9, "held_gb": held and held / 1e9, "held_over_planned": held and held / planned}
    return {"rows": [row], "told": held is not None, "failed": failed}


def speed(out: Path, *, small: bool) -> dict:
    """HuBERT Base's whole update over random audio: steps a second, utilisation by formula, memory."""
    import jax

    from experiments.stages import stage_function
    from wavlab_jax.chips import chip_of
    from wavlab_jax.clock import device_memory
    from wavlab_jax.flops import row_flops
    from wavlab_jax.sharding import make_mesh, place_batch
    from wavlab_jax.step import initial_state, make_train_step

    stage = stage_function("hubert_base_it1")()
    chip, rows_out, failed = chip_of(jax.devices()[0]), [], []
    for dtype in ("float32",) if small else ("bfloat16", "float32"):
        learner = _small_learner(small=True) if small else stage.learner
        learner = dataclasses.replace(learner, encoder=dataclasses.replace(learner.encoder, compute_dtype=dtype))
        mesh = make_mesh(stage.mesh)
        samples, rows = (16_000, 2 * mesh.size) if small else (240_000, 6 * mesh.size)  # 90 s a device
        began = time.perf_counter()
        state, step = initial_state(learner, mesh), make_train_step(learner, mesh)
        placed = place_batch(random_batch(rows, samples, seed=0), mesh=mesh, passes=1)
        state, _ = jax.block_until_ready(step(state, placed))
        first = time.perf_counter() - began
        times = []
        for number in range(STEADY + (3 if small else 20)):
            began = time.perf_counter()
            state, result = jax.block_until_ready(step(state, placed))
            times += [time.perf_counter() - began] * (number >= STEADY)
        seconds = statistics.median(times)
        operations = rows * row_flops(learner.encoder, learner.head, samples=samples).training
        rate = operations / seconds / mesh.size
        memory = device_memory()
        row = {
            "model": "a small one" if small else "HuBERT Base", "dtype": dtype, "rows": rows,
            "seconds_a_row": samples / 16_000, "first_step_s": first, "step_s": seconds,
            "audio_s_per_s": rows * samples / 16_000 / seconds, "tflops_a_device": rate / 1e12,
            "mfu": chip and rate / chip.peak_flops, "memory_gb": memory and memory / 1e9,
        }  # fmt: skip
        rows_out.append(row)
        if not bool(result.finite):
            failed.append(f"{dtype}: a step was not finite")
    return {"rows": rows_out, "failed": failed}


SECTIONS: dict[str, Callable] = {f.__name__: f for f in (
    machine, encoders, meshes, nonfinite, attention, train, resume, memory, speed)}  # fmt: skip


def random_batch(rows: int, samples: int, *, seed: int):
    """Noise with random units of 100."""
    import numpy as np

    from data_pipelines.batch import Batch, num_frames

    rng, frames = np.random.default_rng(seed), num_frames(samples)
    nobody = np.full(rows, -1, np.int32)
    return Batch(
        waveform=rng.normal(scale=0.1, size=(rows, samples)).astype(np.float32),
        clean=np.zeros((rows, 0), np.float32), units=rng.integers(0, 100, (rows, frames, 1)).astype(np.int32),
        valid=np.ones((rows, frames), bool), samples=np.full(rows, samples, np.int32),
        language=np.arange(rows, dtype=np.int32) % 3, utterance=nobody, partner=nobody,
        start=np.zeros(rows, np.int32), seed=rng.integers(0, 2**32, rows, dtype=np.uint32),
    )  # fmt: skip


def _size(small: bool) -> dict:
    """Of encoders that compile in seconds; the small ones have two convolutions that make the same frames."""
    if small:
        extractor = dict(extractor_channels=(32, 32), extractor_kernels=(16, 25), extractor_strides=(16, 20))
        return dict(width=64, layers=2, heads=4, feed_forward=128, position_kernel=16, position_groups=4, **extractor)
    return dict(width=256, layers=4, heads=4, feed_forward=1024, extractor_channels=(128,) * 7)


def _small_learner(*, small: bool):
    from experiments.stages import stage_function

    learner = stage_function("hubert_base_it1", size="demo")().learner
    encoder = dataclasses.replace(learner.encoder, **_size(small), layerdrop=0.2, compute_dtype="float32")
    return dataclasses.replace(learner, encoder=encoder)


def _leaves(tree):
    """(gradients, hidden states) or any other tree as flat float32 arrays of each part."""
    import jax
    import numpy as np

    if isinstance(tree, tuple) and len(tree) == 2 and not hasattr(tree[0], "dtype"):
        return tuple(_leaves(part) for part in tree)
    return [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(tree)]


def _relative(found, expected) -> float:
    import numpy as np

    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def _median_seconds(call: Callable, *given, repeats: int) -> float:
    import jax

    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call(*given))
        times.append(time.perf_counter() - began)
    return statistics.median(times)
