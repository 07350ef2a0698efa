"""base/, the student that the demo starts from: weights, log and command belong together."""

import hashlib
import json

import pytest
from conftest import ROOT, lines

BASE = ROOT / "base"
pytestmark = pytest.mark.skipif(not BASE.is_dir(), reason="base/ is not here: make base")


def test_weights_log_and_command_belong_together():
    meta = json.loads((BASE / "meta.json").read_text())
    for name, digest in meta["sha256"].items():
        assert hashlib.sha256((BASE / name).read_bytes()).hexdigest() == digest, name
    assert meta["finished"] and meta["command"] == "04_train_sft.py --run runs/base --recipe base"
    assert len(lines(BASE / "metrics.jsonl")) == meta["counts"]["steps"]
    assert (BASE / "model.safetensors").stat().st_size < 8e6
    # it has met the static questions and nothing else: none names a motion
    assert meta["config"]["data"] == ["3_qa/static.jsonl"]
