"""python tests/same_losses.py LOGGED AGAIN [COMMAND]: a run's first losses are those logged.

COMMAND makes AGAIN; it is ended after STEPS steps. On the processor that made the log they are
equal; another one rounds otherwise: how far apart they are is printed.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

STEPS = 400


def losses(folder: str) -> list[float]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def begin(command: list[str], folder: str):
    """Run the command until it has logged STEPS steps."""
    process, log = subprocess.Popen(command), Path(folder, "metrics.jsonl")
    while process.poll() is None and (not log.is_file() or len(losses(folder)) < STEPS):
        time.sleep(1)
    process.terminate()
    process.wait()


if __name__ == "__main__":
    if sys.argv[3:]:
        begin(sys.argv[3:], sys.argv[2])
    again = losses(sys.argv[2])
    logged = losses(sys.argv[1])[: len(again)]
    off = [abs(b / a - 1) for a, b in zip(logged, again, strict=True)]
    print(f"{len(off)} losses, {off.count(0)} equal, at most {max(off, default=1):.2%} apart")
    if max(off, default=1) > 0:
        sys.exit(f"{sys.argv[2]}: the losses are not those of {sys.argv[1]}")
