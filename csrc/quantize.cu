// q = clamp(round_half_even(x / scale) + zero_point, quant_min, quant_max) of x [rows, cols], with what comes from the
// range of x in the same pass: scale, zero point, mask of the elements that were not clamped, integer sums of codes.
//
//   quantize_rows     one scale a row: a warp or a block holds a row of up to 16 384 elements in registers, so that
//                     memory is read once; longer rows are read twice. Also one scale for all, out of partial ranges.
//   quantize_groups   one scale for 8, 16, .. 256 columns of a row: a thread holds 8 of them.
//   tensor_range      the ranges of parts of x, which each block of quantize_rows puts together again.
//
// A thread's unit is eight neighbouring elements: 16 or 32 bytes of x, 8 of codes, one of mask. Bit for bit the
// definition of s2d_kernels/reference.py: fp32, each operation rounded once, halves to even, subnormals honoured.
#include <algorithm>

#include "common.cuh"

namespace s2d {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kUnit = 8;
constexpr int kMaxPartials = 1024;
// A smaller scale counts as zero.
constexpr float kSmallestScale = 1.17549435e-38f;  // 2^-126

// Of elements and of zero: a range is widened to hold zero, and absmax does not change by it. `poison` is NaN if one
// of them is not finite, else 0.
struct Range {
  float low = 0, high = 0, poison = 0;
};

__device__ __forceinline__ void include(Range& range, float x) {
  range.low = fminf(range.low, x);
  range.high = fmaxf(range.high, x);
  range.poison = fmaf(x, 0.0f, range.poison);
}
__device__ __forceinline__ void include(Range& range, const Range& other) {
  range.low = fminf(range.low, other.low);
  range.high = fmaxf(range.high, other.high);
  range.poison += other.poison;
}

struct Job {
  const void* x;
  const float *minimum, *maximum;  // null: the range is that of x
  int8_t* codes;                   // null: not wanted, as packed and mask
  uint8_t* packed;
  float* scale;
  int32_t* zero_point;
  int32_t* row_sum;
  uint8_t* mask;
  const Range* partials;  // of one scale for all: the ranges of its parts
  int64_t rows, cols, row_stride, col_stride, range_stride, sums;
  int32_t partial_count;
  int32_t group_lanes;  // threads that hold a group of `row_sum` (and, in quantize_groups, of scale); 0: the whole row
  int32_t quant_min, quant_max, shift;
  bool per_tensor, symmetric, vector_x, vector_codes;
};

struct Parameters {
  float scale, reciprocal;
  int zero_point;  // of the codes as they are stored
  bool finite;
  bool plain;  // quotients are far from overflow and underflow
};

__device__ __forceinline__ Parameters parameters(Range range, const Job& job, int64_t row) {
  const float poison = range.poison;
  if (job.minimum != nullptr) {
    range.low = job.minimum[row * job.range_stride];
    range.high = job.maximum[row * job.range_stride];
    range.poison = fmaf(range.low, 0.0f, fmaf(range.high, 0.0f, poison));
    if (!job.symmetric) {
      range.low = fminf(range.low, 0.0f);
      range.high = fmaxf(range.high, 0.0f);
    }
  }
  const float span = job.symmetric ? fmaxf(fabsf(range.low), fabsf(range.high)) : __fadd_rn(range.high, -range.low);
  const float levels = static_cast<float>(job.symmetric ? job.quant_max : job.quant_max - job.quant_min);
  Parameters p;
  p.scale = __fdiv_rn(span, levels);
  if (p.scale < kSmallestScale) p.scale = 1.0f;
  p.finite = p.scale <= 3.402823466e38f && range.poison == 0.0f;
  p.zero_point = 0;
  if (!p.finite) {
    p.scale = __int_as_float(0x7fc00000);
  } else if (!job.symmetric) {
    // min / scale is at most the number of levels, up to its rounding
    p.zero_point = min(max(job.quant_min - __float2int_rn(__fdiv_rn(range.low, p.scale)), job.quant_min), job.quant_max);
  }
  p.zero_point -= job.shift;
  p.plain = p.scale >= 0x1p-60f && p.scale <= 0x1p60f;
  p.reciprocal = __fdiv_rn(1.0f, p.scale);
  return p;
}

// x / scale rounded to nearest, also for x that the range leaves outside, up to a magnitude of 2^20.
__device__ __forceinline__ void divide(float (&v)[kUnit], const Parameters& p, bool outside) {
  if (p.plain) {
    if (outside) {
      const float limit = p.scale * 0x1p20f;
#pragma unroll
      for (int e = 0; e < kUnit; ++e) v[e] = fminf(fmaxf(v[e], -limit), limit);
    }
    // A third of the division's instructions, since no exponent needs care. The corrected quotient is within 2^-46 of
    // the true one before it is rounded, so it could round otherwise only where the true one is that close to halfway
    // between two numbers. What those are beside k + 1/2, where codes change, the tests list and try, every one of them.
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const float x = v[e], q = __fmul_rn(x, p.reciprocal);
      v[e] = fmaf(fmaf(-p.scale, q, x), p.reciprocal, q);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) v[e] = fminf(fmaxf(__fdiv_rn(v[e], p.scale), -0x1p20f), 0x1p20f);
  }
}

