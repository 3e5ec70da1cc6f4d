// What comes behind the integer sums of W4A8, for tiles and strips.
#pragma once

#include "codes.h"
#include "int4_weights.h"

namespace {

// Scales and zeros less 8 (nullptr: all 0) of a panel as floats [groups, 64].
struct PanelFloats {
  const float *scales, *zeros;
};

static inline std::int64_t panel_floats_size(const Weights4& w) { return (w.zeros ? 2 : 1) * w.groups * kPanel; }
static inline PanelFloats panel_floats(const Weights4& w, const float* room) {
  return {room, w.zeros ? room + w.groups * kPanel : nullptr};
}
static void fill_panel_floats(const Weights4& w, std::int64_t p, float* room) {
  const std::int64_t from = w.group_row(p, 0), count = w.groups * kPanel;
  for (std::int64_t i = 0; i < count; i += W) {
    store(room + i, load(w.scales + from + i));
    if (w.zeros) store(room + count + i, sub(load(w.zeros + from + i), set1(8.0f)));
  }
}

// total[rows, 64] += x_scale * scale * (acc - (zero - 8) * sum(x)) for one chunk; the first chunk starts from 0.
static void add_chunk(const Weights4& w, const PanelFloats& floats, const Codes& x, int rows, std::int64_t at,
                      std::int64_t row, std::int64_t c, const std::int32_t* acc, float* total) {
  const std::int64_t from = c * x.chunk / w.group * kPanel, x_group = c * x.chunk / kGroup,
                     x_groups = ceil_div(w.k, kGroup);
  for (int j = 0; j < kPanel; j += W) {
    const vf scale = load(floats.scales + from + j);
    for (int r = 0; r < rows; ++r) {
      vf sum = as_floats(acc + r * kPanel + j);
      if (w.zeros)
        sum = fnma(load(floats.zeros + from + j), set1(static_cast<float>(x.sums[(at + r) * x.chunks + c])), sum);
      const vf factor = x.group_scale ? mul(scale, set1(x.group_scale[(row + r) * x_groups + x_group])) : scale;
      float* to = total + r * kPanel + j;
      store(to, c == 0 ? mul(sum, factor) : fma(sum, factor, load(to)));
    }
  }
}

}  // namespace
