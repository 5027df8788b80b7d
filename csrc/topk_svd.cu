// Leading singular triplets of many matrices by block Krylov on the fused product (s2d_kernels/svd.py has the text):
//
//   begin            scale = 2^-e with |scale A| < 1;  Q_0 = orthonormalize(start)
//   product(j)       Y_j[b, D] = Q_j (scale A)^T,  Z_j[b, d] = Y_j (scale A), one read of A
//   orthonormalize   Q_{j+1} = Z_j against Q_0..Q_j: projection and Gram-eigen orthonormalization (SVQB), twice
//   finish           eigh of the fp64 Gram matrix of all Y, rotation of Q, Y, Z into triplets and residuals
//
// A [D, d] is W, or W^T when W is wide, so that D >= d; blocks are kept as rows. Everything is summed in a fixed order
// that depends on the matrix itself and the device alone. Nothing is decided on the host by data.
//
// A matrix takes one of two forms, by its shape and the device alone. Streamed: each step is a launch for all matrices
// and reads them from memory. Resident (svd_resident.cuh): one launch does all reads, a team of blocks keeping the
// matrix in shared memory; finish is the same for both, less the Gram matrix.
#include <algorithm>

#include "svd_layer.cuh"
#include "svd_product.cuh"
#include "svd_resident.cuh"
#include "svd_small.cuh"

