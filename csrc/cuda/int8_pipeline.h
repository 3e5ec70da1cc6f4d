// The warp-specialized main loop of the sm_90 INT8 linear map, without the instructions: who waits for whom, loads
// what, and multiplies when. A Machine supplies the instructions: PTX in int8_linear_sm90.cu, and a model of them in
// tests/kernels/cuda/emulator.cc, which runs these same loops on a CPU.
//
// One thread loads stages of 128 bytes of K by TMA; two consumer warp groups multiply. In *pingpong* each has a tile of
// its own, and one's epilogue runs under the other's main loop: for short K. Otherwise both share a tile twice as high:
// fewer bytes a product, for long K. Grids are persistent: a block takes every blocks-th tile.
#pragma once

#include "gemm_maps.h"

namespace qk {

// MI wgmma of 64 rows and NI columns are one consumer's share of a tile.
template <int MI_, int NI_, bool PINGPONG, int STAGES, bool GROUPS>
struct Config {
  static constexpr int MI = MI_, NI = NI_, stages = STAGES;
  static constexpr bool pingpong = PINGPONG, groups = GROUPS;
  static constexpr int tile_m = 64 * MI * (PINGPONG ? 1 : 2), tile_n = NI;
  static constexpr int a_bytes = tile_m * k_block, stage_bytes = a_bytes + tile_n * k_block;
  static constexpr int sums = MI * NI / 2;  // registers per thread
  // Barriers, by number: full of every stage, empty of every stage, and the two turns.
  static constexpr int full = 0, empty = STAGES, turn = 2 * STAGES, barriers = 2 * STAGES + 2;
  // Each warp that reads a stage says when it is done with it; each warp of the other consumer hands over the turn.
  static constexpr int readers = PINGPONG ? 4 : 8;
  static constexpr int shared_bytes = stages * stage_bytes + barriers * 8 + 1024;  // 1024: to align the stages
  static_assert(shared_bytes <= 232448, "a block of sm_90 has 227 KB");
  static_assert(!GROUPS || !PINGPONG, "scales for groups of K: both consumers hide them under each other");
};

using Narrow = Config<1, 128, true, 8, false>;   // tiles 64 x 128
using Square = Config<2, 128, true, 6, false>;   // tiles 128 x 128
using Deep = Config<1, 256, false, 4, false>;    // tiles 128 x 256
using Grouped = Config<1, 128, false, 6, true>;  // tiles 128 x 128, activation scales for each 128 of K

struct Grid {
  int rows, columns, k_blocks;  // tiles, and stages a tile
  int block, blocks;
};

template <class C, class Machine>
QK_HOST_DEVICE void produce(Machine& machine, const Grid& grid) {
  int stage = 0, round = 0;
  for (int tile = grid.block; tile < grid.rows * grid.columns; tile += grid.blocks) {
    const Place at = tile_at(tile, grid.rows, grid.columns);
    for (int block = 0; block < grid.k_blocks; ++block) {
      machine.wait(C::empty + stage, empty_parity(round));
      machine.load(stage, block * k_block, at.row * C::tile_m, at.column * C::tile_n);
      if (++stage == C::stages) stage = 0, ++round;
    }
  }
}

template <class C, class Machine>
QK_HOST_DEVICE void consume(Machine& machine, const Grid& grid, int consumer) {
  constexpr int share = C::pingpong ? 2 : 1;  // every how many tiles of this block are this consumer's
  const int first_row = C::pingpong ? 0 : consumer * 64 * C::MI;
  for (int number = C::pingpong ? consumer : 0;; number += share) {
    const int tile = grid.block + number * grid.blocks;
    if (tile >= grid.rows * grid.columns) break;
    const Place at = tile_at(tile, grid.rows, grid.columns);
    machine.begin(at.row * C::tile_m + first_row);
    int stage = number * grid.k_blocks % C::stages, round = number * grid.k_blocks / C::stages, before = 0;
    if (C::pingpong) machine.wait(C::turn + consumer, turn_parity(consumer, number / 2));
    for (int block = 0; block < grid.k_blocks; ++block) {
      machine.prepare(block);
      machine.wait(C::full + stage, full_parity(round));
      machine.multiply(stage, first_row, block);
      if (C::groups) {
        machine.template settle<0>();
        machine.arrive(C::empty + stage);
        machine.promote(block);
      } else {
        // One stage's products stay in flight; those of the stage before are done.
        machine.template settle<1>();
        if (block > 0) machine.arrive(C::empty + before);
        before = stage;
      }
      if (++stage == C::stages) stage = 0, ++round;
    }
    if (C::pingpong) machine.arrive(C::turn + (consumer ^ 1));
    if (!C::groups) {
      machine.template settle<0>();
      machine.arrive(C::empty + before);
    }
    machine.finish(at.row * C::tile_m + first_row, at.column * C::tile_n);
  }
}

}  // namespace qk
