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

constexpr int64_t kChunkWords = 96 * 1024;  // of rows that a thread packs and goes over again and again: 384 KiB
constexpr int64_t kPackedWords = 64 * 1024;  // of columns that a thread packs at a time, at least a panel
constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kAlone = 1 << 21;  // products that are not worth a second thread

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <typename T>
T* carve(char** memory, int64_t count) {
  T* const start = reinterpret_cast<T*>(*memory);
  *memory += rounded_up(count * static_cast<int64_t>(sizeof(T)), 256);
  return start;
}

// Fetches what a tile will write while its sums are computed.
void fetch_to_write(char* out, int64_t rows, int64_t row_bytes, int64_t stride_bytes) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(out + r * stride_bytes + at, 1);
}

// A product [rows, columns] over words of depth, as items: some rows, which the thread packs into its own memory, times
// some panels of columns, which are packed before. Few rows are packed several times, for several threads; of many the
// last ones are taken by less, so that no thread waits long for another.
struct Items {
  int64_t rows, column_panels, chunk, last_chunk, whole, chunks, panels_each, splits;

  Items(const IntegerKernels& kernels, int64_t rows_in, int64_t columns, int64_t words_of_row, int32_t threads)
      : rows(rows_in), column_panels(parts(columns, kernels.columns)) {
    const int64_t fitting = kChunkWords / std::max<int64_t>(words_of_row, 1);
    const int64_t panels = std::min(std::min(fitting, kMostLines), rows + kernels.rows - 1) / kernels.rows;
    chunk = std::max<int64_t>(panels, 1) * kernels.rows;
    chunks = std::max<int64_t>(parts(rows, chunk), 1);
    const int64_t wanted = threads == 1 ? 1 : parts(kItemsPerThread * threads, chunks);
    panels_each = std::max<int64_t>(parts(column_panels, wanted), 1);
    splits = parts(column_panels, panels_each);
    whole = threads == 1 || wanted > 1 ? chunks : std::max<int64_t>(rows / chunk - threads, 0);
    last_chunk = parts(chunk, kItemsPerThread * kernels.rows) * kernels.rows;
    if (whole < chunks) chunks = whole + parts(rows - whole * chunk, last_chunk);
  }

  int32_t count() const { return static_cast<int32_t>(chunks * splits); }

