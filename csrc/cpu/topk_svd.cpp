// Top-k singular triplets of many matrices: block Krylov on A^T A (s2d_kernels/svd.py), one matrix per thread, and the
// large ones, before the others, one after another by all threads.
//
// A [D, d], D >= d, is W or its transpose. A block of b directions is kept as rows. One read of A, panel by panel:
//   Y[c, p] = sum_j A[p, j] Q[c, j],  Z[c, j] = sum_p Y[c, p] A[p, j]
// A panel stays in the second-level cache between the two products, a matrix in the third level between its reads.
// A large matrix is cut into slabs of rows whose parts of Z are summed in their order: by its shape alone, so that its
// bits depend neither on the number of threads nor on the other matrices.
#include <float.h>
#include <math.h>
#include <string.h>

#include <algorithm>
#include <cmath>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "kernels.h"
#include "s2d_cpu.h"
#include "threads.h"

namespace s2d_cpu {
namespace {

constexpr int64_t kPanel = 48 * 1024;  // fp32 numbers of a panel of rows: 192 KiB, a share of the second-level cache
constexpr int64_t kChunk = 256;        // columns of factors made at once
constexpr int64_t kLarge = 1 << 22;    // elements from which a matrix is all threads' work,
constexpr int64_t kSlab = 1 << 20;     // in slabs of about so many,
constexpr int64_t kMaxSlabs = 64;      // but not in more than these,
constexpr int64_t kSlabBytes = 1 << 27;  // whose sums take no more than this
constexpr int kOrthogonalizations = 3;
constexpr int32_t kConverged = 0, kNotConverged = 1, kNonFinite = 2, kOverflow = 4;  // as s2d_kernels/svd.py has them

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct State {
  int32_t exponent;  // |A| 2^-exponent < 1
  bool finite, zero;
};

// What the sizes of a layer determine.
struct Problem {
  const s2d_svd_layer& layer;
  bool wide, dense, by_columns, in_place;
  int64_t D, d, stride_D, stride_d;
  int64_t block, blocks, total;  // rows of a block, blocks, both multiplied
  int64_t width, ld, LD;         // block, d and D in whole vectors
  int64_t panel_rows, panel_columns;
  int64_t slab, slabs;  // rows of A that one thread works through, and the number of such parts

  explicit Problem(const s2d_svd_layer& given) : layer(given) {
    wide = layer.rows < layer.cols;
    D = wide ? layer.cols : layer.rows;
    d = wide ? layer.rows : layer.cols;
    stride_D = wide ? layer.col_stride : layer.row_stride;
    stride_d = wide ? layer.row_stride : layer.col_stride;
    dense = static_cast<int64_t>(layer.reads) * layer.width >= d;
    block = dense ? d : layer.width;
    blocks = dense ? 1 : layer.reads;
    total = block * blocks;
    width = rounded_up(block, kGroup);
    ld = rounded_up(d, kLanes);
    LD = rounded_up(D, kLanes);
    // A panel is some rows of A, or where A's columns are contiguous, some rows of A^T's transpose.
    by_columns = stride_d != 1 && stride_D == 1;
    panel_rows = std::clamp<int64_t>(kPanel / ld, 12, 3072) / 6 * 6;
    panel_columns = std::clamp<int64_t>(3 * kPanel / d, 48, 384) / 48 * 48;
    in_place = layer.dtype == S2D_FLOAT32 && (by_columns || (stride_d == 1 && d == ld));
    const int64_t of_slab = 8 * total * total + 4 * width * ld;  // bytes
    const int64_t most = std::clamp<int64_t>(kSlabBytes / of_slab, 1, kMaxSlabs);
    const int64_t parts = large() ? std::clamp<int64_t>(D * d / kSlab, 1, most) : 1;
    slab = rounded_up((D + parts - 1) / parts, by_columns ? panel_columns : panel_rows);
    slabs = (D + slab - 1) / slab;
  }

