// Top-K, decoding: each task adds its part of all payloads, and steps ahead while it is in the cache.
#include "topk.h"
#include "topk_payload.h"

namespace hvd_saef {

#define HVD_SAEF_LOOPS "topk_decode_loops.h"
#include "each_set.h"

void topk_decode(const Call& call) {
  with_number(call.number, [&](auto zero) {
    using T = decltype(zero);
    const Runs runs(call.runs);
    const Points<T> points(call.points, runs);
    T* memory = memory_of<T>(call.memory, "out", runs.numel());
    const T* error = memory_or_null<T>(call.other, "e", runs.numel());
    const T* server = memory_or_null<T>(call.server, "s", runs.numel());
    check(points.none() || call.alpha == 0 || error != nullptr, "alpha=", call.alpha, ": e is needed");
    const Ahead<T> ahead{static_cast<T>(call.alpha), static_cast<T>(call.beta)};
    with_value<T>(call.value, [&](auto number) {
      using V = decltype(number);
      const TopKFormat<V> format(runs);
      Incoming<T, V> incoming(runs, format, call.payloads, call.weight);
      std::vector<Task> tasks;
      split(runs, tasks);
      for_tasks(call.threads, tasks, [&](int64_t, const Task& task) {
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
