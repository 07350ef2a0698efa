"""What the kernels cost at the shapes of the real models, beside the floor and beside their rivals: `python -m kernels.bench`.

    python -m kernels.bench                    every operation, forward
    python -m kernels.bench --backward         forward and backward together, as a training step pays them
    python -m kernels.bench --only prefix --markdown

Columns (one line a rival, of the same run on the same tensors):
  MB, GFLOP      what the operation must move and compute: every input read once, every output written once; 4 D operations a visible pair
                 (2 D for the score, 2 D for the value). --backward: three times the bytes, 3.5 times the operations
                 (five products beside the forward's two, where one of the five makes the scores again)
  floor          the larger of bytes / bandwidth and operations / peak of this card, in ms; on a CPU, of an H200
  ours           median ms of our kernel, inputs not in the cache;   TFLOP/s and GB/s: operations and bytes over that time
  / floor        ours / floor: 1 is the best that any kernel could do
  rival MB       the least that the rival's separate steps move, its encoded, transposed or expanded copies included (forward)
  rival          median ms;   rival / ours: how many times faster we are;   target: what it should be, on an H200 (forward)

Encoding is not counted as operations, so a kernel that encodes can only look slower by it. On a CPU nothing is timed.

An operation is one entry of OPERATIONS: its sizes in the real model, small ones for a test, `runs` that makes the inputs and returns each
contestant as (function, tensors), and `cost`.
"""
import argparse
import sys
import warnings
from dataclasses import dataclass, field
from datetime import date
from typing import Callable

import torch
import torch.nn.functional as F
from einops import rearrange

# A part of the card's name: (bf16 operations/s without sparsity, bytes/s of its memory). The first that matches counts. From the makers'
# data sheets: NVIDIA H200, H100 (SXM and PCIe), A100 (80 GB SXM and PCIe; 40 GB), AMD Instinct MI300X. NVIDIA's sheets for the H100 and
# H200 print twice these operations, "with sparsity".
CARDS = {"H200": (989e12, 4.8e12), "H100 PCIe": (756e12, 2.0e12), "H100": (989e12, 3.35e12), "A100-SXM4-80GB": (312e12, 2.039e12),
         "A100 80GB PCIe": (312e12, 1.935e12), "A100": (312e12, 1.555e12), "MI300X": (1307e12, 5.3e12)}
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Operation:
    """`runs(sizes, device, dtype)` -> {"ours": (function, tensors), rival's name: (function, tensors)}; all return the same numbers.
    `cost(sizes)` -> (bytes, operations, {rival's name: bytes}), forward, 16-bit tensors."""
    name: str
    sizes: dict[str, int]
    tiny: dict[str, int]
    runs: Callable
    cost: Callable
    targets: dict[str, float] = field(default_factory=dict)  # rival's name: rival / ours
    step_bytes: float | None = 3.0  # bytes of forward and backward over those of the forward; None: no backward
    dtype: torch.dtype = torch.bfloat16


# Legend: B rows, H query heads, Hk key heads, S tokens, D head width, V views, T frames, h w latent size, N windows, Q questions.

