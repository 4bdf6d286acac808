"""Top-K: the Triton kernels that decode. A program takes a page of a block, or a smaller block.

What no encoder writes is not followed: it sets `refused`, and nothing is written beyond the block.
"""

import triton
import triton.language as tl

from hvd_saef.kernels.on_triton.device.common import (
    ADDRESSES,
    EACH,
    HEAD,
    KEPT,
    MEMORY,
    OTHER,
    PARTIAL,
    SERVER,
    SIZE,
    TAIL,
    from_bfloat16,
    load_numbers,
    place,
    pointer,
    show,
    start_point,
)

PAGE = tl.constexpr(1 << 16)


@triton.jit
def index_pages(blocks, addresses, columns, starts, rows, refused, CHUNK: tl.constexpr):
    """Where each page's part begins among what is kept of its block, and how many are kept in it.

    A program takes one payload of one block of several pages. Where a payload's counts are wrong, all are
    taken for 0. A row of `blocks` is as in `tables.py`; `starts` has two numbers a page, payload by payload,
    in each of which `rows` pages come one after the other.
    """
    row = blocks + tl.program_id(0) * 6
    each, first, kept = tl.load(row + 4), tl.load(row + 3), tl.load(row + 5)
    size = tl.load(row + 2)
    k = tl.program_id(1)
    counts = tl.load(addresses + tl.load(row) + 1 + k) + tl.load(row + 1) * 4
    out = starts + 2 * (k.to(tl.int64) * rows + first)
    total = size * 0
    wrong = (size * 0).to(tl.int32)
    for chunk in range(tl.cdiv(each, CHUNK).to(tl.int32)):
        page = chunk * CHUNK + tl.arange(0, CHUNK)
        count = load_numbers(counts, page, page < each, tl.int32, False)
        room = tl.minimum(size - page.to(tl.int64) * PAGE, PAGE)
        wrong += tl.sum(((page < each) & ((count < 0) | (count > room))).to(tl.int32), axis=0)
        long = count.to(tl.int64)
        tl.store(out + 2 * page, total + tl.cumsum(long, axis=0) - long, mask=page < each)
        tl.store(out + 2 * page + 1, long, mask=page < each)
        total += tl.sum(long, axis=0)
    if (wrong > 0) | (total != kept):
        tl.store(refused, 1)
        for chunk in range(tl.cdiv(each, CHUNK).to(tl.int32)):
            page = chunk * CHUNK + tl.arange(0, CHUNK)
            tl.store(out + 2 * page, tl.zeros([CHUNK], tl.int64), mask=page < each)
            tl.store(out + 2 * page + 1, tl.zeros([CHUNK], tl.int64), mask=page < each)


@triton.jit
def _values(address, index, mask, T: tl.constexpr, VALUE: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns the values number `index` from an `address` in a payload on, as T."""
    if VALUE == 0:
        values = load_numbers(address, index, mask, T, ALIGNED)
    elif VALUE == 1:
        values = load_numbers(address, index, mask, tl.float16, ALIGNED).to(T)
    else:
        values = from_bfloat16(load_numbers(address, index, mask, tl.uint16, ALIGNED)).to(T)
    return values


@triton.jit
def add(
    table,
    run_of,
    addresses,
    columns,
    numbers,
    starts,
    rows,
    refused,
    T: tl.constexpr,
    VALUE: tl.constexpr,
    SHOWS: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    NARROW: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Memory += Σ weight·C(payload), payload by payload; then, if SHOWS, the parameters become b."""
    NUMBER: tl.constexpr = T.primitive_bitwidth // 8 if VALUE == 0 else 2
    run, block, nth = place(table, run_of)
    size, kept = tl.load(run + SIZE), tl.load(run + KEPT)
    start = block * size + nth * PAGE
    elements = tl.minimum(size - nth * PAGE, PAGE).to(tl.int32)
    memory = pointer(run, MEMORY, start, T)
    lane = tl.arange(0, TILE)
    for k in range(1, columns):
        payload = tl.load(addresses + tl.load(run + ADDRESSES) + k)
        weight = tl.load(numbers + 1 + k)
        head = payload + tl.load(run + HEAD)
        if kept == size:
            for tile in range(tl.cdiv(elements, TILE)):
                at = tile * TILE + lane
                mask = at < elements
                values = _values(head + start * NUMBER, at, mask, T, VALUE, ALIGNED) * weight
                tl.store(memory + at, tl.load(memory + at, mask=mask, other=0) + values, mask=mask)
        else:
            first, number = block * kept, kept
            if size > PAGE:
                page = tl.load(run + PARTIAL) + block * tl.load(run + EACH) + nth
                part = starts + 2 * ((k - 1) * rows + page)
                first += tl.load(part)
                number = tl.load(part + 1)
            tail = payload + tl.load(run + TAIL) + first * 2
            for chunk in range(tl.cdiv(number, TILE).to(tl.int32)):
                i = chunk * TILE + lane
                there = i < number
                at = load_numbers(tail, i, there, tl.uint16, False).to(tl.int32)
                before = load_numbers(tail, i - 1, there & (i > 0), tl.uint16, False).to(tl.int32)
                right = there & (at > tl.where(i > 0, before, -1)) & (at < elements)
                if tl.sum((there & (right == 0)).to(tl.int32), axis=0) > 0:
                    tl.store(refused, 1)
                values = _values(head + first * NUMBER, i, right, T, VALUE, ALIGNED) * weight
                tl.store(memory + at, tl.load(memory + at, mask=right, other=0) + values, mask=right)
        tl.debug_barrier()
    if SHOWS:
        for tile in range(tl.cdiv(elements, TILE)):
            at = tile * TILE + lane
            mask = at < elements
            x = tl.load(memory + at, mask=mask, other=0)
            e, s = x, x
            if ALPHA:
                e = tl.load(pointer(run, OTHER, start, T) + at, mask=mask, other=0)
            if BETA:
                s = tl.load(pointer(run, SERVER, start, T) + at, mask=mask, other=0)
            show(run, start, at, mask, start_point(x, e, s, numbers, ALPHA, BETA), T, NARROW)
