"""The readers by name: one function a kind of corpus, `read(folder, *, ...) -> Listing`."""

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data_pipelines.corpora import (
    CorpusError,
    Listing,
    babel,
    common_voice,
    fairseq,
    fleurs,
    folder,
    kaldi,
    lhotse,
    librilight,
    librispeech,
    mls,
    mlsuperb,
    openslr,
    parquet,
    tfds,
    voxforge,
    voxlingua107,
    voxpopuli,
    webdataset,
)

READERS: dict[str, Callable[..., Listing]] = {
    "folder": folder.read,
    "fairseq": fairseq.read,
    "kaldi": kaldi.read,
    "lhotse": lhotse.read,
    "parquet": parquet.read,
    "tfds": tfds.read,
    "webdataset": webdataset.read,
    "babel": babel.read,
    "common_voice": common_voice.read,
    "fleurs": fleurs.read,
    "librilight": librilight.read,
    "librispeech": librispeech.read,
    "mls": mls.read,
    "mlsuperb": mlsuperb.read,
    "openslr": openslr.read,
    "voxforge": voxforge.read,
    "voxlingua107": voxlingua107.read,
    "voxpopuli": voxpopuli.read,
}
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def option_names(name: str) -> tuple[str, ...]:
    """The options of a reader. Raises CorpusError: no such reader, with the nearest names."""
    if name not in READERS:
        near = difflib.get_close_matches(name, READERS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(READERS))}"
        raise CorpusError(f"no reader is called {name!r}; {hint}")
    return tuple(inspect.signature(READERS[name]).parameters)[1:]


def read(name: str, folder: str | Path, options: Mapping[str, object]) -> Listing:
    """Lists a folder with the reader of that name. Text given for a number or a truth value is taken as such.

    Raises CorpusError: no such reader, no such option (both with the nearest names), a value of another kind, and what
    the reader raises.
    """
    known = option_names(name)
    hints = typing.get_type_hints(READERS[name])
    given = {}
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has: {', '.join(known)}"
            raise CorpusError(f"the reader {name!r} has no option {key!r}; {hint}")
        given[key] = _value(value, hints.get(key, str), where=f"option {key!r} of the reader {name!r}")
    return READERS[name](folder, **given)


def _value(value: object, hint: object, *, where: str) -> object:
    if typing.get_origin(hint) is Sequence:  # of words
        words = value.split(",") if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            raise CorpusError(f"{where} is {value!r}, not a list of words")
        return tuple(words)
    kinds = typing.get_args(hint) or (hint,)
    if isinstance(value, str) and str not in kinds:
        try:
            for kind in kinds:
                if kind is bool:
                    return _BOOLS[value.lower()]
                if kind in (int, float):
                    return kind(value)
        except (KeyError, ValueError):
            pass
    wanted = tuple(kind for kind in kinds if isinstance(kind, type))
    if float in wanted and isinstance(value, int):
        return value
    if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
        raise CorpusError(f"{where} is {value!r}, not of the kind {' or '.join(k.__name__ for k in wanted)}")
    return value
