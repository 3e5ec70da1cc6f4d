// The INT8 linear map: which chip's kernel, and which of its configurations.
#include "int8_linear.h"
#include "ops.h"

namespace qk {

cudaError_t int8_linear_sm80(const Int8Linear& call, int configuration, cudaStream_t stream);
cudaError_t int8_linear_sm90(const Int8Linear& call, int configuration, int processors, cudaStream_t stream);

}  // namespace qk

int qk_cuda_int8_linear(const void* x, std::int64_t m, int k, std::int64_t x_pitch, const float* x_scale,
                        int x_scale_kind, const void* codes, std::int64_t code_pitch, const float* w_scale, int n,
                        const float* bias, int activation, const void* residual, int residual_type, void* out,
                        int out_type, const float* out_scale, int out_scale_per_channel, const float* out_zero_point,
                        float* group_scales, int configuration, int device, void* stream) {
  using namespace qk;
  if (m == 0 || n == 0) return cudaSuccess;
  if (m > most_rows) return cudaErrorInvalidValue;
  const DeviceGuard guard(device);
  int major = 0, processors = 0;
  cudaError_t error = guard.error;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  Int8Linear call{x,
                  x_pitch,
                  codes,
                  code_pitch,
                  k,
                  {static_cast<int>(m), n, x_scale, x_scale_kind, w_scale, bias, activation, residual, residual_type,
                   out, out_type, out_scale, out_scale_per_channel, out_zero_point, group_scales, false}};
  call.epilogue.wide = rows_are_aligned(call.epilogue);
  if (configuration < 0) configuration = choose_configuration(m, n, k, processors);
  if (error == cudaSuccess)
    error = major == 9 ? int8_linear_sm90(call, configuration, processors, static_cast<cudaStream_t>(stream))
                       : int8_linear_sm80(call, configuration, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) cudaGetLastError();  // handed over, so not left behind for the next call
  return error;
}
