"""One of two processes of four devices that make the updates of `test_step.run`: what it found, pickled, by layout.

Their devices take turns on the mesh, as hosts of a TPU pod do.

`python -m tests.wavlab_jax.processes ADDRESS NUMBER FILE`; the first process writes the file.
"""

import pickle
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from tests.wavlab_jax.alternating import alternating
from wavlab_jax.sharding import MeshConfig, place_batch
from wavlab_jax.step import initial_state, make_train_step

PROCESSES, DEVICES = 2, 4
LAYOUTS = ((MeshConfig(fsdp=2), 2),)


def main(address: str, number: int, file: str) -> None:
    """Every layout: (mesh, passes); of each batch every second row is this process' own."""
    jax.distributed.initialize(address, PROCESSES, number, cluster_detection_method="deactivate")
    from tests.wavlab_jax import test_step, tiny

    cfg, found = test_step.everything(), []
    for mesh_cfg, passes in LAYOUTS:
        mesh = alternating(mesh_cfg.fsdp)
        state, step = initial_state(cfg, mesh), make_train_step(cfg, mesh, languages=3)
        for k in range(test_step.UPDATES):
            batch = tiny.batch(8, seed=k)._replace(language=np.arange(8, dtype=np.int32) % 3)
            own = type(batch)(*(field[number::PROCESSES] for field in batch))
            state, result = step(state, place_batch(own, mesh=mesh, passes=passes))
        found.append(jax.tree.map(np.asarray, multihost_utils.process_allgather((state, result), tiled=True)))
    if number == 0:
        with open(file, "wb") as out:
            pickle.dump(found, out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
