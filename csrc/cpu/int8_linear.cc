// int8_linear: y[M, N] = epilogue(x[M, K] . w[N, K]^T), int8 x int8 -> int32, weights in layout `vnni64`
// (qkernels/weights.py).
//
// A thread takes a block of up to 96 rows and a few panels of 64 columns. A register tile is up to 6 rows x 64 columns;
// its accumulators go to a small buffer in L1, where the epilogue turns them into results at once. Rows of x are first
// copied into the form that the tier's instruction wants:
//   - avx512vnni: x + 128 as uint8 (vpdpbusd multiplies u8 by s8); the accumulator starts at -128 * sum_k w, made when
//     packing. Rows that come so already (x_shifted) are used where they lie; this tier alone takes them.
//   - avx2: int16, the four k of a step in the order 0 2 1 3; vpmaddwd on even and odd bytes of w cannot saturate.
//   - scalar: int8 as it is.
#include "blocking.h"
#include "parallel.h"

namespace {

constexpr std::int64_t kBlockK = 4096;             // a panel of that depth is 256 KB
constexpr std::int64_t kChunkBytes = 8 << 20;      // most of A that is copied at a time
constexpr std::int64_t kCopyAloneBytes = 1 << 16;  // less is copied by one thread

#if defined(QK_TIER_avx512vnni)

using Element = std::uint8_t;

static inline void copy_row(const std::int8_t* x, std::int64_t k, Element* to) {
  const __m512i flip = _mm512_set1_epi8(-128);
  std::int64_t i = 0;
  for (; i + 64 <= k; i += 64) _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(x + i), flip));
  if (i < k) {
    const __mmask64 rest = (__mmask64{1} << (k - i)) - 1;
    _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, x + i), flip));
  }
}

// acc += four products of unsigned a and signed b in each int32 lane. As an intrinsic, GCC 12 copies and spills the
// accumulators.
static inline void dot(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

// acc[rows, 64] = start (or acc itself) + a[rows, 4 * steps] . panel^T
template <int rows>
static void tile(const Element* a, std::int64_t stride, const std::int8_t* panel, std::int64_t steps,
                 const std::int32_t* start, std::int32_t* acc) {
  __m512i c[rows][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) c[r][j] = _mm512_loadu_si512(start ? start + 16 * j : acc + r * kPanel + 16 * j);
  }
#pragma GCC unroll 1
  for (std::int64_t s = 0; s < steps; ++s, panel += 256, a += 4) {
    __m512i b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      b[j] = _mm512_loadu_si512(panel + 64 * j);
      _mm_prefetch(reinterpret_cast<const char*>(panel + 1024 + 64 * j), _MM_HINT_T0);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      std::int32_t four;
      std::memcpy(&four, a + r * stride, 4);
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) dot(c[r][j], x, b[j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(acc + r * kPanel + 16 * j, c[r][j]);
  }
}

constexpr bool kShifted = true;

#elif defined(QK_TIER_avx2)

using Element = std::int16_t;

static inline void copy_row(const std::int8_t* x, std::int64_t k, Element* to) {
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  std::int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    const __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_cvtepi8_epi16(bytes));
  }
  for (; i < k; i += 4) {
    static const int from[4] = {0, 2, 1, 3};
    for (int j = 0; j < 4; ++j) to[i + j] = i + from[j] < k ? x[i + from[j]] : 0;
  }
}

// acc[rows, 16] of a panel's 64 columns. Even and odd bytes of w are widened to int16; a pair of products is at most 2
// * 127 * 127.
template <int rows>
static inline void strip(const Element* a, std::int64_t stride, const std::int8_t* panel, std::int64_t steps,
                         std::int32_t* acc) {
  __m256i c[rows][2];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      c[r][j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + r * kPanel + 8 * j));
  }
#pragma GCC unroll 1
  for (std::int64_t s = 0; s < steps; ++s, panel += 256, a += 4) {
    __m256i even[2], odd[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 * j));
      even[j] = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8);
      odd[j] = _mm256_srai_epi16(b, 8);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      std::int32_t pair[2];
      std::memcpy(pair, a + r * stride, 8);
      const __m256i x02 = _mm256_set1_epi32(pair[0]), x13 = _mm256_set1_epi32(pair[1]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        c[r][j] = _mm256_add_epi32(c[r][j], _mm256_madd_epi16(even[j], x02));
        c[r][j] = _mm256_add_epi32(c[r][j], _mm256_madd_epi16(odd[j], x13));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + r * kPanel + 8 * j), c[r][j]);
  }
}

