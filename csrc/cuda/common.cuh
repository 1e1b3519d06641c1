// What the CUDA sources share: formula.h's operations on a GPU, elements of each dtype, and the host's side of a launch.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <utility>

#include "../formula.h"
#include "../ranges.h"
#define API extern "C" __attribute__((visibility("default")))

namespace zt {

constexpr int NONE = 0, F32 = 1, BF16 = 2, F16 = 3;     // runtime/native/loading.py mirrors these
constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Fp32 { using S = float; };
struct Bf16 { using S = uint16_t; };
struct Fp16 { using S = uint16_t; };
struct NoOut { using S = char; };

inline int64_t size_of(int dtype) { return dtype == F32 ? 4 : dtype == NONE ? 0 : 2; }

struct Gpu {
  using T = float;
  ZT_FN T set(float x) { return x; }
  ZT_FN T mul(T a, T b) { return __fmul_rn(a, b); }
  ZT_FN T sub(T a, T b) { return __fsub_rn(a, b); }
  ZT_FN T div(T a, T b) { return __fdiv_rn(a, b); }
  ZT_FN T sqrt(T a) { return __fsqrt_rn(a); }
  ZT_FN T fma(T a, T b, T c) { return __fmaf_rn(a, b, c); }
};

__device__ __forceinline__ float widen(Fp32, float x) { return x; }
__device__ __forceinline__ float widen(Bf16, uint16_t x) { return __uint_as_float((uint32_t)x << 16); }
__device__ __forceinline__ float widen(Fp16, uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ __forceinline__ float narrow(Fp32, float x) { return x; }
__device__ __forceinline__ uint16_t narrow(Bf16, float x) { return (uint16_t)zt_bf16_round(__float_as_uint(x)); }
__device__ __forceinline__ uint16_t narrow(Fp16, float x) {   // the instruction's NaN is 0x7fff
  return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u ? 0x7e00 : __half_as_ushort(__float2half_rn(x));
}

// Eight neighbours from an address that is a multiple of 16. Data is used once: keep it out of the caches.
template <class D>
__device__ __forceinline__ void load8(D, const uint16_t* x, float (&r)[8]) {
  const uint4 u = __ldcs((const uint4*)x);
  const uint32_t w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) { r[2 * j] = widen(D(), (uint16_t)w[j]); r[2 * j + 1] = widen(D(), (uint16_t)(w[j] >> 16)); }
}
__device__ __forceinline__ void load8(Fp32, const float* x, float (&r)[8]) {
  const float4 a = __ldcs((const float4*)x), b = __ldcs((const float4*)x + 1);
  r[0] = a.x; r[1] = a.y; r[2] = a.z; r[3] = a.w; r[4] = b.x; r[5] = b.y; r[6] = b.z; r[7] = b.w;
}
template <class D>
__device__ __forceinline__ void store8(D, uint16_t* x, const float (&r)[8]) {
  uint32_t w[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) w[j] = narrow(D(), r[2 * j]) | ((uint32_t)narrow(D(), r[2 * j + 1]) << 16);
  __stcs((uint4*)x, make_uint4(w[0], w[1], w[2], w[3]));
}
__device__ __forceinline__ void store8(Fp32, float* x, const float (&r)[8]) {
  __stcs((float4*)x, make_float4(r[0], r[1], r[2], r[3]));
  __stcs((float4*)x + 1, make_float4(r[4], r[5], r[6], r[7]));
}

struct OnDevice {                                       // torch's current device is left as it was
  int before = 0;
  bool changed = false;
  cudaError_t error;
  explicit OnDevice(int device) {
    error = cudaGetDevice(&before);
    changed = error == cudaSuccess && before != device;
    if (changed) error = cudaSetDevice(device);
  }
  ~OnDevice() {                                         // setting a device makes its context: not for nothing
    if (changed) cudaSetDevice(before);
  }
};

inline int grid_for(int device, int64_t items) {        // enough to fill the GPU, no more than there is work
  int sms = 0;
  if (cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || sms < 1) sms = 1;
  const int64_t cap = (int64_t)sms * 8;
  return (int)(items < 1 ? 1 : items < cap ? items : cap);
}

// The error is this launch's. cudaGetLastError() would also return that of an earlier call: a page-lock that CUDA refused
// and the caller did without.
template <class... Parameters, class... Arguments>
int launch(cudaStream_t stream, int grid, int threads, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)grid);
  config.blockDim = dim3((unsigned)threads);
  config.stream = stream;
  return (int)cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// The update of any number of ranges on the current device, as one launch while they fit into its arguments (adam.cu).
struct AdamCall {
  const ZtHyper* hypers;
  int grad_dtype, out_dtype;
  bool l2;
  const float* scale;                                   // null, or one float on the device that multiplies grad_scale
  const uint8_t* changed;                               // null, or one byte on the device: masters follow outputs
  int device;
};
int launch_adam(const AdamCall& call, const ZtRange* ranges, int64_t n_ranges, cudaStream_t stream);

}  // namespace zt
