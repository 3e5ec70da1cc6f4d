// Tiles of int4_linear with float activations (W4A16).
#pragma once

#include "int4_weights.h"

namespace {

// a * b + c, fused where the processor can do it in one instruction.
static inline vf multiply_add(vf a, vf b, vf c) {
#if defined(QK_TIER_scalar)
  return add(mul(a, b), c);
#else
  return fma(a, b, c);
#endif
}

// Inputs of steps begin..end of a panel as floats [inputs, 64].
template <int i>
static inline void dequantize_one(vi bytes, vf scale, vf zero_point, float* to) {
  const vf low = to_float(bit_and(shift_right<8 * i>(bytes), set1(15)));
  const vf high = to_float(bit_and(shift_right<8 * i + 4>(bytes), set1(15)));
  store(to + i * kPanel, mul(sub(low, zero_point), scale));
  store(to + (4 + i) * kPanel, mul(sub(high, zero_point), scale));
}
static void dequantize(const Weights4& w, std::int64_t p, std::int64_t begin, std::int64_t end, float* to) {
  const std::uint8_t* panel = w.panel(p);
  for (int j = 0; j < kPanel; j += W) {
    vf scale = zero(), zero_point = set1(8.0f);
    std::int64_t known = -1;
    for (std::int64_t s = begin; s < end; ++s) {
      const std::int64_t group = s * kStep / w.group;
      if (group != known) {
        scale = load(w.scales + w.group_row(p, group) + j);
        if (w.zeros) zero_point = load(w.zeros + w.group_row(p, group) + j);
        known = group;
      }
      const vi bytes = load(reinterpret_cast<const std::int32_t*>(panel + s * kStepBytes + 4 * j));
      float* at = to + (s - begin) * kStep * kPanel + j;
      dequantize_one<0>(bytes, scale, zero_point, at);
      dequantize_one<1>(bytes, scale, zero_point, at);
      dequantize_one<2>(bytes, scale, zero_point, at);
      dequantize_one<3>(bytes, scale, zero_point, at);
    }
  }
}

#if defined(QK_TIER_avx512vnni) || defined(QK_TIER_neon)
constexpr int kStrip = 4;
#else
constexpr int kStrip = 2;  // vectors of a register tile: 6 x 2 accumulators fit into 16 registers
#endif

// acc[rows, kStrip * W] (+)= x[rows, k] . b[k, 64]
template <int rows>
static inline void strip(const float* x, std::int64_t stride, const float* b, std::int64_t k, bool more, float* acc) {
  vf c[rows][kStrip];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kStrip; ++j) c[r][j] = more ? load(acc + r * kPanel + j * W) : zero();
  }
#pragma GCC unroll 1
  for (std::int64_t i = 0; i < k; ++i, b += kPanel) {
    vf row[kStrip];
#pragma GCC unroll 4
    for (int j = 0; j < kStrip; ++j) row[j] = load(b + j * W);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const vf v = set1(x[r * stride + i]);
#pragma GCC unroll 4
      for (int j = 0; j < kStrip; ++j) c[r][j] = multiply_add(v, row[j], c[r][j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kStrip; ++j) store(acc + r * kPanel + j * W, c[r][j]);
  }
}

template <int rows>
[[gnu::noinline]] static void float_tile(const float* x, std::int64_t stride, const float* b, std::int64_t k, bool more,
                                         float* acc) {
  for (int j = 0; j < kPanel; j += kStrip * W) strip<rows>(x, stride, b + j, k, more, acc + j);
}

static void float_tile_of(int rows, const float* x, std::int64_t stride, const float* b, std::int64_t k, bool more,
                          float* acc) {
  switch (rows) {
    case 1:
      return float_tile<1>(x, stride, b, k, more, acc);
    case 2:
      return float_tile<2>(x, stride, b, k, more, acc);
    case 3:
      return float_tile<3>(x, stride, b, k, more, acc);
    case 4:
      return float_tile<4>(x, stride, b, k, more, acc);
    case 5:
      return float_tile<5>(x, stride, b, k, more, acc);
    default:
      return float_tile<6>(x, stride, b, k, more, acc);
  }
}

#if defined(QK_TIER_avx512vnni)
constexpr int kFewRows = 4;

// to[rows, 64] = x[rows, K] . w^T without a buffer, for few rows: a permutation turns nibbles into floats (it reads
// four bits of an index) on their way from memory.
template <int rows, bool zeros>
[[gnu::noinline]] static void few_rows(const Weights4& w, std::int64_t p, const float* x, std::int64_t stride,
                                       float* to) {
  const vf table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const std::int64_t whole = ceil_div(w.group, kStep);
  const std::uint8_t* from = w.panel(p);
  for (int i = 0; i < rows * kPanel; i += 16) store(to + i, zero());
  for (std::int64_t g = 0; g < w.groups; ++g) {
    const std::int64_t begin = g * whole, end = begin + whole < w.steps ? begin + whole : w.steps,
                       row = w.group_row(p, g);
    vf sum[rows][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = zero();
    }
#pragma GCC unroll 1
    for (std::int64_t s = begin; s < end; ++s, from += kStepBytes) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vi bytes = load(reinterpret_cast<const std::int32_t*>(from + 64 * j));
        const vf zero_point = zeros ? sub(load(w.zeros + row + 16 * j), set1(8.0f)) : zero();
#pragma GCC unroll 8
        for (int n = 0; n < 8; ++n) {
          vf value = _mm512_permutexvar_ps(n ? _mm512_srli_epi32(bytes, 4 * n) : bytes, table);
          if (zeros) value = sub(value, zero_point);
#pragma GCC unroll 4
          for (int r = 0; r < rows; ++r)  // byte i holds k = i and k = 4 + i
            sum[r][j] = fma(value, set1(x[r * stride + s * kStep + n / 2 + 4 * (n % 2)]), sum[r][j]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        float* y = to + r * kPanel + 16 * j;
        store(y, fma(sum[r][j], load(w.scales + row + 16 * j), load(y)));
      }
    }
  }
}

template <int rows>
static void few_rows(const Weights4& w, std::int64_t p, const float* x, std::int64_t stride, float* to) {
  if (w.zeros) return few_rows<rows, true>(w, p, x, stride, to);
  few_rows<rows, false>(w, p, x, stride, to);
}

// Two rows at a time, as many as the registers hold; the second pair finds the panel in L2.
static void few_rows_of(std::int64_t rows, const Weights4& w, std::int64_t p, const float* x, std::int64_t stride,
                        float* to) {
  for (; rows > 1; rows -= 2, x += 2 * stride, to += 2 * kPanel) few_rows<2>(w, p, x, stride, to);
  if (rows) few_rows<1>(w, p, x, stride, to);
}
#else
constexpr int kFewRows = 0;
static void few_rows_of(std::int64_t, const Weights4&, std::int64_t, const float*, std::int64_t, float*) {}
#endif

}  // namespace
