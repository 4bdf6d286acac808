// Top-K, decoding: each task adds its part of all payloads, and steps ahead while it is in the cache.
#include "topk.h"
#include "topk_payload.h"

namespace hvd_saef {

#define HVD_SAEF_LOOPS "topk_decode_loops.h"
#include "each_set.h"

void topk_decode(const Tensor& out, const Tensor& table, const std::vector<Tensor>& payloads,
                 at::ScalarType value_dtype, double weight, const MaybeTensor& e, const MaybeTensor& s, double alpha,
                 double beta, const std::vector<Tensor>& pieces) {
  with_dtype(out.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Runs runs(table);
    const Points<T> points(pieces, runs);
    check_flat(out, "out", c10::CppTypeToScalarType<T>::value, runs.numel());
    const T *error = memory_or_null<T>(e, "e", runs), *server = memory_or_null<T>(s, "s", runs);
    check(points.none() || alpha == 0 || error != nullptr, "alpha=", alpha, ": e is needed");
    const Ahead<T> ahead{static_cast<T>(alpha), static_cast<T>(beta)};
    T* memory = out.data_ptr<T>();
    with_value_dtype<T>(value_dtype, [&](auto number) {
      using V = decltype(number);
      const TopKFormat<V> format(runs);
      Incoming<T, V> incoming(runs, format, payloads, weight);
      std::vector<Task> tasks;
      split(runs, tasks);
      for_tasks(tasks, [&](int64_t, const Task& task) {
        incoming.add_to(memory, task);
        if (points.none()) return;
        for_pieces(runs, task, [&](int64_t r, int64_t block, int64_t offset, int64_t elements) {
          const int64_t start = runs[r].start + block * runs[r].size + offset;
          HVD_SAEF_DISPATCH(step_ahead, memory + start, error ? error + start : nullptr,
                            server ? server + start : nullptr, ahead, elements, points.at(start));
        });
      });
      incoming.check_offsets();
    });
  });
}

}  // namespace hvd_saef
