/* C ABI of the native library, the one contract between the kernels and everything that calls them.
 *
 * Every operation: `int s2d_<op>(..., void* workspace, size_t workspace_bytes, cudaStream_t stream)` returns a status.
 * It enqueues on `stream` and returns: no allocation, no synchronization, no global state, capturable in a CUDA graph.
 * Empty input returns S2D_OK at once. All sizes and strides are in elements and 64 bits wide. All arguments are checked
 * before anything is enqueued.
 */
#ifndef S2D_H_
#define S2D_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* Raised with every change of a signature or struct below; the loader refuses another value. */
#define S2D_ABI_VERSION 5

/* The stream type without CUDA's headers: a cudaStream_t is a pointer to this. */
typedef struct CUstream_st* s2d_stream;

typedef enum s2d_status {
  S2D_OK = 0,
  S2D_BAD_ARGUMENT = 1,   /* a negative size, a null or misaligned pointer, an unknown dtype, a rank outside
                             0..S2D_MAX_RANK, rows of a gradient that share elements, a seed for fp16 */
  S2D_BAD_WORKSPACE = 2,  /* workspace smaller than the query says, or not 256-byte aligned */
  S2D_NO_KERNEL = 3,      /* the library holds no code for this device */
  S2D_UNSUPPORTED = 5,    /* sizes the kernels do not take on this device; see the operation */
  S2D_LAUNCH_FAILED = 4,  /* the emulation refused the launch, or found an error in it */
  S2D_CUDA_ERROR = 100    /* 100 + the cudaError_t with which the runtime refused; it may stem from earlier work */
} s2d_status;

typedef enum s2d_dtype { S2D_FLOAT32 = 0, S2D_BFLOAT16 = 1, S2D_FLOAT16 = 2 } s2d_dtype;

#define S2D_MAX_RANK 64
#define S2D_MAX_GROUPS 8

int s2d_abi_version(void);

/* The architectures compiled in, for people: "sm_80 sm_86 ... compute_80", or "emulated on the CPU"; never null. */
const char* s2d_architectures(void);

/* A sentence for a status; never null. */
const char* s2d_status_string(int status);

/* Whether the current device can run the kernels: S2D_OK, S2D_NO_KERNEL, or S2D_CUDA_ERROR + n. Loads all kernels onto
 * it, so that no first call does while a graph is captured. */
int s2d_check_device(void);

/* One layer of s2d_add_penalty_grad: grad += U diag(coefficients) Vh over the first `rank` components. */
typedef struct s2d_penalty_layer {
  void* grad;                 /* [rows, cols] of `dtype`, row stride grad_stride, columns contiguous; in place */
  const float* U;             /* [rows, >= rank], row stride u_row_stride, column stride u_col_stride */
  const float* Vh;            /* [>= rank, cols], row stride vh_stride, columns contiguous */
  const float* coefficients;  /* [>= rank], read on the device */
  const int32_t* device_rank; /* null, or one integer read on the device; min(rank, *device_rank) components count */
  const int64_t* device_seed; /* null: to the nearest; else one integer read on the device, with which bf16 is rounded
                                 stochastically as reference.py's `rounding_bits` says. Not for fp16; fp32 needs none */
  int64_t rows, cols;
  int64_t grad_stride, u_row_stride, u_col_stride, vh_stride;
  int32_t rank;
  int32_t dtype;              /* s2d_dtype of grad */
} s2d_penalty_layer;

/* Adds the penalty gradient of all layers in as few launches as the parameter space allows (one up to 300 layers, and
 * one more where some are rounded stochastically and others are not).
 * `layers` is host memory, read before the call returns. Needs no workspace. Layers of rank 0 cost nothing. The layers
 * of one call must not share elements of their gradients: blocks that run at once would lose each other's sums. */
int s2d_add_penalty_grad(const s2d_penalty_layer* layers, int32_t count, void* workspace, size_t workspace_bytes,
                         s2d_stream stream);

/* One tensor of s2d_adamw, as a matrix: p, g and the two moments, with the penalty U diag(coefficients) Vh of its first
 * `rank` components. A tensor without a penalty has rank 0; as one row [1, elements] it has any shape. */
