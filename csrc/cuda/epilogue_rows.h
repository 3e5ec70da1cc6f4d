// The epilogue of epilogue.h where sums wait in shared memory: a warp finishes
// 128 columns of a row, each lane four that lie together.
#pragma once

#include "epilogue.h"
#include "ptx.h"

namespace qk {

// Values at .. at + 4 of a float vector over the columns, `none` where there is
// none.
__device__ inline void columns_at(const float* p, int at, int n, bool wide, float none, float (&y)[4]) {
  if (p != nullptr && wide && at < n) {
    const float4 v = load<float4>(p + at);
    y[0] = v.x, y[1] = v.y, y[2] = v.z, y[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = p != nullptr && at + i < n ? p[at + i] : none;
  }
}

template <class T>
__device__ inline void add_halves(const T* p, int at, int n, bool wide, float (&y)[4]) {
  if (wide && at < n) {
    const uint2 v = load<uint2>(p + at);
    const unsigned words[2] = {v.x, v.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] += to_float(T{static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2)))});
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i < n) y[i] += to_float(p[at + i]);
  }
}

__device__ inline void add_residual(const Epilogue& e, std::int64_t line, int at, float (&y)[4]) {
  if (e.residual == nullptr) return;
  if (e.residual_type == float32) {
    float more[4];
    columns_at(static_cast<const float*>(e.residual) + line, at, e.n, e.wide, 0.0f, more);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] += more[i];
  } else if (e.residual_type == bfloat16) {
    add_halves(static_cast<const bf16*>(e.residual) + line, at, e.n, e.wide, y);
  } else {
    add_halves(static_cast<const f16*>(e.residual) + line, at, e.n, e.wide, y);
  }
}

template <class T>
__device__ inline void store_row(T* p, int at, int n, bool wide, const float (&y)[4]) {
  if (wide && at < n) {
    store_global(p + at, make_uint2(pair_of(y[0], y[1], T{}), pair_of(y[2], y[3], T{})));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i < n) p[at + i] = from_float<T>(y[i]);
  }
}
__device__ inline void store_row(float* p, int at, int n, bool wide, const float (&y)[4]) {
  if (wide && at < n) {
    store_global(p + at, make_uint4(bits_of(y[0]), bits_of(y[1]), bits_of(y[2]), bits_of(y[3])));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i < n) p[at + i] = y[i];
  }
}

// int8 by the dynamic rule over the warp's 128 columns, or by the static one.
__device__ inline void store_codes(const Epilogue& e, std::int64_t row, int column, int lane, const float (&y)[4]) {
  const int at = column + 4 * lane;
  unsigned codes[4];
  if (e.group_scales != nullptr) {
    unsigned top = 0;  // as bits, magnitudes order like integers, Inf above all
                       // numbers and NaN above Inf
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned size = at + i < e.n ? bits_of(y[i]) & 0x7fffffffu : 0u;
      top = size > top ? size : top;
    }
    const float absmax = float_of(__reduce_max_sync(~0u, top));
    const bool good = is_finite(absmax), small = absmax < 0x1p-100f;
    const float inverse = good && !small ? quotient(127.0f, absmax) : 0.0f;
    if (lane == 0)
      e.group_scales[row * ((e.n + 127) / 128) + column / 128] = !good   ? float_of(0x7fc00000u)
                                                                 : small ? 1.0f
                                                                         : quotient(absmax, 127.0f);
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = good ? code_of(product(y[i], inverse), 0.0f) : 0u;
  } else {
    const float zero = e.out_zero_point == nullptr ? 0.0f : *e.out_zero_point;
    float scale[4] = {*e.out_scale, *e.out_scale, *e.out_scale, *e.out_scale};
    if (e.out_scale_per_channel) columns_at(e.out_scale, at, e.n, e.wide, 1.0f, scale);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scaled = product(y[i], quotient(1.0f, scale[i]));
      codes[i] = is_finite(y[i]) && scaled == scaled ? code_of(scaled, zero) : 0u;
    }
  }
  std::int8_t* const to = static_cast<std::int8_t*>(e.out) + row * e.n;
  if (e.wide && at < e.n) {
    store_global(to + at, codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i < e.n) to[at + i] = static_cast<std::int8_t>(codes[i]);
  }
}

// Finishes the sums y of columns column + 4 lane .. + 4 of a row. All lanes of
// a warp come here together.
__device__ inline void finish_row(const Epilogue& e, std::int64_t row, float row_scale, const float (&column_scale)[4],
                                  int column, int lane, float (&y)[4]) {
  const int at = column + 4 * lane;
  float bias[4];
  columns_at(e.bias, at, e.n, e.wide, 0.0f, bias);
#pragma unroll
  for (int i = 0; i < 4; ++i) y[i] = multiply_add(y[i], product(row_scale, column_scale[i]), bias[i]);
  activate(y, e.activation);
  add_residual(e, row * e.n, at, y);
  if (e.out_type == float32)
    store_row(static_cast<float*>(e.out) + row * e.n, at, e.n, e.wide, y);
  else if (e.out_type == bfloat16)
    store_row(static_cast<bf16*>(e.out) + row * e.n, at, e.n, e.wide, y);
  else if (e.out_type == float16)
    store_row(static_cast<f16*>(e.out) + row * e.n, at, e.n, e.wide, y);
  else
    store_codes(e, row, column, lane, y);
}

}  // namespace qk
