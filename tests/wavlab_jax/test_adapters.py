"""LoRA and bottlenecks: formulas by hand and by transformers, what is trained, and what an export makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.wavlab_jax import tiny
from wavlab_jax.adapters import AdapterError, BottleneckConfig, LoraConfig, adapted, make_adapter
from wavlab_jax.convert import ConvertError, from_encoder, to_encoder
from wavlab_jax.convert.adapters import stored_adapter
from wavlab_jax.encoder import encode, formulation_for
from wavlab_jax.model import parameters
from wavlab_jax.sharding import MeshConfig, make_mesh, parameter_shardings

EVERY = [
    LoraConfig(rank=2, alpha=3.0, targets=("query", "value", "output")),
    BottleneckConfig("houlsby", 4),
    BottleneckConfig("mms", 4),
]
WAVEFORM = np.random.default_rng(0).normal(scale=0.1, size=(2, 4_000)).astype(np.float32)


def randomised(cfg, encoder, seed: int = 1):
    """An adapter whose every parameter is far from its initial value."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: make_adapter(jax.random.key(0), cfg, encoder=encoder))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), shapes)


def last(encoder) -> np.ndarray:
    return np.asarray(encode(encoder, WAVEFORM).hidden[-1])


@pytest.mark.parametrize("cfg", EVERY, ids=["lora", "houlsby", "mms"])
def test_it_begins_as_the_encoder_was_and_leaves_it_alone(cfg):
    encoder = tiny.randomised(tiny.encoder())
    adapter = make_adapter(jax.random.key(0), cfg, encoder=encoder.config)
    before = parameters(encoder)
    found, wanted = last(adapted(encoder, adapter, cfg)), last(encoder)
    limit = 1e-5 if isinstance(cfg, LoraConfig) else 0.1
    np.testing.assert_allclose(found, wanted, atol=limit)
    jax.tree.map(np.testing.assert_array_equal, parameters(encoder), before)
    assert not np.allclose(last(adapted(encoder, randomised(cfg, encoder.config), cfg)), wanted, atol=limit)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    parameter_shardings({"adapter": adapter}, mesh)  # every parameter has its row


def test_lora_adds_a_product_of_low_rank_to_every_layer():
    encoder, cfg = tiny.randomised(tiny.encoder(pre_norm=True)), EVERY[0]
    adapter = randomised(cfg, encoder.config)
    merged = adapted(encoder, adapter, cfg)
    for name in ("query", "key", "value", "output"):
        before, after = (np.asarray(getattr(e.layers.attention, name).kernel[...]) for e in (encoder, merged))
        for layer in range(2):
            change = np.zeros((16, 16))
            if name in cfg.targets:
                change = 3.0 / 2 * np.asarray(adapter[name]["down"][layer]) @ np.asarray(adapter[name]["up"][layer])
            np.testing.assert_allclose(after[layer] - before[layer], change, atol=2e-6)


