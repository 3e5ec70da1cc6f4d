// int4_linear: y = epilogue(x . w^T) with 4-bit weights in layout `nibble64` (qkernels/weights.py), value = scale *
// (code - zero) by groups.
//
// x int8 (W4A8): nibbles are unpacked in registers into the unsigned operand of the byte dot product, x is the signed
// one. A group's sum starts at -8 * sum(x), so that it is exact in int32; then sum_y += scale * (sum - (zero - 8) *
// sum(x)) in float32. x float (W4A16): a panel is dequantized 256 inputs at a time into a buffer that stays in L2, and
// multiplied in float32.
#include "blocking.h"
#include "parallel.h"

namespace {

constexpr std::int64_t kStep = 8;              // inputs in one step of a packed panel
constexpr std::int64_t kStepBytes = 256;       // 64 columns x 4 bytes
constexpr std::int64_t kChunkBytes = 8 << 20;  // most of x that is copied at a time
constexpr std::int64_t kCopyAlone = 1 << 16;   // less is copied by one thread
constexpr std::int64_t kDequantized = 256;     // inputs dequantized at a time

struct Weights4 {
  const std::uint8_t* codes;
  const f16* scales;
  const f16* zeros;  // nullptr: 8
  std::int64_t k, steps, group, groups, panels;

  const std::uint8_t* panel(std::int64_t p) const { return codes + p * steps * kStepBytes; }
  std::int64_t group_row(std::int64_t p, std::int64_t g) const { return (p * groups + g) * kPanel; }
};

// ---- W4A8 ----

#if defined(QK_TIER_avx512vnni)

static inline void dot(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

// acc[rows, 64] = -8 * sums[row] + x . codes
template <int rows>
[[gnu::noinline]] static void tile(const std::int8_t* a, std::int64_t stride, const std::uint8_t* panel,
                                   std::int64_t steps, const std::int32_t* sums, std::int64_t sum_stride,
                                   std::int32_t* acc) {
  __m512i c[rows][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) c[r][j] = _mm512_set1_epi32(-8 * sums[r * sum_stride]);
  }
  const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 1
  for (std::int64_t s = 0; s < steps; ++s, panel += kStepBytes, a += kStep) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i b[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m512i bytes = _mm512_loadu_si512(panel + 64 * j);
        if (half) bytes = _mm512_srli_epi16(bytes, 4);
        b[j] = _mm512_and_si512(bytes, low);
        if (!half) _mm_prefetch(reinterpret_cast<const char*>(panel + 1024 + 64 * j), _MM_HINT_T0);
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
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(acc + r * kPanel + 16 * j, c[r][j]);
  }
}

#elif defined(QK_TIER_avx2)

// Two products of 15 * 127 fit into 16 bits, and so do two such pairs: vpmaddubsw is safe here.
template <int rows>
[[gnu::noinline]] static void tile(const std::int8_t* a, std::int64_t stride, const std::uint8_t* panel,
                                   std::int64_t steps, const std::int32_t* sums, std::int64_t sum_stride,
                                   std::int32_t* acc) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int j = 0; j < kPanel; j += 8) {
    __m256i c[rows];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) c[r] = _mm256_set1_epi32(-8 * sums[r * sum_stride]);
#pragma GCC unroll 1
    for (std::int64_t s = 0; s < steps; ++s) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + s * kStepBytes + 4 * j));
      const __m256i first_four = _mm256_and_si256(bytes, low),
                    last_four = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        std::int32_t four[2];
        std::memcpy(four, a + r * stride + s * kStep, 8);
        const __m256i words = _mm256_add_epi16(_mm256_maddubs_epi16(first_four, _mm256_set1_epi32(four[0])),
                                               _mm256_maddubs_epi16(last_four, _mm256_set1_epi32(four[1])));
        c[r] = _mm256_add_epi32(c[r], _mm256_madd_epi16(words, ones));
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * kPanel + j), c[r]);
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

