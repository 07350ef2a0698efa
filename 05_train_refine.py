"""Stage 5: refine the student by its own answers (GRPO, DeepSeekMath, arXiv 2402.03300).

It answers each question several times; a response that earns more than its group's mean is made likelier, one that earns less rarer:

    L = - mean over responses of mean over tokens of  min(r A, clip(r, 1 - e, 1 + e) A) - beta KL,
    r = p(token) / p_old(token),  A = (reward - mean of its group) / std of its group,  KL = e^d - d - 1,  d = log p_ref - log p.

The pictures and the prompt are encoded once a group: in the rollout the key-value cache is repeated, in the update the responses of a
group share their prompt as a prefix (see 04). The reward is the paper's for one well-formed answer, and pays nothing for several.

Departs from the paper: shared prefixes; a reward that listing every answer does not win.

Reads   4_sft/ (or any Qwen-VL checkpoint) and 3_qa/grpo.jsonl (the format of 04)
Writes  5_refine/: an ordinary Hugging Face checkpoint, adapter/ (PEFT format, with --train lora), metrics.jsonl, curves.png, rollouts.jsonl,
        meta.json; on the way step_N/, the same checkpoint with what resuming needs in step_N/state/
        {"step": 3, "reward": 0.61, "loss": -0.002, "kl": 0.0004, "clipped": 0.0, "length": 5.2, "grad_norm": 0.8,
         "rewards": {"A1": 0.55, ...}, "seconds": 2.4, "rollout_seconds": 1.1, "tokens_s": 2210.4, "tflops": 0.05}

metrics: reward = mean over responses, rewards = the same by task; kl = from the student that came in; clipped = share of tokens whose ratio
         left 1 +- clip_ratio; length = tokens of a response, end token included; grad_norm = before clipping; rollout_seconds = of which the
         answers took; tokens_s, tflops, mfu = of the update, as in 04.

Run     python 05_train_refine.py --run runs/demo                           (the paper's settings are the defaults)
        torchrun --nproc-per-node 8 -- 05_train_refine.py --run runs/demo      (FSDP2: the same loss on eight processes)

What to change. DAPO's clipping (arXiv 2503.14476): a second setting for the upper bound in `grpo_loss`'s clamp, --kl 0, weights of 1 / all tokens
of the step in `rows_of`. Dr. GRPO: no division by the std in `advantages`. Another reward: a branch in `reward`, which gets the task, the
true answer and the response, and returns a dict with "overall". Freezing the tower, as in 04: --freeze_vision True; full fine-tuning:
--train full (the frozen start is then a copy of the whole student). Groups with nothing to teach could be left out in `main` after `advantages`.
"""
import argparse
import copy
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import socket
import struct
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from matplotlib.figure import Figure
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, HfArgumentParser
from transformers.cache_utils import DynamicLayer
from transformers.utils import cached_file, logging

from kernels import patches_in_one_product, register, windows_in_one_launch

logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints of one process say so each time
TASKS = ("A1", "A2", "A3", "A4", "D1", "D2", "D3", "D4")
BY_THE_WAY = ("run", "recipe", "rollout", "tokens", "checkpointing", "offload", "explode", "estimate", "save_every", "log_every", "show_every")  # settings that do not change the result


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


def run(main, config_class):
    """main(the settings of the command line); a full disk, a read-only folder, an input deleted on the way are one line and exit status 2."""
    cfg = parse(config_class)
    try:
        main(cfg)
    except (OSError, SafetensorError) as error:  # safetensors' name for a write that failed
        stop(f"{error}; what is finished stays in {cfg.run}: mend this, then run the same command again")


def save(path: Path, content: str | bytes):
    """Write under a temporary name, then rename: no reader ever meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")  # one fixed name: the rerun after a kill overwrites it and leaves no litter
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


def read_lines(path: Path, *keys: str):
    """(number, record) of each line of a JSONL file that holds all `keys`; every other is named on stderr, with the reason, and skipped."""
    if not path.is_file():
        stop(f"{path} is missing: run the stage that writes it, or name another file")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or (missing := [key for key in keys if key not in record]):
                raise ValueError("not a JSON object" if not isinstance(record, dict) else f"no {', '.join(missing)}")
        except (ValueError, RecursionError) as error:  # malformed JSON and bad UTF-8 are ValueErrors too; brackets in brackets in ...
            print(f"{path}:{number}: skipped, {error}", file=sys.stderr)
        else:
            yield number, record


def read_jsonl(path: Path, *keys: str) -> list[dict]:
    """The records alone."""
    return [record for _, record in read_lines(path, *keys)]


def hold(folder: Path, part: str):
    """One process at a time writes a folder, or its `part`: a lock that ends with its process, however that ends; the file says whose it is."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / f".lock{part}", os.O_RDWR | os.O_CREAT, 0o644)  # never closed: closing would give it back
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(f"{folder} is being written by {os.read(lock, 200).decode()}: wait for it, end it, or choose another --run")
    os.truncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())


def let_go(folder: Path):
    """A finished folder needs no locks."""
    for lock in folder.glob(".lock*"):
        lock.unlink()


def begin(folder: Path, config: dict, parent: Path | None = None, part: str = "") -> dict:
    """Open a stage's folder and return its meta record; a finished folder ends the run, other settings than those of what it holds are refused.

    `config` holds the settings that decide the result (not --run, --shard, --workers); `parent` is the folder this stage reads; processes
    that share a folder each hold a `part` of it.
    """
    inherited = None
    if parent is not None:
        if not (parent / "meta.json").is_file() or not (inherited := json.loads((parent / "meta.json").read_text())).get("finished"):
            stop(f"{parent} is missing or unfinished: run the stage that writes it to its end first")
        print(f"reads {parent}: " + ", ".join(f"{value} {key}" for key, value in inherited["counts"].items()))
    path = folder / "meta.json"
    if not (path.is_file() and json.loads(path.read_text())["finished"]):
        hold(folder, part)  # and look again below: another process may have finished it meanwhile
    meta = {"stage": Path(__file__).stem, "finished": False, "config": config, "parent": inherited}
    if path.is_file():
        old = json.loads(path.read_text())
        changed = [f"{key} was {old['config'].get(key)!r}, now {config.get(key)!r}"
                   for key in sorted({*config, *old["config"]}) if old["config"].get(key) != config.get(key)]
        if old["parent"] != inherited:
            changed.append("the folder it reads was made anew")
        written = {other.name for other in folder.iterdir()} - {path.name, f".lock{part}"}  # a first try that wrote nothing binds nobody
        if changed and (written or old["finished"]):
            stop(f"{folder} was begun with other settings ({'; '.join(changed)}): choose another --run, or delete the folder")
        if old["finished"]:
            let_go(folder)  # a kill may have come between the folder's last file and this
            print(f"{folder} is finished: nothing to do")
            raise SystemExit(0)
    save(path, json.dumps(meta, indent=1))
    return meta


def finish(folder: Path, meta: dict, counts: dict, started: float):
    """Complete meta.json, the mark of a whole folder: `counts` (what the next stage prints), seconds, versions."""
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")} | {"python": sys.version.split()[0]}
    meta = meta | {"finished": True, "counts": counts, "seconds": round(time.perf_counter() - started, 1), "versions": versions}
    save(folder / "meta.json", json.dumps(meta, indent=1))
    let_go(folder)
    peak_gb = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    print(f"\n{folder}: {meta['seconds']} s, peak memory of the largest process {peak_gb:.2f} GB")
# --- end of the common block ---

# Shapes: B rows, T tokens of a row, N response tokens of a batch, P patches of all pictures, V vocabulary.


