"""Stage 2, the depth of a photograph: the floor gives it metres, a checkpoint lets warp move, a damaged checkpoint is one line."""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import lines, load, script
from PIL import Image, ImageFilter


@pytest.fixture(scope="module")
def stage():
    return load("02")


# ---------------------------------------------------------------------------- the floor
def rooms_seen(stage, count: int):
    """(exact depth [H,W], K, height of the camera) from the middle of furnished rooms, at several fields of view."""
    for seed in range(count):
        room, fov_deg = stage.bench_room(seed), (70.0, 90.0)[seed % 2]
        K = stage.intrinsics(120, 100, fov_deg)
        yield stage.render(room, stage.start_pose(room, [0.0, 0.0, 53.0 * seed]), K)[2], K, room.camera_height_m


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (37.0, 5.0), (0.02, -0.01)])
def test_the_floor_anchors_a_relative_depth(stage, scale, shift):
    """q = scale / z + shift, with unknown scale and shift, gives z back within 10 % where the floor shows in the lower middle."""
    errors = [np.median(np.abs(stage.anchor_to_floor(scale / z + shift, K, height_m) / z - 1)) for z, K, height_m in rooms_seen(stage, 12)]
    assert np.mean(np.array(errors) < 0.1) == 1.0, errors


def test_noise_and_the_height_of_the_camera(stage):
    draw = np.random.default_rng(0)
    for z, K, height_m in rooms_seen(stage, 4):
        q = 3 / z * (1 + 0.03 * draw.standard_normal(z.shape))
        found = stage.anchor_to_floor(q, K, height_m)
        assert np.median(np.abs(found / z - 1)) < 0.1
        higher, near = stage.anchor_to_floor(q, K, 2 * height_m), found < 40  # taken from twice as high: all is twice as far
        assert np.allclose(higher[near], 2 * found[near], rtol=1e-4)


def test_no_floor_is_no_guess(stage):
    K = stage.intrinsics(60, 40, 54.0)
    rising = np.repeat(np.linspace(1, 0, 40)[:, None], 60, 1)  # nearer at the top
    step = np.where(np.arange(40)[:, None] < 35, 1.0, 2.0) * np.ones(60)  # a wall and something before it
    for q in (np.ones((40, 60)), rising, step):
        with pytest.raises(stage.Unusable, match="floor"):
            stage.anchor_to_floor(q, K, 1.5)


def test_a_wall_is_hardly_ever_taken_for_the_floor(stage):
    """At 54 degrees a level camera sees floor only beyond 3 m, where a room often has a wall or an object: then it must say so."""
    draw, K, errors = np.random.default_rng(0), stage.intrinsics(120, 100, 54.0), []
    for seed in range(60):
        room = stage.bench_room(seed)
        z = stage.render(room, stage.start_pose(room, [*draw.uniform(-2, 2, 2), draw.uniform(0, 360)]), K)[2]
        try:
            errors.append(np.median(np.abs(stage.anchor_to_floor(7 / z + 2, K, room.camera_height_m) / z - 1)))
        except stage.Unusable:
            pass
    assert 10 <= len(errors) <= 50 and np.mean(np.array(errors) < 0.1) >= 0.8, errors


