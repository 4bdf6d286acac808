#pragma once

#include "common.h"

namespace hvd_saef {

// What it says: _native.pyi.
bool at_most(const std::vector<Tensor>& tensors, double limit);

}  // namespace hvd_saef
