// int8_linear on AVX2 for weights whose codes have fewer than 8 bits: several of their pair sums fit into int16
// (byte_pairs.h). The sums are the same as any other way.
#pragma once

#include "parallel.h"
#include "strips.h"

namespace {

struct NarrowWeight {
  const std::int8_t* codes;   // layout vnni64
  const std::int32_t* start;  // -128 * sum_k codes, [64 * panels]
  std::int64_t k, steps, panels;
  std::int32_t largest;  // magnitude of a code

  const std::int8_t* panel(std::int64_t p) const { return codes + p * steps * 4 * kPanel; }
};

// How many pair sums of codes up to `largest` fit into int16; 0: not one.
static inline int narrow_pairs(std::int32_t largest) {
  return largest <= 8 ? 8 : largest <= 16 ? 4 : largest <= 32 ? 2 : largest <= 64 ? 1 : 0;
}

// A panel as strips [4, K / 4, 16, 4]: lines 256 bytes apart share too few sets of L1.
static void copy_strips(const std::int8_t* panel, std::int64_t steps, std::int8_t* to) {
  for (std::int64_t s = 0; s < steps; ++s, panel += 4 * kPanel) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
      store(reinterpret_cast<std::int32_t*>(to + (j / 2 * steps + s) * kStripStep + j % 2 * 32),
            load(reinterpret_cast<const std::int32_t*>(panel + 32 * j)));
  }
}

// A strip's results: x + 128 by the codes as they are, less 128 * sum_k codes.
template <int pairs, int rows>
[[gnu::noinline]] static void narrow_strip(const Strip& s, const std::int8_t* codes, const std::int32_t* start) {
  vi sum[rows][2];
#pragma GCC unroll 3
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sum[r][v] = load(start + W * v);
  }
  const std::int8_t* a = s.first_x();
  const std::int64_t stride = s.x.stride;
  std::int64_t k = s.k;
#pragma GCC unroll 1
  for (; k >= 4 * pairs; k -= 4 * pairs, a += 4 * pairs, codes += pairs * kStripStep)
    add_products<pairs, Unsigned::x, kStripStep>(sum, a, stride, codes);
#pragma GCC unroll 1
  for (; k > 0; k -= 4, a += 4, codes += kStripStep) add_products<1, Unsigned::x, kStripStep>(sum, a, stride, codes);
  s.keep(sum);
}

template <int pairs>
static void narrow_unit(const NarrowWeight& w, const Codes& x, const Epilogue& e, std::int64_t offset, Part rows,
                        std::int64_t first, std::int64_t last) {
  unit_strips<kStripHeight>(
      x, w.k, w.steps * 4 * kPanel, 0, e, offset, rows, first, last,
      [&](std::int64_t p, std::uint8_t* to) { copy_strips(w.panel(p), w.steps, reinterpret_cast<std::int8_t*>(to)); },
      [](std::int64_t, float*) {},
      [&](std::int64_t p, int count, const Strip& s, const std::uint8_t* bytes, const float*) {
        const auto* codes = reinterpret_cast<const std::int8_t*>(bytes) + 4 * s.column * w.steps;
        const std::int32_t* start = w.start + p * kPanel + s.column;
        if (count == 1) return narrow_strip<pairs, 1>(s, codes, start);
        if (count == 2) return narrow_strip<pairs, 2>(s, codes, start);
        narrow_strip<pairs, kStripHeight>(s, codes, start);
      },
      [](const StripTile& t, const Linear& linear, float* to, std::int64_t stride) {
        apply(linear, reinterpret_cast<const std::int32_t*>(t.y), t.rows, to, stride);
      });
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
  std::int64_t most = most_bytes / stride / kBlockRows * kBlockRows;
  if (most < kBlockRows) most = kBlockRows;
  if (most > m) most = m;
  auto* copy = static_cast<std::int8_t*>(qk_workspace(QK_SLOT_SHARED, static_cast<std::size_t>(most * stride)));
  const Codes codes{copy, stride, nullptr, w.k, 1, nullptr};
  for (std::int64_t offset = 0; offset < m; offset += most) {
    const std::int64_t rows = m - offset < most ? m - offset : most;
    parallel_for(threads, rows, ceil_div(alone, stride), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) copy_shifted(x + (offset + r) * x_stride, w.k, copy + r * stride);
    });
    const Grid grid(rows, e.columns, w.steps * 4 * kPanel, e.group_scales != nullptr, threads);
    parallel_tasks(threads, grid.tasks(), [&](std::int64_t task) {
      const Part block(rows, grid.row_blocks, task / grid.units);
      const std::int64_t first = task % grid.units * grid.unit_panels, end = first + grid.unit_panels,
                         last = end < grid.panels ? end : grid.panels;
      switch (narrow_pairs(w.largest)) {
        case 8:
          return narrow_unit<8>(w, codes, e, offset, block, first, last);
        case 4:
          return narrow_unit<4>(w, codes, e, offset, block, first, last);
        case 2:
          return narrow_unit<2>(w, codes, e, offset, block, first, last);
        default:
          return narrow_unit<1>(w, codes, e, offset, block, first, last);
      }
    });
  }
}

}  // namespace
