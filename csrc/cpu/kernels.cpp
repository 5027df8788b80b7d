// CMakeLists.txt compiles this file once per instruction set, with S2D_CPU_NAME and the compiler's options for it.
// Everything but the table has internal linkage: the linker must not take one set's code for another's.
#include "kernels.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <float.h>
#include <math.h>
#include <string.h>

#include <type_traits>

#include "../s2d.h"

namespace s2d_cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats of a vector
constexpr int kWide = 8;    // rows of a block in registers at once
#elif defined(__AVX__)
constexpr int kWidth = 8;
constexpr int kWide = 4;
#else
constexpr int kWidth = 4;
constexpr int kWide = 4;
#endif
// Rows (dot) or vectors (accumulate) of A in registers: kTile x kWide sums, kTile operands, one of the other side.
constexpr int kTile = 3;

typedef float vec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef double dvec __attribute__((vector_size(4 * kWidth), aligned(8), may_alias));
typedef float half_vec __attribute__((vector_size(2 * kWidth), aligned(4), may_alias));  // as many floats as dvec doubles
constexpr int kDoubles = kWidth / 2;

// No templates: an attribute of alignment would be lost on a template's argument.
inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline dvec load_wide(const float* p) { return __builtin_convertvector(*reinterpret_cast<const half_vec*>(p), dvec); }
inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
inline void store(double* p, dvec v) { *reinterpret_cast<dvec*>(p) = v; }
inline void store_quad(float* p, quad v) { *reinterpret_cast<quad*>(p) = v; }

// The vector's halves added until four numbers are left.
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define S2D_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
inline quad narrow(vec v) {
#if defined(__AVX512F__)
  typedef float oct __attribute__((vector_size(32)));
  const oct h = S2D_SHUFFLE(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + S2D_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  return S2D_SHUFFLE(h, h, 0, 1, 2, 3) + S2D_SHUFFLE(h, h, 4, 5, 6, 7);
#elif defined(__AVX__)
  return S2D_SHUFFLE(v, v, 0, 1, 2, 3) + S2D_SHUFFLE(v, v, 4, 5, 6, 7);
#else
  return v;
#endif
}
#else  // GCC 11
typedef int32_t places __attribute__((vector_size(16)));
#define S2D_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, places{__VA_ARGS__})
inline quad narrow(vec v) {
#if defined(__AVX512F__)
  const __m512 all = reinterpret_cast<__m512>(v);
  const __m256 h = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
  return reinterpret_cast<quad>(_mm256_castps256_ps128(h) + _mm256_extractf128_ps(h, 1));
#elif defined(__AVX__)
  const __m256 h = reinterpret_cast<__m256>(v);
  return reinterpret_cast<quad>(_mm256_castps256_ps128(h) + _mm256_extractf128_ps(h, 1));
#else
  return v;
#endif
}
#endif

// The sums of four vectors, as one.
inline quad sums(const vec* v) {
  const quad a = narrow(v[0]), b = narrow(v[1]), c = narrow(v[2]), d = narrow(v[3]);
  const quad ab = S2D_SHUFFLE(a, b, 0, 4, 2, 6) + S2D_SHUFFLE(a, b, 1, 5, 3, 7);
  const quad cd = S2D_SHUFFLE(c, d, 0, 4, 2, 6) + S2D_SHUFFLE(c, d, 1, 5, 3, 7);
  return S2D_SHUFFLE(ab, cd, 0, 1, 4, 5) + S2D_SHUFFLE(ab, cd, 2, 3, 6, 7);
}

// R rows of A against G rows of Q.
template <int R, int G>
inline void dot_tile(const float* A, int64_t lda, int64_t cols, const float* Q, int64_t ldq, float* packed,
                     int64_t width) {
  vec total[R][G] = {};
  for (int64_t j = 0; j < cols; j += kWidth) {
    vec a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      a[r] = load(A + r * lda + j);
      __builtin_prefetch(A + (R + r) * lda + j);  // the rows of the next tile
    }
#pragma GCC unroll 8
    for (int c = 0; c < G; ++c) {
      const vec q = load(Q + c * ldq + j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[r][c] += a[r] * q;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < G; c += 4) store_quad(packed + r * width + c, sums(&total[r][c]));
}

template <int G>
void dot_group(const float* A, int64_t lda, int64_t rows, int64_t cols, const float* Q, int64_t ldq, int64_t width,
               float* packed) {
  int64_t r = 0;
  for (; r + kTile <= rows; r += kTile) dot_tile<kTile, G>(A + r * lda, lda, cols, Q, ldq, packed + r * width, width);
  for (; r < rows; ++r) dot_tile<1, G>(A + r * lda, lda, cols, Q, ldq, packed + r * width, width);
}

void dot(const float* A, int64_t lda, int64_t rows, int64_t cols, const float* Q, int64_t ldq, int64_t width,
         float* packed) {
  int64_t c = 0;
  for (; c + kWide <= width; c += kWide) dot_group<kWide>(A, lda, rows, cols, Q + c * ldq, ldq, width, packed + c);
  for (; c < width; c += 4) dot_group<4>(A, lda, rows, cols, Q + c * ldq, ldq, width, packed + c);
}

// T vectors of columns of A, weighted by G columns of `packed`.
template <int T, int G>
inline void accumulate_tile(const float* A, int64_t lda, int64_t rows, const float* packed, int64_t width, float* Z,
                            int64_t ldz) {
  vec total[T][G] = {};
  for (int64_t r = 0; r < rows; ++r) {
    vec a[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) a[t] = load(A + r * lda + t * kWidth);
#pragma GCC unroll 8
    for (int c = 0; c < G; ++c)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) total[t][c] += a[t] * packed[r * width + c];
  }
#pragma GCC unroll 8
  for (int c = 0; c < G; ++c)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      float* z = Z + c * ldz + t * kWidth;
      store(z, load(z) + total[t][c]);
    }
}

