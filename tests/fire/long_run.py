"""A long run: memory and open files stay flat in 02 over thousands of rooms, in 04 over steps.

While a stage runs, its memory and open files are read from /proc. The slope is that of a line
through the least reading of each tenth of the run after the first third, the warm-up: what a
stage holds in the midst of a step comes and goes.
"""

import os
import re
import threading
from pathlib import Path

import numpy as np
from harness import TRAIN, Row, before, run


def resident_mb(pid: int) -> float:
    """Anonymous memory of a process: pages shared with the parent of a fork are no growth."""
    found = re.search(r"^RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    if not found:
        raise ProcessLookupError(f"process {pid} has ended")
    return int(found[1]) / 1024


def watched(stage: str, folder: Path, flags: str, progress) -> tuple:
    """The outcome, and readings (items done, MB, open files) while it ran."""
    readings, over = [], threading.Event()
    ready, says = os.pipe()

    def watch():
        pid = int(os.read(ready, 20))
        while not over.wait(0.2):
            try:
                files = len(os.listdir(f"/proc/{pid}/fd"))
                readings.append((progress(), resident_mb(pid), files))
            except OSError:  # it has just ended
                return

    def tell():
        os.write(says, str(os.getpid()).encode())

    thread = threading.Thread(target=watch)
    thread.start()
    done = run(stage, folder, flags, plant=tell, limit_s=3000)
    over.set()
    thread.join()
    return done, np.array(readings, float).reshape(-1, 3)


def judge(row: Row, name: str, done, readings: np.ndarray, items: int):
    """At most 1 MB and no file more per 1,000 items, after the warm-up."""
    late = readings[(readings[:, 0] > items / 3) & (readings[:, 0] < items)]
    if len(late) < 20:
        return row.case(name, done.success() + [f"only {len(late)} readings"], done)
    parts = np.array_split(late, 10)
    thousands = [part[:, 0].mean() / 1000 for part in parts]
    least = [part[:, 1:].min(0) for part in parts]
    mb, files = np.polyfit(thousands, least, 1)[0]
    growth = f"{mb:+.2f} MB and {files:+.2f} open files per 1,000 after warm-up"
    print(f"{name}: {items:,} items in {done.seconds:.0f} s, {growth}", flush=True)
    row.case(name, done.success() + [f"grows by {growth}"] * bool(mb > 1 or files > 0.5), done)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def rooms(stage: str, whole: Path, place: Path, count: int) -> Row:
    """02 and 03 over `count` rooms. 03 holds its questions, so only 02 is watched."""
    row, folder = Row("long run of 02 and 03"), place / "run"
    done = run("01", folder, f"--rooms {count} --room_px 32 --room_trajectories 1")
    row.case("01", done.success(), done)
    total = count_lines(folder / "1_trajectories/trajectories.jsonl")
    views = folder / "2_views"

    def scenes() -> int:
        return sum(1 for _ in os.scandir(views)) if views.is_dir() else 0

    done, readings = watched("02", folder, "--keep ends --workers 1", scenes)
    judge(row, "02", done, readings, total)
    row.lost += total - count_lines(views / "views.jsonl")
    done = run("03", folder)
    questions = count_lines(folder / "3_qa/sft.jsonl")
    row.case("03", done.success() + ["no question"] * (not questions), done)
    return row


def steps(stage: str, whole: Path, place: Path, count: int) -> Row:
    """04 for `count` steps of two questions, states kept on the way."""
    row, folder = Row("long run of 04"), before("04", whole, place / "run")
    flags = TRAIN + f"--data 3_qa/static.jsonl --steps {count} --batch 2 --val_share 0 "
    # A rate that learns nothing: once questions are known by heart, another looks like divergence.
    flags += f"--save_every {max(10, count // 5)} --lr 1e-6"
    metrics = folder / "4_sft/metrics.jsonl"
    done, readings = watched("04", folder, flags, lambda: count_lines(metrics))
    judge(row, "04", done, readings, count)
    return row
