"""Examine a student on questions about rooms that no training file holds.

Every question is asked twice: with its pictures, and with grey pictures of the same size, which shows what language alone can
guess. Beside both stands the best constant answer: of the 50 most frequent answers in the training questions, for each score the
one that does best on this exam (a control that knows the exam). A score is the mean over questions; its 95 % interval comes from a
bootstrap over scenes, since the questions of one room share its pictures:

    score = mean_i s(answer_i, truth_i),   interval = 2.5 % and 97.5 % quantiles of the same mean over 1,000 draws of whole scenes

Scores: A1 A2 direction right (share) and the error: in A1 the distance between the two displacements in the plane, in A2 the
difference of the signed angles (left 30 instead of right 40 is 70 degrees off); A3 D3 names and values exactly right; D1 S1
S5 intersection over union; A4 D2 D4 S2 S6 share right; S3 error in meters; S4 error in degrees around the circle; and the reward of
stage 5 for every task. A response that is not one answer (or is longer than 200 characters) scores 0, its error is that of the
worst answer which the questions of its task hold, and it is counted as unparsable. D1 also shows the score of repeating the box
of the first picture. An answer is right when its main score is at least one half (S3, S4: its reward at least 0.95).

The rival (--coupled TEACHER) asks the world model while answering, after MindJourney (arXiv 2507.12508): from the question's first
picture it searches short walks, in which the VLM scores every imagined view twice, worth exploring and helpful, and it answers with
the helpful views beside the question. With --coupled_stated there is no search: the motion that the question states is imagined, and
its end is shown (A4, D1, D2, D4; the other tasks state none and are asked as they are). 02 imagines: 06 writes the walks of all
questions as a run of their own, calls 02 on it and reads the views back.

What an answer costs is counted for the question asked alone: seconds (its share of the batch; the controls are not counted), tokens,
peak memory, and the operations of the VLM from its weights, tokens and patches (see vlm_flops). The views of simulator and warp take
no network; how many operations svc and sana-wm take is not counted, only their seconds are.

The public benchmarks (--exam sat-real, sat-synthesized, vsi-bench, mindcube; --data names their files as published) are asked in the
words of a protocol (--protocol, see PROTOCOLS) and scored twice: "score" as their public code does, faults included, and "corrected" as
a person would read the answer. Both stand beside grey pictures and the best constant answer of each question type. Questions about the
same pictures or video share one prefill. A question that can't be asked is named on stderr and counted by reason, never dropped.

Reads   RUN/3_qa/heldout.jsonl, or any file of the same format (--questions):
        {"task_type": "A2", "messages": [{"role": "user", "content": "<image><image>Which way and how far did the camera turn?"},
         {"role": "assistant", "content": "turn right 30 degrees"}], "images": ["2_views/room_00007/t001/000.png", ...],
         "scene_id": "room_00007", ...}
        or DATA of a benchmark: SAT_test.parquet, SAT_val.parquet; test.jsonl and DATASET/SCENE.mp4; MindCube_tinybench.jsonl and pictures
        and a checkpoint folder with the weights and the processor.
Writes  RUN/6_eval/TAG/samples.jsonl  grows as answers come (a killed exam goes on behind the last one); at the end one line a question:
           {"number": 12, "id": 12, "exam": "heldout", "task_type": "A2", "scene_id": "room_00007", "images": [...], "question": "...",
            "options": null, "truth": "turn right 30 degrees", "response": "turn right 20 degrees", "blank_response": "turn left 60 degrees",
            "scores": {"answered": true, "direction": 1.0, "error_deg": 10.0, "reward": 0.968}, "blank_scores": {...},
            "cost": {"seconds": 0.02, "world_seconds": 0.0, "tokens": 4, "prompt_tokens": 61, "vlm_flops": 259000000, "world_flops": 0,
            "views": 0, "peak_gb": 0.7}}, with --coupled also "imagined": [["turn left 20 degrees", "imagined/1/2_views/..."], ...]
        RUN/6_eval/TAG/results.json   every score with its interval and controls, the protocol and its hash, what was skipped and why;
                                      "cost": means of a question
        RUN/6_eval/TAG/report.html    one file with plots and example pictures, for any browser
        RUN/6_eval/TAG/accuracy_cost.svg   share of right answers over seconds a question, a point a method
        RUN/6_eval/TAG/imagined/STEP  with --coupled: a run folder with the step's walks (1_trajectories), 02's views (2_views) and scores
        RUN/6_eval/compare.json       with --compare: B minus A on the questions that both answered, 95 % intervals and p-values
        RUN/6_eval/TAG/meta.json      settings, counts, versions, and the checkpoint's own meta
        RUN/6_eval/pictures/EXAM/     a benchmark's pictures and video frames, cut out once for all checkpoints

    python 06_eval.py --run runs/demo --checkpoint 5_refine --beside base sft
    python 06_eval.py --run runs/big --exam vsi-bench --data ~/VSI-Bench --protocol lmms-eval --tag vsi-refined
    python 06_eval.py --run runs/demo --checkpoint 4_base --coupled simulator                   # or warp, svc, sana-wm
    python 06_eval.py --run runs/demo --checkpoint 4_base --coupled simulator --coupled_stated
    python 06_eval.py --run runs/demo --compare base refined
"""
import argparse
import base64
import fcntl
import hashlib
import html
import io
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
import subprocess
import sys
import time
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, ImageDraw, ImageOps
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, HfArgumentParser
from transformers.cache_utils import DynamicLayer

from kernels import patches_in_one_product, register, windows_in_one_launch


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

@dataclass
class Config:
    run: str = setting("runs/demo", "folder of the run; picture paths in the questions are relative to it")
    checkpoint: str = setting("5_refine", "student to examine: a folder in the run, any other folder, or a hub id")
    tag: str = setting("", "name of the folder under 6_eval; empty: the checkpoint's name without its stage number")
    exam: str = setting("heldout", "heldout, or a public benchmark: sat-real, sat-synthesized, vsi-bench, mindcube")
    data: str = setting("", "a benchmark's files as published: a folder, or, with a network, a hub id such as array/SAT")
    subset: str = setting("", "vsi-bench: debiased; sat-synthesized: all (of its 4,000 rows); empty: what is usually reported")
    protocol: str = setting("paper", "how a benchmark is asked and scored: paper, lmms-eval, mindcube, mindjourney; see PROTOCOLS")
    questions: str = setting("3_qa/heldout.jsonl", "a file in the run, or any ms-swift / LLaMA-Factory / World2VLM JSONL file")
    data_root: str = setting("", "folder that picture paths start from and may not leave; empty: the run, or the folder of a "
                             "file outside it")
    train: list[str] = setting(["3_qa/sft.jsonl", "3_qa/static.jsonl"], "questions whose answers are the constants to beat")
    beside: list[str] = setting([], "tags of finished exams to show in the same table, in this order, before this one")
    tasks: list[str] = setting([], "tasks or question types to ask, such as A1 D1; empty: all that the questions hold")
    per_task: int = setting(0, "questions a task at most, the first by hash so that the choice never moves; 0: all")
    blank: bool = setting(True, "ask every question again with grey pictures; doubles the time")
    batch: int = setting(64, "questions answered at a time; lower it when memory runs out")
    temperature: float = setting(0.0, "0: the most likely answer; 1: one drawn as GRPO draws them, whose mean reward is what the second stage raises")
    frames: int = setting(0, "pictures a video is shown as; 0: as the protocol says")
    max_new_tokens: int = setting(0, "tokens an answer at most; 0: as the protocol says")
    max_pixels: int = setting(0, "pixels a picture at most, larger ones are shrunk; 0: as the protocol says")
    shard: str = setting("0/1", "i/n: this process asks about picture lists i, i+n, i+2n, ...; whichever shard ends last completes the folder")
    coupled: str = setting("", "the rival: imagine with this teacher of 02 while answering (simulator, warp, svc, sana-wm); empty: do not")
    coupled_stated: bool = setting(False, "with --coupled: imagine the motion that the question states, instead of searching")
    coupled_args: str = setting("", "further settings of 02 as one text, such as --coupled_args=\"--depth FOLDER --steps 20\"")
    search_steps: int = setting(3, "rival: actions in a row that the search tries; 3 as published")
    search_beams: int = setting(2, "rival: views from which each step goes on; 2 as published")
    search_views: int = setting(6, "rival: views a step that are shown with the question, at most; 6 as published")
    search_scores: list[int] = setting([8, 8], "rival: least score, 0..9, of a view to go on from and of a view to show; 8 8 as published")
    compare: list[str] = setting([], "only compare two finished exams, tags or folders, on the questions that both answered")
    seed: int = setting(0, "seed of the bootstrap, and of the draws where --temperature is not 0")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "arithmetic: bfloat16, float32, or auto (bfloat16 on a GPU that has it, float32 on a CPU)")
    attention: str = setting("world2vlm", "world2vlm (kernels/; plain torch on a CPU), or one of transformers: sdpa, eager")


CONSTANTS = 50  # most frequent training answers a task that are tried as constant answer
LONGEST_QUESTION = 20_000  # characters; a longer one is no question, and would fill the memory of the whole batch
# Scores a task besides its reward, the main one first. Errors are better when lower, all others when higher.
METRICS = {"A1": ["direction", "error_m"], "A2": ["direction", "error_deg"], "A3": ["exact"], "A4": ["accuracy"],
           "D1": ["iou"], "D2": ["accuracy"], "D3": ["exact"], "D4": ["accuracy"],
           "S1": ["iou"], "S2": ["accuracy"], "S3": ["error_m"], "S4": ["error_deg"], "S5": ["iou"], "S6": ["accuracy"]}
WORDS = {"direction": "direction", "error_m": "error (m)", "error_deg": "error (deg)", "exact": "exact", "accuracy": "accuracy",
         "iou": "IoU", "reward": "reward", "score": "score", "corrected": "corrected score",
         "right": "right answers"}


# ----------------------------------------------------------------------------------------------- protocols

# How the public benchmarks are asked and scored, one entry a protocol and exam: frames of a video, picture sizes, longest answer, words,
# scorer. The one in use goes into results.json with its hash. {pictures} is one `picture` each ({i} counts from 1), {options} the choices
# one a line, {lettered} the same with "A. " before them. `square`: pictures are cropped to their middle square and resized, in pixels.
# "paper": World2VLM names its exams but neither prompts nor frames; these are the benchmarks' own, with its training's pixel budget.
VSI_WORDS = {"choice": "{pictures}These are frames of a video.\n{question}\nOptions:\n{lettered}\n"
                       "Answer with the option's letter from the given choices directly.",
             "number": "{pictures}These are frames of a video.\n{question}\nPlease answer the question using a single word or phrase."}
MINDCUBE_WORDS = {"choice": "{pictures}[Task]\nYour task is to analyze the spatial arrangement of objects in the scene by examining the "
                            "provided images, which show the scene from different viewpoints.\n[Answer Instruction]\nYou only need to "
                            "provide *ONE* correct answer selecting from the options listed below. For example, if you think the correct "
                            "answer is 'A. Above' from 'A. Above B. Under C. Front D. Behind', your response should **only** be "
                            "'<answer>A. Above</answer>'.\n\n[Question]\n{question}"}
MINDJOURNEY_WORDS = {"choice": "These are the images that pair with the question.\n\n{pictures}\nImage 1 is your current egocentric view\n"
                               "\nQuestion: {question}\n\nAnswer Choices:\n{options}\n\nOutput the exact answer from the choices.\n"
                               "Answer: \n"}
LETTER_WORDS = {"choice": "{pictures}{question}\nWhen multiple images are provided, You want to realize that when camera moves left, the "
                          "objects in the image move right, and vice versa. And when you are asked about the movement of the same object "
                          "captured in different images, you can compare the position of the object relative to other objects in the "
                          "image to answer the question.\n\n{lettered}\n\nOnly output the letter of the correct option and nothing else."}
LMMS = {"picture": "<image>", "min_pixels": 200704, "max_pixels": 1605632, "system": "You are a helpful assistant."}
MINDCUBE = {"picture": "<image>", "max_pixels": 230400, "max_new_tokens": 4096, "words": MINDCUBE_WORDS, "scorer": "mindcube",
            "not_counted": ["translation"]}
MINDJOURNEY = {"picture": "Image {i}:\n<image>\n", "max_pixels": 1003520, "max_new_tokens": 1024, "words": MINDJOURNEY_WORDS,
               "scorer": "sat text", "system": "You are an AI assistant designed to help with spatial reasoning in a 3D indoor scene. You "
                                               "must analyze any provided images or observations and answer the question.\n\n"}
PAPER = {"picture": "<image>", "max_pixels": 1003520}
PROTOCOLS = {
    "paper": {"heldout": {"max_pixels": 1003520, "max_new_tokens": 64},  # the longest right answer has about 40 tokens of Qwen's
              "sat-real": MINDJOURNEY | {"square": 512}, "sat-synthesized": MINDJOURNEY,
              "vsi-bench": PAPER | {"frames": 32, "max_new_tokens": 16, "words": VSI_WORDS, "scorer": "vsi"},
              "mindcube": MINDCUBE | PAPER},
    "lmms-eval": {"sat-real": LMMS | {"max_new_tokens": 16, "words": LETTER_WORDS, "scorer": "sat letter"},
                  "sat-synthesized": LMMS | {"max_new_tokens": 16, "words": LETTER_WORDS, "scorer": "sat letter"},
                  "vsi-bench": LMMS | {"frames": 32, "max_new_tokens": 16, "words": VSI_WORDS, "scorer": "vsi"},  # vsibench_multiimage
                  "mindcube": LMMS | {"max_new_tokens": 4096, "words": MINDCUBE_WORDS, "scorer": "mindcube"}},
    "mindcube": {"mindcube": MINDCUBE},
    "mindjourney": {"sat-real": MINDJOURNEY | {"square": 512}, "sat-synthesized": MINDJOURNEY}}

HUB = {"sat-real": "array/SAT", "sat-synthesized": "array/SAT", "vsi-bench": "nyu-visionx/VSI-Bench", "mindcube": "MLL-Lab/MindCube"}
SUBSETS = {"sat-synthesized": ["all"], "vsi-bench": ["debiased"]}  # besides the published choice
VSI_TYPES = dict.fromkeys(["object_rel_direction_easy", "object_rel_direction_medium", "object_rel_direction_hard", "object_rel_distance",
                           "route_planning", "obj_appearance_order"], "choice") | dict.fromkeys(
                          ["object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation"], "number")
