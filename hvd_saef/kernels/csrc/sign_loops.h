// Included by each_set.h: loops over memory, for the sign kernels. A tile is small enough that several
// loops over it stay within the first-level cache, and each array is fetched from memory once.
#include "rows_loops.h"

#if HVD_SAEF_SET == 512
template <class T>
constexpr int64_t kLanes = 64 / sizeof(T);
#else
template <class T>
constexpr int64_t kLanes = 8;  // a byte of bits
#endif
template <class T>
using Lanes __attribute__((vector_size(kLanes<T> * sizeof(T)))) = T;

// -- sign bits -------------------------------------------------------------------------------------------

// The sign bits of 8 elements.
template <class T>
INNER uint8_t signs_of_8(const T* from) {
#if HVD_SAEF_SET == 512
  if constexpr (sizeof(T) == 4) return static_cast<uint8_t>(_mm256_movepi32_mask(_mm256_castps_si256(_mm256_loadu_ps(from))));
  else return static_cast<uint8_t>(_mm512_movepi64_mask(_mm512_castpd_si512(_mm512_loadu_pd(from))));
#elif HVD_SAEF_SET == 2
  if constexpr (sizeof(T) == 4) return static_cast<uint8_t>(_mm256_movemask_ps(_mm256_loadu_ps(from)));
  else return static_cast<uint8_t>(_mm256_movemask_pd(_mm256_loadu_pd(from)) | _mm256_movemask_pd(_mm256_loadu_pd(from + 4)) << 4);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return static_cast<uint8_t>(_mm_movemask_ps(_mm_loadu_ps(from)) | _mm_movemask_ps(_mm_loadu_ps(from + 4)) << 4);
  else return static_cast<uint8_t>(_mm_movemask_pd(_mm_loadu_pd(from)) | _mm_movemask_pd(_mm_loadu_pd(from + 2)) << 2 |
                                   _mm_movemask_pd(_mm_loadu_pd(from + 4)) << 4 | _mm_movemask_pd(_mm_loadu_pd(from + 6)) << 6);
#else
  unsigned byte = 0;
  for (int i = 0; i < 8; ++i) byte |= static_cast<unsigned>(std::signbit(from[i])) << i;
  return static_cast<uint8_t>(byte);
#endif
}

template <class T>
INNER void pack(const T* from, int64_t size, uint8_t* bits) {
  for (int64_t i = 0; i + 8 <= size; i += 8) bits[i / 8] = signs_of_8(from + i);
  if (size % 8) {
    T rest[8] = {};
    std::copy_n(from + size / 8 * 8, size % 8, rest);
    bits[size / 8] = signs_of_8(rest);
  }
}

// a, or -a where the bit is set.
template <class T>
INNER Lanes<T> signed_by(const uint8_t* bits, T a) {
#if HVD_SAEF_SET == 512
  if constexpr (sizeof(T) == 4)
    return (Lanes<T>)_mm512_mask_blend_ps(load<uint16_t>(bits), _mm512_set1_ps(a), _mm512_set1_ps(-a));
  else
    return (Lanes<T>)_mm512_mask_blend_pd(*bits, _mm512_set1_pd(a), _mm512_set1_pd(-a));
#else
  using Word = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Words = Lanes<Word>;
  const Words places = {1, 2, 4, 8, 16, 32, 64, 128};
  const Word least = std::numeric_limits<Word>::min();  // the sign bit alone
  const Words minus = ((Words{} + static_cast<Word>(*bits)) & places) == places;
  return (Lanes<T>)((Words)(a - Lanes<T>{}) ^ (minus & least));  // minus zero: adding it would lose the sign of -0.0
#endif
}

