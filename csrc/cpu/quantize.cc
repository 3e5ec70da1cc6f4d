// Rows of floats -> int8 codes and one scale per row (dynamic), or codes by a given scale (static); LayerNorm in front
// of it; channel maxima.
#include <type_traits>

#include "parallel.h"
#include "rows.h"

namespace {

// Where rows of codes and their scales go: `stride` bytes from row to row.
struct Output {
  std::int8_t* codes;
  std::int64_t stride;
  float* scales;
};

// Rows go in pairs, step by step, so that one row's reductions and divisions run beside the other's loop.
constexpr int pair = 2;

template <class T, bool Smooth>
static void quantize_rows(const T* x, std::int64_t begin, std::int64_t end, std::int64_t k, const float* smooth,
                          const Rule& rule, const Output& out) {
  for (std::int64_t row = begin; row < end; row += pair) {
    const int rows = end - row < pair ? 1 : pair;
    std::int32_t top[pair];
    for (int r = 0; r < rows; ++r) top[r] = top_of(k, Row<T, Smooth>{x + (row + r) * k, smooth});
    for (int r = 0; r < rows; ++r) {
      const T* const from = x + (row + r) * k;
      const Fetching<T, Row<T, Smooth>> get{{from, smooth}, from + pair * k};
      out.scales[row + r] = write_codes(rule, top[r], k, out.codes + (row + r) * out.stride, get);
    }
  }
}

// What normalises a row: (x - near) * inverse + shift, `near` being close to the mean.
struct Moments {
  float near, inverse, shift;
};

// Sums of x - near and of its square, for two rows; `near` is 0 unless `centred`.
template <bool centred, class T>
static inline void sums_about(const T* const* x, std::int64_t k, const float* near, float* sum, float* squares) {
  const auto from_near = [&](int r, std::int64_t i) {
    return centred ? sub(load(x[r] + i), set1(near[r])) : held(load(x[r] + i));
  };
  vf d[4], q[4];
  for (int j = 0; j < 4; ++j) d[j] = q[j] = zero();
  std::int64_t i = 0;
  for (; i + 2 * W <= k; i += 2 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vf a = from_near(j % 2, i + j / 2 * W);
      d[j] = add(d[j], a);
      q[j] = fma(a, a, q[j]);
    }
#pragma GCC unroll 2  // else compilers go by way of memory
  for (int r = 0; r < 2; ++r) {
    sum[r] = reduce_add(add(d[r], d[r + 2]));
    squares[r] = reduce_add(add(q[r], q[r + 2]));
    for (std::int64_t j = i; j < k;
         ++j) {  // one by one: the padding of a partial vector is not 0 after the subtraction
      const float distance = to_f32(x[r][j]) - near[r];
      sum[r] += distance;
      squares[r] += distance * distance;
    }
  }
}

static inline float median(float a, float b, float c) {
  const float low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c < high ? c : high;
}

// One pass about 0. Where that lies more than four standard deviations off the mean, which costs digits of the
// variance, another about a value of the row's own (exact for rows of one value), and where that is as far off one
// about the mean.
template <class T>
static inline void moments_of(const T* const* x, std::int64_t k, float share, float eps, Moments* moments) {
  float near[2] = {0.0f, 0.0f}, sum[2], squares[2];
  const auto near_enough = [&](int r) {
    const float left = sum[r] * share;
    return left * left <= 16.0f * (squares[r] - sum[r] * left) * share;
  };
  sums_about<false>(x, k, near, sum, squares);
  for (int attempt = 0; attempt < 2; ++attempt) {
    const bool enough[2] = {near_enough(0), near_enough(1)};
    if (enough[0] && enough[1]) break;
    for (int r = 0; r < 2; ++r)  // a row's numbers must not depend on its partner
      if (!enough[r])
        near[r] = attempt == 0 ? median(to_f32(x[r][k / 4]), to_f32(x[r][k / 2]), to_f32(x[r][k - 1]))
                               : near[r] + sum[r] * share;
    sums_about<true>(x, k, near, sum, squares);
  }
  for (int r = 0; r < 2; ++r) {
    const float left = sum[r] * share, variance = (squares[r] - sum[r] * left) * share;
    // An infinite variance would turn every value into the bias: make it a fault.
    const float inverse = variance < __builtin_inff()
                              ? 1.0f / __builtin_sqrtf((variance > 0.0f ? variance : 0.0f) + eps)
                              : __builtin_nanf("");
    moments[r] = {near[r], inverse, -left * inverse};
  }
}

// Two rows of LayerNorm: y = ((x - near) * inverse + shift) * weight + bias, and the bits of each row's largest
// magnitude. Both are near 0 unless `centred`.
template <bool centred, class T>
static inline void normalize_pair(const T* x0, const T* x1, std::int64_t k, const Moments* moments, const float* weight,
                                  const float* bias, float* y0, float* y1, std::int32_t* top) {
  const vf near0 = set1(moments[0].near), inverse0 = set1(moments[0].inverse), shift0 = set1(moments[0].shift);
  const vf near1 = set1(moments[1].near), inverse1 = set1(moments[1].inverse), shift1 = set1(moments[1].shift);
  const vi mask = all_but_sign();
  vi top0 = set1(std::int32_t{0}), top1 = top0;
  std::int64_t i = 0;
  for (; i + W <= k; i += W) {
    const vf w = held(load(weight + i)), b = held(load(bias + i));
    const vf from0 = load(x0 + i), from1 = load(x1 + i);
    const vf a = fma(fma(centred ? sub(from0, near0) : from0, inverse0, shift0), w, b);
    const vf c = fma(fma(centred ? sub(from1, near1) : from1, inverse1, shift1), w, b);
    store(y0 + i, a);
    store(y1 + i, c);
    top0 = max(top0, bit_and(as_int(a), mask));
    top1 = max(top1, bit_and(as_int(c), mask));
  }
  top[0] = reduce_max(top0);
  top[1] = reduce_max(top1);
  const auto rest = [&](const T* x, const Moments& m, float* y, std::int32_t* highest) {
    for (std::int64_t j = i; j < k; ++j) {
      y[j] = __builtin_fmaf(__builtin_fmaf(to_f32(x[j]) - m.near, m.inverse, m.shift), weight[j], bias[j]);
      const auto bits = static_cast<std::int32_t>(bits_of(y[j]) & 0x7fffffffu);
      if (bits > *highest) *highest = bits;
    }
  };
  rest(x0, moments[0], y0, top);
  rest(x1, moments[1], y1, top + 1);
}

template <class T>
static void layer_norm_rows(const T* x, std::int64_t begin, std::int64_t end, std::int64_t k, const float* weight,
                            const float* bias, float eps, const float* smooth, const Rule& rule, const Output& out) {
  // Two normalised rows, then weight and bias with smooth folded in.
  const std::int64_t padded = (k + 15) / 16 * 16;
  float* y =
      static_cast<float*>(qk_workspace(QK_SLOT_A, static_cast<std::size_t>((pair + 2) * padded) * sizeof(float)));
  float* folded = y + pair * padded;
  for (std::int64_t i = 0; i < k; ++i) {
    const float s = smooth == nullptr ? 1.0f : smooth[i];
    folded[i] = (weight == nullptr ? 1.0f : weight[i]) * s;
    folded[padded + i] = (bias == nullptr ? 0.0f : bias[i]) * s;
  }
  const float share = 1.0f / static_cast<float>(k);
  for (std::int64_t row = begin; row < end; row += pair) {
    const int rows = end - row < pair ? 1 : pair;
    const T* const first = x + row * k;
    const T* const second = first + (rows - 1) * k;  // a last single row is its own partner
    const T* const both[pair] = {first, second};
    Moments moments[pair];
    moments_of(both, k, share, eps, moments);
    std::int32_t top[pair];
    const auto normalize =
        moments[0].near != 0.0f || moments[1].near != 0.0f ? normalize_pair<true, T> : normalize_pair<false, T>;
    normalize(first, second, k, moments, folded, folded + padded, y, y + padded, top);
    for (int r = 0; r < rows; ++r) {
      const Fetching<T, Row<float, false>> get{{y + r * padded, nullptr}, both[r] + pair * k};
      out.scales[row + r] = write_codes(rule, top[r], k, out.codes + (row + r) * out.stride, get);
    }
  }
}

// Maxima of columns begin..end over all rows, as bit patterns.
template <class T>
static void absmax_columns(const T* x, std::int64_t rows, std::int64_t k, std::int64_t begin, std::int64_t end,
                           std::int32_t* top) {
  const vi mask = all_but_sign();
  constexpr std::int64_t step = 8;  // rows for each visit of `top`
  for (std::int64_t row = 0; row < rows; row += step) {
    const std::int64_t count = rows - row < step ? rows - row : step;
    const T* block = x + row * k;
    std::int64_t i = begin;
    for (; i + W <= end; i += W) {
      vi best = load(top + i);
      for (std::int64_t r = 0; r < count; ++r) best = max(best, bit_and(as_int(load(block + r * k + i)), mask));
      store(top + i, best);
    }
    if (i < end) {
      const int n = static_cast<int>(end - i);
      vi best = load(top + i, n);
      for (std::int64_t r = 0; r < count; ++r) best = max(best, bit_and(as_int(load(block + r * k + i, n)), mask));
      store(top + i, best, n);
    }
  }
}

}  // namespace

