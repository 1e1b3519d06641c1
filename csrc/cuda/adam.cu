// libzt_cuda.so: fused unscale + clip + AdamW + bf16 cast over a flat range in GPU memory, and the sum of squares for the
// clip norm. Raw pointers, sizes and streams; the formulas and the order of sums are formula.h's, so the bits are the CPU's.
// Build with --fmad=false. Every call only enqueues work on `stream` of `device` and returns a cudaError_t.
#include <cuda_runtime.h>

#include <cstdint>

#include "../formula.h"
#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int F32 = 1, BF16 = 2;                        // runtime/native.py mirrors these
constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Gpu {
  using T = float;
  ZT_FN T set(float x) { return x; }
  ZT_FN T mul(T a, T b) { return __fmul_rn(a, b); }
  ZT_FN T sub(T a, T b) { return __fsub_rn(a, b); }
  ZT_FN T div(T a, T b) { return __fdiv_rn(a, b); }
  ZT_FN T sqrt(T a) { return __fsqrt_rn(a); }
  ZT_FN T fma(T a, T b, T c) { return __fmaf_rn(a, b, c); }
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }

// Eight neighbours at a time: 16-byte accesses where the pointers allow them. Data is used once: keep it out of the caches.
__device__ __forceinline__ void load8(const float* x, float (&r)[8]) {
  const float4 a = __ldcs((const float4*)x), b = __ldcs((const float4*)x + 1);
  r[0] = a.x; r[1] = a.y; r[2] = a.z; r[3] = a.w; r[4] = b.x; r[5] = b.y; r[6] = b.z; r[7] = b.w;
}
__device__ __forceinline__ void load8(const uint16_t* x, float (&r)[8]) {
  const uint4 u = __ldcs((const uint4*)x);
  const uint32_t w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) { r[2 * j] = __uint_as_float(w[j] << 16); r[2 * j + 1] = __uint_as_float(w[j] & 0xffff0000u); }
}
__device__ __forceinline__ void store8(float* x, const float (&r)[8]) {
  __stcs((float4*)x, make_float4(r[0], r[1], r[2], r[3]));
  __stcs((float4*)x + 1, make_float4(r[4], r[5], r[6], r[7]));
}
__device__ __forceinline__ void store8(uint16_t* x, const float (&r)[8]) {
  uint32_t w[4];
#pragma unroll
  for (int j = 0; j < 4; ++j)
    w[j] = zt_bf16_round(__float_as_uint(r[2 * j])) | (zt_bf16_round(__float_as_uint(r[2 * j + 1])) << 16);
  __stcs((uint4*)x, make_uint4(w[0], w[1], w[2], w[3]));
}

// p, m, v (n,) fp32; g (n,) of G; out (n,) bf16 when OUT. The first n8 * 8 elements go by eights, the rest one by one.
template <class G, bool OUT, bool L2>
__global__ void __launch_bounds__(THREADS)
adamw_kernel(float* __restrict__ p, float* __restrict__ m, float* __restrict__ v, const G* __restrict__ g,
             uint16_t* __restrict__ out, int64_t n, int64_t n8, ZtHyper h, const float* __restrict__ scale) {
  if (scale) h.grad_scale = __fmul_rn(h.grad_scale, *scale);   // the clip factor never has to visit the host
  const ZtConsts<Gpu> k = ZtConsts<Gpu>::make(h);
  const int64_t first = blockIdx.x * (int64_t)blockDim.x + threadIdx.x, stride = gridDim.x * (int64_t)blockDim.x;
  for (int64_t i = first; i < n8; i += stride) {
    float p8[8], m8[8], v8[8], g8[8];
    load8(p + 8 * i, p8); load8(m + 8 * i, m8); load8(v + 8 * i, v8); load8(g + 8 * i, g8);
#pragma unroll
    for (int j = 0; j < 8; ++j) zt_adam<Gpu, L2>(p8[j], m8[j], v8[j], g8[j], k);
    store8(p + 8 * i, p8); store8(m + 8 * i, m8); store8(v + 8 * i, v8);
    if (OUT) store8(out + 8 * i, p8);
  }
  for (int64_t i = 8 * n8 + first; i < n; i += stride) {
    float pi = p[i], mi = m[i], vi = v[i];
    zt_adam<Gpu, L2>(pi, mi, vi, widen(g[i]), k);
    p[i] = pi; m[i] = mi; v[i] = vi;
    if (OUT) out[i] = (uint16_t)zt_bf16_round(__float_as_uint(pi));
  }
}

__device__ __forceinline__ double term(double x) { return x; }
__device__ __forceinline__ double term(float x) { return __dmul_rn((double)x, (double)x); }
__device__ __forceinline__ double term(uint16_t x) { return term(widen(x)); }

