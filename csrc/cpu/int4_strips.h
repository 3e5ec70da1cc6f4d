// int4_linear with int8 activations (W4A8) on AVX2, by strips of 16 columns and three rows. Results of a panel are
// int32 where one scale holds for all k, and floats where each chunk of k has its own.
//
// To take nibbles apart within the product of every three rows costs a tenth of it and more. So a unit of panels is
// unpacked once to bytes, which stay in L2 and meet all rows of a block; few rows read nibbles.
#pragma once

#include "int4_codes.h"
#include "byte_pairs.h"

namespace {

constexpr int kPairs4 = 8;
constexpr std::int64_t kRound = 4 * kPairs4;  // k of a widening

struct Strip {
  const Codes& x;
  std::int64_t k, at, row;  // the first row in the copy of x, and in x
  int column;               // of the panel
  float* y;                 // results [rows, 16], rows kPanel apart: floats, or int32

  const std::int8_t* first_x() const { return x.a + at * x.stride; }
};

// Bytes of an unpacked panel, [strips, K / 4, 16, 4], K padded with zeros to whole rounds.
static inline std::int64_t panel_bytes(const Weights4& w) { return round_up(w.k, kRound) * kPanel; }

static void unpack_nibbles(const Weights4& w, std::int64_t p, std::uint8_t* to) {
  const vi low = _mm256_set1_epi8(15);
  const std::uint8_t* panel = w.panel(p);
  const std::int64_t strip = panel_bytes(w) * kStripColumns / kPanel, unpacked = 2 * w.steps * kStripStep;
  for (std::int64_t s = 0; s < w.steps; ++s, panel += kStepBytes) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      std::uint8_t* at = to + j / 2 * strip + 2 * s * kStripStep + j % 2 * 32;
      const vi both = load(reinterpret_cast<const std::int32_t*>(panel + 32 * j));
      store(reinterpret_cast<std::int32_t*>(at), bit_and(both, low));
      store(reinterpret_cast<std::int32_t*>(at + kStripStep), bit_and(_mm256_srli_epi16(both, 4), low));
    }
  }
  for (std::uint8_t* at = to + unpacked; at < to + panel_bytes(w); at += strip)
    std::memset(at, 0, static_cast<std::size_t>(strip - unpacked));
}

// Where a strip's codes come from, a round at a time, c = x . w in int16: from bytes,
struct FromBytes {
  static constexpr int most_rows = kStripHeight;
  const std::uint8_t* at;
  FromBytes(const Weights4& w, std::int64_t, int column, const std::uint8_t* bytes)
      : at(bytes + column * round_up(w.k, kRound)) {}
  template <int rows>
  [[gnu::always_inline]] void round(vi (&c)[rows][2], const std::int8_t* x, std::int64_t stride) {
#pragma GCC unroll 8
    for (int s = 0; s < kPairs4; ++s, at += kStripStep) {
      const auto* codes = reinterpret_cast<const std::int32_t*>(at);
      const vi w0 = load(codes), w1 = load(codes + W);
#pragma GCC unroll 3
      for (int r = 0; r < rows; ++r) {
        if (s == 0)
          add_pairs<true>(c[r], x + r * stride, w0, w1);
        else
          add_pairs<false>(c[r], x + r * stride + 4 * s, w0, w1);
      }
    }
  }
};

alignas(32) static const std::int32_t kLowNibbles[8] = {0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f,
                                                        0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f, 0x0f0f0f0f};

