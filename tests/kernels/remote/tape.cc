// A tape played tile by tile by several threads, two tapes at once, under ThreadSanitizer: `make tsan`. Its ops work on
// whole numbers; what counts is who waits for whom.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cpu/program.h"

namespace {

using program::Change;
using program::Word;

constexpr std::int64_t kRows = 60, kImage = 5, kBlocks = 4;
constexpr int kMostThreads = 4;

const std::uint64_t* source(const Word* w) { return reinterpret_cast<const std::uint64_t*>(w[0]); }
std::uint64_t* target(const Word* w) { return reinterpret_cast<std::uint64_t*>(w[1]); }

// (in, out, rows): every row alone
void rows(const Word* w) {
  for (Word i = 0; i < w[2]; ++i) target(w)[i] = 3 * source(w)[i] + 1;
}
// (in, out, rows): adds to what the target holds, as a residual is added in its place
void add(const Word* w) {
  for (Word i = 0; i < w[2]; ++i) target(w)[i] += source(w)[i];
}
// (in, out, images): every row meets all of its image
void images(const Word* w) {
  for (Word i = 0; i < w[2] * kImage; ++i) {
    std::uint64_t sum = i % kImage;
    for (Word j = 0; j < kImage; ++j) sum = 5 * sum + source(w)[i / kImage * kImage + j];
    target(w)[i] = sum;
  }
}

struct Tower {
  std::vector<std::uint64_t> stream = std::vector<std::uint64_t>(kRows), mixed[kBlocks],
                             arenas = std::vector<std::uint64_t>(kMostThreads * kRows);
  program::Tape tape;
  std::size_t segments = 0;

  explicit Tower(std::mt19937& random) {
    for (auto& m : mixed) {
      m.resize(kRows);
      append(images, stream, m, kRows / kImage);
      segment(random, kImage, {{kShift, 8 * kImage}, {kShift, 8 * kImage}});
      append(rows, m, arenas, kRows);
      append(add, arenas, stream, kRows);
      segment(random, 1, {{kShift, 8}, {kArena, 0}, {kArena, 0}, {kShift, 8}});
    }
  }
  static constexpr int kShift = program::kShift, kArena = program::kArena;

  void append(program::Call call, std::vector<std::uint64_t>& in, std::vector<std::uint64_t>& out, std::int64_t count) {
    tape.append(call,
                {reinterpret_cast<Word>(in.data()), reinterpret_cast<Word>(out.data()), static_cast<Word>(count)});
  }
  // The last steps as a segment, cut anywhere; how their two pointers move.
  void segment(std::mt19937& random, std::int64_t item, const std::vector<std::pair<int, std::int64_t>>& pointers) {
    std::vector<std::int64_t> bounds{0};
    while (bounds.back() < kRows / item)
      bounds.push_back(std::min(kRows / item, bounds.back() + 1 + static_cast<std::int64_t>(random() % 4)));
    const std::size_t steps = pointers.size() / 2, first = tape.size() - steps;
    std::vector<Change> changes;
    for (std::size_t s = 0; s < steps; ++s) {
      changes.push_back({first + s, 2, program::kCount, 1});
      for (std::size_t p = 0; p < 2; ++p)
        changes.push_back({first + s, p, pointers[2 * s + p].first, pointers[2 * s + p].second});
    }
    segments = tape.add_segment(first, tape.size(), item, bounds, changes) + 1;
  }
  void fill() {
    for (std::int64_t i = 0; i < kRows; ++i) stream[static_cast<std::size_t>(i)] = static_cast<std::uint64_t>(i * i);
  }
};

void check(unsigned seed) {
  std::mt19937 random(seed);
  for (int round = 0; round < 20; ++round) {
    Tower tower(random);
    tower.fill();
    tower.tape.run(0, tower.tape.size());
    const auto expected = tower.stream;
    for (int threads = 1; threads <= kMostThreads; ++threads) {
      tower.fill();
      tower.tape.play(0, tower.segments, threads, 8 * kRows);
      if (tower.stream != expected) {
        std::fprintf(stderr, "%d threads give other numbers than step by step\n", threads);
        std::exit(1);
      }
    }
  }
}

}  // namespace

int main() {
  std::thread other(check, 1u);
  check(2u);
  other.join();
}
