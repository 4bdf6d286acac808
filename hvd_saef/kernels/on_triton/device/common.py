"""What the Triton kernels share: functions that run on the device.

A program works on a stretch of one block. `run` points to the row of its run in the table of runs, whose
columns are below (`tables.py` fills it). T is the dtype of x, e and s. Every operation is rounded by itself:
the kernels are compiled without fused multiply-add, and sums are added along fixed trees, two numbers at a
time. So the bits are those of the other versions on every device.
"""

import triton
import triton.language as tl

# The columns of the table of runs, int64. Addresses are those of the run's first element.
MEMORY = tl.constexpr(0)
OTHER = tl.constexpr(1)
SERVER = tl.constexpr(2)
POINT = tl.constexpr(3)
POINT_KIND = tl.constexpr(4)  # 0: T, 1: float16, 2: bfloat16
SIZE = tl.constexpr(5)  # the elements of a block
KEPT = tl.constexpr(6)  # how many of them travel
HEAD = tl.constexpr(7)  # where the run's numbers begin in the payload, in bytes
TAIL = tl.constexpr(8)  # where the run's bits or offsets begin, in bytes
MARK = tl.constexpr(9)  # Top-K: the number of page counts before those of the run
ADDRESSES = tl.constexpr(10)  # the first of its stretch's addresses of payloads
FIRST = tl.constexpr(11)  # its first program
EACH = tl.constexpr(12)  # the programs of a block
PARTIAL = tl.constexpr(13)  # the first of its programs' partial results
BLOCK = tl.constexpr(14)  # which of the blocks that have several programs is its first
COLUMNS = tl.constexpr(15)
LINE = tl.constexpr(16)  # the numbers in a line of the summation tree


@triton.constexpr_function
def _log2(number):
    return number.bit_length() - 1


@triton.jit
def place(table, run_of):
    """Returns the row of this program's run, the block within the run, and the program within the block."""
    program = tl.program_id(0)
    run = table + tl.load(run_of + program).to(tl.int64) * COLUMNS
    nth, each = program - tl.load(run + FIRST), tl.load(run + EACH)
    return run, nth // each, nth % each


@triton.jit
def pointer(run, column: tl.constexpr, start, T: tl.constexpr):
    """Returns a pointer to element `start` of the run, in the memory that `column` names."""
    item: tl.constexpr = T.primitive_bitwidth // 8
    return (tl.load(run + column) + start * item).to(tl.pointer_type(T))