def qkv(B, H, Hk, S, D, device, dtype):
    """Random q [B, H, S, D], k and v [B, Hk, S, D]; the same numbers in every call."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(B, heads, S, D, generator=generator, device=device, dtype=dtype) for heads in (H, Hk, Hk)]


def qkvo_bytes(B, H, Hk, S, D) -> int:
    """q, k, v read and o written once, 16 bits each."""
    return 2 * B * S * D * (2 * H + 2 * Hk)


def rope_tables(S, D, device, theta=1e4):
    """cos, sin [1, S, D / 2] float32 of positions 0 .. S - 1 (Su et al. 2021)."""
    angle = torch.arange(S, device=device)[None, :, None] * theta ** (-torch.arange(0, D, 2, device=device) / D)
    return angle.cos(), angle.sin()


def poses(V, device):
    """w2c [V, 4, 4] of cameras that turn and walk, and normalised K [V, 3, 3] (in picture widths and heights); float32."""
    turn = torch.linspace(0, 1.2, V, device=device)
    w2c = torch.eye(4, device=device).repeat(V, 1, 1)
    w2c[:, 0, 0], w2c[:, 0, 2], w2c[:, 2, 0], w2c[:, 2, 2] = turn.cos(), turn.sin(), -turn.sin(), turn.cos()
    w2c[:, :3, 3] = torch.stack([turn, 0.1 * turn, -turn], -1)
    return w2c, torch.tensor([[0.8, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]], device=device).repeat(V, 1, 1)


def plain(name, causal, sizes, tiny, target=None) -> Operation:
    """Attention alone, B H S D, as many key heads as query heads."""
    def runs(n, device, dtype):
        from kernels.attention import attention
        tensors = qkv(n["B"], n["H"], n["H"], n["S"], n["D"], device, dtype)
        return {"ours": (lambda q, k, v: attention(q, k, v, causal=causal, scale=n["D"] ** -0.5), tensors),
                "SDPA": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), tensors)}

    def cost(n):
        size = qkvo_bytes(n["B"], n["H"], n["H"], n["S"], n["D"])
        pairs = n["S"] * (n["S"] + 1) // 2 if causal else n["S"] ** 2
        return size, 4 * n["B"] * n["H"] * n["D"] * pairs, {"SDPA": size}

    return Operation(name, sizes, tiny, runs, cost, {"SDPA": target} if target else {})


def rope(name, sizes, tiny) -> Operation:
    """The language model: causal, grouped heads, q and k rotated. Rival: rotated copies of q and k, then SDPA."""
    def runs(n, device, dtype):
        from kernels.attention import attention, rotate
        cos, sin = rope_tables(n["S"], n["D"], device, theta=1e6)
        near = cos.to(dtype), sin.to(dtype)  # a model in bf16 rotates by bf16 tables

        def rival(q, k, v):
            return F.scaled_dot_product_attention(rotate(q, *near), rotate(k, *near), v, is_causal=True, enable_gqa=True)

        tensors = qkv(n["B"], n["H"], n["Hk"], n["S"], n["D"], device, dtype)
        return {"ours": (lambda q, k, v: attention(q, k, v, causal=True, scale=n["D"] ** -0.5, rope=(cos, sin)), tensors),
                "rotate, SDPA": (rival, tensors)}

    def cost(n):
        heads, tables = (n["B"], n["H"], n["Hk"], n["S"], n["D"]), 4 * n["S"] * n["D"]
        # rotate: four half products (each reads and writes a half: 4 tensors), a difference and a sum (3), the two halves joined (2)
        copies = 9 * 2 * n["B"] * (n["H"] + n["Hk"]) * n["S"] * n["D"]
        operations = 4 * n["B"] * n["H"] * n["D"] * n["S"] * (n["S"] + 1) // 2
        return qkvo_bytes(*heads) + tables, operations, {"rotate, SDPA": qkvo_bytes(*heads) + tables // 2 + copies}

    return Operation(name, sizes, tiny, runs, cost, {"rotate, SDPA": 1.3})


def cameras(name, sizes, tiny) -> Operation:
    """Every token sees every view's tokens, encoded by cameras (PRoPE). Rival: encoded copies of q, k, v, SDPA, an encoded copy of o."""
    def runs(n, device, dtype):
        from kernels.attention import attention, transform
        P, K = poses(n["V"], device)
        P[:, :3] = K @ P[:, :3]  # lift(K) w2c
        P = P[None]

        def rival(q, k, v):
            inverse = torch.linalg.inv(P)
            return transform(F.scaled_dot_product_attention(transform(q, P.mT), transform(k, inverse), transform(v, inverse)), P)

        tensors = qkv(1, n["H"], n["H"], n["V"] * n["h"] * n["w"], n["D"], device, dtype)
        return {"ours": (lambda q, k, v: attention(q, k, v, causal=False, scale=n["D"] ** -0.5, cameras=P), tensors),
                "encode, SDPA": (rival, tensors)}

    def cost(n):
        S = n["V"] * n["h"] * n["w"]
        size = qkvo_bytes(1, n["H"], n["H"], S, n["D"])
        return size, 4 * n["H"] * n["D"] * S * S, {"encode, SDPA": 3 * size}  # each of the four tensors is read and written once more

    return Operation(name, sizes, tiny, runs, cost, {"encode, SDPA": 1.3})


