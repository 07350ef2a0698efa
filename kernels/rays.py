"""Plücker rays: for every pixel of every view the line through it, as six numbers.

A line in space is given by its unit direction d and its moment m = o x d, with o any point on it
(o + a d gives the same m). We take o, the camera's centre. Stable Virtual Camera concatenates this
map to its latents: it is how the network knows where each camera stands.

With w2c = [R t] taking a point from reference-camera to camera coordinates, K normalised intrinsics
(row 0 in picture widths, row 1 in heights) and the centre of pixel (row i, column j) at
(j + 0.5, i + 0.5):

    ray = R^T K_px^-1 (j + 0.5, i + 0.5, 1)^T,   K_px = diag(width, height, 1) K
    d = ray / |ray|,   o = -R^T t,   m = o x d

R is a rotation, so R^T is its inverse; axes are OpenCV's (x right, y down, z forward). For rays in
the first camera's coordinates, as Stable Virtual Camera has them, pass w2c @ inverse(w2c[0]).

What the kernel saves. Between views only the 3x3 matrix M = R^T K_px^-1 and o differ: twelve
numbers, made by a few lines of torch (`_cameras`), where autograd takes care of the inverse. Plain
torch writes each step per pixel to memory and reads it again, some 25 numbers each way in half a
dozen launches. The kernel keeps them in registers and writes the six results once, 24 bytes.

Layout. The result [V, 6, height, width] is six planes per view. A program takes BLOCK consecutive
pixels n = i width + j of a view: neighbouring threads write neighbouring addresses in each plane.
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

# Pixels per program, 4 per thread; for the launch and ahead of time.
BLOCK = 512
OPTIONS = {"num_warps": 4, "num_stages": 1}


def _cameras(w2c, K, height: int, width: int):
    """M [..., 3, 3] = R^T K_px^-1 and the camera centre o [..., 3].

    Sums of products, not matmul: autocast or TF32 would round them. inv_ex, not inv, which would
    wait for the GPU to say whether K is singular.
    """
    inverse_rotation = w2c[..., :3, :3].mT
    translation = w2c[..., None, :3, 3]
    # K_px^-1 = K^-1 diag(1 / width, 1 / height, 1)
    per_pixel = torch.tensor([1 / width, 1 / height, 1], dtype=K.dtype, device=K.device)
    inverse_K = torch.linalg.inv_ex(K).inverse * per_pixel
    M = (inverse_rotation[..., None] * inverse_K[..., None, :, :]).sum(-2)
    return M, -(inverse_rotation * translation).sum(-1)


def plucker_rays_reference(w2c, K, height: int, width: int):
    """The same in plain torch; any float type, differentiable. Arguments as in `plucker_rays`."""
    M, origin = _cameras(w2c, K, height, width)
    rows = torch.arange(height, dtype=M.dtype, device=M.device) + 0.5
    columns = torch.arange(width, dtype=M.dtype, device=M.device) + 0.5
    i, j = torch.meshgrid(rows, columns, indexing="ij")
    pixel = torch.stack([j, i, torch.ones_like(i)])  # [3, h, w]
    ray = (M[..., None, None] * pixel).sum(-3)  # [..., 3, h, w]
    direction = ray / ray.norm(dim=-3, keepdim=True)
    origin = origin[..., None, None].expand_as(ray)
    moment = torch.linalg.cross(origin, direction, dim=-3)
    return torch.cat([direction, moment], dim=-3)


@jit
def _load3(at):
    """Three numbers that follow each other."""
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@jit
def _load_planes(at, step, mask):
    """The numbers of three planes that are `step` apart; 0 where the mask is False."""
    x0 = tl.load(at, mask=mask, other=0.0)
    x1 = tl.load(at + step, mask=mask, other=0.0)
    x2 = tl.load(at + 2 * step, mask=mask, other=0.0)
    return x0, x1, x2


@jit
def _store_planes(at, step, x0, x1, x2, mask):
    tl.store(at, x0, mask=mask)
    tl.store(at + step, x1, mask=mask)
    tl.store(at + 2 * step, x2, mask=mask)


@jit
def _store_sums(at, x0, x1, x2):
    """The sums over a block of pixels as three numbers that follow each other."""
    tl.store(at, tl.sum(x0))
    tl.store(at + 1, tl.sum(x1))
    tl.store(at + 2, tl.sum(x2))


@jit
def _cross(a0, a1, a2, b0, b1, b2):
    """a x b."""
    c0 = a1 * b2 - a2 * b1
    c1 = a2 * b0 - a0 * b2
    c2 = a0 * b1 - a1 * b0
    return c0, c1, c2


@jit
def _direction(M, view, width, n):
    """Centre (x, y), unit direction (d0, d1, d2) and 1 / |ray| of the pixels n of a view."""
    M += view * 9
    x = (n % width).to(tl.float32) + 0.5
    y = (n // width).to(tl.float32) + 0.5
    m0, m1, m2 = _load3(M)
    ray0 = m0 * x + m1 * y + m2
    m0, m1, m2 = _load3(M + 3)
    ray1 = m0 * x + m1 * y + m2
    m0, m1, m2 = _load3(M + 6)
    ray2 = m0 * x + m1 * y + m2
    inverse = 1.0 / tl.sqrt_rn(ray0 * ray0 + ray1 * ray1 + ray2 * ray2)
    return x, y, ray0 * inverse, ray1 * inverse, ray2 * inverse, inverse


@jit
def rays_forward(M, origin, out, pixels, width, BLOCK: tl.constexpr):
    """A block of pixels of one view: out [V, 6, pixels] from M [V, 3, 3] and origin [V, 3]."""
    view = tl.program_id(1).to(tl.int64)  # int64: views * 6 * pixels may pass 2**31
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, d0, d1, d2, inverse = _direction(M, view, width, n)
    o0, o1, o2 = _load3(origin + view * 3)
    m0, m1, m2 = _cross(o0, o1, o2, d0, d1, d2)
    plane = out + view * 6 * pixels + n  # channel 0; each further one is `pixels` numbers on
    _store_planes(plane, pixels, d0, d1, d2, n < pixels)
    _store_planes(plane + 3 * pixels, pixels, m0, m1, m2, n < pixels)


@jit
def rays_backward(M, origin, dout, partial, pixels, width, BLOCK: tl.constexpr):
    """The sums over a block of pixels of the gradients of M and o: partial [V, blocks, 12].

    With a, b the gradients of d and m = o x d at a pixel
    (b . (do x d) = do . (d x b), b . (o x dd) = dd . (b x o)):

        do = sum d x b                          the sums run over the pixels
        e = a + b x o                           all that reaches d
        dray = (e - d (d . e)) / |ray|          through the normalisation: the part across the ray
        dM = sum dray (x, y, 1)

    A program writes nine numbers of dM and three of do. torch adds the blocks up: no atomics, so
    the result is the same in every run. d is made again from M: cheaper than reading its 12 bytes.
    """
    view = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, d0, d1, d2, inverse = _direction(M, view, width, n)
    o0, o1, o2 = _load3(origin + view * 3)
    plane = dout + view * 6 * pixels + n
    # Pixels past the end have zero gradients and so add nothing to the sums.
    a0, a1, a2 = _load_planes(plane, pixels, n < pixels)
    b0, b1, b2 = _load_planes(plane + 3 * pixels, pixels, n < pixels)
    e0 = a0 + b1 * o2 - b2 * o1
    e1 = a1 + b2 * o0 - b0 * o2
    e2 = a2 + b0 * o1 - b1 * o0
    along = d0 * e0 + d1 * e1 + d2 * e2
    r0 = (e0 - d0 * along) * inverse
    r1 = (e1 - d1 * along) * inverse
    r2 = (e2 - d2 * along) * inverse
    do0, do1, do2 = _cross(d0, d1, d2, b0, b1, b2)
    partial += (view * tl.num_programs(0) + tl.program_id(0)) * 12
    _store_sums(partial, r0 * x, r0 * y, r0)
    _store_sums(partial + 3, r1 * x, r1 * y, r1)
    _store_sums(partial + 6, r2 * x, r2 * y, r2)
    _store_sums(partial + 9, do0, do1, do2)


class PluckerRays(torch.autograd.Function):
    """On contiguous M [V, 3, 3] and camera centres [V, 3]."""

    @staticmethod
    def forward(ctx, M, origin, height, width):
        V, pixels = len(M), height * width
        out = M.new_empty(V, 6, height, width)
        grid = (triton.cdiv(pixels, BLOCK), V)
        rays_forward[grid](M, origin, out, pixels, width, BLOCK=BLOCK, **OPTIONS)
        ctx.save_for_backward(M, origin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        M, origin = ctx.saved_tensors
        V, _, height, width = dout.shape
        dout, pixels = dout.contiguous(), height * width
        grid = (triton.cdiv(pixels, BLOCK), V)
        partial = M.new_empty(V, grid[0], 12)
        rays_backward[grid](M, origin, dout, partial, pixels, width, BLOCK=BLOCK, **OPTIONS)
        total = partial.sum(1)
        return total[:, :9].view(V, 3, 3), total[:, 9:], None, None


def plucker_rays(w2c, K, height: int, width: int):
    """Direction (channels 0..2) and moment (3..5) of every pixel's ray.

    w2c: [..., V, 4, 4] float32, world to camera, relative to the camera in whose coordinates the
    rays shall be. K: [..., V, 3, 3] float32, normalised: row 0 over the width, row 1 over the
    height. Returns float32 [..., V, 6, height, width].
    Differentiable once in both. CPU tensors take the reference (TRITON_INTERPRET=1: the kernel).
    Raises ValueError for a shape, type or device that it does not take, RuntimeError for a CUDA
    tensor without triton.
    """
    shapes = f"{tuple(w2c.shape)} and {tuple(K.shape)}"
    if w2c.ndim < 3 or w2c.shape[-2:] != (4, 4) or K.shape != (*w2c.shape[:-2], 3, 3):
        raise ValueError(f"w2c must be [..., V, 4, 4] and K [..., V, 3, 3], got {shapes}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} x {width}")
    if not w2c.dtype == K.dtype == torch.float32:
        raise ValueError(f"w2c and K must be float32, got {w2c.dtype}, {K.dtype}: call .float()")
    if w2c.device != K.device or w2c.device.type not in ("cpu", "cuda"):
        devices = f"{w2c.device} and {K.device}"
        raise ValueError(f"w2c and K must be together on a CPU or a CUDA device, got {devices}")
    if w2c.is_cuda and triton is None:
        raise RuntimeError("plucker_rays on a CUDA tensor needs triton: pip install triton")
    if w2c.device.type == "cpu" and not (triton and triton.knobs.runtime.interpret):
        return plucker_rays_reference(w2c, K, height, width)
    M, origin = _cameras(w2c, K, height, width)
    M = M.reshape(-1, 3, 3).contiguous()
    origin = origin.reshape(-1, 3).contiguous()
    out = PluckerRays.apply(M, origin, height, width)
    return out.view(*w2c.shape[:-2], 6, height, width)
