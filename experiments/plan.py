"""What a stage will take on devices that are not at hand: compiled, counted and added up before the run."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax

from data_pipelines.batch import SAMPLE_RATE, num_frames
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import rows_per_step
from experiments.stage import StageConfig, StageError
from experiments.targets import is_online
from wavlab_jax import plan
from wavlab_jax.chips import chip_named
from wavlab_jax.model import abstract_parameters, count
from wavlab_jax.plan import Compiled, DoesNotFit, Memory, Pod, Step, Tried
from wavlab_jax.sharding import make_mesh, micro_batches
from wavlab_jax.targets.online import Targets, make_targets
from wavlab_jax.targets.random_projection import RandomProjectionConfig, random_projection

CPU_HEADROOM = 0.9  # of a chip's memory that an estimate may fill: compilers, drivers and fragmentation take some
DEFAULT_UTILISATION = 0.4
LESS_MEMORY = (
    "Training takes less of a device with a smaller --seconds-per-device (the same steps, in more passes), with "
    "--learner.encoder.rematerialize layers, and with --mesh.fsdp on several; `plan` says beforehand what fits"
)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """For what a stage is planned.

    Attributes:
        topology: of TPUs, a chip and its sides: v5e:16x16, v4:4x4x2. Compiled by libtpu where it is installed.
        chips: their number, where there is no topology: GPUs, and estimates.
        chip: which they are, beside `chips` alone: a100-80, h100, v4, ...
        utilisation: share of the chips' peak that the run is assumed to reach (MFU), for times and costs.
        search: compile further sizes to find the most audio that a chip can hold in one pass.
        compile: False: by formula alone, in seconds where compiling for a TPU takes minutes; nothing is searched then.
    """

    topology: str | None = None
    chips: int | None = None
    chip: str | None = None
    utilisation: float = DEFAULT_UTILISATION
    search: bool = True
    compile: bool = True

    def check(self) -> None:
        """Raises StageError if this does not say what to plan for."""
        if (self.topology is None) == (self.chips is None):
            raise StageError("give either --topology (TPUs: v5e:16x16) or --chips N with --chip (GPUs: a100-80)")
        if self.chips is not None and (self.chips < 1 or self.chip is None):
            raise StageError("--chips N, at least 1, goes with --chip: a100-80, h100, v4, ...")
        if self.topology is not None and self.chip is not None:
            raise StageError(f"--topology {self.topology} says which chip it is of: leave out --chip {self.chip}")
        if not 0 < self.utilisation <= 1:
            raise StageError(f"utilisation is {self.utilisation:g}; it is a share of the peak, above 0 and at most 1")


def prepare(cfg: PlanConfig) -> Pod:
    """The devices, described; before JAX's backend starts, whose virtual CPU devices stand in where libtpu cannot."""
    cfg.check()
    chip = chip_named(cfg.chip) if cfg.topology is None else plan.chip_of_topology(cfg.topology)
    jax.config.update("jax_platforms", "cpu")  # nothing is run: a chip that is here stays free
    if cfg.compile and cfg.topology is not None and importlib.util.find_spec("libtpu") is not None:
        return plan.tpu_pod(cfg.topology)
    wanted = cfg.chips or plan.chips_of_topology(cfg.topology)
    try:
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:  # a backend has been started, by a caller that is no command line
        pass
    if len(jax.devices("cpu")) < wanted:
        raise plan.PlanError(f"JAX has started with {len(jax.devices('cpu'))} CPU devices, and {wanted} are needed")
    return Pod(jax.devices("cpu")[:wanted], chip, False)