typedef struct s2d_adamw_layer {
  void* param;                /* p [rows, cols] of `dtype`, row stride param_stride, columns contiguous; in place */
  const void* grad;           /* g, row stride grad_stride, columns contiguous */
  void* exp_avg;              /* m, laid out as p; in place */
  void* exp_avg_sq;           /* v, laid out as p; in place */
  const float* step;          /* number of this step, 1 for the first, read on the device */
  const float* U;             /* [rows, >= rank], row stride u_row_stride, column stride u_col_stride */
  const float* Vh;            /* [>= rank, cols], row stride vh_stride, columns contiguous */
  const float* coefficients;  /* [>= rank], read on the device */
  const int32_t* device_rank; /* null, or one integer read on the device; min(rank, *device_rank) components count */
  int64_t rows, cols;
  int64_t param_stride, grad_stride, u_row_stride, u_col_stride, vh_stride;
  int32_t rank;
  int32_t dtype;              /* s2d_dtype of all four */
  int32_t group;              /* index of its s2d_adamw_group */
} s2d_adamw_layer;

/* Hyperparameters of a parameter group, as torch.optim.AdamW has them. */
typedef struct s2d_adamw_group {
  const float* device_lr;     /* null, or the learning rate, read on the device instead of lr */
  double lr, beta1, beta2, eps, weight_decay;
  int32_t maximize;           /* the sign of g, not of the penalty */
} s2d_adamw_group;

/* What all layers of one call share; each pointer null or one number read on the device. */
typedef struct s2d_adamw_options {
  const float* clip_coef;     /* multiplies g, and the coupled penalty too where clip_penalty is set */
  const float* grad_scale;    /* g is divided by it */
  const float* found_inf;     /* where it is not 0 nothing is changed */
  int32_t decoupled;          /* 0: the penalty is added to g; 1: to p after the step */
  int32_t clip_penalty;
} s2d_adamw_options;

/* One step of AdamW for all layers in as few launches as the parameter space allows (208 layers each). All arrays are host
 * memory, read before the call returns. At most S2D_MAX_GROUPS groups. Needs no workspace. No two layers may share memory. */
int s2d_adamw(const s2d_adamw_layer* layers, int32_t count, const s2d_adamw_group* groups, int32_t group_count,
              const s2d_adamw_options* options, void* workspace, size_t workspace_bytes, s2d_stream stream);

/* One call of a layer, y = W x + bias, and what is kept of all calls. */
typedef struct s2d_capture_call {
  const void* y;              /* [tokens, neurons] of y_dtype, row stride y_stride, columns contiguous */
  const void* x;              /* [tokens, features] of x_dtype, row stride x_stride, columns contiguous */
  const float* bias;          /* [neurons], or null */
  const uint8_t* enabled;     /* null, or one byte read on the device: 0 changes nothing */
  float* value;               /* in and out, one number: the largest |y - bias| so far, -1 at first */
  int64_t* place;             /* in and out, [2]: its neuron, and the row of x in the call that made it */
  float* row;                 /* in and out, [features]: that row */
  int64_t tokens, neurons, features;
  int64_t y_stride, x_stride;
  int32_t y_dtype, x_dtype;   /* s2d_dtype */
} s2d_capture_call;

/* Replaces value, place and row by the largest |y - bias| of this call where that is larger; of equal ones the lowest
 * row, then the lowest neuron counts. NaN never counts, an infinity only where its row of x is finite. `call` is host
 * memory, read before the call returns; the workspace must not be shared with a call on another stream. */
size_t s2d_capture_workspace(const s2d_capture_call* call);
int s2d_capture(const s2d_capture_call* call, void* workspace, size_t workspace_bytes, s2d_stream stream);

