"""Several processes: how they find each other, and a run of two that is stopped and goes on in one."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.hosts import Connection, HostsError, connection, peer_lost, refuse_several
from experiments.probe_clips import ProbesConfig
from experiments.run import train_stage
from experiments.stage_files import StageFiles
from tests.experiments.conftest import lines, small
from tests.experiments.small_launcher import STAGE, STEPS
from wavlab_jax.checkpoint import CheckpointError, restore_parameters, steps_of
from wavlab_jax.metrics import read_lines
from wavlab_jax.sharding import MeshConfig, make_mesh
from wavlab_jax.step import abstract_state

ROOT = Path(__file__).resolve().parents[2]


def slurm(tasks="4", per_node="2(x2)", node="0", local="0", gpus="4", visible="0,1,2,3"):
    found = {"SLURM_NTASKS": tasks, "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": per_node}
    found |= {"SLURM_NODEID": node, "SLURM_LOCALID": local, "SLURM_GPUS_ON_NODE": gpus}
    return found | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})


def by_hand(address="10.0.0.1:1234", processes="2", process="1"):
    return {"WAVLAB_COORDINATOR": address, "WAVLAB_PROCESSES": processes, "WAVLAB_PROCESS": process}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (by_hand(), Connection("10.0.0.1:1234", 2, 1, None, "deactivate")),
        (by_hand(processes="1", process="0"), None),
        # srun with one task on each node: all GPUs; with one a GPU: its own; bound by Slurm: the only one it sees
        (slurm("2", "1(x2)"), Connection(None, None, None, [0, 1, 2, 3], "slurm")),
        (slurm("8", "4(x2)", local="3"), Connection(None, None, None, [3], "slurm")),
        (slurm("8", "4(x2)", local="3", visible="0"), Connection(None, None, None, [0], "slurm")),
        (slurm("4", "2(x2)", local="1"), Connection(None, None, None, [2, 3], "slurm")),
        (slurm("3", "1,2", node="1", local="1", visible=None), Connection(None, None, None, [2, 3], "slurm")),
        (slurm("2", "1(x2)", gpus="0", visible=None), Connection(None, None, None, None, "slurm")),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # the batch script itself, which is no task
        (slurm("1", "1"), None),
        (slurm("8", "1") | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # the shell that salloc opens
        ({"WAVLAB_HOSTS": "auto"}, Connection()),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Connection()),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_what_the_environment_says(environment, found):
    assert connection(environment) == found


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WAVLAB_PROCESSES": "2"}, "WAVLAB_COORDINATOR=None WAVLAB_PROCESSES=2 WAVLAB_PROCESS=None: set all three"),
        (by_hand(process="2"), "WAVLAB_PROCESS=2: set all three"),
        (by_hand(address="10.0.0.1"), "COORDINATOR=10.0.0.1 .*host:port"),
        (slurm("6", "3(x2)"), "3 tasks of this node would share 4 GPUs"),
    ],
)
def test_what_it_says_by_halves_is_named(environment, told):
    with pytest.raises(HostsError, match=told):
        connection(environment)


def test_what_is_waited_for_is_said_before_jax_gives_up():
    """jax then aborts the process, with a stack of its own functions."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | by_hand(address) | {"WAVLAB_CONNECT_SECONDS": "2"}
    command = [sys.executable, "-c", "from experiments.hosts import connect; connect()"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.startswith(
        "waiting for the other processes, 2 s at most (WAVLAB_CONNECT_SECONDS). This is number"
    )
    assert f"number 1 of 2, and number 0 is {address}. If they do not come: start the same command" in done.stderr


def test_what_runs_on_one_host_says_so():
    refuse_several("evaluate", {})
    with pytest.raises(HostsError, match="evaluate runs in one process, on one host"):
        refuse_several("evaluate", by_hand())


def test_a_lost_process_is_known_by_what_an_error_came_from(monkeypatch):
    def raised(error, cause):
        try:
            raise error from cause
        except type(error) as found:
            return found

    gloo = ValueError("Gloo all-reduce failed: read [127.0.0.1]:1433: Connection reset by peer")
    saved = raised(CheckpointError("checkpoints cannot be written"), gloo)
    assert peer_lost(saved) is None  # alone, it is what it says
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for error in (saved, gloo, jax.errors.JaxRuntimeError("UNAVAILABLE: task 1 is gone")):
        assert "another process ended, or cannot be reached" in str(peer_lost(error))
    for error in (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), CheckpointError("no space")):
        assert peer_lost(error) is None


# --- launch.sh, with programs of the same names that only say what they were asked ---


