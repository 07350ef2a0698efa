"""Stage 4: post-train the student on questions whose answers the world model taught (SFT).

A question brings two pictures and a few words, and six or more questions ask about the same pictures. So the pictures are encoded
once: a row is  prefix | question 1 answer 1 | question 2 answer 2 | ...,  every token keeps the position id that it has when its
question stands alone, and an attention mask lets it see the prefix and its own question only. The loss,

    L = - sum over answer tokens of log p(token | pictures, question, answer so far) / number of answer tokens in the batch,

and its gradients are those of the unshared batch, at a fraction of the work (--no_share shows it).

Rows lie behind one another in one packed row of --tokens, without padding, each attending within itself.

Departs from the paper: shared prefixes; a tiny student (--student tiny) that trains from random weights on a CPU, with Muon.

Reads   3_qa/sft.jsonl (or any ms-swift / LLaMA-Factory / World2VLM file with `messages` and `images`)
        {"task_type": "A2", "messages": [{"role": "user", "content": "<image><image>..."}, {"role": "assistant", "content":
        "turn left 40 degrees"}], "images": ["2_views/room_00001/t000/000.png", ...], ...}
Writes  4_sft/: config.json, model.safetensors, tokenizer and processor files (an ordinary Hugging Face checkpoint, LoRA merged),
        adapter/ (PEFT format, with --train lora), metrics.jsonl, curves.png, meta.json; on the way step_N/, the same checkpoint with what
        resuming needs in step_N/state/
        {"step": 120, "loss": 1.03, "lr": 0.00098, "grad_norm": 0.71, "questions": 131, "answers": 1340, "tokens": 5120, "seconds": 0.84,
         "tokens_s": 6095.2, "tflops": 0.081}

metrics: loss = mean -log p of an answer token; lr = AdamW's; grad_norm = before clipping; answers = answer tokens, tokens = all tokens of the
         step after sharing; tokens_s = tokens a second; tflops = counted operations a second, of all processes; mfu = their share of
         the card's peak, where it is known; val_loss = the same loss on training scenes kept aside.

Run     python 04_train_sft.py --run runs/demo --student Qwen/Qwen2.5-VL-7B-Instruct        (the paper's settings are the defaults)
        torchrun --nproc-per-node 8 -- 04_train_sft.py --run runs/demo --student ...           (FSDP2: the same loss on eight processes)
        python 04_train_sft.py --student FOLDER --estimate                                  (what memory it will take)

What to change. Full fine-tuning: --train full (--freeze_vision False for the tower too; float32 weights, see --estimate). Another place for the
LoRA: the condition in `choose_trained`. Another loss, say a weight by task: a number in `rows_of` beside "name", and one factor in
`loss_of`. Another order of questions, a curriculum: `batches`, which yields lists of groups for ever. Other optimisers: `make_optimizers`.
"""
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
import socket
import struct
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
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
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, HfArgumentParser,
                          PaddleOCRVLProcessor, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration)
from transformers.utils import cached_file, logging

from kernels import patches_in_one_product, register, windows_in_one_launch

logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints of one process say so each time
BY_THE_WAY = ("run", "recipe", "tokens", "checkpointing", "offload", "explode", "estimate", "until", "save_every", "log_every")  # settings that do not change the result

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


# Shapes: B rows, T tokens of a row, N answer tokens of a batch, P patches of all pictures, V vocabulary.


