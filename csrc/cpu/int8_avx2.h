// Register tiles of int8_linear for AVX2, where a product of bytes is vpmaddubsw, unsigned by signed, and adds pairs in
// int16. Codes as they are would saturate there. So a row of x comes as magnitudes and signs, each step of four k as
// |x| [4] and m [4], m = -1 where x < 0, else 0. With m the bits of w are flipped, w ^ m = w or -w - 1, and
//   sum |x| (w ^ m) = sum x w - sum |x| where x < 0,
// whose pairs are within -2 * 128 * 128 .. 2 * 128 * 127: all fit. What is missing is one number for a row, which
// stands behind it, and the sums start from it. vpxor runs on any port, vpsignb (sum |x| (sign(x) w), no number needed)
// only where multiplications do.
#pragma once

#include "blocking.h"

namespace {

using Element = std::int16_t;
constexpr bool kShifted = false;

// The sums that a tile starts from: of each row 64, or one for all columns.
struct Start {
  const std::int32_t* at;
  std::int64_t stride;
  bool one = false;
};

// Behind the steps of a row: what its sums start from, over all k and over each group of 128.
static inline std::int64_t steps_elements(std::int64_t k) { return round_up(k, 16); }
static inline std::int64_t row_elements(std::int64_t k) {
  return round_up(steps_elements(k) + 2 * (1 + ceil_div(k, kGroup)), 32);
}
static inline Start start_of(const std::int32_t*, const Element* row, std::int64_t stride, std::int64_t k) {
  return {reinterpret_cast<const std::int32_t*>(row + steps_elements(k)), stride / 2, true};
}
static inline Start start_of_group(const std::int32_t* columns, const Element* row, std::int64_t stride, std::int64_t k,
                                   std::int64_t group) {
  Start start = start_of(columns, row, stride, k);
  start.at += 1 + group;
  return start;
}

static inline void copy_row(const std::int8_t* x, std::int64_t k, Element* to) {
  auto* starts = reinterpret_cast<std::int32_t*>(to + steps_elements(k));
  std::int32_t total = 0;
  for (std::int64_t group = 0; group * kGroup < k; ++group) {
    const std::int64_t first = group * kGroup, last = k - first < kGroup ? k : first + kGroup;
    __m128i sum = _mm_setzero_si128();
    for (std::int64_t i = first; i < last; i += 16) {
      alignas(16) std::int8_t rest[16] = {};
      const std::int8_t* from = x + i;
      if (last - i < 16) from = static_cast<std::int8_t*>(std::memcpy(rest, from, static_cast<std::size_t>(last - i)));
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), size = _mm_abs_epi8(codes),
                    sign = _mm_cmpgt_epi8(_mm_setzero_si128(), codes);
      sum = _mm_add_epi64(sum, _mm_sad_epu8(_mm_and_si128(size, sign), _mm_setzero_si128()));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm_unpacklo_epi32(size, sign));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i + 8), _mm_unpackhi_epi32(size, sign));
    }
    starts[1 + group] = _mm_cvtsi128_si32(_mm_add_epi64(sum, _mm_unpackhi_epi64(sum, sum)));
    total += starts[1 + group];
  }
  starts[0] = total;
}

// A panel of weights: `pitch` bytes from one step of four k to the next, `half` from the first 32 columns to the
// others.
struct Panel {
  const std::int8_t* at;
  std::int64_t pitch, half;
  const std::int8_t* column(int j) const { return at + j / 32 * half + j % 32 * 4; }
};

static inline Panel from_step(const Panel& panel, std::int64_t step) {
  return {panel.at + step * panel.pitch, panel.pitch, panel.half};
}

// As packed: for a few rows.
static inline Panel panel_of(const std::int8_t* packed) { return {packed, 4 * kPanel, 2 * kPanel}; }

// For many rows its halves one behind the other in `room` [4 * kPanel * steps]. A half of a packed panel lies in half
// of the sets of the L1 cache only, and does not stay there from K = 512 on.
constexpr int kRowsToCopyFor = 4 * kTile;  // fewer do not pay for it
static inline Panel copied_panel(const std::int8_t* copy, std::int64_t steps) {
  return {copy, 2 * kPanel, 2 * kPanel * steps};
}
static inline void copy_panel(const std::int8_t* packed, std::int64_t steps, std::int8_t* room) {
  const std::int64_t half = 2 * kPanel * steps;
  for (std::int64_t s = 0; s < steps; ++s) {
    for (int i = 0; i < 2 * kPanel; i += 4 * W) {
      const vi first = load(reinterpret_cast<const std::int32_t*>(packed + 4 * kPanel * s + i)),
               second = load(reinterpret_cast<const std::int32_t*>(packed + 4 * kPanel * s + 2 * kPanel + i));
      store(reinterpret_cast<std::int32_t*>(room + 2 * kPanel * s + i), first);
      store(reinterpret_cast<std::int32_t*>(room + half + 2 * kPanel * s + i), second);
    }
  }
}

// The inner loop of a strip, which another way of multiplying may replace (int8_narrow.h): c += x . w over `steps`
// steps of four k.
//
// In assembly, because the order counts, and because vectors that are loaded by an instruction of their own take a
// share of the vector ports (Zen 3, 4: a sixth of a cycle each), so the weights are memory operands.
struct Flipped {
  static constexpr int kRows = 2, kVectors = 4;

  struct Bytes {
    std::int8_t at[32];
  };

