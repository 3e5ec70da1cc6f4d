// Declarations of all ops in all tiers, made from ops.def, and the helpers shared by every tier.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#define QK_X86 1
#else
#define QK_X86 0
#endif

// QK_IMPL(int8_linear) is the name of the op in the tier being compiled, for example qk_int8_linear_avx2.
#define QK_CONCAT_(a, b) a##b
#define QK_CONCAT(a, b) QK_CONCAT_(a, b)
#define QK_IMPL(name) QK_CONCAT(qk_##name##_, QK_TIER)

// Element types of float tensors; the numbers are shared with qkernels/cpu.py.
enum QkType : int { QK_F32 = 0, QK_BF16 = 1, QK_F16 = 2, QK_I8 = 3 };

extern "C" {

#if QK_X86
#define QK_OP(name, ...)                \
  void qk_##name##_scalar(__VA_ARGS__); \
  void qk_##name##_avx2(__VA_ARGS__);   \
  void qk_##name##_avx512vnni(__VA_ARGS__);
#else
#define QK_OP(name, ...) void qk_##name##_scalar(__VA_ARGS__);
#endif
#include "ops.def"
#undef QK_OP

// 64-byte aligned memory that belongs to the calling thread and grows as needed: contents are undefined, and the
// address holds until the thread asks for the same slot again. Slots keep buffers apart that are alive at once.
enum QkSlot : int { QK_SLOT_SHARED = 0, QK_SLOT_A = 1, QK_SLOT_B = 2, QK_SLOT_COUNT = 3 };
void* qk_workspace(int slot, std::size_t bytes);

// How many of `threads` may be used: one in a process that was forked, since OpenMP's threads are not there and waiting
// for them would never end.
int qk_usable_threads(int threads);

// Tiers: 0 scalar, 1 avx2, 2 avx512vnni.
int qk_best_tier();          // the highest that this processor and operating system can run
int qk_tier();               // the one in use
bool qk_has_bf16();          // AVX512-BF16, which not every processor of the highest tier has
bool qk_set_tier(int tier);  // false, and nothing changed, where the processor cannot run it
}
