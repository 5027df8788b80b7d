// What every kernel here needs: loads and stores, conversions, reductions in a fixed order, tensor-core and copy
// instructions, grid-wide sync, launches. Under S2D_EMULATED the same source runs on the CPU (csrc/emulation).
#pragma once

#include "s2d.h"

#ifdef S2D_EMULATED
#include "emulation/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A by-value parameter that stays in constant memory: no thread copies it.
#define S2D_GRID_CONSTANT(type) const __grid_constant__ type
// Shared memory only through these two, so that the emulation can place, poison and guard it.
#define S2D_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define S2D_DYNAMIC_SHARED(type, name)                                  \
  extern __shared__ __align__(1024) unsigned char s2d_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(s2d_dynamic_shared)
#endif

#include <cmath>
#include <tuple>

namespace s2d {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(fp16 value) { return __half2float(value); }

// To the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float value) {
  return __float2half_rn(value);
}

// 16 bytes as one access; the pointer must be aligned to 16.
__device__ __forceinline__ uint4 load_16(const void* pointer) {
#ifdef S2D_EMULATED
  emulation::check_aligned(pointer, 16, "load");
#endif
  return *static_cast<const uint4*>(pointer);
}
// The same through the read-only cache, for memory that nothing writes during the kernel.
__device__ __forceinline__ uint4 load_16_constant(const void* pointer) {
  return __ldg(static_cast<const uint4*>(pointer));
}
// To global memory. In PTX because nvcc makes four stores of the assignment of a uint4 for sm_80 and sm_90.
__device__ __forceinline__ void store_16(void* global, uint4 words) {
#ifdef S2D_EMULATED
  emulation::check_aligned(global, 16, "store");
  *static_cast<uint4*>(global) = words;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#endif
}

template <typename T>
constexpr int kPer16 = 16 / sizeof(T);

// The 16-bit elements of one word, the first in its lower half.
template <typename T>
__device__ __forceinline__ T half_of(unsigned word, int upper);
template <>
__device__ __forceinline__ bf16 half_of<bf16>(unsigned word, int upper) {
  return __ushort_as_bfloat16(static_cast<unsigned short>(upper ? word >> 16 : word));
}
template <>
__device__ __forceinline__ fp16 half_of<fp16>(unsigned word, int upper) {
  return __ushort_as_half(static_cast<unsigned short>(upper ? word >> 16 : word));
}
// Two values in one word, each rounded as from_float does; one instruction where nvcc would use two slow ones.
template <typename T>
__device__ __forceinline__ unsigned pack_2(float lower, float upper);
template <>
__device__ __forceinline__ unsigned pack_2<bf16>(float lower, float upper) {
#ifdef S2D_EMULATED
  return __bfloat16_as_ushort(from_float<bf16>(lower)) | unsigned{__bfloat16_as_ushort(from_float<bf16>(upper))} << 16;
#else
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(upper), "f"(lower));
  return word;
#endif
}
template <>
__device__ __forceinline__ unsigned pack_2<fp16>(float lower, float upper) {
#ifdef S2D_EMULATED
  return __half_as_ushort(from_float<fp16>(lower)) | unsigned{__half_as_ushort(from_float<fp16>(upper))} << 16;
#else
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(upper), "f"(lower));
  return word;
#endif
}