  bool large() const { return D * d >= kLarge; }

  int64_t cost() const { return D * d * width * blocks; }

  const void* element(int64_t row, int64_t column) const {
    const int64_t offset = row * stride_D + column * stride_d;
    return static_cast<const char*>(layer.weight) + offset * (layer.dtype == S2D_FLOAT32 ? 4 : 2);
  }
};

bool valid(const s2d_svd_layer& layer) {
  const bool pointers = layer.weight && layer.start && layer.U && layer.S && layer.Vh && layer.residual &&
                        layer.missed && layer.status;
  return pointers && layer.rows > 0 && layer.cols > 0 && layer.dtype >= S2D_FLOAT32 && layer.dtype <= S2D_FLOAT16 &&
         layer.width > 0 && layer.width <= std::min(layer.rows, layer.cols) && layer.k > 0 &&
         layer.k <= layer.width && layer.reads > 0;
}

#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kGap = 256;  // between two arrays, where an overrun shows
void forbid(char* start, int64_t bytes, int64_t gap) {
  ASAN_UNPOISON_MEMORY_REGION(start, bytes);
  ASAN_POISON_MEMORY_REGION(start + bytes, gap);
}
#else
constexpr int64_t kGap = 0;
void forbid(char*, int64_t, int64_t) {}
#endif

// Takes arrays from a piece of memory, or with a null one counts their bytes.
class Carver {
 public:
  explicit Carver(void* memory) : base_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    char* const start = base_ ? base_ + used_ : nullptr;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T)), taken = rounded_up(bytes, 256) + kGap;
    if (start) forbid(start, bytes, taken - bytes);
    used_ += taken;
    return reinterpret_cast<T*>(start);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// What each thread that works on a matrix has for itself.
struct Panels {
  float *packed, *part_packed, *panel;
  double* chunk;
};

// The memory for one matrix: all blocks of Q, Y and Z, rows padded with zeros, and what lies between them.
struct Scratch {
  int32_t threads;
  Panels panels[kMaxSlabs];  // of each thread
  float *K, *Y, *Z;
  float *block, *next, *packed, *against, *lengths, *gaussian;
  float* partial;  // [slabs, width * ld], of Z or, packed, of its transpose
  double* grams;   // [slabs, total, total]
  double *H, *vectors, *values, *work, *R, *chunk, *other, *theta;
  int64_t* order;
  Scratch(const Problem& p, int32_t given_threads, Carver& carver) {
    threads = p.large() ? static_cast<int32_t>(std::min<int64_t>(given_threads, p.slabs)) : 1;
    K = carver.take<float>(p.total * p.ld);
    Y = carver.take<float>(p.total * p.LD);
    Z = carver.take<float>(p.total * p.ld);
    for (float** member : {&block, &next, &packed}) *member = carver.take<float>(p.width * p.ld);
    for (int32_t thread = 0; thread < threads; ++thread) {
      Panels& own = panels[thread];
      own.packed = carver.take<float>(p.width * std::max(p.panel_rows, p.panel_columns));
      own.part_packed = carver.take<float>(p.by_columns ? p.width * p.ld : 0);
      own.panel = carver.take<float>(std::max(p.panel_rows * p.ld, p.d * p.panel_columns));
      own.chunk = carver.take<double>(p.layer.width * kChunk);
    }
    partial = carver.take<float>(p.slabs * p.width * p.ld);
    against = carver.take<float>(p.total * p.width);
    lengths = carver.take<float>(p.width);
    gaussian = carver.take<float>(p.ld);
    grams = carver.take<double>(p.slabs > 1 ? p.slabs * p.total * p.total : 0);
    H = carver.take<double>(p.total * p.total);
    vectors = carver.take<double>(p.total * p.total);
    for (double** member : {&values, &theta}) *member = carver.take<double>(p.total);
    work = carver.take<double>(2 * p.total);
    R = carver.take<double>(p.layer.width * p.total);
    for (double** member : {&chunk, &other}) *member = carver.take<double>(p.layer.width * kChunk);
    order = carver.take<int64_t>(p.total);
  }
};

// The order of the layers, large ones first and then the most expensive, and the memory of the matrices that are worked
// on at the same time.
struct Workspace {
  int32_t* order;
  char* scratch;
  int32_t large;
  int64_t scratch_bytes, bytes;

