// Sums of products of bytes on AVX2 where the weights have few bits. vpmaddubsw multiplies unsigned by signed bytes and
// adds pairs in int16, where codes of 8 bits would saturate. Of few bits several pairs fit there, and one vpmaddwd by
// ones widens them all to int32. Of two ways to have one factor unsigned each is exact up to the same magnitude:
//   x as it is, 128 at most, by code + offset:   2 * pairs * 128 * (2 * magnitude) <= 2^15
//   x + 128, 255 at most, by the code as it is:  2 * pairs * 255 * magnitude < 2^15
//   magnitude up to    8   16   32   64
//   pairs              8    4    2    1
#pragma once

#include "blocking.h"

namespace {

constexpr int kStripHeight = 3,
              kStripColumns = 16;  // 6 sums, 6 pair sums, 2 vectors of w, x and a product: 16 registers
constexpr std::int64_t kStripStep = 4 * kStripColumns;  // bytes of four k

enum class Unsigned { weights, x };  // the factor that is

// c = (`first`) or c += four k of a row by 16 columns, in int16. In assembly, since compilers spill.
template <Unsigned factor, bool first>
[[gnu::always_inline]] static inline void add_pairs(vi (&c)[2], const std::int8_t* four, vi w0, vi w1) {
  struct Four {
    std::int8_t at[4];
  };
  const Four& x4 = *reinterpret_cast<const Four*>(four);
  if constexpr (first && factor == Unsigned::weights) {
    __asm__("vpbroadcastd %4, %1\n\tvpmaddubsw %1, %2, %0\n\tvpmaddubsw %1, %3, %1"
            : "=&x"(c[0]), "=&x"(c[1])
            : "x"(w0), "x"(w1), "m"(x4));
  } else if constexpr (first) {
    __asm__("vpbroadcastd %4, %1\n\tvpmaddubsw %2, %1, %0\n\tvpmaddubsw %3, %1, %1"
            : "=&x"(c[0]), "=&x"(c[1])
            : "x"(w0), "x"(w1), "m"(x4));
  } else {
    vi x, t;
    if constexpr (factor == Unsigned::weights)
      __asm__(
          "vpbroadcastd %6, %2\n\tvpmaddubsw %2, %4, %3\n\tvpmaddubsw %2, %5, %2\n\t"
          "vpaddw %3, %0, %0\n\tvpaddw %2, %1, %1"
          : "+x"(c[0]), "+x"(c[1]), "=&x"(x), "=&x"(t)
          : "x"(w0), "x"(w1), "m"(x4));
    else
      __asm__(
          "vpbroadcastd %6, %2\n\tvpmaddubsw %4, %2, %3\n\tvpmaddubsw %5, %2, %2\n\t"
          "vpaddw %3, %0, %0\n\tvpaddw %2, %1, %1"
          : "+x"(c[0]), "+x"(c[1]), "=&x"(x), "=&x"(t)
          : "x"(w0), "x"(w1), "m"(x4));
  }
}

alignas(32) static const std::int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// sum[rows, 2 * 8] += c, widened.
template <int rows>
[[gnu::always_inline]] static inline void add_widened(vi (&sum)[rows][2], vi (&c)[rows][2]) {
  const std::int16_t* ones = kOnes;
  __asm__ volatile("" : "+r"(ones));  // to be read here: no register is left for it before
  const vi one = load(reinterpret_cast<const std::int32_t*>(ones));
#pragma GCC unroll 3
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v)
      __asm__("vpmaddwd %2, %1, %1\n\tvpaddd %1, %0, %0" : "+x"(sum[r][v]), "+x"(c[r][v]) : "x"(one));
  }
}

// sum[rows, 16] += x . w over 4 * pairs k. Rows of x are `stride` bytes apart, steps of w [16, 4] `w_step`.
template <int pairs, Unsigned factor, int w_step, int rows>
[[gnu::always_inline]] static inline void add_products(vi (&sum)[rows][2], const std::int8_t* x, std::int64_t stride,
                                                       const void* w) {
  vi c[rows][2];
  const auto* codes = static_cast<const std::int32_t*>(w);
#pragma GCC unroll 8
  for (int s = 0; s < pairs; ++s, codes += w_step / 4) {
    const vi w0 = load(codes), w1 = load(codes + W);
#pragma GCC unroll 3
    for (int r = 0; r < rows; ++r) {
      if (s == 0)
        add_pairs<factor, true>(c[r], x + r * stride, w0, w1);
      else
        add_pairs<factor, false>(c[r], x + r * stride + 4 * s, w0, w1);
    }
  }
  add_widened(sum, c);
}

}  // namespace