SAT_TYPES = ["action_conseq", "action_consequence", "action_sequence", "ego_movement", "goal_aim", "obj_movement", "perspective"]
SETTINGS = ["around", "rotation", "translation", "among", "other"]
TYPES = {"sat-real": SAT_TYPES, "sat-synthesized": SAT_TYPES, "vsi-bench": list(VSI_TYPES), "mindcube": SETTINGS}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The 500 rows of SAT's val split on which MindJourney and its successors report (its data/val.json).
SAT_SYNTHESIZED = """
12 18 22 35 70 75 77 118 144 147 150 152 158 162 167 169 170 189 195 200 204 205 213 219 227 229 230 232 237 244 254 273 289 298 299 301
324 333 341 352 359 368 369 373 386 408 411 427 434 438 441 443 445 454 455 458 486 491 501 520 533 535 539 543 548 609 613 621 633 635
644 654 664 683 692 694 697 699 713 720 723 732 743 749 752 755 758 760 769 770 783 791 796 798 801 805 807 814 832 846 850 854 868 871
872 875 876 884 888 889 890 894 913 919 940 946 950 954 1003 1017 1019 1021 1070 1074 1081 1085 1089 1092 1096 1099 1104 1117 1122 1140
1163 1186 1198 1200 1205 1216 1221 1243 1257 1266 1269 1292 1294 1298 1307 1324 1326 1343 1353 1376 1384 1385 1387 1402 1408 1412 1423
1440 1464 1477 1482 1488 1499 1504 1505 1506 1507 1520 1555 1566 1573 1574 1584 1594 1596 1597 1600 1601 1602 1604 1606 1624 1630 1655
1656 1658 1659 1665 1673 1681 1682 1687 1716 1717 1722 1726 1751 1752 1764 1780 1782 1791 1798 1800 1816 1820 1822 1823 1841 1843 1858
1859 1860 1862 1874 1895 1901 1907 1909 1931 1932 1935 1937 1942 1944 1946 1948 1949 1959 1969 1987 1988 1995 1998 2001 2003 2012 2015
2016 2023 2024 2026 2039 2043 2047 2049 2051 2053 2064 2068 2078 2085 2091 2096 2097 2098 2111 2116 2122 2134 2140 2148 2151 2181 2183
2190 2195 2196 2208 2220 2240 2242 2243 2248 2249 2268 2273 2288 2290 2296 2300 2322 2326 2344 2351 2353 2382 2384 2386 2393 2395 2397
2399 2408 2447 2455 2458 2460 2469 2474 2481 2495 2515 2522 2546 2548 2560 2562 2584 2585 2586 2589 2598 2608 2610 2617 2619 2630 2634
2645 2646 2654 2660 2666 2673 2674 2685 2690 2703 2704 2712 2720 2722 2729 2730 2732 2746 2751 2755 2757 2761 2766 2768 2769 2771 2781
2787 2789 2803 2821 2829 2864 2866 2872 2873 2899 2910 2921 2923 2926 2929 2935 2937 2942 2969 2972 2981 2986 2989 2991 3010 3011 3023
3030 3041 3051 3068 3083 3086 3090 3117 3133 3140 3146 3157 3168 3181 3189 3193 3213 3232 3233 3258 3281 3288 3291 3296 3297 3299 3301
3302 3314 3315 3344 3355 3369 3372 3385 3386 3391 3393 3409 3417 3421 3450 3451 3466 3469 3480 3485 3497 3502 3503 3505 3506 3512 3516
3523 3524 3546 3553 3561 3562 3570 3573 3578 3590 3602 3605 3614 3621 3633 3640 3647 3654 3656 3660 3666 3670 3671 3685 3690 3703 3706
3712 3713 3720 3726 3728 3735 3736 3737 3740 3753 3762 3770 3781 3789 3795 3797 3829 3835 3838 3842 3848 3862 3863 3874 3876 3882 3883
3900 3901 3902 3908 3912 3915 3931 3946 3950 3958 3965 3982 3996 3997 3998
"""


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


def rng(*key):
    return np.random.default_rng(list(hashlib.sha256(repr(key).encode()).digest()))


# ----------------------------------------------------------------------------------------------- questions

@dataclass
class Skipped:
    """What cannot be asked: each question is one line on stderr and is counted, by task and by reason."""
    source: str
    tasks: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)

    def add(self, task: str, number, why: str):
        """`why` begins with the reason under which it is counted: "missing video: scannet/x.mp4"."""
        print(f"{self.source}: question {number} skipped: {why}", file=sys.stderr)
        self.count(task, why)

    def count(self, task: str, why: str, times: int = 1):
        if times:
            self.tasks[task] += times
            self.reasons[why.split(":")[0]] += times


def examinable(path: Path, root: Path, tasks: list[str], skipped: Skipped) -> list[dict]:
    """Questions of our own format in file order; what cannot be asked goes to `skipped`.

    A question: {"number" (among those that load), "task", "text" (user text), "truth", "images" (below root), "scene", "record"}.
    """
    questions = []
    with path.open("rb") as lines:
        total = len(lines.read().splitlines())
    records = read_questions(path, root)
    skipped.count("?", "unusable line", total - len(records))  # read_questions has named these
    for number, record in enumerate(records, 1):
        task, *turns = record["task_type"], *record["messages"]
        text, truth, fault = "\n".join(turn["content"] for turn in turns[:-1]), turns[-1]["content"].strip(), ""
        if not isinstance(task, str) or task not in METRICS:
            fault, task = f"unknown task: {str(task)[:20]!r}, known are {' '.join(METRICS)}", "?"
        elif tasks and task not in tasks:
            continue
        elif reward(task, truth, truth)["overall"] < 1 - 1e-9:
            fault = f"unusable answer: {truth[:60]!r} is outside the grammar of {task}"
        elif len(text) > LONGEST_QUESTION:
            fault = f"unusable text: it has {len(text)} characters, more than {LONGEST_QUESTION}"
        if fault:
            skipped.add(task, number, fault)
            continue
        images = [(path if (path := Path(image)).is_relative_to(root.resolve()) else path.resolve()).relative_to(root.resolve()).as_posix()
                  for image in record["images"]]
        questions.append({"number": number, "task": task, "text": text, "truth": truth, "images": images,
                          "scene": str(record.get("scene_id", f"question {number}")), "record": record})
    return questions


# --- same in 02, 06: shards take turns ---
@contextmanager
def alone(folder: Path):
    """Shards take turns inside: a lock on the folder itself, which leaves no file behind and ends with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
# --- end: shards take turns ---


def snapshot(exam: str, data: str, run: Path) -> Path:
    """The folder with a benchmark's files as published: `data` itself, or the hub's data set of that id, fetched and unzipped there."""
    if Path(data).is_dir():
        return Path(data)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        stop(f"--data {data!r} is no folder: name the one that holds {HUB[exam]} as published, or the hub id {HUB[exam]}")
    folder = run / "6_eval" / "data" / Path(data).name
    wanted = {"sat-real": ["SAT_test.parquet"], "sat-synthesized": ["SAT_val.parquet"]}.get(exam)
    try:
        snapshot_download(data, repo_type="dataset", local_dir=folder, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        stop(f"{data} cannot be fetched: {str(error).strip().splitlines()[0]}: fetch it elsewhere and name its folder with --data")
    for packed in folder.glob("*.zip"):
        if not (mark := folder / f".{packed.stem}.unzipped").is_file():
            zipfile.ZipFile(packed).extractall(folder)
            save(mark, "")
    return folder


def benchmark_question(exam: str, protocol: dict, root: Path, number: int, id: str, task: str, scene: str, images: list[str], text: str,
                       options: list[str], truth: str) -> dict:
    """A question as `examinable` gives them, with the protocol's words, and with "id" and "options" for its scorer."""
    kind = VSI_TYPES.get(task, "choice")
    lettered = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
    words = protocol["words"][kind].format(
        pictures="".join(protocol["picture"].format(i=i) for i in range(1, len(images) + 1)), question=text.strip(), lettered=lettered,
        options="\n".join(options))
    system = [{"role": "system", "content": protocol["system"]}] if protocol.get("system") else []
    messages = [*system, {"role": "user", "content": words}, {"role": "assistant", "content": truth}]
    return {"number": number, "id": id, "task": task, "text": text, "truth": truth, "options": options, "images": images, "scene": scene,
            "exam": exam, "record": {"task_type": task, "messages": messages, "images": [str(root / image) for image in images]}}


def read_sat(exam: str, data: Path, subset: str, protocol: dict, root: Path, skipped: Skipped) -> list[dict]:
    """SAT (array/SAT): SAT_test.parquet is SAT-Real, SAT_val.parquet holds SAT-Synthesized. Columns image_bytes (one or two encoded
    pictures), question, answers (the choices), correct_answer, question_type. Pictures are written once, under the hash of their bytes."""
    path = data / ("SAT_test.parquet" if exam == "sat-real" else "SAT_val.parquet")
    columns = ["image_bytes", "question", "answers", "correct_answer", "question_type"]
    try:
        file = ParquetFile(path)
    except (OSError, ArrowException) as error:
        stop(f"{path} cannot be read ({str(error).splitlines()[0]}): --data must name a folder with {HUB[exam]} as published")
    if missing := set(columns) - set(file.schema_arrow.names):
        stop(f"{path} has no column {', '.join(sorted(missing))}: --data must name a folder with {HUB[exam]} as published")
    published = exam == "sat-synthesized" and not subset
    wanted = {int(row) for row in SAT_SYNTHESIZED.split()} if published else range(file.metadata.num_rows)
    questions, at = [], 0
    for group in range(file.num_row_groups):
        at, first = at + file.metadata.row_group(group).num_rows, at
        rows = [row for row in range(first, at) if row in wanted]
        try:
            table = file.read_row_group(group, columns) if rows else None
        except (OSError, ArrowException) as error:
            for row in rows:
                skipped.add("?", row, f"corrupt parquet row: {str(error).splitlines()[0]}")
            continue
        for row in rows:
            values = {}
            try:
                values = table.slice(row - first, 1).to_pylist()[0]
                questions.append(sat_question(exam, protocol, row, values, root))
            except (OSError, ValueError, TypeError, AttributeError, LookupError, SyntaxError, ArrowException, Image.DecompressionBombError) as error:
                known = values.get("question_type") in SAT_TYPES
                why = f"unknown question type: {str(values['question_type'])[:40]!r}" if values and not known else \
                    f"corrupt parquet row: {str(error)[:200]}"
                skipped.add(values["question_type"] if known else "?", row, why)
    if beyond := sum(row >= file.metadata.num_rows for row in wanted):
        print(f"{path}: {beyond} of the {len(wanted)} published rows are behind its end: fetch it again", file=sys.stderr)
        skipped.count("?", "missing row", beyond)
    return questions


def sat_question(exam: str, protocol: dict, row: int, values: dict, root: Path) -> dict:
    """One row of SAT as a question; ValueError, TypeError or one of PIL's errors where it is none."""
    task, text, options, truth = (values[key] for key in ("question_type", "question", "answers", "correct_answer"))
    if task not in SAT_TYPES or not text.strip() or truth not in options or not values["image_bytes"]:
        raise ValueError("no question, no pictures, or the correct answer is not among the answers")
    folder, contents = root / "6_eval" / "pictures" / exam, [entry["bytes"] for entry in values["image_bytes"]]
    images = [store_picture(content, folder, protocol.get("square")) for content in contents]
    names = [image.relative_to(root).as_posix() for image in images]
    truth = LETTERS[options.index(truth)] if protocol["scorer"] == "sat letter" else truth
    return benchmark_question(exam, protocol, root, row, str(row), task, " ".join(names), names, text, options, truth)


def store_picture(content: bytes, folder: Path, square: int | None) -> Path:
    """Write an encoded picture (`square`: its middle square, resized to so many pixels) under the hash of its bytes; OSError where it is
    none."""
    path = folder / f"{hashlib.sha256(content).hexdigest()[:20]}{f'_{square}' if square else ''}.png"
    if not path.is_file():
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        if square:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.crop((left, top, left + side, top + side)).resize((square, square), Image.BICUBIC)
        encoded = io.BytesIO()
        picture.save(encoded, "PNG", compress_level=1)
        with alone(folder):  # two shards may store the same picture
            save(path, encoded.getvalue())
    return path


def read_vsi(exam: str, data: Path, subset: str, protocol: dict, root: Path, skipped: Skipped) -> list[dict]:
    """VSI-Bench (nyu-visionx/VSI-Bench): test.jsonl, or test-*.parquet of the first release, and DATASET/SCENE.mp4 beside it. The debiased
    subset leaves out the ids of pruned_ids.txt. The frames are cut when the question is asked (`cut_frames`)."""
    tables = sorted(data.glob("test-*.parquet"))
    if (path := data / "test.jsonl").is_file():
        total = len(path.read_bytes().splitlines())
        rows = read_jsonl(path, "dataset", "scene_name", "question_type", "question", "ground_truth")
    elif tables:
        try:
            rows = [row for table in tables for row in ParquetFile(table).read().to_pylist()]
        except (OSError, ArrowException) as error:
            stop(f"{tables[0]} cannot be read: {str(error).splitlines()[0]}: fetch it again")
        total = len(rows)
    else:
        stop(f"{data} holds no test.jsonl and no test-*.parquet: --data must name a folder with {HUB[exam]} as published")
    skipped.count("?", "malformed line", total - len(rows))
    pruned = set()
    if subset:
        if not (data / "pruned_ids.txt").is_file():
            stop(f"{data / 'pruned_ids.txt'} is missing: the debiased subset is published with it")
        pruned = set((data / "pruned_ids.txt").read_text().split())
    questions = []
    for number, row in enumerate(rows):
        id = str(row.get("id", number))
        if id in pruned:
            continue
        try:
            task, why, question = vsi_question(exam, protocol, data, root, number, id, row)
        except (OSError, ValueError, TypeError, LookupError) as error:  # what a wrong row can raise: a NUL in a path, no column, options that are none
            task, why = "?", f"corrupt row: {type(error).__name__} {str(error)[:100]}"
        if why:
            skipped.add(task, id, why)
        else:
            questions.append(question)
    return questions


