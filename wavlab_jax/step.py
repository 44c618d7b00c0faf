"""One update, and one evaluation: the only `jax.jit` with shardings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines.batch import Batch
from wavlab_jax.encoder import EncoderConfig, Formulation, formulation_for
from wavlab_jax.heads import AnyHeadConfig
from wavlab_jax.health import combine, combine_copies, mask_coverage, observe, update_sums
from wavlab_jax.metrics import Sums
from wavlab_jax.model import assemble, make_model, parameters
from wavlab_jax.objectives import AnyObjectiveConfig, Judged, Keys, check_head, draw_masks, loss_of, objective_of
from wavlab_jax.optim import OptimizerConfig, at_step, learning_rate, make_optimizer
from wavlab_jax.sharding import BATCH_AXES, abstract_flag, place_flag, state_shardings
from wavlab_jax.state import TrainState, fresh_state
from wavlab_jax.targets.online import Targets


@dataclass(frozen=True)
class LearnerConfig:
    """What a step computes: architecture, objective, optimizer, and the seed of masks and dropout.

    Raises HeadError if the head is not of the kind that the objective trains.
    """

    encoder: EncoderConfig
    head: AnyHeadConfig
    objective: AnyObjectiveConfig
    optimizer: OptimizerConfig
    seed: int = 0

    def __post_init__(self):
        check_head(self.objective, self.head)


class TrainStep(NamedTuple):
    """The jitted update: call it with a state, which it takes over (donates), a placed batch and a wish.

    Attributes:
        jitted: (state, batch, wishes, frozen arrays of the targets) -> (state, StepResult).
        frozen: those arrays, or their shapes where the step is only to be lowered.
        mesh: that it runs on.
    """

    jitted: Callable
    frozen: Any
    mesh: Mesh

    def __call__(self, state: TrainState, batch: Batch, wish: int = 0) -> tuple[TrainState, "StepResult"]:
        """One update."""
        return self.jitted(state, batch, place_flag(wish, mesh=self.mesh), self.frozen)

    def lower(self, state: TrainState, batch: Batch):
        """The very program that a call would run, for shapes that say where they lie: nothing is allocated."""
        return self.jitted.lower(state, batch, abstract_flag(self.mesh), self.frozen)


class StepResult(NamedTuple):
    """What a step reports, replicated on every device.

    Attributes:
        sums: terms of the loss and accuracies over the whole step.
        loss: [] float32, the scalar that was minimised.
        gradient_norm: [] float32, before clipping.
        learning_rate: [] float32.
        finite: [] bool; where False the parameters and the moments were left as they were, and the step was counted.
        languages, counts, layers, extremes: as `health.Observed` has them.
        updates: squares of updates and weights by group of modules: `health.update_sums`.
        wish: [] int32, the largest `wish` that any process gave with this step.
    """

    sums: Sums
    loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    finite: jax.Array
    languages: Sums
    counts: dict[str, jax.Array]
    layers: Sums
    extremes: dict[str, jax.Array]
    updates: Sums
    wish: jax.Array


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


def make_train_step(
    cfg: LearnerConfig,
    mesh: Mesh,
    targets: Targets | None = None,
    *,
    languages: int = 0,
    formulation: Formulation | None = None,
) -> TrainStep:
    """The jitted update. Takes a placed batch [passes, rows, ...] (`sharding.place_batch`); donates the state.
    Of several processes' wishes, which mean nothing here, each learns the largest: agreement for the price of a scalar
    that travels with the step.

    Gradients of the passes add up to those of the whole step, because every term is divided by the whole step's count.
    `targets` fill in the units that are computed in the step; their arrays are arguments of the compiled program.
    `languages`: how many the manifest has; the first ones are told apart, none by default.
    `formulation` is by default that of the mesh's platform.
    """
    objective = objective_of(cfg.objective)
    coefficients = objective.coefficients(cfg.objective, cfg.head)
    optimizer = make_optimizer(cfg.optimizer)
    schedule = learning_rate(cfg.optimizer)
    formulation = formulation or formulation_for(mesh.devices.flat[0].platform, devices=mesh.size)
    channels = cfg.encoder.extractor_channels[-1]

    def train_step(state: TrainState, batch: Batch, wishes, frozen) -> tuple[TrainState, StepResult]:
        if targets is not None:  # one pass after the other, as they are trained on
            batch = batch._replace(units=lax.map(lambda rows: targets.label(frozen, rows).units, batch))
        # a stream of its own: the first key of the seed made the initial values
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), 1), state.step)
        keys = Keys(*jax.random.split(key))
        masks = jax.vmap(lambda rows: draw_masks(rows, keys.asked, cfg.objective.mask))(batch)
        denominators = jax.tree.map(
            lambda counts: jnp.sum(counts, axis=0),
            jax.vmap(lambda rows, mask: objective.denominators(rows, mask, channels=channels))(batch, masks),
        )

        def loss(params, rows, mask):
            measured = objective.measure(
                assemble(params, cfg.encoder, cfg.head),
                rows,
                mask,
                keys=keys,
                step=state.step,
                cfg=cfg.objective,
                head=cfg.head,
                padded=False,
                formulation=formulation,
            )
            observed = observe(measured, rows, languages=languages, width=cfg.encoder.width)
            return loss_of(observed.sums, denominators, coefficients), observed

        gradient_of = jax.grad(loss, has_aux=True)

        def accumulated(params, rows_and_masks):
            first = gradient_of(params, *jax.tree.map(lambda x: x[0], rows_and_masks))

            def accumulate(total, one_pass):
                gradient, observed = gradient_of(params, *one_pass)
                return (jax.tree.map(jnp.add, total[0], gradient), combine(total[1], observed)), None

            return lax.scan(accumulate, first, jax.tree.map(lambda x: x[1:], rows_and_masks))[0]

        def per_copy(params, rows_and_masks):
            gradient, observed = accumulated(params, rows_and_masks)
            # leaf by leaf: XLA cannot place one exchange of several arrays where another axis is automatic
            return jax.tree.map(lambda x: lax.psum(x, "data"), gradient), combine_copies(observed, "data")

        if batch.waveform.shape[0] == 1:
            gradient, observed = gradient_of(state.params, *jax.tree.map(lambda x: x[0], (batch, masks)))
        elif objective.ADDITIVE and mesh.shape["data"] > 1:  # (XLA refuses a manual axis of one device)
            gradient, observed = jax.shard_map(
                per_copy,
                mesh=mesh,
                in_specs=(P(), P(None, "data")),
                out_specs=P(),
                axis_names={"data"},
                check_vma=False,
            )(state.params, (batch, masks))
        else:
            gradient, observed = accumulated(state.params, (batch, masks))

        value = loss_of(observed.sums, denominators, coefficients)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, new_optimizer = optimizer.update(gradient, state.optimizer, state.params)
        moved = update_sums(updates, state.params)
        if formulation.lean_gradients:
            # Never negative: it only says that all that reads the old state comes before what overwrites it. XLA:CPU
            # would copy the state otherwise, a tenth of a gigabyte for each twenty-five million parameters and moment.
            finite &= sum(jnp.sum(part) for part in jax.tree.leaves(moved)) >= 0.0
        new = (optax.apply_updates(state.params, updates), new_optimizer)
        params, kept = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, (state.params, state.optimizer))
        # the step counts either way: it is the data position, and the schedule goes by it
        new_state = TrainState(state.step + 1, params, at_step(kept, state.step + 1))
        return new_state, StepResult(
            sums={**observed.sums, "mask_coverage": mask_coverage(batch, masks)},
            loss=value,
            gradient_norm=norm,
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            finite=finite,
            languages=observed.languages,
            counts=observed.counts,
            layers=observed.layers,
            extremes=observed.extremes,
            updates=moved,
            wish=jnp.max(wishes),
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
    everywhere, rows = _places(mesh)
    compiled = jax.jit(
        train_step,
        in_shardings=(shardings, rows, NamedSharding(mesh, P(BATCH_AXES)), everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
    return TrainStep(compiled, None if targets is None else targets.frozen, mesh)


def make_predict_step(cfg: LearnerConfig, mesh: Mesh, targets: Targets | None = None) -> Callable[..., Judged]:
    """The jitted judgement of padded rows, without dropout: (params, placed batch) -> Judged.

    Masks come from each row's seed and the configured seed, so all models of one seed are asked the same frames.
    `targets` fill in units as in training.
    """
    objective = objective_of(cfg.objective)
    formulation = formulation_for(mesh.devices.flat[0].platform, devices=mesh.size)

    def predict_step(params, batch: Batch, frozen) -> Judged:
        rows = jax.tree.map(lambda x: x[0], batch)
        if targets is not None:
            rows = targets.label(frozen, rows)
        keys = Keys(asked=jax.random.key(cfg.seed), noise=None)
        mask = draw_masks(rows, keys.asked, cfg.objective.mask)
        model = assemble(params, cfg.encoder, cfg.head)
        return objective.judge(model, rows, mask, keys=keys, cfg=cfg.objective, head=cfg.head, formulation=formulation)

    params = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh).params)
    everywhere, rows = _places(mesh)
    compiled = jax.jit(predict_step, in_shardings=(params, rows, everywhere), out_shardings=everywhere)
    frozen = None if targets is None else targets.frozen
    return lambda params, batch: compiled(params, batch, frozen)


def _places(mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    """Of what is the same on every device, and of a batch's fields [passes, rows, ...]."""
    return NamedSharding(mesh, P()), NamedSharding(mesh, P(None, BATCH_AXES))
