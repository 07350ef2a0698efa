"""Stage 4: post-train the student on questions whose answers the world model taught (SFT).

Six or more questions ask about the same pictures, so the pictures are encoded once. A row is
prefix | question 1 answer 1 | question 2 answer 2 | ...; every token sees the prefix and its own
question only, at the position that it would have alone (kernels/rows.py). The loss is that of the
questions one by one (--no_share), at a fraction of the work:

    L = - sum of w log p(token | pictures, question, answer so far) / sum of w

over the answer tokens of a batch, with w = 1, or 1 / tokens of its answer (--mean answer).

Departs from the paper: shared prefixes, and a tiny student that learns from random weights.

Reads   3_qa/sft.jsonl, or any ms-swift, LLaMA-Factory or World2VLM file of such records:
        {"task_type": "A2", "messages": [{"role": "user", "content": "<image><image>Which ..."},
         {"role": "assistant", "content": "turn left 40 degrees"}],
         "images": ["2_views/room_00001/t000/000.png", ...]}
Writes  4_sft/: adapter/ (PEFT format, float32) over the untouched base, which meta.json names;
        with --train full an ordinary Hugging Face checkpoint instead, with --merge besides; the
        processor, metrics.jsonl, curves.png, meta.json; on the way step_N/ to resume from:
        {"step": 120, "loss": 1.03, "lr": 0.00098, "grad_norm": 0.71, "questions": 131, "answers":
         1340, "tokens": 5120, "seconds": 0.84, "tokens_s": 6095.2, "tflops": 0.081}
        loss: mean over answer tokens; lr: AdamW's; grad_norm: before clipping; answers: answer
        tokens; tokens: all tokens, after sharing; tflops: model FLOPs per second, of all
        processes; mfu: their share of the card's peak, if known; val_loss: on scenes kept aside.

    python 04_train_sft.py --run runs/demo --student Qwen/Qwen2.5-VL-7B-Instruct
    torchrun --nproc-per-node 8 -- 04_train_sft.py --run runs/demo --student ...   # FSDP2

To change the loss: `sft_loss`, and `answer_weights` for a weight by task. The order of questions,
a curriculum: `batches`. Where the LoRA goes: `choose_trained`. The optimiser: `make_optimizers`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from matplotlib.figure import Figure
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GenerationConfig, HfArgumentParser
from transformers import PaddleOCRVLProcessor, PreTrainedTokenizerFast
from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.hf_argparser import HfArg
from transformers.utils import cached_file, logging

from kernels.lora import add_lora, gathered, merge_lora, save_adapter
from kernels.rows import ahead, dummy_row, encode_question, micro_batches, names_of
from kernels.rows import packs, row_logprobs, shard, share
from kernels.student import Student, load_student, open_pictures, read_questions

logging.disable_progress_bar()

# Shapes: N answer tokens of a forward pass.

TINY = "--train full --freeze_vision False --mean answer --tokens 6000 --no_checkpointing "
GO_ON = TINY + "--student base --data 3_qa/sft.jsonl 3_qa/static.jsonl --warmup 0.02 "
RECIPES = {
    "paper": "",
    "tiny": GO_ON + "--lr 1e-3 --muon_lr 4e-3",
    "long": GO_ON + "--lr 5e-4 --muon_lr 2e-3",  # 600 steps and more: less of base/ is forgotten
    "base": TINY + "--data 3_qa/static.jsonl --steps 8000 --save_dtype bfloat16 --out 4_base "
    "--lr 2e-3 --muon_lr 8e-3",
}
# Settings that may differ when a run is resumed: they do not decide the result.
BY_THE_WAY = ("recipe", "run", "tokens", "checkpointing", "save_every")


@dataclass
class Config:
    recipe: Literal[*RECIPES] = HfArg(default="paper", help="of RECIPES; your own flags win")
    run: str = HfArg(default="runs/demo", help="run folder; reads 3_qa/ in it")
    out: str = HfArg(default="4_sft", help="folder written inside the run")
    student: str = HfArg(
        default="tiny",
        help="checkpoint folder (in the run, or any), hub id, or tiny: a Qwen3-VL of 3 million "
        "parameters built here from random weights",
    )
    data: list[str] = HfArg(
        default_factory=lambda: ["3_qa/sft.jsonl"],
        help="question files, in the run or anywhere; each but the first fills 15 %% of every "
        "batch, so that what it taught is not forgotten",
    )
    data_root: str = HfArg(
        default="",
        help="folder that picture paths start from and may not leave; empty: the run, for a file "
        "outside it that file's folder",
    )
    train: Literal["lora", "full"] = HfArg(
        default="lora", help="lora, beside the linear layers of the language model, or full"
    )
    lora_rank: int = HfArg(default=256, help="LoRA rank; alpha is twice it; the paper's")
    freeze_vision: bool = HfArg(default=True, help="keep the vision tower as it is; the paper does")
    share: bool = HfArg(
        default=True, help="encode pictures once for all questions about them (same loss)"
    )
    batch: int = HfArg(default=128, help="questions per step, of all processes; the paper's")
    tokens: int = HfArg(default=16384, help="tokens per forward pass at most; bounds memory")
    steps: int = HfArg(default=0, help="optimiser steps; 0: one epoch, as in the paper")
    lr: float = HfArg(default=1e-5, help="peak learning rate of AdamW; the paper's")
    muon_lr: float = HfArg(
        default=0.0,
        help="peak learning rate of Muon, which then trains the matrices and learns a student "
        "from random weights several times faster; 0: AdamW trains all",
    )
    schedule: Literal["cosine", "constant"] = HfArg(
        default="cosine", help="after the warm-up: half a cosine down to zero, or constant"
    )
    warmup: float = HfArg(default=0.05, help="share of the steps in which the learning rate rises")
    mean: Literal["token", "answer"] = HfArg(
        default="token",
        help="what weighs the same in the loss; with token, yes weighs a tenth of a box",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = HfArg(default="auto", help="of the arithmetic")
    merge: bool = HfArg(default=False, help="with LoRA: write the merged weights besides")
    save_dtype: Literal["auto", "bfloat16", "float32"] = HfArg(
        default="auto", help="of whole weights written; auto: as they are kept here"
    )
    checkpointing: bool = HfArg(default=True, help="recompute activations: less memory, more time")
    seed: int = HfArg(default=0, help="of the order of questions and of new weights")
    val_share: float = HfArg(default=0.01, help="share of the scenes kept for the validation loss")
    save_every: int = HfArg(default=200, help="steps between checkpoints to resume from")


# --- The questions: files -> groups about the same pictures -> batches -> rows ---
SHARE_AT_MOST = 16  # questions about one picture list in one step; the others come in other steps
REHEARSED = 0.15  # of every batch comes from each file but the first


def in_validation(question: dict, share_of_scenes: float) -> bool:
    """By a hash of the scene: the same scenes whatever else is in the file."""
    scene = str(question["scene_id"] if "scene_id" in question else question["written"][0])
    return int(hashlib.sha256(scene.encode()).hexdigest(), 16) % 10_000 < 10_000 * share_of_scenes


def group_by_pictures(questions: list[dict]) -> list[list[dict]]:
    """Questions with the same picture list, SHARE_AT_MOST at a time."""
    groups = {}
    for question in questions:
        groups.setdefault(tuple(question["images"]), []).append(question)
    parts = []
    for group in groups.values():
        parts += [group[i : i + SHARE_AT_MOST] for i in range(0, len(group), SHARE_AT_MOST)]
    return parts


def batches(groups: list[list[dict]], size: float, seed: int):
    """Endless lists of groups with `size` questions; each epoch has an order of its own."""
    batch, count = [], 0
    for epoch in itertools.count():
        for i in np.random.default_rng([seed, epoch]).permutation(len(groups)):
            batch.append(groups[i])
            count += len(groups[i])
            if count >= size:
                yield batch
                batch, count = [], count - size  # what is too many the next has less


def mixed_batches(files: list[list[list[dict]]], cfg: Config):
    """Batches of the first file's groups, with REHEARSED of each other file in every batch."""
    shares = [1 - REHEARSED * (len(files) - 1)] + [REHEARSED] * (len(files) - 1)
    plans = [
        batches(groups, cfg.batch * part, cfg.seed + k)
        for k, (groups, part) in enumerate(zip(files, shares, strict=True))
    ]
    for parts in zip(*plans, strict=True):
        yield sum(parts, [])


