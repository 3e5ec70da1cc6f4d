// Register tiles of int8_linear: acc[rows, 64] = start + x . panel^T for up to kTile rows, and the linear part of the
// epilogue on them. Those of avx512vnni are here, of avx2 in int8_avx2.h, of the other tiers in int8_strips.h. x comes
// as rows of Element, which `copy_row` makes; here x + 128 as uint8 (vpdpbusd multiplies u8 by s8), and the accumulator
// starts at -128 * sum_k w, made when packing.
#pragma once

#include "blocking.h"

#if defined(QK_TIER_avx2) && !defined(QK_TIER_avxvnni)
#include "int8_avx2.h"
#else
namespace {

using Panel = const std::int8_t*;  // a panel of weights, as packed
static inline Panel panel_of(const std::int8_t* packed) { return packed; }
static inline Panel from_step(Panel panel, std::int64_t step) { return panel + 4 * kPanel * step; }
constexpr int kRowsToCopyFor = 0;  // never
static inline Panel copied_panel(const std::int8_t* copy, std::int64_t) { return copy; }
static inline void copy_panel(const std::int8_t*, std::int64_t, std::int8_t*) {}

// The sums that a tile starts from: one row of 64 for all its rows (stride 0), or the sums over earlier k.
struct Start {
  const std::int32_t* at;
  std::int64_t stride;
};

}  // namespace
#if !defined(QK_TIER_avx512vnni)
#include "int8_strips.h"
#endif
#endif

namespace {

#if defined(QK_TIER_avx512vnni)
using Element = std::uint8_t;
#endif

#if !defined(QK_TIER_avx2) || defined(QK_TIER_avxvnni)
static inline std::int64_t row_elements(std::int64_t k) { return round_up(k, 64); }
// What a row of x starts from beside these start values of the columns: nothing.
static inline Start start_of(const std::int32_t* columns, const Element*, std::int64_t, std::int64_t) {
  return {columns, 0};
}
static inline Start start_of_group(const std::int32_t* columns, const Element*, std::int64_t, std::int64_t,
                                   std::int64_t) {
  return {columns, 0};
}
#endif

// One tile of a product, and where the linear part of its epilogue goes.
struct Job {
  const Element* a;
  std::int64_t stride;
  Panel panel;
  std::int64_t steps;
  Start start;
  Linear linear;
  Touched touched;
  float* to;
  std::int64_t to_stride;
  const std::int8_t* coming;  // weights that are multiplied soon: of these the tile brings some lines into L2,
  int coming_lines;           // so many at a time
};

#if defined(QK_TIER_avx512vnni)

static inline void copy_row(const std::int8_t* x, std::int64_t k, Element* to) {
  const __m512i flip = _mm512_set1_epi8(-128);
  std::int64_t i = 0;
  for (; i + 64 <= k; i += 64) _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(x + i), flip));
  if (i < k) {
    const __mmask64 rest = (__mmask64{1} << (k - i)) - 1;
    _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, x + i), flip));
  }
}

// acc += four products of unsigned a and signed b in each int32 lane. As an intrinsic, GCC 12 copies and spills the
// accumulators.
static inline void dot(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

// c[rows][4 x 16] = start
template <int rows>
static inline void begin(__m512i (&c)[rows][4], Start start) {
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) c[r][j] = _mm512_loadu_si512(start.at + r * start.stride + 16 * j);
  }
}

// c += a[rows, 4 * steps] . panel^T; a and panel move on.
template <int rows>
[[gnu::always_inline]] static inline void accumulate(__m512i (&c)[rows][4], const Element*& a, std::int64_t stride,
                                                     const std::int8_t*& panel, std::int64_t steps) {
#pragma GCC unroll 1
  for (; steps > 0; --steps, panel += 256, a += 4) {
    __m512i b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) b[j] = _mm512_loadu_si512(panel + 64 * j);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      std::int32_t four;
      std::memcpy(&four, a + r * stride, 4);
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) dot(c[r][j], x, b[j]);
    }
  }
}

template <int rows>
[[gnu::noinline]] static void tile(const Element* a, std::int64_t stride, const std::int8_t* panel, std::int64_t steps,
                                   Start start, std::int32_t* acc) {
  __m512i c[rows][4];
  begin(c, start);
  accumulate(c, a, stride, panel, steps);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(acc + r * kPanel + 16 * j, c[r][j]);
  }
}

