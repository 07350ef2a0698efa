"""A student, a Qwen-VL checkpoint with what its questions need, and pictures as it sees them."""

import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, ImageOps
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from kernels.lora import adapter_config, load_adapter
from kernels.register import load_model

BROKEN = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError)
BROKEN += (AttributeError, MemoryError, struct.error, Image.DecompressionBombError)  # PIL's many


@dataclass
class Student:
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    source: str  # the folder or hub id that its base came from


def load_student(source: str, dtype, device: str, attention: str, max_pixels: int) -> Student:
    """A Qwen-VL checkpoint by folder or hub id; see `load_model`. Pictures have max_pixels at most.

    A folder with adapter/ is a LoRA beside its base. AutoProcessor would ask for torchvision. What
    does not load ends the run: one line, status 2.
    """
    try:
        base = adapter_config(source)["base_model_name_or_path"]
        model = load_model(base, dtype, device, attention)
        load_adapter(model, source)
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(base, trust_remote_code=False)
    except (*BROKEN, RuntimeError, StrictDataclassError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        why = f"{source} does not load as an image-text-to-text checkpoint: {reason}"
        print(f"{Path(sys.argv[0]).name}: {why}", file=sys.stderr)
        raise SystemExit(2) from None
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


def open_pictures(student: Student, paths: list[str], blank: bool = False) -> tuple:
    """Picture files -> patches [P, channels x patch] and grids [pictures, 3]; blank: mean grey."""
    pictures = [read_picture(path) for path in paths]
    if blank:
        pictures = [Image.new("RGB", picture.size, (127, 127, 127)) for picture in pictures]
    seen = student.image_processor(images=pictures, return_tensors="pt")
    return seen["pixel_values"], seen["image_grid_thw"]
