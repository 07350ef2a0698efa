"""The road 01 -> 06, tiny, on a CPU: rooms as subprocesses, photographs within this process."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from conftest import lines, load, script
from PIL import Image, ImageFilter

STAGES = ["01", "02", "03", "04", "05", "06"]
TRAIN = "--train full --freeze_vision False --lr 1e-3 "
ROAD = {  # the flags of the three last stages
    "04": TRAIN + "--student tiny --steps 3 --batch 16",
    "05": TRAIN + "--steps 2 --prompts 4 --max_new_tokens 8",
    "06": "--per_task 4 --max_new_tokens 8",
}


def call(capsys, stage: str, run: Path, flags: str = "") -> tuple[int, str, str]:
    """(status, stdout, stderr) of a user's call, within this process: it saves the start."""
    module, argv, status = load(stage), sys.argv, 0
    sys.argv = [module.__file__, "--run", str(run), *flags.split()]
    capsys.readouterr()
    dist.destroy_process_group()  # of conftest.py: 04 and 05 begin and end their own
    try:
        module.run(module.main, module.Config)
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    return status, *capsys.readouterr()


def test_rooms_through_all_six(tmp_path):
    """With the numbers of the demo's recipes, but few rooms and steps."""
    run, rooms = tmp_path / "rooms", "--rooms 24 --heldout 0.5"
    for stage, flags in {"01": rooms, "02": "--workers 2", "03": "", **ROAD}.items():
        done = script(stage, "--run", run, "--recipe", "tiny", *flags.split(), fresh=True)
    report = run / "6_eval/refine/report.html"
    assert str(report) in done.stdout.splitlines()[-1] and report.is_file()
    results = json.loads(report.with_name("results.json").read_text())
    assert set(results["tasks"]) == {"A1", "A2", "A3", "A4", "D1", "D2", "D3", "D4", "all"}
    meta, chain = json.loads(report.with_name("meta.json").read_text()), []
    while meta:
        chain.append(meta["stage"][:2])
        meta = meta["parent"]
    assert chain == STAGES[::-1]  # a checkpoint can be traced to the rooms it was taught in
    trained = [q for name in ("static", "sft", "grpo") for q in lines(run / f"3_qa/{name}.jsonl")]
    heldout = {question["scene_id"] for question in lines(run / "3_qa/heldout.jsonl")}
    assert heldout and not heldout & {question["scene_id"] for question in trained}
    again = script("01", "--run", run, "--recipe", "tiny", *rooms.split())
    assert "nothing to do" in again.stdout


def test_photographs_through_all_six(tmp_path, capsys):
    """Three photographs turn; a cut JPEG, text called .png and a one-pixel picture are left out."""
    photos, run = tmp_path / "photos", tmp_path / "mine"
    photos.mkdir()
    draw = np.random.default_rng(0)
    for k in range(3):
        noise = Image.fromarray(draw.integers(0, 256, (40, 60, 3), dtype=np.uint8))
        noise = noise.resize((480, 320), Image.BICUBIC)
        noise.filter(ImageFilter.GaussianBlur(1)).save(photos / f"good{k}.jpg")
    (photos / "cut.jpg").write_bytes((photos / "good0.jpg").read_bytes()[:3000])
    (photos / "text.png").write_text("this is no picture")
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    flags = {
        "01": f"--images {photos} --recipe photos --photo_trajectories 8",
        "02": "--teacher pan --workers 1",
        "03": "",
        **ROAD,
    }
    said = {}
    for stage, words in flags.items():
        status, _, said[stage] = call(capsys, stage, run, words)
        assert status == 0, (stage, said[stage])
    for name in ("cut.jpg", "text.png", "dot.png"):
        assert name in said["01"]
    views = lines(run / "2_views/views.jsonl")
    assert {view["scene_id"] for view in views} == {"good0", "good1", "good2"}
    errors = [view["qc"]["turn_error_deg"] for view in views]
    errors = [abs(error) for error in errors if error is not None]
    assert errors and max(errors) <= 0.5


@pytest.mark.parametrize("stage", STAGES)
def test_help_documents_every_setting(stage, capsys):
    status, text, _ = call(capsys, stage, "", "--help")
    assert status == 0 and "Reads" in text and "Writes" in text
    assert text.count("(default:") >= 8


@pytest.mark.parametrize("stage", STAGES)
def test_bad_calls_are_one_line_and_status_2(stage, tmp_path, capsys):
    for flags in ("", "--nonsense 1", "--seed many"):
        status, _, said = call(capsys, stage, tmp_path / "none", flags)
        assert status == 2 and Path(load(stage).__file__).name in said, flags