namespace s2d {
namespace {

__device__ __forceinline__ float element(const void* A, uint8_t dtype, int64_t offset) {
  switch (dtype) {
    case S2D_FLOAT32:
      return static_cast<const float*>(A)[offset];
    case S2D_BFLOAT16:
      return to_float(static_cast<const bf16*>(A)[offset]);
    default:
      return to_float(static_cast<const fp16*>(A)[offset]);
  }
}

// --- begin --------------------------------------------------------------------------------------------------------

// largest[chunk] = max |A| over kChunk elements, on the bit patterns: a float maximum would drop NaN.
__global__ void __launch_bounds__(kThreads, 2) find_largest(S2D_GRID_CONSTANT(Table) table) {
  const int index = layer_of(table, blockIdx.x);
  const Layer& layer = table.layers[index];
  const int64_t chunk = blockIdx.x - table.first[index];
  const bool by_rows = layer.col_stride <= layer.row_stride;
  const int64_t inner = by_rows ? layer.d : layer.D;
  const int64_t inner_stride = by_rows ? layer.col_stride : layer.row_stride;
  const int64_t outer_stride = by_rows ? layer.row_stride : layer.col_stride;
  const int64_t count = layer.D * layer.d;
  const int64_t end = min(count, (chunk + 1) * kChunk);
  unsigned found = 0;
  const int per_16 = layer.dtype == S2D_FLOAT32 ? 4 : 8;
  const bool packed = outer_stride == inner;  // then nothing needs to be divided
  if (by_rows ? layer.vector_rows : layer.vector_cols) {
    for (int64_t i = chunk * kChunk + threadIdx.x * per_16; i < end; i += kThreads * per_16) {
      const int64_t offset = packed ? i : i / inner * outer_stride + i % inner;
      if (layer.dtype == S2D_FLOAT32) {
        const uint4 words = load_16_constant(static_cast<const float*>(layer.A) + offset);
        found = max(max(max(found, words.x & 0x7fffffffu), max(words.y & 0x7fffffffu, words.z & 0x7fffffffu)),
                    words.w & 0x7fffffffu);
      } else {
        const uint4 words = load_16_constant(static_cast<const bf16*>(layer.A) + offset);
        float values[8];
        if (layer.dtype == S2D_BFLOAT16) {
          unpack<bf16>(words, values);
        } else {
          unpack<fp16>(words, values);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) found = max(found, __float_as_uint(values[e]) & 0x7fffffffu);
      }
    }
  } else {
    for (int64_t i = chunk * kChunk + threadIdx.x; i < end; i += kThreads) {
      const float value = element(layer.A, layer.dtype, i / inner * outer_stride + i % inner * inner_stride);
      found = max(found, __float_as_uint(value) & 0x7fffffffu);
    }
  }
  found = block_reduce<kThreads>(found, Maximum());
  if (threadIdx.x == 0) layer.largest[chunk] = found;
}

__global__ void __launch_bounds__(kThreads, 1) begin(S2D_GRID_CONSTANT(Table) table) {
  const Layer& layer = table.layers[blockIdx.x];
  if (layer.team > 0) {  // the resident form finds the largest element itself
    if (threadIdx.x == 0) layer.state->arrived = 0;
  } else {
    const int chunks = static_cast<int>(divide_up<int64_t>(layer.D * layer.d, kChunk));
    unsigned largest = 0;
    for (int i = threadIdx.x; i < chunks; i += kThreads) largest = max(largest, layer.largest[i]);
    largest = block_reduce<kThreads>(largest, Maximum());
    if (threadIdx.x == 0) set_prescale(*layer.state, largest);
  }
  const int pitch = pitch_d(layer);
  for (int i = threadIdx.x; i < layer.block * pitch; i += kThreads) {
    const int r = i / pitch, c = i % pitch;
    float value = 0.0f;
    if (layer.dense) {
      value = r == c ? 1.0f : 0.0f;
    } else if (c < layer.d) {
      value = layer.start[r * layer.d + c];
    }
    layer.K[i] = value;
  }
  __syncthreads();
  if (!layer.dense) orthonormalize_rows(layer.K, layer.block, nullptr, 0, nullptr, gaussian_of(layer), layer.d, pitch);
}

// --- between products ---------------------------------------------------------------------------------------------

// Z_step = the sum of the slabs' parts, in their order.
__global__ void __launch_bounds__(kThreads, 2) sum_partials(S2D_GRID_CONSTANT(Table) table, int step) {
  const int index = layer_of(table, blockIdx.x);
  const Layer& layer = table.layers[index];
  const int64_t place = static_cast<int64_t>(blockIdx.x - table.first[index]) * kThreads + threadIdx.x;
  const int pitch = pitch_d(layer);
  const int64_t count = static_cast<int64_t>(layer.block) * pitch;
  if (place >= count) return;
  float sum = 0.0f;
  if (place % pitch < layer.d) {
    for (int slab = 0; slab < slabs(layer); ++slab) sum += layer.partial[slab * count + place];
  }
  layer.Z[step * count + place] = sum;
}

__global__ void __launch_bounds__(kThreads, 1) orthonormalize(S2D_GRID_CONSTANT(Table) table, int step) {
  const Layer& layer = table.layers[blockIdx.x];
  const int pitch = pitch_d(layer), b = layer.block, p = (step + 1) * b;
  const float* Z = layer.Z + static_cast<int64_t>(step) * b * pitch;
  float* Q = layer.K + static_cast<int64_t>(p) * pitch;
  for (int i = threadIdx.x; i < b * pitch; i += kThreads) Q[i] = Z[i];
  __syncthreads();
  // `finish` uses the scratch only later: 2 rows^2 doubles are more than round_up(b, 8) p floats
  orthonormalize_rows(Q, b, layer.K, p, reinterpret_cast<float*>(layer.scratch), gaussian_of(layer), layer.d, pitch);
}

// --- finish -------------------------------------------------------------------------------------------------------

// The part of Y Y^T that one slab of columns makes, in fp64.
__global__ void __launch_bounds__(kThreads, 2) gram(S2D_GRID_CONSTANT(Table) table) {
  const int index = layer_of(table, blockIdx.x);
  const Layer& layer = table.layers[index];
  const int slab = static_cast<int>(blockIdx.x - table.first[index]), n = layer.rows;
  const int64_t pitch = pitch_D(layer), first = static_cast<int64_t>(slab) * gram_slab(layer);
  const int length = static_cast<int>(min(static_cast<int64_t>(gram_slab(layer)), pitch - first));
  double* out = layer.gram + static_cast<int64_t>(slab) * n * n;
  for (int pair = threadIdx.x; pair < n * n; pair += kThreads) {
    const int r = pair / n, c = pair % n;
    if (c > r) continue;
    const float *yr = layer.Y + r * pitch + first, *yc = layer.Y + c * pitch + first;
    double sum = 0.0;
    for (int i = 0; i < length; i += 4) {
      float x[4], y[4];
      unpack<float>(load_16(yr + i), x);
      unpack<float>(load_16(yc + i), y);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum += static_cast<double>(x[e]) * static_cast<double>(y[e]);
    }
    out[r * n + c] = sum;
  }
}

__device__ __forceinline__ float scaled(float value, int exponent) {
  // in two factors, each a normal number
  const int half = exponent / 2;
  return value * __uint_as_float(static_cast<unsigned>(127 + half) << 23) *
         __uint_as_float(static_cast<unsigned>(127 + exponent - half) << 23);
}

// A Ritz value below the rounding of the products, or of their fp64 Gram matrix, is noise: it counts as zero.
__device__ __forceinline__ double noise_floor(const Layer& layer) {
  return layer.theta[0] * max(4.0 * 1.1920929e-7, sqrt(layer.rows * 2.220446049250313e-16));
}

// Eigen-decomposition of the Gram matrix, S, Vh, residuals, the bound on what was missed, status.
__global__ void __launch_bounds__(kThreads, 1) ritz(S2D_GRID_CONSTANT(Table) table, float tolerance, double failure_probability) {
  S2D_SHARED(float, residual, [kMaxBlock]);
  S2D_SHARED(double, weight, [kMaxRows]);
  constexpr int kShared = 48;  // a warm refresh's rows with b <= 12
  S2D_SHARED(double, on_chip, [2 * kShared * kShared]);
  const Layer& layer = table.layers[blockIdx.x];
  const int n = layer.rows, d = layer.d, pitch = pitch_d(layer), lane = threadIdx.x % kWarpSize;
  float* vectors_d = layer.wide ? layer.U : layer.Vh;
  if (!layer.state->finite) {
    for (int64_t i = threadIdx.x; i < static_cast<int64_t>(layer.width) * d; i += kThreads) vectors_d[i] = 0.0f;
    for (int i = threadIdx.x; i < layer.width; i += kThreads) layer.S[i] = layer.residual[i] = 0.0f;
    if (threadIdx.x == 0) {
      layer.theta[0] = 0.0;
      layer.state->bad = 1;
      *layer.status = kNonFinite;
      *layer.missed = 0.0f;
    }
    return;
  }
  double *H = n <= kShared ? on_chip : layer.scratch, *V = H + n * n;
  for (int i = threadIdx.x; i < n * n; i += kThreads) {
    const int r = max(i / n, i % n), c = min(i / n, i % n);
    double sum = 0.0;
    for (int slab = 0; slab < gram_parts(layer); ++slab)
      sum += layer.gram[static_cast<int64_t>(slab) * n * n + r * n + c];
    H[i] = sum;
  }
  __syncthreads();
  jacobi(H, V, n);
  // Descending; equal ones in the order in which they stand.
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const double value = H[i * n + i];
    int place = 0;
    for (int j = 0; j < n; ++j) {
      const double other = H[j * n + j];
      place += other > value || (other == value && j < i);
    }
    layer.theta[place] = sqrt(max(value, 0.0));
    for (int j = 0; j < n; ++j) layer.vectors[place * n + j] = V[i * n + j];
  }
  __syncthreads();

