// Gradient of softmax attention on a packed projection (B, N, 3, H, D).
//
//   P = exp(scale Q K^T + bias - lse)    dP = dO V^T    dS = P (dP - delta), delta = sum of dO O over a row
//   dV = P^T dO    dK = scale dS^T Q    dQ = scale dS K
//
// A task is a chunk of the keys of a head, taken KEYS at a time with QUERIES queries at a time, all of which lie in the
// second-level cache. It owns dK and dV of its keys and a part of dQ; parts are added in the order of the chunks.
// The number of chunks depends on the shape only: results are the same for any number of threads.
//
// Every product has a tile of ROWS rows by two vectors in registers. Its left factor is read one float at a time, its
// right factor in vectors. Rows of a tile behind the last token hold anything; no sum takes them.

#include "simd.h"

#include <algorithm>

namespace {

constexpr int ROWS = LANES == 16 ? 14 : 6;
constexpr int PANEL = 2 * LANES;
constexpr int QUERIES = LANES == 16 ? 112 : 72;   // most of a block, whole tiles
constexpr int MOST_KEYS = LANES == 16 ? 272 : 144;  // of a block, whole vectors
constexpr int KEYS = LANES == 16 ? 288 : 144;     // their whole tiles and panels
constexpr int TASKS = 32;                        // at least, where there are as many blocks of keys

struct Shape {
  int64_t batch, tokens, heads, dim, batch_stride, token_stride, kind_stride, head_stride;
  int64_t padded, width;          // tokens in whole tiles, dim in whole vectors
  int64_t queries, keys, chunks;  // of a block, of a block, of a head

  // Floats of the queries of a head and of all that belongs to them, in whole cache lines.
  int64_t packed_size() const { return round_up(padded * (2 * dim + 2 * width + 1), 16); }
  // Of a head's first token in tensors (B, N, 3, H, D) with strides, (B, N, H, D), and (B, N, 3, H, D) without strides.
  int64_t projection(int64_t head) const { return head / heads * batch_stride + head % heads * head_stride; }
  int64_t output(int64_t head) const { return (head / heads * tokens * heads + head % heads) * dim; }
  int64_t gradient(int64_t head) const { return (head / heads * tokens * 3 * heads + head % heads) * dim; }
};

// A matrix (N, D) of a head as left factor, tiles (N / ROWS, D, ROWS), and as right factor, rows (N, width).
struct Packed {
  float *tiles, *rows;

  Packed from(int64_t token, const Shape& shape) const { return {tiles + token * shape.dim, rows + token * shape.width}; }
};

struct Queries {
  Packed query, grad_out;
  float* delta;
  const float* lse;

