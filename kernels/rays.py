"""
Plücker rays: for every pixel of every view the line through it, as six numbers that a network can read.

A line in space is given by its unit direction d and its moment m = o x d, with o any point on it (o + a d gives the same m). We take o,
the camera's centre. Stable Virtual Camera concatenates this map to its latents: it is how the network knows where each camera stands.

With w2c = [R t] taking a point from reference-camera to camera coordinates, K normalised intrinsics (row 0 in picture widths, row 1 in
heights) and the centre of pixel (row i, column j) at (j + 0.5, i + 0.5):

    ray = R^T K_px^-1 (j + 0.5, i + 0.5, 1)^T,   K_px = diag(width, height, 1) K,   d = ray / |ray|,   o = -R^T t,   m = o x d

R is a rotation, so R^T is its inverse; axes are OpenCV's (x right, y down, z forward). For rays in the first camera's coordinates, as
Stable Virtual Camera has them, pass w2c @ inverse(w2c[0]).

**What the kernel saves.** All that differs between views is the 3x3 matrix M = R^T K_px^-1 and o: twelve numbers, made by a few lines of
torch (`_cameras`), where autograd takes care of the inverse. Per pixel there are left a product with M, a normalisation and a cross
product. Plain torch writes each step to memory and reads it again (the nine products and their sums, the norm, d, m, the concatenation:
some 25 numbers a pixel each way, in half a dozen launches); the kernel keeps them in registers and writes the six results once, 24 bytes
a pixel, 2.6 MB for 21 views of 72 x 72. Backward it reads the six gradients and writes next to nothing.

**Layout.** The result [V, 6, height, width] is six planes a view. A program takes BLOCK consecutive pixels of one view: neighbouring
threads write neighbouring addresses in each plane. Pixel n of a view has row i = n // width, column j = n % width, and channel c of it
lies at (view * 6 + c) * height * width + n.
"""
from __future__ import annotations  # annotations are not evaluated: without triton, tl.constexpr need not exist

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # macOS, Windows: the reference still runs on the CPU
    triton, jit = None, lambda kernel: kernel

# Pixels a program, 4 a thread. The one place for both the launch and `compile_cases`.
BLOCK = 512
OPTIONS = {"num_warps": 4, "num_stages": 1}


def _cameras(w2c, K, height: int, width: int):
    """M [..., 3, 3] = R^T K_px^-1 and the camera centre o [..., 3]. Sums of products, not matmul: autocast or TF32 would round them.
    inv_ex, not inv, which would wait for the GPU to say whether K is singular."""
    rotation, translation = w2c[..., :3, :3], w2c[..., :3, 3]
    per_pixel = torch.tensor([1 / width, 1 / height, 1], dtype=K.dtype, device=K.device)         # K_px^-1 = K^-1 diag(1/w, 1/h, 1)
    M = (rotation.mT[..., None] * (torch.linalg.inv_ex(K).inverse * per_pixel)[..., None, :, :]).sum(-2)    # sum over the middle index
    return M, -(rotation.mT * translation[..., None, :]).sum(-1)


def plucker_rays_reference(w2c, K, height: int, width: int):
    """The same in plain torch; any float type, differentiable. Arguments as in `plucker_rays`."""
    M, origin = _cameras(w2c, K, height, width)
    i, j = torch.meshgrid(*(torch.arange(n, dtype=M.dtype, device=M.device) + 0.5 for n in (height, width)), indexing="ij")
    pixel = torch.stack([j, i, torch.ones_like(i)])                                              # 3 h w
    ray = (M[..., None, None] * pixel).sum(-3)                                                   # ... 3 h w
    direction = ray / ray.norm(dim=-3, keepdim=True)
    return torch.cat([direction, torch.linalg.cross(origin[..., None, None].expand_as(ray), direction, dim=-3)], dim=-3)