  const double floor = noise_floor(layer);
  // Right vectors and residuals: a warp a triplet.
  for (int i = threadIdx.x / kWarpSize; i < layer.width; i += kThreads / kWarpSize) {
    const double theta = layer.theta[i];
    const bool counts = theta > floor;
    const double s = counts ? theta : 0.0, inverse = counts ? 1.0 / theta : 0.0;
    const double* vector = layer.vectors + i * n;
    float square = 0.0f;
    for (int j = lane; j < d; j += kWarpSize) {
      // in fp64, or the rounding of a factor would leave eps s_1 of the leading vectors in those behind them
      double right = 0.0, z = 0.0;
      for (int c = 0; c < n; ++c) {
        right = fma(vector[c], static_cast<double>(layer.K[c * pitch + j]), right);
        z = fma(vector[c], static_cast<double>(layer.Z[c * pitch + j]), z);
      }
      const float difference = static_cast<float>(z * inverse - s * right);
      square = fmaf(difference, difference, square);
      const int64_t place = layer.wide ? static_cast<int64_t>(j) * layer.width + i : static_cast<int64_t>(i) * d + j;
      vectors_d[place] = counts ? static_cast<float>(right) : 0.0f;
    }
    square = warp_sum(square);
    if (lane == 0) {
      layer.S[i] = static_cast<float>(s);
      residual[i] = sqrtf(square);
    }
  }
  __syncthreads();

  // The random row w = the start's last, deflated by the k found, one more step taken by Z.
  double missed = 0.0;
  if (layer.dense) {
    missed = layer.k < n ? layer.theta[layer.k] : 0.0;
  } else {
    const float* w = gaussian_of(layer);
    const double top = layer.k < n && layer.theta[layer.k] > 0.0 ? layer.theta[layer.k] : 1.0;
    S2D_SHARED(double, along, [kMaxRows]);
    for (int c = threadIdx.x / kWarpSize; c < n; c += kThreads / kWarpSize) {
      float sum = 0.0f;
      for (int j = lane; j < d; j += kWarpSize) sum = fmaf(w[j], layer.K[c * pitch + j], sum);
      sum = warp_sum(sum);
      if (lane == 0) along[c] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      double coordinate = 0.0;
      for (int c = 0; c < n; ++c) coordinate += along[c] * layer.vectors[i * n + c];
      const double ratio = layer.theta[i] / top * (layer.theta[i] / top);
      for (int q = 1; q < layer.reads; ++q) coordinate *= ratio;
      weight[i] = i < layer.k ? 0.0 : coordinate;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < n; c += kThreads) {
      double sum = 0.0;
      for (int i = 0; i < n; ++i) sum += weight[i] * layer.vectors[i * n + c];
      along[c] = sum;
    }
    __syncthreads();
    double square = 0.0;
    for (int j = threadIdx.x; j < d; j += kThreads) {
      double sum = 0.0;
      for (int c = 0; c < n; ++c) sum += along[c] * static_cast<double>(layer.Z[c * pitch + j]);
      sum /= top * top;
      square += sum * sum;
    }
    square = block_reduce<kThreads>(square, Sum());
    // the root in fp32: its exponent is exact enough, and pow in fp64 costs a stack
    missed = powf(static_cast<float>(sqrt(square) / (failure_probability * 1.2533141373155001)), 0.5f / layer.reads) * top;
  }

