"""kernels/temporal.py under Triton's interpreter, or on a GPU (run by tests/test_kernels.py).

Against one small attention after another in float64. bfloat16 on a GPU only: in Triton 3.9 the
interpreter's tl.dot multiplies its bit patterns. float16 goes the same way through the kernels.
"""

import pytest
import torch
from conftest import GPU, check, far_apart, tolerance, where_kernels_run

from kernels import temporal
from kernels.temporal import temporal_attention_reference

NAMES = ("out", "dq", "dk", "dv")
temporal_attention = where_kernels_run(temporal.temporal_attention)


def oracle(q, k, v, T, scale):
    """[B*T, S, H, D]: for each video, pixel and head its own softmax."""
    BT, S, H, D = q.shape
    out = torch.empty_like(q)
    for b in range(BT // T):
        for s in range(S):
            for h in range(H):
                Q, K, V = (x[b * T : (b + 1) * T, s, h] for x in (q, k, v))  # T d
                weights = (Q @ K.T * scale).exp()
                out[b * T : (b + 1) * T, s, h] = weights / weights.sum(1, keepdim=True) @ V
    return out


def results(attention, tensors, dout):
    """The output and the gradients of q, k, v in float64."""
    leaves = [x.detach().requires_grad_() for x in tensors]  # detach keeps strides
    out = attention(*leaves)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, leaves, dout))]


def draw(dtype, B, T, S, H, D, fused=False, flat=False):
    """q, k, v (slices of one projection if `fused`) and the output's gradient.

    [B*T, S, H, D] or, if `flat`, [B*T, S, H*D].
    """
    g = torch.Generator().manual_seed(B + 10 * T + 100 * S + D)
    x = torch.randn(B * T, S, 4, H, D, generator=g).to(dtype)
    parts = x.unbind(2) if fused else [part.contiguous() for part in x.unbind(2)]
    return [part.flatten(2) for part in parts] if flat else parts


def expected(q, k, v, dout, T, D, scale):
    """The oracle's results in the tensors' own shape."""
    *wide, gradient = (x.double().reshape(*x.shape[:2], -1, D) for x in (q, k, v, dout))
    found = results(lambda *x: oracle(*x, T, scale), wide, gradient)
    return [x.reshape(q.shape) for x in found]


@pytest.mark.parametrize(
    "dtype, B, T, S, H, D, fused, flat",
    [
        (torch.float32, 1, 1, 1, 1, 32, False, False),  # one token
        # 18 pixels: the last block of 8 is not full and one spans both videos
        (torch.float32, 2, 2, 9, 2, 64, True, True),
        (torch.float32, 1, 21, 3, 3, 80, True, False),  # an odd width, padded to 128
        (torch.float32, 1, 33, 2, 1, 64, False, True),  # one frame more than half a tile
        (torch.float32, 1, 64, 1, 1, 128, False, False),  # the longest and widest
        (torch.float16, 1, 1, 65, 1, 32, True, False),  # 64 pixels per block, one more
        (torch.float16, 1, 2, 31, 1, 128, False, True),  # 32 pixels per block, one less
        # Stable Virtual Camera's, 3 pixels per block: 4 pixels of two videos
        (torch.float16, 2, 21, 2, 2, 64, True, True),
        (torch.float16, 1, 64, 2, 1, 80, True, False),
        *[(torch.bfloat16, 2, 21, 2, 2, 64, True, True)] * GPU,
    ],
)
def test_against_oracle(dtype, B, T, S, H, D, fused, flat):
    q, k, v, dout = draw(dtype, B, T, S, H, D, fused, flat)
    got = results(lambda *x: temporal_attention(*x, T, head_width=D), (q, k, v), dout)
    plain = results(lambda *x: temporal_attention_reference(*x, T, head_width=D), (q, k, v), dout)
    want = expected(q, k, v, dout, T, D, D**-0.5)
    check(NAMES, got, want, tolerance(plain, want))


def test_scale_and_a_wrong_sign_is_noticed():
    q, k, v, dout = draw(torch.float32, 1, 5, 4, 1, 32)
    got = results(lambda *x: temporal_attention(*x, 5, scale=0.3), (q, k, v), dout)
    plain = results(lambda *x: temporal_attention_reference(*x, 5, scale=0.3), (q, k, v), dout)
    want = expected(q, k, v, dout, 5, 32, 0.3)
    allowed = tolerance(plain, want)
    check(NAMES, got, want, allowed)
    for wrong in (expected(q, k, v, dout, 5, 32, -0.3), expected(q, k, v, dout, 5, 32, 32**-0.5)):
        with pytest.raises(AssertionError, match="out is off"):
            check(NAMES, got, wrong, allowed)
    for i, name in enumerate(NAMES):
        with pytest.raises(AssertionError, match=f"{name} is off"):
            check(NAMES, [-x if i == j else x for j, x in enumerate(got)], want, allowed)


