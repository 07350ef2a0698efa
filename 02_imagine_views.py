"""Stage 2: imagine what each trajectory shows. A teacher gets one picture (or a room) and camera poses and returns the views from there.

Two teachers need no weights. `simulator` casts a ray through every pixel of a procedural room and knows exactly which object each pixel
shows. `warp` moves the pixels of a photograph: pixel p of the new view, at depth z, shows what the photograph has at

    p0 ~ K (R K^-1 p z + t),   [R | t] = c2w of the new view, frame 0 being the identity

A turn has t = 0, so z cancels and K R K^-1 is exact (a homography). A move needs the photograph's depth map, which is splatted into the
new view, nearest surface first, to give z. What the photograph does not show stays grey and is counted as a hole, never invented.

`svc` is Stable Virtual Camera, the paper's world model: a U-Net that sees the latents of all N views at once, each with its camera's rays, and
takes noise out of them, the photograph's view being known. One step from noise level sigma to the next, D being the network's clean estimate:

    x <- x + (sigma_next - sigma) (x - D) / sigma,   D = D_without + s (D_with - D_without)   (with and without the photograph; s per view)

Where we depart from its published use: one call a trajectory, with the photograph in it, instead of two passes of three calls whose second never
sees it; a metre is as long in every call; only the kept views are decoded; cross-attention to the one context token is the linear map that it is.

`sana-wm` is a video diffusion model that follows camera poses, run by diffusers (SanaWMPipeline: 2.7 B parameters, Apache-2.0). It walks
the path in smaller steps, of which the frames asked for are kept, and sees the middle of the picture, in the shape of --sana_size.

Where we depart from the paper: its teachers are trusted, ours are measured. Every trajectory gets a `qc` record, and what fails stays on disk,
marked, for stage 3 to leave out:
    turn_error_deg     of the worst turn between key frames: yaw at which the earlier frame matches the later one, minus the yaw asked for,
                       + to the right; null where none can be measured (moves only, less than a quarter of the view in common, holes)
    over_turn_deg      the same error counted along the turn: + turned too far, - not far enough, whichever way
    match              correlation at that yaw, -1..1 (null likewise)
    heading_drift_deg  of the worst straight move, forward or backward: yaw by which it turned the camera; null where it cannot be told
    sharpness          least steepness of the edges of a frame, over that of frame 0
    flicker            grey levels by which most of a frame stands off the frames before and after it; null unless three in a row are kept
    motion             least mean absolute difference between one key frame and the next, grey levels
    holes              largest share of a frame that the picture does not show
What the meter says of exact views (21,000 trajectories of rooms, 84 px, 90 degrees): a turn is read to one column of a cylinder, fov / 96 =
0.94 degrees, refined by a parabola: off by 0.1 in the mean and never by more than 0.8. A heading is read off by 0.1 in the median and by
less than 1.2 in 99 of 100 moves; every fifth move gives none. A sideways move shifts the picture like a turn (of 20 degrees in the median)
and cannot be told from one without depth: its heading is not measured.

Reads   RUN/1_trajectories/trajectories.jsonl and rooms/*.json (see 01), the photographs, and for moves of `warp` <photo stem>.depth.npy or,
        with --depth, a depth-estimation checkpoint (metres, or inverse depth, which the floor under a level camera brings to scale)
Writes  RUN/2_views/<scene>/<trajectory>/NNN.png (NNN: frame index), transforms.json (nerfstudio: OpenGL camera axes), view.json (the record below,
        written last: the mark of a whole trajectory; skipped.json instead where the picture or room cannot be read)
        RUN/2_views/views.jsonl, all records in the order of the trajectories: the trajectory's own keys (see 01) and
            {..., "teacher": "simulator", "teacher_settings": {}, "seed": 0, "kept": [0, 8], "frames": ["2_views/room_00000/t000/000.png", ...],
             "objects": [[{"id": 3, "label": "red ball", "box": [412, 300, 530, 611], "visible_px": 310, "distance_m": 2.41}], []],
             "qc": {"turn_error_deg": 0.1, "over_turn_deg": -0.1, "match": 0.98, "heading_drift_deg": null, "sharpness": 0.97,
                    "flicker": null, "motion": 31.2, "holes": 0.0, "passed": true, "why": ""}}
        (objects: per kept frame, the visible ones, boxes in thousandths of the picture; null for `warp`)
        RUN/2_views/qc.json: per teacher, mean and percentiles of each measure, how many it rejects; qc.png: the same drawn, with the limits
        RUN/2_views/contact_sheet.png, meta.json
        with --calibrate only RUN/2_calibration/calibration.json {"<teacher>": {"gain": 0.83, "spread": 0.02, "n": 58}} (really moved =
        gain * asked; spread: median distance of a move's own gain from it), calibration.png, <teacher>/moves.jsonl and a file per move

    python 02_imagine_views.py --run runs/demo
    python 02_imagine_views.py --run runs/mine --teacher warp                # turns; moves too where there are depth maps or
    python 02_imagine_views.py --run runs/mine --teacher warp --depth depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf
    python 02_imagine_views.py --run runs/both --teacher simulator warp      # rooms by the first, photographs by the second
    python 02_imagine_views.py --run runs/mine --teacher svc                 # Stable Virtual Camera, weights by hub id or --svc FOLDER
    python 02_imagine_views.py --run runs/mine --teacher sana-wm --vae_tiling     # 12 GB of weights
    python 02_imagine_views.py --run runs/demo --teacher warp --calibrate    # its calibration.json then serves any run: --calibration FILE
    python 02_imagine_views.py --run runs/big --shard 0/4                    # and 1/4, 2/4, 3/4 elsewhere on the same disk
    python 02_imagine_views.py --benchmark

Measured on two CPU cores by --benchmark: 2124 frames/s at 112x112 and 253 at 576x576, with exact boxes, without files.
"""
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
import resource
import socket
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import snapshot_download
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm
from transformers import HfArgumentParser

