"""PyTorch's files without torch: what comes back, and that hostile, damaged and lying files end in a message.

`test_torch_files_peer.py` compares with torch.save and torch.load.
"""

import copyreg
import io
import os
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wavlab_jax.convert import ConvertError
from wavlab_jax.convert.checkpoint import StoredTensor
from wavlab_jax.convert.torch_files import UnsafeFile, read_torch_file, write_torch_file

MARKER = "marker-of-code-that-ran"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Where code that ran would leave a trace."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / MARKER).exists()


def dump(value) -> bytes:
    """The opcodes of a plain value, without frame and end."""
    return pickle.dumps(value, 2)[2:-1]


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *args: bytes) -> bytes:
    return name(module, attribute) + b"(" + b"".join(args) + b"tR"


def tensor(key="0", count=6, size=(2, 3), stride=(3, 1), offset=0, storage="FloatStorage") -> bytes:
    parts = (dump("storage"), name("torch", storage), dump(key), dump("cpu"), dump(count))
    view = (dump(offset), dump(size), dump(stride), dump(False), call("collections", "OrderedDict"))
    return call("torch._utils", "_rebuild_tensor_v2", b"(" + b"".join(parts) + b"tQ", *view)


VALUES = np.arange(6, dtype=np.float32)


def archive(path, content: bytes, *, storages=None, extra=None, compression=zipfile.ZIP_STORED):
    """A file in the zip format around a pickle's opcodes."""
    storages = {"0": VALUES.tobytes()} if storages is None else storages
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("model/data.pkl", b"\x80\x02" + content + b".")
        for key, raw in storages.items():
            file.writestr(f"model/data/{key}", raw)
        for entry, raw in (extra or {}).items():
            file.writestr(entry, raw)
    return path


def legacy(path, content: bytes, *, keys=("0",), storages=None, system=None):
    """A file in the older format."""
    storages = [(6, VALUES.tobytes())] if storages is None else storages
    system = {"protocol_version": 1001, "little_endian": True} if system is None else system
    raw = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system))
    raw += b"\x80\x02" + content + b"." + pickle.dumps(list(keys), 2)
    path.write_bytes(raw + b"".join(struct.pack("<q", count) + values for count, values in storages))
    return path


def old_tensor(**changes) -> bytes:
    """`tensor` as the older format has it: a sixth entry in the persistent id."""
    return tensor(**changes).replace(b"tQ", b"NtQ")


# ----------------------------------------------------------------------------------------------------- there and back


def contents() -> dict:
    rng = np.random.default_rng(0)
    arrays = {
        kind: rng.integers(-9, 9, (2, 3)).astype(kind)
        for kind in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")
    }
    return {
        "model": arrays | {"bool": np.array([True, False]), "scalar": np.array(1.5, np.float32), "empty": VALUES[:0]},
        "cfg": {"a": [1, -5, 2**40, -(2**70), 0.1, "ünï", None, True, False], "t": (1, ()), "e": {}, "l": []},
    }


def test_what_is_written_comes_back(tmp_path):
    content = contents()
    write_torch_file(tmp_path / "x.pt", content)
    found = read_torch_file(tmp_path / "x.pt")
    assert found["cfg"] == content["cfg"] and found["model"].keys() == content["model"].keys()
    for key, array in content["model"].items():
        stored = found["model"][key]
        assert isinstance(stored, StoredTensor) and (stored.key, stored.shape) == (key, array.shape)
        assert stored.read().dtype == array.dtype and stored.file == str(tmp_path / "x.pt")
        np.testing.assert_array_equal(stored.read(), array)
    write_torch_file(tmp_path / "y.pt", content)
    assert (tmp_path / "y.pt").read_bytes() == (tmp_path / "x.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.pt") as file:
        assert file.testzip() is None
        for info in file.infolist():  # aligned, for those who map the file
            assert (info.header_offset + 30 + len(info.filename) + len(info.extra)) % 64 == 0


