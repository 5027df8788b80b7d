// The resident form of topk_svd: all reads of a matrix from shared memory, which is filled from global memory once.
//
// A team of T blocks of one cooperative launch takes a matrix. T follows from the matrix and the device's shared memory
// alone: the fewest blocks whose shared memory holds A. Block `rank` of the team keeps a slab of whole 16-row panels of
// A for all reads, and owns a slice of the d columns of K and Z in all sums over the team, so that each sum is formed
// once and in the order of the ranks. What follows are phases between barriers of the team; what a block reads from
// another one was written before the barrier above it. b rows a step, p = (step + 1) b.
//
//   load       slab <- A, cp.async. largest[rank] = max |slab|
//   barrier    scale, the same in all blocks
//   per step:
//     product  Y_step[:, slab] = Q_step (scale slab)^T,  partial[rank] = Y_step[:, slab] (scale slab)
//              gram[rank] rows of the step = Y_0..step[:, slab] Y_step[:, slab]^T, in fp64
//     barrier  A
//     sums     Z_step[:, slice] = sum of partial;  C = sum of gram = K Z_step^T, for it is Y Y_step^T
//              F = Z_step - C^T K on the slice, in fp64; stored in the place of Q_{step+1}
//     parts    exchange[rank] = [K; F] F^T over the slice, in fp64
//     barrier  B
//     combine  M = the inverse of the Cholesky factor of F F^T - (K F^T)^T (K F^T), by every block alike
//              Q_{step+1}[:, slice] = M (F - (K F^T)^T K)
//     barrier  D, or, where a row depends on those before it or much was cancelled, once more from `parts`
//
// The coefficients C cost no pass: they come with the Gram matrix that Rayleigh-Ritz needs. F is nearly orthogonal to K
// already, so one projection with coefficients measured on the stored F is exact to fp32, and the Gram matrix of the
// stored F in fp64 makes a single Cholesky do (orthonormal to 1e-16 / pivot, pivots below kPoorPivot go again).
//
// Order of the shared buffers: partial is written in the product and read in the sums, A before and B after that; gram
// has a place of its own for each step; exchange alternates between two, and a block writes one of them again only
// after a barrier that all blocks reached after reading it. Q_{step+1} is read by others after D only.
//
// No deadlock: a block takes its matrices in the order of the table, so of the matrices not yet done the first one has
// all its blocks; and all blocks of the launch are resident, since it is cooperative.
//
// Counts. Read from memory: A once, where the streamed form reads it `reads` + 1 times. Written beside it, for d = 768,
// b = 8, 4 reads, fp32 and slabs of 64 rows, in shares of A: Y 4 %, partial 12.5 % (the same lines in each step), gram
// 4 %, K and Z 8 % of a square A. Launches of a refresh: begin, one of this kernel for each dtype and width class,
// ritz, rotate_left, instead of 16 and more. Barriers of a team: 3 reads - 1, if no step goes again. A block a
// multiprocessor: the matrices go in waves, so what limits a long list is the length of one matrix's chain of phases
// times the number of waves: on an H200 (teams of 12 for 768 x 768 and of 48 for 3072 x 768 in fp32) SigLIP2-B's 76
// matrices are 15 waves. Not run on a GPU yet: which form is faster for which list has not been measured.
#pragma once

#include "svd_product.cuh"

