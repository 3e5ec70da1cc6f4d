// qkernels._native: every op of cpu/ops.def as a Python function. Pointers arrive as integers (tensor.data_ptr()), None
// is not allowed, 0 is a null pointer. Nothing is checked here: qkernels/ops.py has done that. The GIL is released
// while an op runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/ops.h"

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

int tier_index(const std::string& name) {
  for (int i = 0; i < 3; ++i)
    if (name == tier_names[i]) return i;
  throw std::invalid_argument("unknown CPU tier '" + name + "'; known: scalar, avx2, avx512vnni");
}

}  // namespace

PYBIND11_MODULE(_native, module) {
#if QK_X86
#define QK_OP(name, ...) module.def(#name, bind(qk_##name##_scalar, qk_##name##_avx2, qk_##name##_avx512vnni));
#else
#define QK_OP(name, ...) module.def(#name, bind(qk_##name##_scalar, qk_##name##_scalar, qk_##name##_scalar));
#endif
#include "cpu/ops.def"
#undef QK_OP

  module.def("tier", [] { return tier_names[qk_tier()]; });
  module.def("set_tier", [](const std::string& name) {
    if (!qk_set_tier(tier_index(name)))
      throw std::invalid_argument("this processor cannot run CPU tier '" + name + "'; the highest that it can is '" +
                                  tier_names[qk_best_tier()] + "'");
  });
  module.def("tiers", [] {
    py::list names;
    for (int i = 0; i <= qk_best_tier(); ++i) names.append(tier_names[i]);
    return names;
  });
}
