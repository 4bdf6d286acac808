// Numbers that are too large, or none at all: one pass that only reads.
#include "magnitudes.h"

#include <atomic>

namespace hvd_saef {

#define HVD_SAEF_LOOPS "magnitudes_loops.h"
#include "each_set.h"

namespace {

template <class T>
bool page_at_most(const uint8_t* memory, int64_t size, T limit) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return HVD_SAEF_DISPATCH(largest<Bits>, memory, size) <= load<Bits>(reinterpret_cast<const uint8_t*>(&limit));
}

struct Page {
  const uint8_t* memory;
  int64_t elements;
};

}  // namespace

bool at_most(const Call& call, double limit) {
  bool fits = true;
  with_number(call.number, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Page> pages;
    const auto* piece_of = static_cast<const Flat*>(call.points.data);
    for (int64_t i = 0; i < call.points.size; ++i) {
      const auto* memory = static_cast<const uint8_t*>(piece_of[i].data);
      for (int64_t offset = 0; offset < piece_of[i].size; offset += kPage)
        pages.push_back({memory + offset * sizeof(T), std::min(kPage, piece_of[i].size - offset)});
    }
    std::atomic<bool> all{true};
    parallel(call.threads, static_cast<int64_t>(pages.size()), 1, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t i = first; i < last && all.load(std::memory_order_relaxed); ++i)
        if (!page_at_most<T>(pages[i].memory, pages[i].elements, static_cast<T>(limit))) all = false;
    });
    fits = all;
  });
  return fits;
}

}  // namespace hvd_saef
