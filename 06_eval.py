"""Examine a student on questions about rooms that no training file holds.

Every question is asked twice: with its pictures, and with grey pictures of the same size, which shows what language alone can
guess. Beside both stands the best constant answer: of the 50 most frequent answers in the training questions, for each score the
one that does best on this exam (a control that knows the exam). A score is the mean over questions; its 95 % interval comes from a
bootstrap over scenes, since the questions of one room share its pictures:

    score = mean_i s(answer_i, truth_i),   interval = 2.5 % and 97.5 % quantiles of the same mean over 1,000 draws of whole scenes

Scores: A1 A2 direction right (share) and the error: in A1 the distance between the two displacements in the plane, in A2 the
difference of the signed angles (left 30 instead of right 40 is 70 degrees off); A3 D3 names and values exactly right; D1 S1
intersection over union; A4 D2 D4 S2 share right; S3 error in meters; S4 error in degrees around the circle; and the reward of
stage 5 for every task. A response that is not one answer (or is longer than 200 characters) scores 0, its error is that of the
worst answer which the questions of its task hold, and it is counted as unparsable. D1 also shows the score of repeating the box
of the first picture.

Reads   RUN/3_qa/heldout.jsonl, or any file of the same format (--questions):
        {"task_type": "A2", "messages": [{"role": "user", "content": "<image><image>Which way and how far did the camera turn?"},
         {"role": "assistant", "content": "turn right 30 degrees"}], "images": ["2_views/room_00007/t001/000.png", ...],
         "scene_id": "room_00007", ...}
        and a checkpoint folder with the weights and the processor.
Writes  RUN/6_eval/TAG/results.json   every score with its interval and controls
        RUN/6_eval/TAG/samples.jsonl  {"number": 12, "task_type": "A2", "scene_id": "room_00007", "images": [...], "question": "...",
            "truth": "turn right 30 degrees", "response": "turn right 20 degrees", "blank_response": "turn left 60 degrees",
            "scores": {"answered": true, "direction": 1.0, "error_deg": 10.0, "reward": 0.968}, "blank_scores": {...}}
        RUN/6_eval/TAG/report.html    one file with plots and example pictures, for any browser
        RUN/6_eval/TAG/meta.json      settings, counts, versions, and the checkpoint's own meta

    python 06_eval.py --run runs/demo --checkpoint 5_refine --beside base sft
"""
import argparse
import base64
import hashlib
import html
import io
import json
import math
import os
import re
import resource
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, HfArgumentParser
from transformers.cache_utils import DynamicLayer

from kernels import register, windows_in_one_launch


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

@dataclass
class Config:
    run: str = setting("runs/demo", "folder of the run; picture paths in the questions are relative to it")
    checkpoint: str = setting("5_refine", "student to examine: a folder in the run, any other folder, or a hub id")
    tag: str = setting("", "name of the folder under 6_eval; empty: the checkpoint's name without its stage number")
    questions: str = setting("3_qa/heldout.jsonl", "a file in the run, or any ms-swift / LLaMA-Factory / World2VLM JSONL file")
    data_root: str = setting("", "folder that picture paths start from and may not leave; empty: the run, or the folder of a "
                             "file outside it")
    train: list[str] = setting(["3_qa/sft.jsonl", "3_qa/static.jsonl"], "questions whose answers are the constants to beat")
    beside: list[str] = setting([], "tags of finished exams to show in the same table, in this order, before this one")
    tasks: list[str] = setting([], "tasks to ask, such as A1 D1; empty: all that the questions hold")
    per_task: int = setting(0, "questions a task at most, the first by hash so that the choice never moves; 0: all")
    blank: bool = setting(True, "ask every question again with grey pictures; doubles the time")
    batch: int = setting(64, "questions answered at a time; lower it when memory runs out")
    max_new_tokens: int = setting(64, "tokens an answer at most; the longest right answer has about 40 in Qwen's vocabulary")
    max_pixels: int = setting(1003520, "pixels a picture at most, larger ones are shrunk; the paper's setting")
    seed: int = setting(0, "seed of the bootstrap; the answers are greedy and need none")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    dtype: str = setting("auto", "arithmetic: bfloat16, float32, or auto (bfloat16 on a GPU that has it, float32 on a CPU)")
    attention: str = setting("world2vlm", "world2vlm (kernels/; plain torch on a CPU), or one of transformers: sdpa, eager")


