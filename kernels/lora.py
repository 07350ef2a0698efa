"""Low-rank adaptation (Hu et al. 2021): y = W x + (alpha / rank) B A x, with W frozen.

The layer, and what becomes of it: put beside every linear layer, merged into W, saved and loaded.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor


class LoRA(torch.nn.Module):
    """A linear layer with its adapter beside it; A is random and B zero at the start."""

    def __init__(self, base: torch.nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        device = base.weight.device
        self.lora_A = torch.nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        torch.nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x):
        rows = x.flatten(0, -2)  # [N, in]
        y = self.base(rows)
        low = F.linear(rows, self.lora_A) * self.scale  # [N, rank], where scaling is cheap
        if torch.is_grad_enabled():
            # Summed inside the product: y is all of full width that is written.
            y.addmm_(low, self.lora_B.to(y.dtype).T)
        else:
            y += F.linear(low, self.lora_B)  # whose cast autocast keeps for the next token
        return y.unflatten(0, x.shape[:-1])


def add_lora(model: torch.nn.Module, rank: int, alpha: float):
    """Train, in place, only LoRAs: those that are there, or new ones in the language model."""
    if not any(isinstance(layer, LoRA) for layer in model.modules()):
        for name, layer in list(model.model.language_model.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                model.model.language_model.set_submodule(name, LoRA(layer, rank, alpha))
    for name, p in model.named_parameters():
        p.requires_grad_(".lora_" in name)


def trained_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """The weights that train, where sharded this process's part of them."""
    return [p.detach() for p in model.parameters() if p.requires_grad]


def exchange(model: torch.nn.Module, kept: list[torch.Tensor]):
    """In place: the weights that train and those that are kept beside change their places."""
    for weight, other in zip(trained_weights(model), kept, strict=True):
        now = weight.clone()
        weight.copy_(other)
        other.copy_(now)


def gathered(x: torch.Tensor) -> torch.Tensor:
    """The whole tensor where FSDP has left each process a part of it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def merge_lora(model: torch.nn.Module) -> float:
    """In place: LoRAs become part of the W that they stand beside; the share of W that moved."""
    moved, number = 0, 0
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRA):
            weight = layer.base.weight  # FSDP shards it as lora_B: by rows
            merged = weight.float() + layer.lora_B @ layer.lora_A * layer.scale
            moved += int(gathered((merged.to(weight.dtype) != weight).sum()))
            number += weight.numel()
            weight.copy_(merged)
            model.set_submodule(name, layer.base)
    return moved / max(1, number)


# --- Files, in the format of the peft package ---
PREFIX = "base_model.model."  # of every tensor's name
TOWER = PREFIX + "model.visual."  # is whole in an adapter where it was trained beside the LoRAs


def save_adapter(model: torch.nn.Module, folder: Path, base: str, writes: bool) -> bool:
    """LoRAs, with a tower trained beside them, in float32; False without. All processes gather."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRA)}
    whole, tensors = getattr(model.model.visual, "in_adapter", False), {}
    for name, p in model.named_parameters() if layers else ():
        key = PREFIX + name + ".weight" * (".lora_" in name)
        if ".lora_" in name or (whole and key.startswith(TOWER)):
            tensors[key] = gathered(p.detach()).float().cpu()
    if layers and writes:
        lora = next(iter(layers.values()))
        base, rank = str(Path(base).resolve()) if Path(base).is_dir() else base, len(lora.lora_A)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
        config |= {"r": rank, "lora_alpha": lora.scale * rank, "target_modules": [*layers]}
        config["modules_to_save"] = ["model.visual"] if whole else None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return bool(layers)


def adapter_config(source: str) -> dict:
    """That of the adapter/ in a stage's folder; of another folder or hub id only what to load."""
    if not Path(source, "adapter").is_dir():
        return {"base_model_name_or_path": source, "peft_type": None}
    return json.loads(Path(source, "adapter/adapter_config.json").read_text())


@torch.no_grad()
def load_adapter(model: torch.nn.Module, source: str):
    """Put the adapter/ of the folder, if any, beside the language model: in place, in float32.

    It may be peft's. ValueError where it is of another kind or does not fit.
    """
    config, strange = adapter_config(source), []
    other = [name for name in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(name)]
    if config["peft_type"] is None:
        return
    if config["peft_type"] != "LORA" or other:
        raise ValueError(f"adapter/ is no plain LoRA: {config['peft_type']} {' '.join(other)}")
    left = load_file(Path(source, "adapter/adapter_model.safetensors"))
    model.model.visual.in_adapter = any(key.startswith(TOWER) for key in left)
    for name, layer in list(model.named_modules()):
        if f"{PREFIX}{name}.lora_A.weight" in left and "language_model" in name:
            model.set_submodule(name, LoRA(layer, config["r"], config["lora_alpha"]))
    for name, p in model.named_parameters():
        tensor = left.pop(PREFIX + name + ".weight" * (".lora_" in name), None)
        if tensor is not None and tensor.shape == p.shape and tensor.isfinite().all():
            p.data = tensor.float().to(p.device)
        elif tensor is not None or ".lora_" in name:
            strange.append(name)
    if left or strange:
        raise ValueError(f"adapter/: missing, misshapen or unknown: {[*strange, *left][:3]}")
