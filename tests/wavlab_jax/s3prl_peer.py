"""s3prl's own model classes (copies of fairseq's and unilm's), loaded by path: importing s3prl would import much more.

`load_*` follow s3prl's local loaders line by line (`upstream/hubert/convert.py`, `upstream/wav2vec2/convert.py`,
`upstream/wavlm/expert.py`); `hidden_states` hears through the same hooks as its experts.
"""

import dataclasses
import importlib.util
import sys
import types
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.torch  # so that it is left alone where torch is missing

PACKAGE = "s3prl_upstream"  # what the files call their parent here


@cache
def module(name: str) -> ModuleType:
    """`hubert.hubert_model`, `wav2vec2.wav2vec2_model` or `wavlm.WavLM` of s3prl/upstream."""
    folder = Path(importlib.util.find_spec("s3prl").submodule_search_locations[0]) / "upstream"
    needs = {"hubert.hubert_model": ["wav2vec2.wav2vec2_model"], "wavlm.WavLM": ["wavlm.modules"]}
    for needed in needs.get(name, []):
        module(needed)
    parts = name.split(".")
    for length in range(len(parts)):
        package = types.ModuleType(".".join([PACKAGE, *parts[:length]]))
        package.__path__ = []
        sys.modules.setdefault(package.__name__, package)
    path = folder.joinpath(*parts).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{name}", path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # their relative imports, and dataclasses, look there
    spec.loader.exec_module(loaded)
    return loaded


def hubert(model_cfg: dict, task_cfg: dict, symbols: list) -> torch.nn.Module:
    """A HubertModel of a configuration whose unknown fields are passed over, as s3prl does."""
    file = module("hubert.hubert_model")
    model_cfg = _merged(file.HubertConfig, model_cfg)
    return file.HubertModel(model_cfg, _merged(file.HubertPretrainingConfig, task_cfg), symbols)


def wav2vec2(model_cfg: dict) -> torch.nn.Module:
    """A Wav2Vec2Model, the same."""
    file = module("wav2vec2.wav2vec2_model")
    return file.Wav2Vec2Model(_merged(file.Wav2Vec2Config, model_cfg))


def wavlm(cfg: dict) -> torch.nn.Module:
    """A WavLM of unilm's configuration."""
    file = module("wavlm.WavLM")
    return file.WavLM(file.WavLMConfig(cfg))


def load(path: Path) -> torch.nn.Module:
    """The model of a file in s3prl's or unilm's layout, all of whose keys must fit (strict)."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if "model_weight" not in state:
        model, weights = wavlm(state["cfg"]), state["model"]
    elif "dictionaries_symbols" in state:
        model = hubert(state["model_cfg"], state["task_cfg"], state["dictionaries_symbols"])
        weights = state["model_weight"]
    else:
        model, weights = wav2vec2(state["model_cfg"]), state["model_weight"]
    model.load_state_dict(weights, strict=True)
    return model.eval()


def load_fairseq(path: Path) -> torch.nn.Module:
    """The model of a file in fairseq's layout, through s3prl's conversion (`load_and_convert_fairseq_ckpt`), strict."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    cfg = state["cfg"]
    if cfg["model"]["_name"] == "hubert":
        model = hubert(cfg["model"], cfg["task"], state["task_state"]["dictionaries"])
    else:
        model = {"wav2vec2": wav2vec2, "wavlm": wavlm}[cfg["model"]["_name"]](cfg["model"])
    model.load_state_dict(state["model"], strict=True)
    return model.eval()


def hidden_states(model: torch.nn.Module, waveforms: list[torch.Tensor], *, normalize: bool) -> list[torch.Tensor]:
    """s3prl's `hidden_states`: the input of every layer and the encoder's output, [batch, frames, width] each."""
    if normalize:
        waveforms = [torch.nn.functional.layer_norm(waveform, waveform.shape) for waveform in waveforms]
    padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    padding = torch.arange(padded.shape[1])[None] >= lengths[:, None]
    heard = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: heard.append(inputs[0].transpose(0, 1)))
        for layer in model.encoder.layers
    ]
    hooks.append(model.encoder.register_forward_hook(lambda _, inputs, output: heard.append(output[0])))
    with torch.no_grad():
        model.extract_features(padded, padding_mask=padding, mask=False)
    for hook in hooks:
        hook.remove()
    frames = min(states.shape[1] for states in heard)  # the layers hear one frame of padding more, if frames are odd
    return [states[:, :frames] for states in heard]


def randomised(model: torch.nn.Module, *, seed: int = 0) -> torch.nn.Module:
    """The model with every parameter far from its initial value, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around_one = name.endswith(("weight_g", "grep_a")) or ("norm" in name and name.endswith("weight"))
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator) + float(around_one))
    return model.eval()


def _merged(dataclass: type, cfg: dict):
    known = {field.name for field in dataclasses.fields(dataclass)}
    return dataclass(**{name: value for name, value in cfg.items() if name in known})
