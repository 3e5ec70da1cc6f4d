// What the linear maps do after their sums: scale, bias, activation, residual, and the result as float32, bfloat16,
// float16 or int8. It works on registers alone: a quad of lanes has 128 columns of a row between them, and exchanges
// words so that each lane stores 16 bytes that lie together.
//
// y = activation(fma(float(sum), x_scale * w_scale, bias)) + residual. Compiled for a CPU too (tests/kernels/cuda).
#pragma once

#include "gemm_maps.h"
#include "types.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define QK_DEVICE __device__ __forceinline__
#define QK_UNROLL _Pragma("unroll")
#define QK_ROLLED _Pragma("unroll 1")
#else
#include <bit>
#include <cmath>
#define QK_DEVICE inline
#define QK_UNROLL
#define QK_ROLLED
#endif

namespace qk {

struct Epilogue {
  int m, n;
  const float* x_scale;  // one number, or one per row; not read where sums come scaled (groups of inputs)
  int x_scale_kind;      // 0: one number, 1: one per row, 2: one for each 128 inputs of a row
  const float* w_scale;  // [n]
  const float* bias;     // [n] or null
  int activation;
  const void* residual;  // [m, n] of residual_type, or null
  int residual_type;
  void* out;  // [m, n] of out_type
  int out_type;
  const float* out_scale;  // int8 by the static rule: one number, or [n]
  int out_scale_per_channel;
  const float* out_zero_point;  // one number or null
  float* group_scales;          // [m, ceil(n / 128)]: int8 by the dynamic rule for each 128 columns
  bool wide;                    // rows begin at multiples of 16 bytes, of what is read in pairs and what is written
};

// -- arithmetic of one value -----------------------------------------------------------------------------------------

#ifdef __CUDACC__
QK_DEVICE std::uint32_t bits_of(float x) { return __float_as_uint(x); }
QK_DEVICE float float_of(std::uint32_t x) { return __uint_as_float(x); }
QK_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
QK_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
QK_DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }
QK_DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
// A step of Newton's after the hardware's estimate: rounded correctly for all but a few x, and without the call that
// __frcp_rn makes for subnormal numbers, around which registers would spill.
QK_DEVICE float reciprocal(float x) {
  float estimate;
  asm("rcp.approx.f32 %0, %1;" : "=f"(estimate) : "f"(x));
  const float better = __fmaf_rn(estimate, __fmaf_rn(-x, estimate, 1.0f), estimate);
  return fabsf(better) < __uint_as_float(0x7F800000) ? better : estimate;
}
QK_DEVICE float over_one_plus_exp(float x, float u) { return __fdividef(x, 1.0f + __expf(u)); }
QK_DEVICE float erf_of(float x) { return erff(x); }
QK_DEVICE std::uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
QK_DEVICE std::uint32_t pack_fp16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
QK_DEVICE float from_fp16(std::uint16_t x) { return __half2float(__ushort_as_half(x)); }
#else
inline std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }
inline float float_of(std::uint32_t x) { return std::bit_cast<float>(x); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float product(float a, float b) { return a * b; }
inline float sum(float a, float b) { return a + b; }
inline float quotient(float a, float b) { return a / b; }
inline float reciprocal(float x) { return 1.0f / x; }
inline float over_one_plus_exp(float x, float u) { return x / (1.0f + std::exp(u)); }
inline float erf_of(float x) { return std::erf(x); }
inline std::uint32_t bf16_of(float x) {
  const std::uint32_t u = bits_of(x);
  return (x != x ? 0x7FFFu : (u + 0x7FFF + (u >> 16 & 1)) >> 16) & 0xFFFF;
}
inline std::uint32_t pack_bf16(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
inline std::uint32_t pack_fp16(float low, float high) {
  return std::bit_cast<std::uint16_t>(static_cast<_Float16>(low)) |
         std::uint32_t{std::bit_cast<std::uint16_t>(static_cast<_Float16>(high))} << 16;
}
inline float from_fp16(std::uint16_t x) { return std::bit_cast<_Float16>(x); }
inline float fminf(float a, float b) { return std::fmin(a, b); }
inline float fmaxf(float a, float b) { return std::fmax(a, b); }
inline float fabsf(float x) { return std::fabs(x); }
#endif

QK_DEVICE bool is_finite(float x) { return fabsf(x) < float_of(0x7F800000); }

constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds |x| < 2^22 half to even into the low bits

// The code of `scaled` = y / scale in the low byte: rounded half to even, moved by the zero point (below 2^20), clamped
// to -127..127.
QK_DEVICE std::uint32_t code_of(float scaled, float zero) {
  const float bounded = fminf(fmaxf(scaled, -2097152.0f), 2097152.0f);
  const float rounded = sum(sum(sum(bounded, to_integer), -to_integer), zero);
  return bits_of(sum(fminf(fmaxf(rounded, -127.0f), 127.0f), to_integer)) & 0xFF;
}

template <int N>
QK_DEVICE void activate(float (&y)[N], int activation) {
  if (activation == quick_gelu) {  // x sigmoid(1.702 x)
    QK_UNROLL for (int i = 0; i < N; ++i) y[i] = over_one_plus_exp(y[i], -1.702f * y[i]);
  } else if (activation == gelu_tanh) {  // 0.5 x (1 + tanh u) = x sigmoid(2u): accurate where tanh u is near -1
    QK_UNROLL for (int i = 0; i < N; ++i) {
      const float u = y[i] * multiply_add(0.044715f * y[i], y[i], 1.0f);
      y[i] = over_one_plus_exp(y[i], -1.5957691216057308f * u);
    }
  } else if (activation == gelu) {
    QK_UNROLL for (int i = 0; i < N; ++i) y[i] = 0.5f * y[i] * (1.0f + erf_of(0.70710678118654752f * y[i]));
  }
}

// -- a quad's exchange -----------------------------------------------------------------------------------------------

// Transposes the 4 x 4 words of a quad: lane t's word i becomes word t of lane i. `quad(word, mask)` gives the word
// that lane (t ^ mask) passed.
template <class Quad>
QK_DEVICE void transpose(std::uint32_t (&w)[4], int t, Quad& quad) {
  QK_UNROLL for (int mask = 1; mask <= 2; mask *= 2) {
    QK_UNROLL for (int i = 0; i < 4; ++i) {
      if (i & mask) continue;
      const bool upper = t & mask;
      const std::uint32_t got = quad(upper ? w[i] : w[i | mask], mask);
      if (upper)
        w[i] = got;
      else
        w[i | mask] = got;
    }
  }
}

struct alignas(16) Words {
  std::uint32_t w[4];
};
struct alignas(8) Pair {
  float low, high;
};

// What two lanes' worth of columns need, all WIDE (rows begin at multiples of 16 bytes, so two columns are one access
// and 16 bytes another) or one by one. Columns from `count` on read as 0.
template <bool WIDE>
QK_DEVICE Pair pair_at(const float* values, int index, int count) {
  if (WIDE) return index < count ? *reinterpret_cast<const Pair*>(values + index) : Pair{0.0f, 0.0f};
  return {index < count ? values[index] : 0.0f, index + 1 < count ? values[index + 1] : 0.0f};
}
template <bool WIDE>
QK_DEVICE std::uint32_t halves_at(const std::uint16_t* values, int index, int count) {
  if (WIDE) return index < count ? *reinterpret_cast<const std::uint32_t*>(values + index) : 0;
  return (index < count ? values[index] : 0u) | (index + 1 < count ? std::uint32_t{values[index + 1]} << 16 : 0u);
}

// -- one row and 128 columns -----------------------------------------------------------------------------------------

// One row's part of a quad: `at(j)` is the first of this lane's two columns number j.
struct Part {
  int row, column, t;
  bool inside;  // the row is one of the result
  QK_DEVICE int at(int j) const { return column + 8 * j + 2 * t; }
  QK_DEVICE std::int64_t line(const Epilogue& e) const { return std::int64_t{row} * e.n; }
};

template <bool WIDE>
QK_DEVICE void scale_and_bias(const Epilogue& e, const Part& part, float row_scale, float (&y)[32]) {
  // Four pairs of columns a time: loads are in flight together, but do not need all of the registers.
  QK_UNROLL for (int b = 0; b < 16; b += 4) {
    Pair scale[4], bias[4] = {};
    QK_UNROLL for (int j = 0; j < 4; ++j) scale[j] = pair_at<WIDE>(e.w_scale, part.at(b + j), e.n);
    if (e.bias != nullptr) {
      QK_UNROLL for (int j = 0; j < 4; ++j) bias[j] = pair_at<WIDE>(e.bias, part.at(b + j), e.n);
    }
    QK_UNROLL for (int j = 0; j < 4; ++j) {
      float &low = y[2 * (b + j)], &high = y[2 * (b + j) + 1];
      low = multiply_add(low, product(row_scale, scale[j].low), bias[j].low);
      high = multiply_add(high, product(row_scale, scale[j].high), bias[j].high);
    }
  }
}

// From residuals of 16 bits; `low` and `high` read them from a word.
template <bool WIDE, class Low, class High>
QK_DEVICE void add_halves(const Epilogue& e, const Part& part, int end, float (&y)[32], Low low, High high) {
  const std::uint16_t* line = static_cast<const std::uint16_t*>(e.residual) + part.line(e);
  QK_UNROLL for (int j = 0; j < 16; ++j) {
    const std::uint32_t more = halves_at<WIDE>(line, part.at(j), end);
    y[2 * j] = sum(y[2 * j], low(more));
    y[2 * j + 1] = sum(y[2 * j + 1], high(more));
  }
}

template <bool WIDE>
QK_DEVICE void add_residual(const Epilogue& e, const Part& part, float (&y)[32]) {
  const int end = part.inside ? e.n : 0;
  if (e.residual_type == bfloat16) {
    add_halves<WIDE>(
        e, part, end, y, [](std::uint32_t w) { return float_of(w << 16); },
        [](std::uint32_t w) { return float_of(w & 0xFFFF0000); });
  } else if (e.residual_type == float16) {
    add_halves<WIDE>(
        e, part, end, y, [](std::uint32_t w) { return from_fp16(static_cast<std::uint16_t>(w)); },
        [](std::uint32_t w) { return from_fp16(static_cast<std::uint16_t>(w >> 16)); });
  } else {
    const float* line = static_cast<const float*>(e.residual) + part.line(e);
    QK_UNROLL for (int j = 0; j < 16; ++j) {
      const Pair more = pair_at<WIDE>(line, part.at(j), end);
      y[2 * j] = sum(y[2 * j], more.low);
      y[2 * j + 1] = sum(y[2 * j + 1], more.high);
    }
  }
}

template <bool WIDE>
QK_DEVICE void store_floats(const Epilogue& e, const Part& part, const float (&y)[32]) {
  float* line = static_cast<float*>(e.out) + part.line(e);
  QK_UNROLL for (int j = 0; j < 16; ++j) {
    const int at = part.at(j);
    if (WIDE) {
      if (part.inside && at < e.n) *reinterpret_cast<Pair*>(line + at) = {y[2 * j], y[2 * j + 1]};
    } else {
      if (part.inside && at < e.n) line[at] = y[2 * j];
      if (part.inside && at + 1 < e.n) line[at + 1] = y[2 * j + 1];
    }
  }
}

// The results one by one: T of 16 or 8 bits, two in the low bits of each word.
template <class T>
QK_DEVICE void store_single(const Epilogue& e, const Part& part, const std::uint32_t (&words)[16]) {
  T* line = static_cast<T*>(e.out) + part.line(e);
  QK_UNROLL for (int j = 0; j < 16; ++j) {
    const int at = part.at(j);
    if (part.inside && at < e.n) line[at] = static_cast<T>(words[j]);
    if (part.inside && at + 1 < e.n) line[at + 1] = static_cast<T>(words[j] >> 8 * sizeof(T));
  }
}

template <bool WIDE, class Quad>
QK_DEVICE void store_halves(const Epilogue& e, const Part& part, const std::uint32_t (&words)[16], Quad& quad) {
  if (!WIDE) return store_single<std::uint16_t>(e, part, words);
  std::uint16_t* line = static_cast<std::uint16_t*>(e.out) + part.line(e);
  QK_UNROLL for (int b = 0; b < 4; ++b) {
    Words chunk{{words[4 * b], words[4 * b + 1], words[4 * b + 2], words[4 * b + 3]}};
    transpose(chunk.w, part.t, quad);
    const int at = part.column + 8 * (4 * b + part.t);
    if (part.inside && at < e.n) *reinterpret_cast<Words*>(line + at) = chunk;
  }
}

template <bool WIDE, class Quad>
QK_DEVICE void store_codes(const Epilogue& e, const Part& part, const std::uint32_t (&codes)[16], Quad& quad) {
  if (!WIDE) return store_single<std::uint8_t>(e, part, codes);
  std::uint8_t* line = static_cast<std::uint8_t*>(e.out) + part.line(e);
  QK_UNROLL for (int b = 0; b < 2; ++b) {
    std::uint32_t w[4];
    QK_UNROLL for (int i = 0; i < 4; ++i) w[i] = codes[8 * b + 2 * i] | codes[8 * b + 2 * i + 1] << 16;
    transpose(w, part.t, quad);
    // Word s now holds lane s's codes of columns 0-7 of 16 in its low half and of columns 8-15 in its high half.
    const Words chunk{{(w[0] & 0xFFFF) | w[1] << 16, (w[2] & 0xFFFF) | w[3] << 16, w[0] >> 16 | (w[1] & 0xFFFF0000),
                       w[2] >> 16 | (w[3] & 0xFFFF0000)}};
    const int at = part.column + 16 * (4 * b + part.t);
    if (part.inside && at < e.n) *reinterpret_cast<Words*>(line + at) = chunk;
  }
}

// The dynamic rule over the 128 columns.
template <class Quad>
QK_DEVICE void codes_of_group(const Epilogue& e, const Part& part, const float (&y)[32], std::uint32_t (&codes)[16],
                              Quad& quad) {
  // As bits, magnitudes order like integers, Inf above all numbers and NaN above Inf.
  std::uint32_t largest = 0;
  QK_UNROLL for (int i = 0; i < 32; ++i) {
    const std::uint32_t size = bits_of(y[i]) & 0x7FFFFFFF;
    largest = size > largest ? size : largest;
  }
  QK_UNROLL for (int mask = 1; mask <= 2; mask *= 2) {
    const std::uint32_t other = quad(largest, mask);
    largest = other > largest ? other : largest;
  }
  const float absmax = float_of(largest);
  const bool good = is_finite(absmax), small = absmax < 7.888609052210118e-31f;  // 2^-100
  const float inverse = good && !small ? quotient(127.0f, absmax) : 0.0f;
  if (part.t == 0 && part.inside)
    e.group_scales[part.row * ceil_div(e.n, 128) + part.column / 128] = !good   ? float_of(0x7FC00000)
                                                                        : small ? 1.0f
                                                                                : quotient(absmax, 127.0f);
  QK_UNROLL for (int j = 0; j < 16; ++j) {
    const std::uint32_t low = code_of(product(y[2 * j], inverse), 0.0f);
    const std::uint32_t high = code_of(product(y[2 * j + 1], inverse), 0.0f);
    codes[j] = good ? low | high << 8 : 0;
  }
}

// The static rule; what is not finite becomes 0.
template <bool WIDE>
QK_DEVICE void codes_by_scale(const Epilogue& e, const Part& part, const float (&y)[32], std::uint32_t (&codes)[16]) {
  const float zero = e.out_zero_point == nullptr ? 0.0f : *e.out_zero_point;
  const auto code = [&](float value, float inverse) {
    const float scaled = product(value, inverse);
    return is_finite(value) && scaled == scaled ? code_of(scaled, zero) : 0u;
  };
  if (e.out_scale_per_channel) {
    QK_UNROLL for (int j = 0; j < 16; ++j) {
      const Pair scale = pair_at<WIDE>(e.out_scale, part.at(j), e.n);
      codes[j] = code(y[2 * j], reciprocal(scale.low)) | code(y[2 * j + 1], reciprocal(scale.high)) << 8;
    }
  } else {
    const float inverse = reciprocal(*e.out_scale);
    QK_UNROLL for (int j = 0; j < 16; ++j) codes[j] = code(y[2 * j], inverse) | code(y[2 * j + 1], inverse) << 8;
  }
}

// Finishes the sums y[2j + e] of columns at(j) + e of a row. All lanes of a warp come here together; rows from m and
// columns from n on are computed as zeros and not stored.
template <bool WIDE, class Quad>
QK_DEVICE void finish(const Epilogue& e, const Part& part, float row_scale, float (&y)[32], Quad& quad) {
  scale_and_bias<WIDE>(e, part, row_scale, y);
  activate(y, e.activation);
  if (e.residual != nullptr) add_residual<WIDE>(e, part, y);
  if (e.out_type == float32) return store_floats<WIDE>(e, part, y);
  std::uint32_t words[16];
  if (e.out_type == int8) {
    if (e.group_scales != nullptr)
      codes_of_group(e, part, y, words, quad);
    else
      codes_by_scale<WIDE>(e, part, y, words);
    return store_codes<WIDE>(e, part, words, quad);
  }
  if (e.out_type == bfloat16) {
    QK_UNROLL for (int j = 0; j < 16; ++j) words[j] = pack_bf16(y[2 * j], y[2 * j + 1]);
  } else {
    QK_UNROLL for (int j = 0; j < 16; ++j) words[j] = pack_fp16(y[2 * j], y[2 * j + 1]);
  }
  store_halves<WIDE>(e, part, words, quad);
}

struct Lane {
  int row, t;  // the first row that the thread has, and its place in the quad
};

#ifdef __CUDACC__
// This thread's number, read anew wherever it stands. What is computed from threadIdx.x the compiler likes to compute
// before a loop, and then to keep in registers that the accumulators need.
__device__ __forceinline__ int thread_number() {
  int number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return number;
}
#endif

// Finishes all accumulators of a thread, which `lane()` places in a tile that begins at `column`. The body is there
// once: accumulators move down to where it reads, because registers cannot be indexed. (One move a value; unrolled, the
// code would be four times as long as the instruction cache likes.)
template <int NI, int ROWS, int COUNT, class T, class Where, class Quad>
QK_DEVICE void finish_all(const Epilogue& e, int column, Where lane, T (&sums)[COUNT], Quad& quad) {
  QK_ROLLED for (int part = 0; part < COUNT / 32; ++part) {
    const Place at = part_at<NI, ROWS>(part);
    const Lane mine = lane();
    const int here = mine.row + at.row;
    float row_scale = 1.0f;
    if (e.x_scale_kind == 0) row_scale = *e.x_scale;
    if (e.x_scale_kind == 1) row_scale = here < e.m ? e.x_scale[here] : 0.0f;
    float y[32];
    QK_UNROLL for (int i = 0; i < 32; ++i) y[i] = static_cast<float>(sums[i / 2 * 4 + i % 2]);
    if (part % 2 == 0) {
      QK_UNROLL for (int i = 0; i < 64; i += 4) {
        sums[i] = sums[i + 2];
        sums[i + 1] = sums[i + 3];
      }
    } else {
      QK_UNROLL for (int i = 0; i + 64 < COUNT; ++i) sums[i] = sums[i + 64];
    }
    if (column + at.column >= e.n) continue;
    const Part whole{here, column + at.column, mine.t, here < e.m};
    if (e.wide)
      finish<true>(e, whole, row_scale, y, quad);
    else
      finish<false>(e, whole, row_scale, y, quad);
  }
}

}  // namespace qk