@dataclass
class Config:
    recipe: Literal["paper", "tiny"] = setting("paper", "paper (the defaults below) or tiny (RECIPES below): flags that your own override")
    run: str = setting("runs/demo", "run folder; reads 3_qa/ and the student in it")
    out: str = setting("5_refine", "folder written inside the run")
    student: str = setting("4_sft", "the student to refine: a folder in the run, any checkpoint folder, or a hub id")
    data: str = setting("3_qa/grpo.jsonl", "questions: a file in the run, or any ms-swift / LLaMA-Factory / World2VLM JSONL file")
    data_root: str = setting("", "folder that picture paths start from and may not leave; default: the run, for a file outside it that file's folder")
    tasks: list[str] = setting([], "tasks to refine, such as A3 D1 D3; empty: all that --data holds")
    train: Literal["lora", "full"] = setting("lora", "lora (a new one, beside the language model's linear layers) or full")
    lora_rank: int = setting(256, "LoRA rank; the paper's")
    lora_alpha: int = setting(512, "LoRA alpha: the update is scaled by alpha / rank; the paper's")
    freeze_vision: bool = setting(False, "keep the vision tower as it is; the paper trains it in this stage")
    prompts: int = setting(32, "questions in a step, over all processes")
    group: int = setting(4, "responses to a question, whose mean reward is its baseline; the paper's 4-5")
    temperature: float = setting(1.0, "of the sampled responses; the paper's")
    max_new_tokens: int = setting(256, "tokens of a response at most; the paper's")
    rollout: int = setting(32, "questions in one generation batch; bounds memory, does not change the result")
    tokens: int = setting(16384, "tokens in one forward pass of the update, rows packed behind one another; bounds memory only")
    epochs: float = setting(1.0, "passes over --data")
    steps: int = setting(0, "rollout steps; 0: as --epochs says")
    updates: int = setting(1, "optimiser steps on each step's responses; from the second on, the ratio is clipped")
    clip_ratio: float = setting(0.2, "the ratio of new to old probability counts within 1 +- this")
    kl: float = setting(1e-2, "weight of the KL divergence from the student that came in; the paper's")
    optimizer: Literal["adamw", "muon"] = setting("adamw", "adamw, or muon: Muon on the matrices, AdamW on the rest")
    lr: float = setting(1e-6, "peak learning rate of AdamW; the paper's")
    muon_lr: float = setting(3e-4, "peak learning rate of Muon")
    schedule: Literal["cosine", "constant"] = setting("constant", "after the warm-up: constant, or cosine (to zero), which averages the last steps' noise away")
    warmup: float = setting(0.05, "share of the steps in which the learning rate rises from zero")
    weight_decay: float = setting(0.1, "decoupled weight decay on matrices")
    beta1: float = setting(0.9, "AdamW")
    beta2: float = setting(0.95, "AdamW")
    clip: float = setting(1.0, "largest norm of the gradient")
    max_pixels: int = setting(1_003_520, "pixels of a picture at most; larger ones are scaled down")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "arithmetic: bfloat16, float32, or auto (bfloat16 on a GPU that has it, float32 on a CPU)")
    save_dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "of the weights written: bfloat16 (half the size), float32, or auto (as they are kept here)")
    attention: str = setting("world2vlm", "world2vlm (kernels/; plain torch on a CPU), or one of transformers: sdpa, eager")
    checkpointing: bool = setting(True, "recompute activations in the backward pass: less memory, about a third more time")
    offload: bool = setting(False, "keep weights, gradients and optimiser state in host memory (FSDP2); each layer is copied when it is needed")
    explode: float = setting(100.0, "stop when the gradient's norm passes this many times the median of the last 100 steps, and of --clip")
    estimate: bool = setting(False, "print the memory estimate and stop; the student's config.json is enough")
    save_every: int = setting(20, "steps between states to resume from")
    log_every: int = setting(1, "steps between printed lines; metrics.jsonl has every step")
    show_every: int = setting(10, "steps between printed rollouts; rollouts.jsonl has one question of every step")
    seed: int = setting(0, "seed of the order of questions and of the sampled responses")


RECIPES = {"paper": "", "tiny": "--train full --lr 5e-5 --schedule cosine --group 8 --log_every 10 --show_every 50 --max_new_tokens 24 --no_checkpointing"}


def recipe() -> list[str]:
    """The flags of the --recipe on the command line, which go before the others, so that the others win."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=RECIPES, default="paper")
    return RECIPES[parser.parse_known_args()[0].recipe].split()


# --- same in 02, 04, 05, 06: a picture as a viewer shows it ---
def read_picture(path: str | Path) -> Image.Image:
    """RGB, turned as its EXIF tag says, 16 bits a channel brought to 8, transparent parts on white. ValueError, with the reason, for what is none."""
    try:
        if not Path(path).is_file():
            raise ValueError("no such file")  # a named pipe would be waited for
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
        if picture.mode in ("I", "F"):
            raise ValueError("its pixels are 32-bit numbers without a known white: save it with 8 or 16 bits")
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError, struct.error,
            Image.DecompressionBombError) as error:  # PIL raises each of these on one damaged file or another
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from None
# --- end: a picture ---


# --- same in 04, 05, 06: a student and what it reads ---
LONGEST_TEXT = 40_000  # characters of a question and its answer; a longer one is none, and would fill the memory of a whole batch


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
        if remote_code := AutoConfig.from_pretrained(source, trust_remote_code=False).to_dict().get("auto_map"):
            raise ValueError(f"it asks for code of its own to be run ({', '.join(map(str, remote_code.values()))})")
        model, report = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, use_safetensors=True, attn_implementation=attention,
                                                                    trust_remote_code=False, output_loading_info=True)
        if wrong := [f"{kind.split('_')[0]} {name}" for kind in ("missing_keys", "unexpected_keys") for name in sorted(report[kind])]:
            raise ValueError(f"its weights are not those of its configuration: {', '.join(wrong[:3])}{' ...' * (len(wrong) > 3)}")
        if wrong := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
            raise ValueError(f"{wrong[0]} holds values that are not finite")
        tokenizer, image_processor = (kind.from_pretrained(source, trust_remote_code=False) for kind in (AutoTokenizer, AutoImageProcessor))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, StrictDataclassError, SafetensorError) as error:  # wrong files
        stop(f"{source} does not load as an image-text-to-text checkpoint: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
    size = image_processor.size
    image_processor.size = {"shortest_edge": min(size["shortest_edge"], max_pixels), "longest_edge": min(size["longest_edge"], max_pixels)}
    patches_in_one_product(model)
    if attention == "world2vlm":
        windows_in_one_launch(model)
    return Student(model.to(device), tokenizer, image_processor, source)


def read_questions(path: Path, root: Path) -> list[dict]:
    """Records with `images` resolved inside `root` and `written`, the same as they stand in the file: what is drawn or split by a question
    shall not depend on where the run lies. What cannot be used is named, with the remedy, and skipped."""
    questions, root, faults = [], root.resolve(), {}  # faults: picture -> what is wrong with it, or ""; a picture is asked about often

    def fault(image: Path) -> str:
        if not image.resolve().is_relative_to(root):
            return f"{image} lies outside the data root {root}: copy it there or set --data_root"
        return "" if image.is_file() else f"{image} is missing"

    for number, record in read_lines(path, "task_type", "messages", "images"):
        try:
            texts = [message["content"] for message in record["messages"]]
            if not all(isinstance(message["role"], str) and message["role"] for message in record["messages"]):
                raise ValueError("a message without a role")
            images = [str(root / image) for image in record["images"]]
            if record["messages"][-1]["role"] != "assistant" or len(texts) < 2:
                raise ValueError("messages must be a user's question and the assistant's answer")
            "".join(texts).encode()  # a lone surrogate is no text: UnicodeEncodeError, a ValueError
            if sum(map(len, texts)) > LONGEST_TEXT:
                raise ValueError(f"its text has {sum(map(len, texts))} characters, more than {LONGEST_TEXT}")
            if not images or "".join(texts).count("<image>") != len(images):
                raise ValueError(f"{len(images)} images but {''.join(texts).count('<image>')} <image> marks")
            for image in images:
                if image not in faults:
                    faults[image] = fault(Path(image))
                if faults[image]:
                    raise ValueError(faults[image])
        except (ValueError, TypeError, KeyError, IndexError, OSError) as error:  # OSError: a name too long
            print(f"{path}:{number}: skipped, {error}", file=sys.stderr)
            continue
        questions.append(record | {"images": images, "written": record["images"]})
    return questions


def look(student: Student, paths: list[str], blank: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Picture files -> patches [P, channels x patch] and their grids [pictures, 3] (frames, rows, columns). Blank ones are mean grey."""
    pictures = [read_picture(path) for path in paths]
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
def share(questions: list[dict], pixels: torch.Tensor, grids: torch.Tensor, pad: int, most: int) -> list[dict]:
    """Encoded questions about the same pictures -> rows of  prefix | rest of question 1 | rest of question 2 | ...,  of `most` tokens at most.

    The prefix is the longest run of tokens that all prompts begin with. Every token keeps the position id that it has when its question
    stands alone, and sees the prefix and its own question only (`segment`), so each answer token gets the log-probability that it
    would have had alone. Questions whose pictures do not all lie in the common prefix get a row each; so does a question over `most`.
    """
    prefix = min(question["prompt"] for question in questions)
    for question in questions[1:]:
        differs = (question["ids"][:prefix] != questions[0]["ids"][:prefix]).nonzero()
        prefix = int(differs[0]) if len(differs) else prefix
    if (questions[0]["ids"][prefix:] == pad).any():
        return [row for question in questions for row in share([question], pixels, grids, pad, most)]
    fit = max(1, sum(length <= most for length in itertools.accumulate((len(q["ids"]) - prefix for q in questions), initial=prefix)) - 1)
    if fit < len(questions):
        return [row for part in (questions[:fit], questions[fit:]) for row in share(part, pixels, grids, pad, most)]
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
             "target": torch.tensor(target), "owner": torch.tensor(owner), "pixels": pixels, "grids": grids, "questions": len(questions),
             "names": [question.get("name", "?") for question in questions]}]