struct Codes {
  uint32_t words[2];  // eight int8
  uint32_t mask;      // a bit each
};

// The codes of `v`, of which the first `valid` count; the others become 0.
__device__ __forceinline__ Codes encode(float (&v)[kUnit], int valid, const Parameters& p, const Job& job) {
  Codes codes{};
  const int low = job.quant_min - job.shift, high = job.quant_max - job.shift;
  divide(v, p, job.minimum != nullptr);
#pragma unroll
  for (int e = 0; e < kUnit; ++e) {
    // Adding 1.5 * 2^23 rounds to an integer, halves to even, and leaves it in the lower bits.
    const int unclamped = __float_as_int(__fadd_rn(v[e], 12582912.0f)) - 0x4b400000 + p.zero_point;
    const int code = min(max(unclamped, low), high);
    codes.words[e / 4] |= (static_cast<uint32_t>(code) & 255u) << 8 * (e % 4);
    codes.mask |= (code == unclamped ? 1u : 0u) << e;
  }
  if (!p.finite) {
    const uint32_t zero = static_cast<uint32_t>(-job.shift) & 255u;
    codes = {{zero * 0x01010101u, zero * 0x01010101u}, 0u};
  }
  if (valid < kUnit) {
    codes.mask &= (1u << valid) - 1u;
    codes.words[0] &= valid >= 4 ? 0xffffffffu : (1u << 8 * valid) - 1u;
    codes.words[1] &= valid <= 4 ? 0u : (1u << 8 * (valid - 4)) - 1u;
  }
  return codes;
}

// total + the four signed bytes of `word`
__device__ __forceinline__ int add_bytes(uint32_t word, int total) {
#ifdef S2D_EMULATED
  for (int i = 0; i < 4; ++i) total += static_cast<int8_t>(word >> 8 * i);
  return total;
#else
  return __dp4a(static_cast<int>(word), 0x01010101, total);
#endif
}

// The lower halves of four bytes, side by side.
__device__ __forceinline__ uint32_t nibbles(uint32_t word) {
  word &= 0x0f0f0f0fu;
  word = (word | word >> 4) & 0x00ff00ffu;
  return (word | word >> 8) & 0xffffu;
}

// Writes unit `unit` of a row.
__device__ __forceinline__ void store(const Codes& codes, int64_t row, int64_t unit, int valid, const Job& job) {
  if (job.mask != nullptr) job.mask[row * ((job.cols + 7) / 8) + unit] = static_cast<uint8_t>(codes.mask);
  if (job.codes != nullptr) {
    int8_t* to = job.codes + row * job.cols + unit * kUnit;
    if (job.vector_codes) {
      *reinterpret_cast<uint2*>(to) = make_uint2(codes.words[0], codes.words[1]);
    } else {
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        if (e < valid) to[e] = static_cast<int8_t>(codes.words[e / 4] >> 8 * (e % 4));
      }
    }
  }
  if (job.packed != nullptr) {
    const uint32_t word = nibbles(codes.words[0]) | nibbles(codes.words[1]) << 16;
    uint8_t* to = job.packed + row * ((job.cols + 1) / 2) + unit * (kUnit / 2);
    if (job.vector_codes) {
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
#pragma unroll
      for (int e = 0; e < kUnit / 2; ++e) {
        if (2 * e < valid) to[e] = static_cast<uint8_t>(word >> 8 * e);
      }
    }
  }
}

