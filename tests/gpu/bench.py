"""What the kernels cost at the shapes of the real models, beside their floor and their baselines.

    python tests/gpu/bench.py                    every operation, forward
    python tests/gpu/bench.py --backward         forward and backward, as a training step pays them
    python tests/gpu/bench.py --only prefix --markdown

Columns (one line per baseline, of the same run on the same tensors):
  MB, GFLOP     what the operation must move and compute: every input read and every output written
                once; 4 D operations per visible pair (2 D for the score, 2 D for the value).
                --backward: three times the bytes, 3.5 times the operations (five products beside
                the forward's two, where one of the five makes the scores again)
  floor         the larger of bytes / bandwidth and operations / peak of this card, in ms; on a CPU,
                of an H200
  ours          median ms of our kernel, inputs not in the cache
  TFLOP/s, GB/s operations and bytes over that time
  / floor       ours / floor: 1 is the best that any kernel could do
  baseline MB   the least that the baseline's separate steps move, its encoded, transposed or
                expanded copies included (forward)
  baseline (ms) median ms
  times         baseline / ours: how many times faster we are; target: what it should be, on an H200
                (forward)

Encoding is not counted as operations, so a kernel that encodes can only look slower by it. On a CPU
nothing is timed, and the columns of times are left out.

An operation is one entry of OPERATIONS: its sizes in the real model, small ones for a test, `runs`
that makes the inputs and returns each contestant as (function, tensors), and `cost`.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import SimpleNamespace as Sizes

import torch
import torch.nn.functional as F
from einops import rearrange

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from kernels.attention import Segments, attention, transform
from kernels.rays import plucker_rays, plucker_rays_reference
from kernels.temporal import temporal_attention

# A part of the card's name: (bf16 operations/s without sparsity, bytes/s of its memory); the first
# that matches counts. From the makers' data sheets: NVIDIA H200, H100 (SXM and PCIe), A100 (80 GB
# SXM and PCIe; 40 GB), AMD Instinct MI300X. NVIDIA's sheets for the H100 and H200 print twice these
# operations, "with sparsity".
CARDS = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100 80GB PCIe": (312e12, 1.935e12),
    "A100": (312e12, 1.555e12),
    "MI300X": (1307e12, 5.3e12),
}
SDPA = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Operation:
    """runs(sizes, device, dtype) -> {"ours": (function, tensors), baseline: (function, tensors)};
    all return the same numbers. cost(sizes) -> (bytes, operations, {baseline: bytes}), forward,
    16-bit tensors."""

    name: str
    sizes: Sizes
    tiny: Sizes
    runs: Callable
    cost: Callable
    targets: dict[str, float] = field(default_factory=dict)  # baseline / ours
    step_bytes: float | None = 3.0  # bytes with the backward over those without; None: no backward
    dtype: torch.dtype = torch.bfloat16


# B rows, H query heads, Hk key heads, S tokens, D head width, V views, T frames, h w latent size,
# N windows, Q questions.


def qkv(B, H, Hk, S, D, device, dtype):
    """Random q [B, H, S, D], k and v [B, Hk, S, D]; the same numbers in every call."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": dtype}
    return [torch.randn(B, heads, S, D, **options) for heads in (H, Hk, Hk)]


def qkvo_bytes(B, H, Hk, S, D) -> int:
    """q, k, v read and o written once, 16 bits each."""
    return 2 * B * S * D * (2 * H + 2 * Hk)


def poses(V, device):
    """w2c [V, 4, 4] of cameras that turn and walk, K [V, 3, 3] in picture widths and heights."""
    turn = torch.linspace(0, 1.2, V, device=device)
    w2c = torch.eye(4, device=device).repeat(V, 1, 1)
    w2c[:, 0, 0], w2c[:, 0, 2] = turn.cos(), turn.sin()
    w2c[:, 2, 0], w2c[:, 2, 2] = -turn.sin(), turn.cos()
    w2c[:, :3, 3] = torch.stack([turn, 0.1 * turn, -turn], -1)
    K = torch.tensor([[0.8, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]], device=device)
    return w2c, K.repeat(V, 1, 1)


