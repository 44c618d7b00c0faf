"""From batches to a trained encoder, in JAX.

`encoder` turns waveforms into hidden states; `masking` hides frames; `losses` score predictions; `objectives` compose
them, the science of each on one screen. `optim`, `state`, `sharding` and `step` make one jitted, sharded update of it;
`train` is the loop; `checkpoint` and `metrics` remember. `targets` makes units: k-means of `features` or hidden states,
a teacher's or a random projection's in the step; `evaluation` judges, `convert` writes weights for PyTorch.

Nothing here imports grain, librosa or the data pipeline, except for the batch contract.
"""
