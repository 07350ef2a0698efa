"""base/, the student that the demo starts from: its weights, log and command belong together, and it can what a VLM brings along."""
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
    assert meta["finished"] and "3_qa/static.jsonl" in meta["command"] and meta["config"]["data"] == "3_qa/static.jsonl"
    assert len(lines(BASE / "metrics.jsonl")) == meta["counts"]["steps"] and (BASE / "model.safetensors").stat().st_size < 8e6
    assert not meta["config"]["rehearse"]  # it has met the static questions and nothing else: none names a motion


def test_it_finds_objects_again_and_knows_no_motion(tmp_path):
    """Rooms that it has not seen: the same box is found in another picture far better than by repeating it; which way the camera turned is guessed."""
    script("01", "--run", tmp_path, "--rooms", 20, "--room_px", 84, "--same_label_share", 1, "--heldout", 1, "--seed", 5)
    script("02", "--run", tmp_path, "--keep", "ends")
    script("03", "--run", tmp_path, "--box_step", 10)
    script("06", "--run", tmp_path, "--checkpoint", BASE, "--tasks", "A2", "S1", "S5", "--per_task", 60)
    scores = json.loads((tmp_path / "6_eval/base/results.json").read_text())["tasks"]
    for task in ("S1", "S5"):
        iou = scores[task]["metrics"]["iou"]
        assert iou["mean"] > 0.3 and iou["low"] > iou["blank"]["high"], (task, iou)
    assert scores["A2"]["metrics"]["direction"]["mean"] < 0.7
