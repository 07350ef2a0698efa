"""Frames per second of stage 2's simulator with exact boxes, without files: `make bench`."""

import math
import multiprocessing
import os
import time

import numpy as np
from conftest import load

rooms, stage = load("01"), load("02")
PROCESSES = os.cpu_count() or 1


def bench_room(seed: int):
    """A 7 x 8 m room with seven objects in a ring, of four or so parts each."""
    rng, objects = np.random.default_rng(seed), []
    kinds = rng.permutation(["ball", "cone", "table", "chair", "shelf", "lamp", "plant", "sofa"])
    for i, kind in enumerate(kinds[:7].tolist()):
        thing = rooms.build_object(kind, "red", rng.uniform(0.9, 1.1), 40.0 * i)
        place = [2.6 * math.sin(0.9 * i), thing["center_m"][1], 3.1 * math.cos(0.9 * i)]
        objects.append(thing | {"id": i, "label": f"red {kind}", "center_m": place})
    room = {"width_m": 7.0, "depth_m": 8.0, "height_m": 2.8, "camera_height_m": 1.5}
    return stage.prepare_room(room | {"texture_seed": seed, "objects": objects})


def work(job: tuple[int, int, int]) -> int:
    side_px, frames, seed = job
    room, K = bench_room(seed), stage.intrinsics(side_px, side_px, 80.0)
    for i in range(frames):
        pose = stage.start_pose(room, [math.sin(i), math.cos(2 * i), 37.0 * i])
        ids = stage.render(room, pose, K)[1]
        stage.visible_objects(room, ids, pose, ids)
    return frames


if __name__ == "__main__":
    with multiprocessing.Pool(PROCESSES) as pool:
        for side_px, frames in ((112, 500), (576, 25)):
            warm = [(side_px, 2, seed) for seed in range(4 * PROCESSES)]
            pool.map(work, warm, chunksize=1)
            started = time.perf_counter()
            jobs = [(side_px, frames, seed) for seed in range(6 * PROCESSES)]
            rate = sum(pool.imap_unordered(work, jobs)) / (time.perf_counter() - started)
            print(f"simulator {side_px}x{side_px}: {rate:6.0f} frames/s on {PROCESSES} processes")
