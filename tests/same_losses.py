"""python tests/same_losses.py LOGGED AGAIN: the losses of a run's first steps are those logged.

On the processor that made the log they are equal; another one rounds otherwise, and training makes
the difference grow: 2 % are allowed.
"""

import json
import sys
from pathlib import Path


def losses(folder: str) -> list[float]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    again = losses(sys.argv[2])
    logged = losses(sys.argv[1])[: len(again)]
    off = [abs(b / a - 1) for a, b in zip(logged, again, strict=True)]
    print(f"{len(off)} losses, {off.count(0)} equal, at most {max(off, default=1):.2%} apart")
    if max(off, default=1) > 0.02:
        sys.exit(f"{sys.argv[2]}: the losses are not those of {sys.argv[1]}")
