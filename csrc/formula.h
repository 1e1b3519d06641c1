// The one formula of every kernel. C++ (each ISA) and CUDA compile this text, over a set of operations F:
//   F::T                              a vector or a scalar of floats
//   F::mul sub div sqrt fma(a,b,c)    each rounded once, to nearest; fma is a*b + c with one rounding
// Every operation is correctly rounded and no compiler may contract (-ffp-contract=off, --fmad=false), so all ISAs,
// all thread counts and the GPU give the same bits. (A NaN is a NaN everywhere, but which NaN it is in fp32 depends on the
// hardware; in bf16 and fp16 it is one pattern.)
//
// AdamW (arXiv 1711.05101, in torch.optim's order of decay and step), Adam when L2 (weight decay joins the gradient):
//   g' = g * grad_scale                      [L2: g' = g' + weight_decay * p]
//   m  = m + (1 - beta1) * (g' - m)
//   v  = beta2 * v + (1 - beta2) * g' * g'
//   p  = p * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)   [L2: no factor]
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define ZT_FN static __device__ __forceinline__
#define ZT_HOST_DEVICE static __host__ __device__ __forceinline__
#else
// static: each ISA keeps its own copy. A function the linker may merge could be the one built for another ISA.
#define ZT_FN static inline __attribute__((always_inline))
#define ZT_HOST_DEVICE ZT_FN
#endif

// Computed in double by the caller and rounded once. runtime/native/loading.py mirrors this layout.
struct ZtHyper {
  float step_size;      // lr / (1 - beta1^t)
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float decay;          // 1 - lr * weight_decay; 1 when L2
  float l2;             // weight_decay when L2; else 0
  float inv_sqrt_bc2;   // 1 / sqrt(1 - beta2^t)
  float grad_scale;     // unscale and clip in one factor
};

template <class F>
struct ZtConsts {
  typename F::T neg_step, c1, b2, c2, eps, decay, l2, ib, gs;
  ZT_FN ZtConsts make(const ZtHyper& h) {
    return {F::set(-h.step_size), F::set(h.one_minus_beta1), F::set(h.beta2), F::set(h.one_minus_beta2), F::set(h.eps),
            F::set(h.decay), F::set(h.l2), F::set(h.inv_sqrt_bc2), F::set(h.grad_scale)};
  }
};

template <class F, bool L2>
ZT_FN void zt_adam(typename F::T& p, typename F::T& m, typename F::T& v, typename F::T g, const ZtConsts<F>& k) {
  typename F::T s = F::mul(g, k.gs);
  if (L2) s = F::fma(k.l2, p, s);
  m = F::fma(k.c1, F::sub(s, m), m);
  v = F::fma(k.b2, v, F::mul(F::mul(k.c2, s), s));
  const typename F::T denom = F::fma(F::sqrt(v), k.ib, k.eps);
  const typename F::T update = F::div(m, denom);
  p = F::fma(k.neg_step, update, L2 ? p : F::mul(p, k.decay));
}

// bf16 <-> fp32 on bit patterns: to nearest even, every NaN becomes the quiet NaN 0x7fc0.
ZT_HOST_DEVICE uint32_t zt_bf16_round(uint32_t u) {
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

// ---- moments in bf16: rounded stochastically ------------------------------------------------------------------------------
// A float is rounded up or down with the probabilities that make its bf16 right on average, so that many small changes of a
// moment are not lost. The random number is a function of the element's index in its unit, and of a key for the unit and the
// step, so neither world size nor threads nor ISA change it. zt_mix: lowbias32, https://github.com/skeeto/hash-prospector.
struct ZtKey { uint32_t first, second; };

ZT_HOST_DEVICE uint32_t zt_mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
ZT_HOST_DEVICE uint32_t zt_random(uint32_t index, ZtKey key) { return zt_mix(zt_mix(index ^ key.first) ^ key.second); }

// random: 16 bits. Infinities stay, every NaN becomes 0x7fc0, and a float that bf16 has stays as it is.
ZT_HOST_DEVICE uint32_t zt_bf16_stochastic(uint32_t u, uint32_t random) {
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (u + random) >> 16;
}

// ---- sum of squares: one tree, whoever walks it -------------------------------------------------------------------------
// Elements are cut into blocks of ZT_BLOCK. In a block, lane j adds the squares of elements j, j+32, ... in order, in
// double (a float's square is exact there); lanes then fold in halves (16, 8, 4, 2, 1). The block sums are doubles, and
// are summed by the same rule (without squaring) until one is left. So the bits depend on the elements alone, neither on
// threads nor on ISA nor on device.
#define ZT_LANES 32
#ifndef ZT_BLOCK        // a test folds many levels of few elements
#define ZT_BLOCK 8192
#endif
