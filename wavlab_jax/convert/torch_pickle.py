"""PyTorch's pickles read as data: a machine for pickle's opcodes that has nothing to call.

A pickle is a program whose instructions name classes and call them. Here a name is only a name (`torch_names`), and a
call makes a plain value or an inert stub. `pickletools` of the standard library splits the bytes into opcodes and
runs nothing either. Memory stays within a small multiple of the pickle's own length.
"""

import pickletools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, BinaryIO

from wavlab_jax.convert.checkpoint import StoredTensor
from wavlab_jax.convert.names import ConvertError
from wavlab_jax.convert.torch_names import (
    BUILDERS,
    NOT_CALLED,
    Name,
    NumpyArray,
    NumpyDtype,
    Source,
    Storage,
    Stub,
    UnsafeFile,
    as_key,
    known_name,
    numpy_filled,
    numpy_text,
    typed,
)

MAX_DEPTH = 200  # of containers in containers; fairseq's configurations nest 6 deep
COPIES = 4  # how many times its own length a pickle may ask to copy; torch.save's stay under one
_LONG = str | bytes | bytearray | list | tuple | dict | set | frozenset


def read_pickle(stream: BinaryIO, source: Source, storage: Callable[[tuple], Storage] | None = None) -> Any:
    """The object of the pickle that `stream` stands at, in plain containers; leaves the stream behind the pickle.

    `storage` turns a persistent id into a Storage, or raises ConvertError; None: there are none.

    Raises UnsafeFile for a name or an opcode that no checkpoint needs, ConvertError for what is no pickle.
    """
    try:
        return _plain(_run(stream, source, storage), source.name)
    except ConvertError as error:
        if source.name in str(error):
            raise
        raise type(error)(f"{source.name} is not what torch.save writes: {error}") from error
    except Exception as error:  # whatever a hostile file makes pickletools or our own code stumble over
        why = f"{type(error).__name__}: {error}"[:200]
        raise ConvertError(f"{source.name} is damaged, or not what torch.save writes ({why})") from error


def _run(stream: BinaryIO, source: Source, storage: Callable[[tuple], Storage] | None) -> Any:
    stack, marks, memo = [], [], {}
    copied = 0

    def since_mark() -> list:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    def charge(parts: Any, position: int) -> None:
        """Calls copy what they are given; one that is given the same long thing over and over must come to an end."""
        nonlocal copied
        copied += sum(len(part) for part in (parts if type(parts) is tuple else (parts,)) if isinstance(part, _LONG))
        if copied > COPIES * position + (1 << 16):
            raise UnsafeFile(f"{source.name}: a pickle that would grow to many times its length")

    for opcode, arg, position in pickletools.genops(stream):
        name = opcode.name
        if name in _PUSHES_ITS_ARGUMENT:
            stack.append(arg)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "GLOBAL":
            stack.append(known_name(*arg.split(" ", 1), file=source.name))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(known_name(module, attribute, file=source.name))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            taken = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(taken)))
        elif name in _OF_MARKED:
            stack.append(_OF_MARKED[name](since_mark()))
        elif name == "APPEND":
            value = stack.pop()
            _members(stack[-1]).append(value)
        elif name == "APPENDS":
            values = since_mark()
            _members(stack[-1]).extend(values)
        elif name == "ADDITEMS":
            values = since_mark()
            typed(stack[-1], set).update(map(as_key, values))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _items(stack[-1])[as_key(key)] = value
        elif name == "SETITEMS":
            values = since_mark()
            _items(stack[-1]).update(_pairs(values))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            charge(args, position)
            stack.append(_build(source, function, args))
        elif name == "NEWOBJ_EX":
            _, args, function = stack.pop(), stack.pop(), stack.pop()
            charge(args, position)
            stack.append(_build(source, function, args))
        elif name in ("OBJ", "INST"):
            args = since_mark()
            function = known_name(*arg.split(" ", 1), file=source.name) if name == "INST" else args.pop(0)
            stack.append(_build(source, function, tuple(args)))
        elif name == "BUILD":
            state = stack.pop()
            charge(state, position)
            _set_state(source, stack[-1], state)
        elif name == "BINPERSID":
            if storage is None:
                raise UnsafeFile(f"{source.name}: a reference to a storage where there are none")
            stack.append(storage(typed(stack.pop(), tuple)))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):  # EXT1..4 and PERSID above all
            raise UnsafeFile(f"{source.name}: the pickle opcode {name} has no place in a checkpoint")
    raise ConvertError(f"{source.name}: a pickle without an end")


