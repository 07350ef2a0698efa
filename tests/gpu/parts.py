"""The parts of measure.py: python3 tests/gpu/parts.py PART FILE ["tiny" or ""] [DIR of seva]

What is timed are the functions of the scripts, called as their `main` calls them. Weights are
random, which changes no time.
"""

import gc
import importlib.util
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]
from gpu import bench, measure  # noqa: E402

# Qwen2.5-VL-7B as its config.json describes it, and small ones of both networks.
TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
TEXT |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064}
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
VISION |= {"out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
TINY_TEXT = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
TINY_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048}
TINY_VISION = {"depth": 2, "hidden_size": 80, "intermediate_size": 48, "num_heads": 1}
TINY_VISION |= {"out_hidden_size": 128, "window_size": 56, "fullatt_block_indexes": [1]}
TINY_SEVA = {"model_channels": 32, "channel_mult": [1, 1], "transformer_depth": [1, 1]}
TINY_SEVA |= {"num_res_blocks": 1, "num_head_channels": 16, "context_dim": 16}
# Some 70 tokens. They differ from the second on, so little but the pictures is shared.
QUESTION = (
    "Case {k}: image 1 was taken first, image 2 after the camera had moved. The red lamp is at "
    "[{x}, 300, 530, 611] in image 1. Between the two pictures the camera did this, in this order: "
    "turn left 40 degrees; move forward 1.2 meters. Where in image 2 is the lamp now? If it is out "
    "of view, say where it was last seen."
)
ANSWER = "[412, 300, 530, 611]"


@dataclass
class Run:
    part: str
    file: Path  # of the figures
    tiny: bool  # small shapes
    seva: str  # a checkout of Stable Virtual Camera's code, or ""
    folder: Path  # for what is gone afterwards

    def add(self, what: str, values: dict, targets: dict | None = None):
        """Write the values of one measurement, and the targets of some, such as ">= 0.35"."""
        report = json.loads(self.file.read_text())
        line = {"what": what, "values": values, "targets": targets or {}}
        report["parts"][self.part]["measurements"].append(line)
        measure.save(self.file, report)
        print(self.part, what, values, file=sys.stderr, flush=True)


def load(name: str):
    """The script whose file name starts with `name`, as a module."""
    (path,) = ROOT.glob(f"{name}*.py")
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


def seconds_of(function, calls: int = 1) -> float:
    """Median seconds of a call, with what it leaves the GPU to do."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def forget_peak():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (torch.cuda.max_memory_allocated() or host) / 1e9


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


# --- Kernels ---
def run_tests(run: Run):
    """pytest, a file at a time."""
    options = ["-k", "against_oracle and 73"] if run.tiny else []
    if not run.tiny and importlib.util.find_spec("xdist"):
        options = ["-n", "4"]  # compiling takes most of the time
    for name in ["rays"] if run.tiny else ["rays", "temporal", "attention"]:
        command = [sys.executable, "-m", "pytest", "-q", *options]
        command.append(f"tests/gpu/interpreted/{name}.py")
        environment = os.environ | {"TRITON_INTERPRET": str(int(run.tiny))}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)
        passed = int((re.findall(r"(\d+) passed", done.stdout) or [0])[-1])
        bad = sum(int(number) for number in re.findall(r"(\d+) (?:failed|error)", done.stdout))
        failed = bad or int(done.returncode != 0)
        run.add(name, {"passed": passed, "failed": failed}, {"failed": "<= 0"})


def run_bench(run: Run, backward: bool = False):
    """Ours in ms and over its floor; of every rival, how many times as long as ours it takes."""
    device, card, train = "cpu", None, ("prefix", "packed", "windows", "pictures")
    if not run.tiny:
        device, name = "cuda", torch.cuda.get_device_name()
        card = next((card for card in bench.CARDS if card in name), None)
    for operation in bench.OPERATIONS:
        if backward and not operation.name.startswith(train):
            continue
        sizes, dtype = operation.sizes, operation.dtype
        if run.tiny:
            sizes, dtype = operation.tiny, torch.float32
        runs = attempt(operation.runs, sizes, device, dtype)
        if isinstance(runs, str):
            run.add(operation.name, {"ours_ms": runs})
            continue
        times_ms = {name: attempt(time_ms, name, *one, backward) for name, one in runs.items()}
        ours_ms = times_ms.pop("ours")
        values = {"ours_ms": ours_ms}
        if card and isinstance(ours_ms, float):
            work = bench.work_of(operation, sizes, backward)
            values["ours / floor"] = ours_ms / bench.floor_of(*work, card)
        for name, ms in times_ms.items():
            failed = [x for x in (ms, ours_ms) if isinstance(x, str)]
            values[f"{name} / ours"] = failed[0] if failed else ms / ours_ms
        targets = {} if backward else operation.targets
        run.add(operation.name, values, {f"{x} / ours": f">= {y:g}" for x, y in targets.items()})


def attempt(function, *arguments):
    """What the function returns, or in words how it failed: the others go on."""
    try:
        return function(*arguments)
    except Exception as error:  # whatever a compiler may raise; the table shows it
        return f"failed, {first_line(error)}"


def time_ms(name: str, function, tensors, backward: bool) -> float:
    if torch.cuda.is_available():
        return bench.time_contestant(name, function, tensors, backward)
    return 1e3 * seconds_of(partial(function, *tensors))


# --- The student ---
def random_student(sft, tiny: bool, device: str, dtype):
    """Qwen2.5-VL on random weights, made where it runs; else what load_student of 04 returns."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    from kernels import prepare, register

    register()
    tokenizer = sft.tiny_tokenizer([QUESTION])
    tokenizer.chat_template = sft.TINY_CHAT
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
    ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(token) for k, token in names.items()}
    text, vision = (TINY_TEXT, TINY_VISION) if tiny else (TEXT, VISION)
    sections = [4, 6, 6] if tiny else [16, 24, 24]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    text = text | {"rope_parameters": rope, "bos_token_id": None}
    text |= {"eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": False}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    how = {"dtype": dtype, "attn_implementation": sft.ATTENTION}
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, **how)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    prepare(model, sft.ATTENTION)
    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    sizes |= {"min_pixels": 56 * 56, "max_pixels": sft.MAX_PIXELS}
    image_processor = sft.Qwen2VLImageProcessorPil(**sizes)
    return sft.Student(model, tokenizer, image_processor, "random weights")


