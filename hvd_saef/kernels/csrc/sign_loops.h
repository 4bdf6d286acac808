// Included by each_set.h: loops over memory, for the sign kernels. A tile is small enough that several
// loops over it stay within the first-level cache, and each array is fetched from memory once.
#include "rows_loops.h"

// -- sign bits -------------------------------------------------------------------------------------------

// The sign bits of 8 elements.
template <class T>
INNER uint8_t signs_of_8(const T* from) {
#if HVD_SAEF_SET == 512
  if constexpr (sizeof(T) == 4) return _mm256_movepi32_mask(_mm256_castps_si256(_mm256_loadu_ps(from)));
  else return _mm512_movepi64_mask(_mm512_castpd_si512(_mm512_loadu_pd(from)));
#elif HVD_SAEF_SET == 2
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps(_mm256_loadu_ps(from));
  else return _mm256_movemask_pd(_mm256_loadu_pd(from)) | _mm256_movemask_pd(_mm256_loadu_pd(from + 4)) << 4;
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4)
    return _mm_movemask_ps(_mm_loadu_ps(from)) | _mm_movemask_ps(_mm_loadu_ps(from + 4)) << 4;
  int byte = 0;
  if constexpr (sizeof(T) == 8)
    for (int i = 0; i < 8; i += 2) byte |= _mm_movemask_pd(_mm_loadu_pd(from + i)) << i;
  return byte;
#else
  unsigned byte = 0;
  for (int i = 0; i < 8; ++i) byte |= static_cast<unsigned>(std::signbit(from[i])) << i;
  return byte;
#endif
}

// -- vectors -----------------------------------------------------------------------------------------------

#if HVD_SAEF_SET == 512
constexpr int64_t kBytes = 64;
#elif HVD_SAEF_SET == 2
constexpr int64_t kBytes = 32;
#else
constexpr int64_t kBytes = 16;
#endif
template <class T>
constexpr int64_t kLanes = kBytes / sizeof(T);
template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Lanes = typename Vector<T>::type;
template <class T>
using Word = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
constexpr int64_t kGroup = 32;  // elements whose vectors are kept in registers
template <class T>
constexpr int64_t kVectors = kGroup / kLanes<T>;

template <class T>
INNER Lanes<T> get(const T* from) {
  Lanes<T> value;
  std::memcpy(&value, from, kBytes);
  return value;
}

template <class T>
INNER void put(T* to, Lanes<T> value) {
  std::memcpy(to, &value, kBytes);
}

// Past the caches, so that the line need not be read first; `to` is aligned.
template <class T>
INNER void put_past_caches(T* to, Lanes<T> value) {
#if HVD_SAEF_SET == 512
  _mm512_stream_si512((__m512i*)to, (__m512i)value);
#elif HVD_SAEF_SET == 2
  _mm256_stream_si256((__m256i*)to, (__m256i)value);
#elif defined(__SSE2__)
  _mm_stream_si128((__m128i*)to, (__m128i)value);
#else
  put(to, value);
#endif
}

// +-a for the vector from element i of a group, whose first bit is that of `bits`.
template <class T>
INNER Lanes<T> term(const uint8_t* bits, int64_t i, T a) {
#if HVD_SAEF_SET == 512
  if constexpr (sizeof(T) == 4)
    return (Lanes<T>)_mm512_mask_blend_ps(load<uint16_t>(bits + i / 8), _mm512_set1_ps(a), _mm512_set1_ps(-a));
  else
    return (Lanes<T>)_mm512_mask_blend_pd(bits[i / 8], _mm512_set1_pd(a), _mm512_set1_pd(-a));
#else
  constexpr int64_t lanes = kLanes<T>;
  const T* minus = kMinus<T, lanes>.rows[bits[i / 8] >> i % 8 & ((1 << lanes) - 1)];
  const Lanes<T> scales = a - Lanes<T>{};  // zero is subtracted: adding it would lose the sign of -0.0
  return (Lanes<T>)((Lanes<Word<T>>)scales ^ (Lanes<Word<T>>)get(minus));
#endif
}

