// Quantization of a matrix row by row: range, codes, row sum and mask bits while the row is in the caches.
#include <math.h>
#include <string.h>

#include <algorithm>

#include "integer_kernels.h"
#include "s2d_cpu.h"
#include "threads.h"

namespace s2d_cpu {
namespace {

constexpr int64_t kItemElements = 32 * 1024;  // what a thread takes at a time, at least a row

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Plan {
  const s2d_quantization& q;
  int64_t parts, part_size;    // of a row, each with a scale
  int64_t pieces, piece_size;  // of a row, each with a sum of codes
  int64_t item_rows, items;
  int64_t buffer_bytes;  // of a thread: a row in fp32 and, for each element, whether it was clamped

  explicit Plan(const s2d_quantization& given) : q(given) {
    pieces = q.group_size ? q.cols / q.group_size : 1;
    piece_size = q.group_size ? q.group_size : q.cols;
    parts = q.granularity == S2D_PER_GROUP ? pieces : 1;
    part_size = q.granularity == S2D_PER_GROUP ? piece_size : q.cols;
    item_rows = std::clamp<int64_t>(kItemElements / std::max<int64_t>(q.cols, 1), 1, 1024);
    items = (q.rows + item_rows - 1) / item_rows;
    buffer_bytes = rounded_up(q.cols * 4, 256) + rounded_up(q.cols, 256);
  }

  bool per_tensor() const { return q.granularity == S2D_PER_TENSOR; }
  int64_t workspace(int32_t threads) const {
    return threads * buffer_bytes + (per_tensor() ? rounded_up(items * static_cast<int64_t>(sizeof(Range)), 256) : 0);
  }
};

bool valid(const s2d_quantization& q) {
  const bool sizes = q.rows >= 0 && q.cols >= 0 && q.group_size >= 0 && q.bits >= 2 && q.bits <= 8 &&
                     q.dtype >= S2D_FLOAT32 && q.dtype <= S2D_FLOAT16 && q.granularity >= S2D_PER_ROW &&
                     q.granularity <= S2D_PER_GROUP;
  const bool grouped = q.granularity == S2D_PER_GROUP;
  if (!sizes || (q.group_size ? q.cols % q.group_size != 0 : grouped)) return false;
  if ((q.minimum == nullptr) != (q.maximum == nullptr)) return false;
  // Outputs without elements may be null.
  const bool sums = q.rows && (q.cols || !q.group_size);
  const bool scales = q.granularity == S2D_PER_TENSOR || (q.granularity == S2D_PER_ROW ? q.rows > 0 : sums);
  return (!scales || (q.scale && q.zero_point)) && (!sums || q.row_sum) &&
         (!q.rows || !q.cols || (q.x && q.codes && q.mask)) && !(q.packed && q.bits > 4);
}

float as_number(int32_t ordered) {
  const int32_t bits = ordered ^ ((ordered >> 31) & 0x7fffffff);
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

bool is_finite(const Range& found) { return found.high < 0x7f800000 && found.low > static_cast<int32_t>(0x807fffffu); }

// Scale and zero point of a part whose numbers span `found`, or where given, of the range of row `row`.
Rounding rounding_of(const s2d_quantization& q, const Range& found, bool empty, int64_t row) {
  Rounding rounding;
  const int32_t all = 1 << q.bits, half = all / 2;
  rounding.lowest = q.symmetric ? 1 - half : 0;
  rounding.highest = q.symmetric ? half - 1 : all - 1;
  rounding.shift = q.bits == 8 && !q.symmetric ? 128 : 0;
  rounding.zero_point = 0;
  rounding.scale = NAN;
  if (!empty && !is_finite(found)) return rounding;
  float low = empty ? 0.f : as_number(found.low), high = empty ? 0.f : as_number(found.high);
  if (q.minimum) {
    low = q.minimum[row * q.range_stride];
    high = q.maximum[row * q.range_stride];
    if (low != low || high != high) return rounding;
  }
  if (!q.symmetric) {
    low = std::min(low, 0.f);
    high = std::max(high, 0.f);
  }
  const float span = q.symmetric ? std::max(fabsf(low), fabsf(high)) : high - low;
  float scale = span / static_cast<float>(rounding.highest - (q.symmetric ? 0 : rounding.lowest));
  if (scale < 0x1p-126f) scale = 1.f;
  if (!(fabsf(scale) <= 0x1.fffffep127f)) return rounding;
  rounding.scale = scale;
  if (!q.symmetric) {
    const float zero = 0.f - rintf(low / scale);
    rounding.zero_point = static_cast<int32_t>(std::clamp(zero, 0.f, static_cast<float>(rounding.highest)));
  }
  return rounding;
}

class Work {
 public:
  Work(const Plan& plan, int32_t threads, void* workspace)
      : plan_(plan), q_(plan.q), threads_(threads), memory_(static_cast<char*>(workspace)) {
    ranges_ = reinterpret_cast<Range*>(memory_ + threads * plan.buffer_bytes);
  }

  void run() {
    const int32_t items = static_cast<int32_t>(plan_.items);
    if (plan_.per_tensor()) {
      Range whole;
      share_out(items, threads_, [&](int32_t item, int32_t thread) {
        const DefaultArithmetic guard;
        Range found;
        for (int64_t row = first(item); row < last(item); ++row)
          kernels_.range(numbers(row, thread), q_.cols, &found.low, &found.high);
        ranges_[item] = found;
      });
      for (int32_t item = 0; item < items; ++item) {
        whole.low = std::min(whole.low, ranges_[item].low);
        whole.high = std::max(whole.high, ranges_[item].high);
      }
      const DefaultArithmetic guard;
      shared_ = rounding_of(q_, whole, !q_.rows || !q_.cols, 0);
      q_.scale[0] = shared_.scale;
      q_.zero_point[0] = shared_.zero_point - shared_.shift;
    }
    share_out(items, threads_, [&](int32_t item, int32_t thread) {
      const DefaultArithmetic guard;
      for (int64_t row = first(item); row < last(item); ++row) quantize_row(row, thread);
    });
  }

 private:
  int64_t first(int64_t item) const { return item * plan_.item_rows; }
  int64_t last(int64_t item) const { return std::min(q_.rows, first(item + 1)); }

  float* buffer(int32_t thread) const { return reinterpret_cast<float*>(memory_ + thread * plan_.buffer_bytes); }

  // A row in fp32: itself, or a copy in the thread's buffer.
  const float* numbers(int64_t row, int32_t thread) const {
    const char* const start = static_cast<const char*>(q_.x) + row * q_.row_stride * (q_.dtype == S2D_FLOAT32 ? 4 : 2);
    if (q_.dtype == S2D_FLOAT32 && q_.col_stride == 1) return reinterpret_cast<const float*>(start);
    kernels_.widen(start, q_.dtype, q_.cols, q_.col_stride, buffer(thread));
    return buffer(thread);
  }

  // Of one part of row `x`, whose scale and zero point are written.
  Rounding choose(const float* x, int64_t row, int64_t part) const {
    Range found;
    kernels_.range(x + part * plan_.part_size, plan_.part_size, &found.low, &found.high);
    const Rounding rounding = rounding_of(q_, found, !plan_.part_size, row);
    q_.scale[row * plan_.parts + part] = rounding.scale;
    q_.zero_point[row * plan_.parts + part] = rounding.zero_point - rounding.shift;
    return rounding;
  }

  void quantize_row(int64_t row, int32_t thread) const {
    const float* const x = numbers(row, thread);
    uint8_t* const inside = reinterpret_cast<uint8_t*>(buffer(thread)) + rounded_up(q_.cols * 4, 256);
    int8_t* const codes = q_.codes + row * q_.cols;
    Rounding rounding = shared_;
    if (q_.granularity == S2D_PER_ROW) rounding = choose(x, row, 0);
    for (int64_t piece = 0; piece < plan_.pieces; ++piece) {
      if (q_.granularity == S2D_PER_GROUP) rounding = choose(x, row, piece);
      const int64_t at = piece * plan_.piece_size;
      q_.row_sum[row * plan_.pieces + piece] =
          kernels_.codes(x + at, plan_.piece_size, rounding, codes + at, inside + at);
    }
    kernels_.pack_bits(inside, q_.cols, q_.mask + row * ((q_.cols + 7) / 8));
    if (q_.packed) kernels_.pack_nibbles(codes, q_.cols, q_.packed + row * ((q_.cols + 1) / 2));
  }

  const Plan& plan_;
  const s2d_quantization& q_;
  const IntegerKernels& kernels_ = integer_kernels();
  int32_t threads_;
  char* memory_;
  Range* ranges_;
  Rounding shared_{};
};

}  // namespace
}  // namespace s2d_cpu

size_t s2d_cpu_quantize_workspace(const s2d_quantization* quantization, int32_t threads) {
  using namespace s2d_cpu;
  if (!quantization || threads < 1 || threads > kMaxThreads || !valid(*quantization)) return 0;
  return static_cast<size_t>(Plan(*quantization).workspace(threads)) + 256;
}

int s2d_cpu_quantize(const s2d_quantization* quantization, int32_t threads, void* workspace, size_t workspace_bytes) {
  using namespace s2d_cpu;
  if (!quantization || threads < 1 || threads > kMaxThreads || !valid(*quantization)) return S2D_BAD_ARGUMENT;
  const Plan plan(*quantization);
  if (plan.items > INT32_MAX) return S2D_UNSUPPORTED;
  if (!workspace || reinterpret_cast<uintptr_t>(workspace) % 256 ||
      workspace_bytes < s2d_cpu_quantize_workspace(quantization, threads))
    return S2D_BAD_WORKSPACE;
  Work(plan, threads, workspace).run();
  return S2D_OK;
}
