// Fused unscale + clip + AdamW + cast over many flat ranges in GPU memory in one launch. The formula is formula.h's, so the
// bits are the CPU's. Build with --fmad=false. A call only enqueues work on a stream and returns a cudaError_t.
#include "common.cuh"

namespace zt {
namespace {

constexpr int64_t TILE = THREADS * 8;                   // elements; a range is cut into tiles, blocks walk over all of them
constexpr int MAX_RANGES = 56, MAX_HYPERS = 8;          // of one launch: its arguments hold 4096 bytes

struct Table {
  ZtRange range[MAX_RANGES];                            // .hyper counts in `hypers`; .place: all addresses allow 16 bytes
  int32_t first[MAX_RANGES + 1];                        // tiles before the range; the last entry counts all
  int32_t ranges;
  ZtHyper hypers[MAX_HYPERS];
  const float* scale;
  const uint8_t* changed;
};
static_assert(sizeof(Table) <= 4096, "kernel arguments of every supported GPU and driver");

// A script has changed this parameter in 16 bit since the last step: the master follows, unless it rounds to that anyway.
template <class O>
__device__ __forceinline__ float follow(float p, typename O::S out) {
  return narrow(O(), p) == out ? p : widen(O(), out);
}

template <class G, class O, bool L2>
__device__ __forceinline__ void one(const ZtRange& r, int64_t i, const ZtConsts<Gpu>& k, bool changed, bool skip) {
  float p = ((float*)r.p)[i], m = ((float*)r.m)[i], v = ((float*)r.v)[i];
  if constexpr (!std::is_same<O, NoOut>::value)
    if (changed) p = follow<O>(p, ((const typename O::S*)r.out)[i]);
  if (skip) {
    ((float*)r.p)[i] = p;
    return;
  }
  zt_adam<Gpu, L2>(p, m, v, widen(G(), ((const typename G::S*)r.g)[i]), k);
  ((float*)r.p)[i] = p; ((float*)r.m)[i] = m; ((float*)r.v)[i] = v;
  if constexpr (!std::is_same<O, NoOut>::value) ((typename O::S*)r.out)[i] = narrow(O(), p);
}

// No pointer is `restrict`: out may be the gradient's memory. All loads of an element come before its stores anyway.
template <class G, class O, bool L2>
__global__ void __launch_bounds__(THREADS, 3) adamw_kernel(const __grid_constant__ Table t) {
  const float factor = t.scale ? *t.scale : 1.0f;       // the clip factor never has to visit the host
  const bool changed = t.changed && *t.changed, skip = !isfinite(factor);   // nor has the host to know that
  if (skip && !changed) return;
  const int tiles = t.first[t.ranges];
  int at = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    while (tile >= t.first[at + 1]) ++at;
    const ZtRange& r = t.range[at];
    ZtHyper h = t.hypers[r.hyper];
    h.grad_scale = __fmul_rn(h.grad_scale, factor);
    const ZtConsts<Gpu> k = ZtConsts<Gpu>::make(h);
    const int64_t begin = (tile - t.first[at]) * TILE, end = begin + TILE < r.n ? begin + TILE : r.n;
    if (r.place) {
      int64_t i = begin + 8 * threadIdx.x;
      if (i + 8 <= end) {
        float p[8], m[8], v[8], g[8];
        load8(Fp32(), (const float*)r.p + i, p); load8(Fp32(), (const float*)r.m + i, m);
        load8(Fp32(), (const float*)r.v + i, v); load8(G(), (const typename G::S*)r.g + i, g);
        if constexpr (!std::is_same<O, NoOut>::value) {
          if (changed)
            for (int j = 0; j < 8; ++j) p[j] = follow<O>(p[j], ((const typename O::S*)r.out)[i + j]);
        }
        if (skip) {
          store8(Fp32(), (float*)r.p + i, p);
          continue;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) zt_adam<Gpu, L2>(p[j], m[j], v[j], g[j], k);
        store8(Fp32(), (float*)r.p + i, p); store8(Fp32(), (float*)r.m + i, m); store8(Fp32(), (float*)r.v + i, v);
        if constexpr (!std::is_same<O, NoOut>::value) store8(O(), (typename O::S*)r.out + i, p);
      } else {
        for (; i < end; ++i) one<G, O, L2>(r, i, k, changed, skip);
      }
    } else {
      for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) one<G, O, L2>(r, i, k, changed, skip);
    }
  }
}

