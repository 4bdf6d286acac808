#pragma once

#include "rows.h"

namespace hvd_saef {

// What each writes and reads: _native.pyi.
void topk_encode(const Tensor& delta, const Tensor& runs, const Tensor& payload, at::ScalarType value_dtype,
                 const MaybeTensor& x, const MaybeTensor& s, double alpha, double beta,
                 const std::vector<Tensor>& points, const std::vector<Tensor>& payloads, double weight);
void topk_decode(const Tensor& out, const Tensor& runs, const std::vector<Tensor>& payloads,
                 at::ScalarType value_dtype, double weight, const MaybeTensor& e, const MaybeTensor& s, double alpha,
                 double beta, const std::vector<Tensor>& points);

}  // namespace hvd_saef
