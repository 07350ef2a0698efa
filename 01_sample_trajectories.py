"""Stage 1: sample where the camera goes. World2VLM (arXiv 2604.26934) teaches a VLM from pairs "action -> what you see
afterwards"; this script draws the actions, turns them into camera poses and, for procedural rooms, draws the rooms themselves.

A trajectory is one of six single actions, a preset (forward then turn, ...) or a random sequence of 2-3 actions in which turns
and moves alternate. An action of value v becomes max(min_frames - 1, ceil(|v| / max_step)) equal steps along the camera's axes:

    c2w[i+1] = c2w[i] @ [R(dyaw) | dt],   R(yaw) = [[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]],   right turn = +yaw

in OpenCV axes (x right, y down, z forward), metres, c2w[0] = identity. In a room no frame comes nearer than --margin_m to a wall
or an object.

Where we depart from the paper: actions lie on a coarse grid (0.1 m, 10 degrees), and sequences that have a double are not drawn.
None turns by 90 degrees ("turn right 90; forward 1" ends where "right 1; turn right 90" does), and the turns of turn-move-turn go
the same way ("turn right 60; forward 1; turn left 30" ends where "turn left 30; right 1; turn right 60" does). Stage 3, which
enumerates the grid, finds the few that remain.

Reads   --images: a folder of jpg, png and webp pictures, or a manifest.jsonl with lines {"image": "a.jpg", "fov_x_deg": 63.5},
        the field of view being optional; --rooms N: nothing.
Writes  RUN/1_trajectories/rooms/room_00000.json (world axes: x right, y down, z forward; floor y = 0, the middle x = z = 0)
            {"scene_id": "room_00000", "width_m": 6.1, "depth_m": 7.4, "height_m": 2.8, "camera_height_m": 1.5, "texture_seed": 8,
             "objects": [{"id": 0, "label": "red ball", "shape": "ball", "color": [215, 40, 40], "center_m": [1.0, -0.4, 2.0],
             "size_m": [0.8, 0.8, 0.8], "yaw_deg": 0.0}, ...]}
        RUN/1_trajectories/trajectories.jsonl, one line a trajectory (keyframes: frame index after each action, 0 first; start:
        x_m, z_m, yaw_deg of frame 0 in its room, null for photographs; anchor: the photograph, null for rooms)
            {"scene_id": "room_00000", "traj_id": "t000", "source": "simulated", "anchor": null, "room":
             "1_trajectories/rooms/room_00000.json", "split": "train", "width": 112, "height": 112, "fov_x_deg": 90.0, "actions":
             [["turn_left", 40.0]], "keyframes": [0, 8], "c2w": [[[1.0, 0.0, ...], ...], ...], "start": [0.52, -1.3, 40.0]}
        RUN/1_trajectories/trajectories.png (top view), meta.json

    python 01_sample_trajectories.py --run runs/demo --rooms 3000           # 20 s on one core, 40 MB
    python 01_sample_trajectories.py --run runs/mine --images ~/photos

Every draw is seeded by (seed, scene, trajectory, purpose): more rooms or trajectories leave the earlier ones as they were.
"""
import argparse
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import resource
import socket
import struct
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser

matplotlib.use("Agg")  # files only, no screen
import matplotlib.pyplot as plt  # noqa: E402

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
    run: str = setting("runs/demo", "folder of this run; this stage writes RUN/1_trajectories")
    images: str = setting("", "photographs: a folder (searched to its bottom), one picture, or a manifest.jsonl of {image, "
                              "fov_x_deg}, whose relative paths start at its own folder and stay inside it")
    rooms: int = setting(0, "procedural rooms to draw")
    room_trajectories: int = setting(7, "trajectories a room, each from its own start: they see it from all sides")
    photo_trajectories: int = setting(7, "trajectories a photograph, all different, all from where it was taken")
    actions: str = setting("all", "all | turns | moves. turns: single turns only, which the teacher `warp` draws without depth; "
                                  "moves: single moves only, because two moves in a row commute and their order leaves no trace")
    shares: list[float] = setting([0.6, 0.2, 0.2], "shares of single-step, preset and random trajectories: A1 and A2 ask the first")
    move_m: list[float] = setting([0.3, 2.0], "shortest and longest move, metres: less hardly shows, more seldom fits a room")
    move_grid_m: float = setting(0.1, "moves are multiples of this, metres: what an answer can name")
    turn_deg: list[float] = setting([10.0, 80.0], "least and largest turn in a room, degrees: 90 leaves nothing of the view, and makes A3 ambiguous")
    photo_turn_deg: list[float] = setting([10.0, 30.0], "the same for photographs, degrees: of a 54-degree view, 30 leave 24")
    turn_grid_deg: float = setting(10.0, "turns are multiples of this, degrees")
    max_step_m: float = setting(0.2, "largest move between two frames, metres: what the video teachers were made for")
    max_step_deg: float = setting(5.0, "largest turn between two frames, degrees")
    min_frames: int = setting(8, "least frames an action, first and last counted")
    room_px: int = setting(112, "side of a room's square frames, pixels")
    room_fov_deg: float = setting(90.0, "field of view in rooms, degrees")
    room_side_m: list[float] = setting([5.0, 9.0], "range of a room's width and of its depth, metres")
    objects: list[int] = setting([4, 7], "fewest and most objects a room")
    same_label_share: float = setting(0.33, "share of rooms in which two objects bear the same label (`ball`: a red one and a blue one of one size); task D4 needs them")
    twins: int = setting(1, "pairs of objects with one label in those rooms, at most 4")
    twin_gap_m: float = setting(0.0, "widest gap between the two of a pair, metres; 0: any")
    camera_height_m: float = setting(1.5, "height of the camera, metres: one for all rooms, so that the floor tells distances")
    margin_m: float = setting(0.3, "least distance of any frame's camera to walls and objects, metres")
    long_side_px: int = setting(576, "longer side of photographs' frames, pixels (never enlarged): Stable Virtual Camera's")
    min_side_px: int = setting(32, "photographs with a shorter side below this when stored are skipped, pixels")
    max_megapixels: float = setting(200.0, "larger photographs are skipped undecoded: a few kilobytes can claim gigabytes")
    photo_fov_deg: float = setting(54.0, "field of view along the longer side where EXIF data tell no focal length, degrees")
    heldout: float = setting(0.05, "share of scenes kept out of training: at least one room and one photograph, given two")
    seed: int = setting(0, "base of every draw")


