"""Stage 4: post-train the student on questions whose answers the world model taught (SFT).

A question brings two pictures and a few words, and six or more questions ask about the same pictures. So the pictures are encoded
once: a row is  prefix | question 1 answer 1 | question 2 answer 2 | ...,  every token keeps the position id that it has when its
question stands alone, and an attention mask lets it see the prefix and its own question only. The loss,

    L = - sum over answer tokens of log p(token | pictures, question, answer so far) / number of answer tokens in the batch,

and its gradients are those of the unshared batch, at a fraction of the work (--no_share shows it).

Departs from the paper: shared prefixes; a tiny student (--student tiny) that trains from random weights on a CPU, with Muon.

Reads   3_qa/sft.jsonl (or any ms-swift / LLaMA-Factory / World2VLM file with `messages` and `images`)
        {"task_type": "A2", "messages": [{"role": "user", "content": "<image><image>..."}, {"role": "assistant", "content":
        "turn left 40 degrees"}], "images": ["2_views/room_00001/t000/000.png", ...], ...}
Writes  4_sft/: config.json, model.safetensors, tokenizer and processor files (an ordinary Hugging Face checkpoint, LoRA merged),
        adapter/ (PEFT format, with --train lora), metrics.jsonl, meta.json
        {"step": 120, "loss": 1.03, "lr": 0.00098, "grad_norm": 0.71, "questions": 131, "tokens": 5120, "seconds": 0.84}

metrics: loss = mean -log p of an answer token; lr = AdamW's; grad_norm = before clipping; tokens = answer tokens;
         val_loss = the same loss on training scenes kept aside.

Run     python 04_train_sft.py --run runs/demo --student Qwen/Qwen2.5-VL-7B-Instruct        (the paper's settings are the defaults)
        torchrun --nproc-per-node 8 -- 04_train_sft.py --run runs/demo --student ...           (the same loss on eight processes)
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, HfArgumentParser,
                          PaddleOCRVLProcessor, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration)
from transformers.utils import cached_file, logging

from kernels import register, windows_in_one_launch

logging.disable_progress_bar()
BY_THE_WAY = ("run", "micro_tokens", "save_every", "log_every")  # settings that do not change the result

# --- same in 01, 02, 03, 04, 05, 06: settings, files and faults ---
def setting(default, help: str):
    """A Config field whose unit and reason `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines and appends every default."""


def parse(config_class):
    """Command line -> config_class. argparse itself answers a wrong flag with one line and exit status 2."""
    return config_class(**vars(HfArgumentParser(config_class, description=__doc__, formatter_class=Help).parse_args()))


def stop(why: str):
    """Bad input after which nothing sensible can follow: one line on stderr, exit status 2."""
    print(f"{Path(__file__).name}: {why}", file=sys.stderr)
    raise SystemExit(2)


def save(path: Path, content: str | bytes):
    """Write under a temporary name, then rename: no reader ever meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")  # one fixed name: the rerun after a kill overwrites it and leaves no litter
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


def read_jsonl(path: Path, *keys: str) -> list[dict]:
    """The records of a JSONL file that hold all `keys`; every other line is named on stderr, with the reason, and skipped."""
    if not path.is_file():
        stop(f"{path} is missing: run the stage that writes it, or name another file")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or (missing := [key for key in keys if key not in record]):
                raise ValueError("not a JSON object" if not isinstance(record, dict) else f"no {', '.join(missing)}")
            records.append(record)
        except ValueError as error:  # malformed JSON and bad UTF-8 are ValueErrors too
            print(f"{path}:{number}: skipped, {error}", file=sys.stderr)
    return records


def begin(folder: Path, config: dict, parent: Path | None = None) -> dict:
    """Open a stage's folder and return its meta record; a finished folder ends the run, other settings than it was begun with are refused.

    `config` holds the settings that decide the result (not --run, --shard, --workers); `parent` is the folder this stage reads.
    """
    inherited = None
    if parent is not None:
        if not (parent / "meta.json").is_file() or not (inherited := json.loads((parent / "meta.json").read_text())).get("finished"):
            stop(f"{parent} is missing or unfinished: run the stage that writes it to its end first")
        print(f"reads {parent}: " + ", ".join(f"{value} {key}" for key, value in inherited["counts"].items()))
    path = folder / "meta.json"
    meta = {"stage": Path(__file__).stem, "finished": False, "config": config, "parent": inherited}
    if path.is_file():
        old = json.loads(path.read_text())
        changed = [f"{key} was {old['config'].get(key)!r}, now {config.get(key)!r}"
                   for key in sorted({*config, *old["config"]}) if old["config"].get(key) != config.get(key)]
        if old["parent"] != inherited:
            changed.append("the folder it reads was made anew")
        if changed:
            stop(f"{folder} was begun with other settings ({'; '.join(changed)}): choose another --run, or delete the folder")
        if old["finished"]:
            print(f"{folder} is finished: nothing to do")
            raise SystemExit(0)
    save(path, json.dumps(meta, indent=1))
    return meta


def finish(folder: Path, meta: dict, counts: dict, started: float):
    """Complete meta.json, the mark of a whole folder: `counts` (what the next stage prints), seconds, versions."""
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")} | {"python": sys.version.split()[0]}
    meta = meta | {"finished": True, "counts": counts, "seconds": round(time.time() - started, 1), "versions": versions}
    save(folder / "meta.json", json.dumps(meta, indent=1))
    peak_gb = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    print(f"\n{folder}: {meta['seconds']} s, peak memory of the largest process {peak_gb:.2f} GB")
# --- end of the common block ---


# Shapes: B rows, T tokens of a row, N answer tokens of a batch, P patches of all pictures, V vocabulary.


@dataclass
class Config:
    run: str = setting("runs/demo", "run folder; reads 3_qa/ in it")
    out: str = setting("4_sft", "folder written inside the run: another name for another stage of training, e.g. 4_base")
    student: str = setting("tiny", "checkpoint folder, hub id, or tiny: a Qwen3-VL of 3 million parameters built here from random weights")
    data: str = setting("3_qa/sft.jsonl", "questions: a file in the run, or any ms-swift / LLaMA-Factory / World2VLM JSONL file")
    data_root: str = setting("", "folder that picture paths start from and may not leave; default: the run, for a file outside it that file's folder")
    rehearse: str = setting("", "second question file mixed in, so that what it taught is not forgotten (the demo rehearses the static questions)")
    rehearse_share: float = setting(0.33, "share of each batch that comes from --rehearse")
    train: str = setting("lora", "lora (rank and alpha below, on the language model's linear layers, as in the paper) or full")
    lora_rank: int = setting(256, "LoRA rank; the paper's")
    lora_alpha: int = setting(512, "LoRA alpha: the update is scaled by alpha / rank; the paper's")
    freeze_vision: bool = setting(True, "keep the vision tower as it is, as in the paper's first stage")
    share: bool = setting(True, "encode the pictures once for all questions about them; --no_share gives every question its own row (same loss)")
    share_at_most: int = setting(16, "questions in one row; bounds the length of a row")
    batch: int = setting(128, "questions in an optimiser step, over all processes; the paper's global batch")
    micro_tokens: int = setting(16384, "tokens in one forward pass, padding included; bounds memory, does not change the result")
    epochs: float = setting(1.0, "passes over --data")
    steps: int = setting(0, "optimiser steps; 0: as --epochs says")
    optimizer: str = setting("adamw", "adamw, or muon: Muon on the matrices, AdamW on the rest; learns a student from random weights several times faster")
    lr: float = setting(1e-5, "peak learning rate of AdamW; the paper's")
    muon_lr: float = setting(3e-3, "peak learning rate of Muon")
    schedule: str = setting("cosine", "cosine (to zero) or constant after the warm-up; constant suits a base that another stage goes on training")
    warmup: float = setting(0.05, "share of the steps in which the learning rate rises from zero")
    weight_decay: float = setting(0.1, "decoupled weight decay on matrices")
    beta1: float = setting(0.9, "AdamW")
    beta2: float = setting(0.95, "AdamW")
    clip: float = setting(1.0, "largest norm of the gradient")
    max_pixels: int = setting(1_003_520, "pixels of a picture at most; larger ones are scaled down")
    dtype: str = setting("auto", "arithmetic: bfloat16, float32, or auto (bfloat16 on a GPU that has it, float32 on a CPU)")
    attention: str = setting("world2vlm", "world2vlm (kernels/; plain torch on a CPU), or one of transformers: sdpa, eager")
    checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, about a third more time")
    val_share: float = setting(0.01, "share of the scenes kept out of training for the validation loss")
    val_every: int = setting(200, "steps between validation losses; 0: never")
    save_every: int = setting(200, "steps between states to resume from")
    log_every: int = setting(10, "steps between printed lines; metrics.jsonl has every step")
    seed: int = setting(0, "seed of the order of questions and of new weights")


# --- same in 04, 05, 06: a student and what it reads ---
@dataclass
class Student:
    model: torch.nn.Module
    tokenizer: object
    image_processor: object
    source: str  # the folder or hub id it came from


def load_student(source: str, dtype: torch.dtype, device: str, attention: str, max_pixels: int) -> Student:
    """Any Qwen-VL checkpoint, by folder or hub id. Weights come from safetensors only; remote code is never run.

    The parts of the processor are loaded one by one because AutoProcessor asks for torchvision, of which only the video part has need.
    """
    register()
    try:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, use_safetensors=True, attn_implementation=attention)
        tokenizer, image_processor = AutoTokenizer.from_pretrained(source), AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: shapes that do not fit the configuration
        stop(f"{source} does not load as an image-text-to-text checkpoint: {str(error).strip().splitlines()[0]}")
    size = image_processor.size
    image_processor.size = {"shortest_edge": min(size["shortest_edge"], max_pixels), "longest_edge": min(size["longest_edge"], max_pixels)}
    if attention == "world2vlm":
        windows_in_one_launch(model)
    return Student(model.to(device), tokenizer, image_processor, source)


def read_questions(path: Path, root: Path) -> list[dict]:
    """Records with `images` resolved inside `root`; what cannot be used is named, with the remedy, and skipped."""
    questions, root, faults = [], root.resolve(), {}  # faults: picture -> what is wrong with it, or ""; a picture is asked about often

    def fault(image: Path) -> str:
        if not image.resolve().is_relative_to(root):
            return f"{image} lies outside the data root {root}: copy it there or set --data_root"
        return "" if image.is_file() else f"{image} is missing"

    for record in read_jsonl(path, "task_type", "messages", "images"):
        try:
            texts = [message["content"] for message in record["messages"]]
            images = [str(root / image) for image in record["images"]]
            if record["messages"][-1]["role"] != "assistant" or len(texts) < 2:
                raise ValueError("messages must be a user's question and the assistant's answer")
            if not images or "".join(texts).count("<image>") != len(images):
                raise ValueError(f"{len(images)} images but {''.join(texts).count('<image>')} <image> marks")
            for image in images:
                if image not in faults:
                    faults[image] = fault(Path(image))
                if faults[image]:
                    raise ValueError(faults[image])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            print(f"{path}: {record['task_type']} question skipped: {error}", file=sys.stderr)
            continue
        questions.append(record | {"images": images})
    return questions


def look(student: Student, paths: list[str], blank: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Picture files -> patches [P, channels x patch] and their grids [pictures, 3] (frames, rows, columns). Blank ones are mean grey."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    if blank:
        pictures = [Image.new("RGB", picture.size, (127, 127, 127)) for picture in pictures]
    seen = student.image_processor(images=pictures, return_tensors="pt")
    return seen["pixel_values"], seen["image_grid_thw"]


def encode(student: Student, record: dict, grids: torch.Tensor) -> dict:
    """One question -> ids [T], of which the first `prompt` are the question and the rest its answer, and Qwen-VL's positions [3, T].

    Raises ValueError when the text itself holds picture tokens, which would shift every picture behind them.
    """
    *turns, answer = record["messages"]
    chat = [{"role": turn["role"], "content": [{"type": "image"} if part == "<image>" else {"type": "text", "text": part}
             for part in re.split("(<image>)", turn["content"]) if part]} for turn in turns]
    prompt = student.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    asked, answered = student.tokenizer([prompt, answer["content"] + student.tokenizer.eos_token], add_special_tokens=False)["input_ids"]
    pad, merge = student.model.config.image_token_id, student.image_processor.merge_size
    if (asked + answered).count(pad) != len(grids):
        raise ValueError("the text holds picture tokens of its own: remove them")
    ids, positions, at, pictures = [], [], 0, iter(grids.tolist())  # a text token is at `at` in all three streams
    for token in asked + answered:
        if token == pad:  # a picture's token is at (0, its row, its column) from `at`; text goes on behind the longer side
            _, rows, columns = (n // merge for n in next(pictures))
            ids += [pad] * rows * columns
            positions += [(at, at + row, at + column) for row in range(rows) for column in range(columns)]
            at += max(rows, columns)
        else:
            ids.append(token)
            positions.append((at, at, at))
            at += 1
    length = len(ids) - len(answered)
    return {"ids": torch.tensor(ids), "prompt": length, "positions": torch.tensor(positions).T}
# --- end: a student and what it reads ---


# --- same in 04, 05: shared prefixes ---
def share(questions: list[dict], pixels: torch.Tensor, grids: torch.Tensor, pad: int) -> list[dict]:
    """Encoded questions about the same pictures -> rows of  prefix | rest of question 1 | rest of question 2 | ...

    The prefix is the longest run of tokens that all prompts begin with. Every token keeps the position id that it has when its question
    stands alone, and sees the prefix and its own question only (`segment`), so each answer token gets the log-probability that it
    would have had alone. Questions whose pictures do not all lie in the common prefix get a row each.
    """
    prefix = min(question["prompt"] for question in questions)
    for question in questions[1:]:
        differs = (question["ids"][:prefix] != questions[0]["ids"][:prefix]).nonzero()
        prefix = int(differs[0]) if len(differs) else prefix
    if (questions[0]["ids"][prefix:] == pad).any():
        return [row for question in questions for row in share([question], pixels, grids, pad)]
    ids, positions, segment = [questions[0]["ids"][:prefix]], [questions[0]["positions"][:, :prefix]], [torch.zeros(prefix, dtype=torch.long)]
    source, target, owner, start = [], [], [], prefix
    for k, question in enumerate(questions):
        rest = len(question["ids"]) - prefix
        ids.append(question["ids"][prefix:])
        positions.append(question["positions"][:, prefix:])
        segment.append(torch.full((rest,), k + 1))
        for i in range(question["prompt"] - prefix, rest):  # answer tokens; one that opens its segment is predicted by the prefix's last token
            source.append(start + i - 1 if i else prefix - 1)
            target.append(start + i)
            owner.append(k)
        start += rest
    return [{"ids": torch.cat(ids), "positions": torch.cat(positions, 1), "segment": torch.cat(segment), "source": torch.tensor(source),
             "target": torch.tensor(target), "owner": torch.tensor(owner), "pixels": pixels, "grids": grids, "questions": len(questions)}]


def collate(rows: list[dict], pad: int) -> tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows -> the model's inputs (right-padded, B x T), and for each of N answer tokens: its row, the position that predicts it, its id."""
    B, T = len(rows), max(len(row["ids"]) for row in rows)
    ids, positions, segment = torch.full((B, T), pad), torch.zeros(3, B, T, dtype=torch.long), torch.full((B, T), -1)
    for b, row in enumerate(rows):
        n = len(row["ids"])
        ids[b, :n], positions[:, b, :n], segment[b, :n] = row["ids"], row["positions"], row["segment"]
    inputs = {"input_ids": ids, "position_ids": positions, "prefix": segment,
              "pixel_values": torch.cat([row["pixels"] for row in rows]), "image_grid_thw": torch.cat([row["grids"] for row in rows])}
    where = torch.cat([torch.full_like(row["source"], b) for b, row in enumerate(rows)])
    source = torch.cat([row["source"] for row in rows])
    return inputs, where, source, torch.cat([row["ids"][row["target"]] for row in rows])


def token_logprobs(student: Student, rows: list[dict]) -> torch.Tensor:
    """log p of every answer token of the rows, in their order: float32 [N]. Logits exist at answer positions only."""
    inputs, where, source, tokens = collate(rows, student.tokenizer.pad_token_id)
    device, dtype = student.model.device, student.model.dtype
    inputs = {name: x.to(device) for name, x in inputs.items()}
    if student.model.config._attn_implementation != "world2vlm":  # others take a matrix: j is in the prefix or in i's question, j <= i
        segment = inputs.pop("prefix")
        visible = ((segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])).tril()
        inputs["attention_mask"] = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, torch.finfo(dtype).min)[:, None]
    hidden = student.model.model(**inputs, use_cache=False).last_hidden_state                        # [B, T, width]
    logits = student.model.lm_head(hidden[where.to(device), source.to(device)]).float()              # [N, V]
    return logits.log_softmax(-1).gather(-1, tokens.to(device)[:, None])[:, 0]


def micro_batches(rows: list[dict], tokens: int) -> list[list[dict]]:
    """Rows of one step, longest first, cut so that rows x longest stays within `tokens` and no row is padded beyond twice its length."""
    parts = []
    for row in sorted(rows, key=lambda row: -len(row["ids"])):
        if parts and (len(parts[-1]) + 1) * len(parts[-1][0]["ids"]) <= tokens and 2 * len(row["ids"]) >= len(parts[-1][0]["ids"]):
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts
# --- end: shared prefixes ---


# --- same in 04, 05: what is trained, and how it is kept ---
class LoRA(torch.nn.Module):
    """y = W x + (alpha / rank) B A x, with W frozen, A random and B zero at the start (Hu et al. 2021)."""

    def __init__(self, base: torch.nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.lora_A = torch.nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        torch.nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x):
        return self.base(x) + (x.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T * self.scale).to(x.dtype)


def add_lora(student: Student, rank: int, alpha: float):
    """Put a LoRA beside every linear layer of the language model, in place; nothing else trains."""
    student.model.requires_grad_(False)
    language = student.model.model.language_model
    for name, layer in list(language.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(language.get_submodule(parent), leaf, LoRA(layer, rank, alpha))


def split_lora(student: Student) -> tuple[dict, dict]:
    """The plain state dict with every LoRA merged into its weight, and the adapter's tensors under the names of the peft package."""
    merged, adapter, modules = {}, {}, dict(student.model.named_modules())
    for name, tensor in student.model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            adapter[f"base_model.model.{owner}.{leaf}.weight"] = tensor.cpu().contiguous()
        elif isinstance(lora := modules.get(owner.removesuffix(".base")), LoRA):
            update = (lora.lora_B.float() @ lora.lora_A.float() * lora.scale) if leaf == "weight" else 0
            merged[name.replace(".base.", ".")] = (tensor.float() + update).to(tensor.dtype)
        else:
            merged[name] = tensor
    return merged, adapter


PROCESSOR_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
                   "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
                   "video_preprocessor_config.json", "generation_config.json"]


def save_student(student: Student, folder: Path, rank: int, alpha: float):
    """An ordinary checkpoint folder: merged weights, the processor's files as they came, and adapter/ where there is a LoRA."""
    part = folder / "checkpoint.part"
    shutil.rmtree(part, ignore_errors=True)
    merged, adapter = split_lora(student)
    student.model.save_pretrained(part, state_dict=merged)
    for name in PROCESSOR_FILES:
        if source := cached_file(student.source, name, _raise_exceptions_for_missing_entries=False):
            shutil.copyfile(source, part / name)
    if adapter:
        (part / "adapter").mkdir()
        save_file(adapter, part / "adapter/adapter_model.safetensors", metadata={"format": "pt"})
        (part / "adapter/adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": student.source, "r": rank, "lora_alpha": alpha,
            "lora_dropout": 0.0, "bias": "none", "target_modules": r".*language_model.*\.(" + "|".join(
                sorted({key.split(".")[-3] for key in adapter})) + ")"}, indent=1))
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    for path in sorted(part.iterdir()):
        os.replace(path, folder / path.name)
    part.rmdir()


def save_state(path: Path, step: int, model: torch.nn.Module, optimizers: list):
    """Everything that the next step depends on, as one safetensors file: trained weights, optimiser slots, the number of steps done."""
    tensors = {f"model.{name}": p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    for k, optimizer in enumerate(optimizers):
        for i, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{k}.{i}.{name}": torch.as_tensor(slot).cpu() for name, slot in slots.items()}
    save_file({name: x.contiguous() for name, x in tensors.items()}, str(path) + ".part", metadata={"step": str(step)})
    os.replace(str(path) + ".part", path)


def load_state(path: Path, model: torch.nn.Module, optimizers: list) -> int:
    """Undo `save_state`; returns the number of steps done (0 where nothing was saved)."""
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as state:
        step, tensors = int(state.metadata()["step"]), {name: state.get_tensor(name) for name in state.keys()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(tensors[f"model.{name}"])
    for k, optimizer in enumerate(optimizers):
        slots = {}
        for name in tensors:
            if name.startswith(f"optimizer.{k}."):
                _, _, i, slot = name.split(".", 3)
                slots.setdefault(int(i), {})[slot] = tensors[name]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    return step


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is replaced by the nearest orthogonal one (Jordan et al. 2024: five Newton-Schulz steps, Nesterov momentum).

    torch.optim.Muon iterates in bfloat16, which takes seconds a step on a CPU without bfloat16 units; this one keeps the gradient's dtype and
    treats matrices of one shape together. Update: p <- p (1 - lr wd) - lr max(1, rows / columns)^0.5 NS(momentum).
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    shapes.setdefault(p.shape, []).append((p, p.grad.lerp(buffer, group["momentum"])))
            for (rows, columns), pairs in shapes.items():
                x = torch.stack([update for _, update in pairs])
                x = x.mT if rows > columns else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)  # 3.44 x + (2.03 a a - 4.78 a) x
                x = x.mT if rows > columns else x
                for (p, _), update in zip(pairs, x):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(model: torch.nn.Module, cfg) -> list:
    """AdamW over what trains, matrices decayed; with muon, the matrices of the layers go to Muon and embeddings, norms and biases stay."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [p for name, p in trained if cfg.optimizer == "muon" and p.ndim == 2 and not re.search("embed|lm_head", name)]
    rest = [(name, p) for name, p in trained if all(p is not q for q in muon)]
    optimizers = [torch.optim.AdamW([{"params": [p for _, p in rest if p.ndim > 1], "weight_decay": cfg.weight_decay},
                                     {"params": [p for _, p in rest if p.ndim < 2], "weight_decay": 0.0}],
                                    lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))]
    if muon:
        optimizers.append(Muon(muon, lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def all_sum(*tensors: torch.Tensor):
    """Add up over all processes, in place; nothing to do when there is one."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def update(model: torch.nn.Module, optimizers: list, clip: float, factor: float) -> float:
    """Sum the gradients over the processes, clip, step at `factor` times the peak learning rates; returns the norm before clipping."""
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    all_sum(*[p.grad for p in params])
    norm = torch.nn.utils.clip_grad_norm_(params, clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad()
    return float(norm)


def start_processes(folder: Path) -> tuple[int, int, str]:
    """(rank, world size, device) of this process; one process unless torchrun started it. Rank 0 alone says that `folder` is finished."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank and (folder / "meta.json").is_file() and json.loads((folder / "meta.json").read_text())["finished"]:
        raise SystemExit(0)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if world > 1:
        dist.init_process_group("nccl" if device != "cpu" else "gloo")
    return rank, world, device


def append(path: Path, record: dict):
    """One more line of a JSONL file."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def keep_lines(path: Path, steps: int):
    """Drop the lines of a JSONL file that belong to steps after the one resumed from, and a half-written last one."""
    lines = path.read_text().splitlines() if path.is_file() else []
    save(path, "".join(line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= steps))
# --- end: what is trained ---


# The tiny student --------------------------------------------------------------------------------------------------------------------

def tiny_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word and number of `texts` is one token; so is a coordinate with its bracket or comma, and so is the
    sentence that states the answer's form, which closes a question and would be half of its tokens.

    Numbers on the grids of the questions (coordinates in steps of ten, metres in tenths, degrees in tens) are always there.
    """
    numbers = [f"{mark}{v}" for mark in ("[", " [", ", ") for v in range(0, 1001, 10)] + [f" {v}" for v in range(0, 360, 10)] \
        + [f" {v / 10:g}" for v in range(1, 101)] + [f"{v / 10:g}" for v in range(1, 101)] + [f"{v}" for v in range(0, 360, 10)]
    pieces = Regex(r" Answer[^\n]+$| ?\[\d+|, ?\d+| ?\d+(?:\.\d+)?| ?[A-Za-z]+|\s|[^\sA-Za-z\d]")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.train_from_iterator([*texts, *numbers], trainers.BpeTrainer(
        vocab_size=8192, min_frequency=1, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   extra_special_tokens={"image_token": "<|image_pad|>"})


def order_numbers(embedding: torch.Tensor, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator):
    """Start number tokens on smooth curves: tokens of near values get near vectors, so that a value half learned is nearly right.

    Every dimension is a cosine of the value with a random frequency (up to 2 periods over the range) and phase, one curve a kind of number.
    """
    width, std = embedding.shape[1], embedding.std()
    curves = {scale: (torch.rand(width, generator=generator) * 4 * math.pi, torch.rand(width, generator=generator) * 2 * math.pi)
              for scale in (1000, 360, 10)}
    for token, i in tokenizer.get_vocab().items():
        text = tokenizer.convert_tokens_to_string([token])
        if match := re.fullmatch(r"( ?\[|, ?)?( ?\d+(?:\.\d+)?)", text):
            value = float(match[2])
            scale = 1000 if match[1] else 360 if value >= 10 and "." not in text else 10  # coordinate, degrees, metres
            frequency, phase = curves[scale]
            embedding[i] = std * 2**0.5 * torch.cos(frequency * value / scale + phase)


def build_tiny(folder: Path, texts: list[str], seed: int):
    """Write an untrained student of Qwen3-VL's architecture, with its tokenizer and processor, as an ordinary checkpoint folder."""
    tokenizer = tiny_tokenizer(texts)
    special = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
                       tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])))
    config = Qwen3VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
                         num_key_value_heads=4, head_dim=32, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
                         eos_token_id=tokenizer.eos_token_id, max_position_embeddings=4096,
                         rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[6, 5, 5], mrope_interleaved=True)),
        vision_config=dict(depth=6, hidden_size=128, intermediate_size=384, num_heads=4, patch_size=14, spatial_merge_size=2,
                           temporal_patch_size=1, out_hidden_size=128, num_position_embeddings=36, deepstack_visual_indexes=[2]),
        tie_word_embeddings=True, **special)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():
        order_numbers(model.get_input_embeddings().weight, tokenizer, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    # A processor of one picture processor and one tokenizer: Qwen3VLProcessor would ask for torchvision, which its video part needs.
    PaddleOCRVLProcessor(
        image_processor=Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=1, merge_size=2, min_pixels=28 * 28, max_pixels=84 * 84),
        tokenizer=tokenizer, chat_template=TINY_CHAT).save_pretrained(folder)


# Every token costs the tiny student time: pictures, question, <|im_start|>, answer, <|im_end|>, and nothing else.
TINY_CHAT = ("{% for message in messages %}{% for part in message.content %}{{ '<|vision_start|><|image_pad|><|vision_end|>' if "
             "part.type == 'image' else part.text }}{% endfor %}{% endfor %}{{ '<|im_start|>' if add_generation_prompt }}")


# Data --------------------------------------------------------------------------------------------------------------------------------

def group_by_pictures(questions: list[dict], at_most: int) -> list[list[dict]]:
    """Questions with the same picture list, in lists of at most `at_most`."""
    groups = {}
    for question in questions:
        groups.setdefault(tuple(question["images"]), []).append(question)
    return [group[i:i + at_most] for group in groups.values() for i in range(0, len(group), at_most)]


def batches(groups: list[list[dict]], size: int, seed: int):
    """Endless lists of groups with about `size` questions; each epoch has its own order, and none depends on how many processes there are."""
    batch, count = [], 0
    for epoch in itertools.count():
        for i in np.random.default_rng([seed, epoch]).permutation(len(groups)):
            batch.append(groups[i])
            count += len(groups[i])
            if count >= size:
                yield batch
                batch, count = [], 0


def rows_of(student: Student, groups: list[list[dict]], shared: bool) -> list[dict]:
    """Look at each group's pictures once, encode its questions, share their prefix. A picture that does not open costs its group, by name."""
    rows = []
    for group in groups:
        try:
            pixels, grids = look(student, group[0]["images"])
            encoded = [encode(student, question, grids) for question in group]
        except (OSError, ValueError) as error:
            print(f"{group[0]['images'][0]}: {len(group)} questions skipped: {error}", file=sys.stderr)
            continue
        pad = student.model.config.image_token_id
        rows += share(encoded, pixels, grids, pad) if shared else [row for one in encoded for row in share([one], pixels, grids, pad)]
    return rows


def ahead(items):
    """The items of an iterator, the next one computed in a thread while this one is used: pictures are read while the last batch trains."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def in_validation(question: dict, share_of_scenes: float) -> bool:
    """By scene, by a hash: the same scenes whatever else is in the file."""
    scene = str(question.get("scene_id", question["images"][0]))
    return int(hashlib.sha256(scene.encode()).hexdigest(), 16) % 10_000 < 10_000 * share_of_scenes


def rate(cfg: Config, step: int, steps: int) -> float:
    """The learning rate at `step` of `steps`, as a share of its peak: linear warm-up, then constant or half a cosine down to zero."""
    warmup = cfg.warmup * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 1.0 if cfg.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def loss_of(student: Student, rows: list[dict], cfg: Config, count: int, backward: bool) -> float:
    """Sum over the rows' answer tokens of -log p, divided by `count`, the number of answer tokens in the whole batch."""
    total = 0.0
    for part in micro_batches(rows, cfg.micro_tokens):
        with torch.autocast(student.model.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            loss = -token_logprobs(student, part).sum() / count
        if backward:
            loss.backward()
        total += float(loss.detach())
    return total


@torch.no_grad()
def validate(student: Student, rows: list[dict], cfg: Config, device: str) -> float:
    """The training loss on the validation questions of all processes."""
    student.model.eval()
    count = torch.tensor(sum(len(row["target"]) for row in rows), device=device)
    total = torch.tensor(loss_of(student, rows, cfg, 1, backward=False), device=device)
    all_sum(count, total)
    return float(total / count)


def main(cfg: Config):
    started, run = time.time(), Path(cfg.run)
    folder, data = run / cfg.out, run / cfg.data
    rank, world, device = start_processes(folder)
    root = Path(cfg.data_root) if cfg.data_root else run if data.resolve().is_relative_to(run.resolve()) else data.parent
    if cfg.dtype == "auto":
        cfg = replace(cfg, dtype="bfloat16" if device != "cpu" and torch.cuda.is_bf16_supported() else "float32")
    meta = None
    if rank == 0:
        config = {name: value for name, value in asdict(cfg).items() if name not in BY_THE_WAY}
        parent = data.parent if (data.parent / "meta.json").is_file() else None  # a file from elsewhere has no history to carry on
        meta = begin(folder, config, parent)
        if cfg.student == "tiny" and not (folder / "tiny").is_dir():
            texts = [message["content"] for path in sorted(data.parent.glob("*.jsonl")) if path.stem != "heldout"
                     for record in read_jsonl(path, "messages") for message in record["messages"]]
            shutil.rmtree(folder / "tiny.part", ignore_errors=True)
            build_tiny(folder / "tiny.part", texts, cfg.seed)
            os.replace(folder / "tiny.part", folder / "tiny")
    if world > 1:
        dist.barrier()

    # the student
    source = str(folder / "tiny") if cfg.student == "tiny" else str(run / cfg.student) if (run / cfg.student).is_dir() else cfg.student
    weights = torch.bfloat16 if cfg.train == "lora" and cfg.dtype == "bfloat16" else torch.float32  # full training keeps float32 weights
    student = load_student(source, weights, device, cfg.attention, cfg.max_pixels)
    torch.manual_seed(cfg.seed)
    if cfg.train == "lora":
        add_lora(student, cfg.lora_rank, cfg.lora_alpha)
    student.model.model.visual.requires_grad_(not cfg.freeze_vision)
    if cfg.checkpointing:
        student.model.gradient_checkpointing_enable()
        student.model.enable_input_require_grads()
    optimizers = make_optimizers(student.model, cfg)

    # the questions
    questions = read_questions(data, root)
    validation = [question for question in questions if in_validation(question, cfg.val_share)]
    groups = group_by_pictures([question for question in questions if not in_validation(question, cfg.val_share)], cfg.share_at_most)
    if not groups:
        stop(f"{data} holds no usable question")
    plan = batches(groups, cfg.batch, cfg.seed)
    if cfg.rehearse:
        old = [question for question in read_questions(run / cfg.rehearse, root) if not in_validation(question, cfg.val_share)]
        rehearsal = batches(group_by_pictures(old, cfg.share_at_most), cfg.batch * cfg.rehearse_share, cfg.seed + 1)
        plan = (new + known for new, known in zip(batches(groups, cfg.batch * (1 - cfg.rehearse_share), cfg.seed), rehearsal))
    in_an_epoch = sum(map(len, groups)) / (cfg.batch * (1 - cfg.rehearse_share * bool(cfg.rehearse)))
    steps = cfg.steps or math.ceil(cfg.epochs * in_an_epoch)
    validation_rows = rows_of(student, group_by_pictures(validation, cfg.share_at_most)[rank::world], cfg.share)
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    first = load_state(folder / "state.safetensors", student.model, optimizers)
    if rank == 0:
        keep_lines(folder / "metrics.jsonl", first)
        print(f"student {source}: {sum(p.numel() for p in student.model.parameters()):,} parameters, {trained:,} trained; {device} x {world}, "
              f"{cfg.dtype}\n{len(questions):,} questions about {len(groups):,} picture lists, {len(validation):,} for validation; "
              f"{steps:,} steps" + (f", resumed after step {first:,}" if first else ""), flush=True)

    clock, answered = time.time(), 0
    rows_of_steps = (rows_of(student, batch[rank::world], cfg.share) for batch in itertools.islice(plan, first, steps))
    for step, rows in enumerate(ahead(rows_of_steps), first):
        tick = time.time()
        count = torch.tensor([sum(len(row["target"]) for row in rows), sum(row["questions"] for row in rows)], device=device)
        all_sum(count)
        tokens, asked = count.tolist()
        student.model.train()
        loss = torch.tensor(loss_of(student, rows, cfg, max(1, tokens), backward=True), device=device)
        all_sum(loss)
        if not math.isfinite(loss):
            stop(f"the loss is {float(loss)} at step {step + 1}: lower the learning rate; {folder}/state.safetensors holds the last good state")
        factor = rate(cfg, step, steps)
        norm = update(student.model, optimizers, cfg.clip, factor)
        line = {"step": step + 1, "loss": float(loss), "lr": cfg.lr * factor, "grad_norm": norm, "questions": asked, "tokens": tokens,
                "seconds": round(time.time() - tick, 3)}
        last = step + 1 == steps
        if validation and (last or cfg.val_every and (step + 1) % cfg.val_every == 0):
            line["val_loss"] = validate(student, validation_rows, cfg, device)
        if rank == 0:
            answered += asked
            append(folder / "metrics.jsonl", line)
            if last or (step + 1) % cfg.log_every == 0 or "val_loss" in line:
                pace = (time.time() - clock) / (step + 1 - first)
                print(f"step {step + 1:>6}/{steps}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  |g| {norm:6.3f}  "
                      f"{answered / (time.time() - clock):6.1f} questions/s  ETA {pace * (steps - step - 1) / 60:5.1f} min"
                      + (f"  validation {line['val_loss']:.4f}" if "val_loss" in line else ""), flush=True)
            if last or (step + 1) % cfg.save_every == 0:
                save_state(folder / "state.safetensors", step + 1, student.model, optimizers)

    if rank == 0:
        save_student(student, folder, cfg.lora_rank, cfg.lora_alpha)
        finish(folder, meta, {"steps": steps, "questions": len(questions), "parameters trained": trained}, started)
        (folder / "state.safetensors").unlink(missing_ok=True)
        print(f"next: python 05_train_refine.py --run {cfg.run}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse(Config))
