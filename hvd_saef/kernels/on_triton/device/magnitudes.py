"""The look at numbers: the Triton kernel."""

import triton
import triton.language as tl


@triton.jit
def look(table, tensor_of, found, limit, BITS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Sets `found` to 1 if the bits of any number, without its sign, are more than `limit`.

    In that order of bits, infinity is above all numbers and NaN above infinity. A row of `table` is a tensor:
    its address, its elements, and its first program.
    """
    program = tl.program_id(0)
    row = table + tl.load(tensor_of + program).to(tl.int64) * 3
    address, size = tl.load(row), tl.load(row + 1)
    first = (program - tl.load(row + 2)) * TILE * TILES
    more = tl.zeros([TILE], tl.int32)
    for tile in range(tl.cdiv(tl.minimum(size - first, TILE * TILES).to(tl.int32), TILE)):
        at = first + tile * TILE + tl.arange(0, TILE)
        mask = at < size
        if BITS == 16:
            bits = tl.load(address.to(tl.pointer_type(tl.int16)) + at, mask=mask, other=0) & 0x7FFF
        elif BITS == 32:
            bits = tl.load(address.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0) & 0x7FFFFFFF
        else:
            long = tl.load(address.to(tl.pointer_type(tl.int64)) + at, mask=mask, other=0)
            bits = long & 0x7FFFFFFFFFFFFFFF
        more |= (bits.to(tl.int64) > limit).to(tl.int32)
    if tl.sum(more, axis=0) > 0:
        tl.store(found, 1)