# ---------------------------------------------------------------------------- a checkpoint
def checkpoint(folder: Path, kind: str, seed: int = 0) -> Path:
    """A DepthAnything of random weights, small enough for a test."""
    import torch
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessorPil
    backbone = Dinov2Config(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=42, patch_size=14,
                            out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False)
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=24, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
                                 head_hidden_size=8, patch_size=14, depth_estimation_type=kind, max_depth=6 if kind == "metric" else 1)
    torch.manual_seed(seed)
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessorPil(size={"height": 42, "width": 42}, keep_aspect_ratio=False, ensure_multiple_of=14).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def metric(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("metric"), "metric")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Trajectories of two photographs, single moves only, made by stage 1."""
    root = tmp_path_factory.mktemp("mine")
    (root / "photos").mkdir()
    draw = np.random.default_rng(0)
    for k in range(2):
        noise = Image.fromarray(draw.integers(0, 256, (30, 45, 3), dtype=np.uint8)).resize((180, 120), Image.BICUBIC)
        noise.filter(ImageFilter.GaussianBlur(1)).save(root / f"photos/p{k}.jpg")
    script("01", "--run", root / "run", "--images", root / "photos", "--actions", "moves", "--photo_trajectories", 3)
    return root


def run_of(photos: Path, target: Path) -> Path:
    shutil.copytree(photos / "run/1_trajectories", target / "1_trajectories")
    return target


def test_a_metric_checkpoint_moves_photographs(stage, metric, photos, tmp_path):
    run = run_of(photos, tmp_path)
    without = script("02", "--run", run, "--teacher", "warp", check=False)
    assert without.returncode == 2 and "--depth" in without.stdout + without.stderr
    script("02", "--run", run, "--teacher", "warp", "--depth", metric, "--device", "cpu", "--max_holes", 1)
    views = lines(run / "2_views/views.jsonl")
    assert len(views) == 6
    assert all(view["teacher_settings"] == {"depth": str(metric), "depth_kind": "auto", "camera_height_m": 1.5} for view in views)
    for view in views:  # as warp moves them through the depth that the network gives
        photo, size = Path(view["anchor"]), (view["width"], view["height"])
        depth = stage.estimate_depth(photo, *size, view["fov_x_deg"], str(metric), stage.torch.device("cpu"), "auto", 1.5)
        assert depth.shape == size[::-1] and 0 < depth.min() <= depth.max() <= 6.1
        teacher = stage.Warp(stage.Config(run=str(run)))
        K = stage.intrinsics(*size, view["fov_x_deg"])
        want = teacher.imagine((stage.load_photo(photo, *size), depth), np.array(view["c2w"]), K, [-1])
        got = np.asarray(Image.open(run / view["frames"][-1])).astype(int)
        assert np.abs(got - want[0]).max() <= 1 and np.abs(got - stage.load_photo(photo, *size)).mean() > 1


def test_a_depth_file_wins_and_a_photograph_is_estimated_once(stage, metric, photos, tmp_path, monkeypatch):
    run, calls = run_of(photos, tmp_path), []
    (tmp_path / "depths").mkdir()
    np.save(tmp_path / "depths/p0.depth.npy", np.full((120, 180), 3.0, np.float32))
    _, network = stage.load_depth_network(str(metric), stage.torch.device("cpu"))
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    stage.estimate_depth.cache_clear()
    stage.main(stage.Config(run=str(run), teacher=["warp"], depth=str(metric), depth_dir=str(tmp_path / "depths"), device="cpu"))
    kinds = {view["scene_id"]: view["teacher_settings"]["depth"] for view in lines(run / "2_views/views.jsonl")}
    assert kinds == {"p0": "p0.depth.npy", "p1": str(metric)} and len(calls) == 1


def test_a_relative_checkpoint_is_anchored_or_named(stage, photos, tmp_path, capsys):
    """Random weights know no floor: each photograph either moves or is one line that says why not; as metric depth all move."""
    relative = checkpoint(tmp_path / "relative", "relative")
    for kind in ("auto", "metric"):
        run = run_of(photos, tmp_path / kind)
        config = stage.Config(run=str(run), teacher=["warp"], depth=str(relative), depth_kind=kind, device="cpu")
        try:
            stage.main(config)
        except SystemExit as error:
            assert error.code == 2 and kind == "auto"
        told = capsys.readouterr().err
        moved = lines(run / "2_views/views.jsonl") if (run / "2_views/views.jsonl").exists() else []
        assert len(moved) + told.count("finds no floor") == 6
        assert kind == "auto" or len(moved) == 6


def cut(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def reshape(folder: Path):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    weights["head.conv1.weight"] = weights["head.conv1.weight"][:2].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop(folder: Path):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    del weights["head.conv1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path):
    import torch
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def remote(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForDepthEstimation": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


@pytest.mark.parametrize("damage, named", [(cut, "model.safetensors"), (reshape, "head.conv1.weight"), (drop, "head.conv1.weight"),
                                           (pickled, "safetensors"), (remote, "does not load"), (shutil.rmtree, "neither a folder nor a hub id")],
                         ids=lambda value: getattr(value, "__name__", None))
def test_a_damaged_checkpoint_is_one_line(stage, metric, photos, tmp_path, capsys, damage, named):
    broken = Path(shutil.copytree(metric, tmp_path / "broken"))
    damage(broken)
    stage.load_depth_network.cache_clear()
    with pytest.raises(SystemExit) as ended:
        stage.main(stage.Config(run=str(run_of(photos, tmp_path)), teacher=["warp"], depth=str(broken), device="cpu"))
    told = capsys.readouterr().err
    fault, = [line for line in told.splitlines() if line.startswith("02_imagine_views.py:")]
    assert ended.value.code == 2 and named in fault and str(broken) in fault and "Traceback" not in told
    assert not (broken / "ran").exists() and not (tmp_path / "2_views").exists()


def test_wrong_settings_are_one_line(stage, photos, tmp_path, capsys):
    run = run_of(photos, tmp_path)
    for wrong in ({"depth": "x", "teacher": ["simulator"]}, {"depth_kind": "feet"}, {"camera_height_m": math.nan}, {"camera_height_m": 0}):
        with pytest.raises(SystemExit) as ended:
            stage.main(stage.Config(run=str(run), **{"teacher": ["warp"], **wrong}))
        assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
