"""Stage 2: imagine what each trajectory shows. A teacher gets one picture (or a room) and camera poses and returns the views from there.

Two teachers need no weights. `simulator` casts a ray through every pixel of a procedural room and knows exactly which object each pixel
shows. `warp` moves the pixels of a photograph: pixel p of the new view, at depth z, shows what the photograph has at

    p0 ~ K (R K^-1 p z + t),   [R | t] = c2w of the new view, frame 0 being the identity

A turn has t = 0, so z cancels and K R K^-1 is exact (a homography). A move needs the photograph's depth map, which is splatted into the
new view, nearest surface first, to give z. What the photograph does not show stays grey and is counted as a hole, never invented.

`sana-wm` is a video diffusion model that follows camera poses, run by diffusers (SanaWMPipeline: 2.7 B parameters, Apache-2.0). It walks
the path in smaller steps, of which the frames asked for are kept, and sees the middle of the picture, in the shape of --sana_size.

Where we depart from the paper: its teachers are trusted, ours are measured. Every trajectory gets a `qc` record, and what fails stays on disk,
marked, for stage 3 to leave out:
    turn_error_deg  of the worst turn between key frames: yaw at which the earlier frame matches the later one, minus the yaw asked for; null where
                    none can be measured (moves only, or less than a quarter of the view in common)
    match           correlation at that yaw, -1..1 (null likewise)
    sharpness       least variance of the Laplacian of a frame, over that of frame 0
    motion          mean absolute difference between the first and the last frame, grey levels
    holes           largest share of a frame that the picture does not show

Reads   RUN/1_trajectories/trajectories.jsonl and rooms/*.json (see 01), the photographs, and for moves of `warp` <photo stem>.depth.npy
Writes  RUN/2_views/<scene>/<trajectory>/NNN.png (NNN: frame index), transforms.json (nerfstudio: OpenGL camera axes), view.json (the record below,
        written last: the mark of a whole trajectory; skipped.json instead where the picture or room cannot be read)
        RUN/2_views/views.jsonl, all records in the order of the trajectories: the trajectory's own keys (see 01) and
            {..., "teacher": "simulator", "teacher_settings": {}, "seed": 0, "kept": [0, 8], "frames": ["2_views/room_00000/t000/000.png", ...],
             "objects": [[{"id": 3, "label": "red ball", "box": [412, 300, 530, 611], "visible_px": 310, "distance_m": 2.41}], []],
             "qc": {"turn_error_deg": 0.1, "match": 0.98, "sharpness": 0.9, "motion": 31.2, "holes": 0.0, "passed": true, "why": ""}}
        (objects: per kept frame, the visible ones, boxes in thousandths of the picture; null for `warp`)
        RUN/2_views/contact_sheet.png, meta.json

    python 02_imagine_views.py --run runs/demo
    python 02_imagine_views.py --run runs/mine --teacher warp
    python 02_imagine_views.py --run runs/both --teacher simulator warp      # rooms by the first, photographs by the second
    python 02_imagine_views.py --run runs/big --shard 0/4                    # and 1/4, 2/4, 3/4 elsewhere on the same disk
    python 02_imagine_views.py --run runs/mine --teacher sana-wm --vae_tiling     # a GPU and 12 GB of weights
    python 02_imagine_views.py --benchmark

Measured on two CPU cores by --benchmark: 1793 frames/s at 112x112 and 185 at 576x576, with exact boxes, without files.
"""
import argparse
import fcntl
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import resource
import sys
import threading
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
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

BOX = 1000  # boxes are integers 0..1000 of the picture's width and height (DESIGN 4)
TEXELS = 256  # side of one surface pattern; it repeats
TEXELS_PER_M = 32  # so a pattern repeats every 8 m, further than most walls are wide
LEVELS = 5  # blurred copies of each pattern, for far surfaces
FACES = ["wall -x", "wall +x", "wall -z", "wall +z", "ceiling", "floor"]  # 2 * axis + (is it the far side?)
FACE_RGB = np.array([[205, 170, 80], [100, 150, 90], [95, 115, 175], [190, 105, 90], [215, 215, 210], [150, 135, 120]], np.float32)
LIGHT = np.array([-0.42, -0.78, -0.46], np.float32)  # unit vector from a surface towards the light, world axes (y down)
FILL = 127  # grey of the pixels that no picture shows


@dataclass
class Config:
    run: str = setting("runs/demo", "folder of the run; reads RUN/1_trajectories, writes RUN/2_views")
    teacher: list[str] = setting(["simulator"], "simulator (rooms, exact), warp (photographs; of a room it warps frame 0) and/or sana-wm "
                                 "(both; a GPU): a trajectory goes to the first one named that can take it")
    keep: str = setting("keyframes", "frames kept of a trajectory: keyframes (frame 0 and the one after each action), ends (first and last) or all")
    depth_dir: str = setting("", "folder of <photo stem>.depth.npy files, float metres along the viewing axis, for warp; empty: beside each photograph")
    device: str = setting("auto", "where a teacher's networks run: auto (cuda where there is one, else cpu), cpu, cuda, cuda:1; bfloat16 on cuda, "
                          "float32 on a CPU")
    seed: int = setting(0, "seed of teachers that draw random numbers; simulator and warp draw none, it only goes on record")
    steps: int = setting(0, "denoising steps of a diffusion teacher; 0: its own number (sana-wm 60)")
    guidance: float = setting(0.0, "classifier-free guidance of a diffusion teacher, a factor; 1: none; 0: its own (sana-wm 5.0)")
    offload: bool = setting(False, "networks wait in main memory, one at a time is on the GPU: less memory there, slower; a CPU ignores it")
    vae_tiling: bool = setting(False, "the VAE works on overlapping tiles: less memory at its peak. SANA-WM's training did so")
    sana: str = setting("Efficient-Large-Model/SANA-WM_bidirectional-diffusers", "sana-wm: hub id or folder of a SanaWMPipeline")
    sana_refiner: str = setting("", "sana-wm: hub id or folder of a SanaWMLTX2Refiner, three more steps that sharpen (the published one, "
                                "Efficient-Large-Model/SANA-WM_bidirectional-diffusers-refiner, takes 35 GB more memory); empty: none")
    sana_size: list[int] = setting([704, 1280], "sana-wm: height and width of its frames, pixels, multiples of 32 from 64 up; it was "
                                   "trained at 704 1280")
    sana_prompt: str = setting("A quiet indoor place in even light, seen by a slowly moving camera. Nothing and nobody in it moves.",
                               "sana-wm: what its text encoder reads, the same for all trajectories")
    max_turn_error_deg: float = setting(5.0, "quality check, degrees: half of the smallest turn, so that a passed turn is nearest to its own label")
    min_match: float = setting(0.4, "quality check, correlation 0..1: at its best yaw the anchor must resemble the turned frame at least so much")
    min_sharpness: float = setting(0.04, "quality check, ratio: variance of the Laplacian over the anchor's; a 5x5 box blur leaves about 0.02")
    min_motion: float = setting(1.0, "quality check, grey levels 0..255: mean difference between first and last frame; below it the view is frozen")
    max_holes: float = setting(0.6, "quality check, share 0..1 of a frame that no picture shows; at 54 degrees a turn by 30 leaves about 0.57")
    shard: str = setting("0/1", "i/n: this process makes trajectories i, i+n, i+2n, ...; whichever shard ends last completes the folder")
    workers: int = setting(os.cpu_count() or 1, "processes; results do not depend on it")
    sheet_rows: int = setting(12, "trajectories on contact_sheet.png, spread over the kinds of action")
    benchmark: bool = setting(False, "only measure the simulator: frames per second at 112x112 and 576x576 on all workers")


# --- camera ---

def intrinsics(width: int, height: int, fov_x_deg: float) -> np.ndarray:
    """K [3,3] float32 in pixels: square pixels, principal point at the centre (pixel j spans j..j+1)."""
    focal_px = 0.5 * width / math.tan(math.radians(fov_x_deg) / 2)
    return np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]], np.float32)


@lru_cache(maxsize=8)
def pixel_rays(width: int, height: int, focal_px: float) -> tuple[np.ndarray, np.ndarray]:
    """x [1,W] and y [H,1] of every pixel centre's viewing ray (x, y, 1); z = 1, so a distance along a ray is a depth."""
    x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / focal_px
    y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / focal_px
    return x[None].astype(np.float32), y[:, None].astype(np.float32)


