// int8_linear: y[M, N] = epilogue(x[M, K] . w[N, K]^T), int8 x int8 -> int32, weights in layout `vnni64`
// (qkernels/layouts.py).
//
// A thread takes a block of up to 96 rows and a few panels of 64 columns. A register tile is up to 6 rows x 64 columns
// (int8_tiles.h); the linear part of the epilogue is done in registers, the rest on a small buffer in L1. Rows of x are
// first copied into the form that the tier's tiles want, unless they come so (x_shifted, avx512vnni only).
#include "blocking.h"
#include "int8_tiles.h"
#include "parallel.h"
#if defined(QK_TIER_avx2) && !defined(QK_TIER_avxvnni)
#include "int8_narrow.h"
#endif

namespace {

constexpr std::int64_t kBlockK = 4096;             // a panel of that depth is 256 KB
constexpr std::int64_t kChunkBytes = 8 << 20;      // most of A that is copied at a time
constexpr std::int64_t kCopyAloneBytes = 1 << 16;  // less is copied by one thread

alignas(64) const std::int32_t kZeros[kPanel] = {};

struct Product {
  std::int64_t k, k_stride, steps, panels;
  const std::int8_t* weight;  // panels
  const std::int32_t* start;  // -128 * sum_k w, [64 * panels]
  const float* group_scale;   // x_scale [M, groups], or nullptr
  std::int64_t groups;
  Epilogue epilogue;