namespace s2d {
namespace {

constexpr int kTeamThreads = 512;
constexpr int kTeamWarps = kTeamThreads / kWarpSize;
constexpr int kTeamTiles = 4;  // of 16 columns, of a warp
constexpr int kTeamMaxD = kTeamWarps * kTeamTiles * 16;
constexpr double kDependent = 1e-10;  // of a pivot, rows having length one: torch_svd._svqb's drop
constexpr double kPoorPivot = 1e-6;

__device__ __forceinline__ bool is_finite(unsigned largest) { return largest < 0x7f800000u; }

// scale and exponent for a matrix whose largest |element| has this bit pattern.
__device__ __forceinline__ void set_prescale(State& state, unsigned largest) {
  // frexp's exponent: |A| < 2^exponent; clamped so that 2^exponent and 2^-exponent are normal numbers
  int exponent = 1;
  if (is_finite(largest))
    exponent = largest >= 0x00800000u ? static_cast<int>(largest >> 23) - 126 : largest == 0 ? 0 : -126;
  exponent = max(-126, min(126, exponent));
  state.finite = is_finite(largest);
  state.exponent = exponent;
  state.scale = __uint_as_float(static_cast<unsigned>(127 - exponent) << 23);
}

// --- shapes, also for the host ------------------------------------------------------------------------------------

__host__ __device__ inline int panels_of(const Layer& layer) {
  return static_cast<int>(divide_up<int64_t>(layer.D, kPanel));
}
// Strides and elements of a slab of so many panels: row by row, or column by column where A lies so in memory. The pads
// keep the fragments' reads on different banks.
__host__ __device__ inline int slab_pitch(const Layer& layer, int panels) {
  return layer.vector_cols ? panels * kPanel + 8 : round_up(layer.d, 16) + kColumnPad;
}
__host__ __device__ inline int64_t slab_elements(const Layer& layer, int panels) {
  return static_cast<int64_t>(slab_pitch(layer, panels)) *
         (layer.vector_cols ? round_up(layer.d, 16) : panels * kPanel);
}

// Shared memory of the small dense part, in doubles. The product's Meeting lies in the same place: never at once.
struct Dense {
  double* coefficient;  // [rows, block]: row i holds those of the i-th row of K, then of F
  double* work;         // [block, 2 block]
  double *before, *normalize;

  static __host__ __device__ size_t doubles(const Layer& layer) {
    return static_cast<size_t>(layer.block) * (layer.rows + 2 * layer.block + 2);
  }
  __device__ Dense(void* memory, const Layer& layer) {
    coefficient = static_cast<double*>(memory);
    work = coefficient + layer.rows * layer.block;
    before = work + 2 * layer.block * layer.block;
    normalize = before + layer.block;
  }
};

// --- one block's part ---------------------------------------------------------------------------------------------

// A block's part of a matrix, in shared memory: what all threads hold alike would not fit their registers.
struct Work {
  int index;  // in the table
  int rank, panels, slab_pitch, first_col, end_col;
  int step, reads;  // no reads of a matrix with NaN or Inf
  unsigned target;  // of the last barrier of the team
  float scale;
  int64_t first_row;
  int64_t scratch;  // bytes of the slab