struct Launch {
  const Table& t;
  int grid;
  cudaStream_t stream;
  template <class G, class O, bool L2>
  int go() const { return launch(stream, grid, THREADS, adamw_kernel<G, O, L2>, t); }
  template <class G, class O>
  int with_out(bool l2) const { return l2 ? go<G, O, true>() : go<G, O, false>(); }
  template <class G>
  int with_grad(int out, bool l2) const {
    if (out == F32) return with_out<G, Fp32>(l2);
    if (out == BF16) return with_out<G, Bf16>(l2);
    if (out == F16) return with_out<G, Fp16>(l2);
    return with_out<G, NoOut>(l2);
  }
};

int launch_table(const AdamCall& call, const Table& t, cudaStream_t stream) {
  if (!t.first[t.ranges]) return 0;
  const Launch launch = {t, grid_for(call.device, t.first[t.ranges]), stream};
  if (call.grad_dtype == F32) return launch.with_grad<Fp32>(call.out_dtype, call.l2);
  if (call.grad_dtype == BF16) return launch.with_grad<Bf16>(call.out_dtype, call.l2);
  return launch.with_grad<Fp16>(call.out_dtype, call.l2);
}

}  // namespace

int launch_adam(const AdamCall& call, const ZtRange* ranges, int64_t n_ranges, cudaStream_t stream) {
  Table t;
  int from[MAX_HYPERS], hypers = 0;                     // which of the call's are in t.hypers
  const auto clear = [&] { t.ranges = 0; t.first[0] = 0; hypers = 0; t.scale = call.scale; t.changed = call.changed; };
  clear();
  for (int64_t i = 0; i < n_ranges; ++i) {
    const ZtRange& r = ranges[i];
    int h = 0;
    while (h < hypers && from[h] != r.hyper) ++h;
    const int64_t tiles = (r.n + TILE - 1) / TILE;
    if (t.ranges == MAX_RANGES || h == MAX_HYPERS || t.first[t.ranges] + tiles > INT32_MAX) {
      const int error = launch_table(call, t, stream);
      if (error) return error;
      clear();
      h = 0;
    }
    if (h == hypers) {
      t.hypers[h] = call.hypers[r.hyper];
      from[hypers++] = r.hyper;
    }
    ZtRange& to = t.range[t.ranges] = r;
    to.hyper = h;
    to.place = !((r.p | r.m | r.v | r.g | r.out) & 15);
    t.first[t.ranges + 1] = (int32_t)(t.first[t.ranges] + tiles);
    ++t.ranges;
  }
  return launch_table(call, t, stream);
}

}  // namespace zt

// scale: 0, or the address of one fp32 on the device that multiplies every grad_scale; where that is not finite nothing is
// written. changed: 0, or the address of one byte on the device; where it is not 0, masters follow `out`s that they do not
// round to. `out`s may be their `g`s, but not with `changed`.
API int zt_adamw(const ZtRange* ranges, int64_t n_ranges, const ZtHyper* hypers, int32_t grad_dtype, int32_t out_dtype,
                 int32_t l2, uint64_t scale, uint64_t changed, int32_t device, uint64_t stream) {
  zt::OnDevice on(device);
  if (on.error != cudaSuccess) return (int)on.error;
  return zt::launch_adam({hypers, grad_dtype, out_dtype, l2 != 0, (const float*)scale, (const uint8_t*)changed, device},
                         ranges, n_ranges, (cudaStream_t)stream);
}
