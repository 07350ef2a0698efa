"""Evaluate a student on questions about rooms that no training file holds, and on benchmarks.

Every question is asked with its pictures and with grey ones (blind: what language alone can guess).
Beside both stand the best constant answer (per score, of the 50 most frequent true ones) and, of
choices, "always the first" and "always the last". Intervals and tests draw whole scenes.

    score = mean_i s(answer_i, truth_i)    difference: signs of whole scenes flipped, then Holm

Scores: motion: direction right, and the error (meters between displacements, degrees between signed
angles); motions: all names and values right; box: IoU; yes_no, relation, choice: right;
meters, degrees: the error; for all the reward of stage 5. What is not one answer is unparsable: it
scores 0, its error is that of the worst true answer of its task. --questions_out writes an exam for
another engine, --answers grades what that said. --coupled is the test-time baseline: the student
asks a world model while it answers.

Reads   RUN/3_qa/heldout.jsonl or any file of that format (--questions), or a benchmark's own files:
        {"task_type": "A2", "answer_type": "motion", "images": ["2_views/room_7/t001/000.png", ...],
         "messages": [{"role": "user", "content": "<image><image>Which way did the camera turn?"},
         {"role": "assistant", "content": "turn right 30 degrees"}], "scene_id": "room_7", ...}
Writes  RUN/6_eval/TAG/samples.jsonl, results.json, report.html, accuracy_cost.svg;
        imagined/ (by 02, for --coupled); RUN/6_eval/compare_A_B.json (--compare A B)
        {"number": 12, "task_type": "A2", "truth": "turn right 30 degrees", "response": "turn right
         20 degrees", "scores": {"answered": true, "direction": 1.0, "error_deg": 10.0, ...}, ...}
        results.json: per task and score mean, low and high (95 %), the same of its controls
        (constant, blank, copy, first, last) and of the difference from them (above_...); cost: per
        question, null where nobody counted; counts: what was skipped, dropped or unparsable.

    python 06_eval.py --run runs/demo --checkpoint 5_refine --beside base sft
    python 06_eval.py --run runs/big --benchmark vsibench-multiimage --data ~/VSI-Bench
    python 06_eval.py --run runs/demo --checkpoint base --coupled "warp --fill base/world"
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
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from zipfile import ZipFile

import jinja2
import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from kernels.generation import end_tokens, generate
from kernels.student import BROKEN, NOTHING, Student, cut_frames, load_student, prompts_of
from kernels.student import read_picture, read_questions, spent, total_cost

TINY = "--tasks A1 A2 A3 A4 D1 D2 D3 D4 --pictures shown"
RECIPES = {
    "paper": "",
    "tiny": f"{TINY} --per_task 600",
    "drawn": f"{TINY} --per_task 400 --temperature 1",  # answers drawn as GRPO draws them
}


@dataclass
class Config:
    recipe: Literal[*RECIPES] = HfArg(default="paper", help="of RECIPES; your own flags win")
    run: str = HfArg(default="runs/demo", help="folder of the run")
    checkpoint: str = HfArg(default="5_refine", help="student: a folder (in the run) or a hub id")
    tag: str = HfArg(default="", help="name of the folder under 6_eval; empty: the checkpoint's")
    benchmark: str = HfArg(default="heldout", help="a row of EXAMS: heldout or a public one")
    data: str = HfArg(default="", help="folder with a benchmark's files, or its hub cache")
    questions: str = HfArg(default="3_qa/heldout.jsonl", help="questions, in the run or anywhere")
    data_root: str = HfArg(default="", help="folder of the pictures; empty: as --questions says")
    beside: list[str] = HfArg(default_factory=list, help="tags to show in the same table, before")
    tasks: list[str] = HfArg(default_factory=list, help="tasks to ask; empty: all")
    per_task: int = HfArg(default=0, help="questions per task at most, chosen by hash; 0: all")
    pictures: Literal["both", "shown", "blank"] = HfArg(default="both", help="blank: grey ones")
    batch: int = HfArg(default=64, help="questions answered at a time; lower it to save memory")
    temperature: float = HfArg(default=0.0, help="0: greedy; 1: drawn as GRPO draws")
    max_new_tokens: int = HfArg(default=0, help="per answer; 0: as EXAMS says")
    shard: str = HfArg(default="0/1", help="i/n: every n-th list of pictures; so does torchrun")
    questions_out: str = HfArg(default="", help="only write the exam there, for another engine")
    answers: str = HfArg(default="", help="grade this file of another engine's answers instead")
    compare: list[str] = HfArg(default_factory=list, help="only compare two finished evaluations")
    coupled: str = HfArg(default="", help="a teacher of 02 and its flags: asked while answering")
    coupled_stated: bool = HfArg(default=False, help="... for the stated motion, without search")
    seed: int = HfArg(default=0, help="of the bootstrap, and of answers that are drawn")
    dtype: Literal["auto", "bfloat16", "float32"] = HfArg(default="auto", help="of the arithmetic")


# How an exam is asked. {pictures}: a `picture` each, {i} counts from 1; {options}: a line each;
# {lettered}: the same as "A. ..."; square: the middle square of a picture, of so many pixels; file:
# the name of the file with the rows; circular: asked once per order of the choices.
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
LMMS |= {"min_pixels": 200704, "max_pixels": 1605632, "max_new_tokens": 16}
LETTER = LMMS | {"words": {"choice": LETTER_WORDS}, "scorer": "sat letter"}
MINDJOURNEY = {"picture": "Image {i}:\n<image>\n", "max_pixels": 1003520, "max_new_tokens": 1024}
MINDJOURNEY |= {"words": {"choice": MINDJOURNEY_WORDS}, "system": MINDJOURNEY_SYSTEM}
MINDJOURNEY |= {"scorer": "sat text"}
MINDCUBE = {"picture": "<image>", "max_pixels": 230400, "max_new_tokens": 4096}
MINDCUBE |= {"words": {"choice": MINDCUBE_WORDS}, "scorer": "mindcube"}
FRAMES = LMMS | {"frames": 32, "words": VSI_WORDS, "scorer": "vsi", "file": "test[.-]*"}
VIDEO = FRAMES | {"video": True}  # for engines that read videos: --questions_out, --answers
REAL, SYNTHESIZED = {"file": "SAT_test.parquet"}, {"file": "SAT_val.parquet", "subset": True}
EXAMS = {
    "heldout": {"max_pixels": 1003520, "max_new_tokens": 64},  # right answers have 40 at most
    "sat-real": LETTER | REAL | {"circular": True},
    "sat-synthesized": LETTER | SYNTHESIZED | {"circular": True},
    "sat-real-mindjourney": MINDJOURNEY | REAL | {"square": 512},  # the right choice comes first
    "sat-synthesized-mindjourney": MINDJOURNEY | SYNTHESIZED,
    "sat-nvidia": LETTER | {"file": "test*.parquet"},  # nv-njb/SAT, in its own order
    "vsibench": VIDEO,
    "vsibench-debiased": VIDEO | {"file": "*debiased*"},
    "vsibench-multiimage": FRAMES,
    "mindcube": MINDCUBE | {"not_counted": ["translation"], "file": "MindCube_tinybench.jsonl"},
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
@contextmanager
def watch(skipped: dict, number):
    """Note the fault of the question inside, under its kind, where it cannot be used."""
    try:
        yield
    except (*BROKEN, ArrowException) as error:  # whatever a wrong row can raise
        kind = "missing file" if isinstance(error, FileNotFoundError) else "unusable row"
        skipped[kind].append(f"question {number}, {type(error).__name__} {str(error)[:200]}")


def read_heldout(path: Path, root: Path, skipped: dict):
    """Questions of our own format, in file order."""
    records = read_questions(path, root)  # which names unusable lines
    lost = len(path.read_bytes().splitlines()) - len(records)
    skipped["unusable line"] += ["named above"] * lost
    for number, record in enumerate(records, 1):
        with watch(skipped, number):
            *turns, last = record["messages"]
            truth = last["content"].strip()
            task = record["task_type"]
            kind = record.get("answer_type")
            if kind not in [*PARSERS]:
                kind = ANSWER_TYPES.get(task)
            if not kind or reward(None, truth, truth, kind)["overall"] < 1 - 1e-9:
                raise ValueError(f"unknown task or answer: {task!r}, {truth[:60]!r}")
            task += " choice" * (kind == "choice" != ANSWER_TYPES.get(task))
            question = {"number": number, "id": str(number), "task_type": task, "answer_type": kind}
            question["question"] = "\n".join(turn["content"] for turn in turns)
            question |= {"truth": truth, "images": record["written"], "record": record}
            question["options"] = [*map(str, record.get("options") or [])]
            question["scene_id"] = str(record.get("scene_id", f"question {number}"))
            yield question


def choose(questions: list[dict], tasks: list[str], per_task: int) -> list[dict]:
    """Of each task (or of `tasks`) at most `per_task` questions (0: all), the first by hash.

    The orders of one row's choices stay together.
    """
    groups, counts, kept = defaultdict(list), Counter(), []
    for question in questions:
        groups[question.get("group", question["number"])].append(question)
    keys = ("task_type", "question", "number")
    for group in sorted(groups.values(), key=lambda own: digest(*(own[0][key] for key in keys))):
        task = group[0]["task_type"]
        counts[task] += 1
        asked = not tasks or {task, task.removesuffix(" choice")} & {*tasks}
        if asked and (not per_task or counts[task] <= per_task):
            kept += group
    return sorted(kept, key=lambda question: question["number"])


# --- benchmarks, as they are published: one function each
def unpack(folder: Path):
    """Put beside the zips of a folder what they hold, once."""
    for file in sorted(folder.glob("*.zip")):
        mark = file.with_suffix(".unpacked")
        with alone(folder):
            if not mark.is_file():
                try:
                    ZipFile(file).extractall(folder)
                except Exception as error:  # zlib and zipfile have many of their own
                    stop(f"{file} does not unpack ({error}): fetch it again, or make room")
                mark.touch()


def find_file(data: Path, pattern: str) -> Path:
    """The file with the rows, in the folder or in a hub cache's newest snapshot, behind links."""
    snapshots = sorted(data.glob("snapshots/*"), key=lambda folder: folder.stat().st_mtime)
    home = [data, *snapshots][-1]
    unpack(home)
    for folder, _, names in os.walk(home, followlinks=True):
        if matching := sorted(name for name in names if fnmatch(name, pattern)):
            return Path(folder) / matching[0]
    stop(f"no {pattern} under {data}: --data wants the benchmark's files as they are published")


