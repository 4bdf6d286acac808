// Scaled sign: payloads of scales and sign bits, with the rows of Algorithm 1 around them in the same pass.
#include "sign.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <limits>

namespace hvd_saef {
namespace {

constexpr int64_t kLine = 16;    // width of the summation tree's last level
static_assert(kTile % kLine == 0 && kPage % kTile == 0);  // a tile and a page are complete subtrees

constexpr int64_t kLarge = int64_t{8} << 20;  // bytes: such arrays are gone from the caches before their next use

// The summation tree of one block, fed with complete subtrees of one size (the last may be smaller).
class Tree {
 public:
  void add(const double* lines) {
    std::copy_n(lines, kLine, stack_[depth_++]);
    for (int64_t n = ++count_; n % 2 == 0; n /= 2) fold();
  }
  const double* lines() {
    while (depth_ > 1) fold();
    return stack_[0];
  }
  double sum() {
    double line[kLine];
    std::copy_n(lines(), kLine, line);
    for (int64_t half = kLine / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) line[i] += line[i + half];
    return line[0];
  }

 private:
  void fold() {
    --depth_;
    for (int64_t i = 0; i < kLine; ++i) stack_[depth_ - 1][i] += stack_[depth_][i];
  }
  double stack_[64][kLine];
  int64_t count_ = 0, depth_ = 0;
};

// One payload's part for a piece of a block: bits and what to add by them, or dense values and their weight.
template <class T>
struct Term {
  const uint8_t *bits, *values;
  T scale;
};

// The memory of one piece of a block; what there is not is nullptr.
template <class T>
struct Piece {
  T* memory;  // Δ when encoding, x when decoding
  const T* x;
  T* e;
  const T* s;
  T* point;
  const std::vector<Term<T>>* terms;
};

// Sign bits of `lanes` numbers, by the bits that say which are set.
template <class T, int64_t lanes>
struct Minus {
  alignas(64) T rows[1 << lanes][lanes];
  Minus() {
    for (int64_t bits = 0; bits < 1 << lanes; ++bits)
      for (int64_t i = 0; i < lanes; ++i) rows[bits][i] = bits >> i & 1 ? T{-0.} : T{0};
  }
};
template <class T, int64_t lanes>
const Minus<T, lanes> kMinus;

}  // namespace

#define HVD_SAEF_LOOPS "sign_loops.h"
#include "each_set.h"

namespace {

// Where each run's part of a payload lies: its blocks' scales (or values), and their bits.
struct Format {
  int64_t item, bytes = 0;
  std::vector<int64_t> head, bits;  // by run

  Format(const Runs& runs, int64_t item) : item(item) {
    for (const Run& run : runs) {
      head.push_back(bytes);
      bytes += run.count * (run.dense() ? run.size : 1) * item;
    }
    for (const Run& run : runs) {
      bits.push_back(bytes);
      bytes += run.dense() ? 0 : run.count * octets(run);
    }
  }
  static int64_t octets(const Run& run) { return (run.size + 7) / 8; }
  int64_t scale_at(const Runs& runs, int64_t run, int64_t block) const {
    return head[run] + block * (runs[run].dense() ? runs[run].size : 1) * item;
  }
  int64_t bits_at(const Runs& runs, int64_t run, int64_t block, int64_t offset) const {
    return bits[run] + block * octets(runs[run]) + offset / 8;
  }
};

// What both directions are given, by element and by payload.
template <class T>
struct Given {
  Runs runs;
  Format format;
  Points<T> points;
  std::vector<const uint8_t*> payloads;
  T weight;
  int64_t threads;
  std::vector<Task> tasks;

  explicit Given(const Call& call)
      : runs(call.runs), format(runs, sizeof(T)), points(call.points, runs), weight(static_cast<T>(call.weight)),
        threads(call.threads) {
    check(std::isfinite(call.weight), "weight=", call.weight, ": a finite number is needed");
    const auto* given = static_cast<const Flat*>(call.payloads.data);
    for (int64_t i = 0; i < call.payloads.size; ++i)
      payloads.push_back(memory_of<const uint8_t>(given[i], "payloads", format.bytes));
    split(runs, tasks);
  }

  T* memory(const Flat& flat, const char* name) const { return memory_of<T>(flat, name, runs.numel()); }
  T* memory_if(const Flat& flat, const char* name) const { return memory_or_null<T>(flat, name, runs.numel()); }
  uint8_t* payload(const Flat& flat, const char* name) const { return memory_of<uint8_t>(flat, name, format.bytes); }

