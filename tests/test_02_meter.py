"""Stage 2 measures its teachers: exact views pass, planted faults are named.

And how far a teacher really moves is found and made up for.
"""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bench_simulator import bench_room
from conftest import ROOT, copy_of, lines, load, script
from PIL import Image, ImageFilter

SCRIPT, PHOTOS = ROOT / "02_imagine_views.py", ROOT.parent / "shared/photos"
FRAMES = 8  # of a planted trajectory


@pytest.fixture(scope="module")
def stage():
    return load("02")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> Path:
    """12 rooms with 7 single-step trajectories each."""
    run = tmp_path_factory.mktemp("rooms")
    script("01", "--run", run, "--rooms", 12, "--room_px", 84, "--shares", 1, 0, 0)
    return run


@pytest.fixture(scope="module")
def done(stage, rooms, tmp_path_factory) -> Path:
    """The same with every frame, by the simulator."""
    run = copy_of(rooms, tmp_path_factory.mktemp("done"))
    stage.main(stage.Config(run=str(run), keep="all", workers=1))
    return run


def pose(yaw_deg: float = 0.0, x_m: float = 0.0, z_m: float = 0.0) -> np.ndarray:
    """c2w of a camera that moved, then turned; + is right (DESIGN 4)."""
    c, s = math.cos(math.radians(yaw_deg)), math.sin(math.radians(yaw_deg))
    return np.array([[c, 0, s, x_m], [0, 1, 0, 0], [-s, 0, c, z_m], [0, 0, 0, 1.0]])


def path_to(yaw_deg: float = 0.0, x_m: float = 0.0, z_m: float = 0.0) -> np.ndarray:
    """[FRAMES,4,4] in equal steps."""
    return np.stack([pose(t * yaw_deg, t * x_m, t * z_m) for t in np.linspace(0, 1, FRAMES)])


def views(stage, seed: int, c2w: np.ndarray, px: int = 84) -> np.ndarray:
    room, K = bench_room(seed), stage.intrinsics(px, px, 90.0)
    start = stage.start_pose(room, [0.0, 0.0, 37.0 * seed])
    return np.stack([stage.render(room, start @ one, K)[0] for one in c2w])


def qc_of(stage, frames: np.ndarray, asked: np.ndarray, keys=None, **settings) -> dict:
    n, K = len(asked), stage.intrinsics(*frames.shape[2:0:-1], 90.0)
    cfg = stage.Config(**settings)
    return stage.quality(stage.Views(frames, K), [*range(n)], asked, keys or [0, n - 1], cfg)


TURNS, MOVES = [40, -40, 20, -60], [(0, 0.6), (0, -0.5), (0.5, 0)]
SEEDS = range(4)


# --- exact views pass
def test_exact_views_of_rooms_pass_and_have_no_error(stage, done):
    """The meter's resolution is one column of the cylinder, a 96th of the field of view."""
    assert len(lines(done / "2_views/views.jsonl")) == 84
    for record in lines(done / "2_views/views.jsonl"):
        qc, (action, value) = record["qc"], record["actions"][0]
        assert qc["passed"] and qc["why"] == "" and qc["holes"] == 0
        if action.startswith("turn") and value <= 0.74 * record["fov_x_deg"]:
            assert abs(qc["turn_error_deg"]) < record["fov_x_deg"] / 96 and qc["match"] > 0.8
            sign = 1 if action == "turn_right" else -1
            assert qc["over_turn_deg"] == sign * qc["turn_error_deg"]
        else:
            assert qc["turn_error_deg"] is None and qc["over_turn_deg"] is None


# (width, depth, height, texture, start, actions): from a gay wall to a plain one, or along walls
# of two colours
PLAIN = [
    (
        6.74,
        5.05,
        2.63,
        25,
        [1.29, 0.91, 130.0],
        [("turn_left", 70), ("shift_left", 1.5), ("turn_left", 50)],
    ),
    (5.77, 7.24, 3.08, 1631551757, [-2.22, 2.95, 100.0], [("turn_left", 60)]),
    (7.37, 8.01, 2.83, 1571461596, [0.91, -3.7, 240.0], [("turn_left", 50)]),
    (5.36, 5.65, 3.02, 1937863242, [-2.2, 0.2, 180.0], [("turn_right", 60)]),
]


