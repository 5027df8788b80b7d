// CMakeLists.txt compiles this file once per instruction set, as it does kernels.cpp, but without fused multiply-adds:
// each operation is rounded once, as the definitions have it.
#include "integer_kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <math.h>
#include <string.h>

#include "../s2d.h"

namespace s2d_cpu {
namespace {

#include "numbers.h"

// A word is one 32-bit lane: four bytes where the machine multiplies bytes by fours, x signed and w + 128 unsigned,
// else two 16-bit numbers. Neither saturates.
#if defined(__AVX512VNNI__)
constexpr int kStep = 4, kUnit = 2;
constexpr uint32_t kOffset = 128;
#else
constexpr int kStep = 2, kUnit = 1;
constexpr uint32_t kOffset = 0;
#endif

int64_t word_count(int64_t size) { return (size + kStep * kUnit - 1) / (kStep * kUnit) * kUnit; }

inline bool is_offset(Offset offset, int64_t word) {
  return kOffset && (offset == Offset::kAllWords || (offset == Offset::kSecondWords && word % 2));
}

#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3;
typedef __m512i ivec;
inline ivec load(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline ivec broadcast(uint32_t word) { return _mm512_set1_epi32(static_cast<int32_t>(word)); }
inline void store(int32_t* p, ivec v) { _mm512_storeu_si512(p, v); }
#if defined(__AVX512VNNI__)
inline ivec add_product(ivec sum, ivec w, ivec x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline ivec add_bytes(ivec a, ivec b) { return _mm512_add_epi8(a, b); }
#else
inline ivec add_product(ivec sum, ivec w, ivec x) { return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x)); }
#endif
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;
typedef __m256i ivec;
inline ivec load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline ivec broadcast(uint32_t word) { return _mm256_set1_epi32(static_cast<int32_t>(word)); }
inline void store(int32_t* p, ivec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline ivec add_product(ivec sum, ivec w, ivec x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
#else
constexpr int kRows = 4, kVectors = 2;
typedef uint32_t ivec __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t signed_ivec __attribute__((vector_size(16)));
inline ivec load(const uint32_t* p) { return *reinterpret_cast<const ivec*>(p); }
inline ivec broadcast(uint32_t word) { return ivec{word, word, word, word}; }
inline void store(int32_t* p, ivec v) { *reinterpret_cast<ivec*>(p) = v; }
inline ivec first(ivec v) { return reinterpret_cast<ivec>(reinterpret_cast<signed_ivec>(v << 16) >> 16); }
inline ivec second(ivec v) { return reinterpret_cast<ivec>(reinterpret_cast<signed_ivec>(v) >> 16); }
inline ivec add_product(ivec sum, ivec w, ivec x) { return sum + first(w) * first(x) + second(w) * second(x); }
#endif
constexpr int kLanes = sizeof(ivec) / 4;
constexpr int kColumns = kVectors * kLanes;

typedef float vec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t svec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline uvec load_unsigned(const void* p) { return *static_cast<const uvec*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
inline vec to_numbers(uvec v) { return __builtin_convertvector(reinterpret_cast<svec>(v), vec); }

void range(const float* x, int64_t count, int32_t* low, int32_t* high) {
  int32_t least = *low, greatest = *high;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = static_cast<int32_t>(as_bits(x[i])), ordered = bits ^ ((bits >> 31) & 0x7fffffff);
    least = ordered < least ? ordered : least;
    greatest = ordered > greatest ? ordered : greatest;
  }
  *low = least;
  *high = greatest;
}

void extremes(const int8_t* codes, int64_t count, int32_t* low, int32_t* high) {
  int8_t least = 127, greatest = -128;
  for (int64_t i = 0; i < count; ++i) {
    least = codes[i] < least ? codes[i] : least;
    greatest = codes[i] > greatest ? codes[i] : greatest;
  }
  *low = least < *low ? least : *low;
  *high = greatest > *high ? greatest : *high;
}

// The nearest integer, ties to even, of |x| <= 2^22.
inline int32_t nearest(float x) { return static_cast<int32_t>(as_bits(x + 0x1.8p23f) - 0x4b400000u); }

int32_t codes_of(const float* __restrict x, int64_t count, const Rounding& rounding, int8_t* __restrict codes,
                 uint8_t* __restrict inside) {
  const int32_t lowest = rounding.lowest, highest = rounding.highest;
  const int32_t zero = rounding.zero_point, shift = rounding.shift;
  const float scale = rounding.scale;
  if (!(scale > 0)) {
    memset(codes, -shift, static_cast<size_t>(count));
    memset(inside, 0, static_cast<size_t>(count));
    return static_cast<int32_t>(static_cast<uint32_t>(count) * static_cast<uint32_t>(-shift));
  }
  uint32_t sum = 0;  // modulo 2^32, as everybody's
  for (int64_t i = 0; i < count; ++i) {
    float ratio = x[i] / scale;
    ratio = ratio > -512.f ? ratio : -512.f;  // clamped codes stay clamped
    ratio = ratio < 512.f ? ratio : 512.f;
    const int32_t raw = nearest(ratio) + zero;
    const int32_t above = raw > lowest ? raw : lowest;
    const int32_t code = above < highest ? above : highest;
    codes[i] = static_cast<int8_t>(code - shift);
    inside[i] = code == raw;
    sum += static_cast<uint32_t>(code - shift);
  }
  return static_cast<int32_t>(sum);
}

void pack_bits(const uint8_t* inside, int64_t count, uint8_t* bits) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  for (; i + 64 <= count; i += 64) {
    const __m512i bytes = _mm512_loadu_si512(inside + i);
    const uint64_t word = _mm512_test_epi8_mask(bytes, bytes);
    memcpy(bits + i / 8, &word, sizeof word);
  }
#elif defined(__AVX2__)
  for (; i + 32 <= count; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(inside + i));
    const uint32_t word = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(bytes, 7)));
    memcpy(bits + i / 8, &word, sizeof word);
  }
#endif
  for (; i < count; i += 8) {
    unsigned byte = 0;
    for (int64_t j = 0; j < 8 && i + j < count; ++j) byte |= static_cast<unsigned>(inside[i + j]) << j;
    bits[i / 8] = static_cast<uint8_t>(byte);
  }
}

