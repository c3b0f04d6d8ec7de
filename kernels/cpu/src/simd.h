// Vectors of floats, 16 with AVX512 and 8 with AVX2, and the functions that the kernels need of them.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float AnyVec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // at any address

// Elements of tensors.
struct bfloat16 {
  uint16_t bits;
};

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Threads for some work, of which each has at least ``least``, or one.
inline int threads_for(int64_t work, int64_t least, int64_t threads) {
  return int(std::max<int64_t>(std::min(threads, work / least), 1));
}

// Floats at the start of a cache line, not set to anything.
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_((float*)std::aligned_alloc(64, round_up(4 * size + 64, 64)), std::free) {}
  float& operator[](int64_t at) { return data_.get()[at]; }

 private:
  std::unique_ptr<float, decltype(&std::free)> data_;
};

inline Vec load(const float* from) { return *(const AnyVec*)from; }

inline void store(float* to, Vec vec) { *(AnyVec*)to = vec; }

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void from_float(float value, float& to) { to = value; }

// Rounds to the nearest, ties to even, as PyTorch does.
inline void from_float(float value, bfloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to.bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#ifdef __AVX512F__
inline Vec fill(float value) { return (Vec)_mm512_set1_ps(value); }
// NaN in ``b`` stays.
inline Vec maximum(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec minimum(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
inline Vec round_even(Vec a) { return (Vec)_mm512_roundscale_ps((__m512)a, 0); }
inline float sum(Vec a) { return _mm512_reduce_add_ps((__m512)a); }
inline float largest(Vec a) { return _mm512_reduce_max_ps((__m512)a); }
// a * 2^n for a whole n; 0 for -127, so that no product is a slow denormal
inline Vec scale_exponent(Vec a, Vec n) {
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)n, _mm512_set1_ps(-127.0f), _CMP_NEQ_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)a, (__m512)n);
}
#else
inline Vec fill(float value) { return (Vec)_mm256_set1_ps(value); }
inline Vec maximum(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec minimum(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
inline Vec round_even(Vec a) { return (Vec)_mm256_round_ps((__m256)a, 8); }

inline float sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline float largest(Vec a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline Vec scale_exponent(Vec a, Vec n) {
  __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32((__m256)n), _mm256_set1_epi32(127)), 23);
  return a * (Vec)_mm256_castsi256_ps(exponent);
}
#endif

// 2^x to 1e-7 of itself for x < 128; 0 below -126; NaN stays.
inline Vec exp2(Vec x) {
  x = maximum(fill(-127.0f), x);
  const Vec whole = round_even(x), rest = x - whole;
  Vec power = fill(1.5345812e-4f);
  power = power * rest + 1.33999309e-3f;
  power = power * rest + 9.61848907e-3f;
  power = power * rest + 5.55032864e-2f;
  power = power * rest + 2.40226462e-1f;
  power = power * rest + 6.93147182e-1f;
  power = power * rest + 1.0f;
  return scale_exponent(power, whole);
}

// e^x; 0 below -87; NaN stays. The error is 1e-7 (1 + |x|) of the result.
inline Vec exp(Vec x) { return exp2(x * 1.44269504f); }

// ln x to 2e-7 of itself, for normal numbers; NaN stays.
inline Vec log(Vec x) {
  const Ints exponent = ((Ints)x - 0x3f3504f3) >> 23;  // so that the rest is in [sqrt(1/2), sqrt(2))
  const Vec rest = (Vec)((Ints)x - (exponent << 23)), ratio = (rest - 1.0f) / (rest + 1.0f), square = ratio * ratio;
  Vec series = square * (1.0f / 9) + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  const Vec whole = __builtin_convertvector(exponent, Vec), twice = ratio + ratio;
  return whole * 0.693359375f + (twice * square * series - whole * 2.12194440e-4f + twice) + (x - x);
}

inline Ints lane_numbers() {
  Ints numbers;
  for (int lane = 0; lane < LANES; lane++) numbers[lane] = lane;
  return numbers;
}

inline Vec load(const bfloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Vec)(__builtin_convertvector(halves, Ints) << 16);
}

// The first ``count`` elements, zeros behind them.
inline Vec load_some(const bfloat16* from, int64_t count) {
  if (count >= LANES) return load(from);
  bfloat16 padded[LANES] = {};
  for (int lane = 0; lane < LANES && lane < count; lane++) padded[lane] = from[lane];
  return load(padded);
}

#ifdef __AVX512F__
inline __mmask16 first(int64_t count) { return count >= LANES ? 0xffff : (1 << count) - 1; }
inline Vec load_some(const float* from, int64_t count) { return (Vec)_mm512_maskz_loadu_ps(first(count), from); }
inline void store_some(float* to, Vec vec, int64_t count) { _mm512_mask_storeu_ps(to, first(count), (__m512)vec); }
inline Vec permute(Vec vec, Ints from) { return (Vec)_mm512_permutexvar_ps((__m512i)from, (__m512)vec); }
inline Vec gather(const float* from, Ints at) { return (Vec)_mm512_i32gather_ps((__m512i)at, from, 4); }
#else
inline __m256i first(int64_t count) { return (__m256i)(lane_numbers() < int(count)); }
inline Vec load_some(const float* from, int64_t count) { return (Vec)_mm256_maskload_ps(from, first(count)); }
inline void store_some(float* to, Vec vec, int64_t count) { _mm256_maskstore_ps(to, first(count), (__m256)vec); }
inline Vec permute(Vec vec, Ints from) { return (Vec)_mm256_permutevar8x32_ps((__m256)vec, (__m256i)from); }
inline Vec gather(const float* from, Ints at) { return (Vec)_mm256_i32gather_ps(from, (__m256i)at, 4); }
#endif

// Rounds as ``from_float``.
inline void store(bfloat16* to, Vec vec) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)vec));
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
  const Ints bits = (Ints)vec, rounded = bits + 0x7fff + (bits >> 16 & 1);
  const Halves halves = __builtin_convertvector(vec == vec ? rounded >> 16 : 0x7fc0, Halves);
  std::memcpy(to, &halves, sizeof halves);
#endif
}

inline void store_some(bfloat16* to, Vec vec, int64_t count) {
  if (count >= LANES) return store(to, vec);
  for (int lane = 0; lane < LANES && lane < count; lane++) from_float(vec[lane], to[lane]);
}

// Transposes LANES vectors: halves, quarters and so on change places.
inline void transpose(Vec* tile) {
#pragma GCC unroll 4
  for (int step = LANES / 2; step; step /= 2) {
    const Ints upper = (lane_numbers() & step) != 0, partner = lane_numbers() ^ step;
#pragma GCC unroll 16
    for (int at = 0; at < LANES; at++) {
      if (at & step) continue;
      const Vec a = tile[at], b = tile[at + step];
      tile[at] = upper ? permute(b, partner) : a;
      tile[at + step] = upper ? b : permute(a, partner);
    }
  }
}
