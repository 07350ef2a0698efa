"""Attention that uses what it knows: windows, shared prefixes, rotary encodings and cameras, in one pass over keys and values.

    o_i = sum_j p_ij v_j,    p_ij = exp(scale q_i.k_j - lse_i) where j is visible to i, else 0,    lse_i = log sum_j exp(scale q_i.k_j)

Who sees whom (the options combine):
    causal      key j is visible to query i when j <= i; with fewer queries than keys (a cache) the last query stands at the last key.
    cu_seqlens  rows c[n] .. c[n+1] are sequence n and see only each other: many short windows in one launch.
    prefix      one number a key: 0 = shared prefix, k >= 1 = question k, -1 = padding. Causal, and in the prefix or in i's own question.
What is encoded (in registers, so that no encoded copy of q, k or v is ever written):
    rope        q and k are rotated by their token's angles: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) on the two halves of a head.
    cameras     PRoPE (Li et al. 2025). With P = lift(K) w2c of the token's view, every 4-vector x of a head becomes
                q -> P^T q,  k -> P^-1 k,  v -> P^-1 v,  o -> P o:  the score q^T P_i P_j^-1 k depends on relative cameras only.
                With rope too, rope comes first.

Layout. q and o are [B, H, S, D], k and v [B, Hk, Sk, D] with H a multiple of Hk (query head h reads key head h // (H / Hk)); any strides
but the last. A program owns BM queries of one head and walks over blocks of BN keys, keeping the running maximum m, the sum l and the
unnormalised output: when m grows to m', what was summed so far shrinks by exp(m - m') (online softmax, Milakov & Gimelshein 2018). The
S x S scores live in registers only. Blocks that no row of the program sees are never visited, so the work grows with the visible pairs.
A head's columns are laid out as two halves of a power of two each (80 = 40 + 40 -> 64 + 64, masked), so that rope pairs columns by shape.

Bytes moved: q, k, v read once and o written once (k and v come from L2 for all but the first program of a head) + 4 B S H for lse.

Backward (FlashAttention-2, Dao 2023). With do the gradient of o and delta_i = do_i.o_i:
    dv_j = sum_i p_ij do_i      dp_ij = do_i.v_j      ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale sum_j ds_ij k_j                      dk_j = scale sum_i ds_ij q_i
p is recomputed from lse. One kernel owns a block of keys (dk, dv), another a block of queries (dq): no atomics, the same bits every run.
An encoding y = A x passes its gradient on as A^T dy: rotations by the opposite angle, cameras by the transposed matrix.
"""
from __future__ import annotations  # annotations are not evaluated: without triton, tl.constexpr need not exist

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # macOS, Windows: the reference still runs on the CPU
    triton, jit = None, lambda kernel: kernel

# Shapes: B rows, H query heads, Hk key heads, S queries, Sk keys, D head width, N sequences (B, or the windows of cu_seqlens), V views.


# The reference -------------------------------------------------------------------------------------------------------------------------

