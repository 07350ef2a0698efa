"""Disk full, read-only folder, input deleted on the way, two processes on one folder, a clock that jumps: one line, status 2, nothing harmed."""
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
from harness import STAGES, WRITTEN, Row, before, changes, contents, differences, fail_from, full_at, record_changes, run

READ = {"02": "1_trajectories/trajectories.jsonl", "03": "2_views/views.jsonl", "04": "3_qa/sft.jsonl", "05": "3_qa/grpo.jsonl", "06": "3_qa/heldout.jsonl"}


def trouble(stage: str, whole: Path, place: Path, most: int) -> Row:
    """The disk fills up in the midst of a write, or turns read-only, at moments spread over the run; mended, the run ends as undisturbed."""
    row, expected, log = Row(f"{stage} on a full or read-only disk"), contents(whole / WRITTEN[stage]), place / "changes.jsonl"
    folder = before(stage, whole, place / "calm")
    run(stage, "--run", folder, *STAGES[stage], plant=lambda: record_changes(folder, log))
    moments = [json.loads(line) for line in log.read_text().splitlines()]
    writes = [n for n, (event, _, small, large) in enumerate(moments) if event == "open" and large - small > 1]
    plants = []
    for n in np.unique(np.linspace(0, len(writes) - 1, most).round().astype(int)):
        moment, (_, path, small, large) = writes[n], moments[writes[n]]
        plants.append((f"no room in {Path(path).name}", "File too large", lambda folder, m=moment, s=small, l=large: full_at(folder, m, s, l)))
    for moment in np.unique(np.linspace(0, len(moments) - 1, most).round().astype(int)):
        for number in (errno.EROFS, errno.ENOSPC):
            plants.append((f"{os.strerror(number)} from change {moment}", os.strerror(number), lambda folder, m=moment, n=number: fail_from(folder, m, n)))
    for k, (name, words, plant) in enumerate(plants):
        folder = before(stage, whole, place / str(k))
        others = contents(folder)
        first = run(stage, "--run", folder, *STAGES[stage], plant=lambda: plant(folder))
        faults = first.refusal(words)
        faults += [f"{name} was harmed" for name, data in others.items() if contents(folder).get(name) != data]
        again = run(stage, "--run", folder, *STAGES[stage])
        row.case(name, faults + again.success() + differences(folder / WRITTEN[stage], expected), first, again)
        shutil.rmtree(folder)
    return row


def real_disk(whole: Path, place: Path) -> Row:
    """The same on file systems of their own: one of 40 kB, one mounted read-only. Where this user may not mount, nothing is tried."""
    row = Row("small and read-only file systems")
    if os.geteuid():
        return row
    for stage in ("01", "02", "03"):
        for name, options in (("full", "size=40k"), ("read-only", "ro")):
            folder = before(stage, whole, place / f"{stage}{name}")
            mount = folder / WRITTEN[stage]
            mount.mkdir()
            if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount)], capture_output=True).returncode:
                return row  # a container without that right
            try:
                done = run(stage, "--run", folder, *STAGES[stage])
                row.case(f"{stage} {name}", done.refusal("No space left on device" if name == "full" else "Read-only file system"), done)
            finally:
                subprocess.run(["umount", str(mount)], check=True)
    return row


def deleted_input(stage: str, whole: Path, place: Path, most: int) -> Row:
    """What a stage reads goes away while it runs: it may be past needing it; else a line and status 2, and with the input back it ends well."""
    row, expected = Row(f"{stage} with its input deleted on the way"), contents(whole / WRITTEN[stage])
    for k in range(most):
        folder = before(stage, whole, place / str(k))
        gone = folder / ("2_views" if k % 2 and stage > "03" else str(Path(READ[stage]).parent))

        def take_away(moment=k // 2):
            def meet(number, event, path):
                if number == moment:
                    os.rename(gone, str(gone) + ".away")
            changes(folder / WRITTEN[stage], meet)
        first = run(stage, "--run", folder, *STAGES[stage], plant=take_away)
        faults = first.refusal() if first.status else []
        if Path(str(gone) + ".away").exists():
            shutil.rmtree(gone, ignore_errors=True)
            os.rename(str(gone) + ".away", gone)
        again = run(stage, "--run", folder, *STAGES[stage])
        found = differences(folder / WRITTEN[stage], expected) if first.status else []
        row.case(f"{gone.name} gone at change {k // 2}", faults + again.success() + found, first, again)
        shutil.rmtree(folder)
    return row


def two_at_once(stage: str, whole: Path, place: Path) -> Row:
    """A second process on the folder is refused with the first one's number; the first ends undisturbed, and a third finds it finished."""
    row, expected = Row(f"{stage} twice on one folder"), contents(whole / WRITTEN[stage])
    folder = before(stage, whole, place / "both")
    ready, goes_on = multiprocessing.Pipe()

    def wait():  # after its second change the first process waits for a word
        def meet(number, event, path):
            if number == 9:  # in 02 the fourth is still within the shards' common lock
                goes_on.send(os.getpid())
                goes_on.recv()
        changes(folder / WRITTEN[stage], meet)

    first = []
    thread = threading.Thread(target=lambda: first.append(run(stage, "--run", folder, *STAGES[stage], plant=wait)))
    thread.start()
    pid = ready.recv() if ready.poll(120) else 0
    second = run(stage, "--run", folder, *STAGES[stage])
    ready.send("go")
    thread.join()
    row.case("second", second.refusal(f"process {pid} on"), second)
    row.case("first", first[0].success() + differences(folder / WRITTEN[stage], expected), first[0])
    third = run(stage, "--run", folder, *STAGES[stage])
    row.case("third", third.success() + ([] if "nothing to do" in third.out else ["it did not say that there is nothing to do"]), third)
    return row


def clock(stage: str, whole: Path, place: Path) -> Row:
    """The clock jumps back by a day, forward by a year, and stands still: the same files, no traceback."""
    row, expected = Row(f"{stage} while the clock jumps"), contents(whole / WRITTEN[stage])
    for name, jump in (("back", lambda n: -86400.0 * (n > 2)), ("forward", lambda n: 3e7 * (n > 2)), ("still", None)):
        folder = before(stage, whole, place / name)

        def plant():
            now, calls = time.time, [0]

            def jumping():
                calls[0] += 1
                return 1e9 if jump is None else now() + jump(calls[0])
            time.time = jumping
        done = run(stage, "--run", folder, *STAGES[stage], plant=plant)
        row.case(name, done.success() + differences(folder / WRITTEN[stage], expected), done)
        shutil.rmtree(folder)
    return row
