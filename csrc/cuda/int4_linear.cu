// The linear map with 4-bit weights: x int8 (W4A8), bfloat16 or float16
// (W4A16).
//
// Bound by reading the weights where x has few rows, which is what it is made
// for. Weights are the left operand of mma.sync, 16 output channels per warp, so
// that as few as 8 tokens fill a product. A block has 128 channels and 16 or 64
// tokens and walks along K in steps of 128: packed weights and x come by
// cp.async through a ring of shared memory, and codes become operands in
// registers. Where that makes fewer blocks than a GPU has room for, K is split:
// blocks leave their sums in `partials`, and the last to finish a tile adds
// them in the order of K, whichever block that is.
//
// Layout `halves128`: byte j of block b of a row holds k = 128 b + j in its low
// and k = 128 b + 64 + j in its high nibble, as two's complement int4 (code -
// 8). The 32 k's of a product are dealt out so that lane q of a quad has 8
// neighbours, one 8-byte load of codes and one 8- or 16-byte load of x; a
// product does not care in which order it adds.
//
// Sums of a group leave the tensor core for float32 sums, sum += scale *
// (product - (zero - 8) * sum of x). One group for all of K and one scale per row
// of x keep the integer sum to the end instead.
#include <type_traits>

#include "epilogue_rows.h"
#include "ops.h"

namespace qk {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChannels = 16 * kWarps;         // of a block: one group of 128 outputs
constexpr int kStep = 128;                     // of K
constexpr int kCodes = kChannels * kStep / 2;  // bytes of a step's codes
constexpr int kPitch = kChannels + 4;          // of the tile of sums, in words: quads of lanes meet different banks

struct Int4Linear {
  const void* x;  // [m, k]
  int k;
  bool x_aligned;             // rows of x lie on 16 bytes
  const std::uint8_t* codes;  // [n, steps * 64]
  int steps;
  const f16* scales;  // [n, groups]
  const f16* zeros;   // the same or null
  int groups,
      parts;  // of a row, and of a step of K; no parts: one group is all of K
  int splits;
  unsigned* partials;  // [tiles, splits, tokens, 128] words
  unsigned* arrived;   // [tiles], all 0
  Epilogue epilogue;   // w_scale is not read; x_scale_kind 2: scales for each
                       // step of 128
};

template <class X>
struct Operand {  // bfloat16 or float16: two products of depth 16
  using Sum = float;
  static constexpr float weight = 1.0f;  // of a product's unit
  static constexpr bool half = std::is_same<X, f16>::value;
  static constexpr unsigned ones = half ? 0x3c003c00u : 0x3f803f80u;

