// Weights in layout `nibble64` (qkernels/layouts.py), as both kinds of activations see them.
#pragma once

#include "blocking.h"

namespace {

constexpr std::int64_t kStep = 8;         // inputs in one step of a packed panel
constexpr std::int64_t kStepBytes = 256;  // 64 columns x 4 bytes

struct Weights4 {
  const std::uint8_t* codes;
  const f16* scales;
  const f16* zeros;  // nullptr: 8
  std::int64_t k, steps, group, groups, panels;

  const std::uint8_t* panel(std::int64_t p) const { return codes + p * steps * kStepBytes; }
  std::int64_t group_row(std::int64_t p, std::int64_t g) const { return (p * groups + g) * kPanel; }
};

}  // namespace
