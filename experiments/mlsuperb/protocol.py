"""The published protocol, what a run makes of it, and in what it deviates.

Constants: ESPnet `egs2/ml_superb/asr1/conf/tuning/train_asr_{s3prl,fbank}_{single,10min,1h}.yaml`; the gradient's norm
is cut at ESPnet's default (`espnet2/tasks/abs_task.py` grad_clip). The benchmark leaves the learning rate open.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from data_pipelines.mlsuperb.batches import TrackBatchesConfig
from data_pipelines.mlsuperb.layout import PARTS, SOURCES, Duration
from data_pipelines.mlsuperb.tracks import Task, Track
from wavlab_jax.downstream import DownstreamConfig
from wavlab_jax.optim import OptimizerConfig
from wavlab_jax.train import LoopConfig

ITERATIONS: dict[tuple[bool, Duration], int] = {  # batches that are trained on; by whether the track is monolingual
    (True, "10min"): 15_000,
    (True, "1h"): 15_000,
    (False, "10min"): 300_000,
    (False, "1h"): 600_000,
}
VALIDATIONS = 30  # epochs, each followed by the loss on the dev set
AVERAGED = 5  # of the best checkpoints by that loss
ACCUMULATE = 4  # batches an update
BATCH = 8  # utterances, at least
WIDTH, HEAD_WIDTH = 256, 32  # of the downstream model, and of each of its heads
LEARNING_RATE = 1e-4
# Of the baseline of ML-SUPERB 2.0's challenge, whose downstream model, batches and updates are the same (ESPnet
# `egs2/ml_superb2/asr1/conf/tuning/train_mms_ctc_baseline.yaml`).
CHALLENGE_ITERATIONS, CHALLENGE_VALIDATIONS, CHALLENGE_AVERAGED, CHALLENGE_LEARNING_RATE = 400_000, 20, 2, 2e-4

# Of this code, always: what docs/mlsuperb.md explains.
DIFFERENCES = (
    "the best token of each frame is read, where ESPnet searches prefixes with a beam of one",
    "which batch comes when, and what is masked in it, is drawn by another generator",
    "a row's time and channel masks do not depend on the masks of its neighbours",
    "the encoder leaves padding out altogether, and a row's last frame is repeated where s3prl hands on what the "
    "encoder makes of padding",
)
CHALLENGE_DIFFERENCES = (*DIFFERENCES, "products are of float32, where ESPnet's baseline has them of 16 bits (use_amp)")


# Reasons, by their beginnings, why rows are left out that ESPnet's script (`local/data_prep.py`) stops at or hears: the
# benchmark as released has none of them. What else is left out, the protocol leaves out.
BROKEN = ("recording ", "no text", "id does not end in", "not in wav.scp", "no language before")


class ProtocolError(ValueError):
    """A protocol that cannot be followed, or results that do not belong to it; the message says what to give."""


@dataclass(frozen=True)
class ProtocolConfig:
    """How a downstream model is trained; the defaults are the published protocol.

    Attributes:
        scale: share of the published iterations; validations and averaged checkpoints become fewer with it.
        learning_rate: of Adam; the one thing that the benchmark lets each model choose.
        batches: of the track.
        accumulate: batches an update; the published iterations are batches, so that fewer make more updates.
        width: channels of the downstream model's convolutions and Transformer, whose heads and feed-forward layers keep
            their proportions to it. A narrow one learns in minutes on a laptop.
        seed: of initial values, order, dropout and masks.
    """

    scale: float = 1.0
    learning_rate: float = LEARNING_RATE
    batches: TrackBatchesConfig = field(default_factory=lambda: TrackBatchesConfig(size=BATCH))
    accumulate: int = ACCUMULATE
    width: int = WIDTH
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.scale <= 1:
            raise ProtocolError(f"scale is {self.scale:g}; it is a share of the published iterations, up to 1")
        if self.accumulate < 1:
            raise ProtocolError(f"accumulate is {self.accumulate}; an update takes one batch at least")
        if self.width < 1 or self.width % HEAD_WIDTH:
            raise ProtocolError(f"width is {self.width}; it is a multiple of {HEAD_WIDTH}, which is that of one head")


def downstream_of(cfg: ProtocolConfig, *, tokens: int) -> DownstreamConfig:
    """The downstream model's shape."""
    return DownstreamConfig(tokens=tokens, width=cfg.width, heads=cfg.width // HEAD_WIDTH, feed_forward=4 * cfg.width)


@dataclass(frozen=True)
class Schedule:
    """Of one track's training, in batches.

    Attributes:
        published, iterations: batches of the protocol, and of this run.
        validate_every: batches between two validations, each with a checkpoint.
        averaged: checkpoints, at most.
    """

    published: int
    iterations: int
    validate_every: int
    averaged: int

    @property
    def validations(self) -> int:
        """How many there are."""
        return self.iterations // self.validate_every


def schedule_of(cfg: ProtocolConfig, task: Task | Literal["challenge"], duration: Duration) -> Schedule:
    """The published one at scale 1; below, a validation for every 25 iterations, but 1 to 30 (20) of them.

    Validations lie at whole updates, and the last one at the end.
    """
    if task == "challenge":
        published, most, averaged = CHALLENGE_ITERATIONS, CHALLENGE_VALIDATIONS, CHALLENGE_AVERAGED
    else:
        published, most, averaged = ITERATIONS[task == "monolingual", duration], VALIDATIONS, AVERAGED
    wanted = published * cfg.scale
    validations = most if cfg.scale == 1 else min(max(int(wanted // 25), 1), most)
    every = max(round(wanted / validations / cfg.accumulate), 1) * cfg.accumulate
    return Schedule(published, every * validations, every, min(averaged, validations))


def optimizer_of(cfg: ProtocolConfig) -> OptimizerConfig:
    """PyTorch's Adam, constant, with a small decay added to the gradient."""
    return OptimizerConfig(
        peak_learning_rate=cfg.learning_rate,
        warmup_steps=0,
        schedule="constant",
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        weight_decay=1e-6,
        decoupled_decay=False,
        clip_norm=5.0,
        accumulate=cfg.accumulate,
    )


def loop_of(schedule: Schedule) -> LoopConfig:
    """Steps are batches; a checkpoint at each validation, of which the best and the newest stay."""
    return LoopConfig(
        steps=schedule.iterations,
        log_every=min(math.gcd(schedule.validate_every, 100), schedule.validate_every),
        save_every=schedule.validate_every,
        keep=1,
        keep_best=schedule.averaged,
    )


def incomplete(track: Track, *, sources: Sequence[str], few_shot: Sequence[str]) -> list[str]:
    """What a track lacks of the benchmark as released; nothing of a whole one.

    `sources`: corpora that the folder has not; `few_shot`: utterances to be trained on that no transcript names, which
    matter to the tracks of all languages.
    """
    found = []
    if sources:
        found.append(f"{len(sources)} of the benchmark's {len(SOURCES)} corpora are not there: {', '.join(sources)}")
    if few_shot and track.task != "monolingual":
        more = ", ..." if len(few_shot) > 3 else ""
        found.append(
            f"{len(few_shot)} of the utterances that few-shot languages are to be trained on are in no transcript: "
            f"{', '.join(few_shot[:3])}{more}"
        )
    for part in PARTS:
        reasons = Counter(each.reason for each in track.left_out.get(part, ()))
        found += [f"of {part} {reasons[each]:,} left out: {each}" for each in reasons if _broken(each)]
    return found


def _broken(reason: str) -> bool:
    return reason.startswith(BROKEN) and reason != "no text but punctuation"


def deviations(
    cfg: ProtocolConfig,
    schedule: Schedule,
    *,
    miniature: bool,
    incomplete: Sequence[str] = (),
    challenge: bool = False,
    downstream: DownstreamConfig | None = None,
) -> list[str]:
    """In what this run is not the published protocol, or not the `challenge`'s baseline; none by default.

    The learning rate may be any, but for the baseline. `downstream`: the model's shape, where it is not that of `cfg`.
    """
    found, most, averaged = [], VALIDATIONS, AVERAGED
    if challenge:
        most, averaged = CHALLENGE_VALIDATIONS, CHALLENGE_AVERAGED
        if cfg.learning_rate != CHALLENGE_LEARNING_RATE:
            found.append(f"learning rate {cfg.learning_rate:g}, not {CHALLENGE_LEARNING_RATE:g}")
    if miniature:
        found.append("a miniature in the benchmark's layout, not its data")
    found += incomplete
    if cfg.scale != 1:
        said = f"scale {cfg.scale:g}: {schedule.iterations:,} of {schedule.published:,} iterations"
        if schedule.validations != most:
            said += f", {schedule.validations} of {most} validations"
        if schedule.averaged != averaged:
            said += f", the best {schedule.averaged} of them averaged, not {averaged}"
        found.append(said)
    if cfg.batches.size != BATCH:
        found.append(f"batches of {cfg.batches.size}, not {BATCH}")
    if cfg.accumulate != ACCUMULATE:
        every = "each batch" if cfg.accumulate == 1 else f"every {cfg.accumulate} batches"
        found.append(f"an update for {every}, not for {ACCUMULATE}")
    downstream = downstream or downstream_of(cfg, tokens=3)
    published = DownstreamConfig(tokens=downstream.tokens)
    both = {each.name: (getattr(downstream, each.name), getattr(published, each.name)) for each in fields(published)}
    other = [f"{name} {ours} in place of {theirs}" for name, (ours, theirs) in both.items() if ours != theirs]
    return [*found, f"downstream model: {', '.join(other)}"] if other else found
