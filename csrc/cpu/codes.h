// Rows of int8 codes, copied for products with unsigned weights: x is the signed operand, and what the weights' offset
// adds is taken off by sums of x.
#pragma once

#include "blocking.h"

namespace {

struct Codes {
  const std::int8_t* a;  // rows of x, padded to whole steps
  std::int64_t stride;
  const std::int32_t* sums;    // [rows, chunks]: sum of x over a chunk
  std::int64_t chunk, chunks;  // a chunk lies in one group of the weight and, with grouped x_scale, in one group of x
  const float* group_scale;    // x_scale [M, ceil(K / 128)], or nullptr
};

// A row of x, padded with zeros, and its sum over each chunk. `flip` is 128 where x holds code + 128, else 0.
#if defined(QK_TIER_avx512vnni)

static inline void dot(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

static void copy_codes(const std::uint8_t* x, std::uint8_t flip, std::int64_t k, std::int64_t chunk, std::int8_t* to,
                       std::int64_t padded, std::int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1), turned = _mm512_set1_epi8(static_cast<char>(flip));
  for (std::int64_t begin = 0; begin < k; begin += chunk) {
    const std::int64_t end = begin + chunk < k ? begin + chunk : k;
    __m512i sum = _mm512_setzero_si512();
    for (std::int64_t i = begin; i < end; i += 64) {
      const __mmask64 there = end - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (end - i)) - 1;
      const __m512i codes =
          _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, x + i), _mm512_maskz_mov_epi8(there, turned));
      _mm512_mask_storeu_epi8(to + i, there, codes);
      dot(sum, ones, codes);
    }
    sums[begin / chunk] = _mm512_reduce_add_epi32(sum);
  }
  std::memset(to + k, 0, static_cast<std::size_t>(padded - k));
}
#elif defined(QK_TIER_avx2)
static void copy_codes(const std::uint8_t* x, std::uint8_t flip, std::int64_t k, std::int64_t chunk, std::int8_t* to,
                       std::int64_t padded, std::int32_t* sums) {
  const vi turned = _mm256_set1_epi8(static_cast<char>(flip)), shift = _mm256_set1_epi8(-128), zeros = set1(0);
  std::int64_t i = 0;
  for (std::int64_t begin = 0; begin < k; begin += chunk) {
    const std::int64_t end = begin + chunk < k ? begin + chunk : k, first = i;
    vi sum = zeros;  // of codes + 128
    for (; i + 32 <= end; i += 32) {
      const vi codes = _mm256_xor_si256(load(reinterpret_cast<const std::int32_t*>(x + i)), turned);
      store(reinterpret_cast<std::int32_t*>(to + i), codes);
      sum = _mm256_add_epi64(sum, _mm256_sad_epu8(_mm256_xor_si256(codes, shift), zeros));
    }
    const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    std::int32_t total = _mm_cvtsi128_si32(_mm_add_epi64(half, _mm_unpackhi_epi64(half, half))) -
                         128 * static_cast<std::int32_t>(i - first);
    for (; i < end; ++i) total += to[i] = static_cast<std::int8_t>(x[i] ^ flip);
    sums[begin / chunk] = total;
  }
  std::memset(to + k, 0, static_cast<std::size_t>(padded - k));
}
#else
static void copy_codes(const std::uint8_t* x, std::uint8_t flip, std::int64_t k, std::int64_t chunk, std::int8_t* to,
                       std::int64_t padded, std::int32_t* sums) {
  for (std::int64_t i = 0; i < k; ++i) to[i] = static_cast<std::int8_t>(x[i] ^ flip);
  for (std::int64_t i = k; i < padded; ++i) to[i] = 0;
  for (std::int64_t c = 0; c * chunk < k; ++c) {
    const std::int64_t end = (c + 1) * chunk < k ? (c + 1) * chunk : k;
    std::int32_t sum = 0;
    for (std::int64_t i = c * chunk; i < end; ++i) sum += to[i];
    sums[c] = sum;
  }
}
#endif

}  // namespace
