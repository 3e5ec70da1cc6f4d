// Register tiles of int4_linear with int8 activations (W4A8): total[rows, 64] = sum over groups of
// scale * (x . codes - zero * sum(x)) for up to kTile rows. The nibbles are unpacked in registers. avx2 has strips
// instead (int4_strips.h).
#pragma once

#include "int4_codes.h"

namespace {

// The linear part of the epilogue, and where it goes.
struct Last {
  Linear linear;
  float* to;
  std::int64_t stride;
};

#if defined(QK_TIER_avx512vnni)

// c += x . codes over `steps` steps of a panel; a and panel move on.
template <int rows>
[[gnu::always_inline]] static inline void accumulate(__m512i (&c)[rows][4], const std::int8_t*& a, std::int64_t stride,
                                                     const std::uint8_t*& panel, std::int64_t steps) {
  const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 1
  for (; steps > 0; --steps, panel += kStepBytes, a += kStep) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const std::uint8_t* from = panel;
      __asm__ volatile("" : "+r"(from));  // read for each half: no register is left to keep bytes for the second one
      __m512i b[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m512i bytes = _mm512_loadu_si512(from + 64 * j);
        if (half) bytes = _mm512_srli_epi16(bytes, 4);
        b[j] = _mm512_and_si512(bytes, low);
      }
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        std::int32_t four;
        std::memcpy(&four, a + r * stride + 4 * half, 4);
        const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) dot(c[r][j], b[j], x);
      }
    }
  }
}

// The last step of a group, row by row: a row's sums are whole, and done(row) stores them, while the rows behind it
// still multiply. All of them behind the last product would hold it up: a processor that stores a vector in two cycles
// has no room for 24. `high`: 256 bytes for half of the codes, for which no register is left.
template <int rows, class Done>
[[gnu::always_inline]] static inline void last_step(__m512i (&c)[rows][4], const std::int8_t* a, std::int64_t stride,
                                                    const std::uint8_t* panel, std::uint8_t* high, const Done& done) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512i b[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i bytes = _mm512_loadu_si512(panel + 64 * j);
    _mm512_store_si512(high + 64 * j, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low));
  }
  __asm__ volatile("" : "+r"(panel));  // read again, as above
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) b[j] = _mm512_and_si512(_mm512_loadu_si512(panel + 64 * j), low);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    std::int32_t four[2];
    std::memcpy(four, a + r * stride, 8);
    const __m512i first = _mm512_set1_epi32(four[0]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) dot(c[r][j], b[j], first);
    const __m512i second = _mm512_set1_epi32(four[1]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const std::uint8_t* from = high + 64 * j;
      __asm__ volatile("" : "+r"(from)::"memory");
      dot(c[r][j], _mm512_load_si512(from), second);
    }
    done(r);
  }
}

// One group of one panel, and what of x belongs to it.
struct Group {
  const float *scales, *zeros;  // [64]
  const std::int8_t* a;
  const std::uint8_t* panel;
  std::int64_t stride, steps;
  std::int32_t start[kTile];
  float row_sums[kTile], row_scales[kTile];
};

// The sums of 16 columns of a group, scaled and added to `before`. `general`: with zeros, or one x_scale for each 128
// k.
template <bool general>
static inline vf scaled(const Group& g, int r, int j, vf sum, vf before) {
  if (!general) return fma(sum, load(g.scales + j), before);
  if (g.zeros) sum = fnma(load(g.zeros + j), set1(g.row_sums[r]), sum);
  return fma(sum, mul(load(g.scales + j), set1(g.row_scales[r])), before);
}

