// Included by kernels.cpp inside its namespace: loops over rows of gradients, parameters and moments in their own
// dtype, with fp32 arithmetic and one rounding.

struct Bfloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

typedef uint32_t uvec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint16_t svec __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

constexpr int kAddRows = 4;
constexpr uint32_t kSign = 0x80000000u;
#if defined(__AVX__)
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif
#if defined(__AVX512F__)
constexpr int kNaN = 0x81, kInfinity = 0x18, kZero = 0x06;  // of fpclass
constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of what its unmasked intrinsics leave undefined
#endif

inline uvec bits_of(vec v) { return reinterpret_cast<uvec>(v); }
inline vec of_bits(uvec v) { return reinterpret_cast<vec>(v); }
inline vec chosen(uvec mask, vec yes, vec no) { return of_bits((bits_of(yes) & mask) | (bits_of(no) & ~mask)); }

inline vec everywhere(float x) { return x - vec{}; }  // a sum would lose the sign of -0

// a b + c, written out so that it is rounded alike wherever it stands.
inline vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<vec>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

inline vec root(vec v) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec>(_mm512_maskz_sqrt_ps(kAll, reinterpret_cast<__m512>(v)));
#elif defined(__AVX__)
  return reinterpret_cast<vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
#else
  for (int i = 0; i < kWidth; ++i) v[i] = sqrtf(v[i]);
  return v;
#endif
}

// Two conversions that GCC makes many instructions of.
inline uvec widened(const uint16_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<uvec>(
      _mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX__)
  return reinterpret_cast<uvec>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const svec*>(p), uvec);
#endif
}
// The upper halves.
inline svec upper(uvec v) {
#if defined(__AVX512F__)
  // The odd words.
  const __m512i places = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d,
                                          0xb0009, 0x70005, 0x30001);
  const __m512i words = _mm512_maskz_permutexvar_epi16(0xffffffff, places, reinterpret_cast<__m512i>(v));
  svec result;
  memcpy(&result, &words, sizeof result);
  return result;
#elif defined(__AVX__)
  const __m256i all = reinterpret_cast<__m256i>(v >> 16);
  return reinterpret_cast<svec>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
  return __builtin_convertvector(v >> 16, svec);
#endif
}

inline vec load(const Bfloat* p) { return of_bits(widened(&p->bits) << 16); }
inline vec load(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec>(_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX__)
  return reinterpret_cast<vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = from_half(p[i].bits);
  return v;
#endif
}

// Nearest, ties to even.
inline uvec nearest(vec number) {  // in the upper halves
  const uvec bits = bits_of(number);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
inline svec rounded(vec v, const Bfloat*) {
  const uvec number = reinterpret_cast<uvec>(v == v);
  return upper((nearest(v) & number) | (0x7fc00000u & ~number));
}
inline svec rounded(vec v, const Half*) {
  svec result;
#if defined(__AVX512F__)
  const __m256i halves = _mm512_maskz_cvtps_ph(kAll, reinterpret_cast<__m512>(v), kNearest);
  memcpy(&result, &halves, sizeof result);
#elif defined(__AVX__)
  const __m128i halves = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), kNearest);
  memcpy(&result, &halves, sizeof result);
#else
  for (int i = 0; i < kWidth; ++i) result[i] = to_half(v[i]);
#endif
  return result;
}
inline void store(Bfloat* p, vec v) { *reinterpret_cast<svec*>(p) = rounded(v, p); }
inline void store(Half* p, vec v) { *reinterpret_cast<svec*>(p) = rounded(v, p); }

// A whole vector, or its first `count` elements and 0 beyond them.
template <bool kSome, typename T>
inline vec load(const T* p, int64_t count) {
  if (!kSome) return load(p);
  T some[kWidth] = {};
  memcpy(some, p, count * sizeof(T));
  return load(some);
}
template <bool kSome, typename T>
inline void store(T* p, vec v, int64_t count) {
  if (!kSome) return store(p, v);
  T some[kWidth];
  store(some, v);
  memcpy(p, some, count * sizeof(T));
}

// Where a sum is neither 0 nor infinite or NaN.
inline uvec usable(vec sum) { return reinterpret_cast<uvec>((bits_of(sum) & ~kSign) - 1u < 0x7f7fffffu); }
// A sum as it may be added to a number: else -0, which changes no bit of it.
inline vec usable_sum(vec sum) {
#if defined(__AVX512F__)
  const __m512 all = reinterpret_cast<__m512>(sum);
  return reinterpret_cast<vec>(_mm512_mask_mov_ps(all, _mm512_fpclass_ps_mask(all, kNaN | kInfinity | kZero),
                                                  reinterpret_cast<__m512>(everywhere(-0.0f))));
#else
  return chosen(usable(sum), sum, everywhere(-0.0f));
#endif
}

