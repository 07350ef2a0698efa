"""Stage 3: turn imagined views into questions whose answers are known.

A trajectory knows its actions and a view knows its objects, so one pair of pictures (frame 0 and the last) answers questions in
both directions: inverse, outcome -> action (A1-A4, D3), and forward, action -> outcome (D1, D2, D4). S1-S6 name no motion (S1-S4 ask
about one picture, S5 and S6 compare two); from them the tiny student learns what a VLM brings along. An answer is only worth
learning if it is the one right answer: two action sequences a, b are the same question when

    pose(a) = pose(b),   pose([(name, value), ...]) = (x_m, z_m, yaw_deg mod 360) in frame 0's axes,

so an A1, A2, A3 or D3 answer must be the only sequence that reaches its pose. "The only" is among ALL sequences whose turns and
moves alternate (DESIGN 4), of the lengths asked for (A1, A2: 1; A3: 2 and 3; D3: 1 and 2), with distances 0.1, 0.2, ... up to the
longest move in views.jsonl and angles 10, 20, ... up to the widest turn. All are enumerated once: 125,000 for 2 m and 80 degrees.
`turn right 90; move forward 1` ends where `move right 1; turn right 90` does, hence neither is asked. Mind that where turns of 90
degrees occur, every two-step sequence has a twin of three steps (`turn right 40; move forward 1` ends where `turn left 50; move
right 1; turn right 90` does), so that A3 keeps three-step ones only; with turns up to 80 degrees, two-step ones stay.

Where we depart from the published code: no prompt contains its answer; A4, D2 and D4 have both answers, in equal numbers for each
object label (A4: each first action named), D2 also for each length of the way and size of the box, S2 at a box for like boxes, D4
and S6 for like shifts, growths and forms from box to box, so that neither words nor label give the answer away; a D4 question, yes
or no, is asked only where the pictures show a second object of that label (but see --near_miss_box); the answer of D1 is never just
a copy of the box asked about.

Reads   RUN/2_views/views.jsonl, one trajectory a line (here shortened; the frames are looked for, not opened):
  {"scene_id": "room_00000", "traj_id": "t000", "source": "simulated", "split": "train", "actions": [["turn_left", 40]],
   "keyframes": [0, 8], "kept": [0, 8], "start": [0.4, -1.2, 30], "c2w": [...], "teacher": "simulator", "qc": {"passed": true},
   "frames": ["2_views/room_00000/t000/000.png", "2_views/room_00000/t000/008.png"],
   "objects": [[{"id": 3, "label": "red ball", "box": [412, 300, 530, 611], "visible_px": 310, "distance_m": 2.41}], []]}
Writes  RUN/3_qa/static.jsonl (S1-S6), sft.jsonl (the eight tasks), grpo.jsonl (a subset of sft.jsonl, 125 a task: stage 5 refines
on what stage 4 has seen), heldout.jsonl (all tasks, held-out scenes only), one question a line:
  {"task_type": "A2", "messages": [{"role": "user", "content": "<image><image>Which way and how far did the camera turn from image
   1 to image 2? Answer: turn <direction> <number> degrees."}, {"role": "assistant", "content": "turn left 40 degrees"}],
   "images": ["2_views/room_00000/t000/000.png", "2_views/room_00000/t000/008.png"], "scene_id": "room_00000", "traj_id": "t000",
   "split": "train", "source": "simulated", "teacher": "simulator"}
and card.json (counts, balances, audits), examples.png, meta.json. The ablation settings (--directions, --sources, --tasks) choose
what is trained on; heldout.jsonl stays the same, so that ablated students sit the same exam.

    python 03_build_qa.py --run runs/demo
    python 03_build_qa.py --run runs/forward_only --directions forward     # after cp -al runs/demo/2_views runs/forward_only/
    python 03_build_qa.py --run runs/photos --detector FOLDER_OR_HUB_ID --detector_labels chair lamp   # views without exact boxes

Measured on one core of a busy machine, after `01 --rooms 200 --heldout 0.3` and `02`: 15,163 questions, 17,000 a second
"""
import argparse
import fcntl
import hashlib
import io
import json
import math
import os
import random
import re
import resource
import socket
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser

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

FORWARD, INVERSE, STATIC = ("D1", "D2", "D4"), ("A1", "A2", "A3", "A4", "D3"), ("S1", "S2", "S3", "S4", "S5", "S6")
EIGHT = ("A1", "A2", "A3", "A4", "D1", "D2", "D3", "D4")
YES_NO = {"A4": ("true", "false"), "D2": ("yes", "no"), "D4": ("yes", "no"), "S2": ("yes", "no"),
          "S6": ("yes", "no")}  # first: the statement holds
ONE_ANSWER = {"A1": (1,), "A2": (1,), "A3": (2, 3), "D3": (1, 2)}  # lengths among which the answer must be the only sequence


@dataclass
class Config:
    run: str = setting("runs/demo", "folder of the run; reads RUN/2_views, writes RUN/OUT")
    out: str = setting("3_qa", "folder of the questions, under RUN: another name for another set about the same views")
    seed: int = setting(0, "seeds every draw, together with scene, trajectory and task")
    directions: str = setting("both", "forward (D1 D2 D4), inverse (A1-A4 D3) or both: the paper's ablation; training files only")
    sources: str = setting("both", "real (photographs), simulated (rooms) or both: another ablation; training files only")
    tasks: list[str] = setting([*EIGHT, *STATIC], "tasks to train on; the held-out file always has all fourteen")
    pairs: str = setting("ends", "ends: frame 0 with the last one, as in the paper; keyframes: every two kept keyframes")
    most_actions: int = setting(0, "ask only about two pictures at most so many actions apart, an easier lesson; 0: about all")
    caps: list[str] = setting(["A4=1", "D1=2", "D2=2", "D3=1", "D4=2", "S1=1", "S2=2", "S3=1", "S5=2", "S6=2"], "most questions of a task on "
                              "one pair (S1-S4: on one picture; tasks not named: 1), else scenes full of objects rule the set; 0.2: one on a "
                              "fifth of the pairs")
    box_step: int = setting(1, "box coordinates (thousandths of the picture) are rounded to this; 10: one token each for `tiny`")
    min_area: float = setting(0.01, "smallest usable box, share of the picture: smaller ones are a few pixels")
    max_area: float = setting(0.6, "largest usable box, share of the picture: larger ones are the picture")
    border: float = setting(0.01, "share of the side that a usable box stays clear of the border: nearer, it may be cut off")
    min_score: float = setting(0.3, "lowest detector score (0..1) of a usable box; exact boxes have none and always pass")
    near_miss_m: float = setting(0.3, "a false A4 statement ends at least so many metres from the truth ...")
    near_miss_deg: float = setting(20.0, "... or looks at least so many degrees away from it: nearer ones are not clearly false")
    near_miss_box: int = setting(0, "a D4 answered no shows any object at least so many thousandths of the width beside the one asked about, not its "
                                    "double among like boxes: an easier lesson, which boxes alone may answer; 0: its double")
    grpo_per_task: int = setting(125, "questions a task in grpo.jsonl (paper: 125)")
    heldout_per_task: int = setting(0, "most questions a task in heldout.jsonl; 0: all")
    detector: str = setting("", "hub id or folder of an object detector (ordinary or zero-shot) for views without exact boxes; "
                            "empty: those views get A1-A4 only")
    detector_labels: list[str] = setting([], "zero-shot detector: labels to look for; ordinary one: keep only these; empty: all")
    detector_threshold: float = setting(0.2, "detector score (0..1) from which a box is tracked; below min_score, so that a "
                                        "weak frame doesn't break a track")


