#pragma once

#include "common.h"

namespace hvd_saef {

// Whether no element of the call's points is larger than `limit`, below minus it, or NaN.
bool at_most(const Call& call, double limit);

}  // namespace hvd_saef
