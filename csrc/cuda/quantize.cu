// quantize_per_token, and layer_norm_quantize: rows of floats -> int8 codes and one scale per row.
//
// Bound by memory: a row is read once, 16 bytes per load, and stays in registers from there to its codes. A row of up
// to 1280 values belongs to one warp (no shared memory, no barrier), longer ones to 128 or 512 threads; beyond 20,480
// values 512 threads go through the row again for each step.
#include "ops.h"
#include "rows.h"
#include "types.h"

namespace qk {
namespace {

struct Rows {
  const void* x;  // [rows, width]
  std::int64_t rows, width;
  bool aligned;         // every row of x, of the codes and of what columns share lies on whole vectors
  const float* weight;  // [width] or null; with bias and eps only where rows are normalised
  const float* bias;
  float eps;
  const float* smooth;      // [width] or null
  const float* scale;       // null: dynamic
  const float* zero_point;  // null: 0
  std::int8_t* codes;
  float* scales;
};

// What normalises a row: (x - mean) * inverse + shift. The shift takes away what rounding left of the mean.
struct Moments {
  float mean, inverse, shift;
};

// From the sums of x - mean and of its square, which are exact enough where the mean itself is not.
__device__ inline Moments moments_of(float mean, float rest, float squares, float width, float eps) {
  const float left = __fdiv_rn(rest, width);
  const float variance = __fdiv_rn(__fmaf_rn(-rest, left, squares), width);
  // An infinite variance would turn every value into the bias: make it a fault.
  const float inverse = variance < __uint_as_float(kInfinity)
                            ? __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(fmaxf(variance, 0.0f), eps)))
                            : __uint_as_float(kQuietNaN);
  return {mean, inverse, -__fmul_rn(left, inverse)};
}

// x - mean -> the normalised value, in place; past the width, where x is the mean, it is the shift, next to nothing.
template <int Count>
__device__ inline void normalize(const Rows& r, const Moments& m, std::int64_t at, float (&y)[Count]) {
  float w[Count], b[Count];
  fetch_columns(r.weight, at, r.width, r.aligned, 1.0f, w);
  fetch_columns(r.bias, at, r.width, r.aligned, 0.0f, b);
#pragma unroll
  for (int i = 0; i < Count; ++i) y[i] = __fmaf_rn(__fmaf_rn(y[i], m.inverse, m.shift), w[i], b[i]);
}

template <int Count>
__device__ inline void smooth(const Rows& r, std::int64_t at, float (&y)[Count]) {
  if (r.smooth == nullptr) return;
  float s[Count];
  fetch_columns(r.smooth, at, r.width, r.aligned, 0.0f, s);
#pragma unroll
  for (int i = 0; i < Count; ++i) y[i] = __fmul_rn(y[i], s[i]);
}

template <int Count>
__device__ inline float top_of(const float (&y)[Count], float top) {
#pragma unroll
  for (int i = 0; i < Count; ++i) top = max_or_nan(top, fabsf(y[i]));
  return top;
}

template <int Threads>
constexpr int kBlock = Threads < 128 ? 128 : Threads;
// Blocks that a multiprocessor should hold at once, so that enough rows are on their way.
template <int Threads, int Values>
constexpr int kBlocks = Threads == 512 ? 1
                        : Values == 24 ? 8
                                       : 4;

// `Threads` threads have a row of at most Threads * Values values in registers.
template <class T, int Threads, int Values, bool Norm>
__global__ void __launch_bounds__(kBlock<Threads>, kBlocks<Threads, Values>) short_rows(Rows r) {
  constexpr int vector = kVector<T>, vectors = Values / vector;
  float* const room = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x % Threads;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kBlock<Threads> / Threads) + threadIdx.x / Threads;
  if (row >= r.rows) return;  // whole warps; where several share a row, none leaves
  const T* const x = static_cast<const T*>(r.x) + row * r.width;
  const auto position = [&](int v) { return static_cast<std::int64_t>((v * Threads + thread) * vector); };
  float y[vectors][vector];
#pragma unroll
  for (int v = 0; v < vectors; ++v) fetch(x, position(v), r.width, r.aligned, y[v]);
  if (Norm) {
    const float width = static_cast<float>(r.width);
    float sum = 0.0f, rest = 0.0f, squares = 0.0f;
#pragma unroll
    for (int v = 0; v < vectors; ++v)
#pragma unroll
      for (int i = 0; i < vector; ++i) sum = __fadd_rn(sum, y[v][i]);
    const float mean = __fdiv_rn(sum_of_row<Threads>(sum, room), width);
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      if (position(v) + vector > r.width)  // padding lies at the mean
#pragma unroll
        for (int i = 0; i < vector; ++i)
          if (position(v) + i >= r.width) y[v][i] = mean;
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        y[v][i] = __fsub_rn(y[v][i], mean);
        rest = __fadd_rn(rest, y[v][i]);
        squares = __fmaf_rn(y[v][i], y[v][i], squares);
      }
    }
    const Moments m =
        moments_of(mean, sum_of_row<Threads>(rest, room), sum_of_row<Threads>(squares, room), width, r.eps);