def pack(rows: list[dict]) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Rows -> one row [1, T] of all their tokens, without padding; `documents` [rows + 1] says where each begins, and attention stays inside.

    Also where the predictor of each of N answer tokens stands, as (row, position) [2, N], and the token's id [N].
    """
    starts = [0, *itertools.accumulate(len(row["ids"]) for row in rows)]
    inputs = {"input_ids": torch.cat([row["ids"] for row in rows])[None], "position_ids": torch.cat([row["positions"] for row in rows], 1)[:, None],
              "prefix": torch.cat([row["segment"] for row in rows])[None], "documents": torch.tensor(starts, dtype=torch.int32), "longest": max(len(row["ids"]) for row in rows)}
    source = torch.cat([row["source"] + start for row, start in zip(rows, starts)])
    return inputs, torch.stack([torch.zeros_like(source), source]), torch.cat([row["ids"][row["target"]] for row in rows])


def pad_rows(rows: list[dict], pad: int, dtype: torch.dtype) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """The same for attentions that know no documents: rows padded on the right [B, T], with the matrix of visible pairs [B, 1, T, T]."""
    B, T = len(rows), max(len(row["ids"]) for row in rows)
    ids, positions, segment = torch.full((B, T), pad), torch.zeros(3, B, T, dtype=torch.long), torch.full((B, T), -1)
    for b, row in enumerate(rows):
        n = len(row["ids"])
        ids[b, :n], positions[:, b, :n], segment[b, :n] = row["ids"], row["positions"], row["segment"]
    visible = ((segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])).tril()  # j is in the prefix or in i's question, j <= i
    inputs = {"input_ids": ids, "position_ids": positions,
              "attention_mask": torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]}
    where = torch.cat([torch.full_like(row["source"], b) for b, row in enumerate(rows)])
    source = torch.cat([row["source"] for row in rows])
    return inputs, torch.stack([where, source]), torch.cat([row["ids"][row["target"]] for row in rows])


def answer_logprobs(model: torch.nn.Module, inputs: dict, where: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p [N] of `tokens` at `where` [2, N]. Logits exist at answer positions only, and for LOGITS numbers at a time: the backward pass
    computes a chunk of them again rather than keep all (a vocabulary of 152,000 takes 0.6 MB a token)."""
    def of_chunk(hidden, tokens):
        return model.lm_head(hidden).float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    hidden = model.model(**inputs, use_cache=False).last_hidden_state[where[0], where[1]]              # [N, width]
    size = max(1, LOGITS // model.config.text_config.vocab_size)
    if len(tokens) <= size:
        return of_chunk(hidden, tokens)
    return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in zip(hidden.split(size), tokens.split(size))])


def token_logprobs(student: Student, rows: list[dict]) -> torch.Tensor:
    """log p of every answer token of the rows, in their order: float32 [N]."""
    model = student.model
    packed = model.config._attn_implementation == "world2vlm"
    inputs, where, tokens = pack(rows) if packed else pad_rows(rows, student.tokenizer.pad_token_id, model.dtype)
    inputs |= {"pixel_values": torch.cat([row["pixels"] for row in rows]), "image_grid_thw": torch.cat([row["grids"] for row in rows])}
    inputs = {name: x.to(model.device) if torch.is_tensor(x) else x for name, x in inputs.items()}
    score = model.answer_logprobs if isinstance(model, FSDPModule) else partial(answer_logprobs, model)  # FSDP gathers weights around methods it knows
    return score(inputs, where.to(model.device), tokens.to(model.device))


def micro_batches(rows: list[dict], most: int, padded: bool) -> list[list[dict]]:
    """Rows of one step, longest first, cut into forward passes of at most `most` tokens (a longer row goes alone); padding counts where there is any."""
    parts, held = [], 0
    for row in sorted(rows, key=lambda row: -len(row["ids"])):
        cost = len(parts[-1][0]["ids"]) if parts and padded else len(row["ids"])  # padded, every row is as long as its part's first
        if parts and held + cost <= most:
            parts[-1].append(row)
            held += cost
        else:
            parts.append([row])
            held = len(row["ids"])
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


def choose_trained(model: torch.nn.Module, cfg):
    """In place: with lora a LoRA beside every linear layer of the language model, and nothing else of it trains; --freeze_vision for the tower."""
    language = model.model.language_model
    if cfg.train == "lora":
        model.requires_grad_(False)
        for name, layer in list(language.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(language.get_submodule(parent), leaf, LoRA(layer, cfg.lora_rank, cfg.lora_alpha))
    model.model.visual.requires_grad_(not cfg.freeze_vision)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()  # a step of 1e-6 is lost in bfloat16's three digits
    if cfg.checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()


def shard(model: torch.nn.Module, device: str, dtype: str, offload: bool):
    """Spread weights, gradients and optimiser state over the processes, in place (FSDP2): each layer is gathered when it is needed.

    With `offload` they wait in host memory. Weights travel in the arithmetic's dtype, gradients are summed in float32.
    """
    how = {"mesh": init_device_mesh(device.split(":")[0], (dist.get_world_size(),))}
    if dtype == "bfloat16":
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)  # rotary angles stay
    if offload and device != "cpu":
        how["offload_policy"] = CPUOffloadPolicy()
    for layer in [*model.model.language_model.layers, *model.model.visual.blocks]:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    model.answer_logprobs = MethodType(answer_logprobs, model)
    register_fsdp_forward_method(model, "answer_logprobs")


def whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process holds a part, put together; others as they are."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def merged(model: torch.nn.Module):
    """(name, tensor) of the plain model, one after another: every LoRA merged into its weight, every shard gathered."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            continue
        tensor = whole(tensor)
        if isinstance(lora := modules.get(owner.removesuffix(".base")), LoRA):
            if leaf == "weight":
                tensor = (tensor.float() + whole(lora.lora_B).float() @ whole(lora.lora_A).float() * lora.scale).to(tensor.dtype)
            name = name.replace(".base.", ".")
        yield name, tensor


PROCESSOR_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
                   "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
                   "video_preprocessor_config.json", "generation_config.json"]


def save_student(student: Student, folder: Path, cfg, rank: int):
    """An ordinary checkpoint folder: merged weights, the processor's files as they came, and adapter/ where there is a LoRA."""
    weights = {}
    for name, tensor in merged(student.model):  # every process gathers, the first one keeps
        if rank == 0 and not (name == "lm_head.weight" and student.model.config.tie_word_embeddings):
            weights[name] = tensor.to(weights_dtype(cfg) if cfg.save_dtype == "auto" else getattr(torch, cfg.save_dtype)).cpu()
    adapter = {f"base_model.model.{name}.weight": whole(p.detach()).cpu() for name, p in student.model.named_parameters()
               if name.endswith((".lora_A", ".lora_B"))}  # the names of the peft package
    if rank:
        return
    student.model.save_pretrained(folder, state_dict=weights)
    for name in PROCESSOR_FILES:
        if source := cached_file(student.source, name, _raise_exceptions_for_missing_entries=False):
            shutil.copyfile(source, folder / name)
    if adapter:
        (folder / "adapter").mkdir()
        save_file(adapter, folder / "adapter/adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter/adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": student.source, "r": cfg.lora_rank,
            "lora_alpha": cfg.lora_alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": r".*language_model.*\.(" + "|".join(
                sorted({key.split(".")[-3] for key in adapter})) + ")"}, indent=1))


def state_of(model: torch.nn.Module, optimizers: list) -> dict:
    """Everything that the next step depends on: trained weights and the optimisers' slots, each by a name that no sharding changes."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for k, optimizer in enumerate(optimizers):
        for i, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{k}.{i}.{name}": slot for name, slot in slots.items()}
    return tensors


def save_step(folder: Path, step: int, student: Student, optimizers: list, cfg, rank: int):
    """Write folder/step_N: a checkpoint like the final one, and in state/ what resuming needs (each process its shard). Older ones go."""
    done = folder / f"step_{step:06}"
    part = done.with_suffix(".part")
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        (part / "state").mkdir(parents=True)
    save_student(student, part, cfg, rank)
    dcp.save(state_of(student.model, optimizers), storage_writer=HuggingFaceStorageWriter(str(part / "state"), save_distributed=True))
    if rank == 0:
        os.replace(part, done)
        drop_steps(folder, but=done)


def drop_steps(folder: Path, but: Path | None = None):
    """Delete the checkpoints of steps on the way."""
    for old in folder.glob("step_*"):
        if old != but:
            shutil.rmtree(old)


def save_end(folder: Path, student: Student, cfg, rank: int):
    """The checkpoint of the last step, in the stage's folder itself; meta.json says afterwards that it is whole."""
    part = folder / "checkpoint.part"
    shutil.rmtree(part, ignore_errors=True)
    save_student(student, part, cfg, rank)
    if rank == 0:
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        for path in sorted(part.iterdir()):
            os.replace(path, folder / path.name)
        part.rmdir()