from kernels import plucker_rays, temporal_attention
from kernels.temporal import MAX_FRAMES

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
    teacher: list[str] = setting(["simulator"], "simulator (rooms, exact), warp (moves the pixels of photographs), svc (Stable Virtual Camera), sana-wm "
                                 "(SANA-WM); all but the simulator start from a photograph or a room's frame 0. A trajectory goes to the first one named "
                                 "that can take it")
    keep: str = setting("keyframes", "frames kept of a trajectory: keyframes (frame 0 and the one after each action), ends (first and last) or all")
    depth_dir: str = setting("", "folder of <photo stem>.depth.npy files, float metres along the viewing axis, for warp; empty: beside each photograph")
    depth: str = setting("", "depth-estimation checkpoint (folder or hub id) with which warp moves photographs that have no depth file; "
                             "empty: they only turn")
    depth_kind: str = setting("auto", "what that checkpoint returns: metric (depth in metres), relative (inverse depth up to scale and "
                                      "shift) or auto: as its configuration says")
    camera_height_m: float = setting(1.5, "height above the floor from which photographs were taken, metres, camera level: it gives a "
                                          "relative depth its scale")
    device: str = setting("auto", "where a teacher's networks run: auto (cuda where there is one, else cpu), cpu, cuda, cuda:1; bfloat16 on cuda, "
                          "float32 on a CPU")
    steps: int = setting(0, "denoising steps of a generative teacher; 0: its own number (svc 50, with --fast 20; sana-wm 60)")
    guidance: float = setting(0.0, "classifier-free guidance of a generative teacher, a factor; 0: its own (svc 4, as published; sana-wm 5)")
    fast: bool = setting(False, "svc: a second-order solver, and the kept frames only; prints the PSNR to the full run of the first trajectory")
    compile: bool = setting(False, "svc: torch.compile the network; pays after a few trajectories")
    offload: bool = setting(False, "networks wait in main memory, one at a time is on the GPU: less memory there, slower; a CPU ignores it")
    vae_tiling: bool = setting(False, "the VAE works on overlapping tiles: less memory at its peak. SANA-WM's training did so")
    svc: str = setting("stabilityai/stable-virtual-camera", "Stable Virtual Camera: hub id, folder or file of safetensors")
    svc_vae: str = setting("stabilityai/stable-diffusion-2-1-base", "its picture autoencoder: hub id or folder of an AutoencoderKL, at its top or in vae/")
    svc_clip: str = setting("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "its picture encoder: hub id or folder of a CLIPVisionModelWithProjection")
    svc_px: list[int] = setting([576, 576], "width and height of its frames, multiples of 64; pictures are resized to cover them and cropped at the centre")
    svc_window: int = setting(MAX_FRAMES, "most frames in one call; longer trajectories take several, each with the picture first")
    svc_guider: str = setting("multiview", "vanilla, multiview or multiview_temporal: where guidance is weakened (see guidance_scale)")
    svc_units_per_m: float = setting(1.0, "length of a metre in the network's coordinates, the same in every trajectory")
    svc_passes: int = setting(1, "1: one call a trajectory. 2: as published, for comparison: a second pass imagines every frame again beside the first "
                              "one's, without the picture, at a scale that changes from call to call")
    seed: int = setting(0, "seed of teachers that draw random numbers; simulator and warp draw none, it only goes on record")
    sana: str = setting("Efficient-Large-Model/SANA-WM_bidirectional-diffusers", "sana-wm: hub id or folder of a SanaWMPipeline")
    sana_refiner: str = setting("", "sana-wm: hub id or folder of a SanaWMLTX2Refiner, three more steps that sharpen (the published one, "
                                "Efficient-Large-Model/SANA-WM_bidirectional-diffusers-refiner, takes 35 GB more memory); empty: none")
    sana_size: list[int] = setting([704, 1280], "sana-wm: height and width of its frames, pixels, multiples of 32 from 64 up; it was "
                                   "trained at 704 1280")
    sana_prompt: str = setting("A quiet indoor place in even light, seen by a slowly moving camera. Nothing and nobody in it moves.",
                               "sana-wm: what its text encoder reads, the same for all trajectories")
    max_turn_error_deg: float = setting(4.0, "quality check, degrees: half of the smallest turn less one column of the measure, so that a "
                                             "passed turn is nearest to its own label")
    min_match: float = setting(0.4, "quality check, correlation 0..1: at its best yaw the anchor must resemble the turned frame at least so much")
    max_heading_drift_deg: float = setting(3.0, "quality check, degrees: turn of a straight move; 99 of 100 exact ones measure below 1.2")
    min_sharpness: float = setting(0.25, "quality check, ratio: steepness of the edges over frame 0's; a 5x5 box blur leaves 0.05 to 0.22, "
                                         "exact views of rooms 0.28 or more")
    max_flicker: float = setting(3.0, "quality check, grey levels 0..255: how far most of a frame stands off its neighbours; exact 1.3")
    min_motion: float = setting(1.0, "quality check, grey levels 0..255: mean change by an action; below it the view is frozen")
    max_holes: float = setting(0.6, "quality check, share 0..1 of a frame that no picture shows; at 54 degrees a turn by 30 leaves about 0.57")
    calibrate: bool = setting(False, "only measure how far the teacher really moves for a distance asked, in rooms: RUN/2_calibration")
    calibration_moves: int = setting(60, "single moves of rooms that --calibrate tries, spread over the run")
    calibration: str = setting("", "calibration.json that --calibrate wrote: the teacher is asked in its own metres; empty: in ours")
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


def came_from(c2w: np.ndarray, K: np.ndarray, z: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The equation of the docstring: for each pixel of the view from c2w at depth z [H,W], its place u, v in frame 0; holes bool [H,W]: none."""
    x, y = rays_of(K)
    known = np.isfinite(z)
    z = np.where(known, z, 1)
    X, Y, Z = (z * (c2w[i, 0] * x + c2w[i, 1] * y + c2w[i, 2]) + c2w[i, 3] for i in range(3))  # [H,W] each, in the axes of frame 0
    with np.errstate(divide="ignore", invalid="ignore"):
        u, v = K[0, 0] * X / Z + K[0, 2], K[1, 1] * Y / Z + K[1, 2]
    holes = ~(known & (Z > 0) & (u >= 0) & (u <= 2 * K[0, 2]) & (v >= 0) & (v <= 2 * K[1, 2]))
    return np.where(holes, 0, u), np.where(holes, 0, v), holes


def look_back(picture: np.ndarray, c2w: np.ndarray, K: np.ndarray, z: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Picture uint8 [H,W,3] as seen from c2w at depth z [H,W] -> view uint8 [H,W,3], holes bool [H,W]."""
    u, v, holes = came_from(c2w, K, z)
    view = sample(picture.astype(np.float32), u, v) + 0.5
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
    pixel, near, z = (row[inside] * width + column[inside]).astype(np.int64), points[inside, 2], np.full(height * width, np.inf)
    np.minimum.at(z, pixel, near)
    front = near < 1.05 * z[pixel]  # the points of the nearest surface: their mean is its depth at the pixel's centre, the least is not
    pixel, near = pixel[front], near[front]
    z[pixel] = (np.bincount(pixel, near, height * width) / np.bincount(pixel, minlength=height * width).clip(1))[pixel]
    return z.reshape(height, width)


# --- svc: the network of Stable Virtual Camera (arXiv 2503.14489; module names are those of the published weights) ---
# B scenes of T frames each, b t -> one batch axis; C channels, D context width, h w latent size, s = h * w.

@dataclass
class SevaConfig:
    """The network's shape; the defaults are the released model's."""
    in_channels: int = 11  # 4 latent, 1 "is this frame given?", 6 Plücker
    model_channels: int = 320
    out_channels: int = 4
    num_frames: int = 21
    num_res_blocks: int = 2
    attention_resolutions: list[int] = field(default_factory=lambda: [4, 2, 1])
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_head_channels: int = 64
    transformer_depth: list[int] = field(default_factory=lambda: [1, 1, 1, 1])
    context_dim: int = 1024
    dense_in_channels: int = 6
    dropout: float = 0.0
    unflatten_names: list[str] = field(default_factory=lambda: ["middle_ds8", "output_ds4", "output_ds2"])  # attend across frames there


def timestep_embedding(t: torch.Tensor, width: int) -> torch.Tensor:
    """t [N] -> float32 [N, width]: cosines, then sines, of geometrically spaced frequencies."""
    frequency = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class ResBlock(nn.Module):
    """Two convolutions with a skip; between norm and convolution the camera map scales and shifts every pixel of the first."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, dense_channels: int, dropout: float):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.dense_emb_layers = nn.Sequential(nn.Conv2d(dense_channels, 2 * channels, 1))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out_channels), nn.SiLU(), nn.Dropout(dropout),
                                        nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        norm, silu, conv = self.in_layers
        if dense.shape[-2:] != x.shape[-2:]:
            dense = F.interpolate(dense, x.shape[-2:], mode="bilinear", align_corners=True)
        scale, shift = self.dense_emb_layers(dense).chunk(2, 1)
        h = conv(silu(norm(x)) * (1 + scale) + shift) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """The weights of an attention; who meets whom is up to the block."""

    def __init__(self, width: int, context_width: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def within(self, x: torch.Tensor) -> torch.Tensor:
        """x [n,s,C]: every token attends to all tokens of its row."""
        q, k, v = (rearrange(to(x), "n s (h d) -> n h s d", d=self.head_width) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "n h s d -> n s (h d)"))

    def through_time(self, x: torch.Tensor, num_frames: int) -> torch.Tensor:
        """x [b t,s,C]: every pixel attends to itself in all frames of its scene."""
        return self.to_out(temporal_attention(self.to_q(x), self.to_k(x), self.to_v(x), num_frames, head_width=self.head_width))

    def to_one(self, context: torch.Tensor) -> torch.Tensor:
        """context [n,1,D]: a softmax over one token is 1, whatever asks. So to_q and to_k have no say, and this is a linear map."""
        return self.to_out(self.to_v(context))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class SpaceBlock(nn.Module):
    """x [n,s,C], context [n,1,D]: attention within each row, the context, a feed-forward net."""

    def __init__(self, width: int, context_width: int, head_width: int):
        super().__init__()
        self.attn1 = Attention(width, width, head_width)
        self.attn2 = Attention(width, context_width, head_width)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))  # norm2 served attn2's queries: see to_one

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1.within(self.norm1(x))
        x = x + self.attn2.to_one(context)
        return x + self.ff(self.norm3(x))


class TimeBlock(SpaceBlock):
    """x [b t,s,C]: attention through time, with a feed-forward net before it; the last one has no residual, what surrounds the block adds x."""

    def __init__(self, width: int, context_width: int, head_width: int):
        super().__init__(width, context_width, head_width)
        self.norm_in, self.ff_in = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: torch.Tensor, context: torch.Tensor, num_frames: int) -> torch.Tensor:
        x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1.through_time(self.norm1(x), num_frames)
        x = x + self.attn2.to_one(context)
        return self.ff(self.norm3(x))


class MultiviewTransformer(nn.Module):
    """Blocks that look around a frame (or, `across` frames, around the whole scene), each followed by one that looks through time."""

    def __init__(self, width: int, depth: int, cfg: SevaConfig, across: bool):
        super().__init__()
        self.across = across
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(SpaceBlock(width, cfg.context_dim, cfg.num_head_channels) for _ in range(depth))
        self.time_mix_blocks = nn.ModuleList(TimeBlock(width, cfg.context_dim, cfg.num_head_channels) for _ in range(depth))

    def forward(self, x: torch.Tensor, context: torch.Tensor, num_frames: int) -> torch.Tensor:
        """x [b t,C,h,w], context [b t,1,D]. Blocks that see several frames take the context of the scene's first."""
        skip, T, h = x, num_frames, x.shape[-2]
        x = self.proj_in(rearrange(self.norm(x), "n c h w -> n (h w) c"))
        first = context[::T]  # b 1 D
        for space, time_mix in zip(self.transformer_blocks, self.time_mix_blocks):
            if self.across:
                x = rearrange(space(rearrange(x, "(b t) s c -> b (t s) c", t=T), first), "b (t s) c -> (b t) s c", t=T)
            else:
                x = space(x, context)
            x = x + time_mix(x, first.repeat_interleave(T, 0), T)
        return skip + rearrange(self.proj_out(x), "n (h w) c -> n c h w", h=h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Sequential):
    """Layers of one resolution, each given what its kind needs."""

    def forward(self, x, emb, context, dense, num_frames):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb, dense)
            else:
                x = layer(x, context, num_frames) if isinstance(layer, MultiviewTransformer) else layer(x)
        return x


class Seva(nn.Module):
    """The U-Net: noisy latents, time step, pictures' context and camera map -> its estimate of the noise."""

    def __init__(self, cfg: SevaConfig):
        super().__init__()
        self.cfg = cfg
        width, last = cfg.model_channels, len(cfg.channel_mult) - 1
        emb_width = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width))

        def res(channels: int, out_channels: int) -> ResBlock:
            return ResBlock(channels, out_channels, emb_width, cfg.dense_in_channels, cfg.dropout)

        def transformer(channels: int, level: int, side: str) -> list[nn.Module]:
            factor = 2 ** level
            if factor not in cfg.attention_resolutions and side != "middle":
                return []
            return [MultiviewTransformer(channels, cfg.transformer_depth[level], cfg, f"{side}_ds{factor}" in cfg.unflatten_names)]

        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(cfg.in_channels, width, 3, padding=1))])
        channels, skips = width, [width]
        for level, factor in enumerate(cfg.channel_mult):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(Stage(res(channels, factor * width), *transformer(factor * width, level, "input")))
                channels = factor * width
                skips.append(channels)
            if level < last:
                self.input_blocks.append(Stage(Downsample(channels)))
                skips.append(channels)
        self.middle_block = Stage(res(channels, channels), *transformer(channels, last, "middle"), res(channels, channels))
        self.output_blocks = nn.ModuleList()
        for level, factor in reversed([*enumerate(cfg.channel_mult)]):
            for i in range(cfg.num_res_blocks + 1):
                layers = [res(channels + skips.pop(), factor * width), *transformer(factor * width, level, "output")]
                channels = factor * width
                self.output_blocks.append(Stage(*layers, *([Upsample(channels)] if level and i == cfg.num_res_blocks else [])))
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, cfg.out_channels, 3, padding=1))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, dense_y: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
        """x [b t,11,h,w], t [b t] time steps 0..999, y [b t,1,D], dense_y [b t,6,h,w] -> [b t,4,h,w]. h and w are multiples of 8."""
        if y.shape[1] != 1:
            raise ValueError(f"the context has one token, got y {tuple(y.shape)}")
        T = num_frames or self.cfg.num_frames
        emb = self.time_embed(timestep_embedding(t, self.cfg.model_channels).to(x.dtype))
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, y, dense_y, T)
            skips.append(x)
        x = self.middle_block(x, emb, y, dense_y, T)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), emb, y, dense_y, T)
        return self.out(x)


# --- svc: noise schedule, guidance, sampler ---
# A picture z is noised to z + sigma * noise. The network knows 1000 levels of sigma.

@lru_cache(maxsize=1)
def svc_levels() -> torch.Tensor:
    """float64 [1000], rising: the noise level of every time step, e^2.4 times that of the image model it grew from (more noise for more frames)."""
    beta = torch.linspace(5e-6 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - beta).cumprod(0)
    return ((1 - kept) / kept).sqrt() * math.exp(2.4)


def svc_sigmas(num_steps: int) -> torch.Tensor:
    """float32 [num_steps + 1]: falling noise levels, a final 0."""
    index = torch.from_numpy(np.linspace(999, 0, num_steps, endpoint=False).astype(np.int64))
    return torch.cat([svc_levels()[index].float(), torch.zeros(1)])


def dense_sigmas(num_steps: int) -> torch.Tensor:
    """The same for few steps, which must be small where the picture forms: even in sigma^(1/7) (Karras et al. 2022, eq. 5), on the network's levels."""
    levels = svc_levels()
    want = torch.linspace(float(levels[-1]) ** (1 / 7), float(levels[0]) ** (1 / 7), num_steps, dtype=torch.float64) ** 7
    index = (want[:, None] - levels).abs().argmin(1).unique().flip(0)  # unique: of very many steps some would fall on one level
    return torch.cat([levels[index].float(), torch.zeros(1)])


