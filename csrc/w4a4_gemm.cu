// Per group of columns
//   accumulator = x w^T - x_zero_point w_row_sum - w_zero_point x_row_sum + size x_zero_point w_zero_point
// in int32, and y = sum over groups of (accumulator * x_scale) * w_scale, + bias, each operation rounded once.
//
// x [M, K] and w [N, K] are codes, both with their rows along K, as the tensor cores take them: 32 bytes of a row at a
// time, 32 codes of 8 bits or 64 packed ones of 4. A block makes a tile [kTileM, kTileN] from slices of 64 bytes of K, which
// cp.async brings through a ring of kStages buffers; ldmatrix reads them without bank conflicts because the 16-byte
// chunks of a row are exchanged by its number. Integer sums do not depend on the tiling, so neither does any bit of y.
#include <type_traits>

#include "common.cuh"

namespace s2d {
namespace {

constexpr int kSlice = 64;    // bytes of a row in a stage
constexpr int kStep = 32;     // bytes of a row in a tensor-core instruction
constexpr int kChunk = 16;    // bytes of a copy
constexpr int kSliceChunks = kSlice / kChunk;
constexpr int kBand = 8;      // tiles down before the next column of tiles, so that w's rows are still in L2

// Of the codes: of x and w, or of x while w's are those with a sign.
struct Int8Codes {
  static __device__ __forceinline__ void multiply(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k32_s8(d, a, b);
  }
};
struct Int4Codes {
  static __device__ __forceinline__ void multiply(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k64_s4(d, a, b);
  }
};
struct UInt4Codes {
  static __device__ __forceinline__ void multiply(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k64_u4s4(d, a, b);
  }
};

// kWarpM x kWarpN of the tile belong to a warp.
template <int kTileM_, int kTileN_, int kWarpM_, int kWarpN_, int kStages_, int kBlocks_, bool kGrouped_>
struct Shape {
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kWarpM = kWarpM_, kWarpN = kWarpN_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // of a multiprocessor at least
  static constexpr bool kGrouped = kGrouped_;
  static constexpr int kWarpsN = kTileN / kWarpN, kWarps = kTileM / kWarpM * kWarpsN, kThreads = kWarps * kWarpSize;
  static constexpr int kStageBytes = (kTileM + kTileN) * kSlice, kSharedBytes = kStages * kStageBytes;
  static_assert(kTileM * kSliceChunks % kThreads == 0 && kTileN * kSliceChunks % kThreads == 0, "equal shares");
};
using Large = Shape<128, 128, 64, 32, 4, 2, false>;
using Small = Shape<32, 64, 32, 16, 6, 4, false>;
using Grouped = Shape<64, 128, 32, 32, 6, 1, true>;
// Tiles of `Large` below which `Small` keeps more multiprocessors busy.
constexpr int64_t kFewTiles = 64;

struct Product {
  const uint8_t *x, *w;
  const float *x_scale, *w_scale;
  const int32_t *x_zero_point, *w_zero_point, *x_row_sum, *w_row_sum;
  const void* bias;
  void* y;
  int32_t* accumulator;
  int32_t M, N;
  int64_t row_bytes, groups, size;
  uint32_t tiles_m, tiles_n;
  int32_t group_steps;
  uint8_t bias_dtype, out_dtype;
  bool x_per_tensor, w_per_tensor, x_symmetric, w_symmetric, aligned, pairs;
};

__device__ __forceinline__ float load_float(const void* from, uint8_t dtype, int64_t place) {
  switch (dtype) {
    case S2D_FLOAT32:
      return static_cast<const float*>(from)[place];
    case S2D_BFLOAT16:
      return to_float(static_cast<const bf16*>(from)[place]);
    default:
      return to_float(static_cast<const fp16*>(from)[place]);
  }
}

// Where chunk `chunk` of row `row` lies in a stage: eight rows that follow one another use all 32 banks.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kSlice + (chunk ^ (row / 2 % kSliceChunks)) * kChunk;
}

// Chunks of kRows rows from `first_row`, zeros beyond the matrix.
template <int kRows, int kThreads>
__device__ __forceinline__ void copy_rows(uint8_t* stage, const uint8_t* codes, int first_row, int rows, int64_t row_bytes,
                                          int64_t first_byte, bool aligned) {
#pragma unroll
  for (int i = 0; i < kRows * kSliceChunks / kThreads; ++i) {
    const int place = static_cast<int>(threadIdx.x) + i * kThreads, row = place / kSliceChunks, chunk = place % kSliceChunks;
    const int64_t byte = first_byte + chunk * kChunk;
    const bool valid = first_row + row < rows && byte < row_bytes;
    const uint8_t* from = valid ? codes + int64_t{first_row + row} * row_bytes + byte : codes;
    uint8_t* to = stage + chunk_offset(row, chunk);
    if (aligned) {
      cp_async_16(to, from, valid);
    } else {
      uint32_t words[4] = {};
#pragma unroll
      for (int b = 0; b < kChunk; ++b) {
        if (valid && byte + b < row_bytes) words[b / 4] |= static_cast<uint32_t>(from[b]) << 8 * (b % 4);
      }
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

__device__ __forceinline__ void store_pair(const Product& p, int row, int col, float first, float second) {
  const int64_t place = int64_t{row} * p.N + col;
  const bool both = col + 1 < p.N;
  if (p.out_dtype == S2D_FLOAT32) {
    auto* y = static_cast<float*>(p.y) + place;
    if (p.pairs) {
      *reinterpret_cast<float2*>(y) = make_float2(first, second);
    } else {
      y[0] = first;
      if (both) y[1] = second;
    }
    return;
  }
  const uint32_t word = p.out_dtype == S2D_BFLOAT16 ? pack_2<bf16>(first, second) : pack_2<fp16>(first, second);
  auto* y = static_cast<uint16_t*>(p.y) + place;
  if (p.pairs) {
    *reinterpret_cast<uint32_t*>(y) = word;
  } else {
    y[0] = static_cast<uint16_t>(word);
    if (both) y[1] = static_cast<uint16_t>(word >> 16);
  }
}

struct RowParameters {
  float scale = 0;
  uint32_t zero_point = 0, row_sum = 0;
};
struct ColumnParameters {
  float scale = 0, bias = 0;
  uint32_t zero_point = 0, per_x = 0;  // size w_zero_point - w_row_sum, which x_zero_point multiplies
};

// Zeros beyond the matrix, and for what is not wanted.
__device__ __forceinline__ RowParameters row_of(const Product& p, int row, bool grouped) {
  RowParameters found;
  if (row >= p.M || p.groups == 0) return found;
  const int64_t place = p.x_per_tensor ? 0 : row;
  if (p.y != nullptr) found.scale = p.x_scale[place];
  if (!p.x_symmetric) found.zero_point = p.x_zero_point[place];
  if (!p.w_symmetric && !grouped) found.row_sum = p.x_row_sum[row];
  return found;
}
__device__ __forceinline__ ColumnParameters column_of(const Product& p, int col, int group, bool with_bias) {
  ColumnParameters found;
  if (col >= p.N) return found;
  if (with_bias && p.bias != nullptr) found.bias = load_float(p.bias, p.bias_dtype, col);
  if (p.groups == 0) return found;
  const int64_t place = p.w_per_tensor ? 0 : col * p.groups + group;
  if (p.y != nullptr) found.scale = p.w_scale[place];
  if (!p.w_symmetric) found.zero_point = p.w_zero_point[place];
  if (!p.x_symmetric) found.per_x = static_cast<uint32_t>(p.size) * found.zero_point - p.w_row_sum[col * p.groups + group];
  return found;
}

// Modulo 2^32, in which the result is exact though a term may not be.
__device__ __forceinline__ int32_t without_zero_points(int32_t sum, const RowParameters& row,
                                                       const ColumnParameters& col) {
  return static_cast<int32_t>(static_cast<uint32_t>(sum) + row.zero_point * col.per_x - col.zero_point * row.row_sum);
}
__device__ __forceinline__ float scaled(int32_t exact, const RowParameters& row, const ColumnParameters& col) {
  return __fmul_rn(__fmul_rn(static_cast<float>(exact), row.scale), col.scale);
}

// Where 4-bit products are made of 8-bit ones, from sm_90 on, they need more registers.
template <typename S, typename Codes>
constexpr int kResident =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    !std::is_same_v<Codes, Int8Codes> && S::kBlocks == 2 ? 1 :
#endif
                                                S::kBlocks;

template <typename S, typename Codes>
__global__ void __launch_bounds__(S::kThreads, kResident<S, Codes>) integer_linear(S2D_GRID_CONSTANT(Product) p) {
  constexpr int kM = S::kWarpM / 16, kN = S::kWarpN / 8;
  S2D_DYNAMIC_SHARED(uint8_t, stages);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warp_row = warp / S::kWarpsN * S::kWarpM, warp_col = warp % S::kWarpsN * S::kWarpN;

  const uint32_t per_band = kBand * p.tiles_n, band = blockIdx.x / per_band, within = blockIdx.x % per_band;
  const uint32_t height = min(static_cast<uint32_t>(kBand), p.tiles_m - band * kBand);
  const int first_row = static_cast<int>(band * kBand + within % height) * S::kTileM;
  const int first_col = static_cast<int>(within / height) * S::kTileN;

  const int slices = static_cast<int>((p.row_bytes + kSlice - 1) / kSlice);
  const auto copy = [&](int slice) {
    if (slice < slices) {
      uint8_t* stage = stages + slice % S::kStages * S::kStageBytes;
      copy_rows<S::kTileM, S::kThreads>(stage, p.x, first_row, p.M, p.row_bytes, int64_t{slice} * kSlice, p.aligned);
      copy_rows<S::kTileN, S::kThreads>(stage + S::kTileM * kSlice, p.w, first_col, p.N, p.row_bytes, int64_t{slice} * kSlice,
                                        p.aligned);
    }
    cp_async_commit();  // an empty group where there is no slice, so that counts of groups are counts of slices
  };

  // What the epilogue needs of each row and column, in shared memory because the accumulators need the registers.
  S2D_SHARED(RowParameters, row_parameters, [S::kTileM]);
  S2D_SHARED(ColumnParameters, column_parameters, [S::kGrouped ? 1 : S::kTileN]);
  for (int i = threadIdx.x; i < S::kTileM; i += S::kThreads) {
    row_parameters[i] = row_of(p, first_row + i, S::kGrouped);
  }
  if constexpr (!S::kGrouped) {
    for (int i = threadIdx.x; i < S::kTileN; i += S::kThreads) {
      column_parameters[i] = column_of(p, first_col + i, 0, true);
    }
  }

  int32_t acc[kM][kN][4] = {};
  float sum[S::kGrouped ? kM : 1][S::kGrouped ? kN : 1][4] = {};
  // The rows and columns of the accumulators of this thread, as PTX lays out an m16n8 fragment.
  const int tile_row = warp_row + lane / 4, tile_col = warp_col + lane % 4 * 2;

  // Adds the sums of group `group` to the output's, and clears them.
  const auto finish_group = [&](int group) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      __syncwarp();  // the compiler would read all rows and columns at once, and spill them
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = first_col + tile_col + 8 * j + e;
        const ColumnParameters of_col = column_of(p, col, group, false);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int within = tile_row + 16 * i + 8 * h;
            RowParameters of_row = row_parameters[within];
            const int row = first_row + within;
            if (!p.w_symmetric && row < p.M) of_row.row_sum = p.x_row_sum[row * p.groups + group];
            const int32_t exact = without_zero_points(acc[i][j][2 * h + e], of_row, of_col);
            if (p.accumulator != nullptr && col < p.N && row < p.M) {
              p.accumulator[(int64_t{group} * p.M + row) * p.N + col] = exact;
            }
            float& total = sum[S::kGrouped ? i : 0][S::kGrouped ? j : 0][2 * h + e];
            const float term = scaled(exact, of_row, of_col);
            total = group == 0 ? term : __fadd_rn(total, term);
            acc[i][j][2 * h + e] = 0;
          }
        }
      }
    }
  };

