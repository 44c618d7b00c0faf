"""From hypotheses to the benchmark's figures, by the published rules.

Error rates are pooled over the tokens of a group's utterances, as sclite's "Sum/Avg"
(`wavlab_jax.evaluation.error_rates`); groups are the normal and the few-shot languages. Identification counts
utterances. In the joint track the language's symbol is taken out of reference and hypothesis before characters are
counted, and the first symbol said is the answer (ESPnet `egs2/ml_superb/asr1/local/split_results.py`, `score.sh`).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from data_pipelines.mlsuperb.layout import Part
from data_pipelines.mlsuperb.texts import challenge_text, said_language, scored_characters
from data_pipelines.mlsuperb.tracks import Example, Track
from wavlab_jax.evaluation.error_rates import Errors, count_errors, pooled
from wavlab_jax.evaluation.intervals import of_pooled

NORMAL, FEW_SHOT = "normal", "few-shot"


class ScoringError(ValueError):
    """Hypotheses that do not belong to the utterances that are to be judged; names some of them."""


class Judged(NamedTuple):
    """One utterance: what was to be written, what was, and its errors; `said` names the language that was said."""

    example: Example
    hypothesis: str
    errors: Errors | None
    said: str | None

    @property
    def group(self) -> str:
        """Of the figures that it counts in."""
        return FEW_SHOT if self.example.utterance.few_shot else NORMAL

    @property
    def right(self) -> bool:
        """Whether the language was said right."""
        return self.said == f"[{self.example.utterance.language}]"


def judge(track: Track, hypotheses: Mapping[str, str], *, part: Part = "test", progress: bool = False) -> list[Judged]:
    """Every utterance of `part` with its hypothesis (by id; "" for a model that wrote nothing).

    Hypotheses of phone tracks are phones separated by spaces. Raises ScoringError if some are missing or unknown.
    """
    examples = track.parts[part]
    ids = {each.utterance.id for each in examples}
    for what, some in (("no hypothesis", ids - hypotheses.keys()), ("hypotheses of others", hypotheses.keys() - ids)):
        if some:
            raise ScoringError(f"track {track.name}: {what}: {', '.join(sorted(some)[:5])} ({len(some)} in all)")
    said = [hypotheses[each.utterance.id] for each in examples]
    errors: Sequence[Errors | None] = [None] * len(examples)
    if track.token_kind != "language":
        tokens = _tokenizer(track)
        errors = count_errors([tokens(e.text) for e in examples], [tokens(text) for text in said], progress=progress)
    named = [said_language(text) if track.symbols else None for text in said]
    return [Judged(*row) for row in zip(examples, said, errors, named, strict=True)]


def _tokenizer(track: Track) -> Callable[[str], list[str]]:
    """What an error rate counts of a text."""
    if track.token_kind == "phone":
        return str.split
    return lambda text: scored_characters(text, symbols=track.symbols)


def error_rate(judged: Sequence[Judged]) -> float:
    """Errors in percent of the references' tokens; NaN where there are none."""
    return 100 * pooled([each.errors for each in judged if each.errors is not None]).rate


def chance(track: Track, judged: Sequence[Judged]) -> dict:
    """What knows nothing of speech reaches, in percent: by group, and "all".

    "uniform": one of the languages of the training set, drawn evenly. "majority": always the most frequent one there,
    which `language` names. An error rate is 100 for whoever writes nothing.
    """
    if not track.symbols:
        return {"error_rate": 100.0}
    counts = Counter(each.utterance.language for each in track.parts["train"])
    frequent = max(sorted(counts), key=lambda language: counts[language])
    groups = {"all": judged, **by(judged, lambda each: each.group)}

    def share(some: Sequence[Judged]) -> float:
        return 100 * sum(each.example.utterance.language == frequent for each in some) / len(some)

    return {
        "languages": len(track.symbols),
        "uniform": 100 / len(track.symbols),
        "language": frequent,
        "majority": {name: share(some) for name, some in groups.items()},
    } | ({} if track.token_kind == "language" else {"error_rate": 100.0})


def accuracy(judged: Sequence[Judged]) -> float:
    """Utterances whose language was said right, in percent; NaN where there are none."""
    return 100 * sum(each.right for each in judged) / len(judged) if judged else float("nan")


def by(judged: Sequence[Judged], key: Callable[[Judged], str]) -> dict[str, list[Judged]]:
    """The utterances by a key, keys in order."""
    parts: dict[str, list[Judged]] = {}
    for each in judged:
        parts.setdefault(key(each), []).append(each)
    return dict(sorted(parts.items()))


