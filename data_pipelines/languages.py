"""Any spelling of a language to its ISO 639-3 code, so that "fr", "fre", "fr-FR" and "French" are one language."""

import difflib
import functools
import re

import pycountry

# Codes that ISO withdrew (and that Common Voice, VoxLingua107 and Whisper still use), with what replaced them.
_RETIRED = {
    "iw": "heb",
    "in": "ind",
    "ji": "yid",
    "jw": "jav",
    "mo": "ron",
    "mol": "ron",
    "sh": "hbs",
    "scr": "hrv",
    "scc": "srp",
}
_COMMON_NAMES = {
    "cantonese": "yue",
    "dholuo": "luo",
    "farsi": "fas",
    "frisian": "fry",
    "greek": "ell",
    "kurmanji": "kmr",
    "mandarin": "cmn",
    "odia": "ori",  # the macrolanguage, as "or" is; ISO has the name for one of its members
    "pashto": "pus",
    **{"azeri": "aze", "bokmål": "nob", "castilian": "spa", "haitian creole": "hat", "kyrgyz": "kir", "luganda": "lug"},
    **{"moldavian": "ron", "nynorsk": "nno", "punjabi": "pan", "sesotho": "sot", "setswana": "tsn", "sinhalese": "sin"},
    **{"slovene": "slv", "sorani": "ckb", "uyghur": "uig", "valencian": "cat"},
}  # people say these, ISO does not
# What is spoken where a corpus of speech says zh and a place: Common Voice's zh-CN, zh-TW and zh-HK.
_CHINESE_BY_REGION = {"cn": "cmn", "tw": "cmn", "sg": "cmn", "hk": "yue", "mo": "yue"}
_CHINESE_BY_EXTENSION = ("cmn", "yue", "nan", "hak", "wuu")  # BCP 47's zh-yue is yue
_PRIVATE = re.compile("q[a-t][a-z]")  # ISO 639-3 leaves qaa to qtz to local use


class UnknownLanguage(ValueError):
    """A code or name that ISO 639 does not know; `nearest` holds what it may have been meant to be."""

    def __init__(self, code: str, nearest: tuple[str, ...] = ()):
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        super().__init__(f"{code!r} is not a language code or name of ISO 639{hint}")
        self.code, self.nearest = code, nearest

    def __reduce__(self):
        return type(self), (self.code, self.nearest)


@functools.cache
def normalise(code: str) -> str:
    """The ISO 639-3 code of a language given as ISO 639-1, -2 (both kinds), -3, a BCP 47 or locale tag, or in English.

    Only the language of a tag counts: pt-BR and pt_PT are both por, rm-sursilv and rm-vallader both roh. The one
    exception is Chinese with a place, whose spoken languages have nothing in common but the script: zh-CN, zh-TW and
    zh-SG are cmn, zh-HK and zh-MO are yue. Withdrawn codes become their successors; qaa to qtz (private use) are kept.

    Macrolanguages stay what they are: ar and ar_eg are ara, zh is zho, ne is nep, sw is swa, et is est. Corpora that
    give two letters (Common Voice, FLEURS, VoxLingua107, VoxPopuli) so share a bucket, and one that names a member
    (arz, npi, swh, ekk) has another. So have nb (nob), nn (nno) and no (nor), and fil and tl (tgl): ISO tells them
    apart, and so do the corpora.

    Raises UnknownLanguage naming the code and the nearest codes and names.
    """
    given = code.strip()
    tag, *subtags = re.split("[-_.@]", given.lower())
    whole = _names().get(re.sub("[-_]", " ", given.lower())) if subtags else None
    if whole:  # a name of two words: Tok-Pisin is not tok, Toki Pona
        return whole
    if tag == "zh" and subtags:
        for subtag in subtags:
            spoken = subtag if subtag in _CHINESE_BY_EXTENSION else _CHINESE_BY_REGION.get(subtag)
            if spoken:
                return spoken
    if tag in _RETIRED:
        return _RETIRED[tag]
    if _PRIVATE.fullmatch(tag):
        return tag
    languages = pycountry.languages
    found = None
    if len(tag) == 2:
        found = languages.get(alpha_2=tag)
    elif len(tag) == 3:
        found = languages.get(alpha_3=tag) or languages.get(bibliographic=tag)
    if found is None and len(given) > 3:
        code_of = _names().get(given.lower())
        if code_of:
            return code_of
    if found is None:
        raise UnknownLanguage(code, _nearest(given.lower()))
    return found.alpha_3


def name_of(code: str) -> str:
    """The English name of an ISO 639-3 code, for people to read; the code itself where it has none."""
    found = pycountry.languages.get(alpha_3=code)
    return found.name if found else code


@functools.cache
def _names() -> dict[str, str]:
    names: dict[str, str] = {}
    for attribute in ("inverted_name", "common_name", "name"):  # the last one wins where two languages share a name
        for language in pycountry.languages:
            if hasattr(language, attribute):
                name = getattr(language, attribute).lower()
                names[name] = language.alpha_3
                names.setdefault(
                    name.split(" (")[0], language.alpha_3
                )  # "Modern Greek (1453-)", "Swahili (macrolanguage)"
    return names | _COMMON_NAMES


def _nearest(given: str) -> tuple[str, ...]:
    if len(given) <= 4:  # a code with a slip of the finger: one letter too many, too few, or another one
        living = [x for x in pycountry.languages if hasattr(x, "alpha_2")]  # the 184 with a two-letter code come first
        for pool in (living, list(pycountry.languages)):
            codes = difflib.get_close_matches(given, [x.alpha_3 for x in pool], n=3, cutoff=0.6)
            if codes:
                return tuple(f"{c} ({name_of(c)})" for c in codes)
    names = difflib.get_close_matches(given, list(_names()), n=3, cutoff=0.6)
    return tuple(dict.fromkeys(f"{_names()[n]} ({name_of(_names()[n])})" for n in names))