CONSTANTS = 50  # most frequent training answers a task that are tried as constant answer
LONGEST_QUESTION = 20_000  # characters; a longer one is no question, and would fill the memory of the whole batch
# Scores a task besides its reward, the main one first. Errors are better when lower, all others when higher.
METRICS = {"A1": ["direction", "error_m"], "A2": ["direction", "error_deg"], "A3": ["exact"], "A4": ["accuracy"],
           "D1": ["iou"], "D2": ["accuracy"], "D3": ["exact"], "D4": ["accuracy"],
           "S1": ["iou"], "S2": ["accuracy"], "S3": ["error_m"], "S4": ["error_deg"]}
WORDS = {"direction": "direction", "error_m": "error (m)", "error_deg": "error (deg)", "exact": "exact", "accuracy": "accuracy",
         "iou": "IoU", "reward": "reward"}


# --- same in 05, 06: the answer grammar and the reward ---
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
ACTION = re.compile(rf"\b(?:move\s+(forward|backward|left|right)\s+({NUMBER})\s*meters{{0,2}}"
                    rf"|turn\s+(left|right)\s+({NUMBER})\s*degrees{{0,2}})\b", re.I)
BOX = re.compile(r"(?:bbox\s*)?\[" + ",".join([rf"\s*(-?{NUMBER})\s*"] * 4) + r"\]", re.I)
# What may not stand beside an answer: digits, and words of a second or a withdrawn answer. Any other text is harmless.
SECOND_ANSWER = re.compile(r"\d|°|move|turn|forward|back|left|right|met(?:er|re)|deg|\b(?:or|not|never|no|yes)\b|n['’]t", re.I)
LIST_MARK = re.compile(r"\A[\s\"'*<>-]*1[.)]\s")  # "1. move ...": one answer written as a list
YES_NO = {"yes": True, "true": True, "no": False, "false": False}
SHAPE = {"A1": "one action", "A2": "one action", "A3": "actions", "D3": "actions", "D1": "box", "S1": "box",
         "A4": "yes or no", "D2": "yes or no", "D4": "yes or no", "S2": "yes or no", "S3": "meters", "S4": "degrees"}


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
    A3 D3     sequence_reward        D1 S1  box_reward
    A4 D2 D4 S2  0.20 format + 0.80 accuracy               (yes = true, no = false)
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


# --- same in 05, 06: generation ---
class Roomy(DynamicLayer):
    """A copy of `rows` of one layer's keys and values in tensors with room for `room` tokens more. A step writes its own keys into place;
    a dynamic cache would copy all keys at every step. What lies behind the last written key is never shown to anybody."""

    def __init__(self, layer, rows: torch.Tensor, room: int):
        super().__init__()
        self.written = layer.keys.shape[-2]
        self.storage = [torch.cat([x[rows], x.new_zeros(len(rows), x.shape[1], room, x.shape[3])], 2) for x in (layer.keys, layer.values)]
        self.keys, self.values = (x[:, :, :self.written] for x in self.storage)                         # [rows, H, T, D], views
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True

    def update(self, keys, values, *args, **kwargs):
        start, self.written = self.written, self.written + keys.shape[-2]
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
    head_of = {b: (row, n) for row, (members, n) in enumerate(heads) for b in members}
    firsts = [(prompts[members[0]], n) for members, n in heads]
    ids, mask, positions = left_padded([{"ids": first["ids"][:n], "positions": first["positions"][:, :n]} for first, n in firsts],
                                       tokenizer.pad_token_id)
    out = model(input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device), use_cache=True, logits_to_keep=1,
                pixel_values=torch.cat([first["pixels"] for first, _ in firsts]).to(device),
                image_grid_thw=torch.cat([first["grids"] for first, _ in firsts]).to(device))
    # From here on B = prompts x samples rows.
    rows = torch.tensor([head_of[b][0] for b in range(len(prompts))]).repeat_interleave(samples)
    tails = [{"ids": prompt["ids"][head_of[b][1]:], "positions": prompt["positions"][:, head_of[b][1]:]} for b, prompt in enumerate(prompts)]
    ids, tail_mask, positions = (x.repeat_interleave(samples, -2) for x in left_padded(tails, tokenizer.pad_token_id))
    mask, logits, cache = torch.cat([mask[rows], tail_mask], 1).to(device), out.logits[rows.to(device), -1], out.past_key_values
    cache.layers = [Roomy(layer, rows.to(device), ids.shape[1] + max_new_tokens) for layer in cache.layers]
    if ids.shape[1]:
        logits = model(input_ids=ids.to(device), attention_mask=mask, position_ids=positions.to(device), past_key_values=cache, use_cache=True,
                       logits_to_keep=1).logits[:, -1]                                                  # [B, V]
    position = torch.tensor([int(prompt["positions"].max()) + 1 for prompt in prompts]).repeat_interleave(samples).to(device)
    banned = torch.tensor([config.image_token_id, config.video_token_id, config.vision_start_token_id], device=device)
    done, tokens = torch.zeros(len(rows), dtype=torch.bool, device=device), []
    while True:                                                                                         # `position`: the next token's, in all three streams
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