def vsi_question(exam: str, protocol: dict, data: Path, root: Path, number: int, id: str, row: dict) -> tuple[str, str, dict]:
    """One row of VSI-Bench: its type, why it cannot be asked (empty: it can), and the question."""
    task, video = str(row["question_type"]), f"{row['dataset']}/{row['scene_name']}.mp4"
    options = [re.sub(r"^[A-Z]\.\s*", "", str(option)) for option in row.get("options") or []]
    truth, why = str(row["ground_truth"]).strip(), ""
    if task not in VSI_TYPES:
        return "?", f"unknown question type: {task[:40]!r}", {}
    if VSI_TYPES[task] == "choice" and (len(truth) != 1 or truth not in LETTERS[:len(options)]):
        why = f"corrupt row: the true answer {truth[:20]!r} is none of {len(options)} options"
    elif VSI_TYPES[task] == "number" and not (re.fullmatch(NUMBER, truth) and float(truth) > 0):
        why = f"corrupt row: the true answer {truth[:20]!r} is no number above 0"
    elif not (data / video).resolve().is_relative_to(data.resolve()):
        why = f"missing video: {video} lies outside {data}"
    elif not (data / video).is_file():
        packed = data / f"{row['dataset']}.zip"
        why = f"missing video: {data / video}" + (f", unzip {packed} there" if packed.is_file() else "")
    frames = [f"6_eval/pictures/{exam}/{video[:-4]}/{protocol['frames']}/{i:03d}.png" for i in range(protocol["frames"])]
    question = benchmark_question(exam, protocol, root, number, id, task, video[:-4], frames, str(row["question"]), options, truth)
    return task, why, question | {"video": str(data / video)}


def cut_frames(video: str, folder: Path, count: int):
    """Write `count` frames of a video, linspace(0, n - 1, count) of its n, as 000.png ...; ValueError where it cannot be decoded."""
    with alone(folder.parent):  # two shards may ask about the same video
        if folder.is_dir():
            return
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            with av.open(video) as container:
                n = sum(packet.size > 0 for packet in container.demux(video=0))
            wanted, taken, at = np.linspace(0, n - 1, count).astype(int).tolist(), {}, -1
            with av.open(video) as container:
                container.streams.video[0].thread_type = "AUTO"
                for at, frame in enumerate(container.decode(video=0)):
                    if at in wanted:
                        taken[at] = frame.to_image()
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(str(error)) from error
        if at < 0 or at + 1 < 0.98 * n:  # an edit list may hide some frames at the end; their place takes the last one shown
            raise ValueError(f"ends after {at + 1} of its {n} frames")
        for i, number in enumerate(wanted):  # a video of fewer frames shows some twice
            (taken[number] if number <= at else frame.to_image()).save(part / f"{i:03d}.png", compress_level=1)
        os.replace(part, folder)


