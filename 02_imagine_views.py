"""Stage 2: imagine what each trajectory shows.

A teacher gets one picture (or a room) and camera poses, and returns the views from there.
`simulator` casts a ray through every pixel of a room and knows which object each pixel shows.
`warp` moves the pixels of a photograph: pixel p of the new view, at depth z, shows what it has at

    p0 ~ K (R K^-1 p z + t),   [R | t] = c2w of the new view, frame 0 being the identity

A turn has t = 0, so z cancels and the view is exact. A move needs the photograph's depth in metres:
a file, or a metric depth checkpoint (--depth). What the photograph does not show is a grey hole,
or is painted by a diffusion model (--fill): geometry for what was seen, imagination for the rest.
`svc` is Stable Virtual Camera, the paper's world model: a diffusion network that sees all frames at
once, each with the rays of its camera, one of them being the photograph (see `svc_sample`).
`sana-wm` is a video diffusion model that follows camera poses, run by diffusers.
`cosmos3` is NVIDIA's Cosmos 3, likewise; it is told each frame's step from the one before.
`pan` turns a narrower camera inside a photograph or a 360-degree panorama: exact, nothing missing.

Departures from the paper: svc gets one network call per trajectory, with the photograph in it, not
two passes of which the second never sees it, and a metre is as long in every call. Teachers are
measured, not trusted: what fails stays on disk, marked in `qc`, and stage 3 leaves it out. In `qc`:

    turn_error_deg  of the worst turn between key frames: the yaw at which the earlier frame matches
                    the later one, minus the yaw asked for, + to the right; null where none can be
                    measured (moves, holes, less than a quarter of the view in common)
    length          of the worst move between key frames: how far it went, over how far was asked,
                    found by moving the earlier frame through its depth; null for exact teachers
    move_match      correlation there; the same way back or to the side must match less
    unchecked       true where a move could not be measured for want of depth (--depth)
    over_turn_deg   the same along the turn: + turned too far, - not far enough
    match           correlation at that yaw, -1..1
    sharpness       steepness of the edges of the least sharp frame, over that of frame 0
    holes           largest share of a frame that the picture does not show

Reads   RUN/1_trajectories/trajectories.jsonl and rooms/*.json (see 01), the photographs, and depth
        files: <photo stem>.depth.npy, metres [H,W], beside the photograph or in --depth_dir
Writes  RUN/2_views/<scene>/<trajectory>/NNN.png (NNN: frame index), transforms.json (nerfstudio),
        view.json (the record, written last), or skipped.json where a picture cannot be read
        RUN/2_views/views.jsonl, all records: the trajectory's own keys (see 01) and
            {..., "teacher": "simulator", "teacher_settings": {}, "seed": 0, "kept": [0, 8],
             "covisible": [[0, 8, 0.62]], "holes": [0.0, 0.0],
             "frames": ["2_views/room_00000/t000/000.png", ...], "objects": [[{"id": 3, "label":
             "red chair", "box": [412, 300, 530, 611], "visible_px": 310, "distance_m": 2.41,
             "bearing_deg": -3.2, "score": 1.0}], []],
             "qc": {"turn_error_deg": 0.1, "over_turn_deg": -0.1, "match": 0.98, "sharpness": 0.97,
             "holes": 0.0, "passed": true, "why": ""}}
            (objects: the visible ones per kept frame, null where the teacher does not know them;
            score: the share of an object that is no paint; covisible: of two key frames the share
            of the later one that the earlier one shows)
        RUN/2_views/qc.png (each measure per teacher), contact_sheet.png, meta.json

    python 02_imagine_views.py --run runs/demo
    python 02_imagine_views.py --run runs/both --teacher simulator warp     # rooms, photographs
    torchrun --nproc-per-node 8 -- 02_imagine_views.py --run runs/big --teacher svc   # 8 GPUs
    python 02_imagine_views.py --run runs/mine --teacher pan                # 01 --recipe photos
    python 02_imagine_views.py --run runs/demo --teacher warp --fill base/world
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from kernels import plucker_rays
from kernels.seva import Seva, SevaConfig
from kernels.temporal import MAX_FRAMES
from kernels.student import read_picture

# training views are imagined, those of the exam exact
TINY = "--keep ends --teacher warp --fill base/world --heldout_teacher simulator"
RECIPES = {"paper": "", "tiny": TINY, "exact": "--keep ends"}


@dataclass
class Config:
    recipe: Literal[*RECIPES] = HfArg(default="paper", help="of RECIPES; your own flags win")
    run: str = HfArg(default="runs/demo", help="folder of the run, for 1_trajectories and 2_views")
    teacher: list[str] = HfArg(
        default_factory=lambda: ["simulator"], help="rows of TEACHERS; the first that can is taken"
    )
    keep: Literal["keyframes", "ends", "all"] = HfArg(
        default="keyframes", help="frames kept: 0 and that after each action, 0 and the last, all"
    )
    seed: int = HfArg(default=0, help="of the noise of generative teachers; the others draw none")
    shard: str = HfArg(
        default="0/1",
        help="i/n: make scenes i, i+n, ...; the last to end joins all; torchrun divides further",
    )
    workers: int = HfArg(
        default=max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        help="processes, of each process of torchrun; results are the same",
    )
    device: str = HfArg(default="auto", help="of networks; bfloat16 on cuda:N, else float32")
    steps: int = HfArg(default=0, help="denoising steps; 0: the teacher's own, see its class")
    guidance: float = HfArg(default=0.0, help="guidance scale; 0: the teacher's own")
    compile: bool = HfArg(default=False, help="svc: torch.compile; pays after a few trajectories")
    offload: bool = HfArg(default=False, help="sana-wm, cosmos3: one network at a time on the GPU")
    depth_dir: str = HfArg(default="", help="of <photo stem>.depth.npy; empty: the photograph's")
    depth: str = HfArg(default="", help="metric depth checkpoint, for photographs without a file")
    fill: str = HfArg(
        default="", help="paints warp's holes: base/world in rooms, else an inpainting pipeline"
    )
    heldout_teacher: str = HfArg(default="", help="of scenes held out; empty: as of the others")
    svc: str = HfArg(default="stabilityai/stable-virtual-camera", help="hub id, folder or file")
    svc_vae: str = HfArg(
        default="Manojb/stable-diffusion-2-1-base",  # a copy: stabilityai's own is gone
        help="its picture autoencoder: hub id or folder of an AutoencoderKL, at its top or in vae/",
    )
    svc_clip: str = HfArg(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        help="its picture encoder: hub id or folder",
    )
    svc_px: int = HfArg(default=576, help="short side of its frames; both are multiples of 64")
    svc_frames: int = HfArg(default=0, help="frames per call at least: the authors pad to 21")
    svc_window: int = HfArg(default=MAX_FRAMES, help="frames per call; fewer need less memory")
    sana: str = HfArg(
        default="Efficient-Large-Model/SANA-WM_bidirectional-diffusers",
        help="hub id or folder of a SanaWMPipeline",
    )
    sana_size: list[int] = HfArg(default_factory=lambda: [704, 1280], help="height, width: 32 * n")
    cosmos: str = HfArg(default="nvidia/Cosmos3-Edge", help="hub id or folder of its pipeline")
    cosmos_tier: Literal[256, 480, 720] = HfArg(default=480, help="of its frames: row of CANVASES")
    max_holes: float = HfArg(default=0.6, help="of a frame, 0..1; at 54 degrees a turn by 30: 0.57")
    gain: float = HfArg(default=1.0, help="metres moved for one asked; 0: measured per picture")


BOX = 1000  # boxes are integers 0..1000 of the picture's width and height
FILL = 127  # grey level of the pixels that no picture shows


class Unusable(Exception):
    """This trajectory cannot be imagined; the text says why and what would help."""


class Views(NamedTuple):
    """What a teacher returns: n frames."""

    frames: np.ndarray  # uint8 [n,H,W,3]
    K: np.ndarray  # [3,3] in pixels of these frames, which need not have the size asked for
    objects: list | None = None  # per frame the visible ones, where the teacher knows them
    holes: np.ndarray | None = None  # bool [n,H,W], what the picture does not show
    depth: np.ndarray | None = None  # [n,H,W] metres where the teacher knows it, inf: unknown
    sharpest: np.ndarray | None = None  # frame 0 through the teacher's own autoencoder
    settings: dict = {}  # that made them, for the record


class Teacher:
    """A teacher has two more methods, and an entry in TEACHERS:

    anchor(trajectory) -> what it starts from, read from disk;
    imagine(anchor, c2w [N,4,4], K [3,3], kept) -> Views of the frames whose indices are `kept`.
    """

    networks: tuple = ()  # a teacher that has some reads them here, when first asked
    generates = False  # such a teacher's moves and turns must be measured to pass
    exact = False  # one that generates but moves as far as asked: no --gain

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.gains = {}  # of the pictures asked about

    def refuses(self, trajectory: dict) -> str:
        """Why this teacher cannot take a trajectory, and what would help; empty: it can."""
        return ""


# --- camera ---
# Docstrings say an array's shape: N frames of a trajectory, n kept ones, H W picture size.


def intrinsics(width, height, fov_x_deg):
    """K [3,3] float32 in pixels: square ones, the centre in the middle (pixel j spans j..j+1)."""
    focal_px = 0.5 * width / math.tan(math.radians(fov_x_deg) / 2)
    return np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]], np.float32)


def intrinsics_of(trajectory: dict):
    return intrinsics(trajectory["width"], trajectory["height"], trajectory["fov_x_deg"])


def focal_and_centre(K):
    """(focal length, x, y of the centre) in pixels."""
    return K[0, 0], K[0, 2], K[1, 2]


def fov_x_deg_of(K):
    return 2 * math.degrees(math.atan(K[0, 2] / K[0, 0]))


def size_of(K):
    """Width and height of the picture: twice its centre."""
    return (2 * K[:2, 2]).round().astype(int).tolist()


@lru_cache(maxsize=8)
def pixel_rays(width, height, focal_px):
    """x [1,W] and y [H,1] of every pixel centre's ray (x, y, 1): z = 1, so distances are depths."""
    x, y = (np.arange(n, dtype=np.float32) + 0.5 - n / 2 for n in (width, height))
    return (x / focal_px)[None], (y / focal_px)[:, None]


def rays_of(K):
    return pixel_rays(*size_of(K), float(K[0, 0]))


def yaw_matrix(yaw_deg):
    """R [3,3]: +yaw turns right."""
    yaw = math.radians(yaw_deg)
    c, s = math.cos(yaw), math.sin(yaw)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def yaw_deg_of(R):
    return math.degrees(math.atan2(R[0, 2], R[2, 2]))


# --- the simulator: surfaces ---
TEXELS = 256  # side of one surface pattern; it repeats
TEXELS_PER_M = 32  # so a pattern repeats every 8 m, further than most walls are wide
LEVELS = 5  # blurred copies of each pattern, for far surfaces
# Faces of a room: 2 * axis + (is it the far side?), so 4 is the ceiling and 5 the floor.
CONTRAST = np.array([1, 1, 1, 1, 0.3, 0.7])  # of the pattern on each face
SHADOWS = 8  # tones of the floor under an object, beside its own