void pack_nibbles(const int8_t* __restrict codes, int64_t count, uint8_t* __restrict packed) {
  for (int64_t i = 0; i < count / 2; ++i) {
    uint16_t pair;  // little-endian: the first is the low byte
    memcpy(&pair, codes + 2 * i, sizeof pair);
    packed[i] = static_cast<uint8_t>((pair & 15) | (pair >> 4 & 240));
  }
  if (count % 2) packed[count / 2] = codes[count - 1] & 15;
}

inline uint32_t word_of(const int8_t* codes) {
#if defined(__AVX512VNNI__)
  uint32_t word;
  memcpy(&word, codes, sizeof word);
  return word;
#else
  return static_cast<uint16_t>(codes[0]) | static_cast<uint32_t>(static_cast<uint16_t>(codes[1])) << 16;
#endif
}

#if defined(__AVX2__)
constexpr int64_t kBlock = 8;  // words of as many rows are transposed at once

inline __m256i words_of(const int8_t* codes) {
#if defined(__AVX512VNNI__)
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
#else
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
#endif
}

// words[s * width + r] = word s of row r, first and second words flipped, of kBlock words of kBlock rows.
inline void transpose_block(const int8_t* codes, int64_t stride, int64_t width, const uint32_t (&flip)[2],
                            uint32_t* words) {
  const __m256i flips = _mm256_set1_epi64x(static_cast<int64_t>(static_cast<uint64_t>(flip[1]) << 32 | flip[0]));
  __m256i of[kBlock], pairs[kBlock], fours[kBlock];
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) of[r] = _mm256_xor_si256(words_of(codes + r * stride), flips);
#pragma GCC unroll 4
  for (int r = 0; r < kBlock; r += 2) {
    pairs[r] = _mm256_unpacklo_epi32(of[r], of[r + 1]);      // words 0, 1 and 4, 5 of two rows
    pairs[r + 1] = _mm256_unpackhi_epi32(of[r], of[r + 1]);  // words 2, 3 and 6, 7
  }
#pragma GCC unroll 2
  for (int r = 0; r < kBlock; r += 4)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      fours[r + 2 * half] = _mm256_unpacklo_epi64(pairs[r + half], pairs[r + 2 + half]);
      fours[r + 2 * half + 1] = _mm256_unpackhi_epi64(pairs[r + half], pairs[r + 2 + half]);
    }
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) {
    __m256i* const low = reinterpret_cast<__m256i*>(words + s * width);
    __m256i* const high = reinterpret_cast<__m256i*>(words + (s + 4) * width);
    _mm256_storeu_si256(low, _mm256_permute2x128_si256(fours[s], fours[s + 4], 0x20));
    _mm256_storeu_si256(high, _mm256_permute2x128_si256(fours[s], fours[s + 4], 0x31));
  }
}
#endif

