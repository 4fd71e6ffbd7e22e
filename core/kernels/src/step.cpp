// One token, or some one after another, of a decoder of Llama's shape, from the embedding to the head.
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
  const int64_t batch, tokens;  // tokens of each text
  const float *cosines, *sines;
  const int32_t activations, threads;
  const Set& set;
  Room room{};
  std::vector<float> normed{}, queries{}, keys{}, values{}, gates{}, ups{}, out{}, joined{}, scores{}, turned{};

  int64_t rows() const { return batch * tokens; }

  // calls work(row) for the tokens of all texts
  template <class Work> void each_row(const Work& work) {
    constexpr int64_t EACH = 8;
    const int64_t all = rows();
    share((all + EACH - 1) / EACH, threads, [&](int64_t piece) {
      for (int64_t row = piece * EACH; row < std::min(all, (piece + 1) * EACH); row++) work(row);
    });
  }

  void multiply(const Product* products, int some, const float* x) {
    ::multiply(set, products, some, x, rows(), activations, threads, room);
  }

  // of each token `parts` of `count`, each normalized; in place where `to` is `x`
  void normalize(const pq_optional_norm& norm, const float* x, int64_t parts, int64_t count, float* to) {
    if (norm.skip && to == x) return;
    each_row([&](int64_t row) {
      for (int64_t part = row * parts; part < (row + 1) * parts; part++) {
        if (!norm.skip) set.normalize(norm.norm, x + part * count, count, to + part * count);
        else std::memcpy(to + part * count, x + part * count, static_cast<size_t>(count) * 4);
      }
    });
  }

  void rotate(float* heads, int64_t count, int64_t row, int32_t rotation) {
    const int64_t half = model.rotated / 2;
    const float* cosine = cosines + (rotation * rows() + row) * model.rotated;
    const float* sine = sines + (rotation * rows() + row) * model.rotated;
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
    normalize(layer.before_attention, hidden, 1, model.hidden, normed.data());
    if (layer.key.weight) {
      const Product products[] = {
          {layer.query.weight, layer.query.bias, queries.data()}, {layer.key.weight, layer.key.bias, keys.data()},
          {layer.value.weight, layer.value.bias, values.data()}};
      multiply(products, 3, normed.data());
    } else {
      const int64_t all = query_rows + 2 * key_rows;
      const Product product{layer.query.weight, layer.query.bias, joined.data()};
      multiply(&product, 1, normed.data());
      each_row([&](int64_t row) {
        const float* from = joined.data() + row * all;
        std::copy_n(from, query_rows, queries.data() + row * query_rows);
        std::copy_n(from + query_rows, key_rows, keys.data() + row * key_rows);
        std::copy_n(from + query_rows + key_rows, key_rows, values.data() + row * key_rows);
      });
    }
    const int64_t parts = model.whole_norms ? 1 : model.heads, key_parts = model.whole_norms ? 1 : model.key_heads;
    normalize(layer.query_norm, queries.data(), parts, query_rows / parts, queries.data());
    normalize(layer.key_norm, keys.data(), key_parts, key_rows / key_parts, keys.data());
    each_row([&](int64_t row) {
      const int64_t text = row / tokens, position = cache.held + row % tokens;
      rotate(queries.data() + row * query_rows, model.heads, row, layer.rotation);
      rotate(keys.data() + row * key_rows, model.key_heads, row, layer.rotation);
      for (int64_t head = 0; head < model.key_heads; head++) {
        const int64_t at = ((text * model.key_heads + head) * cache.room + position) * width;
        std::copy_n(keys.data() + row * key_rows + head * width, width, cache.keys + at);
        std::copy_n(values.data() + row * key_rows + head * width, width, cache.values + at);
      }
    });
    if (tokens == 1) attend(layer, cache);
    else attend_all(layer, cache);
    const Product product{layer.output.weight, layer.output.bias, out.data()};
    multiply(&product, 1, joined.data());
    add(layer.after_attention, hidden);
  }

  // one query of each head of each text
  void attend(const pq_layer& layer, const pq_cache& cache) {
    const int64_t seen = cache.held + 1, first = layer.window ? std::max<int64_t>(0, seen - layer.window) : 0;
    const int64_t count = seen - first, width = model.width;
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
  }

  // many queries of each head: keys are turned first, to (width, positions) of each of their heads
  void attend_all(const pq_layer& layer, const pq_cache& cache) {
    constexpr int64_t QUERIES = 32;  // in a piece
    const int64_t width = model.width, of_one = model.heads / model.key_heads, stride = model.heads * width;
    const int64_t first = layer.window ? std::max<int64_t>(0, cache.held + 1 - layer.window) : 0;  // that any of them sees
    const int64_t held = cache.held - first, across = turned_width(held);
    share(batch * model.key_heads, threads, [&](int64_t i) {
      set.turn(cache.keys + (i * cache.room + first) * width, held + tokens, width, turned.data() + i * width * across, across);
    });
    const int64_t pieces = (tokens + QUERIES - 1) / QUERIES;
    share(batch * model.heads * pieces, threads, [&](int64_t i) {
      const int64_t token = (pieces - 1 - i % pieces) * QUERIES;  // the last ones, which see most, first
      const int64_t head = i / pieces % model.heads, text = i / pieces / model.heads;
      const int64_t at = (text * tokens + token) * stride + head * width, own = text * model.key_heads + head / of_one;
      const Queries some{queries.data() + at, joined.data() + at, stride, std::min(QUERIES, tokens - token), held + token};
      set.attend_all(
          some, turned.data() + own * width * across, across, cache.values + (own * cache.room + first) * width, width,
          layer.window, model.attention_scale, model.attention_cap, layer.sinks ? layer.sinks + head : nullptr);
    });
  }

  int64_t turned_width(int64_t held) const { return (held + tokens + KEYS - 1) / KEYS * KEYS; }

  void mlp(const pq_layer& layer, float* hidden) {
    normalize(layer.before_mlp, hidden, 1, model.hidden, normed.data());
    const int64_t inner = layer.down.weight->columns;
    const Product products[] = {
        {layer.gate.weight, layer.gate.bias, gates.data()}, {layer.up.weight, layer.up.bias, ups.data()}};
    multiply(products, layer.up.weight ? 2 : 1, normed.data());
    each_row([&](int64_t row) {
      float* gate = gates.data() + row * (layer.up.weight ? inner : 2 * inner);
      const float* up = layer.up.weight ? ups.data() + row * inner : gate + inner;
      set.activate(gate, up, inner, model.activation);
      if (!layer.up.weight) std::copy_n(gate, inner, ups.data() + row * inner);
    });
    const Product product{layer.down.weight, layer.down.bias, out.data()};
    multiply(&product, 1, layer.up.weight ? gates.data() : ups.data());
    add(layer.after_mlp, hidden);
  }

  void add(const pq_optional_norm& norm, float* hidden) {
    each_row([&](int64_t row) {
      float *own = out.data() + row * model.hidden, *to = hidden + row * model.hidden;
      if (!norm.skip) set.normalize(norm.norm, own, model.hidden, own);
      for (int64_t i = 0; i < model.hidden; i++) to[i] += model.residual_scale * own[i];
    });
  }

  void run(float* hidden) {
    const int64_t query_rows = model.heads * model.width, key_rows = model.key_heads * model.width;
    int64_t inner = 0, most = 0;
    for (int64_t i = 0; i < model.layer_count; i++) {
      inner = std::max(inner, model.layers[i].down.weight->columns);
      most = std::max(most, caches[i].held + 1);
    }
    const int64_t all = rows();
    at_least(normed, all * model.hidden), at_least(out, all * model.hidden);
    at_least(queries, all * query_rows), at_least(keys, all * key_rows), at_least(values, all * key_rows);
    at_least(joined, all * (query_rows + 2 * key_rows)), at_least(gates, all * inner * 2), at_least(ups, all * inner);
    if (tokens == 1) at_least(scores, batch * model.heads * most);
    else at_least(turned, batch * key_rows * turned_width(most - 1));
    for (int64_t i = 0; i < model.layer_count; i++) {
      attention(model.layers[i], caches[i], hidden);
      mlp(model.layers[i], hidden);
    }
    each_row([&](int64_t row) {
      set.normalize(model.last, hidden + row * model.hidden, model.hidden, hidden + row * model.hidden);
    });
  }
};

bool fits(const pq_product& product, int64_t rows, int64_t columns) {
  return product.weight && is_sound(*product.weight) && product.weight->rows == rows && product.weight->columns == columns;
}

// every size follows from the model's own; whatever does not would be read past its end
bool is_sound(const pq_model& m, const pq_cache* caches, int64_t tokens) {
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
    if (!gated || !fits(l.down, m.hidden, inner) || caches[i].held < 0 || caches[i].held + tokens > caches[i].room)
      return false;
  }
  return true;
}

}  // namespace

extern "C" int32_t pq_step(
    const pq_model* model, const pq_cache* caches, float* hidden, int64_t batch, int64_t tokens, const float* cosines,
    const float* sines, int32_t activations, int32_t threads) {
  if (batch < 1 || tokens < 1 || (tokens > 1 && model->width % 8) || activations < PQ_EXACT || activations > PQ_INT8_ACTIVATIONS) return -1;
  if (!is_sound(*model, caches, tokens)) return -1;
  try {
    Step step{*model, caches, batch, tokens, cosines, sines, activations, std::max(1, threads), in_use()};
    together(step.threads, [&] { step.run(hidden); });
    return 0;
  } catch (const std::bad_alloc&) {
    return -2;
  }
}
