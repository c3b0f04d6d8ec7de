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

// Four units of a row.
inline __m128 load_four(const float* from) { return _mm_loadu_ps(from); }

inline __m128 load_four(const bfloat16* from) {
  if (PER<bfloat16> == 2) return _mm_loadu_ps((const float*)from);
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from)), 16));
}

// LANES rows of four units -> four vectors of a unit of each row. ``four(row)`` loads.
template <typename F>
ALWAYS_INLINE void transpose_four(F four, Vec (&out)[4]) {
  Vec part[4];
#pragma GCC unroll 4
  for (int at = 0; at < 4; at++) {
#ifdef __AVX512F__
    __m512 rows = _mm512_castps128_ps512(four(at));
    rows = _mm512_insertf32x4(rows, four(at + 4), 1);
    rows = _mm512_insertf32x4(rows, four(at + 8), 2);
    part[at] = (Vec)_mm512_insertf32x4(rows, four(at + 12), 3);
#else
    part[at] = (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(four(at)), four(at + 4), 1);
#endif
  }
#ifdef __AVX512F__
  const auto low = [](Vec a, Vec b) { return (Vec)_mm512_unpacklo_ps((__m512)a, (__m512)b); };
  const auto high = [](Vec a, Vec b) { return (Vec)_mm512_unpackhi_ps((__m512)a, (__m512)b); };
  const auto low_pair = [](Vec a, Vec b) { return (Vec)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); };
  const auto high_pair = [](Vec a, Vec b) { return (Vec)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); };
#else
  const auto low = [](Vec a, Vec b) { return (Vec)_mm256_unpacklo_ps((__m256)a, (__m256)b); };
  const auto high = [](Vec a, Vec b) { return (Vec)_mm256_unpackhi_ps((__m256)a, (__m256)b); };
  const auto low_pair = [](Vec a, Vec b) { return (Vec)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); };
  const auto high_pair = [](Vec a, Vec b) { return (Vec)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); };
#endif
  const Vec a = low(part[0], part[1]), b = low(part[2], part[3]);
  const Vec c = high(part[0], part[1]), d = high(part[2], part[3]);
  out[0] = low_pair(a, b), out[1] = high_pair(a, b), out[2] = low_pair(c, d), out[3] = high_pair(c, d);
}

// Up to LANES rows of ``dim`` elements -> units (steps, LANES of which ``apart`` is the distance). The last row stands in
// for rows that are missing. Units are zero behind ``dim``.
template <typename T>
void transpose(const T* from, int64_t stride, int64_t rows, int64_t dim, Unit<T>* to, int64_t apart) {
  constexpr int WIDE = 4 * PER<T>;
  const int64_t steps = (dim + PER<T> - 1) / PER<T>;
  for (int64_t step = 0; step < steps; step += 4, from += WIDE, dim -= WIDE) {
    T rest[LANES][WIDE];
    const T* base = from;
    int64_t row_stride = stride;
    if (dim < WIDE) {
      std::memset(rest, 0, sizeof rest);
      for (int64_t row = 0; row < rows; row++) std::copy_n(from + row * stride, dim, rest[row]);
      base = rest[0], row_stride = WIDE;
    }
    Vec units[4];
    transpose_four([&](int64_t row) { return load_four(base + std::min(row, rows - 1) * row_stride); }, units);
    for (int64_t at = 0; at < std::min<int64_t>(4, steps - step); at++) store((float*)to + (step + at) * apart, units[at]);
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