def locate(root: Path, name: str) -> Path:
    """A file that a row names, without leaving the data; links in there are the user's own."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name} leads out of the data")
    if not (root / name).is_file():
        raise FileNotFoundError(f"{name} is missing")
    return root / name


def published_rows(path: Path, skipped: dict, *keys: str):
    """(number, row) of a JSONL or parquet file; rows without `keys` are left out."""
    if path.suffix == ".jsonl":
        rows = [row for _, row in read_lines(path, *keys)]
        lost = len(path.read_bytes().splitlines()) - len(rows)
        skipped["malformed line"] += ["named above"] * lost
        yield from enumerate(rows)
        return
    try:
        batches = ParquetFile(path).iter_batches(64)
        yield from enumerate(row for batch in batches for row in batch.to_pylist())
    except (OSError, ArrowException) as error:
        stop(f"{path} cannot be read ({str(error).splitlines()[0]}): fetch it again")


def in_words(exam: dict, root: Path, question: dict) -> dict:
    """The question with its record, in the exam's words."""
    options, images = question["options"], question["images"]
    shown = 1 if "video" in exam else len(images)  # a video has one mark
    words = exam["words"][VSI_TYPES.get(question["task_type"], "choice")].format(
        pictures="".join(exam["picture"].format(i=i) for i in range(1, shown + 1)),
        question=question["question"].strip(),
        options="\n".join(options),
        lettered="\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(options)),
    )
    turns = {"system": exam.get("system"), "user": words, "assistant": question["truth"]}
    messages = [{"role": role, "content": text} for role, text in turns.items() if text]
    record = {"messages": messages, "images": [str(root / image) for image in images]}
    return question | {"answer_type": None, "record": record}


def read_sat(exam: dict, path: Path, root: Path, skipped: dict):
    """SAT: SAT_test.parquet is SAT-Real, 500 rows of SAT_val.parquet are SAT-Synthesized.

    The right choice is the first of every row. So a circular exam asks once per order of the
    choices, from one that a hash picks: whoever repeats a position is right once per row.
    """
    folder, last = Path("6_eval/pictures/sat"), -1
    bits = np.frombuffer(base64.b64decode(SAT_SYNTHESIZED), np.uint8)
    wanted = set(np.flatnonzero(np.unpackbits(bits)).tolist()) if exam.get("subset") else None
    for last, row in published_rows(path, skipped):
        if wanted and last not in wanted:
            continue
        with watch(skipped, last):
            choices, images = row["answers"], []
            right = row.get("correct_answer_idx")
            right = choices.index(row["correct_answer"]) if right is None else int(right)
            for picture in row["image_bytes"]:
                stored = store_picture(picture["bytes"], root / folder, exam.get("square"))
                images.append(str(folder / stored))
            common = {"task_type": row["question_type"], "question": row["question"]}
            common |= {"images": images, "scene_id": " ".join(images)}
            orders = [list(range(len(choices)))]
            if exam.get("circular"):
                first = sorted(orders[0], key=lambda place: digest("order", last, place))
                orders = [first[turn:] + first[:turn] for turn in orders[0]]
            for turn, order in enumerate(orders):
                question = common | {"number": last, "id": str(last), "order": order}
                if exam.get("circular"):
                    number = last * len(LETTERS) + turn
                    question |= {"number": number, "id": f"{last}/{turn}", "group": last}
                letter = LETTERS[order.index(right)]
                question["truth"] = letter if exam["scorer"] == "sat letter" else choices[right]
                question["options"] = [choices[i] for i in order]
                yield in_words(exam, root, question)
    for row in sorted(row for row in wanted or () if row > last):
        skipped["missing row"].append(f"row {row} of {path.name}")


def store_picture(content: bytes, folder: Path, square: int | None) -> str:
    """Write an encoded picture under the hash of its bytes; square: only its middle, resized."""
    name = hashlib.sha256(content).hexdigest()[:20] + (f"_{square}.png" if square else ".png")
    with alone(folder):  # two shards may store the same picture
        if not (folder / name).is_file():
            picture = Image.open(io.BytesIO(content)).convert("RGB")
            if square:
                picture = ImageOps.fit(picture, (square, square), Image.BICUBIC)
            encoded = io.BytesIO()
            picture.save(encoded, "PNG", compress_level=1)
            save(folder / name, encoded.getvalue())
    return name


def read_vsi(exam: dict, path: Path, root: Path, skipped: dict):
    """VSI-Bench: rows in a file and DATASET/SCENE.mp4; `prompts_of` has the frames cut out."""
    keys = ("dataset", "scene_name", "question_type", "question", "ground_truth")
    for number, row in published_rows(path, skipped, *keys):
        id = str(row.get("id", number))
        with watch(skipped, id):
            task, truth = row["question_type"], str(row["ground_truth"]).strip()
            options = [re.sub(r"^[A-Z]\.\s*", "", option) for option in row.get("options") or []]
            numeric = VSI_TYPES[task] == "number"
            if not (float(truth) > 0 if numeric else truth in [*LETTERS[: len(options)]]):
                raise ValueError(f"{truth[:20]!r} is not an answer")
            scene = f"{row['dataset']}/{row['scene_name']}"
            frames = Path("6_eval/pictures/vsibench", scene, str(exam["frames"]))
            question = {"number": number, "id": id, "task_type": task, "scene_id": scene}
            question |= {"question": row["question"], "options": options, "truth": truth}
            question["images"] = [str(frames / f"{i:03d}.png") for i in range(exam["frames"])]
            question["video"] = str(locate(path.parent, f"{scene}.mp4"))
            yield in_words(exam, root, question)


def read_mindcube(exam: dict, path: Path, root: Path, skipped: dict):
    """MindCube: MindCube_tinybench.jsonl, whose texts hold the options, and pictures."""
    base = path.parents[1] if path.parent.name == "raw" else path.parent
    for number, row in published_rows(path, skipped, "id", "question", "images"):
        id, truth = str(row["id"]), row.get("gt_answer")
        with watch(skipped, id):
            text = row["question"].replace("<image>", "")
            options = re.findall(r"\b[A-E]\.\s*(.*?)(?=\s+[A-E]\.\s|\s*\Z)", text, re.S)
            if truth not in [*LETTERS[: len(options)]]:
                raise ValueError(f"{truth!r} is not an answer")
            images = [str(locate(base, image)) for image in row["images"]]
            scene = str(Path(row["images"][0]).parent)
            question = {"number": number, "id": id, "task_type": setting_of(id), "truth": truth}
            question |= {"question": text, "options": options, "scene_id": scene, "images": images}
            yield in_words(exam, root, question)


READERS = {"sat": read_sat, "vsibench": read_vsi, "mindcube": read_mindcube}