  const std::int8_t* panel(std::int64_t p) const { return weight + p * steps * 256; }
  const std::int32_t* columns_start(std::int64_t p) const { return kShifted ? start + p * kPanel : kZeros; }
};

// One x_scale for each 128 k: every group's sum is scaled and added up in float32.
static void grouped_tile(const Product& g, const Element* a, int rows, std::int64_t row, const Panel& panel,
                         const std::int32_t* starts, std::int32_t* acc, float* sum) {
  for (int i = 0; i < rows * kPanel; ++i) sum[i] = 0.0f;
  for (std::int64_t q = 0; q < g.groups; ++q) {
    const std::int64_t first = q * (kGroup / 4), steps = g.steps - first < kGroup / 4 ? g.steps - first : kGroup / 4;
    tile_of(rows, a + 4 * first, g.k_stride, from_step(panel, first), steps,
            start_of_group(starts + q * kPanel, a, g.k_stride, g.k, q), acc);
    for (int r = 0; r < rows; ++r) {
      const vf scale = set1(g.group_scale[(row + r) * g.groups + q]);
      for (int j = 0; j < kPanel; j += W) {
        float* to = sum + r * kPanel + j;
        store(to, fma(as_floats(acc + r * kPanel + j), scale, load(to)));
      }
    }
  }
}

// Start values of every group of a panel, [groups, 64]: minus the product of the panel with a row of 128.
static void group_starts(const Product& g, const std::int8_t* packed, std::int32_t* starts) {
  for (std::int64_t q = 0; q < g.groups; ++q) {
    std::int32_t* to = starts + q * kPanel;
    for (int j = 0; j < kPanel; ++j) to[j] = 0;
    if (!kShifted) continue;
    const std::int64_t first = q * (kGroup / 4), steps = g.steps - first < kGroup / 4 ? g.steps - first : kGroup / 4;
    alignas(64) Element row[kGroup];
    for (int i = 0; i < kGroup; ++i) row[i] = static_cast<Element>(128);
    tile<1>(row, 0, from_step(panel_of(packed), first), steps, {kZeros, 0}, to);
    for (int j = 0; j < kPanel; ++j) to[j] = -to[j];
  }
}

// Rows `rows` of the chunk that lies in `a` (whose row 0 is row `offset` of x) against one unit of panels.
// `threads` take units in turns.
static void unit(const Product& g, const Element* a, std::int64_t offset, Part rows, std::int64_t first_panel,
                 std::int64_t last_panel, int threads) {
  // Deep products go by blocks of k, so that a block of a panel serves all rows from L2; `acc` keeps their sums.
  const std::int64_t tiles = ceil_div(rows.size(), kTile),
                     k_blocks = g.group_scale ? 1 : ceil_div(4 * g.steps, kBlockK);
  const std::int64_t width = last_panel - first_panel, kept = k_blocks > 1 ? width * rows.size() : kTile;
  const Epilogue& e = g.epilogue;
  const std::int64_t sums = kTile * kPanel, pairs = kTile * kGroup, grids = has_grid(e) ? width * kGridFloats : 0,
                     starts = g.group_scale ? width * g.groups * kPanel : 0;
  const bool copies = kRowsToCopyFor > 0 && rows.size() >= kRowsToCopyFor;
  const std::int64_t copy_bytes = 4 * kPanel * ceil_div(g.steps, k_blocks),
                     copied = copies ? width * copy_bytes / 4 : 0;
  auto* acc =
      static_cast<std::int32_t*>(qk_workspace(QK_SLOT_B, 4 * (copied + kept * kPanel + sums + pairs + grids + starts)));
  auto* const copy = reinterpret_cast<std::int8_t*>(acc);
  acc += copied;
  auto* sum = reinterpret_cast<float*>(acc + kept * kPanel);
  float *pair = sum + sums, *grid = pair + pairs;
  auto* group_start = reinterpret_cast<std::int32_t*>(grid + grids);
  fill_grids(e, first_panel, last_panel, grid);
  if (g.group_scale)
    for (std::int64_t p = 0; p < width; ++p)
      group_starts(g, g.panel(first_panel + p), group_start + p * g.groups * kPanel);

  // The thread's next unit lies further away than L2, and one tile alone would wait for it: all fetch a share of it.
  const std::int64_t share = ceil_div(g.steps * 4, tiles), next_panel = first_panel + threads * width;
  Pending before;
  for (std::int64_t b = 0; b < k_blocks; ++b) {
    const Part steps(g.steps, k_blocks, b);
    if (copies)
      for (std::int64_t p = 0; p < width; ++p)
        copy_panel(g.panel(first_panel + p) + 4 * kPanel * steps.begin, steps.size(), copy + p * copy_bytes);
    for (std::int64_t t = 0; t < tiles; ++t) {
      const Part part(rows.size(), tiles, t);
      const int count = static_cast<int>(part.size());
      const std::int64_t at = rows.begin + part.begin, row = offset + at;
      const Element* from = a + at * g.k_stride + 4 * steps.begin;
      for (std::int64_t p = first_panel; p < last_panel; ++p) {
        const Panel panel = copies ? copied_panel(copy + (p - first_panel) * copy_bytes, steps.size())
                                   : from_step(panel_of(g.panel(p)), steps.begin);
        std::int32_t* kept_acc = acc + (k_blocks > 1 ? ((p - first_panel) * rows.size() + part.begin) * kPanel : 0);
        const Start start = b == 0 ? start_of(g.columns_start(p), from, g.k_stride, g.k) : Start{kept_acc, kPanel};
        if (b + 1 < k_blocks) {
          tile_of(count, from, g.k_stride, panel, steps.size(), start, kept_acc);
          continue;
        }
        const std::int64_t column = p * kPanel;
        const bool all = linear_is_all(e, column);
        float room[2 * kPanel];
        const Job job{from,
                      g.k_stride,
                      panel,
                      steps.size(),
                      start,
                      linear_of(e, count, row, column, room),
                      Touched(e, row, column),
                      all ? static_cast<float*>(e.out) + row * e.columns + column : sum,
                      all ? e.columns : kPanel,
                      g.panel(next_panel) + 64 * share * (t * width + p - first_panel),
                      next_panel < g.panels ? static_cast<int>(ceil_div(share, 4 * kTile)) : 0};
        if (g.group_scale) {
          grouped_tile(g, from, count, row, panel, group_start + (p - first_panel) * g.groups * kPanel, acc, sum);
          apply(job.linear, sum, count, job.to, job.to_stride);
        } else {
          linear_tile_of(count, job, e, before);
          before.rows = 0;
        }
        if (all) continue;
        const Pending tile{count, row, column, sum, has_grid(e) ? grid + (p - first_panel) * kGridFloats : nullptr};
        if (!g.group_scale && can_wait(e, count, column))
          before = tile;
        else
          finish(e, tile, pair);
      }
    }
  }
  if (before.rows) finish(e, before, pair);
}

}  // namespace

