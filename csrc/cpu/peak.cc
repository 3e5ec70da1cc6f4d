// peak_int8: how many int8 operations per second the tier's multiplying instructions can do, a multiply-add counting as
// two. No memory is touched: independent accumulators live in named registers, in inline assembly, because compilers
// spill such loops and then show a third of the truth.
#include <chrono>

#include "parallel.h"
#include "simd.h"

namespace {

#define QK_EIGHT(op, a, b, c, d, e, f, g, h) op(a) op(b) op(c) op(d) op(e) op(f) op(g) op(h)

#if defined(QK_TIER_avx512vnni)

constexpr double kOperations = 24.0 * 16 * 4 * 2;  // instructions x lanes x products x (multiply and add)

static void burn(std::int64_t rounds) {
#define QK_CLEAR(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"
#define QK_DOT(n) "vpdpbusd %%zmm31, %%zmm30, %%zmm" #n "\n\t"
  __asm__ volatile(QK_EIGHT(QK_CLEAR, 0, 1, 2, 3, 4, 5, 6, 7) QK_EIGHT(QK_CLEAR, 8, 9, 10, 11, 12, 13, 14, 15)
                       QK_EIGHT(QK_CLEAR, 16, 17, 18, 19, 20, 21, 22, 23) QK_CLEAR(30) QK_CLEAR(31)
                   ".p2align 6\n"
                   "1:\n\t" QK_EIGHT(QK_DOT, 0, 1, 2, 3, 4, 5, 6, 7) QK_EIGHT(QK_DOT, 8, 9, 10, 11, 12, 13, 14, 15)
                       QK_EIGHT(QK_DOT, 16, 17, 18, 19, 20, 21, 22, 23)
                   "sub $1, %0\n\t"
                   "jnz 1b\n\t"
                   : "+r"(rounds)
                   :
                   : "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12",
                     "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm30",
                     "zmm31");
#undef QK_CLEAR
#undef QK_DOT
}

#elif defined(QK_TIER_avxvnni)

// 12 accumulators, twice: twice the five cycles that one takes, at two instructions a cycle, with room to spare.
constexpr double kOperations = 24.0 * 8 * 4 * 2;

static void burn(std::int64_t rounds) {
#define QK_CLEAR(n) "vpxor %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n\t"
#define QK_DOT(n) "%{vex%} vpdpbusd %%ymm15, %%ymm14, %%ymm" #n "\n\t"
  __asm__ volatile(QK_EIGHT(QK_CLEAR, 0, 1, 2, 3, 4, 5, 6, 7) QK_CLEAR(8) QK_CLEAR(9) QK_CLEAR(10) QK_CLEAR(11) QK_CLEAR(14)
                       QK_CLEAR(15)
                   ".p2align 6\n"
                   "1:\n\t" QK_EIGHT(QK_DOT, 0, 1, 2, 3, 4, 5, 6, 7) QK_EIGHT(QK_DOT, 8, 9, 10, 11, 0, 1, 2, 3)
                       QK_EIGHT(QK_DOT, 4, 5, 6, 7, 8, 9, 10, 11)
                   "sub $1, %0\n\t"
                   "jnz 1b\n\t"
                   : "+r"(rounds)
                   :
                   : "cc", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm14",
                     "ymm15");
#undef QK_CLEAR
#undef QK_DOT
}

#elif defined(QK_TIER_neon)

constexpr double kOperations = 24.0 * 4 * 4 * 2;

static void burn(std::int64_t rounds) {
#define QK_CLEAR(n) "movi v" #n ".4s, #0\n\t"
#define QK_DOT(n) "sdot v" #n ".4s, v30.16b, v31.16b\n\t"
  __asm__ volatile(QK_EIGHT(QK_CLEAR, 0, 1, 2, 3, 4, 5, 6, 7) QK_EIGHT(QK_CLEAR, 8, 9, 10, 11, 12, 13, 14, 15)
                       QK_EIGHT(QK_CLEAR, 16, 17, 18, 19, 20, 21, 22, 23) QK_CLEAR(30) QK_CLEAR(31)
                   ".p2align 6\n"
                   "1:\n\t" QK_EIGHT(QK_DOT, 0, 1, 2, 3, 4, 5, 6, 7) QK_EIGHT(QK_DOT, 8, 9, 10, 11, 12, 13, 14, 15)
                       QK_EIGHT(QK_DOT, 16, 17, 18, 19, 20, 21, 22, 23)
                   "subs %0, %0, #1\n\t"
                   "b.ne 1b\n\t"
                   : "+r"(rounds)
                   :
                   : "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15",
                     "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v30", "v31");
#undef QK_CLEAR
#undef QK_DOT
}

#elif defined(QK_TIER_avx2)

// What int8_avx2.h multiplies with, four instructions for 32 products, on eight accumulators and in its order.
constexpr double kOperations = 8.0 * 32 * 2;

static void burn(std::int64_t rounds) {
#define QK_CLEAR(n) "vpxor %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n\t"
#define QK_FLIP(n) "vpxor %%ymm15, %%ymm14, %%ymm" #n "\n\t"
#define QK_BYTES(n) "vpmaddubsw %%ymm" #n ", %%ymm13, %%ymm" #n "\n\t"
#define QK_WORDS(n) "vpmaddwd %%ymm12, %%ymm" #n ", %%ymm" #n "\n\t"
#define QK_ADD(n, t) "vpaddd %%ymm" #t ", %%ymm" #n ", %%ymm" #n "\n\t"
#define QK_FOUR(f) f(8) f(9) f(10) f(11)
#define QK_PRODUCTS QK_FOUR(QK_FLIP) QK_FOUR(QK_BYTES) QK_FOUR(QK_WORDS)
  __asm__ volatile(QK_EIGHT(QK_CLEAR, 0, 1, 2, 3, 4, 5, 6, 7) QK_CLEAR(12) QK_CLEAR(13) QK_CLEAR(14) QK_CLEAR(15)
                   ".p2align 6\n"
                   "1:\n\t" QK_PRODUCTS QK_ADD(0, 8) QK_ADD(1, 9) QK_ADD(2, 10) QK_ADD(3, 11)
                   QK_PRODUCTS QK_ADD(4, 8) QK_ADD(5, 9) QK_ADD(6, 10) QK_ADD(7, 11)
                   "sub $1, %0\n\t"
                   "jnz 1b\n\t"
                   : "+r"(rounds)
                   :
                   : "cc", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12",
                     "ymm13", "ymm14", "ymm15");
#undef QK_CLEAR
#undef QK_FLIP
#undef QK_BYTES
#undef QK_WORDS
#undef QK_ADD
#undef QK_FOUR
#undef QK_PRODUCTS
}

#else

constexpr double kOperations = 8.0 * 2;

// Plain integer multiply-adds on eight variables that the compiler must keep apart.
static void burn(std::int64_t rounds) {
  int a = 0, b = 1, c = 2, d = 3, e = 4, f = 5, g = 6, h = 7;
  int x = 3, y = 5;
  for (std::int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile("" : "+r"(x), "+r"(y));
    a += x * y, b += x * (y ^ 1), c += x * (y ^ 2), d += x * (y ^ 3);
    e += x * (y ^ 4), f += x * (y ^ 5), g += x * (y ^ 6), h += x * (y ^ 7);
    __asm__ volatile("" : : "r"(a ^ b ^ c ^ d ^ e ^ f ^ g ^ h));
  }
}

#endif

static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

// The sum of all threads' best short runs, in operations per second.
extern "C" void QK_IMPL(peak_int8)(double* operations_per_second, int threads) {
  // Rounds that take about a millisecond undisturbed: short enough to fit between interruptions on a busy machine.
  std::int64_t rounds = 500;
  for (double fastest = 0.0; fastest < 1e-3; rounds *= 2) {
    fastest = 1.0;
    for (int repeat = 0; repeat < 5; ++repeat) {
      const double begin = seconds();
      burn(2 * rounds);
      const double took = seconds() - begin;
      fastest = took < fastest ? took : fastest;
    }
  }
  // All threads burn at once and each keeps its best slice, so that an interruption of one does not count against the
  // others.
  auto* best = static_cast<double*>(qk_workspace(QK_SLOT_SHARED, sizeof(double) * static_cast<std::size_t>(threads)));
  parallel_for(threads, threads, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      best[i] = 0.0;
      for (int slice = 0; slice < 50; ++slice) {
        const double begin = seconds();
        burn(rounds);
        const double rate = kOperations * static_cast<double>(rounds) / (seconds() - begin);
        best[i] = rate > best[i] ? rate : best[i];
      }
    }
  });
  double total = 0.0;
  for (int i = 0; i < threads; ++i) total += best[i];
  *operations_per_second = total;
}