// A group of out, and the payloads' terms, in their order.
template <class T>
INNER void sum_group(const T* out, const std::vector<Term<T>>& terms, int64_t octet, Lanes<T>* sums) {
  for (int64_t v = 0; v < kVectors<T>; ++v) sums[v] = get(out + v * kLanes<T>);
  for (const Term<T>& t : terms)
    for (int64_t v = 0; v < kVectors<T>; ++v) sums[v] += term(t.bits + octet, v * kLanes<T>, t.scale);
}

// out += the payloads' terms, from element `at` of the piece.
template <class T>
INNER void add_terms(T* out, int64_t at, int64_t size, const std::vector<Term<T>>& terms) {
  if (terms.empty()) return;
  int64_t i = 0;
  if (terms[0].values != nullptr) {
    for (const Term<T>& t : terms)
      for (i = 0; i < size; ++i) out[i] += load<T>(t.values + (at + i) * sizeof(T)) * t.scale;
    return;
  }
  for (; i + kGroup <= size; i += kGroup) {
    Lanes<T> sums[kVectors<T>];
    sum_group(out + i, terms, (at + i) / 8, sums);
    for (int64_t v = 0; v < kVectors<T>; ++v) put(out + i + v * kLanes<T>, sums[v]);
  }
  for (; i < size; ++i)
    for (const Term<T>& t : terms) out[i] += t.bits[(at + i) / 8] >> (i % 8) & 1 ? -t.scale : t.scale;
}

// -- sums of magnitudes --------------------------------------------------------------------------------

// The subtree of one tile, its first level (neighbouring lines in pairs) given: its lines' sum.
LOOP static void fold_pairs(double (*pairs)[kLine], int64_t left, double* sum) {
  for (; left > 1; left = (left + 1) / 2) {
    for (int64_t i = 0; i < left / 2; ++i)
      for (int64_t j = 0; j < kLine; ++j) pairs[i][j] = pairs[2 * i][j] + pairs[2 * i + 1][j];
    if (left % 2)
      for (int64_t j = 0; j < kLine; ++j) pairs[left / 2][j] = pairs[left - 1][j];
  }
  std::copy_n(pairs[0], kLine, sum);
}

template <class T>
INNER void add_pair(const T* from, double* pair) {
  for (int64_t j = 0; j < kLine; ++j)
    pair[j] = static_cast<double>(std::abs(from[j])) + static_cast<double>(std::abs(from[kLine + j]));
}

// The sign bits and the lines' sum of a tile. With x, Δ is made on the way, by alpha = 1 alone: in one loop
// the sums are computed while memory is waited for.
template <class T>
INNER void pack_and_sum(T* delta, const T* x, const T* point, int64_t size, uint8_t* bits, double* sum) {
  double pairs[kTile / (2 * kLine)][kLine];
  const int64_t whole = size / (2 * kLine), rest = size % (2 * kLine);
  for (int64_t i = 0, at = 0; i < whole; ++i, at += 2 * kLine) {
    if (x != nullptr) {
#pragma GCC ivdep
      for (int64_t j = at; j < at + 2 * kLine; ++j) delta[j] += (x[j] - delta[j]) - point[j];
    }
    for (int64_t j = at; j < at + 2 * kLine; j += 8) bits[j / 8] = signs_of_8(delta + j);
    add_pair(delta + at, pairs[i]);
  }
  if (rest) {  // missing numbers count as zeros, which change no bit of a sum
    T padded[2 * kLine] = {};
    T* last = delta + size - rest;
    for (int64_t j = 0; j < rest; ++j) {
      if (x != nullptr) last[j] += (x[size - rest + j] - last[j]) - point[size - rest + j];
      padded[j] = last[j];
    }
    for (int64_t j = 0; j < rest; j += 8) bits[(size - rest + j) / 8] = signs_of_8(padded + j);
    add_pair(padded, pairs[whole]);
  }
  fold_pairs(pairs, whole + (rest != 0), sum);
}

// -- the rows around C -----------------------------------------------------------------------------------

