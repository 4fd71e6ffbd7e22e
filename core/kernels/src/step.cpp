// One token of a decoder of Llama's shape, from the embedding to the head.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "product.h"
#include "threads.h"

namespace {

struct Step {
  const pq_model& model;
  const pq_cache* caches;
  const int64_t batch;
  const float *cosines, *sines;
  const int32_t activations, threads;
  const Set& set;
  Room room;
  std::vector<float> normed, queries, keys, values, gates, ups, out, joined, scores;

  void multiply(const Product* products, int some, const float* x) {
    ::multiply(set, products, some, x, batch, activations, threads, room);
  }

  // rows of `count`, each normalized; in place where `to` is `x`
  void normalize(const pq_optional_norm& norm, const float* x, int64_t rows, int64_t count, float* to) {
    for (int64_t row = 0; row < rows; row++) {
      if (!norm.skip) set.normalize(norm.norm, x + row * count, count, to + row * count);
      else if (to != x) std::memcpy(to + row * count, x + row * count, static_cast<size_t>(count) * 4);
    }
  }

  void rotate(float* heads, int64_t count, int64_t text, int32_t rotation) {
    const int64_t half = model.rotated / 2;
    const float* cosine = cosines + (rotation * batch + text) * model.rotated;
    const float* sine = sines + (rotation * batch + text) * model.rotated;
    for (int64_t head = 0; head < count; head++) {
      float* x = heads + head * model.width;
      for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
      }
    }
  }

  void attention(const pq_layer& layer, const pq_cache& cache, float* hidden) {
    const int64_t width = model.width, query_rows = model.heads * width, key_rows = model.key_heads * width;
    normalize(layer.before_attention, hidden, batch, model.hidden, normed.data());
    if (layer.key.weight) {
      const Product products[] = {
          {layer.query.weight, layer.query.bias, queries.data()}, {layer.key.weight, layer.key.bias, keys.data()},
          {layer.value.weight, layer.value.bias, values.data()}};
      multiply(products, 3, normed.data());
    } else {
      const int64_t rows = query_rows + 2 * key_rows;
      const Product product{layer.query.weight, layer.query.bias, joined.data()};
      multiply(&product, 1, normed.data());
      for (int64_t text = 0; text < batch; text++) {
        const float* from = joined.data() + text * rows;
        std::copy_n(from, query_rows, queries.data() + text * query_rows);
        std::copy_n(from + query_rows, key_rows, keys.data() + text * key_rows);
        std::copy_n(from + query_rows + key_rows, key_rows, values.data() + text * key_rows);
      }
    }
    const int64_t parts = model.whole_norms ? 1 : model.heads, key_parts = model.whole_norms ? 1 : model.key_heads;
    normalize(layer.query_norm, queries.data(), batch * parts, query_rows / parts, queries.data());
    normalize(layer.key_norm, keys.data(), batch * key_parts, key_rows / key_parts, keys.data());
    for (int64_t text = 0; text < batch; text++) {
      rotate(queries.data() + text * query_rows, model.heads, text, layer.rotation);
      rotate(keys.data() + text * key_rows, model.key_heads, text, layer.rotation);
      for (int64_t head = 0; head < model.key_heads; head++) {
        const int64_t at = ((text * model.key_heads + head) * cache.room + cache.held) * width;
        std::copy_n(keys.data() + (text * model.key_heads + head) * width, width, cache.keys + at);
        std::copy_n(values.data() + (text * model.key_heads + head) * width, width, cache.values + at);
      }
    }
    const int64_t seen = cache.held + 1, first = layer.window ? std::max<int64_t>(0, seen - layer.window) : 0;
    const int64_t count = seen - first;
    const int64_t all = batch * model.heads, of_one = model.heads / model.key_heads;
    const int64_t each = std::max<int64_t>(1, 16384 / (count * width));  // heads in a piece
    share((all + each - 1) / each, threads, [&](int64_t piece) {
      for (int64_t i = piece * each; i < std::min(all, piece * each + each); i++) {
        const int64_t text = i / model.heads, head = i % model.heads;
        const int64_t at = (text * model.key_heads + head / of_one) * cache.room * width;
        set.attend(
            queries.data() + i * width, cache.keys + at, cache.values + at, first, count, width, model.attention_scale,
            model.attention_cap, layer.sinks ? layer.sinks + head : nullptr, scores.data() + i * seen,
            joined.data() + i * width);
      }
    });
    const Product product{layer.output.weight, layer.output.bias, out.data()};
    multiply(&product, 1, joined.data());
    add(layer.after_attention, hidden);
  }

