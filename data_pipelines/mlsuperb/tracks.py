"""The tracks of ML-SUPERB: which utterances each trains on and is judged by, and what is to be written of them.

    monolingual      13 models, each trained on one source of a language and tested on all of its sources; phones for
                     Mandarin and Japanese, else characters (ESPnet `single_lang_data_prep.py`, `run_mono.sh`)
    multilingual     one model, the characters of all languages; judged on normal and few-shot languages apart
    identification   the language alone: one token an utterance
    joint            the language's token, a space, the characters

Tokens are those of the training texts, ordered by how often they occur, between <blank>, <unk> and <sos/eos>
(ESPnet `asr.sh`, stage 5), so that a model's outputs are as many as the published ones'.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from data_pipelines.mlsuperb.layout import (
    PARTS,
    Duration,
    LeftOut,
    MlSuperbError,
    Part,
    Split,
    Utterance,
    read_split,
    unsayable_languages,
)
from data_pipelines.mlsuperb.phones import phonemizer_for
from data_pipelines.mlsuperb.texts import characters, language_symbol, listed, reference

Task = Literal["monolingual", "multilingual", "identification", "joint"]
TASKS: tuple[Task, ...] = ("monolingual", "multilingual", "identification", "joint")
BLANK, UNKNOWN, END = "<blank>", "<unk>", "<sos/eos>"


class MonolingualSet(NamedTuple):
    """One of the 13: the language, and the source that it is trained on."""

    language: str
    source: str


MONOLINGUAL_SETS: dict[str, MonolingualSet] = {
    "eng1": MonolingualSet("eng", "mls"),
    "eng2": MonolingualSet("eng", "nchlt"),
    "eng3": MonolingualSet("eng", "voxpopuli"),
    "fra1": MonolingualSet("fra", "voxforge"),
    "fra2": MonolingualSet("fra", "voxpopuli"),
    "deu1": MonolingualSet("deu", "swc"),
    "deu2": MonolingualSet("deu", "voxpopuli"),
    "rus": MonolingualSet("rus", "M-AILABS"),
    "swa": MonolingualSet("swa", "ALFFA"),
    "swe": MonolingualSet("swe", "NST"),
    "jpn": MonolingualSet("jpn", "commonvoice"),
    "cmn": MonolingualSet("cmn", "fleurs"),
    "xty": MonolingualSet("xty", "mexico-el"),
}
PHONE_LANGUAGES = frozenset({"cmn", "jpn"})


class Example(NamedTuple):
    """An utterance, what is to be written of it, and the tokens of that."""

    utterance: Utterance
    text: str
    tokens: list[str]


class Track(NamedTuple):
    """What one model is trained on and judged by.

    Attributes:
        name: the task, and of monolingual tracks the set: "monolingual eng1".
        task, duration: of it.
        parts: "train", "dev", "test": examples in the order of the folder.
        left_out: rows of each part that are not used, with reasons.
        tokens: the model's outputs, the index in this list being the class; <blank> is 0.
        symbols: tokens that name a language.
        token_kind: what an error rate counts: "character", "phone" or "language".
    """

    name: str
    task: Task
    duration: Duration
    parts: dict[Part, list[Example]]
    left_out: dict[Part, list[LeftOut]]
    tokens: list[str]
    symbols: list[str]
    token_kind: Literal["character", "phone", "language"]

    def encode(self, tokens: Sequence[str]) -> list[int]:
        """Classes of tokens; those that training never saw are <unk>."""
        known = {token: index for index, token in enumerate(self.tokens)}
        return [known.get(token, 1) for token in tokens]

    def unseen(self, part: Part) -> Counter:
        """Tokens of a part's texts that training never saw, and how often they occur: no model can write them."""
        return Counter(token for _, unseen in self.with_unseen(part) for token in unseen)

    def with_unseen(self, part: Part) -> Iterator[tuple[Example, list[str]]]:
        """Examples of a part that have such tokens, with them.

        White space that is none of ASCII's is one in train and dev; in test it is scored as a space (`listed`).
        """
        known = set(self.tokens)
        for each in self.parts[part]:
            tokens = listed(each.tokens) if part == "test" else each.tokens
            if unseen := [token for token in tokens if token not in known]:
                yield each, unseen