# ---------------------------------------------------------------------------- actions and poses
# N frames of a trajectory, S candidate starts, P points, O objects

TURNS = {"turn_left": -1, "turn_right": 1}  # sign of yaw
MOVES = {"forward": (0, 1), "backward": (0, -1), "shift_left": (-1, 0), "shift_right": (1, 0)}  # along the camera's (x, z)
CLASSES = {"turn": list(TURNS), "shift": ["shift_left", "shift_right"], "move": list(MOVES)}
PRESETS = [("forward", "turn"), ("turn", "forward"), ("backward", "turn"), ("shift", "turn"), ("turn", "shift"),
           ("forward", "turn", "forward"), ("turn", "forward", "turn"), ("shift", "turn", "forward")]
RANDOMS = [("move", "turn"), ("turn", "move"), ("move", "turn", "move"), ("turn", "move", "turn")]


def integrate(actions: list, max_step_m: float = 0.2, max_step_deg: float = 5.0,
              min_frames: int = 8) -> tuple[np.ndarray, list[int]]:
    """[(name, value), ...] in metres and degrees -> c2w float32 [N, 4, 4] and the frame index after each action, 0 first.

    integrate([("turn_left", 40)]) -> 9 frames, keyframes [0, 8]: 40 degrees are 8 steps of 5. Each action starts at the last pose
    of the one before, which is not repeated. ValueError for an unknown name or a value that is not finite.
    """
    x_m, z_m, yaw_deg, keyframes = [np.zeros(1)], [np.zeros(1)], [np.zeros(1)], [0]
    for name, value in actions:
        if name not in TURNS and name not in MOVES:
            raise ValueError(f"unknown action {name!r}: choose from {', '.join([*MOVES, *TURNS])}")
        if not math.isfinite(value):
            raise ValueError(f"{name} {value}: the value must be a finite number")
        # 1e-9: a quotient of 3.0000000000000004 means 3 steps
        steps = max(math.ceil(abs(value) / (max_step_deg if name in TURNS else max_step_m) - 1e-9), 1, min_frames - 1)
        part = value * np.arange(1, steps + 1) / steps
        right, ahead = MOVES.get(name, (0, 0))
        cos, sin = np.cos(np.deg2rad(yaw_deg[-1][-1])), np.sin(np.deg2rad(yaw_deg[-1][-1]))
        x_m.append(x_m[-1][-1] + part * (right * cos + ahead * sin))  # R(yaw) @ (right, 0, ahead)
        z_m.append(z_m[-1][-1] + part * (ahead * cos - right * sin))
        yaw_deg.append(yaw_deg[-1][-1] + part * TURNS.get(name, 0))
        keyframes.append(keyframes[-1] + steps)
    yaw = np.deg2rad(np.concatenate(yaw_deg))
    c2w = np.tile(np.eye(4), (len(yaw), 1, 1))
    c2w[:, 0, 0] = c2w[:, 2, 2] = np.cos(yaw)
    c2w[:, 0, 2], c2w[:, 2, 0] = np.sin(yaw), -np.sin(yaw)
    c2w[:, 0, 3], c2w[:, 2, 3] = np.concatenate(x_m), np.concatenate(z_m)
    return c2w.astype(np.float32), keyframes


