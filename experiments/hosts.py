"""Several processes that train one model: how they find each other, wait for each other, and notice that they differ.

The same command runs on every host. `connect` says what it looks for, in which order. All processes share the workdir
and the corpus (a shared file system); the first one writes what there is one of.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

COORDINATOR, PROCESSES, PROCESS = "WAVLAB_COORDINATOR", "WAVLAB_PROCESSES", "WAVLAB_PROCESS"
AUTOMATIC = "WAVLAB_HOSTS"  # "auto": jax.distributed asks the cloud, as it does on TPU pods
HEARTBEAT = "WAVLAB_HEARTBEAT_SECONDS"  # after which a process that is gone ends the others


class HostsError(ValueError):
    """Processes that cannot find each other, or that were not started alike; the message says what to set."""


class Connection(NamedTuple):
    """Arguments of `jax.distributed.initialize`; those that are None it finds out itself."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: list[int] | None = None


def connection(environment: Mapping[str, str]) -> Connection | None:
    """How to connect, by what these environment variables say; None for a process on its own.

    1. WAVLAB_COORDINATOR=host:port, WAVLAB_PROCESSES and WAVLAB_PROCESS (0 is the coordinator): by hand.
    2. A Slurm step of several tasks (srun): jax asks Slurm. It would give each task one GPU, the SLURM_LOCALID'th; where
       a node has one task, that task gets all of the node's.
    3. WAVLAB_HOSTS=auto (`experiments/launch.sh` sets it on TPU pods), or several TPU_WORKER_HOSTNAMES: jax asks the
       cloud.

    Raises HostsError where 1. is said by halves.
    """
    said = [environment.get(name) for name in (COORDINATOR, PROCESSES, PROCESS)]
    if any(said):
        if not all(said) or not (said[1].isdecimal() and said[2].isdecimal() and int(said[2]) < int(said[1])):
            raise HostsError(
                f"{COORDINATOR}={said[0]} {PROCESSES}={said[1]} {PROCESS}={said[2]}: set all three, host:port, how many "
                "processes there are, and this one's number from 0"
            )
        return Connection(said[0], int(said[1]), int(said[2])) if int(said[1]) > 1 else None
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return Connection(local_device_ids=_all_of_a_node(environment))
    several = len(environment.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    return Connection() if several or environment.get(AUTOMATIC) == "auto" else None


def _all_of_a_node(environment: Mapping[str, str]) -> list[int] | None:
    """Numbers of a node's GPUs where each node runs one task; None where tasks share them, or there are none."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
    if not re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", tasks):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = len(visible.split(",")) if visible else int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    return list(range(gpus)) or None


def connect(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, if there are any. Before anything else touches a device.

    Raises HostsError if they do not come together in time.
    """
    found = connection(environment)
    if found is None:
        return
    seconds = environment.get(HEARTBEAT)
    timeouts = {"heartbeat_timeout_seconds": int(seconds)} if seconds else {}
    try:
        jax.distributed.initialize(**found._asdict(), **timeouts)
    except (RuntimeError, ValueError) as error:
        raise HostsError(f"the processes did not come together ({found}): {error}") from error


def is_first() -> bool:
    """Whether this process writes what there is one of."""
    return jax.process_index() == 0


def wait_for_all(point: str) -> None:
    """Until every process has come to this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)


def first_process_first(make: Callable[[], T]) -> T:
    """`make()` in every process, in the first before the others: it may create or clear a folder that they share."""
    made = make() if is_first() else None
    wait_for_all("folder made")
    return make() if made is None else made


def agree(what: str, value: str) -> None:
    """Raises HostsError in every process if `value` is not the same in all of them, naming those that differ."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    every = multihost_utils.process_allgather(digest)
    others = [number for number, row in enumerate(every) if not np.array_equal(row, every[0])]
    if others:
        raise HostsError(
            f"{what} is not the same in all processes: number {', '.join(map(str, others))} of {len(every)} "
            f"differ{'s' if len(others) == 1 else ''} from number 0; here it is {value[:200]!r}. Start the same command "
            "on every host, with the same code, and a workdir and a corpus that all of them see"
        )


def refuse_several(verb: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises HostsError if this process is one of several: `verb` is for one host."""
    if connection(environment) is not None:
        raise HostsError(f"{verb} runs in one process, on one host: start it there alone; train and units take several")