void pack(const int8_t* codes, int64_t stride, int64_t count, int64_t size, int64_t width, Offset offset,
          uint32_t* words) {
  constexpr int64_t kRun = 64 / kStep;  // words of a cache line of codes
  const uint32_t flip[2] = {is_offset(offset, 0) ? 0x80808080u : 0, is_offset(offset, 1) ? 0x80808080u : 0};
  const int64_t whole = size / kStep;
  for (int64_t from = 0; from < whole; from += kRun) {
    const int64_t to = from + kRun < whole ? from + kRun : whole;
    if (to + kRun < whole)
      for (int64_t r = 0; r < count; ++r)  // too many rows for it to be foreseen
        __builtin_prefetch(codes + r * stride + (to + kRun) * kStep);
    int64_t transposed_rows = 0, transposed_to = from;
#if defined(__AVX2__)
    transposed_rows = count / kBlock * kBlock;
    transposed_to += (to - from) / kBlock * kBlock;
    for (int64_t r = 0; r < transposed_rows; r += kBlock)
      for (int64_t s = from; s < transposed_to; s += kBlock)
        transpose_block(codes + r * stride + s * kStep, stride, width, flip, words + s * width + r);
#endif
    for (int64_t r = 0; r < count; ++r) {
      const int8_t* const row = codes + r * stride;
      for (int64_t s = r < transposed_rows ? transposed_to : from; s < to; ++s)
        words[s * width + r] = word_of(row + s * kStep) ^ flip[s % 2];
    }
  }
  const int64_t steps = word_count(size);
  for (int64_t s = whole; s < steps; ++s)
    for (int64_t r = 0; r < count; ++r) {
      int8_t rest[kStep] = {};
      for (int64_t i = s * kStep; i < size; ++i) rest[i - s * kStep] = codes[r * stride + i];
      words[s * width + r] = word_of(rest) ^ flip[s % 2];
    }
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t r = count; r < width; ++r) words[s * width + r] = 0;
}

#if defined(__AVX512VNNI__)
constexpr int kAcross = 16;  // columns worked on at once

// Codes of kAcross columns of a row, plus `more`, modulo 2^8.
inline __m128i codes_across(const uint8_t* codes, bool nibbles, __m128i sign, int32_t more) {
  const __m128i less_sign = _mm_set1_epi8(static_cast<char>(more));
  if (!nibbles) return _mm_add_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), less_sign);
  const __m128i low_half = _mm_set1_epi8(15);
  const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const __m128i seconds = _mm_and_si128(_mm_srli_epi16(pairs, 4), low_half);
  const __m128i halves = _mm_unpacklo_epi8(_mm_and_si128(pairs, low_half), seconds);
  return _mm_add_epi8(_mm_xor_si128(halves, sign), less_sign);
}

// A step's words of kAcross columns, of four rows.
inline void interleave(const __m128i (&of)[4], uint32_t* words) {
  const __m128i low[2] = {_mm_unpacklo_epi8(of[0], of[1]), _mm_unpacklo_epi8(of[2], of[3])};
  const __m128i high[2] = {_mm_unpackhi_epi8(of[0], of[1]), _mm_unpackhi_epi8(of[2], of[3])};
  __m128i* const out = reinterpret_cast<__m128i*>(words);
  _mm_storeu_si128(out, _mm_unpacklo_epi16(low[0], low[1]));
  _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(low[0], low[1]));
  _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(high[0], high[1]));
  _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(high[0], high[1]));
}
#endif

