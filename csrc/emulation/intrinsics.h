// CUDA's keywords and built-in functions, as far as csrc uses them, over runtime.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// The line of the caller, through default arguments.
#define S2D_SITE_PARAMETERS const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(S2D_SITE_PARAMETERS) {
  s2d::emulation::block_barrier({"__syncthreads", file, line}, s2d::emulation::Vote::kCount, false);
}
inline int __syncthreads_count(int predicate, S2D_SITE_PARAMETERS) {
  return s2d::emulation::block_barrier({"__syncthreads_count", file, line}, s2d::emulation::Vote::kCount, predicate);
}
inline int __syncthreads_or(int predicate, S2D_SITE_PARAMETERS) {
  return s2d::emulation::block_barrier({"__syncthreads_or", file, line}, s2d::emulation::Vote::kAny, predicate);
}
inline int __syncthreads_and(int predicate, S2D_SITE_PARAMETERS) {
  return s2d::emulation::block_barrier({"__syncthreads_and", file, line}, s2d::emulation::Vote::kAll, predicate);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, S2D_SITE_PARAMETERS) {
  s2d::emulation::warp_collective({"__syncwarp", file, line}, mask, nullptr, [](void* const*, unsigned) {});
}

namespace s2d::emulation {

template <typename T>
struct Shuffle {
  T value, result;
  unsigned source;
};

template <typename T>
T shuffle(const Site& site, unsigned mask, T value, unsigned source) {
  Shuffle<T> own{value, value, source};
  warp_collective(site, mask, &own, [](void* const* operands, unsigned present) {
    for (unsigned i = 0; i < 32; ++i) {
      if ((present >> i & 1u) == 0) continue;
      auto& to = *static_cast<Shuffle<T>*>(operands[i]);
      if (present >> to.source & 1u) {
        to.result = static_cast<Shuffle<T>*>(operands[to.source])->value;
      } else {
        std::memset(&to.result, 0xff, sizeof to.result);  // undefined in CUDA
      }
    }
  });
  return own.result;
}

struct Ballot {
  bool predicate;
  unsigned result;
};

inline unsigned ballot(const Site& site, unsigned mask, bool predicate) {
  Ballot own{predicate, 0};
  warp_collective(site, mask, &own, [](void* const* operands, unsigned present) {
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; ++i) {
      if (present >> i & 1u) bits |= unsigned{static_cast<Ballot*>(operands[i])->predicate} << i;
    }
    for (unsigned i = 0; i < 32; ++i) {
      if (present >> i & 1u) static_cast<Ballot*>(operands[i])->result = bits;
    }
  });
  return own.result;
}

}  // namespace s2d::emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, S2D_SITE_PARAMETERS) {
  const unsigned lane = s2d::emulation::lane(), segment = lane / width * width;
  return s2d::emulation::shuffle<T>({"__shfl_sync", file, line}, mask, value, segment + (unsigned(source) % width));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, S2D_SITE_PARAMETERS) {
  const unsigned lane = s2d::emulation::lane(), source = lane ^ unsigned(lane_mask);
  const bool inside = source < lane / width * width + width;
  return s2d::emulation::shuffle<T>({"__shfl_xor_sync", file, line}, mask, value, inside ? source : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, S2D_SITE_PARAMETERS) {
  const unsigned lane = s2d::emulation::lane();
  return s2d::emulation::shuffle<T>({"__shfl_up_sync", file, line}, mask, value,
                                    lane % width >= delta ? lane - delta : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, S2D_SITE_PARAMETERS) {
  const unsigned lane = s2d::emulation::lane();
  const bool inside = lane % width + delta < unsigned(width);
  return s2d::emulation::shuffle<T>({"__shfl_down_sync", file, line}, mask, value, inside ? lane + delta : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, S2D_SITE_PARAMETERS) {
  return s2d::emulation::ballot({"__ballot_sync", file, line}, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, S2D_SITE_PARAMETERS) {
  return s2d::emulation::ballot({"__any_sync", file, line}, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, S2D_SITE_PARAMETERS) {
  return s2d::emulation::ballot({"__all_sync", file, line}, mask, predicate == 0) == 0;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { s2d::emulation::yield(); }

// Only one thread runs at a time, so an atomic is a plain read and write.
template <typename T, typename U, typename F>
T s2d_atomic(T* address, U operand, F combine) {
  s2d::emulation::check_aligned(address, sizeof(T), "atomic");
  const T old = *address;
  *address = combine(old, static_cast<T>(operand));
  return old;
}
template <typename T, typename U>
T atomicAdd(T* address, U value) {
  return s2d_atomic(address, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <typename T, typename U>
T atomicMax(T* address, U value) {
  return s2d_atomic(address, value, [](T a, T b) { return a < b ? b : a; });
}
template <typename T, typename U>
T atomicMin(T* address, U value) {
  return s2d_atomic(address, value, [](T a, T b) { return b < a ? b : a; });
}
template <typename T, typename U>
T atomicExch(T* address, U value) {
  return s2d_atomic(address, value, [](T, T b) { return b; });
}
template <typename T, typename U>
T atomicOr(T* address, U value) {
  return s2d_atomic(address, value, [](T a, T b) { return a | b; });
}
template <typename T, typename U>
T atomicAnd(T* address, U value) {
  return s2d_atomic(address, value, [](T a, T b) { return a & b; });
}
template <typename T, typename U, typename V>
T atomicCAS(T* address, U expected, V value) {
  return s2d_atomic(address, value, [&](T a, T b) { return a == static_cast<T>(expected) ? b : a; });
}

template <typename T>
T __ldg(const T* pointer) {
  s2d::emulation::check_aligned(pointer, alignof(T), "load");
  return *pointer;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __float2int_rn(float value) { return int(std::nearbyint(value)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float value) { return std::sqrt(value); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
using std::max;
using std::min;
