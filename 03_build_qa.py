"""Stage 3: turn imagined views into questions whose answers are known.

A trajectory knows its actions and a view knows its objects. So one pair of pictures (frame 0 and
the last) answers questions in both directions: inverse, from the outcome to the action (A1-A4, D3,
E1), and forward, from the action to the outcome (D1, D2, D4, E2, E3). S1-S3, S5 and S6 name no
motion; from them the tiny student learns what a VLM brings along. A task is a function and a line
of a table, see TASKS. E1-E3 and the lettered choices are what SAT, MindCube and VSI-Bench ask.

An answer is worth learning only if it is the one right answer. Two action sequences a and b are
the same question when

    pose(a) = pose(b),   pose(actions) = (x_m, z_m, yaw_deg mod 360) in the axes of frame 0,

so an answer of A1, A2, A3 or D3 must be the only sequence that reaches its pose: among all whose
turns and moves alternate, of the lengths in ONE_ANSWER, with moves of 0.1, 0.2, ... m and turns of
10, 20, ... degrees up to the largest of all views (125,000 for 2 m and 80 degrees). `turn right
90; move forward 1` ends where `move right 1; turn right 90` does, so neither is asked. Where views
turn by 90 degrees, every sequence of two steps has such a double of three, and A3 keeps only three.

Options of a choice tell nothing by themselves: each is as near to the others as the truth is (see
`four_motions`). What image 1 shows too little of, or what has holes, is not asked about; all that
is dropped is counted and printed.

Departures from the published code: no prompt contains its answer. The yes/no tasks have both
answers in equal numbers for each object label (A4: for each first action) and for each class of
what else the words tell (`alike` of a question), so neither gives the answer away. A D4 question
needs a second object of that label in the pictures.

Reads   RUN/2_views/views.jsonl, one trajectory per line (shortened here), and whether its frames
        are there:
            {"scene_id": "room_00000", "traj_id": "t000", "source": "simulated", "split": "train",
             "actions": [["turn_left", 40]], "keyframes": [0, 8], "kept": [0, 8], "start": [0.4,
             -1.2, 30], "c2w": [...], "teacher": "simulator", "qc": {"passed": true}, "frames":
             ["2_views/room_00000/t000/000.png", "2_views/room_00000/t000/008.png"], "objects":
             [[{"id": 3, "label": "red ball", "box": [412, 300, 530, 611], "distance_m": 2.4,
             "bearing_deg": -1.3}], []], "fov_x_deg": 90, "covisible": [[0, 8, 0.41]], "holes":
             [0.0, 0.0]}
Writes  RUN/3_qa/sft.jsonl (the tasks about motion), static.jsonl (S tasks), grpo.jsonl (a part of
        sft.jsonl: stage 5 refines on what stage 4 has seen), heldout.jsonl (all tasks, held-out
        scenes only, whatever --directions, --sources and --tasks train on). One line per question:
            {"task_type": "A2", "answer_type": "motion", "messages": [{"role": "user", "content":
             "<image><image>Which way and how far did the camera turn from image 1 to image 2?
             Answer: turn <direction> <number> degrees."}, {"role": "assistant", "content": "turn
             left 40 degrees"}], "images": ["2_views/room_00000/t000/000.png",
             "2_views/room_00000/t000/008.png"], "scene_id": "room_00000", "traj_id": "t000",
             "split": "train", "source": "simulated", "teacher": "simulator", "difficulty":
             "1 near"}
        of a choice with "answer_type": "choice", "options": ["turn left 40 degrees", ...]
        card.json (counts), examples.png (each task and form), meta.json

    python 03_build_qa.py --run runs/demo
    python 03_build_qa.py --run runs/demo --out 3_forward --directions forward
    python 03_build_qa.py --run runs/photos --detector FOLDER_OR_HUB_ID --detector_labels chair lamp
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import sys
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

RECIPES = {
    "paper": "",
    # 84 pixels show that false statements are false; half an object's show that it is there
    "tiny": "--formats open --box_step 10 --near_miss_m 0.8 --near_miss_deg 30 --grpo_per_task 2500"
    " --min_score 0.5 --caps A4=1 D1=1 D2=1 D3=1 D4=2 E1=0 E2=0 E3=0 S1=1 S2=0.6 S3=0.6 S5=1 S6=1",
    # of which base/ learns the static ones alone
    "base": "--box_step 10 --choice_share 0.3"
    " --caps D1=0.1 D2=0.1 D4=0.1 E1=0.1 E2=0.1 E3=0 S1=4 S2=0.5 S3=0.4 S5=4 S6=1",
}


@dataclass
class Config:
    recipe: Literal[*RECIPES] = HfArg(default="paper", help="of RECIPES; your own flags win")
    run: str = HfArg(default="runs/demo", help="run folder; reads RUN/2_views, writes RUN/OUT")
    out: str = HfArg(default="3_qa", help="folder of the questions, under RUN")
    seed: int = HfArg(default=0, help="of every draw, with scene, trajectory and task")
    directions: Literal["forward", "inverse", "both"] = HfArg(default="both", help="to train on")
    sources: Literal["real", "simulated", "both"] = HfArg(default="both", help="to train on")
    tasks: list[str] = HfArg(default_factory=lambda: sorted(TASKS), help="to train on")
    formats: list[str] = HfArg(
        default_factory=lambda: [*FORMATS],
        help="open: an answer in words or numbers; choice: a letter (E3 always); both of each",
    )
    choice_share: float = HfArg(default=1.0, help="of the questions to ask as a choice, 0..1")
    pairs: Literal["ends", "keyframes"] = HfArg(
        default="ends", help="frame 0 with the last, as in the paper, or every two kept keyframes"
    )
    least_covisible: float = HfArg(
        default=0.15, help="A1-A4, D3, E3: least share of image 2 that image 1 shows, where known"
    )
    max_holes: float = HfArg(default=0.05, help="largest share of a picture that is holes; 1: any")
    keep_unchecked: bool = HfArg(default=False, help="ask about moves that nothing could check")
    caps: list[str] = HfArg(
        default_factory=list,
        help="TASK=NUMBER: most questions per pair (S1-S3, E1: per picture), so that scenes full "
        "of objects do not rule the set; 0.2: one on a fifth of the pairs; not named: as in TASKS",
    )
    box_step: int = HfArg(default=1, help="grid of boxes, thousandths; 10: a token each in tiny")
    near_miss_m: float = HfArg(default=0.3, help="a false A4 ends at least so far off, metres ...")
    near_miss_deg: float = HfArg(default=20.0, help="... or is turned so far, degrees")
    grpo_per_task: int = HfArg(default=125, help="questions per task in grpo.jsonl (paper: 125)")
    detector: str = HfArg(
        default="", help="of objects, zero-shot or not: hub id or folder; for views without boxes"
    )
    detector_labels: list[str] = HfArg(default_factory=list, help="labels to keep; empty: all")
    min_score: float = HfArg(default=0.3, help="least score (see 02) of a box asked about: 0..1")


# --- actions and poses ---
MOVES = {"forward": 0, "shift_right": 90, "backward": 180, "shift_left": 270}  # degrees to heading
TURNS = {"turn_right": 1, "turn_left": -1}  # sign of the yaw
PHRASES = {
    "forward": "move forward {:g} meters",
    "backward": "move backward {:g} meters",
    "shift_left": "move left {:g} meters",
    "shift_right": "move right {:g} meters",
    "turn_left": "turn left {:g} degrees",
    "turn_right": "turn right {:g} degrees",
}
ONE_ANSWER = {"A1": (1,), "A2": (1,), "A3": (2, 3), "D3": (1, 2)}  # lengths asked for
STYLES = ("list", "list", "count", "order")  # of `say`, drawn for each question
# z + ix of 1 m towards each whole degree; rounded, so that 90 degrees give exactly i.
TOWARDS = np.round(np.exp(1j * np.radians(np.arange(360))), 15)


def say(actions, style="list"):
    """[("turn_left", 40), ("forward", 1.2)] -> "turn left 40 degrees; move forward 1.2 meters"; in
    other styles as other question sets write it: "2 steps | ...", "first ..., then ...".
    """
    text = "; ".join(PHRASES[name].format(value) for name, value in actions)
    if style == "count":
        return f"{len(actions)} step{'s' * (len(actions) > 1)} | {text}"
    if style == "order" and len(actions) > 1:
        return "first " + text.replace("; ", ", then ")
    return text


def write(answer, style="list"):
    """An answer as it stands in a question: words, a box or actions."""
    return say(answer, style) if isinstance(answer[0], tuple) else str(answer)


def pose(actions):
    """(z_m + i x_m, yaw_deg in 0..359) after the actions, in the axes of the first frame."""
    position, yaw = 0j, 0
    for name, value in actions:
        if name in TURNS:
            yaw = (yaw + TURNS[name] * round(value)) % 360
        else:
            position += value * TOWARDS[(yaw + MOVES[name]) % 360]
    return position, yaw


def pose_key(position, yaw):
    """One number per pose (arrays or scalars), rounded to 0.1 mm."""
    return np.rint(position * 1e4) + yaw % 360 * 1e8


def shared_poses(max_move_m, max_turn_deg, lengths):
    """Keys of the poses that two or more sequences reach, of all that alternate moves of 0.1,
    0.2, ... metres and turns of 10, 20, ... degrees up to the largest of each.
    """
    steps = np.arange(1, round(max_move_m * 10) + 1) / 10
    angles = np.arange(10, round(max_turn_deg) + 1, 10)
    move = np.outer(TOWARDS[[*MOVES.values()]], steps).ravel(), 0
    turn = 0, np.append(angles, -angles)
    keys = []
    for kinds, length in itertools.product(((move, turn), (turn, move)), lengths):
        position, yaw = np.zeros(1), np.zeros(1, int)
        for step, angle in (kinds * 2)[:length]:
            # every sequence so far [..., 1] goes on with every action [m]
            position, yaw = position[..., None], yaw[..., None]
            position = position + TOWARDS[yaw % 360] * step
            yaw = yaw + angle
        keys.append(pose_key(position, yaw).ravel())
    keys, times = np.unique(np.concatenate(keys), return_counts=True)
    return set(keys[times > 1].tolist())


# --- views ---
BROKEN = (ValueError, KeyError, TypeError, IndexError, OverflowError, OSError)
BORDER = 10  # thousandths of the side that a usable box stays clear of: nearer, it may be cut off
LEAST_AREA, LARGEST_AREA = 10_000, 600_000  # of 1e6: smaller is a few pixels, larger the picture
ORIGIN = ("scene_id", "traj_id", "split", "source", "teacher")  # copied from views to questions


class Seen(NamedTuple):  # an object that is fit for a question
    label: str
    box: list[int]  # as the questions write it
    distance_m: float  # along the floor to its centre; 0: unknown
    bearing_deg: float  # of its centre (unknown: its box's), + to the right of the camera's axis


class Picture(NamedTuple):  # a kept keyframe of a view, with its objects by id
    path: str
    usable: dict[int | str, Seen]
    visible: dict[int | str, str]  # labels of what is at least partly in the picture
    hidden: set[int | str]  # known to be out of sight
    counts: Counter  # of the visible labels
    holes: float  # share of the picture


def size(box):
    return box[2] - box[0], box[3] - box[1]


def see(path, entries, holes, fov_x_deg, cfg):
    """The Picture of a frame, its objects as views.jsonl or the tracker tell them."""
    usable, visible, hidden = {}, {}, set()
    for entry in entries:
        key = entry["id"]
        label = entry["label"]
        exact = entry["box"]
        if "<" in label:  # it would write marks of pictures into the questions
            raise ValueError(f"object {key} has the label {label!r}")
        if exact is None:
            hidden.add(key)
            continue
        if len(exact) != 4 or not 0 <= min(exact) <= max(exact) <= 1000:
            raise ValueError(f"object {key} has the box {exact}, not four of 0..1000")
        visible[key] = label
        box = [min(1000, int(value / cfg.box_step + 0.5) * cfg.box_step) for value in exact]
        clear = BORDER <= min(exact) <= max(exact) <= 1000 - BORDER
        sized = LEAST_AREA <= math.prod(size(exact)) <= LARGEST_AREA and min(size(box)) > 0
        if clear and sized and entry.get("score", 1) >= cfg.min_score:
            bearing_deg = float(entry.get("bearing_deg", bearing_of(exact, fov_x_deg)))
            usable[key] = Seen(label, box, float(entry.get("distance_m") or 0), bearing_deg)
    return Picture(path, usable, visible, hidden, Counter(visible.values()), float(holes))


def bearing_of(box, fov_x_deg):
    """Degrees from the camera's axis to the middle of a box, + to the right."""
    half = math.tan(math.radians(fov_x_deg) / 2)
    return math.degrees(math.atan(((box[0] + box[2]) / 1000 - 1) * half))


