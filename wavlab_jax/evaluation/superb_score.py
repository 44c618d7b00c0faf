"""SUPERB points of ML-SUPERB, and the published rows that they are taken against.

SUPERBs(u) = 1000 / |T| * sum over tasks t of the mean over t's metrics i of
    (s_ti(u) - s_ti(log-mel)) / (s_ti(best) - s_ti(log-mel))
with the tasks monolingual ASR, multilingual ASR, language identification, and both together (2305.10615 section 2.4;
SUPERB-SG, 2203.06849, has the formula). `best` is the best of the compared pool, column by column, so that points from
different pools are not comparable: who states them states the pool.

The rows of 2024 are those of mHuBERT-147 (2406.06371, table 3), with log-mel's of 2305.10615; from them the formula
gives all fourteen published numbers. The rows of 2023 are those of 2305.10615 that give theirs; four of the hour's
are left out, of which no firm figures are at hand, so that a best value there may be off by 0.1.
"""

from typing import NamedTuple


class SuperbError(ValueError):
    """Scores from which no points can be computed; names the column."""


class Scores(NamedTuple):
    """A model's seven figures on one of the two sets (ten minutes or one hour a language), in percent.

    Error rates of characters (of phones for Mandarin and Japanese alone), and accuracies of language identification.
    """

    monolingual: float
    multilingual_normal: float
    multilingual_few_shot: float
    identification: float
    joint_identification: float
    joint_normal: float
    joint_few_shot: float


HIGHER_IS_BETTER = Scores(False, False, False, True, True, False, False)
TASKS: dict[str, tuple[str, ...]] = {
    "monolingual ASR": ("monolingual",),
    "multilingual ASR": ("multilingual_normal", "multilingual_few_shot"),
    "language identification": ("identification",),
    "joint": ("joint_identification", "joint_normal", "joint_few_shot"),
}


class Row(NamedTuple):
    """A published model: millions of parameters (None where the table does not say), scores, and its points there."""

    model: str
    parameters: int | None
    scores: Scores
    points: float


LOG_MEL = {
    "10min": Scores(72.1, 62.4, 58.3, 11.1, 35.9, 62.0, 58.9),
    "1h": Scores(63.7, 59.3, 57.4, 9.3, 43.5, 58.6, 58.1),
}


def _rows(text: str) -> tuple[Row, ...]:
    rows = []
    for line in text.strip().splitlines():
        model, parameters, *figures = line.split()
        *scores, points = map(float, figures)
        rows.append(Row(model, None if parameters == "-" else int(parameters), Scores(*scores), points))
    return tuple(rows)


