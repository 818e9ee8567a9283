"""The kernel of `decode`. See there and `layout`.

Triton's language knows tuples that grow, but not Python's `(*a, b)`.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated,misc"

from __future__ import annotations

from sparsify.kernels.cuda._registers import tile_registers, zero_pairs
from sparsify.kernels.cuda.ptx import fence, sparse_product, start_next, wait_for_inputs
from sparsify.kernels.triton_jit import jit, tl


@jit
def split4(words: tl.tensor, T: tl.constexpr) -> tl.tuple:
    """(T, 4) to four of (T): the registers of one load."""
    even, odd = tl.split(tl.reshape(words, (T, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@jit
def float16_halves(word: tl.tensor) -> tl.tuple:
    """The two float16 numbers of each word, as float32."""
    low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@jit(do_not_specialize=["num_columns", "num_words"])
def arrange_kernel(
    inputs_ptr: tl.tensor,
    output_ptr: tl.tensor,
    num_columns: tl.tensor,
    num_words: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A row of inputs in the order of lanes: of every 16 words, those of a lane side by side.

    Word 4 i + q becomes word 4 q + i; words beyond the row's are zero.
    """
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = place // 16 * 16 + place % 4 * 4 + place % 16 // 4
    columns = num_columns // 2
    words = tl.load(inputs_ptr + token * columns + word, mask=word < columns, other=0)
    tl.store(output_ptr + token * num_words + place, words, mask=place < num_words)


