"""What probes cost in training time: by formula for the paper's stages, as recorded for a run that was made.

    PYTHONPATH=. .venv/bin/python benchmarks/probe_cost.py [WORKDIR/stages/STAGE ...]

By formula (`wavlab_jax/flops.py`): every held-out utterance fills two windows of 8 s, every utterance of the language
probe 8 s through all layers, though those above the middle one are not computed. What the host does is left out: it
reads audio and fits the classifier.
"""

import json
import statistics
import sys
from pathlib import Path

from data_pipelines.batch import SAMPLE_RATE
from experiments.evaluate import LENGTHS, PROBE_LENGTHS
from experiments.stages import STAGES, stage_function
from wavlab_jax.flops import row_flops
from wavlab_jax.metrics import JSON_LINES, PROBE_LINES, read_lines

WINDOWS = 2  # of the longest length, that a held-out utterance fills


def by_formula(name: str) -> tuple[float, float]:
    """Of a stage in the paper's size: training steps that a probe is worth, and the share of the run's operations."""
    cfg = stage_function(name, size="paper")()
    learner, probes = cfg.learner, cfg.probes
    negatives = getattr(learner.objective, "negatives", 0)

    def row(samples: int):
        return row_flops(learner.encoder, learner.head, samples=samples, negatives=negatives)

    longest = cfg.data.lengths[-1]
    step = cfg.data.seconds_per_step * SAMPLE_RATE / longest * row(longest).training
    probe = WINDOWS * probes.clips * row(LENGTHS[-1]).forward + probes.language_clips * row(PROBE_LENGTHS[-1]).forward
    times = -(-cfg.loop.steps // probes.every) + 1
    return probe / step, times * probe / (cfg.loop.steps * step + times * probe)


def recorded(folder: Path) -> str:
    """Of a run: seconds of its first probe, which compiles, and of the others; the share of its time; of a step."""
    probes, lines = list(read_lines(folder / PROBE_LINES)), list(read_lines(folder / JSON_LINES))
    seconds = [line["probe_seconds"] for line in probes]
    step = statistics.median(line["step_seconds"] for line in lines)
    later = statistics.median(seconds[1:])
    said = (
        f"first probe {seconds[0]:.1f} s, the others {later:.1f} s (median of {len(seconds) - 1}); a step {step:.3f} s"
    )
    return said + f": a probe is worth {later / step:.0f} steps; {probes[-1]['probe_share']:.1%} of the run's time"


def main() -> None:
    """Prints a line a stage, and one for each run that was named."""
    print(f"{'stage':<22} {'steps a probe is worth':>23} {'share of all operations':>24}")
    for name in STAGES:
        steps, share = by_formula(name)
        print(f"{name:<22} {steps:>23.2f} {share:>24.5%}")
    for folder in map(Path, sys.argv[1:]):
        about = json.loads((folder / "model.json").read_text())["encoder"]
        print(f"{folder}: width {about['width']}, {about['layers']} layers: {recorded(folder)}")


if __name__ == "__main__":
    main()