// Elements unit * 8 .. + 7 of a row; zeros beyond its end.
template <typename T>
__device__ __forceinline__ void load_unit(float (&v)[kUnit], int64_t row, int64_t unit, int valid, const Job& job) {
  const T* from = static_cast<const T*>(job.x) + row * job.row_stride + unit * kUnit * job.col_stride;
  if (job.vector_x && valid == kUnit) {
    constexpr int N = kPer16<T>;
#pragma unroll
    for (int first = 0; first < kUnit; first += N) {
      float part[N];
      unpack<T>(load_16_constant(from + first), part);
#pragma unroll
      for (int e = 0; e < N; ++e) v[first + e] = part[e];
    }
  } else {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) v[e] = e < valid ? to_float(from[e * job.col_stride]) : 0.0f;
  }
}

__device__ __forceinline__ int valid_in(int64_t unit, const Job& job) {
  return static_cast<int>(max(min(job.cols - unit * kUnit, static_cast<int64_t>(kUnit)), static_cast<int64_t>(0)));
}

__device__ __forceinline__ Range reduce_lanes(Range range, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    Range other;
    other.low = __shfl_xor_sync(kAllLanes, range.low, distance);
    other.high = __shfl_xor_sync(kAllLanes, range.high, distance);
    other.poison = __shfl_xor_sync(kAllLanes, range.poison, distance);
    include(range, other);
  }
  return range;
}

__device__ __forceinline__ Range reduce_block(Range range) {
  S2D_SHARED(float, partial, [3][kWarps]);
  range = reduce_lanes(range, kWarpSize);
  if (threadIdx.x % kWarpSize == 0) {
    const int warp = threadIdx.x / kWarpSize;
    partial[0][warp] = range.low;
    partial[1][warp] = range.high;
    partial[2][warp] = range.poison;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    Range other;
    other.low = partial[0][i];
    other.high = partial[1][i];
    other.poison = partial[2][i];
    include(range, other);
  }
  return range;
}