def figures(track: Track, judged: Sequence[Judged]) -> dict:
    """All figures of a track as JSON: overall, by group, by language and by source; what is not measured is absent.

    Each has a 95 % interval over utterances: `<name>_interval` [low, high].
    """

    def of(some: Sequence[Judged]) -> dict:
        row: dict = {"utterances": len(some)}
        if track.token_kind != "language":
            errors = pooled([each.errors for each in some])
            if errors.tokens:  # of references that are all empty there is none
                row |= {"error_rate": error_rate(some), "error_rate_interval": _error_interval(some)}
            row |= errors._asdict()
        if track.symbols:
            row |= {"accuracy": accuracy(some), "accuracy_interval": _accuracy_interval(some)}
        return row

    return {
        "track": track.name,
        "set": track.duration,
        "token": track.token_kind,
        "all": of(judged),
        "groups": {name: of(some) for name, some in by(judged, lambda each: each.group).items()},
        "languages": {
            name: of(some) for name, some in by(judged, lambda each: each.example.utterance.language).items()
        },
        "sources": {name: of(some) for name, some in by(judged, lambda each: each.example.utterance.source).items()},
        "left_out": {part: dict(Counter(each.reason for each in rows)) for part, rows in track.left_out.items()},
        "unseen_tokens": dict(track.unseen("test").most_common()),
    } | ({"confusions": confusions(judged)} if track.symbols else {})


def _error_interval(judged: Sequence[Judged]) -> list[float]:
    found = [each.errors for each in judged]
    return _percent([each.total for each in found], [each.tokens for each in found])


def _accuracy_interval(judged: Sequence[Judged]) -> list[float]:
    return _percent([each.right for each in judged], [1] * len(judged))


def _percent(totals: Sequence[int], weights: Sequence[int]) -> list[float]:
    interval, _ = of_pooled(totals, weights)
    return [100 * interval.low, 100 * interval.high]


def confusions(judged: Sequence[Judged]) -> dict[str, dict[str, int]]:
    """By the language that it is: how often each was said, most frequent first."""
    found = {}
    for language, some in by(judged, lambda each: f"[{each.example.utterance.language}]").items():
        found[language] = dict(Counter(each.said for each in some).most_common())
    return found


class ChallengeScores(NamedTuple):
    """ML-SUPERB 2.0's figures, in percent: means over languages of the means over a language's utterances."""

    accuracy: float
    error_rate: float
    deviation: float
    worst_15: float


def challenge_scores(judged: Sequence[Judged]) -> ChallengeScores:
    """The challenge's scorer on a joint track (ESPnet `egs2/ml_superb2/asr1/local/score.py`), without its rounding.

    A reference that is empty without punctuation counts nowhere; the edit distance is the plain one; `deviation` is
    the sample's, over languages; `worst_15` is the mean of the fifteen highest rates (it divides by 15, so that fewer
    languages make it lower). Raises ScoringError if a language has no reference left.
    """
    rates, accuracies = [], []
    for language, some in by(judged, lambda each: f"[{each.example.utterance.language}]").items():
        own, right = [], []
        for each in some:
            # it cuts five characters, "[xxx]", whatever they are
            reference, hypothesis = (
                challenge_text(t[5:], language=language) for t in (each.example.text, each.hypothesis)
            )
            if not reference:
                continue
            own.append(edit_distance(reference, hypothesis) / len(reference))
            right.append(each.hypothesis[:5] == language)
        if not own:
            raise ScoringError(f"{language} has no reference with a letter in it")
        rates.append(100 * sum(own) / len(own))
        accuracies.append(100 * sum(right) / len(right))
    mean = sum(rates) / len(rates)
    spread = (sum((rate - mean) ** 2 for rate in rates) / max(len(rates) - 1, 1)) ** 0.5
    return ChallengeScores(sum(accuracies) / len(accuracies), mean, spread, sum(sorted(rates, reverse=True)[:15]) / 15)


def averages(judged: Sequence[Judged]) -> dict:
    """`challenge_scores` as JSON; or a note that says why there are none."""
    try:
        return challenge_scores(judged)._asdict()
    except ScoringError as error:
        return {"note": str(error)}


def edit_distance(reference: str, hypothesis: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions weigh the same."""
    row = list(range(len(hypothesis) + 1))
    for i, token in enumerate(reference, 1):
        before, row = row, [i]
        for j, other in enumerate(hypothesis, 1):
            row.append(min(before[j - 1] + (token != other), before[j] + 1, row[-1] + 1))
    return row[-1]