#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) copy(s);
  int group = 0, steps_left = p.group_steps;
  for (int slice = 0; slice < slices; ++slice) {
    cp_async_wait<S::kStages - 2>();
    __syncthreads();
    // Into the stage whose readers the barrier has waited for.
    copy(slice + S::kStages - 1);
    const uint8_t* x_stage = stages + slice % S::kStages * S::kStageBytes;
    const uint8_t* w_stage = x_stage + S::kTileM * kSlice;
    // Not unrolled where the end of a group is in it.
#pragma unroll (S::kGrouped ? 1 : kSlice / kStep)
    for (int step = 0; step < kSlice / kStep; ++step) {
      uint32_t a[kM][4], b[kN / 2][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        ldmatrix_x4(a[i], x_stage + chunk_offset(warp_row + 16 * i + lane % 16, 2 * step + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) {
        const int row = warp_col + 16 * j + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(b[j], w_stage + chunk_offset(row, 2 * step + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const uint32_t half[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          Codes::multiply(acc[i][j], a[i], half);
        }
      }
      if constexpr (S::kGrouped) {
        if (--steps_left == 0 && group < p.groups) {  // the last slice may be half full
          finish_group(group++);
          steps_left = p.group_steps;
        }
      }
    }
  }
  __syncthreads();  // the parameters are there also where there was no slice

#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int within = tile_row + 16 * i + 8 * h;
      const int row = first_row + within;
      if (row >= p.M) continue;
      const RowParameters of_row = row_parameters[within];
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int col = first_col + tile_col + 8 * j;
        if (col >= p.N) continue;
        float values[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if constexpr (S::kGrouped) {
            values[e] = sum[i][j][2 * h + e];
            if (p.bias != nullptr && col + e < p.N) {
              values[e] = __fadd_rn(values[e], load_float(p.bias, p.bias_dtype, col + e));
            }
          } else {
            const ColumnParameters of_col = column_parameters[tile_col + 8 * j + e];
            const int32_t exact = without_zero_points(acc[i][j][2 * h + e], of_row, of_col);
            if (p.accumulator != nullptr && p.groups > 0 && col + e < p.N) {
              p.accumulator[int64_t{row} * p.N + col + e] = exact;
            }
            values[e] = p.groups > 0 ? scaled(exact, of_row, of_col) : 0.0f;
            if (p.bias != nullptr) values[e] = __fadd_rn(values[e], of_col.bias);
          }
        }
        if (p.y != nullptr) store_pair(p, row, col, values[0], values[1]);
      }
    }
  }
}

