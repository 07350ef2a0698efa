"""The teacher sana-wm of stage 2 on a tiny random pipeline.

A path in smaller steps, the same frames in any order, broken weights.
"""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, copy_of, launch, lines, load, script
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

SIZE = (
    64,
    96,
)  # height, width of the frames: one and a half times as wide as high, like the photograph
SETTINGS = ("--teacher", "sana-wm", "--sana_size", *SIZE, "--steps", 2, "--device", "cpu")
SCRIPT = ROOT / "02_imagine_views.py"
# Subprocesses sum in the same order as this process, which conftest limits to one thread.
os.environ["OMP_NUM_THREADS"] = "1"
LEFT = [("turn_left", 10)]


@pytest.fixture(scope="module")
def stage():
    return load("02")


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """Many of a new network's weights are zero, the camera's among them: then neither poses nor
    text would show in the frames."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A pipeline of the published classes with a few hundred thousand random weights."""
    folder = tmp_path_factory.mktemp("weights") / "sana"
    numbers = {"<pad>": 0, "<unk>": 1, "quiet": 2, "place": 3}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **marks)
    text = {"vocab_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    transformer = diffusers.SanaWMTransformer3DModel(
        in_channels=8,
        num_layers=4,
        hidden_size=48,
        num_attention_heads=2,
        linear_head_dim=24,
        caption_channels=16,
    )
    encoder = shaken(Gemma2ForCausalLM(Gemma2Config(**text)))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=9.8)
    parts = tokenizer, encoder, vae, shaken(transformer), scheduler
    diffusers.SanaWMPipeline(*parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> Path:
    """Three trajectories of a photograph and one of a room, made by stage 1: single actions."""
    run = tmp_path_factory.mktemp("paths")
    (run / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((192, 128), Image.BICUBIC).save(run / "photos/a.png")
    rooms = ("--rooms", 1, "--room_trajectories", 1, "--room_px", 64, "--heldout", 0)
    steps = ("--move_m", 0.3, 0.3, "--turn_deg", 10, 10, "--photo_turn_deg", 10, 10)
    photos = ("--images", run / "photos", "--photo_trajectories", 3, "--shares", 1, 0, 0)
    script("01", "--run", run, *rooms, *steps, *photos)
    return run


def settings(stage, weights: Path, **others):
    """What SETTINGS says, as a Config."""
    usual = {"teacher": ["sana-wm"], "sana": str(weights), "sana_size": list(SIZE), "steps": 2}
    return stage.Config(**usual | {"device": "cpu"} | others)


@pytest.fixture(scope="module")
def done(paths, weights, tmp_path_factory) -> Path:
    """The views of every frame, made in one undisturbed run."""
    run = copy_of(paths, tmp_path_factory.mktemp("done"))
    script("02", "--run", run, *SETTINGS, "--sana", weights, "--keep", "all")
    return run


def views(run: Path) -> list[dict]:
    return lines(run / "2_views/views.jsonl")


def pictures(run: Path, view: dict) -> np.ndarray:
    return np.stack([np.asarray(Image.open(run / frame)) for frame in view["frames"]])


def contents(run: Path) -> dict[str, bytes]:
    files = [p for p in sorted((run / "2_views").rglob("*")) if p.is_file()]
    return {str(p.relative_to(run)): p.read_bytes() for p in files if p.name != "meta.json"}


# --- the path in smaller steps
PATHS = [
    [("turn_left", 80)],
    [("forward", 2.0)],
    [("turn_right", 10)],
    [("shift_left", 0.3)],
    [("backward", 0.1)],
    [("forward", 1.3), ("turn_left", 50), ("shift_right", 0.7)],
    [("turn_right", 30), ("backward", 0.4), ("turn_right", 20)],
]
WAYS = {"forward": (0, 0, 1), "backward": (0, 0, -1), "shift_left": (-1, 0, 0)}
WAYS |= {"shift_right": (1, 0, 0)}


@pytest.mark.parametrize("actions", PATHS)
def test_smaller_steps_on_the_same_path(stage, actions):
    c2w, keyframes = load("01").integrate(actions)
    poses, at = stage.resample(c2w.astype(float))
    assert len(poses) % 8 == 1 and poses.dtype == np.float32
    assert (poses[at] == c2w).all() and (np.diff(at) >= 1).all()
    # after the end there is only padding, and no more than needed
    assert (poses[at[-1] :] == c2w[-1]).all() and len(poses) - 1 - at[-1] < 8
    for start, end, (name, value) in zip(at[keyframes], at[keyframes][1:], actions, strict=False):
        first = np.linalg.inv(poses[start].astype(float))  # where this action starts
        relative, even = first @ poses[start : end + 1], np.linspace(0, 1, end - start + 1)
        yaw_deg = np.degrees(np.arctan2(relative[:, 0, 2], relative[:, 2, 2]))
        if name.startswith("turn"):
            sign = 1 if name == "turn_right" else -1
            assert np.abs(yaw_deg - even * value * sign).max() < 1e-3
            assert np.abs(relative[:, :3, 3]).max() < 1e-5
            assert 0.6 <= value / (end - start) <= 1.2
        else:
            way = even[:, None] * value * np.array(WAYS[name])
            assert np.abs(relative[:, :3, 3] - way).max() < 1e-5
            assert np.abs(yaw_deg).max() < 1e-3 and value / (end - start) <= 0.05 + 1e-9
            assert value < 0.2 or value / (end - start) >= 0.025


def test_paths_that_cannot_be_walked(stage, weights):
    assert len(stage.resample(np.eye(4)[None])[0]) == 9  # a path that stays where it is
    far = load("01").integrate([("forward", 2.0), ("turn_right", 80)] * 9)[0].astype(float)
    teacher = stage.SanaWM(stage.Config(sana=str(weights)))
    anchor, K = (np.zeros((64, 96, 3), np.uint8), ("s", "t")), stage.intrinsics(96, 64, 54.0)
    with pytest.raises(stage.Unusable, match="at most 961"):
        teacher.imagine(anchor, far, K, [0])


@pytest.mark.parametrize("width, height", [(1280, 704), (96, 64), (64, 128)])
def test_the_middle_of_a_picture_keeps_its_angles(stage, width, height):
    """A mark at a known viewing angle is found at that angle in the cut picture."""
    picture, K = (
        np.zeros((301, 400, 3), np.uint8),
        stage.intrinsics(200, 150, 54.0),
    )  # half as large
    row, column = 170, 225
    picture[row - 2 : row + 3, column - 2 : column + 3] = 255
    image, cut_K = stage.middle(picture, K, width, height)
    assert image.size == (width, height) and cut_K[0, 0] == cut_K[1, 1]
    assert (cut_K[:2, 2] == (width / 2, height / 2)).all()
    light = np.asarray(image, float)[..., 0]
    x = (light.sum(0) @ (np.arange(width) + 0.5)) / light.sum()
    y = (light.sum(1) @ (np.arange(height) + 0.5)) / light.sum()
    focal_px, near = 2 * K[0, 0], 0.3 / cut_K[0, 0]
    assert abs((x - width / 2) / cut_K[0, 0] - (column + 0.5 - 200) / focal_px) < near
    assert abs((y - height / 2) / cut_K[1, 1] - (row + 0.5 - 150.5) / focal_px) < near


# --- one trajectory
@pytest.fixture(scope="module")
def teacher(stage, weights):
    return stage.SanaWM(settings(stage, weights))


@pytest.fixture(scope="module")
def photo(paths) -> np.ndarray:
    return np.asarray(Image.open(paths / "photos/a.png"))


def path_of(*actions) -> np.ndarray:
    return load("01").integrate(list(actions), min_frames=2)[0].astype(float)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def frames_of(stage, teacher, photo, path, fov_x_deg=54.0, name=("a", "t000"), kept=(0, 1, 2)):
    K = stage.intrinsics(192, 128, fov_x_deg)
    return teacher.imagine((photo, name), path, K, list(kept)).frames


def test_poses_focal_length_noise_and_prompt_each_change_the_frames(stage, teacher, photo, weights):
    left = path_of(*LEFT)
    views = teacher.imagine(
        (photo, ("a", "t000")), left, stage.intrinsics(192, 128, 54.0), [0, 1, 2]
    )
    frames = views.frames
    assert frames.shape == (3, *SIZE, 3) and frames.dtype == np.uint8
    assert views.objects is None and views.holes is None
    assert (frames[0] == np.asarray(Image.fromarray(photo).resize(SIZE[::-1], Image.LANCZOS))).all()
    # the frames do not depend on which are kept
    assert (frames_of(stage, teacher, photo, left, kept=(0, 2)) == frames[[0, 2]]).all()
    right, forward = path_of(("turn_right", 10)), path_of(("forward", 0.3))
    others = [{"path": right}, {"path": forward}, {"fov_x_deg": 90.0}, {"name": ("a", "t001")}]
    for other in others:
        last = frames_of(stage, teacher, photo, **{"path": left} | other)[-1]
        assert difference(last, frames[-1]) > 0.1
    plain = stage.SanaWM(settings(stage, weights, guidance=1.0))
    plain.PROMPT = "place quiet"
    assert difference(frames_of(stage, plain, photo, left)[-1], frames[-1]) > 0.1


def test_the_frames_are_those_of_diffusers_own_pipeline(stage, teacher, photo, weights):
    """Loaded and called as its documentation says, with the photograph in its own pixels."""
    K, c2w = stage.intrinsics(192, 128, 54.0), path_of(("turn_right", 10))
    frames, (poses, at) = frames_of(stage, teacher, photo, c2w), stage.resample(c2w)
    pipe = diffusers.SanaWMPipeline.from_pretrained(weights)
    pipe.vae.enable_tiling(tile_sample_min_num_frames=96, tile_sample_stride_num_frames=64)
    own = pipe(
        image=Image.fromarray(photo),
        prompt=teacher.PROMPT,
        c2w=poses,
        intrinsics=K,
        num_frames=len(poses),
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=2,
        generator=stage.random_numbers(0, "a", "t000", "sana-wm"),
    ).frames
    assert len(own) == len(poses)
    assert np.abs(frames[1:].astype(float) - 255 * own[at][1:]).max() <= 0.51  # rounding


def test_it_is_told_poses_and_never_where_or_which_keys(stage, teacher, photo):
    """Most photographs are outdoors; action keys would stand against the poses."""
    told, (real,) = {}, teacher.networks

    class Spy:
        vae = real.vae

        def __call__(self, **given):
            told.update(given)
            return real(**given)

    spied = stage.SanaWM(teacher.cfg)
    spied.networks = (Spy(),)
    path = path_of(("turn_right", 10), ("forward", 0.3))
    spied.imagine((photo, ("a", "t000")), path, stage.intrinsics(192, 128, 54.0), [0])
    names = "image prompt height width num_inference_steps guidance_scale c2w intrinsics num_frames"
    assert told.keys() == {*names.split(), "generator", "output_type"}  # no `action`
    poses, at = stage.resample(path)
    assert (told["c2w"] == poses).all() and np.abs(told["c2w"][at] - path).max() < 1e-6
    words = told["prompt"].lower()
    assert words and not [word for word in ("door", "room", "street", "sky") if word in words]


# --- runs
def test_a_run_keeps_frames_and_their_record(done, weights):
    records = views(done)
    assert {record["source"] for record in records} == {"real", "simulated"} and len(records) == 4
    for record in records:
        frames, made = pictures(done, record), record["teacher_settings"]
        n = len(record["c2w"])
        assert frames.shape == (n, *SIZE, 3) and record["kept"] == [*range(n)]
        assert (record["height"], record["width"]) == SIZE
        assert record["teacher"] == "sana-wm" and record["objects"] is None
        assert record["seed"] == 0 and record["qc"]["holes"] == 0
        assert (made["model"], made["steps"], made["guidance"]) == (str(weights), 2, 5.0)
        assert made["frames"] == (17 if record["actions"][0][0].startswith("turn") else 9)
        # a photograph of the frames' shape; a room without top and bottom
        rooms = lines(done / "1_trajectories/trajectories.jsonl")
        across_deg = {t["scene_id"]: t["fov_x_deg"] for t in rooms}[record["scene_id"]]
        assert abs(record["fov_x_deg"] - across_deg) < 0.01
        camera = (done / record["frames"][0]).with_name("transforms.json")
        camera = json.loads(camera.read_text())
        assert (camera["w"], camera["h"], camera["cx"], camera["cy"]) == (96, 64, 48, 32)
        assert abs(camera["fl_x"] - 48 / math.tan(math.radians(across_deg / 2))) < 0.01
    assert len({pictures(done, record)[-1].tobytes() for record in records}) == 4


def test_a_killed_run_goes_on_at_its_unfinished_trajectory(stage, done, paths, weights, tmp_path):
    run = copy_of(paths, tmp_path)
    process = launch("02", "--run", run, *SETTINGS, "--sana", weights, "--keep", "all")
    until = time.time() + 120
    while not (marks := list(run.glob("2_views/*/*/view.json"))) and time.time() < until:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL and marks, "it ended before it could be killed"
    written = marks[0].stat().st_mtime_ns
    stage.main(settings(stage, weights, run=str(run), keep="all"))
    assert contents(run) == contents(done) and marks[0].stat().st_mtime_ns == written


def test_shards_and_resumed_runs_make_the_same_bytes(stage, done, paths, weights, tmp_path):
    run = copy_of(paths, tmp_path)
    stage.main(settings(stage, weights, run=str(run), keep="all", shard="1/2"))
    assert not (run / "2_views/views.jsonl").exists()
    stage.main(settings(stage, weights, run=str(run), keep="all", shard="0/2"))
    assert contents(run) == contents(done)
    view = views(run)[
        2
    ]  # as if killed in the middle of this one, and before the folder was completed
    folder = run / Path(view["frames"][0]).parent
    for path in (folder / "view.json", folder / "002.png", run / "2_views/views.jsonl"):
        path.unlink()
    (run / "2_views/contact_sheet.png").unlink()
    meta = json.loads((run / "2_views/meta.json").read_text())
    (run / "2_views/meta.json").write_text(json.dumps(meta | {"finished": False}))
    frame = run / views(done)[0]["frames"][0]
    untouched = frame.stat().st_mtime_ns
    stage.main(settings(stage, weights, run=str(run), keep="all"))
    assert contents(run) == contents(done) and frame.stat().st_mtime_ns == untouched


def test_broken_weights_are_one_line(paths, weights, tmp_path):
    run, broken = copy_of(paths, tmp_path), tmp_path / "broken"
    shutil.copytree(weights, broken)
    file = broken / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    result = script("02", "--run", run, *SETTINGS, "--sana", broken, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if SCRIPT.name in line]
    assert line.startswith(f"{SCRIPT.name}: {file} does not load")


@pytest.mark.parametrize("fault", ["gone", "cut", "shape", "lacking", "config"])
def test_a_faulty_part_is_named(stage, weights, tmp_path, capsys, fault):
    shutil.copytree(weights / "transformer", tmp_path / "transformer")
    file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    tensors, name = load_file(file), "blocks.0.attn.beta_proj.weight"
    if fault == "gone":
        file.unlink()
    elif fault == "cut":
        file.write_bytes(file.read_bytes()[:50])
    elif fault == "shape":
        save_file(tensors | {name: tensors[name][:1].clone()}, file)
    elif fault == "lacking":
        tensors.pop(name)
        save_file(tensors, file)
    else:
        (tmp_path / "transformer/config.json").write_text("{")
    with pytest.raises(SystemExit) as end:
        stage.load_part(file.parent, diffusers.SanaWMTransformer3DModel, torch.float32)
    error = capsys.readouterr().err
    assert end.value.code == 2 and str(file.parent if fault == "gone" else file) in error
    assert (name in error) == (fault in ("shape", "lacking"))


def test_code_beside_a_tokenizer_is_never_run(stage, weights, tmp_path, capsys):
    folder = Path(shutil.copytree(weights / "tokenizer", tmp_path / "tokenizer"))
    mine = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n"
    (folder / "mine.py").write_text(mine)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as end:
        stage.load_part(folder, AutoTokenizer)
    assert end.value.code == 2 and "tokenizer does not load" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("sana", ["nowhere/at/all", "empty"])
def test_a_source_that_cannot_be_right_is_one_line(stage, weights, tmp_path, capsys, sana):
    (tmp_path / "empty").mkdir()
    source = str(tmp_path / "empty") if sana == "empty" else sana
    with pytest.raises(SystemExit) as end:
        assert stage.SanaWM(settings(stage, weights, sana=source)).networks
    error = capsys.readouterr().err
    assert end.value.code == 2 and source in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("size", [(64, 70), (64,)])
def test_sizes_that_cannot_work_are_one_line(stage, weights, capsys, size):
    with pytest.raises(SystemExit) as end:
        stage.SanaWM(settings(stage, weights, sana_size=list(size)))
    assert end.value.code == 2 and "multiples of 32" in capsys.readouterr().err
