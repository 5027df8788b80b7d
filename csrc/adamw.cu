// One step of AdamW for all tensors in one launch, with the spectral penalty P = U diag(coefficients) Vh of each layer
// formed on the fly from its factors:
//
//   g' = c (g / grad_scale) + P    coupled; c is the clipping coefficient, of the sum where the penalty is clipped too
//   p  = p - lr wd p;   m = m + (1 - b1) (g' - m);   v = b2 v + (1 - b2) g'^2
//   p  = p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps);   decoupled: then p + P, with g' = c (g / grad_scale)
//
// Memory-bound: p, g, m, v are read and p, m, v written once, 16 bytes an access where the alignment allows; Vh and U come
// from L2. fp32 arithmetic, one rounding to the tensors' type. An element of P that is 0 or not finite changes no bit.
#include "low_rank.cuh"

namespace s2d {
namespace {

constexpr int kThreads = 128;
// 4 tensors of 2 rows in flight a thread leave the registers for 4 blocks a multiprocessor.
constexpr int kRowsPerWarp = 2;
constexpr int kTileRows = kThreads / kWarpSize * kRowsPerWarp;

template <typename T>
constexpr int kTileCols = kWarpSize * kPer16<T>;

struct Layer {
  void *param, *exp_avg, *exp_avg_sq;
  const void* grad;
  const float *step, *U, *Vh, *coefficients;
  const int32_t* device_rank;
  int64_t rows, cols, param_stride, grad_stride, u_row_stride, u_col_stride, vh_stride;
  uint32_t tiles_across;
  uint16_t last_cols;  // of a flat tensor, laid out in rows of a tile: columns of the last row; else 0
  uint8_t rank, dtype, group;
  bool vector_rows, vector_vh;  // every row starts at a multiple of 16 bytes
};

struct Group {
  const float* device_lr;
  float lr, one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps, weight_decay;
  int32_t maximize;
};

// 32764 bytes of parameters on sm_70 and later.
constexpr int kMaxLayers = 208;
struct Table {
  const float *clip_coef, *grad_scale, *found_inf;
  int32_t decoupled, clip_penalty;
  Group groups[S2D_MAX_GROUPS];
  int32_t count, group_count;
  uint32_t first_tile[kMaxLayers + 1];  // ascending; [count] is the number of tiles
  Layer layers[kMaxLayers];
};
static_assert(sizeof(Table) <= 32764, "the table is a kernel parameter");

// What a step does to each element of a layer.
struct Rule {
  float grad_factor, penalty_factor;
  float one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, inverse_root;
  bool decoupled;
};

__device__ __forceinline__ Rule rule_of(const Table& table, const Layer& layer) {
  const Group& group = table.groups[layer.group];
  const float clip = table.clip_coef ? *table.clip_coef : 1.0f;
  const float scale = table.grad_scale ? *table.grad_scale : 1.0f;
  const float lr = group.device_lr ? *group.device_lr : group.lr;
  Rule rule;
  rule.decoupled = table.decoupled;
  rule.grad_factor = (group.maximize ? -clip : clip) / scale;
  rule.penalty_factor = table.clip_penalty ? clip : 1.0f;
  rule.one_minus_beta1 = group.one_minus_beta1;
  rule.beta2 = group.beta2;
  rule.one_minus_beta2 = group.one_minus_beta2;
  rule.eps = group.eps;
  rule.decay = lr * group.weight_decay;
  // 1 - b^t without the cancellation of b near 1.
  rule.step_size = lr / -expm1f(*layer.step * group.log_beta1);
  rule.inverse_root = 1.0f / sqrtf(-expm1f(*layer.step * group.log_beta2));
  return rule;
}

__device__ __forceinline__ void update(const Rule& rule, float grad, float penalty, float& param, float& exp_avg,
                                       float& exp_avg_sq) {
  grad = fmaf(grad, rule.grad_factor, rule.decoupled ? -0.0f : usable_sum(penalty * rule.penalty_factor));
  exp_avg = fmaf(rule.one_minus_beta1, grad - exp_avg, exp_avg);
  exp_avg_sq = fmaf(rule.one_minus_beta2 * grad, grad, rule.beta2 * exp_avg_sq);
  param = fmaf(-rule.decay, param, param);
  param -= rule.step_size * exp_avg / fmaf(sqrtf(exp_avg_sq), rule.inverse_root, rule.eps);
  if (rule.decoupled) param += usable_sum(penalty);
}

// The elements of one word of each tensor, in place: all words at once would need the registers of another block.
template <typename T>
__device__ __forceinline__ void update_word(const Rule& rule, unsigned grad, const float* penalty, unsigned& param,
                                            unsigned& exp_avg, unsigned& exp_avg_sq) {
  if constexpr (sizeof(T) == 4) {
    float p = __uint_as_float(param), m = __uint_as_float(exp_avg), v = __uint_as_float(exp_avg_sq);
    update(rule, __uint_as_float(grad), penalty[0], p, m, v);
    param = __float_as_uint(p);
    exp_avg = __float_as_uint(m);
    exp_avg_sq = __float_as_uint(v);
  } else {
    float p[2], m[2], v[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      p[i] = to_float(half_of<T>(param, i));
      m[i] = to_float(half_of<T>(exp_avg, i));
      v[i] = to_float(half_of<T>(exp_avg_sq, i));
      update(rule, to_float(half_of<T>(grad, i)), penalty[i], p[i], m[i], v[i]);
    }
    param = pack_2<T>(p[0], p[1]);
    exp_avg = pack_2<T>(m[0], m[1]);
    exp_avg_sq = pack_2<T>(v[0], v[1]);
  }
}

using ScaledU = float[S2D_MAX_RANK][kTileRows];

// One tile [kTileRows, kTileCols]: a warp owns kRowsPerWarp rows, a lane kPer16 columns, adjacent where rows are
// aligned.
template <typename T>
__device__ __forceinline__ void update_tile(const Table& table, const Layer& layer, uint32_t tile, int rank,
                                            ScaledU& scaled) {
  constexpr int N = kPer16<T>;
  const int lane = threadIdx.x % kWarpSize, first_within = threadIdx.x / kWarpSize * kRowsPerWarp;
  const int64_t tile_row = static_cast<int64_t>(tile / layer.tiles_across) * kTileRows;
  const int64_t tile_col = static_cast<int64_t>(tile % layer.tiles_across) * kTileCols<T>;
  const int64_t first_row = tile_row + first_within;
  const int64_t first_col = tile_col + (layer.vector_rows ? lane * N : lane);
  const int step = layer.vector_rows ? 1 : kWarpSize;
  // What this lane has of a row: columns first_col + e * step below its width.
  const auto width = [&](int r) {
    if (first_row + r >= layer.rows) return 0;
    const int64_t cols = layer.last_cols && first_row + r == layer.rows - 1 ? layer.last_cols : layer.cols;
    return static_cast<int>(max(min(cols - first_col, int64_t{kTileCols<T>}), int64_t{0}));
  };
  const int64_t start = first_row * layer.param_stride + first_col;
  T* param = static_cast<T*>(layer.param) + start;
  T* exp_avg = static_cast<T*>(layer.exp_avg) + start;
  T* exp_avg_sq = static_cast<T*>(layer.exp_avg_sq) + start;
  const T* grad = static_cast<const T*>(layer.grad) + first_row * layer.grad_stride + first_col;

  // Requested first: what follows hides the latency.
  uint4 packed[kRowsPerWarp][4];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    if (layer.vector_rows && width(r) >= N) {
      packed[r][0] = load_16(grad + r * layer.grad_stride);
      packed[r][1] = load_16(param + r * layer.param_stride);
      packed[r][2] = load_16(exp_avg + r * layer.param_stride);
      packed[r][3] = load_16(exp_avg_sq + r * layer.param_stride);
    }
  }
  if (rank > 0) {
    stage_scaled_u<kThreads>(layer, tile_row, rank, scaled);
    __syncthreads();
  }
  const Rule rule = rule_of(table, layer);

