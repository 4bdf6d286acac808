// Top-K, encoding. Blocks of up to a page: one task does all. Larger blocks: a sample of the block gives a
// guess of the k-th magnitude; one pass over memory makes Δ and collects what reaches the guess; among
// those the k-th is found; and each page writes what it keeps. A page that has not enough room, or a block
// whose guess was too high, is read from memory again: slower, with the same result.
#include <mutex>

#include "topk.h"
#include "topk_payload.h"
#include "topk_select.h"

namespace hvd_saef {

#define HVD_SAEF_LOOPS "topk_loops.h"
#include "each_set.h"

namespace {

constexpr int64_t kSlack = 64;                 // elements that vector stores may write too much
constexpr int64_t kStored = int64_t{1} << 21;  // keys that all threads collect at most: no memory grows with models

// Keys with their offsets. One for a page at most; and one a thread for what it collects of larger blocks.
template <class T>
struct Found {
  std::vector<Key<T>> keys;
  std::vector<uint16_t> offsets;
  int64_t size = 0;

  void make_room(int64_t more) {
    const size_t needed = static_cast<size_t>(size + more + kSlack);
    if (keys.size() >= needed) return;
    keys.resize(std::max(needed, 2 * keys.size()));
    offsets.resize(keys.size());
  }
};

// A page of a larger block, on its way through the passes.
template <class T>
struct Page {
  const Found<T>* store = nullptr;  // where what it collected lies; none: to be read from memory
  int64_t begin = 0, size = 0;
  int64_t ties = 0;   // of those equal to the threshold, how many are kept
  int64_t first = 0;  // where its kept elements begin among its block's
  int64_t kept = 0;
};

// What belongs to one thread.
template <class T>
struct Scratch {
  Found<T> page;
  std::vector<Key<T>> keys;
  static Scratch& mine() {
    thread_local Scratch scratch;
    return scratch;
  }
};

template <class T, class V>
class Encoder {
 public:
  Encoder(T* delta, const Runs& runs, const TopKFormat<V>& format, uint8_t* payload, const Rows<T>& rows,
          int64_t threads)
      : delta_(delta), runs_(runs), format_(format), payload_(payload), rows_(rows), threads_(threads) {
    split(runs, tasks_);
    pages_.resize(tasks_.size());
  }

  void encode(Incoming<T, V>* incoming) {
    if (incoming != nullptr) {
      for_tasks(threads_, tasks_, [&](int64_t, const Task& task) {
        update_task(task);
        incoming->add_to(delta_, task);
      });
      incoming->check_offsets();
      rows_.x = nullptr;  // done
    }
    find_blocks();
    guess_blocks();
    collect_all();
    for_blocks([&](Block& block, bool alone) { settle_block(block, alone); });
    for_tasks(threads_, tasks_, [&](int64_t index, const Task& task) {
      if (!task.whole && !runs_[task.run].dense()) write_page(index);
    });
  }

 private:
  // A block of several pages that is not dense: its tasks, and what is known of its k-th magnitude.
  struct Block {
    int64_t task, pages;
    Key<T> least;
    Threshold<T> threshold;
  };

  int64_t start_of(const Task& task) const {
    return runs_[task.run].start + task.block * runs_[task.run].size + task.offset;
  }

  void find_blocks() {
    for (size_t i = 0; i < tasks_.size();) {
      const Run& run = runs_[tasks_[i].run];
      const int64_t pages = tasks_[i].whole ? 1 : TopKFormat<V>::pages(run);
      if (!tasks_[i].whole && !run.dense()) {
        block_of_.resize(i, -1);
        block_of_.resize(i + pages, static_cast<int64_t>(blocks_.size()));
        blocks_.push_back({static_cast<int64_t>(i), pages, 0, {}});
      }
      i += pages;
    }
    block_of_.resize(tasks_.size(), -1);
  }