def rows_of(student: Student, group: list[dict], cfg: Config) -> list[dict]:
    """Rows of packed questions, with the `weight` [N] of their answer tokens in the loss.

    A picture that does not open costs its group, by name.
    """
    try:
        pixels, grids = open_pictures(student, group[0]["images"])
    except (OSError, ValueError) as error:
        print(f"{len(group)} questions skipped: {error}", file=sys.stderr)
        return []
    encoded, rows = [], []
    for question in group:
        try:
            encoded.append(encode_question(student, question, grids))
        except ValueError as error:
            print(f"{question['name']}: skipped, {error}", file=sys.stderr)
    parts = [encoded] if encoded else []
    if not cfg.share:  # the same loss, at several times the cost
        parts = [[question] for question in encoded]
    for part in parts:
        rows += share(part, pixels, grids, student.model.config, cfg.tokens)
    return [row | {"weight": answer_weights(row["owner"], cfg.mean)} for row in rows]


def answer_weights(owner: torch.Tensor, mean: str) -> torch.Tensor:
    """Weight [N] of each answer token, whose question is owner [N]: 1, or 1 / tokens in its answer.

    >>> answer_weights(torch.tensor([0, 0, 1]), "answer").tolist()
    [0.5, 0.5, 1.0]
    """
    return 1 / torch.bincount(owner)[owner] if mean == "answer" else torch.ones(len(owner))


