"""The pre-training head of a stage <-> `Checkpoint.heads`."""

import numpy as np

from wavlab_jax.convert.checkpoint import Checkpoint
from wavlab_jax.convert.names import ConvertError
from wavlab_jax.model import Parameters

HEAD = ("final_proj.weight", "final_proj.bias", "label_embeddings")


def stored_head(head: Parameters) -> dict[str, np.ndarray]:
    """A head's parameters by the names and in the shapes of `HEADS`."""
    projection = head["projection"]
    return {
        "final_proj.weight": np.asarray(projection["kernel"]).T,
        "final_proj.bias": np.asarray(projection["bias"]),
        "label_embeddings": np.asarray(head["embeddings"]),
    }


def head_parameters(checkpoint: Checkpoint, *, like: Parameters) -> Parameters:
    """The checkpoint's head as a stage's parameters, shaped as `like`. Raises ConvertError naming what does not fit."""
    units, dim = like["embeddings"].shape
    width = like["projection"]["kernel"].shape[0]
    wanted = dict(zip(HEAD, ((dim, width), (dim,), (units, dim)), strict=True))
    missing = [name for name in HEAD if name not in checkpoint.heads]
    if missing:
        raise ConvertError(f"the {checkpoint.layout} checkpoint has no {', '.join(missing)}: no head to continue")
    found = {name: tuple(checkpoint.heads[name].shape) for name in HEAD}
    other = [f"{name} {list(found[name])}, not {list(wanted[name])}" for name in HEAD if found[name] != wanted[name]]
    if other:
        raise ConvertError(
            f"the {checkpoint.layout} checkpoint's head predicts other units than this stage: {', '.join(other)}; "
            "set learner.head to its sizes, or let the head start afresh"
        )
    weight, bias, embeddings = (checkpoint.heads[name].values() for name in HEAD)
    return {"projection": {"kernel": weight.T, "bias": bias}, "embeddings": embeddings}