def temporal(name, sizes, tiny) -> Operation:
    """Frames of one pixel see each other, (b t) s (h d). Rival: q, k, v transposed to (b s) h t d, SDPA, the output transposed back."""
    def runs(n, device, dtype):
        from kernels.temporal import temporal_attention
        q, k, v = (x.reshape(n["B"] * n["T"], n["h"] * n["w"], n["H"] * n["D"])
                   for x in qkv(n["B"] * n["T"], n["h"] * n["w"], n["h"] * n["w"], n["H"], n["D"], device, dtype))

        def rival(q, k, v):
            q, k, v = (rearrange(x, "(b t) s (h d) -> (b s) h t d", t=n["T"], h=n["H"]) for x in (q, k, v))
            return rearrange(F.scaled_dot_product_attention(q, k, v), "(b s) h t d -> (b t) s (h d)", s=n["h"] * n["w"])

        return {"ours": (lambda q, k, v: temporal_attention(q, k, v, n["T"], head_width=n["D"]), (q, k, v)),
                "rearrange, SDPA": (rival, (q, k, v))}

    def cost(n):
        size = qkvo_bytes(n["B"] * n["h"] * n["w"], n["H"], n["H"], n["T"], n["D"])
        return size, 4 * n["B"] * n["h"] * n["w"] * n["H"] * n["T"] ** 2 * n["D"], {"rearrange, SDPA": 3 * size}

    # The backward makes the scores again from q and k and needs no o: 4 read and 3 written beside the forward's 4.
    return Operation(name, sizes, tiny, runs, cost, {"rearrange, SDPA": 3.0}, step_bytes=11 / 4)


def windows(name, sizes, tiny) -> Operation:
    """The vision tower: N windows of equal length in one row, rotated. Rival: transformers' sdpa path, which calls SDPA once a window."""
    def runs(n, device, dtype):
        from kernels.attention import attention
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
        S, scale = n["N"] * n["S"], n["D"] ** -0.5
        cos, sin = rope_tables(S, n["D"], device)
        bounds = torch.arange(0, S + 1, n["S"], dtype=torch.int32, device=device)
        wide_cos, wide_sin = (torch.cat([x, x], -1)[0] for x in (cos, sin))  # S D, as the tower makes them
        module = torch.nn.Module()
        module.is_causal = False

        def rival(q, k, v):  # Qwen2_5_VLVisionAttention.forward between its two linear layers
            q, k = apply_rotary_pos_emb_vision(q[0].transpose(0, 1), k[0].transpose(0, 1), wide_cos, wide_sin)   # S H D
            q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]                                                # 1 H S D
            lengths = (bounds[1:] - bounds[:-1]).tolist()
            chunks = zip(*(torch.split(x, lengths, dim=2) for x in (q, k, v)))
            return torch.cat([sdpa_attention_forward(module, *chunk, attention_mask=None, scaling=scale, is_causal=False)[0]
                              for chunk in chunks], dim=1).transpose(1, 2)

        tensors = [x.transpose(1, 2) for x in qkv(1, S, S, n["H"], n["D"], device, dtype)]  # [1, H, S, D]; in memory S before H
        return {"ours": (lambda q, k, v: attention(q, k, v, causal=False, scale=scale, cu_seqlens=bounds, max_seqlen=n["S"],
                                            rope=(cos, sin)), tensors),
                "transformers sdpa": (rival, tensors)}

    def cost(n):
        S, tables = n["N"] * n["S"], 4 * n["N"] * n["S"] * n["D"]
        size = qkvo_bytes(1, n["H"], n["H"], S, n["D"])
        # Rotation in float32, bytes a number: to float32 6, negated half 4, halves joined 8, two products 16, sum 12, to 16 bits 6.
        # Then the windows of o are joined: 4.
        copies = (2 * 52 + 4) * S * n["H"] * n["D"]
        return size + tables, 4 * n["H"] * n["D"] * S * n["S"], {"transformers sdpa": size + 2 * tables + copies}

    return Operation(name, sizes, tiny, runs, cost, {"transformers sdpa": 5.0})