  // Calls f(block, alone) for all blocks: side by side if there are enough, else one after the other,
  // each with all threads.
  template <class F>
  void for_blocks(const F& f) {
    const bool many = static_cast<int64_t>(blocks_.size()) >= 2 * threads_;
    if (!many)
      for (Block& block : blocks_) f(block, true);
    else
      parallel(threads_, static_cast<int64_t>(blocks_.size()), 1, [&](int64_t first, int64_t last, int64_t) {
        for (int64_t i = first; i < last; ++i) f(blocks_[i], false);
      });
  }

  void guess_blocks() {
    for_blocks([&](Block& block, bool) {
      const Task& task = tasks_[block.task];
      const Run& run = runs_[task.run];
      const int64_t start = start_of(task);
      const T* point = rows_.points->at(start);
      block.least = guess<T>(run.size, run.kept, Scratch<T>::mine().keys, [&](int64_t i) {
        const int64_t at = start + i;
        T delta = delta_[at];
        if (rows_.x != nullptr) {
          const T ahead = delta * rows_.ahead.alpha + (rows_.s ? rows_.s[at] * rows_.ahead.beta : T{0});
          delta += rows_.x[at] - ahead - point[i];
        }
        return std::min(key_of(delta), kInfinity<T>);
      });
    });
  }

  void update_task(const Task& task) {
    if (rows_.x == nullptr) return;
    for_pieces(runs_, task, [&](int64_t r, int64_t block, int64_t offset, int64_t elements) {
      update_piece(runs_[r].start + block * runs_[r].size + offset, elements);
    });
  }

  void update_piece(int64_t start, int64_t elements) {
    if (rows_.x == nullptr) return;
    HVD_SAEF_DISPATCH(update, delta_ + start, rows_.x + start, rows_.s ? rows_.s + start : nullptr, rows_.ahead,
                      rows_.points->at(start), elements);
  }

  // Makes Δ, if it is not there yet, and adds to `found` what reaches `least`.
  int64_t collect_piece(int64_t start, int64_t elements, Key<T> least, Found<T>& found, bool made) {
    found.make_room(elements);
    Key<T>* keys = found.keys.data() + found.size;
    uint16_t* offsets = found.offsets.data() + found.size;
    if (made || rows_.x == nullptr) return HVD_SAEF_DISPATCH(collect, delta_ + start, elements, least, keys, offsets);
    return HVD_SAEF_DISPATCH(update_and_collect, delta_ + start, rows_.x + start, rows_.s ? rows_.s + start : nullptr,
                             rows_.ahead, rows_.points->at(start), elements, least, keys, offsets);
  }

  // The pass over memory. What fits into one task is finished here.
  void collect_all() {
    thread_local std::vector<Found<T>> stores;
    stores.resize(std::max<size_t>(stores.size(), threads_));
    Found<T>* all = stores.data();
    const int64_t room = kStored / threads_;
    parallel(threads_, static_cast<int64_t>(tasks_.size()), 1, [&](int64_t first, int64_t last, int64_t thread) {
      Found<T>& store = all[thread];
      store.size = 0;
      for (int64_t i = first; i < last; ++i) {
        const Task& task = tasks_[i];
        if (block_of_[i] >= 0) {
          const int64_t start = start_of(task);
          Page<T>& page = pages_[i];
          page.begin = store.size;
          page.size = collect_piece(start, task.elements, blocks_[block_of_[i]].least, store, false);
          if (store.size + page.size <= room) {
            page.store = &store;
            store.size += page.size;
          }
        } else {
          for_pieces(runs_, task, [&](int64_t r, int64_t block, int64_t offset, int64_t elements) {
            if (runs_[r].dense()) write_dense(r, block, offset, elements);
            else write_small(r, block);
          });
        }
      }
    });
  }

  void write_dense(int64_t r, int64_t block, int64_t offset, int64_t elements) {
    const int64_t start = runs_[r].start + block * runs_[r].size + offset;
    update_piece(start, elements);
    uint8_t* values = payload_ + format_.value_at(runs_[r], r, block, offset);
    for (int64_t i = 0; i < elements; ++i) send(delta_[start + i], values + i * sizeof(V));
  }