# --- answers of other engines
def write_questions(questions: list[dict], path: Path, video: bool, cfg: Config):
    """A request per line, as OpenAI's batches and `vllm run-batch` read them, and our own keys."""
    lines, kind = [], "video_url" if video else "image_url"
    for question in questions:
        record, messages = question["record"], []
        files = iter([question["video"]] if video else record["images"])
        for turn in record["messages"][:-1]:
            content = []
            for part in filter(None, re.split("(<image>)", turn["content"])):
                shown = {"type": "text", "text": part}
                if part == "<image>":
                    shown = {"type": kind, kind: {"url": Path(next(files)).resolve().as_uri()}}
                content.append(shown)
            messages.append({"role": turn["role"], "content": content})
        body = {"model": cfg.checkpoint, "messages": messages, "max_tokens": cfg.max_new_tokens}
        body["temperature"] = cfg.temperature
        line = {"custom_id": question["id"], "method": "POST", "url": "/v1/chat/completions"}
        line |= {key: question[key] for key in ("task_type", "question", "options", "images")}
        lines.append(json.dumps(line | {"body": body}) + "\n")
    save(path, "".join(lines))
    print(f"{len(lines)} questions written to {path}: answer them, then --answers FILE")


def answer_in(line: dict) -> tuple[str, str, dict]:
    """(id, text, cost) of a line by hand, of a batch's output, or of lmms-eval's samples."""
    said, id = line.get("response"), line.get("id", line.get("custom_id"))
    cost = {key: line.get(key) for key in ("seconds", "tokens")}
    if "custom_id" in line and isinstance(said, dict):
        id, body = line["custom_id"], said.get("body") or said
        cost["tokens"] = (body.get("usage") or {}).get("completion_tokens")
        said = body["choices"][0]["message"]["content"] or ""
    elif "doc_id" in line:
        id = (line.get("doc") or {}).get("id", line["doc_id"])
        said = line.get("resps") or line["filtered_resps"]
        while isinstance(said, list):
            said = said[0]
    return str(id), said.strip(), dict.fromkeys(NOTHING) | cost


def read_answers(questions: list[dict], path: Path, skipped: dict) -> dict[int, dict]:
    """{number: question with its "response"}; what has no answer is wrong, and counted."""
    found, records = {}, {}
    for number, line in read_lines(path):
        try:
            id, text, cost = answer_in(line)
            found[id] = {"response": text, "cost": cost}
        except BROKEN as error:
            skipped["unusable answer"].append(f"line {number}, {error!r}")
    if not found.keys() & {question["id"] for question in questions}:
        stop(f"{path} answers no question of this exam by its id: write the exam, --questions_out")
    none = {"response": "", "cost": dict.fromkeys(NOTHING)}
    for question in questions:
        record = question | found.get(question["id"], none) | {"blank_response": None}
        del record["record"]
        records[question["number"]] = record
        if question["id"] not in found:
            skipped["without an answer (wrong)"].append(f"question {question['id']}")
    return records


# --- generation
def respond(student: Student, batch: list[dict], blank: bool, cfg: Config) -> list[dict]:
    """Per question {"response", "cost"}, or the "fault" for which it cannot be asked.

    The clock runs for the student alone: pictures are read before, whoever asks first.
    """
    found, draw = prompts_of(student, batch, blank), []
    begun = time.perf_counter()
    good = [i for i, one in enumerate(found) if "fault" not in one]
    if not good:
        return found
    prompts = [found[i] for i in good]
    if cfg.temperature:  # numbers of the question's own, whatever its batch is
        streams = [digest("draw", cfg.seed, batch[i]["number"]) for i in good]
        numbers = [np.random.default_rng([*key]).random(cfg.max_new_tokens) for key in streams]
        draw = [cfg.temperature, torch.tensor(np.array(numbers), dtype=torch.float32)]
    try:
        tokens = generate(student, prompts, cfg.max_new_tokens, *draw)
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate", str(error)):
            raise
        stop(f"out of memory with {len(good)} questions at a time: lower --batch {cfg.batch}")
    texts = student.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    seconds = (time.perf_counter() - begun) / len(good)
    for i, prompt, own, text in zip(good, prompts, tokens, texts, strict=True):
        if batch[i].get("inverted") and (said := PARSERS["yes_no"](text)) is not None:
            text = "no" if said else "yes"
        cost = NOTHING | spent(student, prompt, len(own), seconds)
        found[i] = {"response": text.strip(), "cost": cost}
        found[i]["cut_off"] = not {*end_tokens(student)} & {*own}
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

    Questions about the same pictures are neighbours: they share one generation.
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
        said = respond(load(), batch, cfg.pictures == "blank", cfg)
        blind = respond(load(), batch, True, cfg) if cfg.pictures == "both" else [{}] * len(batch)
        with log.open("a") as lines:
            for question, found, control in zip(batch, said, blind, strict=True):
                record = question | found | {"blank_response": control.get("response")}
                costs = [found.get("cost", NOTHING), question.get("cost", NOTHING)]
                record["cost"] = total_cost(costs)
                del record["record"]
                lines.write(json.dumps(record) + "\n")
    return logged(folder)


# --- public scorers: what the published code does, right or wrong (lmms-eval 75571cf, MindCube
# 6d8fd9a, MindJourney aeed003): only numbers that are scored alike can be compared
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
SMALL += "fifteen sixteen seventeen eighteen nineteen twenty"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety hundred"
NUMBER_WORDS = {word: value for value, word in enumerate(SMALL.split())} | {"thousand": 1000}
NUMBER_WORDS |= {word: 10 * i for i, word in enumerate(TENS.split(), 2)}
FIRST_NUMBER = rf"-?\d+(?:\.\d+)?|(?<![a-z])(?:{'|'.join(NUMBER_WORDS)})(?![a-z])"


def first_number(text: str) -> float | None:
    """The first number of a text, in digits (".5" is read as 5, "1,200" as 1) or in words."""
    text = text.lower()
    found = re.search(FIRST_NUMBER, text)
    if not found:
        return None
    if not found[0].isalpha():
        return float(found[0])
    thousands, rest = 0, 0
    for word in re.findall("[a-z]+", text[found.start() :]):  # "one hundred and five"
        value = NUMBER_WORDS.get(word)
        if value == 1000:
            thousands, rest = thousands + max(rest, 1) * 1000, 0
        elif value == 100:
            rest = max(rest, 1) * 100
        elif value is not None:
            rest += value
        elif word != "and":
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
    """What lmms-eval's command line leaves: a prompt may have opened the thoughts already."""
    for tag in ("think", "analysis"):
        text = re.sub(f"<{tag}>.*?</{tag}>", "", text, flags=re.S)
        if f"<{tag}>" not in text:
            text = text.rpartition(f"</{tag}>")[2]
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


def setting_of(id):
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
    listed = re.findall(r"\b[A-Z]\.\s+([^\n]*)", question)
    letters = dict(zip(map(str.strip, listed), LETTERS, strict=False))
    found = re.search("|".join(map(re.escape, letters)), clean) if letters else None
    return (letters.get(found[0], clean) if found else clean).split(" ")[0]


def score_choice(scorer: str, sample: dict, response: str) -> dict:
    """{"answered", "score" by the public scorer, "right"} of a response to a benchmark; "lmms" by
    lmms-eval where its number is another: MindCube's own code scores thoughts, in one line."""
    kind, options, truth = sample["task_type"], sample["options"], sample["truth"]
    text, letters, scores = without_thoughts(response), [*LETTERS[: len(options)]], {}
    if scorer == "vsi":
        score = score_vsi(kind, text, truth)
        answered = text.split(" ")[0].rstrip(".").strip().upper() in letters
        if VSI_TYPES[kind] == "number":
            answered = first_number(text) is not None
    elif scorer == "mindcube":
        said = extract_choice(" ".join(response.split()))
        answered, score = said is not None, float(said == truth)
        scores["lmms"] = float(extract_choice(text) == truth)
    elif scorer == "sat letter":
        said = sat_letter(response, sample["question"]).replace("_", "").upper()
        answered, score = said in letters, float(said == truth)
    else:
        answered = any(option.lower() in response.lower() for option in options)
        score = score_sat(response, options, truth)
    return {"answered": answered, "score": score} | scores | {"right": score}


# --- scores: the main one of a question first. Errors are better when lower, all others when higher
WORDS = {"direction": "direction", "exact": "exact", "accuracy": "accuracy", "iou": "IoU"}
WORDS |= {"circular": "right in all orders", "score": "score", "lmms": "score by lmms-eval"}
WORDS |= {"error_m": "error (m)", "error_deg": "error (deg)", "reward": "reward"}
WORDS["right"] = "right answers"
CONTROLS = {"constant": "constant", "blank": "blank", "copy": "copy"}
CONTROLS |= {"first": "always first", "last": "always last"}
CONSTANTS = 50  # most frequent true answers per task that are tried as constant answer
DRAWS = 1000  # of the bootstrap, and of the sign flips
Z = 1.959964  # 95 % of a normal distribution


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


