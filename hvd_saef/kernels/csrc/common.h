// What the kernels share: runs of blocks, the parameters' own memory, tasks for threads, instruction sets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "abi.h"
#include "parallel.h"

namespace hvd_saef {

// -- checks: a wrong argument is a ValueError that says which one ------------------------------------

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <class... Parts>
void check(bool right, const Parts&... parts) {
  if (!right) refuse(parts...);
}

// The memory of so many numbers, or it is refused by its name.
template <class T>
inline T* memory_of(const Flat& flat, const char* name, int64_t length) {
  check(flat.size == length, name, " has ", flat.size, " elements; ", length, " are needed");
  return static_cast<T*>(flat.data);
}

// The same of what may be left out: nullptr then.
template <class T>
inline T* memory_or_null(const Flat& flat, const char* name, int64_t length) {
  return flat.size < 0 ? nullptr : memory_of<T>(flat, name, length);
}

// Calls f with a float or a double, whichever has so many bytes.
template <class F>
void with_number(int64_t bytes, const F& f) {
  if (bytes == sizeof(float)) return f(float{});
  if (bytes == sizeof(double)) return f(double{});
  refuse("numbers of 4 or 8 bytes are needed, not of ", bytes);
}

// Payloads cut at any byte: loads and stores that need no alignment.
template <class T>
inline T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
inline void store(uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

// -- runs of blocks ------------------------------------------------------------------------------------

// `count` blocks of `size` elements one after another from element `start`. `kept` elements of each
// travel (Top-K); all of them: the block travels dense.
struct Run {
  int64_t start, size, count, kept;
  bool dense() const { return kept == size; }
  int64_t stop() const { return start + size * count; }
};

// A table's rows, checked: ascending, without gaps, from element 0.
class Runs {
 public:
  explicit Runs(const Flat& table) : rows_(static_cast<const Run*>(table.data)), size_(table.size) {
    for (const Run& run : *this) {
      check(run.start == numel_ && run.size > 0 && run.count > 0 && run.kept >= 0 && run.kept <= run.size,
            "runs: row (", run.start, ", ", run.size, ", ", run.count, ", ", run.kept, ") after element ", numel_);
      numel_ = run.stop();
    }
  }
  const Run* begin() const { return rows_; }
  const Run* end() const { return rows_ + size_; }
  const Run& operator[](int64_t i) const { return rows_[i]; }
  int64_t size() const { return size_; }
  int64_t numel() const { return numel_; }

 private:
  const Run* rows_;
  int64_t size_, numel_ = 0;
};

// -- the parameters' own memory --------------------------------------------------------------------------

// Pieces end to end, as long as the stretch; each run lies within one. Or none.
template <class T>
class Points {
 public:
  Points(const Flat& pieces, const Runs& runs) {
    int64_t stop = 0;
    const auto* piece_of = static_cast<const Flat*>(pieces.data);
    for (int64_t i = 0; i < pieces.size; ++i) {
      starts_.push_back(stop);
      memory_.push_back(static_cast<T*>(piece_of[i].data));
      stop += piece_of[i].size;
    }
    if (memory_.empty()) return;
    check(stop == runs.numel(), "points have ", stop, " elements; ", runs.numel(), " are needed");
    starts_.push_back(stop);
    size_t piece = 0;
    for (const Run& run : runs) {
      while (starts_[piece + 1] <= run.start) ++piece;
      check(run.stop() <= starts_[piece + 1], "points: the run from element ", run.start,
            " does not lie within one piece");
    }
  }
  bool none() const { return memory_.empty(); }
  // Where the element's point is, and those after it in its run; nullptr without points.
  T* at(int64_t element) const {
    if (none()) return nullptr;
    const size_t piece = std::upper_bound(starts_.begin(), starts_.end() - 1, element) - starts_.begin() - 1;
    return memory_[piece] + (element - starts_[piece]);
  }

 private:
  std::vector<int64_t> starts_;
  std::vector<T*> memory_;
};

// -- tasks: how the work is cut for threads, the same for any number of them ---------------------------

constexpr int64_t kPage = 65536;  // elements

// A page of a block larger than a page; or whole blocks, possibly of several runs.
struct Task {
  int64_t run, block;     // where it begins: the run, and the block within the run
  int64_t offset;         // elements into that block
  int64_t elements;       // how many
  bool whole;             // whole blocks, not a page of a larger one
};

// Pages of the larger blocks, one a task; smaller blocks together until there is a page of them.
inline void split(const Runs& runs, std::vector<Task>& tasks) {
  tasks.clear();
  bool open = false;  // the last task is of whole blocks and has room
  for (int64_t r = 0; r < runs.size(); ++r) {
    const Run& run = runs[r];
    if (run.size > kPage) {
      for (int64_t block = 0; block < run.count; ++block)
        for (int64_t offset = 0; offset < run.size; offset += kPage)
          tasks.push_back({r, block, offset, std::min(kPage, run.size - offset), false});
      open = false;
      continue;
    }
    for (int64_t block = 0; block < run.count;) {
      if (!open) tasks.push_back({r, block, 0, 0, true});
      Task& task = tasks.back();
      const int64_t room = std::max<int64_t>(1, (kPage - task.elements) / run.size);
      const int64_t blocks = std::min(room, run.count - block);
      task.elements += blocks * run.size;
      block += blocks;
      open = task.elements < kPage;
    }
  }
}

// Calls f(run's index, block within the run, offset within the block, elements) for a task's pieces:
// its blocks, or its one page.
template <class F>
inline void for_pieces(const Runs& runs, const Task& task, const F& f) {
  if (!task.whole) return f(task.run, task.block, task.offset, task.elements);
  int64_t block = task.block, left = task.elements;
  for (int64_t r = task.run; left > 0; ++r, block = 0)
    for (; block < runs[r].count && left > 0; ++block, left -= runs[r].size) f(r, block, int64_t{0}, runs[r].size);
}

// Calls f(task's index, task) for all tasks.
template <class F>
inline void for_tasks(int64_t threads, const std::vector<Task>& tasks, const F& f) {
  parallel(threads, static_cast<int64_t>(tasks.size()), 1, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; ++i) f(i, tasks[i]);
  });
}

// -- instruction sets ------------------------------------------------------------------------------------

enum class Set { baseline, avx2, avx512 };

Set instruction_set();  // the best this CPU has, unless a test chose another

}  // namespace hvd_saef
