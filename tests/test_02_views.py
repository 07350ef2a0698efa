"""Stage 2 by meaning: what a camera sees after an action, against an independent ray caster.

And faults that are caught, runs that survive.
"""

import colorsys
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bench_simulator import bench_room
from conftest import ROOT, copy_of, launch, lines, load, script
from PIL import Image, ImageColor, ImageDraw, ImageFilter

SCRIPT = ROOT / "02_imagine_views.py"
SHAPES = ["ball", "crate", "pillar", "cone"]


@pytest.fixture(scope="module")
def stage():
    return load("02")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> Path:
    """4 rooms with 7 trajectories each, made by stage 1."""
    run = tmp_path_factory.mktemp("rooms")
    script("01", "--run", run, "--rooms", 4, "--room_px", 84)
    return run


@pytest.fixture(scope="module")
def done(rooms, tmp_path_factory) -> Path:
    """The same rooms with the views of every frame, made in one undisturbed run."""
    run = copy_of(rooms, tmp_path_factory.mktemp("done"))
    script("02", "--run", run, "--keep", "all", "--workers", 1)
    return run


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the stage's folder; of meta.json all but the seconds it took."""
    files = [p for p in sorted((run / "2_views").rglob("*")) if p.is_file()]
    files = {str(p.relative_to(run)): p.read_bytes() for p in files}
    meta = json.loads(files.pop("2_views/meta.json"))
    assert meta.pop("finished") and meta.pop("seconds") >= 0
    return files | {"meta": json.dumps(meta).encode()}


def thing(shape: str, center_m: list, size_m: list, yaw_deg: float = 0.0, number: int = 0) -> dict:
    """An object of one part."""
    part = {"shape": shape, "color": [215, 40, 40], "size_m": size_m}
    part |= {"center_m": [0.0, 0.0, 0.0], "yaw_deg": 0.0}
    made = {"id": number, "label": f"red {shape}", "parts": [part]}
    return made | {"center_m": center_m, "size_m": size_m, "yaw_deg": yaw_deg}


def room_of(*objects: dict, width_m=8.0, depth_m=8.0, texture_seed: int = 0) -> dict:
    room = {"scene_id": "room_00000", "width_m": width_m, "depth_m": depth_m, "height_m": 2.8}
    room |= {"camera_height_m": 1.5, "texture_seed": texture_seed}
    return room | {"objects": list(objects)}


def random_room(draw: np.random.Generator) -> dict:
    """Objects of all shapes at any height, also partly above the camera, under the floor or in a
    wall, and one close to the camera."""
    objects = []
    for number in range(9):
        shape, size = SHAPES[number % 4], draw.uniform(0.3, 1.6, 3)
        if shape != "crate":
            size[2] = size[0]
        if shape == "ball":
            size[1] = size[0]
        x, z = draw.uniform(-3, 3, 2) if number else draw.uniform(-0.8, 0.8, 2)
        y, yaw_deg = -draw.uniform(0, 2.6), draw.uniform(0, 360)
        center_m = [float(x), float(y), float(z)]
        made = thing(shape, center_m, size.tolist(), float(yaw_deg), 10 + number)
        more = made["parts"][0] | {"center_m": draw.uniform(-0.5, 0.5, 3).tolist()}
        made["parts"].append(more | {"yaw_deg": float(draw.uniform(0, 360))})
        objects.append(made)
    width_m, depth_m = draw.uniform(5, 8, 2).tolist()
    return room_of(
        *objects, width_m=width_m, depth_m=depth_m, texture_seed=int(draw.integers(1000))
    )


def turned(yaw_deg: float) -> np.ndarray:
    """c2w of a camera that turned on the spot; + is right (DESIGN 4)."""
    c, s = math.cos(math.radians(yaw_deg)), math.sin(math.radians(yaw_deg))
    return np.array([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1.0]])


def moved(x_m: float, z_m: float) -> np.ndarray:
    return np.array([[1, 0, 0, x_m], [0, 1, 0, 0], [0, 0, 1, z_m], [0, 0, 0, 1.0]])


# --- the simulator: what an action does to the picture
def boxes_after(stage, room: dict, start: list, actions: list, px: int = 200) -> list[list]:
    """The box of the room's only object (None: out of sight) before and after actions integrated
    by stage 1."""
    c2w, room = load("01").integrate(actions)[0].astype(float), stage.prepare_room(room)
    teacher, anchor = stage.Simulator(stage.Config()), (room, stage.start_pose(room, start))
    ends, K = [0, len(c2w) - 1], stage.intrinsics(px, px, 90.0)
    views = teacher.imagine(anchor, c2w, K, ends)
    return [objects[0]["box"] if objects else None for objects in views.objects]


@pytest.mark.parametrize("heading_deg", [0, 90, 200])
def test_actions_move_the_box_the_right_way(stage, heading_deg):
    s, c = math.sin(math.radians(heading_deg)), math.cos(math.radians(heading_deg))
    room = room_of(
        thing("ball", [3 * s, -1.5, 3 * c], [0.8] * 3)
    )  # 3 m ahead, at the height of the camera

    def boxes(*actions):
        return boxes_after(stage, room, [0.0, 0.0, heading_deg], list(actions))

    def after(*actions):
        first, last = boxes(*actions)
        right = (last[0] + last[2] - first[0] - first[2]) / 2
        return right, (last[2] - last[0]) / (first[2] - first[0])

    assert after(("turn_left", 20))[0] > 100 > -100 > after(("turn_right", 20))[0]
    assert after(("shift_left", 0.5))[0] > 50 > -50 > after(("shift_right", 0.5))[0]
    assert after(("forward", 1))[1] > 1.3 > 1 > 0.9 > after(("backward", 0.5))[1]
    assert boxes(("turn_left", 70))[1] is None
    there, back = boxes(("turn_left", 30), ("turn_right", 30))
    assert there == back


