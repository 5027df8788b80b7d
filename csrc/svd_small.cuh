// The small dense part of topk_svd, by one block of threads: symmetric eigenproblem, orthonormal rows.
#pragma once

#include "svd_layer.cuh"

namespace s2d {
namespace {

// The eigenvectors of a symmetric positive semidefinite H [n, n] as rows of V, unsorted, its diagonal becoming the
// eigenvalues: parallel cyclic Jacobi by one block of threads, in whatever memory H and V lie. Rotations of a round
// touch disjoint pairs of rows; n is padded to an even number in thought.
__device__ void jacobi(double* H, double* V, int n) {
  constexpr int kMaxSweeps = 30;
  constexpr double kEpsilon = 1.1e-16;
  S2D_SHARED(double, cosine, [kMaxRows / 2]);
  S2D_SHARED(double, sine, [kMaxRows / 2]);
  const int m = n + n % 2, pairs = m / 2;
  double largest = 0.0;
  for (int i = threadIdx.x; i < n * n; i += kThreads) {
    V[i] = i / n == i % n ? 1.0 : 0.0;
    if (i / n == i % n) largest = max(largest, H[i]);
  }
  // The rounding of H itself: without this floor the noise of a rank-deficient H is rotated forever.
  const double negligible = n * kEpsilon * block_reduce<kThreads>(largest, Maximum());
  __syncthreads();
  // The round-robin tournament: player m - 1 stays, the others move one place on a round.
  const auto player = [&](int place, int round) { return place == 0 ? m - 1 : (place - 1 + round) % (m - 1); };
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    int any = 0;
    for (int round = 0; round < m - 1; ++round) {
      int rotates = 0;
      for (int pair = threadIdx.x; pair < pairs; pair += kThreads) {
        const int p = player(pair, round), q = player(m - 1 - pair, round);
        double c = 1.0, s = 0.0;
        if (p < n && q < n) {
          const double off = H[p * n + q], hp = H[p * n + p], hq = H[q * n + q];
          if (fabs(off) > kEpsilon * sqrt(fabs(hp) * fabs(hq)) && fabs(off) > negligible) {
            const double tau = (hq - hp) / (2.0 * off);
            const double t = (tau >= 0.0 ? 1.0 : -1.0) / (fabs(tau) + sqrt(1.0 + tau * tau));
            c = 1.0 / sqrt(1.0 + t * t);
            s = t * c;
            rotates = 1;
          }
        }
        cosine[pair] = c;
        sine[pair] = s;
      }
      if (__syncthreads_or(rotates) == 0) continue;
      any = 1;
      for (int i = threadIdx.x; i < pairs * n; i += kThreads) {
        const int pair = i / n, j = i % n, p = player(pair, round), q = player(m - 1 - pair, round);
        const double c = cosine[pair], s = sine[pair];
        if (s == 0.0 || p >= n || q >= n) continue;
        const double hp = H[p * n + j], hq = H[q * n + j], vp = V[p * n + j], vq = V[q * n + j];
        H[p * n + j] = c * hp - s * hq;
        H[q * n + j] = s * hp + c * hq;
        V[p * n + j] = c * vp - s * vq;
        V[q * n + j] = s * vp + c * vq;
      }
      __syncthreads();
      for (int i = threadIdx.x; i < pairs * n; i += kThreads) {
        const int pair = i % pairs, j = i / pairs, p = player(pair, round), q = player(m - 1 - pair, round);
        const double c = cosine[pair], s = sine[pair];
        if (s == 0.0 || p >= n || q >= n) continue;
        const double hp = H[j * n + p], hq = H[j * n + q];
        H[j * n + p] = c * hp - s * hq;
        H[j * n + q] = s * hp + c * hq;
      }
      __syncthreads();
    }
    if (any == 0) break;
  }
}

__device__ __forceinline__ float warp_sum(float value) { return warp_reduce(value, Sum()); }

// Rows of `block [b, d]` become orthonormal and orthogonal to the orthonormal rows `against [p, d]`; dependent ones are
// replaced by the Gaussian row `gaussian [d]`, rolled by p + 1, p + 2, ..., and become zero where those depend too.
// One block of threads; b <= kMaxBlock; `coefficient` is room for [round_up(b, 8), p]. As torch_svd._orthonormalize,
// whose docstring says why.
__device__ void orthonormalize_rows(float* block, int b, const float* against, int p, float* coefficient,
                                    const float* gaussian, int d, int pitch) {
  constexpr float kEpsilon = 1.1920929e-7f;
  constexpr int kWarps = kThreads / kWarpSize;
  constexpr int kAtOnce = 8;  // rows of the block for which a row of `against` is read once
  S2D_SHARED(float, before, [kMaxBlock]);
  S2D_SHARED(float, inverse, [kMaxBlock]);
  S2D_SHARED(double, H, [kMaxBlock * kMaxBlock]);
  S2D_SHARED(double, E, [kMaxBlock * kMaxBlock]);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto norm = [&](const float* row) {
    float sum = 0.0f;
    for (int i = lane; i < d; i += kWarpSize) sum = fmaf(row[i], row[i], sum);
    return sqrtf(warp_sum(sum));
  };
  for (int round = 0; round < 2; ++round) {
    for (int r = warp; r < b; r += kWarps) {
      const float length = norm(block + r * pitch);
      if (lane == 0) before[r] = length;
    }
    __syncthreads();
    for (int c = warp; c < p; c += kWarps) {
      for (int first = 0; first < b; first += kAtOnce) {
        float sum[kAtOnce] = {};
        for (int i = lane; i < d; i += kWarpSize) {
          const float other = against[c * pitch + i];
#pragma unroll
          for (int e = 0; e < kAtOnce; ++e) {
            if (first + e < b) sum[e] = fmaf(block[(first + e) * pitch + i], other, sum[e]);
          }
        }
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
          sum[e] = warp_sum(sum[e]);
          if (lane == 0) coefficient[(first + e) * p + c] = sum[e];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < d && p > 0; i += kThreads) {
      for (int first = 0; first < b; first += kAtOnce) {
        float sum[kAtOnce] = {};
        for (int c = 0; c < p; ++c) {
          const float other = against[c * pitch + i];
#pragma unroll
          for (int e = 0; e < kAtOnce; ++e) sum[e] = fmaf(coefficient[(first + e) * p + c], other, sum[e]);
        }
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
          if (first + e < b) block[(first + e) * pitch + i] -= sum[e];
        }
      }
    }
    __syncthreads();
    for (int r = warp; r < b; r += kWarps) {
      const float length = norm(block + r * pitch);
      if (lane == 0) inverse[r] = length > 8.0f * kEpsilon * before[r] ? 1.0f / length : 0.0f;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < b * d; i += kThreads) {
      float& value = block[i / d * pitch + i % d];
      value = inverse[i / d] == 0.0f ? 0.0f : value * inverse[i / d];
    }
    __syncthreads();
    for (int pair = warp; pair < b * b; pair += kWarps) {
      const int r = pair / b, c = pair % b;
      if (c > r) continue;
      double sum = 0.0;
      for (int i = lane; i < d; i += kWarpSize)
        sum += static_cast<double>(block[r * pitch + i]) * static_cast<double>(block[c * pitch + i]);
      sum = warp_reduce(sum, Sum());
      if (lane == 0) H[r * b + c] = H[c * b + r] = sum;
    }
    __syncthreads();
    jacobi(H, E, b);
    // inverse[r] = 1/sqrt(eigenvalue), 0 for a dependent direction
    for (int r = threadIdx.x; r < b; r += kThreads) {
      const double eigenvalue = H[r * b + r];
      inverse[r] = eigenvalue > 1e-10 * b ? static_cast<float>(1.0 / sqrt(eigenvalue)) : 0.0f;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < d; i += kThreads) {
      float in[kMaxBlock];
#pragma unroll
      for (int r = 0; r < kMaxBlock; ++r) in[r] = r < b ? block[r * pitch + i] : 0.0f;
      for (int r = 0; r < b; ++r) {
        float sum = 0.0f;
#pragma unroll
        for (int c = 0; c < kMaxBlock; ++c) {
          if (c < b) sum = fmaf(static_cast<float>(E[r * b + c]), in[c], sum);
        }
        const int shifted = (i - (p + r + 1) % d + d) % d;
        block[r * pitch + i] = round == 0 && inverse[r] == 0.0f ? gaussian[shifted] : sum * inverse[r];
      }
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace s2d