def plain(name, causal, sizes, tiny, target=None) -> Operation:
    """Attention alone, B H S D, as many key heads as query heads."""

    def runs(n, device, dtype):
        def ours(q, k, v):
            return attention(q, k, v, causal=causal, scale=n.D**-0.5)

        def sdpa(q, k, v):
            return SDPA(q, k, v, is_causal=causal)

        tensors = qkv(n.B, n.H, n.H, n.S, n.D, device, dtype)
        return {"ours": (ours, tensors), "SDPA": (sdpa, tensors)}

    def cost(n):
        size = qkvo_bytes(n.B, n.H, n.H, n.S, n.D)
        pairs = n.S * (n.S + 1) // 2 if causal else n.S**2
        return size, 4 * n.B * n.H * n.D * pairs, {"SDPA": size}

    return Operation(name, sizes, tiny, runs, cost, {"SDPA": target} if target else {})


def cameras(name, sizes, tiny) -> Operation:
    """Every token sees every view's tokens, encoded by cameras (PRoPE).

    Baseline: encoded copies of q, k, v, SDPA, an encoded copy of o.
    """

    def runs(n, device, dtype):
        P, K = poses(n.V, device)
        P[:, :3] = K @ P[:, :3]  # lift(K) w2c
        P = P[None]

        def ours(q, k, v):
            return attention(q, k, v, causal=False, scale=n.D**-0.5, cameras=P)

        def separate(q, k, v):
            inverse = torch.linalg.inv(P)
            o = SDPA(transform(q, P.mT), transform(k, inverse), transform(v, inverse))
            return transform(o, P)

        tensors = qkv(1, n.H, n.H, n.V * n.h * n.w, n.D, device, dtype)
        return {"ours": (ours, tensors), "encode, SDPA": (separate, tensors)}

    def cost(n):
        S = n.V * n.h * n.w
        size = qkvo_bytes(1, n.H, n.H, S, n.D)
        # Each of the four tensors is read and written once more.
        return size, 4 * n.H * n.D * S * S, {"encode, SDPA": 3 * size}

    return Operation(name, sizes, tiny, runs, cost, {"encode, SDPA": 1.3})


def temporal(name, sizes, tiny) -> Operation:
    """Frames of one pixel see each other, (b t) s (h d).

    Baseline: q, k, v transposed to (b s) h t d, SDPA, the output transposed back.
    """

    def runs(n, device, dtype):
        BT, S = n.B * n.T, n.h * n.w
        tensors = [x.reshape(BT, S, n.H * n.D) for x in qkv(BT, S, S, n.H, n.D, device, dtype)]

        def ours(q, k, v):
            return temporal_attention(q, k, v, n.T, head_width=n.D)

        def separate(*qkv):
            layout = "(b t) s (h d) -> (b s) h t d"
            o = SDPA(*(rearrange(x, layout, t=n.T, h=n.H) for x in qkv))
            return rearrange(o, "(b s) h t d -> (b t) s (h d)", s=S)

        return {"ours": (ours, tensors), "rearrange, SDPA": (separate, tensors)}

    def cost(n):
        pixels = n.B * n.h * n.w
        size = qkvo_bytes(pixels, n.H, n.H, n.T, n.D)
        return size, 4 * pixels * n.H * n.T**2 * n.D, {"rearrange, SDPA": 3 * size}

    # The backward makes the scores again from q and k and needs no o: 4 read and 3 written beside
    # the forward's 4.
    return Operation(name, sizes, tiny, runs, cost, {"rearrange, SDPA": 3.0}, step_bytes=11 / 4)


