// Included by each_set.h: the loop over memory for Top-K, decoding.
#include "rows_loops.h"

template <class T>
LOOP static void step_ahead(const T* x, const T* e, const T* s, const Ahead<T>& ahead, int64_t size, T* point) {
  for (int64_t at = 0; at < size; at += kTile)
    start_point(x + at, e ? e + at : nullptr, s ? s + at : nullptr, ahead, std::min(kTile, size - at), point + at);
}