def examinable(path: Path, root: Path, tasks: list[str]) -> tuple[list[dict], Counter]:
    """Questions in file order and the number of skipped ones a task ("?" where it is unknown); each gets one line on stderr.

    A question: {"number" (among those that load), "task", "text" (user text), "truth", "images" (below root), "scene", "record"}.
    """
    questions, skipped = [], Counter()
    with path.open("rb") as lines:
        total = len(lines.read().splitlines())
    records = read_questions(path, root)
    skipped["?"] = total - len(records)  # read_questions has named these
    for number, record in enumerate(records, 1):
        task, *turns = record["task_type"], *record["messages"]
        text, truth, fault = "\n".join(turn["content"] for turn in turns[:-1]), turns[-1]["content"].strip(), ""
        if not isinstance(task, str) or task not in METRICS:
            fault, task = f"unknown task {str(task)[:20]!r}: known are {' '.join(METRICS)}", "?"
        elif tasks and task not in tasks:
            continue
        elif reward(task, truth, truth)["overall"] < 1 - 1e-9:
            fault = f"the answer {truth[:60]!r} is outside the grammar of {task}"
        elif len(text) > LONGEST_QUESTION:
            fault = f"its text has {len(text)} characters, more than {LONGEST_QUESTION}"
        if fault:
            print(f"{path}: question {number} skipped: {fault}", file=sys.stderr)
            skipped[task] += 1
            continue
        images = [Path(image).relative_to(root.resolve()).as_posix() for image in record["images"]]
        questions.append({"number": number, "task": task, "text": text, "truth": truth, "images": images,
                          "scene": str(record.get("scene_id", f"question {number}")), "record": record})
    return questions, skipped


def by_hash(*key) -> bytes:
    """An order that has nothing to do with the content, and is the same in every run."""
    return hashlib.sha256(repr(key).encode()).digest()


def choose(questions: list[dict], per_task: int) -> list[dict]:
    """At most `per_task` questions of each task (0: all), the first by hash, in file order."""
    if not per_task:
        return questions
    kept = []
    for task in METRICS:
        own = [q for q in questions if q["task"] == task]
        kept += sorted(own, key=lambda q: by_hash(q["task"], q["text"], q["images"], q["number"]))[:per_task]
    return sorted(kept, key=lambda q: q["number"])


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


# ----------------------------------------------------------------------------------------------- table and report

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
    blank = last["blank_mean_reward"]
    rows.append(["all", "mean reward", str(last["questions"]), "", figure(blank and blank["mean"], "reward")]
                + [figure(exam["mean_reward"], "reward") for exam in exams])
    rows.append(["all", "unparsable", "", "", ""] + [str(exam["unparsable"]) for exam in exams])
    rows.append(["all", "skipped", "", "", ""] + [str(exam["skipped"]) for exam in exams])
    return rows


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows)


