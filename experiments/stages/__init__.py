"""The stages by name. Each module has `get_config()`, the paper's size, and `demo()`, minutes on two cores."""

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from experiments.stage import StageConfig, StageError, as_started, flatten, paths_of
from experiments.stage_files import StageFiles
from experiments.stages import (
    best_rq_base,
    cv_hubert_base,
    hubert_base_it1,
    hubert_base_it2,
    mhubert_147_it3,
    wavlab_ek,
    wavlab_mk,
    wavlab_mk_continued,
    wavlab_ms,
    wavlm_base_plus,
    wavlm_large,
    xlsr_2b,
    xlsr_300m,
)

STAGES = {
    "hubert_base_it1": hubert_base_it1,
    "hubert_base_it2": hubert_base_it2,
    "cv_hubert_base": cv_hubert_base,
    "wavlab_ek": wavlab_ek,
    "wavlab_mk": wavlab_mk,
    "wavlab_ms": wavlab_ms,
    "wavlab_mk_continued": wavlab_mk_continued,
    "wavlm_base_plus": wavlm_base_plus,
    "wavlm_large": wavlm_large,
    "xlsr_300m": xlsr_300m,
    "xlsr_2b": xlsr_2b,
    "mhubert_147_it3": mhubert_147_it3,
    "best_rq_base": best_rq_base,
}
SIZES = ("paper", "demo")


def stage_function(name: str, *, size: str = "paper") -> Callable[[], StageConfig]:
    """The config function of a stage. Raises StageError with the nearest names if there is no such stage or size."""
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=3, cutoff=0.3) or list(STAGES)
        raise StageError(f"no stage is called {name!r}; the nearest: {', '.join(near)}")
    if size not in SIZES:
        raise StageError(f"size {size!r} is not one of {', '.join(SIZES)}")
    return STAGES[name].get_config if size == "paper" else STAGES[name].demo


def run_of(workdir: Path, name: str) -> StageConfig | None:
    """What a run of the workdir under a name of its own was begun with, or the mean `name`@... of one; None of others.

    Its config.txt has every value. Their classes are those of the stages: of that one whose fields are the run's.
    """
    stage = name.partition("@")[0]
    found = [files for files in (StageFiles(workdir, name), StageFiles(workdir, stage)) if files.config.exists()]
    if stage in STAGES or not found:
        return None
    likes = [stage_function(each, size=size)() for each in STAGES for size in SIZES]
    like = min(likes, key=lambda each: len(paths_of(found[0]) ^ flatten(each).keys()))
    return replace(as_started(like, found[0]), name=name)
