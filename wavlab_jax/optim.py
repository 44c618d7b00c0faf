"""The optimizer and its schedule, as published."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import optax


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


def learning_rate(cfg: OptimizerConfig) -> optax.Schedule:
    """Number of updates before (from 0) -> learning rate of the next.

    Update n, from 1, has peak * n / warmup at first, as in ESPnet. In fairseq that is the rate of update n + 1: its
    first update has rate 0 and changes nothing. Ours is its schedule for one update more, without that first one.
    """
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
    """An optimizer's state whose schedule goes on from `step`. Nothing else changes: Adam counts its own updates."""
    schedules = optax.ScaleByScheduleState
    return jax.tree.map(
        lambda part: part._replace(count=step) if isinstance(part, schedules) else part,
        optimizer_state,
        is_leaf=lambda part: isinstance(part, schedules),
    )


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, Adam, decoupled weight decay, schedule, in fairseq's order; or PyTorch's Adam: `decoupled_decay`."""
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    adam = {"learning_rate": learning_rate(cfg), "b1": cfg.beta1, "b2": cfg.beta2, "eps": cfg.epsilon}
    if cfg.decoupled_decay:
        each = optax.chain(clip, optax.adamw(**adam, weight_decay=cfg.weight_decay))
    else:
        each = optax.chain(clip, optax.add_decayed_weights(cfg.weight_decay), optax.adam(**adam))
    if cfg.accumulate == 1:
        return each
    return optax.MultiSteps(each, every_k_schedule=cfg.accumulate).gradient_transformation()