# --- The loss ---
def sft_loss(logprob: torch.Tensor, weight: torch.Tensor, total: float) -> torch.Tensor:
    """The equation above: logprob [N] of answer tokens, their weight [N], sum over the batch."""
    return -(logprob * weight).sum() / total


def loss_of(student: Student, parts: list, cfg: Config, total: float, learn: bool):
    """The loss of a batch, pass by pass, with its gradient where it is to `learn`.

    It is that of all processes. Also the names of questions whose log-probability is not finite.
    """
    loss_sum, broken = 0.0, []
    for rows in parts:
        half, pad = cfg.dtype == "bfloat16", student.tokenizer.pad_token_id
        logprob = row_logprobs(student.model, rows, pad, half=half)  # [N]
        weight = torch.cat([row["weight"] for row in rows]).to(logprob)  # [N]
        loss = sft_loss(logprob, weight, total)
        if learn:
            loss.backward()
        loss_sum += float(loss.detach())
        broken += names_of(rows, ~logprob.isfinite())
    loss = torch.tensor(loss_sum, device=student.model.device)
    dist.all_reduce(loss)
    return float(loss), broken


@torch.no_grad()
def validate(student: Student, parts: list, cfg: Config) -> float:
    """The loss on the validation questions of all processes."""
    student.model.eval()
    loss, _ = loss_of(student, parts, cfg, 1, learn=False)
    weight = count(student.model, [row for rows in parts for row in rows])["weight"]
    return float(torch.tensor(loss) / torch.tensor(weight))


# --- The training ---
VALIDATE_EVERY = 200  # steps
SHOWN = "loss lr grad_norm questions_s tokens_s mfu val_loss peak_gb"
# Dense bfloat16 FLOP/s of a card, its maker's figure.
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}


def open_folder(cfg: Config, folder: Path, data: Path, root: Path) -> dict:
    """Begin the stage's folder, and build the tiny student where it is asked for."""
    config = {name: value for name, value in asdict(cfg).items() if name not in BY_THE_WAY}
    parent = data.parent if read_meta(data.parent) else None  # a file from elsewhere has no meta
    meta = begin(folder, config, parent)
    if cfg.student == "tiny" and not (folder / "tiny").is_dir():
        texts = []
        for path in sorted(data.parent.glob("*.jsonl")):
            if path.stem != "heldout":
                for question in read_questions(path, root):
                    texts += [message["content"] for message in question["messages"]]
        shutil.rmtree(folder / "tiny.part", ignore_errors=True)
        build_tiny(folder / "tiny.part", texts, cfg.seed)
        os.replace(folder / "tiny.part", folder / "tiny")
    return meta


def read_files(cfg: Config, root: Path) -> tuple[list[list[list[dict]]], list[dict]]:
    """Per file of --data its groups to learn from; the validation questions of the first."""
    files, validation = [], []
    for name in cfg.data:
        aside, kept = [], []
        for question in read_questions(Path(cfg.run) / name, root):
            (aside if in_validation(question, cfg.val_share) else kept).append(question)
        if not kept:
            stop(f"{Path(cfg.run) / name} holds no usable question")
        validation = validation if files else aside
        files.append(group_by_pictures(kept))
    return files, validation


def model_flops(model: torch.nn.Module, rows: list[dict]) -> float:
    """2 per weight and token forward, 2 for the input's gradient, 2 more where the weight trains.

    Recomputed activations and the products of attention are not counted.
    """
    tokens, answers, patches = (
        sum(len(row[name]) for row in rows) for name in ("ids", "target", "pixels")
    )
    tower_trains = any(p.requires_grad for p in model.model.visual.parameters())
    total = 0
    for name, p in model.named_parameters():
        if p.ndim > 1 and "embed_tokens" not in name:
            visual = "visual" in name
            number = patches if visual else answers if "lm_head" in name else tokens
            backward = tower_trains or not visual
            total += number * p.numel() * (2 + 2 * backward + 2 * p.requires_grad)
    return total