def test_strides_offsets_and_shared_storages_are_honoured(tmp_path):
    pairs = {
        "whole": tensor(),
        "turned": tensor(size=(3, 2), stride=(1, 3)),
        "part": tensor(size=(2,), stride=(2,), offset=1),
        "one": tensor(size=(), stride=(), offset=5),
        "spread": tensor(size=(4, 2), stride=(0, 1), offset=2),
        "none": tensor(size=(0, 3), stride=(3, 1)),
    }
    content = b"}(" + b"".join(dump(key) + value for key, value in pairs.items()) + b"u"
    expected = {
        "whole": VALUES.reshape(2, 3),
        "turned": VALUES.reshape(2, 3).T,
        "part": VALUES[1:4:2],
        "one": VALUES[5],
        "spread": np.tile(VALUES[2:4], (4, 1)),
        "none": np.zeros((0, 3)),
    }
    big = VALUES.astype(">f4").tobytes()
    for path in (
        archive(tmp_path / "x.pt", content),
        archive(tmp_path / "b.pt", content, storages={"0": big}, extra={"model/byteorder": b"big"}),
        legacy(tmp_path / "y.pt", content.replace(b"tQ", b"NtQ")),
    ):
        found = read_torch_file(path)
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key].read(), array, err_msg=key)
            assert found[key].read().flags.c_contiguous and found[key].shape == array.shape


def test_tensors_are_read_when_they_are_asked_for(tmp_path):
    """Memory: nothing when opened, one tensor when read, one tensor when written."""
    side, megabyte = 512, 1 << 20  # 1 MB each
    model = {str(i): StoredTensor(str(i), (side, side), lambda: np.ones((side, side), np.float32)) for i in range(8)}

    def peak(action) -> float:
        tracemalloc.start()
        try:
            action()
            return tracemalloc.get_traced_memory()[1] / megabyte
        finally:
            tracemalloc.stop()

    path = tmp_path / "x.pt"
    assert peak(lambda: write_torch_file(path, {"model": model})) < 1.5
    assert peak(lambda: read_torch_file(path)) < 0.3
    found = read_torch_file(path)["model"]
    assert peak(lambda: [tensor.read().sum() for tensor in found.values()]) < 1.5
    path.write_bytes(path.read_bytes()[: -3 * megabyte])
    with pytest.raises(ConvertError, match="truncated in storage 7"):
        found["7"].read()


def test_python_objects_of_configurations_become_plain(tmp_path):
    content = {
        "namespace": name("argparse", "Namespace") + b")\x81}" + dump("lr") + dump(0.5) + b"sb",
        "node": name("omegaconf.nodes", "AnyNode") + b")\x81}" + dump("_val") + dump(3) + b"sb",
        "enum": call("fairseq.dataclass.constants", "Choices", dump("layer_norm")),
        "dictionary": name("fairseq.data.dictionary", "Dictionary") + b")\x81}" + dump("symbols") + dump(["a"]) + b"sb",
        "default": call("collections", "defaultdict", name("__builtin__", "list")) + dump("a") + dump(1) + b"s",
        "type": name("typing", "Any"),
        "annotation": call("_operator", "getitem", name("typing", "Dict"), name("__builtin__", "str")),
        "path": call("pathlib", "PosixPath", dump("/"), dump("a"), dump("b")),
        "empty": name("argparse", "Namespace") + b")\x81",
        "dtype": name("torch", "float16"),
        "size": call("torch", "Size", dump([1, 2])),
        "device": call("torch", "device", dump("cuda"), dump(0)),
        "bytes": call("_codecs", "encode", dump("ab\xff"), dump("latin1")),
        "numpy": dump(np.float64(1.25)),
        "array": dump(np.arange(4, dtype=np.int16).reshape(2, 2).T),
        "parameter": call("torch._utils", "_rebuild_parameter", tensor(), dump(True), b"}"),
        "untyped": call(
            "torch._utils",
            "_rebuild_tensor_v3",
            b"(" + dump("storage") + name("torch.storage", "UntypedStorage") + dump("0") + b"NK\x18tQ",
            *(dump(0), dump((12,)), dump((1,)), dump(False), dump(None), name("torch", "bfloat16")),
        ),
    }  # fmt: skip
    found = read_torch_file(
        archive(tmp_path / "x.pt", b"}(" + b"".join(dump(key) + part for key, part in content.items()) + b"u")
    )
    np.testing.assert_array_equal(found.pop("array"), np.arange(4).reshape(2, 2).T)
    np.testing.assert_array_equal(found.pop("parameter").read(), VALUES.reshape(2, 3))
    halves = VALUES.view(np.uint32)[:, None] >> np.array([0, 16], np.uint32)  # of each, the lower before the upper
    np.testing.assert_array_equal(found.pop("untyped").read(), (halves << 16).view(np.float32).reshape(-1))
    assert found == {
        "namespace": {"lr": 0.5},
        "node": 3,
        "enum": "layer_norm",
        "dictionary": {"symbols": ["a"]},
        "default": {"a": 1},
        "type": "typing.Any",
        "annotation": "operator.getitem",
        "path": "/a/b",
        "empty": {},
        "dtype": "torch.float16",
        "size": (1, 2),
        "device": "cuda",
        "bytes": b"ab\xff",
        "numpy": 1.25,
    }


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    for content in ({"a": {1, 2}}, {"a": VALUES.astype(np.complex64)}, object()):
        with pytest.raises(ConvertError):
            write_torch_file(tmp_path / "x.pt", content)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ hostile