static void tile_of(int rows, const std::int8_t* a, std::int64_t stride, const std::uint8_t* panel, std::int64_t steps,
                    const std::int32_t* sums, std::int64_t sum_stride, std::int32_t* acc) {
  switch (rows) {
    case 1:
      return tile<1>(a, stride, panel, steps, sums, sum_stride, acc);
    case 2:
      return tile<2>(a, stride, panel, steps, sums, sum_stride, acc);
    case 3:
      return tile<3>(a, stride, panel, steps, sums, sum_stride, acc);
    case 4:
      return tile<4>(a, stride, panel, steps, sums, sum_stride, acc);
    case 5:
      return tile<5>(a, stride, panel, steps, sums, sum_stride, acc);
    default:
      return tile<6>(a, stride, panel, steps, sums, sum_stride, acc);
  }
}

struct Codes {
  const std::int8_t* a;  // rows of x, padded to whole steps
  std::int64_t stride;
  const std::int32_t* sums;    // [rows, chunks]: sum of x over a chunk
  std::int64_t chunk, chunks;  // a chunk lies in one group of the weight and, with grouped x_scale, in one group of x
  const float* group_scale;    // x_scale [M, ceil(K / 128)], or nullptr
};

// total[rows, 64] += x_scale * scale * (acc - (zero - 8) * sum(x)) for one chunk; the first chunk starts from 0.
static void add_chunk(const Weights4& w, const Codes& x, int rows, std::int64_t at, std::int64_t row,
                      std::int64_t panel, std::int64_t c, const std::int32_t* acc, float* total) {
  const std::int64_t from = w.group_row(panel, c * x.chunk / w.group), x_group = c * x.chunk / kGroup,
                     x_groups = ceil_div(w.k, kGroup);
  for (int j = 0; j < kPanel; j += W) {
    const vf scale = load(w.scales + from + j);
    const vf zero_point = w.zeros ? sub(load(w.zeros + from + j), set1(8.0f)) : zero();
    for (int r = 0; r < rows; ++r) {
      vf sum = as_floats(acc + r * kPanel + j);
      if (w.zeros) sum = fnma(zero_point, set1(static_cast<float>(x.sums[(at + r) * x.chunks + c])), sum);
      const vf factor = x.group_scale ? mul(scale, set1(x.group_scale[(row + r) * x_groups + x_group])) : scale;
      float* to = total + r * kPanel + j;
      store(to, c == 0 ? mul(sum, factor) : fma(sum, factor, load(to)));
    }
  }
}

// Rows `rows` of the copy (whose row 0 is row `offset` of x) against panels first..last.
static void unit_codes(const Weights4& w, const Codes& x, const Epilogue& e, std::int64_t offset, Part rows,
                       std::int64_t first, std::int64_t last) {
  const std::int64_t grids = has_grid(e) ? (last - first) * kGridFloats : 0;
  auto* acc = static_cast<std::int32_t*>(qk_workspace(QK_SLOT_B, 4 * (kTile * (2 * kPanel + kGroup) + grids)));
  auto* total = reinterpret_cast<float*>(acc + kTile * kPanel);
  float *pair = total + kTile * kPanel, *grid = pair + kTile * kGroup;
  fill_grids(e, first, last, grid);
  const std::int64_t tiles = ceil_div(rows.size(), kTile);
  for (std::int64_t t = 0; t < tiles; ++t) {
    const Part part(rows.size(), tiles, t);
    const int count = static_cast<int>(part.size());
    const std::int64_t at = rows.begin + part.begin, row = offset + at;
    for (std::int64_t p = first; p < last; ++p) {
      for (std::int64_t c = 0; c < x.chunks; ++c) {
        const std::int64_t begin = c * x.chunk / kStep, left = w.steps - begin, whole = ceil_div(x.chunk, kStep);
        tile_of(count, x.a + at * x.stride + begin * kStep, x.stride, w.panel(p) + begin * kStepBytes,
                left < whole ? left : whole, x.sums + at * x.chunks + c, x.chunks, acc);
        add_chunk(w, x, count, at, row, p, c, acc, total);
      }
      float room[2 * kPanel];
      apply(linear_of(e, count, row, p * kPanel, room), total, count, total, kPanel);
      finish(e, {count, row, p * kPanel, total, has_grid(e) ? grid + (p - first) * kGridFloats : nullptr}, pair);
    }
  }
}

