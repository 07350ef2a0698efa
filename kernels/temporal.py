"""Softmax attention over the frames of a video latent: every pixel looks at itself through time.

    out[b, t, s, h] = sum_u P[t, u] v[b, u, s, h]
    P = softmax_u(scale * q[b, t, s, h] . k[b, u, s, h]),   scale = 1 / sqrt(D)

B videos, T frames, S pixels, H heads, D head width. Stable Virtual Camera's time blocks do this at
every level of the U-Net: at 576x576 the finest has T = 21, S = 72 * 72 = 5184, H = 5, D = 64. That
is B*S*H = 25920 B attentions of 21 x 21: tiny ones, and very many.

Memory. The tensors arrive as `(b t) s (h d)`, for the layers around work on pixels. Ordinary
attention wants `(b s) h t d`: four transposed copies (q, k, v in, the output back), each a read and
a write. Here nothing is moved: element (b, t, s, h, d) lies at

    (b*T + t) * stride_frame + s * stride_pixel + h * stride_head + d

and the kernel goes there itself. The T rows of one pixel lie far apart (S*H*D elements), but a row
of D = 64 bf16 numbers is exactly one 128-byte cache line, so the scattered reads are still whole
lines. Strides are arguments, so a slice of a fused qkv projection is read where it lies.

Bytes moved, in units of one tensor of B*T*S*H*D (70 MB at the level above, for B = 1): forward 3
read + 1 written, against 12 with the four copies; backward 4 read + 3 written. That is 32
operations per byte where an H100 could do some 300: a few wasted ones cost nothing.

Tiles. Tensor cores multiply tiles of 64 rows; T = 21 would leave two thirds of one empty. So a
program takes ROWS // T pixels of one head (three at T = 21: 63 of 64 rows) and stacks their frames,
row r being pixel r // T and frame r % T. All its scores come from one 64 x 64 product, of which
only the diagonal blocks mean something. The rest compares different pixels and is set to -inf
before the softmax:

              pixel 0   pixel 1   pixel 2   left over
    pixel 0   scores     -inf      -inf      -inf
    pixel 1    -inf     scores     -inf      -inf
    pixel 2    -inf      -inf     scores     -inf
    left over  -inf      -inf      -inf     zeros

A row past the end (here row 63; elsewhere pixels beyond B*S) is read as zeros and never written. It
has a group number r // T of its own: its softmax is one of zeros, not of an empty set (NaN).

Precision. Products of bf16/fp16 numbers are summed in float32; the softmax is float32; P is rounded
to the input's type before it meets v (as in FlashAttention). float32 inputs are multiplied as
float32 ("ieee"), never as TF32: slower, and in smaller tiles (see `_settings`).
"""

from __future__ import annotations  # without triton, the name tl.constexpr need not exist

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # macOS, Windows: the reference still runs on the CPU
    triton, jit = None, lambda kernel: kernel

MAX_FRAMES = 64


def temporal_attention_reference(q, k, v, num_frames: int, *, scale=None, head_width: int = 64):
    """The same in plain torch, transposed copies and all; any float type, differentiable."""
    shape, T = q.shape, num_frames
    if q.ndim == 3:
        q, k, v = (x.unflatten(-1, (-1, head_width)) for x in (q, k, v))
    q, k, v = (x.unflatten(0, (-1, T)).permute(0, 2, 3, 1, 4) for x in (q, k, v))  # b s h t d
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-1, -2) * scale  # b s h t u
    out = scores.softmax(-1) @ v
    return out.permute(0, 3, 1, 2, 4).reshape(shape)


