"""Updates in place against those of optax on the whole tree, and what they store."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wavlab_jax.health import by_module, squares
from wavlab_jax.optim import FineTuningConfig, OptimizerConfig, make_optimizer, treats_alike
from wavlab_jax.updates import updated, updated_in_place

SHAPES = {
    "encoder": {
        "frontend": {"kernel": (10, 4)},
        "position": {"kernel": (3, 4, 4)},
        "layers": {"dense": {"kernel": (3, 4, 5), "bias": (3, 5)}},
        "mask_embedding": (4,),
    },
    "head": {"kernel": (4, 7)},
}
CONFIGS = {
    "adam with decay": OptimizerConfig(peak_learning_rate=0.1, warmup_steps=2, total_steps=9, clip_norm=0.5),
    "no clipping": OptimizerConfig(peak_learning_rate=0.1, warmup_steps=2, total_steps=9, clip_norm=0.0),
    "decay as in pytorch": OptimizerConfig(warmup_steps=2, total_steps=9, decoupled_decay=False),
    "accumulated": OptimizerConfig(peak_learning_rate=0.1, warmup_steps=2, total_steps=9, accumulate=2),
    "fine-tuning": FineTuningConfig(warmup_steps=2, total_steps=9, freeze_steps=1, layer_decay=0.9, clip_norm=0.5),
}


def drawn(seed: int, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: rng.standard_normal(shape).astype(np.float32), shapes, is_leaf=is_shape)


def in_place(optimizer, cfg, gradient, params, state, wanted=True):
    norm = optax.tree.norm(gradient) if treats_alike(cfg) else None
    return updated_in_place(optimizer, gradient, params, state, wanted=jnp.asarray(wanted), norm=norm)


@pytest.mark.parametrize("name", CONFIGS)
def test_in_place_is_what_optax_does(name):
    """Four updates, of which the third is not wanted."""
    cfg = CONFIGS[name]
    optimizer = make_optimizer(cfg)
    ours, whole = (jax.jit(partial(f, optimizer)) for f in (lambda o, *a: in_place(o, cfg, *a), _whole))
    params = drawn(0)
    state = expected_state = optimizer.init(params)
    expected = params
    for number in range(4):
        gradient = drawn(number + 1)
        found = ours(gradient, params, state, number != 2)
        if number == 2:
            jax.tree.map(np.testing.assert_array_equal, found[:2], (params, state))
            assert np.isnan(found.squares["head"].total)
            continue
        expected, expected_state, sums = whole(gradient, expected, expected_state)
        params, state = found.params, found.optimizer
        assert jax.tree.structure(state) == jax.tree.structure(expected_state)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves((expected, expected_state, sums)), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-7)
    assert not np.array_equal(params["head"]["kernel"], drawn(0)["head"]["kernel"])


def _whole(optimizer, gradient, params, state):
    updates, state = optimizer.update(gradient, state, params)
    added = by_module(jax.tree_util.tree_map_with_path(squares, updates, params))
    return optax.apply_updates(params, updates), state, added


@pytest.mark.parametrize("function", [updated, updated_in_place])
def test_squares_are_by_group_of_modules(function):
    """Of plain descent, whose update is minus the gradient."""
    params, gradient = drawn(0), drawn(1)
    optimizer = optax.with_extra_args_support(optax.sgd(1.0))
    found = jax.jit(partial(function, optimizer))(gradient, params, optimizer.init(params), wanted=jnp.asarray(True))
    assert set(found.squares) == {"frontend", "position", "layers", "encoder", "head"}
    for tree, of in ((gradient, lambda pair: pair.total), (params, lambda pair: pair.weight)):
        layers = tree["encoder"]["layers"]["dense"]
        by_layer = np.square(layers["kernel"]).sum((1, 2)) + np.square(layers["bias"]).sum(1)
        np.testing.assert_allclose(of(found.squares["layers"]), by_layer, rtol=1e-5)
        np.testing.assert_allclose(of(found.squares["head"]), np.square(tree["head"]["kernel"]).sum(), rtol=1e-5)
        rest = np.square(tree["encoder"]["mask_embedding"]).sum()
        np.testing.assert_allclose(of(found.squares["encoder"]), rest, rtol=1e-5)
    moved = jax.tree.map(lambda p, g: p - g, params, gradient)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), found.params, moved)


def test_in_place_stores_what_lies_between_for_one_array_alone():
    """Bytes beside donated parameters and moments, of thirteen equal arrays: less than of five. Chosen from: of all."""
    cfg = CONFIGS["adam with decay"]
    optimizer = make_optimizer(cfg)
    shapes = {
        "encoder": {part: {str(i): (64, 1024) for i in range(3)} for part in SHAPES["encoder"]},
        "head": (64, 1024),
    }
    params = jax.eval_shape(lambda: drawn(0, shapes))
    state = jax.eval_shape(optimizer.init, params)

    def temporaries(function) -> float:
        step = jax.jit(function, donate_argnums=(1, 2))
        return step.lower(params, params, state).compile().memory_analysis().temp_size_in_bytes / (64 * 1024 * 4)

    chosen = temporaries(lambda g, p, s: updated(optimizer, g, p, s, wanted=jnp.isfinite(optax.tree.norm(g)))[:2])
    assert temporaries(lambda g, p, s: in_place(optimizer, cfg, g, p, s, jnp.isfinite(optax.tree.norm(g)))) < 5
    assert chosen > 13
