// How a matrix product [M, K] x [N, K]^T is cut into tasks and tiles, the same for every tier and weight format.
#pragma once

#include "epilogue.h"

namespace {

// Rows of A that stay in the L2 cache while a thread walks over panels.
#if defined(QK_TIER_avx2) && !defined(QK_TIER_avxvnni)
constexpr int kBlockRows = 192;      // more, because panels are copied for each block (int8_avx2.h),
constexpr int kByteBlockRows = 400;  // and where a row is a byte for each k
#else
constexpr int kBlockRows = 96, kByteBlockRows = kBlockRows;
#endif

// Packed weights that stay there with them.
static inline std::int64_t unit_bytes() {
  const std::int64_t most = 384 << 10;
#if defined(QK_TIER_avx512vnni)
  return most;  // 1 MB of L2 at least
#else
  const std::int64_t share = qk_l2_bytes() / 8 * 3;
  return share < most ? share : most;
#endif
}

static inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
static inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Part `i` of `count` nearly equal parts of 0..total.
struct Part {
  std::int64_t begin, end;
  Part(std::int64_t total, std::int64_t count, std::int64_t i)
      : begin(total * i / count), end(total * (i + 1) / count) {}
  std::int64_t size() const { return end - begin; }
};

// Tasks are (block of rows, unit of panels). Within a task every tile of rows meets all panels of the unit before the
// next tile comes: the panels stay in L2, and the tile's output rows grow by several panels at a time, which touches
// fewer pages.
struct Grid {
  std::int64_t row_blocks, panels, unit_panels, units;

  // `pairs`: 128 columns share a scale, so a unit must not split them.
  Grid(std::int64_t rows, std::int64_t columns, std::int64_t panel_bytes, bool pairs, int threads,
       int block_rows = kBlockRows) {
    panels = ceil_div(columns, kPanel);
    row_blocks = ceil_div(rows, block_rows);
    unit_panels = unit_bytes() / panel_bytes;
    // At least eight tasks a thread, so that a thread that was disturbed does not hold up the others.
    const std::int64_t even = panels * row_blocks / (8 * static_cast<std::int64_t>(threads));
    if (unit_panels > even) unit_panels = even;
    if (unit_panels < 1) unit_panels = 1;
    if (pairs) unit_panels = round_up(unit_panels, 2);
    units = ceil_div(panels, unit_panels);
  }
  std::int64_t tasks() const { return row_blocks * units; }
};

// Threads that a product of so many multiply-adds is worth.
static inline int useful_threads(int threads, std::int64_t macs) {
  const std::int64_t most = 1 + macs / 200000;
  return most < threads ? static_cast<int>(most) : threads;
}

// function<rows>(...) for a number of rows that is known at run time, 1..kTile.
#define QK_BY_ROWS(function, rows, ...) \
  switch (rows) {                       \
    case 1:                             \
      return function<1>(__VA_ARGS__);  \
    case 2:                             \
      return function<2>(__VA_ARGS__);  \
    case 3:                             \
      return function<3>(__VA_ARGS__);  \
    case 4:                             \
      return function<4>(__VA_ARGS__);  \
    case 5:                             \
      return function<5>(__VA_ARGS__);  \
    default:                            \
      return function<6>(__VA_ARGS__);  \
  }

}  // namespace
