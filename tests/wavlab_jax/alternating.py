"""One of two processes of four devices on a mesh where they take turns by twos: what lies where, as a line of JSON.

`python -m tests.wavlab_jax.alternating ADDRESS NUMBER`.
"""

import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from wavlab_jax.sharding import local_mesh, place_batch, place_flag


def alternating(fsdp: int) -> Mesh:
    """Hosts 0 0 1 1 0 0 1 1."""
    devices = np.asarray(jax.devices())[[0, 1, 4, 5, 2, 3, 6, 7]].reshape(-1, fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def main(address: str, number: int) -> None:
    """Process `number` has three of six rows; each process is filled up to four."""
    jax.distributed.initialize(address, 2, number, cluster_detection_method="deactivate")
    from tests.wavlab_jax import tiny

    mesh = alternating(fsdp=2)
    batch = tiny.batch(6)._replace(utterance=np.arange(6, dtype=np.int32))
    placed = place_batch(type(batch)(*(field[number::2] for field in batch)), mesh=mesh, passes=1)
    flags, rows = place_flag(10 + number, mesh=mesh), placed.utterance[0]
    flags, rows = (multihost_utils.process_allgather(each, tiled=True).tolist() for each in (flags, rows))
    own = local_mesh(mesh)
    found = {
        "flags": flags,
        "rows": rows,
        "shape": placed.waveform.shape,
        "local": dict(own.shape),
        "own": [device.id for device in own.devices.flat],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