  Workspace(const s2d_svd_layer* layers, int32_t count, int32_t threads, void* memory) {
    Carver carver(memory);
    order = carver.take<int32_t>(count);
    scratch = static_cast<char*>(memory) + carver.used();
    large = 0;
    scratch_bytes = 0;
    int64_t large_bytes = 0;
    for (int32_t i = 0; i < count; ++i) {
      const Problem problem(layers[i]);
      Carver counter(nullptr);
      (void)Scratch(problem, threads, counter);
      int64_t& most = problem.large() ? large_bytes : scratch_bytes;
      most = std::max(most, counter.used());
      large += problem.large();
    }
    bytes = carver.used() + std::max(large_bytes, scratch_bytes * std::min(threads, count - large));
  }
};

// The largest |element|, as a power of two that exceeds it, and whether all are finite.
State find_scale(const Problem& problem, int32_t threads) {
  const bool along_D = problem.by_columns;
  const int64_t lines = along_D ? problem.d : problem.D, each = (lines + problem.slabs - 1) / problem.slabs;
  uint32_t most[kMaxSlabs] = {};
  share_out(static_cast<int32_t>(problem.slabs), threads, [&](int32_t part, int32_t) {
    for (int64_t i = part * each; i < std::min(lines, (part + 1) * each); ++i) {
      const void* line = along_D ? problem.element(0, i) : problem.element(i, 0);
      const uint32_t found = kernels().largest(line, problem.layer.dtype, along_D ? problem.D : problem.d,
                                               along_D ? problem.stride_D : problem.stride_d);
      most[part] = std::max(most[part], found);
    }
  });
  const uint32_t bits = *std::max_element(most, most + problem.slabs);
  State state;
  state.finite = bits < 0x7f800000u;
  state.zero = bits == 0;
  // The exponents of which both 2^e and 2^-e are normal numbers.
  state.exponent = state.finite ? std::clamp(static_cast<int32_t>(bits >> 23) - 126, -126, 126) : 0;
  return state;
}

// The factors of one product: half of the scale 2^-exponent goes before it and half after it, so that nothing leaves the
// range of fp32.
struct Halves {
  float before, after;
  explicit Halves(int32_t exponent)
      : before(ldexpf(1.0f, -exponent / 2)), after(ldexpf(1.0f, -exponent + exponent / 2)) {}
};

// Rows first..last of A: their part of `Y` [block, LD], and sum [width, ld] = their part of Z.
void product_of_rows(const Problem& p, const Scratch& scratch, const Panels& own, Halves scale, int64_t first,
                     int64_t last, float* Y, float* sum) {
  const Kernels& k = kernels();
  const int64_t width = p.width;
  memset(sum, 0, width * p.ld * sizeof(float));
  for (; first < last; first += p.panel_rows) {
    const int64_t rows = std::min(p.panel_rows, last - first);
    const float* A = static_cast<const float*>(p.element(first, 0));
    int64_t lda = p.stride_D;
    if (!p.in_place) {
      for (int64_t r = 0; r < rows; ++r) {
        k.widen(p.element(first + r, 0), p.layer.dtype, p.d, p.stride_d, own.panel + r * p.ld);
        std::fill(own.panel + r * p.ld + p.d, own.panel + (r + 1) * p.ld, 0.0f);
      }
      A = own.panel;
      lda = p.ld;
    }
    k.dot(A, lda, rows, p.ld, scratch.block, p.ld, width, own.packed);  // [rows, width]
    for (int64_t c = 0; c < p.block; ++c)
      for (int64_t r = 0; r < rows; ++r) Y[c * p.LD + first + r] = own.packed[r * width + c] * scale.after;
    for (int64_t i = 0; i < rows * width; ++i) own.packed[i] = own.packed[i] * scale.after * scale.before;
    k.accumulate(A, lda, rows, p.ld, own.packed, width, sum, p.ld);
  }
}

// The same where A's columns are contiguous; sum [d, width] is packed.
void product_of_columns(const Problem& p, const Scratch& scratch, const Panels& own, Halves scale, int64_t first,
                        int64_t last, float* Y, float* sum) {
  const Kernels& k = kernels();
  const int64_t width = p.width;
  memset(sum, 0, p.d * width * sizeof(float));
  for (; first < last; first += p.panel_columns) {
    const int64_t columns = std::min(p.panel_columns, last - first), padded = rounded_up(columns, kLanes);
    const float* A = static_cast<const float*>(p.element(first, 0));
    int64_t lda = p.stride_d;
    if (!p.in_place || columns != padded) {
      for (int64_t i = 0; i < p.d; ++i) {
        k.widen(p.element(first, i), p.layer.dtype, columns, 1, own.panel + i * padded);
        std::fill(own.panel + i * padded + columns, own.panel + (i + 1) * padded, 0.0f);
      }
      A = own.panel;
      lda = padded;
    }
    memset(own.packed, 0, width * padded * sizeof(float));  // [width, padded]
    k.accumulate(A, lda, p.d, padded, scratch.packed, width, own.packed, padded);
    for (int64_t i = 0; i < width * padded; ++i) own.packed[i] *= scale.after;
    for (int64_t c = 0; c < p.block; ++c) memcpy(Y + c * p.LD + first, own.packed + c * padded, columns * sizeof(float));
    for (int64_t i = 0; i < width * padded; ++i) own.packed[i] *= scale.before;
    k.dot(A, lda, p.d, padded, own.packed, padded, width, own.part_packed);
    for (int64_t i = 0; i < p.d * width; ++i) sum[i] += own.part_packed[i];
  }
}

// scratch.block Q -> `Y` [block, LD] and scratch.next Z of A 2^-exponent. Q is scaled on the way.
void product(const Problem& p, const Scratch& scratch, int32_t exponent, float* Y) {
  const Halves scale(exponent);
  const int64_t width = p.width, part = width * p.ld;
  for (int64_t i = 0; i < part; ++i) scratch.block[i] *= scale.before;
  if (p.by_columns) {
    for (int64_t i = 0; i < p.d; ++i)
      for (int64_t c = 0; c < width; ++c) scratch.packed[i * width + c] = scratch.block[c * p.ld + i];
  }
  share_out(static_cast<int32_t>(p.slabs), scratch.threads, [&](int32_t slab, int32_t thread) {
    const auto work = p.by_columns ? product_of_columns : product_of_rows;
    work(p, scratch, scratch.panels[thread], scale, slab * p.slab, std::min(p.D, (slab + 1) * p.slab), Y,
         scratch.partial + slab * part);
  });
  float* const sum = scratch.partial;
  for (int64_t slab = 1; slab < p.slabs; ++slab)
    for (int64_t i = 0; i < part; ++i) sum[i] += sum[slab * part + i];
  if (!p.by_columns) {
    for (int64_t i = 0; i < part; ++i) scratch.next[i] = sum[i] * scale.after;
    return;
  }
  memset(scratch.next, 0, part * sizeof(float));
  for (int64_t i = 0; i < p.d; ++i)
    for (int64_t c = 0; c < p.block; ++c) scratch.next[c * p.ld + i] = sum[i * width + c] * scale.after;
}

void scale_row(float* row, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) row[i] *= factor;
}

