// A tape: op calls with their arguments as 64-bit words, made once and replayed in one call (qkernels/recording), step
// by step or, in segments, tile by tile (qkernels/recording/tiling.py).
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "parallel.h"

namespace program {

using Word = std::uint64_t;
using Call = void (*)(const Word*);

// What an argument is: 'r' memory that is read, 'w' memory that is written, 'i' an integer, 'f' a float.
template <class T>
struct Kind {
  static constexpr char value = 'i';
};
template <>
struct Kind<float> {
  static constexpr char value = 'f';
};
template <class T>
struct Kind<T*> {
  static constexpr char value = 'w';
};
template <class T>
struct Kind<const T*> {
  static constexpr char value = 'r';
};

template <class T>
static inline T unpack(Word word) {
  if constexpr (Kind<T>::value == 'f') {
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  } else if constexpr (Kind<T>::value == 'i') {
    return static_cast<T>(word);
  } else {
    return reinterpret_cast<T>(word);
  }
}

static inline Word pack(float value) {
  Word word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <auto function>
struct Caller;
template <class... Args, void (*function)(Args...)>
struct Caller<function> {
  static constexpr char kinds[] = {Kind<Args>::value..., '\0'};
  static void call(const Word* words) { spread(words, std::index_sequence_for<Args...>{}); }

 private:
  template <std::size_t... i>
  static void spread(const Word* words, std::index_sequence<i...>) {
    function(unpack<Args>(words[i])...);
  }
};

// What a tile makes of an argument: a pointer to its first item, the number of its items, or a pointer into the arena
// of the thread that works on it.
enum ChangeKind : int { kShift = 0, kCount = 1, kArena = 2 };
struct Change {
  std::size_t step, argument;
  int kind;
  std::int64_t stride;
};

class Tape {
 public:
  // Returns the number of the step.
  std::size_t append(Call call, const std::vector<Word>& arguments) {
    steps_.push_back({call, words_.size(), arguments.size()});
    words_.insert(words_.end(), arguments.begin(), arguments.end());
    return steps_.size() - 1;
  }
  void set(std::size_t step, std::size_t argument, Word word) { words_[steps_.at(step).first + argument] = word; }
  void run(std::size_t begin, std::size_t end) const {
    for (std::size_t i = begin; i < end && i < steps_.size(); ++i) steps_[i].call(words_.data() + steps_[i].first);
  }
  std::size_t size() const { return steps_.size(); }

  // Steps begin..end as a segment whose tile i has the items bounds[i]..bounds[i + 1] of `rows` rows each; `changes` in
  // the order of the steps. Returns its number.
  std::size_t add_segment(std::size_t begin, std::size_t end, std::int64_t rows, std::vector<std::int64_t> bounds,
                          std::vector<Change> changes) {
    segments_.push_back({begin, end, rows, std::move(bounds), std::move(changes)});
    return segments_.size() - 1;
  }

  // Segments begin..end. Threads take the tiles of one after those of the other, without a barrier: a tile waits for
  // the tiles of the segment before that hold its rows. Thread t uses the arena at t * arena_bytes.
  void play(std::size_t begin, std::size_t end, int threads, std::int64_t arena_bytes) const {
    std::size_t count = 0, longest = 0;
    for (std::size_t s = begin; s < end; ++s) count += segments_.at(s).tiles();
    for (const Step& step : steps_) longest = step.size > longest ? step.size : longest;
    const auto done = std::make_unique<std::atomic<bool>[]>(count);
    std::atomic<std::size_t> next{0};
    QkFault* const fault = qk_fault();
    parallel_for(threads, threads, 1, [&](std::int64_t thread, std::int64_t) {
      std::vector<Word> words(longest);
      std::size_t segment = begin, first = 0;  // of the task, and the number of the segment's first one
      for (std::size_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        for (; task - first >= segments_[segment].tiles(); ++segment) first += segments_[segment].tiles();
        const Segment& here = segments_[segment];
        const std::size_t tile = task - first;
        if (segment > begin) {
          const Segment& before = segments_[segment - 1];
          for (std::size_t i = 0; i < before.tiles(); ++i)
            if (before.row(i) < here.row(tile + 1) && here.row(tile) < before.row(i + 1))
              await(done[first - before.tiles() + i]);
        }
        keeping(fault, [&] { play_tile(here, tile, thread * arena_bytes, words.data()); });  // others wait for it
        done[task].store(true, std::memory_order_release);
      }
    });
    qk_throw(fault);
  }

 private:
  struct Step {
    Call call;
    std::size_t first, size;  // of its words
  };
  struct Segment {
    std::size_t begin, end;
    std::int64_t rows;
    std::vector<std::int64_t> bounds;
    std::vector<Change> changes;
    std::size_t tiles() const { return bounds.size() - 1; }
    std::int64_t row(std::size_t bound) const { return bounds[bound] * rows; }
  };

  static void await(const std::atomic<bool>& done) {
    for (int spins = 0; !done.load(std::memory_order_acquire); ++spins)
      if (spins > 1000) std::this_thread::yield();
  }

  void play_tile(const Segment& segment, std::size_t tile, std::int64_t arena, Word* words) const {
    const std::int64_t first = segment.bounds[tile], count = segment.bounds[tile + 1] - first;
    auto change = segment.changes.begin();
    for (std::size_t i = segment.begin; i < segment.end; ++i) {
      const Step& step = steps_[i];
      std::memcpy(words, words_.data() + step.first, step.size * sizeof(Word));
      for (; change != segment.changes.end() && change->step == i; ++change) {
        Word& word = words[change->argument];
        if (change->kind == kCount)
          word = static_cast<Word>(count * change->stride);
        else
          word += static_cast<Word>(change->kind == kShift ? first * change->stride : arena);
      }
      step.call(words);
    }
  }

  std::vector<Step> steps_;
  std::vector<Word> words_;
  std::vector<Segment> segments_;
};

}  // namespace program
