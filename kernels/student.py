"""A student: the checkpoint, the questions and pictures that it reads, what its answers cost."""

import json
import os
import re
import resource
import shutil
import struct
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, ImageOps
from safetensors import SafetensorError

from kernels.lora import adapter_config, load_adapter
from kernels.register import load_model
from kernels.rows import encode_question

BROKEN = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError)
BROKEN += (AttributeError, MemoryError, struct.error, Image.DecompressionBombError)  # PIL's many


def stop(why: str):
    """End the run for bad input after which nothing sensible can follow: one line, status 2."""
    print(f"{Path(sys.argv[0]).name}: {why}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Student:
    model: torch.nn.Module
    tokenizer: object  # a PreTrainedTokenizerBase
    image_processor: object  # a BaseImageProcessor
    source: str  # the folder or hub id that its base came from


def load_student(source: str, dtype, device: str, attention: str, max_pixels: int) -> Student:
    """A Qwen-VL checkpoint by folder or hub id; see `load_model`. Pictures have max_pixels at most.

    adapter/ in it is a LoRA. AutoProcessor would ask for torchvision. Refusals: see `stop`.
    """
    from transformers import AutoImageProcessor, AutoTokenizer  # a second, which 02 need not wait

    try:
        base = adapter_config(source)["base_model_name_or_path"]
        model = load_model(base, dtype, device, attention)
        load_adapter(model, source)
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(base, trust_remote_code=False)
    except (*BROKEN, RuntimeError, StrictDataclassError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        stop(f"{source} does not load as an image-text-to-text checkpoint: {reason}")
    edges = ("shortest_edge", "longest_edge")
    image_processor.size = {edge: min(image_processor.size[edge], max_pixels) for edge in edges}
    return Student(model, tokenizer, image_processor, base)


def read_picture(path: str | Path) -> Image.Image:
    """RGB, upright as EXIF says; ValueError, with the reason, for a file that is no picture."""
    try:
        if not Path(path).is_file():
            raise ValueError("no such file")  # opening a named pipe would wait for ever
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError("16 or 32 bits a pixel: save it with 8")
            return ImageOps.exif_transpose(file).convert("RGB")
    except BROKEN as error:
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from None


def cut_frames(video: str, folder: Path, count: int):
    """Write frames linspace(0, n - 1, count) of a video's n; ValueError where it is damaged."""
    import av  # for videos only: training needs none

    part, taken, last = folder.with_name(f"{folder.name}.{os.getpid()}.part"), {}, -1
    if folder.is_dir():
        return
    try:
        with av.open(video) as container:
            n = sum(packet.size > 0 for packet in container.demux(video=0))
        wanted = np.linspace(0, n - 1, count).astype(int).tolist()
        with av.open(video) as container:
            container.streams.video[0].thread_type = "AUTO"
            for last, frame in enumerate(container.decode(video=0)):
                if last in wanted:
                    taken[last] = frame.to_image()
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(str(error)) from error
    if last + 1 < max(1, 0.98 * n):  # a good video may hide its last frames
        raise ValueError(f"ends after {last + 1} of its {n} frames")
    part.mkdir(parents=True, exist_ok=True)
    for i, number in enumerate(wanted):
        picture = taken[number] if number in taken else frame.to_image()
        picture.save(part / f"{i:03d}.png", compress_level=1)
    with suppress(OSError):  # another shard was first
        part.rename(folder)
    shutil.rmtree(part, ignore_errors=True)


def open_pictures(student: Student, paths: list[str], blank: bool = False) -> tuple:
    """Picture files -> patches [P, channels x patch] and grids [pictures, 3]; blank: mean grey."""
    pictures = [read_picture(path) for path in paths]
    if blank:
        pictures = [Image.new("RGB", picture.size, (127, 127, 127)) for picture in pictures]
    seen = student.image_processor(images=pictures, return_tensors="pt")
    return seen["pixel_values"], seen["image_grid_thw"]


LONGEST_TEXT = 40_000  # characters of a question and its answer: one more would fill the memory


@cache  # many questions ask about the same picture
def check_picture(image: Path, root: Path):
    """ValueError where a question may not use this file."""
    if not image.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{image} lies outside the data root {root}: copy it, or set --data_root")
    if not image.is_file():
        raise ValueError(f"{image} is missing")


def read_questions(path: Path, root: Path) -> list[dict]:
    """Records with `images` resolved inside `root`; unusable ones are named and skipped.

    Each gets a `name`, its line, and `written`, its paths: draws go by them wherever the run lies.
    """
    if not path.is_file():
        stop(f"{path} is missing: run the stage that writes it, or name another file")
    questions, keys = [], ("task_type", "messages", "images")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not record.keys() >= {*keys}:
                raise ValueError(f"not a JSON object with {', '.join(keys)}")
            roles = [message["role"] for message in record["messages"]]
            text = "".join(message["content"] for message in record["messages"])
            images = [root / image for image in record["images"]]
            "".join([*roles, text]).encode()  # TypeError for other things, ValueError for no UTF-8
            if len(roles) < 2 or roles[-1] != "assistant":
                raise ValueError("messages must be a user's question and the assistant's answer")
            if not images or text.count("<image>") != len(images):
                raise ValueError(f"{len(images)} images but {text.count('<image>')} <image> marks")
            if len(text) > LONGEST_TEXT:
                raise ValueError(f"its text has {len(text)} characters, more than {LONGEST_TEXT}")
            for image in images:
                check_picture(image, root)
        except (*BROKEN, RecursionError) as error:
            print(f"{path}:{number}: skipped, {error}", file=sys.stderr)
        else:
            more = {"name": f"{path.name} line {number}", "written": record["images"]}
            questions.append(record | {"images": [str(image) for image in images]} | more)
    return questions


def prompts_of(student: Student, batch: list[dict], blank: bool) -> list[dict]:
    """Per question its prompt, as `generate` takes it, or the "fault" for which there is none."""
    seen, prompts = {}, []
    for question in batch:
        paths, video = question["record"]["images"], question.get("video")
        what = f"unreadable video: {video}" if video else f"unreadable picture: {paths[-1]}"
        try:
            if str(paths) not in seen:  # the same pictures are the same tensor
                if video:
                    cut_frames(video, Path(paths[0]).parent, len(question["images"]))
                seen[str(paths)] = open_pictures(student, paths, blank)
            what, (pixels, grids) = "unusable text", seen[str(paths)]
            whole = encode_question(student, question["record"], grids)
        except (OSError, ValueError) as error:
            prompts.append({"fault": f"{what}: {str(error)[:200]}"})
            continue
        prompt = {"ids": whole["ids"][: whole["prompt"]], "pixels": pixels, "grids": grids}
        prompt["positions"] = whole["positions"][:, : whole["prompt"]]
        prompts.append(prompt)
    return prompts


def vlm_flops(model, prompt_tokens: int, grids: torch.Tensor, generated: int) -> int:
    """Operations of one answer, without padding: 2 per weight that a token or a patch meets, and
    per layer 4 width times the sum over queries of the keys that they are compared with.

    grids [pictures, 3]: frames, rows and columns in patches. No mask counts, nor the last token.
    """
    text, vision = model.config.get_text_config(), model.config.vision_config
    weights = Counter()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
            part = re.search("head|language_model|merger|$", name)[0]  # "": the tower
            weights[part] += module.weight.numel()
    frames, patches = grids[:, 0], grids[:, 1] * grids[:, 2]  # the tower looks at a frame at a time
    every = int((frames * patches).sum())
    whole = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2  # of the other layers
    keys = whole * patches + (vision.depth - whole) * patches.clamp(max=window)
    seen = 2 * weights[""] * every
    seen += 2 * weights["merger"] * (every // vision.spatial_merge_size**2)
    seen += 4 * vision.hidden_size * int((frames * patches * keys).sum())
    read, heads = prompt_tokens + generated - 1, text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    pairs = prompt_tokens**2 + sum(range(prompt_tokens + 1, read + 1))
    spoken = 2 * weights["language_model"] * read + 2 * weights["head"] * generated
    return seen + spoken + 4 * width * text.num_hidden_layers * pairs


def spent(student: Student, prompt: dict, generated: int, seconds: float) -> dict:
    """What one response cost: a share of its batch's seconds, tokens, operations, peak memory."""
    n, device = len(prompt["ids"]), student.model.device
    if device.type == "cuda":
        peak_gb = torch.cuda.max_memory_allocated(device) / 2**30
    else:  # of the largest process: this one or the world model's
        users = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        peak_gb = max(resource.getrusage(user).ru_maxrss for user in users) / 2**20
    cost = {"seconds": seconds, "tokens": generated, "prompt_tokens": n, "peak_gb": peak_gb}
    return cost | {"vlm_flops": vlm_flops(student.model, n, prompt["grids"], generated)}


NOTHING = ("seconds", "world_seconds", "views", "tokens", "prompt_tokens", "vlm_flops")
NOTHING = dict.fromkeys((*NOTHING, "world_flops", "peak_gb"), 0)  # a cost; None: not counted


def total_cost(costs: list[dict], share: int = 1) -> dict:
    """Costs added up and divided by `share` (None stays None); of the memory the highest."""
    total = {}
    for key in NOTHING:
        column = [cost[key] for cost in costs]
        total[key] = None if None in column else round(sum(column) / share, 6)
    peaks = [cost["peak_gb"] for cost in costs]
    return total | {"peak_gb": None if None in peaks else max(peaks)}