constexpr int kPackThreads = 256;

// A thread makes four bytes, of eight codes.
__global__ void __launch_bounds__(kPackThreads)
    pack_codes(const int8_t* codes, uint8_t* packed, int64_t cols, uint32_t units) {
  const int64_t row = blockIdx.x;
  for (uint32_t unit = threadIdx.x; unit < units; unit += kPackThreads) {
    const int64_t first = static_cast<int64_t>(unit) * 8;
    const int8_t* from = codes + row * cols + first;
    uint8_t* to = packed + row * ((cols + 1) / 2) + first / 2;
    if (cols % 8 == 0) {
      const uint2 words = *reinterpret_cast<const uint2*>(from);
      const uint32_t even = (words.x & 0x0f0f0f0fu) | (words.x >> 4 & 0x00f000f0u);
      const uint32_t odd = (words.y & 0x0f0f0f0fu) | (words.y >> 4 & 0x00f000f0u);
      *reinterpret_cast<uint32_t*>(to) =
          (even & 0xffu) | (even >> 8 & 0xff00u) | (odd & 0xffu) << 16 | (odd << 8 & 0xff000000u);
    } else {
      for (int e = 0; e < 8 && first + e < cols; e += 2) {
        const int upper = first + e + 1 < cols ? from[e + 1] : 0;
        to[e / 2] = static_cast<uint8_t>((from[e] & 15) | (upper & 15) << 4);
      }
    }
  }
}

