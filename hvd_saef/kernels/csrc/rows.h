// The rows of Algorithm 1 around C, which kernels compute in the same pass over memory.
#pragma once

#include "common.h"

namespace hvd_saef {

constexpr int64_t kTile = 1024;  // elements: several loops over a tile stay within the first-level cache

// Coefficients of b = x - alpha e - beta s.
template <class T>
struct Ahead {
  T alpha, beta;
};

// What Δ = e + (x - alpha e - beta s) - point is made of; without x there is nothing to add.
template <class T>
struct Rows {
  const T *x = nullptr, *s = nullptr;
  Ahead<T> ahead{};
  const Points<T>* points = nullptr;
};

}  // namespace hvd_saef