def read_mindcube(exam: str, data: Path, subset: str, protocol: dict, root: Path, skipped: Skipped) -> list[dict]:
    """MindCube (MLL-Lab/MindCube): MindCube_tinybench.jsonl (id, question with its options, images by relative path, gt_answer)."""
    paths = [data / below / "MindCube_tinybench.jsonl" for below in ("", "raw", "data/raw")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        stop(f"{data} holds neither MindCube_tinybench.jsonl nor {paths[-1]}: --data must name a folder with {HUB[exam]} as published")
    base = (path.parents[1] if path.parent.name == "raw" else path.parent).resolve()
    rows = read_jsonl(path, "id", "question", "images")
    skipped.count("?", "malformed line", len(path.read_bytes().splitlines()) - len(rows))
    questions = []
    for number, row in enumerate(rows):
        id = str(row["id"])
        try:
            why, question = mindcube_question(exam, protocol, base, root, number, id, row)
        except (OSError, ValueError, TypeError) as error:  # what a wrong row can raise: a NUL in a path, a name too long
            why = f"corrupt row: {type(error).__name__} {str(error)[:100]}"
        if why:
            skipped.add(setting_of(id), id, why)
        else:
            questions.append(question)
    return questions


def mindcube_question(exam: str, protocol: dict, base: Path, root: Path, number: int, id: str, row: dict) -> tuple[str, dict]:
    """One row of MindCube: why it cannot be asked (empty: it can), and the question."""
    truth, text = row.get("gt_answer"), str(row["question"]).replace("<image>", "")
    images = [base / str(image) for image in row["images"]] if isinstance(row["images"], list) else []
    options = [option.strip() for option in re.findall(r"\b[A-E]\.\s*(.*?)(?=\s+[A-E]\.\s|\Z)", text, re.S)]
    if not truth:
        return "no true answer: gt_answer is empty", {}
    if not images:
        return "corrupt row: no images", {}
    if truth not in list(LETTERS[:len(options)]):
        return f"corrupt row: the true answer {str(truth)[:20]!r} is none of {len(options)} options", {}
    if outside := [image for image in images if not image.resolve().is_relative_to(base)]:
        return f"missing picture: {outside[0]} lies outside {base}", {}
    if absent := [image for image in images if not image.is_file()]:
        return f"missing picture: {absent[0]}", {}
    return "", benchmark_question(exam, protocol, root, number, id, setting_of(id), str(images[0].parent.relative_to(base)),
                                  [str(image) for image in images], text, options, truth)


READERS = {"sat-real": read_sat, "sat-synthesized": read_sat, "vsi-bench": read_vsi, "mindcube": read_mindcube}


def by_hash(*key) -> bytes:
    """An order that has nothing to do with the content, and is the same in every run."""
    return hashlib.sha256(repr(key).encode()).digest()


def choose(questions: list[dict], per_task: int) -> list[dict]:
    """At most `per_task` questions of each task (0: all), the first by hash, in file order."""
    if not per_task:
        return questions
    kept = []
    for task in dict.fromkeys(q["task"] for q in questions):
        own = [q for q in questions if q["task"] == task]
        kept += sorted(own, key=lambda q: by_hash(q["task"], q["text"], q["number"]))[:per_task]
    return sorted(kept, key=lambda q: q["number"])


# ----------------------------------------------------------------------------------------------- public scorers

# These do what the published scorers do (lmms-eval 75571cf, MindCube 6d8fd9a, MindJourney aeed003), right or wrong: a published number can
# only be compared with one scored alike. Beside it stands "corrected", which reads the answer as a person would (`chosen`, ANY_NUMBER).
NUMBER_WORDS = dict(zip("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
                        "eighteen nineteen twenty".split(), range(21))) | dict(zip("thirty forty fifty sixty seventy eighty ninety".split(),
                                                                               range(30, 100, 10))) | {"hundred": 100, "thousand": 1000}
PUBLIC_NUMBER = r"-?\d+(?:\.\d+)?"  # ".5" is read as 5, "1,200" as 1
ANY_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?"


def first_number(text: str, digits: str) -> float | None:
    """The first number of a text, in `digits` (a pattern) or in words ("one hundred and five"); None where there is none."""
    text = text.lower()
    written, words = re.search(digits, text), list(re.finditer("[a-z]+", text))
    spoken = next((i for i, word in enumerate(words) if word[0] in NUMBER_WORDS), None)
    if written and (spoken is None or written.start() < words[spoken].start()):
        return float(written[0].replace(",", ""))
    if spoken is None:
        return None
    thousands, rest = 0, 0
    for word in words[spoken:]:
        if word[0] == "and":
            continue
        if word[0] not in NUMBER_WORDS:
            break
        value = NUMBER_WORDS[word[0]]
        if value == 1000:
            thousands, rest = thousands + max(rest, 1) * 1000, 0
        else:
            rest = max(rest, 1) * 100 if value == 100 else rest + value
    return float(thousands + rest)


def relative_accuracy(said: float | None, true: float) -> float:
    """MRA, mean relative accuracy (VSI-Bench): the share of the ten thresholds 0.50 ... 0.95 with |said - true| / true <= 1 - threshold."""
    if said is None or true == 0:
        return float(said == true)
    return float(np.mean(abs(said - true) / true <= 1 - np.linspace(0.5, 0.95, 10)))


def score_vsi(question_type: str, prediction: str, truth) -> float:
    """VSI-Bench by lmms-eval's task: choices by the first word without its dots, numbers by MRA. KeyError for an unknown type."""
    if VSI_TYPES[question_type] == "number":
        return relative_accuracy(first_number(prediction, PUBLIC_NUMBER), float(truth))
    return float(prediction.split(" ")[0].rstrip(".").strip().lower() == str(truth).lower())


def aggregate_vsi(scored: list[tuple[str, float]]) -> dict[str, float]:
    """[(question type, score)] -> mean of each of the eight categories and their plain mean "overall".

    The three kinds of direction questions count as one category, the mean of the three means.
    """
    types, categories = {}, {}
    for kind, score in scored:
        types.setdefault(kind, []).append(score)
    for kind, scores in types.items():
        categories.setdefault(vsi_category(kind), []).append(np.mean(scores))
    result = {category: float(np.mean(means)) for category, means in categories.items()}
    return result | {"overall": float(np.mean(list(result.values())))}


def vsi_category(question_type: str) -> str:
    return re.sub("_(easy|medium|hard)$", "", question_type)


def without_thoughts(text: str) -> str:
    """What lmms-eval's command line cuts off before any task sees the answer."""
    for tag in ("think", "analysis"):
        text = re.sub(rf"<{tag}>.*?</{tag}>", "", text, flags=re.S)
    return text.strip()


def extract_choice(text: str | None) -> str | None:
    """The letter A to E that MindCube's evaluator reads from a response, or None.

    A letter with a dot behind it wins wherever it stands, the last such one. Else a part <Answer>...< is read (the tag in this spelling
    only), then the whole text by a list of phrases, and at last the first lone letter of the lowest line that has one.
    """
    text = text or ""

    def last(text: str, *patterns: str) -> str | None:
        return next((found[-1] for pattern in patterns if (found := re.findall(pattern, text))), None)

    if letter := last(text, r"([A-E])\."):
        return letter
    section = re.search(r"<Answer>([^<]*)", text)
    if section and (letter := last(section[1], r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"\b([A-E])\b")):
        return letter
    if letter := last(text, r"(?:\A|\n)(?:Answer: )?([A-E])(?:\s|\Z)", r'[*"]([A-E])[*"]', r"\bAnswer:?\s*([A-E])\b",
                      r"[Mm]y answer is ([A-E])", r"answer is ([A-E])"):
        return letter
    return next((found[1] for line in reversed(text.split("\n")) if (found := re.search(r"\b([A-E])\b", line))), None)


def setting_of(id: str) -> str:
    """MindCube's setting, by the first of these words inside the id."""
    return next((setting for setting in ("around", "rotation", "translation", "among") if setting in id.lower()), "other")


def score_sat(response: str, choices: list[str], answer: str) -> float:
    """SAT by MindJourney: 1 where the text behind the last line break holds the true choice, anywhere ("no" is found inside "know")."""
    response = response.lower()
    return float(any(choice.lower() in response for choice in choices) and answer.lower() in response.split("\n")[-1])


def sat_letter(response: str, question: str) -> str:
    """What lmms-eval's SAT task compares with the true letter: the first word without punctuation, the letter of a choice's text where the
    *question* itself lists choices as "A. text"."""
    clean = re.sub(r"[^\w\s]", "", response).strip()
    letters = {text.strip(): chr(65 + i) for i, text in enumerate(re.findall(r"\b[A-Z]\.\s+([^\n]*)", question))}
    found = re.search("|".join(map(re.escape, letters)), clean) if letters else None
    return letters.get(found[0], clean).split(" ")[0] if found else clean.split(" ")[0]


def chosen(response: str, choices: list[str], lettered: bool) -> int | None:
    """Which of the choices (their texts) an answer names, for `corrected`: it leads with the letter, holds one choice's text as whole words
    (a choice inside a longer one that is there too does not count), or holds one lone letter. None when nothing or more than one."""
    if tagged := re.findall(r"<answer>(.*?)(?:</answer>|\Z)", response, re.S | re.I):
        response = tagged[-1]
    last, letters = (response.strip().splitlines() or [""])[-1], "".join(chr(65 + i) for i in range(len(choices)))
    if lettered and (alone := re.match(rf"\W*([{letters}{letters.lower()}])(?:\W*\Z|[.):]|\s*\n)", response.strip())):
        return ord(alone[1].upper()) - 65
    text, *plain = (" ".join(["", *re.findall(r"\w+", part.lower()), ""]) for part in [last, *choices])
    found = {i for i, choice in enumerate(plain) if choice in text}
    found -= {i for i in found if any(plain[i] in plain[j] and plain[i] != plain[j] for j in found)}
    if not found and lettered:
        found = {ord(letter) - 65 for letter in re.findall(rf"\b[{letters}]\b", last)}
    return found.pop() if len(found) == 1 else None


def score_choice(scorer: str, sample: dict, response: str) -> dict:
    """{"answered", "score" by the protocol's public scorer, "corrected"} of one response to a benchmark's question."""
    kind, options, truth, text = sample["task_type"], sample["options"], sample["truth"], without_thoughts(response)
    if scorer == "vsi" and VSI_TYPES[kind] == "number":
        said = first_number(text, PUBLIC_NUMBER)
        return {"answered": said is not None, "score": score_vsi(kind, text, truth),
                "corrected": relative_accuracy(first_number(text, ANY_NUMBER), float(truth))}
    if scorer == "vsi":
        answered, score = text.split(" ")[0].rstrip(".").strip().upper() in LETTERS[:len(options)], score_vsi(kind, text, truth)
    elif scorer == "mindcube":
        answered, score = extract_choice(response) is not None, float(extract_choice(response) == truth)
    elif scorer == "sat letter":
        said = sat_letter(response, sample["question"]).replace("_", "").upper()
        answered, score = said in LETTERS[:len(options)], float(said == truth)
    else:
        answered, score = any(option.lower() in response.lower() for option in options), score_sat(response, options, truth)
    lettered = scorer != "sat text"
    named = chosen(text, options, lettered)
    right = named is not None and truth == (chr(65 + named) if lettered else options[named])
    return {"answered": bool(answered), "score": score, "corrected": float(right)}


# ----------------------------------------------------------------------------------------------- scores

def displacement(action: tuple[str, float]) -> tuple[float, float]:
    """Where a move ends, (right, forward) in meters, or a turn's signed angle (right is +, 0) in degrees."""
    name, value = action
    right = {"shift_right": 1, "shift_left": -1, "turn_right": 1, "turn_left": -1}.get(name, 0)
    return right * value, {"forward": 1, "backward": -1}.get(name, 0) * value


def measure(task: str, truth: str, response: str) -> dict:
    """{"answered", scores of METRICS[task], "reward"} of one response; an error is None where there is no answer to measure."""
    if len(response.strip()) > 200:
        response = ""  # no answer, by the rule of the reward
    scores, shape = {"reward": reward(task, truth, response)["overall"]}, SHAPE[task]
    if shape == "box":
        said = parse_box(response)
        scores["iou"] = box_iou(parse_box(truth)[0], said[0]) if said else 0.0
    elif shape == "yes or no":
        said = parse_yes_no(response)
        scores["accuracy"] = float(said == parse_yes_no(truth))
    elif shape in ("meters", "degrees"):
        said, true = parse_quantity(response, shape), parse_quantity(truth, shape)
        off = None if said is None else abs(said - true)
        scores[METRICS[task][0]] = abs((off + 180) % 360 - 180) if off is not None and shape == "degrees" else off
    elif shape == "actions":
        said = parse_actions(response)
        scores["exact"] = float(said == parse_actions(truth))
    else:
        true, said = parse_actions(truth)[0], parse_actions(response)
        said = said if said and len(said) == 1 else None
        scores["direction"] = float(said is not None and said[0][0] == true[0])
        # a turn for a move, or a move for a turn, is no answer to the question how far
        comparable = said and said[0][0].startswith("turn") == true[0].startswith("turn")
        scores[METRICS[task][1]] = math.dist(displacement(true), displacement(said[0])) if comparable else None
    return {"answered": said is not None} | scores


def fill_errors(task: str, truths: list[str], scored: list[dict]) -> list[dict]:
    """Where an error is None, that of the worst answer among the true answers of this task's questions."""
    error = next((metric for metric in METRICS[task] if metric.startswith("error")), None)
    missing = {truth for truth, scores in zip(truths, scored) if error and scores[error] is None}
    worst = {truth: max(measure(task, truth, other)[error] or 0.0 for other in set(truths)) for truth in missing}
    return [scores | {error: worst[truth]} if error and scores[error] is None else scores for truth, scores in zip(truths, scored)]


def best_constants(task: str, truths: list[str], candidates: list[str]) -> dict:
    """{score: {"mean", "answer"}}: for each score the constant answer with the best mean over `truths`."""
    counts, best = Counter(truths), {}
    for answer in candidates:
        scored = fill_errors(task, list(counts), [measure(task, truth, answer) for truth in counts])
        for metric in METRICS[task] + ["reward"]:
            mean = sum(scores[metric] * counts[truth] for truth, scores in zip(counts, scored)) / len(truths)
            sign = -1 if metric.startswith("error") else 1
            if metric not in best or sign * mean > sign * best[metric]["mean"]:
                best[metric] = {"mean": mean, "answer": answer}
    return best


def training_answers(paths: list[Path]) -> dict[str, list[str]]:
    """The most frequent answers of each task in the training questions, the most frequent first."""
    counts = {task: Counter() for task in METRICS}
    for path in paths:
        for record in read_jsonl(path, "task_type", "messages"):
            task, messages = record["task_type"], record["messages"]
            last = messages[-1] if isinstance(messages, list) and messages and isinstance(messages[-1], dict) else {}
            if isinstance(task, str) and task in counts and isinstance(last.get("content"), str):
                counts[task][last["content"].strip()] += 1
    return {task: [answer for answer, _ in sorted(counter.items(), key=lambda item: (-item[1], item[0]))
                   if reward(task, answer, answer)["overall"] == 1][:CONSTANTS] for task, counter in counts.items()}


def interval(values, scenes: list[str], *key, draws: int = 1000) -> dict:
    """{"mean", "low", "high"}: mean and 95 % interval by a bootstrap that draws whole scenes; of a single scene there is none."""
    names, index = np.unique(np.array(scenes, dtype=object).astype(str), return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    if len(names) < 2:
        return {"mean": round(float(np.mean(values)), 6), "low": None, "high": None}
    picked = rng(*key, "bootstrap").integers(len(names), size=(draws, len(names)))  # [draws, scenes]
    low, high = np.percentile(sums[picked].sum(1) / counts[picked].sum(1), [2.5, 97.5])
    return {"mean": round(float(np.mean(values)), 6), "low": round(float(low), 6), "high": round(float(high), 6)}


def grade(samples: list[dict], skipped: Counter, candidates: dict[str, list[str]], seed: int) -> dict:
    """{task: {"questions", "skipped", "unparsable", "metrics": {...}}} of the samples; fills their "scores" in on the way."""
    tasks = {}
    for task in METRICS:
        own = [sample for sample in samples if sample["task_type"] == task]
        if not own:
            if skipped[task]:
                tasks[task] = {"questions": 0, "skipped": skipped[task], "unparsable": 0, "metrics": {}}
            continue
        truths, scenes = [sample["truth"] for sample in own], [sample["scene_id"] for sample in own]
        sides = {"scores": [sample["response"] for sample in own]}
        if own[0]["blank_response"] is not None:
            sides["blank_scores"] = [sample["blank_response"] for sample in own]
        if task == "D1" and all(BOX.search(sample["question"]) for sample in own):
            sides["copy_scores"] = [BOX.search(sample["question"])[0] for sample in own]
        scored = {side: fill_errors(task, truths, [measure(task, truth, said) for truth, said in zip(truths, responses)])
                  for side, responses in sides.items()}
        for side in ("scores", "blank_scores"):
            for sample, scores in zip(own, scored.get(side, [])):
                sample[side] = scores
        constants = best_constants(task, truths, candidates.get(task, []))
        metrics = {}
        for metric in METRICS[task] + ["reward"]:
            columns = {side: np.array([scores[metric] for scores in scores_list]) for side, scores_list in scored.items()}
            metrics[metric] = interval(columns["scores"], scenes, seed, task) | {"constant": constants.get(metric)}
            for side, name in (("blank_scores", "blank"), ("copy_scores", "copy")):
                if side in columns:
                    metrics[metric][name] = interval(columns[side], scenes, seed, task)
                    metrics[metric]["above_" + name] = interval(columns["scores"] - columns[side], scenes, seed, task)
        tasks[task] = {"questions": len(own), "skipped": skipped[task], "metrics": metrics,
                       "unparsable": sum(not scores["answered"] for scores in scored["scores"])}
    return tasks


def overall_interval(exam: str, samples: list[dict], values, *key, draws: int = 1000) -> dict:
    """`interval` of a benchmark's one number. VSI-Bench: mean over categories (`aggregate_vsi`), taken anew in every draw of scenes.
    Others: the plain mean."""
    scenes, kinds = [sample["scene_id"] for sample in samples], [sample["task_type"] for sample in samples]
    if exam != "vsi-bench":
        return interval(values, scenes, *key, draws=draws)
    names, row = np.unique(np.array(scenes, dtype=object).astype(str), return_inverse=True)
    types, column = np.unique(kinds, return_inverse=True)
    categories = [vsi_category(kind) for kind in types]
    member = np.array([[category == other for other in dict.fromkeys(categories)] for category in categories], float)  # [types, C]
    sums, counts = np.zeros((2, len(names), len(types)))
    np.add.at(sums, (row, column), values)
    np.add.at(counts, (row, column), 1)

    def overall(sums, counts):  # [..., types] -> [...]; what a draw of scenes does not hold is left out of its mean
        held = (counts > 0).astype(float)
        means = (sums / np.maximum(counts, 1)) @ member / np.maximum(held @ member, 1)                  # [..., categories]
        return means.sum(-1) / (held @ member > 0).sum(-1)

    mean = round(float(overall(sums.sum(0), counts.sum(0))), 6)
    if len(names) < 2:
        return {"mean": mean, "low": None, "high": None}
    picked = rng(*key, "bootstrap").integers(len(names), size=(draws, len(names)))                      # [draws, scenes]
    low, high = np.percentile(overall(sums[picked].sum(1), counts[picked].sum(1)), [2.5, 97.5])
    return {"mean": mean, "low": round(float(low), 6), "high": round(float(high), 6)}


def best_choices(scorer: str, own: list[dict]) -> dict:
    """{score: (answer, its score for each sample)}: for either score the best constant among a question type's frequent true answers."""
    counts, best = Counter(sample["truth"] for sample in own), {}
    candidates = sorted(counts, key=lambda answer: (-counts[answer], answer))[:CONSTANTS]
    scored = {answer: [score_choice(scorer, sample, answer) for sample in own] for answer in candidates}
    for metric in ("score", "corrected"):
        answer = max(candidates, key=lambda answer: sum(scores[metric] for scores in scored[answer]))
        best[metric] = answer, [scores[metric] for scores in scored[answer]]
    return best


def beside_controls(own: list[dict], mean) -> dict:
    """{"score", "corrected"}: `mean(values)` of the samples' scores, beside the same of grey pictures and of the best constant answers."""
    metrics, sides = {}, [side for side in ("scores", "blank_scores", "constant_scores") if side in own[0]]
    for metric in ("score", "corrected"):
        values = {side: np.array([sample[side][metric] for sample in own]) for side in sides}
        metrics[metric] = mean(values["scores"]) | {"constant": {"mean": mean(values["constant_scores"])["mean"]}}
        if "blank_scores" in values:
            metrics[metric] |= {"blank": mean(values["blank_scores"]), "above_blank": mean(values["scores"] - values["blank_scores"])}
    return metrics


def grade_benchmark(exam: str, protocol: dict, samples: list[dict], skipped: Skipped, seed: int) -> tuple[dict, dict]:
    """({question type: {"questions", "skipped", "unparsable", "metrics"}}, {"score", "corrected"} of the whole exam); fills the samples'
    "scores", "blank_scores" and "constant_scores" in on the way."""
    tasks = {}
    for task in TYPES[exam]:
        own = [sample for sample in samples if sample["task_type"] == task]
        for sample in own:
            sample["scores"] = score_choice(protocol["scorer"], sample, sample["response"])
            if sample["blank_response"] is not None:
                sample["blank_scores"] = score_choice(protocol["scorer"], sample, sample["blank_response"])
            sample["constant_scores"] = {}
        best = best_choices(protocol["scorer"], own) if own else {}
        for metric, (_, scores) in best.items():
            for sample, score in zip(own, scores):
                sample["constant_scores"][metric] = score
        scenes = [sample["scene_id"] for sample in own]
        metrics = beside_controls(own, lambda values: interval(values, scenes, seed, task)) if own else {}
        for metric, (answer, _) in best.items():
            metrics[metric]["constant"]["answer"] = answer
        if own or skipped.tasks[task]:
            tasks[task] = {"questions": len(own), "skipped": skipped.tasks[task], "metrics": metrics,
                           "unparsable": sum(not sample["scores"]["answered"] for sample in own)}
    counted = [sample for sample in samples if sample["task_type"] not in protocol.get("not_counted", [])] or samples
    return tasks, beside_controls(counted, lambda values: overall_interval(exam, counted, values, seed, "overall"))


# ----------------------------------------------------------------------------------------------- table and report

def metrics_of(task: str) -> list[str]:
    """The scores of a task, the main one first; a benchmark's question types have the public score and the corrected one."""
    return METRICS[task] + ["reward"] if task in METRICS else ["score", "corrected"]


def figure(value, metric: str) -> str:
    """A number of a table; a dict with an interval gets ± half its width."""
    if value is None:
        return "-"
    digits = 1 if metric == "error_deg" else 2 if metric == "error_m" else 3
    if not isinstance(value, dict):
        return f"{value:.{digits}f}"
    half = "" if value.get("low") is None else f" ±{(value['high'] - value['low']) / 2:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half}"


def compare(exams: list[dict]) -> list[list[str]]:
    """Rows of the table, the head first: controls of the last exam, then every exam side by side."""
    last = exams[-1]
    rows = [["task", "score", "n", "constant", "blank"] + [exam["tag"] for exam in exams]]
    for task, result in last["tasks"].items():
        for metric, values in result["metrics"].items():
            others = [exam["tasks"].get(task, {}).get("metrics", {}).get(metric) for exam in exams]
            constant, blank = values["constant"], values.get("blank")
            rows.append([task, WORDS[metric], str(result["questions"]), figure(constant and constant["mean"], metric),
                         figure(blank and blank["mean"], metric)] + [figure(other, metric) for other in others])
            if metric == "iou" and "copy" in values:
                copies = [figure(other["copy"]["mean"], metric) if other and "copy" in other else "-" for other in others]
                rows.append([task, "IoU of copying box 1", str(result["questions"]), "", ""] + copies)
    blank, right = last.get("blank_mean_reward"), last.get("right", {})
    for metric, values in last.get("overall", {}).items():
        rows.append(["all", WORDS[metric], str(last["questions"])] + [figure(values.get(side), metric) for side in ("constant", "blank")]
                    + [figure(exam["overall"].get(metric), metric) for exam in exams])
    if "overall" not in last:
        rows.append(["all", "right answers", str(last["questions"])] + [figure(right.get(side), "right") for side in ("constant", "blank")]
                    + [figure(exam.get("right"), "right") for exam in exams])
        rows.append(["all", "mean reward", str(last["questions"]), "", figure(blank and blank["mean"], "reward")]
                    + [figure(exam["mean_reward"], "reward") for exam in exams])
    for key, (words, scale) in PRICES.items():
        costs = [exam.get("cost", {}).get(key) for exam in exams]
        rows.append(["cost", words, "", "", ""] + ["-" if cost is None else f"{cost / scale:.3g}" for cost in costs])
    rows.append(["all", "unparsable", "", "", ""] + [str(exam["unparsable"]) for exam in exams])
    rows.append(["all", "skipped", "", "", ""] + [str(exam["skipped"]) for exam in exams])
    for reason in sorted({reason for exam in exams for reason in exam.get("skipped_by_reason", {})}):
        rows.append(["", f"skipped, {reason}", "", "", ""] + [str(exam.get("skipped_by_reason", {}).get(reason, 0)) for exam in exams])
    return rows


# key of a cost -> its words and its unit in the table, for one question
PRICES = {"seconds": ("seconds a question", 1), "world_seconds": ("of them for imagining", 1), "views": ("views imagined", 1),
          "tokens": ("tokens generated", 1), "vlm_flops": ("VLM, GFLOP", 1e9), "world_flops": ("world model, GFLOP", 1e9),
          "peak_gb": ("peak memory, GB", 1)}


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows)


def visible(text, most: int = 300) -> str:
    """Text from a model or a file for HTML: shortened, without control and direction marks, escaped."""
    text = str(text)
    short = text[:most] + (f" … ({len(text):,} characters)" if len(text) > most else "")
    return html.escape("".join(c if c.isprintable() else " " if c.isspace() else f"\\u{ord(c):04x}" for c in short))


COLOURS = ["#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#0987a0", "#744210", "#4a5568"]  # of the exams, in their order
CONTROLS = {"blank": ("grey pictures", "#a0aec0"), "constant": ("best constant answer", "#dda94f")}


def label(tag: str) -> str:
    return visible(tag if len(tag) <= 24 else tag[:23] + "…")


def colour_of(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def bars(exams: list[dict], wanted: list[tuple[str, str]], top: float) -> str:
    """An SVG of horizontal bars 0..top for each (task, metric): every exam with its interval, then the last one's controls."""
    parts, y, x0, span = [], 8, 66, 240
    for task, metric in wanted:
        values = [exam["tasks"].get(task, {}).get("metrics", {}).get(metric) for exam in exams]
        shown = [(value, colour_of(number)) for number, value in enumerate(values)]
        shown += [(values[-1].get(name), colour) for name, (_, colour) in CONTROLS.items()]
        parts.append(f'<text x="0" y="{y + 10}" font-weight="bold">{visible(task, 9)}</text>'
                     f'<text x="0" y="{y + 24}">{WORDS[metric].split(" (")[0]}</text>')
        for number, (value, colour) in enumerate(shown):
            if value is not None:
                width = span * min(1.0, max(0.0, value["mean"] / top))
                parts.append(f'<rect fill="{colour}" x="{x0}" y="{y}" width="{width:.1f}" height="10"/>'
                             f'<text x="{x0 + span + 8}" y="{y + 9}">{figure(value["mean"], metric)}</text>')
            if value is not None and value.get("low") is not None and number < len(exams):
                low, high = (x0 + span * min(1.0, max(0.0, value[end] / top)) for end in ("low", "high"))
                parts.append(f'<path stroke="black" d="M{low:.1f} {y + 5}H{high:.1f}M{low:.1f} {y + 2}v6M{high:.1f} {y + 2}v6"/>')
            y += 12 if value is not None else 0
        y = max(y, 30) + 10
    grid = "".join(f'<path stroke="#ddd" d="M{x0 + span * i / 4} 0V{y}"/>'
                   f'<text x="{x0 + span * i / 4}" y="{y + 12}" text-anchor="middle">{top * i / 4:g}</text>' for i in range(5))
    return f'<svg viewBox="0 0 360 {y + 18}" font-size="11" font-family="sans-serif">{grid}{"".join(parts)}</svg>'


def price_plot(exams: list[dict], price, words: str) -> str:
    """An SVG: share of right answers over the cost of a question (log), a point with its interval for every exam; lines are the controls.

    `price(exam)` is None where it was not counted or is nothing: the point is left out and named below.
    """
    priced = [(number, exam, price(exam)) for number, exam in enumerate(exams) if exam.get("right") and price(exam)]
    left_out = [exam["tag"] for exam in exams if exam["tag"] not in [other["tag"] for _, other, _ in priced]]
    note = f'<p><small>Not in the plot, their cost is unknown: {visible(", ".join(left_out))}</small></p>' if left_out else ""
    if not priced:
        return note
    x0, x1, y0, y1 = 34, 346, 200, 10  # the frame, in the units of the viewBox
    first, last = (math.log10(f(cost for _, _, cost in priced)) for f in (min, max))
    first, last = math.floor(first * 2 - 0.1) / 2, math.ceil(last * 2 + 0.1) / 2  # half decades around all points
    def across(cost): return x0 + (x1 - x0) * (math.log10(cost) - first) / (last - first)
    def up(share): return y0 + (y1 - y0) * share
    parts = [f'<path stroke="#ddd" d="M{x0} {up(i / 4)}H{x1}"/><text x="{x0 - 5}" y="{up(i / 4) + 4}" text-anchor="end">{i * 25}</text>'
             for i in range(5)]
    every = math.ceil((last - first) / 4) if last - first > 1 else 0.5  # decades from one label to the next
    for k in range(math.ceil(first / every), math.floor(last / every) + 1):
        x = across(10 ** (k * every))
        parts.append(f'<path stroke="#ddd" d="M{x:.1f} {y0}V{y1}"/>'
                     f'<text x="{x:.1f}" y="{y0 + 15}" text-anchor="middle">{10 ** (k * every):.2g}</text>')
    for name, (_, colour) in CONTROLS.items():
        value = exams[-1]["right"].get(name)
        if value is not None:
            parts.append(f'<path stroke="{colour}" stroke-width="2" stroke-dasharray="5 4" d="M{x0} {up(value):.1f}H{x1}"/>')
    for place, (number, exam, cost) in enumerate(priced):  # the names stand below, two a line: near points would hide each other's
        x, value, colour = across(cost), exam["right"], colour_of(number)
        if value["low"] is not None:
            parts.append(f'<path stroke="{colour}" d="M{x:.1f} {up(value["low"]):.1f}V{up(value["high"]):.1f}"/>')
        left, line = x0 + place % 2 * 160, y0 + 50 + place // 2 * 15
        parts.append(f'<circle cx="{x:.1f}" cy="{up(value["mean"]):.1f}" r="5" fill="{colour}" fill-opacity=".8"/>'
                     f'<circle cx="{left + 5}" cy="{line - 4}" r="5" fill="{colour}"/><text x="{left + 15}" y="{line}">{label(exam["tag"])}</text>')
    return (f'<svg viewBox="0 0 360 {y0 + 44 + -(-len(priced) // 2) * 15}" font-size="11" font-family="sans-serif">{"".join(parts)}'
            f'<text x="{(x0 + x1) / 2}" y="{y0 + 30}" text-anchor="middle">right answers (%) over {words}</text></svg>{note}')


def picture_html(picture: Image.Image, boxes: list[tuple[list[float], str]]) -> str:
    """An <img> with the picture inside the page, its longer side 320 pixels, and boxes in 0..1000 drawn on it. Photographs as JPEG."""
    scale = 320 / max(picture.size)
    small = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.NEAREST if scale > 1 else Image.LANCZOS)
    draw = ImageDraw.Draw(small)
    for box, colour in boxes:
        x1, y1, x2, y2 = sides(box)
        draw.rectangle([x1 / 1000 * small.width, y1 / 1000 * small.height, x2 / 1000 * small.width, y2 / 1000 * small.height],
                       outline=colour, width=3)
    file = io.BytesIO()
    kind = "png" if scale > 1 else "jpeg"
    small.save(file, kind)
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}">'