/* One matrix of s2d_topk_svd_*: W [rows, cols], iterated on its smaller side d = min(rows, cols). */
typedef struct s2d_svd_layer {
  const void* weight;         /* W, of `dtype`, strides row_stride and col_stride */
  const float* start;         /* [width, d] contiguous; the last row is Gaussian */
  float* U;                   /* out, [rows, width] contiguous */
  float* S;                   /* out, [width] */
  float* Vh;                  /* out, [width, cols] contiguous */
  float* residual;            /* out, [width] */
  float* missed;              /* out, one number */
  int32_t* status;            /* out, one number: 0 converged, 1 not converged, 2 non-finite, 4 overflow */
  int64_t rows, cols;
  int64_t row_stride, col_stride;
  int32_t dtype;              /* s2d_dtype of W */
  int32_t width;              /* rows of a block, <= 32 */
  int32_t k;                  /* triplets wanted, <= width */
  int32_t reads;              /* passes over W; with reads * width >= d one pass with Q = identity is exact */
  int32_t team;               /* 0: the form is chosen for W and the device; > 0: so many blocks keep W on chip;
                                 < 0: W is read from memory in each pass, as is always one with an exact pass */
} s2d_svd_layer;

/* The primitives of topk_svd (s2d_kernels/svd.py holds the algorithm), each for all matrices at once; a matrix takes
 * part in the steps below its `reads`. `layers` is host memory, the same in all calls of one run, read before the call
 * returns; the workspace carries the run's state and must not be shared with another.
 *
 * s2d_topk_svd_check: S2D_OK, S2D_BAD_ARGUMENT, or S2D_UNSUPPORTED where d > 4096 (2048 in fp32), width > 32,
 * min(d, reads * width) > 256, 16 rows of W do not fit the shared memory of a block on the current device, or a given
 * team does not hold W or has more blocks than the device has multiprocessors.
 *
 * s2d_topk_svd_team: blocks that keep a matrix in their shared memory on the current device, 0 where it is streamed. It
 * depends on the matrix and the device alone; so do the bits of its factors, whatever else is in the call.
 *
 * s2d_topk_svd_resident: after begin, all passes over the matrices with a team, which product and orthonormalize leave
 * out. One cooperative launch a dtype and width class; it occupies up to max_blocks multiprocessors (0: all; never
 * fewer than the largest team) until it is done, and no stream's priority takes them away. The bits do not depend on
 * max_blocks. */
int s2d_topk_svd_check(const s2d_svd_layer* layers, int32_t count);
int s2d_topk_svd_team(const s2d_svd_layer* layer);
size_t s2d_topk_svd_workspace(const s2d_svd_layer* layers, int32_t count);
int s2d_topk_svd_begin(const s2d_svd_layer* layers, int32_t count, void* workspace, size_t workspace_bytes,
                       s2d_stream stream);
int s2d_topk_svd_resident(const s2d_svd_layer* layers, int32_t count, int32_t max_blocks, void* workspace,
                          size_t workspace_bytes, s2d_stream stream);
int s2d_topk_svd_product(const s2d_svd_layer* layers, int32_t count, int32_t step, void* workspace,
                         size_t workspace_bytes, s2d_stream stream);
int s2d_topk_svd_orthonormalize(const s2d_svd_layer* layers, int32_t count, int32_t step, void* workspace,
                                size_t workspace_bytes, s2d_stream stream);
int s2d_topk_svd_finish(const s2d_svd_layer* layers, int32_t count, float tolerance, double failure_probability,
                        void* workspace, size_t workspace_bytes, s2d_stream stream);

typedef enum s2d_granularity { S2D_PER_ROW = 0, S2D_PER_TENSOR = 1, S2D_PER_GROUP = 2 } s2d_granularity;

/* The quantization of x [rows, cols] to codes of `bits` bits: -(2^(bits-1)-1)..2^(bits-1)-1 when symmetric, else
 * 0..2^bits-1. The outputs have no gaps between their elements. With S = the number of scales of a row, 1 for
 * S2D_PER_ROW and cols / group_size for S2D_PER_GROUP, scale and zero_point are [rows, S], or [1, 1] for S2D_PER_TENSOR;
 * with G = cols / group_size, or 1 where group_size is 0, row_sum is [rows, G]. */