float length_of(const Problem& p, const float* row) { return sqrtf(kernels().inner(row, row, p.ld)); }

// Rows of length one without their part in the span of K's first `taken` rows; zero where only rounding is left.
void project(const Problem& p, const Scratch& scratch, int64_t taken) {
  const Kernels& k = kernels();
  float* const block = scratch.block;
  for (int64_t c = 0; c < p.block; ++c) scratch.lengths[c] = length_of(p, block + c * p.ld);
  if (taken) {
    k.dot(scratch.K, p.ld, taken, p.ld, block, p.ld, p.width, scratch.against);
    for (int64_t i = 0; i < taken * p.width; ++i) scratch.against[i] = -scratch.against[i];
    k.accumulate(scratch.K, p.ld, taken, p.ld, scratch.against, p.width, block, p.ld);
  }
  for (int64_t c = 0; c < p.block; ++c) {
    float* row = block + c * p.ld;
    const float length = length_of(p, row);
    scale_row(row, p.ld, length > 8 * FLT_EPSILON * scratch.lengths[c] ? 1 / length : 0.0f);
  }
}

// Row c, of length one or zero, made orthogonal to the rows before it and of length one again; false, and zero, if it
// depends on them. Repeated until a pass takes less than half of it: then what is left is orthogonal to rounding.
bool orthogonalize(const Problem& p, float* block, int64_t c) {
  const Kernels& k = kernels();
  float* row = block + c * p.ld;
  float before = length_of(p, row);
  // As the Gram matrix of the block shows dependence: squares of lengths below 1e-10 b.
  const float least = 1e-5f * sqrtf(static_cast<float>(p.block));
  for (int pass = 0; pass < kOrthogonalizations && before > least; ++pass) {
    for (int64_t other = 0; other < c; ++other)
      k.add(-k.inner(block + other * p.ld, row, p.ld), block + other * p.ld, p.ld, row);
    const float length = length_of(p, row);
    if (length > 0.5f * before) {
      scale_row(row, p.ld, 1 / length);
      return true;
    }
    before = length;
  }
  if (before > least) {
    scale_row(row, p.ld, 1 / before);
    return true;
  }
  memset(row, 0, p.ld * sizeof(float));
  return false;
}