void pack_columns(const uint8_t* codes, int64_t stride, int64_t first_column, int64_t count, int64_t size,
                  const int32_t* zero_point, int64_t zero_point_stride, bool nibbles, bool is_signed, Offset offset,
                  uint32_t* words) {
  constexpr int kBits = 32 / kStep;
  constexpr uint32_t kMask = (1u << (kBits - 1) << 1) - 1;
  const int32_t sign = nibbles && is_signed ? 8 : 0;
  const int64_t steps = word_count(size);
  const uint8_t* const start = codes + (nibbles ? first_column / 2 : first_column);  // kColumns is even
  for (int64_t s = 0; s < steps; ++s) {
    uint32_t* const out = words + s * kColumns;
    const int32_t more = is_offset(offset, s) ? static_cast<int32_t>(kOffset) : 0;
    const auto added = [&](int64_t row) { return more - (is_signed ? 0 : zero_point[row * zero_point_stride]); };
#if defined(__AVX512VNNI__)
    if (count == kColumns && (s + 1) * kStep <= size) {
      for (int64_t c = 0; c < kColumns; c += kAcross) {
        __m128i of[kStep];
        for (int64_t i = 0; i < kStep; ++i) {
          const int64_t row = s * kStep + i;
          of[i] = codes_across(start + row * stride + (nibbles ? c / 2 : c), nibbles,
                               _mm_set1_epi8(static_cast<char>(sign)), added(row) - sign);
        }
        interleave(of, out + c);
      }
      continue;
    }
#endif
    memset(out, 0, kColumns * sizeof *out);
    for (int64_t i = 0; i < kStep; ++i) {
      const int64_t row = s * kStep + i;
      const int shift = static_cast<int>(i) * kBits;
      if (row >= size) {
        for (int64_t c = 0; c < kColumns; ++c) out[c] |= static_cast<uint32_t>(more) << shift;
        continue;
      }
      const uint8_t* const line = start + row * stride;
      uint8_t halves[kColumns];
      for (int64_t c = 0; nibbles && c < count; ++c) halves[c] = c % 2 ? line[c / 2] >> 4 : line[c / 2] & 15;
      for (int64_t c = 0; c < count; ++c) {
        const int32_t code = nibbles ? (halves[c] ^ sign) - sign : static_cast<int8_t>(line[c]);
        out[c] |= (static_cast<uint32_t>(code + added(row)) & kMask) << shift;
      }
    }
  }
}

// Pairs of words take half of the products, by Winograd's inner product (1968): byte by byte of the first and second
// word, (x_1 + w_2)(x_2 + w_1) = x_1 w_1 + x_2 w_2 + x_1 x_2 + w_1 w_2, whose last two terms are each of one operand.
// Additions are free where products are what a processor has least of.
template <bool kByPairs, int R, int V>
void tile_of(const uint32_t* x, const uint32_t* w, int64_t steps, int32_t* sums) {
  ivec total[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) total[r][v] = broadcast(0);
  constexpr int kWords = kByPairs ? 2 : 1;
  for (int64_t s = 0; s < steps; s += kWords, x += kWords * kRows, w += kWords * kColumns) {
    ivec of_w[kWords][V];
#pragma GCC unroll 2
    for (int word = 0; word < kWords; ++word)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) of_w[word][v] = load(w + word * kColumns + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const ivec of_x = broadcast(x[r]);
#if defined(__AVX512VNNI__)
      if constexpr (kByPairs) {
        const ivec second = broadcast(x[kRows + r]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v)
          total[r][v] = add_product(total[r][v], add_bytes(of_x, of_w[1][v]), add_bytes(second, of_w[0][v]));
        continue;
      }
#endif
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) total[r][v] = add_product(total[r][v], of_w[0][v], of_x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(sums + r * kColumns + v * kLanes, total[r][v]);
}

template <bool kByPairs, int R>
void tile_rows(const uint32_t* x, const uint32_t* w, int64_t steps, int64_t width, int32_t* sums) {
  if (width <= kLanes) return tile_of<kByPairs, R, 1>(x, w, steps, sums);
  if (width <= 2 * kLanes) return tile_of<kByPairs, R, 2>(x, w, steps, sums);
  tile_of<kByPairs, R, kVectors>(x, w, steps, sums);
}

template <bool kByPairs>
void tile_by(const uint32_t* x, const uint32_t* w, int64_t steps, int64_t count, int64_t width, int32_t* sums) {
  if (count == 1) return tile_rows<kByPairs, 1>(x, w, steps, width, sums);
  if (count == 2) return tile_rows<kByPairs, 2>(x, w, steps, width, sums);
  if (count <= 4) return tile_rows<kByPairs, 4>(x, w, steps, width, sums);
  tile_rows<kByPairs, kRows>(x, w, steps, width, sums);
}

void tile(const uint32_t* x, const uint32_t* w, int64_t steps, int64_t count, int64_t width, bool by_pairs,
          int32_t* sums) {
#if defined(__AVX512VNNI__)
  if (by_pairs) return tile_by<true>(x, w, steps, count, width, sums);
#endif
  static_cast<void>(by_pairs);
  tile_by<false>(x, w, steps, count, width, sums);
}

// kOffset times the sum of x; by pairs, of its terms (x_1 + kOffset) x_2.
void row_excess(const uint32_t* x, int64_t steps, bool by_pairs, uint32_t* excess) {
#if defined(__AVX512VNNI__)
  static_assert(kRows == 8, "rows are a vector");
  const __m256i offset = _mm256_set1_epi8(-128);
  const auto words = [&](int64_t s) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + s * kRows)); };
  __m256i sum = _mm256_setzero_si256();
  if (by_pairs)
    for (int64_t s = 0; s < steps; s += 2)
      sum = _mm256_dpbusd_epi32(sum, _mm256_xor_si256(words(s), offset), words(s + 1));
  else
    for (int64_t s = 0; s < steps; ++s) sum = _mm256_dpbusd_epi32(sum, offset, words(s));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(excess), sum);