typedef struct s2d_quantization {
  const void* x;              /* [rows, cols] of `dtype`, strides row_stride and col_stride */
  const float* minimum;       /* null, or the range to use instead of x's: row r's at minimum[r * range_stride] */
  const float* maximum;
  int8_t* codes;              /* out or null, [rows, cols]; asymmetric 8-bit codes and zero points are stored less 128 */
  uint8_t* packed;            /* out or null, [rows, ceil(cols / 2)]: two codes of <= 4 bits, the first in the low half */
  float* scale;               /* out; NaN where x is not finite, then codes 0 and zero_point 0 */
  int32_t* zero_point;        /* out */
  int32_t* row_sum;           /* out: sums of stored codes */
  uint8_t* mask;              /* out or null, [rows, ceil(cols / 8)], bit i of byte j: element 8 j + i was not clamped */
  int64_t rows, cols;
  int64_t row_stride, col_stride;
  int64_t range_stride;       /* 0: one range for all rows; 1: one each */
  int64_t group_size;         /* 0: none; divides cols */
  int32_t dtype;              /* s2d_dtype of x */
  int32_t bits;               /* 2..8 */
  int32_t symmetric;
  int32_t granularity;        /* s2d_granularity of scale and zero_point */
} s2d_quantization;

/* One launch, two for S2D_PER_TENSOR, which alone needs a workspace.
 * s2d_quantize_check: S2D_OK, S2D_BAD_ARGUMENT, or S2D_UNSUPPORTED where group_size is none of 0, 8, 16, .. 256. */
int s2d_quantize_check(const s2d_quantization* quantization);
size_t s2d_quantize_workspace(const s2d_quantization* quantization);
int s2d_quantize(const s2d_quantization* quantization, void* workspace, size_t workspace_bytes, s2d_stream stream);

/* The exact product of codes x [M, K] and w [N, K], zero points removed, and the linear layer made of it: per group g
 *   accumulator[g] = sum_k (x - x_zero_point)(w - w_zero_point)
 *                  = x w^T - x_zero_point w_row_sum - w_zero_point x_row_sum + (K / groups) x_zero_point w_zero_point
 *   y = sum_g (accumulator[g] * x_scale) * w_scale + bias
 * the former in int32 (wrapping), the latter in fp32 with one rounding an operation, groups ascending. Everything is
 * contiguous. Scales and zero points of x are [M, 1], or [1, 1] with x_per_tensor; of w [N, groups], or [1, 1]. */
typedef struct s2d_integer_product {
  const void* x_codes;        /* int8 [M, K], or with `packed` two codes of <= 4 bits a byte, [M, ceil(K / 2)] */
  const void* w_codes;
  const float* x_scale;       /* scales are read for y alone */
  const float* w_scale;
  const int32_t* x_zero_point; /* not read where the operand is symmetric */
  const int32_t* w_zero_point;
  const int32_t* x_row_sum;   /* [M, groups], not read where w is symmetric */
  const int32_t* w_row_sum;   /* [N, groups], not read where x is symmetric */
  const void* bias;           /* null or [N] of bias_dtype */
  void* y;                    /* out or null, [M, N] of out_dtype */
  int32_t* accumulator;       /* out or null, [groups, M, N] */
  int64_t M, N, K;
  int64_t groups;             /* 0 where K is 0: y is the bias */
  int32_t x_per_tensor, w_per_tensor;
  int32_t x_symmetric, w_symmetric;
  int32_t packed;
  int32_t bias_dtype, out_dtype; /* s2d_dtype */
} s2d_integer_product;

/* One launch, no workspace.
 * s2d_integer_linear_check: S2D_OK, S2D_BAD_ARGUMENT, or S2D_UNSUPPORTED where more than one group is not a multiple of
 * 32 codes (64 if packed), or packed codes of w are not symmetric. */
int s2d_integer_linear_check(const s2d_integer_product* product);
int s2d_integer_linear(const s2d_integer_product* product, void* workspace, size_t workspace_bytes, s2d_stream stream);

/* packed [rows, ceil(cols / 2)]: int8 codes [rows, cols] two a byte, the first in the low half. */
int s2d_pack_codes(const int8_t* codes, uint8_t* packed, int64_t rows, int64_t cols, void* workspace,
                   size_t workspace_bytes, s2d_stream stream);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif /* S2D_H_ */
