// Rows times an orthonormal Hadamard matrix `H_m (x) S_p`, p a power of two: butterflies on m stretches of p values,
// then the small matrix across the stretches, then one multiplication. A row stays in the first cache.
#include "parallel.h"
#include "simd.h"

namespace {

#if defined(QK_TIER_avx512vnni)
// Lane i takes lane i ^ half.
static inline vf swap_lanes(vf x, int half) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_xor_si512(lanes, _mm512_set1_epi32(half)), x);
}
static inline vf lane_signs(int half) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(lanes, _mm512_set1_epi32(half)), set1(1.0f), set1(-1.0f));
}
#elif defined(QK_TIER_avx2)
static inline vf swap_lanes(vf x, int half) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_permutevar8x32_ps(x, _mm256_xor_si256(lanes, _mm256_set1_epi32(half)));
}
static inline vf lane_signs(int half) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), wanted = _mm256_set1_epi32(half);
  const __m256i upper = _mm256_cmpeq_epi32(_mm256_and_si256(lanes, wanted), wanted);
  return _mm256_blendv_ps(set1(1.0f), set1(-1.0f), _mm256_castsi256_ps(upper));
}
#elif defined(QK_TIER_neon)
static inline vf swap_lanes(vf x, int half) { return half == 1 ? vrev64q_f32(x) : vextq_f32(x, x, 2); }
static inline vf lane_signs(int half) {
  static const float signs[2][4] = {{1, -1, 1, -1}, {1, 1, -1, -1}};
  return vld1q_f32(signs[half / 2]);
}
#endif

// The butterflies inside vectors: n is a multiple of W.
static inline void butterflies_in_vectors(float* y, std::int64_t n) {
#if !defined(QK_TIER_scalar)
  for (std::int64_t i = 0; i < n; i += W) {
    vf x = load(y + i);
#pragma GCC unroll 4
    for (int half = 1; half < W; half *= 2) x = fma(x, lane_signs(half), swap_lanes(x, half));
    store(y + i, x);
  }
#else
  (void)y;
  (void)n;
#endif
}

// S_p on every stretch of p values; n is a multiple of p.
static void sylvester(float* y, std::int64_t n, std::int64_t p) {
  std::int64_t half = 1;
  if (p < W) {
    for (; half < p; half *= 2)
      for (std::int64_t block = 0; block < n; block += 2 * half)
        for (std::int64_t i = block; i < block + half; ++i) {
          const float a = y[i], b = y[i + half];
          y[i] = a + b;
          y[i + half] = a - b;
        }
    return;
  }
  butterflies_in_vectors(y, n);
  half = W;
  for (; 4 * half <= p; half *= 4)  // two rounds a visit
    for (std::int64_t block = 0; block < n; block += 4 * half)
      for (std::int64_t i = block; i < block + half; i += W) {
        const vf a = load(y + i), b = load(y + i + half), c = load(y + i + 2 * half), d = load(y + i + 3 * half);
        const vf ab = add(a, b), a_b = sub(a, b), cd = add(c, d), c_d = sub(c, d);
        store(y + i, add(ab, cd));
        store(y + i + half, add(a_b, c_d));
        store(y + i + 2 * half, sub(ab, cd));
        store(y + i + 3 * half, sub(a_b, c_d));
      }
  for (; half < p; half *= 2)
    for (std::int64_t block = 0; block < n; block += 2 * half)
      for (std::int64_t i = block; i < block + half; i += W) {
        const vf a = load(y + i), b = load(y + i + half);
        store(y + i, add(a, b));
        store(y + i + half, sub(a, b));
      }
}

// out = factor * (H_m (x) I_p) y, with H_m as floats +-1 by rows; m is 1 or a multiple of 4.
template <class T>
static void across(const float* y, std::int64_t m, std::int64_t p, const float* base, float factor, T* out) {
  const vf f = set1(factor);
  for (std::int64_t column = 0; column < p; column += W) {
    const int count = p - column < W ? static_cast<int>(p - column) : W;
    const auto get = [&](std::int64_t j) {
      return count == W ? load(y + j * p + column) : load(y + j * p + column, count);
    };
    const auto put = [&](std::int64_t i, vf sum) {
      if (count == W)
        store(out + i * p + column, mul(sum, f));
      else
        store(out + i * p + column, mul(sum, f), count);
    };
    if (m == 1) {
      put(0, get(0));
      continue;
    }
    for (std::int64_t i = 0; i < m; i += 4) {
      const float* signs = base + i * m;
      vf a = zero(), b = a, c = a, d = a;
      for (std::int64_t j = 0; j < m; ++j) {
        const vf x = get(j);
        a = fma(set1(signs[j]), x, a);
        b = fma(set1(signs[j + m]), x, b);
        c = fma(set1(signs[j + 2 * m]), x, c);
        d = fma(set1(signs[j + 3 * m]), x, d);
      }
      put(i, a);
      put(i + 1, b);
      put(i + 2, c);
      put(i + 3, d);
    }
  }
}

template <class T>
static void transform_rows(const T* x, std::int64_t begin, std::int64_t end, std::int64_t m, std::int64_t p,
                           const float* base, float factor, T* out) {
  const std::int64_t n = m * p;
  float* y = static_cast<float*>(qk_workspace(QK_SLOT_A, static_cast<std::size_t>(n) * sizeof(float)));
  for (std::int64_t row = begin; row < end; ++row) {
    std::int64_t i = 0;
    for (; i + W <= n; i += W) store(y + i, load(x + row * n + i));
    if (i < n) store(y + i, load(x + row * n + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    sylvester(y, n, p);
    across(y, m, p, base, factor, out + row * n);
  }
}

}  // namespace

extern "C" {

void QK_IMPL(hadamard_transform)(const void* x, int type, std::int64_t rows, std::int64_t m, std::int64_t p,
                                 const float* base, float factor, void* out, int threads) {
  const std::int64_t n = m * p;
  parallel_for(threads, rows, n >= 8192 ? 1 : 8192 / n, [&](std::int64_t begin, std::int64_t end) {
    const auto run = [&](const auto* typed, auto* target) {
      transform_rows(typed, begin, end, m, p, base, factor, target);
    };
    if (type == QK_F32) run(static_cast<const float*>(x), static_cast<float*>(out));
    if (type == QK_BF16) run(static_cast<const bf16*>(x), static_cast<bf16*>(out));
    if (type == QK_F16) run(static_cast<const f16*>(x), static_cast<f16*>(out));
  });
}
}
