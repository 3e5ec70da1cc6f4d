// Register tiles of an int8 matrix product, without any epilogue: how near to the peak of vpdpbusd does the inner loop
// come, and where must its weights lie? Build and run with run.sh; what was found is in README.md.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "peak.h"

namespace {

inline void dot(__m512i& acc, __m512i a, __m512i b) { __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
// The weights as the unsigned operand, x broadcast by the instruction itself.
inline void dot_broadcast(__m512i& acc, __m512i b, const std::uint8_t* a) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(*reinterpret_cast<const std::int32_t*>(a)));
}

// rows x 16 * vectors accumulators; a step is four k. `ahead`: bytes of software prefetch, 0 for none.
template <int rows, int vectors, int ahead, bool embedded>
__attribute__((noinline)) void tile(const std::uint8_t* a, std::int64_t stride, const std::int8_t* b,
                                    std::int64_t b_step, std::int64_t steps, std::int32_t* out) {
  __m512i c[rows][vectors];
#pragma GCC unroll 24
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) c[r][j] = _mm512_setzero_si512();
#pragma GCC unroll 1
  for (std::int64_t s = 0; s < steps; ++s, b += b_step, a += 4) {
    __m512i w[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      w[j] = _mm512_loadu_si512(b + 64 * j);
      if (ahead) _mm_prefetch(reinterpret_cast<const char*>(b + ahead + 64 * j), _MM_HINT_T0);
    }
#pragma GCC unroll 24
    for (int r = 0; r < rows; ++r) {
      if constexpr (embedded) {
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) dot_broadcast(c[r][j], w[j], a + r * stride);
      } else {
        std::int32_t four;
        std::memcpy(&four, a + r * stride, 4);
        const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) dot(c[r][j], x, w[j]);
      }
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) _mm512_storeu_si512(out + (r * vectors + j) * 16, c[r][j]);
}

using Tile = void (*)(const std::uint8_t*, std::int64_t, const std::int8_t*, std::int64_t, std::int64_t, std::int32_t*);

struct Version {
  const char* name;
  Tile run;
  int rows, vectors;
};

const Version versions[] = {
    {"6x64, no prefetch", tile<6, 4, 0, false>, 6, 4},
    {"6x64, prefetch 512 B", tile<6, 4, 512, false>, 6, 4},
    {"6x64, prefetch 1 KB", tile<6, 4, 1024, false>, 6, 4},
    {"6x64, prefetch 2 KB", tile<6, 4, 2048, false>, 6, 4},
    {"6x64, embedded broadcast", tile<6, 4, 0, true>, 6, 4},
    {"12x32, no prefetch", tile<12, 2, 0, false>, 12, 2},
    {"12x32, prefetch 1 KB", tile<12, 2, 1024, false>, 12, 2},
    {"12x32, embedded broadcast", tile<12, 2, 0, true>, 12, 2},
    {"8x48, no prefetch", tile<8, 3, 0, false>, 8, 3},
    {"8x48, prefetch 768 B", tile<8, 3, 768, false>, 8, 3},
    {"5x80, no prefetch", tile<5, 5, 0, false>, 5, 5},
};

// Bytes of weights that go round: half of L1, one panel of 64 columns, a unit in L2, more than L2.
const std::int64_t footprints[] = {12 << 10, 24 << 10, 48 << 10, 384 << 10, 4 << 20};

}  // namespace

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 15;
  constexpr std::int64_t k = 768, rows = 96;
  std::vector<std::uint8_t> memory(rows * k + (9 << 20), 3);
  auto* a = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64);
  auto* b = reinterpret_cast<std::int8_t*>(a + rows * k + 4096);
  alignas(64) static std::int32_t out[26 * 16];
  std::printf("%-28s", "% of peak, weights from");
  for (const std::int64_t bytes : footprints) std::printf("%8ld KB", static_cast<long>(bytes >> 10));
  std::printf("\n");
  for (const Version& v : versions) {
    std::printf("%-28s", v.name);
    for (const std::int64_t bytes : footprints) {
      const std::int64_t step = 64 * v.vectors, depth = std::min<std::int64_t>(k / 4, bytes / step),
                         panels = bytes / (step * depth);
      std::vector<double> shares;
      for (int repeat = 0; repeat < repeats; ++repeat) {
        const std::int64_t rounds = std::max<std::int64_t>(1, 40000 / (depth * panels));
        const double t0 = cpu_seconds();
        for (std::int64_t i = 0, tile = 0; i < rounds; ++i)
          for (std::int64_t p = 0; p < panels; ++p, tile = (tile + 1) % (rows / v.rows))
            v.run(a + tile * v.rows * k, k, b + p * depth * step, step, depth, out);
        const double t1 = cpu_seconds();
        peak(rounds * panels * depth);
        const double t2 = cpu_seconds();
        shares.push_back((t2 - t1) / (t1 - t0) * v.rows * v.vectors / 24.0);
      }
      std::sort(shares.begin(), shares.end());
      std::printf("%11.1f", 100 * shares[shares.size() / 2]);
    }
    std::printf("\n");
  }
}
