"""What the page of ML-SUPERB results draws: layers, languages, confusions, texts, training."""

import math
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from data_pipelines.languages import name_of
from data_pipelines.mlsuperb.layout import PARTS, Duration
from experiments.mlsuperb.gathered import Standing
from experiments.mlsuperb.leaderboard import MISSING, SETS
from experiments.mlsuperb.scoring import FEW_SHOT
from experiments.report import charts, matrix, trends
from experiments.report.page import Chart, Figure, Look, Note, Table, swatch
from experiments.report.results import count, duration, number, percent

TITLES = {  # of each track, the monolingual sets together
    "monolingual": "monolingual recognition",
    "multilingual": "multilingual recognition",
    "identification": "language identification",
    "joint": "language and recognition jointly",
    "challenge dev": "the challenge of ML-SUPERB 2.0",
    "challenge dev_dialect": "the challenge of ML-SUPERB 2.0, dialects",
}
MANY = 36  # languages; above, charts are cut in two, and of the confusions only the languages with most are drawn
FREQUENT = 30  # confusions that are listed
FEW = 10  # utterances; figures of a language with fewer are drawn hollow


def _anchor(task: str) -> str:
    return task.replace(" ", "-")


def _title(words: str) -> str:
    return words[:1].upper() + words[1:]


def figure_text(value: float) -> str:
    """A figure in percent; a dash where it is not known."""
    return MISSING if math.isnan(value) else f"{value:.1f}"


def bracketed(value: float, interval: Sequence[float] | None) -> str:
    """A figure with its interval."""
    return figure_text(value) + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval is not None else "")


def mark(model: str, looks: dict[str, Look]) -> Markup:
    """A model's mark and name, for a table cell."""
    return swatch(looks[model]) + model


def layer_blocks(own: dict[Duration, list[Standing]], looks: dict[str, Look]) -> list:
    """A chart a track: the share of each layer for each model; and a table of the heaviest layers."""
    pictures, rows, legend = [], [], {}
    for length, standing in own.items():
        for task in TITLES:
            drawn = []
            for each in standing:
                weights = weights_of(each, task)
                if weights is None:
                    continue
                place = list(range(len(weights)))
                blank = [math.nan] * len(weights)
                even = [1 / len(weights)] * len(weights)
                drawn.append(trends.Trend(looks[each.model], place, weights, blank, blank, even, [True] * len(weights)))
                legend[each.model] = looks[each.model]
                order = sorted(place, key=lambda layer: -weights[layer])[:3]
                heaviest = ", ".join(f"{layer} ({percent(weights[layer])})" for layer in order)
                middle = sum(layer * weight for layer, weight in enumerate(weights))
                rows.append([mark(each.model, looks), SETS[length], TITLES[task], str(len(weights) - 1), heaviest,
                             f"{middle:.1f}", percent(1 / len(weights))])  # fmt: skip
            if drawn:
                svg = trends.trends(
                    [(charts.Panel("share", charts.as_percent, zero=True), drawn)],
                    name=f"layers-{length}-{_anchor(task)}",
                    x_title="layer (0: the first layer's input)", width=340, spread=0.0,
                    alt=f"Share of each layer, {TITLES[task]}, {SETS[length]}.",
                )  # fmt: skip
                pictures.append(Chart(_title(f"{TITLES[task]}, {SETS[length]}"), svg))
    if not pictures:
        return []
    figure = Figure(
        pictures, [(swatch(look), model) for model, look in legend.items()],
        shows="The weights of the sum of hidden states, which add up to 1; of the monolingual sets their mean. The "
        "dashed line is the same for every layer: where training begins.",
        caution="layers are of different size: a weight is what the sum takes of a layer, not what the layer is worth. "
        "Shares that stay on the dashed line were hardly trained.",
    )  # fmt: skip
    columns = ["model", "set", "track", ">layers", "heaviest", ">mean layer", ">even share"]
    return [figure, Table(columns, rows, "Table: the heaviest layers", folded=len(rows) > 8)]


def weights_of(each: Standing, task: str) -> list[float] | None:
    """Layer weights of a track; of the monolingual one the mean over its sets. None without an encoder."""
    found = list(each.sets.values()) if task == "monolingual" else [each.tasks[task]] if task in each.tasks else []
    weights = [row["layer_weights"] for row in found if row["layer_weights"]]
    return np.mean(weights, axis=0).tolist() if weights else None


