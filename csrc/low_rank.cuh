// What the kernels share that form sum_i (coefficients[i] U[:, i]) Vh[i, :] of a layer tile by tile.
#pragma once

#include "common.cuh"

namespace s2d {

// A penalty as it may be added: for 0 and for what is not finite -0, which changes no bit of what it is added to.
__device__ __forceinline__ float usable_sum(float sum) {
  const unsigned magnitude = __float_as_uint(sum) & 0x7fffffffu;
  return magnitude - 1u < 0x7f7fffffu ? sum : -0.0f;
}

template <typename Layer>
__device__ __forceinline__ int rank_of(const Layer& layer) {
  return layer.device_rank ? min(static_cast<int>(layer.rank), *layer.device_rank) : layer.rank;
}

// scaled[i][row] = coefficients[i] U[tile_row + row, i], read by all columns of the tile.
template <int kThreads, int kTileRows, typename Layer>
__device__ __forceinline__ void stage_scaled_u(const Layer& layer, int64_t tile_row, int rank,
                                               float (&scaled)[S2D_MAX_RANK][kTileRows]) {
  const int within = threadIdx.x % kTileRows;
  const int64_t row = tile_row + within;
  for (int i = threadIdx.x / kTileRows; i < rank; i += kThreads / kTileRows) {
    scaled[i][within] =
        row < layer.rows ? layer.coefficients[i] * layer.U[row * layer.u_row_stride + i * layer.u_col_stride] : 0.0f;
  }
}

inline int64_t element_bytes(int32_t dtype) { return dtype == S2D_FLOAT32 ? 4 : 2; }

}  // namespace s2d
