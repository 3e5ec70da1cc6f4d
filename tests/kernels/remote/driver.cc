// Runs ops for another process: calls come on standard input, what they wrote goes to standard output (remote.py is the
// other end). So the tests in Python can run kernels built for another processor, under an emulator or a sanitizer.
//
// A call is a name, then the arguments in order, each 8 bytes; a pointer is the size of its memory (-1: null), its
// address modulo 64, and the contents. The answer is the memory behind each pointer that is written, in order.
//
// -DQK_TIER=TIER: the tier; -DQK_ONLY_PRODUCTS: its ops of int8 products alone; -DQK_CALLERS=N: every call is made by N
// threads at once, each with outputs of its own, which must agree.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "cpu/ops.h"
#include "cpu/program.h"

#ifndef QK_CALLERS
#define QK_CALLERS 1
#endif

namespace {

using program::Word;

struct Op {
  const char* kinds;
  program::Call call;
};

#define QK_PRODUCT(name, ...) {#name, {program::Caller<QK_IMPL(name)>::kinds, program::Caller<QK_IMPL(name)>::call}},
#if defined(QK_ONLY_PRODUCTS)
#define QK_OP(name, ...)
#else
#define QK_OP QK_PRODUCT
#endif
const std::map<std::string, Op> ops = {
#include "cpu/ops.def"
};

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "driver: %s\n", why);
  std::exit(1);
}

void get(void* to, std::size_t bytes) {
  if (bytes > 0 && std::fread(to, bytes, 1, stdin) != 1) fail("the call was cut short");
}

// Memory of exactly `size` bytes that starts at the same address modulo 64 as the caller's.
class Buffer {
 public:
  Buffer(std::size_t size, std::size_t offset) : size_(size), base_(nullptr) {
    if (posix_memalign(&base_, 64, offset + size) != 0) fail("out of memory");
    data_ = static_cast<char*>(base_) + offset;
  }
  Buffer(const Buffer& other)
      : Buffer(other.size_, static_cast<std::size_t>(other.data_ - static_cast<char*>(other.base_))) {
    std::memcpy(data_, other.data_, size_);
  }
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(base_); }
  char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_;
  void* base_;
  char* data_;
};

void serve(const Op& op) {
  std::vector<Word> words;
  std::vector<Buffer> read, written;
  std::vector<std::size_t> places;  // of the words that point to `written`
  for (const char* kind = op.kinds; *kind; ++kind) {
    Word word = 0;
    get(&word, 8);
    const auto size = static_cast<std::int64_t>(word);
    if ((*kind == 'r' || *kind == 'w') && size < 0) {
      word = 0;
    } else if (*kind == 'r' || *kind == 'w') {
      Word offset = 0;
      get(&offset, 8);
      auto& buffers = *kind == 'r' ? read : written;
      if (buffers.capacity() == 0) buffers.reserve(32);
      const Buffer& buffer = buffers.emplace_back(static_cast<std::size_t>(size), offset);
      get(buffer.data(), buffer.size());
      word = reinterpret_cast<Word>(buffer.data());
      if (*kind == 'w') places.push_back(words.size());
    }
    words.push_back(word);
  }
  std::vector<std::vector<Buffer>> outputs(QK_CALLERS, written);
  const auto call = [&](std::size_t caller) {
    std::vector<Word> own = words;
    for (std::size_t i = 0; i < places.size(); ++i) own[places[i]] = reinterpret_cast<Word>(outputs[caller][i].data());
    op.call(own.data());
  };
  std::vector<std::thread> others;
  for (std::size_t caller = 1; caller < QK_CALLERS; ++caller) others.emplace_back(call, caller);
  call(0);
  for (std::thread& other : others) other.join();
  for (const auto& output : outputs)
    for (std::size_t i = 0; i < output.size(); ++i)
      if (std::memcmp(output[i].data(), outputs[0][i].data(), output[i].size()) != 0) fail("two callers differ");
  for (const Buffer& buffer : outputs[0])
    if (buffer.size() > 0) std::fwrite(buffer.data(), buffer.size(), 1, stdout);
  std::fflush(stdout);
}

}  // namespace

int main() {
  // First of all: whether this processor, or the emulator, is said to have the tier.
  std::putchar(qk_can_run(QK_CONCAT(qk_tier_, QK_TIER)) ? 'y' : 'n');
  std::fflush(stdout);
  Word length = 0;
  while (std::fread(&length, 8, 1, stdin) == 1) {
    std::string name(length, ' ');
    get(&name[0], length);
    const auto op = ops.find(name);
    if (op == ops.end()) fail("no such op");
    serve(op->second);
  }
}
