"""From raw corpora to batches, in numpy.

Offline, once: `prepare` reads a corpus, drops and lists bad clips, joins short neighbours, writes ArrayRecord shards of
FLAC and a `manifest`. While training: a step number goes through `sampling` (which utterances), `sources` (their
audio), `crops` (which seconds), `interference` (what is mixed in, which room) and `units` (which targets) and comes out
as a `batch`.
`pipeline` is the one place where that chain is spelled. Batch k depends on (config, seed, k) and on nothing else.

Nothing here imports jax.
"""
