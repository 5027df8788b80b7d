// The integer linear layer and its straight-through gradients: operands packed once a call, tiles of exact sums in
// registers, the epilogue on a tile in the first-level cache.
#include <string.h>

#include <algorithm>
#include <atomic>

#include "integer_kernels.h"
#include "s2d_cpu.h"
#include "threads.h"

namespace s2d_cpu {
namespace {

constexpr int64_t kBlockWords = 96 * 1024;  // of packed columns that a thread goes over again and again: 384 KiB
constexpr int64_t kItemRows = 96;
constexpr int64_t kPackedWords = 64 * 1024;   // that a thread packs at a time, at least a panel
constexpr int64_t kAlone = 1 << 21;           // products that are not worth a second thread
constexpr int64_t kGatheredRows = 32;         // rows of a transposed gradient that are read together

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <typename T>
T* carve(char** memory, int64_t count) {
  T* const start = reinterpret_cast<T*>(*memory);
  *memory += rounded_up(count * static_cast<int64_t>(sizeof(T)), 256);
  return start;
}

// Tiles of a product of packed rows and columns, shared out in blocks: item -> panels of rows, panels of columns.
struct Blocks {
  int64_t row_panels, column_panels, rows_each, columns_each, down, across;

  Blocks(const IntegerKernels& kernels, int64_t rows, int64_t columns, int64_t words) {
    row_panels = parts(rows, kernels.rows);
    column_panels = parts(columns, kernels.columns);
    rows_each = std::max<int64_t>(1, kItemRows / kernels.rows);
    columns_each = std::clamp<int64_t>(kBlockWords / std::max<int64_t>(words * kernels.columns, 1), 1, 64);
    down = parts(row_panels, rows_each);
    across = parts(column_panels, columns_each);
  }

  int64_t items() const { return down * across; }

  template <typename Tile>
  void each(int64_t item, const Tile& tile) const {
    const int64_t top = item % down * rows_each, left = item / down * columns_each;
    for (int64_t i = top; i < std::min(row_panels, top + rows_each); ++i)
      for (int64_t j = left; j < std::min(column_panels, left + columns_each); ++j) tile(i, j);
  }
};

int32_t useful_threads(int32_t threads, int64_t products) { return products < kAlone ? 1 : threads; }

bool valid(const s2d_integer_product& p) {
  const bool sizes = p.M >= 0 && p.N >= 0 && p.K >= 0 && p.groups >= 0 && (p.groups ? p.K % p.groups == 0 : p.K == 0);
  const bool dtypes = p.bias_dtype == S2D_FLOAT32 && p.out_dtype >= S2D_FLOAT32 && p.out_dtype <= S2D_FLOAT16;
  if (!sizes || !dtypes || p.packed) return false;
  if (!p.M || !p.N) return true;
  if (p.y && p.groups && !(p.x_scale && p.w_scale)) return false;
  const bool operands = p.x_zero_point && p.w_zero_point && p.x_row_sum && p.w_row_sum;
  return !p.groups || (operands && (!p.K || (p.x_codes && p.w_codes)));
}

class Product {
 public:
  explicit Product(const s2d_integer_product& given) : p_(given) {
    size_ = p_.groups ? p_.K / p_.groups : 0;
    group_words_ = parts(size_, kernels_.step);
    words_ = group_words_ * p_.groups;
    row_panels_ = parts(p_.M, kernels_.rows);
    column_panels_ = parts(p_.N, kernels_.columns);
    columns_ = column_panels_ * kernels_.columns;
  }

  int64_t workspace() {
    char* end = nullptr;
    carve_all(&end);
    return end - static_cast<char*>(nullptr);
  }

