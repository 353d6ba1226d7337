"""Attention, backward: the kernels; what they compute and how they are launched is told in attention_backward.py.

A score in base 2 is `scale * s`, or `scale * tanh(softcap * s)` if CAPPED, where s = q k^T. Statistics of a query:
lse in base 2, +inf where no key is seen (then p = exp2(s - inf) = 0 without a mask), and delta; both in rows of
`pitch` numbers, a multiple of 4 for descriptors.

Letters: Tq query tokens, Tk key tokens, N query heads, K kv heads, GROUP = N / K, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megallm_kernels.attention_tiles import document_of, load_tile, tanh, tile_and_head, visible


@triton.jit
def _stats_start(first_token, sequence):
    """Where a sequence's statistics begin in a row: a multiple of 4, for descriptors, and clear of the one before."""
    return (first_token // 4 + sequence) * 4


@triton.jit
def _rows_of(offsets, num_queries, num_sequences, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """(sequence, its first token, the token past its end, tile inside it) of this program."""
    if PACKED:
        sequence, start, tile = document_of(tl.program_id(0), offsets, num_sequences, ROWS)
        end = tl.load(offsets + sequence + 1, mask=sequence < num_sequences, other=num_queries)
    else:
        tiles = tl.cdiv(num_queries, ROWS)
        sequence = tl.program_id(0) // tiles
        tile = tl.program_id(0) % tiles
        start = sequence * num_queries
        end = start + num_queries
    return sequence, start, end, tile


@triton.jit(do_not_specialize=["num_queries", "num_sequences", "pitch"])
def prepare_kernel(
    out, dout, lse, dlse, stats, offsets, dout_token, dout_head, num_queries, num_sequences, pitch,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_DLSE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The statistics of ROWS queries of one head: lse in base 2, delta = sum(out dout) - dlse.

    num_queries: Tq if PACKED, else Sq.
    """
    head = tl.program_id(1)
    num_rows = num_queries
    if not PACKED:
        num_rows = num_queries * num_sequences
    sequence, start, end, tile = _rows_of(offsets, num_queries, num_sequences, ROWS, PACKED)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = row < end - start
    both = inside[:, None] & (column < D)[None, :]
    token = tl.cast(start + row, tl.int64)
    at = (token * (HEADS * D) + head * D)[:, None] + column[None, :]
    o = tl.load(out + at, mask=both, other=0.0).to(tl.float32)
    dout_at = (token * dout_token + tl.cast(head, tl.int64) * dout_head)[:, None] + column[None, :]
    do = tl.load(dout + dout_at, mask=both, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, axis=1)
    at_row = tl.cast(head, tl.int64) * num_rows + token
    natural = tl.load(lse + at_row, mask=inside, other=float("-inf"))
    if HAS_DLSE:
        delta -= tl.load(dlse + at_row, mask=inside, other=0.0).to(tl.float32)
    alive = natural != float("-inf")
    to = stats + tl.cast(head, tl.int64) * pitch + _stats_start(start, sequence) + row
    tl.store(to, tl.where(alive, natural * 1.4426950408889634, float("inf")), mask=inside)
    tl.store(to + tl.cast(HEADS, tl.int64) * pitch, tl.where(alive, delta, 0.0), mask=inside)


@triton.jit(do_not_specialize=["num_queries", "num_sequences", "pitch"])
def convert_kernel(
    accumulator, dq, offsets, dq_token, dq_head, num_queries, num_sequences, pitch, factor,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dq = factor * accumulator [N, D, pitch] fp32, rounded once; ROWS queries of one head, as in prepare_kernel."""
    head = tl.program_id(1)
    sequence, start, end, tile = _rows_of(offsets, num_queries, num_sequences, ROWS, PACKED)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    both = (row < end - start)[:, None] & (column < D)[None, :]
    source = accumulator + tl.cast(head, tl.int64) * D * pitch + _stats_start(start, sequence)
    x = tl.load(source + (tl.cast(column, tl.int64) * pitch)[:, None] + row[None, :], mask=both.T, other=0.0)
    x = x.T * tl.cast(factor, tl.float32)
    at = (tl.cast(start + row, tl.int64) * dq_token + tl.cast(head, tl.int64) * dq_head)[:, None] + column[None, :]
    tl.store(dq + at, x.to(dq.dtype.element_ty), mask=both)


@triton.jit
def _store_gradient(target, tile, factor, start, first, length, token_stride, head, head_stride,
                    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows `first` on of a sequence that begins at token `start` and has `length` tokens."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    token = tl.cast(start + row, tl.int64)
    at = (token * token_stride)[:, None] + (tl.cast(head, tl.int64) * head_stride + column)[None, :]
    inside = (row < length)[:, None] & (column < D)[None, :]
    tl.store(target + at, (tile * factor).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _load_stats(stats, number, first, pitch, limit, other, ROWS: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr):
    """ROWS numbers of row `number` of the statistics from place `first` on; MASKED: `limit` of them, then `other`."""
    inner = tl.arange(0, ROWS)
    if TMA:
        numbers = stats.load([number, first]).reshape(ROWS)
        if MASKED:
            numbers = tl.where(inner < limit, numbers, other)
    else:
        at = stats + tl.cast(number, tl.int64) * pitch + first + inner
        if MASKED:
            numbers = tl.load(at, mask=inner < limit, other=other)
        else:
            numbers = tl.load(at)
    return numbers


@triton.jit
def _queries_of_keys(
    dk, dv, keys, values, q, dout, stats, dq,
    key, q_start, stats_start, num_queries, kv_head, pitch, count_a, start_a, count_b, start_b,
    q_token, q_head, dout_token, dout_head, scale, softcap, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, TMA: tl.constexpr, ADD_DQ: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """For each head of the group: count_a tiles of queries from start_a on, then count_b from start_b on.

    key: the number, within the sequence, of the first query that sees it (j - (Sk - Sq)).
    """
    inner = tl.arange(0, BLOCK_M)
    precision: tl.constexpr = "tf32x3" if keys.dtype == tl.float32 else "tf32"
    last_key = num_queries if ADD_DQ else 2147483647  # a key past the end only harms dq: its dk and dv are not stored
    end = q_start + num_queries
    each = count_a + count_b
    # disable_licm: addresses computed ahead would take the registers that dk and dv need; without TMA it is worse
    for i in tl.range(0, GROUP * each, num_stages=STAGES, warp_specialize=WARP_SPECIALIZE, disable_licm=TMA):
        head = kv_head * GROUP + i // each
        tile = i % each
        first = tl.where(tile < count_a, start_a + tile * BLOCK_M, start_b + (tile - count_a) * BLOCK_M)
        queries = load_tile(q, q_start + first, q_token, head, q_head, end, D, BLOCK_M, BLOCK_D, TMA, MASKED)
        s = tl.dot(keys, queries.T, input_precision=precision)  # transposed: p and ds are operands as they are
        left = num_queries - first
        lse = _load_stats(stats, head, stats_start + first, pitch, left, float("inf"), BLOCK_M, TMA, MASKED)
        if CAPPED:
            s = tanh(s * softcap)
        p = tl.exp2(s * scale - lse[None, :])
        if MASKED:
            seen = visible((first + inner)[None, :], key[:, None], last_key, window, CAUSAL, WINDOWED)
            p = tl.where(seen, p, 0.0)
        do = load_tile(dout, q_start + first, dout_token, head, dout_head, end, D, BLOCK_M, BLOCK_D, TMA, MASKED)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=precision)
        dp = tl.dot(values, do.T, input_precision=precision)
        delta = _load_stats(stats, HEADS + head, stats_start + first, pitch, left, 0.0, BLOCK_M, TMA, MASKED)
        ds = p * (dp - delta[None, :])
        if CAPPED:
            ds = ds * (1.0 - s * s)
        ds = ds.to(queries.dtype)
        dk = tl.dot(ds, queries, dk, input_precision=precision)
        if ADD_DQ:
            part = tl.dot(keys.T, ds, input_precision=precision)  # transposed: ds is read where dk's product has it
            to = stats_start + first
            if TMA:  # queries past the sequence have ds = 0
                dq.atomic_add([head, 0, to], part.reshape(1, BLOCK_D, BLOCK_M))
            else:
                column = tl.arange(0, BLOCK_D)
                at = dq + (tl.cast(head, tl.int64) * D * pitch + to) + (tl.cast(column, tl.int64) * pitch)[:, None]
                inside = (column < D)[:, None] & (inner < left)[None, :]
                tl.atomic_add(at + inner[None, :], part, mask=inside, sem="relaxed")
    return dk, dv


@triton.jit(do_not_specialize=[
    "num_queries", "num_keys", "num_sequences", "num_tiles", "section", "window", "pitch"
])  # fmt: skip
def keys_kernel(
    q, k, v, dout, stats, dq, dk, dv, table,
    q_token, q_head, k_token, k_head, v_token, v_head, dout_token, dout_head, dk_token, dk_head, dv_token, dv_head,
    scale, softcap, factor, num_queries, num_keys, num_sequences, num_tiles, section, window, pitch,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PACKED: tl.constexpr,
    TMA: tl.constexpr, ADD_DQ: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one kv head, over its group's queries; ADD_DQ: adds their dq / factor to dq.

    num_queries: Tq if PACKED, else Sq; num_keys: Sk (unless PACKED).
    """
    if PACKED:
        number, head = tile_and_head(tl.program_id(0), num_tiles, HEADS // GROUP, section)
        entry = table + number * 5
        k_start = tl.load(entry)
        num_keys = tl.load(entry + 1)
        q_start = tl.load(entry + 2)
        length = tl.load(entry + 3)
        tile = tl.load(entry + 4)
        length = tl.where(tile < 0, 0, length)  # an idle program has no query; its keys are past the end
        tile = tl.cdiv(num_keys, BLOCK_N) - 1 - tile  # the first keys are seen by most queries: first
        stats_start = _stats_start(q_start, number - tile - k_start // BLOCK_N)
    else:
        number, head = tile_and_head(tl.program_id(0), num_tiles, HEADS // GROUP * num_sequences, section)
        q_start = head // (HEADS // GROUP) * num_queries
        stats_start = _stats_start(q_start, head // (HEADS // GROUP))
        k_start = head // (HEADS // GROUP) * num_keys
        length = num_queries
        tile = number
        head = head % (HEADS // GROUP)
    first = tile * BLOCK_N
    shift = num_keys - length
    # queries low to high see a key of the tile, low_full to high_full see all of them
    low = 0
    low_full = 0
    high = length
    high_full = length // BLOCK_M * BLOCK_M
    if CAUSAL:
        low = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M
        low_full = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M
    if WINDOWED:
        high = tl.minimum(length, tl.maximum(first + BLOCK_N - 1 + window - shift, 0))
        high_full = tl.minimum(high_full, tl.maximum(first + window - shift, 0) // BLOCK_M * BLOCK_M)
    high = tl.maximum(tl.cdiv(high, BLOCK_M) * BLOCK_M, low)
    low_full = tl.minimum(low_full, high)
    high_full = tl.maximum(high_full, low_full)
    if ADD_DQ:  # a key past the end has to be masked: its ds would reach dq
        high_full = tl.where(first + BLOCK_N > num_keys, low_full, high_full)
    key = first - shift + tl.arange(0, BLOCK_N)
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    end = k_start + num_keys
    keys = load_tile(k, k_start + first, k_token, head, k_head, end, D, BLOCK_N, BLOCK_D, TMA, True)
    values = load_tile(v, k_start + first, v_token, head, v_head, end, D, BLOCK_N, BLOCK_D, TMA, True)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for part in tl.static_range(2):  # masked: diagonal, the window's edge, the last queries; then without masks
        acc_k, acc_v = _queries_of_keys(
            acc_k, acc_v, keys, values, q, dout, stats, dq, key, q_start, stats_start, length, head, pitch,
            (low_full - low) // BLOCK_M if part == 0 else (high_full - low_full) // BLOCK_M,
            low if part == 0 else low_full,
            (high - high_full) // BLOCK_M if part == 0 else 0, high_full,
            q_token, q_head, dout_token, dout_head, scale, softcap, window,
            HEADS, GROUP, D, BLOCK_M, BLOCK_D, CAUSAL, WINDOWED, CAPPED, TMA, ADD_DQ, WARP_SPECIALIZE, STAGES,
            part == 0,
        )  # fmt: skip
    factor = tl.cast(factor, tl.float32)
    _store_gradient(dk, acc_k, factor, k_start, first, num_keys, dk_token, head, dk_head, D, BLOCK_N, BLOCK_D)
    _store_gradient(dv, acc_v, 1.0, k_start, first, num_keys, dv_token, head, dv_head, D, BLOCK_N, BLOCK_D)


@triton.jit
def _keys_of_queries(
    dq, queries, do, lse, delta, k, v, query, k_start, num_keys, kv_head, count_a, start_a, count_b, start_b,
    k_token, k_head, v_token, v_head, scale, softcap, window,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """count_a tiles of keys from start_a on, then count_b from start_b on."""
    column = tl.arange(0, BLOCK_N)
    precision: tl.constexpr = "tf32x3" if queries.dtype == tl.float32 else "tf32"
    end = k_start + num_keys
    for i in tl.range(0, count_a + count_b, num_stages=STAGES, warp_specialize=WARP_SPECIALIZE):
        first = tl.where(i < count_a, start_a + i * BLOCK_N, start_b + (i - count_a) * BLOCK_N)
        keys = load_tile(k, k_start + first, k_token, kv_head, k_head, end, D, BLOCK_N, BLOCK_D, TMA, MASKED)
        s = tl.dot(queries, keys.T, input_precision=precision)
        values = load_tile(v, k_start + first, v_token, kv_head, v_head, end, D, BLOCK_N, BLOCK_D, TMA, MASKED)
        dp = tl.dot(do, values.T, input_precision=precision)
        if CAPPED:
            s = tanh(s * softcap)
        p = tl.exp2(s * scale - lse[:, None])
        if MASKED:
            seen = visible(query[:, None], (first + column)[None, :], num_keys, window, CAUSAL, WINDOWED)
            p = tl.where(seen, p, 0.0)
        ds = p * (dp - delta[:, None])
        if CAPPED:
            ds = ds * (1.0 - s * s)
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=precision)
    return dq


@triton.jit(do_not_specialize=[
    "num_queries", "num_keys", "num_sequences", "num_tiles", "section", "window", "pitch"
])  # fmt: skip
def queries_kernel(
    q, k, v, dout, stats, dq, table,
    q_token, q_head, k_token, k_head, v_token, v_head, dout_token, dout_head, dq_token, dq_head,
    scale, softcap, factor, num_queries, num_keys, num_sequences, num_tiles, section, window, pitch,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PACKED: tl.constexpr,
    TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head. num_queries: Tq if PACKED, else Sq; num_keys: Sk (unless PACKED)."""
    if PACKED:
        number, head = tile_and_head(tl.program_id(0), num_tiles, HEADS, section)
        entry = table + number * 5
        q_start = tl.load(entry)
        length = tl.load(entry + 1)
        k_start = tl.load(entry + 2)
        num_keys = tl.load(entry + 3)
        tile = tl.load(entry + 4)
        stats_start = _stats_start(q_start, number - (tl.cdiv(length, BLOCK_M) - 1 - tile) - q_start // BLOCK_M)
    else:
        number, head = tile_and_head(tl.program_id(0), num_tiles, HEADS * num_sequences, section)
        q_start = head // HEADS * num_queries
        stats_start = _stats_start(q_start, head // HEADS)
        k_start = head // HEADS * num_keys
        length = num_queries
        tile = num_tiles - 1 - number  # the last tile sees most keys: first
        head = head % HEADS
    length = tl.where(tile < 0, 0, length)  # an idle program has no query and looks at no key
    num_keys = tl.where(tile < 0, 0, num_keys)
    first = tl.maximum(tile, 0) * BLOCK_M
    shift = num_keys - length
    # keys low to high are seen by a query of the tile, low_full to high_full by every one
    low = 0
    low_full = 0
    high = num_keys
    high_full = num_keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        high = tl.maximum(tl.minimum(num_keys, first + BLOCK_M + shift), 0)
        high_full = tl.maximum(tl.minimum(num_keys, first + shift + 1), 0) // BLOCK_N * BLOCK_N
    if WINDOWED:
        low = tl.maximum(first + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        low_full = tl.cdiv(tl.maximum(first + BLOCK_M + shift - window, 0), BLOCK_N) * BLOCK_N
    high = tl.maximum(tl.cdiv(high, BLOCK_N) * BLOCK_N, low)
    low_full = tl.minimum(low_full, high)
    high_full = tl.maximum(high_full, low_full)
    row = first + tl.arange(0, BLOCK_M)
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    end = q_start + length
    queries = load_tile(q, q_start + first, q_token, head, q_head, end, D, BLOCK_M, BLOCK_D, TMA, True)
    do = load_tile(dout, q_start + first, dout_token, head, dout_head, end, D, BLOCK_M, BLOCK_D, TMA, True)
    at = stats_start + first
    lse = _load_stats(stats, head, at, pitch, length - first, float("inf"), BLOCK_M, TMA, True)
    delta = _load_stats(stats, HEADS + head, at, pitch, length - first, 0.0, BLOCK_M, TMA, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for part in tl.static_range(2):  # without masks; then masked: the window's edge, diagonal, the last keys
        acc = _keys_of_queries(
            acc, queries, do, lse, delta, k, v, row + shift, k_start, num_keys, head // GROUP,
            (high_full - low_full) // BLOCK_N if part == 0 else (low_full - low) // BLOCK_N,
            low_full if part == 0 else low,
            0 if part == 0 else (high - high_full) // BLOCK_N, high_full,
            k_token, k_head, v_token, v_head, scale, softcap, window,
            D, BLOCK_N, BLOCK_D, CAUSAL, WINDOWED, CAPPED, TMA, WARP_SPECIALIZE, STAGES, part == 1,
        )  # fmt: skip
    factor = tl.cast(factor, tl.float32)
    _store_gradient(dq, acc, factor, q_start, first, length, dq_token, head, dq_head, D, BLOCK_M, BLOCK_D)
