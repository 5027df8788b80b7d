// The fused product of topk_svd, Y = Q A^T and Z = Y A from one read of A, on the tensor cores at fp32's precision.
#pragma once

#include "svd_layer.cuh"

namespace s2d {
namespace {

// x as the sum of two tf32 numbers, 21 bits of it, in three instructions (four if the first is rounded). The second is
// rounded by half a unit added to it; the tensor cores leave out the bits behind its tf32 ones. Of the two factors of a
// product one is split with rounding: the product of the two small parts is left out, and with the first parts
// truncated in both it would always have the sign of the whole.
template <bool kRounded>
__device__ __forceinline__ void split(float x, uint32_t& big, uint32_t& small) {
  big = (__float_as_uint(x) + (kRounded ? 0x1000u : 0u)) & 0xffffe000u;
  small = __float_as_uint(x - __uint_as_float(big)) + 0x1000u;
}

// d += a b to nearly fp32: the product of the two small parts, 2^-22 of the whole, is left out. 16-bit numbers are
// tf32 numbers, so kExactA saves theirs.
template <bool kExactA>
__device__ __forceinline__ void mma_fp32(float (&d)[4], const uint32_t (&a)[2][4], const uint32_t (&b)[2][2]) {
  if constexpr (!kExactA) mma_m16n8k8_tf32(d, a[1], b[0]);
  mma_m16n8k8_tf32(d, a[0], b[1]);
  mma_m16n8k8_tf32(d, a[0], b[0]);
}

template <typename T>
__device__ __forceinline__ float widen(T value, uint8_t dtype);
template <>
__device__ __forceinline__ float widen<float>(float value, uint8_t) {
  return value;
}
// 16 bits of either type, told apart at run time: one kernel for both.
template <>
__device__ __forceinline__ float widen<uint16_t>(uint16_t value, uint8_t dtype) {
  return dtype == S2D_BFLOAT16 ? __uint_as_float(static_cast<unsigned>(value) << 16)
                               : to_float(__ushort_as_half(value));
}

// Elements of one tile [kPanel, d] in shared memory.
inline __host__ __device__ int tile_elements(int d, bool by_cols) {
  return by_cols ? round_up(d, 16) * kRowPitch : kPanel * (round_up(d, 16) + kColumnPad);
}

// The columns of A that one warp of kWarps owns: it alone copies and multiplies them, so that a tile needs no barrier.
struct Columns {
  int first, end;
};
template <int kWarps>
__device__ __forceinline__ Columns columns_of_warp(int d) {
  const int warp = threadIdx.x / kWarpSize, tiles = divide_up(d, 16), per_warp = divide_up(tiles, kWarps);
  return {min(warp * per_warp, tiles) * 16, min((warp + 1) * per_warp, tiles) * 16};
}

// A tile of a panel's rows and all columns, of which each warp copies those it works on.
template <typename T>
struct Tile {
  T* memory;
  int row, col;  // strides

  __device__ __forceinline__ T& operator()(int i, int j) const { return memory[i * row + j * col]; }

  __device__ __forceinline__ void load(const Layer& layer, int64_t first_row, Columns columns) const {
    const int first_col = columns.first, end_col = columns.end;
    constexpr int kPer = 16 / sizeof(T);
    const T* A = static_cast<const T*>(layer.A);
    const int lane = threadIdx.x % kWarpSize;
    if (layer.vector_rows) {
      const int across = (end_col - first_col) / kPer;
#pragma unroll 1
      for (int v = lane; v < kPanel * across; v += kWarpSize) {
        const int i = v / across, j = first_col + v % across * kPer;
        const bool valid = first_row + i < layer.D && j < layer.d;
        cp_async_16(&(*this)(i, j), A + (valid ? (first_row + i) * layer.row_stride + j : 0), valid);
      }
    } else if (layer.vector_cols) {
#pragma unroll 1
      for (int v = lane; v < (end_col - first_col) * (kPanel / kPer); v += kWarpSize) {
        const int i = v % (kPanel / kPer) * kPer, j = first_col + v / (kPanel / kPer);
        const bool valid = first_row + i < layer.D && j < layer.d;
        cp_async_16(&(*this)(i, j), A + (valid ? first_row + i + j * layer.col_stride : 0), valid);
      }
    } else {
#pragma unroll 1
      for (int v = lane; v < kPanel * (end_col - first_col); v += kWarpSize) {
        const int i = v / (end_col - first_col), j = first_col + v % (end_col - first_col);
        const bool valid = first_row + i < layer.D && j < layer.d;
        (*this)(i, j) = valid ? A[(first_row + i) * layer.row_stride + j * layer.col_stride] : T(0);
      }
    }
  }
};

// Shared memory in which the warps' parts of a panel's Y meet.
template <int kWarps, int kN>
struct Meeting {
  float part[kWarps][8 * kN][kPanel];
  float whole[8 * kN][kPanel + 4];
};

// The rows of Q that a read takes, as multiply_panel wants them: from memory for each panel, or from registers.
template <int kTiles, int kN, bool kHeld>
struct Fragments {
  const float* Q;
  int rows;
  float held[kHeld ? 2 * kTiles : 1][kN][2];