@pytest.fixture
def launch(tmp_path):
    """Runs launch.sh; returns what it ended with, and what it called."""

    def run(*arguments, statuses="0", job="JobState=RUNNING Reason=None", **environment):
        for name in ("python", "srun", "scontrol"):
            # each call takes the first of the statuses that are left; what Slurm says of the job, it says to any
            (tmp_path / name).write_text(
                f'#!/bin/sh\ncd {tmp_path}; [ "$1 $2" != "show job" ] || {{ echo "{job}"; exit; }}\n'
                f'echo "{name} $WAVLAB_HOSTS $*" >> called\nread first rest < statuses\n'
                'echo "$rest 0" > statuses; exit $first\n'
            )
            (tmp_path / name).chmod(0o755)
        (tmp_path / "statuses").write_text(statuses + "\n")
        (tmp_path / "called").unlink(missing_ok=True)
        places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
        done = subprocess.run(
            [ROOT / "experiments" / "launch.sh", *arguments],
            env={**places, "WAVLAB_AGAIN_SECONDS": "0", **environment},
            capture_output=True,
            timeout=60,
        )
        called = (tmp_path / "called").read_text().replace(str(ROOT) + "/", "").splitlines()
        return done.returncode, [" ".join(call.split()) for call in called]

    return run


def test_launch(launch, tmp_path):
    command, ran = ("train", "wavlab_mk"), "python -m experiments train wavlab_mk"
    assert launch(*command, statuses="75") == (75, [ran])
    assert launch(*command, SLURM_JOB_ID="7", SLURM_STEP_ID="0") == (0, [ran])
    # in a loop: stopped, lost another host, killed; then a mistake, which would only be made again
    assert launch("--again", *command, statuses="75 69 137 1") == (1, [ran] * 4)
    assert launch("--again", *command, statuses="134 0") == (0, [ran] * 2)
    assert launch("--again", *command, statuses="75 75 75 75 75 75 75") == (75, [ran] * 5)
    srun = "srun --kill-on-bad-exit=0 experiments/launch.sh train wavlab_mk"
    requeue, job = "scontrol requeue 7", {"SLURM_JOB_ID": "7"}
    for status, restarts, called in (
        (0, "0", []), (1, "0", []), (75, "9", [requeue]), (138, "0", [requeue]), (143, "0", [requeue]),
        (69, "4", [requeue]), (134, "0", [requeue]), (137, "0", [requeue]), (137, "5", []), (69, "6", []),
    ):  # fmt: skip
        found = launch(*command, statuses=str(status), SLURM_RESTART_COUNT=restarts, **job)
        assert found == (status, [srun, *called])
    assert launch(*command, statuses="137", **job) == (137, [srun, requeue])  # never restarted: no count
    made = tmp_path / "work" / "stages" / "wavlab_mk" / "checkpoints" / "5000.orbax-checkpoint-tmp"
    others = made.parents[2] / "wavlab_ms" / "checkpoints" / "5000"  # of another job
    others.mkdir(parents=True)
    os.utime(others, (2**31, 2**31))
    for workdir in (("--workdir", str(tmp_path / "work")), (f"--workdir={tmp_path / 'work'}",)):
        made.mkdir(parents=True, exist_ok=True)
        os.utime(made, (2**31, 2**31))  # a checkpoint of this attempt, not whole, then whole
        with_workdir = " ".join((srun, *workdir)).replace(str(ROOT) + "/", "")
        for name, called in ((made.name, []), ("5000", [requeue])):
            made = made.rename(made.with_name(name))
            assert launch(*command, *workdir, statuses="137", SLURM_RESTART_COUNT="9", **job) == (
                137, [with_workdir, *called],
            )  # fmt: skip
        made = made.rename(made.with_name("5000.orbax-checkpoint-tmp"))
    for more in (("--workdir", str(tmp_path / "work"), "--name", "wavlab_ms"), ("--name=wavlab_ms", *workdir)):
        assert launch(*command, *more, statuses="137", SLURM_RESTART_COUNT="9", **job)[1][1:] == [requeue]
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", **job}  # and not all of it
    assert launch(*command, statuses="75", **array) == (75, [srun, f"{requeue}_3"])
    more = {"SLURM_RESTART_COUNT": "5", "WAVLAB_REQUEUES": "6", **job}
    assert launch(*command, statuses="69", **more) == (69, [srun, requeue])
    assert launch("--again", *command, **job) == (0, [srun.replace("launch.sh", "launch.sh --again")])
    assert launch(*command, SLURM_STEP_ID="4294967290", **job) == (0, [srun])  # the shell that salloc opens
    assert launch(*command, statuses="75 1", **job) == (75, [srun, requeue])  # which Slurm may refuse
    leaving = "JobState=COMPLETING Reason="  # as Slurm 22.05 has it after scancel, and where the time was up
    for status in ("75", "137"):
        assert launch(*command, statuses=status, **job, job=f"{leaving}None PreemptTime=None") == (int(status), [srun])
        assert launch(*command, statuses=status, **job, job=f"{leaving}TimeLimit") == (int(status), [srun, requeue])
    assert launch(*command, statuses="75", **job, job=f"{leaving}None PreemptTime=2026-11") == (75, [srun, requeue])


