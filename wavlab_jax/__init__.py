"""From batches to a trained encoder, in JAX.

`encoder` turns waveforms into hidden states; `masking` hides frames; `losses` score predictions; `objective` composes
them: the science on one screen. `optim`, `state`, `sharding` and `step` make one jitted, sharded update of it;
`train` is the loop; `checkpoint` and `metrics` remember. `targets` makes k-means units from `features` or hidden
states, `evaluation` judges, `convert` writes weights for PyTorch.

Nothing here imports grain, librosa or the data pipeline, except for the batch contract.
"""
