"""What a compiled program does, read from its text (optimised HLO, `compiled.as_text()`): products and collectives.

XLA's own count (`cost_analysis`) takes the body of a loop once; here it is taken as often as the loop turns. Counted
are products and convolutions, a multiply-add as two and only where a kernel meets data: padding and the holes of
dilated inputs cost nothing. That is the convention of XLA's `HloCostAnalysis` and of `flops.row_flops`. The text is the
program of one device.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class ProgramError(ValueError):
    """A program text that holds something that cannot be counted; the message quotes it."""


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
        shapes: of its arrays on one device, whole: gathered, or not yet scattered.
        bytes: of those arrays, once.
        groups: devices that exchange with one another, as positions in the mesh; empty: all of them.
        trips: how often each loop around it turns, outermost first.
        origin: JAX's name of the operation that it was made for.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    trips: tuple[int, ...]
    origin: str

    @property
    def times(self) -> int:
        """How often a step runs it."""
        return math.prod(self.trips)


class Program(NamedTuple):
    """What one device does in one step: floating-point operations of products, and exchanges with other devices."""

    flops: float
    collectives: tuple[Collective, ...]


_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # others say it: f32, s8, u4, f8e4m3


class _Instruction(NamedTuple):
    name: str
    opcode: str
    result: str  # type text
    operands: tuple[str, ...]
    operand_types: str
    attributes: str


def read_program(text: str) -> Program:
    """Counts of one step of the program. Raises ProgramError where a loop does not say how often it turns."""
    computations, entry = _computations(text)
    flops: dict[str, float] = {}
    types = {name: {i.name: i.result for i in body} for name, body in computations.items()}

    def flops_of(name: str) -> float:
        if name not in flops:
            flops[name] = 0.0
            flops[name] = sum(cost(i, types[name]) for i in computations[name])
        return flops[name]

    def cost(each: _Instruction, known: dict[str, str]) -> float:
        if each.opcode in ("dot", "convolution"):
            return _product(each, known)
        calls = _calls(each)
        if each.opcode == "while":
            return _trips(each, computations) * flops_of(calls["body"][0])
        if each.opcode == "conditional":  # a skipped layer is rare: the dearer branch is taken
            return max(flops_of(branch) for branch in calls["branch"])
        return sum(flops_of(called) for called in calls["other"])

    found: dict[tuple, Collective] = {}

    def walk(name: str, loops: tuple[tuple[str, int], ...], caller: str) -> None:
        for each in computations[name]:
            kind = next((k for k in _KINDS if each.opcode in (k, f"{k}-start")), None)
            if kind is not None:
                # TPU: a fusion of all-reduce and slice is a reduce-scatter
                kind = "reduce-scatter" if "all-reduce-scatter" in (name + caller) else kind
                one = _collective(each, kind, types[name], tuple(trips for _, trips in loops))
                # TPU: one exchange may be spread over several fusions, each of which shows it
                channel = re.search(r"channel_id=(\d+)", each.attributes)
                found[(loops, kind, channel.group(1) if channel else each.name, one.shapes)] = one
            calls = _calls(each)
            if each.opcode == "while":
                walk(calls["body"][0], (*loops, (f"{name}/{each.name}", _trips(each, computations))), "")
            else:
                for called in (*calls["branch"], *calls["other"]):
                    walk(called, loops, each.name)

    walk(entry, (), "")
    return Program(flops_of(entry), tuple(found.values()))


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    body, entry = None, None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            head = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            if head is None:
                continue
            body = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif body is not None and " = " in line:
            instruction = _instruction(line)
            if instruction is not None:
                body.append(instruction)
    if entry is None:
        raise ProgramError("this is not the text of a compiled program: it has no ENTRY computation")
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    name, rest = line.split(" = ", 1)
    opcode = re.search(r"(?:^|\s)([a-z][a-z0-9\-]*)\(", rest)
    if opcode is None:
        return None
    depth, end = 1, opcode.end()
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    inside = rest[opcode.end() : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    name = name.strip().removeprefix("ROOT ").lstrip("%")
    return _Instruction(name, opcode.group(1), rest[: opcode.start()], operands, inside, rest[end:])


def _calls(each: _Instruction) -> dict[str, tuple[str, ...]]:
    """Computations that an instruction runs: `body` of a loop, `branch` of a choice, `other`."""
    if "=%" not in each.attributes and "={%" not in each.attributes:
        return {"body": (), "branch": (), "other": ()}

    def named(*attributes: str) -> tuple[str, ...]:
        lists = re.findall(rf"\b(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%[\w.\-]+)", each.attributes)
        return tuple(name for one in lists for name in re.findall(r"%([\w.\-]+)", one))

    return {
        "body": named("body"),
        "branch": named("branch_computations", "true_computation", "false_computation"),
        "other": () if each.opcode in ("while", "conditional") else named("calls", "called_computations", "to_apply"),
    }


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    known = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%([\w.\-]+)", loop.attributes)
    limits = [
        int(each.operand_types)
        for each in computations.get(condition.group(1) if condition else "", [])
        if each.opcode == "constant" and each.result.startswith("s32[]")
    ]
    if len(limits) != 1:
        raise ProgramError(f"the loop {loop.name} does not say how often it turns")
    return limits[0]


def _arrays(type_text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for dtype, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_text):
        yield dtype, tuple(map(int, filter(None, sizes.split(","))))


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    bits = _BITS.get(dtype) or int(re.match(r"[a-z]+(\d+)", dtype).group(1))
    return math.prod(shape) * bits // 8


def _operand_types(each: _Instruction, known: dict[str, str]) -> list[list[tuple[str, tuple[int, ...]]]]:
    return [list(_arrays(known[name])) for name in each.operands if name in known]


def _product(each: _Instruction, known: dict[str, str]) -> float:
    out = next(_arrays(each.result))[1]
    left, right = (types[0][1] for types in _operand_types(each, known)[:2])
    if each.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
        axes = [int(axis) for axis in contracted.group(1).split(",") if axis] if contracted else []
        return 2.0 * math.prod(out) * math.prod(left[axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    data, kernel, output = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", each.attributes)
    groups = re.search(r"batch_group_count=(\d+)", each.attributes)
    total = 2.0 * left[data.index("b")] / (int(groups.group(1)) if groups else 1)
    total *= right[kernel.index("i")] * right[kernel.index("o")]
    spatial = sorted(label for label in data if label.isdigit())
    fields = dict(re.findall(r"(\w+)=(\S+)", window.group(1))) if window else {}

    def field(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    strides, holes, spread = field("stride", "1"), field("lhs_dilate", "1"), field("rhs_dilate", "1")
    pads = field("pad", "0_0")
    for place, label in enumerate(spatial):
        total *= _meetings(
            left[data.index(label)],
            right[kernel.index(label)],
            out[output.index(label)],
            stride=int(strides[place]),
            before=int(pads[place].split("_")[0]),
            holes=int(holes[place]),
            spread=int(spread[place]),
        )
    return total


def _meetings(data: int, kernel: int, out: int, *, stride: int, before: int, holes: int, spread: int) -> int:
    """Pairs of (output, kernel element) along one axis that meet data, not padding or a hole."""
    (few, step), (many, other) = sorted(((out, stride), (kernel, spread)))
    span, count = (data - 1) * holes + 1, 0
    positions = np.arange(many, dtype=np.int64) * other - before
    for first in range(few):
        at = positions + first * step
        count += int(np.count_nonzero((at >= 0) & (at < span) & (at % holes == 0)))
    return count


def _collective(each: _Instruction, kind: str, known: dict[str, str], trips: tuple[int, ...]) -> Collective:
    sent = [one for types in _operand_types(each, known) for one in types]
    if kind == "all-gather":  # of an asynchronous start the result holds what was sent, too
        received = [one for one in _arrays(each.result) if one[0] != "u32" or one[1]]
        if each.opcode.endswith("-start"):
            received = received[len(sent) :]
    else:
        received = sent
    origin = re.search(r'op_name="([^"]*)"', each.attributes)
    return Collective(
        kind=kind,
        shapes=tuple(shape for _, shape in received),
        bytes=sum(_bytes(*one) for one in received),
        groups=_groups(each.attributes),
        trips=trips,
        origin=origin.group(1) if origin else "",
    )


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Of `{{0,1},{2,3}}`, `[2,4]<=[8]`, `[4,2]<=[2,4]T(1,0)`, and `mesh['a'=4,'b'=2], device_ids=(...) {'a'}`."""
    pairs = re.search(r"source_target_pairs=\{((?:\{[\d,]+\},?)+)\}", attributes)
    listed = pairs or re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", attributes)
    if listed:
        return tuple(tuple(map(int, ids.split(","))) for ids in re.findall(r"\{([\d,]+)\}", listed.group(1)))
    iota = r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?"
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + iota + r"\))? \{([^}]*)\}", attributes)
    if named:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        sizes, shape, base, turn, chosen = list(map(int, axes.values())), *named.groups()[1:]
        ids = _iota(base or shape, turn, math.prod(sizes)).reshape(sizes)
        inside = [list(axes).index(axis) for axis in re.findall(r"'(\w+)'", chosen)]
        outside = [axis for axis in range(len(sizes)) if axis not in inside]
        ids = ids.transpose(*outside, *inside).reshape(-1, math.prod(sizes[axis] for axis in inside))
        return tuple(map(tuple, ids.tolist()))
    plain = re.search(r"replica_groups=" + iota, attributes)
    if plain is None:
        return ()
    shape = list(map(int, plain.group(1).split(",")))
    return tuple(map(tuple, _iota(plain.group(2), plain.group(3), math.prod(shape)).reshape(shape).tolist()))


def _iota(base: str | None, turn: str | None, count: int) -> np.ndarray:
    ids = np.arange(count)
    if base and math.prod(map(int, base.split(","))) == count:
        ids = ids.reshape(list(map(int, base.split(","))))
    return ids.transpose(*map(int, turn.split(","))) if turn else ids