  // Bytes 2i and 2i + 1 of a word, one nibble of each -> code - 8 in both
  // halves. The nibble becomes the last bits of a 16-bit float, 1024 + code or
  // 128 + code, and the constant is subtracted again: both are exact.
  static __device__ unsigned expand(unsigned word, int i, int high) {
    const unsigned bytes = __byte_perm(word, 0, i == 0 ? 0x4140 : 0x4342);
    if (half && high)  // 1024 + 16 code
      return fma2((bytes & 0x00f000f0u) ^ 0x64806480u, 0x2c002c00u, 0xd480d480u, X{});
    const unsigned nibbles = (high ? bytes >> 4 : bytes) & 0x000f000fu;
    return half ? fma2(nibbles ^ 0x64086408u, ones, 0xe408e408u, X{})
                : fma2(nibbles ^ 0x43084308u, ones, 0xc308c308u, X{});
  }
};
template <>
struct Operand<std::int8_t> {  // one product of depth 32, of 16 times the weight
  using Sum = int;
  static constexpr float weight = 1.0f / 16;
  static constexpr unsigned ones = 0x01010101u;
  static __device__ unsigned expand(unsigned word, int high) { return (high ? word : word << 4) & 0xf0f0f0f0u; }
};

// Where 16-byte pieces lie in shared memory, so that the loads of a warp meet
// different banks.
__host__ __device__ constexpr int code_place(int row,
                                             int piece) {  // of 64 bytes per row
  return row * 64 + (((piece >> 1) ^ (row >> 1 & 1)) * 2 + (piece & 1)) * 16;
}
template <class X>
__host__ __device__ constexpr int x_place(int token,
                                          int piece) {  // of 128 values per token
  return token * kStep * static_cast<int>(sizeof(X)) +
         16 * (sizeof(X) == 2 ? piece ^ (token & 1) << 2 : piece ^ (token & 3) << 1);
}

template <class X, int Tokens>
struct Ring {
  static constexpr int stages = Tokens == 16 ? 6 : 4;
  static constexpr int x_bytes = Tokens * kStep * static_cast<int>(sizeof(X));
  static constexpr int stage = kCodes + x_bytes + 4 * Tokens;  // codes, x, scales of x
  static constexpr int sums = stages * stage;                  // [4, Tokens]: sums of x over 32 values
  static constexpr int last = sums + 16 * Tokens;              // whether this block is the last of its tile
  static constexpr int bytes = last + 16;
  static_assert(Tokens * kPitch * 4 <= sums, "the tile of sums takes the ring's place");
};

__device__ inline std::uint16_t bits(bf16 x) { return x.bits; }
__device__ inline std::uint16_t bits(f16 x) { return x.bits; }
__device__ inline std::uint8_t bits(std::int8_t x) { return static_cast<std::uint8_t>(x); }

// Starts the copies of one step.
template <class X, int Tokens>
__device__ inline void fetch_step(const Int4Linear& p, std::int64_t token0, int channel0, int step,
                                  unsigned char* stage) {
  constexpr int values = 16 / sizeof(X), pieces = kStep / values;
  const int thread = threadIdx.x;
#pragma unroll
  for (int i = 0; i < kCodes / 16 / kThreads; ++i) {
    const int at = i * kThreads + thread, row = at / 4, piece = at % 4;
    const bool there = channel0 + row < p.epilogue.n;
    const std::uint8_t* from = p.codes + static_cast<std::int64_t>(there ? channel0 + row : 0) * p.steps * 64;
    copy16(stage + code_place(row, piece), from + step * 64 + piece * 16, there ? 16 : 0);
  }
#pragma unroll
  for (int first = 0; first < Tokens * pieces; first += kThreads) {
    const int at = first + thread, token = at / pieces, piece = at % pieces;
    if (Tokens * pieces < kThreads && at >= Tokens * pieces) break;
    const int k = step * kStep + piece * values;
    const bool there = token0 + token < p.epilogue.m && k < p.k;
    const X* from = static_cast<const X*>(p.x) + (there ? (token0 + token) * p.k + k : 0);
    unsigned char* const to = stage + kCodes + x_place<X>(token, piece);
    if (p.x_aligned) {
      copy16(to, from, there ? 16 : 0);
    } else {
      X line[values];
#pragma unroll
      for (int v = 0; v < values; ++v) line[v] = there && k + v < p.k ? from[v] : X{};
      unsigned words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = 0;
#pragma unroll
        for (int v = 0; v < values / 4; ++v)
          words[w] |= static_cast<unsigned>(bits(line[w * values / 4 + v])) << (8 * sizeof(X) * v);
      }
      store(to, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
  if (p.epilogue.x_scale_kind == 2 && thread < Tokens) {
    const bool there = token0 + thread < p.epilogue.m;
    copy4(stage + kCodes + Ring<X, Tokens>::x_bytes + 4 * thread,
          p.epilogue.x_scale + (there ? token0 + thread : 0) * p.steps + step, there ? 4 : 0);
  }
}

// Scales and zeros of two channels, for up to four groups of a step.
template <bool Zeros>
struct Scales {
  float scale[2][4], zero[Zeros ? 2 : 1][4];
};

template <bool Zeros>
__device__ inline void load_scales(const Int4Linear& p, int channel, int step, Scales<Zeros>& s) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j > 0 && j >= p.parts) break;
      const int group = step * p.parts + j;
      const bool there = channel + 8 * h < p.epilogue.n && group < p.groups && step < p.steps;
      const std::int64_t at = static_cast<std::int64_t>(channel + 8 * h) * p.groups + group;
      s.scale[h][j] = there ? to_float(p.scales[at]) : 0.0f;
      if (Zeros) s.zero[Zeros ? h : 0][j] = there ? to_float(p.zeros[at]) - 8.0f : 0.0f;
    }
}

// values[i], without an index into registers.
__device__ inline float pick(const float (&values)[4], int i) {
  return i == 0 ? values[0] : i == 1 ? values[1] : i == 2 ? values[2] : values[3];
}

template <class X, int Tiles>
struct Products {
  typename Operand<X>::Sum sum[Tiles][4];
};

