// Rounds of 24 independent vpdpbusd on 512 bits, and the CPU time of this thread.
#pragma once

#include <time.h>

#include <cstdint>

inline double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

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
