"""Disk full, folder read-only, input deleted, two processes on a folder, a clock that jumps.

Each is one line and status 2, or no trouble at all; nothing is harmed.
"""

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

from harness import OUT, STAGES, Row, before, change_log, changes, contents, differences
from harness import fail_from, full_at, run
from kill import evenly

READ = {"02": "1_trajectories", "03": "2_views", "04": "3_qa", "05": "3_qa", "06": "3_qa"}


def trouble(stage: str, whole: Path, place: Path, most: int) -> Row:
    """The disk fills up in a write, or turns read-only, at moments spread over the run.

    Mended, the run ends as undisturbed.
    """
    row, expected = Row(f"{stage} on a full or read-only disk"), contents(whole / OUT[stage])
    moments = [json.loads(line) for line in change_log(whole, stage).read_text().splitlines()]
    writes = [n for n, (event, _, a, b) in enumerate(moments) if event == "open" and b - a > 1]
    plants = []
    for n in evenly(writes, most):
        _, path, small, large = moments[n]
        plant = partial(full_at, moment=n, before=small, after=large)
        plants.append((f"no room in {Path(path).name}", "File too large", plant))
    for n in evenly(range(len(moments)), most):
        for number in (errno.EROFS, errno.ENOSPC):
            why = os.strerror(number)
            plants.append(
                (f"{why} from change {n}", why, partial(fail_from, moment=n, number=number))
            )
    for name, words, plant in plants:
        folder = before(stage, whole, place / "run")
        others = contents(folder)
        first = run(stage, folder, STAGES[stage], plant=partial(plant, folder))
        after = contents(folder)
        faults = first.refusal(words)
        faults += [f"{name} was harmed" for name, data in others.items() if after.get(name) != data]
        again = run(stage, folder, STAGES[stage])
        faults += again.success() + differences(folder / OUT[stage], expected)
        row.case(name, faults, first, again)
        shutil.rmtree(folder)
    return row


def real_disk(stage: str, whole: Path, place: Path, most: int) -> Row:
    """The same on file systems of their own, 40 kB or read-only. Nothing where none may mount."""
    row = Row("small and read-only file systems")
    if os.geteuid():
        return row
    options = {"size=40k": "No space left on device", "ro": "Read-only file system"}
    for stage, option in itertools.product(("01", "02", "03"), options):
        folder = before(stage, whole, place / (stage + option))
        mount = folder / OUT[stage]
        mount.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(mount)]
        if subprocess.run(command, capture_output=True).returncode:
            return row  # a container without that right
        try:
            done = run(stage, folder, STAGES[stage])
            row.case(f"{stage} {option}", done.refusal(options[option]), done)
        finally:
            subprocess.run(["umount", str(mount)], check=True)
    return row


def deleted_input(stage: str, whole: Path, place: Path, most: int) -> Row:
    """What a stage reads goes away while it runs: a line and status 2, or it is past needing it.

    With the input back it ends well.
    """
    row, expected = Row(f"{stage} with its input deleted"), contents(whole / OUT[stage])
    for k in range(most):
        folder = before(stage, whole, place / "run")
        gone = folder / ("2_views" if k % 2 and stage > "03" else READ[stage])
        away = folder / "away"

        def take_away(number, event, path, moment=k // 2, gone=gone, away=away):
            if number == moment:
                gone.rename(away)

        plant = partial(changes, folder / OUT[stage], take_away)
        first = run(stage, folder, STAGES[stage], plant=plant)
        faults = first.refusal() if first.status else []
        if away.exists():
            shutil.rmtree(gone, ignore_errors=True)
            away.rename(gone)
        again = run(stage, folder, STAGES[stage])
        faults += again.success()
        faults += differences(folder / OUT[stage], expected) if first.status else []
        row.case(f"{gone.name} gone at change {k // 2}", faults, first, again)
        shutil.rmtree(folder)
    return row


def two_at_once(stage: str, whole: Path, place: Path, most: int) -> Row:
    """A second process on a folder is refused, the first ends undisturbed, a third has no work."""
    row, expected = Row(f"{stage} twice on one folder"), contents(whole / OUT[stage])
    folder, first = before(stage, whole, place / "run"), []
    ready, goes_on = multiprocessing.Pipe()

    def wait(number, event, path):
        if number == 9:  # earlier changes of 02 are within the lock that its shards share
            goes_on.send("ready")
            goes_on.recv()

    plant = partial(changes, folder / OUT[stage], wait)
    thread = threading.Thread(
        target=lambda: first.append(run(stage, folder, STAGES[stage], plant=plant))
    )
    thread.start()
    ready.poll(120)
    second = run(stage, folder, STAGES[stage])
    ready.send("go")
    thread.join()
    third = run(stage, folder, STAGES[stage])
    row.case("second", second.refusal("another process"), second)
    row.case("first", first[0].success() + differences(folder / OUT[stage], expected), first[0])
    idle = [] if "nothing to do" in third.out else ["it did not say that there is nothing to do"]
    row.case("third", third.success() + idle, third)
    return row


def clock(stage: str, whole: Path, place: Path, most: int) -> Row:
    """The clock jumps back by a day, forward by a year, or stands still: the same files."""
    row, expected = Row(f"{stage} while the clock jumps"), contents(whole / OUT[stage])
    now, count = time.time, itertools.count()
    clocks = {
        "back": lambda: now() - 86400 * (next(count) > 1),
        "forward": lambda: now() + 3e7 * (next(count) > 1),
        "still": lambda: 1e9,
    }
    for name, shown in clocks.items():
        folder = before(stage, whole, place / name)
        done = run(stage, folder, STAGES[stage], plant=partial(setattr, time, "time", shown))
        row.case(name, done.success() + differences(folder / OUT[stage], expected), done)
    return row