  void write_small(int64_t r, int64_t block) {
    const Run& run = runs_[r];
    const int64_t start = run.start + block * run.size;
    Scratch<T>& scratch = Scratch<T>::mine();
    Found<T>& page = scratch.page;
    update_piece(start, run.size);
    const Key<T> least = least_of_small(start, run, scratch.keys);
    int64_t size = collect_piece(start, run.size, least, page, true);
    if (size < run.kept) size = collect_piece(start, run.size, 0, page, true);
    const auto threshold = select<T>(page.keys.data(), size, run.kept, scratch.keys);
    write(page.keys.data(), page.offsets.data(), size, threshold, delta_ + start,
          payload_ + format_.value_at(run, r, block, 0), payload_ + format_.offset_at(run, r, block, 0));
  }

  // A key that at least, or probably, the kept elements of a block of a page reach, and not many more.
  Key<T> least_of_small(int64_t start, const Run& run, std::vector<Key<T>>& scratch) const {
    if (run.size <= kGroups) return 0;
    if (run.kept > kGroups / 4)
      return guess<T>(run.size, run.kept, scratch,
                      [&](int64_t i) { return std::min(key_of(delta_[start + i]), kInfinity<T>); });
    Key<T> largest[kGroups];
    HVD_SAEF_DISPATCH(largest_of_groups, delta_ + start, run.size, largest);
    std::nth_element(largest, largest + run.kept - 1, largest + kGroups, std::greater<>());
    return largest[run.kept - 1];
  }

  // Sends what the threshold keeps.
  void write(const Key<T>* keys, const uint16_t* offsets, int64_t size, Threshold<T> threshold, T* delta,
             uint8_t* values, uint8_t* places) const {
    constexpr int64_t kAhead = 16;  // the memory is not in the cache any more, if the block is large
    for (int64_t i = 0; i < size; ++i) {
      if (i + kAhead < size) __builtin_prefetch(delta + offsets[i + kAhead], 1);
      if (keys[i] <= threshold.key && (keys[i] < threshold.key || threshold.ties-- <= 0)) continue;
      send(delta[offsets[i]], values);
      store(places, offsets[i]);
      values += sizeof(V);
      places += sizeof(uint16_t);
    }
  }

  static void send(T& delta, uint8_t* value) {
    const V sent = rounded<V>(delta);
    store(value, sent);
    if constexpr (std::is_same_v<T, V>) delta = 0;
    else delta -= widened<T>(sent);
  }

  // Calls f(keys, how many) for what a page collected, or for all its keys.
  template <class F>
  void for_keys(int64_t index, const F& f) const {
    const Page<T>& page = pages_[index];
    if (page.store != nullptr) return f(page.store->keys.data() + page.begin, page.size);
    Key<T> keys[kTile];
    const T* delta = delta_ + start_of(tasks_[index]);
    for (int64_t at = 0; at < tasks_[index].elements; at += kTile) {
      const int64_t size = std::min(kTile, tasks_[index].elements - at);
      HVD_SAEF_DISPATCH(keys_of, delta + at, size, keys);
      f(keys, size);
    }
  }

  // Calls f(first page, last page) for a block's pages, on all threads if they have nothing else to do.
  template <class F>
  void for_pages(const Block& block, bool alone, const F& f) const {
    parallel(alone ? threads_ : 1, block.pages, 4,
             [&](int64_t first, int64_t last, int64_t) { f(block.task + first, block.task + last); });
  }

