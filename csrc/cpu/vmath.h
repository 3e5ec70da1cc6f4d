// Functions on vectors. Errors are maxima over all floats in the stated range, found by tests/kernels.
#pragma once

#include "simd.h"

namespace {

// The table, to be read where it is used: int8_tiles.h runs these functions inside of loops that need their registers
// for sums, so there the compiler must not keep constants in registers across them.
template <class Table>
static inline const Table& at_use(const Table& table) {
#if defined(QK_TIER_avx512vnni)
  const Table* pointer = &table;
  __asm__ volatile("" : "+r"(pointer));
  return *pointer;
#else
  return table;
#endif
}

static const struct {
  float most, log2e, one, two;
  float p[6];  // 2^f on [-0.5, 0.5]: minimax, relative error 1e-7
  float quick, cubic, linear;
} sigmoid_table = {120.0f,
                   -1.44269504088896341f,
                   1.0f,
                   2.0f,
                   {1.0f, 0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647261f},
                   1.702f,
                   0.0713548162726f,
                   1.59576912161f};

// How many vectors go through a function side by side: their chains of dependent operations hide each other's latency,
// which the processor alone does only where its scheduler is larger than most. The tile of AVX-512 finishes a vector at
// a time between its products.
#if defined(QK_TIER_avx512vnni)
constexpr int kTogether = 1;
#else
constexpr int kTogether = 8;
#endif

// x -> 1 / (1 + e^-x), within 3e-7. The exponent is clamped to where 2^n and its reciprocal are normal floats; NaN
// stays NaN.
template <int N>
static inline void sigmoid(vf (&x)[N]) {
  const auto& t = at_use(sigmoid_table);
  vf n[N], f[N], p[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    const vf y = max(set1(-t.most), min(set1(t.most), mul(x[v], set1(t.log2e))));
    n[v] = round(y);
    f[v] = sub(y, n[v]);
    p[v] = set1(t.p[5]);
  }
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) p[v] = fma(p[v], f[v], set1(t.p[i]));
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    const vf d = add(as_float(add(as_int(p[v]), shift_left<23>(to_int(n[v])))), set1(t.one));
#if defined(QK_TIER_avx512vnni)
    const vf r = _mm512_rcp14_ps(d);
    x[v] = mul(r, fnma(d, r, set1(t.two)));
#else
    x[v] = div(set1(t.one), d);
#endif
  }
}

// x * sigmoid(1.702 x).
template <int N>
static inline void quick_gelu(vf (&x)[N]) {
  vf s[N];
  for (int v = 0; v < N; ++v) s[v] = mul(x[v], set1(at_use(sigmoid_table).quick));
  sigmoid(s);
  for (int v = 0; v < N; ++v) x[v] = mul(x[v], s[v]);
}

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), with tanh written as a sigmoid.
template <int N>
static inline void gelu_tanh(vf (&x)[N]) {
  const auto& t = at_use(sigmoid_table);
  vf s[N];
  for (int v = 0; v < N; ++v) s[v] = mul(x[v], fma(mul(x[v], x[v]), set1(t.cubic), set1(t.linear)));
  sigmoid(s);
  for (int v = 0; v < N; ++v) x[v] = mul(x[v], s[v]);
}

