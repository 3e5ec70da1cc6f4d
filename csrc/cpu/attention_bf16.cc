// attention with products of bfloat16 pairs (AVX512-BF16), for bfloat16 input: probabilities are rounded to bfloat16,
// and their sums are those of the rounded ones. Compiled with that instruction set (setup.py), called where cpuid
// names it.
#include "simd.h"

#if defined(QK_TIER_avx512vnni)
#include "attention.h"

namespace {

// Two bfloat16 a unit, the first in the low half.
struct Pairs {
  static constexpr int per_unit = 2;
  // In assembly: compilers copy the accumulators of the intrinsic.
  static inline vf dot(vf a, vf b, vf sum) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  static inline vf read(const bf16* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  static inline vf read(const bf16* p, int count) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << count) - 1, p));
  }
  // Two rows as floats of which only the upper halves count.
  static inline vf join(vf even, vf odd) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(odd)));
  }
  static inline vf negate(vf x) {
    return as_float(_mm512_xor_si512(as_int(x), _mm512_set1_epi32(static_cast<std::int32_t>(0x80008000u))));
  }
  static inline vf round(vf first, vf second) { return as_float((__m512i)_mm512_cvtne2ps_pbh(second, first)); }
  static inline vf ones() { return as_float(_mm512_set1_epi32(0x3f803f80)); }
};

}  // namespace

extern "C" void qk_attend_bf16(const QkAttention& all) { attend<Pairs, bf16>(all); }
#endif