int64_t divide_up(int64_t dividend, int64_t divisor) { return dividend / divisor + (dividend % divisor != 0); }

bool is_dtype(int32_t dtype) { return dtype >= S2D_FLOAT32 && dtype <= S2D_FLOAT16; }

int64_t bytes_of(int32_t dtype) { return dtype == S2D_FLOAT32 ? 4 : 2; }

int check(const s2d_integer_product* q) {
  constexpr int64_t kMaxSide = 0x7fffff00, kMaxTiles = 0x7fffffff;
  if (q == nullptr || q->M < 0 || q->N < 0 || q->K < 0 || q->M > kMaxSide || q->N > kMaxSide ||
      q->K > (int64_t{1} << 36) || q->groups < 0 || q->groups > 0x7fffffff ||
      (q->groups == 0 ? q->K != 0 : q->K % q->groups != 0) || !is_dtype(q->out_dtype) ||
      (q->bias != nullptr && !is_dtype(q->bias_dtype)) || (q->w_per_tensor && q->groups > 1)) {
    return S2D_BAD_ARGUMENT;
  }
  if (q->M > 0 && q->N > 0) {
    if (divide_up(q->M, Small::kTileM) > kMaxTiles / divide_up(q->N, Small::kTileN)) return S2D_BAD_ARGUMENT;
    if (q->y == nullptr && q->accumulator == nullptr) return S2D_BAD_ARGUMENT;
    if (q->K > 0 && (q->x_codes == nullptr || q->w_codes == nullptr)) return S2D_BAD_ARGUMENT;
    if (q->groups > 0 && q->y != nullptr && (q->x_scale == nullptr || q->w_scale == nullptr)) return S2D_BAD_ARGUMENT;
    if (q->groups > 0 && !q->x_symmetric && (q->x_zero_point == nullptr || q->w_row_sum == nullptr)) {
      return S2D_BAD_ARGUMENT;
    }
    if (q->groups > 0 && !q->w_symmetric && (q->w_zero_point == nullptr || q->x_row_sum == nullptr)) {
      return S2D_BAD_ARGUMENT;
    }
  }
  for (const void* words : {static_cast<const void*>(q->x_scale), static_cast<const void*>(q->w_scale),
                            static_cast<const void*>(q->x_zero_point), static_cast<const void*>(q->w_zero_point),
                            static_cast<const void*>(q->x_row_sum), static_cast<const void*>(q->w_row_sum),
                            static_cast<const void*>(q->accumulator)}) {
    if (!aligned(words, 4)) return S2D_BAD_ARGUMENT;
  }
  if (!aligned(q->y, bytes_of(q->out_dtype)) || (q->bias != nullptr && !aligned(q->bias, bytes_of(q->bias_dtype)))) {
    return S2D_BAD_ARGUMENT;
  }
  if (q->packed && !q->w_symmetric) return S2D_UNSUPPORTED;
  const int64_t step = q->packed ? 2 * kStep : kStep;
  return q->groups > 1 && q->K / q->groups % step != 0 ? S2D_UNSUPPORTED : S2D_OK;
}

