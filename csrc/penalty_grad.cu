// grad[m, n] += sum_{i < r} (coefficients[i] U[m, i]) Vh[i, n],  r = min(rank, *device_rank), for all layers in one
// launch.
//
// Memory-bound for the ranks in use: each gradient element is read and written once, 16 bytes an access where the
// layer's alignment allows; Vh and U come from L2. Sums are formed in fp32, i ascending, and rounded once to the
// gradient's type, to the nearest or (bf16) stochastically; one that is 0 or not finite changes no bit of it.
#include "low_rank.cuh"

namespace s2d {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerWarp = 4;
constexpr int kTileRows = kThreads / kWarpSize * kRowsPerWarp;
static_assert(kRowsPerWarp == 4, "one 16-byte access to shared memory reads a component for a warp's rows");

template <typename T>
constexpr int kTileCols = kWarpSize * kPer16<T>;

struct Layer {
  void* grad;
  const float *U, *Vh, *coefficients;
  const int32_t* device_rank;
  const int64_t* device_seed;
  int64_t rows, cols, grad_stride, u_row_stride, u_col_stride, vh_stride;
  uint32_t tiles_across;
  uint8_t rank, dtype;
  bool vector_grad, vector_vh;  // every row starts at a multiple of 16 bytes
};

// 32764 bytes of parameters on sm_70 and later.
constexpr int kMaxLayers = 300;
struct Table {
  int32_t count;
  uint32_t first_tile[kMaxLayers + 1];  // ascending; [count] is the number of tiles
  Layer layers[kMaxLayers];
};
static_assert(sizeof(Table) <= 32764, "the table is a kernel parameter");

using ScaledU = float[S2D_MAX_RANK][kTileRows];

// The random numbers of a rounding, as reference.py's `rounding_bits` defines them.
__device__ __forceinline__ uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
__device__ __forceinline__ uint32_t key_of(int64_t seed) {
  return mixed(static_cast<uint32_t>(seed) ^ mixed(static_cast<uint32_t>(seed >> 32) ^ 0x9e3779b9u));
}
__device__ __forceinline__ uint32_t row_key_of(int64_t row, uint32_t key) {
  return mixed(static_cast<uint32_t>(row) ^ key);
}
// Of columns 2 half and 2 half + 1, in the lower and the upper 16 bits.
__device__ __forceinline__ uint32_t random_pair(uint32_t row_key, int64_t half) {
  return mixed(row_key ^ static_cast<uint32_t>(half));
}
// The bf16 below or above in magnitude, as the upper 16 bits; `random` has 16. From the largest bf16 on always below.
__device__ __forceinline__ uint32_t stochastic_upper(float value, uint32_t random) {
  const uint32_t bits = __float_as_uint(value);
  return bits + ((bits & 0x7fffffffu) < 0x7f7f0000u ? random : 0u);
}
__device__ __forceinline__ bf16 stochastically_rounded(float value, uint32_t row_key, int64_t col) {
  const uint32_t random = random_pair(row_key, col >> 1);
  return half_of<bf16>(stochastic_upper(value, col & 1 ? random >> 16 : random & 0xffffu), 1);
}
// 8 adjacent columns from an even one on.
__device__ __forceinline__ uint4 pack_stochastic(const float (&values)[kPer16<bf16>], uint32_t row_key, int64_t col) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t random = random_pair(row_key, (col >> 1) + i);
    const uint32_t lower = stochastic_upper(values[2 * i], random & 0xffffu);
    const uint32_t upper = stochastic_upper(values[2 * i + 1], random >> 16);
    word[i] = lower >> 16 | (upper & 0xffff0000u);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// One tile [kTileRows, kTileCols]: a warp owns kRowsPerWarp rows, a lane kPer16 columns, adjacent where rows are
// aligned.
template <typename T, bool kStochastic = false>
__device__ __forceinline__ void add_tile(const Layer& layer, uint32_t tile, int rank, ScaledU& scaled) {
  constexpr int N = kPer16<T>;
  const int lane = threadIdx.x % kWarpSize, first_within = threadIdx.x / kWarpSize * kRowsPerWarp;
  const int64_t tile_row = static_cast<int64_t>(tile / layer.tiles_across) * kTileRows;
  const int64_t tile_col = static_cast<int64_t>(tile % layer.tiles_across) * kTileCols<T>;
  const int64_t first_row = tile_row + first_within;
  const int64_t first_col = tile_col + (layer.vector_grad ? lane * N : lane);
  const int step = layer.vector_grad ? 1 : kWarpSize;
  // What this lane has: columns first_col + e * step below `width`, rows below `height`.
  const int width = static_cast<int>(min(layer.cols - first_col, static_cast<int64_t>(kTileCols<T>)));
  const int height = static_cast<int>(min(layer.rows - first_row, static_cast<int64_t>(kRowsPerWarp)));
  const bool whole = layer.vector_grad && width >= N;
  T* grad = static_cast<T*>(layer.grad) + first_row * layer.grad_stride + first_col;
  const float* vh = layer.Vh + first_col;

  // Requested first: what follows hides the latency.
  uint4 packed[kRowsPerWarp];
  if (whole) {
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      if (r < height) packed[r] = load_16(grad + r * layer.grad_stride);
    }
  }
  stage_scaled_u<kThreads>(layer, tile_row, rank, scaled);
  __syncthreads();