@pytest.mark.parametrize("width_m, depth_m, height_m, texture_seed, start, actions", PLAIN)
def test_plain_walls_are_neither_blurred_nor_unlike(
    stage, width_m, depth_m, height_m, texture_seed, start, actions
):
    """Exact views that were called blurred when contrast counted as sharpness, or turned wrongly
    when all colours shared one mean."""
    room = {"width_m": width_m, "depth_m": depth_m, "height_m": height_m, "camera_height_m": 1.5}
    room = stage.prepare_room(room | {"texture_seed": texture_seed, "objects": []})
    c2w, K = load("01").integrate(actions)[0].astype(float), stage.intrinsics(84, 84, 90.0)
    first = stage.start_pose(room, start)
    frames = np.stack([stage.render(room, first @ one, K)[0] for one in c2w[[0, -1]]])
    qc = qc_of(stage, frames, c2w[[0, -1]])
    assert qc["passed"] and qc["sharpness"] > 0.5, qc
    if len(actions) == 1:
        assert abs(qc["turn_error_deg"]) < 0.5 and qc["match"] > 0.9
    else:  # a twentieth of the contrast, and as sharp
        assert frames[1].mean(-1).var() < 0.15 * frames[0].mean(-1).var()
    frames[1] = Image.fromarray(frames[1]).filter(ImageFilter.BoxBlur(2))
    assert "blurred" in qc_of(stage, frames, c2w[[0, -1]])["why"]


# --- planted faults
def test_a_turn_that_goes_not_far_enough_or_too_far(stage):
    for seed in SEEDS:
        for asked_deg, shown_deg in ((40, 35), (-40, -35), (40, 45), (-40, -45), (20, 12)):
            asked, shown = path_to(asked_deg), views(stage, seed, path_to(shown_deg))
            qc, over_deg = qc_of(stage, shown, asked), abs(shown_deg) - abs(asked_deg)
            assert abs(qc["turn_error_deg"] - (shown_deg - asked_deg)) < 0.95 and not qc["passed"]
            assert qc["over_turn_deg"] == pytest.approx(over_deg, abs=0.95)
            told = "turned too far" if over_deg > 0 else "not turned far enough"
            assert told in qc["why"]
            assert qc_of(stage, shown, asked, max_turn_error_deg=10)["passed"]


@pytest.mark.parametrize(
    "blur", [ImageFilter.BoxBlur(2), ImageFilter.GaussianBlur(2)], ids=["box 5x5", "gaussian 2"]
)
def test_a_blurred_frame(stage, done, blur):
    """In rooms with plain and with gay walls; one blurred frame among sharp ones is enough."""
    for record in lines(done / "2_views/views.jsonl")[::4]:
        frames = np.stack([np.asarray(Image.open(done / path)) for path in record["frames"]])
        frames[-1] = np.asarray(Image.fromarray(frames[-1]).filter(blur))
        qc = qc_of(stage, frames, np.array(record["c2w"]))
        assert not qc["passed"] and "blurred" in qc["why"] and qc["sharpness"] < 0.25


def test_a_frozen_video(stage):
    for seed in SEEDS:
        for asked in (*map(path_to, TURNS), *(path_to(0, *move) for move in MOVES)):
            still = np.repeat(views(stage, seed, asked[:1]), len(asked), 0)
            qc = qc_of(stage, still, asked)
            assert not qc["passed"] and "frozen" in qc["why"] and qc["motion"] == 0
    # a video that freezes after the first of two actions
    asked = np.concatenate([path_to(20), pose(20) @ path_to(0, 0, 0.6)[1:]])
    frames, keys = views(stage, 0, asked), [0, FRAMES - 1, len(asked) - 1]
    assert qc_of(stage, frames, asked, keys)["passed"]
    frames[FRAMES:] = frames[FRAMES - 1]
    assert "frozen" in qc_of(stage, frames, asked, keys)["why"]


