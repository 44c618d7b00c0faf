"""The peers' own classes for the parity table: random models saved as peers save them, our exports loaded by them.

Configurations are spelled out in each peer's own words, not by the converters that are measured. Needs the test
environment (`make test-venv`).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml

from tests.wavlab_jax import s3prl_peer, torchaudio_peer
from wavlab_jax.convert.settings import read_json
from wavlab_jax.encoder import EncoderConfig

UNITS, DIM = 11, 6
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
# (waveform, the same normalised where the model asks for it), both [samples] -> {hidden state: [frames, width]}
Run = Callable[[np.ndarray, np.ndarray], dict[int, np.ndarray]]


def applies(layout: str, model_type: str) -> bool:
    """Whether the layout has a place for such models at all."""
    return layout != "unilm" or model_type == "wavlm"


def save_theirs(layout: str, cfg: EncoderConfig, model_type: str, folder: Path, *, scale: float) -> Run:
    """Saves a random model of the peer's class in `folder` as the peer does; returns what runs it."""
    folder.mkdir()
    torch.manual_seed(0)
    if layout == "huggingface":
        return _huggingface(cfg, model_type, folder, scale)
    if layout in ("fairseq", "unilm", "s3prl"):
        return _fairseq(layout, cfg, model_type, folder, scale)
    if layout == "torchaudio":
        model = torchaudio_peer.models()
        if model_type == "hubert":
            model = model.hubert_pretrain_model(
                **torchaudio_peer.arguments(cfg),
                **torchaudio_peer.MASKS,
                num_classes=UNITS,
                final_dim=DIM,
                feature_grad_mult=None,
            )
        else:
            builder = model.wavlm_model if cfg.relative_bias else model.wav2vec2_model
            model = builder(**torchaudio_peer.arguments(cfg), aux_num_out=None)
        torch.save(randomised(model, scale).state_dict(), folder / "model.pt")
        return _torchaudio_run(getattr(model, "wav2vec2", model))
    attribute, model = _espnet_model(cfg, {**torchaudio_peer.arguments(cfg), "final_dim": DIM}, UNITS)
    config = {
        "encoder": f"torchaudio_{attribute.removesuffix('_pretrain_model')}",
        "encoder_conf": {**torchaudio_peer.arguments(cfg), "final_dim": DIM},
        "num_classes": UNITS,
        "normalize": "utterance_mvn" if cfg.normalize_waveform else None,
        "normalize_conf": {"norm_means": True, "norm_vars": True},
        "frontend": None,
    }
    state = randomised(model, scale).state_dict()
    torch.save({f"encoder.{key}": value for key, value in state.items()}, folder / "5epoch.pth")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return _torchaudio_run(getattr(model, attribute).wav2vec2)


