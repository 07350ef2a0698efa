"""Generation in which all prompts about the same pictures are one row.

Several questions ask about one pair of pictures, or about one video. What their prompts have in
common, all picture tokens above all, is a head that is encoded and cached once; the other tokens
follow in the same row, and none sees those of another prompt:

    head | tail of prompt 1 | tail of prompt 2 | last tokens of 1, 2 | next of 1, 2 | ...
    0 0 0      1 1 1               2 2                  1 2               1 2             segments

Every token has the position that it would have alone, and every answer the probability. Where
layers carry a state, which no mask hides, every prompt is a row of its own.
Shapes: B prompts in R rows of K at most, T tokens, H heads, D head width, V vocabulary. A prompt:
ids [T], positions [3, T], pixels [P, channels x patch] and grids [pictures, 3] of its pictures.
"""

import math

import torch
from transformers.cache_utils import DynamicLayer

from kernels.attention import Segments
from kernels.rows import common_prefix, packs, recurrent, who_sees_whom

ROOM = 128  # tokens of a response for which a layer has room, and gets it again when it is used up
ANSWER = 16  # tokens that a response has, about
WIDEST = 64  # prompts in a row at most
TOKEN = 6000  # pairs of query and key that cost as much as a token: fits base/ on a CPU


class LayerWithRoom(DynamicLayer):
    """A copy of a layer's keys and values [R, H, T, D] with room for more tokens.

    A dynamic cache copies all keys to append one; this one writes them into place.
    """

    def __init__(self, layer: DynamicLayer, room: int):
        super().__init__()
        self.room, self.written = room, layer.keys.shape[-2]
        self.storage = [self.enlarged(x) for x in (layer.keys, layer.values)]
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
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


def shared_heads(prompts: list[dict], config) -> list[tuple[list[int], int]]:
    """What is encoded once: [(the prompts that share a head, its length)].

    Prompts about the same pictures (one tensor `pixels`) share the tokens with which they begin, if
    all pictures are among them; each keeps one of its own. Large groups are cut where that pays.
    """
    groups, heads, ids = {}, [], [prompt["ids"] for prompt in prompts]
    for b, prompt in enumerate(prompts):
        groups.setdefault(b if recurrent(config) else id(prompt["pixels"]), []).append(b)

    def common(members):
        return common_prefix([{"ids": ids[b], "prompt": len(ids[b]) - 1} for b in members])

    groups = [(own, common(own)) for own in groups.values()]
    head, most = max(n for _, n in groups), max(len(own) for own, _ in groups)
    tail = max(len(ids[b]) - n for own, n in groups for b in own)

    def cost(width):  # rows are as wide as the widest, and a token meets all of its row
        rows, own = sum(math.ceil(len(g) / width) for g, _ in groups), width * (tail + ANSWER)
        return rows * (head + own) * (TOKEN + own)

    K = min(range(1, min(WIDEST, most) + 1), key=cost)
    for members in [own[i : i + K] for own, _ in groups for i in range(0, len(own), K)]:
        n = common(members)
        apart = any((ids[b][n:] == config.image_token_id).any() for b in members)
        heads += [([b], len(ids[b]) - 1) for b in members] if apart else [(members, n)]
    return heads


class Rows:
    """R rows of a batch, K prompts wide: what of them is cached, and who sees whom."""

    def __init__(self, student, R: int, K: int):
        self.model, self.pad = student.model, student.tokenizer.pad_token_id
        self.R, self.K, self.cache = R, K, None
        self.segments = torch.zeros(R, 0, dtype=torch.long, device=self.model.device)

    def forward(self, ids, segments, positions, keep: int = 1, **pictures) -> torch.Tensor:
        """Logits [R, keep, V] of the last of tokens [R, T], which are cached behind the others."""
        model, device = self.model, self.model.device
        self.segments = torch.cat([self.segments, segments.to(device)], 1)
        if self.K == 1:  # there is but padding to hide
            seen = {"attention_mask": (self.segments >= 0).long()}
        elif packs(model):
            seen = {"prefix": Segments(self.segments)}
        else:
            seen = {"attention_mask": who_sees_whom(self.segments, ids.shape[1], model.dtype)}
        inputs = {"input_ids": ids.to(device), "position_ids": positions.to(device)} | pictures
        more = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": keep}
        out = model(**inputs, **seen, **more)
        self.cache = out.past_key_values
        return out.logits

    def read(self, rows: list[list[tuple]], **pictures):
        """Cache pieces (ids [T], positions [3, T], segment) of each row, one behind the other."""
        lengths = [sum(len(own) for own, _, _ in pieces) for pieces in rows]
        shape = self.R, max(lengths)
        ids, segments = torch.full(shape, self.pad), torch.full(shape, -1)  # padding on the left
        positions = torch.zeros(3, *shape, dtype=torch.long)
        for row, pieces in enumerate(rows):
            end = shape[1] - lengths[row]
            for own, theirs, segment in pieces:
                start, end = end, end + len(own)
                ids[row, start:end], segments[row, start:end] = own, segment
                positions[:, row, start:end] = theirs
        if shape[1]:
            self.forward(ids, segments, positions, **pictures)


