"""Stage 1: sample where the camera goes.

World2VLM (arXiv 2604.26934) teaches a VLM from pairs "action -> what you see afterwards". This
script draws the actions, turns them into camera poses, and draws procedural rooms for the camera
to move in or starts from photographs. A trajectory is a single action, a preset (forward then
turn, ...) or a random sequence of 2-3 actions in which turns and moves alternate.

An action of value v becomes max(MIN_FRAMES - 1, ceil(|v| / MAX_STEP)) equal steps along the
camera's own axes (OpenCV: x right, y down, z forward), in metres, from c2w[0] = identity:

    c2w[i+1] = c2w[i] @ [R(dyaw) | dt],   R(yaw) = [[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]

A turn to the right is +yaw. In a room no frame comes nearer than MARGIN_M to a wall or an object.

Departures from the paper: values lie on a coarse grid (0.1 m, 10 degrees), and no sequence is
drawn that has a double, another sequence with the same end. So a sequence has no turn by 90
degrees ("turn right 90; forward 1" ends where "right 1; turn right 90" does) and no opposite
turns around a move ("turn right 60; forward 1; turn left 30" ends where "turn left 30; right 1;
turn right 60" does). Stage 3 goes through the whole grid and drops the few doubles that remain.

Reads   --images: a folder of jpg, png and webp pictures (searched to its bottom), one picture, or
        a manifest.jsonl of {"image": "a.jpg", "fov_x_deg": 63.5}, the field of view optional.
        Relative paths start at the manifest's folder and stay inside it. --rooms N reads nothing.
Writes  RUN/1_trajectories/trajectories.jsonl, one line per trajectory. keyframes: the frame after
        each action, 0 first. anchor: the photograph, null in rooms. start: x_m, z_m and yaw_deg
        of frame 0 in its room, null for photographs. start_yaw_deg: where in its photograph, of
        photo_fov_deg, frame 0 of a pan looks. fov_source: exact, given, exif or assumed.
            {"scene_id": "room_00000", "traj_id": "t000", "source": "simulated", "anchor": null,
             "room": "1_trajectories/rooms/room_00000.json", "split": "train", "width": 112,
             "height": 112, "fov_x_deg": 81.4, "fov_source": "exact", "panorama": false,
             "photo_fov_deg": null, "actions": [["turn_left", 40.0]], "keyframes": [0, 8], "c2w":
             [[[1.0, 0.0, ...], ...], ...], "start": [0.52, -1.3, 40.0], "start_yaw_deg": null}
        RUN/1_trajectories/rooms/*.json (see draw_room), trajectories.png (top view), meta.json

    python 01_sample_trajectories.py --run runs/demo --rooms 3000       # 20 s on one core, 40 MB
    python 01_sample_trajectories.py --run runs/mine --images ~/photos --recipe photos

Every draw is seeded by (seed, scene, trajectory, purpose): more rooms leave the others unchanged.
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
import re
import struct
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from numpy.random import Generator, default_rng
from PIL import Image, ImageColor
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

SMALL_ROOMS = "--room_px 84 --objects 6 8 --move_m 0.4 1.6 --move_grid_m 0.4 --turn_deg 10 40"
RECIPES = {
    "paper": "",
    "tiny": f"{SMALL_ROOMS} --heldout 0.15",
    "base": f"{SMALL_ROOMS} --shares 0.7 0.15 0.15 --heldout 0.02 --seed 1",
    "world": f"{SMALL_ROOMS} --shares 0.6 0.2 0.2 --heldout 0 --seed 2",
    "photos": "--pan --photo_trajectories 28",
}


def several(*values, help: str):
    """A setting of several numbers."""
    return HfArg(default_factory=lambda: [*values], help=help)


@dataclass
class Config:
    recipe: Literal[*RECIPES] = HfArg(default="paper", help="of RECIPES; your own flags win")
    run: str = HfArg(default="runs/demo", help="run folder; this stage writes RUN/1_trajectories")
    images: str = HfArg(default="", help="photographs: a folder, one picture or a manifest.jsonl")
    rooms: int = HfArg(default=0, help="procedural rooms to draw")
    world: Literal["rooms", "other"] = HfArg(default="rooms", help="other: looks never trained on")
    room_trajectories: int = HfArg(default=7, help="trajectories per room, each from its own start")
    photo_trajectories: int = HfArg(default=7, help="trajectories per photograph, all different")
    actions: str = HfArg(default="all", help="all | turns (single turns only) | moves (likewise)")
    shares: list[float] = several(0.6, 0.2, 0.2, help="of single actions, presets and random ones")
    # less hardly shows, more seldom fits a room
    move_m: list[float] = several(0.3, 2.0, help="least and largest move, metres")
    move_grid_m: float = HfArg(default=0.1, help="moves are multiples of this, metres")
    # 90 degrees leave nothing of a view in a room; of a photograph's 54, 30 leave 24
    turn_deg: list[float] = several(10.0, 80.0, help="least and largest turn in a room, degrees")
    photo_turn_deg: list[float] = several(10.0, 30.0, help="the same for photographs, degrees")
    room_px: int = HfArg(default=112, help="side of a room's square frames, pixels")
    objects: list[int] = several(7, 9, help="fewest and most objects per room")
    same_label_share: float = HfArg(default=1.0, help="share of rooms with pairs of one label")
    long_side_px: int = HfArg(default=576, help="longer side of a photograph's frames at most")
    fov_x_deg: float = HfArg(default=0.0, help="of photographs, degrees; 0: as their files say")
    pan: bool = HfArg(default=False, help="turn inside photographs, as always in panoramas (2:1)")
    view_fov_deg: float = HfArg(default=0.0, help="of a pan's frames; 0: 30, in panoramas 75")
    heldout: float = HfArg(default=0.15, help="share of scenes kept out of training, one at least")
    seed: int = HfArg(default=0, help="base of every draw")


# --- actions and poses ---
# N frames of a trajectory, P places on its path, S candidate starts, O objects

TURNS = {"turn_left": -1, "turn_right": 1}  # sign of yaw
# along the camera's (x, z)
MOVES = {"forward": (0, 1), "backward": (0, -1), "shift_left": (-1, 0), "shift_right": (1, 0)}
CLASSES = {"turn": list(TURNS), "shift": ["shift_left", "shift_right"], "move": list(MOVES)}
SINGLES = ["move", "turn"]  # as many single turns (A2) as single moves (A1)
PRESETS = ["forward turn", "turn forward", "backward turn", "shift turn", "turn shift"]
PRESETS += ["forward turn forward", "turn forward turn", "shift turn forward"]
RANDOMS = ["move turn", "turn move", "move turn move", "turn move turn"]

TURN_GRID_DEG = 10.0  # turns are multiples of this
MAX_STEP_M, MAX_STEP_DEG = 0.2, 5.0  # between two frames: what the video teachers were made for
MIN_FRAMES = 8  # per action, first and last counted, for the same reason


def pose_of(name: str, value: float):
    """[R(yaw) | t] of one action -> [4, 4]."""
    pose = np.eye(4)
    if name in TURNS:
        yaw = math.radians(TURNS[name] * value)
        cos, sin = math.cos(yaw), math.sin(yaw)
        pose[:3, :3] = [[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]
    else:
        pose[[0, 2], 3] = np.multiply(MOVES[name], value)
    return pose


def integrate(actions, max_step_m=MAX_STEP_M, max_step_deg=MAX_STEP_DEG, min_frames=MIN_FRAMES):
    """[(name, metres or degrees), ...] -> c2w float32 [N, 4, 4], keyframes.

    integrate([("turn_left", 40)]) has 9 frames and the keyframes [0, 8]: 40 degrees are 8 steps
    of 5. Each action starts at the last pose of the one before, which is not repeated.
    """
    c2w, keyframes = [np.eye(4)], [0]
    for name, value in actions:
        max_step = max_step_deg if name in TURNS else max_step_m
        # 1e-9: a quotient of 3.0000000000000004 means 3 steps
        steps = max(math.ceil(abs(value) / max_step - 1e-9), min_frames - 1)
        step = pose_of(name, value / steps)
        for _ in range(steps):
            c2w.append(c2w[-1] @ step)
        keyframes.append(len(c2w) - 1)
    return np.array(c2w, np.float32), keyframes


def rng(*key) -> Generator:
    """A generator of its own for every (seed, scene, trajectory, purpose)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return default_rng([*digest])


