// Packed weights as products read them: scales, and what codes stand for. Compiled once for each instruction set.
#pragma once
#include <algorithm>
#include <type_traits>

#include "lanes.h"
#include "sets.h"

namespace PQ_SET {

constexpr float MOST_LEVEL = 8191.0f;  // of a code book's levels as integers: 32 products with 8191 stay below 2^31

#if defined(__AVX512BW__)
constexpr bool BOOK_IN_PAIRS = true;  // whether activations of code books lie as those of other codes
#else
constexpr bool BOOK_IN_PAIRS = false;
#endif

inline bool is_wide(const pq_weight& w) { return w.kind == PQ_INT8 || w.kind == PQ_FLOAT8; }  // codes of 8 bits

// a row of a weight that lies row after row
inline const uint16_t* dense_row(const pq_weight& w, int64_t row) {
  return reinterpret_cast<const uint16_t*>(w.codes) + row * w.columns;
}

// ---- scales and what stands beside them: of eight rows at once

struct Group {
  Floats scale, minimum;
};

struct Groups {  // of one block of eight rows
  const void* scales;
  const int8_t* zeros;
  const void* minima;
  const uint16_t *outer_scales, *outer_minima;
  Floats of_rows;  // of E4M3
  int64_t inner;  // groups that share an outer scale
  int32_t type;
  float zero;

  template <bool OFFSETS> Group of(int64_t group) const {
    if constexpr (OFFSETS) return at(group);
    else return {scale(group), PQ_SET::zero()};
  }

  Groups(const pq_weight& w, int64_t block) : type(w.scale_type), zero(w.zero) {
    const int64_t before = block * (w.columns / w.group) * 8;
    const bool nested = type == PQ_NESTED;
    const int64_t bytes = nested || type >= PQ_E4M3 ? 1 : type == PQ_FLOAT32 ? 4 : 2;
    scales = w.scales ? static_cast<const char*>(w.scales) + before * bytes : nullptr;
    of_rows = w.row_scales ? load(w.row_scales + block * 8) : all(1.0f);
    zeros = w.zeros ? w.zeros + before : nullptr;
    minima = w.minima ? static_cast<const char*>(w.minima) + before * (nested ? 1 : 4) : nullptr;
    inner = nested ? w.outer_group / w.group : 1;
    const int64_t outer = nested ? block * (w.columns / w.outer_group) * 8 : 0;
    outer_scales = w.outer_scales ? w.outer_scales + outer : nullptr;
    outer_minima = w.outer_minima ? w.outer_minima + outer : nullptr;
  }
  Floats of_outer(const void* bytes, const uint16_t* halves, int64_t group) const {
    const auto outer = static_cast<uint32_t>(group) / static_cast<uint32_t>(inner);  // half the time of 64 bits
    return multiply(load_i8(static_cast<const int8_t*>(bytes) + group * 8), load_f16(halves + int64_t{outer} * 8));
  }
  Floats minimum(int64_t group) const {
    return outer_minima ? of_outer(minima, outer_minima, group) : load(static_cast<const float*>(minima) + group * 8);
  }
  Floats scale(int64_t group) const {
    if (type >= PQ_E4M3) {
      const Floats own = float8(load_bytes(static_cast<const int8_t*>(scales) + group * 8));
      return type == PQ_E4M3 ? multiply(own, of_rows) : divide(own, of_rows);
    }
    if (type == PQ_NESTED) return of_outer(scales, outer_scales, group);
    if (type == PQ_FLOAT32) return load(static_cast<const float*>(scales) + group * 8);
    const auto* halves = static_cast<const uint16_t*>(scales) + group * 8;
    return type == PQ_FLOAT16 ? load_f16(halves) : load_bf16(halves);
  }
  Floats zero_point(int64_t group) const { return zeros ? load_i8(zeros + group * 8) : all(zero); }
  Group at(int64_t group) const {
    const Floats own = scale(group);
    if (minima) return {own, minimum(group)};
    return {own, multiply(own, subtract(PQ_SET::zero(), zero_point(group)))};
  }
  // the weights of codes, as the format defines them: each in at most two roundings
  Floats weights(int64_t group, Floats codes) const {
    if (minima) return fused(scale(group), codes, minimum(group));
    return multiply(scale(group), subtract(codes, zero_point(group)));
  }
};

// calls one(integral constant) for the codes of a lane
template <int COUNT, class One> void each_code(const One& one) {
  one(std::integral_constant<int, 0>()), one(std::integral_constant<int, 1>());
  if constexpr (COUNT > 2) one(std::integral_constant<int, 2>()), one(std::integral_constant<int, 3>());
  if constexpr (COUNT == 8) {
    one(std::integral_constant<int, 4>()), one(std::integral_constant<int, 5>());
    one(std::integral_constant<int, 6>()), one(std::integral_constant<int, 7>());
  }
}

template <int T> Ints nibble(Ints lanes) {
  constexpr int SHIFT = (T % 4) * 8 + (T / 4) * 4;
  return ints_right<SHIFT>(lanes);
}

template <int T> Ints byte_of(Ints lanes) { return ints_right_signed<24>(ints_left<24 - 8 * T>(lanes)); }

// ---- codes as integers of 16 bits

// two codes of each lane in its halves: number 0 to 3 are codes 0 and 2, 1 and 3, 4 and 6, 5 and 7
struct Codes {
  Ints mask = ints_all(0x000f000f);
  template <int NUMBER> Ints pair(Ints lanes) const {
    if constexpr (NUMBER == 0) return ints_and(lanes, mask);
    else if constexpr (NUMBER == 1) return ints_and(halves_right<8>(lanes), mask);
    else if constexpr (NUMBER == 2) return ints_and(halves_right<4>(lanes), mask);
    else return halves_right<12>(lanes);
  }
};

// the same of a lane of 8-bit codes, which are signed: codes 0 and 2, and 1 and 3
inline Ints even_bytes(Ints lanes) { return halves_right_signed<8>(halves_left<8>(lanes)); }
inline Ints odd_bytes(Ints lanes) { return halves_right_signed<8>(lanes); }

#if defined(__AVX2__)
// Levels of 14 bits times activations of 14 bits: the sums are exact.
struct Levels {
  int16_t of[16];
  float unit;