  if (whole) {
    float sum[kRowsPerWarp][N] = {};
    // Unrolled, it would need registers that three blocks a multiprocessor do not leave; the warps hide the latency.
#pragma unroll 1
    for (int i = 0; i < rank; ++i, vh += layer.vh_stride) {
      float u[kRowsPerWarp], v[N];
      unpack<float>(load_16(&scaled[i][first_within]), u);
#pragma unroll
      for (int e = 0; e < N; e += 4) {
        float part[4];
        if (layer.vector_vh) {
          unpack<float>(load_16_constant(vh + e), part);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) part[j] = __ldg(vh + e + j);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) v[e + j] = part[j];
      }
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
        for (int e = 0; e < N; ++e) sum[r][e] = fmaf(u[r], v[e], sum[r][e]);
      }
    }
    [[maybe_unused]] const uint32_t key = kStochastic ? key_of(*layer.device_seed) : 0;
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      if (r >= height) break;
      float values[N];
      unpack<T>(packed[r], values);
#pragma unroll
      for (int e = 0; e < N; ++e) values[e] += usable_sum(sum[r][e]);
      if constexpr (kStochastic) {
        store_16(grad + r * layer.grad_stride, pack_stochastic(values, row_key_of(first_row + r, key), first_col));
      } else {
        store_16(grad + r * layer.grad_stride, pack<T>(values));
      }
    }
    return;
  }
  // Rows that are not aligned, and the last columns of aligned ones: the same sums in the same order.
  [[maybe_unused]] const uint32_t key = kStochastic ? key_of(*layer.device_seed) : 0;
  // Random numbers of two at a time would need more registers than three blocks a multiprocessor leave.
#pragma unroll(kStochastic ? 1 : 2)
  for (int e = 0; e < N; ++e) {
    const int col = e * step;
    if (col >= width) break;
    T element[kRowsPerWarp];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      if (r < height) element[r] = grad[r * layer.grad_stride + col];
    }
    float sum[kRowsPerWarp] = {};
    for (int i = 0; i < rank; ++i) {
      float u[kRowsPerWarp];
      unpack<float>(load_16(&scaled[i][first_within]), u);
      const float v = __ldg(vh + i * layer.vh_stride + col);
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) sum[r] = fmaf(u[r], v, sum[r]);
    }
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      if constexpr (kStochastic) {
        if (r < height) {
          grad[r * layer.grad_stride + col] = stochastically_rounded(to_float(element[r]) + usable_sum(sum[r]),
                                                                row_key_of(first_row + r, key), first_col + col);
        }
      } else {
        if (r < height) grad[r * layer.grad_stride + col] = from_float<T>(to_float(element[r]) + usable_sum(sum[r]));
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 3) add_penalty_grad(S2D_GRID_CONSTANT(Table) table) {
  S2D_SHARED(float, scaled, [S2D_MAX_RANK][kTileRows]);
  const uint32_t tile = blockIdx.x;
  const int index = last_not_above(table.first_tile, table.count, tile);
  const Layer& layer = table.layers[index];
  const int rank = rank_of(layer);
  if (rank <= 0) return;
  const uint32_t within = tile - table.first_tile[index];
  switch (layer.dtype) {
    case S2D_FLOAT32:
      return add_tile<float>(layer, within, rank, scaled);
    case S2D_BFLOAT16:
      return add_tile<bf16>(layer, within, rank, scaled);
    default:
      return add_tile<fp16>(layer, within, rank, scaled);
  }
}

// Of bf16 layers with a seed.
__global__ void __launch_bounds__(kThreads, 3) add_penalty_grad_stochastic(S2D_GRID_CONSTANT(Table) table) {
  S2D_SHARED(float, scaled, [S2D_MAX_RANK][kTileRows]);
  const uint32_t tile = blockIdx.x;
  const int index = last_not_above(table.first_tile, table.count, tile);
  const Layer& layer = table.layers[index];
  const int rank = rank_of(layer);
  if (rank <= 0) return;
  add_tile<bf16, true>(layer, tile - table.first_tile[index], rank, scaled);
}

bool is_empty(const s2d_penalty_layer& layer) { return layer.rank == 0 || layer.rows == 0 || layer.cols == 0; }
bool is_stochastic(const s2d_penalty_layer& layer) { return layer.device_seed && layer.dtype == S2D_BFLOAT16; }