def rng(*key) -> np.random.Generator:
    """A generator of its own for every (seed, scene, trajectory, purpose)."""
    return np.random.default_rng(list(hashlib.sha256(repr(key).encode()).digest()))


def grid(bounds: list[float], step: float) -> list[float]:
    """The multiples of `step` within the bounds: grid([0.3, 0.55], 0.1) -> [0.3, 0.4, 0.5]."""
    low, high = math.ceil(bounds[0] / step - 1e-9), math.floor(bounds[1] / step + 1e-9)
    return [round(k * step, 6) for k in range(low, high + 1)]


def draw_actions(g: np.random.Generator, cfg: Config, turns_deg: list[float], moves_m: list[float]) -> list[tuple[str, float]]:
    """One single step, preset or random sequence, for example [("shift_left", 0.7), ("turn_right", 30.0)]."""
    if cfg.actions == "all":
        kinds = [[("move",), ("turn",)], PRESETS, RANDOMS]  # as many single turns (A2) as single moves (A1)
        of_kind = kinds[g.choice(3, p=np.array(cfg.shares) / sum(cfg.shares))]
    else:
        of_kind = [(name,) for name in (TURNS if cfg.actions == "turns" else MOVES)]
    classes = of_kind[g.integers(len(of_kind))]
    names = [str(g.choice(CLASSES.get(name, [name]))) for name in classes]
    if len(classes) == 3 and classes[0] == "turn":  # opposite turns are ambiguous, see the docstring
        names[2] = names[0]
    if len(classes) > 1:  # so is a turn of 90 degrees beside a move
        turns_deg = [value for value in turns_deg if value % 90]
    return [(name, float(g.choice(turns_deg if name in TURNS else moves_m))) for name in names]


# ---------------------------------------------------------------------------- rooms
COLORS = {"red": (215, 40, 40), "green": (40, 165, 60), "blue": (45, 80, 220), "yellow": (240, 215, 40), "purple": (140, 50, 175),
          "orange": (245, 135, 25), "cyan": (50, 205, 215)}
SHAPES = {  # (least, most) diameter or side and (least, most) height, metres: high enough for a level camera at 1.5 m to see
    "ball": ((0.5, 1.1), None), "crate": ((0.5, 1.1), (0.5, 1.4)),
    "pillar": ((0.35, 0.7), (1.0, 1.6)), "cone": ((0.6, 1.1), (0.7, 1.6))}


def draw_object(g: np.random.Generator, label: str, twin: dict | None) -> dict:
    """An object without its place. Its label is a color and a shape, of a pair the shape alone: the second is the `twin` of the first in
    another color, so that the pictures tell the two apart, and neither their names nor the shapes of their boxes do."""
    *named, shape = label.split()
    colors = named or [color for color in COLORS if not twin or list(COLORS[color]) != twin["color"]]
    color = list(COLORS[colors[g.integers(len(colors))]])
    if twin:
        return {key: value for key, value in twin.items() if key != "id"} | {"color": color, "center_m": [0.0, twin["center_m"][1], 0.0]}
    side_m, tall_m = SHAPES[shape]
    size = [g.uniform(*side_m)] * 3 if tall_m is None else [g.uniform(*side_m), g.uniform(*tall_m), 0.0]
    size[2] = g.uniform(*side_m) if shape == "crate" else size[0]
    size = [round(float(side), 2) for side in size]
    lift_m = g.uniform(0.2, 1.0) if shape in ("ball", "crate") and g.random() < 0.3 else 0.0  # some hover at eye level
    yaw_deg = float(g.integers(360)) if shape == "crate" else 0.0
    return {"label": label, "shape": shape, "color": color, "center_m": [0.0, round(-lift_m - size[1] / 2, 3), 0.0],
            "size_m": size, "yaw_deg": yaw_deg}


def draw_room(scene_id: str, cfg: Config) -> dict:
    """A room and its objects, none touching another or a wall; an object that finds no place in 200 tries is left out."""
    g = rng(cfg.seed, scene_id, "room")
    width_m, depth_m = (round(float(side), 2) for side in g.uniform(*cfg.room_side_m, 2))
    room = {"scene_id": scene_id, "width_m": width_m, "depth_m": depth_m, "height_m": round(float(g.uniform(2.6, 3.2)), 2),
            "camera_height_m": cfg.camera_height_m, "texture_seed": int(g.integers(2 ** 31)), "objects": []}
    labels = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    labels = [labels[i] for i in g.permutation(len(labels))]
    if g.random() < cfg.same_label_share:  # the pairs' shapes have no other object in this room: "the red ball" is never one of them
        paired = [list(SHAPES)[i] for i in g.permutation(len(SHAPES))[:cfg.twins]]
        labels = [label for shape in paired for label in (shape, shape)] + [label for label in labels if label.split()[1] not in paired]
    for label in labels[:g.integers(cfg.objects[0], cfg.objects[1] + 1)]:
        twin = next((other for other in room["objects"] if other["label"] == label), None)
        thing = draw_object(g, label, twin)
        radius_m = outer_radius(thing)
        for x, z in g.uniform(-1, 1, (200, 2)) * (width_m / 2 - radius_m - 0.1, depth_m / 2 - radius_m - 0.1):
            if all(math.hypot(x - other["center_m"][0], z - other["center_m"][2]) > radius_m + outer_radius(other) + 0.2
                   for other in room["objects"]) and (not twin or not cfg.twin_gap_m or math.hypot(
                       x - twin["center_m"][0], z - twin["center_m"][2]) < 2 * radius_m + cfg.twin_gap_m):
                thing["center_m"] = [round(float(x), 2), thing["center_m"][1], round(float(z), 2)]
                room["objects"].append({"id": len(room["objects"]), **thing})
                break
    return room