  template <int vectors>
  [[gnu::always_inline]] static inline void step(vi (&c)[vectors], const Element* a, const std::int8_t* panel,
                                                 std::int64_t half, vi ones) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j += 4) {
      const auto* w = reinterpret_cast<const Bytes*>(panel + j / 4 * half);
      vi x, t0, t1, t2, t3;
      __asm__(
          "vpbroadcastd %[sign], %[x]\n\t"
          "vpxor %[w0], %[x], %[t0]\n\t"
          "vpxor %[w1], %[x], %[t1]\n\t"
          "vpxor %[w2], %[x], %[t2]\n\t"
          "vpxor %[w3], %[x], %[t3]\n\t"
          "vpbroadcastd %[size], %[x]\n\t"
          "vpmaddubsw %[t0], %[x], %[t0]\n\t"
          "vpmaddubsw %[t1], %[x], %[t1]\n\t"
          "vpmaddubsw %[t2], %[x], %[t2]\n\t"
          "vpmaddubsw %[t3], %[x], %[t3]\n\t"
          "vpmaddwd %[ones], %[t0], %[t0]\n\t"
          "vpmaddwd %[ones], %[t1], %[t1]\n\t"
          "vpmaddwd %[ones], %[t2], %[t2]\n\t"
          "vpmaddwd %[ones], %[t3], %[t3]\n\t"
          "vpaddd %[t0], %[c0], %[c0]\n\t"
          "vpaddd %[t1], %[c1], %[c1]\n\t"
          "vpaddd %[t2], %[c2], %[c2]\n\t"
          "vpaddd %[t3], %[c3], %[c3]"
          : [c0] "+x"(c[j]), [c1] "+x"(c[j + 1]), [c2] "+x"(c[j + 2]), [c3] "+x"(c[j + 3]), [x] "=&x"(x),
            [t0] "=&x"(t0), [t1] "=&x"(t1), [t2] "=&x"(t2), [t3] "=&x"(t3)
          : [size] "m"(*reinterpret_cast<const std::int32_t*>(a)),
            [sign] "m"(*reinterpret_cast<const std::int32_t*>(a + 2)), [ones] "x"(ones), [w0] "m"(w[0]), [w1] "m"(w[1]),
            [w2] "m"(w[2]), [w3] "m"(w[3]));
    }
  }

  template <int rows, int vectors>
  [[gnu::always_inline]] static inline void accumulate(vi (&c)[rows][vectors], const Element* a, std::int64_t stride,
                                                       const Panel& panel, int column, std::int64_t steps) {
    const vi ones = _mm256_set1_epi16(1);
    const std::int64_t pitch = panel.pitch, half = panel.half;
    const std::int8_t* w = panel.column(column);
#pragma GCC unroll 1
    for (; steps > 0; --steps, w += pitch, a += 4) {
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) step(c[r], a + r * stride, w, half, ones);
    }
  }
};

// Sums as they are, to acc[rows, 64].
struct Keep {
  std::int32_t* acc;
  template <int rows, int vectors>
  void operator()(const vi (&c)[rows][vectors], int row, int column) const {
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) store(acc + (row + r) * kPanel + column + W * j, c[r][j]);
    }
  }
};

// The linear part of the epilogue, to rows of floats.
struct Scale {
  const Linear& linear;
  float* to;
  std::int64_t stride;
  template <int rows, int vectors>
  void operator()(const vi (&c)[rows][vectors], int row, int column) const {
    const float *const columns = linear.columns + column, *const bias = linear.bias + column;
    float* const at = to + row * stride + column;
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) {
      const vf row_scale = set1(linear.rows[row + r]);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j)
        store(at + r * stride + W * j,
              fma(to_float(c[r][j]), mul(row_scale, load(columns + W * j)), load(bias + W * j)));
    }
  }
};

// Rows row.. of a tile by the 8 * vectors columns of its panel from `column` on.
template <class Product, int rows, int vectors, class X, class Done>
[[gnu::noinline]] static void strip(const X* a, std::int64_t stride, const Panel& panel, std::int64_t steps,
                                    const Start& start, int row, int column, const Done& done) {
  vi c[rows][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    const std::int32_t* at = start.at + (row + r) * start.stride;
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) c[r][j] = start.one ? set1(*at) : load(at + column + W * j);
  }
  Product::accumulate(c, a + row * stride, stride, panel, column, steps);
  done(c, row, column);
}

// A few rows by a part of the panel, which then comes from L1 for the next rows (half of it is 24 KB at K = 768). A row
// alone by all of it, in the order of memory.
template <class Product, int rows, class X, class Done>
static inline void strips(const X* a, std::int64_t stride, const Panel& panel, std::int64_t steps, const Start& start,
                          const Done& done) {
  constexpr int kRows = Product::kRows, kVectors = Product::kVectors, rest = rows % kRows;
  if constexpr (rows == 1) return strip<Product, 1, kPanel / W>(a, stride, panel, steps, start, 0, 0, done);
  for (int column = 0; column < kPanel; column += W * kVectors) {
    for (int row = 0; row + kRows <= rows; row += kRows)
      strip<Product, kRows, kVectors>(a, stride, panel, steps, start, row, column, done);
    if constexpr (rest > 0) strip<Product, rest, kVectors>(a, stride, panel, steps, start, rows - rest, column, done);
  }
}

template <int rows>
static void tile(const Element* a, std::int64_t stride, const Panel& panel, std::int64_t steps, Start start,
                 std::int32_t* acc) {
  strips<Flipped, rows>(a, stride, panel, steps, start, Keep{acc});
}

}  // namespace
