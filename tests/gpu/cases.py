"""What `compile.py` compiles ahead of time: (name, kernel, argument types, constants, options).

"i32:16" is a multiple of 16. Constants and options are those of a launch, from the kernels' files.
"""

import importlib

import torch

attention, rays, temporal = (
    importlib.import_module(f"kernels.{name}") for name in ("attention", "rays", "temporal")
)

# The arguments that an option brings; without it they are None.
BROUGHT = {
    "windows": {"CU": "*i32"},
    "prefix": dict.fromkeys(("SEGMENT", "FIRST", "LAST", "PREFIX_ENDS"), "*i32"),
    "cameras": dict.fromkeys(("P", "INVERSE"), "*fp32"),
}
# Element type, head width, options.
ATTENTION = [
    "bf16 128 causal",
    "fp16 64",
    "bf16 128 decode",
    "bf16 128 prefix decode",
    "bf16 80 windows",
    "bf16 128 causal prefix",
    "bf16 128 causal prefix windows",
    "bf16 64 cameras",
    "bf16 128 cameras",
    "fp32 64 causal",
    "fp32 128 causal",
]


def attention_cases() -> list[tuple]:
    """Of the training path, forward and backward, and of decoding."""
    training = {
        "forward": attention.forward_kernel,
        "dq": attention.dq_kernel,
        "dkdv": attention.dkdv_kernel,
    }
    numbers = dict.fromkeys(("parts", "S", "Sk", "per_view", "blocks", "H", "group"), "i32")
    strides = dict.fromkeys(("qb", "qh", "qs", "kb", "kh", "ks", "vb", "vh", "vs"), "i32:16")
    single = dict.fromkeys(("LSE", "DELTA"), "*fp32") | {"scale": "fp32"}
    cases = []
    for case in ATTENTION:
        kind, D, *options = case.split()
        tensors = dict.fromkeys(("Q", "K", "V", "OUT", "DO", "DQ", "DK", "DV"), f"*{kind}")
        types = tensors | single | numbers | strides
        absent, kernels = {"CAUSAL": "causal" in options, "parts": 1}, training
        if "decode" in options:
            types["OUT"], kernels = "*fp32", {"few": attention.forward_kernel}
            absent.pop("parts"), options.remove("decode")
        for option, brought in BROUGHT.items():
            if option in options:
                types |= brought
            else:
                absent |= dict.fromkeys(brought)
        for which, kernel in kernels.items():
            tile = attention.tiles(
                int(D), int(kind[-2:]), "cameras" in options, "prefix" in options, which
            )
            launch = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
            constants = tile | {x: y for x, y in absent.items() if x in kernel.arg_names}
            name = " ".join([f"attention {which} {kind} D={D}", *options])
            cases.append((name, kernel, types, constants, launch))
    return cases


TEMPORAL = [  # element type, frames, head width
    ("bf16", torch.bfloat16, 21, 64),
    ("fp16", torch.float16, 21, 80),
    ("bf16", torch.bfloat16, 64, 128),
    ("fp32", torch.float32, 21, 64),
]


def temporal_cases() -> list[tuple]:
    kernels = {"forward": temporal.temporal_forward, "backward": temporal.temporal_backward}
    numbers = {"S": "i32", "H": "i32", "pixels": "i32", "scale": "fp32"}
    for tensor in ("q", "k", "v", "dout"):
        for dimension in ("frame", "pixel", "head"):
            numbers[f"{tensor}_{dimension}"] = "i32"
    cases = []
    for short, dtype, T, D in TEMPORAL:
        tensors = dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), f"*{short}")
        constants, options = temporal._settings(T, D, dtype)
        for direction, kernel in kernels.items():
            name = f"temporal {direction} {short} T={T} D={D}"
            cases.append((name, kernel, tensors | numbers, constants, options))
    return cases


def ray_cases() -> list[tuple]:
    types = dict.fromkeys(("M", "origin", "out", "dout", "partial"), "*fp32")
    types |= {"pixels": "i32", "width": "i32"}
    kernels = {"forward": rays.rays_forward, "backward": rays.rays_backward}
    return [
        (f"rays {direction} fp32", kernel, types, {"BLOCK": rays.BLOCK}, rays.OPTIONS)
        for direction, kernel in kernels.items()
    ]


def all_cases() -> dict[str, tuple]:
    """Every case of every kernel file: {name: (kernel, argument types, constants, options)}."""
    cases = {}
    for name, *rest in [*attention_cases(), *temporal_cases(), *ray_cases()]:
        if name in cases:
            raise ValueError(f"two cases are named {name!r}: name what tells them apart")
        cases[name] = rest
    return cases
