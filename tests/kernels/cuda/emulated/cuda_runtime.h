// A GPU's execution model on one CPU thread, enough to run the kernels of csrc/cuda as they are: what <cuda_runtime.h>
// gives them, by g++. Blocks run one after another; the threads of a block are fibers that switch where the kernel
// synchronizes, and between two barriers they run in an order that changes from block to block, so that a missing
// barrier shows. Shared memory starts full of NaN.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return 0; }
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int values[] = {8, 0, 108, 166912};
  *value = values[attribute];
  return 0;
}

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

constexpr int kLanes = 32, kStack = 64 * 1024, kAlign = 128, kGuard = 64;

struct Copy {
  void* to;
  const void* from;
  int size, bytes;
};

struct Fiber {
  jmp_buf state;
  bool started = false, done = false;
  std::vector<char> stack;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies under way, the last one still open
};

// Where the threads of a block or of a warp wait for each other.
struct Meeting {
  int size = 0, arrived = 0, round = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::vector<std::vector<unsigned char>> slots;  // a warp's exchange of up to 128 bytes a lane
  Meeting all;
  std::vector<unsigned char> shared;
  std::function<void()> body;
  jmp_buf scheduler;
  int current = 0;
  bool moved = false;  // some fiber got on since the last look
};
inline Block block;
struct Index {
  unsigned x, y, z;
};
inline Index block_index, thread_index;
inline dim3 grid_size, block_size;

inline unsigned char* shared() {
  const auto address = reinterpret_cast<std::uintptr_t>(block.shared.data());
  return block.shared.data() + (kAlign - address % kAlign) % kAlign;
}

inline void resume_scheduler() {
  const Index mine = thread_index;
  if (!_setjmp(block.fibers[block.current].state)) _longjmp(block.scheduler, 1);
  thread_index = mine;
}

inline void meet(Meeting& place) {
  const int round = place.round;
  if (++place.arrived == place.size) {
    place.arrived = 0;
    ++place.round;
    block.moved = true;
  }
  while (place.round == round) resume_scheduler();
}

inline void start() {
  block.body();
  Fiber& self = block.fibers[block.current];
  for (const auto& group : self.groups)
    if (!group.empty()) fail("a thread ended with copies under way");
  self.done = block.moved = true;
  _longjmp(block.scheduler, 1);
}

inline void run_block(int threads, unsigned shuffle) {
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  if (shuffle % 3 == 1) std::reverse(order.begin(), order.end());
  if (shuffle % 3 == 2)
    for (int i = threads - 1; i > 0; --i) {
      shuffle = shuffle * 1664525u + 1013904223u;
      std::swap(order[i], order[(shuffle >> 8) % (i + 1)]);
    }
  for (Fiber& fiber : block.fibers) {
    fiber.started = fiber.done = false;
    fiber.groups.assign(1, {});
    fiber.stack.resize(kStack);
  }
  for (bool left = true; left;) {
    left = false;
    block.moved = false;
    for (int t : order) {
      Fiber& fiber = block.fibers[t];
      if (fiber.done) continue;
      left = true;
      block.current = t;
      if (_setjmp(block.scheduler)) continue;
      if (fiber.started) _longjmp(fiber.state, 1);
      fiber.started = block.moved = true;
      thread_index = {static_cast<unsigned>(t), 0, 0};
      ucontext_t context;
      getcontext(&context);
      context.uc_stack.ss_sp = fiber.stack.data();
      context.uc_stack.ss_size = fiber.stack.size();
      context.uc_link = nullptr;
      makecontext(&context, start, 0);
      setcontext(&context);
    }
    if (left && !block.moved) fail("threads wait for threads that never come");
  }
}

// Whether of each axis of a grid only the first and the last two blocks run: for tensors too large to be gone through.
inline bool ends_only = false;
inline bool left_out(unsigned at, unsigned count) { return ends_only && at > 0 && at + 2 < count; }

inline void run(dim3 grid, int threads, int shared_bytes, std::function<void()> body) {
  if (threads % kLanes) fail("a block must be whole warps");
  if (shared_bytes > 166912) fail("more shared memory than sm_80 has");
  grid_size = grid;
  block_size = dim3(threads);
  block.fibers.resize(threads);
  block.body = std::move(body);
  unsigned count = 0;
  // Last blocks first: results must not depend on the order of blocks.
  for (unsigned z = grid.z; z-- > 0;)
    for (unsigned y = grid.y; y-- > 0;)
      for (unsigned x = grid.x; x-- > 0;) {
        if (left_out(x, grid.x) || left_out(y, grid.y)) continue;
        block_index = {x, y, z};
        block.shared.assign(shared_bytes + kAlign + kGuard, 0xff);
        block.all = {threads, 0, 0};
        block.warps.assign(threads / kLanes, {kLanes, 0, 0});
        block.slots.assign(threads / kLanes, std::vector<unsigned char>(128 * kLanes));
        run_block(threads, count++);
        const unsigned char* end = shared() + shared_bytes;
        if (std::any_of(end, end + kGuard, [](unsigned char byte) { return byte != 0xff; }))
          fail("a write past the end of shared memory");
      }
}

// Every lane of the warp gives a value and sees all of them, until it calls `release`.
template <class T>
inline const T* exchange(const T& mine) {
  static_assert(sizeof(T) <= 128, "slots are 128 bytes");
  const int warp = thread_index.x / kLanes, lane = thread_index.x % kLanes;
  T* slots = reinterpret_cast<T*>(block.slots[warp].data());
  slots[lane] = mine;
  meet(block.warps[warp]);
  return slots;
}
inline void release() { meet(block.warps[thread_index.x / kLanes]); }

}  // namespace emulated

#define threadIdx (::emulated::thread_index)
#define blockIdx (::emulated::block_index)
#define gridDim (::emulated::grid_size)
#define blockDim (::emulated::block_size)

inline void __syncthreads() { emulated::meet(emulated::block.all); }
inline void __syncwarp(unsigned = ~0u) { emulated::meet(emulated::block.warps[threadIdx.x / 32]); }
inline int __syncthreads_or(int value) {
  static int any;
  __syncthreads();
  any = 0;
  __syncthreads();
  any |= value != 0;
  __syncthreads();
  return any;
}
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  const unsigned old = *p;
  *p += v;
  return old;
}

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  const T* all = emulated::exchange(value);
  const T got = all[(threadIdx.x % 32) ^ mask];
  emulated::release();
  return got;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const unsigned* all = emulated::exchange(value);
  const unsigned got = *std::max_element(all, all + 32);
  emulated::release();
  return got;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t both = static_cast<std::uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<unsigned>(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
