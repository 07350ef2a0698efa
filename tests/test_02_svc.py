"""Stable Virtual Camera in 02: the published code's numbers, then the teacher on tiny weights.

tests/golden holds what is small; the network's 9 MB of weights and the complete files are read
from ../shared/golden where that exists.
"""

import hashlib
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, copy_of, launch, load, script
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kernels.seva import Seva, SevaConfig, timestep_embedding

HERE, SHARED = ROOT / "tests/golden", ROOT.parent / "shared/golden"
SCRIPT = ROOT / "02_imagine_views.py"
VAE_FILE = "diffusion_pytorch_model.safetensors"


def golden(name: str) -> Path:
    path = next((folder / name for folder in (SHARED, HERE) if (folder / name).is_file()), None)
    if path is None:
        pytest.skip(f"{name} is in neither {HERE} nor {SHARED}")
    return path


def tensors(name: str) -> dict[str, torch.Tensor]:
    """Floats come in small exact types: to float32 first (their notes)."""
    return {
        key: t.float() if t.is_floating_point() else t for key, t in load_file(golden(name)).items()
    }


def below(data: dict, prefix: str) -> dict:
    return {
        key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)
    }


def numbered(data: dict, letter: str) -> list[dict]:
    """The groups `letter`0/, `letter`1/, ... that are there."""
    return [
        below(data, prefix)
        for prefix in sorted(
            {key.split("/")[0] + "/" for key in data if re.match(letter + r"\d+/", key)}
        )
    ]


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got - want).abs().max() / want.abs().max())


@pytest.fixture(scope="module")
def stage():
    return load("02")


@pytest.fixture(scope="module")
def network(stage):
    """The reference's own small network, loaded as a user's weights are."""
    return stage.svc_network(str(golden("open_g1_weights.safetensors")))


# --- G1: the network
def test_the_released_size_has_the_published_parameters():
    with torch.device("meta"):
        seva = Seva(SevaConfig())
    lines = golden("open_g1_released_keys.jsonl").read_text().splitlines()
    want = {line["key"]: line["shape"] for line in map(json.loads, lines)}
    assert {key: list(value.shape) for key, value in seva.state_dict().items()} == want
    assert sum(value.numel() for value in seva.parameters()) == 1_263_968_004


@torch.no_grad()
@pytest.mark.parametrize("case", ["c0", "c1", "c2", "c3", "c4"])
def test_network_is_the_published_one(network, case):
    data = below(tensors("open_g1_cases.safetensors"), case + "/")
    frames = int(data["num_frames"]) if "num_frames" in data else None
    got = network(data["x"], data["t"], data["y"], data["dense_y"], num_frames=frames)
    assert (got - data["out"]).abs().max() < 5e-5


@torch.no_grad()
def test_network_agrees_inside(network):
    data = below(tensors("open_g1_cases.safetensors"), "c0/")
    want, seen, hooks = tensors("open_g1_probes_c0.safetensors"), {}, []
    for name in want:

        def keep(module, given, out, name=name):
            seen[name] = out

        hooks.append(network.get_submodule(name).register_forward_hook(keep))
    network(data["x"], data["t"], data["y"], data["dense_y"])
    for hook in hooks:
        hook.remove()
    for name, value in want.items():  # of most only the first and the last frame are kept
        ends = seen[name] if len(seen[name]) == len(value) else seen[name][[0, -1]]
        assert (ends - value).abs().max() < 2e-4, name


@torch.no_grad()
def test_modules_agree_where_a_norm_s_epsilon_matters(network):
    data = below(tensors("open_g1_cases.safetensors"), "mod/")
    block = network.input_blocks[1]
    assert (
        off(block[0](data["h_in"], data["emb"], data["dense_y"]), data["input_blocks.1.0/out"])
        < 1e-4
    )
    assert off(block[1](data["h_in"], data["y"], 4), data["input_blocks.1.1/out"]) < 1e-4
    middle = network.middle_block[1](data["middle_block.1/in"], data["y"], 4)
    assert off(middle, data["middle_block.1/out"]) < 1e-4
    time = below(tensors("open_g1_cases.safetensors"), "temb/")
    for width in (64, 320):
        assert (timestep_embedding(time["t"], width) - time[f"out{width}"]).abs().max() < 1e-5


