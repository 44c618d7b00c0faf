"""One update, and one evaluation: the only `jax.jit` with shardings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines.batch import Batch
from wavlab_jax.encoder import EncoderConfig, formulation_for
from wavlab_jax.metrics import Sums
from wavlab_jax.model import HeadConfig, assemble, make_model, parameters
from wavlab_jax.objective import ObjectiveConfig, denominators, draw_masks, loss_of, predict, sums_of
from wavlab_jax.optim import OptimizerConfig, learning_rate, make_optimizer
from wavlab_jax.sharding import BATCH_AXES, state_shardings
from wavlab_jax.state import TrainState, fresh_state


@dataclass(frozen=True)
class LearnerConfig:
    """What a step computes: architecture, objective, optimizer, and the seed of masks and dropout."""

    encoder: EncoderConfig
    head: HeadConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    seed: int = 0


class StepResult(NamedTuple):
    """What a step reports, replicated on every device.

    Attributes:
        sums: terms of the loss and accuracies over the whole step.
        loss: [] float32, the scalar that was minimised.
        gradient_norm: [] float32, before clipping.
        learning_rate: [] float32.
        finite: [] bool; where False the parameters and the optimizer were left as they were.
    """

    sums: Sums
    loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    finite: jax.Array


def abstract_state(cfg: LearnerConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the training state, without allocating it."""
    optimizer = make_optimizer(cfg.optimizer)
    shapes = jax.eval_shape(lambda: _initial_state(cfg, optimizer))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, optimizer, mesh),
    )


def initial_state(cfg: LearnerConfig, mesh: Mesh) -> TrainState:
    """A fresh state, made in place on its devices; the same numbers on every mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
    return jax.jit(lambda: _initial_state(cfg, make_optimizer(cfg.optimizer)), out_shardings=shardings)()


def _initial_state(cfg: LearnerConfig, optimizer: optax.GradientTransformation) -> TrainState:
    model = make_model(jax.random.key(cfg.seed), cfg.encoder, cfg.head)
    return fresh_state(parameters(model), optimizer)


def make_train_step(cfg: LearnerConfig, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, StepResult]]:
    """The jitted update. Takes a placed batch [passes, rows, ...] (`sharding.place_batch`); donates the state.

    Gradients of the passes add up to those of the whole step, because every term is divided by the whole step's count.
    """
    optimizer = make_optimizer(cfg.optimizer)
    schedule = learning_rate(cfg.optimizer)
    formulation = formulation_for(mesh.devices.flat[0].platform)
    channels = cfg.encoder.extractor_channels[-1]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepResult]:
        # a stream of its own: the first key of the seed made the initial values
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), 1), state.step)
        mask_key, dropout_key = jax.random.split(key)
        masks = jax.vmap(lambda rows: draw_masks(rows, mask_key, cfg.objective))(batch)
        denominator = jax.tree.map(
            lambda counts: jnp.sum(counts, axis=0),
            jax.vmap(lambda rows, mask: denominators(rows, mask, channels=channels))(batch, masks),
        )

        def loss(params, rows, mask):
            model = assemble(params, cfg.encoder, cfg.head)
            predicted = predict(
                model, rows, mask, key=dropout_key, cfg=cfg.objective, padded=False, formulation=formulation
            )
            sums = sums_of(predicted, rows, mask)
            return loss_of(sums, denominator, cfg.objective), sums

        gradient_of = jax.grad(loss, has_aux=True)
        first = jax.tree.map(lambda x: x[0], (batch, masks))
        gradient, sums = gradient_of(state.params, *first)
        if batch.waveform.shape[0] > 1:

            def accumulate(total, rows_and_mask):
                return jax.tree.map(jnp.add, total, gradient_of(state.params, *rows_and_mask)), None

            rest = jax.tree.map(lambda x: x[1:], (batch, masks))
            (gradient, sums), _ = lax.scan(accumulate, (gradient, sums), rest)

        value = loss_of(sums, denominator, cfg.objective)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.params)
        updated = TrainState(state.step + 1, optax.apply_updates(state.params, updates), new_optimizer)
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        return new_state, StepResult(sums, value, norm, rate, finite)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, BATCH_AXES))
    return jax.jit(train_step, in_shardings=(shardings, rows), out_shardings=(shardings, everywhere), donate_argnums=0)


class Judged(NamedTuple):
    """An evaluated batch: which frames were hidden and what was predicted, both [rows, frames]; loss [rows, frames]."""

    mask: jax.Array
    predicted: jax.Array
    loss: jax.Array


def make_predict_step(cfg: LearnerConfig, mesh: Mesh) -> Callable[..., Judged]:
    """The jitted prediction of hidden units on padded rows, without dropout: (params, placed batch) -> Judged.

    Masks come from each row's seed and the configured seed, so all models of one seed are asked the same frames.
    `loss` is in nats, at every frame (meaningful where the batch has a unit).
    """
    formulation = formulation_for(mesh.devices.flat[0].platform)

    def predict_step(params, batch: Batch) -> Judged:
        rows = jax.tree.map(lambda x: x[0], batch)
        mask = draw_masks(rows, jax.random.key(cfg.seed), cfg.objective)
        model = assemble(params, cfg.encoder, cfg.head)
        logits = predict(model, rows, mask, key=None, cfg=cfg.objective, padded=True, formulation=formulation).logits
        chosen = jnp.maximum(rows.units[..., :1], 0)
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]
        return Judged(mask, jnp.argmax(logits, axis=-1), loss)

    params = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh).params)
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, BATCH_AXES))
    return jax.jit(predict_step, in_shardings=(params, rows), out_shardings=everywhere)
