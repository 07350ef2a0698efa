"""Train base/world, the small world model that paints what a warped view of a room lacks.

A view is warped to another camera by its exact depth (teacher `warp` of stage 2); a U-Net paints
the holes. It is trained by flow matching and predicts the clean view x from a noisy one:

    x_t = (1 - t) x + t noise,   L = mean over holes of (x - known - net(x_t, known, holes, t))^2

with `known` the warped view, its holes grown over from their edges. The loss is on x, not on the
velocity (noise - x), which would weigh the last touches 1 / t^2 times as much: few steps must paint
walls first. For the same reason t = 1 - u^2, u uniform in 0..1: little noise shows x itself, and
nothing is learned there about going on with a wall. Stage 2 holds the sampler and how the network
sees a view.

Reads   RUN/1_trajectories (make world: 2,500 rooms that no other recipe draws)
Writes  RUN/pairs.npy, uint8 [n, H, W, 7]: warped view, its holes grown over, what is painted, true
        view, both ways of every path
        RUN/world/: step.pt to resume from, metrics.jsonl, then a UNet2DModel folder and meta.json

    python base/train_world.py --run runs/world
"""

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for kernels/
LEVELS = {"down_block_types": ["DownBlock2D"] * 2 + ["AttnDownBlock2D"] * 2}
LEVELS |= {"up_block_types": ["AttnUpBlock2D"] * 2 + ["UpBlock2D"] * 2}
WIDTHS = {"block_out_channels": [32, 64, 96, 128], "layers_per_block": 1}
HEADS = {"attention_head_dim": 16, "norm_num_groups": 16}
BATCH, LR, MUON_LR, DECAY = 32, 1e-3, 0.01, 0.995
WARMUP, COOLDOWN = 100, 0.3  # steps; share of all. The same steps between: more can be asked later
SAVE_EVERY = 100