@torch.no_grad()
def test_a_wrong_sign_would_show(network):
    """The tolerance is not so wide that a fault hides in it."""
    data = below(tensors("open_g1_cases.safetensors"), "c0/")
    wrong = network(data["x"], data["t"], data["y"], -data["dense_y"])
    assert (wrong - data["out"]).abs().max() > 100 * 5e-5


# --- G2: schedule, guidance, sampler
def test_schedule(stage):
    data = tensors("open_g2_sampler.safetensors")
    levels = stage.svc_levels().float()
    assert off(levels, data["sched/table1000"]) < 1e-6
    for n in sorted({int(key.split("/")[1]) for key in data if re.match(r"sched/\d+/", key)}):
        want, sigmas = below(data, f"sched/{n}/"), stage.svc_sigmas(n)
        assert sigmas.dtype == torch.float32 and sigmas[-1] == 0
        assert off(sigmas, want["sigmas"]) < 1e-6
        sigma_hat = sigmas[:-1] + 1e-6
        noise_std = (sigma_hat**2 - sigmas[:-1] ** 2).sqrt()
        assert (noise_std - want["noise_std"]).abs().max() < 1e-8
        assert ((sigma_hat[:, None] - levels).abs().argmin(1) == want["idx_hat"]).all()


def test_guidance_scales(stage):
    cases = numbered(below(tensors("open_g2_sampler.safetensors"), "guider/"), "")
    assert len(cases) == 40
    for case in cases:
        cfg, cfg_min = float(case["cfg"]), float(case["cfg_min"])
        got = stage.guidance_scale(case["c2w"], case["K"], case["mask"].bool(), cfg, cfg_min)
        assert (got - case["scale_mv"]).abs().max() < 1e-5


def closed_form(x, t, y, dense_y):
    """The notes' stand-in for the network: x [n,11,h,w] is 4 latent channels, mask, Plücker map."""
    latent, mask, plucker, tau = x[:, :4], x[:, 4:5], x[:, 5:9], t.view(-1, 1, 1, 1) / 1000
    told = torch.tanh(plucker + 3 * y.mean((1, 2)).view(-1, 1, 1, 1))
    return 0.9 * latent + 0.1 * told - 0.3 * mask * torch.cos(3 * tau) + 0.05 * tau * plucker


@torch.no_grad()
@pytest.mark.parametrize("kind, tolerance", [("analytic_run", 1e-5), ("run", 5e-4)])
def test_sampler_is_the_published_one(stage, request, kind, tolerance):
    """vanilla is the same guidance for all frames. 50 steps of the network: at one guidance."""
    data = tensors("open_g2_sampler.safetensors")
    runs = [key for key in data if key.startswith(kind + "/") and key.endswith("/latents")]
    runs = [key for key in runs if "temporal" not in key]
    if kind == "run":
        runs = [key for key in runs if not key.endswith("50/2.0/latents")]
    if not runs:
        pytest.skip(f"runs of the network are only in the complete file, in {SHARED}")
    seva = closed_form if kind == "analytic_run" else request.getfixturevalue("network")
    for key in runs:
        _, guider, cameras, steps, cfg, _ = key.split("/")
        given = below(data, f"set{cameras}/")
        mask, scale = given["mask"].bool(), torch.full_like(given["mask"].float(), float(cfg))
        if guider == "multiview":
            scale = stage.guidance_scale(given["c2w"], given["K"], mask, float(cfg))
        told = given["input_latents"], mask, given["plucker"], given["clip_mean"]
        cond = stage.svc_condition(*told)
        got = stage.svc_sample(seva, data["noise"], cond, scale, int(steps), data["eps"])
        assert off(got, data[key]) < tolerance, key


@torch.no_grad()
def test_denoiser_replaces_what_is_known_and_guides(stage, network):
    data = tensors("open_g2_sampler.safetensors")
    if "denoise/x" not in data:
        pytest.skip(f"the denoiser's case is only in the complete file, in {SHARED}")
    given, x, sigma = below(data, "setA/"), data["denoise/x"], data["denoise/sigma"]
    mask = given["mask"].bool()
    told = given["input_latents"], mask, given["plucker"], given["clip_mean"]
    twice = torch.cat([x, x]), torch.cat([sigma, sigma])
    both = stage.svc_denoise(network, *twice, stage.svc_condition(*told))
    assert off(both, data["denoise/out_uncond_then_cond"]) < 5e-4
    without, with_pictures = both.chunk(2)
    scale = stage.guidance_scale(given["c2w"], given["K"], mask, 4.0).view(-1, 1, 1, 1)
    guided = without + scale * (with_pictures - without)
    assert off(guided, data["denoise/guided_mv_cfg4"]) < 5e-4


