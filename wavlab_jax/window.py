"""What has been measured since the last line of metrics, added up on the host, and the line that it becomes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from wavlab_jax.metrics import Sum
from wavlab_jax.step import StepResult

Group = dict[str, np.ndarray]  # name -> float64 [...] of counts and extremes, [2, ...] (total, weight) of sums


@dataclass(frozen=True)
class Window:
    """Sums in float64 of every step since the last line; a checkpoint carries them exactly, as plain numbers.

    Attributes:
        added: by group ("sums", "languages", "counts", "layers", "updates"), as `StepResult` has them.
        extremes: the largest of each.
        gradient_norm: sum over steps. steps: how many.
    """

    added: dict[str, Group] = field(default_factory=dict)
    extremes: Group = field(default_factory=dict)
    gradient_norm: float = 0.0
    steps: int = 0

    @classmethod
    def restored(cls, record: dict | None) -> "Window":
        """What `record` gave to a checkpoint; empty if there is none."""
        if not record:
            return cls()
        added = {group: _arrays(terms) for group, terms in record["added"].items()}
        return cls(added, _arrays(record["extremes"]), record["gradient_norm"], record["steps"])

    def record(self) -> dict:
        """As numbers, lists and dicts, for JSON."""
        added = {group: {name: array.tolist() for name, array in terms.items()} for group, terms in self.added.items()}
        extremes = {name: array.tolist() for name, array in self.extremes.items()}
        return {"added": added, "extremes": extremes, "gradient_norm": self.gradient_norm, "steps": self.steps}

    def plus(self, result: StepResult) -> "Window":
        """This window and one more step, whose arrays are on the host."""
        new = {group: _arrays(getattr(result, group)) for group in ("sums", "languages", "counts", "layers", "updates")}
        extremes, norm = _arrays(result.extremes), self.gradient_norm + float(result.gradient_norm)
        if not self.steps:
            return Window(new, extremes, norm, 1)
        added = {group: {name: self.added[group][name] + new[group][name] for name in new[group]} for group in new}
        extremes = {name: np.maximum(self.extremes[name], extremes[name]) for name in extremes}
        return Window(added, extremes, norm, self.steps + 1)

    def line(self, languages: Sequence[str]) -> dict:
        """Everything divided once: numbers by name, and the objects "languages", "layers" and "modules".

        `languages` are the names of the manifest's; only those that were heard stand in the line.
        """
        if not self.steps:
            return {}
        updates = self.added["updates"]
        squares = sum(array.reshape(2, -1).sum(axis=1) for array in updates.values())
        return {
            **{name: float(_divided(pair)) for name, pair in self.added["sums"].items()},
            **{name: perplexity(counts) for name, counts in self.added["counts"].items()},
            "gradient_norm": self.gradient_norm / self.steps,
            "update_to_weight": math.sqrt(_divided(squares)),
            **self._hidden(),
            "languages": self._languages(languages),
            "modules": {
                name: {"update_to_weight": _short(math.sqrt(_divided(pair)))}
                for name, pair in updates.items()
                if name != "layers"
            },
        }

    def _languages(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """By language, in the manifest's order: each term, and the frames that it was divided by."""
        terms = self.added["languages"]
        if not terms:
            return {}
        frames = next(iter(terms.values()))[1]
        return {
            names[index]: {
                **{name: _short(_divided(pair[:, index])) for name, pair in terms.items()},
                "frames": float(frames[index]),
            }
            for index in np.flatnonzero(frames).tolist()
        }

    def _hidden(self) -> dict:
        """Of the hidden states, all together and by layer; nothing where they were not watched."""
        if not self.extremes:
            return {}
        return {
            "largest_hidden": float(self.extremes["largest"].max()),
            "nonfinite_hidden": float(_divided(self.added["layers"]["nonfinite"].sum(axis=1))),
            "layers": self._layers(),
        }

    def _layers(self) -> dict[str, dict[str, float]]:
        """By number: 0 is the first layer's input, n is layer n and its output."""
        largest, nonfinite = self.extremes["largest"], self.added["layers"]["nonfinite"]
        lines = {
            str(index): {"largest": _short(value), "nonfinite": _short(_divided(nonfinite[:, index]))}
            for index, value in enumerate(largest)
        }
        updates = self.added["updates"].get("layers")  # none where the encoder is frozen
        for index, pair in enumerate([] if updates is None else updates.T, 1):
            lines[str(index)]["update_to_weight"] = _short(math.sqrt(_divided(pair)))
        return lines


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of counts [units]: how many units, used alike, would be as varied; NaN of nothing."""
    total = counts.sum()
    if not total:
        return math.nan
    shares = counts[counts > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _arrays(terms) -> Group:
    return {name: np.asarray(array, np.float64) for name, array in terms.items()}


def _divided(pair: np.ndarray | Sum) -> float:
    total, weight = pair
    return float(total) / float(weight) if weight else math.nan


def _short(value: float) -> float:
    """To six digits: thousands of lines hold hundreds of such numbers."""
    return float(f"{value:.6g}")
