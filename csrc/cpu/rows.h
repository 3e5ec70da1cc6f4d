// One row of floats -> int8 codes and its scale: shared by the ops that quantize.
// Maxima are taken on the bit patterns, so that NaN and Inf win instead of being dropped by the instructions.
#pragma once

#include "simd.h"

namespace {

constexpr std::int32_t inf_bits = 0x7f800000;
constexpr float tiny = 7.888609052210118e-31f;  // 2^-100: a row below it counts as a row of zeros

// x, kept in a register: compilers would load it from memory again for every use, and loads are what these loops wait
// for.
template <class V>
static inline V held(V x) {
#if defined(QK_TIER_avx512vnni)
  __asm__("" : "+v"(x));
#elif defined(QK_TIER_avx2)
  __asm__("" : "+x"(x));
#elif defined(QK_TIER_neon)
  __asm__("" : "+w"(x));
#endif
  return x;
}

static inline vi all_but_sign() { return held(set1(0x7fffffff)); }

// Four vectors of int32 in the range of int8 -> 4 * W codes, their bits turned by `flip`.
static inline void store_codes(std::int8_t* p, vi a, vi b, vi c, vi d, vi flip) {
#if defined(QK_TIER_avx512vnni)
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  _mm512_storeu_si512(p, _mm512_xor_si512(_mm512_permutexvar_epi32(order, bytes), flip));
#elif defined(QK_TIER_avx2)
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_xor_si256(_mm256_permutevar8x32_epi32(bytes, order), flip));
#elif defined(QK_TIER_neon)
  const int16x8_t low = vcombine_s16(vmovn_s32(a), vmovn_s32(b)), high = vcombine_s16(vmovn_s32(c), vmovn_s32(d));
  vst1q_s8(p, veorq_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high)), vreinterpretq_s8_s32(flip)));
#else
  store(p, a ^ flip);
  store(p + 1, b ^ flip);
  store(p + 2, c ^ flip);
  store(p + 3, d ^ flip);
#endif
}

// Codes -> codes + 128 as unsigned bytes, in place: what `shifted` means everywhere.
static inline void shift_bytes(std::int8_t* codes, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) codes[i] = static_cast<std::int8_t>(codes[i] ^ -128);
}

// How a row becomes codes. Static: inverse and zero come from the caller, the same for all rows.
struct Rule {
  bool is_static, shifted;
  float scale, inverse, zero;
};

static inline Rule make_rule(const float* scale, const float* zero_point, int shift) {
  Rule rule{scale != nullptr, shift != 0, 0.0f, 0.0f, zero_point == nullptr ? 0.0f : *zero_point};
  if (scale != nullptr) {
    rule.scale = *scale;
    rule.inverse = 1.0f / *scale;
    // A scale without a positive finite reciprocal makes every row NaN.
    if (!(rule.inverse > 0.0f) || bits_of(rule.inverse) >= static_cast<std::uint32_t>(inf_bits))
      rule.scale = rule.inverse = __builtin_nanf("");
  }
  return rule;
}

// Codes of a row whose values get(i) and get(i, n) return, the largest magnitude among them having the bits `top`;
// get.ahead(i) comes before each 4 * W of them. Returns the scale.
template <class Get>
static inline float write_codes(const Rule& rule, std::int32_t top, std::int64_t k, std::int8_t* codes,
                                const Get& get) {
  float scale = rule.scale, inverse = rule.inverse;
  const float absmax = float_of(static_cast<std::uint32_t>(top));
  const bool bad = top >= inf_bits || (rule.is_static && inverse != inverse);
  const bool nothing = !rule.is_static && absmax < tiny;
  if (bad || nothing) {
    std::memset(codes, rule.shifted ? 128 : 0, static_cast<std::size_t>(k));
    return bad ? __builtin_nanf("") : 1.0f;
  }
  const vi flip = set1(static_cast<std::int32_t>(rule.shifted ? 0x80808080u : 0u));
  const auto write = [&](const auto& code) {
    std::int64_t i = 0;
    for (; i + 4 * W <= k; i += 4 * W) {
      get.ahead(i);
      store_codes(codes + i, code(get(i)), code(get(i + W)), code(get(i + 2 * W)), code(get(i + 3 * W)), flip);
    }
    const std::int64_t rest = i;
    for (; i + W <= k; i += W) store(codes + i, code(get(i)));
    if (i < k) store(codes + i, code(get(i, static_cast<int>(k - i))), static_cast<int>(k - i));
    if (rule.shifted) shift_bytes(codes + rest, k - rest);
  };
  if (!rule.is_static) {
    scale = absmax / 127.0f;
    inverse = 127.0f / absmax;
    const vf factor = set1(inverse);
    write([&](vf y) { return to_int(mul(y, factor)); });  // |y * inverse| rounds to 127 at most
    return scale;
  }
  const vf factor = set1(inverse), zero = set1(rule.zero), low = set1(-127.0f), high = set1(127.0f);
  if (rule.zero == 0.0f) {  // the bounds are whole numbers: clamping first gives the same codes
    write([&](vf y) { return to_int(min(max(mul(y, factor), low), high)); });
    return scale;
  }
  write([&](vf y) { return to_int(min(max(add(round(mul(y, factor)), zero), low), high)); });
  return scale;
}

// The row x, times smooth where there is one, as float vectors.
template <class T, bool Smooth>
struct Row {
  const T* x;
  const float* smooth;
  inline vf operator()(std::int64_t i) const { return Smooth ? mul(load(x + i), load(smooth + i)) : load(x + i); }
  inline vf operator()(std::int64_t i, int n) const {
    return Smooth ? mul(load(x + i, n), load(smooth + i, n)) : load(x + i, n);
  }
  inline void ahead(std::int64_t) const {}
};

// Values of `get`, and meanwhile a fetch of `next`, a row of T that is read soon, once for every cache line.
template <class T, class Get>
struct Fetching {
  Get get;
  const T* next;
  inline vf operator()(std::int64_t i) const { return get(i); }
  inline vf operator()(std::int64_t i, int n) const { return get(i, n); }
  inline void ahead(std::int64_t i) const {
    constexpr int line = 64 / sizeof(T);
    for (int j = 0; j < 4 * W; j += line) __builtin_prefetch(next + i + j);
  }
};

template <class Get>
static inline std::int32_t top_of(std::int64_t k, const Get& get) {
  const vi mask = all_but_sign();
  const auto magnitude = [&](vf x) { return bit_and(as_int(x), mask); };
  vi a = set1(std::int32_t{0}), b = a, c = a, d = a;
  std::int64_t i = 0;
  for (; i + 4 * W <= k; i += 4 * W) {
    a = max(a, magnitude(get(i)));
    b = max(b, magnitude(get(i + W)));
    c = max(c, magnitude(get(i + 2 * W)));
    d = max(d, magnitude(get(i + 3 * W)));
  }
  for (; i + W <= k; i += W) a = max(a, magnitude(get(i)));
  if (i < k) b = max(b, magnitude(get(i, static_cast<int>(k - i))));
  return reduce_max(max(max(a, b), max(c, d)));
}

// Rows for one thread at least, so that starting it pays.
static inline std::int64_t row_grain(std::int64_t k) { return k >= 16384 ? 1 : 16384 / k; }

}  // namespace
