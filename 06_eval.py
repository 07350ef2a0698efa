"""Evaluate a student on questions about rooms that no training file holds, and on benchmarks.

Every question is asked twice: with its pictures, and with grey ones of the same size (the blind
baseline), which shows what language alone can guess. Beside both stands the best constant answer:
per score, the one of the 50 most frequent training answers that does best on these very questions.
The questions about one scene share its pictures, so that a bootstrap draws whole scenes:

    score = mean_i s(answer_i, truth_i)     interval = its quantiles 2.5 % and 97.5 % in 1,000 draws

Scores: motion: direction right, and the error (meters between displacements, degrees between signed
angles); motions: all names and values right; box: IoU; yes_no, relation, choice: right;
meters, degrees: the error; for all the reward of stage 5. What is not one answer is unparsable: it
scores 0, its error is that of the worst true answer of its task. --coupled TEACHER is the test-time
baseline, which asks the world model while answering.

Reads   RUN/3_qa/heldout.jsonl or any file of that format (--questions), or a benchmark's own files:
        {"task_type": "A2", "answer_type": "motion", "images": ["2_views/room_7/t001/000.png", ...],
         "messages": [{"role": "user", "content": "<image><image>Which way did the camera turn?"},
         {"role": "assistant", "content": "turn right 30 degrees"}], "scene_id": "room_7", ...}
Writes  RUN/6_eval/TAG/samples.jsonl, results.json, report.html, accuracy_cost.svg; imagined/ (the
        runs in which 02 imagined for --coupled); RUN/6_eval/compare.json (--compare A B: B minus A)
        {"number": 12, "task_type": "A2", "question": "...", "truth": "turn right 30 degrees",
         "response": "turn right 20 degrees", "blank_response": "turn left 60 degrees",
         "scores": {"answered": true, "direction": 1.0, "error_deg": 10.0, "reward": 0.968}, ...}

    python 06_eval.py --run runs/demo --checkpoint 5_refine --beside base sft
    python 06_eval.py --run runs/big --benchmark vsi-bench --data ~/VSI-Bench --protocol lmms-eval
    python 06_eval.py --run runs/demo --checkpoint base --coupled simulator
    python 06_eval.py --run runs/demo --compare base refined
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import av
import jinja2
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer
from transformers import BaseImageProcessor, HfArgumentParser, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from kernels import load_model
from kernels.lora import adapter_config, load_adapter
from kernels.prefill import generate
from kernels.rows import encode_question

TRAIN = "3_qa/sft.jsonl 3_qa/static.jsonl"
TINY = "--tasks A1 A2 A3 A4 D1 D2 D3 D4 --blank False"
RECIPES = {
    "paper": "",
    "tiny": f"{TINY} --per_task 600",
    "sampled": f"{TINY} --per_task 400 --temperature 1",  # answers drawn as GRPO draws them
}


@dataclass
class Config:
    recipe: str = HfArg(default="paper", help="a row of RECIPES; your own flags win")
    run: str = HfArg(default="runs/demo", help="folder of the run")
    checkpoint: str = HfArg(default="5_refine", help="student: a folder (in the run) or a hub id")
    tag: str = HfArg(default="", help="name of the folder under 6_eval; empty: the checkpoint's")
    benchmark: str = HfArg(default="heldout", help="heldout, or a public one of PROTOCOLS")
    data: str = HfArg(default="", help="folder with a benchmark's files as published")
    protocol: str = HfArg(default="paper", help="how a benchmark is asked: a row of PROTOCOLS")
    questions: str = HfArg(default="3_qa/heldout.jsonl", help="questions, in the run or anywhere")
    data_root: str = HfArg(default="", help="folder of the pictures; empty: as --questions says")
    train: list[str] = HfArg(default_factory=TRAIN.split, help="their answers are the constants")
    beside: list[str] = HfArg(default_factory=list, help="tags to show in the same table, before")
    tasks: list[str] = HfArg(default_factory=list, help="tasks to ask; empty: all")
    per_task: int = HfArg(default=0, help="questions per task at most, chosen by hash; 0: all")
    blank: bool = HfArg(default=True, help="ask again with grey pictures; doubles the time")
    batch: int = HfArg(default=64, help="questions answered at a time; lower it to save memory")
    temperature: float = HfArg(default=0.0, help="0: greedy; 1: drawn as GRPO draws")
    max_new_tokens: int = HfArg(default=0, help="per answer; 0: as the protocol says")
    shard: str = HfArg(default="0/1", help="i/n: this process asks about every n-th picture list")
    coupled: str = HfArg(default="", help='a teacher of 02 and its flags, such as "svc --steps 20"')
    coupled_stated: bool = HfArg(default=False, help="imagine the stated motion: no search")
    compare: list[str] = HfArg(default_factory=list, help="only compare two finished evaluations")
    seed: int = HfArg(default=0, help="of the bootstrap, and of answers that are drawn")
    dtype: Literal["auto", "bfloat16", "float32"] = HfArg(default="auto", help="of the arithmetic")


# How a benchmark is asked. {pictures}: a `picture` each, {i} counts from 1; {options}: a line each;
# {lettered}: the same as "A. ..."; square: the middle square of a picture, of so many pixels.
# "paper": World2VLM names benchmarks, but no prompts: these are the benchmarks' own.
VSI_WORDS = {
    "choice": """{pictures}These are frames of a video.
{question}
Options:
{lettered}
Answer with the option's letter from the given choices directly.""",
    "number": """{pictures}These are frames of a video.
{question}
Please answer the question using a single word or phrase.""",
}
MINDCUBE_WORDS = """{pictures}[Task]
Your task is to analyze the spatial arrangement of objects in the scene by examining the provided \
images, which show the scene from different viewpoints.
[Answer Instruction]
You only need to provide *ONE* correct answer selecting from the options listed below. For \
example, if you think the correct answer is 'A. Above' from 'A. Above B. Under C. Front D. \
Behind', your response should **only** be '<answer>A. Above</answer>'.

[Question]
{question}"""
MINDJOURNEY_SYSTEM = """You are an AI assistant designed to help with spatial reasoning in a 3D \
indoor scene. You must analyze any provided images or observations and answer the question.

"""
MINDJOURNEY_WORDS = """These are the images that pair with the question.

{pictures}
Image 1 is your current egocentric view

Question: {question}

Answer Choices:
{options}

Output the exact answer from the choices.
Answer:\x20
"""
LETTER_WORDS = """{pictures}{question}
When multiple images are provided, You want to realize that when camera moves left, the objects in \
the image move right, and vice versa. And when you are asked about the movement of the same object \
captured in different images, you can compare the position of the object relative to other objects \
in the image to answer the question.

{lettered}

Only output the letter of the correct option and nothing else."""
LMMS = {"picture": "<image>", "system": "You are a helpful assistant."}
LMMS |= {"min_pixels": 200704, "max_pixels": 1605632}
LETTER = LMMS | {"max_new_tokens": 16, "words": {"choice": LETTER_WORDS}, "scorer": "sat letter"}
MINDJOURNEY = {"picture": "Image {i}:\n<image>\n", "max_pixels": 1003520, "max_new_tokens": 1024}
MINDJOURNEY |= {"words": {"choice": MINDJOURNEY_WORDS}, "system": MINDJOURNEY_SYSTEM}
MINDJOURNEY |= {"scorer": "sat text"}
PAPER = {"picture": "<image>", "max_pixels": 1003520}
MINDCUBE = {"max_new_tokens": 4096, "words": {"choice": MINDCUBE_WORDS}, "scorer": "mindcube"}
NOT_COUNTED = {"not_counted": ["translation"]}  # in the number of its own evaluator
VSI = {"frames": 32, "max_new_tokens": 16, "words": VSI_WORDS, "scorer": "vsi"}
PROTOCOLS = {
    "paper": {
        "heldout": {"max_pixels": 1003520, "max_new_tokens": 64},  # right answers have 40 at most
        "sat-real": MINDJOURNEY | {"square": 512},
        "sat-synthesized": MINDJOURNEY,
        "vsi-bench": PAPER | VSI,
        "mindcube": PAPER | MINDCUBE | NOT_COUNTED,
    },
    "lmms-eval": {
        "sat-real": LETTER,
        "sat-synthesized": LETTER,
        "vsi-bench": LMMS | VSI,  # its multi-image task
        "mindcube": LMMS | MINDCUBE,
    },
    "mindcube": {"mindcube": PAPER | MINDCUBE | NOT_COUNTED | {"max_pixels": 230400}},
    "mindjourney": {"sat-real": MINDJOURNEY | {"square": 512}, "sat-synthesized": MINDJOURNEY},
}
CHOICES = "object_rel_direction_easy object_rel_direction_medium object_rel_direction_hard "
CHOICES += "object_rel_distance route_planning obj_appearance_order"
NUMBERS = "object_abs_distance object_counting object_size_estimation room_size_estimation"
VSI_TYPES = dict.fromkeys(CHOICES.split(), "choice") | dict.fromkeys(NUMBERS.split(), "number")
# The 500 rows of SAT's val split on which MindJourney and its successors report: bit n is row n.
SAT_SYNTHESIZED = """
AAgiABAAAAACFAAAAAACAAAAkoIhYAAEEIwEEBaECAIAAEAAQDQAAAgEBACBAMQAIAAAkAAQIlQDIAAAAhAEAACABREIAAAA
AAAAAEQEAFAIAgCAABAKUABAkAgBBJKAYAEBCkUCAACAAiIACZgI4gAAQQAACCIgAAAAAAAQAFQAAAAAAAIgREiQgAQgAAgA
ABAAACAChACEAAAQAEAkAAAKIBAACgABAEAAAIDQACCIAQAAgAAAgAQggBDwAIAAAAAQAgYAgCzqAACCAAABsEBAYQAAAAwi
AAABgAgACgECgACLAABQADoAIAABBBQAABlCrAEAQAAYElAJgaABEVQAiAIEEOABCCACCAkAAAAFAhgAgAgAALDAAAhAAKCI
AAAiAACBQAAAAqBVAIAAAAABASgEIEABAAAQIAAAKACgAADkAgCgUAIgBgIIIGAEIAGAgKBoACEUQtAEFAAQAAQEAAAAAKDA
AAAQAgBSQUIAAABIBCUAADABAgBAEAAIABIgAAAEAAQIIAQAgAQEQAAEAADAAAAgAABAkNYAMAAAAIAQAEgAYUAAQEQAAAAw
ACQAhABDYIgYAAAgQGAkIAIAJAIEAECBAogjAAQgASDAgoHIAEAgIAQEFAAAAAQSIIADACgwAA4IkAAQACICBAACAA4=
"""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def digest(*key) -> bytes:
    """An order, or a seed, that has nothing to do with the content and never changes."""
    return hashlib.sha256(repr(key).encode()).digest()


