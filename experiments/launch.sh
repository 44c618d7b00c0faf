#!/usr/bin/env bash
# The same command on every host:  experiments/launch.sh [--again] train STAGE [...]
#
# Runs `python -m experiments ...` and, where that was stopped by a scheduler or lost another host, sees to it that it is
# run again. docs/scaling.md shows it on TPU pods, under Slurm, by hand and on spot machines.
#
#   in a Slurm batch script   (or the shell that salloc opens) starts a task of itself on every place of the allocation
#                             (srun); puts the job back into the queue (scontrol requeue) when the tasks were stopped
#                             before they were done, or one of them was lost: after a new checkpoint always, without one
#                             if the job has been restarted less than WAVLAB_REQUEUES (5) times; not after scancel
#   in a Slurm task (srun)    runs the command; jax asks Slurm for the other tasks
#   on a TPU machine          runs the command; jax asks the cloud for the other hosts of a pod
#   elsewhere                 runs the command, alone, or as WAVLAB_COORDINATOR, WAVLAB_PROCESSES, WAVLAB_PROCESS say
#   --again                   runs it again here, in a loop, after it was stopped or lost another host; five runs of less
#                             than a minute in a row are the last. In a Slurm batch script: every task does
#
# Statuses after which it is worth running again: 75, stopped by a signal and saved; 69, another process is gone; 134,
# jax ended the process because another is gone; 137, 138 and 143, killed by SIGKILL, SIGUSR1 or SIGTERM before training
# began or could save. PYTHON: the interpreter, by default that of .venv beside this folder.
set -u

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
pause=${WAVLAB_AGAIN_SECONDS:-10} # between two runs, so that a machine that is going away is gone
requeues=${WAVLAB_REQUEUES:-5} # of a Slurm job that lost a task before it made a checkpoint

again=
if [ "${1:-}" = --again ]; then again=1; shift; fi
if [ $# -eq 0 ]; then sed -n '2,/^set -u/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; fi

if [ ! -f "$here/experiments/__main__.py" ]; then
  echo "error: $0 is a copy outside of its repository, as sbatch makes one of a script that it is given: have a batch" \
    "script call experiments/launch.sh (docs/scaling.md, Slurm)" >&2
  exit 2
fi

stopped() { case $1 in 75 | 138 | 143) true ;; *) false ;; esac }
lost() { case $1 in 69 | 134 | 137) true ;; *) false ;; esac }

# Whether the Slurm job was cancelled, or requeued, by hand: it is on its way out, and neither its time nor another job
# is the reason.
cancelled() {
  case $(scontrol show job "$job" 2>/dev/null) in
    *Reason=TimeLimit* | *PreemptTime=[0-9]*) false ;;
    *JobState=COMPLETING* | *JobState=CANCELLED*) true ;;
    *) false ;;
  esac
}

# `run COMMAND...`: its status; signals that reach this shell are passed on to it, and it is waited for. It has a process
# group of its own, so that Ctrl-C reaches it once, by this shell; in this one's, bash would have it ignore Ctrl-C.
run() {
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  for name in TERM USR1 INT HUP; do
    # shellcheck disable=SC2064
    trap "told=1; kill -$name $child 2>/dev/null" "$name"
  done
  while :; do
    wait "$child"
    status=$?
    kill -0 "$child" 2>/dev/null || break # a signal ends `wait` before the child ends
  done
  trap - TERM USR1 INT HUP
  return "$status"
}

# `advanced SINCE COMMAND...`: whether the stage that it trains has a checkpoint that is newer, in seconds of the epoch;
# of a command that is not `train`, whether any stage of its workdir has.
advanced() {
  since=$1 verb=${2:-} stage=${3:-} workdir=work
  while [ $# -gt 0 ]; do
    case $1 in
      --workdir) workdir=${2:-} ;; --workdir=*) workdir=${1#*=} ;;
      --name) stage=${2:-} ;; --name=*) stage=${1#*=} ;;
    esac
    shift
  done
  [ "$verb" = train ] || stage='*'
  [ -n "$(find -L "$workdir/stages" -mindepth 3 -maxdepth 3 -path "*/stages/$stage/checkpoints/[0-9]*" \
    ! -name '*[!0-9]*' -newermt "@$since" -print -quit 2>/dev/null)" ]
}

told= # whether this shell itself was asked to stop

step=${SLURM_STEP_ID:-}
[ "$step" != 4294967290 ] || step= # the shell that salloc opens may be a step, but is no task (SLURM_INTERACTIVE_STEP)
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "$step" ]; then
  # srun does not take this over from sbatch by itself
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
  # the number of an array's last job is that of the array: `scontrol requeue` would stop and requeue the others with it
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
  job=${job:-$SLURM_JOB_ID}
  began=$(date +%s)
  run srun --kill-on-bad-exit=0 "$here/experiments/launch.sh" ${again:+--again} "$@"
  status=$?
  restarts=${SLURM_RESTART_COUNT:-0} # by whatever cause
  if { stopped "$status" || lost "$status"; } && cancelled; then
    echo "ended with status $status; job $job was cancelled or requeued by hand, and is left to Slurm" >&2
  elif stopped "$status" || { lost "$status" && { [ "$restarts" -lt "$requeues" ] || advanced "$began" "$@"; }; }; then
    echo "ended with status $status; back into the queue: job $job" >&2
    scontrol requeue "$job" ||
      echo "it could not be requeued (sbatch --requeue allows it, salloc never): start the same command again" >&2
  elif lost "$status"; then
    echo "ended with status $status, a task was lost before there was a new checkpoint; job $job was restarted" \
      "$restarts times already, and WAVLAB_REQUEUES is $requeues: see why in its log, then submit it again" >&2
  fi
  exit "$status"
fi

# A TPU machine: Google's PCI vendor number, and the devices that TPUs are reached by.
if [ -z "${WAVLAB_HOSTS:-}" ] && { [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; } &&
  grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; then
  export WAVLAB_HOSTS=auto
fi

export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" # from any folder; paths on the command line are relative to it
[ -n "$again" ] || exec "$python" -m experiments "$@"
short=0
while :; do
  began=$SECONDS
  run "$python" -m experiments "$@"
  status=$?
  if [ -n "$told" ] || ! { stopped "$status" || lost "$status"; }; then exit "$status"; fi
  if [ $((SECONDS - began)) -lt 60 ]; then short=$((short + 1)); else short=0; fi
  [ "$short" -lt 5 ] || exit "$status"
  echo "ended with status $status; again in $pause s" >&2
  sleep "$pause"
done
