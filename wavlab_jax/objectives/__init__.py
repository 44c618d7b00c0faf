"""What a step minimises: the interface between one update and the science of an objective.

An objective is a module (`prediction`, `contrastive`, `recognition`) and a configuration with a field `mask`. `step`
knows no more of it than this; the module is found by the type of the configuration, in `objective_of` alone. All arrays
are of the rows of one pass, [rows, ...]; `mask` [rows, frames] bool is True where a frame is hidden.

    draw_masks(batch, key, cfg.mask)                      one rule for all, below the module
    module.denominators(batch, mask, channels=)           {term: []}; counts that do not depend on parameters, so they
                                                          are known, and added up over the passes, before any forward
                                                          pass; gradients of the passes then simply add up
    module.measure(model, batch, mask, keys=, step=, cfg=, head=, padded=, formulation=)
                                                          `Measured` of these rows: the `Sums` that the loss is made
                                                          of, and what else is worth a line of metrics
    module.coefficients(cfg, head)                        {term: weight}; a term without one is only reported
    loss_of(sums, denominators, coefficients)             the scalar: each total / its denominator * its weight
    module.judge(model, batch, mask, keys=, cfg=, head=, formulation=)
                                                          `Judged` (of recognition `Recognised`), on padded rows,
                                                          without dropout or noise
    module.PADDED                                         whether the rows that are trained on may end in padding
    module.SHOWN                                          names of the sums that a progress line shows, loss first
    module.ADDITIVE                                       whether every sum over rows is that of two halves, added up

Terms that are nonlinear in a batch's statistics (code diversity, perplexities) are of one pass, over all devices: a
weighted mean over passes, not the value of the whole step; each says so. All other terms do not depend on how rows are
split. Losses are float32, whatever the encoder computes in.
"""

from types import ModuleType

from wavlab_jax.downstream import DownstreamConfig
from wavlab_jax.heads import AnyHeadConfig, ContrastiveHeadConfig, HeadConfig, HeadError, LinearHeadConfig
from wavlab_jax.objectives import contrastive, prediction, recognition
from wavlab_jax.objectives.contrastive import ContrastiveConfig
from wavlab_jax.objectives.hiding import Judged, Keys, Measured, ObjectiveError, draw_masks, loss_of
from wavlab_jax.objectives.prediction import PredictionConfig
from wavlab_jax.objectives.recognition import Recognised, RecognitionConfig

AnyObjectiveConfig = PredictionConfig | ContrastiveConfig | RecognitionConfig

__all__ = [
    "AnyObjectiveConfig",
    "ContrastiveConfig",
    "Judged",
    "Keys",
    "Measured",
    "ObjectiveError",
    "PredictionConfig",
    "Recognised",
    "RecognitionConfig",
    "check_head",
    "draw_masks",
    "loss_of",
    "objective_of",
]

# Configuration -> the module that minimises it, and the heads that it trains.
_MODULES: dict[type, tuple[ModuleType, tuple[type, ...]]] = {
    PredictionConfig: (prediction, (HeadConfig,)),
    ContrastiveConfig: (contrastive, (ContrastiveHeadConfig,)),
    RecognitionConfig: (recognition, (DownstreamConfig, LinearHeadConfig)),
}


def objective_of(cfg: AnyObjectiveConfig) -> ModuleType:
    """The module of this objective; what it holds is said above."""
    return _MODULES[type(cfg)][0]


def check_head(cfg: AnyObjectiveConfig, head: AnyHeadConfig) -> None:
    """Raises HeadError if the objective trains another kind of head."""
    wanted = _MODULES[type(cfg)][1]
    if type(head) not in wanted:
        names = " or a ".join(each.__name__ for each in wanted)
        raise HeadError(f"{type(cfg).__name__} trains a {names}, but learner.head is a {type(head).__name__}")