def test_box_of_a_ball_is_where_geometry_puts_it(stage):
    room, px = room_of(thing("ball", [0, -1.5, 3], [0.8] * 3)), 200
    half_deg = math.degrees(math.asin(0.4 / 3))

    def edge(deg):  # 0..1000 of a 90-degree picture
        return 500 + 500 * math.tan(math.radians(deg))

    first, last = boxes_after(stage, room, [0, 0, 0], [("turn_left", 20)], px)
    low, high = edge(-half_deg), edge(half_deg)
    assert np.abs(np.array(first) - [low, low, high, high]).max() <= 1000 / px + 1
    low, high = edge(20 - half_deg), edge(20 + half_deg)
    assert np.abs(np.array(last)[[0, 2]] - [low, high]).max() <= 1000 / px + 1


# --- the simulator: ids, boxes and depth against brute force
def inside(shape: str, p: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Are the points p [n,3], in the object's own axes, in the closed body? 1e-9: computed points
    of its surface are."""
    x, y, z = np.abs(p).T
    r = np.hypot(x, z)
    outside_by = {
        "ball": np.linalg.norm(p, axis=1) - half[0],
        "crate": np.max([x - half[0], y - half[1], z - half[2]], 0),
        "pillar": np.maximum(r - half[0], y - half[1]),
        "cone": np.maximum(r - half[0] * (p[:, 1] + half[1]) / (2 * half[1]), y - half[1]),
    }
    return outside_by[shape] <= 1e-9


def bodies(room: dict):
    """(1 + index of its object, part in room axes) of every part."""
    for number, whole in enumerate(room["objects"], 1):
        for part in whole["parts"]:
            center_m = turned(whole["yaw_deg"])[:3, :3] @ part["center_m"] + whole["center_m"]
            yaw_deg = whole["yaw_deg"] + part["yaw_deg"]
            yield number, part | {"center_m": center_m, "yaw_deg": yaw_deg}


def reference(room: dict, pose: np.ndarray, width: int, height: int, fov_x_deg: float):
    """Brute force in float64: each ray is cut with every quadric and plane that bounds a body; cuts
    outside the body are dropped; the nearest in front of the camera wins -> ids [H,W] as `render`
    counts them, depth [H,W]."""
    f = width / 2 / math.tan(math.radians(fov_x_deg) / 2)
    i, j = np.mgrid[:height, :width].reshape(2, -1) + 0.5
    d = np.stack([(j - width / 2) / f, (i - height / 2) / f, np.ones(len(i))], 1)
    d, o = d @ pose[:3, :3].T, pose[:3, 3]  # the rays [n,3] and the camera in room axes
    ids, depth = np.zeros(len(d), int), np.full(len(d), np.inf)
    x_m, z_m = room["width_m"] / 2, room["depth_m"] / 2
    with np.errstate(all="ignore"):
        for axis, planes in enumerate([(-x_m, x_m), (-room["height_m"], 0), (-z_m, z_m)]):
            for plane in planes:
                t = (plane - o[axis]) / d[:, axis]
                depth = np.where((t > 0) & (t < depth), t, depth)
        for number, body in bodies(room):
            to_object, half = turned(body["yaw_deg"])[:3, :3].T, np.array(body["size_m"]) / 2
            oo, dd = to_object @ (o - body["center_m"]), d @ to_object.T
            cuts = []  # a ball's planes are its tangents
            for axis in range(3):
                cuts += [(side * half[axis] - oo[axis]) / dd[:, axis] for side in (-1, 1)]
            if body["shape"] != "crate":  # A x^2 = level, about the centre or (cone) the apex
                slope = half[0] / (2 * half[1])
                A, apex_m, level = {
                    "ball": ([1, 1, 1], 0, half[0] ** 2),
                    "pillar": ([1, 0, 1], 0, half[0] ** 2),
                    "cone": ([1, -(slope**2), 1], half[1], 0),
                }[body["shape"]]
                q = oo + [0, apex_m, 0]
                a, b, c = (dd * dd) @ A, 2 * (dd * q) @ A, (q * q) @ A - level
                root = np.sqrt(b * b - 4 * a * c)
                cuts += [(-b - root) / (2 * a), (-b + root) / (2 * a)]
            for t in cuts:
                nearer = (t > 0) & (t < depth) & inside(body["shape"], oo + t[:, None] * dd, half)
                ids, depth = np.where(nearer, number, ids), np.where(nearer, t, depth)
    return ids.reshape(height, width), depth.reshape(height, width)


def random_pose(draw: np.random.Generator, room: dict) -> np.ndarray:
    """A camera at eye height that stands in no object."""
    while True:
        pose = turned(draw.uniform(0, 360))
        x_m, z_m = (draw.uniform(-0.35, 0.35) * room[side] for side in ("width_m", "depth_m"))
        pose[:3, 3] = x_m, -1.5, z_m
        for _, body in bodies(room):
            half = np.array(body["size_m"]) / 2 + 0.02
            place = turned(body["yaw_deg"])[:3, :3].T @ (pose[:3, 3] - body["center_m"])
            if inside(body["shape"], place[None], half)[0]:
                break
        else:
            return pose


def check_view(stage, room: dict, pose, width: int, height: int, fov_x_deg: float) -> list[dict]:
    """The view agrees with brute force, and the boxes with its ids; returns the objects in it."""
    seen = []
    ready = stage.prepare_room(room)
    picture, ids, depth = stage.render(ready, pose, stage.intrinsics(width, height, fov_x_deg))
    want_ids, want_depth = reference(room, pose, width, height, fov_x_deg)
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
    same = ids == want_ids
    assert same.mean() >= 0.995
    assert np.abs(depth - want_depth)[same].max() < 2e-3 * want_depth.max()
    found = {entry["id"]: entry for entry in stage.visible_objects(ready, ids, pose, ids)}
    for number, body in enumerate(room["objects"], 1):
        rows, columns = np.nonzero(ids == number)
        assert (body["id"] in found) == bool(len(rows))
        if not len(rows):
            continue
        entry = found[body["id"]]
        low = columns.min() / width, rows.min() / height
        high = (columns.max() + 1) / width, (rows.max() + 1) / height
        assert entry["visible_px"] == len(rows) and entry["label"] == body["label"]
        box = [math.floor(1000 * a + 1e-9) for a in low]
        assert entry["box"] == box + [math.ceil(1000 * a - 1e-9) for a in high]
        away_m = math.hypot(*(pose[[0, 2], 3] - np.array(body["center_m"])[[0, 2]]))
        assert abs(entry["distance_m"] - away_m) < 1e-3
        x, _, z, _ = np.linalg.inv(pose) @ [*body["center_m"], 1]
        assert abs(entry["bearing_deg"] - math.degrees(math.atan2(x, z))) < 0.06
        seen.append(body)
    return seen


@pytest.mark.parametrize("width, height, fov_x_deg", [(32, 32, 90.0), (45, 24, 54.0)])
def test_render_equals_brute_force(stage, width, height, fov_x_deg):
    draw, shapes_seen = np.random.default_rng(width), set()
    for _ in range(12):
        room = random_room(draw)
        seen = check_view(stage, room, random_pose(draw, room), width, height, fov_x_deg)
        shapes_seen |= {body["parts"][0]["shape"] for body in seen}
    assert shapes_seen == set(SHAPES)


def test_another_world_has_other_looks_and_the_same_conventions(stage, rooms, tmp_path):
    """01 --world other: the same labels stand for other shapes, tints, walls and floors; boxes show
    what brute force sees. The usual world is what it is without the setting."""
    sample, draw, drawn = load("01"), np.random.default_rng(0), {}
    for world in ("rooms", "other"):
        script("01", "--run", tmp_path / world, "--rooms", 4, "--room_px", 84, "--world", world)
        files = sorted((tmp_path / world / "1_trajectories/rooms").glob("*.json"))
        drawn[world] = [json.loads(path.read_text()) for path in files]
    for path in (rooms / "1_trajectories").rglob("*.*"):
        same = tmp_path / "rooms" / path.relative_to(rooms)
        assert same.read_bytes() == path.read_bytes() or path.name == "meta.json"
    settings = [
        json.loads((run / "1_trajectories/meta.json").read_text())["config"]
        for run in (rooms, tmp_path / "rooms", tmp_path / "other")
    ]
    assert settings[0] == settings[1] and settings[2] == settings[0] | {"world": "other"}

    words = {
        word for room in drawn["other"] for o in room["objects"] for word in o["label"].split()
    }
    assert words <= {*sample.COLORS, *sample.KINDS}
    seen = [
        check_view(stage, room, random_pose(draw, room), 40, 40, 90.0) for room in drawn["other"]
    ]
    assert sum(map(len, seen)) > 4
    for usual, other in zip(drawn["rooms"], drawn["other"], strict=True):
        assert "world" not in usual and other["world"] == "other"
        patterns = [set(stage.prepare_room(room).face_pattern) for room in (usual, other)]
        assert not patterns[0] & patterns[1]

    for kind in sample.KINDS:
        looks = []
        for world in ("rooms", "other"):
            parts = sample.build_object(kind, "red", 1.0, 0.0, world)["parts"]
            looks.append([(part["shape"], *part["size_m"]) for part in parts])
        assert not set(looks[0]) & set(looks[1]), kind
    (_, usual), (_, other) = sample.WORLDS.values()
    usual, other = ({k: ImageColor.getrgb(v) for k, v in one.items()} for one in (usual, other))
    hues = {name: colorsys.rgb_to_hsv(*usual[name])[0] for name in sample.COLORS}
    for name in usual:  # red stays red, and no tint is one that was trained on
        assert min(math.dist(other[name], rgb) for rgb in usual.values()) > 20
        hue = colorsys.rgb_to_hsv(*other[name])[0]
        apart = {one: abs((hue - hues[one] + 0.5) % 1 - 0.5) for one in hues}
        assert name not in hues or min(apart, key=apart.get) == name


def test_occlusion_hides_pixels(stage):
    crate, K = (
        thing("crate", [0, -0.8, 3], [1.2, 1.6, 0.6], 20.0, 1),
        stage.intrinsics(100, 100, 90.0),
    )

    def visible(*objects):
        room = stage.prepare_room(room_of(*objects))
        pose = stage.start_pose(room, [0, 0, 0])
        ids = stage.render(room, pose, K)[1]
        seen = stage.visible_objects(room, ids, pose, ids)
        return {entry["id"]: entry["visible_px"] for entry in seen}

    ball = thing("ball", [0.2, -1.0, 1.8], [0.6] * 3, 0, 2)
    alone_px, ball_px = visible(crate)[1], visible(ball)[2]
    for order in ((crate, ball), (ball, crate)):  # whichever is drawn first
        assert 0.3 * alone_px < visible(*order)[1] < 0.9 * alone_px
        assert visible(*order)[2] == ball_px
    assert 1 not in visible(crate, thing("crate", [0, -1.2, 1.0], [2.4, 2.4, 0.4], 0, 2))


def test_nothing_tells_a_heading(stage):
    """Over many rooms no face has a color or a brightness of its own, nor has an object a side.

    Within a room the four walls are one paper in another light; every other room has an accent.
    """
    K, seen, sides = stage.intrinsics(40, 40, 60.0), [], []
    pillar = thing("pillar", [0.0, -1.4, 0.0], [1.0, 0.8, 1.0])
    for seed in range(150):
        room = stage.prepare_room(room_of(pillar, texture_seed=seed))
        views = []
        for yaw in (0, 90, 180, 270):
            s, c = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
            pose = stage.start_pose(room, [-2.5 * s, -2.5 * c, yaw])
            picture, ids, _ = stage.render(room, pose, K)
            views.append([picture[12:28, :8].mean((0, 1)), picture[ids > 0].mean(0)])
        seen.append([view[0] for view in views])
        sides.append([view[1] for view in views])
    apart = np.array(seen).std(1).mean(1)  # [150], within a room
    accent = np.sort(apart)[75:]
    assert accent.mean() > 15 and np.quantile(apart, 0.2) < 10
    for colors in (np.array(seen), np.array(sides)):  # [150,4,3]
        spread = colors.std(0) / math.sqrt(len(colors))
        assert (np.abs(colors.mean(0) - colors.mean((0, 1))) < 4 * spread).all()
    assert np.array(sides).std(1).mean() > 4  # though within a room the four differ


def test_a_group_has_one_box_and_one_index(stage):
    """Its box is the union of its parts', each rendered alone."""
    number, K = 5, stage.intrinsics(100, 100, 80.0)
    whole = load("01").build_object("chair", "red", 1.1, 30.0) | {
        "id": number,
        "label": "red chair",
    }
    whole["center_m"] = [0.2, whole["center_m"][1], 2.5]

    def seen(parts):
        room = stage.prepare_room(room_of(whole | {"parts": parts}))
        pose = stage.start_pose(room, [0, 0, 0])
        ids = stage.render(room, pose, K)[1]
        (entry,) = stage.visible_objects(room, ids, pose, ids)
        return entry

    boxes = np.array([seen([part])["box"] for part in whole["parts"]])
    union = [*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist()]
    assert seen(whole["parts"])["box"] == union and seen(whole["parts"])["id"] == number
    assert seen(whole["parts"])["bearing_deg"] == round(math.degrees(math.atan2(0.2, 2.5)), 1)


def test_a_shadow_lies_on_the_floor(stage):
    """Darkest under the object, none a metre away, and the same from two places."""
    K, table = stage.intrinsics(200, 200, 90.0), load("01").build_object("table", "red", 1.0, 25.0)
    table |= {"id": 0, "label": "red table", "center_m": [0.0, table["center_m"][1], 0.0]}
    rooms = [room_of(*things, texture_seed=3) for things in ([table], [])]
    rooms = [stage.prepare_room(room) for room in rooms]
    tones = {}
    for start in ([0, -2.6, 0], [-2.6, 0, 90], [0, 2.6, 180]):
        pose = stage.start_pose(rooms[0], start)
        (with_it, ids, depth), (without, _, _) = (stage.render(room, pose, K) for room in rooms)
        x, y = stage.rays_of(K)
        rays = np.stack(np.broadcast_arrays(x, y, 1.0), -1)
        points = (rays * depth[..., None]) @ pose[:3, :3].T + pose[:3, 3]
        floor = (ids == 0) & (np.abs(points[..., 1]) < 1e-3) & (without.min(-1) > 40)
        ratio = with_it[floor].sum(-1) / without[floor].sum(-1)
        place = points[floor][:, [0, 2]]
        away = np.hypot(*place.T)
        assert np.abs(ratio[away > 1.3] - 1).max() < 0.02 and ratio[away < 0.3].max() < 0.6
        for key, tone in zip(map(tuple, np.floor(place * 8).astype(int)), ratio, strict=True):
            tones.setdefault(key, {}).setdefault(str(start), []).append(tone)
    several = [[np.mean(t) for t in by.values()] for by in tones.values() if len(by) == 3]
    assert len(several) > 50
    assert np.mean([max(t) - min(t) for t in several]) < 0.03 < np.ptp(np.concatenate(several))


@pytest.mark.parametrize(
    "change, part",
    [
        ({"objects": [{"id": 0, "label": "ball"}]}, "KeyError"),
        ({"objects": [thing("torus", [0, -1, 0], [1, 1, 1])]}, "torus"),
        ({"width_m": 1e6}, "100 m"),
        ({"width_m": -1.0}, "100 m"),
        ({"texture_seed": "red"}, "Error"),
    ],
)
def test_other_room_files_end_in_one_line(stage, tmp_path, change, part):
    (tmp_path / "room.json").write_text(json.dumps(room_of() | change))
    with pytest.raises(stage.Unusable, match=part) as refused:
        stage.load_room(tmp_path / "room.json")
    assert "\n" not in str(refused.value) and "room.json: not a room file" in str(refused.value)


# --- warp
@pytest.fixture(scope="module")
def scenes(stage):
    """(room, pose of frame 0) of three furnished rooms."""
    rooms = [bench_room(seed) for seed in range(3)]
    return [(r, stage.start_pose(r, [0.0, 0.0, 37.0 * seed])) for seed, r in enumerate(rooms)]


def difference(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b)[where].mean())


