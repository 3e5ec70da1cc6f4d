// int4_linear: y = epilogue(x . w^T) with 4-bit weights in layout `nibble64` (qkernels/layouts.py), value = scale *
// (code - zero) by groups.
//
// x int8 (W4A8): nibbles are unpacked in registers into the unsigned operand of the byte dot product, x is the signed
// one. A group's sum starts at -8 * sum(x), so that it is exact in int32; then sum_y += scale * (sum - (zero - 8) *
// sum(x)) in float32 (int4_codes.h). x float (W4A16): a panel is dequantized 256 inputs at a time into a buffer that
// stays in L2, and multiplied in float32; for few rows in registers (int4_floats.h).
#include "int4_codes.h"
#include "int4_floats.h"
#include "parallel.h"

namespace {

constexpr std::int64_t kChunkBytes = 8 << 20;  // most of x that is copied at a time
constexpr std::int64_t kCopyAlone = 1 << 16;   // less is copied by one thread
constexpr std::int64_t kDequantized = 256;     // inputs dequantized at a time

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

// A row of x, padded with zeros, and its sum over each chunk. `flip` is 128 where x holds code + 128, else 0.
#if defined(QK_TIER_avx512vnni)
static void copy_codes(const std::uint8_t* x, std::uint8_t flip, std::int64_t k, std::int64_t chunk, std::int8_t* to,
                       std::int64_t padded, std::int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1), turned = _mm512_set1_epi8(static_cast<char>(flip));
  for (std::int64_t begin = 0; begin < k; begin += chunk) {
    const std::int64_t end = begin + chunk < k ? begin + chunk : k;
    __m512i sum = _mm512_setzero_si512();
    for (std::int64_t i = begin; i < end; i += 64) {
      const __mmask64 there = end - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (end - i)) - 1;
      const __m512i codes =
          _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, x + i), _mm512_maskz_mov_epi8(there, turned));
      _mm512_mask_storeu_epi8(to + i, there, codes);
      dot(sum, ones, codes);
    }
    sums[begin / chunk] = _mm512_reduce_add_epi32(sum);
  }
  std::memset(to + k, 0, static_cast<std::size_t>(padded - k));
}
#else
static void copy_codes(const std::uint8_t* x, std::uint8_t flip, std::int64_t k, std::int64_t chunk, std::int8_t* to,
                       std::int64_t padded, std::int32_t* sums) {
  for (std::int64_t i = 0; i < k; ++i) to[i] = static_cast<std::int8_t>(x[i] ^ flip);
  for (std::int64_t i = k; i < padded; ++i) to[i] = 0;
  for (std::int64_t c = 0; c * chunk < k; ++c) {
    const std::int64_t end = (c + 1) * chunk < k ? (c + 1) * chunk : k;
    std::int32_t sum = 0;
    for (std::int64_t i = c * chunk; i < end; ++i) sum += to[i];
    sums[c] = sum;
  }
}
#endif

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
    const Grid grid(rows, n, w.steps * kStepBytes, group_scales != nullptr, threads);
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