@jit
def _direction(M, view, width, n):
    """Pixel centre (x, y), unit direction (d0, d1, d2) and 1 / |ray| of the pixels n of a view."""
    M += view * 9
    x = (n % width).to(tl.float32) + 0.5
    y = (n // width).to(tl.float32) + 0.5
    ray0 = tl.load(M) * x + tl.load(M + 1) * y + tl.load(M + 2)
    ray1 = tl.load(M + 3) * x + tl.load(M + 4) * y + tl.load(M + 5)
    ray2 = tl.load(M + 6) * x + tl.load(M + 7) * y + tl.load(M + 8)
    inverse = 1.0 / tl.sqrt_rn(ray0 * ray0 + ray1 * ray1 + ray2 * ray2)
    return x, y, ray0 * inverse, ray1 * inverse, ray2 * inverse, inverse


@jit
def rays_forward(M, origin, out, pixels, width, BLOCK: tl.constexpr):
    view = tl.program_id(1).to(tl.int64)              # int64: views * 6 * pixels may pass 2**31
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, d0, d1, d2, inverse = _direction(M, view, width, n)
    o0, o1, o2 = tl.load(origin + view * 3), tl.load(origin + view * 3 + 1), tl.load(origin + view * 3 + 2)
    plane = out + view * 6 * pixels + n               # channel 0; each further channel is `pixels` numbers on
    tl.store(plane, d0, mask=n < pixels)
    tl.store(plane + pixels, d1, mask=n < pixels)
    tl.store(plane + 2 * pixels, d2, mask=n < pixels)
    tl.store(plane + 3 * pixels, o1 * d2 - o2 * d1, mask=n < pixels)
    tl.store(plane + 4 * pixels, o2 * d0 - o0 * d2, mask=n < pixels)
    tl.store(plane + 5 * pixels, o0 * d1 - o1 * d0, mask=n < pixels)


@jit
def rays_backward(M, origin, dout, partial, pixels, width, BLOCK: tl.constexpr):
    """
    With a, b the gradients of d and m = o x d at a pixel (b . (do x d) = do . (d x b), b . (o x dd) = dd . (b x o)):

        do = sum d x b                          the sums run over the pixels
        e = a + b x o                           all that reaches d
        dray = (e - d (d . e)) / |ray|          through the normalisation: only what is across the ray turns it
        dM = sum dray (x, y, 1)

    A program sums its BLOCK pixels to twelve numbers, nine of dM and three of do, and writes them to partial [V, blocks, 12]. torch adds
    the blocks up: no atomics, so that the result is the same in every run. d is made again from M, not read: cheaper than its 12 bytes.
    """
    view = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, d0, d1, d2, inverse = _direction(M, view, width, n)
    o0, o1, o2 = tl.load(origin + view * 3), tl.load(origin + view * 3 + 1), tl.load(origin + view * 3 + 2)
    plane = dout + view * 6 * pixels + n
    a0 = tl.load(plane, mask=n < pixels, other=0.0)   # pixels past the end have zero gradients and so add nothing to the sums
    a1 = tl.load(plane + pixels, mask=n < pixels, other=0.0)
    a2 = tl.load(plane + 2 * pixels, mask=n < pixels, other=0.0)
    b0 = tl.load(plane + 3 * pixels, mask=n < pixels, other=0.0)
    b1 = tl.load(plane + 4 * pixels, mask=n < pixels, other=0.0)
    b2 = tl.load(plane + 5 * pixels, mask=n < pixels, other=0.0)
    e0, e1, e2 = a0 + b1 * o2 - b2 * o1, a1 + b2 * o0 - b0 * o2, a2 + b0 * o1 - b1 * o0
    along = d0 * e0 + d1 * e1 + d2 * e2
    r0, r1, r2 = (e0 - d0 * along) * inverse, (e1 - d1 * along) * inverse, (e2 - d2 * along) * inverse
    partial += (view * tl.num_programs(0) + tl.program_id(0)) * 12
    tl.store(partial, tl.sum(r0 * x))
    tl.store(partial + 1, tl.sum(r0 * y))
    tl.store(partial + 2, tl.sum(r0))
    tl.store(partial + 3, tl.sum(r1 * x))
    tl.store(partial + 4, tl.sum(r1 * y))
    tl.store(partial + 5, tl.sum(r1))
    tl.store(partial + 6, tl.sum(r2 * x))
    tl.store(partial + 7, tl.sum(r2 * y))
    tl.store(partial + 8, tl.sum(r2))
    tl.store(partial + 9, tl.sum(d1 * b2 - d2 * b1))
    tl.store(partial + 10, tl.sum(d2 * b0 - d0 * b2))
    tl.store(partial + 11, tl.sum(d0 * b1 - d1 * b0))


class PluckerRays(torch.autograd.Function):
    """On contiguous M [V, 3, 3] and camera centres [V, 3]."""

    @staticmethod
    def forward(ctx, M, origin, height, width):
        V, pixels = len(M), height * width
        out = M.new_empty(V, 6, height, width)
        rays_forward[(triton.cdiv(pixels, BLOCK), V)](M, origin, out, pixels, width, BLOCK=BLOCK, **OPTIONS)
        ctx.save_for_backward(M, origin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        M, origin = ctx.saved_tensors
        V, _, height, width = dout.shape
        blocks = triton.cdiv(height * width, BLOCK)
        partial = M.new_empty(V, blocks, 12)
        rays_backward[(blocks, V)](M, origin, dout.contiguous(), partial, height * width, width, BLOCK=BLOCK, **OPTIONS)
        total = partial.sum(1)
        return total[:, :9].view(V, 3, 3), total[:, 9:], None, None


def plucker_rays(w2c, K, height: int, width: int):
    """
    Direction (channels 0..2) and moment (3..5) of every pixel's ray: float32 [..., V, 6, height, width].

    w2c: [..., V, 4, 4] float32, world to camera, relative to the camera in whose coordinates the rays shall be.
    K: [..., V, 3, 3] float32, normalised: row 0 over the width, row 1 over the height.
    Differentiable once in both. CPU tensors take the reference (TRITON_INTERPRET=1: the kernel).
    Raises ValueError for a shape, type or device it does not take, RuntimeError for a CUDA tensor without triton.
    """
    if w2c.ndim < 3 or w2c.shape[-2:] != (4, 4) or K.shape != (*w2c.shape[:-2], 3, 3):
        raise ValueError(f"w2c must be [..., V, 4, 4] and K [..., V, 3, 3], got {tuple(w2c.shape)} and {tuple(K.shape)}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} x {width}")
    if not w2c.dtype == K.dtype == torch.float32:
        raise ValueError(f"w2c and K must be float32, got {w2c.dtype} and {K.dtype}: call .float()")
    if w2c.device != K.device or w2c.device.type not in ("cpu", "cuda"):
        raise ValueError(f"w2c and K must be together on a CPU or a CUDA device, got {w2c.device} and {K.device}")
    if w2c.is_cuda and triton is None:
        raise RuntimeError("plucker_rays on a CUDA tensor needs triton, which could not be imported: pip install triton")
    if w2c.device.type == "cpu" and not (triton and triton.knobs.runtime.interpret):
        return plucker_rays_reference(w2c, K, height, width)
    M, origin = _cameras(w2c, K, height, width)
    out = PluckerRays.apply(M.reshape(-1, 3, 3).contiguous(), origin.reshape(-1, 3).contiguous(), height, width)
    return out.view(*w2c.shape[:-2], 6, height, width)


def compile_cases() -> list[tuple]:
    """What to compile ahead of time: (name, kernel, type of each argument, constants, options)."""
    return [(f"rays {direction} fp32", kernel, {x: "*fp32" for x in tensors} | {"pixels": "i32", "width": "i32"}, {"BLOCK": BLOCK}, OPTIONS)
            for direction, kernel, tensors in (("forward", rays_forward, ("M", "origin", "out")),
                                               ("backward", rays_backward, ("M", "origin", "dout", "partial")))]
