"""Where devices lie on the mesh: toruses, hosts that are no neighbours on it, several slices."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from wavlab_jax.sharding import MeshConfig, ShardingError, _laid_out, local_mesh, make_mesh

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Chip:
    """As much of a device as its place on a mesh depends on."""

    id: int
    process_index: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    slice_index: int = 0


def torus(kind, *sides, slices=1):
    """Of every slice, hosts of 2 x 2 chips in its first two dimensions."""
    chips = []
    for number in range(slices):
        for x, y, z in np.ndindex(*sides):
            host = (x // 2, y // 2, z, number)
            chips.append(Chip(len(chips), hash(host) % 1000, "tpu", kind, (x, y, z), 0, number))
    return chips


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8, 16, 32, 64])
def test_every_power_of_two_can_be_laid_out_on_a_torus(fsdp):
    for chips in (torus("TPU v5", 4, 4, 4), torus("TPU v6 lite", 8, 8, 1)):
        laid = _laid_out(chips, 64 // fsdp, fsdp)
        assert laid.shape == (64 // fsdp, fsdp) and sorted(chip.id for chip in laid.flat) == list(range(64))


def test_slices_are_parts_of_the_data_axis():
    chips = torus("TPU v4", 2, 2, 2, slices=4)
    laid = _laid_out(chips, 8, 4)
    assert [sorted({chip.slice_index for chip in row}) for row in laid] == [[0], [0], [1], [1], [2], [2], [3], [3]]
    with pytest.raises(ShardingError, match="4 slices of TPUs"):
        _laid_out(chips, 2, 16)


def test_hosts_of_gpus_are_slices_to_jax_and_no_matter():
    gpus = [Chip(i, i // 4, "gpu", "NVIDIA H100", slice_index=i // 4) for i in range(16)]
    laid = _laid_out(gpus[8:] + gpus[:8], 4, 4)
    assert [{chip.process_index for chip in row} for row in laid] == [{0}, {1}, {2}, {3}]


def test_what_cannot_be_laid_out_says_so():
    with pytest.raises(ShardingError, match="data=5, fsdp=3 cannot be laid out on these devices"):
        _laid_out(torus("TPU v4", 4, 4, 1)[:15], 5, 3)
    for data, fsdp in ((-1, 0), (-1, 3), (-1, 16), (-2, -4), (0, 8), (4, 1)):
        with pytest.raises(ShardingError, match=f"data={data}, fsdp={fsdp} does not cover 8 .* leave mesh.data at -1"):
            make_mesh(MeshConfig(data=data, fsdp=fsdp), devices=jax.devices()[:8])


def test_a_local_mesh_keeps_what_it_can_of_fsdp():
    mesh = make_mesh(MeshConfig(fsdp=4), devices=jax.devices()[:8])
    assert local_mesh(mesh) == mesh  # of one process


@pytest.mark.once
def test_hosts_whose_devices_are_no_neighbours_on_the_mesh(tmp_path):
    """As on most TPU pods: two real processes place their flags, rows and local meshes on a mesh that alternates."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, "-m", "tests.wavlab_jax.alternating", address]
    started = [
        subprocess.Popen([*command, str(number)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for text in said:
        found = json.loads(text.splitlines()[-1])
        assert found["flags"] == [10, 10, 11, 11, 10, 10, 11, 11]
        assert sorted(found["rows"]) == [-1, -1, *range(6)] and found["shape"][1] == 8
        assert found["local"] == {"data": 2, "fsdp": 2} and len(found["own"]) == 4
