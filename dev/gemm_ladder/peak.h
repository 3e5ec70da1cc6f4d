// The peak that versions are measured against, and the CPU time of this thread.
#pragma once

#include <time.h>

#include <cstdint>

inline double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

#if defined(__AVX512F__)

// Products in a round: 24 independent vpdpbusd on 512 bits.
constexpr double kPeakProducts = 24 * 64;

__attribute__((noinline)) inline void peak(std::int64_t rounds) {
  __asm__ volatile(
      ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,30,31\n\t"
      "vpxord %%zmm\\n, %%zmm\\n, %%zmm\\n\n\t"
      ".endr\n"
      ".p2align 6\n"
      "1:\n\t"
      ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n\t"
      "vpdpbusd %%zmm31, %%zmm30, %%zmm\\n\n\t"
      ".endr\n\t"
      "sub $1, %0\n\t"
      "jnz 1b\n\t"
      : "+r"(rounds)
      :
      : "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12",
        "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm30",
        "zmm31");
}

#else

// Eight times what int8_avx2.h multiplies with, in its order.
constexpr double kPeakProducts = 8 * 32;

__attribute__((noinline)) inline void peak(std::int64_t rounds) {
  __asm__ volatile(
      ".irp n,0,1,2,3,4,5,6,7,12,13,14,15\n\t"
      "vpxor %%ymm\\n, %%ymm\\n, %%ymm\\n\n\t"
      ".endr\n"
      ".p2align 6\n"
      "1:\n\t"
      ".irp half,0,4\n\t"
      ".irp n,8,9,10,11\n\t"
      "vpxor %%ymm15, %%ymm14, %%ymm\\n\n\t"
      ".endr\n\t"
      ".irp n,8,9,10,11\n\t"
      "vpmaddubsw %%ymm\\n, %%ymm13, %%ymm\\n\n\t"
      ".endr\n\t"
      ".irp n,8,9,10,11\n\t"
      "vpmaddwd %%ymm12, %%ymm\\n, %%ymm\\n\n\t"
      ".endr\n\t"
      ".if \\half\n\t"
      "vpaddd %%ymm8, %%ymm4, %%ymm4\n\tvpaddd %%ymm9, %%ymm5, %%ymm5\n\t"
      "vpaddd %%ymm10, %%ymm6, %%ymm6\n\tvpaddd %%ymm11, %%ymm7, %%ymm7\n\t"
      ".else\n\t"
      "vpaddd %%ymm8, %%ymm0, %%ymm0\n\tvpaddd %%ymm9, %%ymm1, %%ymm1\n\t"
      "vpaddd %%ymm10, %%ymm2, %%ymm2\n\tvpaddd %%ymm11, %%ymm3, %%ymm3\n\t"
      ".endif\n\t"
      ".endr\n\t"
      "sub $1, %0\n\t"
      "jnz 1b\n\t"
      : "+r"(rounds)
      :
      : "cc", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12",
        "ymm13", "ymm14", "ymm15");
}

#endif