  __device__ void set(const Table& table, int index_in_table, size_t element_bytes) {
    const Layer& layer = table.layers[index_in_table];
    index = index_in_table;
    rank = static_cast<int>(blockIdx.x - table.first[index]);
    const int all = panels_of(layer), most = divide_up(all, layer.team), first = min(rank * most, all);
    panels = min(most, all - first);
    first_row = static_cast<int64_t>(first) * kPanel;
    slab_pitch = s2d::slab_pitch(layer, most);
    scratch = slab_elements(layer, most) * static_cast<int64_t>(element_bytes);
    const int slice = round_up(divide_up(layer.d, layer.team), 8);
    first_col = min(rank * slice, layer.d);
    end_col = min(first_col + slice, layer.d);
    target = 0;
  }
};

// Waits for the team.
__device__ __forceinline__ void sync(const Layer& layer, Work& work) {
  if (layer.team == 1) {
    __syncthreads();
  } else {
    // of thread 0 alone: the others would read the target while it is changed
    team_sync(&layer.state->arrived, threadIdx.x == 0 ? work.target += static_cast<unsigned>(layer.team) : 0u);
  }
}

template <typename T>
__device__ __forceinline__ Tile<T> tile_of(const Layer& layer, const Work& work, unsigned char* shared, int panel) {
  T* slab = reinterpret_cast<T*>(shared);
  return layer.vector_cols ? Tile<T>{slab + panel * kPanel, 1, work.slab_pitch}
                           : Tile<T>{slab + panel * kPanel * work.slab_pitch, work.slab_pitch, 1};
}

// Sums of eight values each over a warp: lane l gets that of value l / 4. In nine exchanges instead of forty.
__device__ __forceinline__ double reduce_8(double (&value)[8]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (lane & 4 * half) != 0;  // keeps the upper half of the values and gives the lower
#pragma unroll
    for (int e = 0; e < half; ++e) {
      const double given = upper ? value[e] : value[e + half], kept = upper ? value[e + half] : value[e];
      value[e] = kept + __shfl_xor_sync(kAllLanes, given, 4 * half);
    }
  }
  value[0] += __shfl_xor_sync(kAllLanes, value[0], 2);
  return value[0] + __shfl_xor_sync(kAllLanes, value[0], 1);
}

// out[i * out_row + c * out_col] = X[i, :] . B[c, :] in fp64 for `rows` rows of X and b of B: a warp a row of X.
__device__ void row_products(const float* X, int rows, const float* B, int b, int64_t pitch, int length, double* out,
                             int out_row, int out_col) {
  constexpr int kAtOnce = 8;
  const int lane = threadIdx.x % kWarpSize;
  for (int i = threadIdx.x / kWarpSize; i < rows; i += kTeamWarps) {
    for (int first = 0; first < b; first += kAtOnce) {
      double sum[kAtOnce] = {};
      for (int j = lane; j < length; j += kWarpSize) {
        const double x = X[i * pitch + j];
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
          if (first + e < b) sum[e] = fma(x, static_cast<double>(B[(first + e) * pitch + j]), sum[e]);
        }
      }
      const double result = reduce_8(sum);
      const int c = first + lane / 4;
      if (lane % 4 == 0 && c < b) out[i * out_row + c * out_col] = result;
    }
  }
}

// In `dense.coefficient`: rows i < p are K F^T, the b behind them F F^T. Makes M, the inverse of the Cholesky factor of
// the part of F F^T that is orthogonal to K, in the right half of `dense.work`; rows and columns of dependent rows of F
// are zero in it, and so is dense.normalize there. `before`: squares of the rows' lengths before anything was taken off
// them, or null for those of F. Returns whether the result needs another round.
__device__ bool eliminate(const Dense& dense, int p, int b, const double* before, bool last) {
  constexpr double kEpsilon = 1.1920929e-7;
  const int tid = static_cast<int>(threadIdx.x), pitch = 2 * b;
  double* W = dense.work;
  for (int pair = tid; pair < b * b; pair += kTeamThreads) {
    const int r = pair / b, c = pair % b;
    double sum = dense.coefficient[(p + r) * b + c];
    for (int i = 0; i < p; ++i) sum -= dense.coefficient[i * b + r] * dense.coefficient[i * b + c];
    W[r * pitch + c] = sum;
    W[r * pitch + b + c] = r == c ? 1.0 : 0.0;
  }
  __syncthreads();
  bool poor = false;
  if (tid < b) {
    const double own = dense.coefficient[(p + tid) * b + tid], left = W[tid * pitch + tid];
    const bool kept = left > 64.0 * kEpsilon * kEpsilon * (before ? before[tid] + own : own);
    dense.normalize[tid] = kept ? 1.0 / sqrt(left) : 0.0;
    poor = kept && left < 0.5 * own;
  }
  __syncthreads();
  for (int pair = tid; pair < b * b; pair += kTeamThreads) {
    W[pair / b * pitch + pair % b] *= dense.normalize[pair / b] * dense.normalize[pair % b];
  }
  __syncthreads();
  // Gauss without row exchanges on [W | I]: row j of the right half is that of the inverse times the root of its pivot
  for (int j = 0; j + 1 < b; ++j) {
    const double pivot = W[j * pitch + j];
    if (pivot > kDependent) {
      for (int item = tid; item < (b - 1 - j) * b; item += kTeamThreads) {
        const int i = j + 1 + item / b, k = j + 1 + item % b;
        W[i * pitch + k] -= W[i * pitch + j] / pivot * W[j * pitch + k];
      }
    }
    __syncthreads();
  }
  for (int pair = tid; pair < b * b; pair += kTeamThreads) {
    const int r = pair / b, c = pair % b;
    const double pivot = W[r * pitch + r];
    const bool kept = pivot > kDependent;
    W[r * pitch + b + c] = kept && c <= r ? W[r * pitch + b + c] * dense.normalize[c] / sqrt(pivot) : 0.0;
    if (r == c) poor |= kept ? pivot < kPoorPivot : before != nullptr;
  }
  const bool again = __syncthreads_or(poor) != 0 && !last;
  if (tid < b && !(W[tid * pitch + tid] > kDependent)) dense.normalize[tid] = 0.0;
  // coefficient[i] <- -M coefficient[i], so that Q = M F + coefficient^T K needs one pass over K
  const int at_once = kTeamThreads / b;
  for (int first = 0; first < p; first += at_once) {
    const int i = first + tid / b, r = tid % b;
    const bool active = tid < at_once * b && i < p;
    double sum = 0.0;
    for (int c = 0; active && c <= r; ++c) sum -= W[r * pitch + b + c] * dense.coefficient[i * b + c];
    __syncthreads();
    if (active) dense.coefficient[i * b + r] = sum;
  }
  __syncthreads();
  return again;
}

