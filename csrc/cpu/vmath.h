// Functions on vectors. Errors are maxima over all floats in the stated range, found by tests/kernels.
#pragma once

#include "simd.h"

namespace {

// e^x to 1.5 ulp; 0 below -87.33 (no subnormals), inf above 88.72; NaN stays NaN. Cephes' polynomial after x = n ln 2 + r.
static inline vf exp(vf x) {
  const vf high = set1(88.72283935546875f), low = set1(-87.33654022216797f);
  const vf clamped = max(low, min(high, x));  // the instructions' NaN rule: NaN as the second argument passes through
  const vf n = round(mul(clamped, set1(1.44269504088896341f)));
  vf r = fnma(n, set1(0.693359375f), clamped);
  r = fnma(n, set1(-2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  // 2^n in two factors: n may be 128, which has no float of its own.
  const vi e = to_int(n);
  const vi half = shift_right<1>(e);
  const vf first_factor = as_float(shift_left<23>(add(half, set1(127))));
  const vf second_factor = as_float(shift_left<23>(add(sub(e, half), set1(127))));
  vf y = mul(mul(p, first_factor), second_factor);
  y = select(less(x, low), zero(), y);
  y = select(less(high, x), set1(__builtin_inff()), y);
  return y;
}

}  // namespace