# ---- actions and poses ---------------------------------------------------------------------------------------------------------

MOVES = {"forward": 0, "shift_right": 90, "backward": 180, "shift_left": 270}  # direction in degrees from the heading, right is +
TURNS = {"turn_right": 1, "turn_left": -1}  # sign of the yaw
SIN = np.round(np.sin(np.radians(np.arange(360))), 15).tolist()  # of whole degrees; rounded, so that cos 90 is 0
COS = np.round(np.cos(np.radians(np.arange(360))), 15).tolist()
VERB = {**{name: "move " + name.removeprefix("shift_") for name in MOVES}, "turn_right": "turn right", "turn_left": "turn left"}


def say(actions: list) -> str:
    """[("turn_left", 40), ("forward", 1.2)] -> "turn left 40 degrees; move forward 1.2 meters"."""
    return "; ".join(f"{VERB[name]} {value:g} {'degrees' if name in TURNS else 'meters'}" for name, value in actions)


def pose(actions: list) -> tuple[float, float, int]:
    """(x_m, z_m, yaw_deg in 0..359) after the actions, in the axes of the first frame. Angles in whole degrees."""
    x, z, yaw = 0.0, 0.0, 0
    for name, value in actions:
        if name in TURNS:
            yaw = (yaw + TURNS[name] * round(value)) % 360
        else:
            towards = (yaw + MOVES[name]) % 360
            x, z = x + value * SIN[towards], z + value * COS[towards]
    return x, z, yaw


def pose_key(x, z, yaw):
    """One integer a pose (arrays or scalars): 0.1 mm and 1 degree fine, moves up to 800 m."""
    rounded = np.rint(np.multiply((x, z), 1e4)).astype(np.int64) + 2**23
    return (rounded[0] * 2**24 + rounded[1]) * 360 + np.mod(np.rint(yaw), 360).astype(np.int64)


def shared_poses(max_move_m: float, max_turn_deg: float, lengths: tuple) -> tuple[set[int], int]:
    """Keys of the poses that two or more alternating sequences of these lengths reach, and the number of sequences enumerated."""
    distances_m = np.arange(1, round(max_move_m * 10) + 1) / 10
    moves = np.array([(d * SIN[a], d * COS[a], 0) for a in MOVES.values() for d in distances_m])
    turns = np.array([(0, 0, sign * a) for sign in TURNS.values() for a in range(10, round(max_turn_deg) + 1, 10)])
    keys = []
    for kinds in ((moves, turns), (turns, moves)):
        for length in lengths:
            x = z = yaw = np.zeros(1)
            for step in (kinds * 2)[:length]:  # every sequence so far [n, 1] with every next action [1, m]
                dx, dz, dyaw = step.reshape(-1, 3).T
                sin, cos = np.take(SIN, yaw.astype(int) % 360)[:, None], np.take(COS, yaw.astype(int) % 360)[:, None]
                x, z, yaw = ((x[:, None] + cos * dx + sin * dz).ravel(), (z[:, None] - sin * dx + cos * dz).ravel(),
                             (yaw[:, None] + dyaw).ravel())
            keys.append(pose_key(x, z, yaw))
    poses, count = np.unique(np.concatenate(keys), return_counts=True)
    return set(poses[count > 1].tolist()), sum(map(len, keys))


def difficulty(actions: list) -> str:
    """How many steps and how far, "2 far": far is more than a metre or more than 40 degrees in all."""
    moved_m, turned_deg = (sum(value for name, value in actions if name in kind) for kind in (MOVES, TURNS))
    return f"{len(actions)} {'far' if moved_m > 1 or turned_deg > 40 else 'near'}"


def alternate(actions: list) -> bool:
    return all((one[0] in TURNS) != (two[0] in TURNS) for one, two in zip(actions, actions[1:]))


# ---- views ---------------------------------------------------------------------------------------------------------------------

def check_view(view: dict):
    """Raise ValueError, KeyError or TypeError, with a reason, where a view record is not what DESIGN 3 promises."""
    if not isinstance(view, dict):
        raise ValueError("not a JSON object")
    for name, value in view["actions"]:
        unit, most = (10, 180) if name in TURNS else (0.1, 10)  # the upper ends bound the enumeration of sequences
        if name not in VERB or not 0 < value <= most or abs(value / unit - round(value / unit)) > 1e-6:
            raise ValueError(f"action {name} {value} is not on the grid (moves: 0.1, 0.2 .. 10 m, turns: 10, 20 .. 180 degrees)")
    if not view["actions"] or len(view["keyframes"]) != len(view["actions"]) + 1:
        raise ValueError("actions and keyframes do not fit together")
    if view["split"] not in ("train", "heldout") or view["source"] not in ("real", "simulated"):
        raise ValueError(f"unknown split {view['split']!r} or source {view['source']!r}")
    if len(view["frames"]) != len(view["kept"]) or not {0, view["keyframes"][-1]} <= {*view["kept"]}:
        raise ValueError("frame 0 or the last keyframe is not among the kept frames")
    if any(PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts for path in view["frames"]):
        raise ValueError("a frame's path leaves the run folder")
    if view["objects"] is not None and len(view["objects"]) != len(view["kept"]):
        raise ValueError("objects and kept frames do not fit together")
    for entry in (entry for frame in view["objects"] or [] for entry in frame):
        box, label = entry["box"], entry["label"]
        if not isinstance(label, str) or "<" in label or not isinstance(entry["id"], (int, str)):
            raise ValueError(f"object {entry['id']!r} has the label {label!r}")
        if box is not None and (len(box) != 4 or not all(0 <= value <= 1000 for value in box)):
            raise ValueError(f"object {entry['id']!r} has the box {box}, not four numbers in 0..1000")
        float(entry.get("distance_m") or 0), float(entry.get("score") or 0)
    if view["qc"]["passed"] not in (True, False) or not isinstance(view["scene_id"], str) or not isinstance(view["traj_id"], str):
        raise ValueError("qc.passed, scene_id or traj_id is not one")
    if len(view["c2w"]) <= max(view["kept"]):
        raise ValueError("c2w does not reach the last kept frame")