Product product_of(const s2d_integer_product& q) {
  Product p{};
  p.x = static_cast<const uint8_t*>(q.x_codes);
  p.w = static_cast<const uint8_t*>(q.w_codes);
  p.x_scale = q.x_scale;
  p.w_scale = q.w_scale;
  p.x_zero_point = q.x_zero_point;
  p.w_zero_point = q.w_zero_point;
  p.x_row_sum = q.x_row_sum;
  p.w_row_sum = q.w_row_sum;
  p.bias = q.bias;
  p.y = q.y;
  p.accumulator = q.accumulator;
  p.M = static_cast<int32_t>(q.M);
  p.N = static_cast<int32_t>(q.N);
  p.row_bytes = q.packed ? (q.K + 1) / 2 : q.K;
  p.groups = q.groups;
  p.size = q.groups > 0 ? q.K / q.groups : 0;
  p.group_steps = static_cast<int32_t>(p.size / (q.packed ? 2 * kStep : kStep));
  p.bias_dtype = static_cast<uint8_t>(q.bias_dtype);
  p.out_dtype = static_cast<uint8_t>(q.out_dtype);
  p.x_per_tensor = q.x_per_tensor != 0;
  p.w_per_tensor = q.w_per_tensor != 0;
  p.x_symmetric = q.x_symmetric != 0;
  p.w_symmetric = q.w_symmetric != 0;
  p.aligned = aligned(q.x_codes, kChunk) && aligned(q.w_codes, kChunk) && p.row_bytes % kChunk == 0;
  p.pairs = q.N % 2 == 0 && aligned(q.y, 2 * bytes_of(q.out_dtype));
  return p;
}