  __device__ __forceinline__ Fragments(const float* Q, const Layer& layer, int rows, Columns columns)
      : Q(Q), rows(rows) {
    if constexpr (kHeld) {
#pragma unroll
      for (int s = 0; s < 2 * kTiles; ++s) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) held[s][n][e] = element(layer, columns, s, n, e);
        }
      }
    }
  }
  // Of the lane: Q^T [columns.first + 8 s + t + 4 e, 8 n + g].
  __device__ __forceinline__ float element(const Layer& layer, Columns columns, int s, int n, int e) const {
    const int lane = threadIdx.x % kWarpSize, r = n * 8 + lane / 4, column = columns.first + 8 * s + lane % 4 + e * 4;
    return r < rows && column < (kHeld ? min(layer.d, columns.end) : layer.d) ? Q[r * pitch_d(layer) + column] : 0.0f;
  }
  __device__ __forceinline__ void get(uint32_t (&q)[2][2], const Layer& layer, Columns columns, int s, int n) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float value;
      if constexpr (kHeld) {
        value = held[s][n][e];
      } else {
        value = element(layer, columns, s, n, e);
      }
      split<true>(value, q[0][e], q[1][e]);
    }
  }
};

// One panel: Y[r, :] = Q[r, :] (scale A)^T for up to 8 kN rows, and its part of Z^T, added to `sum`.
//
// A warp owns up to kTiles * 16 columns of A: it multiplies them for its part of Y (summed over the warps in a fixed
// order), and then, with the whole Y, for its columns of Z. The accumulators of the tensor cores truncate, so they
// never hold more than a short sum; those go to registers that round.
template <typename T, int kWarps, int kTiles, int kN, bool kHeld>
__device__ __forceinline__ void multiply_panel(const Layer& layer, const Tile<T>& A, float scale,
                                               const Fragments<kTiles, kN, kHeld>& Q, Columns columns,
                                               Meeting<kWarps, kN>& meeting, float* Y, float (&sum)[kTiles][kN][4]) {
  constexpr int kRows = 8 * kN;
  constexpr bool kExactA = sizeof(T) == 2;
  constexpr int kStepsAtOnce = 4;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int first_col = columns.first, end_col = columns.end;
  // Y^T [16 rows of A, kRows] = A Q^T over this warp's columns
  float y[kN][4] = {};
  const int steps = (end_col - first_col) / 8;
  const auto add_steps = [&](int begin) {
    float fresh[kN][4] = {};
#pragma unroll
    for (int s = begin; s < begin + kStepsAtOnce; ++s) {
      const int j = first_col + 8 * s;
      if (s >= steps) break;
      uint32_t a[2][4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        split<false>(scale * widen<T>(A(g + e % 2 * 8, j + t + e / 2 * 4), layer.dtype), a[0][e], a[1][e]);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        uint32_t q[2][2];
        Q.get(q, layer, columns, s, n);
        mma_fp32<kExactA>(fresh[n], a, q);
      }
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) y[n][e] += fresh[n][e];
    }
  };
  if constexpr (kHeld) {
#pragma unroll
    for (int begin = 0; begin < 2 * kTiles; begin += kStepsAtOnce) {
      if (begin < steps) add_steps(begin);
    }
  } else {
#pragma unroll 1
    for (int begin = 0; begin < steps; begin += kStepsAtOnce) add_steps(begin);
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) meeting.part[warp][n * 8 + 2 * t + e % 2][g + e / 2 * 8] = y[n][e];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kPanel; i += kWarps * kWarpSize) {
    const int r = i / kPanel, row = i % kPanel;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += meeting.part[w][r][row];
    meeting.whole[r][row] = total;
    if (r < Q.rows) Y[r * pitch_D(layer) + row] = total;
  }
  __syncthreads();

  // Z^T [16 columns of A, kRows] += A^T Y^T
  uint32_t yt[2][kN][2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        split<true>(meeting.whole[n * 8 + g][half * 8 + t + e * 4], yt[half][n][0][e], yt[half][n][1][e]);
    }
  }
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const int j = first_col + m * 16;
    if (j >= end_col) break;
    float fresh[kN][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        split<false>(scale * widen<T>(A(half * 8 + t + e / 2 * 4, j + g + e % 2 * 8), layer.dtype), a[0][e], a[1][e]);
#pragma unroll
      for (int n = 0; n < kN; ++n) mma_fp32<kExactA>(fresh[n], a, yt[half][n]);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[m][n][e] += fresh[n][e];
    }
  }
}

