// Quantize-dequantize for training, and its gradients. The tensor is cut into pieces that share one scale and have a
// length that depends on the shape alone; every piece leaves one partial sum of each of the gradients of scale and
// offset, and partial sums are added in their order: the result does not depend on the number of threads. The
// estimators are those of qkernels/ops.py.
#include "parallel.h"
#include "simd.h"

namespace {

constexpr std::int64_t piece = 4096;    // values at most that one partial sum covers
constexpr std::int64_t row_block = 64;  // the same where every column has its own scale

// Where values share scales (qkernels/granularity.py): `runs` runs of `length` neighbours with one scale; run i uses
// scale i % scales. A row of x is `period` runs, the last of which has `last` values.
struct Layout {
  std::int64_t runs, length, period, last, scales;
  inline std::int64_t begin(std::int64_t run) const {
    return run / period * ((period - 1) * length + last) + run % period * length;
  }
  inline std::int64_t size(std::int64_t run) const { return run % period == period - 1 ? last : length; }
  inline std::int64_t pieces() const { return (length + piece - 1) / piece; }  // of a run
};

// Numbered as ESTIMATORS in qkernels/checks.py.
enum Estimator : int { STE, LSQ, LSQ_PLUS, EWGS, PACT, DOREFA };
constexpr bool has_offset(int estimator) { return estimator == LSQ_PLUS || estimator == EWGS; }
constexpr bool learns_scale(int estimator) { return estimator != STE && estimator != DOREFA; }

template <int estimator>
struct Is {
  static constexpr int value = estimator;
};
// body(Is<estimator>{}), so that the inner loops know the estimator.
template <class Body>
static inline void with_estimator(int estimator, const Body& body) {
  if (estimator == STE) body(Is<STE>{});
  if (estimator == LSQ) body(Is<LSQ>{});
  if (estimator == LSQ_PLUS) body(Is<LSQ_PLUS>{});
  if (estimator == EWGS) body(Is<EWGS>{});
  if (estimator == PACT) body(Is<PACT>{});
  if (estimator == DOREFA) body(Is<DOREFA>{});
}

struct Grid {
  const float* scale;
  const float* zero;  // zero point or offset; may be null: 0
  float low, high;    // of the codes
  float bend;         // of EWGS: delta / (high - low)
};

// What some values share, a number a lane.
struct Step {
  vf scale, inverse, zero, low, high;
};
static inline Step step_of(const Grid& grid, std::int64_t i) {
  return {set1(grid.scale[i]), set1(1.0f / grid.scale[i]), set1(grid.zero ? grid.zero[i] : 0.0f), set1(grid.low),
          set1(grid.high)};
}

struct Sums {
  double scale, offset;
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
static inline Step steps_of(const Grid& grid, std::int64_t i, int n) {
  const vf scale = get(grid.scale + i, n);
  return {scale, div(set1(1.0f), scale), grid.zero ? get(grid.zero + i, n) : zero(), set1(grid.low), set1(grid.high)};
}
static inline vf first_lanes(vf x, int n) { return n == W ? x : select(lanes(n), x, zero()); }

// min and max give their second argument where one is NaN: NaN passes.
template <int estimator>
static inline vf forward(vf x, const Step& p) {
  if constexpr (has_offset(estimator)) {
    const vf v = mul(sub(x, p.zero), p.inverse);
    return add(mul(round(min(p.high, max(p.low, v))), p.scale), p.zero);
  } else {
    const vf code = min(p.high, max(p.low, add(round(mul(x, p.inverse)), p.zero)));
    return mul(sub(code, p.zero), p.scale);
  }
}

// Gradient of x, and what the value adds to the gradients of scale and offset.
struct Gradients {
  vf x, scale, offset;
};
template <int estimator>
static inline Gradients backward(vf g, vf x, const Step& p, float bend) {
  if constexpr (estimator == DOREFA) return {g, zero(), zero()};
  const bool offset = has_offset(estimator);
  const vf v = mul(offset ? sub(x, p.zero) : x, p.inverse);
  const vf low = offset ? p.low : sub(p.low, p.zero), high = offset ? p.high : sub(p.high, p.zero);
  const vm below = estimator == PACT ? less_equal(v, low) : less(v, low);
  const vm above = estimator == PACT ? less_equal(high, v) : less(high, v);
  const vf residual = sub(round(v), v);
  const vf bent = estimator == EWGS ? mul(mul(set1(bend), abs(g)), residual) : mul(zero(), v);  // NaN where v is
  // Inside: neither below nor above, nor NaN, whose gradient is 0.
  const vf dx = select(less(v, set1(__builtin_inff())), estimator == EWGS ? sub(g, bent) : g, zero());
  const vf inside = estimator == PACT ? bent : estimator == EWGS ? fma(g, residual, mul(bent, v)) : mul(g, residual);
  return {select(below, zero(), select(above, zero(), dx)),
          select(below, mul(g, low), select(above, mul(g, high), inside)), select(below, g, select(above, g, bent))};
}

template <int estimator, class T>
static void forward_piece(const T* x, std::int64_t count, const Step& p, T* out) {
  for (std::int64_t i = 0; i < count; i += W) {
    const int n = count - i < W ? static_cast<int>(count - i) : W;
    put(out + i, forward<estimator>(get(x + i, n), p), n);
  }
}

template <int estimator, class T>
static Sums backward_piece(const T* grad, const T* x, std::int64_t count, const Step& p, float bend, T* dx) {
  vf scale[4] = {zero(), zero(), zero(), zero()}, offset[4] = {zero(), zero(), zero(), zero()};
  int turn = 0;
  for (std::int64_t i = 0; i < count; i += W, turn = (turn + 1) & 3) {
    const int n = count - i < W ? static_cast<int>(count - i) : W;
    const Gradients d = backward<estimator>(get(grad + i, n), get(x + i, n), p, bend);
    put(dx + i, d.x, n);
    if constexpr (learns_scale(estimator)) scale[turn] = add(scale[turn], first_lanes(d.scale, n));
    if constexpr (has_offset(estimator)) offset[turn] = add(offset[turn], first_lanes(d.offset, n));
  }
  return {static_cast<double>(reduce_add(add(add(scale[0], scale[1]), add(scale[2], scale[3])))),
          static_cast<double>(reduce_add(add(add(offset[0], offset[1]), add(offset[2], offset[3]))))};
}

// body(item, begin, size, scale) for every piece of every run.
template <class Body>
static void for_pieces(const Layout& layout, int threads, const Body& body) {
  const std::int64_t pieces = layout.pieces(), length = layout.length < piece ? layout.length : piece;
  parallel_for(threads, layout.runs * pieces, 16384 / (length + 1) + 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t item = first; item < last; ++item) {
      const std::int64_t run = item / pieces, skip = item % pieces * piece, size = layout.size(run) - skip;
      body(item, layout.begin(run) + skip, size < piece ? size : piece, run % layout.scales);
    }
  });
}