  void run(int32_t threads, void* workspace) {
    char* memory = static_cast<char*>(workspace);
    carve_all(&memory);
    threads = useful_threads(threads, p_.M * p_.N * std::max<int64_t>(p_.K, 1));
    const int64_t together = std::max<int64_t>(1, kPackedWords / std::max<int64_t>(1, words_ * kernels_.columns));
    const int64_t column_items = parts(column_panels_, together), row_items = parts(row_panels_, 4 * together);
    share_out(static_cast<int32_t>(column_items + row_items), threads, [&](int32_t item, int32_t) {
      if (item < column_items) {
        for (int64_t j = item * together; j < std::min(column_panels_, (item + 1) * together); ++j) pack_columns(j);
      } else {
        const int64_t start = (item - column_items) * 4 * together;
        for (int64_t i = start; i < std::min(row_panels_, start + 4 * together); ++i) pack_rows(i);
      }
    });
    const Blocks blocks(kernels_, p_.M, p_.N, words_);
    share_out(static_cast<int32_t>(blocks.items()), threads, [&](int32_t item, int32_t) {
      const DefaultArithmetic guard;
      blocks.each(item, [&](int64_t i, int64_t j) { tile(i, j); });
    });
  }

 private:
  void carve_all(char** memory) {
    x_ = carve<uint32_t>(memory, row_panels_ * kernels_.rows * words_);
    w_ = carve<uint32_t>(memory, columns_ * words_);
    w_offset_ = carve<uint32_t>(memory, columns_ * p_.groups);
    w_rest_ = carve<uint32_t>(memory, columns_ * p_.groups);
    w_scale_ = carve<float>(memory, columns_ * p_.groups);
  }

  void pack_columns(int64_t panel) const {
    const int64_t width = kernels_.columns, start = panel * width, count = std::min(p_.N - start, width);
    const int8_t* const codes = static_cast<const int8_t*>(p_.w_codes) + start * p_.K;
    for (int64_t group = 0; group < p_.groups; ++group) {
      kernels_.pack(codes + group * size_, p_.K, count, size_, width, true,
                    w_ + (panel * words_ + group * group_words_) * width);
      for (int64_t c = 0; c < width; ++c) {
        const int64_t n = start + c, to = group * columns_ + n;
        const int64_t from = p_.w_per_tensor ? 0 : n * p_.groups + group;
        const uint32_t zero = c < count ? static_cast<uint32_t>(p_.w_zero_point[from]) : 0;
        w_offset_[to] = c < count ? kernels_.offset + zero : 0;
        w_rest_[to] = c < count ? static_cast<uint32_t>(p_.w_row_sum[n * p_.groups + group]) -
                                      static_cast<uint32_t>(size_) * zero
                                : 0;
        w_scale_[to] = c < count && p_.w_scale ? p_.w_scale[from] : 0.f;
      }
    }
  }

  void pack_rows(int64_t panel) const {
    const int64_t width = kernels_.rows, start = panel * width, count = std::min(p_.M - start, width);
    const int8_t* const codes = static_cast<const int8_t*>(p_.x_codes) + start * p_.K;
    for (int64_t group = 0; group < p_.groups; ++group)
      kernels_.pack(codes + group * size_, p_.K, count, size_, width, false,
                    x_ + (panel * words_ + group * group_words_) * width);
  }

