// Eight lanes of 32 bits, one for each of eight neighbouring rows: what differs between processors is here alone.
//
// This header is compiled once for each instruction set, in a namespace of its own (PQ_SET), so that one library holds
// all of them and `dispatch.cpp` chooses when it is loaded.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace PQ_SET {

inline int32_t load32(const void* from) {
  int32_t value;
  std::memcpy(&value, from, 4);
  return value;
}

inline void will_read(const void* from) {  // soon; it need not be there
#if defined(__GNUC__)
  __builtin_prefetch(from, 0, 0);
#else
  (void)from;
#endif
}

inline float from_bf16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_bf16(float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(__AVX2__)

using Ints = __m256i;
using Floats = __m256;

inline Ints ints_zero() { return _mm256_setzero_si256(); }
inline Ints ints_all(int32_t value) { return _mm256_set1_epi32(value); }
inline Ints ints_load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void ints_store(void* to, Ints value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
inline Ints ints_add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints ints_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
template <int BITS> inline Ints ints_right(Ints a) { return _mm256_srli_epi32(a, BITS); }
template <int BITS> inline Ints ints_left(Ints a) { return _mm256_slli_epi32(a, BITS); }
template <int BITS> inline Ints ints_right_signed(Ints a) { return _mm256_srai_epi32(a, BITS); }
template <int BITS> inline Ints halves_right(Ints a) { return _mm256_srli_epi16(a, BITS); }
template <int BITS> inline Ints halves_left(Ints a) { return _mm256_slli_epi16(a, BITS); }
template <int BITS> inline Ints halves_right_signed(Ints a) { return _mm256_srai_epi16(a, BITS); }

// sum + the product of two pairs of 16 bits in each lane
inline Ints dot_halves(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpwssd_epi32(sum, a, b);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}
// sum + the product of four pairs of 8 bits in each lane; a: 0 to 15, b: -127 to 127
inline Ints dot_bytes(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(sum, a, b);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#endif
}

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats all(float value) { return _mm256_set1_ps(value); }
inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }  // a * b + c
inline Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Ints to_ints(Floats a) { return _mm256_cvtps_epi32(a); }  // to nearest even
inline Floats as_floats(Ints a) { return _mm256_castsi256_ps(a); }
inline Floats load_f16(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Floats load_bf16(const uint16_t* from) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Ints load_bytes(const int8_t* from) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))); }
inline float largest(Floats v) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps(a, a, 1)));
}
inline float sum(Floats v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
}
inline Floats magnitude(Floats v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
inline Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
// eight floats, each at most 32767 in magnitude, rounded to nearest even
inline __m128i halves_of(Floats v) {
  const __m256i wide = _mm256_cvtps_epi32(v);
  return _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
inline void store_halves(int16_t* to, Floats v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves_of(v)); }
// the same in the order 0, 2, 1, 3, 4, 6, 5, 7: in pairs as a shift and a mask leave the codes of a lane
inline void store_pairs(int16_t* to, Floats v) {
  const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(halves_of(v), order));
}