def whole(path: Path) -> bool:
    """A PNG that is there to its end; pictures of another format need only be there."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 12))
        return path.suffix != ".png" or b"IEND" in file.read()


def load_views(run: Path, keep_c2w: bool) -> tuple[list[dict], Counter]:
    """The usable records of views.jsonl, and how many were skipped why. Every skipped line is named on stderr with its remedy."""
    path, views, skipped, first_line = run / "2_views/views.jsonl", [], Counter(), {}
    if not path.is_file():
        stop(f"{path} is missing: run 02_imagine_views.py to its end first")
    with open(path, "rb") as lines:  # read line by line: the poses make this file large, and few of them are needed
        for number, line in enumerate(lines, 1):
            try:
                check_view(view := json.loads(line))
                small = slim(view, keep_c2w and view["objects"] is None)
            except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:  # what a wrong record can raise above
                skipped["broken record"] += 1
                why = f"key {error} is missing" if isinstance(error, KeyError) else error
                print(f"{path}:{number}: skipped, {why}; delete the line, or 2_views and run 02 again", file=sys.stderr)
                continue
            name = (view["scene_id"], view["traj_id"])
            if name in first_line:
                skipped["duplicate"] += 1
                print(f"{path}:{number}: skipped, {'/'.join(name)} stands in line {first_line[name]} already; delete one",
                      file=sys.stderr)
            elif missing := [frame for frame in view["frames"] if not whole(run / frame)]:
                skipped["frame missing"] += 1
                print(f"{path}:{number}: skipped, {run / missing[0]} is missing or cut short; delete 2_views and run 02 again",
                      file=sys.stderr)
            elif not view["qc"]["passed"]:
                skipped["failed the quality check"] += 1  # expected, and already reported by 02: no line
            else:
                views.append(small)
            first_line.setdefault(name, number)
    heldout = {view["scene_id"] for view in views if view["split"] == "heldout"}
    leaking = [view for view in views if view["split"] == "train" and view["scene_id"] in heldout]
    for view in leaking:
        skipped["held-out scene in training"] += 1
        print(f"{path}: trajectory {view['scene_id']}/{view['traj_id']} skipped: its scene is held out, yet its split is train; "
              "splits are by scene, so correct the manifest and run 01 again", file=sys.stderr)
    return [view for view in views if not (view["split"] == "train" and view["scene_id"] in heldout)], skipped


def slim(view: dict, keep_c2w: bool) -> dict:
    """What the questions need of a view, with `poses`, per kept frame (x_m, z_m, yaw_deg): in the room, or else from frame 0."""
    x0, z0, yaw0 = view["start"] or (0.0, 0.0, 0.0)
    sin, cos, poses = np.sin(np.radians(yaw0)), np.cos(np.radians(yaw0)), []
    for index in view["kept"]:
        c2w = view["c2w"][index]
        x, z, yaw = c2w[0][3], c2w[2][3], np.degrees(np.arctan2(c2w[0][2], c2w[0][0]))
        poses.append((round(float(x0 + cos * x + sin * z), 3), round(float(z0 - sin * x + cos * z), 3),
                      round(float(yaw0 + yaw), 2) % 360))
    names = ["scene_id", "traj_id", "source", "split", "teacher", "actions", "keyframes", "kept", "frames", "objects", "start"]
    more = {name: view[name] for name in ("c2w", "width", "height", "fov_x_deg")} if keep_c2w else {}
    return {name: view[name] for name in names} | more | {"poses": poses, "exact": view["objects"] is not None}


# ---- boxes for views without exact ones: detector, then tracks -----------------------------------------------------------------

def load_detector(name: str, labels: list[str], threshold: float):
    """A function: picture paths -> per picture a list of {label, box, score, colour}. Safetensors only, no remote code."""
    import torch
    from transformers import (AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, AutoModelForZeroShotObjectDetection,
                              AutoProcessor)
    from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING
    safe = {"trust_remote_code": False}
    try:
        zero_shot = type(AutoConfig.from_pretrained(name, **safe)) in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING
        processor = (AutoProcessor if zero_shot else AutoImageProcessor).from_pretrained(name, **safe)
        auto = AutoModelForZeroShotObjectDetection if zero_shot else AutoModelForObjectDetection
        model = auto.from_pretrained(name, use_safetensors=True, **safe).eval()
    except (OSError, ValueError) as error:  # no such folder, no safetensors, not a detector: transformers says which
        stop(f"--detector {name}: {str(error).splitlines()[0]}")
    if zero_shot and not labels:
        stop(f"--detector {name} is a zero-shot detector: name what it shall look for with --detector_labels")
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.inference_mode()
    def detect(paths: list[Path]) -> list[list[dict]]:
        pictures = [open_picture(path) for path in paths]
        texts = {"text": [labels] * len(pictures)} if zero_shot else {}
        inputs = processor(images=pictures, return_tensors="pt", **texts).to(model.device)
        after = {"threshold": threshold, "target_sizes": [(p.height, p.width) for p in pictures]}
        if zero_shot:
            found = processor.post_process_grounded_object_detection(model(**inputs), text_labels=texts["text"], **after)
        else:
            found = processor.post_process_object_detection(model(**inputs), **after)
        result = []
        for picture, one in zip(pictures, found):
            names = one["text_labels"] if zero_shot else [model.config.id2label[int(label)] for label in one["labels"]]
            scale = 1000 / np.array([picture.width, picture.height] * 2)
            boxes = np.clip(np.rint(one["boxes"].cpu().numpy().reshape(-1, 4) * scale), 0, 1000).astype(int).tolist()
            result.append([{"label": label, "box": box, "score": round(float(score), 3), "colour": mean_colour(picture, box)}
                           for label, box, score in zip(names, boxes, one["scores"])
                           if box[0] < box[2] and box[1] < box[3] and (not labels or label in labels)])
        return result
    return detect


def open_picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError) as error:  # SyntaxError: how Pillow calls a broken PNG
        stop(f"{path} is no whole picture ({error}): delete 2_views and run 02 again")


def mean_colour(picture: Image.Image, box: list[int]) -> np.ndarray:
    """Mean RGB [3], 0..1, of the middle half of a box: the tracker's notion of appearance."""
    x1, y1, x2, y2 = np.array(box) / 1000 * ([picture.width, picture.height] * 2)
    crop = picture.resize((4, 4), Image.Resampling.BOX, box=(x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)))
    return np.asarray(crop, np.float32)[1:3, 1:3].mean((0, 1)) / 255


def iou(a: list, b: list) -> float:
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner or 1)


