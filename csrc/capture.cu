// The largest |y - bias| of a layer's output [tokens, neurons], the first in the order of rows, then of neurons, where
// several are equal: its value, place and input row replace those kept where it is larger. One pass over y in blocks, a
// last block over their results. NaN does not count; an infinity only where its input row is finite.
#include "common.cuh"

namespace s2d {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kMaxBlocks = 1024;

template <typename T>
constexpr int kChunk = kThreads * kPer16<T>;

struct Best {
  float value;    // -1: none
  int64_t index;  // token * neurons + neuron
};

__device__ __forceinline__ Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

// Every thread gets the block's best.
__device__ Best block_best(Best best) {
  S2D_SHARED(float, values, [kWarps]);
  S2D_SHARED(int64_t, indices, [kWarps]);
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const Best other{__shfl_xor_sync(kAllLanes, best.value, distance),
                     __shfl_xor_sync(kAllLanes, best.index, distance)};
    best = better(best, other);
  }
  if (threadIdx.x % kWarpSize == 0) {
    values[threadIdx.x / kWarpSize] = best.value;
    indices[threadIdx.x / kWarpSize] = best.index;
  }
  __syncthreads();
  best = {values[0], indices[0]};
#pragma unroll
  for (int i = 1; i < kWarps; ++i) best = better(best, {values[i], indices[i]});
  return best;
}

__device__ __forceinline__ float element(const void* tensor, int64_t place, int32_t dtype) {
  switch (dtype) {
    case S2D_FLOAT32:
      return static_cast<const float*>(tensor)[place];
    case S2D_BFLOAT16:
      return to_float(static_cast<const bf16*>(tensor)[place]);
    default:
      return to_float(static_cast<const fp16*>(tensor)[place]);
  }
}

__device__ __forceinline__ bool finite(float value) {
  return (__float_as_uint(value) & 0x7fffffffu) < 0x7f800000u;
}

// Rare: only an infinite output asks.
__device__ bool finite_row(const s2d_capture_call& call, int64_t token) {
  for (int64_t i = 0; i < call.features; ++i) {
    if (!finite(element(call.x, token * call.x_stride + i, call.x_dtype))) return false;
  }
  return true;
}

__device__ __forceinline__ void consider(const s2d_capture_call& call, int64_t token, int64_t neuron, float y,
                                         Best& best) {
  const float magnitude = fabsf(call.bias ? y - __ldg(call.bias + neuron) : y);
  // Equal ones never replace an earlier one of the same thread, NaN compares false.
  if (magnitude > best.value && (finite(magnitude) || finite_row(call, token))) {
    best = {magnitude, token * call.neurons + neuron};
  }
}

template <typename T>
__device__ __forceinline__ Best search(const s2d_capture_call& call, bool vector_rows) {
  constexpr int N = kPer16<T>;
  const int64_t across = call.neurons / kChunk<T> + (call.neurons % kChunk<T> != 0);
  Best best{-1.0f, 0};
  for (int64_t item = blockIdx.x; item < call.tokens * across; item += gridDim.x) {
    const int64_t token = item / across;
    const int64_t first = item % across * kChunk<T> + threadIdx.x * N;
    const T* y = static_cast<const T*>(call.y) + token * call.y_stride + first;
    if (vector_rows && first + N <= call.neurons) {
      float values[N];
      unpack<T>(load_16(y), values);
#pragma unroll
      for (int e = 0; e < N; ++e) consider(call, token, first + e, values[e], best);
    } else {
      for (int e = 0; e < N && first + e < call.neurons; ++e) {
        consider(call, token, first + e, to_float(y[e]), best);
      }
    }
  }
  return best;
}

