#include "product.h"

#include <algorithm>

#include "threads.h"

namespace {

constexpr int64_t WORTH_SHARING = 131072;  // multiplications in a piece: below, waking a thread costs more than it brings
constexpr int64_t WHOLE = 4;              // blocks of rows that many inputs are multiplied with together
constexpr int64_t PIECES_EACH = 4;        // pieces for each thread: one that is late leaves its pieces to the others

// how a weight is really multiplied: only codes from 0 to 15 have products of 8 bits, and code books none of blocks of 16
int how_for(const pq_weight& w, int32_t asked) {
  if (w.kind == PQ_FLOAT8 || w.kind == PQ_DENSE16) return PQ_EXACT;
  if (w.kind == PQ_CODEBOOK4 && block_of(w) == 16) return PQ_EXACT;
  return asked == PQ_INT8_ACTIVATIONS && w.kind != PQ_AFFINE4 ? PQ_INT16 : asked;
}

bool same_activations(const pq_weight& a, const pq_weight& b, int32_t asked) {
  return how_for(a, asked) == how_for(b, asked) && block_of(a) == block_of(b) && a.order == b.order &&
         a.column_scales == b.column_scales && (a.kind == PQ_CODEBOOK4) == (b.kind == PQ_CODEBOOK4);
}

// the inputs, scaled, in the order of the weight's columns
const float* ordered(const pq_weight& w, const float* x, int64_t count, Room& room) {
  if (!w.order && !w.column_scales) return x;
  float* to = at_least(room.ordered, count * w.columns);
  for (int64_t input = 0; input < count; input++)
    for (int64_t column = 0; column < w.columns; column++) {
      const int64_t from = w.order ? w.order[column] : column;
      to[input * w.columns + column] = x[input * w.columns + from] * (w.column_scales ? w.column_scales[from] : 1.0f);
    }
  return to;
}

Activations quantized(const Set& set, const pq_weight& w, const float* x, int64_t count, int how, int32_t threads, Room& room) {
  const int64_t blocks = w.columns / block_of(w);
  const Activations a{
      how == PQ_INT16 ? at_least(room.halves, count * w.columns) : nullptr,
      how == PQ_INT8_ACTIVATIONS ? at_least(room.bytes, count * w.columns) : nullptr,
      at_least(room.scales, count * blocks), at_least(room.sums, count * blocks)};
  if (count <= 4) set.quantize(w, x, 0, count, a, how);
  else
    share((count + 3) / 4, threads, [&](int64_t piece) {
      set.quantize(w, x, piece * 4, std::min(count, piece * 4 + 4), a, how);
    });
  return a;
}

}  // namespace

void multiply(
    const Set& set, const Product* products, int some, const float* x, int64_t count, int32_t activations, int32_t threads,
    Room& room) {
  while (some > 0) {
    const pq_weight& first = *products->weight;
    int together = 1;
    int64_t blocks = first.rows / 8;
    while (together < some && same_activations(first, *products[together].weight, activations))
      blocks += products[together++].weight->rows / 8;
    const int how = how_for(first, activations);
    const float* inputs = ordered(first, x, count, room);
    const Activations a = quantized(set, first, inputs, count, how, threads, room);
    const int64_t least = std::max<int64_t>(1, WORTH_SHARING / (8 * first.columns * count));
    int64_t pieces = std::clamp<int64_t>(blocks / least, 1, threads * PIECES_EACH);
    if (pieces > threads) pieces -= pieces % threads;  // as many for each thread
    int64_t each = (blocks + pieces - 1) / pieces;
    if (count > 4) each = (each + WHOLE - 1) / WHOLE * WHOLE;
    share((blocks + each - 1) / each, threads, [&](int64_t piece) {
      int64_t from = piece * each, to = std::min(blocks, from + each);
      for (int i = 0; i < together && to > 0; i++) {
        const Product& own = products[i];
        const pq_weight& w = *own.weight;
        const int64_t last = std::min(to, w.rows / 8);
        if (from < last) {
          set.multiply(w, inputs, a, count, from, last, own.y, how);
          for (int64_t input = 0; own.bias && input < count; input++)
            for (int64_t row = from * 8; row < last * 8; row++) own.y[input * w.rows + row] += own.bias[row];
        }
        from = std::max<int64_t>(0, from - w.rows / 8);
        to -= w.rows / 8;
      }
    });
    products += together;
    some -= together;
  }
}
