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

// ---- many queries

void turn(const float* keys, int64_t count, int64_t width, float* to, int64_t across) {
  for (int64_t column = 0; column < width; column++) {
    float* row = to + column * across;
    for (int64_t key = 0; key < count; key++) row[key] = keys[key * width + column];
    for (int64_t key = count; key < across; key++) row[key] = 0.0f;
  }
}

// (COUNT, 8 VECTORS) sums of products of rows of `left` with columns of `right`, added to what is there
template <int COUNT, int VECTORS>
void add_products(
    const float* left, int64_t left_stride, const float* right, int64_t right_stride, int64_t steps, float* to, int64_t to_stride) {
  Floats sums[COUNT][VECTORS];
  for (int i = 0; i < COUNT; i++)
    for (int v = 0; v < VECTORS; v++) sums[i][v] = load(to + i * to_stride + 8 * v);
  for (int64_t step = 0; step < steps; step++) {
    Floats some[VECTORS];
    for (int v = 0; v < VECTORS; v++) some[v] = load(right + step * right_stride + 8 * v);
    for (int i = 0; i < COUNT; i++) {
      const Floats one = all(left[i * left_stride + step]);
      for (int v = 0; v < VECTORS; v++) sums[i][v] = fused(one, some[v], sums[i][v]);
    }
  }
  for (int i = 0; i < COUNT; i++)
    for (int v = 0; v < VECTORS; v++) store(to + i * to_stride + 8 * v, sums[i][v]);
}

// COUNT neighbouring queries, some keys at a time: a larger score than all before scales down what was summed with those
template <int COUNT>
void attend_some(
    const Queries& q, int64_t first, const float* turned, int64_t across, const float* values, int64_t width, int64_t window,
    float scale, float cap, const float* sink) {
  constexpr int64_t SOME = 256;
  float scores[COUNT][SOME], top[COUNT], total[COUNT];
  const int64_t last = q.before + first + COUNT;  // seen by the last query
  const auto from = [&](int64_t i) { return window ? std::max<int64_t>(0, q.before + first + i + 1 - window) : 0; };
  for (int i = 0; i < COUNT; i++) {
    top[i] = sink ? *sink : -INFINITY, total[i] = sink ? 1.0f : 0.0f;
    std::fill_n(q.to + (first + i) * q.stride, width, 0.0f);
  }
  for (int64_t begin = from(0) / KEYS * KEYS; begin < last; begin += SOME) {
    const int64_t keys = std::min(SOME, (last - begin + KEYS - 1) / KEYS * KEYS);
    std::memset(scores, 0, sizeof(scores));
    for (int64_t key = 0; key < keys; key += KEYS)
      add_products<COUNT, KEYS / 8>(q.from + first * q.stride, q.stride, turned + begin + key, across, width, scores[0] + key, SOME);
    for (int64_t i = 0; i < COUNT; i++) {
      const int64_t low = std::clamp<int64_t>(from(i) - begin, 0, keys);
      const int64_t high = std::clamp<int64_t>(q.before + first + i + 1 - begin, low, keys);
      float most = top[i];
      for (int64_t key = 0; key < keys; key++) {
        float& score = scores[i][key];
        score = key < low || key >= high ? -INFINITY : score * scale;
        if (cap > 0 && key >= low && key < high) score = cap * std::tanh(score / cap);
        most = std::max(most, score);
      }
      if (most == -INFINITY) {  // none of these is seen
        std::fill_n(scores[i], keys, 0.0f);
        continue;
      }
      const float less = std::exp(top[i] - most);
      Floats sums = zero();
      for (int64_t key = 0; key < keys; key += 8) {
        const Floats value = exponential(subtract(load(scores[i] + key), all(most)));
        store(scores[i] + key, value);
        sums = add(sums, value);
      }
      top[i] = most, total[i] = total[i] * less + sum(sums);
      float* to = q.to + (first + i) * q.stride;
      if (less < 1)
        for (int64_t column = 0; column < width; column++) to[column] *= less;
    }
    float* to = q.to + first * q.stride;
    const int64_t real = std::min(keys, last - begin);
    int64_t column = 0;
    for (; column + 16 <= width; column += 16)
      add_products<COUNT, 2>(scores[0], SOME, values + begin * width + column, width, real, to + column, q.stride);
    if (column < width)
      add_products<COUNT, 1>(scores[0], SOME, values + begin * width + column, width, real, to + column, q.stride);
  }
  for (int i = 0; i < COUNT; i++)
    for (int64_t column = 0; column < width; column++) q.to[(first + i) * q.stride + column] /= total[i];
}

void attend_all(
    const Queries& q, const float* turned, int64_t across, const float* values, int64_t width, int64_t window, float scale,
    float cap, const float* sink) {
  int64_t query = 0;
  for (; query + 4 <= q.count; query += 4) attend_some<4>(q, query, turned, across, values, width, window, scale, cap, sink);
  for (; query < q.count; query++) attend_some<1>(q, query, turned, across, values, width, window, scale, cap, sink);
}

}  // namespace PQ_SET
