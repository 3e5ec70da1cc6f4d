// What follows a matrix product, on a tile that is still in registers (the linear part) or in the L1 cache (the rest):
//   y = activation(fma(float(accumulator), row_scale * column_scale, bias)) + residual,
// then float32, bfloat16 or float16, or int8 with a static scale, or int8 with one dynamic scale for
// each 128 columns of a row.
#pragma once

#include "vmath.h"

namespace {

constexpr int kPanel = 64;  // output columns of a packed panel
constexpr int kTile = 6;    // most rows of a register tile
constexpr int kGroup = 128;

enum Activation : int { kNone = 0, kGelu = 1, kQuickGelu = 2, kGeluTanh = 3 };

struct Epilogue {
  const float* row_scale;     // nullptr: 1
  bool row_scale_shared;      // one number for all rows
  const float* column_scale;  // nullptr: 1
  const float* bias;          // nullptr: 0
  int activation;
  const void* residual;  // [M, N] or nullptr
  int residual_type;
  void* out;  // [M, N]
  int out_type;
  const float* out_scale;  // int8 with a static scale: one number, or [N]
  bool out_scale_per_column;
  const float* out_zero_point;  // nullptr: 0; one number, or [N]
  bool out_zero_point_per_column;
  float* group_scales;   // [M, ceil(N / 128)]: int8 with dynamic groups; else nullptr
  std::int64_t columns;  // N
};

static inline vf as_floats(const std::int32_t* p) { return to_float(load(p)); }
static inline vf as_floats(const float* p) { return load(p); }

// The linear part, fma(float(accumulator), row_scale * column_scale, bias), of one tile: what it needs as plain arrays.
struct Linear {
  float rows[kTile];
  const float* columns;  // [64]
  const float* bias;     // [64]
};

alignas(64) static const float kNoBias[kPanel] = {};
alignas(64) static const float kNoScale[kPanel] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                                   1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                                   1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// 64 values from `column` on: in place, or where the matrix ends sooner copied to `room`.
static inline const float* panel_columns(const float* values, const float* none, std::int64_t column,
                                         std::int64_t columns, float* room) {
  if (values == nullptr) return none;
  if (column + kPanel <= columns) return values + column;
  for (int j = 0; j < kPanel; ++j) room[j] = column + j < columns ? values[column + j] : 0.0f;
  return room;
}

// `room` [128] must live as long as the result.
static inline Linear linear_of(const Epilogue& e, int rows, std::int64_t row, std::int64_t column, float* room) {
  Linear l;
  for (int r = 0; r < rows; ++r) l.rows[r] = e.row_scale ? e.row_scale[e.row_scale_shared ? 0 : row + r] : 1.0f;
  l.columns = panel_columns(e.column_scale, kNoScale, column, e.columns, room);
  l.bias = panel_columns(e.bias, kNoBias, column, e.columns, room + kPanel);
  return l;
}

// to[rows, 64] = the linear part of acc[rows, 64], which may be the same memory.
template <class Acc>
static inline void apply(const Linear& l, const Acc* acc, int rows, float* to, std::int64_t stride) {
  for (int j = 0; j < kPanel; j += W) {
    const vf scale = load(l.columns + j), bias = load(l.bias + j);
    for (int r = 0; r < rows; ++r)
      store(to + r * stride + j, fma(as_floats(acc + r * kPanel + j), mul(set1(l.rows[r]), scale), bias));
  }
}

static inline vf load_any(const void* p, int type, std::int64_t at, int n) {
  if (type == QK_F32)
    return n == W ? load(static_cast<const float*>(p) + at) : load(static_cast<const float*>(p) + at, n);
  if (type == QK_BF16)
    return n == W ? load(static_cast<const bf16*>(p) + at) : load(static_cast<const bf16*>(p) + at, n);
  return n == W ? load(static_cast<const f16*>(p) + at) : load(static_cast<const f16*>(p) + at, n);
}

static inline vf load_columns(const float* p, std::int64_t at, int n) {
  return n == W ? load(p + at) : load(p + at, n);
}

template <int activation, int N>
static inline void activate(vf (&y)[N]) {
  if (activation == kGelu) gelu(y);
  if (activation == kQuickGelu) quick_gelu(y);
  if (activation == kGeluTanh) gelu_tanh(y);
}

// clamp(rne(y * inverse) + zero_point, -127, 127), 0 where y is not finite. Clamping to whole numbers before rounding
// is the same.
static inline vi static_code(vf y, vf inverse, vf low, vf high, vi zero_point) {
  const vi code = add(to_int(max(low, min(high, mul(y, inverse)))), zero_point);
  return select(finite(y), code, set1(0));
}

struct Grid8 {  // what an int8 result of some columns needs
  vf inverse, low, high;
  vi zero_point;
};
static inline Grid8 grid8(vf inverse, vf zero_point) {
  return {inverse, sub(set1(-127.0f), zero_point), sub(set1(127.0f), zero_point), to_int(zero_point)};
}

// The static grid of each column of a panel as arrays: inverse, low and high as float [64], zero point as int32 [64].
constexpr int kGridFloats = 4 * kPanel;

static void fill_grid(const Epilogue& e, std::int64_t column, float* to) {
  for (int j = 0; j < kPanel; j += W) {
    const std::int64_t left = e.columns - column - j;
    const int n = left <= 0 ? 0 : left < W ? static_cast<int>(left) : W;
    if (n == 0) return;
    vf scale = set1(*e.out_scale), zero_point = zero();
    if (e.out_scale_per_column) scale = load_columns(e.out_scale, column + j, n);
    if (e.out_zero_point)
      zero_point =
          e.out_zero_point_per_column ? load_columns(e.out_zero_point, column + j, n) : set1(*e.out_zero_point);
    const Grid8 g = grid8(div(set1(1.0f), scale), zero_point);
    store(to + j, g.inverse);
    store(to + kPanel + j, g.low);
    store(to + 2 * kPanel + j, g.high);
    store(reinterpret_cast<std::int32_t*>(to + 3 * kPanel) + j, g.zero_point);
  }
}

// The grids of panels first..last in `room`, which has space for them where has_grid.
static inline bool has_grid(const Epilogue& e) { return e.out_type == QK_I8 && !e.group_scales; }
static inline void fill_grids(const Epilogue& e, std::int64_t first, std::int64_t last, float* room) {
  if (!has_grid(e)) return;
  for (std::int64_t p = first; p < last; ++p) fill_grid(e, p * kPanel, room + (p - first) * kGridFloats);
}

static inline void store_as(float* p, vf y, const Grid8&, int n) { n == W ? store(p, y) : store(p, y, n); }
#if defined(QK_TIER_avx512vnni)
static const struct {
  std::int32_t one, half, nan;
} bf16_table = {1, 0x7fff, 0x7fc0};

// store() of simd.h with its constants read at use.
static inline void store_as(bf16* p, vf y, const Grid8&, int n) {
  const auto& t = at_use(bf16_table);
  const vi u = as_int(y), odd = bit_and(shift_right<16>(u), set1(t.one));
  const vi rounded = _mm512_srli_epi32(add(u, add(odd, set1(t.half))), 16);
  const __m256i words = _mm512_cvtepi32_epi16(select(_mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), set1(t.nan), rounded));
  n == W ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words) : _mm256_mask_storeu_epi16(p, first(n), words);
}
#else
static inline void store_as(bf16* p, vf y, const Grid8&, int n) { n == W ? store(p, y) : store(p, y, n); }
#endif
static inline void store_as(f16* p, vf y, const Grid8&, int n) { n == W ? store(p, y) : store(p, y, n); }
static inline void store_as(std::int8_t* p, vf y, const Grid8& g, int n) {
  const vi code = static_code(y, g.inverse, g.low, g.high, g.zero_point);
  n == W ? store(p, code) : store(p, code, n);
}

