"""A training batch of ML-SUPERB's downstream model on a frozen encoder, beside PyTorch with an encoder of transformers.

    PYTHONPATH=. .venv/bin/python benchmarks/downstream_step.py [--model hubert_base] [--rows 8] [--seconds 5] \
        [--only dropout plain] [--tokens 5000] [--threads 2] [--repeats 5] [--out FILE.json]

What is measured is a batch as `python -m experiments superb` trains on it, four of which make an update of Adam: all
hidden states of the encoder, weighted sum, SpecAugment, downstream model, CTC, gradient. Ours is that command's own
step, with all that a run measures of itself. Theirs is transformers' model under `torch.no_grad` with `sdpa`, and
benchmarks/downstream_peer.py, with equal weights and the fused Adam. Float32; rows are as long as their batch, so that
theirs needs no masks of padding, which ours computes all the same.

Two encoders: with its published dropout ("dropout"), which ESPnet leaves on in frozen ones, and without any ("plain"),
as in models that were published so. First the two losses without dropout and SpecAugment are compared, which must agree
to 1e-4 of their size; then both take turns, and the ratio is their median time over ours.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.beside import machine, prepare, ratios, take_turns, told
from data_pipelines.atomic import whole_file
from data_pipelines.batch import SAMPLE_RATE, Batch, num_frames

LABELS_PER_SECOND = 12  # characters, about as many as are spoken
AGREEMENT = 1e-4  # of the losses, relative
RATES = ("dropout", "attention_dropout", "activation_dropout", "projection_dropout")


class Case(NamedTuple):
    """What is measured: an encoder by name, with its dropout or without; rows of so many seconds; the outputs."""

    model: str
    dropout: bool
    rows: int
    seconds: float
    tokens: int

    def encoder(self):
        """Its configuration as `superb` has it: without layerdrop."""
        from wavlab_jax.encoder.architectures import architecture

        rates = {} if self.dropout else dict.fromkeys(RATES, 0.0)
        return replace(architecture(self.model), layerdrop=0.0, **rates)

    def batch(self) -> Batch:
        """Noise, and random tokens."""
        import numpy as np

        rng, samples = np.random.default_rng(0), round(self.seconds * SAMPLE_RATE)
        frames, labels = num_frames(samples), round(self.seconds * LABELS_PER_SECOND)
        units = np.full((self.rows, frames, 1), -1, np.int32)
        units[:, :labels, 0] = rng.integers(2, self.tokens - 1, (self.rows, labels))
        count = np.arange(self.rows, dtype=np.int32)
        return Batch(
            waveform=rng.normal(scale=0.1, size=(self.rows, samples)).astype(np.float32),
            clean=np.zeros((self.rows, 0), np.float32),
            units=units,
            valid=np.ones((self.rows, frames), bool),
            samples=np.full(self.rows, samples, np.int32),
            language=0 * count,
            utterance=count,
            partner=0 * count - 1,
            start=0 * count,
            seed=count.astype(np.uint32),
        )


class Side(NamedTuple):
    """A call of `run` is one batch, done when it returns; `loss` is that without dropout, before any."""

    run: Any
    loss: float


def our_side(case: Case, encoder, batch: Batch) -> tuple[Side, Any]:
    """`superb`'s own step on these parameters of the encoder, and the initial ones of the head."""
    import jax

    from data_pipelines.mlsuperb.tracks import Track
    from experiments.mlsuperb.encoders import FrozenEncoder
    from experiments.mlsuperb.protocol import ProtocolConfig
    from experiments.mlsuperb.training import Run
    from wavlab_jax.model import parameters
    from wavlab_jax.sharding import MeshConfig, make_mesh, parameter_shardings, place_batch
    from wavlab_jax.step import initial_state

    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    params = {"encoder": parameters(encoder)}
    params = jax.device_put(params, parameter_shardings(params, mesh))["encoder"]
    tokens = [str(token) for token in range(case.tokens)]
    track = Track("multilingual", "multilingual", "10min", {"train": []}, {}, tokens, [], "character")
    frozen = FrozenEncoder(case.model, "random", case.model, case.encoder(), params)
    run = Run(track, frozen, ProtocolConfig(), mesh, files=None)
    steps, kept = run.steps(), [initial_state(run.learner, mesh)]
    placed = place_batch(batch, mesh=mesh, passes=1)
    head = jax.device_get(kept[0].params["head"])
    quiet = jax.device_get(steps.validate(kept[0].params, placed)["ctc_loss"])

    def train() -> float:
        kept[0], result = steps.train(kept[0], placed)
        jax.block_until_ready(kept[0])
        return float(result.loss)

    return Side(train, float(quiet.total / quiet.weight)), head