_PUSHES_ITS_ARGUMENT = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}


def _pairs(values: list) -> dict:
    return {as_key(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


_OF_MARKED: dict[str, Callable[[list], Any]] = {
    "LIST": list,
    "TUPLE": tuple,
    "DICT": _pairs,
    "FROZENSET": lambda values: frozenset(map(as_key, values)),
}


def _members(target: Any) -> list:
    return target.members if isinstance(target, Stub) else typed(target, list)


def _items(target: Any) -> dict:
    return target.items if isinstance(target, Stub) else typed(target, dict)


def _build(source: Source, function: Any, args: Any) -> Any:
    """What calling `function` would give: a value of ours, or a stub."""
    function, args = typed(function, Name), typed(args, tuple)
    pair = (function.module, function.name)
    if pair in BUILDERS:
        return BUILDERS[pair](source, *args)
    if pair in NOT_CALLED:
        raise UnsafeFile(f"{source.name} calls {function}, which is only named in a checkpoint")
    return Stub(function, args)


def _set_state(source: Source, target: Any, state: Any) -> None:
    if isinstance(target, Stub):
        for part in state if type(state) is tuple and len(state) == 2 else (state,):  # (__dict__, __slots__)
            if part is not None:
                target.state.update(part if type(part) is dict else {"state": part})
    elif isinstance(target, NumpyDtype):  # (version, byte order, of which, names, fields, size, alignment, flags)
        if any(part is not None for part in typed(state, tuple)[2:5]):
            raise UnsafeFile(f"{source.name}: a NumPy array of records; only plain numbers are read")
        target.text = numpy_text(source, typed(state[1], str) + target.text.lstrip("<>=|"))
    elif isinstance(target, NumpyArray):
        _, shape, dtype, fortran, raw = state
        target.value = numpy_filled(source, shape, dtype, raw, order="F" if fortran is True else "C")
    elif not isinstance(target, dict | StoredTensor):  # attributes of those (state_dict's _metadata) are left out
        raise UnsafeFile(f"{source.name} sets the state of a {type(target).__name__}")


def _plain(root: Any, file: str) -> Any:
    """`root` with stubs as plain containers and tensors named by their keys. Shared parts are converted once."""
    done: dict[int, Any] = {}
    unfinished = object()

    def convert(value: Any, depth: int) -> Any:
        if isinstance(value, Name):
            return str(value)
        if isinstance(value, NumpyArray):
            return value.value
        if not isinstance(value, dict | list | tuple | Stub) or isinstance(value, Storage):
            return value
        if done.get(id(value)) is unfinished or depth > MAX_DEPTH:
            raise ConvertError(f"{file}: a container that contains itself, or more than {MAX_DEPTH} in one another")
        if id(value) not in done:
            done[id(value)] = unfinished
            done[id(value)] = inside(value, depth + 1)
        return done[id(value)]

    def inside(value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            converted = ((key, convert(part, depth)) for key, part in value.items())
            return {k: replace(part, key=str(k)) if isinstance(part, StoredTensor) else part for k, part in converted}
        if isinstance(value, list | tuple):
            return type(value)([convert(part, depth) for part in value])
        package = value.of.module.split(".")[0]
        if package == "omegaconf":  # nodes hold their parents too: only the content counts
            return convert(value.state.get("_content", value.state.get("_val")), depth)
        if package == "operator":  # typing.Dict[...] among a configuration's annotations
            return str(value.of)
        if package == "pathlib":
            return "/".join(typed(part, str) for part in value.args).replace("//", "/")
        if value.state or value.items or not (value.members or value.args):
            return {key: convert(part, depth) for key, part in (value.state | value.items).items()}
        parts = value.members or value.args  # a list, or an enumeration's value
        return convert(parts[0], depth) if len(parts) == 1 else [convert(part, depth) for part in parts]

    return convert(root, 0)