def existing(run: Path, name: str) -> Path:
    """What a setting names: a file or folder of the run, or any other."""
    return run / name if (run / name).exists() else Path(name)


# --- questions: {"number", "id", "task_type", "answer_type", "question" (what the user says),
# "truth", "options", "images" (from the root), "scene_id", "record" (as the student is asked)}
# Choices of a task that also has open questions are a task of their own, "A2 choice".
KINDS = ("motion", "motions", "box", "yes_no", "relation", "choice", "meters", "degrees")


@contextmanager
def watch(skipped: Counter, number):
    """Name and count the question inside where it turns out to be unusable."""
    try:
        yield
    except (*BROKEN, ArrowException) as error:  # whatever a wrong row can raise
        why = f"{type(error).__name__} {str(error)[:200]}"
        print(f"question {number} skipped, unusable row: {why}", file=sys.stderr)
        skipped["unusable row"] += 1


def kind_of(record: dict, answer: str) -> str | None:
    """The type of a record's answer; None where the answer does not have it."""
    said = record.get("answer_type")
    kind = said if said in KINDS else ANSWER_TYPES.get(record["task_type"])
    return kind if kind and reward(None, answer, answer, kind)["overall"] > 1 - 1e-9 else None


def read_heldout(path: Path, root: Path, skipped: Counter):
    """Questions of our own format, in file order."""
    records = read_questions(path, root)  # which names unusable lines
    skipped["unusable line"] += len(path.read_bytes().splitlines()) - len(records)
    for number, record in enumerate(records, 1):
        with watch(skipped, number):
            *turns, last = record["messages"]
            task, truth = record["task_type"], last["content"].strip()
            kind = kind_of(record, truth)
            if kind is None:
                raise ValueError(f"unknown task or answer: {task!r}, {truth[:60]!r}")
            images = [Path(image).resolve() for image in record["images"]]
            images = [str(image.relative_to(root.resolve())) for image in images]
            task += " choice" * (kind == "choice" != ANSWER_TYPES.get(task))
            question = {"number": number, "id": number, "task_type": task, "answer_type": kind}
            question["question"] = "\n".join(turn["content"] for turn in turns)
            options = [*map(str, record.get("options") or [])]
            question |= {"truth": truth, "options": options, "images": images}
            question["scene_id"] = str(record.get("scene_id", f"question {number}"))
            yield question | {"difficulty": record.get("difficulty"), "record": record}


def choose(questions: list[dict], tasks: list[str], per_task: int) -> list[dict]:
    """Of each task (or of `tasks`) at most `per_task` questions (0: all), the first by hash."""
    kept, counts, keys = [], Counter(), ("task_type", "question", "number")
    for question in sorted(questions, key=lambda one: digest(*(one[key] for key in keys))):
        task = question["task_type"]
        counts[task] += 1
        asked = not tasks or task in tasks or task.removesuffix(" choice") in tasks
        if asked and (not per_task or counts[task] <= per_task):
            kept.append(question)
    return sorted(kept, key=lambda question: question["number"])


# --- benchmarks, as they are published: one function each
def published_rows(path: Path, skipped: Counter, *keys: str):
    rows = [row for _, row in read_lines(path, *keys)]
    skipped["malformed line"] += len(path.read_bytes().splitlines()) - len(rows)
    return enumerate(rows)


def in_words(protocol: dict, root: Path, question: dict) -> dict:
    """The question with its record, in the protocol's words."""
    options, images = question["options"], question["images"]
    lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    pictures = [protocol["picture"].format(i=i) for i in range(1, len(images) + 1)]
    words = protocol["words"][VSI_TYPES.get(question["task_type"], "choice")].format(
        pictures="".join(pictures),
        question=question["question"].strip(),
        options="\n".join(options),
        lettered="\n".join(lettered),
    )
    turns = {"system": protocol.get("system"), "user": words, "assistant": question["truth"]}
    messages = [{"role": role, "content": text} for role, text in turns.items() if text]
    record = {"messages": messages, "images": [str(root / image) for image in images]}
    return question | {"answer_type": None, "record": record}


def read_sat(benchmark: str, data: Path, protocol: dict, root: Path, skipped: Counter):
    """SAT: SAT_test.parquet is SAT-Real, 500 rows of SAT_val.parquet are SAT-Synthesized."""
    path = data / ("SAT_test.parquet" if benchmark == "sat-real" else "SAT_val.parquet")
    folder = Path("6_eval/pictures") / benchmark
    try:
        file = ParquetFile(path)
        rows = (row for batch in file.iter_batches(64) for row in batch.to_pylist())
        wanted = range(file.metadata.num_rows)
        if benchmark == "sat-synthesized":
            bits = np.frombuffer(base64.b64decode(SAT_SYNTHESIZED), np.uint8)
            wanted = np.flatnonzero(np.unpackbits(bits)).tolist()
            skipped["missing row"] += sum(row >= file.metadata.num_rows for row in wanted)
        for number, row in enumerate(rows):
            if number not in wanted:
                continue
            with watch(skipped, number):
                options, truth, images = row["answers"], row["correct_answer"], []
                letter = LETTERS[options.index(truth)]
                for picture in row["image_bytes"]:
                    stored = store_picture(picture["bytes"], root / folder, protocol.get("square"))
                    images.append(str(folder / stored))
                question = {"number": number, "id": str(number), "options": options}
                question |= {"task_type": row["question_type"], "question": row["question"]}
                question["truth"] = letter if protocol["scorer"] == "sat letter" else truth
                question |= {"images": images, "scene_id": " ".join(images)}
                yield in_words(protocol, root, question)
    except (OSError, ArrowException) as error:
        stop(f"{path} cannot be read ({str(error).splitlines()[0]}): fetch array/SAT again")


