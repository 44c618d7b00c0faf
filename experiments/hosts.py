"""Several processes that train one model: how they find each other, wait for each other, and notice that they differ.

The same command runs on every host (`experiments/launch.sh`). All processes share the workdir and the corpus (a shared
file system); the first one writes what there is one of.
"""

import contextlib
import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

COORDINATOR, PROCESSES, PROCESS = "WAVLAB_COORDINATOR", "WAVLAB_PROCESSES", "WAVLAB_PROCESS"
AUTOMATIC = "WAVLAB_HOSTS"  # "auto": jax.distributed asks the cloud, as it does on TPU pods
HEARTBEAT = "WAVLAB_HEARTBEAT_SECONDS"  # after which a process that is gone ends the others; jax: 100
CONNECT = "WAVLAB_CONNECT_SECONDS"  # that a process waits for the others when it starts; jax: 300
SAID_SECONDS = 20.0  # of waiting for the others, after which it is said
TOGETHER = (
    f"start the same command on every host; {COORDINATOR}, {PROCESSES} and {PROCESS} say by hand where process 0 is, "
    "how many there are, and which this is"
)
LOST = 69  # exit status (EX_UNAVAILABLE) where another process is gone; launch.sh knows it
_TRANSPORT = re.compile(r"Gloo|NCCL|Connection (reset|closed|refused)|coordination service", re.IGNORECASE)
SEEN_SECONDS = 90.0  # network file systems may hide a new file so long from a host that looked for it before


class HostsError(ValueError):
    """Processes that cannot find each other, or that were not started alike; the message says what to set."""


class PeerLost(RuntimeError):
    """Another process ended or cannot be reached; the same command on every host goes on from the last checkpoint."""


class Connection(NamedTuple):
    """Arguments of `jax.distributed.initialize`; those that are None it finds out itself."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: list[int] | None = None
    cluster_detection_method: str | None = None


def connection(environment: Mapping[str, str]) -> Connection | None:
    """How to connect, by what these environment variables say; None for a process on its own.

    1. WAVLAB_COORDINATOR=host:port, WAVLAB_PROCESSES and WAVLAB_PROCESS (0 is the coordinator): by hand.
    2. A Slurm step of several tasks (srun): jax asks Slurm, but for the GPUs of a task: see `_gpus_of_task`.
    3. WAVLAB_HOSTS=auto (`experiments/launch.sh` sets it on TPU machines), or several TPU_WORKER_HOSTNAMES (GKE): jax
       asks the cloud.

    Raises HostsError where 1. is said by halves, or GPUs cannot be shared out.
    """
    said = [environment.get(name) for name in (COORDINATOR, PROCESSES, PROCESS)]
    if any(said):
        address, processes, process = said
        whole = address and re.fullmatch(r".+:\d+", address) and all(x and x.isdecimal() for x in (processes, process))
        if not whole or int(process) >= int(processes):
            raise HostsError(
                f"{COORDINATOR}={address} {PROCESSES}={processes} {PROCESS}={process}: set all three: host:port of "
                "process 0, how many processes there are, and this one's number, from 0"
            )
        if int(processes) == 1:
            return None
        return Connection(address, int(processes), int(process), cluster_detection_method="deactivate")
    # a shell that salloc opens as a step, of one, keeps the allocation's SLURM_NTASKS (srun --preserve-env)
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if int(tasks) > 1 and "SLURM_STEP_NODELIST" in environment:
        return Connection(local_device_ids=_gpus_of_task(environment), cluster_detection_method="slurm")
    several = len(environment.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    return Connection() if several or environment.get(AUTOMATIC) == "auto" else None


def _gpus_of_task(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that this Slurm task sees are its own; None where it sees none.

    Slurm may have bound them (--gpus-per-task): then a task sees its own alone, numbered from 0. Otherwise every task
    of a node sees all of the node's, and they share them evenly, in order: all for one task a node, one each for as
    many tasks as GPUs. (jax by itself takes the SLURM_LOCALID'th in either case.)
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES", ""))
    on_node = int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    seen = len(visible.split(",")) if visible else on_node
    tasks = _tasks_of_node(environment)
    if not seen:
        return None
    if tasks == 1 or seen < on_node or (seen == 1 and visible):
        return list(range(seen))
    if seen % tasks:
        raise HostsError(
            f"{tasks} tasks of this node would share {seen} GPUs: start one a node, or one a GPU (--ntasks-per-node)"
        )
    share, local = seen // tasks, int(environment["SLURM_LOCALID"])
    return list(range(local * share, (local + 1) * share))


def _tasks_of_node(environment: Mapping[str, str]) -> int:
    """Of "2(x3),1", which Slurm has for 2,2,2,1, that of this node."""
    said = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1"))
    counts: list[int] = []
    for part in said.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[min(int(environment.get("SLURM_NODEID", "0")), len(counts) - 1)]


def connect(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, if there are any. Before anything else touches a device.

    Where they do not come together within WAVLAB_CONNECT_SECONDS, jax aborts this process (status 134), with words that
    help nobody: so what is waited for is said on standard error after `SAID_SECONDS`, or half of that time if it is
    less. Raises HostsError where jax finds out before.
    """
    found = connection(environment)
    if found is None:
        return
    timeouts = {
        argument: _seconds(environment, name)
        for argument, name in (("heartbeat_timeout_seconds", HEARTBEAT), ("initialization_timeout", CONNECT))
        if name in environment
    }
    limit = timeouts.get("initialization_timeout", 300)
    saying = threading.Timer(min(SAID_SECONDS, limit / 2), _say_waiting, (found, limit))
    saying.daemon = True
    saying.start()
    # jax would catch SIGTERM itself; `wavlab_jax.train` does, and other signals too
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**found._asdict(), **timeouts)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise HostsError(f"the processes did not come together ({reason}): {TOGETHER}") from error
    finally:
        saying.cancel()


