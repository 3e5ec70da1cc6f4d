// The two matrix products of attention on registers: packing of keys and values, and tiles.
//
// All operands are made of units of 32 bits: a float, or, where the processor multiplies bfloat16, a pair of them that
// one instruction multiplies and adds up. `Units` says which; units travel in float registers, whatever they hold.
#pragma once

#include "simd.h"

namespace {

// A tile is R rows times at most NV vectors of accumulators.
#if defined(QK_TIER_avx512vnni) || defined(QK_TIER_neon)
constexpr int R = 6, NV = 4;
#elif defined(QK_TIER_avx2)
constexpr int R = 6, NV = 2;
#else
constexpr int R = 2, NV = 4;
#endif
// Keys beyond the last whole vector up to this many are multiplied one by one instead of as another vector.
constexpr std::int64_t most_single = W / 4;

static inline std::int64_t up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
static inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// One float a unit.
struct Floats {
  static constexpr int per_unit = 1;
  static inline vf dot(vf a, vf b, vf sum) { return fma(a, b, sum); }
  template <class T>
  static inline vf read(const T* p) {
    return load(p);
  }
  template <class T>
  static inline vf read(const T* p, int count) {
    return load(p, count);
  }
  static inline vf negate(vf x) { return sub(set1(-0.0f), x); }
};

// W units of a row of n values (n > 0), the rest of them 0.
template <class Units, class T>
static inline vf read_units(const T* p, std::int64_t n) {
  constexpr int full = W * Units::per_unit;
  return n >= full ? Units::read(p) : Units::read(p, static_cast<int>(n));
}
template <class Units>
static inline std::int64_t units_of(std::int64_t values) {
  return (values + Units::per_unit - 1) / Units::per_unit;
}

// Vectors of columns in panels of at most NV that differ by one at most.
struct Panels {
  std::int64_t vectors, count;
  explicit Panels(std::int64_t all) : vectors(all), count((all + NV - 1) / NV) {}
  std::int64_t first(std::int64_t panel) const { return count == 0 ? 0 : vectors * panel / count; }
  int width(std::int64_t panel) const { return static_cast<int>(first(panel + 1) - first(panel)); }
};

// c[r][0, V * W) = sum over k of a[r][k] * b[k][0, V * W); rows of b are ldb apart.
template <int rows, int V, class Units>
static void tile(const float* a, std::int64_t lda, const float* b, std::int64_t ldb, std::int64_t depth, float* c,
                 std::int64_t ldc) {
  // Unrolled by decree and early, so that the sums live in registers from start to end.
  vf sums[rows][V];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = zero();
  for (std::int64_t k = 0; k < depth; ++k) {
    vf row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + k * ldb + v * W);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const vf x = set1(a[r * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = Units::dot(x, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * W, sums[r][v]);
}

using Tile = void (*)(const float*, std::int64_t, const float*, std::int64_t, std::int64_t, float*, std::int64_t);
template <int rows, class Units>
static Tile tile_of(int vectors) {
  if constexpr (NV >= 4) {
    if (vectors == 4) return tile<rows, 4, Units>;
    if (vectors == 3) return tile<rows, 3, Units>;
  }
  return vectors == 2 ? tile<rows, 2, Units> : tile<rows, 1, Units>;
}
template <class Units>
static inline Tile tile_of(int rows, int vectors) {
  if constexpr (R >= 6) {
    if (rows == 6) return tile_of<6, Units>(vectors);
    if (rows == 5) return tile_of<5, Units>(vectors);
    if (rows == 4) return tile_of<4, Units>(vectors);
    if (rows == 3) return tile_of<3, Units>(vectors);
  }
  return rows == 2 ? tile_of<2, Units>(vectors) : tile_of<1, Units>(vectors);
}

// c = a b for at most R rows and the first `wanted` vectors of b's columns. b was packed with `b_depth` rows, of which
// `depth` take part.
template <class Units>
static inline void product(int rows, const float* a, std::int64_t lda, const float* b, std::int64_t b_depth,
                           const Panels& panels, std::int64_t depth, std::int64_t wanted, float* c, std::int64_t ldc) {
  for (std::int64_t panel = 0; panel < panels.count; ++panel) {
    const std::int64_t first = panels.first(panel), width = panels.width(panel);
    if (first >= wanted) return;
    const auto vectors = static_cast<int>(smaller(wanted - first, width));
    tile_of<Units>(rows, vectors)(a, lda, b + first * W * b_depth, width * W, depth, c + first * W, ldc);
  }
}

// c[r][0, count) = a[r] . b[j], count at most most_single, for rows of `depth` units that are 0 up to a whole vector.
template <class Units>
static inline void single_columns(int rows, const float* a, std::int64_t lda, const float* b, std::int64_t count,
                                  std::int64_t depth, float* c, std::int64_t ldc) {
  for (int r = 0; r < rows; ++r)
    for (std::int64_t j = 0; j < count; ++j) {
      vf sum = zero();
      for (std::int64_t k = 0; k < depth; k += W)
        sum = Units::dot(load(a + r * lda + k), load(b + j * up(depth, W) + k), sum);
      c[r * ldc + j] = reduce_add(sum);
    }
}

#if defined(QK_TIER_avx512vnni)
static inline void transpose(vf* x) {
  vf t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]), c = _mm512_castps_pd(t[i + 2]),
                  d = _mm512_castps_pd(t[i + 3]);
    x[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    x[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    x[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    x[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // columns i, i + 4, i + 8, i + 12 lie in the four quarters
    const vf a = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
    const vf c = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88), d = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = t[i];
}
#elif defined(QK_TIER_avx2)
static inline void transpose(vf* x) {
  vf t[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(x[i], x[i + 1]), b = _mm256_unpackhi_ps(x[i], x[i + 1]);
    const __m256 c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}
#elif defined(QK_TIER_neon)
static inline void transpose(vf* x) {
  const auto pairs = [](vf a) { return vreinterpretq_f64_f32(a); };
  const vf a = vtrn1q_f32(x[0], x[1]), b = vtrn2q_f32(x[0], x[1]);
  const vf c = vtrn1q_f32(x[2], x[3]), d = vtrn2q_f32(x[2], x[3]);
  x[0] = vreinterpretq_f32_f64(vzip1q_f64(pairs(a), pairs(c)));
  x[1] = vreinterpretq_f32_f64(vzip1q_f64(pairs(b), pairs(d)));
  x[2] = vreinterpretq_f32_f64(vzip2q_f64(pairs(a), pairs(c)));
  x[3] = vreinterpretq_f32_f64(vzip2q_f64(pairs(b), pairs(d)));
}
#else
static inline void transpose(vf*) {}
#endif

// Keys [vectors * W][d], `stride` apart, as panels [units of d][keys]; keys from `count` on are 0.
template <class Units, class T>
static void pack_keys(const T* keys, std::int64_t stride, std::int64_t count, std::int64_t d, const Panels& panels,
                      float* out) {
  const std::int64_t units = units_of<Units>(d);
  for (std::int64_t panel = 0; panel < panels.count; ++panel) {
    const std::int64_t first = panels.first(panel), width = panels.width(panel) * W;
    for (std::int64_t column = first * W; column < first * W + width; column += W) {
      float* target = out + first * W * units + (column - first * W);
      for (std::int64_t unit = 0; unit < units; unit += W) {
        const std::int64_t channel = unit * Units::per_unit;
        vf block[W];
        for (int j = 0; j < W; ++j)
          block[j] =
              column + j < count ? read_units<Units>(keys + (column + j) * stride + channel, d - channel) : zero();
        transpose(block);
        for (int i = 0; i < W && unit + i < units; ++i) store(target + (unit + i) * width, block[i]);
      }
    }
  }
}

// Rows [count][d], `stride` apart, each as its units, padded with 0 to whole vectors.
template <class Units, class T>
static inline void copy_rows(const T* rows, std::int64_t stride, std::int64_t count, std::int64_t d, float* out) {
  const std::int64_t width = up(units_of<Units>(d), W);
  for (std::int64_t j = 0; j < count; ++j)
    for (std::int64_t unit = 0; unit < width; unit += W) {
      const std::int64_t channel = unit * Units::per_unit;
      store(out + j * width + unit, read_units<Units>(rows + j * stride + channel, d - channel));
    }
}

// Values [count][d] as panels [units of count][channels], padded with channels of 0 to a multiple of W.
template <class Units, class T>
static void pack_values(const T* values, std::int64_t stride, std::int64_t count, std::int64_t d, const Panels& panels,
                        float* out) {
  const std::int64_t depth = units_of<Units>(count);
  for (std::int64_t panel = 0; panel < panels.count; ++panel) {
    const std::int64_t first = panels.first(panel), width = panels.width(panel) * W;
    float* target = out + first * W * depth;
    for (std::int64_t unit = 0; unit < depth; ++unit)
      for (std::int64_t column = 0; column < width; column += W) {
        const std::int64_t channel = first * W + column, key = unit * Units::per_unit;
        const T* value = values + key * stride + channel;
        const auto row = [&](const T* p) { return read_units<Floats>(p, d - channel); };
        vf joined = row(value);
        if constexpr (Units::per_unit == 2)
          joined = Units::join(joined, key + 1 < count ? row(value + stride) : zero());
        store(target + unit * width + column, joined);
      }
  }
}

}  // namespace