# --- G3: cameras, pictures, whole scenes
def test_plucker_maps(stage):
    data = tensors("open_g3_camera.safetensors")
    for case in numbered(data, "A"):
        w2c, want = case["w2c"] @ torch.linalg.inv(case["w2c_src"]), case["plucker"]
        assert (stage.plucker_rays(w2c, case["K"], *want.shape[-2:]) - want).abs().max() < 1e-5


def normalised(K: torch.Tensor, WH) -> torch.Tensor:
    return K / torch.tensor([*WH, 1])[:, None]


def test_pictures_and_intrinsics_come_to_the_network_s_size(stage):
    data = tensors("open_g3_camera.safetensors")
    assert len(numbered(data, "B")) >= 4
    for case in numbered(data, "B"):
        wh, WH = case["wh"].tolist(), case["WH"].tolist()
        K = stage.fit_intrinsics(case["K_in"], wh, WH)
        assert off(K, case["K_px"]) < 1e-6 and off(normalised(K, WH), case["K_norm"]) < 1e-6
    for case in numbered(data, "Bimg"):
        got = stage.fit_picture(case["uint8"].numpy(), case["WH"].tolist())
        assert (got - case["out"]).abs().max() < 1e-6


def test_clip_sees_what_the_published_code_shows_it(stage):
    data = tensors("open_g3_camera.safetensors")
    full = load_file(golden("open_g3_camera.safetensors"))
    for number, case in enumerate(numbered(data, "F")):
        k, sizes = full[f"F{number}/coef"].double(), [3, *case["hw"].tolist()]
        axes = (torch.arange(float(size)).double() for size in sizes)
        c, i, j = torch.meshgrid(*axes, indexing="ij")
        picture = 0.6 * torch.sin(k[0] * (c + 1) * i + k[1] * j + k[4])
        picture += 0.4 * torch.cos(k[2] * j - k[3] * i / (c + 1) + k[5])
        got = stage.clip_pixels(picture.float())
        assert (got[:, ::4, ::4] - case["out_every4"]).abs().max() < 2e-4


def scenes(letter: str) -> list[dict]:
    lines = golden("open_g3_scenes.jsonl").read_text().splitlines()
    return [scene for scene in map(json.loads, lines) if scene["name"].startswith(letter)]


def published_calls(scene: dict) -> list[list[int]]:
    """The frame numbers in the slots of the calls of the first pass: "!i" is input i, ">j" target j
    of the pass (in World2VLM every frame is one), "NULL" a copy of the last. Of C8 and C9, whose
    first pass imagines some frames only, none."""
    inputs, calls = scene["num_inputs"], []
    if scene["name"][:2] in ("C8", "C9"):
        return []
    one_pass = scene["chunk_strategy"] == "gt"
    for call in scene["chunks"][0]:
        slots = [slot for slot in call if slot != "NULL"]
        frames = [int(slot[1:]) + (inputs if slot[0] == ">" else 0) for slot in slots]
        calls.append(frames + frames[-1:] * (len(call) - len(frames)))
    targets = scene["num_frames"] - inputs
    assert one_pass or np.round(scene["prior_indices"]).tolist() == [*range(1, targets + 1)]
    return calls


@pytest.mark.parametrize("letter", ["C", "E"])
def test_calls_hold_the_published_frames(stage, letter):
    for scene in scenes(letter):
        if calls := published_calls(scene):
            got = stage.svc_calls(scene["num_inputs"], scene["num_frames"], scene["T"])
            assert [*got] == calls, scene["name"]


