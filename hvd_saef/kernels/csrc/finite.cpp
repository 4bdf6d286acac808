// Are all elements finite? One pass, which ends early.
#include "finite.h"

#include <atomic>

namespace hvd_saef {

#define HVD_SAEF_LOOPS "finite_loops.h"
#include "each_set.h"

namespace {

constexpr int64_t kChunk = 16384;  // elements between two looks at what other chunks found

template <class Word>
bool finite(const Tensor& given, Word exponent) {
  const Tensor tensor = given.is_non_overlapping_and_dense() ? given : given.contiguous();
  const auto* words = static_cast<const Word*>(tensor.const_data_ptr());
  const int64_t size = tensor.numel();
  std::atomic<bool> all{true};
  at::parallel_for(0, (size + kChunk - 1) / kChunk, 4, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last && all.load(std::memory_order_relaxed); ++chunk) {
      const int64_t start = chunk * kChunk;
      if (!HVD_SAEF_DISPATCH(finite_words, words + start, std::min(kChunk, size - start), exponent))
        all.store(false, std::memory_order_relaxed);
    }
  });
  return all.load();
}

}  // namespace

bool all_finite(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    check(tensor.device().is_cpu(), "tensors: CPU tensors are needed");
    switch (tensor.scalar_type()) {
      case at::kFloat:
      case at::kDouble:
      case at::kHalf:
      case at::kBFloat16:
        break;
      default:
        refuse("tensors: float16, bfloat16, float32 or float64 is needed, not ", tensor.scalar_type());
    }
  }
  for (const Tensor& tensor : tensors) {
    const bool right = tensor.scalar_type() == at::kFloat    ? finite<uint32_t>(tensor, 0x7f800000u)
                       : tensor.scalar_type() == at::kDouble ? finite<uint64_t>(tensor, 0x7ff0000000000000u)
                       : tensor.scalar_type() == at::kHalf   ? finite<uint16_t>(tensor, uint16_t{0x7c00})
                                                             : finite<uint16_t>(tensor, uint16_t{0x7f80});
    if (!right) return false;
  }
  return true;
}

}  // namespace hvd_saef