  // pack(top, count) makes panels of the rows from `top` on, tile(top, panel, j) works on the `panel`-th of them.
  template <typename Pack, typename Tile>
  void work(int64_t item, int64_t rows_of_panel, const Pack& pack, const Tile& tile) const {
    const int64_t place = item % chunks, first = item / chunks * panels_each;
    const int64_t top = std::min(place, whole) * chunk + std::max<int64_t>(place - whole, 0) * last_chunk;
    const int64_t here = std::min(place < whole ? chunk : last_chunk, rows - top);
    if (!pack(top, here)) return;
    for (int64_t j = first; j < std::min(column_panels, first + panels_each); ++j)
      for (int64_t panel = 0; panel * rows_of_panel < here; ++panel) tile(top + panel * rows_of_panel, panel, j);
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
  Product(const s2d_integer_product& given, int32_t threads)
      : p_(given),
        threads_(useful_threads(threads, p_.M * p_.N * std::max<int64_t>(p_.K, 1))),
        size_(p_.groups ? p_.K / p_.groups : 0),
        group_words_(kernels_.word_count(size_)),
        words_(group_words_ * p_.groups),
        items_(kernels_, p_.M, p_.N, words_, threads_),
        columns_(items_.column_panels * kernels_.columns) {}

  size_t workspace() {
    char* end = nullptr;
    carve_all(&end);
    return static_cast<size_t>(end - static_cast<char*>(nullptr));
  }

  void run(void* workspace) {
    char* memory = static_cast<char*>(workspace);
    carve_all(&memory);
    by_pairs_ = kernels_.pairs && bytes_fit();
    const int64_t together = std::max<int64_t>(1, kPackedWords / std::max<int64_t>(1, words_ * kernels_.columns));
    const int64_t panels = items_.column_panels;
    share_out(static_cast<int32_t>(parts(panels, together)), threads_, [&](int32_t item, int32_t) {
      for (int64_t j = item * together; j < std::min(panels, (item + 1) * together); ++j) pack_columns(j);
    });
    share_out(items_.count(), threads_, [&](int32_t item, int32_t thread) {
      const DefaultArithmetic guard;
      uint32_t* const x = x_ + thread * items_.chunk * words_;
      uint32_t* const excess = x_excess_ + thread * items_.chunk * p_.groups;
      items_.work(
          item, kernels_.rows, [&](int64_t top, int64_t count) { return pack_rows(top, count, x, excess); },
          [&](int64_t top, int64_t panel, int64_t j) {
            const int64_t row = panel * kernels_.rows;
            tile(x + row * words_, excess + row * p_.groups, top, j);
          });
    });
  }

 private:
  void carve_all(char** memory) {
    x_ = carve<uint32_t>(memory, threads_ * items_.chunk * words_);
    x_excess_ = carve<uint32_t>(memory, threads_ * items_.chunk * p_.groups);
    w_ = carve<uint32_t>(memory, columns_ * words_);
    w_excess_ = carve<uint32_t>(memory, columns_ * p_.groups);
    w_zero_point_ = carve<uint32_t>(memory, columns_ * p_.groups);
    w_rest_ = carve<uint32_t>(memory, columns_ * p_.groups);
    w_scale_ = carve<float>(memory, columns_ * p_.groups);
  }

  // Whether a code of x and one of w add up to a byte, whichever they are.
  bool bytes_fit() const {
    if (!p_.M || !p_.N) return false;
    const auto first_fit = [this](int64_t most) {
      const Range x = range_of(p_.x_codes, std::min(p_.M * p_.K, most));
      const Range w = range_of(p_.w_codes, std::min(p_.N * p_.K, most));
      return x.low + w.low >= -128 && x.high + w.high <= 127;
    };
    return first_fit(4096) && first_fit(INT64_MAX);  // codes of 8 bits are found out by a few
  }

  // Of codes and 0.
  Range range_of(const void* codes, int64_t count) const {
    constexpr int64_t kAtOnce = 1 << 18;
    Range of_thread[kMaxThreads];
    share_out(static_cast<int32_t>(parts(count, kAtOnce)), threads_, [&](int32_t item, int32_t thread) {
      const int64_t start = item * kAtOnce;
      kernels_.extremes(static_cast<const int8_t*>(codes) + start, std::min(count - start, kAtOnce),
                        &of_thread[thread].low, &of_thread[thread].high);
    });
    Range all{0, 0};
    for (const Range& one : of_thread) all = {std::min(all.low, one.low), std::max(all.high, one.high)};
    return all;
  }

  void pack_columns(int64_t panel) const {
    const int64_t width = kernels_.columns, start = panel * width, count = std::min(p_.N - start, width);
    const int8_t* const codes = static_cast<const int8_t*>(p_.w_codes) + start * p_.K;
    const Offset offset = by_pairs_ ? Offset::kSecondWords : Offset::kAllWords;
    for (int64_t group = 0; group < p_.groups; ++group) {
      uint32_t* const words = w_ + (panel * words_ + group * group_words_) * width;
      kernels_.pack(codes + group * size_, p_.K, count, size_, width, offset, words);
      kernels_.column_excess(words, group_words_, by_pairs_, w_excess_ + group * columns_ + start);
      for (int64_t c = 0; c < width; ++c) {
        const int64_t n = start + c, to = group * columns_ + n;
        const int64_t from = p_.w_per_tensor ? 0 : n * p_.groups + group;
        const uint32_t zero = c < count ? static_cast<uint32_t>(p_.w_zero_point[from]) : 0;
        w_zero_point_[to] = zero;
        w_rest_[to] = c < count ? static_cast<uint32_t>(p_.w_row_sum[n * p_.groups + group]) -
                                      static_cast<uint32_t>(size_) * zero
                                : 0;
        w_scale_[to] = c < count && p_.w_scale ? p_.w_scale[from] : 0.f;
      }
    }
  }

  // Of a panel, words [groups, words of a group, rows] and the excess [groups, rows].
  bool pack_rows(int64_t top, int64_t count, uint32_t* x, uint32_t* excess) const {
    for (int64_t start = 0; start < count; start += kernels_.rows, x += kernels_.rows * words_) {
      const int8_t* const codes = static_cast<const int8_t*>(p_.x_codes) + (top + start) * p_.K;
      for (int64_t group = 0; group < p_.groups; ++group, excess += kernels_.rows) {
        uint32_t* const words = x + group * group_words_ * kernels_.rows;
        kernels_.pack(codes + group * size_, p_.K, std::min(kernels_.rows, count - start), size_, kernels_.rows,
                      Offset::kNone, words);
        kernels_.row_excess(words, group_words_, by_pairs_, excess);
      }
    }
    return true;
  }

  void tile(const uint32_t* x, const uint32_t* excess, int64_t top, int64_t j) const {
    int32_t sums[kMostRows * kMostColumns];
    float total[kMostRows * kMostColumns];
    uint32_t x_sum[kMostRows], x_zero[kMostRows];
    float x_scale[kMostRows];
    const int64_t left = j * kernels_.columns;
    const int64_t count = std::min(kernels_.rows, p_.M - top), width = std::min(kernels_.columns, p_.N - left);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = p_.x_per_tensor ? 0 : top + r;
      x_zero[r] = p_.groups ? static_cast<uint32_t>(p_.x_zero_point[at]) : 0;
      x_scale[r] = p_.x_scale ? p_.x_scale[at] : 0.f;
    }
    const int64_t bytes = p_.out_dtype == S2D_FLOAT32 ? 4 : 2;
    char* const out = p_.y ? static_cast<char*>(p_.y) + (top * p_.N + left) * bytes : nullptr;
    if (out) fetch_to_write(out, count, width * bytes, p_.N * bytes);
    if (!p_.groups) std::fill(total, total + kMostRows * kMostColumns, 0.f);
    for (int64_t group = 0; group < p_.groups; ++group) {
      kernels_.tile(x + group * group_words_ * kernels_.rows,
                    w_ + (j * words_ + group * group_words_) * kernels_.columns, group_words_, count, width, by_pairs_,
                    sums);
      for (int64_t r = 0; r < count; ++r) x_sum[r] = static_cast<uint32_t>(p_.x_row_sum[(top + r) * p_.groups + group]);
      const int64_t of_w = group * columns_ + left;
      const Scaling scaling{excess + group * kernels_.rows, x_sum,          x_zero,  w_excess_ + of_w,
                            w_zero_point_ + of_w,           w_rest_ + of_w, x_scale, w_scale_ + of_w};
      kernels_.scale(sums, count, width, scaling, group > 0, p_.y ? total : nullptr);
      for (int64_t r = 0; p_.accumulator && r < count; ++r)
        memcpy(p_.accumulator + (group * p_.M + top + r) * p_.N + left, sums + r * kernels_.columns,
               static_cast<size_t>(width) * sizeof *sums);
    }
    if (!out) return;
    const float* const bias = p_.bias ? static_cast<const float*>(p_.bias) + left : nullptr;
    kernels_.store(total, count, width, bias, out, p_.out_dtype, p_.N);
  }

