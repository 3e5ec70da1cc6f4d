// softmax(scale q k^T + mask) v for short sequences. One task is one head of one image: its keys (transposed) and
// values are packed once into panels that stay in the second cache; queries go through in blocks of a few rows whose
// scores stay in the first.
#pragma once

#include <type_traits>

#include "attention_products.h"
#include "parallel.h"
#include "rows.h"

struct QkStrides {
  std::int64_t batch, token, head;  // in elements; the d values of a head are contiguous
};
struct QkMask {
  const void* data;  // null: none
  bool is_bool;
  std::int64_t batch, head, row;  // strides; the last axis is contiguous
};
// Where results go: rows of all heads of a token, `stride` bytes apart. `type` float32, bfloat16, float16 or int8: with
// static scales (one, or one per channel of a head), or by the dynamic rule, which fills `scales`.
struct QkTarget {
  char* data;
  std::int64_t stride;
  bool shifted;
  int type;
  const float* scale;
  bool per_channel;
  float* scales;
};
struct QkAttention {
  const void *q, *k, *v;
  QkStrides q_strides, k_strides, v_strides;
  std::int64_t batch, queries, keys, heads, d;
  QkMask mask;
  bool causal;
  float scale;
  QkTarget target;
  int threads;
};

namespace {

// 2^x for x that is at most a little above 0, to 2 ulp: 0 below -126 (no subnormals), NaN stays NaN. The polynomial is
// minimax on [-1/2, 1/2]; its relative error is 1e-7, or 1e-4 with `rough`.
template <bool rough>
static inline vf exp2_below(vf x) {
  const vf n = round(x);
  const vf f = sub(x, n);
  vf p;
  if constexpr (rough) {
    p = fma(set1(0.055008933f), f, set1(0.24221097f));
    p = fma(p, f, set1(0.6932829f));
  } else {
    p = fma(set1(0.0013264727f), f, set1(0.009671513f));
    p = fma(p, f, set1(0.055507336f));
    p = fma(p, f, set1(0.24022242f));
    p = fma(p, f, set1(0.693147f));
  }
  p = fma(p, f, set1(1.0f));
#if defined(QK_TIER_avx512vnni)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_NLT_UQ), p, n);
#else
  return select(less(x, set1(-126.0f)), zero(), as_float(add(as_int(p), shift_left<23>(to_int(n)))));
#endif
}

// Scores [0, count) times scale, with the mask's row at `at`.
static void mask_row(const QkMask& mask, float* s, std::int64_t count, float scale, std::int64_t at) {
  const vf factor = set1(scale);
  for (std::int64_t j = 0; j < count; j += W) {
    const vf x = mul(load(s + j), factor);
    const int n = static_cast<int>(smaller(count - j, W));
    if (mask.is_bool) {
      const auto* allowed = static_cast<const std::int8_t*>(mask.data) + at + j;
      const vm yes = less(set1(std::int32_t{0}), n == W ? load(allowed) : load(allowed, n));
      store(s + j, select(yes, x, set1(-__builtin_inff())));
    } else {
      const float* added = static_cast<const float*>(mask.data) + at + j;
      store(s + j, add(x, n == W ? load(added) : load(added, n)));
    }
  }
}

// Scores of up to R rows, `lds` apart -> probabilities without their common factor, as units, in their place. Row r
// has count(r) scores; what is left of the vectors up to `end` becomes 0. Steps go row by row each, so that one row's
// reductions run beside another's.
template <class Units, class Count>
static inline void softmax_rows(int rows, float* scores, std::int64_t lds, const Count& count, std::int64_t end,
                                float scale, float* factors) {
  constexpr int step = W * Units::per_unit;
  const vf nothing = set1(-__builtin_inff()), factor = set1(scale * 1.44269504088896341f);
  vf shifts[R], sums[R];
  for (int r = 0; r < rows; ++r) {
    const float* s = scores + r * lds;
    const std::int64_t n = count(r), whole = n / W * W;
    vf top = nothing;
    // max drops a NaN, which then comes back through its own exponential.
    for (std::int64_t j = 0; j < whole; j += W) top = max(load(s + j), top);
    if (whole < n) top = max(select(lanes(static_cast<int>(n - whole)), load(s + whole), nothing), top);
    shifts[r] = top;
  }
  for (int r = 0; r < rows; ++r) {
    const float highest = reduce_max(shifts[r]);
    shifts[r] = mul(set1(bits_of(highest) == 0xff800000u ? 0.0f : -highest), factor);
  }
  for (int r = 0; r < rows; ++r) {
    float* s = scores + r * lds;
    const std::int64_t n = count(r), whole = n / W * W;
    const vm rest = lanes(static_cast<int>(n - whole));
    const vf shift = shifts[r];
    const auto p = [&](std::int64_t j) {
      if (j >= n) return zero();
      const vf x = fma(load(s + j), factor, shift);
      return exp2_below<Units::per_unit == 2>(j < whole ? x : select(rest, x, nothing));
    };
    vf sum = zero();
    for (std::int64_t j = 0; j < end; j += step) {
      if constexpr (Units::per_unit == 2) {
        const vf pairs = Units::round(p(j), p(j + W));
        store(s + j / 2, pairs);
        sum = Units::dot(pairs, Units::ones(), sum);
      } else {
        const vf x = p(j);
        store(s + j, x);
        sum = add(sum, x);
      }
    }
    sums[r] = sum;
  }
  for (int r = 0; r < rows; ++r) {
    const float total = reduce_add(sums[r]);
    factors[r] = total == 0.0f ? 0.0f : 1.0f / total;
  }
}

static inline vf static_codes(vf y, vf inverse) {
  vf v = select(finite(y), mul(y, inverse), zero());
  v = select(less(v, zero()), v, select(less(zero(), v), v, zero()));  // NaN (0 times infinity) becomes 0, too
  return min(max(round(v), set1(-127.0f)), set1(127.0f));
}

// One head of a row: `y` times `factor`. `channel` is its first.
static inline void write_row(const QkTarget& target, const float* y, float factor, std::int64_t d, std::int64_t row,
                             std::int64_t channel) {
  char* const data = target.data + row * target.stride;
  const vf f = set1(factor), one = set1(1.0f);
  const auto write = [&](auto* out, const auto& convert) {
    std::int64_t i = 0;
    for (; i + W <= d; i += W) store(out + channel + i, convert(mul(load(y + i), f), i, W));
    if (i < d) {
      const int n = static_cast<int>(d - i);
      store(out + channel + i, convert(mul(load(y + i), f), i, n), n);
    }
  };
  const auto same = [](vf x, std::int64_t, int) { return x; };
  if (target.type == QK_F32) write(reinterpret_cast<float*>(data), same);
  if (target.type == QK_BF16) write(reinterpret_cast<bf16*>(data), same);
  if (target.type == QK_F16) write(reinterpret_cast<f16*>(data), same);
  if (target.type == QK_I8)
    write(reinterpret_cast<std::int8_t*>(data), [&](vf x, std::int64_t i, int n) {
      const float* s = target.scale + channel + i;
      const vf scale = !target.per_channel ? set1(*target.scale) : n == W ? load(s) : load(s, n);
      return to_int(static_codes(x, div(one, scale)));
    });
  if (target.shifted) shift_bytes(reinterpret_cast<std::int8_t*>(data) + channel, d);
}

// Bring the rows of `count` tokens into the second cache: a head's lines are too far apart for the processor to guess.
template <class T>
static inline void prefetch_rows(const T* rows, std::int64_t stride, std::int64_t count, std::int64_t d) {
  for (std::int64_t j = 0; j < count; ++j)
    for (std::int64_t i = 0; i < d; i += 64 / static_cast<std::int64_t>(sizeof(T)))
      __builtin_prefetch(rows + j * stride + i, 0, 2);
}

// Head h of image b, to rows of `target` from `first_row` on. If the next head follows, its rows are fetched meanwhile.
template <class Units, class T>
static void head(const QkAttention& all, std::int64_t b, std::int64_t h, const QkTarget& target, std::int64_t first_row,
                 bool next_follows) {
  const std::int64_t d = all.d, keys = all.keys, d_units = units_of<Units>(d), key_units = units_of<Units>(keys);
  const std::int64_t single = keys % W <= most_single ? keys % W : 0, whole = keys - single;
  const Panels key_panels((whole + W - 1) / W), d_panels((d + W - 1) / W);
  const std::int64_t d_width = up(d_units, W), lds = up(keys + 1, 2 * W), ldy = d_panels.vectors * W;
  const std::int64_t sizes[] = {
      key_panels.vectors * W * d_units, most_single * d_width, key_units * ldy, R * d_width, R * lds, R * ldy};
  std::int64_t total = 0;
  for (const std::int64_t size : sizes) total += up(size, 16);
  auto* packed_keys = static_cast<float*>(qk_workspace(QK_SLOT_A, static_cast<std::size_t>(total) * sizeof(float)));
  float* single_keys = packed_keys + up(sizes[0], 16);
  float* packed_values = single_keys + up(sizes[1], 16);
  float* block = packed_values + up(sizes[2], 16);
  float* scores = block + up(sizes[3], 16);
  float* y = scores + up(sizes[4], 16);
  const auto start = [&](const void* data, const QkStrides& strides) {
    return static_cast<const T*>(data) + b * strides.batch + h * strides.head;
  };
  const T *q = start(all.q, all.q_strides), *k = start(all.k, all.k_strides), *v = start(all.v, all.v_strides);
  pack_keys<Units>(k, all.k_strides.token, whole, d, key_panels, packed_keys);
  copy_rows<Units>(k + whole * all.k_strides.token, all.k_strides.token, single, d, single_keys);
  pack_values<Units>(v, all.v_strides.token, keys, d, d_panels, packed_values);
  // Maxima are taken before the scale: a negative one turns the queries.
  const bool negative = all.scale < 0.0f;
  const float scale = negative ? -all.scale : all.scale;
  const bool in_place = std::is_same_v<T, float> && d % W == 0 && !negative;  // queries that need no copy
  const std::int64_t ldq = in_place ? all.q_strides.token : d_width;
  for (std::int64_t row = 0; row < all.queries; row += R) {
    const int rows = static_cast<int>(smaller(all.queries - row, R));
    if (next_follows) {
      const std::int64_t seen = smaller(keys - row, rows);
      const auto fetch = [&](const T* data, const QkStrides& strides, std::int64_t count) {
        prefetch_rows(data + row * strides.token + strides.head, strides.token, count, d);
      };
      fetch(q, all.q_strides, rows);
      fetch(k, all.k_strides, seen);
      fetch(v, all.v_strides, seen);
    }
    const T* const from = q + row * all.q_strides.token;
    if (!in_place) copy_rows<Units>(from, all.q_strides.token, rows, d, block);
    const float* const query = in_place ? reinterpret_cast<const float*>(from) : block;
    if (negative)
      for (std::int64_t i = 0; i < rows * d_width; i += W) store(block + i, Units::negate(load(block + i)));
    const std::int64_t depth = all.causal ? smaller(row + rows, keys) : keys;  // no row of the block sees more keys
    product<Units>(rows, query, ldq, packed_keys, d_units, key_panels, d_units, (depth + W - 1) / W, scores, lds);
    if (depth > whole)
      single_columns<Units>(rows, query, ldq, single_keys, depth - whole, d_units, scores + whole, lds);
    const auto count = [&](int r) { return all.causal ? smaller(row + r + 1, keys) : keys; };
    if (all.mask.data != nullptr)
      for (int r = 0; r < rows; ++r)
        mask_row(all.mask, scores + r * lds, count(r), scale,
                 b * all.mask.batch + h * all.mask.head + (row + r) * all.mask.row);
    float factors[R];
    softmax_rows<Units>(rows, scores, lds, count, depth, all.mask.data == nullptr ? scale : 1.0f, factors);
    product<Units>(rows, scores, lds, packed_values, key_units, d_panels, units_of<Units>(depth), d_panels.vectors, y,
                   ldy);
    for (int r = 0; r < rows; ++r) write_row(target, y + r * ldy, factors[r], d, first_row + row + r, h * d);
  }
}

// Float rows of all heads -> codes and scales of `count` tokens from `first` on.
static inline void quantize_tokens(const QkAttention& all, const float* rows, std::int64_t first, std::int64_t count) {
  const std::int64_t width = all.heads * all.d;
  const Rule rule = make_rule(nullptr, nullptr, all.target.shifted);
  for (std::int64_t row = 0; row < count; ++row) {
    const Row<float, false> get{rows + row * width, nullptr};
    auto* codes = reinterpret_cast<std::int8_t*>(all.target.data + (first + row) * all.target.stride);
    all.target.scales[first + row] = write_codes(rule, top_of(width, get), width, codes, get);
  }
}

// One task is one image where there are enough of them, so that its rows stay where they are hot, else one head.
template <class Units, class T>
static void attend(const QkAttention& all) {
  const std::int64_t width = all.heads * all.d, tokens = all.queries;
  const bool whole_images = all.batch % all.threads == 0 || all.batch >= 8 * all.threads;
  const auto image_to = [&](std::int64_t image, const QkTarget& target, std::int64_t first_row) {
    for (std::int64_t h = 0; h < all.heads; ++h) head<Units, T>(all, image, h, target, first_row, h + 1 < all.heads);
  };
  if (all.target.scales == nullptr) {
    if (whole_images)
      parallel_tasks(all.threads, all.batch, [&](std::int64_t image) { image_to(image, all.target, image * tokens); });
    else
      parallel_tasks(all.threads, all.batch * all.heads, [&](std::int64_t task) {
        const std::int64_t image = task / all.heads;
        head<Units, T>(all, image, task % all.heads, all.target, image * tokens, false);
      });
    return;
  }
  // Dynamic: a scale spans the heads, so that an image passes through float32 rows.
  const std::size_t bytes = static_cast<std::size_t>(tokens * width + 1) * sizeof(float);
  const auto floats = [&](void* rows) {
    return QkTarget{static_cast<char*>(rows),
                    width * static_cast<std::int64_t>(sizeof(float)),
                    false,
                    QK_F32,
                    nullptr,
                    false,
                    nullptr};
  };
  if (whole_images) {
    parallel_tasks(all.threads, all.batch, [&](std::int64_t image) {
      auto* rows = static_cast<float*>(qk_workspace(QK_SLOT_B, bytes));
      image_to(image, floats(rows), 0);
      quantize_tokens(all, rows, image * tokens, tokens);
    });
    return;
  }
  auto* rows = static_cast<float*>(qk_workspace(QK_SLOT_SHARED, bytes));
  for (std::int64_t image = 0; image < all.batch; ++image) {
    parallel_tasks(all.threads, all.heads,
                   [&](std::int64_t h) { head<Units, T>(all, image, h, floats(rows), 0, false); });
    parallel_for(all.threads, tokens, row_grain(width), [&](std::int64_t begin, std::int64_t end) {
      quantize_tokens(all, rows + begin * width, image * tokens + begin, end - begin);
    });
  }
}

}  // namespace