template <int estimator, class T>
static void forward_runs(const T* x, const Layout& layout, const Grid& grid, T* out, int threads) {
  for_pieces(layout, threads, [&](std::int64_t, std::int64_t at, std::int64_t size, std::int64_t c) {
    if (size > 0) forward_piece<estimator>(x + at, size, step_of(grid, c), out + at);
  });
}

template <int estimator, class T>
static void backward_runs(const T* grad, const T* x, const Layout& layout, const Grid& grid, T* dx, Sums* partial,
                          int threads) {
  for_pieces(layout, threads, [&](std::int64_t item, std::int64_t at, std::int64_t size, std::int64_t c) {
    partial[item] = {0.0, 0.0};
    if (size > 0)
      partial[item] = backward_piece<estimator>(grad + at, x + at, size, step_of(grid, c), grid.bend, dx + at);
  });
}

// Every column has its own scale: rows x columns values, neighbours differ in scale.
template <int estimator, class T>
static void forward_columns(const T* x, std::int64_t rows, std::int64_t columns, const Grid& grid, T* out,
                            int threads) {
  parallel_for(threads, rows, 16384 / (columns + 1) + 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row)
      for (std::int64_t i = 0; i < columns; i += W) {
        const int n = columns - i < W ? static_cast<int>(columns - i) : W;
        const std::int64_t at = row * columns + i;
        put(out + at, forward<estimator>(get(x + at, n), steps_of(grid, i, n)), n);
      }
  });
}

template <int estimator, class T>
static void backward_columns(const T* grad, const T* x, std::int64_t rows, std::int64_t columns, const Grid& grid,
                             T* dx, Sums* partial, int threads) {
  const std::int64_t blocks = (rows + row_block - 1) / row_block;
  parallel_for(threads, blocks, 16384 / (row_block * columns + 1) + 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t block = first; block < last; ++block) {
      const std::int64_t end = (block + 1) * row_block < rows ? (block + 1) * row_block : rows;
      for (std::int64_t i = 0; i < columns; i += W) {
        const int n = columns - i < W ? static_cast<int>(columns - i) : W;
        const Step p = steps_of(grid, i, n);
        vf scale = zero(), offset = zero();
        for (std::int64_t row = block * row_block; row < end; ++row) {
          const std::int64_t at = row * columns + i;
          const Gradients d = backward<estimator>(get(grad + at, n), get(x + at, n), p, grid.bend);
          put(dx + at, d.x, n);
          if constexpr (learns_scale(estimator)) scale = add(scale, d.scale);
          if constexpr (has_offset(estimator)) offset = add(offset, d.offset);
        }
        float scales[W], offsets[W];
        store(scales, scale);
        store(offsets, offset);
        for (int lane = 0; lane < n; ++lane)
          partial[block * columns + i + lane] = {static_cast<double>(scales[lane]), static_cast<double>(offsets[lane])};
      }
    }
  });
}

