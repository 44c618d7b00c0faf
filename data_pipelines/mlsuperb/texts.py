"""Texts and tokens of ML-SUPERB, as published (ESPnet `egs2/ml_superb/asr1/local` and `espnet2/text`)."""

import re
import string
import unicodedata
from collections.abc import Iterable, Sequence

SPACE = "<space>"
UNKNOWN_LANGUAGE = "[UNK]"
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_BLANKS = re.compile(r"[ \t\n\r\f\v]+")
_BRACKETS = re.compile(r"\[[^()]*\]")
_LANGUAGE = re.compile(r"\[[a-z]{3}\]")
_LONG_LANGUAGE = re.compile(r"\[[a-z]{3}_[a-z]{3}\]")  # [org_jpn]


def without_brackets(text: str) -> str:
    """Text without what stands between the first [ and the last ] with no parenthesis between them.

    The multilingual tracks do this, the monolingual one does not (`data_prep.py`, `single_lang_data_prep.py`).
    """
    return _BRACKETS.sub("", text)


def single_spaced(text: str) -> str:
    """Text without white space at its ends, and one space for ASCII's within; a no-break space, for one, stays.

    Kaldi's `apply_map.pl` splits bytes, `espnet2/fileio/read_text.py` strips text.
    """
    return _BLANKS.sub(" ", text).strip()


def reference(text: str, *, brackets: bool, symbol: str = "") -> str:
    """What a recogniser is to write of a transcript's text, after a language's `symbol`.

    No ASCII punctuation, capitals, `single_spaced`; other scripts' punctuation stays. `brackets`: `without_brackets`.
    """
    said = without_brackets(text) if brackets else text
    return single_spaced(f"{symbol} {said.translate(_PUNCTUATION).upper()}")


def language_symbol(language: str) -> str:
    """The token that names a language: `[eng]`."""
    return f"[{language}]"


def characters(text: str, *, symbols: Iterable[str] = (), keep_symbols: bool = True) -> list[str]:
    """A text's characters, with <space> for a space; `symbols` are one token each, or nothing.

    As ESPnet's CharTokenizer, where longer symbols would be told from their beginnings by luck; here by length.
    """
    ordered = sorted(symbols, key=len, reverse=True)
    tokens, place = [], 0
    while place < len(text):
        symbol = next((each for each in ordered if text.startswith(each, place)), None)
        if symbol is None:
            tokens.append(SPACE if text[place] == " " else text[place])
            place += 1
            continue
        if keep_symbols:
            tokens.append(symbol)
        place += len(symbol)
    return tokens


def listed(tokens: Sequence[str]) -> list[str]:
    """Tokens of a text as a model's list of tokens has them: white space of any kind is <space>, of several one.

    `espnet2/bin/tokenize_text.py`, which makes the list and what is scored, splits a line into words; training reads
    the line as it is, so that a no-break space is <unk> there.
    """
    plain = [SPACE if token.isspace() else token for token in tokens]
    return [token for place, token in enumerate(plain) if token != SPACE or plain[place - 1 : place] != [SPACE]]


def said_language(text: str) -> str:
    """The language that a hypothesis names: its first `[xxx]`, else its first `[xxx_xxx]`, else [UNK].

    In that order wherever they stand, as in `split_results.py`.
    """
    found = _LANGUAGE.search(text) or _LONG_LANGUAGE.search(text)
    return found.group() if found else UNKNOWN_LANGUAGE


def can_be_said(language: str) -> bool:
    """Whether `said_language` can find a language that is called so."""
    return said_language(language_symbol(language)) == language_symbol(language)


def scored_characters(text: str, *, symbols: Iterable[str] = ()) -> list[str]:
    """Tokens that the character error rate counts: symbols gone, a space is a character.

    A line is split into words and joined again before symbols are taken out (`espnet2/bin/tokenize_text.py`), so that
    the space after a symbol stays and counts, in reference and hypothesis alike.
    """
    return characters(" ".join(text.split()), symbols=symbols, keep_symbols=False)


def challenge_text(text: str, *, language: str) -> str:
    """What ML-SUPERB 2.0's scorer compares: no Unicode punctuation, capitals, and no spaces in four languages.

    ESPnet `egs2/ml_superb2/asr1/local/score.py`; `language` is the reference's symbol, such as [eng].
    """
    if language in ("[cmn]", "[jpn]", "[tha]", "[yue]"):
        text = "".join(text.split())
    return "".join(c for c in text if not unicodedata.category(c).startswith("P")).upper().strip()