// out += +-a, by the bits.
template <class T>
INNER void add_signed(T* out, int64_t size, const uint8_t* bits, T a) {
  int64_t i = 0;
  for (; i + kLanes<T> <= size; i += kLanes<T>) {
    Lanes<T> sum;
    std::memcpy(&sum, out + i, sizeof(sum));
    sum += signed_by<T>(bits + i / 8, a);
    std::memcpy(out + i, &sum, sizeof(sum));
  }
  for (; i < size; ++i) out[i] += bits[i / 8] >> (i % 8) & 1 ? -a : a;
}

// -- sums of magnitudes --------------------------------------------------------------------------------

// The subtree of one tile: its lines' sum. Missing numbers count as zeros, which change no bit.
template <class T>
INNER void add_lines(const T* from, int64_t size, double* sum) {
  double pairs[kTile / (2 * kLine)][kLine];
  int64_t left = size / (2 * kLine);
  for (int64_t i = 0; i < left; ++i)
    for (int64_t j = 0; j < kLine; ++j)
      pairs[i][j] = static_cast<double>(std::abs(from[2 * kLine * i + j])) +
                    static_cast<double>(std::abs(from[2 * kLine * i + kLine + j]));
  if (size % (2 * kLine)) {
    T rest[2 * kLine] = {};
    std::copy_n(from + 2 * kLine * left, size % (2 * kLine), rest);
    for (int64_t j = 0; j < kLine; ++j)
      pairs[left][j] = static_cast<double>(std::abs(rest[j])) + static_cast<double>(std::abs(rest[kLine + j]));
    ++left;
  }
  for (; left > 1; left = (left + 1) / 2) {
    for (int64_t i = 0; i < left / 2; ++i)
      for (int64_t j = 0; j < kLine; ++j) pairs[i][j] = pairs[2 * i][j] + pairs[2 * i + 1][j];
    if (left % 2)
      for (int64_t j = 0; j < kLine; ++j) pairs[left / 2][j] = pairs[left - 1][j];
  }
  std::copy_n(pairs[0], kLine, sum);
}

// -- the rows around C -----------------------------------------------------------------------------------

// Δ = e + (b - point), and the payloads' terms.
template <class T>
LOOP static void make_delta(const Piece<T>& p, const Ahead<T>& ahead, int64_t at, int64_t size) {
  T* delta = p.memory + at;
  if (p.x != nullptr) add_update(delta, p.x + at, p.s ? p.s + at : nullptr, ahead, p.point + at, size);
  for (const Term<T>& term : *p.terms) {
    if (term.values == nullptr) add_signed(delta, size, term.bits + at / 8, term.scale);
    else
      for (int64_t i = 0; i < size; ++i) delta[i] += load<T>(term.values + (at + i) * sizeof(T)) * term.scale;
  }
}

// Δ, its sign bits, and the sum of its lines.
template <class T>
LOOP static void encode_signs(const Piece<T>& p, const Ahead<T>& ahead, int64_t elements, uint8_t* bits, Tree& tree) {
  for (int64_t at = 0; at < elements; at += kTile) {
    const int64_t size = std::min(kTile, elements - at);
    make_delta(p, ahead, at, size);
    pack(p.memory + at, size, bits + at / 8);
    double sum[kLine];
    add_lines(p.memory + at, size, sum);
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

// x += the payloads' terms; e -= C(e); point = b.
template <class T>
LOOP static void decode(const Piece<T>& p, const Ahead<T>& ahead, int64_t elements, const T* scale) {
  for (int64_t at = 0; at < elements; at += kTile) {
    const int64_t size = std::min(kTile, elements - at);
    T* out = p.memory + at;
    for (const Term<T>& term : *p.terms) {
      if (term.values == nullptr) add_signed(out, size, term.bits + at / 8, term.scale);
      else
        for (int64_t i = 0; i < size; ++i) out[i] += load<T>(term.values + (at + i) * sizeof(T)) * term.scale;
    }
    if (scale != nullptr) settle(p.e + at, size, *scale);
    if (p.point != nullptr) start_point(out, p.e ? p.e + at : nullptr, p.s ? p.s + at : nullptr, ahead, size, p.point + at);
  }
}
