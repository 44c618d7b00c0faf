"""XLS-R 2B: XLS-R 0.3B's recipe in 48 layers of width 1920, its parameters split over 16 devices.

Command: `python -m experiments train xlsr_2b --workdir W --corpus PREPARED` (needs no units)
Paper: XLS-R (2111.09296): 48 layers, width 1920, feed-forward 7680, 16 heads; data, balance and objective of
`xlsr_300m`. Recalled and not checked: 1M updates, 200 GPUs.
Open, and chosen here: the head of XLS-R 1B (1024); batch and learning rate of `xlsr_300m`, which should be lowered if
the loss leaves its path (larger models want less); `mesh.fsdp` 16: float32 parameters and Adam's moments are 24 GiB,
which no chip of 16 GiB holds whole. Another number of devices takes `--mesh.fsdp N`.
Not trained by anyone with this code: `python -m experiments plan xlsr_2b --topology v5e:16x16` says what it takes.
"""

import dataclasses

from experiments.stage import StageConfig
from experiments.stages import xlsr_300m
from wavlab_jax.encoder.architectures import architecture
from wavlab_jax.heads import ContrastiveHeadConfig
from wavlab_jax.sharding import MeshConfig


def get_config() -> StageConfig:
    """The paper's size."""
    small = xlsr_300m.get_config()
    encoder = dataclasses.replace(architecture("xls_r_2b"), compute_dtype="bfloat16", rematerialize="layers")
    head = ContrastiveHeadConfig(dim=1024, codevector_dim=1024)
    learner = dataclasses.replace(small.learner, encoder=encoder, head=head)
    return dataclasses.replace(small, name="xlsr_2b", learner=learner, mesh=MeshConfig(fsdp=16))


def demo() -> StageConfig:
    """XLS-R 0.3B's demo, which is the same objective."""
    return dataclasses.replace(xlsr_300m.demo(), name="xlsr_2b")