  if (threadIdx.x == 0) {
    float criterion = 0.0f;
    for (int i = 0; i < layer.k; ++i) criterion = max(criterion, layer.S[i] * residual[i]);
    const bool converged = criterion <= tolerance * (layer.S[0] * layer.S[0]);
    const int exponent = layer.state->exponent;
    const float largest = scaled(layer.S[0], exponent);
    const bool overflow = !(largest <= 3.4028235e38f);
    layer.state->bad = overflow;
    *layer.status = overflow ? kOverflow : converged ? kConverged : kNotConverged;
    *layer.missed = overflow ? 0.0f : scaled(static_cast<float>(missed), exponent);
  }
  __syncthreads();
  const bool bad = layer.state->bad;
  for (int i = threadIdx.x; i < layer.width; i += kThreads) {
    layer.S[i] = bad ? 0.0f : scaled(layer.S[i], layer.state->exponent);
    layer.residual[i] = bad ? 0.0f : scaled(residual[i], layer.state->exponent);
  }
  if (bad) {
    for (int64_t i = threadIdx.x; i < static_cast<int64_t>(layer.width) * d; i += kThreads) vectors_d[i] = 0.0f;
  }
}

// The left vectors of A: a thread a row of it.
__global__ void __launch_bounds__(kThreads, 2) rotate_left(S2D_GRID_CONSTANT(Table) table) {
  const int index = layer_of(table, blockIdx.x);
  const Layer& layer = table.layers[index];
  const int64_t row = static_cast<int64_t>(blockIdx.x - table.first[index]) * kThreads + threadIdx.x;
  if (row >= layer.D) return;
  const bool bad = layer.state->bad;
  const double floor = noise_floor(layer);
  constexpr int kAtOnce = 8;  // vectors for which an element of Y is read once
  for (int first = 0; first < layer.width; first += kAtOnce) {
    double sum[kAtOnce] = {};
    for (int c = 0; c < layer.rows && !bad; ++c) {
      const double y = layer.Y[c * pitch_D(layer) + row];
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) {
        if (first + e < layer.width) sum[e] = fma(layer.vectors[(first + e) * layer.rows + c], y, sum[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      const int i = first + e;
      if (i >= layer.width) break;
      const double theta = layer.theta[i];
      const float value = theta > floor && !bad ? static_cast<float>(sum[e] / theta) : 0.0f;
      (layer.wide ? layer.Vh : layer.U)[layer.wide ? i * layer.D + row : row * layer.width + i] = value;
    }
  }
}

// --- host ---------------------------------------------------------------------------------------------------------

bool is_valid(const s2d_svd_layer& layer) {
  if (layer.rows <= 0 || layer.cols <= 0 || layer.dtype < S2D_FLOAT32 || layer.dtype > S2D_FLOAT16) return false;
  const int64_t d = min(layer.rows, layer.cols);
  if (layer.width < 1 || layer.k < 1 || layer.k > layer.width || layer.width > d || layer.reads < 1) return false;
  if (!layer.weight || !layer.start || !layer.U || !layer.S || !layer.Vh || !layer.residual || !layer.missed ||
      !layer.status) {
    return false;
  }
  const size_t bytes = layer.dtype == S2D_FLOAT32 ? 4 : 2;
  return aligned(layer.weight, bytes) && aligned(layer.start, 4) && aligned(layer.U, 4) && aligned(layer.S, 4) &&
         aligned(layer.Vh, 4) && aligned(layer.residual, 4) && aligned(layer.missed, 4) && aligned(layer.status, 4);
}

// Bytes of a layer's workspace; fills in what lies there when `base` is given.
size_t place(Layer& layer, char* base) {
  size_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    pointer = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up<size_t>(count * sizeof(T), 256);
  };
  const int64_t n = layer.rows, pitch = pitch_d(layer);
  take(layer.state, 1);
  take(layer.largest, layer.team > 0 ? layer.team : divide_up<int64_t>(layer.D * layer.d, kChunk));
  take(layer.K, n * pitch);
  take(layer.Y, n * pitch_D(layer));
  take(layer.Z, n * pitch);
  take(layer.partial, static_cast<int64_t>(layer.team > 0 ? layer.team : slabs(layer)) * layer.block * pitch);
  take(layer.gram, gram_parts(layer) * n * n);
  take(layer.exchange, 2 * layer.team * n * layer.block);
  take(layer.vectors, n * n);
  take(layer.scratch, 2 * n * n);
  take(layer.theta, n);
  return used;
}

// What the choice of a form depends on beside the matrix.
struct Device {
  size_t shared_limit;  // bytes of a block, static and dynamic
  int multiprocessors;  // blocks of a cooperative launch, one on each; 0 where there is none
};

Device this_device() {
#ifdef S2D_EMULATED
  return {s2d_emulation_set_shared_limit(0), s2d_emulation_set_multiprocessors(0)};
#else
  int device = 0, bytes = 0, multiprocessors = 0, cooperative = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) != cudaSuccess) {
    cudaGetLastError();
    return {0, 0};
  }
  return {static_cast<size_t>(bytes), cooperative ? multiprocessors : 0};
#endif
}

