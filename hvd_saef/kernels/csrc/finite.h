#pragma once

#include "common.h"

namespace hvd_saef {

// CPU tensors of any strides, of float16, bfloat16, float32 or float64.
bool all_finite(const std::vector<Tensor>& tensors);

}  // namespace hvd_saef
