// softmax(scale q k^T + mask) v for short sequences. One task is one head of one image: its keys (transposed) and
// values are packed once as float32 panels that stay in the second cache; queries go through in blocks of a few rows
// whose scores stay in the first.
#include <type_traits>

#include "parallel.h"
#include "rows.h"
#include "vmath.h"

namespace {

// A tile is R rows times NV vectors of accumulators.
#if defined(QK_TIER_avx512vnni)
constexpr int R = 6, NV = 4;
#elif defined(QK_TIER_avx2)
constexpr int R = 6, NV = 2;
#else
constexpr int R = 2, NV = 4;
#endif
constexpr std::int64_t panel = NV * W;

static inline std::int64_t up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// c[r][0, V * W) = sum over k of a[r][k] * b[k][0, V * W); b is packed with rows of V * W.
template <int rows, int V>
static void tile(const float* a, std::int64_t lda, const float* b, std::int64_t depth, float* c, std::int64_t ldc) {
  // Unrolled by decree and early, so that the sums live in registers from start to end.
  vf sums[rows][V];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = zero();
  for (std::int64_t k = 0; k < depth; ++k) {
    vf row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + k * V * W + v * W);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const vf x = set1(a[r * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = fma(x, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * W, sums[r][v]);
}

using Tile = void (*)(const float*, std::int64_t, const float*, std::int64_t, float*, std::int64_t);
template <int rows>
static Tile tile_of(int vectors) {
  if constexpr (NV >= 4) {
    if (vectors == 4) return tile<rows, 4>;
    if (vectors == 3) return tile<rows, 3>;
  }
  return vectors == 2 ? tile<rows, 2> : tile<rows, 1>;
}
static inline Tile tile_of(int rows, int vectors) {
  if constexpr (R >= 6) {
    if (rows == 6) return tile_of<6>(vectors);
    if (rows == 5) return tile_of<5>(vectors);
    if (rows == 4) return tile_of<4>(vectors);
    if (rows == 3) return tile_of<3>(vectors);
  }
  return rows == 2 ? tile_of<2>(vectors) : tile_of<1>(vectors);
}

// c = a b for the panels of b that hold its first `wanted` columns; b has `width` columns, a multiple of W.
static inline void product(int rows, const float* a, std::int64_t lda, const float* b, std::int64_t b_depth,
                           std::int64_t width, std::int64_t depth, std::int64_t wanted, float* c, std::int64_t ldc) {
  for (std::int64_t column = 0; column < wanted; column += panel) {
    const std::int64_t rest = width - column;
    tile_of(rows, rest < panel ? static_cast<int>(rest / W) : NV)(a, lda, b + column * b_depth, depth, c + column, ldc);
  }
}

#if defined(QK_TIER_avx512vnni)
static inline void transpose(vf* x) {
  vf t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]), c = _mm512_castps_pd(t[i + 2]),
                  d = _mm512_castps_pd(t[i + 3]);
    x[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    x[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    x[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    x[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; ++i) {  // columns i, i + 4, i + 8, i + 12 lie in the four quarters
    const vf a = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
    const vf c = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88), d = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) x[i] = t[i];
}
#elif defined(QK_TIER_avx2)
static inline void transpose(vf* x) {
  vf t[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(x[i], x[i + 1]), b = _mm256_unpackhi_ps(x[i], x[i + 1]);
    const __m256 c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}
#else
static inline void transpose(vf*) {}
#endif

// Keys [count][d], `stride` apart, as panels [d][keys], padded with keys of 0 to a multiple of W.
template <class T>
static void pack_keys(const T* keys, std::int64_t stride, std::int64_t count, std::int64_t d, float* out) {
  const std::int64_t padded = up(count, W);
  for (std::int64_t column = 0; column < padded; column += W) {
    const std::int64_t first = column / panel * panel, width = padded - first < panel ? padded - first : panel;
    float* target = out + first * d + (column - first);
    for (std::int64_t channel = 0; channel < d; channel += W) {
      const int n = d - channel < W ? static_cast<int>(d - channel) : W;
      vf block[W];
      for (int j = 0; j < W; ++j) {
        const T* key = keys + (column + j) * stride + channel;
        block[j] = column + j >= count ? zero() : n == W ? load(key) : load(key, n);
      }
      transpose(block);
      for (int i = 0; i < n; ++i) store(target + (channel + i) * width, block[i]);
    }
  }
}

// Values [count][d] as panels [count][channels], padded with channels of 0 to a multiple of W.
template <class T>
static void pack_values(const T* values, std::int64_t stride, std::int64_t count, std::int64_t d, float* out) {
  const std::int64_t padded = up(d, W);
  for (std::int64_t channel = 0; channel < padded; channel += W) {
    const std::int64_t first = channel / panel * panel, width = padded - first < panel ? padded - first : panel;
    const int n = d - channel < W ? static_cast<int>(d - channel) : W;
    float* target = out + first * count + (channel - first);
    for (std::int64_t j = 0; j < count; ++j) {
      const T* value = values + j * stride + channel;
      store(target + j * width, n == W ? load(value) : load(value, n));
    }
  }
}

struct Shape {
  std::int64_t batch, queries, keys, heads, d;
};
struct Strides {
  std::int64_t batch, token, head;  // in elements
};
struct Mask {
  const void* data;  // null: none
  bool is_bool;
  std::int64_t batch, head, row;  // strides; the last axis is contiguous
};
// Where results go: rows of all heads of a token, `stride` bytes apart. `type` float32, bfloat16, float16 or int8: with
// static scales (one, or one a channel of a head), or by the dynamic rule, which fills `scales`.
struct Target {
  char* data;
  std::int64_t stride;
  bool shifted;
  int type;
  const float* scale;
  bool per_channel;
  float* scales;
};

// Scores of one row -> probabilities without their common factor, which is returned. Scores from `count` on become 0 up
// to `depth`.
static inline float softmax_row(float* s, std::int64_t count, std::int64_t depth, const float* added,
                                const std::uint8_t* allowed) {
  const vf nothing = set1(-__builtin_inff());
  const std::int64_t padded = up(count, W);
  for (std::int64_t j = count; j < padded; ++j) s[j] = -__builtin_inff();
  vf top = nothing;
  for (std::int64_t j = 0; j < padded; j += W) {
    vf x = load(s + j);
    const int n = count - j < W ? static_cast<int>(count - j) : W;
    if (added != nullptr) x = add(x, n == W ? load(added + j) : load(added + j, n));
    if (allowed != nullptr) {
      const auto* bytes = reinterpret_cast<const std::int8_t*>(allowed + j);
      x = select(less(set1(std::int32_t{0}), n == W ? load(bytes) : load(bytes, n)), x, nothing);
    }
    store(s + j, x);
    top = max(x, top);  // drops a NaN, which then comes back through its own exponential
  }
  const float highest = reduce_max(top);
  const vf shift = set1(bits_of(highest) == 0xff800000u ? 0.0f : highest);
  vf sum = zero();
  for (std::int64_t j = 0; j < padded; j += W) {
    const vf p = exp(sub(load(s + j), shift));
    store(s + j, p);
    sum = add(sum, p);
  }
  for (std::int64_t j = padded; j < depth; ++j) s[j] = 0.0f;
  const float total = reduce_add(sum);
  return total == 0.0f ? 0.0f : 1.0f / total;
}

static inline vf static_codes(vf y, vf inverse) {
  vf v = select(finite(y), mul(y, inverse), zero());
  v = select(less(v, zero()), v, select(less(zero(), v), v, zero()));  // NaN (0 times infinity) becomes 0, too
  return min(max(round(v), set1(-127.0f)), set1(127.0f));
}

// One head of a row: `y` times `factor`. `channel` is its first.
static inline void write_row(const Target& target, const float* y, float factor, std::int64_t d, std::int64_t row,
                             std::int64_t channel) {
  char* const data = target.data + row * target.stride;
  const vf f = set1(factor), one = set1(1.0f);
  for (std::int64_t i = 0; i < d; i += W) {
    const int n = d - i < W ? static_cast<int>(d - i) : W;
    const vf x = mul(load(y + i), f);
    const auto put = [&](auto* p, auto value) {
      if (n == W)
        store(p + channel + i, value);
      else
        store(p + channel + i, value, n);
    };
    if (target.type == QK_F32) put(reinterpret_cast<float*>(data), x);
    if (target.type == QK_BF16) put(reinterpret_cast<bf16*>(data), x);
    if (target.type == QK_F16) put(reinterpret_cast<f16*>(data), x);
    if (target.type == QK_I8) {
      const float* s = target.scale + channel + i;
      const vf scale = !target.per_channel ? set1(*target.scale) : n == W ? load(s) : load(s, n);
      put(reinterpret_cast<std::int8_t*>(data), to_int(static_codes(x, div(one, scale))));
    }
  }
  if (target.shifted) shift_bytes(reinterpret_cast<std::int8_t*>(data) + channel, d);
}

template <class T>
static void head(const T* q, const Strides& qs, const T* k, const Strides& ks, const T* v, const Strides& vs,
                 const Shape& shape, const Mask& mask, bool causal, float scale, std::int64_t b, std::int64_t h,
                 const Target& target, std::int64_t out_image) {
  const std::int64_t d = shape.d, keys = shape.keys, key_width = up(keys, W), d_width = up(d, W),
                     lds = key_width > 0 ? key_width : W;
  const std::int64_t sizes[] = {up(d * key_width, 16), up(keys * d_width, 16), up(R * d, 16), up(R * lds, 16),
                                up(R * d_width, 16)};
  auto* packed_keys = static_cast<float*>(qk_workspace(
      QK_SLOT_A, static_cast<std::size_t>(sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4]) * sizeof(float)));
  float* packed_values = packed_keys + sizes[0];
  float* block = packed_values + sizes[1];
  float* scores = block + sizes[2];
  float* y = scores + sizes[3];
  pack_keys(k + b * ks.batch + h * ks.head, ks.token, keys, d, packed_keys);
  pack_values(v + b * vs.batch + h * vs.head, vs.token, keys, d, packed_values);
  const T* queries = q + b * qs.batch + h * qs.head;
  const vf factor = set1(scale);
  for (std::int64_t row = 0; row < shape.queries; row += R) {
    const int rows = shape.queries - row < R ? static_cast<int>(shape.queries - row) : R;
    for (int r = 0; r < rows; ++r) {
      const T* from = queries + (row + r) * qs.token;
      std::int64_t i = 0;
      for (; i + W <= d; i += W) store(block + r * d + i, mul(load(from + i), factor));
      if (i < d)
        store(block + r * d + i, mul(load(from + i, static_cast<int>(d - i)), factor), static_cast<int>(d - i));
    }
    const std::int64_t depth = causal && row + rows < keys ? row + rows : keys;  // no row of the block sees more keys
    product(rows, block, d, packed_keys, d, key_width, d, depth, scores, lds);
    float factors[R];
    for (int r = 0; r < rows; ++r) {
      const std::int64_t count = causal && row + r + 1 < keys ? row + r + 1 : keys;
      const std::int64_t at = b * mask.batch + h * mask.head + (row + r) * mask.row;
      const float* added = mask.data == nullptr || mask.is_bool ? nullptr : static_cast<const float*>(mask.data) + at;
      const std::uint8_t* allowed =
          mask.data != nullptr && mask.is_bool ? static_cast<const std::uint8_t*>(mask.data) + at : nullptr;
      factors[r] = softmax_row(scores + r * lds, count, depth, added, allowed);
    }
    product(rows, scores, lds, packed_values, keys, d_width, depth, d_width, y, d_width);
    for (int r = 0; r < rows; ++r) {
      write_row(target, y + r * d_width, factors[r], d, out_image * shape.queries + row + r, h * d);
    }
  }
}

template <class T>
static void images(const T* q, const Strides& qs, const T* k, const Strides& ks, const T* v, const Strides& vs,
                   const Shape& shape, const Mask& mask, bool causal, float scale, const Target& target, int threads) {
  if (target.scales == nullptr) {
    parallel_tasks(threads, shape.batch * shape.heads, [&](std::int64_t task) {
      const std::int64_t b = task / shape.heads;
      head(q, qs, k, ks, v, vs, shape, mask, causal, scale, b, task % shape.heads, target, b);
    });
    return;
  }
  // Dynamic: a scale spans the heads, so some images pass through float32 rows.
  const std::int64_t width = shape.heads * shape.d, tokens = shape.queries;
  std::int64_t step = (std::int64_t{1} << 20) / (tokens * width + 1);
  step = step < 1 ? 1 : step > shape.batch ? shape.batch : step;
  auto* rows = static_cast<float*>(
      qk_workspace(QK_SLOT_SHARED, static_cast<std::size_t>(step * tokens * width + 1) * sizeof(float)));
  const auto bytes = static_cast<std::int64_t>(sizeof(float)) * width;
  const Target floats{reinterpret_cast<char*>(rows), bytes, false, QK_F32, nullptr, false, nullptr};
  const Rule rule = make_rule(nullptr, nullptr, target.shifted);
  for (std::int64_t start = 0; start < shape.batch; start += step) {
    const std::int64_t count = shape.batch - start < step ? shape.batch - start : step;
    parallel_tasks(threads, count * shape.heads, [&](std::int64_t task) {
      const std::int64_t image = task / shape.heads;
      head(q, qs, k, ks, v, vs, shape, mask, causal, scale, start + image, task % shape.heads, floats, image);
    });
    parallel_for(threads, count * tokens, row_grain(width), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        const Row<float, false> get{rows + row * width, nullptr};
        const std::int64_t at = start * tokens + row;
        auto* codes = reinterpret_cast<std::int8_t*>(target.data + at * target.stride);
        target.scales[at] = write_codes(rule, top_of(width, get), width, codes, get);
      }
    });
  }
}

}  // namespace

