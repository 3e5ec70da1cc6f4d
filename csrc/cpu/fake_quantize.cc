// Quantize-dequantize for training, and its gradients. The tensor is cut into pieces that share one scale and have a
// length that depends on the shape alone; every piece leaves one partial sum of the scale's gradient, and partial sums
// are added in their order: the result does not depend on the number of threads.
#include "parallel.h"
#include "simd.h"

namespace {

constexpr std::int64_t piece = 4096;    // values at most that one partial sum covers
constexpr std::int64_t row_block = 64;  // the same where every column has its own scale

// Where values share scales. `runs` runs of `length` values each, the last of every `period` runs being `last` long;
// run i uses scale i % scales. A row of x is `period` runs.
struct Layout {
  std::int64_t runs, length, period, last, scales;
  inline std::int64_t begin(std::int64_t run) const {
    return run / period * ((period - 1) * length + last) + run % period * length;
  }
  inline std::int64_t size(std::int64_t run) const { return run % period == period - 1 ? last : length; }
  inline std::int64_t pieces() const { return (length + piece - 1) / piece; }  // of a run
};

struct Grid {
  const float* scale;
  const float* zero;  // may be null: 0
  float low, high;    // of the codes
};

template <class T>
static inline vf get(const T* p, int n) {
  return n == W ? load(p) : load(p, n);
}
template <class T>
static inline void put(T* p, vf x, int n) {
  if (n == W)
    store(p, x);
  else
    store(p, x, n);
}

static inline vf forward(vf x, vf scale, vf inverse, vf z, vf low, vf high) {
  // min and max give their second argument where one is NaN: NaN passes.
  const vf code = min(high, max(low, add(round(mul(x, inverse)), z)));
  return mul(sub(code, z), scale);
}

// Gradient of x, and the slope of the output with the scale.
static inline vf backward(vf g, vf x, vf inverse, vf low, vf high, vf* slope) {
  const vf v = mul(x, inverse);
  const vm below = less(v, low), above = less(high, v);
  *slope = select(below, low, select(above, high, sub(round(v), v)));
  // Inside: neither below nor above, nor NaN, whose gradient is 0.
  const vf number = select(less(v, set1(__builtin_inff())), g, zero());
  return select(below, zero(), select(above, zero(), number));
}

template <class T>
static void forward_piece(const T* x, std::int64_t count, float scale, float z, float low, float high, T* out) {
  const vf s = set1(scale), inverse = set1(1.0f / scale), zv = set1(z), lowv = set1(low), highv = set1(high);
  for (std::int64_t i = 0; i < count; i += W) {
    const int n = count - i < W ? static_cast<int>(count - i) : W;
    put(out + i, forward(get(x + i, n), s, inverse, zv, lowv, highv), n);
  }
}

template <class T>
static double backward_piece(const T* grad, const T* x, std::int64_t count, float scale, float z, float low, float high,
                             T* dx) {
  const vf inverse = set1(1.0f / scale), lowv = set1(low - z), highv = set1(high - z);
  vf sums[4] = {zero(), zero(), zero(), zero()};
  int turn = 0;
  for (std::int64_t i = 0; i < count; i += W, turn = (turn + 1) & 3) {
    const int n = count - i < W ? static_cast<int>(count - i) : W;
    vf slope;
    const vf g = get(grad + i, n);
    put(dx + i, backward(g, get(x + i, n), inverse, lowv, highv, &slope), n);
    sums[turn] = fma(g, slope, sums[turn]);  // padding: g is 0; its slope is finite unless the scale is not
  }
  return static_cast<double>(reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3]))));
}

template <class T>
static void forward_runs(const T* x, const Layout& layout, const Grid& grid, T* out, int threads) {
  const std::int64_t pieces = layout.pieces(), length = layout.length < piece ? layout.length : piece;
  parallel_for(threads, layout.runs * pieces, 16384 / (length + 1) + 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t item = first; item < last; ++item) {
      const std::int64_t run = item / pieces, skip = item % pieces * piece, size = layout.size(run) - skip;
      if (size <= 0) continue;
      const std::int64_t at = layout.begin(run) + skip, c = run % layout.scales;
      forward_piece(x + at, size < piece ? size : piece, grid.scale[c], grid.zero ? grid.zero[c] : 0.0f, grid.low,
                    grid.high, out + at);
    }
  });
}

template <class T>
static void backward_runs(const T* grad, const T* x, const Layout& layout, const Grid& grid, T* dx, double* partial,
                          int threads) {
  const std::int64_t pieces = layout.pieces(), length = layout.length < piece ? layout.length : piece;
  parallel_for(threads, layout.runs * pieces, 16384 / (length + 1) + 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t item = first; item < last; ++item) {
      const std::int64_t run = item / pieces, skip = item % pieces * piece, size = layout.size(run) - skip;
      partial[item] = 0.0;
      if (size <= 0) continue;
      const std::int64_t at = layout.begin(run) + skip, c = run % layout.scales;
      partial[item] = backward_piece(grad + at, x + at, size < piece ? size : piece, grid.scale[c],
                                     grid.zero ? grid.zero[c] : 0.0f, grid.low, grid.high, dx + at);
    }
  });
}

