// int4_linear: y = epilogue(x . w^T) with 4-bit weights in layout `nibble64` (qkernels/layouts.py), value = scale *
// (code - zero) by groups.
//
// x int8 (W4A8): nibbles are unpacked in registers into the unsigned operand of the byte dot product, x is the signed
// one. A group's sum starts at -8 * sum(x), so that it is exact in int32; then sum_y += scale * (sum - (zero - 8) *
// sum(x)) in float32 (int4_tiles.h; avx2: int4_strips.h). x float (W4A16): a panel is dequantized 256 inputs at a time
// into a buffer that stays in L2, and multiplied in float32; for few rows in registers (int4_floats.h).
#include "int4_floats.h"
#include "parallel.h"
#if defined(QK_TIER_avx2) && !defined(QK_TIER_avxvnni)
#include "int4_strips.h"
#else
#include "int4_tiles.h"
#endif

namespace {

constexpr std::int64_t kChunkBytes = 8 << 20;  // most of x that is copied at a time
constexpr std::int64_t kCopyAlone = 1 << 16;   // less is copied by one thread
constexpr std::int64_t kDequantized = 256;     // inputs dequantized at a time

static void unit_floats(const Weights4& w, const float* a, std::int64_t stride, const Epilogue& e, std::int64_t offset,
                        Part rows, std::int64_t first, std::int64_t last) {
  const std::int64_t tiles = ceil_div(rows.size(), kTile), block = kDequantized / kStep,
                     blocks = ceil_div(w.steps, block);
  const std::int64_t sums = (last - first) * rows.size() * kPanel,
                     grids = has_grid(e) ? (last - first) * kGridFloats : 0;
  auto* buffer =
      static_cast<float*>(qk_workspace(QK_SLOT_B, 4 * (kDequantized * kPanel + sums + kTile * kGroup + grids)));
  float* acc = buffer + kDequantized * kPanel;
  float *pair = acc + sums, *grid = pair + kTile * kGroup;
  fill_grids(e, first, last, grid);
  for (std::int64_t p = first; p < last; ++p) {
    if (rows.size() <= kFewRows) {
      few_rows_of(rows.size(), w, p, a + rows.begin * stride, stride, acc + (p - first) * rows.size() * kPanel);
      continue;
    }
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t begin = b * block, end = begin + block < w.steps ? begin + block : w.steps;
      dequantize(w, p, begin, end, buffer);
      for (std::int64_t t = 0; t < tiles; ++t) {
        const Part part(rows.size(), tiles, t);
        float_tile_of(static_cast<int>(part.size()), a + (rows.begin + part.begin) * stride + begin * kStep, stride,
                      buffer, (end - begin) * kStep, b > 0, acc + ((p - first) * rows.size() + part.begin) * kPanel);
      }
    }
  }
  for (std::int64_t t = 0; t < tiles; ++t) {
    const Part part(rows.size(), tiles, t);
    const int count = static_cast<int>(part.size());
    for (std::int64_t p = first; p < last; ++p) {
      float* y = acc + ((p - first) * rows.size() + part.begin) * kPanel;
      float room[2 * kPanel];
      const std::int64_t row = offset + rows.begin + part.begin;
      apply(linear_of(e, count, row, p * kPanel, room), y, count, y, kPanel);
      finish(e, {count, row, p * kPanel, y, has_grid(e) ? grid + (p - first) * kGridFloats : nullptr}, pair);
    }
  }
}

template <class T>
static void copy_floats(const T* x, std::int64_t k, float* to, std::int64_t padded) {
  std::int64_t i = 0;
  for (; i + W <= k; i += W) store(to + i, load(x + i));
  for (; i < k; ++i) to[i] = to_f32(x[i]);
  for (; i < padded; ++i) to[i] = 0.0f;
}

}  // namespace

// Rows of x are x_stride bytes apart. x_shifted: they hold code + 128 as uint8.
extern "C" void QK_IMPL(int4_linear)(const void* x, int x_type, std::int64_t m, std::int64_t k, std::int64_t x_stride,
                                     int x_shifted, const float* x_scale, int x_scale_kind, const std::uint8_t* codes,
                                     const std::uint16_t* scales, const std::uint16_t* zeros, std::int64_t n,
                                     std::int64_t group, const float* bias, int activation, const void* residual,
                                     int residual_type, void* out, int out_type, const float* out_scale,
                                     int out_scale_per_column, const float* out_zero_point,
                                     int out_zero_point_per_column, float* group_scales, int threads) {
  const Weights4 w{codes,
                   reinterpret_cast<const f16*>(scales),
                   reinterpret_cast<const f16*>(zeros),
                   k,
                   ceil_div(k, kStep),
                   group,
                   ceil_div(k, group),
                   ceil_div(n, kPanel)};
  const bool integers = x_type == QK_I8, x_grouped = integers && x_scale_kind == 2;
  const Epilogue e{integers && !x_grouped ? x_scale : nullptr,
                   x_scale_kind == 0,
                   nullptr,
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

  const std::int64_t padded = w.steps * kStep, size = integers ? 1 : 4;
  std::int64_t stride = round_up(padded, 64);
  if (stride * size % 4096 == 0) stride += 64;  // rows must not share one set of the L1 cache
  const std::int64_t chunk = x_grouped && group > kGroup ? kGroup : group, chunks = ceil_div(k, chunk);
  std::int64_t most = kChunkBytes / (stride * size) / kBlockRows * kBlockRows;
  if (most < kBlockRows) most = kBlockRows;
  if (most > m) most = m;
  const std::int64_t copy_bytes = most * stride * size, sum_bytes = integers ? most * chunks * 4 : 0;
  auto* copy = static_cast<char*>(qk_workspace(QK_SLOT_SHARED, static_cast<std::size_t>(copy_bytes + sum_bytes)));
  auto* sums = reinterpret_cast<std::int32_t*>(copy + copy_bytes);

  for (std::int64_t offset = 0; offset < m; offset += most) {
    const std::int64_t rows = m - offset < most ? m - offset : most;
    parallel_for(threads, rows, ceil_div(kCopyAlone, stride * size), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        const void* from = static_cast<const char*>(x) + (offset + r) * x_stride;
        float* to = reinterpret_cast<float*>(copy) + r * stride;
        if (integers)
          copy_codes(static_cast<const std::uint8_t*>(from), x_shifted ? 128 : 0, k, chunk,
                     reinterpret_cast<std::int8_t*>(copy) + r * stride, padded, sums + r * chunks);
        else if (x_type == QK_F32)
          copy_floats(static_cast<const float*>(from), k, to, padded);
        else if (x_type == QK_BF16)
          copy_floats(static_cast<const bf16*>(from), k, to, padded);
        else
          copy_floats(static_cast<const f16*>(from), k, to, padded);
      }
    });
    const Codes a{
        reinterpret_cast<const std::int8_t*>(copy), stride, sums, chunk, chunks, x_grouped ? x_scale : nullptr};
    const Grid grid(rows, n, integers ? panel_bytes(w) : w.steps * kStepBytes, group_scales != nullptr, threads,
                    integers ? kByteBlockRows : kBlockRows);
    parallel_tasks(threads, grid.tasks(), [&](std::int64_t task) {
      const Part block(rows, grid.row_blocks, task / grid.units);
      const std::int64_t first = task % grid.units * grid.unit_panels, end = first + grid.unit_panels;
      const std::int64_t last = end < grid.panels ? end : grid.panels;
      if (integers)
        unit_codes(w, a, e, offset, block, first, last);
      else
        unit_floats(w, reinterpret_cast<const float*>(copy), stride, e, offset, block, first, last);
    });
  }
}
