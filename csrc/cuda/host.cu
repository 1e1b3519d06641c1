// What concerns the host: the interface's number, devices, errors, and page-locking memory that is mapped already.
#include "common.cuh"

#ifndef __CUDA_ARCH_LIST__  // only nvcc defines it
#define __CUDA_ARCH_LIST__ 0
#endif

API int zt_abi() { return 5; }
// How many GPUs there are, or the negated error.
API int zt_device_count() { int n = 0; cudaError_t e = cudaGetDeviceCount(&n); return e == cudaSuccess ? n : -(int)e; }
API const char* zt_error(int e) { return cudaGetErrorString((cudaError_t)e); }

// The compute capability of a GPU, 90 for 9.0, or the negated error. Makes no context.
API int zt_capability(int32_t device) {
  int major = 0, minor = 0;
  cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return e == cudaSuccess ? 10 * major + minor : -(int)e;
}

// The oldest compute capability that this library has code for; a launch on an older GPU fails.
API int zt_oldest_capability() {
  int oldest = 0;
  for (const int built : {__CUDA_ARCH_LIST__}) oldest = oldest && oldest < built ? oldest : built;
  return oldest / 10;
}

// Portable: every device of this process copies at full speed. The context it needs is made on `device`, not on GPU 0.
API int zt_pin(uint64_t address, int64_t bytes, int32_t device) {
  zt::OnDevice on(device);
  if (on.error != cudaSuccess) return (int)on.error;
  return (int)cudaHostRegister((void*)address, (size_t)bytes, cudaHostRegisterPortable);
}

API int zt_unpin(uint64_t address) { return (int)cudaHostUnregister((void*)address); }
