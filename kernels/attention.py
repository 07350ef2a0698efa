"""Softmax attention that uses what it knows: windows, shared prefixes and cameras.

    o_i = sum_j p_ij v_j,    p_ij = exp(scale q_i.k_j - lse_i) where j is visible to i, otherwise 0,
    lse_i = log sum_j exp(scale q_i.k_j)

Who sees whom (the options combine):
    causal      key j is visible to query i when j <= i; with fewer queries than keys (a cache) the
                last query stands at the last key.
    cu_seqlens  tokens c[n] .. c[n+1] are sequence n and see only each other: many short windows in
                one launch.
    prefix      segment ids, one per key: 0 = shared prefix, k >= 1 = question k, -1 = padding.
                Causal, and in the prefix or in i's own question, here of a prefix of three
                tokens and two questions of two:

                    i  segment   sees j = 0 1 2 3 4 5 6
                    2     0               x x x
                    4     1               x x x x x
                    6     2               x x x     x x
What is encoded (in registers, so that no encoded copy of q, k or v is ever written):
    cameras     PRoPE (Li et al. 2025). With P = lift(K) w2c of the token's view, every 4-vector x
                of a head becomes  q -> P^T q,  k -> P^-1 k,  v -> P^-1 v,  o -> P o:  the score
                q^T P_i P_j^-1 k depends on relative cameras only.

Layout. q and o are [B, H, S, D], k and v [B, Hk, Sk, D] with H a multiple of Hk (query head h reads
key head h // (H / Hk)); any strides but the last. A program owns BM queries of one head and walks
over blocks of BN keys, keeping the running maximum m, the sum and the unnormalised output: when m
grows to m', what was summed so far shrinks by exp(m - m') (online softmax, Milakov & Gimelshein
2018). The S x S scores live in registers only. Blocks that no query of the program sees are never
visited, so the work grows with the visible pairs. A head's columns are padded to a power of two
(80 -> 128, masked).

One query per row (decoding) would leave a tile of queries and most multiprocessors idle. There the
query heads of a key head are the queries of one program, so its keys are read once for all, and the
walk over the keys is cut into parts, a program each (flash-decoding, Dao et al. 2023). Every part
keeps a softmax of its own, o_p with lse_p; the whole is sum_p w_p o_p with w = softmax_p(lse_p).

Bytes moved: q, k, v read once and o written once (k and v come from L2 for all but the first
program of a head) + 4 B S H for lse.

Backward (FlashAttention-2, Dao 2023). With do the gradient of o and delta_i = do_i.o_i:
    dv_j = sum_i p_ij do_i      dp_ij = do_i.v_j      ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale sum_j ds_ij k_j                      dk_j = scale sum_i ds_ij q_i
p is recomputed from lse. One kernel owns a block of keys (dk, dv), another a block of queries (dq):
no atomics, the same bits in every run. An encoding y = A x passes its gradient on as A^T dy.
"""

from __future__ import annotations  # without triton, the name tl.constexpr need not exist

import functools
import math
import operator

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # macOS, Windows: the reference still runs on the CPU
    triton, jit = None, lambda kernel: kernel

# Shapes: B rows, H query heads, Hk key heads, S queries, Sk keys, D head width, N sequences (B, or
# the windows of cu_seqlens), V views.


