"""Frames a second that get their nearest centroid: ours beside scikit-learn and, where it can be imported, faiss.

    python benchmarks/kmeans_assignment.py [--rounds 9] [--frames 16384]

All have the same float32 frames and centroids in memory and use every core; they take turns, round by round, in one
process, because the machine's speed wanders. Printed are medians and, of each round, the ratio to ours (its median,
with the lowest and highest): above 1, ours is faster. Core seconds, of all threads of this process, say what a way
costs on a machine that others use as well. `pip install faiss-cpu` for the third; it is no requirement.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.cluster import KMeans  # noqa: E402

from wavlab_jax.targets import kmeans  # noqa: E402

SIZES = ((500, 768), (2000, 1024))  # units, width: HuBERT and WavLabLM; the largest codebook of a Large model


def scikit_learn(centers: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`KMeans.predict` of a model that has these centers."""
    model = KMeans(len(centers), init=centers, n_init=1, max_iter=1).fit(centers)
    model.cluster_centers_ = centers
    return model.predict


def faiss_flat(centers: np.ndarray) -> Callable[[np.ndarray], np.ndarray] | None:
    """An exact search by squared distance; None where there is no faiss."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(os.cpu_count())
    index = faiss.IndexFlatL2(centers.shape[1])
    index.add(centers)
    return lambda frames: index.search(frames, 1)[1][:, 0]


def measure(units: int, width: int, *, frames: int, rounds: int) -> None:
    """Prints the table of one size. Frames are like hidden states: clouds around the centers."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((units, width)).astype(np.float32)
    data = centers[rng.integers(0, units, frames)] + rng.standard_normal((frames, width)).astype(np.float32)
    ways = {"ours": lambda frames: kmeans.assign(centers, frames), "scikit-learn": scikit_learn(centers)}
    faiss = faiss_flat(centers)
    if faiss is not None:
        ways["faiss"] = faiss
    expected = ways["scikit-learn"](data)
    for name, way in ways.items():  # compiles, and shows that all do the same
        assert np.mean(way(data) == expected) > 0.999, name
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cores: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds):
        for name in list(ways)[round_ % len(ways) :] + list(ways)[: round_ % len(ways)]:
            started, used = time.perf_counter(), time.process_time()
            ways[name](data)
            seconds[name].append(time.perf_counter() - started)
            cores[name].append(time.process_time() - used)
    print(f"\n{units} units, width {width}: {frames} frames, {rounds} rounds")
    for name, taken in seconds.items():
        ratio = np.array(taken) / np.array(seconds["ours"])
        median, best = (frames / value / 1e6 for value in (np.median(taken), min(taken)))
        print(
            f"  {name:<13} {median:.3f} million frames/s (best {best:.3f}), {np.median(cores[name]):.3f} core seconds"
            f"   time / ours: {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
        )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--frames", type=int, default=16_384)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}; load before: {load:.1f}")
    for units, width in SIZES:
        measure(units, width, frames=given.frames, rounds=given.rounds)


if __name__ == "__main__":
    main()