def multiples(bounds: list, step: float) -> list:
    """The multiples of `step` within the bounds: ([0.3, 0.55], 0.1) -> [0.3, 0.4, 0.5]."""
    least = math.ceil(bounds[0] / step - 1e-9)
    most = math.floor(bounds[-1] / step + 1e-9)
    return [round(number * step, 6) for number in range(max(least, 1), most + 1)]


def draw_actions(g: Generator, cfg: Config, turn_deg: list) -> list:
    """One single action, preset or random sequence: [("shift_left", 0.7), ("turn_right", 30.0)].

    turn_deg: least and largest turn, which differ between rooms and photographs.
    """
    if cfg.actions == "all":
        shares = np.array(cfg.shares) / sum(cfg.shares)
        kind = [SINGLES, PRESETS, RANDOMS][g.choice(3, p=shares)]
    else:
        kind = list(TURNS if cfg.actions == "turns" else MOVES)
    classes = kind[g.integers(len(kind))].split()
    names = [str(g.choice(CLASSES.get(name, [name]))) for name in classes]
    turns_deg = multiples(turn_deg, TURN_GRID_DEG)
    moves_m = multiples(cfg.move_m, cfg.move_grid_m)
    # Sequences that have a double are not drawn (see the docstring): the turns around a move go
    # the same way, and none goes by 90 degrees.
    if len(names) == 3 and names[0] in TURNS:
        names[2] = names[0]
    if len(names) > 1:
        turns_deg = [value for value in turns_deg if value % 90]
    return [(name, float(g.choice(turns_deg if name in TURNS else moves_m))) for name in names]