  // Both rows together, so that they share the columns of Vh; the first is never the narrower one.
  if (layer.vector_rows && width(0) >= N) {
    float penalty[kRowsPerWarp][N] = {};
    const float* vh = layer.Vh + first_col;
#pragma unroll 1
    for (int i = 0; i < rank; ++i, vh += layer.vh_stride) {
      const float u[kRowsPerWarp] = {scaled[i][first_within], scaled[i][first_within + 1]};
#pragma unroll
      for (int e = 0; e < N; e += 4) {
        float v[4];
        if (layer.vector_vh) {
          unpack<float>(load_16_constant(vh + e), v);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) v[j] = __ldg(vh + e + j);
        }
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
          for (int j = 0; j < 4; ++j) penalty[r][e + j] = fmaf(u[r], v[j], penalty[r][e + j]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      if (width(r) < N) continue;
      update_word<T>(rule, packed[r][0].x, &penalty[r][0], packed[r][1].x, packed[r][2].x, packed[r][3].x);
      update_word<T>(rule, packed[r][0].y, &penalty[r][N / 4], packed[r][1].y, packed[r][2].y, packed[r][3].y);
      update_word<T>(rule, packed[r][0].z, &penalty[r][N / 2], packed[r][1].z, packed[r][2].z, packed[r][3].z);
      update_word<T>(rule, packed[r][0].w, &penalty[r][3 * N / 4], packed[r][1].w, packed[r][2].w, packed[r][3].w);
      store_16(param + r * layer.param_stride, packed[r][1]);
      store_16(exp_avg + r * layer.param_stride, packed[r][2]);
      store_16(exp_avg_sq + r * layer.param_stride, packed[r][3]);
    }
  }
  // Rows that are not aligned, and the last columns of aligned ones: the same sums in the same order.
#pragma unroll 1
  for (int item = 0; item < kRowsPerWarp * N; ++item) {
    const int r = item / N, col = item % N * step, columns = width(r);
    if (col >= columns || (layer.vector_rows && columns >= N)) continue;
    float penalty = 0.0f;
    for (int i = 0; i < rank; ++i) {
      penalty = fmaf(scaled[i][first_within + r], __ldg(layer.Vh + i * layer.vh_stride + first_col + col), penalty);
    }
    const int64_t place = r * layer.param_stride + col;
    float p = to_float(param[place]), m = to_float(exp_avg[place]), v = to_float(exp_avg_sq[place]);
    update(rule, to_float(grad[r * layer.grad_stride + col]), penalty, p, m, v);
    param[place] = from_float<T>(p);
    exp_avg[place] = from_float<T>(m);
    exp_avg_sq[place] = from_float<T>(v);
  }
}

__global__ void __launch_bounds__(kThreads, 4) adamw(S2D_GRID_CONSTANT(Table) table) {
  S2D_SHARED(float, scaled, [S2D_MAX_RANK][kTileRows]);
  if (table.found_inf && *table.found_inf != 0.0f) return;
  const uint32_t tile = blockIdx.x;
  const int index = last_not_above(table.first_tile, table.count, tile);
  const Layer& layer = table.layers[index];
  const int rank = rank_of(layer);
  const uint32_t within = tile - table.first_tile[index];
  switch (layer.dtype) {
    case S2D_FLOAT32:
      return update_tile<float>(table, layer, within, rank, scaled);
    case S2D_BFLOAT16:
      return update_tile<bf16>(table, layer, within, rank, scaled);
    default:
      return update_tile<fp16>(table, layer, within, rank, scaled);
  }
}

int64_t tile_cols(int32_t dtype) { return dtype == S2D_FLOAT32 ? kTileCols<float> : kTileCols<bf16>; }

bool is_empty(const s2d_adamw_layer& layer) { return layer.rows == 0 || layer.cols == 0; }

bool overlapping(const s2d_adamw_layer& layer, int64_t stride) {
  return layer.rows > 1 && stride < layer.cols && stride > -layer.cols;
}

bool is_valid(const s2d_adamw_layer& layer, int32_t group_count) {
  if (layer.rows < 0 || layer.cols < 0 || layer.rank < 0 || layer.rank > S2D_MAX_RANK || layer.dtype < S2D_FLOAT32 ||
      layer.dtype > S2D_FLOAT16 || layer.group < 0 || layer.group >= group_count) {
    return false;
  }
  if (is_empty(layer)) return true;
  const size_t bytes = element_bytes(layer.dtype);
  if (!layer.param || !layer.grad || !layer.exp_avg || !layer.exp_avg_sq || !layer.step ||
      overlapping(layer, layer.param_stride) || !aligned(layer.param, bytes) || !aligned(layer.grad, bytes) ||
      !aligned(layer.exp_avg, bytes) || !aligned(layer.exp_avg_sq, bytes) || !aligned(layer.step, 4)) {
    return false;
  }
  return layer.rank == 0 ||
         (layer.U && layer.Vh && layer.coefficients && aligned(layer.U, 4) && aligned(layer.Vh, 4) &&
          aligned(layer.coefficients, 4) && aligned(layer.device_rank, 4));
}

int64_t divide_up(int64_t dividend, int64_t divisor) { return dividend / divisor + (dividend % divisor != 0); }

Layer table_row(const s2d_adamw_layer& layer) {
  Layer row{};
  row.param = layer.param;
  row.exp_avg = layer.exp_avg;
  row.exp_avg_sq = layer.exp_avg_sq;
  row.grad = layer.grad;
  row.step = layer.step;
  row.U = layer.U;
  row.Vh = layer.Vh;
  row.coefficients = layer.coefficients;
  row.device_rank = layer.device_rank;
  row.rows = layer.rows;
  row.cols = layer.cols;
  row.param_stride = layer.param_stride;
  row.grad_stride = layer.grad_stride;
  row.u_row_stride = layer.u_row_stride;
  row.u_col_stride = layer.u_col_stride;
  row.vh_stride = layer.vh_stride;
  row.rank = static_cast<uint8_t>(layer.rank);
  row.dtype = static_cast<uint8_t>(layer.dtype);
  row.group = static_cast<uint8_t>(layer.group);
  const int64_t across = tile_cols(layer.dtype);
  const bool flat = layer.rows == 1 || (layer.param_stride == layer.cols && layer.grad_stride == layer.cols);
  if (layer.rank == 0 && flat) {
    // Without a penalty columns mean nothing: rows of one tile's width leave no lane idle.
    const int64_t elements = layer.rows * layer.cols;
    row.rows = divide_up(elements, across);
    row.cols = row.param_stride = row.grad_stride = across;
    row.last_cols = static_cast<uint16_t>(elements - (row.rows - 1) * across);
  }
  row.tiles_across = static_cast<uint32_t>(divide_up(row.cols, across));
  const auto even = [&](int64_t stride) { return row.rows == 1 || stride * element_bytes(layer.dtype) % 16 == 0; };
  row.vector_rows = aligned(layer.param, 16) && aligned(layer.grad, 16) && aligned(layer.exp_avg, 16) &&
                    aligned(layer.exp_avg_sq, 16) && even(row.param_stride) && even(row.grad_stride);
  row.vector_vh = aligned(layer.Vh, 16) && (layer.rank <= 1 || layer.vh_stride % 4 == 0);
  return row;
}

Group table_group(const s2d_adamw_group& group) {
  Group row{};
  row.device_lr = group.device_lr;
  row.lr = static_cast<float>(group.lr);
  row.one_minus_beta1 = static_cast<float>(1.0 - group.beta1);
  row.beta2 = static_cast<float>(group.beta2);
  row.one_minus_beta2 = static_cast<float>(1.0 - group.beta2);
  row.log_beta1 = static_cast<float>(std::log(group.beta1));
  row.log_beta2 = static_cast<float>(std::log(group.beta2));
  row.eps = static_cast<float>(group.eps);
  row.weight_decay = static_cast<float>(group.weight_decay);
  row.maximize = group.maximize;
  return row;
}

int launch_table(const Table& table, s2d_stream stream) {
  if (table.count == 0) return S2D_OK;
  return launch(adamw, {dim3(table.first_tile[table.count]), dim3(kThreads)}, stream, table);
}

}  // namespace

int load_adamw() { return load(adamw); }

}  // namespace s2d

