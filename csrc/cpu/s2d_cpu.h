/* C ABI of libs2d_cpu.so: the kernels of the CPU, in C++ without CUDA, torch or Python.
 *
 * Structures, dtypes and status codes are those of s2d.h; what a call needs beside its threads is in the workspace.
 * Calls return when the work is done. `threads` is how many threads work, the caller's among them; results do not depend on it.
 */
#ifndef S2D_CPU_H_
#define S2D_CPU_H_

#include "../s2d.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define S2D_CPU_ABI_VERSION 4

int s2d_cpu_abi_version(void);

/* The instruction set whose kernels run on this machine: "avx512_vnni_pairs" (with half of the products, where
 * additions are free: by default on AMD's), "avx512_vnni", "avx512", "avx2" or "baseline". The environment variable
 * S2D_CPU_CAPABILITY chooses another that the machine has. Floating sums are in another order in each but the first
 * three. */
const char* s2d_cpu_capability(void);

/* The algorithm of s2d_kernels/svd.py, one matrix per thread from the first read to the last, so that a matrix is read
 * from memory once and then from the caches; matrices of 2^22 elements and more one by one with all threads. The workspace is aligned to 256 bytes. `width` and `reads` are unlimited;
 * results depend neither on `threads` nor on the other matrices. */
size_t s2d_cpu_topk_svd_workspace(const s2d_svd_layer* layers, int32_t count, int32_t threads);
int s2d_cpu_topk_svd(const s2d_svd_layer* layers, int32_t count, int32_t threads, float tolerance,
                     double failure_probability, void* workspace, size_t workspace_bytes);

/* As s2d_add_penalty_grad, with `device_rank` and `device_seed` in host memory. Layers may not share elements of their
 * gradients. */
int s2d_cpu_add_penalty_grad(const s2d_penalty_layer* layers, int32_t count, int32_t threads);

/* As s2d_adamw, with all numbers in host memory, any number of groups, and bias corrections in fp64. No two layers may
 * share memory. */
int s2d_cpu_adamw(const s2d_adamw_layer* layers, int32_t count, const s2d_adamw_group* groups, int32_t group_count,
                  const s2d_adamw_options* options, int32_t threads);

/* As s2d_quantize, of any group_size; `codes` and `mask` are not null. Workspaces of this and of what follows are
 * aligned to 256 bytes, and results do not depend on `threads`. */
size_t s2d_cpu_quantize_workspace(const s2d_quantization* quantization, int32_t threads);
int s2d_cpu_quantize(const s2d_quantization* quantization, int32_t threads, void* workspace, size_t workspace_bytes);

/* As s2d_integer_linear, of groups of any size; not of packed codes, `bias` is fp32, and all zero points and row sums
 * are read. */
size_t s2d_cpu_integer_linear_workspace(const s2d_integer_product* product, int32_t threads);
int s2d_cpu_integer_linear(const s2d_integer_product* product, int32_t threads, void* workspace,
                           size_t workspace_bytes);

/* out [rows, cols] = ((grad * scale) @ (codes - zero_point)) * mask, with each row of grad * scale [rows, depth] as
 * `places` digits in -largest_digit..largest_digit, of base 2 largest_digit, in units of its largest magnitude /
 * largest_digit: exact sums, hence the same bits everywhere. */
typedef struct s2d_cpu_straight_through {
  const void* grad;           /* [rows, depth] of `dtype` */
  const void* codes;          /* [depth, cols] int8, or for bits <= 4 two a byte, [depth, ceil(cols / 2)] */
  const float* scale;         /* [depth], or one number with `per_tensor` */
  const int32_t* zero_point;  /* the scale's shape; not read where symmetric */
  const uint8_t* mask;        /* [rows, ceil(cols / 8)], as of s2d_quantize */
  void* out;                  /* out, [rows, cols] of out_dtype; not written unless `finite` */
  int32_t* finite;            /* out: 0 where grad * scale holds NaN or infinity */
  int64_t rows, depth, cols;  /* |code - zero_point| <= 127, and depth times it 127 fits int32 */
  int64_t row_stride, depth_stride;
  int32_t dtype, out_dtype;   /* s2d_dtype */
  int32_t bits, symmetric, per_tensor;
  int32_t places;             /* 1..5 */
  int32_t largest_digit;      /* 1..127; where any code - zero_point and it add up to a byte, half of the products */
} s2d_cpu_straight_through;

size_t s2d_cpu_straight_through_grad_workspace(const s2d_cpu_straight_through* gradient, int32_t threads);
int s2d_cpu_straight_through_grad(const s2d_cpu_straight_through* gradient, int32_t threads, void* workspace,
                                  size_t workspace_bytes);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif /* S2D_CPU_H_ */