def estimate(values, scenes, *key, weights=None, difference=False, share=True) -> dict:
    """{"mean", "low", "high"}: the weighted mean, and its 95 % interval over draws of whole scenes.

    That of a `share`, of answers that are 0 or 1, also holds Wilson's interval: draws of equal ones
    never differ. Of a difference also "p", the share of random signs of whole scenes with as large
    a sum: with few scenes draws vary too little, signs do not.
    """
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else weights
    names, index = np.unique(np.array(scenes, dtype=str), return_inverse=True)
    sums, counts = np.bincount(index, weights * values), np.bincount(index, weights)
    mean, found = sums.sum() / counts.sum(), {}
    if len(names) > 1:  # one scene has no interval
        generator = np.random.default_rng([*digest(*key, "bootstrap")])
        picked = generator.integers(len(names), size=(DRAWS, len(names)))
        ends = np.percentile(sums[picked].sum(1) / counts[picked].sum(1), [2.5, 97.5])
        if share and not difference and np.isin(values, (0, 1)).all():
            n = weights.sum() ** 2 / (weights**2).sum()
            half = Z * math.sqrt(mean * (1 - mean) / n + (Z / n / 2) ** 2)
            other = (mean + Z**2 / n / 2 + np.array([-half, half])) / (1 + Z**2 / n)
            ends = [*ends, *other.clip(0, 1)]
        found = {"low": min(ends), "high": max(ends)}
        if difference:
            signs = generator.choice([-1.0, 1.0], size=(DRAWS, len(names)))
            as_large = abs(signs @ sums) >= abs(sums.sum()) - 1e-9
            found["p"] = (as_large.sum() + 1) / (DRAWS + 1)
    ends = {"low": None, "high": None} | ({"p": None} if difference else {})
    return ends | {name: round(float(x), 6) for name, x in ({"mean": mean} | found).items()}


def holm(values: list[float]) -> list[float]:
    """P-values corrected for their number, by Holm's method."""
    order, corrected, least = sorted(range(len(values)), key=values.__getitem__), [*values], 0.0
    for rank, i in enumerate(order):
        least = corrected[i] = max(least, min(1.0, values[i] * (len(values) - rank)))
    return corrected


def category(kind):
    """The eight of VSI-Bench: a direction's three difficulties are one."""
    return re.sub("_(easy|medium|hard)$", "", kind)


def weights_of(own: list[dict]) -> np.ndarray:
    """What a question counts: rows asked in several orders once; VSI-Bench's number is the mean
    over categories of the mean over question types."""
    kinds, rows = [one["task_type"] for one in own], [one.get("group") for one in own]
    if VSI_TYPES.keys() >= {*kinds}:
        types, questions = Counter(category(kind) for kind in {*kinds}), Counter(kinds)
        return np.array([1 / questions[kind] / types[category(kind)] for kind in kinds])
    counts = Counter(rows)
    return np.array([1.0 if row is None else 1 / counts[row] for row in rows])


def fill_scores(own: list[dict], exam: dict) -> dict[str, str]:
    """Fill in a task's scores and controls -> {metric: the best constant answer}."""
    counts = Counter(sample["truth"] for sample in own)
    truths = frozenset(counts)

    def score(responses):
        scored, worst = [], {}
        for one, said in zip(own, responses, strict=True):
            if "scorer" in exam:
                scored.append(score_choice(exam["scorer"], one, said))
            else:
                options = tuple(one.get("options", ()))
                scored.append(measure(one["answer_type"], one["truth"], said, truths, options))
            if "group" in one:  # a row asked in all orders is as right as in the worst of them
                worst[one["group"]] = min(scored[-1]["score"], worst.get(one["group"], 1.0))
        for one, scores in zip(own, scored, strict=True):
            if "group" in one:
                scores |= dict.fromkeys(("circular", "right"), worst[one["group"]])
        return scored

    said = {name: [sample[name] for sample in own] for name in ("response", "blank_response")}
    boxes = [BOX.search(sample["question"]) for sample in own]
    if all(boxes) and own[0]["answer_type"] == "box":
        said["copy_response"] = [box[0] for box in boxes]  # the first picture's box, said again
    if all(sample.get("options") for sample in own):
        listed = [sample["options"] for sample in own]
        if exam.get("scorer") != "sat text":
            listed = [LETTERS[: len(options)] for options in listed]
        said |= {"first_response": [one[0] for one in listed]}
        said |= {"last_response": [one[-1] for one in listed]}
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


def summary(own: list[dict], metric: str, *key, controls=tuple(CONTROLS)) -> dict:
    """The interval of a score, of its controls, and of the difference from each of them."""
    scenes = [sample["scene_id"] for sample in own]
    how = {"weights": weights_of(own), "share": "error" not in metric}

    def values(name):
        found = [sample.get(name, {}).get(metric) for sample in own]
        return None if None in found else np.array(found, float)

    score = values("scores")
    result = estimate(score, scenes, *key, **how)
    for name in controls:
        control = values(f"{name}_scores")
        if control is not None:
            result[name] = estimate(control, scenes, *key, **how)
            above = estimate(score - control, scenes, *key, **how, difference=True)
            result[f"above_{name}"] = above
    return result


def grade(samples: list[dict], exam: dict, seed: int) -> dict:
    """{task or "all": {"questions", "unparsable", "metrics"}}; fills the samples' scores in."""
    groups, tasks = defaultdict(list), {}
    for sample in samples:
        groups[sample["task_type"]].append(sample)
    best = {task: fill_scores(own, exam) for task, own in groups.items()}
    if exam.get("scorer") == "vsi":
        for sample in samples:
            if category(sample["task_type"]) not in best:
                groups[category(sample["task_type"])].append(sample)
    left_out = exam.get("not_counted", [])
    groups = dict(sorted(groups.items()))
    groups["all"] = [one for one in samples if one["task_type"] not in left_out] or samples
    for task, own in groups.items():
        metrics = {}
        for metric in metrics_of(*(sample["scores"] for sample in own)):
            counted = samples if metric == "lmms" and task == "all" else own  # it leaves out none
            metrics[metric] = summary(counted, metric, seed, task)
            if metric in best.get(task, {}):
                metrics[metric]["constant"]["answer"] = best[task][metric]
        tasks[task] = {"questions": len(own), "scenes": len({one["scene_id"] for one in own})}
        tasks[task]["unparsable"] = sum(not sample["scores"]["answered"] for sample in own)
        tasks[task]["metrics"] = metrics
    return tasks


def differences(a: list[dict], b: list[dict], seed: int) -> dict:
    """{task: {"n", metric: summary with "above_a", B minus A}} on the questions of both; "holm" is
    the p-value corrected for all that stand here: the tasks' scores, not their mean."""

    def name(sample):
        return repr([sample[key] for key in ("task_type", "question", "truth", "images")])

    known = {name(sample): sample["scores"] for sample in a}
    pairs = [one | {"a_scores": known[name(one)]} for one in b if name(one) in known]
    pairs.sort(key=name)
    tasks, tests = {}, []
    for task in [*sorted({sample["task_type"] for sample in pairs}), "all"] * bool(pairs):
        own = [sample for sample in pairs if task in (sample["task_type"], "all")]
        found = tasks[task] = {"n": len(own), "scenes": len({one["scene_id"] for one in own})}
        for metric in metrics_of(*(one[side] for one in own for side in ("scores", "a_scores"))):
            if metric != "right" or task == "all":  # nearly always the main score once more
                found[metric] = summary(own, metric, seed, task, metric, controls=["a"])
                above = found[metric]["above_a"]
                tests += [above] * (task != "all" and above["p"] is not None)
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["holm"] = round(p, 6)
    return tasks


# --- table and report
COSTS = {"seconds": "seconds per question", "world_seconds": "of them for imagining"}
COSTS |= {"views": "views imagined", "tokens": "tokens generated", "peak_gb": "peak memory, GB"}
COSTS |= {"vlm_flops": "operations of the VLM", "world_flops": "of the world model"}


def figure(value: dict | None, metric: str, ends=False, sign="") -> str:
    """A mean; with `ends`, its interval behind."""
    if value is None:
        return "-"
    form = f"{sign}.{ {'error_deg': 1, 'error_m': 2}.get(metric, 3) }f"
    mean, low, high = (value.get(end) for end in ("mean", "low", "high"))
    interval = f" ({low:{form}} to {high:{form}})" if ends and low is not None else ""
    return f"{mean:{form}}{interval}"