@torch.no_grad()
@pytest.mark.parametrize("letter, tolerance", [("C", 1e-4), ("E", 5e-4)])
def test_whole_scenes(stage, request, letter, tolerance):
    """Everything around the network (C: its result is given) and everything (E): of each call of
    the first pass the masks, latents, context and rays, and the frames where one pass is all."""
    file = {"C": "open_g3_camera.safetensors", "E": "open_g3_e2e.safetensors"}[letter]
    data, stubs = tensors(file), below(tensors("open_g3_camera.safetensors"), "stub/")
    checked = 0
    for scene in scenes(letter):
        want, calls = below(data, scene["name"] + "/"), published_calls(scene)
        if not want or not calls:
            continue  # the small file holds some of them
        checked += 1
        WH, n = (scene["W"], scene["H"]), scene["num_inputs"]
        pictures = [stage.fit_picture(want[f"image{i}"].numpy(), WH) for i in range(n)]
        pooled = torch.nn.functional.avg_pool2d(torch.stack(pictures), 8)
        latents = torch.einsum("zc,nchw->nzhw", stubs["encM"], pooled)
        vectors = torch.nn.functional.adaptive_avg_pool2d(torch.stack(pictures), 4).flatten(1)
        K = stage.fit_intrinsics(want["Ks_px"].clone(), scene["image_wh"], WH)
        K, final = normalised(K, WH), dict(enumerate(pictures))
        for k, frames in enumerate(calls):
            given = below(want, f"fwd{k}/")
            assert off(K[frames], given["curr_K_norm"]) < 1e-6
            assert torch.equal(want["c2ws"][frames], given["curr_c2w"])
            scaled, T = given["c2w_scaled"], len(frames)  # their unit of length, not ours
            cond, mask = stage.svc_inputs(latents, vectors, frames, scaled, K[frames])
            assert (mask == given["mask"].bool()).all()
            assert off(cond["replace"][T:][mask][:, :4], given["input_latents"]) < tolerance
            assert off(cond["crossattn"][-1, 0], given["clip_mean"]) < tolerance
            if "plucker" in given:
                assert off(cond["dense_vector"][:T], given["plucker"]) < 2e-5
            for name in cond if "cond/concat" in given else ():
                both = torch.cat([given["uc/" + name], given["cond/" + name]])
                assert off(cond[name], both) < tolerance
            if letter == "E":
                scale = stage.guidance_scale(
                    scaled, K[frames], mask, scene["cfg"], scene["cfg_min"]
                )

                def network(*told, T=T):
                    return request.getfixturevalue("network")(*told, T)

                steps, noise = scene["num_steps"], given["noise"]
                z = stage.svc_sample(network, noise, cond, scale, steps, given["eps"])
                assert off(z, given["z"]) < tolerance, (scene["name"], k)
            for frame, z in zip(frames, given["z"], strict=True):
                picture = torch.einsum("cz,zhw->chw", stubs["decM"], z)
                picture = picture.repeat_interleave(8, 1).repeat_interleave(8, 2)
                final.setdefault(frame, picture)
        if scene["chunk_strategy"] == "gt":
            got = torch.stack([final[frame] for frame in range(scene["num_frames"])])
            assert off(got[..., 4::8, 4::8], want["final_div8"]) < tolerance, scene["name"]
    assert checked


# --- the teacher, on tiny random weights laid out as the published ones
@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Three folders as from the hub: the U-Net's one file, an AutoencoderKL in vae/, CLIP."""
    from diffusers import AutoencoderKL
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    fields = {"model_channels": 32, "channel_mult": [1, 1, 1, 2], "num_res_blocks": 1}
    fields |= {"num_head_channels": 16, "context_dim": 16}
    (root / "svc").mkdir()
    seva = Seva(SevaConfig(**fields)).state_dict()
    save_file(seva, root / "svc/model.safetensors", {"config": json.dumps(fields)})
    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    shape = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "latent_channels": 4}
    vae = AutoencoderKL(down_block_types=down, up_block_types=up, **shape)
    vae.save_pretrained(root / "sd/vae")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "image_size": 224, "patch_size": 56, "projection_dim": 16}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**shape)).save_pretrained(root / "clip")
    return root