def write_questions(folder: Path, pairs: int, per_pair: int, tiny: bool) -> Path:
    """Questions about pairs of pictures, as 03 writes them; a picture has 1,280 tokens."""
    draw, lines = np.random.default_rng(0), []
    for pair in range(pairs):
        images = [f"{pair}_{i}.png" for i in range(2)]
        for image in images:
            coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            coarse.resize((112, 84) if tiny else (1120, 896)).save(folder / image)
        for k in range(1, per_pair + 1):
            asked = "<image><image>" + QUESTION.format(k=k, x=100 * k)
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": ANSWER}]
            record = {"task_type": "D1", "messages": turns, "images": images}
            lines.append(json.dumps(record))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder / "questions.jsonl"


def run_sft(run: Run):
    """A step of 04. Opening the pictures is not in it: 04 does that while the step before runs."""
    sft, folder = load("04"), run.folder
    cfg, dtype, *_, device = sft.start_processes(sft.Config(), folder)
    student = random_student(sft, run.tiny, device, dtype)
    model = student.model
    sft.choose_trained(model, cfg, 4 if run.tiny else cfg.lora_rank)
    optimizers, dummy, norms = sft.make_optimizers(model, cfg), sft.dummy_row(student), []
    questions = sft.read_questions(write_questions(folder, 5, 6, run.tiny), folder)

    def measure_step(what, groups, share=True, padded=False, recompute=True, targets=None) -> float:
        """Questions per second; the defaults are what 04 does."""
        way = replace(cfg, share=share)
        rows = sum((sft.rows_of(student, group, way) for group in groups), [])
        model.train(recompute)  # a layer recomputes its activations in training mode only

        def step():
            counts = sft.count(model, rows)
            parts = sft.micro_batches(rows, cfg.tokens, padded, dummy)
            loss, broken = sft.loss_of(student, parts, cfg, counts["weight"], learn=True)
            sft.clip_gradients(model, folder, 1, loss, norms, rows, broken)
            sft.take_step(optimizers, "constant", 0, 0, 1)

        seconds_of(step, 1 if run.tiny else 2)  # compiles, and makes the optimiser's state
        forget_peak()
        step_s = seconds_of(step, 1 if run.tiny else 5)
        values = {"step_s": step_s, "mfu": "unknown for this card"}
        values |= sft.speed(sft.count(model, rows), step_s, device) | {"peak_gb": peak_gb()}
        run.add(what, values, targets)
        return values["questions_s"]

    groups = sft.group_by_pictures(questions)
    pair, mfu = groups[:1], {"mfu": ">= 0.35"}
    measure_step("5 pairs, 30 questions: a whole pass of 04", groups, targets=mfu)
    ours = measure_step("1 pair, 6 questions", pair, targets=mfu)
    alone = measure_step("the same, not shared", pair, share=False)
    run.add("shared over not shared", {"times": ours / alone}, {"times": ">= 4"})
    measure_step("the same, activations kept", pair, recompute=False)
    model.set_attn_implementation("sdpa")
    sdpa = measure_step("the same, SDPA with a mask", pair, padded=True)
    run.add("kernels over SDPA", {"times": ours / sdpa})