struct Table {  // sixteen floats, by the lowest four bits of a lane
  Floats low, high;
  explicit Table(const float* levels) : low(load(levels)), high(load(levels + 8)) {}
  Floats at(Ints index) const {
    return _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
        _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
};

#elif defined(__ARM_NEON)

struct Ints { int32x4_t a, b; };
struct Floats { float32x4_t a, b; };

inline Ints ints_zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline Ints ints_all(int32_t value) { return {vdupq_n_s32(value), vdupq_n_s32(value)}; }
inline Ints ints_load(const void* from) {
  const auto* at = static_cast<const int32_t*>(from);
  return {vld1q_s32(at), vld1q_s32(at + 4)};
}
inline void ints_store(void* to, Ints x) {
  vst1q_s32(static_cast<int32_t*>(to), x.a);
  vst1q_s32(static_cast<int32_t*>(to) + 4, x.b);
}
inline Ints ints_add(Ints x, Ints y) { return {vaddq_s32(x.a, y.a), vaddq_s32(x.b, y.b)}; }
inline Ints ints_and(Ints x, Ints y) { return {vandq_s32(x.a, y.a), vandq_s32(x.b, y.b)}; }
template <int BITS> inline int32x4_t right(int32x4_t x) {
  if constexpr (BITS == 0) return x;
  else return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x), BITS));
}
template <int BITS> inline Ints ints_right(Ints x) { return {right<BITS>(x.a), right<BITS>(x.b)}; }
template <int BITS> inline Ints ints_left(Ints x) { return {vshlq_n_s32(x.a, BITS), vshlq_n_s32(x.b, BITS)}; }
template <int BITS> inline Ints ints_right_signed(Ints x) {
  if constexpr (BITS == 0) return x;
  else return {vshrq_n_s32(x.a, BITS), vshrq_n_s32(x.b, BITS)};
}
template <int BITS> inline int32x4_t halves_right_of(int32x4_t x) {
  return vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(x), BITS));
}
template <int BITS> inline Ints halves_right(Ints x) { return {halves_right_of<BITS>(x.a), halves_right_of<BITS>(x.b)}; }
template <int BITS> inline Ints halves_left(Ints x) {
  return {vreinterpretq_s32_s16(vshlq_n_s16(vreinterpretq_s16_s32(x.a), BITS)),
          vreinterpretq_s32_s16(vshlq_n_s16(vreinterpretq_s16_s32(x.b), BITS))};
}
template <int BITS> inline Ints halves_right_signed(Ints x) {
  return {vreinterpretq_s32_s16(vshrq_n_s16(vreinterpretq_s16_s32(x.a), BITS)),
          vreinterpretq_s32_s16(vshrq_n_s16(vreinterpretq_s16_s32(x.b), BITS))};
}
inline int32x4_t pairs(int32x4_t sum, int32x4_t x, int32x4_t y) {
  const int16x8_t p = vreinterpretq_s16_s32(x), q = vreinterpretq_s16_s32(y);
  const int32x4_t low = vmull_s16(vget_low_s16(p), vget_low_s16(q)), high = vmull_high_s16(p, q);
  return vaddq_s32(sum, vpaddq_s32(low, high));
}
inline Ints dot_halves(Ints sum, Ints x, Ints y) { return {pairs(sum.a, x.a, y.a), pairs(sum.b, x.b, y.b)}; }
inline int32x4_t fours(int32x4_t sum, int32x4_t x, int32x4_t y) {
  const int8x16_t p = vreinterpretq_s8_s32(x), q = vreinterpretq_s8_s32(y);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, p, q);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(p), vget_low_s8(q)), high = vmull_high_s8(p, q);
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}
inline Ints dot_bytes(Ints sum, Ints x, Ints y) { return {fours(sum.a, x.a, y.a), fours(sum.b, x.b, y.b)}; }

inline Floats zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
inline Floats all(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
inline Floats load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
inline void store(float* to, Floats v) { vst1q_f32(to, v.a); vst1q_f32(to + 4, v.b); }
inline Floats add(Floats x, Floats y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
inline Floats subtract(Floats x, Floats y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
inline Floats multiply(Floats x, Floats y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
inline Floats fused(Floats x, Floats y, Floats z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
inline Floats to_floats(Ints x) { return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b)}; }
inline Ints to_ints(Floats x) { return {vcvtnq_s32_f32(x.a), vcvtnq_s32_f32(x.b)}; }
inline Floats as_floats(Ints x) { return {vreinterpretq_f32_s32(x.a), vreinterpretq_f32_s32(x.b)}; }
inline Floats load_f16(const uint16_t* from) {
  const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(from));
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
inline Floats load_bf16(const uint16_t* from) {
  const uint16x8_t halves = vld1q_u16(from);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
          vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16))};
}
inline Ints load_bytes(const int8_t* from) {
  const int16x8_t wide = vmovl_s8(vld1_s8(from));
  return {vmovl_s16(vget_low_s16(wide)), vmovl_high_s16(wide)};
}
inline float largest(Floats v) { return vmaxvq_f32(vmaxq_f32(v.a, v.b)); }
inline float sum(Floats v) { return vaddvq_f32(vaddq_f32(v.a, v.b)); }
inline Floats magnitude(Floats v) { return {vabsq_f32(v.a), vabsq_f32(v.b)}; }
inline Floats maximum(Floats x, Floats y) { return {vmaxq_f32(x.a, y.a), vmaxq_f32(x.b, y.b)}; }
inline Floats minimum(Floats x, Floats y) { return {vminq_f32(x.a, y.a), vminq_f32(x.b, y.b)}; }
inline Floats divide(Floats x, Floats y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
inline void store_halves(int16_t* to, Floats v) {
  vst1q_s16(to, vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(v.a)), vqmovn_s32(vcvtnq_s32_f32(v.b))));
}
// in the order 0, 2, 1, 3, 4, 6, 5, 7: in pairs as a shift and a mask leave the codes of a lane
inline void store_pairs(int16_t* to, Floats v) {
  const int16x4_t low = vqmovn_s32(vcvtnq_s32_f32(v.a)), high = vqmovn_s32(vcvtnq_s32_f32(v.b));
  const int16x4_t evens = vuzp1_s16(low, high), odds = vuzp2_s16(low, high);  // 0, 2, 4, 6 and 1, 3, 5, 7
  const int32x2_t e = vreinterpret_s32_s16(evens), o = vreinterpret_s32_s16(odds);
  vst1q_s16(to, vreinterpretq_s16_s32(vcombine_s32(vzip1_s32(e, o), vzip2_s32(e, o))));
}