def windows(name, sizes, tiny, target=None) -> Operation:
    """The vision tower: N windows of equal length in one row, q and k already rotated.

    Baseline: transformers' sdpa path, which calls SDPA once per window.
    """

    def runs(n, device, dtype):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        S, scale = n.N * n.S, n.D**-0.5
        bounds = torch.arange(0, S + 1, n.S, dtype=torch.int32, device=device)
        module = torch.nn.Module()
        module.is_causal = False
        options = {"attention_mask": None, "scaling": scale, "is_causal": False}

        def ours(q, k, v):
            where = {"cu_seqlens": bounds, "max_seqlen": n.S}
            return attention(q, k, v, causal=False, scale=scale, **where)

        def tower(q, k, v):  # Qwen2_5_VLVisionAttention.forward behind its rotation
            lengths = (bounds[1:] - bounds[:-1]).tolist()
            chunks = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
            parts = [sdpa_attention_forward(module, *chunk, **options)[0] for chunk in chunks]
            return torch.cat(parts, dim=1).transpose(1, 2)

        # [1, H, S, D]; in memory S before H
        tensors = [x.transpose(1, 2) for x in qkv(1, S, S, n.H, n.D, device, dtype)]
        return {"ours": (ours, tensors), "transformers sdpa": (tower, tensors)}

    def cost(n):
        S = n.N * n.S
        size = qkvo_bytes(1, n.H, n.H, S, n.D)
        copies = 4 * S * n.H * n.D  # the windows of o are joined
        return size, 4 * n.H * n.D * S * n.S, {"transformers sdpa": size + copies}

    return Operation(name, sizes, tiny, runs, cost, {"transformers sdpa": target} if target else {})