// Of a block of the resident form: the slab of so many panels, and beside it what product and dense part take in turn.
size_t resident_bytes(const Layer& layer, int panels) {
  const size_t meeting = layer.block > 8 ? sizeof(Meeting<kTeamWarps, 2>) : sizeof(Meeting<kTeamWarps, 1>);
  return static_cast<size_t>(slab_elements(layer, panels)) * (layer.dtype == S2D_FLOAT32 ? 4 : 2) +
         max(meeting, Dense::doubles(layer) * sizeof(double));
}

// The fewest blocks that hold the matrix, 0 where it is streamed: it has one read only, or none would do.
int least_team(const Layer& layer, const Device& device) {
  constexpr size_t kStatic = 1024;  // few bytes, and what the compiler aligns
  if (layer.dense || layer.d > kTeamMaxD || layer.block > kMaxBlock || device.shared_limit < kStatic) return 0;
  const int panels = panels_of(layer);
  const size_t most = device.shared_limit - kStatic, one = resident_bytes(layer, 1);
  if (one > most) return 0;
  const int fit = 1 + static_cast<int>((most - one) / (resident_bytes(layer, 2) - one));
  const int team = divide_up(panels, fit);
  return team <= device.multiprocessors ? team : 0;
}

Layer described(const s2d_svd_layer& given, const Device& device) {
  Layer layer{};
  layer.A = given.weight;
  layer.start = given.start;
  layer.U = given.U;
  layer.S = given.S;
  layer.Vh = given.Vh;
  layer.residual = given.residual;
  layer.missed = given.missed;
  layer.status = given.status;
  layer.wide = given.rows < given.cols;
  layer.D = layer.wide ? given.cols : given.rows;
  layer.d = static_cast<int32_t>(layer.wide ? given.rows : given.cols);
  layer.row_stride = layer.wide ? given.col_stride : given.row_stride;
  layer.col_stride = layer.wide ? given.row_stride : given.col_stride;
  layer.width = given.width;
  layer.k = given.k;
  layer.dtype = static_cast<uint8_t>(given.dtype);
  layer.dense = static_cast<int64_t>(given.reads) * given.width >= layer.d;
  layer.block = layer.dense ? layer.d : given.width;
  layer.reads = layer.dense ? 1 : given.reads;
  layer.rows = layer.block * layer.reads;
  const int64_t per_16 = layer.dtype == S2D_FLOAT32 ? 4 : 8;
  const bool start = aligned(given.weight, 16);
  layer.vector_rows = start && layer.col_stride == 1 && layer.d % per_16 == 0 && layer.row_stride % per_16 == 0;
  layer.vector_cols =
      !layer.vector_rows && start && layer.row_stride == 1 && layer.D % per_16 == 0 && layer.col_stride % per_16 == 0;
  layer.team = given.team < 0 ? 0 : least_team(layer, device);
  if (given.team > 0 && layer.team > 0) layer.team = given.team;
  return layer;
}

// One compiled form of the product: which layers it takes, and its launch.
struct Form {
  bool half;
  int warps, tiles, n;
  bool by_cols = false;  // another size of tiles, and so perhaps another number of them