class Reduced:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


HOSTILE = {
    "os.system": pickle.dumps(Reduced(os.system, f"touch {MARKER}"), 2),
    "os.system by STACK_GLOBAL": pickle.dumps(Reduced(os.system, f"touch {MARKER}"), 4),
    "nested": pickle.dumps({"model": [({"a": Reduced(os.system, f"touch {MARKER}")},)]}, 4),
    "eval": pickle.dumps(Reduced(eval, f"open({MARKER!r}, 'w')"), 2),
    "exec": pickle.dumps(Reduced(exec, f"open({MARKER!r}, 'w')"), 4),
    "getattr": pickle.dumps(Reduced(getattr, "", "join"), 2),
    "import": pickle.dumps(Reduced(__import__, "this"), 2),
    "open": pickle.dumps(Reduced(open, MARKER, "w"), 2),
    "INST": b"(" + dump(f"touch {MARKER}") + b"ios\nsystem\n.",
    "OBJ": b"(" + name("os", "system") + dump(f"touch {MARKER}") + b"o.",
    "NEWOBJ": name("subprocess", "Popen") + b"(" + dump(["touch", MARKER]) + b"t\x81.",
    "NEWOBJ_EX": b"\x80\x04" + name("subprocess", "Popen") + b"(" + dump(["touch", MARKER]) + b"t}\x92.",
    "partial": call("functools", "partial", name("os", "system"), dump(f"touch {MARKER}")) + b".",
    "torch.load": call("torch", "load", dump("x")) + b".",
    "bytes of another file": call("torch.storage", "_load_from_bytes", dump(b"x")) + b".",
    "dtype called": call("torch", "float32", dump(1)) + b".",
    "attrgetter": call("operator", "attrgetter", dump("system")) + b".",
    "methodcaller": call("_operator", "methodcaller", dump("system"), dump("x")) + b".",
    "import_module": call("importlib", "import_module", dump("this")) + b".",
    "codecs.decode": call("_codecs", "decode", dump(b"x"), dump("rot13")) + b".",
    "other encodings": call("_codecs", "encode", dump("x"), dump("idna")) + b".",
    "file object": call("io", "FileIO", dump(MARKER), dump("w")) + b".",
    "numpy.load": call("numpy", "load", dump(MARKER)) + b".",
    "lookalike of a package": call("omegaconf_evil", "run") + b".",
    "typing of torch": call("torch.typing", "x") + b".",
    "EXT1": b"\x82\xf0.",
    "EXT4": b"\x84\xf0\x00\x00\x00.",
    "PERSID": b"Pos.system\n.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "BUILD of a list": b"]}" + dump("a") + dump(1) + b"sb.",
    "BUILD of a name": name("argparse", "Namespace") + b"}b.",
    "called instance": name("argparse", "Namespace") + b")R)R.",
    "NumPy objects": pickle.dumps(np.array([None, Reduced(len, "")], dtype=object), 2),
    "NumPy objects, protocol 5": pickle.dumps(np.array([{}, 1], dtype=object), 5),
    "NumPy records": pickle.dumps(np.zeros(2, [("a", "f4"), ("b", "O")]), 2),
    "NumPy dates": pickle.dumps(np.array(["2020"], "M8[Y]"), 2),
    "NumPy object scalar": call("numpy", "dtype", dump("O8"), dump(0), dump(1)) + b".",
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_hostile_pickles_run_nothing(case, form, tmp_path):
    copyreg.add_extension("os", "system", 0xF0)
    try:
        content = HOSTILE[case].removesuffix(b".")
        content = content[2:] if content.startswith(b"\x80") else content
        path = (
            archive(tmp_path / "x.pt", content)
            if form == "zip"
            else legacy(tmp_path / "x.pt", content, keys=(), storages=())
        )
        with pytest.raises(ConvertError) as caught:
            read_torch_file(path)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert "x.pt" in str(caught.value)
    if case not in ("called instance", "BUILD of a name"):
        assert isinstance(caught.value, UnsafeFile), caught.value
    assert not (tmp_path / MARKER).exists()