// The product of a group. The sums acc[rows, 64] of the group before it are added to `total` along the way, while the
// product leaves ports idle. Its own go to `acc` ([rows + 1, 64]: the last row is room for last_step), or with the last
// group straight through the linear part of the epilogue.
template <int rows, bool general>
[[gnu::noinline]] static void group_tile(const Group& g, const Group* before, const Last* last, std::int32_t* acc,
                                         float* total) {
  __m512i c[rows][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) c[r][j] = _mm512_set1_epi32(g.start[r]);
  }
  const std::int8_t* a = g.a;
  const std::uint8_t* panel = g.panel;
  std::int64_t steps = g.steps;
  if (before) {
    const std::int64_t every = (steps - 1) / rows;
#pragma GCC unroll 1
    for (int r = 0; r < rows; ++r, steps -= every) {
      accumulate(c, a, g.stride, panel, every);
#pragma GCC unroll 4
      for (int j = 0; j < kPanel; j += 16) {
        float* to = total + r * kPanel + j;
        store(to, scaled<general>(*before, r, j, as_floats(acc + r * kPanel + j), load(to)));
      }
    }
  }
  accumulate(c, a, g.stride, panel, steps - 1);
  auto* high = reinterpret_cast<std::uint8_t*>(acc + rows * kPanel);
  if (last) {
    // Pointers as locals: behind a store through `to`, compilers would read those of `last` again.
    const float *const row_scales = last->linear.rows, *const bias = last->linear.bias;
    float* const to = last->to;
    const std::int64_t to_stride = last->stride;
    last_step(c, a, g.stride, panel, high, [&](int r) __attribute__((always_inline)) {
      const vf row_scale = set1(row_scales[r]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vf y = scaled<general>(g, r, 16 * j, to_float(c[r][j]), load(total + r * kPanel + 16 * j));
        store(to + r * to_stride + 16 * j, fma(y, row_scale, load(bias + 16 * j)));
      }
    });
    return;
  }
  last_step(c, a, g.stride, panel, high, [&](int r) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_store_si512(acc + r * kPanel + 16 * j, c[r][j]);
  });
}

template <int rows, bool general>
static void linear_tile(const Weights4& w, const PanelFloats& floats, const Codes& x, std::int64_t at, std::int64_t row,
                        std::int64_t p, const Touched& touched, const Last& last) {
  const std::int64_t whole = ceil_div(x.chunk, kStep), x_groups = ceil_div(w.k, kGroup);
  alignas(64) std::int32_t acc[(rows + 1) * kPanel];
  alignas(64) float total[rows * kPanel];
  for (int i = 0; i < rows * kPanel; i += W) store(total + i, zero());
  Group groups[2], *before = nullptr;
  for (std::int64_t c = 0; c < x.chunks; ++c) {
    if (c < rows) touched.ask(c);
    const std::int64_t begin = c * x.chunk / kStep, left = w.steps - begin,
                       from = (x.chunk == w.group ? c : 0) * kPanel;
    Group& g = groups[c % 2];
    g.a = x.a + at * x.stride + begin * kStep;
    g.panel = w.panel(p) + begin * kStepBytes;
    g.stride = x.stride;
    g.steps = left < whole ? left : whole;
    g.scales = floats.scales + from;
    g.zeros = w.zeros ? floats.zeros + from : nullptr;
    for (int r = 0; r < rows; ++r) {
      const std::int32_t sum = x.sums[(at + r) * x.chunks + c];
      g.start[r] = -8 * sum;
      if (!general) continue;
      g.row_sums[r] = static_cast<float>(sum);
      g.row_scales[r] = x.group_scale ? x.group_scale[(row + r) * x_groups + c * x.chunk / kGroup] : 1.0f;
    }
    group_tile<rows, general>(g, before, c + 1 == x.chunks ? &last : nullptr, acc, total);
    before = &g;
  }
}

template <int rows>
static void linear_tile(const Weights4& w, const PanelFloats& floats, const Codes& x, std::int64_t at, std::int64_t row,
                        std::int64_t p, const Touched& touched, const Last& last) {
  if (w.zeros || x.group_scale) return linear_tile<rows, true>(w, floats, x, at, row, p, touched, last);
  linear_tile<rows, false>(w, floats, x, at, row, p, touched, last);
}

#else

#if defined(QK_TIER_avxvnni) || defined(QK_TIER_neon)

alignas(32) static const std::int32_t kNibbles[8] = {0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f,
                                                     0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f};

template <int rows>
[[gnu::noinline]] static void tile(const std::int8_t* a, std::int64_t stride, const std::uint8_t* panel,
                                   std::int64_t steps, const std::int32_t* sums, std::int64_t sum_stride,
                                   std::int32_t* acc) {
  constexpr int vectors = 2;  // 6 x 2 sums fit into 16 registers, and are enough to wait for none
  for (int j = 0; j < kPanel; j += vectors * W) {
    vi c[rows][vectors];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) c[r][v] = set1(-8 * sums[r * sum_stride]);
    }