def turned(box: list[int], view: dict, one: int, two: int) -> list[float] | None:
    """Where the turn from frame `one` to `two` takes a box (maybe outside 0..1000): x' = K R K^-1 x. None: behind, or a move."""
    a, b = np.array(view["c2w"][one], float), np.array(view["c2w"][two], float)
    if np.linalg.norm(a[:3, 3] - b[:3, 3]) > 1e-3:
        return None
    focal_px = view["width"] / 2 / np.tan(np.radians(view["fov_x_deg"]) / 2)
    half_px = np.array([view["width"], view["height"]]) / 2
    corners = np.array([(box[i], box[j]) for i in (0, 2) for j in (1, 3)]) / 500 * half_px - half_px  # [4, 2] px from the centre
    rays = np.c_[corners / focal_px, np.ones(4)] @ (b[:3, :3].T @ a[:3, :3]).T
    if (rays[:, 2] <= 0.05).any():
        return None
    x, y = ((rays[:, :2] / rays[:, 2:] * focal_px + half_px) * 500 / half_px).T
    return [x.min(), y.min(), x.max(), y.max()]


def track(view: dict, found: list[list[dict]]) -> list[list[dict]]:
    """Detections per kept frame -> objects per kept frame, with one id through the frames.

    Greedy, best pair first, equal labels only. A pair scores its IoU with the box that the turn predicts (after a move: with the
    last box) plus up to 0.5 for equal colour. Where two tracks want a box, or a track wants two boxes, about equally, the tracks
    end: a missing object is cheap, a swapped one a wrong label. A box that a turn carries wholly out of the picture is entered
    with `visible_px` 0: known to be gone, while an object merely not detected is unknown.
    """
    objects, tracks, next_id = [], {}, 0  # tracks: id -> (frame, last detection)
    for frame, detections in zip(view["kept"], found):
        scores = []
        for key, (last, old) in tracks.items():
            expected = turned(old["box"], view, last, frame) or old["box"]
            for number, new in enumerate(detections):
                if new["label"] == old["label"] and (overlap := iou(expected, new["box"])) > 0.1:
                    likeness = max(0, 1 - 3 * float(np.abs(new["colour"] - old["colour"]).mean()))
                    scores.append((overlap + 0.5 * likeness, key, number))
        matched, ended = {}, set()  # matched: id -> number of the detection
        for score, key, number in sorted(scores, key=lambda s: (-s[0], s[1], s[2])):
            if key in matched or key in ended or number in matched.values():
                continue
            rivals = [s for s, k, n in scores if (k == key) != (n == number) and k not in matched and n not in matched.values()]
            if max(rivals, default=0) > 0.7 * score:
                ended.add(key)
            else:
                matched[key] = number
        key_of, here = {number: key for key, number in matched.items()}, []
        for number, new in enumerate(detections):
            if number not in key_of:
                key_of[number], next_id = next_id, next_id + 1
            tracks[key_of[number]] = (frame, new)
            here.append({"id": key_of[number], "visible_px": None} | {name: new[name] for name in ("label", "box", "score")})
        seen = {entry["id"] for entry in here}
        for key, (last, old) in tracks.items():
            box = turned(old["box"], view, last, frame) if key not in seen else None
            if box is not None and (box[2] <= 0 or box[0] >= 1000 or box[3] <= 0 or box[1] >= 1000):
                here.append({"id": key, "label": old["label"], "box": None, "visible_px": 0})
        tracks = {key: value for key, value in tracks.items() if key not in ended}
        objects.append(here)
    return objects


# ---- questions -----------------------------------------------------------------------------------------------------------------

MOVE, TURN, BOX = "move <direction> <number> meters", "turn <direction> <number> degrees", "[x1, y1, x2, y2], each 0 to 1000"
TEMPLATES = {  # the words after the <image> marks. None may hold its answer: A1-A3 and D3 name no direction
    "A1": [f"Which way and how far did the camera move from image 1 to image 2? Answer: {MOVE}.",
           f"The camera moved once between image 1 and image 2. Name the move. Answer: {MOVE}.",
           f"What single move leads from image 1 to image 2? Answer: {MOVE}."],
    "A2": [f"Which way and how far did the camera turn from image 1 to image 2? Answer: {TURN}.",
           f"The camera turned once between image 1 and image 2. Name the turn. Answer: {TURN}.",
           f"What single turn leads from image 1 to image 2? Answer: {TURN}."],
    "A3": [f"Which 2 or 3 actions did the camera do from image 1 to image 2, in order? Answer: {MOVE} or {TURN}, joined by ;.",
           f"List in order the 2 or 3 actions that lead from image 1 to image 2. Answer: {MOVE} or {TURN}, joined by ;."],
    "A4": ["From image 1 to image 2 the camera did: {actions}. True or false? Answer true or false.",
           "Is this what the camera did from image 1 to image 2: {actions}? Answer true or false.",
           "Do these actions lead from image 1 to image 2: {actions}? Answer true or false."],
    "D1": [f"The {{label}} is at {{box}} in image 1. The camera did: {{actions}}. Where is it in image 2? Answer: {BOX}.",
           f"An object is at {{box}} in image 1. After {{actions}}, where is it in image 2? Answer: {BOX}.",
           f"Find the {{label}} at {{box}} in image 1 again in image 2, after {{actions}}. Answer: {BOX}."],
    "D2": ["The {label} is at {box}. The camera will do: {actions}. Will it disappear? Answer yes or no.",
           "An object is at {box}. After {actions}, will it be out of sight? Answer yes or no.",
           "Does the {label} at {box} disappear after {actions}? Answer yes or no."],
    "D3": [f"The {{label}} is at {{box}} in image 1, at {{box2}} in image 2. Which 1 or 2 actions did the camera do, in order? "
           f"Answer: {MOVE} or {TURN}, joined by ;.",
           f"1 or 2 actions took an object from {{box}} in image 1 to {{box2}} in image 2. List them in order. "
           f"Answer: {MOVE} or {TURN}, joined by ;."],
    "D4": ["The {label} is at {box} in image 1. The camera did: {actions}. Is the {label} at {box2} in image 2 the same one? "
           "Answer yes or no.",
           "One {label} is at {box} in image 1. After {actions}, is it the {label} at {box2} in image 2? Answer yes or no."],
    "D4 any": ["The {label} is at {box} in image 1. The camera did: {actions}. Is it at {box2} in image 2? Answer yes or no.",
               "One {label} is at {box} in image 1. After {actions}, is it the one at {box2} in image 2? Answer yes or no."],
    "S1": [f"Where is the {{label}}? Answer: {BOX}.", f"Find the {{label}}. Answer: {BOX}."],
    "S2": ["Do you see any {label}? Answer yes or no.", "Is any {label} in the picture? Answer yes or no."],
    "S2 at box": ["Is any {label} at {box}? Answer yes or no.", "Do you see any {label} at {box}? Answer yes or no."],
    "S3": ["How far away along the floor is the {label}? Answer: <number> meters.",
           "What is the distance along the floor to the {label}? Answer: <number> meters."],
    "S3 at box": ["How far away along the floor is the object at {box}? Answer: <number> meters.",
                  "What is the distance along the floor to the {label} at {box}? Answer: <number> meters."],
    "S4": ["Which way does the camera look? Answer: <number> degrees.",
           "What is the heading of the camera? Answer: <number> degrees."],
    "S5": [f"The {{label}} is at {{box}} in image 1. Where is it in image 2? Answer: {BOX}.",
           f"An object is at {{box}} in image 1. Find it in image 2. Answer: {BOX}."],
    "S6": ["One {label} is at {box} in image 1, one at {box2} in image 2. Are they the same one? Answer yes or no.",
           "Is the {label} at {box} in image 1 the {label} at {box2} in image 2? Answer yes or no."],
    "S6 any": ["One object is at {box} in image 1, one at {box2} in image 2. Are they the same one? Answer yes or no.",
               "Is the object at {box} in image 1 the object at {box2} in image 2? Answer yes or no."],
}


