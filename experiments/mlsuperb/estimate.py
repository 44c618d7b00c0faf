"""How long the tracks would take on one accelerator, by formula: nothing is run.

    batches of the protocol x rows x (encoder forward + 3 x downstream model) + validations and the test set, forward
    ------------------------------------------------------------------------------------------------------------------
                                      the chip's peak x utilisation

Rows are those of the benchmark's folder, padded as they would be; without it, as many and as long as the published
sizes of the sets make them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, cast

from data_pipelines.batch import HOP, SAMPLE_RATE
from data_pipelines.mlsuperb.batches import LoadTrackBatch, TrackBatchesConfig
from data_pipelines.mlsuperb.challenge import Development, read_challenge
from data_pipelines.mlsuperb.layout import SOURCES, Duration, Part
from data_pipelines.mlsuperb.tracks import Task, read_track
from experiments.mlsuperb.protocol import ProtocolConfig, Schedule, downstream_of, schedule_of
from wavlab_jax.chips import Chip
from wavlab_jax.downstream import DownstreamConfig
from wavlab_jax.encoder import EncoderConfig
from wavlab_jax.flops import TRAINING_OVER_FORWARD, downstream_flops, row_flops

# Hours of the sets (2305.10615; dev and test are the same for both durations).
HOURS: dict[Duration | Part, float] = {"10min": 37.4, "1h": 222.5, "dev": 41.8, "test": 45.0}
# Utterances of the 2.0 challenge (`espnet/ml_superb_hf`: its card; of dev_dialect its viewer, in hundreds).
CHALLENGE_UTTERANCES: dict[str, int] = {"train": 122_890, "dev": 23_892, "dev_dialect": 7_100}
# The paper gives no number of utterances, the challenge no hours. The challenge's training set is of about the hours of
# the 1h set, which makes 6.5 s each; its dev makes 6.3 s of 41.8 hours.
MEAN_SECONDS = HOURS["1h"] * 3600 / CHALLENGE_UTTERANCES["train"]
SET_SECONDS = 600.0  # of dev and test, a language and source
Planned = Task | Literal["challenge"]
TOKENS: dict[Planned, int] = {  # about; the challenge's texts keep small letters and punctuation, which is some more
    "monolingual": 60,
    "multilingual": 5_000,
    "identification": 146,
    "joint": 5_143,
    "challenge": 5_143,
}
# Of the bfloat16 peak. Products of float32 arrays have half of it on GPUs (TF32: 156 of 312 TFLOP/s of an A100, 494.7
# of 989.4 of an H100; NVIDIA's data sheets), and 40 % of that is what plans of pre-training assume as well.
DEFAULT_UTILISATION = 0.2


class Rows(NamedTuple):
    """Rows of a track by their padded length in samples.

    Attributes:
        train: of one pass over the training set, fillers included; `batches`: in how many.
        dev, test: of these sets.
    """

    train: Counter[int]
    batches: int
    dev: Counter[int]
    test: Counter[int]


class Estimate(NamedTuple):
    """Of a track: what is computed (operations), and from what.

    Attributes:
        name, schedule, tokens: of it.
        rows: a batch, on average; `seconds`: padded, of each.
        encoder, downstream: of training, the encoder's forward passes and the downstream model's updates.
        judging: of all validations and the test set.
    """

    name: str
    schedule: Schedule
    tokens: int
    rows: float
    seconds: float
    encoder: float
    downstream: float
    judging: float

    @property
    def operations(self) -> float:
        """All of them."""
        return self.encoder + self.downstream + self.judging


def rows_of_track(root: Path, task: Planned, name: str | None, *, duration: Duration, cfg: TrackBatchesConfig):
    """(tokens, Rows) of a track in the benchmark's folder, or the challenge's. Raises MlSuperbError."""
    if task == "challenge":
        track = read_challenge(root, judged_on=cast(Development, name))
    else:
        track = read_track(root, task, duration=duration, monolingual=name)

    def padded(part: Part) -> tuple[Counter[int], int]:
        load, found = LoadTrackBatch(track, part, cfg, training=False), Counter()
        for batch in load.batches:
            longest = max(load.examples[index].utterance.seconds for index in batch)
            found[load.static_length(round(longest * SAMPLE_RATE))] += load.rows_of(batch)
        return found, len(load.batches)

    train, batches = padded("train")
    return len(track.tokens), Rows(train, batches, padded("dev")[0], padded("test")[0])


def published_rows(task: Planned, name: str | None, *, cfg: TrackBatchesConfig) -> tuple[int, Rows]:
    """The same from published sizes: all rows of the mean length, and half a step of padding.

    A monolingual set is tested on ten minutes of each source of its language: here of all sources, which is too much.
    """
    samples = round((MEAN_SECONDS + cfg.step / 2) * SAMPLE_RATE)
    if task == "challenge":
        judged = [CHALLENGE_UTTERANCES[part] for part in ("dev", name)]
    else:
        alone = {"dev": SET_SECONDS / 3600, "test": len(SOURCES) * SET_SECONDS / 3600}
        hours = alone if task == "monolingual" else HOURS
        judged = [round(hours[part] * 3600 / MEAN_SECONDS) for part in ("dev", "test")]
    dev, test = (Counter({samples: rows}) for rows in judged)
    return TOKENS[task], Rows(Counter({samples: cfg.size}), 1, dev, test)


def estimate(
    encoder: EncoderConfig | None,
    tracks: Sequence[tuple[Planned, str | None]],
    *,
    duration: Duration,
    cfg: ProtocolConfig,
    root: Path | None,
) -> list[Estimate]:
    """Each track's operations; `tracks` as `run_benchmark` takes them, `root`: the folder, or None for published sizes.

    Raises MlSuperbError.
    """
    found = []
    for task, name in tracks:
        if root is None:
            tokens, rows = published_rows(task, name, cfg=cfg.batches)
        else:
            tokens, rows = rows_of_track(root, task, name, duration=duration, cfg=cfg.batches)
        schedule = schedule_of(cfg, task, duration)
        encode, recognise = _costs(encoder, downstream_of(cfg, tokens=tokens))
        passes = schedule.iterations / rows.batches
        seconds = _total(rows.train, lambda samples: samples / SAMPLE_RATE) / rows.train.total()
        judged = [(rows.dev, schedule.validations), (rows.test, 1)]
        found.append(
            Estimate(
                task if name is None else f"{task} {name}",
                schedule,
                tokens,
                rows.train.total() / rows.batches,
                seconds,
                passes * _total(rows.train, encode),
                passes * TRAINING_OVER_FORWARD * _total(rows.train, recognise),
                sum(times * (_total(part, encode) + _total(part, recognise)) for part, times in judged),
            )
        )
    return found


def _costs(
    encoder: EncoderConfig | None, head: DownstreamConfig
) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Samples of a row -> operations of the encoder and of the downstream model `head`, both forward."""
    if encoder is None:  # what makes log-mel features is left out
        head = replace(head, projection=0)
        return lambda samples: 0.0, lambda samples: downstream_flops(head, samples // HOP + 1, inputs=head.channels)
    return (
        lambda samples: row_flops(encoder, samples=samples).forward,
        lambda samples: row_flops(encoder, head, samples=samples).head,
    )


def _total(rows: Counter[int], cost: Callable[[int], float]) -> float:
    return sum(count * cost(samples) for samples, count in rows.items())


def summed(estimates: Iterable[Estimate]) -> list[Estimate]:
    """The monolingual sets as one row, before the other tracks; of batches, rows and seconds the means over batches."""
    estimates = list(estimates)
    sets = [each for each in estimates if each.name.startswith("monolingual")]
    if len(sets) < 2:
        return estimates
    total = Schedule(*(sum(values) for values in zip(*(_numbers(each.schedule) for each in sets), strict=True)))
    weights = [each.schedule.iterations / total.iterations for each in sets]

    def mean(values: Iterable[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    one = Estimate(
        f"monolingual, {len(sets)} sets",
        total,
        max(each.tokens for each in sets),
        mean(each.rows for each in sets),
        mean(each.seconds for each in sets),
        *(sum(getattr(each, name) for each in sets) for name in ("encoder", "downstream", "judging")),
    )
    return [one, *(each for each in estimates if each not in sets)]


def _numbers(schedule: Schedule) -> tuple[int, ...]:
    return (schedule.published, schedule.iterations, schedule.validate_every, schedule.averaged)


def table(model: str, estimates: Sequence[Estimate], *, chip: Chip, utilisation: float, root: Path | None) -> str:
    """For people, in Markdown."""
    rate = chip.peak_flops * utilisation
    rows = f"of {root}, padded as in a run."
    if root is None:
        rows = f"as many as the published hours make, of {MEAN_SECONDS:.1f} s and padding; a multilingual model is "
        rows += f"taken to have {TOKENS['multilingual']:,} tokens. Give --mlsuperb DIR to count what is there."
    columns = "track | batches | rows x s | audio, h | encoder, PFLOP | downstream, PFLOP | judging, PFLOP | h | rows/s"
    lines = [
        f"An estimate by formula, nothing was run: {model} on one {chip.name} at {utilisation:.0%} of its "
        f"{chip.peak_flops / 1e12:g} TFLOP/s.",
        f"Rows: {rows}",
        "",
        f"| {columns} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for each in summed(estimates):
        rows = each.schedule.iterations * each.rows
        training = (each.encoder + each.downstream) / rate
        lines.append(
            f"| {each.name} | {each.schedule.iterations:,} | {each.rows:.1f} x {each.seconds:.1f} | "
            f"{rows * each.seconds / 3600:,.0f} | {each.encoder / 1e15:,.1f} | {each.downstream / 1e15:,.1f} | "
            f"{each.judging / 1e15:,.1f} | {each.operations / rate / 3600:,.2f} | {rows / training:,.0f} |"
        )
    total = sum(each.operations for each in estimates)
    lines += [
        f"| all | | | | | | | {total / rate / 3600:,.2f} | |",
        "",
        "h: hours on the chip. Judging: the dev set at each validation, and the test set. rows/s: what the host must",
        "read a second to keep the chip busy; if it reads less, it takes longer. The peak is that of bfloat16, and",
        "encoders are read in float32, for which GPUs have half of it, or less: --utilisation.",
    ]
    return "\n".join(lines)