#pragma unroll
    for (int v = 0; v < vectors; ++v) normalize(r, m, position(v), y[v]);
  }
  float top = 0.0f;
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    smooth(r, position(v), y[v]);
    top = top_of(y[v], top);
  }
  const Grid g = grid_of_row(top_of_row<Threads>(top, room), r.scale, r.zero_point);
#pragma unroll
  for (int v = 0; v < vectors; ++v) write_codes(r.codes + row * r.width, position(v), r.width, r.aligned, y[v], g);
  if (thread == 0) r.scales[row] = g.scale;
}

// Rows of any width, read once for each step.
template <class T, bool Norm>
__global__ void __launch_bounds__(512) long_rows(Rows r) {
  constexpr int threads = 512, vector = kVector<T>;
  float* const room = reinterpret_cast<float*>(shared_memory());
  const std::int64_t row = blockIdx.x;
  const T* const x = static_cast<const T*>(r.x) + row * r.width;
  // Calls use(at, values) for the vectors of this thread.
  const auto each = [&](auto use) {
    for (std::int64_t at = threadIdx.x * vector; at < r.width; at += threads * vector) {
      float y[vector];
      fetch(x, at, r.width, r.aligned, y);
      use(at, y);
    }
  };
  Moments m{};
  const float width = static_cast<float>(r.width);
  if (Norm) {
    float sum = 0.0f, rest = 0.0f, squares = 0.0f;
    each([&](std::int64_t, float (&y)[vector]) {
      for (int i = 0; i < vector; ++i) sum = __fadd_rn(sum, y[i]);
    });
    m.mean = __fdiv_rn(sum_of_row<threads>(sum, room), width);
    each([&](std::int64_t at, float (&y)[vector]) {
      for (int i = 0; i < vector; ++i) {
        const float d = at + i < r.width ? __fsub_rn(y[i], m.mean) : 0.0f;
        rest = __fadd_rn(rest, d);
        squares = __fmaf_rn(d, d, squares);
      }
    });
    m = moments_of(m.mean, sum_of_row<threads>(rest, room), sum_of_row<threads>(squares, room), width, r.eps);
  }
  const auto finished = [&](std::int64_t at, float (&y)[vector]) {
    if (Norm) {
      for (int i = 0; i < vector; ++i) y[i] = __fsub_rn(y[i], m.mean);
      normalize(r, m, at, y);
    }
    smooth(r, at, y);
  };
  float top = 0.0f;
  each([&](std::int64_t at, float (&y)[vector]) {
    finished(at, y);
    top = top_of(y, top);
  });
  const Grid g = grid_of_row(top_of_row<threads>(top, room), r.scale, r.zero_point);
  each([&](std::int64_t at, float (&y)[vector]) {
    finished(at, y);
    write_codes(r.codes + row * r.width, at, r.width, r.aligned, y, g);
  });
  if (threadIdx.x == 0) r.scales[row] = g.scale;
}

template <class T, int Threads, int Values, bool Norm>
int launch_short(const Rows& r, void* stream) {
  constexpr int rows = kBlock<Threads> / Threads;
  const dim3 grid(static_cast<unsigned>((r.rows + rows - 1) / rows));
  return launch(short_rows<T, Threads, Values, Norm>, grid, kBlock<Threads>, 128, stream, r);
}

template <class T, bool Norm>
int launch_rows(Rows r, void* stream) {
  const auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
  const auto any = address(r.x) | address(r.weight) | address(r.bias) | address(r.smooth) | address(r.codes);
  r.aligned = r.width % kVector<T> == 0 && any % 16 == 0;
  if (r.width <= 32 * 24) return launch_short<T, 32, 24, Norm>(r, stream);
  if (r.width <= 32 * 32) return launch_short<T, 32, 32, Norm>(r, stream);
  if (r.width <= 32 * 40) return launch_short<T, 32, 40, Norm>(r, stream);
  if (r.width <= 128 * 40) return launch_short<T, 128, 40, Norm>(r, stream);
  if (r.width <= 512 * 40) return launch_short<T, 512, 40, Norm>(r, stream);
  return launch(long_rows<T, Norm>, dim3(static_cast<unsigned>(r.rows)), 512, 128, stream, r);
}

template <bool Norm>
int launch_type(const Rows& r, int type, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  if (r.rows == 0) return cudaSuccess;
  if (type == float32) return launch_rows<float, Norm>(r, stream);
  if (type == bfloat16) return launch_rows<bf16, Norm>(r, stream);
  if (type == float16) return launch_rows<f16, Norm>(r, stream);
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace qk

int qk_cuda_quantize_per_token(const void* x, int type, std::int64_t rows, std::int64_t width, const float* smooth,
                               const float* scale, const float* zero_point, std::int8_t* codes, float* scales,
                               int device, void* stream) {
  return qk::launch_type<false>(
      {x, rows, width, false, nullptr, nullptr, 0.0f, smooth, scale, zero_point, codes, scales}, type, device, stream);
}

int qk_cuda_layer_norm_quantize(const void* x, int type, std::int64_t rows, std::int64_t width, const float* weight,
                                const float* bias, float eps, const float* smooth, const float* scale,
                                const float* zero_point, std::int8_t* codes, float* scales, int device, void* stream) {
  return qk::launch_type<true>({x, rows, width, false, weight, bias, eps, smooth, scale, zero_point, codes, scales},
                               type, device, stream);
}
