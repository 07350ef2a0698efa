"""tests/fire on a few cases of each part, and every fault it found as a small test of its own."""

import json
import os
import struct
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ROOT, lines, load, script, write_questions
from PIL import Image
from safetensors.torch import load_file, save_file
from test_road import STAGES, call

from kernels import student

TRAIN = "--train full --freeze_vision False --lr 1e-3 --no_checkpointing "


def test_a_few_of_every_attack_survive():
    """What `make fire` does in full: everything survives, nothing is lost, no traceback."""
    done = script("tests/fire/run", "--short", "--jobs", 1, check=False)
    sums = [line for line in done.stdout.splitlines() if line.startswith("all ")]
    assert done.returncode == 0 and len(sums) == 1, done.stdout + done.stderr[-6000:]
    tried, survived, lost, tracebacks = (int(n.replace(",", "")) for n in sums[0].split()[1:])
    assert tried == survived > 500 and lost == tracebacks == 0


# --- 01, 02, 03 ---
ROOMS = "--rooms 2 --room_px 32 --room_trajectories 1"
HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_told_that_another_one_writes_the_folder(tmp_path, capsys):
    (tmp_path / "1_trajectories").mkdir()
    command = [sys.executable, "-c", HOLD, tmp_path / "1_trajectories/.lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        status, _, said = call(capsys, "01", tmp_path, ROOMS)
        holder.kill()
    assert status == 2 and "is being written by another process" in said and said.count("\n") == 1
    # a lock ends with its process, and a finished folder keeps none
    assert call(capsys, "01", tmp_path, ROOMS)[0] == 0
    assert not list(tmp_path.rglob(".lock*"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_line(tmp_path, capsys):
    (tmp_path / "1_trajectories").mkdir()
    (tmp_path / "1_trajectories/trajectories.jsonl.part").symlink_to("/dev/full")
    status, _, said = call(capsys, "01", tmp_path, ROOMS)
    last = said.splitlines()[-1]
    assert status == 2 and "No space left on device" in last and str(tmp_path) in last


def test_durations_do_not_come_from_a_clock_that_may_jump():
    scripts = ROOT.glob("0*.py")
    assert not [path.name for path in scripts if "time.time()" in path.read_text()]


def test_links_out_of_the_folder_of_photographs_are_refused(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in (photos / "mine.png", tmp_path / "secret.png"):
        Image.new("RGB", (64, 48), "red").save(path)
    (photos / "link.png").symlink_to("../secret.png")
    (photos / "inner.png").symlink_to("mine.png")
    manifest = photos / "manifest.jsonl"
    manifest.write_text('{"image": "link.png"}\n{"image": "mine.png"}\n')
    for source, expected in ((photos, {"mine", "inner"}), (manifest, {"mine"})):
        run = tmp_path / source.name / "run"
        _, _, said = call(capsys, "01", run, f"--images {source} --actions turns")
        assert "link.png" in said and "leaves" in said
        made = lines(run / "1_trajectories/trajectories.jsonl")
        assert {record["scene_id"] for record in made} == expected


@pytest.mark.parametrize("stage", STAGES)
def test_brackets_in_brackets_are_a_bad_line_and_good_ones_have_their_numbers(
    stage, tmp_path, capsys
):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"[" * 100_000 + b'\n{"b": 2}\n{"a": 3}')
    assert list(load(stage).read_lines(path, "a")) == [(1, {"a": 1}), (4, {"a": 3})]
    said = capsys.readouterr().err.splitlines()
    assert [f"{path}:{n}: skipped" in line for n, line in zip((2, 3), said, strict=True)]
    assert "with a" in said[1]


# --- pictures ---
PICTURES = [student, load("02"), load("06")]


@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_read_as_their_exif_tag_turns_them(turn, tmp_path):
    """The tag says where the file's first row and column lie: the red corner is seen there."""
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:20, :30] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    corner = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1), (1, 1), (1, 0)][turn - 1]
    for stage in PICTURES:
        seen = np.asarray(stage.read_picture(tmp_path / "a.png"))
        assert seen.shape == ((60, 40, 3) if turn > 4 else (40, 60, 3))
        red = seen[10::20, 10::20, 0] > 0  # a sample in each 20 x 20 block
        ys, xs = red.nonzero()
        assert (ys.mean() > red.shape[0] / 2 - 0.5, xs.mean() > red.shape[1] / 2 - 0.5) == corner


