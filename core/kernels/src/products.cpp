// Products of packed weights with activations, and decoding: compiled once for each instruction set.
#include "panels.h"
#include "weights.h"

#define PQ_TEXT_OF(name) #name
#define PQ_TEXT(name) PQ_TEXT_OF(name)
#define PQ_JOIN_OF(a, b) a##b
#define PQ_JOIN(a, b) PQ_JOIN_OF(a, b)

namespace PQ_SET {

constexpr int64_t INPUT_BYTES = 1 << 18;  // of inputs, which stay in a cache of a core while all rows are multiplied with them
constexpr float MOST16 = 32767.0f, MOST8 = 127.0f;

// BLOCK, below: how many neighbouring activations share a scale; 32, or 16 where the weight's groups ask for it.

// ---- activations

template <int64_t BLOCK> float sum_of(const float* x) {
  Floats total = add(load(x), load(x + 8));
  if constexpr (BLOCK == 32) total = add(total, add(load(x + 16), load(x + 24)));
  return sum(total);
}

template <int64_t BLOCK>
void quantize_row16(const float* x, int64_t columns, float most, bool interleaved, int16_t* to, float* scales, float* sums) {
  for (int64_t block = 0; block < columns / BLOCK; block++) {
    const float* from = x + block * BLOCK;
    Floats tops = zero();
    for (int64_t eight = 0; eight < BLOCK; eight += 8) tops = maximum(tops, magnitude(load(from + eight)));
    const float top = largest(tops);
    const Floats factor = all(top > 0 ? most / top : 0.0f);
    scales[block] = top / most;
    sums[block] = sum_of<BLOCK>(from);
    int16_t* out = to + block * BLOCK;
    for (int64_t eight = 0; eight < BLOCK; eight += 8) {
      const Floats scaled = multiply(load(from + eight), factor);
      if (interleaved) store_pairs(out + eight, scaled);
      else store_halves(out + eight, scaled);
    }
  }
}

template <int64_t BLOCK> void quantize_row8(const float* x, int64_t columns, int8_t* to, float* scales, float* sums) {
  for (int64_t block = 0; block < columns / BLOCK; block++) {
    const float* from = x + block * BLOCK;
    float top = 0;
    for (int64_t i = 0; i < BLOCK; i++) top = std::max(top, std::fabs(from[i]));
    const float inverse = top > 0 ? MOST8 / top : 0.0f;
    int32_t total = 0;
    for (int64_t i = 0; i < BLOCK; i++) {
      const auto rounded = static_cast<int32_t>(std::nearbyint(from[i] * inverse));
      to[block * BLOCK + i] = static_cast<int8_t>(rounded);
      total += rounded;
    }
    scales[block] = top / MOST8;
    sums[block] = scales[block] * static_cast<float>(total);  // of the rounded ones, as the codes are multiplied with
  }
}

template <int64_t BLOCK>
void quantize_rows(const pq_weight& w, const float* x, int64_t first, int64_t last, const Activations& to, int how) {
  const int64_t columns = w.columns, blocks = columns / BLOCK;
  for (int64_t row = first; row < last; row++) {
    const float* from = x + row * columns;
    float *scales = to.scales + row * blocks, *sums = to.sums + row * blocks;
    if (how == PQ_INT8_ACTIVATIONS) {
      quantize_row8<BLOCK>(from, columns, to.bytes + row * columns, scales, sums);
    } else if (how == PQ_INT16) {
      const bool book = w.kind == PQ_CODEBOOK4;
      quantize_row16<BLOCK>(from, columns, book ? MOST_LEVEL : MOST16, !book || BOOK_IN_PAIRS, to.halves + row * columns, scales, sums);
    } else {  // exact: the sums alone
      for (int64_t block = 0; block < blocks; block++) sums[block] = sum_of<BLOCK>(from + block * BLOCK);
    }
  }
}

void quantize(const pq_weight& w, const float* x, int64_t first, int64_t last, const Activations& to, int how) {
  if (block_of(w) == 32) quantize_rows<32>(w, x, first, last, to, how);
  else quantize_rows<16>(w, x, first, last, to, how);
}

// ---- one tile: eight rows of the weight, COUNT inputs

struct Inputs {  // of one tile
  const float* x;
  const int16_t* halves;
  const int8_t* bytes;
  const float *scales, *sums;
  int64_t columns;