// Z[r, columns of this warp] = what multiply_panel summed.
template <int kTiles, int kN>
__device__ __forceinline__ void store_columns(float* Z, int pitch, int rows, Columns columns,
                                              const float (&sum)[kTiles][kN][4]) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    const int j = columns.first + m * 16;
    if (j >= columns.end) break;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = n * 8 + 2 * t + e % 2, column = j + g + e / 2 * 8;
        if (r < rows && column < pitch) Z[r * pitch + column] = sum[m][n][e];
      }
    }
  }
}

// Y[group, slab] and this slab's part of Z[group, :] for one slab of rows and one group of up to 8 kN rows of Q.
template <typename T, int kWarps, int kTiles, int kN>
__global__ void __launch_bounds__(kWarps* kWarpSize, 1)
    product(S2D_GRID_CONSTANT(Table) table, int step, int stages) {
  constexpr int kRows = 8 * kN;
  const int index = layer_of(table, blockIdx.x);
  const Layer& layer = table.layers[index];
  const int within = static_cast<int>(blockIdx.x - table.first[index]);
  // the groups of a slab one after another, so that all but the first find it in L2
  const int groups = divide_up(layer.block, kRows), slab = within / groups, first_r = within % groups * kRows;
  const int b = layer.block, d = layer.d, pitch = pitch_d(layer);
  const int64_t first_row = static_cast<int64_t>(slab) * kSlab;
  float* Y = layer.Y + static_cast<int64_t>(step * b + first_r) * pitch_D(layer) + first_row;
  float* partial = layer.partial + (static_cast<int64_t>(slab) * b + first_r) * pitch;
  const float* Q = layer.K + static_cast<int64_t>(step * b + first_r) * pitch;
  const int rows = min(kRows, b - first_r);
  if (!layer.state->finite) {
    for (int i = threadIdx.x; i < rows * kSlab; i += kWarps * kWarpSize) Y[i / kSlab * pitch_D(layer) + i % kSlab] = 0.0f;
    for (int i = threadIdx.x; i < rows * pitch; i += kWarps * kWarpSize) partial[i] = 0.0f;
    return;
  }
  const float scale = layer.state->scale;

  S2D_DYNAMIC_SHARED(unsigned char, shared);
  using Room = Meeting<kWarps, kN>;
  S2D_SHARED(Room, meeting, [1]);
  const Columns columns = columns_of_warp<kWarps>(d);
  const int elements = tile_elements(d, layer.vector_cols);
  const auto tile_of = [&](int panel) {
    T* memory = reinterpret_cast<T*>(shared) + panel % stages * elements;
    return layer.vector_cols ? Tile<T>{memory, 1, kRowPitch} : Tile<T>{memory, round_up(d, 16) + kColumnPad, 1};
  };

  const Fragments<kTiles, kN, false> fragments(Q, layer, rows, columns);
  float sum[kTiles][kN][4] = {};
  const int panels = static_cast<int>(divide_up<int64_t>(min(static_cast<int64_t>(kSlab), layer.D - first_row), kPanel));
  if (stages == 2) {
    tile_of(0).load(layer, first_row, columns);
    cp_async_commit();
  }
  for (int panel = 0; panel < panels; ++panel) {
    const Tile<T> A = tile_of(panel);
    if (stages == 2) {
      if (panel + 1 < panels) {
        tile_of(panel + 1).load(layer, first_row + (panel + 1) * kPanel, columns);
      }
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      A.load(layer, first_row + panel * kPanel, columns);
      cp_async_commit();
      cp_async_wait<0>();
    }
    __syncwarp();

    multiply_panel(layer, A, scale, fragments, columns, meeting[0], Y + panel * kPanel, sum);
    __syncwarp();  // before the tile is overwritten
  }
  store_columns(partial, pitch, rows, columns, sum);
  // Rows of Y beyond the last panel count as zero in the Gram matrix.
  for (int i = threadIdx.x; i < rows * kSlab; i += kWarps * kWarpSize) {
    if (i % kSlab >= panels * kPanel) Y[i / kSlab * pitch_D(layer) + i % kSlab] = 0.0f;
  }
}

}  // namespace
}  // namespace s2d
