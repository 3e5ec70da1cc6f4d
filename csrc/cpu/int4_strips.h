// int4_linear with int8 activations (W4A8) on AVX2, by strips (strips.h). Results of a panel are int32 where one scale
// holds for all k, and floats where each chunk of k has its own.
//
// To take nibbles apart within the product of every three rows costs a tenth of it and more. So a unit of panels is
// unpacked once to bytes, which stay in L2 and meet all rows of a block; few rows read nibbles.
#pragma once

#include "int4_codes.h"
#include "strips.h"

namespace {

constexpr int kPairs4 = 8;
constexpr std::int64_t kRound = 4 * kPairs4;  // k of a widening

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

// Where a strip's codes come from, a round at a time: from bytes,
struct FromBytes {
  static constexpr int most_rows = kStripHeight;
  const std::uint8_t* at;
  FromBytes(const Weights4& w, std::int64_t, int column, const std::uint8_t* bytes)
      : at(bytes + column * round_up(w.k, kRound)) {}
  template <int rows>
  [[gnu::always_inline]] void add_round(vi (&sum)[rows][2], const std::int8_t* x, std::int64_t stride) {
    add_products<kPairs4, Unsigned::weights, kStripStep>(sum, x, stride, at);
    at += kPairs4 * kStripStep;
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
  [[gnu::always_inline]] void add_round(vi (&sum)[rows][2], const std::int8_t* x, std::int64_t stride) {
    vi c[rows][2];
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
            add_pairs<Unsigned::weights, true>(c[r], four, w[0], w[1]);
          else
            add_pairs<Unsigned::weights, false>(c[r], four, w[0], w[1]);
        }
      }
    }
    steps -= kPairs4 / 2;
    add_widened(sum, c);
  }
};

// A strip's results where one scale holds for all k.
template <class From, int rows>
[[gnu::noinline]] static void sum_strip(const Strip& s, From from) {
  vi sum[rows][2];
#pragma GCC unroll 3
  for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = set1(-8 * s.x.sums[s.at + r]);
  const std::int8_t* a = s.first_x();
  const std::int64_t stride = s.x.stride;
#pragma GCC unroll 1
  for (std::int64_t k = s.k; k > 0; k -= kRound, a += kRound) from.add_round(sum, a, stride);
  s.keep(sum);
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
#pragma GCC unroll 1
  for (std::int64_t k = 0; k < s.k; scales += next, ++sums) {
    vi sum[rows][2];
#pragma GCC unroll 3
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = set1(-8 * sums[r * chunks]);
    const std::int64_t first = k, end = k + chunk < s.k ? k + chunk : s.k;
#pragma GCC unroll 1
    for (; k < end; k += kRound, a += kRound) from.add_round(sum, a, stride);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const vf scale = load(scales + W * v);
#pragma GCC unroll 3
      for (int r = 0; r < rows; ++r) {
        float* to = s.y + r * kPanel + W * v;
        vf y = to_float(sum[r][v]), factor = scale;
        if (general) {
          if (zeros) y = fnma(load(zeros + W * v), set1(static_cast<float>(sums[r * chunks])), y);
          if (s.x.group_scale) factor = mul(factor, set1(s.x.group_scale[(s.row + r) * x_groups + first / kGroup]));
        }
        store(to, first == 0 ? mul(y, factor) : fma(y, factor, load(to)));
      }
    }
    if (general && zeros) zeros += next;
  }
}

template <class From, int rows>
static void strip(const Strip& s, const Weights4& w, const PanelFloats& floats, const From& from) {
  if (s.x.chunks == 1) return sum_strip<From, rows>(s, from);
  if (w.zeros || s.x.group_scale) return scale_strip<From, rows, true>(s, w, floats, from);
  scale_strip<From, rows, false>(s, w, floats, from);
}

// Rows `rows` of the copy (whose row 0 is row `offset` of x) against panels first..last.
template <class From>
static void unit_codes_from(const Weights4& w, const Codes& x, const Epilogue& e, std::int64_t offset, Part rows,
                            std::int64_t first, std::int64_t last, std::int64_t bytes_of_panel) {
  unit_strips<From::most_rows>(
      x, w.k, bytes_of_panel, panel_floats_size(w), e, offset, rows, first, last,
      [&](std::int64_t p, std::uint8_t* to) { unpack_nibbles(w, p, to); },
      [&](std::int64_t p, float* room) { fill_panel_floats(w, p, room); },
      [&](std::int64_t p, int count, const Strip& s, const std::uint8_t* bytes, const float* room) {
        const PanelFloats floats = panel_floats(w, room);
        const From from(w, p, s.column, bytes);
        if (count == 1) return strip<From, 1>(s, w, floats, from);
        if (count == 2) return strip<From, 2>(s, w, floats, from);
        if constexpr (From::most_rows > 2) strip<From, kStripHeight>(s, w, floats, from);
      },
      [&](const StripTile& t, const Linear& linear, float* to, std::int64_t stride) {
        if (x.chunks == 1)
          add_chunk(w, panel_floats(w, t.room), x, t.rows, t.at, t.row, 0, reinterpret_cast<const std::int32_t*>(t.y),
                    t.y);
        apply(linear, t.y, t.rows, to, stride);
      });
}

static void unit_codes(const Weights4& w, const Codes& x, const Epilogue& e, std::int64_t offset, Part rows,
                       std::int64_t first, std::int64_t last) {
  if (rows.size() <= kTile) return unit_codes_from<FromNibbles>(w, x, e, offset, rows, first, last, 0);
  unit_codes_from<FromBytes>(w, x, e, offset, rows, first, last, panel_bytes(w));
}

}  // namespace
