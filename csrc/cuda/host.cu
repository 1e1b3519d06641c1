// What concerns the host: the interface's number, devices, errors, and page-locking memory that is mapped already.
#include "common.cuh"

API int zt_abi() { return 4; }
// How many GPUs there are, or the negated error.
API int zt_device_count() { int n = 0; cudaError_t e = cudaGetDeviceCount(&n); return e == cudaSuccess ? n : -(int)e; }
API const char* zt_error(int e) { return cudaGetErrorString((cudaError_t)e); }

// Portable: every device of this process copies at full speed. The context it needs is made on `device`, not on GPU 0.
API int zt_pin(uint64_t address, int64_t bytes, int32_t device) {
  zt::OnDevice on(device);
  if (on.error != cudaSuccess) return (int)on.error;
  return (int)cudaHostRegister((void*)address, (size_t)bytes, cudaHostRegisterPortable);
}

API int zt_unpin(uint64_t address) { return (int)cudaHostUnregister((void*)address); }