# --- rooms ---
COLORS = {"red": "#d72828", "green": "#28a53c", "blue": "#2d50dc", "yellow": "#f0d728"}
COLORS |= {"purple": "#8c32af", "orange": "#f58719", "cyan": "#32cdd7"}
PAINTS = COLORS | {"wood": "#966941", "white": "#ebebe4", "leaf": "#37823c"}
# What rooms hold: a kind a line or two, its parts divided by ;. A part has a shape, width, height
# and depth in metres, x of its middle, height of its bottom, z of its middle, and color (own: the
# label's). Several values in one of these three are several parts.
FURNITURE = """
ball    ball .8 .8 .8 0 0 0 own
crate   crate .8 .9 .7 0 0 0 own
pillar  pillar .55 1.3 .55 0 0 0 own
cone    cone .85 1.15 .85 0 0 0 own
table   crate 1.3 .08 .8 0 .68 0 own; crate .08 .68 .08 -.58,.58 0 -.33,.33 wood
chair   crate .5 .08 .5 0 .42 0 own; crate .5 .55 .07 0 .5 .21 own
chair   crate .06 .42 .06 -.21,.21 0 -.21,.21 wood
sofa    crate 1.7 .42 .8 0 0 0 own; crate 1.7 .45 .22 0 .42 .29 own
sofa    crate .2 .2 .58 -.75,.75 .42 -.11 own
bed     crate 1.2 .22 1.9 0 0 0 wood; crate 1.14 .22 1.3 0 .22 -.28 own
bed     crate 1.14 .18 .55 0 .22 .62 white; crate 1.2 .9 .08 0 0 .95 wood
shelf   crate .07 1.6 .4 -.52,.52 0 0 own; crate 1 .06 .38 0 .1,.8,1.54 0 own
shelf   crate .2 .34 .26 -.3,.2 .86 0 white
lamp    pillar .4 .06 .4 0 0 0 wood; pillar .07 1.2 .07 0 .06 0 wood; cone .6 .5 .6 0 1.1 0 own
plant   pillar .46 .45 .46 0 0 0 own; ball .46 .46 .46 -.15,.15 .5 0 leaf; ball .4 .4 .4 0 .8 0 leaf
door    crate .9 2.05 .06 0 0 0 own; ball .12 .12 .12 .35 .95 0 white
window  crate 1.3 1.1 .06 0 .95 0 own; crate .54 .9 .1 -.3,.3 1.05 0 white
picture crate .9 .7 .06 0 1.2 0 own; crate .74 .54 .08 0 1.28 0 white
picture crate .3 .22 .1 .12 1.38 0 leaf
"""
# The same kinds in a world that no student was taught in.
OTHER_FURNITURE = """
ball    ball .7 .7 .7 0 0 0 own; pillar .72 .12 .72 0 .29 0 white
crate   crate .9 .6 .9 0 0 0 own; crate .94 .08 .94 0 .04,.48 0 wood
pillar  pillar .4 1.2 .4 0 .1 0 own; crate .56 .1 .56 0 0,1.3 0 white
cone    cone .7 .95 .7 0 .08 0 own; crate .86 .08 .86 0 0 0 own
table   pillar 1.2 .1 1.2 0 .66 0 own; pillar .14 .66 .14 0 0 0 wood; pillar .7 .06 .7 0 0 0 wood
chair   pillar .54 .08 .54 0 .42 0 own; pillar .1 .42 .1 0 0 0 wood; crate .5 .5 .06 0 .5 .24 own
sofa    crate 2 .4 .9 0 0 0 own; crate .9 .5 .24 -.5,.5 .4 .33 own; crate .16 .66 .9 -1,1 0 0 wood
bed     crate 1.3 .4 2 0 .1 0 own; crate 1 .2 .3 0 .5 .7 white; pillar .1 1 .1 -.6,.6 0 -1,1 wood
shelf   crate 1.3 .06 .36 0 .05,.45,.85,1.2 0 own; crate .3 .3 .2 -.4,.2 .51 0 white
shelf   pillar .07 1.26 .07 -.62,.62 0 -.15,.15 wood
lamp    pillar .5 .36 .5 0 1.3 0 own; pillar .05 1.3 .05 0 0 0 wood; cone .44 .2 .44 0 0 0 wood
plant   crate .4 .4 .4 0 0 0 own; pillar .08 .3 .08 0 .4 0 wood; cone .8 .9 .8 0 .6 0 leaf
door    crate 1 2.1 .06 0 0 0 own; crate .3 .7 .1 -.2,.2 .2,1.1 0 wood; ball .1 .1 .1 .4 1 0 white
window  crate 1.1 1.3 .06 0 .8 0 own; crate .42 .53 .1 -.26,.26 .87,1.5 0 white
picture crate 1.1 .6 .06 0 1.3 0 own; crate .9 .4 .08 0 1.4 0 white; crate .3 .3 .1 .2 1.4 0 leaf
"""
TINTS = "#a50f2d #73c83c #4b7dff #fff073 #be5fe6 #e15f0a #6ef0e6 #5a5f69 #fae1be #829628"


def read_furniture(table: str) -> dict:
    """{kind: [(shape, (width, height, depth, x, bottom, z), paint), ...]}; numbers as text."""
    kinds = {}
    for line in table.strip().splitlines():
        kind, parts = line.split(maxsplit=1)
        for shape, *cells, paint in map(str.split, parts.split(";")):
            for box in itertools.product(*(cell.split(",") for cell in cells)):
                kinds.setdefault(kind, []).append((shape, box, paint))
    return kinds