  bool operator==(const Form& other) const {
    return half == other.half && warps == other.warps && n == other.n && by_cols == other.by_cols;
  }
  // Of `part` and `whole`, and what the compiler aligns.
  size_t static_shared() const { return 4 * (warps * 8 * n * kPanel + 8 * n * (kPanel + 4)) + 1024; }
};

Form form_of(const Layer& layer) {
  const bool half = layer.dtype != S2D_FLOAT32;
  if (layer.d > 1024) return {half, 16, half ? 16 : 8, 1, layer.vector_cols};
  return {half, 8, 8, layer.block > 8 ? 2 : 1, layer.vector_cols};
}

size_t tile_bytes(const Layer& layer) {
  return static_cast<size_t>(tile_elements(layer.d, layer.vector_cols)) * (layer.dtype == S2D_FLOAT32 ? 4 : 2);
}

int status_of(const s2d_svd_layer* layers, int32_t count, const Device& device) {
  if (count < 0 || (count > 0 && layers == nullptr)) return S2D_BAD_ARGUMENT;
  for (int32_t i = 0; i < count; ++i) {
    if (!is_valid(layers[i])) return S2D_BAD_ARGUMENT;
    const int64_t d = min(layers[i].rows, layers[i].cols), D = max(layers[i].rows, layers[i].cols);
    // A warp's accumulators: 2048 columns in fp32, 4096 in 16 bits.
    if (d > (layers[i].dtype == S2D_FLOAT32 ? 2048 : 4096) || D > (int64_t{1} << 31) - 2 * kSlab || layers[i].width > kMaxBlock) return S2D_UNSUPPORTED;
    const int64_t all = static_cast<int64_t>(layers[i].reads) * layers[i].width;
    if (min(all, d) > kMaxRows) return S2D_UNSUPPORTED;
    const Layer layer = described(layers[i], device);
    if (layers[i].team > 0 && !layer.dense) {
      const int least = least_team(layer, device);
      if (least == 0 || layer.team < least || layer.team > device.multiprocessors) return S2D_UNSUPPORTED;
    }
    if (layer.team == 0 && tile_bytes(layer) + form_of(layer).static_shared() > device.shared_limit)
      return S2D_UNSUPPORTED;
  }
  return S2D_OK;
}

// Calls launch_one(table, members) for the layers that `wanted` picks, blocks(layer) blocks for each.
template <typename Wanted, typename Blocks, typename LaunchTable>
int for_tables(const s2d_svd_layer* layers, int32_t count, const Device& device, void* workspace, Wanted wanted,
               Blocks blocks, LaunchTable launch_table) {
  Table table{};
  size_t used = 0;
  for (int32_t i = 0; i < count; ++i) {
    Layer layer = described(layers[i], device);
    used += place(layer, static_cast<char*>(workspace) + used);
    if (!wanted(layer)) continue;
    const int64_t needed = blocks(layer);
    if (table.count == kMaxLayers || table.first[table.count] + needed > 0x7fffffff) {
      if (const int status = launch_table(table)) return status;
      table.count = 0;
    }
    table.layers[table.count] = layer;
    table.first[table.count + 1] = table.first[table.count] + static_cast<uint32_t>(needed);
    ++table.count;
  }
  return table.count ? launch_table(table) : static_cast<int>(S2D_OK);
}

size_t workspace_of(const s2d_svd_layer* layers, int32_t count, const Device& device) {
  size_t used = 0;
  for (int32_t i = 0; i < count; ++i) {
    Layer layer = described(layers[i], device);
    used += place(layer, nullptr);
  }
  return used;
}

int check(const s2d_svd_layer* layers, int32_t count, const Device& device, const void* workspace, size_t bytes) {
  if (const int status = status_of(layers, count, device)) return status;
  if (count == 0) return S2D_OK;
  if (workspace == nullptr || !aligned(workspace, 256) || bytes < workspace_of(layers, count, device)) {
    return S2D_BAD_WORKSPACE;
  }
  return S2D_OK;
}

bool streamed(const Layer& layer) { return layer.team == 0; }

template <typename T, int kWarps, int kTiles, int kN>
int launch_product(const s2d_svd_layer* layers, int32_t count, const Device& device, void* workspace, int32_t step,
                   s2d_stream stream, const Form& form) {
  size_t largest = 0;
  const auto wanted = [&](const Layer& layer) {
    return streamed(layer) && step < layer.reads && form_of(layer) == form;
  };
  const auto blocks = [&](const Layer& layer) {
    largest = max(largest, tile_bytes(layer));
    return static_cast<int64_t>(slabs(layer)) * divide_up(layer.block, 8 * kN);
  };
  return for_tables(layers, count, device, workspace, wanted, blocks, [&](const Table& table) {
    // two where two blocks of them fit a multiprocessor of sm_90
    const size_t two = 2 * largest + form.static_shared();
    const int stages = two <= device.shared_limit && two <= 112 * 1024 ? 2 : 1;
    return launch(product<T, kWarps, kTiles, kN>,
                  {dim3(table.first[table.count]), dim3(kWarps * kWarpSize), stages * largest}, stream, table, step,
                  stages);
  });
}

