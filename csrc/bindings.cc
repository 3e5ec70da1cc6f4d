// qkernels._native: every op of cpu/ops.def as a Python function. Pointers arrive as integers (tensor.data_ptr()), None
// is not allowed, 0 is a null pointer. Nothing is checked here: qkernels/ops.py has done that. The GIL is released
// while an op runs.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/ops.h"
#include "cpu/program.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace {

#define QK_TIER_NAME(tier, ...) #tier,
constexpr const char* tier_names[] = {QK_TIERS(QK_TIER_NAME, )};

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

// The Python function of an op, given its functions in all tiers.
template <class... Args>
auto bind(void (*const (&tiers)[QK_TIER_COUNT])(Args...)) {
  std::array<void (*)(Args...), QK_TIER_COUNT> functions;
  std::copy(std::begin(tiers), std::end(tiers), functions.begin());
  return [functions](typename Argument<Args>::type... args) {
    py::gil_scoped_release release;
    functions[static_cast<std::size_t>(qk_tier())](Argument<Args>::unwrap(args)...);
  };
}

// An op as a tape wants it: the text of its parameters, their kinds, and one call per tier.
struct Recorded {
  const char* parameters;
  const char* kinds;
  program::Call calls[QK_TIER_COUNT];
};

#define QK_CALL(tier, name) program::Caller<qk_##name##_##tier>::call,
#define QK_OP(name, ...) {#name, {#__VA_ARGS__, program::Caller<qk_##name##_scalar>::kinds, {QK_TIERS(QK_CALL, name)}}},
#define QK_PRODUCT QK_OP
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

// `changes`: (step, argument, kind, stride).
std::size_t segment(program::Tape& tape, std::size_t begin, std::size_t end, std::int64_t rows,
                    const py::sequence& bounds, const py::sequence& changes) {
  std::vector<std::int64_t> cuts;
  for (const py::handle cut : bounds) cuts.push_back(cut.cast<std::int64_t>());
  std::vector<program::Change> all;
  for (const py::handle entry : changes) {
    const auto change = entry.cast<py::tuple>();
    all.push_back({change[0].cast<std::size_t>(), change[1].cast<std::size_t>(), change[2].cast<int>(),
                   change[3].cast<std::int64_t>()});
  }
  return tape.add_segment(begin, end, rows, std::move(cuts), std::move(all));
}

// Ask the kernel to hold memory that is read over and over in huge pages, where it can (Linux 6.1 on): far weights are
// otherwise read at the pace of page walks, the more so in a virtual machine. `ranges`: (address, bytes). Only frames
// that these fill to half at least, so that little is taken beside them. What the kernel refuses stays as it is.
std::size_t use_huge_pages(const py::sequence& ranges) {
  std::size_t moved = 0;
#if defined(__linux__)
  constexpr std::uintptr_t frame = std::uintptr_t{2} << 20;
  constexpr int collapse = 25;  // MADV_COLLAPSE, which older headers lack
  std::map<std::uintptr_t, std::uintptr_t> filled;
  for (const py::handle entry : ranges) {
    const auto range = entry.cast<py::tuple>();
    const auto begin = range[0].cast<std::uintptr_t>(), end = begin + range[1].cast<std::uintptr_t>();
    for (std::uintptr_t at = begin / frame * frame; at < end; at += frame)
      filled[at] += std::min(end, at + frame) - std::max(begin, at);
  }
  const py::gil_scoped_release release;
  for (const auto& entry : filled)
    if (entry.second >= frame / 2 && madvise(reinterpret_cast<void*>(entry.first), frame, collapse) == 0) ++moved;
#endif
  return moved;
}

int tier_index(const std::string& name) {
  std::string known;
  for (int i = 0; i < QK_TIER_COUNT; ++i) {
    if (name == tier_names[i]) return i;
    known += (i ? ", " : "") + std::string(tier_names[i]);
  }
  throw std::invalid_argument("unknown CPU tier '" + name + "'; known: " + known);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
#define QK_FUNCTION(tier, name) qk_##name##_##tier,
#define QK_OP(name, ...) module.def(#name, bind({QK_TIERS(QK_FUNCTION, name)}));
#include "cpu/ops.def"
#undef QK_OP

  py::class_<program::Tape>(module, "Tape")
      .def(py::init<>())
      .def("append", &append)
      .def("set", &program::Tape::set)
      .def("run", &program::Tape::run, py::call_guard<py::gil_scoped_release>())
      .def("segment", &segment)
      .def("play", &program::Tape::play, py::call_guard<py::gil_scoped_release>())
      .def("__len__", &program::Tape::size);
  py::list ops;
  for (const auto& entry : recorded) ops.append(entry.first);
  module.attr("ops") = py::frozenset(ops);
  module.def("parameters", [](const std::string& name) {
    return py::make_tuple(recorded.at(name).parameters, recorded.at(name).kinds);
  });

  module.def("use_huge_pages", &use_huge_pages);
  module.def("tier", [] { return tier_names[qk_tier()]; });
  module.def("set_tier", [](const std::string& name) {
    if (!qk_set_tier(tier_index(name)))
      throw std::invalid_argument("this processor cannot run CPU tier '" + name + "'; the highest that it can is '" +
                                  tier_names[qk_best_tier()] + "'");
  });
  module.def("pair_sums", &qk_pair_sums);
  module.def("has_bf16", [] { return std::string("avx512vnni") == tier_names[qk_tier()] && qk_has_bf16(); });
  module.def("tiers", [] {
    py::list names;
    for (int i = 0; i < QK_TIER_COUNT; ++i)
      if (qk_can_run(i)) names.append(tier_names[i]);
    return names;
  });
}
