// The part of CUDA that csrc/cuda uses, on the host, so that any C++ compiler builds its sources and sanitizers watch them.
// The kernels' text is unchanged; execute.cpp says how threads, streams and events run.
//
// Exact: every *_rn operation rounds once, as on a GPU (build with -ffp-contract=off). fp16 conversions are in cuda_fp16.h.
// Stricter than a GPU: 16-byte loads and stores are aligned (UBSan), all 32 lanes must meet in a shuffle, a block's live
// threads all meet in __syncthreads, and only streams that do not wait for the default stream can be made.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include <cmath>
#include <functional>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
using std::isfinite;

// ---- in a kernel ---------------------------------------------------------------------------------------------------------
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

void __syncthreads();
uint64_t host_cuda_shuffle_xor(uint32_t mask, uint64_t value, int lanes);
inline double __shfl_xor_sync(uint32_t mask, double value, int lanes) {
  uint64_t bits;
  __builtin_memcpy(&bits, &value, 8);
  bits = host_cuda_shuffle_xor(mask, bits, lanes);
  __builtin_memcpy(&value, &bits, 8);
  return value;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __uint_as_float(uint32_t u) { float f; __builtin_memcpy(&f, &u, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t u; __builtin_memcpy(&u, &f, 4); return u; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> void __stcs(T* to, T value) { *to = value; }

// ---- on the host ---------------------------------------------------------------------------------------------------------
enum cudaError_t {
  cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorHostMemoryAlreadyRegistered = 712,
  cudaErrorHostMemoryNotRegistered = 713
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaHostRegisterPortable = 1;
typedef struct HostStream* cudaStream_t;                // null is the default stream
typedef struct HostEvent* cudaEvent_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaGetLastError();                         // of any earlier call, and forgets it
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaHostRegister(void*, size_t, unsigned);
cudaError_t cudaHostUnregister(void*);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned);
cudaError_t cudaEventDestroy(cudaEvent_t);
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t);
cudaError_t cudaMemcpyAsync(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t);

cudaError_t host_cuda_launch(const cudaLaunchConfig_t&, std::function<void()> thread);

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
  std::tuple<std::decay_t<P>...> values(std::forward<A>(args)...);   // arguments are copied when a kernel is launched
  return host_cuda_launch(*config, [kernel, values] { std::apply(kernel, values); });
}

// ---- for tests -------------------------------------------------------------------------------------------------------
extern unsigned host_cuda_seed;                         // of the order in which streams, blocks, warps and lanes run
extern int host_cuda_multiprocessors;
extern int host_cuda_calls_left;                        // calls that make a stream or an event fail from the n-th on; -1: none
extern int host_cuda_live;                              // streams and events that exist
extern int host_cuda_launches;
