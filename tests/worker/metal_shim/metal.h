// Metal's types and built-ins, as far as mlxd's kernels use them, for a C++ compiler on a CPU.
// It proves that the text is C++ of the kind Metal's language builds on, and what it computes; address spaces
// are only keywords here, and Apple's compiler is another one.

#pragma once

#include "fibers.h"

#define device
#define constant const
#define thread
#define threadgroup static

typedef unsigned int uint;
typedef unsigned short ushort;
typedef _Float16 half;

struct uint3 {
  uint x, y, z;
};

// The upper half of a float32, rounded to nearest even, as Metal's bfloat.
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  explicit bfloat(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    bits = value == value ? (wide + 0x7fff + (wide >> 16 & 1)) >> 16 : 0x7fc0;
  }
  operator float() const {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
  }
};

namespace metal {
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float exp2(float x) { return __builtin_exp2f(x); }
namespace precise {
inline float rsqrt(float x) { return 1 / __builtin_sqrtf(x); }
inline float tanh(float x) { return __builtin_tanhf(x); }
}  // namespace precise
}  // namespace metal

enum class mem_flags { mem_threadgroup };

inline void threadgroup_barrier(mem_flags) { fibers::wait_for_group(); }

template <typename V>
V simd_shuffle_xor(V value, ushort mask) {
  return fibers::exchange(value, fibers::self() % fibers::SIMD ^ mask);
}

// What MLX makes parameters of a kernel, where the text names them.
inline uint3 threadgroup_position_in_grid, threadgroups_per_grid, threads_per_threadgroup;
#define thread_index_in_threadgroup (uint(fibers::self()))
#define thread_index_in_simdgroup (uint(fibers::self() % fibers::SIMD))
#define simdgroup_index_in_threadgroup (uint(fibers::self() / fibers::SIMD))

inline void place(int x, int y, int z, int gx, int gy, int gz, int num_threads) {
  threadgroup_position_in_grid = {uint(x), uint(y), uint(z)};
  threadgroups_per_grid = {uint(gx), uint(gy), uint(gz)};
  threads_per_threadgroup = {uint(num_threads), 1, 1};
}

typedef float type_float32;
typedef half type_float16;
typedef bfloat type_uint16;
typedef int32_t type_int32;
