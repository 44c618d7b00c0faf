"""Which reader a name means. Every one is `read(folder, *, …)` and gives a `Listing`; its options are its own."""

from collections.abc import Callable

from data_pipelines.corpora import (
    Listing,
    babel,
    common_voice,
    fleurs,
    folder,
    librilight,
    librispeech,
    mls,
    openslr,
    voxforge,
    voxlingua107,
    voxpopuli,
)

READERS: dict[str, Callable[..., Listing]] = {
    "folder": folder.read,
    "babel": babel.read,
    "common_voice": common_voice.read,
    "fleurs": fleurs.read,
    "librilight": librilight.read,
    "librispeech": librispeech.read,
    "mls": mls.read,
    "openslr": openslr.read,
    "voxforge": voxforge.read,
    "voxlingua107": voxlingua107.read,
    "voxpopuli": voxpopuli.read,
}