template <typename T>
__device__ __forceinline__ void unpack(uint4 words, float (&values)[kPer16<T>]) {
  const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < kPer16<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(word[i]);
    } else {
      values[i] = to_float(half_of<T>(word[i / 2], i % 2));
    }
  }
}
template <typename T>
__device__ __forceinline__ uint4 pack(const float (&values)[kPer16<T>]) {
  unsigned word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      word[i] = __float_as_uint(values[i]);
    } else {
      word[i] = pack_2<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// The last index whose `first` is not above `value`; `first` ascends, and its first element is not above it.
__device__ __forceinline__ int last_not_above(const uint32_t* first, int count, uint32_t value) {
  int index = 0;
  for (int end = count; end - index > 1;) {
    const int middle = (index + end) / 2;
    if (first[middle] <= value) {
      index = middle;
    } else {
      end = middle;
    }
  }
  return index;
}

inline bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Maximum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// A butterfly: every lane ends with the same bits, because `combine` is commutative.
template <typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Over a one-dimensional block of kThreads (a multiple of 32); every thread gets the result, in an order that depends
// on nothing but kThreads.
template <int kThreads, typename T, typename Combine>
__device__ T block_reduce(T value, Combine combine) {
  static_assert(kThreads % kWarpSize == 0 && kThreads <= 1024, "whole warps");
  constexpr int kWarps = kThreads / kWarpSize;
  S2D_SHARED(T, partial, [kWarps]);
  value = warp_reduce(value, combine);
  __syncthreads();  // the previous call's readers are done
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = partial[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) value = combine(value, partial[i]);
  return value;
}

// Copies of 16 bytes from global to shared memory that a later wait completes; zeros where not `valid`.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
#ifdef S2D_EMULATED
  emulation::copy_async(shared, global, 16, valid ? 16 : 0);
#else
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#ifdef S2D_EMULATED
  emulation::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kPending of the calling thread's groups are under way; other threads' need a barrier after it.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef S2D_EMULATED
  emulation::copy_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// d += a b for one warp; `d` [16, 8], `a` [16, K] and `b` [K, 8] in the fragment layout of PTX's mma.m16n8k*. All lanes
// must call. fp32 accumulators for tf32 and bf16, int32 (wrapping) for s8 and s4.
#ifdef S2D_EMULATED
#define S2D_MMA(name, format, accumulator, instruction, constraint)                                           \
  inline void name(accumulator(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], S2D_SITE_PARAMETERS) { \
    using namespace emulation;                                                                                \
    mma<format>(d, a, b, {#name, file, line});                                                                \
  }
#else
#define S2D_MMA(name, format, accumulator, instruction, constraint)                                                 \
  __device__ __forceinline__ void name(accumulator(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {        \
    asm volatile("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]), "+" constraint(d[3])           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                               \
  }
#endif
S2D_MMA(mma_m16n8k8_tf32, Tf32, float, "m16n8k8.row.col.f32.tf32.tf32.f32", "f")
S2D_MMA(mma_m16n8k16_bf16, Bf16, float, "m16n8k16.row.col.f32.bf16.bf16.f32", "f")
S2D_MMA(mma_m16n8k32_s8, Int8, int32_t, "m16n8k32.row.col.s32.s8.s8.s32", "r")
S2D_MMA(mma_m16n8k64_s4, Int4, int32_t, "m16n8k64.row.col.s32.s4.s4.s32", "r")
#define S2D_MIXED UInt4, Int4  // a without sign, b with
S2D_MMA(mma_m16n8k64_u4s4, S2D_MIXED, int32_t, "m16n8k64.row.col.s32.u4.s4.s32", "r")
#undef S2D_MIXED
#undef S2D_MMA

// Four 8 x 8 matrices of 16-bit units, i.e. of 16-byte rows, from shared memory in the layout of an mma's fragments: a
// lane names a row, lane 8 i + r row r of matrix i, and gets four bytes of each matrix. All lanes must call.
#ifdef S2D_EMULATED
inline void ldmatrix_x4(uint32_t (&words)[4], const void* row, S2D_SITE_PARAMETERS) {
  emulation::ldmatrix_x4(words, row, {"ldmatrix_x4", file, line});
}
#else
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
#endif

// To tf32, to the nearest with ties away from zero: the bits mma_m16n8k8_tf32 takes.
__device__ __forceinline__ uint32_t to_tf32(float value) {
#ifdef S2D_EMULATED
  const uint32_t bits = __float_as_uint(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

// Waits for all blocks of a cooperative launch, and makes what each wrote before it visible to all after it. `barrier`
// is one word of global memory that was 0 before its first use and belongs to one launch at a time.
#ifdef S2D_EMULATED
inline void grid_sync(unsigned* barrier, S2D_SITE_PARAMETERS) {
  emulation::check_aligned(barrier, 4, "grid barrier");
  emulation::grid_barrier({"grid_sync", file, line});
}
#else
__device__ __forceinline__ void grid_sync(unsigned* barrier) {
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    // Block 0 adds what completes 2^31, so the top bit flips when the last block arrives and no reset is needed.
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    const bool first = blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0;
    __threadfence();
    const unsigned before = atomicAdd(barrier, first ? 0x80000000u - (blocks - 1) : 1u);
    unsigned now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(barrier) : "memory");
    } while (((before ^ now) & 0x80000000u) == 0);
    __threadfence();
  }
  __syncthreads();
}
#endif

// What a thread, or by a barrier its block, wrote before add_release is seen by whoever load_acquire lets see the sum.
__device__ __forceinline__ void add_release(unsigned* address, unsigned value) {
#ifdef S2D_EMULATED
  atomicAdd(address, value);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "r"(value)
               : "memory");
#endif
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
#ifdef S2D_EMULATED
  return *static_cast<const volatile unsigned*>(address);
#else
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(address)) : "memory");
  return value;
#endif
}

// A barrier of some blocks of a cooperative launch, a team, with the guarantee of grid_sync. Each block of the team
// adds one to *arrived, which was 0 before the first barrier of the team; `target`, of which thread 0's counts, is the
// number of barriers so far, this one included, times the blocks of the team. The count only grows: nothing is reset,
// and no block can miss the end of a barrier.
__device__ __forceinline__ void team_sync(unsigned* arrived, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    add_release(arrived, 1u);
    while (load_acquire(arrived) < target) __nanosleep(20);
  }
  __syncthreads();
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool cooperative = false;  // the blocks wait for one another: all must be resident
};

#ifndef S2D_EMULATED
inline int status_of(cudaError_t error) {
  if (error == cudaSuccess) return S2D_OK;
  // The status is the report: an error left behind would surface in the caller's next CUDA call.
  cudaGetLastError();
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) return S2D_NO_KERNEL;
  return S2D_CUDA_ERROR + static_cast<int>(error);
}
#endif

// Enqueues kernel(arguments...) and returns an s2d_status. The one way to launch.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const LaunchShape& shape, s2d_stream stream, const Arguments&... arguments) {
#ifdef S2D_EMULATED
  (void)stream;
  const auto call = std::make_tuple(kernel, std::tie(arguments...));
  const bool done = emulation::run(
      {shape.grid, shape.block, shape.shared_bytes, shape.cooperative},
      [](const void* data) {
        const auto& [kernel, arguments] = *static_cast<const decltype(call)*>(data);
        std::apply(kernel, arguments);
      },
      &call);
  return done ? S2D_OK : S2D_LAUNCH_FAILED;
#else
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > 0) {
    // Always to the same value, the most there is beside the kernel's static part: threads may launch at once.
    const auto function = reinterpret_cast<const void*>(kernel);
    cudaFuncAttributes attributes;
    int device = 0, most = 0;
    error = cudaFuncGetAttributes(&attributes, function);
    if (error == cudaSuccess) error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most - static_cast<int>(attributes.sharedSizeBytes));
    }
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = shape.cooperative ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  return status_of(error);
#endif
}

// Loads a kernel onto the current device and returns an s2d_status.
template <typename... Parameters>
int load(void (*kernel)(Parameters...)) {
#ifdef S2D_EMULATED
  (void)kernel;
  return S2D_OK;
#else
  cudaFuncAttributes attributes;
  return status_of(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
#endif
}

// Of each file, all its kernels; s2d_check_device calls them.
int load_penalty_grad();
int load_topk_svd();
int load_quantize();
int load_integer_gemm();
int load_adamw();
int load_capture();

}  // namespace s2d