// or from nibbles. The other strips' lines of a step are asked for by the first one: they lie beside its own.
struct FromNibbles {
  static constexpr int most_rows = 2;  // of three compilers keep sums on the stack
  const std::uint8_t* at;
  std::int64_t steps;
  bool ask;
  FromNibbles(const Weights4& w, std::int64_t p, int column, const std::uint8_t*)
      : at(w.panel(p) + 4 * column), steps(w.steps), ask(column == 0) {}
  template <int rows>
  [[gnu::always_inline]] void round(vi (&c)[rows][2], const std::int8_t* x, std::int64_t stride) {
#pragma GCC unroll 4
    for (int s = 0; s < kPairs4 / 2; ++s, at += kStepBytes) {
      if (s > 0 && s >= steps) break;
      if (ask) {
#pragma GCC unroll 4
        for (int line = 0; line < 4; ++line) __builtin_prefetch(at + 8 * kStepBytes + 64 * line);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const std::int32_t* mask = kLowNibbles;
        __asm__ volatile("" : "+r"(mask));  // to be read at each use: no register is left for it
        vi w[2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const vi both = load(reinterpret_cast<const std::int32_t*>(at + 32 * v));
          w[v] = bit_and(half ? _mm256_srli_epi16(both, 4) : both, load(mask));
        }
#pragma GCC unroll 3
        for (int r = 0; r < rows; ++r) {
          const std::int8_t* four = x + r * stride + kStep * s + 4 * half;
          if (s == 0 && half == 0)
            add_pairs<true>(c[r], four, w[0], w[1]);
          else
            add_pairs<false>(c[r], four, w[0], w[1]);
        }
      }
    }
    steps -= kPairs4 / 2;
  }
};

alignas(32) static const std::int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// sum[rows, 2 * 8] = (`first`, less 8 * sum(x)) or += c, widened.
template <bool first, int rows>
[[gnu::always_inline]] static inline void widen(vi (&sum)[rows][2], vi (&c)[rows][2], const std::int32_t* sums,
                                                std::int64_t apart) {
  const std::int16_t* ones = kOnes;
  __asm__ volatile("" : "+r"(ones));  // to be read here: no register is left for it before
  const vi one = load(reinterpret_cast<const std::int32_t*>(ones));
#pragma GCC unroll 3
  for (int r = 0; r < rows; ++r) {
    if constexpr (first) {
      const vi eight_sums = _mm256_slli_epi32(set1(sums[r * apart]), 3);
      sum[r][0] = sub(_mm256_madd_epi16(c[r][0], one), eight_sums);
      sum[r][1] = sub(_mm256_madd_epi16(c[r][1], one), eight_sums);
    } else {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v)
        __asm__("vpmaddwd %2, %1, %1\n\tvpaddd %1, %0, %0" : "+x"(sum[r][v]), "+x"(c[r][v]) : "x"(one));
    }
  }
}

// sum = x . w over k of one scale, `sums` being those of x over them, rows `apart`.
template <class From, int rows>
[[gnu::always_inline]] static inline void sum_rounds(vi (&sum)[rows][2], From& from, const std::int8_t*& a,
                                                     std::int64_t stride, std::int64_t k, const std::int32_t* sums,
                                                     std::int64_t apart) {
  vi c[rows][2];
  from.round(c, a, stride);
  widen<true>(sum, c, sums, apart);
  a += kRound;
#pragma GCC unroll 1
  for (k -= kRound; k > 0; k -= kRound, a += kRound) {
    from.round(c, a, stride);
    widen<false>(sum, c, sums, apart);
  }
}

// A strip's results where one scale holds for all k.
template <class From, int rows>
[[gnu::noinline]] static void sum_strip(const Strip& s, From from) {
  vi sum[rows][2];
  const std::int8_t* a = s.first_x();
  sum_rounds(sum, from, a, s.x.stride, s.k, s.x.sums + s.at, 1);
  auto* to = reinterpret_cast<std::int32_t*>(s.y);
#pragma GCC unroll 3
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) store(to + r * kPanel + W * v, sum[r][v]);
  }
}

