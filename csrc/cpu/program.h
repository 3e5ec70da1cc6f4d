// A tape: op calls with their arguments as 64-bit words, made once and replayed in one call (qkernels/program.py).
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

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

class Tape {
 public:
  // Returns the number of the step.
  std::size_t append(Call call, const std::vector<Word>& arguments) {
    steps_.push_back({call, words_.size()});
    words_.insert(words_.end(), arguments.begin(), arguments.end());
    return steps_.size() - 1;
  }
  void set(std::size_t step, std::size_t argument, Word word) { words_[steps_.at(step).first + argument] = word; }
  void run(std::size_t begin, std::size_t end) const {
    for (std::size_t i = begin; i < end && i < steps_.size(); ++i) steps_[i].call(words_.data() + steps_[i].first);
  }
  std::size_t size() const { return steps_.size(); }

 private:
  struct Step {
    Call call;
    std::size_t first;  // of its words
  };
  std::vector<Step> steps_;
  std::vector<Word> words_;
};

}  // namespace program
