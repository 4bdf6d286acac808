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

bool at_most(const std::vector<Tensor>& tensors, double limit) {
  if (tensors.empty()) return true;
  const at::ScalarType dtype = tensors.front().scalar_type();
  bool fits = true;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Tensor> copies;  // of those with gaps
    std::vector<Page> pages;
    for (const Tensor& tensor : tensors) {
      check(tensor.device().is_cpu() && tensor.scalar_type() == dtype,
            "tensors: on the CPU and of one dtype they have to be");
      const bool dense = tensor.is_non_overlapping_and_dense();
      if (!dense) copies.push_back(tensor.contiguous());
      const auto* memory = static_cast<const uint8_t*>((dense ? tensor : copies.back()).const_data_ptr());
      for (int64_t offset = 0; offset < tensor.numel(); offset += kPage)
        pages.push_back({memory + offset * sizeof(T), std::min(kPage, tensor.numel() - offset)});
    }
    std::atomic<bool> all{true};
    at::parallel_for(0, static_cast<int64_t>(pages.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last && all.load(std::memory_order_relaxed); ++i)
        if (!page_at_most<T>(pages[i].memory, pages[i].elements, static_cast<T>(limit))) all = false;
    });
    fits = all;
  });
  return fits;
}

}  // namespace hvd_saef
