// The INT8 linear map of sm_80 and, through its PTX, of chips after sm_90: mma.m16n8k32 from shared memory that
// cp.async fills four stages deep. Four warps per block, one below the other, each with all 128 columns of the tile, so
// that the epilogue is that of sm_90. Two blocks share a multiprocessor: one's epilogue runs under the other's main
// loop.
#include "int8_linear.h"
#include "ops.h"

namespace qk {
namespace {

constexpr int depth = 64;  // bytes of K in a stage
constexpr int stages = 4, columns_of_tile = 128, threads = 128;

struct Shuffle {
  __device__ __forceinline__ std::uint32_t operator()(std::uint32_t word, int mask) const {
    return __shfl_xor_sync(0xFFFFFFFF, word, mask);
  }
};

__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from, bool inside) {
  // With a size of 0 nothing is read and zeros are written.
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], std::uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void mma(int* d, const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Copies a stage's `ROWS` rows, from row `first` and byte `k` of K on, of an operand with `rows` rows of `width` bytes.
template <int ROWS>
__device__ __forceinline__ void copy_rows(std::uint32_t to, const void* from, int first, int rows, std::int64_t pitch,
                                          int k, int width) {
#pragma unroll
  for (int i = 0; i < ROWS * 4 / threads; ++i) {
    const int number = i * threads + threadIdx.x, row = number / 4, chunk = number % 4;
    const bool inside = first + row < rows && k + 16 * chunk < width;
    const char* source = static_cast<const char*>(from) + (inside ? (first + row) * pitch + k + 16 * chunk : 0);
    copy_async(to + swizzle64(row, chunk), source, inside);
  }
}

// MI times 16 rows per warp. GROUPS: activation scales for each 128 of K.
template <int MI, bool GROUPS>
__global__ void __launch_bounds__(threads, 2)
    int8_linear_kernel(const void* x, std::int64_t x_pitch, const void* codes, std::int64_t code_pitch, int rows,
                       int columns, int k, const __grid_constant__ Epilogue epilogue) {
  constexpr int tile_m = 64 * MI, a_bytes = tile_m * depth, stage_bytes = a_bytes + columns_of_tile * depth;
  extern __shared__ __align__(128) unsigned char shared[];
  const std::uint32_t base = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  const Place at = tile_at(static_cast<int>(blockIdx.x), rows, columns);
  const int width = (k + 15) / 16 * 16, blocks = static_cast<int>(ceil_div(k, depth));
  const int first_row = at.row * tile_m, first_column = at.column * columns_of_tile, lane = threadIdx.x % 32,
            warp = threadIdx.x / 32;

  const auto fill = [&](int block) {
    if (block < blocks) {
      const std::uint32_t to = base + block % stages * stage_bytes;
      copy_rows<tile_m>(to, x, first_row, epilogue.m, x_pitch, block * depth, width);
      copy_rows<columns_of_tile>(to + a_bytes, codes, first_column, epilogue.n, code_pitch, block * depth, width);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  int sums[MI * 64] = {};
  float totals[GROUPS ? MI * 64 : 1] = {};
  for (int block = 0; block < stages - 1; ++block) fill(block);
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    asm volatile("cp.async.wait_group %0;" ::"n"(stages - 2) : "memory");
    __syncthreads();  // this block's stage has arrived for all, and all are done with the stage that is filled next
    fill(block + stages - 1);
    const std::uint32_t from = base + block % stages * stage_bytes;
#pragma unroll
    for (int step = 0; step < depth / 32; ++step) {
      std::uint32_t a[MI][4];
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        const Chunk mine = operand_a(lane);
        load_matrices(a[i], from + swizzle64((warp * MI + i) * 16 + mine.row, step * 2 + mine.chunk));
      }
#pragma unroll
      for (int pair = 0; pair < 8; ++pair) {
        std::uint32_t b[4];
        const Chunk mine = operand_b(lane);
        load_matrices(b, from + a_bytes + swizzle64(pair * 16 + mine.row, step * 2 + mine.chunk));
#pragma unroll
        for (int i = 0; i < MI; ++i) {
          mma(sums + i * 64 + pair * 8, a[i], b[0], b[1]);
          mma(sums + i * 64 + pair * 8 + 4, a[i], b[2], b[3]);
        }
      }
    }
    if (GROUPS && (block % 2 == 1 || block == blocks - 1)) {
      const std::int64_t groups = ceil_div(k, 128);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int here = first_row + warp * 16 * MI + fragment_row(lane, 0) + 8 * half;
        const float scale = here < epilogue.m ? epilogue.x_scale[here * groups + block / 2] : 0.0f;
#pragma unroll
        for (int i = 0; i < MI * 64; ++i)
          if (i / 2 % 2 == half) {
            totals[GROUPS ? i : 0] = __fmaf_rn(__int2float_rn(sums[i]), scale, totals[GROUPS ? i : 0]);
            sums[i] = 0;
          }
      }
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  Shuffle quad;
  const auto place = [first_row] {
    const int thread = thread_number();
    return Lane{first_row + thread / 32 * 16 * MI + fragment_row(thread % 32, 0), thread % 4};
  };
  if constexpr (GROUPS)
    finish_all<columns_of_tile, 16>(epilogue, first_column, place, totals, quad);
  else
    finish_all<columns_of_tile, 16>(epilogue, first_column, place, sums, quad);
}

template <int MI, bool GROUPS>
cudaError_t launch(const Int8Linear& call, cudaStream_t stream) {
  constexpr int shared = stages * (64 * MI + columns_of_tile) * depth;
  static_assert(shared <= 101376, "a block of sm_86 has 99 KB");
  const Epilogue& e = call.epilogue;
  const std::int64_t rows = ceil_div(e.m, 64 * MI), columns = ceil_div(e.n, columns_of_tile);
  if (const cudaError_t error =
          cudaFuncSetAttribute(int8_linear_kernel<MI, GROUPS>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
      error != cudaSuccess)
    return error;
  int8_linear_kernel<MI, GROUPS><<<static_cast<unsigned>(rows * columns), threads, shared, stream>>>(
      call.x, call.x_pitch, call.codes, call.code_pitch, static_cast<int>(rows), static_cast<int>(columns), call.k, e);
  return cudaGetLastError();
}

}  // namespace

cudaError_t int8_linear_sm80(const Int8Linear& call, int configuration, cudaStream_t stream) {
  if (call.epilogue.x_scale_kind == 2) return launch<1, true>(call, stream);
  return configuration == 0 ? launch<1, false>(call, stream) : launch<2, false>(call, stream);
}

}  // namespace qk