def read_track(root: Path, task: Task, *, duration: Duration, monolingual: str | None = None) -> Track:
    """The track of `task` on the set of `duration`, from the benchmark's folder; `monolingual` names one of the 13.

    Raises MlSuperbError: no such set; a part without any utterance, which nothing can be trained on or judged by; in
    tracks that name languages, a folder of one that no hypothesis can name.
    """
    if (task == "monolingual") != (monolingual is not None):
        raise MlSuperbError(f"the monolingual track, and only that, has sets: {', '.join(MONOLINGUAL_SETS)}")
    if monolingual is not None and monolingual not in MONOLINGUAL_SETS:
        raise MlSuperbError(f"no monolingual set {monolingual!r}; there are {', '.join(MONOLINGUAL_SETS)}")
    if task in ("identification", "joint") and (unsayable := unsayable_languages(root)):
        raise MlSuperbError(
            f"{root}: no hypothesis can name the language of {', '.join(unsayable)}: folders of languages are named by "
            "ISO 639-3, in small letters; rename or remove them"
        )
    name = task if monolingual is None else f"{task} {monolingual}"
    splits = {part: _split(Path(root), part, task, duration=duration, monolingual=monolingual) for part in PARTS}
    write = _writer(task, monolingual)
    texts = {part: [(each, *write(each)) for each in split.utterances] for part, split in splits.items()}
    for part in ("train", "dev"):  # ESPnet `asr.sh`, "Remove empty text": of phones, once they are made
        silent = [each for each, _, tokens in texts[part] if not tokens]
        splits[part].left_out.extend(LeftOut(str(each.path), "no phones") for each in silent)
        texts[part] = [row for row in texts[part] if row[2]]
    for part, split in splits.items():
        if not texts[part]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in split.reasons().most_common())
            raise MlSuperbError(f"{root}: track {name} has no {part} utterance{f': {reasons}' if reasons else ''}")
    symbols = sorted({language_symbol(each.language) for each, *_ in texts["train"]})
    if task in ("monolingual", "multilingual"):
        symbols = []
    parts = {part: [Example(*each) for each in rows] for part, rows in texts.items()}
    counts = Counter(token for example in parts["train"] for token in listed(example.tokens))
    known = sorted(counts, key=lambda token: -counts[token])  # a stable sort: ties by first occurrence
    kind = "language" if task == "identification" else "character"
    if monolingual is not None and MONOLINGUAL_SETS[monolingual].language in PHONE_LANGUAGES:
        kind = "phone"
    left_out = {part: split.left_out for part, split in splits.items()}
    return Track(name, task, duration, parts, left_out, [BLANK, UNKNOWN, *known, END], symbols, kind)


def _split(root: Path, part: Part, task: Task, *, duration: Duration, monolingual: str | None) -> Split:
    if monolingual is None:
        return read_split(root, part, duration=duration, text_needed=task == "multilingual")
    language, source = MONOLINGUAL_SETS[monolingual]
    sources = None if part == "test" else (source,)
    return read_split(
        root, part, duration=duration, languages=(language,), sources=sources, few_shot_rule=False, brackets=False
    )


def _writer(task: Task, monolingual: str | None) -> Callable[[Utterance], tuple[str, list[str]]]:
    """A function from an utterance to its reference text and that text's tokens."""
    if task == "identification":
        return lambda each: (language_symbol(each.language), [language_symbol(each.language)])
    if task == "joint":

        def joint(each: Utterance) -> tuple[str, list[str]]:
            symbol = language_symbol(each.language)
            text = reference(each.text, brackets=True, symbol=symbol)
            return text, characters(text, symbols=(symbol,))

        return joint
    if monolingual is None:
        return lambda each: _spelled(reference(each.text, brackets=True))
    language = MONOLINGUAL_SETS[monolingual].language
    if language not in PHONE_LANGUAGES:
        return lambda each: _spelled(reference(each.text, brackets=False))

    made_by = cache(phonemizer_for)  # asked for by the first text that is not phones already

    def phones(each: Utterance) -> tuple[str, list[str]]:
        text = " ".join(reference(each.text, brackets=False).split())
        said = each.text.split() if each.phones else made_by(language)(text)
        return " ".join(said), said

    return phones


def _spelled(text: str) -> tuple[str, list[str]]:
    return text, characters(text)


def monolingual_score(rates: dict[str, float]) -> float:
    """Mean over languages of the mean over a language's sets, of error rates by set name (`mono_superb_score.py`).

    Raises MlSuperbError if one of the 13 is missing.
    """
    missing = [name for name in MONOLINGUAL_SETS if name not in rates]
    if missing:
        raise MlSuperbError(f"the monolingual score is of all 13 sets; there is none of {', '.join(missing)}")
    by_language: dict[str, list[float]] = {}
    for name, each in MONOLINGUAL_SETS.items():
        by_language.setdefault(each.language, []).append(rates[name])
    return sum(sum(own) / len(own) for own in by_language.values()) / len(by_language)