def outer_radius(thing: dict) -> float:
    """Radius of the circle around an object's footprint, metres."""
    return math.hypot(thing["size_m"][0], thing["size_m"][2]) / 2 if thing["shape"] == "crate" else thing["size_m"][0] / 2


def turn_back(x: np.ndarray, z: np.ndarray, yaw_deg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World offsets -> the axes of a camera or crate with this yaw: the inverse of R(yaw)."""
    cos, sin = np.cos(np.deg2rad(yaw_deg)), np.sin(np.deg2rad(yaw_deg))
    return cos * x - sin * z, sin * x + cos * z


def clearance(points: np.ndarray, room: dict) -> np.ndarray:
    """Horizontal distance of points [..., 2] (x, z) to the nearest wall or footprint, metres; negative inside one -> [...]."""
    nearest = np.minimum(room["width_m"] / 2 - np.abs(points[..., 0]), room["depth_m"] / 2 - np.abs(points[..., 1]))
    for thing in room["objects"]:
        x, z = points[..., 0] - thing["center_m"][0], points[..., 1] - thing["center_m"][2]
        if thing["shape"] == "crate":
            x, z = turn_back(x, z, thing["yaw_deg"])
            x, z = np.abs(x) - thing["size_m"][0] / 2, np.abs(z) - thing["size_m"][2] / 2
            distance = np.hypot(np.maximum(x, 0), np.maximum(z, 0)) + np.minimum(np.maximum(x, z), 0)
        else:
            distance = np.hypot(x, z) - thing["size_m"][0] / 2
        nearest = np.minimum(nearest, distance)
    return nearest


def sees_something(starts: np.ndarray, room: dict, fov_deg: float) -> np.ndarray:
    """Starts [S, 3] (x, z, yaw) -> [S] bool: an object's middle is well inside the picture, and it fills at least 1.5 % of it.

    A question asks for 1 %; another object may stand before it, which stage 2 finds out exactly.
    """
    if not room["objects"]:
        return np.ones(len(starts), bool)
    center = np.array([thing["center_m"] for thing in room["objects"]])  # [O, 3]
    area_m2 = np.array([thing["size_m"][0] * thing["size_m"][1] for thing in room["objects"]])
    x, z = turn_back(center[:, 0] - starts[:, :1], center[:, 2] - starts[:, 1:2], starts[:, 2:])  # [S, O]
    y = center[:, 1] + room["camera_height_m"]
    half_m = np.maximum(z, 1e-6) * math.tan(math.radians(fov_deg) / 2)  # half the picture's width at the object's depth
    return ((z > 0.3) & (np.abs(x) < 0.85 * half_m) & (np.abs(y) < 0.85 * half_m) & (area_m2 > 0.015 * (2 * half_m) ** 2)).any(1)


def draw_walk(g: np.random.Generator, room: dict, cfg: Config, turns_deg: list[float],
              moves_m: list[float]) -> tuple[list, list] | None:
    """Actions and a start (x_m, z_m, yaw_deg) from which they touch nothing; None where 20 x 48 tries find none.

    48 starts are tried at once for each draw of actions, so that long moves are hardly rarer than short ones. A start that sees
    an object is preferred; one that sees none is taken when nothing else fits.
    """
    spare = None
    for _ in range(20):
        actions = draw_actions(g, cfg, turns_deg, moves_m)
        c2w, _keyframes = integrate(actions, cfg.max_step_m, cfg.max_step_deg, cfg.min_frames)
        path = c2w[:, [0, 2], 3].astype(float)
        path = path[np.append(True, np.abs(np.diff(path, axis=0)).sum(1) > 0)]  # frames of a turn share one place: [P, 2]
        reach_m = np.array([room["width_m"], room["depth_m"]]) / 2 - cfg.margin_m
        starts = np.column_stack([np.round(g.uniform(-1, 1, (48, 2)) * reach_m, 2), 10.0 * g.integers(36, size=48)])  # [S, 3]
        x, z = turn_back(path[:, 0], path[:, 1], -starts[:, 2:])  # turning back by -yaw is R(yaw): [S, P]
        free = clearance(np.stack([starts[:, :1] + x, starts[:, 1:2] + z], -1), room).min(1) > cfg.margin_m
        good = free & sees_something(starts, room, cfg.room_fov_deg)
        if good.any():
            return actions, starts[good.argmax()].tolist()
        if spare is None and free.any():
            spare = actions, starts[free.argmax()].tolist()
    return spare


# ---------------------------------------------------------------------------- photographs
Image.MAX_IMAGE_PIXELS = None  # read_photo has a limit of its own, with its own message
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError,
              struct.error)  # PIL raises each of these on one damaged file or another


def list_photos(source: str) -> tuple[list[tuple[Path, float | None]], int]:
    """--images -> [(absolute path, field of view or None), ...] in a fixed order, and how many manifest lines were unusable."""
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith("."))
        inside = [p for p in found if p.resolve().is_relative_to(path.resolve())]
        for p in sorted({*found} - {*inside}):  # a stranger's archive could so reach any picture of yours
            print(f"{p}: a link that leaves {path}, copy the picture there or name it in a manifest; skipped", file=sys.stderr)
        return [(p, None) for p in inside], len(found) - len(inside)
    if path.suffix.lower() in SUFFIXES:
        return [(path, None)], 0
    if path.suffix.lower() not in (".jsonl", ".json"):
        stop(f"--images {source}: no such folder, and neither a jpg, png or webp picture nor a manifest.jsonl")
    photos = []
    for number, record in read_lines(path, "image"):
        image, fov = record["image"], record.get("fov_x_deg")
        if not isinstance(image, str) or not image:
            print(f"{path}:{number}: \"image\": {image!r} is not a path; skipped", file=sys.stderr)
        elif fov is not None and (isinstance(fov, bool) or not isinstance(fov, (int, float)) or not 1 <= fov <= 170):
            print(f"{path}:{number}: {image}: fov_x_deg {fov!r} is not a number from 1 to 170; skipped", file=sys.stderr)
        else:
            photo = Path(os.path.abspath(path.parent / image))
            if os.path.isabs(image) or path.parent in photo.parents and photo.resolve().is_relative_to(path.parent.resolve()):
                photos.append((photo, fov))
            else:  # "../x.jpg" is a slip or a trick; an absolute path is meant
                print(f"{path}:{number}: {image}: leaves the manifest's folder, name it by its absolute path; skipped", file=sys.stderr)
    return photos, len(path.read_bytes().splitlines()) - len(photos)


def exif_focal_px(tags: dict, width: int, height: int) -> float | None:
    """Focal length in pixels of a picture of this size, or None where its EXIF tags hold no usable one.

    The 35 mm equivalent compares diagonals (CIPA DCG-001), that of film being 43.27 mm. Otherwise it is the focal length times
    the sensor's pixels per millimetre, scaled by how far the picture has been shrunk since.
    """
    long_px = max(width, height)
    try:
        equivalent_mm, focal_mm, per_unit, shot_width, shot_height = (
            float(tags.get(tag) or 0) for tag in (0xA405, 0x920A, 0xA20E, 0xA002, 0xA003))
    except (TypeError, ValueError):  # a text or a pair where a number belongs
        return None
    unit_mm = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}.get(tags.get(0xA210, 2))  # inches unless the tag says otherwise
    if equivalent_mm > 0:
        focal_px = equivalent_mm * math.hypot(width, height) / math.hypot(36, 24)
    elif focal_mm > 0 and per_unit > 0 and unit_mm:
        focal_px = focal_mm * per_unit / unit_mm * long_px / (max(shot_width, shot_height) or long_px)
    else:
        return None
    return focal_px if 2 < 2 * math.degrees(math.atan(long_px / 2 / focal_px)) < 150 else None  # beyond: a wrong tag, not a lens


def read_photo(path: Path, fov_x_deg: float | None, cfg: Config) -> dict:
    """Size of the stored frame (EXIF rotation applied) and field of view; raises one of UNREADABLE where the picture is broken."""
    if not path.is_file():
        raise ValueError("no such file")
    data = path.read_bytes()
    with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
        warnings.simplefilter("ignore")  # about odd EXIF data, which cost the focal length and nothing else
        if image.width * image.height > cfg.max_megapixels * 1e6:
            raise ValueError(f"{image.width}x{image.height} px are more than --max_megapixels {cfg.max_megapixels:g}")
        image.load()  # a truncated file shows only when it is decoded to its end
        exif = image.getexif()
        width, height = image.size[::-1] if exif.get(0x0112) in (5, 6, 7, 8) else image.size  # these four lie on their side
        focal_px = exif_focal_px(exif.get_ifd(0x8769), width, height)
    scale = min(1.0, cfg.long_side_px / max(width, height))
    frame_wh = [round(width * scale), round(height * scale)]
    if min(frame_wh) < cfg.min_side_px:
        raise ValueError(f"stored as {frame_wh[0]}x{frame_wh[1]} px, a side below --min_side_px {cfg.min_side_px}")
    if fov_x_deg is None:
        focal_px = focal_px or max(width, height) / 2 / math.tan(math.radians(cfg.photo_fov_deg) / 2)
        fov_x_deg = round(2 * math.degrees(math.atan(width / 2 / focal_px)), 4)
    digest = hashlib.sha256(data).hexdigest()
    return {"width": frame_wh[0], "height": frame_wh[1], "fov_x_deg": float(fov_x_deg), "digest": digest}


def why_unreadable(error: Exception) -> str:
    """One line for the user."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a JPEG, PNG or WebP picture"
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


def photo_scenes(photos: list[tuple[Path, float | None]], cfg: Config) -> list[dict]:
    """The photographs that can be read, each with a scene_id made from its name; the others are named on stderr."""
    scenes, taken = [], set()
    for path, fov in tqdm(photos, desc="photographs", unit="photo", disable=not photos):
        try:
            photo = read_photo(path, fov, cfg)
        except UNREADABLE as error:
            tqdm.write(f"{path}: {why_unreadable(error)}; skipped", file=sys.stderr)
            continue
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem).strip("_")[:60] or "photo"
        stem = f"photo_{stem}" if re.fullmatch(r"(?i)room_\d+", stem) else stem  # those names are the rooms'
        names = itertools.chain([stem], (f"{stem}_{k}" for k in itertools.count(2)))
        scene_id = next(name for name in names if name.lower() not in taken)
        taken.add(scene_id.lower())  # some file systems do not tell upper from lower case
        scenes.append({"scene_id": scene_id, "source": "real", "anchor": str(path), "room": None, **photo})
    return scenes


