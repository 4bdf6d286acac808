// hvd_saef.kernels._native: what Python sees. Types and docstrings: _native.pyi.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>

#include "common.h"
#include "magnitudes.h"
#include "sign.h"
#include "topk.h"

namespace py = pybind11;

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

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Set set : available_sets()) names.emplace_back(name_of(set));
  return names;
}

std::string set_instruction_set(const std::string& name) {
  for (const Set set : available_sets())
    if (name == name_of(set)) return name_of(chosen.exchange(set));
  refuse("no instruction set ", name, " on this CPU");
}

}  // namespace

Set instruction_set() { return chosen.load(std::memory_order_relaxed); }

}  // namespace hvd_saef

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace hvd_saef;
  const std::vector<at::Tensor> no_tensors;
  const auto released = py::call_guard<py::gil_scoped_release>();
  m.def("instruction_sets", &instruction_sets);
  m.def("set_instruction_set", &set_instruction_set, py::arg("name"));
  m.def("at_most", &at_most, py::arg("tensors"), py::arg("limit"), released);
  m.def("topk_encode", &topk_encode, py::arg("delta"), py::arg("runs"), py::arg("payload"), py::arg("value_dtype"),
        py::arg("x") = py::none(), py::arg("s") = py::none(), py::arg("alpha") = 0., py::arg("beta") = 0.,
        py::arg("points") = no_tensors, py::arg("payloads") = no_tensors, py::arg("weight") = 0., released);
  m.def("topk_decode", &topk_decode, py::arg("out"), py::arg("runs"), py::arg("payloads"), py::arg("value_dtype"),
        py::arg("weight"), py::arg("e") = py::none(), py::arg("s") = py::none(), py::arg("alpha") = 0.,
        py::arg("beta") = 0., py::arg("points") = no_tensors, released);
  m.def("sign_encode", &sign_encode, py::arg("delta"), py::arg("runs"), py::arg("payload"), py::arg("x") = py::none(),
        py::arg("s") = py::none(), py::arg("alpha") = 0., py::arg("beta") = 0., py::arg("points") = no_tensors,
        py::arg("payloads") = no_tensors, py::arg("weight") = 0., released);
  m.def("sign_decode", &sign_decode, py::arg("out"), py::arg("runs"), py::arg("payloads"), py::arg("weight"),
        py::arg("e") = py::none(), py::arg("sent") = py::none(), py::arg("s") = py::none(), py::arg("alpha") = 0.,
        py::arg("beta") = 0., py::arg("points") = no_tensors, released);
  m.def("sign_settle", &sign_settle, py::arg("memory"), py::arg("runs"), py::arg("payload"), released);
}