@pytest.mark.torch
def test_lora_is_a_path_beside_the_projection_and_its_export_is_merged(tmp_path):
    """The forward pass of a layer with x W + alpha / rank (x A) B on the way, in PyTorch; the export without it."""
    import torch
    import transformers

    from wavlab_jax.convert import huggingface as folders

    encoder, cfg = tiny.randomised(tiny.encoder(pre_norm=True, extractor_norm="layer")), EVERY[0]
    adapter = randomised(cfg, encoder.config)
    merged = adapted(encoder, adapter, cfg)
    folders.write(from_encoder(merged), tmp_path / "merged")
    folders.write(from_encoder(encoder), tmp_path / "plain")
    with torch.no_grad():
        ours = transformers.AutoModel.from_pretrained(tmp_path / "merged").eval()
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "plain").eval()
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
        for layer, block in enumerate(theirs.encoder.layers):
            for target in cfg.targets:
                down, up = (torch.tensor(np.asarray(adapter[target][part][layer])) for part in ("down", "up"))
                linear = getattr(block.attention, names[target])
                linear.register_forward_hook(
                    lambda _, inputs, out, down=down, up=up: out + 1.5 * (inputs[0] @ down) @ up
                )
        wanted = theirs(torch.tensor(WAVEFORM)).last_hidden_state.numpy()
        np.testing.assert_allclose(ours(torch.tensor(WAVEFORM)).last_hidden_state.numpy(), wanted, atol=2e-5)
    np.testing.assert_allclose(last(merged), wanted, atol=2e-5)
    again = to_encoder(folders.read(tmp_path / "merged"))
    np.testing.assert_allclose(last(again), last(merged), atol=1e-6)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_houlsby_adds_what_it_makes_of_the_feed_forward_output(pre_norm):
    """One layer as ESPnet spells it, without dropout: x + residual + adapter(x) of the feed-forward output x."""
    encoder, cfg = tiny.randomised(tiny.encoder(pre_norm=pre_norm, layers=1)), EVERY[1]
    adapter = randomised(cfg, encoder.config)
    layer = jax.tree.map(lambda p: p[0], adapted(encoder, adapter, cfg).layers)
    plain = jax.tree.map(lambda p: p[0], encoder.layers)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 5, 16)), jnp.float32)
    plainly = formulation_for("tpu")
    options = dict(cfg=encoder.config, valid=None, position_bias=None, keys=None, formulation=plainly)

    def norm(module, y):
        return module.over_channels(y, epsilon=1e-5)

    attended, _ = plain.attention(norm(plain.attention_norm, x) if pre_norm else x, **options)
    residual = x + attended if pre_norm else norm(plain.attention_norm, x + attended)
    inner = norm(plain.final_norm, residual) if pre_norm else residual
    y = plain.contract(jax.nn.gelu(plain.expand(inner), approximate=False))
    down, up = ({k: np.asarray(v[0]) for k, v in adapter[part].items()} for part in ("down", "up"))
    hidden = jax.nn.gelu(y @ down["kernel"] + down["bias"][None, None], approximate=False)
    wanted = y + residual + hidden @ up["kernel"] + up["bias"][None, None]
    wanted = wanted if pre_norm else norm(plain.final_norm, wanted)
    np.testing.assert_allclose(np.asarray(layer(x, **options)[0]), np.asarray(wanted), atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("model_type", ["hubert", "wav2vec2"])
def test_mms_bottlenecks_are_those_of_transformers(model_type, tmp_path):
    import torch
    import transformers

    from wavlab_jax.convert import huggingface as folders

    encoder, cfg = tiny.randomised(tiny.encoder(pre_norm=True, extractor_norm="layer")), EVERY[2]
    adapter = randomised(cfg, encoder.config)
    head = {"lm_head.weight": np.ones((7, 16), np.float32), "lm_head.bias": np.zeros(7, np.float32)}
    head |= stored_adapter(adapter, cfg, encoder=encoder.config, model_type=model_type)
    folders.write(from_encoder(encoder, head=head, model_type=model_type), tmp_path / "out")
    model, info = transformers.AutoModelForCTC.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.adapter_attn_dim == 4
    with torch.no_grad():
        wanted = getattr(model.eval(), model_type)(torch.tensor(WAVEFORM)).last_hidden_state.numpy()
    np.testing.assert_allclose(last(adapted(encoder, adapter, cfg)), wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("cfg", "model_type", "pre_norm", "said"),
    [
        (EVERY[1], "hubert", True, "no place for houlsby.*LoRA"),
        (EVERY[2], "wavlm", True, "pre-norm HuBERT and wav2vec 2.0 alone, and this is WavLM: nothing was written"),
        (EVERY[2], "hubert", False, "this is post-norm.*checkpoints keep this model"),
        (EVERY[0], "hubert", True, "LoRA is merged"),
    ],
)
def test_what_transformers_has_no_place_for_is_refused(cfg, model_type, pre_norm, said):
    encoder = tiny.encoder(pre_norm=pre_norm, relative_bias=model_type == "wavlm")
    with pytest.raises(ConvertError, match=said):
        stored_adapter(randomised(cfg, encoder), cfg, encoder=encoder, model_type=model_type)


def test_an_encoder_with_bottlenecks_in_it_is_not_written_without_them():
    encoder, cfg = tiny.randomised(tiny.encoder()), EVERY[2]
    with pytest.raises(ConvertError, match="layers/bottleneck/.* has no row"):
        from_encoder(adapted(encoder, randomised(cfg, encoder.config), cfg))


@pytest.mark.once
@pytest.mark.parametrize("cfg", EVERY, ids=["lora", "houlsby", "mms"])
def test_gradients_reach_the_adapter_by_scan_as_unrolled(cfg):
    """Only the adapter is differentiated; the encoder is a constant of the function."""
    encoder = tiny.randomised(tiny.encoder())
    adapter = randomised(cfg, encoder.config)
    graph, state = nnx.split(encoder)

    def loss(adapter, formulation):
        hidden = encode(adapted(nnx.merge(graph, state), adapter, cfg), WAVEFORM, formulation=formulation).hidden
        return jnp.mean(jnp.square(hidden[-1]))

    unrolled, scanned = (jax.grad(loss)(adapter, formulation_for(name)) for name in ("cpu", "gpu"))
    for path, leaf in jax.tree_util.tree_flatten_with_path(unrolled)[0]:
        assert float(jnp.max(jnp.abs(leaf))) > 0, jax.tree_util.keystr(path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), unrolled, scanned)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LoraConfig(rank=0), "rank must be at least 1"),
        (lambda: LoraConfig(targets=("query", "query")), "each once"),
        (lambda: LoraConfig(targets=("keys",)), "some of query, key, value, output"),
        (lambda: BottleneckConfig(width=0), "width at least 1"),
        (lambda: BottleneckConfig("prefix"), "one of houlsby, mms"),
    ],
)
def test_what_cannot_be_built_is_refused(make, said):
    with pytest.raises(AdapterError, match=said):
        make()
