"""Stage 5: refine the student by its own answers (GRPO, DeepSeekMath, arXiv 2402.03300).

It answers each question several times. A response that earns more than the mean of its group is
made likelier, one that earns less is made rarer:

    L = - mean over responses of mean over tokens of  min(r A, clip(r, 1 - e, 1 + e) A) - beta KL
    r = p(token) / p_old(token),  A = (reward - mean of the group) / std of the group
    KL = e^d - d - 1,  d = log p_reference - log p

The greedy answer wins most groups and is made likelier still: with --baseline greedy a response has
to beat it (ReMax, arXiv 2310.10505). --reward grid tells apart what the published reward calls
equal, --scale batch keeps the advantages of near ties small (Dr. GRPO, arXiv 2503.20783), --refills
replaces groups that are all right or all wrong (DAPO, arXiv 2503.14476).

A group shares its prompt: pictures and words are encoded once, in the rollout and in the update.
Departs from the paper: shared prefixes; a reward that a list of all answers does not win, nor one
that is cut off before its end; a frozen vision tower, because bfloat16 loses steps of 1e-6
(--freeze_vision False trains it as published, in float32, which adapter/ then holds, too).

Reads   4_sft/ (or any Qwen-VL checkpoint) and 3_qa/grpo.jsonl (the format of 04)
Writes  5_refine/: adapter/ (PEFT format, float32) over the untouched base, which meta.json names:
        the LoRA of 4_sft/ trained on, which stands alone. With --train full an ordinary Hugging
        Face checkpoint instead, with --merge besides: there bfloat16 loses most of what was
        learned. metrics.jsonl, rollouts.jsonl, curves.png, meta.json; on the way step_N/:
        {"step": 3, "reward": 0.61, "length": 5.2, "truncated": 0.0, "equal": 0.25, "spread": 0.18,
         "rewards": {"A1": 0.55}, "loss": -0.002, "kl": 0.0004, "clipped": 0.0, "entropy": 0.9,
         "grad_norm": 0.8, "seconds": 2.4, "rollout_seconds": 1.1}
        reward: mean over responses; rewards: per task; kl: from the student that came in;
        clipped: share of the tokens whose ratio was clipped; length: tokens of a response, its
        end included; truncated: share of the responses without their end; equal: share of the
        groups without spread, which teach nothing; spread: standard deviation of the reward in a
        group, their mean; entropy: mean of -log p of the tokens drawn, its estimate; grad_norm:
        before clipping; rollout_seconds: of which the answers took; heldout, every 20 steps:
        mean reward, before the step, of greedy answers to the same questions of heldout.jsonl.

    python 05_train_refine.py --run runs/demo
    torchrun --nproc-per-node 8 -- 05_train_refine.py --run runs/demo    # FSDP2

To change the objective: `advantages`, `keep_group`, `grpo_loss`, and the weights in `rows_of`;
tests/forks/dapo.patch does. Another reward: `reward`, at the end.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import resource
import shutil
import sys
import time
from collections import Counter
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
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.utils import cached_file, logging

from kernels.lora import add_lora, exchange, gathered, merge_lora, save_adapter, trained_weights
from kernels.generation import end_tokens, generate_groups
from kernels.rows import ahead, dummy_row, encode_question, hand_out, micro_batches, names_of
from kernels.rows import packs, row_logprobs, shard, share
from kernels.student import Student, load_student, open_pictures, read_questions

logging.disable_progress_bar()

# Shapes: Q questions, G responses per question, N response tokens of a forward pass, T tokens.

RECIPES = {
    "paper": "",
    "tiny": "--train full --freeze_vision False --lr 5e-5 --schedule cosine --group 8 "
    "--max_new_tokens 24 --no_checkpointing --tasks A3 D1 D3",
}
# Settings that may differ when a run is resumed: they do not decide the result.
BY_THE_WAY = ("recipe", "run", "tokens", "checkpointing", "save_every")


@dataclass
class Config:
    recipe: Literal[*RECIPES] = HfArg(default="paper", help="of RECIPES; your own flags win")
    run: str = HfArg(default="runs/demo", help="run folder; reads 3_qa/ and the student in it")
    out: str = HfArg(default="5_refine", help="folder written inside the run")
    student: str = HfArg(default="4_sft", help="folder in the run, any checkpoint, or hub id")
    data: str = HfArg(default="3_qa/grpo.jsonl", help="questions, in the run or anywhere")
    data_root: str = HfArg(
        default="",
        help="folder that picture paths start from and may not leave; empty: the run, for a file "
        "outside it that file's folder",
    )
    tasks: list[str] = HfArg(
        default_factory=list, help="tasks to refine, such as A3 D1; empty: all in --data"
    )
    train: Literal["lora", "full"] = HfArg(
        default="lora", help="lora, beside the linear layers of the language model, or full"
    )
    freeze_vision: bool = HfArg(
        default=True, help="keep the vision tower as it is; the paper trains it in this stage"
    )
    prompts: int = HfArg(default=32, help="questions per step, of all processes")
    group: int = HfArg(default=4, help="responses per question; the paper's 4-5")
    temperature: float = HfArg(default=1.0, help="of the policy: as it answers, so it learns")
    max_new_tokens: int = HfArg(default=256, help="tokens per response at most; the paper's")
    tokens: int = HfArg(default=16384, help="tokens per forward pass at most; bounds memory")
    steps: int = HfArg(default=0, help="rollout steps; 0: one epoch, as in the paper")
    updates: int = HfArg(default=1, help="optimiser steps on each step's responses")
    reward: Literal["published", "grid"] = HfArg(
        default="published", help="grid: full points only within half a step of the data's grid"
    )
    baseline: Literal["group", "greedy"] = HfArg(
        default="group", help="what a response has to beat: its group's mean, or the greedy one"
    )
    scale: Literal["group", "batch", "none"] = HfArg(
        default="group", help="whose standard deviation the advantages are divided by"
    )
    refills: int = HfArg(
        default=0, help="times that groups all right or all wrong are replaced; 0: they stay"
    )
    clip_ratio: list[float] = HfArg(
        default_factory=lambda: [0.2],
        help="e: the ratio counts within 1 - e and 1 + e; a second one is for above (0.2 0.28)",
    )
    kl: float = HfArg(default=1e-2, help="beta, the weight of the KL divergence; the paper's")
    lr: float = HfArg(default=1e-6, help="peak learning rate of AdamW; the paper's")
    schedule: Literal["cosine", "constant"] = HfArg(
        default="constant", help="after the warm-up: constant, or half a cosine down to zero"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = HfArg(
        default="auto", help="of the arithmetic; auto: bfloat16 on a GPU that has it"
    )
    checkpointing: bool = HfArg(
        default=True, help="recompute activations: less memory, a third more time"
    )
    merge: bool = HfArg(default=False, help="with LoRA: write the merged weights besides")
    save_every: int = HfArg(default=20, help="steps between checkpoints to resume from")
    seed: int = HfArg(default=0, help="of the order of questions and of the sampled responses")


def advantages(rewards: torch.Tensor, baseline=None, scale="group") -> torch.Tensor:
    """How much better than its group each response is, in standard deviations: [Q, G] -> [Q, G].

    baseline [Q]: what stands for the group's mean, such as the rewards of greedy answers. scale:
    the standard deviation is each group's, the whole batch's, or none. Equals teach nothing:

    >>> advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]])).round(decimals=2)
    tensor([[ 0.8700, -0.8700, -0.8700,  0.8700],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    apart = rewards - rewards[:, :1]  # [Q, G], of equals 0 without a rounding error, as their mean
    centred = apart - apart.mean(1, keepdim=True)  # [Q, G]
    gains = centred if baseline is None else rewards - baseline[:, None]  # [Q, G]
    if scale == "group":
        return gains / (apart.std(1, keepdim=True) + 1e-4)  # [Q, G]
    if scale == "batch":
        everywhere = torch.tensor(gather(centred.flatten().tolist()))  # of all processes
        return gains / (everywhere.std(correction=0) + 1e-4)  # [Q, G]
    return gains


def keep_group(right: list[bool], refills: int) -> bool:
    """Is a question learned from? By GRPO every one is; where others can replace it, it has right
    and wrong responses, by their outcome: shaped rewards differ in every group."""
    return not refills or 0 < sum(right) < len(right)


def grpo_loss(
    logprob: torch.Tensor,  # [N], of the response tokens
    old: torch.Tensor,  # [N], the same under the weights that answered
    reference: torch.Tensor,  # [N], the same under the student that came in
    advantage: torch.Tensor,  # [N], of the token's response
    weight: torch.Tensor,  # [N], which makes a sum over tokens the mean over responses
    clip_ratio: list[float],  # below 1, and above where that is another
    kl: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equation 3 of DeepSeekMath over N response tokens: the loss; KL and clipped share, to log.

    KL is its low-variance estimator (equation 4): never negative, and 0 where nothing changed.
    """
    ratio = (logprob - old).exp()  # [N]
    bounded = ratio.clamp(1 - clip_ratio[0], 1 + clip_ratio[-1])  # [N]
    # the smaller of both: a step beyond the bounds is never rewarded, but can be punished
    objective = torch.minimum(ratio * advantage, bounded * advantage)  # [N]
    d = reference - logprob  # [N]
    divergence = d.exp() - d - 1  # [N]
    loss = ((kl * divergence - objective) * weight).sum()
    clipped = (bounded != ratio).float()  # [N]
    return loss, (divergence * weight).sum(), (clipped * weight).sum()


# --- The rollout ---
ROLLOUT = 32  # questions generated together; bounds memory


def open_prompt(student: Student, question: dict) -> dict | None:
    """A question's prompt, without its answer; None where a picture does not open: it is named."""
    try:
        pixels, grids = open_pictures(student, question["images"])
        encoded = encode_question(student, question, grids)
    except (OSError, ValueError) as error:
        print(f"{question['name']}: skipped, {error}", file=sys.stderr)
        return None
    ids = encoded["ids"][: encoded["prompt"]]
    prompt = {"ids": ids, "positions": encoded["positions"][:, : len(ids)]}
    return prompt | {"pixels": pixels, "grids": grids, "question": question}


def grid_of(questions: list[dict]) -> dict[str, tuple[float, float]]:
    """(half a step, the largest value) of the numbers in the answers, as `numeric_score` takes it.

    >>> said = ("turn left 10 degrees", "turn left 40 degrees; move left 1.2 meters", "yes")
    >>> grid_of([{"messages": [{"content": text}]} for text in said])
    {'meters': (0.6, 1.2), 'degrees': (5.0, 40.0)}
    """
    values = {unit: {0.0} for unit in SPANS}
    for question in questions:
        for name, value in parse_actions(question["messages"][-1]["content"]) or ():
            values["degrees" if "turn" in name else "meters"].add(value)
    grid = dict(SPANS)
    for unit, known in values.items():
        if len(known) > 1:
            grid[unit] = float(np.diff(sorted(known)).min()) / 2, max(known)
    return grid


EXACT = 0.2  # of --reward grid: the part that only full points earn


def judge(question: dict, grid: dict, cfg: Config, text: str, cut: bool) -> tuple[float, bool]:
    """The reward of a response, and whether it is the answer itself; of a box, half of it.

    A response without its end (cut) earns nothing, whatever it says so far.
    """
    answer, options = question["messages"][-1]["content"], question.get("options")
    about = (question["task_type"], answer, text, question.get("answer_type"), options)
    strict = reward(*about, grid)
    score, full = strict["overall"], strict["overall"] > 1 - 1e-9
    right = strict["iou"] >= 0.5 if "iou" in strict else full
    if cfg.reward == "published":
        score = reward(*about)["overall"]
    else:
        score = (1 - EXACT) * score + EXACT * full
    return (min(0.0, score), False) if cut else (score, right)


def roll_out(student: Student, prompts: list[dict], step: int, grid: dict, cfg: Config):
    """Add to each prompt its group of responses, `tokens`, `texts`, `scores` and `right`.

    Every response token is drawn by a number of its own, which depends on nothing but (seed, step,
    question): not on the process, nor on what else is in its batch. --baseline greedy: one more
    response, the likeliest one, of which `greedy` is the reward and `greedy_text` the text.
    """
    rows = cfg.group + (cfg.baseline == "greedy")
    for prompt in prompts:
        question = prompt["question"]
        key = repr((cfg.seed, step, question["written"], question["messages"])).encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:7], "big")
        draw = torch.Generator().manual_seed(seed)
        prompt["uniforms"] = torch.rand(rows, cfg.max_new_tokens, generator=draw)
        prompt["uniforms"][cfg.group :] = torch.nan  # the likeliest
    # prompts of like length go together, because a shorter one is padded to the longest
    order = sorted(prompts, key=lambda prompt: len(prompt["ids"]))
    student.model.eval()  # nothing is recomputed, and the key-value cache is kept
    ends = end_tokens(student)
    for start in range(0, len(order), ROLLOUT):
        part = order[start : start + ROLLOUT]
        uniforms = torch.cat([prompt["uniforms"] for prompt in part])
        how = (rows, uniforms, cfg.temperature)
        groups = generate_groups(student, part, cfg.max_new_tokens, *how)
        for prompt, group in zip(part, groups, strict=True):
            texts = [student.tokenizer.decode(ids, skip_special_tokens=True) for ids in group]
            cut = [ids[-1] not in ends for ids in group]
            judged = map(partial(judge, prompt["question"], grid, cfg), texts, cut)
            scores, right = map(list, zip(*judged, strict=True))
            found = {"tokens": group, "texts": texts, "scores": scores, "right": right, "cut": cut}
            prompt |= {name: values[: cfg.group] for name, values in found.items()}
            if cfg.baseline == "greedy":
                prompt |= {"greedy": scores[-1], "greedy_text": texts[-1]}


def ask(student: Student, plan, step: int, grid: dict, cfg: Config) -> tuple[list, list]:
    """The prompts of a step that are learned from, and all that were asked, with their responses.

    plan: the next prompts, 1 + refills times what a step needs; what is not needed is passed over.
    """
    asked, kept = [], []
    for _ in range(1 + cfg.refills):
        prompts = list(filter(None, next(plan)))
        if not cfg.refills or sum(gather([len(kept)])) < cfg.prompts:
            roll_out(student, prompts, step, grid, cfg)
            asked += prompts
            for prompt in prompts:
                if keep_group(prompt["right"], cfg.refills):
                    kept.append(prompt)
    return kept, asked


def read_asked(path: Path, root: Path, tasks: list[str]) -> list[dict]:
    """The questions of a file: those of `tasks`, or, where none is named, all."""
    questions = read_questions(path, root)
    return [question for question in questions if not tasks or question["task_type"] in tasks]


def pick_exam(run: Path, cfg: Config) -> list[dict]:
    """A few held-out questions, where the run has some; the same in every step."""
    path = run / "3_qa/heldout.jsonl"
    held_out = read_asked(path, run, cfg.tasks) if path.is_file() else []
    return np.random.default_rng([cfg.seed]).permutation(held_out)[:HELDOUT].tolist()


def sit_exam(student: Student, questions: list[dict], grid: dict, cfg: Config) -> float:
    """The mean published reward of greedy answers to the questions of all processes."""
    prompts = list(filter(None, (open_prompt(student, question) for question in questions)))
    greedy = replace(cfg, group=0, baseline="greedy", reward="published")
    roll_out(student, prompts, 0, grid, greedy)
    return float(np.mean(gather([prompt["greedy"] for prompt in prompts])))


# --- The update ---
def rows_of(student, prompts: list[dict], gains: torch.Tensor, max_tokens: int) -> list[dict]:
    """A row is a prompt and its responses, with `advantage` and `weight` [N] of their tokens.

    gains [Q, G]: the advantages. The weights make the sum over all tokens of all processes the
    mean over responses of the mean over their tokens.
    """
    rows, number = [], sum(gather([len(prompt["tokens"]) for prompt in prompts]))
    config = student.model.config
    for prompt, gain in zip(prompts, gains.tolist(), strict=True):
        asked = {"prompt": len(prompt["ids"]), "name": prompt["question"]["name"]}
        responses = []
        for tokens, advantage in zip(prompt["tokens"], gain, strict=True):
            # a response's positions go on behind the largest of the prompt, as in the rollout
            behind = prompt["positions"].max() + 1 + torch.arange(len(tokens))
            response = {
                "ids": torch.cat([prompt["ids"], torch.tensor(tokens)]),
                "positions": torch.cat([prompt["positions"], behind.expand(3, -1)], 1),
                "advantage": advantage,
                "weight": 1 / (len(tokens) * number),
            }
            responses.append(asked | response)
        rows += share(responses, prompt["pixels"], prompt["grids"], config, max_tokens)
    for row in rows:
        for name in ("advantage", "weight"):
            of_responses = torch.tensor([response[name] for response in row["questions"]])
            row[name] = of_responses[row["owner"]]  # [N]
    return rows


def update(student: Student, came: list, parts: list[dict], cfg: Config) -> tuple:
    """The gradient of the loss over a step: loss, KL, clipped share and entropy [4].

    Also the names of the questions whose log-probability is not finite. Each part holds rows;
    the first update adds the old and reference log-probabilities of their tokens. came: of the
    weights that train a copy from before: with them the model is the reference model.
    """
    model, pad = student.model.train(), student.tokenizer.pad_token_id  # checkpoints activations
    how = (pad, cfg.temperature, cfg.dtype == "bfloat16")
    if cfg.kl and not all("reference" in part for part in parts):
        exchange(model, came)
        for part in parts:
            with torch.no_grad():
                part["reference"] = row_logprobs(model, part["rows"], *how)  # [N]
        exchange(model, came)
    sums, broken = torch.zeros(4, device=model.device), []
    for part in parts:
        rows = part["rows"]
        logprob = row_logprobs(model, rows, *how)  # [N]
        part.setdefault("old", logprob.detach())  # [N], of the weights that answered
        part.setdefault("reference", part["old"])  # [N]
        advantage, weight = (
            torch.cat([row[name] for row in rows]).to(logprob) for name in ("advantage", "weight")
        )  # [N]
        given = (logprob, part["old"], part["reference"], advantage, weight)
        terms = grpo_loss(*given, cfg.clip_ratio, cfg.kl)
        terms[0].backward()
        entropy = -(part["old"] * weight).sum()
        sums += torch.stack([*terms, entropy]).detach()
        broken += names_of(rows, ~logprob.isfinite())
    dist.all_reduce(sums)
    return sums, broken


# --- The training ---
SHOWN = "reward heldout kl entropy grad_norm length seconds peak_gb"
LORA_RANK = 256  # where the student brings no LoRA along; the paper's
WARMUP = 0.05  # share of the steps in which the learning rate rises
SHOW_EVERY = 20  # steps between printed rollouts, and between looks at held-out questions
HELDOUT = 96  # of those


def in_random_order(questions: list[dict], steps: int, cfg: Config) -> np.ndarray:
    """The questions of each rollout, [rollouts, prompts]; each epoch has an order of its own."""
    rollouts = steps * (1 + cfg.refills)
    epochs = range(1 + rollouts * cfg.prompts // len(questions))
    orders = [np.random.default_rng([cfg.seed, e]).permutation(questions) for e in epochs]
    return np.concatenate(orders)[: rollouts * cfg.prompts].reshape(rollouts, cfg.prompts)


def measure(prompts: list[dict]) -> dict:
    """What the docstring lists about a step's responses, of all processes."""
    asked = []
    for prompt in prompts:
        task = str(prompt["question"]["task_type"])
        asked.append((task, prompt["scores"], prompt["cut"], [*map(len, prompt["tokens"])]))
    asked = gather(asked)
    if not asked:  # not one picture of this step opened
        return dict.fromkeys(("reward", "length", "truncated", "equal", "spread"), 0.0)
    tasks, scores, cut, lengths = map(np.array, zip(*asked, strict=True))  # [Q], [Q, G], ...
    means = {
        "reward": scores,
        "length": lengths,
        "truncated": cut,
        "equal": np.ptp(scores, axis=1) == 0,
        "spread": scores.std(1, ddof=1),
    }
    means = {name: float(values.mean()) for name, values in means.items()}
    return means | {"rewards": {str(t): float(scores[tasks == t].mean()) for t in np.unique(tasks)}}


def log_rollout(folder: Path, step: int, prompt: dict):
    """A question with its responses: a line of rollouts.jsonl, printed now and then."""
    question = prompt["question"]
    line = {
        "step": step,
        "images": question["written"],
        "question": question["messages"][0]["content"],
        "answer": question["messages"][-1]["content"],
        "responses": prompt["texts"],
        "rewards": prompt["scores"],
    }
    with open(folder / "rollouts.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    if step % SHOW_EVERY == 1:
        print(*line.values(), sep="\n    ")


def rollout_copy(student: Student, cfg: Config, device: str) -> tuple[Student, list]:
    """The student that answers, and its weights that follow those that train.

    Where the student is sharded it is a whole copy, because responses end when they like.
    """
    if dist.get_world_size() == 1:
        return student, []
    model = copy.deepcopy(student.model)
    choose_trained(model, cfg, LORA_RANK)
    hand_out(model, device)
    [model.generation_config, *_] = gather([model.generation_config])  # the first has read it
    return replace(student, model=model), trained_weights(model)


def main(cfg: Config):
    started, run = time.perf_counter(), Path(cfg.run)
    folder, data = run / cfg.out, run / cfg.data
    cfg, dtype, rank, world, device = start_processes(cfg, folder)
    source = run / cfg.student if (run / cfg.student).is_dir() else Path(cfg.student)
    if rank == 0:
        config = {name: value for name, value in asdict(cfg).items() if name not in BY_THE_WAY}
        meta = begin(folder, config, source if read_meta(source) else None)
    dist.barrier()
    # the student that learns, and of its weights that train a copy, which makes it the reference
    place = device
    if world > 1:  # the first reads the weights for all
        place = "meta" if rank else "cpu"
    student = load_student(str(source), dtype, place, ATTENTION, MAX_PIXELS)
    model = student.model
    rollout_student, mirrors = rollout_copy(student, cfg, device)
    choose_trained(model, cfg, LORA_RANK)
    shard(model, device, cfg.dtype)
    came = [weight.clone() for weight in trained_weights(model)] if cfg.kl else []
    optimizers = [make_adamw(model.parameters(), cfg.lr)]
    # the questions
    root = Path(cfg.data_root or (run if run in data.parents else data.parent))
    questions = read_asked(data, root, cfg.tasks)
    missing = {*cfg.tasks} - {question["task_type"] for question in questions}
    if missing or not questions:
        stop(f"{data} holds no usable question of {' '.join(sorted(missing)) or 'any task'}")
    grid, exam = grid_of(questions), pick_exam(run, cfg)
    steps = cfg.steps or math.ceil(len(questions) / cfg.prompts)
    if rank == 0:
        print(f"{device} x {world}, {cfg.dtype}: {steps:,} steps, {len(questions):,} questions")
    first = load_checkpoint(folder, model, optimizers, rank)
    plan = in_random_order(questions, steps, cfg)[first * (1 + cfg.refills) :, rank::world]
    plan = ahead(partial(open_prompt, student), plan, device)  # prompts, a step before they are due
    dummy = dummy_row(student)
    norms = []
    for step in range(first, steps):
        # ask: every process answers its share, with the weights as they are now
        tick = time.perf_counter()
        for mirror, weight in zip(mirrors, trained_weights(model), strict=False):
            mirror.copy_(gathered(weight))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            line = {"step": step + 1}
            if exam and step % SHOW_EVERY == 0:
                line["heldout"] = sit_exam(rollout_student, exam[rank::world], grid, cfg)
            learned, asked = ask(rollout_student, plan, step, grid, cfg)
        rollout_seconds = round(time.perf_counter() - tick, 3)
        # judge: every response beside its group
        rewards = torch.tensor([p["scores"] for p in learned]).reshape(-1, cfg.group)  # [Q, G]
        greedy = torch.tensor([p["greedy"] for p in learned]) if cfg.baseline == "greedy" else None
        gains = advantages(rewards, greedy, cfg.scale)  # [Q, G]
        rows = rows_of(student, learned, gains, cfg.tokens)
        # learn
        parts = micro_batches(rows, cfg.tokens, not packs(model), dummy)
        parts = [{"rows": part} for part in parts]
        for i in range(cfg.updates):
            sums, broken = update(student, came, parts, cfg)
            clip_gradients(model, folder, step + 1, float(sums[0]), norms, rows, broken)
            if i == 0 and step > first and step % cfg.save_every == 0:  # sound weights: see above
                save_checkpoint(folder, step, student, optimizers, dtype, rank)
            take_step(optimizers, cfg.schedule, WARMUP * steps, step, steps)
        line |= measure(asked)
        line |= zip(("loss", "kl", "clipped", "entropy"), sums.tolist(), strict=True)
        line |= {"grad_norm": norms[-1], "rollout_seconds": rollout_seconds}
        line["seconds"] = round(time.perf_counter() - tick, 3)
        if rank == 0:
            log_step(folder, line, SHOWN, steps)
            for prompt in asked[:1]:
                log_rollout(folder, step + 1, prompt)
    save_student(student, folder, dtype, rank, cfg.merge)
    if rank == 0:
        draw_curves(folder, SHOWN)
        drop_checkpoints(folder)
        if (folder / "adapter").is_dir():
            meta["base"] = student.source
        finish(folder, meta, {"steps": steps, "questions": len(questions)}, started)
        print(f"next: python 06_eval.py --run {cfg.run} --checkpoint {cfg.out}")
    dist.destroy_process_group()


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
# --- same in 05, 06: answers and the reward ---
ANSWER_TYPES = {"A1": "motion", "A2": "motion", "A3": "motions", "D3": "motions", "D1": "box"}
ANSWER_TYPES |= dict.fromkeys(("A4", "D2", "D4", "S2", "S6"), "yes_no")
ANSWER_TYPES |= {"S1": "box", "S5": "box", "S3": "meters"}
ANSWER_TYPES |= {"E1": "motion", "E2": "relation", "E3": "choice"}
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
MOVE = rf"move\s+(forward|backward|left|right)\s+({NUMBER})\s*meters{{0,2}}"
TURN = rf"turn\s+(left|right)\s+({NUMBER})\s*degrees{{0,2}}"
ACTION = re.compile(rf"\b(?:{MOVE}|{TURN})\b", re.I)
BOX = re.compile(r"(?:bbox\s*)?\[" + ",".join([rf"\s*(-?{NUMBER})\s*"] * 4) + r"\]", re.I)
# What may not stand beside an answer: digits, and words of a second or a withdrawn answer.
SECOND_ANSWER = r"\d|°|move|turn|forward|back|left|right|met(?:er|re)|deg|n['’]t"
SECOND_ANSWER = re.compile(SECOND_ANSWER + r"|\b(?:or|not|never|no|yes)\b", re.I)
LIST_MARK = re.compile(r"\A[\s\"'*<>-]*1[.)]\s")  # "1. move ...": one answer written as a list
SHIFTS = {"left": "shift_left", "right": "shift_right"}
YES_NO = {"yes": True, "true": True, "no": False, "false": False}
RELATIONS = {word: word for word in ("left", "right", "ahead", "behind", "nearer", "farther")}


def parse_actions(text) -> list[tuple[str, float]] | None:
    """[("shift_left", 0.8), ("turn_right", 30.0)] for an answer of actions, None for other text.

    Case, white space and the plural s are free, and so are the words between and around the
    actions, as long as they hold no digit, no part of another action and no "or" or "not".
    """
    if not isinstance(text, str):
        return None
    if SECOND_ANSWER.search(LIST_MARK.sub("", ACTION.sub(" ; ", text))):
        return None
    actions = []
    for move, meters, turn, degrees in ACTION.findall(text.lower()):
        name = "turn_" + turn if turn else SHIFTS.get(move, move)
        actions.append((name, float(degrees or meters)))
    return actions or None


def parse_box(text) -> tuple[list[float], bool] | None:
    """([x1, y1, x2, y2], stands alone) of a text with one box `[412, 300, 530, 611]`, or None."""
    found = list(BOX.finditer(text)) if isinstance(text, str) else []
    if len(found) != 1:
        return None
    rest = text[: found[0].start()] + text[found[0].end() :]
    if re.search(r"\d|\b(?:or|not)\b", rest.replace("bbox_2d", ""), re.I):  # Qwen's key of a box
        return None
    return [float(number) for number in found[0].groups()], not rest.strip()


def canonical(text) -> str:
    """Lower case, single spaces, without the punctuation at the end."""
    return " ".join(text.lower().split()).rstrip(' .,;:!?"') if isinstance(text, str) else ""


def parse_quantity(text, unit: str) -> float | None:
    """The number of `2.3 meters` or `2.3` (the unit is "meters"); None for other text."""
    match = re.fullmatch(rf"(-?{NUMBER})\s*(?:{unit[:-1]}s?)?", canonical(text))
    return float(match[1]) if match else None


def parse_choice(text, options=None) -> str | None:
    """The letter of `B`, `(b)`, `B.` or `B. turn left 40 degrees`, the text being that option."""
    said = re.sub(r"\A\(?([a-z])\)?[.:)]?(?= |\Z)", r"\1", canonical(text))
    known = isinstance(options, list | tuple)
    for code, option in enumerate(options if known else [""] * 26, ord("a")):
        if said in (chr(code), f"{chr(code)} {canonical(option)}"):
            return chr(code).upper()
    return None


SPANS = {"meters": (0.5, 5.0), "degrees": (5.0, 90.0)}  # errors with full points, and with none


def numeric_score(error: float, unit: str, spans=SPANS) -> float:
    """1 up to the first error of its unit's span, 0 from the second, linear between."""
    full, none = spans[unit]
    return min(1.0, max(0.0, (none - abs(error)) / (none - full)))


def sorted_box(box) -> np.ndarray:
    """The box with x1 <= x2 and y1 <= y2, clipped to the picture (0..1000)."""
    corners = np.clip(box, 0.0, 1000.0).reshape(2, 2)
    return np.concatenate([corners.min(0), corners.max(0)])


def box_iou(a, b) -> float:
    """Intersection over union of two boxes, sorted and clipped first; 0 for an empty union."""
    a, b = sorted_box(a), sorted_box(b)
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    overlap = sides.clip(0).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - overlap
    return overlap / union if union > 0 else 0.0


def score_box(true, said, alone: bool) -> dict:
    """The published parts of a box's reward; center, l1 and size fall with a distance each.

    validity = 0.7 (x1 < x2 and y1 < y2) + 0.3 max(0, 1 - mean overflow of the four / 200)
    geometry = (0.45 IoU + 0.20 center + 0.20 l1 + 0.15 size) (0.3 + 0.7 validity)
    """
    overflow = np.abs(said - np.clip(said, 0.0, 1000.0)).mean()
    ordered = said[0] < said[2] and said[1] < said[3]
    validity = 0.7 * ordered + 0.3 * max(0.0, 1 - overflow / 200)
    a, b = sorted_box(true), sorted_box(said)
    iou = box_iou(a, b)
    # between the centres, at most 0.6 of the true diagonal
    x, y = b[:2] + b[2:] - a[:2] - a[2:]
    width, height = a[2:] - a[:2]
    reach = max(80.0, 0.6 * math.hypot(width, height))
    center = max(0.0, 1 - math.hypot(x, y) / 2 / reach)
    # between the corners
    l1 = max(0.0, 1 - np.abs(a - b).mean() / 180)
    # between the sides, as ratios
    ratios = (b[2:] - b[:2]).clip(1) / (a[2:] - a[:2]).clip(1)
    size = max(0.0, 1 - np.abs(np.log(ratios)).sum() / 1.6)
    geometry = (0.45 * iou + 0.20 * center + 0.20 * l1 + 0.15 * size) * (0.3 + 0.7 * validity)
    return {
        "validity": validity,
        "geometry": geometry,
        "format": 1.0 if alone else 0.4,
        "iou": iou,
        "center": center,
        "l1": l1,
        "size": size,
    }


def score_actions(true, said, spans=SPANS) -> dict:
    """The published parts of the reward of actions.

    action = overlap of the names in any order / longer length; order = names at their places,
    numeric = numeric scores of the values there, both / true length.
    """
    order, numeric = 0, 0.0
    for (name, value), (other, told) in zip(true, said, strict=False):
        if name == other:
            order += 1
            unit = "degrees" if "turn" in name else "meters"
            numeric += numeric_score(value - told, unit, spans)
    names = [Counter(name for name, _ in actions) for actions in (true, said)]
    action = (names[0] & names[1]).total() / max(len(true), len(said))
    return {"action": action, "order": order / len(true), "numeric": numeric / len(true)}


PARSERS = {"motion": parse_actions, "motions": parse_actions, "box": parse_box}
PARSERS |= {"yes_no": lambda text: YES_NO.get(canonical(text))}
PARSERS |= {"relation": lambda text: RELATIONS.get(canonical(text)), "choice": parse_choice}
PARSERS |= {unit: functools.partial(parse_quantity, unit=unit) for unit in ("meters", "degrees")}
# The parts of the reward and their weights in it; each action too many costs 0.03 beside.
WEIGHTS = {
    "motion": {"format": 0.10, "action": 0.35, "numeric": 0.55},
    "motions": {"format": 0.10, "action": 0.25, "order": 0.35, "numeric": 0.30},
    "box": {"format": 0.20, "validity": 0.15, "geometry": 0.65},
    "yes_no": {"format": 0.20, "accuracy": 0.80},
    "relation": {"format": 0.20, "accuracy": 0.80},
    "choice": {"format": 0.20, "accuracy": 0.80},
    "meters": {"format": 0.10, "numeric": 0.90},
    "degrees": {"format": 0.10, "numeric": 0.90},
}
WEIGHTS["box"] |= dict.fromkeys(("iou", "center", "l1", "size"), 0.0)  # are in geometry


def reward(task_type, answer, response, answer_type=None, options=None, spans=SPANS) -> dict:
    """{"overall": 0..1, parts} of a response; overall is -1 beyond 200 characters.

    For one well-formed answer this is the published reward. A response that is not one answer
    earns 0: the published one pays for a list of all answers. Without an answer_type the task
    decides; for any other task the same text earns 1. options: those of a choice.
    """
    if isinstance(response, str) and len(response.strip()) > 200:
        return {"overall": -1.0, "format": 0.0}
    kind = str(answer_type or ANSWER_TYPES.get(str(task_type).strip()))
    if kind not in PARSERS:
        same = float(canonical(response) == canonical(answer) != "")
        return {"overall": same, "format": same, "accuracy": same}
    parse = functools.partial(parse_choice, options=options) if kind == "choice" else PARSERS[kind]
    true, said = parse(answer), parse(response)
    parts = {"format": 1.0}
    # no answer, or two where one was asked for
    if true is None or said is None or (kind == "motion" and len(said) > 1):
        parts = dict.fromkeys(WEIGHTS[kind], 0.0)
    elif kind == "box":
        parts = score_box(true[0], *said)
    elif kind in ("yes_no", "choice", "relation"):
        parts["accuracy"] = float(true == said)
    elif kind in ("meters", "degrees"):
        error = said - true
        if kind == "degrees":  # the shorter way around
            error = (error + 180) % 360 - 180
        parts["numeric"] = numeric_score(error, kind, spans)
    elif kind == "motion":
        parts |= score_actions(true[:1], said, spans)
    else:
        parts |= score_actions(true, said, spans)
    parts = {name: parts[name] for name in WEIGHTS[kind]}
    overall = sum(weight * parts[name] for name, weight in WEIGHTS[kind].items())
    if kind == "motions" and parts["format"]:
        overall = max(0.0, overall - 0.03 * max(0, len(said) - len(true)))
    return {"overall": overall, **parts}


# --- end: answers and the reward ---


if __name__ == "__main__":
    run(main, Config)