def is_right(task: str, scores: dict) -> bool:
    """Whether an answer counts as right: the main score at least one half; for S3 and S4 a reward of at least 0.95."""
    main = metrics_of(task)[0]
    return scores["reward"] >= 0.95 if SHAPE.get(task) in ("meters", "degrees") else scores[main] >= 0.5


def right_answers(samples: list[dict], candidates: dict[str, list[str]], seed: int) -> dict:
    """Share of right answers over all questions, {"mean", "low", "high"}, and its controls "blank" and "constant" (each task's best)."""
    shares, constant = {}, 0
    for side in ("scores", "blank_scores"):
        if side in samples[0]:
            values = [float(is_right(sample["task_type"], sample[side])) for sample in samples]
            shares[side] = interval(values, [sample["scene_id"] for sample in samples], seed, "right")
    for task in {sample["task_type"] for sample in samples}:
        truths = Counter(sample["truth"] for sample in samples if sample["task_type"] == task)
        constant += max((sum(n * is_right(task, measure(task, truth, answer)) for truth, n in truths.items())
                         for answer in candidates.get(task, [])), default=0)
    blank = shares.get("blank_scores")
    return shares["scores"] | {"blank": blank and blank["mean"], "constant": round(constant / len(samples), 6)}


def by_difficulty(samples: list[dict]) -> dict:
    """{task: {difficulty, how many steps and how far as 03 writes it: {"questions", main score: mean}}}"""
    groups = {}
    for sample in samples:
        if isinstance(kind := sample.get("difficulty"), str):
            groups.setdefault(sample["task_type"], {}).setdefault(kind, []).append(sample["scores"][METRICS[sample["task_type"]][0]])
    return {task: {kind: {"questions": len(values), METRICS[task][0]: round(sum(values) / len(values), 6)} for kind, values in sorted(kinds.items())}
            for task, kinds in sorted(groups.items())}


def example_html(sample: dict, answers: list[tuple[str, dict | None]], root: Path, folder: Path) -> str:
    """A card: pictures with boxes (first box orange, truth green, this exam's answer red), imagined views, question, truth, and what
    every exam's student said, [(tag, its sample or None)]."""
    try:
        pictures, task = [read_picture(root / image) for image in sample["images"][:8]], sample["task_type"]
    except ValueError:  # gone since it was asked about
        return ""
    boxes = [[] for _ in pictures]
    for i, found in enumerate(BOX.finditer(sample["question"])):  # the boxes that the question names, in picture order
        boxes[min(i, len(boxes) - 1)].append(([float(number) for number in found.groups()], "orange"))
    if SHAPE.get(task) == "box":
        boxes[-1].append((parse_box(sample["truth"])[0], "lime"))
        if said := parse_box(sample["response"]):
            boxes[-1].append((said[0], "red"))
    verdicts = {number: is_right(task, other["scores"]) for number, (_, other) in enumerate(answers) if other}
    lists = {word: " ".join(str(number) for number, right in verdicts.items() if right == (word == "right")) for word in ("right", "wrong")}
    lines = ""
    for number, (tag, other) in enumerate(answers):
        if other:
            scores = ", ".join(f"{WORDS[metric]} {figure(other['scores'][metric], metric)}" for metric in metrics_of(task))
            word = "right" if verdicts[number] else "wrong"
            lines += (f'<li class="{word}"><b>{label(tag)}</b>, {word}: <bdi>{visible(other["response"])}</bdi> '
                      f'<small>{scores}</small>')
    views = "".join(f'<figure>{picture_html(Image.open(folder / image).convert("RGB"), [])}'
                    f'<figcaption>{visible(words, 80)}</figcaption></figure>' for words, image in sample.get("imagined", [])[:6])
    return (f'<div class="card" data-task="{visible(task)}" data-right="{lists["right"]}" data-wrong="{lists["wrong"]}">'
            f'<b>{visible(task)}</b> <small>{visible(sample["scene_id"], 40)}, question {sample["number"]}</small>'
            f'<div>{"".join(picture_html(*pair) for pair in zip(pictures, boxes))}</div>'
            + (f'<details><summary>{len(sample["imagined"])} imagined views</summary>{views}</details>' if views else "")
            + f'<p>{visible(sample["question"].replace("<image>", ""))}</p>'
            f'<p>true: <bdi>{visible(sample["truth"])}</bdi></p><ul>{lines}</ul></div>')


STYLE = """body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;max-width:60em;padding:1em;color:#222;background:#fff}
table{border-collapse:collapse;font-size:14px}td,th{padding:.2em .6em;text-align:right;white-space:nowrap}
td{border-top:1px solid #ddd}td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}.wide{overflow-x:auto}
svg{width:100%;max-width:34em;display:block}small{color:#555}h1,p{overflow-wrap:anywhere}h2{margin-top:1.5em}
.key span{display:inline-block;margin-right:1em}.key b{font-size:1.3em}
.plots,.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20em,100%),1fr));gap:1em}
.cards{grid-template-columns:repeat(auto-fill,minmax(min(17em,100%),1fr))}
.card{border:1px solid #ddd;padding:.6em;overflow-wrap:anywhere;min-width:0}.card p{margin:.6em 0}
.card img{width:45%;max-width:11em;margin:.3em .3em 0 0;image-rendering:pixelated}
figure{display:inline-block;width:45%;margin:.3em .3em 0 0;vertical-align:top}.card figure img{width:100%}figcaption{font-size:12px}
ul{list-style:none;padding:0;margin:0}li{border-left:5px solid #38a169;padding-left:.5em;margin-top:.4em}li.wrong{border-color:#e53e3e}
select{font:inherit;margin:0 .5em .5em 0;max-width:100%}"""
# The page's only script hides the cards that the three choices leave out. Its hash in the page's policy keeps any other from running.
SCRIPT = """const [task, exam, verdict] = ["task", "exam", "verdict"].map(id => document.getElementById(id));
function choose() {
  let shown = 0;
  for (const card of document.querySelectorAll(".card")) {
    card.hidden = task.value && card.dataset.task != task.value
      || verdict.value && !card.dataset[verdict.value].split(" ").includes(exam.value);
    shown += !card.hidden;
  }
  document.getElementById("shown").textContent = shown + " shown";
}
for (const choice of [task, exam, verdict]) choice.onchange = choose;
choose();"""
CARDS = 4  # examples of each task that the last exam's student got right, and as many wrong ones


