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

#define S2D_CPU_ABI_VERSION 2

int s2d_cpu_abi_version(void);

/* The instruction set whose kernels run on this machine: "avx512", "avx2" or "baseline". The environment variable
 * S2D_CPU_CAPABILITY chooses a lesser one. Sums are in another order in each. */
const char* s2d_cpu_capability(void);

/* The algorithm of s2d_kernels/svd.py, one matrix per thread from the first read to the last, so that a matrix is read
 * from memory once and then from the caches; matrices of 2^22 elements and more one by one with all threads. The workspace is aligned to 256 bytes. `width` and `reads` are unlimited;
 * results depend neither on `threads` nor on the other matrices. */
size_t s2d_cpu_topk_svd_workspace(const s2d_svd_layer* layers, int32_t count, int32_t threads);
int s2d_cpu_topk_svd(const s2d_svd_layer* layers, int32_t count, int32_t threads, float tolerance,
                     double failure_probability, void* workspace, size_t workspace_bytes);

/* As s2d_add_penalty_grad, with `device_rank` in host memory. Layers may not share elements of their gradients. */
int s2d_cpu_add_penalty_grad(const s2d_penalty_layer* layers, int32_t count, int32_t threads);

/* As s2d_adamw, with all numbers in host memory, any number of groups, and bias corrections in fp64. No two layers may
 * share memory. */
int s2d_cpu_adamw(const s2d_adamw_layer* layers, int32_t count, const s2d_adamw_group* groups, int32_t group_count,
                  const s2d_adamw_options* options, int32_t threads);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif /* S2D_CPU_H_ */
