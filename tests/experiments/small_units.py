"""Makes small units in a process of its own: `python -m tests.experiments.small_units CORPUS WORKDIR [--stop WHERE N]`.

`--stop features|passes|labels N` kills it (SIGKILL, as kill -9 does) after N of these were saved; `--of HOST HOSTS
PORT` makes it one of several processes.
"""

import argparse
import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

PIECE = 250  # frames of a piece of labels, and of features


def settings():
    """MFCC units whose features do not all fit, in small pieces."""
    from experiments.units import UnitsConfig

    return UnitsConfig(name="mfcc", units=12, fit_hours=0.01, fit_gigabytes=1500 * 78 / 1e9, iterations=30)


@contextlib.contextmanager
def small_pieces(stop: tuple[str, int] | None = None):
    """Everything in small pieces and saved at once; gives the counts of what is saved, and kills itself at `stop`."""
    from data_pipelines.unit_pieces import PieceFolder
    from experiments import fit_spool, unit_features
    from wavlab_jax.targets import kmeans

    saved = {"features": 0, "passes": 0, "labels": 0}
    write, write_state = PieceFolder.write, kmeans.write_state

    def count(what):
        saved[what] += 1
        if stop == (what, saved[what]):
            os.kill(os.getpid(), signal.SIGKILL)

    def write_and_count(self, piece, values):
        write(self, piece, values)
        count("labels" if self.suffix == "uint16" else "features")

    def write_state_and_count(*arguments):
        write_state(*arguments)
        count("passes")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PieceFolder, "write", write_and_count)
        patch.setattr(kmeans, "write_state", write_state_and_count)
        patch.setattr(kmeans, "SAVE_SECONDS", 0.0)
        patch.setattr(fit_spool, "PIECE_FRAMES", PIECE)
        patch.setattr(unit_features, "PASS_SECONDS", 1.0)
        patch.setattr(unit_features, "WINDOWS", (16_000, 32_000))
        yield saved


def make(corpus: Path, workdir: Path, mesh=None, *, stop: tuple[str, int] | None = None) -> dict[str, int]:
    """Makes the store; returns how much of what was saved on the way."""
    from data_pipelines.manifest import Manifest
    from experiments.units import make_units
    from wavlab_jax.sharding import MeshConfig, make_mesh

    with small_pieces(stop) as saved:
        make_units(settings(), workdir, Manifest.load(corpus), mesh or make_mesh(MeshConfig()), piece_frames=PIECE)
    return saved


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--stop", nargs=2)
    parser.add_argument("--of", nargs=3, type=int)
    given = parser.parse_args()
    if given.of:
        import jax

        host, hosts, port = given.of
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=hosts, process_id=host)
    saved = make(given.corpus, given.workdir, stop=given.stop and (given.stop[0], int(given.stop[1])))
    print(json.dumps(saved))


if __name__ == "__main__":
    main()
