// Rows of floats in registers: 16 bytes at a time from memory, reductions over the threads that share a row, and the
// rules that turn a row into int8 codes. Products, sums and quotients that decide bits are the intrinsics that no
// compiler contracts.
#pragma once

#include "ptx.h"

namespace qk {

constexpr float kTiny = 7.888609052210118e-31f;  // 2^-100: a row below it counts as a row of zeros
constexpr float kRounding = 12582912.0f;         // 1.5 * 2^23: a sum with it is rounded half to even to a whole number
constexpr unsigned kInfinity = 0x7f800000u;      // its bits
constexpr unsigned kQuietNaN = 0x7fc00000u;

template <class T>
constexpr int kVector = 16 / sizeof(T);  // values that 16 bytes hold

// 16 bytes as floats.
__device__ inline void unpack(uint4 bits, float (&y)[4], float) {
  y[0] = __uint_as_float(bits.x);
  y[1] = __uint_as_float(bits.y);
  y[2] = __uint_as_float(bits.z);
  y[3] = __uint_as_float(bits.w);
}
template <class T>
__device__ inline void unpack(uint4 bits, float (&y)[8], T) {
  const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = to_float(T{static_cast<std::uint16_t>(words[i])});
    y[2 * i + 1] = to_float(T{static_cast<std::uint16_t>(words[i] >> 16)});
  }
}

// Values at .. at + kVector of a row; 0 past its width. `aligned`: rows begin and end on 16 bytes.
template <class T>
__device__ inline void fetch(const T* row, std::int64_t at, std::int64_t width, bool aligned, float (&y)[kVector<T>]) {
  if (aligned && at < width) {
    unpack(load16_once(row + at), y, T{});
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) y[i] = at + i < width ? to_float(row[at + i]) : 0.0f;
  }
}

// Floats as 16 bytes of T.
__device__ inline uint4 packed(const float (&y)[4], float) {
  return make_uint4(__float_as_uint(y[0]), __float_as_uint(y[1]), __float_as_uint(y[2]), __float_as_uint(y[3]));
}
template <class T>
__device__ inline uint4 packed(const float (&y)[8], T) {
  return make_uint4(pair_of(y[0], y[1], T{}), pair_of(y[2], y[3], T{}), pair_of(y[4], y[5], T{}),
                    pair_of(y[6], y[7], T{}));
}

// What fetch() reads, written.
template <class T>
__device__ inline void put(T* row, std::int64_t at, std::int64_t width, bool aligned, const float (&y)[kVector<T>]) {
  if (aligned && at < width) {
    store_global(row + at, packed(y, T{}));
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i)
      if (at + i < width) row[at + i] = from_float<T>(y[i]);
  }
}

// The same as fetch() for a float vector over the row's columns that all rows read, `none` where there is no vector.
template <int Count>
__device__ inline void fetch_columns(const float* p, std::int64_t at, std::int64_t width, bool aligned, float none,
                                     float (&y)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; i += 4) {
    if (p != nullptr && aligned && at < width) {
      const float4 v = load<float4>(p + at + i);
      y[i] = v.x, y[i + 1] = v.y, y[i + 2] = v.z, y[i + 3] = v.w;
    } else {
#pragma unroll
      for (int j = i; j < i + 4; ++j) y[j] = p != nullptr && at + j < width ? p[at + j] : none;
    }
  }
}

// Sum over the `Threads` threads of a row, the same for all, in a fixed order. `room`: a float a warp.
template <int Threads>
__device__ inline float sum_of_row(float v, float* room) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v = __fadd_rn(v, __shfl_xor_sync(~0u, v, mask));
  if (Threads == 32) return v;
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
  __syncthreads();
  v = room[0];
#pragma unroll
  for (int i = 1; i < Threads / 32; ++i) v = __fadd_rn(v, room[i]);
  __syncthreads();
  return v;
}

// Largest of non-negative floats over a row, as bits: there NaN is larger than Inf, and Inf than every number.
template <int Threads>
__device__ inline unsigned top_of_row(float v, float* room) {
  unsigned top = __reduce_max_sync(~0u, __float_as_uint(v));
  if (Threads == 32) return top;
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = __uint_as_float(top);
  __syncthreads();
  top = __float_as_uint(room[0]);
#pragma unroll
  for (int i = 1; i < Threads / 32; ++i) {
    const unsigned other = __float_as_uint(room[i]);
    top = other > top ? other : top;
  }
  __syncthreads();
  return top;
}

// How the values of a row become codes.
struct Grid {
  float scale;  // NaN where the row is faulty
  float inverse;
  float zero_point;
  unsigned keep;  // the codes' bits that stay: none of a faulty row
  bool dynamic;
};

// From the bits of the row's largest magnitude; by the static rule where `scale` is given.
__device__ inline Grid grid_of_row(unsigned top, const float* scale, const float* zero_point) {
  Grid g;
  g.dynamic = scale == nullptr;
  g.zero_point = zero_point == nullptr ? 0.0f : *zero_point;
  bool good = top < kInfinity;
  if (g.dynamic) {
    const float absmax = __uint_as_float(top);
    const bool zeros = absmax < kTiny;
    g.scale = zeros ? 1.0f : __fdiv_rn(absmax, 127.0f);
    g.inverse = zeros ? 0.0f : __fdiv_rn(127.0f, absmax);
  } else {
    g.scale = *scale;
    g.inverse = __fdiv_rn(1.0f, g.scale);
    good = good && g.inverse > 0.0f && __float_as_uint(g.inverse) < kInfinity;
  }
  if (!good) g.scale = __uint_as_float(kQuietNaN);
  g.keep = good ? 0xffffffffu : 0u;
  return g;
}

// The code of y in the low byte; what a faulty row gets there is for `keep` to clear.
__device__ inline unsigned code_of(float y, const Grid& g) {
  float v = __fmul_rn(y, g.inverse);
  if (!g.dynamic) v = fminf(fmaxf(__fadd_rn(rintf(v), g.zero_point), -127.0f), 127.0f);
  return __float_as_uint(__fadd_rn(v, kRounding));
}

// The low bytes of four words.
__device__ inline unsigned pack(unsigned a, unsigned b, unsigned c, unsigned d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Codes of the values at .. at + Count of a row.
template <int Count>
__device__ inline void write_codes(std::int8_t* row, std::int64_t at, std::int64_t width, bool aligned,
                                   const float (&y)[Count], const Grid& g) {
  unsigned words[Count / 4];
#pragma unroll
  for (int i = 0; i < Count / 4; ++i)
    words[i] =
        pack(code_of(y[4 * i], g), code_of(y[4 * i + 1], g), code_of(y[4 * i + 2], g), code_of(y[4 * i + 3], g)) &
        g.keep;
  if (aligned && at < width) {
    if (Count == 8)
      store_global(row + at, make_uint2(words[0], words[Count / 4 - 1]));
    else
      store_global(row + at, words[0]);
  } else {
#pragma unroll
    for (int i = 0; i < Count; ++i)
      if (at + i < width) row[at + i] = static_cast<std::int8_t>(words[i / 4] >> (8 * (i % 4)));
  }
}

}  // namespace qk