def _say_waiting(to: Connection, limit: int) -> None:
    by_hand = f" This is number {to.process_id} of {to.num_processes}, and number 0 is {to.coordinator_address}."
    print(
        f"waiting for the other processes, {limit} s at most ({CONNECT})."
        f"{'' if to.coordinator_address is None else by_hand} If they do not come: {TOGETHER}",
        file=sys.stderr,
        flush=True,
    )


def _seconds(environment: Mapping[str, str], name: str) -> int:
    if not (environment[name].isdecimal() and int(environment[name])):
        raise HostsError(f"{name}={environment[name]}: give whole seconds, at least 1")
    return int(environment[name])


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
        shown = value if len(value) <= 80 else f"a text of {len(value)} characters"
        raise HostsError(
            f"{what} is not the same in all processes: of {len(every)}, number {', '.join(map(str, others))} "
            f"differ{'s' if len(others) == 1 else ''} from number 0; in number {jax.process_index()} it is {shown!r}. "
            "Start the same command on every host, with the same code, and a workdir and a corpus that all of them see"
        )


def check_shared(path: Path, text: str) -> None:
    """Raises HostsError in every process if one of them does not find `text` in `path`, which the first wrote."""
    if jax.process_count() == 1:
        return
    wait_for_all("file written")
    found = wait_to_see(path) and path.read_text() == text
    agree(f"{path}, which process 0 wrote,", "there" if found else "not there, or another")


def wait_to_see(path: Path) -> bool:
    """Whether this host sees what another one made at `path`, after `SEEN_SECONDS` at most."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def refuse_several(verb: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises HostsError if this process is one of several: `verb` is for one host."""
    found = connection(environment)
    if found is not None and found.num_processes is None and found.cluster_detection_method is None:
        connect(environment)  # only the cloud knows whether there are several
        found = found if jax.process_count() > 1 else None
    if found is not None:
        raise HostsError(f"{verb} runs in one process, on one host: start it there alone; train and units take several")


def peer_lost(error: BaseException) -> PeerLost | None:
    """What an error means where another process is gone; None where it means something else.

    Looks at what the error was raised from, too: whatever waits for devices meets it first, a checkpoint for instance.
    Collectives and barriers say it by jax's class, of whose other errors want of memory is known, or by a ValueError in
    the words of their transport.
    """
    if not jax.distributed.is_initialized():
        return None
    found: BaseException | None = error
    while found is not None:
        ours = isinstance(found, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(found)
        if ours or (isinstance(found, ValueError) and _TRANSPORT.search(str(found))):
            return PeerLost(
                f"another process ended, or cannot be reached ({str(found).splitlines()[0][:160]}): the same command "
                "on every host goes on from the newest checkpoint"
            )
        found = found.__cause__ or found.__context__
    return None


def leave(status: int) -> None:
    """Ends this process at once if others may wait for it: jax would wait for them before it let go."""
    if status and jax.distributed.is_initialized() and jax.process_count() > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(status)
