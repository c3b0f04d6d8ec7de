// Softmax attention on a packed projection (B, N, 3, H, D), one pass over the keys with a running maximum.
//
// Keys of a head are packed into panels, their dimension outermost, values into panels of columns, so that tiles of ROWS
// queries by a panel stay in registers. A block of QUERIES queries takes KEYS keys at a time, whose panels then lie in
// the second-level cache for all its groups of queries, and whose scores lie in the first-level cache. Exponentials are
// powers of two. In bfloat16, factors of products are bfloat16, the weights too; sums and exponents are float32.

#include "tiles.h"

namespace {

constexpr int GROUP = LANES == 16 ? 7 : 6;  // of the queries behind the last ROWS
constexpr int LEAST = 4;                    // as many rows keep the units busy
constexpr int QUERIES = 8 * ROWS;
constexpr int KEYS = 512;

struct Shape {
  int64_t batch, tokens, heads, dim, batch_stride, token_stride, kind_stride, head_stride;

  int64_t padded() const { return round_up(tokens, PANEL); }
  int64_t width() const { return round_up(dim, PANEL); }
};

template <typename T>
struct Head {
  const T* queries;
  Unit<T>*keys, *values;  // (padded / PANEL, D in units, PANEL), (width / PANEL, padded in units, PANEL)
  float* bias;            // (padded), added to the scores
  T* out;
  float *lse, scale;  // of scores to exponents of two
};

template <typename T>
struct State {
  Unit<T>* queries;                   // groups of (D in units, rows of the group)
  float *scores, *out, *peak, *total;  // (ROWS, KEYS), (QUERIES, width), (QUERIES), (QUERIES)
};

int rows_of_group(int count) { return count > GROUP + LEAST ? ROWS : count > LEAST ? GROUP : LEAST; }

// Scores of M queries with V vectors of keys, added to the largest of each lane.
template <int M, int V, typename U>
void multiply_keys(const U* queries, const U* keys, const float* bias, int64_t steps, float* scores, Vec* peak) {
  Vec sums[M][V];
  product<M, V, 1, M>(sums, queries, keys, steps);
#pragma GCC unroll 16
  for (int row = 0; row < M; row++) {
    for (int half = 0; half < V; half++) {
      sums[row][half] += load(bias + half * LANES);
      store(scores + row * KEYS + half * LANES, sums[row][half]);
    }
    peak[row] = maximum(maximum(sums[row][0], sums[row][V - 1]), peak[row]);
  }
}

// Adds V vectors of the values' columns, weighted, to M rows of ``out``.
template <int M, int V, typename U>
void multiply_values(const U* weights, const U* values, int64_t steps, float* out, int64_t width) {
  Vec sums[M][V];
#pragma GCC unroll 16
  for (int row = 0; row < M; row++)
    for (int half = 0; half < V; half++) sums[row][half] = load(out + row * width + half * LANES);
  multiply<M, V, KEYS, 1>(sums, weights, values, steps);
#pragma GCC unroll 16
  for (int row = 0; row < M; row++)
    for (int half = 0; half < V; half++) store(out + row * width + half * LANES, sums[row][half]);
}

inline void store_weights(float* to, Vec weights, int at, float) { store(to + at, weights); }
inline void store_weights(float* to, Vec weights, int at, Pair) { store((bfloat16*)to + at, weights); }

// Turns the scores of a row into weights in their place; the factor of what is summed up so far.
template <typename U>
float weigh(float* scores, int keys, float largest_score, float scale, float& peak, float& total) {
  const float before = peak;
  peak = std::max(before, largest_score * scale);
  const float shift = peak == -INFINITY ? 0.0f : peak;  // every key is left out so far
  Vec sums = fill(0.0f);
  for (int key = 0; key < keys; key += LANES) {
    const Vec weight = exp2(load(scores + key) * scale - shift);
    store_weights(scores, weight, key, U());
    sums += weight;
  }
  const float kept = before == -INFINITY ? 0.0f : exp2(fill(before - peak))[0];
  total = total * kept + sum(sums);
  return kept;
}

// M queries with ``count`` keys from ``first``.
template <int M, typename T>
void attend(const Shape& shape, const Head<T>& head, int64_t first, int count, const State<T>& state) {
  const int64_t steps = units_of<T>(shape.dim), width = shape.width();
  Vec peaks[M];
  for (int row = 0; row < M; row++) peaks[row] = fill(-INFINITY);
  for (int key = 0; key < count; key += PANEL) {
    const auto tile = count - key > LANES ? multiply_keys<M, 2, Unit<T>> : multiply_keys<M, 1, Unit<T>>;
    tile(state.queries, head.keys + (first + key) * steps, head.bias + first + key, steps, state.scores + key, peaks);
  }
  for (int row = 0; row < M; row++) {
    const float kept = weigh<Unit<T>>(state.scores + row * KEYS, int(round_up(count, LANES)), largest(peaks[row]),
                                      head.scale, state.peak[row], state.total[row]);
    float* out = state.out + row * width;
    if (kept != 1.0f)
      for (int64_t column = 0; column < width; column += LANES) store(out + column, load(out + column) * kept);
  }
  for (int64_t column = 0; column < shape.dim; column += PANEL) {
    const auto tile = shape.dim - column > LANES ? multiply_values<M, 2, Unit<T>> : multiply_values<M, 1, Unit<T>>;
    tile((Unit<T>*)state.scores, head.values + (column * shape.padded() + first * PANEL) / PER<T>,
         units_of<T>(count), state.out + column, width);
  }
}

// ``count`` queries from ``first`` with all keys.
template <typename T>
void attend_block(const Shape& shape, const Head<T>& head, int64_t first, int count, State<T> state) {
  const int64_t steps = units_of<T>(shape.dim), width = shape.width();
  std::fill_n(state.out, (count + ROWS) * width, 0.0f);
  std::fill_n(state.peak, count + ROWS, -INFINITY);
  std::fill_n(state.total, count + ROWS, 0.0f);
  for (int row = 0, rows; row < count; row += rows) {
    rows = rows_of_group(count - row);
    transpose(head.queries + (first + row) * shape.token_stride, shape.token_stride, std::min(rows, count - row),
              shape.dim, state.queries + row * steps, rows);
  }
  for (int64_t key = 0; key < shape.tokens; key += KEYS) {
    const int keys = int(std::min<int64_t>(KEYS, shape.tokens - key));
    for (int row = 0, rows; row < count; row += rows) {
      rows = rows_of_group(count - row);
      const auto group = rows == ROWS ? attend<ROWS, T> : rows == GROUP ? attend<GROUP, T> : attend<LEAST, T>;
      group(shape, head, key, keys,
            {state.queries + row * steps, state.scores, state.out + row * width, state.peak + row, state.total + row});
    }
  }
  for (int row = 0; row < count; row++) {
    const float total = state.total[row], factor = total == 0.0f ? 0.0f : 1.0f / total;
    T* to = head.out + (first + row) * shape.heads * shape.dim;
    for (int64_t d = 0; d < shape.dim; d += LANES)
      store_some(to + d, load(state.out + row * width + d) * factor, shape.dim - d);
    if (head.lse) head.lse[first + row] = total == 0.0f ? INFINITY : state.peak[row] * 0.69314718f + std::log(total);
  }
}

// Keys, values and bias from token ``first`` up to ``last``, the first of a panel.
template <typename T>
void pack(const Shape& shape, const Head<T>& head, const float* bias, float scale, int64_t first, int64_t last) {
  const int64_t stride = shape.token_stride, steps = units_of<T>(shape.dim);
  last = std::min(last, shape.tokens);
  const T* keys = head.queries + shape.kind_stride;
  for (int64_t token = first; token < last; token += LANES) {
    Unit<T>* panel = head.keys + token / PANEL * PANEL * steps + token % PANEL;
    transpose(keys + token * stride, stride, std::min<int64_t>(LANES, last - token), shape.dim, panel, PANEL);
  }
  pack_rows(keys + shape.kind_stride + first * stride, stride, last - first, shape.dim,
            head.values + first / PER<T> * PANEL, shape.padded() / PER<T>);
  for (int64_t token = first; token < last; token++) head.bias[token] = bias ? bias[token] / scale : 0.0f;
  if (last == shape.tokens) std::fill_n(head.bias + last, shape.padded() - last, -INFINITY);
}

template <typename T>
void run(const Shape& shape, const T* qkv, const float* bias, T* out, float* lse, float scale, int threads) {
  const int64_t heads = shape.batch * shape.heads, padded = shape.padded(), width = shape.width();
  // Each thread packs whole heads, as long as there is one for each of them; they share those that remain.
  const int64_t whole = heads / threads * threads;
  const int64_t blocks = round_up((shape.tokens + QUERIES - 1) / QUERIES, threads);
  const int64_t block = std::min<int64_t>(QUERIES, round_up((shape.tokens + blocks - 1) / blocks, GROUP));
  const int64_t panels = padded / PANEL, packed = padded * (shape.dim + 1 + width + 1);
  Buffer shared((heads - whole) * packed);
  auto head_of = [&](int64_t number, float* memory) {
    const int64_t image = number / shape.heads, index = number % shape.heads;
    return Head<T>{qkv + image * shape.batch_stride + index * shape.head_stride,
                   (Unit<T>*)memory,
                   (Unit<T>*)(memory + padded * (shape.dim + 1)),
                   memory + padded * (shape.dim + 1 + width),
                   out + (image * shape.tokens * shape.heads + index) * shape.dim,
                   lse ? lse + number * shape.tokens : nullptr,
                   scale * 1.44269504f};
  };
  auto bias_of = [&](int64_t number) { return bias ? bias + number / shape.heads * shape.tokens : nullptr; };
#pragma omp parallel num_threads(threads)
  {
    constexpr int ALL = QUERIES + ROWS;
    Buffer own(whole ? packed : 0), scratch(ALL * (shape.dim + 1 + width + 2) + ROWS * KEYS);
    State<T> state;
    state.scores = &scratch[0], state.out = state.scores + ROWS * KEYS, state.peak = state.out + ALL * width;
    state.total = state.peak + ALL, state.queries = (Unit<T>*)(state.total + ALL);
    auto attend_from = [&](const Head<T>& head, int64_t first, int64_t rows) {
      attend_block(shape, head, first, int(std::min(rows, shape.tokens - first)), state);
    };
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < (heads - whole) * panels; task++) {
      const int64_t number = task / panels, first = task % panels * PANEL;
      pack(shape, head_of(whole + number, &shared[number * packed]), bias_of(whole + number), scale, first, first + PANEL);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < whole; number++) {
      const Head<T> head = head_of(number, &own[0]);
      pack(shape, head, bias_of(number), scale, 0, shape.tokens);
      for (int64_t first = 0; first < shape.tokens; first += QUERIES) attend_from(head, first, QUERIES);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < (heads - whole) * blocks; task++) {
      const int64_t number = task / blocks, first = task % blocks * block;
      if (first < shape.tokens) attend_from(head_of(whole + number, &shared[number * packed]), first, block);
    }
  }
}

}  // namespace

// qkv (batch, tokens, 3, heads, dim) with the given strides of elements and a last stride of 1; bias (batch, tokens) or
// null; out (batch, tokens, heads, dim); lse (batch, heads, tokens), natural logarithms, or null. scale is above 0, far
// enough for its inverse.
extern "C" void attention(const void* qkv, const float* bias, void* out, float* lse, int64_t batch, int64_t tokens,
                          int64_t heads, int64_t dim, int64_t batch_stride, int64_t token_stride, int64_t kind_stride,
                          int64_t head_stride, int64_t is_bfloat16, int64_t threads, float scale) {
  const Shape shape{batch, tokens, heads, dim, batch_stride, token_stride, kind_stride, head_stride};
  if (is_bfloat16)
    run(shape, (const bfloat16*)qkv, bias, (bfloat16*)out, lse, scale, int(threads));
  else
    run(shape, (const float*)qkv, bias, (float*)out, lse, scale, int(threads));
}