# The reference
def transform(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Every 4-vector of [B, H, S, D] times its token's matrix; [B, V, 4, 4], V equal runs."""
    B, H, S, D = x.shape
    V = matrices.shape[1]
    vectors = x.reshape(B, H, V, S // V, D // 4, 4)
    y = torch.einsum("bvac,bhvsgc->bhvsga", matrices.to(x.dtype), vectors)
    return y.reshape(B, H, S, D)


def attention_reference(q, k, v, *, causal, scale, cu_seqlens=None, prefix=None, cameras=None):
    """The same in plain torch, any dtype; see `attention`."""
    if cameras is not None:
        inverse = torch.linalg.inv(cameras)
        q = transform(q, cameras.mT)
        k = transform(k, inverse)
        v = transform(v, inverse)
    if cu_seqlens is None:
        o = visible_attention(q, k, v, causal, scale, None, prefix)
    else:
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        o = windows_attention(q, k, v, causal, scale, lengths, prefix)
    return o if cameras is None else transform(o, cameras)


def windows_attention(q, k, v, causal, scale, lengths, prefix):
    """One call for all windows of like length (32 to 63, 64 to 127, ...), padded to the longest."""
    streams = [x[0].transpose(0, 1) for x in (q, k, v)]  # [S, H, D]
    if prefix is not None:
        streams.append(prefix[0])  # [S]

    def attend(windows, own):  # [N, longest, ...] of each stream -> [N, longest, H, D]
        # A prefix and one question behind it are causal, no more.
        plain = prefix is None or (windows[3].max() <= 1 and prefix.min() >= 0)
        segments = None if plain else windows[3]
        q, k, v = (x.transpose(1, 2) for x in windows[:3])
        o = visible_attention(q, k, v, causal, scale, own, segments)
        return o.transpose(1, 2)

    if len(set(lengths)) == 1:  # equal windows lie side by side as they are
        equal = [x.unflatten(0, (len(lengths), -1)) for x in streams]
        o = attend(equal, None)
        return o.flatten(0, 1).transpose(0, 1)[None]
    streams = [x.split(lengths) for x in streams]
    outputs = list(streams[0])  # an empty window stays empty
    for bits in {length.bit_length() for length in lengths if length}:
        like = [n for n, length in enumerate(lengths) if length.bit_length() == bits]
        sizes = [lengths[n] for n in like]
        ends = torch.tensor(sizes, device=q.device)
        places = torch.arange(max(sizes), device=q.device)
        own = places < ends[:, None]  # [N, longest]
        padded = []  # of q, k, v
        for x in streams[:3]:
            padded.append(pad_windows([x[n] for n in like], own, 0))
        if prefix is not None:
            segments = [streams[3][n] for n in like]
            padded.append(pad_windows(segments, own, -1))
        # Causal: padding stands on the right, where no query looks.
        mask = None if own.all() or causal else own
        found = attend(padded, mask)[own].split(sizes)
        for n, o in zip(like, found, strict=True):
            outputs[n] = o
    return torch.cat(outputs).transpose(0, 1)[None]


def pad_windows(windows, own, value):
    """Windows [length, ...] -> [N, longest, ...], with `value` where `own` is False.

    One copy: pad_sequence's copy per window costs as much again in the backward pass.
    """
    x = torch.cat(windows)
    padded = x.new_full((own.numel(), *x.shape[1:]), value)
    places = own.flatten().nonzero()[:, 0]
    return padded.index_copy(0, places, x).unflatten(0, own.shape)


def visible_attention(q, k, v, causal, scale, own, segments):
    """scaled_dot_product_attention under the mask of visible pairs; a blind query gives 0.

    own: bool [N, Sk], True for keys that exist; segments: int [N, Sk]; either may be None.
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k = k.repeat_interleave(group, 1)
        v = v.repeat_interleave(group, 1)
    S, Sk = q.shape[2], k.shape[2]
    masked = own is not None or segments is not None
    if causal and Sk == S and not masked:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    masks = []  # each [N or 1, S or 1, Sk]
    if causal and Sk > 1:
        pairs = torch.ones(S, Sk, dtype=torch.bool, device=q.device)
        masks.append(pairs.tril(Sk - S)[None])
    if own is not None:
        masks.append(own[:, None])
    if segments is not None:
        theirs = segments[:, None]
        mine = segments[:, Sk - S :, None]
        same = (theirs == mine) & (theirs > 0)
        masks.append((theirs == 0) | same)
    if not masks:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    visible = functools.reduce(operator.and_, masks)
    # Softmax over nothing is undefined: a blind query sees all keys, and its result is dropped.
    blind = ~visible.any(-1, keepdim=True)
    visible = (visible | blind)[:, None]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    return o.masked_fill(blind[:, None], 0) if masked else o


# The kernels. In a kernel, i are BM queries and j are BN keys of one sequence, counted from its
# first, of which it has `count` queries and `keys` keys; a token is counted over the whole batch.
# An option that is off is a None: P (cameras), CU (windows), SEGMENT (prefix). Only a
# kernel has to declare its constants; a function that it calls takes them as they are.


@jit
def head_start(X, b, h, start, by_b, by_h, by_token):
    """Address of a sequence's first row in a head. Tokens fit into 32 bits, addresses may not."""
    return X + b.to(tl.int64) * by_b + h.to(tl.int64) * by_h + start.to(tl.int64) * by_token


@jit
def load_rows(X, stride, i, count, D, BD):
    """Rows i of a head: [len(i), BD]; 0 outside the head and behind the last row."""
    c = tl.arange(0, BD)
    at = X + i.to(tl.int64)[:, None] * stride + c[None, :]
    mask = (i < count)[:, None] & (c < D)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@jit
def store_rows(X, stride, i, count, x, D, BD):
    """The same places of X become x, in X's own type."""
    c = tl.arange(0, BD)
    at = X + i.to(tl.int64)[:, None] * stride + c[None, :]
    mask = (i < count)[:, None] & (c < D)[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=mask)


@jit
def matrix_row(M, views, a, TRANSPOSED, x0, x1, x2, x3):
    """Component a of M x for every 4-vector: [R, BD / 4]."""
    at = M + views * 16 + (a if TRANSPOSED else 4 * a)
    step: tl.constexpr = 4 if TRANSPOSED else 1
    y = tl.load(at)[:, None] * x0
    y += tl.load(at + step)[:, None] * x1
    y += tl.load(at + 2 * step)[:, None] * x2
    y += tl.load(at + 3 * step)[:, None] * x3
    return y


@jit
def mix(x, M, views, TRANSPOSED):
    """Multiply every 4-vector of [R, BD] by its view's matrix, or by the matrix transposed."""
    vectors = tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2])
    x02, x13 = tl.split(vectors)  # components 0 and 2, 1 and 3
    x0, x2 = tl.split(x02)
    x1, x3 = tl.split(x13)
    y0 = matrix_row(M, views, 0, TRANSPOSED, x0, x1, x2, x3)
    y2 = matrix_row(M, views, 2, TRANSPOSED, x0, x1, x2, x3)
    y1 = matrix_row(M, views, 1, TRANSPOSED, x0, x1, x2, x3)
    y3 = matrix_row(M, views, 3, TRANSPOSED, x0, x1, x2, x3)
    y02 = tl.join(y0, y2)
    y13 = tl.join(y1, y3)
    return tl.reshape(tl.join(y02, y13), [x.shape[0], x.shape[1]])