def test_a_copy_of_the_launcher_says_so(tmp_path):
    """`sbatch experiments/launch.sh ...` runs a copy, beside which there is nothing."""
    copy = Path(shutil.copy(ROOT / "experiments" / "launch.sh", tmp_path / "slurm_script"))
    done = subprocess.run([copy, "train", "wavlab_mk"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "have a batch script call experiments/launch.sh" in done.stderr


def test_ctrl_c_reaches_what_is_run_again_once(tmp_path):
    """A terminal sends it to its whole process group, and the shell passes it on: a second one would end a run unsaved.

    Before training begins nothing but Python's own handler answers it, which is there where it is not ignored.
    """
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport pathlib, signal, sys, time\nheard = []\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "signal.signal(signal.SIGINT, lambda *_: heard.append(1))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready').touch()\n"
        "while not heard: time.sleep(0.02)\n"
        "time.sleep(0.5)\nsys.exit(130 + len(heard) - 1)\n"
    )
    python.chmod(0o755)
    command = [ROOT / "experiments" / "launch.sh", "--again", "train", "wavlab_mk"]
    env = os.environ | {"PYTHON": str(python), "WAVLAB_AGAIN_SECONDS": "0"}
    # what runs in a shell's background, as these tests may, ignores Ctrl-C, and so does what it starts
    as_a_terminal = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    shell = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, **as_a_terminal)
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and shell.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if shell.poll() is None:
        os.killpg(shell.pid, signal.SIGINT)
    said = shell.communicate(timeout=30)[1]
    assert shell.returncode == 130, said


# --- two real processes ---


class Pair:
    """The small launcher twice, as two hosts of two devices each."""

    def __init__(self, *arguments, hosts=2, devices=2, heartbeat=None, differing=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "tests.experiments.small_launcher", *arguments]
        self.processes = []
        for host in range(hosts):
            env = os.environ | by_hand(address, str(hosts), str(host)) | {"JAX_NUM_CPU_DEVICES": str(devices)}
            env |= {"WAVLAB_CONNECT_SECONDS": "120"} | ({"WAVLAB_HEARTBEAT_SECONDS": heartbeat} if heartbeat else {})
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            self.processes.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
            command += differing  # of the others

    def when(self, condition):
        deadline = time.monotonic() + 240
        while not condition():
            ended = [process for process in self.processes if process.poll() is not None]
            assert not ended and time.monotonic() < deadline, [each.communicate()[0][-3000:] for each in ended]
            time.sleep(0.005)
        return self

    def ended(self):
        """(exit status, what was printed) of each."""
        try:
            said = [process.communicate(timeout=240)[0] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes], said


def count_lines(workdir):
    path = StageFiles(workdir, STAGE).metrics / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def final_parameters(workdir):
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    like = abstract_state(small(STAGE, steps=STEPS).learner, mesh).params
    return jax.tree.leaves(jax.device_get(restore_parameters(StageFiles(workdir, STAGE).checkpoints, like)))