bool is_valid(const s2d_penalty_layer& layer) {
  if (layer.rows < 0 || layer.cols < 0 || layer.rank < 0 || layer.rank > S2D_MAX_RANK || layer.dtype < S2D_FLOAT32 ||
      layer.dtype > S2D_FLOAT16 || (layer.device_seed && layer.dtype == S2D_FLOAT16)) {
    return false;
  }
  if (is_empty(layer)) return true;
  // Rows that share elements would be added to in an order that nothing fixes.
  const bool overlapping = layer.rows > 1 && layer.grad_stride < layer.cols && layer.grad_stride > -layer.cols;
  return layer.grad && layer.U && layer.Vh && layer.coefficients && !overlapping &&
         aligned(layer.grad, element_bytes(layer.dtype)) && aligned(layer.U, 4) && aligned(layer.Vh, 4) &&
         aligned(layer.coefficients, 4) && aligned(layer.device_rank, 4) && aligned(layer.device_seed, 8);
}

int64_t divide_up(int64_t dividend, int64_t divisor) { return dividend / divisor + (dividend % divisor != 0); }

int64_t tiles_across(const s2d_penalty_layer& layer) {
  return divide_up(layer.cols, layer.dtype == S2D_FLOAT32 ? kTileCols<float> : kTileCols<bf16>);
}

Layer table_row(const s2d_penalty_layer& layer) {
  Layer row{};
  row.grad = layer.grad;
  row.U = layer.U;
  row.Vh = layer.Vh;
  row.coefficients = layer.coefficients;
  row.device_rank = layer.device_rank;
  row.device_seed = layer.device_seed;
  row.rows = layer.rows;
  row.cols = layer.cols;
  row.grad_stride = layer.grad_stride;
  row.u_row_stride = layer.u_row_stride;
  row.u_col_stride = layer.u_col_stride;
  row.vh_stride = layer.vh_stride;
  row.tiles_across = static_cast<uint32_t>(tiles_across(layer));
  row.rank = static_cast<uint8_t>(layer.rank);
  row.dtype = static_cast<uint8_t>(layer.dtype);
  row.vector_grad =
      aligned(layer.grad, 16) && (layer.rows == 1 || layer.grad_stride * element_bytes(layer.dtype) % 16 == 0);
  row.vector_vh = aligned(layer.Vh, 16) && (layer.rank == 1 || layer.vh_stride % 4 == 0);
  return row;
}

constexpr int64_t kMaxTiles = 0x7fffffff;  // the grid's limit

int launch_table(const Table& table, bool stochastic, s2d_stream stream) {
  if (table.count == 0) return S2D_OK;
  return launch(stochastic ? add_penalty_grad_stochastic : add_penalty_grad,
                {dim3(table.first_tile[table.count]), dim3(kThreads)}, stream, table);
}

// The layers that are rounded stochastically, or the others.
int launch_layers(const s2d_penalty_layer* layers, int32_t count, bool stochastic, s2d_stream stream) {
  Table table{};
  for (int32_t i = 0; i < count; ++i) {
    if (is_empty(layers[i]) || is_stochastic(layers[i]) != stochastic) continue;
    const int64_t tiles = divide_up(layers[i].rows, kTileRows) * tiles_across(layers[i]);
    if (table.count == kMaxLayers || table.first_tile[table.count] + tiles > kMaxTiles) {
      if (const int status = launch_table(table, stochastic, stream)) return status;
      table.count = 0;
    }
    table.layers[table.count] = table_row(layers[i]);
    table.first_tile[table.count + 1] = table.first_tile[table.count] + static_cast<uint32_t>(tiles);
    ++table.count;
  }
  return launch_table(table, stochastic, stream);
}

}  // namespace

int load_penalty_grad() {
  const int status = load(add_penalty_grad);
  return status ? status : load(add_penalty_grad_stochastic);
}

}  // namespace s2d

int s2d_add_penalty_grad(const s2d_penalty_layer* layers, int32_t count, void*, size_t, s2d_stream stream) {
  using namespace s2d;
  if (count < 0 || (count > 0 && layers == nullptr)) return S2D_BAD_ARGUMENT;
  for (int32_t i = 0; i < count; ++i) {
    if (!is_valid(layers[i])) return S2D_BAD_ARGUMENT;
    if (!is_empty(layers[i]) && divide_up(layers[i].rows, kTileRows) > kMaxTiles / tiles_across(layers[i])) {
      return S2D_BAD_ARGUMENT;
    }
  }
  bool some = false;
  for (int32_t i = 0; i < count; ++i) some = some || is_stochastic(layers[i]);
  if (const int status = launch_layers(layers, count, false, stream)) return status;
  return some ? launch_layers(layers, count, true, stream) : S2D_OK;
}
