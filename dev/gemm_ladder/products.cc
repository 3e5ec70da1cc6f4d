// int8_linear of several versions of csrc/ against each other, in turns, by CPU time of one thread, as percent of a
// peak that is measured between. `run.sh` builds the versions as shared libraries and calls this:
//   products REPEATS MxNxK,MxNxK,... LIBRARY...
#include <dlfcn.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "peak.h"

namespace {

#if defined(__AVX512F__)
constexpr bool kTakesShifted = true;
#else
constexpr bool kTakesShifted = false;
#endif

using Linear = void (*)(const std::int8_t*, std::int64_t, std::int64_t, std::int64_t, int, const float*, int,
                        const std::uint8_t*, const float*, std::int64_t, const float*, int, const void*, int, void*,
                        int, const float*, int, const float*, int, float*, int);

struct Case {
  const char* name;
  int activation, out_type;
  bool shifted, residual;
};
const Case cases[] = {{"copied", 0, 0, false, false},   {"float32", 0, 0, true, false},
                      {"+ residual", 0, 0, true, true}, {"bf16", 0, 1, true, false},
                      {"int8", 0, 3, true, false},      {"gelu", 1, 0, true, false},
                      {"gelu bf16", 1, 1, true, false}, {"quick bf16", 2, 1, true, false}};

template <class T>
T* filled(std::int64_t count, int byte) {
  const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 4159) / 64 * 64;
  auto* data = static_cast<unsigned char*>(std::aligned_alloc(64, bytes));
  for (std::size_t i = 0; i < bytes; ++i) data[i] = static_cast<unsigned char>(byte < 0 ? std::rand() : byte);
  return reinterpret_cast<T*>(data);
}

}  // namespace

int main(int argc, char** argv) {
  const int repeats = std::atoi(argv[1]);
  std::vector<Linear> versions;
  for (int i = 3; i < argc; ++i) {
    void* library = dlopen(argv[i], RTLD_NOW | RTLD_LOCAL);
    if (!library) return std::puts(dlerror()), 1;
    versions.push_back(reinterpret_cast<Linear>(dlsym(library, "qk_int8_linear_" TIER)));
  }
  long m, n, k;
  int used;
  for (const char* at = argv[2]; std::sscanf(at, "%ldx%ldx%ld%n", &m, &n, &k, &used) == 3;
       at += used + (at[used] == ',')) {
    auto* x = filled<std::int8_t>(m * k, -1);
    auto* weight = filled<std::uint8_t>((n + 63) / 64 * 64 * ((k + 3) / 4 * 4 + 4), -1);
    auto *row_scale = filled<float>(m, 0x33), *scale = filled<float>(n, 0x33), *bias = filled<float>(n, 0x33);
    auto *out = filled<float>(m * n, 0), *residual = filled<float>(m * n, 0x33);
    const float out_scale = 0.1f;
    const int inner = std::max(1, static_cast<int>(1.5e9 / (2.0 * m * n * k)));
    std::printf("%ldx%ldx%ld\n", m, n, k);
    std::vector<std::vector<double>> shares(versions.size() * std::size(cases));
    for (int repeat = 0; repeat < repeats; ++repeat) {
      for (std::size_t c = 0; c < std::size(cases); ++c) {
        for (std::size_t v = 0; v < versions.size(); ++v) {
          const auto call = [&] {
            versions[v](x, m, k, k, kTakesShifted && cases[c].shifted, row_scale, 1, weight, scale, n, bias,
                        cases[c].activation, cases[c].residual ? residual : nullptr, 0, out, cases[c].out_type,
                        cases[c].out_type == 3 ? &out_scale : nullptr, 0, nullptr, 0, nullptr, 1);
          };
          call();
          const double begin = cpu_seconds();
          for (int i = 0; i < inner; ++i) call();
          const double middle = cpu_seconds();
          peak(200000);
          const double end = cpu_seconds(), ideal = static_cast<double>(inner) * m * n * k / kPeakProducts;
          shares[v * std::size(cases) + c].push_back(ideal / 200000 * (end - middle) / (middle - begin));
        }
      }
    }
    for (std::size_t v = 0; v < versions.size(); ++v) {
      std::printf("  %-24s", std::strrchr(argv[3 + v], '/') ? std::strrchr(argv[3 + v], '/') + 1 : argv[3 + v]);
      for (std::size_t c = 0; c < std::size(cases); ++c) {
        auto& values = shares[v * std::size(cases) + c];
        std::sort(values.begin(), values.end());
        std::printf("  %s %.1f", cases[c].name, 100 * values[values.size() / 2]);
      }
      std::printf("\n");
    }
    for (void* data :
         {static_cast<void*>(x), static_cast<void*>(weight), static_cast<void*>(row_scale), static_cast<void*>(scale),
          static_cast<void*>(bias), static_cast<void*>(out), static_cast<void*>(residual)})
      std::free(data);
  }
}