def stage(name: str):
    """A stage's script as a module."""
    spec = importlib.util.spec_from_file_location(name.partition("_")[2], ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


views = stage("02_imagine_views")


def pairs_of(job) -> np.ndarray:
    """uint8 [2, H, W, 7] of a trajectory's first and last view: there, and back."""
    run, trajectory = job
    room = views.load_room(run / trajectory["room"])
    K, start = views.intrinsics_of(trajectory), views.start_pose(room, trajectory["start"])
    end = start @ np.array(trajectory["c2w"][-1])
    made = []
    for one, other in ((start, end), (end, start)):
        picture, _, depth = views.render(room, one, K)
        pose = np.linalg.inv(one) @ other
        moved = np.abs(pose[:3, 3]).max() > 1e-6
        z = views.splat_depth(depth, pose, K) if moved else 1.0
        warped, _, _, holes = views.look_back(picture, pose, K, z)
        truth = views.render(room, other, K)[0]
        made.append(np.concatenate([warped, holes[..., None], truth], -1))
    return np.stack(made)


def grown_over(job) -> np.ndarray:
    """The same as the network sees it: known view, painted, true view."""
    torch.set_num_threads(1)
    warped, holes, truth = torch.from_numpy(pairs_of(job)).permute(0, 3, 1, 2).split((3, 1, 3), 1)
    painted = views.widen(holes[:, 0])[:, None]
    known = views.spread(views.to_unit(warped), painted.float())
    known = ((known + 1) * 127.5).round().clamp(0, 255).byte()
    return torch.cat([known, painted.byte(), truth], 1).permute(0, 2, 3, 1).numpy()


def load_pairs(run: Path) -> np.ndarray:
    """All pairs, made once: [n, H, W, 7] on disk."""
    path = run / "pairs.npy"
    if not path.is_file():
        lines = (run / "1_trajectories/trajectories.jsonl").read_text().splitlines()
        jobs = [(run, json.loads(line)) for line in lines]
        with multiprocessing.Pool() as pool:
            made = pool.imap(grown_over, jobs, 32)
            pairs = np.concatenate([*tqdm(made, "pairs", len(jobs))])
        np.save(path.with_suffix(".part.npy"), pairs)
        os.replace(path.with_suffix(".part.npy"), path)
    return np.load(path, mmap_mode="r")


def batch(pairs: np.ndarray, step: int, seed: int):
    """A step's pairs and noise -> true, noisy, known views [B,3,H,W], painted [B,1,H,W], t [B]."""
    g = np.random.default_rng([seed, step])
    part = torch.from_numpy(pairs[np.sort(g.choice(len(pairs), BATCH, False))])
    known, painted, truth = part.permute(0, 3, 1, 2).split((3, 1, 3), 1)
    known, truth = (views.to_unit(picture) for picture in (known, truth))
    t = torch.from_numpy(1 - ((np.arange(BATCH) + g.random(BATCH)) / BATCH) ** 2).float()
    noise = torch.from_numpy(g.standard_normal(truth.shape, np.float32))
    t_ = t.view(-1, 1, 1, 1)
    return truth, (1 - t_) * truth + t_ * noise, known, painted.float(), t


def loss_of(network, truth, noisy, known, painted, t):
    """L of the equation above."""
    with torch.autocast(noisy.device.type, torch.bfloat16):
        x = views.fill_predict(network, noisy, known, painted, t).float()
    return (painted * (x - truth) ** 2).sum() / (3 * painted.sum())


def page(run: Path, world: Path) -> Image.Image:
    """Views of rooms that were not trained on: warped, filled, true; 24 with large holes."""
    fill = views.Fill(views.Config(fill=str(world), device="cpu"))
    lines = (run / "1_trajectories/trajectories.jsonl").read_text().splitlines()
    lines = np.random.default_rng(0).permutation(lines)[:200].tolist()
    pairs = np.concatenate([pairs_of((run, json.loads(line))) for line in lines])
    pairs = pairs[pairs[..., 3].mean((1, 2)) > 0.15][:24]
    warped, holes, truth = pairs[..., :3], pairs[..., 3] > 0, pairs[..., 4:]
    tick = time.perf_counter()
    filled = fill(warped, holes, ("page",))
    seconds = (time.perf_counter() - tick) / len(pairs)
    off = np.abs(filled.astype(float) - truth).mean(-1)
    print(f"{seconds:.3f} s a view; off by {off[holes].mean():.1f} of 255 in holes", end=", ")
    print(f"{off[~holes].mean():.1f} elsewhere")
    rows = np.concatenate([warped, filled, truth], 2).reshape(6, 4, 84, 252, 3)
    rows = np.pad(rows, ((0, 0), (0, 0), (4, 4), (8, 8), (0, 0)), constant_values=255)
    sheet = Image.fromarray(rows.transpose(0, 2, 1, 3, 4).reshape(6 * 92, 4 * 268, 3))
    return sheet.resize((sheet.width * 3 // 2, sheet.height * 3 // 2), Image.LANCZOS)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/world"))
    parser.add_argument("--out", default="world")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--until", type=int, default=0, help="leave off after this step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--page", type=Path, help="a run: draw views of its rooms, and end")
    args = parser.parse_args()
    folder = args.run / args.out
    if args.page:
        return page(args.page, folder).save(folder / "page.jpg", quality=88)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = load_pairs(args.run)

    torch.manual_seed(args.seed)
    network = UNet2DModel(in_channels=28, out_channels=12, **LEVELS, **WIDTHS, **HEADS)
    torch.nn.init.zeros_(network.conv_out.weight)  # at first it says what is known
    network = network.to(args.device, memory_format=torch.channels_last)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    matrices, others = [], []
    for name, p in network.named_parameters():
        inner = p.ndim > 1 and not name.startswith(("conv_in", "conv_out"))
        (matrices if inner else others).append(p)
    optimizers = [
        torch.optim.AdamW(others, LR, betas=(0.9, 0.99), weight_decay=0.01),
        stage("04_train_sft").Muon(matrices, MUON_LR, 0.01),
    ]
    parts = {"network": network, "average": average, "adamw": optimizers[0], "muon": optimizers[1]}
    print(f"{len(pairs):,} pairs, {sum(p.numel() for p in network.parameters()):,} parameters")
    first = 0
    if (folder / "step.pt").is_file():
        saved = torch.load(folder / "step.pt", args.device, weights_only=True)
        first = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    log = folder / "metrics.jsonl"
    kept = log.read_text().splitlines()[:first] if log.is_file() else []
    log.write_text("".join(line + "\n" for line in kept))

    steps = tqdm(range(first, args.until or args.steps), "steps", initial=first, total=args.steps)
    for step in steps:
        tick = time.perf_counter()
        rate = min(1, (step + 1) / WARMUP, (1 - step / args.steps) / COOLDOWN)
        for optimizer, peak in zip(optimizers, (LR, MUON_LR), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        loss = loss_of(network, *(x.to(args.device) for x in batch(pairs, step, args.seed)))
        network.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(network)
        line = {"step": step + 1, "loss": loss.item(), "lr": LR * rate}
        line["seconds"] = round(time.perf_counter() - tick, 3)
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        steps.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % SAVE_EVERY == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save(states | {"step": step + 1}, folder / "step.part")
            os.replace(folder / "step.part", folder / "step.pt")
    if args.until:
        return
    average.module.to(torch.bfloat16).save_pretrained(folder)
    sums = {}
    for name in ("diffusion_pytorch_model.safetensors", "metrics.jsonl"):
        sums[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    meta = {"command": shlex.join(sys.argv), "steps": args.steps, "sha256": sums}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


if __name__ == "__main__":
    main()