class Question(NamedTuple):
    task: str
    prompt: str
    answer: str
    images: tuple
    label: str  # within which answers are balanced: object label, A4: first action named
    size: str  # D2, D4, S6: and within classes of what else the words tell: D2 how far the camera goes and how large the object is, `shift_class`
    order: float  # 0..1, hashed: what is dropped or drawn goes by it, so that nothing depends on the order of the views
    view: dict
    difficulty: str = ""  # of a pair: see `difficulty`


class Seen(NamedTuple):
    """An object in one frame. `usable`: fit for a question; `visible`: at least partly in the picture, or perhaps."""
    label: str
    box: list
    text: str
    usable: bool
    visible: bool
    distance_m: float | None


def rng(*key) -> random.Random:
    """A generator of its own for every key. Python's, because numpy's takes longer to seed than a question to write."""
    return random.Random(hashlib.sha256(repr(key).encode()).digest())


def look(objects: list[dict], cfg: Config) -> dict[object, Seen]:
    """The objects of one frame by id, with the boxes as the questions write them."""
    seen, low, high = {}, 1000 * cfg.border, 1000 - 1000 * cfg.border
    for entry in objects:
        if entry["box"] is None or entry.get("visible_px") == 0:
            seen[entry["id"]] = Seen(entry["label"], [], "", False, False, None)
            continue
        x1, y1, x2, y2 = entry["box"]
        box = [min(1000, int(v / cfg.box_step + 0.5) * cfg.box_step) for v in entry["box"]]
        usable = (x1 >= low and y1 >= low and x2 <= high and y2 <= high and entry.get("score", 1) >= cfg.min_score
                  and cfg.min_area <= (x2 - x1) * (y2 - y1) / 1e6 <= cfg.max_area and box[0] < box[2] and box[1] < box[3])
        seen[entry["id"]] = Seen(entry["label"], box, str(box), usable, True, entry.get("distance_m"))
    return seen


def false_statement(actions: list, values: dict, motions: dict, draw: random.Random, cfg: Config) -> list | None:
    """Another motion with as many steps (`motions[steps]`, so that A4 also has false statements that are plainly so), or a near miss: one step's
    direction or magnitude, or the order, changed. Its pose really differs.

    Magnitudes come from those in the data (`values[name]`), so that a statement's numbers don't tell whether it is true.
    """
    x, z, yaw = pose(actions)
    for kind in draw.sample(["other", "direction", "magnitude", "order"], 4):
        step = draw.randrange(len(actions))
        name, value = actions[step]
        if kind == "other":
            changed = draw.choice(motions.get(len(actions), [actions]))
        elif kind == "order":
            changed = actions[::-1]
        elif kind == "direction":
            other = draw.choice([one for one in (TURNS if name in TURNS else MOVES) if one != name])
            changed = [*actions[:step], (other, value), *actions[step + 1:]]
        else:
            changed = [*actions[:step], (name, draw.choice(values[name])), *actions[step + 1:]]
        x2, z2, yaw2 = pose(changed)
        if math.hypot(x - x2, z - z2) >= cfg.near_miss_m or abs((yaw - yaw2 + 180) % 360 - 180) >= cfg.near_miss_deg:
            return changed
    return None


def middle(one: Seen) -> float:
    return (one.box[0] + one.box[2]) / 2


def shift_class(before: Seen, after: Seen, actions: list) -> str:
    """How far to the side, how much larger and how much wider for its height the second box is, in coarse classes, with the turn that the words may
    tell: D4 and S6 are balanced within them, for else the two boxes alone would tell whether they show one object. A turn to the left counts as its
    mirror image."""
    (l1, t1, r1, b1), (l2, t2, r2, b2) = before.box, after.box
    turn = sum(TURNS[name] * value for name, value in actions if name in TURNS)
    shift = (middle(after) - middle(before)) * (-1 if turn < 0 else 1)
    growth = math.log2((r2 - l2) * (b2 - t2) / ((r1 - l1) * (b1 - t1)))
    wider = 2 * math.log2((r2 - l2) * (b1 - t1) / ((b2 - t2) * (r1 - l1)))
    return f"{'turned ' if turn else ''}{round(shift / 200)} {round(growth)} {round(wider)}"


def mixed(draw: random.Random, one: list, other: list, most: int) -> list:
    """At most `most` of two lists, one of each before two of a kind: balancing then drops little."""
    sides = draw.sample([draw.sample(one, len(one)), draw.sample(other, len(other))], 2)
    return [side[i] for i in range(most) for side in sides if i < len(side)][:most]


