// Scalar twins of the tensor-core instructions that common.cuh wraps: the fragments of PTX's mma.m16n8k* with four
// 32-bit registers of A, two of B and four accumulators a lane.
#pragma once

#include "runtime.h"

namespace s2d::emulation {

template <typename Accumulator>
struct MmaOperands {
  Accumulator* d;
  const std::uint32_t *a, *b;
};

// Each format holds kPerRegister elements in a register; K is 8 registers' worth.
struct Tf32 {
  static constexpr int kPerRegister = 1;
  // The hardware ignores the 13 lowest bits.
  static double value(std::uint32_t word, int) { return __uint_as_float(word & 0xffffe000u); }
};
struct Bf16 {
  static constexpr int kPerRegister = 2;
  static double value(std::uint32_t word, int i) { return __uint_as_float(word >> 16 * i << 16); }
};
struct Int8 {
  static constexpr int kPerRegister = 4;
  static std::int64_t value(std::uint32_t word, int i) { return static_cast<std::int8_t>(word >> 8 * i); }
};
struct UInt4 {
  static constexpr int kPerRegister = 8;
  static std::int64_t value(std::uint32_t word, int i) { return word >> 4 * i & 15u; }
};
struct Int4 {
  static constexpr int kPerRegister = 8;
  static std::int64_t value(std::uint32_t word, int i) { return static_cast<std::int32_t>(word >> 4 * i << 28) >> 28; }
};

// Float sums are formed in fp64 and rounded once: the hardware's own order and truncation are not documented.
template <typename Format, typename FormatB = Format, typename Accumulator>
void mma(Accumulator* d, const std::uint32_t* a, const std::uint32_t* b, const Site& site) {
  MmaOperands<Accumulator> own{d, a, b};
  warp_collective(site, 0xffffffffu, &own, [](void* const* lanes, unsigned present) {
    if (present != 0xffffffffu) fail("mma needs all 32 threads of the warp, %08x are there", present);
    constexpr int e = Format::kPerRegister;
    using Sum = decltype(Format::value(0, 0));
    auto operands = [&](int lane) { return static_cast<const MmaOperands<Accumulator>*>(lanes[lane]); };
    Sum A[16][8 * e], B[8 * e][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, member = lane % 4;
      for (int r = 0; r < 4; ++r) {
        for (int i = 0; i < e; ++i) {
          A[group + 8 * (r % 2)][e * member + 4 * e * (r / 2) + i] = Format::value(operands(lane)->a[r], i);
          if (r < 2) B[e * member + 4 * e * r + i][group] = FormatB::value(operands(lane)->b[r], i);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + 8 * (r / 2), col = lane % 4 * 2 + r % 2;
        Accumulator& d = operands(lane)->d[r];
        Sum sum = d;
        for (int k = 0; k < 8 * e; ++k) sum += A[row][k] * B[k][col];
        if constexpr (sizeof(Sum) == sizeof(double) && Sum(0.5) != 0) {
          d = static_cast<Accumulator>(sum);
        } else {
          d = static_cast<Accumulator>(static_cast<std::uint32_t>(sum));  // wraps, as without .satfinite
        }
      }
    }
  });
}

struct LdmatrixOperands {
  const unsigned char* row;
  std::uint32_t* words;
};

// ldmatrix.x4: lanes 8 i .. 8 i + 7 name the rows, of 16 bytes, of matrix i; a lane gets word `lane % 4` of row `lane / 4`
// of each.
inline void ldmatrix_x4(std::uint32_t* words, const void* row, const Site& site) {
  check_aligned(row, 16, "ldmatrix");
  LdmatrixOperands own{static_cast<const unsigned char*>(row), words};
  warp_collective(site, 0xffffffffu, &own, [](void* const* lanes, unsigned present) {
    if (present != 0xffffffffu) fail("ldmatrix needs all 32 threads of the warp, %08x are there", present);
    auto operands = [&](int lane) { return static_cast<const LdmatrixOperands*>(lanes[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        std::memcpy(operands(lane)->words + i, operands(8 * i + lane / 4)->row + lane % 4 * 4, 4);
      }
    }
  });
}

}  // namespace s2d::emulation