// The teams of a table among so many blocks, each a range of them: wave by wave the largest that still fit. Which
// blocks a team gets does not change what it computes.
Table scheduled(const Table& table, int blocks) {
  Table result{};
  int order[kMaxLayers];
  for (int i = 0; i < table.count; ++i) order[i] = i;
  std::stable_sort(order, order + table.count,
                   [&](int a, int b) { return table.layers[a].team > table.layers[b].team; });
  int used = 0, most = 0, wave_used = 0;
  bool placed[kMaxLayers] = {};
  while (used < table.count) {
    wave_used = 0;
    for (int place = 0; place < table.count; ++place) {
      const Layer& layer = table.layers[order[place]];
      if (placed[place] || wave_used + layer.team > blocks) continue;
      placed[place] = true;
      result.layers[used] = layer;
      result.first[used++] = static_cast<uint32_t>(wave_used);
      wave_used += layer.team;
    }
    most = max(most, wave_used);
  }
  result.count = used;
  result.first[used] = static_cast<uint32_t>(most);
  return result;
}

template <typename T, int kN>
int launch_resident(const s2d_svd_layer* layers, int32_t count, const Device& device, void* workspace,
                    int32_t max_blocks, s2d_stream stream) {
  size_t largest = 0;
  int blocks = max_blocks > 0 ? min(max_blocks, device.multiprocessors) : device.multiprocessors;
  const auto wanted = [&](const Layer& layer) {
    return !streamed(layer) && (layer.dtype != S2D_FLOAT32) == (sizeof(T) == 2) && (layer.block > 8) == (kN == 2);
  };
  const auto team = [&](const Layer& layer) {
    largest = max(largest, resident_bytes(layer, divide_up(panels_of(layer), layer.team)));
    blocks = max(blocks, layer.team);
    return int64_t{layer.team};
  };
  return for_tables(layers, count, device, workspace, wanted, team, [&](const Table& table) {
    const Table plan = scheduled(table, blocks);
    return launch(resident<T, kN>, {dim3(plan.first[plan.count]), dim3(kTeamThreads), largest, true}, stream, plan);
  });
}

}  // namespace

int load_topk_svd() {
  for (const int status :
       {load(find_largest), load(begin), load(sum_partials), load(orthonormalize), load(gram), load(ritz),
        load(rotate_left), load(product<float, 8, 8, 1>), load(product<float, 8, 8, 2>), load(product<float, 16, 8, 1>),
        load(product<uint16_t, 8, 8, 1>), load(product<uint16_t, 8, 8, 2>), load(product<uint16_t, 16, 16, 1>),
        load(resident<float, 1>), load(resident<float, 2>), load(resident<uint16_t, 1>), load(resident<uint16_t, 2>)}) {
    if (status) return status;
  }
  return S2D_OK;
}

}  // namespace s2d

using namespace s2d;

int s2d_topk_svd_check(const s2d_svd_layer* layers, int32_t count) { return status_of(layers, count, this_device()); }

int s2d_topk_svd_team(const s2d_svd_layer* layer) {
  const Device device = this_device();
  return status_of(layer, 1, device) ? 0 : described(*layer, device).team;
}

size_t s2d_topk_svd_workspace(const s2d_svd_layer* layers, int32_t count) {
  return workspace_of(layers, count, this_device());
}

int s2d_topk_svd_begin(const s2d_svd_layer* layers, int32_t count, void* workspace, size_t workspace_bytes,
                       s2d_stream stream) {
  const Device device = this_device();
  if (const int status = check(layers, count, device, workspace, workspace_bytes)) return status;
  const auto all = [](const Layer&) { return true; };
  const auto chunks = [](const Layer& layer) { return divide_up<int64_t>(layer.D * layer.d, kChunk); };
  int status = for_tables(layers, count, device, workspace, streamed, chunks, [&](const Table& table) {
    return launch(find_largest, {dim3(table.first[table.count]), dim3(kThreads)}, stream, table);
  });
  if (status) return status;
  return for_tables(
      layers, count, device, workspace, all, [](const Layer&) { return int64_t{1}; },
      [&](const Table& table) { return launch(begin, {dim3(table.count), dim3(kThreads)}, stream, table); });
}

