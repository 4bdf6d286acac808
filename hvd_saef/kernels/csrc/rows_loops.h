// Included by other loops. The rows of Algorithm 1 around C, for at most a tile.

// b = x - alpha e - beta s, each operation rounded apart.
template <class T>
INNER void start_point(const T* x, const T* e, const T* s, const Ahead<T>& ahead, int64_t size, T* b) {
  if (ahead.alpha == 0) std::copy_n(x, size, b);
  else if (ahead.alpha == 1)
    for (int64_t i = 0; i < size; ++i) b[i] = x[i] - e[i];
  else
    for (int64_t i = 0; i < size; ++i) b[i] = x[i] - e[i] * ahead.alpha;
  if (s == nullptr || ahead.beta == 0) return;
  if (ahead.beta == 1)
    for (int64_t i = 0; i < size; ++i) b[i] -= s[i];
  else
    for (int64_t i = 0; i < size; ++i) b[i] -= s[i] * ahead.beta;
}

// delta (e on entry) += b - point.
template <class T>
INNER void add_update(T* delta, const T* x, const T* s, const Ahead<T>& ahead, const T* point, int64_t size) {
  T b[kTile];
  start_point(x, delta, s, ahead, size, b);
  for (int64_t i = 0; i < size; ++i) delta[i] += b[i] - point[i];
}