@jit(do_not_specialize=["num_tokens", "num_rows", "num_columns", "num_steps"])
def decode_kernel(
    inputs_ptr: tl.tensor,
    values_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    output_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_steps: tl.tensor,
    KIND: tl.constexpr,
    IS_HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CUTS_COLUMNS: tl.constexpr,
    CUTS_STEPS: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    STEP_WARPS: tl.constexpr,
    U: tl.constexpr,
    IS_ARRANGED: tl.constexpr,
    OVERLAPS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
) -> None:
    """R row tiles of each of the ROW_WARPS of program_id(0), N tiles of 8 tokens.

    In a turn of the loop a warp reads all its words of U steps before it computes with any.
    """
    W: tl.constexpr = ROW_WARPS * STEP_WARPS
    T: tl.constexpr = 32 * W
    PIECES: tl.constexpr = 2 if KIND == "int4" or KIND == "nf4" else (
        4 if KIND == "int8" or KIND == "float8" else 8
    )  # fmt: skip
    GROUPS: tl.constexpr = 256 // WIDTH if WIDTH else 1  # of a step
    PER_GROUP: tl.constexpr = 8 // GROUPS  # tiles
    EMPTY: tl.constexpr = -0x77777778 if KIND == "int4" else (0x77777777 if KIND == "nf4" else 0)
    if OVERLAPS:
        start_next()
    thread = tl.arange(0, T)
    lane = thread % 32
    warp = thread // 32
    four = tl.arange(0, 4)[None, :]
    zero = tl.zeros((T,), tl.float32)
    row_tile = tl.program_id(0).to(tl.int64) * (R * ROW_WARPS)
    if ROW_WARPS > 1:
        # Those of one step are neighbours: what they read of the inputs comes from the same cache.
        row_tile += warp % ROW_WARPS * R
    columns = num_steps * 128 if IS_ARRANGED else num_columns // 2  # in words
    token_ptrs = ()
    sums = ()
    for n in tl.static_range(N):
        token = tl.minimum(8 * n + lane // 4, num_tokens - 1)  # what is too much is not stored
        place = lane % 4 * 4 if IS_ARRANGED else lane % 4
        token_ptrs = token_ptrs + (inputs_ptr + token * columns + place,)
        for _ in tl.static_range(R):
            sums = sums + ((zero, zero, zero, zero),)
    for turn in range(tl.cdiv(num_steps, STEP_WARPS * U)):
        first = turn * (STEP_WARPS * U) + warp // ROW_WARPS
        pieces = ()
        positions = ()
        scales = ()
        zeros = ()
        for u in tl.static_range(U):
            step = first + u * STEP_WARPS
            is_step = step < num_steps
            if CUTS_STEPS:
                step = tl.minimum(step, num_steps - 1)
            for r in tl.static_range(R):
                start = (row_tile + r) * num_steps
                words = positions_ptr + (start * 128 + (step * 128 + lane * 4))[:, None] + four
                positions = positions + (tl.load(words, eviction_policy="evict_first"),)
                place = (step * 8 + lane // 4) * GROUPS
                for s in tl.static_range(GROUPS if WIDTH else 0):
                    scale_ptrs = scales_ptr + start * (8 * GROUPS) + place + s
                    if CUTS_STEPS:
                        scales = scales + (tl.load(scale_ptrs, mask=is_step, other=0),)
                    else:
                        scales = scales + (tl.load(scale_ptrs),)
                    if HAS_ZEROS:
                        zeros = zeros + (tl.load(zeros_ptr + start * (8 * GROUPS) + place + s),)
                for i in tl.static_range(PIECES):
                    place = (step * PIECES + i) * 128 + lane * 4
                    words = values_ptr + (start * (128 * PIECES) + place)[:, None] + four
                    if CUTS_STEPS and not WIDTH:
                        mask = is_step[:, None]
                        piece = tl.load(
                            words, mask=mask, other=EMPTY, eviction_policy="evict_first"
                        )
                    else:
                        piece = tl.load(words, eviction_policy="evict_first")
                    pieces = pieces + (piece,)
        fence()
        if OVERLAPS:  # the weight is on its way before the inputs are there
            wait_for_inputs()
        for u in tl.static_range(U):
            step = first + u * STEP_WARPS
            if CUTS_STEPS:
                step = tl.minimum(step, num_steps - 1)
            for j in tl.static_range(8):
                if j % PER_GROUP == 0:
                    parts = sums
                    if WIDTH:
                        parts = ()
                        for _ in tl.static_range(N * R):
                            parts = parts + ((zero, zero, zero, zero),)
                a = ()
                for r in tl.static_range(R):
                    pair = (0x64086408, 0x64086408) if IS_HALF else (0x43084308, 0x43084308)
                    if HAS_ZEROS:
                        pair = zero_pairs(
                            zeros[(u * R + r) * GROUPS + j // PER_GROUP], KIND, IS_HALF
                        )
                    words4 = split4(pieces[(u * R + r) * PIECES + j * PIECES // 8], T)
                    a = a + (tile_registers(words4, j, pair, KIND, HAS_ZEROS, IS_HALF),)
                new = ()
                for n in tl.static_range(N):
                    at = step * 128 + j * 16
                    b = ()
                    if IS_ARRANGED:
                        b = split4(tl.load((token_ptrs[n] + at)[:, None] + four), T)
                    else:
                        for i in tl.static_range(4):
                            input_ptrs = token_ptrs[n] + at + 4 * i
                            if CUTS_COLUMNS:
                                is_column = at + 4 * i + lane % 4 < columns
                                b = b + (tl.load(input_ptrs, mask=is_column, other=0),)
                            else:
                                b = b + (tl.load(input_ptrs),)
                    for r in tl.static_range(R):
                        e = split4(positions[u * R + r], T)[j // 2]
                        if j % 2 == 0:
                            new = new + (sparse_product(a[r], b, parts[n * R + r], e, FIRST),)
                        else:
                            new = new + (sparse_product(a[r], b, parts[n * R + r], e, SECOND),)
                parts = new
                if j % PER_GROUP == PER_GROUP - 1:
                    if WIDTH:
                        new = ()
                        for n in tl.static_range(N):
                            for r in tl.static_range(R):
                                scale = scales[(u * R + r) * GROUPS + j // PER_GROUP]
                                low, high = float16_halves(scale)
                                c = sums[n * R + r]
                                p = parts[n * R + r]
                                c0 = c[0] + p[0] * low
                                c1 = c[1] + p[1] * low
                                c2 = c[2] + p[2] * high
                                c3 = c[3] + p[3] * high
                                new = new + ((c0, c1, c2, c3),)
                        parts = new
                    sums = parts
    # Of all warps at once: element 4 l + 2 b + h is row g + 8 h and token 2 t + b of lane l.
    element = tl.arange(0, 128)[None, :]
    row_warp = tl.program_id(0).to(tl.int64) * ROW_WARPS + tl.arange(0, ROW_WARPS)[:, None]
    for r in tl.static_range(R):
        row = (row_warp * R + r) * 16 + element // 16 + element % 2 * 8
        is_row = row < num_rows
        for n in tl.static_range(N):
            c = sums[n * R + r]
            all4 = tl.join(tl.join(c[0], c[1]), tl.join(c[2], c[3]))
            total = tl.sum(tl.reshape(all4, (STEP_WARPS, ROW_WARPS, 128)), 0)
            if HAS_ROW_SCALES:
                total *= tl.load(scales_ptr + row)
            if HAS_BIAS:
                total += tl.load(bias_ptr + row, mask=is_row, other=0).to(tl.float32)
            token = 8 * n + element // 4 % 4 * 2 + element // 2 % 2
            output_ptrs = output_ptr + token * num_rows + row
            tl.store(
                output_ptrs, total.to(output_ptr.dtype.element_ty),
                mask=is_row & (token < num_tokens),
            )  # fmt: skip
