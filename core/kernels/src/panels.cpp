// Products of many inputs with activations of 16 bits. Rows of the weight are decoded into a panel of integers that stays in
// the caches of a core while all inputs are multiplied with it. Sums are made in the order of the tiles of products.cpp.
#include "panels.h"

#include "weights.h"

namespace PQ_SET {

constexpr int64_t PANEL_ROWS = 32, PANEL_COLUMNS = 1024;

// ---- as many lanes as a register has

#if defined(__AVX512BW__)
using WideInts = __m512i;
using WideFloats = __m512;
constexpr int64_t LANES = 16;
constexpr int VECTORS = 2, INPUTS = 6;  // of a tile: registers of rows, and inputs: twelve sums of each kind

inline WideInts wide_none() { return _mm512_setzero_si512(); }
inline WideInts wide_load(const int16_t* from) { return _mm512_loadu_si512(from); }
inline WideInts wide_all(int32_t value) { return _mm512_set1_epi32(value); }
inline WideInts wide_dot(WideInts sum, WideInts a, WideInts b) { return _mm512_dpwssd_epi32(sum, a, b); }
// under a whole mask, which costs nothing: GCC 12 warns of the plain one
inline WideFloats wide_floats(WideInts a) { return _mm512_maskz_cvtepi32_ps(0xffff, a); }
inline WideFloats wide_load(const float* from) { return _mm512_loadu_ps(from); }
inline WideFloats wide_zero() { return _mm512_setzero_ps(); }
inline WideFloats wide_all(float value) { return _mm512_set1_ps(value); }
inline WideFloats wide_multiply(WideFloats a, WideFloats b) { return _mm512_mul_ps(a, b); }
inline WideFloats wide_fused(WideFloats a, WideFloats b, WideFloats c) { return _mm512_fmadd_ps(a, b, c); }
inline void wide_store(float* to, WideFloats value) { _mm512_storeu_ps(to, value); }
#else
using WideInts = Ints;
using WideFloats = Floats;
constexpr int64_t LANES = 8;
constexpr int VECTORS = 1, INPUTS = 6;

inline WideInts wide_none() { return ints_zero(); }
inline WideInts wide_load(const int16_t* from) { return ints_load(from); }
inline WideInts wide_all(int32_t value) { return ints_all(value); }
inline WideInts wide_dot(WideInts sum, WideInts a, WideInts b) { return dot_halves(sum, a, b); }
inline WideFloats wide_floats(WideInts a) { return to_floats(a); }
inline WideFloats wide_load(const float* from) { return load(from); }
inline WideFloats wide_zero() { return zero(); }
inline WideFloats wide_all(float value) { return all(value); }
inline WideFloats wide_multiply(WideFloats a, WideFloats b) { return multiply(a, b); }
inline WideFloats wide_fused(WideFloats a, WideFloats b, WideFloats c) { return fused(a, b, c); }
inline void wide_store(float* to, WideFloats value) { store(to, value); }
#endif

constexpr int64_t STRIP = LANES * VECTORS;  // rows of a tile

// ---- a panel

// Of PANEL_ROWS rows and at most PANEL_COLUMNS columns. Halves: strip after strip, in each of them pairs of columns, of each of
// these the rows of the strip. What scales them: for each block of columns all rows.
struct Panel {
  alignas(64) int16_t halves[PANEL_ROWS * PANEL_COLUMNS];
  alignas(64) float scales[PANEL_ROWS * PANEL_COLUMNS / 16];
  alignas(64) float minima[PANEL_ROWS * PANEL_COLUMNS / 16];
  int64_t columns;

