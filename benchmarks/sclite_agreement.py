"""Our counts of errors beside sclite's, on random pairs of strings.

    apt-get install sctk
    PYTHONPATH=. .venv/bin/python benchmarks/sclite_agreement.py --pairs 3000 --seed 0

sclite is NIST's (SCTK 2.4.12 on Debian, where it prints 2.10). One letter is one word; strings are of 1 to 25 of the
first 2 to 7 of abcAéÉB. Exit status 1 if a pair's substitutions, deletions and insertions are not all three the same.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from wavlab_jax.evaluation.error_rates import count_errors


def random_pairs(count: int, *, seed: int) -> list[tuple[str, str]]:
    """Pairs of strings of few letters, in which many alignments have the same weight."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        letters = list("abcAéÉB")[: rng.integers(2, 8)]
        pairs.append(tuple("".join(rng.choice(letters, rng.integers(1, 26))) for _ in range(2)))
    return pairs


def counts_of_sclite(pairs: list[tuple[str, str]], *, program: str) -> list[tuple[int, int, int]]:
    """(substitutions, deletions, insertions) of each (reference, hypothesis), in the order of `pairs`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, place in (("ref", 0), ("hyp", 1)):
            lines = (f"{' '.join(pair[place])} (s-{number:06d})\n" for number, pair in enumerate(pairs))
            Path(folder, name).write_text("".join(lines))
        command = [program, "-r", "ref", "trn", "-h", "hyp", "trn", "-i", "rm", "-o", "pralign", "stdout"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"id: \(s-(\d+)\)\s+Scores: \(#C #S #D #I\) \d+ (\d+) (\d+) (\d+)", said)
    if len(found) != len(pairs):
        raise SystemExit(f"sclite told of {len(found)} of {len(pairs)} pairs:\n{said[-2000:]}")
    return [tuple(map(int, rest)) for _, *rest in sorted(found)]


def main() -> int:
    """Prints how many agree; 1 if not all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    program = shutil.which("sclite") or shutil.which("sclite", path="/usr/lib/sctk/bin")
    if program is None:
        sys.exit("sclite is not here: install SCTK (Debian: apt-get install sctk)")
    pairs = random_pairs(arguments.pairs, seed=arguments.seed)
    theirs = counts_of_sclite(pairs, program=program)
    ours = [tuple(each[1:]) for each in count_errors([one for one, _ in pairs], [other for _, other in pairs])]
    differing = [place for place, (mine, his) in enumerate(zip(ours, theirs, strict=True)) if mine != his]
    print(f"{len(pairs) - len(differing)} of {len(pairs)} pairs agree")
    for place in differing[:10]:
        print(f"{pairs[place]}: ours {ours[place]}, sclite {theirs[place]}")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