def visible(text, most: int = 300) -> str:
    """Text from a model or a file for HTML: shortened, without control and direction marks, escaped."""
    text = str(text)
    short = text[:most] + (f" … ({len(text):,} characters)" if len(text) > most else "")
    return html.escape("".join(c if c.isprintable() else " " if c.isspace() else f"\\u{ord(c):04x}" for c in short))


COLOURS = {"student": "#2b6cb0", "blank": "#a0aec0", "constant": "#dda94f"}


def bars(tasks: dict, wanted: list[tuple[str, str]], top: float) -> str:
    """An SVG of horizontal bars 0..top: student with its interval, grey pictures, constant, for each (task, metric)."""
    parts, y, x0, span = [], 8, 112, 380
    for task, metric in wanted:
        values = tasks[task]["metrics"][metric]
        parts.append(f'<text x="0" y="{y + 12}" font-weight="bold">{task}</text>'
                     f'<text x="0" y="{y + 28}">{WORDS[metric].split(" (")[0]}</text>')
        for name, value in (("student", values), ("blank", values.get("blank")), ("constant", values["constant"])):
            if value is not None:
                width = span * min(1.0, value["mean"] / top)
                parts.append(f'<rect fill="{COLOURS[name]}" x="{x0}" y="{y}" width="{width:.1f}" height="11"/>'
                             f'<text x="{x0 + span + 10}" y="{y + 10}">{figure(value["mean"], metric)}</text>')
            if value is not None and value.get("low") is not None and name == "student":
                low, high = (x0 + span * min(1.0, max(0.0, value[end] / top)) for end in ("low", "high"))
                parts.append(f'<path fill="none" stroke="black" stroke-width="1.5" d="M{low:.1f} {y + 5.5}H{high:.1f}'
                             f'M{low:.1f} {y + 2}v7M{high:.1f} {y + 2}v7"/>')
            y += 13
        y += 9
    grid = "".join(f'<path stroke="#ddd" d="M{x0 + span * i / 4} 0V{y}"/>'
                   f'<text x="{x0 + span * i / 4}" y="{y + 12}" text-anchor="middle">{top * i / 4:g}</text>' for i in range(5))
    return f'<svg viewBox="0 0 545 {y + 18}" font-size="11" font-family="sans-serif">{grid}{"".join(parts)}</svg>'


def picture_html(picture: Image.Image, boxes: list[tuple[list[float], str]]) -> str:
    """An <img> with the picture inside the page, 320 pixels at most, and boxes in 0..1000 drawn on it."""
    scale = 320 / max(picture.size)
    small = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.NEAREST if scale > 1 else Image.LANCZOS)
    draw = ImageDraw.Draw(small)
    for box, colour in boxes:
        x1, y1, x2, y2 = sides(box)
        draw.rectangle([x1 / 1000 * small.width, y1 / 1000 * small.height, x2 / 1000 * small.width, y2 / 1000 * small.height],
                       outline=colour, width=3)
    file = io.BytesIO()
    small.save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def is_right(sample: dict) -> bool:
    """Whether an example counts as correct: the main score at least one half; for S3 and S4 a reward of at least 0.95."""
    main = METRICS[sample["task_type"]][0]
    return sample["scores"]["reward"] >= 0.95 if main.startswith("error") else sample["scores"][main] >= 0.5


def example_html(sample: dict, root: Path) -> str:
    """A card: pictures with boxes (first box orange, truth green, answer red), question, truth, answer."""
    pictures, task = [Image.open(root / image).convert("RGB") for image in sample["images"][:8]], sample["task_type"]
    boxes = [[] for _ in pictures]
    for i, found in enumerate(BOX.finditer(sample["question"])):  # the boxes that the question names, in picture order
        boxes[min(i, len(boxes) - 1)].append(([float(number) for number in found.groups()], "orange"))
    if SHAPE[task] == "box":
        boxes[-1].append((parse_box(sample["truth"])[0], "lime"))
        if said := parse_box(sample["response"]):
            boxes[-1].append((said[0], "red"))
    right = is_right(sample)
    scores = ", ".join(f"{WORDS[metric]} {figure(sample['scores'][metric], metric)}" for metric in METRICS[task] + ["reward"])
    return (f'<div class="card {"right" if right else "wrong"}"><b>{task} {"correct" if right else "wrong"}</b> '
            f'<small>{visible(sample["scene_id"], 40)}, question {sample["number"]}</small>'
            f'<div>{"".join(picture_html(*pair) for pair in zip(pictures, boxes))}</div>'
            f'<p>{visible(sample["question"].replace("<image>", ""))}</p>'
            f'<p>true: <bdi>{visible(sample["truth"])}</bdi><br>said: <bdi>{visible(sample["response"])}</bdi></p>'
            f'<small>{scores}</small></div>')