  int16_t* strip(int64_t number) { return halves + number * STRIP * columns; }
  const int16_t* strip(int64_t number) const { return halves + number * STRIP * columns; }
};

// each: puts eight columns of eight rows, which begin at its codes, as four pairs; in the order of the activations
struct AffineHalves {
  static constexpr int64_t LANES_OF_EIGHT = 1;
  Codes codes;
  void put(const uint32_t* from, int16_t* to) const {
    const Ints lanes = ints_load(from);
    ints_store(to, codes.pair<0>(lanes)), ints_store(to + 2 * STRIP, codes.pair<1>(lanes));
    ints_store(to + 4 * STRIP, codes.pair<2>(lanes)), ints_store(to + 6 * STRIP, codes.pair<3>(lanes));
  }
};

struct ByteHalves {
  static constexpr int64_t LANES_OF_EIGHT = 2;
  void put(const uint32_t* from, int16_t* to) const {
    const Ints lanes = ints_load(from), more = ints_load(from + 8);
    ints_store(to, even_bytes(lanes)), ints_store(to + 2 * STRIP, odd_bytes(lanes));
    ints_store(to + 4 * STRIP, even_bytes(more)), ints_store(to + 6 * STRIP, odd_bytes(more));
  }
};

#if defined(__AVX512BW__)
struct BookHalves {
  static constexpr int64_t LANES_OF_EIGHT = 1;
  BookCodes codes;
  explicit BookHalves(const Levels& levels) : codes(levels) {}
  void put(const uint32_t* from, int16_t* to) const {
    const Ints lanes = ints_load(from);
    ints_store(to, codes.pair<0>(lanes)), ints_store(to + 2 * STRIP, codes.pair<1>(lanes));
    ints_store(to + 4 * STRIP, codes.pair<2>(lanes)), ints_store(to + 6 * STRIP, codes.pair<3>(lanes));
  }
};
#elif defined(__AVX2__)
struct BookHalves {
  static constexpr int64_t LANES_OF_EIGHT = 1;
  BookBytes bytes;
  explicit BookHalves(const Levels& levels) : bytes(levels) {}
  template <int HALF> void put_half(Ints lanes, int16_t* to) const {
    const auto [some, others] = bytes.fours<HALF>(lanes);
    const __m256 a = _mm256_castsi256_ps(some), b = _mm256_castsi256_ps(others);
    ints_store(to, _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)));
    ints_store(to + 2 * STRIP, _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)));
  }
  void put(const uint32_t* from, int16_t* to) const {
    const Ints lanes = ints_load(from);
    put_half<0>(lanes, to), put_half<1>(lanes, to + 4 * STRIP);
  }
};
#endif

// columns [from, from + panel.columns) of `blocks` blocks of eight rows; the other rows of the panel are zero
template <int64_t BLOCK, bool OFFSETS, class Halves>
void fill(Panel& panel, const pq_weight& w, int64_t block, int64_t blocks, int64_t from, float unit, const Halves& halves) {
  for (int64_t eight = 0; eight < PANEL_ROWS / 8; eight++) {
    int16_t* to = panel.strip(eight * 8 / STRIP) + eight * 8 % STRIP * 2;
    if (eight >= blocks) {
      for (int64_t pair = 0; pair < panel.columns / 2; pair++) ints_store(to + pair * 2 * STRIP, ints_zero());
      for (int64_t part = 0; part < panel.columns / BLOCK; part++) {
        store(panel.scales + part * PANEL_ROWS + eight * 8, zero());
        store(panel.minima + part * PANEL_ROWS + eight * 8, zero());
      }
      continue;
    }
    const uint32_t* codes = w.codes + ((block + eight) * w.columns + from) * Halves::LANES_OF_EIGHT;
    for (int64_t column = 0; column < panel.columns; column += 8)
      halves.put(codes + column * Halves::LANES_OF_EIGHT, to + column * STRIP);
    const Groups groups(w, block + eight);
    for (int64_t part = 0; part < panel.columns / BLOCK; part++) {
      const Group group = groups.of<OFFSETS>((from + part * BLOCK) / w.group);
      store(panel.scales + part * PANEL_ROWS + eight * 8, multiply(group.scale, all(unit)));
      store(panel.minima + part * PANEL_ROWS + eight * 8, group.minimum);
    }
  }
}

// ---- a tile: a strip of rows, COUNT inputs

struct Some {  // of the inputs, from a panel's columns on
  const int16_t* halves;
  const float *scales, *sums;
  int64_t columns, blocks;  // from one input to the next
};