// out[r, column] = value(r, column) for the b rows and the columns [first, end). Values of a column are all there
// before the first of them is stored.
template <typename Value>
__device__ __forceinline__ void replace_columns(float* out, int pitch, int b, int first, int end, Value value) {
  const int tid = static_cast<int>(threadIdx.x), across = kTeamThreads / b;
  for (int begin = first; begin < end; begin += across) {
    const int r = tid / across, column = begin + tid % across;
    const bool active = r < b && column < end;
    const float result = active ? value(r, column) : 0.0f;
    __syncthreads();
    if (active) out[r * pitch + column] = result;
  }
}

// Fills the slab; returns the largest |element| of all slabs of the team, as a bit pattern: a float maximum would drop
// NaN.
template <typename T>
__device__ __forceinline__ unsigned load_slab(const Table& table, Work& work, unsigned char* shared) {
  const Layer& layer = table.layers[work.index];
  const Columns columns = columns_of_warp<kTeamWarps>(layer.d);
  for (int panel = 0; panel < work.panels; ++panel) {
    tile_of<T>(layer, work, shared, panel).load(layer, work.first_row + panel * kPanel, columns);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  const Tile<T> slab = tile_of<T>(layer, work, shared, 0);
  const int lane = threadIdx.x % kWarpSize, rows = work.panels * kPanel, across = columns.end - columns.first;
  const bool by_cols = layer.vector_cols;
  unsigned largest = 0;
  for (int i = 0; i < (by_cols ? across : rows); ++i) {
    for (int j = lane; j < (by_cols ? rows : across); j += kWarpSize) {
      const T value = by_cols ? slab(j, columns.first + i) : slab(i, columns.first + j);
      largest = max(largest, __float_as_uint(widen<T>(value, layer.dtype)) & 0x7fffffffu);
    }
  }
  largest = block_reduce<kTeamThreads>(largest, Maximum());
  if (threadIdx.x == 0) layer.largest[work.rank] = largest;
  sync(layer, work);
  for (int i = lane; i < layer.team; i += kWarpSize) largest = max(largest, layer.largest[i]);
  return warp_reduce(largest, Maximum());
}

// Y of the step and this block's part of Z.
template <typename T, int kN>
__device__ __forceinline__ void multiply_slab(const Table& table, Work& work, unsigned char* shared) {
  constexpr int kRows = 8 * kN;
  const Layer& layer = table.layers[work.index];
  const int b = layer.block, pitch = pitch_d(layer), step = work.step;
  const Columns columns = columns_of_warp<kTeamWarps>(layer.d);
  auto& meeting = *reinterpret_cast<Meeting<kTeamWarps, kN>*>(shared + work.scratch);
  float* Y = layer.Y + step * b * pitch_D(layer) + work.first_row;
  for (int first_r = 0; first_r < (kN == 1 ? 1 : b); first_r += kRows) {  // kN = 1 is for b <= 8
    const int rows = min(kRows, b - first_r);
    const Fragments<kTeamTiles, kN, kN == 1> Q(layer.K + (step * b + first_r) * pitch, layer, rows, columns);
    float sum[kTeamTiles][kN][4] = {};
#pragma unroll 1
    for (int panel = 0; panel < work.panels; ++panel) {
      multiply_panel(layer, tile_of<T>(layer, work, shared, panel), work.scale, Q, columns, meeting,
                     Y + first_r * pitch_D(layer) + panel * kPanel, sum);
    }
    store_columns(layer.partial + (static_cast<int64_t>(work.rank) * b + first_r) * pitch, pitch, rows, columns, sum);
  }
  __syncthreads();  // Y is read by other threads, and the meeting's memory taken
}

// This block's part of the step's rows of the Gram matrix; ends with barrier A.
__device__ __forceinline__ void gram_of_slab(const Table& table, Work& work) {
  const Layer& layer = table.layers[work.index];
  const int b = layer.block, n = layer.rows;
  const float* Y = layer.Y + work.first_row;
  row_products(Y, (work.step + 1) * b, Y + work.step * b * pitch_D(layer), b, pitch_D(layer), work.panels * kPanel,
               layer.gram + static_cast<int64_t>(work.rank) * n * n + work.step * b * n, 1, n);
  sync(layer, work);
}

// Z of the step on this block's slice of columns, and, unless it is the last, F in the place of the next Q.
__device__ __forceinline__ void sum_slice(const Table& table, Work& work, unsigned char* shared) {
  const Layer& layer = table.layers[work.index];
  const Dense dense(shared + work.scratch, layer);
  const int tid = static_cast<int>(threadIdx.x), b = layer.block, n = layer.rows, step = work.step;
  const int p = (step + 1) * b, pitch = pitch_d(layer);
  const bool last = step + 1 == layer.reads;
  if (!last) {
    for (int pair = tid; pair < b * p; pair += kTeamThreads) {
      const double* part = layer.gram + (step * b + pair / p) * n + pair % p;
      double sum = 0.0;
#pragma unroll 8
      for (int i = 0; i < layer.team; ++i) sum += part[static_cast<int64_t>(i) * n * n];
      dense.coefficient[pair % p * b + pair / p] = sum;
    }
    __syncthreads();
    if (tid < b) {
      double sum = 0.0;
      for (int i = 0; i < p; ++i) sum += dense.coefficient[i * b + tid] * dense.coefficient[i * b + tid];
      dense.before[tid] = sum;
    }
  }
  const int across = work.end_col - work.first_col;
  for (int item = tid; item < b * across; item += kTeamThreads) {
    const int r = item / across, column = work.first_col + item % across;
    const float* part = layer.partial + r * pitch + column;
    float sum = 0.0f;
#pragma unroll 8
    for (int i = 0; i < layer.team; ++i) sum += part[static_cast<int64_t>(i) * b * pitch];
    layer.Z[(step * b + r) * pitch + column] = sum;
    if (last) continue;
    double rest = sum;
#pragma unroll 8
    for (int i = 0; i < p; ++i) {
      rest -= dense.coefficient[i * b + r] * static_cast<double>(layer.K[i * pitch + column]);
    }
    layer.K[(p + r) * pitch + column] = static_cast<float>(rest);
  }
  __syncthreads();
}

// `parts`, barrier B and `combine`: the next Q from F, in the same place. Returns whether it takes another round.
__device__ __forceinline__ bool orthonormalize_slice(const Table& table, Work& work, unsigned char* shared, int round,
                                                     bool last) {
  const Layer& layer = table.layers[work.index];
  const Dense dense(shared + work.scratch, layer);
  const int b = layer.block, p = (work.step + 1) * b, pitch = pitch_d(layer), part = (p + b) * b;
  float* Q = layer.K + p * pitch;
  double* exchange = layer.exchange + static_cast<int64_t>(round % 2) * layer.team * layer.rows * b;
  row_products(layer.K + work.first_col, p + b, Q + work.first_col, b, pitch, work.end_col - work.first_col,
               exchange + static_cast<int64_t>(work.rank) * part, b, 1);
  sync(layer, work);  // B
  for (int pair = threadIdx.x; pair < part; pair += kTeamThreads) {
    double sum = 0.0;
#pragma unroll 8
    for (int i = 0; i < layer.team; ++i) sum += exchange[static_cast<int64_t>(i) * part + pair];
    dense.coefficient[pair] = sum;
  }
  __syncthreads();
  const bool again = eliminate(dense, p, b, round == 0 ? dense.before : nullptr, last);
  replace_columns(Q, pitch, b, work.first_col, work.end_col, [&](int r, int column) {
    if (round == 0 && dense.normalize[r] == 0.0) {  // a dependent row: a random one in its place
      return gaussian_of(layer)[(column - (p + r + 1) % layer.d + layer.d) % layer.d];
    }
    double sum = 0.0;
#pragma unroll 8
    for (int i = 0; i < p; ++i) {
      sum = fma(dense.coefficient[i * b + r], static_cast<double>(layer.K[i * pitch + column]), sum);
    }
    for (int c = 0; c <= r; ++c) {
      sum = fma(dense.work[r * 2 * b + b + c], static_cast<double>(Q[c * pitch + column]), sum);
    }
    return static_cast<float>(sum);
  });
  __syncthreads();
  return again;
}

// The first matrix of the table from `index` on in whose team this block is.
__device__ __forceinline__ int matrix_of_block(const Table& table, int index) {
  while (index < table.count && blockIdx.x - table.first[index] >= static_cast<unsigned>(table.layers[index].team))
    ++index;
  return index;
}

// `table.first` is the first block of each matrix's team, not ascending.
template <typename T, int kN>
__global__ void __launch_bounds__(kTeamThreads, 1) resident(S2D_GRID_CONSTANT(Table) table) {
  S2D_DYNAMIC_SHARED(unsigned char, shared);
  S2D_SHARED(Work, works, [1]);
  Work& work = works[0];
  for (int index = matrix_of_block(table, 0); index < table.count;) {
    if (threadIdx.x == 0) work.set(table, index, sizeof(T));
    __syncthreads();
    const unsigned largest = load_slab<T>(table, work, shared);
    if (threadIdx.x == 0) {
      State state;
      set_prescale(state, largest);
      work.scale = state.scale;
      work.step = 0;
      work.reads = state.finite ? table.layers[work.index].reads : 0;
      if (work.rank == 0) set_prescale(*table.layers[work.index].state, largest);
    }
    __syncthreads();
    while (work.step < work.reads) {
      multiply_slab<T, kN>(table, work, shared);
      gram_of_slab(table, work);
      sum_slice(table, work, shared);
      if (work.step + 1 < work.reads) {
        constexpr int kRounds = 3;
#pragma unroll 1
        for (int round = 0; orthonormalize_slice(table, work, shared, round, round + 1 == kRounds); ++round) {
        }
        sync(table.layers[work.index], work);  // D
      }
      __syncthreads();
      if (threadIdx.x == 0) ++work.step;
      __syncthreads();
    }
    index = matrix_of_block(table, work.index + 1);
    __syncthreads();  // the next matrix takes the same shared memory
  }
}

}  // namespace
}  // namespace s2d
