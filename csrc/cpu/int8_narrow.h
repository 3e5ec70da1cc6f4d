// int8_linear on AVX2 for weights whose codes have fewer than 8 bits: several of their pair sums fit into int16
// (byte_pairs.h). The sums are the same as any other way. Strips are those of int8_avx2.h, rows of x are x + 128.
#pragma once

#include "byte_pairs.h"
#include "int8_tiles.h"
#include "parallel.h"

namespace {

struct NarrowWeight {
  const std::int8_t* codes;   // layout vnni64
  const std::int32_t* start;  // -128 * sum_k codes, [64 * panels]
  std::int64_t k, steps, panels;
  std::int32_t largest;  // magnitude of a code

  std::int64_t panel_bytes() const { return steps * 4 * kPanel; }
  const std::int8_t* panel(std::int64_t p) const { return codes + p * panel_bytes(); }
};

// The inner loop of a strip of a copied panel: weights are memory operands, and four vectors of them meet one of x.
template <int pairs>
struct Narrow {
  static constexpr int kRows = 2, kVectors = 4;
  static constexpr std::int64_t kPitch = 2 * kPanel;

  struct Bytes {
    std::int8_t at[32];
  };
  struct Four {
    std::int8_t at[4];
  };

  // t = (`first`) or t += four k of a row by 32 columns, in int16. In assembly, since compilers spill.
  template <bool first>
  [[gnu::always_inline]] static inline void add_four(vi (&t)[4], const std::int8_t* four, const std::int8_t* weights) {
    const auto& x4 = *reinterpret_cast<const Four*>(four);
    const auto* w = reinterpret_cast<const Bytes*>(weights);
    if constexpr (first) {
      __asm__(
          "vpbroadcastd %4, %3\n\tvpmaddubsw %5, %3, %0\n\tvpmaddubsw %6, %3, %1\n\t"
          "vpmaddubsw %7, %3, %2\n\tvpmaddubsw %8, %3, %3"
          : "=&x"(t[0]), "=&x"(t[1]), "=&x"(t[2]), "=&x"(t[3])
          : "m"(x4), "m"(w[0]), "m"(w[1]), "m"(w[2]), "m"(w[3]));
    } else {
      vi x, u, v;
      __asm__(
          "vpbroadcastd %7, %4\n\tvpmaddubsw %8, %4, %5\n\tvpmaddubsw %9, %4, %6\n\tvpaddw %5, %0, %0\n\t"
          "vpmaddubsw %10, %4, %5\n\tvpmaddubsw %11, %4, %4\n\t"
          "vpaddw %6, %1, %1\n\tvpaddw %5, %2, %2\n\tvpaddw %4, %3, %3"
          : "+x"(t[0]), "+x"(t[1]), "+x"(t[2]), "+x"(t[3]), "=&x"(x), "=&x"(u), "=&x"(v)
          : "m"(x4), "m"(w[0]), "m"(w[1]), "m"(w[2]), "m"(w[3]));
    }
  }

  // c[vectors] += `count` steps of a row.
  template <int count, int vectors>
  [[gnu::always_inline]] static inline void step(vi (&c)[vectors], const std::int8_t* x, const std::int8_t* w,
                                                 std::int64_t half, vi ones) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j += 4) {
      vi t[4];
#pragma GCC unroll 8
      for (int s = 0; s < count; ++s) {
        if (s == 0)
          add_four<true>(t, x, w + j / 4 * half);
        else
          add_four<false>(t, x + 4 * s, w + j / 4 * half + s * kPitch);
      }
      __asm__(
          "vpmaddwd %8, %4, %4\n\tvpmaddwd %8, %5, %5\n\tvpmaddwd %8, %6, %6\n\tvpmaddwd %8, %7, %7\n\t"
          "vpaddd %4, %0, %0\n\tvpaddd %5, %1, %1\n\tvpaddd %6, %2, %2\n\tvpaddd %7, %3, %3"
          : "+x"(c[j]), "+x"(c[j + 1]), "+x"(c[j + 2]), "+x"(c[j + 3]), "+x"(t[0]), "+x"(t[1]), "+x"(t[2]), "+x"(t[3])
          : "x"(ones));
    }
  }

  template <int rows, int vectors>
  [[gnu::always_inline]] static inline void accumulate(vi (&c)[rows][vectors], const std::int8_t* a,
                                                       std::int64_t stride, const Panel& panel, int column,
                                                       std::int64_t steps) {
    const vi ones = _mm256_set1_epi16(1);
    const std::int64_t half = panel.half;
    const std::int8_t* w = panel.column(column);
#pragma GCC unroll 1
    for (; steps >= pairs; steps -= pairs, w += pairs * kPitch, a += 4 * pairs) {
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) step<pairs>(c[r], a + r * stride, w, half, ones);
    }