def validate(view, run):
    """Raise one of BROKEN, with the reason, where a record is not what stage 2 writes."""
    for name, value in view["actions"]:
        step, most = (10, 180) if name in TURNS else (0.1, 10)  # `most` bounds the enumeration
        off = abs(value - step * round(value / step))
        if name not in PHRASES or not 0 < value <= most or off > 1e-6:
            raise ValueError(f"action {name} {value} is not on the grid of 0.1 m, 10 degrees")
    if view["split"] not in ("train", "heldout") or view["source"] not in ("real", "simulated"):
        raise ValueError("the split is not train or heldout, or the source not real or simulated")
    keyframes = view["keyframes"]
    fit = len(keyframes) == len(view["actions"]) + 1 > 1
    if not fit or not {keyframes[0], keyframes[-1]} <= {*view["kept"]}:
        raise ValueError("actions, keyframes and kept do not fit together")
    for path in map(PurePosixPath, view["frames"]):
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{path} leaves the run folder")
        with open(run / path, "rb") as file:
            file.seek(-12, os.SEEK_END)
            if path.suffix == ".png" and b"IEND" not in file.read():
                raise ValueError(f"{path} is cut short")


def turn_to(box, fov_x_deg):
    """[the turn] that brings the middle of a box to the camera's axis; [] where it is too small."""
    deg = FACING_STEP * round(bearing_of(box, fov_x_deg) / FACING_STEP)
    return [("turn_right" if deg > 0 else "turn_left", abs(deg))] if deg else []


