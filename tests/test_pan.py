"""Photographs and panoramas: whose field of view is known, and turned cameras inside them."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, lines, load, script
from PIL import Image

SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def stages():
    return load("01"), load("02")


def smooth_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Colours that change slowly, so that two ways to resample it agree; ends meet."""
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    draw, channels = np.random.default_rng(seed), []
    for _ in range(3):
        image = np.zeros((height, width))
        for _ in range(6):
            across, down = draw.integers(1, 7), draw.uniform(0, 4)
            image += np.cos(2 * np.pi * (across * x + down * y) + draw.uniform(0, 6))
        channels.append(127 + 20 * image)
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


def psnr(a, b) -> float:
    error = np.square(a.astype(float) - b).mean()
    return 10 * math.log10(255**2 / max(error, 1e-9))


def exif(**tags) -> Image.Exif:
    names = {"equivalent": 0xA405, "focal_mm": 0x920A, "per_unit": 0xA20E, "unit": 0xA210}
    names |= {"width": 0xA002, "height": 0xA003}
    data = Image.Exif()
    for name, value in tags.items():
        data.get_ifd(0x8769)[names[name]] = value
    return data


# --- whose field of view is known ---
def test_where_a_field_of_view_comes_from(tmp_path):
    """A 6000-pixel sensor of 24 mm (250 pixels a mm), 24 mm lens: 53.13 degrees along x."""
    folders = {name: tmp_path / name for name in ("plain", "given")}
    for folder in folders.values():
        folder.mkdir()
    picture = smooth_picture(600, 400)
    picture.save(folders["plain"] / "phone.jpg", exif=exif(equivalent=28))
    camera = {"focal_mm": 24.0, "per_unit": 2500.0, "unit": 3, "width": 6000, "height": 4000}
    picture.save(folders["plain"] / "camera.jpg", exif=exif(**camera))
    picture.save(folders["plain"] / "unknown.jpg")
    picture.save(folders["given"] / "nerf.png")
    camera = {"camera_angle_x": 1.0, "frames": [{"file_path": "nerf.png"}]}
    (folders["given"] / "transforms.json").write_text(json.dumps(camera))
    run = tmp_path / "run"
    done = script("01", "--run", run, "--images", tmp_path)
    found = {}
    for line in lines(run / "1_trajectories/trajectories.jsonl"):
        found[line["scene_id"]] = line["fov_source"], line["fov_x_deg"]
    assert found == {
        "phone": ("exif", pytest.approx(2 * math.degrees(math.atan(18 / 28)), abs=0.01)),
        "camera": ("exif", pytest.approx(2 * math.degrees(math.atan(12 / 24)), abs=0.01)),
        "unknown": ("assumed", pytest.approx(54, abs=1e-3)),
        "nerf": ("given", pytest.approx(math.degrees(1), abs=1e-3)),
    }
    counts = json.loads((run / "1_trajectories/meta.json").read_text())["counts"]
    assert counts["fields of view assumed"] == 1 and "warning: 54 degrees" in done.stdout
    run = tmp_path / "flag"
    done = script("01", "--run", run, "--images", folders["plain"], "--fov_x_deg", 69)
    for line in lines(run / "1_trajectories/trajectories.jsonl"):
        assert (line["fov_source"], line["fov_x_deg"]) == ("given", 69)
    assert "warning" not in done.stdout


def test_a_broken_transforms_json_costs_its_photographs(tmp_path):
    for folder in ("good", "bad"):
        (tmp_path / folder).mkdir()
        smooth_picture(300, 200).save(tmp_path / folder / f"{folder}.png")
    (tmp_path / "bad/transforms.json").write_text('{"fl_x": "wide"}')
    done = script("01", "--run", tmp_path / "run", "--images", tmp_path)
    (line,) = [line for line in done.stderr.splitlines() if "; skipped" in line]
    assert "bad.png" in line and "Traceback" not in done.stderr


