// One step of AdamW for all tensors, the penalty of each formed on the fly: the formula and its rules are those of
// adamw.cu. Memory-bound: p, g, m, v are read and p, m, v written once; the threads share out pieces of them.
#include <math.h>

#include <algorithm>

#include "kernels.h"
#include "s2d_cpu.h"
#include "threads.h"

namespace s2d_cpu {
namespace {

constexpr int64_t kPieceElements = 64 * 1024;
constexpr int64_t kRows = 64;

int64_t element_bytes(int32_t dtype) { return dtype == S2D_FLOAT32 ? 4 : 2; }

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

bool is_empty(const s2d_adamw_layer& layer) { return layer.rows == 0 || layer.cols == 0; }

bool is_valid(const s2d_adamw_layer& layer, int32_t group_count) {
  if (layer.rows < 0 || layer.cols < 0 || layer.rank < 0 || layer.rank > S2D_MAX_RANK || layer.dtype < S2D_FLOAT32 ||
      layer.dtype > S2D_FLOAT16 || layer.group < 0 || layer.group >= group_count)
    return false;
  if (is_empty(layer)) return true;
  const bool overlapping = layer.rows > 1 && layer.param_stride < layer.cols && layer.param_stride > -layer.cols;
  const int64_t bytes = element_bytes(layer.dtype);
  for (const void* pointer : {static_cast<const void*>(layer.param), layer.grad,
                              static_cast<const void*>(layer.exp_avg), static_cast<const void*>(layer.exp_avg_sq)})
    if (!pointer || !aligned(pointer, bytes)) return false;
  if (!layer.step || !aligned(layer.step, 4) || overlapping) return false;
  return layer.rank == 0 || (layer.U && layer.Vh && layer.coefficients && aligned(layer.U, 4) && aligned(layer.Vh, 4) &&
                             aligned(layer.coefficients, 4) && aligned(layer.device_rank, 4));
}

int64_t rank_of(const s2d_adamw_layer& layer) {
  return layer.device_rank ? std::clamp<int64_t>(*layer.device_rank, 0, layer.rank) : layer.rank;
}

// A layer cut into pieces: of rows or, where it is one run of memory without a penalty, of elements.
struct Cut {
  int64_t rank, rows, cols;
  bool flat;

  explicit Cut(const s2d_adamw_layer& layer) : rank(rank_of(layer)) {
    flat = rank == 0 && (layer.rows == 1 || (layer.param_stride == layer.cols && layer.grad_stride == layer.cols));
    cols = flat ? kPieceElements : layer.cols;
    rows = flat ? 1 : std::clamp<int64_t>(kPieceElements / std::max<int64_t>(layer.cols, 1), 1, kRows);
  }
  int64_t pieces(const s2d_adamw_layer& layer) const {
    if (is_empty(layer)) return 0;
    return flat ? (layer.rows * layer.cols + cols - 1) / cols : (layer.rows + rows - 1) / rows;
  }
};

AdamWRule rule_of(const s2d_adamw_layer& layer, const s2d_adamw_group& group, const s2d_adamw_options& options) {
  const float clip = options.clip_coef ? *options.clip_coef : 1.0f;
  const float scale = options.grad_scale ? *options.grad_scale : 1.0f;
  const double lr = group.device_lr ? *group.device_lr : group.lr, step = *layer.step;
  AdamWRule rule;
  rule.grad_factor = (group.maximize ? -clip : clip) / scale;
  rule.one_minus_beta1 = static_cast<float>(1.0 - group.beta1);
  rule.beta2 = static_cast<float>(group.beta2);
  rule.one_minus_beta2 = static_cast<float>(1.0 - group.beta2);
  rule.eps = static_cast<float>(group.eps);
  rule.decay = static_cast<float>(lr * group.weight_decay);
  rule.step_size = static_cast<float>(lr / (1.0 - pow(group.beta1, step)));
  rule.inverse_root = static_cast<float>(1.0 / sqrt(1.0 - pow(group.beta2, step)));
  rule.decoupled = options.decoupled != 0;
  return rule;
}

void work_on(const s2d_adamw_layer& layer, const Cut& cut, int64_t piece, const AdamWRule& rule, float penalty_factor) {
  const int64_t first = piece * cut.rows, bytes = element_bytes(layer.dtype);
  float left[kRows * S2D_MAX_RANK];
  AdamWRows rows{};
  rows.rank = cut.rank;
  if (cut.flat) {
    rows.rows = 1;
    rows.cols = std::min(cut.cols, layer.rows * layer.cols - piece * cut.cols);
  } else {
    rows.rows = std::min(cut.rows, layer.rows - first);
    rows.cols = layer.cols;
  }
  const int64_t start = cut.flat ? piece * cut.cols : first * layer.param_stride;
  const int64_t grad_start = cut.flat ? start : first * layer.grad_stride;
  rows.param = static_cast<char*>(layer.param) + start * bytes;
  rows.exp_avg = static_cast<char*>(layer.exp_avg) + start * bytes;
  rows.exp_avg_sq = static_cast<char*>(layer.exp_avg_sq) + start * bytes;
  rows.grad = static_cast<const char*>(layer.grad) + grad_start * bytes;
  rows.param_stride = layer.param_stride;
  rows.grad_stride = layer.grad_stride;
  rows.left = left;
  rows.right = layer.Vh;
  rows.ldr = layer.vh_stride;
  for (int64_t r = 0; r < rows.rows; ++r)
    for (int64_t i = 0; i < cut.rank; ++i)
      left[r * cut.rank + i] =
          layer.U[(first + r) * layer.u_row_stride + i * layer.u_col_stride] * layer.coefficients[i] * penalty_factor;
  kernels().adamw_rows(rows, layer.dtype, rule);
}

// Where a thread is in the table: its pieces ascend.
struct Cursor {
  int32_t layer;
  int64_t before;  // pieces of the layers before
};

}  // namespace
}  // namespace s2d_cpu

int s2d_cpu_adamw(const s2d_adamw_layer* layers, int32_t count, const s2d_adamw_group* groups, int32_t group_count,
                  const s2d_adamw_options* options, int32_t threads) {
  using namespace s2d_cpu;
  if (count < 0 || group_count < 0 || !options || (count && !layers) || (group_count && !groups) || threads < 1 ||
      threads > kMaxThreads ||
      !std::all_of(layers, layers + count, [=](const s2d_adamw_layer& layer) { return is_valid(layer, group_count); }))
    return S2D_BAD_ARGUMENT;
  if (options->found_inf && *options->found_inf != 0.0f) return S2D_OK;
  const bool clips = options->clip_coef && options->clip_penalty && !options->decoupled;
  const float penalty_factor = clips ? *options->clip_coef : 1.0f;
  int64_t total = 0;
  for (int32_t i = 0; i < count; ++i) total += Cut(layers[i]).pieces(layers[i]);
  if (total > INT32_MAX) return S2D_UNSUPPORTED;
  Cursor cursors[kMaxThreads] = {};
  share_out(static_cast<int32_t>(total), threads, [&](int32_t item, int32_t thread) {
    Cursor& at = cursors[thread];
    for (;; ++at.layer) {
      const s2d_adamw_layer& layer = layers[at.layer];
      const Cut cut(layer);
      const int64_t pieces = cut.pieces(layer);
      if (item < at.before + pieces) {
        work_on(layer, cut, item - at.before, rule_of(layer, groups[layer.group], *options), penalty_factor);
        return;
      }
      at.before += pieces;
    }
  });
  return S2D_OK;
}
