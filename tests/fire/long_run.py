"""A long run: memory and open files stay flat. 02 and 03 over thousands of rooms, 04 over thousands of steps, very small.

While a stage runs, its memory and open files are read from /proc; the slope is that of a line through the least reading of each tenth of
the run after the warm-up, the first third: what a stage holds in the midst of a step comes and goes.
"""
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
from harness import TINY, Row, before, run


def resident_mb(pid: int) -> float:
    """Anonymous memory of a process. What a fork shares with its parent counts from the start: pages that it writes to are then no growth."""
    found = re.search(r"^RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    if not found:
        raise ProcessLookupError(f"process {pid} has ended")
    return int(found[1]) / 1024


def watched(stage: str, *arguments, progress) -> tuple:
    """The outcome, and readings (items done, MB, open files) while it ran."""
    readings, pid, over = [], [], threading.Event()
    ready, says = os.pipe()

    def watch():
        pid.append(int(os.read(ready, 20)))
        while not over.wait(0.2):
            try:
                readings.append((progress(), resident_mb(pid[0]), len(os.listdir(f"/proc/{pid[0]}/fd"))))
            except OSError:  # it has just ended
                return
    thread = threading.Thread(target=watch)
    thread.start()
    done = run(stage, *arguments, plant=lambda: os.write(says, str(os.getpid()).encode()), limit_s=3000)
    over.set()
    thread.join()
    return done, np.array(readings, float).reshape(-1, 3)


def judge(row: Row, name: str, done, readings: np.ndarray, items: int):
    """At most 1 MB and no file more per 1,000 items, after the warm-up."""
    late = readings[(readings[:, 0] > items / 3) & (readings[:, 0] < items)]
    if len(late) < 20:
        row.case(name, done.success() + [f"only {len(late)} readings"], done)
        return
    least = np.array([[part[:, 0].mean(), *part[:, 1:].min(0)] for part in np.array_split(late, 10)])
    mb, files = (float(np.polyfit(least[:, 0] / 1000, least[:, k], 1)[0]) for k in (1, 2))
    print(f"{name}: {items:,} items in {done.seconds:.0f} s, {mb:+.2f} MB and {files:+.2f} open files per 1,000 after warm-up", flush=True)
    row.case(name, done.success() + [f"memory grows by {mb:.2f} MB per 1,000"] * (mb > 1) + [f"open files grow by {files:.1f} per 1,000"] * (files > 0.5), done)


def rooms(place: Path, count: int) -> Row:
    """02 and 03 over `count` rooms. 03 reads line by line but holds the questions: its memory grows by what it keeps, so it is watched asking."""
    row, folder = Row("long run of 02 and 03"), place / "run"
    done = run("01", "--run", folder, "--rooms", count, "--room_px", 32, "--room_trajectories", 1)
    row.case("01", done.success(), done)
    total = sum(1 for _ in open(folder / "1_trajectories/trajectories.jsonl"))
    views = folder / "2_views"
    done, readings = watched("02", "--run", folder, "--keep", "ends", "--workers", 1, progress=lambda: sum(1 for _ in os.scandir(views)) if views.is_dir() else 0)
    judge(row, "02", done, readings, total)
    made = sum(1 for _ in open(views / "views.jsonl")) if not done.status else 0
    row.lost += total - made
    done = run("03", "--run", folder)
    asked = {json.loads(line)["scene_id"] for name in ("static", "sft", "heldout") for line in open(folder / f"3_qa/{name}.jsonl")} if not done.status else set()
    row.case("03", done.success() + ["no question"] * (not asked), done)
    return row


def steps(whole: Path, place: Path, count: int) -> Row:
    """04 for `count` steps of two questions, states kept on the way."""
    row, folder = Row("long run of 04"), before("04", whole, place / "run")
    metrics = folder / "4_sft/metrics.jsonl"
    done, readings = watched("04", "--run", folder, "--student", "4_base", *TINY, "--steps", count, "--batch", 2, "--save_every", max(10, count // 5),
                             "--log_every", count, "--val_share", 0, "--max_pixels", 3136, "--data", "3_qa/static.jsonl", "--explode", 1e9,  # by heart soon, and then any other question looks like an explosion
                             progress=lambda: metrics.read_bytes().count(b"\n") if metrics.is_file() else 0)
    judge(row, "04", done, readings, count)
    return row
