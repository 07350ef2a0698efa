"""Stage 2, the depth of a photograph: a metric checkpoint lets warp move, others are one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import copy_of, lines, load, script
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

SCRIPT = "02_imagine_views.py"


@pytest.fixture(scope="module")
def stage():
    return load("02")


def checkpoint(folder: Path, kind: str) -> Path:
    """A DepthAnything of random weights, small enough for a test."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation
    from transformers import Dinov2Config, DPTImageProcessorPil

    shape = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2}
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    shape |= {"image_size": 42, "patch_size": 14, "reshape_hidden_states": False}
    head = {"reassemble_hidden_size": 24, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    head |= {"head_hidden_size": 8, "patch_size": 14, "depth_estimation_type": kind}
    backbone = Dinov2Config(**shape, **stages)
    max_depth = 6 if kind == "metric" else 1
    config = DepthAnythingConfig(backbone_config=backbone, max_depth=max_depth, **head)
    torch.manual_seed(0)
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    size = {"size": {"height": 42, "width": 42}, "ensure_multiple_of": 14}
    DPTImageProcessorPil(keep_aspect_ratio=False, **size).save_pretrained(folder)
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
        noise = Image.fromarray(draw.integers(0, 256, (30, 45, 3), dtype=np.uint8))
        noise = noise.resize((180, 120), Image.BICUBIC)
        noise.filter(ImageFilter.GaussianBlur(1)).save(root / f"photos/p{k}.jpg")
    run, moves = root / "run", ("--actions", "moves", "--photo_trajectories", 3)
    script("01", "--run", run, "--images", root / "photos", *moves)
    return run


def test_a_metric_checkpoint_moves_photographs(stage, metric, photos, tmp_path):
    run = copy_of(photos, tmp_path)
    warp = ("02", "--run", run, "--teacher", "warp")
    without = script(*warp, check=False)
    assert without.returncode == 2 and "--depth" in without.stdout + without.stderr
    script(*warp, "--depth", metric, "--device", "cpu", "--max_holes", 1)
    views = lines(run / "2_views/views.jsonl")
    assert len(views) == 6
    assert all(view["teacher_settings"] == {"depth": str(metric)} for view in views)
    teacher = stage.Warp(stage.Config(run=str(run)))
    for view in views:  # as warp moves them through the depth that the network gives
        photo, size = Path(view["anchor"]), (view["width"], view["height"])
        depth = stage.estimate_depth(photo, size, str(metric), "cpu")
        assert depth.shape == size[::-1] and 0 < depth.min() <= depth.max() <= 6.1
        picture, c2w = stage.load_photo(photo, size), np.array(view["c2w"])
        anchor = stage.WarpAnchor(picture, depth)
        want = teacher.imagine(anchor, c2w, stage.intrinsics_of(view), [len(c2w) - 1]).frames[0]
        got = np.asarray(Image.open(run / view["frames"][-1])).astype(int)
        assert np.abs(got - want).max() <= 1 and np.abs(got - picture).mean() > 1


def test_a_depth_file_wins_and_a_photograph_is_estimated_once(
    stage, metric, photos, tmp_path, monkeypatch
):
    run, calls = copy_of(photos, tmp_path), []
    (tmp_path / "depths").mkdir()
    np.save(tmp_path / "depths/p0.depth.npy", np.full((120, 180), 3.0, np.float32))
    _, network = stage.load_depth_network(str(metric), "cpu")
    forward = network.forward

    def counted(*given, **options):
        calls.append(1)
        return forward(*given, **options)

    monkeypatch.setattr(network, "forward", counted)
    stage.estimate_depth.cache_clear()
    depth = {"depth": str(metric), "depth_dir": str(tmp_path / "depths"), "device": "cpu"}
    stage.main(stage.Config(run=str(run), teacher=["warp"], workers=1, **depth))
    kinds = {}
    for view in lines(run / "2_views/views.jsonl"):
        kinds[view["scene_id"]] = view["teacher_settings"]["depth"]
    assert kinds == {"p0": "p0.depth.npy", "p1": str(metric)} and len(calls) == 1


def cut(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def reshape(folder: Path):
    weights = load_file(folder / "model.safetensors")
    weights["head.conv1.weight"] = weights["head.conv1.weight"][:2].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop(folder: Path):
    weights = load_file(folder / "model.safetensors")
    del weights["head.conv1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def remote(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "mine.Config", "AutoModelForDepthEstimation": "mine.Model"}
    config |= {"model_type": "mine", "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


def relative(folder: Path):
    """Its depth has neither unit nor zero."""
    shutil.rmtree(folder)
    checkpoint(folder, "relative")


DAMAGES = [
    (cut, "model.safetensors"),
    (reshape, "head.conv1.weight"),
    (drop, "head.conv1.weight"),
    (pickled, "safetensors"),
    (remote, "does not load"),
    (relative, "name a metric checkpoint"),
    (shutil.rmtree, "is no folder here"),
]


@pytest.mark.parametrize("damage, named", DAMAGES, ids=[d.__name__ for d, _ in DAMAGES])
def test_a_wrong_checkpoint_is_one_line(stage, metric, photos, tmp_path, capsys, damage, named):
    broken = Path(shutil.copytree(metric, tmp_path / "broken"))
    damage(broken)
    stage.load_depth_network.cache_clear()
    run = copy_of(photos, tmp_path)
    with pytest.raises(SystemExit) as ended:
        stage.main(stage.Config(run=str(run), teacher=["warp"], depth=str(broken), device="cpu"))
    told = capsys.readouterr().err
    (fault,) = [line for line in told.splitlines() if line.startswith(SCRIPT)]
    assert ended.value.code == 2 and "Traceback" not in told
    assert named in fault and str(broken) in fault
    assert not (broken / "ran").exists() and not (tmp_path / "2_views").exists()
