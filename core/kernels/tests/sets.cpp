// Every instruction set of this processor against plain sums in double: where no Python is, as under an emulator.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../src/polyquant_kernels.h"

namespace {

std::mt19937 chance(0);

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(chance); }

uint16_t to_bf16(float value) {  // cut off: any scale does
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}

float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float from_f16(uint16_t half) {  // of a normal, positive one
  return std::ldexp(1.0f + static_cast<float>(half & 1023) / 1024.0f, (half >> 10) - 15);
}

double from_float8(uint32_t code) {
  const double magnitude = (code & 0x78) ? std::ldexp(8 + static_cast<double>(code & 7), static_cast<int>((code >> 3) & 15) - 10)
                                         : std::ldexp(static_cast<double>(code & 7), -9);
  return code & 128 ? -magnitude : magnitude;
}

struct Made {  // a weight, and the numbers that it stands for
  int64_t rows, columns, group;
  std::vector<uint32_t> codes;
  std::vector<float> scales, minima, table, dense;
  std::vector<uint16_t> halves, outer_scales, outer_minima;
  std::vector<int8_t> zeros, scale_bytes, minimum_bytes;
  std::vector<float> row_scales;
  std::vector<int32_t> order;
  pq_weight weight;
};

Made make(int32_t kind, int offsets, int32_t scale_type, int64_t rows, int64_t columns, int64_t group, bool ordered) {
  Made m{rows, columns, group, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const bool nested = scale_type == PQ_NESTED;
  const bool wide = kind == PQ_INT8 || kind == PQ_FLOAT8;
  const int64_t each = kind == PQ_DENSE16 ? 2 : wide ? 4 : 8, groups = columns / group;
  m.codes.assign(static_cast<size_t>(rows * columns / each), 0);
  m.dense.resize(static_cast<size_t>(rows * columns));
  for (int i = 0; i < 16; i++) m.table.push_back(uniform(-1, 1));
  for (int64_t i = 0; i < rows * groups; i++) {
    const float scale = uniform(0.01f, 0.1f);
    m.halves.push_back(to_bf16(scale));
    m.scales.push_back(scale_type == PQ_BFLOAT16 ? from_bf16(m.halves.back()) : scale);
    m.minima.push_back(uniform(-1, 1));
    m.zeros.push_back(static_cast<int8_t>(chance() % 16));
  }
  const int64_t outer_group = 2 * group, outer = columns / outer_group;
  for (int64_t i = 0; nested && i < rows * outer; i++) {
    m.outer_scales.push_back(static_cast<uint16_t>(0x1400 + chance() % 1024));
    m.outer_minima.push_back(static_cast<uint16_t>(0x1800 + chance() % 1024));
  }
  for (int64_t i = 0; nested && i < rows * groups; i++) {
    const auto at = static_cast<size_t>((i / (groups * 8) * outer + i % (groups * 8) / 16) * 8 + i % 8);
    m.scale_bytes.push_back(static_cast<int8_t>(chance() % 127 - 63));
    m.minimum_bytes.push_back(static_cast<int8_t>(chance() % 127 - 63));
    m.scales[static_cast<size_t>(i)] = static_cast<float>(m.scale_bytes.back()) * from_f16(m.outer_scales[at]);
    m.minima[static_cast<size_t>(i)] = static_cast<float>(m.minimum_bytes.back()) * from_f16(m.outer_minima[at]);
  }
  const bool divided = scale_type == PQ_E4M3_DIVIDED, small = divided || scale_type == PQ_E4M3;
  for (int64_t row = 0; small && row < rows; row++) m.row_scales.push_back(divided ? uniform(5e4f, 1e5f) : uniform(1e-5f, 2e-5f));
  for (int64_t i = 0; small && i < rows * groups; i++) {
    const auto byte = static_cast<uint8_t>(chance() % 255);
    m.scale_bytes.push_back(static_cast<int8_t>((byte & 127) == 127 ? byte - 1 : byte));
    const float own = static_cast<float>(from_float8(static_cast<uint8_t>(m.scale_bytes.back())));
    const float of_row = m.row_scales[static_cast<size_t>(i / (groups * 8) * 8 + i % 8)];
    m.scales[static_cast<size_t>(i)] = divided ? own / of_row : own * of_row;
  }
  for (int64_t row = 0; row < rows; row++)
    for (int64_t column = 0; column < columns; column++) {
      uint32_t code = chance() & (wide ? 255u : 15u);
      if (kind == PQ_FLOAT8 && (code & 127) == 127) code--;  // no NaN
      if (kind == PQ_DENSE16) {
        const bool brain = scale_type == PQ_BFLOAT16;
        const auto half = static_cast<uint16_t>(brain ? to_bf16(uniform(-1, 1)) : 0x2c00 + chance() % 4096);
        std::memcpy(reinterpret_cast<char*>(m.codes.data()) + (row * columns + column) * 2, &half, 2);
        m.dense[static_cast<size_t>(row * columns + column)] = brain ? from_bf16(half) : from_f16(half);
        continue;
      }
      const int64_t t = column % each, lane = (row / 8 * (columns / each) + column / each) * 8 + row % 8;
      m.codes[static_cast<size_t>(lane)] |= code << (t % 4 * 8 + t / 4 * 4);
      const auto at = static_cast<size_t>((row / 8 * groups + column / group) * 8 + row % 8);
      const double number = kind == PQ_INT8 ? static_cast<int8_t>(code) : static_cast<double>(code), scale = m.scales[at];
      const double zero = offsets == 1 ? m.zeros[at] : 8;
      const double value = kind == PQ_FLOAT8 ? scale * from_float8(code) : kind == PQ_CODEBOOK4 ? scale * m.table[code] : offsets == 2 ? scale * number + m.minima[at] : scale * (number - zero);
      m.dense[static_cast<size_t>(row * columns + column)] = static_cast<float>(value);
    }
  if (ordered) {
    for (int64_t column = 0; column < columns; column++) m.order.push_back(static_cast<int32_t>(columns - 1 - column));
  }
  const void* scales = scale_type == PQ_BFLOAT16 ? static_cast<const void*>(m.halves.data()) : m.scales.data();
  const bool book = kind == PQ_CODEBOOK4, bare = kind == PQ_DENSE16, plain = book || bare || kind == PQ_FLOAT8;
  if (nested || small) scales = m.scale_bytes.data();
  const void* minima = nested ? static_cast<const void*>(m.minimum_bytes.data()) : static_cast<const void*>(m.minima.data());
  m.weight = {m.codes.data(), bare ? nullptr : scales, offsets == 1 && !plain ? m.zeros.data() : nullptr,
              offsets == 2 && !plain ? minima : nullptr, book ? m.table.data() : nullptr,
              ordered ? m.order.data() : nullptr, nullptr, nested ? m.outer_scales.data() : nullptr,
              nested && offsets == 2 ? m.outer_minima.data() : nullptr, small ? m.row_scales.data() : nullptr, rows, columns, group,
              nested ? outer_group : 0, kind, scale_type, 8};
  return m;
}

int wrong = 0;

void expect(bool condition, const char* set, const char* what, double found) {
  if (condition) return;
  wrong++;
  std::printf("%s: %s: %g\n", set, what, found);
}

void check(const char* set, const Made& m) {
  std::vector<float> decoded(m.dense.size());
  expect(pq_decode(&m.weight, 0, m.rows, decoded.data(), PQ_FLOAT32, 2) == 0, set, "decode", -1);
  double apart = 0;
  for (size_t i = 0; i < m.dense.size(); i++) apart = std::max(apart, std::abs(static_cast<double>(m.dense[i]) - decoded[i]));
  expect(apart <= 1e-6, set, "decoded weights are off by", apart);
  const int64_t index[] = {3, 0, m.rows - 1};
  std::vector<float> rows(static_cast<size_t>(3 * m.columns));
  expect(pq_rows(&m.weight, index, 3, rows.data(), PQ_FLOAT32) == 0, set, "rows", -1);
  for (int64_t i = 0; i < 3; i++)
    expect(std::memcmp(&rows[static_cast<size_t>(i * m.columns)], &decoded[static_cast<size_t>(index[i] * m.columns)],
                       static_cast<size_t>(m.columns) * 4) == 0, set, "a row is not the decoded one", static_cast<double>(i));
  for (int64_t count : {1, 3, 23}) {
    std::vector<float> x(static_cast<size_t>(count * m.columns)), y(static_cast<size_t>(count * m.rows));
    for (float& each : x) each = uniform(-2, 2);
    for (int32_t how : {PQ_EXACT, PQ_INT16, PQ_INT8_ACTIVATIONS}) {
      expect(pq_linear(&m.weight, x.data(), PQ_FLOAT32, count, y.data(), PQ_FLOAT32, nullptr, how, 2) == 0, set, "linear", how);
      double off = 0, whole = 0;
      for (int64_t input = 0; input < count; input++)
        for (int64_t row = 0; row < m.rows; row++) {
          double sum = 0;
          for (int64_t column = 0; column < m.columns; column++) {
            const int64_t from = m.order.empty() ? column : m.order[static_cast<size_t>(column)];
            sum += static_cast<double>(m.dense[static_cast<size_t>(row * m.columns + column)]) * x[static_cast<size_t>(input * m.columns + from)];
          }
          off += (sum - y[static_cast<size_t>(input * m.rows + row)]) * (sum - y[static_cast<size_t>(input * m.rows + row)]);
          whole += sum * sum;
        }
      const double bounds[] = {3e-6, 5e-4, 5e-2};
      expect(std::sqrt(off / whole) <= bounds[how], set, "a product's relative error", std::sqrt(off / whole));
      const bool codes = m.weight.kind == PQ_AFFINE4 || m.weight.kind == PQ_CODEBOOK4 || m.weight.kind == PQ_INT8;
      if (how != PQ_INT16 || !codes) continue;
      std::vector<float> alone(static_cast<size_t>(m.rows));
      for (int64_t input = 0; input < count; input++) {
        pq_linear(&m.weight, &x[static_cast<size_t>(input * m.columns)], PQ_FLOAT32, 1, alone.data(), PQ_FLOAT32, nullptr, how, 1);
        expect(std::memcmp(alone.data(), &y[static_cast<size_t>(input * m.rows)], alone.size() * 4) == 0, set,
               "an input has another product alone than among others", static_cast<double>(input));
      }
    }
  }
}

struct Decoder {  // of two layers of Llama's shape, the second with a window
  static constexpr int64_t HIDDEN = 64, HEADS = 4, KEY_HEADS = 2, INNER = 96, TOKENS = 300, ROOM = 320;
  std::vector<Made> made;
  std::vector<pq_layer> layers;
  std::vector<float> sinks;
  pq_model model;

  explicit Decoder(int64_t width) {
    made.reserve(14);
    for (int layer = 0; layer < 2; layer++) {
      const auto add = [&](int64_t rows, int64_t columns) {
        made.push_back(make(PQ_AFFINE4, 0, PQ_FLOAT32, rows, columns, 32, false));
        return pq_product{&made.back().weight, nullptr};
      };
      for (int64_t head = 0; head < HEADS; head++) sinks.push_back(uniform(-1, 1));
      const pq_optional_norm norm{{nullptr, 1e-5f, 0}, 0}, none{{nullptr, 0, 0}, 1};
      const int64_t key_rows = KEY_HEADS * width, query_rows = HEADS * width;
      layers.push_back({norm, norm, norm, none, norm, none, add(query_rows, HIDDEN), add(key_rows, HIDDEN), add(key_rows, HIDDEN),
                        add(HIDDEN, query_rows), add(INNER, HIDDEN), add(INNER, HIDDEN), add(HIDDEN, INNER), nullptr,
                        layer ? 9 : 0, 0});
    }
    layers[1].sinks = sinks.data() + HEADS;
    model = {layers.data(), 2, HIDDEN, HEADS, KEY_HEADS, width, 16, 0.25f, 0, 1, PQ_SILU, 0, {nullptr, 1e-5f, 0}};
  }

  // what all tokens of two texts become, some of them in a call
  std::vector<float> run(const std::vector<float>& hidden, const std::vector<float>& angles, int64_t each) const {
    const int64_t room = 2 * KEY_HEADS * ROOM * model.width;
    std::vector<float> keys(static_cast<size_t>(2 * room)), values(keys.size()), out(hidden.size());
    for (int64_t first = 0; first < TOKENS; first += each) {
      const int64_t tokens = std::min(each, TOKENS - first);
      pq_cache caches[2];
      for (int layer = 0; layer < 2; layer++) caches[layer] = {keys.data() + layer * room, values.data() + layer * room, ROOM, first};
      std::vector<float> some, cosines, sines;
      for (int64_t text = 0; text < 2; text++) {
        const float* from = hidden.data() + (text * TOKENS + first) * HIDDEN;
        some.insert(some.end(), from, from + tokens * HIDDEN);
        for (int64_t i = first * 16; i < (first + tokens) * 16; i++)
          cosines.push_back(std::cos(angles[static_cast<size_t>(i)])), sines.push_back(std::sin(angles[static_cast<size_t>(i)]));
      }
      if (pq_step(&model, caches, some.data(), 2, tokens, cosines.data(), sines.data(), PQ_EXACT, 2)) return {};
      for (int64_t text = 0; text < 2; text++)
        std::memcpy(out.data() + (text * TOKENS + first) * HIDDEN, some.data() + text * tokens * HIDDEN, static_cast<size_t>(tokens * HIDDEN) * 4);
    }
    return out;
  }
};

// many tokens in a call against one after another
void check_prompts(const char* set, int64_t width) {
  const Decoder decoder(width);
  std::vector<float> hidden(static_cast<size_t>(2 * Decoder::TOKENS * Decoder::HIDDEN)), angles(static_cast<size_t>(Decoder::TOKENS * 16));
  for (float& each : hidden) each = uniform(-1, 1);
  for (float& each : angles) each = uniform(0, 6);
  const std::vector<float> single = decoder.run(hidden, angles, 1);
  for (int64_t each : {Decoder::TOKENS, int64_t{131}}) {
    const std::vector<float> many = decoder.run(hidden, angles, each);
    expect(!single.empty() && single.size() == many.size(), set, "a step", static_cast<double>(each));
    double apart = 0;
    for (size_t i = 0; i < many.size(); i++) apart = std::max(apart, std::abs(static_cast<double>(single[i]) - many[i]));
    expect(apart <= 1e-3, set, "tokens together are not as one after another, by", apart);
  }
}

}  // namespace