struct Table {
  uint8x16x4_t bytes;  // the sixteen floats
  explicit Table(const float* levels) {
    for (int part = 0; part < 4; part++) bytes.val[part] = vreinterpretq_u8_f32(vld1q_f32(levels + 4 * part));
  }
  float32x4_t at(int32x4_t index) const {
    const int32x4_t first = vshlq_n_s32(vandq_s32(index, vdupq_n_s32(15)), 2);
    const int32x4_t spread = vmulq_s32(first, vdupq_n_s32(0x01010101));
    const int32x4_t each = vaddq_s32(spread, vdupq_n_s32(0x03020100));
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_s32(each)));
  }
  Floats at(Ints index) const { return {at(index.a), at(index.b)}; }
};

#else

struct Ints { int32_t v[8]; };
struct Floats { float v[8]; };

#define PQ_EACH(TYPE, EXPRESSION) \
  TYPE out;                       \
  for (int i = 0; i < 8; i++) out.v[i] = (EXPRESSION); \
  return out

inline int32_t halves(int32_t low, int32_t high) {
  return static_cast<int32_t>((static_cast<uint32_t>(high) << 16) | (static_cast<uint32_t>(low) & 0xffffu));
}
inline int32_t low_half(int32_t x) { return static_cast<int16_t>(x & 0xffff); }
inline int32_t high_half(int32_t x) { return x >> 16; }

inline Ints ints_zero() { return {}; }
inline Ints ints_all(int32_t value) { PQ_EACH(Ints, value); }
inline Ints ints_load(const void* from) { Ints out; std::memcpy(out.v, from, 32); return out; }
inline void ints_store(void* to, Ints a) { std::memcpy(to, a.v, 32); }
inline Ints ints_add(Ints a, Ints b) { PQ_EACH(Ints, a.v[i] + b.v[i]); }
inline Ints ints_and(Ints a, Ints b) { PQ_EACH(Ints, a.v[i] & b.v[i]); }
template <int BITS> inline Ints ints_right(Ints a) { PQ_EACH(Ints, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> BITS)); }
template <int BITS> inline Ints ints_left(Ints a) { PQ_EACH(Ints, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << BITS)); }
template <int BITS> inline Ints ints_right_signed(Ints a) { PQ_EACH(Ints, a.v[i] >> BITS); }
template <int BITS> inline Ints halves_right(Ints a) { PQ_EACH(Ints, halves((a.v[i] & 0xffff) >> BITS, static_cast<int32_t>((static_cast<uint32_t>(a.v[i]) >> 16) >> BITS))); }
template <int BITS> inline Ints halves_left(Ints a) { PQ_EACH(Ints, halves(low_half(a.v[i]) << BITS, high_half(a.v[i]) << BITS)); }
template <int BITS> inline Ints halves_right_signed(Ints a) { PQ_EACH(Ints, halves(low_half(a.v[i]) >> BITS, high_half(a.v[i]) >> BITS)); }
inline Ints dot_halves(Ints s, Ints a, Ints b) { PQ_EACH(Ints, s.v[i] + low_half(a.v[i]) * low_half(b.v[i]) + high_half(a.v[i]) * high_half(b.v[i])); }
inline int32_t four(int32_t a, int32_t b) {
  int32_t total = 0;
  for (int byte = 0; byte < 32; byte += 8) total += static_cast<uint8_t>(a >> byte) * static_cast<int8_t>(b >> byte);
  return total;
}
inline Ints dot_bytes(Ints s, Ints a, Ints b) { PQ_EACH(Ints, s.v[i] + four(a.v[i], b.v[i])); }