# ---------------------------------------------------------------------------- splits, records, picture
def draw_splits(scenes: list[dict], cfg: Config) -> dict[str, str]:
    """scene_id -> "train" | "heldout". A scene's own draw decides, so that a new scene moves no other; copies of a photograph
    share theirs. Where none of a source is drawn, its scene with the smallest draw is held out; where all are, the largest's is not.
    """
    splits = {}
    for source in ("simulated", "real"):
        draws = {scene["scene_id"]: rng(cfg.seed, scene.get("digest", scene["scene_id"]), "split").random()
                 for scene in scenes if scene["source"] == source}
        bar, ordered = cfg.heldout, sorted(set(draws.values()))
        if 0 < bar < 1 and len(ordered) > 1:
            bar = ordered[1] if bar <= ordered[0] else min(bar, ordered[-1])
        splits |= {scene_id: "heldout" if draw < bar else "train" for scene_id, draw in draws.items()}
    return splits


def draw_trajectories(scene: dict, room: dict | None, split: str, cfg: Config) -> tuple[list[dict], int]:
    """A scene's records in the order of their traj_id, and how many could not be placed."""
    turns_deg = grid(cfg.turn_deg if room else cfg.photo_turn_deg, cfg.turn_grid_deg)
    moves_m = grid(cfg.move_m, cfg.move_grid_m)
    records, used = [], []
    count = cfg.room_trajectories if room else cfg.photo_trajectories
    for index in range(count):
        g, start = rng(cfg.seed, scene["scene_id"], index, "trajectory"), None
        if room:
            found = draw_walk(g, room, cfg, turns_deg, moves_m)
            if found is None:
                continue
            actions, start = found
        else:  # all walks of a photograph start at one place: the same one twice would teach nothing
            actions = next((a for _ in range(100) if (a := draw_actions(g, cfg, turns_deg, moves_m)) not in used), None)
            if actions is None:
                continue
            used.append(actions)
        c2w, keyframes = integrate(actions, cfg.max_step_m, cfg.max_step_deg, cfg.min_frames)
        records.append({"scene_id": scene["scene_id"], "traj_id": f"t{index:03d}", "source": scene["source"],
                        "anchor": scene["anchor"], "room": scene["room"], "split": split, "width": scene["width"],
                        "height": scene["height"], "fov_x_deg": scene["fov_x_deg"], "actions": actions, "keyframes": keyframes,
                        "c2w": (np.round(c2w.astype(float), 7) + 0.0).tolist(),  # 7 digits are float32's; + 0.0 makes -0.0 plain
                        "start": start})
    return records, count - len(records)