def run_grpo(run: Run):
    """A step of 05. No random answer ends early or earns a reward; that changes no time."""
    sft, refine, folder = load("04"), load("05"), run.folder
    cfg = refine.Config(prompts=4, group=4, max_new_tokens=5 if run.tiny else 256)
    cfg, dtype, *_, device = refine.start_processes(cfg, folder)
    student = random_student(sft, run.tiny, device, dtype)
    model = student.model
    refine.choose_trained(model, cfg, 4 if run.tiny else refine.LORA_RANK)
    came = [weight.clone() for weight in refine.trained_weights(model)]
    optimizers, dummy = [refine.make_adamw(model.parameters(), cfg.lr)], refine.dummy_row(student)
    questions = refine.read_questions(write_questions(folder, 4, 1, run.tiny), folder)
    prompts = []

    def read():
        prompts[:] = [refine.open_prompt(student, question) for question in questions]

    def roll_out():
        half = cfg.dtype == "bfloat16"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            refine.roll_out(student, prompts, 0, refine.grid_of(questions), cfg)

    def update():
        gains = refine.advantages(torch.tensor([prompt["scores"] for prompt in prompts]))
        rows = refine.rows_of(student, prompts, gains, cfg.tokens)
        parts = refine.micro_batches(rows, cfg.tokens, not refine.packs(model), dummy)
        parts = [{"rows": part} for part in parts]
        sums, broken = refine.update(student, came, parts, cfg)
        refine.clip_gradients(model, folder, 1, float(sums[0]), [], rows, broken)
        refine.take_step(optimizers, cfg.schedule, 0, 0, 1)

    for what in ("4 x 4, first step: compiles", "4 x 4"):
        forget_peak()
        values = {"reading_s": seconds_of(read), "rollout_s": seconds_of(roll_out)}
        values |= {"update_s": seconds_of(update), "peak_gb": peak_gb()}
        tokens = sum(len(ids) for prompt in prompts for ids in prompt["tokens"])
        values |= {"response_tokens": tokens, "response_tokens_s": tokens / values["rollout_s"]}
        run.add(what, values)


# --- Stable Virtual Camera ---
@torch.no_grad()
def run_svc(run: Run, compiled: bool = False):
    """A call of the teacher, without its picture encoders, which run once per trajectory."""
    stage = load("02")
    device, dtype = stage.network_place("auto")
    fields, T, px, steps = (TINY_SEVA, 3, 8, 4) if run.tiny else ({}, 21, 72, 50)
    torch.manual_seed(0)
    with torch.device(device):
        network = stage.Seva(stage.SevaConfig(**fields)).eval()
        c2w = torch.eye(4).repeat(T, 1, 1)
        c2w[:, 2, 3] = torch.arange(T) / 10  # it walks ahead
        K = torch.tensor([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]).repeat(T, 1, 1)
        latents, vectors = torch.randn(1, 4, px, px), torch.randn(1, network.cfg.context_dim)
        noise, *eps = torch.randn(steps + 1, T, 4, px, px)
    cond, mask = stage.svc_inputs(latents, vectors, list(range(T)), c2w, K)
    scale = stage.guidance_scale(c2w, K, mask, 4.0)

    inputs = torch.cat([torch.cat([noise, noise]), cond["concat"]], 1)
    level = torch.full((2 * T,), 500, device=device)
    asked = (inputs, level, cond["crossattn"], cond["dense_vector"])

    def measure_call(what, network, steps, targets=None) -> tuple:
        """Seconds of a denoising step, and the noise that the network sees in `asked`."""
        network = partial(network, num_frames=T)
        seen = network(*asked)  # compiles
        forget_peak()
        call_s = seconds_of(lambda: stage.svc_sample(network, noise, cond, scale, steps, eps))
        values = {"call_s": call_s, "denoising_step_ms": 1e3 * call_s / steps, "peak_gb": peak_gb()}
        run.add(f"{what}, {T} frames, {steps} steps", values, targets)
        return call_s / steps, seen

    network = network.to(dtype)
    if compiled:
        network = network.to(memory_format=torch.channels_last)
        network = torch.compile(network, backend="eager" if run.tiny else "inductor")
    what = "ours, compiled" if compiled else "ours"
    ours_s, ours = measure_call(what, network, steps, {"peak_gb": "<= 18"})
    if compiled or not run.seva:
        return
    sys.path.insert(0, run.seva)
    from seva.model import Seva, SevaParams

    with torch.device(device):
        theirs = Seva(SevaParams(**fields)).eval()
    theirs.load_state_dict(network.state_dict())
    del network
    with torch.inference_mode(), torch.autocast(device.type):  # as their own sampling does
        theirs_s, seen = measure_call("its authors' network", theirs, 4 if run.tiny else 10)
    differ = float((seen - ours).norm() / ours.norm())  # 16 bits of another kind: some per cent
    values = {"times": theirs_s / ours_s, "networks_differ_by": differ}
    run.add("ours over its authors'", values, {"times": ">= 2"})


PARTS = {
    "tests": run_tests,
    "bench": run_bench,
    "sft": run_sft,
    "grpo": run_grpo,
    "svc": run_svc,
    "backward": partial(run_bench, backward=True),
    "compiled": partial(run_svc, compiled=True),
}


def main(part: str, file: str, tiny: str = "", seva: str = ""):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(part, Path(file), tiny == "tiny", seva, Path(folder))
        try:
            PARTS[part](run)
        except Exception as error:  # the file says why its figures end here
            run.add("failed", {"why": first_line(error)})
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
