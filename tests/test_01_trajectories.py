"""Stage 1 by meaning: poses, rooms without collisions, draws that depend on nothing but their
scene, photographs good and bad."""

import io
import itertools
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, launch, load, script
from PIL import Image
from safetensors.numpy import load_file

SCRIPT = ROOT / "01_sample_trajectories.py"
GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


@pytest.fixture(scope="module")
def stage():
    return load("01")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> Path:
    """50 rooms with 7 trajectories each, made by the command line."""
    run = tmp_path_factory.mktemp("rooms")
    script("01", "--run", run, "--rooms", 50)
    return run


def records(run: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (run / "1_trajectories/trajectories.jsonl").read_text().splitlines()
    ]


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the stage's folder; of meta.json all but the seconds it took."""
    paths = sorted(p for p in (run / "1_trajectories").rglob("*") if p.is_file())
    files = {str(p.relative_to(run)): p.read_bytes() for p in paths}
    meta = json.loads(files.pop("1_trajectories/meta.json"))
    assert meta.pop("finished") and meta.pop("seconds") >= 0
    return files | {"meta": json.dumps(meta).encode()}


def project(c2w: np.ndarray, point: tuple) -> np.ndarray:
    """A world point's place in a picture of focal length 1 whose centre is (0, 0), y down."""
    x, y, z, _ = np.linalg.inv(c2w.astype(float)) @ [*point, 1]
    assert z > 0
    return np.array([x / z, y / z])


