"""Scaled sign: the Triton kernels. A program takes up to TILES tiles of TILE elements of one block.

`addresses` are those of payloads: of each stretch first its own, then those that are added, `columns` in all.
`numbers` are α, β and the weights of the payloads that are added.
"""

import triton
import triton.language as tl

from hvd_saef.kernels.on_triton.device.common import (
    ADDRESSES,
    EACH,
    HEAD,
    KEPT,
    LINE,
    MEMORY,
    OTHER,
    PARTIAL,
    SERVER,
    SIZE,
    TAIL,
    is_minus,
    load_numbers,
    place,
    pointer,
    show,
    start_point,
    store_numbers,
    tree,
    tree_of_line,
    updated,
)


@triton.jit
def _plus_terms(
    values,
    run,
    addresses,
    columns,
    numbers,
    block,
    at,
    lane,
    mask,
    T: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Returns values + Σ weight·C(payload), for TILE elements from element `at` of a block."""
    ITEM: tl.constexpr = T.primitive_bitwidth // 8
    size = tl.load(run + SIZE)
    head = tl.load(run + HEAD)
    first = addresses + tl.load(run + ADDRESSES)
    if tl.load(run + KEPT) == size:
        for k in range(1, columns):
            element = tl.load(first + k) + head + (block * size + at) * ITEM
            values += load_numbers(element, lane, mask, T, ALIGNED) * tl.load(numbers + 1 + k)
    else:
        octets = tl.load(run + TAIL) + block * ((size + 7) // 8) + at // 8
        octet = tl.arange(0, TILE // 8)
        inside = at + octet * 8 < size
        places = tl.arange(0, 8)[None, :]
        for k in range(1, columns):
            payload = tl.load(first + k)
            scale = load_numbers(payload + head + block * ITEM, 0, True, T, ALIGNED) * tl.load(
                numbers + 1 + k
            )
            from_here = (payload + octets).to(tl.pointer_type(tl.uint8))
            bits = tl.load(from_here + octet, mask=inside, other=0)
            minus = (bits.to(tl.int32)[:, None] >> places) & 1
            values += tl.where(tl.reshape(minus, [TILE]) != 0, -scale, scale)
    return values


@triton.jit
def _pack(values, mask, address, count, TILE: tl.constexpr):
    """Writes the sign bits of the first `count` of TILE numbers to `address`."""
    minus = tl.reshape(tl.where(mask, is_minus(values), 0), [TILE // 8, 8])
    octets = tl.sum(minus << tl.arange(0, 8)[None, :], axis=1)
    place_of = tl.arange(0, TILE // 8)
    tl.store(address.to(tl.pointer_type(tl.uint8)) + place_of, octets.to(tl.uint8), mask=place_of * 8 < count)


@triton.jit
def encode(
    table,
    run_of,
    addresses,
    columns,
    numbers,
    partials,
    T: tl.constexpr,
    UPDATES: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    NARROW: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Δ, its sign bits, and its L1 sum: the scale, or a line of `partials` if the block has more programs."""
    ITEM: tl.constexpr = T.primitive_bitwidth // 8
    run, block, nth = place(table, run_of)
    size = tl.load(run + SIZE)
    offset = nth * TILE * TILES
    elements = tl.minimum(size - offset, TILE * TILES).to(tl.int32)
    payload = tl.load(addresses + tl.load(run + ADDRESSES))
    head = payload + tl.load(run + HEAD)
    whole = tl.load(run + KEPT) == size
    tail = payload + tl.load(run + TAIL) + block * ((size + 7) // 8)
    lines = tl.zeros([TILES, LINE], tl.float64)
    for tile in range(tl.cdiv(elements, TILE)):
        lane = tl.arange(0, TILE)
        at = offset + tile * TILE
        mask = lane < tl.minimum(size - at, TILE).to(tl.int32)
        start = block * size + at
        delta = updated(run, start, lane, mask, numbers, T, UPDATES, ALPHA, BETA, NARROW)
        delta = _plus_terms(delta, run, addresses, columns, numbers, block, at, lane, mask, T, ALIGNED, TILE)
        memory = pointer(run, MEMORY, start, T) + lane
        if whole:
            store_numbers(head + start * ITEM, lane, delta, mask, ALIGNED)
            tl.store(memory, tl.zeros([TILE], T), mask=mask)
        else:
            tl.store(memory, delta, mask=mask)
            _pack(delta, mask, tail + at // 8, elements - tile * TILE, TILE)
            magnitudes = tl.where(mask, tl.abs(delta), 0.0).to(tl.float64)
            line = tree(tl.reshape(magnitudes, [TILE // LINE, LINE]), TILE // LINE)
            lines = tl.where(tl.arange(0, TILES)[:, None] == tile, line, lines)
    if not whole:
        line = tree(lines, TILES)
        each = tl.load(run + EACH)
        if each == 1:
            scale = (tree_of_line(line) / size.to(tl.float64)).to(T)
            store_numbers(head + block * ITEM, 0, scale, True, ALIGNED)
        else:
            partial = partials + (tl.load(run + PARTIAL) + block * each + nth) * LINE
            tl.store(partial + tl.arange(0, LINE)[None, :], line)


@triton.jit
def reduce(blocks, addresses, partials, T: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """The scale of a block that several programs encoded, from their lines in `partials`.

    A row of `blocks` is as in `tables.py`; the mark is the scale's place. Subtrees of 2**i·CHUNK lines wait
    for their neighbours in row i of `waiting`.
    """
    row = blocks + tl.program_id(0) * 6
    count = tl.load(row + 4)
    level = tl.arange(0, 32)[:, None]
    waiting = tl.zeros([32, LINE], tl.float64)
    chunks = tl.cdiv(count, CHUNK).to(tl.int32)
    for chunk in range(chunks):
        nth = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
        line = (tl.load(row + 3) + nth) * LINE + tl.arange(0, LINE)[None, :]
        carry = tree(tl.load(partials + line, mask=nth < count, other=0.0), CHUNK)
        left, i = chunk, 0
        while left % 2 == 1:
            carry += tl.sum(tl.where(level == i, waiting, 0.0), axis=0)[None, :]
            left, i = left // 2, i + 1
        waiting = tl.where(level == i, carry, waiting)
    total = tl.zeros([1, LINE], tl.float64)
    for i in range(32):
        if (chunks >> i) & 1:
            total += tl.sum(tl.where(level == i, waiting, 0.0), axis=0)[None, :]
    scale = (tree_of_line(total) / tl.load(row + 2).to(tl.float64)).to(T)
    address = tl.load(addresses + tl.load(row)) + tl.load(row + 1)
    store_numbers(address, 0, scale, True, ALIGNED)


@triton.jit
def _settled(values, run, addresses, block, T: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns values - C(values), where the scale is that of the stretch's own payload."""
    ITEM: tl.constexpr = T.primitive_bitwidth // 8
    own = tl.load(addresses + tl.load(run + ADDRESSES)) + tl.load(run + HEAD)
    scale = load_numbers(own + block * ITEM, 0, True, T, ALIGNED)
    return values - tl.where(is_minus(values) != 0, -scale, scale)


@triton.jit
def settle(
    table,
    run_of,
    addresses,
    T: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Memory - C(memory), but for dense blocks."""
    run, block, nth = place(table, run_of)
    size = tl.load(run + SIZE)
    if tl.load(run + KEPT) != size:
        offset = nth * TILE * TILES
        for tile in range(tl.cdiv(tl.minimum(size - offset, TILE * TILES).to(tl.int32), TILE)):
            lane = tl.arange(0, TILE)
            at = offset + tile * TILE
            memory = pointer(run, MEMORY, block * size + at, T) + lane
            mask = lane < tl.minimum(size - at, TILE).to(tl.int32)
            values = tl.load(memory, mask=mask, other=0)
            tl.store(memory, _settled(values, run, addresses, block, T, ALIGNED), mask=mask)


@triton.jit
def decode(
    table,
    run_of,
    addresses,
    columns,
    numbers,
    T: tl.constexpr,
    SETTLES: tl.constexpr,
    SHOWS: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    NARROW: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Rows 6 and 2: x += Σ weight·C(payload); e -= C(e); the parameters become b."""
    run, block, nth = place(table, run_of)
    size = tl.load(run + SIZE)
    whole = tl.load(run + KEPT) == size
    offset = nth * TILE * TILES
    for tile in range(tl.cdiv(tl.minimum(size - offset, TILE * TILES).to(tl.int32), TILE)):
        lane = tl.arange(0, TILE)
        at = offset + tile * TILE
        mask = lane < tl.minimum(size - at, TILE).to(tl.int32)
        start = block * size + at
        memory = pointer(run, MEMORY, start, T) + lane
        x = tl.load(memory, mask=mask, other=0)
        x = _plus_terms(x, run, addresses, columns, numbers, block, at, lane, mask, T, ALIGNED, TILE)
        tl.store(memory, x, mask=mask)
        e = x
        if SETTLES or (SHOWS and ALPHA):
            errors = pointer(run, OTHER, start, T) + lane
            e = tl.load(errors, mask=mask, other=0)
        if SETTLES:
            if not whole:
                e = _settled(e, run, addresses, block, T, ALIGNED)
                tl.store(errors, e, mask=mask)
        if SHOWS:
            s = x
            if BETA:
                s = tl.load(pointer(run, SERVER, start, T) + lane, mask=mask, other=0)
            show(run, start, lane, mask, start_point(x, e, s, numbers, ALPHA, BETA), T, NARROW)