def rays_of(K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return pixel_rays(round(2 * float(K[0, 2])), round(2 * float(K[1, 2])), float(K[0, 0]))


def yaw_matrix(yaw_deg: float) -> np.ndarray:
    """R [3,3] of DESIGN 4: +yaw turns right."""
    c, s = math.cos(math.radians(yaw_deg)), math.sin(math.radians(yaw_deg))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def yaw_deg_of(R: np.ndarray) -> float:
    return math.degrees(math.atan2(R[0, 2], R[2, 2]))


# --- the simulator: surfaces ---

@lru_cache(maxsize=1)
def pattern_bank() -> np.ndarray:
    """uint8 [LEVELS, patterns, TEXELS, TEXELS], the same in every run: stripes, checks, bricks, panels, noise, tiles (two of each).

    Random tones per cell make a place on a wall unlike its neighbours. Level l is the pattern averaged over 2^l x 2^l texels.
    """
    S, rng = TEXELS, np.random.default_rng(7)
    row, column = np.mgrid[:S, :S]
    frequency = np.hypot(np.fft.fftfreq(S)[:, None], np.fft.fftfreq(S)[None]) * S

    def noise(power: float) -> np.ndarray:  # cloudy, repeats without a seam
        field_ = np.fft.ifft2(np.fft.fft2(rng.standard_normal((S, S))) / np.maximum(frequency, 2) ** power).real
        return np.clip(0.5 + field_ / (4 * field_.std()), 0, 1)

    def cells(height: int, width: int, shift: int, joint: float) -> np.ndarray:  # a random tone each, `joint` = tone of the lines between
        along = (column + shift * (row // height % 2)) % S
        tone = rng.uniform(0.25, 1, (S // height, S // width))[row // height, along // width]
        return np.where((row % height < 2) | (along % width < 2), joint, tone)

    def checks(side: int) -> np.ndarray:
        return 0.6 * ((row // side + column // side) % 2) + 0.4 * rng.uniform(0, 1, (S // side, S // side))[row // side, column // side]

    def stripes() -> np.ndarray:
        widths = rng.integers(5, 20, 64)
        return np.repeat(rng.uniform(0, 1, 64), widths)[:S][None].repeat(S, 0)

    def panels() -> np.ndarray:
        image = np.full((S, S), 0.75)
        for _ in range(60):
            top, left = rng.integers(0, S, 2)
            image[np.ix_((top + np.arange(rng.integers(8, 40))) % S, (left + np.arange(rng.integers(8, 40))) % S)] = rng.uniform(0, 1)
        return image

    kinds = [stripes(), stripes(), checks(16), checks(8), cells(8, 16, 8, 0.9), cells(16, 32, 16, 0.1), panels(), panels(),
             noise(1.5), noise(1.1), cells(16, 16, 0, 0.0), cells(32, 32, 0, 0.9)]
    level = np.stack([0.75 * kind + 0.25 * noise(1.0) for kind in kinds])
    levels = [level]
    for l in range(LEVELS - 1):
        for axis in (1, 2):
            level = (level + np.roll(level, 2 ** l, axis)) / 2
        levels.append(np.roll(level, (-2 ** l, -2 ** l), (1, 2)))  # back to the centre of the averaged square
    return (255 * np.stack(levels)).astype(np.uint8)


@dataclass
class Room:
    """A room file made ready to render. n objects."""
    half_m: np.ndarray  # [3] half extents, y: half the height
    camera_height_m: float
    objects: list[dict]
    corners: np.ndarray  # [n,8,3] float32, of each object's bounding box, world axes
    half_sizes: np.ndarray  # [n,3] float32
    turns: np.ndarray  # [n,3,3] float32, object to world axes
    colors: np.ndarray  # [n,3] float32
    face_pattern: np.ndarray  # [6] int32, start of each face's pattern in the bank
    face_shift: np.ndarray  # [6] float32, texels by which the pattern is moved along both its axes
    palette: np.ndarray  # [6*256] uint32, face and pattern value -> RGBx


SHAPES = ("ball", "crate", "pillar", "cone")


def prepare_room(room: dict) -> Room:
    """Room record (see 01) -> Room. Raises ValueError when it is not one."""
    try:
        half_m = np.array([room["width_m"] / 2, room["height_m"] / 2, room["depth_m"] / 2], np.float32)
        rng, camera_height_m, objects = np.random.default_rng(room["texture_seed"]), float(room["camera_height_m"]), room["objects"]
        n = len(objects)
        sizes, centers, colors = (np.array([thing[key] for thing in objects], np.float32).reshape(n, 3) for key in ("size_m", "center_m", "color"))
        turns = np.array([yaw_matrix(thing["yaw_deg"]) for thing in objects], np.float32).reshape(n, 3, 3)
        wrong = [thing["shape"] for thing in objects if thing["shape"] not in SHAPES or not {"id", "label"} <= thing.keys()]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"not a room file: {type(error).__name__} {error}") from None
    if wrong or n > 254 or not np.isfinite([*half_m, camera_height_m, *centers.flat, *turns.flat, *colors.flat]).all() or not (sizes > 0).all():
        raise ValueError(f"not a room file: shapes {wrong}, {n} objects, or a size or place that is no number")
    unit = np.array([[x, y, z] for x in (-.5, .5) for y in (-.5, .5) for z in (-.5, .5)], np.float32)
    corners = (unit * sizes[:, None]) @ turns.transpose(0, 2, 1) + centers[:, None]
    pattern = np.r_[rng.choice(10, 4, replace=False), rng.choice([8, 9, 11]), rng.choice([4, 5, 10, 11])]  # ceiling, floor: quieter ones
    contrast = np.array([1, 1, 1, 1, 0.3, 0.7])[:, None, None]
    value = np.linspace(-0.5, 0.35, 256)[None, :, None]  # darker to half, lighter to a third more: the hue stays the wall's own
    palette = np.zeros((6, 256, 4), np.uint8)
    palette[..., :3] = np.clip(FACE_RGB[:, None] * (1 + contrast * value), 0, 255)
    return Room(half_m, camera_height_m, objects, corners, sizes / 2, turns, colors, (pattern * TEXELS ** 2).astype(np.int32),
                rng.integers(0, TEXELS, 6).astype(np.float32), palette.reshape(-1).view(np.uint32))


# --- the simulator: rays ---
# Each shape is met in its own axes, centre at the origin, half sizes (hx, hy, hz), y down. o [3] is the camera, d the rays of a window: x [1,w],
# y [h,1], z [1,w]. meet_* returns the depth t [h,w] of the first hit (inf where there is none), normal_* the outward normals at points p [3,m].

def roots(a, b, c):
    """Both solutions of a t^2 + 2 b t + c = 0 (NaN where there are none, which no comparison accepts)."""
    root = np.sqrt(b * b - a * c)
    return (-b - root) / a, (-b + root) / a


def meet_ball(o, d, half):
    t, _ = roots(d[0] * d[0] + d[1] * d[1] + d[2] * d[2], o[0] * d[0] + o[1] * d[1] + o[2] * d[2], o @ o - half[0] ** 2)
    return np.where(t > 0, t, np.inf)


def meet_crate(o, d, half):
    near = [(-np.copysign(half[i], d[i]) - o[i]) / d[i] for i in range(3)]
    far = [(np.copysign(half[i], d[i]) - o[i]) / d[i] for i in range(3)]
    t = np.maximum(np.maximum(near[0], near[1]), near[2])
    return np.where((t < np.minimum(np.minimum(far[0], far[1]), far[2])) & (t > 0), t, np.inf)


def meet_cap(o, d, y_m, radius_m):
    t = (y_m - o[1]) / d[1]
    return np.where((t > 0) & ((o[0] + t * d[0]) ** 2 + (o[2] + t * d[2]) ** 2 <= radius_m ** 2), t, np.inf)


def meet_pillar(o, d, half):
    t, _ = roots(d[0] * d[0] + d[2] * d[2], o[0] * d[0] + o[2] * d[2], o[0] ** 2 + o[2] ** 2 - half[0] ** 2)
    t = np.where((t > 0) & (np.abs(o[1] + t * d[1]) <= half[1]), t, np.inf)
    return np.minimum(t, meet_cap(o, d, math.copysign(half[1], o[1]), half[0])) if abs(o[1]) > half[1] else t


def meet_cone(o, d, half):
    slope2, y = (half[0] / (2 * half[1])) ** 2, o[1] + half[1]  # y from the apex down: x^2 + z^2 = slope^2 y^2
    t = np.inf
    for root in roots(d[0] * d[0] + d[2] * d[2] - slope2 * d[1] * d[1], o[0] * d[0] + o[2] * d[2] - slope2 * y * d[1],
                      o[0] ** 2 + o[2] ** 2 - slope2 * y * y):
        at = y + root * d[1]
        t = np.where((root > 0) & (root < t) & (at >= 0) & (at <= 2 * half[1]), root, t)
    return np.minimum(t, meet_cap(o, d, half[1], half[0])) if o[1] > half[1] else t


def normal_ball(p, half):
    return p / half[0]


def normal_crate(p, half):
    share = p / half[:, None]
    face = np.abs(share).argmax(0)
    return np.where(face == np.arange(3)[:, None], np.sign(share), 0)


def normal_pillar(p, half):
    side = np.abs(p[1]) < 0.9999 * half[1]
    return np.stack([side * p[0] / half[0], ~side * np.sign(p[1]), side * p[2] / half[0]])


def normal_cone(p, half):
    slope, radius = half[0] / (2 * half[1]), np.hypot(p[0], p[2]) + 1e-6
    normal = np.stack([p[0] / radius, np.full_like(radius, -slope), p[2] / radius]) / math.hypot(1, slope)
    return np.where(p[1] > 0.9999 * half[1], np.array([[0], [1], [0]]), normal)


MEET = {"ball": meet_ball, "crate": meet_crate, "pillar": meet_pillar, "cone": meet_cone}
NORMAL = {"ball": normal_ball, "crate": normal_crate, "pillar": normal_pillar, "cone": normal_cone}


def render(room: Room, pose: np.ndarray, K: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One view from `pose` [4,4] (camera to room axes) -> picture uint8 [H,W,3], ids uint8 [H,W] (0 or 1 + object index), depth float32 [H,W].

    The camera is level (turns and moves leave it so). All rays of a column then meet the same upright line of a wall, at one depth, and all
    rays of a row the same depth of floor or ceiling: most of the work is on [1,W] and [H,1], and only indices are computed per pixel.
    """
    x, y = rays_of(K)
    cos, sin, (ox, oy, oz), (hx, hy, hz) = float(pose[0, 0]), float(pose[0, 2]), map(float, pose[:3, 3]), map(float, room.half_m)
    oy += hy  # from here on y = 0 is half-way up, so that all three axes look alike
    with np.errstate(divide="ignore", invalid="ignore"):
        dx, dy, dz = cos * x + sin, y, cos - sin * x  # rays in room axes: R(yaw) @ (x, y, 1); [1,W], [H,1], [1,W]
        tx, ty, tz = ((np.copysign(np.float32(h), d) - o) / d for h, o, d in ((hx, ox, dx), (hy, oy, dy), (hz, oz, dz)))
        on_x, wall = tx < tz, np.minimum(tx, tz)
        face = np.where(on_x, dx > 0, 2 + (dz > 0)), 4 + (dy > 0)  # of each column's wall, of each row's floor or ceiling
        first, tone = [], []  # per column and per row: start of the pattern at its level in the bank, and of the face's palette
        for faces, depth, softer in ((face[0], wall, 0), (face[1], ty, 1)):  # floors are seen at a grazing angle: one level softer
            level = np.clip(np.ceil(np.log2(depth * (TEXELS_PER_M / K[0, 0]))) + softer, 0, LEVELS - 1).astype(np.int32)  # texels per pixel
            first.append(level * pattern_bank()[0].size + room.face_pattern[faces])
            tone.append((faces * 256).astype(np.int32))
        # the two pattern coordinates: (z or x, y) on walls, (x, z) on floor and ceiling; + 64 m keeps them positive before truncation
        shift = [room.face_shift[faces] + 64 * TEXELS_PER_M for faces in face]
        wall_u = (np.where(on_x, oz + wall * dz, ox + wall * dx) * TEXELS_PER_M + shift[0]).astype(np.int32) & (TEXELS - 1)  # [1,W]
        wall_v = (dy * (wall * TEXELS_PER_M) + (oy * TEXELS_PER_M + shift[0])).astype(np.int32) & (TEXELS - 1)  # [H,W]
        scaled = np.minimum(ty, 1e3) * TEXELS_PER_M  # [H,1]; the row of the horizon meets the floor at infinity
        flat_u = (scaled * dx + (ox * TEXELS_PER_M + shift[1])).astype(np.int32) & (TEXELS - 1)
        flat_v = (scaled * dz + (oz * TEXELS_PER_M + shift[1])).astype(np.int32) & (TEXELS - 1)
    flat = ty < wall  # [H,W] from here on
    depth = np.minimum(ty, wall)
    texel = np.where(flat, flat_v * TEXELS + (flat_u + first[1]), wall_v * TEXELS + (wall_u + first[0]))
    picture = room.palette.take(pattern_bank().take(texel) + np.where(flat, tone[1], tone[0]))  # uint32
    ids = np.zeros(depth.shape, np.uint8)
    for index, (top, bottom, left, right) in windows(room, pose, K):
        paint(room, index, pose, (dx[:, left:right], dy[top:bottom], dz[:, left:right]),
              *(image[top:bottom, left:right] for image in (picture, ids, depth)))
    rgb = np.empty((*depth.shape, 3), np.uint8)
    for channel in range(3):  # three times as fast as one copy of [..., :3]
        rgb[..., channel] = picture.view(np.uint8)[:, channel::4]
    return rgb, ids, depth


def windows(room: Room, pose: np.ndarray, K: np.ndarray):
    """(object index, pixel window (top, bottom, left, right)) of every object whose bounding box reaches into the picture."""
    width, height = round(2 * float(K[0, 2])), round(2 * float(K[1, 2]))
    seen = (room.corners - pose[:3, 3].astype(np.float32)) @ pose[:3, :3].astype(np.float32)  # [n,8,3] in camera axes
    near, far = seen[..., 2].min(1), seen[..., 2].max(1)
    pixel = seen[..., :2] / np.maximum(seen[..., 2:], 0.05) * K[0, 0] + K[:2, 2]
    bounds = np.c_[np.floor(pixel.min(1)), np.ceil(pixel.max(1))].clip(-1e6, 1e6).astype(int).tolist()
    for index, (left, top, right, bottom) in enumerate(bounds):
        if near[index] <= 0.05:  # partly beside or behind the camera: no bound
            left, top, right, bottom = 0, 0, width, height
        top, bottom, left, right = max(top, 0), min(bottom, height), max(left, 0), min(right, width)
        if far[index] > 0 and top < bottom and left < right:
            yield index, (top, bottom, left, right)


def paint(room: Room, index: int, pose: np.ndarray, d: tuple, picture: np.ndarray, ids: np.ndarray, depth: np.ndarray):
    """Draw one object into its windows of picture, ids and depth [h,w] (views, written in place) where it is the nearest so far."""
    shape, half, R = room.objects[index]["shape"], room.half_sizes[index], room.turns[index]  # R: object to room axes
    o = ((pose[:3, 3] - room.objects[index]["center_m"]) @ R).astype(np.float32)
    d = R[0, 0] * d[0] + R[2, 0] * d[2], d[1], R[0, 2] * d[0] + R[2, 2] * d[2]  # [1,w], [h,1], [1,w]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = MEET[shape](o, d, half)
    hit = t < depth
    row, column = np.nonzero(hit)
    t = t[hit]  # [m]
    p = np.stack([o[0] + t * d[0][0, column], o[1] + t * d[1][row, 0], o[2] + t * d[2][0, column]])  # [3,m]
    lambert = (LIGHT @ R) @ NORMAL[shape](p, half)
    check = np.floor(p * (1.96 / half[:, None])).sum(0) % 2  # faint checks through the body, so that turning and size show; 1.96: off the faces
    tone = (0.72 + 0.28 * lambert) * (1 - 0.18 * check)
    color = np.zeros((len(t), 4), np.uint8)
    color[:, :3] = np.minimum(tone[:, None] * room.colors[index], 255)
    picture[hit], ids[hit], depth[hit] = color.view(np.uint32)[:, 0], index + 1, t


def visible_objects(room: Room, ids: np.ndarray, pose: np.ndarray) -> list[dict]:
    """The objects that show in `ids` [H,W]: exact box of the visible pixels, their number, horizontal distance of the centre."""
    height, width = ids.shape
    found = []
    for index, thing in enumerate(room.objects):
        mask = ids == index + 1
        visible_px = int(np.count_nonzero(mask))
        if not visible_px:
            continue
        rows, columns = np.flatnonzero(mask.any(1)).tolist(), np.flatnonzero(mask.any(0)).tolist()
        box = [BOX * columns[0] // width, BOX * rows[0] // height, -(-BOX * (columns[-1] + 1) // width), -(-BOX * (rows[-1] + 1) // height)]
        away_m = math.hypot(thing["center_m"][0] - pose[0, 3], thing["center_m"][2] - pose[2, 3])
        found.append({"id": thing["id"], "label": thing["label"], "box": box, "visible_px": visible_px, "distance_m": round(away_m, 3)})
    return found


def start_pose(room: Room, start: list[float]) -> np.ndarray:
    """World pose [4,4] of frame 0 from (x_m, z_m, yaw_deg)."""
    pose = np.eye(4)
    pose[:3, :3] = yaw_matrix(start[2])
    pose[:3, 3] = start[0], -room.camera_height_m, start[1]
    return pose


# --- warp: photographs ---

def sample(image: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Bilinear values of image [h,w,...] at pixel coordinates u, v (pixel j has its centre at j + 0.5; beyond the outer centres the edge goes on)."""
    height, width = image.shape[:2]
    u, v = np.clip(u - 0.5, 0, width - 1), np.clip(v - 0.5, 0, height - 1)
    left, top = np.minimum(u.astype(np.int32), max(width - 2, 0)), np.minimum(v.astype(np.int32), max(height - 2, 0))
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    extra = (...,) + (None,) * (image.ndim - 2)
    along, down = (u - left)[extra], (v - top)[extra]
    upper = image[top, left] * (1 - along) + image[top, right] * along
    return upper * (1 - down) + (image[bottom, left] * (1 - along) + image[bottom, right] * along) * down


def look_back(picture: np.ndarray, c2w: np.ndarray, K: np.ndarray, z: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """The equation of the docstring: picture uint8 [H,W,3] as seen from c2w at depth z [H,W] -> view uint8 [H,W,3], holes bool [H,W]."""
    x, y = rays_of(K)
    known = np.isfinite(z)
    z = np.where(known, z, 1)
    X, Y, Z = (z * (c2w[i, 0] * x + c2w[i, 1] * y + c2w[i, 2]) + c2w[i, 3] for i in range(3))  # [H,W] each, in the axes of frame 0
    with np.errstate(divide="ignore", invalid="ignore"):
        u, v = K[0, 0] * X / Z + K[0, 2], K[1, 1] * Y / Z + K[1, 2]
    holes = ~(known & (Z > 0) & (u >= 0) & (u <= 2 * K[0, 2]) & (v >= 0) & (v <= 2 * K[1, 2]))
    view = sample(picture.astype(np.float32), np.where(holes, 0, u), np.where(holes, 0, v)) + 0.5
    view[holes] = FILL
    return view.astype(np.uint8), holes


def splat_depth(depth: np.ndarray, c2w: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Depth map float [H,W] of frame 0 (inf: unknown) -> depth map of the view from c2w, inf where no surface lands.

    Where the camera comes nearer, surfaces spread, so each pixel is split into `fine` x `fine` points; between them depth is interpolated,
    but not across an edge of an object (a step of more than a tenth).
    """
    height, width = depth.shape
    ahead = np.percentile(depth[np.isfinite(depth)], 2) if np.isfinite(depth).any() else 1.0
    fine = int(np.clip(math.ceil(ahead / max(ahead - c2w[2, 3], 0.05)), 1, 3)) + 1
    u, v = np.meshgrid((np.arange(width * fine) + 0.5) / fine, (np.arange(height * fine) + 0.5) / fine)
    nearest = np.repeat(np.repeat(depth, fine, 0), fine, 1)
    smooth = sample(np.where(np.isfinite(depth), depth, 1e9), u, v)
    z0 = np.where(np.abs(smooth - nearest) < 0.1 * nearest, smooth, nearest)
    u, v, z0 = (a[np.isfinite(nearest)] for a in (u, v, z0))
    points = np.stack([(u - K[0, 2]) / K[0, 0] * z0, (v - K[1, 2]) / K[1, 1] * z0, z0], -1)  # [m,3], axes of frame 0
    points = (points - c2w[:3, 3]) @ c2w[:3, :3]  # the transpose of c2w's rotation from the left: axes of the new view
    points = points[points[:, 2] > 0.01]
    column = np.floor(K[0, 0] * points[:, 0] / points[:, 2] + K[0, 2])
    row = np.floor(K[1, 1] * points[:, 1] / points[:, 2] + K[1, 2])
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    z = np.full(height * width, np.inf)
    np.minimum.at(z, (row[inside] * width + column[inside]).astype(np.int64), points[inside, 2])
    return z.reshape(height, width)


# --- teachers ---
# refuses(trajectory) -> why this teacher cannot take it at all and what would help; empty: it can.
# anchor(trajectory) -> what it starts from, read from disk.
# imagine(anchor, c2w [N,4,4], K, kept) -> frames uint8 [n,H,W,3], those of the indices `kept` (all N unless given). It leaves behind what stage 2
# records of them: `objects` (visible ones per frame, or None), `holes` (bool [n,H,W], or None), `K` (of the frames), `settings`.

class Unusable(Exception):
    """This trajectory cannot be imagined; the text says why and what would help."""


@lru_cache(maxsize=64)
def load_room(path: Path) -> Room:
    try:
        return prepare_room(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise Unusable(f"{path}: {error}") from None


@lru_cache(maxsize=4)
def load_photo(path: Path, width: int = 0, height: int = 0) -> np.ndarray:
    """uint8 [H,W,3], the right way up; in its own size unless another is given."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            return np.asarray(image.resize((width, height), Image.LANCZOS) if width else image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # what PIL raises for damaged files
        raise Unusable(f"{path}: {error}") from None


@lru_cache(maxsize=4)
def load_depth(path: Path, width: int, height: int) -> np.ndarray:
    """float32 [H,W] metres along the viewing axis, inf where unknown; nearest pixel where sizes differ."""
    try:
        depth = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise Unusable(f"{path}: {error}") from None
    if depth.ndim != 2 or depth.dtype.kind not in "fiu" or not depth.size:
        raise Unusable(f"{path}: a depth map is a number of metres for each pixel [H,W], not {depth.dtype} {list(depth.shape)}")
    rows, columns = ((np.arange(n) + 0.5) * size / n for n, size in ((height, depth.shape[0]), (width, depth.shape[1])))
    depth = depth[np.ix_(rows.astype(int), columns.astype(int))].astype(np.float32)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.inf)


class Simulator:
    """Exact views of a room. An anchor is (Room, start)."""

    def __init__(self, cfg: Config):
        self.run = Path(cfg.run)

    def refuses(self, trajectory: dict) -> str:
        return "" if trajectory["room"] else "simulator draws rooms, not photographs (add --teacher warp)"

    def anchor(self, trajectory: dict) -> tuple[Room, list[float]]:
        room, start = load_room(self.run / trajectory["room"]), trajectory.get("start")
        if not (isinstance(start, list) and len(start) == 3 and np.isfinite(start).all()):
            raise Unusable(f"start {start!r} is not [x_m, z_m, yaw_deg]")
        return room, start

    def imagine(self, anchor: tuple[Room, list[float]], c2w: np.ndarray, K: np.ndarray, kept=slice(None)) -> np.ndarray:
        (room, start), frames, self.objects = anchor, [], []
        self.settings, self.holes, self.K = {}, None, K
        poses = start_pose(room, start) @ c2w[kept]
        inside = np.abs(poses[:, :3, 3] + [0, room.half_m[1], 0]) < room.half_m - 0.01
        if not inside.all():
            raise Unusable("the camera leaves the room: run 01 again")
        if np.abs(poses[:, 1, :3] - [0, 1, 0]).max() > 1e-3:
            raise Unusable("the simulator's camera is level, these poses pitch or roll")
        for pose in poses:
            picture, ids, _ = render(room, pose, K)
            frames.append(picture)
            self.objects.append(visible_objects(room, ids, pose))
        return np.stack(frames)


def first_picture(trajectory: dict, rooms: Simulator, long_side_px: int = 576) -> np.ndarray:
    """What a generative teacher starts from, uint8 [H,W,3]: the photograph in its own size, or the room's frame 0 drawn so large."""
    if not trajectory["room"]:
        return load_photo(Path(trajectory["anchor"]))
    room, start = rooms.anchor(trajectory)
    enlarge = max(1, long_side_px / max(trajectory["width"], trajectory["height"]))
    width, height = round(enlarge * trajectory["width"]), round(enlarge * trajectory["height"])
    return render(room, start_pose(room, start), intrinsics(width, height, trajectory["fov_x_deg"]))[0]


def network_place(cfg: Config) -> tuple[torch.device, torch.dtype]:
    """Where a teacher's networks run, and in what precision."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # a name torch does not know; a build without CUDA
        stop(f"--device {name}: {str(error).splitlines()[0]}")
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32


class Warp:
    """Moves the pixels of one picture. An anchor is (picture uint8 [H,W,3], depth float [H,W] or None). In a room both are the simulator's frame 0."""

    def __init__(self, cfg: Config):
        self.run, self.depth_dir, self.rooms = Path(cfg.run), cfg.depth_dir, Simulator(cfg)

    def depth_path(self, trajectory: dict) -> Path:
        photo = Path(trajectory["anchor"])
        return (Path(self.depth_dir) if self.depth_dir else photo.parent) / f"{photo.stem}.depth.npy"

    def refuses(self, trajectory: dict) -> str:
        if trajectory["room"] or all(name in ("turn_left", "turn_right") for name, _ in trajectory["actions"]) or self.depth_path(trajectory).is_file():
            return ""
        return "warp needs a depth map to move (save metres [H,W] as <photo stem>.depth.npy beside the photograph or in --depth_dir)"

    def anchor(self, trajectory: dict) -> tuple[np.ndarray, np.ndarray | None]:
        width, height = trajectory["width"], trajectory["height"]
        if trajectory["room"]:
            room, start = self.rooms.anchor(trajectory)
            picture, _, depth = render(room, start_pose(room, start), intrinsics(width, height, trajectory["fov_x_deg"]))
            self.settings = {"depth": "exact"}
            return picture, depth
        path = self.depth_path(trajectory)
        self.settings = {"depth": path.name if path.is_file() else None}
        return load_photo(Path(trajectory["anchor"]), width, height), load_depth(path, width, height) if path.is_file() else None

    def imagine(self, anchor: tuple[np.ndarray, np.ndarray | None], c2w: np.ndarray, K: np.ndarray, kept=slice(None)) -> np.ndarray:
        (picture, depth), views = anchor, []
        for pose in c2w[kept]:
            moves = np.abs(pose[:3, 3]).max() > 1e-6
            views.append(look_back(picture, pose, K, splat_depth(depth, pose, K) if moves else 1.0))
        self.objects, self.holes, self.K = None, np.stack([holes for _, holes in views]), K
        return np.stack([view for view, _ in views])


def random_numbers(*key) -> torch.Generator:
    """A generator of its own for every (seed, scene, trajectory, purpose); on the CPU, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big"))


# --- sana-wm ---

def resample(c2w: np.ndarray, max_step_m: float = 0.05, max_step_deg: float = 1.2, group: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The path c2w [N,4,4] of a level camera in smaller steps -> (poses float32 [F,4,4], at [N]: poses[at[i]] is c2w[i]).

    SANA-WM expects 0.025 to 0.05 m and 0.6 to 1.2 degrees from frame to frame, and its VAE packs all frames after the first in groups, so
    F = group * k + 1, k >= 1. Each step of the path (01 takes up to 0.2 m or 5 degrees) is cut into the fewest equal parts within the upper
    limits; none then falls short of the lower ones, though a step that was smaller stays so. Between two poses of the path the camera moves
    in a straight line and turns evenly. The last pose is repeated until the groups are full. Raises Unusable where it pitches or rolls.
    """
    if np.abs(c2w[:, 1, :3] - [0, 1, 0]).max() > 1e-3:
        raise Unusable("sana-wm's camera is level, these poses pitch or roll")
    poses, at = [c2w[0]], [0]
    for start, end in zip(c2w, c2w[1:]):
        move_m, turn_deg = end[:3, 3] - start[:3, 3], yaw_deg_of(start[:3, :3].T @ end[:3, :3])
        parts = max(1, math.ceil(np.linalg.norm(move_m) / max_step_m - 1e-4), math.ceil(abs(turn_deg) / max_step_deg - 1e-4))
        for part in range(1, parts):
            pose = start.copy()
            pose[:3, :3] = start[:3, :3] @ yaw_matrix(turn_deg * part / parts)
            pose[:3, 3] += move_m * part / parts
            poses.append(pose)
        poses.append(end)
        at.append(len(poses) - 1)
    poses += [c2w[-1]] * (group * max(1, math.ceil((len(poses) - 1) / group)) + 1 - len(poses))
    return np.stack(poses).astype(np.float32), np.array(at)


def middle(picture: np.ndarray, K: np.ndarray, width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """The largest middle part of a picture uint8 [h,w,3] that has the shape asked for, resized to it -> (picture, its K).

    K is that of the whole picture, in pixels of any size. SanaWMPipeline resizes and cuts likewise, but rounds to whole pixels in between.
    Done here, nothing is left to cut: pixels stay square, the principal point stays central, and the picture is at hand as frame 0.
    """
    image = ImageOps.fit(Image.fromarray(picture), (width, height), Image.LANCZOS)
    focal_px = K[0, 0] / (2 * K[0, 2]) * picture.shape[1] * max(width / picture.shape[1], height / picture.shape[0])
    return image, np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]], np.float32)


def check_pipeline(source: str, kind: str):
    """A source of weights that cannot be right ends the run before anything is made."""
    index = Path(source) / "model_index.json"
    if not Path(source).is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            stop(f"{source} is neither a folder nor a hub id (owner/name): name a {kind}")
        return
    try:
        found = json.loads(index.read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        stop(f"{index} does not describe a pipeline ({error!r}): name the folder of a {kind}")
    if found != kind:
        stop(f"{index} describes a {found}: name the folder of a {kind}")


def load_parts(source: str, kinds: dict[str, type], dtype: torch.dtype) -> dict:
    """The parts of a diffusers pipeline from its folder or the hub, {name: class} -> {name: object}; a VAE in float32, as advised there.

    The caller names each class, weights come from safetensors, and a tokenizer's own code is refused: nothing in the folder is ever run. A
    part that does not load whole ends the run with one line that names its file.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        wanted = [f"{name}/*.{ending}" for name in kinds for ending in ("json", "safetensors", "model")]
        try:
            folder = Path(snapshot_download(source, allow_patterns=wanted))
        except (OSError, ValueError) as error:
            stop(f"{source} is no folder here, and the hub does not give it: {str(error).strip().splitlines()[0]}")
    parts = {}
    for name, kind in kinds.items():
        place = folder / name
        weights = sorted(place.glob("*.safetensors"))
        try:
            if not issubclass(kind, torch.nn.Module):
                parts[name] = kind.from_pretrained(str(place), **({"trust_remote_code": False} if name == "tokenizer" else {}))
                continue
            if not weights:
                raise OSError("no *.safetensors in it")
            for place in weights:
                with safe_open(place, "pt"):  # compares the file's length with what its head says
                    pass
            place = weights[0] if len(weights) == 1 else folder / name
            parts[name], report = kind.from_pretrained(str(folder / name), dtype=torch.float32 if name == "vae" else dtype,
                                                       use_safetensors=True, output_loading_info=True)
            if lacking := sorted(report["missing_keys"]):  # they would be random numbers
                raise ValueError(f"it lacks {', '.join(lacking[:3])}")
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:  # Key, Type: a wrong config.json
            stop(f"{place} does not load as {kind.__name__}: {str(error).strip().splitlines()[0]}")
    return parts


class SanaWM:
    """A video model that follows camera poses, run by diffusers. An anchor is (picture uint8 [h,w,3], (scene_id, traj_id)).

    Frame 0 is the middle of the picture itself, not what the VAE makes of it.
    """
    MOST_FRAMES = 961  # a minute at 16 frames a second: the longest that the model was made for

    def __init__(self, cfg: Config):
        self.cfg, self.rooms, self.pipe, self.refiner = cfg, Simulator(cfg), None, None
        if len(cfg.sana_size) != 2 or any(side < 64 or side % 32 for side in cfg.sana_size):
            stop(f"--sana_size {' '.join(map(str, cfg.sana_size))}: want height and width, multiples of 32 from 64 up")
        check_pipeline(cfg.sana, "SanaWMPipeline")
        if cfg.sana_refiner:
            check_pipeline(cfg.sana_refiner, "SanaWMLTX2Refiner")

    def refuses(self, trajectory: dict) -> str:
        return ""

    def anchor(self, trajectory: dict) -> tuple[np.ndarray, tuple[str, str]]:
        return first_picture(trajectory, self.rooms, max(self.cfg.sana_size)), (trajectory["scene_id"], trajectory["traj_id"])

    def load(self):
        """Bring the networks to the device and encode the prompt, once."""
        import diffusers  # here, because it takes seconds that runs without networks need not wait
        from diffusers.pipelines.sana_wm.pipeline_sana_wm import DEFAULT_CHI_PROMPT  # trained with these words before each prompt
        from transformers import AutoTokenizer, Gemma2ForCausalLM
        diffusers.utils.logging.set_verbosity_error()  # what it would warn of is looked into by load_parts
        cfg, (device, dtype) = self.cfg, network_place(self.cfg)
        pipe = diffusers.SanaWMPipeline(**load_parts(cfg.sana, {
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler, "tokenizer": AutoTokenizer, "text_encoder": Gemma2ForCausalLM,
            "vae": diffusers.AutoencoderKLLTX2Video, "transformer": diffusers.SanaWMTransformer3DModel}, dtype))
        pipe.text_encoder.to(device)
        with torch.no_grad():
            embeddings = pipe.encode_prompt(cfg.sana_prompt, device=device, chi_prompt=DEFAULT_CHI_PROMPT)
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        self.prompt = dict(zip(names, embeddings))
        pipe.register_modules(text_encoder=None, tokenizer=None)  # all trajectories share the prompt, so 5 GB of weights can go
        if cfg.vae_tiling:  # tiles of 512 pixels, and of 96 frames in time: those of the model's training
            pipe.vae.enable_tiling(tile_sample_min_num_frames=96, tile_sample_stride_num_frames=64)
            pipe.vae.use_framewise_encoding = pipe.vae.use_framewise_decoding = True
        if cfg.sana_refiner:
            from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
            from transformers import Gemma3ForConditionalGeneration
            self.refiner = diffusers.SanaWMLTX2Refiner(vae=pipe.vae, **load_parts(cfg.sana_refiner, {
                "scheduler": diffusers.FlowMatchEulerDiscreteScheduler, "tokenizer": AutoTokenizer,
                "text_encoder": Gemma3ForConditionalGeneration, "connectors": LTX2TextConnectors,
                "transformer": diffusers.SanaWMLTX2RefinerTransformer3DModel}, dtype))
        for stage in filter(None, (pipe, self.refiner)):
            stage.set_progress_bar_config(desc="sana-wm", leave=False)
            if cfg.offload and device.type == "cuda":
                try:
                    stage.enable_model_cpu_offload(device=device)
                except ImportError as error:
                    stop(f"--offload: {str(error).splitlines()[0]}")
            else:
                stage.to(device)
        self.pipe = pipe

    def video(self, image: Image.Image, poses: np.ndarray, name: tuple[str, str], steps: int, guidance: float) -> torch.Tensor:
        """The frames [F,3,H,W] in 0..1 at poses [F,4,4]."""
        noise = random_numbers(self.cfg.seed, *name, "sana-wm")
        made = self.pipe(image=image, prompt=self.cfg.sana_prompt, c2w=poses, intrinsics=self.K, num_frames=len(poses), height=image.height,
                         width=image.width, num_inference_steps=steps, guidance_scale=guidance, generator=noise,
                         output_type="latent" if self.refiner else "pt", **self.prompt).frames
        if self.refiner:
            noise = random_numbers(self.cfg.seed, *name, "refiner")
            made = self.refiner(made, self.cfg.sana_prompt, fps=16, generator=noise, output_type="pt")
            made = torch.cat([made[:1], made])  # it leaves frame 0 out
        return made

    def imagine(self, anchor: tuple[np.ndarray, tuple[str, str]], c2w: np.ndarray, K: np.ndarray, kept=slice(None)) -> np.ndarray:
        (picture, name), cfg, (height, width) = anchor, self.cfg, self.cfg.sana_size
        poses, at = resample(c2w)
        if len(poses) > self.MOST_FRAMES:
            raise Unusable(f"in sana-wm's steps the path has {len(poses)} frames, want at most {self.MOST_FRAMES}")
        if self.pipe is None:
            self.load()
        image, self.K = middle(picture, K, width, height)
        steps, guidance = cfg.steps or 60, cfg.guidance or 5.0
        try:
            made = self.video(image, poses, name, steps, guidance)
        except torch.OutOfMemoryError as error:
            stop(f"{str(error).splitlines()[0]} Try --vae_tiling, --offload or a smaller --sana_size.")
        frames = (255 * made[at[kept]]).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        frames[at[kept] == 0] = np.asarray(image)
        self.objects, self.holes = None, None
        self.settings = {"model": cfg.sana, "refiner": cfg.sana_refiner or None, "steps": steps, "guidance": guidance,
                         "prompt": cfg.sana_prompt, "height": height, "width": width, "frames": len(poses), "vae_tiling": cfg.vae_tiling}
        return frames


TEACHERS = {"simulator": Simulator, "warp": Warp, "sana-wm": SanaWM}
NETWORKS = {"sana-wm"}  # those of them that run a network


# --- quality check ---

def cylinder(image: np.ndarray, K: np.ndarray, columns: int) -> np.ndarray:
    """Picture [H,W,3] -> float [3*24, columns], a column an equal step of viewing angle, so that a turn is a shift along the columns."""
    half_x, half_y = K[0, 2] / K[0, 0], K[1, 2] / K[0, 0]  # tangents of half the fields of view
    angle = ((np.arange(columns) + 0.5) / columns - 0.5) * 2 * math.atan(half_x)
    up = (np.arange(24) + 0.5) / 12 - 1
    y = up[:, None] * half_y * math.cos(angle[-1]) / np.cos(angle)  # the rows that every column has
    shrink = max(1, round(image.shape[1] / 96))
    small = np.asarray(Image.fromarray(image).reduce(shrink), np.float32)
    width_px, height_px = small.shape[1] / (2 * half_x), small.shape[0] / (2 * half_y)  # focal lengths of the small picture
    rows = sample(small, np.broadcast_to((np.tan(angle) + half_x) * width_px, y.shape), (y + half_y) * height_px)  # [24, columns, 3]
    return (rows - rows.mean((0, 1))).transpose(2, 0, 1).reshape(72, columns)


def measure_turn(before: np.ndarray, after: np.ndarray, K: np.ndarray, columns: int = 96) -> tuple[float, float]:
    """(yaw in degrees at which `before`, turned, matches `after` best, their correlation there), pictures uint8 [H,W,3].

    On cylinders a turn by k columns means after[:, j] = before[:, j + k]; the correlation of the common columns is computed for every k that
    leaves a quarter of them at once (products by FFT, sums and squares by cumulative sums), and a parabola refines the best.
    """
    a, b = cylinder(before, K, columns), cylinder(after, K, columns)
    k = np.arange(-(3 * columns // 4), 3 * columns // 4 + 1)
    size = 2 * columns
    products = np.fft.irfft((np.fft.rfft(a, size) * np.fft.rfft(b, size).conj()).sum(0), size)[k % size]

    def common(values: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        total = np.append(0, values.sum(0).cumsum())
        return total[last] - total[first]

    part_a, part_b = (np.maximum(k, 0), columns + np.minimum(k, 0)), (np.maximum(-k, 0), columns + np.minimum(-k, 0))
    n = len(a) * (columns - np.abs(k))
    sum_a, sum_b = common(a, *part_a), common(b, *part_b)
    spread = (common(a * a, *part_a) - sum_a ** 2 / n).clip(1) * (common(b * b, *part_b) - sum_b ** 2 / n).clip(1)
    match = (products - sum_a * sum_b / n) / np.sqrt(spread)
    best = int(match.argmax())
    offset = 0.0
    if 0 < best < len(k) - 1:
        low, high = match[best - 1], match[best + 1]
        offset = 0.5 * (low - high) / min(low - 2 * match[best] + high, -1e-9)
    step_deg = 2 * math.degrees(math.atan(K[0, 2] / K[0, 0])) / columns
    return (k[best] + offset) * step_deg, float(match[best])


def laplacian_variance(picture: np.ndarray, holes: np.ndarray | None) -> float:
    """Of the grey picture, away from holes; 0 where nothing is left."""
    grey = picture.astype(np.float32).mean(-1)
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    if holes is not None:
        laplacian = laplacian[~(holes[1:-1, 1:-1] | holes[:-2, 1:-1] | holes[2:, 1:-1] | holes[1:-1, :-2] | holes[1:-1, 2:])]
    return float(laplacian.var()) if laplacian.size else 0.0


def quality(frames: np.ndarray, holes: np.ndarray | None, kept: list[int], c2w: np.ndarray, keyframes: list[int], K: np.ndarray, cfg: Config) -> dict:
    """The `qc` record of frames uint8 [n,H,W,3], which are the frames `kept` of c2w [N,4,4]. The keys are explained at the top."""
    fov_deg = 2 * math.degrees(math.atan(K[0, 2] / K[0, 0]))
    turn_error_deg = match = None
    at_keys = [i for i, frame in enumerate(kept) if frame in keyframes]
    for i, j in zip(at_keys, at_keys[1:]):
        relative = c2w[kept[i]].T[:3, :3] @ c2w[kept[j]][:3, :3]  # .T: the inverse of a rotation, whose place in a 4x4 is the same
        asked_deg = yaw_deg_of(relative)
        if np.abs(c2w[kept[j]][:3, 3] - c2w[kept[i]][:3, 3]).max() > 1e-4 or not 1e-3 < abs(asked_deg) <= 0.74 * fov_deg:
            continue
        found_deg, likeness = measure_turn(frames[i], frames[j], K)
        error_deg = round(found_deg - asked_deg, 2)
        if match is None or likeness < cfg.min_match <= match or abs(error_deg) > abs(turn_error_deg):
            turn_error_deg, match = error_deg, round(likeness, 3)
    shown = ~(holes[0] | holes[-1]) if holes is not None else np.ones(frames.shape[1:3], bool)
    change = np.abs(frames[-1].astype(np.int16) - frames[0])[shown]
    first = laplacian_variance(frames[0], None)
    sharpness = min(laplacian_variance(frame, None if holes is None else holes[i]) for i, frame in enumerate(frames)) / max(first, 1e-6)
    qc = {"turn_error_deg": turn_error_deg, "match": match, "sharpness": round(sharpness, 3), "motion": round(float(change.mean()), 2) if change.size else 0.0,
          "holes": round(float(holes.mean((1, 2)).max()), 3) if holes is not None else 0.0}
    why = []
    if match is not None and match < cfg.min_match:
        why.append(f"the turned frame resembles the one before it at no yaw ({match:.2f} < {cfg.min_match:g})")
    elif turn_error_deg is not None and abs(turn_error_deg) > cfg.max_turn_error_deg:
        why.append(f"turn off by {turn_error_deg:+.1f} degrees")
    if qc["sharpness"] < cfg.min_sharpness:
        why.append(f"blurred ({qc['sharpness']:g} of the sharpness of frame 0)")
    if qc["motion"] < cfg.min_motion:
        why.append(f"frozen (changes by {qc['motion']:g} grey levels)")
    if qc["holes"] > cfg.max_holes:
        why.append(f"{qc['holes']:.0%} holes")
    return {**qc, "passed": not why, "why": "; ".join(why)}


# --- one trajectory: check, imagine, measure, write ---

def check(trajectory: dict) -> np.ndarray:
    """c2w [N,4,4] of a trajectory record; Unusable where the record does not hold together."""
    try:
        c2w = np.array(trajectory["c2w"], np.float64)
        sound = (c2w.ndim == 3 and c2w.shape[1:] == (4, 4) and np.abs(c2w).max() < 1e6
                 and np.abs(c2w[:, :3, :3] @ c2w[:, :3, :3].transpose(0, 2, 1) - np.eye(3)).max() < 1e-3)
        keyframes = trajectory["keyframes"]
        whole = all(isinstance(n, int) for n in (trajectory["width"], trajectory["height"], *keyframes))
        if not sound or not whole or sorted({*keyframes}) != keyframes or not 0 <= keyframes[0] <= keyframes[-1] < len(c2w):
            raise ValueError("c2w [N,4,4] or keyframes are not what 01 writes")
        if not (8 <= min(trajectory["width"], trajectory["height"]) and max(trajectory["width"], trajectory["height"]) <= 8192):
            raise ValueError(f"size {trajectory['width']}x{trajectory['height']}, want 8 to 8192 pixels")
        if not 1 <= trajectory["fov_x_deg"] <= 170:
            raise ValueError(f"fov_x_deg {trajectory['fov_x_deg']}, want 1 to 170")
    except (ValueError, TypeError, IndexError) as error:
        raise Unusable(f"{error}: correct the line of trajectories.jsonl") from None
    return c2w


def frames_to_keep(keep: str, keyframes: list[int], n_frames: int) -> list[int]:
    return {"keyframes": sorted({0, *keyframes}), "ends": sorted({0, n_frames - 1}), "all": list(range(n_frames))}[keep]


def folder_of(trajectory: dict) -> PurePosixPath:
    return PurePosixPath("2_views", trajectory["scene_id"], trajectory["traj_id"])


def png(picture: Image.Image, level: int = 1) -> bytes:
    """Level 1 packs rendered views 5 % worse than the best level, at several times its speed."""
    packed = io.BytesIO()
    picture.save(packed, "PNG", compress_level=level)
    return packed.getvalue()


def nerfstudio(trajectory: dict, c2w: np.ndarray, K: np.ndarray, kept: list[int]) -> dict:
    """transforms.json: OpenGL camera axes (x right, y up, z backward), so the second and third column change sign."""
    flipped = c2w * [1, -1, -1, 1] + 0.0  # + 0.0: no "-0.0" in the file
    frames = [{"file_path": f"{frame:03d}.png", "transform_matrix": flipped[frame].tolist()} for frame in kept]
    return {"camera_model": "OPENCV", "fl_x": float(K[0, 0]), "fl_y": float(K[1, 1]), "cx": float(K[0, 2]), "cy": float(K[1, 2]),
            "w": trajectory["width"], "h": trajectory["height"], "frames": frames}


def make_views(trajectory: dict, teacher_name: str, teacher, cfg: Config):
    """Imagine one trajectory and write its folder, view.json last."""
    c2w = check(trajectory)
    kept = frames_to_keep(cfg.keep, trajectory["keyframes"], len(c2w))
    frames = teacher.imagine(teacher.anchor(trajectory), c2w, intrinsics(trajectory["width"], trajectory["height"], trajectory["fov_x_deg"]), kept)
    K, (height, width) = teacher.K, frames.shape[1:3]
    trajectory = trajectory | {"width": width, "height": height, "fov_x_deg": round(2 * math.degrees(math.atan(width / 2 / K[0, 0])), 4)}
    folder = folder_of(trajectory)
    for frame, picture in zip(kept, frames):
        save(Path(cfg.run) / folder / f"{frame:03d}.png", png(Image.fromarray(picture)))
    save(Path(cfg.run) / folder / "transforms.json", json.dumps(nerfstudio(trajectory, c2w, K, kept)))
    qc = quality(frames, teacher.holes, kept, c2w, trajectory["keyframes"], K, cfg)
    record = trajectory | {"teacher": teacher_name, "teacher_settings": teacher.settings, "seed": cfg.seed, "kept": kept,
                           "frames": [str(folder / f"{frame:03d}.png") for frame in kept], "objects": teacher.objects, "qc": qc}
    save(Path(cfg.run) / folder / "view.json", json.dumps(record) + "\n")


WORKER = {}  # of this process: its settings and its teachers


def start_worker(cfg: Config):
    """Make this process ready. A worker ends with the process that started it: else a killed run's would write beside its rerun's."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    WORKER.update(cfg=cfg, teachers={name: TEACHERS[name](cfg) for name in cfg.teacher})


def work(job: tuple[dict, str]) -> str:
    """Make one trajectory's views -> why it was skipped; empty: it was not."""
    (trajectory, teacher_name), cfg = job, WORKER["cfg"]
    folder = Path(cfg.run) / folder_of(trajectory)
    try:
        make_views(trajectory, teacher_name, WORKER["teachers"][teacher_name], cfg)
    except Unusable as error:
        save(folder / "skipped.json", json.dumps({"why": str(error)}) + "\n")
        return f"{trajectory['scene_id']}/{trajectory['traj_id']}: skipped, {error}"
    (folder / "skipped.json").unlink(missing_ok=True)  # an earlier run skipped it, since then somebody mended its picture
    return ""


# --- all trajectories ---

def plan(cfg: Config) -> tuple[list[tuple[dict, str]], Counter, int]:
    """(jobs: trajectory and its teacher's name, reasons why others are left out, number of unusable lines), before anything is written."""
    path = Path(cfg.run) / "1_trajectories/trajectories.jsonl"
    records = read_jsonl(path, "scene_id", "traj_id", "source", "anchor", "room", "split", "width", "height", "fov_x_deg", "actions", "keyframes", "c2w")
    unusable = path.read_bytes().count(b"\n") - len(records)
    teachers, jobs, left_out, seen = {name: TEACHERS[name](cfg) for name in cfg.teacher}, [], Counter(), set()
    for trajectory in records:
        name = (trajectory["scene_id"], trajectory["traj_id"])
        room = trajectory["room"]
        if not all(isinstance(part, str) and re.fullmatch(r"[^./\\\0][^/\\\0]*", part) for part in name) or name in seen:
            why = "its scene_id and traj_id are not names of a new folder"
        elif room and (not isinstance(room, str) or PurePosixPath(room).is_absolute() or ".." in PurePosixPath(room).parts):
            why = f"room {room!r} is not inside the run"
        elif not room and not isinstance(trajectory["anchor"], str):
            why = "it has neither a room nor an anchor photograph"
        elif not (isinstance(trajectory["actions"], list) and all(isinstance(a, list) and len(a) == 2 for a in trajectory["actions"])):
            why = "its actions are not [[name, value], ...]"
        else:
            seen.add(name)
            refusals = {teacher_name: teacher.refuses(trajectory) for teacher_name, teacher in teachers.items()}
            taker = next((teacher_name for teacher_name, refusal in refusals.items() if not refusal), None)
            if taker:
                jobs.append((trajectory, taker))
            else:
                left_out[refusals[cfg.teacher[-1]]] += 1
            continue
        unusable += 1
        print(f"{path}: {name[0]}/{name[1]} skipped: {why}", file=sys.stderr)
    for reason, number in left_out.items():
        print(f"left out {number} of {len(records)} trajectories: {reason}")
    if not jobs:
        stop(f"teacher {' '.join(cfg.teacher)} can take none of the {len(records)} trajectories of {path}")
    return jobs, left_out, unusable


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


def action_text(actions: list) -> str:
    """[["turn_left", 40.0]] -> "turn left 40 degrees"."""
    texts = [f"{name.replace('_', ' ')} {value:g} degrees" if name.startswith("turn") else f"move {name.removeprefix('shift_')} {value:g} meters"
             for name, value in actions]
    return "; ".join(texts)


def choose_rows(records: list[dict], count: int) -> list[dict]:
    """Trajectories for the contact sheet: the kinds of action in turn, the most frequent first, scenes mixed; a failed one, if any, last."""
    kinds = {}
    for record in sorted(records, key=lambda record: zlib.crc32(f"{record['scene_id']}/{record['traj_id']}".encode())):
        kinds.setdefault("; ".join(name for name, _ in record["actions"]), []).append(record)
    kinds = sorted(kinds.values(), key=len, reverse=True)
    chosen = [kind[turn] for turn in range(max(map(len, kinds), default=0)) for kind in kinds if turn < len(kind)]
    failed = [record for record in chosen if not record["qc"]["passed"]]
    if failed and len(chosen) > count and all(record["qc"]["passed"] for record in chosen[:count]):
        chosen[count - 1] = failed[0]
    return chosen[:count]


def contact_sheet(records: list[dict], run: Path, rows: int, tile_px: int = 200) -> Image.Image:
    """One row a trajectory: what was asked, then its kept frames from first to last, visible boxes drawn thin."""
    chosen, band_px, font = choose_rows(records, rows), 22, ImageFont.load_default(14)
    picked = [np.linspace(0, len(record["kept"]) - 1, min(len(record["kept"]), 5)).round().astype(int) for record in chosen]
    tiles = [[(round(tile_px * record["width"] / record["height"]), i) for i in frames] for record, frames in zip(chosen, picked)]
    sheet = Image.new("RGB", (max(max(sum(w + 4 for w, _ in row) for row in tiles), 760), len(chosen) * (tile_px + band_px)), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    for number, (record, row) in enumerate(zip(chosen, tiles)):
        top, left, qc = number * (tile_px + band_px), 0, record["qc"]
        off = "" if qc["turn_error_deg"] is None else f"   turn off by {qc['turn_error_deg']:+.1f}"
        draw.text((4, top + 3), f"{record['scene_id']}/{record['traj_id']}   {action_text(record['actions'])}{off}"
                  + ("" if qc["passed"] else f"   FAILED: {qc['why']}"), fill=(235, 235, 235) if qc["passed"] else (255, 80, 80), font=font)
        for width, i in row:
            with Image.open(run / record["frames"][i]) as frame:
                sheet.paste(frame.resize((width, tile_px), Image.NEAREST if frame.height < tile_px else Image.LANCZOS), (left, top + band_px))
            for thing in record["objects"][i] if record["objects"] else []:
                x1, y1, x2, y2 = (edge / BOX for edge in thing["box"])
                draw.rectangle((left + x1 * width, top + band_px + y1 * tile_px, left + x2 * width - 1, top + band_px + y2 * tile_px - 1),
                               outline=(255, 255, 255))
            if not qc["passed"]:
                draw.rectangle((left, top + band_px, left + width - 1, top + band_px + tile_px - 1), outline=(255, 60, 60), width=3)
            left += width + 4
    return sheet


def complete(folder: Path, meta: dict, jobs: list[tuple[dict, str]], left_out: Counter, unusable: int, cfg: Config, started: float):
    """Every trajectory is there: write what joins them, and the table."""
    marks = [Path(cfg.run) / folder_of(trajectory) / "view.json" for trajectory, _ in jobs]
    lines = [mark.read_bytes() for mark in marks if mark.is_file()]
    if not lines:
        stop(f"none of the {len(jobs)} trajectories could be imagined (the reasons stand above and in {folder}/*/*/skipped.json)")
    records = [json.loads(line) for line in lines]
    for record in records:
        del record["c2w"]  # most of the memory, and not needed any more
    save(folder / "contact_sheet.png", png(contact_sheet(records, Path(cfg.run), cfg.sheet_rows), 6))
    save(folder / "views.jsonl", b"".join(lines))
    failed = sum(not record["qc"]["passed"] for record in records)
    counts = {"trajectories": len(records), "frames": sum(len(record["kept"]) for record in records), "failed the quality check": failed,
              "skipped": len(jobs) - len(records) + unusable, "left out": sum(left_out.values())}
    finish(folder, meta, counts, started)

    print(f"{'teacher':12}{'trajectories':>13}{'frames':>9}{'passed':>9}{'turns measured':>16}{'mean |off| deg':>16}{'worst':>8}")
    for name in cfg.teacher:
        of_teacher = [record for record in records if record["teacher"] == name]
        off = [abs(record["qc"]["turn_error_deg"]) for record in of_teacher if record["qc"]["turn_error_deg"] is not None]
        print(f"{name:12}{len(of_teacher):13,}{sum(len(record['kept']) for record in of_teacher):9,}"
              f"{sum(record['qc']['passed'] for record in of_teacher):9,}{len(off):16,}"
              + (f"{np.mean(off):16.2f}{max(off):8.2f}" if off else f"{'-':>16}{'-':>8}"))
    reasons = Counter(re.sub(r"[-+]?[\d.]+%?", "#", reason) for record in records for reason in record["qc"]["why"].split("; ") if reason)
    for text, number in [*reasons.items(), *((key, counts[key]) for key in ("skipped", "left out") if counts[key])]:
        print(f"  {number:9,}  {text}")
    print(f"{time.time() - started:.0f} s; look at {folder / 'contact_sheet.png'}\nnext: python 03_build_qa.py --run {cfg.run}")


# --- benchmark ---

def bench_room(seed: int) -> Room:
    """A 7 x 8 m room with the six objects of an average demo room."""
    rng, objects = np.random.default_rng(seed), []
    for i in range(6):
        side, tall = rng.uniform(0.5, 1.0), rng.uniform(0.6, 1.5)
        shape = SHAPES[i % 4]
        size = [side, side if shape == "ball" else tall, side]
        objects.append({"id": i, "label": f"red {shape}", "shape": shape, "color": [215, 40, 40], "size_m": size, "yaw_deg": 40.0 * i,
                        "center_m": [2.6 * math.sin(i), -size[1] / 2, 3.1 * math.cos(i)]})
    return prepare_room({"width_m": 7.0, "depth_m": 8.0, "height_m": 2.8, "camera_height_m": 1.5, "texture_seed": seed, "objects": objects})


def bench_work(job: tuple[int, int, int]) -> int:
    side_px, frames, seed = job
    room, K = bench_room(seed), intrinsics(side_px, side_px, 90.0)
    for i in range(frames):
        pose = start_pose(room, [math.sin(i), math.cos(2 * i), 37.0 * i])
        visible_objects(room, render(room, pose, K)[1], pose)
    return frames


def benchmark(cfg: Config):
    """Frames per second with boxes, without writing files."""
    with multiprocessing.Pool(cfg.workers) as pool:
        for side_px, frames in ((112, 500), (576, 25)):
            pool.map(bench_work, [(side_px, 2, seed) for seed in range(4 * cfg.workers)], chunksize=1)  # warm
            started = time.perf_counter()
            made = sum(pool.imap_unordered(bench_work, [(side_px, frames, seed) for seed in range(6 * cfg.workers)]))
            print(f"simulator {side_px}x{side_px}: {made / (time.perf_counter() - started):8.0f} frames/s with exact boxes, {cfg.workers} processes")


def check_settings(cfg: Config) -> tuple[int, int]:
    """-> the shard (i, n)."""
    for name in cfg.teacher:
        if name not in TEACHERS:
            stop(f"--teacher {name}: choose from {', '.join(TEACHERS)}")
    if cfg.keep not in ("keyframes", "ends", "all"):
        stop(f"--keep {cfg.keep}: choose keyframes, ends or all")
    numbers = re.fullmatch(r"(\d+)/(\d+)", cfg.shard)
    if not numbers or int(numbers[1]) >= int(numbers[2]):
        stop(f"--shard {cfg.shard}: want i/n with 0 <= i < n, for example 0/4")
    if cfg.steps < 0 or cfg.guidance < 0:
        stop(f"--steps {cfg.steps}, --guidance {cfg.guidance}: want 0 (the teacher's own) or more")
    if cfg.workers < 1 or cfg.sheet_rows < 1:
        stop(f"--workers {cfg.workers}, --sheet_rows {cfg.sheet_rows}: want at least 1")
    return int(numbers[1]), int(numbers[2])


def main(cfg: Config):
    started, (shard, shards) = time.time(), check_settings(cfg)
    if cfg.benchmark:
        return benchmark(cfg)
    run = Path(cfg.run)
    folder = run / "2_views"
    jobs, left_out, unusable = plan(cfg)
    with alone(folder):
        meta = begin(folder, {key: value for key, value in asdict(cfg).items() if key not in ("run", "shard", "workers", "benchmark")},
                     run / "1_trajectories")

    share = jobs[shard::shards]
    todo = [job for job in share if not (run / folder_of(job[0]) / "view.json").is_file()]
    if len(todo) < len(share):
        print(f"{len(share) - len(todo)} of {len(share)} trajectories are there already")
    if "simulator" in cfg.teacher:
        pattern_bank()  # once, before the processes part
    workers = 1 if NETWORKS & {*cfg.teacher} else cfg.workers  # one copy of the weights; the device is busy as it is
    pool = multiprocessing.Pool(workers, start_worker, (cfg,)) if workers > 1 else None
    start_worker(cfg)
    results = pool.imap_unordered(work, todo, chunksize=8) if pool else map(work, todo)
    # delay: the bar comes with the first result, so that the line of networks that do not load stands alone
    for why in tqdm(results, total=len(todo), desc="views", unit="trajectory", delay=0.01):
        if why:
            tqdm.write(why, file=sys.stderr)
    if pool:
        pool.close()
        pool.join()

    with alone(folder):  # the shard that ends last finds all the marks; should two end together, the second finds the folder finished
        missing = sum(not any((run / folder_of(job[0]) / mark).is_file() for mark in ("view.json", "skipped.json")) for job in jobs)
        if missing:
            print(f"shard {cfg.shard} is done; {missing} trajectories of other shards are missing, the last shard to end completes the folder")
        elif json.loads((folder / "meta.json").read_text())["finished"]:
            print(f"{folder} was completed by another shard")
        else:
            complete(folder, meta, jobs, left_out, unusable, cfg, started)


if __name__ == "__main__":
    main(parse(Config))