@torch.no_grad()
def generate(
    student,
    prompts: list[dict],
    max_new_tokens: int,
    temperature: float = 1.0,
    uniforms: torch.Tensor | None = None,  # [B, max_new_tokens] in 0..1; None, NaN: the likeliest
) -> list[list[int]]:
    """One response per prompt, as token ids, with the end token where it was reached.

    Every token has a random number of its own, so a response does not depend on its batch. Picture
    tokens are never chosen: the next forward pass would look for a picture behind them.
    """
    model, device = student.model, student.model.device
    half = model.get_input_embeddings().weight.dtype == torch.bfloat16
    if half and not torch.is_autocast_enabled(device.type):  # adapters beside it are float32
        with torch.autocast(device.type, torch.bfloat16):
            return generate(student, prompts, max_new_tokens, temperature, uniforms)
    heads = shared_heads(prompts, model.config)
    R, K = len(heads), max(len(members) for members, _ in heads)
    rows, place = Rows(student, R, K), torch.zeros(len(prompts), dtype=torch.long)  # of R x K
    firsts, seen, told = [], [], []
    for row, (members, n) in enumerate(heads):
        own = [prompts[b] for b in members]
        seen.append([(own[0]["ids"][:n], own[0]["positions"][:, :n], 0)])
        told.append([(x["ids"][n:-1], x["positions"][:, n:-1], k) for k, x in enumerate(own, 1)])
        firsts.append(own[0])
        place[members] = torch.arange(row * K, row * K + len(members))
    pixels, grids = (torch.cat([x[name] for x in firsts]) for name in ("pixels", "grids"))
    rows.read(seen, pixel_values=pixels.to(device), image_grid_thw=grids.to(device))
    if not recurrent(model.config):
        room = K * min(max_new_tokens, ROOM)
        rows.cache.layers = [LayerWithRoom(layer, room) for layer in rows.cache.layers]
    rows.read(told)

    config, stops, tokens = model.config, end_tokens(student), []
    banned = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    ids, position = torch.full((R * K,), rows.pad), torch.zeros(3, R * K, dtype=torch.long)
    for at, prompt in zip(place.tolist(), prompts, strict=True):
        ids[at], position[:, at] = prompt["ids"][-1], prompt["positions"][:, -1]
    after = torch.stack([prompt["positions"].max() for prompt in prompts])
    segments = torch.arange(1, K + 1).expand(R, K)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while True:
        logits = rows.forward(ids.view(R, K), segments, position.view(3, R, K), keep=K)
        logits = logits.flatten(0, 1)[place].float()
        logits[:, banned] = -torch.inf
        uniform = None if uniforms is None else uniforms[:, len(tokens)]
        tokens.append(pick(logits, uniform, temperature).masked_fill(done, rows.pad))
        done |= sum(tokens[-1] == stop for stop in stops).bool()
        if done.all() or len(tokens) == max_new_tokens:
            break
        ids[place], position[:, place] = tokens[-1].cpu(), after + len(tokens)
    responses = []
    for row in torch.stack(tokens, 1).tolist():
        ends = [row.index(stop) + 1 for stop in stops if stop in row]
        responses.append(row[: min(ends, default=len(row))])
    return responses


def generate_groups(student, prompts, max_new_tokens, samples=1, uniforms=None, temperature=1.0):
    """`samples` responses per prompt, which is encoded once; uniforms [prompts x samples, ...]."""
    each = [prompt for prompt in prompts for _ in range(samples)]
    said = generate(student, each, max_new_tokens, temperature, uniforms)
    return [said[i : i + samples] for i in range(0, len(said), samples)]
