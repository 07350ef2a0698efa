"""Frames per second of stage 2's simulator with exact boxes, without files: `make bench`."""

import math
import multiprocessing
import os
import time

from conftest import load

rooms, stage = load("01"), load("02")
PROCESSES = os.cpu_count() or 1


def bench_room(seed: int):
    """A room as stage 1 draws it by default."""
    return stage.prepare_room(rooms.draw_room(f"room_{seed:05d}", rooms.Config()))


def work(job: tuple[int, int, int]) -> int:
    side_px, frames, seed = job
    room, K = bench_room(seed), stage.intrinsics(side_px, side_px, 80.0)
    for i in range(frames):
        pose = stage.start_pose(room, [math.sin(i), math.cos(2 * i), 37.0 * i])
        stage.visible_objects(room, stage.render(room, pose, K)[1], pose)
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