def test_pixels_do_not_meet():
    """Pixel 1, in the same tile, changes not a single bit at pixels 0 and 2, in either pass."""
    q, k, v, dout = draw(torch.float16, 1, 21, 3, 1, 32)
    changed = [x.clone() for x in (q, k, v, dout)]
    for x in changed:
        x[:, 1] = 100 * x[:, 1].flip(0)
    before = results(lambda *y: temporal_attention(*y, 21), (q, k, v), dout)
    after = results(lambda *y: temporal_attention(*y, 21), changed[:3], changed[3])
    for b, a in zip(before, after, strict=True):
        assert b[:, [0, 2]].equal(a[:, [0, 2]]) and not b[:, 1].equal(a[:, 1])


@pytest.mark.skipif(GPU, reason="moving such a tensor to the GPU makes it dense")
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["frames", "pixels", "heads"])
def test_offsets_beyond_32_bits(axis, tmp_path):
    near = draw(torch.float16, 1, 3, 3, 3, 32)
    far = [far_apart(x, axis, tmp_path) for x in near]
    found = [results(lambda *x: temporal_attention(*x, 3), x[:3], x[3]) for x in (near, far)]
    for a, b in zip(*found, strict=True):
        assert a.equal(b)


def test_a_program_writes_its_own_pixels_only():
    """Alone, the first program fills the first 64 // 21 = 3 of 4 pixels.

    In a full run the next program would hide its stray rows.
    """
    device = "cuda" if GPU else "cpu"
    q, k, v, dout = (x.to(device) for x in draw(torch.float16, 1, 21, 4, 1, 32))
    out, dq, dk, dv = (torch.full_like(q, float("nan")) for _ in range(4))
    strides, sizes = q.stride()[:3], (4, 1, 4, 0.2)  # S, H, pixels, scale
    constants, options = temporal._settings(21, 32, torch.float16)
    options |= constants
    temporal.temporal_forward[(1,)](q, k, v, out, *strides * 3, *sizes, **options)
    temporal.temporal_backward[(1,)](q, k, v, dout, dq, dk, dv, *strides * 4, *sizes, **options)
    for x in (out, dq, dk, dv):
        assert x[:, :3].isfinite().all() and x[:, 3].isnan().all()


def test_the_kernel_ran_and_its_output_is_contiguous(monkeypatch):
    monkeypatch.setattr(temporal, "temporal_attention_reference", None)
    device = "cuda" if GPU else "cpu"
    x, y, z, _ = (x.to(device) for x in draw(torch.float32, 1, 3, 2, 2, 32, fused=True))
    out = temporal.temporal_attention(x.requires_grad_(), y, z, 3)
    assert out.is_contiguous() and out.shape == x.shape
    out.sum().backward()  # this gradient has stride 0 everywhere
    assert x.grad.isfinite().all()


@pytest.mark.skipif(GPU, reason="these are tensors of the CPU: there the reference takes them")
def test_what_it_refuses():
    x = torch.zeros(6, 2, 128)
    for message, arguments, options in [
        ("one shape", (x, x, x[:3], 3), {}),
        ("one shape", (x[0], x[0], x[0], 3), {}),
        ("head_width", (x, x, x, 3), {"head_width": 48}),
        ("heads must be", (x, x, x, 3), {"head_width": 256}),
        ("num_frames", (x, x, x, 4), {}),
        ("num_frames", (x, x, x, 0), {}),
        ("num_frames", (x.repeat(20, 1, 1),) * 3 + (65,), {}),
        ("float32", (x.double(),) * 3 + (3,), {}),
        ("float32", (x, x, x.half(), 3), {}),
        ("CPU or a CUDA", (x.to("meta"),) * 3 + (3,), {}),
        ("16 bytes", (x.mT.contiguous().mT,) * 3 + (3,), {}),
        ("16 bytes", (torch.zeros(6, 2, 130)[..., 1:129],) * 3 + (3,), {}),
        ("float16 or float32", (x.bfloat16(),) * 3 + (3,), {}),
    ]:
        with pytest.raises(ValueError, match=message):
            temporal.temporal_attention(*arguments, **options)