def count(model: torch.nn.Module, rows: list[dict]) -> dict:
    """What a batch holds, of all processes: weight of its answer tokens, their number, ..."""
    own = {
        "weight": sum(float(row["weight"].sum()) for row in rows),
        "questions": sum(len(row["questions"]) for row in rows),
        "answers": sum(len(row["target"]) for row in rows),
        "tokens": sum(len(row["ids"]) for row in rows),
        "flops": model_flops(model, rows),
    }
    sums = torch.tensor([*own.values()], dtype=torch.float64, device=model.device)
    dist.all_reduce(sums)
    return dict(zip(own, sums.tolist(), strict=True))


def speed(counts: dict, seconds: float, device: str) -> dict:
    """questions/s, tokens/s, TFLOP/s and, on a card whose peak is known, the share of it (MFU)."""
    flops_s = counts["flops"] / seconds
    found = {f"{name}_s": round(counts[name] / seconds, 1) for name in ("questions", "tokens")}
    found["tflops"] = round(flops_s / 1e12, 3)
    for card, peak in PEAKS.items() if device != "cpu" else ():
        if card in torch.cuda.get_device_name():
            found["mfu"] = round(flops_s / peak / dist.get_world_size(), 4)
    return found


def fingerprint(folder: Path) -> dict:
    """The command, and hashes of what it made."""
    sums = {}
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "metrics.jsonl"):
        if (folder / name).is_file():  # the weights of a large student lie in several files
            sums[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return {"command": shlex.join(sys.argv), "sha256": sums}


def main(cfg: Config):
    started, run = time.perf_counter(), Path(cfg.run)
    folder, data = run / cfg.out, run / cfg.data[0]
    cfg, dtype, rank, world, device = start_processes(cfg, folder)
    root = Path(cfg.data_root or (run if run in data.parents else data.parent))
    meta = open_folder(cfg, folder, data, root) if rank == 0 else {}
    dist.barrier()

    source = folder / "tiny" if cfg.student == "tiny" else run / cfg.student
    source = str(source) if source.is_dir() else cfg.student
    place = device
    if world > 1:  # the first reads the weights for all
        place = "meta" if rank else "cpu"
    student = load_student(source, dtype, place, ATTENTION, MAX_PIXELS)
    model, make = student.model, partial(rows_of, student, cfg=cfg)
    choose_trained(model, cfg, cfg.lora_rank)
    shard(model, device, cfg.dtype)
    optimizers = make_optimizers(model, cfg)
    dtype = dtype if cfg.save_dtype == "auto" else getattr(torch, cfg.save_dtype)

    files, validation = read_files(cfg, root)
    asked = sum(map(len, files[0]))
    steps = cfg.steps or math.ceil(asked / (cfg.batch * (1 - REHEARSED * (len(files) - 1))))
    dummy = dummy_row(student)
    aside = sum(map(make, group_by_pictures(validation)[rank::world]), [])
    aside = micro_batches(aside, cfg.tokens, not packs(model), dummy)
    if rank == 0:
        print(f"{device} x {world}, {cfg.dtype}: {steps:,} steps, {asked:,} questions", flush=True)
    first = load_checkpoint(folder, model, optimizers, rank)

    norms = []
    plan = itertools.islice(mixed_batches(files, cfg), first, steps)
    plan = (groups[rank::world] for groups in plan)
    for step, made in enumerate(ahead(make, plan, device), first):
        tick, rows = time.perf_counter(), sum(made, [])
        counts = count(model, rows)
        model.train()
        parts = micro_batches(rows, cfg.tokens, not packs(model), dummy)
        loss, broken = loss_of(student, parts, cfg, max(1, counts["weight"]), learn=True)
        clip_gradients(model, folder, step + 1, loss, norms, rows, broken)
        if step > first and step % cfg.save_every == 0:  # these weights have just proved sound
            save_checkpoint(folder, step, student, optimizers, dtype, rank)
        factor = take_step(optimizers, cfg.schedule, cfg.warmup * steps, step, steps)

        seconds = time.perf_counter() - tick
        line = {"step": step + 1, "loss": loss, "lr": cfg.lr * factor, "grad_norm": norms[-1]}
        line |= {name: int(counts[name]) for name in ("questions", "answers", "tokens")}
        line |= {"seconds": round(seconds, 3)} | speed(counts, seconds, device)
        if validation and (step + 1 == steps or (step + 1) % VALIDATE_EVERY == 0):
            line["val_loss"] = validate(student, aside, cfg)
        if rank == 0:
            log_step(folder, line, SHOWN, steps)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    save_student(student, folder, dtype, rank, cfg.merge)
    if rank == 0:
        draw_curves(folder, SHOWN)
        drop_checkpoints(folder)
        made = {"steps": steps, "questions": asked + len(validation), "parameters trained": trained}
        if (folder / "adapter").is_dir():
            meta["base"] = student.source
        finish(folder, meta | fingerprint(folder), made, started)
        print(f"next: python 05_train_refine.py --run {cfg.run}")
    dist.destroy_process_group()


# --- The tiny student ---
# Every token costs the tiny student time: pictures, question, <|im_start|>, answer, <|im_end|>.
TINY_CHAT = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endfor %}{{ '<|im_start|>' if add_generation_prompt }}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]