def test_transparency_is_ignored_and_16_bits_are_refused(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    for stage in PICTURES:
        for name in ("clear.png", "palette.png"):
            assert (np.asarray(stage.read_picture(tmp_path / name)) == (255, 0, 0)).all()
        with pytest.raises(ValueError, match="deep.png: 16 or 32 bits"):
            stage.read_picture(tmp_path / "deep.png")


@pytest.mark.parametrize("kind", ["bomb", "nan", "pipe", "broken chunk"])
def test_what_is_no_picture_is_a_reason_and_no_wait(kind, tmp_path):
    path = tmp_path / "a.png"
    if kind == "bomb":
        size = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
        head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"
        path.write_bytes(head + size + bytes(4))
    elif kind == "nan":
        Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(path, "TIFF")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        Image.new("RGB", (64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:40] + bytes(60))
    for stage in PICTURES:
        with pytest.raises(ValueError, match="a.png: ."):
            stage.read_picture(path)


# --- questions and weights, 04 05 06 ---
STUDENTS = [load(stage) for stage in ("04", "05", "06")]


def load_student(stage, folder):
    return stage.load_student(str(folder), stage.torch.float32, "cpu", "eager", 10**6)


def test_bad_questions_are_named_by_their_line(tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    write_questions(path, tmp_path, scenes=1, per_scene=1)
    good = lines(path)[0]
    user, answer = good["messages"]
    text = user["content"]
    chats = [
        [user, answer | {"content": "half a character \ud800"}],
        [{"content": text}, answer],
        [user | {"content": text + "word " * 10_000}, answer],
        [user, answer],
    ]
    path.write_text("".join(json.dumps(good | {"messages": chat}) + "\n" for chat in chats))
    for stage in STUDENTS:
        (found,) = stage.read_questions(path, tmp_path)
        said = capsys.readouterr().err
        assert found["written"] == good["images"]
        named = [f"q.jsonl:{number}: skipped" in said for number in (1, 2, 3, 4)]
        assert named == [True, True, True, False]


def test_a_bad_question_does_not_take_its_neighbours_along(run, capsys):
    """Both ask about the same pictures; the second holds picture tokens of its own."""
    sft = load("04")
    student = load_student(sft, run / "4_base")
    one, two = sft.read_questions(run / "3_qa/sft.jsonl", run)[:2]
    user, answer = two["messages"]
    user = user | {"content": user["content"] + "<|image_pad|>"}
    pair = [one, two | {"messages": [user, answer]}]
    rows = sft.rows_of(student, pair, sft.Config())
    assert sum(len(row["questions"]) for row in rows) == 1
    assert "picture tokens of its own" in capsys.readouterr().err


def test_the_draws_of_05_do_not_depend_on_where_the_run_lies(monkeypatch):
    refine, drawn = load("05"), []

    def generate(student, prompts, tokens, samples, uniforms, temperature):
        drawn.append(uniforms)
        raise InterruptedError  # no response is needed

    monkeypatch.setattr(refine, "generate_groups", generate)
    for images in (["/here/2_views/a.png"], ["/there/2_views/a.png"]):
        question = {"messages": [], "written": ["2_views/a.png"], "images": images}
        with pytest.raises(InterruptedError):
            refine.roll_out(Mock(), [{"question": question, "ids": [1]}], 3, {}, refine.Config())
    assert (drawn[0] == drawn[1]).all()


@pytest.mark.parametrize("stage", ["04", "05"])
def test_half_a_checkpoint_has_no_good_name(stage, tmp_path, monkeypatch):
    """A kill while checkpoints are deleted leaves whole ones, and the next deletion takes all."""
    module = load(stage)

    def killed(path):
        (path / "state").rmdir()
        raise InterruptedError

    for step in (1, 2):
        (tmp_path / f"step_{step:06}/state").mkdir(parents=True)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(module.shutil, "rmtree", killed)
        module.drop_checkpoints(tmp_path)
    whole = list(tmp_path.glob("step_??????"))
    assert len(whole) == 1 and (whole[0] / "state").is_dir()
    module.drop_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_bad_first_line_does_not_end_a_tiny_student(tmp_path, capsys):
    """Its tokenizer is made from the questions: only from those that can be read."""
    path = tmp_path / "q.jsonl"
    write_questions(path, tmp_path, scenes=2)
    bad = '{"task_type": "A1", "images": [], "messages": [5]}\n'
    path.write_text(bad + path.read_text())
    flags = TRAIN + "--data q.jsonl --student tiny --steps 1 --batch 4 --val_share 0"
    status, _, said = call(capsys, "04", tmp_path, flags)
    assert status == 0 and "q.jsonl:1: skipped" in said


NAME = "model.language_model.layers.0.mlp.up_proj.weight"
EXTRA = "model.language_model.more.weight"
REFUSALS = {
    "NaN": f"not finite: {NAME}",
    "missing": f"missing, unexpected or not finite: {NAME}",
    "unexpected": f"missing, unexpected or not finite: {EXTRA}",
    "type": "hidden_size",
    "code": "names code of its own",
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_weights_that_are_not_whole_are_refused_by_name(fault, run, tmp_path, capsys):
    for path in (run / "4_base").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    if fault == "NaN":
        weights[NAME][0, 0] = float("nan")
    elif fault == "missing":
        del weights[NAME]
    elif fault == "unexpected":
        weights[EXTRA] = weights[NAME].clone()
    elif fault == "type":
        config["text_config"]["hidden_size"] = "many"
    else:
        config["auto_map"] = {"AutoConfig": "evil.Config"}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    for stage in STUDENTS:
        with pytest.raises(SystemExit) as ended:
            load_student(stage, tmp_path)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and REFUSALS[fault] in said and said.count("\n") == 1