@pytest.mark.parametrize("yaw_deg", [-40, -20, 20])
def warped(stage, anchor: tuple, c2w: np.ndarray, K: np.ndarray):
    """Frames and holes of a picture [H,W,3], with or without its depth, from c2w [N,4,4]."""
    teacher = stage.Warp(stage.Config())
    views = teacher.imagine(stage.WarpAnchor(*anchor), c2w, K, [*range(len(c2w))])
    return views.frames, views.holes


@pytest.mark.parametrize("yaw_deg", [-40, -20, 20])
def test_warped_turn_equals_the_rendered_turn(stage, scenes, yaw_deg):
    K, both = stage.intrinsics(160, 120, 90.0), np.stack([turned(yaw_deg), turned(-yaw_deg)])
    for room, pose in scenes:
        picture = stage.render(room, pose, K)[0]
        (view, mirrored), holes = warped(stage, (picture,), both, K)
        want, shown = stage.render(room, pose @ turned(yaw_deg), K)[0], ~holes
        assert difference(view, want, shown[0]) < 6
        assert difference(mirrored, want, shown[1]) > 4 * difference(view, want, shown[0])
        assert (view[~shown[0]] == stage.FILL).all()
        # along the horizon a pixel is seen by both cameras where its angle, turned, stays within 45
        angle_deg = np.degrees(np.arctan((np.arange(160) + 0.5 - 80) / K[0, 0])) + yaw_deg
        assert np.abs(angle_deg[shown[0][60]]).max() <= 45
        assert np.abs(angle_deg[~shown[0][60]]).min() >= 45
    first = warped(stage, (picture,), np.eye(4)[None], K)[0][0]
    assert (first == picture).all()  # frame 0 is the photograph itself
    # a photograph does not show what is behind the camera
    assert warped(stage, (picture,), turned(180)[None], K)[1].all()