class Asker:
    """Writes all questions about one view. Holds what the questions about one view take from all of them."""

    def __init__(self, cfg: Config, views: list[dict]):
        self.cfg, self.dropped, self.asked_pictures = cfg, Counter(), set()
        self.caps = read_caps(cfg.caps)
        self.values, self.motions, labels = defaultdict(list), defaultdict(list), {"real": set(), "simulated": set()}
        for view in views:
            self.motions[len(view["actions"])].append([tuple(action) for action in view["actions"]])
            for name, value in view["actions"]:
                self.values[name].append(value)
            labels[view["source"]].update(entry["label"] for frame in view["objects"] or [] for entry in frame)
        self.values = {name: sorted(values) for name, values in self.values.items()}  # the order of the views must not matter
        self.motions = {steps: sorted(motions) for steps, motions in self.motions.items()}
        self.labels = {source: sorted(names) for source, names in labels.items()}
        self.max_move_m = max((v for name in MOVES for v in self.values.get(name, ())), default=0)
        self.max_turn_deg = max((v for name in TURNS for v in self.values.get(name, ())), default=0)
        shared = {lengths: shared_poses(self.max_move_m, self.max_turn_deg, lengths) for lengths in set(ONE_ANSWER.values())}
        self.shared = {task: shared[lengths][0] for task, lengths in ONE_ANSWER.items()}
        self.enumerated = {task: shared[lengths][1] for task, lengths in ONE_ANSWER.items()}

    def only_answer(self, task: str, actions: list) -> bool:
        return len(actions) in ONE_ANSWER[task] and alternate(actions) and int(pose_key(*pose(actions))) not in self.shared[task]

    def caps_of(self, view: dict, where) -> dict[str, int]:
        """The caps on one pair or picture: a cap below 1 is 1 on that share of them."""
        return {task: cap if cap >= 1 else int(rng(self.cfg.seed, view["scene_id"], view["traj_id"], where, task, "cap").random() < cap)
                for task, cap in self.caps.items()}

    def ask(self, view: dict) -> list[Question]:
        """All candidates of a view; balancing drops some later."""
        nodes = [k for k, index in enumerate(view["keyframes"]) if index in view["kept"]]
        joins = [(0, len(view["actions"]))] if self.cfg.pairs == "ends" else [(a, b) for a in nodes for b in nodes if a < b]
        frame_of = [view["kept"].index(index) if index in view["kept"] else None for index in view["keyframes"]]
        seen = {k: look(view["objects"][frame_of[k]], self.cfg) for k in sorted({*sum(joins, ())})} if view["objects"] else {}
        questions = []
        for a, b in joins:
            if 0 < self.cfg.most_actions < b - a:
                continue
            actions = [tuple(action) for action in view["actions"][a:b]]
            images = (view["frames"][frame_of[a]], view["frames"][frame_of[b]])
            questions += self.ask_pair(view, (a, b), actions, images, seen.get(a, {}), seen.get(b, {}))
        for k in sorted({*sum(joins, ())}):
            x, z, yaw = view["poses"][frame_of[k]]
            picture = (view["scene_id"], x, z, yaw, view["start"] is None and k > 0 and view["traj_id"])
            if picture not in self.asked_pictures:  # trajectories that share a start share that picture
                self.asked_pictures.add(picture)
                questions += self.ask_picture(view, k, view["frames"][frame_of[k]], seen.get(k, {}), yaw)
        return questions

    def ask_pair(self, view: dict, pair: tuple, actions: list, images: tuple, before: dict, after: dict) -> list[Question]:
        """The eight tasks on one pair, S5 and S6; `before` and `after` hold the objects of its two pictures by id."""
        questions, words = [], say(actions)
        caps = self.caps_of(view, pair)

        def generator(task):
            return rng(self.cfg.seed, view["scene_id"], view["traj_id"], pair, task)

        def add(task, draw, answer, label="", size="", template=None, **words):
            prompt = "<image>" * (1 if task == "D2" else 2) + draw.choice(TEMPLATES[template or task]).format(label=label, **words)
            questions.append(Question(task, prompt, answer, images[:1] if task == "D2" else images, label, size, draw.random(), view,
                                      difficulty(actions)))

        task = "A3" if len(actions) > 1 else "A2" if actions[0][0] in TURNS else "A1"
        if not caps[task]:
            pass
        elif self.only_answer(task, actions):
            add(task, generator(task), words)
        else:
            self.dropped[f"{task}: not the only sequence to its pose"] += 1

        draw = generator("A4")
        for truth in (draw.sample([True, False], 2) * caps["A4"])[:caps["A4"]]:
            statement = actions if truth else false_statement(actions, self.values, self.motions, draw, self.cfg)
            if statement is None:
                self.dropped["A4: no false statement far enough from the truth"] += 1
            else:
                add("A4", draw, "true" if truth else "false", VERB[statement[0][0]], actions=say(statement))

        usable = [key for key, one in before.items() if one.usable]
        both = [key for key in usable if key in after and after[key].usable]
        moved = [key for key in both if before[key].text != after[key].text]  # else the prompt would hold its answer
        self.dropped["D1: box unchanged"] += len(both) - len(moved)
        if moved and caps["D1"]:
            draw = generator("D1")
            for key in draw.sample(moved, min(caps["D1"], len(moved))):
                add("D1", draw, after[key].text, before[key].label, box=before[key].text, actions=words)
        if moved and caps["S5"]:
            draw = generator("S5")
            for key in draw.sample(moved, min(caps["S5"], len(moved))):
                add("S5", draw, after[key].text, before[key].label, box=before[key].text)

        gone = [key for key in usable if (not after[key].visible if key in after else view["exact"])]
        self.dropped["D2: partly visible afterwards, or unknown"] += len(usable) - len(both) - len(gone)
        if (gone or both) and caps["D2"]:
            draw = generator("D2")
            for key in mixed(draw, gone, both, caps["D2"]):
                width, height = (before[key].box[i + 2] - before[key].box[i] for i in (0, 1))
                size = f"{difficulty(actions)} {'large' if width * height > 40_000 else 'small'}"
                add("D2", draw, "no" if key in both else "yes", before[key].label, size, box=before[key].text, actions=words)

        if both and caps["D3"]:
            if self.only_answer("D3", actions):
                draw = generator("D3")
                for key in draw.sample(both, min(caps["D3"], len(both))):
                    add("D3", draw, words, before[key].label, box=before[key].text, box2=after[key].text)
            elif len(actions) <= 2:
                self.dropped["D3: not the only sequence to its pose"] += 1

        # D4, S6: for `yes` as for `no` the pictures show a second object of that label, so neither the words nor the label tell
        twins, other_twins = [], []
        for key in usable:
            first, second = ([k for k, one in seen.items() if k != key and one.visible and one.label == before[key].label]
                             for seen in (before, after))
            twins += [(key, key)] * (key in both and bool(first or second))
            other_twins += [(key, k) for k in second if after[k].usable]
        others = [(key, k) for key in usable for k, one in after.items() if k != key and one.usable]
        any_same = [(key, key) for key in both]
        d4 = ("D4", "D4", twins, other_twins)
        if least := self.cfg.near_miss_box:
            d4 = ("D4", "D4 any", any_same, [(key, k) for key, k in others if key in both and abs(middle(after[key]) - middle(after[k])) >= least])
        for task, template, same, other in (d4, ("S6", "S6", twins, other_twins), ("S6", "S6 any", any_same, others)):
            draw = generator(template)
            for key, k in mixed(draw, same, other, caps[task]):
                size = "" if template == "D4 any" else f"{template} {shift_class(before[key], after[k], actions)}"
                add(task, draw, "yes" if key == k else "no", before[key].label, size, template, box=before[key].text, box2=after[k].text,
                    actions=words)
        return questions

    def ask_picture(self, view: dict, k: int, image: str, seen: dict, yaw: float) -> list[Question]:
        """S1-S4 on one picture. S2 needs exact objects (a detector may miss one), S3 distances, S4 a room with a heading."""
        questions, caps, draw = [], self.caps_of(view, k), rng(self.cfg.seed, view["scene_id"], view["traj_id"], k, "S")

        def add(task, answer, label="", box="", template=None, size=""):
            words = draw.choice(TEMPLATES[template or task]).format(label=label, box=box)
            questions.append(Question(task, "<image>" + words, answer, (image,), label, size, draw.random(), view))

        shown = Counter(one.label for one in seen.values() if one.visible)
        usable = [one for one in seen.values() if one.usable]
        alone = [one for one in usable if shown[one.label] == 1]
        for one in draw.sample(alone, min(caps["S1"], len(alone))):
            add("S1", one.text, one.label)
        if view["exact"]:
            here = sorted({one.label for one in usable})
            absent = [label for label in self.labels[view["source"]]
                      if not any(label.endswith(one) or one.endswith(label) for one in shown)]  # "ball" is not absent where a "red ball" is
            for label in mixed(draw, here, absent, caps["S2"]):
                add("S2", "yes" if label in shown else "no", label)
            for one in draw.sample(usable, min(caps["S2"], len(usable))):  # at the box of an object: its own label, or that of another
                wrong = [label for label in here if not label.endswith(one.label) and not one.label.endswith(label)]
                true = draw.random() < 0.5
                if true or wrong:
                    (x1, y1, x2, y2) = one.box
                    add("S2", "yes" if true else "no", one.label if true else draw.choice(wrong), one.text, "S2 at box",
                        f"{round(math.log2((x2 - x1) / (y2 - y1)))} {round(math.log2((x2 - x1) * (y2 - y1)))}")  # the box's form does not tell
        near = [one for one in usable if one.distance_m is not None]
        for one in draw.sample(near, min(caps["S3"], len(near))):
            unique = shown[one.label] == 1 and draw.random() < 0.7
            add("S3", f"{round(one.distance_m, 1):g} meters", one.label, one.text, "S3" if unique else "S3 at box")
        if caps["S4"] and view["start"] is not None and yaw % 10 == 0:
            add("S4", f"{yaw:g} degrees")
        return questions


