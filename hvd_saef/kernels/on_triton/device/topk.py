"""Top-K: the Triton kernels that encode. Blocks of up to a tile are encoded by one program, in one pass.

The k-th largest magnitude of a larger block is found digit by digit, from the highest, by all programs of all
blocks together: each pass counts the digits of the magnitudes that begin as the k-th one does, as far as that
is known. `digits` has three such histograms of each block, which take turns, and `known` has what each pass
found: the beginning of the k-th magnitude, and how many of those that begin so are kept.
"""

import triton
import triton.language as tl

from hvd_saef.kernels.on_triton.device.common import (
    ADDRESSES,
    BLOCK,
    EACH,
    HEAD,
    KEPT,
    MEMORY,
    PARTIAL,
    SIZE,
    TAIL,
    bfloat16_bits,
    from_bfloat16,
    place,
    pointer,
    store_numbers,
    updated,
)
from hvd_saef.kernels.on_triton.device.digits import (
    bins,
    digits_of,
    keys_of,
    passes,
    place_of,
    room,
    select,
)

PAGE = tl.constexpr(1 << 16)
PASSES = tl.constexpr(6)
"""The most passes that there are: those of float64."""


@triton.jit
def _sent(values, T: tl.constexpr, VALUE: tl.constexpr):
    """Returns what of `values` travels: rounded to nearest; beyond the range, the largest number of it."""
    if VALUE == 0:
        sent = values
    elif VALUE == 1:
        sent = tl.where(values > 65504.0, 65504.0, tl.where(values < -65504.0, -65504.0, values))
        sent = sent.to(tl.float32).to(tl.float16)
    else:
        MOST: tl.constexpr = 3.3895313892515355e38
        sent = tl.where(values > MOST, MOST, tl.where(values < -MOST, -MOST, values))
        sent = bfloat16_bits(sent.to(tl.float32))
    return sent


@triton.jit
def _rest(values, sent, T: tl.constexpr, VALUE: tl.constexpr):
    """Returns what of `values` does not travel."""
    if VALUE == 0:
        rest = tl.zeros_like(values)
    elif VALUE == 1:
        rest = values - sent.to(T)
    else:
        rest = values - from_bfloat16(sent).to(T)
    return rest


