// grad += U diag(coefficients) Vh of many layers, one pass over the gradients: the threads share out pieces of them.
#include <algorithm>

#include "kernels.h"
#include "s2d_cpu.h"
#include "threads.h"

namespace s2d_cpu {
namespace {

constexpr int64_t kPieceElements = 64 * 1024;
constexpr int64_t kRows = 64;

int64_t rank_of(const s2d_penalty_layer& layer) {
  return layer.device_rank ? std::clamp<int64_t>(*layer.device_rank, 0, layer.rank) : layer.rank;
}

int64_t rows_of_piece(const s2d_penalty_layer& layer) {
  return std::clamp<int64_t>(kPieceElements / std::max<int64_t>(layer.cols, 1), 1, kRows);
}

int64_t pieces(const s2d_penalty_layer& layer) {
  if (!rank_of(layer) || !layer.cols) return 0;
  return (layer.rows + rows_of_piece(layer) - 1) / rows_of_piece(layer);
}

bool valid(const s2d_penalty_layer& layer) {
  const bool sizes = layer.rows >= 0 && layer.cols >= 0 && layer.rank >= 0 && layer.rank <= S2D_MAX_RANK &&
                     layer.dtype >= S2D_FLOAT32 && layer.dtype <= S2D_FLOAT16 &&
                     !(layer.device_seed && layer.dtype == S2D_FLOAT16);
  const bool nothing = layer.rank == 0 || layer.rows == 0 || layer.cols == 0;
  const bool pointers = layer.grad && layer.U && layer.Vh && layer.coefficients;
  return sizes && (nothing || (pointers && (layer.rows == 1 || layer.grad_stride >= layer.cols)));
}

void work_on(const s2d_penalty_layer& layer, int64_t piece) {
  const int64_t rank = rank_of(layer), first = piece * rows_of_piece(layer);
  const int64_t rows = std::min(rows_of_piece(layer), layer.rows - first);
  float left[kRows * S2D_MAX_RANK];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < rank; ++i)
      left[r * rank + i] = layer.U[(first + r) * layer.u_row_stride + i * layer.u_col_stride] * layer.coefficients[i];
  char* const start = static_cast<char*>(layer.grad) + first * layer.grad_stride * (layer.dtype == S2D_FLOAT32 ? 4 : 2);
  kernels().add_low_rank(start, layer.dtype, layer.grad_stride, rows, layer.cols, left, layer.Vh, layer.vh_stride, rank,
                         layer.device_seed, first);
}

}  // namespace
}  // namespace s2d_cpu

int s2d_cpu_add_penalty_grad(const s2d_penalty_layer* layers, int32_t count, int32_t threads) {
  using namespace s2d_cpu;
  if (count < 0 || (count && !layers) || threads < 1 || threads > kMaxThreads ||
      !std::all_of(layers, layers + count, [](const s2d_penalty_layer& layer) { return valid(layer); }))
    return S2D_BAD_ARGUMENT;
  int64_t total = 0;
  for (int32_t i = 0; i < count; ++i) total += pieces(layers[i]);
  if (total > INT32_MAX) return S2D_UNSUPPORTED;
  share_out(static_cast<int32_t>(total), threads, [&](int32_t item, int32_t) {
    int64_t piece = item;
    int32_t layer = 0;
    while (piece >= pieces(layers[layer])) piece -= pieces(layers[layer++]);
    work_on(layers[layer], piece);
  });
  return S2D_OK;
}