template <int rows>
static void tile(const Element* a, std::int64_t stride, const std::int8_t* panel, std::int64_t steps,
                 const std::int32_t* start, std::int32_t* acc) {
  if (start)
    for (int r = 0; r < rows; ++r) std::memcpy(acc + r * kPanel, start, kPanel * sizeof(std::int32_t));
  constexpr int upper = rows > 3 ? 3 : rows, lower = rows - upper;
  for (int j = 0; j < kPanel; j += 16) {
    strip<upper>(a, stride, panel + 4 * j, steps, acc + j);
    if constexpr (lower > 0) strip<lower>(a + upper * stride, stride, panel + 4 * j, steps, acc + upper * kPanel + j);
  }
}

constexpr bool kShifted = false;

#else

using Element = std::int8_t;

static inline void copy_row(const std::int8_t* x, std::int64_t k, Element* to) {
  std::memcpy(to, x, static_cast<std::size_t>(k));
  for (std::int64_t i = k; i % 4 != 0; ++i) to[i] = 0;
}

template <int rows>
static void tile(const Element* a, std::int64_t stride, const std::int8_t* panel, std::int64_t steps,
                 const std::int32_t* start, std::int32_t* acc) {
  for (int r = 0; r < rows; ++r, a += stride, acc += kPanel) {
    if (start) std::memcpy(acc, start, kPanel * sizeof(std::int32_t));
    const std::int8_t* b = panel;
    for (std::int64_t s = 0; s < steps; ++s, b += 256) {
      const int x0 = a[4 * s], x1 = a[4 * s + 1], x2 = a[4 * s + 2], x3 = a[4 * s + 3];
      for (int j = 0; j < kPanel; ++j)
        acc[j] += x0 * b[4 * j] + x1 * b[4 * j + 1] + x2 * b[4 * j + 2] + x3 * b[4 * j + 3];
    }
  }
}

constexpr bool kShifted = false;

#endif

alignas(64) static const std::int32_t kZeros[kPanel] = {};

static void tile_of(int rows, const Element* a, std::int64_t stride, const std::int8_t* panel, std::int64_t steps,
                    const std::int32_t* start, std::int32_t* acc) {
  switch (rows) {
    case 1:
      return tile<1>(a, stride, panel, steps, start, acc);
    case 2:
      return tile<2>(a, stride, panel, steps, start, acc);
    case 3:
      return tile<3>(a, stride, panel, steps, start, acc);
    case 4:
      return tile<4>(a, stride, panel, steps, start, acc);
    case 5:
      return tile<5>(a, stride, panel, steps, start, acc);
    default:
      return tile<6>(a, stride, panel, steps, start, acc);
  }
}

struct Product {
  std::int64_t k, k_stride, steps, panels;
  const std::int8_t* weight;  // panels
  const std::int32_t* start;  // -128 * sum_k w, [64 * panels]
  const float* group_scale;   // x_scale [M, groups], or nullptr
  std::int64_t groups;
  Epilogue epilogue;

  const std::int8_t* panel(std::int64_t p) const { return weight + p * steps * 256; }
  const std::int32_t* start_of(std::int64_t p) const { return kShifted ? start + p * kPanel : kZeros; }
};

