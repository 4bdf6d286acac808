#pragma once

#include "rows.h"

namespace hvd_saef {

// What each writes and reads: _native.pyi.
void sign_encode(const Tensor& delta, const Tensor& runs, const Tensor& payload, const MaybeTensor& x,
                 const MaybeTensor& s, double alpha, double beta, const std::vector<Tensor>& points,
                 const std::vector<Tensor>& payloads, double weight);
void sign_decode(const Tensor& out, const Tensor& runs, const std::vector<Tensor>& payloads, double weight,
                 const MaybeTensor& e, const MaybeTensor& sent, const MaybeTensor& s, double alpha, double beta,
                 const std::vector<Tensor>& points);
void sign_settle(const Tensor& memory, const Tensor& runs, const Tensor& payload);

}  // namespace hvd_saef
