"""A run of twelve steps of the loop, on one device, with checkpoints and metrics: what its tests start and stop."""

import dataclasses
import functools

import jax
import numpy as np

from tests.wavlab_jax import tiny
from wavlab_jax.checkpoint import Checkpoints, start
from wavlab_jax.clock import TIMES
from wavlab_jax.metrics import MetricsWriter, read_lines
from wavlab_jax.sharding import MeshConfig, make_mesh, place_batch
from wavlab_jax.step import abstract_state, initial_state, make_train_step
from wavlab_jax.train import LoopConfig, Probes, train

CFG = tiny.learner(dropout=0.1, layerdrop=0.1)
LOOP = LoopConfig(steps=12, log_every=3, save_every=4, keep=2)
DATA = {"digest": "of the batches"}
ABOUT = {"versions": {"jax": jax.__version__}}
KEEPING = dataclasses.replace(LOOP, keep=9)
LANGUAGES = ("aaa", "bbb", "ccc")


def batches(first):
    k = first
    while True:
        yield tiny.batch(4, seed=k)._replace(language=np.array([k % 3, 1, 1, k % 2], np.int32))
        k += 1


@functools.cache
def made():
    """Mesh, step and initial values, compiled once for all runs."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    return mesh, make_train_step(CFG, mesh, languages=len(LANGUAGES)), jax.device_get(initial_state(CFG, mesh))


def run(folder, *, loop=LOOP, stream=batches, judge=None, validate=None):
    mesh, step, initial = made()
    checkpoints = Checkpoints(folder / "checkpoints", keep=loop.keep, data=DATA, about=ABOUT)
    like = abstract_state(CFG, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    restored = start(checkpoints, like=like, fresh=lambda: jax.device_put(initial, shardings))
    first = int(restored.state.step)
    own = checkpoints.latest() is not None
    writer = MetricsWriter(folder, resume_step=first if own else -1)
    try:
        state = train(
            restored.state,
            step,
            stream(first),
            place=lambda batch: place_batch(batch, mesh=mesh, passes=1),
            describe=lambda batch: [f"row {i}: clip {u}" for i, u in enumerate(batch.utterance)],
            checkpoints=checkpoints,
            writer=writer,
            folder=folder,
            cfg=loop,
            record=restored.record,
            title="test",
            languages=LANGUAGES,
            probes=judge and Probes(5, not own, judge),
            validate=validate,
        )
    finally:
        writer.close()
        checkpoints.close()
    return jax.device_get(state)


def lines_of(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_lines(folder / "metrics.jsonl")]


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