#pragma GCC unroll 1
    for (; steps > 0; --steps, w += kPitch, a += 4) {
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) step<1>(c[r], a + r * stride, w, half, ones);
    }
  }
};

template <int rows>
static void narrow_tile(int pairs, const std::int8_t* a, std::int64_t stride, const Panel& panel, std::int64_t steps,
                        const Start& start, const Scale& scale) {
  switch (pairs) {
    case 8:
      return strips<Narrow<8>, rows>(a, stride, panel, steps, start, scale);
    case 4:
      return strips<Narrow<4>, rows>(a, stride, panel, steps, start, scale);
    case 2:
      return strips<Narrow<2>, rows>(a, stride, panel, steps, start, scale);
    default:
      return strips<Narrow<1>, rows>(a, stride, panel, steps, start, scale);
  }
}

static void narrow_tile_of(int rows, int pairs, const std::int8_t* a, std::int64_t stride, const Panel& panel,
                           std::int64_t steps, const Start& start, const Scale& scale) {
  QK_BY_ROWS(narrow_tile, rows, pairs, a, stride, panel, steps, start, scale)
}

// Rows `rows` of the copy `a` of x (whose row 0 is row `offset` of x) against panels first..last.
static void narrow_unit(const NarrowWeight& w, const std::int8_t* a, std::int64_t stride, const Epilogue& e,
                        std::int64_t offset, Part rows, std::int64_t first, std::int64_t last) {
  const std::int64_t tiles = ceil_div(rows.size(), kTile), panels = last - first,
                     grids = has_grid(e) ? panels * kGridFloats : 0;
  auto* y =
      static_cast<float*>(qk_workspace(QK_SLOT_B, 4 * (kTile * (kPanel + kGroup) + grids) + panels * w.panel_bytes()));
  float *pair = y + kTile * kPanel, *grid = pair + kTile * kGroup;
  auto* copies = reinterpret_cast<std::int8_t*>(grid + grids);
  fill_grids(e, first, last, grid);
  for (std::int64_t t = 0; t < tiles; ++t) {
    const Part part(rows.size(), tiles, t);
    const int count = static_cast<int>(part.size());
    const std::int64_t at = rows.begin + part.begin, row = offset + at;
    for (std::int64_t p = first; p < last; ++p) {
      std::int8_t* copy = copies + (p - first) * w.panel_bytes();
      if (t == 0) copy_panel(w.panel(p), w.steps, copy);
      const std::int64_t column = p * kPanel;
      const bool all = linear_is_all(e, column);
      float room[2 * kPanel];
      const Linear linear = linear_of(e, count, row, column, room);
      narrow_tile_of(
          count, qk_pair_sums(w.largest), a + at * stride, stride, copied_panel(copy, w.steps), w.steps,
          {w.start + column, 0},
          {linear, all ? static_cast<float*>(e.out) + row * e.columns + column : y, all ? e.columns : kPanel});
      if (!all) finish(e, {count, row, column, y, has_grid(e) ? grid + (p - first) * kGridFloats : nullptr}, pair);
    }
  }
}

// A row of x + 128, which can be read up to a multiple of 4; the weights there are 0.
static inline void copy_shifted(const std::int8_t* x, std::int64_t k, std::int8_t* to) {
  for (std::int64_t i = 0; i < k; ++i) to[i] = static_cast<std::int8_t>(x[i] ^ -128);
}

static void narrow_linear(const NarrowWeight& w, const std::int8_t* x, std::int64_t m, std::int64_t x_stride,
                          const Epilogue& e, int threads) {
  constexpr std::int64_t most_bytes = 8 << 20, alone = 1 << 16;  // of x copied at a time; by one thread
  std::int64_t stride = round_up(w.k, 64);
  if (stride % 4096 == 0) stride += 64;  // rows must not share one set of the L1 cache
  std::int64_t most = most_bytes / stride / kByteBlockRows * kByteBlockRows;
  if (most < kByteBlockRows) most = kByteBlockRows;
  if (most > m) most = m;
  auto* copy = static_cast<std::int8_t*>(qk_workspace(QK_SLOT_SHARED, static_cast<std::size_t>(most * stride)));
  for (std::int64_t offset = 0; offset < m; offset += most) {
    const std::int64_t rows = m - offset < most ? m - offset : most;
    parallel_for(threads, rows, ceil_div(alone, stride), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) copy_shifted(x + (offset + r) * x_stride, w.k, copy + r * stride);
    });
    const Grid grid(rows, e.columns, w.panel_bytes(), e.group_scales != nullptr, threads, kByteBlockRows);
    parallel_tasks(threads, grid.tasks(), [&](std::int64_t task) {
      const Part block(rows, grid.row_blocks, task / grid.units);
      const std::int64_t first = task % grid.units * grid.unit_panels, end = first + grid.unit_panels;
      narrow_unit(w, copy, stride, e, offset, block, first, end < grid.panels ? end : grid.panels);
    });
  }
}

}  // namespace