def table(evaluations: list[dict]) -> list[list[str]]:
    """Rows, the head first: controls of the last evaluation, then all of them side by side."""
    tasks = evaluations[-1]["tasks"]
    metrics = [values for one in tasks.values() for values in one["metrics"].values()]
    controls = [name for name in CONTROLS if any(name in values for values in metrics)]
    above = ["above_blank"] * ("blank" in controls)
    tags = [one["tag"] + " (*)" * unreliable(one) for one in evaluations]
    head = ["task", "score", "n", *(CONTROLS[name] for name in controls), *tags]
    rows = [head + ["above blank" for _ in above]]
    for task, result in tasks.items():
        others = [one["tasks"].get(task, {"metrics": {}})["metrics"] for one in evaluations]
        for metric, values in result["metrics"].items():
            if metric != "right" or task == "all":  # nearly always the main score once more
                cells = [figure(values.get(name), metric) for name in controls]
                cells += [figure(other.get(metric), metric, ends=True) for other in others]
                cells += [figure(values.get(name), metric, True, "+") for name in above]
                rows.append([task, WORDS[metric], str(result["questions"]), *cells])
    empty, end = [""] * (1 + len(controls)), [""] * len(above)
    for key, words in COSTS.items():
        costs = [one["cost"][key] for one in evaluations]
        costs = ["-" if cost is None else f"{cost:.3g}" for cost in costs]
        rows.append(["cost", words, *empty, *costs, *end])
    counted = [one["counts"] | {"questions at a time": one["batch"]} for one in evaluations]
    for what in sorted({what for counts in counted for what in counts}):
        numbers = [str(one.get(what, 0)) for one in counted]
        rows.append(["count", what, *empty, *numbers, *end])
    return rows


def difference_rows(tasks: dict, names: list[str]) -> list[list[str]]:
    """What `differences` found, as a table."""
    rows = [["task", "score", "n", *names, "difference", "p", "p by Holm"]]
    for task, found in tasks.items():
        for metric in metrics_of(found):
            one = found[metric]
            above = one["above_a"]
            cells = [figure(one["a"], metric), figure(one, metric)]
            cells.append(figure(above, metric, ends=True, sign="+"))
            cells += ["-" if above.get(p) is None else f"{above[p]:.4f}" for p in ("p", "holm")]
            rows.append([task, WORDS[metric], str(found["n"]), *cells])
    return rows


def aligned(rows: list[list[str]]) -> str:
    """The rows as lines: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, "<<" + ">" * len(row), strict=False)
        lines.append("  ".join(f"{cell:{side}{n}}" for cell, n, side in cells).rstrip())
    return "\n".join(lines)


def draw(evaluations: list[dict]) -> bytes:
    """An SVG: right answers over seconds per question, with intervals; dashed: the controls."""
    plot, file = Figure(figsize=(4.2, 3.4), layout="constrained"), io.BytesIO()
    timed = [one for one in evaluations if one["cost"]["seconds"]]
    seconds = [one["cost"]["seconds"] for one in timed] or [1]
    axes = plot.add_subplot(xscale="log", ylim=(0, 1.03), ylabel="right answers")
    axes.set(xlabel="seconds per question", xlim=(min(seconds) / 5, max(seconds) * 5))
    for name, colour in (("blank", "grey"), ("constant", "orange")):
        if control := evaluations[-1]["right"].get(name):
            axes.axhline(control["mean"], color=colour, linestyle="--", label=CONTROLS[name])
    for one in timed:
        mean, low, high = (one["right"][end] for end in ("mean", "low", "high"))
        error = None if low is None else [[max(0, mean - low)], [max(0, high - mean)]]
        axes.errorbar(one["cost"]["seconds"], mean, error, fmt="o", label=one["tag"][:24])
    plot.legend(loc="outside lower center", ncols=2)
    with rc_context({"svg.hashsalt": "06"}):  # equal plots are equal bytes
        plot.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def confusion(samples: list[dict]) -> list[list[str]]:
    """How often which motion was said for which, by names alone."""
    counts = Counter()
    for one in samples:
        if one["answer_type"] in ("motion", "motions"):
            ways = [parse_actions(one[key][:200]) or () for key in ("truth", "response")]
            names = [" + ".join(name for name, _ in way) or "no answer" for way in ways]
            counts[one["task_type"], *names] += 1
    rows = sorted((*names, n) for names, n in counts.items())
    return [["task", "true", "said", "n"], *rows] if rows else []


def visible(value):
    """What the page shows of a text: at most 1,200 characters, no control or direction marks."""
    if hasattr(value, "__html__"):
        return value  # marked safe: our own pictures
    text = str(value)
    shown = "".join(c if c.isprintable() else " " for c in text[:1200])
    return shown if len(text) <= 1200 else f"{shown} … ({len(text):,} characters)"


def pictures_of(sample: dict, root: Path) -> list[str]:
    """A sample's pictures in base64 with boxes drawn on them; many frames are small."""
    images, encoded = sample["images"], []
    side = 320 if len(images) <= 8 else 96
    last, named = len(images) - 1, BOX.finditer(sample["question"])
    boxes = [(min(i, last), found[0], "orange") for i, found in enumerate(named)]
    boxes += [(last, sample["truth"], "lime"), (last, sample["response"][:200], "red")]
    for i, image in enumerate(images):
        picture, file = read_picture(root / image), io.BytesIO()
        picture.thumbnail((side, side))
        for where, text, colour in boxes:
            if where == i and (box := parse_box(text)):
                corners = np.array(sorted_box(box[0])) * [*picture.size, *picture.size] / 1000
                ImageDraw.Draw(picture).rectangle(corners.tolist(), outline=colour)
        picture.save(file, "webp", quality=90)
        encoded.append(base64.b64encode(file.getvalue()).decode())
    return encoded


