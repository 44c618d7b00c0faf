"""What a stage takes over from an imported model: every tensor of the encoder that fits, by name."""

from typing import NamedTuple

import numpy as np

from wavlab_jax.convert.checkpoint import Checkpoint
from wavlab_jax.convert.names import ConvertError, Tensor, flatten, tensors
from wavlab_jax.encoder import EncoderConfig
from wavlab_jax.model import Parameters

# With other values of these the same tensors would compute something else, though their shapes are equal.
_MUST_AGREE = ("pre_norm", "heads", "extractor_norm", "extractor_kernels", "extractor_strides")
# With other values of these they compute nearly the same; training on adapts to it.
_SHOULD_AGREE = (
    "extractor_bias",
    "normalize_waveform",
    "waveform_epsilon",
    "relative_bias",
    "bias_max_distance",
    "norm_epsilon",
)


class Continued(NamedTuple):
    """`params`: of the encoder, a nested dict of whole arrays, only those of which something was taken over.

    Attributes:
        taken: how many tensors (a layer's are counted each).
        fresh: parameters that keep their fresh values, and "layers 3 to 5 (16 parameters)" where only these do.
        unused: keys of the checkpoint that the stage has no place for.
        differing: "field: theirs there, ours here" of settings under which the model was trained otherwise.
    """

    params: Parameters
    taken: int
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    differing: tuple[str, ...]


def disagreements(theirs: EncoderConfig, ours: EncoderConfig) -> list[str]:
    """What differs of the settings under which parameters of equal shapes compute other things: "heads is 12 there and
    16 here"."""
    return [
        f"{name} is {getattr(theirs, name)} there and {getattr(ours, name)} here"
        for name in _MUST_AGREE
        if getattr(theirs, name) != getattr(ours, name)
    ]


def continued(checkpoint: Checkpoint, cfg: EncoderConfig, *, fresh: Parameters) -> Continued:
    """The checkpoint's tensors as parameters of an encoder of `cfg`, laid over the `fresh` ones, which are not changed.

    Raises ConvertError: no tensor fits, or those that fit would compute something else; damaged values.
    """
    theirs = checkpoint.encoder
    wrong = disagreements(theirs, cfg)
    if wrong:
        raise ConvertError(
            f"the {checkpoint.layout} checkpoint cannot be continued by this stage: {'; '.join(wrong)}. Its parameters "
            "would compute something else: give learner.encoder these settings"
        )
    flat = flatten(fresh)
    fits: dict[str, list[Tensor]] = {}
    left: dict[str, list[Tensor]] = {}
    for tensor in tensors(flat):
        found = checkpoint.tensors.get(tensor.key)
        same = found is not None and tuple(found.shape) == tuple(tensor.shape)
        (fits if same else left).setdefault(tensor.path, []).append(tensor)
    if not fits:
        raise ConvertError(
            f"no tensor of the {checkpoint.layout} checkpoint fits this stage: it has {theirs.layers} layers of width "
            f"{theirs.width}, the stage {cfg.layers} of width {cfg.width}; take its architecture for learner.encoder"
        )
    params: Parameters = {}
    for path, parts in fits.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = _laid_over(flat[path], parts, checkpoint, whole=path not in left)
    used = {tensor.key for parts in fits.values() for tensor in parts}
    return Continued(
        params=params,
        taken=len(used),
        fresh=_described(left, fits),
        unused=tuple(key for key in checkpoint.tensors if key not in used),
        differing=tuple(
            f"{name}: {getattr(theirs, name)} there, {getattr(cfg, name)} here"
            for name in _SHOULD_AGREE
            if getattr(theirs, name) != getattr(cfg, name)
        ),
    )


def _laid_over(fresh, parts: list[Tensor], checkpoint: Checkpoint, *, whole: bool) -> np.ndarray:
    array = np.empty(fresh.shape, np.float32) if whole else np.array(fresh, np.float32)
    for tensor in parts:
        place = array if tensor.layer is None else array[tensor.layer]
        place[...] = tensor.turn.from_torch(checkpoint.tensors[tensor.key].values())
    return array


def _described(left: dict[str, list[Tensor]], fits: dict[str, list[Tensor]]) -> tuple[str, ...]:
    """Parameters by their paths; of those of which only some layers stayed fresh, these layers, together."""
    partial: dict[tuple[int, int], int] = {}
    for path in left.keys() & fits.keys():
        layers = [tensor.layer for tensor in left[path]]
        partial[layers[0], layers[-1]] = partial.get((layers[0], layers[-1]), 0) + 1
    whole = [path for path in left if path not in fits]
    return (*whole, *(f"layers {a} to {b} ({count} parameters)" for (a, b), count in sorted(partial.items())))
