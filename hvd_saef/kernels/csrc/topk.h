#pragma once

#include "rows.h"

namespace hvd_saef {

// What each writes and reads: compiled.py.
void topk_encode(const Call& call);
void topk_decode(const Call& call);

}  // namespace hvd_saef