@triton.jit
def _write_whole(
    values, run, start, lane, mask, payload, T: tl.constexpr, VALUE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Sends all elements from `start` on of a block that is kept whole."""
    NUMBER: tl.constexpr = T.primitive_bitwidth // 8 if VALUE == 0 else 2
    sent = _sent(values, T, VALUE)
    store_numbers(payload + tl.load(run + HEAD) + start * NUMBER, lane, sent, mask, ALIGNED)
    tl.store(pointer(run, MEMORY, start, T) + lane, _rest(values, sent, T, VALUE), mask=mask)


@triton.jit
def _write_kept(
    values,
    kept,
    run,
    block,
    start,
    at,
    first,
    lane,
    payload,
    T: tl.constexpr,
    VALUE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Sends the `kept` ones of a block's elements from `at` on; `first` of the block's come before them."""
    NUMBER: tl.constexpr = T.primitive_bitwidth // 8 if VALUE == 0 else 2
    before = block * tl.load(run + KEPT) + first
    nth = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    offset = (at % PAGE).to(tl.int32) + lane
    store_numbers(payload + tl.load(run + TAIL) + before * 2, nth, offset.to(tl.uint16), kept, False)
    sent = _sent(values, T, VALUE)
    store_numbers(payload + tl.load(run + HEAD) + before * NUMBER, nth, sent, kept, ALIGNED)
    tl.store(pointer(run, MEMORY, start, T) + lane, _rest(values, sent, T, VALUE), mask=kept)


@triton.jit
def _encode_alone(
    values,
    run,
    block,
    lane,
    mask,
    payload,
    T: tl.constexpr,
    VALUE: tl.constexpr,
    UPDATES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Encodes a block of up to a tile."""
    k = tl.load(run + KEPT)
    keys, zero = keys_of(values), block * 0
    prefix, ties = zero.to(keys.dtype), k.to(tl.int32)
    for nth in tl.static_range(0, passes(T)):
        prefix, ties = select(digits_of(keys, mask, prefix, T, nth), prefix, ties, T, nth)
    equal = mask & (keys == prefix)
    before = tl.cumsum(equal.to(tl.int32), axis=0) - 1
    kept = (mask & (keys > prefix)) | (equal & (before < ties))
    start = block * tl.load(run + SIZE)
    if UPDATES:
        tl.store(pointer(run, MEMORY, start, T) + lane, values, mask=mask & (kept == 0))
    _write_kept(values, kept, run, block, start, zero, zero, lane, payload, T, VALUE, ALIGNED)


@triton.jit
def encode(
    table,
    run_of,
    addresses,
    numbers,
    digits,
    T: tl.constexpr,
    VALUE: tl.constexpr,
    UPDATES: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    NARROW: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Δ. Blocks of up to a tile, and those that are kept whole, are done; of others the first digits."""
    run, block, nth = place(table, run_of)
    size = tl.load(run + SIZE)
    payload = tl.load(addresses + tl.load(run + ADDRESSES))
    lane = tl.arange(0, TILE)
    at = nth * TILE
    mask = at + lane < size
    start = block * size + at
    values = updated(run, start, lane, mask, numbers, T, UPDATES, ALPHA, BETA, NARROW)
    if tl.load(run + KEPT) == size:
        _write_whole(values, run, start, lane, mask, payload, T, VALUE, ALIGNED)
    elif size <= TILE:
        _encode_alone(values, run, block, lane, mask, payload, T, VALUE, UPDATES, ALIGNED)
    else:
        if UPDATES:
            tl.store(pointer(run, MEMORY, start, T) + lane, values, mask=mask)
        keys = keys_of(values)
        counts = digits_of(keys, mask, (block * 0).to(keys.dtype), T, 0)
        histogram = digits + (tl.load(run + BLOCK) + block) * room(T) + tl.arange(0, bins(T, 0))
        tl.atomic_add(histogram, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _goes_on(run, size, TILE: tl.constexpr):
    """Returns True if :func:`encode` has left the run's blocks to the kernels after it."""
    return (size > TILE) & (tl.load(run + KEPT) != size)


@triton.jit
def _known(run, block, nth, digits, known, PASS: tl.constexpr, T: tl.constexpr):
    """Returns what is known after PASS passes: the beginning of the k-th key, and how many such are kept."""
    KEY: tl.constexpr = tl.int64 if T.primitive_bitwidth == 64 else tl.int32
    this = tl.load(run + BLOCK) + block
    row = known + this * PASSES * 2
    if PASS == 1:
        prefix, k = (this * 0).to(KEY), tl.load(run + KEPT).to(tl.int32)
    else:
        prefix = tl.load(row + 2 * (PASS - 2)).to(KEY)
        k = tl.load(row + 2 * (PASS - 2) + 1).to(tl.int32)
    histogram = digits + this * room(T) + place_of(T, PASS - 1) + tl.arange(0, bins(T, PASS - 1))
    prefix, k = select(tl.load(histogram), prefix, k, T, PASS - 1)
    if nth == 0:
        tl.store(row + 2 * (PASS - 1), prefix.to(tl.int64))
        tl.store(row + 2 * (PASS - 1) + 1, k.to(tl.int64))
    return prefix, k


@triton.jit
def count_digits(table, run_of, digits, known, T: tl.constexpr, PASS: tl.constexpr, TILE: tl.constexpr):
    """Counts the digits after the first PASS ones; clears the histogram of the pass after the next."""
    run, block, nth = place(table, run_of)
    size = tl.load(run + SIZE)
    if _goes_on(run, size, TILE):
        prefix, _ = _known(run, block, nth, digits, known, PASS, T)
        lane = tl.arange(0, TILE)
        at = nth * TILE
        mask = lane < tl.minimum(size - at, TILE).to(tl.int32)
        keys = keys_of(tl.load(pointer(run, MEMORY, block * size + at, T) + lane, mask=mask, other=0))
        counts = digits_of(keys, mask, prefix, T, PASS)
        of_block = digits + (tl.load(run + BLOCK) + block) * room(T)
        histogram = of_block + place_of(T, PASS) + tl.arange(0, bins(T, PASS))
        tl.atomic_add(histogram, counts, mask=counts > 0, sem="relaxed")
        if PASS > 1 and passes(T) > PASS + 1:
            if nth == 0:  # all have read the histogram whose place the next pass takes
                after = tl.arange(0, bins(T, PASS + 1))
                tl.store(of_block + place_of(T, PASS + 1) + after, tl.zeros_like(after))


@triton.jit
def count_kept(
    table, run_of, digits, known, partials, T: tl.constexpr, PASS: tl.constexpr, TILE: tl.constexpr
):
    """Counts in each program's elements those above the k-th key, and those that equal it."""
    run, block, nth = place(table, run_of)
    size = tl.load(run + SIZE)
    if _goes_on(run, size, TILE):
        key, _ = _known(run, block, nth, digits, known, PASS, T)
        lane = tl.arange(0, TILE)
        at = nth * TILE
        mask = lane < tl.minimum(size - at, TILE).to(tl.int32)
        keys = keys_of(tl.load(pointer(run, MEMORY, block * size + at, T) + lane, mask=mask, other=0))
        partial = partials + 2 * (tl.load(run + PARTIAL) + block * tl.load(run + EACH) + nth)
        tl.store(partial, tl.sum((mask & (keys > key)).to(tl.int32), axis=0))
        tl.store(partial + 1, tl.sum((mask & (keys == key)).to(tl.int32), axis=0))


@triton.jit
def place_kept(
    blocks, addresses, known, partials, PASS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr
):
    """Replaces what :func:`count_kept` found by what was kept, and how many were equal, before each program.

    Writes the page counts of blocks larger than a page. A row of `blocks` is as in `tables.py`; the mark is
    the number of page counts before the block's. CHUNK programs at a time.
    """
    row = blocks + tl.program_id(0) * 6
    size, first, each = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    most = tl.load(known + (tl.program_id(0).to(tl.int64) * PASSES + PASS - 1) * 2 + 1).to(tl.int32)
    counts = tl.load(addresses + tl.load(row)) + tl.load(row + 1) * 4
    PER_PAGE: tl.constexpr = PAGE // TILE
    kept_before, ties_before = (size * 0).to(tl.int32), (size * 0).to(tl.int32)
    for chunk in range(tl.cdiv(each, CHUNK).to(tl.int32)):
        nth = chunk * CHUNK + tl.arange(0, CHUNK)
        partial = partials + 2 * (first + nth)
        above = tl.load(partial, mask=nth < each, other=0)
        equal = tl.load(partial + 1, mask=nth < each, other=0)
        ties = ties_before + tl.cumsum(equal, axis=0) - equal
        kept = above + tl.minimum(equal, tl.maximum(most - ties, 0))
        tl.store(partial, kept_before + tl.cumsum(kept, axis=0) - kept, mask=nth < each)
        tl.store(partial + 1, ties, mask=nth < each)
        if size > PAGE:
            page = chunk * (CHUNK // PER_PAGE) + tl.arange(0, CHUNK // PER_PAGE)
            of_page = tl.sum(tl.reshape(kept, [CHUNK // PER_PAGE, PER_PAGE]), axis=1)
            store_numbers(counts, page, of_page, page.to(tl.int64) * PAGE < size, False)
        kept_before += tl.sum(kept, axis=0)
        ties_before += tl.sum(equal, axis=0)


@triton.jit
def write(
    table,
    run_of,
    addresses,
    known,
    partials,
    T: tl.constexpr,
    VALUE: tl.constexpr,
    PASS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sends what is kept of larger blocks."""
    run, block, nth = place(table, run_of)
    size = tl.load(run + SIZE)
    if _goes_on(run, size, TILE):
        row = known + ((tl.load(run + BLOCK) + block) * PASSES + PASS - 1) * 2
        partial = partials + 2 * (tl.load(run + PARTIAL) + block * tl.load(run + EACH) + nth)
        lane = tl.arange(0, TILE)
        at = nth * TILE
        mask = lane < tl.minimum(size - at, TILE).to(tl.int32)
        start = block * size + at
        values = tl.load(pointer(run, MEMORY, start, T) + lane, mask=mask, other=0)
        keys, key = keys_of(values), tl.load(row)
        equal = mask & (keys == key)
        before = tl.load(partial + 1) + tl.cumsum(equal.to(tl.int32), axis=0) - 1
        kept = (mask & (keys > key)) | (equal & (before < tl.load(row + 1)))
        payload = tl.load(addresses + tl.load(run + ADDRESSES))
        first = tl.load(partial)
        _write_kept(values, kept, run, block, start, at, first, lane, payload, T, VALUE, ALIGNED)