__device__ __forceinline__ int sum_lanes(int sum, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

// kRowThreads threads, a warp or the block, hold a row of up to 8 * kUnits * kRowThreads elements.
template <typename T, int kRowThreads, int kUnits>
__global__ void __launch_bounds__(kThreads) quantize_rows(S2D_GRID_CONSTANT(Job) job) {
  constexpr bool kWarpRows = kRowThreads == kWarpSize;
  static_assert(kWarpRows || kRowThreads == kThreads, "a row belongs to a warp or to the block");
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  const int member = threadIdx.x % kRowThreads;
  const int64_t units = (job.cols + kUnit - 1) / kUnit;
  const bool once = units <= kRowThreads * kUnits;

  Range range;
  if (job.per_tensor) {
    for (int i = threadIdx.x; i < job.partial_count; i += kThreads) include(range, job.partials[i]);
    range = reduce_block(range);
  }
  if (row >= job.rows && !(job.per_tensor && row == 0)) return;  // all threads of the row
  const bool exists = row < job.rows;

  float v[kUnits][kUnit];
  if (!job.per_tensor || once) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int64_t unit = member + u * kRowThreads;
      load_unit<T>(v[u], row, unit, exists ? valid_in(unit, job) : 0, job);
    }
  }
  if (!job.per_tensor) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int e = 0; e < kUnit; ++e) include(range, v[u][e]);
    }
    for (int64_t unit = member + kUnits * kRowThreads; unit < units; unit += kRowThreads) {
      float more[kUnit];
      load_unit<T>(more, row, unit, valid_in(unit, job), job);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) include(range, more[e]);
    }
    if constexpr (kWarpRows) {
      range = reduce_lanes(range, kWarpSize);
    } else {
      range = reduce_block(range);
    }
  }
  const Parameters p = parameters(range, job, row);
  if (member == 0 && (!job.per_tensor || row == 0)) {
    job.scale[row] = p.scale;
    job.zero_point[row] = p.zero_point;
  }
  if (!exists) return;

  int total = 0;
  for (int64_t first = 0; first < units || first == 0; first += kUnits * kRowThreads) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int64_t unit = first + member + u * kRowThreads;
      // The whole warp, for the sums of its groups.
      if (unit - member % kWarpSize >= units) break;
      const int valid = valid_in(unit, job);
      if (!once) load_unit<T>(v[u], row, unit, valid, job);
      const Codes codes = encode(v[u], valid, p, job);
      if (valid > 0) store(codes, row, unit, valid, job);
      const int sum = add_bytes(codes.words[0], add_bytes(codes.words[1], 0));
      if (job.group_lanes == 0) {
        total += sum;
      } else {
        const int group_sum = sum_lanes(sum, job.group_lanes);
        if (member % job.group_lanes == 0 && valid > 0) {
          job.row_sum[row * job.sums + unit / job.group_lanes] = group_sum;
        }
      }
    }
  }
  if (job.group_lanes == 0 && job.sums == 1) {
    if constexpr (kWarpRows) {
      total = sum_lanes(total, kWarpSize);
    } else {
      total = block_reduce<kThreads>(total, Sum{});
    }
    if (member == 0) job.row_sum[row] = total;
  }
}

// Rows are whole numbers of units here, so groups are those of the rows one after another.
template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_groups(S2D_GRID_CONSTANT(Job) job) {
  const int64_t units = job.cols / kUnit;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool exists = place < job.rows * units;
  // A 64-bit division is a function call.
  const bool narrow = job.rows * units <= 0xffffffff;
  const int64_t row = !exists ? 0 : narrow ? static_cast<uint32_t>(place) / static_cast<uint32_t>(units) : place / units;
  const int64_t unit = exists ? place - row * units : 0;
  const int valid = exists ? kUnit : 0;
  float v[kUnit];
  load_unit<T>(v, row, unit, valid, job);
  Range range;
#pragma unroll
  for (int e = 0; e < kUnit; ++e) include(range, v[e]);
  const Parameters p = parameters(reduce_lanes(range, job.group_lanes), job, row);
  const Codes codes = encode(v, valid, p, job);
  const int sum = sum_lanes(add_bytes(codes.words[0], add_bytes(codes.words[1], 0)), job.group_lanes);
  if (!exists) return;
  store(codes, row, unit, valid, job);
  if (unit % job.group_lanes == 0) {
    const int64_t group = place / job.group_lanes;
    job.scale[group] = p.scale;
    job.zero_point[group] = p.zero_point;
    job.row_sum[group] = sum;
  }
}

constexpr int kPartUnits = 4;
constexpr int kPart = kWarpSize * kPartUnits;  // units of a row that a warp takes at a time

// partials[block]: the range of every gridDim.x * kWarps-th part. A row has `row_parts` of them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    tensor_range(S2D_GRID_CONSTANT(Job) job, uint32_t row_parts, Range* partials) {
  const uint32_t place = blockIdx.x * kWarps + threadIdx.x / kWarpSize, stride = gridDim.x * kWarps;
  int64_t row = place / row_parts;
  uint32_t part = place % row_parts;
  Range range;
  while (row < job.rows) {
    const int64_t first = static_cast<int64_t>(part) * kPart + threadIdx.x % kWarpSize;
    float v[kPartUnits][kUnit];
#pragma unroll
    for (int u = 0; u < kPartUnits; ++u) {
      const int64_t unit = first + u * kWarpSize;
      load_unit<T>(v[u], row, unit, valid_in(unit, job), job);
    }
#pragma unroll
    for (int u = 0; u < kPartUnits; ++u) {
#pragma unroll
      for (int e = 0; e < kUnit; ++e) include(range, v[u][e]);
    }
    part += stride % row_parts;
    row += stride / row_parts;
    if (part >= row_parts) {
      part -= row_parts;
      ++row;
    }
  }
  range = reduce_block(range);
  if (threadIdx.x == 0) partials[blockIdx.x] = range;
}

