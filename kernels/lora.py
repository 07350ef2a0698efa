"""Low-rank adaptation (Hu et al. 2021): y = W x + (alpha / rank) B A x, with W frozen.

The layer, and what becomes of it: put beside every linear layer, merged into W, saved for peft.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
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
        y = self.base(x)
        update = x.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T * self.scale
        return y + update.to(x.dtype)


def add_lora(module: torch.nn.Module, rank: int, alpha: float):
    """Put a LoRA beside every linear layer of `module`, in place."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            module.set_submodule(name, LoRA(layer, rank, alpha))


def gathered(x: torch.Tensor) -> torch.Tensor:
    """The whole tensor where FSDP has left each process a part of it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def merged_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of the plain model, one by one: LoRAs merged into W, shards gathered."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            continue
        tensor = gathered(tensor)
        lora = modules.get(owner.removesuffix(".base"))
        if isinstance(lora, LoRA):
            name = name.replace(".base.", ".")
            if leaf == "weight":
                update = gathered(lora.lora_B).float() @ gathered(lora.lora_A).float() * lora.scale
                tensor = (tensor.float() + update).to(tensor.dtype)
        yield name, tensor


def save_adapter(model: torch.nn.Module, folder: Path, base: str, writes: bool):
    """The LoRAs in the format of the peft package, beside `base`; nothing where there are none.

    Every process gathers, the one that `writes` keeps.
    """
    tensors = {}
    for name, p in model.named_parameters():
        if name.endswith((".lora_A", ".lora_B")):
            tensors[f"base_model.model.{name}.weight"] = gathered(p.detach()).cpu()
    layers = [module for module in model.modules() if isinstance(module, LoRA)]
    if not layers or not writes:
        return
    rank = layers[0].lora_A.shape[0]
    names = "|".join(sorted({name.split(".")[-3] for name in tensors}))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": layers[0].scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf".*language_model.*\.({names})",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