def tiny_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word and number of `texts` is one token.

    So is a coordinate with its bracket or comma, and the sentence that states the answer's form,
    which would be half of a question's tokens. Numbers on the grids of the questions (coordinates
    in tens, metres in tenths, degrees in tens) are always there.
    """
    numbers = [f"{mark}{v}" for mark in ("[", " [", ", ") for v in range(0, 1001, 10)]
    numbers += [f" {v}" for v in range(0, 360, 10)] + [f" {v / 10:g}" for v in range(1, 101)]
    numbers += [f"{v / 10:g}" for v in range(1, 101)] + [f"{v}" for v in range(0, 360, 10)]
    pieces = r" Answer[^\n]+$| ?\[\d+|, ?\d+| ?\d+(?:\.\d+)?| ?[A-Za-z]+|\s|[^\sA-Za-z\d]"
    split = pre_tokenizers.Split(Regex(pieces), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        min_frequency=1,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *numbers], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>"},
    )


def order_numbers(embedding: torch.Tensor, tokenizer, generator: torch.Generator):
    """Start number tokens on smooth curves, in place: a value half learned is then nearly right.

    Every dimension is a cosine of the value with a random frequency (up to 2 periods over the
    range) and phase; coordinates, degrees and metres have curves of their own.
    """
    width, std = embedding.shape[1], embedding.std()
    curves = {}
    for scale in (1000, 360, 10):
        frequency = torch.rand(width, generator=generator) * 4 * math.pi
        curves[scale] = frequency, torch.rand(width, generator=generator) * 2 * math.pi
    for token, i in tokenizer.get_vocab().items():
        text = tokenizer.convert_tokens_to_string([token])
        match = re.fullmatch(r"( ?\[|, ?)?( ?\d+(?:\.\d+)?)", text)
        if match:
            value = float(match[2])
            degrees = value >= 10 and "." not in text
            scale = 1000 if match[1] else 360 if degrees else 10
            frequency, phase = curves[scale]
            embedding[i] = std * 2**0.5 * torch.cos(frequency * value / scale + phase)


def build_tiny(folder: Path, texts: list[str], seed: int):
    """Write an untrained Qwen3-VL with tokenizer and processor as an ordinary checkpoint folder."""
    tokenizer = tiny_tokenizer(texts)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    rope |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    text |= {"max_position_embeddings": 4096, "rope_parameters": rope, "tie_word_embeddings": True}
    text |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text |= {"eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 128, "intermediate_size": 384, "depth": 6, "num_heads": 4}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 1}
    vision |= {"num_position_embeddings": 36, "out_hidden_size": 128}
    vision |= {"deepstack_visual_indexes": [2]}
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        order_numbers(model.get_input_embeddings().weight, tokenizer, generator)
    model.save_pretrained(folder)
    # One picture processor and one tokenizer: Qwen3VLProcessor would ask for torchvision.
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=14, temporal_patch_size=1, merge_size=2, min_pixels=28 * 28, max_pixels=84 * 84
    )
    processor = PaddleOCRVLProcessor(image_processor, tokenizer, chat_template=TINY_CHAT)
    processor.save_pretrained(folder)


# --- Muon ---
class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is replaced by the nearest orthogonal one (Jordan et al. 2024).

        p <- p (1 - lr wd) - lr max(1, rows / columns)^0.5 NS(momentum)

    with Nesterov momentum and NS five Newton-Schulz iterations. torch.optim.Muon iterates in
    bfloat16, which takes seconds on a CPU without bfloat16 units; this one keeps the gradient's
    dtype and treats matrices of one shape together.
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(buffer, group["momentum"])
                    shapes.setdefault(p.shape, []).append((p, update))
            for pairs in shapes.values():
                stack = torch.stack([gathered(update).flatten(1) for _, update in pairs])
                for (p, _), update in zip(pairs, self.orthogonal(stack), strict=True):
                    update = update.reshape(p.shape)
                    if isinstance(p, DTensor):  # this process's part of it
                        mesh = p.device_mesh
                        update = distribute_tensor(update, mesh, p.placements, src_data_rank=None)
                    scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * scale)

    @staticmethod
    def orthogonal(x: torch.Tensor) -> torch.Tensor:
        """Matrices [n, rows, columns] with their singular values brought near 1."""
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):  # x <- 3.44 x + (2.03 a a - 4.78 a) x
            a = x @ x.mT
            b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
            x = torch.baddbmm(x, b, x, beta=3.4445)
        return x.mT if tall else x


def make_optimizers(model: torch.nn.Module, cfg: Config) -> list[torch.optim.Optimizer]:
    """AdamW over what trains; with Muon, the layers' matrices are Muon's."""
    muon, others = [], []
    for name, p in model.named_parameters():
        in_layer = p.ndim == 2 and not re.search("embed|lm_head", name)
        (muon if cfg.muon_lr and in_layer and p.requires_grad else others).append(p)
    optimizers = [make_adamw(others, cfg.lr)]
    if muon:
        optimizers.append(Muon(muon, cfg.muon_lr, WEIGHT_DECAY))
    return optimizers


# --- same in 01, 02, 03, 04, 05, 06: settings, files and faults ---
class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines and appends every default."""