template <int G>
void accumulate_group(const float* A, int64_t lda, int64_t rows, int64_t cols, const float* packed, int64_t width,
                      float* Z, int64_t ldz) {
  int64_t j = 0;
  for (; j + kTile * kWidth <= cols; j += kTile * kWidth)
    accumulate_tile<kTile, G>(A + j, lda, rows, packed, width, Z + j, ldz);
  for (; j < cols; j += kWidth) accumulate_tile<1, G>(A + j, lda, rows, packed, width, Z + j, ldz);
}

void accumulate(const float* A, int64_t lda, int64_t rows, int64_t cols, const float* packed, int64_t width, float* Z,
                int64_t ldz) {
  int64_t c = 0;
  for (; c + kWide <= width; c += kWide)
    accumulate_group<kWide>(A, lda, rows, cols, packed + c, width, Z + c * ldz, ldz);
  for (; c < width; c += 4) accumulate_group<4>(A, lda, rows, cols, packed + c, width, Z + c * ldz, ldz);
}

inline double sum(dvec v) {
  double total = 0;
  for (int i = 0; i < kDoubles; ++i) total += v[i];
  return total;
}

// Rows i.. and j.. of X, M and N of them.
template <int M, int N>
inline void gram_tile(const float* X, int64_t ldx, int64_t i, int64_t j, int64_t count, int64_t cols, double* H) {
  dvec total[M][N] = {};
  for (int64_t t = 0; t < cols; t += kDoubles) {
    dvec x[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) x[m] = load_wide(X + (i + m) * ldx + t);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const dvec y = load_wide(X + (j + n) * ldx + t);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[m][n] += x[m] * y;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) H[(i + m) * count + j + n] = H[(j + n) * count + i + m] = sum(total[m][n]);
}

void gram(const float* X, int64_t ldx, int64_t count, int64_t cols, double* H) {
  constexpr int kSide = kWidth == 16 ? 4 : 2;
  const int64_t whole = count / kSide * kSide;
  for (int64_t i = 0; i < whole; i += kSide)
    for (int64_t j = i; j < whole; j += kSide) gram_tile<kSide, kSide>(X, ldx, i, j, count, cols, H);
  for (int64_t i = whole; i < count; ++i)
    for (int64_t j = 0; j <= i; ++j) gram_tile<1, 1>(X, ldx, i, j, count, cols, H);
}