def language_blocks(own: dict[Duration, list[Standing]], looks: dict[str, Look]) -> list:
    """Of each set a figure with charts of each track, error rates and accuracies; then tables with intervals."""
    blocks: list[Any] = []
    for length, standing in own.items():
        pictures, tables = [], []
        for task, title in sorted(TITLES.items(), key=lambda item: item[0] == "monolingual"):  # last: it is one chart
            if task == "monolingual":
                figures = {each.model: {name: found["all"] for name, found in each.sets.items()} for each in standing}
            else:
                figures = {each.model: each.tasks[task]["languages"] for each in standing if task in each.tasks}
            for name, said in (("error_rate", "error rate"), ("accuracy", "languages right")):
                order = ordered(figures, name)
                if order:
                    pictures += bars(
                        figures, order, name, f"{title}, {said}", f"bars-{length}-{_anchor(task)}-{name}", looks
                    )
                    tables.append(language_table(figures, order, name, f"{title}, {said}, {SETS[length]}"))
        if pictures:
            models = [each.model for each in standing]
            blocks.append(
                Figure(
                    pictures, [(swatch(looks[model]), model) for model in models],
                    shows="A row a language, or a set of the monolingual track; best first, by the mean over models.",
                    caution=f"marks are hollow where there are fewer than {FEW} utterances. A language is mostly one "
                    "source, whose speakers and channel its figure is of, too; the tables have the intervals.",
                    title=_title(SETS[length]),
                )
            )  # fmt: skip
        blocks += tables
    return blocks


def ordered(figures: dict[str, dict[str, dict]], name: str) -> list[str]:
    """The languages that any model has this figure of, best first by the mean over models."""
    found: dict[str, list[float]] = {}
    for table in figures.values():
        for language, row in table.items():
            if math.isfinite(number(row.get(name))):
                found.setdefault(language, []).append(number(row[name]))
    sign = -1 if name == "accuracy" else 1
    return sorted(found, key=lambda each: (sign * float(np.mean(found[each])), each))


def heard(figures: dict[str, dict[str, dict]], language: str) -> float:
    """Test utterances of a language, the most that any model was asked."""
    return max(number(table[language]["utterances"]) for table in figures.values() if language in table)


