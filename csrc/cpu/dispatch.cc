// Processor -> tier, and what exists once per process.
//
// How an op is added:
//   1. csrc/cpu/NAME.cc defines `extern "C" void QK_IMPL(NAME)(arguments)`. It is compiled once per tier with
//   -DQK_TIER=
//      and that tier's instruction flags, so it includes "simd.h" (vector types), "vmath.h" (sigmoid, GELU) and
//      "parallel.h" and keeps all helpers `static` or inside an unnamed namespace. An inline function or a template of
//      the standard library that is emitted out of line would be merged across tiers by the linker, and the scalar tier
//      would run AVX-512: use none there (a test looks for weak symbols).
//   2. ops.def gets one line: QK_OP(NAME, arguments), or QK_PRODUCT where tiers differ by their products of int8. That
//   declares all tiers and binds `qkernels._native.NAME`.
//   3. qkernels/cpu.py gets the wrapper of the same name and arguments as in qkernels/reference.py.
// setup.py finds the file by itself.
#include "ops.h"

#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>
#include <utility>

#if QK_X86
#include <cpuid.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

struct Processor {
  bool runs[QK_TIER_COUNT] = {true};  // by tier; the scalar one everywhere
  bool bf16 = false;
  int best = 0;
};

Processor detect() {
  Processor found;
#if QK_X86
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool osxsave = c & (1u << 27), avx = c & (1u << 28), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave || !avx || !fma || !f16c) return found;
  // XCR0: the operating system saves XMM (1), YMM (2), and for AVX-512 mask and ZMM state (5, 6, 7).
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
  const bool avx512 = (b & (f | dq | bw | vl)) == (f | dq | bw | vl) && (low & 0xe6) == 0xe6;
  const bool avx2 = b & (1u << 5), vnni = c & (1u << 11);
  unsigned more = 0;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) more = a;
  found.runs[qk_tier_avx2] = avx2;
  found.runs[qk_tier_avxvnni] = avx2 && (more & (1u << 4));
  found.runs[qk_tier_avx512vnni] = avx2 && avx512 && vnni;
  found.bf16 = found.runs[qk_tier_avx512vnni] && (more & (1u << 5));
#elif defined(__aarch64__) && defined(__linux__)
  found.runs[qk_tier_neon] = getauxval(AT_HWCAP) & (1ul << 20);  // HWCAP_ASIMDDP: the dot product of bytes
#elif defined(__aarch64__) && defined(__APPLE__)
  found.runs[qk_tier_neon] = true;
#endif
  for (int tier = 0; tier < QK_TIER_COUNT; ++tier)
    if (found.runs[tier]) found.best = tier;
  return found;
}

std::int64_t second_cache() {
  long bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return bytes > 0 ? bytes : 1 << 20;
}

const Processor processor = detect();
const std::int64_t l2_bytes = second_cache();
int current = processor.best;

bool forked = false;
#if !defined(_WIN32)
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

struct Buffer {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

struct QkFault {
  std::atomic<bool> taken{false};
  std::exception_ptr first;
};

extern "C" {

QkFault* qk_fault() {
  thread_local QkFault fault;
  return &fault;
}

void qk_keep(QkFault* fault) {
  if (!fault->taken.exchange(true)) fault->first = std::current_exception();
}

void qk_throw(QkFault* fault) {
  if (!fault->taken) return;
  fault->taken = false;
  std::rethrow_exception(std::exchange(fault->first, nullptr));
}

std::int64_t qk_l2_bytes() { return l2_bytes; }
bool qk_can_run(int tier) { return tier >= 0 && tier < QK_TIER_COUNT && processor.runs[tier]; }
int qk_best_tier() { return processor.best; }
int qk_tier() { return current; }
int qk_usable_threads(int threads) { return forked ? 1 : threads; }
bool qk_has_bf16() { return processor.bf16; }

int qk_pair_sums(std::int32_t largest) {
  return largest <= 8 ? 8 : largest <= 16 ? 4 : largest <= 32 ? 2 : largest <= 64 ? 1 : 0;
}

bool qk_set_tier(int tier) {
  if (!qk_can_run(tier)) return false;
  current = tier;
  return true;
}

void* qk_workspace(int slot, std::size_t bytes) {
  thread_local Buffer buffers[QK_SLOT_COUNT];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, buffer.bytes);
    if (buffer.data == nullptr) {
      buffer.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}
}