  Queries from(int64_t token, const Shape& shape) const {
    return {query.from(token, shape), grad_out.from(token, shape), delta + token, lse + token};
  }
};

struct Keys {
  float *key_panels, *value_panels, *key_rows, *bias;  // (KEYS / PANEL, D, PANEL) twice, (KEYS, width), (KEYS)
  float *weights, *slopes;                             // P and dS, (QUERIES, KEYS)
  float *grad_key, *grad_value;                        // (KEYS, width)
  int count;
};

// out (ROWS, V vectors) = or += the sum over k of left[row * ROW + k * STEP] * right[k * right_stride].
template <int ROW, int STEP, bool ADD, int V>
void multiply(const float* left, const float* right, int64_t right_stride, int64_t depth, float* out, int64_t stride) {
  Vec sums[ROWS][V];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sums[row][v] = fill(0.0f);
  for (int64_t k = 0; k < depth; k++, left += STEP, right += right_stride) {
    Vec factor[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) factor[v] = load(right + v * LANES);
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; row++) {
      const Vec value = fill(left[row * ROW]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sums[row][v] += value * factor[v];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      float* to = out + row * stride + v * LANES;
      store(to, ADD ? load(to) + sums[row][v] : sums[row][v]);  // sums of blocks: shorter chains round less
    }
}

// Adds to ROWS rows of `out` their products with all columns of `right`.
template <int ROW, int STEP>
void add_products(const float* left, const float* right, int64_t depth, float* out, int64_t width) {
  int64_t column = 0;
  for (; column + PANEL <= width; column += PANEL)
    multiply<ROW, STEP, true, 2>(left, right + column, width, depth, out + column, width);
  if (column < width) multiply<ROW, STEP, true, 1>(left, right + column, width, depth, out + column, width);
}

// P and dS of `count` queries and all keys of a block.
void weigh(const Queries& queries, const Keys& keys, int count, int64_t dim, float scale) {
  for (int panel = 0; panel < keys.count; panel += PANEL) {
    const int vectors = keys.count - panel > LANES ? 2 : 1;
    const auto product = vectors == 2 ? multiply<1, ROWS, false, 2> : multiply<1, ROWS, false, 1>;
    for (int row = 0; row < count; row += ROWS) {
      float *weights = keys.weights + row * KEYS + panel, *slopes = keys.slopes + row * KEYS + panel;
      product(queries.query.tiles + row * dim, keys.key_panels + panel * dim, PANEL, dim, weights, KEYS);
      product(queries.grad_out.tiles + row * dim, keys.value_panels + panel * dim, PANEL, dim, slopes, KEYS);
      for (int query = row; query < std::min(row + ROWS, count); query++, weights += KEYS, slopes += KEYS)
        for (int at = 0; at < vectors * LANES; at += LANES) {
          const Vec score = load(weights + at) * scale + load(keys.bias + panel + at);
          const Vec weight = exp(score - queries.lse[query]);
          store(weights + at, weight);
          store(slopes + at, weight * (load(slopes + at) - queries.delta[query]));
        }
    }
  }
}

// Adds what `count` queries and a block of keys give to the three gradients.
void add_gradients(const Queries& queries, const Keys& keys, int count, const Shape& shape, float scale, float* grad) {
  weigh(queries, keys, count, shape.dim, scale);
  const int64_t width = shape.width;
  for (int key = 0; key < keys.count; key += ROWS)
    add_products<1, KEYS>(keys.weights + key, queries.grad_out.rows, count, keys.grad_value + key * width, width);
  for (int key = 0; key < keys.count; key += ROWS)
    add_products<1, KEYS>(keys.slopes + key, queries.query.rows, count, keys.grad_key + key * width, width);
  for (int row = 0; row < count; row += ROWS)
    add_products<KEYS, 1>(keys.slopes + row * KEYS, keys.key_rows, keys.count, grad + row * width, width);
}

// A row of `width` floats, zeros behind the first `dim`.
template <typename T>
void copy_row(const T* from, const Shape& shape, float* to) {
  for (int64_t d = 0; d < shape.dim; d++) to[d] = to_float(from[d]);
  std::fill_n(to + shape.dim, shape.width - shape.dim, 0.0f);
}

// ROWS rows of a head, `real` of which exist.
template <typename T>
void pack_rows(const T* from, int64_t stride, int64_t real, const Shape& shape, Packed to) {
  for (int64_t row = 0; row < real; row++) copy_row(from + row * stride, shape, to.rows + row * shape.width);
  std::fill_n(to.rows + real * shape.width, (ROWS - real) * shape.width, 0.0f);
  for (int64_t d = 0; d < shape.dim; d++)
    for (int64_t row = 0; row < ROWS; row++) to.tiles[d * ROWS + row] = to.rows[row * shape.width + d];
}

template <typename T>
void pack_keys(const Shape& shape, const T* key, const Keys& keys) {
  for (float* panels : {keys.key_panels, keys.value_panels})
    std::fill_n(panels, round_up(keys.count, PANEL) * shape.dim, 0.0f);
  for (int64_t token = 0; token < keys.count; token++, key += shape.token_stride) {
    const int64_t panel = token / PANEL * PANEL * shape.dim + token % PANEL;
    for (int64_t d = 0; d < shape.dim; d++) {
      keys.key_panels[panel + d * PANEL] = to_float(key[d]);
      keys.value_panels[panel + d * PANEL] = to_float(key[shape.kind_stride + d]);
    }
    copy_row(key, shape, keys.key_rows + token * shape.width);
  }
}

template <typename T>
struct Tensors {
  const T *grad_out, *out, *qkv;
  const float *lse, *bias;
  T* grad;
};

Queries place_queries(const Shape& shape, float* at, const float* lse) {
  const int64_t tiles = shape.padded * shape.dim, rows = shape.padded * shape.width;
  return {{at + 2 * rows, at}, {at + 2 * rows + tiles, at + rows}, at + 2 * (rows + tiles), lse};
}

// ROWS queries of a head from `token`.
template <typename T>
void pack_queries(const Shape& shape, const Tensors<T>& tensors, int64_t head, int64_t token, const Queries& queries) {
  const int64_t real = std::min<int64_t>(ROWS, shape.tokens - token), stride = shape.heads * shape.dim;
  const int64_t at = shape.output(head) + token * stride;
  const T *grad_out = tensors.grad_out + at, *out = tensors.out + at;
  const T* query = tensors.qkv + shape.projection(head) + token * shape.token_stride;
  pack_rows(query, shape.token_stride, real, shape, queries.query.from(token, shape));
  pack_rows(grad_out, stride, real, shape, queries.grad_out.from(token, shape));
  for (int64_t row = 0; row < real; row++) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < shape.dim; d++)
      total += to_float(grad_out[row * stride + d]) * to_float(out[row * stride + d]);
    queries.delta[token + row] = total;
  }
}