def load_step(folder: Path, model: torch.nn.Module, optimizers: list) -> int:
    """Go on from the last whole `save_step`, by however many processes it was written; returns its step (0 where there is none)."""
    saved = sorted(path for path in folder.glob("step_*") if path.suffix != ".part")
    if not saved:
        return 0
    reader = HuggingFaceStorageReader(str(saved[-1] / "state"))
    tensors = state_of(model, [])
    for name, kept in reader.read_metadata().state_dict_metadata.items():
        if name.startswith("optimizer."):
            _, k, i, slot = name.split(".")
            p = [p for group in optimizers[int(k)].param_groups for p in group["params"]][int(i)]
            tensors[name] = torch.zeros_like(p, requires_grad=False) if kept.size == p.shape else torch.zeros(kept.size)
    dcp.load(tensors, storage_reader=reader)
    for k, optimizer in enumerate(optimizers):
        slots = {}
        for name in tensors:
            if name.startswith(f"optimizer.{k}."):
                _, _, i, slot = name.split(".")
                slots.setdefault(int(i), {})[slot] = tensors[name]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    return int(saved[-1].name.removeprefix("step_"))


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
                x = torch.stack([whole(update) for _, update in pairs])
                x = x.mT if rows > columns else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)  # 3.44 x + (2.03 a a - 4.78 a) x
                x = x.mT if rows > columns else x
                for (p, _), update in zip(pairs, x):
                    if isinstance(p, DTensor):
                        update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)  # this process's part of it
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


def rate(cfg, step: int, steps: int) -> float:
    """The learning rate at `step` of `steps`, as a share of its peak: linear warm-up, then constant or half a cosine down to zero."""
    warmup = cfg.warmup * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 1.0 if cfg.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def all_sum(*tensors: torch.Tensor):
    """Add up over all processes, in place; nothing to do when there is one."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def as_many(parts: list, spare: list[dict], device: str) -> list:
    """Micro-batches of this process, filled up with `spare` ones to the number that the busiest process has: FSDP's processes step together."""
    number = torch.tensor(len(parts), device=device)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return parts + [spare] * (int(number) - len(parts))


def clip_gradients(model: torch.nn.Module, most: float) -> float:
    """Scale the gradients (FSDP has summed them over the processes) to a norm of at most `most`; returns the norm before."""
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return float(whole(torch.nn.utils.clip_grad_norm_(params, most)))


def take_step(optimizers: list, factor: float):
    """One step at `factor` times the peak learning rates."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad()


def start_processes(folder: Path, offload: bool) -> tuple[int, int, str]:
    """(rank, world size, device) of this process; one process unless torchrun started it. Rank 0 alone says that `folder` is finished."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if (folder / "meta.json").is_file() and json.loads((folder / "meta.json").read_text())["finished"]:
        if rank:
            raise SystemExit(0)
        drop_steps(folder)  # a kill may have come while they were being deleted
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
    elif offload:  # FSDP of one process
        dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
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


# --- same in 04, 05: what a step costs, and how it went ---
LOGITS = 2**27  # logits in memory at a time: half a gigabyte of float32
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense bf16 FLOP/s, the makers' figures


def weights_in(module: torch.nn.Module, kind=torch.nn.Linear) -> int:
    """Elements of the weights that every token is multiplied with."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, kind))


def head_width(text) -> int:
    """Qwen2.5-VL's configuration leaves it to be computed."""
    return getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)


def flops(model: torch.nn.Module, rows: list[dict], train: str, freeze_vision: bool) -> float:
    """Floating-point operations of one training pass over `rows`, counted; what checkpointing computes twice counts once, as in MFU.

    A weight costs 2 a token forward, 2 more for the gradient of its input, 2 more for its own (frozen: none); attention 4 x width a visible
    pair forward and twice that backward.
    """
    text, vision, visual = model.config.text_config, model.config.vision_config, model.model.visual
    tokens, answers = sum(len(row["ids"]) for row in rows), sum(len(row["target"]) for row in rows)
    pairs = 0
    for row in rows:
        prefix, *rest = torch.bincount(row["segment"]).tolist()
        pairs += prefix * (prefix + 1) / 2 + sum(n * prefix + n * (n + 1) / 2 for n in rest)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    attention = 4 * text.num_attention_heads * head_width(text) * text.num_hidden_layers * pairs
    language = 2 * weights_in(model.model.language_model) * tokens + 2 * text.hidden_size * text.vocab_size * answers
    total = 3 * attention + (2 if train == "lora" else 3) * language + 3 * 2 * lora * tokens

    patches = torch.cat([row["grids"] for row in rows]).prod(1).double()  # of each picture
    window = (getattr(vision, "window_size", 0) / vision.patch_size) ** 2
    everywhere = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    pairs = (everywhere * patches**2 + (vision.depth - everywhere) * patches * window).sum()
    each = weights_in(visual.blocks) + weights_in(visual.patch_embed, (torch.nn.Linear, torch.nn.Conv3d))
    merged = (weights_in(visual) - weights_in(visual.blocks)) / vision.spatial_merge_size**2
    seen = 2 * (each + merged) * patches.sum() + 4 * vision.hidden_size * pairs
    return float(total + (1 if freeze_vision else 3) * seen)


def memory(model: torch.nn.Module, cfg, tokens: int, processes: int, extra: dict | None = None) -> dict[str, float]:
    """Bytes that training needs on one device, estimated; `model` may be on the meta device. `tokens`: of one forward pass.

    A decoder layer keeps 32 width + 8 mlp width bytes a token in bfloat16 (42 and 16 in float32), as autograd's saved tensors were counted;
    with checkpointing only its input, and one layer at a time the rest. A patch of a trained vision tower costs the same in its sizes.
    """
    text, vision = model.config.text_config, model.config.vision_config
    half = cfg.dtype == "bfloat16"
    sizes = [(p.numel(), p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(n for n, _, wanted in sizes if wanted)

    def kept(width, mlp, layers, rows, lora):
        layer = rows * ((32 if half else 42) * width + (8 if half else 16) * mlp + 42 * lora)
        return layers * rows * width * (2 if half else 4) + layer if cfg.checkpointing else layers * layer

    patches = 0 if cfg.freeze_vision else tokens * vision.spatial_merge_size**2
    found = {"weights": sum(n * size for n, size, _ in sizes) / processes, "gradients": 4 * trained / processes,
             "optimiser": 8 * trained / processes,
             "activations": kept(text.hidden_size, text.intermediate_size, text.num_hidden_layers, tokens, cfg.lora_rank * (cfg.train == "lora"))
             + kept(vision.hidden_size, vision.intermediate_size, vision.depth, patches, 0),
             "logits": 3 * 4 * min(LOGITS, tokens * text.vocab_size)}
    if processes > 1 or cfg.offload:
        layers = [*model.model.language_model.layers, *model.model.visual.blocks]
        largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        outside = sum(n for n, _, _ in sizes) - sum(p.numel() for layer in layers for p in layer.parameters())
        found["gathered"] = (outside + 2 * largest) * (2 if half else 4)
    if cfg.offload:
        for name in ("weights", "gradients", "optimiser"):
            found[f"{name} (host)"] = found.pop(name)
    return found | (extra or {})


def pair_of_pictures(model: torch.nn.Module, max_pixels: int, prompt: int, rests: list[int], answer: int) -> dict:
    """The lengths of a row about two pictures of `max_pixels`: `prompt` tokens before it parts into `rests`, each ending in `answer` tokens."""
    vision = model.config.vision_config
    patches = round(max_pixels / vision.patch_size**2)
    prefix = 2 * patches // vision.spatial_merge_size**2 + prompt
    segment = torch.cat([torch.full((n,), k) for k, n in enumerate([prefix, *rests])])
    return {"ids": segment, "segment": segment, "target": torch.zeros(len(rests) * answer), "grids": torch.tensor([[1, 1, patches]] * 2)}


def say_memory(model: torch.nn.Module, found: dict[str, float], source: str):
    """The estimate as one line, before anything large is loaded."""
    total = sum(size for name, size in found.items() if "(host)" not in name)
    every, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (False, True))
    print(f"{source}: {every:,} parameters, {trained:,} trained\nmemory of one process, estimated: "
          + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in found.items()) + f": {total / 1e9:.1f} GB", flush=True)


