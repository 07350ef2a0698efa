"""kernels/rays.py under Triton's interpreter, or on a GPU (run by tests/test_kernels.py).

By meaning, and pixel after pixel in float64.
"""

import math

import pytest
import torch
from conftest import check, tolerance, where_kernels_run

from kernels import rays
from kernels.rays import plucker_rays_reference

NAMES = ("rays", "dw2c", "dK")
plucker_rays = where_kernels_run(rays.plucker_rays)


def cameras(*lead, seed=0):
    """Random rotations, centres some metres away and oblique intrinsics, float32."""
    g = torch.Generator().manual_seed(seed)
    w2c = torch.eye(4).repeat(*lead, 1, 1)
    w2c[..., :3, :3] = torch.linalg.qr(torch.randn(*lead, 3, 3, generator=g))[0]
    w2c[..., :3, 3] = 3 * torch.randn(*lead, 3, generator=g)
    K = torch.eye(3).repeat(*lead, 1, 1)
    K[..., :2, :] = torch.tensor([[0.9, 0.02, 0.45], [0, 1.2, 0.55]])
    K[..., :2, :] += 0.1 * torch.rand(*lead, 2, 3, generator=g)
    return w2c, K


def oracle(w2c, K, height, width, sign=1):
    """Of V views: the direction from the centre to a point seen at the pixel, and its moment."""
    pixels = []
    for E, k in zip(w2c, K, strict=True):
        inverse = E[:3, :3].T  # of the rotation
        c2w = torch.cat([torch.cat([inverse, -inverse @ E[:3, 3:]], 1), E[3:]])
        o = c2w[:3, 3]
        for i in range(height):
            for j in range(width):
                at = torch.tensor([(j + 0.5) / width, (i + 0.5) / height, 1], dtype=E.dtype)
                point = c2w @ torch.cat([torch.linalg.solve(k, at), torch.ones(1, dtype=E.dtype)])
                d = (point[:3] - o) / (point[:3] - o).square().sum().sqrt()
                m0 = o[1] * d[2] - o[2] * d[1]
                m1 = o[2] * d[0] - o[0] * d[2]
                m2 = o[0] * d[1] - o[1] * d[0]
                pixels.append(torch.cat([d, sign * torch.stack([m0, m1, m2])]))
    return torch.stack(pixels).view(len(w2c), height, width, 6).permute(0, 3, 1, 2)


def results(function, w2c, K, height, width, dout):
    w2c, K = w2c.detach().requires_grad_(), K.detach().requires_grad_()
    out = function(w2c, K, height, width)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, (w2c, K), dout))]


# A block is 512 pixels: here are 1, 35, 512, 513 and 511.
SIZES = [(1, 1, 1), (3, 5, 7), (2, 16, 32), (1, 27, 19), (1, 73, 7)]


@pytest.mark.parametrize("V, height, width", SIZES)
def test_against_oracle(V, height, width):
    w2c, K = cameras(V, seed=height)
    dout = torch.randn(V, 6, height, width, generator=torch.Generator().manual_seed(1))
    got = results(plucker_rays, w2c, K, height, width, dout)
    plain = results(plucker_rays_reference, w2c, K, height, width, dout)
    arguments = w2c.double(), K.double(), height, width, dout.double()
    want = results(oracle, *arguments)
    allowed = tolerance(plain, want)
    check(NAMES, got, want, allowed)
    with pytest.raises(AssertionError, match="rays is off"):
        check(NAMES, got, results(lambda *x: oracle(*x, sign=-1), *arguments), allowed)  # d x o
    for i, name in enumerate(NAMES):
        with pytest.raises(AssertionError, match=f"{name} is off"):
            check(NAMES, [-x if i == j else x for j, x in enumerate(got)], want, allowed)


def test_by_meaning():
    K = torch.tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]])  # 90 degrees either way
    still, right = torch.eye(4), torch.eye(4)
    right[0, 3] = -2  # the camera stands 2 to the right: the world moves left
    # 90 degrees right: what lay along x lies ahead
    turned = torch.tensor([[0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    out = plucker_rays(torch.stack([still, right, turned]), K.expand(3, 3, 3), 5, 7)
    direction, moment = out[:, :3], out[:, 3:]

    def near(found, *numbers):
        return found.allclose(torch.tensor(numbers, dtype=torch.float32), atol=1e-6)

    assert near(direction[0, :, 2, 3], 0, 0, 1)  # the middle looks along +z
    assert (direction[0, 0].diff(dim=1) > 0).all()  # x to the right
    assert (direction[0, 1].diff(dim=0) > 0).all()  # y down
    length = math.hypot(6 / 7, 1)
    assert near(direction[0, :, 2, 6], 6 / 7 / length, 0, 1 / length)  # its edge is at (1, 0, 1)
    assert direction.norm(dim=1).allclose(torch.ones(3, 5, 7))
    assert (direction * moment).sum(1).abs().max() < 1e-6
    assert moment[[0, 2]].abs().max() == 0  # lines through the origin
    assert direction[1].equal(direction[0])
    assert near(moment[1, :, 2, 3], 0, -2, 0)  # (2, 0, 0) x (0, 0, 1)
    assert near(direction[2, :, 2, 3], 1, 0, 0)


def test_leading_dimensions_and_slices():
    w2c, K = cameras(2, 3)
    out = plucker_rays(w2c, K, 4, 5)
    assert out.shape == (2, 3, 6, 4, 5) and out.dtype == torch.float32 and out.is_contiguous()
    assert out[1].equal(plucker_rays(w2c[1], K[1], 4, 5))
    assert out[:, 1].equal(plucker_rays(w2c[:, 1], K[:, 1], 4, 5))


def test_the_kernel_ran_and_autocast_does_not_round(monkeypatch):
    monkeypatch.setattr(rays, "plucker_rays_reference", None)
    w2c, K = cameras(2)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = plucker_rays(w2c, K, 4, 5)
    assert rounded.equal(plucker_rays(w2c, K, 4, 5))


def test_what_it_refuses():
    w2c, K = cameras(2)
    for message, arguments in [
        ("w2c must be", (w2c[0], K[0], 2, 2)),
        ("w2c must be", (w2c[:, :3], K, 2, 2)),
        ("w2c must be", (w2c, K[:1], 2, 2)),
        ("at least 1", (w2c, K, 0, 2)),
        ("float32", (w2c.double(), K.double(), 2, 2)),
        ("float32", (w2c, K.half(), 2, 2)),
        ("CPU or a CUDA", (w2c.to("meta"), K.to("meta"), 2, 2)),
    ]:
        with pytest.raises(ValueError, match=message):
            rays.plucker_rays(*arguments)