#if defined(QK_TIER_avx512vnni)
// q: coefficients of q(x) = x * (1 - Phi(x)), x >= 0, in f = x - 0.37 i about the middle of segment i; minimax; 0 from
// 5.365 on.
alignas(64) static const struct {
  float q[5][16];
  float most, width, inverse_width, magic;  // 1.5 * 2^23: adding it leaves the segment in the lowest bits
  std::int32_t magnitude;
} gelu_table = {{{0.0f, 0.131605744f, 0.169941008f, 0.148184478f, 0.102766216f, 0.0594900362f, 0.0293248277f,
                  0.0124288788f, 0.00455305586f, 0.00144598528f, 0.000398859382f, 9.5672076e-05f, 1.99710485e-05f,
                  3.62993956e-06f, 5.74703677e-07f, 0.0f},
                 {0.500000417f, 0.217855245f, 0.0051502795f, -0.105654709f, -0.12804836f, -0.101166442f, -0.0621418394f,
                  -0.0313071534f, -0.0132408608f, -0.00475861598f, -0.00146362511f, -0.000387014792f, -8.82460736e-05f,
                  -1.73885637e-05f, -2.96559051e-06f, 0.0f},
                 {-0.39896214f, -0.347041845f, -0.220323384f, -0.0827314928f, 0.0126983244f, 0.0512552522f,
                  0.0496976413f, 0.0328173228f, 0.0168808047f, 0.00708719995f, 0.00248270389f, 0.000734662812f,
                  0.000185043988f, 3.98741795e-05f, 7.37714845e-06f, 0.0f},
                 {0.000284227921f, 0.0879433751f, 0.128203914f, 0.109820269f, 0.0596494079f, 0.0132067678f,
                  -0.0113394363f, -0.0161566436f, -0.0117197158f, -0.00617045118f, -0.00256894017f, -0.000876148813f,
                  -0.00024934535f, -5.98700426e-05f, -1.22158954e-05f, 0.0f},
                 {0.0651312545f, 0.047157757f, 0.00603136327f, -0.0274902359f, -0.0360317193f, -0.0246983673f,
                  -0.00888120104f, 0.00107738737f, 0.00399096636f, 0.00319868047f, 0.00170043705f, 0.00069115049f,
                  0.000225981887f, 6.09314739e-05f, 1.37432717e-05f, 0.0f}},
                5.7f,
                0.37f,
                1.0f / 0.37f,
                12582912.0f,
                0x7fffffff};

// Exact GELU, x * Phi(x) = max(x, 0) - q(|x|), within 4e-7.
template <int N>
static inline void gelu(vf (&x)[N]) {
  const auto& t = at_use(gelu_table);
  for (int v = 0; v < N; ++v) {
    const vf a = min(as_float(bit_and(as_int(x[v]), set1(t.magnitude))), set1(t.most));
    const vf shifted = fma(a, set1(t.inverse_width), set1(t.magic));
    const vf f = fnma(sub(shifted, set1(t.magic)), set1(t.width), a);
    const vi segment = as_int(shifted);  // the permutation reads four bits
    vf q = _mm512_permutexvar_ps(segment, load(t.q[4]));
    for (int i = 3; i >= 0; --i) q = fma(q, f, _mm512_permutexvar_ps(segment, load(t.q[i])));
    x[v] = sub(max(zero(), x[v]), q);  // max keeps a NaN
  }
}
#else
// Exact GELU, x * Phi(x) = x * (1/2 + x R(x^2)), within 7e-7: R is a minimax polynomial in
// t = x^2 / 13.52 - 1 for |x| <= 5.2.
template <int N>
static inline void gelu(vf (&x)[N]) {
  static const float r[15] = {0.135949984f,   -0.0677437782f,  0.0500260033f,  -0.0399263576f,  0.0319645591f,
                              -0.0247544069f, 0.0181169398f,   -0.0123891439f, 0.00806930941f,  -0.00499978615f,
                              0.00255945767f, -0.00103881594f, 0.00068750541f, -0.00054188486f, 0.000174243905f};
  vf t[N], p[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    t[v] = fma(mul(x[v], x[v]), set1(2.0f / 27.04f), set1(-1.0f));
    p[v] = set1(r[14]);
  }
#pragma GCC unroll 14
  for (int i = 13; i >= 0; --i)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) p[v] = fma(p[v], t[v], set1(r[i]));
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    const vf y = mul(x[v], fma(x[v], p[v], set1(0.5f)));
    x[v] = select(less(set1(5.2f), abs(x[v])), max(zero(), x[v]), y);
  }
}
#endif

}  // namespace