// One x_scale for each 128 k: every group's sum is scaled and added up in float32.
static void grouped_tile(const Product& g, const Element* a, int rows, std::int64_t row, const std::int8_t* panel,
                         const std::int32_t* starts, std::int32_t* acc, float* sum) {
  for (int i = 0; i < rows * kPanel; ++i) sum[i] = 0.0f;
  for (std::int64_t q = 0; q < g.groups; ++q) {
    const std::int64_t first = q * (kGroup / 4), steps = g.steps - first < kGroup / 4 ? g.steps - first : kGroup / 4;
    tile_of(rows, a + 4 * first, g.k_stride, panel + 256 * first, steps, starts + q * kPanel, acc);
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
static void group_starts(const Product& g, const std::int8_t* panel, std::int32_t* starts) {
  for (std::int64_t q = 0; q < g.groups; ++q) {
    std::int32_t* to = starts + q * kPanel;
    for (int j = 0; j < kPanel; ++j) to[j] = 0;
    if (!kShifted) continue;
    const std::int64_t first = q * (kGroup / 4), steps = g.steps - first < kGroup / 4 ? g.steps - first : kGroup / 4;
    alignas(64) Element row[kGroup];
    for (int i = 0; i < kGroup; ++i) row[i] = static_cast<Element>(128);
    tile<1>(row, 0, panel + 256 * first, steps, kZeros, to);
    for (int j = 0; j < kPanel; ++j) to[j] = -to[j];
  }
}

// Rows `rows` of the chunk copied to `a` (whose row 0 is row `offset` of x) against one unit of panels.
static void unit(const Product& g, const Element* a, std::int64_t offset, Part rows, std::int64_t first_panel,
                 std::int64_t last_panel) {
  const std::int64_t tiles = ceil_div(rows.size(), kTile),
                     k_blocks = g.group_scale ? 1 : ceil_div(4 * g.steps, kBlockK);
  const std::int64_t width = last_panel - first_panel, kept = k_blocks > 1 ? width * rows.size() : kTile;
  const std::int64_t sums = kTile * kPanel, pairs = kTile * kGroup,
                     starts = g.group_scale ? width * g.groups * kPanel : 0;
  auto* acc = static_cast<std::int32_t*>(qk_workspace(QK_SLOT_B, 4 * (kept * kPanel + sums + pairs + starts)));
  auto* sum = reinterpret_cast<float*>(acc + kept * kPanel);
  float* pair = sum + sums;
  auto* group_start = reinterpret_cast<std::int32_t*>(pair + pairs);
  if (g.group_scale)
    for (std::int64_t p = 0; p < width; ++p)
      group_starts(g, g.panel(first_panel + p), group_start + p * g.groups * kPanel);

  if (k_blocks > 1) {  // deep products: blocks of k, so that a block of a panel serves all rows from L2
    for (std::int64_t b = 0; b < k_blocks; ++b) {
      const Part steps(g.steps, k_blocks, b);
      for (std::int64_t p = first_panel; p < last_panel; ++p) {
        for (std::int64_t t = 0; t < tiles; ++t) {
          const Part part(rows.size(), tiles, t);
          tile_of(static_cast<int>(part.size()), a + (rows.begin + part.begin) * g.k_stride + 4 * steps.begin,
                  g.k_stride, g.panel(p) + 256 * steps.begin, steps.size(), b == 0 ? g.start_of(p) : nullptr,
                  acc + ((p - first_panel) * rows.size() + part.begin) * kPanel);
        }
      }
    }
  }
  for (std::int64_t t = 0; t < tiles; ++t) {
    const Part part(rows.size(), tiles, t);
    const int count = static_cast<int>(part.size());
    const std::int64_t at = rows.begin + part.begin, row = offset + at;
    for (std::int64_t p = first_panel; p < last_panel; ++p) {
      const Element* from = a + at * g.k_stride;
      if (g.group_scale) {
        grouped_tile(g, from, count, row, g.panel(p), group_start + (p - first_panel) * g.groups * kPanel, acc, sum);
        finish(g.epilogue, sum, count, row, p * kPanel, pair);
      } else if (k_blocks > 1) {
        finish(g.epilogue, acc + ((p - first_panel) * rows.size() + part.begin) * kPanel, count, row, p * kPanel, pair);
      } else {
        prefetch_output(g.epilogue, count, row, p * kPanel);
        tile_of(count, from, g.k_stride, g.panel(p), g.steps, g.start_of(p), acc);
        finish(g.epilogue, acc, count, row, p * kPanel, pair);
      }
    }
  }
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
  g.k_stride = round_up(k, 64);
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

  // Every row of x from `offset` on that lies in `a` against all panels.
  const auto multiply = [&](const Element* a, std::int64_t offset, std::int64_t rows) {
    const Grid grid(rows, n, g.steps * 256, group_scales != nullptr, threads);
    parallel_tasks(threads, grid.tasks(), [&](std::int64_t task) {
      const Part block(rows, grid.row_blocks, task / grid.units);
      const std::int64_t first = task % grid.units * grid.unit_panels, last = first + grid.unit_panels;
      unit(g, a, offset, block, first, last < g.panels ? last : g.panels);
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
