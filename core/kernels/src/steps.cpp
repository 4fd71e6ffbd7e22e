// What a decoder layer does beside its products, for one token: compiled once for each instruction set.
#include <algorithm>

#include "lanes.h"
#include "sets.h"

namespace PQ_SET {

inline float dot(const float* a, const float* b, int64_t count) {
  Floats even = zero(), odd = zero();
  int64_t at = 0;
  for (; at + 16 <= count; at += 16) {
    even = fused(load(a + at), load(b + at), even);
    odd = fused(load(a + at + 8), load(b + at + 8), odd);
  }
  float total = sum(add(even, odd));
  for (; at < count; at++) total += a[at] * b[at];
  return total;
}

// e to the power of each, to 2 units of the last place from -87 to 88; less gives 0, more the value at 88
inline Floats exponential(Floats x) {
  const Floats held = minimum(maximum(x, all(-87.0f)), all(88.0f));
  const Ints power = to_ints(multiply(held, all(1.44269504f)));
  const Floats turns = to_floats(power);
  Floats rest = fused(turns, all(-0.693359375f), held);  // log 2 in two parts
  rest = fused(turns, all(2.12194440e-4f), rest);
  Floats value = all(1.9875691500e-4f);
  value = fused(value, rest, all(1.3981999507e-3f));
  value = fused(value, rest, all(8.3334519073e-3f));
  value = fused(value, rest, all(4.1665795894e-2f));
  value = fused(value, rest, all(1.6666665459e-1f));
  value = fused(value, rest, all(5.0000001201e-1f));
  value = add(fused(value, multiply(rest, rest), rest), all(1.0f));
  return multiply(value, as_floats(ints_left<23>(ints_add(power, ints_all(127)))));
}

// to = x / root mean square of x * (weight + extra); weight may be null
void normalize(const pq_norm& norm, const float* x, int64_t count, float* to) {
  const float scale = 1.0f / std::sqrt(dot(x, x, count) / static_cast<float>(count) + norm.epsilon);
  for (int64_t i = 0; i < count; i++) to[i] = x[i] * scale * (norm.weight ? norm.weight[i] + norm.extra : 1.0f);
}

// gate = activation(gate) * up; count: a multiple of 8
void activate(float* gate, const float* up, int64_t count, int activation) {
  for (int64_t at = 0; at < count; at += 8) {
    const Floats x = load(gate + at);
    Floats inner = x;  // x * sigmoid(inner)
    if (activation == PQ_GELU_TANH) {
      const Floats cubed = multiply(multiply(x, x), x);
      inner = multiply(all(1.5957691216f), fused(cubed, all(0.044715f), x));  // 2 sqrt(2 / pi)
    }
    const Floats below = add(all(1.0f), exponential(subtract(zero(), inner)));
    store(gate + at, multiply(divide(x, below), load(up + at)));
  }
}

// `VECTORS` times eight columns of the mean of `count` values, each with its weight
template <int VECTORS>
void mean_of(const float* weights, const float* values, int64_t count, int64_t width, float share, float* to) {
  Floats mean[VECTORS];
  for (int i = 0; i < VECTORS; i++) mean[i] = zero();
  for (int64_t at = 0; at < count; at++)
    for (int i = 0; i < VECTORS; i++) mean[i] = fused(all(weights[at]), load(values + at * width + 8 * i), mean[i]);
  for (int i = 0; i < VECTORS; i++) store(to + 8 * i, multiply(mean[i], all(share)));
}

// The attention of one query to `count` keys from the `first` one on; keys, values: (positions, width); room: count floats.
void attend(
    const float* query, const float* keys, const float* values, int64_t first, int64_t count, int64_t width, float scale,
    float cap, const float* sink, float* room, float* to) {
  float top = sink ? *sink : -INFINITY;
  for (int64_t at = 0; at < count; at++) {
    float score = dot(query, keys + (first + at) * width, width) * scale;
    if (cap > 0) score = cap * std::tanh(score / cap);
    room[at] = score;
    top = std::max(top, score);
  }
  float total = sink ? std::exp(*sink - top) : 0.0f;
  float eight[8];
  for (int64_t at = 0; at < count; at += 8) {
    const int64_t some = std::min<int64_t>(8, count - at);
    for (int64_t i = 0; i < 8; i++) eight[i] = i < some ? room[at + i] - top : 0.0f;
    store(eight, exponential(load(eight)));
    for (int64_t i = 0; i < some; i++) total += room[at + i] = eight[i];
  }
  const float share = 1.0f / total;
  const float* held = values + first * width;
  int64_t column = 0;
  for (; column + 64 <= width; column += 64) mean_of<8>(room, held + column, count, width, share, to + column);
  for (; column + 8 <= width; column += 8) mean_of<1>(room, held + column, count, width, share, to + column);
  for (; column < width; column++) {
    float mean = 0;
    for (int64_t at = 0; at < count; at++) mean += room[at] * held[at * width + column];
    to[column] = mean * share;
  }
}

}  // namespace PQ_SET
