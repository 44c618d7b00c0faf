"""torchaudio's and ESPnet's own model classes, loaded by path: importing torchaudio would load its extension, which
goes with one version of torch only. Its models are pure Python, and ESPnet's encoder needs nothing else of it.

torchaudio lies in the environment's folder `aside` (requirements-aside.txt), where nothing else finds it.
"""

import importlib.machinery
import importlib.util
import sys
import types
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from wavlab_jax.encoder import EncoderConfig

pytestmark = pytest.mark.torch

# What torchaudio's builder of pre-training models asks for and no test looks at: masks and loss, as in its Base.
MASKS = {
    "mask_prob": 0.8,
    "mask_selection": "static",
    "mask_other": 0.0,
    "mask_length": 10,
    "no_mask_overlap": False,
    "mask_min_space": 1,
    "mask_channel_prob": 0.0,
    "mask_channel_selection": "static",
    "mask_channel_other": 0.0,
    "mask_channel_length": 10,
    "no_mask_channel_overlap": False,
    "mask_channel_min_space": 1,
    "skip_masked": False,
    "skip_nomask": False,
}


def arguments(cfg: EncoderConfig) -> dict:
    """The builders' arguments for an architecture, spelled out here and not by the code that is tested."""
    bias = {"encoder_num_buckets": cfg.bias_buckets, "encoder_max_distance": cfg.bias_max_distance}
    return {
        "extractor_mode": {"group": "group_norm", "layer": "layer_norm"}[cfg.extractor_norm],
        "extractor_conv_layer_config": [
            [*layer] for layer in zip(cfg.extractor_channels, cfg.extractor_kernels, cfg.extractor_strides, strict=True)
        ],
        "extractor_conv_bias": cfg.extractor_bias,
        "encoder_embed_dim": cfg.width,
        "encoder_projection_dropout": cfg.projection_dropout,
        "encoder_pos_conv_kernel": cfg.position_kernel,
        "encoder_pos_conv_groups": cfg.position_groups,
        "encoder_num_layers": cfg.layers,
        "encoder_num_heads": cfg.heads,
        "encoder_attention_dropout": cfg.attention_dropout,
        "encoder_ff_interm_features": cfg.feed_forward,
        "encoder_ff_interm_dropout": cfg.activation_dropout,
        "encoder_dropout": cfg.dropout,
        "encoder_layer_norm_first": cfg.pre_norm,
        "encoder_layer_drop": cfg.layerdrop,
        **(bias if cfg.relative_bias else {}),
    }


@cache
def models() -> ModuleType:
    """torchaudio.models.wav2vec2: the builders, and the modules `model` and `components`."""
    folder = _folder("torchaudio", [str(Path(sys.prefix) / "aside")])
    return _load("torchaudio_models_wav2vec2", folder / "models/wav2vec2/__init__.py")


def espnet_encoder(**arguments) -> torch.nn.Module:
    """ESPnet's TorchAudioHuBERTPretrainEncoder, made as `HubertTask.build_model` makes it."""
    torchaudio = types.ModuleType("torchaudio")  # which the encoder imports when it is made
    torchaudio.models = models()
    sys.modules["torchaudio"] = torchaudio
    try:
        return _espnet("asr/encoder/hubert_encoder").TorchAudioHuBERTPretrainEncoder(**arguments)
    finally:
        del sys.modules["torchaudio"]


def espnet_normalisation(**conf) -> torch.nn.Module:
    """ESPnet's UtteranceMVN."""
    return _espnet("layers/utterance_mvn").UtteranceMVN(**conf)


def pretraining_wavlm(*, num_classes: int, final_dim: int, **arguments) -> torch.nn.Module:
    """A HuBERTPretrainModel around torchaudio's WavLM: what ESPnet's wavlm_encoder.py composes of these classes."""
    components, width = models().model.components, arguments["encoder_embed_dim"]
    wavlm = models().wavlm_model(**arguments, aux_num_out=None)
    masks = {name: value for name, value in MASKS.items() if not name.startswith("skip")}
    return models().model.HuBERTPretrainModel(
        wavlm,
        components.MaskGenerator(width, **masks),
        components.LogitGenerator(width, num_classes, final_dim, skip_masked=False, skip_nomask=False),
        feature_grad_mult=None,
    )


def randomised(model: torch.nn.Module, *, seed: int = 0) -> torch.nn.Module:
    """The model with every parameter far from its initial value, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around_one = "norm.weight" in name or name.endswith(("original0", "gru_rel_pos_const"))
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator) + float(around_one))
    return model.eval()


@cache
def _espnet(name: str) -> ModuleType:
    return _load(f"espnet2_{name.replace('/', '_')}", _folder("espnet2") / f"{name}.py")


def _folder(package: str, path: list[str] | None = None) -> Path:
    found = importlib.machinery.PathFinder.find_spec(package, path)
    assert found and found.submodule_search_locations, f"{package} is not installed: `make test-venv`"
    return Path(found.submodule_search_locations[0])


def _load(name: str, path: Path) -> ModuleType:
    package = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=package)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
