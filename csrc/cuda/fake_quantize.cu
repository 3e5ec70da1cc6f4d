// fake_quantize and its gradients: quantize and dequantize in one pass, for every way of sharing scales.
//
// Bound by memory: values are read once, 16 bytes per load, and written once. Gradients of scales are sums in two
// stages: fixed pieces in float32, then their partial sums by index in float64. Pieces follow from the shape alone, so
// that neither the GPU nor the run changes a bit. Estimators: see `qkernels.ops.fake_quantize`.
#include "ops.h"
#include "rows.h"
#include "types.h"

namespace qk {
namespace {

enum Estimator : int { kSte, kLsq, kLsqPlus, kEwgs, kPact, kDorefa };  // as in qkernels/checks.py

constexpr int kPiece = 1024;   // values at most that one partial sum covers: 32 lanes of at most kHeld<T> vectors
constexpr int kRowBlock = 64;  // the same where every column has its own scale
constexpr int kThreads = 256;
template <class T>
constexpr int kHeld = kPiece / 32 / kVector<T>;

// Where values share scales. `runs` runs of `length` values each, the last of every `period` runs being `last` long;
// run i uses scale i % scales. A row is `period` runs.
struct Layout {
  std::int64_t runs, length, period, last, scales;
  __host__ __device__ bool by_columns() const { return length == 1 && scales > 1; }
  __host__ __device__ std::int64_t pieces() const { return (length + kPiece - 1) / kPiece; }  // of a run
  __host__ __device__ std::int64_t rows() const { return scales == 0 ? 0 : runs / scales; }
  __host__ __device__ std::int64_t partials() const {
    return by_columns() ? (rows() + kRowBlock - 1) / kRowBlock * scales : runs * pieces();
  }
};

struct Problem {
  const void* x;
  const void* grad;    // null: forward
  void* out;           // the result, or the gradient of x
  float* partials[2];  // of the gradients of scale and offset; null where there is none
  Layout layout;
  const float* scale;
  const float* zero;  // null: 0
  float qmin, qmax;
  int estimator;
  float bend;    // EWGS: delta / (qmax - qmin)
  int lanes;     // threads that share a piece
  bool aligned;  // every run begins and ends on 16 bytes
};

__device__ inline bool has_offset(const Problem& p) { return p.estimator == kLsqPlus || p.estimator == kEwgs; }

// The grid of one scale.
struct Step {
  float scale, inverse, zero, low, high;  // low and high are bounds of v
};
__device__ inline Step step_of(const Problem& p, float scale, float zero) {
  const bool offset = has_offset(p);
  return {scale, __fdiv_rn(1.0f, scale), zero, offset ? p.qmin : __fsub_rn(p.qmin, zero),
          offset ? p.qmax : __fsub_rn(p.qmax, zero)};
}

// NaN passes.
__device__ inline float clamp(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

__device__ inline float forward(const Problem& p, const Step& s, float x) {
  if (has_offset(p)) {
    const float v = __fmul_rn(__fsub_rn(x, s.zero), s.inverse);
    return __fadd_rn(__fmul_rn(rintf(clamp(v, s.low, s.high)), s.scale), s.zero);
  }
  const float code = clamp(__fadd_rn(rintf(__fmul_rn(x, s.inverse)), s.zero), p.qmin, p.qmax);
  return __fmul_rn(__fsub_rn(code, s.zero), s.scale);
}

// The gradient of x; adds what scale and offset get from it.
__device__ inline float backward(const Problem& p, const Step& s, float x, float g, float& of_scale, float& of_offset) {
  const float v = __fmul_rn(has_offset(p) ? __fsub_rn(x, s.zero) : x, s.inverse);
  const bool at_bound = p.estimator == kPact && (v == s.low || v == s.high);
  const bool below = v < s.low || (at_bound && v == s.low), above = v > s.high || (at_bound && v == s.high);
  const float rest = rintf(v) - v;
  // What EWGS takes from the gradient. For the others 0, or NaN where v is.
  const float bend = p.estimator == kEwgs ? fabsf(g) * rest * p.bend : 0.0f * v;
  const float inside = p.estimator == kPact ? 0.0f * v : p.estimator == kEwgs ? g * rest + bend * v : g * rest;
  of_scale += below ? g * s.low : above ? g * s.high : inside;
  of_offset += below || above ? g : bend;
  if (p.estimator == kDorefa) return g;
  if (below || above || v != v) return 0.0f;
  return p.estimator == kEwgs ? g - bend : g;
}

// `lanes` threads go through one piece of a run.
template <class T, bool Backward>
__global__ void __launch_bounds__(kThreads) by_runs(Problem p) {
  constexpr int vector = kVector<T>;
  const Layout& l = p.layout;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t item = thread / p.lanes, pieces = l.pieces(), run = item / pieces;
  const int lane = static_cast<int>(thread % p.lanes);
  std::int64_t begin = 0, count = 0, scale = 0;
  if (run < l.runs) {
    const std::int64_t row = run / l.period, in_row = run % l.period, skip = item % pieces * kPiece;
    begin = row * ((l.period - 1) * l.length + l.last) + in_row * l.length + skip;
    count = (in_row == l.period - 1 ? l.last : l.length) - skip;
    count = count < 0 ? 0 : count > kPiece ? kPiece : count;
    scale = run % l.scales;
  }
  const Step s = step_of(p, p.scale[scale], p.zero == nullptr ? 0.0f : p.zero[scale]);
  const T* const x = static_cast<const T*>(p.x) + begin;
  const T* const grad = Backward ? static_cast<const T*>(p.grad) + begin : nullptr;
  T* const out = static_cast<T*>(p.out) + begin;
  float of_scale = 0.0f, of_offset = 0.0f;
  constexpr int together = Backward ? kHeld<T> / 2 : kHeld<T>;  // vectors of an array whose loads are under way at once
#pragma unroll
  for (int first = 0; first < kHeld<T>; first += together) {
    float y[together][vector], g[together][vector];
    const auto position = [&](int v) { return ((first + v) * p.lanes + lane) * vector; };
#pragma unroll
    for (int v = 0; v < together; ++v) {
      fetch(x, position(v), count, p.aligned, y[v]);
      if (Backward) fetch(grad, position(v), count, p.aligned, g[v]);
    }
#pragma unroll
    for (int v = 0; v < together; ++v) {
      if (position(v) >= count) break;
#pragma unroll
      for (int i = 0; i < vector; ++i) {
        if (!Backward)
          y[v][i] = forward(p, s, y[v][i]);
        else if (p.aligned || position(v) + i < count)
          y[v][i] = backward(p, s, y[v][i], g[v][i], of_scale, of_offset);
      }
      put(out, position(v), count, p.aligned, y[v]);
    }
  }
  if (p.partials[0] == nullptr) return;
  for (int mask = p.lanes >> 1; mask > 0; mask >>= 1) {
    of_scale += __shfl_xor_sync(~0u, of_scale, mask);
    of_offset += __shfl_xor_sync(~0u, of_offset, mask);
  }
  if (lane > 0 || run >= l.runs) return;
  p.partials[0][item] = of_scale;
  if (p.partials[1] != nullptr) p.partials[1][item] = of_offset;
}

// Every column has its own scale. A block has 32 vectors of columns of kRowBlock rows; its eight warps take turns.
template <class T, bool Backward>
__global__ void __launch_bounds__(kThreads) by_columns(Problem p) {
  constexpr int vector = kVector<T>, warps = kThreads / 32;
  const std::int64_t columns = p.layout.scales, rows = p.layout.rows();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t at = (static_cast<std::int64_t>(blockIdx.y) * 32 + lane) * vector;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kRowBlock;
  float scale[vector], zero[vector], of_scale[vector], of_offset[vector];
#pragma unroll
  for (int i = 0; i < vector; ++i) {
    scale[i] = at + i < columns ? p.scale[at + i] : 1.0f;
    zero[i] = p.zero != nullptr && at + i < columns ? p.zero[at + i] : 0.0f;
    of_scale[i] = of_offset[i] = 0.0f;
  }
  for (std::int64_t row = begin + warp; row < begin + kRowBlock && row < rows; row += warps) {
    float y[vector], g[vector];
    fetch(static_cast<const T*>(p.x) + row * columns, at, columns, p.aligned, y);
    if (Backward) fetch(static_cast<const T*>(p.grad) + row * columns, at, columns, p.aligned, g);
#pragma unroll
    for (int i = 0; i < vector; ++i) {
      const Step s = step_of(p, scale[i], zero[i]);
      y[i] = Backward ? backward(p, s, y[i], g[i], of_scale[i], of_offset[i]) : forward(p, s, y[i]);
    }
    put(static_cast<T*>(p.out) + row * columns, at, columns, p.aligned, y);
  }
  if (p.partials[0] == nullptr) return;
  float* const room = reinterpret_cast<float*>(shared_memory());  // [warps, 32 * vector]
  for (int which = 0; which < 2 && p.partials[which] != nullptr; ++which) {
#pragma unroll
    for (int i = 0; i < vector; ++i) room[warp * 32 * vector + i * 32 + lane] = which == 0 ? of_scale[i] : of_offset[i];
    __syncthreads();
    for (int j = threadIdx.x; j < 32 * vector; j += kThreads) {
      const std::int64_t column = (static_cast<std::int64_t>(blockIdx.y) * 32 + j % 32) * vector + j / 32;
      float sum = room[j];
      for (int w = 1; w < warps; ++w) sum += room[w * 32 * vector + j];
      if (column < columns) p.partials[which][blockIdx.x * columns + column] = sum;
    }
    __syncthreads();
  }
}

struct Totals {
  const float* partials[2];
  float* to[2];
  std::int64_t scales, together,
      repeats;  // scale c has `repeats` groups of `together` neighbours, `scales` groups apart
  float factor;
};

// `Threads` threads add the partial sums of one scale.
template <int Threads>
__global__ void __launch_bounds__(kThreads) total(Totals t) {
  const bool first = blockIdx.y == 0;
  const float* const partials = first ? t.partials[0] : t.partials[1];
  const int thread = threadIdx.x % Threads;
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * (kThreads / Threads) + threadIdx.x / Threads;
  if (c >= t.scales) return;  // whole warps; where several share a scale, none leaves
  double sum = 0.0;
  for (std::int64_t i = thread; i < t.repeats * t.together; i += Threads)
    sum += partials[(i / t.together * t.scales + c) * t.together + i % t.together];
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);
  if (Threads > 32) {
    double* const room = reinterpret_cast<double*>(shared_memory());
    if (thread % 32 == 0) room[thread / 32] = sum;
    __syncthreads();
    sum = 0.0;
    for (int i = 0; i < Threads / 32; ++i) sum += room[i];
  }
  if (thread == 0) (first ? t.to[0] : t.to[1])[c] = static_cast<float>(sum * t.factor);
}

template <class T, bool Backward>
int launch_elements(Problem& p, void* stream) {
  const Layout& l = p.layout;
  const auto address = [](const void* q) { return reinterpret_cast<std::uintptr_t>(q); };
  p.aligned = (address(p.x) | address(p.grad) | address(p.out)) % 16 == 0;
  if (l.by_columns()) {
    p.aligned = p.aligned && l.scales % kVector<T> == 0;
    const dim3 grid(static_cast<unsigned>((l.rows() + kRowBlock - 1) / kRowBlock),
                    static_cast<unsigned>((l.scales + 32 * kVector<T> - 1) / (32 * kVector<T>)));
    return launch(by_columns<T, Backward>, grid, kThreads,
                  Backward ? kThreads * 16 / static_cast<int>(sizeof(T)) * 4 : 0, stream, p);
  }
  p.aligned = p.aligned && l.length % kVector<T> == 0 && l.last % kVector<T> == 0;
  const std::int64_t longest = l.length < kPiece ? l.length : kPiece;
  for (p.lanes = 1; p.lanes < 32 && p.lanes * kVector<T> < longest;) p.lanes *= 2;
  const std::int64_t threads = l.runs * l.pieces() * p.lanes;
  return launch(by_runs<T, Backward>, dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads)), kThreads, 0,
                stream, p);
}

