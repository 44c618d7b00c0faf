"""Bottlenecks of a fine-tuned encoder, where transformers has a place for them: MMS's, in pre-norm encoders.

LoRA needs none of this: it is merged into the weights. What transformers has no place for is refused here, and not
written beside the model: whoever loaded the folder would get another model without a word.
"""

import numpy as np

from wavlab_jax.adapters import AnyAdapterConfig, BottleneckConfig
from wavlab_jax.convert.names import ConvertError, Turn, flatten
from wavlab_jax.convert.settings import ADAPTER
from wavlab_jax.encoder import EncoderConfig
from wavlab_jax.model import Parameters

# Parameter of `encoder.layers.Bottleneck` -> its key below that, and the turn.
_ROWS: dict[str, tuple[str, Turn]] = {
    "norm/scale": ("norm.weight", Turn.AS_IS),
    "norm/bias": ("norm.bias", Turn.AS_IS),
    "down/kernel": ("linear_1.weight", Turn.DENSE),
    "down/bias": ("linear_1.bias", Turn.AS_IS),
    "up/kernel": ("linear_2.weight", Turn.DENSE),
    "up/bias": ("linear_2.bias", Turn.AS_IS),
}


def stored_adapter(
    adapter: Parameters, cfg: AnyAdapterConfig, *, encoder: EncoderConfig, model_type: str
) -> dict[str, np.ndarray]:
    """A bottleneck's parameters under the keys that transformers has for them, in every layer, for `Checkpoint.heads`.

    Raises ConvertError, which says what to do, if it has none.
    """
    if not isinstance(cfg, BottleneckConfig):
        raise ConvertError(
            "LoRA is merged into the encoder's weights before they are exported; there is nothing beside"
        )
    why = None
    if cfg.kind != "mms":
        why = f"transformers has no place for {cfg.kind} bottlenecks"
    elif model_type == "wavlm" or not encoder.pre_norm:
        why = "transformers has a place for MMS's bottlenecks in pre-norm HuBERT and wav2vec 2.0 alone, and this is "
        why += "WavLM" if model_type == "wavlm" else "post-norm"
    if why is not None:
        raise ConvertError(
            f"{why}: nothing was written. Fine-tune with LoRA, which is merged into the weights, or the encoder "
            "itself; the run's checkpoints keep this model"
        )
    keys = {}
    for path, array in flatten(adapter).items():
        name, turn = _ROWS[path]
        for layer, values in enumerate(np.asarray(array)):
            keys[f"{model_type}.encoder.layers.{layer}.{ADAPTER}.{name}"] = turn.to_torch(values)
    return keys