#else
  static_cast<void>(x), static_cast<void>(steps), static_cast<void>(by_pairs);
  memset(excess, 0, kRows * sizeof *excess);
#endif
}

// By pairs, of the terms w_1 (w_2 + kOffset).
void column_excess(const uint32_t* w, int64_t steps, bool by_pairs, uint32_t* excess) {
  memset(excess, 0, kColumns * sizeof *excess);
#if defined(__AVX512VNNI__)
  for (int64_t c = 0; by_pairs && c < kColumns; c += kLanes) {
    ivec sum = broadcast(0);
    for (int64_t s = 0; s < steps; s += 2)
      sum = add_product(sum, load(w + (s + 1) * kColumns + c), load(w + s * kColumns + c));
    store(reinterpret_cast<int32_t*>(excess) + c, sum);
  }
#else
  static_cast<void>(w), static_cast<void>(steps), static_cast<void>(by_pairs);
#endif
}

void scale_sums(int32_t* sums, int64_t count, int64_t width, const Scaling& scaling, bool add, float* total) {
  for (int64_t c = 0; c < width; c += kLanes) {  // the vectors that `tile` has computed
    const uvec excess = load_unsigned(scaling.w_excess + c), zero_point = load_unsigned(scaling.w_zero_point + c);
    const uvec rest = load_unsigned(scaling.w_rest + c);
    const vec scale = load(scaling.w_scale + c);
    for (int64_t r = 0; r < count; ++r) {
      int32_t* const place = sums + r * kColumns + c;
      const uvec sum = load_unsigned(place) - excess - scaling.x_excess[r] - scaling.x_sum[r] * zero_point -
                       scaling.x_zero_point[r] * rest;
      if (!total) {
        *reinterpret_cast<uvec*>(place) = sum;
        continue;
      }
      const vec term = to_numbers(sum) * scaling.x_scale[r] * scale;
      float* const out = total + r * kColumns + c;
      store(out, add ? load(out) + term : term);
    }
  }
}

void narrow_row(const float* x, int64_t width, void* out, int32_t dtype, int64_t at) {
  if (dtype == S2D_FLOAT32) {
    memcpy(static_cast<float*>(out) + at, x, static_cast<size_t>(width) * sizeof *x);
  } else if (dtype == S2D_BFLOAT16) {
    uint16_t* const y = static_cast<uint16_t*>(out) + at;
    for (int64_t c = 0; c < width; ++c) round_to(x[c], y + c);
  } else {
    uint16_t* const y = static_cast<uint16_t*>(out) + at;
    for (int64_t c = 0; c < width; ++c) y[c] = to_half(x[c]);
  }
}

void store_rows(const float* total, int64_t count, int64_t width, const float* bias, void* y, int32_t dtype,
                int64_t stride) {
  float sum[kColumns];
  for (int64_t r = 0; r < count; ++r) {
    const float* row = total + r * kColumns;
    if (bias) {
      float* const place = dtype == S2D_FLOAT32 ? static_cast<float*>(y) + r * stride : sum;
      for (int64_t c = 0; c < width; ++c) place[c] = row[c] + bias[c];
      if (dtype == S2D_FLOAT32) continue;
      row = sum;
    }
    narrow_row(row, width, y, dtype, r * stride);
  }
}