#pragma GCC unroll 1
    for (std::int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const std::int32_t* mask = kNibbles;
        __asm__ volatile("" : "+r"(mask));  // to be read at each use: no register is left for it
        const vi low = load(mask);
        vi b[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
          const vi bytes = load(reinterpret_cast<const std::int32_t*>(panel + s * kStepBytes) + j + v * W);
          b[v] = bit_and(half ? shift_right<4>(bytes) : bytes, low);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
          std::int32_t four;
          std::memcpy(&four, a + r * stride + s * kStep + 4 * half, 4);
          const vi x = set1(four);
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v) dot(c[r][v], b[v], x);
        }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) store(acc + r * kPanel + j + v * W, c[r][v]);
    }
  }
}

#else

template <int rows>
[[gnu::noinline]] static void tile(const std::int8_t* a, std::int64_t stride, const std::uint8_t* panel,
                                   std::int64_t steps, const std::int32_t* sums, std::int64_t sum_stride,
                                   std::int32_t* acc) {
  for (int r = 0; r < rows; ++r, a += stride, acc += kPanel) {
    for (int j = 0; j < kPanel; ++j) acc[j] = -8 * sums[r * sum_stride];
    for (std::int64_t s = 0; s < steps; ++s) {
      const std::uint8_t* b = panel + s * kStepBytes;
      const std::int8_t* x = a + s * kStep;
      for (int j = 0; j < kPanel; ++j)
        for (int i = 0; i < 4; ++i) acc[j] += x[i] * (b[4 * j + i] & 15) + x[4 + i] * (b[4 * j + i] >> 4);
    }
  }
}

#endif

template <int rows>
static void linear_tile(const Weights4& w, const PanelFloats& floats, const Codes& x, std::int64_t at, std::int64_t row,
                        std::int64_t p, const Touched&, const Last& last) {
  alignas(64) std::int32_t acc[rows * kPanel];
  alignas(64) float total[rows * kPanel];
  for (std::int64_t c = 0; c < x.chunks; ++c) {
    const std::int64_t begin = c * x.chunk / kStep, left = w.steps - begin, whole = ceil_div(x.chunk, kStep);
    tile<rows>(x.a + at * x.stride + begin * kStep, x.stride, w.panel(p) + begin * kStepBytes,
               left < whole ? left : whole, x.sums + at * x.chunks + c, x.chunks, acc);
    add_chunk(w, floats, x, rows, at, row, c, acc, total);
  }
  apply(last.linear, total, rows, last.to, last.stride);
}

#endif

static void linear_tile_of(int rows, const Weights4& w, const PanelFloats& floats, const Codes& x, std::int64_t at,
                           std::int64_t row, std::int64_t p, const Touched& touched, const Last& last) {
  QK_BY_ROWS(linear_tile, rows, w, floats, x, at, row, p, touched, last)
}

static inline std::int64_t panel_bytes(const Weights4& w) { return w.steps * kStepBytes; }

// Rows `rows` of the copy (whose row 0 is row `offset` of x) against panels first..last.
static void unit_codes(const Weights4& w, const Codes& x, const Epilogue& e, std::int64_t offset, Part rows,
                       std::int64_t first, std::int64_t last) {
  const std::int64_t grids = has_grid(e) ? (last - first) * kGridFloats : 0;
  const std::int64_t size = panel_floats_size(w);
  auto* total =
      static_cast<float*>(qk_workspace(QK_SLOT_B, 4 * (kTile * (kPanel + kGroup) + grids + (last - first) * size)));
  float *pair = total + kTile * kPanel, *grid = pair + kTile * kGroup, *floats = grid + grids;
  fill_grids(e, first, last, grid);
  for (std::int64_t p = first; p < last; ++p) fill_panel_floats(w, p, floats + (p - first) * size);
  const std::int64_t tiles = ceil_div(rows.size(), kTile);
  for (std::int64_t t = 0; t < tiles; ++t) {
    const Part part(rows.size(), tiles, t);
    const int count = static_cast<int>(part.size());
    const std::int64_t at = rows.begin + part.begin, row = offset + at;
    for (std::int64_t p = first; p < last; ++p) {
      const std::int64_t column = p * kPanel;
      const bool all = linear_is_all(e, column);
      float room[2 * kPanel];
      const Last last{linear_of(e, count, row, column, room),
                      all ? static_cast<float*>(e.out) + row * e.columns + column : total, all ? e.columns : kPanel};
      linear_tile_of(count, w, panel_floats(w, floats + (p - first) * size), x, at, row, p, Touched(e, row, column),
                     last);
      if (all) continue;
      finish(e, {count, row, column, total, has_grid(e) ? grid + (p - first) * kGridFloats : nullptr}, pair);
    }
  }
}

}  // namespace
