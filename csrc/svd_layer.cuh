// What the kernels of topk_svd know of a matrix, and where its parts of the workspace lie.
#pragma once

#include "common.cuh"

namespace s2d {
namespace {

constexpr int kThreads = 256;
constexpr int kPanel = 16;  // rows of A that are multiplied together: one mma tile
constexpr int kSlab = 128;  // rows of A that one block of threads works through
// Of a tile's rows in shared memory, and of its columns where it is kept column by column: so padded, one of the two
// products reads every bank once, the other some twice.
constexpr int kColumnPad = 8, kRowPitch = 24;
constexpr int kMaxBlock = 32;    // rows of a block Q_j, unless it is the identity
constexpr int kMaxRows = 256;    // rows of all blocks together
constexpr int kChunk = 1 << 14;  // elements of A whose largest one block of threads finds

enum Status : int32_t { kConverged = 0, kNotConverged = 1, kNonFinite = 2, kOverflow = 4 };

struct State {
  float scale;  // a power of two
  int32_t exponent;
  int32_t finite;
  int32_t bad;       // of finish: factors are zeros
  unsigned arrived;  // of the resident form: blocks at the team's barriers, all its barriers together
};

// Of one matrix, as all kernels see it. `row` and `col` strides are those of A, not of W.
struct Layer {
  const void* A;
  const float* start;
  float *U, *S, *Vh, *residual, *missed;
  int32_t* status;
  int64_t row_stride, col_stride;
  int64_t D;
  State* state;
  unsigned* largest;  // [chunks or team] bit patterns
  float *K, *Y, *Z;   // [rows, pitch_d], [rows, pitch_D], [rows, pitch_d]
  float* partial;     // [slabs or team, block, pitch_d]
  double* gram;       // [gram slabs or team, rows, rows]
  double* exchange;   // [2, team, rows, block]
  double* vectors;    // [rows, rows]: row i is the i-th eigenvector
  double* scratch;    // [2, rows, rows]
  double* theta;      // [rows] descending
  int32_t d, width, block, reads, rows, k;
  int32_t team;  // blocks that keep A on chip, 0 where it is streamed
  uint8_t dtype;
  bool wide, dense, vector_rows, vector_cols;
};

template <typename T>
__host__ __device__ constexpr T divide_up(T dividend, T divisor) {
  return (dividend + divisor - 1) / divisor;
}
template <typename T>
__host__ __device__ constexpr T round_up(T value, T unit) {
  return divide_up(value, unit) * unit;
}

__host__ __device__ inline int pitch_d(const Layer& layer) { return round_up(layer.d, 32); }
__host__ __device__ inline int64_t pitch_D(const Layer& layer) { return round_up<int64_t>(layer.D, kSlab); }
__host__ __device__ inline int slabs(const Layer& layer) { return static_cast<int>(divide_up<int64_t>(layer.D, kSlab)); }
// Slabs of Y for the Gram matrix: at most 16, whole ones of the product's.
__host__ __device__ inline int gram_slab(const Layer& layer) { return divide_up(slabs(layer), 16) * kSlab; }
__host__ __device__ inline int gram_slabs(const Layer& layer) {
  return static_cast<int>(divide_up<int64_t>(layer.D, gram_slab(layer)));
}

// Parts of the Gram matrix of Y.
__host__ __device__ inline int gram_parts(const Layer& layer) {
  return layer.team > 0 ? layer.team : gram_slabs(layer);
}

// The start's last row, which is random in every start.
__device__ inline const float* gaussian_of(const Layer& layer) {
  return layer.start + static_cast<int64_t>(layer.width - 1) * layer.d;
}

constexpr int kMaxLayers = 128;
struct Table {
  int32_t count;
  // The first block of each layer; ascending but in the resident form, where blocks take several layers in turn.
  // [count] is the number of blocks.
  uint32_t first[kMaxLayers + 1];
  Layer layers[kMaxLayers];
};
static_assert(sizeof(Table) <= 32764 - 16, "the table is a kernel parameter");

__device__ __forceinline__ int layer_of(const Table& table, uint32_t block) {
  return last_not_above(table.first, table.count, block);
}

}  // namespace
}  // namespace s2d