inline uint32_t magnitude_bits(float x) { return as_bits(x) & 0x7fffffffu; }
inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// In which a row is written as digits whose first is at most `most`; from the bits of its largest magnitude.
inline float unit_of(uint32_t largest, int32_t most) {
  const float unit = as_float(largest) / static_cast<float>(most);
  return unit > 0x1p-126f ? unit : 0x1p-126f;
}

bool weigh(const float* x, int64_t count, const float* scale, int64_t scale_stride, int32_t most, float* out,
           float* unit) {
  uint32_t largest = 0;
  if (scale_stride) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = x[i] * scale[i];
      largest = larger(largest, magnitude_bits(out[i]));
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = x[i] * *scale;
      largest = larger(largest, magnitude_bits(out[i]));
    }
  }
  *unit = unit_of(largest, most);
  return largest < 0x7f800000u;
}

void digits_of(float* __restrict x, int64_t count, float unit, int32_t most, int64_t places, int8_t* __restrict digits,
               int64_t stride) {
  const float base = static_cast<float>(2 * most);
  for (int64_t i = 0; i < count; ++i) x[i] /= unit;
  for (int64_t place = 0; place < places; ++place) {
    int8_t* __restrict const out = digits + place * stride;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t digit = nearest(x[i]);
      out[i] = static_cast<int8_t>(digit);
      x[i] = (x[i] - static_cast<float>(digit)) * base;
    }
  }
}

// Rows of a panel as one vector, with some to spare where they are fewer.
constexpr int kWide = 8;
static_assert(kRows <= kWide, "rows in a vector");
typedef float wide __attribute__((vector_size(4 * kWide), aligned(4), may_alias));
typedef uint32_t uwide __attribute__((vector_size(4 * kWide), aligned(4), may_alias));
constexpr int64_t kLine = kMostLines + kWide;

// Numbers d of all rows in fp32, in whole vectors: where they are, or a copy in `line`, which is zero from `count` on.
inline const float* line_of(const void* x, int32_t dtype, int64_t stride, int64_t count, int64_t d, float* line) {
  if (dtype == S2D_FLOAT32 && kRows == kWide && count % kWide == 0) return static_cast<const float*>(x) + d * stride;
  widen(static_cast<const char*>(x) + d * stride * (dtype == S2D_FLOAT32 ? 4 : 2), dtype, count, 1, line);
  return line;
}

inline void fetch_ahead(const void* x, int32_t dtype, int64_t stride, int64_t count, int64_t d, int64_t depth) {
  constexpr int64_t kAhead = 16;  // lines are too far apart for the processor to foresee them
  const int64_t bytes = dtype == S2D_FLOAT32 ? 4 : 2;
  if (d + kAhead >= depth) return;
  const char* const start = static_cast<const char*>(x) + (d + kAhead) * stride * bytes;
  for (int64_t at = 0; at < count * bytes; at += 64) __builtin_prefetch(start + at);
}

template <int P>
void pack_digits_of(const void* x, int32_t dtype, int64_t stride, int64_t count, int64_t depth, const float* scale,
                    int64_t scale_stride, int32_t most, uint32_t* words, const float* units) {
  constexpr int kBits = 32 / kStep;
  constexpr uint32_t kMask = (1u << (kBits - 1) << 1) - 1;
  const int64_t panels = (count + kRows - 1) / kRows, steps = word_count(depth);
  const float base = static_cast<float>(2 * most);
  float lines[kStep][kLine] = {};
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t deep = depth - s * kStep < kStep ? depth - s * kStep : kStep;
    const float* of[kStep];
    for (int64_t i = 0; i < deep; ++i) {
      fetch_ahead(x, dtype, stride, count, s * kStep + i, depth);
      of[i] = line_of(x, dtype, stride, count, s * kStep + i, lines[i]);
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      uwide word[P] = {};
      const wide unit = *reinterpret_cast<const wide*>(units + panel * kRows);
      for (int64_t i = 0; i < deep; ++i) {
        const float factor = scale[(s * kStep + i) * scale_stride];
        wide rest = *reinterpret_cast<const wide*>(of[i] + panel * kRows) * factor / unit;
#pragma GCC unroll 5
        for (int place = 0; place < P; ++place) {
          const wide shifted = rest + 0x1.8p23f;  // as in `nearest`
          const uwide digit = reinterpret_cast<uwide>(shifted) - 0x4b400000u;
          word[place] |= (digit & kMask) << static_cast<uint32_t>(i * kBits);
          rest = (rest - (shifted - 0x1.8p23f)) * base;
        }
      }
      for (int place = 0; place < P; ++place)
        memcpy(words + ((panel * P + place) * steps + s) * kRows, &word[place], kRows * sizeof *words);
    }
  }
}

