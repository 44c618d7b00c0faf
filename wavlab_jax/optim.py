"""The optimizer and its schedule, as published."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
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
        weight_decay: decoupled (parameters shrink by rate * weight_decay), on all parameters, as in fairseq's Adam.
        clip_norm: largest global gradient norm; 0 for none.
    """

    peak_learning_rate: float = 5e-4
    warmup_steps: int = 32_000
    schedule: Literal["linear", "inverse_sqrt", "constant"] = "linear"
    total_steps: int = 400_000
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float = 10.0

    def __post_init__(self):
        for name in ("peak_learning_rate", "warmup_steps", "epsilon", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptimizerError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise OptimizerError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.schedule == "linear" and self.total_steps <= self.warmup_steps:
            raise OptimizerError(
                f"total_steps ({self.total_steps}) must exceed warmup_steps ({self.warmup_steps}) for a linear decay"
            )


def learning_rate(cfg: OptimizerConfig) -> optax.Schedule:
    """Step number (from 0) -> learning rate of that update.

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


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, with one factor for all: its division of every element is an array more to store."""

    def update(gradient, state, params=None):
        factor = largest / jnp.maximum(optax.tree.norm(gradient), largest)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, Adam, decoupled weight decay, schedule, in fairseq's order."""
    return optax.chain(
        clip_by_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        optax.adamw(learning_rate(cfg), b1=cfg.beta1, b2=cfg.beta2, eps=cfg.epsilon, weight_decay=cfg.weight_decay),
    )
