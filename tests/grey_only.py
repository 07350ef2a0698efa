"""What the grey alone tells: held-out questions whose pictures show nothing but warp's holes.

.venv/bin/python tests/grey_only.py runs/ablations/warp runs/ablations/grey

paints every pixel brown that is not grey (what warp cannot show) and writes 300 held-out
questions each of A1 and A2 for 06 --data_root. A student that still answers them has learnt to
read the holes, not the room.
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
    kept = []
    for task in ("A1", "A2"):
        kept += [record for record in records if record["task_type"] == task][:PER_TASK]
    for image in {image for record in kept for image in record["images"]}:
        (out / image).parent.mkdir(parents=True, exist_ok=True)
        rgb = np.array(Image.open(run / image).convert("RGB"))
        Image.fromarray(only_grey(rgb)).save(out / image)
    (out / "heldout.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))


if __name__ == "__main__":
    paths = [Path(name).resolve() for name in sys.argv[1:]]
    if len({*paths}) != 2 or not (paths[0] / "3_qa/heldout.jsonl").is_file():
        why = (
            "grey_only.py RUN OUT: RUN is a finished run of `02 --teacher warp`, OUT another folder"
        )
        print(why, file=sys.stderr)
        sys.exit(2)
    main(*paths)