KINDS = read_furniture(FURNITURE)
OTHER = read_furniture(OTHER_FURNITURE), dict(zip(PAINTS, TINTS.split(), strict=True))
WORLDS = {"rooms": (KINDS, PAINTS), "other": OTHER}
ON_WALLS, TOYS = ("door", "window", "picture"), ("ball", "crate", "pillar", "cone")
PAIRED = (*TOYS, "chair", "lamp", "plant")  # small enough for two in a picture
CARRIERS = ("table", "shelf")  # a toy may stand on them
SCALES = {"toy": (0.65, 1.3), "small": (0.3, 0.45), "furniture": (0.9, 1.15)}
ROOM_SIDE_M = (5.0, 9.0)  # range of a room's width and of its depth
CAMERA_HEIGHT_M = (1.2, 1.7)
ROOM_FOV_DEG = (60.0, 100.0)  # range of the field of view
TWINS, TWIN_GAP_M = 2, 0.4  # pairs of one label per room (task D4), the widest gap within one
MARGIN_M = 0.3  # least distance of a camera to walls and objects


def draw_room(scene_id: str, cfg: Config) -> dict:
    """A room and its objects, none of which touches another but a toy what it stands on.

    World axes: x right, y down, z forward; the floor is y = 0, its middle x = z = 0. An object
    that finds no place in 200 tries is left out. Stage 2 draws the walls by texture_seed and world.
    """
    g = rng(cfg.seed, scene_id, "room")
    width_m, depth_m = np.round(g.uniform(*ROOM_SIDE_M, 2), 2).tolist()
    room = {
        "scene_id": scene_id,
        "width_m": width_m,
        "depth_m": depth_m,
        "height_m": round(g.uniform(2.6, 3.2), 2),
        "camera_height_m": round(g.uniform(*CAMERA_HEIGHT_M), 2),
        "fov_x_deg": round(g.uniform(*ROOM_FOV_DEG), 1),
        "texture_seed": int(g.integers(2**31)),
        "objects": [],
    }
    room |= {"world": cfg.world} if cfg.world != "rooms" else {}
    looks, free = {}, []  # free: furniture on which nothing stands
    for label in draw_labels(g, cfg):
        *color, kind = label.split()
        under = free.pop() if color and kind in TOYS and free else None
        size = "small" if under else "toy" if kind in TOYS else "furniture"
        color = color or [str(g.choice([*COLORS]))]
        look = [*color, g.uniform(*SCALES[size]), float(g.integers(360))]
        # the second of a pair is a copy of the first: the motion alone decides D4
        whole = build_object(kind, *looks.setdefault(label, look), cfg.world)
        thing = {"id": len(room["objects"]), "label": label} | whole
        if thing := find_place(g, thing, under, room):
            room["objects"].append(thing)
            free += [thing] if kind in CARRIERS else []
    return room


def draw_labels(g: Generator, cfg: Config) -> list:
    """A room's labels, for example ["ball", "ball", "red chair"]: its pairs first.

    The kinds of the pairs have no other object in the room: "the red ball" is never one of them.
    """
    labels = [f"{color} {kind}" for color in COLORS for kind in KINDS]
    labels = g.permutation(labels).tolist()
    if g.random() < cfg.same_label_share:
        paired = g.permutation(PAIRED)[:TWINS].tolist()
        others = [label for label in labels if label.split()[1] not in paired]
        labels = np.repeat(paired, 2).tolist() + others
    return labels[: g.integers(min(cfg.objects), max(cfg.objects) + 1)]


def build_object(kind: str, color: str, scale: float, yaw_deg: float, world="rooms") -> dict:
    """The parts of an object that has no place on the floor yet, and the box around them."""
    kinds, paints = WORLDS[world]
    boxes = [box for _, box, _ in kinds[kind]]
    sizes_m, centers_m = np.hsplit(np.array(boxes, float), 2)  # [n, 3] each
    centers_m[:, 1] = -centers_m[:, 1] - sizes_m[:, 1] / 2  # from the bottom to the middle, y down
    sizes_m, centers_m = scale * sizes_m, scale * centers_m
    low = (centers_m - sizes_m / 2).min(0)
    high = (centers_m + sizes_m / 2).max(0)
    middle_m = (low + high) / 2
    center_m, size_m = np.round([middle_m, high - low], 4).tolist()
    rows = np.round([sizes_m, centers_m - middle_m], 4).tolist()
    parts = []
    for (shape, _, paint), part_m, place_m in zip(kinds[kind], *rows, strict=True):
        paint = paints[color if paint == "own" else paint]
        part = {"shape": shape, "color": [*ImageColor.getrgb(paint)]}
        parts.append(part | {"size_m": part_m, "yaw_deg": 0.0, "center_m": place_m})
    return {"center_m": center_m, "size_m": size_m, "yaw_deg": yaw_deg, "parts": parts}


def find_place(g: Generator, thing: dict, under, room: dict):
    """The object on the one `under` it, on a wall, or clear of all others; None: nowhere."""
    y, radius_m = thing["center_m"][1], outer_radius(thing)
    if under:
        x, middle, z = under["center_m"]
        top = middle - under["size_m"][1] / 2
        return thing | {"center_m": [x, round(top + y, 4), z]}
    places = g.uniform(-1, 1, (200, 2)) * (half_size(room) - radius_m - 0.1)
    if thing["label"].split()[-1] in ON_WALLS:  # one of the four, its front to the room
        wall = int(g.integers(4))
        axis = (wall + 1) % 2
        side = 1 if wall < 2 else -1
        places[:, axis] = side * (half_size(room)[axis] - thing["size_m"][2] / 2)
        thing = thing | {"yaw_deg": 90.0 * wall}
    fits = np.ones(200, bool)
    for other in room["objects"]:
        gap_m = np.hypot(*(places - other["center_m"][::2]).T) - radius_m - outer_radius(other)
        most_m = TWIN_GAP_M if other["label"] == thing["label"] else math.inf
        fits &= (gap_m > 0.1) & (gap_m < most_m)
    x, z = np.round(places[fits.argmax()], 2).tolist()
    return thing | {"center_m": [x, y, z]} if fits.any() else None