STYLE = """body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;max-width:60em;padding:1em;color:#222;background:#fff}
table{border-collapse:collapse;font-size:14px}td,th{padding:.2em .6em;text-align:right;white-space:nowrap}
td{border-top:1px solid #ddd}td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}.wide{overflow-x:auto}
svg{width:100%;max-width:40em}small{color:#555}h2{margin-top:1.5em}.key span{white-space:nowrap;margin-right:1em}.key b{font-size:1.3em}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(17em,1fr));gap:1em}
.card{border:1px solid #ddd;border-left:5px solid #38a169;padding:.6em;overflow-wrap:anywhere}.wrong{border-left-color:#e53e3e}
.card img{width:45%;max-width:11em;margin:.3em .3em 0 0;image-rendering:pixelated}.card p{margin:.6em 0}"""


def report_html(results: dict, rows: list[list[str]], samples: list[dict], root: Path) -> str:
    """The whole report as one page without scripts or outside files."""
    tasks = {task: result for task, result in results["tasks"].items() if result["metrics"]}
    shares = [(task, "reward" if METRICS[task][0].startswith("error") else METRICS[task][0]) for task in tasks]
    errors = [(task, metric) for task in tasks for metric in METRICS[task] if metric.startswith("error")]
    charts = bars(results["tasks"], shares, 1.0)
    for unit, metric in (("meters", "error_m"), ("degrees", "error_deg")):
        wanted = [pair for pair in errors if pair[1] == metric]
        if wanted:
            groups = [tasks[task]["metrics"][metric] for task, _ in wanted]
            shown = [value for group in groups for value in (group, group.get("blank"), group["constant"]) if value]
            top = max([value["mean"] for value in shown] + [1e-9])
            step = 10 ** math.floor(math.log10(top))
            charts += f"<h3>Error in {unit} (lower is better)</h3>" + bars(results["tasks"], wanted, math.ceil(top / step) * step)
    cards = []
    for task in tasks:
        own = sorted((sample for sample in samples if sample["task_type"] == task), key=lambda s: by_hash(s["question"], s["number"]))
        for right in (True, False):
            cards += [example_html(sample, root) for sample in [s for s in own if is_right(s) == right][:2]]
    head, *lines = rows
    table = "<tr>" + "".join(f"<th>{visible(cell)}</th>" for cell in head) + "</tr>"
    table += "".join("<tr>" + "".join(f"<td>{visible(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    names = {"student": "student, 95 % interval", "blank": "grey pictures", "constant": "best constant answer"}
    key = " ".join(f'<span><b style="color:{COLOURS[name]}">&#9632;</b> {text}</span>' for name, text in names.items())
    return f"""<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>Exam of {visible(results["tag"])}</title><style>{STYLE}</style>
<h1>Exam of {visible(results["tag"])}</h1>
<p>Checkpoint {visible(results["checkpoint"])}, {results["questions"]} questions of {visible(results["questions_file"])},
{results["skipped"]} skipped. The constant answer is chosen for every score anew, from the {CONSTANTS} most frequent training
answers, with the exam in hand.</p>
<h2>Scores</h2><p class="key">{key}</p>{charts}
<h2>Table</h2><div class="wide"><table>{table}</table></div>
<h2>Examples</h2><p>Boxes: orange as named in the question, green true, red answered.</p>
<div class="cards">{"".join(cards)}</div></html>
"""


# ----------------------------------------------------------------------------------------------- the exam

def prepare(student: Student, batch: list[dict], blank: bool) -> list[dict | str]:
    """For each question its prompt, as `generate` takes it, or the reason why there is none."""
    seen, prompts = {}, []
    for question in batch:
        paths = tuple(question["record"]["images"])
        try:
            if paths not in seen:  # neighbours in a batch ask about the same pictures
                seen[paths] = look(student, list(paths), blank)
            pixels, grids = seen[paths]
            whole = encode(student, question["record"], grids)
            prompts.append({"ids": whole["ids"][:whole["prompt"]], "positions": whole["positions"][:, :whole["prompt"]],
                            "pixels": pixels, "grids": grids})
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's ways to say: no picture
            prompts.append(f"{', '.join(paths)[-100:]}: {str(error)[:200]}")
    return prompts


def answer(student: Student, prompts: list[dict], max_new_tokens: int) -> list[str]:
    """The greedy responses."""
    tokens = generate(student, prompts, max_new_tokens)
    return [student.tokenizer.decode(sampled[0], skip_special_tokens=True).strip() for sampled in tokens]


def ask(student: Student, batch: list[dict], cfg: Config) -> dict:
    """What is kept of one batch: {"responses", "blank_responses", "faults"}; None for a question that can't be asked."""
    part = {"responses": [None] * len(batch), "blank_responses": [None] * len(batch), "faults": [None] * len(batch)}
    for key, blank in (("responses", False), ("blank_responses", True))[:1 + cfg.blank]:
        prompts = prepare(student, batch, blank)
        part["faults"] = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        good = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        for i, response in zip(good, answer(student, [prompts[i] for i in good], cfg.max_new_tokens) if good else []):
            part[key][i] = response
    return part


def show(exams: list[dict], folder: Path):
    """The last lines of the output: the table and the path of the report."""
    for exam in exams[:-1]:
        if exam["questions_sha256"] != exams[-1]["questions_sha256"] or exam["asked_sha256"] != exams[-1]["asked_sha256"]:
            print(f"note: {exam['tag']} was examined on other questions than {exams[-1]['tag']}")
    print(aligned(compare(exams)))
    print(f"report: {folder / 'report.html'}")


def main(cfg: Config):
    started, run = time.time(), Path(cfg.run)
    checkpoint = next((path for path in (run / cfg.checkpoint, Path(cfg.checkpoint)) if path.is_dir()), None)
    if checkpoint is None and "/" not in cfg.checkpoint:  # a hub id has an owner
        stop(f"{run / cfg.checkpoint} is missing: run the stage that writes it, or name another checkpoint")
    tag = cfg.tag or re.sub(r"^\d+_", "", Path(cfg.checkpoint).name)
    if not re.fullmatch(r"\w[\w.-]*", tag):
        stop(f"the tag {tag!r} is no folder name: choose another --tag")
    if unknown := set(cfg.tasks) - set(METRICS):
        stop(f"unknown tasks {' '.join(sorted(unknown))}: known are {' '.join(METRICS)}")
    if min(cfg.batch, cfg.max_new_tokens, cfg.max_pixels) < 1 or cfg.per_task < 0:
        stop("--batch, --max_new_tokens and --max_pixels must be at least 1, --per_task at least 0")
    folder, path = run / "6_eval" / tag, next((p for p in (run / cfg.questions, Path(cfg.questions)) if p.is_file()), None)
    if path is None:
        stop(f"{run / cfg.questions} is missing: run 03_build_qa.py first, or name another file with --questions")
    root = Path(cfg.data_root) if cfg.data_root else run if path.resolve().is_relative_to(run.resolve()) else path.parent
    beside = []
    for other in cfg.beside:
        if other != tag and not (run / "6_eval" / other / "results.json").is_file():
            stop(f"{run / '6_eval' / other / 'results.json'} is missing: examine {other} first, or leave it out of --beside")
        if other != tag:
            beside.append(json.loads((run / "6_eval" / other / "results.json").read_text()))

    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        stop(f"unknown --dtype {cfg.dtype}: float32, bfloat16 or auto")
    bfloat16 = device != "cpu" and torch.cuda.is_bf16_supported() if cfg.dtype == "auto" else cfg.dtype == "bfloat16"
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    decides = {key: value for key, value in asdict(cfg).items() if key not in ("run", "tag", "beside")}
    decides["questions_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    parent = checkpoint if checkpoint and (checkpoint / "meta.json").is_file() else None  # a bare base model has none
    try:
        meta = begin(folder, decides, parent)
    except SystemExit as ended:
        if ended.code == 0:  # a finished exam: nothing to do but to show it, perhaps beside others than last time
            show(beside + [json.loads((folder / "results.json").read_text())], folder)
        raise

    questions, skipped = examinable(path, root, cfg.tasks)
    questions = choose(questions, cfg.per_task)
    if not questions:
        stop(f"{path} holds no question that can be asked: see the lines above, and --tasks")
    # Questions with equally many pictures share a batch, so that little of it is padding; the same pictures come together.
    ordered = sorted(questions, key=lambda q: (len(q["images"]), q["images"], q["number"]))
    batches = [ordered[i:i + cfg.batch] for i in range(0, len(ordered), cfg.batch)]
    student, rounds, asked, asking_s = None, 1 + cfg.blank, 0, 0.0
    with tqdm(total=len(questions) * rounds, unit="answers", desc=f"6_eval/{tag}", smoothing=0.1) as progress:
        for number, batch in enumerate(batches):
            file = folder / "answers" / f"{number:05d}.json"
            if not file.is_file():
                if student is None:
                    student = load_student(str(checkpoint or cfg.checkpoint), dtype, device, cfg.attention, cfg.max_pixels)
                begun = time.time()
                save(file, json.dumps(ask(student, batch, cfg)))
                asked, asking_s = asked + len(batch) * rounds, asking_s + time.time() - begun
            progress.update(len(batch) * rounds)

    samples = []
    for number, batch in enumerate(batches):
        part = json.loads((folder / "answers" / f"{number:05d}.json").read_text())
        for question, response, blank, fault in zip(batch, part["responses"], part["blank_responses"], part["faults"]):
            if fault:
                print(f"{path}: question {question['number']} skipped: {fault}", file=sys.stderr)
                skipped[question["task"]] += 1
                continue
            samples.append({"number": question["number"], "task_type": question["task"], "scene_id": question["scene"],
                            "images": question["images"], "question": question["text"], "truth": question["truth"],
                            "response": response, "blank_response": blank})
    samples.sort(key=lambda sample: sample["number"])
    if not samples:
        stop(f"no picture of {path} can be read: see the lines above")
    train = [run / file if (run / file).is_file() else Path(file) for file in cfg.train]
    if missing := [str(file) for file in train if not file.is_file()]:
        print(f"no constant answers from {', '.join(missing)}: missing", file=sys.stderr)
    tasks = grade(samples, skipped, training_answers([file for file in train if file.is_file()]), cfg.seed)
    scenes = [sample["scene_id"] for sample in samples]
    means = {side: interval([sample[side]["reward"] for sample in samples], scenes, cfg.seed)
             for side in ("scores", "blank_scores") if side in samples[0]}
    results = {"tag": tag, "checkpoint": cfg.checkpoint, "questions_file": cfg.questions,
               "questions_sha256": decides["questions_sha256"],
               "asked_sha256": hashlib.sha256(repr([sample["number"] for sample in samples]).encode()).hexdigest(),
               "questions": len(samples), "skipped": sum(skipped.values()),
               "unparsable": sum(result["unparsable"] for result in tasks.values()),
               "mean_reward": means["scores"], "blank_mean_reward": means.get("blank_scores"), "tasks": tasks}
    save(folder / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    save(folder / "results.json", json.dumps(results, indent=1))
    save(folder / "report.html", report_html(results, compare(beside + [results]), samples, root))
    shutil.rmtree(folder / "answers")
    finish(folder, meta, {"answers": len(samples) * rounds, "skipped": sum(skipped.values())}, started)
    if asked:
        print(f"{asked} answers in {asking_s:.1f} s: {asked / asking_s:.0f} a second")
    show(beside + [results], folder)


if __name__ == "__main__":
    main(parse(Config))