def load_ours(layout: str, cfg: EncoderConfig, folder: Path) -> Run:
    """What we exported to `folder`, loaded by the peer's class, every key of which must fit."""
    if layout == "huggingface":
        kind = read_json(folder / "config.json")["architectures"][0]
        model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        return _huggingface_run(getattr(model, model.base_model_prefix, model).eval(), extractor)
    if layout in ("fairseq", "unilm", "s3prl"):
        return _s3prl_run(_load_s3prl(layout, folder / "checkpoint.pt", wavlm=cfg.relative_bias))
    if layout == "torchaudio":
        said = read_json(folder / "torchaudio.json")
        model = getattr(torchaudio_peer.models(), said["builder"].rpartition(".")[2])(**said["arguments"])
        model.load_state_dict(torch.load(folder / "model.pt", weights_only=True), strict=True)
        return _torchaudio_run(getattr(model, "wav2vec2", model).eval())
    said = yaml.safe_load((folder / "config.yaml").read_text())
    attribute, model = _espnet_model(cfg, said["encoder_conf"], said["num_classes"])
    state = {key.removeprefix("encoder."): v for key, v in torch.load(folder / "model.pth", weights_only=True).items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    heads = ("logit_generator.", "mask_generator.")
    assert not [key for key in missing if not key.startswith(tuple(f"{attribute}.{head}" for head in heads))], missing
    return _torchaudio_run(getattr(model, attribute).wav2vec2.eval())


def randomised(model: torch.nn.Module, scale: float) -> torch.nn.Module:
    """The model with every parameter moved from its initial value, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _huggingface(cfg: EncoderConfig, model_type: str, folder: Path, scale: float) -> Run:
    kinds = {
        "hubert": (transformers.HubertConfig, transformers.HubertModel),
        "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
        "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2ForPreTraining),
    }
    config, kind = kinds[model_type]
    bias = {"num_buckets": cfg.bias_buckets, "max_bucket_distance": cfg.bias_max_distance}
    model = kind(
        config(
            hidden_size=cfg.width,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads,
            intermediate_size=cfg.feed_forward,
            conv_dim=list(cfg.extractor_channels),
            conv_kernel=list(cfg.extractor_kernels),
            conv_stride=list(cfg.extractor_strides),
            num_feat_extract_layers=len(cfg.extractor_channels),
            conv_bias=cfg.extractor_bias,
            feat_extract_norm=cfg.extractor_norm,
            do_stable_layer_norm=cfg.pre_norm,
            num_conv_pos_embeddings=cfg.position_kernel,
            num_conv_pos_embedding_groups=cfg.position_groups,
            **(bias if cfg.relative_bias else {}),
        )
    )
    randomised(model, scale).save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=cfg.normalize_waveform)
    extractor.save_pretrained(folder)
    return _huggingface_run(getattr(model, "wav2vec2", model), extractor)


def _huggingface_run(model: torch.nn.Module, extractor) -> Run:
    def run(waveform: np.ndarray, normalised: np.ndarray) -> dict[int, np.ndarray]:
        with torch.no_grad():
            values = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_values
            answer = model(values, output_hidden_states=True)
        # transformers 5 leaves the final norm of pre-norm models out of hidden_states[-1]
        return _numbered([*answer.hidden_states[:-1], answer.last_hidden_state], first=0)

    return run


def _fairseq(layout: str, cfg: EncoderConfig, model_type: str, folder: Path, scale: float) -> Run:
    convolutions = zip(cfg.extractor_channels, cfg.extractor_kernels, cfg.extractor_strides, strict=True)
    model_cfg = {
        "_name": model_type,
        "extractor_mode": {"group": "default", "layer": "layer_norm"}[cfg.extractor_norm],
        "conv_feature_layers": str(list(convolutions)),
        "conv_bias": cfg.extractor_bias,
        "encoder_embed_dim": cfg.width,
        "encoder_layers": cfg.layers,
        "encoder_attention_heads": cfg.heads,
        "encoder_ffn_embed_dim": cfg.feed_forward,
        "layer_norm_first": cfg.pre_norm,
        "conv_pos": cfg.position_kernel,
        "conv_pos_groups": cfg.position_groups,
        "final_dim": DIM,
    }
    task_cfg = {"normalize": cfg.normalize_waveform, "label_rate": 50.0, "labels": ["km"]}
    symbols = [[*SPECIALS, *map(str, range(UNITS))]]
    if model_type == "wavlm":
        model_cfg |= {"relative_position_embedding": True, "gru_rel_pos": True, "num_buckets": cfg.bias_buckets}
        model_cfg |= {"max_distance": cfg.bias_max_distance, "normalize": cfg.normalize_waveform}
        model = s3prl_peer.wavlm(model_cfg)
    elif model_type == "hubert":
        model = s3prl_peer.hubert(model_cfg | {"label_rate": 50.0}, task_cfg, symbols)
    else:
        model_cfg |= {"quantize_targets": True, "latent_vars": 5, "latent_groups": 2, "latent_dim": 8}
        model = s3prl_peer.wav2vec2(model_cfg)
    weights = randomised(model, scale).state_dict()
    if layout == "unilm" or (layout, model_type) == ("s3prl", "wavlm"):
        content = {"cfg": model_cfg, "model": weights}
    elif layout == "s3prl":
        content = {"task_cfg": task_cfg, "model_cfg": model_cfg, "model_weight": weights}
        content |= {"dictionaries_symbols": symbols} if model_type == "hubert" else {}
    else:
        content = {"args": None, "cfg": {"model": model_cfg, "task": task_cfg}, "model": weights, "task_state": {}}
    torch.save(content, folder / "checkpoint_best.pt")
    return _s3prl_run(model)


def _load_s3prl(layout: str, path: Path, *, wavlm: bool) -> torch.nn.Module:
    if layout == "fairseq" and wavlm:  # UniSpeech's class has heads, unilm's, which is the one at hand, has none
        state = torch.load(path, weights_only=True)
        model = s3prl_peer.wavlm(state["cfg"]["model"])
        heads = ("final_proj.", "label_embs_concat")
        weights = {key: value for key, value in state["model"].items() if not key.startswith(heads)}
        model.load_state_dict(weights, strict=True)
        return model.eval()
    return (s3prl_peer.load_fairseq if layout == "fairseq" else s3prl_peer.load)(path)


def _s3prl_run(model: torch.nn.Module) -> Run:
    def run(waveform: np.ndarray, normalised: np.ndarray) -> dict[int, np.ndarray]:
        states = s3prl_peer.hidden_states(model, [torch.from_numpy(normalised)], normalize=False)
        return _numbered(states, first=0)

    return run


def _espnet_model(cfg: EncoderConfig, conf: dict, units: int) -> tuple[str, torch.nn.Module]:
    """The attribute of ESPnet's encoder that holds the model, and the encoder."""
    if not cfg.relative_bias:
        return "hubert_pretrain_model", torchaudio_peer.espnet_encoder(input_size=1, num_classes=units, **conf)
    conf = {key: value for key, value in conf.items() if key != "feature_grad_mult"}
    encoder = torch.nn.Module()
    encoder.wavlm_pretrain_model = torchaudio_peer.pretraining_wavlm(num_classes=units, **conf)
    encoder.register_buffer("global_step", torch.zeros(1, dtype=torch.long))
    return "wavlm_pretrain_model", encoder


def _torchaudio_run(model: torch.nn.Module) -> Run:
    def run(waveform: np.ndarray, normalised: np.ndarray) -> dict[int, np.ndarray]:
        heard = torch.from_numpy(normalised)[None]
        with torch.no_grad():
            layers, _ = model.extract_features(heard)
            features, _ = model.feature_extractor(heard, None)
            last = model.encoder(features)
        return _numbered([*layers[:-1], last], first=1)

    return run


def _numbered(states: list[torch.Tensor], *, first: int) -> dict[int, np.ndarray]:
    return {number: state[0].numpy() for number, state in enumerate(states, first)}