def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary encoding of [B, H, S, D] by cos, sin [B, S, D / 2 or D] (of which the first half is read)."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :, :half].to(x.dtype), sin[:, None, :, :half].to(x.dtype)
    x1, x2 = x.split(half, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def transform(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Multiply every 4-vector of [B, H, S, D] by its token's matrix; matrices [B, V, 4, 4], tokens in V equal runs."""
    B, H, S, D = x.shape
    x = x.reshape(B, H, matrices.shape[1], -1, D // 4, 4)
    return torch.einsum("bvac,bhvsgc->bhvsga", matrices.to(x.dtype), x).reshape(B, H, S, D)


def mrope(positions: torch.Tensor, section: list[int], theta: float, interleaved: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin [B, S, D / 2] from Qwen-VL's three position streams (time, row, column) [3, B, S].

    `section` says how many of the D / 2 frequencies theta^(-2 i / D) follow each stream: in three runs (Qwen2.5-VL), or taking turns
    until the rows and columns have their share (Qwen3-VL, interleaved).
    """
    half = sum(section)
    stream = torch.repeat_interleave(torch.arange(3), torch.tensor(section))
    if interleaved:
        i = torch.arange(half)
        stream = sum(axis * ((i % 3 == axis) & (i < 3 * section[axis])) for axis in (1, 2))
    frequency = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = positions.float().movedim(0, -1)[..., stream.to(positions.device)] * frequency.to(positions.device)
    return angle.cos(), angle.sin()


def attention_reference(q, k, v, *, causal, scale, cu_seqlens=None, prefix=None, rope=None, cameras=None):
    """The same in plain torch, any dtype; see `attention`."""
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    if cameras is not None:
        inverse = torch.linalg.inv(cameras)
        q, k, v = transform(q, cameras.mT), transform(k, inverse), transform(v, inverse)
    if cu_seqlens is None:
        o = visible_attention(q, k, v, causal, scale, None, prefix)
    else:
        o = windows_attention(q, k, v, causal, scale, (cu_seqlens[1:] - cu_seqlens[:-1]).tolist(), prefix)
    return o if cameras is None else transform(o, cameras)


def windows_attention(q, k, v, causal, scale, lengths, prefix):
    """Windows of like length (32 to 63, 64 to 127, ...) become the rows of one call, padded to the longest of them."""
    streams = [x[0].transpose(0, 1) for x in (q, k, v)] + ([] if prefix is None else [prefix[0]])      # [S, ...]

    def attend(rows, own):  # N x longest x ...
        plain = prefix is None or rows[3].max() <= 1 and prefix.min() >= 0  # a prefix and one question behind it are causal, no more
        segments = None if plain else rows[3]
        o = visible_attention(*(x.transpose(1, 2) for x in rows[:3]), causal, scale, own, segments)
        return o.transpose(1, 2)                                                                       # [N, longest, H, D]

    if len(set(lengths)) == 1:  # equal windows lie side by side as they are
        return attend([x.unflatten(0, (len(lengths), -1)) for x in streams], None).flatten(0, 1).transpose(0, 1)[None]
    streams = [x.split(lengths) for x in streams]
    outputs = list(streams[0])  # an empty window stays empty
    for size in {length.bit_length() for length in lengths if length}:
        windows = [n for n, length in enumerate(lengths) if length.bit_length() == size]
        sizes = [lengths[n] for n in windows]
        own = torch.arange(max(sizes), device=q.device) < torch.tensor(sizes, device=q.device)[:, None]
        places = own.flatten().nonzero()[:, 0]  # one copy: pad_sequence's copy a window costs as much again in the backward pass
        rows = [x[0].new_full((own.numel(), *x[0].shape[1:]), -1 if i == 3 else 0).index_copy(0, places, torch.cat([x[n] for n in windows]))
                .unflatten(0, own.shape) for i, x in enumerate(streams)]  # segment -1: padding
        mask = None if own.all() or causal else own  # causal: padding stands on the right, where no one looks
        for n, o in zip(windows, attend(rows, mask)[own].split(sizes)):
            outputs[n] = o
    return torch.cat(outputs).transpose(0, 1)[None]


def visible_attention(q, k, v, causal, scale, own, segments):
    """scaled_dot_product_attention under the mask of visible pairs; `own` [N, Sk] marks keys that exist. A query that sees none gives 0."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    S, Sk = q.shape[2], k.shape[2]
    if causal and S == Sk and own is None and segments is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    visible = None
    if causal and Sk > 1:
        visible = torch.ones(S, Sk, dtype=torch.bool, device=q.device).tril(Sk - S)[None]
    if own is not None:
        visible = own[:, None] if visible is None else visible & own[:, None]
    if segments is not None:
        mine = (segments[:, None] == 0) | ((segments[:, None] == segments[:, Sk - S:, None]) & (segments[:, None] > 0))   # [N, S, Sk]
        visible = mine if visible is None else visible & mine
    if visible is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    blind = ~visible.any(-1, keepdim=True)  # softmax over nothing is undefined: let it see all, and drop the result
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=(visible | blind)[:, None], scale=scale)
    return o.masked_fill(blind[:, None], 0) if segments is not None or own is not None else o


# The kernels ---------------------------------------------------------------------------------------------------------------------------
# In a kernel: `rows` are queries and `cols` keys of one sequence, counted from its first; a token is counted over the whole batch.

@jit
def load_rows(X, stride, rows, count, D: tl.constexpr, BD: tl.constexpr):
    """Rows of a head as [R, BD]: column c of half c // (BD / 2); what lies outside the head or behind the last row is 0."""
    within = tl.arange(0, BD) % (BD // 2)
    c = tl.arange(0, BD) // (BD // 2) * (D // 2) + within
    return tl.load(X + rows[:, None] * stride + c[None, :], mask=(rows < count)[:, None] & (within < D // 2)[None, :], other=0.0)


@jit
def store_rows(X, stride, rows, count, x, D: tl.constexpr, BD: tl.constexpr):
    within = tl.arange(0, BD) % (BD // 2)
    c = tl.arange(0, BD) // (BD // 2) * (D // 2) + within
    tl.store(X + rows[:, None] * stride + c[None, :], x.to(X.dtype.element_ty), mask=(rows < count)[:, None] & (within < D // 2)[None, :])


@jit
def turn(x, COS, SIN, tokens, BACK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Rotate [R, BD] by its tokens' angles, BACK: by the opposite angles."""
    half = tl.arange(0, BD // 2)
    at = tokens[:, None] * (D // 2) + half[None, :]
    cos = tl.load(COS + at, mask=(half < D // 2)[None, :], other=0.0)
    sin = tl.load(SIN + at, mask=(half < D // 2)[None, :], other=0.0)
    if BACK:
        sin = -sin
    x1, x2 = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, BD // 2]), (0, 2, 1)))
    y = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)                                    # [R, BD / 2, 2]
    return tl.reshape(tl.permute(y, (0, 2, 1)), [x.shape[0], BD])


@jit
def matrix_row(M, views, a: tl.constexpr, TRANSPOSED: tl.constexpr, x0, x1, x2, x3):
    """Component a of M x for every 4-vector: [R, BD / 4]."""
    at = M + views * 16 + (a if TRANSPOSED else 4 * a)
    step: tl.constexpr = 4 if TRANSPOSED else 1
    return (tl.load(at)[:, None] * x0 + tl.load(at + step)[:, None] * x1
            + tl.load(at + 2 * step)[:, None] * x2 + tl.load(at + 3 * step)[:, None] * x3)


@jit
def mix(x, M, views, TRANSPOSED: tl.constexpr):
    """Multiply every 4-vector of [R, BD] by its view's matrix, or by the matrix transposed."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2]))                 # components 0 2 and 1 3
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    even = tl.join(matrix_row(M, views, 0, TRANSPOSED, x0, x1, x2, x3), matrix_row(M, views, 2, TRANSPOSED, x0, x1, x2, x3))
    odd = tl.join(matrix_row(M, views, 1, TRANSPOSED, x0, x1, x2, x3), matrix_row(M, views, 3, TRANSPOSED, x0, x1, x2, x3))
    return tl.reshape(tl.join(even, odd), [x.shape[0], x.shape[1]])


@jit
def encode(x, COS, SIN, M, tokens, per_view, ROPE: tl.constexpr, CAMERAS: tl.constexpr, TRANSPOSED: tl.constexpr,
           D: tl.constexpr, BD: tl.constexpr):
    """Rope, then cameras, on a loaded tile; in its own dtype again, as the matrix units want it."""
    y = x.to(tl.float32)
    if ROPE:
        y = turn(y, COS, SIN, tokens, False, D, BD)
    if CAMERAS:
        y = mix(y, M, tokens // per_view, TRANSPOSED)
    return y.to(x.dtype)


@jit
def decode(y, COS, SIN, M, tokens, per_view, ROPE: tl.constexpr, CAMERAS: tl.constexpr, TRANSPOSED: tl.constexpr,
           D: tl.constexpr, BD: tl.constexpr):
    """The transpose of `encode` on a gradient: cameras, then rope the other way. TRANSPOSED as it was in `encode`."""
    if CAMERAS:
        y = mix(y, M, tokens // per_view, not TRANSPOSED)
    if ROPE:
        y = turn(y, COS, SIN, tokens, True, D, BD)
    return y


@jit
def sequence(CU, n, S, Sk, WINDOWS: tl.constexpr):
    """(row of the batch, first token in that row, queries, keys) of sequence n."""
    if WINDOWS:
        start = tl.load(CU + n)
        count = tl.load(CU + n + 1) - start
        return n * 0, start, count, count
    else:
        return n, n * 0, S, Sk


@jit
def key_blocks(block, count, keys, n, b, start, PREFIX_ENDS, FIRST, Sk, CAUSAL: tl.constexpr, PREFIX: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr):
    """Key blocks that a block of queries may see: a0 .. a1 (all of them, or the prefix), then b0 .. b1 (its own questions)."""
    shift = keys - count
    end = tl.minimum(keys, (block + 1) * BM + shift) if CAUSAL else keys
    a0, a1 = end * 0, tl.cdiv(end, BN)
    b0, b1 = a1, a1
    if PREFIX:
        rows = block * BM + tl.arange(0, BM)
        first = tl.min(tl.load(FIRST + b * Sk + start + shift + rows, mask=rows < count, other=keys))
        a0 = tl.minimum(tl.load(PREFIX_ENDS + 2 * n), first) // BN
        a1 = tl.maximum(a0, tl.cdiv(tl.minimum(tl.load(PREFIX_ENDS + 2 * n + 1), end), BN))
        b0 = tl.maximum(first // BN, a1)
        b1 = tl.maximum(tl.cdiv(end, BN), b0)
    return a0, a1, b0, b1


@jit
def query_tile(Q, SEGMENT, COS, SIN, P, stride, rows, count, first, first_key, per_view, PREFIX: tl.constexpr, ROPE: tl.constexpr,
               CAMERAS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """A block of encoded queries, their tokens and their segments; `first` is the sequence's first query, `first_key` that query's key."""
    tokens = first + tl.minimum(rows, count - 1)
    q = encode(load_rows(Q, stride, rows, count, D, BD), COS, SIN, P, tokens, per_view, ROPE, CAMERAS, True, D, BD)
    mine = rows
    if PREFIX:
        mine = tl.load(SEGMENT + first_key + rows, mask=rows < count, other=-1)
    return q, tokens, mine


@jit
def gradient_tile(DO, LSE, DELTA, P, rows, tokens, count, line, per_view, CAMERAS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """do of a block of queries with their lse and delta. o = P o', so do' = P^T do."""
    do = load_rows(DO + line * D, D, rows, count, D, BD)
    if CAMERAS:
        do = mix(do.to(tl.float32), P, tokens // per_view, True).to(do.dtype)
    return do, tl.load(LSE + line + rows, mask=rows < count, other=0.0), tl.load(DELTA + line + rows, mask=rows < count, other=0.0)


@jit
def key_tile(K, V, SEGMENT, COS, SIN, INVERSE, k_stride, v_stride, cols, keys, first, per_view, PREFIX: tl.constexpr, ROPE: tl.constexpr,
             CAMERAS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """A block of encoded keys and values, their tokens and their segments; `first` is the token of the sequence's first key."""
    tokens = first + tl.minimum(cols, keys - 1)
    k = encode(load_rows(K, k_stride, cols, keys, D, BD), COS, SIN, INVERSE, tokens, per_view, ROPE, CAMERAS, False, D, BD)
    v = encode(load_rows(V, v_stride, cols, keys, D, BD), COS, SIN, INVERSE, tokens, per_view, False, CAMERAS, False, D, BD)
    theirs = cols
    if PREFIX:
        theirs = tl.load(SEGMENT + first + cols, mask=cols < keys, other=-1)
    return k, v, tokens, theirs


@jit
def scores(q, k, rows, cols, count, keys, mine, theirs, scale, CAUSAL: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr):
    """scale q.k, in units of log 2 for exp2; -inf where the pair is not visible: [BM, BN] float32."""
    visible = (rows < count)[:, None] & (cols < keys)[None, :]
    if CAUSAL:
        visible &= cols[None, :] <= rows[:, None] + keys - count
    if PREFIX:
        visible &= (theirs[None, :] == 0) | ((theirs[None, :] == mine[:, None]) & (mine[:, None] > 0))
    return tl.where(visible, tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634), float("-inf"))


@jit
def forward_kernel(Q, K, V, O, LSE, CU, SEGMENT, FIRST, PREFIX_ENDS, COS, SIN, P, INVERSE, scale, S, Sk, per_view, blocks, H, group,
                   qb, qh, qs, kb, kh, ks, vb, vh, vs, CAUSAL: tl.constexpr, WINDOWS: tl.constexpr, PREFIX: tl.constexpr,
                   ROPE: tl.constexpr, CAMERAS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   PRECISION: tl.constexpr):
    """One program: BM queries of one head of one sequence. O and LSE are contiguous."""
    block, h, n = tl.program_id(0) % blocks, tl.program_id(0) // blocks % H, tl.program_id(0) // blocks // H
    b, start, count, keys = sequence(CU, n, S, Sk, WINDOWS)
    if block * BM >= count:
        return
    query, first, b = b * S + start, b * Sk + start, b.to(tl.int64)                          # tokens fit into 32 bits, addresses may not
    rows = block * BM + tl.arange(0, BM)
    q, tokens, mine = query_tile(Q + b * qb + h * qh + start * qs, SEGMENT, COS, SIN, P, qs, rows, count, query,
                                 first + keys - count, per_view, PREFIX, ROPE, CAMERAS, D, BD)
    K += b * kb + h // group * kh + start * ks
    V += b * vb + h // group * vh + start * vs

    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, BD], tl.float32)
    a0, a1, b0, b1 = key_blocks(block, count, keys, n, b, start, PREFIX_ENDS, FIRST, Sk, CAUSAL, PREFIX, BM, BN)
    for t in range(0, a1 - a0 + b1 - b0):
        cols = tl.where(t < a1 - a0, a0 + t, b0 + t - (a1 - a0)) * BN + tl.arange(0, BN)
        k, v, _, theirs = key_tile(K, V, SEGMENT, COS, SIN, INVERSE, ks, vs, cols, keys, first, per_view, PREFIX, ROPE, CAMERAS, D, BD)
        s = scores(q, k, rows, cols, count, keys, mine, theirs, scale, CAUSAL, PREFIX, PRECISION)
        larger = tl.maximum(m, tl.max(s, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)                                # nothing seen: exp2(-inf - 0) is 0, not nan
        p, shrink = tl.exp2(s - base[:, None]), tl.exp2(m - base)
        l = l * shrink + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
        m = larger
    blind = l == 0.0                                                                         # a query that sees nothing gives 0
    o = o / tl.where(blind, 1.0, l)[:, None]
    if CAMERAS:
        o = mix(o, P, tokens // per_view, False)
    line = (b * H + h) * S + start
    store_rows(O + line * D, D, rows, count, o, D, BD)
    tl.store(LSE + line + rows, tl.where(blind, 0.0, m + tl.log2(tl.where(blind, 1.0, l))), mask=rows < count)


@jit
def dq_kernel(Q, K, V, DO, DQ, LSE, DELTA, CU, SEGMENT, FIRST, PREFIX_ENDS, COS, SIN, P, INVERSE, scale, S, Sk, per_view, blocks, H, group,
              qb, qh, qs, kb, kh, ks, vb, vh, vs, CAUSAL: tl.constexpr, WINDOWS: tl.constexpr, PREFIX: tl.constexpr, ROPE: tl.constexpr,
              CAMERAS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """The forward walk again, with p recomputed from lse: dq = scale sum_j p (do.v - delta) k. DO and DQ are contiguous."""
    block, h, n = tl.program_id(0) % blocks, tl.program_id(0) // blocks % H, tl.program_id(0) // blocks // H
    b, start, count, keys = sequence(CU, n, S, Sk, WINDOWS)
    if block * BM >= count:
        return
    query, first, b = b * S + start, b * Sk + start, b.to(tl.int64)
    rows, line = block * BM + tl.arange(0, BM), (b * H + h) * S + start
    q, tokens, mine = query_tile(Q + b * qb + h * qh + start * qs, SEGMENT, COS, SIN, P, qs, rows, count, query,
                                 first + keys - count, per_view, PREFIX, ROPE, CAMERAS, D, BD)
    do, lse, delta = gradient_tile(DO, LSE, DELTA, P, rows, tokens, count, line, per_view, CAMERAS, D, BD)
    K += b * kb + h // group * kh + start * ks
    V += b * vb + h // group * vh + start * vs

    dq = tl.zeros([BM, BD], tl.float32)
    a0, a1, b0, b1 = key_blocks(block, count, keys, n, b, start, PREFIX_ENDS, FIRST, Sk, CAUSAL, PREFIX, BM, BN)
    for t in range(0, a1 - a0 + b1 - b0):
        cols = tl.where(t < a1 - a0, a0 + t, b0 + t - (a1 - a0)) * BN + tl.arange(0, BN)
        k, v, _, theirs = key_tile(K, V, SEGMENT, COS, SIN, INVERSE, ks, vs, cols, keys, first, per_view, PREFIX, ROPE, CAMERAS, D, BD)
        s = scores(q, k, rows, cols, count, keys, mine, theirs, scale, CAUSAL, PREFIX, PRECISION)
        p = tl.exp2(s - lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq = decode(dq * scale, COS, SIN, P, tokens, per_view, ROPE, CAMERAS, True, D, BD)
    store_rows(DQ + line * D, D, rows, count, dq, D, BD)


@jit
def dkdv_kernel(Q, K, V, DO, DK, DV, LSE, DELTA, CU, SEGMENT, LAST, COS, SIN, P, INVERSE, scale, S, Sk, per_view, blocks, H, group,
                qb, qh, qs, kb, kh, ks, vb, vh, vs, CAUSAL: tl.constexpr, WINDOWS: tl.constexpr, PREFIX: tl.constexpr, ROPE: tl.constexpr,
                CAMERAS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """One program: BN keys of one key head, over all queries that see them of all query heads that share it. DK and DV are contiguous."""
    Hk = H // group
    block, hk, n = tl.program_id(0) % blocks, tl.program_id(0) // blocks % Hk, tl.program_id(0) // blocks // Hk
    b, start, count, keys = sequence(CU, n, S, Sk, WINDOWS)
    if block * BN >= keys:
        return
    query, first, b = b * S + start, b * Sk + start, b.to(tl.int64)
    cols, shift = block * BN + tl.arange(0, BN), keys - count
    k, v, seen, theirs = key_tile(K + b * kb + hk * kh + start * ks, V + b * vb + hk * vh + start * vs, SEGMENT, COS, SIN, INVERSE, ks, vs,
                                  cols, keys, first, per_view, PREFIX, ROPE, CAMERAS, D, BD)

    i0, end = count * 0, count                                                               # queries that may see this block: i0 BM .. end
    if CAUSAL:
        i0 = tl.maximum(block * BN - shift, 0) // BM
    if PREFIX:
        end = tl.minimum(count, tl.max(tl.load(LAST + first + cols, mask=cols < keys, other=0)) - shift)
    visits = tl.maximum(tl.cdiv(end, BM) - i0, 0)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for t in range(0, visits * group):
        h = hk * group + t // visits
        rows = (i0 + t % visits) * BM + tl.arange(0, BM)
        q, tokens, mine = query_tile(Q + b * qb + h * qh + start * qs, SEGMENT, COS, SIN, P, qs, rows, count, query,
                                     first + shift, per_view, PREFIX, ROPE, CAMERAS, D, BD)
        do, lse, delta = gradient_tile(DO, LSE, DELTA, P, rows, tokens, count, (b * H + h) * S + start, per_view, CAMERAS, D, BD)
        s = scores(q, k, rows, cols, count, keys, mine, theirs, scale, CAUSAL, PREFIX, PRECISION)
        p = tl.exp2(s - lse[:, None])
        dv = tl.dot(tl.trans(p).to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dk = tl.dot(tl.trans(ds).to(q.dtype), q, dk, input_precision=PRECISION)
    dk = decode(dk * scale, COS, SIN, INVERSE, seen, per_view, ROPE, CAMERAS, False, D, BD)
    dv = decode(dv, COS, SIN, INVERSE, seen, per_view, False, CAMERAS, False, D, BD)
    line = (b * Hk + hk) * Sk + start
    store_rows(DK + line * D, D, cols, keys, dk, D, BD)
    store_rows(DV + line * D, D, cols, keys, dv, D, BD)


# Launching -----------------------------------------------------------------------------------------------------------------------------

def tiles(D: int, bits: int, flags: dict, backward: bool) -> dict:
    """Block sizes and launch options, for launches and `compile_cases`. Large blocks read keys less often, registers bound them: an encoded
    tile is float32 for a while. Questions that share a prefix are short, so blocks of 64 waste less on them."""
    BD, encoded = 2 * triton.next_power_of_2(D // 2), flags["ROPE"] or flags["CAMERAS"]
    if bits == 32:
        size = {"BM": 32 if BD <= 64 else 16, "BN": 32 if BD <= 64 else 16, "num_warps": 8, "num_stages": 1}
    elif backward:
        size = {"BM": 64, "BN": 64, "num_warps": 8 if BD > 64 or encoded else 4, "num_stages": 1}
    elif encoded:
        size = {"BM": 64, "BN": 32, "num_warps": 8 if BD > 64 else 4, "num_stages": 2}
    elif flags["PREFIX"]:
        size = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2}
    else:
        size = {"BM": 128, "BN": 64, "num_warps": 8 if BD > 64 else 4, "num_stages": 2}
    return {"D": D, "BD": BD, "PRECISION": "ieee", **size}


def prefix_ranges(prefix: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For blocks to be skipped. first, last int32 [B, Sk]: where a key's own segment begins and ends in its sequence (a prefix key is seen
    to the end, padding by none); ends int32 [N, 2]: where the prefix begins and ends. All on the device, without waiting for it."""
    B, Sk = prefix.shape
    token = torch.arange(B * Sk, device=prefix.device)
    if cu_seqlens is None:
        n, N, at = token // Sk, B, token % Sk
    else:
        N = len(cu_seqlens) - 1
        n = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True).clamp(max=N - 1)
        at = token - cu_seqlens[n]
    segment, far = prefix.flatten().long(), 2**30
    bucket = n * (Sk + 2) + torch.where(segment < 0, Sk + 1, segment)
    first = torch.full((N * (Sk + 2),), far, device=prefix.device).scatter_reduce(0, bucket, at, "amin")
    last = torch.zeros(N * (Sk + 2), dtype=torch.long, device=prefix.device).scatter_reduce(0, bucket, at + 1, "amax")
    ends = torch.stack([first.view(N, -1)[:, 0], last.view(N, -1)[:, 0]], 1)
    first = first[bucket].masked_fill(segment < 0, far)
    last = last[bucket].masked_fill(segment < 0, 0).masked_fill(segment == 0, far)
    return first.int(), last.int(), ends.int().contiguous()


class FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, scale, cu_seqlens, longest, prefix, cos, sin, cameras):
        B, H, S, D = q.shape
        Hk, Sk = k.shape[1:3]
        first, last, ends = (None, None, None) if prefix is None else prefix_ranges(prefix, cu_seqlens)
        inverse = None if cameras is None else torch.linalg.inv_ex(cameras).inverse.contiguous()  # inv would wait for the GPU
        o = torch.empty(B, H, S, D, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
        flags = {"CAUSAL": causal, "WINDOWS": cu_seqlens is not None, "PREFIX": prefix is not None, "ROPE": cos is not None,
                 "CAMERAS": cameras is not None}
        ctx.numbers = (scale, S, Sk, 0 if cameras is None else S // cameras.shape[1])
        ctx.flags = flags
        ctx.N, ctx.longest = (B, (S, Sk)) if cu_seqlens is None else (len(cu_seqlens) - 1, (longest, longest))
        tile = tiles(D, q.element_size() * 8, flags, False)
        blocks = triton.cdiv(ctx.longest[0], tile["BM"])
        if blocks * ctx.N:
            forward_kernel[(blocks * ctx.N * H,)](q, k, v, o, lse, cu_seqlens, prefix, first, ends, cos, sin, cameras, inverse,
                                                  *ctx.numbers, blocks, H, H // Hk, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                                                  **flags, **tile)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens, prefix, first, last, ends, cos, sin, cameras, inverse)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse, cu_seqlens, prefix, first, last, ends, cos, sin, cameras, inverse = ctx.saved_tensors
        H, Hk, do = q.shape[1], k.shape[1], do.contiguous()
        delta = (do.float() * o.float()).sum(-1)                                             # [B, H, S]
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        tile = tiles(q.shape[-1], q.element_size() * 8, ctx.flags, True)
        blocks = triton.cdiv(ctx.longest[0], tile["BM"])
        if blocks * ctx.N:
            dq_kernel[(blocks * ctx.N * H,)](q, k, v, do, dq, lse, delta, cu_seqlens, prefix, first, ends, cos, sin, cameras, inverse,
                                             *ctx.numbers, blocks, H, H // Hk, *strides, **ctx.flags, **tile)
        blocks = triton.cdiv(ctx.longest[1], tile["BN"])
        if blocks * ctx.N:
            dkdv_kernel[(blocks * ctx.N * Hk,)](q, k, v, do, dk, dv, lse, delta, cu_seqlens, prefix, last, cos, sin, cameras, inverse,
                                                *ctx.numbers, blocks, H, H // Hk, *strides, **ctx.flags, **tile)
        return dq, dk, dv, *[None] * 8


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None,
              cu_seqlens: torch.Tensor | None = None, prefix: torch.Tensor | None = None,
              rope: tuple[torch.Tensor, torch.Tensor] | None = None, cameras: torch.Tensor | None = None,
              max_seqlen: int | None = None) -> torch.Tensor:
    """Softmax attention, differentiable in q, k and v.

    q [B, H, S, D], k and v [B, Hk, Sk, D] of one dtype (bf16, fp16, fp32), D a multiple of 8 from 32 to 128, H a multiple of Hk.
    scale: None is D^-0.5. cu_seqlens: int32 [N + 1] from 0 to S, with B = 1. prefix: int [B, Sk], see above; needs causal.
    rope: (cos, sin) [B, S, D / 2 or D], e.g. of `mrope`. cameras: P [B, V, 4, 4], S = V equal runs of tokens.
    max_seqlen: longest sequence of cu_seqlens, if known: saves waiting for the device to tell it.
    Returns [B, H, S, D]. CPU tensors take the reference (TRITON_INTERPRET=1: the kernels), CUDA tensors the kernels.
    Raises ValueError for anything else, RuntimeError for a CUDA tensor without triton.
    """
    (B, H, S, D), (Hk, Sk) = q.shape, k.shape[1:3]
    if k.shape != (B, Hk, Sk, D) or v.shape != k.shape or H % Hk:
        raise ValueError(f"q, k and v want [B, H, S, D] and twice [B, Hk, Sk, D] with H a multiple of Hk, not {tuple(q.shape)}, "
                         f"{tuple(k.shape)} and {tuple(v.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: cast them to one dtype")
    if cu_seqlens is not None and (B > 1 or S != Sk or cu_seqlens.ndim != 1):
        raise ValueError(f"cu_seqlens wants one row (B = 1) and as many queries as keys, not B = {B}, S = {S}, Sk = {Sk}")
    if prefix is not None and (not causal or prefix.shape != (B, Sk)):
        raise ValueError(f"prefix wants causal=True and the shape {(B, Sk)} of the keys, not causal={causal} and {tuple(prefix.shape)}")
    if (rope is not None or cameras is not None) and S != Sk:
        raise ValueError(f"rope and cameras want as many queries as keys, not S = {S}, Sk = {Sk}: encode a cache when it is written")
    if rope is not None and any(x.shape[:2] != (B, S) or x.shape[2] not in (D // 2, D) for x in rope):
        raise ValueError(f"rope wants cos and sin of {(B, S, D // 2)} or {(B, S, D)}, not {[tuple(x.shape) for x in rope]}")
    if cameras is not None and (cameras.ndim != 4 or cameras.shape[0] != B or cameras.shape[2:] != (4, 4) or S % cameras.shape[1] or D % 8):
        raise ValueError(f"cameras wants [{B}, V, 4, 4] with V a divisor of {S} and D a multiple of 8, not {tuple(cameras.shape)}, D = {D}")
    scale = D**-0.5 if scale is None else scale
    if q.is_cuda and triton is None:
        raise RuntimeError("attention on a CUDA tensor needs triton, which could not be imported: pip install triton")
    if q.device.type == "cpu" and not (triton and triton.knobs.runtime.interpret):
        return attention_reference(q, k, v, causal=causal, scale=scale, cu_seqlens=cu_seqlens, prefix=prefix, rope=rope, cameras=cameras)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies the bit patterns of bfloat16: use float16 or float32 there")
    if D % 8 or not 32 <= D <= 128 or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"the kernels take bf16, fp16 and fp32 heads of 32 to 128 in steps of 8, not {q.dtype} heads of {D}")
    if any(x is not None and x.requires_grad for x in (*(rope or ()), cameras)):
        raise ValueError("the kernels give no gradient to rope and cameras: detach them")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin = (None, None) if rope is None else (x[..., :D // 2].float().contiguous() for x in rope)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.int().contiguous()
        max_seqlen = int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if max_seqlen is None else max_seqlen
    prefix = None if prefix is None else prefix.int().contiguous()
    cameras = None if cameras is None else cameras.float().contiguous()
    return FusedAttention.apply(q, k, v, causal, scale, cu_seqlens, max_seqlen, prefix, cos, sin, cameras)


def compile_cases() -> list[tuple]:
    """What to compile ahead of time: (name, kernel, type of each argument, constants, options). "i32:16" is a multiple of 16."""
    integers = dict.fromkeys(("S", "Sk", "per_view", "blocks", "H", "group"), "i32")
    strides = dict.fromkeys(("qb", "qh", "qs", "kb", "kh", "ks", "vb", "vh", "vs"), "i32:16")
    of_option = {"CU": ("WINDOWS", "*i32"), "SEGMENT": ("PREFIX", "*i32"), "FIRST": ("PREFIX", "*i32"), "LAST": ("PREFIX", "*i32"),
                 "PREFIX_ENDS": ("PREFIX", "*i32"), "COS": ("ROPE", "*fp32"), "SIN": ("ROPE", "*fp32"), "P": ("CAMERAS", "*fp32"),
                 "INVERSE": ("CAMERAS", "*fp32")}
    cases = []
    for kind, D, options in (("bf16", 128, ("CAUSAL",)), ("fp16", 64, ()), ("bf16", 80, ("WINDOWS",)), ("bf16", 128, ("CAUSAL", "PREFIX")),
                             ("bf16", 128, ("CAUSAL", "ROPE")), ("bf16", 80, ("WINDOWS", "ROPE")), ("bf16", 64, ("CAMERAS",)),
                             ("bf16", 128, ("CAMERAS",)), ("fp32", 64, ("CAUSAL",)), ("fp32", 128, ("CAUSAL",)),
                             ("fp32", 128, ("CAUSAL", "ROPE"))):
        for direction, kernel, tensors in (("forward", forward_kernel, "Q K V O"), ("backward dq", dq_kernel, "Q K V DO DQ"),
                                           ("backward dk dv", dkdv_kernel, "Q K V DO DK DV")):
            flags = {option: option in options for option in ("CAUSAL", "WINDOWS", "PREFIX", "ROPE", "CAMERAS")}
            constants = tiles(D, 32 if kind == "fp32" else 16, flags, direction != "forward")
            launch = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
            signature = {x: f"*{kind}" for x in tensors.split()} | {"LSE": "*fp32", "scale": "fp32"} | integers | strides
            if direction != "forward":
                signature["DELTA"] = "*fp32"
            for argument, (option, pointer) in of_option.items():
                if argument in kernel.arg_names and option in options:
                    signature[argument] = pointer
                elif argument in kernel.arg_names:
                    constants[argument] = None
            name = " ".join((f"attention {direction} {kind} D={D}", *map(str.lower, options)))
            cases.append((name, kernel, signature, constants | flags, launch))
    return cases