  void mlp(const pq_layer& layer, float* hidden) {
    normalize(layer.before_mlp, hidden, batch, model.hidden, normed.data());
    const int64_t inner = layer.down.weight->columns;
    const Product products[] = {
        {layer.gate.weight, layer.gate.bias, gates.data()}, {layer.up.weight, layer.up.bias, ups.data()}};
    multiply(products, layer.up.weight ? 2 : 1, normed.data());
    const int64_t gate_rows = layer.gate.weight->rows;
    for (int64_t text = 0; text < batch; text++) {
      float* gate = gates.data() + text * gate_rows;
      const float* up = layer.up.weight ? ups.data() + text * inner : gate + inner;
      set.activate(gate, up, inner, model.activation);
      if (text && gate_rows != inner) std::memmove(gates.data() + text * inner, gate, static_cast<size_t>(inner) * 4);
    }
    const Product product{layer.down.weight, layer.down.bias, out.data()};
    multiply(&product, 1, gates.data());
    add(layer.after_mlp, hidden);
  }

  void add(const pq_optional_norm& norm, float* hidden) {
    normalize(norm, out.data(), batch, model.hidden, out.data());
    for (int64_t i = 0; i < batch * model.hidden; i++) hidden[i] += model.residual_scale * out[static_cast<size_t>(i)];
  }

  void run(float* hidden) {
    const int64_t query_rows = model.heads * model.width, key_rows = model.key_heads * model.width;
    int64_t inner = 0, most = 0;
    for (int64_t i = 0; i < model.layer_count; i++) {
      inner = std::max(inner, model.layers[i].down.weight->columns);
      most = std::max(most, caches[i].held + 1);
    }
    at_least(normed, batch * model.hidden), at_least(out, batch * model.hidden);
    at_least(queries, batch * query_rows), at_least(keys, batch * key_rows), at_least(values, batch * key_rows);
    at_least(joined, batch * (query_rows + 2 * key_rows)), at_least(gates, batch * inner * 2), at_least(ups, batch * inner);
    at_least(scores, batch * model.heads * most);
    for (int64_t i = 0; i < model.layer_count; i++) {
      attention(model.layers[i], caches[i], hidden);
      mlp(model.layers[i], hidden);
    }
    for (int64_t text = 0; text < batch; text++)
      set.normalize(model.last, hidden + text * model.hidden, model.hidden, hidden + text * model.hidden);
  }
};

bool fits(const pq_product& product, int64_t rows, int64_t columns) {
  return product.weight && is_sound(*product.weight) && product.weight->rows == rows && product.weight->columns == columns;
}

// every size follows from the model's own; whatever does not would be read past its end
bool is_sound(const pq_model& m, const pq_cache* caches) {
  if (m.layer_count < 1 || m.heads < 1 || m.key_heads < 1 || m.heads % m.key_heads || m.width < 1 || m.rotated > m.width || m.rotated % 2)
    return false;
  const int64_t query_rows = m.heads * m.width, key_rows = m.key_heads * m.width;
  for (int64_t i = 0; i < m.layer_count; i++) {
    const pq_layer& l = m.layers[i];
    const bool apart = fits(l.query, query_rows, m.hidden) && fits(l.key, key_rows, m.hidden) && fits(l.value, key_rows, m.hidden);
    const bool attention = l.key.weight ? apart : fits(l.query, query_rows + 2 * key_rows, m.hidden);
    if (!attention || !fits(l.output, m.hidden, query_rows) || !l.down.weight) return false;
    const int64_t inner = l.down.weight->columns;
    const bool gated = l.up.weight ? fits(l.gate, inner, m.hidden) && fits(l.up, inner, m.hidden) : fits(l.gate, 2 * inner, m.hidden);
    if (!gated || !fits(l.down, m.hidden, inner) || caches[i].held < 0 || caches[i].held >= caches[i].room)
      return false;
  }
  return true;
}

}  // namespace

extern "C" int32_t pq_step(
    const pq_model* model, const pq_cache* caches, float* hidden, int64_t batch, const float* cosines, const float* sines,
    int32_t activations, int32_t threads) {
  if (batch < 1 || activations < PQ_EXACT || activations > PQ_INT8_ACTIVATIONS) return -1;
  if (!is_sound(*model, caches)) return -1;
  try {
    Step step{*model, caches, batch, cosines, sines, activations, std::max(1, threads), in_use(), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    together(step.threads, [&] { step.run(hidden); });
    return 0;
  } catch (const std::bad_alloc&) {
    return -2;
  }
}
