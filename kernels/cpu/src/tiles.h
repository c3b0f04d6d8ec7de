// Register tiles of matrix products, and the packing of what they read.
//
// A unit is what a lane multiplies at once: a float, or a pair of bfloat16 where the processor multiplies pairs; without
// such an instruction bfloat16 becomes float. Right operands are panels of PANEL columns, their units (steps, PANEL).
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

constexpr int ROWS = LANES == 16 ? 14 : 6;  // of a tile of two vectors, so that it fits into the registers
constexpr int PANEL = 2 * LANES;

struct Pair {
  bfloat16 first, second;
};

#ifdef __AVX512BF16__
template <typename T>
using Unit = std::conditional_t<std::is_same_v<T, bfloat16>, Pair, float>;
#else
template <typename T>
using Unit = float;
#endif

template <typename T>
constexpr int PER = sizeof(Unit<T>) == sizeof(Pair) && std::is_same_v<Unit<T>, Pair> ? 2 : 1;  // elements of a unit

// Units that hold ``count`` elements.
template <typename T>
constexpr int64_t units_of(int64_t count) {
  return (count + PER<T> - 1) / PER<T>;
}

inline void multiply_add(Vec& sum, float left, Vec right) { sum += fill(left) * right; }

#ifdef __AVX512BF16__
inline void multiply_add(Vec& sum, Pair left, Vec right) {
  int bits;
  std::memcpy(&bits, &left, sizeof bits);
  sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)right);
}
#endif

// Adds the product of M rows, whose units are ROW and whose steps are STEP apart, and V vectors of a panel.
template <int M, int V, int ROW, int STEP, typename U>
ALWAYS_INLINE void multiply(Vec (&sums)[M][V], const U* left, const U* right, int64_t steps) {
  for (int64_t step = 0; step < steps; step++, left += STEP, right += PANEL) {
    Vec columns[V];
    for (int half = 0; half < V; half++) columns[half] = load((const float*)right + half * LANES);
#pragma GCC unroll 16
    for (int row = 0; row < M; row++)
      for (int half = 0; half < V; half++) multiply_add(sums[row][half], left[row * ROW], columns[half]);
  }
}

// ``multiply`` from zeros.
template <int M, int V, int ROW, int STEP, typename U>
ALWAYS_INLINE void product(Vec (&sums)[M][V], const U* left, const U* right, int64_t steps) {
#pragma GCC unroll 16
  for (int row = 0; row < M; row++)
    for (int half = 0; half < V; half++) sums[row][half] = fill(0.0f);
  multiply<M, V, ROW, STEP>(sums, left, right, steps);
}

// LANES units of a row of ``count`` elements, zeros behind them.
template <typename T>
inline Vec load_units(const T* from, int64_t count) {
  if constexpr (PER<T> == 1) return load_some(from, count);
  if (count >= 2 * LANES) return load((const float*)from);
  T part[2 * LANES] = {};
  std::copy_n(from, count, part);
  return load((const float*)part);
}

// Up to LANES rows of ``dim`` elements -> units (steps, LANES of which ``apart`` is the distance). The last row stands in
// for rows that are missing.
template <typename T>
void transpose(const T* from, int64_t stride, int64_t rows, int64_t dim, Unit<T>* to, int64_t apart) {
  for (; dim > 0; dim -= PER<T> * LANES, from += PER<T> * LANES, to += LANES * apart) {
    Vec tile[LANES];
    for (int64_t row = 0; row < LANES; row++) tile[row] = load_units(from + std::min(row, rows - 1) * stride, dim);
    transpose(tile);
    for (int64_t at = 0; at < LANES && at * PER<T> < dim; at++) store((float*)to + at * apart, tile[at]);
  }
}

// ``rows`` rows of ``dim`` elements -> panels (dim / PANEL, ``steps``, PANEL) of units, each of PER rows.
template <typename T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t dim, Unit<T>* to, int64_t steps) {
  for (int64_t row = 0; row < rows; row += PER<T>, from += PER<T> * stride, to += PANEL)
    for (int64_t column = 0; column < dim; column += LANES) {
      Vec units = load_some(from + column, dim - column);
      if (PER<T> == 2) {
        const Vec second = row + 1 < rows ? load_some(from + stride + column, dim - column) : fill(0.0f);
        units = (Vec)(((Ints)units >> 16 & 0xffff) | (Ints)second);
      }
      store((float*)to + column / PANEL * steps * PANEL + column % PANEL, units);
    }
}
