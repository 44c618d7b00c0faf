"""Makes small units in a process of its own: `python -m tests.experiments.small_units CORPUS WORKDIR [--stop WHERE N]`.

`--stop features|passes|labels N` kills it (SIGKILL, as kill -9 does) after N of these were saved; `--of HOST HOSTS
PORT` makes it one of several processes.
"""

import argparse
import dataclasses
import json
import os
import signal
from pathlib import Path

PIECE = 250  # frames of a piece of labels, and of features


def settings():
    """MFCC units whose features do not all fit, in small pieces."""
    from experiments.units import UnitsConfig

    return UnitsConfig(name="mfcc", units=12, fit_hours=0.01, fit_gigabytes=1500 * 78 / 1e9, iterations=30)


def make(corpus: Path, workdir: Path, mesh=None, **changes):
    """The store, and the counts of what was saved on the way."""
    from data_pipelines.manifest import Manifest
    from data_pipelines.unit_pieces import PieceFolder
    from experiments import fit_spool, unit_features, units
    from wavlab_jax.sharding import MeshConfig, make_mesh
    from wavlab_jax.targets import kmeans

    saved = {"features": 0, "passes": 0, "labels": 0}
    stop = changes.pop("stop", None)
    patched = ((PieceFolder, "write"), (kmeans, "write_state"), (kmeans, "SAVE_SECONDS"))
    patched += ((fit_spool, "PIECE_FRAMES"), (unit_features, "PASS_SECONDS"), (unit_features, "WINDOWS"))
    before = [getattr(where, name) for where, name in patched]
    write, write_state = before[:2]

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

    now = (write_and_count, write_state_and_count, 0.0, PIECE, 1.0, (16_000, 32_000))
    for (where, name), value in zip(patched, now, strict=True):
        setattr(where, name, value)
    try:
        cfg = dataclasses.replace(settings(), **changes)
        mesh = mesh or make_mesh(MeshConfig())
        return units.make_units(cfg, workdir, Manifest.load(corpus), mesh, piece_frames=PIECE), saved
    finally:
        for (where, name), value in zip(patched, before, strict=True):
            setattr(where, name, value)


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
    _, saved = make(given.corpus, given.workdir, stop=given.stop and (given.stop[0], int(given.stop[1])))
    print(json.dumps(saved))


if __name__ == "__main__":
    main()
