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
from wavlab_jax.adapters import AdapterError, AnyAdapterConfig, adapted, make_adapter
from wavlab_jax.downstream import DownstreamConfig
from wavlab_jax.encoder import EncoderConfig, Formulation, formulation_for
from wavlab_jax.heads import AnyHeadConfig, HeadError
from wavlab_jax.health import Observed, combine, combine_copies, mask_coverage, observe
from wavlab_jax.metrics import Sums
from wavlab_jax.model import Model, Parameters, assemble, make_model, parameters
from wavlab_jax.objectives import AnyObjectiveConfig, Keys, check_head, draw_masks, loss_of, objective_of
from wavlab_jax.optim import OptimizerConfig, at_step, held, learning_rate, make_optimizer, treats_alike
from wavlab_jax.sharding import BATCH_AXES, abstract_flag, parameter_shardings, place_flag, state_shardings
from wavlab_jax.state import TrainState, fresh_state
from wavlab_jax.targets.online import Targets
from wavlab_jax.updates import updated, updated_in_place


@dataclass(frozen=True)
class LearnerConfig:
    """What a step computes: architecture, objective, optimizer, and the seed of masks and dropout.

    Attributes:
        encoder: None for log-mel features in its place, which a recogniser can be trained on.
        frozen_encoder: the head alone is trained: the encoder's parameters are an argument of the step, and neither
            part of the training state nor of a checkpoint.
        adapter: small parameters that are put into a frozen encoder and trained with the head.

    Raises HeadError if the head is not of the kind that the objective trains, or needs an encoder; AdapterError if an
    adapter has no frozen encoder to be put into.
    """

    encoder: EncoderConfig | None
    head: AnyHeadConfig
    objective: AnyObjectiveConfig
    optimizer: OptimizerConfig
    seed: int = 0
    frozen_encoder: bool = False
    adapter: AnyAdapterConfig | None = None

    def __post_init__(self):
        check_head(self.objective, self.head)
        if self.encoder is None and not isinstance(self.head, DownstreamConfig):
            raise HeadError(f"learner.encoder is None, and a {type(self.head).__name__} needs one")

        if self.adapter is not None and (self.encoder is None or not self.frozen_encoder):
            raise AdapterError(
                "learner.adapter is put into a frozen encoder: set learner.frozen_encoder True, or the adapter to None"
            )

    def trained(self, params: Parameters) -> Parameters:
        """Of a whole model's parameters, those that are trained."""
        return {name: part for name, part in params.items() if name != "encoder"} if self.frozen_encoder else params

    def model(self, params: Parameters) -> Model:
        """The model of a whole model's parameters, its adapter in its encoder. Works under `jit`."""
        rest = {name: part for name, part in params.items() if name != "adapter"}
        model = assemble(rest, self.encoder, self.head)
        if self.adapter is not None:
            model.encoder = adapted(model.encoder, params["adapter"], self.adapter)
        return model


class Frozen(NamedTuple):
    """Arrays of a step that training does not change.

    Attributes:
        targets: of the units that are computed in the step (`Targets.frozen`), on every device; None without such.
        encoder: {"encoder": parameters} of a frozen one, laid out as trained ones are; {} if it is trained.
    """

    targets: Any
    encoder: Parameters


class TrainStep(NamedTuple):
    """The jitted update: call it with a state, which it takes over (donates), a placed batch and a wish.

    Attributes:
        jitted: (state, batch, wishes, Frozen) -> (state, StepResult).
        frozen: the Frozen, or its shapes where the step is only to be lowered.
        mesh: that it runs on.
    """

    jitted: Callable
    frozen: Frozen
    mesh: Mesh

    def __call__(self, state: TrainState, batch: Batch, wish: int = 0) -> tuple[TrainState, "StepResult"]:
        """One update."""
        return self.jitted(state, batch, place_flag(wish, mesh=self.mesh), self.frozen)

    def of_encoder(self, encoder: Parameters) -> "TrainStep":
        """The same program with another frozen encoder of the same shape: nothing is compiled again."""
        return self._replace(frozen=self.frozen._replace(encoder={"encoder": encoder}))

    def lower(self, state: TrainState, batch: Batch):
        """The very program that a call would run, for shapes that say where they lie: nothing is allocated."""
        return self.jitted.lower(state, batch, abstract_flag(self.mesh), self.frozen)