static inline bool by_columns(const Layout& layout) { return layout.length == 1 && layout.scales > 1; }

}  // namespace

extern "C" {

void QK_IMPL(fake_quantize)(const void* x, int type, std::int64_t runs, std::int64_t length, std::int64_t period,
                            std::int64_t last, std::int64_t scales, const float* scale, const float* zero_point,
                            float low, float high, int estimator, void* out, int threads) {
  const Layout layout{runs, length, period, last, scales};
  const Grid grid{scale, zero_point, low, high, 0.0f};
  const auto run = [&](auto is, const auto* typed, auto* target) {
    constexpr int which = decltype(is)::value;
    if (by_columns(layout))
      forward_columns<which>(typed, runs / scales, scales, grid, target, threads);
    else
      forward_runs<which>(typed, layout, grid, target, threads);
  };
  // Only the offset changes the forward half: two of the estimators stand for all.
  with_estimator(has_offset(estimator) ? LSQ_PLUS : STE, [&](auto is) {
    if (type == QK_F32) run(is, static_cast<const float*>(x), static_cast<float*>(out));
    if (type == QK_BF16) run(is, static_cast<const bf16*>(x), static_cast<bf16*>(out));
    if (type == QK_F16) run(is, static_cast<const f16*>(x), static_cast<f16*>(out));
  });
}

// `dscale` and `doffset` may be null: the estimator has no gradient of the scale, or nobody wants that of the offset.
void QK_IMPL(fake_quantize_backward)(const void* grad, const void* x, int type, std::int64_t runs, std::int64_t length,
                                     std::int64_t period, std::int64_t last, std::int64_t scales, const float* scale,
                                     const float* zero_point, float low, float high, int estimator, float grad_scale,
                                     float bend, void* dx, float* dscale, float* doffset, int threads) {
  const Layout layout{runs, length, period, last, scales};
  const Grid grid{scale, zero_point, low, high, bend};
  // Partial sums: those of a scale lie in groups of `together` neighbours, one group per row or run of the scale.
  const bool columns = by_columns(layout);
  const std::int64_t pieces = layout.pieces(), rows = scales ? runs / scales : 0;
  const std::int64_t count = columns ? (rows + row_block - 1) / row_block * scales : runs * pieces;
  auto* partial = static_cast<Sums*>(qk_workspace(QK_SLOT_SHARED, static_cast<std::size_t>(count) * sizeof(Sums)));
  const auto run = [&](auto is, const auto* g, const auto* typed, auto* target) {
    constexpr int which = decltype(is)::value;
    if (columns)
      backward_columns<which>(g, typed, rows, scales, grid, target, partial, threads);
    else
      backward_runs<which>(g, typed, layout, grid, target, partial, threads);
  };
  with_estimator(estimator, [&](auto is) {
    if (type == QK_F32) run(is, static_cast<const float*>(grad), static_cast<const float*>(x), static_cast<float*>(dx));
    if (type == QK_BF16) run(is, static_cast<const bf16*>(grad), static_cast<const bf16*>(x), static_cast<bf16*>(dx));
    if (type == QK_F16) run(is, static_cast<const f16*>(grad), static_cast<const f16*>(x), static_cast<f16*>(dx));
  });
  if (dscale == nullptr) return;
  const std::int64_t together = columns ? 1 : pieces;
  parallel_for(threads, scales, 4096, [&](std::int64_t first, std::int64_t end) {
    for (std::int64_t c = first; c < end; ++c) {
      Sums sum{0.0, 0.0};
      for (std::int64_t at = c * together; at < count; at += scales * together)
        for (std::int64_t j = 0; j < together; ++j) {
          sum.scale += partial[at + j].scale;
          sum.offset += partial[at + j].offset;
        }
      dscale[c] = static_cast<float>(sum.scale * static_cast<double>(grad_scale));
      if (doffset) doffset[c] = static_cast<float>(sum.offset * static_cast<double>(grad_scale));
    }
  });
}
}