def say_peak(device: str, rank: int):
    """What a GPU really took; `finish` says it of the process."""
    if rank == 0 and device != "cpu":
        print(f"peak memory of {torch.cuda.get_device_name()}: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def on_meta(source: str, cfg) -> torch.nn.Module:
    """The student as it will be trained, without its weights: shapes only."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=weights_dtype(cfg))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        stop(f"{source} does not load as an image-text-to-text checkpoint: {str(error).strip().splitlines()[0]}")
    with torch.device("meta"):
        choose_trained(model, cfg)
    return model


def weights_dtype(cfg) -> torch.dtype:
    """Full training keeps float32 weights; a frozen model under a LoRA is kept in the arithmetic's dtype."""
    return torch.bfloat16 if cfg.train == "lora" and cfg.dtype == "bfloat16" else torch.float32


def speed(operations: float, tokens: int, seconds: float, device: str, processes: int) -> dict:
    """tokens/s, TFLOP/s and, on a card whose peak is known, the share of it (MFU); all processes together."""
    rate = operations / seconds
    card = torch.cuda.get_device_name() if device != "cpu" else ""
    peak = next((peak for name, peak in PEAKS.items() if name in card), None)
    return {"tokens_s": round(tokens / seconds, 1), "tflops": round(rate / 1e12, 3)} | ({"mfu": round(rate / peak / processes, 4)} if peak else {})


def diverged(loss: float, norms: list[float], explode: float, clip: float = 1.0) -> str | None:
    """What is wrong with a step, before it is taken: its loss or gradient is no number, or the gradient passes `explode` times the median of
    the last 100 and `explode` times `clip`: once a student knows its questions by heart, a new one is no explosion. `norms` ends with this step's."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norms[-1]):
        return f"the gradient's norm is {norms[-1]}"
    usual = float(np.median(norms[-101:-1])) if len(norms) > 10 else math.inf
    return f"the gradient's norm is {norms[-1]:.3g}, usually {usual:.3g}" if norms[-1] > explode * max(usual, clip) else None


def give_up(folder: Path, step: int, why: str, questions: list[str]):
    """Name the step, its questions and the last good checkpoint, on every process; exit status 2."""
    if dist.is_initialized():
        lists = [None] * dist.get_world_size()
        dist.all_gather_object(lists, questions)
        questions = sum(lists, [])
    saved = sorted(path.name for path in folder.glob("step_*") if path.suffix != ".part")
    save(folder / "diverged.json", json.dumps({"step": step, "why": why, "questions": questions}, indent=1))
    stop(f"step {step}: {why}, by {len(questions)} questions ({'; '.join(questions[:3])}{'; ...' if len(questions) > 3 else ''}: all in {folder}/diverged.json). "
         + (f"Last good checkpoint: {folder}/{saved[-1]}: the same command goes on from it; for another --lr name it as --student of another --out"
            if saved else "No checkpoint was written yet: lower --lr or --save_every"))


def name_of(question: dict) -> str:
    """Task, scene and words of a question: enough to find its line again."""
    where = "/".join(str(question[key]) for key in ("scene_id", "traj_id") if key in question) or question["images"][0]
    return f"{question['task_type']} {where} {question['messages'][0]['content'].replace('<image>', '').strip()[:100]!r}"


def draw_curves(folder: Path, panels: dict[str, list[str]]):
    """metrics.jsonl -> curves.png: one panel a title, one line a metric; a dict metric (rewards by task) gives a line a key."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    columns = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(4.2 * columns, 6), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels.items()):
        series = {}
        for line in lines:
            for name in names:
                found = line.get(name)
                for key, value in (found.items() if isinstance(found, dict) else [(name, found)] if found is not None else []):
                    series.setdefault(key, []).append((line["step"], value))
        for key, points in series.items():
            axis.plot(*zip(*points), label=key, linewidth=1, marker="." if len(points) < 30 else None)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if len(series) > 1:
            axis.legend(fontsize=7, frameon=False, ncols=2)
    for axis in list(axes.flat)[len(panels):]:
        axis.axis("off")
    figure.savefig(folder / "curves.png", dpi=110)
# --- end: what a step costs ---


# --- same in 05, 06: generation ---
class Roomy(DynamicLayer):
    """A copy of `rows` of one layer's keys and values with room for `room` tokens more: a step writes its own keys into place, where a
    dynamic cache copies all of them. When the room is used up, as much is added once more. What is not written yet is shown to nobody."""

    def __init__(self, layer, rows: torch.Tensor, room: int):
        super().__init__()
        self.room, self.written = room, layer.keys.shape[-2]
        self.storage = [self.enlarged(x[rows]) for x in (layer.keys, layer.values)]                     # [rows, H, T + room, D]
        self.keys, self.values = (x[:, :, :self.written] for x in self.storage)                         # [rows, H, T, D], views
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True

    def enlarged(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.new_empty(*x.shape[:2], self.room, x.shape[3])], 2)

    def update(self, keys, values, *args, **kwargs):
        start, self.written = self.written, self.written + keys.shape[-2]
        if self.written > self.storage[0].shape[2]:
            self.storage = [self.enlarged(x) for x in self.storage]
        for x, new in zip(self.storage, (keys, values)):
            x[:, :, start:self.written] = new
        self.keys, self.values = (x[:, :, :self.written] for x in self.storage)
        return self.keys, self.values


def shared_heads(prompts: list[dict], picture_token: int) -> list[tuple[list[int], int]]:
    """What is encoded once: [(the prompts that share a head, its length)]. Prompts over the same pictures (the same tensor `pixels`) share
    the tokens with which they all begin, provided that all pictures are among them; every prompt keeps a token of its own."""
    same, heads = {}, []
    for b, prompt in enumerate(prompts):
        same.setdefault(id(prompt["pixels"]), []).append(b)
    for members in same.values():
        ids = [prompts[b]["ids"] for b in members]
        shortest = min(map(len, ids))
        equal = torch.stack([one[:shortest] == ids[0][:shortest] for one in ids]).all(0)                # [shortest]
        n = min(int(equal.long().cumprod(0).sum()), shortest - 1)
        shared = len(members) > 1 and not any((one[n:] == picture_token).any() for one in ids)
        heads += [(members, n)] if shared else [([b], len(one)) for b, one in zip(members, ids)]
    if all(len(members) == 1 for members, _ in heads):
        return heads
    return [(members, n if len(members) > 1 else n - 1) for members, n in heads]