// Rows of x are x_stride bytes apart. x_shifted: they hold code + 128 and can be read up to k rounded up to 4; what
// stands after k does not matter, because the weights there are 0.
extern "C" void QK_IMPL(int8_linear)(const std::int8_t* x, std::int64_t m, std::int64_t k, std::int64_t x_stride,
                                     int x_shifted, const float* x_scale, int x_scale_kind, const std::uint8_t* weight,
                                     const float* weight_scale, std::int64_t n, const float* bias, int activation,
                                     const void* residual, int residual_type, void* out, int out_type,
                                     const float* out_scale, int out_scale_per_column, const float* out_zero_point,
                                     int out_zero_point_per_column, float* group_scales, int threads) {
  Product g;
  g.k = k;
  g.steps = ceil_div(k, 4);
  g.panels = ceil_div(n, kPanel);
  g.k_stride = row_elements(k);
  if (g.k_stride * sizeof(Element) % 4096 == 0) g.k_stride += 64;  // rows must not share one set of the L1 cache
  g.weight = reinterpret_cast<const std::int8_t*>(weight);
  g.start = reinterpret_cast<const std::int32_t*>(weight + g.panels * g.steps * 256);
  g.group_scale = x_scale_kind == 2 ? x_scale : nullptr;
  g.groups = ceil_div(k, kGroup);
  g.epilogue = {x_scale_kind == 2 ? nullptr : x_scale,
                x_scale_kind == 0,
                weight_scale,
                bias,
                activation,
                residual,
                residual_type,
                out,
                out_type,
                out_scale,
                out_scale_per_column != 0,
                out_zero_point,
                out_zero_point_per_column != 0,
                group_scales,
                n};
  threads = useful_threads(threads, m * n * k);
#if defined(QK_TIER_avx2) && !defined(QK_TIER_avxvnni)
  const NarrowWeight narrow{g.weight, g.start, k, g.steps, g.panels, g.start[g.panels * kPanel]};
  if (m > kTile && !g.group_scale && qk_pair_sums(narrow.largest))  // few rows wait for weights, not for products
    return narrow_linear(narrow, x, m, x_stride, g.epilogue, threads);
#endif

  // Every row of x from `offset` on that lies in `a` against all panels.
  const auto multiply = [&](const Element* a, std::int64_t offset, std::int64_t rows) {
    const Grid grid(rows, n, g.steps * 256, group_scales != nullptr, threads);
    parallel_tasks(threads, grid.tasks(), [&](std::int64_t task) {
      const Part block(rows, grid.row_blocks, task / grid.units);
      const std::int64_t first = task % grid.units * grid.unit_panels, last = first + grid.unit_panels;
      unit(g, a, offset, block, first, last < g.panels ? last : g.panels, threads);
    });
  };
  if (x_shifted) {
    g.k_stride = x_stride;
    return multiply(reinterpret_cast<const Element*>(x), 0, m);
  }
  const std::int64_t row_bytes = g.k_stride * static_cast<std::int64_t>(sizeof(Element));
  std::int64_t chunk = kChunkBytes / row_bytes / kBlockRows * kBlockRows;
  if (chunk < kBlockRows) chunk = kBlockRows;
  if (chunk > m) chunk = m;
  auto* a = static_cast<Element*>(qk_workspace(QK_SLOT_SHARED, static_cast<std::size_t>(chunk * row_bytes)));
  for (std::int64_t offset = 0; offset < m; offset += chunk) {
    const std::int64_t rows = m - offset < chunk ? m - offset : chunk;
    parallel_for(threads, rows, ceil_div(kCopyAloneBytes, row_bytes), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) copy_row(x + (offset + r) * x_stride, k, a + r * g.k_stride);
    });
    multiply(a, offset, rows);
  }
}