# --- cameras inside ---
@pytest.fixture(scope="module")
def pans(tmp_path_factory) -> Path:
    """A photograph of 80 degrees and a panorama, 01 and 02."""
    run = tmp_path_factory.mktemp("pans")
    (run / "photos").mkdir()
    smooth_picture(900, 600, 1).save(run / "photos/photo.png")
    smooth_picture(1024, 512, 2).save(run / "photos/panorama.png")
    manifest = run / "photos/manifest.jsonl"
    rows = [{"image": "photo.png", "fov_x_deg": 80}, {"image": "panorama.png"}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script("01", "--run", run, "--images", manifest, "--recipe", "photos")
    script("02", "--run", run, "--teacher", "pan", "--workers", 1)
    return run


def test_starts_do_not_tell_the_way(pans):
    """Every turn would fit to the other side too; the first trajectories share their start, as many
    as turns differ by 20 degrees."""
    views = lines(pans / "2_views/views.jsonl")
    of_photo = [view for view in views if view["scene_id"] == "photo"]
    of_panorama = [view for view in views if view["scene_id"] == "panorama"]
    assert len(of_photo) > 12 and len(of_panorama) == 28
    for view in of_photo:
        (_, value), start = view["actions"][0], view["start_yaw_deg"]
        assert not view["panorama"] and view["fov_x_deg"] == 30 and view["photo_fov_deg"] == 80
        assert abs(start) + value <= 25
    values = {view["actions"][0][1] for view in of_panorama}
    assert values == {10, 20, 30, 40, 50, 60} and of_panorama[0]["fov_x_deg"] == 75
    assert all(view["panorama"] and view["fov_source"] == "exact" for view in of_panorama)
    for group, sharing in ((of_photo, 2), (of_panorama, 4)):
        assert len({view["start_yaw_deg"] for view in group[:sharing]}) == 1
        assert len({view["start_yaw_deg"] for view in group}) > 5
        asked = [(view["start_yaw_deg"], *view["actions"][0]) for view in group]
        assert len(set(asked)) == len(asked)


def test_turned_views_of_a_photograph_equal_its_direct_crop(pans):
    """The same pixels by Pillow's own perspective transform, and none of them grey."""
    photo = smooth_picture(900, 600, 1)
    focal = 450 / math.tan(math.radians(40))
    for view in [v for v in lines(pans / "2_views/views.jsonl") if v["scene_id"] == "photo"]:
        yaws = [view["start_yaw_deg"]]
        name, value = view["actions"][0]
        yaws.append(yaws[0] + (value if name == "turn_right" else -value))
        for path, yaw_deg in zip(view["frames"], yaws, strict=True):
            frame = np.asarray(Image.open(pans / path))
            height, width = frame.shape[:2]
            c, s = math.cos(math.radians(yaw_deg)), math.sin(math.radians(yaw_deg))
            f = width / 2 / math.tan(math.radians(15))
            to_ray = np.array([[1 / f, 0, -width / 2 / f], [0, 1 / f, -height / 2 / f], [0, 0, 1]])
            turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
            to_pixel = np.array([[focal, 0, 450], [0, focal, 300], [0, 0, 1]])
            H = to_pixel @ turn @ to_ray
            H = (H / H[2, 2]).ravel()[:8]
            crop = photo.transform((width, height), Image.PERSPECTIVE, H, Image.BICUBIC)
            assert psnr(frame, np.asarray(crop)) > 35
            corners = H.reshape(-1)[[0, 1, 2]], H.reshape(-1)[[3, 4, 5]], [*H[6:], 1]
            for x, y in ((0, 0), (width, 0), (0, height), (width, height)):
                u, v, w = (np.dot(row, [x, y, 1]) for row in corners)
                assert -1 < u / w < 901 and -1 < v / w < 601  # wholly inside


def test_a_turn_in_a_panorama_is_a_shift_of_its_columns(stages):
    _, stage = stages
    panorama, K = np.asarray(smooth_picture(1024, 512, 2)), stage.intrinsics(200, 200, 75.0)
    teacher = stage.Pan(stage.Config())

    def view(picture, start_deg, turned_deg):
        c2w = np.eye(4)[None].repeat(2, 0)
        c2w[1, :3, :3] = stage.yaw_matrix(turned_deg)
        return teacher.imagine((picture, start_deg, 360.0, True), c2w, K, [1]).frames[0]

    for yaw_deg in (90, -90, 180, 270):
        shifted = np.roll(panorama, -1024 * yaw_deg // 360, 1)
        for start_deg in (0, 130):
            turned = view(panorama, start_deg, yaw_deg).astype(int)
            assert np.abs(turned - view(shifted, start_deg, 0)).max() <= 1
    assert np.abs(view(panorama, 20, 40).astype(int) - view(panorama, 0, 60)).max() <= 1
    # what stands to the right comes to the middle after a turn to the right
    marked = np.zeros((512, 1024, 3), np.uint8)
    marked[250:262, 512 + 85 : 512 + 86 + 85] = 255  # 30 degrees to the right
    columns = np.flatnonzero(view(marked, 0, 20)[100].any(-1))
    assert abs(columns.min() - (100 + K[0, 0] * math.tan(math.radians(9.9)))) < 2


def test_every_pan_passes_and_knows_what_is_seen_twice(pans):
    for view in lines(pans / "2_views/views.jsonl"):
        assert view["qc"]["passed"] and view["qc"]["holes"] == 0 and view["holes"] == []
        ((i, j, share),) = view["covisible"]
        half, value = view["fov_x_deg"] / 2, view["actions"][0][1]
        least = (half * 2 - value) / (half * 2) - 0.12
        assert [i, j] == view["kept"] and least < share < 1, (view["actions"], share)


def test_pan_refuses_what_it_cannot_turn(tmp_path):
    smooth_picture(300, 200).save(tmp_path / "photo.png")
    script("01", "--run", tmp_path, "--images", tmp_path / "photo.png")
    done = script("02", "--run", tmp_path, "--teacher", "pan", check=False)
    assert done.returncode == 2 and "--pan" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    # and the other way round: no other teacher takes a part of a photograph for the whole
    script("01", "--run", tmp_path / "parts", "--images", tmp_path / "photo.png", "--pan")
    done = script("02", "--run", tmp_path / "parts", "--teacher", "warp", check=False)
    assert done.returncode == 2 and "only --teacher pan" in done.stdout + done.stderr


def test_a_wrong_yaw_or_field_of_view_costs_its_trajectory(pans, tmp_path):
    run, wrong = (
        tmp_path / "run",
        [
            {"start_yaw_deg": "left"},
            {"start_yaw_deg": float("nan")},
            {"photo_fov_deg": None, "panorama": False},
            {"photo_fov_deg": 180.0, "panorama": False},
            {"panorama": None, "photo_fov_deg": "wide"},
        ],
    )
    shutil.copytree(pans / "1_trajectories", run / "1_trajectories")
    path = run / "1_trajectories/trajectories.jsonl"
    lines = path.read_text().splitlines()
    for number, changed in enumerate(wrong):
        lines[number] = json.dumps(json.loads(lines[number]) | changed)
    record = json.loads(lines[5])
    del record["panorama"]
    lines[5] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n")
    told = script("02", "--run", run, "--teacher", "pan").stderr
    assert [f":{number}: skipped" in told for number in range(1, 9)] == [True] * 6 + [False] * 2


@pytest.mark.skipif(not (SHARED / "panoramas").is_dir(), reason="needs the folders of pictures")
def test_real_photographs_and_panoramas_have_no_holes(tmp_path):
    for name in ("photos", "panoramas"):
        run = tmp_path / name
        script("01", "--run", run, "--images", SHARED / name, "--recipe", "photos")
        script("02", "--run", run, "--teacher", "pan")
        views = lines(run / "2_views/views.jsonl")
        assert len({view["scene_id"] for view in views}) == 4
        assert all(view["panorama"] == (name == "panoramas") for view in views)
        assert sum(view["qc"]["passed"] for view in views) >= 0.95 * len(views)


def test_all_tasks_of_turns_come_out_where_boxes_are_given(tmp_path):
    """Three panoramas whose objects stand at known angles: every task that a turn can ask about."""
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        smooth_picture(1024, 512, seed).save(tmp_path / f"photos/p{seed}.png")
    flags = ["--photo_trajectories", 60, "--heldout", 0.3]
    script("01", "--run", tmp_path, "--images", tmp_path / "photos", "--recipe", "photos", *flags)
    script("02", "--run", tmp_path, "--teacher", "pan")
    file, views = tmp_path / "2_views/views.jsonl", []
    half = math.tan(math.radians(37.5))
    for view in lines(file):
        name, value = view["actions"][0]
        yaws = [view["start_yaw_deg"]]
        yaws.append(yaws[0] + (value if name == "turn_right" else -value))
        view["objects"] = []
        for yaw_deg in yaws:
            seen = []
            for number in range(24):  # a pair of chairs, of lamps, ... every 60 degrees
                label = ["chair", "chair", "red sofa", "lamp", "lamp", "blue table"][number % 6]
                aside_deg = (15 * number - yaw_deg + 180) % 360 - 180
                x = 500 + 500 * math.tan(math.radians(aside_deg)) / half
                if abs(aside_deg) < 80 and 70 < x < 930:
                    box = [round(x) - 55, 500, round(x) + 55, 700]
                    seen.append({"id": number, "label": label, "box": box, "visible_px": 99})
            view["objects"].append(seen)
        views.append(json.dumps(view) + "\n")
    file.write_text("".join(views))
    script("03", "--run", tmp_path)
    asked = {record["task_type"] for record in lines(tmp_path / "3_qa/sft.jsonl")}
    assert asked == {"A2", "A4", "D1", "D2", "D3", "D4", "E1", "E2", "E3"}