// The linear part of a tile, straight from the registers. Along the way, between steps of the product, what the
// epilogue will touch is asked for line by line (misses all at once hold up the loads of the panel, and stores that
// miss hold up the next tile), and Finish works on the tile before, on ports that the product leaves idle.
template <int rows, class Finish>
[[gnu::noinline]] static void linear_tile(const Job& job, const Epilogue& e, const Pending& before) {
  __m512i c[rows][4];
  begin(c, job.start);
  const Element* a = job.a;
  const std::int8_t* panel = job.panel;
  std::int64_t steps = job.steps;
  const int parts = Finish::works ? before.rows : rows, every = static_cast<int>(steps) / (4 * parts + 1);
  const char *line = job.touched.out.at, *residual_line = job.touched.residual.at;
  const std::int8_t* coming = job.coming;
#pragma GCC unroll 1
  for (int r = 0; r < parts; ++r) {
#pragma GCC unroll 1
    for (int j = 0; j < 4; ++j, steps -= every) {
      if (j < job.touched.out.row_lines) __builtin_prefetch(line + 64 * j, 1);
      if (j < job.touched.residual.row_lines) __builtin_prefetch(residual_line + 64 * j, 0);
#pragma GCC unroll 1
      for (int i = 0; i < job.coming_lines; ++i, coming += 64) __builtin_prefetch(coming, 0, 2);
      accumulate(c, a, job.stride, panel, every);
      Finish::vector(e, before, r, 16 * j);
    }
    line += job.touched.out.row_bytes;
    residual_line += job.touched.residual.row_bytes;
  }
  accumulate(c, a, job.stride, panel, steps);
  // Pointers as locals: behind a store through `to`, compilers would read those of `job` again.
  const float *const columns = job.linear.columns, *const bias = job.linear.bias;
  float* const to = job.to;
  const std::int64_t to_stride = job.to_stride;
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const vf column_scale = load(columns + 16 * j), shift = load(bias + 16 * j);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r)
      store(to + r * to_stride + 16 * j, fma(to_float(c[r][j]), mul(set1(job.linear.rows[r]), column_scale), shift));
  }
}

struct FinishNothing {
  static constexpr bool works = false;
  static void vector(const Epilogue&, const Pending&, int, int) {}
};
template <int activation, bool residual, class Out>
struct FinishTile {
  static constexpr bool works = true;
  static void vector(const Epilogue& e, const Pending& p, int r, int j) {
    Out* to = static_cast<Out*>(e.out) + (p.row + r) * e.columns + p.column;
    finish_vector<activation, residual>(e, p, r, j, W, to);
  }
};

// Whether a tile of `rows` rows may wait to be finished within the next one. Smaller tiles have few neighbours, and
// wait for weights, not for ports.
static inline bool can_wait(const Epilogue& e, int rows, std::int64_t column) {
  return rows >= 5 && !e.group_scales && column + kPanel <= e.columns && !(e.residual && e.activation != kNone);
}

template <int rows, class Out>
static void linear_tile_finishing(const Job& job, const Epilogue& e, const Pending& before) {
  if (e.residual) return linear_tile<rows, FinishTile<kNone, true, Out>>(job, e, before);
  switch (e.activation) {
    case kGelu:
      return linear_tile<rows, FinishTile<kGelu, false, Out>>(job, e, before);
    case kQuickGelu:
      return linear_tile<rows, FinishTile<kQuickGelu, false, Out>>(job, e, before);
    case kGeluTanh:
      return linear_tile<rows, FinishTile<kGeluTanh, false, Out>>(job, e, before);
    default:
      return linear_tile<rows, FinishTile<kNone, false, Out>>(job, e, before);
  }
}

template <int rows>
static void linear_tile(const Job& job, const Epilogue& e, const Pending& before) {
  if constexpr (rows >= 5) {
    if (before.rows) {
      switch (e.out_type) {
        case QK_F32:
          return linear_tile_finishing<rows, float>(job, e, before);
        case QK_BF16:
          return linear_tile_finishing<rows, bf16>(job, e, before);
        case QK_F16:
          return linear_tile_finishing<rows, f16>(job, e, before);
        default:
          return linear_tile_finishing<rows, std::int8_t>(job, e, before);
      }
    }
  }
  if (before.rows) finish(e, before, nullptr);
  linear_tile<rows, FinishNothing>(job, e, before);
}

constexpr bool kShifted = true;

#else

template <int rows>
static void linear_tile(const Job& job, const Epilogue&, const Pending&) {
#if defined(QK_TIER_avx2) && !defined(QK_TIER_avxvnni)
  strips<Flipped, rows>(job.a, job.stride, job.panel, job.steps, job.start, Scale{job.linear, job.to, job.to_stride});
#else
  alignas(64) std::int32_t acc[rows * kPanel];
  tile<rows>(job.a, job.stride, job.panel, job.steps, job.start, acc);
  apply(job.linear, acc, rows, job.to, job.to_stride);
#endif
}
static inline bool can_wait(const Epilogue&, int, std::int64_t) { return false; }
#endif

static void tile_of(int rows, const Element* a, std::int64_t stride, Panel panel, std::int64_t steps, Start start,
                    std::int32_t* acc) {
  QK_BY_ROWS(tile, rows, a, stride, panel, steps, start, acc)
}

static void linear_tile_of(int rows, const Job& job, const Epilogue& e, const Pending& before) {
  QK_BY_ROWS(linear_tile, rows, job, e, before)
}

}  // namespace
