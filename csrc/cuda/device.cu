// What the library says about itself and about a device.
#include "ops.h"

// The lines of ops.def as text, "name(parameters)" each: Python derives the types of its calls from it.
QK_CUDA_EXPORT const char* qk_cuda_ops() {
#define QK_CUDA_OP(name, ...) #name "(" #__VA_ARGS__ ", int device, void* stream)\n"
  return
#include "ops.def"
      ;
#undef QK_CUDA_OP
}

QK_CUDA_EXPORT const char* qk_cuda_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

QK_CUDA_EXPORT const char* qk_cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int qk_cuda_device_facts(int* major, int* minor, int* processors, int* shared_memory, int device, void*) {
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } facts[] = {{major, cudaDevAttrComputeCapabilityMajor},
               {minor, cudaDevAttrComputeCapabilityMinor},
               {processors, cudaDevAttrMultiProcessorCount},
               {shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
  for (const auto& fact : facts)
    if (const cudaError_t error = cudaDeviceGetAttribute(fact.value, fact.attribute, device); error != cudaSuccess) {
      cudaGetLastError();  // handed over, so not left behind for the next call
      return error;
    }
  return cudaSuccess;
}
