// Products of int8 x by weights of few bits on AVX2, by strips of 16 columns and three rows.
#pragma once

#include "byte_pairs.h"
#include "codes.h"

namespace {

constexpr int kStrips = kPanel / kStripColumns;

struct Strip {
  const Codes& x;
  std::int64_t k, at, row;  // the first row in the copy of x, and in x
  int column;               // of the panel
  float* y;                 // results [rows, 16], rows kPanel apart: floats, or int32

  const std::int8_t* first_x() const { return x.a + at * x.stride; }
  template <int rows>
  [[gnu::always_inline]] void keep(const vi (&sum)[rows][2]) const {
    auto* to = reinterpret_cast<std::int32_t*>(y);
#pragma GCC unroll 3
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) store(to + r * kPanel + W * v, sum[r][v]);
    }
  }
};

// A tile of results y [rows, 64] of a panel, `at` and `row` being its first row in the copy of x and in x.
struct StripTile {
  std::int64_t panel;
  int rows;
  std::int64_t at, row;
  float* y;
  const float* room;  // of the panel
};

// Panels first..last against `rows` of the copy, whose row 0 is row `offset` of x. Where `panel_bytes` is not 0,
// unpack(panel, bytes) makes that many of a panel, once for all rows; fill(panel, room) prepares room_floats of it.
// multiply(panel, rows, strip, bytes, room) fills a strip's results of up to most_rows rows, and linear(tile, linear,
// to, stride) takes a tile's through the linear part of the epilogue.
template <int most_rows, class Unpack, class Fill, class Multiply, class LinearPart>
static void unit_strips(const Codes& x, std::int64_t k, std::int64_t panel_bytes, std::int64_t room_floats,
                        const Epilogue& e, std::int64_t offset, Part rows, std::int64_t first, std::int64_t last,
                        const Unpack& unpack, const Fill& fill, const Multiply& multiply, const LinearPart& linear) {
  const std::int64_t tiles = ceil_div(rows.size(), kTile), panels = last - first,
                     grids = has_grid(e) ? panels * kGridFloats : 0,
                     kept = tiles == 1 ? 1 : panels;  // for a single tile panels need not be kept
  auto* y = static_cast<float*>(
      qk_workspace(QK_SLOT_B, 4 * (kTile * (kPanel + kGroup) + grids + panels * room_floats) + kept * panel_bytes));
  float *pair = y + kTile * kPanel, *grid = pair + kTile * kGroup, *rooms = grid + grids;
  auto* unpacked = reinterpret_cast<std::uint8_t*>(rooms + panels * room_floats);
  fill_grids(e, first, last, grid);
  for (std::int64_t p = first; p < last; ++p) fill(p, rooms + (p - first) * room_floats);
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t at = rows.begin + t * kTile, row = offset + at, left = rows.end - at;
    const int count = left < kTile ? static_cast<int>(left) : kTile, height = count == 4 ? 2 : most_rows;
    for (std::int64_t p = first; p < last; ++p) {
      const std::int64_t column = p * kPanel;
      const float* room = rooms + (p - first) * room_floats;
      std::uint8_t* bytes = unpacked + (kept == 1 ? 0 : p - first) * panel_bytes;
      if (t == 0 && panel_bytes) unpack(p, bytes);
      const Touched touched(e, row, column);
      for (int c = 0; c < kPanel; c += kStripColumns) {
        for (int r = c / kStripColumns; r < count; r += kPanel / kStripColumns) touched.ask(r);
        for (int r = 0; r < count; r += height)
          multiply(p, count - r < height ? count - r : height, Strip{x, k, at + r, row + r, c, y + r * kPanel + c},
                   bytes, room);
      }
      const bool all = linear_is_all(e, column);
      float of_linear[2 * kPanel];
      linear(StripTile{p, count, at, row, y, room}, linear_of(e, count, row, column, of_linear),
             all ? static_cast<float*>(e.out) + row * e.columns + column : y, all ? e.columns : kPanel);
      if (!all) finish(e, {count, row, column, y, has_grid(e) ? grid + (p - first) * kGridFloats : nullptr}, pair);
    }
  }
}

}  // namespace
