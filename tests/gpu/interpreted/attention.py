"""The attention kernels under Triton's interpreter, or on a GPU, against a float64 oracle.

The oracle follows the definition token by token. Run by tests/test_kernels.py. A kernel may be at
most 4 times as far from the oracle as plain torch in the same precision.
"""

import importlib
import itertools

import pytest
import torch
import triton
from conftest import GPU, check, far_apart, tolerance, where_kernels_run

from kernels import attention as attention_here
from kernels.attention import attention_reference

kernels = importlib.import_module("kernels.attention")

assert GPU or triton.knobs.runtime.interpret, "run me with TRITON_INTERPRET=1"
attention = where_kernels_run(attention_here)


def oracle(q, k, v, causal, scale, windows=None, prefix=None, cameras=None):
    """One query after the other; q [B, H, S, D], float64.

    windows: list of lengths; cameras: [B, V, 4, 4].
    """
    (B, H, S, D), (Hk, Sk) = q.shape, k.shape[1:3]
    window = [n for n, length in enumerate(windows or [Sk]) for _ in range(length)]

    def by(matrix, x):
        return torch.cat([matrix @ x[c : c + 4] for c in range(0, D, 4)])

    def P(b, t):
        return cameras[b, t // (S // cameras.shape[1])].double()

    out = []
    for b, h, i in itertools.product(range(B), range(H), range(S)):
        query, at = q[b, h, i], i + Sk - S
        query = query if cameras is None else by(P(b, i).T, query)
        keys, values = [], []
        for j in range(Sk):
            seen = window[j] == window[at] and (not causal or j <= at)
            if prefix is not None:
                theirs, mine = prefix[b, j], prefix[b, at]
                seen = seen and (theirs == 0 or (theirs > 0 and theirs == mine))
            if seen:
                key, value = k[b, h // (H // Hk), j], v[b, h // (H // Hk), j]
                if cameras is not None:
                    inverse = torch.linalg.inv(P(b, j))
                    key, value = by(inverse, key), by(inverse, value)
                keys.append(key)
                values.append(value)
        if keys:
            o = ((torch.stack(keys) @ query) * scale).softmax(0) @ torch.stack(values)
            out.append(o if cameras is None else by(P(b, i), o))
        else:
            out.append(0 * query)
    return torch.stack(out).view(B, H, S, D)


def compare(
    B=1,
    H=2,
    Hk=1,
    S=5,
    Sk=None,
    D=32,
    causal=True,
    dtype=torch.float32,
    windows=None,
    prefix=None,
    views=0,
    wrong=1.0,
):
    """Output and the three gradients; `wrong` scales the kernel's scores, so that -1 must fail."""
    g = torch.Generator().manual_seed(S * 1000 + D)
    Sk = S if Sk is None else Sk
    shapes = ((B, H, S, D), (B, Hk, Sk, D), (B, Hk, Sk, D), (B, H, S, D))
    q, k, v, do = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    options = {"prefix": prefix}
    if views:
        options["cameras"] = torch.eye(4) + 0.3 * torch.randn(B, views, 4, 4, generator=g)
    cu = None
    if windows is not None:
        cu = torch.tensor([0, *itertools.accumulate(windows)], dtype=torch.int32)

    def run(function, dtype, **more):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        o = function(*leaves, **more)
        return [x.double() for x in (o.detach(), *torch.autograd.grad(o, leaves, do.to(dtype)))]

    exact = run(oracle, torch.float64, causal=causal, scale=0.3, windows=windows, **options)
    plain = run(attention_reference, dtype, causal=causal, scale=0.3, cu_seqlens=cu, **options)
    fused = run(attention, dtype, causal=causal, scale=0.3 * wrong, cu_seqlens=cu, **options)
    check(("o", "dq", "dk", "dv"), fused, exact, tolerance(plain, exact))


@pytest.mark.parametrize("S", [1, 31, 32, 33, 65])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_around_a_block(S, causal):
    compare(S=S, causal=causal)


@pytest.mark.parametrize("D", [40, 64, 72, 80, 128])
def test_head_widths(D):
    compare(S=35, H=1, D=D)


@pytest.mark.parametrize("group", [1, 2, 3, 7])
def test_grouped_heads(group):
    compare(H=2 * group, Hk=2, S=6)


@pytest.mark.parametrize("S, Sk", [(1, 1), (1, 40), (3, 37), (33, 70)])
def test_fewer_queries_than_keys_stand_at_the_end(S, Sk):
    compare(S=S, Sk=Sk)


@pytest.mark.parametrize("windows", [[4, 4, 4], [1, 33, 7], [0, 5, 0, 32, 0], [40]])
@pytest.mark.parametrize("causal", [True, False])
def test_windows(windows, causal):
    compare(S=sum(windows), windows=windows, causal=causal)


def segments(*runs):
    """segments((0, 3), (1, 2)) = [0, 0, 0, 1, 1]: (segment, how many tokens)."""
    return [s for s, n in runs for _ in range(n)]


@pytest.mark.parametrize(
    "rows",
    [
        [segments((0, 3), (1, 2), (2, 4))],  # a prefix and two questions
        [segments((1, 5), (2, 6))],  # no prefix
        [segments((0, 11))],  # nothing but prefix
        [segments((-1, 4), (0, 7)), segments((0, 11))],  # left padding
        [segments((0, 4), (1, 5), (-1, 2)), segments((0, 2), (1, 3), (2, 6))],  # right padding
        [segments((0, 33), (1, 40), (2, 3), (3, 34))],  # blocks that no row of a block sees
    ],
)
def test_prefix(rows):
    compare(B=len(rows), S=len(rows[0]), prefix=torch.tensor(rows))


def test_prefix_with_a_cache_and_left_padding():
    compare(B=2, S=1, Sk=40, prefix=torch.tensor([segments((-1, 9), (0, 31)), segments((0, 40))]))


def test_prefix_in_every_window():
    windows = [9, 0, 36]
    prefix = torch.tensor([segments((0, 3), (1, 2), (2, 4)) + segments((0, 30), (1, 2), (2, 4))])
    compare(S=45, windows=windows, prefix=prefix)


def compare_decoded(Sk, H=4, Hk=2, D=32, dtype=torch.float32, rows=None, wrong=1.0):
    """One query per row, without gradient: heads in one tile, keys in parts."""
    g, B = torch.Generator().manual_seed(Sk * 1000 + D), len(rows or [0])
    shapes = ((B, H, 1, D), (B, Hk, Sk, D), (B, Hk, Sk, D))
    q, k, v = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    prefix = None if rows is None else torch.tensor(rows)
    options = {"causal": True, "prefix": prefix}
    exact = oracle(q.double(), k.double(), v.double(), scale=0.3, **options)
    plain = attention_reference(q, k, v, scale=0.3, **options).double()
    found = attention(q, k, v, scale=0.3 * wrong, **options).double()
    check(("o",), [found], [exact], tolerance([plain], [exact]))


@pytest.mark.parametrize("Sk", [2, 31, 64, 257, 600])
def test_decoding(Sk):
    """Up to three parts, the last not full."""
    compare_decoded(Sk)


@pytest.mark.parametrize("H, Hk, D", [(1, 1, 128), (7, 1, 80), (28, 4, 40), (40, 2, 64)])
def test_decoding_with_grouped_heads(H, Hk, D):
    """Up to 20 heads of a group: more than a tile."""
    compare_decoded(300, H, Hk, D)
    compare_decoded(70, H, Hk, D, dtype=torch.float16)


@pytest.mark.parametrize(
    "rows",
    [
        [segments((-1, 290), (0, 310)), segments((0, 600))],  # left padding: a part of nothing
        [segments((0, 300), (1, 200), (2, 100)), segments((0, 1), (1, 598), (2, 1))],
        [segments((0, 500), (-1, 100)), segments((-1, 600))],  # a blind query
    ],
)
def test_decoding_with_segments(rows):
    compare_decoded(600, rows=rows)


def test_decoding_reads_a_cache_in_place_in_parts(monkeypatch):
    """Keys and values with room behind them; a model's heads lie behind its tokens."""
    parts, launch = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *x: (parts.append(x[-1]), launch(*x)))
    k, v = torch.randn(2, 1, 2, 1100, 32)[:, :, :, :1000]
    q = torch.randn(1, 1, 4, 32).transpose(1, 2)
    got = attention(q, k, v, causal=True, scale=None)
    want = attention_reference(q, k, v, causal=True, scale=32**-0.5)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    assert parts == [4]


def test_a_flipped_sign_fails_in_decoding():
    with pytest.raises(AssertionError, match="is off by"):
        compare_decoded(600, wrong=-1.0)


@pytest.mark.parametrize("D", [32, 80])
@pytest.mark.parametrize("views", [1, 3])
def test_cameras(D, views):
    compare(B=2, H=1, S=12, D=D, views=views, causal=False)


def test_all_at_once():
    prefix = torch.tensor([segments((0, 20), (1, 5), (2, 5)) + segments((0, 2), (1, 4))])
    compare(S=36, views=4, windows=[30, 6], prefix=prefix)


# The interpreter multiplies the bits of bfloat16 as integers.
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * GPU)
def test_half_precision(dtype):
    compare(B=2, S=40, D=64, dtype=dtype)
    compare(S=70, D=80, dtype=dtype, windows=[40, 30], causal=False)
    prefix = torch.tensor([segments((0, 12), (1, 20), (2, 8))])
    compare(H=7, S=40, D=128, dtype=dtype, prefix=prefix)
    compare(S=18, D=64, dtype=dtype, views=2)


