"""What the holes alone tell: held-out questions whose pictures show nothing but what warp cannot.

.venv/bin/python tests/grey_only.py runs/warp runs/grey [runs/fill]

paints every pixel brown that the first picture shows, leaves the grey holes of `02 --teacher warp`
(or, of the third run, which has the same trajectories by `--fill`, all that was painted), and
writes 300 held-out questions each of A1 and A2 for 06 --data_root. A student that still answers
them has learnt to read the holes or how they were filled, not the room.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

FILL, BROWN, PER_TASK = 127, (150, 110, 80), 300  # FILL: the grey of 02


def only_grey(rgb: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3]: `shown` where rgb is the grey of a hole or another one, BROWN elsewhere."""
    made = (rgb == FILL).all(-1, keepdims=True) | (rgb != shown).any(-1, keepdims=True)
    return np.where(made, shown, np.uint8(BROWN))


def main(run: Path, out: Path, filled: Path):
    records = [json.loads(line) for line in (run / "3_qa/heldout.jsonl").read_text().splitlines()]
    kept = []
    for task in ("A1", "A2"):
        kept += [record for record in records if record["task_type"] == task][:PER_TASK]
    for image in {image for record in kept for image in record["images"]}:
        (out / image).parent.mkdir(parents=True, exist_ok=True)
        rgb, shown = (np.array(Image.open(one / image).convert("RGB")) for one in (run, filled))
        Image.fromarray(only_grey(rgb, shown)).save(out / image)
    (out / "heldout.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))


if __name__ == "__main__":
    paths = [Path(name).resolve() for name in sys.argv[1:]]
    if not 2 <= len({*paths}) == len(paths) <= 3 or not (paths[0] / "3_qa/heldout.jsonl").is_file():
        why = "RUN is a finished run of `02 --teacher warp`, OUT another folder"
        print(f"grey_only.py RUN OUT [FILLED]: {why}", file=sys.stderr)
        sys.exit(2)
    main(*paths[:2], paths[-1] if len(paths) == 3 else paths[0])