def place(record: dict) -> np.ndarray:
    """World (x_m, z_m, yaw in radians) of every frame; photographs start at the origin -> [N, 3]."""
    c2w = np.array(record["c2w"])
    x0, z0, yaw_deg = record["start"] or (0.0, 0.0, 0.0)
    x, z = turn_back(c2w[:, 0, 3], c2w[:, 2, 3], -yaw_deg)
    return np.column_stack([x0 + x, z0 + z, np.deg2rad(yaw_deg) + np.arctan2(c2w[:, 0, 2], c2w[:, 0, 0])])


def draw_panel(ax, records: list[dict], room: dict | None):
    """Top view of one scene, x to the right and z up: walls, objects in their colours, paths with their first and last view."""
    for thing in room["objects"] if room else []:
        x, _, z = thing["center_m"]
        style = {"facecolor": np.array(thing["color"]) / 255, "edgecolor": "black", "linewidth": 0.5}
        if thing["shape"] == "crate":
            corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (thing["size_m"][0] / 2, thing["size_m"][2] / 2)
            ax.add_patch(plt.Polygon(np.column_stack(turn_back(*corners.T, -thing["yaw_deg"])) + (x, z), **style))
        else:
            ax.add_patch(plt.Circle((x, z), thing["size_m"][0] / 2, **style))
    walks = [place(record) for record in records]  # [N, 3] each
    for walk in walks:
        ax.plot(walk[:, 0], walk[:, 1], color="0.25", linewidth=0.9)
        ax.plot(*walk[0, :2], "o", color="0.25", markersize=2.5)
        for at, color in ((0, "0.65"), (-1, "#c2185b")):
            x, z, yaw = walk[at]
            ax.annotate("", (x + 0.6 * math.sin(yaw), z + 0.6 * math.cos(yaw)), (x, z), arrowprops={
                "arrowstyle": "-|>", "color": color, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7})
    title = records[0]["scene_id"][:28]
    if room:
        half_x, half_z = room["width_m"] / 2, room["depth_m"] / 2
        ax.add_patch(plt.Rectangle((-half_x, -half_z), 2 * half_x, 2 * half_z, fill=False, linewidth=1.5))
        title += f"  {2 * half_x:g} x {2 * half_z:g} m"
    else:
        half_x = half_z = max(1.0, max(float(np.abs(walk[:, :2]).max()) for walk in walks) + 0.7)
    ax.set(xlim=(-half_x - 0.1, half_x + 0.1), ylim=(-half_z - 0.1, half_z + 0.1), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=8)
    ax.spines[:].set_visible(False)