@lru_cache(maxsize=1)
def pattern_bank():
    """uint8 [LEVELS, patterns, TEXELS, TEXELS], the same in every run.

    Random tones per cell make a place on a wall unlike its neighbours. Level l is the pattern
    averaged over 2^l x 2^l texels. Those that may lie on a floor are there in four directions.
    """
    S, rng = TEXELS, np.random.default_rng(7)
    row, column = np.mgrid[:S, :S]
    frequency = np.fft.fftfreq(S) * S
    frequency = np.maximum(np.hypot(frequency[:, None], frequency), 2)

    def noise(power):  # cloudy, repeats without a seam
        spectrum = np.fft.fft2(rng.standard_normal((S, S)))
        cloud = np.fft.ifft2(spectrum / frequency**power).real
        return np.clip(0.5 + cloud / (4 * cloud.std()), 0, 1)

    def tones(low, height, width, along):  # a random one per cell
        return rng.uniform(low, 1, (S // height, S // width))[row // height, along // width]

    along = (column + 16 * (row // 16 % 2)) % S
    joint = (row % 16 < 2) | (along % 32 < 2)
    bricks = np.where(joint, 0.1, tones(0.25, 16, 32, along))
    checks = 0.6 * ((row // 16 + column // 16) % 2) + 0.4 * tones(0, 16, 16, column)
    stripes = np.repeat(rng.uniform(0, 1, 64), rng.integers(5, 20, 64))[:S][None].repeat(S, 0)
    panels = np.full((S, S), 0.75)
    for _ in range(60):
        (top, left), tone = rng.integers(0, S, 2), rng.uniform(0, 1)
        rows = (top + np.arange(rng.integers(8, 40))) % S
        columns = (left + np.arange(rng.integers(8, 40))) % S
        panels[np.ix_(rows, columns)] = tone
    kinds = [stripes, bricks]
    for kind in (checks, panels, noise(1.3)):
        kinds += [np.rot90(kind, turns) for turns in range(4)]
    level = [0.75 * kind + 0.25 * noise(1.0) for kind in kinds]
    # of the other world, drawn last: zigzags, dots, diamonds
    zigzags = rng.uniform(0, 1, 16)[(row + abs(column % 64 - 32)) % S // 16]
    off_row, off_column = abs(row % 32 - 16), abs(column % 32 - 16)
    spots = tones(0.5, 32, 32, column)
    dots = np.where(np.hypot(off_row, off_column) < 10, spots, 0.1)
    diamonds = np.where(off_row + off_column < 16, spots, 0.2)
    for kind in (zigzags, dots, diamonds):
        level += [np.rot90(kind, turns) for turns in range(4)]
    level = np.stack(level)
    levels = [level]
    for size in (1, 2, 4, 8):
        for axis in (1, 2):
            level = (level + np.roll(level, size, axis)) / 2
        levels.append(np.roll(level, (-size, -size), (1, 2)))  # back to the averaged square
    return (255 * np.stack(levels)).astype(np.uint8)


class Room(NamedTuple):
    """A room file made ready to render: n parts of the objects' groups, in room axes."""

    half_m: np.ndarray  # [3] half extents, y: half the height
    camera_height_m: float
    objects: list[dict]
    meets: np.ndarray  # [n] function that meets the part's shape
    owners: np.ndarray  # [1+n] uint8, 0 and 1 + index of each part's object
    half_sizes: np.ndarray  # [n,3] float32
    centers: np.ndarray  # [n,3] float32
    turns: np.ndarray  # [n,3,3] float32, part to room axes
    corners: np.ndarray  # [n,8,3] float32, of each part's bounding box
    colors: np.ndarray  # [n,3] float32
    light: np.ndarray  # [3] unit vector towards the light, y down
    ambient: float  # share of the light that comes from everywhere
    face_pattern: np.ndarray  # [6] int32, start of each face's pattern in the bank
    face_shift: np.ndarray  # [4] of each wall, texels by which its pattern is moved on both axes
    flat_shift: int  # the same of floor and ceiling
    palette: np.ndarray  # [(6+SHADOWS)*256] uint32, face and pattern value -> RGBx
    shadows: np.ndarray  # [s,s] int32, places on the floor -> what is added to index the palette


def prepare_room(room: dict) -> Room:
    """Room record (see 01) -> Room. Raises KeyError, TypeError, ... when it is not one.

    Colors, patterns and light are drawn by texture_seed, so that none of them tells a heading.
    """
    objects, rng = room["objects"], np.random.default_rng(room["texture_seed"])
    half_m = np.array([room[key] for key in ("width_m", "height_m", "depth_m")], np.float32) / 2
    if not (half_m > 0).all() or half_m.max() > 50 or len(objects) > 255:
        raise ValueError("a room is at most 100 m wide and holds at most 255 objects")
    owners, parts, turns, centers = [0], [], [], []
    for number, thing in enumerate(objects, 1):
        thing["id"], thing["label"], thing["size_m"]
        R = yaw_matrix(thing["yaw_deg"])
        for part in thing["parts"]:
            owners.append(number)
            parts.append(part)
            turns.append(R @ yaw_matrix(part["yaw_deg"]))
            centers.append(R @ part["center_m"] + thing["center_m"])
    meets = np.array([SHAPES[part["shape"]][0] for part in parts], object)
    half_sizes = np.array([part["size_m"] for part in parts], np.float32).reshape(-1, 3) / 2
    colors = np.array([part["color"] for part in parts], np.float32).reshape(-1, 3)
    turns = np.array(turns, np.float32).reshape(-1, 3, 3)
    centers = np.array(centers, np.float32).reshape(-1, 3)
    unit = np.array([*itertools.product((-1, 1), repeat=3)], np.float32)
    corners = (unit * half_sizes[:, None]) @ turns.transpose(0, 2, 1) + centers[:, None]
    owners = np.array(owners, np.uint8)
    bodies = meets, owners, half_sizes, centers, turns, corners, colors

    light = yaw_matrix(rng.uniform(0, 360)) @ [0.6, -0.8, 0]
    paper = (np.arange(4) == rng.integers(8)) + 0  # 1: the accent wall of every other room
    other = room.get("world") == "other"
    walls = rng.permutation([14, 18, 22] if other else [0, 1, 2, 6, 10])
    flats = rng.integers(2, 14, 2) + 12 * other
    pattern = np.r_[walls[paper], flats] * TEXELS**2
    *wall_shift, flat_shift = rng.integers(0, TEXELS, 5).tolist()
    rgb = rng.uniform(100, 215, (6, 1)) + rng.uniform(-35, 35, (6, 3))  # paler than objects
    rgb *= 0.55 if other else 1
    rgb[:4] = rgb[paper]
    rgb[4] = 120 + rgb[4] / 2  # most ceilings are light
    # Half as dark to a third brighter: the hue stays the wall's own.
    tone = 1 + CONTRAST[:, None, None] * np.linspace(-0.5, 0.35, 256)[:, None]
    faces = np.clip(rgb[:, None] * tone, 0, 255)
    dark = 1 - 0.5 * np.arange(1, SHADOWS + 1)[:, None, None] / SHADOWS
    palette = np.zeros((6 + SHADOWS, 256, 4), np.uint8)
    palette[..., :3] = np.concatenate([faces, faces[5] * dark])
    palette = palette.reshape(-1).view(np.uint32)
    look = light.astype(np.float32), rng.uniform(0.6, 0.8), pattern.astype(np.int32)
    look += np.array(wall_shift, np.float32), flat_shift, palette, floor_shadows(objects, half_m)
    return Room(half_m, float(room["camera_height_m"]), objects, *bodies, *look)


def floor_shadows(objects: list[dict], half_m):
    """Room.shadows: an ellipse around the footprint of everything that stands on the floor."""
    reach_m = float(max(half_m[0], half_m[2]))
    shadows = np.zeros((int(2 * reach_m * TEXELS_PER_M) + 2,) * 2, np.int32)
    for thing in objects:
        (x, y, z), (width, height, depth) = thing["center_m"], thing["size_m"]
        if -y - height / 2 > 0.1:
            continue
        radius_m, place = math.hypot(width, depth) / 2 + 0.2, np.array([x, z]) + reach_m
        reach = (place + [[-radius_m], [radius_m]]) * TEXELS_PER_M
        (left, top), (right, bottom) = np.maximum(reach, 0).astype(int)
        window = shadows[top:bottom, left:right]
        v, u = np.indices(window.shape, sparse=True)
        dx = (left + (u + 0.5)) / TEXELS_PER_M - place[0]
        dz = (top + (v + 0.5)) / TEXELS_PER_M - place[1]
        cos, _, sin = yaw_matrix(thing["yaw_deg"])[0]
        across, along = cos * dx - sin * dz, sin * dx + cos * dz
        away = (across / (width / 2 + 0.15)) ** 2 + (along / (depth / 2 + 0.15)) ** 2
        level = np.clip((1.2 - away) * SHADOWS, 0, SHADOWS).astype(np.int32)
        np.maximum(window, 256 * level, out=window)
    return shadows


# --- the simulator: rays ---
# Each shape is met in its own axes, centre at the origin, half sizes (hx, hy, hz), y down.
# o [3] is the camera, d the rays of a window: x [1,w], y [h,1], z [1,w]. meet_* returns the depth
# t [h,w] of the first hit (inf: none), normal_* the outward normals at points p [3,m].


def roots(a, b, c):
    """Both solutions of a t^2 + 2 b t + c = 0; NaN, which no comparison accepts, for none."""
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def meet_ball(o, d, half):
    (ox, oy, oz), (dx, dy, dz) = o, d
    a, b = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz
    t, _ = roots(a, b, o @ o - half[0] ** 2)
    return np.where(t > 0, t, np.inf)


def meet_crate(o, d, half):
    enters, leaves = -np.inf, np.inf
    for i in (0, 2, 1):  # [1,w] as long as that will do
        side = np.copysign(half[i], d[i])  # the far one
        enters = np.maximum(enters, (-side - o[i]) / d[i])
        leaves = np.minimum(leaves, (side - o[i]) / d[i])
    return np.where((enters < leaves) & (enters > 0), enters, np.inf)


def meet_cap(o, d, y_m, radius_m):
    (ox, oy, oz), (dx, dy, dz) = o, d
    t = (y_m - oy) / dy
    inside = (ox + t * dx) ** 2 + (oz + t * dz) ** 2 <= radius_m**2
    return np.where((t > 0) & inside, t, np.inf)


def meet_pillar(o, d, half):
    (ox, oy, oz), (dx, dy, dz), (radius, tall, _) = o, d, half
    t, _ = roots(dx * dx + dz * dz, ox * dx + oz * dz, ox**2 + oz**2 - radius**2)
    t = np.where((t > 0) & (np.abs(oy + t * dy) <= tall), t, np.inf)
    if abs(oy) > tall:  # the camera sees its top or its bottom
        t = np.minimum(t, meet_cap(o, d, math.copysign(tall, oy), radius))
    return t


def meet_cone(o, d, half):
    (ox, oy, oz), (dx, dy, dz), (radius, tall, _) = o, d, half
    slope2, y = (radius / (2 * tall)) ** 2, oy + tall  # x^2 + z^2 = slope^2 y^2, apex at y = 0
    a = dx * dx + dz * dz - slope2 * dy * dy
    b = ox * dx + oz * dz - slope2 * y * dy
    t = np.inf
    for root in roots(a, b, ox**2 + oz**2 - slope2 * y * y):
        at = y + root * dy
        t = np.where((root > 0) & (root < t) & (at >= 0) & (at <= 2 * tall), root, t)
    return np.minimum(t, meet_cap(o, d, tall, radius)) if oy > tall else t


def normal_ball(p, half):
    return p / half[0]


def normal_crate(p, half):
    share = p / half
    face = np.abs(share).argmax(0)
    return np.where(face == np.arange(3)[:, None], np.sign(share), 0)


def normal_pillar(p, half):
    x, y, z = p
    side = np.abs(y) < 0.9999 * half[1]
    return np.stack([side * x / half[0], ~side * np.sign(y), side * z / half[0]])


def normal_cone(p, half):
    x, y, z = p
    slope, radius = half[0] / (2 * half[1]), np.hypot(x, z) + 1e-6
    normal = np.stack([x / radius, np.full_like(radius, -slope), z / radius])
    below = y > 0.9999 * half[1]
    return np.where(below, [[0], [1], [0]], normal / np.hypot(1, slope))


SHAPES = {
    "ball": (meet_ball, normal_ball),
    "crate": (meet_crate, normal_crate),
    "pillar": (meet_pillar, normal_pillar),
    "cone": (meet_cone, normal_cone),
}


def render(room: Room, pose, K):
    """One view from `pose` [4,4] (camera to room axes) -> picture uint8 [H,W,3], ids uint8 [H,W]
    (0 or 1 + object index), depth float32 [H,W].

    The camera is level (turns and moves leave it so). All rays of a column then meet the same
    upright line of a wall, at one depth, and all rays of a row the same depth of floor or ceiling:
    most of the work is on [1,W] and [H,1], and only indices are computed per pixel.
    """
    x, y = rays_of(K)
    (cos, _, sin), (ox, oy, oz) = pose[0, :3].tolist(), pose[:3, 3].tolist()
    hx, hy, hz = room.half_m
    oy += float(hy)  # now y = 0 is half-way up, so that all three axes look alike
    dx, dy, dz = cos * x + sin, y, cos - sin * x  # rays in room axes: R(yaw) @ (x, y, 1)

    def start(depth, face, softer):  # of the face's pattern, at the level of blur for its depth
        texels_per_px = depth * (TEXELS_PER_M / K[0, 0])
        level = np.ceil(np.log2(texels_per_px)) + softer
        level = np.clip(level, 0, LEVELS - 1).astype(np.int32)
        return level * pattern_bank()[0].size + room.face_pattern[face]

    with np.errstate(divide="ignore", invalid="ignore"):
        tx = (np.copysign(hx, dx) - ox) / dx
        ty = (np.copysign(hy, dy) - oy) / dy
        tz = (np.copysign(hz, dz) - oz) / dz
        on_x, wall = tx < tz, np.minimum(tx, tz)
        # Of each column its wall; of each row its floor or ceiling, which is seen at a grazing
        # angle: one level softer.
        face = np.where(on_x, dx > 0, 2 + (dz > 0)), 4 + (dy > 0)
        wall_start, flat_start = start(wall, face[0], 0), start(ty, face[1], 1)
        # Patterns run from left to right on every wall; 64 m more keep their texels positive, which
        # a cut to integers needs. Those of floor and ceiling start at a corner.
        shift = room.face_shift[face[0]] + 64 * TEXELS_PER_M
        along = np.where(on_x, -np.sign(dx) * (oz + wall * dz), np.sign(dz) * (ox + wall * dx))
        wall_u = (TEXELS_PER_M * along + shift).astype(np.int32)  # [1,W]
        wall_v = (dy * (TEXELS_PER_M * wall) + (TEXELS_PER_M * oy + shift)).astype(np.int32)
        near = TEXELS_PER_M * np.minimum(ty, 1e3)  # [H,1]; the horizon's floor is at infinity
        shift = TEXELS_PER_M * max(hx, hz) + room.flat_shift
        flat_u = (near * dx + (TEXELS_PER_M * ox + shift)).astype(np.int32)
        flat_v = (near * dz + (TEXELS_PER_M * oz + shift)).astype(np.int32)
    flat = ty < wall  # [H,W] from here on
    depth = np.minimum(ty, wall)
    repeat = TEXELS - 1  # the bits of a place within a pattern
    wall_texel = (wall_v & repeat) * TEXELS + (wall_u & repeat) + wall_start
    flat_texel = (flat_v & repeat) * TEXELS + (flat_u & repeat) + flat_start
    value = np.where(flat, flat_texel, wall_texel)
    wall_tone, flat_tone = ((f * 256).astype(np.int32) for f in face)
    picture = pattern_bank().take(value) + np.where(flat, flat_tone, wall_tone)
    floor = slice(int((dy <= 0).sum()), None)  # the rows below the horizon
    side = len(room.shadows)
    place = flat_v[floor] * side + (flat_u[floor] - room.flat_shift * (side + 1))
    picture[floor] += room.shadows.take(place, mode="clip") * flat[floor]
    picture = room.palette.take(picture)  # uint32
    parts = np.zeros(depth.shape, np.int16)
    origins = ((pose[:3, 3] - room.centers)[:, None] @ room.turns)[:, 0].astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        for index, window in windows(room, pose, K):
            x, y, z = dx[:, window[1]], dy[window[0]], dz[:, window[1]]
            c, s = room.turns[index, 0, ::2].tolist()  # to the part's axes: R^T, a turn about y
            rays, near = (c * x - s * z, y, s * x + c * z), depth[window]
            t = room.meets[index](origins[index], rays, room.half_sizes[index])
            np.copyto(parts[window], index + 1, where=t < near)
            np.minimum(near, t, out=near)
    paint(room, (dx, dy, dz), origins, picture, parts, depth)
    rgb = np.empty((*depth.shape, 3), np.uint8)
    for channel in range(3):  # three times as fast as one copy of [..., :3]
        rgb[..., channel] = picture.view(np.uint8)[:, channel::4]
    return rgb, room.owners.take(parts), depth


def windows(room: Room, pose, K):
    """(part index, (rows, columns)) of every part whose bounding box reaches into the view."""
    (width, height), pose = size_of(K), pose.astype(np.float32)
    seen = (room.corners - pose[:3, 3]) @ pose[:3, :3]  # [n,8,3] in camera axes
    aside, ahead = np.split(seen, [2], 2)
    near, far = ahead.min((1, 2)), ahead.max((1, 2))
    edge = ahead * (K[:2, 2] / K[0, 0])
    beside = (aside < -edge).all(1) | (aside > edge).all(1)
    pixel = aside / np.maximum(ahead, 0.05) * K[0, 0] + K[:2, 2]
    bounds = np.c_[np.floor(pixel.min(1)), np.ceil(pixel.max(1))]
    bounds[near <= 0.05] = 0, 0, width, height  # partly beside or behind the camera: no bound
    bounds = bounds.clip(0, [width, height, width, height]).astype(int)
    for index in np.flatnonzero((far > 0) & ~beside.any(1)).tolist():
        left, top, right, bottom = bounds[index].tolist()
        if top < bottom and left < right:
            yield index, (slice(top, bottom), slice(left, right))


def paint(room: Room, rays, origins, picture, parts, depth):
    """Write the colors of the parts that show into the picture [H,W]."""
    place = np.flatnonzero(parts)
    row, column = np.divmod(place.astype(np.int32), parts.shape[1])
    index, t = parts.ravel()[place] - 1, depth.ravel()[place]  # [m], and so all that follow
    x, y, z = (ray.ravel()[at] for ray, at in zip(rays, (column, row, column), strict=True))
    cos, _, sin = room.turns[:, 0].T.take(index, 1)
    d, half = (cos * x - sin * z, y, sin * x + cos * z), room.half_sizes.T.take(index, 1)
    p = origins.T.take(index, 1) + t * np.stack(d)
    lights, lambert = (room.light @ room.turns).T.take(index, 1), np.empty_like(t)
    for meet, normal in SHAPES.values():
        here = np.flatnonzero((room.meets == meet)[index])
        if len(here):
            n = normal(p.take(here, 1), half.take(here, 1))
            lambert[here] = (lights.take(here, 1) * n).sum(0)
    # Faint checks through the body show how it is turned; 1.96 keeps their edges off its faces.
    check = np.floor(p * (1.96 / half)).sum(0).astype(np.int32) & 1
    tone = (room.ambient + (1 - room.ambient) * lambert) * (1 - 0.18 * check)
    color = np.zeros((len(t), 4), np.uint8)
    for channel, value in enumerate(room.colors.T.take(index, 1)):
        color[:, channel] = np.minimum(tone * value, 255)
    picture.ravel()[place] = color.view(np.uint32)[:, 0]


def visible_objects(room: Room, ids, pose, shown) -> list[dict]:
    """The objects that show in `ids` [H,W]: exact box and number of their visible pixels, and
    where their centre is: horizontal distance, and bearing from the camera's axis, + right;
    score: the share of these pixels where `shown` [H,W] has the object too, and not paint."""
    found, (height, width) = [], ids.shape
    counts = np.bincount(ids.ravel())
    for index in (np.flatnonzero(counts[1:]) + 1).tolist():
        thing = room.objects[index - 1]
        mine = ids == index
        left, top, right, bottom = Image.fromarray(mine).getbbox()
        box = [BOX * left // width, BOX * top // height]
        box += [-(-BOX * right // width), -(-BOX * bottom // height)]
        x, _, z = (thing["center_m"] - pose[:3, 3]) @ pose[:3, :3]
        entry = {"id": thing["id"], "label": thing["label"], "box": box}
        entry |= {"visible_px": int(counts[index]), "distance_m": round(math.hypot(x, z), 3)}
        entry["bearing_deg"] = round(math.degrees(math.atan2(x, z)), 1)
        entry["score"] = round((shown[mine] == index).mean().item(), 2)
        found.append(entry)
    return found


def start_pose(room: Room, start: list[float]):
    """Pose [4,4] of frame 0 in the room from (x_m, z_m, yaw_deg)."""
    pose = np.eye(4)
    pose[:3, :3] = yaw_matrix(start[2])
    pose[:3, 3] = start[0], -room.camera_height_m, start[1]
    return pose


@lru_cache(maxsize=64)
def load_room(path: Path) -> Room:
    try:
        return prepare_room(json.loads(path.read_text()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Unusable(f"{path}: not a room file: {type(error).__name__} {error}") from None


def begin_in_room(trajectory: dict, cfg: Config):
    """The Room of a trajectory, and the pose [4,4] of its frame 0."""
    room = load_room(Path(cfg.run) / trajectory["room"])
    return room, start_pose(room, trajectory["start"])


class Simulator(Teacher):
    """Exact views of a room."""

    def refuses(self, trajectory: dict) -> str:
        if trajectory["room"]:
            return ""
        return "simulator draws rooms, not photographs (add --teacher warp)"

    def anchor(self, trajectory: dict):
        return begin_in_room(trajectory, self.cfg)

    def imagine(self, anchor, c2w, K, kept: list[int]) -> Views:
        (room, start), frames, objects, depths = anchor, [], [], []
        for pose in start @ c2w[kept]:
            place_m = pose[:3, 3] + [0, room.half_m[1], 0]
            if (np.abs(place_m) > room.half_m - 0.01).any():
                raise Unusable("the camera leaves the room: run 01 again")
            picture, ids, depth = render(room, pose, K)
            frames.append(picture)
            depths.append(depth)
            objects.append(visible_objects(room, ids, pose, ids))
        return Views(np.stack(frames), K, objects, depth=np.stack(depths))


# --- networks from files ---
FAULTS = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError)


def network_place(name: str):
    """Where --device puts a teacher's networks, and in what precision they run."""
    if name == "auto":
        local = os.environ.get("LOCAL_RANK", 0)  # of torchrun: a GPU for each process
        name = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an unknown name; a build without CUDA
        stop(f"--device {name}: {first_line(error)}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches there
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32


def first_line(error):
    return str(error).strip().split("\n")[0]


def random_numbers(*key):
    """A generator on the CPU that depends on the key alone, on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fetched(source: str, wanted: list[str]) -> Path:
    """The folder of a hub id, its files that match `wanted` downloaded; a folder as it is."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        stop(f"{source} is no folder here, and the hub does not give it: {first_line(error)}")


def load_part(folder: Path, kind: type, dtype=None, **others):
    """An object of class `kind` from a folder of diffusers' or transformers' layout; with a dtype
    a network, ready to use; `others`: for its from_pretrained.

    The caller names the class, weights come from safetensors, and code in the folder is never run.
    What does not load whole ends the run with one line that names its file.
    """
    library = sys.modules[kind.__module__.split(".")[0]]
    library.utils.logging.set_verbosity(50)  # none: what is wrong is said here, in one line
    library.utils.logging.disable_progress_bar()
    place, options = folder, {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if library.__name__ == "transformers":
        options |= {"trust_remote_code": False, "ignore_mismatched_sizes": True}  # report has them
    try:
        if dtype is None:
            return kind.from_pretrained(folder, trust_remote_code=False, **others)
        for place in sorted(folder.glob("*.safetensors")):
            safe_open(place, "pt")  # compares the file's length with what its head says
        config = json.loads((folder / "config.json").read_text())
        if "_class_name" in config and config["_class_name"] != kind.__name__:
            raise ValueError(f"its config.json is that of a {config['_class_name']}")
        network, report = kind.from_pretrained(folder, **options)
        lacking = [*report["missing_keys"], *report["mismatched_keys"]]  # would be random numbers
        if lacking:
            raise ValueError(f"it lacks, or has in another shape, {lacking[:3]}")
        return network.eval().requires_grad_(False)
    except FAULTS as error:
        stop(f"{place} does not load as {kind.__name__}: {first_line(error)}")


# --- warp: photographs ---
FAR_M = 100.0  # the sky, and all that is further, stands there
METRIC = {"depth_pro", "glpn", "tipsv2_dpt"}  # model types whose depth is metres


def sample(image, u, v):
    """Bilinear values of image [h,w,...] at pixel coordinates u, v (pixel j's centre: j + 0.5).

    Beyond the outer centres the edge goes on.
    """
    height, width = image.shape[:2]
    u, v = np.clip(u - 0.5, 0, width - 1), np.clip(v - 0.5, 0, height - 1)
    left, top = u.astype(np.int32), v.astype(np.int32)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    channels = (...,) + (None,) * (image.ndim - 2)
    along, down = (u - left)[channels], (v - top)[channels]
    upper = image[top, left] * (1 - along) + image[top, right] * along
    lower = image[bottom, left] * (1 - along) + image[bottom, right] * along
    return upper * (1 - down) + lower * down


def project(x, y, z, K):
    """Pixel coordinates u, v of points in camera axes, and which of them the picture spans."""
    focal, cx, cy = focal_and_centre(K)
    with np.errstate(divide="ignore", invalid="ignore"):
        u, v = focal * x / z + cx, focal * y / z + cy
    return u, v, (u >= 0) & (u <= 2 * cx) & (v >= 0) & (v <= 2 * cy)


def at_pixels(image, u, v):
    """Values of image [h,w] in the pixels that hold u, v, or its nearest ones."""
    height, width = image.shape
    return image[v.astype(int).clip(0, height - 1), u.astype(int).clip(0, width - 1)]


def came_from(c2w, K, z, K0=None):
    """The docstring's equation: for each pixel of the view from c2w at depth z [H,W], its place
    u, v in frame 0 (K0, unless it is K too) and its depth there; and holes bool [H,W], the pixels
    that have none."""
    x, y = rays_of(K)
    known = np.isfinite(z)
    z = np.where(known, z, 1)
    X, Y, Z = (z * (a * x + b * y + c) + t for a, b, c, t in c2w[:3])
    u, v, inside = project(X, Y, Z, K if K0 is None else K0)
    holes = ~(known & (Z > 0) & inside)
    return np.where(holes, 0, u), np.where(holes, 0, v), Z, holes


def look_back(picture, c2w, K, z):
    """Picture uint8 [H,W,3] seen from c2w at depth z [H,W] -> view, and as `came_from`."""
    u, v, _, holes = came_from(c2w, K, z)
    view = sample(picture.astype(np.float32), u, v) + 0.5
    view[holes] = FILL
    return view.astype(np.uint8), u, v, holes


def splat_depth(depth, c2w, K):
    """Depth map [H,W] of frame 0 (inf: unknown) -> that of the view from c2w, inf where no
    surface lands.

    Where the camera comes nearer, surfaces spread, so each pixel is split into `fine` x `fine`
    points; between them depth is interpolated, but not across an edge (a step of a tenth).
    """
    height, width = depth.shape
    known = np.isfinite(depth)
    ahead = np.percentile(depth[known], 2) if known.any() else 1.0
    fine = math.ceil(ahead / max(ahead - c2w[2, 3], 0.05))
    fine = min(max(fine, 1), 3) + 1
    v, u = (np.indices((height * fine, width * fine)) + 0.5) / fine
    nearest = depth.repeat(fine, 0).repeat(fine, 1)
    smooth = sample(np.where(known, depth, 1e9), u, v)
    z = np.where(np.abs(smooth - nearest) < 0.1 * nearest, smooth, nearest)
    u, v, z = (values[np.isfinite(nearest)] for values in (u, v, z))
    focal, cx, cy = focal_and_centre(K)
    points = np.stack([(u - cx) / focal * z, (v - cy) / focal * z, z], -1)  # [m,3], frame 0's axes
    points = (points - c2w[:3, 3]) @ c2w[:3, :3]  # the new view's axes
    x, y, z = points[points[:, 2] > 0.01].T
    u, v, _ = project(x, y, z, K)
    column, row = np.floor(u), np.floor(v)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixel, z = (row * width + column)[inside].astype(np.int64), z[inside]
    surface = np.full(height * width, np.inf)
    np.minimum.at(surface, pixel, z)
    # A pixel's depth is the mean over its nearest surface, which is the depth at its centre.
    front = z < 1.05 * surface[pixel]
    pixel, z = pixel[front], z[front]
    total, count = np.bincount(pixel, z, surface.size), np.bincount(pixel, minlength=surface.size)
    surface[pixel] = total[pixel] / count[pixel]
    return surface.reshape(height, width)


@lru_cache(maxsize=4)
def load_photo(path: Path, size=None):
    """uint8 [H,W,3]; in its own size unless another (width, height) is given."""
    try:
        picture = read_picture(path)
    except ValueError as error:
        raise Unusable(error) from None
    return np.asarray(picture.resize(size, Image.LANCZOS) if size else picture)


@lru_cache(maxsize=4)
def load_depth(path: Path, size):
    """float32 [H,W] metres along the viewing axis, inf where unknown; nearest pixel of the file."""
    try:
        depth = np.load(path, allow_pickle=False).astype(np.float32)
        axes = zip(depth.shape, size[::-1], strict=True)
        places = [((np.arange(want) + 0.5) * have / want).astype(int) for have, want in axes]
        depth = depth[np.ix_(*places)]
    except (OSError, ValueError, EOFError, IndexError, TypeError, MemoryError) as error:
        raise Unusable(f"{path}: want a depth map, metres [H,W]: {error}") from None
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.inf)


def depth_file(trajectory: dict, cfg: Config) -> Path:
    photo = Path(trajectory["anchor"])
    return Path(cfg.depth_dir or photo.parent) / f"{photo.stem}.depth.npy"


@lru_cache(maxsize=1)
def load_depth_network(name: str, device: str):
    """(picture processor, model) of a metric depth checkpoint, by folder or hub id."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation  # a second to import

    folder = fetched(name, ["*.json", "*.safetensors"])
    processor = load_part(folder, AutoImageProcessor)
    model = load_part(folder, AutoModelForDepthEstimation, torch.float32)  # bfloat16: 2 cm at 3 m
    kind = getattr(model.config, "depth_estimation_type", "relative")
    if model.config.model_type not in METRIC and kind != "metric":
        stop(f"--depth {name} gives depths without a scale: name a metric checkpoint")
    return processor, model.to(network_place(device)[0])


@lru_cache(maxsize=4)
def estimate_depth(photo: Path, size, name: str, device: str):
    """Depth [H,W] in metres of a photograph. Its trajectories follow each other: few are cached."""
    return network_depth(Image.fromarray(load_photo(photo, size)), name, device, photo)


def network_depth(picture: Image.Image, name: str, device: str, photo):
    """Depth [h,w] in metres of a picture; `photo` names it where it fails."""
    processor, model = load_depth_network(name, device)
    shape = picture.size[::-1]
    inputs = processor(images=picture, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        found = processor.post_process_depth_estimation(model(**inputs), target_sizes=[shape])
    depth = found[0]["predicted_depth"].float().cpu().numpy().reshape(shape)
    if not np.isfinite(depth).all():
        raise Unusable(f"{photo}: --depth {name} returns depths that are no numbers")
    return np.clip(depth, 0.01, FAR_M)


def only_turns(trajectory):
    return all(name.startswith("turn") for name, _ in trajectory["actions"])


class WarpAnchor(NamedTuple):
    picture: np.ndarray  # uint8 [H,W,3]
    depth: np.ndarray | None = None  # [H,W] metres; without it the camera can only turn
    source: str | None = None  # of the depth
    room: tuple | None = None  # the Room, the pose [4,4] and ids [H,W] of its frame 0
    name: tuple = ()  # of the trajectory, for the noise of --fill


class Warp(Teacher):
    """Moves the pixels of one picture. In a room that is the simulator's frame 0, whose objects
    move with their pixels: a box is that of what the view shows, with --fill the true one of an
    object that frame 0 shows, painted over or not."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.generates, self.exact = bool(cfg.fill), True

    @cached_property
    def networks(self) -> tuple:
        """Those of --depth, then that of --fill."""
        depth = load_depth_network(self.cfg.depth, self.cfg.device) if self.cfg.depth else ()
        return (*depth, Fill(self.cfg)) if self.cfg.fill else depth

    def refuses(self, trajectory: dict) -> str:
        free = trajectory["room"] or self.cfg.depth or only_turns(trajectory)
        if free or depth_file(trajectory, self.cfg).is_file():
            return ""
        return "warp needs metres to move: <photo stem>.depth.npy, or a checkpoint with --depth"

    def anchor(self, trajectory: dict) -> WarpAnchor:
        name = trajectory["scene_id"], trajectory["traj_id"]
        if trajectory["room"]:
            room, start = begin_in_room(trajectory, self.cfg)
            picture, ids, depth = render(room, start, intrinsics_of(trajectory))
            return WarpAnchor(picture, depth, "exact", (room, start, ids), name)
        photo, file, cfg = Path(trajectory["anchor"]), depth_file(trajectory, self.cfg), self.cfg
        size = trajectory["width"], trajectory["height"]
        depth = source = None
        if file.is_file():
            depth, source = load_depth(file, size), file.name
        elif cfg.depth and not only_turns(trajectory):
            depth, source = estimate_depth(photo, size, cfg.depth, cfg.device), cfg.depth
        return WarpAnchor(load_photo(photo, size), depth, source, name=name)

    def imagine(self, anchor: WarpAnchor, c2w, K, kept: list[int]) -> Views:
        frames, holes, objects, depths = [], [], [], []
        for pose in c2w[kept]:
            moved = np.abs(pose[:3, 3]).max() > 1e-6
            z = splat_depth(anchor.depth, pose, K) if moved else 1.0
            view, u, v, hidden = look_back(anchor.picture, pose, K, z)
            # in photographs, which large pipelines paint, all known pixels stay
            if self.cfg.fill and anchor.room:
                hidden = with_decoy(hidden, anchor.depth, pose, K)
            frames.append(view)
            holes.append(hidden)
            depths.append(z if moved else np.full(hidden.shape, np.inf))
            if anchor.room:
                room, start, ids = anchor.room
                true = shown = np.where(hidden, 0, at_pixels(ids, u, v))
                if self.cfg.fill:
                    true = render(room, start @ pose, K)[1]
                    true = np.where(np.isin(true, ids), true, 0)
                objects.append(visible_objects(room, true, start @ pose, shown))
        if anchor.depth is not None:
            depths[0] = anchor.depth
        frames, holes, settings = np.stack(frames), np.stack(holes), {"depth": anchor.source}
        if self.cfg.fill:
            settings |= {"fill": self.cfg.fill, "painted": holes.mean((1, 2)).round(4).tolist()}
            frames, holes = self.networks[-1](frames, holes, anchor.name), None
        return Views(frames, K, objects or None, holes, np.stack(depths), settings=settings)


# --- warp --fill: what the picture does not show ---
# B views; h w: a cell of 2 x 2 pixels, as the small network sees them.
FILL_STEPS = 3
PROMPT = "the same place, in the same light"


def widen(holes):
    """Holes [B,H,W], and the pixels beside one: a seam would tell the motion."""
    return F.max_pool2d(torch.as_tensor(holes).float()[:, None], 3, 1, 1)[:, 0].bool()


def to_unit(pictures):
    """uint8 -> float32 in -1..1."""
    return pictures.float() / 127.5 - 1


def spread(warped, painted):
    """Views [B,3,H,W] whose painted parts, [B,1,H,W], are grown over from what is known, a ring of
    pixels at a time: walls and floors go on beyond what a small network sees at once."""
    found = torch.cat([warped, torch.ones_like(painted)], 1) * (1 - painted)
    for _ in range(max(painted.shape[-2:])):
        if found[:, 3:].all():
            break
        near = 9 * F.avg_pool2d(found, 3, 1, 1)  # sums over known neighbours, and their number
        near = near / near[:, 3:].clamp(min=1)
        found = torch.where(found[:, 3:] > 0, found, near)
    return found[:, :3]


def fill_predict(network, noisy, known, painted, t):
    """The clean views [B,3,H,W] that a UNet2DModel sees behind noisy ones at noise share t [B].

    known: warped views, their holes `spread` over, of which the network says the difference;
    painted [B,1,H,W]: 1 in holes.
    """
    *_, height, width = noisy.shape
    seen = torch.cat([noisy, known, painted], 1)
    seen = F.pad(seen, (0, -width % 16, 0, -height % 16), mode="replicate")  # four levels of cells
    change = network(F.pixel_unshuffle(seen, 2), 1000 * t).sample  # [B,12,h,w]
    return known + F.pixel_shuffle(change, 2)[..., :height, :width]


def fill_sample(network, noise, warped, painted, steps):
    """Views [B,3,H,W] from noise: Euler steps of the flow x_t = (1 - t) x + t noise, from t = 1."""
    x, levels, known = noise, torch.linspace(1, 0, steps + 1), spread(warped, painted)
    for t, lower in itertools.pairwise(levels.to(noise)):
        clean = fill_predict(network, x, known, painted, t.expand(len(x)))
        x = clean + (x - clean) * lower / t
    return x


def with_decoy(holes, depth, pose, K):
    """Holes [H,W] of the view from c2w `pose`, and those of the way back if a third of the view
    stays: what a small network paints can be told from the rest, so its place must not tell the
    way. A motion and its reverse, from one picture, are painted in the same places."""
    back = np.linalg.inv(pose)
    there = splat_depth(depth, back, K) if np.abs(pose[:3, 3]).max() > 1e-6 else 1.0
    both = holes | came_from(back, K, there)[3]
    return both if both.mean() < 2 / 3 else holes


class Fill:
    """What paints the holes of warped views: --fill. All other pixels stay."""

    def __init__(self, cfg: Config):
        self.cfg, (self.device, dtype) = cfg, network_place(cfg.device)
        folder = fetched(cfg.fill, ["*.json", "*.safetensors", "*.txt", "*.model"])
        if (folder / "model_index.json").is_file():
            from diffusers import AutoPipelineForInpainting  # here: it takes seconds to import

            options = {"torch_dtype": dtype, "use_safetensors": True}
            self.model = load_part(folder, AutoPipelineForInpainting, **options)
            self.model.set_progress_bar_config(disable=True)
            self.paint = self.pipeline
        else:
            from diffusers import UNet2DModel

            self.model = load_part(folder, UNet2DModel, torch.float32)
            self.paint = self.network
        self.model.to(self.device)

    def __call__(self, frames, holes, name):
        """Views uint8 [n,H,W,3] with holes bool [n,H,W] -> whole ones. name: for the noise."""
        painted, frames = widen(holes).numpy(), frames.copy()
        for i in np.flatnonzero(painted.any((1, 2))).tolist():
            key = (self.cfg.seed, *name, "fill", i)
            made = self.paint(frames[i], painted[i], random_numbers(*key))
            frames[i] = np.where(painted[i][..., None], made, frames[i])
        return frames

    @torch.inference_mode()
    def network(self, frame, painted, random):
        noise = torch.randn((1, 3, *painted.shape), generator=random).to(self.device)
        warped = to_unit(torch.from_numpy(frame)).permute(2, 0, 1)[None].to(self.device)
        painted = torch.from_numpy(painted)[None, None].float().to(self.device)
        made = fill_sample(self.model, noise, warped, painted, self.cfg.steps or FILL_STEPS)
        return ((made[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()

    def pipeline(self, frame, painted, random):
        height, width = painted.shape
        beyond = ((0, -height % 64), (0, -width % 64))  # its latents are smaller, halved thrice
        image = Image.fromarray(np.pad(frame, (*beyond, (0, 0)), mode="edge"))
        mask = Image.fromarray(np.pad(painted, beyond))
        options = {"width": image.width, "height": image.height, "generator": random}
        options |= {"num_inference_steps": self.cfg.steps or 30}
        options |= {"guidance_scale": self.cfg.guidance} if self.cfg.guidance else {}
        made = self.model(prompt=PROMPT, image=image, mask_image=mask, **options).images[0]
        return np.asarray(made)[:height, :width]


# --- pan: cameras inside a photograph or a panorama ---
class Pan(Teacher):
    """Turned views inside a photograph or a 360-degree panorama: exact, whole, without weights.

    An anchor is (picture uint8 [h,w,3], yaw of frame 0 in it, its field of view).
    """

    def refuses(self, trajectory: dict) -> str:
        if trajectory.get("start_yaw_deg") is not None and only_turns(trajectory):
            return ""
        return "pan turns inside a photograph: make its trajectories by 01 --images ... --pan"

    def anchor(self, trajectory: dict):
        path, fov_deg = Path(trajectory["anchor"]), trajectory["photo_fov_deg"]
        photo = load_photo(path)
        if not trajectory["panorama"]:
            # brought to the frames' pixels per degree, so that nothing flickers
            fovs_deg = trajectory["fov_x_deg"], fov_deg
            half, whole = (math.tan(math.radians(fov / 2)) for fov in fovs_deg)
            width = round(trajectory["width"] * whole / half)
            size = width, round(width * photo.shape[0] / photo.shape[1])
            photo = load_photo(path, size)
        return photo, trajectory["start_yaw_deg"], fov_deg, trajectory["panorama"]

    def imagine(self, anchor, c2w, K, kept: list[int]) -> Views:
        photo, yaw_deg, fov_deg, panorama = anchor
        height, width = photo.shape[:2]
        if panorama:  # one column more on either side: the picture's ends meet
            photo = np.pad(photo, ((0, 0), (1, 1), (0, 0)), mode="wrap")
        photo, frames = photo.astype(np.float32), []
        x, y = rays_of(K)
        for pose in c2w[kept]:
            R = yaw_matrix(yaw_deg) @ pose[:3, :3]  # frame to picture axes
            X, Y, Z = (a * x + b * y + c for a, b, c in R)
            if panorama:  # equirectangular: a column is a longitude, a row is a latitude
                u = (np.arctan2(X, Z) / (2 * np.pi) + 0.5) * width % width + 1
                v = (np.arctan2(Y, np.hypot(X, Z)) / np.pi + 0.5) * height
            else:
                u, v, _ = project(X, Y, Z, intrinsics(width, height, fov_deg))
            frames.append((sample(photo, u, v) + 0.5).astype(np.uint8))
        return Views(np.stack(frames), K)


# --- svc: noise schedule, guidance, sampler ---
# A latent z is noised to z + sigma * noise. The network knows 1000 levels of sigma. T frames per
# call, n = 2 T where they stand twice: without the pictures, then with them. h w: latent size.


@lru_cache(maxsize=1)
def svc_levels():
    """float64 [1000], rising: the noise level of every time step, e^2.4 times that of the image
    model that the network grew from (more frames need more noise)."""
    beta = torch.linspace(5e-6**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - beta).cumprod(0)
    return ((1 - kept) / kept).sqrt() * math.exp(2.4)


def svc_sigmas(num_steps):
    """float32 [num_steps + 1]: falling noise levels, a final 0."""
    index = np.linspace(999, 0, num_steps, endpoint=False).astype(np.int64)
    return torch.cat([svc_levels()[index].float(), torch.zeros(1)])


def svc_denoise(network, x, sigma, cond):
    """The clean latents behind x [n,4,h,w] at noise level sigma [n], as the network sees them:

        x - sigma net(x / sqrt(sigma^2 + 1), ...)

    cond: replace [n,5,h,w] (known latents and their mask), concat [n,7,h,w], dense_vector
    [n,6,h,w], crossattn [n,1,D].
    """
    levels = svc_levels().to(sigma)
    step = (sigma[:, None] - levels).abs().argmin(1)  # [n]
    sigma = levels[step].view(-1, 1, 1, 1)
    known, mask = cond["replace"].split((4, 1), 1)
    x = x * (1 - mask) + known * mask
    x_in = torch.cat([x / (sigma**2 + 1).sqrt(), cond["concat"]], 1)
    return x - sigma * network(x_in, step, cond["crossattn"], cond["dense_vector"])


def svc_condition(latents, mask, plucker, clip_mean):
    """What the network is told, without the pictures and with them (see `svc_denoise`).

    latents [n_in,4,h,w] of the given frames in order, mask bool [T] (which frames they are),
    plucker [T,6,h,w], clip_mean [D]. The cameras are told both times: guidance strengthens what
    the pictures say, not where the camera stands.
    """
    T, _, h, w = plucker.shape
    replace = latents.new_zeros(T, 5, h, w)
    replace[mask] = F.pad(latents, (0, 0, 0, 0, 0, 1), value=1.0)
    given = replace[:, 4:]
    context = clip_mean.expand(T, 1, -1)
    return {
        "replace": torch.cat([0 * replace, replace]),
        "concat": torch.cat([torch.cat([given * k, plucker], 1) for k in (0, 1)]),
        "dense_vector": torch.cat([plucker, plucker]),
        "crossattn": torch.cat([0 * context, context]),
    }


def guidance_scale(c2w, K, mask, cfg, cfg_min=1.2):
    """How strongly each frame follows the pictures, [T]: `cfg`, and `cfg_min` where the camera
    stands and looks as one of a picture does. c2w [T,4,4], K [T,3,3], mask bool [T]."""
    R, centre = c2w[:, :3, :3], c2w[:, :3, 3]
    cosine = (torch.einsum("fij,gij->fg", R, R[mask]) - 1) / 2
    turned_deg = cosine.clamp(-1, 1).arccos().rad2deg().amin(1)
    moved = (centre[:, None] - centre[mask]).norm(dim=-1).amin(1)
    zoomed = (K[:, None] != K[mask]).flatten(2).any(-1).all(1)
    return torch.where((turned_deg < 10) & (moved < 1e-5) & ~zoomed, cfg_min, cfg)


def svc_sample(network, noise, cond, scale, num_steps, eps=None, progress=iter):
    """Latents [T,4,h,w] of all frames, float32, from noise [T,4,h,w] of variance 1.

    Each step asks the network twice in one batch, without and with the pictures, and goes beyond
    the second by `scale` [T]; then it takes one Euler step from noise level sigma to the next:

        D = D_without + scale (D_with - D_without),   x <- x + (sigma_next - sigma) (x - D) / sigma

    eps: num_steps noises [T,4,h,w]. The published sampler adds 1e-6 to sigma before each step, and
    in float32 that is a little noise; without eps none is added.
    """
    sigmas, scale = svc_sigmas(num_steps).to(noise), scale.to(noise).view(-1, 1, 1, 1)
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    for i in progress(range(num_steps)):
        sigma = sigmas[i] + 1e-6
        if eps is not None:
            x = x + eps[i].to(x) * (sigma**2 - sigmas[i] ** 2).clamp(min=0).sqrt()
        twice = torch.cat([x, x])
        without, given = svc_denoise(network, twice, sigma.expand(len(twice)), cond).chunk(2)
        denoised = without + scale * (given - without)
        x = x + (sigmas[i + 1] - sigma) * (x - denoised) / sigma
    return x


# --- svc: pictures, cameras, calls ---
def fit_size(wh, WH):
    """[width, height, left, top]: to which size a w x h picture is brought so that it covers
    W x H, and where that is cut out."""
    (w, h), (W, H) = wh, WH
    factor = max(W / w, H / h)
    width, height = math.ceil(factor * w), math.ceil(factor * h)
    return [width, height, width // 2 - W // 2, height // 2 - H // 2]


def fit_picture(picture, WH):
    """uint8 [h,w,3] -> float32 [3,H,W] in -1..1, resized and cropped at the centre."""
    width, height, left, top = fit_size(picture.shape[1::-1], WH)
    x = torch.tensor(picture).permute(2, 0, 1)[None] / 255.0 * 2 - 1
    x = F.interpolate(x, (height, width), mode="area")[0]
    return x[:, top : top + WH[1], left : left + WH[0]]


def fit_intrinsics(K, wh, WH):
    """K [...,3,3] in pixels of a w x h picture -> in pixels of the fitted one."""
    width, height, left, top = fit_size(wh, WH)
    K = K * torch.tensor([width / wh[0], height / wh[1], 1])[:, None]
    K[..., :2, 2] -= torch.tensor([left, top])
    return K


def clip_pixels(picture):
    """[3,H,W] in -1..1 -> [3,224,224] as CLIP has it: blurred where it shrinks, resized (bicubic,
    corners stay corners), its mean and deviation."""
    x, shrink = picture[:, None], [size / 224 for size in picture.shape[1:]]
    for factor in shrink if max(shrink) > 1 else ():
        sigma = max((factor - 1) / 2, 0.001)
        reach = int(max(4 * sigma, 3)) // 2
        taps = torch.arange(-reach, reach + 1).to(x)
        kernel = torch.exp(-(taps**2) / (2 * sigma**2))
        x = F.pad(x.mT, (reach, reach, 0, 0), mode="reflect")  # rows first, the second time columns
        x = F.conv2d(x, (kernel / kernel.sum())[None, None, None])
    x = F.interpolate(x[None, :, 0], (224, 224), mode="bicubic", align_corners=True)[0]
    mean = x.new_tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = x.new_tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return ((x + 1) / 2 - mean) / deviation


def svc_calls(given, total, window):
    """The frame numbers of each network call: the given pictures (the first of all frames), the
    next ones to imagine, and copies of the last until the call is full."""
    for start in range(given, total, window - given):
        frames = [*range(given), *range(start, total)][:window]
        yield frames + frames[-1:] * (window - len(frames))


def svc_inputs(latents, vectors, frames, c2w, K):
    """One call's conditions (see `svc_condition`) and mask of given frames [T].

    latents [n,4,h,w] and CLIP vectors [n,D] of the given pictures; poses c2w [T,4,4] and
    normalised K [T,3,3] of the call's frames.
    """
    frames = torch.tensor(frames, device=latents.device)
    mask = frames < len(latents)
    relative = torch.linalg.inv(c2w) @ c2w[0]
    plucker, known = plucker_rays(relative, K, *latents.shape[-2:]), frames[mask]
    return svc_condition(latents[known], mask, plucker, vectors[known].mean(0)), mask


# --- svc, sana-wm and cosmos3: the teachers ---
class Generative(Teacher):
    """An anchor is a picture uint8 [h,w,3] and a name, for the noise: the photograph in its own
    size, or the room's frame 0 drawn as large as the frames, whose height and width are `size`."""

    generates = True

    def __init__(self, cfg: Config, size: list[int], multiple: int):
        super().__init__(cfg)
        self.size = size
        if len(size) != 2 or any(px < 64 or px % multiple for px in size):
            stop(f"--svc_px or --sana_size {size}: want multiples of {multiple}, 64 or more")

    def frame_size(self, wh):
        """Width and height of the frames of a w x h picture."""
        return self.size[::-1]

    def refuses(self, trajectory: dict) -> str:
        turns = [abs(value) for name, value in trajectory["actions"] if name.startswith("turn")]
        K = intrinsics_of(trajectory)
        shown_deg = fov_x_deg_of(middle_K(K, size_of(K), self.frame_size(size_of(K))))
        if max(turns, default=0) <= MEASURABLE * shown_deg:
            return ""
        return f"a turn beyond {MEASURABLE} of its view cannot be checked (01: smaller turns)"

    def anchor(self, trajectory: dict):
        name = trajectory["scene_id"], trajectory["traj_id"]
        if not trajectory["room"]:
            return load_photo(Path(trajectory["anchor"])), name
        size = trajectory["width"], trajectory["height"]
        enlarge = max(1, max(self.frame_size(size)) / max(size))
        K = intrinsics(*(round(enlarge * side) for side in size), trajectory["fov_x_deg"])
        return render(*begin_in_room(trajectory, self.cfg), K)[0], name


class VideoModel(Generative):
    """A camera-controlled video pipeline of diffusers. Frame 0 is the middle of the picture itself.

    It has KEY, MOST_FRAMES, STEPS, GUIDANCE, PROMPT and `film(pipe, image, poses, K, how)` -> video
    [F,3,H,W] in 0..1 of poses [F,4,4]; `how` is what all such pipelines are told.
    """

    PATH = {}  # keywords of `resample`, which makes the poses

    def placed(self, pipe) -> tuple:
        """The pipeline where --device and --offload want it, alone in a tuple."""
        pipe.set_progress_bar_config(desc=self.KEY, leave=False)
        device = network_place(self.cfg.device)[0]
        if self.cfg.offload and device.type == "cuda":
            pipe.enable_model_cpu_offload(device=device)
            return (pipe,)
        return (pipe.to(device),)

    @torch.no_grad()
    def imagine(self, anchor, c2w, K, kept: list[int]) -> Views:
        (picture, name), cfg, pipe = anchor, self.cfg, self.networks[0]
        poses, at = resample(c2w, **self.PATH)
        if len(poses) > self.MOST_FRAMES:
            raise Unusable(f"its path has {len(poses)} frames, want at most {self.MOST_FRAMES}")
        image, K = middle(picture, K, *self.frame_size(size_of(K)))
        steps = cfg.steps or self.STEPS
        guidance = cfg.guidance or self.GUIDANCE
        how = {"num_inference_steps": steps, "guidance_scale": guidance, "prompt": self.PROMPT}
        how |= {"generator": random_numbers(cfg.seed, *name, self.KEY), "output_type": "pt"}
        video = self.film(pipe, image, poses, K, how)
        at, first = at[kept], np.asarray(image)
        frames = (255 * video[at]).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        frames[at == 0] = first
        settings = self.made_by | {"steps": steps, "guidance": guidance, "frames": len(poses)}
        return Views(frames, K, sharpest=self.round_trip(first, pipe.vae), settings=settings)

    def round_trip(self, picture, vae):
        """What the video autoencoder makes of a picture uint8 [H,W,3]."""
        first = to_unit(torch.tensor(picture)).permute(2, 0, 1)[None, :, None]
        first = first.to(network_place(self.cfg.device)[0], vae.dtype)  # --offload: not the VAE's
        back = vae.decode(vae.encode(first).latent_dist.mean).sample[0, :, 0]
        return ((back.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).byte().cpu().numpy()


def svc_network(name: str) -> Seva:
    """The U-Net from a hub id, a folder or a file of safetensors, whose metadata may hold another
    SevaConfig than the released one ("config")."""
    path = Path(name)
    if not path.is_file():
        folder = fetched(name, ["modelv1.1.safetensors"])
        path = max(folder.glob("model*.safetensors"), default=folder / "model.safetensors")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
        with torch.device("meta"):
            network = Seva(SevaConfig(**config))
        network.load_state_dict(load_file(path), assign=True)
    except FAULTS as error:
        stop(f"--svc {path}: {' '.join(str(error).split())[:300]}")
    return network.float().eval().requires_grad_(False)


class Svc(Generative):
    """Stable Virtual Camera. Frame 0 is the picture itself, fitted."""

    def __init__(self, cfg: Config):
        super().__init__(cfg, [cfg.svc_px] * 2, 64)
        if not 2 <= cfg.svc_window <= MAX_FRAMES or not 0 <= cfg.svc_frames <= cfg.svc_window:
            stop(f"--svc_window {cfg.svc_window}: want 2 to {MAX_FRAMES}, --svc_frames up to it")

    def frame_size(self, wh):
        short_px = self.cfg.svc_px / min(wh)
        return [math.floor(side * short_px / 64 + 0.5) * 64 for side in wh]

    @cached_property
    def networks(self) -> tuple:
        """(U-Net, VAE, CLIP, sha256 of the VAE); VAE, CLIP in float32: once per picture."""
        from diffusers import AutoencoderKL  # here: it takes seconds to import
        from transformers import CLIPVisionModelWithProjection

        cfg, (device, dtype) = self.cfg, network_place(self.cfg.device)
        unet = svc_network(cfg.svc).to(device, dtype)
        if cfg.compile:
            unet = torch.compile(unet.to(memory_format=torch.channels_last))
        names = ["config.json", "diffusion_pytorch_model.safetensors"]
        folder = fetched(cfg.svc_vae, [f"vae/{name}" for name in names])
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        vae = load_part(folder, AutoencoderKL, torch.float32)
        digest = hashlib.sha256((folder / names[1]).read_bytes()).hexdigest()
        folder = fetched(cfg.svc_clip, ["config.json", "model.safetensors"])
        clip = load_part(folder, CLIPVisionModelWithProjection, torch.float32)
        return unet, vae.to(device), clip.to(device), digest

    @torch.no_grad()
    def imagine(self, anchor, c2w, K, kept: list[int]) -> Views:
        (picture, name), cfg, WH = anchor, self.cfg, self.frame_size(size_of(K))
        unet, vae, clip, vae_sha256 = self.networks
        device, steps, guidance = vae.device, cfg.steps or 50, cfg.guidance or 4.0
        wh = picture.shape[1::-1]
        own_K = torch.tensor(intrinsics(*wh, fov_x_deg_of(K)))  # in pixels of the picture
        K = fit_intrinsics(own_K, wh, WH)
        shown_K = intrinsics(*WH, fov_x_deg_of(K))
        K = (K / torch.tensor([*WH, 1])[:, None]).to(device)
        fitted = fit_picture(picture, WH).to(device)
        latents = vae.encode(fitted[None]).latent_dist.mean * 0.18215
        vectors = clip(clip_pixels(fitted)[None]).image_embeds
        pictures = {0: fitted}
        window = min(max(len(c2w), cfg.svc_frames), cfg.svc_window)
        for call, frames in enumerate(svc_calls(1, len(c2w), window)):
            # A frame's noise depends on trajectory, call and place there, not on the call's others.
            keys = [(cfg.seed, *name, "svc", call, place) for place in range(window)]
            shape = (steps + 1, *latents.shape[1:])
            noise = [torch.randn(shape, generator=random_numbers(*key)) for key in keys]
            noise, *eps = torch.stack(noise, 1).to(device)
            poses = torch.tensor(c2w[frames], dtype=torch.float32, device=device)
            Ks = K.expand(window, 3, 3)
            cond, mask = svc_inputs(latents, vectors, frames, poses, Ks)
            scale = guidance_scale(poses, Ks, mask, guidance)
            bar = partial(tqdm, desc="svc", leave=False, unit="step")
            network = partial(unet, num_frames=window)
            made = svc_sample(network, noise, cond, scale, steps, eps, bar)
            for frame, z in zip(frames, made, strict=True):
                if frame in kept and frame not in pictures:
                    pictures[frame] = vae.decode(z[None] / 0.18215).sample[0]
        round_trip = vae.decode(latents / 0.18215).sample[0]
        shown = [*(pictures[frame] for frame in kept), round_trip]
        frames = torch.stack(shown).permute(0, 2, 3, 1)
        frames = ((frames + 1) / 2 * 255).clamp(0, 255).byte().cpu().numpy()
        settings = {"model": cfg.svc, "vae": cfg.svc_vae, "vae_sha256": vae_sha256}
        settings |= {"size": WH, "steps": steps, "guidance": guidance, "frames": window}
        return Views(frames[:-1], shown_K, sharpest=frames[-1], settings=settings)


def resample(c2w, max_step_m=0.05, max_step_deg=1.2, group=8):
    """The path c2w [N,4,4] of a level camera in smaller steps -> (poses float32 [F,4,4], at [N]:
    poses[at[i]] is c2w[i]).

    SANA-WM expects 0.025 to 0.05 m and 0.6 to 1.2 degrees from frame to frame, and its VAE packs
    all frames after the first in groups, so F = group * k + 1, k >= 1. Each step of the path (01
    takes up to 0.2 m or 5 degrees) is cut into the fewest equal parts within the upper limits.
    The last pose is repeated until the groups are full.
    """
    poses, at = [c2w[0]], [0]
    for start, end in itertools.pairwise(c2w):
        move_m, turn_deg = (end - start)[:3, 3], yaw_deg_of(start[:3, :3].T @ end[:3, :3])
        steps = max(np.linalg.norm(move_m) / max_step_m, abs(turn_deg) / max_step_deg)
        parts = max(1, math.ceil(steps - 1e-4))
        for part in range(1, parts):
            pose = start.copy()
            pose[:3, :3] = start[:3, :3] @ yaw_matrix(turn_deg * part / parts)
            pose[:3, 3] += move_m * part / parts
            poses.append(pose)
        poses.append(end)
        at.append(len(poses) - 1)
    while len(poses) == 1 or len(poses) % group != 1:
        poses.append(c2w[-1])
    return np.stack(poses).astype(np.float32), np.array(at)


def middle_K(K, wh, WH):
    """K [3,3] of the largest middle part of a w x h picture that has the shape of W x H, in pixels
    of that size. K: that of the whole picture, in pixels of any size."""
    (w, h), (W, H) = wh, WH
    shown = W / (w * max(W / w, H / h))  # share of the picture's width
    half = math.atan(shown * math.tan(math.radians(fov_x_deg_of(K) / 2)))
    return intrinsics(W, H, 2 * math.degrees(half))


def middle(picture, K, width, height):
    """The largest middle part of a picture uint8 [h,w,3] that has the shape asked for, resized to
    it -> (picture, its K). K: see `middle_K`.

    SanaWMPipeline would do so itself, but round to whole pixels in between. Done here, nothing is
    left to cut: pixels stay square, and the picture is at hand as frame 0.
    """
    image = ImageOps.fit(Image.fromarray(picture), (width, height), Image.LANCZOS)
    return image, middle_K(K, picture.shape[1::-1], image.size)


class SanaWM(VideoModel):
    """A video model that is told camera poses."""

    KEY, STEPS, GUIDANCE = "sana-wm", 60, 5.0
    MOST_FRAMES = 961  # a minute at 16 frames a second: the longest that the model was made for
    PROMPT = "A quiet place in even light, seen by a slowly moving camera. "
    PROMPT += "Nothing and nobody in it moves."

    def __init__(self, cfg: Config):
        super().__init__(cfg, cfg.sana_size, 32)
        self.made_by = {"model": cfg.sana, "prompt": self.PROMPT}

    @cached_property
    def networks(self) -> tuple:
        """(the pipeline,); its VAE in float32, as advised there."""
        import diffusers  # here: it takes seconds to import
        from transformers import AutoTokenizer, Gemma2ForCausalLM

        cfg, dtype = self.cfg, network_place(self.cfg.device)[1]
        kinds = {
            "scheduler": (diffusers.FlowMatchEulerDiscreteScheduler,),
            "tokenizer": (AutoTokenizer,),
            "text_encoder": (Gemma2ForCausalLM, dtype),
            "vae": (diffusers.AutoencoderKLLTX2Video, torch.float32),
            "transformer": (diffusers.SanaWMTransformer3DModel, dtype),
        }
        folder = fetched(cfg.sana, ["*.json", "*.safetensors", "*.model"])
        parts = {name: load_part(folder / name, *kind) for name, kind in kinds.items()}
        pipe = diffusers.SanaWMPipeline(**parts)
        # Tiles of 512 pixels and 96 frames: those of the model's training, and less memory.
        pipe.vae.enable_tiling(tile_sample_min_num_frames=96, tile_sample_stride_num_frames=64)
        pipe.vae.use_framewise_encoding = pipe.vae.use_framewise_decoding = True
        return self.placed(pipe)

    def film(self, pipe, image, poses, K, how):
        how |= {"height": image.height, "width": image.width, "num_frames": len(poses)}
        return pipe(image=image, c2w=poses, intrinsics=K, **how).frames


CANVASES = {  # of Cosmos 3: height and width of the frames, by tier; each also the other way round
    256: [(256, 256), (256, 320), (192, 320)],
    480: [(640, 640), (544, 736), (480, 832)],
    720: [(960, 960), (832, 1104), (720, 1280)],
}


def camera_actions(poses):
    """Poses [F,4,4], camera to world -> float32 [F-1,9], the step T_i^-1 T_i+1 to each later frame:
    its move in metres, then the first and the second column of its turn.

    Order, direction and axes (OpenCV) are those of `pose_abs_to_rel` in NVIDIA's cosmos-framework
    ("backward_framewise", "rot6d"), which scales nothing for cameras.
    """
    step = np.linalg.inv(poses[:-1].astype(float)) @ poses[1:]
    return np.concatenate([step[:, :3, 3], step[:, :3, 0], step[:, :3, 1]], 1).astype(np.float32)


class Cosmos3(VideoModel):
    """NVIDIA's Cosmos 3 as a camera's forward dynamics.

    The pipeline would squeeze a picture to multiples of 16, shrink it into the canvas of the
    nearest shape, mirror what is missing and cut off what is odd; one of a canvas's size it keeps.
    It runs without its safety checker, whose weights are gated, and the record says so.
    """

    KEY, STEPS, GUIDANCE = "cosmos3", 30, 1.0
    MOST_FRAMES = 297  # 300 are supported, and its VAE packs all after the first in fours
    PROMPT = "A quiet place in even light. Only the camera moves, slowly and steadily."

    def __init__(self, cfg: Config):
        super().__init__(cfg, CANVASES[cfg.cosmos_tier][-1], 16)
        self.made_by = {"model": cfg.cosmos, "tier": cfg.cosmos_tier, "safety_checker": False}
        # The published example turns by a third of a degree a frame; runs have 60 to 150 frames.
        self.PATH = {"max_step_m": 0.05 / (cfg.gain or 1), "max_step_deg": 0.5, "group": 4}

    def frame_size(self, wh):
        canvases = [size[::way] for size in CANVASES[self.cfg.cosmos_tier] for way in (1, -1)]
        return min(canvases, key=lambda size: abs(size[0] / size[1] - wh[1] / wh[0]))[::-1]

    @cached_property
    def networks(self) -> tuple:
        """(the pipeline,); its VAE in float32."""
        import diffusers  # here: it takes seconds to import
        from transformers import AutoTokenizer

        dtype = network_place(self.cfg.device)[1]
        kinds = {
            "scheduler": (diffusers.UniPCMultistepScheduler,),
            "text_tokenizer": (AutoTokenizer,),
            "vae": (diffusers.AutoencoderKLWan, torch.float32),
            "transformer": (diffusers.Cosmos3OmniTransformer, dtype),
        }
        wanted = [f"{part}/*" for part in kinds]  # beside them lies a language model
        folder = fetched(self.cfg.cosmos, ["model_index.json", *wanted])
        try:
            index = json.loads((folder / "model_index.json").read_text())
            if index["_class_name"] != "Cosmos3OmniPipeline":
                raise ValueError(f"its model_index.json is that of a {index['_class_name']}")
            parts = {name: load_part(folder / name, *kind) for name, kind in kinds.items()}
            native = {"use_native_flow_schedule": index.get("use_native_flow_schedule", False)}
            pipe = diffusers.Cosmos3OmniPipeline(**parts, enable_safety_checker=False, **native)
            pipe.scheduler.register_to_config(flow_shift=10.0, use_karras_sigmas=False)  # published
            words = pipe.tokenize_prompt(self.PROMPT, action_mode="forward_dynamics")[0]
            net, vae = pipe.transformer.config, pipe.vae.config
            if None in words or max(words) >= net.vocab_size:
                raise ValueError("its tokenizer has words that its transformer does not know")
            if not net.action_gen or vae.z_dim * net.latent_patch_size**2 != net.patch_latent_dim:
                raise ValueError("its transformer takes no actions, or not the latents of its VAE")
        except FAULTS as error:
            stop(f"--cosmos {folder} does not load as a pipeline: {first_line(error)}")
        return self.placed(pipe)

    def film(self, pipe, image, poses, K, how):
        from diffusers import CosmosActionCondition

        action = CosmosActionCondition(
            mode="forward_dynamics",
            domain_name="camera_pose",
            image=image,
            resolution_tier=self.cfg.cosmos_tier,
            chunk_size=len(poses) - 1,
            raw_actions=torch.tensor(camera_actions(poses)),
        )
        return pipe(action=action, fps=30, use_system_prompt=False, **how).video


TEACHERS = {"simulator": Simulator, "pan": Pan, "warp": Warp, "svc": Svc}
TEACHERS |= {"sana-wm": SanaWM, "cosmos3": Cosmos3}

# --- quality check ---
COLUMNS = 96  # of a cylinder: a turn is measured to field of view / 96, and refined by a parabola
MEASURABLE = 0.74  # of a field of view: no wider turn leaves the quarter that a match needs
MAX_TURN_ERROR_DEG = 4.0  # below half of the smallest turn asked for
MIN_MATCH = 0.5  # correlation that a turned frame must have with the one before it
MOVE_MATCH = 0.6  # correlation that a moved frame must have with the one before, moved likewise
LENGTHS = (0.75, 1.33)  # of a move, over the length asked for
GAINS = (0.2, 2.9)  # what --gain 0 believes; moves are sought from 0 to 3 times as far as asked
MIN_SHARPNESS = 0.25  # over frame 0's; a 5x5 box blur leaves 0.05 to 0.22, exact views 0.28 or more


def cylinder(image, K):
    """Picture [H,W,3] -> [72,COLUMNS], 24 rows of each colour; a column is an equal step of viewing
    angle, so that a turn is a shift along the columns."""
    focal, cx, cy = focal_and_centre(K)
    half_x, half_y = cx / focal, cy / focal  # tangents of half the fields of view
    angle = ((np.arange(COLUMNS) + 0.5) / COLUMNS - 0.5) * 2 * math.atan(half_x)
    up = (np.arange(24) + 0.5) / 12 - 1
    y = up[:, None] * half_y * math.cos(angle[-1]) / np.cos(angle)  # rows that every column has
    shrink = max(1, round(image.shape[1] / COLUMNS))
    small = np.asarray(Image.fromarray(image).reduce(shrink), np.float32)
    height, width, _ = small.shape
    u = (np.tan(angle) + half_x) * (width / (2 * half_x)) + 0 * y
    v = (y + half_y) * (height / (2 * half_y))
    return sample(small, u, v).transpose(2, 0, 1).reshape(72, COLUMNS)


def measure_turn(before, after, K):
    """(yaw in degrees at which `before`, turned, matches `after` best, their correlation there).

    On cylinders a turn by k columns means after[:, j] = before[:, j + k]. The correlation of the
    common columns is computed at once for every k that leaves a quarter of them: products by FFT,
    sums by cumulative sums. Each row and colour has a mean of its own: floors below ceilings, as
    all rooms have them, make no two views alike.
    """
    a, b = cylinder(before, K), cylinder(after, K)  # [72,COLUMNS]
    a, b = a - a.mean(), b - b.mean()
    k = np.arange(-72, 73)
    n = COLUMNS - np.abs(k)
    spectrum = np.fft.rfft(a, 2 * COLUMNS) * np.fft.rfft(b, 2 * COLUMNS).conj()
    products = np.fft.irfft(spectrum.sum(0), 2 * COLUMNS)[k]

    def common(values, k):  # sums over the columns in common, [72,k]
        total = np.pad(values.cumsum(1), ((0, 0), (1, 0)))
        return total[:, COLUMNS + np.minimum(k, 0)] - total[:, np.maximum(k, 0)]

    sum_a, sum_b = common(a, k), common(b, -k)
    spread_a = (common(a * a, k) - sum_a**2 / n).sum(0).clip(1)
    spread_b = (common(b * b, -k) - sum_b**2 / n).sum(0).clip(1)
    match = (products - (sum_a * sum_b / n).sum(0)) / np.sqrt(spread_a * spread_b)
    best = int(match.argmax())
    yaw_deg = (k[best] + peak_offset(match, best)) * fov_x_deg_of(K) / COLUMNS
    return float(yaw_deg), float(match[best])


def peak_offset(values, best):
    """Where about its largest sample, values[best], a parabola has its top: -0.5..0.5 samples."""
    if not 0 < best < len(values) - 1:
        return 0.0
    low, top, high = values[best - 1 : best + 2]
    return float(0.5 * (low - high) / min(low - 2 * top + high, -1e-9))


def sharpness(picture, holes):
    """Energy of the Laplacian of the grey picture over that of its gradient, away from holes.

    Both grow with the square of the contrast, so their ratio is the same for a gay wall and a
    plain one: it says how steep the edges are. None where all is hole.
    """
    red, green, blue = picture.transpose(2, 0, 1)
    grey = red.astype(np.int16) + green + blue
    inner_rows, inner_columns = grey[1:-1], grey[:, 1:-1]
    laplacian = np.diff(inner_rows, 2, 1) + np.diff(inner_columns, 2, 0)
    along = inner_rows[:, 2:] - inner_rows[:, :-2]
    across = inner_columns[2:] - inner_columns[:-2]
    parts = [laplacian, along, across]
    if holes.any():
        beside = [np.roll(holes, step, axis) for step in (-1, 1) for axis in (0, 1)]
        shown = ~np.any([holes, *beside], 0)[1:-1, 1:-1]
        parts = [part[shown] for part in parts]
    if not parts[0].size:
        return None
    laplacian, along, across = (np.square(part, dtype=np.float32).sum() for part in parts)
    return float(4 * laplacian / max(along + across, 1.0))


def measure_move(before, after, depth, pose, K):
    """(length, match, rival) of a move from frame to frame, uint8 [H,W,3]: how far it went over how
    far was asked, 0..3; the correlation of the pixels of `before`, moved through its depth [H,W]
    by so much of the translation of `pose` [4,4], with those of `after` where they land; and the
    best such correlation for moves back or to the side.
    """
    every = max(1, min(depth.shape) // 64)  # 64 x 64 points are enough
    x, y = rays_of(K)
    points = np.stack([x * depth, y * depth, depth], -1)[::every, ::every].reshape(-1, 3)
    colors = before[::every, ::every].reshape(-1, 3).astype(np.float32)
    image = after.astype(np.float32)

    def match_at(step):
        seen = (points - step) @ pose[:3, :3]  # in the axes of `after`
        u, v, inside = project(*seen.T, K)
        lands = (seen[:, 2] > 0.1) & inside
        if lands.sum() < 0.1 * len(points):
            return -1.0
        a, b = colors[lands], sample(image, u[lands], v[lands])
        a, b = a - a.mean(0), b - b.mean(0)
        return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum() + 1))

    step = pose[:3, 3]
    aside = np.array([step[2], 0, -step[0]])
    matches = [match_at(tenths / 10 * step) for tenths in range(31)]
    best = int(np.argmax(matches))
    rival = max(match_at(share * way) for share in (-1, -0.5) for way in (step, aside, -aside))
    return (best + peak_offset(matches, best)) / 10, matches[best], rival


def small_depths(trajectory: dict, views: Views, c2w, kept: list[int], cfg: Config):
    """(frames reduced to 112 pixels, their K, their depths [n,h,w] or None where nothing tells).

    Exact in rooms; of a photograph its frame 0's, from the depth file or --depth, moved along.
    """
    images = [Image.fromarray(frame) for frame in views.frames]
    for image in images:
        image.thumbnail((112, 112), Image.BOX)
    frames, K = np.stack(images), intrinsics(*images[0].size, fov_x_deg_of(views.K))
    if trajectory["room"]:
        room, start = begin_in_room(trajectory, cfg)
        return frames, K, np.stack([render(room, start @ pose, K)[2] for pose in c2w[kept]])
    file = depth_file(trajectory, cfg)
    if file.is_file():  # of the whole photograph, of which the teacher may show the middle
        whole = intrinsics_of(trajectory)
        u, v, _, _ = came_from(np.eye(4), K, 1.0, whole)
        first = at_pixels(load_depth(file, tuple(size_of(whole))), u, v)
    elif cfg.depth:
        first = network_depth(images[0], cfg.depth, cfg.device, trajectory["anchor"])
    else:
        return frames, K, None
    return frames, K, np.stack([splat_depth(first, pose, K) for pose in c2w[kept]])


def covisible(kept: list[int], c2w, keyframes: list[int], K, depths) -> list:
    """[[i, j, share of frame j that frame i shows], ...] for key frames i < j; null: unknown."""
    at_keys, found = [i for i, frame in enumerate(kept) if frame in keyframes], []
    for i, j in itertools.combinations(at_keys, 2):
        pose, share = np.linalg.inv(c2w[kept[i]]) @ c2w[kept[j]], None
        if np.abs(pose[:3, 3]).max() < 1e-6:  # no depth is needed for a turn
            share = round(float(1 - came_from(pose, K, 1.0)[3].mean()), 3)
        elif depths is not None:
            u, v, z, hidden = came_from(pose, K, depths[j])
            shown = ~hidden & (z < 1.05 * at_pixels(depths[i], u, v) + 0.02)
            share = round(float(shown.mean()), 3)
        found.append([kept[i], kept[j], share])
    return found


def check_turn(views: Views, holes, i: int, j: int, pose):
    """(error_deg, over_deg, match) of the turn `pose` from frame i to j; None: not measurable."""
    asked_deg = yaw_deg_of(pose[:3, :3])
    # holes move with the camera, not with the picture
    if holes[i].mean() > 0.02 or abs(asked_deg) > MEASURABLE * fov_x_deg_of(views.K):
        return None
    found_deg, match = measure_turn(views.frames[i], views.frames[j], views.K)
    error_deg = round(found_deg - asked_deg, 2)
    return error_deg, error_deg if asked_deg > 0 else -error_deg, round(match, 3)


def check_move(small, i: int, j: int, pose):
    """(length, match) of the move `pose` from frame i to j, match -1 where it went another way;
    None without depth. small: see `small_depths`."""
    frames, K, depths = small
    if depths is None or not np.isfinite(depths[i]).any():
        return None
    length, match, rival = measure_move(frames[i], frames[j], depths[i], pose, K)
    return round(length, 2), round(match, 3) if match > rival else -1.0


def quality(views: Views, kept: list[int], c2w, keyframes: list[int], cfg: Config, small=None):
    """The `qc` record of the frames `kept` of c2w [N,4,4]; its keys are explained at the top.

    small: of a teacher that generates, what `small_depths` makes of its frames.
    """
    frames, holes = views.frames, views.holes
    if holes is None:
        holes = np.zeros(frames.shape[:3], bool)
    turns, moves, qc = [], [], {}
    at_keys = [i for i, frame in enumerate(kept) if frame in keyframes]
    for i, j in itertools.pairwise(at_keys):
        pose = np.linalg.inv(c2w[kept[i]]) @ c2w[kept[j]]
        if np.abs(pose[:3, 3]).max() < 1e-4:
            turns.append(check_turn(views, holes, i, j, pose))
        elif small:
            moves.append(check_move(small, i, j, pose))
    measured = filter(None, turns)
    worst = max(measured, key=lambda t: (t[2] < MIN_MATCH, abs(t[0])), default=[None] * 3)
    qc["turn_error_deg"], qc["over_turn_deg"], qc["match"] = worst
    measured = filter(None, moves)
    worst = max(measured, key=lambda m: (m[1] < MOVE_MATCH, abs(m[0] - 1)), default=[None] * 2)
    qc["length"], qc["move_match"] = worst
    first, *later = map(sharpness, frames, holes)
    if views.sharpest is not None:
        first = sharpness(views.sharpest, holes[0])
    later = [steepness for steepness in later if steepness is not None]
    qc["sharpness"] = round(min(later) / first, 3) if first and later else None
    qc["holes"] = round(float(holes.mean((1, 2)).max()), 3)
    qc["unchecked"] = None in moves
    found = faults(qc, cfg)
    if small and None in turns:
        found.append("a turn that is too wide to be measured")
    return qc | {"passed": not found, "why": "; ".join(found)}


def faults(qc: dict, cfg: Config) -> list[str]:
    """What a qc record fails."""
    off_deg, match, found = qc["turn_error_deg"], qc["match"], []
    if match is not None and match < MIN_MATCH:
        found.append(f"the turned frame is like the one before it at no yaw ({match:.2f})")
    elif match is not None and abs(off_deg) > MAX_TURN_ERROR_DEG:
        far = "turned too far" if qc["over_turn_deg"] > 0 else "not turned far enough"
        found.append(f"turn off by {off_deg:+.1f} degrees, {far}")
    if qc["length"] is not None and qc["move_match"] < MOVE_MATCH:
        found.append(f"the move is not the one asked for (match {qc['move_match']:.2f})")
    elif qc["length"] is not None and not LENGTHS[0] <= qc["length"] <= LENGTHS[1]:
        found.append(f"moved {qc['length']:g} times as far as asked")
    if qc["sharpness"] is not None and qc["sharpness"] < MIN_SHARPNESS:
        found.append(f"blurred ({qc['sharpness']:g} of the sharpness of frame 0)")
    if qc["holes"] > cfg.max_holes:
        found.append(f"{qc['holes']:.0%} holes")
    return found


def qc_picture(records: list[dict]) -> bytes:
    """qc.png: a histogram per measure, teachers over each other."""
    keys = ("turn_error_deg", "match", "length", "move_match", "sharpness", "holes")
    figure, packed = Figure(figsize=(18, 4), layout="constrained"), io.BytesIO()
    for key, panel in zip(keys, figure.subplots(1, len(keys)), strict=True):
        values = {}
        for record in records:
            if (value := record["qc"][key]) is not None:
                values.setdefault(record["teacher"], []).append(value)
        panel.set(xlabel=key, ylabel="trajectories")
        if values:
            panel.hist([*values.values()], 40, label=[*values])
            panel.legend(fontsize=8)
    figure.savefig(packed, format="png", dpi=90)
    return packed.getvalue()


# --- one trajectory: imagine, measure, write ---
def png(picture: Image.Image) -> bytes:
    """Level 1 packs rendered views 5 % worse than the best level, at several times its speed."""
    packed = io.BytesIO()
    picture.save(packed, "PNG", compress_level=1)
    return packed.getvalue()


def folder_of(trajectory: dict) -> PurePosixPath:
    return PurePosixPath("2_views", trajectory["scene_id"], trajectory["traj_id"])


def nerfstudio(c2w, K, kept: list[int]) -> dict:
    """transforms.json: OpenGL camera axes (x right, y up, z backward)."""
    flipped = (c2w[kept] * [1, -1, -1, 1] + 0.0).tolist()  # + 0.0: no "-0.0" in the file
    width, height = size_of(K)
    focal_px, cx, cy = map(float, focal_and_centre(K))
    camera = {"camera_model": "OPENCV", "fl_x": focal_px, "fl_y": focal_px, "cx": cx, "cy": cy}
    camera |= {"w": width, "h": height, "frames": []}
    for frame, pose in zip(kept, flipped, strict=True):
        camera["frames"].append({"file_path": f"{frame:03d}.png", "transform_matrix": pose})
    return camera


def measure_gain(trajectory: dict, teacher: Teacher, cfg: Config) -> dict:
    """`gain_of` a trajectory's picture: what its teacher makes of one metre forward."""
    c2w, ends = np.tile(np.eye(4), (8, 1, 1)), [0, 7]
    c2w[:, 2, 3] = np.linspace(0, 1, 8)
    trajectory = trajectory | {"traj_id": "gain"}  # its noise is this picture's
    try:
        if not (trajectory["room"] or cfg.depth or depth_file(trajectory, cfg).is_file()):
            raise Unusable("no depth (--depth)")
        views = teacher.imagine(teacher.anchor(trajectory), c2w, intrinsics_of(trajectory), ends)
        (before, after), K, depths = small_depths(trajectory, views, c2w, ends, cfg)
        gain, match, rival = measure_move(before, after, depths[0], c2w[-1], K)
        # Far away all moves look alike.
        if match < max(MOVE_MATCH, rival + 0.05) or not GAINS[0] <= gain <= GAINS[1]:
            raise Unusable(f"length {gain:.2f}, match {match:.2f}, another way {rival:.2f}")
    except Unusable as error:
        return {"gain": 1.0, "gain_unmeasured": str(error)}
    return {"gain": round(gain, 3), "gain_match": round(match, 3)}


def gain_of(trajectory: dict, teacher: Teacher, cfg: Config) -> dict:
    """How far a teacher moves in a trajectory's picture for one metre asked, for the record."""
    if teacher.exact or not teacher.generates:
        return {}
    if cfg.gain:
        return {"gain": cfg.gain}
    keys = "scene_id", "anchor", "room", "start", "width", "height", "fov_x_deg"
    picture = str([trajectory.get(key) for key in keys])
    if picture not in teacher.gains:
        teacher.gains[picture] = measure_gain(trajectory, teacher, cfg)
    return teacher.gains[picture]


def make_views(trajectory: dict, name: str, teacher: Teacher, cfg: Config):
    """Imagine one trajectory and write its folder, view.json last."""
    c2w = np.array(trajectory["c2w"], np.float64)
    K, keyframes = intrinsics_of(trajectory), trajectory["keyframes"]
    ways = {"all": range(len(c2w)), "ends": {0, len(c2w) - 1}, "keyframes": {0, *keyframes}}
    kept = sorted(ways[cfg.keep])
    asked, gain = c2w.copy(), gain_of(trajectory, teacher, cfg)
    asked[:, :3, 3] /= gain.get("gain", 1.0)
    views = teacher.imagine(teacher.anchor(trajectory), asked, K, kept)
    folder = folder_of(trajectory)
    files = [f"{folder}/{frame:03d}.png" for frame in kept]
    for file, picture in zip(files, views.frames, strict=True):
        save(Path(cfg.run, file), png(Image.fromarray(picture)))
    small, depths, K = None, views.depth, views.K
    if teacher.generates:
        small = small_depths(trajectory, views, c2w, kept, cfg)
        _, K, depths = small
    camera = nerfstudio(c2w, views.K, kept)
    save(Path(cfg.run, folder, "transforms.json"), json.dumps(camera))
    record = trajectory | {
        "width": camera["w"],
        "height": camera["h"],
        "fov_x_deg": round(fov_x_deg_of(views.K), 4),
        "teacher": name,
        "teacher_settings": views.settings | gain,
        "seed": cfg.seed,
        "kept": kept,
        "frames": files,
        "objects": views.objects,
        "covisible": covisible(kept, c2w, keyframes, K, depths),
        "holes": [] if views.holes is None else views.holes.mean((1, 2)).round(4).tolist(),
        "qc": quality(views, kept, c2w, keyframes, cfg, small),
    }
    save(Path(cfg.run, folder, "view.json"), json.dumps(record) + "\n")


def work(job, teachers: dict, cfg: Config) -> str:
    """Make the views of (trajectory, teacher's name) -> why they were skipped; empty: made."""
    trajectory, name = job
    skipped = Path(cfg.run, folder_of(trajectory), "skipped.json")
    try:
        make_views(trajectory, name, teachers[name], cfg)
    except Unusable as error:
        save(skipped, json.dumps({"why": str(error)}) + "\n")
        return f"{trajectory['scene_id']}/{trajectory['traj_id']}: skipped, {error}"
    except torch.OutOfMemoryError as error:
        stop(f"{first_line(error)} Try --offload or, in another run, --svc_window or --svc_px")
    skipped.unlink(missing_ok=True)  # an earlier run skipped it, then somebody mended its picture
    return ""


WORKER = {}  # of a process of the pool


def start_worker(one):
    """`one` makes the views of a job. It is inherited: networks sent along are slow, and sums round
    otherwise there. A worker of a killed run, which its rerun would meet, dies with its parent."""
    WORKER["one"] = one
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_worker(job) -> str | None:
    """None where the run has to end, for a reason that has been said: a pool knows no exit."""
    try:
        return WORKER["one"](job)
    except SystemExit:
        return None


def load_networks(teachers: dict) -> bool:
    """Read the networks of all teachers; is there any?"""
    networks = [teacher.networks for teacher in teachers.values()]
    return any(networks)


def imagine_all(jobs: list, teachers: dict, cfg: Config):
    """Make the views of all jobs; in one process where a network keeps a GPU busy."""
    one = partial(work, teachers=teachers, cfg=cfg)
    pool, made = None, map(one, jobs)
    on_cpu = not load_networks(teachers) or network_place(cfg.device)[0].type == "cpu"
    torch.set_num_threads(1 if on_cpu else torch.get_num_threads())  # as in every worker
    if cfg.workers > 1 and on_cpu:
        pattern_bank()  # once, before the processes part
        pool = multiprocessing.Pool(cfg.workers, start_worker, [one])
        made = pool.imap_unordered(in_worker, jobs, chunksize=8)
    for why in tqdm(made, total=len(jobs), desc="views", unit="trajectory"):
        if why is None:
            raise SystemExit(2)
        if why:
            tqdm.write(why, file=sys.stderr)
    if pool:
        pool.close()
        pool.join()


# --- all trajectories ---
KEYS = "scene_id traj_id source anchor room split width height fov_x_deg actions keyframes c2w"
PART = "it looks into a part of its photograph: only --teacher pan does so"
NAME = rb"[^./\\\0][^/\\\0]*"  # of a new folder


def fault_of(trajectory: dict) -> str:
    """What of a trajectory record is not as 01 writes it; empty: nothing."""
    try:
        names = trajectory["scene_id"], trajectory["traj_id"]
        room, keyframes = PurePosixPath(trajectory["room"] or "."), trajectory["keyframes"]
        size, c2w = (trajectory["width"], trajectory["height"]), np.array(trajectory["c2w"], float)
        level, R = np.abs(c2w[:, 1] - [0, 1, 0, 0]), c2w[:, :3, :3]
        start = trajectory["start"] if trajectory["room"] else [0, 0, 0]
        yaw_deg = trajectory.get("start_yaw_deg")
        whole = yaw_deg is None or trajectory["panorama"]
        sound = {
            "scene_id, traj_id": all(re.fullmatch(NAME, name.encode()) for name in names),
            "room": not room.is_absolute() and ".." not in room.parts,
            "anchor": trajectory["room"] or Path(trajectory["anchor"]),
            "start": len(start) == 3 and all(abs(value) < 1e6 for value in start),
            "width, height": min(size) >= 8 and max(size) <= 8192,
            "fov_x_deg": 1 <= trajectory["fov_x_deg"] <= 170,
            "start_yaw_deg": yaw_deg is None or abs(yaw_deg) < 1e6,
            "photo_fov_deg": whole or 1 <= trajectory["photo_fov_deg"] <= 170,
            "actions": all(name + "" and abs(value) < 1e6 for name, value in trajectory["actions"]),
            "c2w": c2w.shape[1:] == (4, 4) and np.abs(c2w).max() < 1e6 and level.max() < 1e-3,
            "rotations in c2w": np.abs(R @ R.mT - np.eye(3)).max() < 1e-3,
            "keyframes": keyframes == sorted({*range(len(c2w))} & {*keyframes}) != [],
            "integers": all(isinstance(number, int) for number in (*size, *keyframes)),
        }
        return ", ".join(key for key, good in sound.items() if not good)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"


def plan(teachers: dict, cfg: Config):
    """(jobs: each a trajectory and its teacher's name, counts of the other trajectories)."""
    path = Path(cfg.run) / "1_trajectories/trajectories.jsonl"
    jobs, left_out, names = [], Counter(), set()
    for number, trajectory in read_lines(path, *KEYS.split()):
        name = (str(trajectory["scene_id"]), str(trajectory["traj_id"]))
        fault = "second scene_id, traj_id" if name in names else fault_of(trajectory)
        if fault:
            print(f"{path}:{number}: skipped, correct its {fault}", file=sys.stderr)
            continue
        names.add(name)
        other = cfg.heldout_teacher and trajectory["split"] == "heldout"
        part = trajectory.get("start_yaw_deg") is not None
        for key in [cfg.heldout_teacher] if other else cfg.teacher:
            why = PART if part and key != "pan" else teachers[key].refuses(trajectory)
            if not why:
                jobs.append((trajectory, key))
                break
        else:  # all refuse, the last one for this reason
            left_out[why] += 1
    for why, number in left_out.items():
        print(f"left out {number} of {len(names)} trajectories: {why}")
    if not jobs:
        stop(f"--teacher {' '.join(cfg.teacher)} can take none of the trajectories of {path}")
    unusable = len(path.read_bytes().splitlines()) - len(names)
    return jobs, {"unusable": unusable, "left out": left_out.total()}


def contact_sheet(records: list[dict], run: Path, rows: int = 12, px: int = 200) -> Image.Image:
    """Trajectories of all kinds of action, one per row, a failed one first: what was asked, then
    up to five of the kept frames with their boxes."""
    for record in records:
        words = "; ".join(f"{name} {value:g}" for name, value in record["actions"])
        record["asked"] = words.replace("_", " ")
    records = sorted(records, key=lambda record: (record["qc"]["passed"], record["asked"]))
    picked = np.linspace(0, len(records) - 1, min(rows, len(records))).round()
    records = [records[int(i)] for i in picked]
    sheet = Image.new("RGB", (5 * px + 20, len(records) * (px + 22)), (24, 24, 24))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, record in enumerate(records):
        top, why = row * (px + 22) + 22, record["qc"]["why"]
        text = f"{record['scene_id']}/{record['traj_id']}   {record['asked']}   {why}"
        draw.text((4, top - 19), text, (255, 80, 80) if why else "white", font)
        every = math.ceil(len(record["kept"]) / 5)
        for column, path in enumerate(record["frames"][::every]):
            with Image.open(run / path) as frame:
                frame = ImageOps.contain(frame, (px, px))
            for thing in record["objects"][column * every] if record["objects"] else ():
                box = np.array(thing["box"]).reshape(2, 2) / BOX * frame.size
                ImageDraw.Draw(frame).rectangle(box.astype(int).ravel().tolist(), outline="white")
            sheet.paste(frame, (column * (px + 4), top))
    return sheet


def complete(folder: Path, meta: dict, jobs: list, counts: dict, cfg: Config, started: float):
    """Every trajectory is there: write what joins them, and the table."""
    marks = [Path(cfg.run, folder_of(trajectory), "view.json") for trajectory, _ in jobs]
    lines = [mark.read_bytes() for mark in marks if mark.is_file()]
    if not lines:
        stop(f"no trajectory could be imagined (the reasons stand in {folder}/*/*/skipped.json)")
    records = [json.loads(line) for line in lines]
    for record in records:
        del record["c2w"]  # most of the memory, and not needed any more
    save(folder / "contact_sheet.png", png(contact_sheet(records, Path(cfg.run))))
    save(folder / "qc.png", qc_picture(records))
    save(folder / "views.jsonl", b"".join(lines))
    found = {
        "trajectories": len(records),
        "frames": sum(len(record["kept"]) for record in records),
        "failed the quality check": sum(not record["qc"]["passed"] for record in records),
        "moves unchecked": sum(record["qc"]["unchecked"] for record in records),
        "skipped": len(jobs) - len(records) + counts["unusable"],
        "left out": counts["left out"],
    }
    finish(folder, meta, found, started)
    for name in dict.fromkeys(record["teacher"] for record in records):
        checks = [record["qc"] for record in records if record["teacher"] == name]
        over = [qc["over_turn_deg"] for qc in checks if qc["over_turn_deg"] is not None]
        print(f"{name}: {len(over):,} turns, on average {np.mean(over or 0):+.2f} degrees too far")
        lengths = [qc["length"] for qc in checks if qc["length"] is not None]
        if lengths:
            print(f"{name}: {len(lengths):,} moves, {np.median(lengths):.2f} times as far as asked")
    if found["moves unchecked"]:
        print("moves that nothing could check are left out by stage 3: name a --depth checkpoint")
    print(f"see {folder}/contact_sheet.png, qc.png; next: python 03_build_qa.py --run {cfg.run}")


def main(cfg: Config):
    """Imagine this process's share; whoever ends last writes the records of all."""
    started, run = time.perf_counter(), Path(cfg.run)
    names = [*cfg.teacher, *cfg.heldout_teacher.split()]
    if not {*names} <= TEACHERS.keys() or cfg.workers < 1:
        stop(f"--teacher {names}, --workers {cfg.workers}: want {', '.join(TEACHERS)}; 1 up")
    numbers = re.fullmatch(r"(\d+)/(\d+)", cfg.shard)
    if not numbers or int(numbers[1]) >= int(numbers[2]):
        stop(f"--shard {cfg.shard}: want i/n with 0 <= i < n, for example 0/4")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    shard, shards = int(numbers[1]) * world + rank, int(numbers[2]) * world
    if cfg.gain and not 0.02 < cfg.gain < 50:
        stop(f"--gain {cfg.gain}: want metres moved for a metre asked, about 1; 0: to be measured")
    teachers = {name: TEACHERS[name](cfg) for name in names}
    ways = ("run", "recipe", "shard", "workers", "offload", "compile")  # with the same result
    settings = {key: value for key, value in asdict(cfg).items() if key not in ways}
    folder, (jobs, counts) = run / "2_views", plan(teachers, cfg)
    if not (folder / "meta.json").is_file():
        load_networks(teachers)  # their faults are said before anything is begun
    with alone(folder):
        meta = begin(folder, settings, run / "1_trajectories", f"_{shard}_of_{shards}")
    scenes = [*dict.fromkeys(trajectory["scene_id"] for trajectory, _ in jobs)]
    mine = {*scenes[shard::shards]}  # whole scenes: a picture is read, and measured, once
    share = [job for job in jobs if job[0]["scene_id"] in mine]
    todo = [job for job in share if not (run / folder_of(job[0]) / "view.json").is_file()]
    if len(todo) < len(share):
        print(f"{len(share) - len(todo)} of {len(share)} trajectories are there already")
    if todo:
        imagine_all(todo, teachers, cfg)
    if peak := torch.cuda.max_memory_allocated():
        print(f"peak GPU memory {peak / 2**30:.1f} GB")
    # should two shards end together, the second finds the folder finished
    with alone(folder):
        places = [run / folder_of(trajectory) for trajectory, _ in jobs]
        done = [(p / "view.json").is_file() or (p / "skipped.json").is_file() for p in places]
        missing = done.count(False)
        if missing:
            print(f"shard {shard}/{shards} is done; {missing} trajectories of others are missing")
        elif read_meta(folder)["finished"]:
            print(f"{folder} was completed by another shard")
        else:
            complete(folder, meta, jobs, counts, cfg, started)


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


if __name__ == "__main__":
    run(main, Config)
