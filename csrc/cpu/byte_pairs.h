// Sums of products of bytes on AVX2 where the weights have few bits. vpmaddubsw multiplies unsigned by signed bytes and
// adds pairs in int16, where codes of 8 bits would saturate. Of few bits several pairs fit there, and one vpmaddwd by
// ones widens them all to int32. Of two ways to have one factor unsigned each is exact up to the same magnitude:
//   x as it is, 128 at most, by code + offset:   2 * pairs * 128 * (2 * magnitude) <= 2^15   (int4_strips.h)
//   x + 128, 255 at most, by the code as it is:  2 * pairs * 255 * magnitude < 2^15          (int8_narrow.h)
//   magnitude up to    8   16   32   64
//   pairs              8    4    2    1
#pragma once

#include "blocking.h"

namespace {

constexpr int kStripHeight = 3,
              kStripColumns = 16;  // 6 sums, 6 pair sums, 2 vectors of w, x and a product: 16 registers
constexpr std::int64_t kStripStep = 4 * kStripColumns;  // bytes of four k

// c = (`first`) or c += four k of a row by 16 columns, in int16; w unsigned. In assembly, since compilers spill.
template <bool first>
[[gnu::always_inline]] static inline void add_pairs(vi (&c)[2], const std::int8_t* four, vi w0, vi w1) {
  struct Four {
    std::int8_t at[4];
  };
  const Four& x4 = *reinterpret_cast<const Four*>(four);
  if constexpr (first) {
    __asm__("vpbroadcastd %4, %1\n\tvpmaddubsw %1, %2, %0\n\tvpmaddubsw %1, %3, %1"
            : "=&x"(c[0]), "=&x"(c[1])
            : "x"(w0), "x"(w1), "m"(x4));
  } else {
    vi x, t;
    __asm__(
        "vpbroadcastd %6, %2\n\tvpmaddubsw %2, %4, %3\n\tvpmaddubsw %2, %5, %2\n\t"
        "vpaddw %3, %0, %0\n\tvpaddw %2, %1, %1"
        : "+x"(c[0]), "+x"(c[1]), "=&x"(x), "=&x"(t)
        : "x"(w0), "x"(w1), "m"(x4));
  }
}

}  // namespace