def bars(
    figures: dict[str, dict[str, dict]], order: list[str], name: str, title: str, anchor: str, looks: dict[str, Look]
) -> list[Chart]:
    """The languages of `order` with their figures of each model; cut in two where there are many."""
    half = -(-len(order) // 2) if len(order) > MANY else len(order)
    every = [number(row.get(name)) for table in figures.values() for row in table.values()]
    pictures = []
    for first in range(0, len(order), half):
        some = order[first : first + half]
        series = []
        for model, table in figures.items():
            rows = [table.get(language, {}) for language in some]
            low, high = ([(row.get(f"{name}_interval") or (math.nan, math.nan))[end] for row in rows] for end in (0, 1))
            ends = {"low": low, "high": high} if len(figures) == 1 else {}  # of several they would hide each other
            strong = [number(row.get("utterances")) >= FEW for row in rows]
            series.append(charts.Series(looks[model], [number(row.get(name)) for row in rows], strong=strong, **ends))
        svg = charts.row_chart(
            [called(language) for language in some], series, name=f"{anchor}-{first}", zero=True,
            stems=len(figures) == 1, spans=len(figures) > 1,
            title="percent", show=lambda value: f"{value:g}", notes=[count(heard(figures, each)) for each in some],
            notes_title="utterances", width=490,
            limit=100.0 if name == "accuracy" else max(filter(math.isfinite, every)) or 100.0,
            alt=f"{_title(title)}, of each language.",
        )  # fmt: skip
        pictures.append(Chart(f"{_title(title)}{', the rest' * bool(first)}", svg))
    return pictures


def language_table(figures: dict[str, dict[str, dict]], order: list[str], name: str, title: str) -> Table:
    """The same with intervals."""
    rows = []
    for language in order:
        found = [table.get(language, {}) for table in figures.values()]
        cells = [bracketed(number(row.get(name)), row.get(f"{name}_interval")) for row in found]
        rows.append([called(language), count(heard(figures, language)), *cells])
    columns = ["language", ">utterances", *(f">{model}" for model in figures)]
    return Table(columns, rows, f"Table: {title}", folded=True)


def called(language: str) -> str:
    """ "swa Swahili"; the code alone where it is no language's, as of a set's name."""
    name = re.sub(r"\s*\([^()]*\)$", "", name_of(language) or "")
    return language if not name or name == language else f"{language} {name}"


def confusion_blocks(own: dict[Duration, list[Standing]]) -> list:
    """Of each set and track that names languages: a matrix a model, then its most frequent mistakes."""
    blocks: list[Any] = []
    for length, standing in own.items():
        for task in TITLES:
            found = {each.model: each.tasks[task].get("confusions") for each in standing if task in each.tasks}
            tables = {
                model: {spoken.strip("[]"): {str(said).strip("[]"): n for said, n in row.items()}
                        for spoken, row in table.items()}
                for model, table in found.items() if table
            }  # fmt: skip
            if not tables:
                continue
            wrong = {}
            for table in tables.values():
                for spoken, row in table.items():
                    wrong[spoken] = wrong.get(spoken, 0) + sum(n for said, n in row.items() if said != spoken)
            shown = sorted(sorted(wrong, key=lambda each: (-wrong[each], each))[:MANY])
            part = (
                "" if len(shown) == len(wrong) else f" The {len(shown)} of {len(wrong)} languages with most mistakes."
            )
            name = f"confusions-{length}-{_anchor(task)}"
            pictures = [Chart(model, confusion_matrix(table, shown, f"{name}-{place}", model), True)
                        for place, (model, table) in enumerate(tables.items())]  # fmt: skip
            blocks.append(
                Figure(
                    pictures,
                    [(swatch(Look("green", "s")), "right"), (swatch(Look("vermillion", "s")), "wrong")],
                    shows="A row is a language that was spoken; squares are larger and darker the more of its "
                    "utterances were said to be of the column's language. “Other”: no language, or one without a "
                    f"column.{part}",
                    caution="the benchmark trains and tests on the same sources, in which a language is often few "
                    "speakers on one channel: a language told apart here may be a source told apart.",
                    title=_title(f"{TITLES[task]}, {SETS[length]}"),
                )
            )
            for model, table in tables.items():
                blocks += mistakes(table, f"{model}, {TITLES[task]}, {SETS[length]}")
    return blocks


def confusion_matrix(table: dict[str, dict[str, int]], shown: list[str], name: str, model: str) -> Markup:
    """`table`: by the language that it is, how often each was said; of the languages `shown`."""
    columns = [*shown, "other"]
    shares = np.zeros((len(shown), len(columns)))
    for row, spoken in enumerate(shown):
        total = sum(table.get(spoken, {}).values())
        for said, n in table.get(spoken, {}).items():
            shares[row, columns.index(said if said in shown else "other")] += n / total
    return matrix.matrix(
        shares, rows=shown, columns=columns, diagonal=list(range(len(shown))), name=name,
        title="said", alt=f"Which language was said where each was spoken, by {model}.", 
        cell=14.0 if len(shown) <= 30 else 12.0,
    )  # fmt: skip


def mistakes(table: dict[str, dict[str, int]], title: str) -> list[Table]:
    """The most frequent of them; no table where there is none."""
    pairs = sorted(((n, spoken, said) for spoken, row in table.items() for said, n in row.items() if said != spoken),
                   key=lambda each: (-each[0], each[1], each[2]))  # fmt: skip
    rows = [[called(spoken), called(said) if re.fullmatch("[a-z]{3}", said) else said or "(nothing)", count(n),
             percent(n / sum(table[spoken].values()))] for n, spoken, said in pairs[:FREQUENT]]  # fmt: skip
    caption = f"Table: the most frequent of {len(pairs):,} confusions, {title}"
    columns = ["spoken", "said", ">utterances", ">of the language's"]
    return [Table(columns, rows, caption, folded=True)] if rows else []


def text_blocks(every: Sequence[Standing]) -> list:
    """A table a result, shown on request."""
    blocks = []
    for each in every:
        for found in each.every:
            rows = []
            for example in found["examples"]:
                rate = number(example["error_rate"])
                few = f", {FEW_SHOT}" * (example["group"] == FEW_SHOT)
                rows.append([f"{example['language']}, {example['source']}{few}",
                             *differing(example["reference"], example["hypothesis"], words=found["token"] == "phone"),
                             figure_text(rate) if math.isfinite(rate) else MISSING])  # fmt: skip
            caption = f"{each.model}, {found['track']}, {SETS[each.duration]}: {len(rows)} utterances"
            columns = ["utterance", "reference", "hypothesis", ">error rate"]
            blocks.append(Table(columns, rows, caption, folded=True, texts=True))
    return [Note("Underlined: in references what was missed, in hypotheses what was put in its place."), *blocks]


def differing(reference: str, hypothesis: str, *, words: bool = False) -> tuple[Markup, Markup]:
    """Both texts, escaped, with what the other has not underlined: characters, or whole `words` (phones).

    Capitals and small letters are the same, as where errors are counted.
    """
    left, right = (re.findall(r"\S+\s*", text) if words else list(text) for text in (reference, hypothesis))
    one, other = Markup(), Markup()
    plain = [[(part.strip() if words else part).lower() for part in side] for side in (left, right)]
    for kind, a, b, c, d in SequenceMatcher(None, *plain, autojunk=False).get_opcodes():
        parts = [escape("".join(left[a:b])), escape("".join(right[c:d]))]
        if kind != "equal":
            parts = [Markup("<u>{}</u>").format(part) if part else part for part in parts]
        one, other = one + parts[0], other + parts[1]
    return one, other or Markup("(nothing)")


def training_blocks(own: dict[Duration, list[Standing]], looks: dict[str, Look]) -> list:
    """Validation losses, what each track was trained on, what was left out, and each result's time."""
    blocks: list[Any] = []
    for length, standing in own.items():
        panels = []
        for task in TITLES:
            drawn = []
            for each in standing:
                if task in each.tasks:
                    losses = [row for row in each.tasks[task]["training"]["losses"] if "valid_loss" in row]
                    x, values = ([number(row.get(key)) for row in losses] for key in ("step", "valid_loss"))
                    blank = [math.nan] * len(x)
                    drawn.append(trends.Trend(looks[each.model], x, values, blank, blank, blank, [True] * len(x)))
            if any(trend.x for trend in drawn):
                panels.append((charts.Panel(f"loss on dev, {TITLES[task]}", None, zero=True), drawn))
        if panels:
            svg = trends.trends(panels, name=f"losses-{length}", x_title="batches", width=640, spread=0.0, height=84,
                                alt=f"Loss on the dev set over training, {SETS[length]}.")  # fmt: skip
            legend = [(swatch(looks[each.model]), each.model) for each in standing]
            blocks.append(Figure([Chart(SETS[length], svg, wide=True)], legend, shows="The loss on the dev set, by "
                                 "which the checkpoints that are averaged were chosen."))  # fmt: skip
    models, data = [], {}
    for standing in own.values():
        for each in standing:
            for found in each.every:
                model, machine = found["model"], found["machine"]
                models.append([mark(each.model, looks), each.duration, found["track"], model["identity"],
                               count(model["encoder_parameters"]), count(model["downstream_parameters"]),
                               count(found["protocol"]["iterations"]), duration(number(found["seconds"])),
                               str(machine.get("devices", ""))])  # fmt: skip
                data.setdefault((each.duration, found["track"]), found)
    columns = ["model", "set", "track", "what it is", ">encoder parameters", ">trained", ">batches", ">time", "on"]
    blocks.append(Table(columns, models, f"Table: {len(models)} results", folded=len(models) > 8))
    rows = []
    for (length, track), found in data.items():
        facts, unseen = found["data"], found["unseen_tokens"]
        left = sum(sum(reasons.values()) for reasons in found["left_out"].values())
        train = facts["parts"]["train"]
        rows.append([SETS[length], track, *(count(facts["parts"][part]["utterances"]) for part in PARTS),
                     f"{train['hours']:.2f}", count(train["languages"]), count(left),
                     f"{sum(unseen.values()):,} ({len(unseen):,})",
                     " / ".join(count(facts["infeasible"][part]["count"]) for part in PARTS)])  # fmt: skip
    columns = ["set", "track", *(f">{part}" for part in PARTS), ">hours of train", ">languages", ">left out"]
    columns += [">tokens of test not in train (different ones)", ">more tokens than frames (train / dev / test)"]
    blocks.append(Table(columns, rows, "Utterances"))
    untold = max(found["data"]["recordings_without_text"]["count"] for found in data.values())
    blocks.append(Note(f"Recordings without text: {untold:,}. results.json and left_out.tsv name what was left out."))
    return blocks