int64_t scratch_size(const Shape& shape) {
  return KEYS * (2 * shape.dim + 3 * shape.width + 1) + 2 * QUERIES * KEYS;
}

template <typename T>
void run_task(const Shape& shape, const Tensors<T>& tensors, int64_t task, float scale, const Queries& all, float* part,
              float* scratch) {
  const int64_t blocks = (shape.tokens + shape.keys - 1) / shape.keys, width = shape.width;
  const int64_t head = task / shape.chunks, chunk = task % shape.chunks;
  std::fill_n(part, shape.padded * width, 0.0f);
  Keys keys;
  keys.weights = scratch, keys.slopes = keys.weights + QUERIES * KEYS, keys.bias = keys.slopes + QUERIES * KEYS;
  keys.key_panels = keys.bias + KEYS, keys.value_panels = keys.key_panels + KEYS * shape.dim;
  keys.key_rows = keys.value_panels + KEYS * shape.dim, keys.grad_key = keys.key_rows + KEYS * width;
  keys.grad_value = keys.grad_key + KEYS * width;
  for (int64_t block = chunk * blocks / shape.chunks; block < (chunk + 1) * blocks / shape.chunks; block++) {
    const int64_t first = block * shape.keys, kind = shape.heads * shape.dim;
    keys.count = int(std::min(shape.keys, shape.tokens - first));
    pack_keys(shape, tensors.qkv + shape.projection(head) + shape.kind_stride + first * shape.token_stride, keys);
    std::fill_n(keys.bias, KEYS, 0.0f);
    if (tensors.bias) std::copy_n(tensors.bias + head / shape.heads * shape.tokens + first, keys.count, keys.bias);
    for (float* grad : {keys.grad_key, keys.grad_value}) std::fill_n(grad, round_up(keys.count, ROWS) * width, 0.0f);
    for (int64_t query = 0; query < shape.tokens; query += shape.queries) {
      const int count = int(std::min(shape.queries, shape.tokens - query));
      add_gradients(all.from(query, shape), keys, count, shape, scale, part + query * width);
    }
    T* to = tensors.grad + shape.gradient(head) + first * 3 * kind + kind;
    for (int64_t key = 0; key < keys.count; key++, to += 3 * kind)
      for (int64_t d = 0; d < shape.dim; d++) {
        from_float(keys.grad_key[key * width + d] * scale, to[d]);
        from_float(keys.grad_value[key * width + d], to[kind + d]);
      }
  }
}

