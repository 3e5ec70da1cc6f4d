// How a matrix product [M, K] x [N, K]^T is cut into tasks and tiles, the same for every tier and weight format.
#pragma once

#include "epilogue.h"

namespace {

constexpr int kBlockRows = 96;  // rows of A that stay in the L2 cache while a thread walks over panels

static inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
static inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Part `i` of `count` nearly equal parts of 0..total.
struct Part {
  std::int64_t begin, end;
  Part(std::int64_t total, std::int64_t count, std::int64_t i) : begin(total * i / count), end(total * (i + 1) / count) {}
  std::int64_t size() const { return end - begin; }
};

// Tasks are (block of rows, group of units); a unit is one panel, or two where 128 columns share a scale.
struct Grid {
  std::int64_t row_blocks, units, unit_groups, panels;
  int unit_panels;

  Grid(std::int64_t rows, std::int64_t columns, bool pairs, int threads) {
    panels = ceil_div(columns, kPanel);
    unit_panels = pairs ? 2 : 1;
    units = ceil_div(panels, unit_panels);
    row_blocks = ceil_div(rows, kBlockRows);
    // Up to four units a task, so that the packed panels of a task stay in L2, and at least eight tasks a thread, so that a thread
    // that was disturbed does not hold up the others.
    std::int64_t together = units * row_blocks / (8 * static_cast<std::int64_t>(threads));
    together = together < 1 ? 1 : together > 4 ? 4 : together;
    unit_groups = ceil_div(units, together);
  }
  std::int64_t tasks() const { return row_blocks * unit_groups; }
};

// Threads that a product of so many multiply-adds is worth.
static inline int useful_threads(int threads, std::int64_t macs) {
  const std::int64_t most = 1 + macs / 200000;
  return most < threads ? static_cast<int>(most) : threads;
}

}  // namespace