def run(main, config_class):
    """Call main with the settings of the command line: the flags of --recipe, then your own."""
    parser = HfArgumentParser(config_class, description=__doc__, formatter_class=Help)
    flags = [*RECIPES[parser.parse_args().recipe].split(), *sys.argv[1:]]
    cfg = config_class(**vars(parser.parse_args(flags)))
    try:
        main(cfg)
    except (OSError, SafetensorError) as error:  # what the disk refuses
        stop(f"{error}; what is finished stays in {cfg.run}: mend this, then run the command again")


def stop(why: str):
    """End the run for bad input after which nothing sensible can follow: one line, status 2."""
    print(f"{Path(__file__).name}: {why}", file=sys.stderr)
    raise SystemExit(2)


def save(path: Path, content: str | bytes):
    """Write under a temporary name, then rename: no reader ever meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")  # a fixed name: the next try overwrites it
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


def read_lines(path: Path, *keys: str):
    """Yield (line number, record) of a JSONL file; lines without `keys` are named and skipped."""
    if not path.is_file():
        stop(f"{path} is missing: run the stage that writes it, or name another file")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not record.keys() >= set(keys):
                raise ValueError(f"not a JSON object with {', '.join(keys)}")
        except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets in ...
            print(f"{path}:{number}: skipped, {error}", file=sys.stderr)
        else:
            yield number, record


def read_meta(folder: Path) -> dict:
    """The meta.json of a stage's folder; empty where there is none."""
    path = folder / "meta.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def begin(folder: Path, config: dict, parent: Path | None = None, part: str = "") -> dict:
    """Open a stage's folder and return its meta record; exit where it is finished or in use.

    config: the settings that decide the result; a folder begun with others is refused.
    parent: the folder that this stage reads. part: the share of one of several writers.
    """
    inherited = read_meta(parent) if parent else None
    if parent and not inherited.get("finished"):
        stop(f"{parent} is missing or unfinished: run the stage that writes it to its end first")
    if not read_meta(folder).get("finished"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / f".lock{part}", os.O_RDWR | os.O_CREAT)  # open until the end
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stop(f"{folder} is being written by another process: wait, or choose another --run")
    old = read_meta(folder)  # behind the lock: another process may have finished it meanwhile
    if old and any(path.name not in ("meta.json", f".lock{part}") for path in folder.iterdir()):
        changed = [] if old["parent"] == inherited else ["the folder it reads was made anew"]
        for key in sorted({*config, *old["config"]}):
            was, now = old["config"].get(key), config.get(key)
            if was != now:
                changed.append(f"{key} was {was!r}, now {now!r}")
        if changed:
            stop(f"{folder} was begun with other settings ({'; '.join(changed)}): name another")
    if old.get("finished"):
        print(f"{folder} is finished: nothing to do")
        raise SystemExit(0)
    meta = {"stage": Path(__file__).stem, "finished": False, "config": config, "parent": inherited}
    save(folder / "meta.json", json.dumps(meta, indent=1))
    return meta