// `flip` is 128 where x holds code + 128, else 0.
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

// ---- W4A16 ----

// a * b + c, fused where the processor can do it in one instruction.
static inline vf multiply_add(vf a, vf b, vf c) {
#if defined(QK_TIER_scalar)
  return add(mul(a, b), c);
#else
  return fma(a, b, c);
#endif
}

// Inputs of steps begin..end of a panel as floats [inputs, 64].
template <int i>
static inline void dequantize_one(vi bytes, vf scale, vf zero_point, float* to) {
  const vf low = to_float(bit_and(shift_right<8 * i>(bytes), set1(15)));
  const vf high = to_float(bit_and(shift_right<8 * i + 4>(bytes), set1(15)));
  store(to + i * kPanel, mul(sub(low, zero_point), scale));
  store(to + (4 + i) * kPanel, mul(sub(high, zero_point), scale));
}
static void dequantize(const Weights4& w, std::int64_t p, std::int64_t begin, std::int64_t end, float* to) {
  const std::uint8_t* panel = w.panel(p);
  for (int j = 0; j < kPanel; j += W) {
    vf scale = zero(), zero_point = set1(8.0f);
    std::int64_t known = -1;
    for (std::int64_t s = begin; s < end; ++s) {
      const std::int64_t group = s * kStep / w.group;
      if (group != known) {
        scale = load(w.scales + w.group_row(p, group) + j);
        if (w.zeros) zero_point = load(w.zeros + w.group_row(p, group) + j);
        known = group;
      }
      const vi bytes = load(reinterpret_cast<const std::int32_t*>(panel + s * kStepBytes + 4 * j));
      float* at = to + (s - begin) * kStep * kPanel + j;
      dequantize_one<0>(bytes, scale, zero_point, at);
      dequantize_one<1>(bytes, scale, zero_point, at);
      dequantize_one<2>(bytes, scale, zero_point, at);
      dequantize_one<3>(bytes, scale, zero_point, at);
    }
  }
}

#if defined(QK_TIER_avx512vnni)
constexpr int kStrip = 4;
#else
constexpr int kStrip = 2;  // vectors of a register tile: 6 x 2 accumulators fit into 16 registers
#endif

// acc[rows, kStrip * W] (+)= x[rows, k] . b[k, 64]
template <int rows>
static inline void strip(const float* x, std::int64_t stride, const float* b, std::int64_t k, bool more, float* acc) {
  vf c[rows][kStrip];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kStrip; ++j) c[r][j] = more ? load(acc + r * kPanel + j * W) : zero();
  }
#pragma GCC unroll 1
  for (std::int64_t i = 0; i < k; ++i, b += kPanel) {
    vf row[kStrip];
#pragma GCC unroll 4
    for (int j = 0; j < kStrip; ++j) row[j] = load(b + j * W);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const vf v = set1(x[r * stride + i]);
#pragma GCC unroll 4
      for (int j = 0; j < kStrip; ++j) c[r][j] = multiply_add(v, row[j], c[r][j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kStrip; ++j) store(acc + r * kPanel + j * W, c[r][j]);
  }
}

template <int rows>
[[gnu::noinline]] static void float_tile(const float* x, std::int64_t stride, const float* b, std::int64_t k, bool more,
                                         float* acc) {
  for (int j = 0; j < kPanel; j += kStrip * W) strip<rows>(x, stride, b + j, k, more, acc + j);
}

static void float_tile_of(int rows, const float* x, std::int64_t stride, const float* b, std::int64_t k, bool more,
                          float* acc) {
  switch (rows) {
    case 1:
      return float_tile<1>(x, stride, b, k, more, acc);
    case 2:
      return float_tile<2>(x, stride, b, k, more, acc);
    case 3:
      return float_tile<3>(x, stride, b, k, more, acc);
    case 4:
      return float_tile<4>(x, stride, b, k, more, acc);
    case 5:
      return float_tile<5>(x, stride, b, k, more, acc);
    default:
      return float_tile<6>(x, stride, b, k, more, acc);
  }
}

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
