// One call of the INT8 linear map, as its launchers for the chips take it.
#pragma once

#include "epilogue.h"

#include <initializer_list>

namespace qk {

struct Int8Linear {
  const void* x;  // int8 [m, k], rows `x_pitch` bytes apart; pitch and address are multiples of 16
  std::int64_t x_pitch;
  const void* codes;  // int8 [n, k], rows `code_pitch` bytes apart, alike; zeros from k to the next multiple of 16
  std::int64_t code_pitch;
  int k;
  Epilogue epilogue;
};

constexpr std::int64_t most_rows = (std::int64_t{1} << 31) - 256;  // a tile beyond the last row still has a number

// Whether the epilogue may read columns in pairs and write 16 bytes at once.
inline bool rows_are_aligned(const Epilogue& e) {
  const int bytes = e.out_type == float32 ? 4 : e.out_type == int8 ? 1 : 2;
  bool aligned = e.n * bytes % 16 == 0 && e.n % 2 == 0;
  for (const void* pointer : {static_cast<const void*>(e.w_scale), static_cast<const void*>(e.bias), e.residual,
                              static_cast<const void*>(e.out), static_cast<const void*>(e.out_scale)})
    aligned = aligned && reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
  return aligned;
}

// Which configuration: 0: tiles of 64 x 128; 1: 128 x 128; 2: on sm_90 128 x 256, shared by both consumers. An
// estimate, not measured yet: tiles as large as keeps all multiprocessors busy, and shared ones only where the main
// loop (K / 4096 clocks a result) is so much longer than the epilogue that the bytes larger tiles save matter more than
// hiding it.
inline int choose_configuration(std::int64_t m, std::int64_t n, int k, int processors) {
  const auto tiles = [&](int height, int width) { return ceil_div(m, height) * ceil_div(n, width); };
  if (tiles(128, 128) < processors) return 0;
  return k >= 3072 && tiles(128, 256) >= processors ? 2 : 1;
}

}  // namespace qk
