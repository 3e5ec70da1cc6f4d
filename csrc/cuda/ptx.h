// The instructions that C++ has no word for, as functions of one sentence each. Where nvcc does not compile, which is
// in the tests, the same names come from tests/kernels/cuda/emulated: there a CPU runs the kernels thread by thread.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if !defined(__CUDACC__)
#include <emulated_ptx.h>
#else

namespace qk {

// 16-bit floats as their bits: no header of CUDA's is needed, and nothing converts by accident.
struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T>
__device__ T from_float(float x);  // rounds half to even
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ inline f16 from_float<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two floats as 16-bit ones in a register, `low` in its lower half.
__device__ inline unsigned pair_of(float low, float high, bf16) {
  unsigned v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
__device__ inline unsigned pair_of(float low, float high, f16) {
  unsigned v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

// The larger number; NaN where one is NaN.
__device__ inline float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// 16 bytes that nobody reads again soon: past the first-level cache, which keeps what rows share.
__device__ inline uint4 load16_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// What another block wrote a moment ago: from the second-level cache, where blocks meet.
__device__ inline uint4 load16_of_blocks(const void* p) { return __ldcg(static_cast<const uint4*>(p)); }

template <class V>
__device__ inline V load(const void* p) {
  return *static_cast<const V*>(p);
}
template <class V>
__device__ inline void store(void* p, V v) {
  *static_cast<V*>(p) = v;
}

// To global memory, in one piece whatever the compiler thinks of it.
__device__ inline void store_global(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ inline void store_global(void* p, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
__device__ inline void store_global(void* p, unsigned v) { *static_cast<unsigned*>(p) = v; }

// The block's shared memory.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char qk_shared[];
  return qk_shared;
}

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes from global to shared memory; only the first `bytes` are read, the rest becomes 0.
__device__ inline void copy16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes));
}
__device__ inline void copy4(void* to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}
// Copies started since the last call become a group.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::); }
// Waits until at most the `Newest` last groups of this thread are still under way.
template <int Newest>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Newest));
}

// c += a b on a warp's tensor core: a 16 x 16, b 16 x 8 (PTX ISA: fragments of mma.m16n8k16, 16-bit floats).
__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], f16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same on int8 with twice the depth (fragments of mma.m16n8k32).
__device__ inline void multiply(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], std::int8_t) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// a * b + c on both halves of a register.
__device__ inline unsigned fma2(unsigned a, unsigned b, unsigned c, bf16) {
  unsigned d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ inline unsigned fma2(unsigned a, unsigned b, unsigned c, f16) {
  unsigned d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, int threads, int shared_bytes, void* stream, A... arguments) {
  if (shared_bytes > 48 * 1024)
    if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
      return error;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const auto error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) cudaGetLastError();  // handed over, so not left behind for the next call
  return error;
}

}  // namespace qk

#endif