def names_of(weights: Path) -> list:
    names = ["--svc", weights / "svc", "--svc_vae", weights / "sd", "--svc_clip", weights / "clip"]
    return [*names, "--svc_px", 64, "--steps", 2]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A run of two made-up photographs with three trajectories each, from stage 1."""
    run = tmp_path_factory.mktemp("photographs")
    draw = np.random.default_rng(0)
    for i, width in enumerate((150, 170)):  # near twice as wide as high
        coarse = Image.fromarray(draw.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        (run / "photos").mkdir(exist_ok=True)
        coarse.resize((width, 80), Image.BICUBIC).save(run / f"photos/{i}.png")
    script("01", "--run", run, "--images", run / "photos", "--photo_trajectories", 3)
    return run


def contents(run: Path) -> dict[str, bytes]:
    files = {
        str(p.relative_to(run)): p.read_bytes()
        for p in sorted((run / "2_views").rglob("*"))
        if p.is_file()
    }
    meta = json.loads(files.pop("2_views/meta.json"))
    assert meta.pop("finished") and meta.pop("seconds") >= 0
    return files


@pytest.fixture(scope="module")
def done(photographs, weights, tmp_path_factory) -> Path:
    run = copy_of(photographs, tmp_path_factory.mktemp("svc_done"))
    script("02", "--run", run, "--teacher", "svc", *names_of(weights))
    return run


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "2_views/views.jsonl").read_text().splitlines()]


def test_views_of_a_photograph(stage, done, weights):
    views = records(done)
    assert len(views) == 6
    sha256 = hashlib.sha256((weights / f"sd/vae/{VAE_FILE}").read_bytes()).hexdigest()
    for view in views:
        frames = [np.asarray(Image.open(done / frame)) for frame in view["frames"]]
        assert [frame.shape for frame in frames] == [(64, 128, 3)] * len(view["kept"])
        assert (view["width"], view["height"]) == (128, 64)
        photo = np.asarray(Image.open(view["anchor"]))
        want = (stage.fit_picture(photo, (128, 64)).permute(1, 2, 0).numpy() + 1) / 2 * 255
        assert np.abs(frames[0] - want).max() <= 1  # frame 0 is the photograph
        # 64 high they are 120 and 136 wide: one loses rows, the other 4 columns at each side
        shown = min(1, 128 / (photo.shape[1] * 64 / 80))
        across = 2 * np.degrees(np.arctan(np.tan(np.radians(27)) * shown))
        assert abs(view["fov_x_deg"] - across) < 0.1
        made = view["teacher_settings"]
        assert made["size"] == [128, 64] and made["vae_sha256"] == sha256
        assert made["gain"] == 1.0
    last = [np.asarray(Image.open(done / view["frames"][-1])).astype(int) for view in views]
    assert all(np.abs(a - b).mean() > 0.1 for i, a in enumerate(last) for b in last[:i])


def test_shards_write_the_same_bytes(photographs, weights, done, tmp_path):
    run = copy_of(photographs, tmp_path)
    for i in (1, 0):
        script("02", "--run", run, "--teacher", "svc", *names_of(weights), "--shard", f"{i}/2")
    assert contents(run) == contents(done)


def test_killed_it_resumes_at_the_unfinished_trajectory(photographs, weights, done, tmp_path):
    run = copy_of(photographs, tmp_path)
    process = launch("02", "--run", run, "--teacher", "svc", *names_of(weights))
    while len(whole := sorted(run.glob("2_views/*/*/view.json"))) < 2 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in run.glob("2_views/*/*/view.json")}
    assert 2 <= len(whole) <= len(before) < 6
    script("02", "--run", run, "--teacher", "svc", *names_of(weights))
    assert contents(run) == contents(done)
    again = {path: path.stat().st_mtime_ns for path in before}
    assert again == before  # none was imagined twice


def trajectory_of(photographs: Path, frames: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """A straight walk of `frames` frames from the first photograph: (record, c2w, K)."""
    lines = (photographs / "1_trajectories/trajectories.jsonl").read_text().splitlines()
    record, length_m = json.loads(lines[0]), 0.1 * (frames - 1)
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, 2, 3] = np.linspace(0, length_m, frames)
    record |= {"actions": [["forward", length_m]], "c2w": c2w.tolist()}
    return record, c2w, load("02").intrinsics_of(record)


def teacher_of(stage, weights: Path, **settings):
    names = {"svc": "svc", "svc_vae": "sd", "svc_clip": "clip"}
    names = {key: str(weights / name) for key, name in names.items()}
    settings = {"svc_px": 64, "device": "cpu", "steps": 2} | names | settings
    return stage.Svc(stage.Config(teacher=["svc"], **settings))


def test_kept_frames_are_those_of_the_whole_trajectory(stage, photographs, weights):
    record, c2w, K = trajectory_of(photographs, 8)
    teacher = teacher_of(stage, weights)
    every = teacher.imagine(teacher.anchor(record), c2w, K, [*range(8)])
    assert every.frames.shape == (8, 64, 128, 3) and every.holes is None and every.objects is None
    some = teacher.imagine(teacher.anchor(record), c2w, K, [0, 5, 7])
    assert (some.frames == every.frames[[0, 5, 7]]).all()


def test_a_call_has_as_many_frames_as_the_authors(stage, photographs, weights, monkeypatch):
    """--svc_frames 21: the last camera again, each time with a noise of its own."""
    told, real = [], stage.svc_sample

    def spy(network, noise, cond, *others):
        told.append((noise, cond["dense_vector"][: len(noise)], network.keywords["num_frames"]))
        return real(network, noise, cond, *others)

    monkeypatch.setattr(stage, "svc_sample", spy)
    record, c2w, K = trajectory_of(photographs, 8)
    made = []
    for frames in (0, 21):
        teacher = teacher_of(stage, weights, svc_frames=frames)
        made.append(teacher.imagine(teacher.anchor(record), c2w, K, [0, 7]))
    (short, _, of_short), (noise, cameras, frames) = told
    assert len(short) == of_short == 8 and len(noise) == frames == 21
    assert (noise[:8] == short).all() and len(
        {tuple(one.ravel()[:4].tolist()) for one in noise}
    ) == 21
    assert (cameras[7:] == cameras[7]).all() and (cameras[6] != cameras[7]).any()
    assert (made[0].frames[1] != made[1].frames[1]).any() and len(made[1].frames) == 2
    assert made[1].settings["frames"] == 21


ASPECTS = {(4032, 3024): (768, 576), (3024, 4032): (576, 768), (4000, 2667): (832, 576)}
ASPECTS |= {(600, 600): (576, 576), (1080, 1920): (576, 1024), (300, 100): (1728, 576)}


def test_pictures_keep_their_aspect(stage, weights):
    """The authors' --L_short 576: rounding to 64 crops at most 32 pixels of the long side."""
    teacher = teacher_of(stage, weights, svc_px=576)
    for wh, frames in ASPECTS.items():
        assert tuple(teacher.frame_size(wh)) == frames


