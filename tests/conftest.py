"""Loads the numbered scripts (their names start with a digit, so `import` cannot) and makes small question files."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def load(name: str):
    """The script whose file name starts with `name`, as a module: load("04")."""
    path, = ROOT.glob(f"{name}*.py")
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


def script(name: str, *arguments, processes: int = 1, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run a script as a user would, under torchrun where `processes` says so."""
    path, = ROOT.glob(f"{name}*.py")
    runner = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]
    done = subprocess.run([*runner, str(path), *map(str, arguments)], capture_output=True, text=True, **options)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def write_questions(path: Path, root: Path, scenes: int, seed: int = 0, pictures: int = 2, per_scene: int = 3):
    """A question file in the published format over random pictures; the answer depends on the question's number."""
    draw, lines = np.random.default_rng(seed), []
    for scene in range(scenes):
        images = []
        for k in range(pictures):
            image = root / f"2_views/s{scene}/{k}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (84, 84, 3), dtype=np.uint8)).save(image)
            images.append(str(image.relative_to(root)))
        for number in range(per_scene):
            answer = f"turn {draw.choice(['left', 'right'])} {10 * draw.integers(1, 9)} degrees"
            lines.append({"task_type": "A2", "scene_id": f"s{scene}", "images": images, "messages": [
                {"role": "user", "content": "<image>" * pictures + f"Which way did the camera turn, question {number}?"},
                {"role": "assistant", "content": answer}]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run folder with questions and an untrained tiny student in 4_base/, whose weights are shaken so that every picture matters."""
    import torch
    from safetensors.torch import load_file, save_file
    folder = tmp_path_factory.mktemp("run")
    write_questions(folder / "3_qa/sft.jsonl", folder, scenes=12)
    write_questions(folder / "3_qa/grpo.jsonl", folder, scenes=12, per_scene=1)
    sft = load("04")
    sft.build_tiny(folder / "4_base", [line for line in (folder / "3_qa/sft.jsonl").read_text().splitlines()], seed=0)
    weights = folder / "4_base/model.safetensors"
    generator = torch.Generator().manual_seed(1)
    shaken = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in load_file(weights).items()}
    save_file(shaken, weights, metadata={"format": "pt"})
    return folder