  void tile(int64_t i, int64_t j) const {
    alignas(64) int32_t sums[kMostRows * kMostColumns];
    alignas(64) float total[kMostRows * kMostColumns];
    uint32_t x_sum[kMostRows], x_zero[kMostRows];
    float x_scale[kMostRows];
    const int64_t top = i * kernels_.rows, left = j * kernels_.columns;
    const int64_t count = std::min(kernels_.rows, p_.M - top), width = std::min(kernels_.columns, p_.N - left);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = p_.x_per_tensor ? 0 : top + r;
      x_zero[r] = p_.groups ? static_cast<uint32_t>(p_.x_zero_point[at]) : 0;
      x_scale[r] = p_.x_scale ? p_.x_scale[at] : 0.f;
    }
    if (!p_.groups) std::fill(total, total + kMostRows * kMostColumns, 0.f);
    for (int64_t group = 0; group < p_.groups; ++group) {
      kernels_.tile(x_ + (i * words_ + group * group_words_) * kernels_.rows,
                    w_ + (j * words_ + group * group_words_) * kernels_.columns, group_words_, count, width, sums);
      for (int64_t r = 0; r < count; ++r) x_sum[r] = static_cast<uint32_t>(p_.x_row_sum[(top + r) * p_.groups + group]);
      const int64_t of_w = group * columns_ + left;
      const Scaling scaling{x_sum, x_zero, w_offset_ + of_w, w_rest_ + of_w, x_scale, w_scale_ + of_w};
      kernels_.scale(sums, count, width, scaling, group > 0, p_.y ? total : nullptr);
      for (int64_t r = 0; p_.accumulator && r < count; ++r)
        memcpy(p_.accumulator + (group * p_.M + top + r) * p_.N + left, sums + r * kernels_.columns,
               static_cast<size_t>(width) * sizeof *sums);
    }
    if (!p_.y) return;
    const float* const bias = p_.bias ? static_cast<const float*>(p_.bias) + left : nullptr;
    char* const out = static_cast<char*>(p_.y) + (top * p_.N + left) * (p_.out_dtype == S2D_FLOAT32 ? 4 : 2);
    kernels_.store(total, count, width, bias, out, p_.out_dtype, p_.N);
  }

  const s2d_integer_product& p_;
  const IntegerKernels& kernels_ = integer_kernels();
  int64_t size_, group_words_, words_, row_panels_, column_panels_, columns_;
  uint32_t *x_, *w_, *w_offset_, *w_rest_;
  float* w_scale_;
};

bool valid(const s2d_cpu_straight_through& g) {
  const bool kinds = g.bits >= 2 && g.bits <= 8 && g.places >= 1 && g.places <= kMostPlaces && g.dtype >= S2D_FLOAT32 &&
                     g.dtype <= S2D_FLOAT16 && g.out_dtype >= S2D_FLOAT32 && g.out_dtype <= S2D_FLOAT16;
  if (!kinds || g.rows < 0 || g.depth < 0 || g.cols < 0 || !g.finite) return false;
  const bool nothing = !g.rows || !g.cols;
  return nothing || (g.mask && g.out && (!g.depth || (g.grad && g.codes && g.scale && g.zero_point)));
}

// ((grad * scale) @ (codes - zero_point)) * mask, by digits: s2d_kernels/fixed_point.py has the arithmetic.
class Gradient {
 public:
  explicit Gradient(const s2d_cpu_straight_through& given) : g_(given) {
    words_ = parts(g_.depth, kernels_.step);
    row_panels_ = parts(g_.rows, kernels_.rows);
    column_panels_ = parts(g_.cols, kernels_.columns);
    length_ = rounded_up(g_.depth, 64) + 64;  // rows of a buffer in different sets of the caches
    gathered_ = g_.row_stride == 1 && g_.depth_stride != 1 ? kGatheredRows / kernels_.rows * kernels_.rows : kernels_.rows;
  }

  int64_t workspace(int32_t threads) {
    char* end = nullptr;
    carve_all(&end, threads);
    return end - static_cast<char*>(nullptr);
  }

  void run(int32_t threads, void* workspace) {
    char* memory = static_cast<char*>(workspace);
    carve_all(&memory, threads);
    threads = useful_threads(threads, g_.rows * g_.cols * std::max<int64_t>(g_.depth, 1));
    std::atomic<bool> finite{true};
    const int64_t row_items = parts(g_.rows, gathered_);
    share_out(static_cast<int32_t>(row_items + column_panels_), threads, [&](int32_t item, int32_t thread) {
      const DefaultArithmetic guard;
      if (item >= row_items) {
        pack_columns(item - row_items);
      } else if (finite.load(std::memory_order_relaxed) && !pack_rows(item * gathered_, thread)) {
        finite.store(false, std::memory_order_relaxed);
      }
    });
    *g_.finite = finite;
    if (!finite) return;
    const Blocks blocks(kernels_, g_.rows, g_.cols, words_);
    share_out(static_cast<int32_t>(blocks.items()), threads, [&](int32_t item, int32_t) {
      const DefaultArithmetic guard;
      blocks.each(item, [&](int64_t i, int64_t j) { tile(i, j); });
    });
  }

