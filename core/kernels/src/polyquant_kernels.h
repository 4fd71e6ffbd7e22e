// The C interface of the packed products. Every function is safe to call from several threads at once.
//
// A weight of (rows, columns) lies with eight rows interleaved: `codes` is (rows / 8, columns / 8, 8) lanes of 32 bits,
// each with eight codes of four bits of one row, or (rows / 8, columns / 4, 8) lanes with four of eight bits. In a lane of
// four-bit codes, code t has the bits from {0, 8, 16, 24, 4, 12, 20, 28}[t]: the even nibbles are codes 0 to 3, the odd
// ones 4 to 7. Scales, zero points and minima are (rows / 8, columns / group, 8). Weights of 16 bits are (rows, columns), as
// everybody has them.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define PQ_PUBLIC __declspec(dllexport)
#else
#define PQ_PUBLIC __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum pq_type { PQ_FLOAT32 = 0, PQ_FLOAT16 = 1, PQ_BFLOAT16 = 2, PQ_NESTED = 3, PQ_E4M3 = 4, PQ_E4M3_DIVIDED = 5 };  // from the fourth on of scales alone

enum pq_kind {
  PQ_AFFINE4 = 0,    // scale * (code - zero), or scale * code + minimum
  PQ_CODEBOOK4 = 1,  // scale * table[code]
  PQ_INT8 = 2,       // scale * (code - zero), or scale * code + minimum; the code is signed
  PQ_FLOAT8 = 3,     // scale * code; the code is a float of 8 bits, E4M3 without infinities, and no NaN
  PQ_DENSE16 = 4     // a float of 16 bits of scale_type; there are no scales, and `codes` are these floats, row after row
};

// How activations enter a product: as they are; or in blocks of 32 as integers of 16 or of 8 bits with a scale each.
// A product in 16 bits has a relative error of 5e-5, one in 8 bits of 1e-2. Only PQ_AFFINE4 has 8 bits; floats of 8 and of
// 16 bits are multiplied as they are, always.
enum pq_activations { PQ_EXACT = 0, PQ_INT16 = 1, PQ_INT8_ACTIVATIONS = 2 };

typedef struct {
  const uint32_t* codes;
  const void* scales;     // of scale_type; null for PQ_DENSE16
  const int8_t* zeros;   // zero points, or null
  const void* minima;     // minima in float32, or null; never both
  const float* table;     // sixteen levels of a PQ_CODEBOOK4
  const int32_t* order;   // which input each column multiplies, every one once; null: its own
  const float* column_scales;  // what inputs, in their own order, are multiplied by first; null: nothing
  // of PQ_NESTED: scales, and minima, are signed bytes, each times the float16 of its outer group; else null
  const uint16_t *outer_scales, *outer_minima;
  // of PQ_E4M3 scales are floats of 8 bits, E4M3 without NaN, each times the float of its row, where this is not null; of
  // PQ_E4M3_DIVIDED divided by it; else null
  const float* row_scales;
  int64_t rows, columns;  // multiples of 8 and of 32
  int64_t group;          // columns that share a scale; a multiple of 16 that divides columns
  int64_t outer_group;    // of PQ_NESTED: a multiple of group that divides columns; else 0
  int32_t kind, scale_type;
  float zero;  // the zero point of every group where `zeros` and `minima` are null
} pq_weight;

// Raised whenever the meaning of anything here changes.
PQ_PUBLIC int32_t pq_interface(void);

// The instruction sets that this processor runs, best first, with spaces between; and the one in use.
PQ_PUBLIC const char* pq_available(void);
PQ_PUBLIC const char* pq_in_use(void);
// Uses another set than the best. Returns 0, or -1 where it is none of pq_available.
PQ_PUBLIC int32_t pq_use(const char* name);

// Lets products run in the threads of another library that is in the process, so that no two pools wait awake for the same
// cores. `parallel` calls work(context) in up to `threads` threads, the caller among them, and returns when all have: it is
// GOMP_parallel of libgomp, and of LLVM's OpenMP. Null: own threads, as at first.
typedef void (*pq_parallel)(void (*work)(void* context), void* context, unsigned threads, unsigned flags);
PQ_PUBLIC void pq_borrow(pq_parallel parallel);

// y = x @ weight.T + bias. x: (count, columns), y: (count, rows), each contiguous and of its type; bias: rows floats or null.
// Returns 0; -1: what is asked for has no product; -2: no memory.
PQ_PUBLIC int32_t pq_linear(
    const pq_weight* weight, const void* x, int32_t x_type, int64_t count, void* y, int32_t y_type, const float* bias,
    int32_t activations, int32_t threads);

// Rows [first, first + count) as (count, columns) of out_type, its columns as they lie, without column_scales.
// first, count: multiples of 8.
PQ_PUBLIC int32_t pq_decode(
    const pq_weight* weight, int64_t first, int64_t count, void* out, int32_t out_type, int32_t threads);

// Rows by their numbers, as (count, columns) of out_type, as pq_decode gives them. Every number is from 0 to rows - 1:
// the caller has checked.
PQ_PUBLIC int32_t pq_rows(const pq_weight* weight, const int64_t* index, int64_t count, void* out, int32_t out_type);

// ---- tokens of a decoder of Llama's shape

enum pq_activation { PQ_SILU = 0, PQ_GELU_TANH = 1 };

typedef struct {
  const float* weight;  // null: none
  float epsilon, extra;  // extra: 1 where the weight is kept less 1
} pq_norm;

typedef struct {  // a norm that is not there has skip = 1
  pq_norm norm;
  int32_t skip;
} pq_optional_norm;

typedef struct {  // a product and its bias, of `rows` floats or null
  const pq_weight* weight;
  const float* bias;
} pq_product;

typedef struct {
  // of queries and keys: over each head, or with whole_norms over all of them
  pq_optional_norm before_attention, query_norm, key_norm, after_attention, before_mlp, after_mlp;
  pq_product query, key, value, output;  // key.weight null: query holds all three, one below the other
  pq_product gate, up, down;             // up.weight null: gate holds both
  const float* sinks;                    // one for each head, or null
  int64_t window;                        // positions that are seen, this one among them; 0: all
  int32_t rotation;                      // which cosines and sines
} pq_layer;

typedef struct {
  const pq_layer* layers;
  int64_t layer_count, hidden, heads, key_heads, width, rotated;  // width: of a head; rotated: of its columns
  float attention_scale, attention_cap, residual_scale;           // cap: 0 for none
  int32_t activation, whole_norms;
  pq_norm last;
} pq_model;

typedef struct {         // of one layer
  float *keys, *values;  // (batch, key_heads, room, width), with what is held; new ones are written behind it
  int64_t room, held;    // positions: there is memory for, and are held
} pq_cache;

// The next `tokens` of each of `batch` texts of one length; of several, each sees those before it. hidden: (batch, tokens,
// hidden), embedded and scaled, is used up; cosines and sines: (rotations, batch, tokens, rotated). `hidden` has the last
// norm's output after the call, which the head multiplies. Several tokens need a width that is a multiple of 8.
PQ_PUBLIC int32_t pq_step(
    const pq_model* model, const pq_cache* caches, float* hidden, int64_t batch, int64_t tokens, const float* cosines,
    const float* sines, int32_t activations, int32_t threads);

#ifdef __cplusplus
}
#endif