extern "C" {

// Of all quantizers: `codes_stride` is the bytes between rows of codes, what lies between rows is left alone; with
// `shift` a code leaves as code + 128, an unsigned byte.
void QK_IMPL(quantize_per_token)(const void* x, int type, std::int64_t rows, std::int64_t k, const float* smooth,
                                 const float* scale, const float* zero_point, std::int8_t* codes,
                                 std::int64_t codes_stride, int shift, float* scales, int threads) {
  const Rule rule = make_rule(scale, zero_point, shift);
  const Output out{codes, codes_stride, scales};
  parallel_for(threads, rows, row_grain(k), [&](std::int64_t begin, std::int64_t end) {
    const auto run = [&](const auto* typed) {
      using T = std::remove_cv_t<std::remove_reference_t<decltype(*typed)>>;
      if (smooth != nullptr)
        quantize_rows<T, true>(typed, begin, end, k, smooth, rule, out);
      else
        quantize_rows<T, false>(typed, begin, end, k, smooth, rule, out);
    };
    if (type == QK_F32) run(static_cast<const float*>(x));
    if (type == QK_BF16) run(static_cast<const bf16*>(x));
    if (type == QK_F16) run(static_cast<const f16*>(x));
  });
}

void QK_IMPL(layer_norm_quantize)(const void* x, int type, std::int64_t rows, std::int64_t k, const float* weight,
                                  const float* bias, float eps, const float* smooth, const float* scale,
                                  const float* zero_point, std::int8_t* codes, std::int64_t codes_stride, int shift,
                                  float* scales, int threads) {
  const Rule rule = make_rule(scale, zero_point, shift);
  const Output out{codes, codes_stride, scales};
  parallel_for(threads, rows, row_grain(k), [&](std::int64_t begin, std::int64_t end) {
    if (type == QK_F32)
      layer_norm_rows(static_cast<const float*>(x), begin, end, k, weight, bias, eps, smooth, rule, out);
    if (type == QK_BF16)
      layer_norm_rows(static_cast<const bf16*>(x), begin, end, k, weight, bias, eps, smooth, rule, out);
    if (type == QK_F16)
      layer_norm_rows(static_cast<const f16*>(x), begin, end, k, weight, bias, eps, smooth, rule, out);
  });
}

// `top` float32 [k]: what it holds takes part (running maxima; 0 at the start).
void QK_IMPL(channel_absmax)(const void* x, int type, std::int64_t rows, std::int64_t k, float* top, int threads) {
  constexpr std::int64_t block = 64;  // columns: whole cache lines for each thread
  auto* bits = reinterpret_cast<std::int32_t*>(top);
  const std::int64_t blocks = (k + block - 1) / block, work = rows * block;
  parallel_for(threads, blocks, work >= 16384 ? 1 : 16384 / (work + 1) + 1, [&](std::int64_t first, std::int64_t last) {
    const std::int64_t begin = first * block, end = last * block < k ? last * block : k;
    for (std::int64_t i = begin; i < end; ++i)  // a negative NaN must not lose as a negative number
      if ((bits[i] & 0x7fffffff) > inf_bits) bits[i] &= 0x7fffffff;
    if (type == QK_F32) absmax_columns(static_cast<const float*>(x), rows, k, begin, end, bits);
    if (type == QK_BF16) absmax_columns(static_cast<const bf16*>(x), rows, k, begin, end, bits);
    if (type == QK_F16) absmax_columns(static_cast<const f16*>(x), rows, k, begin, end, bits);
  });
}
}
