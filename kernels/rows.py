"""Questions that share a prefix, packed into rows: the host side of `attention(prefix=)`.

A question brings two pictures and a few words, and several questions ask about the same pictures.
A row encodes the pictures once:

    prefix | rest of question 1 | rest of question 2 | ...

Every token keeps the position that it has when its question stands alone, and sees the prefix and
its own question only, so each answer token gets the log-probability that it would have had alone.

A row is a dict:  ids [T], positions [3, T], segment [T] (0 the prefix, k question k),
    target [N] where the answer tokens stand, source [N] where each is predicted, owner [N] its
    question (from 0), pixels [P, channels x patch] and grids [pictures, 3] of its pictures, and
    its questions.
"""

import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MethodType

import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from kernels.attention import Segments

LOGITS = 2**27  # logits in memory at a time: half a gigabyte of float32


def expand_pictures(tokens: list[int], grids: torch.Tensor, picture_token: int, merge: int):
    """Each picture's one mark becomes its tokens -> ids [T] and Qwen-VL's mRoPE positions [3, T].

    A text token stands at (t, t, t). A picture that begins at t has its token of row r and column
    c at (t, t + r, t + c), and the text goes on behind its longer side. grids [pictures, 3]:
    frames, rows and columns in patches, of which merge x merge make a token.
    """
    ids, positions, t = [], [], 0
    pictures = iter(grids.tolist())
    for token in tokens:
        rows, columns = 1, 1
        if token == picture_token:
            _, rows, columns = (n // merge for n in next(pictures))
        ids += [token] * (rows * columns)
        positions += [(t, t + row, t + column) for row in range(rows) for column in range(columns)]
        t += max(rows, columns)
    return torch.tensor(ids), torch.tensor(positions).T


def encode_question(student, record: dict, grids: torch.Tensor) -> dict:
    """One question -> ids [T], of which the first `prompt` ask, and their positions [3, T].

    ValueError where the text itself holds picture tokens: they would shift every later picture.
    """
    *turns, answer = record["messages"]
    chat = []
    for turn in turns:
        content = []
        for part in re.split("(<image>)", turn["content"]):
            if part == "<image>":
                content.append({"type": "image"})
            elif part:
                content.append({"type": "text", "text": part})
        chat.append({"role": turn["role"], "content": content})
    tokenizer, picture_token = student.tokenizer, student.model.config.image_token_id
    how = {"add_generation_prompt": True, "enable_thinking": False}  # the answer comes at once
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, **how)
    texts = [prompt, answer["content"] + tokenizer.eos_token]
    asked, answered = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if asked.count(picture_token) != len(grids) or picture_token in answered:
        raise ValueError("the text holds picture tokens of its own: remove them")
    merge = student.image_processor.merge_size
    ids, positions = expand_pictures(asked + answered, grids, picture_token, merge)
    name = record.get("name", "?")
    return {"ids": ids, "positions": positions, "prompt": len(ids) - len(answered), "name": name}


def recurrent(config) -> bool:
    """Do layers carry a state from token to token (Qwen3.5's three of four)? No mask hides it from
    a token behind, so nothing can share a prefix or be packed: sdpa, and padded rows."""
    return "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def share(questions: list[dict], pixels, grids, config, max_tokens: int) -> list[dict]:
    """Encoded questions {ids, positions, prompt, name} about the same pictures -> rows.

    The prefix is the longest run of tokens with which all prompts begin. Where it lacks a picture,
    or the model of `config` is recurrent, every question gets a row of its own; a row over
    max_tokens is split.
    """
    prefix = common_prefix(questions)
    lengths = itertools.accumulate((len(q["ids"]) - prefix for q in questions), initial=prefix)
    fit = max(1, sum(length <= max_tokens for length in lengths) - 1)
    apart = (questions[0]["ids"][prefix:] == config.image_token_id).any() or recurrent(config)
    if apart and len(questions) > 1:
        parts = [[question] for question in questions]
    elif fit < len(questions):
        parts = [questions[:fit], questions[fit:]]
    else:
        return [join(questions, prefix) | {"pixels": pixels, "grids": grids}]
    return [row for part in parts for row in share(part, pixels, grids, config, max_tokens)]


def common_prefix(questions: list[dict]) -> int:
    """The number of tokens with which all prompts begin."""
    first = questions[0]["ids"]
    prefix = min(question["prompt"] for question in questions)
    for question in questions[1:]:
        differs = (question["ids"][:prefix] != first[:prefix]).nonzero()
        if len(differs):
            prefix = int(differs[0])
    return prefix