// sum[r] = sum_i left[r, i] right[i, columns] of R rows.
template <int R, bool kSome>
inline void products(const float* left, const float* right, int64_t ldr, int64_t rank, int64_t count, vec* sum) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sum[r] = vec{};
  for (int64_t i = 0; i < rank; ++i) {
    const vec column = load<kSome>(right + i * ldr, count);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = fused(everywhere(left[r * rank + i]), column, sum[r]);
  }
}
// The same of one row and N components, whose left sides stay in registers.
template <int N, bool kSome>
inline vec product(const vec* left, const float* right, int64_t ldr, int64_t count) {
  vec sum = {};
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) sum = fused(left[i], load<kSome>(right + i * ldr, count), sum);
  return sum;
}

inline bool all(uvec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) == 0xffff;
#elif defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) == 0xff;
#else
  return (mask[0] & mask[1] & mask[2] & mask[3]) != 0;
#endif
}
inline bool all_numbers(vec v) { return all(reinterpret_cast<uvec>(v == v)); }

// Whether all sums are usable and no result is NaN, which is the rule.
inline bool ordinary(vec sum, vec result) {
#if defined(__AVX512F__)
  return (_mm512_fpclass_ps_mask(reinterpret_cast<__m512>(sum), kNaN | kInfinity | kZero) |
          _mm512_fpclass_ps_mask(reinterpret_cast<__m512>(result), kNaN)) == 0;
#else
  return all(usable(sum) & reinterpret_cast<uvec>(result == result));
#endif
}

// G + sum, or the bits of G, whatever they are, where the sum is not usable.
inline void add_sum(float* G, vec sum) { store(G, chosen(usable(sum), load(G) + sum, load(G))); }
template <typename T>
inline void add_unusual(T* G, vec sum) {
  svec* const place = reinterpret_cast<svec*>(G);
  const svec mask = upper(usable(sum));
  *place = (rounded(load(G) + sum, G) & mask) | (*place & ~mask);
}
inline void add_sum(Bfloat* G, vec sum) {
  const vec result = load(G) + sum;
  if (!ordinary(sum, result)) return add_unusual(G, sum);
  *reinterpret_cast<svec*>(G) = upper(nearest(result));
}
inline void add_sum(Half* G, vec sum) {
  const vec result = load(G) + sum;
  if (!ordinary(sum, result)) return add_unusual(G, sum);
  store(G, result);
}

// The two ways to round. They are told of the columns from j on, j ascending by kWidth, before sums of these are added.
struct ToTheNearest {
  ToTheNearest(const int64_t*, int64_t) {}
  void columns(int64_t) {}
  template <typename T>
  void add(T* G, int, int64_t, vec sum) const {
    add_sum(G, sum);
  }
};

// The random numbers are those that reference.py's `rounding_bits` defines.
inline uvec words(uint32_t x) { return x - uvec{}; }
inline uvec mixed(uvec x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
constexpr uint32_t kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <int R>
struct Stochastic {
  uvec key[R];
  uint16_t random[R][2 * kWidth];  // one mixed word has those of two columns

  Stochastic(const int64_t* seed, int64_t row) {
    const uint64_t bits = static_cast<uint64_t>(*seed);
    const uvec layer =
        mixed(words(static_cast<uint32_t>(bits)) ^ mixed(words(static_cast<uint32_t>(bits >> 32) ^ 0x9e3779b9u)));
    for (int r = 0; r < R; ++r) key[r] = mixed(layer ^ words(static_cast<uint32_t>(row + r)));
  }
  void columns(int64_t j) {
    if (j & kWidth) return;
    const uvec halves = words(static_cast<uint32_t>(j / 2)) + *reinterpret_cast<const uvec*>(kLane);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const uvec pairs = mixed(key[r] ^ halves);
      memcpy(random[r], &pairs, sizeof pairs);
    }
  }
  void add(Bfloat* G, int r, int64_t j, vec sum) const {
    const uvec bits = bits_of(load(G) + sum);
    // From the largest bf16 on to the one below, which is no infinity.
    const uvec below = reinterpret_cast<uvec>((bits & ~kSign) < 0x7f7f0000u);
    const svec result = upper(bits + (widened(random[r] + (j & kWidth)) & below));
    svec* const place = reinterpret_cast<svec*>(G);
    const uvec added = usable(sum);
    if (all(added)) {
      *place = result;
      return;
    }
    const svec mask = upper(added);
    *place = (result & mask) | (*place & ~mask);
  }
};

