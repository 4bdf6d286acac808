// Included by each_set.h: loops over memory, for the sign kernels. A tile is small enough that several
// loops over it stay within the first-level cache, and each array is fetched from memory once.
#include "rows_loops.h"

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

// out += +-a, by the bits, for as many elements as one step takes: kStep.
#if HVD_SAEF_SET == 512
template <class T>
constexpr int64_t kStep = 64 / sizeof(T);

template <class T>
INNER void step_signed(T* out, const uint8_t* bits, T a) {
  if constexpr (sizeof(T) == 4) {
    const __m512 term = _mm512_mask_blend_ps(load<uint16_t>(bits), _mm512_set1_ps(a), _mm512_set1_ps(-a));
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), term));
  } else {
    const __m512d term = _mm512_mask_blend_pd(*bits, _mm512_set1_pd(a), _mm512_set1_pd(-a));
    _mm512_storeu_pd(out, _mm512_add_pd(_mm512_loadu_pd(out), term));
  }
}
#else
template <class T>
constexpr int64_t kStep = 8;  // a byte of bits

#if HVD_SAEF_SET == 2
constexpr int64_t kBytes = 32;  // of a vector
#else
constexpr int64_t kBytes = 16;
#endif

template <class T>
INNER void step_signed(T* out, const uint8_t* bits, T a) {
  constexpr int64_t lanes = kBytes / sizeof(T);
  typedef T Lanes __attribute__((vector_size(kBytes)));
  const Lanes scales = a - Lanes{};  // zero is subtracted: adding it would lose the sign of -0.0
  for (int64_t i = 0; i < kStep<T>; i += lanes) {
    Lanes sum, minus;
    std::memcpy(&minus, kMinus<T, lanes>.rows[*bits >> i & ((1 << lanes) - 1)], kBytes);
    std::memcpy(&sum, out + i, kBytes);
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Words __attribute__((vector_size(kBytes)));
    sum += (Lanes)((Words)scales ^ (Words)minus);
    std::memcpy(out + i, &sum, kBytes);
  }
}
#endif

// out += +-a, by the bits.
template <class T>
INNER void add_signed(T* out, int64_t size, const uint8_t* bits, T a) {
  int64_t i = 0;
  for (; i + kStep<T> <= size; i += kStep<T>) step_signed(out + i, bits + i / 8, a);
  for (; i < size; ++i) out[i] += bits[i / 8] >> (i % 8) & 1 ? -a : a;
}

// -- sums of magnitudes --------------------------------------------------------------------------------

// The subtree of one tile, its first level (neighbouring lines in pairs) given: its lines' sum.
LOOP inline void fold_pairs(double (*pairs)[kLine], int64_t left, double* sum) {
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

// The sign bits and the lines' sum of a tile. With x, Δ is made on the way, of x and point, by alpha = 1 alone: memory
// is waited for while sums are computed.
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
  for (const Term<T>& term : *p.terms) {
    if (term.values == nullptr) add_signed(delta, size, term.bits + at / 8, term.scale);
    else
      for (int64_t i = 0; i < size; ++i) delta[i] += load<T>(term.values + (at + i) * sizeof(T)) * term.scale;
  }
}

// Δ, its sign bits, and the sum of its lines.
template <class T>
LOOP static void encode_signs(const Piece<T>& p, const Ahead<T>& ahead, int64_t elements, uint8_t* bits, Tree& tree) {
  const bool plain = p.x != nullptr && ahead.alpha == 1 && (p.s == nullptr || ahead.beta == 0) && p.terms->empty();
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

// Copies to memory past the caches, where whole lines of theirs are written: they need not be read first.
template <class T>
INNER void stream(const T* from, int64_t size, T* to) {
  int64_t i = 0;
#if HVD_SAEF_SET == 512
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t first = -reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T);
  for (; i < std::min(first, size); ++i) to[i] = from[i];
  for (; i + line <= size; i += line)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif HVD_SAEF_SET == 2
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t first = -reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T);
  for (; i < std::min(first, size); ++i) to[i] = from[i];
  for (; i + line <= size; i += line)
    for (int64_t j = i; j < i + line; j += line / 2)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + j),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + j)));
#endif
  for (; i < size; ++i) to[i] = from[i];
}

// x += the payloads' terms; e -= C(e); point = b.
template <class T>
LOOP static void decode(const Piece<T>& p, const Ahead<T>& ahead, int64_t elements, const T* scale, bool past_caches) {
  for (int64_t at = 0; at < elements; at += kTile) {
    const int64_t size = std::min(kTile, elements - at);
    T* out = p.memory + at;
    for (const Term<T>& term : *p.terms) {
      if (term.values == nullptr) add_signed(out, size, term.bits + at / 8, term.scale);
      else
        for (int64_t i = 0; i < size; ++i) out[i] += load<T>(term.values + (at + i) * sizeof(T)) * term.scale;
    }
    if (scale != nullptr) settle(p.e + at, size, *scale);
    if (p.point == nullptr) continue;
    const T *e = p.e ? p.e + at : nullptr, *s = p.s ? p.s + at : nullptr;
    if (past_caches) {
      alignas(64) T b[kTile];
      start_point(out, e, s, ahead, size, b);
      stream(b, size, p.point + at);
    } else start_point(out, e, s, ahead, size, p.point + at);
  }
}
