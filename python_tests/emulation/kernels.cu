// Kernels that test the emulation and common.cuh: one per feature, and broken ones that the emulation must catch.
#include "common.cuh"

namespace s2d {
namespace {

constexpr int kThreads = 128;

__global__ void reductions(const float* in, float* sums, float* maxima) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  sums[i] = block_reduce<kThreads>(in[i], Sum());
  maxima[i] = block_reduce<kThreads>(in[i], Maximum());
}

__global__ void shuffles(const int* in, int* out) {
  const int i = static_cast<int>(threadIdx.x);
  const int value = in[i], count = static_cast<int>(blockDim.x);
  out[0 * count + i] = __shfl_sync(kAllLanes, value, 7);
  out[1 * count + i] = __shfl_sync(kAllLanes, value, 3, 8);
  out[2 * count + i] = __shfl_xor_sync(kAllLanes, value, 5);
  out[3 * count + i] = __shfl_up_sync(kAllLanes, value, 3u);
  out[4 * count + i] = __shfl_down_sync(kAllLanes, value, 4u, 16);
  out[5 * count + i] = static_cast<int>(__ballot_sync(kAllLanes, value & 1));
  out[6 * count + i] = __any_sync(kAllLanes, value == 5);
  out[7 * count + i] = __all_sync(kAllLanes, value < 40);
  // Half a warp on its own, the other half later.
  const unsigned half = i % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  out[8 * count + i] = __shfl_xor_sync(half, value, 1);
  out[9 * count + i] = __syncthreads_count(value & 1);
}

__global__ void atomics(const int* in, int count, int* histogram, int* extremes) {
  S2D_SHARED(int, bins, [16]);
  if (threadIdx.x < 16) bins[threadIdx.x] = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    atomicAdd(&bins[in[i] & 15], 1);
    atomicMax(&extremes[0], in[i]);
    atomicMin(&extremes[1], in[i]);
    atomicOr(&extremes[2], in[i]);
    if (atomicCAS(&extremes[3], 0, 1) == 0) extremes[4] = 1;
  }
  __syncthreads();
  if (threadIdx.x < 16) histogram[threadIdx.x] = bins[threadIdx.x];
}

__global__ void conversions(const float* in, int count, bf16* to_bf16, fp16* to_fp16, float* from_fp16) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    to_bf16[i] = from_float<bf16>(in[i]);
    to_fp16[i] = from_float<fp16>(in[i]);
    from_fp16[i] = to_float(to_fp16[i]);
  }
}

// kElements of A or B that a register holds, from row-major memory, where s4 takes a byte per element.
__device__ uint32_t fragment_register(const void* memory, int first, int step, int kind) {
  uint32_t word = 0;
  switch (kind) {
    case 0:
      return to_tf32(static_cast<const float*>(memory)[first]);
    case 1:
      for (int i = 0; i < 2; ++i) {
        word |= static_cast<uint32_t>(static_cast<const uint16_t*>(memory)[first + i * step]) << 16 * i;
      }
      return word;
    case 2:
      for (int i = 0; i < 4; ++i) {
        word |= static_cast<uint32_t>(static_cast<const uint8_t*>(memory)[first + i * step]) << 8 * i;
      }
      return word;
    default:
      for (int i = 0; i < 8; ++i) word |= (static_cast<const uint8_t*>(memory)[first + i * step] & 15u) << 4 * i;
      return word;
  }
}

template <typename Accumulator, typename Mma>
__device__ void matrix_product(const void* A, const void* B, Accumulator* D, int kind, Mma mma) {
  const int group = static_cast<int>(threadIdx.x) / 4, member = static_cast<int>(threadIdx.x) % 4;
  const int elements = 1 << kind, k = 8 * elements;
  uint32_t a[4], b[2];
  for (int r = 0; r < 4; ++r) {
    const int row = group + (r & 1) * 8, col = member * elements + (r >> 1) * (k / 2);
    a[r] = fragment_register(A, row * k + col, 1, kind);
  }
  for (int r = 0; r < 2; ++r) b[r] = fragment_register(B, (member * elements + r * (k / 2)) * 8 + group, 8, kind);
  Accumulator d[4];
  for (int r = 0; r < 4; ++r) d[r] = D[(group + (r >> 1) * 8) * 8 + member * 2 + (r & 1)];
  mma(d, a, b);
  for (int r = 0; r < 4; ++r) D[(group + (r >> 1) * 8) * 8 + member * 2 + (r & 1)] = d[r];
}

using Words4 = const uint32_t (&)[4];
using Words2 = const uint32_t (&)[2];
struct Tf32Mma {
  __device__ void operator()(float (&d)[4], Words4 a, Words2 b) const { mma_m16n8k8_tf32(d, a, b); }
};
struct Bf16Mma {
  __device__ void operator()(float (&d)[4], Words4 a, Words2 b) const { mma_m16n8k16_bf16(d, a, b); }
};
struct Int8Mma {
  __device__ void operator()(int32_t (&d)[4], Words4 a, Words2 b) const { mma_m16n8k32_s8(d, a, b); }
};
struct Int4Mma {
  __device__ void operator()(int32_t (&d)[4], Words4 a, Words2 b) const { mma_m16n8k64_s4(d, a, b); }
};