def finish(folder: Path, meta: dict, counts: dict, started: float):
    """Complete meta.json, the mark of a whole folder, with counts, seconds and versions."""
    seconds = round(time.perf_counter() - started, 1)
    meta = meta | {"finished": True, "counts": counts, "seconds": seconds}
    meta["versions"] = {name: version(name) for name in ("torch", "transformers", "numpy")}
    for lock in folder.glob(".lock*"):  # first, so that a kill here leaves none for ever
        lock.unlink()
    save(folder / "meta.json", json.dumps(meta, indent=1))
    print(f"\n{folder}: {seconds} s; {', '.join(f'{n:,} {name}' for name, n in counts.items())}")


# --- end: settings, files and faults ---
# --- same in 04, 05: training state ---
ATTENTION = "world2vlm"  # kernels/; or sdpa, eager of transformers: the same, with padding
MAX_PIXELS = 1_003_520  # of a picture at most, larger ones are scaled down; the paper's
LORA_SCALE = 2  # alpha / rank; the paper's 512 / 256
WEIGHT_DECAY = 0.1  # of matrices; the paper's
MAX_NORM = 1.0  # a longer gradient is scaled down to it
PROCESSOR_FILES = """
    tokenizer.json tokenizer_config.json vocab.json merges.txt added_tokens.json
    special_tokens_map.json chat_template.jinja chat_template.json
    preprocessor_config.json processor_config.json video_preprocessor_config.json
    generation_config.json
"""


def start_processes(cfg, folder: Path) -> tuple:
    """(settings, dtype of the weights, rank, number of processes, device); torchrun: several."""
    device, half = "cpu", False
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        half = torch.cuda.is_bf16_supported()
    if cfg.dtype == "auto":
        cfg = replace(cfg, dtype="bfloat16" if half else "float32")
    dtype = getattr(torch, cfg.dtype) if cfg.train == "lora" else torch.float32
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**alone)
    dist.barrier()  # none ends, as one with a finished folder does, before all are there
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank and read_meta(folder).get("finished"):
        raise SystemExit(0)  # the first process says so
    return cfg, dtype, rank, world, device


def gather(own: list) -> list:
    """The lists of all processes, joined."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, own)
    return sum(lists, [])


def choose_trained(model: torch.nn.Module, cfg, rank: int):
    """In place: train what --train and --freeze_vision say; `rank` of a LoRA that is new."""
    torch.manual_seed(cfg.seed)
    tower = model.model.visual
    if cfg.train == "lora":
        add_lora(model, rank, LORA_SCALE * rank)
    else:
        merge_lora(model)
    if cfg.freeze_vision:
        tower.requires_grad_(False)
        tower.forward = torch.no_grad()(tower.forward)  # hooks of checkpointing ask for gradients
    else:
        tower.requires_grad_(True).float()  # a step of 1e-6 is lost in bfloat16's three digits
        tower.in_adapter = True
    if cfg.checkpointing:  # its new name first: transformers before 5.23 has the old one only
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def make_adamw(params, lr: float) -> torch.optim.AdamW:
    """Of those that are trained; only matrices decay."""
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": WEIGHT_DECAY}]
    for p in params:
        if p.requires_grad:
            groups[p.ndim > 1]["params"].append(p)
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95))


def save_student(student: Student, folder: Path, dtype: torch.dtype, rank: int, merge: bool):
    """The LoRA in adapter/; weights where there is none, or to `merge` it; the processor."""
    model, weights = student.model, {}
    has_lora = save_adapter(model, folder / "adapter", student.source, writes=rank == 0)
    moved = merge_lora(model) if merge else 0.0
    for name, tensor in model.state_dict().items() if merge or not has_lora else ():
        tensor = gathered(tensor)
        if rank == 0:
            weights[name] = tensor.to(dtype).cpu()
    if rank == 0:
        for left in folder.glob(".tmp*"):  # what a killed process was writing
            left.unlink()
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        if weights:
            model.save_pretrained(folder, state_dict=weights)
        if merge:
            print(f"merged: {moved:.1%} of the adapted weights moved; adapter/ lost nothing")
        for name in PROCESSOR_FILES.split():
            file = cached_file(student.source, name, _raise_exceptions_for_missing_entries=False)
            if file:
                shutil.copyfile(file, folder / name)


def training_state(model: torch.nn.Module, optimizers: list) -> dict:
    """All tensors that the next step depends on, by names that no sharding changes."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {"model": trained, "optimizer": get_optimizer_state_dict(model, optimizers)["state"]}