  const s2d_integer_product& p_;
  const IntegerKernels& kernels_ = integer_kernels();
  int32_t threads_;
  int64_t size_, group_words_, words_;
  Items items_;
  int64_t columns_;
  bool by_pairs_ = false;
  uint32_t *x_, *x_excess_, *w_, *w_excess_, *w_zero_point_, *w_rest_;
  float* w_scale_;
};

bool valid(const s2d_cpu_straight_through& g) {
  const bool kinds = g.bits >= 2 && g.bits <= 8 && g.places >= 1 && g.places <= kMostPlaces && g.largest_digit >= 1 &&
                     g.largest_digit <= 127 && g.dtype >= S2D_FLOAT32 && g.dtype <= S2D_FLOAT16 &&
                     g.out_dtype >= S2D_FLOAT32 && g.out_dtype <= S2D_FLOAT16;
  if (!kinds || g.rows < 0 || g.depth < 0 || g.cols < 0 || !g.finite) return false;
  const bool nothing = !g.rows || !g.cols;
  return nothing || (g.mask && g.out && (!g.depth || (g.grad && g.codes && g.scale && g.zero_point)));
}

// ((grad * scale) @ (codes - zero_point)) * mask, by digits: s2d_kernels/fixed_point.py has the arithmetic.
class Gradient {
 public:
  Gradient(const s2d_cpu_straight_through& given, int32_t threads)
      : g_(given),
        threads_(useful_threads(threads, g_.rows * g_.cols * std::max<int64_t>(g_.depth, 1))),
        words_(kernels_.word_count(g_.depth)),
        items_(kernels_, g_.rows, g_.cols, words_ * g_.places, threads_),
        transposed_(g_.row_stride == 1 && g_.depth_stride != 1),
        length_(rounded_up(g_.depth, 64) + 64) {}  // rows of a buffer begin in different sets of the caches

  size_t workspace() {
    char* end = nullptr;
    carve_all(&end);
    return static_cast<size_t>(end - static_cast<char*>(nullptr));
  }