  // Finds the threshold, and what each page keeps.
  void settle_block(Block& block, bool alone) {
    const int64_t kept = runs_[tasks_[block.task].run].kept;
    int64_t collected = 0;
    bool complete = true;
    for (int64_t i = block.task; i < block.task + block.pages; ++i) {
      collected += pages_[i].size;
      complete = complete && pages_[i].store != nullptr;
    }
    if (collected < kept)  // the guess was too high
      for (int64_t i = block.task; i < block.task + block.pages; ++i) pages_[i].store = nullptr;
    std::mutex adding;
    block.threshold = radix_select<T>(kept, [&](Key<T> prefix, int top, int low, int64_t* sums) {
      for_pages(block, alone, [&](int64_t first, int64_t last) {
        thread_local Histogram histogram;
        histogram.clear();
        for (int64_t i = first; i < last; ++i)
          for_keys(i, [&](const Key<T>* keys, int64_t size) { histogram.add(keys, size, prefix, top, low); });
        const std::lock_guard<std::mutex> lock(adding);
        histogram.move_to(sums);
      });
    });
    const Key<T> key = block.threshold.key;
    for_pages(block, alone, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for_keys(i, [&](const Key<T>* keys, int64_t size) {
          HVD_SAEF_DISPATCH(count<T>, keys, size, key, pages_[i].kept, pages_[i].ties);
        });
    });
    int64_t ties = block.threshold.ties, written = 0;
    for (int64_t i = block.task; i < block.task + block.pages; ++i) {
      Page<T>& page = pages_[i];
      page.ties = std::min(page.ties, ties);
      ties -= page.ties;
      page.first = written;
      page.kept += page.ties;
      written += page.kept;
    }
  }

  void write_page(int64_t index) {
    const Task& task = tasks_[index];
    const Run& run = runs_[task.run];
    const Page<T>& page = pages_[index];
    const Threshold<T> threshold{blocks_[block_of_[index]].threshold.key, page.ties};
    const int64_t count = format_.count_index(run, task.run, task.block, task.offset);
    store(payload_ + count * sizeof(int32_t), static_cast<int32_t>(page.kept));
    const Found<T>* found = page.store;
    int64_t begin = page.begin, size = page.size;
    if (found == nullptr) {
      found = &Scratch<T>::mine().page;
      begin = 0;
      size = collect_piece(start_of(task), task.elements, std::max<Key<T>>(0, threshold.key),
                           Scratch<T>::mine().page, true);
    }
    write(found->keys.data() + begin, found->offsets.data() + begin, size, threshold, delta_ + start_of(task),
          payload_ + format_.value_at(run, task.run, task.block, page.first),
          payload_ + format_.offset_at(run, task.run, task.block, page.first));
  }

  T* delta_;
  const Runs& runs_;
  const TopKFormat<V>& format_;
  uint8_t* payload_;
  Rows<T> rows_;
  const int64_t threads_;
  std::vector<Task> tasks_;
  std::vector<Page<T>> pages_;     // by task
  std::vector<int64_t> block_of_;  // by task: which of blocks_, or -1
  std::vector<Block> blocks_;
};

}  // namespace

void topk_encode(const Call& call) {
  with_number(call.number, [&](auto zero) {
    using T = decltype(zero);
    const Runs runs(call.runs);
    const Points<T> points(call.points, runs);
    T* delta = memory_of<T>(call.memory, "delta", runs.numel());
    check((call.other.size >= 0) == !points.none() || runs.numel() == 0, "x and points: both are needed, or neither");
    const Rows<T> rows{memory_or_null<T>(call.other, "x", runs.numel()),
                       memory_or_null<T>(call.server, "s", runs.numel()),
                       {static_cast<T>(call.alpha), static_cast<T>(call.beta)},
                       &points};
    with_value<T>(call.value, [&](auto number) {
      using V = decltype(number);
      const TopKFormat<V> format(runs);
      uint8_t* payload = format.payload(call.payload, "payload");
      Incoming<T, V> incoming(runs, format, call.payloads, call.weight);
      Encoder<T, V> encoder(delta, runs, format, payload, rows, call.threads);
      encoder.encode(call.payloads.size == 0 ? nullptr : &incoming);
    });
  });
}

}  // namespace hvd_saef
