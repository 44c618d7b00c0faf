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
    "mandarin": "cmn",
    "greek": "ell",
    "farsi": "fas",
}  # people say these, ISO does not
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

    Only the language of a tag counts: pt-BR and pt_PT are both por. Macrolanguages stay what they are (zho, ara); give
    cmn or arz to be exact. Withdrawn codes become their successors; qaa to qtz (private use) are kept.

    Raises UnknownLanguage naming the code and the nearest codes and names.
    """
    given = code.strip()
    tag = re.split("[-_]", given.lower(), maxsplit=1)[0]
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
