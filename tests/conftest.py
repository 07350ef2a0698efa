"""Loads the numbered scripts (their names start with a digit, so `import` cannot) and makes small question files."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_map_only

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # kernels/, wherever pytest was started
GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
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
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]
    runner = [sys.executable] if processes == 1 else torchrun
    done = subprocess.run([*runner, str(path), *map(str, arguments)], capture_output=True, text=True, **options)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def copy_of(run: Path, target: Path) -> Path:
    """A run that is as far as `run` was after stage 1."""
    shutil.copytree(run / "1_trajectories", target / "1_trajectories")
    return target


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def tolerance(plain: list, want: list) -> list:
    """How far each result may be from the oracle's: four times as far as plain torch of the same precision."""
    return [4 * (p - w).abs().max() + 1e-7 * w.abs().max() for p, w in zip(plain, want, strict=True)]


def check(names: tuple, got: list, want: list, allowed: list):
    for name, g, w, most in zip(names, got, want, allowed, strict=True):
        error = (g - w).abs().max()
        assert error <= most, f"{name} is off by {error:.1e}, allowed {most:.1e}"


def where_kernels_run(function):
    """`function`, its tensors brought to the GPU and its result back, gradients too; under Triton's interpreter just `function`."""
    if not GPU:
        return function

    def there(*arguments, **options):
        arguments, options = tree_map_only(torch.Tensor, torch.Tensor.cuda, (arguments, options))
        return function(*arguments, **options).cpu()

    return there


def tiny_qwen25(run: Path, folder: Path, attention: str):
    """The other family: a random Qwen2.5-VL with windowed attention, with the tiny student's tokenizer and processor."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    sft = load("04")
    if not (folder / "qwen25").is_dir():
        student = sft.load_student(str(run / "4_base"), torch.float32, "cpu", "eager", 10**6)
        ids = {key: getattr(student.model.config, key) for key in ("image_token_id", "video_token_id", "vision_start_token_id",
                                                                   "vision_end_token_id")}
        config = Qwen2_5_VLConfig(
            text_config=dict(vocab_size=len(student.tokenizer), hidden_size=128, intermediate_size=96, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2,
                             rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6])),
            vision_config=dict(depth=2, hidden_size=80, intermediate_size=48, num_heads=1, patch_size=14, out_hidden_size=128,
                               window_size=56, fullatt_block_indexes=[1], temporal_patch_size=1), **ids)
        torch.manual_seed(0)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "qwen25")
        for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
            shutil.copy(run / "4_base" / name, folder / "qwen25" / name)
    return sft.load_student(str(folder / "qwen25"), torch.float32, "cpu", attention, 10**6)


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
