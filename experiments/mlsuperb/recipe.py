"""How an encoder is fine-tuned: fairseq's recipe for HuBERT, on the benchmark's batches.

Constants are those of HuBERT Base on ten hours (fairseq `examples/hubert/config/finetune/base_10h.yaml`; what that does
not say is `HubertAsrConfig` in `fairseq/models/hubert/hubert_asr.py`). An update is of 32 utterances, as in ML-SUPERB:
8 in each of 4 batches. fairseq has 200 s of audio on each of 8 GPUs.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from data_pipelines.mlsuperb.batches import TrackBatchesConfig
from experiments.mlsuperb.protocol import ACCUMULATE, BATCH, ProtocolError, Schedule
from experiments.stage import flatten
from wavlab_jax.adapters import AnyAdapterConfig, BottleneckConfig, LoraConfig
from wavlab_jax.encoder import EncoderConfig
from wavlab_jax.encoder.config import Rematerialize
from wavlab_jax.heads import LinearHeadConfig
from wavlab_jax.masking import MaskConfig
from wavlab_jax.objectives import RecognitionConfig
from wavlab_jax.optim import FineTuningConfig
from wavlab_jax.step import LearnerConfig

UPDATES = 25_000  # `max_update`
VALIDATIONS = 25
Adapter = Literal["none", "lora", "houlsby", "mms"]


@dataclass(frozen=True)
class RegularisationConfig:
    """What is dropped while fine-tuning.

    Attributes:
        dropout, attention_dropout, activation_dropout, layerdrop: of the encoder.
        projection_dropout: of the projected features (`dropout_input`).
        final_dropout: before the linear layer.
    """

    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.1
    projection_dropout: float = 0.0
    layerdrop: float = 0.1
    final_dropout: float = 0.0

    def of(self, encoder: EncoderConfig) -> EncoderConfig:
        """The encoder with these."""
        own = dataclasses.asdict(self)
        del own["final_dropout"]
        return dataclasses.replace(encoder, **own)


@dataclass(frozen=True)
class RecipeConfig:
    """How it is fine-tuned.

    Attributes:
        updates: in all.
        validations: on the dev part, each with a checkpoint, evenly over the updates.
        averaged: of the best checkpoints by that loss; their mean is judged and exported.
        scale: share of all updates, warm-up and frozen ones too, for short runs.
        adapter: what is put into a frozen encoder and trained with the linear layer: "lora", or a bottleneck in every
            layer ("houlsby", "mms"). "none": the encoder itself is trained.
        lora: of "lora".
        bottleneck: the width of one.
        optimizer: rates, schedule, what is frozen and for how long; steps there are updates.
        regularisation: dropout.
        mask: frames and channels that are hidden while training (`mask_prob`, `mask_channel_prob` and `_length`).
        batches: of the track.
        seconds_per_device: audio that a device holds at once while training.
        compute_dtype: of matrix products.
        rematerialize: what the backward pass computes again instead of storing it (`EncoderConfig`).
        seed: of masks and dropout, and of first values; `batches.seed` is that of the order.
    """

    updates: int = UPDATES
    validations: int = VALIDATIONS
    averaged: int = 1
    scale: float = 1.0
    adapter: Adapter = "none"
    lora: LoraConfig = LoraConfig()
    bottleneck: int = 32
    optimizer: FineTuningConfig = FineTuningConfig(accumulate=ACCUMULATE)
    regularisation: RegularisationConfig = RegularisationConfig()
    mask: MaskConfig = MaskConfig(probability=0.75, channel_probability=0.5, channel_length=64)
    batches: TrackBatchesConfig = TrackBatchesConfig(size=BATCH)
    seconds_per_device: float = 160.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    rematerialize: Rematerialize = "nothing"
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.scale <= 1:
            raise ProtocolError(f"scale is {self.scale:g}; it is a share of the recipe's updates, up to 1")
        if min(self.updates, self.validations, self.averaged) < 1 or not self.seconds_per_device > 0:
            raise ProtocolError(
                f"updates {self.updates}, validations {self.validations} and averaged {self.averaged} must be at least "
                f"1, seconds_per_device {self.seconds_per_device:g} positive"
            )

    @property
    def adapter_config(self) -> AnyAdapterConfig | None:
        """Of the adapter that was asked for. Raises AdapterError."""
        if self.adapter == "none":
            return None
        return self.lora if self.adapter == "lora" else BottleneckConfig(self.adapter, self.bottleneck)

    def schedule(self) -> Schedule:
        """In batches; validations lie at whole updates, the last one at the end.

        Of a run with a scale there is one for every 100 batches, but 2 of them, as in the benchmark's.
        """
        every, batches = self.optimizer.accumulate, self.updates * self.optimizer.accumulate
        updates = max(round(self.updates * self.scale), 1)
        most = self.validations if self.scale == 1 else max(updates * every // 100, 2)
        validations = min(self.validations, most, updates)
        between = max(round(updates / validations), 1) * every
        return Schedule(batches, between * validations, between, min(self.averaged, validations))

    def scaled_optimizer(self) -> FineTuningConfig:
        """The optimizer of so many updates."""
        own = self.optimizer
        if self.scale == 1:
            return own
        names = ("warmup_steps", "hold_steps", "freeze_steps", "total_steps")
        steps = {name: round(getattr(own, name) * self.scale) for name in names}
        steps["total_steps"] = max(steps["total_steps"], steps["warmup_steps"] + steps["hold_steps"] + 1)
        return dataclasses.replace(own, **steps)

    def learner(self, encoder: EncoderConfig, *, tokens: int) -> LearnerConfig:
        """What a step computes, of an encoder and a vocabulary."""
        adapter = self.adapter_config
        return LearnerConfig(
            encoder=dataclasses.replace(
                self.regularisation.of(encoder), compute_dtype=self.compute_dtype, rematerialize=self.rematerialize
            ),
            head=LinearHeadConfig(tokens=tokens, dropout=self.regularisation.final_dropout),
            objective=RecognitionConfig(mask=self.mask),
            optimizer=self.scaled_optimizer(),
            seed=self.seed,
            frozen_encoder=adapter is not None,
            adapter=adapter,
        )

    def deviations(self) -> list[str]:
        """In what this is not the benchmark's protocol, which freezes the encoder; and not the recipe."""
        own = "the encoder itself" if self.adapter == "none" else f"{self.adapter} in the frozen encoder"
        found = [f"fine-tuned: {own} and a linear layer, by fairseq's recipe for HuBERT"]
        if self.scale != 1:
            found.append(f"scale {self.scale:g}: {self.schedule().iterations // self.optimizer.accumulate:,} of "
                         f"{self.updates:,} updates")  # fmt: skip
        own, usual = flatten(self), flatten(RecipeConfig())
        said = ("scale", "adapter", "seed", "batches.", "lora.", "bottleneck")  # above, below, or no matter
        said += ("seconds_per_device", "compute_dtype", "rematerialize")
        changed = [
            f"{name} {value}" for name, value in own.items() if value != usual[name] and not name.startswith(said)
        ]
        if changed:
            found.append(f"not that recipe's values: {', '.join(changed)}")
        if self.batches.size != BATCH:
            found.append(f"batches of {self.batches.size}, not {BATCH}")
        return found