// R rows together, so that they share the columns of `right`.
template <int R, typename T, typename Rounding>
inline void add_tile(T* G, int64_t stride, int64_t cols, const float* left, const float* right, int64_t ldr,
                     int64_t rank, Rounding rounding) {
  vec sum[R];
  int64_t j = 0;
  for (; j + kWidth <= cols; j += kWidth) {
    products<R, false>(left, right + j, ldr, rank, kWidth, sum);
    rounding.columns(j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(G + (R + r) * stride + j, 1);  // the rows of the next tile
      rounding.add(G + r * stride + j, r, j, sum[r]);
    }
  }
  if (j == cols) return;
  products<R, true>(left, right + j, ldr, rank, cols - j, sum);
  rounding.columns(j);
  for (int r = 0; r < R; ++r) {
    T some[kWidth] = {};
    memcpy(some, G + r * stride + j, (cols - j) * sizeof(T));
    rounding.add(some, r, j, sum[r]);
    memcpy(G + r * stride + j, some, (cols - j) * sizeof(T));
  }
}

template <typename Several, typename One, typename T>
void add_rows(T* G, int64_t stride, int64_t rows, int64_t cols, const float* left, const float* right, int64_t ldr,
              int64_t rank, const int64_t* seed, int64_t first) {
  int64_t r = 0;
  for (; r + kAddRows <= rows; r += kAddRows)
    add_tile<kAddRows>(G + r * stride, stride, cols, left + r * rank, right, ldr, rank, Several(seed, first + r));
  for (; r < rows; ++r)
    add_tile<1>(G + r * stride, stride, cols, left + r * rank, right, ldr, rank, One(seed, first + r));
}

void add_low_rank(void* G, int32_t dtype, int64_t stride, int64_t rows, int64_t cols, const float* left,
                  const float* right, int64_t ldr, int64_t rank, const int64_t* seed, int64_t first) {
  const auto add = [=](auto* typed) {
    add_rows<ToTheNearest, ToTheNearest>(typed, stride, rows, cols, left, right, ldr, rank, seed, first);
  };
  if (dtype == S2D_FLOAT32) return add(static_cast<float*>(G));
  if (dtype == S2D_FLOAT16) return add(static_cast<Half*>(G));
  Bfloat* const typed = static_cast<Bfloat*>(G);
  if (!seed) return add(typed);
  add_rows<Stochastic<kAddRows>, Stochastic<1>>(typed, stride, rows, cols, left, right, ldr, rank, seed, first);
}

// The rule in registers.
struct Step {
  vec grad_factor, one_minus_beta1, beta2, one_minus_beta2, eps, minus_decay, step_size, inverse_root;

  explicit Step(const AdamWRule& rule)
      : grad_factor(everywhere(rule.grad_factor)),
        one_minus_beta1(everywhere(rule.one_minus_beta1)),
        beta2(everywhere(rule.beta2)),
        one_minus_beta2(everywhere(rule.one_minus_beta2)),
        eps(everywhere(rule.eps)),
        minus_decay(everywhere(-rule.decay)),
        step_size(everywhere(rule.step_size)),
        inverse_root(everywhere(rule.inverse_root)) {}
};

// Vectors side by side whose loads all come before their stores. CPUs make a load wait for an earlier store to an address
// that is the same modulo 4096; one vector after the other, a row of Vh a little behind p in its page would wait for the
// root and the quotient of the vector before. In so many the waits overlap; with fewer registers it gains nothing.
#if defined(__AVX512F__)
constexpr int kTogether = 4;
#else
constexpr int kTogether = 1;
#endif

