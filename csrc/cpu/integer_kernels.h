// The inner loops of the quantized linear layer, compiled once per instruction set (integer_kernels.cpp).
#ifndef S2D_CPU_INTEGER_KERNELS_H_
#define S2D_CPU_INTEGER_KERNELS_H_

#include <fenv.h>
#include <stdint.h>

namespace s2d_cpu {

// Subnormal numbers are kept and roundings are to nearest while it lives, whatever the thread was set to.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { fesetenv(&saved_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  fenv_t saved_;
};

// The least and the greatest of some numbers, as integers in the same order: a NaN is beyond infinity.
struct Range {
  int32_t low = INT32_MAX, high = INT32_MIN;
};

// How codes are made from numbers that share a scale: clamp(round(x / scale) + zero_point, lowest, highest) - shift.
struct Rounding {
  float scale;  // NaN: all codes are 0 and clamped
  int32_t zero_point, lowest, highest, shift;
};

// What turns the sums of a tile into numbers. Sums of products of x and w + kOffset, modulo 2^32, become
// sum - x_sum (kOffset + z_w) - z_x (w_sum - size z_w) and then (sum s_x) s_w. x's have one number a row, w's one a
// column.
struct Scaling {
  const uint32_t *x_sum, *x_zero_point;
  const uint32_t *w_offset, *w_rest;  // kOffset + z_w, w_sum - size z_w
  const float *x_scale, *w_scale;
};

struct IntegerKernels {
  const char* name;
  // A tile's rows and columns, and how many numbers along the depth one 32-bit word holds.
  int64_t rows, columns, step;
  uint32_t offset;  // of packed columns

  // Widens low..high by x; see `Range`.
  void (*range)(const float* x, int64_t count, int32_t* low, int32_t* high);

  // Codes, whether each was not clamped (0 or 1), and the sum of the codes.
  int32_t (*codes)(const float* x, int64_t count, const Rounding& rounding, int8_t* codes, uint8_t* inside);

  // Eight of `inside` to a byte, the first in the lowest bit.
  void (*pack_bits)(const uint8_t* inside, int64_t count, uint8_t* bits);

  // Codes of at most 4 bits two to a byte, the first in the low half.
  void (*pack_nibbles)(const int8_t* codes, int64_t count, uint8_t* packed);

  void (*widen)(const void* x, int32_t dtype, int64_t count, int64_t stride, float* out);

  // Words [steps, width] of `count` <= width rows of `size` codes, zero beyond them; `offset` is added to each code.
  void (*pack)(const int8_t* codes, int64_t stride, int64_t count, int64_t size, int64_t width, bool with_offset,
               uint32_t* words);

  // The same of columns of codes [size, .] less the zero point of their row, with the offset: `count` of them from
  // column `first` on. With `nibbles` two codes of 4 bits are in a byte, sign-extended where `is_signed`.
  void (*pack_columns)(const uint8_t* codes, int64_t stride, int64_t first, int64_t count, int64_t size,
                       const int32_t* zero_point, int64_t zero_point_stride, bool nibbles, bool is_signed,
                       uint32_t* words);

  // sums[r, c] over the steps of words `x` [steps, rows] and `w` [steps, columns]; `count` rows, `width` columns of it.
  void (*tile)(const uint32_t* x, const uint32_t* w, int64_t steps, int64_t count, int64_t width, int32_t* sums);

  // The number of each sum, written to `total` or (`add`) added there; or, where that is null, the int32 accumulator in
  // place.
  void (*scale)(int32_t* sums, int64_t count, int64_t width, const Scaling& scaling, bool add, float* total);

  // total + bias (null: none), cast to an s2d_dtype.
  void (*store)(const float* total, int64_t count, int64_t width, const float* bias, void* y, int32_t dtype,
                int64_t stride);

  // x * scale, also in place, and the unit of its digits. False if it is not finite.
  bool (*weigh)(const float* x, int64_t count, const float* scale, int64_t scale_stride, float* out, float* unit);

  // x / unit as digits of base 254, the first one the integer nearest to it, [places, stride]; their sums.
  void (*digits)(float* x, int64_t count, float unit, int64_t places, int8_t* digits, int64_t stride, int32_t* sums);

  // The same of `count` <= kMostLines rows whose columns are contiguous, `stride` apart, packed at once: words
  // [panels, places, steps, rows of a panel], sums of digits [places, sums_stride]. False if they are not finite.
  bool (*pack_digits)(const void* x, int32_t dtype, int64_t stride, int64_t count, int64_t depth, const float* scale,
                      int64_t scale_stride, int64_t places, uint32_t* words, float* units, uint32_t* sums,
                      int64_t sums_stride);

  // Rows of sums of each digit, `sums` [places, rows, columns], put together: times the row's unit, zero where a bit of
  // `mask` is not set, cast to an s2d_dtype.
  void (*join)(const int32_t* sums, int64_t places, int64_t count, int64_t width, const uint32_t* digit_sums,
               int64_t digit_sums_stride, const float* units, const uint8_t* mask, int64_t mask_stride, void* out,
               int32_t dtype, int64_t stride);
};

// Of every instruction set.
constexpr int64_t kMostRows = 8, kMostColumns = 48, kMostPlaces = 5, kMostLines = 96;

#ifdef S2D_CPU_X86
extern const IntegerKernels integer_avx512_vnni, integer_avx512, integer_avx2;
#endif
extern const IntegerKernels integer_baseline;

// The best of them that this machine runs.
const IntegerKernels& integer_kernels();

}  // namespace s2d_cpu

#endif  // S2D_CPU_INTEGER_KERNELS_H_