# ---------------------------------------------------------------------------- poses
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the published sequences are not here")
def test_integrate_equals_the_published_sequences(stage):
    published = load_file(GOLDEN / "open_g6_motion.safetensors")
    lines = (GOLDEN / "open_g6_motion.jsonl").read_text().splitlines()
    assert len(lines) >= 60
    for line in map(json.loads, lines):
        step = line["cfg"]["action"]
        least = line["cfg"]["trajectory"].get("min_num_frames", 2)
        c2w, keyframes = stage.integrate(
            line["actions"],
            step["distance"]["max_step_per_frame"],
            step["angle"]["max_step_per_frame"],
            least if isinstance(least, int) else 2,
        )
        assert c2w.dtype == np.float32 and c2w.shape == (line["num_frames"], 4, 4)
        assert keyframes == line["key_frame_indices"]
        expected = published[f"{line['id']:03d}/c2w"]
        np.testing.assert_allclose(c2w[:, :3], expected, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(c2w[:, 3], np.tile([0, 0, 0, 1], (len(c2w), 1)))


def test_turning_moves_the_picture_the_other_way(stage):
    ahead = (0.0, 0.0, 3.0)
    left, right = (stage.integrate([(name, 20)])[0][-1] for name in ("turn_left", "turn_right"))
    assert project(left, ahead)[0] == pytest.approx(math.tan(math.radians(20)), abs=1e-6)
    assert project(right, ahead)[0] == pytest.approx(-math.tan(math.radians(20)), abs=1e-6)
    yaw_deg = math.degrees(math.atan2(right[0, 2], right[0, 0]))
    assert yaw_deg == pytest.approx(20, abs=1e-4)  # turn right is +yaw
    assert right[0, 2] == -right[2, 0] > 0


def test_two_turns_of_45_are_one_of_90(stage):
    two = stage.integrate([("turn_left", 45), ("turn_left", 45)])[0][-1]
    np.testing.assert_allclose(two, stage.integrate([("turn_left", 90)])[0][-1], atol=1e-6)


def test_moves_along_the_camera_axes(stage):
    def end(*actions):
        return stage.integrate(actions)[0][-1]

    def apart(name):  # in the picture, 1 m at 4 m
        c2w = end((name, 1.5))
        return (project(c2w, (0.5, 0.0, 4.0)) - project(c2w, (-0.5, 0.0, 4.0)))[0]

    assert apart("forward") > 0.25 > apart("backward")  # what is ahead grows when it comes nearer
    assert project(end(("shift_right", 1)), (0, 0, 4))[0] < 0
    assert project(end(("shift_left", 1)), (0, 0, 4))[0] > 0
    for turn, move, expected in (
        ("turn_right", "forward", (1, 0)),
        ("turn_left", "forward", (-1, 0)),
        ("turn_right", "shift_right", (0, -1)),
    ):
        np.testing.assert_allclose(end((turn, 90), (move, 1))[[0, 2], 3], expected, atol=1e-6)
    c2w, _ = stage.integrate([("forward", 1), ("turn_right", 50), ("backward", 0.3)])
    np.testing.assert_allclose(c2w[:, 1, 3], 0)  # level


def test_frames_and_keyframes(stage):
    c2w, keyframes = stage.integrate([("turn_left", 40), ("forward", 1.2), ("forward", 2.0)])
    # 9, 8 (the least) and 11 frames, each sharing one with the next
    assert keyframes == [0, 8, 15, 25] and len(c2w) == 26
    np.testing.assert_array_equal(c2w[0], np.eye(4))
    steps = np.linalg.norm(np.diff(c2w[:, :3, 3].astype(float), axis=0), axis=1)
    np.testing.assert_allclose(steps, [0] * 8 + [1.2 / 7] * 7 + [0.2] * 10, atol=1e-6)
    # 0.6000000000000001 m are 3 steps, not 4
    assert stage.integrate([("forward", 3 * 0.2)], min_frames=2)[1] == [0, 3]
    assert [len(part) for part in stage.integrate([])] == [1, 1]
    for action in (("jump", 1), ("forward", math.nan), ("turn_left", math.inf)):
        with pytest.raises((KeyError, ValueError, OverflowError)):
            stage.integrate([action])


# ---------------------------------------------------------------------------- rooms
def footprint(thing: dict) -> np.ndarray:
    yaw = math.radians(thing["yaw_deg"])
    # R(yaw)'s x and z axes, seen from above
    across = np.array([math.cos(yaw), -math.sin(yaw)])
    along = np.array([math.sin(yaw), math.cos(yaw)])
    middle, (width, _, depth) = np.array(thing["center_m"])[[0, 2]], thing["size_m"]
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    return np.array([middle + (a * across * width + b * along * depth) / 2 for a, b in signs])


def distance_to(thing: dict, point: np.ndarray) -> float:
    """Written apart from the script: distance to a rectangle's edges (negative inside)."""
    corners, inside, nearest = footprint(thing), True, math.inf
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        edge, to_point = end - start, point - start
        inside &= edge[0] * to_point[1] - edge[1] * to_point[0] >= 0
        on_edge = start + edge * np.clip(to_point @ edge / (edge @ edge), 0, 1)
        nearest = min(nearest, math.dist(point, on_edge))
    return -nearest if inside else nearest


def test_no_path_runs_through_a_wall_or_an_object(rooms):
    lines = records(rooms)
    assert len(lines) == 350
    looking = 0
    for line in lines:
        room = json.loads((rooms / line["room"]).read_text())
        x0, z0, yaw_deg = line["start"]
        assert yaw_deg % 10 == 0
        cos, sin = math.cos(math.radians(yaw_deg)), math.sin(math.radians(yaw_deg))
        start = [
            [cos, 0, sin, x0],
            [0, 1, 0, -room["camera_height_m"]],
            [-sin, 0, cos, z0],
            [0, 0, 0, 1],
        ]
        world = np.array(start) @ np.array(line["c2w"])
        for x, y, z in world[:, :3, 3]:
            assert y == -room["camera_height_m"]
            assert min(room["width_m"] / 2 - abs(x), room["depth_m"] / 2 - abs(z)) > 0.3 - 1e-6
            for thing in room["objects"]:
                assert distance_to(thing, np.array([x, z])) > 0.3 - 1e-6
        half = math.tan(math.radians(room["fov_x_deg"]) / 2)
        total = np.linalg.inv(world[0][:3, :3]) @ world[-1][:3, :3]
        before, after = world[0].copy(), world[-1].copy()  # a whole turn further on either side
        before[:3, :3] = before[:3, :3] @ total.T
        after[:3, :3] = after[:3, :3] @ total
        found = False
        for camera in (world[0], world[-1], before, after):
            seen = [np.linalg.inv(camera) @ [*thing["center_m"], 1] for thing in room["objects"]]
            found |= any(z > 0 and abs(x) < half * z and abs(y) < half * z for x, y, z, _ in seen)
        looking += found
    assert looking >= 0.98 * len(lines)  # questions need something to ask about


def all_rooms(run: Path) -> list[dict]:
    paths = sorted((run / "1_trajectories/rooms").glob("*.json"))
    return [json.loads(path.read_text()) for path in paths]


def bounds(thing: dict):
    """Low and high corner of the box around an object's parts, in its own axes, from its centre."""
    middles, sizes = (np.array([p[key] for p in thing["parts"]]) for key in ("center_m", "size_m"))
    assert all(part["yaw_deg"] == 0 for part in thing["parts"])
    return (middles - sizes / 2).min(0), (middles + sizes / 2).max(0)


def test_rooms_are_as_agreed(rooms):
    kinds, shapes = set(), set()
    for room in all_rooms(rooms):
        things = room["objects"]
        assert 5 <= room["width_m"] <= 9 and 5 <= room["depth_m"] <= 9 and 5 <= len(things) <= 9
        assert 1.2 <= room["camera_height_m"] <= 1.7 and 60 <= room["fov_x_deg"] <= 100
        assert [thing["id"] for thing in things] == list(range(len(things)))
        half, labels = (room["width_m"] / 2, room["depth_m"] / 2), [t["label"] for t in things]
        for thing in things:
            kind = thing["label"].split()[-1]
            kinds.add(kind)
            shapes |= {part["shape"] for part in thing["parts"]}
            for part in thing["parts"]:
                assert len(part["color"]) == 3 and all(0 <= value <= 255 for value in part["color"])
            low, high = bounds(thing)  # the box is the union of the parts'
            np.testing.assert_allclose(high, np.array(thing["size_m"]) / 2, atol=3e-4)
            np.testing.assert_allclose(low, -high, atol=3e-4)
            bottom = -thing["center_m"][1] - thing["size_m"][1] / 2
            assert bottom >= -1e-3 and bottom + thing["size_m"][1] < room["height_m"]
            outline = footprint(thing)
            assert (np.abs(outline) < np.add(half, 0.01)).all()
            if kind in ("door", "window", "picture"):  # at a wall, its front to the room
                yaw = math.radians(thing["yaw_deg"])
                out = np.array([math.sin(yaw), math.cos(yaw)])
                assert (outline @ out).max() == pytest.approx(abs(out) @ half, abs=0.011)
            for other in things[: thing["id"]]:
                apart = min(distance_to(other, point) for point in outline)
                height = -other["center_m"][1] + other["size_m"][1] / 2
                on_it = kind in ("ball", "crate", "pillar", "cone") and abs(bottom - height) < 1e-3
                assert apart > 0 or on_it
        for label in set(labels):  # "ball": the only two balls of the room
            alike = [t for t in things if t["label"].split()[-1] == label.split()[-1]]
            assert labels.count(label) == 1 if " " in label else len(alike) <= 2
    furniture = {"table", "chair", "sofa", "bed", "shelf", "lamp", "plant"}
    assert kinds == {*shapes, *furniture, "door", "window", "picture"}
    assert len({room["fov_x_deg"] for room in all_rooms(rooms)}) > 30


@pytest.mark.parametrize("recipe, gap_m", [("paper", 0.4), ("tiny", 0.4)])
def test_pairs_are_copies_and_stand_near(tmp_path, recipe, gap_m):
    """Neither name nor look tells the two apart, but for the color of a few pairs; the gap is
    between the circles around their footprints."""
    script("01", "--run", tmp_path / "run", "--rooms", 60, "--recipe", recipe)
    pairs, recolored = 0, 0
    for room in all_rooms(tmp_path / "run"):
        for one, two in itertools.combinations(room["objects"], 2):
            if one["label"] != two["label"]:
                continue
            pairs += 1
            recolored += one["parts"] != two["parts"]
            for thing in (one, two):
                thing["parts"] = [part | {"color": None} for part in thing["parts"]]
            own = {"id": None, "center_m": None}
            assert one | own == two | own
            (x1, y1, z1), (x2, y2, z2) = one["center_m"], two["center_m"]
            gap = math.dist((x1, z1), (x2, z2)) - math.hypot(*one["size_m"][::2])
            assert y1 == y2 and 0.09 < gap < gap_m + 0.01
    assert pairs > 90 and not recolored


def test_four_trajectories_of_a_room_share_their_start(rooms):
    by_room = {}
    for line in records(rooms):
        by_room.setdefault(line["scene_id"], []).append(line)
    shared = 0
    for lines in by_room.values():
        same = [line for line in lines[:4] if line["start"] == lines[0]["start"]]
        shared += len(same)
        walks = [json.dumps(line["actions"]) for line in same]
        assert len(walks) == len(set(walks))
        assert all(line["start"] != lines[0]["start"] for line in lines[4:])
    assert shared > 0.9 * 4 * len(by_room)


def test_actions_are_on_the_grid_and_alternate(rooms):
    lines, seen = records(rooms), set()
    for line in lines:
        names = [name for name, _ in line["actions"]]
        seen.add(names[0] if len(names) == 1 else len(names))
        assert 1 <= len(names) <= 3 and len(line["keyframes"]) == len(names) + 1
        assert line["keyframes"][-1] == len(line["c2w"]) - 1
        assert all(("turn" in one) != ("turn" in two) for one, two in itertools.pairwise(names))
        for name, value in line["actions"]:
            grid = 10 if "turn" in name else 0.1
            assert value / grid == pytest.approx(round(value / grid))
            assert 10 <= value <= 90 if "turn" in name else 0.3 <= value <= 2
    moves = {"forward", "backward", "shift_left", "shift_right"}
    assert seen == {*moves, "turn_left", "turn_right", 2, 3}
    for line in lines:
        assert line["width"] == line["height"] == 112
        room = json.loads((rooms / line["room"]).read_text())
        assert line["fov_x_deg"] == room["fov_x_deg"]
        assert line["source"] == "simulated" and line["anchor"] is None


def test_presets_and_random_sequences_have_no_common_double(stage):
    """The doubles of the docstring: a turn by 90 degrees, opposite turns around a move."""
    cfg = stage.Config(shares=[0, 1, 1])
    for index in range(300):
        actions = stage.draw_actions(stage.rng(0, index), cfg, [10, 90])
        assert all(value != 90 for name, value in actions if "turn" in name)
        assert len({name for name, _ in actions if "turn" in name}) == 1


def test_draws_do_not_depend_on_the_number_of_rooms_or_trajectories(rooms, tmp_path):
    script("01", "--run", tmp_path, "--rooms", 12, "--room_trajectories", 3)
    # all but the split: where none of a few scenes is drawn to be held out, one is put there
    few, many = ([line | {"split": None} for line in records(run)] for run in (tmp_path, rooms))
    shared = [r for r in many if r["scene_id"] < "room_00012" and r["traj_id"] < "t003"]
    assert few == shared
    for number in range(12):
        name = f"1_trajectories/rooms/room_{number:05d}.json"
        assert (tmp_path / name).read_bytes() == (rooms / name).read_bytes()


def test_split_is_by_scene(rooms, stage):
    splits = {}
    for line in records(rooms):
        assert splits.setdefault(line["scene_id"], line["split"]) == line["split"]
    assert set(splits.values()) == {"train", "heldout"}
    cfg = stage.Config(heldout=0.05)
    for cfg.seed in range(20):
        two = stage.draw_splits([{"scene_id": name} for name in "ab"], cfg)
        assert sorted(two.values()) == ["heldout", "train"]
    scenes = [{"scene_id": f"room_{i:05d}"} for i in range(2000)]
    assert 60 <= list(stage.draw_splits(scenes, cfg).values()).count("heldout") <= 140
    copies = [
        {"scene_id": name, "digest": digest} for name, digest in zip("abcd", "xxyz", strict=True)
    ]
    for cfg.seed in range(20):
        splits = stage.draw_splits(copies, cfg)
        assert splits["a"] == splits["b"] and set(splits.values()) == {"train", "heldout"}
    assert set(stage.draw_splits(copies, stage.Config(heldout=0.0)).values()) == {"train"}
    assert set(stage.draw_splits(copies, stage.Config(heldout=1.0)).values()) == {"heldout"}


def test_a_room_without_space_is_left_out_and_counted(tmp_path):
    far = ("--actions", "moves", "--move_m", 20, 20)
    done = script("01", "--run", tmp_path, "--rooms", 3, *far, check=False)
    assert done.returncode == 2 and "'trajectories left out': 21" in done.stderr
    assert "Traceback" not in done.stderr
    script("01", "--run", tmp_path, "--rooms", 3)  # the failed attempt does not bind the next one


# ---------------------------------------------------------------------------- photographs
def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


def exif(orientation: int | None = None, equivalent: float | None = None) -> Image.Exif:
    data = Image.Exif()
    if orientation:
        data[0x0112] = orientation
    if equivalent:
        data.get_ifd(0x8769)[0xA405] = equivalent
    return data


def test_photographs_good_and_bad(tmp_path):
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    picture(1200, 800, 1).save(photos / "plain.jpg")
    picture(1200, 800, 2).save(photos / "rotated.JPG", exif=exif(6))
    picture(1200, 800, 3).save(photos / "lens.jpeg", exif=exif(equivalent=28))
    picture(800, 1200, 4).save(photos / "upright lens.webp", exif=exif(equivalent=28))
    picture(1200, 800, 5).save(photos / "turned.jpg", exif=exif(8, equivalent=28))
    picture(300, 200, 6).save(photos / "small.png")
    picture(300, 200, 7).convert("RGBA").save(photos / "more" / "small.png")
    picture(300, 200, 8).save(photos / "nonsense.jpg", exif=exif(equivalent=65000))
    whole = io.BytesIO()
    picture(640, 480).save(whole, "JPEG")
    (photos / "truncated.jpg").write_bytes(whole.getvalue()[:-900])
    (photos / "text.png").write_text("this is no picture")
    picture(1, 1).save(photos / "pixel.png")
    picture(3000, 60).save(photos / "ribbon.png")
    (photos / "notes.txt").write_text("no picture, and not called one")
    done = script("01", "--run", tmp_path / "run", "--images", photos)
    for name in ("truncated.jpg", "text.png", "pixel.png", "ribbon.png"):
        (line,) = [line for line in done.stderr.splitlines() if f"{name}: " in line]
        assert line.endswith("; skipped") and str(photos) in line
    assert "Traceback" not in done.stderr and "notes.txt" not in done.stderr
    counts = json.loads((tmp_path / "run/1_trajectories/meta.json").read_text())["counts"]
    assert (counts["photographs"], counts["photographs skipped"]) == (8, 4)
    lines = records(tmp_path / "run")
    got = {line["scene_id"]: (line["width"], line["height"], line["fov_x_deg"]) for line in lines}

    def fov_deg(side, focal):
        return pytest.approx(2 * math.degrees(math.atan(side / 2 / focal)), abs=0.01)

    default = pytest.approx(54, abs=1e-3)
    assert got == {
        "plain": (576, 384, default),
        "rotated": (384, 576, fov_deg(2, 1.5 / math.tan(math.radians(27)))),
        "lens": (576, 384, fov_deg(36, 28)),  # 3:2, as film is
        "upright_lens": (384, 576, fov_deg(24, 28)),
        "turned": (384, 576, fov_deg(24, 28)),
        "small": (300, 200, default),
        "small_2": (300, 200, default),
        "nonsense": (300, 200, default),
    }
    for line in lines:
        assert Path(line["anchor"]).is_absolute() and Path(line["anchor"]).is_file()
        assert line["start"] is line["room"] is None
    for scene_id in got:  # all from one place, so none twice
        walks = [json.dumps(line["actions"]) for line in lines if line["scene_id"] == scene_id]
        assert len(walks) == len(set(walks)) == 7
    assert {line["split"] for line in lines} == {"train", "heldout"}


def test_turns_only_for_teachers_without_depth(tmp_path):
    photo = tmp_path / "room_00001.png"
    picture(300, 200).save(photo)
    turns = ("--actions", "turns")
    script("01", "--run", tmp_path / "run", "--images", photo, "--rooms", 2, *turns)
    lines = records(tmp_path / "run")
    assert {len(line["actions"]) for line in lines} == {1}
    assert {line["actions"][0][0] for line in lines} == {"turn_left", "turn_right"}
    # a photograph never takes a room's name
    names = {"room_00000", "room_00001", "photo_room_00001"}
    assert {line["scene_id"] for line in lines} == names
    assert max(line["actions"][0][1] for line in lines if line["source"] == "real") <= 40


def test_manifest(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    picture(300, 200, 1).save(folder / "sub" / "a.png")
    picture(300, 200, 2).save(folder / "b.png")
    picture(300, 200, 3).save(tmp_path / "outside.png")
    (folder / "loop.png").symlink_to("loop.png")
    rows = [
        {"image": "sub/a.png", "fov_x_deg": 70},
        {"image": str(folder / "b.png")},
        {"image": "../outside.png"},
        {"image": "missing.png"},
        {"image": 5},
        {"image": "b.png", "fov_x_deg": 400},
        {"picture": "b.png"},
        {"image": "loop.png"},
        {"image": "a\0.png"},
    ]
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"image": "sub/a.p')
    done = script("01", "--run", tmp_path / "run", "--images", manifest)
    got = {line["scene_id"]: line["fov_x_deg"] for line in records(tmp_path / "run")}
    assert got == {"a": 70.0, "b": pytest.approx(54, abs=1e-3)}
    counts = json.loads((tmp_path / "run/1_trajectories/meta.json").read_text())["counts"]
    assert counts["photographs skipped"] == 8 and "Traceback" not in done.stderr
    for number, part in (
        (3, "'../outside.png': leaves"),
        (4, "'missing.png': no such file"),
        (5, "not int"),
        (6, "fov_x_deg 400"),
        (7, "skipped, not a JSON object with image"),
        (8, "'loop.png': no such file"),
        (9, "no such file"),
        (10, "skipped"),
    ):
        (line,) = [line for line in done.stderr.splitlines() if f"{manifest}:{number}: " in line]
        assert part in line


def test_a_bomb_is_not_decoded(stage, tmp_path):
    Image.new("1", (20000, 12000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(Image.DecompressionBombError, match="240000000 pixels"):
        stage.read_photo(tmp_path, {"image": "bomb.png"}, stage.Config())


def test_damaged_pictures_never_end_in_a_traceback(stage, tmp_path, capsys):
    """Random bytes changed in pictures with EXIF data: read, or refused in one line."""
    draw, path = np.random.default_rng(0), tmp_path / "damaged"
    for form in ("JPEG", "PNG", "WEBP"):
        file = io.BytesIO()
        picture(64, 48).save(file, form, exif=exif(6, equivalent=28))
        for _ in range(60):
            data = np.frombuffer(file.getvalue(), np.uint8).copy()
            data[draw.integers(len(data), size=draw.integers(1, 8))] = draw.integers(256)
            path.write_bytes(data.tobytes())
            scenes = stage.photo_scenes([("a", tmp_path, {"image": "damaged"})], stage.Config())
            said = [line for line in capsys.readouterr().err.splitlines() if "a: " in line]
            assert len(said) == 1 - len(scenes)
            assert all(line.endswith("; skipped") and len(line) > 12 for line in said)
            assert all(1 < scene["fov_x_deg"] < 170 for scene in scenes)


# ---------------------------------------------------------------------------- runs
@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--rooms", "2", "--seed", "1"], "seed was 0, now 1"),
        (["--rooms", "51"], "rooms was 50, now 51"),
    ],
)
def test_changed_settings_are_refused(rooms, arguments, part):
    before = contents(rooms)
    done = script("01", "--run", rooms, *arguments, check=False)
    assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr
    assert contents(rooms) == before


def test_a_finished_run_is_left_alone(rooms):
    changed = {path: path.stat().st_mtime_ns for path in rooms.rglob("*")}
    done = script("01", "--run", rooms, "--rooms", 50)
    assert "nothing to do" in done.stdout and changed == {
        path: path.stat().st_mtime_ns for path in rooms.rglob("*")
    }


@pytest.mark.parametrize(
    "arguments, part",
    [
        ([], "--images"),
        (["--rooms", "-1"], "--rooms"),
        (["--rooms", "1", "--actions", "jumps"], "jumps"),
        (["--rooms", "1", "--turn_deg", "90", "90"], "--turn_deg"),
        (["--rooms", "1", "--move_m", "2", "1"], "--move_m"),
        (["--rooms", "1", "--shares", "0", "0", "0"], "--shares"),
        (["--images", "no/such/folder"], "no/such/folder"),
    ],
)
def test_impossible_settings_end_with_one_line(
    stage, tmp_path, capsys, monkeypatch, arguments, part
):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--run", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as end:
        stage.run(stage.main, stage.Config)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1 and part in message
    assert not list(tmp_path.iterdir())


def test_killed_and_run_again_gives_the_same_bytes(tmp_path):
    """The kill comes when the folder holds so many files, however fast the machine is."""
    command = ["01", "--rooms", 30, "--room_trajectories", 2, "--run"]
    script(*command, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for moment, files in enumerate((1, 4, 20, 32)):
        run = tmp_path / str(moment)
        process = launch(*command, run)
        while process.poll() is None and sum(p.is_file() for p in run.rglob("*")) < files:
            time.sleep(0.0005)
        process.kill()
        process.wait()
        meta = run / "1_trajectories/meta.json"  # the first file may still bear its temporary name
        assert not (meta.is_file() and json.loads(meta.read_text())["finished"])
        script(*command, run)
        assert contents(run) == expected
        shutil.rmtree(run)