def test_a_refusal_names_class_and_file(tmp_path):
    path = archive(tmp_path / "x.pt", HOSTILE["NEWOBJ"].removesuffix(b"."))
    with pytest.raises(UnsafeFile, match=r"x\.pt names subprocess\.Popen.*Nothing was run"):
        read_torch_file(path)


def test_stubs_stay_inert_though_their_modules_are_there(tmp_path, monkeypatch):
    """Neither constructors, nor __setstate__, __setitem__, append of classes that are allowed by name are called."""
    ran = []

    class Evil(dict):
        def __new__(cls, *args):
            ran.append("new")
            return dict.__new__(cls)

        def __setstate__(self, state):
            ran.append("state")

        def __setitem__(self, key, value):
            ran.append("item")

    monkeypatch.setitem(sys.modules, "fairseq", types.ModuleType("fairseq"))
    sys.modules["fairseq"].Evil = Evil
    made = (
        name("fairseq", "Evil") + b"(" + dump(1) + b"t\x81" + dump("k") + dump(2) + b"s}" + dump("s") + dump(3) + b"sb"
    )
    called = call("fairseq", "Evil", dump(4))
    found = read_torch_file(archive(tmp_path / "x.pt", b"(" + made + called + b"t"))
    assert found == ({"s": 3, "k": 2}, 4) and not ran


BOMBS = {
    "a list in itself": b"]q\x00h\x00a",
    "a dict in itself": b"}q\x09" + dump("a") + b"h\x09s",
    "deep lists": b"]" * 5000 + b"a" * 4999,
    "deep tuple as a key": b"}" + b")" + b"\x85" * 250_000 + dump(1) + b"s",
    "deep tuple in a set": b"\x8f(" + b")" + b"\x85" * 250_000 + b"\x90",
    "deep tuple as a name": b")" + b"\x85" * 250_000 + dump("x") + b"\x93",
    "one string again and again": b"(" + dump("x" * 60_000) + b"q\x01"
    + (name("_codecs", "encode") + b"h\x01\x85R") * 2000 + b"t",
    "one dict again and again": b"(}(" + b"".join(dump(i) + b"N" for i in range(5_000)) + b"uq\x01"
    + (name("collections", "OrderedDict") + b"h\x01\x85R") * 2000 + b"t",
    "an endless number": b"\x8b\xff\xff\xff\x7f\x01",
    "an endless string": b"\x8d" + struct.pack("<Q", 1 << 60) + b"x",
    "nothing to pop": b"0" * 3,
    "no such memo": b"h\x07",
    "a key that cannot be one": b"}](e" + dump(1) + b"s",
    "odd pairs": b"}(" + dump(1) + b"u",
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_bombs_and_nonsense_end_in_a_message(case, form, tmp_path):
    make = archive if form == "zip" else lambda path, content: legacy(path, content, keys=(), storages=())
    path = make(tmp_path / "x.pt", BOMBS[case])
    if "again" in case or "endless" in case:  # the others are about the stack
        tracemalloc.start()
    with pytest.raises(ConvertError, match=r"x\.pt"):
        read_torch_file(path)
    peak = tracemalloc.get_traced_memory()[1] if tracemalloc.is_tracing() else 0
    tracemalloc.stop()
    assert peak < 10e6


def test_what_is_shared_is_converted_once(tmp_path):
    """Sixty lists, each twice the one before: 2**60 elements if anyone counted."""
    content = b"](K\x01e" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(1, 61))
    found = read_torch_file(archive(tmp_path / "x.pt", content))
    for _ in range(60):
        assert found[0] is found[1]
        found = found[0]
    assert found == [1]