def slim(view, cfg, detect):
    """What the questions need of a record, with a Picture per keyframe (None: not kept)."""
    objects = view["objects"]
    if objects is None and detect:
        objects = track(view, [detect(Path(cfg.run, path)) for path in view["frames"]])
    kept, fov_x_deg = view["kept"], float(view["fov_x_deg"])
    objects = objects or [[]] * len(kept)
    holes = view["holes"] or [0] * len(kept)
    frames = zip(kept, view["frames"], objects, holes, strict=True)
    pictures = {index: see(*frame, fov_x_deg, cfg) for index, *frame in frames}
    start = [*map(float, view["start"] or [])]
    return {key: view[key] for key in (*ORIGIN, "keyframes")} | {
        "exact": view["objects"] is not None,
        "fov_x_deg": fov_x_deg,
        # frames 0 of the trajectories that share this are one picture
        "start": f"{view['scene_id']} {view['anchor']} {view['start_yaw_deg']} {start}",
        "actions": [tuple(action) for action in view["actions"]],
        "pictures": [pictures.get(index) for index in view["keyframes"]],
        "covisible": {(i, j): float(s) for i, j, s in view["covisible"] if s is not None},
    }


def load_views(cfg, detect):
    """The usable records of views.jsonl, and how many were skipped; each is named on stderr."""
    path = Path(cfg.run, "2_views/views.jsonl")
    views, skipped = [], Counter()
    names, split_of = set(), {}
    for number, view in tqdm(read_lines(path), desc="views", unit="trajectory"):
        try:
            validate(view, Path(cfg.run))
            name = f"{view['scene_id']}/{view['traj_id']}"
            if name in names:
                raise ValueError(f"a second record of {name}")
            names.add(name)
            if split_of.setdefault(view["scene_id"], view["split"]) != view["split"]:
                raise ValueError(f"the scene of {name} is in both splits: run 01 again")
            if not view["qc"]["passed"]:
                skipped["failed the quality check"] += 1  # stage 2 has reported it
            elif view["qc"].get("unchecked") and not cfg.keep_unchecked:
                skipped["moved unchecked, see --keep_unchecked"] += 1
            else:
                views.append(slim(view, cfg, detect))
        except BROKEN as error:
            skipped["broken or doubled record"] += 1
            why = f"{type(error).__name__} {error}; delete the line, or 2_views and run 02 again"
            print(f"{path}:{number}: skipped, {why}", file=sys.stderr)
    return views, skipped


# --- boxes for views without exact ones: a detector, then tracks ---
TRACKED = 2 / 3  # of min_score: fainter boxes still hold a track together
LEAST_IOU = 0.1  # of a box with where its track expects it
RIVAL = 0.7  # of the best score: a second candidate as good as this makes a track ambiguous


def load_detector(cfg):
    """A function: path of a picture -> its detections. Safetensors only, no remote code."""
    import torch
    import transformers

    name = cfg.detector
    wanted = cfg.detector_labels
    try:
        processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
        zero_shot = hasattr(processor, "post_process_grounded_object_detection")
        if zero_shot:
            auto = transformers.AutoModelForZeroShotObjectDetection
            post_process = processor.post_process_grounded_object_detection
        else:
            auto = transformers.AutoModelForObjectDetection
            post_process = processor.post_process_object_detection
        model = auto.from_pretrained(name, trust_remote_code=False, use_safetensors=True).eval()
    except (OSError, ValueError) as error:  # no such folder, no safetensors, not a detector
        stop(f"--detector {name}: {str(error).splitlines()[0]}")
    if zero_shot and not wanted:
        stop(f"--detector {name} is zero-shot: name what to look for with --detector_labels")
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.inference_mode()
    def detect(path):
        picture = open_picture(path)
        inputs = {"images": [picture]}
        after = {"threshold": TRACKED * cfg.min_score}
        if zero_shot:
            inputs["text"] = after["text_labels"] = [wanted]
        outputs = model(**processor(**inputs, return_tensors="pt").to(model.device))
        (found,) = post_process(outputs, target_sizes=[(1000, 1000)], **after)
        labels = found.get("text_labels") or map(
            model.config.id2label.get, found["labels"].tolist()
        )
        boxes = found["boxes"].round().clamp(0, 1000).int().tolist()
        detections = []
        for label, box, score in zip(labels, boxes, found["scores"].tolist(), strict=True):
            if min(size(box)) > 0 and (label in wanted or not wanted):
                detections.append({"label": label, "box": box, "score": round(score, 3)})
        return detections

    return detect


def open_picture(path):
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError) as error:  # SyntaxError: Pillow's name for a broken PNG
        stop(f"{path} is no whole picture ({error}): delete 2_views and run 02 again")


