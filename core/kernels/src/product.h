// Products of one input with one or several weights, shared between threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "sets.h"

struct Product {
  const pq_weight* weight;
  const float* bias;  // or null
  float* y;           // (count, weight->rows)
};

struct Room {  // for quantized activations: kept by its thread for the next product
  std::vector<float> scales, sums, ordered;
  std::vector<int16_t> halves;
  std::vector<int8_t> bytes;
};

template <class T> T* at_least(std::vector<T>& room, int64_t count) {
  if (room.size() < static_cast<size_t>(count)) room.resize(static_cast<size_t>(count));
  return room.data();
}

// The set of instructions to use.
const Set& in_use();

// Whether a weight can be read without going past its ends.
bool is_sound(const pq_weight&);

// y = x @ weight.T + bias of each of `some` products, which have the columns of x: (count, columns).
void multiply(
    const Set&, const Product* products, int some, const float* x, int64_t count, int32_t activations, int32_t threads, Room&);