#include "eigen.h"

bool eigen(double* H, int64_t n, double* values, double* rows, double* work) {
  tridiagonalize(H, n, values, work, rows, work + n);
  return diagonalize(values, work, n, rows);
}

// G rows of R.
template <int G>
inline void combine_group(const double* R, int64_t ldr, const float* X, int64_t ldx, int64_t count, int64_t cols,
                          double* out, int64_t ldo) {
  for (int64_t t = 0; t < cols; t += kDoubles) {
    dvec total[G] = {};
    for (int64_t i = 0; i < count; ++i) {
      const dvec x = load_wide(X + i * ldx + t);
#pragma GCC unroll 8
      for (int c = 0; c < G; ++c) total[c] += R[c * ldr + i] * x;
    }
#pragma GCC unroll 8
    for (int c = 0; c < G; ++c) store(out + c * ldo + t, total[c]);
  }
}

void combine(const double* R, int64_t ldr, int64_t width, const float* X, int64_t ldx, int64_t count, int64_t cols,
             double* out, int64_t ldo) {
  int64_t c = 0;
  for (; c + 8 <= width; c += 8) combine_group<8>(R + c * ldr, ldr, X, ldx, count, cols, out + c * ldo, ldo);
  for (; c + 4 <= width; c += 4) combine_group<4>(R + c * ldr, ldr, X, ldx, count, cols, out + c * ldo, ldo);
  for (; c < width; ++c) combine_group<1>(R + c * ldr, ldr, X, ldx, count, cols, out + c * ldo, ldo);
}

float inner(const float* x, const float* y, int64_t count) {
  vec total[4] = {};
  int64_t t = 0;
  for (; t + 4 * kWidth <= count; t += 4 * kWidth)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total[i] += load(x + t + i * kWidth) * load(y + t + i * kWidth);
  for (; t < count; t += kWidth) total[0] += load(x + t) * load(y + t);
  const quad s = narrow((total[0] + total[1]) + (total[2] + total[3]));
  return (s[0] + s[1]) + (s[2] + s[3]);
}

void add(float factor, const float* x, int64_t count, float* y) {
  for (int64_t t = 0; t < count; t += kWidth) store(y + t, load(y + t) + factor * load(x + t));
}

#include "numbers.h"

#include "rows.h"

// Without the sign, the bits of floating numbers are ordered as integers, NaN above infinity.
template <typename T>
inline uint32_t largest_bits(const T* x, T mask, int64_t count, int64_t stride) {
  T most = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) {
      const T bits = x[i] & mask;
      most = bits > most ? bits : most;
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const T bits = x[i * stride] & mask;
      most = bits > most ? bits : most;
    }
  }
  return most;
}

uint32_t largest(const void* x, int32_t dtype, int64_t count, int64_t stride) {
  if (dtype == S2D_FLOAT32)
    return largest_bits<uint32_t>(static_cast<const uint32_t*>(x), 0x7fffffffu, count, stride);
  const uint32_t bits = largest_bits<uint16_t>(static_cast<const uint16_t*>(x), 0x7fffu, count, stride);
  if (dtype == S2D_BFLOAT16) return bits << 16;
  const float value = from_half(static_cast<uint16_t>(bits));
  uint32_t wide;
  memcpy(&wide, &value, sizeof wide);
  return wide;
}

}  // namespace

#define S2D_CPU_TABLE_(name) kernels_##name
#define S2D_CPU_TABLE(name) S2D_CPU_TABLE_(name)
#define S2D_CPU_TEXT_(name) #name
#define S2D_CPU_TEXT(name) S2D_CPU_TEXT_(name)
extern const Kernels S2D_CPU_TABLE(S2D_CPU_NAME) = {
    S2D_CPU_TEXT(S2D_CPU_NAME), largest, widen, dot, accumulate, gram, eigen, combine, add_low_rank, adamw_rows, inner, add};

}  // namespace s2d_cpu