int64_t divide_up(int64_t dividend, int64_t divisor) { return dividend / divisor + (dividend % divisor != 0); }

int64_t element_bytes(const s2d_quantization& q) { return q.dtype == S2D_FLOAT32 ? 4 : 2; }

bool power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

int check(const s2d_quantization* q) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  if (q == nullptr || q->rows < 0 || q->cols < 0 || q->group_size < 0 || q->dtype < S2D_FLOAT32 ||
      q->dtype > S2D_FLOAT16 || q->bits < 2 || q->bits > 8 || q->granularity < S2D_PER_ROW ||
      q->granularity > S2D_PER_GROUP || (q->granularity == S2D_PER_GROUP && q->group_size == 0) ||
      (q->group_size > 0 && q->cols % q->group_size != 0) || q->range_stride < 0 || q->range_stride > 1) {
    return S2D_BAD_ARGUMENT;
  }
  if ((q->minimum == nullptr) != (q->maximum == nullptr) || (q->packed != nullptr && q->bits > 4)) {
    return S2D_BAD_ARGUMENT;
  }
  const bool groups = q->granularity == S2D_PER_GROUP && q->cols > 0;
  const bool some_scale = q->granularity == S2D_PER_TENSOR || (q->rows > 0 && (groups || q->granularity == S2D_PER_ROW));
  if (some_scale && (q->scale == nullptr || q->zero_point == nullptr)) return S2D_BAD_ARGUMENT;
  if (q->rows > 0 && (q->cols > 0 || q->group_size == 0) && q->row_sum == nullptr) return S2D_BAD_ARGUMENT;
  if (q->rows > 0 && q->cols > 0 && q->x == nullptr) return S2D_BAD_ARGUMENT;
  if (!aligned(q->x, element_bytes(*q)) || !aligned(q->scale, 4) || !aligned(q->zero_point, 4) ||
      !aligned(q->row_sum, 4) || !aligned(q->minimum, 4) || !aligned(q->maximum, 4)) {
    return S2D_BAD_ARGUMENT;
  }
  // The grid's limit, and 32-bit counts of parts.
  if (q->rows > kMaxBlocks || divide_up(q->cols, kUnit) > kMaxBlocks * kThreads / (q->rows + 1)) return S2D_BAD_ARGUMENT;
  const bool shuffled = power_of_two(q->group_size) && q->group_size >= kUnit && q->group_size <= kUnit * kWarpSize;
  return q->group_size == 0 || q->cols == 0 || shuffled ? S2D_OK : S2D_UNSUPPORTED;
}

// Enough warps for every multiprocessor, few enough that each block of the next kernel reads them all.
int partial_blocks(const s2d_quantization& q) {
  const int64_t parts = q.rows * divide_up(divide_up(q.cols, kUnit), kPart);
  return static_cast<int>(std::min<int64_t>(divide_up(parts, kWarps), kMaxPartials));
}

Job job_of(const s2d_quantization& q) {
  Job job{};
  job.x = q.x;
  job.minimum = q.minimum;
  job.maximum = q.maximum;
  job.codes = q.codes;
  job.packed = q.packed;
  job.scale = q.scale;
  job.zero_point = q.zero_point;
  job.row_sum = q.row_sum;
  job.mask = q.mask;
  job.rows = q.rows;
  job.cols = q.cols;
  job.row_stride = q.row_stride;
  job.col_stride = q.col_stride;
  job.range_stride = q.range_stride;
  job.sums = q.group_size > 0 ? q.cols / q.group_size : 1;
  job.group_lanes = static_cast<int32_t>(q.group_size / kUnit);
  job.symmetric = q.symmetric != 0;
  job.quant_max = job.symmetric ? (1 << (q.bits - 1)) - 1 : (1 << q.bits) - 1;
  job.quant_min = job.symmetric ? -job.quant_max : 0;
  job.shift = q.bits == 8 && !job.symmetric ? 128 : 0;
  job.vector_x = aligned(q.x, 16) && (q.col_stride == 1 || q.cols <= 1) &&
                 (q.rows <= 1 || q.row_stride * element_bytes(q) % 16 == 0);
  job.vector_codes = q.cols % kUnit == 0 && aligned(q.codes, 8) && aligned(q.packed, 4);
  return job;
}

