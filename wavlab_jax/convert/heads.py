"""The pre-training head of a stage <-> `Checkpoint.heads`, both ways by the same rows."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from wavlab_jax.convert.checkpoint import Checkpoint
from wavlab_jax.convert.names import ConvertError, flatten, unflatten
from wavlab_jax.model import Parameters


class _Row(NamedTuple):
    """A parameter of a head, its name among `HEADS`, its shape there, and its values turned both ways."""

    path: str
    key: str
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _same(path: str, key: str) -> _Row:
    return _Row(path, key, lambda shape: shape, lambda x: x, lambda x, shape: x)


def _linear(path: str, key: str) -> tuple[_Row, _Row]:
    """Linear layers: [inputs, outputs] here, [outputs, inputs] there."""
    turned = _Row(f"{path}/kernel", f"{key}.weight", lambda s: (s[1], s[0]), lambda x: x.T, lambda x, shape: x.T)
    return turned, _same(f"{path}/bias", f"{key}.bias")


_COSINE = (*_linear("projection", "final_proj"), _same("embeddings", "label_embeddings"))
# Under names of its own, so that nobody takes half of it for HuBERT's head.
_CLASSIFIER = (
    *_linear("projection", "label_projection"),
    _same("embeddings", "label_classifier.weight"),
    _same("bias", "label_classifier.bias"),
)
_CONTRASTIVE = (
    *_linear("quantizer/scores", "quantizer.weight_proj"),
    _Row(
        "quantizer/codevectors",
        "quantizer.codevectors",
        lambda s: (1, s[0] * s[1], s[2]),
        lambda x: x.reshape(1, -1, x.shape[-1]),
        lambda x, shape: x.reshape(shape),
    ),
    *_linear("target_projection", "project_q"),
    *_linear("context_projection", "project_hid"),
)


def stored_head(head: Parameters) -> dict[str, np.ndarray]:
    """A head's parameters by the names and in the shapes of `HEADS`."""
    flat = flatten(head)
    return {row.key: row.to_torch(np.asarray(flat[row.path])) for row in _rows(head)}


def head_parameters(checkpoint: Checkpoint, *, like: Parameters) -> Parameters:
    """The checkpoint's head as a stage's parameters, shaped as `like`. Raises ConvertError naming what does not fit."""
    rows, shapes = _rows(like), {path: tuple(leaf.shape) for path, leaf in flatten(like).items()}
    missing = [row.key for row in rows if row.key not in checkpoint.heads]
    if missing:
        raise ConvertError(f"the {checkpoint.layout} checkpoint has no {', '.join(missing)}: no head to continue")
    found = {row.key: tuple(checkpoint.heads[row.key].shape) for row in rows}
    wanted = {row.key: row.shape(shapes[row.path]) for row in rows}
    other = [f"{key} {list(found[key])}, not {list(wanted[key])}" for key in wanted if found[key] != wanted[key]]
    if other:
        raise ConvertError(
            f"the {checkpoint.layout} checkpoint's head is of another size than this stage's: {', '.join(other)}; "
            "set learner.head to its sizes, or let the head start afresh"
        )
    return unflatten({row.path: row.from_torch(checkpoint.heads[row.key].values(), shapes[row.path]) for row in rows})


def _rows(head: Parameters) -> tuple[_Row, ...]:
    if "quantizer" in head:
        return _CONTRASTIVE
    return _CLASSIFIER if "bias" in head else _COSINE
