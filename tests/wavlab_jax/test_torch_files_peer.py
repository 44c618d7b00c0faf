"""PyTorch's files against torch.save and torch.load, and omegaconf's nodes as omegaconf pickles them."""

import argparse
import collections
import dataclasses
import enum
import sys
import types
from typing import Any, Optional, Union

import numpy as np
import omegaconf
import pytest
import torch

from wavlab_jax.convert.torch_files import read_torch_file, write_torch_file

pytestmark = pytest.mark.torch

FORMS = {
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "zip, protocol 5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
}


SKEW = np.array([[1.0, 2.0], [0.0, 1.0]])


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    return {
        "whole": base,
        "turned": base.t(),
        "part": base[1:4, 2],
        "steps": base[::2, ::3],
        "spread": base[0, :1].expand(3, 2),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 3),
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(2, 5).bfloat16(),
        "double": torch.randn(2).double(),
        "long": torch.arange(-2, 2),
        "int": torch.arange(3, dtype=torch.int32),
        "short": torch.arange(3, dtype=torch.int16),
        "char": torch.tensor([1, -2], dtype=torch.int8),
        "byte": torch.tensor([1, 255], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "convolution": torch.randn(4, 2, 3).permute(2, 0, 1),
    }


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_torch_come_in(form, tmp_path):
    expected = tensors()
    if form != "legacy":
        expected["untyped"] = torch.tensor([1, 65_535], dtype=torch.uint16)  # has no storage class
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    content = {"model": collections.OrderedDict(expected), "module": module.state_dict(), "list": [expected["whole"]]}
    torch.save(content, tmp_path / "x.pt", **FORMS[form])
    found = read_torch_file(tmp_path / "x.pt")
    assert found["model"].keys() == expected.keys() and found["module"].keys() == module.state_dict().keys()
    for key, tensor in (expected | dict(module.state_dict())).items():
        stored = (found["model"] | found["module"])[key]
        array = as_numpy(tensor)
        assert stored.read().dtype == array.dtype and stored.shape == array.shape, key
        np.testing.assert_array_equal(stored.read(), array, err_msg=key)
    np.testing.assert_array_equal(found["list"][0].read(), expected["whole"].numpy())


def test_tensors_of_ours_load_in_torch(tmp_path):
    expected = {name: tensor for name, tensor in tensors().items() if name != "bfloat16"}
    plain = {"a": [1, -(2**70), 0.5, "ünï", None, True], "t": ((), (1, (2, 3))), "e": {}, 5: "five"}
    write_torch_file(tmp_path / "x.pt", {"model": {k: as_numpy(t) for k, t in expected.items()}, "plain": plain})
    for options in ({}, {"mmap": True}):
        found = torch.load(tmp_path / "x.pt", weights_only=True, **options)
        assert found["plain"] == plain
        for name, tensor in expected.items():
            assert found["model"][name].dtype == tensor.dtype and torch.equal(found["model"][name], tensor.detach())
    again = read_torch_file(tmp_path / "x.pt")
    assert again["plain"] == plain


class Mode(enum.Enum):
    LAYER = "layer_norm"


@dataclasses.dataclass
class Configuration:
    layers: int = 12
    rate: float = 0.5
    name: Optional[str] = None  # noqa: UP045 - pickled otherwise than `str | None`
    mode: Mode = Mode.LAYER
    either: Union[int, str] = 3  # noqa: UP007
    labels: list[str] = dataclasses.field(default_factory=lambda: ["km", "ltr"])
    table: dict[str, int] = dataclasses.field(default_factory=lambda: {"a": 1})
    latent: tuple[float, float, float] = (2.0, 0.5, 0.999)
    anything: Any = None


@pytest.mark.parametrize("form", FORMS)
def test_configurations_of_omegaconf_come_in(form, tmp_path):
    plain = {
        "model": {
            "_name": "hubert",
            "rate": "${task.rate}",
            "path": "???",
            "none": None,
            "true": True,
            "l": [1, [2.5]],
        },
        "task": {"rate": 50.0, "deep": {"deeper": {"labels": ["km"]}}},
    }
    content = {
        "cfg": omegaconf.OmegaConf.create(plain),
        "args": argparse.Namespace(lr=[0.1], arch="wav2vec2", inner=argparse.Namespace(x=1)),
        "numpy": (
            np.float64(2.5),
            np.int64(3),
            np.bool_(True),
            np.arange(6).reshape(2, 3),
            np.asfortranarray(SKEW),
        ),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
        "sets": ({1, 2}, frozenset({"a"})),
        "bytes": (b"ab\xff", bytearray(b"c")),
    }
    torch.save(content, tmp_path / "x.pt", **FORMS[form])
    found = read_torch_file(tmp_path / "x.pt")
    assert found["cfg"] == plain
    assert found["args"] == {"lr": [0.1], "arch": "wav2vec2", "inner": {"x": 1}}
    assert found["numpy"][:3] == (2.5, 3, True)
    np.testing.assert_array_equal(found["numpy"][3], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(found["numpy"][4], SKEW)
    assert found["size"] == (1, 2) and found["device"] == "cpu" and found["dtype"] == "torch.float16"
    assert found["default"] == {"a": [1]} and found["counter"] == {"a": 2, "b": 1}
    assert found["sets"] == ({1, 2}, frozenset({"a"})) and found["bytes"][0] == b"ab\xff"


def test_structured_configurations_come_in(tmp_path, monkeypatch):
    """fairseq's dataclasses as omegaconf keeps them: with the types of their fields, which are names here."""
    with monkeypatch.context() as patch:  # as if the classes stood in fairseq
        for name in ("fairseq", "fairseq.models"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        for kind in (Configuration, Mode):
            patch.setattr(kind, "__module__", "fairseq.models")
            setattr(sys.modules["fairseq.models"], kind.__name__, kind)
        structured = omegaconf.OmegaConf.structured(Configuration)
        torch.save({"cfg": omegaconf.OmegaConf.create({"model": structured})}, tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")
    assert found["cfg"]["model"] == {
        "layers": 12,
        "rate": 0.5,
        "name": None,
        "mode": "layer_norm",
        "either": 3,
        "labels": ["km", "ltr"],
        "table": {"a": 1},
        "latent": [2.0, 0.5, 0.999],
        "anything": None,
    }
