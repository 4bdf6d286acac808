#pragma once

#include "rows.h"

namespace hvd_saef {

// What each writes and reads: compiled.py.
void sign_encode(const Call& call);
void sign_decode(const Call& call);
void sign_settle(const Call& call);

}  // namespace hvd_saef