class EvaluationStep(NamedTuple):
    """A jitted function of padded rows: call it with parameters and a placed batch. Attributes as of `TrainStep`."""

    jitted: Callable
    frozen: Frozen

    def __call__(self, params: Parameters, batch: Batch):
        """What the function says of the batch."""
        return self.jitted(params, batch, self.frozen)

    def of_encoder(self, encoder: Parameters) -> "EvaluationStep":
        """The same program with another frozen encoder of the same shape."""
        return self._replace(frozen=self.frozen._replace(encoder={"encoder": encoder}))


class StepResult(NamedTuple):
    """What a step reports, replicated on every device.

    Attributes:
        sums: terms of the loss and accuracies over the whole step.
        loss: [] float32, the scalar that was minimised.
        gradient_norm: [] float32, before clipping.
        learning_rate: [] float32.
        finite: [] bool; where False the parameters and the moments were left as they were, and the step was counted.
        languages, counts, layers, extremes: as `health.Observed` has them.
        updates: squares of updates and weights by group of modules: `health.by_module`.
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
    key = jax.random.key(cfg.seed)
    params = parameters(make_model(key, cfg.encoder, cfg.head))
    if cfg.adapter is not None:
        params["adapter"] = make_adapter(jax.random.fold_in(key, 2), cfg.adapter, encoder=cfg.encoder)
    return fresh_state(cfg.trained(params), optimizer)


def make_train_step(
    cfg: LearnerConfig,
    mesh: Mesh,
    targets: Targets | None = None,
    *,
    encoder: Parameters | None = None,
    languages: int = 0,
    formulation: Formulation | None = None,
) -> TrainStep:
    """The jitted update. Takes a placed batch [passes, rows, ...] (`sharding.place_batch`); donates the state.
    Of several processes' wishes, which mean nothing here, each learns the largest: agreement for the price of a scalar
    that travels with the step.

    Gradients of the passes add up to those of the whole step, because every term is divided by the whole step's count.
    `targets` fill in the units that are computed in the step; their arrays are arguments of the compiled program.
    `encoder`: the parameters of the frozen one, on this mesh, or their shapes with shardings.
    `languages`: how many the manifest has; the first ones are told apart, none by default.
    `formulation` is by default that of the mesh's platform.
    """
    objective = objective_of(cfg.objective)
    coefficients = objective.coefficients(cfg.objective, cfg.head)
    optimizer = make_optimizer(cfg.optimizer)
    schedule = learning_rate(cfg.optimizer)
    formulation = formulation or formulation_for(mesh.devices.flat[0].platform, devices=mesh.size)
    channels = cfg.encoder.extractor_channels[-1] if cfg.encoder else 0
    width = cfg.encoder.width if cfg.encoder else 0

    def train_step(state: TrainState, batch: Batch, wishes, frozen: Frozen) -> tuple[TrainState, StepResult]:
        if targets is not None:  # one pass after the other, as they are trained on
            batch = batch._replace(units=lax.map(lambda rows: targets.label(frozen.targets, rows).units, batch))
        # a stream of its own: the first key of the seed made the initial values
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), 1), state.step)
        keys = Keys(*jax.random.split(key))
        masks = jax.vmap(lambda rows: draw_masks(rows, keys.asked, cfg.objective.mask))(batch)
        denominators = jax.tree.map(
            lambda counts: jnp.sum(counts, axis=0),
            jax.vmap(lambda rows, mask: objective.denominators(rows, mask, channels=channels))(batch, masks),
        )

        passes = batch.waveform.shape[0]
        # (XLA refuses a manual axis of one device)
        by_copy = passes > 1 and objective.ADDITIVE and mesh.shape["data"] > 1
        spelled = _split_by_rows(formulation, mesh, by_copy=by_copy)

        def loss(params, rows, mask):
            measured = objective.measure(
                cfg.model({**frozen.encoder, **held(params, cfg.optimizer)}),
                rows,
                mask,
                keys=keys,
                step=state.step,
                cfg=cfg.objective,
                head=cfg.head,
                padded=objective.PADDED,
                formulation=spelled,
            )
            observed = observe(measured, rows, languages=languages, width=width)
            return loss_of(observed.sums, denominators, coefficients), observed

        gradient_of = jax.grad(loss, has_aux=True)

        def per_copy(params, rows_and_masks):
            gradient, observed = _over_passes(gradient_of, params, rows_and_masks)
            # leaf by leaf: XLA cannot place one exchange of several arrays where another axis is automatic
            return jax.tree.map(lambda x: lax.psum(x, "data"), gradient), combine_copies(observed, "data")

        if passes == 1:
            gradient, observed = gradient_of(state.params, *jax.tree.map(lambda x: x[0], (batch, masks)))
        elif by_copy:
            gradient, observed = jax.shard_map(
                per_copy,
                mesh=mesh,
                in_specs=(P(), P(None, "data")),
                out_specs=P(),
                axis_names={"data"},
                check_vma=False,
            )(state.params, (batch, masks))
        else:
            gradient, observed = _over_passes(gradient_of, state.params, (batch, masks))

        value = loss_of(observed.sums, denominators, coefficients)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        arguments = (optimizer, gradient, state.params, state.optimizer)
        if formulation.lean_gradients:
            new = updated_in_place(*arguments, wanted=finite, norm=norm if treats_alike(cfg.optimizer) else None)
        else:
            new = updated(*arguments, wanted=finite)
        # the step counts either way: it is the data position, and the schedule goes by it
        done, every = state.step + 1, cfg.optimizer.accumulate
        new_state = TrainState(done, new.params, at_step(new.optimizer, done // every))
        return new_state, StepResult(
            sums={**observed.sums, "mask_coverage": mask_coverage(batch, masks)},
            loss=value,
            gradient_norm=norm,
            learning_rate=jnp.asarray(schedule(state.step // every), jnp.float32),
            finite=finite,
            languages=observed.languages,
            counts=observed.counts,
            layers=observed.layers,
            extremes=observed.extremes,
            updates=new.squares,
            wish=jnp.max(wishes),
        )

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
    everywhere, rows = _places(mesh)
    frozen = _frozen(cfg, targets, encoder)
    compiled = jax.jit(
        train_step,
        in_shardings=(shardings, rows, NamedSharding(mesh, P(BATCH_AXES)), _frozen_places(frozen, mesh)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
    return TrainStep(compiled, frozen, mesh)


def _split_by_rows(formulation: Formulation, mesh: Mesh, *, by_copy: bool) -> Formulation:
    """Of a pass whose rows are split over `mesh`; `by_copy`: inside a `shard_map` over "data", over "fsdp" alone."""
    if mesh.size == 1:
        return formulation

    def along_rows(x: jax.Array) -> jax.Array:
        here, axes = (jax.sharding.get_abstract_mesh(), ("fsdp",)) if by_copy else (mesh, BATCH_AXES)
        return lax.with_sharding_constraint(x, NamedSharding(here, P(axes)))

    return formulation._replace(row_shards=mesh.shape["fsdp"] if by_copy else mesh.size, along_rows=along_rows)


def _over_passes(gradient_of: Callable, params: Parameters, rows_and_masks) -> tuple[Parameters, Observed]:
    """What `gradient_of(params, *one pass)` gives, added up over passes, which are the leading axis.

    Begun with zeros, which change neither sums nor the largest of absolute values: were the first pass taken out of the
    loop, it would be compiled twice.
    """

    def accumulate(total, one_pass):
        gradient, observed = gradient_of(params, *one_pass)
        return (jax.tree.map(jnp.add, total[0], gradient), combine(total[1], observed)), None

    shapes = jax.eval_shape(gradient_of, params, *jax.tree.map(lambda x: x[0], rows_and_masks))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.scan(accumulate, nothing, rows_and_masks)[0]


def make_predict_step(
    cfg: LearnerConfig, mesh: Mesh, targets: Targets | None = None, *, encoder: Parameters | None = None
) -> EvaluationStep:
    """The jitted judgement of padded rows, without dropout: (params, placed batch) -> Judged, of a recogniser
    Recognised.

    Masks come from each row's seed and the configured seed, so all models of one seed are asked the same frames.
    `targets` fill in units as in training; `encoder` is the frozen one.
    """
    objective = objective_of(cfg.objective)

    def judge(model, rows, mask, keys, formulation):
        return objective.judge(model, rows, mask, keys=keys, cfg=cfg.objective, head=cfg.head, formulation=formulation)

    return _evaluation(judge, cfg, mesh, targets, encoder)


def make_validation_step(
    cfg: LearnerConfig, mesh: Mesh, targets: Targets | None = None, *, encoder: Parameters | None = None
) -> EvaluationStep:
    """The jitted sums of padded rows, without dropout: (params, placed batch) -> the terms that training reports.

    Arguments as `make_predict_step` takes them.
    """
    objective = objective_of(cfg.objective)

    def measure(model, rows, mask, keys, formulation):
        said = {"keys": keys, "cfg": cfg.objective, "head": cfg.head, "padded": True, "formulation": formulation}
        return objective.measure(model, rows, mask, step=jnp.zeros((), jnp.int32), **said).sums

    return _evaluation(measure, cfg, mesh, targets, encoder)


def _evaluation(
    function, cfg: LearnerConfig, mesh: Mesh, targets: Targets | None, encoder: Parameters | None
) -> EvaluationStep:
    """(params, placed batch) -> function(model, rows, mask, keys, formulation), jitted."""
    formulation = formulation_for(mesh.devices.flat[0].platform, devices=mesh.size)

    def evaluate(params, batch: Batch, frozen: Frozen):
        rows = jax.tree.map(lambda x: x[0], batch)
        if targets is not None:
            rows = targets.label(frozen.targets, rows)
        keys = Keys(asked=jax.random.key(cfg.seed), noise=None)
        mask = draw_masks(rows, keys.asked, cfg.objective.mask)
        return function(cfg.model({**frozen.encoder, **params}), rows, mask, keys, formulation)

    params = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh).params)
    everywhere, rows = _places(mesh)
    frozen = _frozen(cfg, targets, encoder)
    places = (params, rows, _frozen_places(frozen, mesh))
    return EvaluationStep(jax.jit(evaluate, in_shardings=places, out_shardings=everywhere), frozen)


def _frozen(cfg: LearnerConfig, targets: Targets | None, encoder: Parameters | None) -> Frozen:
    if (encoder is None) == (cfg.frozen_encoder and cfg.encoder is not None):
        raise ValueError("the parameters of the encoder are given where it is frozen, and there alone")
    return Frozen(None if targets is None else targets.frozen, {} if encoder is None else {"encoder": encoder})


def _frozen_places(frozen: Frozen, mesh: Mesh) -> Frozen:
    """Shardings of `Frozen`."""
    return Frozen(NamedSharding(mesh, P()), parameter_shardings(frozen.encoder, mesh))


def _places(mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    """Of what is the same on every device, and of a batch's fields [passes, rows, ...]."""
    return NamedSharding(mesh, P()), NamedSharding(mesh, P(None, BATCH_AXES))
