// Which magnitudes are the k largest: exactly, by integers that are ordered as magnitudes are.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <functional>

#include "rows.h"

namespace hvd_saef {

// A magnitude's bits, as a signed integer. NaN counts as infinity.
template <class T>
using Key = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T>
constexpr Key<T> kMagnitude = std::numeric_limits<Key<T>>::max();
template <class T>
constexpr Key<T> kInfinity = sizeof(T) == 4 ? Key<T>{0x7f800000} : static_cast<Key<T>>(0x7ff0000000000000);

template <class T>
__attribute__((always_inline)) inline Key<T> key_of(T value) {
  Key<T> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & kMagnitude<T>;
}

// Of these many groups of a block's elements, the largest of each.
constexpr int64_t kGroups = 64;

// Kept is what is above `key`, and the first `ties` of those equal to it.
template <class T>
struct Threshold {
  Key<T> key;
  int64_t ties;
};

// Counts keys by one digit: those whose bits from `top` on are `prefix`, by their bits from `low` on.
constexpr int kDigit = 11;
struct Histogram {
  static constexpr int kCopies = 4;  // equal neighbours would wait for each other's increments
  uint32_t bins[kCopies][1 << kDigit];

  void clear() { std::memset(bins, 0, sizeof(bins)); }
  template <class K>
  void add(const K* keys, int64_t size, K prefix, int top, int low) {
    const K mask = (K{1} << (top - low)) - 1;
    for (int64_t i = 0; i < size; ++i)
      if (keys[i] >> top == prefix) ++bins[i % kCopies][keys[i] >> low & mask];
  }
  void move_to(int64_t* sums) const {
    for (const auto& copy : bins)
      for (int i = 0; i < 1 << kDigit; ++i) sums[i] += copy[i];
  }
};

// The k largest of keys that `count(prefix, top, low, sums)` adds to sums, digit by digit from the highest.
template <class T, class Count>
Threshold<T> radix_select(int64_t k, const Count& count) {
  Key<T> prefix = 0;
  for (int top = 8 * sizeof(T) - 1; top > 0;) {
    const int low = std::max(0, top - kDigit);
    int64_t sums[1 << kDigit] = {};
    count(prefix, top, low, sums);
    int64_t bin = (int64_t{1} << (top - low)) - 1;
    for (; sums[bin] < k; --bin) k -= sums[bin];
    prefix = prefix << (top - low) | static_cast<Key<T>>(bin);
    top = low;
    if (sums[bin] == k) return {static_cast<Key<T>>((prefix << low) - 1), 0};
  }
  return {prefix, k};
}

// The k largest of a page's keys.
template <class T>
Threshold<T> select(const Key<T>* keys, int64_t size, int64_t k, std::vector<Key<T>>& scratch) {
  if (size == k) return {-1, 0};
  constexpr int64_t kFew = 256;
  if (size > kFew) {  // by their first digit, most are known to be above or below
    constexpr int low = 8 * sizeof(T) - 1 - kDigit;
    int32_t bins[1 << kDigit] = {};
    for (int64_t i = 0; i < size; ++i) ++bins[keys[i] >> low];
    Key<T> bin = kInfinity<T> >> low;
    for (; bins[bin] < k; --bin) k -= bins[bin];
    scratch.resize(bins[bin] + 1);
    int64_t found = 0;
    for (int64_t i = 0; i < size; ++i) {
      scratch[std::min<int64_t>(found, bins[bin])] = keys[i];
      found += keys[i] >> low == bin ? 1 : 0;
    }
    scratch.pop_back();
  } else {
    scratch.assign(keys, keys + size);
  }
  std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<>());
  const Key<T> key = scratch[k - 1];
  return {key, k - std::count_if(scratch.begin(), scratch.begin() + k, [&](Key<T> other) { return other > key; })};
}

// A key which, by a sample, somewhat more than k of `size` elements reach: a guess that saves work and
// decides nothing. `at(i)` is element i's key. 0, which all reach, where a sample says little.
template <class T, class At>
Key<T> guess(int64_t size, int64_t k, std::vector<Key<T>>& scratch, const At& at) {
  const auto samples = std::min<int64_t>(size / 8, static_cast<int64_t>(2 * std::sqrt(static_cast<double>(size))));
  const double expected = static_cast<double>(k) * static_cast<double>(samples) / static_cast<double>(size);
  const auto rank = static_cast<int64_t>(expected + 3.5 * std::sqrt(expected) + 2);
  if (rank >= samples) return 0;
  scratch.resize(samples);
  uint64_t random = 0x9e3779b97f4a7c15;
  const int64_t stride = size / samples;
  for (int64_t i = 0; i < samples; ++i) {
    random = random * 6364136223846793005 + 1442695040888963407;
    scratch[i] = at(i * stride + static_cast<int64_t>((random >> 48) * static_cast<uint64_t>(stride) >> 16));
  }
  std::nth_element(scratch.begin(), scratch.begin() + rank, scratch.end(), std::greater<>());
  return scratch[rank];
}

}  // namespace hvd_saef
