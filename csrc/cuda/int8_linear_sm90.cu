// The INT8 linear map of sm_90: wgmma from shared memory that TMA fills, one producer and two consumer warp groups,
// persistent blocks. The order of everything is in int8_pipeline.h; here are the instructions behind it.
// Bound by the tensor cores for large K, by the epilogue under them for short K, by the weights' bytes for few rows.
#include "int8_linear.h"
#include "int8_pipeline.h"
#include "ops.h"

#include "hopper.h"
#include "wgmma.h"

namespace qk {
namespace {

__device__ __forceinline__ void wgmma(int (&d)[64], std::uint64_t a, std::uint64_t b, int accumulate) {
  wgmma_n128(d, a, b, accumulate);
}
__device__ __forceinline__ void wgmma(int (&d)[128], std::uint64_t a, std::uint64_t b, int accumulate) {
  wgmma_n256(d, a, b, accumulate);
}

struct Shuffle {
  __device__ __forceinline__ std::uint32_t operator()(std::uint32_t word, int mask) const {
    return __shfl_xor_sync(0xFFFFFFFF, word, mask);
  }
};

template <class C>
struct Machine {
  std::uint32_t stages, barriers;  // shared addresses
  const CUtensorMap *a, *b;
  const Epilogue& epilogue;
  int k;
  int row;                                // this thread's first, where groups need it
  int sums[C::MI][C::NI / 2];             // of the last wgmma
  float totals[C::groups ? C::sums : 1];  // over groups of K
  float scales[2];                        // of this thread's rows, for the current 128 of K

  __device__ __forceinline__ void wait(int barrier, int parity) {
    hopper::barrier_wait(barriers + 8 * barrier, parity);
  }

  __device__ __forceinline__ void arrive(int barrier) {
    if (threadIdx.x % 32 == 0) hopper::barrier_arrive(barriers + 8 * barrier);
  }

  __device__ __forceinline__ void load(int stage, int k, int row_a, int row_b) {
    const std::uint32_t to = stages + stage * C::stage_bytes, barrier = barriers + 8 * (C::full + stage);
    hopper::barrier_arrive_expect(barrier, C::stage_bytes);
    hopper::load_box(to, a, barrier, k, row_a);
    hopper::load_box(to + C::a_bytes, b, barrier, k, row_b);
  }

  // Where this thread lies in the warp group's rows from `first` on.
  static __device__ __forceinline__ Lane lane_from(int first) {
    const int thread = thread_number() % 128;
    return {first + thread / 32 * 16 + fragment_row(thread % 32, 0), thread % 4};
  }

  __device__ __forceinline__ void begin(int first_row) {
    if (C::groups) {
      row = lane_from(first_row).row;
#pragma unroll
      for (float& total : totals) total = 0.0f;
    }
  }

