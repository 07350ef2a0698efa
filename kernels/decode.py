"""Decoding on a key-value cache with room: the forward passes that write a response.

A dynamic cache copies all keys to append one; a layer here owns room for the next tokens and writes
them into place. A prompt may serve several responses: its rows are repeated in the copy.
Shapes: B responses, T cached tokens, H heads, D head width, V vocabulary.
"""

import torch
from transformers.cache_utils import DynamicLayer

ROOM = 128  # tokens of room that a layer has, and gets again when it is used up


class LayerWithRoom(DynamicLayer):
    """A copy of `rows` [B] of a layer's keys and values [*, H, T, D] with room for more tokens."""

    def __init__(self, layer: DynamicLayer, rows: torch.Tensor, room: int):
        super().__init__()
        self.room, self.written = room, layer.keys.shape[-2]
        self.storage = [self.enlarged(x[rows]) for x in (layer.keys, layer.values)]
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.is_initialized = True
        self.show_written()

    def enlarged(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.new_empty(*x.shape[:2], self.room, x.shape[3])], 2)

    def show_written(self):
        self.keys, self.values = (x[:, :, : self.written] for x in self.storage)

    def update(self, keys, values, *args, **kwargs):
        start, self.written = self.written, self.written + keys.shape[-2]
        while self.written > self.storage[0].shape[2]:
            self.storage = [self.enlarged(x) for x in self.storage]
        for x, new in zip(self.storage, (keys, values), strict=True):
            x[:, :, start : self.written] = new
        self.show_written()
        return self.keys, self.values


def left_padded(pieces: list[dict], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [B, T], mask [B, T], positions [3, B, T] of {ids, positions} that end in one column."""
    B, T = len(pieces), max(len(piece["ids"]) for piece in pieces)
    ids = torch.full((B, T), pad)
    mask = torch.zeros(B, T, dtype=torch.long)
    positions = torch.zeros(3, B, T, dtype=torch.long)
    for b, piece in enumerate(pieces):
        start = T - len(piece["ids"])
        ids[b, start:] = piece["ids"]
        mask[b, start:] = 1
        positions[:, b, start:] = piece["positions"]
    return ids, mask, positions


def pick(logits: torch.Tensor, uniform: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """The next token [B]: the one of logits [B, V] whose share holds u; without u the likeliest."""
    if uniform is None:
        return logits.argmax(-1)
    below = (logits / temperature).softmax(-1).cumsum(-1)
    u = uniform[:, None].to(logits.device) * below[:, -1:]
    drawn = torch.searchsorted(below, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(u[:, 0].isnan(), logits.argmax(-1), drawn)


def end_tokens(student) -> list[int]:
    """What ends a response: Qwen's generation_config names two tokens, its tokenizer one."""
    named = student.model.generation_config.eos_token_id
    return [student.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]


@torch.no_grad()
def decode(
    model,
    cache,
    logits: torch.Tensor,  # [B, V] of the first token
    mask: torch.Tensor,  # [B, T] of the cached tokens, 0 for padding
    position: torch.Tensor,  # [B] of the first token
    stop_tokens: list[int],
    pad: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    uniforms: torch.Tensor | None = None,  # [B, max_new_tokens] in 0..1; None, NaN: greedy
) -> list[list[int]]:
    """B responses as token ids, each with the stop token that was reached.

    Every token has a random number of its own, so a response does not depend on its batch. Picture
    tokens are never chosen: the next forward pass would look for a picture behind them.
    """
    config = model.config
    banned = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    banned = torch.tensor(banned, device=logits.device)
    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    tokens = []
    while True:
        logits = logits.float().index_fill(-1, banned, -torch.inf)
        uniform = None if uniforms is None else uniforms[:, len(tokens)]
        token = pick(logits, uniform, temperature)
        tokens.append(token.masked_fill(done, pad))
        done |= sum(token == stop for stop in stop_tokens).bool()
        if done.all() or len(tokens) == max_new_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        inputs = {"input_ids": tokens[-1][:, None], "attention_mask": mask}
        inputs["position_ids"] = position.expand(3, -1)[..., None]
        out = model(**inputs, past_key_values=cache, use_cache=True)
        logits, position = out.logits[:, -1], position + 1
    responses = []
    for row in torch.stack(tokens, 1).tolist():
        ends = [row.index(stop) + 1 for stop in stop_tokens if stop in row]
        responses.append(row[: min(ends, default=len(row))])
    return responses
