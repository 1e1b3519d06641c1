// Sums of squares of many ranges for the clip norm, and with them overflow: a sum is finite exactly when every element is.
// The order of additions is formula.h's, so the bits are the CPU's. A call only enqueues work on a stream.
#include "common.cuh"

namespace zt {
namespace {

struct Piece {
  uint64_t x;                                           // address
  int64_t n;
  int64_t first;                                        // blocks of the call before this range
  int64_t dtype;
};
constexpr int MAX_PIECES = 96;
struct Table {
  Piece piece[MAX_PIECES];
  int pieces;
  int64_t blocks;                                       // of this launch, from piece[0].first on
};
static_assert(sizeof(Table) <= 4000, "kernel arguments of every supported GPU and driver");

// Lane j of a warp is lane j of formula.h's tree; term(i) is what element i adds.
template <class Term>
__device__ __forceinline__ double warp_sum(int64_t begin, int64_t end, Term&& term) {
  double s = 0;
#pragma unroll 8
  for (int64_t i = begin + (threadIdx.x & 31); i < end; i += ZT_LANES) s = __dadd_rn(s, term(i));
  for (int w = ZT_LANES / 2; w; w /= 2) s = __dadd_rn(s, __shfl_xor_sync(~0u, s, w));
  return s;
}

template <class D>
__device__ __forceinline__ double squares(const Piece& p, int64_t begin, int64_t end) {
  const typename D::S* x = (const typename D::S*)p.x;
  return warp_sum(begin, end, [=](int64_t i) { const double d = widen(D(), x[i]); return __dmul_rn(d, d); });
}

// One warp a block of ZT_BLOCK elements; sums[b] for block b of the call.
__global__ void __launch_bounds__(THREADS) block_sums(const __grid_constant__ Table t, double* __restrict__ sums) {
  int at = 0;
  const int64_t base = t.piece[0].first;
  for (int64_t b = blockIdx.x * (int64_t)WARPS + (threadIdx.x >> 5); b < t.blocks; b += gridDim.x * (int64_t)WARPS) {
    while (at + 1 < t.pieces && base + b >= t.piece[at + 1].first) ++at;
    const Piece& p = t.piece[at];
    const int64_t begin = (base + b - p.first) * ZT_BLOCK, end = begin + ZT_BLOCK < p.n ? begin + ZT_BLOCK : p.n;
    const double s = p.dtype == F32    ? squares<Fp32>(p, begin, end)
                     : p.dtype == BF16 ? squares<Bf16>(p, begin, end)
                                       : squares<Fp16>(p, begin, end);
    if ((threadIdx.x & 31) == 0) sums[base + b] = s;
  }
}

// One thread block a range: folds its block sums level by level. Two halves take turns, as a level may not overwrite what
// a neighbour has yet to read.
__global__ void __launch_bounds__(THREADS) fold(const __grid_constant__ Table t, double* sums,
                                                double* spare, double* result) {
  const Piece& p = t.piece[blockIdx.x];
  double *from = sums + p.first, *to = spare + p.first;
  int64_t blocks = (p.n + ZT_BLOCK - 1) / ZT_BLOCK;
  while (blocks > 1) {
    const int64_t next = (blocks + ZT_BLOCK - 1) / ZT_BLOCK;
    for (int64_t b = threadIdx.x >> 5; b < next; b += WARPS) {
      const int64_t begin = b * ZT_BLOCK, end = begin + ZT_BLOCK < blocks ? begin + ZT_BLOCK : blocks;
      const double s = warp_sum(begin, end, [=](int64_t i) { return from[i]; });
      if ((threadIdx.x & 31) == 0) to[b] = s;
    }
    __syncthreads();
    double* other = from; from = to; to = other;
    blocks = next;
  }
  if (threadIdx.x == 0) result[blockIdx.x] = blocks ? from[0] : 0.0;
}

__global__ void total(double* result, int64_t ranges) {  // in the order of the ranges, as the CPU adds them
  double s = 0;
  for (int64_t i = 0; i < ranges; ++i) s = __dadd_rn(s, result[i]);
  result[ranges] = s;
}

}  // namespace
}  // namespace zt

// x, n, dtype: one of each per range. work: 2 * sum of ceil(n / ZT_BLOCK) doubles on the device; overwritten.
// result: ranges + 1 doubles on the device: each range's sum, then the sum of those.
API int zt_sums_of_squares(const uint64_t* x, const int64_t* n, const int32_t* dtype, int64_t ranges, uint64_t work,
                           uint64_t result, int32_t device, uint64_t stream) {
  using namespace zt;
  OnDevice on(device);
  if (on.error != cudaSuccess) return (int)on.error;
  const cudaStream_t st = (cudaStream_t)stream;
  int64_t blocks = 0;
  for (int64_t i = 0; i < ranges; ++i) blocks += (n[i] + ZT_BLOCK - 1) / ZT_BLOCK;
  double *sums = (double*)work, *spare = sums + blocks;
  int64_t first = 0;
  for (int64_t i = 0; i < ranges; i += MAX_PIECES) {
    Table t;
    t.pieces = (int)(ranges - i < MAX_PIECES ? ranges - i : MAX_PIECES);
    t.blocks = 0;
    for (int j = 0; j < t.pieces; ++j) {
      t.piece[j] = {x[i + j], n[i + j], first + t.blocks, dtype[i + j]};
      t.blocks += (n[i + j] + ZT_BLOCK - 1) / ZT_BLOCK;
    }
    first += t.blocks;
    if (t.blocks)
      if (const int error = launch(st, grid_for(device, (t.blocks + WARPS - 1) / WARPS), THREADS, block_sums, t, sums))
        return error;
    if (const int error = launch(st, t.pieces, THREADS, fold, t, sums, spare, (double*)result + i)) return error;
  }
  return launch(st, 1, 1, total, (double*)result, ranges);
}