  void run(void* workspace) {
    char* memory = static_cast<char*>(workspace);
    carve_all(&memory);
    by_pairs_ = kernels_.pairs && bytes_fit();
    share_out(static_cast<int32_t>(items_.column_panels), threads_, [&](int32_t item, int32_t) { pack_columns(item); });
    std::atomic<bool> finite{true};
    share_out(items_.count(), threads_, [&](int32_t item, int32_t thread) {
      const DefaultArithmetic guard;
      const int64_t first = thread * items_.chunk;
      const Packed packed{rows_ + first * g_.places * words_, row_excess_ + first * g_.places, units_ + first};
      items_.work(
          item, kernels_.rows,
          [&](int64_t top, int64_t count) {
            if (finite.load(std::memory_order_relaxed) && !pack_rows(top, count, thread, packed))
              finite.store(false, std::memory_order_relaxed);
            return finite.load(std::memory_order_relaxed);
          },
          [&](int64_t top, int64_t panel, int64_t j) { tile(packed, top, panel, j); });
    });
    *g_.finite = finite;
  }

 private:
  // A thread's rows: words of each digit [panels, places, words, rows of a panel], their excess [panels, places, rows
  // of a panel], units.
  struct Packed {
    uint32_t *words, *excess;
    float* units;
  };

  void carve_all(char** memory) {
    const int64_t rows = threads_ * items_.chunk;
    rows_ = carve<uint32_t>(memory, rows * g_.places * words_);
    row_excess_ = carve<uint32_t>(memory, rows * g_.places);
    units_ = carve<float>(memory, rows);
    columns_ = carve<uint32_t>(memory, items_.column_panels * kernels_.columns * words_);
    column_excess_ = carve<uint32_t>(memory, items_.column_panels * kernels_.columns);
    buffers_ = carve<float>(memory, threads_ * length_);
    digits_ = carve<int8_t>(memory, threads_ * g_.places * kernels_.rows * length_);
  }

  // Whether a digit and a code less its zero point add up to a byte, whichever they are.
  bool bytes_fit() const {
    const int32_t lowest = g_.bits > 4 ? -128 : g_.symmetric ? -8 : 0, highest = g_.bits > 4 ? 127 : lowest + 15;
    if (!g_.rows || !g_.cols) return false;
    const int64_t count = g_.symmetric ? 0 : g_.per_tensor ? std::min<int64_t>(g_.depth, 1) : g_.depth;
    Range zero{0, 0};
    for (int64_t d = 0; d < count; ++d)
      zero = {std::min(zero.low, g_.zero_point[d]), std::max(zero.high, g_.zero_point[d])};
    const int64_t low = int64_t{lowest} - zero.high, high = int64_t{highest} - zero.low;
    return low - g_.largest_digit >= -128 && high + g_.largest_digit <= 127;
  }

  void pack_columns(int64_t panel) const {
    const int64_t start = panel * kernels_.columns, count = std::min(g_.cols - start, kernels_.columns);
    const bool nibbles = g_.bits <= 4;
    uint32_t* const words = columns_ + panel * words_ * kernels_.columns;
    kernels_.pack_columns(static_cast<const uint8_t*>(g_.codes), nibbles ? (g_.cols + 1) / 2 : g_.cols, start, count,
                          g_.depth, g_.zero_point, g_.per_tensor ? 0 : 1, nibbles, g_.symmetric,
                          by_pairs_ ? Offset::kSecondWords : Offset::kAllWords, words);
    kernels_.column_excess(words, words_, by_pairs_, column_excess_ + start);
  }

  bool pack_rows(int64_t top, int64_t count, int32_t thread, const Packed& packed) const {
    if (!pack_digits(top, count, thread, packed)) return false;
    for (int64_t panel = 0; panel < parts(count, kernels_.rows) * g_.places; ++panel)
      kernels_.row_excess(packed.words + panel * words_ * kernels_.rows, words_, by_pairs_,
                          packed.excess + panel * kernels_.rows);
    return true;
  }