def assert_close(workdir, whole):
    """Another number of processes adds in another order: losses to 1e-4, parameters to Adam's amplification of that."""
    for one, other in zip(lines(workdir, STAGE), lines(whole, STAGE), strict=True):
        assert one["step"] == other["step"] and one["audio_hours"] == other["audio_hours"]
        assert one["masked_loss"] == pytest.approx(other["masked_loss"], rel=1e-4)
    for one, other in zip(final_parameters(workdir), final_parameters(whole), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.once
def test_two_processes_stop_at_the_same_step_and_one_goes_on(corpus, tmp_path):
    """SIGTERM to the second of two; what both saved is continued by one, to where one alone ends."""
    workdir, whole = tmp_path / "work", tmp_path / "whole"
    pair = Pair("train", STAGE, "--workdir", str(workdir), "--corpus", str(corpus))
    pair.when(lambda: count_lines(workdir) >= 3).processes[1].send_signal(signal.SIGTERM)
    statuses, said = pair.ended()
    assert statuses == [75, 75], said
    files = StageFiles(workdir, STAGE)
    stopped = max(steps_of(files.checkpoints))
    assert 6 <= stopped < STEPS and f"stopped after step {stopped} of {STEPS}, saved" in said[0]
    assert "stopped" not in said[1] and "4 device(s) of 2 processes, from scratch" in said[0]
    assert len(lines(workdir, STAGE)) == stopped // 2
    cfg = small(STAGE, steps=STEPS)
    train_stage(cfg, workdir=workdir, corpus=corpus)
    shutil.copytree(workdir / "units", whole / "units")
    train_stage(cfg, workdir=whole, corpus=corpus)
    assert_close(workdir, whole)


@pytest.mark.soak
def test_two_processes_probe_together_what_one_does(corpus, tmp_path):
    """Both compute, the first writes; the same clips judged by one process, to the rounding of what was trained."""
    workdir, whole = tmp_path / "work", tmp_path / "whole"
    command = ("train", STAGE, "--workdir", str(workdir), "--corpus", str(corpus), "--probes.every", "20")
    statuses, said = Pair(*command, "--mesh.fsdp", "2").ended()
    assert statuses == [0, 0], said
    shutil.copytree(workdir / "units", whole / "units")
    cfg = dataclasses.replace(small(STAGE, steps=STEPS), probes=ProbesConfig(every=20))
    train_stage(cfg, workdir=whole, corpus=corpus)
    two, one = (list(read_lines(StageFiles(folder, STAGE).metrics / "probes.jsonl")) for folder in (workdir, whole))
    assert [line["step"] for line in two] == [0, 20, 40] == [line["step"] for line in one]
    for mine, other in zip(two, one, strict=True):
        assert mine["masked"]["clips"] == other["masked"]["clips"] == 12
        assert mine["masked"]["copy"] == other["masked"]["copy"]
        assert mine["masked"]["loss"] == pytest.approx(other["masked"]["loss"], rel=1e-3)
        assert mine["language"]["clips"] == other["language"]["clips"] > 0
    assert two[0]["masked"]["accuracy"] == pytest.approx(one[0]["masked"]["accuracy"], abs=1e-6)
    assert two[0]["language"]["accuracy"] == one[0]["language"]["accuracy"]


@pytest.mark.soak
def test_kill_9_of_one_process_ends_the_others_and_other_numbers_go_on(corpus, tmp_path):
    """Of two processes the second is killed, then of four the first, which the others meet at; one finishes."""
    workdir, whole = tmp_path / "work", tmp_path / "whole"
    command, seconds = ("train", STAGE, "--workdir", str(workdir), "--corpus", str(corpus)), 20
    for hosts, victim, after in ((2, 1, 3), (4, 0, 9)):
        pair = Pair(*command, hosts=hosts, devices=4 // hosts, heartbeat=str(seconds))
        pair.when(lambda after=after: count_lines(workdir) >= after).processes[victim].kill()
        began = time.monotonic()
        statuses, said = pair.ended()
        assert time.monotonic() - began < seconds + 10, said
        assert statuses.pop(victim) == -9 and set(statuses) <= {69, -signal.SIGABRT}, said
        said.pop(victim)
        for status, text in zip(statuses, said, strict=True):
            assert status != 69 or "another process ended, or cannot be reached" in text.splitlines()[-1], text
    train_stage(small(STAGE, steps=STEPS), workdir=workdir, corpus=corpus)
    shutil.copytree(workdir / "units", whole / "units")
    train_stage(small(STAGE, steps=STEPS), workdir=whole, corpus=corpus)
    assert_close(workdir, whole)


@pytest.mark.soak
def test_two_processes_make_units_of_a_teacher_and_train_on_them(trained, heard, tmp_path):
    """By the verb `units`, then by `train`, which finds them."""
    name, workdir = "hubert_base_it2", tmp_path / "work"
    shutil.copytree(StageFiles(trained, STAGE).folder, StageFiles(workdir, STAGE).folder)
    for verb, said_at_the_end in (("units", "perplexity"), ("train", "trained: ")):
        statuses, said = Pair(verb, name, "--workdir", str(workdir), "--corpus", str(heard)).ended()
        assert statuses == [0, 0] and said_at_the_end in said[0] and said_at_the_end not in said[1], said
    whole = tmp_path / "whole"
    shutil.copytree(workdir / "units", whole / "units")
    shutil.copytree(StageFiles(trained, STAGE).folder, StageFiles(whole, STAGE).folder)
    train_stage(small(name, steps=STEPS), workdir=whole, corpus=heard)
    for one, other in zip(lines(workdir, name), lines(whole, name), strict=True):
        assert one["masked_loss"] == pytest.approx(other["masked_loss"], rel=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("other", "told"),
    [
        (["--learner.seed", "9"], "the configuration is not the same in all processes: of 2, number 1 differs"),
        (
            ["--workdir", "{}/unshared"],
            "config.txt, which process 0 wrote, is not the same in all processes: of 2, numb",
        ),
    ],
)
def test_processes_that_were_not_started_alike_say_so(heard, trained, tmp_path, other, told):
    for name in ("work", "unshared"):
        shutil.copytree(trained / "units", tmp_path / name / "units")
    command = ["train", STAGE, "--corpus", str(heard), "--workdir", str(tmp_path / "work")]
    other = [argument.format(tmp_path) for argument in other]
    statuses, said = Pair(*command, differing=other).ended()
    assert statuses == [1, 1] and all(told in text for text in said), said
