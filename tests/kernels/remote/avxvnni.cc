// Runs AVX-VNNI's vpdpbusd on processors that only know its twin of AVX512-VNNI, which does the same but is encoded in
// another way and a byte longer. The instruction traps once; from then on a call to the twin stands in its place. For
// one thread, and for code built with -mno-red-zone (a call writes below the stack pointer). 256 bits and registers
// only, as the kernels use it: anything else ends the process as it would have without this.
#include <sys/mman.h>
#include <ucontext.h>

#include <csignal>
#include <cstdint>
#include <cstring>

namespace {

constexpr std::uintptr_t kPage = 4096;
alignas(kPage) std::uint8_t twins[4 * kPage];  // in the program itself, so that a near call reaches it
std::size_t used = 0;

bool unlock(const void* from, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(from) / kPage * kPage;
  const auto end = reinterpret_cast<std::uintptr_t>(from) + bytes;
  return mprotect(reinterpret_cast<void*>(begin), end - begin, PROT_READ | PROT_WRITE | PROT_EXEC) == 0;
}

// VEX.256.66.0F38.W0 50 /r is C4, RXB 00010, 0 vvvv 1 01, 50, 11 reg rm.
bool replace(std::uint8_t* code) {
  const bool known =
      code[0] == 0xc4 && (code[1] & 0x5f) == 0x42 && (code[2] & 0x87) == 0x05 && code[3] == 0x50 && code[4] >= 0xc0;
  if (!known || used + 7 > sizeof twins || !unlock(code, 5) || !unlock(twins, sizeof twins)) return false;
  const std::uint8_t twin[7] = {0x62, static_cast<std::uint8_t>(code[1] | 0x10), code[2], 0x28, 0x50, code[4],
                                0xc3};  // and ret
  std::memcpy(twins + used, twin, sizeof twin);
  const auto distance = static_cast<std::int32_t>(twins + used - (code + 5));
  used += sizeof twin;
  code[0] = 0xe8;
  std::memcpy(code + 1, &distance, 4);
  return true;
}

void trapped(int, siginfo_t*, void* context) {
  const auto at = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
  if (!replace(reinterpret_cast<std::uint8_t*>(at))) std::signal(SIGILL, SIG_DFL);  // it traps again
}

const bool installed = [] {
  struct sigaction action = {};
  action.sa_sigaction = trapped;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, nullptr) == 0;
}();

}  // namespace