# --------------------------------------------------------------------------------------------------------------- lies


LIES = {
    "beyond its storage": tensor(offset=1),
    "strides beyond its storage": tensor(stride=(1000, 1)),
    "negative size": tensor(size=(-2, -3)),
    "negative offset": tensor(offset=-1),
    "negative stride": tensor(stride=(-3, 1)),
    "sizes without strides": tensor(stride=(1,)),
    "sizes that are no numbers": tensor(size=(2.0, 3)),
    "larger than the file": tensor(size=(1 << 40, 6), stride=(0, 1)),
    "storage that is not there": tensor(key="7"),
    "storage outside the archive": tensor(key="../../../etc/passwd"),
    "storage by an absolute path": tensor(key="/etc/passwd"),
    "storage that is larger": tensor(count=5, size=(5,), stride=(1,)),
    "storage that is smaller": tensor(count=7),
    "storage of another kind": tensor(storage="DoubleStorage"),
    "unknown kind of storage": tensor(storage="float32"),
    "negative count": tensor(count=-6),
    "other persistent ids": b"(" + dump("module") + dump(1) + b"tQ",
    "persistent id of a string": dump("storage") + b"Q",
    "tensor of no storage": call("torch._utils", "_rebuild_tensor_v2", dump(1), dump(0), dump(()), dump(())),
    "bytes beside the array": dump(np.arange(3)).replace(b"K\x03\x85", b"K\x04\x85"),
}


@pytest.mark.parametrize("case", LIES)
def test_tensors_that_lie_are_refused(case, tmp_path):
    with pytest.raises(ConvertError, match=r"x\.pt"):
        read_torch_file(archive(tmp_path / "x.pt", LIES[case]))
    with pytest.raises(ConvertError, match=r"x\.pt"):
        read_torch_file(legacy(tmp_path / "x.pt", LIES[case].replace(b"tQ", b"NtQ")))


@pytest.mark.parametrize(
    "entry", ["../model/x", "/model/x", "model/../../x", "model\\x", "model/data.pkl", "other/data.pkl"]
)
def test_entries_with_other_names_are_refused(entry, tmp_path):
    with pytest.warns(UserWarning) if entry == "model/data.pkl" else pytest.MonkeyPatch.context():
        path = archive(tmp_path / "x.pt", tensor(), extra={entry: b"x"})
    with pytest.raises(ConvertError, match=r"x\.pt"):
        read_torch_file(path)