// One warp a block of ZT_BLOCK elements, one lane a lane of formula.h's tree.
template <class X>
__global__ void __launch_bounds__(THREADS) block_sums(const X* __restrict__ x, int64_t n, int64_t blocks, double* __restrict__ sums) {
  const int lane = threadIdx.x & 31;
  for (int64_t b = blockIdx.x * (int64_t)WARPS + (threadIdx.x >> 5); b < blocks; b += gridDim.x * (int64_t)WARPS) {
    const int64_t begin = b * ZT_BLOCK, end = begin + ZT_BLOCK < n ? begin + ZT_BLOCK : n;
    double s = 0;
#pragma unroll 8
    for (int64_t i = begin + lane; i < end; i += ZT_LANES) s = __dadd_rn(s, term(x[i]));
    for (int w = ZT_LANES / 2; w; w /= 2) s = __dadd_rn(s, __shfl_xor_sync(~0u, s, w));
    if (lane == 0) sums[b] = s;
  }
}

struct OnDevice {                                       // torch's current device is left as it was
  int before = 0;
  cudaError_t error;
  explicit OnDevice(int device) {
    error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  }
  ~OnDevice() { cudaSetDevice(before); }
};

int grid_for(int device, int64_t items) {               // enough to fill the GPU, no more than there is work
  int sms = 0;
  if (cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || sms < 1) sms = 1;
  const int64_t cap = (int64_t)sms * 8;
  return (int)(items < 1 ? 1 : items < cap ? items : cap);
}

struct AdamCall {
  float *p, *m, *v;
  uint64_t g;
  uint16_t* out;
  int64_t n, n8;
  ZtHyper h;
  const float* scale;
  int grid;
  cudaStream_t stream;

  template <class G, bool OUT, bool L2>
  void go() const { adamw_kernel<G, OUT, L2><<<grid, THREADS, 0, stream>>>(p, m, v, (const G*)g, out, n, n8, h, scale); }
  template <class G>
  void with_grad(bool l2) const {
    if (out) { if (l2) go<G, true, true>(); else go<G, true, false>(); }
    else { if (l2) go<G, false, true>(); else go<G, false, false>(); }
  }
};

}  // namespace

API int zt_abi() { return 1; }
API int zt_device_count() { int n = 0; return cudaGetDeviceCount(&n) == cudaSuccess ? n : -1; }
API const char* zt_error(int e) { return cudaGetErrorString((cudaError_t)e); }

// scale: 0, or the address of one fp32 on the device that multiplies h->grad_scale.
API int zt_adamw(uint64_t p, uint64_t m, uint64_t v, uint64_t g, uint64_t out, int64_t n, int32_t grad_dtype, int32_t l2,
                 const ZtHyper* h, uint64_t scale, int32_t device, uint64_t stream) {
  if (n <= 0) return 0;
  OnDevice on(device);
  if (on.error != cudaSuccess) return (int)on.error;
  const int64_t n8 = ((p | m | v | g | out) & 15) ? 0 : n / 8;
  const AdamCall call = {(float*)p, (float*)m, (float*)v, g, (uint16_t*)out, n, n8, *h, (const float*)scale,
                         grid_for(device, ((n8 ? n8 : n) + THREADS - 1) / THREADS), (cudaStream_t)stream};
  if (grad_dtype == BF16) call.with_grad<uint16_t>(l2 != 0); else call.with_grad<float>(l2 != 0);
  return (int)cudaGetLastError();
}

// work: fp64 on the device, at least 2 * ceil(n / ZT_BLOCK) of them; the sum is left in work[0].
API int zt_sum_of_squares(uint64_t x, int64_t n, int32_t dtype, uint64_t work, int32_t device, uint64_t stream) {
  OnDevice on(device);
  if (on.error != cudaSuccess) return (int)on.error;
  const cudaStream_t st = (cudaStream_t)stream;
  int64_t blocks = (n + ZT_BLOCK - 1) / ZT_BLOCK;
  if (blocks < 1) return (int)cudaMemsetAsync((void*)work, 0, sizeof(double), st);
  // Two halves take turns (a level may not overwrite what a neighbour has yet to read); the last level writes work[0].
  double *from = (double*)work + blocks, *to = (double*)work;
  const bool one = blocks == 1;
  double* first = one ? to : from;
  const int grid = grid_for(device, (blocks + WARPS - 1) / WARPS);
  if (dtype == BF16) block_sums<<<grid, THREADS, 0, st>>>((const uint16_t*)x, n, blocks, first);
  else block_sums<<<grid, THREADS, 0, st>>>((const float*)x, n, blocks, first);
  while (blocks > 1) {
    const int64_t next = (blocks + ZT_BLOCK - 1) / ZT_BLOCK;
    block_sums<<<grid_for(device, (next + WARPS - 1) / WARPS), THREADS, 0, st>>>((const double*)from, blocks, next, to);
    double* t = from; from = to; to = t;
    blocks = next;
  }
  if (!one && from != (double*)work) {
    const cudaError_t e = cudaMemcpyAsync((void*)work, from, sizeof(double), cudaMemcpyDeviceToDevice, st);
    if (e != cudaSuccess) return (int)e;
  }
  return (int)cudaGetLastError();
}