@pytest.mark.parametrize("width, height", ASPECTS)
def test_turns_too_wide_for_its_frames_are_refused(stage, weights, width, height):
    """By the field of view of the frames that it really returns, not of the photograph."""
    fov_deg = 54 if width >= height else 2 * np.degrees(np.arctan(width / height * np.tan(0.4712)))
    small = max(width, height) / 150
    width, height = round(width / small), round(height / small)
    teacher, K = teacher_of(stage, weights), stage.intrinsics(width, height, fov_deg)
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    made = teacher.imagine((picture, ("a", "t")), np.tile(np.eye(4), (2, 1, 1)), K, [0, 1])
    most_deg = 0.74 * stage.fov_x_deg_of(made.K)
    for share in (0.98, 1.02):
        for name in ("turn_left", "turn_right"):
            one = {"width": width, "height": height, "fov_x_deg": fov_deg, "room": None}
            one["actions"] = [["forward", 90.0], [name, share * most_deg], ["backward", 0.3]]
            assert bool(teacher.refuses(one)) == (share > 1)


def test_refused_turns_are_counted_and_said(photographs, weights, tmp_path):
    """Made for a view of 54 degrees, asked of frames that show 30."""
    run = copy_of(photographs, tmp_path)
    path = run / "1_trajectories/trajectories.jsonl"
    wide = [json.loads(line) for line in path.read_text().splitlines()]
    for record in wide:
        record["fov_x_deg"] = 30.0
        record["actions"] = [["turn_left", 30.0], *record["actions"]][: 1 + (record != wide[0])]
    wide[1]["actions"] = [["forward", 0.4]]
    path.write_text("".join(json.dumps(record) + "\n" for record in wide))
    told = script("02", "--run", run, "--teacher", "svc", *names_of(weights)).stdout
    assert "left out 5 of 6 trajectories: a turn beyond 0.74 of its view" in told
    assert json.loads((run / "2_views/meta.json").read_text())["counts"]["left out"] == 5