inline float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
  float value;
  if (rest < 0x400u) {
    value = static_cast<float>(rest) * 5.9604644775390625e-8f;  // subnormal: of 2^-24
    return sign ? -value : value;
  }
  uint32_t bits = sign | ((rest >= 0x7c00u ? rest + 0x38000u : rest + 0x1c000u) << 13);
  std::memcpy(&value, &bits, 4);
  return value;
}
inline Floats zero() { return {}; }
inline Floats all(float value) { PQ_EACH(Floats, value); }
inline Floats load(const float* from) { Floats out; std::memcpy(out.v, from, 32); return out; }
inline void store(float* to, Floats value) { std::memcpy(to, value.v, 32); }
inline Floats add(Floats a, Floats b) { PQ_EACH(Floats, a.v[i] + b.v[i]); }
inline Floats subtract(Floats a, Floats b) { PQ_EACH(Floats, a.v[i] - b.v[i]); }
inline Floats multiply(Floats a, Floats b) { PQ_EACH(Floats, a.v[i] * b.v[i]); }
inline Floats fused(Floats a, Floats b, Floats c) { PQ_EACH(Floats, std::fma(a.v[i], b.v[i], c.v[i])); }
inline Floats to_floats(Ints a) { PQ_EACH(Floats, static_cast<float>(a.v[i])); }
inline Ints to_ints(Floats a) { PQ_EACH(Ints, static_cast<int32_t>(std::nearbyint(a.v[i]))); }
inline Floats as_floats(Ints a) { Floats out; std::memcpy(out.v, a.v, 32); return out; }
inline Floats load_f16(const uint16_t* from) { PQ_EACH(Floats, from_f16(from[i])); }
inline Floats load_bf16(const uint16_t* from) { PQ_EACH(Floats, from_bf16(from[i])); }
inline Ints load_bytes(const int8_t* from) { PQ_EACH(Ints, from[i]); }
inline float largest(Floats v) {
  float most = v.v[0];
  for (int i = 1; i < 8; i++) most = v.v[i] > most ? v.v[i] : most;
  return most;
}
inline float sum(Floats v) {
  return ((v.v[0] + v.v[4]) + (v.v[2] + v.v[6])) + ((v.v[1] + v.v[5]) + (v.v[3] + v.v[7]));
}
inline Floats magnitude(Floats v) { PQ_EACH(Floats, std::fabs(v.v[i])); }
inline Floats maximum(Floats a, Floats b) { PQ_EACH(Floats, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Floats minimum(Floats a, Floats b) { PQ_EACH(Floats, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Floats divide(Floats a, Floats b) { PQ_EACH(Floats, a.v[i] / b.v[i]); }
inline void store_halves(int16_t* to, Floats v) {
  for (int i = 0; i < 8; i++) to[i] = static_cast<int16_t>(std::nearbyint(v.v[i]));
}
// in the order 0, 2, 1, 3, 4, 6, 5, 7: in pairs as a shift and a mask leave the codes of a lane
inline void store_pairs(int16_t* to, Floats v) {
  const int order[8] = {0, 2, 1, 3, 4, 6, 5, 7};
  for (int i = 0; i < 8; i++) to[i] = static_cast<int16_t>(std::nearbyint(v.v[order[i]]));
}

struct Table {
  const float* levels;
  explicit Table(const float* of) : levels(of) {}
  Floats at(Ints index) const { PQ_EACH(Floats, levels[index.v[i] & 15]); }
};
#undef PQ_EACH

#endif

inline Floats load_i8(const int8_t* from) { return to_floats(load_bytes(from)); }

// the floats of bytes, E4M3 without NaN, whose signs are extended: their bits are those of a float32, but for the exponent's bias
inline Floats float8(Ints bytes) {
  const Ints bits = ints_and(ints_left<20>(bytes), ints_all(static_cast<int32_t>(0x87f00000u)));
  return multiply(as_floats(bits), all(1.329227995784916e36f));  // 2^120, exact, of subnormal ones too
}

}  // namespace PQ_SET