 private:
  void carve_all(char** memory, int32_t threads) {
    padded_ = row_panels_ * kernels_.rows;
    rows_ = carve<uint32_t>(memory, padded_ * g_.places * words_);
    columns_ = carve<uint32_t>(memory, column_panels_ * kernels_.columns * words_);
    digit_sums_ = carve<uint32_t>(memory, padded_ * g_.places);
    units_ = carve<float>(memory, padded_);
    buffers_ = carve<float>(memory, threads * gathered_ * length_);
    digits_ = carve<int8_t>(memory, threads * g_.places * kernels_.rows * length_);
  }

  void pack_columns(int64_t panel) const {
    const int64_t start = panel * kernels_.columns, count = std::min(g_.cols - start, kernels_.columns);
    const bool nibbles = g_.bits <= 4;
    kernels_.pack_columns(static_cast<const uint8_t*>(g_.codes), nibbles ? (g_.cols + 1) / 2 : g_.cols, start, count,
                          g_.depth, g_.zero_point, g_.per_tensor ? 0 : 1, nibbles, g_.symmetric,
                          columns_ + panel * words_ * kernels_.columns);
  }

  // Rows of the gradient in fp32 into the thread's buffer.
  void gather(int64_t top, int64_t count, float* buffer) const {
    const int64_t bytes = g_.dtype == S2D_FLOAT32 ? 4 : 2;
    const char* const grad = static_cast<const char*>(g_.grad);
    if (g_.row_stride != 1 || g_.depth_stride == 1) {
      for (int64_t r = 0; r < count; ++r)
        kernels_.widen(grad + (top + r) * g_.row_stride * bytes, g_.dtype, g_.depth, g_.depth_stride,
                       buffer + r * length_);
      return;
    }
    constexpr int64_t kPiece = 16;
    float piece[kPiece * kGatheredRows];
    for (int64_t d = 0; d < g_.depth; d += kPiece) {
      const int64_t deep = std::min(kPiece, g_.depth - d);
      for (int64_t t = 0; t < deep; ++t)
        kernels_.widen(grad + ((d + t) * g_.depth_stride + top) * bytes, g_.dtype, count, 1, piece + t * kGatheredRows);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t t = 0; t < deep; ++t) buffer[r * length_ + d + t] = piece[t * kGatheredRows + r];
    }
  }

  bool pack_rows(int64_t top, int32_t thread) const {
    float* const buffer = buffers_ + thread * gathered_ * length_;
    int8_t* const digits = digits_ + thread * g_.places * kernels_.rows * length_;
    const int64_t count = std::min(gathered_, g_.rows - top);
    gather(top, count, buffer);
    for (int64_t start = 0; start < count; start += kernels_.rows) {
      const int64_t here = std::min(kernels_.rows, count - start), panel = (top + start) / kernels_.rows;
      for (int64_t r = 0; r < here; ++r) {
        float* const row = buffer + (start + r) * length_;
        const uint32_t largest = kernels_.weigh(row, g_.depth, g_.scale, g_.per_tensor ? 0 : 1);
        if (largest >= 0x7f800000u) return false;
        float most;
        memcpy(&most, &largest, sizeof most);
        const float unit = std::max(most / 127.f, 0x1p-126f);
        units_[top + start + r] = unit;
        int32_t sums[kMostPlaces];
        kernels_.digits(row, g_.depth, unit, g_.places, digits + r * length_, kernels_.rows * length_, sums);
        for (int64_t place = 0; place < g_.places; ++place)
          digit_sums_[place * padded_ + top + start + r] = static_cast<uint32_t>(sums[place]);
      }
      for (int64_t place = 0; place < g_.places; ++place)
        kernels_.pack(digits + place * kernels_.rows * length_, length_, here, g_.depth, kernels_.rows, false,
                      rows_ + (panel * g_.places + place) * words_ * kernels_.rows);
    }
    return true;
  }

