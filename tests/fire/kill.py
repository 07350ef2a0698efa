"""SIGKILL, then the same command again: the folder must be that of an undisturbed run.

Byte for byte, for 04 and 05 losses and weights too.
"""

import json
import shutil
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from harness import OUT, STAGES, Row, before, change_log, contents, die_at, differences, run

DELETIONS = ("before os.remove", "before os.rmdir", "before shutil.rmtree")


def evenly(items: list, most: int) -> list:
    """At most `most` of the items, from the first to the last; a single one is the middle one."""
    if most == 1:
        return [items[len(items) // 2]]
    return [items[k] for k in np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))]


def at_random_moments(stage: str, whole: Path, place: Path, times: int) -> Row:
    """`times` runs, each killed between its start and the time that an undisturbed run takes."""
    row, expected = Row(f"{stage} killed at a random moment"), contents(whole / OUT[stage])
    calm = run(stage, before(stage, whole, place / "calm"), STAGES[stage])
    row.complaints += differences(place / "calm" / OUT[stage], expected)  # else not reproducible
    killed = 0
    for share in np.sort(np.random.default_rng(zlib.crc32(stage.encode())).random(times)):
        folder = before(stage, whole, place / "run")
        first = run(stage, folder, STAGES[stage], kill_after_s=share * calm.seconds)
        killed += first.status == -9
        again = run(stage, folder, STAGES[stage])
        faults = again.success() + differences(folder / OUT[stage], expected)
        row.case(f"after {share:.0%} of {calm.seconds:.1f} s", faults, again)
        shutil.rmtree(folder)
    if killed < 0.7 * times:
        row.complaints.append(f"{row.attack}: only {killed} of {times} were alive to be killed")
    return row


def inside_every_write(stage: str, whole: Path, place: Path, most: int) -> Row:
    """Killed before changes of the file system and in writes, evenly chosen, and in deletions."""
    row, expected = Row(f"{stage} killed inside a file operation"), contents(whole / OUT[stage])
    points = []
    for number, line in enumerate(change_log(whole, stage).read_text().splitlines()):
        event, path, small, large = json.loads(line)
        points.append((number, None, f"before {event} {Path(path).name}"))
        if event == "open" and large > small:
            points.append((number, (small, large), f"inside {event} {Path(path).name}"))
    chosen = evenly(points, most)
    if most > 1:
        deletions = [point for point in points if point[2].startswith(DELETIONS)]
        chosen += [point for point in deletions if point not in chosen]
    for moment, halfway, name in chosen:
        folder = before(stage, whole, place / "run")
        plant = partial(die_at, folder, moment, halfway)
        first = run(stage, folder, STAGES[stage], plant=plant)
        again = run(stage, folder, STAGES[stage])
        faults = again.success() + differences(folder / OUT[stage], expected)
        if first.status >= 0:
            faults.append(f"the kill did not strike (status {first.status})")
        row.case(f"{moment}: {name}", faults, again)
        shutil.rmtree(folder)
    return row