@pytest.mark.parametrize("x_m, z_m", [(0, 0.8), (0.5, 0), (0, -0.6)])
def test_warped_move_with_true_depth_equals_the_rendered_move(stage, scenes, x_m, z_m):
    K, step = stage.intrinsics(160, 160, 90.0), moved(x_m, z_m)
    for room, pose in scenes:
        picture, _, depth = stage.render(room, pose, K)
        want, _, new_depth = stage.render(room, pose @ step, K)
        (view,), (holes,) = warped(stage, (picture, depth), step[None], K)
        assert difference(view, want, ~holes) < 6
        assert difference(picture, want, ~holes) > 3 * difference(view, want, ~holes)
        # where in frame 0 is what the moved camera sees? Beside the picture: a hole; in plain
        # sight: none
        i, j = (np.mgrid[:160, :160] + 0.5 - 80) / K[0, 0]
        X, Y, Z = j * new_depth + x_m, i * new_depth, new_depth + z_m
        u, v = K[0, 0] * X / Z + 80, K[0, 0] * Y / Z + 80
        outside = (u < -1) | (u >= 161) | (v < -1) | (v >= 161)
        there = depth[v.clip(0, 159).astype(int), u.clip(0, 159).astype(int)]
        seen = ~outside & (np.abs(there - Z) < 0.02 * Z)
        assert outside.any() == (z_m <= 0) and seen.mean() > 0.5
        assert (~holes[outside]).sum() < 0.01 * outside.sum() + 1 and holes[seen].mean() < 0.04
        assert (view[holes] == stage.FILL).all()


