// Included by each_set.h: loops over memory, for Top-K, encoding.
#include "rows_loops.h"

// The magnitudes of up to a page, as keys, and their offsets, where they are at least `least`. Returns how
// many. Both outputs have room for all and kSlack more.
template <class T>
INNER int64_t collect_tile(const T* from, int64_t start, int64_t size, Key<T> least, Key<T>* keys, uint16_t* offsets) {
  int64_t found = 0, i = 0;
#if HVD_SAEF_SET == 512
  if constexpr (sizeof(T) == 4) {
    const __m512i bits = _mm512_set1_epi32(kMagnitude<T>), bound = _mm512_set1_epi32(least);
    const __m512i most = _mm512_set1_epi32(kInfinity<T>);
    __m512i at = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(start)),
                                  _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (; i + 16 <= size; i += 16, at = _mm512_add_epi32(at, _mm512_set1_epi32(16))) {
      const __m512i key = _mm512_min_epi32(_mm512_and_epi32(_mm512_loadu_si512(from + i), bits), most);
      const __mmask16 above = _mm512_cmpge_epi32_mask(key, bound);
      _mm512_storeu_si512(keys + found, _mm512_maskz_compress_epi32(above, key));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(offsets + found),
                          _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(above, at)));
      found += __builtin_popcount(above);
    }
  }
#endif
  constexpr int64_t kGroup = 16;
  for (; i < size; i += kGroup) {
    const int64_t stop = std::min(size, i + kGroup);
    if (stop == i + kGroup) {  // mostly there is nothing in a group
      Key<T> any = 0;
      for (int64_t j = 0; j < kGroup; ++j) any |= key_of(from[i + j]) >= least ? 1 : 0;
      if (any == 0) continue;
    }
    for (int64_t j = i; j < stop; ++j) {
      const Key<T> key = std::min(key_of(from[j]), kInfinity<T>);
      keys[found] = key;
      offsets[found] = static_cast<uint16_t>(start + j);
      found += key >= least ? 1 : 0;
    }
  }
  return found;
}

template <class T>
LOOP static int64_t collect(const T* from, int64_t size, Key<T> least, Key<T>* keys, uint16_t* offsets) {
  return collect_tile(from, 0, size, least, keys, offsets);
}

// Makes Δ in `delta` and collects from it in the same pass.
template <class T>
LOOP static int64_t update_and_collect(T* delta, const T* x, const T* s, const Ahead<T>& ahead, const T* point,
                                       int64_t size, Key<T> least, Key<T>* keys, uint16_t* offsets) {
  int64_t found = 0;
  for (int64_t at = 0; at < size; at += kTile) {
    const int64_t n = std::min(kTile, size - at);
    add_update(delta + at, x + at, s ? s + at : nullptr, ahead, point + at, n);
    found += collect_tile(delta + at, at, n, least, keys + found, offsets + found);
  }
  return found;
}

template <class T>
LOOP static void update(T* delta, const T* x, const T* s, const Ahead<T>& ahead, const T* point, int64_t size) {
  for (int64_t at = 0; at < size; at += kTile)
    add_update(delta + at, x + at, s ? s + at : nullptr, ahead, point + at, std::min(kTile, size - at));
}

// The largest key of each of kGroups groups of a block's elements. The k-th of them is reached by k elements.
template <class T>
LOOP static void largest_of_groups(const T* from, int64_t size, Key<T>* largest) {
  std::fill_n(largest, kGroups, Key<T>{0});
  int64_t i = 0;
  for (; i + kGroups <= size; i += kGroups)
    for (int64_t j = 0; j < kGroups; ++j) largest[j] = std::max(largest[j], key_of(from[i + j]));
  for (int64_t j = 0; i + j < size; ++j) largest[j] = std::max(largest[j], key_of(from[i + j]));
  for (int64_t j = 0; j < kGroups; ++j) largest[j] = std::min(largest[j], kInfinity<T>);
}

// How many keys are above one, and how many equal it.
template <class T>
LOOP static void count(const Key<T>* keys, int64_t size, Key<T> key, int64_t& above, int64_t& equal) {
  Key<T> more = 0, same = 0;
  for (int64_t i = 0; i < size; ++i) {
    more += keys[i] > key ? 1 : 0;
    same += keys[i] == key ? 1 : 0;
  }
  above += more;
  equal += same;
}

// Keys of all elements.
template <class T>
LOOP static void keys_of(const T* from, int64_t size, Key<T>* keys) {
  for (int64_t i = 0; i < size; ++i) keys[i] = std::min(key_of(from[i]), kInfinity<T>);
}