def test_two_processes_of_torchrun_write_the_same_bytes(photographs, weights, done, tmp_path):
    run = copy_of(photographs, tmp_path)
    command = ("02", "--run", run, "--teacher", "svc", *names_of(weights))
    script(*command, processes=2)
    assert contents(run) == contents(done)
    again = script(*command, processes=2)
    assert again.stdout.count("is finished: nothing to do") == 2 and contents(run) == contents(done)


def test_a_metre_is_as_long_in_every_call(stage, photographs, weights, monkeypatch):
    """One scale per trajectory and call: a metre is one unit, however long the walk is."""
    told, real = [], stage.plucker_rays

    def spy(w2c, K, h, w):  # frames stand 0.1 m apart; a call's first is the picture
        told.append(float(w2c[1, :3, 3].norm()) / 0.1)
        return real(w2c, K, h, w)

    monkeypatch.setattr(stage, "plucker_rays", spy)
    record, c2w, K = trajectory_of(photographs, 9)
    for settings in ({}, {"svc_window": 4}):
        teacher = teacher_of(stage, weights, **settings)
        teacher.imagine(teacher.anchor(record), c2w, K, [0, 8])
    assert np.allclose(told[0], 1.0, atol=1e-5) and len(told) == 1 + 3
    assert np.allclose(told[1:], [1, 4, 7], atol=1e-5)  # the picture, then the next three frames


FAULTS = ["missing", "truncated", "wrong shape", "missing key"]
FAULTS += ["vae truncated", "vae pickle", "clip missing key"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_weight_file_is_one_line_that_names_it(stage, weights, tmp_path, capsys, fault):
    copy = shutil.copytree(weights, tmp_path / "weights")
    path, part = copy / "svc/model.safetensors", "svc/model.safetensors"
    if fault.startswith("vae"):
        path, part = copy / "sd/vae/diffusion_pytorch_model.safetensors", "sd"
    elif fault.startswith("clip"):
        path, part = copy / "clip/model.safetensors", "clip"
    if fault == "missing":
        path.unlink()
    elif "truncated" in fault:
        path.write_bytes(path.read_bytes()[:5000])
    elif fault == "vae pickle":
        torch.save(load_file(path), path.with_name("diffusion_pytorch_model.bin"))
        path.unlink()
    else:
        key = "visual_projection.weight" if part == "clip" else "out.2.weight"
        with safe_open(path, "pt") as file:
            meta = file.metadata()
        changed = load_file(path)
        whole = changed.pop(key)
        if fault == "wrong shape":
            changed[key] = whole[:, :7].contiguous()
        save_file(changed, path, meta)
    with pytest.raises(SystemExit) as left:
        assert teacher_of(stage, copy).networks
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(SCRIPT.name)]
    assert left.value.code == 2 and len(said) == 1 and str(copy / part) in said[0], said
    assert "key" not in fault or key in said[0]


def test_a_full_gpu_is_one_line(stage, weights, photographs, tmp_path, capsys, monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    cfg = teacher_of(stage, weights, run=str(copy_of(photographs, tmp_path)), workers=1).cfg
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(stage, "svc_sample", full)
        stage.main(cfg)
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert left.value.code == 2 and len(said) == 1 and "--svc_window" in said[0]
    stage.main(cfg)  # with more memory it goes on in the same folder
    assert len(records(tmp_path)) == 6


def test_nothing_is_begun_with_bad_weights(photographs, tmp_path):
    run, weights = copy_of(photographs, tmp_path), tmp_path / "no"
    done = script("02", "--run", run, "--teacher", "svc", "--svc", weights, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith(SCRIPT.name) and str(weights) in last
    assert not (run / "2_views").exists()  # another --svc is not another setting of a begun folder


WRONG = [{"svc_px": 0}, {"svc_px": 65}, {"svc_window": 1}, {"svc_frames": 65}]
WRONG += [{"svc_window": 8, "svc_frames": 9}]


@pytest.mark.parametrize("wrong", WRONG)
def test_sizes_that_cannot_work_are_one_line(stage, weights, capsys, wrong):
    with pytest.raises(SystemExit) as left:
        teacher_of(stage, weights, **wrong)
    assert left.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
