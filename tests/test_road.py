"""The road 01 -> 06 as subprocesses, tiny, on a CPU: rooms through the simulator, photographs through warp."""
import json

import numpy as np
import pytest
from conftest import script
from PIL import Image, ImageFilter

TINY = ["--train", "full", "--freeze_vision", "False", "--lr", "1e-3"]


def train_and_examine(run):
    script("04", "--run", run, "--student", "tiny", *TINY, "--steps", 3, "--batch", 16)
    script("05", "--run", run, *TINY, "--steps", 2, "--prompts", 4, "--max_new_tokens", 8)
    return script("06", "--run", run, "--per_task", 4, "--max_new_tokens", 8)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rooms_through_all_six(tmp_path):
    run = tmp_path / "rooms"
    script("01", "--run", run, "--rooms", 24, "--room_px", 84, "--same_label_share", 1, "--heldout", 0.5)
    script("02", "--run", run, "--keep", "ends", "--workers", 2)
    script("03", "--run", run, "--box_step", 10)
    done = train_and_examine(run)
    results = json.loads((run / "6_eval/refine/results.json").read_text())
    assert set(results["tasks"]) >= {"A1", "A2", "A3", "A4", "D1", "D2", "D3"}
    assert "report.html" in done.stdout.splitlines()[-1] and (run / "6_eval/refine/report.html").is_file()
    meta = json.loads((run / "6_eval/refine/meta.json").read_text())
    chain = []
    while meta:
        chain.append(meta["stage"][:2])
        meta = meta["parent"]
    assert chain == ["06", "05", "04", "03", "02", "01"]  # a checkpoint can be traced to the rooms it was taught in
    trained = {q["scene_id"] for name in ("static", "sft", "grpo") for q in lines(run / f"3_qa/{name}.jsonl")}
    assert not trained & {q["scene_id"] for q in lines(run / "3_qa/heldout.jsonl")}
    assert "nothing to do" in script("01", "--run", run, "--rooms", 24, "--room_px", 84, "--same_label_share", 1, "--heldout", 0.5).stdout


def test_photographs_through_all_six(tmp_path):
    """Three photographs turn; a truncated JPEG, text called .png and a one-pixel picture are named and left out."""
    photos, run = tmp_path / "photos", tmp_path / "mine"
    photos.mkdir()
    draw = np.random.default_rng(0)
    for k in range(3):
        noise = Image.fromarray(draw.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((480, 320), Image.BICUBIC)
        noise.filter(ImageFilter.GaussianBlur(1)).save(photos / f"good{k}.jpg")
    (photos / "cut.jpg").write_bytes((photos / "good0.jpg").read_bytes()[:3000])
    (photos / "text.png").write_text("this is no picture")
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    first = script("01", "--run", run, "--images", photos, "--actions", "turns", "--photo_trajectories", 6)
    for name in ("cut.jpg", "text.png", "dot.png"):
        assert name in first.stderr
    script("02", "--run", run, "--teacher", "warp")
    views = lines(run / "2_views/views.jsonl")
    assert {view["scene_id"] for view in views} == {"good0", "good1", "good2"}
    errors = [view["qc"]["turn_error_deg"] for view in views if view["qc"]["turn_error_deg"] is not None]
    assert errors and max(map(abs, errors)) <= 0.5
    script("03", "--run", run)
    train_and_examine(run)


@pytest.mark.parametrize("stage", ["01", "02", "03", "04", "05", "06"])
def test_help_documents_every_setting(stage):
    text = script(stage, "--help").stdout
    assert "Reads" in text and "Writes" in text
    assert text.count("(default:") >= 8


@pytest.mark.parametrize("stage", ["01", "02", "03", "04", "05", "06"])
def test_bad_calls_are_one_line_and_status_2(stage, tmp_path):
    for arguments in (["--run", tmp_path / "none"], ["--nonsense", 1], ["--seed", "many"]):
        done = script(stage, *arguments, check=False, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (arguments, done.stderr[-1000:])