def their_side(case: Case, model, head, batch: Batch) -> Side:
    """The same in PyTorch, with the same values."""
    import torch

    from benchmarks.downstream_peer import Downstream, Training
    from experiments.mlsuperb.protocol import ProtocolConfig, optimizer_of
    from wavlab_jax.downstream import DownstreamConfig
    from wavlab_jax.model import count

    cfg = case.encoder()
    peer = Downstream(DownstreamConfig(tokens=case.tokens), hidden=cfg.layers + 1, inputs=cfg.width)
    peer.take_over(head)
    assert sum(map(torch.numel, peer.parameters())) == count(head)
    waveform = batch.waveform
    if cfg.normalize_waveform:
        waveform = torch.nn.functional.layer_norm(torch.from_numpy(waveform), waveform.shape[1:]).numpy()
    labels = batch.units[:, : round(case.seconds * LABELS_PER_SECOND), 0]
    training = Training(model.eval(), peer.eval(), optimizer_of(ProtocolConfig()), waveform, labels)
    with torch.no_grad():
        quiet = float(training.loss())
    model.train()
    peer.train()
    return Side(training, quiet)


def measure(case: Case, *, repeats: int) -> dict[str, Any]:
    """Losses, then turns after a batch each that is not counted (it compiles)."""
    from benchmarks.forward_throughput import pair_of
    from wavlab_jax.model import count

    batch = case.batch()
    model, encoder = pair_of(case.model, case.encoder())
    ours, head = our_side(case, encoder, batch)
    theirs = their_side(case, model, head, batch)
    if abs(ours.loss - theirs.loss) > AGREEMENT * abs(theirs.loss):
        raise SystemExit(f"the two models differ: losses {ours.loss} and {theirs.loss}")
    sides = {"wavlab_jax": ours.run, "pytorch": theirs.run}
    for run in sides.values():
        run()
    turns = take_turns(sides, repeats=repeats)
    return {
        **ratios(turns["wavlab_jax"], turns["pytorch"]),
        "losses_without_dropout": {"wavlab_jax": ours.loss, "pytorch": theirs.loss},
        "downstream_parameters": count(head),
        "attention_of_transformers": model.config._attn_implementation,
        **{name: turn.summary(case.rows * case.seconds) for name, turn in turns.items()},
    }


def main() -> None:
    """Measures both encoders, prints a line each, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hubert_base", help="name of an architecture")
    parser.add_argument("--only", nargs="+", default=["dropout", "plain"], choices=["dropout", "plain"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row")
    parser.add_argument("--tokens", type=int, default=5_000, help="outputs of the downstream model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prepare(arguments.threads)

    result = machine(arguments.threads) | {"model": arguments.model, "rows": arguments.rows, "encoders": {}}
    print(f"{result['processor']}, {result['cores']} cores, {result['threads']} threads, load {os.getloadavg()[0]:.1f}")
    for name in arguments.only:
        case = Case(arguments.model, name == "dropout", arguments.rows, arguments.seconds, arguments.tokens)
        found = result["encoders"][name] = measure(case, repeats=arguments.repeats)
        print(told(f"{case.model}, {name}, {case.rows} x {case.seconds:g} s", "pytorch", found), flush=True)
    if arguments.out:
        with whole_file(arguments.out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        print(arguments.out)


if __name__ == "__main__":
    main()