def plan_stage(stage: StageConfig, cfg: PlanConfig, *, corpus: Path | None = None, say=print) -> dict:
    """Everything that is known of a run before it starts, as JSON; `say` is told what is being compiled.

    Raises PlanError, ChipError, ShardingError (a mesh that does not divide), StageError, ManifestError.
    """
    manifest = None if corpus is None else Manifest.load(corpus)
    languages = 0 if manifest is None else len(manifest.languages)
    pod = prepare(cfg)
    mesh = make_mesh(stage.mesh, devices=pod.devices)
    samples = stage.data.lengths[-1]
    rows = rows_per_step(samples, cfg=stage.data)
    passes = micro_batches(rows, samples, seconds_per_device=stage.seconds_per_device, devices=mesh.size)
    online = sum(map(is_online, stage.unit_sets))
    step = Step(rows, samples, passes, sets=len(stage.unit_sets) - online, clean=stage.data.keep_clean)
    targets, notes = _targets(stage, mesh)
    if targets is None:
        step = step._replace(sets=len(stage.unit_sets))
    filler = -rows % (passes * mesh.size)
    if filler:
        notes.append(
            f"{rows} rows do not divide over {mesh.size} chips and {passes} pass(es): {filler} more are computed that "
            "weigh nothing, and are counted"
        )
    params = abstract_parameters(stage.learner.encoder, stage.learner.head)
    flops = plan.training_flops(stage.learner, step, mesh)
    limit = int(pod.chip.memory_bytes * (1 if pod.own_compiler else CPU_HEADROOM))
    result = {
        "stage": stage.name,
        "devices": {
            "chip": pod.chip.name,
            "chips": mesh.size,
            "mesh": dict(mesh.shape),
            "memory_bytes": pod.chip.memory_bytes,
            "usable_bytes": limit,
            "compiled_by": _compiler(pod, cfg),
        },
        "parameters": {name: count(part) for name, part in params.items()},
        "step": {**step._asdict(), "seconds_per_chip_and_pass": _seconds(step, mesh.size)},
        "rematerialize": stage.learner.encoder.rematerialize,
        "flops_per_step": {"formula": flops, "recomputed": plan.recomputed(stage.learner, step, mesh)},
        "memory_by_formula": _memory(plan.memory_by_formula(stage.learner, mesh, step)),
        "run": _run(stage, step, flops, mesh.size, pod.chip.peak_flops, cfg.utilisation),
        "notes": notes,
    }

    def compiled(step: Step) -> Compiled:
        say(f"compiling {stage.name}: {_seconds(step, mesh.size):g} s a chip and pass, {step.passes} pass(es) ...")
        return plan.compile_step(stage.learner, mesh, step, pod=pod, targets=targets, languages=languages)

    if cfg.compile:
        try:
            found = compiled(step)
        except DoesNotFit as error:
            result["does_not_fit"] = str(error)
        else:
            total = found.program.flops * mesh.size
            again = result["flops_per_step"]["recomputed"]
            result["flops_per_step"] |= {"compiled": total, "ratio": total / (flops + again)}
            result["memory"] = _memory(found.memory)
            result["fits"] = found.memory.total <= limit
            result["extrapolated_seconds_per_chip"] = _extrapolated(result, limit=limit)
            result["exchanges"] = [each._asdict() for each in plan.exchanges(found.program, mesh)]
            result["unexplained"] = [
                f"{each.times} x {each.kind} {list(each.shapes)} over {plan.axes_of(each, mesh)}"
                for each in plan.strangers(found.program, stage.learner, mesh)
            ]
    if "does_not_fit" in result or not result.get("fits", True):
        notes.append(f"this step does not fit. {LESS_MEMORY}")
    if cfg.compile and cfg.search:
        rows_now = -(-step.rows // (step.passes * mesh.size))
        own = {rows_now: None if "does_not_fit" in result else found.memory.total}  # as compiled above
        state = result["memory_by_formula"]

        def memory_of(rows: int) -> int | None:
            try:
                return own[rows] if rows in own else compiled(plan.with_rows(step, rows, mesh)).memory.total
            except DoesNotFit:
                return None

        fixed = state["parameters"] + state["optimizer"]
        tried = list(plan.largest_rows(memory_of, limit=limit, first=rows_now, fixed=fixed))
        result["tried"] = [_tried(each, samples) for each in sorted(tried)]
        fitting = [each["seconds"] for each in result["tried"] if each["memory_bytes"] is not None]
        result["largest_seconds_per_chip"] = max(fitting, default=0.0)
    if manifest is not None:
        from experiments.run import shares_table  # takes a second, which the command line's help need not

        result["languages"] = shares_table(stage, manifest)
    return result


def _targets(stage: StageConfig, mesh) -> tuple[Targets | None, list[str]]:
    """Of units that are computed in the step; a teacher's are not planned for, and said so."""
    if not any(map(is_online, stage.unit_sets)):
        return None, []
    if not all(isinstance(each, RandomProjectionConfig) for each in stage.unit_sets if is_online(each)):
        return None, ["the teacher that computes units in the step is not counted: neither operations nor memory"]
    sets = [random_projection(each) if is_online(each) else None for each in stage.unit_sets]
    here = make_mesh(dataclasses.replace(stage.mesh, data=1, fsdp=1), devices=jax.devices("cpu")[:1])
    return plan.abstract_targets(make_targets(sets, here), mesh), []


def _seconds(step: Step, devices: int) -> float:
    return -(-step.rows // (step.passes * devices)) * step.samples / SAMPLE_RATE


def _compiler(pod: Pod, cfg: PlanConfig) -> str:
    if not cfg.compile:
        return "nobody, by formula alone"
    return "libtpu, for these chips" if pod.own_compiler else "XLA:CPU, an estimate"


def _extrapolated(result: dict, *, limit: int) -> float:
    """Seconds of audio a chip and pass, in whole rows, that would fill `limit` bytes if all but state and gradient grew
    with rows: from one compiled size, where `search` compiles others."""
    memory, step = result["memory"], result["step"]
    held = memory["parameters"] * (2 + (step["passes"] > 1)) + memory["optimizer"]
    seconds = step["seconds_per_chip_and_pass"] * (limit - held) / max(memory["total"] - held, 1)
    row = step["samples"] / SAMPLE_RATE
    return max(seconds // row, 0) * row


def _memory(memory: Memory) -> dict[str, int]:
    return {**memory._asdict(), "total": memory.total}


def _tried(each: Tried, samples: int) -> dict:
    return {"rows": each.rows, "seconds": each.rows * samples / SAMPLE_RATE, "memory_bytes": each.memory}


def _run(stage: StageConfig, step: Step, flops: float, chips: int, peak: float, utilisation: float) -> dict:
    steps_per_second = peak * chips * utilisation / flops
    hours = stage.loop.steps / steps_per_second / 3600
    return {
        "steps": stage.loop.steps,
        "audio_hours": stage.loop.steps * stage.data.seconds_per_step / 3600,
        "frames": stage.loop.steps * step.rows * num_frames(step.samples),
        "utilisation": utilisation,
        "steps_per_second": steps_per_second,
        "hours": hours,
        "chip_hours": hours * chips,
    }


def table(result: dict) -> str:
    """The result for people."""
    devices, step, flops, run = (result[key] for key in ("devices", "step", "flops_per_step", "run"))
    mesh = " x ".join(f"{axis} {size}" for axis, size in devices["mesh"].items())
    lines = [
        f"{result['stage']} on {devices['chips']} {devices['chip']} ({mesh}); compiled by {devices['compiled_by']}",
        f"parameters          {sum(result['parameters'].values()):,} "
        f"({', '.join(f'{name} {number:,}' for name, number in result['parameters'].items())})",
        f"a step              {step['rows']} rows of {step['samples'] / SAMPLE_RATE:g} s in {step['passes']} pass(es), "
        f"{step['seconds_per_chip_and_pass']:g} s a chip and pass; rematerialize {result['rematerialize']}",
        f"operations a step   {_tera(flops['formula'])} TFLOP by formula"
        + (f" and {_tera(flops['recomputed'])} for what is rematerialised" if flops["recomputed"] else "")
        + (f", {_tera(flops['compiled'])} compiled (ratio {flops['ratio']:.3f})" if "ratio" in flops else ""),
    ]
    for title, memory in (("memory, compiled", result.get("memory")), ("memory, formula", result["memory_by_formula"])):
        if memory:
            lines.append(f"{title:<20}" + _gib(memory, devices["memory_bytes"]))
    if "does_not_fit" in result:
        lines.append(f"does not fit        {result['does_not_fit']}")
    elif not result.get("fits", True):
        usable, all_of_it = (devices[name] / 2**30 for name in ("usable_bytes", "memory_bytes"))
        lines.append(
            f"does not fit        this step needs more than {usable:.1f} GiB"
            + (
                ", which is what the chip has"
                if usable == all_of_it
                else f" of {all_of_it:.1f}, the most that is planned"
            )
        )
    for each in result.get("exchanges", ()):
        size = f"{each['bytes'] / 2**30:8.3f} GiB"
        lines.append(f"exchanges a step    {each['count']:>5} {each['kind']:<18} over {each['axes']:<10} {size}")
    if "exchanges" in result:
        unexplained = result["unexplained"]
        lines.append(f"not of fsdp or gradient  {'; '.join(unexplained) if unexplained else 'none'}")
    for each in result.get("tried", ()):
        memory = each["memory_bytes"]
        fits = "does not fit" if memory is None else f"fits, {memory / 2**30:.2f} GiB"
        lines.append(f"compiled            {each['seconds']:6g} s a chip and pass: {fits}")
    if "tried" not in result and "extrapolated_seconds_per_chip" in result:
        seconds = result["extrapolated_seconds_per_chip"]
        lines.append(f"largest that fits   about {seconds:g} s of audio a chip and pass, if memory grows evenly")
    if "tried" in result:
        capped = any(each["rows"] == plan.MOST_ROWS and each["memory_bytes"] is not None for each in result["tried"])
        more = f", or more: no more than {plan.MOST_ROWS} rows are tried" if capped else ""
        lines.append(f"largest that fits   {result['largest_seconds_per_chip']:g} s of audio a chip and pass{more}")
    lines += [
        f"the whole run       {run['steps']:,} steps, {run['audio_hours']:,.0f} h of audio, "
        f"{run['frames'] / 1e9:,.2f} G frames",
        f"at {run['utilisation']:.0%} of peak      {run['steps_per_second']:.2f} steps/s, {run['hours']:,.1f} h, "
        f"{run['chip_hours']:,.0f} chip-hours",
    ]
    for name, row in sorted(result.get("languages", {}).items(), key=lambda item: -item[1]["heard"]):
        lines.append(
            f"  {name:<8} {_hours(row['hours']):>10} h here, {_hours(row['heard']):>10} h heard, "
            f"{row['epochs']:7.2f} epochs"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.3g}"


def _tera(operations: float) -> str:
    return f"{operations / 1e12:,.1f}" if operations >= 1e13 else f"{operations / 1e12:.3g}"


def _gib(memory: dict[str, int], available: int) -> str:
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items() if name != "total" and size)
    return f"{memory['total'] / 2**30:.2f} of {available / 2**30:.1f} GiB a chip: {parts}"


def as_json(result: dict) -> str:
    """The result for programs."""
    return json.dumps(result, indent=1, ensure_ascii=False)