template <class Out>
static inline Grid8 grid_at(const float* grid, int j) {
  if (sizeof(Out) > 1) return grid8(set1(1.0f), zero());
  return {load(grid + j), load(grid + kPanel + j), load(grid + 2 * kPanel + j),
          load(reinterpret_cast<const std::int32_t*>(grid + 3 * kPanel) + j)};
}

// A tile whose linear part y[rows, 64] waits for the rest of its epilogue.
struct Pending {
  int rows = 0;
  std::int64_t row, column;
  const float* y;
  const float* grid;  // of its panel, where has_grid
};

// N vectors of row r from column j on; n is W but for the last columns of the matrix, which come alone.
template <int activation, bool residual, int N = 1, class Out>
static inline void finish_vector(const Epilogue& e, const Pending& p, int r, int j, int n, Out* to) {
  vf y[N];
  for (int v = 0; v < N; ++v) y[v] = load(p.y + r * kPanel + j + v * W);
  activate<activation>(y);
  for (int v = 0; v < N; ++v, j += W) {
    if (residual && e.residual)
      y[v] = add(y[v], load_any(e.residual, e.residual_type, (p.row + r) * e.columns + p.column + j, n));
    store_as(to + j, y[v], grid_at<Out>(p.grid, j), n);
  }
}

template <int activation, class Out>
static void finish_tile(const Epilogue& e, const Pending& p, Out* to, std::int64_t stride) {
  const std::int64_t left = e.columns - p.column;
  for (int r = 0; r < p.rows; ++r, to += stride) {
    if (left >= kPanel) {
      for (int j = 0; j < kPanel; j += kTogether * W) finish_vector<activation, true, kTogether>(e, p, r, j, W, to);
    } else {
      for (int j = 0; j < left; j += W)
        finish_vector<activation, true>(e, p, r, j, left - j < W ? static_cast<int>(left) - j : W, to);
    }
  }
}

