"""Parameter counts of the published encoders against transformers' models of the same configuration, to the unit."""

import pytest
import torch
import transformers

from experiments.architectures import parameter_counts
from tests.wavlab_jax.transformers_peer import CLASSES, config
from wavlab_jax.encoder.architectures import TABLE, QuantizerHead

pytestmark = pytest.mark.torch


def count(build) -> int:
    """Of a model that is built without memory for it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


@pytest.mark.parametrize("name", TABLE)
def test_parameter_counts(name):
    row, counts = TABLE[name], parameter_counts(name)
    theirs = config(row.model_type, row.encoder)
    assert count(lambda: CLASSES[row.model_type][1](theirs)) == counts.encoder
    if isinstance(row.head, QuantizerHead):
        theirs.codevector_dim = theirs.proj_codevector_dim = row.head.dim
        theirs.num_codevectors_per_group, theirs.num_codevector_groups = row.head.codes, row.head.groups
        assert count(lambda: transformers.Wav2Vec2ForPreTraining(theirs)) == sum(counts)
