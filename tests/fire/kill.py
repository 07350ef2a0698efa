"""SIGKILL, then the same command again: the folder must be that of an undisturbed run, byte for byte (04 and 05: losses and weights too)."""
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
from harness import STAGES, WRITTEN, Row, before, contents, die_at, differences, record_changes, run


def at_random_moments(stage: str, whole: Path, place: Path, times: int) -> Row:
    """`times` runs of a stage, each killed at a moment of its own between the start and the time that an undisturbed run takes."""
    row, expected = Row(f"{stage} killed at a random moment"), contents(whole / WRITTEN[stage])
    calm = run(stage, "--run", before(stage, whole, place / "calm"), *STAGES[stage])
    row.complaints += differences(place / "calm" / WRITTEN[stage], expected)  # else the stage itself is not reproducible
    killed = 0
    for number, share in enumerate(np.sort(np.random.default_rng(zlib.crc32(stage.encode())).random(times))):
        folder = before(stage, whole, place / str(number))
        first = run(stage, "--run", folder, *STAGES[stage], kill_after_s=share * calm.seconds)
        killed += first.status == -9
        again = run(stage, "--run", folder, *STAGES[stage])
        row.case(f"after {share:.0%} of {calm.seconds:.1f} s", again.success() + differences(folder / WRITTEN[stage], expected), again)
        shutil.rmtree(folder)
    if killed < 0.7 * times:
        row.complaints.append(f"{row.attack}: only {killed} of {times} runs were still alive when they were to be killed")
    return row


def inside_every_write(stage: str, whole: Path, place: Path, most: int) -> Row:
    """Killed before every change of the file system, and in the midst of every write: at most `most` of them, evenly chosen."""
    row, expected, log = Row(f"{stage} killed inside a file operation"), contents(whole / WRITTEN[stage]), place / "changes.jsonl"
    folder = before(stage, whole, place / "calm")
    run(stage, "--run", folder, *STAGES[stage], plant=lambda: record_changes(folder, log))
    points = [(n, None if kind == "before" else (small, large), f"{kind} {event} {Path(path).name}")
              for n, (event, path, small, large) in enumerate(map(json.loads, log.read_text().splitlines()))
              for kind in ("before", "inside")[:1 + (event == "open" and large > small)]]
    for k in np.unique(np.linspace(0, len(points) - 1, min(most, len(points))).round().astype(int)):
        moment, halfway, name = points[k]
        folder = before(stage, whole, place / str(k))
        first = run(stage, "--run", folder, *STAGES[stage], plant=lambda: die_at(folder, moment, halfway))
        again = run(stage, "--run", folder, *STAGES[stage])
        unhurt = [] if first.status < 0 else [f"the kill did not strike (status {first.status})"]
        row.case(f"{k}: {name}", unhurt + again.success() + differences(folder / WRITTEN[stage], expected), again)
        shutil.rmtree(folder)
    return row
