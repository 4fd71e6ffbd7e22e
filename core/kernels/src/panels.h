// Products of many inputs: panels.cpp, compiled once for each instruction set.
#pragma once
#include "sets.h"

namespace PQ_SET {

constexpr int64_t MANY = 12;  // inputs, from which on decoding into panels is worth its time

// As Set::multiply, bit for bit, of activations of 16 bits; false, and nothing is done, where there are no panels.
bool multiply_by_panels(
    const pq_weight&, const Activations&, int64_t count, int64_t first, int64_t last, float* y, int how);

}  // namespace PQ_SET