bool pack_digits(const void* x, int32_t dtype, int64_t stride, int64_t count, int64_t depth, const float* scale,
                 int64_t scale_stride, int32_t most, int64_t places, uint32_t* words, float* units) {
  float line[kLine] = {}, unit[kLine];
  uint32_t largest[kLine] = {}, all = 0;
  for (int64_t d = 0; d < depth; ++d) {
    fetch_ahead(x, dtype, stride, count, d, depth);
    const float* const row = line_of(x, dtype, stride, count, d, line);
    const float factor = scale[d * scale_stride];
    for (int64_t r = 0; r < count; ++r) largest[r] = larger(largest[r], magnitude_bits(row[r] * factor));
  }
  for (int64_t r = 0; r < kLine; ++r) {
    all = larger(all, largest[r]);
    unit[r] = unit_of(largest[r], most);
  }
  if (all >= 0x7f800000u) return false;
  memcpy(units, unit, static_cast<size_t>(count) * sizeof *unit);
  constexpr decltype(&pack_digits_of<1>) kPack[kMostPlaces] = {pack_digits_of<1>, pack_digits_of<2>, pack_digits_of<3>,
                                                               pack_digits_of<4>, pack_digits_of<5>};
  kPack[places - 1](x, dtype, stride, count, depth, scale, scale_stride, most, words, unit);
  return true;
}

void join(const int32_t* sums, int32_t most, int64_t places, int64_t count, int64_t width, const uint32_t* row_excess,
          const uint32_t* column_excess, const float* units, const uint8_t* mask, int64_t mask_stride, void* out,
          int32_t dtype, int64_t stride) {
  const float one_place = static_cast<float>(1.0 / (2 * most));
  svec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
  for (int64_t r = 0; r < count; ++r) {
    uint64_t bits = 0;
    if (width == kColumns)
      memcpy(&bits, mask + r * mask_stride, kColumns / 8);
    else
      memcpy(&bits, mask + r * mask_stride, static_cast<size_t>((width + 7) / 8));
    float kept[kColumns];  // whole vectors of fp32 go where they belong at once
    const bool direct = dtype == S2D_FLOAT32 && width % kLanes == 0;
    float* const total = direct ? static_cast<float*>(out) + r * stride : kept;
    for (int64_t c = 0; c < width; c += kLanes) {
      const uvec excess = load_unsigned(column_excess + c);
      const auto of_place = [&](int64_t place) {
        const uvec sum = load_unsigned(sums + (place * kMostRows + r) * kColumns + c);
        return to_numbers(sum - excess - row_excess[place * kRows + r]);
      };
      vec sum = of_place(places - 1);
      for (int64_t place = places - 2; place >= 0; --place) sum = sum * one_place + of_place(place);
      const int32_t word = static_cast<int32_t>(bits >> c);
      const uvec inside = reinterpret_cast<uvec>((word & lane) != 0) & as_bits(1.f);
      store(total + c, sum * units[r] * reinterpret_cast<vec>(inside));
    }
    if (!direct) narrow_row(total, width, out, dtype, r * stride);
  }
}

constexpr IntegerKernels kernels_named(const char* name, bool pairs) {
  return {name,       kRows,        kColumns, pairs,     word_count,   extremes, range,      codes_of,
          pack_bits,  pack_nibbles, widen,    pack,      pack_columns, tile,     row_excess, column_excess,
          scale_sums, store_rows,   weigh,    digits_of, pack_digits,  join};
}

}  // namespace

#define S2D_CPU_TABLE_(name) integer_##name
#define S2D_CPU_TABLE(name) S2D_CPU_TABLE_(name)
#define S2D_CPU_TEXT_(name) #name
#define S2D_CPU_TEXT(name) S2D_CPU_TEXT_(name)
static_assert(kRows <= kMostRows && kColumns <= kMostColumns && kColumns % 8 == 0, "buffers and mask bits");
extern const IntegerKernels S2D_CPU_TABLE(S2D_CPU_NAME) = kernels_named(S2D_CPU_TEXT(S2D_CPU_NAME), false);
#if defined(__AVX512VNNI__)
extern const IntegerKernels integer_avx512_vnni_pairs = kernels_named("avx512_vnni_pairs", true);
#endif

}  // namespace s2d_cpu
