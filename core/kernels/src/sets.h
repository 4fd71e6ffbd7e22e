// What is compiled for each instruction set, as a table of functions.
#pragma once
#include "polyquant_kernels.h"

// How many neighbouring activations share a scale.
inline int64_t block_of(const pq_weight& w) { return w.group % 32 == 0 ? 32 : 16; }

struct Activations {  // one product's, in blocks of `block_of` columns
  int16_t* halves;    // (count, columns) of PQ_INT16; in pairs in the order of a lane's codes
  int8_t* bytes;      // (count, columns) of PQ_INT8_ACTIVATIONS
  float* scales;      // (count, columns / block)
  float* sums;        // (count, columns / block): of what is multiplied
};

constexpr int64_t KEYS = 16;  // that are scored together: turned keys are padded to a multiple of these

struct Queries {  // of one head
  const float* from;
  float* to;
  int64_t stride, count;  // from one query to the next, of both
  int64_t before;         // positions before the first one; the others follow
};

struct Set {
  const char* name;
  void (*quantize)(const pq_weight&, const float* x, int64_t first, int64_t last, const Activations&, int how);
  // blocks [first, last) of eight rows, for all inputs; y: (count, rows)
  void (*multiply)(
      const pq_weight&, const float* x, const Activations&, int64_t count, int64_t first, int64_t last, float* y, int how);
  // block of eight rows as floats, (8, columns)
  void (*decode)(const pq_weight&, int64_t block, float* out);
  void (*row)(const pq_weight&, int64_t row, float* out);
  void (*to_float32)(const void* from, int type, int64_t count, float* to);
  void (*from_float32)(const float* from, int type, int64_t count, void* to);
  // steps.cpp
  void (*normalize)(const pq_norm&, const float* x, int64_t count, float* to);
  void (*activate)(float* gate, const float* up, int64_t count, int activation);
  void (*attend)(
      const float* query, const float* keys, const float* values, int64_t first, int64_t count, int64_t width, float scale,
      float cap, const float* sink, float* room, float* to);
  // keys as (width, across), zero beyond `count`
  void (*turn)(const float* keys, int64_t count, int64_t width, float* to, int64_t across);
  // each query to the positions up to its own, of which it sees the last `window` (0: all); values: (positions, width)
  void (*attend_all)(
      const Queries&, const float* turned, int64_t across, const float* values, int64_t width, int64_t window, float scale,
      float cap, const float* sink);
};

extern const Set scalar_set, avx2_set, avx512_set, neon_set;