def draw_picture(records: list[dict], rooms: dict[str, dict]) -> bytes:
    """The top view as PNG: up to 12 scenes, rooms and photographs alike, and where all paths end as seen from their start."""
    by_scene = {key: list(group) for key, group in itertools.groupby(records, lambda record: record["scene_id"])}
    sources = [[key for key in by_scene if (key in rooms) == simulated] for simulated in (True, False)]
    shown = [key for pair in itertools.zip_longest(*sources) for key in pair if key is not None][:12]
    figure = plt.figure(figsize=(16, 8), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.75, 1])
    for ax, scene_id in itertools.zip_longest(left.subplots(3, 4).flat, sorted(shown, key=lambda key: key not in rooms)):
        if scene_id is None:
            ax.axis("off")
        else:
            draw_panel(ax, by_scene[scene_id], rooms.get(scene_id))
    left.suptitle("From above.  Dot: start.  Grey arrow: first view.  Red arrow: last view.", fontsize=10)
    ends = np.array([record["c2w"][-1] for record in records])  # [trajectories, 4, 4]
    turned_deg = np.rad2deg(np.arctan2(ends[:, 0, 2], ends[:, 0, 0]))
    ax = right.subplots()
    limit_m = max(1.0, float(np.abs(ends[:, [0, 2], 3]).max())) + 0.2
    for radius_m in range(1, 2 + int(1.5 * limit_m)):
        ax.add_patch(plt.Circle((0, 0), radius_m, fill=False, color="0.85", linewidth=0.6))
    dots = ax.scatter(ends[:, 0, 3], ends[:, 2, 3], c=turned_deg, s=7, alpha=0.7, cmap="coolwarm", vmin=-90, vmax=90,
                      linewidths=0)
    ax.set(xlim=(-limit_m, limit_m), ylim=(-limit_m, limit_m), aspect="equal",
           xlabel="to the right, metres", ylabel="ahead, metres")
    ax.set_title(f"Where all {len(records):,} trajectories end, seen from their start (first view: up)", fontsize=10)
    right.colorbar(dots, ax=ax, orientation="horizontal", shrink=0.7, label="turned by, degrees (right is positive)")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # a version number in the file would change its bytes
    plt.close(figure)
    return file.getvalue()