  bool pack_digits(int64_t top, int64_t count, int32_t thread, const Packed& packed) const {
    const int64_t bytes = g_.dtype == S2D_FLOAT32 ? 4 : 2, scale_stride = g_.per_tensor ? 0 : 1;
    const char* const grad = static_cast<const char*>(g_.grad) + top * g_.row_stride * bytes;
    if (transposed_)
      return kernels_.pack_digits(grad, g_.dtype, g_.depth_stride, count, g_.depth, g_.scale, scale_stride,
                                  g_.largest_digit, g_.places, packed.words, packed.units);
    float* const buffer = buffers_ + thread * length_;
    int8_t* const digits = digits_ + thread * g_.places * kernels_.rows * length_;
    for (int64_t start = 0; start < count; start += kernels_.rows) {
      const int64_t here = std::min(kernels_.rows, count - start);
      for (int64_t r = 0; r < here; ++r) {
        const char* const row = grad + (start + r) * g_.row_stride * bytes;
        const bool usable = g_.dtype == S2D_FLOAT32 && g_.depth_stride == 1;
        if (!usable) kernels_.widen(row, g_.dtype, g_.depth, g_.depth_stride, buffer);
        float& unit = packed.units[start + r];
        if (!kernels_.weigh(usable ? reinterpret_cast<const float*>(row) : buffer, g_.depth, g_.scale, scale_stride,
                            g_.largest_digit, buffer, &unit))
          return false;
        kernels_.digits(buffer, g_.depth, unit, g_.largest_digit, g_.places, digits + r * length_,
                        kernels_.rows * length_);
      }
      for (int64_t place = 0; place < g_.places; ++place)
        kernels_.pack(digits + place * kernels_.rows * length_, length_, here, g_.depth, kernels_.rows, Offset::kNone,
                      packed.words + (start * g_.places + place * kernels_.rows) * words_);
    }
    return true;
  }

  void tile(const Packed& packed, int64_t top, int64_t panel, int64_t j) const {
    int32_t sums[kMostPlaces * kMostRows * kMostColumns];
    const int64_t start = panel * kernels_.rows, left = j * kernels_.columns;
    const int64_t count = std::min(kernels_.rows, g_.rows - top), width = std::min(kernels_.columns, g_.cols - left);
    const int64_t bytes = g_.out_dtype == S2D_FLOAT32 ? 4 : 2;
    char* const out = static_cast<char*>(g_.out) + (top * g_.cols + left) * bytes;
    fetch_to_write(out, count, width * bytes, g_.cols * bytes);
    for (int64_t place = 0; place < g_.places; ++place)
      kernels_.tile(packed.words + (start * g_.places + place * kernels_.rows) * words_,
                    columns_ + j * words_ * kernels_.columns, words_, count, width, by_pairs_,
                    sums + place * kMostRows * kernels_.columns);
    const int64_t mask_stride = (g_.cols + 7) / 8;
    kernels_.join(sums, g_.largest_digit, g_.places, count, width, packed.excess + start * g_.places,
                  column_excess_ + left, packed.units + start, g_.mask + top * mask_stride + left / 8, mask_stride, out,
                  g_.out_dtype, g_.cols);
  }

  const s2d_cpu_straight_through& g_;
  const IntegerKernels& kernels_ = integer_kernels();
  int32_t threads_;
  int64_t words_;
  Items items_;
  bool transposed_;
  int64_t length_;
  bool by_pairs_ = false;
  uint32_t *rows_, *row_excess_, *columns_, *column_excess_;
  float *units_, *buffers_;
  int8_t* digits_;
};

template <typename Work, typename Arguments>
size_t workspace_of(const Arguments* arguments, int32_t threads) {
  if (!arguments || threads < 1 || threads > kMaxThreads || !valid(*arguments)) return 0;
  return Work(*arguments, threads).workspace() + 256;  // more than none, so that 0 means refused
}

template <typename Work, typename Arguments>
int run(const Arguments* arguments, int32_t threads, void* workspace, size_t workspace_bytes) {
  if (!arguments || threads < 1 || threads > kMaxThreads || !valid(*arguments)) return S2D_BAD_ARGUMENT;
  Work work(*arguments, threads);
  if (!workspace || reinterpret_cast<uintptr_t>(workspace) % 256 || workspace_bytes < work.workspace())
    return S2D_BAD_WORKSPACE;
  work.run(workspace);
  return S2D_OK;
}

}  // namespace
}  // namespace s2d_cpu

size_t s2d_cpu_integer_linear_workspace(const s2d_integer_product* product, int32_t threads) {
  return s2d_cpu::workspace_of<s2d_cpu::Product>(product, threads);
}

int s2d_cpu_integer_linear(const s2d_integer_product* product, int32_t threads, void* workspace,
                           size_t workspace_bytes) {
  return s2d_cpu::run<s2d_cpu::Product>(product, threads, workspace, workspace_bytes);
}

size_t s2d_cpu_straight_through_grad_workspace(const s2d_cpu_straight_through* gradient, int32_t threads) {
  return s2d_cpu::workspace_of<s2d_cpu::Gradient>(gradient, threads);
}

int s2d_cpu_straight_through_grad(const s2d_cpu_straight_through* gradient, int32_t threads, void* workspace,
                                  size_t workspace_bytes) {
  return s2d_cpu::run<s2d_cpu::Gradient>(gradient, threads, workspace, workspace_bytes);
}
