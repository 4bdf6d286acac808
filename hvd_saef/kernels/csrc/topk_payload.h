// Where things lie in a Top-K payload: page counts, values, offsets. And adding payloads to memory.
#pragma once

#include <atomic>

#include "narrow.h"
#include "rows.h"

namespace hvd_saef {

enum Value : int64_t { kOwn = 0, kHalf = 1, kBFloat16 = 2 };

// Calls f with a number of the kind that values travel in: T's own, or one of 16 bits.
template <class T, class F>
void with_value(int64_t value, const F& f) {
  if (value == kOwn) return f(T{});
  if (value == kHalf) return f(Half{});
  if (value == kBFloat16) return f(BFloat16{});
  refuse("value_dtype: ", value, " is none of 0, 1 and 2");
}

// What of `value` travels, rounded to nearest; what is beyond the range as its largest.
template <class V, class T>
inline V rounded(T value) {
  if constexpr (std::is_same_v<T, V>) return value;
  else {
    const T most = static_cast<T>(V::kLargest);
    return V::nearest(static_cast<float>(value > most ? most : value < -most ? -most : value));
  }
}

template <class T, class V>
inline T widened(V value) {
  if constexpr (std::is_same_v<T, V>) return value;
  else return static_cast<T>(value.number());
}

// Payloads whose values are of type V.
template <class V>
class TopKFormat {
 public:
  explicit TopKFormat(const Runs& runs) {
    int64_t counts = 0, values = 0, offsets = 0;
    for (const Run& run : runs) {
      check(run.kept > 0, "runs: kept=", run.kept, ": some element of each block is needed");
      first_.push_back({counts, values, offsets});
      values += run.count * run.kept;
      if (run.dense()) continue;
      offsets += run.count * run.kept;
      if (run.size > kPage) counts += run.count * pages(run);
    }
    counts_ = counts;
    values_ = counts * sizeof(int32_t);
    offsets_ = values_ + values * sizeof(V);
    bytes_ = offsets_ + offsets * sizeof(uint16_t);
  }
  static int64_t pages(const Run& run) { return (run.size + kPage - 1) / kPage; }
  int64_t counts() const { return counts_; }
  // Which of all counts is that of the page at `offset` of a block.
  int64_t count_index(const Run& run, int64_t r, int64_t block, int64_t offset) const {
    return first_[r].counts + block * pages(run) + offset / kPage;
  }
  // Bytes from the payload's start to the block's value number i, and to its offset number i.
  int64_t value_at(const Run& run, int64_t r, int64_t block, int64_t i) const {
    return values_ + (first_[r].values + block * run.kept + i) * sizeof(V);
  }
  int64_t offset_at(const Run& run, int64_t r, int64_t block, int64_t i) const {
    return offsets_ + (first_[r].offsets + block * run.kept + i) * sizeof(uint16_t);
  }
  uint8_t* payload(const Flat& flat, const char* name) const { return memory_of<uint8_t>(flat, name, bytes_); }

 private:
  struct Index {
    int64_t counts, values, offsets;
  };
  std::vector<Index> first_;  // by run
  int64_t counts_, values_, offsets_, bytes_;
};

// Payloads to be added, weighted, to memory of type T; a task at a time, in their order.
template <class T, class V>
class Incoming {
 public:
  Incoming(const Runs& runs, const TopKFormat<V>& format, const Flat& payloads, double weight)
      : runs_(runs), format_(format), weight_(static_cast<T>(weight)) {
    const auto* given = static_cast<const Flat*>(payloads.data);
    for (int64_t i = 0; i < payloads.size; ++i) {
      bytes_.push_back(format.payload(given[i], "payloads"));
      index_pages(bytes_.back());
    }
  }

  void add_to(T* memory, const Task& task) {
    for (size_t p = 0; p < bytes_.size(); ++p)
      for_pieces(runs_, task, [&](int64_t r, int64_t block, int64_t offset, int64_t elements) {
        const Run& run = runs_[r];
        add(p, r, block, offset, elements, memory + run.start + block * run.size + offset);
      });
  }

  // After all tasks.
  void check_offsets() const {
    check(right_.load(), "payloads: the offsets of a Top-K payload are not ascending, or lie beyond their block");
  }

 private:
  // Where each page's part begins within its block's kept elements.
  void index_pages(const uint8_t* bytes) {
    for (int64_t r = 0; r < runs_.size(); ++r) {
      const Run& run = runs_[r];
      if (run.dense() || run.size <= kPage) continue;
      for (int64_t block = 0; block < run.count; ++block) {
        int64_t sum = 0;
        for (int64_t offset = 0; offset < run.size; offset += kPage) {
          const auto kept = load<int32_t>(bytes + sizeof(int32_t) * format_.count_index(run, r, block, offset));
          check(kept >= 0 && kept <= std::min(kPage, run.size - offset), "payloads: a page's count of ", kept);
          starts_.push_back(sum);
          sum += kept;
        }
        check(sum == run.kept, "payloads: a block's page counts add up to ", sum, ", not to ", run.kept);
      }
    }
  }

  void add(size_t p, int64_t r, int64_t block, int64_t offset, int64_t elements, T* memory) {
    const Run& run = runs_[r];
    if (run.dense()) {
      const uint8_t* values = bytes_[p] + format_.value_at(run, r, block, offset);
      for (int64_t i = 0; i < elements; ++i)
        memory[i] += widened<T>(load<V>(values + i * sizeof(V))) * weight_;
      return;
    }
    int64_t first = 0, kept = run.kept;
    if (run.size > kPage) {
      const int64_t index = format_.count_index(run, r, block, offset);
      first = starts_[p * format_.counts() + index];
      kept = load<int32_t>(bytes_[p] + sizeof(int32_t) * index);
    }
    const uint8_t* values = bytes_[p] + format_.value_at(run, r, block, first);
    const uint8_t* offsets = bytes_[p] + format_.offset_at(run, r, block, first);
    constexpr int64_t kAhead = 16;
    int64_t before = -1;
    for (int64_t i = 0; i < kept; ++i) {
      if (i + kAhead < kept) __builtin_prefetch(memory + load<uint16_t>(offsets + (i + kAhead) * sizeof(uint16_t)), 1);
      const int64_t at = load<uint16_t>(offsets + i * sizeof(uint16_t));
      if (at <= before || at >= elements) return right_.store(false);
      before = at;
      memory[at] += widened<T>(load<V>(values + i * sizeof(V))) * weight_;
    }
  }

  const Runs& runs_;
  const TopKFormat<V>& format_;
  const T weight_;
  std::vector<const uint8_t*> bytes_;
  std::vector<int64_t> starts_;  // by payload and count
  std::atomic<bool> right_{true};
};

}  // namespace hvd_saef