template <typename S, typename Codes>
int enqueue(Product p, s2d_stream stream) {
  p.tiles_m = static_cast<uint32_t>(divide_up(p.M, S::kTileM));
  p.tiles_n = static_cast<uint32_t>(divide_up(p.N, S::kTileN));
  return launch(integer_linear<S, Codes>, {dim3(p.tiles_m * p.tiles_n), dim3(S::kThreads), S::kSharedBytes}, stream,
                p);
}

template <typename Codes>
int enqueue_format(const Product& p, s2d_stream stream) {
  if (p.groups > 1) return enqueue<Grouped, Codes>(p, stream);
  const int64_t large_tiles = divide_up(p.M, Large::kTileM) * divide_up(p.N, Large::kTileN);
  if (p.M <= Small::kTileM || large_tiles < kFewTiles) return enqueue<Small, Codes>(p, stream);
  return enqueue<Large, Codes>(p, stream);
}

template <typename Codes>
int load_format() {
  if (const int status = load(integer_linear<Large, Codes>)) return status;
  if (const int status = load(integer_linear<Small, Codes>)) return status;
  return load(integer_linear<Grouped, Codes>);
}

}  // namespace

int load_integer_gemm() {
  if (const int status = load(pack_codes)) return status;
  if (const int status = load_format<Int8Codes>()) return status;
  if (const int status = load_format<Int4Codes>()) return status;
  return load_format<UInt4Codes>();
}

}  // namespace s2d

int s2d_integer_linear_check(const s2d_integer_product* product) { return s2d::check(product); }

int s2d_integer_linear(const s2d_integer_product* product, void*, size_t, s2d_stream stream) {
  using namespace s2d;
  if (const int status = check(product)) return status;
  if (product->M == 0 || product->N == 0 || (product->groups == 0 && product->y == nullptr)) return S2D_OK;
  const Product p = product_of(*product);
  if (!product->packed) return enqueue_format<Int8Codes>(p, stream);
  return p.x_symmetric ? enqueue_format<Int4Codes>(p, stream) : enqueue_format<UInt4Codes>(p, stream);
}

int s2d_pack_codes(const int8_t* codes, uint8_t* packed, int64_t rows, int64_t cols, void*, size_t, s2d_stream stream) {
  using namespace s2d;
  constexpr int64_t kMax = 0x7fffffff;
  if (rows < 0 || cols < 0 || rows > kMax || cols > 8 * kMax) return S2D_BAD_ARGUMENT;
  if (rows == 0 || cols == 0) return S2D_OK;
  if (codes == nullptr || packed == nullptr) return S2D_BAD_ARGUMENT;
  if (cols % 8 == 0 && (!aligned(codes, 8) || !aligned(packed, 4))) return S2D_BAD_ARGUMENT;
  const auto units = static_cast<uint32_t>(divide_up(cols, 8));
  return launch(pack_codes, {dim3(static_cast<unsigned>(rows)), dim3(kPackThreads)}, stream, codes, packed, cols, units);
}
