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

// To which words of an operand kOffset is added, byte by byte. Of pairs of words the second one has it.
enum class Offset { kNone, kAllWords, kSecondWords };

// What turns the sums of a tile into numbers: modulo 2^32 they become
// sum - x_excess - w_excess - x_sum z_w - z_x (w_sum - size z_w) and then (sum s_x) s_w. x's have one number a row, w's
// one a column.
struct Scaling {
  const uint32_t *x_excess, *x_sum, *x_zero_point;
  const uint32_t *w_excess, *w_zero_point, *w_rest;  // the last: w_sum - size z_w
  const float *x_scale, *w_scale;
};

struct IntegerKernels {
  const char* name;
  int64_t rows, columns;  // of a tile
  bool pairs;             // whether tiles of pairs of words are faster than of words

  // Of `size` numbers along the depth.
  int64_t (*word_count)(int64_t size);

  // Widens low..high by codes.
  void (*extremes)(const int8_t* codes, int64_t count, int32_t* low, int32_t* high);

  // Widens low..high by x; see `Range`.
  void (*range)(const float* x, int64_t count, int32_t* low, int32_t* high);

  // Codes, whether each was not clamped (0 or 1), and the sum of the codes.
  int32_t (*codes)(const float* x, int64_t count, const Rounding& rounding, int8_t* codes, uint8_t* inside);

  // Eight of `inside` to a byte, the first in the lowest bit.
  void (*pack_bits)(const uint8_t* inside, int64_t count, uint8_t* bits);

  // Codes of at most 4 bits two to a byte, the first in the low half.
  void (*pack_nibbles)(const int8_t* codes, int64_t count, uint8_t* packed);

  void (*widen)(const void* x, int32_t dtype, int64_t count, int64_t stride, float* out);

  // Words [steps, width] of `count` <= width rows of `size` codes, which are zero beyond them.
  void (*pack)(const int8_t* codes, int64_t stride, int64_t count, int64_t size, int64_t width, Offset offset,
               uint32_t* words);

  // The same of columns of codes [size, .] less the zero point of their row: `count` of them from column `first` on.
  // With `nibbles` two codes of 4 bits are in a byte, sign-extended where `is_signed`.
  void (*pack_columns)(const uint8_t* codes, int64_t stride, int64_t first, int64_t count, int64_t size,
                       const int32_t* zero_point, int64_t zero_point_stride, bool nibbles, bool is_signed,
                       Offset offset, uint32_t* words);

  // sums[r, c] over the steps of words `x` [steps, rows] and `w` [steps, columns], w with the offset of all words or,
  // by pairs, of second ones; `count` rows and `width` columns of it. They are the products' sums and what
  // `row_excess` and `column_excess` find in x and in w. By pairs, a byte of x and one of w add up to -128..127.
  void (*tile)(const uint32_t* x, const uint32_t* w, int64_t steps, int64_t count, int64_t width, bool by_pairs,
               int32_t* sums);
  void (*row_excess)(const uint32_t* x, int64_t steps, bool by_pairs, uint32_t* excess);
  void (*column_excess)(const uint32_t* w, int64_t steps, bool by_pairs, uint32_t* excess);

  // The number of each sum, written to `total` or (`add`) added there; or, where that is null, the int32 accumulator in
  // place.
  void (*scale)(int32_t* sums, int64_t count, int64_t width, const Scaling& scaling, bool add, float* total);

  // total + bias (null: none), cast to an s2d_dtype.
  void (*store)(const float* total, int64_t count, int64_t width, const float* bias, void* y, int32_t dtype,
                int64_t stride);

  // x * scale, also in place, and the unit of its digits up to `most`. False if it is not finite.
  bool (*weigh)(const float* x, int64_t count, const float* scale, int64_t scale_stride, int32_t most, float* out,
                float* unit);

  // x / unit as digits of base 2 most, the first one the integer nearest to it, [places, stride].
  void (*digits)(float* x, int64_t count, float unit, int32_t most, int64_t places, int8_t* digits, int64_t stride);

  // The same of `count` <= kMostLines rows whose columns are contiguous, `stride` apart, packed at once: words
  // [panels, places, steps, rows of a panel]. False if they are not finite.
  bool (*pack_digits)(const void* x, int32_t dtype, int64_t stride, int64_t count, int64_t depth, const float* scale,
                      int64_t scale_stride, int32_t most, int64_t places, uint32_t* words, float* units);

  // Rows of sums of each digit, `sums` [places, rows, columns], less their excess [places, rows] and [columns], put
  // together: times the row's unit, zero where a bit of `mask` is not set, cast to an s2d_dtype.
  void (*join)(const int32_t* sums, int32_t most, int64_t places, int64_t count, int64_t width,
               const uint32_t* row_excess, const uint32_t* column_excess, const float* units, const uint8_t* mask,
               int64_t mask_stride, void* out, int32_t dtype, int64_t stride);
};

// Of every instruction set.
constexpr int64_t kMostRows = 8, kMostColumns = 48, kMostPlaces = 5, kMostLines = 96;

#ifdef S2D_CPU_X86
extern const IntegerKernels integer_avx512_vnni_pairs, integer_avx512_vnni, integer_avx512, integer_avx2;
#endif
extern const IntegerKernels integer_baseline;

// The best of them that this machine runs.
const IntegerKernels& integer_kernels();

}  // namespace s2d_cpu

#endif  // S2D_CPU_INTEGER_KERNELS_H_