// By chunks, each scaled. `general`: with zeros, or one x_scale for each 128 k.
template <class From, int rows, bool general>
[[gnu::noinline]] static void scale_strip(const Strip& s, const Weights4& w, const PanelFloats& floats, From from) {
  const std::int8_t* a = s.first_x();
  const std::int64_t stride = s.x.stride, chunk = s.x.chunk, chunks = s.x.chunks, x_groups = ceil_div(w.k, kGroup),
                     next = chunk == w.group ? kPanel : 0;
  const float *scales = floats.scales + s.column, *zeros = floats.zeros;
  if (general && zeros) zeros += s.column;
  const std::int32_t* sums = s.x.sums + s.at * chunks;
#pragma GCC unroll 3
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) store(s.y + r * kPanel + W * v, zero());
  }
#pragma GCC unroll 1
  for (std::int64_t k = 0; k < s.k; k += chunk, scales += next, ++sums) {
    vi sum[rows][2];
    sum_rounds(sum, from, a, stride, k + chunk < s.k ? chunk : s.k - k, sums, chunks);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const vf scale = load(scales + W * v);
#pragma GCC unroll 3
      for (int r = 0; r < rows; ++r) {
        float* to = s.y + r * kPanel + W * v;
        vf y = to_float(sum[r][v]), factor = scale;
        if (general) {
          if (zeros) y = fnma(load(zeros + W * v), set1(static_cast<float>(sums[r * chunks])), y);
          if (s.x.group_scale) factor = mul(factor, set1(s.x.group_scale[(s.row + r) * x_groups + k / kGroup]));
        }
        store(to, fma(y, factor, load(to)));
      }
    }
    if (general && zeros) zeros += next;
  }
}

// The same where each round of k has its own scale: there is no other sum, and each row is scaled as it is widened. In
// assembly, because compilers widen all rows first, and what is left of them waits.
template <class From, int rows>
[[gnu::noinline]] static void round_strip(const Strip& s, const PanelFloats& floats, From from) {
  struct Vector {
    char at[32];
  };
  const std::int8_t* a = s.first_x();
  const std::int64_t stride = s.x.stride, chunks = s.x.chunks;
  const float* scales = floats.scales + s.column;
  const std::int32_t* sums = s.x.sums + s.at * chunks;
#pragma GCC unroll 3
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) store(s.y + r * kPanel + W * v, zero());
  }
#pragma GCC unroll 1
  for (std::int64_t k = s.k; k > 0; k -= kRound, a += kRound, scales += kPanel, ++sums) {
    vi c[rows][2];
    from.round(c, a, stride);
    const vf scale0 = load(scales), scale1 = load(scales + W);
#pragma GCC unroll 3
    for (int r = 0; r < rows; ++r) {
      auto* y = reinterpret_cast<Vector*>(s.y + r * kPanel);
      vi eight_sums;
      __asm__(
          "vpbroadcastd %[sum], %[eight_sums]\n\t"
          "vpmaddwd %[ones], %[c0], %[c0]\n\tvpmaddwd %[ones], %[c1], %[c1]\n\t"
          "vpslld $3, %[eight_sums], %[eight_sums]\n\t"
          "vpsubd %[eight_sums], %[c0], %[c0]\n\tvpsubd %[eight_sums], %[c1], %[c1]\n\t"
          "vcvtdq2ps %[c0], %[c0]\n\tvcvtdq2ps %[c1], %[c1]\n\t"
          "vfmadd213ps %[y0], %[scale0], %[c0]\n\tvfmadd213ps %[y1], %[scale1], %[c1]\n\t"
          "vmovups %[c0], %[y0]\n\tvmovups %[c1], %[y1]"
          : [c0] "+x"(c[r][0]), [c1] "+x"(c[r][1]), [y0] "+m"(y[0]), [y1] "+m"(y[1]), [eight_sums] "=&x"(eight_sums)
          : [sum] "m"(sums[r * chunks]), [ones] "m"(kOnes), [scale0] "x"(scale0), [scale1] "x"(scale1));
    }
  }
}

