// Register tiles of int8_linear for avxvnni, neon and scalar: acc[rows, 64] = start + x . panel^T for up to kTile rows,
// strip by strip of as many rows and columns as the registers hold. x comes as rows of Element (`copy_row`):
//   - avxvnni: x + 128 as uint8, as in int8_tiles.h.
//   - neon, scalar: int8 as it is.
#pragma once

#include "blocking.h"

namespace {

#if defined(QK_TIER_avxvnni)

using Element = std::uint8_t;
constexpr bool kShifted = true;
constexpr int kStripRows = 6, kStripVectors = 2;  // 12 of 16 registers

static inline void copy_row(const std::int8_t* x, std::int64_t k, Element* to) {
  for (std::int64_t i = 0; i < k; ++i) to[i] = static_cast<Element>(x[i] ^ -128);
  for (std::int64_t i = k; i % 4 != 0; ++i) to[i] = 0;  // the weights there are 0
}

#else

using Element = std::int8_t;
constexpr bool kShifted = false;

static inline void copy_row(const std::int8_t* x, std::int64_t k, Element* to) {
  std::memcpy(to, x, static_cast<std::size_t>(k));
  for (std::int64_t i = k; i % 4 != 0; ++i) to[i] = 0;
}

#endif

#if defined(QK_TIER_neon)
constexpr int kStripRows = 6, kStripVectors = 4;  // 24 of 32 registers
#endif

#if defined(QK_TIER_avxvnni) || defined(QK_TIER_neon)

#if defined(QK_TIER_neon)
// Four k of a row in the lowest lane, and sums of their products with each lane of b. In assembly: with intrinsics
// compilers copy x to all lanes and keep a sum on the stack.
static inline vi four_of(const Element* a) {
  vi x;
  __asm__("ldr %s0, %1" : "=w"(x) : "m"(*reinterpret_cast<const std::int32_t*>(a)));
  return x;
}
static inline void dot_four(vi& sum, vi x, vi b) {
  __asm__("sdot %0.4s, %2.16b, %1.4b[0]" : "+w"(sum) : "w"(x), "w"(b));
}
#else
static inline vi four_of(const Element* a) {
  std::int32_t four;
  std::memcpy(&four, a, 4);
  return set1(four);
}
static inline void dot_four(vi& sum, vi x, vi b) { dot(sum, x, b); }
#endif

// c += one step: four k of every row and column.
template <int rows>
static inline void step(vi (&c)[rows][kStripVectors], const Element* a, std::int64_t stride, const std::int8_t* panel) {
  vi b[kStripVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kStripVectors; ++j) b[j] = load(reinterpret_cast<const std::int32_t*>(panel) + W * j);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    const vi x = four_of(a + r * stride);
#pragma GCC unroll 4
    for (int j = 0; j < kStripVectors; ++j) dot_four(c[r][j], x, b[j]);
  }
}

#endif

#if defined(QK_TIER_scalar)

template <int rows>
[[gnu::noinline]] static void tile(const Element* a, std::int64_t stride, const std::int8_t* panel, std::int64_t steps,
                                   Start start, std::int32_t* acc) {
  for (int r = 0; r < rows; ++r, a += stride, acc += kPanel) {
    std::memmove(acc, start.at + r * start.stride, kPanel * sizeof(std::int32_t));
    const std::int8_t* b = panel;
    for (std::int64_t s = 0; s < steps; ++s, b += 256) {
      const int x0 = a[4 * s], x1 = a[4 * s + 1], x2 = a[4 * s + 2], x3 = a[4 * s + 3];
      for (int j = 0; j < kPanel; ++j)
        acc[j] += x0 * b[4 * j] + x1 * b[4 * j + 1] + x2 * b[4 * j + 2] + x3 * b[4 * j + 3];
    }
  }
}

#else

// acc[rows, kStripVectors * W] of a panel's 64 columns.
template <int rows>
static inline void strip(const Element* a, std::int64_t stride, const std::int8_t* panel, std::int64_t steps,
                         std::int32_t* acc) {
  vi c[rows][kStripVectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kStripVectors; ++j) c[r][j] = load(acc + r * kPanel + W * j);
  }
#pragma GCC unroll 1
  for (std::int64_t s = 0; s < steps; ++s, panel += 256, a += 4) step(c, a, stride, panel);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kStripVectors; ++j) store(acc + r * kPanel + W * j, c[r][j]);
  }
}

template <int rows>
[[gnu::noinline]] static void tile(const Element* a, std::int64_t stride, const std::int8_t* panel, std::int64_t steps,
                                   Start start, std::int32_t* acc) {
  for (int r = 0; r < rows; ++r)
    std::memmove(acc + r * kPanel, start.at + r * start.stride, kPanel * sizeof(std::int32_t));
  constexpr int upper = rows > kStripRows ? kStripRows : rows, lower = rows - upper;
  for (int j = 0; j < kPanel; j += kStripVectors * W) {
    strip<upper>(a, stride, panel + 4 * j, steps, acc + j);
    if constexpr (lower > 0) strip<lower>(a + upper * stride, stride, panel + 4 * j, steps, acc + upper * kPanel + j);
  }
}

#endif

}  // namespace