// Every column has its own scale: rows x columns values, neighbours differ in scale.
template <class T>
static void forward_columns(const T* x, std::int64_t rows, std::int64_t columns, const Grid& grid, T* out,
                            int threads) {
  parallel_for(threads, rows, 16384 / (columns + 1) + 1, [&](std::int64_t first, std::int64_t last) {
    const vf one = set1(1.0f), low = set1(grid.low), high = set1(grid.high);
    for (std::int64_t row = first; row < last; ++row)
      for (std::int64_t i = 0; i < columns; i += W) {
        const int n = columns - i < W ? static_cast<int>(columns - i) : W;
        const vf s = get(grid.scale + i, n), z = grid.zero ? get(grid.zero + i, n) : zero();
        put(out + row * columns + i, forward(get(x + row * columns + i, n), s, div(one, s), z, low, high), n);
      }
  });
}

template <class T>
static void backward_columns(const T* grad, const T* x, std::int64_t rows, std::int64_t columns, const Grid& grid,
                             T* dx, double* partial, int threads) {
  const std::int64_t blocks = (rows + row_block - 1) / row_block;
  parallel_for(threads, blocks, 16384 / (row_block * columns + 1) + 1, [&](std::int64_t first, std::int64_t last) {
    const vf one = set1(1.0f), low = set1(grid.low), high = set1(grid.high);
    for (std::int64_t block = first; block < last; ++block) {
      const std::int64_t end = (block + 1) * row_block < rows ? (block + 1) * row_block : rows;
      for (std::int64_t i = 0; i < columns; i += W) {
        const int n = columns - i < W ? static_cast<int>(columns - i) : W;
        const vf inverse = div(one, get(grid.scale + i, n)), z = grid.zero ? get(grid.zero + i, n) : zero();
        vf sum = zero();
        for (std::int64_t row = block * row_block; row < end; ++row) {
          vf slope;
          const vf g = get(grad + row * columns + i, n);
          put(dx + row * columns + i,
              backward(g, get(x + row * columns + i, n), inverse, sub(low, z), sub(high, z), &slope), n);
          sum = fma(g, slope, sum);
        }
        float lanes[W];
        store(lanes, sum);
        for (int lane = 0; lane < n; ++lane) partial[block * columns + i + lane] = static_cast<double>(lanes[lane]);
      }
    }
  });
}

static inline bool by_columns(const Layout& layout) { return layout.length == 1 && layout.scales > 1; }

}  // namespace

extern "C" {

void QK_IMPL(fake_quantize)(const void* x, int type, std::int64_t runs, std::int64_t length, std::int64_t period,
                            std::int64_t last, std::int64_t scales, const float* scale, const float* zero_point,
                            float low, float high, void* out, int threads) {
  const Layout layout{runs, length, period, last, scales};
  const Grid grid{scale, zero_point, low, high};
  const auto run = [&](const auto* typed, auto* target) {
    if (by_columns(layout))
      forward_columns(typed, runs / scales, scales, grid, target, threads);
    else
      forward_runs(typed, layout, grid, target, threads);
  };
  if (type == QK_F32) run(static_cast<const float*>(x), static_cast<float*>(out));
  if (type == QK_BF16) run(static_cast<const bf16*>(x), static_cast<bf16*>(out));
  if (type == QK_F16) run(static_cast<const f16*>(x), static_cast<f16*>(out));
}

// `dscale` may be null: the estimator has no gradient of the scale.
void QK_IMPL(fake_quantize_backward)(const void* grad, const void* x, int type, std::int64_t runs, std::int64_t length,
                                     std::int64_t period, std::int64_t last, std::int64_t scales, const float* scale,
                                     const float* zero_point, float low, float high, float grad_scale, void* dx,
                                     float* dscale, int threads) {
  const Layout layout{runs, length, period, last, scales};
  const Grid grid{scale, zero_point, low, high};
  // Partial sums: `terms` of them for each scale, `stride` apart, in groups of `together` neighbours.
  const bool columns = by_columns(layout);
  const std::int64_t pieces = layout.pieces(), rows = scales ? runs / scales : 0;
  const std::int64_t count = columns ? (rows + row_block - 1) / row_block * scales : runs * pieces;
  auto* partial = static_cast<double*>(qk_workspace(QK_SLOT_SHARED, static_cast<std::size_t>(count) * sizeof(double)));
  const auto run = [&](const auto* g, const auto* typed, auto* target) {
    if (columns)
      backward_columns(g, typed, rows, scales, grid, target, partial, threads);
    else
      backward_runs(g, typed, layout, grid, target, partial, threads);
  };
  if (type == QK_F32) run(static_cast<const float*>(grad), static_cast<const float*>(x), static_cast<float*>(dx));
  if (type == QK_BF16) run(static_cast<const bf16*>(grad), static_cast<const bf16*>(x), static_cast<bf16*>(dx));
  if (type == QK_F16) run(static_cast<const f16*>(grad), static_cast<const f16*>(x), static_cast<f16*>(dx));
  if (dscale == nullptr) return;
  const std::int64_t together = columns ? 1 : pieces;
  parallel_for(threads, scales, 4096, [&](std::int64_t first, std::int64_t end) {
    for (std::int64_t c = first; c < end; ++c) {
      double sum = 0.0;
      for (std::int64_t at = c * together; at < count; at += scales * together)
        for (std::int64_t j = 0; j < together; ++j) sum += partial[at + j];
      dscale[c] = static_cast<float>(sum * static_cast<double>(grad_scale));
    }
  });
}
}