CARDS = 4  # examples per task that were answered rightly, and as many wrongly
SCRIPT = """
for (const head of document.querySelectorAll('.sort tr:first-child td')) head.onclick = () => {
  const text = row => row.cells[head.cellIndex].textContent, down = head.dataset.down ^= 1;
  const key = (a, b) => parseFloat(text(a)) - parseFloat(text(b)) || text(a).localeCompare(text(b));
  const rows = [...head.closest('table').rows].slice(1).sort(key);
  (down ? rows.reverse() : rows).forEach(row => row.parentNode.append(row));
};
"""
PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'sha256-{{ hash | safe }}'">
<title>Evaluation of {{ last.tag }}</title><style>
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 72em; padding: 1em }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
td { padding: .2em .6em; text-align: right; white-space: nowrap; border-top: 1px solid #ddd }
td:first-child { position: sticky; left: 0; background: #fff; text-align: left }
td:nth-child(2) { text-align: left } .sort tr:first-child { cursor: pointer; font-weight: 600 }
h1, p { overflow-wrap: anywhere } .plot { width: 100%; max-width: 28em } .wrong { color: #c53030 }
.text td + td { overflow-wrap: anywhere; white-space: normal; text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17em, 1fr)); gap: 1em }
.cards div { border: 1px solid #ddd; padding: .6em; min-width: 0 } details { margin: .6em 0 }
.cards img { width: 45%; image-rendering: pixelated } .strip img { width: 11%; margin: 0 }
</style>
{% macro grid(rows, class="sort") %}<table class="{{ class }}">{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endmacro %}
<h1>Evaluation of {{ last.tag }}</h1>
<p>Checkpoint {{ last.config.checkpoint }}, {{ last.questions }} questions. The constant answer is
chosen for every score anew, knowing these questions. In brackets: 95 %, by drawing whole scenes.
{% for note in notes %}{{ note }} {% endfor %}</p>
<img class="plot" alt="accuracy and cost" src="data:image/svg+xml;base64,{{ plot | safe }}">
<p>Click a column's head to sort by it.</p>{{ grid(rows) }}
{% for name, rows in grids.items() %}<details><summary>{{ name }}</summary>
{{ grid(rows, "text" if loop.first else "sort") }}</details>{% endfor %}
<p>Examples; all answers are in <a href="samples.jsonl">samples.jsonl</a>. Boxes: orange as the
question names them, green true, red answered.</p>
{% for task, cards in tasks.items() %}
<details><summary>{{ task }}</summary><section class="cards">
{% for card in cards %}<div><p>{{ card.scene_id }}, question {{ card.id }}</p>
<p class="{{ 'strip' if card.images | length > 8 }}">{% for picture in card.pictures %}
<img alt="" src="data:image/webp;base64,{{ picture | safe }}"> {% endfor %}</p>
<p>{{ card.question | replace("<image>", "") }}</p>
{% for option in card.options %}<p>{{ "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[loop.index0] }}. {{ option }}</p>
{% endfor %}<p>true: <bdi>{{ card.truth }}</bdi></p>
<p class="{{ 'wrong' if card.scores.right < 0.5 }}">said: <bdi>{{ card.response }}</bdi></p>
<p>said of grey pictures: <bdi>{{ card.blank_response }}</bdi></p>
</div>{% endfor %}</section></details>{% endfor %}
<script>{{ script | safe }}</script></html>
"""


def report(evaluations: list[dict], samples: list[dict], others: dict, root: Path, folder: Path):
    """Write the page and the plot of the last evaluation; others: {tag: samples} beside it."""
    last, tasks, counts, plot = evaluations[-1], {}, Counter(), draw(evaluations)
    save(folder / "accuracy_cost.svg", plot)
    for sample in sorted(samples, key=lambda one: digest(one["question"], one["number"])):
        kind = sample["task_type"], sample["scores"]["right"] >= 0.5
        counts[kind] += 1
        if counts[kind] <= CARDS:
            with suppress(ValueError):  # gone since it was asked about
                sample = sample | {"pictures": pictures_of(sample, root)}
            tasks.setdefault(kind[0], []).append(sample)
    protocol = last["protocol"] | {"seed": last["config"]["seed"], "asked": last["asked_sha256"]}
    grids = {"How it was asked": [[key, json.dumps(value)] for key, value in protocol.items()]}
    for tag, theirs in others.items():
        found = differences(theirs, samples, last["config"]["seed"])
        grids[f"{last['tag']} minus {tag}"] = difference_rows(found, [tag, last["tag"]])
    grids["What was said for what was true"] = confusion(samples)
    content = {"last": last, "rows": table(evaluations), "notes": notes(evaluations)}
    content |= {"grids": grids, "tasks": dict(sorted(tasks.items())), "script": SCRIPT}
    content["plot"] = base64.b64encode(plot).decode()
    content["hash"] = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    page = jinja2.Environment(autoescape=True, finalize=visible).from_string(PAGE)
    save(folder / "report.html", page.render(content))


def unreliable(one: dict) -> bool:
    """Whether more than a tenth of what the test-time baseline asked for could not be read."""
    return one["counts"].get("scorings unparsable", 0) > one["counts"].get("scorings", 0) / 10


def notes(evaluations: list[dict]) -> list[str]:
    """What a reader of the table has to know."""
    last, found = evaluations[-1], []
    for one in evaluations:
        if one["asked_sha256"] != last["asked_sha256"]:
            found.append(f"{one['tag']} was asked other questions, or in another way.")
    if any(map(unreliable, evaluations)):
        found.append("(*): too few of its lists of scores could be read, this is no result.")
    if (scenes := last["tasks"]["all"]["scenes"]) < 20:
        found.append(f"Only {scenes} scenes: the intervals are too narrow, trust p by Holm.")
    return found


# --- two evaluations, compared
def compare_two(cfg: Config):
    """Print and write how B differs from A on the questions that both answered."""
    if len(cfg.compare) != 2:
        stop("--compare wants two finished evaluations, tags or folders: --compare base sft")
    home, names = Path(cfg.run) / "6_eval", [Path(name).name for name in cfg.compare]
    keys, samples = ("task_type", "question", "truth", "images", "scene_id", "scores"), []
    for name in cfg.compare:
        lines = read_lines(existing(home, name) / "samples.jsonl", *keys)
        samples.append([sample for _, sample in lines])
    tasks = differences(*samples, cfg.seed)
    if not tasks:
        stop(f"{' and '.join(cfg.compare)} have no question in common: ask both the same")
    n, path = tasks["all"]["n"], home / f"compare_{'_'.join(names)}.json"
    result = dict(zip("ab", cfg.compare, strict=True)) | {"of": [*map(len, samples)]}
    save(path, json.dumps(result | {"tasks": tasks}, indent=1))
    print(aligned(difference_rows(tasks, names)))
    print(f"{n} questions that both answered, of {result['of']}")
    if (scenes := tasks["all"]["scenes"]) < 20:
        print(f"note: {scenes} scenes, trust p by Holm, not the interval")
    print(f"written: {path}")


# --- the test-time baseline: the student asks the world model while it answers. After MindJourney
# (arXiv 2507.12508), with the numbers of its released scripts: from a first picture a step tries
# every action from every beam, each sub-step is a view, and the student scores all new views in one
# prompt, by two criteria. Views of 8 and more go on, or help to answer. Departures: its prompts in
# our words, and the question's own form around the views; scores that cannot be read are not asked
# for again, as greedy answers would only repeat (it draws random scores 0..5 then, all below 8, so
# that its search ends as ours does); a view that two ways reach is one.
# A walk: ((name, value), ...) with no two of one name in a row. A path: (picture, actions), whose
# every action ends in a view. Views: {walk: picture}.
SEARCH = {"forward": 0.25, "turn_left": 9.0, "turn_right": 9.0}  # sub-steps (meters, degrees)
BACK = {"turn_left": "turn_right", "turn_right": "turn_left"}  # are not tried behind each other
SUBSTEPS, STEPS, BEAMS, SHOWN, LEAST_SCORE = 3, 3, 2, 18, 8  # SHOWN: views per step at most
CRITERIA = [
    "how well suited it is for exploring on from there in order to answer the question",
    "how helpful it is for answering the question: a view that does not show the answer may still "
    "rule out wrong ones; a picture of bad quality gets a low score, any other a higher one",
]
DEMAND = """
Do not answer it yet. Score each of the {n} imagined views from 0 to 9: {criterion}. Output a list \
of {n} scores in the order of the views, separated by ',', and nothing else. Output: """


def merged(actions: tuple) -> tuple:
    """A walk: the actions, those of one name in a row as one."""
    walk = []
    for name, same in itertools.groupby(actions, lambda action: action[0]):
        walk.append((name, sum(value for _, value in same)))
    return tuple(walk)


def motion_text(walk: tuple) -> str:
    """(("turn_left", 18.0), ("forward", 0.5)) -> `turn left 18 degrees; move forward 0.5 meters`"""
    texts = []
    for name, value in walk:
        verb, unit = ("turn", "degrees") if name.startswith("turn") else ("move", "meters")
        texts.append(f"{verb} {name.split('_')[-1]} {value:g} {unit}")
    return "; ".join(texts)


def motion_poses(actions: tuple) -> tuple[np.ndarray, list[int]]:
    """c2w [N, 4, 4] from the identity, and the key frames: 0 and the last one of every action."""
    poses, keyframes = [np.eye(4)], [0]
    for name, value in actions:
        most = 5.0 if name.startswith("turn") else 0.2  # degrees or meters per frame
        count = max(1, math.ceil(value / most - 1e-9))
        steps = [motion_pose(name, value * i / count) for i in range(1, count + 1)]
        poses += [poses[-1] @ step for step in steps]
        keyframes.append(len(poses) - 1)
    return np.stack(poses), keyframes


def origin(image: Path) -> dict | None:
    """The keys of a trajectory record that say where a picture looks from; None: it is unknown.

    A picture of 02 has a view.json beside it; its pose in a room is start @ c2w[frame]. Any other
    is a photograph, with 54 degrees along its longer side.
    """
    try:
        width, height = read_picture(image).size
        tangent = math.tan(math.radians(54 / 2)) * min(1, width / height)
        found = {"source": "real", "room": None, "start": None, "anchor": str(image.resolve())}
        found |= {"width": width, "height": height}
        found["fov_x_deg"] = 2 * math.degrees(math.atan(tangent))
        view = image.with_name("view.json")
        if not view.is_file():
            return found
        view, frame = json.loads(view.read_text()), int(image.stem)
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
    except BROKEN as error:
        print(f"{image}: nothing is imagined from there, {error!r}", file=sys.stderr)
        return None


def draw_paths(run: Path, paths: list[tuple], root: Path, cfg: Config) -> tuple[dict, float]:
    """02 imagines paths (picture, actions) -> {path: a picture per action}, and seconds per path.

    A path that 02 cannot draw has no pictures; one that begins nowhere known is missing.
    """
    starts, lines = {picture: origin(Path(picture)) for picture, _ in paths}, []
    paths = [path for path in paths if starts[path[0]]]
    if not paths:
        return {}, 0.0
    for number, (picture, actions) in enumerate(paths):
        c2w, keyframes = motion_poses(actions)
        line = {"scene_id": f"p{[*starts].index(picture):05d}", "traj_id": f"w{number:06d}"}
        line |= {"split": "heldout", "actions": actions, "keyframes": keyframes}
        lines.append(line | {"c2w": (c2w.round(7) + 0.0).tolist()} | starts[picture])
    if not read_meta(run / "2_views").get("finished"):
        for room in {line["room"] for line in lines} - {None}:
            save(run / room, (root / room).read_bytes())
        text = "".join(json.dumps(line) + "\n" for line in lines)
        save(run / "1_trajectories/trajectories.jsonl", text)
        meta = {"stage": "06_eval", "finished": True, "counts": {"trajectories": len(lines)}}
        save(run / "1_trajectories/meta.json", json.dumps(meta))
        command = [sys.executable, str(Path(__file__).with_name("02_imagine_views.py"))]
        command += ["--run", str(run), "--keep", "keyframes", "--seed", str(cfg.seed)]
        with (run / "02.log").open("a") as log:
            done = subprocess.run([*command, "--teacher", *cfg.coupled.split()], stdout=log)
        if done.returncode:
            stop(f"02 ended with a fault (see {run / '02.log'}): correct --coupled")
    frames = {}
    for _, view in read_lines(run / "2_views/views.jsonl", "traj_id", "frames"):
        frames[view["traj_id"]] = [str(run / frame) for frame in view["frames"][1:]]
    seen = {path: frames.get(f"w{number:06d}", []) for number, path in enumerate(paths)}
    return seen, read_meta(run / "2_views")["seconds"] / len(lines)


def imagine(run: Path, wanted: list[list[tuple]], root: Path, cfg: Config) -> list[tuple]:
    """Per question, of which each wants paths, ({walk: picture}, cost): its views.

    Questions share equal paths, and their price. 02 does not count a network's operations.
    """
    users = Counter(itertools.chain(*wanted))
    seen, seconds = draw_paths(run, [*users], root, cfg)
    networks = not re.match(r"(simulator|warp|pan)(?!.*--(depth|fill))", cfg.coupled)
    found = []
    for paths in wanted:
        views, own = {}, [path for path in paths if path in seen]
        price = sum(seconds / users[path] for path in own)
        cost = NOTHING | {"seconds": price, "world_seconds": price}
        cost["world_flops"] = None if networks and own else 0
        for path in own:
            cost["views"] += len(seen[path])
            for end, picture in enumerate(seen[path], 1):
                views[merged(path[1][:end])] = picture
        found.append((views, cost))
    return found


def paths_from(picture: str, beams: list[tuple]) -> list[tuple]:
    """What a step tries: every action from every beam (actions), but not back."""
    paths = []
    for beam, (name, part) in itertools.product(beams, SEARCH.items()):
        if not beam or name != BACK.get(beam[-1][0]):
            paths.append((picture, (*beam, *[(name, part)] * SUBSTEPS)))
    return paths


def with_views(record: dict, views: dict[tuple, str], demand: str = "") -> dict:
    """The question with views {walk: picture} behind its own pictures, and a demand at its end."""
    *turns, last, told = record["messages"]
    own, mark, rest = last["content"].rpartition("<image>")
    shown = [f" Imagined from image 1, after {motion_text(walk)}: <image>" for walk in views]
    content = own + mark + "".join(shown) + "\n" * bool(views) + rest + demand
    images = [*record["images"], *views.values()]
    return record | {"messages": [*turns, last | {"content": content}, told], "images": images}


def scores_in(response: str) -> list[int] | None:
    """`Output: 3, 9, 0` -> [3, 9, 0]: whole numbers between commas, however many."""
    try:
        return [int(number) for number in response.split("Output:")[:2][-1].split(",")]
    except ValueError:
        return None


def best_of(views: dict, scores: list[int] | None) -> list[tuple]:
    """Walks to the views that score high enough, the best first; a missing score is none."""
    scored = sorted(zip(views, scores or [], strict=False), key=lambda one: -one[1])
    return [walk for walk, score in scored if score >= LEAST_SCORE]


def in_order(shown: dict) -> dict:
    """The views by what was done before their last amount, then by that amount."""
    ways = defaultdict(list)
    for walk in shown:
        ways[walk[:-1], walk[-1][0]].append(walk)
    return {walk: shown[walk] for own in ways.values() for walk in sorted(own)}


def named(views: dict, folder: Path) -> list[tuple]:
    """(words, picture) of views {walk: picture}, for the samples."""
    return [(motion_text(walk), os.path.relpath(path, folder)) for walk, path in views.items()]


def search_views(questions: list[dict], load, folder: Path, root: Path, cfg: Config) -> tuple:
    """The questions with imagined views among their pictures and their "cost"; and counts."""
    # per question: the paths of the next step, the walks known so far, the views shown at last
    searches, asked = [], []
    scorings = unparsable = 0
    for question in questions:
        record = question["record"]
        first = Path(record["images"][0])
        if "video" in question:
            with suppress(OSError, ValueError):  # `prompts_of` will name it
                cut_frames(question["video"], first.parent, len(record["images"]))
        search = {"record": record, "paths": paths_from(str(first), [()])}
        searches.append(SimpleNamespace(**search, known=set(), shown={}, costs=[]))
    scoring = replace(cfg, temperature=0, max_new_tokens=8 + 3 * BEAMS * len(SEARCH) * SUBSTEPS)
    for step in range(1, STEPS + 1):  # each is one call of 02 for all questions
        run = folder / "imagined" / str(step)
        found = imagine(run, [search.paths for search in searches], root, cfg)
        for search, (views, cost) in zip(searches, found, strict=True):
            search.new = {walk: views[walk] for walk in views if walk not in search.known}
            search.known |= views.keys()
            search.costs.append(cost)
            search.paths = []
        looking = [search for search in searches if search.new]
        for start in tqdm(range(0, len(looking), cfg.batch), unit="batch", desc=f"step {step}"):
            batch, demands = looking[start : start + cfg.batch], []
            for search, criterion in itertools.product(batch, CRITERIA):
                demand = DEMAND.format(n=len(search.new), criterion=criterion)
                demands.append({"record": with_views(search.record, search.new, demand)})
            file = run / "scores" / f"{start}_{cfg.batch}.json"  # so that a killed search goes on
            if not file.is_file():
                save(file, json.dumps(respond(load(), demands, False, scoring)))
            said = json.loads(file.read_text())
            for search, *both in zip(batch, said[::2], said[1::2], strict=True):
                search.costs += [one.get("cost", NOTHING) for one in both]
                scores = [scores_in(one.get("response", "")) for one in both]
                scorings += 2
                unparsable += scores.count(None)
                explore, helpful = (best_of(search.new, one) for one in scores)
                search.paths = paths_from(search.record["images"][0], explore[:BEAMS])
                search.shown |= {walk: search.new[walk] for walk in helpful[:SHOWN]}
    for question, search in zip(questions, searches, strict=True):
        shown = in_order(search.shown)
        more = {"record": with_views(search.record, shown), "imagined": named(shown, folder)}
        asked.append(question | more | {"cost": total_cost(search.costs)})
    counts = {"imagined views shown": sum(len(search.shown) for search in searches)}
    counts["questions without them"] = sum(not search.shown for search in searches)
    return asked, counts | {"scorings": scorings, "scorings unparsable": unparsable}


# The sentence that states a motion in the words of 03; without it D1 and D4 are static questions.
STATED = re.compile(r" [^.:]*: ([^:]*? (?:meters|degrees))\.(?= )")
SEEN = re.compile(r"[Tt]he (.+?) (?:is )?at \[")  # what stands in the first box
LONGEST = 1000  # meters and degrees together: longer paths would fill the memory


def restate(questions: list[dict], load, folder: Path, root: Path, cfg: Config) -> tuple:
    """Static questions instead of those that have one, and counts: D1 as where in image 2 is what
    image 1 shows in a box (S5), D4 as is it the same (S6), D2 as is there one (S2), whose answers
    are those of D2 the other way round. A view from the end of the stated motion is what D2 shows,
    and image 2 where the question has none.

    D1: "... The camera then did this: turn left 40 degrees. Find it in image 2." but the motion.
    D2: "The lamp is at [...]. Next camera motion: ... Does it disappear from view?" with image 1 ->
        "Is there any lamp in the picture?" with the view.
    """
    fit, wanted, asked = [], [], []
    for question in questions:
        record = question["record"]
        text = record["messages"][-2]["content"]
        stated = SEEN.search(text) and STATED.search(text)
        if stated and question["task_type"] in ("D1", "D1 choice", "D2", "D4", "D4 choice"):
            actions = [parse_actions(found[0])[0] for found in ACTION.finditer(stated[1])]
            if sum(value for _, value in actions) <= LONGEST:
                fit.append(question)
                path = record["images"][0], tuple(actions)
                wanted.append([path] * (len(record["images"]) == 1))
    found = imagine(folder / "imagined/1", wanted, root, cfg)
    for question, paths, (views, cost) in zip(fit, wanted, found, strict=True):
        views = dict([*views.items()][-1:])  # the others are seen on the way
        if paths and not views:
            continue
        *turns, last, told = question["record"]["messages"]
        text = STATED.sub("", last["content"], count=1)
        images = [*question["record"]["images"], *views.values()]
        if inverted := question["task_type"] == "D2":
            label = SEEN.search(text)[1]
            text = f"<image>Is there any {label} in the picture? Answer yes or no."
            images = images[1:]
        elif views:
            text = "<image>" + text
        messages = [*turns, last | {"content": text}, told]
        record = question["record"] | {"messages": messages, "images": images}
        more = {"record": record, "asked": text, "inverted": inverted, "cost": cost}
        asked.append(question | more | {"imagined": named(views, folder)})
    counts = {"dropped, no static question": len(questions) - len(fit)}
    return asked, counts | {"dropped, no view": len(fit) - len(asked)}


# --- all together
def show(evaluations: list[dict], folder: Path):
    """The last lines of the output: the table and the path of the report."""
    for note in notes(evaluations):
        print(f"note: {note}")
    print(aligned(table(evaluations)))
    print(f"report: {folder / 'report.html'}")


def settle(cfg: Config) -> tuple[Config, dict]:
    """The settings with what the exam and the checkpoint say, and the exam."""
    if cfg.benchmark not in EXAMS:
        stop(f"--benchmark {cfg.benchmark}: want one of {', '.join(EXAMS)}")
    if cfg.benchmark != "heldout" and not cfg.data:
        stop(f"--benchmark {cfg.benchmark} needs --data: a folder with its files as published")
    exam = EXAMS[cfg.benchmark] | {"grey": cfg.pictures == "blank"}
    exam["max_new_tokens"] = cfg.max_new_tokens or exam["max_new_tokens"]
    least = min(cfg.batch, exam["max_new_tokens"], cfg.per_task + 1)
    if least < 1 or not 0 <= cfg.temperature < math.inf:
        stop("--batch must be at least 1, all other counts and --temperature at least 0")
    shard = re.fullmatch(r"(\d+)/(\d+)", cfg.shard)
    if not shard or int(shard[1]) >= int(shard[2]):
        stop(f"--shard {cfg.shard}: want i/n with 0 <= i < n, for example 0/4")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun
    shard = f"{int(shard[1]) * world + rank}/{int(shard[2]) * world}"
    if cfg.coupled_stated > bool(cfg.coupled) or (cfg.coupled and shard != "0/1"):
        stop("--coupled_stated needs --coupled TEACHER; --coupled goes without shards")
    if exam.get("video") and not cfg.answers + cfg.questions_out:
        stop(f"{cfg.benchmark} is for engines that read videos: --questions_out, --answers")
    name = Path(cfg.answers).stem if cfg.answers else Path(cfg.checkpoint).name
    parts = [re.sub(r"^\d+_", "", name), cfg.benchmark, *cfg.coupled.split()[:1]]
    parts.append("stated" * cfg.coupled_stated)
    tag = cfg.tag or "-".join(part for part in parts if part not in ("", "heldout"))
    if not re.fullmatch(r"\w[\w.-]*", tag):
        stop(f"the tag {tag!r} is no folder name: choose another --tag")
    return replace(cfg, tag=tag, shard=shard, max_new_tokens=exam["max_new_tokens"]), exam


def read_asked(cfg: Config, exam: dict, skipped: dict) -> tuple[list[dict], Path]:
    """The questions to ask, and the root of their pictures."""
    run = Path(cfg.run)
    if cfg.benchmark == "heldout":
        path = existing(run, cfg.questions)
        inside = path.resolve().is_relative_to(run.resolve())
        root = Path(cfg.data_root or (run if inside else path.parent))
        questions = list(read_heldout(path, root, skipped))
    else:
        reader, root = READERS[cfg.benchmark.split("-")[0]], run.resolve()
        path = find_file(Path(cfg.data), exam["file"])
        exam["data_sha256"] = hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
        questions = list(reader(exam, path, root, skipped))
    questions = choose(questions, cfg.tasks, cfg.per_task)
    if not questions:
        tell(skipped)
        stop("there is no question that can be asked: see the lines above, and --tasks")
    return questions, root


def tell(skipped: dict[str, list[str]]):
    """One line per kind of fault, with its first case; results.json has them all."""
    for kind, cases in skipped.items():
        if cases:
            print(f"{len(cases)} questions skipped, {kind}: first {cases[0]}", file=sys.stderr)


def load_for(cfg: Config, exam: dict) -> Student:
    """The student. An exam may have small pictures enlarged, as far as its own limit lets."""
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)  # Triton launches there
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else dtype
    dtype = dtype if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    source = str(existing(Path(cfg.run), cfg.checkpoint))
    student = load_student(source, dtype, device, "world2vlm", exam["max_pixels"])
    size = student.image_processor.size
    least = max(size["shortest_edge"], exam.get("min_pixels", 0))
    student.image_processor.size = size | {"shortest_edge": min(least, size["longest_edge"])}
    return student


def main(cfg: Config):
    """Read the questions, ask them (or read what others answered), grade, write the report."""
    if cfg.compare:
        return compare_two(cfg)
    started = time.perf_counter()
    run, skipped = Path(cfg.run), defaultdict(list)
    cfg, exam = settle(cfg)
    folder, checkpoint = run / "6_eval" / cfg.tag, existing(run, cfg.checkpoint)
    if not (checkpoint.is_dir() or "/" in cfg.checkpoint or cfg.answers or cfg.questions_out):
        stop(f"{run / cfg.checkpoint} is missing: run the stage that writes it, or name another")
    tags = [tag for tag in cfg.beside if tag != cfg.tag]
    beside = [json.loads((run / "6_eval" / tag / "results.json").read_text()) for tag in tags]
    questions, root = read_asked(cfg, exam, skipped)
    if cfg.questions_out:
        tell(skipped)
        return write_questions(questions, Path(cfg.questions_out), "video" in exam, cfg)
    keys = ("number", "question", "truth", "images")
    asked = digest(exam, [[question[key] for key in keys] for question in questions]).hex()
    # what may differ when an evaluation goes on or is shown again
    free = ("recipe", "run", "tag", "beside", "data", "shard", "batch", "questions_out")
    decides = {key: value for key, value in asdict(cfg).items() if key not in free}
    decides["asked_sha256"] = asked
    parent = checkpoint if (checkpoint / "meta.json").is_file() and not cfg.answers else None
    try:
        with alone(folder):
            meta = begin(folder, decides, parent, f"_{cfg.shard.replace('/', '_of_')}")
    except SystemExit as ended:
        if ended.code == 0:  # finished: shown again, perhaps beside others than last time
            show([*beside, json.loads((folder / "results.json").read_text())], folder)
        raise
    # the student is loaded when the first question is asked
    load, counts = functools.cache(lambda: load_for(cfg, exam)), {}
    if cfg.coupled:
        prepare = restate if cfg.coupled_stated else search_views
        questions, counts = prepare(questions, load, folder, root, cfg)
    if cfg.answers:
        records = read_answers(questions, existing(run, cfg.answers), skipped)
    else:
        records = ask_all(questions, load, folder, cfg)
    with alone(folder):  # the shard that ends last finds all answers
        if missing := sum(question["number"] not in records for question in questions):
            return print(f"shard {cfg.shard} is done, {missing} answers of others are missing")
        if read_meta(folder)["finished"]:
            return print(f"{folder} was completed by another shard")
        samples = [record for _, record in sorted(records.items()) if "fault" not in record]
        for fault in [one["fault"] for one in records.values() if "fault" in one]:
            skipped[fault.split(":")[0]].append(fault)
        tell(skipped)
        if not samples:
            stop("no picture can be read: see the lines above")
        tasks = grade(samples, exam, cfg.seed)
        lost = {f"skipped, {kind}": len(cases) for kind, cases in skipped.items() if cases}
        counts |= lost | {"unparsable": tasks["all"]["unparsable"]}
        counts["cut off at --max_new_tokens"] = sum(one.get("cut_off", False) for one in samples)
        results = {"tag": cfg.tag, "config": decides, "protocol": exam, "counts": counts}
        results |= {"asked_sha256": asked, "questions": len(samples), "batch": cfg.batch}
        results |= {"skipped": sum(lost.values()), "faults": skipped}
        results["cost"] = total_cost([sample["cost"] for sample in samples], len(samples))
        results |= {"right": tasks["all"]["metrics"]["right"], "tasks": tasks}
        save(folder / "results.json", json.dumps(results, indent=1))
        others = {tag: [*logged(run / "6_eval" / tag).values()] for tag in tags}
        report([*beside, results], samples, others, root, folder)
        save(folder / "samples.jsonl", "".join(json.dumps(one) + "\n" for one in samples))
        for part in folder.glob("samples.*of*.jsonl"):
            part.unlink()
        made = {"questions": len(samples), "skipped": results["skipped"]}
        finish(folder, meta, made, started)
    show([*beside, results], folder)


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
