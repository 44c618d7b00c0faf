"""Memory that compiling took is returned: that jax says when it has compiled, under the name that is listened to."""

import types

import jax
import jax.numpy as jnp

from wavlab_jax import compiling


def test_memory_is_returned_after_a_long_compilation_and_no_other(monkeypatch):
    trimmed = []
    monkeypatch.setattr(compiling.ctypes, "CDLL", lambda name: types.SimpleNamespace(malloc_trim=trimmed.append))
    monkeypatch.setattr(compiling, "LONG", 1e6)
    compiling.return_memory_after_compiling.__wrapped__()
    jax.jit(lambda x: jnp.sin(x) + 1.0)(jnp.ones(3))
    assert not trimmed
    monkeypatch.setattr(compiling, "LONG", 0.0)
    jax.jit(lambda x: jnp.sin(x) + 2.0)(jnp.ones(3))
    assert trimmed and set(trimmed) == {0}


def test_nothing_is_listened_to_without_the_library(monkeypatch):
    monkeypatch.setattr(compiling.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(compiling.monitoring, "register_event_duration_secs_listener", None)
    compiling.return_memory_after_compiling.__wrapped__()