def store_picture(content: bytes, folder: Path, square: int | None) -> str:
    """Write an encoded picture under the hash of its bytes; square: only its middle, resized."""
    name = hashlib.sha256(content).hexdigest()[:20] + (f"_{square}.png" if square else ".png")
    with alone(folder):  # two shards may store the same picture
        if not (folder / name).is_file():
            picture = Image.open(io.BytesIO(content)).convert("RGB")
            if square:
                side = min(picture.size)
                left, top = ((length - side) // 2 for length in picture.size)
                picture = picture.crop((left, top, left + side, top + side))
                picture = picture.resize((square, square), Image.BICUBIC)
            encoded = io.BytesIO()
            picture.save(encoded, "PNG", compress_level=1)
            save(folder / name, encoded.getvalue())
    return name


def read_vsi(benchmark: str, data: Path, protocol: dict, root: Path, skipped: Counter):
    """VSI-Bench: test.jsonl and DATASET/SCENE.mp4; `prompts_of` has the frames cut out."""
    keys = ("dataset", "scene_name", "question_type", "question", "ground_truth")
    for number, row in published_rows(data / "test.jsonl", skipped, *keys):
        id, task, truth = str(row.get("id", number)), row["question_type"], row["ground_truth"]
        with watch(skipped, id):
            options = [re.sub(r"^[A-Z]\.\s*", "", option) for option in row.get("options") or []]
            numeric, truth = VSI_TYPES[task] == "number", str(truth).strip()
            if not (float(truth) > 0 if numeric else truth in [*LETTERS[: len(options)]]):
                raise ValueError(f"{truth[:20]!r} is not an answer")
            scene = f"{row['dataset']}/{row['scene_name']}"
            video = data / f"{scene}.mp4"
            check_picture(video, data)
            folder = f"6_eval/pictures/vsi-bench/{scene}/{protocol['frames']}"
            images = [f"{folder}/{i:03d}.png" for i in range(protocol["frames"])]
            question = {"number": number, "id": id, "task_type": task, "scene_id": scene}
            question |= {"question": row["question"], "options": options, "truth": truth}
            yield in_words(protocol, root, question | {"images": images, "video": str(video)})


def cut_frames(video: str, folder: Path, count: int):
    """Write frames linspace(0, n - 1, count) of a video's n; ValueError where it is damaged."""
    part, taken, last = folder.with_name(folder.name + ".part"), {}, -1
    with alone(folder.parent):  # two shards may ask about the same video
        if folder.is_dir():
            return
        try:
            with av.open(video) as container:
                n = sum(packet.size > 0 for packet in container.demux(video=0))
            wanted = np.linspace(0, n - 1, count).astype(int).tolist()
            with av.open(video) as container:
                container.streams.video[0].thread_type = "AUTO"
                for last, frame in enumerate(container.decode(video=0)):
                    if last in wanted:
                        taken[last] = frame.to_image()
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(str(error)) from error
        if last + 1 < max(1, 0.98 * n):  # a good video may hide its last frames
            raise ValueError(f"ends after {last + 1} of its {n} frames")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for i, number in enumerate(wanted):
            picture = taken[number] if number in taken else frame.to_image()
            picture.save(part / f"{i:03d}.png", compress_level=1)
        os.replace(part, folder)


def read_mindcube(benchmark: str, data: Path, protocol: dict, root: Path, skipped: Counter):
    """MindCube: MindCube_tinybench.jsonl, whose texts hold the options, and pictures."""
    places = [*data.rglob("MindCube_tinybench.jsonl"), data / "MindCube_tinybench.jsonl"]
    path = places[0].resolve()
    base = path.parents[1] if path.parent.name == "raw" else path.parent
    for number, row in published_rows(path, skipped, "id", "question", "images"):
        id, truth = str(row["id"]), row.get("gt_answer")
        with watch(skipped, id):
            text = row["question"].replace("<image>", "")
            options = re.findall(r"\b[A-E]\.\s*(.*?)(?=\s+[A-E]\.\s|\s*\Z)", text, re.S)
            if truth not in [*LETTERS[: len(options)]]:
                raise ValueError(f"{truth!r} is not an answer")
            images = [base / image for image in row["images"]]
            for image in images:
                check_picture(image, base)
            scene = str(images[0].parent.relative_to(base))
            question = {"number": number, "id": id, "task_type": setting_of(id), "truth": truth}
            question |= {"question": text, "options": options, "scene_id": scene}
            yield in_words(protocol, root, question | {"images": list(map(str, images))})


READERS = {"sat": read_sat, "vsi": read_vsi, "mindcube": read_mindcube}


# --- generation
def prompts_of(student: Student, batch: list[dict], blank: bool) -> list[dict]:
    """Per question its prompt, as `generate` takes it, or the "fault" for which there is none."""
    seen, prompts = {}, []
    for question in batch:
        paths, video = question["record"]["images"], question.get("video")
        what = f"unreadable video: {video}" if video else f"unreadable picture: {paths[-1]}"
        try:
            if str(paths) not in seen:  # the same pictures are the same tensor
                if video:
                    cut_frames(video, Path(paths[0]).parent, len(paths))
                seen[str(paths)] = open_pictures(student, paths, blank)
            what, (pixels, grids) = "unusable text", seen[str(paths)]
            whole = encode_question(student, question["record"], grids)
        except (OSError, ValueError) as error:
            prompts.append({"fault": f"{what}: {str(error)[:200]}"})
            continue
        ids, positions = whole["ids"][: whole["prompt"]], whole["positions"][:, : whole["prompt"]]
        prompts.append({"ids": ids, "positions": positions, "pixels": pixels, "grids": grids})
    return prompts


def respond(student: Student, batch: list[dict], blank: bool, cfg: Config) -> list[dict]:
    """Per question {"response", "cost"}, or the "fault" for which it cannot be asked."""
    begun, draw = time.perf_counter(), []
    found = prompts_of(student, batch, blank)
    good = [i for i, prompt in enumerate(found) if "fault" not in prompt]
    prompts = [found[i] for i in good]
    if cfg.temperature and good:  # numbers of the question's own, whatever its batch is
        streams = [digest("draw", cfg.seed, batch[i]["number"]) for i in good]
        numbers = [np.random.default_rng([*key]).random(cfg.max_new_tokens) for key in streams]
        draw = [cfg.temperature, torch.tensor(np.array(numbers), dtype=torch.float32)]
    tokens = generate(student, prompts, cfg.max_new_tokens, *draw) if good else []
    texts = student.tokenizer.batch_decode(tokens, skip_special_tokens=True) if good else []
    seconds = (time.perf_counter() - begun) / max(1, len(good))
    for i, prompt, own, text in zip(good, prompts, tokens, texts, strict=True):
        cost = spent(student, prompt, len(own), seconds)
        found[i] = {"response": text.strip(), "cost": cost}
    return found


def logged(folder: Path, own: Path | None = None) -> dict[int, dict]:
    """{number: record} of all shards; half a line that a kill left in `own` is cut off."""
    records = {}
    for path in folder.glob("samples*.jsonl"):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if path == own:
            os.truncate(path, len(whole))
        records |= {record["number"]: record for record in map(json.loads, whole.splitlines())}
    return records


def ask_all(questions: list[dict], load, folder: Path, cfg: Config) -> dict[int, dict]:
    """Ask what is new in this process's share -> what all shards have logged so far, {number:
    question with "response", "blank_response" and "cost", or with its "fault"}.

    Questions about the same pictures are neighbours: they share one prefill.
    """
    shard, shards = map(int, cfg.shard.split("/"))
    log = folder / ("samples.jsonl" if shards == 1 else f"samples.{shard}of{shards}.jsonl")
    done = logged(folder, log)
    lists = set(sorted({tuple(question["images"]) for question in questions})[shard::shards])
    own = [question for question in questions if tuple(question["images"]) in lists]
    own = [question for question in own if "response" not in done.get(question["number"], {})]
    own.sort(key=lambda one: (len(one["record"]["images"]), one["images"], one["number"]))
    for start in tqdm(range(0, len(own), cfg.batch), unit="batch", desc=f"6_eval/{folder.name}"):
        batch = own[start : start + cfg.batch]
        seeing = respond(load(), batch, False, cfg)
        blind = respond(load(), batch, True, cfg) if cfg.blank else [{}] * len(batch)
        with log.open("a") as lines:
            for question, found, control in zip(batch, seeing, blind, strict=True):
                record = question | found | {"blank_response": control.get("response")}
                del record["record"]
                costs = [found.get("cost", NOTHING), question.get("cost", NOTHING)]
                lines.write(json.dumps(record | {"cost": total_cost(costs)}) + "\n")
    return logged(folder)


# --- public scorers: what the published code does, right or wrong (lmms-eval 75571cf, MindCube
# 6d8fd9a, MindJourney aeed003): only numbers that are scored alike can be compared
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
SMALL += "fifteen sixteen seventeen eighteen nineteen twenty"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety hundred"
NUMBER_WORDS = {word: value for value, word in enumerate(SMALL.split())} | {"thousand": 1000}
NUMBER_WORDS |= {word: 10 * i for i, word in enumerate(TENS.split(), 2)}


def first_number(text: str) -> float | None:
    """The first number of a text, in digits (".5" is read as 5, "1,200" as 1) or in words."""
    text = text.lower()
    written, words = re.search(r"-?\d+(?:\.\d+)?", text), list(re.finditer("[a-z]+", text))
    while words and words[0][0] not in NUMBER_WORDS:
        words.pop(0)
    if written and not (words and words[0].start() < written.start()):
        return float(written[0])
    if not words:
        return None
    thousands, rest = 0, 0
    for word in words:  # "one hundred and five"
        value = NUMBER_WORDS.get(word[0])
        if value == 1000:
            thousands, rest = thousands + max(rest, 1) * 1000, 0
        elif value == 100:
            rest = max(rest, 1) * 100
        elif value is not None:
            rest += value
        elif word[0] != "and":
            break
    return float(thousands + rest)


def score_vsi(question_type: str, prediction: str, truth) -> float:
    """VSI-Bench by lmms-eval. Choices: the first word. Numbers: mean relative accuracy, the share
    of the thresholds 0.50, 0.55 ... 0.95 that 1 - |said - true| / true reaches."""
    if VSI_TYPES[question_type] == "choice":
        return float(prediction.split(" ")[0].rstrip(".").strip().lower() == str(truth).lower())
    said, true = first_number(prediction), float(truth)
    if said is None or true == 0:
        return float(said == true)
    return float(np.mean(abs(said - true) / true <= 1 - np.linspace(0.5, 0.95, 10)))


def without_thoughts(text: str) -> str:
    """What lmms-eval's command line cuts off before any task sees the answer."""
    for tag in ("think", "analysis"):
        text = re.sub(rf"<{tag}>.*?</{tag}>", "", text, flags=re.S)
    return text.strip()


def extract_choice(text: str | None) -> str | None:
    """The letter A to E that MindCube's evaluator reads: of the first attempt that finds one."""
    text = text or ""
    section = "".join(re.findall(r"<Answer>([^<]*)", text)[:1])
    in_section = [r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"\b([A-E])\b"]
    phrases = [r"(?:\A|\n)(?:Answer: )?([A-E])(?:\s|\Z)", r'[*"]([A-E])[*"]']
    phrases += [r"\bAnswer:?\s*([A-E])\b", r"[Mm]y answer is ([A-E])", r"answer is ([A-E])"]
    for where, patterns in ((text, [r"([A-E])\."]), (section, in_section), (text, phrases)):
        for pattern in patterns:
            if found := re.findall(pattern, where):
                return found[-1]
    lines = [re.search(r"\b([A-E])\b", line) for line in text.split("\n")]
    return next((found[1] for found in reversed(lines) if found), None)


def setting_of(id: str) -> str:
    """MindCube's setting, by the first of these words inside the id."""
    words = ("around", "rotation", "translation", "among")
    return next((setting for setting in words if setting in id.lower()), "other")


def score_sat(response: str, choices: list[str], answer: str) -> float:
    """SAT by MindJourney: the last line holds the true choice ("no" is found inside "know")."""
    response = response.lower()
    named = any(choice.lower() in response for choice in choices)
    return float(named and answer.lower() in response.split("\n")[-1])


def sat_letter(response: str, question: str) -> str:
    """SAT by lmms-eval: the first word, or the letter of a choice that the *question* lists."""
    clean = re.sub(r"[^\w\s]", "", response).strip()
    listed = enumerate(re.findall(r"\b[A-Z]\.\s+([^\n]*)", question))
    letters = {text.strip(): LETTERS[i] for i, text in listed}
    found = re.search("|".join(map(re.escape, letters)), clean) if letters else None
    return (letters.get(found[0], clean) if found else clean).split(" ")[0]


def score_choice(scorer: str, sample: dict, response: str) -> dict:
    """{"answered", "score" by the public scorer, "right"} of a response to a benchmark."""
    kind, options, truth = sample["task_type"], sample["options"], sample["truth"]
    text, letters = without_thoughts(response), [*LETTERS[: len(options)]]
    if scorer == "vsi":
        score = score_vsi(kind, text, truth)
        answered = text.split(" ")[0].rstrip(".").strip().upper() in letters
        if VSI_TYPES[kind] == "number":
            answered = first_number(text) is not None
    elif scorer == "mindcube":
        said = extract_choice(response)
        answered, score = said is not None, float(said == truth)
    elif scorer == "sat letter":
        said = sat_letter(response, sample["question"]).replace("_", "").upper()
        answered, score = said in letters, float(said == truth)
    else:
        answered = any(option.lower() in response.lower() for option in options)
        score = score_sat(response, options, truth)
    return {"answered": answered, "score": score, "right": score}


# --- scores: the main one of a question first. Errors are better when lower, all others when higher
WORDS = {"direction": "direction", "exact": "exact", "accuracy": "accuracy", "iou": "IoU"}
WORDS |= {"score": "score", "error_m": "error (m)", "error_deg": "error (deg)"}
WORDS |= {"reward": "reward", "right": "right answers"}
CONTROLS = ("constant", "blank", "copy", "a")  # "a": the other evaluation of --compare
CONSTANTS = 50  # most frequent training answers per task that are tried as constant answer
DRAWS = 1000  # of the bootstrap


def signed(name: str, value: float) -> float:
    """Turns and moves to the right, and forward, are positive."""
    return -value if name in ("turn_left", "shift_left", "backward") else value


def motion_pose(name: str, value: float) -> np.ndarray:
    """c2w [4, 4] after one action from the identity; OpenCV axes: x right, z ahead."""
    pose, value = np.eye(4), signed(name, value)
    if name.startswith("turn"):
        c, s = math.cos(math.radians(value)), math.sin(math.radians(value))
        pose[:3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
    else:
        pose[0 if name.startswith("shift") else 2, 3] = value
    return pose


@functools.cache  # the constant answers meet the same truths again and again
def measure(kind, truth: str, response: str, truths=frozenset(), options: tuple = ()) -> dict:
    """{"answered", scores, "reward", "right"}; without an answer the error of the worst truth."""
    response = response if len(response.strip()) <= 200 else ""  # no answer, as in the reward
    parts = reward(None, truth, response, kind, options or None)
    answered = parts["format"] > 0
    scores, name, error = {}, "", None
    if kind in ("meters", "degrees"):
        name = "error_m" if kind == "meters" else "error_deg"
        if answered:
            error = abs(parse_quantity(response, kind) - parse_quantity(truth, kind))
        if answered and kind == "degrees":
            error = abs((error + 180) % 360 - 180)
    elif kind == "motion":
        scores["direction"] = parts.get("action", 0.0)
        (true,), said = parse_actions(truth), parse_actions(response)
        turns = true[0].startswith("turn")
        name = "error_deg" if turns else "error_m"
        if answered and said[0][0].startswith("turn") == turns:
            apart = motion_pose(*true)[:3, 3] - motion_pose(*said[0])[:3, 3]
            error = abs(signed(*true) - signed(*said[0])) if turns else np.linalg.norm(apart).item()
    elif kind == "motions":
        scores["exact"] = float(answered and parse_actions(response) == parse_actions(truth))
    else:
        metric = "iou" if kind == "box" else "accuracy"
        scores[metric] = parts.get(metric, 0.0)
    if name and error is None and truths:
        error = max(measure(kind, truth, other)[name] or 0.0 for other in truths)
    if name:
        scores[name] = error
    points, main = parts["overall"], next(iter(scores.values()))
    right = points >= 0.95 if kind in ("meters", "degrees") else main >= 0.5
    return {"answered": answered} | scores | {"reward": points, "right": float(right)}


def metrics_of(*scores: dict) -> list[str]:
    """What all of these scores hold, the main one first."""
    return [metric for metric in WORDS if all(metric in one for one in scores)]


def training_answers(run: Path, names: list[str]) -> dict[str, Counter]:
    """{task: {answer: how often the training questions have it}}."""
    counts = {}
    for path in [existing(run, name) for name in names]:
        if not path.is_file():
            print(f"no constant answers from {path}: it is missing", file=sys.stderr)
        for _, record in read_lines(path, "task_type", "messages") if path.is_file() else ():
            with suppress(TypeError, LookupError, AttributeError):  # 04 names these
                answer = record["messages"][-1]["content"].strip()
                if kind := kind_of(record, answer):
                    task = record["task_type"]
                    task += " choice" * (kind == "choice" != ANSWER_TYPES.get(task))
                    counts.setdefault(task, Counter())[answer] += 1
    return counts


def bootstrap(values, scenes: list[str], *key, weights=None, difference=False) -> dict:
    """{"mean", "low", "high"}: the weighted mean, and its 95 % interval over draws of whole scenes.
    Of a difference also "p", twice the share of draws on the other side of 0."""
    weights = np.ones(len(values)) if weights is None else weights
    names, index = np.unique(np.array(scenes, dtype=str), return_inverse=True)
    sums, counts = np.bincount(index, weights * values), np.bincount(index, weights)
    generator = np.random.default_rng([*digest(*key, "bootstrap")])
    picked = generator.integers(len(names), size=(DRAWS, len(names)))
    means = sums[picked].sum(1) / counts[picked].sum(1)  # [DRAWS]
    low, high = np.percentile(means, [2.5, 97.5])
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    found = {"mean": sums.sum() / counts.sum(), "low": low, "high": high}
    found |= {"p": min(1.0, 2 * (beyond + 1) / (DRAWS + 1))} if difference else {}
    known = ("mean",) if len(names) < 2 else tuple(found)  # one scene has no interval
    return {key: round(float(x), 6) if key in known else None for key, x in found.items()}


def vsi_weights(kinds: list[str]) -> np.ndarray:
    """VSI-Bench's number is the mean over categories of the mean over question types."""
    categories = {kind: re.sub("_(easy|medium|hard)$", "", kind) for kind in kinds}
    types, questions = Counter(categories.values()), Counter(kinds)
    return np.array([1 / questions[kind] / types[categories[kind]] for kind in kinds])


def fill_scores(own: list[dict], protocol: dict, counts: Counter) -> dict[str, str]:
    """Fill in a task's scores and controls -> {metric: the best constant answer of `counts`}."""
    truths = frozenset(sample["truth"] for sample in own)

    def score(responses):
        pairs = zip(own, responses, strict=True)
        if "scorer" in protocol:
            return [score_choice(protocol["scorer"], *pair) for pair in pairs]
        return [
            measure(one["answer_type"], one["truth"], said, truths, tuple(one.get("options", ())))
            for one, said in pairs
        ]

    said = {name: [sample[name] for sample in own] for name in ("response", "blank_response")}
    boxes = [BOX.search(sample["question"]) for sample in own]
    if all(boxes) and own[0]["answer_type"] == "box":
        said["copy_response"] = [box[0] for box in boxes]  # the first picture's box, said again
    for name, responses in said.items():
        if None not in responses:
            for sample, scores in zip(own, score(responses), strict=True):
                sample[name.replace("response", "scores")] = scores
    best = {}  # metric: (mean with the sign of better, answer, scores)
    for answer in sorted(counts, key=lambda answer: (-counts[answer], answer))[:CONSTANTS]:
        scored = score([answer] * len(own))
        for metric in metrics_of(scored[0]):
            values = [scores[metric] for scores in scored]
            mean = -sum(values) if "error" in metric else sum(values)
            if metric not in best or mean > best[metric][0]:
                best[metric] = mean, answer, values
    for i, sample in enumerate(own):
        sample["constant_scores"] = {metric: values[i] for metric, (_, _, values) in best.items()}
    return {metric: answer for metric, (_, answer, _) in best.items()}


def summary(samples: list[dict], metric: str, weights, *key) -> dict:
    """The interval of a score, of its controls, and of the difference from each of them."""
    scenes = [sample["scene_id"] for sample in samples]
    own = np.array([sample["scores"][metric] for sample in samples], float)
    result = bootstrap(own, scenes, *key, weights=weights)
    for name in CONTROLS:
        scores = [sample.get(f"{name}_scores", {}).get(metric) for sample in samples]
        if None not in scores:
            scores = np.array(scores, float)
            result[name] = bootstrap(scores, scenes, *key, weights=weights)
            above = bootstrap(own - scores, scenes, *key, weights=weights, difference=True)
            result[f"above_{name}"] = above
    return result


def grade(samples: list[dict], protocol: dict, training: dict | None, seed: int) -> dict:
    """{task or "all": {"questions", "unparsable", "metrics"}}; fills the samples' scores in."""
    groups, best, tasks = {}, {}, {}
    for task in sorted({sample["task_type"] for sample in samples}):
        own = groups[task] = [sample for sample in samples if sample["task_type"] == task]
        truths = Counter(sample["truth"] for sample in own)
        counts = truths if training is None else training.get(task, {})  # of constant answers
        best[task] = fill_scores(own, protocol, counts)
    left_out = protocol.get("not_counted", [])
    groups["all"] = [one for one in samples if one["task_type"] not in left_out] or samples
    for task, own in groups.items():
        vsi = task == "all" and protocol.get("scorer") == "vsi"
        weights = vsi_weights([sample["task_type"] for sample in own]) if vsi else None
        metrics = {}
        for metric in metrics_of(*(sample["scores"] for sample in own)):
            metrics[metric] = summary(own, metric, weights, seed, task)
            if metric in best.get(task, {}):
                metrics[metric]["constant"]["answer"] = best[task][metric]
        unparsable = sum(not sample["scores"]["answered"] for sample in own)
        tasks[task] = {"questions": len(own), "unparsable": unparsable, "metrics": metrics}
    return tasks


# --- table and report
COSTS = {"seconds": "seconds per question", "world_seconds": "of them for imagining"}
COSTS |= {"views": "views imagined", "tokens": "tokens generated", "peak_gb": "peak memory, GB"}
COSTS |= {"vlm_flops": "operations of the VLM", "world_flops": "of the world model"}


def figure(value: dict | None, metric: str) -> str:
    """A mean, ± half its interval."""
    if value is None:
        return "-"
    digits = {"error_deg": 1, "error_m": 2}.get(metric, 3)
    half = "" if value["low"] is None else f" ±{(value['high'] - value['low']) / 2:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half}"


def table(evaluations: list[dict]) -> list[list[str]]:
    """Rows, the head first: controls of the last evaluation, then all of them side by side."""
    controls = ("constant", "blank", "copy")
    rows = [["task", "score", "n", *controls, *(one["tag"] for one in evaluations)]]
    for task, result in evaluations[-1]["tasks"].items():
        others = [one["tasks"].get(task, {"metrics": {}})["metrics"] for one in evaluations]
        for metric, values in result["metrics"].items():
            if metric != "right" or task == "all":  # nearly always the main score once more
                cells = [figure(values.get(name), metric) for name in controls]
                cells += [figure(other.get(metric), metric) for other in others]
                rows.append([task, WORDS[metric], str(result["questions"]), *cells])
    for key, words in COSTS.items():
        costs = [one["cost"][key] for one in evaluations]
        costs = ["-" if cost is None else f"{cost:.3g}" for cost in costs]
        rows.append(["cost", words, "", "", "", "", *costs])
    for what in sorted({what for one in evaluations for what in one["counts"]}):
        counts = [str(one["counts"].get(what, 0)) for one in evaluations]
        rows.append(["count", what, "", "", "", "", *counts])
    return rows


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<<" + ">" * len(widths)
    lines = []
    for row in rows:
        cells = zip(row, sides, widths, strict=False)
        lines.append("  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip())
    return "\n".join(lines)


def draw(evaluations: list[dict]) -> bytes:
    """An SVG: right answers over seconds per question, with intervals; dashed: the controls."""
    plot, file = Figure(figsize=(4.2, 3.4), layout="constrained"), io.BytesIO()
    seconds = [one["cost"]["seconds"] for one in evaluations]
    axes = plot.add_subplot(xscale="log", xlim=(min(seconds) / 2, max(seconds) * 2), ylim=(0, 1))
    axes.set(xlabel="seconds per question", ylabel="right answers")
    for name, colour in (("blank", "grey"), ("constant", "orange")):
        if control := evaluations[-1]["right"].get(name):
            axes.axhline(control["mean"], color=colour, linestyle="--", label=name)
    for one, x in zip(evaluations, seconds, strict=True):
        mean, low, high = (one["right"][end] for end in ("mean", "low", "high"))
        error = None if low is None else [[max(0, mean - low)], [max(0, high - mean)]]
        axes.errorbar(x, mean, error, fmt="o", label=one["tag"][:24])
    plot.legend(loc="outside lower center", ncols=2)
    with rc_context({"svg.hashsalt": "06"}):  # equal plots are equal bytes
        plot.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def visible(value):
    """What the page shows of a text: at most 300 characters, no control or direction marks."""
    if hasattr(value, "__html__"):
        return value  # marked safe: our own pictures
    text = str(value)
    short = "".join(c if c.isprintable() else " " for c in text[:300])
    return short if len(text) <= 300 else f"{short} … ({len(text):,} characters)"


def pictures_of(sample: dict, root: Path) -> list[str]:
    """A sample's pictures in base64, of at most 320 pixels a side, with boxes drawn on them."""
    images, encoded = sample["images"][:8], []
    last, named = len(images) - 1, BOX.finditer(sample["question"])
    boxes = [(min(i, last), found[0], "orange") for i, found in enumerate(named)]
    boxes += [(last, sample["truth"], "lime"), (last, sample["response"][:200], "red")]
    for i, image in enumerate(images):
        picture, file = read_picture(root / image), io.BytesIO()
        picture.thumbnail((320, 320))
        for where, text, colour in boxes:
            if where == i and (box := parse_box(text)):
                corners = np.array(sorted_box(box[0])) * [*picture.size, *picture.size] / 1000
                ImageDraw.Draw(picture).rectangle(corners.tolist(), outline=colour)
        picture.save(file, "webp", quality=90)
        encoded.append(base64.b64encode(file.getvalue()).decode())
    return encoded


CARDS = 4  # examples per task that were answered rightly, and as many wrongly
PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Evaluation of {{ last.tag }}</title><style>
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 60em; padding: 1em }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
td { padding: .2em .6em; text-align: right; white-space: nowrap; border-top: 1px solid #ddd }
td:nth-child(-n+2) { text-align: left } h1, p { overflow-wrap: anywhere }
.plot { width: 100%; max-width: 28em } .wrong { color: #c53030 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17em, 1fr)); gap: 1em }
.cards div { border: 1px solid #ddd; padding: .6em; min-width: 0 }
.cards img { width: 45%; image-rendering: pixelated }
</style>
<h1>Evaluation of {{ last.tag }}</h1>
<p>Checkpoint {{ last.config.checkpoint }}, {{ last.questions }} questions. The constant answer is
chosen for every score anew, knowing these questions. ±: 95 %, by drawing whole scenes.</p>
<img class="plot" alt="accuracy and cost" src="data:image/svg+xml;base64,{{ plot | safe }}">
<table>{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>
<p>Examples. Boxes: orange as the question names them, green true, red answered.</p>
{% for task, cards in tasks.items() %}
<details><summary>{{ task }}</summary><section class="cards">
{% for card in cards %}<div><p>{{ card.scene_id }}, question {{ card.number }}</p>
{% for picture in card.pictures %}
<img alt="" src="data:image/webp;base64,{{ picture | safe }}"> {% endfor %}
<p>{{ card.question | replace("<image>", "") }}</p>
<p>true: <bdi>{{ card.truth }}</bdi></p>
<p class="{{ 'wrong' if card.scores.right < 0.5 }}">said: <bdi>{{ card.response }}</bdi></p>
<p>said of grey pictures: <bdi>{{ card.blank_response }}</bdi></p>
</div>{% endfor %}</section></details>{% endfor %}</html>
"""


def report(evaluations: list[dict], samples: list[dict], root: Path, folder: Path):
    """Write the page and the plot. The last evaluation is this one, which has the samples."""
    tasks, counts, plot = {}, Counter(), draw(evaluations)
    for sample in sorted(samples, key=lambda one: digest(one["question"], one["number"])):
        kind = sample["task_type"], sample["scores"]["right"] >= 0.5
        counts[kind] += 1
        if counts[kind] <= CARDS:
            with suppress(ValueError):  # gone since it was asked about
                sample = sample | {"pictures": pictures_of(sample, root)}
            tasks.setdefault(kind[0], []).append(sample)
    save(folder / "accuracy_cost.svg", plot)
    content = {"last": evaluations[-1], "rows": table(evaluations)}
    content |= {"plot": base64.b64encode(plot).decode(), "tasks": dict(sorted(tasks.items()))}
    page = jinja2.Environment(autoescape=True, finalize=visible).from_string(PAGE)
    save(folder / "report.html", page.render(content))


# --- two evaluations, compared
def compare_two(cfg: Config):
    """Print and write how B differs from A on the questions that both answered."""
    if len(cfg.compare) != 2:
        stop("--compare wants two finished evaluations, tags or folders: --compare base sft")
    home, keys = Path(cfg.run) / "6_eval", ("task_type", "question", "truth", "images")
    sides = []  # {question: sample} of A and of B
    for name in cfg.compare:
        path = existing(home, name) / "samples.jsonl"
        samples = [sample for _, sample in read_lines(path, *keys, "scene_id", "scores")]
        sides.append({repr([sample[key] for key in keys]): sample for sample in samples})
    common = sides[0].keys() & sides[1].keys()
    pairs = [sides[1][key] | {"a_scores": sides[0][key]["scores"]} for key in sorted(common)]
    if not pairs:
        stop(f"{' and '.join(cfg.compare)} have no question in common: ask both the same")
    tasks, rows = {}, [["task", "score", "n", *cfg.compare, "difference", "95 % interval", "p"]]
    for task in [*sorted({sample["task_type"] for sample in pairs}), "all"]:
        own = [sample for sample in pairs if task in (sample["task_type"], "all")]
        tasks[task] = {"n": len(own)}
        scores = [sample[side] for sample in own for side in ("scores", "a_scores")]
        for metric in metrics_of(*scores):
            found = tasks[task][metric] = summary(own, metric, None, cfg.seed, task, metric)
            above, span, p = found["above_a"], "-", "-"
            if above["p"]:
                span, p = f"{above['low']:+.3f} to {above['high']:+.3f}", f"{above['p']:.4f}"
            cells = [f"{mean:.3f}" for mean in (found["a"]["mean"], found["mean"], above["mean"])]
            rows.append([task, WORDS[metric], str(len(own)), *cells, span, p])
    only_a, only_b = (len(own) - len(pairs) for own in sides)
    result = dict(zip("ab", cfg.compare, strict=True)) | {"only_a": only_a, "only_b": only_b}
    save(home / "compare.json", json.dumps(result | {"tasks": tasks}, indent=1))
    print(aligned(rows))
    print(f"{len(pairs)} questions that both answered, {only_a} only A, {only_b} only B")
    print(f"written: {home / 'compare.json'}")


# --- the cost of an answer; None: not counted
NOTHING = dict.fromkeys([*COSTS, "prompt_tokens"], 0)


def vlm_flops(model, prompt_tokens: int, grids: torch.Tensor, generated: int) -> int:
    """Operations of one answer, without padding: 2 per weight that a token or a patch meets, and
    per layer 4 width times the sum over queries of the keys that they are compared with.

    grids [pictures, 3]: frames, rows and columns in patches. No mask counts, nor the last token.
    """
    text, vision = model.config.get_text_config(), model.config.vision_config
    weights = Counter()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
            part = re.search("head|language_model|merger|$", name)[0]  # "": the tower
            weights[part] += module.weight.numel()
    frames, patches = grids[:, 0], grids[:, 1] * grids[:, 2]  # the tower looks at a frame at a time
    every = int((frames * patches).sum())
    whole = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2  # of the other layers
    keys = whole * patches + (vision.depth - whole) * patches.clamp(max=window)
    seen = 2 * weights[""] * every
    seen += 2 * weights["merger"] * (every // vision.spatial_merge_size**2)
    seen += 4 * vision.hidden_size * int((frames * patches * keys).sum())
    read, heads = prompt_tokens + generated - 1, text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    pairs = prompt_tokens**2 + sum(range(prompt_tokens + 1, read + 1))
    spoken = 2 * weights["language_model"] * read + 2 * weights["head"] * generated
    return seen + spoken + 4 * width * text.num_hidden_layers * pairs


def spent(student: Student, prompt: dict, generated: int, seconds: float) -> dict:
    """What one response cost: a share of its batch's seconds, tokens, operations, peak memory."""
    n, device = len(prompt["ids"]), student.model.device
    if device.type == "cuda":
        peak_gb = torch.cuda.max_memory_allocated(device) / 2**30
    else:  # of the largest process: this one or the world model's
        users = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        peak_gb = max(resource.getrusage(user).ru_maxrss for user in users) / 2**20
    cost = {"seconds": seconds, "tokens": generated, "prompt_tokens": n, "peak_gb": peak_gb}
    return NOTHING | cost | {"vlm_flops": vlm_flops(student.model, n, prompt["grids"], generated)}


def total_cost(costs: list[dict], share: int = 1) -> dict:
    """Costs added up and divided by `share` (None stays None); of the memory the highest."""
    total = {}
    for key in NOTHING:
        column = [cost[key] for cost in costs]
        total[key] = None if None in column else round(sum(column) / share, 6)
    return total | {"peak_gb": max(cost["peak_gb"] for cost in costs)}


# --- the test-time baseline, after MindJourney (arXiv 2507.12508). From a first picture, a step
# tries every action from every beam; each sub-step is a view. The VLM scores all new views in
# one prompt, by two criteria. What is not one score 0..9 per view counts as zeros: the search ends.
# The published code draws random scores 0..5 there, and turns by 27 degrees in sub-steps of 3.
SEARCH = {"forward": 0.25, "turn_left": 10.0, "turn_right": 10.0}  # sub-steps (meters, degrees)
SUBSTEPS, STEPS, BEAMS, SHOWN, LEAST_SCORE = 3, 3, 2, 6, 8  # SHOWN: views per step
CRITERIA = [
    "how worthwhile it is to go on exploring from there in order to answer the question",
    "how helpful it is for answering the question; a view that rules out a wrong answer helps as "
    "well, a spoilt picture does not",
]


def extend(walk: tuple, name: str, value: float) -> tuple:
    """The walk and one action more; two of one name in a row become one."""
    if walk and walk[-1][0] == name:
        return (*walk[:-1], (name, walk[-1][1] + value))
    return (*walk, (name, value))


def motion_text(walk: tuple) -> str:
    texts = []
    for name, value in walk:
        verb, unit = ("turn", "degrees") if name.startswith("turn") else ("move", "meters")
        texts.append(f"{verb} {name.split('_')[-1]} {value:g} {unit}")
    return "; ".join(texts)


def motion_poses(actions: list) -> tuple[np.ndarray, list[int]]:
    """c2w [N, 4, 4] from the identity, and the key frames: 0 and the last one of every action."""
    poses, keyframes = [np.eye(4)], [0]
    for name, value in actions:
        most = 5.0 if name.startswith("turn") else 0.2  # degrees or meters per frame
        count = max(1, math.ceil(value / most - 1e-9))
        step = motion_pose(name, value / count)
        for _ in range(count):
            poses.append(poses[-1] @ step)
        keyframes.append(len(poses) - 1)
    return np.stack(poses), keyframes


def stated(text: str) -> tuple:
    """All actions that a question's text states before its options, as a walk: D1, D2, D4, A4."""
    walk = ()
    for match in ACTION.finditer(text.partition(" A. ")[0]):
        walk = extend(walk, *parse_actions(match[0])[0])
    return walk if sum(value for _, value in walk) <= 1000 else ()  # longer paths fill the memory


def origin(image: Path, root: Path) -> dict | None:
    """The keys of a trajectory record that say where a picture looks from; None: it is unknown.

    A picture of 02 has a view.json beside it; its pose in a room is start @ c2w[frame]. Any other
    is a photograph, with 54 degrees along its longer side.
    """
    try:
        width, height = read_picture(image).size
        tangent = math.tan(math.radians(54 / 2)) * min(1, width / height)
        found = {"source": "real", "room": None, "start": None, "anchor": str(image.resolve())}
        found |= {"width": width, "height": height}
        found |= {"fov_x_deg": 2 * math.degrees(math.atan(tangent))}
        if not (image.parent / "view.json").is_file():
            return found
        view, frame = json.loads((image.parent / "view.json").read_text()), int(image.stem)
        found |= {key: view[key] for key in ("width", "height", "fov_x_deg")}
        if view["room"]:
            x, z, yaw = view["start"]
            pose = motion_pose("turn_right", yaw) @ np.array(view["c2w"][frame])
            yaw = math.degrees(math.atan2(pose[0, 2], pose[2, 2]))
            start = [round(x + pose[0, 3], 7), round(z + pose[2, 3], 7), round(yaw, 7)]
            found |= {"source": "simulated", "anchor": None, "room": view["room"], "start": start}
        elif view["teacher"] == "warp" and frame == 0:  # the first view is its photograph
            found["anchor"] = view["anchor"]
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        print(f"{image}: nothing is imagined from there, {error!r}", file=sys.stderr)
        return None


def imagine(run: Path, tries: list[tuple], starts: dict, root: Path, cfg: Config) -> tuple:
    """02 imagines tries (picture, walk, name, part, n) -> {try: n frames or none}, seconds each."""
    lines, pictures = [], list(starts)
    for number, (picture, walk, name, part, n) in enumerate(tries):
        actions = [*walk, *[(name, part)] * n]
        c2w, keyframes = motion_poses(actions)
        line = {"scene_id": f"p{pictures.index(picture):05d}", "traj_id": f"w{number:06d}"}
        line |= {"split": "heldout", "actions": actions, "keyframes": keyframes}
        lines.append(line | {"c2w": (c2w.round(7) + 0.0).tolist()} | starts[picture])
    teacher, *flags = cfg.coupled.split()
    command = [sys.executable, str(Path(__file__).with_name("02_imagine_views.py"))]
    command += ["--run", str(run), "--teacher", teacher, "--keep", "keyframes"]
    command += ["--seed", str(cfg.seed), *flags]
    meta = {"stage": Path(__file__).stem, "finished": True, "counts": {"trajectories": len(lines)}}
    ours = {key: os.environ[key] for key in os.environ if not key.endswith(("RANK", "WORLD_SIZE"))}
    with alone(run) as lock:  # 02 inherits it: if only this process is killed, its rerun waits
        if not read_meta(run / "2_views").get("finished"):
            for room in {line["room"] for line in lines} - {None}:
                save(run / room, (root / room).read_bytes())
            text = "".join(json.dumps(line) + "\n" for line in lines)
            save(run / "1_trajectories/trajectories.jsonl", text)
            save(run / "1_trajectories/meta.json", json.dumps(meta))
            with (run / "02.log").open("a") as log:
                if subprocess.run(command, stdout=log, pass_fds=[lock], env=ours).returncode:
                    stop(f"02 ended with a fault (see {run / '02.log'}): correct --coupled")
    records = read_lines(run / "2_views/views.jsonl", "traj_id", "frames")
    frames = {record["traj_id"]: record["frames"] for _, record in records}
    seen = {}
    for line, one in zip(lines, tries, strict=True):
        seen[one] = [str(run / frame) for frame in frames.get(line["traj_id"], [])[-one[-1] :]]
    return seen, read_meta(run / "2_views")["seconds"] / len(lines)


def with_views(record: dict, views: dict[str, str], demand: str = "") -> dict:
    """The question with imagined views {words: picture} behind its own, and a demand at its end."""
    *turns, last, told = record["messages"]
    own, mark, rest = last["content"].rpartition("<image>")
    shown = "".join(f" Imagined from image 1, after {words}: <image>" for words in views)
    content = own + mark + shown + ("\n" if views else "") + rest + demand
    images = [*record["images"], *views.values()]
    return record | {"messages": [*turns, last | {"content": content}, told], "images": images}


def scores_in(response: str, count: int) -> list[int] | None:
    """`3, 9, 0` -> [3, 9, 0] where that is `count` whole numbers 0..9 and nothing else."""
    pattern = r"(?:(?:output|scores):)?\s*\[?(\d(?:[,\s]+\d)*)\]?\.?"
    numbers = re.fullmatch(pattern, response.strip(), re.I)
    found = [int(digit) for digit in re.findall(r"\d", numbers[1])] if numbers else []
    return found if len(found) == count else None


@dataclass
class Search:
    """What the test-time baseline knows about a question."""

    question: dict
    beams: list[tuple]  # walks from which the next step goes on
    views: dict = field(default_factory=dict)  # new ones of this step: words -> (walk, picture)
    known: set = field(default_factory=set)  # words of all views so far
    shown: dict = field(default_factory=dict)  # words -> picture, to join the question
    costs: list = field(default_factory=lambda: [NOTHING])
    unparsable: int = 0  # responses without scores

    def tries(self, stated_only: bool) -> list[tuple]:
        """What the next step imagines."""
        picture, walk = self.question["record"]["images"][0], stated(self.question["question"])
        if stated_only:
            return [(picture, walk[:-1], *walk[-1], 1)] if self.beams and walk else []
        back, tries = {"turn_left": "turn_right", "turn_right": "turn_left"}, []
        for beam in self.beams:
            for name, part in SEARCH.items():
                if not beam or name != back.get(beam[-1][0]):
                    tries.append((picture, beam, name, part, SUBSTEPS))
        return tries

    def look(self, tries: list[tuple], seen: dict, seconds: float, networks: bool):
        """Take in the views that 02 imagined."""
        views, cost = {}, dict.fromkeys(["seconds", "world_seconds"], seconds * len(tries))
        for one in tries:
            _, walk, name, part, _ = one
            for i, picture in enumerate(seen[one], 1):
                end = extend(walk, name, i * part)
                views[motion_text(end)] = end, picture
        self.views = {words: view for words, view in views.items() if words not in self.known}
        self.known |= views.keys()
        cost["views"] = sum(len(seen[one]) for one in tries)
        cost["world_flops"] = None if networks and tries else 0  # 02 does not count them
        self.costs.append(NOTHING | cost)

    def prompts(self) -> list[dict]:
        """The VLM is to score the new views by both criteria."""
        views, n = {words: picture for words, (_, picture) in self.views.items()}, len(self.views)
        asked = []
        for criterion in CRITERIA:
            demand = f"\nDo not answer it yet. Score each of the {n} imagined views from 0 to 9: "
            demand += f"{criterion}. Give {n} whole numbers in the order of the views, separated "
            demand += "by commas, and nothing else."
            asked.append({"record": with_views(self.question["record"], views, demand)})
        return asked

    def go_on(self, said: list[dict]):
        """On from the views best to explore; the most helpful ones join the question."""
        views, best = list(self.views.items()), []
        for found in said:
            self.costs.append(found.get("cost", NOTHING))
            parsed = scores_in(found.get("response", ""), len(views))
            scores, self.unparsable = parsed or [0] * len(views), self.unparsable + (parsed is None)
            order = sorted(range(len(views)), key=lambda n, scores=scores: -scores[n])
            best.append([views[n] for n in order if scores[n] >= LEAST_SCORE])
        explore, helpful = best
        self.beams = [walk for _, (walk, _) in explore[:BEAMS]]
        self.shown |= {words: picture for words, (_, picture) in helpful[:SHOWN]}


def search_views(questions: list[dict], load, folder: Path, root: Path, cfg: Config) -> tuple:
    """The questions with imagined views among their pictures and their "cost"; and counts."""
    starts, searches, asked = {}, [], []
    for question in questions:
        first = question["record"]["images"][0]
        if "video" in question:
            with suppress(OSError, ValueError):  # `prompts_of` will name it
                cut_frames(question["video"], Path(first).parent, len(question["images"]))
        if first not in starts:
            starts[first] = origin(Path(first), root)
        searches.append(Search(question, [()] if starts[first] else []))
    networks = not re.match(r"(simulator|warp)(?!.*--(depth|fill))", cfg.coupled)
    scoring = replace(cfg, temperature=0, max_new_tokens=8 + 2 * BEAMS * len(SEARCH) * SUBSTEPS)
    for step in range(1, STEPS + 1):  # each is one call of 02 for all questions
        run = folder / "imagined" / str(step)
        wanted = [search.tries(cfg.coupled_stated) for search in searches]
        tries = list(dict.fromkeys(itertools.chain(*wanted)))  # questions share equal ones
        if not tries:
            break
        seen, seconds = imagine(run, tries, starts, root, cfg)
        for search, own in zip(searches, wanted, strict=True):
            search.look(own, seen, seconds, networks)
            search.beams = []
        looking = [search for search in searches if search.views]
        if cfg.coupled_stated:
            for search in looking:
                search.shown = {words: picture for words, (_, picture) in search.views.items()}
            break
        for start in tqdm(range(0, len(looking), cfg.batch), unit="batch", desc=f"step {step}"):
            batch = looking[start : start + cfg.batch]
            prompts = [prompt for search in batch for prompt in search.prompts()]
            file = run / "scores" / f"{start}_{cfg.batch}.json"  # so that a killed search goes on
            if not file.is_file():
                save(file, json.dumps(respond(load(), prompts, False, scoring)))
            said = iter(json.loads(file.read_text()))
            for search in batch:
                search.go_on([next(said) for _ in CRITERIA])
    for search in searches:
        paths = {words: os.path.relpath(path, folder) for words, path in search.shown.items()}
        record = with_views(search.question["record"], search.shown)
        more = {"record": record, "imagined": list(paths.items()), "cost": total_cost(search.costs)}
        asked.append(search.question | more)
    counts = {"imagined views shown": sum(len(search.shown) for search in searches)}
    counts["questions without them"] = sum(not search.shown for search in searches)
    counts["scorings unparsable"] = sum(search.unparsable for search in searches)
    return asked, counts


# --- all together
def show(evaluations: list[dict], folder: Path):
    """The last lines of the output: the table and the path of the report."""
    for one in evaluations:
        if one["asked_sha256"] != evaluations[-1]["asked_sha256"]:
            print(f"note: {one['tag']} was asked other questions, or in another way")
    print(aligned(table(evaluations)))
    print(f"report: {folder / 'report.html'}")


def settle(cfg: Config) -> tuple[Config, dict]:
    """The settings with what the protocol and the checkpoint say, and the protocol."""
    if cfg.benchmark not in PROTOCOLS.get(cfg.protocol, {}):
        known = ", ".join(name for name, row in PROTOCOLS.items() if cfg.benchmark in row)
        stop(f"--protocol {cfg.protocol} has no --benchmark {cfg.benchmark}. It is in: {known}")
    if cfg.benchmark != "heldout" and not cfg.data:
        stop(f"--benchmark {cfg.benchmark} needs --data: a folder with its files as published")
    protocol = {"name": cfg.protocol} | PROTOCOLS[cfg.protocol][cfg.benchmark]
    protocol["max_new_tokens"] = cfg.max_new_tokens or protocol["max_new_tokens"]
    least = min(cfg.batch, protocol["max_new_tokens"], cfg.per_task + 1)
    if least < 1 or not 0 <= cfg.temperature < math.inf:
        stop("--batch must be at least 1, all other counts and --temperature at least 0")
    shard = re.fullmatch(r"(\d+)/(\d+)", cfg.shard)
    if not shard or int(shard[1]) >= int(shard[2]):
        stop(f"--shard {cfg.shard}: want i/n with 0 <= i < n, for example 0/4")
    if cfg.coupled_stated > bool(cfg.coupled) or (cfg.coupled and cfg.shard != "0/1"):
        stop("--coupled_stated needs --coupled TEACHER; --coupled goes without --shard")
    parts = [re.sub(r"^\d+_", "", Path(cfg.checkpoint).name), cfg.benchmark]
    parts += [*cfg.coupled.split()[:1], "stated" * cfg.coupled_stated]
    tag = cfg.tag or "-".join(part for part in parts if part not in ("", "heldout"))
    if not re.fullmatch(r"\w[\w.-]*", tag):
        stop(f"the tag {tag!r} is no folder name: choose another --tag")
    return replace(cfg, tag=tag, max_new_tokens=protocol["max_new_tokens"]), protocol


def read_asked(cfg: Config, protocol: dict, skipped: Counter) -> tuple[list[dict], Path]:
    """The questions to ask, and the root of their pictures."""
    run = Path(cfg.run)
    if cfg.benchmark == "heldout":
        path = existing(run, cfg.questions)
        inside = path.resolve().is_relative_to(run.resolve())
        root = Path(cfg.data_root or (run if inside else path.parent))
        questions = list(read_heldout(path, root, skipped))
    else:
        reader, root = READERS[cfg.benchmark.split("-")[0]], run.resolve()
        questions = list(reader(cfg.benchmark, Path(cfg.data), protocol, root, skipped))
    questions = choose(questions, cfg.tasks, cfg.per_task)
    if not questions:
        stop("there is no question that can be asked: see the lines above, and --tasks")
    return questions, root


def load_for(cfg: Config, protocol: dict) -> Student:
    """The student. A protocol may have small pictures enlarged, as far as its own limit lets."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bfloat16 = device == "cuda" and torch.cuda.is_bf16_supported()
    bfloat16 = bfloat16 if cfg.dtype == "auto" else cfg.dtype == "bfloat16"
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    source = str(existing(Path(cfg.run), cfg.checkpoint))
    student = load_student(source, dtype, device, "world2vlm", protocol["max_pixels"])
    size = student.image_processor.size
    least = max(size["shortest_edge"], protocol.get("min_pixels", 0))
    student.image_processor.size = size | {"shortest_edge": min(least, size["longest_edge"])}
    return student


def main(cfg: Config):
    if cfg.compare:
        return compare_two(cfg)
    started, run, skipped = time.perf_counter(), Path(cfg.run), Counter()
    cfg, protocol = settle(cfg)
    folder, checkpoint = run / "6_eval" / cfg.tag, existing(run, cfg.checkpoint)
    if not checkpoint.is_dir() and "/" not in cfg.checkpoint:  # a hub id has an owner
        stop(f"{run / cfg.checkpoint} is missing: run the stage that writes it, or name another")
    beside = [run / "6_eval" / tag / "results.json" for tag in cfg.beside if tag != cfg.tag]
    beside = [json.loads(path.read_text()) for path in beside]
    questions, root = read_asked(cfg, protocol, skipped)
    keys = ("number", "question", "truth", "images")
    asked = digest(protocol, [[question[key] for key in keys] for question in questions]).hex()

    free = ("recipe", "run", "tag", "beside", "data", "shard", "batch")
    decides = {key: value for key, value in asdict(cfg).items() if key not in free}
    decides["asked_sha256"] = asked
    parent = checkpoint if (checkpoint / "meta.json").is_file() else None  # a hub id has none
    try:
        with alone(folder):
            meta = begin(folder, decides, parent, f"_{cfg.shard.replace('/', '_of_')}")
    except SystemExit as ended:
        if ended.code == 0:  # finished: shown again, perhaps beside others than last time
            show([*beside, json.loads((folder / "results.json").read_text())], folder)
        raise

    load, counts = functools.cache(lambda: load_for(cfg, protocol)), {}
    if cfg.coupled:
        questions, counts = search_views(questions, load, folder, root, cfg)
    records = ask_all(questions, load, folder, cfg)
    with alone(folder):  # the shard that ends last finds all answers
        if missing := sum(question["number"] not in records for question in questions):
            return print(f"shard {cfg.shard} is done, {missing} answers of others are missing")
        if read_meta(folder)["finished"]:
            return print(f"{folder} was completed by another shard")
        samples = []
        for number, record in sorted(records.items()):
            if "fault" in record:
                print(f"question {number} skipped, {record['fault']}", file=sys.stderr)
                skipped[record["fault"].split(":")[0]] += 1
            else:
                samples.append(record)
        if not samples:
            stop("no picture can be read: see the lines above")
        training = None if "scorer" in protocol else training_answers(run, cfg.train)
        tasks = grade(samples, protocol, training, cfg.seed)
        counts |= {f"skipped, {reason}": n for reason, n in (+skipped).items()}
        counts["unparsable"] = tasks["all"]["unparsable"]
        results = {"tag": cfg.tag, "config": decides, "protocol": protocol, "counts": counts}
        results |= {"asked_sha256": asked, "questions": len(samples), "skipped": skipped.total()}
        results["cost"] = total_cost([sample["cost"] for sample in samples], len(samples))
        results |= {"right": tasks["all"]["metrics"]["right"], "tasks": tasks}
        save(folder / "results.json", json.dumps(results, indent=1))
        report([*beside, results], samples, root, folder)
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        save(folder / "samples.jsonl", text)
        for part in folder.glob("samples.*of*.jsonl"):
            part.unlink()
        answers = {"answers": len(samples) * (1 + cfg.blank), "skipped": skipped.total()}
        finish(folder, meta, answers, started)
    show([*beside, results], folder)


# --- same in 01, 02, 03, 04, 05, 06: settings, files and faults ---
class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines and appends every default."""


def run(main, config_class):
    """Call main with the settings of the command line: the flags of --recipe, then your own."""
    parser = HfArgumentParser(config_class, description=__doc__, formatter_class=Help)
    recipe = parser.parse_args().recipe
    if recipe not in RECIPES:
        parser.error(f"--recipe {recipe}: want one of {', '.join(RECIPES)}")
    cfg = config_class(**vars(parser.parse_args([*RECIPES[recipe].split(), *sys.argv[1:]])))
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


# --- same in 02, 04, 05, 06: a picture ---
BROKEN = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError)
BROKEN += (AttributeError, MemoryError, struct.error, Image.DecompressionBombError)  # PIL's many


def read_picture(path: str | Path) -> Image.Image:
    """RGB, upright as EXIF says; ValueError, with the reason, for a file that is no picture."""
    try:
        if not Path(path).is_file():
            raise ValueError("no such file")  # opening a named pipe would wait for ever
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError("16 or 32 bits a pixel: save it with 8")
            return ImageOps.exif_transpose(file).convert("RGB")
    except BROKEN as error:
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from None


# --- end: a picture ---


# --- same in 02, 06: shards ---
@contextmanager
def alone(folder: Path):
    """Processes take turns inside: a lock on the folder, which ends with all who hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


# --- end: shards ---
# --- same in 04, 05, 06: a student ---
LONGEST_TEXT = 40_000  # characters of a question and its answer: one more would fill the memory


@dataclass
class Student:
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    source: str  # the folder or hub id that its base came from


def load_student(source: str, dtype, device: str, attention: str, max_pixels: int) -> Student:
    """A Qwen-VL checkpoint by folder or hub id: safetensors only, code of its own is never run.

    A folder with adapter/ is a LoRA beside its base. AutoProcessor would ask for torchvision.
    """
    try:
        base = adapter_config(source)["base_model_name_or_path"]
        model = load_model(base, dtype, device, attention)
        load_adapter(model, source)
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(base, trust_remote_code=False)
    except (*BROKEN, RuntimeError, StrictDataclassError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        stop(f"{source} does not load as an image-text-to-text checkpoint: {reason}")
    edges = ("shortest_edge", "longest_edge")
    image_processor.size = {edge: min(image_processor.size[edge], max_pixels) for edge in edges}
    return Student(model, tokenizer, image_processor, base)


@functools.cache  # many questions ask about the same picture
def check_picture(image: Path, root: Path):
    """ValueError where a question may not use this file."""
    if not image.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{image} lies outside the data root {root}: copy it, or set --data_root")
    if not image.is_file():
        raise ValueError(f"{image} is missing")


def read_questions(path: Path, root: Path) -> list[dict]:
    """Records with `images` resolved inside `root`; unusable ones are named and skipped.

    Each gets a `name`, its line, and `written`, its paths: draws go by them wherever the run lies.
    """
    questions = []
    for number, record in read_lines(path, "task_type", "messages", "images"):
        try:
            roles = [message["role"] for message in record["messages"]]
            text = "".join(message["content"] for message in record["messages"])
            images = [root / image for image in record["images"]]
            "".join([*roles, text]).encode()  # TypeError for other things, ValueError for no UTF-8
            if len(roles) < 2 or roles[-1] != "assistant":
                raise ValueError("messages must be a user's question and the assistant's answer")
            if not images or text.count("<image>") != len(images):
                raise ValueError(f"{len(images)} images but {text.count('<image>')} <image> marks")
            if len(text) > LONGEST_TEXT:
                raise ValueError(f"its text has {len(text)} characters, more than {LONGEST_TEXT}")
            for image in images:
                check_picture(image, root)
        except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
            print(f"{path}:{number}: skipped, {error}", file=sys.stderr)
        else:
            more = {"name": f"{path.name} line {number}", "written": record["images"]}
            questions.append(record | {"images": [str(image) for image in images]} | more)
    return questions


def open_pictures(student: Student, paths: list[str], blank: bool = False) -> tuple:
    """Picture files -> patches [P, channels x patch] and grids [pictures, 3]; blank: mean grey."""
    pictures = [read_picture(path) for path in paths]
    if blank:
        pictures = [Image.new("RGB", picture.size, (127, 127, 127)) for picture in pictures]
    seen = student.image_processor(images=pictures, return_tensors="pt")
    return seen["pixel_values"], seen["image_grid_thw"]


# --- end: a student ---


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


def numeric_score(error: float, unit: str) -> float:
    """1 up to an error of 0.5 m or 5 degrees, 0 from 5 m or 90 degrees, linear between."""
    full, none = (5.0, 90.0) if unit == "degrees" else (0.5, 5.0)
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


def score_actions(true, said) -> dict:
    """The published parts of the reward of actions.

    action = overlap of the names in any order / longer length; order = names at their places,
    numeric = numeric scores of the values there, both / true length.
    """
    order, numeric = 0, 0.0
    for (name, value), (other, told) in zip(true, said, strict=False):
        if name == other:
            order += 1
            numeric += numeric_score(value - told, "degrees" if "turn" in name else "meters")
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


def reward(task_type, answer, response, answer_type=None, options=None) -> dict:
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
        parts["numeric"] = numeric_score(error, kind)
    elif kind == "motion":
        parts |= score_actions(true[:1], said)
    else:
        parts |= score_actions(true, said)
    parts = {name: parts[name] for name in WEIGHTS[kind]}
    overall = sum(weight * parts[name] for name, weight in WEIGHTS[kind].items())
    if kind == "motions" and parts["format"]:
        overall = max(0.0, overall - 0.03 * max(0, len(said) - len(true)))
    return {"overall": overall, **parts}


# --- end: answers and the reward ---


if __name__ == "__main__":
    run(main, Config)