// Orthonormal rows that span those of scratch.block, orthogonal to K's first `taken` rows. Fresh random directions
// replace dependent ones (the last starting row at shifted places): behind a singular value so large that fp32 products
// show nothing else, they are what finds the others. Those that depend even then come out as zero rows.
void orthonormalize(const Problem& p, const Scratch& scratch, int64_t taken) {
  float* const block = scratch.block;
  project(p, scratch, taken);
  for (int64_t c = 0; c < p.block; ++c) {
    if (orthogonalize(p, block, c)) continue;
    const float* gaussian = p.layer.start + (p.layer.width - 1) * p.d;
    float* row = block + c * p.ld;
    for (int64_t i = 0; i < p.d; ++i) row[i] = gaussian[(i + p.d - (taken + c + 1) % p.d) % p.d];
    const float length = length_of(p, row);
    scale_row(row, p.ld, length > 0 ? 1 / length : 0.0f);
  }
  project(p, scratch, taken);
  for (int64_t c = 0; c < p.block; ++c) orthogonalize(p, block, c);
}

// H = Y Y^T, of a large matrix as the sum of its slabs' parts.
void gram(const Problem& p, const Scratch& scratch) {
  if (p.slabs == 1) return kernels().gram(scratch.Y, p.LD, p.total, p.LD, scratch.H);
  const int64_t each = rounded_up((p.LD + p.slabs - 1) / p.slabs, kLanes), size = p.total * p.total;
  const int64_t parts = (p.LD + each - 1) / each;
  share_out(static_cast<int32_t>(parts), scratch.threads, [&](int32_t part, int32_t) {
    const int64_t first = part * each, length = std::min(each, p.LD - first);
    kernels().gram(scratch.Y + first, p.LD, p.total, length, scratch.grams + part * size);
  });
  std::fill(scratch.H, scratch.H + size, 0.0);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) scratch.H[i] += scratch.grams[part * size + i];
}

