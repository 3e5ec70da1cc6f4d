// Ways of multiplying int8 codes on AVX2, alone in registers and as steps of register tiles whose operands lie in L1:
// cycles for 32 products of one row with eight columns, where the multiplying ports allow one. `run.sh avx2` builds and
// runs it; what was found is in README.md.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iterator>

#include "peak.h"

namespace {

#define CLOBBERED                                                                                                  \
  "cc", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", \
      "ymm13", "ymm14", "ymm15"
// A loop around `body`, which may read from %1 on. Sums: ymm0-7; ones: ymm15; x: ymm14; signs: ymm13; w: ymm12.
#define LOOP(name, body)                                                                                       \
  __attribute__((noinline)) void name(std::int64_t rounds, const char* memory) {                               \
    __asm__ volatile(".p2align 6\n1:\n" body "sub $1, %0\njnz 1b\n" : "+r"(rounds) : "r"(memory) : CLOBBERED); \
  }

// One vector's product in t, and added to sum n.
#define PLAIN(t) "vpmaddubsw %%ymm12, %%ymm14, %%ymm" #t "\n"
#define SIGNED(t) "vpsignb %%ymm13, %%ymm12, %%ymm" #t "\nvpmaddubsw %%ymm" #t ", %%ymm14, %%ymm" #t "\n"
#define FLIPPED(t) "vpxor %%ymm13, %%ymm12, %%ymm" #t "\nvpmaddubsw %%ymm" #t ", %%ymm14, %%ymm" #t "\n"
#define WIDE(t) "vpmaddwd %%ymm15, %%ymm" #t ", %%ymm" #t "\n"
#define ADD(n, t) "vpaddd %%ymm" #t ", %%ymm" #n ", %%ymm" #n "\n"
#define CHAIN(product, n, t) product(t) WIDE(t) ADD(n, t)
#define EIGHT_CHAINS(product)                                                                                 \
  CHAIN(product, 0, 8)                                                                                        \
  CHAIN(product, 1, 9)                                                                                        \
  CHAIN(product, 2, 10) CHAIN(product, 3, 11) CHAIN(product, 4, 8) CHAIN(product, 5, 9) CHAIN(product, 6, 10) \
      CHAIN(product, 7, 11)
#define WORDS(n) "vpmaddwd %%ymm14, %%ymm12, %%ymm8\n" ADD(n, 8) "vpmaddwd %%ymm13, %%ymm12, %%ymm9\n" ADD(n, 9)

LOOP(saturating, EIGHT_CHAINS(PLAIN))
LOOP(signs, EIGHT_CHAINS(SIGNED))
LOOP(flipped, EIGHT_CHAINS(FLIPPED))
LOOP(words, WORDS(0) WORDS(1) WORDS(2) WORDS(3) WORDS(4) WORDS(5) WORDS(6) WORDS(7))

// Tiles of flipped weights. Four rows by two vectors: w in registers, one product after the other.
#define LOAD_W "vmovdqu 512(%1), %%ymm12\nvmovdqu 544(%1), %%ymm11\n"
#define SIGNS(row) "vpbroadcastd 4+8*" #row "(%1), %%ymm13\n"
#define SIZES(row) "vpbroadcastd 8*" #row "(%1), %%ymm14\n"
#define BY_TWO(row, n, m) \
  SIGNS(row)              \
  SIZES(row)              \
  CHAIN(FLIPPED, n, 8) "vpxor %%ymm13, %%ymm11, %%ymm9\nvpmaddubsw %%ymm9, %%ymm14, %%ymm9\n" WIDE(9) ADD(m, 9)
LOOP(four_by_two, LOAD_W BY_TWO(0, 0, 1) BY_TWO(1, 2, 3) BY_TWO(2, 4, 5) BY_TWO(3, 6, 7))

// Two rows by four vectors, w from memory.
#define FLIP(j, t) "vpxor 512+32*" #j "(%1), %%ymm13, %%ymm" #t "\n"
#define BYTES(t) "vpmaddubsw %%ymm" #t ", %%ymm14, %%ymm" #t "\n"
#define MEMORY_CHAIN(j, n, t) FLIP(j, t) BYTES(t) WIDE(t) ADD(n, t)
#define BY_FOUR(row, a, b, c, d) \
  SIGNS(row) SIZES(row) MEMORY_CHAIN(0, a, 8) MEMORY_CHAIN(1, b, 9) MEMORY_CHAIN(2, c, 10) MEMORY_CHAIN(3, d, 11)
LOOP(two_by_four, BY_FOUR(0, 0, 1, 2, 3) BY_FOUR(1, 4, 5, 6, 7))
#define FLIPS FLIP(0, 8) FLIP(1, 9) FLIP(2, 10) FLIP(3, 11)
#define REST(a, b, c, d) \
  BYTES(8) BYTES(9) BYTES(10) BYTES(11) WIDE(8) WIDE(9) WIDE(10) WIDE(11) ADD(a, 8) ADD(b, 9) ADD(c, 10) ADD(d, 11)
LOOP(in_stages, SIGNS(0) SIZES(0) FLIPS REST(0, 1, 2, 3) SIGNS(1) SIZES(1) FLIPS REST(4, 5, 6, 7))
LOOP(sizes_late, SIGNS(0) FLIPS SIZES(0) REST(0, 1, 2, 3) SIGNS(1) FLIPS SIZES(1) REST(4, 5, 6, 7))

struct Way {
  const char* name;
  void (*run)(std::int64_t, const char*);
};
const Way ways[] = {
    {"saturating: vpmaddubsw, vpmaddwd, vpaddd (oneDNN's)", saturating},
    {"vpsignb before it", signs},
    {"vpxor before it", flipped},
    {"int16: vpmaddwd and vpaddd, twice", words},
    {"vpxor, tile of 4 rows x 2 vectors", four_by_two},
    {"2 x 4, w from memory", two_by_four},
    {"2 x 4, four vectors in stages", in_stages},
    {"2 x 4, in stages, x loaded behind vpxor (built)", sizes_late},
};

}  // namespace

int main() {
  alignas(64) static const char memory[4096] = {};
  double best[std::size(ways)];
  std::fill(std::begin(best), std::end(best), 1.0);
  for (int repeat = 0; repeat < 60; ++repeat)  // in turns: the clock's rate moves
    for (std::size_t i = 0; i < std::size(ways); ++i) {
      const double begin = cpu_seconds();
      ways[i].run(20000, memory);
      best[i] = std::min(best[i], cpu_seconds() - begin);
    }
  // The saturating way is bound by its multiplications, two for 32 products on two ports.
  for (std::size_t i = 0; i < std::size(ways); ++i) std::printf("%-56s%6.2f\n", ways[i].name, best[i] / best[0]);
}