def prefix(name, sizes, tiny) -> Operation:
    """04's rows: prefix | question 1 | question 2 | ...; a token sees the prefix and its own question, up to itself."""
    def runs(n, device, dtype):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        from kernels.attention import attention
        S, scale = n["prefix"] + n["Q"] * n["S"], n["D"] ** -0.5
        segment = torch.cat([torch.zeros(n["prefix"]), 1 + torch.arange(n["Q"]).repeat_interleave(n["S"])]).to(device, torch.int32)
        q, k, v = qkv(1, n["H"], n["Hk"], S, n["D"], device, dtype)
        # SDPA's backends take a mask only with as many key heads as query heads: prepared, not timed.
        wide = [q, *(x.repeat_interleave(n["H"] // n["Hk"], 1) for x in (k, v))]
        seen = ((segment == 0) | (segment == segment[:, None])).tril()
        block_mask = create_block_mask(lambda b, h, i, j: (j <= i) & ((segment[j] == 0) | (segment[j] == segment[i])), None, None, S, S,
                                       device=device)
        flex = torch.compile(flex_attention) if torch.device(device).type == "cuda" else flex_attention
        return {"ours": (lambda q, k, v: attention(q, k, v, causal=True, scale=scale, prefix=segment[None]), (q, k, v)),
                "SDPA, boolean mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen), wide),
                "flex_attention": (lambda q, k, v: flex(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True), (q, k, v))}

    def cost(n):
        S = n["prefix"] + n["Q"] * n["S"]
        pairs = n["prefix"] * (n["prefix"] + 1) // 2 + n["Q"] * (n["S"] * n["prefix"] + n["S"] * (n["S"] + 1) // 2)
        size = qkvo_bytes(1, n["H"], n["Hk"], S, n["D"])
        # The boolean mask becomes a 16-bit bias (1 read, 2 written, 2 read a pair), and every query head has keys and values of its own.
        masked = qkvo_bytes(1, n["H"], n["H"], S, n["D"]) + 5 * S * S
        return size + 4 * S, 4 * n["H"] * n["D"] * pairs, {"SDPA, boolean mask": masked, "flex_attention": size + 4 * S}

    return Operation(name, sizes, tiny, runs, cost, {"SDPA, boolean mask": 3.0, "flex_attention": 1.2})


def rays(name, sizes, tiny) -> Operation:
    """Ray maps [V, 6, h, w] in float32 from poses. Rival: the same formulas in eager torch, a pass over memory each."""
    def runs(n, device, dtype):
        from kernels.rays import plucker_rays, plucker_rays_reference
        tensors = poses(n["V"], device)
        return {"ours": (lambda w2c, K: plucker_rays(w2c, K, n["h"], n["w"]), tensors),
                "eager torch": (lambda w2c, K: plucker_rays_reference(w2c, K, n["h"], n["w"]), tensors)}

    def cost(n):
        pixels = n["V"] * n["h"] * n["w"]
        # Eager, numbers written and read a pixel: R^T K^-1 times the grid 9, summed 9 + 3, norm 4, division 7, cross product 6, joined 12.
        return 4 * (6 * pixels + 25 * n["V"]), 40 * pixels, {"eager torch": 4 * 50 * pixels}

    return Operation(name, sizes, tiny, runs, cost, {"eager torch": 8.0}, step_bytes=None, dtype=torch.float32)


# Stable Virtual Camera at 576 x 576: a latent of 72 x 72, 21 frames; 320, 640, 1280 channels in heads of 64 at full, half, quarter
# resolution; it samples with guidance, so B = 2 where frames are attended to. Qwen2.5-VL-7B: 28 query and 4 key heads of 128; a picture of
# 1280 tokens is 5120 patches, which see each other in windows of 64 (8 x 8) in most layers of the tower, whose heads are 16 of 80. Two
# pictures: 2560 tokens, 160 windows.
# Tiny: sizes that differ within an operation, so that two axes that changed places do not fit.
SVC = {"full": {"H": 5, "h": 72, "w": 72}, "half": {"H": 10, "h": 36, "w": 36}, "quarter": {"H": 20, "h": 18, "w": 18}}
TINY_VIEWS = {"H": 2, "h": 3, "w": 4, "D": 32}
OPERATIONS = [
    plain("plain S=8192 D=128", False, {"B": 1, "H": 16, "S": 8192, "D": 128}, {"B": 2, "H": 3, "S": 10, "D": 32}, 0.7),
    plain("plain S=8192 D=128 causal", True, {"B": 1, "H": 16, "S": 8192, "D": 128}, {"B": 2, "H": 3, "S": 10, "D": 32}, 0.7),
    plain("plain SVC frames full", False, {"B": 21, "H": 5, "S": 72 * 72, "D": 64}, {"B": 2, "H": 3, "S": 10, "D": 32}),
    rope("rope Qwen2.5-VL-7B", {"B": 1, "H": 28, "Hk": 4, "S": 2560, "D": 128}, {"B": 1, "H": 4, "Hk": 2, "S": 10, "D": 32}),
    *(cameras(f"cameras SVC {level}", {"V": 21, **n, "D": 64}, {"V": 3, **TINY_VIEWS}) for level, n in SVC.items()),
    *(temporal(f"temporal SVC {level}", {"B": 2, "T": 21, **n, "D": 64}, {"B": 2, "T": 5, **TINY_VIEWS}) for level, n in SVC.items()),
    windows("windows Qwen2.5-VL tower", {"N": 160, "S": 64, "H": 16, "D": 80}, {"N": 3, "S": 4, "H": 2, "D": 32}),
    prefix("prefix 2560 + 8 x 64", {"prefix": 2560, "Q": 8, "S": 64, "H": 28, "Hk": 4, "D": 128},
           {"prefix": 11, "Q": 3, "S": 5, "H": 4, "Hk": 2, "D": 32}),
    rays("rays SVC", {"V": 21, "h": 72, "w": 72}, {"V": 3, "h": 5, "w": 4}),
]


# Timing --------------------------------------------------------------------------------------------------------------------------------

def median_ms(function: Callable, budget_ms: float = 300) -> float:
    """Median time of one call on the GPU; before each call 256 MB are overwritten, so that no input is left in the cache."""
    def once(start, end):
        cache.zero_()
        start.record()
        function()
        end.record()

    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(5)]
    for pair in events:  # the first calls compile; the last of the five tells how many calls fit the budget
        once(*pair)
    torch.cuda.synchronize()
    calls = max(10, min(200, round(budget_ms / max(1e-3, events[-1][0].elapsed_time(events[-1][1])))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for pair in events:
        once(*pair)
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[calls // 2]


def training_step(function: Callable, tensors) -> Callable:
    """Forward and backward together, as a function without arguments that returns the gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    with torch.no_grad():
        gradient = torch.randn_like(function(*leaves), memory_format=torch.contiguous_format)  # the same numbers whatever its strides
    return lambda: torch.autograd.grad(function(*leaves), leaves, gradient)


def time_contestant(name: str, function: Callable, tensors, backward: bool) -> float:
    """Median ms; where SDPA is in the name, that of its fastest backend (transformers' path, by contrast, runs as it is)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def median():
        if backward:
            return median_ms(training_step(function, tensors))
        with torch.no_grad():
            return median_ms(lambda: function(*tensors))

    if "SDPA" not in name:
        return median()
    times, refusals = {}, {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says at length why a backend does not take these tensors
                times[backend.name] = median()
        except RuntimeError as error:  # no kernel of this backend for this card, mask or head grouping
            refusals[backend.name] = str(error).splitlines()[0]
    said = [f"{key} {ms:.4f} ms" for key, ms in times.items()] + [f"{key} refused" for key in refusals]
    print(f"    {name}: {', '.join(said)}", file=sys.stderr)
    if not times:
        raise RuntimeError(f"{name}: no backend of SDPA takes these tensors: {refusals}")
    return min(times.values())


def measure(operation: Operation, backward: bool) -> dict[str, float]:
    """Median ms of each contestant at the real sizes on the GPU."""
    runs = operation.runs(operation.sizes, "cuda", operation.dtype)
    return {name: time_contestant(name, *run, backward) for name, run in runs.items()}


# The table -----------------------------------------------------------------------------------------------------------------------------

COLUMNS = ("operation", "MB", "GFLOP", "floor (ms)", "ours (ms)", "TFLOP/s", "GB/s", "/ floor",
           "rival", "rival MB", "rival (ms)", "rival / ours", "target")


def lines_of(operation: Operation, card: str | None, times: dict[str, float] | None, backward: bool = False) -> list[list[str]]:
    """The operation's lines of the table, one a rival. `card`: a key of CARDS, None for an unknown one; `times` None: not measured."""
    size, operations, rival_bytes = operation.cost(operation.sizes)
    if backward:
        size, operations = size * operation.step_bytes, operations * 3.5
    floor_ms = None if card is None else 1e3 * max(operations / CARDS[card][0], size / CARDS[card][1])
    first = [operation.name, f"{size / 1e6:,.1f}", f"{operations / 1e9:,.{1 if operations > 1e8 else 3}f}",
             "unknown card" if floor_ms is None else f"{floor_ms:.4f}"]
    if times is None:
        first += [NOT_MEASURED] * 4
    else:
        ours = times["ours"]
        first += [f"{ours:.4f}", f"{operations / ours / 1e9:.1f}", f"{size / ours / 1e6:.0f}"]
        first.append("-" if floor_ms is None else f"{ours / floor_ms:.2f}")
    lines = []
    for rival, moved in rival_bytes.items():
        measured = [NOT_MEASURED] * 2 if times is None else [f"{times[rival]:.4f}", f"{times[rival] / times['ours']:.2f}"]
        target = operation.targets.get(rival)
        forward_only = ["-", "-"] if backward else [f"{moved / 1e6:,.1f}", f">= {target:g}" if target else "-"]
        lines.append([*first, rival, forward_only[0], *measured, forward_only[1]])
        first = [""] * len(first)
    return lines


def aligned(lines: list[list[str]]) -> str:
    """Columns of equal width; names to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) if column in ("operation", "rival") else cell.rjust(width)
                               for cell, width, column in zip(line, widths, COLUMNS)).rstrip() for line in lines)


def markdown(lines: list[list[str]]) -> str:
    """The same as a Markdown table."""
    rows = [lines[0], ["---"] * len(COLUMNS), *lines[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Time every operation beside its floor and its rivals.")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--backward", action="store_true", help="forward and backward together")
    parser.add_argument("--markdown", action="store_true", help="print the table of kernels/README.md")
    arguments = parser.parse_args()
    operations = [x for x in OPERATIONS if arguments.only in x.name and (x.step_bytes or not arguments.backward)]
    if not operations:
        sys.exit(f"no operation's name contains {arguments.only!r}" + (" and has a backward" if arguments.backward else ""))
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        card = next((key for key in CARDS if key in name), None)
        print(f"{name}, torch {torch.__version__}, {date.today()}" + ("" if card else ": not in CARDS of kernels/bench.py, so no floor"))
    else:
        card = "H200"
        print(f"no GPU: the floors of an {card} and the bytes that each rival moves; nothing is timed")
    lines = [list(COLUMNS)]
    for operation in operations:
        times = None
        if torch.cuda.is_available():
            print(operation.name, file=sys.stderr)
            times = measure(operation, arguments.backward)
        lines += lines_of(operation, card, times, arguments.backward)
    print(markdown(lines) if arguments.markdown else aligned(lines))


if __name__ == "__main__":
    main()