__global__ void tensor_cores(int kind, const void* A, const void* B, void* D) {
  switch (kind) {
    case 0:
      return matrix_product(A, B, static_cast<float*>(D), 0, Tf32Mma());
    case 1:
      return matrix_product(A, B, static_cast<float*>(D), 1, Bf16Mma());
    case 2:
      return matrix_product(A, B, static_cast<int32_t*>(D), 2, Int8Mma());
    default:
      return matrix_product(A, B, static_cast<int32_t*>(D), 3, Int4Mma());
  }
}

// out reversed through dynamic shared memory; wrong without the barrier.
template <bool kBarrier>
__global__ void reversed(const float* in, float* out) {
  S2D_DYNAMIC_SHARED(float, buffer);
  buffer[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = buffer[blockDim.x - 1 - threadIdx.x];
}

// out[i] = sum of 3 values that neighbours hand round; wrong when a fast thread overwrites what a slow one has not
// read.
template <bool kBarrier>
__global__ void rotated(const float* in, float* out) {
  S2D_SHARED(float, buffer, [kThreads]);
  float sum = 0.0f, value = in[threadIdx.x];
  for (int step = 0; step < 3; ++step) {
    buffer[threadIdx.x] = value;
    __syncthreads();
    value = buffer[(threadIdx.x + 1) % kThreads];
    sum += value;
    if (kBarrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Writes one float at `index` of a shared array of kThreads.
__global__ void shared_write(int index, int dynamic, float* out) {
  S2D_DYNAMIC_SHARED(float, dynamic_buffer);
  S2D_SHARED(float, static_buffer, [kThreads]);
  float* buffer = dynamic ? dynamic_buffer : static_buffer;
  buffer[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) buffer[index] = 2.0f;
  __syncthreads();
  out[threadIdx.x] = buffer[threadIdx.x];
}

__global__ void shared_read(int index, float* out) {
  S2D_DYNAMIC_SHARED(float, buffer);
  buffer[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = buffer[threadIdx.x + index];
}

// 0: thread 0 has exited; 1: halves of the block at two barriers; 2: a warp's halves at different operations; 3: a mask
// without the caller; 4: a misaligned vector load.
__global__ void divergent(int kind, float* out) {
  const unsigned i = threadIdx.x;
  if (kind == 0) {
    if (i == 0) return;
    __syncthreads();
  } else if (kind == 1) {
    if (i < kThreads / 2) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (kind == 2) {
    if (i % 32 < 16) {
      out[i] = __shfl_xor_sync(kAllLanes, 1.0f, 1);
    } else {
      __syncwarp();
    }
  } else if (kind == 3) {
    __syncwarp(i % 32 == 31 ? 0x7fffffffu : kAllLanes);
  } else {
    out[i] = __uint_as_float(load_16(out + 1).x);
  }
}

// totals[block] = sum over all blocks, each of which waits for the others' parts; twice, to use the barrier again.
__global__ void grid_totals(const float* in, float* parts, float* totals, unsigned* barrier) {
  const float sum = block_reduce<kThreads>(in[blockIdx.x * kThreads + threadIdx.x], Sum());
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
  grid_sync(barrier);
  float total = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) total += parts[b];
  grid_sync(barrier);
  if (threadIdx.x == 0) parts[blockIdx.x] = -1.0f;
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// totals[block] = sum over the block's team, teams being ranges of `size` blocks, each with a counter of its own;
// `rounds` times with parts that change in between. Without the barriers parts are read before they are written.
template <bool kBarrier>
__global__ void team_totals(const float* in, float* parts, float* totals, unsigned* arrived, int size, int rounds) {
  const int team = blockIdx.x / size, members = min(size, static_cast<int>(gridDim.x) - team * size);
  unsigned target = 0;
  const float sum = block_reduce<kThreads>(in[blockIdx.x * kThreads + threadIdx.x], Sum());
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) parts[blockIdx.x] = sum + static_cast<float>(round);
    if (kBarrier) team_sync(arrived + team, target += members);
    float total = 0.0f;
    for (int b = 0; b < members; ++b) total += parts[team * size + b];
    if (threadIdx.x == 0) totals[blockIdx.x] = total;
    if (kBarrier) team_sync(arrived + team, target += members);
  }
}

// A team's barrier that expects a block more than there are.
__global__ void team_waits(unsigned* arrived) { team_sync(arrived, gridDim.x + 1); }

// Waits in a loop for a flag that a block which never runs beside this one would set.
__global__ void spinning(volatile unsigned* flag) {
  if (threadIdx.x == 0 && blockIdx.x != gridDim.x - 1) {
    while (*flag == 0) __nanosleep(100);
  }
  if (threadIdx.x == 0) *flag = 1;
}

// Two stages of 16-byte copies; without the wait the shared memory is read before they arrive.
template <bool kWait>
__global__ void staged_copy(const float* in, float* out, int count) {
  S2D_SHARED(float, stages, [2][4 * kThreads]);
  const int first = 4 * static_cast<int>(threadIdx.x);
  for (int stage = 0; stage < 2; ++stage) {
    const int from = stage * 4 * kThreads + first;
    cp_async_16(&stages[stage][first], in + min(from, count - 4), from < count);
    cp_async_commit();
  }
  if (kWait) cp_async_wait<1>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[first + i] = stages[0][4 * kThreads - 1 - first - i];
  if (kWait) cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[4 * kThreads + first + i] = stages[1][4 * kThreads - 1 - first - i];
}

__global__ void count_threads(unsigned* counter) { atomicAdd(counter, threadIdx.x + threadIdx.y * blockDim.x + 1); }

template <typename... Parameters, typename... Arguments>
int launch_block(void (*kernel)(Parameters...), size_t shared_bytes, s2d_stream stream, const Arguments&... arguments) {
  return launch(kernel, {dim3(1), dim3(kThreads), shared_bytes}, stream, arguments...);
}

}  // namespace
}  // namespace s2d

#pragma GCC visibility push(default)
extern "C" {

using namespace s2d;

int s2d_test_reductions(const float* in, float* sums, float* maxima, int blocks, s2d_stream stream) {
  return launch(reductions, {dim3(blocks), dim3(kThreads)}, stream, in, sums, maxima);
}
int s2d_test_shuffles(const int* in, int* out, int threads, s2d_stream stream) {
  return launch(shuffles, {dim3(1), dim3(threads)}, stream, in, out);
}
int s2d_test_atomics(const int* in, int count, int* histogram, int* extremes, s2d_stream stream) {
  return launch_block(atomics, 0, stream, in, count, histogram, extremes);
}
int s2d_test_conversions(const float* in, int count, void* to_bf16, void* to_fp16, float* from_fp16,
                         s2d_stream stream) {
  return launch_block(conversions, 0, stream, in, count, static_cast<bf16*>(to_bf16), static_cast<fp16*>(to_fp16),
                      from_fp16);
}
int s2d_test_mma(int kind, const void* A, const void* B, void* D, s2d_stream stream) {
  return launch(tensor_cores, {dim3(1), dim3(kWarpSize)}, stream, kind, A, B, D);
}
int s2d_test_reversed(const float* in, float* out, int barrier, s2d_stream stream) {
  return launch_block(barrier ? reversed<true> : reversed<false>, kThreads * sizeof(float), stream, in, out);
}
int s2d_test_rotated(const float* in, float* out, int barrier, s2d_stream stream) {
  return launch_block(barrier ? rotated<true> : rotated<false>, 0, stream, in, out);
}
int s2d_test_shared_write(int index, int dynamic, float* out, s2d_stream stream) {
  return launch_block(shared_write, kThreads * sizeof(float), stream, index, dynamic, out);
}
int s2d_test_shared_read(int index, float* out, s2d_stream stream) {
  return launch_block(shared_read, kThreads * sizeof(float), stream, index, out);
}
int s2d_test_divergent(int kind, float* out, s2d_stream stream) {
  return launch_block(divergent, 0, stream, kind, out);
}
int s2d_test_grid_totals(const float* in, float* parts, float* totals, unsigned* barrier, int blocks, int cooperative,
                         s2d_stream stream) {
  return launch(grid_totals, {dim3(blocks), dim3(kThreads), 0, cooperative != 0}, stream, in, parts, totals, barrier);
}
int s2d_test_team_totals(const float* in, float* parts, float* totals, unsigned* arrived, int blocks, int size,
                         int rounds, int barrier, s2d_stream stream) {
  return launch(barrier ? team_totals<true> : team_totals<false>, {dim3(blocks), dim3(kThreads), 0, true}, stream, in,
                parts, totals, arrived, size, rounds);
}
int s2d_test_team_waits(unsigned* arrived, int blocks, s2d_stream stream) {
  return launch(team_waits, {dim3(blocks), dim3(kThreads), 0, true}, stream, arrived);
}
int s2d_test_cooperative(unsigned* counter, int blocks, int shared_bytes, s2d_stream stream) {
  return launch(count_threads, {dim3(blocks), dim3(kThreads), static_cast<size_t>(shared_bytes), true}, stream,
                counter);
}
int s2d_test_spinning(unsigned* flag, int blocks, int cooperative, s2d_stream stream) {
  return launch(spinning, {dim3(blocks), dim3(32), 0, cooperative != 0}, stream, flag);
}
int s2d_test_staged_copy(const float* in, float* out, int count, int wait, s2d_stream stream) {
  return launch_block(wait ? staged_copy<true> : staged_copy<false>, 0, stream, in, out, count);
}
int s2d_test_launch(unsigned* counter, int x, int y, int blocks, int shared_bytes, s2d_stream stream) {
  return launch(count_threads, {dim3(blocks), dim3(x, y), static_cast<size_t>(shared_bytes)}, stream, counter);
}

}  // extern "C"
#pragma GCC visibility pop