def test_what_stood_behind_an_object_is_a_hole_after_a_move(stage):
    """A crate hangs 2 m ahead of the wall; a step to the right bares a strip of wall at its right
    that frame 0 does not show."""
    room = stage.prepare_room(room_of(thing("crate", [0, -1.5, 2], [0.8, 0.8, 0.2])))
    K = stage.intrinsics(160, 160, 90.0)
    picture, _, depth = stage.render(room, stage.start_pose(room, [0, 0, 0]), K)
    (view,), (holes,) = warped(stage, (picture, depth), moved(0.5, 0)[None], K)
    # the crate's right edge is at 80 (1 + 0.4 / 1.9), after the step 80 (0.5 / 1.9) further left;
    # the wall moves by 80 (0.5 / 4)
    edge_px, wall_px, step_px = 80 * (1 + 0.4 / 1.9), 80 * 0.5 / 4, 80 * 0.5 / 1.9
    bared = np.arange(math.ceil(edge_px - step_px) + 1, math.floor(edge_px - wall_px) - 1)
    assert len(bared) >= 8
    assert holes[70:90, bared].mean() > 0.95 and (view[holes] == stage.FILL).all()
    assert not holes[70:90, bared[-1] + 4 : 140].any()


# --- the quality check
def pair(stage, scene, asked, shown, px: int = 84, alter=None) -> dict:
    """qc of two frames: the second shows `shown` where `asked` was wanted, and is altered."""
    room, pose = scene
    K = stage.intrinsics(px, px, 90.0)
    frames = np.stack([stage.render(room, one, K)[0] for one in (pose, pose @ shown)])
    if alter:
        frames[1] = alter(frames[1])
    c2w = np.stack([np.eye(4), *[asked] * 8])
    return stage.quality(stage.Views(frames, K), [0, 8], c2w, [0, 8], stage.Config())


def blur(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.BoxBlur(3)))


def test_quality_check_passes_true_turns_and_moves(stage, scenes):
    for scene in scenes:
        for yaw_deg in (-60, -30, -10, 10, 20, 50):
            qc = pair(stage, scene, turned(yaw_deg), turned(yaw_deg))
            assert qc["passed"] and qc["why"] == "", qc
            assert abs(qc["turn_error_deg"]) < 1.5 and qc["match"] > 0.6, qc
        for step in (moved(0, 0.6), moved(-0.5, 0), moved(0, -0.4)):
            qc = pair(stage, scene, step, step)
            assert qc["passed"] and qc["holes"] == 0, qc
            assert qc["turn_error_deg"] is None and qc["match"] is None, qc


def test_quality_check_names_each_fault(stage, scenes):
    for scene in scenes:
        for yaw_deg in (-40, -20, 20, 30):
            wrong = pair(stage, scene, turned(yaw_deg), turned(-yaw_deg))  # the other way
            assert not wrong["passed"]
            assert "turn off" in wrong["why"] or "at no yaw" in wrong["why"]
            if 2 * abs(yaw_deg) <= 40:
                assert abs(wrong["turn_error_deg"] + 2 * yaw_deg) < 2
                assert "turn off by" in wrong["why"]
            for off_deg in (-10, 10):
                qc = pair(stage, scene, turned(yaw_deg), turned(yaw_deg + off_deg))
                assert not qc["passed"] and "turn off by" in qc["why"], qc
                assert abs(qc["turn_error_deg"] - off_deg) < 1.5, qc
        for step in (moved(0, 0.6), turned(20)):
            qc = pair(stage, scene, step, step, alter=blur)
            assert not qc["passed"] and "blurred" in qc["why"] and qc["sharpness"] < 0.25