def read_caps(pairs: list[str]) -> dict[str, float]:
    """["D1=2", "A4=0.2", ...] -> {"D1": 2, "A4": 0.2, ...}; tasks not named get 1."""
    caps = dict.fromkeys([*EIGHT, *STATIC], 1)
    for pair in pairs:
        task, _, number = pair.partition("=")
        if task not in caps or not re.fullmatch(r"\d+|0?\.\d+", number):
            stop(f"--caps {pair!r}: write TASK=NUMBER, where TASK is one of {' '.join(caps)} and NUMBER is whole or below 1")
        caps[task] = float(number) if "." in number else int(number)
    return caps


# ---- balancing and drawing -----------------------------------------------------------------------------------------------------

def balanced_pairs(questions: list[Question]) -> list[tuple[Question, Question]]:
    """Yes/no questions of one task -> pairs of a yes and a no with one label and size; what is left over is dropped, by hashed order."""
    sides = defaultdict(lambda: ([], []))
    for question in sorted(questions, key=lambda q: q.order):
        sides[question.label, question.size][YES_NO[question.task].index(question.answer)].append(question)
    return [pair for label in sorted(sides) for pair in zip(*sides[label])]


def draw_questions(questions: list[Question], most: int = 0) -> list[Question]:
    """Yes/no tasks balanced for each label, at most `most` a task (0: all), by hashed order of pairs; the questions' order stays."""
    keep = set()
    for task in {question.task for question in questions}:
        of_task = [question for question in questions if question.task == task]
        units = balanced_pairs(of_task) if task in YES_NO else [(question,) for question in of_task]
        units.sort(key=lambda unit: unit[0].order)
        keep.update([id(question) for unit in units for question in unit][:most or None])
    return [question for question in questions if id(question) in keep]


def as_record(q: Question) -> dict:
    return {"task_type": q.task, "messages": [{"role": "user", "content": q.prompt}, {"role": "assistant", "content": q.answer}],
            "images": list(q.images)} | {key: q.view[key] for key in ("scene_id", "traj_id", "split", "source", "teacher")} \
        | ({"difficulty": q.difficulty} if q.difficulty else {})


# ---- what was made: card.json, examples.png ------------------------------------------------------------------------------------

def card(files: dict[str, list[Question]], asker: Asker) -> dict:
    """Counts, balances and audits. The audits look at the finished questions again, they don't trust the code that wrote them."""
    counts = {name: dict(sorted(Counter(q.task for q in questions).items())) for name, questions in files.items()}
    sources = {name: dict(sorted(Counter(q.view["source"] for q in questions).items())) for name, questions in files.items()}
    difficulties = {name: {task: dict(sorted(Counter(q.difficulty for q in questions if q.task == task).items())) for task in EIGHT}
                    for name, questions in files.items() if name != "static"}
    leak, twin, tilt = "prompt holds its answer", "A1-A3, D3 not the only sequence", "yes/no off balance by over 2 points"
    balance, audits = {}, {leak: 0, twin: 0, tilt: 0}
    for name, questions in files.items():
        tally = defaultdict(Counter)
        for q in questions:
            if q.task in YES_NO:
                tally[q.task, "all"][q.answer] += 1
                tally[q.task, q.label][q.answer] += 1
            else:
                audits[leak] += q.answer in q.prompt
            if q.task in ONE_ANSWER:
                audits[leak] += any(word in q.prompt.split() for word in ("left", "right", "forward", "backward"))
                audits[twin] += not asker.only_answer(q.task, unsay(q.answer))
        for (task, label), answers in sorted(tally.items()):
            yes, no = (answers[word] for word in YES_NO[task])
            balance.setdefault(name, {}).setdefault(task, {})[label] = f"{yes} {YES_NO[task][0]}, {no} {YES_NO[task][1]}"
            odd = name in ("grpo", "heldout") and abs(yes - no) == 1  # files cut to a number: the last of an odd one has no partner
            audits[tilt] += abs(yes / (yes + no) - 0.5) > 0.02 and not odd
    answers = {}
    for task in [*EIGHT, *STATIC]:  # the shape of the answers, numbers as #, and the spread of the numbers
        given = [q.answer for name in ("static", "sft", "heldout") for q in files[name] if q.task == task]
        shapes = Counter(re.sub(r"[\d.]+", "#", answer) for answer in given).most_common(12)
        numbers = [float(number) for answer in given for number in re.findall(r"[\d.]+", answer)]
        answers[task] = {"shapes": dict(shapes)} | ({"smallest": min(numbers), "mean": round(float(np.mean(numbers)), 2),
                                                     "largest": max(numbers)} if numbers else {})
    grid = {"longest_move_m": asker.max_move_m, "widest_turn_deg": asker.max_turn_deg, "sequences_enumerated": asker.enumerated}
    return {"counts": counts, "sources": sources, "difficulties": difficulties, "audits_must_be_0": audits,
            "dropped": dict(sorted(asker.dropped.items())), "grid": grid, "answers": answers, "balance": balance}


def unsay(text: str) -> list:
    """The inverse of `say`."""
    name_of = {words: name for name, words in VERB.items()}
    return [(name_of[" ".join(words[:2])], float(words[2])) for words in (part.split() for part in text.split("; "))]