def test_strided_inputs_are_read_in_place():
    qkv = torch.randn(2, 20, 3, 4, 32)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    got = attention(q, k, v, causal=True, scale=None)
    want = attention_reference(q, k, v, causal=True, scale=32**-0.5)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.skipif(GPU, reason="moving such a tensor to the GPU makes it dense")
@pytest.mark.parametrize(
    "axis, windows", [(1, None), (2, None), (2, [1, 1, 1])], ids=["heads", "tokens", "windows"]
)
def test_offsets_beyond_32_bits(axis, windows, tmp_path):
    """64 pairs of megapixel pictures: 2.6e9 numbers of q, k and v of the vision tower."""
    near = torch.randn(4, 1, 3, 3, 32).half()
    cu = windows and torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    found = []
    for q, k, v, do in (near, [far_apart(x, axis, tmp_path) for x in near]):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = attention(*leaves, causal=True, scale=None, cu_seqlens=cu)
        found.append([o.detach(), *torch.autograd.grad(o, leaves, do)])
    for a, b in zip(*found, strict=True):
        assert a.equal(b)


def test_the_forward_pass_is_deterministic():
    q, k, v = torch.randn(3, 1, 2, 70, 32)
    first, second = (attention(q, k, v, causal=True, scale=None) for _ in range(2))
    assert torch.equal(first, second)


def test_a_flipped_sign_fails():
    with pytest.raises(AssertionError, match="is off by"):
        compare(S=33, wrong=-1.0)
    with pytest.raises(AssertionError, match="is off by"):
        compare(S=33, views=3, wrong=-1.0)