// dQ of a query: the sum of its parts, the first of which is at `part`.
template <typename T>
void add_parts(const Shape& shape, const Tensors<T>& tensors, int64_t head, int64_t token, float scale, float* part) {
  part += token * shape.width;
  for (int64_t chunk = 1; chunk < shape.chunks; chunk++)
    for (int64_t d = 0; d < shape.dim; d++) part[d] += part[chunk * shape.padded * shape.width + d];
  T* to = tensors.grad + shape.gradient(head) + token * 3 * shape.heads * shape.dim;
  for (int64_t d = 0; d < shape.dim; d++) from_float(part[d] * scale, to[d]);
}

// Length of the fewest equal parts of at most `most`, in whole `step`.
int64_t even_part(int64_t total, int64_t most, int64_t step) {
  const int64_t parts = (total + most - 1) / most;
  return round_up((total + parts - 1) / parts, step);
}

// Heads of several chunks are packed by all threads; a head of one chunk by its own, into its second-level cache.
template <typename T>
void run(const Shape& shape, const Tensors<T>& tensors, float scale, int threads) {
  const int64_t heads = shape.batch * shape.heads, tiles = shape.padded / ROWS, shared = shape.chunks > 1 ? heads : 0;
  const int64_t packed_size = shape.packed_size(), part_size = shape.padded * shape.width;
  Buffer packed(shared * packed_size), parts(shared * shape.chunks * part_size);
  auto queries = [&](int64_t head, float* at) { return place_queries(shape, at, tensors.lse + head * shape.tokens); };
#pragma omp parallel num_threads(threads)
  {
    Buffer scratch(scratch_size(shape)), own(shared ? 0 : packed_size + part_size);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < shared * tiles; task++)
      pack_queries(shape, tensors, task / tiles, task % tiles * ROWS,
                   queries(task / tiles, &packed[task / tiles * packed_size]));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < shared * shape.chunks; task++)
      run_task(shape, tensors, task, scale, queries(task / shape.chunks, &packed[task / shape.chunks * packed_size]),
               &parts[task * part_size], &scratch[0]);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < shared * shape.tokens; task++)
      add_parts(shape, tensors, task / shape.tokens, task % shape.tokens, scale,
                &parts[task / shape.tokens * shape.chunks * part_size]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t head = 0; head < heads - shared; head++) {
      const Queries all = queries(head, &own[part_size]);
      for (int64_t tile = 0; tile < tiles; tile++) pack_queries(shape, tensors, head, tile * ROWS, all);
      run_task(shape, tensors, head, scale, all, &own[0], &scratch[0]);
      for (int64_t token = 0; token < shape.tokens; token++) add_parts(shape, tensors, head, token, scale, &own[0]);
    }
  }
}

}  // namespace

// grad_out, out (batch, tokens, heads, dim); qkv (batch, tokens, 3, heads, dim), any strides of elements but the last, of
// 1; lse (batch, heads, tokens) natural logarithms; bias (batch, tokens) or null; grad as qkv, whole.
extern "C" void attention_backward(const void* grad_out, const void* out, const void* qkv, const float* lse,
                                   const float* bias, void* grad, int64_t batch, int64_t tokens, int64_t heads,
                                   int64_t dim, int64_t batch_stride, int64_t token_stride, int64_t kind_stride,
                                   int64_t head_stride, int64_t is_bfloat16, int64_t threads, float scale) {
  const int64_t queries = even_part(tokens, QUERIES, ROWS), keys = even_part(tokens, MOST_KEYS, LANES);
  const int64_t blocks = (tokens + keys - 1) / keys, wanted = (TASKS + batch * heads - 1) / (batch * heads);
  const Shape shape{batch, tokens, heads, dim, batch_stride, token_stride, kind_stride, head_stride,
                    round_up(tokens, ROWS), round_up(dim, LANES), queries, keys, std::min(blocks, wanted)};
  auto run_as = [&](auto element) {
    using T = decltype(element);
    run(shape, Tensors<T>{(const T*)grad_out, (const T*)out, (const T*)qkv, lse, bias, (T*)grad}, scale, int(threads));
  };
  if (is_bfloat16)
    run_as(bfloat16());
  else
    run_as(float());
}
