"""Forward throughput beside transformers, in one process: the same weights, audio, threads and allocator settings.

    PYTHONPATH=. .venv/bin/python benchmarks/forward_throughput.py \
        [--models hubert_base wavlm_base_plus] [--rows 4] [--seconds 10] [--threads 2] [--repeats 9] [--out FILE.json]

Both sides return every hidden state in float32; the largest difference between them is measured first. Then they take
turns, so that a slow phase of the machine meets both; medians count, and the ratio is transformers' time over ours.
transformers runs as it comes (its own choice of attention) under `torch.inference_mode`; ours is `encode`, compiled, on
an encoder with unstacked layers. The process starts itself again with huge pages for the C library's allocator, which
serves both. Needs the test environment (`make test-venv`), 4 GB of memory, and minutes.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.beside import machine, prepare, ratios, take_turns, told
from data_pipelines.atomic import whole_file
from data_pipelines.batch import SAMPLE_RATE


def programs(model, encoder, waveform, *, dtype: str = "float32") -> tuple[Callable, Callable]:
    """Ours and theirs: functions that return every hidden state of `waveform` [rows, samples].

    In bfloat16, matrix products are: ours by the encoder's `compute_dtype`, theirs by PyTorch's autocast.
    """
    import jax
    import torch

    from wavlab_jax.encoder import encode, formulation_for, unstack_layers

    encoder = unstack_layers(encoder)
    encoder.config = dataclasses.replace(encoder.config, compute_dtype=dtype)
    program = jax.jit(lambda encoder, waveform: encode(encoder, waveform, formulation=formulation_for("cpu")).hidden)
    theirs_in = torch.from_numpy(waveform)
    encoder, ours_in = jax.device_put((encoder, waveform))

    def ours():
        return jax.block_until_ready(program(encoder, ours_in))

    def theirs():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            heard = theirs_in
            if encoder.config.normalize_waveform:  # in ours it is the encoder that does it
                heard = torch.nn.functional.layer_norm(heard, heard.shape[1:], eps=encoder.config.waveform_epsilon)
            found = model(heard, output_hidden_states=True)
        return (*found.hidden_states[:-1], found.last_hidden_state)  # see wavlab_jax.encoder.Encoded

    return ours, theirs


def compare(model, encoder, waveform, *, repeats: int, dtype: str = "float32") -> dict[str, Any]:
    """Both models, with the same weights, on `waveform` [rows, samples]: difference, times, ratio."""
    import numpy as np

    ours, theirs = programs(model, encoder, waveform, dtype=dtype)
    started = time.perf_counter()
    hidden = ours()
    compiled = time.perf_counter() - started
    states = theirs()
    difference = max(
        float(np.abs(np.asarray(one, np.float32) - other.float().numpy()).max())
        for one, other in zip(hidden, states, strict=True)
    )
    del hidden, states
    turns = take_turns({"wavlab_jax": ours, "transformers": theirs}, repeats=repeats)
    audio_seconds = waveform.size / SAMPLE_RATE
    return {
        **ratios(turns["wavlab_jax"], turns["transformers"]),
        "dtype": dtype,
        "largest_difference": difference,
        "compile_and_first_seconds": round(compiled, 1),
        "attention_of_transformers": model.config._attn_implementation,
        **{name: turn.summary(audio_seconds) for name, turn in turns.items()},
    }


def pair_of(name: str, cfg=None):
    """A model of transformers with its initial weights, and the encoder with the same; `cfg` in place of the name's."""
    import transformers

    from wavlab_jax.convert import import_huggingface
    from wavlab_jax.convert.settings import huggingface_config
    from wavlab_jax.encoder.architectures import architecture

    cfg = cfg or architecture(name)
    config = transformers.AutoConfig.for_model(**huggingface_config(cfg))
    model = transformers.AutoModel.from_config(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, import_huggingface(folder, normalize_waveform=cfg.normalize_waveform)


def main() -> None:
    """Measures each model, prints a line each, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    both = ["hubert_base", "wavlm_base_plus"]
    parser.add_argument("--models", nargs="+", default=both, help="names of architectures")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prepare(arguments.threads)

    import numpy as np

    samples = round(arguments.seconds * SAMPLE_RATE)
    waveform = (0.1 * np.random.default_rng(0).standard_normal((arguments.rows, samples))).astype(np.float32)
    result = machine(arguments.threads) | {"rows": arguments.rows, "seconds": arguments.seconds, "models": {}}
    print(f"{result['processor']}, {result['cores']} cores, {result['threads']} threads, load {os.getloadavg()[0]:.1f}")
    for name in arguments.models:
        found = compare(*pair_of(name), waveform, repeats=arguments.repeats)
        result["models"][name] = found
        said = f"largest difference {found['largest_difference']:.1e}"
        print(f"{told(name, 'transformers', found)}; {said}", flush=True)
    if arguments.out:
        with whole_file(arguments.out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        print(arguments.out)


if __name__ == "__main__":
    main()
