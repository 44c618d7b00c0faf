"""Phones of Mandarin and Japanese texts, as ML-SUPERB's two phone tracks are trained and scored.

ESPnet `espnet2/text/phoneme_tokenizer.py`: `pypinyin_g2p_phone` and `pyopenjtalk`. The two packages are needed for
these two of the thirteen monolingual sets only, and are an extra: pip install pypinyin pyopenjtalk.
"""

from collections.abc import Callable
from importlib.util import find_spec

from data_pipelines.mlsuperb.layout import MlSuperbError

Phonemizer = Callable[[str], list[str]]


def phonemizer_for(language: str) -> Phonemizer:
    """The function from text to phones for "cmn" or "jpn". Raises MlSuperbError naming the package that is missing."""
    package, function = {"cmn": ("pypinyin", mandarin_phones), "jpn": ("pyopenjtalk", japanese_phones)}[language]
    if find_spec(package) is None:
        raise MlSuperbError(
            f"the phones of {language} are made by {package}, which is not installed: pip install {package}"
        )
    return function


def mandarin_phones(text: str) -> list[str]:
    """Initial and final (with its tone's number) of each syllable; what is no syllable stays as it is."""
    from pypinyin import Style, pinyin
    from pypinyin.style._utils import get_finals, get_initials

    phones = []
    for (syllable,) in pinyin(text, style=Style.TONE3):
        body, tone = (syllable[:-1], syllable[-1]) if syllable[-1].isdigit() else (syllable, "")
        phones.append(get_initials(syllable, strict=True))
        phones.append(get_finals(body, strict=True) + tone if syllable[-1].isalnum() else syllable)
    return [phone for phone in phones if phone.strip() and not phone.isdigit()]


def japanese_phones(text: str) -> list[str]:
    """Open JTalk's phones."""
    import pyopenjtalk

    return pyopenjtalk.g2p(text, kana=False).split(" ")