@jit
def encode_tile(x, M, tokens, per_view, TRANSPOSED):
    """A loaded tile by its tokens' cameras; in its own dtype again, as the matrix units want it."""
    if M is not None:
        x = mix(x.to(tl.float32), M, tokens // per_view, TRANSPOSED).to(x.dtype)
    return x


@jit
def program(blocks, heads):
    """(block, head, sequence) of this program."""
    number = tl.program_id(0)
    block = number % blocks
    number //= blocks
    return block, number % heads, number // heads


@jit
def sequence(CU, n, S, Sk):
    """Of sequence n: row of the batch, first token in that row, queries, keys; then the tokens of
    its first query and of its first key."""
    if CU is None:
        return n, n * 0, S, Sk, n * S, n * Sk
    else:
        start = tl.load(CU + n)
        count = tl.load(CU + n + 1) - start
        return n * 0, start, count, count, start, start


@jit
def key_blocks(block, count, keys, n, first, PREFIX_ENDS, FIRST, CAUSAL, BM, BN):
    """Key blocks that a block of queries may see: a0 .. a1, then b0 .. b1.

    The first are all of them, or the prefix; the second the queries' own questions.
    """
    shift = keys - count
    end = tl.minimum(keys, (block + 1) * BM + shift) if CAUSAL else keys
    a0 = end * 0
    a1 = tl.cdiv(end, BN)
    b0, b1 = a1, a1
    if FIRST is not None:
        i = block * BM + tl.arange(0, BM)
        firsts = tl.load(FIRST + first + shift + i, mask=i < count, other=keys)
        own = tl.min(firsts)  # where the first of the queries' questions begins
        prefix_begin = tl.load(PREFIX_ENDS + 2 * n)
        a0 = tl.minimum(prefix_begin, own) // BN
        prefix_end = tl.load(PREFIX_ENDS + 2 * n + 1)
        prefix_end = tl.minimum(prefix_end, end)
        a1 = tl.maximum(a0, tl.cdiv(prefix_end, BN))
        b0 = tl.maximum(own // BN, a1)
        b1 = tl.maximum(tl.cdiv(end, BN), b0)
    return a0, a1, b0, b1


@jit
def query_tile(Q, SEGMENT, P, stride, i, count, first, first_key, per_view, D, BD):
    """Encoded queries, their tokens, their segments.

    `first` is the token of the sequence's first query, `first_key` that of the key where it stands.
    """
    tokens = first + tl.minimum(i, count - 1)
    q = load_rows(Q, stride, i, count, D, BD)
    q = encode_tile(q, P, tokens, per_view, True)
    mine = i
    if SEGMENT is not None:
        mine = tl.load(SEGMENT + first_key + i, mask=i < count, other=-1)
    return q, tokens, mine


@jit
def gradient_tile(DO, LSE, DELTA, P, i, tokens, count, line, per_view, D, BD):
    """do of a block of queries with their lse and delta. o = P o', so do' = P^T do."""
    do = load_rows(DO + line * D, D, i, count, D, BD)
    do = encode_tile(do, P, tokens, per_view, True)
    lse = tl.load(LSE + line + i, mask=i < count, other=0.0)
    delta = tl.load(DELTA + line + i, mask=i < count, other=0.0)
    return do, lse, delta


@jit
def key_tile(K, V, SEGMENT, INVERSE, ks, vs, j, keys, first, per_view, D, BD):
    """Encoded keys and values, their tokens, their segments; `first`: token of the first key."""
    tokens = first + tl.minimum(j, keys - 1)
    k = load_rows(K, ks, j, keys, D, BD)
    k = encode_tile(k, INVERSE, tokens, per_view, False)
    v = load_rows(V, vs, j, keys, D, BD)
    v = encode_tile(v, INVERSE, tokens, per_view, False)
    theirs = j
    if SEGMENT is not None:
        theirs = tl.load(SEGMENT + first + j, mask=j < keys, other=-1)
    return k, v, tokens, theirs


@jit
def scores(a, b, i, j, count, keys, mine, theirs, scale, CAUSAL, SEGMENT):
    """scale a.b float32, in units of log 2 for exp2; -inf where j is not visible to i.

    [BM, BN] of (q, k) with i, mine [BM, 1] and j, theirs [1, BN]; or [BN, BM] of (k, q).
    """
    visible = (i < count) & (j < keys)
    if CAUSAL:
        visible &= j <= i + keys - count
    if SEGMENT is not None:
        same = (theirs == mine) & (mine > 0)
        visible &= (theirs == 0) | same
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    s *= scale * 1.4426950408889634  # log2(e)
    return tl.where(visible, s, float("-inf"))


# fmt: off
@jit
def forward_kernel(
    Q, K, V, OUT, LSE,
    CU, SEGMENT, FIRST, PREFIX_ENDS,  # who sees whom: sequences, segment ids, `prefix_ranges`
    P, INVERSE,  # what is encoded: the matrix of a view and its inverse
    # parts of a walk, tokens per view, blocks per sequence, query heads per key head
    parts, scale, S, Sk, per_view, blocks, H, group,
    qb, qh, qs, kb, kh, ks, vb, vh, vs,  # strides of q, k, v: row of the batch, head, token
    CAUSAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: on
    """One program: BM queries of one head of one sequence, a part of the keys that they see.

    OUT [B, H, S, parts, D] and LSE [B, H, S, parts] are contiguous.
    """
    block, h, n = program(blocks * parts, H)
    part = block % parts
    block //= parts
    b, start, count, keys, query, first = sequence(CU, n, S, Sk)
    if block * BM >= count:
        return
    i = block * BM + tl.arange(0, BM)
    first_key = first + keys - count
    Q = head_start(Q, b, h, start, qb, qh, qs)
    q, tokens, mine = query_tile(Q, SEGMENT, P, qs, i, count, query, first_key, per_view, D, BD)
    hk = h // group
    K = head_start(K, b, hk, start, kb, kh, ks)
    V = head_start(V, b, hk, start, vb, vh, vs)

    # The online softmax: m, the sum and o are those of the keys walked over so far.
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, BD], tl.float32)
    rows, mine = i[:, None], mine[:, None]
    a0, a1, b0, b1 = key_blocks(block, count, keys, n, first, PREFIX_ENDS, FIRST, CAUSAL, BM, BN)
    visits = a1 - a0 + b1 - b0
    for t in range(visits * part // parts, visits * (part + 1) // parts):
        key_block = tl.where(t < a1 - a0, a0 + t, b0 + t - (a1 - a0))
        j = key_block * BN + tl.arange(0, BN)
        k, v, _, theirs = key_tile(K, V, SEGMENT, INVERSE, ks, vs, j, keys, first, per_view, D, BD)
        theirs = theirs[None, :]
        s = scores(q, k, rows, j[None, :], count, keys, mine, theirs, scale, CAUSAL, SEGMENT)
        larger = tl.maximum(m, tl.max(s, 1))
        # Where nothing was seen, exp2(-inf - 0) is 0 and exp2(-inf + inf) would be nan.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(m - base)
        total = total * shrink + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
        m = larger
    blind = total == 0.0  # a query that sees nothing gives 0
    o = o / tl.where(blind, 1.0, total)[:, None]
    if P is not None:
        o = mix(o, P, tokens // per_view, False)
    line = (b.to(tl.int64) * H + h) * S + start
    at = line * parts + part
    store_rows(OUT + at * D, parts * D, i, count, o, D, BD)
    lse = m + tl.log2(tl.where(blind, 1.0, total))
    lse = tl.where(blind, -1e30, lse)  # finite: the parts of a blind query have weights, too
    tl.store(LSE + at + i * parts, lse, mask=i < count)


# fmt: off
@jit
def dq_kernel(
    Q, K, V, DO, DQ, LSE, DELTA, CU, SEGMENT, FIRST, PREFIX_ENDS, P, INVERSE,
    scale, S, Sk, per_view, blocks, H, group, qb, qh, qs, kb, kh, ks, vb, vh, vs,
    CAUSAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: on
    """The forward walk again, p recomputed from lse: dq = scale sum_j p (do.v - delta) k.

    DO and DQ are contiguous.
    """
    block, h, n = program(blocks, H)
    b, start, count, keys, query, first = sequence(CU, n, S, Sk)
    if block * BM >= count:
        return
    i = block * BM + tl.arange(0, BM)
    first_key = first + keys - count
    line = (b.to(tl.int64) * H + h) * S + start
    Q = head_start(Q, b, h, start, qb, qh, qs)
    q, tokens, mine = query_tile(Q, SEGMENT, P, qs, i, count, query, first_key, per_view, D, BD)
    do, lse, delta = gradient_tile(DO, LSE, DELTA, P, i, tokens, count, line, per_view, D, BD)
    hk = h // group
    K = head_start(K, b, hk, start, kb, kh, ks)
    V = head_start(V, b, hk, start, vb, vh, vs)

    # q.k and do.v are of encoded tiles; the gradient of q before its encoding comes at the end.
    dq = tl.zeros([BM, BD], tl.float32)
    rows, mine = i[:, None], mine[:, None]
    a0, a1, b0, b1 = key_blocks(block, count, keys, n, first, PREFIX_ENDS, FIRST, CAUSAL, BM, BN)
    for t in range(0, a1 - a0 + b1 - b0):
        key_block = tl.where(t < a1 - a0, a0 + t, b0 + t - (a1 - a0))
        j = key_block * BN + tl.arange(0, BN)
        k, v, _, theirs = key_tile(K, V, SEGMENT, INVERSE, ks, vs, j, keys, first, per_view, D, BD)
        theirs = theirs[None, :]
        s = scores(q, k, rows, j[None, :], count, keys, mine, theirs, scale, CAUSAL, SEGMENT)
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq *= scale
    if P is not None:
        dq = mix(dq, P, tokens // per_view, False)
    store_rows(DQ + line * D, D, i, count, dq, D, BD)


# fmt: off
@jit
def dkdv_kernel(
    Q, K, V, DO, DK, DV, LSE, DELTA, CU, SEGMENT, LAST, P, INVERSE,
    scale, S, Sk, per_view, blocks, H, group, qb, qh, qs, kb, kh, ks, vb, vh, vs,
    CAUSAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: on
    """One program: BN keys of one key head, over all queries that see them, of all its query heads.

    DK and DV are contiguous.
    """
    Hk = H // group
    block, hk, n = program(blocks, Hk)
    b, start, count, keys, query, first = sequence(CU, n, S, Sk)
    if block * BN >= keys:
        return
    j = block * BN + tl.arange(0, BN)
    shift = keys - count
    K = head_start(K, b, hk, start, kb, kh, ks)
    V = head_start(V, b, hk, start, vb, vh, vs)
    k, v, at, theirs = key_tile(K, V, SEGMENT, INVERSE, ks, vs, j, keys, first, per_view, D, BD)

    # Queries that may see this block of keys: i0 BM .. end.
    i0 = count * 0
    end = count
    if CAUSAL:
        i0 = tl.maximum(block * BN - shift, 0) // BM
    if SEGMENT is not None:
        last = tl.max(tl.load(LAST + first + j, mask=j < keys, other=0))
        end = tl.minimum(count, last - shift)
    visits = tl.maximum(tl.cdiv(end, BM) - i0, 0)
    # Over the query heads that share this key head, and over the query blocks of each.
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    rows, theirs = j[:, None], theirs[:, None]
    for t in range(0, visits * group):
        h = hk * group + t // visits
        i = (i0 + t % visits) * BM + tl.arange(0, BM)
        key = first + shift
        Q_h = head_start(Q, b, h, start, qb, qh, qs)
        q, tokens, mine = query_tile(Q_h, SEGMENT, P, qs, i, count, query, key, per_view, D, BD)
        line = (b.to(tl.int64) * H + h) * S + start
        do, lse, delta = gradient_tile(DO, LSE, DELTA, P, i, tokens, count, line, per_view, D, BD)
        # [BN, BM]: p and ds are left factors as they are, and need not go through shared memory.
        mine = mine[None, :]
        s = scores(k, q, i[None, :], rows, count, keys, mine, theirs, scale, CAUSAL, SEGMENT)
        p = tl.exp2(s - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk *= scale
    if INVERSE is not None:
        views = at // per_view
        dk = mix(dk, INVERSE, views, True)
        dv = mix(dv, INVERSE, views, True)
    line = (b.to(tl.int64) * Hk + hk) * Sk + start
    store_rows(DK + line * D, D, j, keys, dk, D, BD)
    store_rows(DV + line * D, D, j, keys, dv, D, BD)


# Launching

PROGRAMS = 256  # of one decoded token: two for nearly all of an H100's 132 multiprocessors
PART = 256  # keys that are worth a program of their own


def tiles(D: int, bits: int, encoded: bool, prefix: bool, kernel: str) -> dict:
    """Block sizes and launch options of "forward", "few" (queries), "dq" and "dkdv".

    Large blocks read keys less often, registers bound them: an encoded tile is float32 for a while.
    Questions that share a prefix are short, so blocks of 64 waste less on them. Backward, 4 warps
    and tiles that spill nothing leave room for two programs on a multiprocessor: one computes while
    the other waits.
    """
    BD = triton.next_power_of_2(D)
    warps = 8 if BD > 64 and (encoded or not prefix) else 4
    if bits == 32:
        BM, BN, warps, stages = (32, 32, 8, 1) if BD <= 64 else (16, 16, 8, 1)
    elif kernel == "few":  # the smallest tile that the matrix units take
        BM, BN, warps, stages = 16, 64, 4, 3
    elif encoded:
        BM, BN, stages = (32, 64, 1) if kernel == "dkdv" else (64, 32, 2)
    elif kernel in ("dq", "dkdv"):  # dk and dv alone are 128 registers of a thread at BD = 128
        BM, BN, warps, stages = 32 if kernel == "dkdv" and BD > 64 else 64, 64, 4, 2
    elif prefix:
        BM, BN, stages = 64, 32, 2
    elif D < BD:  # 80 in 128, the vision tower: most of its windows have 64 tokens
        BM, BN, warps, stages = 64, 64, 4, 2
    else:
        BM, BN, stages = 128, 64, 2
    return {"D": D, "BD": BD, "BM": BM, "BN": BN, "num_warps": warps, "num_stages": stages}


def prefix_ranges(prefix: torch.Tensor, cu_seqlens: torch.Tensor | None):
    """Which blocks may be skipped: first [B, Sk], ends [N, 2], last [B, Sk], all int32.

    first and last say where a key's own segment begins and ends in its sequence (a prefix key is
    seen to the end, padding by none), ends where the prefix begins and ends. All on the device,
    without waiting for it.
    """
    B, Sk = prefix.shape
    token = torch.arange(B * Sk, device=prefix.device)
    if cu_seqlens is None:
        N = B
        n, at = token // Sk, token % Sk  # the token's sequence, and its place there
    else:
        N = len(cu_seqlens) - 1
        n = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        n = n.clamp(max=N - 1)
        at = token - cu_seqlens[n]
    segment, far = prefix.flatten().long(), 2**30
    # A bucket per segment of a sequence: 0 the prefix, then the questions, the last for padding.
    buckets = Sk + 2
    bucket = n * buckets + torch.where(segment < 0, Sk + 1, segment)
    first = at.new_full((N * buckets,), far)
    first = first.scatter_reduce(0, bucket, at, "amin")
    last = at.new_zeros(N * buckets)
    last = last.scatter_reduce(0, bucket, at + 1, "amax")
    ends = torch.stack([first[::buckets], last[::buckets]], 1)
    first = first[bucket].masked_fill(segment < 0, far)
    last = last[bucket].masked_fill(segment < 0, 0)
    last = last.masked_fill(segment == 0, far)
    return first.int(), ends.int().contiguous(), last.int()


class Segments:
    """Segment ids of a forward pass, int32 [B, Sk], with what `prefix_ranges` says of them.

    The first kernel that asks has it computed; one object serves all layers, and the same layers
    when they are computed again for the backward pass.
    """

    ndim = 0  # transformers' generate passes its masks through twice, and asks which are 2-D

    def __init__(self, ids: torch.Tensor, cu_seqlens: torch.Tensor | None = None):
        self.ids, self.cu_seqlens = ids.int().contiguous(), cu_seqlens

    def to(self, device):
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return Segments(self.ids.to(device), cu_seqlens)

    @functools.cached_property
    def seen_by_last(self) -> Segments:
        """The keys that each row's last one sees as prefix, the others as padding."""
        own = (self.ids == self.ids[:, -1:]) & (self.ids > 0)
        return Segments(((self.ids == 0) | own).int() - 1)

    @functools.cached_property
    def ranges(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return prefix_ranges(self.ids, self.cu_seqlens)


class FusedAttention(torch.autograd.Function):
    """The kernels on contiguous options; a grid has a program per block, head and sequence."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale, cu_seqlens, max_seqlen, segments, cameras, parts):
        B, H, S, D = q.shape
        Hk, Sk = k.shape[1:3]
        ctx.N, ctx.queries, ctx.keys = B, S, Sk  # the most of a sequence
        if cu_seqlens is not None:
            ctx.N = len(cu_seqlens) - 1
            ctx.queries = ctx.keys = max_seqlen
        prefix, first, ends, last = None, None, None, None
        if segments is not None:
            prefix = segments.ids
            first, ends, last = segments.ranges
        inverse, per_view = None, 0
        if cameras is not None:
            inverse = torch.linalg.inv_ex(cameras).inverse.contiguous()  # inv waits for the GPU
            per_view = S // cameras.shape[1]
        visible = (cu_seqlens, prefix, first, ends)
        encoding = (cameras, inverse)
        ctx.kind = (D, q.element_size() * 8, cameras is not None, prefix is not None)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        # A kernel's arguments before and after the number of its blocks.
        ctx.numbers = (scale, S, Sk, per_view)
        ctx.heads = (H, H // Hk, *strides, causal)
        ctx.parts = parts
        dtype = q.dtype if parts == 1 else torch.float32
        o = torch.empty(B, H, S, parts, D, dtype=dtype, device=q.device)
        lse = torch.empty(B, H, S, parts, dtype=torch.float32, device=q.device)
        name = "few" if S <= 16 and cameras is None else "forward"
        launch(ctx, forward_kernel, name, q, k, v, o, lse, *visible, *encoding, parts)
        if parts > 1:
            weight = (lse * math.log(2)).softmax(-1)  # lse is in units of log 2
            return (weight[..., None] * o).sum(3).to(q.dtype)  # not @, which autocast would round
        o, lse = o.squeeze(3), lse.squeeze(3)
        ctx.save_for_backward(q, k, v, o, lse, *visible, last, *encoding)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse, *visible, last, cameras, inverse = ctx.saved_tensors
        do = do.contiguous()
        delta = (do.float() * o.float()).sum(-1)  # [B, H, S]
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        given, encoding = (q, k, v, do), (cameras, inverse)
        launch(ctx, dq_kernel, "dq", *given, dq, lse, delta, *visible, *encoding)
        seen = (*visible[:2], last)
        launch(ctx, dkdv_kernel, "dkdv", *given, dk, dv, lse, delta, *seen, *encoding)
        return dq, dk, dv, *[None] * 7


def launch(ctx, kernel, name: str, *tensors):
    """A program per block of queries and query head, or of keys and key head, and sequence."""
    tile = tiles(*ctx.kind, name)
    length, size, heads = ctx.keys, tile["BN"], tensors[1].shape[1]
    if name != "dkdv":
        length, size, heads = ctx.queries, tile["BM"], tensors[0].shape[1]
    blocks = triton.cdiv(length, size)
    grid = (blocks * ctx.parts * ctx.N * heads,)
    if grid[0]:
        kernel[grid](*tensors, *ctx.numbers, blocks, *ctx.heads, **tile)


def attention(
    q, k, v, *, causal, scale, cu_seqlens=None, max_seqlen=None, prefix=None, cameras=None
):
    """Softmax attention, differentiable in q, k and v.

    q: [B, H, S, D]; k and v: [B, Hk, Sk, D] of one dtype (bf16, fp16, fp32); D a multiple of 8 from
    32 to 128, H a multiple of Hk. scale: None is D^-0.5.
    cu_seqlens: int32 [N + 1] from 0 to S, with B = 1. max_seqlen: the length of its longest
    sequence, if known: saves waiting for the device to tell it.
    prefix: int [B, Sk], see above; needs causal. As `Segments` for the layers of a model, so that
    what may be skipped is found once for all.
    cameras: P [B, V, 4, 4], the S tokens being V equal runs.

    Returns [B, H, S, D]. CPU tensors take the reference (TRITON_INTERPRET=1: the kernels), CUDA
    tensors the kernels. Raises ValueError for what it does not take, RuntimeError for a CUDA tensor
    without triton.
    """
    if prefix is not None and not isinstance(prefix, Segments):
        prefix = Segments(prefix, cu_seqlens)
    if prefix is not None and (prefix.cu_seqlens is None) != (cu_seqlens is None):
        raise ValueError("Segments and cu_seqlens do not fit: make Segments(ids, cu_seqlens)")
    ids = None if prefix is None else prefix.ids
    options = {"cu_seqlens": cu_seqlens, "prefix": ids, "cameras": cameras}
    refuse_misfits(q, k, v, causal, **options)
    D = q.shape[3]
    scale = D**-0.5 if scale is None else scale
    if q.is_cuda and triton is None:
        raise RuntimeError("attention on a CUDA tensor needs triton: pip install triton")
    if q.device.type == "cpu" and not (triton and triton.knobs.runtime.interpret):
        return attention_reference(q, k, v, causal=causal, scale=scale, **options)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter errs in bfloat16: use float16 or float32 there")
    if D % 8 or not 32 <= D <= 128 or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        kinds = "bf16, fp16 and fp32 heads of 32 to 128 in steps of 8"
        raise ValueError(f"the kernels take {kinds}, not {q.dtype} heads of {D}")
    if cameras is not None and cameras.requires_grad:
        raise ValueError("the kernels give no gradient to cameras: detach them")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.int().contiguous()
        if max_seqlen is None:
            max_seqlen = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    cameras = None if cameras is None else cameras.float().contiguous()
    (B, H, S, _), (Hk, Sk) = q.shape, k.shape[1:3]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    one = S == 1 and causal and cu_seqlens is None and cameras is None
    if not one or learns or Sk < H // Hk:
        options = (causal, scale, cu_seqlens, max_seqlen, prefix, cameras, 1)
        return FusedAttention.apply(q, k, v, *options)
    packed = q[:, :, 0].unflatten(1, (Hk, -1))  # [B, Hk, H / Hk, D]: heads as queries
    parts = max(1, min(PROGRAMS // (B * Hk), triton.cdiv(Sk, PART)))
    prefix = prefix and prefix.seen_by_last
    o = FusedAttention.apply(packed, k, v, False, scale, None, None, prefix, None, parts)
    return o.view(q.shape)


def refuse_misfits(q, k, v, causal, cu_seqlens, prefix, cameras):
    """ValueError for arguments of `attention` that do not fit together, whatever computes it."""
    (B, H, S, D), (Hk, Sk) = q.shape, k.shape[1:3]
    if k.shape != (B, Hk, Sk, D) or v.shape != k.shape or H % Hk:
        want = "[B, H, S, D] and twice [B, Hk, Sk, D] with H a multiple of Hk"
        found = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"q, k and v want {want}, not {found}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: cast them to one dtype")
    if cu_seqlens is not None and (B > 1 or Sk != S or cu_seqlens.ndim != 1):
        want = "one row (B = 1) and as many queries as keys"
        raise ValueError(f"cu_seqlens wants {want}, not B = {B}, S = {S}, Sk = {Sk}")
    if prefix is not None and (not causal or prefix.shape != (B, Sk)):
        want, found = f"the shape {(B, Sk)} of the keys", tuple(prefix.shape)
        raise ValueError(f"prefix wants causal=True and {want}, not causal={causal} and {found}")
    if cameras is None:
        return
    fits = Sk == S and cameras.ndim == 4 and cameras.shape == (B, cameras.shape[1], 4, 4)
    if not fits or S % cameras.shape[1] or D % 8:
        raise ValueError(
            f"cameras wants [{B}, V, 4, 4] with V a divisor of {S}, D a multiple of 8 and as many "
            f"queries as keys, not {tuple(cameras.shape)}, D = {D}, S = {S}, Sk = {Sk}"
        )