  void terms(int64_t run, int64_t block, int64_t offset, std::vector<Term<T>>& terms) const {
    terms.clear();
    const int64_t scale = format.scale_at(runs, run, block), bits = format.bits_at(runs, run, block, offset);
    for (const uint8_t* payload : payloads) {
      if (runs[run].dense()) terms.push_back({nullptr, payload + scale + offset * sizeof(T), weight});
      else terms.push_back({payload + bits, nullptr, load<T>(payload + scale) * weight});
    }
  }
};

template <class T>
T scale_of(Tree& tree, const Run& run) {
  return static_cast<T>(tree.sum() / static_cast<double>(run.size));
}

template <class T>
void encode(const Given<T>& given, T* delta, uint8_t* payload, const T* x, const T* s, const Ahead<T>& ahead) {
  const Runs& runs = given.runs;
  thread_local std::vector<double> scratch;
  scratch.resize(given.tasks.size() * kLine);
  double* partial = scratch.data();  // of each page: the threads below have a scratch of their own
  for_tasks(given.threads, given.tasks, [&](int64_t index, const Task& task) {
    std::vector<Term<T>> terms;
    for_pieces(runs, task, [&](int64_t r, int64_t block, int64_t offset, int64_t elements) {
      const Run& run = runs[r];
      const int64_t start = run.start + block * run.size + offset;
      given.terms(r, block, offset, terms);
      const Piece<T> piece{delta + start, x ? x + start : nullptr, nullptr, s ? s + start : nullptr,
                           given.points.at(start), &terms};
      uint8_t* head = payload + given.format.scale_at(runs, r, block);
      if (run.dense()) {
        HVD_SAEF_DISPATCH(encode_dense, piece, ahead, elements, head + offset * sizeof(T));
        return;
      }
      Tree tree;
      HVD_SAEF_DISPATCH(encode_signs, piece, ahead, elements,
                        payload + given.format.bits_at(runs, r, block, offset), tree);
      if (task.whole) store(head, scale_of<T>(tree, run));
      else std::copy_n(tree.lines(), kLine, partial + index * kLine);
    });
  });
  // The scales of blocks of several pages.
  for (size_t i = 0; i < given.tasks.size();) {
    const Task& task = given.tasks[i];
    const Run& run = runs[task.run];
    if (task.whole || run.dense()) {
      ++i;
      continue;
    }
    Tree tree;
    for (int64_t offset = 0; offset < run.size; offset += kPage, ++i) tree.add(partial + i * kLine);
    store(payload + given.format.scale_at(runs, task.run, task.block), scale_of<T>(tree, run));
  }
}

template <class T>
void decode(const Given<T>& given, T* out, T* e, const uint8_t* sent, const T* s, const Ahead<T>& ahead) {
  const Runs& runs = given.runs;
  const bool past_caches = runs.numel() * static_cast<int64_t>(sizeof(T)) >= kLarge;
  for_tasks(given.threads, given.tasks, [&](int64_t, const Task& task) {
    std::vector<Term<T>> terms;
    for_pieces(runs, task, [&](int64_t r, int64_t block, int64_t offset, int64_t elements) {
      const Run& run = runs[r];
      const int64_t start = run.start + block * run.size + offset;
      given.terms(r, block, offset, terms);
      const Piece<T> piece{out + start, nullptr, e ? e + start : nullptr, s ? s + start : nullptr,
                           given.points.at(start), &terms};
      const bool settles = sent != nullptr && !run.dense();
      const T scale = settles ? load<T>(sent + given.format.scale_at(runs, r, block)) : T{0};
      HVD_SAEF_DISPATCH(decode, piece, ahead, elements, settles ? &scale : nullptr, past_caches);
    });
#if defined(__x86_64__)
    if (past_caches) _mm_sfence();  // such stores keep no order by themselves
#endif
  });
}

template <class T>
Ahead<T> ahead_of(const Call& call) {
  return {static_cast<T>(call.alpha), static_cast<T>(call.beta)};
}

}  // namespace

void sign_encode(const Call& call) {
  with_number(call.number, [&](auto zero) {
    using T = decltype(zero);
    const Given<T> given(call);
    uint8_t* payload = given.payload(call.payload, "payload");
    check((call.other.size >= 0) == !given.points.none() || given.runs.numel() == 0,
          "x and points: both are needed, or neither");
    encode<T>(given, given.memory(call.memory, "delta"), payload, given.memory_if(call.other, "x"),
              given.memory_if(call.server, "s"), ahead_of<T>(call));
  });
}

void sign_decode(const Call& call) {
  with_number(call.number, [&](auto zero) {
    using T = decltype(zero);
    const Given<T> given(call);
    const bool settles = call.payload.size >= 0, has_e = call.other.size >= 0;
    const uint8_t* sent = settles ? given.payload(call.payload, "sent") : nullptr;
    check(!settles || has_e, "sent: it settles e, which is not given");
    check(given.points.none() || call.alpha == 0 || has_e, "alpha=", call.alpha, ": e is needed");
    decode<T>(given, given.memory(call.memory, "out"), given.memory_if(call.other, "e"), sent,
              given.memory_if(call.server, "s"), ahead_of<T>(call));
  });
}

void sign_settle(const Call& call) {
  with_number(call.number, [&](auto zero) {
    using T = decltype(zero);
    const Given<T> given(call);
    const uint8_t* scales = given.payload(call.payload, "payload");
    T* start = given.memory(call.memory, "memory");
    for_tasks(given.threads, given.tasks, [&](int64_t, const Task& task) {
      for_pieces(given.runs, task, [&](int64_t r, int64_t block, int64_t offset, int64_t elements) {
        const Run& run = given.runs[r];
        if (run.dense()) return;
        const T scale = load<T>(scales + given.format.scale_at(given.runs, r, block));
        HVD_SAEF_DISPATCH(settle, start + run.start + block * run.size + offset, elements, scale);
      });
    });
  });
}

}  // namespace hvd_saef