int s2d_topk_svd_resident(const s2d_svd_layer* layers, int32_t count, int32_t max_blocks, void* workspace,
                          size_t workspace_bytes, s2d_stream stream) {
  const Device device = this_device();
  if (const int status = check(layers, count, device, workspace, workspace_bytes)) return status;
  for (const int status : {
           launch_resident<float, 1>(layers, count, device, workspace, max_blocks, stream),
           launch_resident<float, 2>(layers, count, device, workspace, max_blocks, stream),
           launch_resident<uint16_t, 1>(layers, count, device, workspace, max_blocks, stream),
           launch_resident<uint16_t, 2>(layers, count, device, workspace, max_blocks, stream),
       }) {
    if (status) return status;
  }
  return S2D_OK;
}

int s2d_topk_svd_product(const s2d_svd_layer* layers, int32_t count, int32_t step, void* workspace,
                         size_t workspace_bytes, s2d_stream stream) {
  const Device device = this_device();
  if (const int status = check(layers, count, device, workspace, workspace_bytes)) return status;
  if (step < 0) return S2D_BAD_ARGUMENT;
  for (const bool by_cols : {false, true}) {
    for (const int status : {
             launch_product<float, 8, 8, 1>(layers, count, device, workspace, step, stream, {false, 8, 8, 1, by_cols}),
             launch_product<float, 8, 8, 2>(layers, count, device, workspace, step, stream, {false, 8, 8, 2, by_cols}),
             launch_product<float, 16, 8, 1>(layers, count, device, workspace, step, stream,
                                             {false, 16, 8, 1, by_cols}),
             launch_product<uint16_t, 8, 8, 1>(layers, count, device, workspace, step, stream,
                                               {true, 8, 8, 1, by_cols}),
             launch_product<uint16_t, 8, 8, 2>(layers, count, device, workspace, step, stream,
                                               {true, 8, 8, 2, by_cols}),
             launch_product<uint16_t, 16, 16, 1>(layers, count, device, workspace, step, stream,
                                                 {true, 16, 16, 1, by_cols}),
         }) {
      if (status) return status;
    }
  }
  const auto wanted = [&](const Layer& layer) { return streamed(layer) && step < layer.reads; };
  const auto blocks = [](const Layer& layer) {
    return divide_up<int64_t>(static_cast<int64_t>(layer.block) * pitch_d(layer), kThreads);
  };
  return for_tables(layers, count, device, workspace, wanted, blocks, [&](const Table& table) {
    return launch(sum_partials, {dim3(table.first[table.count]), dim3(kThreads)}, stream, table, step);
  });
}

int s2d_topk_svd_orthonormalize(const s2d_svd_layer* layers, int32_t count, int32_t step, void* workspace,
                                size_t workspace_bytes, s2d_stream stream) {
  const Device device = this_device();
  if (const int status = check(layers, count, device, workspace, workspace_bytes)) return status;
  if (step < 0) return S2D_BAD_ARGUMENT;
  const auto wanted = [&](const Layer& layer) { return streamed(layer) && step + 1 < layer.reads; };
  return for_tables(
      layers, count, device, workspace, wanted, [](const Layer&) { return int64_t{1}; },
      [&](const Table& table) {
        return launch(orthonormalize, {dim3(table.count), dim3(kThreads)}, stream, table, step);
      });
}

int s2d_topk_svd_finish(const s2d_svd_layer* layers, int32_t count, float tolerance, double failure_probability,
                        void* workspace, size_t workspace_bytes, s2d_stream stream) {
  const Device device = this_device();
  if (const int status = check(layers, count, device, workspace, workspace_bytes)) return status;
  const auto all = [](const Layer&) { return true; };
  int status = for_tables(
      layers, count, device, workspace, streamed, [](const Layer& layer) { return int64_t{gram_slabs(layer)}; },
      [&](const Table& table) {
        return launch(gram, {dim3(table.first[table.count]), dim3(kThreads)}, stream, table);
      });
  if (status) return status;
  status = for_tables(
      layers, count, device, workspace, all, [](const Layer&) { return int64_t{1}; },
      [&](const Table& table) {
        return launch(ritz, {dim3(table.count), dim3(kThreads)}, stream, table, tolerance, failure_probability);
      });
  if (status) return status;
  return for_tables(
      layers, count, device, workspace, all, [](const Layer& layer) { return divide_up<int64_t>(layer.D, kThreads); },
      [&](const Table& table) {
        return launch(rotate_left, {dim3(table.first[table.count]), dim3(kThreads)}, stream, table);
      });
}
