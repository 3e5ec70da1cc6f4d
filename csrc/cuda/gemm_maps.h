// Where everything is: tiles, swizzled shared memory, fragments of the tensor-core instructions, phases of barriers.
// Plain arithmetic, so that a C++ compiler can run on a CPU what the kernels compute with (tests/kernels/cuda).
//
// Sources: PTX ISA 9.0, "Register Fragments and Shared Memory Matrix Layouts" (wgmma: 9.7.15.5.1), "Matrix Descriptor
// Format", "Matrix Fragments for mma.m16n8k32", "ldmatrix", "Tensor Swizzling Modes", "mbarrier".
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define QK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QK_HOST_DEVICE inline
#endif

namespace qk {

constexpr QK_HOST_DEVICE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// -- tiles -----------------------------------------------------------------------------------------------------------

struct Place {
  int row, column;  // in tiles
};

// Tile number -> place. Eight rows of tiles are swept column by column, so that tiles that run together share both
// operands in L2.
constexpr QK_HOST_DEVICE Place tile_at(int tile, int rows, int columns) {
  constexpr int together = 8;
  const int sweep = tile / (together * columns), first = sweep * together;
  const int height = rows - first < together ? rows - first : together;
  const int inside = tile - sweep * together * columns;
  return {first + inside % height, inside / height};
}

// -- accumulators ----------------------------------------------------------------------------------------------------

// wgmma m64nN and mma.m16n8 leave rows and columns of the result in a thread in the same way: lane l of a warp has rows
// l / 4 and l / 4 + 8 of the warp's 16, and of every 8 columns those at 2 * (l % 4) and the next. Registers count
// columns first: register 4j + 2h + e holds row l / 4 + 8h, column 8j + 2 (l % 4) + e.
constexpr QK_HOST_DEVICE int fragment_row(int lane, int index) { return lane / 4 + 8 * (index / 2 % 2); }
constexpr QK_HOST_DEVICE int fragment_column(int lane, int index) {
  return 8 * (index / 4) + 2 * (lane % 4) + index % 2;
}

// The epilogue takes accumulators in parts of 32 registers: one row and 128 columns of a quad of lanes. Part -> where
// it lies from the thread's first row and the tile's first column. A tile is MI instructions of ROWS rows per warp
// group (64) or warp (16), and NI columns.
template <int NI, int ROWS>
constexpr QK_HOST_DEVICE Place part_at(int part) {
  const int block = part / 2;
  return {block / (NI / 128) * ROWS + part % 2 * 8, block % (NI / 128) * 128};
}

// -- shared memory of sm_90 ------------------------------------------------------------------------------------------

constexpr int k_block = 128;  // bytes of K in a stage: one row of the 128-byte swizzle

// TMA's 128-byte swizzle permutes the 16-byte chunks of a box's row by the row's number modulo 8, and wgmma looks for
// them there, if the box begins at a multiple of 1024.
//
// Matrix descriptor of a K-major operand with that swizzle: address / 16 in bits 0-13, the leading byte offset / 16 in
// 16-29 (unused when swizzled, 1 by convention), the stride from 8 rows to the next 8 / 16 in 32-45, 1 = 128-byte
// swizzle in 62-63. The next 32 values of K are 32 bytes further: the swizzle acts on address bits, so adding to the
// start inside a swizzle row is sound.
constexpr QK_HOST_DEVICE std::uint64_t descriptor(std::uint32_t address) {
  return (static_cast<std::uint64_t>(1) << 62) | (static_cast<std::uint64_t>(1024 / 16) << 32) |
         (static_cast<std::uint64_t>(1) << 16) | ((address & 0x3FFFF) >> 4);
}

// -- phases of sm_90's barriers --------------------------------------------------------------------------------------

// A load or use number `step` runs in stage step % stages, in round step / stages. The data of a round is there when
// the stage's `full` barrier has left phase `round`; the stage is free for it when its `empty` barrier has left phase
// `round - 1`, and at once in round 0: waiting for the parity that a fresh barrier is not in returns immediately.
constexpr QK_HOST_DEVICE int full_parity(int round) { return round & 1; }
constexpr QK_HOST_DEVICE int empty_parity(int round) { return (round & 1) ^ 1; }
// Consumers take turns at the main loop: consumer 0's turn t follows consumer 1's turn t - 1, consumer 1's turn t
// consumer 0's turn t.
constexpr QK_HOST_DEVICE int turn_parity(int consumer, int turn) { return (turn & 1) ^ (consumer == 0); }

// -- shared memory and operands of sm_80 -----------------------------------------------------------------------------

// Byte of 16-byte chunk `chunk` (0..3) of row `row` in a stage of 64 bytes of K. Eight consecutive rows of one chunk
// touch all 32 banks once.
constexpr QK_HOST_DEVICE int swizzle64(int row, int chunk) { return row * 64 + ((chunk ^ (row / 2 % 4)) * 16); }

// ldmatrix.x4 reads the row that lane 8i + r names as row r of 8x8 matrix i, 16 bytes per row, and gives lane l bytes
// 4 (l % 4)..+3 of row l / 4 of each: the operands of mma.m16n8k32. A: matrices are rows 0-7 and 8-15 of K 0-15, then
// of K 16-31. B: K 0-15 and 16-31 of columns 0-7, then of columns 8-15.
struct Chunk {
  int row, chunk;
};
constexpr QK_HOST_DEVICE Chunk operand_a(int lane) { return {lane % 16, lane / 16}; }
constexpr QK_HOST_DEVICE Chunk operand_b(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2}; }

}  // namespace qk
