"""What static lengths, padding and cropping to the shortest waste, on lengths like Common Voice's and like MLS'.

    python -m benchmarks.lengths [--write]

The lengths are drawn from distributions with the published means and limits (no corpus is read): Common Voice's clips
are 5 s on average and at most about 10 to 20 s, one sentence each; MLS is cut into pieces of 10 to 20 s. `--write` puts
the table into docs/data.md. Seconds on one core.
"""

import argparse

import numpy as np

from benchmarks.sections import write_section
from data_pipelines.lengths import propose, waste

SECONDS_PER_STEP = 2880.0
LONGEST = 240_000  # 15 s


def common_voice_like(count: int, rng: np.random.Generator) -> np.ndarray:
    """Samples of `count` clips: log-normal around 4.9 s, 2 to 20 s (shorter ones are joined by `prepare`)."""
    return np.clip(rng.lognormal(np.log(4.7), 0.33, count) * 16_000, 32_000, 320_000).astype(np.int64)


def mls_like(count: int, rng: np.random.Generator) -> np.ndarray:
    """Samples of `count` pieces of 10 to 20 s, about 15 s on average (2012.03411, section 3)."""
    return ((10 + 10 * rng.beta(2.2, 2.0, count)) * 16_000).astype(np.int64)


def table(count: int = 50_000) -> str:
    """The Markdown of docs/data.md."""
    rng = np.random.default_rng(0)
    cv, mls = common_voice_like(count, rng), mls_like(count, rng)
    corpora = {"Common Voice-like": cv, "MLS-like": mls, "both, half each": np.concatenate([cv, mls])}
    lines = [
        "Shares in percent of one epoch. *Left off*: of the audio, what no crop holds (another part in each epoch;",
        "after four, nothing is left out). *Padding*: of the samples computed, when batches of 1.4 M samples are",
        "padded to the longest. *Cropped*: of the audio, when batches are cut to the shortest, as fairseq does.",
        "Each for batches in random order, and of neighbours in length (fairseq's order: hardly any waste, but as many",
        "shapes as batches, so no static ones, and batches mostly of one corpus). Rows over 15.6 s are cropped.",
        "`python -m benchmarks.lengths --write`.",
        "",
        "| lengths | static lengths (s) | left off | padding | sorted | cropped | sorted |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, samples in corpora.items():
        for number in (2, 4, 8):
            found = propose(samples, count=number, seconds_per_step=SECONDS_PER_STEP, longest=LONGEST)
            wasted = waste(samples, lengths=found.lengths)
            lengths = ", ".join(f"{length / 16_000:.2f}" for length in found.lengths)
            lines.append(f"| {name} | {lengths} | {' | '.join(f'{100 * share:.1f}' for share in wasted)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/data.md")
    asked = parser.parse_args()
    text = table()
    print(text)
    if asked.write:
        write_section("docs/data.md", "Static lengths, and what is wasted", text)


if __name__ == "__main__":
    main()
