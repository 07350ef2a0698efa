"""Generation with one prefill for all prompts about the same pictures.

Several questions ask about one pair of pictures, or about one video. What their prompts have in
common, all picture tokens above all, is a head that is encoded once; the tails of the prompts
follow on copies of its key-value cache, at the positions that they would have alone:

    head (cached once) | tail of prompt 1 | response 1
                       | tail of prompt 2 | response 2

Shapes: B prompts, T tokens, V vocabulary. A prompt: ids [T], positions [3, T], pixels
[P, channels x patch] and grids [pictures, 3] of its pictures.
"""

import torch

from kernels.decode import ROOM, LayerWithRoom, decode, end_tokens, left_padded
from kernels.rows import common_prefix, recurrent


def shared_heads(prompts: list[dict], picture_token: int) -> list[tuple[list[int], int]]:
    """What is encoded once: [(the prompts that share a head, its length)].

    Prompts about the same pictures (the same tensor `pixels`) share the tokens with which they
    begin, if all pictures are among them. Every prompt keeps at least one token of its own.
    """
    groups, heads = {}, []
    for b, prompt in enumerate(prompts):
        groups.setdefault(id(prompt["pixels"]), []).append(b)
    for members in groups.values():
        ids = [prompts[b]["ids"] for b in members]
        n = common_prefix([{"ids": own, "prompt": len(own) - 1} for own in ids])
        if any((own[n:] == picture_token).any() for own in ids):
            heads += [([b], len(own) - 1) for b, own in zip(members, ids, strict=True)]
        else:
            heads.append((members, n))
    return heads


@torch.no_grad()
def generate(student, prompts: list[dict], max_new_tokens: int, *draw) -> list[list[int]]:
    """One response per prompt, as token ids, with the end token where it was reached.

    draw: temperature and random numbers [B, max_new_tokens] of `decode`; without them the response
    is the likeliest one. All heads end in one column, and so do all tails.
    """
    model, pad, device = student.model, student.tokenizer.pad_token_id, student.model.device
    half = model.get_input_embeddings().weight.dtype == torch.bfloat16
    if half and not torch.is_autocast_enabled(device.type):  # adapters beside it are float32
        with torch.autocast(device.type, torch.bfloat16):
            return generate(student, prompts, max_new_tokens, *draw)

    def piece(prompt, start, end):
        return {"ids": prompt["ids"][start:end], "positions": prompt["positions"][:, start:end]}

    def forward(pieces, cached, **more):
        """Logits [B, V] behind the pieces, the cache, and the mask [B, T] of what it holds."""
        ids, mask, positions = (x.to(device) for x in left_padded(pieces, pad))
        mask = torch.cat([cached, mask], 1)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        out = model(**inputs, use_cache=True, logits_to_keep=1, **more)
        return out.logits[:, -1], out.past_key_values, mask

    def read(prompts, ends):
        """The same for the first ends[i] tokens of each prompt, with its pictures."""
        pieces = [piece(prompt, 0, end) for prompt, end in zip(prompts, ends, strict=True)]
        pixels = torch.cat([prompt["pixels"] for prompt in prompts]).to(device)
        grids = torch.cat([prompt["grids"] for prompt in prompts]).to(device)
        nothing = torch.zeros(len(prompts), 0, dtype=torch.long, device=device)
        return forward(pieces, nothing, pixel_values=pixels, image_grid_thw=grids)

    if recurrent(model.config):
        logits, cache, mask = read(prompts, [None] * len(prompts))
    else:
        heads, tails = shared_heads(prompts, model.config.image_token_id), [{}] * len(prompts)
        rows = torch.zeros(len(prompts), dtype=torch.long)
        for row, (members, n) in enumerate(heads):
            for b in members:
                tails[b], rows[b] = piece(prompts[b], n, None), row
        firsts, ends = zip(*((prompts[members[0]], n) for members, n in heads), strict=True)
        _, cache, mask = read(firsts, ends)
        rows = rows.to(device)
        room = max(len(tail["ids"]) for tail in tails) + min(max_new_tokens, ROOM)
        cache.layers = [LayerWithRoom(layer, rows, room) for layer in cache.layers]
        logits, cache, mask = forward(tails, mask[rows], past_key_values=cache)
    position = torch.stack([prompt["positions"].max() + 1 for prompt in prompts]).to(device)
    stops = end_tokens(student)
    return decode(model, cache, logits, mask, position, stops, pad, max_new_tokens, *draw)


def generate_groups(student, prompts, max_new_tokens, samples=1, uniforms=None, temperature=1.0):
    """`samples` responses per prompt, which is encoded once; uniforms [prompts x samples, ...]."""
    each = [prompt for prompt in prompts for _ in range(samples)]
    said = generate(student, each, max_new_tokens, temperature, uniforms)
    return [said[i : i + samples] for i in range(0, len(said), samples)]