def test_contact_sheet_shows_all_kinds_and_a_failure(stage, tmp_path, monkeypatch):
    Image.new("RGB", (84, 84)).save(tmp_path / "0.png")
    usual, records, shown = {"kept": [0], "frames": ["0.png"], "objects": None}, [], []
    for i in range(30):
        kind = ("turn_left", "turn_right", "forward")[i % 3]
        qc = {"passed": i != 17, "why": "blurred" * (i == 17)}
        names = {"scene_id": f"s{i}", "traj_id": "t000", "actions": [[kind, 10.0]], "qc": qc}
        records.append(usual | names)

    class Pen:
        def __init__(self, image):
            self.draw = ImageDraw.ImageDraw(image)

        def text(self, place, text, *style):
            shown.append(text)

    monkeypatch.setattr(stage.ImageDraw, "Draw", Pen)
    stage.contact_sheet(records, tmp_path, 12)
    assert len(shown) == 12 and len({text.split("/")[0] for text in shown}) == 12
    assert [text for text in shown if "blurred" in text][0].startswith("s17/")
    for kind in ("turn_left", "turn_right", "forward"):
        assert 3 <= sum(kind.replace("_", " ") in text for text in shown) <= 5
    stage.contact_sheet(records[:3], tmp_path, 12)
    assert len(shown) == 12 + 3


def test_contact_sheet_draws_boxes_smaller_than_its_pixels(stage, tmp_path):
    """A far object of a large frame is less than a pixel of the sheet's tile."""
    Image.new("RGB", (576, 576)).save(tmp_path / "0.png")
    record = {"scene_id": "s", "traj_id": "t", "actions": [["forward", 0.5]], "kept": [0]}
    record |= {"frames": ["0.png"], "objects": [[{"box": [500, 500, 502, 502]}]]}
    record |= {"qc": {"passed": True, "why": ""}}
    sheet = np.asarray(stage.contact_sheet([record], tmp_path, 1))
    assert 1 <= (sheet[22:, :200] == 255).all(-1).sum() <= 4


def test_quality_check_counts_holes(stage, scenes):
    K, c2w = stage.intrinsics(84, 84, 54.0), np.stack([np.eye(4), turned(40)])
    frames, holes = warped(stage, (stage.render(*scenes[0], K)[0],), c2w, K)
    views = stage.Views(frames, K, holes=holes)
    qc = stage.quality(views, [0, 1], c2w, [0, 1], stage.Config())
    assert 0.65 < qc["holes"] < 0.85 and not qc["passed"] and "holes" in qc["why"]


# --- records and files
def test_records_and_files(stage, rooms, tmp_path):
    run = copy_of(rooms, tmp_path)
    output = script("02", "--run", run, "--workers", 2).stdout
    assert f"next: python 03_build_qa.py --run {run}" in output and "28 trajectories" in output
    trajectories = lines(run / "1_trajectories/trajectories.jsonl")
    views = lines(run / "2_views/views.jsonl")
    assert len(views) == 28
    new = {"teacher", "teacher_settings", "seed", "kept", "frames", "objects", "qc"}
    new |= {"covisible", "holes"}
    for trajectory, view in zip(trajectories, views, strict=True):
        assert trajectory.items() <= view.items() and view.keys() - trajectory.keys() == new
        assert view["teacher"] == "simulator" and view["kept"] == view["keyframes"]
        assert len(view["objects"]) == len(view["kept"])
        folder, names = (run / view["frames"][0]).parent, [f"{i:03d}.png" for i in view["kept"]]
        place = f"2_views/{view['scene_id']}/{view['traj_id']}"
        assert view["frames"] == [f"{place}/{name}" for name in names]
        assert json.loads((folder / "view.json").read_text()) == view
        assert {p.name for p in folder.iterdir()} == {*names, "transforms.json", "view.json"}

        room = stage.load_room(run / view["room"])
        K, c2w = stage.intrinsics_of(view), np.array(view["c2w"])
        written = json.loads((folder / "transforms.json").read_text())
        assert [frame["file_path"] for frame in written["frames"]] == names
        assert (written["w"], written["h"], written["cx"], written["cy"]) == (84, 84, 42, 42)
        focal_px = 42 / math.tan(math.radians(view["fov_x_deg"]) / 2)
        assert abs(written["fl_x"] - focal_px) < 1e-3
        for k, frame in enumerate(view["kept"]):
            pose = stage.start_pose(room, view["start"]) @ c2w[frame]
            picture, ids, _ = stage.render(room, pose, K)
            assert (np.asarray(Image.open(run / view["frames"][k])) == picture).all()
            assert view["objects"][k] == stage.visible_objects(room, ids, pose, ids)
            opengl = np.array(written["frames"][k]["transform_matrix"])
            assert np.allclose(opengl[:, [0, 3]], c2w[frame][:, [0, 3]])
            assert np.allclose(opengl[:, [1, 2]], -c2w[frame][:, [1, 2]])
    meta = json.loads((run / "2_views/meta.json").read_text())
    assert meta["finished"] and meta["parent"]["stage"] == "01_sample_trajectories"
    assert meta["counts"]["trajectories"] == 28
    assert meta["counts"]["frames"] == sum(len(view["kept"]) for view in views)
    assert (run / "2_views/contact_sheet.png").is_file()
    assert "nothing to do" in script("02", "--run", run).stdout
    other = script("02", "--run", run, "--keep", "ends", check=False)
    assert other.returncode == 2 and "keep was 'keyframes', now 'ends'" in other.stderr


def iou(a: list, b: list) -> float:
    a, b = np.array(a), np.array(b)
    inner = (np.minimum(a, b)[2:] - np.maximum(a, b)[:2]).clip(0).prod()
    return inner / (sum((box[2:] - box[:2]).prod() for box in (a, b)) - inner)


