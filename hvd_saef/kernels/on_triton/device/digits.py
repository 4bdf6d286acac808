"""The digits of magnitudes, by which the k-th largest is found: functions that run on the device.

By Triton 3.6, counting digits costs two instructions for each value that a digit can have, so those of
float32 have 8 bits. Those of float64, which is rare, are longer, for the sake of fewer launches.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def width(number, nth):
    """The bits of digit number `nth`, counted from the highest, of the magnitudes of dtype `number`."""
    return ((8, 8, 8, 7) if number.primitive_bitwidth == 32 else (11, 11, 11, 10, 10, 10))[nth]


@triton.constexpr_function
def top(number, nth):
    """The bits below digit number `nth` and in it."""
    return number.primitive_bitwidth - 1 - sum(width(number, i) for i in range(nth))


@triton.constexpr_function
def low(number, nth):
    """The bits below digit number `nth`."""
    return top(number, nth) - width(number, nth)


@triton.constexpr_function
def bins(number, nth):
    """How many values digit number `nth` can have."""
    return 1 << width(number, nth)


@triton.constexpr_function
def place_of(number, nth):
    """Where the histogram of digit number `nth` begins among those of a block: three take turns."""
    return nth % 3 * bins(number, 0)


@triton.constexpr_function
def room(number):
    """The length of a block's histograms."""
    return 3 * bins(number, 0)


@triton.constexpr_function
def passes(number):
    """How many digits there are."""
    return 4 if number.primitive_bitwidth == 32 else 6


@triton.jit
def keys_of(values):
    """Returns the magnitudes as integers that are ordered as they are; NaN counts as infinity."""
    if values.dtype.primitive_bitwidth == 64:
        keys = tl.minimum(values.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000)
    else:
        keys = tl.minimum(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)
    return keys


@triton.jit
def digits_of(keys, mask, prefix, T: tl.constexpr, NTH: tl.constexpr):
    """Returns how often each value of digit number NTH occurs among the keys that begin with `prefix`."""
    digits = ((keys >> low(T, NTH)) & (bins(T, NTH) - 1)).to(tl.int32)
    return tl.histogram(digits, bins(T, NTH), mask=mask & ((keys >> top(T, NTH)) == prefix))


@triton.jit
def select(counts, prefix, k, T: tl.constexpr, NTH: tl.constexpr):
    """Returns the prefix of the k-th largest key, one digit longer, and how many that begin so are kept."""
    reached = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    digit = tl.sum((reached >= k).to(tl.int32), axis=0) - 1
    larger = tl.sum(tl.where(tl.arange(0, bins(T, NTH)) > digit, counts, 0), axis=0)
    return (prefix << width(T, NTH)) | digit, k - larger
