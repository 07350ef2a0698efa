"""python tests/same_losses.py LOGGED AGAIN: the losses of a run's first steps are those logged."""

import json
import sys
from pathlib import Path


def losses(folder: str) -> list[float]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    logged, again = losses(sys.argv[1]), losses(sys.argv[2])
    if not again or again != logged[: len(again)]:
        sys.exit(f"{sys.argv[2]}: the losses are not those of {sys.argv[1]}")
    print(f"{len(again)} losses, all as in {sys.argv[1]}/metrics.jsonl")
