// Floating numbers of 16 bits and fp32, by integer arithmetic that no flushing of subnormal numbers reaches. Part of
// each file that includes it, inside its namespace: these are compiled for different instruction sets.

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// IEEE half to single. Subnormal halves are normal singles, made without subnormal singles: those may be flushed.
inline float from_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits;
  memcpy(&bits, &subnormal, sizeof bits);
  if (magnitude >= 0x400u) bits = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7c00u) bits = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
  return as_float(bits | sign);
}

inline float to_float(float v) { return v; }
inline float to_float(uint16_t v) { return as_float(static_cast<uint32_t>(v) << 16); }

inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Nearest, ties to even.
inline void round_to(float v, float* out) { *out = v; }
inline void round_to(float v, uint16_t* out) {  // bf16
  const uint32_t bits = as_bits(v);
  *out = static_cast<uint16_t>(v == v ? (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16 : 0x7fc0u);
}
inline uint16_t to_half(float v) {
  const uint32_t bits = as_bits(v), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u)  // subnormal: the addition rounds at 2^-24
    return static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}

template <typename T, typename Convert>
inline void widen_as(const T* x, int64_t count, int64_t stride, float* out, Convert convert) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = convert(x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = convert(x[i * stride]);
  }
}

void widen(const void* x, int32_t dtype, int64_t count, int64_t stride, float* out) {
  if (dtype == S2D_FLOAT32) {
    widen_as(static_cast<const float*>(x), count, stride, out, [](float v) { return v; });
  } else if (dtype == S2D_BFLOAT16) {
    widen_as(static_cast<const uint16_t*>(x), count, stride, out,
             [](uint16_t v) { return as_float(static_cast<uint32_t>(v) << 16); });
  } else {
    widen_as(static_cast<const uint16_t*>(x), count, stride, out, from_half);
  }
}
