"""base/, the student that the demo starts from: weights, log and command belong together."""

import hashlib
import json

import pytest
from conftest import ROOT, lines, script

BASE = ROOT / "base"
pytestmark = pytest.mark.skipif(not BASE.is_dir(), reason="base/ is not here: make base")


def test_weights_log_and_command_belong_together():
    meta = json.loads((BASE / "meta.json").read_text())
    for name, digest in meta["sha256"].items():
        assert hashlib.sha256((BASE / name).read_bytes()).hexdigest() == digest, name
    assert meta["finished"] and "3_qa/static.jsonl" in meta["command"]
    assert len(lines(BASE / "metrics.jsonl")) == meta["counts"]["steps"]
    assert (BASE / "model.safetensors").stat().st_size < 8e6
    # it has met the static questions and nothing else: none names a motion
    assert meta["config"]["data"] == "3_qa/static.jsonl" and not meta["config"]["rehearse"]


def test_it_finds_objects_again_and_knows_no_motion(tmp_path):
    """In rooms that it has not seen the box is found, and the way of the turn is guessed."""
    rooms = "--rooms 20 --room_px 84 --same_label_share 1 --heldout 1 --seed 5"
    script("01", "--run", tmp_path, *rooms.split())
    script("02", "--run", tmp_path, "--keep", "ends")
    script("03", "--run", tmp_path, "--box_step", 10)
    asked = ["--tasks", "A2", "S1", "S5", "--per_task", 60]
    script("06", "--run", tmp_path, "--checkpoint", BASE, *asked)
    scores = json.loads((tmp_path / "6_eval/base/results.json").read_text())["tasks"]
    for task in ("S1", "S5"):
        iou = scores[task]["metrics"]["iou"]
        assert iou["mean"] > 0.3 and iou["low"] > iou["blank"]["high"], (task, iou)
    assert scores["A2"]["metrics"]["direction"]["mean"] < 0.7
