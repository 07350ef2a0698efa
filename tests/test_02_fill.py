"""`warp --fill`: the sampler on flows with a known answer, known pixels, bytes, faults; base/world.

The networks are small and random: what is tested is where they paint, not what.
"""

import hashlib
import json
import math
import shutil
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, copy_of, lines, load, script
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(ROOT / "base"))
WORLD = ROOT / "base/world"


@pytest.fixture(scope="module")
def stage():
    return load("02")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A network of base/world's kind, of random weights."""
    folder = tmp_path_factory.mktemp("fill") / "world"
    torch.manual_seed(0)
    shape = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1}
    shape |= {"down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4}
    shape |= {"attention_head_dim": 8}
    diffusers.UNet2DModel(in_channels=28, out_channels=12, **shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inpainter(tmp_path_factory):
    """An inpainting pipeline of the published layout with a few thousand random weights."""
    folder = tmp_path_factory.mktemp("fill") / "inpaint"
    numbers = {"<pad>": 0, "<unk>": 1, "same": 2, "place": 3}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<pad>"}
    marks |= {"bos_token": "<pad>", "model_max_length": 8}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **marks)
    torch.manual_seed(0)
    text = {"vocab_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "projection_dim": 16}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=9,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    diffusers.StableDiffusionInpaintPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    run = tmp_path_factory.mktemp("rooms")
    script("01", "--run", run, "--recipe", "tiny", "--rooms", 6, "--heldout", 0.3)
    return run


class Net(torch.nn.Module):
    """A network whose answer is a function of the noisy cells and t."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, cells, t):
        return SimpleNamespace(sample=self.answer(cells, t / 1000))


def test_sampler_follows_the_flow_of_a_known_distribution(stage):
    """Of pixels drawn from N(0.3, 0.5^2) the best guess is known: samples must have that spread."""
    mean, spread = 0.3, 0.5

    def best(cells, t):
        t = t.view(-1, 1, 1, 1)
        noisy = cells[:, :12]
        gain = (1 - t) * spread**2 / ((1 - t) ** 2 * spread**2 + t**2)
        return mean + gain * (noisy - (1 - t) * mean)

    noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    nothing, everywhere = torch.zeros_like(noise), torch.ones(4, 1, 64, 64)
    made = stage.fill_sample(Net(best), noise, nothing, everywhere, 200)
    assert abs(float(made.mean()) - mean) < 0.02
    assert abs(float(made.std()) - spread) < 0.02
    few = stage.fill_sample(Net(best), noise, nothing, everywhere, 4)
    assert abs(float(few.mean()) - mean) < 0.02 and 0.3 < float(few.std()) < spread


def test_network_sees_known_pixels_and_where_it_has_to_paint(stage):
    seen = {}

    def look(cells, t):
        seen["cells"], seen["t"] = cells, t
        return cells[:, :12]

    noisy, known = torch.rand(2, 3, 20, 30), torch.rand(2, 3, 20, 30)
    painted = (torch.rand(2, 1, 20, 30) > 0.5).float()
    back = stage.fill_predict(Net(look), noisy, known, painted, torch.tensor([0.25, 1.0]))
    assert torch.equal(back, known + noisy)  # cells and padding are undone; it says the difference
    assert seen["t"].tolist() == [0.25, 1.0] and seen["cells"].shape == (2, 28, 16, 16)
    shown, mask = seen["cells"][:, 12:24], seen["cells"][:, 24:]
    shown = torch.nn.functional.pixel_shuffle(shown, 2)[..., :20, :30]
    mask = torch.nn.functional.pixel_shuffle(mask, 2)[..., :20, :30]
    assert torch.equal(mask, painted) and torch.equal(shown, known)


def test_known_pixels_spread_into_holes(stage):
    """What is known stays; a hole takes the nearest side's tone, and one level fills a view."""
    view = torch.zeros(1, 3, 37, 52)
    view[..., :20], view[..., 20:] = -0.5, 0.5
    painted = torch.zeros(1, 1, 37, 52)
    painted[..., 8:16], painted[..., 36:] = 1, 1
    found = stage.spread(view + 9 * painted, painted)  # whatever stands in the holes
    known = painted.expand_as(view) == 0
    assert torch.equal(found[known], view[known])
    assert (found[..., 8:16] < 0).all() and (found[..., 36:] > 0.4).all()
    painted[:] = 1
    painted[..., 5, 7] = 0
    found = stage.spread(view, painted)
    assert torch.allclose(found, torch.full_like(found, -0.5), atol=1e-5)


def test_where_a_room_is_painted_does_not_tell_the_way(stage):
    """A motion and its way back are painted in the same places, if that leaves a third of the view;
    holes are always among them. Only turns that are too wide are still told by the wider side."""
    K, told = stage.intrinsics(84, 84, 80.0), {}
    depth = np.full((84, 84), 3.0)
    depth[40:60, 30:50] = 1.5

    def painted(pose, depth_m):
        holes = stage.came_from(pose, K, depth_m)[3]
        both = stage.with_decoy(holes, depth, pose, K)
        assert both[holes].all() and (both.mean() < 2 / 3 or np.array_equal(both, holes))
        return [[mask[:, :42].mean(), mask[:, 42:].mean()] for mask in (holes, both)], both

    for degrees in (10, 20, 30, 40):
        right = np.eye(4)
        right[:3, :3] = stage.yaw_matrix(degrees)
        for pose in (right, right.T):
            (holes, both), _ = painted(pose, 1.0)
            assert abs(np.subtract(*holes)) > 0.2
            told.setdefault(degrees, []).append(bool(abs(np.subtract(*both)) > 0.02))
    assert told == {10: [False] * 2, 20: [False] * 2, 30: [True] * 2, 40: [True] * 2}
    for axis in (0, 2):
        ways = []
        for metres in (-0.8, 0.8):
            pose = np.eye(4)
            pose[axis, 3] = metres
            ways.append(painted(pose, stage.splat_depth(depth, pose, K))[1])
        assert np.array_equal(*ways)


def test_known_pixels_stay_and_noise_is_the_trajectory_s_own(stage, world):
    fill = stage.Fill(stage.Config(fill=str(world), device="cpu"))
    draw = np.random.default_rng(0)
    frames = draw.integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    holes = np.zeros((3, 40, 40), bool)
    holes[1, :, 30:] = True
    holes[2, 10:12, 10] = True
    made = fill(frames, holes, ("room", "t0"))
    changed = (made != frames).any(-1)
    assert not changed[0].any() and not changed[1, :, :29].any()
    assert changed[1, :, 29:].mean() > 0.9  # the holes and one pixel beside them
    assert not changed[2][:9].any() and not changed[2][13:].any() and changed[2].sum() <= 12
    assert np.array_equal(made, fill(frames, holes, ("room", "t0")))
    other = fill(frames, holes, ("room", "t1"))
    assert (other != made)[1, :, 29:].mean() > 0.9 and np.array_equal(other[0], made[0])


def contents(run) -> dict:
    found = {str(p.relative_to(run)): p for p in sorted((run / "2_views").rglob("*.*"))}
    return {name: p.read_bytes() for name, p in found.items() if not name.endswith("meta.json")}


def test_shards_workers_and_resume_are_byte_identical_in_rooms(world, rooms, tmp_path):
    fill = ("--teacher", "warp", "--fill", world, "--keep", "ends", "--device", "cpu")
    fill += ("--heldout_teacher", "simulator")
    one, other = copy_of(rooms, tmp_path / "one"), copy_of(rooms, tmp_path / "other")
    script("02", "--run", one, *fill, "--workers", 1)
    script("02", "--run", other, *fill, "--workers", 2, "--shard", "1/2")
    for name in ("t001", "t004"):
        shutil.rmtree(other / f"2_views/room_00001/{name}", ignore_errors=True)
    script("02", "--run", other, *fill, "--workers", 2, "--shard", "1/2")
    script("02", "--run", other, *fill, "--workers", 2, "--shard", "0/2")
    want, got = contents(one), contents(other)
    assert want.keys() == got.keys()
    assert [name for name in want if want[name] != got[name]] == []
    views = lines(one / "2_views/views.jsonl")
    assert {v["split"]: v["teacher"] for v in views} == {"train": "warp", "heldout": "simulator"}
    filled = [view for view in views if view["teacher"] == "warp"]
    assert any(view["teacher_settings"]["painted"][1] > 0.1 for view in filled)
    for view in filled:
        assert view["holes"] == [] and view["qc"]["holes"] == 0
        assert (view["qc"]["turn_error_deg"] is None) != (view["qc"]["length"] is None) or len(
            view["actions"]
        ) > 1


def test_paint_hides_an_object_but_does_not_take_it_away(world, rooms, tmp_path):
    """The boxes of filled views are those of exact ones, of all objects of frame 0 that stay in
    sight (else "it disappears" would be taught of what paint covers); the score is the share that
    the warped picture shows."""
    exact, fill, warp = (copy_of(rooms, tmp_path / name) for name in ("exact", "fill", "warp"))
    script("02", "--run", exact, "--keep", "ends")
    how = ("--keep", "ends", "--teacher", "warp")
    script("02", "--run", fill, *how, "--fill", world, "--device", "cpu")
    script("02", "--run", warp, *how)
    scores = []
    records = (lines(run / "2_views/views.jsonl") for run in (exact, fill, warp))
    for true, view, holed in zip(*records, strict=True):
        first, last = ({thing["id"]: thing for thing in seen} for seen in true["objects"])
        assert view["objects"][0] == true["objects"][0]
        assert {thing["score"] for thing in [*true["objects"][0], *true["objects"][1]]} <= {1.0}
        shown = {thing["id"]: thing["visible_px"] for thing in holed["objects"][1]}
        found = {thing["id"]: thing for thing in view["objects"][1]}
        assert found.keys() == first.keys() & last.keys()
        for key, thing in found.items():
            scores.append(thing["score"])
            assert thing == last[key] | {"score": scores[-1]}
            if thing["visible_px"] > 60:  # what is painted beside true holes only lowers it
                assert scores[-1] < 1.2 * shown.get(key, 0) / thing["visible_px"] + 0.1
    assert min(scores) == 0 and max(scores) == 1 and len(scores) > 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two photographs of 150 x 100 pixels, each with a depth file: a wall beyond a nearer block."""
    root = tmp_path_factory.mktemp("photos")
    (root / "in").mkdir()
    draw = np.random.default_rng(0)
    for k in range(2):
        picture = Image.fromarray(draw.integers(0, 256, (10, 15, 3), dtype=np.uint8))
        picture.resize((150, 100), Image.BICUBIC).save(root / f"in/p{k}.png")
        depth = np.full((100, 150), 4.0, np.float32)
        depth[30:70, 50:90] = 2.0
        np.save(root / f"in/p{k}.depth.npy", depth)
    moves = ("--fov_x_deg", 60, "--photo_trajectories", 4, "--move_m", 0.3, 0.8)
    script("01", "--run", root / "run", "--images", root / "in", *moves)
    return root / "run"


def test_photographs_are_filled_by_an_inpainting_pipeline(stage, inpainter, photos, tmp_path):
    plain, one, other = (copy_of(photos, tmp_path / name) for name in ("plain", "one", "other"))
    warp = ("--teacher", "warp", "--device", "cpu", "--keep", "ends", "--max_holes", 1)
    script("02", "--run", plain, *warp)
    warp += ("--fill", inpainter, "--steps", 2)
    script("02", "--run", one, *warp, "--workers", 1)
    for shard in ("1/2", "0/2"):
        script("02", "--run", other, *warp, "--workers", 2, "--shard", shard)
    want, got = contents(one), contents(other)
    assert want.keys() == got.keys()
    assert [name for name in want if want[name] != got[name]] == []
    grey = {
        view["traj_id"] + view["scene_id"]: view for view in lines(plain / "2_views/views.jsonl")
    }
    painted = 0
    for view in lines(one / "2_views/views.jsonl"):
        before = grey[view["traj_id"] + view["scene_id"]]
        for hollow, full in zip(before["frames"], view["frames"], strict=True):
            hollow = np.asarray(Image.open(plain / hollow))
            full = np.asarray(Image.open(one / full))
            known = ~stage.widen((hollow == stage.FILL).all(-1)[None]).numpy()[0]
            assert hollow.shape == full.shape and (hollow == full)[known].all()
            painted += (hollow != full).any(-1).sum()
        assert view["teacher_settings"]["fill"] == str(inpainter)
    assert painted > 1000


def damage(folder, kind):
    (weights,) = folder.rglob("unet/*.safetensors") if kind == "unet" else folder.glob("*.safe*")
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "shape":
        state = load_file(weights)
        state["conv_in.weight"] = state["conv_in.weight"][:, :5].clone()
        save_file(state, weights)
    else:
        weights.unlink()


@pytest.mark.parametrize("kind", ["cut", "shape", "gone", "unet", "nowhere"])
def test_a_wrong_folder_is_one_line(world, inpainter, rooms, tmp_path, kind):
    run, folder = copy_of(rooms, tmp_path / "run"), tmp_path / "weights"
    if kind != "nowhere":
        shutil.copytree(inpainter if kind == "unet" else world, folder)
        damage(folder, kind)
    done = script("02", "--run", run, "--teacher", "warp", "--fill", folder, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert str(folder) in done.stderr.splitlines()[-1], done.stderr
    assert not (run / "2_views/meta.json").exists()


# --- base/train_world.py ---
def test_training_resumes_exactly_and_its_loss_is_the_equation_s(rooms, tmp_path, monkeypatch):
    import train_world

    monkeypatch.setattr(train_world, "BATCH", 4)
    monkeypatch.setattr(train_world, "SAVE_EVERY", 2)
    monkeypatch.setattr(train_world, "WIDTHS", {"block_out_channels": [16] * 4})
    monkeypatch.setattr(train_world, "HEADS", {"attention_head_dim": 8, "norm_num_groups": 4})
    run = copy_of(rooms, tmp_path / "run")

    def train(*arguments):
        monkeypatch.setattr(sys, "argv", ["x", "--run", str(run), "--steps", "6", *arguments])
        train_world.main()

    train("--out", "whole")
    train("--out", "parts", "--until", "3")  # its last checkpoint is that of step 2
    train("--out", "parts")
    whole, parts = (
        [line["loss"] for line in lines(run / name / "metrics.jsonl")]
        for name in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 6
    weights = "diffusion_pytorch_model.safetensors"
    assert (run / "whole" / weights).read_bytes() == (run / "parts" / weights).read_bytes()
    pairs = train_world.load_pairs(run)
    assert len(pairs) == 2 * len(lines(run / "1_trajectories/trajectories.jsonl"))
    known = pairs[..., 3] == 0
    off = np.abs(pairs[..., :3].astype(int) - pairs[..., 4:]).mean(-1)
    assert np.median(off[known]) < 8 < np.median(off[~known])  # warped pixels are the truth's

    truth, noisy, known, painted, t = train_world.batch(pairs, 5, 0)
    guess = torch.rand_like(truth)
    monkeypatch.setattr(train_world.views, "fill_predict", lambda *_: guess)
    got = float(train_world.loss_of(Net(None), truth, noisy, known, painted, t))
    want, number = 0.0, 0
    for b in range(len(truth)):
        in_hole = painted[b, 0] == 1
        want += float(((guess[b] - truth[b]).double() ** 2)[:, in_hole].sum())
        number += 3 * int(in_hole.sum())
    assert math.isclose(got, want / number, rel_tol=1e-5)


@pytest.mark.skipif(not WORLD.is_dir(), reason="base/world is not here: make world")
def test_world_weights_log_and_command_belong_together():
    meta = json.loads((WORLD / "meta.json").read_text())
    for name, digest in meta["sha256"].items():
        assert hashlib.sha256((WORLD / name).read_bytes()).hexdigest() == digest, name
    assert "base/train_world.py" in meta["command"]
    assert len(lines(WORLD / "metrics.jsonl")) == meta["steps"]
    weights = load_file(WORLD / "diffusion_pytorch_model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) <= 4e6
    assert (WORLD / "diffusion_pytorch_model.safetensors").stat().st_size <= 8e6
