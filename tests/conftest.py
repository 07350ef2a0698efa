"""Loads the numbered scripts, which `import` cannot, and makes small question files."""

import atexit
import functools
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map_only

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # kernels/, wherever pytest was started
GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
torch.set_num_threads(1)  # pytest's workers share the cores, and waiting threads would spin
dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)  # as in a run of 04 or 05


def load(name: str):
    """The script whose file name starts with `name`, as a module: load("04")."""
    (path,) = ROOT.glob(f"{name}*.py")
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


@functools.cache
def warm() -> subprocess.Popen:
    """The process that runs the scripts in its forks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests/warm.py"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, text=True, env=environment)
    atexit.register(process.communicate)  # ends its input
    return process


class Started:
    """A script that runs in a fork of warm(), to be asked what subprocess.Popen is asked."""

    def __init__(self, path: Path, *arguments, plant: str = "", env: dict | None = None):
        """plant: Python that runs before the script, in its process."""
        self.kept = tempfile.TemporaryDirectory()
        self.folder = Path(self.kept.name)
        call = {"script": str(path), "arguments": [*map(str, arguments)], "plant": plant}
        call |= {"environment": dict(env or os.environ), "folder": str(self.folder)}
        warm().stdin.write(json.dumps(call) + "\n")
        warm().stdin.flush()
        while not (self.folder / "pid").exists():
            assert warm().poll() is None, "tests/warm.py ended"
            time.sleep(0.002)
        self.pid = int((self.folder / "pid").read_text())

    def poll(self) -> int | None:
        assert warm().poll() is None, "tests/warm.py ended"
        file = self.folder / "status"
        return int(file.read_text()) if file.exists() else None

    def wait(self, timeout_s: float = 600) -> int:
        end = time.monotonic() + timeout_s
        while (status := self.poll()) is None:
            assert time.monotonic() < end, f"still running after {timeout_s} s"
            time.sleep(0.005)
        return status

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def said(self, name: str) -> str:
        return (self.folder / name).read_text()


def script_path(name: str | Path) -> Path:
    """script_path("04"), script_path("tests/gpu/bench"); a path as it is."""
    (path,) = [name] if isinstance(name, Path) else ROOT.glob(f"{name}*.py")
    return path


def launch(name: str | Path, *arguments, **options) -> Started:
    return Started(script_path(name), *arguments, **options)


def launch_all(name: str, *arguments, processes: int, **options) -> list[Started]:
    """As torchrun would: its variables tell the processes of each other."""
    if processes == 1:
        return [launch(name, *arguments, **options)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started, more = [], {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    more |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    more |= options.pop("env", os.environ)
    for rank in range(processes):
        env = more | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        started.append(launch(name, *arguments, env=env, **options))
    return started


def wait_for_all(started: list[Started]) -> int:
    """The first status that is not 0, upon which the others are killed; otherwise 0."""
    while None in (found := [one.poll() for one in started]) and not any(found):
        time.sleep(0.005)
    for one, status in zip(started, found, strict=True):
        if status is None:
            one.kill()
            one.wait()
    return next(filter(None, found), 0)


def script(
    name: str | Path, *arguments, processes: int = 1, check: bool = True, fresh=False, **options
):
    """Run a script as a user would, in a fork of warm(), or in several that know of each other.

    fresh: with a user's imports and torchrun itself, which take seconds.
    """
    command = [sys.executable, str(script_path(name)), *map(str, arguments)]
    if fresh and processes > 1:
        torchrun = "-m torch.distributed.run --standalone --nproc-per-node"
        command[1:1] = [*torchrun.split(), str(processes), "--"]
    if fresh:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    else:
        started = launch_all(name, *arguments, processes=processes, **options)
        status = wait_for_all(started)
        said = ["".join(one.said(output) for one in started) for output in ("out", "err")]
        done = subprocess.CompletedProcess(command, status, *said)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def copy_of(run: Path, target: Path) -> Path:
    """A run that is as far as `run` was after stage 1."""
    shutil.copytree(run / "1_trajectories", target / "1_trajectories")
    return target


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, records: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_questions(path: Path, root: Path, scenes: int, seed=0, pictures=2, per_scene=3):
    """A question file in the published format over random pictures and with random answers."""
    draw, records = np.random.default_rng(seed), []
    for scene in range(scenes):
        images = []
        for k in range(pictures):
            image = root / f"2_views/s{scene}/{k}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (84, 84, 3), dtype=np.uint8)).save(image)
            images.append(str(image.relative_to(root)))
        for number in range(per_scene):
            asks = "<image>" * pictures + f"Which way did the camera turn, question {number}?"
            way, degrees = draw.choice(["left", "right"]), 10 * draw.integers(1, 9)
            question = {"role": "user", "content": asks}
            answer = {"role": "assistant", "content": f"turn {way} {degrees} degrees"}
            record = {"task_type": "A2", "scene_id": f"s{scene}", "images": images}
            records.append(record | {"messages": [question, answer]})
    write_lines(path, records)


def tolerance(plain: list, want: list) -> list:
    """How far each result may be from the oracle's: four times as far as plain torch's is."""
    pairs = zip(plain, want, strict=True)
    return [4 * (p - w).abs().max() + 1e-7 * w.abs().max() for p, w in pairs]


def check(names: tuple, got: list, want: list, allowed: list):
    for name, g, w, most in zip(names, got, want, allowed, strict=True):
        error = (g - w).abs().max()
        assert error <= most, f"{name} is off by {error:.1e}, allowed {most:.1e}"


def where_kernels_run(function):
    """`function`, its tensors brought to the GPU and its results back; else just `function`."""
    if not GPU:
        return function

    def there(*arguments, **options):
        both = tree_map_only(torch.Tensor, torch.Tensor.cuda, (arguments, options))
        return function(*both[0], **both[1]).cpu()

    return there


def far_apart(x: torch.Tensor, axis: int, folder: Path) -> torch.Tensor:
    """x with steps of 2^30 numbers along `axis`, of at most 3 places, in a file of holes.

    An offset that wraps at 2^31 finds a hole, zeros, in front of x, and no foreign memory.
    """
    strides = list(x.stride())
    strides[axis] = 2**30
    numbers = 2**32 + x.numel()
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    path.touch()
    os.truncate(path, numbers * x.element_size())
    file = torch.from_file(str(path), shared=True, size=numbers, dtype=x.dtype)
    return file.as_strided(x.shape, strides, 2**31).copy_(x)


def tiny_qwen(run: Path, folder: Path, attention: str, family: str):
    """Another family: a random Qwen2.5-VL with windows, or a Qwen3.5 with layers that carry a
    state; tokenizer and processor from the tiny student."""
    import transformers

    sft = load("04")
    if not (folder / family).is_dir():
        student = sft.load_student(str(run / "4_base"), torch.float32, "cpu", "eager", 10**6)
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
        text = {"vocab_size": len(student.tokenizer), "hidden_size": 128, "rope_parameters": rope}
        text |= {"intermediate_size": 96, "num_hidden_layers": 2}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        vision = {"depth": 2, "hidden_size": 80, "intermediate_size": 48, "num_heads": 1}
        vision |= {"patch_size": 14, "temporal_patch_size": 1, "out_hidden_size": 128}
        if family == "qwen2.5":
            name = "Qwen2_5_VL"
            vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        else:
            name = "Qwen3_5"
            rope |= {"partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}
            text |= {"head_dim": 32, "layer_types": ["linear_attention", "full_attention"]}
            text |= {f"linear_{what}_head_dim": 16 for what in ("key", "value")}
            text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        ids = {name: getattr(student.model.config, name) for name in names}
        config = getattr(transformers, f"{name}Config")
        config = config(text_config=text, vision_config=vision, **ids)
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        model.save_pretrained(folder / family)
        for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
            shutil.copy(run / "4_base" / name, folder / family / name)
        shutil.copy(run / "4_base/chat_template.jinja", folder / family)
    return sft.load_student(str(folder / family), torch.float32, "cpu", attention, 10**6)


def student_of(run: Path, folder: Path, family: str = "qwen3", attention: str = "world2vlm"):
    """The tiny student of the fixture `run`, or one of another family and its size in `folder`."""
    if family != "qwen3":
        return tiny_qwen(run, folder, attention, family)
    return load("04").load_student(str(run / "4_base"), torch.float32, "cpu", attention, 10**6)


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run folder with questions, and in 4_base/ an untrained tiny student.

    Its weights are shaken, so that every picture matters.
    """
    folder = tmp_path_factory.mktemp("run")
    write_questions(folder / "3_qa/sft.jsonl", folder, scenes=12)
    write_questions(folder / "3_qa/grpo.jsonl", folder, scenes=12, per_scene=1)
    texts = (folder / "3_qa/sft.jsonl").read_text().splitlines()
    load("04").build_tiny(folder / "4_base", texts, seed=0)
    weights = folder / "4_base/model.safetensors"
    generator, shaken = torch.Generator().manual_seed(1), {}
    for name, weight in load_file(weights).items():
        shaken[name] = weight + 0.05 * torch.randn(weight.shape, generator=generator)
    save_file(shaken, weights, metadata={"format": "pt"})
    return folder