  explicit Levels(const float* levels) {
    float top = 0;
    for (int i = 0; i < 16; i++) top = std::max(top, std::fabs(levels[i]));
    unit = top > 0 ? top / MOST_LEVEL : 1.0f;
    for (int i = 0; i < 16; i++) of[i] = static_cast<int16_t>(std::nearbyint(levels[i] / unit));
  }
};

#if defined(__AVX512BW__)
struct BookCodes {  // as Codes; a shuffle of halves looks sixteen levels up, by the lowest four bits of each
  __m256i levels;
  explicit BookCodes(const Levels& of) : levels(ints_load(of.of)) {}
  template <int NUMBER> Ints pair(Ints lanes) const {
    if constexpr (NUMBER == 0) return _mm256_permutexvar_epi16(lanes, levels);
    else return _mm256_permutexvar_epi16(halves_right<NUMBER == 1 ? 8 : NUMBER == 2 ? 4 : 12>(lanes), levels);
  }
};
#else
struct BookBytes {  // two shuffles of bytes look sixteen levels up
  Ints lows, highs, mask = ints_all(0x0f0f0f0f);
  explicit BookBytes(const Levels& levels) {
    alignas(32) uint8_t low[32], high[32];
    for (int i = 0; i < 32; i++) {
      const auto level = static_cast<uint16_t>(levels.of[i % 16]);
      low[i] = static_cast<uint8_t>(level & 255), high[i] = static_cast<uint8_t>(level >> 8);
    }
    lows = ints_load(low), highs = ints_load(high);
  }
  struct Fours {
    Ints some, others;
  };
  // codes 0 to 3 of each lane, or 4 to 7: of rows 0, 1 | 4, 5, and of 2, 3 | 6, 7
  template <int HALF> Fours fours(Ints lanes) const {
    const Ints index = ints_and(HALF ? halves_right<4>(lanes) : lanes, mask);
    const Ints l = _mm256_shuffle_epi8(lows, index), h = _mm256_shuffle_epi8(highs, index);
    return {_mm256_unpacklo_epi8(l, h), _mm256_unpackhi_epi8(l, h)};
  }
};
#endif
#endif

}  // namespace PQ_SET
