"""How much a second stage could bring: what a student's own samples hold beside its greedy answer.

.venv/bin/python tests/ceiling.py --run runs/demo --checkpoint 4_sft [--tasks A3 D1 D3]

answers held-out questions greedily and SAMPLES times at temperature 1, as stage 5 does, and prints
per task the mean reward (and the share that is right) of

    greedy      what an exam sees
    majority    the sample said most often
    bayes       the sample with the highest mean reward, were each sample true in turn (minimum
                Bayes risk): the best that can be said without knowing more than the student
    pass@8, 16  the best of so many samples, chosen by knowing the truth
    drawn       a sample, at random

GRPO moves weight between answers that the student gives already. Where bayes is not above greedy,
no such move can help a greedy answer; bayes - greedy is what can be gained by knowing oneself.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import HfArgumentParser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # kernels/


@functools.cache
def stage_5():
    """05 as a module, which `import` cannot name."""
    spec = importlib.util.spec_from_file_location("refine", ROOT / "05_train_refine.py")
    sys.modules["refine"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["refine"])
    return sys.modules["refine"]


@dataclass
class Config:
    run: str = "runs/demo"
    checkpoint: str = "4_sft"
    tasks: list[str] = field(default_factory=list)
    per_task: int = 200
    samples: int = 16
    max_new_tokens: int = 24
    reward: str = "published"  # of what is shown and of the choice by minimum Bayes risk
    seed: int = 0
    out: str = ""  # a JSON file for the numbers; empty: none


def choices(texts: list[str], greedy: str, paid) -> dict[str, list[str]]:
    """Name -> candidates, of which the best counts. paid(truth, text): the reward of a text.

    >>> found = choices(["a", "b", "b"], "c", lambda truth, text: float(truth == text))
    >>> found["majority"], found["bayes"], found["greedy"]
    (['b'], ['b'], ['c'])
    """
    counts = Counter(texts)
    # what is no answer is nobody's truth: it would be no reward's either
    value = {said: sum(n * paid(true, said) for true, n in counts.items()) for said in counts}
    said = {"greedy": [greedy], "majority": [max(counts, key=lambda text: counts[text])]}
    said["bayes"] = [max(counts, key=lambda text: (value[text], counts[text]))]
    for n in (8, 16):
        if len(texts) >= n:
            said[f"pass@{n}"] = texts[:n]
    return said


def main(cfg: Config) -> dict:
    refine, run = stage_5(), Path(cfg.run)
    torch.manual_seed(cfg.seed)
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = refine.load_student(
        str(run / cfg.checkpoint), torch.float32, device, refine.ATTENTION, refine.MAX_PIXELS
    )
    groups = defaultdict(list)
    for question in refine.read_questions(run / "3_qa/heldout.jsonl", run):
        if not cfg.tasks or question["task_type"] in cfg.tasks:
            groups[question["task_type"]].append(question)
    grid = refine.grid_of([one for own in groups.values() for one in own])
    how = {"group": cfg.samples, "max_new_tokens": cfg.max_new_tokens, "baseline": "greedy"}
    how = refine.Config(seed=cfg.seed, reward=cfg.reward, **how)
    scores = defaultdict(lambda: defaultdict(list))  # task: {name: [(reward, right)]}
    for task in sorted(groups):
        order = np.random.default_rng([cfg.seed]).permutation(groups[task])[: cfg.per_task]
        for start in tqdm(range(0, len(order), refine.ROLLOUT), desc=task):
            prompts = [
                refine.open_prompt(student, one) for one in order[start : start + refine.ROLLOUT]
            ]
            prompts = [prompt for prompt in prompts if prompt]
            refine.roll_out(student, prompts, 0, grid, how)
            for prompt in prompts:
                question = prompt["question"]

                @functools.cache
                def judged(text, question=question):
                    return refine.judge(question, grid, how, text, False)

                @functools.cache
                def paid(true, said, question=question):
                    turns = [*question["messages"][:-1], {"role": "assistant", "content": true}]
                    return refine.judge(question | {"messages": turns}, grid, how, said, False)[0]

                found = choices(prompt["texts"], prompt["greedy_text"], paid)
                for name, candidates in found.items():
                    scores[task][name].append(max(judged(text) for text in candidates))
                drawn = np.mean([judged(text) for text in prompt["texts"]], axis=0)
                scores[task]["drawn"].append(tuple(drawn))
    return show(scores, cfg)


def show(scores: dict, cfg: Config) -> dict:
    """Print a row per task and one for all; returns {task: {name: [reward, right]}}."""
    names = [*next(iter(scores.values()))]
    means = {
        task: {name: np.mean(own[name], axis=0).round(4).tolist() for name in names}
        for task, own in scores.items()
    }
    means["all"] = {
        name: np.mean([own[name] for own in means.values()], axis=0).round(4).tolist()
        for name in names
    }
    print(f"{'task':6}{'n':>6}" + "".join(f"{name:>16}" for name in names))
    for task, own in means.items():
        n = sum(map(len, (one["greedy"] for t, one in scores.items() if task in (t, "all"))))
        cells = (f"{reward:9.3f} ({right:.2f})" for reward, right in own.values())
        print(f"{task:6}{n:6}" + "".join(f"{cell:>16}" for cell in cells))
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(means, indent=1))
    return means


if __name__ == "__main__":
    main(*HfArgumentParser(Config).parse_args_into_dataclasses())
