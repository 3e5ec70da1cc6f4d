// The functions of ops.def, as C sees them, and what their launchers share. No torch, no Python: pointers, sizes, the
// index of a device and a stream come in, and an error code goes out.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define QK_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

#define QK_CUDA_OP(name, ...) QK_CUDA_EXPORT int qk_cuda_##name(__VA_ARGS__, int device, void* stream);
#include "ops.def"
#undef QK_CUDA_OP

namespace qk {

// Makes `device` current and puts back what was; `error` says whether that worked.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace qk