def svc_denoise(network, x: torch.Tensor, sigma: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
    """The clean picture behind x [n,4,h,w] at noise sigma [n], as the network sees it: x - sigma net(x / sqrt(sigma^2 + 1), ...).

    cond: replace [n,5,h,w] (known latents and their mask), concat [n,7,h,w], dense_vector [n,6,h,w], crossattn [n,1,D].
    """
    step = (sigma[:, None] - svc_levels().to(sigma)).abs().argmin(1)  # [n]
    sigma = svc_levels().to(sigma)[step].view(-1, 1, 1, 1)
    known, mask = cond["replace"].split((4, 1), 1)
    x = x * (1 - mask) + known * mask
    x_in = torch.cat([x / (sigma ** 2 + 1).sqrt(), cond["concat"]], 1)
    return x - sigma * network(x_in, step, cond["crossattn"], cond["dense_vector"])


def svc_condition(latents: torch.Tensor, mask: torch.Tensor, plucker: torch.Tensor, clip_mean: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the network is told, without the pictures and with them, one after the other along the batch (see `svc_denoise`).

    latents [n_in,4,h,w] of the given frames in order, mask bool [T] (which frames they are), plucker [T,6,h,w], clip_mean [D].
    Without the pictures the cameras remain: guidance strengthens what the pictures say, not where the camera stands.
    """
    T, (h, w) = len(mask), latents.shape[-2:]
    replace, plane = latents.new_zeros(T, 5, h, w), mask.to(latents)[:, None, None, None].expand(T, 1, h, w)
    replace[mask] = F.pad(latents, (0, 0, 0, 0, 0, 1), value=1.0)
    context = clip_mean.expand(T, 1, -1)
    return {"replace": torch.cat([torch.zeros_like(replace), replace]), "dense_vector": torch.cat([plucker, plucker]),
            "concat": torch.cat([F.pad(plucker, (0, 0, 0, 0, 1, 0)), torch.cat([plane, plucker], 1)]),
            "crossattn": torch.cat([torch.zeros_like(context), context])}


def guidance_scale(guider: str, c2w: torch.Tensor, K: torch.Tensor, mask: torch.Tensor, cfg: float, cfg_min: float = 1.2) -> torch.Tensor:
    """How strongly each frame follows the pictures, [T]: `cfg`, less where a picture is near.

    vanilla: cfg everywhere. multiview: cfg_min where the camera looks as one of a picture does. multiview_temporal: also rising with the number of
    frames to the nearest picture. c2w [T,4,4], K [T,3,3], mask bool [T] (which frames are pictures).
    """
    T = len(mask)
    scale = torch.full((T,), cfg, device=c2w.device)
    if guider == "vanilla":
        return scale
    if guider == "multiview_temporal":
        number = torch.arange(T, device=c2w.device)
        away = (number[:, None] - number[mask]).abs().amin(1)
        scale = cfg_min + away / max(1, int(away.max())) * (cfg - cfg_min)
    R, centre = c2w[:, :3, :3], c2w[:, :3, 3]
    cosine = (torch.einsum("fij,gij->fg", R, R[mask]) - 1) / 2
    turned_deg = cosine.clamp(-1, 1).arccos().rad2deg().amin(1)
    moved = (centre[:, None] - centre[mask]).norm(dim=-1).amin(1)
    zoomed = (K[:, None] != K[mask]).flatten(2).any(-1).all(1)
    return torch.where((turned_deg < 10) & (moved < 1e-5) & ~zoomed, cfg_min, scale)


def svc_sample(network, noise: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor, plucker: torch.Tensor, clip_mean: torch.Tensor,
               scale: torch.Tensor, num_steps: int = 50, eps=None, second_order: bool = False, progress=lambda steps: steps) -> torch.Tensor:
    """Latents [T,4,h,w] of all frames, float32, from noise [T,4,h,w] of variance 1; network(x, t, y, dense_y) as `Seva`.

    Each step asks the network twice in one batch, without and with the pictures, and goes beyond the second by `scale` [T]; then one Euler step
    of dx/dsigma = (x - denoised) / sigma. eps: num_steps noises [T,4,h,w]; the published sampler adds 1e-6 to sigma before each step, and in
    float32 that is a little noise; none given: none added. `second_order` extrapolates from the last two estimates instead, at other levels
    (DPM-Solver++ 2M, arXiv 2211.01095): fewer steps, another result. The other arguments as in `svc_condition`.
    """
    sigmas = (dense_sigmas if second_order else svc_sigmas)(num_steps).to(noise.device)
    cond = svc_condition(latents, mask, plucker, clip_mean)
    scale, before = scale.to(noise).view(-1, 1, 1, 1), None
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    for i in progress(range(len(sigmas) - 1)):
        sigma, sigma_next = sigmas[i] + (0 if second_order else 1e-6), sigmas[i + 1]
        if eps is not None and not second_order:
            x = x + eps[i].to(x) * (sigma ** 2 - sigmas[i] ** 2).clamp(min=0).sqrt()
        without, given = svc_denoise(network, torch.cat([x, x]), sigma.expand(2 * len(x)), cond).chunk(2)
        denoised = without + scale * (given - without)
        if not second_order:
            x = x + (sigma_next - sigma) * (x - denoised) / sigma
            continue
        ahead = denoised
        if before is not None and sigma_next > 0:  # at the middle of the step, in log sigma
            ahead = denoised + (denoised - before) * (sigma / sigma_next).log() / (2 * (sigmas[i - 1] / sigma).log())
        x, before = sigma_next / sigma * x + (1 - sigma_next / sigma) * ahead, denoised
    return x


# --- svc: pictures, cameras and frames of one call ---

def fit_size(wh: tuple[int, int], WH: tuple[int, int]) -> tuple[int, int, int, int]:
    """(width, height, left, top): to which size the published code resizes a w x h picture so that it covers W x H, and where it crops that."""
    (w, h), (W, H) = wh, WH
    if W >= H:
        factor = min(WH) / min(wh) if w / h >= W / H else max(WH) / (min(wh) if w < h else max(wh))
    else:
        factor = min(WH) / min(wh) if w / h <= W / H else max(WH) / (min(wh) if w > h else max(wh))
    width, height = math.ceil(factor * w), math.ceil(factor * h)
    left, top = (min(max(int(0.5 * size) - want // 2, 0), size - want) for size, want in ((width, W), (height, H)))
    return width, height, left, top


def fit_picture(picture: np.ndarray, WH: tuple[int, int]) -> torch.Tensor:
    """uint8 [h,w,3] -> float32 [3,H,W] in -1..1, resized and cropped at the centre."""
    width, height, left, top = fit_size(picture.shape[1::-1], WH)
    resized = F.interpolate(torch.tensor(picture).permute(2, 0, 1)[None] / 255.0 * 2 - 1, (height, width), mode="area")
    return resized[0, :, top:top + WH[1], left:left + WH[0]]


def fit_intrinsics(K: torch.Tensor, wh: tuple[int, int], WH: tuple[int, int]) -> torch.Tensor:
    """K [...,3,3] in pixels of a w x h picture -> in pixels of the fitted one."""
    width, height, left, top = fit_size(wh, WH)
    K = K * torch.tensor([width / wh[0], height / wh[1], 1])[:, None]
    K[..., 0, 2] -= left
    K[..., 1, 2] -= top
    return K


def normalised(K: torch.Tensor, WH: tuple[int, int]) -> torch.Tensor:
    return K / torch.tensor([WH[0], WH[1], 1])[:, None]


def scene_scaled(c2w: torch.Tensor, frames: list[int], camera_scale: float) -> torch.Tensor:
    """The published normalisation of one call's poses c2w[frames], [T,4,4]: centres about the mean of the whole trajectory's c2w [N,4,4], the first
    at distance `camera_scale` from it (far outliers do not count towards the mean). The unit of length so depends on which frame comes first."""
    centre = c2w[:, :3, 3]
    away = (centre - centre.median(0).values).norm(dim=-1)
    mean = centre[away <= min(10 * float(away.quantile(0.97)), 1e6)].mean(0)
    scaled = c2w[frames].clone()
    scaled[:, :3, 3] -= mean
    first = scaled[0, :3, 3].norm()
    scaled[:, :3, 3] *= camera_scale if first < 1e-5 else camera_scale / first
    return scaled


def clip_pixels(picture: torch.Tensor) -> torch.Tensor:
    """[3,H,W] in -1..1 -> [3,224,224] as CLIP has it: blurred where it shrinks, bicubic between the corners (align_corners), its mean and deviation."""
    height, width = picture.shape[-2:]
    shrink = height / 224, width / 224
    x = picture[None]
    if max(shrink) > 1:
        for axis, factor in ((-2, shrink[0]), (-1, shrink[1])):
            sigma = max((factor - 1) / 2, 0.001)
            taps = int(max(4 * sigma, 3)) // 2 * 2 + 1  # odd
            kernel = torch.exp(-(torch.arange(taps, device=x.device) - taps // 2) ** 2 / (2 * sigma ** 2)).to(x)
            pad = (0, 0, taps // 2, taps // 2) if axis == -2 else (taps // 2, taps // 2, 0, 0)
            kernel = (kernel / kernel.sum()).view(1, 1, -1, 1) if axis == -2 else (kernel / kernel.sum()).view(1, 1, 1, -1)
            x = F.conv2d(F.pad(x.transpose(0, 1), pad, mode="reflect"), kernel).transpose(0, 1)
    x = (F.interpolate(x, (224, 224), mode="bicubic", align_corners=True)[0] + 1) / 2
    mean, deviation = x.new_tensor([0.48145466, 0.4578275, 0.40821073]), x.new_tensor([0.26862954, 0.26130258, 0.27577711])
    return (x - mean[:, None, None]) / deviation[:, None, None]


# Frames of a call: "!i" is a given picture (picture i), ">j" one to imagine (target j), "NULL" fills the call up. The published code pads with copies
# of the last frame of whichever kind has the last real slot.

def slot(kind: str, number: int) -> str:
    return f"{kind}{number:03d}"


def padded(call: list[str], window: int) -> list[str]:
    return call + ["NULL"] * (window - len(call))


def single_pass(inputs: int, targets: int, window: int) -> list[list[str]]:
    """Calls of `window` slots that all start with the given pictures."""
    step = window - inputs
    return [padded([slot("!", i) for i in range(inputs)] + [slot(">", j) for j in range(at, min(at + step, targets))], window)
            for at in range(0, targets, step)]


def anchor_positions(inputs: int, targets: int, window: int, strategy: str) -> np.ndarray:
    """Where among the targets (counted from 1) the first of two passes imagines anchors for the second."""
    room = window - 2 - (inputs if "gt" in strategy else 0)
    return np.linspace(1, targets, max(math.ceil(targets / room) + 1, window - inputs))


def second_pass(inputs: int, anchors: np.ndarray, targets: int, window: int, strategy: str) -> list[list[str]]:
    """Calls that fill in the targets between anchors ("!" from number `inputs` on); "gt" in the strategy repeats the given pictures in each."""
    head = [slot("!", i) for i in range(inputs)] if "gt" in strategy else []
    bounds = [0.0, *anchors[:-1], anchors[-1] + 0.01, math.inf]
    inside = [[slot(">", j - 1) for j in range(1, targets + 1) if low <= j < high] for low, high in zip(bounds, bounds[1:])]
    if max(map(len, inside)) > window - 2:
        raise ValueError(f"{max(map(len, inside))} targets between two anchors do not fit into a call of {window}")
    name = [slot("!", inputs + i) for i in range(len(anchors))]
    call, calls = head + inside[0] + name[:1], []
    for k, between in enumerate(inside[1:]):  # from anchor k to anchor k + 1
        following = name[k + 1:k + 2]
        if not between:
            continue
        if len(call) + len(between) + len(following) > window:
            calls.append(padded(call, window))
            call = head + name[k:k + 1]
        call = call + between + following
    return calls + ([padded(call, window)] if len(call) > 1 else [])


def svc_scene(seen: list[tuple[torch.Tensor, torch.Tensor]], c2w: torch.Tensor, K: torch.Tensor, passes: list[list[list[str]]],
              anchors: list[int], scaled, sample, look) -> dict[int, torch.Tensor]:
    """All calls of one trajectory -> frame index: its latents [4,h,w]; the given pictures come first among the frames.

    seen: (latents [4,h,w], CLIP vector [D]) of each given picture. c2w [N,4,4], K [N,3,3] normalised. passes: the calls of one pass, or of two;
    anchors: frames that the first of two imagines for the second. scaled(frames) -> their poses [T,4,4] as the network is told them;
    sample(number of the pass, frames, latents, mask, plucker, clip_mean, poses, K) -> latents [T,4,h,w]; look(latents) -> the pair that `seen` holds.
    """
    h, w = seen[0][0].shape[-2:]
    known = {slot("!", i): (pair, i) for i, pair in enumerate(seen)}
    for number, calls in enumerate(passes):
        final = number == len(passes) - 1
        target = {slot(">", j): frame for j, frame in enumerate(range(len(seen), len(c2w)) if final else anchors)}
        imagined = {}
        for call in calls:
            real = [name for name in call if name != "NULL"]
            names = real + real[-1:] * (len(call) - len(real))
            frames = [known[name][1] if name in known else target[name] for name in names]
            mask = torch.tensor([name in known for name in names], device=c2w.device)
            latents, vectors = (torch.stack(part) for part in zip(*(known[name][0] for name in names if name in known)))
            poses = scaled(frames)
            plucker = plucker_rays(torch.linalg.inv(poses) @ poses[0], K[frames], h, w)
            z = sample(number, frames, latents, mask, plucker, vectors.mean(0), poses, K[frames])
            imagined |= {target[name]: z[i] for i, name in enumerate(real) if name in target}
        if not final:
            known |= {slot("!", len(seen) + i): (look(imagined[frame]), frame) for i, frame in enumerate(anchors)}
    return imagined


# --- teachers ---
# refuses(trajectory) -> why this teacher cannot take it at all and what would help; empty: it can.
# anchor(trajectory) -> what it starts from, read from disk.
# imagine(anchor, c2w [N,4,4], K, kept) -> frames uint8 [n,H,W,3], those of the indices `kept` (all N unless given). It leaves behind what stage 2
# records of them: `objects` (visible ones per frame, or None), `holes` (bool [n,H,W], or None), `K` (of the frames), `settings`.

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
        picture = read_picture(path)
    except ValueError as error:
        raise Unusable(error) from None
    return np.asarray(picture.resize((width, height), Image.LANCZOS) if width else picture)


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
        if not (isinstance(start, list) and len(start) == 3 and all(isinstance(value, (int, float)) and abs(value) < 1e6 for value in start)):
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


# --- networks from files ---

def network_place(cfg: Config) -> tuple[torch.device, torch.dtype]:
    """Where a teacher's networks run, and in what precision."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # a name torch does not know; a build without CUDA
        stop(f"--device {name}: {str(error).splitlines()[0]}")
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32


def random_numbers(*key) -> torch.Generator:
    """A generator on the CPU that depends on the key alone: the same on every machine, in every process and order."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1)


def fetched(source: str, wanted: list[str]) -> Path:
    """The folder of a hub id, its files that match `wanted` downloaded; a folder as it is."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        stop(f"{source} is neither a folder nor a hub id (owner/name)")
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        stop(f"{source} is no folder here, and the hub does not give it: {str(error).strip().splitlines()[0]}")


def load_part(place: Path, kind: type, dtype: torch.dtype | None = torch.float32):
    """An object of class `kind` from a folder of diffusers' or transformers' layout; a network, unless dtype is None, is ready to use.

    The caller names the class, weights come from safetensors, and code in the folder is never run. A part that does not load whole ends the
    run with one line that names its file.
    """
    options = {"trust_remote_code": False} if kind.__module__.startswith("transformers.models.auto") else {}
    try:
        if dtype is None:
            return kind.from_pretrained(str(place), **options)
        folder, weights = place, sorted(place.glob("*.safetensors"))
        if not weights:
            raise OSError("no *.safetensors in it")
        for place in weights:
            with safe_open(place, "pt"):  # compares the file's length with what its head says
                pass
        place = weights[0] if len(weights) == 1 else folder
        if kind.__module__.startswith("transformers"):
            options["ignore_mismatched_sizes"] = True  # they are in the report
        network, report = kind.from_pretrained(str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, **options)
        if lacking := [*sorted(report["missing_keys"]), *(key for key, *_ in sorted(report["mismatched_keys"]))]:  # they would be random numbers
            raise ValueError(f"it lacks, or has in another shape, {', '.join(lacking[:3])}")
        return network.eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:  # Key, Type: a wrong config.json
        stop(f"{place} does not load as {kind.__name__}: {str(error).strip().splitlines()[0]}")


# --- warp: the depth of a photograph, estimated ---

FAR_M = 100.0  # the sky, and all that is further, stands there
METRIC = {"depth_pro", "zoedepth", "glpn", "tipsv2_dpt"}  # model types whose depth is metres; DepthAnything says which kind it is


@lru_cache(maxsize=1)
def load_depth_network(name: str, device: torch.device):
    """(picture processor, model) of a depth-estimation checkpoint, by folder or hub id. Safetensors only; remote code is never run."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation  # here, not above: they take a second that no other run needs
    from transformers.utils import is_torchvision_available, logging
    logging.set_verbosity_error()  # what is wrong with the weights is said below, in one line
    logging.disable_progress_bar()
    folder = fetched(name, ["*.json", "*.safetensors"])
    processor, model = load_part(folder, AutoImageProcessor, dtype=None), load_part(folder, AutoModelForDepthEstimation)
    if model.config.model_type in ("zoedepth", "depth_pro") and not is_torchvision_available():
        stop(f"--depth {name}: transformers needs torchvision for {model.config.model_type}: pip install torchvision")
    return processor, model.to(device)  # float32 on a GPU too: it runs once a photograph, and bfloat16 knows 3 m to 2 cm only


def is_metric(config, kind: str) -> bool:
    if kind == "auto":
        return config.model_type in METRIC or getattr(config, "depth_estimation_type", "relative") == "metric"
    return kind == "metric"


def anchor_to_floor(inverse: np.ndarray, K: np.ndarray, camera_height_m: float) -> np.ndarray:
    """Relative inverse depth q [H,W] = a / z + b, with a > 0 and b unknown -> depth z [H,W] in metres.

    The floor under a level camera at height h is at depth z = h / y where the tangent below the horizon is y; there q = (a / h) y + b is a
    straight line over the rows. It is fitted to the lowest quarter of the picture, middle half of the columns. What stands on the floor is
    nearer, so each row gives its lower quartile; of the lines through two rows, the one with the least median distance from all rows is
    taken, so that fewer than half of the rows may miss the floor.
    Raises Unusable where that is no floor: no line rises downwards, half of the rows lie off it by a twentieth of its rise, or a twentieth
    of the picture would lie beyond infinity (q < b). Right only where the camera was level (the horizon is the middle row): a table, a
    slope or a picture taken from a tower gives all depths a wrong scale.
    """
    height, width = inverse.shape
    rows = np.unique(np.linspace(0.75 * height, height - 1, 48).astype(int))
    y = rays_of(K)[1][rows, 0].astype(np.float64)  # [r]
    q = np.percentile(inverse[rows, width // 4: width - width // 4], 25, axis=1)  # [r]
    i, j = np.triu_indices(len(rows), max(1, len(rows) // 4))  # rows far enough apart to give a slope
    slope = np.maximum((q[j] - q[i]) / (y[j] - y[i]), 1e-9)  # [pairs]
    b = q[i] - slope * y[i]
    off = np.median(np.abs(slope[:, None] * y + b[:, None] - q), axis=1)
    slope, b, off = (float(values[off.argmin()]) for values in (slope, b, off))
    if off > 0.05 * slope * (y[-1] - y[0]) or (inverse < b - 0.1 * slope * y[-1]).mean() > 0.05:
        raise Unusable("--depth finds no floor in its lower middle: save metres as <photo stem>.depth.npy, or name a metric checkpoint")
    return (1 / np.maximum((inverse - b) / (slope * camera_height_m), 1 / FAR_M)).astype(np.float32)


@lru_cache(maxsize=4)
def estimate_depth(photo: Path, width: int, height: int, fov_x_deg: float, name: str, device: torch.device, kind: str,
                   camera_height_m: float) -> np.ndarray:
    """Depth [H,W] in metres of a photograph in its stored size. A photograph's trajectories follow each other, so few are remembered."""
    processor, model = load_depth_network(name, device)
    inputs = processor(images=Image.fromarray(load_photo(photo, width, height)), return_tensors="pt").to(device)
    padded = {"source_sizes": [(height, width)]} if model.config.model_type == "zoedepth" else {}  # its processor pads: by how much?
    with torch.inference_mode():
        depth = processor.post_process_depth_estimation(model(**inputs), target_sizes=[(height, width)], **padded)[0]["predicted_depth"]
    depth = depth.float().cpu().numpy().reshape(height, width)
    if not np.isfinite(depth).all():
        raise Unusable(f"{photo}: --depth {name} returns depths that are no numbers")
    if is_metric(model.config, kind):
        return np.clip(depth, 0.01, FAR_M)
    try:
        return anchor_to_floor(depth, intrinsics(width, height, fov_x_deg), camera_height_m)
    except Unusable as error:
        raise Unusable(f"{photo}: {error}") from None


def only_turns(trajectory: dict) -> bool:
    return all(name in ("turn_left", "turn_right") for name, _ in trajectory["actions"])


class Warp:
    """Moves the pixels of one picture. An anchor is (picture uint8 [H,W,3], depth float [H,W] or None). In a room both are the simulator's frame 0,
    whose objects move with their pixels: a box is that of what the view shows."""

    def __init__(self, cfg: Config):
        self.depth_dir, self.rooms, self.network, self.shown = cfg.depth_dir, Simulator(cfg), None, None
        if cfg.depth:
            device, _ = network_place(cfg)
            load_depth_network(cfg.depth, device)  # so that a fault of the checkpoint stops the run at its beginning
            self.network = (cfg.depth, device, cfg.depth_kind, cfg.camera_height_m)

    def depth_path(self, trajectory: dict) -> Path:
        photo = Path(trajectory["anchor"])
        return (Path(self.depth_dir) if self.depth_dir else photo.parent) / f"{photo.stem}.depth.npy"

    def refuses(self, trajectory: dict) -> str:
        if trajectory["room"] or self.network or only_turns(trajectory) or self.depth_path(trajectory).is_file():
            return ""
        return ("warp needs a depth map to move (name a depth-estimation checkpoint with --depth, or save metres [H,W] as "
                "<photo stem>.depth.npy beside the photograph or in --depth_dir)")

    def anchor(self, trajectory: dict) -> tuple[np.ndarray, np.ndarray | None]:
        width, height = trajectory["width"], trajectory["height"]
        if trajectory["room"]:
            room, start = self.rooms.anchor(trajectory)
            picture, ids, depth = render(room, start_pose(room, start), intrinsics(width, height, trajectory["fov_x_deg"]))
            self.settings, self.shown = {"depth": "exact"}, (room, start_pose(room, start), ids)
            return picture, depth
        path, photo, depth = self.depth_path(trajectory), Path(trajectory["anchor"]), None
        self.settings, self.shown = {"depth": None}, None
        if path.is_file():
            depth, self.settings = load_depth(path, width, height), {"depth": path.name}
        elif self.network and not only_turns(trajectory):
            depth = estimate_depth(photo, width, height, trajectory["fov_x_deg"], *self.network)
            self.settings = {"depth": self.network[0], "depth_kind": self.network[2], "camera_height_m": self.network[3]}
        return load_photo(photo, width, height), depth

    def imagine(self, anchor: tuple[np.ndarray, np.ndarray | None], c2w: np.ndarray, K: np.ndarray, kept=slice(None)) -> np.ndarray:
        (picture, depth), views, objects = anchor, [], []
        for pose in c2w[kept]:
            z = splat_depth(depth, pose, K) if np.abs(pose[:3, 3]).max() > 1e-6 else 1.0
            views.append(look_back(picture, pose, K, z))
            if self.shown:
                room, start, ids = self.shown
                u, v, holes = came_from(pose, K, z)
                moved = ids[np.minimum(v.astype(int), ids.shape[0] - 1), np.minimum(u.astype(int), ids.shape[1] - 1)]
                objects.append(visible_objects(room, np.where(holes, 0, moved), start @ pose))
        self.objects, self.holes, self.K = objects or None, np.stack([holes for _, holes in views]), K
        return np.stack([view for view, _ in views])


# --- svc: the teacher ---

def svc_network(name: str) -> Seva:
    """The U-Net from a hub id, a folder or a file of safetensors. The file's metadata may hold another SevaConfig than the released one ("config")."""
    path = Path(name)
    if not path.is_file():
        files = ("modelv1.1.safetensors", "model.safetensors")
        folder = fetched(name, files[:1])
        path = next((folder / file for file in files if (folder / file).is_file()), folder / files[1])
    try:
        with safe_open(path, "pt") as file:
            cfg = SevaConfig(**json.loads((file.metadata() or {}).get("config", "{}")))
            with torch.device("meta"):
                network = Seva(cfg)
            want = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
            have = {key: file.get_slice(key).get_shape() for key in file.keys()}
            if wrong := [f"{key} is {have.get(key, 'missing')}, want {want.get(key, 'none')}"
                         for key in sorted({*want, *have}) if want.get(key) != have.get(key)]:
                raise ValueError(f"{len(wrong)} tensors do not fit: {'; '.join(wrong[:2])}")
            network.load_state_dict({key: file.get_tensor(key).float() for key in want}, assign=True)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        stop(f"--svc {path}: {error}")
    return network.eval().requires_grad_(False)


class SvcAnchor(NamedTuple):
    wh: tuple[int, int]  # size of the picture as it came
    fitted: torch.Tensor  # [3,H,W] in -1..1
    encoded: tuple[torch.Tensor, torch.Tensor]  # its latents [4,h,w] and CLIP vector [D]
    actions: list
    name: tuple[str, str]  # scene_id, traj_id


class Svc:
    """Stable Virtual Camera."""

    def __init__(self, cfg: Config):
        self.cfg, self.rooms, self.encoded, self.compared = cfg, Simulator(cfg), (None, None, None), False
        self.steps, self.guidance = cfg.steps or (20 if cfg.fast else 50), cfg.guidance or 4.0
        self.settings = {"model": cfg.svc, "size": cfg.svc_px, "steps": self.steps, "guidance": self.guidance, "guider": cfg.svc_guider,
                         "passes": cfg.svc_passes, "fast": cfg.fast, "units_per_m": cfg.svc_units_per_m}

    def refuses(self, trajectory: dict) -> str:
        if self.cfg.svc_passes == 2 and not 4 <= len(trajectory["c2w"]) <= MAX_FRAMES:
            return f"svc's two published passes take 4 to {MAX_FRAMES} frames at once (use --svc_passes 1)"
        return ""

    @cached_property
    def networks(self) -> tuple:
        """(U-Net, VAE, CLIP), read when first needed."""
        from diffusers import AutoencoderKL  # here: they take seconds to import, which the simulator need not wait for
        from transformers import CLIPVisionModelWithProjection
        cfg, (device, dtype) = self.cfg, network_place(self.cfg)
        unet = svc_network(cfg.svc).to(dtype=dtype, memory_format=torch.channels_last if cfg.compile else torch.contiguous_format)
        wanted = ["config.json", "model.safetensors"]
        vae, clip = fetched(cfg.svc_vae, ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]), fetched(cfg.svc_clip, wanted)
        vae = load_part(vae / "vae" if (vae / "vae").is_dir() else vae, AutoencoderKL)
        clip = load_part(clip, CLIPVisionModelWithProjection)
        if cfg.vae_tiling:
            vae.enable_tiling()
        for part in () if cfg.offload else (unet, vae, clip):
            part.to(device)
        return (torch.compile(unet) if cfg.compile else unet), vae, clip

    @contextmanager
    def at_work(self, part: nn.Module):
        """A network on its device; with --offload only while it works."""
        device = network_place(self.cfg)[0]
        yield part.to(device)
        if self.cfg.offload:
            part.to("cpu")

    def encode(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[3,H,W] in -1..1 -> (latents [4,h,w], CLIP vector [D]), in float32 as the decoder: once a picture, and their faults stay."""
        _, vae, clip = self.networks
        with self.at_work(vae):
            latents = vae.encode(picture[None].to(vae.device)).latent_dist.mean[0] * 0.18215
        with self.at_work(clip):
            vector = clip(clip_pixels(picture.to(clip.device))[None]).image_embeds[0]
        return latents, vector

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.networks[1]
        with self.at_work(vae):
            return vae.decode(latents[None].to(vae.device) / 0.18215).sample[0]

    @torch.no_grad()
    def anchor(self, trajectory: dict) -> SvcAnchor:
        picture = first_picture(trajectory, self.rooms)
        if self.encoded[0] is not picture:  # the trajectories of a photograph follow one another
            fitted = fit_picture(picture, self.cfg.svc_px)
            self.encoded = picture, fitted, self.encode(fitted)
        return SvcAnchor(picture.shape[1::-1], *self.encoded[1:], trajectory["actions"], (trajectory["scene_id"], trajectory["traj_id"]))

    def published_passes(self, targets: int) -> tuple[list, list[int]]:
        """World2VLM's way: (calls of both passes, frames that the first imagines for the second, here all of them)."""
        positions = np.round(anchor_positions(1, targets, targets + 1, "interp"))
        return ([single_pass(1, len(positions), targets + 1), second_pass(1, positions, targets, targets + 1, "interp")],
                positions.astype(int).tolist())

    def sample(self, anchor: SvcAnchor, c2w: torch.Tensor, K: torch.Tensor, frames: list[int], steps: int, fast: bool) -> dict[int, torch.Tensor]:
        """Poses c2w [N,4,4] and normalised K [N,3,3] of the frames that bear the numbers `frames` -> number: its latents [4,h,w]."""
        unet, device, calls = self.networks[0], network_place(self.cfg)[0], itertools.count()
        dtype, c2w, K = next(unet.parameters()).dtype, c2w.to(device), K.to(device)
        metric = c2w.clone()
        metric[:, :3, 3] *= self.cfg.svc_units_per_m
        if self.cfg.svc_passes == 2:
            passes, anchors = self.published_passes(len(frames) - 1)
            guiders, camera_scale = ("multiview", "multiview_temporal"), max(0.5 * sum(abs(value) for _, value in anchor.actions), 0.5)
            scaled = lambda picked: scene_scaled(c2w, picked, camera_scale)  # as published: half the sum of metres and degrees
        else:
            passes, anchors, guiders = [single_pass(1, len(frames) - 1, min(len(frames), self.cfg.svc_window))], [], (self.cfg.svc_guider,)
            scaled = lambda picked: metric[picked]

        def network(x, t, y, dense_y):
            return unet(x.to(dtype), t, y.to(dtype), dense_y.to(dtype), len(x) // 2).float()

        def sample_call(number, picked, latents, mask, plucker, clip_mean, poses, K):
            call = next(calls)  # a frame's noise depends on the trajectory, the call and the frame, not on which others are in the call
            normal = torch.stack([torch.randn(steps + 1, *latents.shape[1:], generator=random_numbers(
                self.cfg.seed, *anchor.name, "svc", call, frames[i])) for i in picked], 1)
            scale = guidance_scale(guiders[number], poses, K, mask, self.guidance)
            with self.at_work(unet):
                return svc_sample(network, normal[0].to(device), latents, mask, plucker, clip_mean, scale, steps, normal[1:], fast,
                                  lambda range_: tqdm(range_, desc="svc", leave=False, unit="step"))

        latents = svc_scene([anchor.encoded], c2w, K, passes, anchors, scaled, sample_call, lambda z: self.encode(self.decode(z)))
        return {frames[i]: z for i, z in latents.items()}

    @torch.no_grad()
    def imagine(self, anchor: SvcAnchor, c2w: np.ndarray, K: np.ndarray, kept=slice(None)) -> np.ndarray:
        """Frame 0 is the picture itself, fitted."""
        W, H = self.cfg.svc_px
        own = torch.tensor(K) * torch.tensor([anchor.wh[0] / (2 * K[0, 2]), anchor.wh[1] / (2 * K[1, 2]), 1])[:, None]  # in pixels of the picture
        fitted_K = fit_intrinsics(own, anchor.wh, (W, H))
        norm_K, c2w = normalised(fitted_K, (W, H)).expand(len(c2w), 3, 3), torch.tensor(c2w, dtype=torch.float32)
        every = list(range(len(c2w)))
        wanted = np.arange(len(c2w))[kept].tolist()
        used = sorted({0, *wanted}) if self.cfg.fast else every
        latents = self.sample(anchor, c2w[used], norm_K[used], used, self.steps, self.cfg.fast)
        frames = torch.stack([anchor.fitted if frame == 0 else self.decode(latents[frame]).float().cpu() for frame in wanted])
        if self.cfg.fast and not self.compared:
            self.compare(frames, wanted, self.sample(anchor, c2w, norm_K, every, 50, False))
        self.objects, self.holes = None, None
        self.K = intrinsics(W, H, 2 * math.degrees(math.atan(W / 2 / float(fitted_K[0, 0]))))
        return ((frames + 1) / 2 * 255).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()

    def compare(self, frames: torch.Tensor, wanted: list[int], latents: dict[int, torch.Tensor]):
        """Once a run of --fast: how far its frames are from the full run's."""
        self.compared = True
        error = [(frame.clamp(-1, 1) - self.decode(latents[i]).float().cpu().clamp(-1, 1)).square().mean() / 4
                 for frame, i in zip(frames, wanted) if i != 0]
        tqdm.write(f"--fast: {-10 * math.log10(max(float(torch.stack(error).mean()), 1e-12)):.1f} dB PSNR to 50 Euler steps on all {len(latents) + 1} "
                   "frames, first trajectory")


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
    """The parts of a diffusers pipeline from its folder or the hub, {name: class} -> {name: object}; a VAE in float32, as advised there."""
    folder = fetched(source, [f"{name}/*.{ending}" for name in kinds for ending in ("json", "safetensors", "model")])
    dtypes = {"scheduler": None, "tokenizer": None, "vae": torch.float32}
    return {name: load_part(folder / name, kind, dtypes.get(name, dtype)) for name, kind in kinds.items()}


class SanaWM:
    """A video model that follows camera poses, run by diffusers. An anchor is (picture uint8 [h,w,3], (scene_id, traj_id)).

    Frame 0 is the middle of the picture itself, not what the VAE makes of it.
    """
    MOST_FRAMES = 961  # a minute at 16 frames a second: the longest that the model was made for

    def __init__(self, cfg: Config):
        self.cfg, self.rooms = cfg, Simulator(cfg)
        if len(cfg.sana_size) != 2 or any(side < 64 or side % 32 for side in cfg.sana_size):
            stop(f"--sana_size {' '.join(map(str, cfg.sana_size))}: want height and width, multiples of 32 from 64 up")
        check_pipeline(cfg.sana, "SanaWMPipeline")
        if cfg.sana_refiner:
            check_pipeline(cfg.sana_refiner, "SanaWMLTX2Refiner")

    def refuses(self, trajectory: dict) -> str:
        return ""

    def anchor(self, trajectory: dict) -> tuple[np.ndarray, tuple[str, str]]:
        return first_picture(trajectory, self.rooms, max(self.cfg.sana_size)), (trajectory["scene_id"], trajectory["traj_id"])

    @cached_property
    def networks(self) -> tuple:
        """(pipeline, refiner or None, the encoded prompt by argument of the pipeline)."""
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
        prompt, refiner = dict(zip(names, embeddings)), None
        pipe.register_modules(text_encoder=None, tokenizer=None)  # all trajectories share the prompt, so 5 GB of weights can go
        if cfg.vae_tiling:  # tiles of 512 pixels, and of 96 frames in time: those of the model's training
            pipe.vae.enable_tiling(tile_sample_min_num_frames=96, tile_sample_stride_num_frames=64)
            pipe.vae.use_framewise_encoding = pipe.vae.use_framewise_decoding = True
        if cfg.sana_refiner:
            from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
            from transformers import Gemma3ForConditionalGeneration
            refiner = diffusers.SanaWMLTX2Refiner(vae=pipe.vae, **load_parts(cfg.sana_refiner, {
                "scheduler": diffusers.FlowMatchEulerDiscreteScheduler, "tokenizer": AutoTokenizer,
                "text_encoder": Gemma3ForConditionalGeneration, "connectors": LTX2TextConnectors,
                "transformer": diffusers.SanaWMLTX2RefinerTransformer3DModel}, dtype))
        for stage in filter(None, (pipe, refiner)):
            stage.set_progress_bar_config(desc="sana-wm", leave=False)
            if cfg.offload and device.type == "cuda":
                try:
                    stage.enable_model_cpu_offload(device=device)
                except ImportError as error:
                    stop(f"--offload: {str(error).splitlines()[0]}")
            else:
                stage.to(device)
        return pipe, refiner, prompt

    def video(self, image: Image.Image, poses: np.ndarray, name: tuple[str, str], steps: int, guidance: float) -> torch.Tensor:
        """The frames [F,3,H,W] in 0..1 at poses [F,4,4]."""
        (pipe, refiner, prompt), noise = self.networks, random_numbers(self.cfg.seed, *name, "sana-wm")
        made = pipe(image=image, prompt=self.cfg.sana_prompt, c2w=poses, intrinsics=self.K, num_frames=len(poses), height=image.height,
                    width=image.width, num_inference_steps=steps, guidance_scale=guidance, generator=noise,
                    output_type="latent" if refiner else "pt", **prompt).frames
        if refiner:
            noise = random_numbers(self.cfg.seed, *name, "refiner")
            made = refiner(made, self.cfg.sana_prompt, fps=16, generator=noise, output_type="pt")
            made = torch.cat([made[:1], made])  # it leaves frame 0 out
        return made

    def imagine(self, anchor: tuple[np.ndarray, tuple[str, str]], c2w: np.ndarray, K: np.ndarray, kept=slice(None)) -> np.ndarray:
        (picture, name), cfg, (height, width) = anchor, self.cfg, self.cfg.sana_size
        poses, at = resample(c2w)
        if len(poses) > self.MOST_FRAMES:
            raise Unusable(f"in sana-wm's steps the path has {len(poses)} frames, want at most {self.MOST_FRAMES}")
        image, self.K = middle(picture, K, width, height)
        steps, guidance = cfg.steps or 60, cfg.guidance or 5.0
        made = self.video(image, poses, name, steps, guidance)
        frames = (255 * made[at[kept]]).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        frames[at[kept] == 0] = np.asarray(image)
        self.objects, self.holes = None, None
        self.settings = {"model": cfg.sana, "refiner": cfg.sana_refiner or None, "steps": steps, "guidance": guidance,
                         "prompt": cfg.sana_prompt, "height": height, "width": width, "frames": len(poses), "vae_tiling": cfg.vae_tiling}
        return frames


TEACHERS = {"simulator": Simulator, "warp": Warp, "svc": Svc, "sana-wm": SanaWM}
NETWORKS = {"svc", "sana-wm"}  # those of them that run a network


# --- quality check ---

COLUMNS = 96  # of a cylinder: the resolution of a turn is the field of view / 96, 0.94 degrees at 90; a parabola refines it
MOVE_MATCH = 0.9  # a heading is believed from this correlation on: of exact moves straight ahead or back it leaves out a fifth


def cylinder(image: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Picture [H,W,3] -> float32 [3,24,COLUMNS], a column an equal step of viewing angle, so that a turn is a shift along the columns."""
    half_x, half_y = K[0, 2] / K[0, 0], K[1, 2] / K[0, 0]  # tangents of half the fields of view
    angle = ((np.arange(COLUMNS) + 0.5) / COLUMNS - 0.5) * 2 * math.atan(half_x)
    up = (np.arange(24) + 0.5) / 12 - 1
    y = up[:, None] * half_y * math.cos(angle[-1]) / np.cos(angle)  # the rows that every column has
    shrink = max(1, round(image.shape[1] / COLUMNS))
    small = np.asarray(Image.fromarray(image).reduce(shrink), np.float32)
    width_px, height_px = small.shape[1] / (2 * half_x), small.shape[0] / (2 * half_y)  # focal lengths of the small picture
    rows = sample(small, np.broadcast_to((np.tan(angle) + half_x) * width_px, y.shape), (y + half_y) * height_px)  # [24,columns,3]
    return rows.transpose(2, 0, 1)


def measure_turn(before: np.ndarray, after: np.ndarray, K: np.ndarray) -> tuple[float, float]:
    """(yaw in degrees at which `before`, turned, matches `after` best, their correlation there), pictures uint8 [H,W,3].

    On cylinders a turn by k columns means after[:, j] = before[:, j + k]; the correlation of the common columns is computed for every k that
    leaves a quarter of them at once (products by FFT, sums and squares by cumulative sums), and a parabola refines the best. Each colour
    has its own mean over the common columns: with one for all, two views of a plain wall differ by the colours of what they do not share.
    """
    a, b = cylinder(before, K), cylinder(after, K)  # [3,24,columns]
    a, b = a - a.mean((1, 2), keepdims=True), b - b.mean((1, 2), keepdims=True)
    k = np.arange(-(3 * COLUMNS // 4), 3 * COLUMNS // 4 + 1)
    products = np.fft.irfft((np.fft.rfft(a, 2 * COLUMNS) * np.fft.rfft(b, 2 * COLUMNS).conj()).sum((0, 1)), 2 * COLUMNS)[k % (2 * COLUMNS)]

    def common(values: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:  # [3,24,columns] -> sums over first:last, [3,k]
        total = np.pad(values.sum(1).cumsum(1), ((0, 0), (1, 0)))
        return total[:, last] - total[:, first]

    part_a, part_b = (np.maximum(k, 0), COLUMNS + np.minimum(k, 0)), (np.maximum(-k, 0), COLUMNS + np.minimum(-k, 0))
    n = 24 * (COLUMNS - np.abs(k))
    sum_a, sum_b = common(a, *part_a), common(b, *part_b)
    spread = (common(a * a, *part_a) - sum_a ** 2 / n).sum(0).clip(1) * (common(b * b, *part_b) - sum_b ** 2 / n).sum(0).clip(1)
    match = (products - (sum_a * sum_b / n).sum(0)) / np.sqrt(spread)
    best = int(match.argmax())
    step_deg = 2 * math.degrees(math.atan(K[0, 2] / K[0, 0])) / COLUMNS
    return float((k[best] + peak_offset(match, best)) * step_deg), float(match[best])


def peak_offset(values: np.ndarray, best: int) -> float:
    """Where between the samples around its largest one, values[best], a parabola through the three has its top: -0.5..0.5."""
    if not 0 < best < len(values) - 1:
        return 0.0
    low, high = values[best - 1], values[best + 1]
    return float(0.5 * (low - high) / min(low - 2 * values[best] + high, -1e-9))


def grey(picture: np.ndarray, width: int) -> np.ndarray:
    """float32 [h, width] of a picture uint8 [H,W,3]."""
    image = Image.fromarray(picture).convert("L")
    return np.asarray(image.resize((width, max(2, round(width * image.height / image.width))), Image.BOX), np.float32)


def look_from_nearer(x: np.ndarray, y: np.ndarray, yaw: float, near: np.ndarray | float, forward: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where the frame taken further away shows what the nearer one shows at tangents x, y; `near`: length of the move over the depth there.

    The frame after the move is the one that may be turned by `yaw` radians: the nearer one where the move went forward.
    """
    c, s = math.cos(yaw), math.sin(yaw)
    if forward:  # R(yaw) (x, y, 1) + (0, 0, near)
        u, v, depth = c * x + s, y, c - s * x + near
    else:  # R(-yaw) ((x, y, 1) + (0, 0, near))
        u, v, depth = c * x - s * (1 + near), y, c * (1 + near) + s * x
    depth = np.maximum(depth, 0.1)  # a step of the fit may go behind the camera
    return u / depth, v / depth


def grid(half_x: float, half_y: float, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Tangents x, y [side*side] of a grid over the field of view that reaches to half_x, half_y."""
    steps = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.meshgrid(half_x * steps, half_y * steps)
    return x.ravel(), y.ravel()


@lru_cache(maxsize=8)
def drift_starts(half_x: float, half_y: float, share: float, side: int, forward: bool) -> tuple[np.ndarray, np.ndarray]:
    """130 first guesses (yaw, near) [g,2]; for each, which pixels of the further frame (48 wide) come under the grid, [g,side*side]."""
    guesses = [(math.radians(yaw_deg), near) for yaw_deg in range(-12, 13, 2) for near in (0, 0.08, 0.16, 0.25, 0.35, 0.5, 0.7, 1, 1.4, 2)]
    (x, y), width, pixels = grid(share * half_x, share * half_y, side), 48, []
    height = max(2, round(width * half_y / half_x))
    for yaw, near in guesses:
        u, v = look_from_nearer(x, y, yaw, near, forward)
        column, row = (u / half_x + 1) / 2 * width, (v / half_y + 1) / 2 * height
        pixels.append(row.astype(int).clip(0, height - 1) * width + column.astype(int).clip(0, width - 1))
    return np.array(guesses), np.array(pixels)


def normal(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values [...,m] moved and scaled to mean 0 and spread 1; the spread [...,1] that they had."""
    spread = values.std(-1, keepdims=True) + 1e-3
    return (values - values.mean(-1, keepdims=True)) / spread, spread


def measure_drift(before: np.ndarray, after: np.ndarray, K: np.ndarray, forward: bool, share: float = 0.5,
                  side: int = 24) -> tuple[float, float]:
    """(yaw in degrees by which a move straight ahead or back turned the camera, correlation of the frames there), pictures uint8 [H,W,3].

    A move makes what is ahead grow, the more the nearer it is, and a turn shifts it. So that the two are not confused, what the middle
    `share` of the nearer frame shows is taken for one plane of unknown slant, near = p0 + p1 x + p2 y: the yaw and the plane are fitted
    together by Gauss-Newton steps, with small weights for what does not belong to the plane (an object before a wall). They start from that
    of 130 guesses which resembles best, and from the best one that hardly turns; the former is believed only where it ends clearly better.
    """
    half_x, half_y, width = float(K[0, 2] / K[0, 0]), float(K[1, 2] / K[0, 0]), min(96, before.shape[1])
    x, y = grid(share * half_x, share * half_y, side)  # [m]
    nearer, further = (after, before) if forward else (before, after)
    guesses, pixels = drift_starts(half_x, half_y, share, side, forward)
    small, nearer, further = grey(further, 48), grey(nearer, width), grey(further, width)
    height = len(further)
    down, along = np.gradient(further)
    further = np.stack([further, along * (width / 2 / half_x), down * (height / 2 / half_y)], -1)  # grey, and its change per tangent

    def shown_at(image: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return sample(image, (u / half_x + 1) * (width / 2), (v / half_y + 1) * (height / 2)).T  # [m] or [3,m]

    def look(p: np.ndarray, yaw_step: float = 0.0, near_step: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        return look_from_nearer(x, y, p[0] + yaw_step, p[1] + p[2] * x + p[3] * y + near_step, forward)

    def fit(start: np.ndarray) -> tuple[float, float]:
        p = np.append(start, (0.0, 0.0))  # yaw in radians, p0, p1, p2
        for _ in range(5):
            u, v = look(p)
            shown, along_x, along_y = shown_at(further, u, v)
            shown, spread = normal(shown)
            by_yaw, by_near = ((along_x * (u_step - u) + along_y * (v_step - v)) / (1e-3 * spread)
                               for u_step, v_step in (look(p, yaw_step=1e-3), look(p, near_step=1e-3)))
            slope = np.stack([by_yaw, by_near, by_near * x, by_near * y])  # [4,m]: change of what is shown by each parameter
            slope -= slope.mean(1, keepdims=True)
            residual = want - shown
            weighted = slope / (1 + (residual / (1.5 * np.median(np.abs(residual)) + 1e-3)) ** 2)
            square = weighted @ slope.T
            p = p + np.linalg.solve(square + np.diag(1e-3 * square.diagonal() + 1e-6), weighted @ residual).clip(-0.15, 0.15)
        return float((want * normal(shown_at(further[..., 0], *look(p)))[0]).mean()), math.degrees(p[0])

    want, _ = normal(shown_at(nearer, x, y))
    alike = (normal(small.ravel()[pixels])[0] * want).mean(1)
    straight, any_yaw = np.where(np.abs(guesses[:, 0]) < 0.04, alike, -np.inf).argmax(), alike.argmax()
    match, yaw_deg = fit(guesses[straight])
    if any_yaw != straight:
        other, other_deg = fit(guesses[any_yaw])
        if other > match + 0.02:
            match, yaw_deg = other, other_deg
    return yaw_deg, match


def heading_drift(before: np.ndarray, after: np.ndarray, K: np.ndarray, forward: bool) -> float | None:
    """measure_drift in degrees where it can be trusted: None where the frames resemble too little, or where a drift is not found again in a
    smaller part of them (what is ahead is no plane then: a corner, a large object)."""
    drift_deg, match = measure_drift(before, after, K, forward)
    if match < MOVE_MATCH or abs(drift_deg) > 1.5 and abs(drift_deg - measure_drift(before, after, K, forward, share=0.35)[0]) > 1.5:
        return None
    return drift_deg


def measure_flicker(frames: np.ndarray, kept: list[int], c2w: np.ndarray, K: np.ndarray) -> float | None:
    """By how many grey levels three quarters of a frame, or more, stand off the frames before and after it; the worst frame.

    frames uint8 [n,H,W,3]. So that camera motion does not count, two frames are compared over the columns that both show after the turn
    asked for, cell by cell (4 x 8 cells, each colour by itself); a steady change (a wall that comes nearer) is the same before and after a
    frame and cancels; what comes into view changes a part of the cells only. None without three frames in a row (--keep all).
    """
    if not any(kept[i + 2] - kept[i] == 2 for i in range(len(kept) - 2)):
        return None
    step_deg, strips = 2 * math.degrees(math.atan(K[0, 2] / K[0, 0])) / COLUMNS, [cylinder(frame, K) for frame in frames]
    changes, worst = {}, 0.0  # changes: frame index -> [3,32] from it to the next frame, per colour and cell
    for i, (frame, following) in enumerate(zip(kept, kept[1:])):
        k = round(yaw_deg_of(c2w[frame][:3, :3].T @ c2w[following][:3, :3]) / step_deg)
        if following == frame + 1 and abs(k) <= 3 * COLUMNS // 4:
            change = strips[i + 1][..., max(-k, 0):COLUMNS + min(-k, 0)] - strips[i][..., max(k, 0):COLUMNS + min(k, 0)]
            across = change.shape[-1] // 8
            changes[frame] = change[..., :8 * across].reshape(3, 4, 6, 8, across).mean((2, 4)).reshape(3, 32)
            if frame - 1 in changes:
                low, high = np.percentile((changes[frame] - changes[frame - 1]) / 2, (25, 75), axis=1)
                worst = max(worst, float(low.max()), float(-high.min()))
    return worst


def sharpness(picture: np.ndarray, holes: np.ndarray | None) -> float | None:
    """Energy of the Laplacian of the grey picture over that of its gradient, away from holes; 0 where it is flat, None where all is hole.

    Both grow with the square of the contrast, so their ratio is the same for a gay wall and a plain one: it says how steep the edges are.
    """
    grey_sum = picture[..., 0].astype(np.int16) + picture[..., 1] + picture[..., 2]
    inner, up, down, left, right = (grey_sum[1:-1, 1:-1], grey_sum[:-2, 1:-1], grey_sum[2:, 1:-1], grey_sum[1:-1, :-2], grey_sum[1:-1, 2:])
    laplacian, along, down_ = 4 * inner - up - down - left - right, right - left, down - up
    if holes is not None and holes.any():
        whole = ~(holes[1:-1, 1:-1] | holes[:-2, 1:-1] | holes[2:, 1:-1] | holes[1:-1, :-2] | holes[1:-1, 2:])
        laplacian, along, down_ = laplacian[whole], along[whole], down_[whole]
    if not laplacian.size:
        return None
    gradient = np.square(along, dtype=np.float32).sum() + np.square(down_, dtype=np.float32).sum()
    return float(4 * np.square(laplacian, dtype=np.float32).sum() / max(gradient, 1.0))


def quality(frames: np.ndarray, holes: np.ndarray | None, kept: list[int], c2w: np.ndarray, keyframes: list[int], K: np.ndarray, cfg: Config) -> dict:
    """The `qc` record of frames uint8 [n,H,W,3], which are the frames `kept` of c2w [N,4,4]. The keys are explained at the top."""
    fov_deg = 2 * math.degrees(math.atan(K[0, 2] / K[0, 0]))
    qc = {"turn_error_deg": None, "over_turn_deg": None, "match": None, "heading_drift_deg": None}
    at_keys, motions = [i for i, frame in enumerate(kept) if frame in keyframes], []
    for i, j in zip(at_keys, at_keys[1:]):
        step = c2w[kept[i]].T[:3, :3] @ (c2w[kept[j]] - c2w[kept[i]])[:3, 3]  # .T: the inverse of a rotation
        asked_deg = yaw_deg_of(c2w[kept[i]].T[:3, :3] @ c2w[kept[j]][:3, :3])
        moved_m, whole = np.abs(step).max(), holes is None or holes[i].mean() < 0.02  # holes move with the camera, not with the picture
        if whole and moved_m < 1e-4 and 1e-3 < abs(asked_deg) <= 0.74 * fov_deg:
            found_deg, match = measure_turn(frames[i], frames[j], K)
            error_deg, match, worst = round(found_deg - asked_deg, 2), round(match, 3), qc["match"]
            if worst is None or match < cfg.min_match <= worst or abs(error_deg) > abs(qc["turn_error_deg"]):
                qc |= {"turn_error_deg": error_deg, "over_turn_deg": round(math.copysign(1, asked_deg) * error_deg, 2), "match": match}
        elif whole and moved_m >= 1e-4 and abs(asked_deg) <= 1e-3 and np.abs(step[:2]).max() < 1e-3 * moved_m:
            drift_deg = heading_drift(frames[i], frames[j], K, bool(step[2] > 0))
            if drift_deg is not None and abs(drift_deg) >= abs(qc["heading_drift_deg"] or 0.0):
                qc["heading_drift_deg"] = round(drift_deg, 2)
        change = np.abs(frames[j].astype(np.int16) - frames[i])
        if holes is not None:
            change = change[~(holes[i] | holes[j])]
        if change.size:
            motions.append(float(change.mean()))
    edges = [sharpness(frame, None if holes is None else holes[i]) for i, frame in enumerate(frames)]
    edges_left = [edge for edge in edges[1:] if edge is not None]
    flicker = measure_flicker(frames, kept, c2w, K) if holes is None else None
    qc |= {"sharpness": round(min(edges_left) / edges[0], 3) if edges[0] and edges_left else None,
           "flicker": flicker if flicker is None else round(flicker, 2), "motion": round(min(motions, default=0.0), 2),
           "holes": round(float(holes.mean((1, 2)).max()), 3) if holes is not None else 0.0}
    why = faults(qc, cfg)
    return {**qc, "passed": not why, "why": "; ".join(why.values())}


# --- quality check: limits and the report ---

MEASURES = {  # key of `qc`: axis title, what a value beyond its limit means ({0} the value, {1} the limit)
    "turn_error_deg": ("turn error, degrees (+: further right)", "turn off by {0:+.1f} degrees"),
    "match": ("correlation at the best yaw", "the turned frame resembles the one before it at no yaw ({0:.2f} < {1:g})"),
    "heading_drift_deg": ("heading drift of a move, degrees", "a straight move turns by {0:+.1f} degrees"),
    "sharpness": ("sharpness over frame 0's", "blurred ({0:g} of the sharpness of frame 0)"),
    "flicker": ("flicker, grey levels", "flickers (most of a frame stands {0:.1f} grey levels off its neighbours)"),
    "motion": ("motion, grey levels", "frozen (an action changes {0:g} grey levels)"),
    "holes": ("share of holes", "{0:.0%} holes")}


def limits(cfg: Config) -> dict[str, tuple[float, float]]:
    """Least and largest value of each measure that passes."""
    return {"turn_error_deg": (-cfg.max_turn_error_deg, cfg.max_turn_error_deg), "match": (cfg.min_match, math.inf),
            "heading_drift_deg": (-cfg.max_heading_drift_deg, cfg.max_heading_drift_deg), "sharpness": (cfg.min_sharpness, math.inf),
            "flicker": (-math.inf, cfg.max_flicker), "motion": (cfg.min_motion, math.inf), "holes": (-math.inf, cfg.max_holes)}


def faults(qc: dict, cfg: Config) -> dict[str, str]:
    """What a qc record fails: measure -> what is wrong."""
    found = {}
    for key, (least, most) in limits(cfg).items():
        if qc[key] is not None and not least <= qc[key] <= most:
            found[key] = MEASURES[key][1].format(qc[key], least)
    if "match" in found:
        found.pop("turn_error_deg", None)  # the yaw of no match is no yaw
    if "turn_error_deg" in found:
        found["turn_error_deg"] += ", turned too far" if qc["over_turn_deg"] > 0 else ", not turned far enough"
    return found


def qc_report(records: list[dict], cfg: Config) -> dict:
    """qc.json: per teacher, how its trajectories are spread over each measure, and how many each measure rejects."""
    teachers = {}
    for name in cfg.teacher:
        checks = [record["qc"] for record in records if record["teacher"] == name]
        rejected, measures = Counter(key for qc in checks for key in faults(qc, cfg)), {}
        for key in [*MEASURES, "over_turn_deg"]:
            values = np.array([qc[key] for qc in checks if qc[key] is not None])
            measures[key] = {"n": len(values)}
            if len(values):
                measures[key] |= {"mean": round(float(values.mean()), 4), "median": round(float(np.median(values)), 4)}
                measures[key] |= {f"p{share}": round(float(np.percentile(values, share)), 4) for share in (0, 1, 5, 25, 75, 95, 99, 100)}
        teachers[name] = {"trajectories": len(checks), "passed": sum(qc["passed"] for qc in checks), "rejected": dict(rejected),
                          "measures": measures}
    bounds = {key: [bound if math.isfinite(bound) else None for bound in pair] for key, pair in limits(cfg).items()}
    return {"limits": bounds, "teachers": teachers}


def qc_picture(records: list[dict], report: dict, cfg: Config) -> bytes:
    """qc.png: a histogram of every measure, teachers over each other, limits dashed; last, how many each measure rejects."""
    figure = Figure(figsize=(17, 8), layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, (key, (title, _)) in zip(axes.flat, MEASURES.items()):
        values = {name: [record["qc"][key] for record in records if record["teacher"] == name and record["qc"][key] is not None]
                  for name in cfg.teacher}
        bounds, everything = [bound for bound in limits(cfg)[key] if math.isfinite(bound)], sum(values.values(), [])
        if everything:  # the middle 98 % and the limits; what lies beyond is counted in the outermost bars
            low, high = min(*np.percentile(everything, [1, 99]), *bounds), max(*np.percentile(everything, [1, 99]), *bounds)
            edges = np.linspace(low - 0.05 * (high - low), high + 0.05 * (high - low), 41)
            for number, (name, of_teacher) in enumerate(values.items()):
                if of_teacher:
                    percent = np.full(len(of_teacher), 100 / len(of_teacher))
                    axis.hist(np.clip(of_teacher, edges[0], edges[-1]), edges, weights=percent, alpha=0.5, color=f"C{number}",
                              label=f"{name} ({len(of_teacher):,})")
            axis.legend(fontsize=8)
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="0.5")
        for bound in bounds:
            axis.axvline(bound, color="tab:red", ls="--", lw=1)
        axis.set(xlabel=title, ylabel="% of the trajectories measured")
        axis.set_title(", ".join(f"{name} rejects {of['rejected'].get(key, 0):,}" for name, of in report["teachers"].items()), fontsize=9)
    axis, high = axes.flat[-1], 0.8 / len(cfg.teacher)
    for number, name in enumerate(cfg.teacher):
        of_teacher = report["teachers"][name]
        counts = [of_teacher["rejected"].get(key, 0) for key in MEASURES]
        bars = axis.barh(np.arange(len(MEASURES)) + number * high, counts, high, color=f"C{number}",
                         label=f"{name}: {of_teacher['passed']:,} of {of_teacher['trajectories']:,} passed")
        axis.bar_label(bars, [f"{count:,}" for count in counts], padding=2, fontsize=8)
    axis.set_yticks(np.arange(len(MEASURES)) + 0.4 - high / 2, list(MEASURES))
    axis.invert_yaxis()
    axis.set(xlabel="trajectories rejected")
    axis.legend(fontsize=8)
    packed = io.BytesIO()
    figure.savefig(packed, format="png", dpi=90)
    return packed.getvalue()


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
        if not all(isinstance(name, str) and abs(value) < 1e6 for name, value in trajectory["actions"]):
            raise ValueError(f"actions {str(trajectory['actions'])[:100]}, want [[name, value], ...]")
    except (ValueError, TypeError, IndexError, OverflowError) as error:
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


def make_views(trajectory: dict, teacher_name: str, teacher, gain: float | None, cfg: Config):
    """Imagine one trajectory and write its folder, view.json last. Of a teacher that moves `gain` times too far, 1 / gain is asked."""
    c2w = check(trajectory)
    kept = frames_to_keep(cfg.keep, trajectory["keyframes"], len(c2w))
    asked = c2w.copy()
    asked[:, :3, 3] /= gain or 1.0
    K = intrinsics(trajectory["width"], trajectory["height"], trajectory["fov_x_deg"])
    frames = teacher.imagine(teacher.anchor(trajectory), asked, K, kept)
    settings = teacher.settings | ({"gain": gain} if gain else {})
    K, (height, width) = teacher.K, frames.shape[1:3]
    trajectory = trajectory | {"width": width, "height": height, "fov_x_deg": round(2 * math.degrees(math.atan(width / 2 / K[0, 0])), 4)}
    folder = folder_of(trajectory)
    for frame, picture in zip(kept, frames):
        save(Path(cfg.run) / folder / f"{frame:03d}.png", png(Image.fromarray(picture)))
    save(Path(cfg.run) / folder / "transforms.json", json.dumps(nerfstudio(trajectory, c2w, K, kept)))
    qc = quality(frames, teacher.holes, kept, c2w, trajectory["keyframes"], K, cfg)
    record = trajectory | {"teacher": teacher_name, "teacher_settings": settings, "seed": cfg.seed, "kept": kept,
                           "frames": [str(folder / f"{frame:03d}.png") for frame in kept], "objects": teacher.objects, "qc": qc}
    save(Path(cfg.run) / folder / "view.json", json.dumps(record) + "\n")


WORKER = {}  # of this process: its settings and its teachers


def start_worker(cfg: Config):
    """Make this process ready. A worker ends with the process that started it: else a killed run's would write beside its rerun's."""
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    WORKER.update(cfg=cfg, teachers={name: TEACHERS[name](cfg) for name in cfg.teacher}, gains=read_gains(cfg))


def read_networks(cfg: Config):
    for name in NETWORKS & {*cfg.teacher}:
        WORKER["teachers"][name].networks


def work(job: tuple[dict, str]) -> str:
    """Make one trajectory's views -> why it was skipped; empty: it was not."""
    (trajectory, teacher_name), cfg = job, WORKER["cfg"]
    folder = Path(cfg.run) / folder_of(trajectory)
    try:
        make_views(trajectory, teacher_name, WORKER["teachers"][teacher_name], WORKER["gains"].get(teacher_name), cfg)
    except Unusable as error:
        save(folder / "skipped.json", json.dumps({"why": str(error)}) + "\n")
        return f"{trajectory['scene_id']}/{trajectory['traj_id']}: skipped, {error}"
    except torch.OutOfMemoryError as error:
        stop(f"{str(error).splitlines()[0]} Try --offload, --vae_tiling or, in another run, smaller frames (--svc_px, --sana_size)")
    (folder / "skipped.json").unlink(missing_ok=True)  # an earlier run skipped it, since then somebody mended its picture
    return ""


# --- calibration: how far does a teacher really move? ---

def measure_move(picture: np.ndarray, depth: np.ndarray, imagined: np.ndarray, step: np.ndarray, K: np.ndarray) -> tuple[float, float]:
    """(share of `step` [3] by which `picture` [H,W,3], moved through its exact depth [H,W], resembles `imagined` best; correlation there).

    Shares from 0 to 3 are tried, then the neighbourhood of the best one; a parabola refines it. A view of which the picture shows less than
    a quarter counts as unlike.
    """
    def likeness(share: float) -> float:
        pose = np.eye(4)
        pose[:3, 3] = share * step
        view, holes = look_back(picture, pose, K, splat_depth(depth, pose, K))
        if holes.mean() > 0.75:
            return -1.0
        a, b = (image[~holes].astype(np.float64) for image in (view, imagined))
        a, b = a - a.mean(0), b - b.mean(0)
        return float((a * b).sum() / math.sqrt(max((a * a).sum() * (b * b).sum(), 1.0)))

    coarse = np.arange(0, 3.01, 0.1)
    near = coarse[np.argmax([likeness(share) for share in coarse])]
    fine = near + np.arange(-5, 6) * 0.02
    match = np.array([likeness(share) for share in fine])
    best = int(match.argmax())
    return float(fine[best] + 0.02 * peak_offset(match, best)), float(match[best])


def calibrate_one(trajectory: dict, teacher, rooms: Simulator, min_match: float, long_side_px: int = 112) -> dict:
    """Let the teacher imagine one single move of a room, and measure the move."""
    c2w = check(trajectory)
    last = teacher.imagine(teacher.anchor(trajectory), c2w, intrinsics(trajectory["width"], trajectory["height"], trajectory["fov_x_deg"]),
                           [0, len(c2w) - 1])[-1]
    height, width = last.shape[:2]
    shrink = min(1, long_side_px / max(height, width))
    width, height = round(shrink * width), round(shrink * height)
    K = intrinsics(width, height, 2 * math.degrees(math.atan(teacher.K[0, 2] / teacher.K[0, 0])))  # the teacher may have cut the picture
    room, start = rooms.anchor(trajectory)
    picture, _, depth = render(room, start_pose(room, start), K)
    step = c2w[-1][:3, 3]
    share, match = measure_move(picture, depth, np.asarray(Image.fromarray(last).resize((width, height), Image.BOX)), step, K)
    asked_m = float(np.linalg.norm(step))
    return {"scene_id": trajectory["scene_id"], "traj_id": trajectory["traj_id"], "action": trajectory["actions"][0][0],
            "asked_m": round(asked_m, 3), "moved_m": round(share * asked_m, 3), "match": round(match, 3),
            "measured": match >= min_match and share < 2.99}


def fit_gain(moves: list[dict]) -> dict:
    """moved = gain * asked: the median of moved / asked, which a few failures do not move; `spread`: their median distance from it."""
    ratios = np.array([move["moved_m"] / move["asked_m"] for move in moves if move["measured"]])
    if not ratios.size:
        return {"gain": None, "spread": None, "n": 0}
    gain = float(np.median(ratios))
    return {"gain": round(gain, 4), "spread": round(float(np.median(np.abs(ratios - gain))), 4), "n": len(ratios)}


def calibration_picture(all_moves: dict[str, list[dict]], path: Path):
    """Asked against real distance, one panel a teacher."""
    figure = Figure(figsize=(5 * len(all_moves), 4.6), layout="constrained")
    axes = figure.subplots(1, len(all_moves), squeeze=False)
    for axis, (name, moves) in zip(axes[0], all_moves.items()):
        fit = fit_gain(moves)
        most = 1.05 * max(max(move["asked_m"], move["moved_m"]) for move in moves)
        for action, mark in (("forward", "^"), ("backward", "v"), ("shift_left", "<"), ("shift_right", ">")):
            for good, color in ((True, "tab:blue"), (False, "0.7")):
                points = [(move["asked_m"], move["moved_m"]) for move in moves if move["action"] == action and move["measured"] == good]
                if points:
                    axis.scatter(*zip(*points), marker=mark, s=22, color=color, label=action if good else f"{action}, unlike")
        axis.plot([0, most], [0, most], color="0.5", lw=1, ls=":", label="as asked")
        if fit["gain"] is not None:
            axis.plot([0, most], [0, fit["gain"] * most], color="tab:red", lw=1, label=f"gain {fit['gain']:.3f} ± {fit['spread']:.3f}")
        axis.set(title=f"{name}: {fit['n']} of {len(moves)} moves measured", xlabel="asked, metres", ylabel="really moved, metres",
                 xlim=(0, most), ylim=(0, most))
        axis.legend(fontsize=8)
    packed = io.BytesIO()
    figure.savefig(packed, format="png", dpi=110)
    save(path, packed.getvalue())


def calibrate(cfg: Config):
    """--calibrate: RUN/2_calibration/<teacher>/ holds the measured moves; calibration.json and .png sum up all teachers measured so far."""
    started, run, name = time.perf_counter(), Path(cfg.run), cfg.teacher[0]
    folder, top = run / "2_calibration" / name, run / "2_calibration"
    moves = [trajectory for trajectory, _ in plan(cfg)[0]
             if trajectory["room"] and len(trajectory["actions"]) == 1 and not only_turns(trajectory)]
    if not moves:
        stop(f"{run}/1_trajectories holds no single move in a room: make rooms with 01 --rooms 40")
    moves = [moves[i] for i in np.unique(np.linspace(0, len(moves) - 1, cfg.calibration_moves).astype(int))]
    start_worker(cfg)
    if not (folder / "meta.json").is_file():
        read_networks(cfg)  # as in main
    meta = begin(folder, settings_of(cfg), run / "1_trajectories")
    teacher, rooms, measured = WORKER["teachers"][name], Simulator(cfg), []
    for trajectory in tqdm(moves, desc="calibration", unit="move"):
        mark = folder / trajectory["scene_id"] / f"{trajectory['traj_id']}.json"
        if not mark.is_file():
            try:
                save(mark, json.dumps(calibrate_one(trajectory, teacher, rooms, cfg.min_match)) + "\n")
            except Unusable as error:
                tqdm.write(f"{trajectory['scene_id']}/{trajectory['traj_id']}: skipped, {error}", file=sys.stderr)
                continue
        measured.append(json.loads(mark.read_text()))
    fit = fit_gain(measured)
    if not fit["n"]:
        stop(f"none of {len(moves)} moves of {name} can be measured: no distance up to 3 times the asked one resembles what it imagined "
             f"(correlation at least {cfg.min_match:g})")
    save(folder / "moves.jsonl", "".join(json.dumps(move) + "\n" for move in measured))
    with alone(top):  # another teacher may end at the same time
        all_moves = {path.parent.name: read_jsonl(path) for path in sorted(top.glob("*/moves.jsonl"))}
        fits = {teacher: fit_gain(of_teacher) for teacher, of_teacher in all_moves.items()}
        save(top / "calibration.json", json.dumps(fits, indent=1) + "\n")
        calibration_picture(all_moves, top / "calibration.png")
    finish(folder, meta, {"moves": len(moves), "measured": fit["n"]}, started)

    print(f"{'asked m':>9}{'moved m':>9}{'gain':>8}{'spread':>8}{'n':>5}")
    for asked_m in sorted({move["asked_m"] for move in measured}):
        of_distance = [move for move in measured if move["asked_m"] == asked_m]
        if (row := fit_gain(of_distance))["n"]:
            moved_m = np.median([move["moved_m"] for move in of_distance if move["measured"]])
            print(f"{asked_m:9.2f}{moved_m:9.2f}{row['gain']:8.3f}{row['spread']:8.3f}{row['n']:5}")
    print(f"{'all':>9}{'':9}{fit['gain']:8.3f}{fit['spread']:8.3f}{fit['n']:5}   of {len(moves)} moves")
    print(f"look at {top / 'calibration.png'}\n"
          f"next: python {Path(__file__).name} --run {cfg.run} --teacher {name} --calibration {top / 'calibration.json'}")


def read_gains(cfg: Config) -> dict[str, float]:
    """The gain of each teacher from --calibration; empty without."""
    if not cfg.calibration:
        return {}
    try:
        found = json.loads(Path(cfg.calibration).read_text())
    except (OSError, ValueError) as error:
        stop(f"--calibration {cfg.calibration}: {error}; --calibrate writes one")
    gains = {}
    for name in cfg.teacher:
        entry = found.get(name) if isinstance(found, dict) else None
        gain = entry.get("gain") if isinstance(entry, dict) else None
        if not isinstance(gain, (int, float)) or not 0.02 < gain < 50:  # also refuses nan
            stop(f"--calibration {cfg.calibration} has no gain between 0.02 and 50 for {name}: run {Path(__file__).name} --run {cfg.run} "
                 f"--teacher {name} --calibrate")
        gains[name] = float(gain)
    return gains


# --- all trajectories ---

def plan(cfg: Config) -> tuple[list[tuple[dict, str]], Counter, int]:
    """(jobs: trajectory and its teacher's name, reasons why others are left out, number of unusable lines), before anything is written."""
    path = Path(cfg.run) / "1_trajectories/trajectories.jsonl"
    lines = dict(read_lines(path, "scene_id", "traj_id", "source", "anchor", "room", "split", "width", "height", "fov_x_deg", "actions", "keyframes", "c2w"))
    unusable = len(path.read_bytes().splitlines()) - len(lines)
    teachers, jobs, left_out, seen = {name: TEACHERS[name](cfg) for name in cfg.teacher}, [], Counter(), set()
    for number, trajectory in lines.items():
        name = (trajectory["scene_id"], trajectory["traj_id"])
        room = trajectory["room"]
        if not all(isinstance(part, str) and re.fullmatch(r"[^./\\\0][^/\\\0]*", part) for part in name) or name in seen:
            why = f"its scene_id and traj_id, {str(name)[:100]}, are not names of a new folder"
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
        print(f"{path}:{number}: skipped, {why}", file=sys.stderr)
    for reason, number in left_out.items():
        print(f"left out {number} of {len(lines)} trajectories: {reason}")
    if not jobs:
        stop(f"teacher {' '.join(cfg.teacher)} can take none of the {len(lines)} trajectories of {path}")
    return jobs, left_out, unusable


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
                x1, y1, x2, y2 = left + x1 * width, top + band_px + y1 * tile_px, left + x2 * width - 1, top + band_px + y2 * tile_px - 1
                draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=(255, 255, 255))  # at least a pixel
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
    report = qc_report(records, cfg)
    save(folder / "qc.json", json.dumps(report, indent=1) + "\n")
    save(folder / "qc.png", qc_picture(records, report, cfg))
    save(folder / "views.jsonl", b"".join(lines))
    failed = sum(not record["qc"]["passed"] for record in records)
    counts = {"trajectories": len(records), "frames": sum(len(record["kept"]) for record in records), "failed the quality check": failed,
              "skipped": len(jobs) - len(records) + unusable, "left out": sum(left_out.values())}
    finish(folder, meta, counts, started)

    print(f"{'teacher':12}{'trajectories':>13}{'frames':>9}{'passed':>9}"
          f"{'turns measured':>16}{'mean |off| deg':>16}{'too far by':>12}{'worst':>8}")
    for name, of_teacher in report["teachers"].items():
        n_frames = sum(len(record["kept"]) for record in records if record["teacher"] == name)
        measured = of_teacher["measures"]["over_turn_deg"]
        off = [abs(record["qc"]["turn_error_deg"]) for record in records if record["teacher"] == name and record["qc"]["match"] is not None]
        print(f"{name:12}{of_teacher['trajectories']:13,}{n_frames:9,}{of_teacher['passed']:9,}{measured['n']:16,}"
              + (f"{np.mean(off):16.2f}{measured['mean']:+12.2f}{max(off):8.2f}" if off else f"{'-':>16}{'-':>12}{'-':>8}"))
    for name, of_teacher in report["teachers"].items():
        for key, number in of_teacher["rejected"].items():
            print(f"  {number:9,}  of {name} rejected for {key}: {MEASURES[key][0]}")
    for key in ("skipped", "left out"):
        if counts[key]:
            print(f"  {counts[key]:9,}  {key}")
    print(f"{time.perf_counter() - started:.0f} s; look at {folder / 'contact_sheet.png'} and qc.png\nnext: python 03_build_qa.py --run {cfg.run}")


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
    if len(cfg.svc_px) != 2 or any(px < 64 or px % 64 for px in cfg.svc_px):
        stop(f"--svc_px {cfg.svc_px}: want a width and a height that are multiples of 64")
    if cfg.svc_guider not in ("vanilla", "multiview", "multiview_temporal") or cfg.svc_passes not in (1, 2) or not 2 <= cfg.svc_window <= MAX_FRAMES:
        stop(f"--svc_guider {cfg.svc_guider} --svc_passes {cfg.svc_passes} --svc_window {cfg.svc_window}: want vanilla, multiview or multiview_temporal, "
             f"1 or 2, and 2 to {MAX_FRAMES}")
    if cfg.fast and cfg.svc_passes == 2:
        stop("--fast and --svc_passes 2: the published two passes need every frame, choose one of the settings")
    if min(cfg.steps, cfg.guidance) < 0 or cfg.svc_units_per_m <= 0:
        stop(f"--steps {cfg.steps} --guidance {cfg.guidance:g} --svc_units_per_m {cfg.svc_units_per_m:g}: want 0 or more, and more than 0")
    numbers = re.fullmatch(r"(\d+)/(\d+)", cfg.shard)
    if not numbers or int(numbers[1]) >= int(numbers[2]):
        stop(f"--shard {cfg.shard}: want i/n with 0 <= i < n, for example 0/4")
    if cfg.depth and "warp" not in cfg.teacher:
        stop(f"--depth {cfg.depth}: only warp uses it (add --teacher warp)")
    if cfg.depth_kind not in ("auto", "metric", "relative"):
        stop(f"--depth_kind {cfg.depth_kind}: choose auto, metric or relative")
    if not 0.1 <= cfg.camera_height_m <= 100:
        stop(f"--camera_height_m {cfg.camera_height_m}: want 0.1 to 100 metres")
    if cfg.calibrate and (len(cfg.teacher) > 1 or cfg.calibration or cfg.calibration_moves < 1):
        stop("--calibrate measures one --teacher as it is, without --calibration, in at least 1 of --calibration_moves")
    if cfg.workers < 1 or cfg.sheet_rows < 1:
        stop(f"--workers {cfg.workers}, --sheet_rows {cfg.sheet_rows}: want at least 1")
    return int(numbers[1]), int(numbers[2])


def settings_of(cfg: Config) -> dict:
    """What decides the result, for meta.json: of a calibration its gains, wherever its file lies. Memory and speed may change on the way."""
    by_the_way = ("run", "shard", "workers", "benchmark", "offload", "vae_tiling", "compile")
    settings = {key: value for key, value in asdict(cfg).items() if key not in by_the_way}
    return settings | {"calibration": read_gains(cfg)}


def main(cfg: Config):
    started, (shard, shards) = time.perf_counter(), check_settings(cfg)
    if cfg.benchmark:
        return benchmark(cfg)
    if cfg.calibrate:
        return calibrate(cfg)
    run, settings = Path(cfg.run), settings_of(cfg)
    folder = run / "2_views"
    jobs, left_out, unusable = plan(cfg)
    start_worker(cfg)
    if not (folder / "meta.json").is_file():
        read_networks(cfg)  # what is wrong with their files is said before anything is begun
    with alone(folder):
        meta = begin(folder, settings, run / "1_trajectories", f"_{shard}_of_{shards}")

    share = jobs[shard::shards]
    todo = [job for job in share if not (run / folder_of(job[0]) / "view.json").is_file()]
    if len(todo) < len(share):
        print(f"{len(share) - len(todo)} of {len(share)} trajectories are there already")
    if "simulator" in cfg.teacher:
        pattern_bank()  # once, before the processes part
    workers = 1 if NETWORKS & {*cfg.teacher} or cfg.depth else cfg.workers  # one copy of the weights; the device is busy as it is
    pool = multiprocessing.Pool(workers, start_worker, (cfg,)) if workers > 1 else None
    if todo:
        read_networks(cfg)
    for why in tqdm(pool.imap_unordered(work, todo, chunksize=8) if pool else map(work, todo), total=len(todo), desc="views", unit="trajectory"):
        if why:
            tqdm.write(why, file=sys.stderr)
    if pool:
        pool.close()
        pool.join()
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GB")

    with alone(folder):  # the shard that ends last finds all the marks; should two end together, the second finds the folder finished
        missing = sum(not any((run / folder_of(job[0]) / mark).is_file() for mark in ("view.json", "skipped.json")) for job in jobs)
        if missing:
            print(f"shard {cfg.shard} is done; {missing} trajectories of other shards are missing, the last shard to end completes the folder")
        elif json.loads((folder / "meta.json").read_text())["finished"]:
            print(f"{folder} was completed by another shard")
        else:
            complete(folder, meta, jobs, left_out, unusable, cfg, started)


if __name__ == "__main__":
    run(main, Config)