def save_checkpoint(folder: Path, step: int, student: Student, optimizers: list, dtype, rank: int):
    """Write step_N: the student and, in state/, what resuming needs; older ones are deleted."""
    done = folder / f"step_{step:06}"
    part = done.with_suffix(".part")
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        (part / "state").mkdir(parents=True)
    save_student(student, part, dtype, rank, merge=False)
    writer = HuggingFaceStorageWriter(str(part / "state"), save_distributed=True)
    dcp.save(training_state(student.model, optimizers), storage_writer=writer)
    if rank == 0:
        os.replace(part, done)
        drop_checkpoints(folder, but=done)


def drop_checkpoints(folder: Path, but: Path | None = None):
    """Delete the steps' checkpoints, under another name first: none is ever half there."""
    for old in {*folder.glob("step_*")} - {but}:
        shutil.rmtree(old.replace(old.with_suffix(".part")))


def load_checkpoint(folder: Path, model: torch.nn.Module, optimizers: list, rank: int) -> int:
    """Resume from step_N, by however many processes it was written; N, or 0 without one."""
    saved = max(folder.glob("step_??????"), default=None)
    step = int(saved.name.removeprefix("step_")) if saved else 0
    if saved:
        reader = HuggingFaceStorageReader(str(saved / "state"))
        dcp.load(training_state(model, optimizers), storage_reader=reader)  # into these tensors
        print(f"resumed after step {step}")
    if rank == 0:
        for log in folder.glob("*.jsonl"):  # what was logged after it goes
            kept = [line for _, line in read_lines(log, "step") if line["step"] <= step]
            save(log, "".join(json.dumps(line) + "\n" for line in kept))
    return step


def clip_gradients(model, folder: Path, step: int, loss: float, norms: list, rows, broken: list):
    """Scale the gradients to a norm of at most MAX_NORM, and append the norm before to `norms`.

    Ends the run before the weights are spoiled: where loss or norm are not finite, or the norm is
    100 times the usual one. broken: the questions whose own log-probability is not finite.
    """
    norm = float(gathered(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
    usual = math.inf
    if len(norms) > 9:  # the first steps may be wild
        usual = max(MAX_NORM, float(np.median(norms[-100:])))
    norms.append(norm)
    if math.isfinite(loss + norm) and norm <= 100 * usual:
        return
    why = f"step {step}: the loss is {loss:.4g}, the gradient {norm:.3g}, usually {usual:.3g}"
    names = broken or [question["name"] for row in rows for question in row["questions"]]
    told = {"step": step, "why": why, "questions": gather(names)}
    save(folder / "diverged.json", json.dumps(told, indent=1))
    saved = max(folder.glob("step_??????"), default="none yet")
    stop(f"{why}; its questions: {folder}/diverged.json; last checkpoint: {saved}; lower --lr")


def take_step(optimizers: list, schedule: str, warmup: float, step: int, steps: int) -> float:
    """One step at the learning rates of the schedule; returns their share of the peak."""
    share = min(1.0, (step + 1) / (warmup + 1))
    if schedule == "cosine":  # half a period, down to zero
        angle = math.pi * max(0, step - warmup) / max(1, steps - warmup)
        share *= 0.5 * (1 + math.cos(angle))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * share
        optimizer.step()
        optimizer.zero_grad()
    return share


def log_step(folder: Path, line: dict, shown: str, steps: int):
    """One line of metrics.jsonl, with the peak memory so far; the metrics `shown` are printed."""
    step = line["step"]
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() or host
    line["peak_gb"] = round(peak / 1e9, 2)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    words = []
    for name in shown.split():
        if name in line:
            words.append(f"{name} {line[name]:<9.4g}")
    eta_min = line["seconds"] * (steps - step) / 60
    print(f"step {step:>5}/{steps} ", *words, f"ETA {eta_min:.1f} min", flush=True)


def draw_curves(folder: Path, shown: str):
    """metrics.jsonl -> curves.png, one panel per metric."""
    lines = [line for _, line in read_lines(folder / "metrics.jsonl", "step")]
    figure = Figure(figsize=(14, 6), layout="constrained")
    for k, name in enumerate(shown.split(), 1):
        values = np.array([line.get(name) for line in lines], float)  # NaN: not measured
        figure.add_subplot(2, 4, k, title=name).plot(values, ".-", markersize=3)
    figure.savefig(folder / "curves.png")


# --- end: training state ---

if __name__ == "__main__":
    run(main, Config)