template <typename T>
int enqueue(const s2d_quantization& q, Job job, Range* partials, s2d_stream stream) {
  const int64_t units = divide_up(q.cols, kUnit);
  if (q.granularity == S2D_PER_GROUP) {
    const int64_t blocks = divide_up(q.rows * units, kThreads);
    if (blocks == 0) return S2D_OK;
    return launch(quantize_groups<T>, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)}, stream, job);
  }
  if (q.granularity == S2D_PER_TENSOR) {
    job.per_tensor = true;
    job.partials = partials;
    // None where there are no elements, which have a scale nevertheless.
    job.partial_count = partial_blocks(q);
    if (job.partial_count > 0) {
      const LaunchShape shape{dim3(static_cast<unsigned>(job.partial_count)), dim3(kThreads)};
      const auto row_parts = static_cast<uint32_t>(divide_up(units, kPart));
      if (const int status = launch(tensor_range<T>, shape, stream, job, row_parts, partials)) return status;
    }
  } else if (q.rows == 0) {
    return S2D_OK;
  }
  const int64_t rows = std::max<int64_t>(q.rows, 1);
  if (units <= 4 * kWarpSize) {
    const LaunchShape shape{dim3(static_cast<unsigned>(divide_up(rows, kWarps))), dim3(kThreads)};
    return launch(quantize_rows<T, kWarpSize, 4>, shape, stream, job);
  }
  const LaunchShape shape{dim3(static_cast<unsigned>(rows)), dim3(kThreads)};
  return units <= 2 * kThreads ? launch(quantize_rows<T, kThreads, 2>, shape, stream, job)
                               : launch(quantize_rows<T, kThreads, 8>, shape, stream, job);
}

template <typename T>
int load_all() {
  if (const int status = load(quantize_rows<T, kWarpSize, 4>)) return status;
  if (const int status = load(quantize_rows<T, kThreads, 2>)) return status;
  if (const int status = load(quantize_rows<T, kThreads, 8>)) return status;
  if (const int status = load(quantize_groups<T>)) return status;
  return load(tensor_range<T>);
}

}  // namespace

int load_quantize() {
  if (const int status = load_all<float>()) return status;
  if (const int status = load_all<bf16>()) return status;
  return load_all<fp16>();
}

}  // namespace s2d

int s2d_quantize_check(const s2d_quantization* q) { return s2d::check(q); }

size_t s2d_quantize_workspace(const s2d_quantization* q) {
  if (s2d::check(q) != S2D_OK || q->granularity != S2D_PER_TENSOR) return 0;
  return s2d::partial_blocks(*q) * sizeof(s2d::Range);
}

int s2d_quantize(const s2d_quantization* q, void* workspace, size_t workspace_bytes, s2d_stream stream) {
  using namespace s2d;
  if (const int status = check(q)) return status;
  if (const size_t needed = s2d_quantize_workspace(q)) {
    if (workspace_bytes < needed || !aligned(workspace, 256)) return S2D_BAD_WORKSPACE;
  }
  auto* partials = static_cast<Range*>(workspace);
  const Job job = job_of(*q);
  switch (q->dtype) {
    case S2D_FLOAT32:
      return enqueue<float>(*q, job, partials, stream);
    case S2D_BFLOAT16:
      return enqueue<bf16>(*q, job, partials, stream);
    default:
      return enqueue<fp16>(*q, job, partials, stream);
  }
}
