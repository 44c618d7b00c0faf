"""What turns classes of a CTC head into text in transformers: the tokenizer's files, kept as they are or made anew.

They travel as `Checkpoint.settings["tokenizer"]`: {file name: its content}. Classes keep their numbers, so that the
head's rows need no permutation: the blank is whatever class the model was trained with (0 here), named as the
tokenizer's padding token and as `pad_token_id` of config.json, which transformers' CTC takes for its blank.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from wavlab_jax.convert.names import ConvertError

TOKENIZER_FILES = ("vocab.json", "tokenizer_config.json", "special_tokens_map.json")
PROCESSOR = "Wav2Vec2Processor"
# What wav2vec 2.0's tokenizers write for a space: one character, so that they can read a text as well. transformers 5
# takes it for one whatever tokenizer_config.json says, so that a bar of the texts is written as one that looks like it.
DELIMITER, BARS = "|", ("｜", "∣", "│")
_PHONES = "Wav2Vec2PhonemeCTCTokenizer"
RUNS_CODE = "auto_map"  # an entry by which a folder brings Python of its own along


def tokenizer_files(
    tokens: Sequence[str], *, blank: str, unknown: str, end: str, space: str, phones: bool = False
) -> dict[str, Any]:
    """The files of a tokenizer whose class i is `tokens[i]`.

    Args:
        tokens: of the head, each once.
        blank, unknown, end: tokens with these parts.
        space: the token that stands for a space, if there is one.
        phones: tokens are phones (or names of languages), which are written with a space between them.

    Raises ConvertError: a token is there twice, or nothing that looks like a bar is left to stand for one.
    """
    written = {space: DELIMITER, DELIMITER: bar_for(tokens)} if space in tokens else {}
    names = [written.get(token, token) for token in tokens]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ConvertError(
            f"the vocabulary has {', '.join(twice[:5])} more than once ({DELIMITER!r} is written for {space!r}, "
            f"{written.get(DELIMITER, DELIMITER)!r} for {DELIMITER!r}): transformers' tokenizers need every token "
            "once; leave it out of the texts"
        )
    for part, token in (("blank", blank), ("unknown", unknown), ("end", end)):
        if token not in names:
            raise ConvertError(f"the vocabulary of {len(tokens)} tokens has no {token!r}, the {part} token")
    kind = _PHONES if phones else "Wav2Vec2CTCTokenizer"
    own = {"do_phonemize": False, "phone_delimiter_token": " "} if phones else {}
    return {
        "vocab.json": {name: index for index, name in enumerate(names)},
        "tokenizer_config.json": {
            "tokenizer_class": kind,
            "processor_class": PROCESSOR,
            "pad_token": blank,
            "unk_token": unknown,
            "bos_token": end,
            "eos_token": end,
            "do_lower_case": False,
            "clean_up_tokenization_spaces": False,
            "word_delimiter_token": DELIMITER if space in tokens else None,
            **own,
        },
    }


def bar_for(tokens: Sequence[str]) -> str:
    """What is written for a bar in a vocabulary: the first of `BARS` that it does not have, or the last of them."""
    return next((bar for bar in BARS if bar not in tokens), BARS[-1])


def fine_tuned_settings(files: Mapping[str, Any], *, dropout: float) -> dict[str, Any]:
    """Fields of `Checkpoint.settings["fine_tuning"]` that belong to such a tokenizer, and to a head with `dropout`.

    The loss there is as here: a row's, not divided by its labels, and none of rows whose labels do not fit.
    """
    vocabulary, config = files["vocab.json"], files["tokenizer_config.json"]
    numbers = {f"{part}_token_id": vocabulary[config[f"{part}_token"]] for part in ("pad", "bos", "eos")}
    return {**numbers, "final_dropout": dropout, "ctc_loss_reduction": "sum", "ctc_zero_infinity": True}


def text_of(classes: Iterable[int], files: Mapping[str, Any]) -> str:
    """What the best class of each frame spells by files that `tokenizer_files` made: repeats out, then blanks."""
    config, names = files["tokenizer_config.json"], {number: name for name, number in files["vocab.json"].items()}
    said = [names[number] for number, _ in groupby(map(int, classes))]
    said = [name for name in said if name != config["pad_token"]]
    if config["tokenizer_class"] == _PHONES:
        return " ".join(said)
    return "".join(" " if name == config["word_delimiter_token"] else name for name in said).strip()


def read_tokenizer(folder: Path, read_json) -> dict[str, Any]:
    """The tokenizer's files in a folder, those that are there; none without a vocabulary."""
    if not (folder / TOKENIZER_FILES[0]).is_file():
        return {}
    files = {name: read_json(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    return {name: {key: value for key, value in said.items() if key != RUNS_CODE} for name, said in files.items()}