def report_html(exams: list[dict], samples: list[dict], others: dict[str, dict], root: Path, folder: Path) -> str:
    """The whole report as one page without outside files. The last exam is this one, its answers `samples`; those of the `others`:
    {tag: {number: sample}}."""
    results = exams[-1]
    tasks = {task: result for task, result in results["tasks"].items() if result["metrics"]}
    shares = [(task, "reward" if metrics_of(task)[0].startswith("error") else metrics_of(task)[0]) for task in tasks]
    charts = bars(exams, shares, 1.0)
    for unit, metric in (("meters", "error_m"), ("degrees", "error_deg")):
        wanted = [(task, metric) for task in tasks if metric in metrics_of(task)]
        if wanted:
            groups = [exam["tasks"].get(task, {}).get("metrics", {}).get(metric) or {} for task, _ in wanted for exam in exams]
            shown = [value for group in groups for value in (group, group.get("blank"), group.get("constant")) if value]
            top = max([value["mean"] for value in shown] + [1e-9])
            step = 10 ** math.floor(math.log10(top))
            charts += f"<h3>Error in {unit} (lower is better)</h3>" + bars(exams, wanted, math.ceil(top / step) * step)
    cards, said = [], {exam["tag"]: others.get(exam["tag"], {}) for exam in exams} | {results["tag"]: {s["number"]: s for s in samples}}
    for task in tasks:
        own = sorted((sample for sample in samples if sample["task_type"] == task), key=lambda s: by_hash(s["question"], s["number"]))
        for right in (True, False):
            chosen = [sample for sample in own if is_right(task, sample["scores"]) == right][:CARDS]
            cards += [example_html(sample, [(tag, answers.get(sample["number"])) for tag, answers in said.items()], root, folder)
                      for sample in chosen]
    head, *lines = compare(exams)
    table = "<tr>" + "".join(f"<th>{visible(cell)}</th>" for cell in head) + "</tr>"
    table += "".join("<tr>" + "".join(f"<td>{visible(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    names = [(label(tag), colour_of(number)) for number, tag in enumerate(said)] + list(CONTROLS.values())
    key = " ".join(f'<span><b style="color:{colour}">&#9632;</b> {text}</span>' for text, colour in names)
    plots = price_plot(exams, lambda exam: exam.get("cost", {}).get("seconds"), "seconds a question")
    plots += "</div><div>" + price_plot(exams, operations, "GFLOP a question, VLM and world model")
    choices = {"task": [("", "all tasks")] + [(task, task) for task in tasks],
               "exam": [(str(number), tag) for number, tag in enumerate(said)][::-1],
               "verdict": [("", "right and wrong"), ("right", "right"), ("wrong", "wrong")]}
    selects = "".join(f'<select id="{name}" aria-label="{name}">' + "".join(f'<option value="{visible(value)}">{visible(text, 24)}</option>'
                      for value, text in options) + "</select>" for name, options in choices.items())
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{}'".format(
        base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode())
    return f"""<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Exam of {visible(results["tag"])}</title><style>{STYLE}</style>
<h1>Exam of {visible(results["tag"])}</h1>
<p>Checkpoint {visible(results["checkpoint"])}, {results["questions"]} questions of {visible(results["questions_file"])},
{results["skipped"]} skipped. The constant answer is chosen for every score anew, from the {CONSTANTS} most frequent training
answers, with the exam in hand. Whiskers and &#177;: 95&nbsp;%, by drawing whole scenes.</p>
<h2>Right answers and their cost</h2><p class="key">{key}</p>
<p>Percent of questions answered rightly, over what one question costs (logarithmic). Dashed: the two controls.</p>
<div class="plots"><div>{plots}</div></div>
<h2>Scores by task</h2><p class="key">{key}</p>{charts}
<h2>Table</h2><div class="wide"><table>{table}</table></div>
<h2>Examples</h2><p>Boxes: orange as named in the question, green true, red answered by {label(results["tag"])}.</p>
<p>{selects}<small id="shown"></small></p>
<div class="cards">{"".join(cards)}</div><script>{SCRIPT}</script></html>
"""


def operations(exam: dict) -> float | None:
    """GFLOP a question of the VLM and the world model together, None where one was not counted."""
    counts = [exam.get("cost", {}).get(key) for key in ("vlm_flops", "world_flops")]
    return None if None in counts else sum(counts) / 1e9


# ----------------------------------------------------------------------------------------------- two exams, compared

def paired(a: list[dict], b: list[dict]) -> list[tuple[dict, dict]]:
    """Samples of two exams that answer the same question about the same pictures; of equal ones the first with the first, and so on."""
    def keyed(samples):
        count = Counter()
        for sample in samples:
            key = (sample["task_type"], sample["question"], sample["truth"], tuple(sample["images"]))
            count[key] += 1
            yield (key, count[key]), sample
    theirs = dict(keyed(b))
    return [(sample, theirs[key]) for key, sample in keyed(a) if key in theirs]


def difference(values: np.ndarray, scenes: list[str], *key, draws: int = 2000) -> dict:
    """{"mean", "low", "high", "p"} of paired differences: a bootstrap over scenes; p: twice the share of draws on the other side of 0."""
    names, index = np.unique(np.array(scenes, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2:
        return {"mean": round(float(values.mean()), 6), "low": None, "high": None, "p": None}
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    picked = rng(*key, "paired").integers(len(names), size=(draws, len(names)))  # [draws, scenes]
    means = sums[picked].sum(1) / counts[picked].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    p = min(1.0, 2 * (min((means <= 0).sum(), (means >= 0).sum()) + 1) / (draws + 1))
    return {"mean": round(float(values.mean()), 6), "low": round(float(low), 6), "high": round(float(high), 6), "p": round(float(p), 6)}


def compare_two(cfg: Config):
    """`--compare A B`: print and write how B differs from A on the questions that both answered."""
    if len(cfg.compare) != 2:
        stop("--compare wants two finished exams, tags or folders: --compare base sft")
    run, exams = Path(cfg.run), []
    for name in cfg.compare:
        folder = next((folder for folder in (run / "6_eval" / name, Path(name)) if (folder / "samples.jsonl").is_file()), None)
        if folder is None:
            stop(f"{run / '6_eval' / name / 'samples.jsonl'} is missing: examine {name} first, or name the folder of a finished exam")
        exams.append(read_jsonl(folder / "samples.jsonl", "task_type", "scene_id", "images", "question", "truth", "scores"))
    pairs = paired(*exams)
    if not pairs:
        stop(f"{cfg.compare[0]} and {cfg.compare[1]} have no question in common: examine both on the same questions")
    groups = {task: [pair for pair in pairs if pair[0]["task_type"] == task]
              for task in [*METRICS, *VSI_TYPES, *SAT_TYPES, *SETTINGS]}
    whole = ["right", "reward"] if pairs[0][0]["task_type"] in METRICS else ["score", "corrected"]
    tables, rows = {}, [["task", "score", "n", cfg.compare[0], cfg.compare[1], "difference", "95 % interval", "p"]]
    for task, own in (groups | {"all": pairs}).items():
        for metric in (whole if task == "all" else metrics_of(task)) if own else []:
            a, b = (np.array([(sample["scores"] | {"right": is_right(sample["task_type"], sample["scores"])})[metric] for sample in side],
                             dtype=float) for side in zip(*own))
            found = difference(b - a, [sample["scene_id"] for sample, _ in own], cfg.seed, task, metric)
            tables.setdefault(task, {})[metric] = {"n": len(own), "a": round(a.mean(), 6), "b": round(b.mean(), 6), **found}
            span = "-" if found["low"] is None else f"{found['low']:+.3f} to {found['high']:+.3f}"
            name = "mean of questions" if task == "all" and "score" in whole else task  # a benchmark's own number may weigh its types
            rows.append([name, WORDS[metric], str(len(own)), figure(a.mean(), metric), figure(b.mean(), metric),
                         f"{found['mean']:+.3f}", span, "-" if found["p"] is None else f"{found['p']:.4f}"])
    alone = [len(samples) - len(pairs) for samples in exams]
    save(run / "6_eval/compare.json", json.dumps({"a": cfg.compare[0], "b": cfg.compare[1], "questions": len(pairs), "only_a": alone[0],
                                                  "only_b": alone[1], "tasks": tables}, indent=1))
    print(aligned(rows))
    print(f"{len(pairs)} questions that both answered; left out: {alone[0]} only in {cfg.compare[0]}, {alone[1]} only in {cfg.compare[1]}")
    print(f"written: {run / '6_eval/compare.json'}")


# ----------------------------------------------------------------------------------------------- cost

def vlm_flops(model, prompt_tokens: int, grids: torch.Tensor, generated: int) -> int:
    """Floating-point operations of one answer, asked alone and without padding: 2 for each weight that a token or a patch meets, and

        attention = 4 width (sum over queries of the keys they are compared with)    a layer

    `grids` [pictures, 3] (frames, rows, columns) in patches. A causal mask halves nothing, as in torch.utils.flop_counter and in a dense
    kernel. The last token of an answer is not read again. For dense models of the Qwen-VL family.
    """
    text, vision = model.config.get_text_config(), model.config.vision_config
    weights = Counter()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
            part = next((part for part in ("head", "language_model", "merger") if part in name), "tower")
            weights[part] += module.weight.numel()
    frames, patches = grids[:, 0], grids[:, 1] * grids[:, 2]  # [pictures]; the tower looks at one frame at a time
    every = (frames * patches).sum().item()
    whole = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))  # Qwen2.5-VL: the other layers look at windows
    window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2
    compared = (whole * frames * patches ** 2 + (vision.depth - whole) * frames * patches * patches.clamp(max=window)).sum().item()
    merged = every // vision.spatial_merge_size ** 2
    seen = 2 * weights["tower"] * every + 2 * weights["merger"] * merged + 4 * vision.hidden_size * compared

    read, heads = prompt_tokens + generated - 1, text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    pairs = prompt_tokens ** 2 + sum(range(prompt_tokens + 1, read + 1))
    return seen + 2 * weights["language_model"] * read + 2 * weights["head"] * generated + 4 * width * text.num_hidden_layers * pairs


# seconds: all of them, of which 02 took world_seconds; tokens: generated; views: imagined
NOTHING = {"seconds": 0.0, "world_seconds": 0.0, "tokens": 0, "prompt_tokens": 0, "vlm_flops": 0, "world_flops": 0, "views": 0,
           "peak_gb": 0.0}


def peak_gb(device) -> float:
    """Most memory so far: of the GPU where the student is on one, else of the largest process, this one or the world model's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20


def spent(student: Student, prompt: dict, generated: int, seconds: float) -> dict:
    """What one response cost: its share of its batch's seconds, tokens, operations, and the memory of the process."""
    n = len(prompt["ids"])
    return NOTHING | {"seconds": seconds, "tokens": generated, "prompt_tokens": n, "peak_gb": peak_gb(student.model.device),
                      "vlm_flops": vlm_flops(student.model, n, prompt["grids"], generated)}


def plus(a: dict, b: dict) -> dict:
    """Two costs together; None, not counted, stays so."""
    both = {key: None if None in (a[key], b[key]) else a[key] + b[key] for key in a}
    return both | {"peak_gb": max(a["peak_gb"], b["peak_gb"])}


def mean_cost(costs: list[dict]) -> dict:
    """Per question; the memory is the highest."""
    columns = {key: [cost[key] for cost in costs] for key in NOTHING}
    means = {key: None if None in values else round(sum(values) / len(values), 6) for key, values in columns.items()}
    return means | {"peak_gb": round(max(columns["peak_gb"]), 3)}


def price_list(samples: list[dict]) -> dict:
    """Mean cost of a question over all, and for each task."""
    tasks = {task: mean_cost([sample["cost"] for sample in samples if sample["task_type"] == task])
             for task in sorted({sample["task_type"] for sample in samples})}
    return mean_cost([sample["cost"] for sample in samples]) | {"tasks": tasks}


# ----------------------------------------------------------------------------------------------- the exam

def sight(student: Student, question: dict, blank: bool) -> tuple | str:
    """The patches and grids of a question's pictures, or the reason why there are none."""
    paths = question["record"]["images"]
    try:
        if "video" in question:
            cut_frames(question["video"], Path(paths[0]).parent, len(paths))
        return look(student, paths, blank)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's ways to say: no picture
        what = f"unreadable video: {question['video']}" if "video" in question else f"unreadable picture: {', '.join(paths)[-100:]}"
        return f"{what}: {str(error)[:200]}"


def prepare(student: Student, batch: list[dict], blank: bool) -> list[dict | str]:
    """For each question its prompt, as `generate` takes it, or the reason why there is none. The same pictures are the same tensor."""
    seen, prompts = {}, []
    for question in batch:
        paths = tuple(question["record"]["images"])
        if paths not in seen:  # neighbours in a batch ask about the same pictures
            seen[paths] = sight(student, question, blank)
        if isinstance(seen[paths], str):
            prompts.append(seen[paths])
            continue
        pixels, grids = seen[paths]
        try:
            whole = encode(student, question["record"], grids)
        except ValueError as error:
            prompts.append(f"unusable text: {error}")
            continue
        prompts.append({"ids": whole["ids"][:whole["prompt"]], "positions": whole["positions"][:, :whole["prompt"]],
                        "pixels": pixels, "grids": grids})
    return prompts


def answer(student: Student, prompts: list[dict], max_new_tokens: int, *draw) -> list[tuple[str, int]]:
    """The responses, each with the number of tokens that it took: greedy, or drawn with `draw`, the last arguments of `generate`."""
    tokens = generate(student, prompts, max_new_tokens, 1, *draw)
    return [(student.tokenizer.decode(sampled[0], skip_special_tokens=True).strip(), len(sampled[0])) for sampled in tokens]


def ask(student: Student, batch: list[dict], cfg: Config) -> list[dict]:
    """What is kept of a batch, a record a question: its answers and their cost (an equal share of the batch's seconds), or the "fault" for which it
    cannot be asked."""
    records = [{"number": question["number"]} for question in batch]
    for key, blank in (("response", False), ("blank_response", True))[:1 + cfg.blank]:
        begun = time.perf_counter()
        prompts = prepare(student, batch, blank)
        good = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        draw = []
        if cfg.temperature:  # a question's own numbers: its draw depends neither on the batch nor on what another student says
            numbers = [rng("draw", cfg.seed, batch[i]["number"]).random(cfg.max_new_tokens) for i in good]
            draw = [cfg.temperature, torch.tensor(np.array(numbers), dtype=torch.float32)]
        answers = answer(student, [prompts[i] for i in good], cfg.max_new_tokens, *draw) if good else []
        seconds = (time.perf_counter() - begun) / max(1, len(good))
        for record, prompt in zip(records, prompts):
            if isinstance(prompt, str):
                record["fault"] = prompt
        for i, (response, generated) in zip(good, answers):
            records[i][key] = response
            if not blank:  # the grey pictures are a control, no part of the method
                records[i] |= {"blank_response": None, "cost": spent(student, prompts[i], generated, seconds)}
    return records


def batches_of(questions: list[dict], size: int) -> list[list[dict]]:
    """Batches of at most `size` questions: those with equally many pictures together, so that little is padding, and those about the same
    pictures in one batch wherever they fit, so that they share one prefill."""
    groups, batches = {}, []
    for question in sorted(questions, key=lambda q: (len(q["record"]["images"]), q["images"], q["number"])):
        groups.setdefault(tuple(question["record"]["images"]), []).append(question)
    for pictures, group in groups.items():
        for part in (group[i:i + size] for i in range(0, len(group), size)):
            if batches and len(batches[-1]) + len(part) <= size and len(batches[-1][0]["record"]["images"]) == len(pictures):
                batches[-1] += part
            else:
                batches.append(list(part))
    return batches


def student_of(source: str, dtype: torch.dtype, device: str, cfg: Config, protocol: dict) -> Student:
    """The student; a protocol may have small pictures enlarged, as far as the student's own limit lets them."""
    student = load_student(source, dtype, device, cfg.attention, cfg.max_pixels)
    if "min_pixels" in protocol:
        size = student.image_processor.size
        student.image_processor.size = size | {"shortest_edge": min(max(size["shortest_edge"], protocol["min_pixels"]), size["longest_edge"])}
    return student


def answered(folder: Path, own: Path) -> dict[int, dict]:
    """{number: record} of what all shards have written so far. A kill may leave half a line at the end of the `own` file: it is cut off."""
    records = {}
    for path in sorted(folder.glob("samples*.jsonl")):
        content = path.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]
        if path == own and len(whole) < len(content):
            os.truncate(path, len(whole))
        records |= {record["number"]: record for record in map(json.loads, whole.splitlines())}
    return records


# ----------------------------------------------------------------------------------------------- the rival: imagining at test time

