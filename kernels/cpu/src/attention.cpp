// Softmax attention on a packed projection (B, N, 3, H, D), one pass over the keys with a running maximum.
//
// Keys of a head are packed into panels of two vectors, their dimension outermost, so that a tile of ROWS queries by a
// panel stays in registers; values into rows of whole vectors. A task is QUERIES queries of a head; it takes KEYS keys
// at a time, whose panels and values then lie in the second-level cache for all its groups of ROWS queries, and whose
// scores lie in the first-level cache.

#include "simd.h"

#include <algorithm>

namespace {

constexpr int ROWS = LANES == 16 ? 14 : 6;
constexpr int PANEL = 2 * LANES;
constexpr int QUERIES = 8 * ROWS;
constexpr int KEYS = 256;

struct Head {
  const float *panels, *values, *bias;  // (N / PANEL, D, PANEL), (N, width), (N), N padded
  int64_t dim, width;
};

struct State {
  float *scores, *out, *peak, *total;  // (ROWS, KEYS), (QUERIES, width), (QUERIES), (QUERIES)
};

// Scores of M queries with `keys` keys from `first`, and their largest.
template <int M>
void multiply_keys(const Head& head, const float* queries, int64_t first, int keys, float* scores, Vec* peak) {
  for (int panel = 0; panel < keys; panel += PANEL) {
    const float* column = head.panels + (first + panel) * head.dim;
    Vec sums[M][2];
#pragma GCC unroll 16
    for (int row = 0; row < M; row++) sums[row][0] = sums[row][1] = fill(0.0f);
    for (int64_t d = 0; d < head.dim; d++, column += PANEL) {
      const Vec left = load(column), right = load(column + LANES);
#pragma GCC unroll 16
      for (int row = 0; row < M; row++) {
        const Vec query = fill(queries[row * head.dim + d]);
        sums[row][0] += query * left;
        sums[row][1] += query * right;
      }
    }
    const Vec bias[2] = {load(head.bias + first + panel), load(head.bias + first + panel + LANES)};
#pragma GCC unroll 16
    for (int row = 0; row < M; row++) {
      sums[row][0] += bias[0], sums[row][1] += bias[1];
      store(scores + row * KEYS + panel, sums[row][0]);
      store(scores + row * KEYS + panel + LANES, sums[row][1]);
      peak[row] = maximum(maximum(sums[row][0], sums[row][1]), peak[row]);
    }
  }
}

// Adds the values of `keys` keys, weighted by `scores`, to M rows of `out`.
template <int M>
void multiply_values(const Head& head, const float* weights, int64_t first, int keys, float* out) {
  for (int64_t column = 0; column < head.width; column += PANEL) {
    const float* value = head.values + first * head.width + column;
    Vec sums[M][2];
#pragma GCC unroll 16
    for (int row = 0; row < M; row++)
      for (int half = 0; half < 2; half++) sums[row][half] = load(out + row * head.width + column + half * LANES);
    for (int key = 0; key < keys; key++, value += head.width) {
      const Vec left = load(value), right = load(value + LANES);
#pragma GCC unroll 16
      for (int row = 0; row < M; row++) {
        const Vec weight = fill(weights[row * KEYS + key]);
        sums[row][0] += weight * left;
        sums[row][1] += weight * right;
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < M; row++)
      for (int half = 0; half < 2; half++) store(out + row * head.width + column + half * LANES, sums[row][half]);
  }
}

template <int M>
void attend(const Head& head, const float* queries, int64_t first, int keys, State state) {
  Vec peaks[M];
  for (int row = 0; row < M; row++) peaks[row] = fill(-INFINITY);
  multiply_keys<M>(head, queries, first, keys, state.scores, peaks);
  for (int row = 0; row < M; row++) {
    float* scores = state.scores + row * KEYS;
    const float before = state.peak[row], peak = std::max(before, largest(peaks[row]));
    const float shift = peak == -INFINITY ? 0.0f : peak;  // every key is left out so far
    Vec total = fill(0.0f);
    for (int key = 0; key < keys; key += LANES) {
      const Vec weight = exp(load(scores + key) - shift);
      store(scores + key, weight);
      total += weight;
    }
    const float kept = before == -INFINITY ? 0.0f : std::exp(before - peak);
    state.peak[row] = peak;
    state.total[row] = state.total[row] * kept + sum(total);
    if (kept != 1.0f) {
      float* out = state.out + row * head.width;
      for (int64_t column = 0; column < head.width; column += LANES) store(out + column, load(out + column) * kept);
    }
  }
  multiply_values<M>(head, state.scores, first, keys, state.out);
}

// All groups of the queries of a task.
void attend_all(const Head& head, const float* queries, int count, int64_t first, int keys, State state) {
  auto step = [&](auto attend_group, int rows) {
    for (; count >= rows; count -= rows, queries += rows * head.dim) {
      attend_group(head, queries, first, keys, state);
      state.out += rows * head.width, state.peak += rows, state.total += rows;
    }
  };
  step(attend<ROWS>, ROWS);
  step(attend<ROWS / 2>, ROWS / 2);
  step(attend<2>, 2);
  step(attend<1>, 1);
}

struct Shape {
  int64_t batch, tokens, heads, dim, padded, width;
  int64_t batch_stride, token_stride, kind_stride, head_stride;
};

// Keys and values of PANEL tokens of a head; zeros behind the last one.
template <typename T>
void pack(const Shape& shape, const T* qkv, int64_t task, float* panels, float* values) {
  const int64_t count = shape.padded / PANEL, head = task / count, token = task % count * PANEL;
  const T* from = qkv + head / shape.heads * shape.batch_stride + head % shape.heads * shape.head_stride +
                  token * shape.token_stride + shape.kind_stride;
  panels += (head * shape.padded + token) * shape.dim;
  values += (head * shape.padded + token) * shape.width;
  for (int64_t key = 0; key < PANEL; key++, from += shape.token_stride, values += shape.width) {
    const bool real = token + key < shape.tokens;
    for (int64_t d = 0; d < shape.dim; d++) panels[d * PANEL + key] = real ? to_float(from[d]) : 0.0f;
    for (int64_t d = 0; d < shape.width; d++)
      values[d] = real && d < shape.dim ? to_float(from[shape.kind_stride + d]) : 0.0f;
  }
}

// The QUERIES queries of a task with all keys.
template <typename T>
void attend_task(const Shape& shape, const T* qkv, int64_t task, const Head& head, float scale, float* scratch, T* out,
                 float* lse) {
  const int64_t blocks = (shape.tokens + QUERIES - 1) / QUERIES, image = task / blocks / shape.heads;
  const int64_t number = task / blocks % shape.heads, first = task % blocks * QUERIES;
  const int count = int(std::min<int64_t>(QUERIES, shape.tokens - first));
  float *sums = scratch, *scores = sums + QUERIES * shape.width, *queries = scores + ROWS * KEYS;
  float *peak = queries + QUERIES * shape.dim, *total = peak + QUERIES;
  std::fill_n(sums, count * shape.width, 0.0f);
  std::fill_n(peak, count, -INFINITY);
  std::fill_n(total, count, 0.0f);
  const T* from = qkv + image * shape.batch_stride + first * shape.token_stride + number * shape.head_stride;
  for (int row = 0; row < count; row++)
    for (int64_t d = 0; d < shape.dim; d++)
      queries[row * shape.dim + d] = to_float(from[row * shape.token_stride + d]) * scale;
  for (int64_t key = 0; key < shape.padded; key += KEYS)
    attend_all(head, queries, count, key, int(std::min<int64_t>(KEYS, shape.padded - key)),
               State{scores, sums, peak, total});
  for (int row = 0; row < count; row++) {
    const int64_t token = image * shape.tokens + first + row;
    const float factor = total[row] == 0.0f ? 0.0f : 1.0f / total[row];
    T* to = out + (token * shape.heads + number) * shape.dim;
    for (int64_t d = 0; d < shape.dim; d++) from_float(sums[row * shape.width + d] * factor, to[d]);
    if (lse)
      lse[(image * shape.heads + number) * shape.tokens + first + row] =
          total[row] == 0.0f ? INFINITY : peak[row] + std::log(total[row]);
  }
}

int64_t scratch_size(const Shape& shape) { return QUERIES * (shape.dim + shape.width + 2) + ROWS * KEYS; }

template <typename T>
void run(const Shape& shape, const T* qkv, const float* bias, T* out, float* lse, float scale, int threads) {
  const int64_t heads = shape.batch * shape.heads, blocks = (shape.tokens + QUERIES - 1) / QUERIES;
  Buffer panels(heads * shape.padded * shape.dim), values(heads * shape.padded * shape.width);
  Buffer biases(shape.batch * shape.padded);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t at = 0; at < shape.batch * shape.padded; at++) {
      const int64_t image = at / shape.padded, token = at % shape.padded;
      biases[at] = token >= shape.tokens ? -INFINITY : bias ? bias[image * shape.tokens + token] : 0.0f;
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < heads * (shape.padded / PANEL); task++) pack(shape, qkv, task, &panels[0], &values[0]);
    Buffer scratch(scratch_size(shape));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < heads * blocks; task++) {
      const int64_t number = task / blocks;
      const Head head{&panels[number * shape.padded * shape.dim], &values[number * shape.padded * shape.width],
                      &biases[number / shape.heads * shape.padded], shape.dim, shape.width};
      attend_task(shape, qkv, task, head, scale, &scratch[0], out, lse);
    }
  }
}

}  // namespace

// qkv (batch, tokens, 3, heads, dim) with the given strides of elements and a last stride of 1; bias (batch, tokens) or
// null; out (batch, tokens, heads, dim); lse (batch, heads, tokens), natural logarithms, or null.
extern "C" void attention(const void* qkv, const float* bias, void* out, float* lse, int64_t batch, int64_t tokens,
                          int64_t heads, int64_t dim, int64_t batch_stride, int64_t token_stride, int64_t kind_stride,
                          int64_t head_stride, int64_t is_bfloat16, int64_t threads, float scale) {
  const Shape shape{batch, tokens, heads, dim, round_up(tokens, PANEL), round_up(dim, PANEL), batch_stride,
                    token_stride, kind_stride, head_stride};
  if (is_bfloat16)
    run(shape, (const bfloat16*)qkv, bias, (bfloat16*)out, lse, scale, int(threads));
  else
    run(shape, (const float*)qkv, bias, (float*)out, lse, scale, int(threads));
}
