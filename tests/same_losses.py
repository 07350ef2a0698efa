"""python tests/same_losses.py LOGGED AGAIN [COMMAND]: a run's first losses are those logged.

COMMAND makes AGAIN; it is ended after STEPS steps. On the processor that made the log they are
equal. Another one rounds otherwise: there the first that differs differs in the last digits, and
training makes more of it from then on. Other data, weights or settings are far apart at once. Ends
with status 1 unless all are equal, and says where it looks like another processor.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

STEPS = 400
ROUNDED, GROWN = 1e-6, 0.05  # the first difference of another processor, and any later one


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
    apart = [step for step, share in enumerate(off, 1) if share > 0]
    print(f"{len(off)} losses, {off.count(0)} equal, at most {max(off, default=1):.2%} apart")
    if apart and off[apart[0] - 1] <= ROUNDED and max(off) <= GROWN:
        print(f"from step {apart[0]} on, by {off[apart[0] - 1]:.0e}: as another processor rounds")
    if apart or not off:
        sys.exit(f"{sys.argv[2]}: the losses are not those of {sys.argv[1]}")
