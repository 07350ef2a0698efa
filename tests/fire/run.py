"""make fire: every attack on every stage, and one table of what survived. Exit status 1 unless all did, and nothing was lost.

    python tests/fire/run.py [--short] [--only PART ...] [--jobs 2]        parts: kill disk pictures jsonl weights properties long_run
"""
import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}  # one thread: forks lose the others
sys.path.insert(0, str(Path(__file__).parent))

import disk  # noqa: E402
import harness  # noqa: E402
import jsonl  # noqa: E402
import kill  # noqa: E402
import long_run  # noqa: E402
import pictures  # noqa: E402
import weights  # noqa: E402

ALL, READERS, STUDENTS = ("01", "02", "03", "04", "05", "06"), ("02", "03", "04", "05", "06"), ("04", "05", "06")


def attack(part: str, name: str, stage: str, whole: Path, place: Path, count: int) -> harness.Row:
    """One row of the table, in a folder of its own."""
    import properties  # loads the scripts as modules: not in the process that forks
    module = {"properties": properties}.get(part) or globals()[part]
    arguments = {"whole": whole, "place": place, "stage": stage, "times": count, "most": count, "count": count, "examples": count}
    function = getattr(module, name)
    with tempfile.TemporaryDirectory(dir=place) as own:
        arguments["place"] = Path(own)
        wanted = function.__code__.co_varnames[:function.__code__.co_argcount]
        return function(**{key: arguments[key] for key in wanted})


def plan(short: bool) -> list[tuple[str, str, str, int]]:
    """(part, function, stage, how many cases) of every row."""
    if short:  # what `make test` has time for: something of each part
        return [*[("kill", "inside_every_write", stage, 1) for stage in ALL], ("kill", "at_random_moments", "03", 2), ("disk", "trouble", "03", 1),
                ("disk", "deleted_input", "06", 1), ("disk", "two_at_once", "03", 1), ("disk", "real_disk", "", 1), ("pictures", "through_01", "01", 1),
                ("pictures", "through_02", "02", 1), ("pictures", "through_training", "06", 1), ("jsonl", "views", "03", 60),
                ("jsonl", "questions", "06", 60), ("weights", "refused", "06", 3), ("properties", "check", "", 10)]
    rows = [("long_run", "steps", "04", 2000), ("long_run", "rooms", "02", 5000)]
    rows += [("kill", "at_random_moments", stage, 20) for stage in ALL]
    rows += [("kill", "inside_every_write", stage, 60 if stage < "04" else 40) for stage in ALL]
    rows += [("disk", "trouble", stage, 5) for stage in ALL] + [("disk", "deleted_input", stage, 6) for stage in READERS]
    rows += [("disk", name, stage, 1) for name in ("two_at_once", "clock") for stage in ALL] + [("disk", "real_disk", "", 1)]
    rows += [("pictures", "through_01", "01", 1), ("pictures", "through_02", "02", 1)]
    rows += [("pictures", "through_training", stage, 1) for stage in STUDENTS]
    rows += [("jsonl", "trajectories", "02", 200), ("jsonl", "views", "03", 200), *[("jsonl", "questions", stage, 200) for stage in STUDENTS]]
    return rows + [("weights", "refused", stage, 99) for stage in STUDENTS] + [("properties", "check", "", 300)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few cases of each")
    parser.add_argument("--only", nargs="*", default=[], help="these parts only")
    parser.add_argument("--jobs", type=int, default=2, help="attacks at a time")
    options, started = parser.parse_args(), time.time()
    todo = [row for row in plan(options.short) if not options.only or row[0] in options.only]
    harness.warm_up()
    with tempfile.TemporaryDirectory() as place:
        whole = harness.build(Path(place) / "whole")
        with ProcessPoolExecutor(options.jobs, get_context("fork")) as pool:
            rows = []
            coming = [pool.submit(attack, part, name, stage, whole, Path(place), count) for part, name, stage, count in todo]
            for future in coming:
                rows.append(row := future.result())
                print(f"{time.time() - started:6.0f} s  {row.attack}: {row.survived} of {row.tried}", *row.complaints, sep="\n", file=sys.stderr, flush=True)
    lines, total = {}, [0, 0, 0, 0]  # an attack on several stages is one line
    for row in rows:
        stage, title = row.attack.split(" ", 1) if row.attack[0] == "0" else ("", row.attack)
        counts = (row.tried, row.survived, row.lost, row.tracebacks)
        stages, sums = lines.get(title, ([], [0, 0, 0, 0]))
        lines[title] = [*stages, stage], [a + b for a, b in zip(sums, counts)]
        total = [a + b for a, b in zip(total, counts)]
    print(f"\n{'attack':38}{'stages':19}{'tried':>7}{'survived':>10}{'lost':>6}{'tracebacks':>12}")
    for title, (stages, (tried, survived, lost, traced)) in [*lines.items(), ("all", ([], total))]:
        print(f"{title:38}{' '.join(stages):19}{tried:7,}{survived:10,}{lost:6,}{traced:12,}")
    print(f"{time.time() - started:.0f} s")
    sys.exit(any(row.complaints for row in rows) or total[0] != total[1] or any(total[2:]))


if __name__ == "__main__":
    main()