def test_warp_of_a_room_starts_from_its_frame_0(stage, done, rooms, tmp_path):
    run = copy_of(rooms, tmp_path)
    stage.main(stage.Config(run=str(run), teacher=["warp"], keep="ends", workers=1))
    overlaps, differences = [], []
    both = zip(*(lines(folder / "2_views/views.jsonl") for folder in (done, run)), strict=True)
    for exact, view in both:
        assert view["teacher"] == "warp" and view["teacher_settings"] == {"depth": "exact"}
        first, last = (np.asarray(Image.open(run / path)) for path in view["frames"])
        wants = [np.asarray(Image.open(done / exact["frames"][i])) for i in (0, -1)]
        assert (first == wants[0]).all()
        shown = (last != stage.FILL).any(-1)
        if shown.any():
            differences.append(difference(last, wants[1], shown))
        assert view["objects"][0] == exact["objects"][0]  # boxes of what the views show
        truth = {thing["id"]: thing for thing in exact["objects"][-1]}
        for thing in view["objects"][1]:
            whole = truth.get(thing["id"])
            if whole:
                assert (thing["label"], thing["distance_m"]) == (
                    whole["label"],
                    whole["distance_m"],
                )
            # all of it is shown; less: holes, more: frame 0 hid what stands before it
            if whole and 0.9 < thing["visible_px"] / whole["visible_px"] < 1.1:
                overlaps.append(iou(thing["box"], whole["box"]))
    # pixels smear a little where surfaces part: at thin legs, and at the edge of a narrow strip
    assert np.mean(np.array(differences) < 16) > 0.8, differences
    assert len(overlaps) > 10 and np.mean(np.array(overlaps) > 0.6) > 0.85, overlaps


ODD = {
    "actions": [[[None, 1.0]], [["forward", None]], [["forward"]], 5, [["forward", math.nan]]],
    "start": [[0.0, [1.0], 0.0], [0.0, 10**400, 0.0], [0.0, math.nan, 0.0], ["0", 0, 0], [0, 0]],
    "scene_id": ["../outside", "/etc", "", "\ud800", 5, None],
    "room": ["../rooms/a.json", "/etc/passwd", 5],
    "keyframes": [[], [0, 99], [0.0, 7.0], {}, [7, 0]],
    "c2w": [[], [[[0] * 4] * 4], [[[1, 2], [3]]], None],
    "fov_x_deg": [0, 171, math.nan, "90", None],
    "width": [0, 84.0, 10**6, "84", None],
}


@pytest.mark.parametrize("key", ODD)
def test_what_is_odd_in_a_trajectory_is_a_reason(stage, rooms, key):
    trajectory = lines(rooms / "1_trajectories/trajectories.jsonl")[0]
    assert stage.fault_of(trajectory) == ""
    for value in [*ODD[key], *([None] * (key == "start"))]:
        assert stage.fault_of(trajectory | {key: value}), value


def test_a_camera_that_is_not_level_is_a_reason(stage, rooms):
    trajectory = lines(rooms / "1_trajectories/trajectories.jsonl")[0]
    pitched = np.array(trajectory["c2w"])
    c, s = math.cos(0.1), math.sin(0.1)
    pitched[-1][1:3, 1:3] = [[c, -s], [s, c]]
    assert "c2w" in stage.fault_of(trajectory | {"c2w": pitched.tolist()})


# --- runs
def files_of(run: Path) -> int:
    return sum(1 for _ in (run / "2_views").glob("*/*/*"))


def kill_at(run: Path, files: int, *arguments):
    """Start the script and SIGKILL it (its first process alone, as when memory runs out) when it
    has written so many files."""
    process = launch("02", "--run", run, *arguments)
    until = time.time() + 60
    while files_of(run) < files and process.poll() is None and time.time() < until:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not json.loads((run / "2_views/meta.json").read_text())["finished"]


def test_killed_runs_go_on_to_the_same_bytes(done, rooms, tmp_path):
    run, draw = copy_of(rooms, tmp_path), np.random.default_rng()
    moments = sorted(draw.integers(1, int(0.5 * files_of(done)), 3).tolist())
    print("killed at", moments, "files")
    for files, workers in zip(moments, (1, 2, 1), strict=True):
        kill_at(run, files, "--keep", "all", "--workers", workers)
    told = script("02", "--run", run, "--keep", "all", "--workers", 2).stdout
    assert "are there already" in told or moments[-1] < 12
    assert contents(run) == contents(done)


def test_workers_die_with_a_killed_run(done, rooms, tmp_path):
    """Else they would go on writing beside the rerun, under the same temporary names."""
    run = copy_of(rooms, tmp_path)
    path = run / "1_trajectories/trajectories.jsonl"
    large = '"width": 512, "height": 512'  # slow enough to be watched
    path.write_text(path.read_text().replace('"width": 84, "height": 84', large))
    kill_at(run, 20, "--keep", "all", "--workers", 2)
    before, files = 0, files_of(run)
    while files != before:  # it stands still when they are dead, which takes a busy machine a while
        time.sleep(0.7)
        before, files = files, files_of(run)
    assert files < files_of(done)


def test_two_shards_at_once_equal_one_run(done, rooms, tmp_path):
    run = copy_of(rooms, tmp_path)
    shards = (("--shard", "0/2", "--workers", 1), ("--shard", "1/2", "--workers", 2))
    processes = [launch("02", "--run", run, "--keep", "all", *shard) for shard in shards]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert contents(run) == contents(done)


def test_two_processes_of_torchrun_equal_one_run(done, rooms, tmp_path):
    """Also where one has nothing to do and comes when the folder is finished."""
    run = copy_of(rooms, tmp_path)
    told = script("02", "--run", run, "--keep", "all", "--workers", 1, processes=2, fresh=True)
    assert contents(run) == contents(done)
    # the other completed the folder
    assert sum(f"shard {i}/2 is done" in told.stdout for i in (0, 1)) == 1
    again = script("02", "--run", run, "--keep", "all", "--workers", 1, processes=2)
    assert again.stdout.count("nothing to do") == 2
    one = f"import os; os.environ['LOCAL_WORLD_SIZE'] = '{os.cpu_count() // 2 or 1}'"
    code = f"{one}; from tests.conftest import load; print(load('02').Config().workers)"
    workers = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(workers.stdout) == os.cpu_count() // (os.cpu_count() // 2 or 1)


def test_one_shard_alone_leaves_the_folder_unfinished(stage, done, rooms, tmp_path, capsys):
    run = copy_of(rooms, tmp_path)
    stage.main(stage.Config(run=str(run), keep="all", workers=1, shard="1/2"))
    assert "14 trajectories of others are missing" in capsys.readouterr().out
    assert not (run / "2_views/views.jsonl").exists()
    assert not json.loads((run / "2_views/meta.json").read_text())["finished"]
    stage.main(stage.Config(run=str(run), keep="all", workers=1, shard="0/2"))
    assert contents(run) == contents(done)


