"""
FlashAttention in one file: exact attention, forward and backward, without ever storing the T x S matrix of scores.

    from flash_attn import flash_attention          # rename this file where Dao's flash_attn package is installed
    y = flash_attention(q, k, v, causal=True)       # for F.scaled_dot_product_attention; its docstring says what differs
    y = flash_decode(q, k, v, lengths)              # the newest tokens against a cache; both on NVIDIA GPUs from Ampere on
    $ python flash_attn.py                          # compile the main configurations, no GPU needed, and print what they use
    $ TRITON_INTERPRET=1 python your_script.py      # run the same kernels on CPU tensors: slow, but print and breakpoints work

Notation, here and in the code:

    B batch, T queries, S keys, H query heads, K key/value heads, G = H / K query heads per kv head, D head dim
    q_i, k_j, v_j rows of length D; scores s_ij = scale * q_i.k_j; weights p_ij = softmax_j(s_ij); output o_i = sum_j p_ij v_j

Plain attention writes s and p, T x S each, to GPU memory and reads them back, which takes longer than the arithmetic. Here a
program (a thread block of the GPU) owns a tile of queries, loops over blocks of keys, and keeps no block's scores once used.

Forward: the online softmax (Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022), dividing only at the end, as in
FlashAttention-2 (Dao 2023). Over the keys seen so far, each query keeps the largest score m (subtracted so that exp cannot
overflow), the sum l = sum_j exp(s_ij - m), and the unnormalised output a = sum_j exp(s_ij - m) v_j. The next block of
keys may raise the maximum to m': rescale the old sums, then add the block's terms,

    alpha = exp(m - m')        l <- alpha l + sum_j exp(s_ij - m')        a <- alpha a + sum_j exp(s_ij - m') v_j        m <- m'

At the end o = a / l. Also stored is the log-sum-exp L = m + log l, one number instead of two. From it the backward recomputes any
weight without a division, and without overflow, as L_i >= every s_ij seen: p_ij = exp(s_ij - L_i). The hardware computes exp(x)
as exp2(x log2(e)). The code puts log2(e) into scale, once, not into each score: m and L are in base 2.

Backward (FlashAttention). do_i is the loss's gradient with respect to o_i; likewise dv, dp, ds, dq and dk. The chain rule,
through o_i = sum_j p_ij v_j, then the softmax (the derivative of p_ij by s_ik is p_ij ([j = k] - p_ik)), then the scores:

    dv_j = sum_i p_ij do_i                     dp_ij = do_i.v_j
    ds_ij = p_ij (dp_ij - delta_i)             delta_i = sum_j p_ij dp_ij = do_i.(sum_j p_ij v_j) = do_i.o_i
    dq_i = scale * sum_j ds_ij k_j             dk_j = scale * sum_i ds_ij q_i

delta_i, a sum over all keys, is thus a product of two rows already in memory: a small kernel computes it first. A second kernel
owns a tile of keys and sums its dk and dv over queries; a third owns a tile of queries and sums its dq over keys. Both recompute
s and dp: 7 products, where FlashAttention-2 has 5 and adds dq by atomics. In return no two programs add to the same gradient, and
every run gives the same bits.

The mask. Query i is at position pos = i + (S - T), so that the last query is level with the last key (T = 2, S = 5: 11110 and
11111), and sees the keys first <= j < end. end is pos + 1 if causal, else S; first is 0, or more: pos - window + 1 with a window,
doc_start[b, i] with documents. A query that sees no key yields zeros and passes no gradient: its L is +inf, which makes every
p_ij zero. Blocks before the first key that the tile sees and after its last are skipped; only those crossed by an edge of the
mask ("edge" blocks, not "full") are masked. Causal, T = S = 4 blocks, Full, Edge, .: skipped:  E... / FE.. / FFE. / FFFE
"""
import math, os, re, shutil, subprocess, sysconfig, types

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
    jit, INTERPRET = triton.jit, tl.constexpr(bool(triton.knobs.runtime.interpret))
except ImportError:                                     # no Triton on this platform: attention_ref still works
    triton, jit, INTERPRET, tl = None, lambda kernel: kernel, False, type("tl", (), dict(constexpr=None))

# ---------------------------------------------------------------------------- the specification

def attention_ref(q, k, v, causal=True, window=0, scale=None, doc_start=None):
    """What flash_attention computes, in plain PyTorch with the T x S matrix in memory. Same arguments; any device and float type.

    q: (B, H, T, D); k, v: (B, K, S, D), H a multiple of K -> (B, H, T, D). It rounds, too: to judge 16-bit results, compare
    them, and those of attention_ref, with attention_ref of the same tensors in float64."""
    T, S, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)                                     # (B, H, S, D)
    pos, j = torch.arange(T, device=q.device)[:, None] + (S - T), torch.arange(S, device=q.device)  # (T, 1), (S,)
    seen = j <= pos if causal else torch.ones(T, S, dtype=torch.bool, device=q.device)
    if window > 0: seen = seen & (j > pos - window)                                                 # (T, S)
    if doc_start is not None: seen = seen & (j >= doc_start[:, None, :, None])                      # (B, 1, T, S)
    s = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return s.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen, 0) @ v        # a softmax over no keys is NaN: 0

# ---------------------------------------------------------------------------- what the kernels share
# A kernel runs as many programs; program_id numbers them by tile, then by head, then by batch. Code that reads like NumPy works
# on a whole tile in registers, (ROWS, WIDTH), where WIDTH is D rounded up to a power of two. A constexpr is known at compile
# time: an if on one costs nothing; static_range, and comprehensions over tuples, are unrolled. In a kernel, K is the pointer or
# descriptor of the keys. A warp is 32 threads; stages are blocks loaded ahead; a spilled register is kept in slow memory.