extern "C" {

// Strides are in elements: (batch, token, head); a head's d values are contiguous. Results go to `out` of `out_type`,
// `out_stride` bytes from token to token; int8 by `out_scale`, or by the dynamic rule when `scales` is given. With
// `shift` a code leaves as code + 128, an unsigned byte.
void QK_IMPL(attention)(const void* q, std::int64_t q_batch, std::int64_t q_token, std::int64_t q_head, const void* k,
                        std::int64_t k_batch, std::int64_t k_token, std::int64_t k_head, const void* v,
                        std::int64_t v_batch, std::int64_t v_token, std::int64_t v_head, int type, std::int64_t batch,
                        std::int64_t queries, std::int64_t keys, std::int64_t heads, std::int64_t d, const void* mask,
                        int mask_is_bool, std::int64_t mask_batch, std::int64_t mask_head, std::int64_t mask_row,
                        int causal, float scale, void* out, std::int64_t out_stride, int shift, int out_type,
                        const float* out_scale, int out_scale_per_channel, float* scales, int threads) {
  const Shape shape{batch, queries, keys, heads, d};
  const Strides qs{q_batch, q_token, q_head}, ks{k_batch, k_token, k_head}, vs{v_batch, v_token, v_head};
  const Mask masking{mask, mask_is_bool != 0, mask_batch, mask_head, mask_row};
  const Target target{static_cast<char*>(out),    out_stride, shift != 0, out_type, out_scale,
                      out_scale_per_channel != 0, scales};
  const auto run = [&](const auto* typed) {
    using T = std::remove_cv_t<std::remove_reference_t<decltype(*typed)>>;
    images(typed, qs, static_cast<const T*>(k), ks, static_cast<const T*>(v), vs, shape, masking, causal != 0, scale,
           target, threads);
  };
  if (type == QK_F32) run(static_cast<const float*>(q));
  if (type == QK_BF16) run(static_cast<const bf16*>(q));
  if (type == QK_F16) run(static_cast<const f16*>(q));
}
}
