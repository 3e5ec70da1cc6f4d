// qkernels._native: every op of cpu/ops.def as a Python function. Pointers arrive as integers (tensor.data_ptr()), None
// is not allowed, 0 is a null pointer. Nothing is checked here: qkernels/ops.py has done that. The GIL is released
// while an op runs.
#include <pybind11/pybind11.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/ops.h"
#include "cpu/program.h"

namespace py = pybind11;

namespace {

constexpr const char* tier_names[] = {"scalar", "avx2", "avx512vnni"};

template <class T>
struct Argument {
  using type = T;
  static T unwrap(T value) { return value; }
};
template <class T>
struct Argument<T*> {
  using type = std::uintptr_t;
  static T* unwrap(std::uintptr_t value) { return reinterpret_cast<T*>(value); }
};

template <class... Args>
auto bind(void (*scalar)(Args...), void (*avx2)(Args...), void (*avx512vnni)(Args...)) {
  return [=](typename Argument<Args>::type... args) {
    py::gil_scoped_release release;
    const int tier = qk_tier();
    (tier == 2 ? avx512vnni : tier == 1 ? avx2 : scalar)(Argument<Args>::unwrap(args)...);
  };
}

// The function of an op in a tier; other processors than x86 have one tier, which stands for all.
#if QK_X86
#define QK_IN(name, tier) qk_##name##_##tier
#else
#define QK_IN(name, tier) qk_##name##_scalar
#endif

// An op as a tape wants it: the text of its parameters, their kinds, and one call a tier.
struct Recorded {
  const char* parameters;
  const char* kinds;
  program::Call calls[3];
};

#define QK_OP(name, ...)                                                                     \
  {#name,                                                                                    \
   {#__VA_ARGS__,                                                                            \
    program::Caller<&QK_IN(name, scalar)>::kinds,                                            \
    {program::Caller<&QK_IN(name, scalar)>::call, program::Caller<&QK_IN(name, avx2)>::call, \
     program::Caller<&QK_IN(name, avx512vnni)>::call}}},
const std::map<std::string, Recorded> recorded = {
#include "cpu/ops.def"
};
#undef QK_OP

std::size_t append(program::Tape& tape, const std::string& name, const py::sequence& arguments) {
  const Recorded& op = recorded.at(name);
  if (py::len(arguments) != std::strlen(op.kinds)) throw std::invalid_argument("wrong number of arguments of " + name);
  std::vector<program::Word> words;
  for (std::size_t i = 0; op.kinds[i] != '\0'; ++i) {
    const py::object value = arguments[i];
    words.push_back(op.kinds[i] == 'f'   ? program::pack(value.cast<float>())
                    : op.kinds[i] == 'i' ? static_cast<program::Word>(value.cast<std::int64_t>())
                                         : value.cast<program::Word>());
  }
  return tape.append(op.calls[qk_tier()], words);
}

int tier_index(const std::string& name) {
  for (int i = 0; i < 3; ++i)
    if (name == tier_names[i]) return i;
  throw std::invalid_argument("unknown CPU tier '" + name + "'; known: scalar, avx2, avx512vnni");
}

}  // namespace

PYBIND11_MODULE(_native, module) {
#define QK_OP(name, ...) module.def(#name, bind(QK_IN(name, scalar), QK_IN(name, avx2), QK_IN(name, avx512vnni)));
#include "cpu/ops.def"
#undef QK_OP

  py::class_<program::Tape>(module, "Tape")
      .def(py::init<>())
      .def("append", &append)
      .def("set", &program::Tape::set)
      .def("run", &program::Tape::run, py::call_guard<py::gil_scoped_release>())
      .def("__len__", &program::Tape::size);
  py::list ops;
  for (const auto& entry : recorded) ops.append(entry.first);
  module.attr("ops") = py::frozenset(ops);
  module.def("parameters", [](const std::string& name) {
    return py::make_tuple(recorded.at(name).parameters, recorded.at(name).kinds);
  });

  module.def("tier", [] { return tier_names[qk_tier()]; });
  module.def("set_tier", [](const std::string& name) {
    if (!qk_set_tier(tier_index(name)))
      throw std::invalid_argument("this processor cannot run CPU tier '" + name + "'; the highest that it can is '" +
                                  tier_names[qk_best_tier()] + "'");
  });
  module.def("has_bf16", [] { return qk_tier() == 2 && qk_has_bf16(); });
  module.def("tiers", [] {
    py::list names;
    for (int i = 0; i <= qk_best_tier(); ++i) names.append(tier_names[i]);
    return names;
  });
}