def left_padded(pieces: list[dict], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [B, T], mask [B, T] and positions [3, B, T] of texts {"ids", "positions"} which all end in the last column."""
    B, T = len(pieces), max(len(piece["ids"]) for piece in pieces)
    ids, mask, positions = torch.full((B, T), pad), torch.zeros(B, T, dtype=torch.long), torch.zeros(3, B, T, dtype=torch.long)
    for b, piece in enumerate(pieces):
        if n := len(piece["ids"]):
            ids[b, -n:], mask[b, -n:], positions[:, b, -n:] = piece["ids"], 1, piece["positions"]
    return ids, mask, positions


@torch.no_grad()
def generate(student: Student, prompts: list[dict], max_new_tokens: int, samples: int = 1, temperature: float = 1.0,
             uniforms: torch.Tensor | None = None) -> list[list[list[int]]]:
    """`samples` responses to each prompt ({"ids", "positions", "pixels", "grids"}): token ids [prompt][sample], with the end token where it
    was reached. Greedy, or drawn at `temperature` with `uniforms` [prompts x samples, max_new_tokens] in 0..1, one number a token, so that
    a response does not depend on which others share its batch.

    What prompts over the same pictures have in common is encoded once; their tails follow on copies of its key-value cache, at the
    positions that they would have alone. Left padding: all heads end in one column, and so do all tails. Picture tokens cannot be
    generated: the next forward pass would look for a picture behind them.
    """
    model, tokenizer = student.model, student.tokenizer
    device, config = model.device, model.config
    heads = shared_heads(prompts, config.image_token_id)
    firsts = [(prompts[members[0]], n) for members, n in heads]
    ids, mask, positions = left_padded([{"ids": first["ids"][:n], "positions": first["positions"][:, :n]} for first, n in firsts],
                                       tokenizer.pad_token_id)
    out = model(input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device), use_cache=True,
                pixel_values=torch.cat([first["pixels"] for first, _ in firsts]).to(device),
                image_grid_thw=torch.cat([first["grids"] for first, _ in firsts]).to(device), logits_to_keep=1)
    head_of = {b: row for row, (members, _) in enumerate(heads) for b in members}
    cuts = [heads[head_of[b]][1] for b in range(len(prompts))]
    rows = torch.tensor([head_of[b] for b in range(len(prompts))]).repeat_interleave(samples)           # [B = prompts x samples]
    tails = [{"ids": prompt["ids"][n:], "positions": prompt["positions"][:, n:]} for prompt, n in zip(prompts, cuts)]
    ids, tail_mask, positions = (x.repeat_interleave(samples, -2).to(device) for x in left_padded(tails, tokenizer.pad_token_id))
    mask, rows, cache = torch.cat([mask[rows].to(device), tail_mask], 1), rows.to(device), out.past_key_values
    cache.layers = [Roomy(layer, rows, ids.shape[1] + min(max_new_tokens, 128)) for layer in cache.layers]
    if ids.shape[1] == 0:                                                                               # no tails: nothing was shared
        logits = out.logits[rows, -1]                                                                   # [B, V]
    else:
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1]
    position = torch.tensor([int(prompt["positions"].max()) + 1 for prompt in prompts]).repeat_interleave(samples).to(device)
    banned = torch.tensor([config.image_token_id, config.video_token_id, config.vision_start_token_id], device=device)
    done, tokens = torch.zeros(len(rows), dtype=torch.bool, device=device), []
    while True:                                                                                         # `position` is the next token's
        logits = logits.float().index_fill(-1, banned, -torch.inf)
        if uniforms is None:
            token = logits.argmax(-1)
        else:
            below = (logits / temperature).softmax(-1).cumsum(-1)                                       # the token whose share of 0..1 holds u
            u = uniforms[:, len(tokens), None].to(device) * below[:, -1:]
            token = torch.searchsorted(below, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        tokens.append(token.masked_fill(done, tokenizer.pad_token_id))
        done |= token == tokenizer.eos_token_id
        if done.all() or len(tokens) == max_new_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(input_ids=tokens[-1][:, None], attention_mask=mask, position_ids=position.expand(3, -1)[..., None], past_key_values=cache,
                    use_cache=True)
        logits, position = out.logits[:, -1], position + 1
    responses = torch.stack(tokens, 1).tolist()
    ends = [row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row) for row in responses]
    responses = [row[:end] for row, end in zip(responses, ends)]
    return [responses[b * samples:(b + 1) * samples] for b in range(len(prompts))]
# --- end: generation ---


# --- same in 05, 06: the answer grammar and the reward ---
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
ACTION = re.compile(rf"\b(?:move\s+(forward|backward|left|right)\s+({NUMBER})\s*meters{{0,2}}"
                    rf"|turn\s+(left|right)\s+({NUMBER})\s*degrees{{0,2}})\b", re.I)
BOX = re.compile(r"(?:bbox\s*)?\[" + ",".join([rf"\s*(-?{NUMBER})\s*"] * 4) + r"\]", re.I)
# What may not stand beside an answer: digits, and words of a second or a withdrawn answer. Any other text is harmless.
SECOND_ANSWER = re.compile(r"\d|°|move|turn|forward|back|left|right|met(?:er|re)|deg|\b(?:or|not|never|no|yes)\b|n['’]t", re.I)
LIST_MARK = re.compile(r"\A[\s\"'*<>-]*1[.)]\s")  # "1. move ...": one answer written as a list
YES_NO = {"yes": True, "true": True, "no": False, "false": False}
SHAPE = {"A1": "one action", "A2": "one action", "A3": "actions", "D3": "actions", "D1": "box", "S1": "box", "S5": "box",
         "A4": "yes or no", "D2": "yes or no", "D4": "yes or no", "S2": "yes or no", "S6": "yes or no", "S3": "meters", "S4": "degrees"}


def parse_actions(text) -> list[tuple[str, float]] | None:
    """The actions of one answer, [("shift_left", 0.8), ("turn_right", 30.0)], or None when `text` is anything else.

    An action is `move forward|backward|left|right <number> meters` or `turn left|right <number> degrees`, in any case and white
    space, the plural s missing or doubled. What stands between and around is free ("then", "->", "Answer:") as long as it
    holds no digit, no part of another action and no "or" or "not": so "remove forward 2 meters" is no answer.
    """
    if not isinstance(text, str) or SECOND_ANSWER.search(LIST_MARK.sub("", ACTION.sub(" ; ", text))):
        return None
    actions = []
    for move, meters, turn, degrees in ACTION.findall(text):
        name = f"turn_{turn}" if turn else f"shift_{move}" if move.lower() in ("left", "right") else move
        actions.append((name.lower(), float(degrees or meters)))
    return actions or None


def parse_box(text) -> tuple[list[float], bool] | None:
    """([x1, y1, x2, y2] as written, whether it stands alone) for one box, `[412, 300, 530, 611]` or `bbox [...]`; else None."""
    if not isinstance(text, str) or len(found := list(BOX.finditer(text))) != 1:
        return None
    rest = text[:found[0].start()] + text[found[0].end():]
    if re.search(r"\d|\b(?:or|not)\b", rest.replace("bbox_2d", ""), re.I):  # bbox_2d: the key of Qwen's own JSON boxes
        return None
    return [float(number) for number in found[0].groups()], not rest.strip()


def canonical(text) -> str:
    """Lower case, single spaces, without the punctuation at the end."""
    return " ".join(text.lower().split()).rstrip(" .,;:!?\"") if isinstance(text, str) else ""


def parse_yes_no(text) -> bool | None:
    """`yes`, `true` -> True; `no`, `false` -> False, in any case and with punctuation behind; any other text is None."""
    return YES_NO.get(canonical(text))


def parse_quantity(text, unit: str) -> float | None:
    """The number of `2.3 meters` or `2.3` (unit "meters"), `40 degrees` or `40` (unit "degrees"); any other text is None."""
    match = re.fullmatch(rf"(-?{NUMBER})\s*(?:{unit[:-1]}s?)?", canonical(text))
    return float(match[1]) if match else None


def closeness(error: float, unit: str) -> float:
    """1 up to an error of 0.5 m or 5 degrees, 0 from 5 m or 90 degrees, linear between."""
    full, none = (5.0, 90.0) if unit == "degrees" else (0.5, 5.0)
    return min(1.0, max(0.0, (none - error) / (none - full)))


def same_action(true, said) -> float | None:
    """The closeness of two actions' values, or None when their names differ."""
    if true[0] != said[0]:
        return None
    return closeness(abs(true[1] - said[1]), "degrees" if true[0].startswith("turn") else "meters")


def sides(box) -> list[float]:
    """The box with x1 <= x2 and y1 <= y2, clipped to the picture (0..1000)."""
    x1, y1, x2, y2 = [min(1000.0, max(0.0, value)) for value in box]
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


def box_iou(a, b) -> float:
    """Intersection over union of two boxes [x1, y1, x2, y2], sorted and clipped first; 0 when their union is empty."""
    a, b = sides(a), sides(b)
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def box_reward(true, said, alone: bool) -> dict:
    """0.20 format + 0.15 validity + 0.65 geometry. All boxes in 0..1000.

    validity = 0.7 (x1 < x2 and y1 < y2) + 0.3 max(0, 1 - overflow / 200), overflow = mean distance of the four from 0..1000
    geometry = (0.45 IoU + 0.20 center + 0.20 l1 + 0.15 size) (0.3 + 0.7 validity), on the sorted and clipped boxes
    center = max(0, 1 - distance / max(80, 0.6 diagonal of the true box)), l1 = max(0, 1 - mean |difference| / 180)
    size = max(0, 1 - (|ln w/w*| + |ln h/h*|) / 1.6), sides at least 1
    """
    overflow = sum(max(0.0, -value, value - 1000.0) for value in said) / 4
    validity = 0.7 * (said[0] < said[2] and said[1] < said[3]) + 0.3 * max(0.0, 1 - overflow / 200)
    a, b = sides(true), sides(said)
    distance = math.hypot((b[0] + b[2] - a[0] - a[2]) / 2, (b[1] + b[3] - a[1] - a[3]) / 2)
    center = max(0.0, 1 - distance / max(80.0, 0.6 * math.hypot(a[2] - a[0], a[3] - a[1])))
    l1 = max(0.0, 1 - sum(abs(x - y) for x, y in zip(a, b)) / 4 / 180)
    size = max(0.0, 1 - sum(abs(math.log(max(1.0, b[i + 2] - b[i]) / max(1.0, a[i + 2] - a[i]))) for i in (0, 1)) / 1.6)
    form, iou = 1.0 if alone else 0.4, box_iou(a, b)
    geometry = (0.45 * iou + 0.20 * center + 0.20 * l1 + 0.15 * size) * (0.3 + 0.7 * validity)
    overall = 0.20 * form + 0.15 * validity + 0.65 * geometry
    return {"overall": overall, "format": form, "validity": validity, "geometry": geometry,
            "iou": iou, "center": center, "size": size, "l1": l1}


def sequence_reward(true, said) -> dict:
    """0.10 format + 0.25 action + 0.35 order + 0.30 numeric - 0.03 for every action too many, not below 0; n = true length.

    action = multiset overlap of the names / longer length
    order = same name at the same place / n, numeric = closeness of the values there / n
    """
    shared = sum((Counter(name for name, _ in true) & Counter(name for name, _ in said)).values())
    close = [value for value in map(same_action, true, said) if value is not None]
    action, order, numeric = shared / max(len(true), len(said)), len(close) / len(true), sum(close) / len(true)
    overall = 0.10 + 0.25 * action + 0.35 * order + 0.30 * numeric - 0.03 * max(0, len(said) - len(true))
    return {"overall": max(0.0, overall), "format": 1.0, "action": action, "order": order, "numeric": numeric}


def reward(task_type, answer, response) -> dict:
    """{"overall": 0..1, parts...} of a response to a question with the true `answer`; overall -1 beyond 200 characters.

    A1 A2     0.10 format + 0.35 action + 0.55 numeric     (the name; the closeness of the value where the name is right)
    A3 D3     sequence_reward        D1 S1 S5  box_reward
    A4 D2 D4 S2 S6  0.20 format + 0.80 accuracy               (yes = true, no = false)
    S3 S4     0.10 format + 0.90 numeric                   (S4: the error around the circle)
    For one well-formed answer this is the published reward. That one takes the best of several actions, the first of several
    boxes, an action out of the middle of a word; here a response that is not ONE answer earns 0, less than an honest wrong one,
    which has its format. Harmless words around one answer keep what the published reward pays. Any other task type: 1 for the
    same text, else 0. Any object is accepted for all three; nothing raises.
    """
    task_type = task_type.strip() if isinstance(task_type, str) else ""
    if isinstance(response, str) and len(response.strip()) > 200:
        return {"overall": -1.0, "format": 0.0}
    shape = SHAPE.get(task_type)
    if shape is None:
        same = float(canonical(response) == canonical(answer) != "")
        return {"overall": same, "format": same, "accuracy": same}
    if shape == "box":
        true, said = parse_box(answer), parse_box(response)
        if true is None or said is None:
            return dict.fromkeys(("overall", "format", "validity", "iou", "center", "size", "l1", "geometry"), 0.0)
        return box_reward(true[0], *said)
    if shape == "yes or no":
        true, said = parse_yes_no(answer), parse_yes_no(response)
        known, right = float(true is not None and said is not None), float(said is not None and true == said)
        return {"overall": 0.20 * known + 0.80 * right, "format": known, "accuracy": right}
    if shape in ("meters", "degrees"):
        true, said = parse_quantity(answer, shape), parse_quantity(response, shape)
        if true is None or said is None:
            return {"overall": 0.0, "format": 0.0, "numeric": 0.0}
        error = abs((said - true + 180) % 360 - 180) if shape == "degrees" else abs(said - true)
        return {"overall": 0.10 + 0.90 * closeness(error, shape), "format": 1.0, "numeric": closeness(error, shape)}
    true, said = parse_actions(answer), parse_actions(response)
    if true is None or said is None or shape == "one action" and len(said) > 1:
        return dict.fromkeys(("overall", "format", "action", "numeric", "order")[:5 if shape == "actions" else 4], 0.0)
    if shape == "actions":
        return sequence_reward(true, said)
    close = same_action(true[0], said[0])
    action, numeric = float(close is not None), close or 0.0
    return {"overall": 0.10 + 0.35 * action + 0.55 * numeric, "format": 1.0, "action": action, "numeric": numeric}
# --- end of the reward block ---


def refine_memory(model: torch.nn.Module, cfg: Config, processes: int) -> dict[str, float]:
    """`memory` and what only this stage holds: the student as it came, the copy that answers where FSDP shards, the cache of a rollout."""
    text, size = model.config.text_config, torch.empty((), dtype=weights_dtype(cfg)).element_size()
    plain, tower = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name), sum(p.numel() for p in model.model.visual.parameters())
    cached = cfg.rollout * cfg.group * (cfg.tokens // cfg.prompts + cfg.max_new_tokens)
    extra = {"start": size * (plain if cfg.train == "full" else 0 if cfg.freeze_vision else tower),
             "cache": cached * 2 * text.num_key_value_heads * head_width(text) * text.num_hidden_layers * (2 if cfg.dtype == "bfloat16" else 4)}
    if processes > 1 or cfg.offload:
        extra["speaker"] = size * plain
    return memory(model, cfg, cfg.tokens, processes, extra)


# Group-relative policy optimisation ----------------------------------------------------------------------------------------------------

def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards [questions, G] -> how much better than its group each response is, in standard deviations; a group of equals teaches nothing.

    >>> advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]]))[1].tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


