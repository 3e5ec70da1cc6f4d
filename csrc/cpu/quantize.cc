// Rows of floats -> int8 codes and a scale a row (dynamic), or codes by a given scale (static); LayerNorm in front of it; channel maxima.
#include <type_traits>

#include "parallel.h"
#include "rows.h"

namespace {

template <class T, bool Smooth>
static void quantize_rows(const T* x, std::int64_t begin, std::int64_t end, std::int64_t k, const float* smooth, const Rule& rule,
                          std::int8_t* codes, float* scales) {
  for (std::int64_t row = begin; row < end; ++row) {
    const Row<T, Smooth> get{x + row * k, smooth};
    scales[row] = write_codes(rule, top_of(k, get), k, codes + row * k, get);
  }
}

// LayerNorm of x into y, times smooth where there is one. Returns the bits of the largest magnitude.
// The mean is found twice: what rounding left of it after the first time is the mean of the differences.
template <class T>
static inline std::int32_t normalize_row(const T* x, std::int64_t k, const float* weight, const float* bias, float eps, const float* smooth,
                                         float* y) {
  const Row<T, false> get{x, nullptr};
  const float count = static_cast<float>(k);
  const int rest = static_cast<int>(k % W);
  const std::int64_t whole = k - rest;
  vf s[4] = {zero(), zero(), zero(), zero()};
  std::int64_t i = 0;
  for (; i + 4 * W <= whole; i += 4 * W)
    for (int u = 0; u < 4; ++u) s[u] = add(s[u], get(i + u * W));
  for (; i < whole; i += W) s[0] = add(s[0], get(i));
  if (rest) s[1] = add(s[1], get(i, rest));
  const float mean = reduce_add(add(add(s[0], s[1]), add(s[2], s[3]))) / count;

  const vf m = set1(mean);
  vf d[4] = {zero(), zero(), zero(), zero()}, q[4] = {zero(), zero(), zero(), zero()};
  const auto accumulate = [&](int u, vf centred) {
    d[u] = add(d[u], centred);
    q[u] = fma(centred, centred, q[u]);
  };
  for (i = 0; i + 4 * W <= whole; i += 4 * W)
    for (int u = 0; u < 4; ++u) accumulate(u, sub(get(i + u * W), m));
  for (; i < whole; i += W) accumulate(0, sub(get(i), m));
  float sum = reduce_add(add(add(d[0], d[1]), add(d[2], d[3])));
  float squares = reduce_add(add(add(q[0], q[1]), add(q[2], q[3])));
  for (; i < k; ++i) {  // one by one: the padding of a partial vector is not 0 after the subtraction
    const float centred = to_f32(x[i]) - mean;
    sum += centred;
    squares += centred * centred;
  }
  const float left = sum / count;
  float variance = (squares - sum * left) / count;
  if (variance < 0.0f) variance = 0.0f;
  // An infinite variance would turn every value into the bias: make it a fault.
  const float inverse = bits_of(variance) >= static_cast<std::uint32_t>(inf_bits) ? __builtin_nanf("") : 1.0f / __builtin_sqrtf(variance + eps);

  const vf offset = set1(left), factor = set1(inverse);
  vi top = set1(std::int32_t{0});
  const auto finish = [&](vf value, vf w, vf b, vf f) { return mul(fma(mul(sub(sub(value, m), offset), factor), w, b), f); };
  const vf one = set1(1.0f);
  for (i = 0; i < whole; i += W) {
    const vf value = finish(get(i), weight ? load(weight + i) : one, bias ? load(bias + i) : zero(), smooth ? load(smooth + i) : one);
    store(y + i, value);
    top = max(top, magnitude(value));
  }
  if (rest) {
    const vf value = finish(get(i, rest), weight ? load(weight + i, rest) : one, bias ? load(bias + i, rest) : zero(),
                            smooth ? load(smooth + i, rest) : one);
    store(y + i, value, rest);
    for (std::int64_t j = i; j < k; ++j) {
      const std::int32_t bits = static_cast<std::int32_t>(bits_of(y[j]) & 0x7fffffffu);
      top = max(top, set1(bits));
    }
  }
  return reduce_max(top);
}

template <class T>
static void layer_norm_rows(const T* x, std::int64_t begin, std::int64_t end, std::int64_t k, const float* weight, const float* bias,
                            float eps, const float* smooth, const Rule& rule, std::int8_t* codes, float* scales) {
  float* y = static_cast<float*>(qk_workspace(QK_SLOT_A, static_cast<std::size_t>(k) * sizeof(float)));
  const Row<float, false> get{y, nullptr};
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int32_t top = normalize_row(x + row * k, k, weight, bias, eps, smooth, y);
    scales[row] = write_codes(rule, top, k, codes + row * k, get);
  }
}

// Maxima of columns begin..end over all rows, as bit patterns.
template <class T>
static void absmax_columns(const T* x, std::int64_t rows, std::int64_t k, std::int64_t begin, std::int64_t end, std::int32_t* top) {
  constexpr std::int64_t step = 8;  // rows for each visit of `top`
  for (std::int64_t row = 0; row < rows; row += step) {
    const std::int64_t count = rows - row < step ? rows - row : step;
    const T* block = x + row * k;
    std::int64_t i = begin;
    for (; i + W <= end; i += W) {
      vi best = load(top + i);
      for (std::int64_t r = 0; r < count; ++r) best = max(best, magnitude(load(block + r * k + i)));
      store(top + i, best);
    }
    if (i < end) {
      const int n = static_cast<int>(end - i);
      vi best = load(top + i, n);
      for (std::int64_t r = 0; r < count; ++r) best = max(best, magnitude(load(block + r * k + i, n)));
      store(top + i, best, n);
    }
  }
}

}  // namespace

extern "C" {

void QK_IMPL(quantize_per_token)(const void* x, int type, std::int64_t rows, std::int64_t k, const float* smooth, const float* scale,
                                 const float* zero_point, std::int8_t* codes, float* scales, int threads) {
  const Rule rule = make_rule(scale, zero_point);
  parallel_for(threads, rows, row_grain(k), [&](std::int64_t begin, std::int64_t end) {
    const auto run = [&](const auto* typed) {
      using T = std::remove_cv_t<std::remove_reference_t<decltype(*typed)>>;
      if (smooth != nullptr)
        quantize_rows<T, true>(typed, begin, end, k, smooth, rule, codes, scales);
      else
        quantize_rows<T, false>(typed, begin, end, k, smooth, rule, codes, scales);
    };
    if (type == QK_F32) run(static_cast<const float*>(x));
    if (type == QK_BF16) run(static_cast<const bf16*>(x));
    if (type == QK_F16) run(static_cast<const f16*>(x));
  });
}

void QK_IMPL(layer_norm_quantize)(const void* x, int type, std::int64_t rows, std::int64_t k, const float* weight, const float* bias,
                                  float eps, const float* smooth, const float* scale, const float* zero_point, std::int8_t* codes,
                                  float* scales, int threads) {
  const Rule rule = make_rule(scale, zero_point);
  parallel_for(threads, rows, row_grain(k), [&](std::int64_t begin, std::int64_t end) {
    if (type == QK_F32) layer_norm_rows(static_cast<const float*>(x), begin, end, k, weight, bias, eps, smooth, rule, codes, scales);
    if (type == QK_BF16) layer_norm_rows(static_cast<const bf16*>(x), begin, end, k, weight, bias, eps, smooth, rule, codes, scales);
    if (type == QK_F16) layer_norm_rows(static_cast<const f16*>(x), begin, end, k, weight, bias, eps, smooth, rule, codes, scales);
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
