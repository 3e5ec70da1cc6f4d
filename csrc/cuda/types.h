// Element types and activations, numbered as in csrc/cpu and qkernels/abi.py.
#pragma once

namespace qk {

enum Type { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 3 };
enum Activation { identity = 0, gelu = 1, quick_gelu = 2, gelu_tanh = 3 };

}  // namespace qk