def grpo_loss(logprob: torch.Tensor, old: torch.Tensor, reference: torch.Tensor, advantage: torch.Tensor, weight: torch.Tensor,
              clip_ratio: float, kl: float) -> tuple[torch.Tensor, dict]:
    """Equation 3 of DeepSeekMath (arXiv 2402.03300) over N response tokens; every argument is [N].

    `weight` is 1 / (tokens of the response x responses in the batch). KL is the low-variance estimator e^d - d - 1, d = reference - logprob.
    """
    ratio = (logprob - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantage)
    d = reference - logprob
    divergence = d.exp() - d - 1
    clipped = ((ratio - 1).abs() > clip_ratio).float()
    parts = {"kl": (divergence * weight).sum().detach(), "clipped": (clipped * weight).sum().detach()}
    return ((kl * divergence - gain) * weight).sum(), parts


@contextmanager
def as_it_came(model: torch.nn.Module, tower: torch.nn.Module | None):
    """Inside, every LoRA is switched off and `tower`, a copy made before training, stands for the vision tower (None: it is frozen)."""
    layers = [module for module in model.modules() if isinstance(module, LoRA)]
    scales, trained = [layer.scale for layer in layers], model.model.visual
    for layer in layers:
        layer.scale = 0.0
    model.model.visual = tower or trained
    yield
    model.model.visual = trained
    for layer, scale in zip(layers, scales):
        layer.scale = scale


@torch.no_grad()
def reference_logprobs(student: Student, start: torch.nn.Module | None, rows: list[dict], train: str) -> torch.Tensor:
    """log p of the response tokens under the student that came in. `start` is its frozen copy where all weights train, of its tower with lora."""
    if train == "full":
        return token_logprobs(replace(student, model=start), rows)
    with as_it_came(student.model, start):
        return token_logprobs(student, rows)


# Rollout -------------------------------------------------------------------------------------------------------------------------------

def open_prompts(student: Student, questions: list[dict]) -> list[dict]:
    """Questions -> prompts without their answers. A picture that does not open costs its question, by name."""
    prompts = []
    for question in questions:
        try:
            pixels, grids = look(student, question["images"])
            encoded = encode(student, question, grids)
        except (OSError, ValueError) as error:
            print(f"{name_of(question)}: skipped, {error}", file=sys.stderr)
            continue
        n = encoded["prompt"]
        prompts.append({"ids": encoded["ids"][:n], "positions": encoded["positions"][:, :n], "pixels": pixels, "grids": grids, "question": question})
    return prompts


def uniform_numbers(cfg: Config, step: int, prompt: dict) -> torch.Tensor:
    """The random numbers of one question's responses [G, max_new_tokens]: from (seed, step, question), whichever process draws them."""
    key = repr((cfg.seed, step, prompt["question"]["written"], prompt["question"]["messages"])).encode()
    seed = int.from_bytes(hashlib.sha256(key).digest()[:7], "big")
    return torch.rand(cfg.group, cfg.max_new_tokens, generator=torch.Generator().manual_seed(seed))