def prefix(name, sizes, tiny) -> Operation:
    """N of kernels/rows.py's rows in one: prefix | question 1 | question 2 | ...

    A token sees its row's prefix and its own question, up to itself.
    """

    def runs(n, device, dtype):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length, scale = n.prefix + n.Q * n.S, n.D**-0.5
        S = n.N * length
        questions = 1 + torch.arange(n.Q).repeat_interleave(n.S)
        segment = torch.cat([torch.zeros(n.prefix), questions]).to(device, torch.int32)
        segment, row = segment.repeat(n.N), torch.arange(S, device=device) // length
        where = {}
        if n.N > 1:
            bounds = torch.arange(0, S + 1, length, dtype=torch.int32, device=device)
            where = {"cu_seqlens": bounds, "max_seqlen": length}
        # One for all layers of a model, so it is prepared, not timed.
        where["prefix"] = Segments(segment[None], where.get("cu_seqlens"))
        q, k, v = qkv(1, n.H, n.Hk, S, n.D, device, dtype)
        # SDPA's backends take a mask only with a key head per query head: prepared, not timed.
        wide = [q, *(x.repeat_interleave(n.H // n.Hk, 1) for x in (k, v))]
        seen = ((segment == 0) | (segment == segment[:, None])).tril() & (row == row[:, None])

        def visible(b, h, i, j):
            question = (segment[j] == 0) | (segment[j] == segment[i])
            return (j <= i) & (row[j] == row[i]) & question

        block_mask = create_block_mask(visible, None, None, S, S, device=device)
        on_gpu = torch.device(device).type == "cuda"
        compiled = torch.compile(flex_attention) if on_gpu else flex_attention

        def ours(q, k, v):
            return attention(q, k, v, causal=True, scale=scale, **where)

        def masked(q, k, v):
            return SDPA(q, k, v, attn_mask=seen)

        def flex(q, k, v):
            return compiled(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True)

        return {
            "ours": (ours, (q, k, v)),
            "SDPA, boolean mask": (masked, wide),
            "flex_attention": (flex, (q, k, v)),
        }

    def cost(n):
        S = n.N * (n.prefix + n.Q * n.S)
        pairs = n.prefix * (n.prefix + 1) // 2
        pairs += n.Q * (n.S * n.prefix + n.S * (n.S + 1) // 2)
        pairs *= n.N
        size = qkvo_bytes(1, n.H, n.Hk, S, n.D) + 4 * S
        # The boolean mask becomes a 16-bit bias (1 read, 2 written, 2 read per pair), and every
        # query head has keys and values of its own.
        masked = qkvo_bytes(1, n.H, n.H, S, n.D) + 5 * S * S
        moved = {"SDPA, boolean mask": masked, "flex_attention": size}
        return size, 4 * n.H * n.D * pairs, moved

    targets = {"SDPA, boolean mask": 3.0, "flex_attention": 1.2}
    return Operation(name, sizes, tiny, runs, cost, targets)


def decoding(name, sizes, tiny) -> Operation:
    """One token of each of B responses on a cache of S tokens, grouped heads, left padding.

    Baselines: SDPA under the mask, which repeats every key head for its query heads.
    """

    def runs(n, device, dtype):
        q, k, v = qkv(n.B, n.H, n.Hk, n.S, n.D, device, dtype)
        q = q[:, :, -1:].contiguous()
        padding = torch.arange(n.B, device=device)[:, None]  # row b begins with b padding tokens
        real = torch.arange(n.S, device=device) >= padding
        segments = Segments(real.int() - 1)

        def ours(q, k, v):
            return attention(q, k, v, causal=True, scale=n.D**-0.5, prefix=segments)

        def masked(q, k, v):
            k, v = (x.repeat_interleave(n.H // n.Hk, 1) for x in (k, v))
            return SDPA(q, k, v, attn_mask=real[:, None, None])

        return {"ours": (ours, (q, k, v)), "repeat, SDPA": (masked, (q, k, v))}

    def cost(n):
        cache = 2 * 2 * n.B * n.Hk * n.S * n.D
        size = cache + 2 * 2 * n.B * n.H * n.D + 4 * n.B * n.S
        # The cache read, a copy of it per query head written and read.
        moved = size + 2 * cache * n.H // n.Hk
        return size, 4 * n.B * n.H * n.D * n.S, {"repeat, SDPA": moved}

    return Operation(name, sizes, tiny, runs, cost, {"repeat, SDPA": 5.0}, step_bytes=None)


def rays(name, sizes, tiny) -> Operation:
    """Ray maps [V, 6, h, w] in float32 from poses.

    Baseline: the same formulas in eager torch, a pass over memory each.
    """

    def runs(n, device, dtype):
        def ours(w2c, K):
            return plucker_rays(w2c, K, n.h, n.w)

        def eager(w2c, K):
            return plucker_rays_reference(w2c, K, n.h, n.w)

        tensors = poses(n.V, device)
        return {"ours": (ours, tensors), "eager torch": (eager, tensors)}

    def cost(n):
        pixels = n.V * n.h * n.w
        # Eager, numbers written and read per pixel: R^T K^-1 times the grid 9, summed 9 + 3, norm
        # 4, division 7, cross product 6, joined 12.
        return 4 * (6 * pixels + 25 * n.V), 40 * pixels, {"eager torch": 4 * 50 * pixels}

    options = {"step_bytes": None, "dtype": torch.float32}
    return Operation(name, sizes, tiny, runs, cost, {"eager torch": 8.0}, **options)


# Stable Virtual Camera at 576 x 576: a latent of 72 x 72, 21 frames; 320, 640, 1280 channels in
# heads of 64 at full, half, quarter resolution; it samples with guidance, so B = 2 where frames are
# attended to. Qwen2.5-VL-7B: 28 query and 4 key heads of 128; a picture of 1280 tokens is 5120
# patches, which see each other in windows of 64 (8 x 8) in most layers of the tower, whose heads
# are 16 of 80, and all of their picture's in 4 of 32. Two pictures: 2560 tokens, 160 windows.
# Tiny: sizes that differ within an operation, so that two axes that changed places do not fit.
LONG, TINY = Sizes(B=1, H=16, S=8192, D=128), Sizes(B=2, H=3, S=10, D=32)
SVC = {
    "full": {"H": 5, "h": 72, "w": 72, "D": 64},
    "half": {"H": 10, "h": 36, "w": 36, "D": 64},
    "quarter": {"H": 20, "h": 18, "w": 18, "D": 64},
}
TINY_VIEWS = {"H": 2, "h": 3, "w": 4, "D": 32}
OPERATIONS = [
    plain("plain S=8192 D=128", False, LONG, TINY, 0.7),
    plain("plain S=8192 D=128 causal", True, LONG, TINY, 0.7),
    plain("plain SVC frames full", False, Sizes(B=21, H=5, S=72 * 72, D=64), TINY),
    *(
        cameras(f"cameras SVC {level}", Sizes(V=21, **n), Sizes(V=3, **TINY_VIEWS))
        for level, n in SVC.items()
    ),
    *(
        temporal(f"temporal SVC {level}", Sizes(B=2, T=21, **n), Sizes(B=2, T=5, **TINY_VIEWS))
        for level, n in SVC.items()
    ),
    windows(
        "windows Qwen2.5-VL tower",
        Sizes(N=160, S=64, H=16, D=80),
        Sizes(N=3, S=4, H=2, D=32),
        5.0,
    ),
    windows(
        "pictures Qwen2.5-VL tower",
        Sizes(N=2, S=5120, H=16, D=80),
        Sizes(N=2, S=7, H=2, D=32),
    ),
    prefix(
        "prefix 2560 + 8 x 64",
        Sizes(N=1, prefix=2560, Q=8, S=64, H=28, Hk=4, D=128),
        Sizes(N=1, prefix=11, Q=3, S=5, H=4, Hk=2, D=32),
    ),
    prefix(
        "packed 4 x (2560 + 8 x 64)",
        Sizes(N=4, prefix=2560, Q=8, S=64, H=28, Hk=4, D=128),
        Sizes(N=3, prefix=6, Q=2, S=5, H=4, Hk=2, D=32),
    ),
    decoding(
        "decoding 16 x 3000",
        Sizes(B=16, H=28, Hk=4, S=3000, D=128),
        Sizes(B=3, H=4, Hk=2, S=11, D=32),
    ),
    rays("rays SVC", Sizes(V=21, h=72, w=72), Sizes(V=3, h=5, w=4)),
]


# Timing


def calls_ms(function: Callable, cache: torch.Tensor, calls: int) -> list[float]:
    """Milliseconds of each call; before it `cache` is overwritten, so that no input is left."""
    events = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        start.record()
        function()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def median_ms(function: Callable, budget_ms: float = 300) -> float:
    """Median time of one call on the GPU, of as many calls as fit the budget (10 to 200)."""
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    last = calls_ms(function, cache, 5)[-1]  # the first calls compile
    calls = max(10, min(200, round(budget_ms / max(1e-3, last))))
    return sorted(calls_ms(function, cache, calls))[calls // 2]


def training_step(function: Callable, tensors) -> Callable:
    """Forward and backward together: a function without arguments that returns the gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    with torch.no_grad():  # contiguous: the same numbers whatever the output's strides
        gradient = torch.randn_like(function(*leaves), memory_format=torch.contiguous_format)
    return lambda: torch.autograd.grad(function(*leaves), leaves, gradient)


def time_contestant(name: str, function: Callable, tensors, backward: bool) -> float:
    """Median ms; where SDPA is in the name, that of its fastest backend.

    transformers' path, by contrast, runs as it is.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def median():
        if backward:
            return median_ms(training_step(function, tensors))
        with torch.no_grad():
            return median_ms(lambda: function(*tensors))

    if "SDPA" not in name:
        return median()
    times, refusals = {}, {}
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, backend)), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says at length why a backend refuses
                times[backend] = median()
        except RuntimeError as error:  # no kernel for this card, mask or head grouping
            refusals[backend] = str(error).splitlines()[0]
    said = [f"{key} {ms:.4f} ms" for key, ms in times.items()]
    said += [f"{key} refused" for key in refusals]
    print(f"    {name}: {', '.join(said)}", file=sys.stderr)
    if not times:
        raise RuntimeError(f"{name}: no backend of SDPA takes these tensors: {refusals}")
    return min(times.values())


def measure(operation: Operation, backward: bool) -> dict[str, float]:
    """Median ms of each contestant at the real sizes on the GPU."""
    runs = operation.runs(operation.sizes, "cuda", operation.dtype)
    return {name: time_contestant(name, *run, backward) for name, run in runs.items()}


# The table


def work_of(operation: Operation, sizes: Sizes, backward: bool) -> tuple[float, float]:
    """Bytes and operations, forward or with the backward."""
    size, operations, _ = operation.cost(sizes)
    return (size * operation.step_bytes, operations * 3.5) if backward else (size, operations)


def floor_of(size: float, operations: float, card: str) -> float:
    """The least ms that a card of CARDS needs."""
    peak, bandwidth = CARDS[card]
    return 1e3 * max(operations / peak, size / bandwidth)


def lines_of(operation: Operation, card: str | None, times, backward=False) -> list[dict]:
    """The operation's lines of the table, one per baseline, as {column: cell}.

    card: a key of CARDS, None for an unknown one; times: ms per contestant, None: not measured.
    """
    baseline_bytes = operation.cost(operation.sizes)[2]
    size, operations = work_of(operation, operation.sizes, backward)
    first = {
        "operation": operation.name,
        "MB": f"{size / 1e6:,.1f}",
        "GFLOP": f"{operations / 1e9:,.{1 if operations > 1e8 else 3}f}",
        "floor (ms)": "unknown card",
    }
    if card:
        floor_ms = floor_of(size, operations, card)
        first["floor (ms)"] = f"{floor_ms:.4f}"
    if times:
        ours = times["ours"]
        first["ours (ms)"] = f"{ours:.4f}"
        first["TFLOP/s"] = f"{operations / ours / 1e9:.1f}"
        first["GB/s"] = f"{size / ours / 1e6:.0f}"
        first["/ floor"] = f"{ours / floor_ms:.2f}" if card else "-"
    lines = []
    for baseline, moved in baseline_bytes.items():
        target = operation.targets.get(baseline)
        line = {"baseline": baseline, "baseline MB": "-" if backward else f"{moved / 1e6:,.1f}"}
        if times:
            line["baseline (ms)"] = f"{times[baseline]:.4f}"
            line["times"] = f"{times[baseline] / times['ours']:.2f}"
        line["target"] = f">= {target:g}" if target and not backward else "-"
        lines.append(first | line)
        first = dict.fromkeys(first, "")
    return lines


def aligned(lines: list[dict]) -> str:
    """Columns of equal width; names to the left, numbers to the right."""
    columns = {name: [name, *(line[name] for line in lines)] for name in lines[0]}
    for name, cells in columns.items():
        width = max(map(len, cells))
        left = name in ("operation", "baseline")
        columns[name] = [x.ljust(width) if left else x.rjust(width) for x in cells]
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns.values(), strict=True))


def markdown(lines: list[dict]) -> str:
    """The same as a Markdown table."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(line.values() for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main():
    parser = argparse.ArgumentParser(description="Operations beside their floor and baselines.")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--backward", action="store_true", help="forward and backward together")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    backward = arguments.backward
    operations = [x for x in OPERATIONS if arguments.only in x.name]
    operations = [x for x in operations if x.step_bytes or not backward]
    if not operations:
        which = " and has a backward" if backward else ""
        sys.exit(f"no operation's name contains {arguments.only!r}{which}")
    card = "H200"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        card = next((key for key in CARDS if key in name), None)
        unknown = "" if card else ": not in CARDS, so no floor"
        print(f"{name}, torch {torch.__version__}, {date.today()}{unknown}")
    else:
        print(f"no GPU: the floors of an {card} and what each baseline moves; nothing is timed")
    lines = []
    for operation in operations:
        times = None
        if torch.cuda.is_available():
            print(operation.name, file=sys.stderr)
            times = measure(operation, backward)
        lines += lines_of(operation, card, times, backward)
    print(markdown(lines) if arguments.markdown else aligned(lines))


if __name__ == "__main__":
    main()
