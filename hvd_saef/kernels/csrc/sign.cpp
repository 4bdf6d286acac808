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
  void check_payload(const Tensor& payload, const char* name) const { check_flat(payload, name, at::kByte, bytes); }
};

// What both directions are given, by element and by payload.
template <class T>
struct Call {
  Runs runs;
  Format format;
  Points<T> points;
  std::vector<const uint8_t*> payloads;
  T weight;
  std::vector<Task> tasks;

  Call(const Tensor& table, const std::vector<Tensor>& pieces, const std::vector<Tensor>& given, double w)
      : runs(table), format(runs, sizeof(T)), points(pieces, runs), weight(static_cast<T>(w)) {
    check(w == 0 || std::isfinite(w), "weight=", w, ": a finite number is needed");
    for (const Tensor& payload : given) {
      format.check_payload(payload, "payloads");
      payloads.push_back(payload.const_data_ptr<uint8_t>());
    }
    split(runs, tasks);
  }

  T* memory(const Tensor& tensor, const char* name) const {
    check_flat(tensor, name, c10::CppTypeToScalarType<T>::value, runs.numel());
    return tensor.data_ptr<T>();
  }
  T* memory(const MaybeTensor& tensor, const char* name) const { return tensor ? memory(*tensor, name) : nullptr; }

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
void encode(const Call<T>& call, T* delta, uint8_t* payload, const T* x, const T* s, const Ahead<T>& ahead) {
  const Runs& runs = call.runs;
  thread_local std::vector<double> scratch;
  scratch.resize(call.tasks.size() * kLine);
  double* partial = scratch.data();  // of each page: the threads below have a scratch of their own
  for_tasks(call.tasks, [&](int64_t index, const Task& task) {
    std::vector<Term<T>> terms;
    for_pieces(runs, task, [&](int64_t r, int64_t block, int64_t offset, int64_t elements) {
      const Run& run = runs[r];
      const int64_t start = run.start + block * run.size + offset;
      call.terms(r, block, offset, terms);
      const Piece<T> piece{delta + start, x ? x + start : nullptr, nullptr, s ? s + start : nullptr,
                           call.points.at(start), &terms};
      uint8_t* head = payload + call.format.scale_at(runs, r, block);
      if (run.dense()) {
        HVD_SAEF_DISPATCH(encode_dense, piece, ahead, elements, head + offset * sizeof(T));
        return;
      }
      Tree tree;
      HVD_SAEF_DISPATCH(encode_signs, piece, ahead, elements,
                        payload + call.format.bits_at(runs, r, block, offset), tree);
      if (task.whole) store(head, scale_of<T>(tree, run));
      else std::copy_n(tree.lines(), kLine, partial + index * kLine);
    });
  });
  // The scales of blocks of several pages.
  for (size_t i = 0; i < call.tasks.size();) {
    const Task& task = call.tasks[i];
    const Run& run = runs[task.run];
    if (task.whole || run.dense()) {
      ++i;
      continue;
    }
    Tree tree;
    for (int64_t offset = 0; offset < run.size; offset += kPage, ++i) tree.add(partial + i * kLine);
    store(payload + call.format.scale_at(runs, task.run, task.block), scale_of<T>(tree, run));
  }
}

template <class T>
void decode(const Call<T>& call, T* out, T* e, const uint8_t* sent, const T* s, const Ahead<T>& ahead) {
  const Runs& runs = call.runs;
  const bool past_caches = runs.numel() * static_cast<int64_t>(sizeof(T)) >= kLarge;
  for_tasks(call.tasks, [&](int64_t, const Task& task) {
    std::vector<Term<T>> terms;
    for_pieces(runs, task, [&](int64_t r, int64_t block, int64_t offset, int64_t elements) {
      const Run& run = runs[r];
      const int64_t start = run.start + block * run.size + offset;
      call.terms(r, block, offset, terms);
      const Piece<T> piece{out + start, nullptr, e ? e + start : nullptr, s ? s + start : nullptr,
                           call.points.at(start), &terms};
      const bool settles = sent != nullptr && !run.dense();
      const T scale = settles ? load<T>(sent + call.format.scale_at(runs, r, block)) : T{0};
      HVD_SAEF_DISPATCH(decode, piece, ahead, elements, settles ? &scale : nullptr, past_caches);
    });
#if defined(__x86_64__)
    if (past_caches) _mm_sfence();  // such stores keep no order by themselves
#endif
  });
}

template <class T>
Ahead<T> ahead_of(double alpha, double beta) {
  return {static_cast<T>(alpha), static_cast<T>(beta)};
}

}  // namespace

void sign_encode(const Tensor& delta, const Tensor& runs, const Tensor& payload, const MaybeTensor& x,
                 const MaybeTensor& s, double alpha, double beta, const std::vector<Tensor>& points,
                 const std::vector<Tensor>& payloads, double weight) {
  with_dtype(delta.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Call<T> call(runs, points, payloads, weight);
    call.format.check_payload(payload, "payload");
    check(x.has_value() == !call.points.none() || call.runs.numel() == 0, "x and points: both are needed, or neither");
    encode<T>(call, call.memory(delta, "delta"), payload.data_ptr<uint8_t>(), call.memory(x, "x"),
              call.memory(s, "s"), ahead_of<T>(alpha, beta));
  });
}

void sign_decode(const Tensor& out, const Tensor& runs, const std::vector<Tensor>& payloads, double weight,
                 const MaybeTensor& e, const MaybeTensor& sent, const MaybeTensor& s, double alpha, double beta,
                 const std::vector<Tensor>& points) {
  with_dtype(out.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Call<T> call(runs, points, payloads, weight);
    if (sent) call.format.check_payload(*sent, "sent");
    check(!sent || e, "sent: it settles e, which is not given");
    check(call.points.none() || alpha == 0 || e, "alpha=", alpha, ": e is needed");
    decode<T>(call, call.memory(out, "out"), call.memory(e, "e"), sent ? sent->const_data_ptr<uint8_t>() : nullptr,
              call.memory(s, "s"), ahead_of<T>(alpha, beta));
  });
}

void sign_settle(const Tensor& memory, const Tensor& runs, const Tensor& payload) {
  with_dtype(memory.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Call<T> call(runs, {}, {}, 0);
    call.format.check_payload(payload, "payload");
    T* start = call.memory(memory, "memory");
    const uint8_t* scales = payload.const_data_ptr<uint8_t>();
    for_tasks(call.tasks, [&](int64_t, const Task& task) {
      for_pieces(call.runs, task, [&](int64_t r, int64_t block, int64_t offset, int64_t elements) {
        const Run& run = call.runs[r];
        if (run.dense()) return;
        const T scale = load<T>(scales + call.format.scale_at(call.runs, r, block));
        HVD_SAEF_DISPATCH(settle, start + run.start + block * run.size + offset, elements, scale);
      });
    });
  });
}

}  // namespace hvd_saef