template <class Out>
static void finish_activation(const Epilogue& e, const Pending& p, Out* to, std::int64_t stride) {
  switch (e.activation) {
    case kGelu:
      return finish_tile<kGelu>(e, p, to, stride);
    case kQuickGelu:
      return finish_tile<kQuickGelu>(e, p, to, stride);
    case kGeluTanh:
      return finish_tile<kGeluTanh>(e, p, to, stride);
    default:
      return finish_tile<kNone>(e, p, to, stride);
  }
}

// Dynamic rule over the n <= 128 values of each row in `y` (row stride 128).
static void quantize_groups(const Epilogue& e, const float* y, int rows, std::int64_t row, std::int64_t column) {
  const std::int64_t left = e.columns - column, groups = (e.columns + kGroup - 1) / kGroup;
  const int width = left < kGroup ? static_cast<int>(left) : kGroup;
  for (int r = 0; r < rows; ++r, y += kGroup) {
    std::int8_t* codes = static_cast<std::int8_t*>(e.out) + (row + r) * e.columns + column;
    vi largest = set1(0);  // on the bits, so that Inf and NaN win
    for (int j = 0; j < width; j += W) {
      const vf v = width - j < W ? load(y + j, width - j) : load(y + j);
      largest = max(largest, bit_and(as_int(v), set1(0x7fffffff)));
    }
    const float absmax = float_of(static_cast<std::uint32_t>(reduce_max(largest)));
    float scale = absmax / 127.0f, inverse = 127.0f / absmax;
    if (!(absmax < __builtin_inff())) {
      scale = __builtin_nanf("");
      inverse = 0.0f;
    } else if (absmax < 0x1p-100f) {
      scale = 1.0f;
      inverse = 0.0f;
    }
    e.group_scales[(row + r) * groups + column / kGroup] = scale;
    const Grid8 grid = grid8(set1(inverse), zero());
    for (int j = 0; j < width; j += W) {
      const int n = width - j < W ? width - j : W;
      store_as(codes + j, n == W ? load(y + j) : load(y + j, n), grid, n);
    }
  }
}

// The cache lines that the epilogue of a tile will read from the residual and write.
struct Touched {
  struct Block {
    const char* at = nullptr;
    std::int64_t row_bytes = 0;  // from one row to the next
    int row_lines = 0;
  } residual, out;

  Touched(const Epilogue& e, std::int64_t row, std::int64_t column) {
    const std::int64_t left = e.columns - column, at = row * e.columns + column;
    const int width = left < kPanel ? static_cast<int>(left) : kPanel;
    if (e.residual) residual = block(e.residual, e.residual_type, at, e.columns, width);
    out = block(e.out, e.out_type, at, e.columns, width);
  }
  void ask(std::int64_t r) const {
    for (int i = 0; i < residual.row_lines; ++i) __builtin_prefetch(residual.at + r * residual.row_bytes + 64 * i, 0);
    for (int i = 0; i < out.row_lines; ++i) __builtin_prefetch(out.at + r * out.row_bytes + 64 * i, 1);
  }

 private:
  static Block block(const void* matrix, int type, std::int64_t at, std::int64_t columns, int width) {
    const int size = type == QK_F32 ? 4 : type == QK_I8 ? 1 : 2;
    return {static_cast<const char*>(matrix) + at * size, columns * size, (width * size + 63) / 64};
  }
};

// Whether the linear part of the panel at `column` is the result, so that it can be written at its place at once.
static inline bool linear_is_all(const Epilogue& e, std::int64_t column) {
  return e.out_type == QK_F32 && e.activation == kNone && !e.residual && !e.group_scales &&
         column + kPanel <= e.columns;
}

// Finishes a tile; with dynamic groups the result waits in `pair` ([kTile, 128] floats) until its second panel came.
static void finish(const Epilogue& e, const Pending& p, float* pair) {
  const std::int64_t at = p.row * e.columns + p.column;
  if (e.group_scales) {
    finish_activation(e, p, pair + p.column % kGroup, kGroup);
    if (p.column % kGroup != 0 || p.column + kPanel >= e.columns)
      quantize_groups(e, pair, p.rows, p.row, p.column / kGroup * kGroup);
    return;
  }
  switch (e.out_type) {
    case QK_F32:
      return finish_activation(e, p, static_cast<float*>(e.out) + at, e.columns);
    case QK_BF16:
      return finish_activation(e, p, static_cast<bf16*>(e.out) + at, e.columns);
    case QK_F16:
      return finish_activation(e, p, static_cast<f16*>(e.out) + at, e.columns);
    default:
      return finish_activation(e, p, static_cast<std::int8_t*>(e.out) + at, e.columns);
  }
}

}  // namespace