  void tile(int64_t i, int64_t j) const {
    alignas(64) int32_t sums[kMostPlaces * kMostRows * kMostColumns];
    const int64_t top = i * kernels_.rows, left = j * kernels_.columns;
    const int64_t count = std::min(kernels_.rows, g_.rows - top), width = std::min(kernels_.columns, g_.cols - left);
    for (int64_t place = 0; place < g_.places; ++place)
      kernels_.tile(rows_ + (i * g_.places + place) * words_ * kernels_.rows, columns_ + j * words_ * kernels_.columns,
                    words_, count, width, sums + place * kMostRows * kernels_.columns);
    const int64_t mask_stride = (g_.cols + 7) / 8;
    char* const out = static_cast<char*>(g_.out) + (top * g_.cols + left) * (g_.out_dtype == S2D_FLOAT32 ? 4 : 2);
    kernels_.join(sums, g_.places, count, width, digit_sums_ + top, padded_, units_ + top,
                  g_.mask + top * mask_stride + left / 8, mask_stride, out, g_.out_dtype, g_.cols);
  }

  const s2d_cpu_straight_through& g_;
  const IntegerKernels& kernels_ = integer_kernels();
  int64_t words_, row_panels_, column_panels_, length_, gathered_, padded_;
  uint32_t *rows_, *columns_, *digit_sums_;
  float *units_, *buffers_;
  int8_t* digits_;
};

int check(int32_t threads, const void* workspace, size_t given, int64_t needed) {
  if (threads < 1 || threads > kMaxThreads) return S2D_BAD_ARGUMENT;
  const bool aligned = workspace && reinterpret_cast<uintptr_t>(workspace) % 256 == 0;
  return aligned && given >= static_cast<size_t>(needed) ? S2D_OK : S2D_BAD_WORKSPACE;
}

}  // namespace
}  // namespace s2d_cpu

size_t s2d_cpu_integer_linear_workspace(const s2d_integer_product* product, int32_t threads) {
  using namespace s2d_cpu;
  if (!product || threads < 1 || threads > kMaxThreads || !valid(*product)) return 0;
  return static_cast<size_t>(Product(*product).workspace()) + 256;
}

int s2d_cpu_integer_linear(const s2d_integer_product* product, int32_t threads, void* workspace,
                           size_t workspace_bytes) {
  using namespace s2d_cpu;
  if (!product || !valid(*product)) return S2D_BAD_ARGUMENT;
  if (!product->M || !product->N) return S2D_OK;
  Product work(*product);
  const int status = check(threads, workspace, workspace_bytes, work.workspace());
  if (status == S2D_OK) work.run(threads, workspace);
  return status;
}

size_t s2d_cpu_straight_through_grad_workspace(const s2d_cpu_straight_through* gradient, int32_t threads) {
  using namespace s2d_cpu;
  if (!gradient || threads < 1 || threads > kMaxThreads || !valid(*gradient)) return 0;
  return static_cast<size_t>(Gradient(*gradient).workspace(threads)) + 256;
}

int s2d_cpu_straight_through_grad(const s2d_cpu_straight_through* gradient, int32_t threads, void* workspace,
                                  size_t workspace_bytes) {
  using namespace s2d_cpu;
  if (!gradient || !valid(*gradient)) return S2D_BAD_ARGUMENT;
  *gradient->finite = 1;
  if (!gradient->rows || !gradient->cols) return S2D_OK;
  Gradient work(*gradient);
  const int status = check(threads, workspace, workspace_bytes, work.workspace(threads));
  if (status == S2D_OK) work.run(threads, workspace);
  return status;
}
