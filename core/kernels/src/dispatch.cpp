// The C interface: chooses an instruction set, and shares each product between threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "product.h"
#include "threads.h"

namespace {

std::vector<const Set*> find_sets() {
  std::vector<const Set*> found;
#if defined(PQ_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
      found.push_back(&avx512_set);
    found.push_back(&avx2_set);
  }
#elif defined(PQ_ARM)
  found.push_back(&neon_set);
#endif
  found.push_back(&scalar_set);
  return found;
}

const std::vector<const Set*>& sets() {
  static const std::vector<const Set*> found = find_sets();
  return found;
}

std::atomic<const Set*> chosen{nullptr};

size_t size_of(int32_t type) { return type == PQ_FLOAT32 ? 4 : 2; }

}  // namespace

const Set& in_use() {
  const Set* set = chosen.load(std::memory_order_acquire);
  return set ? *set : *sets().front();
}

bool is_sound(const pq_weight& w) {
  const bool kinds = w.kind >= PQ_AFFINE4 && w.kind <= PQ_DENSE16 && w.scale_type >= PQ_FLOAT32 && w.scale_type <= PQ_E4M3_DIVIDED;
  const bool sizes = w.rows > 0 && w.columns > 0 && w.rows % 8 == 0 && w.columns % 32 == 0 && w.group >= 16 &&
                     w.group % 16 == 0 && w.columns % w.group == 0;
  const bool dense = w.kind == PQ_DENSE16, plain = dense || w.kind == PQ_FLOAT8 || w.kind == PQ_CODEBOOK4;
  const bool parts = w.codes && (w.scales || dense) && !(w.zeros && w.minima) && !(plain && (w.zeros || w.minima)) &&
                     (w.kind != PQ_CODEBOOK4 || w.table) && (!dense || w.scale_type != PQ_FLOAT32) &&
                     (w.scale_type < PQ_E4M3 ? !w.row_scales : !dense && (w.row_scales || w.scale_type == PQ_E4M3));
  const bool nested = w.scale_type == PQ_NESTED;
  const bool outer = nested ? !plain && w.outer_scales && (!w.minima || w.outer_minima) && w.outer_group > 0 &&
                                  w.outer_group % w.group == 0 && w.columns % w.outer_group == 0
                            : !w.outer_scales && !w.outer_minima;
  return kinds && sizes && parts && outer;
}

namespace {

int32_t linear(
    const pq_weight& w, const void* x, int32_t x_type, int64_t count, void* y, int32_t y_type, const float* bias,
    int32_t activations, int32_t threads) {
  thread_local Room room;
  thread_local std::vector<float> wide_x, wide_y;
  const Set& set = in_use();
  const float* from = static_cast<const float*>(x);
  if (x_type != PQ_FLOAT32) {
    float* own = at_least(wide_x, count * w.columns);
    set.to_float32(x, x_type, count * w.columns, own);
    from = own;
  }
  float* to = y_type == PQ_FLOAT32 ? static_cast<float*>(y) : at_least(wide_y, count * w.rows);
  const Product product{&w, bias, to};
  together(threads, [&] { multiply(set, &product, 1, from, count, activations, threads, room); });
  if (y_type != PQ_FLOAT32) set.from_float32(to, y_type, count * w.rows, y);
  return 0;
}

}  // namespace

extern "C" {

int32_t pq_interface(void) { return 8; }

const char* pq_available(void) {
  static const std::string names = [] {
    std::string found;
    for (const Set* set : sets()) found += (found.empty() ? "" : " ") + std::string(set->name);
    return found;
  }();
  return names.c_str();
}

const char* pq_in_use(void) { return in_use().name; }

int32_t pq_use(const char* name) {
  for (const Set* set : sets())
    if (std::strcmp(set->name, name) == 0) {
      chosen.store(set, std::memory_order_release);
      return 0;
    }
  return -1;
}

void pq_borrow(pq_parallel parallel) { borrow(parallel); }

int32_t pq_linear(
    const pq_weight* weight, const void* x, int32_t x_type, int64_t count, void* y, int32_t y_type, const float* bias,
    int32_t activations, int32_t threads) {
  if (!is_sound(*weight) || count < 0 || activations < PQ_EXACT || activations > PQ_INT8_ACTIVATIONS) return -1;
  if (count == 0) return 0;
  try {
    return linear(*weight, x, x_type, count, y, y_type, bias, activations, std::max(1, threads));
  } catch (const std::bad_alloc&) {
    return -2;
  }
}

int32_t pq_decode(const pq_weight* weight, int64_t first, int64_t count, void* out, int32_t out_type, int32_t threads) {
  const pq_weight& w = *weight;
  if (!is_sound(w) || first < 0 || count < 0 || first % 8 || count % 8 || first + count > w.rows) return -1;
  const Set& set = in_use();
  std::atomic<bool> failed{false};
  share(count / 8, threads, [&](int64_t block) {
    auto* to = static_cast<char*>(out) + static_cast<size_t>(block * 8 * w.columns) * size_of(out_type);
    if (out_type == PQ_FLOAT32) return set.decode(w, first / 8 + block, reinterpret_cast<float*>(to));
    thread_local std::vector<float> own;
    try {
      float* wide = at_least(own, 8 * w.columns);
      set.decode(w, first / 8 + block, wide);
      set.from_float32(wide, out_type, 8 * w.columns, to);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  return failed ? -2 : 0;
}

int32_t pq_rows(const pq_weight* weight, const int64_t* index, int64_t count, void* out, int32_t out_type) {
  const pq_weight& w = *weight;
  if (!is_sound(w) || count < 0) return -1;
  const Set& set = in_use();
  try {
    std::vector<float> own(out_type == PQ_FLOAT32 ? 0 : static_cast<size_t>(w.columns));
    for (int64_t i = 0; i < count; i++) {
      auto* to = static_cast<char*>(out) + static_cast<size_t>(i * w.columns) * size_of(out_type);
      float* wide = out_type == PQ_FLOAT32 ? reinterpret_cast<float*>(to) : own.data();
      set.row(w, index[i], wide);
      if (out_type != PQ_FLOAT32) set.from_float32(wide, out_type, w.columns, to);
    }
  } catch (const std::bad_alloc&) {
    return -2;
  }
  return 0;
}

}  // extern "C"