def test_compressed_and_other_archives_are_refused(tmp_path):
    for path, why in (
        (archive(tmp_path / "a.pt", tensor(), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (archive(tmp_path / "b.pt", tensor(), extra={"model/constants.pkl": b"x"}), "TorchScript"),
    ):
        with pytest.raises(ConvertError, match=why):
            read_torch_file(path)
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as file:
        file.writestr("readme.txt", "x")
    with pytest.raises(ConvertError, match="data.pkl"):
        read_torch_file(tmp_path / "c.pt")


def central(raw: bytes, entry: str) -> int:
    """Where the directory's record of an entry begins."""
    return raw.rindex(entry.encode()) - 46


def patched(path, at: int, fmt: str, value: int) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into(fmt, raw, at, value)
    path.write_bytes(raw)


def test_archives_whose_headers_disagree_are_refused(tmp_path):
    path = archive(tmp_path / "x.pt", tensor())
    whole = path.read_bytes()
    record = central(whole, "model/data/0")
    offset = struct.unpack_from("<L", whole, record + 42)[0]
    for at, value, why in (
        (record + 42, 0, "not what|not where"),  # the first entry's place: they overlap
        (record + 42, offset + 1, "not where"),
        (record + 24, 48, "compressed"),  # a size that the stored bytes do not have
        (offset + 22, 48, "another size"),  # in the local header
        (offset + 26, 11, "not what"),  # another name there
    ):
        path.write_bytes(whole)
        patched(path, at, "<H" if at == offset + 26 else "<L", value)
        with pytest.raises(ConvertError, match=why):
            read_torch_file(path)
    path.write_bytes(whole)
    for place in (20, 24):  # both sizes: the entry would run into the directory
        patched(path, record + place, "<L", 4000)
    with pytest.raises(UnsafeFile, match="not what"):
        read_torch_file(path)
    path.write_bytes(whole)
    directory = whole.rindex(b"PK\x05\x06") + 12  # its size; entries lie before the file then
    patched(path, directory, "<L", struct.unpack_from("<L", whole, directory)[0] - 1)
    with pytest.raises(ConvertError, match=r"x\.pt"):
        read_torch_file(path)
    patched(path, directory + 4, "<L", len(whole) - 60)
    with pytest.raises(ConvertError, match=r"x\.pt"):
        read_torch_file(path)
    overlapping = io.BytesIO()
    with zipfile.ZipFile(overlapping, "w") as file:
        inner = zipfile.ZipInfo("model/data/0")
        inner.CRC, inner.file_size, inner.compress_size = 0, VALUES.nbytes, VALUES.nbytes
        inside = inner.FileHeader() + VALUES.tobytes()
        file.writestr("model/data.pkl", b"\x80\x02" + tensor() + b"." + inside)
        inner.header_offset = file.start_dir - len(inside)
        file.filelist.append(inner)
        file.NameToInfo[inner.filename] = inner
    path.write_bytes(overlapping.getvalue())
    with pytest.raises(UnsafeFile, match="overlap"):
        read_torch_file(path)


def test_older_files_that_lie_are_refused(tmp_path):
    content, path = old_tensor(), tmp_path / "x.pt"
    assert read_torch_file(legacy(path, content)).read()[1, 2] == 5
    for changes, why in (
        ({"keys": ("1",)}, "not those"),
        ({"keys": ()}, "not those"),
        ({"keys": ("0", "0")}, "not those"),
        ({"storages": ((5, VALUES.tobytes()),)}, "has not the 6 elements"),
        ({"storages": ((6, VALUES.tobytes()[:-1]),)}, "truncated"),
        ({"storages": ()}, "truncated"),
    ):
        with pytest.raises(ConvertError, match=why):
            read_torch_file(legacy(path, content, **changes))
    two = b"(" + old_tensor() + old_tensor(storage="IntStorage") + b"t"
    with pytest.raises(UnsafeFile, match="two things"):
        read_torch_file(legacy(path, two))
    view = content.replace(b"NtQ", dump(("0", 0, 6)) + b"tQ")
    with pytest.raises(UnsafeFile, match="reference"):
        read_torch_file(legacy(path, view))


@pytest.mark.parametrize("form", [archive, legacy])
def test_truncated_files_say_so(form, tmp_path):
    whole = form(tmp_path / "x.pt", tensor() if form is archive else old_tensor()).read_bytes()
    for length in range(0, len(whole), 3):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        with pytest.raises(ConvertError, match=r"x\.pt"):
            read_torch_file(tmp_path / "x.pt")


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_files_give_something_or_a_message(data, tmp_path_factory):
    """Any byte may be another: never another exception, and never more bytes than the file has."""
    path = tmp_path_factory.mktemp("damaged") / "x.pt"
    form, content = data.draw(st.sampled_from([(archive, tensor()), (legacy, old_tensor())]))
    raw = bytearray(form(path, b"}(" + dump("a") + content + dump("np") + dump(np.arange(3)) + b"u").read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        found = read_torch_file(path)
        for value in found.values() if isinstance(found, dict) else ():
            if isinstance(value, StoredTensor):
                assert value.read().nbytes <= max(len(raw), 1 << 20)
    except ConvertError:
        pass


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not a file that torch.save wrote"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "not a file that torch.save wrote"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"x" * 257 + b"ustar" + b"x" * 300, "tar archive"),
        (pickle.dumps({"model": 1}), "not one of torch.save's"),
    ],
)
def test_other_files_are_told_apart(raw, why, tmp_path):
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises(ConvertError, match=why):
        read_torch_file(tmp_path / "x.pt")


def test_what_is_no_local_file_is_said(tmp_path):
    for path, why in ((tmp_path, "not a file"), (tmp_path / "none", "not a file"), ("gs://bucket/x.pt", "not a local")):
        with pytest.raises(ConvertError, match=why):
            read_torch_file(path)
