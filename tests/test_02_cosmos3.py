"""The teacher cosmos3 of stage 2 on a tiny random pipeline.

What the poses become, canvases and their K, the same frames in any order, broken folders.
"""

import json
import math
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, copy_of, lines, load, script
from diffusers.pipelines.cosmos import pipeline_cosmos3_omni
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZE = (192, 320)  # height, width of the canvas that the photograph of 96 x 160 fits
SETTINGS = ("--teacher", "cosmos3", "--cosmos_tier", 256, "--steps", 2, "--device", "cpu")
SCRIPT = ROOT / "02_imagine_views.py"
# Subprocesses sum in the same order as this process, which conftest limits to one thread.
os.environ["OMP_NUM_THREADS"] = "1"
LEFT, RIGHT, AHEAD = [("turn_left", 4)], [("turn_right", 4)], [("forward", 0.4)]
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def stage():
    return load("02")


def shaken(network: torch.nn.Module, scale: float) -> torch.nn.Module:
    """New networks have weights of zero, on the way of the poses too: then none would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            much = 100 * scale if "action_proj_in" in name else scale  # a step is small
            weight += much * torch.randn(weight.shape, generator=generator)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A pipeline in the published layout with some ten thousand random weights."""
    folder = tmp_path_factory.mktemp("weights") / "cosmos"
    names = ("<|im_end|>", "<unk>", "<|vision_start|>", "camera", "moves", ":", "30", "{", "}")
    numbers = {name: i for i, name in enumerate(names)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"eos_token": "<|im_end|>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **marks)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    transformer = diffusers.Cosmos3OmniTransformer(
        hidden_size=16,
        head_dim=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        latent_channel=4,
        patch_latent_dim=16,
        rope_axes_dim=[2, 1, 1],
        action_gen=True,
        action_dim=12,
        vocab_size=len(names),
    )
    diffusers.Cosmos3OmniPipeline(
        transformer=shaken(transformer, 1.0),
        text_tokenizer=tokenizer,
        vae=shaken(vae, 0.1),
        scheduler=diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            use_karras_sigmas=False,
        ),
        enable_safety_checker=False,
        use_native_flow_schedule=True,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> Path:
    """Two trajectories of a photograph, made by stage 1: single short actions."""
    run = tmp_path_factory.mktemp("paths")
    (run / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((160, 96), Image.BICUBIC).save(run / "photos/a.png")
    steps = ("--move_m", 0.3, 0.3, "--photo_turn_deg", 10, 10, "--heldout", 0)
    photos = ("--images", run / "photos", "--photo_trajectories", 2, "--shares", 1, 0, 0)
    script("01", "--run", run, *steps, *photos)
    return run


def settings(stage, weights: Path, **others):
    """What SETTINGS says, as a Config."""
    usual = {"teacher": ["cosmos3"], "cosmos": str(weights), "cosmos_tier": 256, "steps": 2}
    return stage.Config(**usual | {"device": "cpu"} | others)


# --- what the poses become
def pose(yaw_deg: float, x_m: float = 0.0, z_m: float = 0.0) -> np.ndarray:
    """Camera to world, OpenCV axes (x right, y down, z ahead): +yaw turns right."""
    c, s = math.cos(math.radians(yaw_deg)), math.sin(math.radians(yaw_deg))
    return np.array([[c, 0, s, x_m], [0, 1, 0, 0], [-s, 0, c, z_m], [0, 0, 0, 1]])


def test_steps_of_known_paths(stage):
    c, s = math.cos(math.radians(40)), math.sin(math.radians(40))
    ahead = stage.camera_actions(np.stack([pose(0), pose(0, z_m=1)]))
    assert np.abs(ahead - [[0, 0, 1, 1, 0, 0, 0, 1, 0]]).max() < 1e-7
    # to the left: its x axis points ahead too, in the axes before the turn
    left = stage.camera_actions(np.stack([pose(0), pose(-40)]))
    assert np.abs(left - [[0, 0, 0, c, 0, s, 0, 1, 0]]).max() < 1e-7
    # a metre ahead of a camera that looks to the world's right is a metre ahead all the same
    turned = stage.camera_actions(np.stack([pose(90, 5, 7), pose(90, 6, 7)]))
    assert np.abs(turned - [[0, 0, 1, 1, 0, 0, 0, 1, 0]]).max() < 1e-6
    assert ahead.dtype == left.dtype == turned.dtype == np.float32


def rotation(nine: np.ndarray) -> np.ndarray:
    x, y = nine[3:6].astype(float), nine[6:9].astype(float)
    return np.stack([x, y, np.cross(x, y)], 1)


def test_the_steps_lead_along_the_path_and_the_way_back_undoes_them(stage):
    path = [("forward", 1.3), ("turn_left", 50), ("shift_right", 0.7)]
    c2w = load("01").integrate(path)[0].astype(float)
    actions, back = stage.camera_actions(c2w), stage.camera_actions(c2w[::-1])[::-1]
    at = c2w[0]
    for nine, undone, end in zip(actions, back, c2w[1:], strict=True):
        step, undo = np.eye(4), np.eye(4)
        step[:3, :3], step[:3, 3] = rotation(nine), nine[:3]
        undo[:3, :3], undo[:3, 3] = rotation(undone), undone[:3]
        assert np.abs(step @ undo - np.eye(4)).max() < 1e-6
        at = at @ step
        assert np.abs(at - end).max() < 1e-5


@pytest.mark.parametrize("gain", [1.0, 0.13])
def test_a_path_has_as_many_frames_whatever_a_metre_is_called(stage, weights, gain):
    """30 degrees take about the 60 steps of the published example, a metre 20; 01 makes 8 of each,
    which are cut further."""
    teacher, asked = stage.Cosmos3(settings(stage, weights, gain=gain)), []
    teacher.networks = (lambda **call: asked.append(call["action"]) or 1 / 0,)
    for path, steps in ((("turn_right", 30), 64), (("forward", 1.0), 24)):
        c2w = load("01").integrate([path])[0].astype(float)
        c2w[:, :3, 3] /= gain
        picture = np.zeros((96, 160, 3), np.uint8)
        with pytest.raises(ZeroDivisionError):
            teacher.imagine((picture, ("s", "t")), c2w, stage.intrinsics(160, 96, 54.0), [0])
        action = asked.pop()
        assert action.chunk_size == len(action.raw_actions) == steps
        assert action.raw_actions[:, 2].sum() == pytest.approx(c2w[-1, 2, 3], abs=1e-4)


def test_paths_too_long_for_it(stage, weights):
    far = load("01").integrate([("forward", 2.0), ("turn_right", 80)] * 2)[0].astype(float)
    teacher, K = stage.Cosmos3(settings(stage, weights)), stage.intrinsics(96, 64, 54.0)
    with pytest.raises(stage.Unusable, match="at most 297"):
        teacher.imagine((np.zeros((64, 96, 3), np.uint8), ("s", "t")), far, K, [0])


# --- canvases
@pytest.mark.parametrize("tier", [256, 480, 720])
def test_the_canvases_are_those_of_diffusers(stage, tier):
    theirs = set(pipeline_cosmos3_omni._ACTION_RESOLUTION_BINS[str(tier)].values())
    lying = set(stage.CANVASES[tier])
    assert lying | {size[::-1] for size in lying} == theirs


@pytest.mark.parametrize("shape", [(96, 160), (100, 101), (203, 150), (90, 300), (300, 90)])
def test_a_fitted_picture_goes_through_the_pipeline_untouched(stage, weights, shape):
    """And a mark at a known viewing angle is found at that angle, by the K returned."""
    teacher, given = stage.Cosmos3(settings(stage, weights)), []
    pipe, own_K = teacher.networks[0], stage.intrinsics(*shape[::-1], 54.0)

    def call(action, **rest):
        size = action.image.size
        clip, sizes, *canvas = pipe._prepare_action_video_conditioning(
            [action.image], action.resolution_tier, 1, "cpu", torch.float32
        )
        assert sizes.tolist() == [*size[::-1]] * 2 == [*canvas] * 2  # canvas and content
        pixels = torch.tensor(np.asarray(action.image)).permute(2, 0, 1) / 127.5 - 1
        assert (clip[0, :, 0] - pixels).abs().max() < 1e-6
        latents = torch.zeros(1, 1, 1, size[1] // 16, size[0] // 16)
        kept = pipe._remove_action_video_padding_from_latent(latents, sizes)
        assert kept.shape == latents.shape
        given.append(action.image)
        return type("Output", (), {"video": torch.zeros(9, 3, *size[::-1])})

    row, column = shape[0] // 2 + 10, shape[1] // 2 - 12
    picture = np.zeros((*shape, 3), np.uint8)
    picture[row - 1 : row + 2, column - 1 : column + 2] = 255
    teacher.networks = (lambda **options: call(**options),)
    teacher.networks[0].__dict__["vae"] = pipe.vae
    views = teacher.imagine((picture, ("s", "t")), np.eye(4)[None], own_K, [0])
    light, K = np.asarray(given[0], float)[..., 0], views.K
    assert views.frames.shape[1:3] == light.shape == tuple(stage.size_of(K)[::-1])
    x = light.sum(0) @ (np.arange(light.shape[1]) + 0.5) / light.sum()
    y = light.sum(1) @ (np.arange(light.shape[0]) + 0.5) / light.sum()
    near = 0.3 / K[0, 0]
    assert abs((x - K[0, 2]) / K[0, 0] - (column + 0.5 - shape[1] / 2) / own_K[0, 0]) < near
    assert abs((y - K[1, 2]) / K[1, 1] - (row + 0.5 - shape[0] / 2) / own_K[1, 1]) < near


# --- one trajectory
@pytest.fixture(scope="module")
def teacher(stage, weights):
    return stage.Cosmos3(settings(stage, weights))


@pytest.fixture(scope="module")
def photo(paths) -> np.ndarray:
    return np.asarray(Image.open(paths / "photos/a.png"))


def views_of(stage, teacher, photo, actions, name=("a", "t000"), kept=(0, 1, 2)):
    path = load("01").integrate(actions, min_frames=3)[0].astype(float)
    return teacher.imagine((photo, name), path, stage.intrinsics(160, 96, 54.0), list(kept))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def test_poses_and_noise_change_the_frames_and_kept_ones_do_not(stage, teacher, photo):
    views = views_of(stage, teacher, photo, LEFT)
    frames = views.frames
    assert frames.shape == (3, *SIZE, 3) and frames.dtype == np.uint8
    assert views.sharpest.shape == (*SIZE, 3) and views.holes is None
    fitted = Image.fromarray(photo).resize(SIZE[::-1], Image.LANCZOS)
    assert (frames[0] == np.asarray(fitted)).all()
    assert (views_of(stage, teacher, photo, LEFT).frames == frames).all()
    assert (views_of(stage, teacher, photo, LEFT, kept=(0, 2)).frames == frames[[0, 2]]).all()
    for other in ({"actions": RIGHT}, {"actions": AHEAD}, {"name": ("a", "t001")}):
        last = views_of(stage, teacher, photo, **{"actions": LEFT} | other).frames[-1]
        assert difference(last, frames[-1]) > 0.1


def test_the_frames_are_those_of_diffusers_own_pipeline(stage, teacher, photo, weights):
    """Loaded and called as its documentation says, with the photograph in its own pixels."""
    views = views_of(stage, teacher, photo, RIGHT)
    c2w = load("01").integrate(RIGHT, min_frames=3)[0].astype(float)
    poses, at = stage.resample(c2w, 0.05, 0.5, 4)
    pipe = diffusers.Cosmos3OmniPipeline.from_pretrained(weights, enable_safety_checker=False)
    assert pipe.config.use_native_flow_schedule
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, flow_shift=10.0
    )
    action = diffusers.CosmosActionCondition(
        mode="forward_dynamics",
        chunk_size=len(poses) - 1,
        domain_name="camera_pose",
        resolution_tier=256,
        raw_actions=torch.tensor(stage.camera_actions(poses)),
        image=Image.fromarray(views.frames[0]),
    )
    own = pipe(
        prompt=teacher.PROMPT,
        action=action,
        fps=30,
        num_inference_steps=2,
        guidance_scale=1.0,
        use_system_prompt=False,
        generator=stage.random_numbers(0, "a", "t000", "cosmos3"),
        output_type="np",
    ).video
    assert len(own) == len(poses)
    assert np.abs(views.frames[1:].astype(float) - 255 * own[at][1:]).max() <= 0.51  # rounding


# --- runs
def test_a_run_keeps_frames_and_their_record(paths, weights, tmp_path):
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run = copy_of(paths, tmp_path / name)
        script("02", "--run", run, *SETTINGS, "--cosmos", weights, "--keep", "ends")
        pictures = sorted((run / "2_views").rglob("*.png"))
        contents.append({str(path.relative_to(run)): path.read_bytes() for path in pictures})
    assert contents[0] == contents[1] and len(contents[0]) == 6  # two frames each, two pictures
    for record in lines(run / "2_views/views.jsonl"):
        made, turns = record["teacher_settings"], record["actions"][0][0].startswith("turn")
        assert made == {
            "model": str(weights),
            "tier": 256,
            "safety_checker": False,
            "steps": 2,
            "gain": 1.0,
            "guidance": 1.0,
            "frames": 25 if turns else 9,
        }
        assert (record["height"], record["width"]) == SIZE and record["teacher"] == "cosmos3"
        assert record["objects"] is None and record["qc"]["sharpness"] is not None


# --- broken folders
def rewritten(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(folder: Path, fault: str):
    part = folder / "transformer"
    file = part / "diffusion_pytorch_model.safetensors"
    if fault == "cut in half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif fault == "no weights":
        file.unlink()
    elif fault == "a weight missing":
        tensors = load_file(file)
        del tensors["action_proj_in.fc.weight"]
        save_file(tensors, file)
    elif fault == "another pipeline":
        rewritten(folder / "model_index.json", _class_name="WanPipeline")
    elif fault == "another network":
        rewritten(part / "config.json", _class_name="WanTransformer3DModel")
    elif fault == "no actions":
        rewritten(part / "config.json", action_gen=False)
    elif fault == "another VAE":
        rewritten(folder / "transformer/config.json", latent_patch_size=1)
    elif fault == "no template":
        (folder / "text_tokenizer/chat_template.jinja").unlink()
    elif fault == "no such word":
        rewritten(part / "config.json", vocab_size=2)
    elif fault == "code":
        mine = f"open({str(folder / 'ran')!r}, 'w')\nclass Mine: pass\n"
        (folder / "text_tokenizer/mine.py").write_text(mine)
        auto = {"AutoTokenizer": [None, "mine.Mine"]}
        rewritten(
            folder / "text_tokenizer/tokenizer_config.json", tokenizer_class="Mine", auto_map=auto
        )
    else:
        (folder / fault).unlink()


FAULTS = ["cut in half", "no weights", "a weight missing", "another pipeline", "another network"]
FAULTS += ["no actions", "another VAE", "no template", "no such word", "code", "model_index.json"]
FAULTS += ["vae/config.json", "scheduler/scheduler_config.json", "text_tokenizer/tokenizer.json"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_one_line(stage, weights, tmp_path, capsys, fault):
    folder = Path(shutil.copytree(weights, tmp_path / "cosmos"))
    spoil(folder, fault)
    with pytest.raises(SystemExit) as end:
        assert stage.Cosmos3(settings(stage, folder)).networks
    error = capsys.readouterr().err
    assert end.value.code == 2 and str(folder) in error and len(error.splitlines()) == 1
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("fault", ["cut in half", "no weights", "another pipeline"])
def test_a_run_on_a_broken_folder_ends_with_one_line(paths, weights, tmp_path, fault):
    run, folder = copy_of(paths, tmp_path), Path(shutil.copytree(weights, tmp_path / "cosmos"))
    spoil(folder, fault)
    result = script("02", "--run", run, *SETTINGS, "--cosmos", folder, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if SCRIPT.name in line]
    assert str(folder) in line and "does not load" in line


@pytest.mark.parametrize("cosmos", ["nowhere/at/all", "empty"])
def test_a_source_that_cannot_be_right_is_one_line(stage, weights, tmp_path, capsys, cosmos):
    (tmp_path / "empty").mkdir()
    source = str(tmp_path / "empty") if cosmos == "empty" else cosmos
    with pytest.raises(SystemExit) as end:
        assert stage.Cosmos3(settings(stage, weights, cosmos=source)).networks
    error = capsys.readouterr().err
    assert end.value.code == 2 and source in error and len(error.splitlines()) == 1