def half_size(room: dict):
    """Metres from a room's middle to its walls, along x and z."""
    return np.array([room["width_m"], room["depth_m"]]) / 2


def outer_radius(thing: dict) -> float:
    """Radius of the circle around an object's footprint, metres."""
    width_m, _, depth_m = thing["size_m"]
    return math.hypot(width_m, depth_m) / 2


def half_tan(fov_deg: float) -> float:
    """Half the width of a picture at distance 1."""
    return math.tan(math.radians(fov_deg) / 2)


def rotate(points, yaw_deg):
    """R(yaw) @ points (x, z): from a camera's or object's axes to the world's; -yaw leads back."""
    x, z = points
    yaw = np.deg2rad(yaw_deg)
    cos, sin = np.cos(yaw), np.sin(yaw)
    return cos * x + sin * z, cos * z - sin * x


def walk(path, starts):
    """A path [2, P] from each of the starts [S, 3] -> world x and z, [S, P] each."""
    x, z, yaw_deg = np.array(starts).T[:, :, None]
    dx, dz = rotate(path, yaw_deg)
    return x + dx, z + dz


def is_free(x, z, room: dict):
    """Paths [S, P] -> [S]: does every place on each keep MARGIN_M to walls and footprints?"""
    half_x, half_z = half_size(room)
    nearest_m = np.minimum(half_x - np.abs(x), half_z - np.abs(z))
    for thing in room["objects"]:
        center_x, _, center_z = thing["center_m"]
        width_m, _, depth_m = thing["size_m"]
        dx, dz = np.abs(rotate((x - center_x, z - center_z), -thing["yaw_deg"]))
        # beyond two sides the corner is nearest; inside, all is 0
        outside_m = np.hypot(np.maximum(dx - width_m / 2, 0), np.maximum(dz - depth_m / 2, 0))
        nearest_m = np.minimum(nearest_m, outside_m)
    return nearest_m.min(1) > MARGIN_M


def sees_objects(x, z, yaw_deg, room: dict):
    """Cameras [S, 1] each -> [S]: 2 where two objects of one label are well inside the picture,
    1 where any object is.
    It must fill 1.5 % of the picture, for a question asks for 1 %. Another object may stand before
    it, which stage 2 finds out exactly.
    """
    things = [thing["center_m"] + thing["size_m"] for thing in room["objects"]]
    center_x, y, center_z, width_m, height_m, _ = np.array(things).reshape(-1, 6).T  # [O] each
    right, ahead = rotate((center_x - x, center_z - z), -yaw_deg)  # [S, O]
    half_m = ahead * half_tan(room["fov_x_deg"])  # of the picture's width there
    off_m = np.maximum(np.abs(right), np.abs(y + room["camera_height_m"]))
    large = width_m * height_m > 0.015 * (2 * half_m) ** 2
    seen = (ahead > 0.3) & (off_m < 0.85 * half_m) & large
    labels = np.array([thing["label"] for thing in room["objects"]])
    twins = (labels[:, None] == labels) & ~np.eye(len(labels), dtype=bool)
    return seen.any(1) + 0 + (seen & (seen @ twins)).any(1)


# --- photographs ---
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MIN_SIDE_PX = 32  # a frame with a shorter side shows nothing
Image.MAX_IMAGE_PIXELS = 100_000_000  # PIL decodes up to twice as many: kilobytes can claim more
BROKEN = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError)
BROKEN += (AttributeError, MemoryError, struct.error, Image.DecompressionBombError)  # PIL's many


def list_photos(source: str):
    """--images -> [(name for the user, folder, {image, fov_x_deg}), ...] and malformed lines."""
    path = Path(os.path.abspath(Path(source).expanduser()))
    if path.suffix == ".jsonl":
        named = []
        for number, record in read_lines(path, "image"):
            named.append((f"{path}:{number}: {record['image']!r}", path.parent, record))
        return named, len(path.read_bytes().splitlines()) - len(named)
    if not path.exists():
        stop(f"--images {path}: there is no such folder, picture or manifest.jsonl")
    files = sorted(path.rglob("[!.]*")) if path.is_dir() else [path]
    files = [p for p in files if p.suffix.lower() in SUFFIXES and p.is_file()]
    return [(p, path, {"image": str(p.relative_to(path))}) for p in files], 0


ASSUMED_FOV_DEG = 54  # along the longer side, where nothing tells
VIEW_FOV_DEG = {False: 30.0, True: 75.0}  # of a frame inside a photograph, a panorama
MOST_TURN = 0.8  # of a frame's field of view: what is left is seen twice
APART_DEG = 20.0  # turns from one start are so different


def fov_of(width_px: float, focal_px: float) -> float:
    return 2 * math.degrees(math.atan2(width_px / 2, focal_px))


