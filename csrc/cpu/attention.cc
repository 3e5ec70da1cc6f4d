// attention: float arithmetic, and the choice of bfloat16 products where the input is bfloat16 and the processor has
// them.
#include "attention.h"

#if defined(QK_TIER_avx512vnni)
extern "C" void qk_attend_bf16(const QkAttention& all);  // attention_bf16.cc
#endif

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
  const QkAttention all{
      q,
      k,
      v,
      {q_batch, q_token, q_head},
      {k_batch, k_token, k_head},
      {v_batch, v_token, v_head},
      batch,
      queries,
      keys,
      heads,
      d,
      {mask, mask_is_bool != 0, mask_batch, mask_head, mask_row},
      causal != 0,
      scale,
      {static_cast<char*>(out), out_stride, shift != 0, out_type, out_scale, out_scale_per_channel != 0, scales},
      threads};
#if defined(QK_TIER_avx512vnni)
  if (type == QK_BF16 && qk_has_bf16()) {
    qk_attend_bf16(all);
    return;
  }
#endif
  if (type == QK_F32) attend<Floats, float>(all);
  if (type == QK_BF16) attend<Floats, bf16>(all);
  if (type == QK_F16) attend<Floats, f16>(all);
}
}
