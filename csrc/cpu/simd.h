// The vector types and helpers a tier offers: all that differs between tiers outside of the inner loops of the matrix
// products.
//
// vf is a vector of W floats, vi of W int32, vm a mask (W = 1, 4, 8, 16). load and store take an element pointer of
// type float, bf16, f16, int32 or int8; with a count n they touch only the first n < W elements (the rest reads as 0).
// Rounding is half to even. min and max return their second argument where either is NaN, as the instructions do.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ops.h"

#if defined(QK_TIER_avx2) || defined(QK_TIER_avx512vnni)
#include <immintrin.h>
#elif defined(QK_TIER_neon)
#include <arm_neon.h>
#endif

namespace {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

// ---- scalars, the same in every tier ----

static inline std::uint32_t bits_of(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
static inline float float_of(std::uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
static inline float to_f32(float x) { return x; }
static inline float to_f32(bf16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }
static inline float to_f32(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {  // zero or subnormal: an integer times 2^-24
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return float_of(sign | bits_of(magnitude));
  }
  return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
#endif
}

template <class T>
static inline T from_f32(float x);
template <>
inline float from_f32<float>(float x) {
  return x;
}
template <>
inline bf16 from_f32<bf16>(float x) {
  const std::uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
template <>
inline f16 from_f32<f16>(float x) {
#if defined(__F16C__)
  return {static_cast<std::uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const std::uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u)
    return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                          // below 2^-14: a multiple of 2^-24
    const float shifted = float_of(magnitude) + 0.5f;     // 2^-24 is the last place of 0.5
    return {static_cast<std::uint16_t>(sign | (bits_of(shifted) - 0x3f000000u))};
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// ---- AVX-512 ----
#if defined(QK_TIER_avx512vnni)

using vf = __m512;
using vi = __m512i;
using vm = __mmask16;
constexpr int W = 16;

static inline vm first(int n) { return static_cast<vm>((1u << n) - 1); }
static inline vm lanes(int n) { return first(n); }  // the mask of the first n < W lanes

static inline vf set1(float x) { return _mm512_set1_ps(x); }
static inline vi set1(std::int32_t x) { return _mm512_set1_epi32(x); }
static inline vf load(const float* p) { return _mm512_loadu_ps(p); }
static inline vf load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
static inline vf load(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
static inline vf load(const bf16* p, int n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16));
}
static inline vf load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline vf load(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline vi load(const std::int32_t* p) { return _mm512_loadu_si512(p); }
static inline vi load(const std::int32_t* p, int n) { return _mm512_maskz_loadu_epi32(first(n), p); }
static inline vi load(const std::int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline vi load(const std::int8_t* p, int n) { return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)); }

static inline __m256i to_bf16(vf x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
static inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
static inline void store(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
static inline void store(bf16* p, vf x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x)); }
static inline void store(bf16* p, vf x, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(x)); }
static inline void store(f16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void store(f16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void store(std::int32_t* p, vi x) { _mm512_storeu_si512(p, x); }
static inline void store(std::int32_t* p, vi x, int n) { _mm512_mask_storeu_epi32(p, first(n), x); }
// int8 from int32 that is in range already.
static inline void store(std::int8_t* p, vi x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
static inline void store(std::int8_t* p, vi x, int n) { _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(x)); }

static inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
static inline vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
static inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf abs(vf a) { return _mm512_abs_ps(a); }
static inline vf round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vi add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static inline vi max(vi a, vi b) { return _mm512_max_epi32(a, b); }
static inline vi bit_and(vi a, vi b) { return _mm512_and_si512(a, b); }
template <int n>
static inline vi shift_left(vi a) {
  return _mm512_slli_epi32(a, n);
}
template <int n>
static inline vi shift_right(vi a) {  // arithmetic
  return _mm512_srai_epi32(a, n);
}
static inline vi to_int(vf a) { return _mm512_cvtps_epi32(a); }  // rounds half to even; the caller has clamped
static inline vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
static inline vi as_int(vf a) { return _mm512_castps_si512(a); }
static inline vf as_float(vi a) { return _mm512_castsi512_ps(a); }
static inline vm less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline vm less_equal(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
static inline vm less(vi a, vi b) { return _mm512_cmplt_epi32_mask(a, b); }
static inline vf select(vm m, vf yes, vf no) { return _mm512_mask_mov_ps(no, m, yes); }
static inline vi select(vm m, vi yes, vi no) { return _mm512_mask_mov_epi32(no, m, yes); }
static inline float reduce_add(vf a) { return _mm512_reduce_add_ps(a); }
static inline float reduce_max(vf a) { return _mm512_reduce_max_ps(a); }
static inline std::int32_t reduce_max(vi a) { return _mm512_reduce_max_epi32(a); }

// ---- AVX2 ----
#elif defined(QK_TIER_avx2)

using vf = __m256;
using vi = __m256i;
using vm = __m256;
constexpr int W = 8;

static inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vm lanes(int n) { return _mm256_castsi256_ps(first(n)); }
template <class T>
static inline void copy_in(T* buffer, const T* p, int n) {
  for (int i = 0; i < 8; ++i) buffer[i] = i < n ? p[i] : T{};
}
template <class T>
static inline void copy_out(T* p, const T* buffer, int n) {
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

static inline vf set1(float x) { return _mm256_set1_ps(x); }
static inline vi set1(std::int32_t x) { return _mm256_set1_epi32(x); }
static inline vf load(const float* p) { return _mm256_loadu_ps(p); }
static inline vf load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
static inline vf load(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
static inline vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline vi load(const std::int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline vi load(const std::int32_t* p, int n) { return _mm256_maskload_epi32(p, first(n)); }
static inline vi load(const std::int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
template <class T>
static inline auto load(const T* p, int n) {
  T buffer[8];
  copy_in(buffer, p, n);
  return load(buffer);
}

static inline __m128i to_bf16(vf x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
static inline void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
static inline void store(float* p, vf x, int n) { _mm256_maskstore_ps(p, first(n), x); }
static inline void store(bf16* p, vf x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(x)); }
static inline void store(f16* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void store(std::int32_t* p, vi x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
static inline void store(std::int32_t* p, vi x, int n) { _mm256_maskstore_epi32(p, first(n), x); }
// int8 from int32 that is in range already.
static inline void store(std::int8_t* p, vi x) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
template <class T, class V>
static inline void store(T* p, V x, int n) {
  T buffer[8];
  store(buffer, x);
  copy_out(p, buffer, n);
}

static inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
static inline vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline vf round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vi add(vi a, vi b) { return _mm256_add_epi32(a, b); }
static inline vi sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
static inline vi max(vi a, vi b) { return _mm256_max_epi32(a, b); }
static inline vi bit_and(vi a, vi b) { return _mm256_and_si256(a, b); }
template <int n>
static inline vi shift_left(vi a) {
  return _mm256_slli_epi32(a, n);
}
template <int n>
static inline vi shift_right(vi a) {
  return _mm256_srai_epi32(a, n);
}
static inline vi to_int(vf a) { return _mm256_cvtps_epi32(a); }
static inline vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
static inline vi as_int(vf a) { return _mm256_castps_si256(a); }
static inline vf as_float(vi a) { return _mm256_castsi256_ps(a); }
static inline vm less(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline vm less_equal(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
static inline vm less(vi a, vi b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a)); }
static inline vf select(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
static inline vi select(vm m, vi yes, vi no) {
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(no), _mm256_castsi256_ps(yes), m));
}
static inline float reduce_add(vf a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline float reduce_max(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline std::int32_t reduce_max(vi a) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}

#if defined(QK_TIER_avxvnni)
// sum += four products of unsigned a and signed b in each lane. In assembly: as an intrinsic, compilers copy sums.
static inline void dot(vi& sum, vi a, vi b) { __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); }
#endif

// ---- NEON ----
#elif defined(QK_TIER_neon)
}  // namespace
#include "simd_neon.h"
namespace {

// ---- scalar ----
#else

using vf = float;
using vi = std::int32_t;
using vm = bool;
constexpr int W = 1;

static inline vm lanes(int) { return false; }
static inline vf set1(float x) { return x; }
static inline vi set1(std::int32_t x) { return x; }
template <class T>
static inline vf load(const T* p) {
  return to_f32(*p);
}
template <class T>
static inline vf load(const T*, int) {
  return 0.0f;  // fewer than one element
}
static inline vi load(const std::int32_t* p) { return *p; }
static inline vi load(const std::int32_t*, int) { return 0; }
static inline vi load(const std::int8_t* p) { return *p; }
static inline vi load(const std::int8_t*, int) { return 0; }
template <class T>
static inline void store(T* p, vf x) {
  *p = from_f32<T>(x);
}
static inline void store(std::int32_t* p, vi x) { *p = x; }
static inline void store(std::int8_t* p, vi x) { *p = static_cast<std::int8_t>(x); }
template <class T, class V>
static inline void store(T*, V, int) {}

static inline vf add(vf a, vf b) { return a + b; }
static inline vf sub(vf a, vf b) { return a - b; }
static inline vf mul(vf a, vf b) { return a * b; }
static inline vf div(vf a, vf b) { return a / b; }
static inline vf fma(vf a, vf b, vf c) { return __builtin_fmaf(a, b, c); }
static inline vf fnma(vf a, vf b, vf c) { return __builtin_fmaf(-a, b, c); }
static inline vf min(vf a, vf b) { return a < b ? a : b; }
static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline vf abs(vf a) { return __builtin_fabsf(a); }
static inline vf round(vf a) { return __builtin_rintf(a); }
static inline vi wrap(std::uint32_t a) { return static_cast<vi>(a); }
static inline vi add(vi a, vi b) { return wrap(static_cast<std::uint32_t>(a) + static_cast<std::uint32_t>(b)); }
static inline vi sub(vi a, vi b) { return wrap(static_cast<std::uint32_t>(a) - static_cast<std::uint32_t>(b)); }
static inline vi max(vi a, vi b) { return a > b ? a : b; }
static inline vi bit_and(vi a, vi b) { return a & b; }
template <int n>
static inline vi shift_left(vi a) {
  return static_cast<vi>(static_cast<std::uint32_t>(a) << n);
}
template <int n>
static inline vi shift_right(vi a) {
  return a >> n;
}
static inline vi to_int(vf a) {  // out of range and NaN as the vector instructions do
  return a >= -2147483648.0f && a < 2147483648.0f ? static_cast<vi>(__builtin_rintf(a)) : INT32_MIN;
}
static inline vf to_float(vi a) { return static_cast<vf>(a); }
static inline vi as_int(vf a) { return static_cast<vi>(bits_of(a)); }
static inline vf as_float(vi a) { return float_of(static_cast<std::uint32_t>(a)); }
static inline vm less(vf a, vf b) { return a < b; }
static inline vm less_equal(vf a, vf b) { return a <= b; }
static inline vm less(vi a, vi b) { return a < b; }
static inline vf select(vm m, vf yes, vf no) { return m ? yes : no; }
static inline vi select(vm m, vi yes, vi no) { return m ? yes : no; }
static inline float reduce_add(vf a) { return a; }
static inline float reduce_max(vf a) { return a; }
static inline std::int32_t reduce_max(vi a) { return a; }

#endif

static inline vf zero() { return set1(0.0f); }
// Lanes that are not NaN and not Inf (compared on the bits, so that nothing is dropped by min or max).
static inline vm finite(vf x) {
#if defined(QK_TIER_avx512vnni)
  return _mm512_knot(_mm512_fpclass_ps_mask(x, 0x99));  // quiet and signalling NaN, both infinities
#else
  return less(bit_and(as_int(x), set1(0x7fffffff)), set1(0x7f800000));
#endif
}

}  // namespace