// A unit of 32 k: `low` and `high` are 8 bytes of codes of channel r and r + 8.
template <class X, int Tiles>
__device__ inline void multiply_unit(Products<X, Tiles>& c, uint2 first, uint2 second, int high, const unsigned char* x,
                                     int unit, int lane) {
  using Number = Operand<X>;
  const unsigned word[2][2] = {{first.x, first.y}, {second.x, second.y}};
  if constexpr (sizeof(X) == 1) {
    unsigned a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = Number::expand(word[i % 2][i / 2], high);
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const uint2 v = load<uint2>(x + x_place<X>(8 * t + lane / 4, 2 * unit + lane % 4 / 2) + lane % 2 * 8);
      const unsigned b[2] = {v.x, v.y};
      multiply(c.sum[t], a, b, X{});
    }
  } else {
    unsigned a[2][4];
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[step][i] = Number::expand(word[i % 2][step], i / 2, high);
#pragma unroll
    for (int t = 0; t < Tiles; ++t) {
      const uint4 v = load<uint4>(x + x_place<X>(8 * t + lane / 4, 4 * unit + lane % 4));
      const unsigned b[2][2] = {{v.x, v.y}, {v.z, v.w}};
      multiply(c.sum[t], a[0], b[0], X{});
      multiply(c.sum[t], a[1], b[1], X{});
    }
  }
}

// Sums of x over the units of a step, by products with ones: warps share the
// work.
template <class X, int Tokens>
__device__ inline void sum_units(const unsigned char* x, typename Operand<X>::Sum* sums) {
  const int lane = threadIdx.x % 32;
  for (int at = threadIdx.x / 32; at < Tokens / 8 * 4; at += kWarps) {
    const int unit = at % 4, tile = at / 4;
    constexpr unsigned one = Operand<X>::ones;
    const unsigned a[4] = {one, one, one, one};
    typename Operand<X>::Sum c[4] = {};
    if constexpr (sizeof(X) == 1) {
      const uint2 v = load<uint2>(x + x_place<X>(8 * tile + lane / 4, 2 * unit + lane % 4 / 2) + lane % 2 * 8);
      const unsigned b[2] = {v.x, v.y};
      multiply(c, a, b, X{});
    } else {
      const uint4 v = load<uint4>(x + x_place<X>(8 * tile + lane / 4, 4 * unit + lane % 4));
      const unsigned b[2][2] = {{v.x, v.y}, {v.z, v.w}};
      multiply(c, a, b[0], X{});
      multiply(c, a, b[1], X{});
    }
    if (lane < 4) {
      sums[unit * Tokens + 8 * tile + 2 * lane] = c[0];
      sums[unit * Tokens + 8 * tile + 2 * lane + 1] = c[1];
    }
  }
}

