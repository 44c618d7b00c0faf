"""Fine-tuning's optimizer: fairseq's schedule, and which parameters move, by PyTorch's Adam with a group a layer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.wavlab_jax import tiny
from wavlab_jax.optim import FineTuningConfig, OptimizerError, at_step, held, layer_rates, learning_rate, make_optimizer
from wavlab_jax.sharding import MeshConfig, make_mesh, place_batch
from wavlab_jax.step import initial_state, make_train_step

LAYERS = 3
SMALL = dict(peak_learning_rate=1e-2, warmup_steps=4, hold_steps=2, total_steps=16)


def small_parameters(rng) -> dict:
    """Arrays under the names of a model, three layers stacked."""
    return {
        "encoder": {
            "frontend": {"convolutions": {"0": {"kernel": rng.normal(size=(2, 3))}}, "norm": {"scale": np.ones(3)}},
            "layers": {
                "expand": {"kernel": rng.normal(size=(LAYERS, 2, 2))},
                "final_norm": {"bias": rng.normal(size=(LAYERS, 2))},
            },
        },
        "head": {"output": {"kernel": rng.normal(size=(2, 4))}},
    }


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def test_tri_stage_is_fairseqs_update_by_update():
    cfg = FineTuningConfig(
        peak_learning_rate=3e-5, warmup_steps=10, hold_steps=40, total_steps=100, initial_scale=0.01, final_scale=0.05
    )
    schedule = learning_rate(cfg)
    for made in (0, 1, 9, 10, 11, 49, 50, 51, 99, 100, 101, 200):  # updates before this one: fairseq's num_updates
        if made < 10:
            wanted = 0.01 * 3e-5 + (3e-5 - 0.01 * 3e-5) / 10 * made
        elif made < 50:
            wanted = 3e-5
        else:
            wanted = 3e-5 * max(math.exp(math.log(0.05) / 50 * (made - 50)), 0.05)
        assert float(schedule(made)) == pytest.approx(wanted, rel=1e-5), made


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_decay": 0.5, "weight_decay": 0.1},
        {"layers": (2, 3), "layer_decay": 0.7, "clip_norm": 0.5},
        {"frozen": ("encoder",), "freeze_steps": 0, "clip_norm": 0.5},
        {"frozen": (), "freeze_steps": 3, "weight_decay": 0.1, "clip_norm": 0.5},
    ],
    ids=["default", "decay", "layers", "head", "thawed"],
)
def test_updates_are_those_of_pytorch_with_a_group_a_layer(changes):
    """Frozen parameters have no gradient there: no decay, no moments, nothing in the norm that is clipped."""
    import torch

    cfg = FineTuningConfig(**{**SMALL, "freeze_steps": 2, **changes})
    rng = np.random.default_rng(0)
    first = small_parameters(rng)
    ours, optimizer = as_float32(first), make_optimizer(cfg)
    state, schedule = optimizer.init(ours), learning_rate(cfg)

    def pieces(tree) -> dict[str, np.ndarray]:
        """A tree's arrays, each layer's apart."""
        flat = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            name = "/".join(part.key for part in path)
            flat |= {f"{name}@{i + 1}": leaf[i] for i in range(LAYERS)} if "layers/" in name else {name: leaf}
        return flat

    def rate(name: str) -> float:
        if name.startswith("head"):
            return 1.0
        if "encoder" in cfg.frozen or ("extractor" in cfg.frozen and "convolutions" in name):
            return 0.0
        layer = int(name.partition("@")[2] or 0)
        if cfg.layers and layer not in cfg.layers:
            return 0.0
        return cfg.layer_decay ** (LAYERS + 1 - layer)

    theirs = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in pieces(first).items()
    }
    adam = torch.optim.AdamW(
        [{"params": [tensor], "lr": 0.0, "name": name} for name, tensor in theirs.items()],
        betas=(cfg.beta1, cfg.beta2), eps=cfg.epsilon, weight_decay=cfg.weight_decay,
    )  # fmt: skip
    update = jax.jit(optimizer.update)
    for step in range(8):
        gradients = small_parameters(rng)
        changed, state = update(as_float32(gradients), state, ours)
        ours, state = jax.tree.map(jnp.add, ours, changed), at_step(state, step + 1)  # as the step does
        for name, value in pieces(gradients).items():
            moved = rate(name) and (step >= cfg.freeze_steps or name.startswith("head"))
            theirs[name].grad = torch.tensor(value) if moved else None
        if cfg.clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), cfg.clip_norm)
        for group in adam.param_groups:
            group["lr"] = float(schedule(step)) * rate(group["name"])
        adam.step()
        for name, value in pieces(ours).items():
            np.testing.assert_allclose(value, theirs[name].detach().numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
    for name, value in pieces(ours).items():
        if not rate(name):
            np.testing.assert_array_equal(value, pieces(as_float32(first))[name], err_msg=name)


def test_what_is_never_moved_has_no_moments():
    params = as_float32(small_parameters(np.random.default_rng(0)))
    state = make_optimizer(FineTuningConfig(**SMALL, frozen=("encoder",))).init(params)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * params["head"]["output"]["kernel"].size


def test_what_is_never_moved_gets_no_gradient():
    """So that none is computed, and the norm that a run reports is that of what is trained."""
    params = as_float32(small_parameters(np.random.default_rng(0)))
    cfg = FineTuningConfig(**SMALL, layers=(2,))
    gradient = jax.grad(lambda p: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(held(p, cfg))))(params)
    assert not gradient["encoder"]["frontend"]["norm"]["scale"].any()
    assert gradient["encoder"]["layers"]["expand"]["kernel"].all() and gradient["head"]["output"]["kernel"].all()


def test_frozen_steps_go_by_the_step_that_the_state_is_at():
    """A step that was skipped counts; so does one that another run made."""
    cfg = FineTuningConfig(**SMALL, freeze_steps=5)
    params = as_float32(small_parameters(np.random.default_rng(0)))
    optimizer = make_optimizer(cfg)
    for step, moved in ((4, False), (5, True)):
        state = at_step(optimizer.init(params), jnp.asarray(step))
        updates, _ = optimizer.update(params, state, params)
        assert bool(jnp.any(updates["encoder"]["layers"]["expand"]["kernel"] != 0)) is moved


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frozen": ("decoder",)}, "parts are extractor, encoder"),
        ({"layers": (0, 1)}, "count from 1"),
        ({"layers": (1,), "frozen": ("encoder",)}, "frozen encoder"),
        ({"layer_decay": 0.0}, r"layer_decay is 0.0; it must lie in \(0, 1\]"),
        ({"freeze_steps": -1}, "freeze_steps is -1"),
        ({"hold_steps": 20}, "what is left is the decay"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, said):
    with pytest.raises(OptimizerError, match=said):
        FineTuningConfig(**{**SMALL, **changes})


def test_a_layer_that_there_is_not_is_refused():
    with pytest.raises(OptimizerError, match="layer 4, but the encoder has 3"):
        layer_rates(small_parameters(np.random.default_rng(0)), FineTuningConfig(**SMALL, layers=(4,)))


@pytest.mark.once
def test_the_step_leaves_frozen_parameters_bit_for_bit_and_is_compiled_once():
    cfg = dataclasses.replace(
        tiny.learner(), optimizer=FineTuningConfig(**SMALL, freeze_steps=2, layers=(2,), layer_decay=0.5)
    )
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    state, step = initial_state(cfg, mesh), make_train_step(cfg, mesh)
    first = jax.device_get(state.params["encoder"])
    batch = tiny.batch()
    for number in range(3):
        state, _ = step(state, place_batch(batch, mesh=mesh, passes=1))
        now, then = (
            dict(jax.tree_util.tree_flatten_with_path(t)[0]) for t in (jax.device_get(state.params["encoder"]), first)
        )
        for path, leaf in now.items():
            name = jax.tree_util.keystr(path)
            if "layers" in name:
                np.testing.assert_array_equal(leaf[0], then[path][0], err_msg=name)
                # (the keys' bias shifts all logits of a query alike: its gradient is rounding)
                assert number == 2 or np.array_equal(leaf[1], then[path][1]), name
            else:
                np.testing.assert_array_equal(leaf, then[path], err_msg=name)
        moved = any(not np.array_equal(leaf, then[path]) for path, leaf in now.items())
        assert moved == (number == 2)
    assert step.jitted._cache_size() == 1