@dataclass
class Config:
    recipe: Literal["paper", "tiny"] = setting("paper", "paper (the defaults below) or tiny (RECIPES below): flags that your own override")
    run: str = setting("runs/demo", "run folder; reads 3_qa/ in it")
    out: str = setting("4_sft", "folder written inside the run: another name for another stage of training, e.g. 4_base")
    student: str = setting("tiny", "checkpoint folder, hub id, or tiny: a Qwen3-VL of 3 million parameters built here from random weights")
    data: str = setting("3_qa/sft.jsonl", "questions: a file in the run, or any ms-swift / LLaMA-Factory / World2VLM JSONL file")
    data_root: str = setting("", "folder that picture paths start from and may not leave; default: the run, for a file outside it that file's folder")
    rehearse: str = setting("", "second question file mixed in, so that what it taught is not forgotten (the demo rehearses the static questions)")
    rehearse_share: float = setting(0.33, "share of each batch that comes from --rehearse")
    train: Literal["lora", "full"] = setting("lora", "lora (rank and alpha below, on the language model's linear layers, as in the paper) or full")
    lora_rank: int = setting(256, "LoRA rank; the paper's")
    lora_alpha: int = setting(512, "LoRA alpha: the update is scaled by alpha / rank; the paper's")
    freeze_vision: bool = setting(True, "keep the vision tower as it is, as in the paper's first stage")
    share: bool = setting(True, "encode the pictures once for all questions about them; --no_share gives every question its own row (same loss)")
    share_at_most: int = setting(16, "questions about one picture list in one step; the rest of them come in other steps")
    batch: int = setting(128, "questions in an optimiser step, over all processes; the paper's global batch")
    tokens: int = setting(16384, "tokens in one forward pass, rows packed behind one another; bounds memory, does not change the result")
    epochs: float = setting(1.0, "passes over --data")
    steps: int = setting(0, "optimiser steps; 0: as --epochs says")
    optimizer: Literal["adamw", "muon"] = setting("adamw", "adamw, or muon: Muon on the matrices, AdamW on the rest; learns a student from random weights several times faster")
    lr: float = setting(1e-5, "peak learning rate of AdamW; the paper's")
    muon_lr: float = setting(3e-3, "peak learning rate of Muon")
    schedule: Literal["cosine", "constant"] = setting("cosine", "cosine (to zero) or constant after the warm-up; constant suits a base that another stage goes on training")
    warmup: float = setting(0.05, "share of the steps in which the learning rate rises from zero")
    weight_decay: float = setting(0.1, "decoupled weight decay on matrices")
    beta1: float = setting(0.9, "AdamW")
    beta2: float = setting(0.95, "AdamW")
    mean: Literal["token", "answer"] = setting("token", "what weighs the same in the loss: every answer token, as usual, or every answer; else `yes` "
                                               "weighs a tenth of a box, and questions with such answers are learnt late")
    clip: float = setting(1.0, "largest norm of the gradient")
    max_pixels: int = setting(1_003_520, "pixels of a picture at most; larger ones are scaled down")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "arithmetic: bfloat16, float32, or auto (bfloat16 on a GPU that has it, float32 on a CPU)")
    save_dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "of the weights written: bfloat16 (half the size), float32, or auto (as they are kept here)")
    attention: str = setting("world2vlm", "world2vlm (kernels/; plain torch on a CPU), or one of transformers: sdpa, eager")
    checkpointing: bool = setting(True, "recompute activations in the backward pass: less memory, about a third more time")
    offload: bool = setting(False, "keep weights, gradients and optimiser state in host memory (FSDP2); each layer is copied when it is needed")
    explode: float = setting(100.0, "stop when the gradient's norm passes this many times the median of the last 100 steps, and of --clip")
    estimate: bool = setting(False, "print the memory estimate and stop; the student's config.json is enough")
    until: int = setting(0, "leave off after this step, as a kill would: the same command without it goes on; 0: train to the end")
    val_share: float = setting(0.01, "share of the scenes kept out of training for the validation loss")
    val_every: int = setting(200, "steps between validation losses; 0: never")
    save_every: int = setting(200, "steps between states to resume from")
    log_every: int = setting(10, "steps between printed lines; metrics.jsonl has every step")
    seed: int = setting(0, "seed of the order of questions and of new weights")


RECIPES = {"paper": "", "tiny": "--train full --freeze_vision False --optimizer muon --lr 2e-3 --muon_lr 8e-3 --tokens 6000 --log_every 20 --no_checkpointing"}


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


def rows_of(student: Student, groups: list[list[dict]], shared: bool, most: int) -> list[dict]:
    """Look at each group's pictures once, encode its questions, share their prefix. A picture that does not open costs its group, by name."""
    rows = []
    for group in groups:
        encoded = []
        try:
            pixels, grids = look(student, group[0]["images"])
        except (OSError, ValueError) as error:
            print(f"{len(group)} questions skipped: {error}", file=sys.stderr)
            continue
        for question in group:
            try:
                encoded.append(encode(student, question, grids) | {"name": name_of(question)})
            except ValueError as error:
                print(f"{name_of(question)}: skipped, {error}", file=sys.stderr)
        for part in ([encoded] if encoded else []) if shared else [[one] for one in encoded]:
            rows += share(part, pixels, grids, student.model.config.image_token_id, most)
    return rows


def spare_row(student: Student) -> dict:
    """A row of no weight, about a grey picture: what a process computes while others still have rows."""
    seen = student.image_processor(images=[Image.new("RGB", (56, 56), (127, 127, 127))], return_tensors="pt")
    record = {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "no"}]}
    row, = share([encode(student, record, seen["image_grid_thw"])], seen["pixel_values"], seen["image_grid_thw"], student.model.config.image_token_id, 0)
    return row | {"weight": 0.0}