template <class X, int Tokens, bool Zeros>
__global__ void __launch_bounds__(kThreads, Tokens == 16 ? 2 : 1) int4_linear(Int4Linear p) {
  using Shared = Ring<X, Tokens>;
  using Number = Operand<X>;
  using Sum = typename Number::Sum;
  constexpr int tiles = Tokens / 8;
  constexpr bool integers = sizeof(X) == 1;
  unsigned char* const ring = shared_memory();
  Sum* const unit_sums = reinterpret_cast<Sum*>(ring + Shared::sums);
  const Epilogue& e = p.epilogue;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const std::int64_t token0 = static_cast<std::int64_t>(blockIdx.x) * Tokens;
  const int channel0 = blockIdx.y * kChannels, channel = channel0 + 16 * warp + r;
  const int begin = static_cast<int>(static_cast<std::int64_t>(p.steps) * blockIdx.z / p.splits);
  const int count = static_cast<int>(static_cast<std::int64_t>(p.steps) * (blockIdx.z + 1) / p.splits) - begin;
  // Whether integer sums run on over all of K, and how many groups a step has
  // where they do not.
  const bool whole = integers && p.parts == 0 && e.x_scale_kind != 2;
  const int parts = p.parts == 0 ? 1 : p.parts;

  Products<X, tiles> c{};
  float sum[tiles][4] = {};
  Sum x_sum[Zeros ? tiles : 1][2] = {};  // of x over the group

  for (int s = 0; s < Shared::stages - 1; ++s) {
    if (s < count) fetch_step<X, Tokens>(p, token0, channel0, begin + s, ring + s * Shared::stage);
    close_copies();
  }
  Scales<Zeros> next;
  load_scales(p, channel, begin, next);
  for (int i = 0; i < count; ++i) {
    const Scales<Zeros> now = next;  // loaded a step ago
    wait_copies<Shared::stages - 2>();
    __syncthreads();
    const int ahead = i + Shared::stages - 1;
    if (ahead < count)
      fetch_step<X, Tokens>(p, token0, channel0, begin + ahead, ring + ahead % Shared::stages * Shared::stage);
    close_copies();
    load_scales(p, channel, begin + i + 1, next);
    const unsigned char* const stage = ring + i % Shared::stages * Shared::stage;
    const unsigned char* const x = stage + kCodes;
    const float* const x_scale = reinterpret_cast<const float*>(x + Shared::x_bytes);
    if (Zeros) {
      sum_units<X, Tokens>(x, unit_sums);
      __syncthreads();
    }
    uint2 codes[2][2];  // of 32 bytes, of channel r and r + 8
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        codes[half][h] = load<uint2>(stage + code_place(16 * warp + r + 8 * h, 2 * half + q / 2) + q % 2 * 8);
#pragma unroll
    for (int unit = 0; unit < 4; ++unit) {
      multiply_unit<X, tiles>(c, codes[unit % 2][0], codes[unit % 2][1], unit / 2, x, unit, lane);
      if (Zeros)
#pragma unroll
        for (int t = 0; t < tiles; ++t)
#pragma unroll
          for (int j = 0; j < 2; ++j) x_sum[t][j] += unit_sums[unit * Tokens + 8 * t + 2 * q + j];
      if (whole || (unit + 1) * parts % 4 != 0) continue;
      // The group ends here.
      const int part = unit * parts / 4;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float scale = pick(now.scale[h], part) * Number::weight;
        const float zero = Zeros ? pick(now.zero[Zeros ? h : 0], part) / Number::weight : 0.0f;
#pragma unroll
        for (int t = 0; t < tiles; ++t)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float value = static_cast<float>(c.sum[t][2 * h + j]);
            if (Zeros) value = __fmaf_rn(-zero, static_cast<float>(x_sum[t][j]), value);
            const float both = e.x_scale_kind == 2 ? scale * x_scale[8 * t + 2 * q + j] : scale;
            sum[t][2 * h + j] = __fmaf_rn(value, both, sum[t][2 * h + j]);
            c.sum[t][2 * h + j] = Sum{};
          }
      }
      if (Zeros)
#pragma unroll
        for (int t = 0; t < tiles; ++t) x_sum[t][0] = x_sum[t][1] = Sum{};
    }
  }
  wait_copies<0>();
  __syncthreads();

  if (whole && Zeros) load_scales(p, channel, 0, next);
  // Sums -> a tile [Tokens, 128] in shared memory, each a float32 or, for
  // `whole`, an int32.
  unsigned* const tile = reinterpret_cast<unsigned*>(ring);
  const int rows = static_cast<int>(e.m - token0 < Tokens ? e.m - token0 : Tokens);
#pragma unroll
  for (int t = 0; t < tiles; ++t)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float value = sum[t][j];
      if (whole && Zeros)  // one block has all of K
        value = __fmaf_rn(-next.zero[Zeros ? j / 2 : 0][0] / Number::weight,
                          static_cast<float>(x_sum[Zeros ? t : 0][j % 2]), static_cast<float>(c.sum[t][j]));
      tile[(8 * t + 2 * q + j % 2) * kPitch + 16 * warp + r + j / 2 * 8] =
          whole && !Zeros ? static_cast<unsigned>(c.sum[t][j]) : bits_of(value);
    }
  __syncthreads();

  if (p.splits > 1) {
    const std::int64_t place = blockIdx.y * static_cast<std::int64_t>(gridDim.x) + blockIdx.x;
    unsigned* const mine = p.partials + place * p.splits * Tokens * kChannels;
    for (int at = threadIdx.x; at < rows * kChannels / 4; at += kThreads)
      store_global(mine + static_cast<std::int64_t>(blockIdx.z) * Tokens * kChannels + 4 * at,
                   load<uint4>(tile + at / 32 * kPitch + at % 32 * 4));
    unsigned* const last = reinterpret_cast<unsigned*>(ring + Shared::last);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *last = atomicAdd(p.arrived + place, 1u) + 1u == static_cast<unsigned>(p.splits);
    __syncthreads();
    if (*last == 0u) return;
    __threadfence();
    for (int at = threadIdx.x; at < rows * kChannels / 4; at += kThreads) {
      uint4 total = load16_of_blocks(mine + 4 * at);
      for (int s = 1; s < p.splits; ++s) {
        const uint4 more = load16_of_blocks(mine + static_cast<std::int64_t>(s) * Tokens * kChannels + 4 * at);
        total = whole
                    ? make_uint4(total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w)
                    : make_uint4(
                          bits_of(float_of(total.x) + float_of(more.x)), bits_of(float_of(total.y) + float_of(more.y)),
                          bits_of(float_of(total.z) + float_of(more.z)), bits_of(float_of(total.w) + float_of(more.w)));
      }
      store(tile + at / 32 * kPitch + at % 32 * 4, total);
    }
    __syncthreads();
  }

  for (int token = warp; token < rows; token += kWarps) {
    const std::int64_t row = token0 + token;
    float row_scale = 1.0f, column_scale[4] = {1.0f, 1.0f, 1.0f, 1.0f}, y[4];
    if (integers && e.x_scale_kind == 0) row_scale = *e.x_scale;
    if (integers && e.x_scale_kind == 1) row_scale = e.x_scale[row];
    const uint4 words = load<uint4>(tile + token * kPitch + 4 * lane);
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] = whole && !Zeros ? static_cast<float>(static_cast<int>(word[i])) : float_of(word[i]);
      if (whole) {
        const int at = channel0 + 4 * lane + i;
        column_scale[i] = at < e.n ? to_float(p.scales[at]) * Number::weight : 0.0f;
      }
    }
    finish_row(e, row, row_scale, column_scale, channel0, lane, y);
  }
}

