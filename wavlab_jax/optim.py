"""The optimizer and its schedule, as published: of pre-training, and of fine-tuning what was pre-trained."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax


class OptimizerError(ValueError):
    """A schedule that cannot be followed, or a value that Adam cannot have; names the field."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam as fairseq pre-trains HuBERT with it (`hubert_base_librispeech.yaml`).

    Attributes:
        peak_learning_rate: reached after warm-up.
        warmup_steps: linear from 0.
        schedule: "linear": down to 0 after `total_steps` (fairseq `polynomial_decay_schedule.py`, power 1);
            "inverse_sqrt": peak * sqrt(warmup / step) (ESPnet `warmup_lr.py`, used for WavLabLM); "constant" after
            warm-up.
        total_steps: updates of the linear schedule.
        beta1, beta2, epsilon: of Adam. The moments are bias-corrected before epsilon is added, as in the paper, PyTorch
            and fairseq's newer fused Adam; its plain Adam adds epsilon first, which amounts to epsilon / sqrt(1 -
            beta2 ** n) at update n: 7 times as much at the first update, 1 % more at the 200th.
        weight_decay: on all parameters.
        decoupled_decay: parameters shrink by rate * weight_decay, as in fairseq's Adam; if not, weight_decay times the
            parameters is added to the clipped gradient, as in PyTorch's Adam, with which ESPnet trains recognisers.
        clip_norm: largest global gradient norm; 0 for none.
        accumulate: steps whose gradients' mean makes an update (ESPnet `accum_grad`), between which parameters stand
            still. Warm-up and total_steps count updates.
    """

    peak_learning_rate: float = 5e-4
    warmup_steps: int = 32_000
    schedule: Literal["linear", "inverse_sqrt", "constant"] = "linear"
    total_steps: int = 400_000
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    weight_decay: float = 0.01
    decoupled_decay: bool = True
    clip_norm: float = 10.0
    accumulate: int = 1

    def __post_init__(self):
        for name in ("peak_learning_rate", "warmup_steps", "epsilon", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptimizerError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.accumulate < 1:
            raise OptimizerError(f"accumulate is {self.accumulate}; an update is made of at least 1 step")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise OptimizerError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.schedule == "linear" and self.total_steps <= self.warmup_steps:
            raise OptimizerError(
                f"total_steps ({self.total_steps}) must exceed warmup_steps ({self.warmup_steps}) for a linear decay"
            )


# Part of a model -> pattern of its parameters' paths, as `sharding.PARAMETER_AXES` has them.
Part = Literal["extractor", "encoder"]
PARTS: dict[Part, str] = {"extractor": r"encoder/frontend/convolutions/.*", "encoder": r"encoder/.*"}
STACKED = r"encoder/layers/.*"  # these lead with an axis of the Transformer's layers
_FROZEN, _ENCODER, _REST = "frozen", "encoder", "rest"


@dataclass(frozen=True)
class FineTuningConfig(OptimizerConfig):
    """Adam as fairseq fine-tunes with it, and which parameters it moves how fast.

    Defaults are those of HuBERT Base on ten hours (fairseq `hubert/config/finetune/base_10h.yaml`).

    Attributes:
        schedule: also "tri_stage" (fairseq `tri_stage_lr_scheduler.py`, from SpecAugment 1904.08779): linear from
            `initial_scale` of the peak to the peak in `warmup_steps`, `hold_steps` there, then exponentially down to
            `final_scale` of it at `total_steps`, where it stays.
        hold_steps, initial_scale, final_scale: of that.
        frozen: parts that are never moved. Their weights do not decay either, and they count in no gradient's norm.
        freeze_steps: for so many updates nothing of the encoder is moved, only what sits on it (fairseq
            `freeze_finetune_updates`). Adam begins to count the encoder's updates after them, as PyTorch's does.
        layers: numbers of the Transformer layers that are trained, from 1; where given, nothing else of the encoder
            is (partial fine-tuning, ML-SUPERB 2.0, 2406.08641). Empty: all that `frozen` leaves.
        layer_decay: the learning rate of layer n of N is this to the power N - n + 1, times that of what sits on the
            encoder; what lies before the layers, and the encoder's own LayerNorm, have the power N + 1 (ELECTRA's rule
            2003.10555, counted as in BEiT `optim_factory.py`). 1: the same for all. HuBERT and wav2vec 2.0 have 1.
    """

    peak_learning_rate: float = 2e-5
    warmup_steps: int = 8_000
    schedule: Literal["linear", "inverse_sqrt", "constant", "tri_stage"] = "tri_stage"
    total_steps: int = 80_000
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    hold_steps: int = 0
    initial_scale: float = 0.01
    final_scale: float = 0.05
    frozen: tuple[Part, ...] = ("extractor",)
    freeze_steps: int = 10_000
    layers: tuple[int, ...] = ()
    layer_decay: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("hold_steps", "freeze_steps"):
            if getattr(self, name) < 0:
                raise OptimizerError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("initial_scale", "final_scale", "layer_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise OptimizerError(f"{name} is {getattr(self, name)}; it must lie in (0, 1]")
        if self.schedule == "tri_stage" and self.decay_steps < 1:
            raise OptimizerError(
                f"total_steps ({self.total_steps}) must exceed warmup_steps ({self.warmup_steps}) and hold_steps "
                f"({self.hold_steps}) together: what is left is the decay"
            )
        for part in self.frozen:
            if part not in PARTS:
                raise OptimizerError(f"frozen names {part!r}; the parts are {', '.join(PARTS)}")
        if self.layers and (min(self.layers) < 1 or "encoder" in self.frozen):
            raise OptimizerError(
                f"layers is {self.layers}, frozen is {self.frozen}: layers count from 1, and a frozen encoder trains "
                "none of them"
            )

    @property
    def decay_steps(self) -> int:
        """Of the third stage."""
        return self.total_steps - self.warmup_steps - self.hold_steps


def learning_rate(cfg: OptimizerConfig) -> optax.Schedule:
    """Number of updates before (from 0) -> learning rate of the next; of what sits on the encoder, if rates differ.

    Update n, from 1, has peak * n / warmup at first, as in ESPnet. In fairseq that is the rate of update n + 1: its
    first update has rate 0 and changes nothing. Ours is its schedule for one update more, without that first one.
    "tri_stage" does not begin at 0, and is fairseq's update by update.
    """
    if isinstance(cfg, FineTuningConfig) and cfg.schedule == "tri_stage":
        peak = cfg.peak_learning_rate
        return optax.join_schedules(
            [
                optax.linear_schedule(cfg.initial_scale * peak, peak, cfg.warmup_steps),
                optax.constant_schedule(peak),
                optax.exponential_decay(peak, cfg.decay_steps, cfg.final_scale, end_value=cfg.final_scale * peak),
            ],
            [cfg.warmup_steps, cfg.warmup_steps + cfg.hold_steps],
        )
    warmup = max(cfg.warmup_steps, 1)
    up = optax.linear_schedule(cfg.peak_learning_rate / warmup, cfg.peak_learning_rate, warmup - 1)
    if cfg.schedule == "linear":
        down = optax.linear_schedule(cfg.peak_learning_rate, 0.0, cfg.total_steps - warmup + 1)
    elif cfg.schedule == "inverse_sqrt":

        def down(step):
            return cfg.peak_learning_rate * (warmup / (step + warmup)) ** 0.5
    else:
        down = optax.constant_schedule(cfg.peak_learning_rate)
    return optax.join_schedules([up, down], [warmup - 1])


def at_step(optimizer_state, step):
    """An optimizer's state whose schedule, and whose frozen steps, go on from `step`.

    Nothing else changes: Adam counts its own updates.
    """
    counters = (optax.ScaleByScheduleState, optax.transforms.ConditionallyMaskState)

    def moved(part):
        if isinstance(part, optax.ScaleByScheduleState):
            return part._replace(count=step)
        if isinstance(part, optax.transforms.ConditionallyMaskState):
            return part._replace(step=step, inner_state=at_step(part.inner_state, step))
        return part

    return jax.tree.map(moved, optimizer_state, is_leaf=lambda part: isinstance(part, counters))


def clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, with one factor for all: its division of every element is an array more to store.

    The norm may be given to `update` as `norm`, where the gradient is a part of that which is clipped.
    """

    def update(gradient, state, params=None, *, norm=None, **others):
        factor = largest / jnp.maximum(optax.tree.norm(gradient) if norm is None else norm, largest)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def treats_alike(cfg: OptimizerConfig) -> bool:
    """Whether `make_optimizer`, told the `norm` of the whole gradient, may be given any part of it by itself."""
    return cfg.accumulate == 1 and not isinstance(cfg, FineTuningConfig)


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping, Adam, decoupled weight decay, schedule, in fairseq's order; or PyTorch's Adam: `decoupled_decay`.

    While `freeze_steps` last, the encoder's schedule stands still: give the state `at_step` after each update.
    """
    clip = clip_by_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    adam = {"learning_rate": learning_rate(cfg), "b1": cfg.beta1, "b2": cfg.beta2, "eps": cfg.epsilon}
    if cfg.decoupled_decay:
        after = optax.adamw(**adam, weight_decay=cfg.weight_decay)
    else:
        after = optax.chain(optax.add_decayed_weights(cfg.weight_decay), optax.adam(**adam))
    each = _by_part(cfg, clip, after) if isinstance(cfg, FineTuningConfig) else optax.chain(clip, after)
    each = optax.with_extra_args_support(each)
    if cfg.accumulate == 1:
        return each
    return optax.MultiSteps(each, every_k_schedule=cfg.accumulate).gradient_transformation()


def _by_part(
    cfg: FineTuningConfig, clip: optax.GradientTransformation, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Clipping and Adam of what is trained at the time, at its rate."""

    def thawing(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
        """The transformation of the encoder's gradients, and zeros without it while the encoder is frozen."""
        if not cfg.freeze_steps:
            return transformation
        return optax.transforms.conditionally_mask(transformation, lambda step: step >= cfg.freeze_steps)

    def by_group(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
        groups = {_FROZEN: optax.set_to_zero(), _ENCODER: thawing(transformation), _REST: transformation}
        return optax.partition(groups, lambda params: _groups(params, cfg))

    def by_layer(factor) -> optax.GradientTransformation:
        """Multiplies by a factor, which may differ from layer to layer."""
        return optax.stateless(
            lambda updates, params: jax.tree.map(lambda u, f: u * f.astype(u.dtype), updates, factor(params, cfg))
        )

    # what is frozen first, so that it counts in no norm
    return optax.chain(by_group(optax.identity()), by_layer(_trained), clip, by_group(adam), by_layer(layer_rates))


def held(params: Any, cfg: OptimizerConfig) -> Any:
    """The parameters, with no gradient to those that are never trained: nothing is computed for them."""
    if not isinstance(cfg, FineTuningConfig):
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: lax.stop_gradient(leaf) if _is_frozen(_name(path), cfg) else leaf, params
    )


def layer_rates(params: Any, cfg: FineTuningConfig) -> Any:
    """A tree like `params` of arrays [] or [layers, 1, ...]: what the learning rate is multiplied by; 0: not trained.

    Raises OptimizerError if `cfg.layers` names a layer that there is not.
    """
    count = _layer_count(params)
    if cfg.layers and max(cfg.layers) > count:
        raise OptimizerError(f"layers names layer {max(cfg.layers)}, but the encoder has {count}")

    def of(path, leaf) -> np.ndarray:
        name = _name(path)
        if not re.fullmatch(PARTS["encoder"], name):
            return np.ones(())
        if _is_frozen(name, cfg):
            return np.zeros(())
        if not re.fullmatch(STACKED, name):
            return np.asarray(cfg.layer_decay ** (count + 1))
        numbers = np.arange(1, count + 1)
        rates = cfg.layer_decay ** (count + 1.0 - numbers)
        rates = np.where(np.isin(numbers, cfg.layers), rates, 0.0) if cfg.layers else rates
        return rates.reshape(-1, *(1,) * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(of, params)


def _trained(params: Any, cfg: FineTuningConfig) -> Any:
    """`layer_rates` as 0 and 1."""
    return jax.tree.map(lambda rate: (rate > 0).astype(np.float64), layer_rates(params, cfg))


def _groups(params: Any, cfg: FineTuningConfig) -> Any:
    """A tree like `params` of the groups that are optimized apart: what is never moved has no moments."""

    def group(path, leaf) -> str:
        name = _name(path)
        if _is_frozen(name, cfg):
            return _FROZEN
        return _ENCODER if re.fullmatch(PARTS["encoder"], name) else _REST

    return jax.tree_util.tree_map_with_path(group, params)


def _is_frozen(name: str, cfg: FineTuningConfig) -> bool:
    """Whether all of a parameter stays as it is."""
    partial = bool(cfg.layers) and re.fullmatch(PARTS["encoder"], name) and not re.fullmatch(STACKED, name)
    return bool(partial) or any(re.fullmatch(PARTS[part], name) for part in cfg.frozen)


def _layer_count(params: Any) -> int:
    """Of the Transformer's layers; 0 where the parameters are not an encoder's."""
    sizes = {
        leaf.shape[0]
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        if re.fullmatch(STACKED, _name(path))
    }
    return max(sizes, default=0)


def _name(path) -> str:
    return "/".join(str(part.key) for part in path)