def join(questions: list[dict], prefix: int) -> dict:
    """The row of questions whose first `prefix` tokens are the same."""
    ids = [questions[0]["ids"][:prefix]]
    positions = [questions[0]["positions"][:, :prefix]]
    segment = [torch.zeros(prefix, dtype=torch.long)]
    source, target, owner, start = [], [], [], prefix
    for k, question in enumerate(questions):
        rest = len(question["ids"]) - prefix
        ids.append(question["ids"][prefix:])
        positions.append(question["positions"][:, prefix:])
        segment.append(torch.full((rest,), k + 1))
        for i in range(question["prompt"] - prefix, rest):
            # the prefix's last token predicts an answer that opens its segment
            source.append(start + i - 1 if i else prefix - 1)
            target.append(start + i)
            owner.append(k)
        start += rest
    row = {"ids": torch.cat(ids), "positions": torch.cat(positions, 1)}
    row |= {"segment": torch.cat(segment), "source": torch.tensor(source)}
    row |= {"target": torch.tensor(target), "owner": torch.tensor(owner)}
    return row | {"questions": questions}


def pack(rows: list[dict]) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Rows one behind the other as one packed row [1, T] without padding.

    Returns the model's inputs, where the predictors of the N answer tokens stand, as (row,
    position) [2, N], and the answer tokens [N]. text_cu_seqlens [rows + 1] says where each row
    begins: attention stays inside.
    """
    starts = [0, *itertools.accumulate(len(row["ids"]) for row in rows)]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    inputs = {  # "text_": transformers hands a plain cu_seqlens to the vision tower instead
        "input_ids": torch.cat([row["ids"] for row in rows])[None],
        "position_ids": torch.cat([row["positions"] for row in rows], 1)[:, None],
        "prefix": Segments(torch.cat([row["segment"] for row in rows])[None], cu_seqlens),
        "text_cu_seqlens": cu_seqlens,
        "text_max_seqlen": max(len(row["ids"]) for row in rows),
    }
    source = torch.cat([row["source"] + start for row, start in zip(rows, starts, strict=False)])
    tokens = torch.cat([row["ids"][row["target"]] for row in rows])
    return inputs, torch.stack([torch.zeros_like(source), source]), tokens


def pad_rows(rows: list[dict], pad: int, dtype: torch.dtype):
    """The same for attentions without cu_seqlens: [B, T] padded on the right, 4-D mask of pairs."""
    B, T = len(rows), max(len(row["ids"]) for row in rows)
    ids = torch.full((B, T), pad)
    positions = torch.zeros(3, B, T, dtype=torch.long)
    segment = torch.full((B, T), -1)
    for b, row in enumerate(rows):
        n = len(row["ids"])
        ids[b, :n] = row["ids"]
        positions[:, b, :n] = row["positions"]
        segment[b, :n] = row["segment"]
    mask = who_sees_whom(segment, T, dtype)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    row_of = torch.cat([torch.full_like(row["source"], b) for b, row in enumerate(rows)])
    source = torch.cat([row["source"] for row in rows])
    tokens = torch.cat([row["ids"][row["target"]] for row in rows])
    return inputs, torch.stack([row_of, source]), tokens


def who_sees_whom(segment: torch.Tensor, queries: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores, [B, 1, queries, T]: the last tokens of segment [B, T] see those
    that stand before them in the prefix or in their own question.
    """
    own = segment[:, -queries:, None]
    visible = (segment[:, None] == 0) | (segment[:, None] == own)
    visible = visible.tril(segment.shape[1] - queries)
    mask = torch.zeros(visible.shape, dtype=dtype, device=segment.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def dummy_row(student) -> dict:
    """A row without weight about a grey picture."""
    grey = Image.new("RGB", (56, 56), (127, 127, 127))
    seen = student.image_processor(images=[grey], return_tensors="pt")
    pixels, grids = seen["pixel_values"], seen["image_grid_thw"]
    asks, answers = {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "no"}
    question = encode_question(student, {"messages": [asks, answers]}, grids)
    row = join([question], question["prompt"]) | {"pixels": pixels, "grids": grids}
    nothing = torch.zeros(len(row["target"]))
    return row | {"weight": nothing, "advantage": nothing}


def packs(model) -> bool:
    """Do rows go one behind the other? The attentions of transformers need them padded."""
    return model.config._attn_implementation == "world2vlm"


def micro_batches(rows: list[dict], max_tokens: int, padded: bool, dummy: dict) -> list[list[dict]]:
    """Rows, longest first, cut into forward passes of at most max_tokens; a longer one goes alone.

    Padded, every row costs as much as the first of its pass. FSDP's processes step together: all
    get as many passes as the busiest, filled up with a dummy row.
    """
    parts, used = [], 0
    for row in sorted(rows, key=lambda row: -len(row["ids"])):
        cost = len(parts[-1][0]["ids"]) if parts and padded else len(row["ids"])
        if parts and used + cost <= max_tokens:
            parts[-1].append(row)
            used += cost
        else:
            parts.append([row])
            used = len(row["ids"])
    number = torch.tensor(len(parts))
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return parts + [[dummy]] * (int(number) - len(parts))


def ahead(make, steps, device: str):
    """Per step the list of make(item) for its items, made while the step before is learned from.

    Threads suffice, because pictures are opened and scaled outside of Python; one on a CPU, which
    has its hands full.
    """
    own = (os.cpu_count() or 1) // dist.get_world_size()
    threads = 1 if device == "cpu" else min(8, max(1, own))
    with ThreadPoolExecutor(threads) as pool:
        coming = None
        for items in itertools.chain(steps, [()]):
            made, coming = coming, [pool.submit(make, item) for item in items]
            if made is not None:
                yield [one.result() for one in made]


def names_of(rows: list[dict], marked: torch.Tensor) -> list[str]:
    """The questions of the rows to which the marked of their N answer tokens, bool [N], belong."""
    names = [row["questions"][k]["name"] for row in rows for k in row["owner"].tolist()]
    return sorted({name for name, mark in zip(names, marked.tolist(), strict=True) if mark})


def answer_logprobs(model, inputs: dict, where, tokens, temperature: float) -> torch.Tensor:
    """log p [N] of `tokens` [N] whose predictors stand at `where` [2, N].

    Logits exist at answer positions only, and LOGITS of them at a time: the backward pass computes
    a chunk again instead of keeping all (a vocabulary of 152,000 takes 0.6 MB per token).
    """

    def of_chunk(hidden, tokens):
        logprobs = (model.lm_head(hidden).float() / temperature).log_softmax(-1)
        return logprobs.gather(-1, tokens[:, None])[:, 0]

    hidden = model.model(**inputs, use_cache=False).last_hidden_state  # [B, T, width]
    hidden = hidden[where[0], where[1]]  # [N, width]
    size = max(1, LOGITS // model.config.text_config.vocab_size)
    if len(tokens) <= size:
        return of_chunk(hidden, tokens)
    chunks = zip(hidden.split(size), tokens.split(size), strict=True)
    return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def hand_out(module, device: str):
    """In place, on `device`: the first process's tensors, where they are not sharded yet."""

    def handed(x):
        if isinstance(x, DTensor):
            return x
        x = torch.empty_like(x, device=device) if x.is_meta else x.to(device)
        dist.broadcast(x, 0)
        return x

    module._apply(handed)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return module


def shard(model, device: str, dtype: str):
    """FSDP2, in place: each of several processes holds a part of a layer, and gathers it for use.

    Only the first has read the weights; it hands them out layer by layer. Gradients are summed over
    the processes. answer_logprobs becomes a method, because a sharded model gathers its weights
    around methods that it knows.
    """
    if dist.get_world_size() == 1:
        return
    how = {"mesh": init_device_mesh(device.split(":")[0], (dist.get_world_size(),))}
    how["reshard_after_forward"] = True  # of the root, too: 05 exchanges weights between passes
    if dtype == "bfloat16":  # gradients travel in float32, and rotary angles are left as they are
        how["mp_policy"] = MixedPrecisionPolicy(
            torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for layer in [*model.model.language_model.layers, *model.model.visual.blocks, model]:
        fully_shard(hand_out(layer, device), **how)
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.answer_logprobs = MethodType(answer_logprobs, model)
    register_fsdp_forward_method(model, "answer_logprobs")


def row_logprobs(model, rows: list[dict], pad: int, temperature=1.0, half=False) -> torch.Tensor:
    """log p, float32 [N], of every answer token of the rows, in order; half: with autocast."""
    if packs(model):
        inputs, where, tokens = pack(rows)
    else:
        inputs, where, tokens = pad_rows(rows, pad, model.dtype)
    inputs["pixel_values"] = torch.cat([row["pixels"] for row in rows])
    inputs["image_grid_thw"] = torch.cat([row["grids"] for row in rows])
    device = model.device
    inputs = {name: x.to(device) if hasattr(x, "to") else x for name, x in inputs.items()}
    score = getattr(model, "answer_logprobs", partial(answer_logprobs, model))
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        return score(inputs, where.to(device), tokens.to(device), temperature)