def photo_run(folder: Path, names: list[str], actions: list[list]) -> Path:
    """A run whose trajectories are `actions` from each photograph (paths in folder/photos),
    written as stage 1 would."""
    records, frame = [], {"width": 96, "height": 64, "fov_x_deg": 54.0, "split": "train"}
    for name in names:
        photo = {"scene_id": Path(name).stem, "source": "real", "room": None, "start": None}
        photo |= {"anchor": str(folder / "photos" / name)} | frame
        for number, action in enumerate(actions):
            c2w, keyframes = load("01").integrate(action)
            path = {"actions": [list(a) for a in action], "c2w": c2w.tolist()}
            path |= {"traj_id": f"t{number:03d}", "keyframes": keyframes}
            records.append(photo | path)
    (folder / "1_trajectories").mkdir(parents=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "1_trajectories/trajectories.jsonl").write_text(text)
    meta = {"finished": True, "counts": {"photographs": len(names)}}
    (folder / "1_trajectories/meta.json").write_text(json.dumps(meta))
    return folder


def photograph(format: str = "JPEG", seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (30, 45, 3), dtype=np.uint8)
    packed = io.BytesIO()
    Image.fromarray(noise).resize((192, 128), Image.BICUBIC).save(packed, format)
    return packed.getvalue()


def test_faulty_photographs_are_one_line_and_counted(tmp_path):
    actions = [[("turn_left", 10)], [("forward", 0.5)], [("turn_right", 10), ("forward", 0.5)]]
    run = photo_run(tmp_path / "run", ["good.jpg", "gone.jpg", "cut.jpg"], actions)
    photos = run / "photos"
    photos.mkdir()
    (photos / "good.jpg").write_bytes(photograph())
    (photos / "cut.jpg").write_bytes(photograph()[:2000])
    result = script("02", "--run", run, "--teacher", "warp", "--workers", 1)
    assert "Traceback" not in result.stderr
    for name in ("gone.jpg", "cut.jpg"):
        # of its three trajectories two were left out
        assert sum(name in line for line in result.stderr.splitlines()) == 1
        assert json.loads((run / f"2_views/{name[:-4]}/t000/skipped.json").read_text())["why"]
    (left_out,) = [line for line in result.stdout.splitlines() if line.startswith("left out")]
    assert "6 of 9" in left_out and ".depth.npy" in left_out
    (view,) = lines(run / "2_views/views.jsonl")
    assert view["scene_id"] == "good" and view["teacher"] == "warp" and view["objects"] is None
    assert view["qc"]["passed"], view["qc"]
    assert abs(view["qc"]["turn_error_deg"]) < 1 and 0.1 < view["qc"]["holes"] < 0.4
    counts = json.loads((run / "2_views/meta.json").read_text())["counts"]
    assert (counts["trajectories"], counts["skipped"], counts["left out"]) == (1, 2, 6)


def test_a_depth_map_lets_a_photograph_move(stage, tmp_path, capsys):
    run = photo_run(tmp_path / "run", ["good.jpg", "flat.jpg", "text.jpg"], [[("forward", 0.5)]])
    (run / "photos").mkdir()
    (run / "depths").mkdir()
    for name in ("good", "flat", "text"):
        (run / f"photos/{name}.jpg").write_bytes(photograph())
    np.save(run / "depths/good.depth.npy", np.full((128, 192), 2.0))
    np.save(run / "depths/flat.depth.npy", np.full(7, 2.0))
    (run / "depths/text.depth.npy").write_text("no array")
    depths = str(run / "depths")
    stage.main(stage.Config(run=str(run), teacher=["warp"], depth_dir=depths, workers=1))
    error = capsys.readouterr().err
    assert "flat.depth.npy" in error and "text.depth.npy" in error
    (view,) = lines(run / "2_views/views.jsonl")
    first, last = (np.asarray(Image.open(run / path)).astype(int) for path in view["frames"])
    # half a metre towards a wall 2 m away: the middle three quarters fill the picture
    middle = Image.fromarray(first.astype(np.uint8))
    middle = np.asarray(middle.resize((96, 64), Image.BILINEAR, box=(12, 8, 84, 56))).astype(int)
    assert np.abs(last - middle).mean() < 3 < np.abs(last - first).mean() / 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_photograph_cut_anywhere_is_unusable_not_a_crash(stage, tmp_path, format):
    data = photograph(format)
    for k, length in enumerate(np.linspace(0, 0.97 * len(data), 40).astype(int).tolist()):
        path = tmp_path / f"{k}.{format.lower()}"
        path.write_bytes(data[:length])
        with pytest.raises(stage.Unusable, match=path.name):
            stage.load_photo(path, (48, 32))


def test_a_damaged_line_and_a_damaged_room_are_counted(stage, rooms, tmp_path, capsys):
    run = copy_of(rooms, tmp_path)
    path = run / "1_trajectories/trajectories.jsonl"
    text = path.read_text().splitlines()
    text[3] = text[3][:200]
    text[10] = text[10].replace(json.loads(text[10])["scene_id"], "../outside")
    path.write_text("\n".join(text) + "\n")
    (run / "1_trajectories/rooms/room_00002.json").write_text('{"width_m": 3}')
    stage.main(stage.Config(run=str(run), keep="ends", workers=1))
    error = capsys.readouterr().err
    assert "trajectories.jsonl:4: skipped" in error and "trajectories.jsonl:11: skipped" in error
    assert error.count("room_00002.json: not a room file") == 7
    counts = json.loads((run / "2_views/meta.json").read_text())["counts"]
    assert (counts["trajectories"], counts["skipped"]) == (19, 9)
    assert {p.name for p in tmp_path.iterdir()} == {"1_trajectories", "2_views"}