  __device__ __forceinline__ void prepare(int block) {
    if constexpr (C::groups) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int here = row + 8 * half;
        const std::int64_t groups = ceil_div(k, 128);
        scales[half] = here < epilogue.m ? epilogue.x_scale[here * groups + block] : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void multiply(int stage, int first_row, int block) {
    const std::uint32_t from = stages + stage * C::stage_bytes;
    const std::uint64_t left = descriptor(from + first_row * k_block), right = descriptor(from + C::a_bytes);
#pragma unroll
    for (int i = 0; i < C::MI * C::NI / 2; ++i) hopper::pin(sums[i / (C::NI / 2)][i % (C::NI / 2)]);
    hopper::wgmma_fence();
#pragma unroll
    for (int step = 0; step < k_block / 32; ++step)
#pragma unroll
      for (int i = 0; i < C::MI; ++i)
        wgmma(sums[i], left + (step * 32 + i * 64 * k_block) / 16, right + step * 32 / 16,
              step > 0 || (block > 0 && !C::groups));
    hopper::wgmma_commit();
  }

  template <int PENDING>
  __device__ __forceinline__ void settle() {
    hopper::wgmma_wait<PENDING>();
#pragma unroll
    for (int i = 0; i < C::MI * C::NI / 2; ++i) hopper::pin(sums[i / (C::NI / 2)][i % (C::NI / 2)]);
  }

  __device__ __forceinline__ void promote(int) {
    if constexpr (C::groups) {
#pragma unroll
      for (int i = 0; i < C::sums; ++i) totals[i] = __fmaf_rn(__int2float_rn(sums[0][i]), scales[i / 2 % 2], totals[i]);
    }
  }

  __device__ __forceinline__ void finish(int first_row, int column) {
    Shuffle quad;
    const auto lane = [first_row] { return lane_from(first_row); };
    if constexpr (C::groups)
      finish_all<C::NI, 64>(epilogue, column, lane, totals, quad);
    else
      finish_all<C::NI, 64>(epilogue, column, lane, reinterpret_cast<int (&)[C::sums]>(sums), quad);
  }
};

template <class C>
__global__ void __launch_bounds__(384, 1)
    int8_linear_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, int rows,
                       int columns, int k, const __grid_constant__ Epilogue epilogue) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ unsigned char shared[];
  const std::uint32_t stages = (hopper::shared_address(shared) + 1023) / 1024 * 1024;
  const std::uint32_t barriers = stages + C::stages * C::stage_bytes;
  // A warp group's number, in a register that the compiler knows to be the same in all lanes.
  const int group = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    hopper::prefetch_map(&a);
    hopper::prefetch_map(&b);
    for (int i = 0; i < C::barriers; ++i)
      hopper::barrier_init(barriers + 8 * i, i < C::empty ? 1 : i < C::turn ? C::readers : 4);
    hopper::barrier_init_fence();
  }
  __syncthreads();
  Machine<C> machine{stages, barriers, &a, &b, epilogue, k};
  const Grid grid{rows, columns, static_cast<int>(ceil_div(k, k_block)), static_cast<int>(blockIdx.x),
                  static_cast<int>(gridDim.x)};
  if (group == 0) {
    hopper::give_registers<24>();
    if (threadIdx.x == 0) produce<C>(machine, grid);
  } else {
    hopper::take_registers<240>();
    consume<C>(machine, grid, group - 1);
  }
#endif
}

// cuTensorMapEncodeTiled without linking libcuda: the library loads where there is no driver.
using Encode = decltype(&cuTensorMapEncodeTiled);

cudaError_t encode_function(Encode* encode) {
  static void* found = nullptr;
  if (found == nullptr) {
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) return error;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorInsufficientDriver;
  }
  *encode = reinterpret_cast<Encode>(found);
  return cudaSuccess;
}

// Boxes of `height` rows and 128 bytes of an int8 matrix, swizzled by 128 bytes, zeros outside.
cudaError_t tensor_map(CUtensorMap* map, const void* address, std::int64_t rows, int k, std::int64_t pitch,
                       int height) {
  Encode encode;
  if (const cudaError_t error = encode_function(&encode); error != cudaSuccess) return error;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(pitch)};
  const cuuint32_t box[] = {k_block, static_cast<cuuint32_t>(height)}, steps[] = {1, 1};
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(address), sizes, strides, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class C>
cudaError_t launch(const Int8Linear& call, int processors, cudaStream_t stream) {
  CUtensorMap a, b;
  const Epilogue& e = call.epilogue;
  cudaError_t error = tensor_map(&a, call.x, e.m, call.k, call.x_pitch, C::tile_m);
  if (error == cudaSuccess) error = tensor_map(&b, call.codes, e.n, call.k, call.code_pitch, C::tile_n);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(int8_linear_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::shared_bytes);
  if (error != cudaSuccess) return error;
  const std::int64_t rows = ceil_div(e.m, C::tile_m), columns = ceil_div(e.n, C::tile_n);
  const int blocks = static_cast<int>(rows * columns < processors ? rows * columns : processors);
  int8_linear_kernel<C>
      <<<blocks, 384, C::shared_bytes, stream>>>(a, b, static_cast<int>(rows), static_cast<int>(columns), call.k, e);
  return cudaGetLastError();
}

}  // namespace

cudaError_t int8_linear_sm90(const Int8Linear& call, int configuration, int processors, cudaStream_t stream) {
  if (call.epilogue.x_scale_kind == 2) return launch<Grouped>(call, processors, stream);
  switch (configuration) {
    case 0:
      return launch<Narrow>(call, processors, stream);
    case 1:
      return launch<Square>(call, processors, stream);
    default:
      return launch<Deep>(call, processors, stream);
  }
}

}  // namespace qk
