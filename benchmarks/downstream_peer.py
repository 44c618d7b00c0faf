"""ML-SUPERB's downstream model and its training batch in plain PyTorch, with an encoder of transformers under it.

What ESPnet and s3prl do (`espnet2/asr/espnet_model.py`, `espnet2/asr/specaug/specaug.py`, `s3prl/nn/upstream.py`), of
rows as long as their batch, without what their frameworks add: no length masks, the fused attention of PyTorch.
"""

import math

import torch
from torch.nn import functional as F

from wavlab_jax.downstream import NORM_EPSILON, DownstreamConfig, SpecAugmentConfig, positions


class Block(torch.nn.Module):
    """A pre-norm Transformer layer with ReLU."""

    def __init__(self, cfg: DownstreamConfig):
        super().__init__()
        self.heads, self.dropout = cfg.heads, cfg.dropout
        self.query, self.key, self.value, self.output = (torch.nn.Linear(cfg.width, cfg.width) for _ in range(4))
        self.expand = torch.nn.Linear(cfg.width, cfg.feed_forward)
        self.contract = torch.nn.Linear(cfg.feed_forward, cfg.width)
        self.attention_norm, self.feed_forward_norm = (torch.nn.LayerNorm(cfg.width, NORM_EPSILON) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, frames, width] -> same shape."""
        rate = self.dropout if self.training else 0.0
        y = self.attention_norm(x)
        query, key, value = (
            each(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate)
        x = x + F.dropout(self.output(mixed.transpose(1, 2).flatten(2)), rate)
        y = F.dropout(F.relu(self.expand(self.feed_forward_norm(x))), rate)
        return x + F.dropout(self.contract(y), rate)


class Downstream(torch.nn.Module):
    """Hidden states [layers + 1, batch, frames, width] -> logits [batch, frames', tokens]."""

    def __init__(self, cfg: DownstreamConfig, *, hidden: int, inputs: int):
        super().__init__()
        self.cfg = cfg
        self.layer_weights = torch.nn.Parameter(torch.zeros(hidden))
        self.projection = torch.nn.Linear(inputs, cfg.projection)
        self.convolutions = torch.nn.ModuleList(
            [torch.nn.Conv2d(1, cfg.width, 3, 2), torch.nn.Conv2d(cfg.width, cfg.width, 3, 1)]
        )
        self.embed = torch.nn.Linear(cfg.width * ((cfg.channels - 1) // 2 - 2), cfg.width)
        self.blocks = torch.nn.ModuleList([Block(cfg) for _ in range(cfg.layers)])
        self.norm = torch.nn.LayerNorm(cfg.width, NORM_EPSILON)
        self.output = torch.nn.Linear(cfg.width, cfg.tokens)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """SpecAugment and dropout in training mode alone."""
        x = torch.einsum("l,lbtw->btw", self.layer_weights.softmax(-1), hidden)
        if self.training:
            x = augment(x, self.cfg.augment)
        x = self.projection(x - x.mean(1, keepdim=True))[:, None]
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        x = self.embed(x.transpose(1, 2).flatten(2))
        x = x * math.sqrt(self.cfg.width) + torch.from_numpy(positions(x.shape[1], self.cfg.width))
        x = F.dropout(x, self.cfg.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))

    def take_over(self, params: dict) -> None:
        """Values of our head's parameters, every one; a name or a shape that does not fit is an error."""
        state = {}
        for name, own in self.state_dict().items():
            path = name.split(".")
            stacked = path.pop(1) if path[0] == "blocks" else None
            norm = "norm" in name
            path[-1] = {"weight": "scale" if norm else "kernel"}.get(path[-1], path[-1])
            value = params
            for part in path:
                value = value[part]
            value = torch.tensor(value if stacked is None else value[int(stacked)])
            if path[-1] == "kernel":
                value = value.permute(*reversed(range(value.ndim))) if value.ndim == 2 else value.permute(3, 2, 0, 1)
            assert value.shape == own.shape, (name, value.shape, own.shape)
            state[name] = value.contiguous()
        self.load_state_dict(state)


def augment(x: torch.Tensor, cfg: SpecAugmentConfig) -> torch.Tensor:
    """Features [batch, time, channels] with one warp for all rows, as ESPnet does to equal lengths, and each row's own
    masks."""
    time, window = x.shape[1], cfg.warp_frames
    if time > 2 * window:
        center = int(torch.randint(window, time - window, ()))
        moved = int(torch.randint(center - window, center + window, ())) + 1
        parts = ((x[:, :center], moved), (x[:, center:], time - moved))
        x = torch.cat([_stretched(part, frames) for part, frames in parts], dim=1)
    x = x.masked_fill(_spans(x, x.shape[2], cfg.channel_mask_width, cfg.channel_masks)[:, None], 0.0)
    return x.masked_fill(_spans(x, time, int(time * cfg.time_mask_share), cfg.time_masks)[..., None], 0.0)


def _stretched(x: torch.Tensor, frames: int) -> torch.Tensor:
    return F.interpolate(x[:, None], (frames, x.shape[2]), mode="bicubic", align_corners=False)[:, 0]


def _spans(x: torch.Tensor, size: int, below: int, count: int) -> torch.Tensor:
    widths = torch.randint(0, max(below, 1), (x.shape[0], count))[..., None]
    starts = torch.randint(0, max(1, size - int(widths.max())), (x.shape[0], count))[..., None]
    place = torch.arange(size)
    return ((starts <= place) & (place < starts + widths)).any(1)


class Training:
    """Batches with an encoder of transformers: call it for one; every `accumulate`-th is followed by an update."""

    def __init__(self, encoder, head: Downstream, optimizer, waveform, labels):
        self.encoder, self.head, self.cfg = encoder.requires_grad_(False), head, optimizer
        self.waveform, self.labels = torch.from_numpy(waveform), torch.from_numpy(labels).long()
        self.optimizer = torch.optim.Adam(
            head.parameters(),
            lr=optimizer.peak_learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.batches = 0

    def loss(self) -> torch.Tensor:
        """The mean over rows of CTC's loss; dropout as the modules' modes have it."""
        with torch.no_grad():
            found = self.encoder(self.waveform, output_hidden_states=True)
            states = torch.stack([*found.hidden_states[:-1], found.last_hidden_state])
            states = torch.cat([states, states[:, :, -1:]], dim=2)  # ceil(samples / 320) frames, as s3prl makes them
        scores = self.head(states).log_softmax(-1).transpose(0, 1)
        rows, most = self.labels.shape
        frames, lengths = torch.full((rows,), scores.shape[0]), torch.full((rows,), most)
        losses = F.ctc_loss(scores, self.labels, frames, lengths, reduction="none", zero_infinity=True)
        return losses.mean()

    def __call__(self) -> float:
        loss = self.loss()
        (loss / self.cfg.accumulate).backward()
        self.batches += 1
        if self.batches % self.cfg.accumulate == 0:
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.cfg.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