def exif_focal_px(tags: dict, width: int, height: int) -> float:
    """From the 35 mm equivalent, which compares diagonals (CIPA DCG-001), else from the focal
    length and the pixels per inch or cm of the sensor; 0: EXIF has neither.
    """
    try:
        if equivalent_mm := float(tags.get(0xA405, 0)):
            return equivalent_mm * math.hypot(width, height) / math.hypot(36, 24)
        shrink = max(width, height) / max(tags[0xA002], tags[0xA003])
        return float(tags[0x920A] * tags[0xA20E]) / {2: 25.4, 3: 10}[tags.get(0xA210)] * shrink
    except (LookupError, TypeError, ValueError, ArithmeticError):  # a text where a number belongs
        return 0.0


def fov_beside(path: Path, width: int) -> float:
    """The field of view in a transforms.json (nerfstudio) beside the picture; 0 without one."""
    file = path.with_name("transforms.json")
    camera = json.loads(file.read_text()) if file.is_file() else {}
    if "fl_x" in camera:
        return fov_of(camera.get("w", width), camera["fl_x"])
    return math.degrees(camera.get("camera_angle_x", 0))


def field_of_view(path: Path, record: dict, tags: dict, size: tuple, cfg: Config) -> tuple:
    """(degrees along x, source): what the user gives counts first, then what the camera wrote."""
    given = float(record.get("fov_x_deg") or fov_beside(path, size[0]) or cfg.fov_x_deg)
    if 1 <= given <= 170:
        return given, "given"
    if given:
        raise ValueError(f"fov_x_deg {given:g} does not lie between 1 and 170")
    focal_px = exif_focal_px(tags, *size)
    if 2 < fov_of(max(size), focal_px) < 150:  # otherwise no tag, or a wrong one
        return fov_of(size[0], focal_px), "exif"
    return fov_of(size[0], max(size) / 2 / half_tan(ASSUMED_FOV_DEG)), "assumed"


