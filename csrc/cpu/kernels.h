// The inner loops, compiled once per instruction set (kernels.cpp) and chosen when the library first runs.
#ifndef S2D_CPU_KERNELS_H_
#define S2D_CPU_KERNELS_H_

#include <stdint.h>

namespace s2d_cpu {

// Columns of a matrix that the loops take are a multiple of this, whatever the instruction set.
constexpr int64_t kLanes = 16;
// So are rows of a block (the columns of `packed`) of this.
constexpr int64_t kGroup = 4;

// What a step of AdamW does to each element, as in adamw.cu: g' = grad_factor g + penalty, and so on.
struct AdamWRule {
  float grad_factor, one_minus_beta1, beta2, one_minus_beta2, eps;
  float decay;         // lr weight_decay
  float step_size;     // lr / (1 - beta1^t)
  float inverse_root;  // 1 / sqrt(1 - beta2^t)
  bool decoupled;
};

// Rows of a parameter, its gradient and its moments, with the penalty left [rows, rank] right [rank, cols].
struct AdamWRows {
  void *param, *exp_avg, *exp_avg_sq;  // row stride param_stride
  const void* grad;
  const float *left, *right;
  int64_t param_stride, grad_stride, rows, cols, ldr, rank;
};

struct Kernels {
  const char* name;

  // Bits of the largest |x| of `count` numbers of an s2d_dtype, `stride` apart, as fp32; those of a NaN if there is one.
  uint32_t (*largest)(const void* x, int32_t dtype, int64_t count, int64_t stride);

  // out[i] = x[i * stride] in fp32.
  void (*widen)(const void* x, int32_t dtype, int64_t count, int64_t stride, float* out);

  // packed[r, c] = sum_j A[r, j] Q[c, j] for r < rows, c < width, j < cols. `packed` has row stride `width`.
  void (*dot)(const float* A, int64_t lda, int64_t rows, int64_t cols, const float* Q, int64_t ldq, int64_t width,
              float* packed);

  // Z[c, j] += sum_r packed[r, c] A[r, j], with the sum over these rows completed first.
  void (*accumulate)(const float* A, int64_t lda, int64_t rows, int64_t cols, const float* packed, int64_t width,
                     float* Z, int64_t ldz);

  // H[i, j] = sum_t X[i, t] X[j, t] in fp64, both triangles; row stride `count`.
  void (*gram)(const float* X, int64_t ldx, int64_t count, int64_t cols, double* H);

  // Eigenvalues, in no order, and eigenvectors as `rows` [n, n] of the symmetric H [n, n], which is used up; `work` holds
  // 2 n numbers. False if the iteration did not come to its end.
  bool (*eigen)(double* H, int64_t n, double* values, double* rows, double* work);

  // out[c, t] = sum_i R[c, i] X[i, t] in fp64 for c < width, t < cols <= ldo.
  void (*combine)(const double* R, int64_t ldr, int64_t width, const float* X, int64_t ldx, int64_t count, int64_t cols,
                  double* out, int64_t ldo);

  // Rows of a gradient of an s2d_dtype, `stride` apart: G[r, j] += sum_i left[r, i] right[i, j] in fp32, rounded once to
  // the dtype. A sum that is 0 or not finite changes no bit. With a `seed` bf16 is rounded stochastically; the first
  // row is then row `first` of the matrix.
  void (*add_low_rank)(void* G, int32_t dtype, int64_t stride, int64_t rows, int64_t cols, const float* left,
                       const float* right, int64_t ldr, int64_t rank, const int64_t* seed, int64_t first);

  // One step in fp32 arithmetic, each result rounded once to the s2d_dtype of all four tensors. An element of the penalty
  // that is 0 or not finite changes no bit. The bits of an element depend on nothing else in the call.
  void (*adamw_rows)(const AdamWRows& rows, int32_t dtype, const AdamWRule& rule);

  // sum_t x[t] y[t], and y += factor x.
  float (*inner)(const float* x, const float* y, int64_t count);
  void (*add)(float factor, const float* x, int64_t count, float* y);
};

#ifdef S2D_CPU_X86
extern const Kernels kernels_avx512, kernels_avx2;
#endif
extern const Kernels kernels_baseline;

// The best of them that this machine runs.
const Kernels& kernels();

}  // namespace s2d_cpu

#endif  // S2D_CPU_KERNELS_H_
