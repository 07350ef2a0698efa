"""What the grey alone tells: the held-out A1 and A2 questions of a run of `warp`, every pixel painted brown that is not grey (what warp cannot show).

.venv/bin/python tests/grey_only.py runs/ablations/warp runs/ablations/grey writes 300 questions a task into runs/ablations/grey, for 06 --data_root.
A student that still answers them has learnt to read the holes, not the room.
"""
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

FILL, BROWN, PER_TASK = 127, (150, 110, 80), 300  # FILL: the grey of 02


def only_grey(rgb: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3]: the pixels of FILL as they are, all others BROWN."""
    return np.where((rgb == FILL).all(-1, keepdims=True), rgb, np.uint8(BROWN))


def main(run: Path, out: Path):
    records = [json.loads(line) for line in (run / "3_qa/heldout.jsonl").read_text().splitlines()]
    kept = [record for task in ("A1", "A2") for record in [one for one in records if one["task_type"] == task][:PER_TASK]]
    for image in {image for record in kept for image in record["images"]}:
        (out / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(only_grey(np.array(Image.open(run / image).convert("RGB")))).save(out / image)
    (out / "heldout.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1], "3_qa/heldout.jsonl").is_file() or Path(sys.argv[1]).resolve() == Path(sys.argv[2]).resolve():
        print("grey_only.py: RUN OUT, where RUN is a finished run of `02 --teacher warp` with RUN/3_qa/heldout.jsonl, OUT another folder", file=sys.stderr)
        sys.exit(2)
    main(*map(Path, sys.argv[1:]))
