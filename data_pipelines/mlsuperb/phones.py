"""Phones of Mandarin and Japanese texts, as ML-SUPERB's two phone tracks are trained and scored.

ESPnet `espnet2/text/phoneme_tokenizer.py`: `pypinyin_g2p_phone` and `pyopenjtalk`. The two packages are needed for
these two of the thirteen monolingual sets only, and are an extra: pip install '.[phones]'.
"""

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

from data_pipelines.mlsuperb.layout import MlSuperbError

Phonemizer = Callable[[str], list[str]]
REQUIREMENTS = {"pypinyin": "pypinyin<=0.44.0", "pyopenjtalk": "pyopenjtalk"}


def phonemizer_for(language: str) -> Phonemizer:
    """The function from text to phones for "cmn" or "jpn".

    Raises MlSuperbError naming the package that is missing, or is one that makes other phones than ESPnet's.
    """
    package, function = {"cmn": ("pypinyin", mandarin_phones), "jpn": ("pyopenjtalk", japanese_phones)}[language]
    if find_spec(package) is None:
        raise MlSuperbError(
            f"the phones of {language} are made by {package}, which is not installed: "
            f"pip install '{REQUIREMENTS[package]}'"
        )
    if package == "pypinyin" and tuple(map(int, version(package).split(".")[:2])) > (0, 44):
        raise MlSuperbError(
            f"pypinyin {version(package)} makes other phones of Mandarin than ESPnet's, without ü: pip install "
            f"'{REQUIREMENTS[package]}'"
        )
    return function


def mandarin_phones(text: str) -> list[str]:
    """Initial and final (with its tone's number) of each syllable; other words stay as they are, lone digits do not."""
    from pypinyin import Style, pinyin
    from pypinyin.style._utils import get_finals, get_initials

    phones = []
    for (syllable,) in pinyin(text, style=Style.TONE3):
        body, tone = (syllable[:-1], syllable[-1]) if syllable[-1].isdigit() else (syllable, "")
        phones.append(get_initials(syllable, strict=True))
        phones.append(get_finals(body, strict=True) + tone if syllable[-1].isalnum() else syllable)
    return " ".join(phone for phone in phones if not phone.isdigit()).split()  # as they are written down, and read


def japanese_phones(text: str) -> list[str]:
    """Open JTalk's phones; none of an empty text."""
    import pyopenjtalk

    return pyopenjtalk.g2p(text, kana=False).split()