template <int COUNT, int64_t BLOCK, bool OFFSETS>
void tile(const Panel& panel, int64_t strip, const Some& in, bool first, float* y, int64_t rows) {
  WideFloats acc[COUNT][VECTORS];
  for (int i = 0; i < COUNT; i++)
    for (int v = 0; v < VECTORS; v++) acc[i][v] = first ? wide_zero() : wide_load(y + i * rows + v * LANES);
  const int16_t* weights = panel.strip(strip);
  const float *scales = panel.scales + strip * STRIP, *minima = panel.minima + strip * STRIP;
  for (int64_t block = 0; block < panel.columns / BLOCK; block++) {
    WideInts total[COUNT][VECTORS];
    for (int i = 0; i < COUNT; i++)
      for (int v = 0; v < VECTORS; v++) total[i][v] = wide_none();
    for (int64_t pair = 0; pair < BLOCK / 2; pair++, weights += 2 * STRIP) {
      WideInts q[VECTORS];
      for (int v = 0; v < VECTORS; v++) q[v] = wide_load(weights + 2 * v * LANES);
      for (int i = 0; i < COUNT; i++) {
        const WideInts x = wide_all(load32(in.halves + i * in.columns + block * BLOCK + pair * 2));
        for (int v = 0; v < VECTORS; v++) total[i][v] = wide_dot(total[i][v], q[v], x);
      }
    }
    for (int v = 0; v < VECTORS; v++) {
      const WideFloats scale = wide_load(scales + block * PANEL_ROWS + v * LANES);
      for (int i = 0; i < COUNT; i++) {
        const WideFloats own = wide_multiply(scale, wide_all(in.scales[i * in.blocks + block]));
        acc[i][v] = wide_fused(wide_floats(total[i][v]), own, acc[i][v]);
        if constexpr (OFFSETS)
          acc[i][v] = wide_fused(
              wide_load(minima + block * PANEL_ROWS + v * LANES), wide_all(in.sums[i * in.blocks + block]), acc[i][v]);
      }
    }
  }
  for (int i = 0; i < COUNT; i++)
    for (int v = 0; v < VECTORS; v++) wide_store(y + i * rows + v * LANES, acc[i][v]);
}

template <int64_t BLOCK, bool OFFSETS, class Halves>
void all_panels(
    const pq_weight& w, const Activations& a, int64_t count, int64_t first, int64_t last, float* y, float unit, const Halves& halves) {
  Panel panel;
  const int64_t panels = (w.columns + PANEL_COLUMNS - 1) / PANEL_COLUMNS, each = (w.columns / panels + 31) / 32 * 32;  // alike
  for (int64_t block = first; block < last; block += PANEL_ROWS / 8) {
    const int64_t blocks = std::min(last - block, PANEL_ROWS / 8);
    for (int64_t from = 0; from < w.columns; from += panel.columns) {
      panel.columns = std::min(w.columns - from, each);
      fill<BLOCK, OFFSETS>(panel, w, block, blocks, from, unit, halves);
      int64_t input = 0;
      const auto run = [&](auto number) {
        constexpr int COUNT = decltype(number)::value;
        for (; input + COUNT <= count; input += COUNT) {
          const int64_t at = input * w.columns + from;
          const Some in{a.halves + at, a.scales + at / BLOCK, a.sums + at / BLOCK, w.columns, w.columns / BLOCK};
          for (int64_t strip = 0; strip * STRIP < blocks * 8; strip++) {
            float* to = y + input * w.rows + block * 8 + strip * STRIP;
            const int64_t whole = std::min(STRIP, blocks * 8 - strip * STRIP);
            if (whole == STRIP) {
              tile<COUNT, BLOCK, OFFSETS>(panel, strip, in, from == 0, to, w.rows);
              continue;
            }
            float own[COUNT * STRIP] = {};  // the last rows, and what lies behind them in the panel
            for (int64_t i = 0; i < COUNT && from; i++) std::memcpy(own + i * STRIP, to + i * w.rows, static_cast<size_t>(whole) * 4);
            tile<COUNT, BLOCK, OFFSETS>(panel, strip, in, from == 0, own, STRIP);
            for (int64_t i = 0; i < COUNT; i++) std::memcpy(to + i * w.rows, own + i * STRIP, static_cast<size_t>(whole) * 4);
          }
        }
      };
      run(std::integral_constant<int, INPUTS>()), run(std::integral_constant<int, 2>()), run(std::integral_constant<int, 1>());
    }
  }
}

bool multiply_by_panels(
    const pq_weight& w, const Activations& a, int64_t count, int64_t first, int64_t last, float* y, int how) {
  if (how != PQ_INT16) return false;
#if defined(__AVX2__)
  if (w.kind == PQ_CODEBOOK4) {
    const Levels levels(w.table);
    all_panels<32, false>(w, a, count, first, last, y, levels.unit, BookHalves(levels));
    return true;
  }
#endif
  const auto run = [&](const auto& halves) {
    if (block_of(w) == 32) all_panels<32, true>(w, a, count, first, last, y, 1.0f, halves);
    else all_panels<16, true>(w, a, count, first, last, y, 1.0f, halves);
  };
  if (w.kind == PQ_AFFINE4) run(AffineHalves());
  else if (w.kind == PQ_INT8) run(ByteHalves());
  else return false;
  return true;
}

}  // namespace PQ_SET