@triton.jit
def load_numbers(address, index, mask, T: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns the numbers number `index` from an `address` in a payload on; 0 where `mask` is False."""
    BITS: tl.constexpr = T.primitive_bitwidth
    if ALIGNED:
        numbers = tl.load(address.to(tl.pointer_type(T)) + index, mask=mask, other=0)
    else:
        octets = address.to(tl.pointer_type(tl.uint8)) + index * (BITS // 8)
        bits = tl.load(octets, mask=mask, other=0).to(tl.uint64)
        for i in tl.static_range(1, BITS // 8):
            bits |= tl.load(octets + i, mask=mask, other=0).to(tl.uint64) << (8 * i)
        if BITS == 64:
            numbers = bits.to(T, bitcast=True)
        elif BITS == 32:
            numbers = bits.to(tl.uint32).to(T, bitcast=True)
        else:
            numbers = bits.to(tl.uint16).to(T, bitcast=True)
    return numbers


@triton.jit
def store_numbers(address, index, numbers, mask, ALIGNED: tl.constexpr):
    """Writes the numbers number `index` from an `address` in a payload on, where `mask` is True."""
    T: tl.constexpr = numbers.dtype
    BITS: tl.constexpr = T.primitive_bitwidth
    if ALIGNED:
        tl.store(address.to(tl.pointer_type(T)) + index, numbers, mask=mask)
    else:
        octets = address.to(tl.pointer_type(tl.uint8)) + index * (BITS // 8)
        if BITS == 64:
            bits = numbers.to(tl.uint64, bitcast=True)
        elif BITS == 32:
            bits = numbers.to(tl.uint32, bitcast=True).to(tl.uint64)
        else:
            bits = numbers.to(tl.uint16, bitcast=True).to(tl.uint64)
        for i in tl.static_range(0, BITS // 8):
            tl.store(octets + i, ((bits >> (8 * i)) & 255).to(tl.uint8), mask=mask)


@triton.jit
def tree(lines, ROWS: tl.constexpr):
    """Returns the sum of lines, [ROWS, 16] (ROWS a power of two), as [1, 16]: neighbours are added."""
    for _ in tl.static_range(0, _log2(ROWS)):
        lines = tl.sum(tl.reshape(lines, [lines.shape[0] // 2, 2, LINE]), axis=1)
    return lines


@triton.jit
def tree_of_line(line):
    """Returns the sum of a line ([1, 16]), a scalar: its halves are added until one number is left."""
    eight = tl.sum(tl.reshape(line, [2, 8]), axis=0)
    four = tl.sum(tl.reshape(eight, [2, 4]), axis=0)
    two = tl.sum(tl.reshape(four, [2, 2]), axis=0)
    return tl.sum(two, axis=0)


@triton.jit
def is_minus(values):
    """Returns 1 where the sign bit is set, else 0, int32."""
    if values.dtype.primitive_bitwidth == 64:
        bits = values.to(tl.int64, bitcast=True)
    else:
        bits = values.to(tl.int32, bitcast=True)
    return (bits < 0).to(tl.int32)


@triton.jit
def bfloat16_bits(values):
    """Returns the bits (uint16) of float32 numbers, rounded to the nearest bfloat16, ties to even."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    return tl.where(values == values, rounded, 0x7FC0).to(tl.uint16)


@triton.jit
def from_bfloat16(bits):
    """Returns bfloat16 numbers, given by their bits (uint16), as float32."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def start_point(x, e, s, numbers, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """Row 2: returns b = x - α·e - β·s; α and β are the first two of `numbers`."""
    if ALPHA:
        x -= e * tl.load(numbers)
    if BETA:
        x -= s * tl.load(numbers + 1)
    return x


@triton.jit
def b_minus_y(run, start, lane, mask, b, T: tl.constexpr, NARROW: tl.constexpr):
    """Returns b - y, where y are the parameters, and b is what they held when the round began."""
    address = tl.load(run + POINT)
    difference = b
    if NARROW:
        kind = tl.load(run + POINT_KIND)
        if kind == 1:
            half = (address + 2 * start).to(tl.pointer_type(tl.float16)) + lane
            difference = b.to(tl.float16).to(T) - tl.load(half, mask=mask, other=0).to(T)
        elif kind == 2:
            bits = (address + 2 * start).to(tl.pointer_type(tl.uint16)) + lane
            y = from_bfloat16(tl.load(bits, mask=mask, other=0))
            difference = from_bfloat16(bfloat16_bits(b.to(tl.float32))).to(T) - y.to(T)
        else:
            difference = b - tl.load(pointer(run, POINT, start, T) + lane, mask=mask, other=0)
    else:
        difference = b - tl.load(pointer(run, POINT, start, T) + lane, mask=mask, other=0)
    return difference


@triton.jit
def show(run, start, lane, mask, b, T: tl.constexpr, NARROW: tl.constexpr):
    """Writes b into the parameters, rounded to their dtype."""
    address = tl.load(run + POINT)
    if NARROW:
        kind = tl.load(run + POINT_KIND)
        if kind == 1:
            half = (address + 2 * start).to(tl.pointer_type(tl.float16)) + lane
            tl.store(half, b.to(tl.float16), mask=mask)
        elif kind == 2:
            bits = (address + 2 * start).to(tl.pointer_type(tl.uint16)) + lane
            tl.store(bits, bfloat16_bits(b.to(tl.float32)), mask=mask)
        else:
            tl.store(pointer(run, POINT, start, T) + lane, b, mask=mask)
    else:
        tl.store(pointer(run, POINT, start, T) + lane, b, mask=mask)


@triton.jit
def updated(
    run,
    start,
    lane,
    mask,
    numbers,
    T: tl.constexpr,
    UPDATES: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Row 4, first half: returns Δ = e + (b - y) of the elements from `start`; or e without UPDATES."""
    e = tl.load(pointer(run, MEMORY, start, T) + lane, mask=mask, other=0)
    if UPDATES:
        x = tl.load(pointer(run, OTHER, start, T) + lane, mask=mask, other=0)
        s = x
        if BETA:
            s = tl.load(pointer(run, SERVER, start, T) + lane, mask=mask, other=0)
        b = start_point(x, e, s, numbers, ALPHA, BETA)
        e += b_minus_y(run, start, lane, mask, b, T, NARROW)
    return e