@jit
def _rows(S, H, pixels, T, ROWS):
    """The (pixel, frame) pairs of this program.

    Group r // T, index into `(b t)`, pixel s, head, and whether the row exists.
    """
    # Neighbouring programs share pixels, not heads: their rows are neighbours in memory.
    head = tl.program_id(0) % H
    r = tl.arange(0, ROWS)
    group = r // T
    # Counts through all B*S pixels, so a block may span two videos.
    pixel = tl.program_id(0) // H * (ROWS // T) + group
    exists = (group < ROWS // T) & (pixel < pixels)
    bt = pixel // S * T + r % T
    # int64: bt * stride_frame passes 2**31 in a long video.
    return group, bt.to(tl.int64), (pixel % S).to(tl.int64), head.to(tl.int64), exists


@jit
def _tile(x, row, exists, D, D_PAD):
    """Addresses and mask of a tile [ROWS, D_PAD] whose rows begin at `row`.

    Columns from D on are padding (D = 80 is padded to 128).
    """
    d = tl.arange(0, D_PAD)
    # Rows start on 16 bytes (checked at launch), so loads are of 16 bytes.
    address = tl.multiple_of(x + row[:, None] + d[None, :], [1, 16])
    return address, exists[:, None] & (d < D)[None, :]


@jit
def _load(x, bt, s, head, frame_stride, pixel_stride, head_stride, exists, D, D_PAD):
    """A tile of x; rows that do not exist and padding columns are zero."""
    row = bt * frame_stride + s * pixel_stride + head * head_stride
    address, mask = _tile(x, row, exists, D, D_PAD)
    return tl.load(address, mask=mask, other=0.0)


@jit
def _store(x, tile, bt, s, head, S, H, exists, D, D_PAD):
    """Write a tile into a contiguous `(b t) s h d` tensor."""
    row = ((bt * S + s) * H + head) * D
    address, mask = _tile(x, row, exists, D, D_PAD)
    tl.store(address, tile.to(x.dtype.element_ty), mask=mask)


@jit
def _softmax(q, k, group, scale):
    """P before its normalisation, and its row sums [ROWS, 1].

    P = exp(scores - maximum), 0 in other pixels' columns.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores *= scale * 1.4426950408889634  # log2(e): exp2 is what the hardware has
    scores = tl.where(group[:, None] == group[None, :], scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    return p, tl.sum(p, axis=1)[:, None]


# fmt: off
@jit
def temporal_forward(
    q, k, v, out,
    q_frame, q_pixel, q_head, k_frame, k_pixel, k_head, v_frame, v_pixel, v_head,
    S, H, pixels, scale,
    T: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: on
    group, bt, s, head, exists = _rows(S, H, pixels, T, ROWS)
    q = _load(q, bt, s, head, q_frame, q_pixel, q_head, exists, D, D_PAD)
    k = _load(k, bt, s, head, k_frame, k_pixel, k_head, exists, D, D_PAD)
    v = _load(v, bt, s, head, v_frame, v_pixel, v_head, exists, D, D_PAD)
    p, total = _softmax(q, k, group, scale)
    o = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total
    _store(out, o, bt, s, head, S, H, exists, D, D_PAD)


# fmt: off
@jit
def temporal_backward(
    q, k, v, dout, dq, dk, dv,
    q_frame, q_pixel, q_head, k_frame, k_pixel, k_head, v_frame, v_pixel, v_head,
    dout_frame, dout_pixel, dout_head, S, H, pixels, scale,
    T: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: on
    """The gradients of q, k and v.

    With dO the gradient of out = P v, row by row (t and u are frames of one pixel):

        dv[u] = sum_t P[t,u] dO[t]                          out is linear in v
        dP[t,u] = dO[t] . v[u]                              and in P
        dS[t,u] = P[t,u] (dP[t,u] - sum_w P[t,w] dP[t,w])   through the softmax
        dq[t] = scale sum_u dS[t,u] k[u],   dk[u] = scale sum_t dS[t,u] q[t]

    for the softmax's Jacobian is diag(P) - P P^T. FlashAttention must save the softmax's normaliser
    and go over the keys a second time, because a program there sees only some of them. Here all
    frames of a pixel are in one tile: P is made again from q and k, the sum over w is a row sum,
    nothing is saved but the inputs, and every element of dq, dk, dv is written once by one program,
    so that the result is the same in every run.
    """
    group, bt, s, head, exists = _rows(S, H, pixels, T, ROWS)
    q = _load(q, bt, s, head, q_frame, q_pixel, q_head, exists, D, D_PAD)
    k = _load(k, bt, s, head, k_frame, k_pixel, k_head, exists, D, D_PAD)
    p, total = _softmax(q, k, group, scale)
    p = p / total
    dout = _load(dout, bt, s, head, dout_frame, dout_pixel, dout_head, exists, D, D_PAD)
    tile = tl.dot(tl.trans(p.to(q.dtype)), dout, input_precision="ieee")
    _store(dv, tile, bt, s, head, S, H, exists, D, D_PAD)
    v = _load(v, bt, s, head, v_frame, v_pixel, v_head, exists, D, D_PAD)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    ds = p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale
    ds = ds.to(q.dtype)  # 0 between pixels, as p is
    tile = tl.dot(ds, k, input_precision="ieee")
    _store(dq, tile, bt, s, head, S, H, exists, D, D_PAD)
    tile = tl.dot(tl.trans(ds), q, input_precision="ieee")
    _store(dk, tile, bt, s, head, S, H, exists, D, D_PAD)


def _settings(T: int, D: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """The kernels' constants and launch options, for the launch and ahead of time."""
    if dtype == torch.float32:
        # No tensor cores in full float32, so products between pixels do cost: the smallest tile
        # that holds T frames. More than 32 frames of more than 64 numbers spill registers: correct,
        # but slow.
        rows, warps = max(16, 1 << (T - 1).bit_length()), 8
    else:
        rows, warps = 64, 4  # one Hopper warp-group product
    constants = {"T": T, "D": D, "D_PAD": max(16, 1 << (D - 1).bit_length()), "ROWS": rows}
    return constants, {"num_warps": warps, "num_stages": 1}  # no loop, so nothing to pipeline


class TemporalAttention(torch.autograd.Function):
    """On `(b t) s h d` views."""

    @staticmethod
    def forward(ctx, q, k, v, T, scale):
        BT, S, H, D = q.shape
        out = q.new_empty(BT, S, H, D)
        pixels = BT // T * S
        constants, options = _settings(T, D, q.dtype)
        grid = (triton.cdiv(pixels, constants["ROWS"] // T) * H,)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        sizes = (S, H, pixels, scale)
        temporal_forward[grid](q, k, v, out, *strides, *sizes, **constants, **options)
        ctx.save_for_backward(q, k, v)
        ctx.T, ctx.grid, ctx.strides, ctx.sizes = T, grid, strides, sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v = ctx.saved_tensors
        if not _aligned(dout):  # the gradient of a sum, say, is one number with strides 0
            dout = dout.contiguous()
        dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
        constants, options = _settings(ctx.T, q.shape[-1], q.dtype)
        numbers = (*ctx.strides, *dout.stride()[:3], *ctx.sizes)
        temporal_backward[ctx.grid](q, k, v, dout, dq, dk, dv, *numbers, **constants, **options)
        return dq, dk, dv, None, None


def _aligned(x) -> bool:
    """Whether every row of x is contiguous and starts on 16 bytes, as `_tile` promises."""
    steps = [x.stride(i) for i in range(x.ndim - 1) if x.shape[i] > 1]
    if not torch.compiler.is_compiling():  # which cannot follow the offset
        steps.append(x.storage_offset())
    starts = all(step * x.element_size() % 16 == 0 for step in steps)
    return starts and (x.stride(-1) == 1 or x.shape[-1] == 1)


def temporal_attention(q, k, v, num_frames: int, *, scale=None, head_width: int = 64):
    """Attention over the frames at every pixel and head of a video latent.

    q, k, v: [B*T, S, H*D] (cut into heads of `head_width`) or [B*T, S, H, D], bf16, fp16 or fp32;
    any strides by which every head's row is contiguous and starts on 16 bytes (a slice of a fused
    qkv is fine). `num_frames` is T, at most 64; D at most 128; `scale` is 1 / sqrt(D) unless given.
    Returns a contiguous tensor of q's shape. Differentiable once. CPU tensors take the reference
    (TRITON_INTERPRET=1: the kernel). Raises ValueError for a shape, stride, type or device that it
    does not take, RuntimeError for a CUDA tensor without triton.
    """
    if q.ndim not in (3, 4) or not q.shape == k.shape == v.shape:
        found = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        raise ValueError(f"q, k, v must be of one shape, [B*T, S, H*D] or [B*T, S, H, D]: {found}")
    D = head_width if q.ndim == 3 else q.shape[3]
    if not 1 <= D <= 128 or q.ndim == 3 and q.shape[2] % D:
        found = f"{D} for shape {tuple(q.shape)}: set head_width"
        raise ValueError(f"heads must be 1 to 128 wide and divide the last dimension, got {found}")
    if not 1 <= num_frames <= MAX_FRAMES or q.shape[0] % num_frames:
        found = f"the first dimension {q.shape[0]}, got {num_frames}"
        raise ValueError(f"num_frames must be 1 to {MAX_FRAMES} and divide {found}")
    if not q.device == k.device == v.device or q.device.type not in ("cpu", "cuda"):
        devices = f"{q.device}, {k.device}, {v.device}"
        raise ValueError(f"q, k, v must be together on a CPU or a CUDA device, got {devices}")
    types = (torch.bfloat16, torch.float16, torch.float32)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in types:
        found = f"{q.dtype}, {k.dtype}, {v.dtype}"
        raise ValueError(f"q, k, v must be all bfloat16, float16 or float32, got {found}")
    views = [x.unflatten(2, (-1, D)) if x.ndim == 3 else x for x in (q, k, v)]  # (b t) s h d
    if D * q.element_size() % 16 or not all(map(_aligned, views)):
        strides = [(*x.stride(), x.storage_offset()) for x in views]
        found = f"head width {D} of {q.dtype}, strides and offset {strides}: call .contiguous()"
        raise ValueError(f"a head's row must be contiguous and start on 16 bytes, got {found}")
    if q.is_cuda and triton is None:
        raise RuntimeError("temporal_attention on a CUDA tensor needs triton: pip install triton")
    if q.device.type == "cpu" and not (triton and triton.knobs.runtime.interpret):
        out = temporal_attention_reference(q, k, v, num_frames, scale=scale, head_width=D)
        return out.contiguous()
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter errs in bfloat16: use float16 or float32 there")
    scale = D**-0.5 if scale is None else float(scale)
    return TemporalAttention.apply(*views, num_frames, scale).view(q.shape)