# ---------------------------------------------------------------------------- the stage
def check(cfg: Config):
    """Settings that no draw could satisfy end the run before anything is written."""
    def need(holds: bool, why: str):
        if not holds:
            stop(why)

    need(cfg.images or cfg.rooms, "nothing to do: give --images FOLDER (or a manifest.jsonl), --rooms N, or both")
    need(cfg.actions in ("all", "turns", "moves"), f"--actions {cfg.actions}: choose all, turns or moves")
    need(len(cfg.shares) == 3 and min(cfg.shares) >= 0 < sum(cfg.shares),
         f"--shares {cfg.shares}: three numbers, none below 0, not all 0")
    for name in ("rooms", "twins", "twin_gap_m", "room_trajectories", "photo_trajectories", "margin_m", "min_side_px"):
        need(getattr(cfg, name) >= 0, f"--{name} {getattr(cfg, name)}: it cannot be below 0")
    for name in ("move_grid_m", "turn_grid_deg", "max_step_m", "max_step_deg", "camera_height_m", "max_megapixels"):
        need(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)}: it must be above 0")
    for name, least, most in (("move_m", 0.01, 1e3), ("turn_deg", 0.1, 179), ("photo_turn_deg", 0.1, 179),
                              ("objects", 0, len(COLORS) * len(SHAPES)), ("room_side_m", max(3.0, 2 * cfg.margin_m + 1), 1e3)):
        pair = getattr(cfg, name)
        need(len(pair) == 2 and least <= pair[0] <= pair[1] <= most,
             f"--{name} {pair}: two numbers from {least:g} to {most:g}, the smaller first")
    for name, least, most in (("room_fov_deg", 10, 150), ("photo_fov_deg", 10, 150), ("heldout", 0, 1),
                              ("room_px", 8, 8192), ("long_side_px", 8, 8192)):
        need(least <= getattr(cfg, name) <= most, f"--{name} {getattr(cfg, name)}: choose from {least} to {most}")
    need(grid(cfg.move_m, cfg.move_grid_m), f"--move_m {cfg.move_m} holds no multiple of --move_grid_m {cfg.move_grid_m}")
    for name in ("turn_deg", "photo_turn_deg"):
        turns_deg = grid(getattr(cfg, name), cfg.turn_grid_deg)
        need(turns_deg, f"--{name} {getattr(cfg, name)} holds no multiple of --turn_grid_deg {cfg.turn_grid_deg}")
        need(cfg.actions != "all" or not any(cfg.shares[1:]) or any(value % 90 for value in turns_deg),
             f"--{name} {getattr(cfg, name)}: sequences need a turn other than 90 degrees; widen it, or set --shares 1 0 0")


def main(cfg: Config):
    started, folder = time.perf_counter(), Path(cfg.run) / "1_trajectories"
    check(cfg)
    photos, broken = list_photos(cfg.images) if cfg.images else ([], 0)
    config = {key: value for key, value in asdict(cfg).items() if key != "run"}
    meta = begin(folder, config | {"images": cfg.images and os.path.abspath(os.path.expanduser(cfg.images))})

    rooms = {name: draw_room(name, cfg) for name in (f"room_{i:05d}" for i in range(cfg.rooms))}
    scenes = [{"scene_id": name, "source": "simulated", "anchor": None, "room": f"1_trajectories/rooms/{name}.json",
               "width": cfg.room_px, "height": cfg.room_px, "fov_x_deg": cfg.room_fov_deg} for name in rooms]
    scenes += photo_scenes(photos, cfg)
    broken += len(photos) - (len(scenes) - len(rooms))
    splits = draw_splits(scenes, cfg)

    records, left_out = [], 0
    for scene in tqdm(scenes, desc="trajectories", unit="scene"):
        drawn, missing = draw_trajectories(scene, rooms.get(scene["scene_id"]), splits[scene["scene_id"]], cfg)
        records.extend(drawn)
        left_out += missing
    if not records:
        stop(f"nothing to write: {len(rooms)} rooms, {len(scenes) - len(rooms)} readable photographs, {broken} skipped"
             f"{f' ({cfg.images} is the place to look)' if cfg.images else ''}, {left_out} trajectories left out")

    for name, room in rooms.items():
        save(folder / "rooms" / f"{name}.json", json.dumps(room, indent=1))
    save(folder / "trajectories.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    save(folder / "trajectories.png", draw_picture(records, rooms))
    counts = {"rooms": len(rooms), "photographs": len(scenes) - len(rooms), "photographs skipped": broken,
              "trajectories": len(records), "trajectories left out": left_out,
              "frames": sum(len(record["c2w"]) for record in records),
              "scenes held out": sum(split == "heldout" for split in splits.values())}
    finish(folder, meta, counts, started)

    kinds = Counter(steps[0][0] if len(steps := record["actions"]) == 1 else f"{len(steps)} actions" for record in records)
    for key, value in {**counts, **dict(sorted(kinds.items()))}.items():
        print(f"{key:24}{value:9,}")
    print(f"look at {folder / 'trajectories.png'}\nnext: python 02_imagine_views.py --run {cfg.run}")


if __name__ == "__main__":
    run(main, Config)