template <class X, int Tokens>
int launch_tokens(const Int4Linear& p, void* stream) {
  const dim3 grid(static_cast<unsigned>((p.epilogue.m + Tokens - 1) / Tokens),
                  static_cast<unsigned>((p.epilogue.n + kChannels - 1) / kChannels), static_cast<unsigned>(p.splits));
  constexpr int bytes = Ring<X, Tokens>::bytes;
  if (p.zeros != nullptr) return launch(int4_linear<X, Tokens, true>, grid, kThreads, bytes, stream, p);
  return launch(int4_linear<X, Tokens, false>, grid, kThreads, bytes, stream, p);
}

template <class X>
int launch_type(Int4Linear& p, int tokens, void* stream) {
  p.x_aligned = p.k * sizeof(X) % 16 == 0 && reinterpret_cast<std::uintptr_t>(p.x) % 16 == 0;
  return tokens == 16 ? launch_tokens<X, 16>(p, stream) : launch_tokens<X, 64>(p, stream);
}

}  // namespace
}  // namespace qk

// `tokens` of a block: 16 or 64. With more than one split, `partials` has
// [token tiles * channel tiles, splits, tokens, 128] words and `arrived` a zero
// for each tile.
int qk_cuda_int4_linear(const void* x, int type, std::int64_t m, int k, const std::uint8_t* codes, const void* scales,
                        const void* zeros, int n, int group, const float* x_scale, int x_scale_kind, const float* bias,
                        int activation, const void* residual, int residual_type, void* out, int out_type,
                        const float* out_scale, int out_scale_per_channel, const float* out_zero_point,
                        float* group_scales, int tokens, int splits, void* partials, void* arrived, int device,
                        void* stream) {
  using namespace qk;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  if (m == 0) return cudaSuccess;
  Int4Linear p{};
  p.x = x;
  p.k = k;
  p.codes = codes;
  p.steps = (k + kStep - 1) / kStep;
  p.scales = static_cast<const f16*>(scales);
  p.zeros = static_cast<const f16*>(zeros);
  p.groups = (k + group - 1) / group;
  p.parts = group >= k ? 0 : kStep / group;
  p.splits = splits;
  p.partials = static_cast<unsigned*>(partials);
  p.arrived = static_cast<unsigned*>(arrived);
  const auto address = [](const void* q) { return reinterpret_cast<std::uintptr_t>(q); };
  const bool wide = n % 16 == 0 && (address(bias) | address(residual) | address(out) | address(out_scale)) % 16 == 0;
  p.epilogue = {static_cast<int>(m),
                n,
                x_scale,
                x_scale_kind,
                nullptr,
                bias,
                activation,
                residual,
                residual_type,
                out,
                out_type,
                out_scale,
                out_scale_per_channel,
                out_zero_point,
                group_scales,
                wide};
  const bool whole = type == int8 && p.parts == 0 && x_scale_kind != 2;
  if ((tokens != 16 && tokens != 64) || splits < 1 || splits > p.steps || (splits > 1 && whole && zeros != nullptr))
    return cudaErrorInvalidValue;
  if (type == bfloat16) return launch_type<bf16>(p, tokens, stream);
  if (type == float16) return launch_type<f16>(p, tokens, stream);
  if (type == int8) return launch_type<std::int8_t>(p, tokens, stream);
  return cudaErrorInvalidValue;
}