def roll_out(student: Student, prompts: list[dict], step: int, cfg: Config) -> list[dict]:
    """Sample a group of responses to each prompt, in batches of prompts of like length; adds `tokens`, `texts` and `scores` to each."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]["ids"]))
    answered = [None] * len(prompts)
    for start in range(0, len(order), cfg.rollout):
        part = order[start:start + cfg.rollout]
        uniforms = torch.cat([uniform_numbers(cfg, step, prompts[i]) for i in part])
        groups = generate(student, [prompts[i] for i in part], cfg.max_new_tokens, cfg.group, cfg.temperature, uniforms)
        for i, group in zip(part, groups):
            question = prompts[i]["question"]
            texts = [student.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in group]
            scores = [reward(question["task_type"], question["messages"][-1]["content"], text) for text in texts]
            answered[i] = prompts[i] | {"tokens": group, "texts": texts, "scores": scores}
    return answered


def rows_of(student: Student, answered: list[dict], gains: torch.Tensor, responses: int, most: int) -> list[dict]:
    """One row a question: its prompt once, then its responses. Each row carries the advantage and weight of every response token."""
    rows = []
    for prompt, gain in zip(answered, gains):
        n, last = len(prompt["ids"]), int(prompt["positions"].max())
        encoded = [{"ids": torch.cat([prompt["ids"], torch.tensor(tokens)]), "prompt": n, "name": name_of(prompt["question"]),
                    "positions": torch.cat([prompt["positions"], (last + 1 + torch.arange(len(tokens))).expand(3, -1)], 1)}
                   for tokens in prompt["tokens"]]
        start = 0
        for row in share(encoded, prompt["pixels"], prompt["grids"], student.model.config.image_token_id, most):
            lengths = torch.tensor([len(tokens) for tokens in prompt["tokens"][start:start + row["questions"]]])
            rows.append(row | {"advantage": gain[start:][row["owner"]], "weight": 1 / (lengths[row["owner"]] * responses)})
            start += row["questions"]
    return rows


def spare_rows(student: Student) -> list[dict]:
    """A row of no weight, about a grey picture: what a process computes while others still have rows."""
    seen = student.image_processor(images=[Image.new("RGB", (56, 56), (127, 127, 127))], return_tensors="pt")
    question = {"task_type": "spare", "images": ["grey"], "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": ""}]}
    encoded = encode(student, question, seen["image_grid_thw"])
    prompt = {"ids": encoded["ids"][:encoded["prompt"]], "positions": encoded["positions"][:, :encoded["prompt"]], "pixels": seen["pixel_values"],
              "grids": seen["image_grid_thw"], "question": question, "tokens": [[student.tokenizer.eos_token_id]]}
    return [row | {"weight": 0 * row["weight"]} for row in rows_of(student, [prompt], torch.zeros(1, 1), 1, 0)]


def learn(student: Student, start: torch.nn.Module | None, parts: list[dict], cfg: Config, device: str) -> tuple[torch.Tensor, list[str]]:
    """The gradient of the loss over a step's micro-batches. Returns loss, KL and clipped share [3], and the questions whose loss is no number.

    Each of `parts` holds rows, their advantages and weights; the first update adds old and reference log-probabilities to it: it starts from
    the weights that answered.
    """
    sums, broken = torch.zeros(3, device=device), []
    for part in parts:
        with torch.autocast(student.model.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            logprob = token_logprobs(student, part["rows"])
            if "old" not in part:
                part["old"], part["reference"] = logprob.detach(), reference_logprobs(student, start, part["rows"], cfg.train)
        loss, measured = grpo_loss(logprob, part["old"], part["reference"], part["advantage"], part["weight"], cfg.clip_ratio, cfg.kl)
        (loss * (dist.get_world_size() if dist.is_initialized() else 1)).backward()  # FSDP takes the mean over processes, the loss is a sum
        sums += torch.stack([loss.detach(), measured["kl"], measured["clipped"]])
        if not sums.isfinite().all():
            broken += [name for row in part["rows"] for name in row["names"][:1]]
    return sums, broken


def main(cfg: Config):
    started, run = time.perf_counter(), Path(cfg.run)
    folder, data = run / cfg.out, run / cfg.data
    rank, world, device = start_processes(folder, cfg.offload)
    root = Path(cfg.data_root) if cfg.data_root else run if data.resolve().is_relative_to(run.resolve()) else data.parent
    source = str(run / cfg.student) if (run / cfg.student).is_dir() else cfg.student
    if cfg.dtype == "auto":
        cfg = replace(cfg, dtype="bfloat16" if device != "cpu" and torch.cuda.is_bf16_supported() else "float32")
    if cfg.estimate:
        if rank:
            return
        say_memory(model := on_meta(source, cfg), refine_memory(model, cfg, world), source)
        row = pair_of_pictures(model, cfg.max_pixels, 70, [15] * cfg.group, 15)
        once = flops(model, [row], cfg.train, cfg.freeze_vision) / 1e12
        return print(f"{cfg.group} responses of 15 tokens about 2 pictures of {cfg.max_pixels:,} pixels: {(cfg.updates + 1 / 3) * once:.1f} TFLOP of update, "
                     f"some {once / 3:.1f} of rollout")
    meta = None
    if rank == 0:
        config = {name: value for name, value in asdict(cfg).items() if name not in BY_THE_WAY}
        meta = begin(folder, config, Path(source) if (Path(source) / "meta.json").is_file() else None)
        say_memory(model := on_meta(source, cfg), refine_memory(model, cfg, world), source)
    if world > 1:
        dist.barrier()

    # the student, what it was when it came, and one that answers
    sharded = dist.is_initialized()
    student = load_student(source, weights_dtype(cfg), "cpu" if sharded else device, cfg.attention, cfg.max_pixels)
    student.model.eval()
    start = copy.deepcopy(student.model if cfg.train == "full" else student.model.model.visual) if cfg.train == "full" or not cfg.freeze_vision else None
    torch.manual_seed(cfg.seed)
    choose_trained(student.model, cfg)
    speaker = student
    if sharded:  # responses end when they like: each process answers with a whole copy, in its own time
        speaker = load_student(source, weights_dtype(cfg), device, cfg.attention, cfg.max_pixels)
        speaker.model.eval()
        shard(student.model, device, cfg.dtype, cfg.offload)
        start = start and start.to(device)
    optimizers = make_optimizers(student.model, cfg)
    spare = spare_rows(student)

    questions = read_questions(data, root)
    if missing := set(cfg.tasks) - {question["task_type"] for question in questions}:
        stop(f"{data} holds no usable question of {' '.join(sorted(missing))}: name other --tasks, or other --data")
    questions = [question for question in questions if not cfg.tasks or question["task_type"] in cfg.tasks]
    if not questions:
        stop(f"{data} holds no usable question")
    steps = cfg.steps or math.ceil(cfg.epochs * len(questions) / cfg.prompts)
    epochs = (np.random.default_rng([cfg.seed, epoch]).permutation(len(questions)) for epoch in itertools.count())
    order = (questions[i] for epoch in epochs for i in epoch)
    plan = iter(lambda: list(itertools.islice(order, cfg.prompts)), None)
    first = load_step(folder, student.model, optimizers)
    if rank == 0:
        keep_lines(folder / "metrics.jsonl", first)
        keep_lines(folder / "rollouts.jsonl", first)
        print(f"{device} x {world}, {cfg.dtype}; {len(questions):,} questions, {steps:,} steps of {cfg.prompts} questions x {cfg.group} responses"
              + (f", resumed after step {first:,}" if first else ""), flush=True)

    clock, norms = time.perf_counter(), []
    for step, batch in enumerate(itertools.islice(plan, first, steps), first):
        tick = time.perf_counter()
        prompts = open_prompts(student, batch[rank::world])
        if speaker is not student:
            weights = dict(speaker.model.named_parameters())
            for name, tensor in merged(student.model):
                if name in weights:
                    weights[name].data.copy_(tensor)
        with torch.autocast(student.model.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            answered = roll_out(speaker, prompts, step, cfg)
        rolled = time.perf_counter() - tick
        rewards = torch.tensor([[score["overall"] for score in prompt["scores"]] for prompt in answered]).reshape(-1, cfg.group)
        responses = torch.tensor(rewards.numel(), device=device)
        all_sum(responses)
        rows = rows_of(student, answered, advantages(rewards), max(1, int(responses)), cfg.tokens)
        parts = [{"rows": part} | {name: torch.cat([row[name] for row in part]).to(device) for name in ("advantage", "weight")}
                 for part in as_many(micro_batches(rows, cfg.tokens, cfg.attention != "world2vlm"), spare, device)]
        for i in range(cfg.updates):
            sums, broken = learn(student, start, parts, cfg, device)
            all_sum(sums)
            norms.append(clip_gradients(student.model, cfg.clip))
            if why := diverged(float(sums.sum()), norms, cfg.explode, cfg.clip):
                give_up(folder, step + 1, why, broken or [row["names"][0] for row in rows])
            if i == 0 and step > first and step % cfg.save_every == 0:  # weights that have just given a sound loss and gradient
                save_step(folder, step, student, optimizers, cfg, rank)
            take_step(optimizers, rate(cfg, step, steps))

        by_task = torch.zeros(len(TASKS), 2, device=device)  # sum of rewards, responses
        for prompt, row in zip(answered, rewards):
            if prompt["question"]["task_type"] in TASKS:
                by_task[TASKS.index(prompt["question"]["task_type"])] += torch.tensor([row.sum(), len(row)], device=device)
        # a reference pass costs a third of a training pass; generation is not counted
        operations = (cfg.updates + 1 / 3) * flops(student.model, rows, cfg.train, cfg.freeze_vision)
        totals = torch.tensor([rewards.sum(), sum(len(t) for prompt in answered for t in prompt["tokens"]), sum(len(row["ids"]) for row in rows),
                               operations], dtype=torch.float64, device=device)
        all_sum(by_task, totals)
        reward_sum, generated, tokens, operations = totals.tolist()
        seconds = time.perf_counter() - tick
        line = {"step": step + 1, "reward": reward_sum / max(1, int(responses)), "loss": float(sums[0]), "kl": float(sums[1]), "clipped": float(sums[2]),
                "length": generated / max(1, int(responses)), "grad_norm": norms[-1],
                "rewards": {task: float(total / n) for task, (total, n) in zip(TASKS, by_task.tolist()) if n},
                "seconds": round(seconds, 3), "rollout_seconds": round(rolled, 3)} | speed(operations, int(tokens), seconds - rolled, device, world)
        last = step + 1 == steps
        if rank == 0:
            append(folder / "metrics.jsonl", line)
            if answered:
                example = answered[0]
                shown = {"step": step + 1, "question": example["question"]["messages"][0]["content"], "images": example["question"]["written"],
                         "answer": example["question"]["messages"][-1]["content"],
                         "responses": [[text, score["overall"]] for text, score in zip(example["texts"], example["scores"])]}
                append(folder / "rollouts.jsonl", shown)
                if step % cfg.show_every == 0:
                    print(f"  {shown['question']}\n  true: {shown['answer']}\n" + "".join(f"  {score:6.3f}  {text!r}\n" for text, score in
                          shown["responses"]), end="", flush=True)
            if last or (step + 1) % cfg.log_every == 0:
                pace = (time.perf_counter() - clock) / (step + 1 - first)
                print(f"step {step + 1:>5}/{steps}  reward {line['reward']:.4f}  KL {line['kl']:.5f}  clipped {line['clipped']:.3f}  |g| {norms[-1]:6.3f}  "
                      f"length {line['length']:5.1f}  {int(responses) / seconds:6.1f} responses/s  ETA {pace * (steps - step - 1) / 60:5.1f} min", flush=True)

    save_end(folder, student, cfg, rank)
    say_peak(device, rank)
    if rank == 0:
        draw_curves(folder, {"mean reward": ["reward"], "reward by task": ["rewards"], "KL from the start": ["kl"], "share of tokens clipped": ["clipped"],
                             "tokens of a response": ["length"], "gradient norm": ["grad_norm"]})
        finish(folder, meta, {"steps": steps, "questions": len(questions)}, started)
        drop_steps(folder)
        print(f"next: python 06_eval.py --run {cfg.run} --checkpoint {cfg.out}")
    if sharded:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.argv[1:1] = recipe()
    run(main, Config)