int main() {
  std::istringstream names(pq_available());
  for (std::string set; names >> set;) {
    pq_use(set.c_str());
    for (int32_t kind : {PQ_AFFINE4, PQ_CODEBOOK4, PQ_INT8, PQ_FLOAT8, PQ_DENSE16})
      for (int offsets : {0, 1, 2})
        for (int32_t scale_type : {PQ_FLOAT32, PQ_FLOAT16, PQ_BFLOAT16, PQ_NESTED, PQ_E4M3, PQ_E4M3_DIVIDED})
          for (int64_t group : {16, 32, 64, 128})
            if (kind == PQ_DENSE16 ? scale_type == PQ_FLOAT16 || scale_type == PQ_BFLOAT16
                : scale_type == PQ_NESTED ? kind == PQ_AFFINE4 || kind == PQ_INT8 : scale_type != PQ_FLOAT16)
              check(set.c_str(), make(kind, offsets, scale_type, 24, 256, group, group == 32));
    for (int32_t kind : {PQ_AFFINE4, PQ_CODEBOOK4, PQ_INT8})  // more rows and columns than are multiplied together
      check(set.c_str(), make(kind, 2, PQ_FLOAT32, 72, 2080, kind == PQ_INT8 ? 16 : 32, false));
    check_prompts(set.c_str(), 16), check_prompts(set.c_str(), 24);
    std::printf("%s: %s\n", set.c_str(), wrong ? "wrong" : "as it should be");
  }
  return wrong ? 1 : 0;
}