int s2d_adamw(const s2d_adamw_layer* layers, int32_t count, const s2d_adamw_group* groups, int32_t group_count,
              const s2d_adamw_options* options, void*, size_t, s2d_stream stream) {
  using namespace s2d;
  constexpr int64_t kMaxTiles = 0x7fffffff;  // the grid's limit
  if (count < 0 || group_count < 0 || group_count > S2D_MAX_GROUPS || options == nullptr) return S2D_BAD_ARGUMENT;
  if ((count > 0 && layers == nullptr) || (group_count > 0 && groups == nullptr)) return S2D_BAD_ARGUMENT;
  for (int32_t i = 0; i < count; ++i) {
    if (!is_valid(layers[i], group_count)) return S2D_BAD_ARGUMENT;
    if (is_empty(layers[i])) continue;
    const Layer row = table_row(layers[i]);
    if (divide_up(row.rows, kTileRows) > kMaxTiles / row.tiles_across) return S2D_BAD_ARGUMENT;
  }
  Table table{};
  table.clip_coef = options->clip_coef;
  table.grad_scale = options->grad_scale;
  table.found_inf = options->found_inf;
  table.decoupled = options->decoupled;
  table.clip_penalty = options->clip_penalty;
  table.group_count = group_count;
  for (int32_t i = 0; i < group_count; ++i) table.groups[i] = table_group(groups[i]);
  for (int32_t i = 0; i < count; ++i) {
    if (is_empty(layers[i])) continue;
    const Layer row = table_row(layers[i]);
    const int64_t tiles = divide_up(row.rows, kTileRows) * row.tiles_across;
    if (table.count == kMaxLayers || table.first_tile[table.count] + tiles > kMaxTiles) {
      if (const int status = launch_table(table, stream)) return status;
      table.count = 0;
    }
    table.layers[table.count] = row;
    table.first_tile[table.count + 1] = table.first_tile[table.count] + static_cast<uint32_t>(tiles);
    ++table.count;
  }
  return launch_table(table, stream);
}