// All blocks of Q, Y and Z in K, Y and Z, and H = Y Y^T.
void krylov(const Problem& p, const Scratch& scratch, int32_t exponent) {
  memset(scratch.block, 0, p.width * p.ld * sizeof(float));
  if (p.dense) {
    for (int64_t c = 0; c < p.d; ++c) scratch.block[c * p.ld + c] = 1;
  } else {
    for (int64_t c = 0; c < p.block; ++c)
      memcpy(scratch.block + c * p.ld, p.layer.start + c * p.d, p.d * sizeof(float));
    orthonormalize(p, scratch, 0);
  }
  for (int64_t c = 0; c < p.total; ++c) std::fill(scratch.Y + c * p.LD + p.D, scratch.Y + (c + 1) * p.LD, 0.0f);
  const int64_t size = p.block * p.ld;
  for (int64_t step = 0; step < p.blocks; ++step) {
    memcpy(scratch.K + step * size, scratch.block, size * sizeof(float));
    product(p, scratch, exponent, scratch.Y + step * p.block * p.LD);
    memcpy(scratch.Z + step * size, scratch.next, size * sizeof(float));
    if (step + 1 == p.blocks) break;
    memcpy(scratch.block, scratch.next, size * sizeof(float));
    orthonormalize(p, scratch, (step + 1) * p.block);
  }
  gram(p, scratch);
}

// Bound on a singular value beyond the k found, from the random row w that went through q = `blocks` products:
//   s_missed <= (||(A^T A)^q w|| / (delta sqrt(pi/2)))^(1/(2q))
// with A deflated by the found vectors. The Krylov space holds (A^T A)^(q-1) w, whose Ritz coordinates are
// theta^(2(q-1)) times those of w; dropping the first k deflates it, and Z = (A^T A) K takes the last step.
double missed_bound(const Problem& p, const Scratch& scratch, double failure_probability) {
  const Kernels& kernel = kernels();
  const int64_t k = p.layer.k, n = p.total;
  if (k >= n) return 0;
  if (p.dense) return scratch.theta[k];
  // Relative to the first Ritz value that stays, lest a power of a small one underflow.
  const double top = scratch.theta[k] > 0 ? scratch.theta[k] : 1;
  memset(scratch.gaussian, 0, p.ld * sizeof(float));
  memcpy(scratch.gaussian, p.layer.start + (p.layer.width - 1) * p.d, p.d * sizeof(float));
  double* const of_K = scratch.work;
  double* const last = of_K + n;
  for (int64_t a = 0; a < n; ++a) of_K[a] = kernel.inner(scratch.K + a * p.ld, scratch.gaussian, p.ld);
  std::fill(last, last + n, 0.0);
  for (int64_t i = k; i < n; ++i) {
    const double* vector = scratch.vectors + scratch.order[i] * n;
    double coordinate = 0;
    for (int64_t a = 0; a < n; ++a) coordinate += of_K[a] * vector[a];
    const double ratio = scratch.theta[i] / top;
    for (int64_t q = 1; q < p.blocks; ++q) coordinate *= ratio * ratio;
    for (int64_t a = 0; a < n; ++a) last[a] += coordinate * vector[a];
  }
  double square = 0;
  for (int64_t first = 0; first < p.ld; first += kChunk) {
    const int64_t columns = std::min(kChunk, p.ld - first);
    kernel.combine(last, n, 1, scratch.Z + first, p.ld, n, columns, scratch.chunk, kChunk);
    for (int64_t i = 0; i < columns; ++i) square += scratch.chunk[i] * scratch.chunk[i];
  }
  const double ratio = sqrt(square) / (top * top) / (failure_probability * sqrt(M_PI / 2));
  return pow(ratio, 0.5 / p.blocks) * top;
}