# After MindJourney (arXiv 2507.12508): the VLM sends the world model on short walks from the question's first picture, scores what it sees
# there, and answers with the helpful views beside the question. A step tries every action from every beam, and its sub-steps are views:
SEARCH = [("forward", 0.75, 0.25), ("turn_left", 30.0, 10.0), ("turn_right", 30.0, 10.0)]  # action, whole, sub-step (meters, degrees)
# All views of a question and a step stand in one prompt, which is asked twice (explore, helpful). Scores are 0..9. A response that is not
# one score a view counts as zeros, is counted, and ends the search: a student that cannot follow the prompt answers as without the rival.
# Departures: the published code draws random scores 0..5 there (below its limit of 8, so with the same end), turns by 27 degrees in
# sub-steps of 3, and scores a pose again that another walk led to.
CRITERIA = {"explore": "how worthwhile it is to go on exploring from there in order to answer the question",
            "helpful": "how helpful it is for answering the question; a view that rules out a wrong answer helps as well, a spoilt picture "
                       "does not"}
LONGEST_PATH = 200  # frames; a longer motion is not imagined. 10 meters take 50, 360 degrees 72


def merged(actions: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of one name added up: turn_left 10, turn_left 10, forward 0.5 -> turn_left 20, forward 0.5."""
    runs = [(name, list(run)) for name, run in itertools.groupby(actions, key=lambda action: action[0])]
    return [(name, sum(value for _, value in run)) for name, run in runs]


def in_words(actions: list[tuple[str, float]]) -> str:
    return "; ".join(f"turn {name[5:]} {value:g} degrees" if name.startswith("turn") else
                     f"move {name.removeprefix('shift_')} {value:g} meters" for name, value in merged(actions))


def poses_along(actions: list[tuple[str, float]]) -> tuple[np.ndarray, list[int]]:
    """c2w [N,4,4] from the identity, with 0.2 m and 5 degrees a frame at most, and the keyframes: 0 and the last frame of every action."""
    poses, keyframes = [np.eye(4)], [0]
    for name, value in actions:
        frames = max(1, math.ceil(value / (5.0 if name.startswith("turn") else 0.2) - 1e-9))
        right, ahead = displacement((name, value / frames))
        step = np.eye(4)
        if name.startswith("turn"):
            step[:3, :3] = yaw_matrix(right)
        else:
            step[:3, 3] = right, 0, ahead
        for _ in range(frames):
            poses.append(poses[-1] @ step)
        keyframes.append(len(poses) - 1)
    return np.stack(poses), keyframes


def yaw_matrix(yaw_deg: float) -> np.ndarray:
    c, s = math.cos(math.radians(yaw_deg)), math.sin(math.radians(yaw_deg))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def origin(image: Path, root: Path) -> dict | None:
    """The keys of a trajectory record that say from where this picture looks; None where it is no picture.

    A picture that 02 wrote has a view.json beside it. In a room its pose there is start @ c2w[frame], from which a new path starts;
    the first frame of `warp` is its photograph. Any other picture is a photograph itself, with 54 degrees along its longer side.
    """
    try:
        with Image.open(image) as picture:
            width, height = picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # `prepare` will name it
        return None
    fov = 54.0 if width >= height else 2 * math.degrees(math.atan(math.tan(math.radians(27)) * width / height))
    photo = {"source": "real", "room": None, "start": None, "anchor": str(image.resolve()), "width": width, "height": height,
             "fov_x_deg": fov}
    if not (image.parent / "view.json").is_file():
        return photo
    try:
        view, frame = json.loads((image.parent / "view.json").read_text()), int(image.stem)
        size = {key: view[key] for key in ("width", "height", "fov_x_deg")}
        if view["room"] is None:
            return photo | size | ({"anchor": view["anchor"]} if frame == 0 and view["teacher"] == "warp" else {})
        (x, z, yaw), pose = view["start"], np.array(view["c2w"][frame])
        x, _, z = np.array([x, 0, z]) + yaw_matrix(yaw) @ pose[:3, 3]
        yaw += math.degrees(math.atan2(pose[0, 2], pose[2, 2]))
        json.loads((root / view["room"]).read_text())
        return size | {"source": "simulated", "anchor": None, "room": view["room"], "start": [round(x, 7), round(z, 7), round(yaw, 7)]}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        stop(f"{image.parent / 'view.json'} does not say where {image.name} looks from ({type(error).__name__}: {error}): make the views "
             "with 02, or remove it, so that its pictures count as photographs")


def imagine(sub: Path, walks: list[tuple], starts: dict[str, dict], root: Path, cfg: Config) -> tuple[dict, float]:
    """Let 02 walk: [(picture, actions, views)] -> {walk: its last `views` key frames, none where 02 could not}, and the seconds of a walk.

    `sub` becomes a run folder of its own: 1_trajectories with every path and the rooms, 2_views by 02 (which goes on after a kill).
    """
    lines, places = [], {image: f"p{number:05d}" for number, image in enumerate(starts)}
    for number, (image, actions, count) in enumerate(walks):
        actions = [*merged(actions[:-count]), *actions[-count:]]
        c2w, keyframes = poses_along(actions)
        lines.append({"scene_id": places[image], "traj_id": f"w{number:06d}", "split": "heldout", "actions": actions,
                      "keyframes": keyframes, "c2w": (c2w.round(7) + 0.0).tolist()} | starts[image])
    sub.mkdir(parents=True, exist_ok=True)
    lock, meta = os.open(sub, os.O_RDONLY), sub / "2_views/meta.json"
    fcntl.flock(lock, fcntl.LOCK_EX)  # 02 inherits it: should this process be killed alone, its rerun waits here until that 02 has ended
    if not meta.is_file() or not json.loads(meta.read_text())["finished"]:
        for room in {line["room"] for line in lines} - {None}:
            save(sub / room, (root / room).read_bytes())
        save(sub / "1_trajectories/trajectories.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        counts = {"trajectories": len(lines)}
        save(sub / "1_trajectories/meta.json", json.dumps({"stage": Path(__file__).stem, "finished": True, "counts": counts}))
        command = [sys.executable, str(Path(__file__).with_name("02_imagine_views.py")), "--run", str(sub), "--teacher", cfg.coupled,
                   "--keep", "keyframes", "--seed", str(cfg.seed), *shlex.split(cfg.coupled_args)]
        with (sub / "02.log").open("a") as log:
            if subprocess.run(command, stdout=log, pass_fds=[lock]).returncode:
                stop(f"02 ended with a fault (see the lines above and {sub / '02.log'}): correct --coupled or --coupled_args")
    os.close(lock)
    frames = {view["traj_id"]: view["frames"] for view in read_jsonl(sub / "2_views/views.jsonl", "traj_id", "frames")}
    views = {walk: [str(sub / frame) for frame in frames.get(line["traj_id"], [])[-walk[2]:]] for line, walk in zip(lines, walks)}
    return views, json.loads(meta.read_text())["seconds"] / len(lines)


def stated(text: str) -> list[tuple[str, float]]:
    """All actions that a question's text states, in their order: what D1, D2 and D4 say was done, and what A4 claims. Others state none."""
    actions = [parse_actions(match[0])[0] for match in ACTION.finditer(text)]
    return actions if sum(value / (5.0 if name.startswith("turn") else 0.2) for name, value in actions) <= LONGEST_PATH else []


def onward(beam: tuple) -> list[tuple[tuple, int]]:
    """The walks that a step tries from a beam, each with the number of views at its end; a turn is not taken back."""
    back = {"turn_left": "turn_right", "turn_right": "turn_left"}.get(beam[-1][0]) if beam else None
    tries = [(name, part, round(whole / part)) for name, whole, part in SEARCH if name != back]
    return [(beam + ((name, part),) * count, count) for name, part, count in tries]


def with_views(record: dict, views: list[tuple[str, str]], ask: str = "") -> dict:
    """The question with imagined views [(words, picture), ...] behind its own pictures, and `ask` at its end."""
    *turns, last, told = record["messages"]
    own, mark, rest = last["content"].rpartition("<image>")
    shown = "".join(f" Imagined from image 1, after {words}: <image>" for words, _ in views)
    last = last | {"content": own + mark + shown + ("\n" if views else "") + rest + ("\n" + ask if ask else "")}
    return record | {"messages": [*turns, last, told], "images": record["images"] + [image for _, image in views]}


def scores_of(response: str, count: int) -> list[int] | None:
    """`3, 9, 0` -> [3, 9, 0] when it is `count` whole numbers 0..9 and nothing else; else None."""
    numbers = re.fullmatch(r"(?:(?:output|scores):)?\s*\[?(\d(?:[,\s]+\d)*)\]?\.?", response.strip(), re.I)
    found = [int(digit) for digit in re.findall(r"\d", numbers[1])] if numbers else []
    return found if len(found) == count else None


def rate(student: Student, batch: list[tuple[dict, list]], cfg: Config) -> list[dict]:
    """The VLM scores the new views of each question, [(question, [(words, picture), ...])], by both criteria: {"explore": [score a view],
    "helpful": [...], "unparsable": responses without scores, "cost"}. The two prompts of a question are neighbours and share one prefill."""
    begun, prompts_of = time.perf_counter(), []
    for question, views in batch:
        prompts_of += [{"record": with_views(question["record"], views, f"Do not answer it yet. Score each of the {len(views)} imagined views from 0 to 9: "
                                             f"{meaning}. Give {len(views)} whole numbers in the order of the views, separated by commas, and nothing "
                                             "else.")} for meaning in CRITERIA.values()]
    prompts = prepare(student, prompts_of, False)
    good = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]  # the others are named when they are asked
    said = answer(student, [prompts[i] for i in good], 8 + 2 * max(len(views) for _, views in batch)) if good else []
    seconds = (time.perf_counter() - begun) / max(1, len(good))
    rated = [{criterion: [0] * len(views) for criterion in CRITERIA} | {"unparsable": 0, "cost": NOTHING} for _, views in batch]
    for i, (response, generated) in zip(good, said):
        n, criterion = i // len(CRITERIA), [*CRITERIA][i % len(CRITERIA)]
        scores, own = scores_of(response, len(batch[n][1])), rated[n]
        rated[n] = own | {criterion: scores or own[criterion], "unparsable": own["unparsable"] + (scores is None),
                          "cost": plus(own["cost"], spent(student, prompts[i], generated, seconds))}
    return rated


def walks_of(question: dict, beams: list[tuple], cfg: Config) -> list[tuple[str, tuple, int]]:
    """What a step imagines for a question: (picture, actions, how many key frames at the end are views)."""
    image, motion = question["record"]["images"][0], tuple(stated(question["text"]))
    if cfg.coupled_stated:
        return [(image, motion, 1)] if beams and motion else []
    return [(image, actions, count) for beam in beams for actions, count in onward(beam)]


def rate_all(questions: list[dict], states: list[dict], sub: Path, load, cfg: Config) -> list[dict]:
    """`rate` of every question that has new views, a batch a file in sub/scores, so that a killed search goes on."""
    asked = [i for i, state in enumerate(states) if state["views"]]
    rated = [{key: [] for key in CRITERIA} | {"cost": NOTHING, "unparsable": 0} for _ in states]
    for at in tqdm(range(0, len(asked), cfg.batch), unit="batch", desc=f"imagined/{sub.name}: scores"):
        file, batch = sub / "scores" / f"{at:06d}_{cfg.batch}.json", asked[at:at + cfg.batch]
        if not file.is_file():
            views = [[(words, frame) for words, (_, frame) in states[i]["views"].items()] for i in batch]
            save(file, json.dumps(rate(load(), list(zip([questions[i] for i in batch], views)), cfg)))
        for i, result in zip(batch, json.loads(file.read_text())):
            rated[i] = result
    return rated


def advance(state: dict, rated: dict, cfg: Config) -> dict:
    """The state after a step: on from the views best to explore, the most helpful ones shown too; of equals the earlier view."""
    explore, helpful = (sorted((n for n, score in enumerate(rated[key]) if score >= least), key=lambda n: -rated[key][n])
                        for key, least in zip(CRITERIA, cfg.search_scores))
    views = [(words, *view) for words, view in state["views"].items()]  # (words, actions, picture)
    return state | {"beams": [views[n][1] for n in explore[:cfg.search_beams]], "cost": plus(state["cost"], rated["cost"]),
                    "shown": state["shown"] | {views[n][0]: views[n][2] for n in helpful[:cfg.search_views]},
                    "scorings": state["scorings"] + len(CRITERIA) * bool(views), "unparsable": state["unparsable"] + rated["unparsable"]}


def rival(questions: list[dict], load, folder: Path, root: Path, cfg: Config) -> tuple[list[dict], dict]:
    """The questions with imagined views among their pictures ("imagined" [[words, picture], ...], their "cost"), and a summary.

    `load()` gives the student, which only unscored views need. Every step is one call of 02 for all questions, in
    folder/imagined/STEP; when the motion is stated there is one step, and nothing is scored.
    """
    for question in questions:
        if "video" in question:
            with suppress(OSError, ValueError):  # `sight` names it when the question is asked
                cut_frames(question["video"], Path(question["record"]["images"][0]).parent, len(question["record"]["images"]))
    starts = {image: origin(Path(image), root) for image in dict.fromkeys(question["record"]["images"][0] for question in questions)}
    state = {"beams": [], "views": {}, "known": set(), "shown": {}, "cost": NOTHING, "scorings": 0, "unparsable": 0}
    states = [state | {"beams": [()] if starts[question["record"]["images"][0]] else []} for question in questions]
    no_network = cfg.coupled in ("simulator", "warp") and "--depth" not in cfg.coupled_args
    for step in range(1 if cfg.coupled_stated else cfg.search_steps):
        wanted = [walks_of(question, state["beams"], cfg) for question, state in zip(questions, states)]
        walks = list(dict.fromkeys(itertools.chain(*wanted)))  # questions about one picture share its walks; each is charged for them
        if not walks:
            break
        seen, seconds = imagine(folder / "imagined" / str(step + 1), walks, starts, root, cfg)
        for i, own in enumerate(wanted):
            ends = [(actions[:len(actions) - count + 1 + k], frame) for image, actions, count in own
                    for k, frame in enumerate(seen[image, actions, count])]
            price = NOTHING | {"seconds": seconds * len(own), "world_seconds": seconds * len(own), "views": len(ends),
                               "world_flops": 0 if no_network or not own else None}  # 02 does not count those of its networks
            views = {in_words(actions): (actions, frame) for actions, frame in ends}
            new = {words: view for words, view in views.items() if words not in states[i]["known"]}
            states[i] = states[i] | {"views": new, "known": states[i]["known"] | new.keys(), "cost": plus(states[i]["cost"], price)}
        if cfg.coupled_stated:
            states = [state | {"shown": {words: frame for words, (_, frame) in state["views"].items()}} for state in states]
        else:
            rated = rate_all(questions, states, folder / "imagined" / str(step + 1), load, cfg)
            states = [advance(state, result, cfg) for state, result in zip(states, rated)]
    summary = {"teacher": cfg.coupled, "way": "stated motion" if cfg.coupled_stated else "search",
               "views": sum(state["cost"]["views"] for state in states), "shown": sum(len(state["shown"]) for state in states),
               "questions_without": sum(not state["shown"] for state in states),
               "scorings": sum(state["scorings"] for state in states),
               "unparsable_scorings": sum(state["unparsable"] for state in states)}
    return [question | {"record": with_views(question["record"], list(state["shown"].items())), "cost": state["cost"],
                        "imagined": [[words, str(Path(image).relative_to(folder))] for words, image in state["shown"].items()]}
            for question, state in zip(questions, states)], summary