# By the year of the pool, then by the set.
PUBLISHED: dict[str, dict[str, tuple[Row, ...]]] = {
    "2024": {
        "10min": _rows("""
            MMS-1B                 965  33.3 21.3 30.2 84.8 73.3 26.0 25.4  983.5
            mHuBERT-147             95  34.2 23.6 33.2 85.3 81.4 26.2 34.9  949.8
            MMS-300M               317  33.8 28.7 36.5 62.3 71.9 31.5 30.9  824.9
            NWHC1                  317  39.5 28.9 41.4 67.1 77.1 28.8 40.3  774.4
            NWHC2                  317  39.5 29.3 42.0 64.4 77.4 28.4 41.5  759.9
            XLS-R-300M             317  39.7 29.2 40.9 66.9 55.6 28.4 42.1  730.8
            WavLabLM-large-MS      317  40.5 37.8 43.8 71.7 70.8 37.0 43.4  707.5
        """),
        "1h": _rows("""
            MMS-1B                 965  25.7 18.1 30.8 86.1 74.8 25.5 24.8  948.1
            mHuBERT-147             95  26.3 22.0 32.9 91.0 90.0 22.1 33.5  950.2
            MMS-300M               317  30.5 24.0 36.5 84.3 74.3 30.0 29.2  844.3
            NWHC1                  317  30.5 21.5 38.6 87.4 90.6 21.5 38.2  876.9
            NWHC2                  317  30.5 21.6 39.3 88.1 90.6 21.8 38.8  873.3
            XLS-R-300M             317  30.6 22.0 39.3 87.9 85.6 22.9 42.4  850.5
            WavLabLM-large-MS      317  32.8 31.9 42.8 81.1 80.0 32.2 41.2  740.9
        """),
    },
    "2023": {
        "10min": _rows("""
            wav2vec2-base            -  44.2 43.0 45.7 54.4 66.9 40.6 44.2  755.2
            wav2vec2-large           -  42.0 42.6 45.8 30.9 54.6 45.5 50.3  598.3
            robust-wav2vec2-large    -  44.4 40.1 45.4 50.8 33.1 38.6 44.9  680.3
            wav2vec2-base-23         -  49.2 37.7 43.4 58.7 45.1 37.2 44.3  735.7
            wav2vec2-large-23        -  42.0 42.1 44.3  1.1 21.8 43.4 46.1  433.8
            XLSR-53                  -  49.5 33.9 43.6  6.6 45.6 33.4 43.2  528.8
            XLSR-128                 -  39.7 29.2 40.9 66.9 55.6 28.4 42.1  947.5
            HuBERT-base              -  42.8 39.8 44.5 61.2 71.5 39.2 43.8  831.9
            HuBERT-large             -  38.2 44.4 48.2 46.5 55.4 45.6 49.3  678.7
            HuBERT-base-cmn          -  43.1 40.8 45.4 49.3 75.1 37.7 43.5  779.0
            HuBERT-large-cmn         -  39.4 42.6 45.8 39.5 66.4 41.9 45.2  715.4
            mHuBERT-base             -  41.0 40.5 45.6 52.4 46.6 36.8 44.2  746.2
        """),
        "1h": _rows("""
            wav2vec2-base            -  35.9 35.5 44.3 80.8 83.6 32.1 42.6  827.2
            wav2vec2-large           -  35.4 35.7 43.9  8.0 78.2 34.7 42.2  586.9
            wav2vec2-large-23        -  34.2 35.3 42.4 64.2 49.7 35.2 43.1  724.9
            XLSR-53                  -  34.9 26.9 40.6 87.1 76.9 28.6 44.6  894.0
            XLSR-128                 -  30.6 22.0 39.3 87.9 85.6 22.9 42.4  996.0
            HuBERT-base              -  35.3 31.4 42.7 86.1 86.0 30.9 41.8  884.9
            HuBERT-large             -  32.2 37.7 43.5 64.1 77.7 35.1 42.2  783.6
            mHuBERT-base             -  33.0 33.4 43.6 72.5 70.9 29.7 43.1  812.7
        """),
    },
}


def best_of(pool: tuple[Scores, ...]) -> Scores:
    """The best value of each column. Raises SuperbError on an empty pool."""
    if not pool:
        raise SuperbError("the pool that the best values are taken of is empty")
    return Scores(*(max(c) if up else min(c) for c, up in zip(zip(*pool, strict=True), HIGHER_IS_BETTER, strict=True)))


def superb_points(scores: Scores, *, log_mel: Scores, best: Scores) -> float:
    """0 for `log_mel`, 1000 for the best in every column; below 0 and above 1000 are possible.

    Raises SuperbError if a column's best is log-mel itself, which leaves nothing to divide by, or a score is missing.
    """
    tasks = []
    for names in TASKS.values():
        shares = []
        for name in names:
            ours, floor, top = (getattr(each, name) for each in (scores, log_mel, best))
            if ours is None or top == floor:
                what = "missing" if ours is None else f"{floor:g} for log-mel and for the best of the pool alike"
                raise SuperbError(f"no SUPERB points: {name} is {what}")
            shares.append((ours - floor) / (top - floor))
        tasks.append(sum(shares) / len(shares))
    return 1000 * sum(tasks) / len(tasks)


def published_points(scores: Scores, *, pool: str, duration: str) -> float:
    """Points against a published pool ("2023" or "2024") on the set "10min" or "1h"; the pool is not extended."""
    best = best_of(tuple(row.scores for row in PUBLISHED[pool][duration]))
    return superb_points(scores, log_mel=LOG_MEL[duration], best=best)