// Vectors of the side that is `cols` (rows of Vh) or `rows` (columns of U) of W.
void write_vectors(const s2d_svd_layer& layer, bool of_cols, const double* chunk, int64_t first, int64_t length) {
  for (int64_t c = 0; c < layer.width; ++c) {
    const double* row = chunk + c * kChunk;
    if (of_cols) {
      for (int64_t i = 0; i < length; ++i) layer.Vh[c * layer.cols + first + i] = static_cast<float>(row[i]);
    } else {
      for (int64_t i = 0; i < length; ++i) layer.U[(first + i) * layer.width + c] = static_cast<float>(row[i]);
    }
  }
}

void write_nothing(const s2d_svd_layer& layer, int32_t status) {
  memset(layer.U, 0, layer.rows * layer.width * sizeof(float));
  memset(layer.S, 0, layer.width * sizeof(float));
  memset(layer.Vh, 0, layer.width * layer.cols * sizeof(float));
  memset(layer.residual, 0, layer.width * sizeof(float));
  *layer.missed = 0;
  *layer.status = status;
}

// The outputs from the blocks and H.
void ritz(const Problem& p, const Scratch& scratch, const State& state, float tolerance, double failure_probability) {
  const Kernels& kernel = kernels();
  const s2d_svd_layer& layer = p.layer;
  const int64_t n = p.total, b = layer.width;
  const int32_t exponent = state.exponent;
  const bool found = kernel.eigen(scratch.H, n, scratch.values, scratch.vectors, scratch.work);
  // Only a weight that changes while it is read, or a start that is not finite, gets here.
  if (!std::all_of(scratch.values, scratch.values + n, [](double x) { return std::isfinite(x); }))
    return write_nothing(layer, kNonFinite);
  for (int64_t i = 0; i < n; ++i) scratch.order[i] = i;
  std::sort(scratch.order, scratch.order + n, [&scratch](int64_t i, int64_t j) {
    return scratch.values[i] != scratch.values[j] ? scratch.values[i] > scratch.values[j] : i < j;
  });
  for (int64_t i = 0; i < n; ++i) scratch.theta[i] = sqrt(std::max(scratch.values[scratch.order[i]], 0.0));
  for (int64_t c = 0; c < b; ++c)
    memcpy(scratch.R + c * n, scratch.vectors + scratch.order[c] * n, n * sizeof(double));
  // A Ritz value below the rounding of the products, or of their fp64 Gram matrix, is noise: it counts as zero.
  const double floor = scratch.theta[0] * std::max<double>(4 * FLT_EPSILON, sqrt(n * DBL_EPSILON));
  const auto value = [&](int64_t c) { return scratch.theta[c] > floor ? scratch.theta[c] : 0.0; };
  if (!(ldexp(value(0), exponent) <= FLT_MAX)) return write_nothing(layer, kOverflow);

  double* const squares = scratch.work;  // of residuals
  std::fill(squares, squares + b, 0.0);
  for (int64_t first = 0; first < p.d; first += kChunk) {
    const int64_t length = std::min(kChunk, p.d - first), columns = std::min(kChunk, p.ld - first);
    kernel.combine(scratch.R, n, b, scratch.K + first, p.ld, n, columns, scratch.chunk, kChunk);
    kernel.combine(scratch.R, n, b, scratch.Z + first, p.ld, n, columns, scratch.other, kChunk);
    for (int64_t c = 0; c < b; ++c) {
      const double s = value(c), inverse = s > 0 ? 1 / s : 0;
      double* right = scratch.chunk + c * kChunk;
      const double* other = scratch.other + c * kChunk;
      double square = 0;
      for (int64_t i = 0; i < length; ++i) {
        const double difference = other[i] * inverse - s * right[i];
        square += difference * difference;
      }
      squares[c] += square;
      if (s == 0) std::fill(right, right + length, 0.0);
    }
    write_vectors(layer, !p.wide, scratch.chunk, first, length);
  }
  share_out(static_cast<int32_t>((p.D + kChunk - 1) / kChunk), scratch.threads, [&](int32_t part, int32_t thread) {
    double* const chunk = scratch.panels[thread].chunk;
    const int64_t first = part * kChunk, length = std::min(kChunk, p.D - first);
    kernel.combine(scratch.R, n, b, scratch.Y + first, p.LD, n, std::min(kChunk, p.LD - first), chunk, kChunk);
    for (int64_t c = 0; c < b; ++c) {
      const double s = value(c), inverse = s > 0 ? 1 / s : 0;
      for (int64_t i = 0; i < length; ++i) chunk[c * kChunk + i] *= inverse;
    }
    write_vectors(layer, p.wide, chunk, first, length);
  });
  double criterion = 0;
  for (int64_t c = 0; c < b; ++c) {
    const double s = value(c), residual = sqrt(squares[c]);
    if (c < layer.k) criterion = std::max(criterion, s * residual);
    layer.S[c] = static_cast<float>(ldexp(s, exponent));
    layer.residual[c] = static_cast<float>(ldexp(residual, exponent));
  }
  const bool something = state.zero || value(0) > 0;  // not so if the start holds no direction
  *layer.status = found && something && criterion <= tolerance * value(0) * value(0) ? kConverged : kNotConverged;
  const double missed = missed_bound(p, scratch, failure_probability);
  *layer.missed = static_cast<float>(ldexp(missed, exponent));
}