__global__ void __launch_bounds__(kThreads) capture_search(S2D_GRID_CONSTANT(s2d_capture_call) call, bool vector_rows,
                                                           Best* found) {
  if (call.enabled && !*call.enabled) return;
  Best best;
  switch (call.y_dtype) {
    case S2D_FLOAT32:
      best = search<float>(call, vector_rows);
      break;
    case S2D_BFLOAT16:
      best = search<bf16>(call, vector_rows);
      break;
    default:
      best = search<fp16>(call, vector_rows);
  }
  best = block_best(best);
  if (threadIdx.x == 0) found[blockIdx.x] = best;
}

__global__ void __launch_bounds__(kThreads) capture_keep(S2D_GRID_CONSTANT(s2d_capture_call) call, const Best* found,
                                                         int32_t count) {
  if (call.enabled && !*call.enabled) return;
  Best best{-1.0f, 0};
  for (int32_t i = threadIdx.x; i < count; i += kThreads) best = better(best, found[i]);
  best = block_best(best);
  const float before = *call.value;
  __syncthreads();  // all have read it
  if (!(best.value > before)) return;
  const int64_t token = best.index / call.neurons;
  if (threadIdx.x == 0) {
    *call.value = best.value;
    call.place[0] = best.index % call.neurons;
    call.place[1] = token;
  }
  for (int64_t i = threadIdx.x; i < call.features; i += kThreads) {
    call.row[i] = element(call.x, token * call.x_stride + i, call.x_dtype);
  }
}

size_t element_bytes(int32_t dtype) { return dtype == S2D_FLOAT32 ? 4 : 2; }

bool is_valid(const s2d_capture_call& call) {
  const auto known = [](int32_t dtype) { return dtype >= S2D_FLOAT32 && dtype <= S2D_FLOAT16; };
  if (call.tokens < 0 || call.neurons < 0 || call.features < 0 || !known(call.y_dtype) || !known(call.x_dtype)) {
    return false;
  }
  if (call.tokens == 0 || call.neurons == 0) return true;
  return call.y && call.x && call.value && call.place && call.row && aligned(call.y, element_bytes(call.y_dtype)) &&
         aligned(call.x, element_bytes(call.x_dtype)) && aligned(call.bias, 4) && aligned(call.value, 4) &&
         aligned(call.place, 8) && aligned(call.row, 4) && call.tokens <= INT64_MAX / call.neurons;
}

int64_t blocks_of(const s2d_capture_call& call) {
  const int64_t chunk = call.y_dtype == S2D_FLOAT32 ? kChunk<float> : kChunk<bf16>;
  const int64_t across = call.neurons / chunk + (call.neurons % chunk != 0);
  return call.tokens > kMaxBlocks / across ? kMaxBlocks : call.tokens * across;
}

}  // namespace

int load_capture() {
  const int status = load(capture_search);
  return status ? status : load(capture_keep);
}

}  // namespace s2d

size_t s2d_capture_workspace(const s2d_capture_call*) { return s2d::kMaxBlocks * sizeof(s2d::Best); }

int s2d_capture(const s2d_capture_call* call, void* workspace, size_t workspace_bytes, s2d_stream stream) {
  using namespace s2d;
  if (call == nullptr || !is_valid(*call)) return S2D_BAD_ARGUMENT;
  if (call->tokens == 0 || call->neurons == 0) return S2D_OK;
  if (workspace == nullptr || !aligned(workspace, 256) || workspace_bytes < s2d_capture_workspace(call)) {
    return S2D_BAD_WORKSPACE;
  }
  const bool vector_rows = aligned(call->y, 16) && (call->tokens == 1 || call->y_stride * element_bytes(call->y_dtype) % 16 == 0);
  const auto count = static_cast<int32_t>(blocks_of(*call));
  Best* found = static_cast<Best*>(workspace);
  if (const int status = launch(capture_search, {dim3(count), dim3(kThreads)}, stream, *call, vector_rows, found)) {
    return status;
  }
  return launch(capture_keep, {dim3(1), dim3(kThreads)}, stream, *call, static_cast<const Best*>(found), count);
}