  Inputs(const float* of, const Activations& a, int64_t row, int64_t columns, int64_t block)
      : x(of + row * columns), halves(a.halves ? a.halves + row * columns : nullptr),
        bytes(a.bytes ? a.bytes + row * columns : nullptr), scales(a.scales + row * (columns / block)),
        sums(a.sums + row * (columns / block)), columns(columns) {}
};

// Sums of integers, one for each input; of a single one in four chains, since each addition waits for the last of its chain.
template <int COUNT> struct Totals {
  Ints first[COUNT];
  Ints second, third, fourth;

  Totals() {
    for (int i = 0; i < COUNT; i++) first[i] = ints_zero();
    second = third = fourth = ints_zero();
  }
  template <int NUMBER> Ints& chain(int input) {
    if constexpr (COUNT > 1 || NUMBER % 4 == 0) return first[input];
    else if constexpr (NUMBER % 4 == 1) return second;
    else if constexpr (NUMBER % 4 == 2) return third;
    else return fourth;
  }
  template <int NUMBER> void add_halves(int input, Ints q, const int16_t* x) {  // x: two, which all lanes are multiplied by
    chain<NUMBER>(input) = dot_halves(chain<NUMBER>(input), q, ints_all(load32(x)));
  }
  template <int NUMBER> void add_bytes(int input, Ints q, const int8_t* x) {  // x: four
    chain<NUMBER>(input) = dot_bytes(chain<NUMBER>(input), q, ints_all(load32(x)));
  }
  Ints of(int input) const {
    if constexpr (COUNT > 1) return first[input];
    else return ints_add(ints_add(first[0], second), ints_add(third, fourth));
  }
};

// Lanes of codes that come after those from `from` on: they lie in the order in which they are read, and a single input leaves
// no time to wait for memory.
template <int64_t LANES> void will_need(const uint32_t* from) {
  constexpr int64_t AHEAD = 1024;  // 4 KiB
  for (int64_t at = 0; at < LANES * 8; at += 16) will_read(from + AHEAD + at);
}

// the sums of a block's integers, with what scales them; OFFSETS: whether groups have zero points or minima
template <int COUNT, bool OFFSETS>
void add_block(
    const Totals<COUNT>& total, const Group& group, const Inputs& in, int64_t block, int64_t blocks,
    Floats (&acc)[COUNT]) {
  for (int i = 0; i < COUNT; i++) {
    const int64_t at = i * blocks + block;
    acc[i] = fused(to_floats(total.of(i)), multiply(group.scale, all(in.scales[at])), acc[i]);
    if constexpr (OFFSETS) acc[i] = fused(group.minimum, all(in.sums[at]), acc[i]);
  }
}

// pairs: what two codes of a lane stand for, as Codes gives them; unit: what those are multiplied by
template <int COUNT, int64_t BLOCK, bool OFFSETS, class Pairs>
void four_bits_int16(
    const uint32_t* codes, const Groups& groups, int64_t per, const Pairs& pairs, float unit, const Inputs& in, Floats (&acc)[COUNT]) {
  const int64_t blocks = in.columns / BLOCK;
  for (int64_t block = 0, at_group = 0; block < blocks; at_group++) {
    Group group = groups.of<OFFSETS>(at_group);
    if constexpr (!OFFSETS) group.scale = multiply(group.scale, all(unit));
    for (const int64_t end = block + per; block < end; block++) {
      Totals<COUNT> total;
      if constexpr (COUNT == 1) will_need<BLOCK / 8>(codes + block * BLOCK);
      for (int64_t j = 0; j < BLOCK / 8; j++) {
        const Ints lanes = ints_load(codes + (block * (BLOCK / 8) + j) * 8);
        const Ints q0 = pairs.template pair<0>(lanes), q1 = pairs.template pair<1>(lanes);
        const Ints q2 = pairs.template pair<2>(lanes), q3 = pairs.template pair<3>(lanes);
        for (int i = 0; i < COUNT; i++) {
          const int16_t* x = in.halves + i * in.columns + block * BLOCK + j * 8;
          total.template add_halves<0>(i, q0, x), total.template add_halves<1>(i, q1, x + 2);
          total.template add_halves<2>(i, q2, x + 4), total.template add_halves<3>(i, q3, x + 6);
        }
      }
      add_block<COUNT, OFFSETS>(total, group, in, block, blocks, acc);
    }
  }
}

template <int COUNT, int64_t BLOCK>
void affine4_int8(const uint32_t* codes, const Groups& groups, int64_t per, const Inputs& in, Floats (&acc)[COUNT]) {
  const Ints mask = ints_all(0x0f0f0f0f);
  const int64_t blocks = in.columns / BLOCK;
  for (int64_t block = 0, at_group = 0; block < blocks; at_group++) {
    const Group group = groups.of<true>(at_group);
    for (const int64_t end = block + per; block < end; block++) {
      Totals<COUNT> total;
      if constexpr (COUNT == 1) will_need<BLOCK / 8>(codes + block * BLOCK);
      for (int64_t j = 0; j < BLOCK / 8; j++) {
        const Ints lanes = ints_load(codes + (block * (BLOCK / 8) + j) * 8);
        const Ints q0 = ints_and(lanes, mask), q1 = ints_and(halves_right<4>(lanes), mask);
        for (int i = 0; i < COUNT; i++) {
          const int8_t* x = in.bytes + i * in.columns + block * BLOCK + j * 8;
          total.template add_bytes<0>(i, q0, x), total.template add_bytes<1>(i, q1, x + 4);
        }
      }
      add_block<COUNT, true>(total, group, in, block, blocks, acc);
    }
  }
}

// exact: eight columns of weights, as floats, times the activations
template <int COUNT>
void eight_columns(const Floats (&q)[8], const float* x, int64_t columns, Floats (&even)[COUNT], Floats (&odd)[COUNT]) {
  for (int i = 0; i < COUNT; i++) {
    const float* at = x + i * columns;
    even[i] = fused(q[0], all(at[0]), even[i]), odd[i] = fused(q[1], all(at[1]), odd[i]);
    even[i] = fused(q[2], all(at[2]), even[i]), odd[i] = fused(q[3], all(at[3]), odd[i]);
    even[i] = fused(q[4], all(at[4]), even[i]), odd[i] = fused(q[5], all(at[5]), odd[i]);
    even[i] = fused(q[6], all(at[6]), even[i]), odd[i] = fused(q[7], all(at[7]), odd[i]);
  }
}

// the sums of a block's floats
template <int COUNT, bool OFFSETS>
void add_floats(
    const Floats (&even)[COUNT], const Floats (&odd)[COUNT], const Group& group, const Inputs& in, int64_t block, int64_t blocks,
    Floats (&acc)[COUNT]) {
  for (int i = 0; i < COUNT; i++) {
    acc[i] = fused(add(even[i], odd[i]), group.scale, acc[i]);
    if constexpr (OFFSETS) acc[i] = fused(group.minimum, all(in.sums[i * blocks + block]), acc[i]);
  }
}

template <int COUNT, int64_t BLOCK>
void affine4_exact(const uint32_t* codes, const Groups& groups, int64_t per, const Inputs& in, Floats (&acc)[COUNT]) {
  const Ints mask = ints_all(15);
  const int64_t blocks = in.columns / BLOCK;
  for (int64_t block = 0, at_group = 0; block < blocks; at_group++) {
    const Group group = groups.of<true>(at_group);
    for (const int64_t end = block + per; block < end; block++) {
      Floats even[COUNT], odd[COUNT];
      for (int i = 0; i < COUNT; i++) even[i] = odd[i] = zero();
      for (int64_t j = 0; j < BLOCK / 8; j++) {
        const Ints lanes = ints_load(codes + (block * (BLOCK / 8) + j) * 8);
        const Floats q[8] = {
            to_floats(ints_and(nibble<0>(lanes), mask)), to_floats(ints_and(nibble<1>(lanes), mask)),
            to_floats(ints_and(nibble<2>(lanes), mask)), to_floats(ints_and(nibble<3>(lanes), mask)),
            to_floats(ints_and(nibble<4>(lanes), mask)), to_floats(ints_and(nibble<5>(lanes), mask)),
            to_floats(ints_and(nibble<6>(lanes), mask)), to_floats(ints_and(nibble<7>(lanes), mask))};
        eight_columns<COUNT>(q, in.x + block * BLOCK + j * 8, in.columns, even, odd);
      }
      add_floats<COUNT, true>(even, odd, group, in, block, blocks, acc);
    }
  }
}

// code books: sixteen columns at a time, since groups of 16 are usual
template <int COUNT>
void codebook4_exact(
    const uint32_t* codes, const Groups& groups, int64_t group_size, const float* levels, const Inputs& in, Floats (&acc)[COUNT]) {
  const Table table(levels);
  for (int64_t sixteen = 0; sixteen < in.columns / 16; sixteen++) {
    Floats even[COUNT], odd[COUNT];
    for (int i = 0; i < COUNT; i++) even[i] = odd[i] = zero();
    for (int64_t j = 0; j < 2; j++) {
      const Ints lanes = ints_load(codes + (sixteen * 2 + j) * 8);
      const Floats q[8] = {
          table.at(nibble<0>(lanes)), table.at(nibble<1>(lanes)), table.at(nibble<2>(lanes)), table.at(nibble<3>(lanes)),
          table.at(nibble<4>(lanes)), table.at(nibble<5>(lanes)), table.at(nibble<6>(lanes)), table.at(nibble<7>(lanes))};
      eight_columns<COUNT>(q, in.x + sixteen * 16 + j * 8, in.columns, even, odd);
    }
    const Floats scale = groups.scale(sixteen * 16 / group_size);
    for (int i = 0; i < COUNT; i++) acc[i] = fused(add(even[i], odd[i]), scale, acc[i]);
  }
}

#if defined(__AVX512BW__)
template <int COUNT, int64_t BLOCK>
void codebook4_int16(
    const uint32_t* codes, const Groups& groups, int64_t per, const float* table, const Inputs& in, Floats (&acc)[COUNT]) {
  const Levels levels(table);
  four_bits_int16<COUNT, BLOCK, false>(codes, groups, per, BookCodes(levels), levels.unit, in, acc);
}
#elif defined(__AVX2__)
template <int COUNT, int64_t BLOCK>
void codebook4_int16(
    const uint32_t* codes, const Groups& groups, int64_t per, const float* table, const Inputs& in, Floats (&acc)[COUNT]) {
  const Levels levels(table);
  const BookBytes book(levels);
  const int64_t blocks = in.columns / BLOCK;
  for (int64_t block = 0, at_group = 0; block < blocks; at_group++) {
    const Floats scale = multiply(groups.scale(at_group), all(levels.unit));
    for (const int64_t end = block + per; block < end; block++) {
      Totals<COUNT> first, second;
      for (int64_t j = 0; j < BLOCK / 8; j++) {
        const Ints lanes = ints_load(codes + (block * (BLOCK / 8) + j) * 8);
        each_code<2>([&](auto number) {
          constexpr int HALF = decltype(number)::value;
          const auto [some, others] = book.fours<HALF>(lanes);
          for (int i = 0; i < COUNT; i++) {
            long long four;
            std::memcpy(&four, in.halves + i * in.columns + block * BLOCK + j * 8 + HALF * 4, 8);
            const Ints x = _mm256_set1_epi64x(four);
            first.template chain<HALF>(i) = dot_halves(first.template chain<HALF>(i), some, x);
            second.template chain<HALF>(i) = dot_halves(second.template chain<HALF>(i), others, x);
          }
        });
      }
      for (int i = 0; i < COUNT; i++)  // first: rows 0, 0, 1, 1 | 4, 4, 5, 5; second: 2, 2, 3, 3 | 6, 6, 7, 7
        acc[i] = fused(
            to_floats(_mm256_hadd_epi32(first.of(i), second.of(i))),
            multiply(scale, all(in.scales[i * blocks + block])), acc[i]);
    }
  }
}
#endif

template <int COUNT, int64_t BLOCK>
void int8_int16(const uint32_t* codes, const Groups& groups, int64_t per, const Inputs& in, Floats (&acc)[COUNT]) {
  const int64_t blocks = in.columns / BLOCK;
  for (int64_t block = 0, at_group = 0; block < blocks; at_group++) {
    const Group group = groups.of<true>(at_group);
    for (const int64_t end = block + per; block < end; block++) {
      Totals<COUNT> total;
      if constexpr (COUNT == 1) will_need<BLOCK / 4>(codes + block * BLOCK * 2);
      for (int64_t j = 0; j < BLOCK / 4; j += 2) {
        const uint32_t* at = codes + (block * (BLOCK / 4) + j) * 8;
        const Ints lanes = ints_load(at), more = ints_load(at + 8);
        const Ints q0 = even_bytes(lanes), q1 = odd_bytes(lanes), q2 = even_bytes(more), q3 = odd_bytes(more);
        for (int i = 0; i < COUNT; i++) {
          const int16_t* x = in.halves + i * in.columns + block * BLOCK + j * 4;  // (0, 2), (1, 3), (4, 6), (5, 7)
          total.template add_halves<0>(i, q0, x), total.template add_halves<1>(i, q1, x + 2);
          total.template add_halves<2>(i, q2, x + 4), total.template add_halves<3>(i, q3, x + 6);
        }
      }
      add_block<COUNT, true>(total, group, in, block, blocks, acc);
    }
  }
}

// number: what a byte, whose sign is extended, stands for
template <int COUNT, int64_t BLOCK, bool OFFSETS, class Number>
void bytes_exact(
    const uint32_t* codes, const Groups& groups, int64_t per, const Inputs& in, const Number& number, Floats (&acc)[COUNT]) {
  const int64_t blocks = in.columns / BLOCK;
  for (int64_t block = 0, at_group = 0; block < blocks; at_group++) {
    const Group group = groups.of<OFFSETS>(at_group);
    for (const int64_t end = block + per; block < end; block++) {
      Floats even[COUNT], odd[COUNT];
      for (int i = 0; i < COUNT; i++) even[i] = odd[i] = zero();
      for (int64_t j = 0; j < BLOCK / 8; j++) {
        const uint32_t* at = codes + (block * (BLOCK / 4) + j * 2) * 8;
        const Ints first = ints_load(at), second = ints_load(at + 8);
        const Floats q[8] = {
            number(byte_of<0>(first)), number(byte_of<1>(first)), number(byte_of<2>(first)), number(byte_of<3>(first)),
            number(byte_of<0>(second)), number(byte_of<1>(second)), number(byte_of<2>(second)), number(byte_of<3>(second))};
        eight_columns<COUNT>(q, in.x + block * BLOCK + j * 8, in.columns, even, odd);
      }
      add_floats<COUNT, OFFSETS>(even, odd, group, in, block, blocks, acc);
    }
  }
}

template <bool HALF> Floats load16(const uint16_t* from) {
  if constexpr (HALF) return load_f16(from);
  else return load_bf16(from);
}

// Row after row, as memory lies, four ahead: a head is larger than any cache, and two rows at once come half as fast. As many
// sums as hide how long each takes.
template <int COUNT, bool HALF> void dense16_exact(const pq_weight& w, int64_t block, const Inputs& in, Floats (&acc)[COUNT]) {
  constexpr int PARTS = 4 / COUNT;
  float sums[COUNT][8];
  for (int row = 0; row < 8; row++) {
    const uint16_t* weights = dense_row(w, block * 8 + row);
    Floats some[PARTS][COUNT];
    for (int part = 0; part < PARTS; part++)
      for (int i = 0; i < COUNT; i++) some[part][i] = zero();
    for (int64_t column = 0; column < in.columns; column += 8 * PARTS) {
      will_read(weights + column + 4 * in.columns);
      for (int part = 0; part < PARTS; part++) {
        const Floats eight = load16<HALF>(weights + column + 8 * part);
        for (int i = 0; i < COUNT; i++)
          some[part][i] = fused(eight, load(in.x + i * in.columns + column + 8 * part), some[part][i]);
      }
    }
    for (int i = 0; i < COUNT; i++) {
      Floats whole = some[0][i];
      for (int part = 1; part < PARTS; part++) whole = add(whole, some[part][i]);
      sums[i][row] = sum(whole);
    }
  }
  for (int i = 0; i < COUNT; i++) acc[i] = load(sums[i]);
}

template <int COUNT, int64_t BLOCK>
void tile(const pq_weight& w, int64_t block, const Inputs& in, float* y, int how) {
  const Groups groups(w, block);
  const uint32_t* codes = w.codes + block * w.columns * (is_wide(w) ? 2 : 1);
  const int64_t per = w.group / BLOCK;
  Floats acc[COUNT];
  for (int i = 0; i < COUNT; i++) acc[i] = zero();
  if (w.kind == PQ_CODEBOOK4) {
#if defined(__AVX2__)
    if (how == PQ_INT16) codebook4_int16<COUNT, BLOCK>(codes, groups, per, w.table, in, acc);
    else
#endif
      codebook4_exact<COUNT>(codes, groups, w.group, w.table, in, acc);
  } else if (w.kind == PQ_DENSE16) {
    if (w.scale_type == PQ_FLOAT16) dense16_exact<COUNT, true>(w, block, in, acc);
    else dense16_exact<COUNT, false>(w, block, in, acc);
  } else if (w.kind == PQ_FLOAT8) {
    bytes_exact<COUNT, BLOCK, false>(codes, groups, per, in, float8, acc);
  } else if (w.kind == PQ_INT8) {
    if (how == PQ_EXACT) bytes_exact<COUNT, BLOCK, true>(codes, groups, per, in, to_floats, acc);
    else int8_int16<COUNT, BLOCK>(codes, groups, per, in, acc);
  } else if (how == PQ_EXACT) {
    affine4_exact<COUNT, BLOCK>(codes, groups, per, in, acc);
  } else if (how == PQ_INT16) {
    four_bits_int16<COUNT, BLOCK, true>(codes, groups, per, Codes(), 1.0f, in, acc);
  } else {
    affine4_int8<COUNT, BLOCK>(codes, groups, per, in, acc);
  }
  for (int i = 0; i < COUNT; i++) store(y + i * w.rows, acc[i]);
}

template <int64_t BLOCK>
void tiles(const pq_weight& w, const float* x, const Activations& a, int64_t count, int64_t first, int64_t last, float* y, int how) {
  // of many inputs so many at once, as integers or as floats
  const int64_t held = std::max<int64_t>(4, INPUT_BYTES / (w.columns * (how == PQ_EXACT ? 4 : 2)) / 4 * 4);
  for (int64_t from = 0; from < count; from += held) {
    const int64_t to = std::min(count, from + held);
    for (int64_t block = first; block < last; block++) {
      int64_t row = from;
      const auto run = [&](auto number) {
        constexpr int COUNT = decltype(number)::value;
        for (; row + COUNT <= to; row += COUNT)
          tile<COUNT, BLOCK>(w, block, Inputs(x, a, row, w.columns, BLOCK), y + row * w.rows + block * 8, how);
      };
      run(std::integral_constant<int, 4>()), run(std::integral_constant<int, 2>()), run(std::integral_constant<int, 1>());
    }
  }
}

void multiply_all(
    const pq_weight& w, const float* x, const Activations& a, int64_t count, int64_t first, int64_t last, float* y, int how) {
  if (count >= MANY && multiply_by_panels(w, a, count, first, last, y, how)) return;
  if (block_of(w) == 32) tiles<32>(w, x, a, count, first, last, y, how);
  else tiles<16>(w, x, a, count, first, last, y, how);
}

// ---- decoding

void to_float32(const void* from, int type, int64_t count, float* to) {
  const auto* halves = static_cast<const uint16_t*>(from);
  int64_t at = 0;
  for (; at + 8 <= count; at += 8) store(to + at, type == PQ_FLOAT16 ? load_f16(halves + at) : load_bf16(halves + at));
  if (at == count) return;
  uint16_t rest[8] = {};
  float out[8];
  std::memcpy(rest, halves + at, static_cast<size_t>(count - at) * 2);
  store(out, type == PQ_FLOAT16 ? load_f16(rest) : load_bf16(rest));
  std::memcpy(to + at, out, static_cast<size_t>(count - at) * 4);
}

void decode_block(const pq_weight& w, int64_t block, float* out) {
  const Groups groups(w, block);
  const Ints mask = ints_all(15);
  float lanes_of[8];
  const auto put = [&](int64_t column, Floats value) {
    store(lanes_of, value);
    for (int64_t row = 0; row < 8; row++) out[row * w.columns + column] = lanes_of[row];
  };
  if (w.kind == PQ_DENSE16) {
    to_float32(dense_row(w, block * 8), w.scale_type, 8 * w.columns, out);
    return;
  }
  if (is_wide(w)) {
    const uint32_t* codes = w.codes + block * w.columns * 2;
    for (int64_t column = 0; column < w.columns; column += 4) {
      const Ints lanes = ints_load(codes + column * 2);
      const int64_t group = column / w.group;
      each_code<4>([&](auto number) {
        constexpr int T = decltype(number)::value;
        const Ints code = byte_of<T>(lanes);
        put(column + T, w.kind == PQ_FLOAT8 ? multiply(groups.scale(group), float8(code)) : groups.weights(group, to_floats(code)));
      });
    }
    return;
  }
  const uint32_t* codes = w.codes + block * w.columns;
  const float none[16] = {};
  const Table table(w.kind == PQ_CODEBOOK4 ? w.table : none);
  for (int64_t column = 0; column < w.columns; column += 8) {
    const Ints lanes = ints_load(codes + column);
    const int64_t group = column / w.group;
    each_code<8>([&](auto number) {
      constexpr int T = decltype(number)::value;
      if (w.kind == PQ_CODEBOOK4) put(column + T, multiply(groups.scale(group), table.at(nibble<T>(lanes))));
      else put(column + T, groups.weights(group, to_floats(ints_and(nibble<T>(lanes), mask))));
    });
  }
}

// with the arithmetic of the whole block: its lane is the row
void decode_row(const pq_weight& w, int64_t row, float* out) {
  const Groups groups(w, row / 8);
  const bool wide = is_wide(w);
  const uint32_t* codes = w.codes + row / 8 * w.columns * (wide ? 2 : 1) + row % 8;
  float eight[8];
  if (w.kind == PQ_DENSE16) {
    to_float32(dense_row(w, row), w.scale_type, w.columns, out);
    return;
  }
  for (int64_t column = 0; column < w.columns; column++) {
    const int64_t t = column % (wide ? 4 : 8);
    const uint32_t code = codes[column / (wide ? 4 : 8) * 8] >> (t % 4 * 8 + t / 4 * 4);
    const int64_t group = column / w.group;
    if (w.kind == PQ_CODEBOOK4) store(eight, multiply(groups.scale(group), all(w.table[code & 15])));
    else if (w.kind == PQ_FLOAT8) store(eight, multiply(groups.scale(group), float8(ints_all(static_cast<int8_t>(code & 255)))));
    else store(eight, groups.weights(group, all(wide ? static_cast<float>(static_cast<int8_t>(code & 255)) : static_cast<float>(code & 15))));
    out[column] = eight[row % 8];
  }
}

// ---- other types of activations

inline uint16_t to_f16(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (bits < 0x38800000u) {                                              // subnormal: let the processor round
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    const float shifted = magnitude + 0.5f;  // one unit of 0.5f's last place is 2^-24
    uint32_t rounded;
    std::memcpy(&rounded, &shifted, 4);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

void from_float32(const float* from, int type, int64_t count, void* to) {
  auto* out = static_cast<uint16_t*>(to);
  if (type == PQ_BFLOAT16)
    for (int64_t i = 0; i < count; i++) out[i] = to_bf16(from[i]);
  else
    for (int64_t i = 0; i < count; i++) out[i] = to_f16(from[i]);
}

}  // namespace PQ_SET

namespace PQ_SET {  // steps.cpp
void normalize(const pq_norm&, const float*, int64_t, float*);
void activate(float*, const float*, int64_t, int);
void attend(const float*, const float*, const float*, int64_t, int64_t, int64_t, float, float, const float*, float*, float*);
void turn(const float*, int64_t, int64_t, float*, int64_t);
void attend_all(const Queries&, const float*, int64_t, const float*, int64_t, int64_t, float, float, const float*);
}  // namespace PQ_SET

extern const Set PQ_JOIN(PQ_SET, _set);
const Set PQ_JOIN(PQ_SET, _set) = {
    PQ_TEXT(PQ_SET), PQ_SET::quantize, PQ_SET::multiply_all, PQ_SET::decode_block,
    PQ_SET::decode_row, PQ_SET::to_float32, PQ_SET::from_float32, PQ_SET::normalize, PQ_SET::activate, PQ_SET::attend,
    PQ_SET::turn, PQ_SET::attend_all,
};