// C vectors of each tensor; the formula is at the top of adamw.cu.
template <int C, bool kDecoupled, bool kSome, typename T>
inline void update(const Step& step, const T* grad, const vec (&penalty)[C], T* param, T* exp_avg, T* exp_avg_sq,
                   int64_t count) {
  vec g[C], m[C], v[C], p[C];
#pragma GCC unroll 4
  for (int i = 0; i < C; ++i) {
    const int64_t j = i * kWidth;
    g[i] = load<kSome>(grad + j, count);
    m[i] = load<kSome>(exp_avg + j, count);
    v[i] = load<kSome>(exp_avg_sq + j, count);
    p[i] = load<kSome>(param + j, count);
  }
#pragma GCC unroll 4
  for (int i = 0; i < C; ++i) {
    g[i] = fused(g[i], step.grad_factor, kDecoupled ? everywhere(-0.0f) : usable_sum(penalty[i]));
    m[i] = fused(step.one_minus_beta1, g[i] - m[i], m[i]);
    v[i] = fused(step.one_minus_beta2 * g[i], g[i], step.beta2 * v[i]);
    p[i] = fused(step.minus_decay, p[i], p[i]);
    p[i] = p[i] - step.step_size * m[i] / fused(root(v[i]), step.inverse_root, step.eps);
    if (kDecoupled) p[i] = p[i] + usable_sum(penalty[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < C; ++i) {
    const int64_t j = i * kWidth;
    if (!kSome && std::is_same<T, Bfloat>::value && all_numbers(p[i])) {  // then so are m and v
      *reinterpret_cast<svec*>(param + j) = upper(nearest(p[i]));
      *reinterpret_cast<svec*>(exp_avg + j) = upper(nearest(m[i]));
      *reinterpret_cast<svec*>(exp_avg_sq + j) = upper(nearest(v[i]));
      continue;
    }
    store<kSome>(param + j, p[i], count);
    store<kSome>(exp_avg + j, m[i], count);
    store<kSome>(exp_avg_sq + j, v[i], count);
  }
}

// One row, since several at once are more streams than prefetchers follow; of N components, or `rank` where N is -1.
template <int N, bool kDecoupled, typename T>
struct AdamWRow {
  const AdamWRows& rows;
  const Step& step;
  T *param, *exp_avg, *exp_avg_sq;
  const T* grad;
  const float *left, *right;
  vec in_registers[N > 0 ? N : 1];

  AdamWRow(const AdamWRows& all, const Step& its_step, int64_t r)
      : rows(all),
        step(its_step),
        param(static_cast<T*>(all.param) + r * all.param_stride),
        exp_avg(static_cast<T*>(all.exp_avg) + r * all.param_stride),
        exp_avg_sq(static_cast<T*>(all.exp_avg_sq) + r * all.param_stride),
        grad(static_cast<const T*>(all.grad) + r * all.grad_stride),
        left(all.left + r * all.rank),
        right(all.right) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) in_registers[i] = everywhere(left[i]);
  }
  // C vectors from column j on; the last `count` columns if kSome.
  template <int C, bool kSome = false>
  void columns(int64_t j, int64_t count = kWidth) const {
    vec penalty[C];
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) {
      if (N < 0 || kSome)
        products<1, kSome>(left, right + j + i * kWidth, rows.ldr, rows.rank, count, penalty + i);
      else
        penalty[i] = product<N, false>(in_registers, right + j + i * kWidth, rows.ldr, kWidth);
    }
    update<C, kDecoupled, kSome>(step, grad + j, penalty, param + j, exp_avg + j, exp_avg_sq + j, count);
  }
  void all() const {
    int64_t j = 0;
    for (; j + kTogether * kWidth <= rows.cols; j += kTogether * kWidth) columns<kTogether>(j);
    for (; j + kWidth <= rows.cols; j += kWidth) columns<1>(j);
    if (j < rows.cols) columns<1, true>(j, rows.cols - j);
  }
};

template <bool kDecoupled, typename T>
void adamw_rows_of(const AdamWRows& rows, const AdamWRule& rule) {
  const Step step(rule);
  for (int64_t r = 0; r < rows.rows; ++r) {
    switch (rows.rank) {
      case 0:
        AdamWRow<0, kDecoupled, T>(rows, step, r).all();
        break;
      case 1:
        AdamWRow<1, kDecoupled, T>(rows, step, r).all();
        break;
      case 2:
        AdamWRow<2, kDecoupled, T>(rows, step, r).all();
        break;
      case 3:
        AdamWRow<3, kDecoupled, T>(rows, step, r).all();
        break;
      default:
        AdamWRow<-1, kDecoupled, T>(rows, step, r).all();
    }
  }
}

template <typename T>
void adamw_rows_in(const AdamWRows& rows, const AdamWRule& rule) {
  rule.decoupled ? adamw_rows_of<true, T>(rows, rule) : adamw_rows_of<false, T>(rows, rule);
}

void adamw_rows(const AdamWRows& rows, int32_t dtype, const AdamWRule& rule) {
  if (dtype == S2D_FLOAT32) return adamw_rows_in<float>(rows, rule);
  if (dtype == S2D_BFLOAT16) return adamw_rows_in<Bfloat>(rows, rule);
  adamw_rows_in<Half>(rows, rule);
}
