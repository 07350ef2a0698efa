"""make fire: every attack on every stage, and one table of what survived.

    python tests/fire/run.py [--short] [--only PART ...] [--jobs 2]

Parts: kill disk pictures jsonl weights properties long_run. The exit status is 1 unless all
survived and nothing was lost.
"""

import argparse
import importlib
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import harness

ALL = [*harness.STAGES]
READERS = ALL[1:]


def attack(part: str, name: str, stage: str, whole: Path, place: Path, count: int) -> harness.Row:
    """One row of the table, in a folder of its own."""
    # here, not above: properties loads the scripts, which the process that forks must not hold
    function = getattr(importlib.import_module(part), name)
    with tempfile.TemporaryDirectory(dir=place) as own:
        return function(stage, whole, Path(own), count)


def short_plan() -> list[tuple[str, str, str, int]]:
    """(part, function, stage, how many cases): what `make test` has time for, of each part."""
    return [
        *[("kill", "inside_every_write", stage, 1) for stage in ALL],
        ("kill", "at_random_moments", "03", 2),
        ("disk", "trouble", "03", 1),
        ("disk", "deleted_input", "06", 1),
        ("disk", "two_at_once", "03", 1),
        ("disk", "real_disk", "", 1),
        ("pictures", "through_01", "01", 1),
        ("pictures", "through_02", "02", 3),
        ("pictures", "through_training", "06", 1),
        ("jsonl", "views", "03", 60),
        ("jsonl", "questions", "06", 60),
        ("weights", "refused", "06", 3),
        ("properties", "check", "", 10),
    ]


def full_plan() -> list[tuple[str, str, str, int]]:
    return [
        ("long_run", "steps", "04", 2000),
        ("long_run", "rooms", "02", 5000),
        *[("kill", "at_random_moments", stage, 20) for stage in ALL],
        *[("kill", "inside_every_write", stage, 60 if stage < "04" else 40) for stage in ALL],
        *[("disk", "trouble", stage, 5) for stage in ALL],
        *[("disk", "deleted_input", stage, 6) for stage in READERS],
        *[("disk", name, stage, 1) for name in ("two_at_once", "clock") for stage in ALL],
        ("disk", "real_disk", "", 1),
        ("pictures", "through_01", "01", 1),
        ("pictures", "through_02", "02", 1),
        *[("pictures", "through_training", stage, 1) for stage in harness.STUDENTS],
        ("jsonl", "trajectories", "02", 200),
        ("jsonl", "views", "03", 200),
        *[("jsonl", "questions", stage, 200) for stage in harness.STUDENTS],
        *[("weights", "refused", stage, 99) for stage in harness.STUDENTS],
        ("properties", "check", "", 300),
    ]


def table(rows: list[harness.Row]) -> str:
    """One line per attack, its stages together; the last line is the sum."""
    lines = {}
    for row in rows:
        stage, title = row.attack.split(" ", 1) if row.attack[0] == "0" else ("", row.attack)
        counts = (row.tried, row.survived, row.lost, row.tracebacks)
        for name, stages in ((title, [stage]), ("all", [])):
            known, sums = lines.get(name, ([], [0] * 4))
            lines[name] = known + stages, [a + b for a, b in zip(sums, counts, strict=True)]
    lines["all"] = lines.pop("all")
    written = [
        f"{'attack':38}{'stages':19}{'tried':>7}{'survived':>10}{'lost':>6}{'tracebacks':>12}"
    ]
    for title, (stages, (tried, survived, lost, traced)) in lines.items():
        counts = f"{tried:7,}{survived:10,}{lost:6,}{traced:12,}"
        written.append(f"{title:38}{' '.join(stages):19}{counts}")
    return "\n".join(written)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few cases of each")
    parser.add_argument("--only", nargs="*", default=[], help="these parts only")
    parser.add_argument("--jobs", type=int, default=2, help="attacks at a time")
    options, started = parser.parse_args(), time.time()
    plan = short_plan() if options.short else full_plan()
    plan = [row for row in plan if not options.only or row[0] in options.only]
    harness.warm_up()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        whole = harness.build(place / "whole")
        with ProcessPoolExecutor(options.jobs, get_context("fork")) as pool:
            coming = [pool.submit(attack, *row[:3], whole, place, row[3]) for row in plan]
            for future in coming:
                rows.append(row := future.result())
                said = (
                    f"{time.time() - started:6.0f} s  {row.attack}: {row.survived} of {row.tried}"
                )
                print(said, *row.complaints, sep="\n", file=sys.stderr, flush=True)
    print(table(rows), f"{time.time() - started:.0f} s", sep="\n")
    sys.exit(any(row.complaints or row.tried != row.survived for row in rows))


if __name__ == "__main__":
    main()
