// The part of simd.h for aarch64 with the dot product of bytes: vectors of four. Included by simd.h only.
#pragma once

namespace {

using vf = float32x4_t;
using vi = int32x4_t;
using vm = uint32x4_t;
constexpr int W = 4;

static inline vm lanes(int n) {
  static const std::int32_t index[4] = {0, 1, 2, 3};
  return vcltq_s32(vld1q_s32(index), vdupq_n_s32(n));
}

static inline vf set1(float x) { return vdupq_n_f32(x); }
static inline vi set1(std::int32_t x) { return vdupq_n_s32(x); }
static inline vf as_float(vi a) { return vreinterpretq_f32_s32(a); }
static inline vi as_int(vf a) { return vreinterpretq_s32_f32(a); }

static inline vf load(const float* p) { return vld1q_f32(p); }
static inline vf load(const bf16* p) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p))), 16));
}
static inline vf load(const f16* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p))));
}
static inline vi load(const std::int32_t* p) { return vld1q_s32(p); }
static inline vi load(const std::int8_t* p) {
  std::uint32_t four;
  std::memcpy(&four, p, 4);
  return vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))));
}
template <class T>
static inline auto load(const T* p, int n) {
  T buffer[4] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

static inline void store(float* p, vf x) { vst1q_f32(p, x); }
static inline void store(bf16* p, vf x) {
  const uint32x4_t u = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  const uint32x4_t words = vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc0));
  vst1_u16(reinterpret_cast<std::uint16_t*>(p), vmovn_u32(words));
}
static inline void store(f16* p, vf x) {
  vst1_u16(reinterpret_cast<std::uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x)));
}
static inline void store(std::int32_t* p, vi x) { vst1q_s32(p, x); }
// int8 from int32 that is in range already.
static inline void store(std::int8_t* p, vi x) {
  const int16x4_t words = vmovn_s32(x);
  const std::uint64_t bytes = vget_lane_u64(vreinterpret_u64_s8(vmovn_s16(vcombine_s16(words, words))), 0);
  std::memcpy(p, &bytes, 4);
}
template <class T, class V>
static inline void store(T* p, V x, int n) {
  T buffer[4];
  store(buffer, x);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

static inline vf add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf div(vf a, vf b) { return vdivq_f32(a, b); }
static inline vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
static inline vm less(vf a, vf b) { return vcltq_f32(a, b); }
static inline vm less_equal(vf a, vf b) { return vcleq_f32(a, b); }
static inline vm less(vi a, vi b) { return vcltq_s32(a, b); }
static inline vf select(vm m, vf yes, vf no) { return vbslq_f32(m, yes, no); }
static inline vi select(vm m, vi yes, vi no) { return vbslq_s32(m, yes, no); }
// Not vminq and vmaxq: they return NaN where the first argument is one.
static inline vf min(vf a, vf b) { return select(less(a, b), a, b); }
static inline vf max(vf a, vf b) { return select(less(b, a), a, b); }
static inline vf abs(vf a) { return vabsq_f32(a); }
static inline vf round(vf a) { return vrndnq_f32(a); }
static inline vi add(vi a, vi b) { return vaddq_s32(a, b); }
static inline vi sub(vi a, vi b) { return vsubq_s32(a, b); }
static inline vi max(vi a, vi b) { return vmaxq_s32(a, b); }
static inline vi bit_and(vi a, vi b) { return vandq_s32(a, b); }
template <int n>
static inline vi shift_left(vi a) {
  return vshlq_n_s32(a, n);
}
template <int n>
static inline vi shift_right(vi a) {
  if constexpr (n == 0)
    return a;
  else
    return vshrq_n_s32(a, n);
}
static inline vi to_int(vf a) { return vcvtnq_s32_f32(a); }
static inline vf to_float(vi a) { return vcvtq_f32_s32(a); }
static inline float reduce_add(vf a) {
  const float32x2_t x = vadd_f32(vget_low_f32(a), vget_high_f32(a));
  return vget_lane_f32(x, 0) + vget_lane_f32(x, 1);
}
static inline float reduce_max(vf a) {
  const float x = vgetq_lane_f32(a, 0), y = vgetq_lane_f32(a, 1), z = vgetq_lane_f32(a, 2), w = vgetq_lane_f32(a, 3);
  const float u = x > y ? x : y, v = z > w ? z : w;
  return u > v ? u : v;
}
static inline std::int32_t reduce_max(vi a) { return vmaxvq_s32(a); }

// sum += four products of signed a and b in each lane.
static inline void dot(vi& sum, vi a, vi b) { sum = vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }

}  // namespace
