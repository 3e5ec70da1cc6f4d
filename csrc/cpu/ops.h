// Declarations of all ops in all tiers, made from ops.def, and the helpers shared by every tier.
#pragma once

#include <cstddef>
#include <cstdint>

// The tiers of this kind of processor, lowest first: QK_TIERS(each, ...) is each(TIER, ...) for all of them.
#if defined(__x86_64__)
#define QK_X86 1
#define QK_TIERS(each, ...) \
  each(scalar, __VA_ARGS__) each(avx2, __VA_ARGS__) each(avxvnni, __VA_ARGS__) each(avx512vnni, __VA_ARGS__)
#elif defined(__aarch64__)
#define QK_X86 0
#define QK_TIERS(each, ...) each(scalar, __VA_ARGS__) each(neon, __VA_ARGS__)
#else
#define QK_X86 0
#define QK_TIERS(each, ...) each(scalar, __VA_ARGS__)
#endif

// qk_tier_scalar = 0, ...
#define QK_NUMBER(tier, ...) qk_tier_##tier,
enum QkTier : int { QK_TIERS(QK_NUMBER, ) QK_TIER_COUNT };
#undef QK_NUMBER

// QK_IMPL(int8_linear) is the name of the op in the tier being compiled, for example qk_int8_linear_avx2.
#define QK_CONCAT_(a, b) a##b
#define QK_CONCAT(a, b) QK_CONCAT_(a, b)
#define QK_IMPL(name) QK_CONCAT(qk_##name##_, QK_TIER)

// Element types of float tensors; the numbers are shared with qkernels/abi.py.
enum QkType : int { QK_F32 = 0, QK_BF16 = 1, QK_F16 = 2, QK_I8 = 3 };

extern "C" {

#define QK_DECLARE(tier, name, ...) void qk_##name##_##tier(__VA_ARGS__);
#define QK_PRODUCT(name, ...) QK_TIERS(QK_DECLARE, name, __VA_ARGS__)
#if QK_X86
// avxvnni is avx2 with another product of int8: all other ops are those of avx2.
#define QK_OP(name, ...)                    \
  QK_DECLARE(scalar, name, __VA_ARGS__)     \
  QK_DECLARE(avx2, name, __VA_ARGS__)       \
  QK_DECLARE(avx512vnni, name, __VA_ARGS__) \
  constexpr auto* qk_##name##_avxvnni = &qk_##name##_avx2;
#else
#define QK_OP QK_PRODUCT
#endif
#include "ops.def"
#undef QK_OP
#undef QK_PRODUCT
#undef QK_DECLARE

// 64-byte aligned memory that belongs to the calling thread and grows as needed: contents are undefined, and the
// address holds until the thread asks for the same slot again. Slots keep buffers apart that are alive at once.
enum QkSlot : int { QK_SLOT_SHARED = 0, QK_SLOT_A = 1, QK_SLOT_B = 2, QK_SLOT_COUNT = 3 };
void* qk_workspace(int slot, std::size_t bytes);

// What the threads of a parallel region throw must not leave it. `qk_keep`, called where it is caught, keeps the first
// of it with the thread that opened the region, which lets it go on by `qk_throw`.
struct QkFault;
QkFault* qk_fault();  // of the calling thread
void qk_keep(QkFault* fault);
void qk_throw(QkFault* fault);  // if something was kept

// How many of `threads` may be used: one in a process that was forked, since OpenMP's threads are not there and waiting
// for them would never end.
int qk_usable_threads(int threads);

// How many sums of two products with weights whose codes are so large AVX2 adds up in 16 bits (byte_pairs.h); 0: none.
int qk_pair_sums(std::int32_t largest);

std::int64_t qk_l2_bytes();  // a core's second cache; 1 MB where the system does not say

bool qk_can_run(int tier);   // whether this processor and operating system can
int qk_best_tier();          // the highest that they can
int qk_tier();               // the one in use
bool qk_has_bf16();          // AVX512-BF16, which not every processor of the highest tier has
bool qk_set_tier(int tier);  // false, and nothing changed, where the processor cannot run it
}
