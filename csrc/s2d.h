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
#define S2D_ABI_VERSION 4

/* The stream type without CUDA's headers: a cudaStream_t is a pointer to this. */
typedef struct CUstream_st* s2d_stream;

typedef enum s2d_status {
  S2D_OK = 0,
  S2D_BAD_ARGUMENT = 1,   /* a negative size, a null or misaligned pointer, an unknown dtype, a rank outside
                             0..S2D_MAX_RANK, rows of a gradient that share elements */
  S2D_BAD_WORKSPACE = 2,  /* workspace smaller than the query says, or not 256-byte aligned */
  S2D_NO_KERNEL = 3,      /* the library holds no code for this device */
  S2D_UNSUPPORTED = 5,    /* sizes the kernels do not take on this device; see the operation */
  S2D_LAUNCH_FAILED = 4,  /* the emulation refused the launch, or found an error in it */
  S2D_CUDA_ERROR = 100    /* 100 + the cudaError_t with which the runtime refused; it may stem from earlier work */
} s2d_status;

typedef enum s2d_dtype { S2D_FLOAT32 = 0, S2D_BFLOAT16 = 1, S2D_FLOAT16 = 2 } s2d_dtype;

#define S2D_MAX_RANK 64

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
  int64_t rows, cols;
  int64_t grad_stride, u_row_stride, u_col_stride, vh_stride;
  int32_t rank;
  int32_t dtype;              /* s2d_dtype of grad */
} s2d_penalty_layer;

/* Adds the penalty gradient of all layers in as few launches as the parameter space allows (one up to ~300 layers).
 * `layers` is host memory, read before the call returns. Needs no workspace. Layers of rank 0 cost nothing. The layers
 * of one call must not share elements of their gradients: blocks that run at once would lose each other's sums. */
int s2d_add_penalty_grad(const s2d_penalty_layer* layers, int32_t count, void* workspace, size_t workspace_bytes,
                         s2d_stream stream);

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

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif /* S2D_H_ */