# --- the report
def test_report(stage, rooms, tmp_path, capsys, monkeypatch):
    """Two teachers, one of which turns five degrees too little and blurs its moves."""

    class Lazy(stage.Warp):
        def imagine(self, anchor, c2w, K, kept):
            less = []
            for one in c2w:
                yaw_deg = stage.yaw_deg_of(one[:3, :3])
                back = pose(-math.copysign(5, yaw_deg)) if abs(yaw_deg) > 5 else np.eye(4)
                less.append(one @ back)
            made = super().imagine(anchor, np.stack(less), K, kept)
            if np.abs(c2w[-1][:3, 3]).max() > 0:
                last = Image.fromarray(made.frames[-1])
                made.frames[-1] = last.filter(ImageFilter.GaussianBlur(3))
            return made

    def half(self, trajectory: dict) -> str:
        return "not its half" if trajectory["traj_id"] > "t003" else ""

    run = copy_of(rooms, tmp_path)
    monkeypatch.setitem(stage.TEACHERS, "lazy", Lazy)
    monkeypatch.setattr(stage.Simulator, "refuses", half)
    stage.main(stage.Config(run=str(run), teacher=["simulator", "lazy"], keep="ends", workers=1))
    checks = {"simulator": [], "lazy": []}
    for record in lines(run / "2_views/views.jsonl"):
        checks[record["teacher"]].append(record["qc"])
    assert len(checks["simulator"]) + len(checks["lazy"]) == 84
    assert all(qc["passed"] for qc in checks["simulator"])
    over = {}
    for name, of_teacher in checks.items():
        over[name] = [qc["over_turn_deg"] for qc in of_teacher if qc["over_turn_deg"] is not None]
    assert abs(np.mean(over["simulator"])) < 0.2 and abs(np.median(over["lazy"]) + 5) < 0.5
    off = sum("not turned far enough" in qc["why"] for qc in checks["lazy"])
    assert off >= 0.7 * len(over["lazy"])
    assert sum("blurred" in qc["why"] for qc in checks["lazy"]) >= 9
    failed = sum(not qc["passed"] for qc in checks["lazy"])
    meta = json.loads((run / "2_views/meta.json").read_text())
    assert meta["counts"]["failed the quality check"] == failed
    told = capsys.readouterr().out
    assert f"lazy: {len(over['lazy'])} turns, too far by {np.mean(over['lazy']):+.2f}" in told
    with Image.open(run / "2_views/qc.png") as picture:
        assert picture.width > 1000 and len(picture.getcolors(1 << 24)) > 10


@pytest.mark.skipif(
    not PHOTOS.is_dir(), reason="needs the folder of photographs beside the repository"
)
def test_warped_photographs_turn_exactly(stage, tmp_path):
    script(
        "01", "--run", tmp_path, "--images", PHOTOS, "--actions", "turns", "--photo_trajectories", 3
    )
    stage.main(stage.Config(run=str(tmp_path), teacher=["warp"], workers=1))
    checks = [record["qc"] for record in lines(tmp_path / "2_views/views.jsonl")]
    assert len(checks) >= 6 and all(
        qc["passed"] and abs(qc["turn_error_deg"]) <= 0.5 for qc in checks
    )


# --- calibration
def moving(stage, gain: float):
    """A simulator that moves `gain` times as far as asked."""

    class Moving(stage.Simulator):
        def imagine(self, anchor, c2w, K, kept):
            shorter = c2w.copy()
            shorter[:, :3, 3] *= gain
            return super().imagine(anchor, shorter, K, kept)

    return Moving


def calibrated(stage, run: Path, teacher: str, count: int = 12) -> dict:
    cfg = stage.Config(run=str(run), teacher=[teacher], calibrate=True, calibration_moves=count)
    stage.main(cfg)
    return json.loads((run / "2_calibration/calibration.json").read_text())[teacher]


def test_calibration_finds_how_far_a_teacher_moves(stage, rooms, tmp_path, monkeypatch, capsys):
    run = copy_of(rooms, tmp_path)
    monkeypatch.setitem(stage.TEACHERS, "short", moving(stage, 0.7))
    for teacher, gain, allowed in (("short", 0.7, 0.03), ("simulator", 1, 0.02), ("warp", 1, 0.02)):
        found = calibrated(stage, run, teacher)
        assert abs(found["gain"] - gain) <= allowed, (teacher, found)
        assert found["spread"] < 0.05 and found["n"] >= 10, (teacher, found)
        told = capsys.readouterr().out
        assert f"--teacher {teacher} --calibration {run}/2_calibration/calibration.json" in told
        assert str(found["gain"]) in told
    known = json.loads((run / "2_calibration/calibration.json").read_text())
    assert set(known) == {"short", "simulator", "warp"}