void solve(const Problem& p, const Scratch& scratch, float tolerance, double failure_probability) {
  const State state = find_scale(p, scratch.threads);
  if (!state.finite) return write_nothing(p.layer, kNonFinite);
  krylov(p, scratch, state.exponent);
  ritz(p, scratch, state, tolerance, failure_probability);
}

bool valid(const s2d_svd_layer* layers, int32_t count, int32_t threads) {
  return count >= 0 && (count == 0 || layers) && threads > 0 && threads <= kMaxThreads &&
         std::all_of(layers, layers + count, [](const s2d_svd_layer& layer) { return valid(layer); });
}

}  // namespace
}  // namespace s2d_cpu

using namespace s2d_cpu;

size_t s2d_cpu_topk_svd_workspace(const s2d_svd_layer* layers, int32_t count, int32_t threads) {
  if (!valid(layers, count, threads)) return 0;
  return static_cast<size_t>(Workspace(layers, count, threads, nullptr).bytes);
}

int s2d_cpu_topk_svd(const s2d_svd_layer* layers, int32_t count, int32_t threads, float tolerance,
                     double failure_probability, void* workspace, size_t workspace_bytes) {
  if (!valid(layers, count, threads)) return S2D_BAD_ARGUMENT;
  if (!count) return S2D_OK;
  const Workspace space(layers, count, threads, workspace);
  if (!workspace || reinterpret_cast<uintptr_t>(workspace) % 256 ||
      workspace_bytes < static_cast<size_t>(space.bytes))
    return S2D_BAD_WORKSPACE;
  for (int32_t i = 0; i < count; ++i) space.order[i] = i;
  std::sort(space.order, space.order + count, [layers](int32_t a, int32_t b) {
    const Problem first(layers[a]), second(layers[b]);
    if (first.large() != second.large()) return first.large();
    return first.cost() != second.cost() ? first.cost() > second.cost() : a < b;
  });
  const auto work = [&](int32_t item, char* memory) {
    const Problem problem(layers[space.order[item]]);
    Carver carver(memory);
    solve(problem, Scratch(problem, threads, carver), tolerance, failure_probability);
  };
  for (int32_t item = 0; item < space.large; ++item) work(item, space.scratch);
  share_out(count - space.large, threads, [&](int32_t item, int32_t thread) {
    work(space.large + item, space.scratch + thread * space.scratch_bytes);
  });
  return S2D_OK;
}
