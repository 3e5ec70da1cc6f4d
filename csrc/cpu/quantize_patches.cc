// Images -> codes of their patches, every patch a row. A strip of patches is read line by line, as it lies in memory,
// into float rows that stay in the second cache, and quantized from there.
#include <type_traits>

#include "parallel.h"
#include "rows.h"

namespace {

struct Images {
  std::int64_t batch, channels, rows, columns, height, width;  // rows and columns of patches; the size of one patch
  std::int64_t image_stride, channel_stride, line_stride;      // in elements; a line is contiguous
};

// The patches of one strip as float rows of k values each: channel by channel, line by line.
template <class T>
static void gather(const T* x, const Images& shape, std::int64_t k, float* out) {
  for (std::int64_t line = 0; line < shape.channels * shape.height; ++line) {
    const T* from = x + line / shape.height * shape.channel_stride + line % shape.height * shape.line_stride;
    for (std::int64_t column = 0; column < shape.columns; ++column, from += shape.width) {
      float* to = out + column * k + line * shape.width;
      std::int64_t i = 0;
      for (; i + W <= shape.width; i += W) store(to + i, load(from + i));
      if (i < shape.width) {
        const int rest = static_cast<int>(shape.width - i);
        store(to + i, load(from + i, rest), rest);
      }
    }
  }
}

}  // namespace

extern "C" {

// Codes `codes_stride` bytes from patch to patch; with `shift` a code leaves as code + 128, an unsigned byte.
void QK_IMPL(quantize_patches)(const void* x, int type, std::int64_t batch, std::int64_t channels, std::int64_t rows,
                               std::int64_t columns, std::int64_t height, std::int64_t width, std::int64_t image_stride,
                               std::int64_t channel_stride, std::int64_t line_stride, const float* smooth,
                               const float* scale, const float* zero_point, std::int8_t* codes,
                               std::int64_t codes_stride, int shift, float* scales, int threads) {
  const Images shape{batch, channels, rows, columns, height, width, image_stride, channel_stride, line_stride};
  const Rule rule = make_rule(scale, zero_point, shift);
  const std::int64_t k = channels * height * width;
  parallel_for(threads, batch * rows, row_grain(k * columns), [&](std::int64_t begin, std::int64_t end) {
    auto* strip = static_cast<float*>(qk_workspace(QK_SLOT_A, static_cast<std::size_t>(columns * k) * sizeof(float)));
    const auto quantize = [&](std::int64_t patch, const auto& get) {
      scales[patch] = write_codes(rule, top_of(k, get), k, codes + patch * codes_stride, get);
    };
    const auto run = [&](const auto* typed) {
      for (std::int64_t task = begin; task < end; ++task) {
        gather(typed + task / rows * image_stride + task % rows * height * line_stride, shape, k, strip);
        for (std::int64_t column = 0; column < columns; ++column) {
          const float* y = strip + column * k;
          if (smooth != nullptr)
            quantize(task * columns + column, Row<float, true>{y, smooth});
          else
            quantize(task * columns + column, Row<float, false>{y, nullptr});
        }
      }
    };
    if (type == QK_F32) run(static_cast<const float*>(x));
    if (type == QK_BF16) run(static_cast<const bf16*>(x));
    if (type == QK_F16) run(static_cast<const f16*>(x));
  });
}
}