def iou(a, b):
    """Intersection over union of two boxes."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    both = math.prod(sides.clip(0))
    return both / (math.prod(size(a)) + math.prod(size(b)) - both or 1)


def turned(box, view, one, two):
    """Where a turn from frame `one` to `two` takes a box, even out of sight; None after a move."""
    a, b = np.array(view["c2w"], float)[[one, two]]
    if np.abs(a - b)[:3, 3].max() > 1e-3:
        return None
    half = math.tan(math.radians(view["fov_x_deg"]) / 2)
    x1, y1, x2, y2 = half * (np.array(box) / 500 - 1)
    corners = np.array([[x, y, 1] for x in (x1, x2) for y in (y1, y2)])
    corners = corners @ a[:3, :3].T @ b[:3, :3]
    depth = np.maximum(corners[:, 2:], 0.05)  # what comes to lie behind is far out
    places = 500 * (corners[:, :2] / depth / half + 1)
    return [*places.min(0), *places.max(0)]


def track(view, found):
    """Detections per kept frame -> objects per kept frame, with one id through the frames.

    A detection goes on the track of its label that expects it there: where a turn takes the last
    box, after a move anywhere. Where a track may want two boxes, or two tracks a box, the track
    ends: a missing object is cheap, a swapped one is a wrong label. A box that a turn carries
    wholly out of the picture is entered without a box: known to be gone, whereas an object merely
    not detected is unknown.
    """
    ids, objects = itertools.count(), []
    tracks = []  # the last detection of each, with its id and frame
    for frame, detections in zip(view["kept"], found, strict=True):
        here = [new | {"id": next(ids), "frame": frame} for new in detections]
        scores = np.zeros((len(tracks), len(here)))
        missed, gone = [], []
        for row, old in zip(scores, tracks, strict=True):
            expected = turned(old["box"], view, old["frame"], frame)
            for n, new in enumerate(here):
                if new["label"] == old["label"]:
                    row[n] = iou(expected, new["box"]) if expected else 1
            if expected and not iou(expected, [0, 0, 1000, 1000]):
                gone.append(old | {"box": None})
            if row.max(initial=0) < LEAST_IOU:  # perhaps it is detected in a later frame
                missed.append(old)
        for (t, n), score in np.ndenumerate(scores):
            rivals = scores > RIVAL * score  # and itself, in its row as in its column
            if score > LEAST_IOU and rivals[t].sum() + rivals[:, n].sum() == 2:
                here[n]["id"] = tracks[t]["id"]
        tracks = missed + here
        objects.append(gone + here)
    return objects


# --- what a question is about ---
class Question(NamedTuple):
    task: str
    words: str  # without the marks of the pictures and how to answer
    truth: str | list  # the answer in words, as actions or as a box
    images: list
    label: str  # within which yes and no are balanced: the object's; A4: the first action's
    alike: tuple  # and within classes of what else the words tell
    order: float  # 0..1: what is dropped or drawn goes by it, not by the order of the views
    difficulty: str  # of a pair: how many steps and how far, "2 far"
    view: dict
    options: tuple | list = ()  # of a lettered choice, in the order of the letters; one is `truth`

    @property
    def answer(self):
        return LETTERS[self.options.index(self.truth)] if self.options else write(self.truth)

    @property
    def prompt(self):
        words = "<image>" * len(self.images) + self.words
        for letter, option in zip(LETTERS, self.options, strict=False):
            words += f" {letter}. {option}"
        words += "." * bool(self.options)
        _, how = LETTER if self.options else TASKS[self.task].answer
        return f"{words} {how}" + BOXES * ("[" in words or how == BOX[1])


class Survey:
    """What the questions about one view must know of all views."""

    def __init__(self, cfg, views):
        self.cfg = cfg
        self.caps = read_caps(cfg.caps)
        self.dropped = Counter()  # reason -> candidates
        self.motions = defaultdict(list)
        # moves and turns of pairs that are asked about: others would tell what is false
        self.steps = defaultdict(list)
        self.facing = []  # turns that E1 may ask for
        self.labels = defaultdict(set)
        self.starts = defaultdict(list)  # views of each start, whose frames 0 are one picture
        largest = [0, 0]  # largest move and turn
        for view in sorted(views, key=lambda view: view["actions"]):  # in whatever order they come
            for picture in filter(None, view["pictures"]):
                self.labels[view["source"]].update(picture.counts)
                for one in picture.usable.values():
                    self.facing += turn_to(one.box, view["fov_x_deg"])
            length = len(view["actions"])
            pair = Shown(self, view, 0, length)
            for name, value in pair.actions:
                largest[name in TURNS] = max(value, largest[name in TURNS])
            if pair.share >= cfg.least_covisible:
                self.motions[length].append(pair.actions)
                for kind in {False, bool(pair.both)}:
                    for step in pair.actions:
                        self.steps[kind, length, step[0] in TURNS].append(step)
        for view in sorted(views, key=lambda view: view["traj_id"]):
            self.starts[view["start"]].append(view)
        self.facing.sort()
        self.shared = {task: shared_poses(*largest, ONE_ANSWER[task]) for task in ONE_ANSWER}

    def unique(self, task, actions):
        """Whether no other sequence that the task may answer with ends at the same pose."""
        turns = [name in TURNS for name, _ in actions]
        alternate = all(one != two for one, two in itertools.pairwise(turns))  # two moves commute
        return alternate and pose_key(*pose(actions)) not in self.shared[task]

    def only_answer(self, task, actions):
        """Whether the task may ask for these actions; counts those that are not unique."""
        fits = len(actions) in ONE_ANSWER[task]
        unique = self.unique(task, actions)
        if fits and not unique:
            self.dropped[f"{task}: not the only sequence to its pose"] += 1
        return fits and unique

    def differ(self, task, actions, others):
        """Whether two motions end so far apart that a picture tells one from the other."""
        (position, yaw), (position2, yaw2) = pose(actions), pose(others)
        off_deg = abs((yaw - yaw2 + 180) % 360 - 180)
        least_deg = 10 if task == "E1" else self.cfg.near_miss_deg
        return abs(position - position2) >= self.cfg.near_miss_m or off_deg >= least_deg


class Shown:
    """What a question shows: one picture of a view, or a pair with the actions between."""

    def __init__(self, survey, view, *keyframes):
        self.survey, self.view, self.keyframes = survey, view, keyframes
        self.before = view["pictures"][keyframes[0]]
        self.after = view["pictures"][keyframes[-1]]
        self.both = [key for key in self.before.usable if key in self.after.usable]
        self.actions = view["actions"][keyframes[0] : keyframes[-1]]
        ends = tuple(view["keyframes"][k] for k in keyframes)
        self.share = view["covisible"].get(ends, 1)  # of image 2 in image 1; 1: unknown
        self.holes = max(self.before.holes, self.after.holes)
        moved_m = sum(value for name, value in self.actions if name in MOVES)
        turned_deg = sum(value for name, value in self.actions if name in TURNS)
        far = "far" if moved_m > 1 or turned_deg > 40 else "near"
        self.difficulty = f"{len(self.actions)} {far}"

    def generator(self, *purpose):
        """Python's, because numpy's takes longer to seed than a question to write."""
        where = self.keyframes if self.actions else self.keyframes[0]
        key = self.survey.cfg.seed, self.view["scene_id"], self.view["traj_id"], where, *purpose
        return random.Random(hashlib.sha256(repr(key).encode()).digest())

    def words(self, key, key2=None):
        """What wordings may name of an object of image 1 and of one, or the same, of image 2."""
        one = self.before.usable[key]
        two = self.after.usable.get(key if key2 is None else key2)
        return {"label": one.label, "box": one.box, "box2": two and two.box}

    def named(self, draw, key):
        """The same, and what to call it: by its label alone (if that is unique, mostly), or box."""
        words = self.words(key)
        unique = self.before.counts[words["label"]] == 1 and draw.random() < 0.7
        name = "the {label}" if unique else "the {label} at {box}"
        return words | {"object": name.format(**words)}

    def question(self, task, draw, parts, truth, words, alike=(), pictures=2):
        """One wording of each of `parts`, with `words` filled in."""
        images = [self.view["pictures"][k].path for k in self.keyframes[:pictures]]
        words = {"label": "", "actions": self.actions} | words
        actions = say(words["actions"], draw.choice(STYLES))
        text = " ".join(map(draw.choice, parts)).format(**words | {"actions": actions})
        more = (words["label"], alike, draw.random(), self.difficulty, self.view)
        q = Question(task, text, truth, images, *more)
        if q.answer in text and task not in BALANCED:  # those name all their answers
            stop(f"a fault of {task}: the prompt holds its answer, {q.prompt}")
        return q

    def choice(self, q):
        """Yield the question with lettered options, unless too few differ."""
        draw = self.generator("choice", q.task, q.words)
        kind, _ = TASKS[q.task].answer
        if kind == "box":
            options = four_boxes(draw, self, q.truth, q.words)
        elif kind == "meters":
            options = four_lengths(draw, q.truth)
        elif isinstance(q.truth, list):
            options = four_motions(self.survey, draw, q.task, q.truth)
        else:
            options = next(group for group in ANSWERS if q.truth in group)
        if options:
            style, options = draw.choice(STYLES), some(draw, options)
            options = [write(option, style) for option in options]
            yield q._replace(options=options, truth=write(q.truth, style), order=draw.random())
        else:
            self.survey.dropped[f"{q.task} choice: too few options that differ"] += 1


def some(draw, things, most=math.inf):
    """At most so many of the things, in a random order."""
    return draw.sample(things, min(most, len(things)))


def mixed(draw, one, other, most):
    """At most `most` of two lists, one of each before two of a kind: balancing drops little."""
    sides = some(draw, [some(draw, one), some(draw, other)])
    turns = [side[i] for i in range(most) for side in sides if i < len(side)]
    return turns[:most]


# --- options of choices: none is nearer to the others than the rest, so that they tell nothing ---
TRIES = 20  # of drawing four options that differ
LEAST_APART = 0.3  # IoU: boxes that overlap more are not offered beside each other


def four_motions(survey, draw, task, truth):
    """Four motions, the truth first, that differ in two things: {a, a'} x {b, b'}, each a step's
    direction or magnitude, as in the data, or the order of the steps. None: too few differ.
    """
    parts = [part for action in truth for part in action]  # name, value, name, value ...
    spots = range(len(parts) + (len(truth) > 1))  # the last: the order
    for _ in range(TRIES):
        new, motions = {}, []
        for spot in draw.sample(spots, 2):
            step = truth[min(spot, len(parts) - 1) // 2]
            steps = survey.steps[task == "D3", len(truth), step[0] in TURNS]
            steps = survey.facing if task == "E1" else steps or [step]
            new[spot] = draw.choice(steps)[spot % 2]
        for taken in itertools.product(*([None, spot] for spot in new)):
            changed = [new[k] if k in taken else part for k, part in enumerate(parts)]
            motion = [*zip(changed[::2], changed[1::2], strict=True)]
            motions.append(motion[::-1] if len(parts) in taken else motion)
        unique = task not in ONE_ANSWER or all(survey.unique(task, one) for one in motions)
        if unique and all(survey.differ(task, *two) for two in itertools.combinations(motions, 2)):
            return motions
    return None


def four_boxes(draw, pair, true, words):
    """Boxes of objects of image 2, then of image 1, the right one first; where they are too few,
    two boxes and their mirror images. None: they overlap.
    """
    boxes = [true]
    for picture in (pair.after, pair.before):
        others = [one.box for one in picture.usable.values() if str(one.box) not in words]
        for box in some(draw, others):
            if all(iou(box, known) < LEAST_APART for known in boxes):
                boxes.append(box)
    if len(boxes) < 4:
        boxes = boxes[:2] + [[1000 - x2, y1, 1000 - x1, y2] for x1, y1, x2, y2 in boxes[:2]]
    overlap = max(iou(*two) for two in itertools.combinations(boxes[:4], 2))
    return boxes[:4] if len(boxes) > 3 and overlap < LEAST_APART else None


def four_lengths(draw, truth):
    """Four lengths, each 1.4 times the one before, of any of which the right one may be."""
    true_m = float(truth.split()[0])
    first = draw.randrange(-3, 1)
    options = [f"{round(true_m * 1.4**k, 1):g} meters" for k in range(first, first + 4)]
    return options if len({*options}) == 4 else None


# --- the tasks: a function yields at most `most` questions about the pair or picture shown ---
# draw: the generator of that task about that pair or picture.
# What several tasks say. A question has one wording of each of its lists.
SEEN = [
    "The {label} is at {box} in image 1.",
    "Look at the {label} at {box} in image 1.",
    "Image 1 has the {label} at {box}.",
]
SEEN_ALONE = [
    "The {label} is at {box}.",
    "Look at the {label} at {box}.",
    "In this picture the {label} is at {box}.",
]
DID = ["The camera then did this: {actions}.", "The camera got to image 2 like this: {actions}."]
WILL = [
    "The camera is about to do this: {actions}.",
    "Suppose the camera does this: {actions}.",
    "Next camera motion: {actions}.",
]


def ask_motion(pair, task, most, draw):
    """A1, A2, A3: which actions lead from image 1 to image 2?"""
    verb = {"A1": "move", "A2": "turn", "A3": ""}[task]
    one = [
        "Which way and how far did the camera {verb} from image 1 to image 2?",
        "The camera made one {verb} between image 1 and image 2. Which way, and how far?",
        "What single {verb} takes the camera from image 1 to image 2?",
        "Image 2 was taken after one {verb} from image 1. Name the {verb}.",
        "Image 1 comes before the {verb}, image 2 after it. What was the {verb}?",
        "By which {verb} did the camera get from image 1 to image 2?",
    ]
    several = [
        "The camera did 2 or 3 things in a row between image 1 and image 2.",
        "Image 2 was taken 2 or 3 actions after image 1.",
        "It took the camera 2 or 3 actions to get from image 1 to image 2.",
    ]
    parts = [one] if verb else [several, ["Which ones, in order?", "List them in order."]]
    if most and verb in say(pair.actions) and pair.survey.only_answer(task, pair.actions):
        yield pair.question(task, draw, parts, pair.actions, {"verb": verb})


def ask_statement(pair, task, most, draw):
    """A4: is a statement about the motion true? True and false by turns."""
    claims = [
        "From image 1 to image 2 the camera did this: {actions}.",
        "Claim: this takes the camera from image 1 to image 2: {actions}.",
        "Someone says how the camera got from image 1 to image 2: {actions}.",
    ]
    parts = [claims, ["True or false?", "Is that true or false?"]]
    for truth in (draw.sample([True, False], 2) * most)[:most]:
        actions = pair.actions if truth else false_statement(pair, draw)
        if actions:
            words = {"label": actions[0][0], "actions": actions}
            yield pair.question(task, draw, parts, str(truth).lower(), words)


def false_statement(pair, draw):
    """A near miss, or another motion of as many steps; its pose really differs. None: none found.

    Both are made of the data's motions and magnitudes, so that some statements are plainly false
    and the numbers do not tell whether one is true.
    """
    actions, survey = pair.actions, pair.survey
    others = [draw.choice(survey.motions.get(len(actions), [actions]))]
    others += four_motions(survey, draw, "A4", actions) or []
    others = [one for one in others if survey.differ("A4", actions, one)]
    return draw.choice(others) if others else None


def ask_box(pair, task, most, draw):
    """D1, S5: where is an object of image 1 in image 2, told the motion (D1) or not (S5)?"""
    ask = ["Where is it in image 2?", "Find it in image 2."]
    parts = [SEEN, DID, ask] if task == "D1" else [SEEN, ask]
    # where the box is unchanged, the prompt would hold the answer
    moved = [words for words in map(pair.words, pair.both) if words["box"] != words["box2"]]
    for words in some(draw, moved, most):
        yield pair.question(task, draw, parts, words["box2"], words)


def ask_gone(pair, task, most, draw):
    """D2: will an object be out of sight? Image 2 stays hidden."""
    ask = ["Will it be out of sight then?", "Does it disappear from view?"]
    # a detector may miss an object
    known = pair.before.usable if pair.view["exact"] else pair.after.hidden
    gone = [key for key in pair.before.usable if key in known and key not in pair.after.visible]
    # balanced by the way too: after a wide turn most objects are gone
    position, yaw = pose(pair.actions)
    alike = min(yaw, 360 - yaw), round(position.real), abs(round(position.imag))
    for key in mixed(draw, gone, pair.both, most):
        words = pair.words(key)
        answer = "yes" if key in gone else "no"
        yield pair.question(task, draw, [SEEN_ALONE, WILL, ask], answer, words, alike, pictures=1)


def ask_motion_of_object(pair, task, most, draw):
    """D3: which actions take an object from its box in image 1 to its box in image 2?"""
    seen = [
        "The {label} is at {box} in image 1 and at {box2} in image 2.",
        "Image 1 has the {label} at {box}, image 2 at {box2}.",
        "From image 1 to image 2 the {label} goes from {box} to {box2}.",
    ]
    ask = [
        "Which 1 or 2 actions did the camera do, in order?",
        "Name the 1 or 2 camera actions in between, in order.",
    ]
    if most and pair.both and pair.survey.only_answer(task, pair.actions):
        for key in some(draw, pair.both, most):
            yield pair.question(task, draw, [seen, ask], pair.actions, pair.words(key))


def ask_same(pair, task, most, _):
    """D4, S6: do two boxes hold one object, told the motion (D4) or not (S6)?

    D4 asks about two objects of one label, S6 about such and about any two, called "object".
    Yes and no come in equal numbers within each `shift_class`.
    """
    twins = [
        "Is the {label} at {box2} in image 2 the same one?",
        "Is it the {label} at {box2} in image 2?",
    ]
    any_two = ["Is it at {box2} in image 2?", "Is it the object at {box2} in image 2?"]
    for any_label in [False] if task == "D4" else [False, True]:
        same, other = same_and_other(pair, any_label)
        draw = pair.generator(task, any_label)
        parts = [SEEN, DID] if task == "D4" else [SEEN]
        parts.append(any_two if any_label else twins)
        for key, k in mixed(draw, same, other, most):
            answer = "yes" if key == k else "no"
            words = pair.words(key, k)
            shift = shift_class(words["box"], words["box2"], pair.actions)
            name = {"label": "object"} if any_label else {}
            q = pair.question(task, draw, parts, answer, words | name, (any_label, *shift))
            yield q._replace(label=words["label"])


def same_and_other(pair, any_label):
    """Ids (in image 1, in image 2) of the same object, and of two: of one label, or of any. Where
    the label is one, there is a second object of it also for the same: the words do not tell.
    """
    same, other, later = [], [], pair.after.usable
    for key, one in pair.before.usable.items():
        # a detector's object may come back under a new id, if it is not found where it should be
        known = pair.view["exact"] or key in pair.after.visible
        twin = max(pair.before.counts[one.label], pair.after.counts[one.label]) > 1
        if key in later and (any_label or twin):
            same.append((key, key))
        for k, two in later.items():
            another = k != key and (known or k in pair.before.visible)
            if another and (any_label or one.label == two.label):
                other.append((key, k))
    return same, other


def shift_class(before, after, actions):
    """How far to the side, how much larger and how much wider a second box is, in coarse classes.

    Same or not is balanced within them, because otherwise the two boxes alone would tell it. They
    hold whether the camera turned; a turn to the left counts as its mirror image.
    """
    turn = sum(TURNS.get(name, 0) * value for name, value in actions)
    shift = (sum(after[::2]) - sum(before[::2])) / 2
    if turn < 0:
        shift = -shift
    w1, h1 = size(before)
    w2, h2 = size(after)
    growth = math.log2(w2 * h2 / (w1 * h1))
    wider = 2 * math.log2(w2 * h1 / (h2 * w1))
    return turn != 0, round(shift / 400), round(growth / 2), round(wider / 2)


def ask_bearing(pair, task, most, draw):
    """E2: on which side is an object after the motion; is it nearer or farther? Image 2 is hidden.

    From its bearing and distance in image 1, or from its box where the camera only turns.
    """
    sides = [
        "Will {object} be ahead, behind, to the left or to the right?",
        "Where will {object} be: ahead, behind, left or right?",
    ]
    ways = ["Will {object} be nearer or farther?", "Does that bring {object} nearer or farther?"]
    position, yaw = pose(pair.actions)
    found = []
    for key, one in pair.before.usable.items():
        if one.distance_m or not position:
            place = (one.distance_m or 1) * np.exp(1j * np.radians(one.bearing_deg))
            found += [(key, answer) for answer in relations(place, position, yaw)]
    found = sorted(some(draw, found), key=lambda one: one[1] in YES)  # the rare ones first
    way = yaw, round(position.real), round(position.imag)
    for key, answer in found[:most]:
        words = pair.named(draw, key) | {"label": ""}  # balanced for each motion, of any object
        parts = [WILL, sides if answer in SIDES else ways]
        alike = answer in SIDES, *way
        yield pair.question(task, draw, parts, answer, words, alike, pictures=1)


def relations(place, position, yaw):
    """The clear ones of SIDES and WAYS for an object at `place` (z_m + i x_m) after a motion."""
    after = (place - position) * TOWARDS[-yaw % 360]
    quarter, off_deg = divmod(np.degrees(np.angle(after)) + 45, 90)
    nearer_m = abs(place) - abs(after)
    found = []
    if CLEAR_DEG <= off_deg <= 90 - CLEAR_DEG and abs(after) >= LEAST_DISTANCE_M:
        found.append(SIDES[int(quarter) % 4])
    if abs(nearer_m) >= CLEAR_M:
        found.append("nearer" if nearer_m > 0 else "farther")
    return found


def ask_picture(pair, task, most, draw):
    """E3: which of four pictures follows the motion? All end trajectories of one start.

    Each of the four is asked about: one that never is right could be struck out without looking.
    Not after one move forward or backward: the nearest or the furthest of the four would be it.
    """
    begin = ["Image 1 is the start.", "The camera now sees image 1."]
    ask = ["Which image shows the view afterwards?", "Which image does it see next?"]
    survey, cfg, ends = pair.survey, pair.survey.cfg, []
    for view in survey.starts[pair.view["start"]]:
        end = Shown(survey, view, 0, len(view["actions"]))
        straight = [name for name, _ in end.actions] in (["forward"], ["backward"])
        fits = end.share >= cfg.least_covisible and end.holes <= cfg.max_holes and not straight
        if fits and all(survey.differ(task, end.actions, known.actions) for known in ends):
            ends.append(end)
    four = [end.after.path for end in ends[:4]]
    if most and len(four) == 4 and pair.after.path in four and not pair.keyframes[0]:
        order = some(draw, four)
        right = IMAGES[order.index(pair.after.path)]
        q = pair.question(task, draw, [begin, WILL, ask], right, {})
        yield q._replace(images=[pair.before.path, *order], options=IMAGES)


def ask_where(shown, task, most, draw):
    """S1: where is an object that is the only one of its label?"""
    parts = [["Find", "Locate", "Point out"], ["the {label}.", "the {label} in the picture."]]
    picture = shown.before
    alone = [key for key, one in picture.usable.items() if picture.counts[one.label] == 1]
    for key in some(draw, alone, most):
        words = shown.words(key)
        yield shown.question(task, draw, parts, words["box"], words)


def ask_whether_there(shown, task, most, draw):
    """S2: is a label in the picture? And is it at a box?"""
    if not shown.view["exact"]:  # a detector may miss an object
        return
    seen = ["Do you see", "Can you see", "Is there"]
    parts = [seen, ["any {label}?", "any {label} in the picture?"]]
    parts_box = [seen, ["any {label} at {box}?", "any {label} inside {box}?"]]
    known, things = shown.survey.labels[shown.view["source"]], shown.before.usable
    absent = sorted(label for label in known if not same_kind(label, shown.before.counts))
    here = sorted({one.label for one in things.values()})
    for label in mixed(draw, here, absent, most):
        answer = "yes" if label in here else "no"
        yield shown.question(task, draw, parts, answer, {"label": label})
    for key in some(draw, [*things], most):
        words = shown.words(key)
        answer = "yes" if draw.random() < 0.5 else "no"
        if answer == "no":
            wrong = [label for label in here if not same_kind(label, [words["label"]])]
            if not wrong:
                continue
            words["label"] = draw.choice(wrong)
        width, height = size(words["box"])  # balanced by them: else the box's form would tell
        alike = round(math.log2(width / height)), round(math.log2(width * height))
        yield shown.question(task, draw, parts_box, answer, words, alike)


def same_kind(label, others):
    """Whether a label is that of one of the others: a "red ball" is a "ball"."""
    return label.endswith(tuple(others)) or any(other.endswith(label) for other in others)


def ask_distance(shown, task, most, draw):
    """S3: how far away is an object, named by its label alone where that is unique?"""
    ask = ["How far away along the floor is", "How far along the floor is it to"]
    ask += ["What is the distance along the floor to"]
    parts = [ask, ["{object}?", "{object} in the picture?"]]
    measured = [key for key, one in shown.before.usable.items() if one.distance_m]
    for key in some(draw, measured, most):
        answer = f"{round(shown.before.usable[key].distance_m, 1):g} meters"
        words = shown.named(draw, key)
        yield shown.question(task, draw, parts, answer, words)


def ask_facing(shown, task, most, draw):
    """E1: which turn brings an object of a picture to its middle? From its box and the camera."""
    field = ["The picture spans {fov} degrees from side to side.", "Field of view: {fov} degrees."]
    ask = [
        "How must the camera turn to face {object}?",
        "Which turn makes the camera face {object}?",
        "To face {object}, turn which way and how far?",
    ]
    fov_deg, usable = shown.view["fov_x_deg"], shown.before.usable
    beside = [key for key, one in usable.items() if turn_to(one.box, fov_deg)]
    for key in some(draw, beside, most):
        turn = turn_to(usable[key].box, fov_deg)
        words = shown.named(draw, key) | {"fov": f"{fov_deg:.0f}"}
        yield shown.question(task, draw, [field, ask], turn, words)


# --- the tables of the tasks ---
class Task(NamedTuple):
    answer: tuple[str, str]  # its type, which the reward goes by, and how to ask for it
    direction: str  # inverse, forward or static
    most: float  # questions per pair or picture; below 1: on that share of them; see --caps
    ask: Callable
    needs: str = "more views"  # said where there is no question


MOVE = ("motion", "Answer: move <direction> <number> meters.")
TURN = ("motion", "Answer: turn <direction> <number> degrees.")
ACTIONS = (
    "motions",
    "Answer: move <direction> <number> meters or turn <direction> <number> degrees, joined by ;.",
)
BOX = ("box", "Answer with a box.")
YES_NO = ("yes_no", "Answer yes or no.")
TRUE_FALSE = ("yes_no", "Answer true or false.")
RELATION = ("relation", "Answer with one word.")
METERS = ("meters", "Answer: <number> meters.")
LETTER = ("choice", "Answer with one letter.")
BOXES = " Boxes are [x1, y1, x2, y2] in thousandths of width and height."
ONE = "objects with boxes (of photographs: --detector)"
TWO = f"{ONE} in both pictures"
# A task is a row here and its function above; no wording may hold its answer.
PAIR_TASKS = {
    "A1": Task(MOVE, "inverse", 1, ask_motion, "pairs with a single move"),
    "A2": Task(TURN, "inverse", 1, ask_motion, "pairs with a single turn"),
    "A3": Task(ACTIONS, "inverse", 1, ask_motion, "pairs with 2 or 3 actions"),
    "A4": Task(TRUE_FALSE, "inverse", 1, ask_statement),
    "D1": Task(BOX, "forward", 2, ask_box, TWO),
    "S5": Task(BOX, "static", 2, ask_box, TWO),
    "D2": Task(YES_NO, "forward", 2, ask_gone, f"{ONE}, some of which leave the view"),
    "D3": Task(ACTIONS, "inverse", 1, ask_motion_of_object, f"{TWO}, 1 or 2 actions apart"),
    "D4": Task(YES_NO, "forward", 2, ask_same, f"{TWO}, two of one label"),
    "S6": Task(YES_NO, "static", 2, ask_same, TWO),
    "E2": Task(RELATION, "forward", 2, ask_bearing, f"{ONE}, and turns or distances"),
    "E3": Task(LETTER, "forward", 1, ask_picture, "--formats choice, four views of one start"),
}
PICTURE_TASKS = {
    "S1": Task(BOX, "static", 1, ask_where, ONE),
    "S2": Task(YES_NO, "static", 2, ask_whether_there, "exact boxes"),
    "S3": Task(METERS, "static", 1, ask_distance, "objects at known distances"),
    "E1": Task(TURN, "inverse", 0.5, ask_facing, f"{ONE}, some beside the middle"),
}
TASKS = PAIR_TASKS | PICTURE_TASKS
SHARING = ("S1", "S2", "S3")  # one generator; each other task has its own
BALANCED = {task for task, row in TASKS.items() if row.answer[0] in ("yes_no", "relation")}
# what cannot be answered where the pictures share too little
COMPARING = {task for task, row in PAIR_TASKS.items() if row.direction == "inverse"}
FORMATS = ("open", "choice")
LETTERS = "ABCD"
# of each balanced question one answer is here; where an object is ahead, most others are too
YES = ("yes", "true", "ahead", "nearer")
SIDES = ("ahead", "right", "behind", "left")  # by quarters, clockwise
WAYS = ("nearer", "farther")
IMAGES = ("image 2", "image 3", "image 4", "image 5")
ANSWERS = (("yes", "no"), ("true", "false"), SIDES, WAYS)  # a choice offers all of one
CLEAR_DEG, CLEAR_M = 10, 0.3  # E2: how far from the border of two answers
LEAST_DISTANCE_M = 0.5  # E2: nearer, an object is on several sides at once
FACING_STEP = 5  # degrees: the grid of E1


def read_caps(pairs):
    """["D1=2", "A4=0.2"] -> {"D1": 2.0, "A4": 0.2, ...}; tasks not named as in the tables."""
    caps = {task: row.most for task, row in TASKS.items()}
    for pair in pairs:
        found = re.fullmatch(r"(\w+)=(\d+|0?\.\d+)", pair)
        if not found or found[1] not in TASKS:
            stop(f"--caps {pair!r}: write TASK=NUMBER, one of {sorted(TASKS)}, whole or below 1")
        caps[found[1]] = float(found[2])
    return caps


# --- all questions, balanced and drawn ---
def ask_all(views, survey):
    """Yield all candidates of all views; balancing drops some later."""
    cfg = survey.cfg
    for view in tqdm(views, desc="questions", unit="trajectory"):
        kept = [k for k, picture in enumerate(view["pictures"]) if picture]
        if cfg.pairs == "ends":
            kept = [0, kept[-1]]
        pairs = itertools.combinations(kept, 2)
        # trajectories that share a start share that picture: it is asked about once
        first = survey.starts[view["start"]][0] is view
        singles = [(k,) for k in kept if k > 0 or first]
        for keyframes in [*pairs, *singles]:
            shown = Shown(survey, view, *keyframes)
            if shown.holes > cfg.max_holes:
                survey.dropped["all: pictures with more holes than --max_holes"] += 1
                continue
            tasks = PAIR_TASKS if shown.actions else PICTURE_TASKS
            shared = shown.generator("S")
            for task, row in tasks.items():
                most = survey.caps[task]
                if most < 1:  # one question on that share of the pairs or pictures
                    most = shown.generator(task, "cap").random() < most
                draw = shared if task in SHARING else shown.generator(task)
                asked = row.ask(shown, task, int(most), draw)
                if task in COMPARING and shown.share < cfg.least_covisible:
                    reason = f"{task}: pictures share less than --least_covisible"
                    survey.dropped[reason] += len([*asked])
                    continue
                for q in asked:
                    if "open" in cfg.formats and not q.options:
                        yield q
                    if "choice" in cfg.formats and q.order < cfg.choice_share:
                        yield from [q] if q.options else shown.choice(q)


def draw_questions(questions, most=None):
    """At most `most` per task, by hashed order; their sequence stays. Of the balanced tasks as many
    answers of YES as others, for each form, label and `alike`.
    """
    keep = set()
    for task in TASKS:
        of_task = [q for q in questions if q.task == task]
        of_task.sort(key=lambda q: q.order)
        if task in BALANCED:
            sides = defaultdict(lambda: ([], []))
            for q in of_task:
                sides[not q.options, q.label, q.alike][q.truth in YES].append(q)
            pairs = [pair for no, yes in sides.values() for pair in zip(yes, no, strict=False)]
            pairs.sort(key=lambda pair: pair[0].order)
            of_task = [q for pair in pairs for q in pair]
        keep |= {id(q) for q in of_task[:most]}
    return [q for q in questions if id(q) in keep]


def trains(cfg, task):
    """Whether --tasks and --directions ask for a task; static ones are of both directions."""
    own = TASKS[task].direction
    return task in cfg.tasks and (cfg.directions == "both" or own in ("static", cfg.directions))


def make_files(survey, questions):
    """File name -> its questions. The ablation settings do not reach heldout.jsonl."""
    cfg, files = survey.cfg, {"static": [], "sft": [], "heldout": []}
    for q in questions:
        if q.view["split"] == "heldout":
            files["heldout"].append(q)
        elif trains(cfg, q.task) and cfg.sources in (q.view["source"], "both"):
            files["static" if TASKS[q.task].direction == "static" else "sft"].append(q)
    for name, candidates in files.items():
        files[name] = draw_questions(candidates)
        lost = Counter(q.task for q in candidates) - Counter(q.task for q in files[name])
        for task, count in lost.items():
            survey.dropped[f"{task}: more of one answer than of the others"] += count
    files["grpo"] = draw_questions(files["sft"], cfg.grpo_per_task)
    return files


def name_empty(survey, files):
    """One line on stderr for each task that was asked for and came out empty, and for heldout."""
    made = {q.task for q in files["sft"] + files["static"]}
    for task, row in TASKS.items():
        if task not in made and survey.caps[task] and trains(survey.cfg, task):
            print(f"no question of {task} to train on: it needs {row.needs}", file=sys.stderr)
    if not files["heldout"]:
        print("heldout.jsonl is empty: more scenes, or a larger 01 --heldout", file=sys.stderr)


def as_record(q):
    record = {
        "task_type": q.task,
        "answer_type": "choice" if q.options else TASKS[q.task].answer[0],
        "messages": [
            {"role": "user", "content": q.prompt},
            {"role": "assistant", "content": q.answer},
        ],
        "images": q.images,
    }
    if q.options:
        record["options"] = q.options
    record |= {key: q.view[key] for key in ORIGIN}
    if q.task in PAIR_TASKS:
        record["difficulty"] = q.difficulty
    return record


# --- what was made: card.json, examples.png ---
SIDE_PX, WIDE_PX, TALL_PX = 210, 560, 380  # of examples.png: a picture, a question


def examples(questions, run):
    """PNG of a question per task and form, of balanced tasks two: pictures, words, and answer. A
    box that is the answer is green, those in the words are yellow; options are not drawn.
    """
    chosen = []
    for task, form in itertools.product(TASKS, (False, True)):
        same = [q for q in questions if q.task == task and bool(q.options) == form]
        chosen += draw_questions(same, 2 if task in BALANCED else 1)
    page = Image.new("RGB", (4 * WIDE_PX, math.ceil(len(chosen) / 4) * TALL_PX), "white")
    font = ImageFont.load_default(14)
    for number, q in enumerate(chosen):
        left, top = number % 4 * WIDE_PX + 10, number // 4 * TALL_PX + 10
        side = min(SIDE_PX, (WIDE_PX - 10) // len(q.images) - 4)
        truth = write(q.truth)
        boxes = re.findall(r"\[\d[^]]*\]", q.words + truth)
        for k, path in enumerate(q.images):
            picture = ImageOps.contain(open_picture(run / path), (side, side))
            if k < len(boxes):
                corners = np.array(json.loads(boxes[k])) / 1000 * (picture.size * 2)
                colour = "lime" if boxes[k] == truth else "yellow"
                ImageDraw.Draw(picture).rectangle(corners.tolist(), outline=colour, width=2)
            page.paste(picture, (left + k * (side + 4), top))
        words = textwrap.fill(f"{q.task}  " + q.prompt.replace("<image>", ""), 76)
        words += f"\n\n{q.answer}"
        ImageDraw.Draw(page).text((left, top + side + 4), words, "black", font)
    png = io.BytesIO()
    page.save(png, "PNG")
    return png.getvalue()


def main(cfg: Config):
    """Ask about every view, balance what was asked, write the files of questions."""
    started, run = time.perf_counter(), Path(cfg.run)
    read_caps(cfg.caps)  # for its faults, before a folder is begun
    for name, given, known in (("tasks", cfg.tasks, TASKS), ("formats", cfg.formats, FORMATS)):
        if {*given} - {*known}:
            stop(f"--{name} {given}: choose among {', '.join(sorted(known))}")
    folder = run / cfg.out
    config = asdict(cfg)
    del config["recipe"], config["run"]
    meta = begin(folder, config, run / "2_views")
    detect = load_detector(cfg) if cfg.detector else None
    views, skipped = load_views(cfg, detect)
    survey = Survey(cfg, views)
    files = make_files(survey, list(ask_all(views, survey)))
    dropped = +survey.dropped
    for reason, count in sorted(dropped.items()):
        print("dropped", count, reason)
    name_empty(survey, files)
    if not files["static"] + files["sft"]:
        stop("no question to train on: see the lines above")
    counts = {}
    for name, questions in files.items():
        lines = [json.dumps(as_record(q), ensure_ascii=False) + "\n" for q in questions]
        save(folder / f"{name}.jsonl", "".join(lines))
        counts[name] = Counter(sorted(q.task for q in questions))
    # for people: what there is, and what it looks like
    card = {"views": {"used": len(views), "skipped": skipped}, "counts": counts, "dropped": dropped}
    save(folder / "card.json", json.dumps(card, indent=1))
    save(folder / "examples.png", examples(files["static"] + files["sft"] + files["heldout"], run))
    finish(folder, meta, {name: count.total() for name, count in counts.items()}, started)
    for name, count in (counts | {"skipped": skipped}).items():
        print(name, dict(count))
    print(f"next: python 04_train_sft.py --run {cfg.run}")


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


if __name__ == "__main__":
    run(main, Config)