template <class From, int rows>
static void strip(const Strip& s, const Weights4& w, const PanelFloats& floats, const From& from) {
  if (s.x.chunks == 1) return sum_strip<From, rows>(s, from);
  if (w.zeros || s.x.group_scale) return scale_strip<From, rows, true>(s, w, floats, from);
  if (s.x.chunk == kRound) return round_strip<From, rows>(s, floats, from);
  scale_strip<From, rows, false>(s, w, floats, from);
}

// Rows `rows` of the copy (whose row 0 is row `offset` of x) against panels first..last. Where `bytes_of_panel` is not
// 0, that many of a panel are unpacked, once for all rows.
template <class From>
static void unit_codes_from(const Weights4& w, const Codes& x, const Epilogue& e, std::int64_t offset, Part rows,
                            std::int64_t first, std::int64_t last, std::int64_t bytes_of_panel) {
  const std::int64_t tiles = ceil_div(rows.size(), kTile), panels = last - first,
                     grids = has_grid(e) ? panels * kGridFloats : 0, floats_of_panel = panel_floats_size(w),
                     kept = tiles == 1 ? 1 : panels;  // for a single tile panels need not be kept
  auto* y = static_cast<float*>(qk_workspace(
      QK_SLOT_B, 4 * (kTile * (kPanel + kGroup) + grids + panels * floats_of_panel) + kept * bytes_of_panel));
  float *pair = y + kTile * kPanel, *grid = pair + kTile * kGroup, *rooms = grid + grids;
  auto* unpacked = reinterpret_cast<std::uint8_t*>(rooms + panels * floats_of_panel);
  fill_grids(e, first, last, grid);
  for (std::int64_t p = first; p < last; ++p) fill_panel_floats(w, p, rooms + (p - first) * floats_of_panel);
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t at = rows.begin + t * kTile, row = offset + at, left = rows.end - at;
    const int count = left < kTile ? static_cast<int>(left) : kTile, height = count == 4 ? 2 : From::most_rows;
    for (std::int64_t p = first; p < last; ++p) {
      const std::int64_t column = p * kPanel;
      const PanelFloats floats = panel_floats(w, rooms + (p - first) * floats_of_panel);
      std::uint8_t* bytes = unpacked + (kept == 1 ? 0 : p - first) * bytes_of_panel;
      if (t == 0 && bytes_of_panel) unpack_nibbles(w, p, bytes);
      const Touched touched(e, row, column);
      for (int c = 0; c < kPanel; c += kStripColumns) {
        for (int r = c / kStripColumns; r < count; r += kPanel / kStripColumns) touched.ask(r);
        for (int r = 0; r < count; r += height) {
          const Strip s{x, w.k, at + r, row + r, c, y + r * kPanel + c};
          const From from(w, p, c, bytes);
          switch (count - r < height ? count - r : height) {
            case 1:
              strip<From, 1>(s, w, floats, from);
              break;
            case 2:
              strip<From, 2>(s, w, floats, from);
              break;
            default:
              if constexpr (From::most_rows > 2) strip<From, kStripHeight>(s, w, floats, from);
          }
        }
      }
      if (x.chunks == 1) add_chunk(w, floats, x, count, at, row, 0, reinterpret_cast<const std::int32_t*>(y), y);
      const bool all = linear_is_all(e, column);
      float of_linear[2 * kPanel];
      apply(linear_of(e, count, row, column, of_linear), y, count,
            all ? static_cast<float*>(e.out) + row * e.columns + column : y, all ? e.columns : kPanel);
      if (!all) finish(e, {count, row, column, y, has_grid(e) ? grid + (p - first) * kGridFloats : nullptr}, pair);
    }
  }
}

static void unit_codes(const Weights4& w, const Codes& x, const Epilogue& e, std::int64_t offset, Part rows,
                       std::int64_t first, std::int64_t last) {
  if (rows.size() <= kTile) return unit_codes_from<FromNibbles>(w, x, e, offset, rows, first, last, 0);
  unit_codes_from<FromBytes>(w, x, e, offset, rows, first, last, panel_bytes(w));
}

}  // namespace