def read_photo(folder: Path, record: dict, cfg: Config) -> dict:
    """Where a photograph lies, its frame and its field of view; raises one of BROKEN.

    A relative path must stay in its folder: through a link or "../" a stranger's archive could
    reach any picture of yours. An absolute path is meant.
    """
    path = Path(os.path.abspath(Path(folder, record["image"])))
    if not path.is_file():
        raise ValueError("no such file")
    inside = path.resolve().is_relative_to(folder.resolve())
    if not inside and not os.path.isabs(record["image"]):
        raise ValueError(f"leaves {folder}: name it by its absolute path in a manifest")
    kinds = ["JPEG", "PNG", "WEBP"]
    # odd EXIF data warn; they cost the focal length and nothing else
    with warnings.catch_warnings(action="ignore"), Image.open(path, formats=kinds) as image:
        image.load()  # a truncated file shows only when it is decoded to its end
        width, height = image.size
        exif = image.getexif()
        if exif.get(0x0112) in (5, 6, 7, 8):  # the orientations that lie on their side
            width, height = height, width
        fov_deg, source = field_of_view(path, record, exif.get_ifd(0x8769), (width, height), cfg)
    panorama = width == 2 * height and source == "assumed"
    if panorama:
        fov_deg, source = 360.0, "exact"
    view_deg = fov_deg
    # a narrower camera inside, with as many pixels as the picture has there
    if panorama or cfg.pan:
        view_deg = cfg.view_fov_deg or VIEW_FOV_DEG[panorama]
        share = half_tan(view_deg) / (math.pi if panorama else half_tan(fov_deg))
        width, height = width * share, (width if panorama else height) * share
    scale = min(1.0, cfg.long_side_px / max(width, height))
    width, height = round(width * scale), round(height * scale)
    if min(width, height) < MIN_SIDE_PX:
        raise ValueError(f"a frame of {width}x{height} px has a side below {MIN_SIDE_PX}")
    return {
        "width": width,
        "height": height,
        "fov_x_deg": round(view_deg, 4),
        "fov_source": source,
        "panorama": panorama,
        "photo_fov_deg": round(fov_deg, 4),
        "anchor": str(path),
        "digest": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


# --- scenes: a room or a photograph each ---
def room_scene(room: dict, cfg: Config) -> dict:
    name = room["scene_id"]
    path = f"1_trajectories/rooms/{name}.json"
    frame = {"width": cfg.room_px, "height": cfg.room_px, "fov_x_deg": room["fov_x_deg"]}
    frame |= {"fov_source": "exact", "panorama": False, "photo_fov_deg": None}
    return {"scene_id": name, "source": "simulated", "anchor": None, "room": path} | frame


def photo_scenes(named: list, cfg: Config) -> list:
    """The photographs that can be read; the others are named on stderr."""
    scenes, taken = [], set()
    for name, folder, record in tqdm(named, "photographs", disable=not named):
        try:
            photo = read_photo(folder, record, cfg)
        except BROKEN as error:
            why = " ".join(str(error).split()) or type(error).__name__
            tqdm.write(f"{name}: {why}; skipped", file=sys.stderr)
            continue
        scene_id = photo_id(Path(photo["anchor"]).stem, taken)
        taken.add(scene_id.lower())  # some file systems do not tell upper from lower case
        scenes.append({"scene_id": scene_id, "source": "real", "room": None} | photo)
    return scenes


def photo_id(stem: str, taken: set[str]) -> str:
    """A scene_id made from a file's name: "My photo" -> "My_photo", or "My_photo_2", ..."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_")[:60] or "photo"
    if re.fullmatch(r"(?i)room_\d+", stem):  # those names are the rooms'
        stem = f"photo_{stem}"
    for number in itertools.count(1):
        scene_id = stem if number == 1 else f"{stem}_{number}"
        if scene_id.lower() not in taken:
            return scene_id


def draw_splits(scenes: list, cfg: Config) -> dict:
    """The scenes of one source -> {scene_id: "train" or "heldout"}.

    A scene's own draw decides, so that a new scene moves no other; copies of a photograph share
    theirs. But of two scenes or more at least one is held out and one is not.
    """
    draws = {}
    for scene in scenes:
        key = scene.get("digest", scene["scene_id"])
        draws[scene["scene_id"]] = rng(cfg.seed, key, "split").random()
    # Draws below the bar are held out; where that would be none or all, the bar moves by one.
    bar, ordered = cfg.heldout, sorted(set(draws.values()))
    if 0 < bar < 1 and len(ordered) > 1:
        bar = np.clip(bar, ordered[1], ordered[-1])
    return {name: "heldout" if draw < bar else "train" for name, draw in draws.items()}


# --- trajectories ---
SHARING = 4  # so many trajectories of a scene have one picture 1: which picture 2 follows what?


def draw_in_room(g: Generator, records: list, room: dict, cfg: Config):
    """Actions and a start (x_m, z_m, yaw_deg) from which they touch nothing; None if not found.

    48 starts for each of 20 draws of actions: long moves are hardly rarer than short ones. One that
    sees an object is preferred: before the actions, after them, or a whole turn further on either
    side. Were it always before, the objects in picture 2 would stand where the camera came from,
    and tell the way of the turn. The first SHARING records start at one place.
    """
    shared = records[0]["start"] if 0 < len(records) < SHARING else None
    second_best = None
    for _ in range(20):
        actions = draw_actions(g, cfg, cfg.turn_deg)
        if shared and any(record["actions"] == actions for record in records):
            continue
        c2w, _ = integrate(actions)
        path = c2w[:, [0, 2], 3].astype(float).T  # [2, P]
        places = np.round(g.uniform(-1, 1, (48, 2)) * (half_size(room) - MARGIN_M), 2)
        starts = np.column_stack([places, 10.0 * g.integers(36, size=48)])
        starts = np.array([shared]) if shared else starts
        turned_deg = sum(TURNS.get(name, 0) * value for name, value in actions)
        side = g.integers(-1, 3)  # 0: the view before, 1: after
        look_from = walk(path[:, :1] if side < 1 else path[:, -1:], starts)  # [S, 1] each
        seen = sees_objects(*look_from, starts[:, 2:] + side * turned_deg, room)
        # a single move might as well have been the opposite one, for all that either picture tells
        beyond = np.outer(path[:, -1], [-1, 2]) if len(actions) == 1 else path
        # 0: hits something, 1: is free, + 2: sees an object, + 4: two of one label, + 1: as above
        rank = 1 + 2 * seen + is_free(*walk(beyond, starts), room)
        rank *= is_free(*walk(path, starts), room)
        best = rank.argmax()
        found = actions, starts[best].tolist()
        if rank[best] >= 3:
            return found
        if rank[best]:
            second_best = second_best or found
    if shared and not second_best:
        return draw_in_room(g, [], room, cfg)
    return second_best


def draw_from_photo(g: Generator, records: list, cfg: Config):
    """Actions that no record has, for all start at one place, and no yaw; None if not found."""
    for _ in range(100):
        actions = draw_actions(g, cfg, cfg.photo_turn_deg)
        if all(record["actions"] != actions for record in records):
            return actions, None
    return None


def draw_pan(g: Generator, records: list, scene: dict, cfg: Config):
    """A single turn and the yaw where it starts; None if not found.

    Every frame stays wholly inside the photograph, and would do so after the same turn to the
    other side: where the first frame is does not tell the way.
    """
    reach_deg, bounds = math.inf, cfg.turn_deg
    if not scene["panorama"]:
        reach_deg = (scene["photo_fov_deg"] - scene["fov_x_deg"]) / 2
        bounds = cfg.photo_turn_deg
    most_deg = min(bounds[-1], reach_deg, MOST_TURN * scene["fov_x_deg"])
    turns_deg = multiples([bounds[0], most_deg], TURN_GRID_DEG)
    for attempt in range(100 if turns_deg else 0):
        name = str(g.choice(list(TURNS)))
        value = float(g.choice(turns_deg))
        # from the first start every turn fits, so that others can share it
        free_deg = min(reach_deg - (value if records else turns_deg[-1]), 180)
        yaw_deg = float(round(g.uniform(-free_deg, free_deg)))
        if 0 < len(records) < SHARING and attempt < 50:
            yaw_deg = records[0]["start_yaw_deg"]
        known = [one["actions"][0] for one in records if one["start_yaw_deg"] == yaw_deg]
        apart_deg = [abs(TURNS[name] * value - TURNS[way] * deg) for way, deg in known]
        if abs(yaw_deg) <= free_deg and min(apart_deg, default=90) >= APART_DEG:
            return [(name, value)], yaw_deg
    return None


def draw_trajectories(scene: dict, room, split: str, cfg: Config) -> list:
    """A scene's records in the order of their traj_id, without those that find no place."""
    records = []
    for index in range(cfg.room_trajectories if room else cfg.photo_trajectories):
        g = rng(cfg.seed, scene["scene_id"], index, "trajectory")
        if room:
            drawn = draw_in_room(g, records, room, cfg)
        elif scene["panorama"] or cfg.pan:
            drawn = draw_pan(g, records, scene, cfg)
        else:
            drawn = draw_from_photo(g, records, cfg)
        if drawn is None:
            continue
        actions, start = drawn
        c2w, keyframes = integrate(actions)
        record = {
            "scene_id": scene["scene_id"],
            "traj_id": f"t{index:03d}",
            "split": split,
            **{key: value for key, value in scene.items() if key != "digest"},
            "actions": actions,
            "keyframes": keyframes,
            # 7 digits are float32's; + 0.0 makes -0.0 plain
            "c2w": (np.round(c2w.astype(float), 7) + 0.0).tolist(),
            "start": start if room else None,
            "start_yaw_deg": None if room else start,
        }
        records.append(record)
    return records


# --- the stage ---
def draw_picture(drawn: dict, rooms: dict) -> bytes:
    """The first twelve scenes from above: {scene_id: records} -> a PNG."""
    figure = Figure(figsize=(16, 12))
    figure.suptitle("From above, metres. The camera looks along the arrows, blue first, red last.")
    for number, scene_id in enumerate([*drawn][:12], 1):
        ax = figure.add_subplot(3, 4, number, aspect="equal", title=scene_id[:28])
        room = rooms.get(scene_id)
        if room:  # its walls are the panel's frame
            half_x, half_z = half_size(room)
            ax.set(xlim=(-half_x, half_x), ylim=(-half_z, half_z))
        else:
            ax.axis("equal")
        for thing in room["objects"] if room else ():
            color = np.array(thing["parts"][-1]["color"]) / 255
            ax.add_patch(Circle(thing["center_m"][::2], outer_radius(thing), color=color))
        for record in drawn[scene_id]:
            start = record["start"] or [0, 0, record["start_yaw_deg"] or 0]
            _, _, ahead, path = np.array(record["c2w"])[:, [0, 2]].T  # [2, N] each
            views = rotate(ahead, start[2])
            ax.quiver(*walk(path, [start]), *views, range(len(path.T)), cmap="coolwarm")
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()


def refuse_impossible(cfg: Config):
    """Settings that no draw could satisfy end the run before anything is written."""
    if not cfg.images and cfg.rooms < 1:
        stop("nothing to do: give --images FOLDER (or a manifest.jsonl), --rooms N, or both")
    possible = {
        "actions": cfg.actions in ("all", "turns", "moves"),
        "shares": len(cfg.shares) == 3 and min(cfg.shares) >= 0 < sum(cfg.shares),
        "move_m": cfg.move_grid_m > 0 and multiples(cfg.move_m, cfg.move_grid_m),
        "turn_deg": any(turn % 90 for turn in multiples(cfg.turn_deg, TURN_GRID_DEG)),
        "photo_turn_deg": any(turn % 90 for turn in multiples(cfg.photo_turn_deg, TURN_GRID_DEG)),
        "room_px": cfg.room_px >= 8,
        "view_fov_deg": 0 <= cfg.view_fov_deg <= 120,
        "heldout": 0 <= cfg.heldout <= 1,
    }
    for name, holds in possible.items():
        if not holds:
            stop(f"--{name} {getattr(cfg, name)} cannot be: see --help")


def main(cfg: Config):
    started = time.perf_counter()
    folder = Path(cfg.run) / "1_trajectories"
    refuse_impossible(cfg)
    named, malformed = list_photos(cfg.images) if cfg.images else ([], 0)
    config = asdict(cfg)
    del config["run"], config["recipe"]
    if cfg.world == "rooms":  # no record names the usual world: older runs go on
        del config["world"]
    meta = begin(folder, config)

    names = [f"room_{number:05d}" for number in range(cfg.rooms)]
    rooms = {name: draw_room(name, cfg) for name in names}
    photos = photo_scenes(named, cfg)
    scenes = [room_scene(room, cfg) for room in rooms.values()]
    splits = draw_splits(scenes, cfg) | draw_splits(photos, cfg)
    drawn = {}
    for scene in tqdm(scenes + photos, "scenes"):
        name = scene["scene_id"]
        drawn[name] = draw_trajectories(scene, rooms.get(name), splits[name], cfg)
    records = [*itertools.chain(*drawn.values())]

    asked = len(rooms) * cfg.room_trajectories + len(photos) * cfg.photo_trajectories
    counts = {
        "rooms": len(rooms),
        "photographs": len(photos),
        "photographs skipped": len(named) + malformed - len(photos),
        "trajectories": len(records),
        "trajectories left out": asked - len(records),
        "scenes held out": list(splits.values()).count("heldout"),
        "panoramas": sum(photo["panorama"] for photo in photos),
        "fields of view assumed": [photo["fov_source"] for photo in photos].count("assumed"),
    }
    if not records:
        stop(f"nothing to write: {counts}")
    for name, room in rooms.items():
        save(folder / "rooms" / f"{name}.json", json.dumps(room))
    lines = [json.dumps(record) + "\n" for record in records]
    save(folder / "trajectories.jsonl", "".join(lines))
    save(folder / "trajectories.png", draw_picture(drawn, rooms))
    finish(folder, meta, counts, started)
    if counts["fields of view assumed"]:
        print(f"warning: {ASSUMED_FOV_DEG} degrees along the longer side are assumed: --fov_x_deg")
    print(f"look at {folder}/trajectories.png, then: python 02_imagine_views.py --run {cfg.run}")


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
