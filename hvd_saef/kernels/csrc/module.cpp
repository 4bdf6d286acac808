// The library's functions, as compiled.py calls them: it says what each does.
#include <atomic>
#include <new>
#include <string>

#include "common.h"
#include "magnitudes.h"
#include "sign.h"
#include "topk.h"

#define EXPORTED __attribute__((visibility("default")))

namespace hvd_saef {
namespace {

std::vector<Set> available_sets() {
  std::vector<Set> sets{Set::baseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) sets.push_back(Set::avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    sets.push_back(Set::avx512);
#endif
  return sets;
}

std::atomic<Set> chosen{available_sets().back()};

const char* name_of(Set set) { return set == Set::avx512 ? "avx512" : set == Set::avx2 ? "avx2" : "baseline"; }

thread_local std::string message;  // of this thread's last call that failed

enum Status { kFine, kRefused, kNoMemory, kOther };

// What is wrong, as compiled.py's _check reads it: no exception leaves the library.
template <class F>
int guarded(const F& f) {
  try {
    f();
    return kFine;
  } catch (const std::invalid_argument& error) {
    message = error.what();
    return kRefused;
  } catch (const std::bad_alloc&) {
    message = "no memory left";
    return kNoMemory;
  } catch (const std::exception& error) {
    message = error.what();
    return kOther;
  }
}

}  // namespace

Set instruction_set() { return chosen.load(std::memory_order_relaxed); }

}  // namespace hvd_saef

extern "C" {

EXPORTED const char* hvd_saef_sources() { return HVD_SAEF_SOURCES; }

EXPORTED const char* hvd_saef_message() { return hvd_saef::message.c_str(); }

EXPORTED const char* hvd_saef_instruction_sets() {
  static const std::string names = [] {
    std::string all;
    for (const auto set : hvd_saef::available_sets()) all += std::string(all.empty() ? "" : " ") + hvd_saef::name_of(set);
    return all;
  }();
  return names.c_str();
}

// The one used so far; nullptr if this CPU has none of that name.
EXPORTED const char* hvd_saef_set_instruction_set(const char* name) {
  for (const auto set : hvd_saef::available_sets())
    if (std::strcmp(name, hvd_saef::name_of(set)) == 0) return hvd_saef::name_of(hvd_saef::chosen.exchange(set));
  return nullptr;
}

EXPORTED int hvd_saef_at_most(const Call* call, double limit, int* fits) {
  return hvd_saef::guarded([&] { *fits = hvd_saef::at_most(*call, limit); });
}

EXPORTED int hvd_saef_topk_encode(const Call* call) {
  return hvd_saef::guarded([&] { hvd_saef::topk_encode(*call); });
}

EXPORTED int hvd_saef_topk_decode(const Call* call) {
  return hvd_saef::guarded([&] { hvd_saef::topk_decode(*call); });
}

EXPORTED int hvd_saef_sign_encode(const Call* call) {
  return hvd_saef::guarded([&] { hvd_saef::sign_encode(*call); });
}

EXPORTED int hvd_saef_sign_decode(const Call* call) {
  return hvd_saef::guarded([&] { hvd_saef::sign_decode(*call); });
}

EXPORTED int hvd_saef_sign_settle(const Call* call) {
  return hvd_saef::guarded([&] { hvd_saef::sign_settle(*call); });
}

}  // extern "C"
