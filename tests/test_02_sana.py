"""The teacher sana-wm of stage 2 on a tiny random pipeline: a path in smaller steps, the same frames in any order, broken weights."""
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, copy_of, load, script
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration,
                          PreTrainedTokenizerFast)

SIZE = (64, 96)  # height, width of the frames: one and a half times as wide as high, like the photograph
SETTINGS = ("--teacher", "sana-wm", "--sana_size", *SIZE, "--steps", 2, "--device", "cpu")  # the same numbers with a GPU at hand


@pytest.fixture(scope="module")
def stage():
    return load("02")


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """Many of a new network's weights are zero, the camera's among them: then neither poses nor text would show in the frames."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """sana/ and refiner/: pipelines of the published classes with a few hundred thousand random weights."""
    folder = tmp_path_factory.mktemp("weights")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "quiet": 2, "place": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    text = dict(vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                head_dim=8)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8, 16, 32, 64), decoder_block_out_channels=(8, 16, 32), layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32, temporal_compression_ratio=8)
    transformer = diffusers.SanaWMTransformer3DModel(
        in_channels=8, num_layers=4, hidden_size=48, num_attention_heads=2, linear_head_dim=24, caption_channels=16)
    diffusers.SanaWMPipeline(tokenizer, shaken(Gemma2ForCausalLM(Gemma2Config(**text))), vae, shaken(transformer),
                             diffusers.FlowMatchEulerDiscreteScheduler(shift=9.8)).save_pretrained(folder / "sana")

    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    transformer = diffusers.SanaWMLTX2RefinerTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=1,
        caption_channels=16, audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16)
    connector = {f"{kind}_connector_{key}": value for kind in ("video", "audio") for key, value in dict(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, num_learnable_registers=8).items()}
    connectors = LTX2TextConnectors(caption_channels=16, text_proj_in_factor=2, video_hidden_dim=32, audio_hidden_dim=16, **connector)
    diffusers.SanaWMLTX2Refiner(shaken(transformer), connectors, tokenizer,
                                Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)),
                                diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)).save_pretrained(folder / "refiner")
    return folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> Path:
    """Three trajectories of a photograph and one of a room, made by stage 1: single actions in few steps."""
    run = tmp_path_factory.mktemp("paths")
    (run / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((192, 128), Image.BICUBIC).save(run / "photos/a.png")
    script("01", "--run", run, "--images", run / "photos", "--photo_trajectories", 3, "--rooms", 1, "--room_trajectories", 1,
           "--room_px", 64, "--min_frames", 2, "--move_m", 0.3, 0.3, "--turn_deg", 10, 10, "--photo_turn_deg", 10, 10,
           "--shares", 1, 0, 0, "--heldout", 0)
    return run


def settings(stage, weights: Path, **others):
    """What SETTINGS says, as a Config."""
    return stage.Config(**dict(teacher=["sana-wm"], sana=str(weights / "sana"), sana_size=list(SIZE), steps=2, device="cpu") | others)


@pytest.fixture(scope="module")
def done(paths, weights, tmp_path_factory) -> Path:
    """The views of every frame, made in one undisturbed run."""
    run = copy_of(paths, tmp_path_factory.mktemp("done"))
    script("02", "--run", run, *SETTINGS, "--sana", weights / "sana", "--keep", "all")
    return run


def views(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "2_views/views.jsonl").read_text().splitlines()]


def pictures(run: Path, view: dict) -> np.ndarray:
    return np.stack([np.asarray(Image.open(run / frame)) for frame in view["frames"]])


def contents(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted((run / "2_views").rglob("*")) if p.is_file() and p.name != "meta.json"}


# ---------------------------------------------------------------------------- the path in smaller steps
@pytest.mark.parametrize("actions", [
    [("turn_left", 80)], [("forward", 2.0)], [("turn_right", 10)], [("shift_left", 0.3)], [("backward", 0.1)],
    [("forward", 1.3), ("turn_left", 50), ("shift_right", 0.7)], [("turn_right", 30), ("backward", 0.4), ("turn_right", 20)]])
def test_smaller_steps_on_the_same_path(stage, actions):
    c2w, keyframes = load("01").integrate(actions)
    poses, at = stage.resample(c2w.astype(float))
    assert len(poses) % 8 == 1 and poses.dtype == np.float32
    assert (poses[at] == c2w).all() and (np.diff(at) >= 1).all()
    assert (poses[at[-1]:] == c2w[-1]).all() and len(poses) - 1 - at[-1] < 8  # only padding after the end, and no more than needed
    for start, end, (name, value) in zip(at[keyframes], at[keyframes][1:], actions):
        relative = np.linalg.inv(poses[start].astype(float)) @ poses[start:end + 1]  # from where this action starts
        yaw_deg = np.degrees(np.arctan2(relative[:, 0, 2], relative[:, 2, 2]))
        even = np.linspace(0, 1, end - start + 1)
        if name.startswith("turn"):
            assert np.abs(yaw_deg - even * value * (1 if name == "turn_right" else -1)).max() < 1e-3
            assert np.abs(relative[:, :3, 3]).max() < 1e-5 and 0.6 <= value / (end - start) <= 1.2
        else:
            way = {"forward": (0, 0, 1), "backward": (0, 0, -1), "shift_left": (-1, 0, 0), "shift_right": (1, 0, 0)}[name]
            assert np.abs(relative[:, :3, 3] - even[:, None] * value * np.array(way)).max() < 1e-5
            assert np.abs(yaw_deg).max() < 1e-3 and value / (end - start) <= 0.05 + 1e-9
            assert value < 0.2 or value / (end - start) >= 0.025


def test_paths_that_cannot_be_walked(stage, weights):
    assert len(stage.resample(np.eye(4)[None])[0]) == 9  # a path that stays where it is
    down = np.stack([np.eye(4)] * 2)
    down[1, 1:3, 1:3] = [[math.cos(0.1), -math.sin(0.1)], [math.sin(0.1), math.cos(0.1)]]
    with pytest.raises(stage.Unusable, match="pitch"):
        stage.resample(down)
    far = load("01").integrate([("forward", 2.0), ("turn_right", 80)] * 9)[0]
    teacher = stage.SanaWM(stage.Config(sana=str(weights / "sana")))
    with pytest.raises(stage.Unusable, match="at most 961"):
        teacher.imagine((np.zeros((64, 96, 3), np.uint8), ("s", "t")), far.astype(float), stage.intrinsics(96, 64, 54.0))


@pytest.mark.parametrize("width, height", [(1280, 704), (96, 64), (64, 128)])
def test_the_middle_of_a_picture_keeps_its_angles(stage, width, height):
    """A mark at a known viewing angle is found at that angle in the cut picture."""
    picture, K = np.zeros((301, 400, 3), np.uint8), stage.intrinsics(200, 150, 54.0)  # K is in pixels of half the size
    row, column = 170, 225
    picture[row - 2:row + 3, column - 2:column + 3] = 255
    image, cut_K = stage.middle(picture, K, width, height)
    assert image.size == (width, height) and cut_K[0, 0] == cut_K[1, 1] and (cut_K[:2, 2] == (width / 2, height / 2)).all()
    light = np.asarray(image, float)[..., 0]
    x, y = (light.sum(0) @ (np.arange(width) + 0.5)) / light.sum(), (light.sum(1) @ (np.arange(height) + 0.5)) / light.sum()
    focal_px = 2 * K[0, 0]
    assert abs((x - width / 2) / cut_K[0, 0] - (column + 0.5 - 200) / focal_px) < 0.3 / cut_K[0, 0]
    assert abs((y - height / 2) / cut_K[1, 1] - (row + 0.5 - 150.5) / focal_px) < 0.3 / cut_K[0, 0]


# ---------------------------------------------------------------------------- one trajectory
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


def test_poses_focal_length_noise_and_prompt_each_change_the_frames(stage, teacher, photo, weights):
    K, left, name = stage.intrinsics(192, 128, 54.0), path_of(("turn_left", 10)), ("a", "t000")
    frames = teacher.imagine((photo, name), left, K)
    assert frames.shape == (3, *SIZE, 3) and frames.dtype == np.uint8 and teacher.objects is None and teacher.holes is None
    assert (frames[0] == np.asarray(Image.fromarray(photo).resize(SIZE[::-1], Image.LANCZOS))).all()
    assert (teacher.imagine((photo, name), left, K, [0, 2]) == frames[[0, 2]]).all()  # the frames do not depend on which are kept
    right, forward = path_of(("turn_right", 10)), path_of(("forward", 0.3))
    for path, fov_x_deg, other in [(right, 54.0, name), (forward, 54.0, name), (left, 90.0, name), (left, 54.0, ("a", "t001"))]:
        assert difference(teacher.imagine((photo, other), path, stage.intrinsics(192, 128, fov_x_deg))[-1], frames[-1]) > 0.1
    plain = stage.SanaWM(settings(stage, weights, guidance=1.0, sana_prompt="place quiet"))
    assert difference(plain.imagine((photo, name), left, K)[-1], frames[-1]) > 0.1


def test_the_frames_are_those_of_diffusers_own_pipeline(stage, teacher, photo, weights):
    """Loaded and called as its documentation says, with the photograph in its own pixels, and the prompt as text."""
    K, c2w = stage.intrinsics(192, 128, 54.0), path_of(("turn_right", 10))
    frames = teacher.imagine((photo, ("a", "t000")), c2w, K)
    poses, at = stage.resample(c2w)
    pipe = diffusers.SanaWMPipeline.from_pretrained(weights / "sana")
    own = pipe(image=Image.fromarray(photo), prompt=teacher.cfg.sana_prompt, c2w=poses, intrinsics=K, num_frames=len(poses), height=SIZE[0],
               width=SIZE[1], num_inference_steps=2, generator=stage.random_numbers(0, "a", "t000", "sana-wm")).frames
    assert len(own) == len(poses)
    assert np.abs(frames[1:].astype(float) - 255 * own[at][1:]).max() <= 0.51  # rounding


def test_refined_frames_stay_at_their_poses(stage, teacher, photo, weights):
    K, c2w, anchor = stage.intrinsics(192, 128, 54.0), path_of(("turn_right", 10)), (photo, ("a", "t000"))
    plain = teacher.imagine(anchor, c2w, K)
    refined = stage.SanaWM(settings(stage, weights, sana_refiner=str(weights / "refiner")))
    frames = refined.imagine(anchor, c2w, K)
    assert (frames[0] == plain[0]).all() and difference(frames[-1], plain[-1]) > 0.1
    assert refined.settings == teacher.settings | {"refiner": str(weights / "refiner")}
    video = refined.video(stage.middle(photo, K, *SIZE[::-1])[0], *stage.resample(c2w)[:1], ("a", "t000"), 2, 5.0)
    assert len(video) == 17 and (video[0] == video[1]).all()  # the refiner gives frames 1 to 16
    assert (frames[1:] == (255 * video[[5, 10]]).round().byte().permute(0, 2, 3, 1).numpy()).all()


def test_vae_tiling_hardly_changes_the_frames(stage, photo, weights):
    def last(tiling: bool) -> np.ndarray:
        teacher = stage.SanaWM(settings(stage, weights, sana_size=[64, 544], steps=1, vae_tiling=tiling))
        return teacher.imagine((photo, ("a", "t000")), path_of(("forward", 0.1)), stage.intrinsics(192, 128, 54.0))[-1]

    whole, tiled = last(False), last(True)
    assert (whole != tiled).any() and difference(whole, tiled) < 0.2 * difference(whole, whole[:, ::-1])


# ---------------------------------------------------------------------------- runs
def test_a_run_keeps_frames_and_their_record(done, weights):
    records = views(done)
    assert {record["source"] for record in records} == {"real", "simulated"} and len(records) == 4
    for record in records:
        frames = pictures(done, record)
        assert frames.shape == (3, *SIZE, 3) and record["kept"] == [0, 1, 2] and (record["height"], record["width"]) == SIZE
        assert record["teacher"] == "sana-wm" and record["objects"] is None and record["seed"] == 0 and record["qc"]["holes"] == 0
        made = record["teacher_settings"]
        assert (made["model"], made["steps"], made["guidance"]) == (str(weights / "sana"), 2, 5.0)
        assert made["frames"] == (17 if record["actions"][0][0].startswith("turn") else 9)
        across_deg = 54.0 if record["source"] == "real" else 90.0  # a photograph of the frames' shape; a room without top and bottom
        assert abs(record["fov_x_deg"] - across_deg) < 0.01
        camera = json.loads((done / record["frames"][0]).with_name("transforms.json").read_text())
        assert (camera["w"], camera["h"], camera["cx"], camera["cy"]) == (96, 64, 48, 32)
        assert abs(camera["fl_x"] - 48 / math.tan(math.radians(across_deg / 2))) < 0.01
    last = {pictures(done, record)[-1].tobytes() for record in records}
    assert len(last) == 4


def test_a_killed_run_goes_on_at_its_unfinished_trajectory(stage, done, paths, weights, tmp_path):
    run = copy_of(paths, tmp_path)
    arguments = ["--run", run, *SETTINGS, "--sana", weights / "sana", "--keep", "all"]
    process = subprocess.Popen([sys.executable, str(ROOT / "02_imagine_views.py"), *map(str, arguments)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 120
    while not (marks := list(run.glob("2_views/*/*/view.json"))) and process.poll() is None and time.time() < until:
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
    view = views(run)[2]  # as if killed in the middle of this one, and before the folder was completed
    folder = run / Path(view["frames"][0]).parent
    for path in (folder / "view.json", folder / "002.png", run / "2_views/views.jsonl", run / "2_views/contact_sheet.png"):
        path.unlink()
    meta = json.loads((run / "2_views/meta.json").read_text())
    (run / "2_views/meta.json").write_text(json.dumps(meta | {"finished": False}))
    untouched = (run / views(done)[0]["frames"][0]).stat().st_mtime_ns
    stage.main(settings(stage, weights, run=str(run), keep="all"))
    assert contents(run) == contents(done) and (run / views(done)[0]["frames"][0]).stat().st_mtime_ns == untouched


def test_broken_weights_are_one_line(paths, weights, tmp_path):
    run, broken = copy_of(paths, tmp_path), tmp_path / "broken"
    shutil.copytree(weights / "sana", broken)
    file = broken / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    result = script("02", "--run", run, *SETTINGS, "--sana", broken, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    line, = [line for line in result.stderr.splitlines() if "02_imagine_views.py:" in line]
    assert line.startswith(f"02_imagine_views.py: {file} does not load")


@pytest.mark.parametrize("fault", ["gone", "cut", "shape", "lacking", "config"])
def test_a_faulty_part_is_named(stage, weights, tmp_path, capsys, fault):
    shutil.copytree(weights / "sana/transformer", tmp_path / "transformer")
    file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "blocks.0.attn.beta_proj.weight"
    if fault == "gone":
        file.unlink()
    elif fault == "cut":
        file.write_bytes(file.read_bytes()[:50])
    elif fault == "shape":
        save_file(tensors | {name: tensors[name][:1].clone()}, file)
    elif fault == "lacking":
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    else:
        (tmp_path / "transformer/config.json").write_text("{")
    with pytest.raises(SystemExit) as end:
        stage.load_parts(str(tmp_path), {"transformer": diffusers.SanaWMTransformer3DModel}, torch.float32)
    error = capsys.readouterr().err
    assert end.value.code == 2 and str(file.parent if fault == "gone" else file) in error
    assert (name in error) == (fault in ("shape", "lacking"))


def test_code_beside_a_tokenizer_is_never_run(stage, weights, tmp_path, capsys):
    shutil.copytree(weights / "sana/tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer/mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    config = json.loads((tmp_path / "tokenizer/tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as end:
        stage.load_parts(str(tmp_path), {"tokenizer": AutoTokenizer}, torch.float32)
    assert end.value.code == 2 and "tokenizer does not load" in capsys.readouterr().err and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("sana, size, says", [
    ("nowhere/at/all", SIZE, "neither a folder nor a hub id"), ("empty", SIZE, "model_index.json"),
    ("refiner", SIZE, "describes a SanaWMLTX2Refiner"), ("sana", (64, 70), "multiples of 32"), ("sana", (64,), "multiples of 32")])
def test_settings_that_cannot_work_stop_before_anything_is_made(stage, weights, tmp_path, capsys, sana, size, says):
    (tmp_path / "empty").mkdir()
    folder = {"empty": tmp_path / "empty", "sana": weights / "sana", "refiner": weights / "refiner"}.get(sana, sana)
    with pytest.raises(SystemExit) as end:
        stage.SanaWM(settings(stage, weights, sana=str(folder), sana_size=list(size)))
    assert end.value.code == 2 and says in capsys.readouterr().err