def ahead(items):
    """The items of an iterator, the next one computed in a thread while this one is used: pictures are read while the last batch trains."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def in_validation(question: dict, share_of_scenes: float) -> bool:
    """By scene, by a hash: the same scenes whatever else is in the file."""
    scene = str(question["scene_id"] if "scene_id" in question else question["written"][0])
    return int(hashlib.sha256(scene.encode()).hexdigest(), 16) % 10_000 < 10_000 * share_of_scenes


def token_weights(row: dict, mean: str) -> torch.Tensor:
    """[answer tokens of the row] 1 each, or with mean "answer" one over the number of tokens in its answer; 0 in a spare row."""
    owner = row["owner"]
    return (1 / torch.bincount(owner)[owner] if mean == "answer" else torch.ones(len(owner))) * row.get("weight", 1.0)


def loss_of(student: Student, parts: list[list[dict]], cfg: Config, count: float, backward: bool) -> tuple[float, list[str]]:
    """Sum over the answer tokens of -log p by weight, divided by `count`, the sum of the weights in the whole batch; and the questions whose own
    loss is no number."""
    total, broken = 0.0, []
    for part in parts:
        with torch.autocast(student.model.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            logprobs = token_logprobs(student, part)
            loss = -(logprobs * torch.cat([token_weights(row, cfg.mean) for row in part]).to(logprobs)).sum() / count
        if backward:
            (loss * (dist.get_world_size() if dist.is_initialized() else 1)).backward()  # FSDP takes the mean over processes, the loss is a sum
        total += float(loss.detach())
        if not math.isfinite(total):
            for row, values in zip(part, logprobs.detach().split([len(row["target"]) for row in part])):
                broken += [row["names"][k] for k in row["owner"][~values.isfinite().cpu()].unique()]
    return total, broken


@torch.no_grad()
def validate(student: Student, parts: list[list[dict]], cfg: Config, device: str) -> float:
    """The training loss on the validation questions of all processes."""
    student.model.eval()
    count = torch.tensor(sum(float(token_weights(row, cfg.mean).sum()) for part in parts for row in part), device=device)
    total = torch.tensor(loss_of(student, parts, cfg, 1, backward=False)[0], device=device)
    all_sum(count, total)
    return float(total / count)


def main(cfg: Config):
    started, run = time.perf_counter(), Path(cfg.run)
    folder, data = run / cfg.out, run / cfg.data
    rank, world, device = start_processes(folder, cfg.offload)
    root = Path(cfg.data_root) if cfg.data_root else run if data.resolve().is_relative_to(run.resolve()) else data.parent
    if cfg.dtype == "auto":
        cfg = replace(cfg, dtype="bfloat16" if device != "cpu" and torch.cuda.is_bf16_supported() else "float32")
    source = str(folder / "tiny") if cfg.student == "tiny" else str(run / cfg.student) if (run / cfg.student).is_dir() else cfg.student
    if cfg.estimate:
        if rank:
            return
        say_memory(model := on_meta(source, cfg), memory(model, cfg, cfg.tokens, world), source)
        shared, alone = (questions * flops(model, [pair_of_pictures(model, cfg.max_pixels, 10, rests, 15)], cfg.train, cfg.freeze_vision) / 1e12
                         for questions, rests in ((1, [75] * 6), (6, [75])))
        return print(f"6 questions of 60 tokens, answers of 15, about 2 pictures of {cfg.max_pixels:,} pixels: {shared:.1f} TFLOP, unshared {alone:.1f}")
    meta = None
    if rank == 0:
        config = {name: value for name, value in asdict(cfg).items() if name not in BY_THE_WAY}
        parent = data.parent if (data.parent / "meta.json").is_file() else None  # a file from elsewhere has no history to carry on
        meta = begin(folder, config, parent)
        if cfg.student == "tiny" and not (folder / "tiny").is_dir():
            texts = [message["content"] for path in sorted(data.parent.glob("*.jsonl")) if path.stem != "heldout"
                     for question in read_questions(path, root) for message in question["messages"]]
            shutil.rmtree(folder / "tiny.part", ignore_errors=True)
            build_tiny(folder / "tiny.part", texts, cfg.seed)
            os.replace(folder / "tiny.part", folder / "tiny")
    if world > 1:
        dist.barrier()

    # the student
    if rank == 0:
        say_memory(model := on_meta(source, cfg), memory(model, cfg, cfg.tokens, world), source)
    sharded = dist.is_initialized()
    student = load_student(source, weights_dtype(cfg), "cpu" if sharded else device, cfg.attention, cfg.max_pixels)
    torch.manual_seed(cfg.seed)
    choose_trained(student.model, cfg)
    if sharded:
        shard(student.model, device, cfg.dtype, cfg.offload)
    optimizers = make_optimizers(student.model, cfg)
    spare, padded = [spare_row(student)], cfg.attention != "world2vlm"

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
    kept_aside = rows_of(student, group_by_pictures(validation, cfg.share_at_most)[rank::world], cfg.share, cfg.tokens)
    kept_aside = as_many(micro_batches(kept_aside, cfg.tokens, padded), spare, device)
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    first = load_step(folder, student.model, optimizers)
    if rank == 0:
        keep_lines(folder / "metrics.jsonl", first)
        print(f"{device} x {world}, {cfg.dtype}; {len(questions):,} questions about {len(groups):,} picture lists, {len(validation):,} for validation; "
              f"{steps:,} steps" + (f", resumed after step {first:,}" if first else ""), flush=True)

    clock, answered, norms = time.perf_counter(), 0, []
    rows_of_steps = (rows_of(student, batch[rank::world], cfg.share, cfg.tokens) for batch in itertools.islice(plan, first, steps))
    for step, rows in enumerate(ahead(rows_of_steps), first):
        tick = time.perf_counter()
        count = torch.tensor([sum(float(token_weights(row, cfg.mean).sum()) for row in rows), sum(len(row["target"]) for row in rows),
                              sum(row["questions"] for row in rows), sum(len(row["ids"]) for row in rows),
                              flops(student.model, rows, cfg.train, cfg.freeze_vision)], dtype=torch.float64, device=device)
        all_sum(count)
        weight, answers, asked, tokens, operations = count.tolist()
        student.model.train()
        parts = as_many(micro_batches(rows, cfg.tokens, padded), spare, device)
        loss, broken = loss_of(student, parts, cfg, max(1, weight), backward=True)
        loss = torch.tensor(loss, device=device)
        all_sum(loss)
        norms.append(clip_gradients(student.model, cfg.clip))
        if why := diverged(float(loss), norms, cfg.explode, cfg.clip):
            give_up(folder, step + 1, why, broken or [name for row in rows for name in row["names"]])
        if step > first and step % cfg.save_every == 0:  # weights that have just given a sound loss and gradient
            save_step(folder, step, student, optimizers, cfg, rank)
        factor = rate(cfg, step, steps)
        take_step(optimizers, factor)
        seconds = time.perf_counter() - tick
        line = {"step": step + 1, "loss": float(loss), "lr": cfg.lr * factor, "grad_norm": norms[-1], "questions": int(asked), "answers": int(answers),
                "tokens": int(tokens), "seconds": round(seconds, 3)} | speed(operations, int(tokens), seconds, device, world)
        last = step + 1 == steps
        if validation and (last or cfg.val_every and (step + 1) % cfg.val_every == 0):
            line["val_loss"] = validate(student, kept_aside, cfg, device)
        if rank == 0:
            answered += int(asked)
            append(folder / "metrics.jsonl", line)
            if last or (step + 1) % cfg.log_every == 0 or "val_loss" in line:
                pace = (time.perf_counter() - clock) / (step + 1 - first)
                print(f"step {step + 1:>6}/{steps}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  |g| {norms[-1]:6.3f}  "
                      f"{answered / (time.perf_counter() - clock):6.1f} questions/s  {line['tokens_s']:8.0f} tokens/s  "
                      + (f"MFU {line['mfu']:.3f}  " if "mfu" in line else "") + f"ETA {pace * (steps - step - 1) / 60:5.1f} min"
                      + (f"  validation {line['val_loss']:.4f}" if "val_loss" in line else ""), flush=True)
        if step + 1 == cfg.until:
            return rank == 0 and print(f"left off after step {step + 1}, as --until says")

    save_end(folder, student, cfg, rank)
    say_peak(device, rank)
    if rank == 0:
        draw_curves(folder, {"loss": ["loss", "val_loss"], "gradient norm": ["grad_norm"], "learning rate": ["lr"], "tokens/s": ["tokens_s"]})
        sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("model.safetensors", "metrics.jsonl")
                if (folder / name).is_file()}  # a large student's weights lie in several files
        finish(folder, meta | {"command": shlex.join(sys.argv), "sha256": sums}, {"steps": steps, "questions": len(questions),
                                                                                  "parameters trained": trained}, started)
        drop_steps(folder)
        print(f"next: python 05_train_refine.py --run {cfg.run}")
    if sharded:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.argv[1:1] = recipe()
    run(main, Config)