def examples(files: dict[str, list[Question]], run: Path) -> Image.Image:
    """Two questions a task, first by hashed order, as a student meets them: pictures, words, and the answer below.

    Boxes that the question names are yellow, the one that is the answer is green.
    """
    side_px, gap_px, text_px, columns = 210, 10, 132, 4
    font, bold = ImageFont.load_default(14), ImageFont.load_default(17)
    chosen = []
    for task in [*EIGHT, *STATIC]:
        of_task = [q for name in ("sft", "static", "heldout") for q in files[name] if q.task == task]
        of_task.sort(key=lambda q: q.order)
        sides = [[q for q in of_task if q.answer == word] for word in YES_NO.get(task, ())]
        chosen += [q for side in sides for q in side[:1]] or of_task[:2]
    cell = (2 * side_px + 2 * gap_px, side_px + text_px)
    page = Image.new("RGB", (columns * cell[0] + gap_px, -(-len(chosen) // columns) * cell[1] + gap_px), "white")
    draw = ImageDraw.Draw(page)
    for number, q in enumerate(chosen):
        left, top = gap_px + number % columns * cell[0], gap_px + number // columns * cell[1]
        asked = [[int(v) for v in re.findall(r"\d+", box)] for box in re.findall(r"\[\d[^]]*\]", q.prompt)]
        answer = [[int(v) for v in re.findall(r"\d+", q.answer)]] if q.answer.startswith("[") else []
        for place, path in enumerate(q.images):
            picture = open_picture(run / path)
            scale = side_px / max(picture.size)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
            x0 = left + place * (side_px + 4)
            page.paste(picture, (x0, top))
            boxes = [(box, "yellow") for box in asked[place:place + 1]]
            boxes += [(box, "lime") for box in answer if place == len(q.images) - 1]
            for box, colour in boxes:
                corner = [x0 + box[0] / 1000 * picture.width, top + box[1] / 1000 * picture.height,
                          x0 + box[2] / 1000 * picture.width, top + box[3] / 1000 * picture.height]
                draw.rectangle(corner, outline="black", width=4)
                draw.rectangle([corner[0] + 1, corner[1] + 1, corner[2] - 1, corner[3] - 1], outline=colour, width=2)
        lines = wrap(f"{q.task}  " + q.prompt.replace("<image>", ""), font, 2 * side_px)
        draw.multiline_text((left, top + side_px + 3), "\n".join(lines), fill="black", font=font, spacing=3)
        said = "\n".join(wrap(q.answer, bold, 2 * side_px))
        draw.multiline_text((left, top + side_px + 6 + 18 * len(lines)), said, fill=(0, 110, 40), font=bold)
    return page


def wrap(text: str, font, width_px: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        fits = font.getlength(f"{lines[-1]} {word}") <= width_px
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if fits else [lines[-1], word]
    return lines


def main(cfg: Config):
    started, run = time.perf_counter(), Path(cfg.run)
    choices = {"directions": ("forward", "inverse", "both"), "sources": ("real", "simulated", "both"),
               "pairs": ("ends", "keyframes")}
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            stop(f"--{name} {getattr(cfg, name)!r}: choose one of {' '.join(allowed)}")
    if unknown := [task for task in cfg.tasks if task not in (*EIGHT, *STATIC)]:
        stop(f"--tasks {' '.join(unknown)}: unknown; choose among {' '.join((*EIGHT, *STATIC))}")
    read_caps(cfg.caps)
    folder = run / cfg.out
    meta = begin(folder, {key: value for key, value in asdict(cfg).items() if key != "run"}, run / "2_views")
    views, skipped = load_views(run, keep_c2w=bool(cfg.detector))
    if not views:
        stop(f"{run}/2_views/views.jsonl holds no usable view: look at 2_views/contact_sheet.png and run 02 again")

    without_boxes = [view for view in views if view["objects"] is None]
    if cfg.detector and without_boxes:
        detect = load_detector(cfg.detector, cfg.detector_labels, cfg.detector_threshold)
        for view in tqdm(without_boxes, desc="boxes", unit="trajectory"):
            view["objects"] = track(view, detect([run / frame for frame in view["frames"]]))
            del view["c2w"]

    asking = time.perf_counter()
    asker = Asker(cfg, views)
    candidates = [question for view in tqdm(views, desc="questions", unit="trajectory") for question in asker.ask(view)]
    directed = {"forward": FORWARD, "inverse": INVERSE, "both": EIGHT}[cfg.directions]
    train = [q for q in candidates if q.view["split"] == "train" and cfg.sources in ("both", q.view["source"])
             and q.task in cfg.tasks and q.task in (*directed, *STATIC)]
    files = {"static": draw_questions([q for q in train if q.task in STATIC]),
             "sft": draw_questions([q for q in train if q.task not in STATIC])}
    files["grpo"] = draw_questions(files["sft"], cfg.grpo_per_task) if cfg.grpo_per_task else []
    files["heldout"] = draw_questions([q for q in candidates if q.view["split"] == "heldout"], cfg.heldout_per_task)
    asker.dropped["surplus of one yes/no answer"] = len(train) - len(files["static"]) - len(files["sft"])
    total = sum(len(files[name]) for name in ("static", "sft", "heldout"))
    if not total:
        stop(f"none of {len(views)} views gives a question with these settings; choose other --tasks, --directions or --sources")
    for name, questions in files.items():
        save(folder / f"{name}.jsonl", "".join(json.dumps(as_record(q), ensure_ascii=False) + "\n" for q in questions))
    seconds = time.perf_counter() - asking

    boxless = sum(view["objects"] is None for view in views)
    summary = {"views": {"used": len(views), "skipped": dict(skipped), "without_boxes": boxless}} | card(files, asker)
    save(folder / "card.json", json.dumps(summary, indent=1, ensure_ascii=False))
    page = io.BytesIO()
    examples(files, run).save(page, "PNG")
    save(folder / "examples.png", page.getvalue())
    if failed := {name: number for name, number in summary["audits_must_be_0"].items() if number}:
        stop(f"audit failed: {failed}; a fault of this script: please report it with {folder}/card.json")
    finish(folder, meta, {name: len(questions) for name, questions in files.items()}, started)

    print(f"\n{'':8}" + "".join(f"{task:>8}" for task in (*EIGHT, *STATIC)) + f"{'all':>9}")
    for name, questions in files.items():
        of_task = Counter(q.task for q in questions)
        print(f"{name:8}" + "".join(f"{of_task[task]:8}" for task in (*EIGHT, *STATIC)) + f"{len(questions):9}")
    print(f"{total} questions in {seconds:.1f} s, {total / seconds:.0f} a second")
    for why, number in [*skipped.items(), *sorted(asker.dropped.items())]:
        if number:
            print(f"{number:8} {'trajectories skipped' if why in skipped else 'dropped'}: {why}")
    if boxless:
        print(f"{boxless:8} trajectories have no boxes, so only A1-A4 ask about them; --detector would find some")
    print(f"next: python 04_train_sft.py --run {cfg.run}")


if __name__ == "__main__":
    run(main, Config)
