"""tests/fire on a few cases of each part, and every fault that the whole of it found, as a small test of its own."""
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, lines, load, script, write_questions
from PIL import Image

TINY = ["--train", "full", "--freeze_vision", "False", "--lr", "1e-3", "--no_checkpointing"]


def test_a_few_of_every_attack_survive():
    """What `make fire` does in full. One table, its last line: everything survived, nothing lost, no traceback."""
    done = subprocess.run([sys.executable, ROOT / "tests/fire/run.py", "--short", "--jobs", "1"], capture_output=True, text=True)
    table = [line for line in done.stdout.splitlines() if line.startswith("all ")]
    assert done.returncode == 0 and len(table) == 1, done.stdout + done.stderr[-6000:]
    tried, survived, lost, tracebacks = (int(number.replace(",", "")) for number in table[0].split()[1:])
    assert tried == survived > 500 and lost == tracebacks == 0


# --- 01, 02, 03 ---
ROOMS = ["--rooms", 2, "--room_px", 32, "--room_trajectories", 1]


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    (tmp_path / "1_trajectories").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, os, sys, time\n"
                               f"lock = open({str(tmp_path / '1_trajectories/.lock')!r}, 'w'); fcntl.lockf(lock, fcntl.LOCK_EX)\n"
                               "lock.write('process 4711 on node3'); lock.flush(); print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    holder.stdout.readline()
    refused = script("01", "--run", tmp_path, *ROOMS, check=False)
    assert refused.returncode == 2 and "is being written by process 4711 on node3" in refused.stderr and refused.stderr.count("\n") == 1
    holder.kill()
    holder.wait()
    script("01", "--run", tmp_path, *ROOMS)  # a lock ends with its process, and a finished folder keeps none
    assert not list(tmp_path.rglob(".lock*"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "1_trajectories").mkdir()
    (tmp_path / "1_trajectories/trajectories.jsonl.part").symlink_to("/dev/full")
    done = script("01", "--run", tmp_path, *ROOMS, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "No space left on device" in last and str(tmp_path) in last and "Traceback" not in done.stderr


def test_durations_do_not_come_from_a_clock_that_may_jump():
    assert not [path.name for path in ROOT.glob("0*.py") if "time.time()" in path.read_text()]


def test_links_out_of_the_folder_of_photographs_are_refused(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in (photos / "mine.png", tmp_path / "secret.png"):
        Image.new("RGB", (64, 48), "red").save(path)
    (photos / "link.png").symlink_to("../secret.png")
    (photos / "inner.png").symlink_to("mine.png")
    (photos / "manifest.jsonl").write_text('{"image": "link.png"}\n{"image": "mine.png"}\n')
    for number, source in enumerate((photos, photos / "manifest.jsonl")):
        done = script("01", "--run", tmp_path / str(number), "--images", source, "--actions", "turns")
        assert "link.png" in done.stderr and "leaves" in done.stderr
        names = {record["scene_id"] for record in lines(tmp_path / str(number) / "1_trajectories/trajectories.jsonl")}
        assert names == ({"mine", "inner"} if source == photos else {"mine"})


@pytest.mark.parametrize("stage", ["01", "02", "03", "04", "05", "06"])
def test_brackets_in_brackets_are_a_bad_line_and_good_ones_have_their_numbers(stage, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"[" * 100_000 + b'\n{"b": 2}\n{"a": 3}')
    assert list(load(stage).read_lines(path, "a")) == [(1, {"a": 1}), (4, {"a": 3})]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and f"{path}:2: skipped" in said[0] and f"{path}:3: skipped, no a" in said[1]


def test_views_nested_too_deep_are_named(tmp_path, capsys):
    (tmp_path / "2_views").mkdir()
    (tmp_path / "2_views/views.jsonl").write_bytes(b"[" * 100_000 + b"\n")
    views, skipped = load("03").load_views(tmp_path, False)
    assert not views and skipped == {"broken record": 1} and "views.jsonl:1: skipped" in capsys.readouterr().err


# --- pictures ---
PICTURES = [load(stage) for stage in ("02", "04", "05", "06")]


@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_read_as_their_exif_tag_turns_them(turn, tmp_path):
    """The tag says where the file's first row and column lie; read, the red corner is where a viewer shows it."""
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:20, :30] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    row, column = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[turn]
    for stage in PICTURES:
        seen = np.asarray(stage.read_picture(tmp_path / "a.png"))
        assert seen.shape == ((60, 40, 3) if turn > 4 else (40, 60, 3))
        height, width, _ = seen.shape
        assert [bool(seen[height // 4 + height // 2 * y, width // 4 + width // 2 * x, 0]) for y in (0, 1) for x in (0, 1)].index(True) == 2 * row + column


def test_transparent_parts_are_white_and_16_bits_are_not_cut_off(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 4, 8))
    clear.save(tmp_path / "clear.png")
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    for stage in PICTURES:
        seen = np.asarray(stage.read_picture(tmp_path / "clear.png"))
        assert (seen[:, :4] == (0, 0, 255)).all() and (seen[:, 4:] == 255).all()
        assert np.abs(np.asarray(stage.read_picture(tmp_path / "deep.png"))[..., 0].astype(float) - ramp / 257).max() <= 0.5
        assert (np.asarray(stage.read_picture(tmp_path / "palette.png")) == 255).all()


@pytest.mark.parametrize("kind", ["bomb", "nan", "pipe", "broken chunk"])
def test_what_is_no_picture_is_a_reason_and_no_wait(kind, tmp_path):
    path = tmp_path / "a.png"
    if kind == "bomb":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0) + bytes(4))
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


def test_bad_questions_are_named_by_their_line(tmp_path, capsys):
    write_questions(tmp_path / "q.jsonl", tmp_path, scenes=1, per_scene=1)
    good = lines(tmp_path / "q.jsonl")[0]
    user, answer = good["messages"]
    bad = [good | {"messages": [user, answer | {"content": "half a character \ud800"}]}, good | {"messages": [{"content": user["content"]}, answer]},
           good | {"messages": [user | {"content": user["content"] + "word " * 10_000}, answer]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*bad, good]))
    for stage in STUDENTS:
        found = stage.read_questions(tmp_path / "q.jsonl", tmp_path)
        said = capsys.readouterr().err
        assert len(found) == 1 and found[0]["written"] == good["images"] and [f"q.jsonl:{n}: skipped" in said for n in (1, 2, 3, 4)] == [True] * 3 + [False]


def test_a_bad_question_does_not_take_its_neighbours_along(run, capsys):
    """Both ask about the same pictures; the second holds picture tokens of its own."""
    sft = load("04")
    student = sft.load_student(str(run / "4_base"), sft.torch.float32, "cpu", "eager", 10**6)
    one, two = sft.read_questions(run / "3_qa/sft.jsonl", run)[:2]
    two = two | {"messages": [two["messages"][0] | {"content": two["messages"][0]["content"] + "<|image_pad|>"}, two["messages"][1]]}
    assert sum(row["questions"] for row in sft.rows_of(student, [[one, two]], True, 10**6)) == 1
    assert "picture tokens of its own" in capsys.readouterr().err


def test_the_draws_of_05_do_not_depend_on_where_the_run_lies():
    refine = load("05")
    cfg, question = refine.Config(), {"messages": [], "written": ["2_views/a.png"], "scene_id": "s"}
    one, two = (refine.uniform_numbers(cfg, 3, {"question": question | {"images": [f"/{place}/2_views/a.png"]}}) for place in ("here", "there"))
    assert (one == two).all()


@pytest.mark.parametrize("stage", ["04", "05"])
def test_states_that_a_kill_at_the_very_end_left_are_deleted(stage, tmp_path, monkeypatch):
    """The folder is finished, half of a state is still there: the rerun has nothing to do but to delete it."""
    module, folder = load(stage), tmp_path / "run/out"
    (folder / "step_000002").mkdir(parents=True)
    (folder / "step_000002/config.json").write_text("{}")
    (folder / "meta.json").write_text(json.dumps({"finished": True}))
    monkeypatch.setenv("RANK", "0")
    module.start_processes(folder, offload=False)
    assert [path.name for path in folder.iterdir()] == ["meta.json"]


def test_a_bad_first_line_does_not_end_a_tiny_student(run, tmp_path):
    """Its tokenizer is made from the questions: only from those that can be read."""
    write_questions(tmp_path / "q.jsonl", tmp_path, scenes=2)
    (tmp_path / "q.jsonl").write_text('{"task_type": "A1", "images": [], "messages": [5]}\n' + (tmp_path / "q.jsonl").read_text())
    done = script("04", "--run", tmp_path, "--data", "q.jsonl", "--student", "tiny", *TINY, "--steps", 1, "--batch", 4, "--val_share", 0)
    assert "q.jsonl:1: skipped" in done.stderr


@pytest.mark.parametrize("fault", ["NaN", "missing", "unexpected", "code", "type"])
def test_weights_that_are_not_whole_are_refused_by_name(fault, run, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    for path in (run / "4_base").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    if fault == "NaN":
        weights[name][0, 0] = float("nan")
    elif fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        weights["model.language_model.more.weight"] = weights[name]
    elif fault == "code":
        config["auto_map"] = {"AutoConfig": "evil.Config"}
    else:
        config["text_config"]["hidden_size"] = "many"
    save_file({key: weight.clone() for key, weight in weights.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    word = {"NaN": f"{name} holds values that are not finite", "missing": f"missing {name}", "unexpected": "unexpected model.language_model.more.weight",
            "code": "code of its own", "type": "hidden_size"}[fault]
    for stage in STUDENTS:
        with pytest.raises(SystemExit) as ended:
            stage.load_student(str(tmp_path), stage.torch.float32, "cpu", "eager", 10**6)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and word in said and said.count("\n") == 1