// Δ = e + (b - point), and the payloads' terms.
template <class T>
LOOP static void make_delta(const Piece<T>& p, const Ahead<T>& ahead, int64_t at, int64_t size) {
  T* delta = p.memory + at;
  if (p.x != nullptr) add_update(delta, p.x + at, p.s ? p.s + at : nullptr, ahead, p.point + at, size);
  add_terms(delta, at, size, *p.terms);
}

// Δ, its sign bits, and the sum of its lines.
template <class T>
LOOP static void encode_signs(const Piece<T>& p, const Ahead<T>& ahead, int64_t elements, uint8_t* bits,
                              Tree& tree) {
  const bool plain =
      p.x != nullptr && ahead.alpha == 1 && (p.s == nullptr || ahead.beta == 0) && p.terms->empty();
  for (int64_t at = 0; at < elements; at += kTile) {
    const int64_t size = std::min(kTile, elements - at);
    double sum[kLine];
    if (plain) {
      pack_and_sum(p.memory + at, p.x + at, p.point + at, size, bits + at / 8, sum);
    } else {
      make_delta(p, ahead, at, size);
      pack_and_sum<T>(p.memory + at, nullptr, nullptr, size, bits + at / 8, sum);
    }
    tree.add(sum);
  }
}

// Δ, all of which travels.
template <class T>
LOOP static void encode_dense(const Piece<T>& p, const Ahead<T>& ahead, int64_t elements, uint8_t* values) {
  for (int64_t at = 0; at < elements; at += kTile) {
    const int64_t size = std::min(kTile, elements - at);
    make_delta(p, ahead, at, size);
    std::memcpy(values + at * sizeof(T), p.memory + at, size * sizeof(T));
    std::fill_n(p.memory + at, size, T{0});
  }
}

// memory -= +-scale, by its own signs.
template <class T>
LOOP static void settle(T* memory, int64_t size, T scale) {
  for (int64_t i = 0; i < size; ++i) memory[i] -= std::signbit(memory[i]) ? -scale : scale;
}

// A group of row 6 and 2 by alpha = 1 alone: x += terms; e -= C(e); point = x - e.
template <class T>
INNER void land_group(T* x, T* e, T* point, const std::vector<Term<T>>& terms, int64_t octet, T scale,
                      bool past_caches) {
  const Lanes<T> scales = scale - Lanes<T>{}, zeros = T{-0.} - Lanes<T>{};
  Lanes<T> sums[kVectors<T>];
  sum_group(x, terms, octet, sums);
  for (int64_t v = 0; v < kVectors<T>; ++v) {
    const int64_t i = v * kLanes<T>;
    const Lanes<T> before = get(e + i);
    const auto minus = (Lanes<Word<T>>)before & (Lanes<Word<T>>)zeros;
    const Lanes<T> after = before - (Lanes<T>)((Lanes<Word<T>>)scales ^ minus);
    put(x + i, sums[v]);
    put(e + i, after);
    if (past_caches) put_past_caches(point + i, sums[v] - after);
    else put(point + i, sums[v] - after);
  }
}

// x += the payloads' terms; e -= C(e); point = b.
template <class T>
LOOP static void decode(const Piece<T>& p, const Ahead<T>& ahead, int64_t elements, const T* scale,
                        bool past_caches) {
  int64_t at = 0;
  if (scale != nullptr && p.point != nullptr && ahead.alpha == 1 && (p.s == nullptr || ahead.beta == 0)) {
    past_caches = past_caches && reinterpret_cast<uintptr_t>(p.point) % kBytes == 0;
    for (; at + kGroup <= elements; at += kGroup)
      land_group(p.memory + at, p.e + at, p.point + at, *p.terms, at / 8, *scale, past_caches);
  }
  for (; at < elements; at += kTile) {
    const int64_t size = std::min(kTile, elements - at);
    T *out = p.memory + at, *e = p.e ? p.e + at : nullptr;
    add_terms(out, at, size, *p.terms);
    if (scale != nullptr) settle(e, size, *scale);
    if (p.point != nullptr) start_point(out, e, p.s ? p.s + at : nullptr, ahead, size, p.point + at);
  }
}