def test_a_calibrated_teacher_shows_the_exact_views(stage, rooms, done, tmp_path, monkeypatch):
    run, path = copy_of(rooms, tmp_path), tmp_path / "found.json"
    path.write_text(json.dumps({"short": {"gain": 0.7, "n": 9, "spread": 0.01}}))
    monkeypatch.setitem(stage.TEACHERS, "short", moving(stage, 0.7))
    cfg = stage.Config(
        run=str(run), teacher=["short"], calibration=str(path), keep="all", workers=1
    )
    stage.main(cfg)
    both = zip(*(lines(folder / "2_views/views.jsonl") for folder in (done, run)), strict=True)
    for exact, view in both:
        assert view["teacher_settings"] == {"gain": 0.7} and view["c2w"] == exact["c2w"]
        for a, b in zip(exact["frames"], view["frames"], strict=True):
            a, b = (np.asarray(Image.open(file)).astype(int) for file in (done / a, run / b))
            assert np.abs(a - b).mean() < 0.5
    meta = json.loads((run / "2_views/meta.json").read_text())
    assert meta["config"]["calibration"] == {"short": 0.7}
    path.write_text(json.dumps({"short": {"gain": 0.8}}))  # other gains are another result
    with pytest.raises(SystemExit) as ended:
        stage.main(cfg)
    assert ended.value.code == 2


FAULTY = [None, "", "[]", '{"warp": {"gain": 1}}', '{"simulator": {"gain": 0}}']
FAULTY += ['{"simulator": {"gain": NaN}}', '{"simulator": {"gain": "one"}}', '{"simulator": 1}']
FAULTY += ['{"simulator": {"gain": 1}']


@pytest.mark.parametrize("content", FAULTY)
def test_a_faulty_calibration_is_one_line(stage, rooms, tmp_path, capsys, content):
    run, path = copy_of(rooms, tmp_path), tmp_path / "found.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        stage.main(stage.Config(run=str(run), calibration=str(path)))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and len(error.splitlines()) == 1 and "found.json" in error
    assert not (run / "2_views").exists()


WRONG = [{"teacher": ["simulator", "warp"]}, {"calibration": "x.json"}, {"calibration_moves": 0}]


@pytest.mark.parametrize("wrong", WRONG)
def test_calibrate_refuses_what_it_cannot_mean(stage, rooms, tmp_path, capsys, wrong):
    with pytest.raises(SystemExit) as ended:
        stage.main(stage.Config(run=str(rooms), calibrate=True, **wrong))
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_killed_calibration_ends_with_the_same_file(stage, rooms, tmp_path):
    whole, run = copy_of(rooms, tmp_path / "whole"), copy_of(rooms, tmp_path / "killed")
    calibrated(stage, whole, "warp", 8)
    arguments = ["--run", run, "--teacher", "warp", "--calibrate", "--calibration_moves", 8]
    command = [*map(str, [sys.executable, SCRIPT, *arguments])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while b"1/" not in process.stderr.read(20):  # its progress bar
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run / "2_calibration/calibration.json").exists()
    calibrated(stage, run, "warp", 8)
    both = [folder / "2_calibration/calibration.json" for folder in (whole, run)]
    assert both[0].read_bytes() == both[1].read_bytes()


def test_a_teacher_that_cannot_be_measured_is_one_line(stage, rooms, tmp_path, monkeypatch, capsys):
    class Noise(stage.Simulator):
        def imagine(self, anchor, c2w, K, kept):
            made = super().imagine(anchor, c2w, K, kept)
            noise = np.random.default_rng(0).integers(0, 256, made.frames.shape, dtype=np.uint8)
            return made._replace(frames=noise)

    monkeypatch.setitem(stage.TEACHERS, "noise", Noise)
    with pytest.raises(SystemExit) as ended:
        calibrated(stage, copy_of(rooms, tmp_path), "noise", 3)
    assert ended.value.code == 2
    assert "single moves in rooms shows how far noise moves" in capsys.readouterr().err
    assert not (tmp_path / "2_calibration/calibration.json").exists()