# ----------------------------------------------------------------------------------------------- all together

def show(exams: list[dict], folder: Path):
    """The last lines of the output: the table and the path of the report."""
    for exam in exams[:-1]:
        if exam["questions_sha256"] != exams[-1]["questions_sha256"] or exam["asked_sha256"] != exams[-1]["asked_sha256"]:
            print(f"note: {exam['tag']} was examined on other questions than {exams[-1]['tag']}")
        if exam.get("protocol_sha256") != exams[-1].get("protocol_sha256"):
            print(f"note: {exam['tag']} was examined by another protocol than {exams[-1]['tag']}")
    for exam in exams:
        if how := exam.get("coupled"):
            print(f"{exam['tag']}: {how['teacher']} imagined {how['views']} views by {how['way']}, {how['shown']} were shown; "
                  f"{how['questions_without']} questions had none; "
                  f"{how['unparsable_scorings']} of {how['scorings']} scorings could not be read")
    print(aligned(compare(exams)))
    print(f"report: {folder / 'report.html'}")


def check_settings(cfg: Config) -> tuple[dict, int, int]:
    """-> (the protocol as it will be used, the shard i, of n)."""
    if cfg.exam != "heldout" and cfg.exam not in READERS:
        stop(f"unknown --exam {cfg.exam}: heldout, {', '.join(READERS)}")
    if cfg.protocol not in PROTOCOLS or cfg.exam not in PROTOCOLS[cfg.protocol]:
        stop(f"--protocol {cfg.protocol} says nothing of {cfg.exam}: choose {', '.join(p for p in PROTOCOLS if cfg.exam in PROTOCOLS[p])}")
    if cfg.exam != "heldout" and not cfg.data:
        stop(f"--exam {cfg.exam} needs --data: a folder with {HUB[cfg.exam]} as published, or that hub id")
    if cfg.subset and cfg.subset not in SUBSETS.get(cfg.exam, []):
        stop(f"--exam {cfg.exam} has no subset {cfg.subset!r}")
    known = TYPES.get(cfg.exam, list(METRICS))
    if unknown := set(cfg.tasks) - set(known):
        stop(f"unknown tasks {' '.join(sorted(unknown))}: known are {' '.join(known)}")
    given = {key: getattr(cfg, key) for key in ("frames", "max_new_tokens", "max_pixels") if getattr(cfg, key)}
    protocol = {"name": cfg.protocol} | PROTOCOLS[cfg.protocol][cfg.exam] | given
    if min([cfg.batch, *given.values()]) < 1 or cfg.per_task < 0 or not 0 <= cfg.temperature < math.inf:
        stop("--batch, --frames, --max_new_tokens and --max_pixels must be at least 1, --per_task and --temperature at least 0")
    searches = min(cfg.search_steps, cfg.search_beams, cfg.search_views) > 0 and len(cfg.search_scores) == 2
    if not searches or cfg.coupled_stated and not cfg.coupled:
        stop("--search_steps, --search_beams and --search_views must be at least 1, --search_scores two numbers; "
             "--coupled_stated needs --coupled TEACHER")
    shard = re.fullmatch(r"(\d+)/(\d+)", cfg.shard)
    if not shard or int(shard[1]) >= int(shard[2]):
        stop(f"--shard {cfg.shard}: want i/n with 0 <= i < n, for example 0/4")
    try:
        torch.empty(0, device="cpu" if cfg.device == "auto" else cfg.device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        stop(f"--device {cfg.device}: {str(error).splitlines()[0][:80]}: choose cpu, cuda, cuda:1, ... or auto")
    try:
        shlex.split(cfg.coupled_args)
    except ValueError as error:
        stop(f"--coupled_args {cfg.coupled_args!r}: {error}")
    if cfg.coupled and int(shard[2]) > 1:
        stop("--coupled imagines for all questions together: leave --shard out")
    return protocol, int(shard[1]), int(shard[2])


def read_exam(cfg: Config, protocol: dict, run: Path) -> tuple[list[dict], Skipped, Path, str]:
    """-> (questions, what was skipped, the folder from which their pictures' paths start, a hash of what will be asked)."""
    if cfg.exam != "heldout":
        data, root = snapshot(cfg.exam, cfg.data, run), run.resolve()
        skipped = Skipped(cfg.exam)
        questions = READERS[cfg.exam](cfg.exam, data, cfg.subset, protocol, root, skipped)
        questions = [question for question in questions if not cfg.tasks or question["task"] in cfg.tasks]
        return questions, skipped, root, sha256([[q["number"], q["record"]["messages"]] for q in questions])
    path = next((p for p in (run / cfg.questions, Path(cfg.questions)) if p.is_file()), None)
    if path is None:
        stop(f"{run / cfg.questions} is missing: run 03_build_qa.py first, or name another file with --questions")
    root = Path(cfg.data_root) if cfg.data_root else run if path.resolve().is_relative_to(run.resolve()) else path.parent
    skipped = Skipped(str(path))
    questions = examinable(path, root, cfg.tasks, skipped)
    return questions, skipped, root, sha256([[q["number"], q["text"], q["truth"], q["images"]] for q in questions])


def main(cfg: Config):
    started, run = time.perf_counter(), Path(cfg.run)
    if cfg.compare:
        return compare_two(cfg)
    protocol, shard, shards = check_settings(cfg)
    cfg = replace(cfg, **{key: protocol.get(key, 0) for key in ("frames", "max_new_tokens", "max_pixels")})
    checkpoint = next((path for path in (run / cfg.checkpoint, Path(cfg.checkpoint)) if path.is_dir()), None)
    if checkpoint is None and "/" not in cfg.checkpoint:  # a hub id has an owner
        stop(f"{run / cfg.checkpoint} is missing: run the stage that writes it, or name another checkpoint")
    way = f"-{cfg.exam}" * (cfg.exam != "heldout") + f"-{cfg.coupled}" * bool(cfg.coupled) + "-stated" * cfg.coupled_stated
    tag = cfg.tag or re.sub(r"^\d+_", "", Path(cfg.checkpoint).name) + way
    if not re.fullmatch(r"\w[\w.-]*", tag):
        stop(f"the tag {tag!r} is no folder name: choose another --tag")
    folder = run / "6_eval" / tag
    beside = []
    for other in cfg.beside:
        if other != tag and not (run / "6_eval" / other / "results.json").is_file():
            stop(f"{run / '6_eval' / other / 'results.json'} is missing: examine {other} first, or leave it out of --beside")
        if other != tag:
            beside.append(json.loads((run / "6_eval" / other / "results.json").read_text()))
    if apart := [other["tag"] for other in beside if other.get("exam", "heldout") != cfg.exam]:
        stop(f"{', '.join(apart)} sat another exam than {cfg.exam}: leave it out of --beside")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    bfloat16 = device != "cpu" and torch.cuda.is_bf16_supported() if cfg.dtype == "auto" else cfg.dtype == "bfloat16"
    dtype = torch.bfloat16 if bfloat16 else torch.float32

    questions, skipped, root, asked_of = read_exam(cfg, protocol, run)
    questions = choose(questions, cfg.per_task)
    if not questions:
        stop(f"{skipped.source} holds no question that can be asked: see the lines above, and --tasks")
    decides = {key: value for key, value in asdict(cfg).items() if key not in ("run", "tag", "beside", "data", "shard", "batch")}
    decides["questions_sha256"] = asked_of
    parent = checkpoint if checkpoint and (checkpoint / "meta.json").is_file() else None  # a bare base model has none
    try:
        with alone(folder):
            meta = begin(folder, decides, parent, f"_{shard}_of_{shards}")
    except SystemExit as ended:
        if ended.code == 0:  # a finished exam: nothing to do but to show it, perhaps beside others than last time
            show(beside + [json.loads((folder / "results.json").read_text())], folder)
        raise

    load, summary = cache(lambda: student_of(str(checkpoint or cfg.checkpoint), dtype, device, cfg, protocol)), None
    if cfg.coupled:
        questions, summary = rival(questions, load, folder, root, cfg)
    place = {pictures: i for i, pictures in enumerate(sorted({tuple(question["images"]) for question in questions}))}
    batches = batches_of([question for question in questions if place[tuple(question["images"])] % shards == shard], cfg.batch)
    log = folder / ("samples.jsonl" if shards == 1 else f"samples.{shard}of{shards}.jsonl")
    records = answered(folder, log)
    rounds, asked, asking_s = 1 + cfg.blank, 0, 0.0
    with tqdm(total=sum(map(len, batches)) * rounds, unit="answers", desc=f"6_eval/{tag}", smoothing=0.1) as progress:
        for batch in batches:
            if todo := [question for question in batch if "response" not in records.get(question["number"], {})]:  # a picture may be back
                student, begun = load(), time.perf_counter()
                new = ask(student, todo, cfg)
                with log.open("a") as lines:
                    lines.write("".join(json.dumps(record) + "\n" for record in new))
                records |= {record["number"]: record for record in new}
                asked, asking_s = asked + len(todo) * rounds, asking_s + time.perf_counter() - begun
            progress.update(len(batch) * rounds)
    if asked:
        print(f"{asked} answers in {asking_s:.1f} s: {asked / asking_s:.0f} a second")

    with alone(folder):  # the shard that ends last finds all answers; should two end together, the second finds the folder finished
        records = answered(folder, log)
        if missing := sum(question["number"] not in records for question in questions):
            print(f"shard {cfg.shard} is done; {missing} answers of other shards are missing, the last shard to end completes the folder")
            return
        if json.loads((folder / "meta.json").read_text())["finished"]:
            print(f"{folder} was completed by another shard")
            return
        results = complete(folder, cfg, tag, protocol, questions, records, skipped, root, beside, asked_of, summary)
        finish(folder, meta, {"answers": results["questions"] * rounds, "skipped": results["skipped"]}, started)
    show(beside + [results], folder)


def complete(folder: Path, cfg: Config, tag: str, protocol: dict, questions: list[dict], records: dict, skipped: Skipped, root: Path,
             beside: list[dict], asked_of: str, summary: dict | None) -> dict:
    """Grade all answers and write samples.jsonl, results.json and report.html; the results."""
    run, samples = Path(cfg.run), []
    for question in sorted(questions, key=lambda question: question["number"]):
        record = records[question["number"]]  # a whole sample where a kill came behind the end: it holds the cost of the search too
        if "fault" in record:
            skipped.add(question["task"], question["number"], record["fault"])
            continue
        samples.append({"number": question["number"], "id": question.get("id", question["number"]), "exam": cfg.exam,
                        "task_type": question["task"], "scene_id": question["scene"], "images": question["images"],
                        "question": question["text"], "options": question.get("options"), "truth": question["truth"]}
                       | {"response": record["response"], "blank_response": record["blank_response"],
                          "cost": record["cost"] if "task_type" in record else plus(question.get("cost", NOTHING), record["cost"])}
                       | {key: question["record"][key] for key in ("difficulty",) if key in question["record"]}
                       | ({"imagined": question["imagined"]} if cfg.coupled else {}))
    if not samples:
        stop(f"no picture of {skipped.source} can be read: see the lines above")
    results = {"tag": tag, "checkpoint": cfg.checkpoint, "exam": cfg.exam,
               "questions_file": cfg.questions if cfg.exam == "heldout" else cfg.exam, "questions_sha256": asked_of,
               "asked_sha256": sha256([sample["number"] for sample in samples]),
               "protocol": protocol, "protocol_sha256": sha256(protocol), "questions": len(samples), "skipped": skipped.tasks.total(),
               "skipped_by_reason": dict(sorted(skipped.reasons.items()))}
    if cfg.exam == "heldout":
        train = [run / file if (run / file).is_file() else Path(file) for file in cfg.train]
        if missing := [str(file) for file in train if not file.is_file()]:
            print(f"no constant answers from {', '.join(missing)}: missing", file=sys.stderr)
        candidates = training_answers([file for file in train if file.is_file()])
        tasks = grade(samples, skipped.tasks, candidates, cfg.seed)
        scenes = [sample["scene_id"] for sample in samples]
        means = {side: interval([sample[side]["reward"] for sample in samples], scenes, cfg.seed)
                 for side in ("scores", "blank_scores") if side in samples[0]}
        results |= {"mean_reward": means["scores"], "blank_mean_reward": means.get("blank_scores"),
                    "right": right_answers(samples, candidates, cfg.seed), "difficulties": by_difficulty(samples)}
    else:
        tasks, results["overall"] = grade_benchmark(cfg.exam, protocol, samples, skipped, cfg.seed)
        results["right"] = {key: value["mean"] if isinstance(value, dict) else value for key, value in results["overall"]["score"].items()}
    results |= {"unparsable": sum(result["unparsable"] for result in tasks.values()), "coupled": summary,
                "cost": price_list(samples), "tasks": tasks}
    save(folder / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    save(folder / "results.json", json.dumps(results, indent=1))
    others = {exam["tag"]: {sample["number"]: sample for sample in read_jsonl(run / "6_eval" / exam["tag"] / "samples.jsonl", "number")}
              for exam in beside if exam["questions_sha256"] == results["questions_sha256"]}
    save(folder / "report.html", report_html(beside + [results], samples, others, root, folder))
    plot, mark, _ = price_plot(beside + [results], lambda exam: exam.get("cost", {}).get("seconds"), "seconds a question").rpartition("</svg>")
    if mark:
        save(folder / "accuracy_cost.svg", plot.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1) + mark)  # a file of its own must say so
    for shard in folder.glob("samples.*of*.jsonl"):
        shard.unlink()
    return results


def sha256(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    run(main, Config)