@jit
def dot(a, b, c):
    """c + a @ b on the matrix units; float32 in full precision, not TF32."""
    if INTERPRET:       # the interpreter multiplies the bits of bfloat16 as integers; casting to bfloat16, it truncates
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")

@jit
def pointers(X, strides, b, h, row, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    # subtle: 64-bit offsets to the tile's corner, tensors may exceed 2^31 elements; 32-bit inside (see near), to save registers
    corner = X + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1] + tl.cast(row, tl.int64) * strides[2]
    return corner + (tl.arange(0, ROWS)[:, None] * strides[2] + tl.arange(0, WIDTH)[None, :] * strides[3])

@jit
def load(X, strides, b, h, row, rows, EDGE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Tile X[b, h, row : row + ROWS] of an X with `rows` rows: (ROWS, WIDTH), zeros outside X. Only EDGE tiles may pass its end.
    X is a pointer, or a descriptor for the copy engine (TMA), which fills in the zeros itself."""
    if isinstance(X, tl.tensor_descriptor): tile = X.load([b, h, row, 0]).reshape(ROWS, WIDTH)
    elif EDGE or D < WIDTH:
        inside = (tl.arange(0, ROWS)[:, None] < rows - row) & (tl.arange(0, WIDTH)[None, :] < D)
        tile = tl.load(pointers(X, strides, b, h, row, ROWS, WIDTH), mask=inside, other=0.0)
    else: tile = tl.load(pointers(X, strides, b, h, row, ROWS, WIDTH))
    return tile

@jit
def store(X, strides, b, h, row, rows, tile, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    inside = (tl.arange(0, ROWS)[:, None] < rows - row) & (tl.arange(0, WIDTH)[None, :] < D)
    tl.store(pointers(X, strides, b, h, row, ROWS, WIDTH), tile.to(X.dtype.element_ty), mask=inside)

@jit
def bounds(rows, doc, T, S, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr):
    """The mask, two numbers per query: query rows[i] sees the keys first[i] <= j < end[i]. doc points to doc_start[b].
    To change the mask, change dkdv_kernel's start .. stop, the same by keys, too, and LEFT wherever hide is called."""
    first, end = rows * 0, rows * 0 + S
    if CAUSAL: end = tl.minimum(tl.maximum(rows + (S - T + 1), 0), S)
    if WINDOW: first = tl.maximum(rows + (S - T + 1) - window, 0)
    if DOC: first = tl.maximum(first, tl.load(doc + tl.minimum(rows, T - 1)))
    return first, end

@jit
def hide(s, cols, first, end, value, LEFT: tl.constexpr):
    """s where first <= cols < end, else value. Only windows and documents (LEFT) hide keys on the left, before first."""
    seen = cols < end
    if LEFT: seen = seen & (cols >= first)
    return tl.where(seen, s, value)

@jit
def split(start, full_start, full_stop, stop, BLOCK: tl.constexpr):
    """Cut start <= x < stop into blocks: full ones, which lie inside full_start <= x < full_stop, and edge blocks, the others.
    -> index of the first block; number of edge blocks before the full ones, of full blocks, of edge blocks in all:
    (70, 128, 300, 310), 64 -> 1, 1, 2, 2, for block 1 (edge), 2 and 3 (full), 4 (edge)."""
    first = start // BLOCK
    last = tl.maximum(tl.cdiv(stop, BLOCK), first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_start, BLOCK), first), last)
    full = tl.maximum(tl.minimum(full_stop // BLOCK, last) - full_first, 0)
    return first, full_first - first, full, last - first - full

@jit
def block(i, EDGE: tl.constexpr, first, before, full):
    """Index of the i-th edge block (EDGE) or the i-th full block; first, before and full come from split."""
    return first + (tl.where(i < before, i, i + full) if EDGE else before + i)

# ---------------------------------------------------------------------------- forward

@jit
def empty_state(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """m, l and a of queries that have seen no key yet."""
    return tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)

@jit
def online_softmax(s, v, m, l, a, scale):
    """One step of the recurrence at the top. s: (ROWS, BLOCK), scores not yet scaled; scale includes log2(e)."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    base = tl.maximum(m_new, -3.0e38)                   # subtle: m is -inf if nothing was seen yet, and -inf - -inf is NaN
    p = tl.exp2(s * scale - base[:, None])
    alpha = tl.exp2(m - base)
    return m_new, l * alpha + tl.sum(p, 1), dot(p.to(v.dtype), v, a * alpha[:, None])

@jit
def finish(m, l, a):
    """-> output o and log-sum-exp L (base 2); 0 and +inf for queries that have seen nothing."""
    l_safe = tl.where(l == 0.0, 1.0, l)
    return a / l_safe[:, None], tl.where(l == 0.0, float("inf"), m + tl.log2(l_safe))

@jit
def forward_kernel(Q, K, V, Out, LSE, Doc, q_strides, k_strides, v_strides, o_strides, H, G, T, S, T_pad, window, scale,
                   D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile of queries or, where matrix units are asynchronous, two: they multiply for one while the other is in its softmax.
    An H100 takes 571 us for 4 x 16 heads, T 4096, D 128, causal; at best 607 with one tile, and 657 with loads by pointers."""
    COUNT: tl.constexpr = 2 if isinstance(Q, tl.tensor_descriptor) else 1                   # only such GPUs load by descriptor
    ROWS: tl.constexpr = COUNT * BLOCK_M
    tiles = tl.cdiv(T, ROWS)
    pid = tl.program_id(0)
    m_start = (tiles - 1 - pid % tiles) * ROWS                          # causal: the last tiles see most keys and start first
    h, b = pid // tiles % H, pid // tiles // H
    doc = Doc + tl.cast(b, tl.int64) * T
    first, end = bounds(m_start + tl.arange(0, ROWS), doc, T, S, window, CAUSAL, WINDOW, DOC)
    # Keys min(first)..max(end) are seen by some query of the tile, max(first)..min(end) by every one
    start, before, full, edges = split(tl.min(first, 0), tl.max(first, 0), tl.min(end, 0), tl.max(end, 0), BLOCK_N)

    rows, mask, q, state = (), (), (), ()                               # one entry per tile
    for t in tl.static_range(COUNT):
        rows += (m_start + tl.arange(0, BLOCK_M) + t * BLOCK_M,)
        mask += (bounds(rows[t], doc, T, S, window, CAUSAL, WINDOW, DOC),)
        q += (load(Q, q_strides, b, h, m_start + t * BLOCK_M, T, True, D, BLOCK_M, WIDTH),)
        state += (empty_state(BLOCK_M, WIDTH),)

    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for EDGE in tl.static_range(1, -1, -1):                             # edge blocks (EDGE = 1), then full blocks (0)
        # subtle: hoisting loop invariants (LICM) costs more registers than it saves instructions, and they spill
        for i in tl.range(0, edges if EDGE else full, disable_licm=True):
            n = block(i, EDGE, start, before, full) * BLOCK_N
            k = load(K, k_strides, b, h // G, n, S, EDGE, D, BLOCK_N, WIDTH)
            # subtle: v before the products: a wait for it after them keeps tile 0's softmax from starting during tile 1's product
            v = load(V, v_strides, b, h // G, n, S, EDGE, D, BLOCK_N, WIDTH)
            s = [dot(x, k.T, zero) for x in q]
            if EDGE:
                cols = n + tl.arange(0, BLOCK_N)[None, :]
                s = [hide(s[t], cols, mask[t][0][:, None], mask[t][1][:, None], float("-inf"), WINDOW or DOC)
                     for t in (0, 1)[:COUNT]]
            state = [online_softmax(s[t], v, *state[t], scale) for t in (0, 1)[:COUNT]]

    lse = LSE + tl.cast(pid // tiles, tl.int64) * T_pad                 # LSE[b, h]: (B, H, T_pad), see new_stats
    for t in tl.static_range(COUNT):
        out, L = finish(*state[t])
        store(Out, o_strides, b, h, m_start + t * BLOCK_M, T, out, D, BLOCK_M, WIDTH)
        tl.store(lse + rows[t], L, mask=rows[t] < T)

# ---------------------------------------------------------------------------- backward
# From here on m is the first query of a tile or block, as n is its first key: they go with BLOCK_M and BLOCK_N.

@jit
def delta_kernel(Out, dOut, Delta, o_strides, do_strides, H, T, T_pad, D: tl.constexpr, WIDTH: tl.constexpr,
                 BLOCK_M: tl.constexpr):
    """delta_i = do_i.o_i, and 0 in the padding past T."""
    tiles = T_pad // BLOCK_M
    pid = tl.program_id(0)
    m, h, b = pid % tiles * BLOCK_M, pid // tiles % H, pid // tiles // H
    o = load(Out, o_strides, b, h, m, T, True, D, BLOCK_M, WIDTH).to(tl.float32)
    do = load(dOut, do_strides, b, h, m, T, True, D, BLOCK_M, WIDTH).to(tl.float32)
    tl.store(Delta + tl.cast(pid // tiles, tl.int64) * T_pad + m + tl.arange(0, BLOCK_M), tl.sum(o * do, 1))

@jit
def dkdv_kernel(Q, K, V, dOut, LSE, Delta, dK, dV, Doc, DocEnd, q_strides, k_strides, v_strides, do_strides, dk_strides,
                dv_strides, H, G, T, S, T_pad, window, scale, scale_log2, D: tl.constexpr, WIDTH: tl.constexpr,
                CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                GROUPED: tl.constexpr):
    """dk and dv of one tile of keys, from every query that sees it, in all G heads of the group. Scores are transposed, (keys,
    queries), so that p and ds are the left operands of dv and dk without a detour through shared memory."""
    tiles = tl.cdiv(S, BLOCK_N)
    pid = tl.program_id(0)
    n, kv, b = pid % tiles * BLOCK_N, pid // tiles % (H // G), pid // tiles // (H // G)
    k = load(K, k_strides, b, kv, n, S, True, D, BLOCK_N, WIDTH)
    v = load(V, v_strides, b, kv, n, S, True, D, BLOCK_N, WIDTH)
    dk, dv = tl.zeros([BLOCK_N, WIDTH], tl.float32), tl.zeros([BLOCK_N, WIDTH], tl.float32)

    # The mask as the keys n..n_last see it: only queries in start..stop see any of them, those in full_start..full_stop see all
    n_last, past = tl.minimum(n + BLOCK_N, S) - 1, S - T                # past: keys before the first query
    start, full_start, full_stop, stop = 0, 0, T, T
    if CAUSAL: start, full_start = tl.maximum(n - past, 0), tl.maximum(n_last - past, 0)
    if WINDOW:
        full_stop, stop = tl.maximum(tl.minimum(T, n - past + window), 0), tl.maximum(tl.minimum(T, n_last - past + window), 0)
    if DOC:
        ends = DocEnd + 2 * (tl.cast(b, tl.int64) * tiles + pid % tiles)
        full_stop, stop = tl.minimum(full_stop, tl.load(ends)), tl.minimum(stop, tl.load(ends + 1))
    start, before, full, edges = split(start, full_start, full_stop, stop, BLOCK_M)

    zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for EDGE in tl.static_range(1, -1, -1):
        number = edges if EDGE else full
        # subtle: from i // number the compiler infers number > 0, and would prefetch for an iteration that may never come
        each = tl.where(number > 0, number, 1)
        for i in tl.range(0, G * number, disable_licm=True):            # (head of the group, block) in one loop: two would spill
            g, j = (i // each, i % each) if GROUPED else (0, i)         # a division per block is 8% of the loop's instructions
            h, m = kv * G + g, block(j, EDGE, start, before, full) * BLOCK_M
            rows = m + tl.arange(0, BLOCK_M)
            stats = (tl.cast(b, tl.int64) * H + h) * T_pad + rows       # past T, LSE is +inf and p is 0
            q = load(Q, q_strides, b, h, m, T, EDGE, D, BLOCK_M, WIDTH)
            p = tl.exp2(dot(k, q.T, zero) * scale_log2 - tl.load(LSE + stats)[None, :])
            if EDGE:
                first, end = bounds(rows, Doc + tl.cast(b, tl.int64) * T, T, S, window, CAUSAL, WINDOW, DOC)
                p = hide(p, n + tl.arange(0, BLOCK_N)[:, None], first[None, :], end[None, :], 0.0, WINDOW or DOC)
            do = load(dOut, do_strides, b, h, m, T, EDGE, D, BLOCK_M, WIDTH)
            dv = dot(p.to(do.dtype), do, dv)
            ds = p * (dot(v, do.T, zero) - tl.load(Delta + stats)[None, :])
            dk = dot(ds.to(q.dtype), q, dk)
    store(dK, dk_strides, b, kv, n, S, dk * scale, D, BLOCK_N, WIDTH)
    store(dV, dv_strides, b, kv, n, S, dv, D, BLOCK_N, WIDTH)

@jit
def dq_kernel(Q, K, V, dOut, LSE, Delta, dQ, Doc, q_strides, k_strides, v_strides, do_strides, dq_strides, H, G, T, S, T_pad,
              window, scale, scale_log2, D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
              DOC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dq of one tile of queries, from every key that it sees: the loop of the forward."""
    tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    m, h, b = (tiles - 1 - pid % tiles) * BLOCK_M, pid // tiles % H, pid // tiles // H
    rows = m + tl.arange(0, BLOCK_M)
    first, end = bounds(rows, Doc + tl.cast(b, tl.int64) * T, T, S, window, CAUSAL, WINDOW, DOC)
    start, before, full, edges = split(tl.min(first, 0), tl.max(first, 0), tl.min(end, 0), tl.max(end, 0), BLOCK_N)
    q = load(Q, q_strides, b, h, m, T, True, D, BLOCK_M, WIDTH)
    do = load(dOut, do_strides, b, h, m, T, True, D, BLOCK_M, WIDTH)
    stats = tl.cast(pid // tiles, tl.int64) * T_pad + rows
    lse, delta = tl.load(LSE + stats)[:, None], tl.load(Delta + stats)[:, None]
    dq, zero = tl.zeros([BLOCK_M, WIDTH], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for EDGE in tl.static_range(1, -1, -1):
        for i in tl.range(0, edges if EDGE else full, disable_licm=True):
            n = block(i, EDGE, start, before, full) * BLOCK_N
            k = load(K, k_strides, b, h // G, n, S, EDGE, D, BLOCK_N, WIDTH)
            p = tl.exp2(dot(q, k.T, zero) * scale_log2 - lse)
            if EDGE: p = hide(p, n + tl.arange(0, BLOCK_N)[None, :], first[:, None], end[:, None], 0.0, WINDOW or DOC)
            v = load(V, v_strides, b, h // G, n, S, EDGE, D, BLOCK_N, WIDTH)
            ds = p * (dot(do, v.T, zero) - delta)
            dq = dot(ds.to(k.dtype), k, dq)
    store(dQ, dq_strides, b, h, m, T, dq * scale, D, BLOCK_M, WIDTH)

# ---------------------------------------------------------------------------- decode: few queries against a long cache
# One program per tile of queries would leave most of the GPU idle, so several share its keys (Flash-Decoding, Dao et al. 2023);
# o = sum_n w_n o_n / sum_n w_n, w_n = exp(L_n), joins their parts. To fill a tile, the query heads of a group share one.

@jit
def decode_kernel(Q, K, V, Lengths, Part, LSE, q_strides, k_strides, v_strides, p_strides, H, G, T, S, splits, window, scale,
                  D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One of `splits` shares of the keys against one tile of queries: writes that part's output and log-sum-exp (see finish)."""
    tiles = tl.cdiv(G * T, BLOCK_M)
    pid = tl.program_id(0)
    part, m, row_kv = pid % splits, pid // splits % tiles, pid // splits // tiles
    kv, b = row_kv % (H // G), row_kv // (H // G)
    r, d = m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)     # row r of the tile is query r // G of head kv * G + r % G
    inside = (r[:, None] < G * T) & (d[None, :] < D)
    b, h, t = tl.cast(b, tl.int64), (kv * G + r % G).to(tl.int64), (r // G).to(tl.int64)
    at = b * q_strides[0] + h * q_strides[1] + t * q_strides[2]
    q = tl.load(Q + at[:, None] + d[None, :] * q_strides[3], mask=inside, other=0.0)

    length = tl.minimum(tl.load(Lengths + b), S)
    first, end = bounds(tl.minimum(r // G, T - 1), Lengths, T, length, window, True, WINDOW, False)    # Lengths as doc: not read
    start, stop = tl.min(first, 0) // BLOCK_N, tl.cdiv(tl.max(end, 0), BLOCK_N)
    share = tl.cdiv(tl.maximum(stop - start, 0), splits)                # blocks per split, by the length of this very row
    start += part * share
    state = empty_state(BLOCK_M, WIDTH)
    for i in range(start, tl.minimum(start + share, stop)):
        n = i * BLOCK_N
        k = load(K, k_strides, b, kv, n, length, True, D, BLOCK_N, WIDTH)
        v = load(V, v_strides, b, kv, n, length, True, D, BLOCK_N, WIDTH)
        s = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        s = hide(s, n + tl.arange(0, BLOCK_N)[None, :], first[:, None], end[:, None], float("-inf"), WINDOW)
        state = online_softmax(s, v, *state, scale)
    out, lse = finish(*state)
    at = b * p_strides[0] + h * p_strides[1] + t * p_strides[2] + part * p_strides[3]
    tl.store(Part + at[:, None] + d[None, :] * p_strides[4], out.to(Part.dtype.element_ty), mask=inside)
    tl.store(LSE + ((b * H + h) * T + t) * splits + part, lse, mask=r < G * T)

@jit
def combine_kernel(Part, LSE, Out, o_strides, H, T, splits, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """Average a query's parts, weighted by exp(L): the online softmax all at once. Part: (B, H, T, splits, D), LSE without D."""
    row = tl.cast(tl.program_id(0), tl.int64)
    t, h, b = row % T, row // T % H, row // T // H
    i, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    lse = tl.load(LSE + row * splits + i, mask=i < splits, other=float("inf"))
    lse = tl.where(lse == float("inf"), float("-inf"), lse)             # this part saw nothing: weight 0
    w = tl.exp2(lse - tl.maximum(tl.max(lse, 0), -3.0e38))
    part = tl.load(Part + (row * splits + i)[:, None] * D + d[None, :], mask=(i < splits)[:, None] & (d < D)[None, :], other=0.0)
    out = tl.sum(part * w[:, None], 0) / tl.maximum(tl.sum(w, 0), 1.0)  # sum(w) >= 1, or 0 if no part saw anything
    at = b * o_strides[0] + h * o_strides[1] + t * o_strides[2] + d * o_strides[3]
    tl.store(Out + at, out.to(Out.dtype.element_ty), mask=d < D)

# ---------------------------------------------------------------------------- launches
# Lists of (kernel, number of programs, arguments, options), built apart from run: the report compiles the same without a GPU.

# (BLOCK_M, BLOCK_N, warps, stages) by kernel, architecture and WIDTH. 80: loads by pointers, for any GPU and any tensor; 90, 100:
# copy engine and wgmma (compute capability 9.0) or tcgen05 (10.x). At 90, WIDTH 128 and the backward's 64 are the fastest of
# dozens timed on an H100; the rest are chosen by registers and shared memory. The backward's BLOCK_M must divide 128: new_stats.
TILES = {
    "forward": {80: {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 16, 4, 2)},
                90: {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
                100: {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)}},
    "dkdv": {80: {64: (32, 64, 4, 2), 128: (64, 64, 8, 1), 256: (32, 32, 8, 1)},
             90: {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 64, 8, 1)}},
    "dq": {80: {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 1)},
           90: {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 64, 8, 1)}},
    "decode": {80: {64: (16, 64, 4, 2), 128: (16, 64, 4, 2), 256: (16, 32, 4, 2)}},
}
FLOAT32 = {64: (16, 32, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}        # full precision has no matrix units: for checking

def architecture(device):
    """The key into TILES for a device. On the CPU, under the interpreter, any key would do."""
    major = torch.cuda.get_device_properties(device).major if device.type == "cuda" else 8
    return {9: 90, 10: 100}.get(major, 80)

def copy_engine(arch, *tensors):
    """Whether the copy engine (TMA), which saves registers, can load all of these tensors: 16-bit elements, contiguous rows,
    address and other strides multiples of 16 bytes, no stride zero or as large as 2^40 bytes."""
    return arch >= 90 and all(x.numel() > 0 and x.element_size() == 2 and x.stride(3) == 1 and x.data_ptr() % 16 == 0 and
                              all(0 < stride < 2 ** 39 and stride % 8 == 0 for stride in x.stride()[:3]) for x in tensors)

def tile_options(which, arch, tma, q, **mask):
    """-> BLOCK_M, BLOCK_N, keywords for the kernel, and tiled(x, rows): what load takes for x when a tile has that many rows."""
    width = max(16, triton.next_power_of_2(q.shape[3]))
    def tiled(x, rows): return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, width]) if tma else x
    if q.dtype == torch.float32: table = FLOAT32
    else: table = TILES[which].get(arch, TILES[which][90]) if tma else TILES[which][80]     # the backward at 100 uses 90's tiles
    M, N, warps, stages = table[max(64, width)]
    options = dict(D=q.shape[3], WIDTH=width, BLOCK_M=M, BLOCK_N=N, num_warps=warps, num_stages=stages, **mask)
    return M, N, options, tiled

def forward_launches(q, k, v, out, lse, causal, window, scale, doc_start, arch):
    (B, H, T, _), (K, S), tma = q.shape, k.shape[1:3], copy_engine(arch, q, k, v)
    M, N, options, tiled = tile_options("forward", arch, tma, q, CAUSAL=causal, WINDOW=0 < window < S, DOC=doc_start is not None)
    doc = lse if doc_start is None else doc_start                       # any pointer: not read without documents
    args = (tiled(q, M), tiled(k, N), tiled(v, N), out, lse, doc, q.stride(), k.stride(), v.stride(), out.stride(),
            H, H // K, T, S, lse.shape[2], min(window, S), scale * math.log2(math.e))
    return [(forward_kernel, triton.cdiv(T, 2 * M if tma else M) * H * B, args, options)]      # 2 M rows: forward_kernel's COUNT

def backward_launches(q, k, v, out, lse, dout, dq, dk, dv, delta, causal, window, scale, doc_start, arch):
    (B, H, T, D), (K, S), T_pad, tma = q.shape, k.shape[1:3], lse.shape[2], copy_engine(arch, q, k, v, dout)
    launches = [(delta_kernel, T_pad // 64 * H * B, (out, dout, delta, out.stride(), dout.stride(), H, T, T_pad),
                 dict(D=D, WIDTH=triton.next_power_of_2(D), BLOCK_M=64, num_warps=8))]
    doc = lse if doc_start is None else doc_start
    strides = (q.stride(), k.stride(), v.stride(), dout.stride())
    sizes = (H, H // K, T, S, T_pad, min(window, S), scale, scale * math.log2(math.e))
    for which in ("dkdv", "dq"):
        M, N, options, tiled = tile_options(which, arch, tma, q, CAUSAL=causal, WINDOW=0 < window < S, DOC=doc_start is not None)
        inputs = (tiled(q, M), tiled(k, N), tiled(v, N), tiled(dout, M), lse, delta)
        if which == "dkdv":
            ends = lse if doc_start is None else document_ends(doc_start, S, N)
            args = (*inputs, dk, dv, doc, ends, *strides, dk.stride(), dv.stride(), *sizes)
            options |= dict(GROUPED=H > K or not tma)       # loads by pointers: without the division, registers spill
            launches.append((dkdv_kernel, triton.cdiv(S, N) * K * B, args, options))
        else:
            launches.append((dq_kernel, triton.cdiv(T, M) * H * B, (*inputs, dq, doc, *strides, dq.stride(), *sizes), options))
    return launches

def document_ends(doc_start, S, block):
    """dkdv_kernel's full_stop and stop for each block of keys, as far as documents limit them: every query before full_stop sees
    the whole block, no query from stop on sees any of it. (B, blocks, 2)"""
    first = torch.arange(0, S, block, device=doc_start.device, dtype=doc_start.dtype).repeat(doc_start.shape[0], 1)
    rising, falling = doc_start.cummax(1).values, doc_start.flip(1).cummin(1).values.flip(1)
    return torch.stack([torch.searchsorted(rising, first, right=True), torch.searchsorted(falling, first + block)], -1).int()

def decode_launches(q, k, v, lengths, out, window, scale, arch, processors):
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    rows = T * H // K                                                   # that share a kv head: T queries of G heads
    _, N, options, _ = tile_options("decode", arch, False, q, WINDOW=0 < window < S)
    M = options["BLOCK_M"] = min(64, max(16, triton.next_power_of_2(rows)))         # matrix units take at least 16 rows
    tiles, blocks = triton.cdiv(rows, M) * K * B, triton.cdiv(S, N)
    splits = max(1, min(processors // max(tiles, 1), blocks)) if blocks > 4 else 1  # to fill the GPU; short caches stay whole
    part = out[:, :, :, None] if splits == 1 else q.new_empty(B, H, T, splits, D, dtype=torch.float32)      # only one: the output
    lse = q.new_empty(B, H, T, splits, dtype=torch.float32)
    args = (q, k, v, lengths, part, lse, q.stride(), k.stride(), v.stride(), part.stride(), H, H // K, T, S, splits,
            min(window, S), scale * math.log2(math.e))
    combine = dict(D=D, WIDTH=options["WIDTH"], SPLITS=triton.next_power_of_2(splits))
    launches = [(decode_kernel, tiles * splits, args, options),
                (combine_kernel, B * H * T, (part, lse, out, out.stride(), H, T, splits), combine)]
    return launches[:1] if splits == 1 else launches

def run(launches, x):
    with torch.cuda.device_of(x):                           # select the GPU that x is on; no effect on the CPU
        for kernel, programs, args, options in launches:
            if programs > 0: kernel[(programs,)](*args, **options)

# ---------------------------------------------------------------------------- the operators PyTorch sees
# torch.compile does not look inside: a fake of each tells it the shapes of the outputs.

def empty_like(x):
    """Shape (B, H, T, D), laid out as (B, T, H, D), so that a transformer can concatenate its heads without a copy."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)

def near(x):
    """x, copied if its strides are so large that a tile (128 x 256) may span 2^31 elements: offsets inside a tile are 32-bit."""
    return x.contiguous() if 127 * x.stride(2) + 255 * x.stride(3) >= 2 ** 31 else x

def new_stats(q):
    """(B, H, T_pad) float32, T padded to a multiple of 128. The LSE stays +inf past T: the backward gets p = 0 without a mask."""
    return q.new_full((q.shape[0], q.shape[1], (q.shape[2] + 127) // 128 * 128), math.inf, dtype=torch.float32)

@torch.library.custom_op("flash_attn_py::forward", mutates_args=())
def forward_op(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float,
               doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = empty_like(q), new_stats(q)
    run(forward_launches(q, k, v, out, lse, causal, window, scale, doc_start, architecture(q.device)), q)
    return out, lse

@torch.library.custom_op("flash_attn_py::backward", mutates_args=())
def backward_op(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, window: int, scale: float,
                doc_start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dout = dout.contiguous() if dout.stride(3) != 1 or 0 in dout.stride() else near(dout)     # of a sum: one number, expanded
    dq, dk, dv, delta, arch = empty_like(q), empty_like(k), empty_like(v), torch.empty_like(lse), architecture(q.device)
    run(backward_launches(q, k, v, out, lse, dout, dq, dk, dv, delta, causal, window, scale, doc_start, arch), q)
    return dq, dk, dv

# flexible_layout: any strides will do. Otherwise the compiler copies `lengths` anew in every layer, a kernel each
@torch.library.custom_op("flash_attn_py::decode", mutates_args=(), tags=[torch.Tag.flexible_layout])
def decode_op(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int, scale: float) -> Tensor:
    out, cuda = empty_like(q), q.device.type == "cuda"
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if cuda else 28  # 28: odd splits in tests
    run(decode_launches(q, k, v, lengths, out, window, scale, architecture(q.device), processors), q)
    return out

forward_op.register_fake(lambda q, k, v, causal, window, scale, doc_start: (empty_like(q), new_stats(q)))
backward_op.register_fake(lambda dout, q, k, v, *rest: (empty_like(q), empty_like(k), empty_like(v)))
decode_op.register_fake(lambda q, k, v, lengths, window, scale: empty_like(q))

def save_for_backward(ctx, inputs, output):
    q, k, v, ctx.causal, ctx.window, ctx.scale, doc_start = inputs
    ctx.set_materialize_grads(False)                        # or autograd fills a tensor with zeros for dlse
    ctx.save_for_backward(q, k, v, *output, doc_start)

def backward(ctx, dout, dlse):                              # lse stays inside flash_attention: dlse is None
    if dout is None: return (None,) * 7
    *saved, doc_start = ctx.saved_tensors
    return *backward_op(dout, *saved, ctx.causal, ctx.window, ctx.scale, doc_start), None, None, None, None

forward_op.register_autograd(backward, setup_context=save_for_backward)

# ---------------------------------------------------------------------------- what people call

def missing_tool():
    """What Triton lacks here to build what launches its kernels on a GPU, in one line, or None."""
    if triton is None: return "Triton is not installed: pip install triton (Linux only)"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler: install gcc, or set CC"
    header = os.path.join(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    return None if os.path.exists(header) else f"Triton needs {header}: install Python's headers (python3-dev)"

MISSING = missing_tool()        # once, because why_not runs in every call
TYPES = torch.float16, torch.bfloat16, torch.float32

def why_not(q, k, v, dropout_p=0.0):
    """None if the kernels can run on such tensors, else one line saying why not. Does not synchronise or break a graph."""
    if triton is None: return MISSING
    if dropout_p > 0: return f"attention dropout is {dropout_p}, which the kernels do not support"
    if q.dtype not in TYPES or not q.dtype == k.dtype == v.dtype:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: all must be one of float16, bfloat16, float32"
    if not 1 <= q.shape[-1] <= 256: return f"head dim is {q.shape[-1]}, the kernels support 1 to 256"
    if not q.device == k.device == v.device: return f"q, k, v are on {q.device}, {k.device}, {v.device}: must be on one device"
    if q.device.type == "cpu" and INTERPRET: return None
    if q.device.type != "cuda" or torch.version.hip:
        return f"q, k, v are on {q.device.type}, not an NVIDIA GPU (or the CPU with TRITON_INTERPRET=1, set before Python starts)"
    if MISSING: return MISSING
    gpu = torch.cuda.get_device_properties(q.device)
    return f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, the kernels need 8.0 or newer" if gpu.major < 8 else None

def check(q, k, v, window, scale):
    """-> q, k, v and scale as the kernels need them: of autocast's type, near; scale > 0. Raises for what they cannot take."""
    if torch.is_autocast_enabled(device := "cuda" if q.is_cuda else "cpu"):             # as torch SDPA: all but float64
        q, k, v = (x.to(torch.get_autocast_dtype(device)) if x.dtype in TYPES else x for x in (q, k, v))
    if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)):        # it would silently be zero
        raise ValueError("the kernels have no forward-mode derivative (jvp): use attention_ref")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or \
            0 in (q.shape[1], k.shape[1]) or q.shape[1] % k.shape[1]:
        raise ValueError(f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
                         "q must be (B, H, T, D), k and v (B, K, S, D), H a multiple of K")
    if not isinstance(window, (int, torch.SymInt)) or isinstance(window, bool) or window < 0:
        raise ValueError(f"window is {window!r}: give the number of keys a query may see, or 0 for all")
    if isinstance(scale, Tensor): raise ValueError("scale is a tensor: give a number, or multiply q by it")
    if reason := why_not(q, k, v): raise ValueError(f"{reason}; or use attention_ref or torch SDPA, with one type and device")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if scale <= 0:                                      # subtle: max(s * scale) is max(s) * scale only if scale > 0
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    return near(q), near(k), near(v), scale

def flash_attention(q, k, v, causal=True, window=0, scale=None, doc_start=None):
    """softmax(scale * q k^T + mask) v. q: (B, H, T, D) (in Dao's flash_attn (B, T, H, D): transpose(1, 2)); k, v: (B, K, S, D), H
    a multiple of K: query head h reads kv head h // (H / K). float16, bfloat16 or float32 (autocast: its type); D up to 256; any
    lengths and strides -> (B, H, T, D). Differentiable once, by backward(); torch.func.grad and jvp are not supported; vmap
    is, by a loop of launches.

    causal: query i sees keys up to its own position, pos = i + (S - T), so that the last query sees the last key. Torch SDPA is
        and Dao's flash_attn are not causal by default. Dao's causal is ours; SDPA's is_causal has the first query see the first
        key only, which differs if T != S
    window: if > 0, query i sees only keys > pos - window: if causal, the last `window`, its own included (Dao's window_size of
        (window - 1, 0)); if not, all later, too
    scale: None for 1 / sqrt(D)
    doc_start: integers (B, T); query i of batch row b sees no key before doc_start[b, i]. If causal, it serves
        sequences packed into one row, bounds cu (cu_seqlens): cu[:-1].repeat_interleave(cu.diff(), output_size=T)[None]
        padding on the left, pads (B,) tokens: pads[:, None].expand(B, T); on the right it needs no mask
    A query that may see nothing yields zeros. ValueError if arguments do not fit or the kernels cannot run here (see why_not)."""
    if not isinstance(causal, (bool, torch.SymBool)):
        raise ValueError(f"causal is {causal!r:.20}: True or False; there is no mask or dropout argument")
    q, k, v, scale = check(q, k, v, window, scale)
    if doc_start is not None:
        if doc_start.shape != (shape := (q.shape[0], q.shape[2])) or doc_start.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"doc_start is {doc_start.dtype} {tuple(doc_start.shape)}: must be int32 or int64 (B, T) = {shape}")
        doc_start = doc_start.to(q.device).clamp(0, k.shape[2]).to(torch.int32).contiguous()    # clamp first: 2^32 would become 0
    return forward_op(q, k, v, causal, window, scale, doc_start)[0]

def flash_decode(q, k, v, lengths, window=0, scale=None):
    """Causal attention of the newest T tokens of each batch row over a cache whose rows differ in length. No gradient.

    q: (B, H, T, D); k, v: (B, K, S, D), the cache or a slice of it; lengths: integers (B,), the cached tokens of each row
    INCLUDING the new ones: query i of row b is at position lengths[b] - T + i. Keys beyond are not read. A length beyond S counts
    as S, a query at a negative position yields zeros -> (B, H, T, D)"""
    q, k, v, scale = check(q, k, v, window, scale)
    if lengths.shape != (q.shape[0],) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths is {lengths.dtype} {tuple(lengths.shape)}: must be int32 or int64 (B,) = {(q.shape[0],)}")
    return decode_op(q, k, v, lengths.to(q.device, torch.int32).contiguous(), window, scale)

# ---------------------------------------------------------------------------- the report, for GPUs this machine need not have

def shipped(arch, D, dtype=torch.bfloat16, causal=True, window=0, docs=False, H=8, K=8, T=1024, S=1024, aligned=True):
    """[(name, compiled kernel)] for one architecture and head dim: the launches above, on tensors without memory (meta)."""
    from triton.backends.compiler import GPUTarget
    def tensor(heads, rows):
        return torch.empty(2, rows, heads, D if aligned else D + 1, dtype=dtype, device="meta")[..., :D].transpose(1, 2)
    triton.runtime.driver.set_active(types.SimpleNamespace(             # in place of a GPU's driver: all that the compiler asks
        get_current_device=lambda: arch, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32)))
    q, one, k, v, lse = tensor(H, T), tensor(H, 1), tensor(K, S), tensor(K, S), new_stats(tensor(H, T))
    ints = torch.empty(2, T, dtype=torch.int32, device="meta")
    launches = forward_launches(q, k, v, q, lse, causal, window, 0.1, ints if docs else None, arch)
    launches += backward_launches(q, k, v, q, lse, q, q, k, v, lse, causal, window, 0.1, ints if docs else None, arch)
    launches += decode_launches(one, k, v, ints, one, window, 0.1, arch, 132)
    return [(kernel.fn.__name__.removesuffix("_kernel"), kernel.warmup(*args, grid=(1,), **options))
            for kernel, _, args, options in launches]

def usage(kernel, arch):
    """What a compiled kernel uses: registers per thread, bytes spilled, shared memory; ptxas warnings; programs that fit on one
    multiprocessor, with its 65536 registers (in eights per thread), shared memory (1 KB more per program), 64 warps and, on
    sm_100, 512 columns of tensor memory."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}", "/dev/stdin", "-o", "/dev/null"]
    log = subprocess.run(command, input=kernel.asm["ptx"], capture_output=True, text=True, check=True).stderr
    registers, spilled = int(re.search(r"Used (\d+) registers", log)[1]), sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    warps, shared, room = kernel.metadata.num_warps, kernel.metadata.shared, {80: 164, 90: 228, 100: 228}[arch] * 1024
    columns = getattr(kernel.metadata, "tmem_size", 0) or 1
    programs = min(65536 // (triton.cdiv(registers, 8) * 8 * 32 * warps), room // (shared + 1024), 64 // warps, 512 // columns)
    return dict(registers=registers, spilled=spilled, shared=shared, warps=warps, programs=programs,
                warnings=re.findall(r"C75\d\d", log))

def report():
    if triton is None: raise SystemExit(MISSING)
    if INTERPRET: raise SystemExit("TRITON_INTERPRET is set, under which nothing is compiled: unset it for the report")
    print("arch    D  pass      warps  registers  bytes spilled  shared memory  programs per multiprocessor")
    for arch, D in ((arch, D) for arch in (80, 90, 100) for D in (64, 128, 256)):
        for name, kernel in shipped(arch, D):
            u = usage(kernel, arch)
            print(f"{arch:4} {D:4}  {name:8} {u['warps']:6} {u['registers']:10} {u['spilled']:14} {u['shared']:14}"
                  f" {u['programs']:10}", *u["warnings"], flush=True)

if __name__ == "__main__":
    report()