template <bool Backward>
int launch_type(Problem& p, int type, void* stream) {
  if (type == float32) return launch_elements<float, Backward>(p, stream);
  if (type == bfloat16) return launch_elements<bf16, Backward>(p, stream);
  if (type == float16) return launch_elements<f16, Backward>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace qk

int qk_cuda_fake_quantize(const void* x, int type, std::int64_t runs, std::int64_t length, std::int64_t period,
                          std::int64_t last, std::int64_t scales, const float* scale, const float* zero_point,
                          float qmin, float qmax, int estimator, void* out, int device, void* stream) {
  using namespace qk;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  Problem p{x,
            nullptr,
            out,
            {nullptr, nullptr},
            {runs, length, period, last, scales},
            scale,
            zero_point,
            qmin,
            qmax,
            estimator,
            0.0f,
            1,
            false};
  return launch_type<false>(p, type, stream);
}

// `dscale` and `doffset` may be null: the estimator has no such gradient. `partials` has room for `room` floats for
// each of the two that is there; too little is refused.
int qk_cuda_fake_quantize_backward(const void* grad, const void* x, int type, std::int64_t runs, std::int64_t length,
                                   std::int64_t period, std::int64_t last, std::int64_t scales, const float* scale,
                                   const float* zero_point, float qmin, float qmax, int estimator, float grad_scale,
                                   float delta, void* dx, float* dscale, float* doffset, float* partials,
                                   std::int64_t room, int device, void* stream) {
  using namespace qk;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  const Layout layout{runs, length, period, last, scales};
  const std::int64_t count = layout.partials();
  if ((dscale != nullptr && room < count) || (dscale == nullptr && doffset != nullptr)) return cudaErrorInvalidValue;
  Problem p{x,
            grad,
            dx,
            {dscale != nullptr ? partials : nullptr, doffset != nullptr ? partials + room : nullptr},
            layout,
            scale,
            zero_point,
            qmin,
            qmax,
            estimator,
            delta / (qmax - qmin),
            1,
            false};
  if (const int error = launch_type<true>(p, type, stream); error || dscale == nullptr) return error;
  const bool columns = layout.by_columns();
  const Totals t{{partials, partials + room},
                 {dscale, doffset},
                 scales,
                 columns ? 1 : layout.pieces(),
                 columns ? count / scales : layout.rows(),
                 grad_scale};
  const unsigned outputs = doffset != nullptr ? 2 : 1;
  if (t.repeats * t.together > 1024)
    return launch(total<kThreads>, dim3(static_cast<unsigned>(scales), outputs), kThreads, 128, stream, t);
  const auto blocks = static_cast<unsigned>((scales + kThreads / 32 - 1) / (kThreads / 32));
  return launch(total<32>, dim3(blocks, outputs), kThreads, 0, stream, t);
}
