// Gradient of softmax attention on a packed projection (B, N, 3, H, D).
//
//   P = exp(scale Q K^T + bias - lse)    dP = dO V^T    dS = P (dP - delta), delta = sum of dO O over a row
//   dV = P^T dO    dK = scale dS^T Q    dQ = scale dS K
//
// A task is a chunk of the keys of a head, taken KEYS at a time with QUERIES queries at a time, all of which lie in the
// second-level cache. It owns dK and dV of its keys and a part of dQ; parts are added in the order of the chunks.
// The number of chunks depends on the shape only: results are the same for any number of threads.
//
// In bfloat16, factors of products are bfloat16, P and dS too; sums and exponents are float32. Rows of tiles behind the
// last token repeat it: what they meet in a sum is zero.

#include "tiles.h"

namespace {

constexpr int QUERIES = LANES == 16 ? 112 : 72;   // most of a block, whole tiles
constexpr int MOST_KEYS = LANES == 16 ? 272 : 144;  // of a block, whole vectors
constexpr int KEYS = LANES == 16 ? 288 : 144;     // their whole tiles and panels
constexpr int TASKS = 32;                        // at least, where there are as many blocks of keys

struct Shape {
  int64_t batch, tokens, heads, dim, batch_stride, token_stride, kind_stride, head_stride;
  int64_t padded, width;          // tokens in whole tiles, dim in whole panels
  int64_t queries, keys, chunks;  // of a block, of a block, of a head

  // Of a head's first token in tensors (B, N, 3, H, D) with strides, (B, N, H, D), and (B, N, 3, H, D) without strides.
  int64_t projection(int64_t head) const { return head / heads * batch_stride + head % heads * head_stride; }
  int64_t output(int64_t head) const { return (head / heads * tokens * heads + head % heads) * dim; }
  int64_t gradient(int64_t head) const { return (head / heads * tokens * 3 * heads + head % heads) * dim; }
};

// Units of ROWS queries, whose transposition writes whole vectors.
template <typename T>
int64_t tile_size(const Shape& shape) {
  return round_up(units_of<T>(shape.dim) * ROWS + LANES, LANES);
}

// Q and dO of a head: tiles (D in units, ROWS) as left factors, rows (width / PANEL, padded in units, PANEL) as right.
template <typename T>
struct Queries {
  Unit<T>*query_tiles, *query_rows, *grad_tiles, *grad_rows;
  float* delta;
  const float* lse;

  static int64_t size(const Shape& shape) {
    return 2 * (shape.padded / ROWS * tile_size<T>(shape) + shape.padded / PER<T> * shape.width) +
           round_up(shape.padded, LANES);
  }

  Queries(const Shape& shape, float* memory, const float* lse) : lse(lse) {
    const int64_t tiles = shape.padded / ROWS * tile_size<T>(shape);
    delta = memory, query_tiles = (Unit<T>*)(memory + round_up(shape.padded, LANES)), grad_tiles = query_tiles + tiles;
    query_rows = grad_tiles + tiles, grad_rows = query_rows + shape.padded / PER<T> * shape.width;
  }

  Queries from(int64_t token, const Shape& shape) const {
    Queries part = *this;
    for (Unit<T>** tiles : {&part.query_tiles, &part.grad_tiles}) *tiles += token / ROWS * tile_size<T>(shape);
    for (Unit<T>** rows : {&part.query_rows, &part.grad_rows}) *rows += token / PER<T> * PANEL;
    part.delta += token, part.lse += token;
    return part;
  }
};

template <typename T>
struct Keys {
  Unit<T>*key_panels, *value_panels;    // (KEYS / PANEL, D in units, PANEL)
  Unit<T>* key_rows;                    // (width / PANEL, KEYS in units, PANEL)
  Unit<T>*weights, *slopes;             // P and dS, (QUERIES in units, KEYS)
  Unit<T>* slopes_of_query;             // dS, (QUERIES, KEYS in units); the same for float
  float *grad_key, *grad_value, *bias;  // (KEYS, width) twice, (KEYS)
  int count;

  static int64_t size(const Shape& shape) {
    return KEYS * (2 * units_of<T>(shape.dim) + 3 * shape.width + 1) + 3 * QUERIES * KEYS;
  }

  Keys(const Shape& shape, float* memory) {
    weights = (Unit<T>*)memory, slopes = weights + QUERIES / PER<T> * KEYS;
    slopes_of_query = PER<T> == 1 ? slopes : slopes + QUERIES / PER<T> * KEYS;
    grad_key = memory + 3 * QUERIES * KEYS, grad_value = grad_key + KEYS * shape.width;
    bias = grad_value + KEYS * shape.width, key_rows = (Unit<T>*)(bias + KEYS);
    key_panels = key_rows + KEYS * shape.width, value_panels = key_panels + KEYS * units_of<T>(shape.dim);
  }
};

// out (ROWS, V vectors) = or += the product of a left factor and a panel.
template <int ROW, int STEP, bool ADD, int V, typename U>
void multiply_tile(const U* left, const U* panel, int64_t steps, float* out, int64_t stride) {
  Vec sums[ROWS][V];
  product<ROWS, V, ROW, STEP>(sums, left, panel, steps);
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; row++)
    for (int half = 0; half < V; half++) {
      float* to = out + row * stride + half * LANES;
      store(to, ADD ? load(to) + sums[row][half] : sums[row][half]);  // sums of blocks: shorter chains round less
    }
}

// Adds to ROWS rows of `out` their products with all panels of `right`, `apart` units from each other.
template <int ROW, int STEP, typename U>
void add_products(const U* left, const U* right, int64_t apart, int64_t steps, const Shape& shape, float* out) {
  for (int64_t column = 0; column < shape.dim; column += PANEL, right += apart) {
    const bool wide = shape.dim - column > LANES;
    (wide ? multiply_tile<ROW, STEP, true, 2, U> : multiply_tile<ROW, STEP, true, 1, U>)(left, right, steps,
                                                                                        out + column, shape.width);
  }
}

inline void store_units(float* to, const Vec (&rows)[1]) { store(to, rows[0]); }

// Pairs of two rows.
inline void store_units(Pair* to, const Vec (&rows)[2]) {
  bfloat16 first[LANES], second[LANES];
  store(first, rows[0]), store(second, rows[1]);
  store((float*)to, (Vec)(((Ints)load(first) >> 16 & 0xffff) | (Ints)load(second)));
}

// P and dS of `count` queries and all keys of a block.
template <typename T>
void weigh(const Queries<T>& queries, const Keys<T>& keys, int count, const Shape& shape, float scale) {
  alignas(64) float scores[ROWS * PANEL], grads[ROWS * PANEL];
  const int64_t depth = units_of<T>(shape.dim);
  for (int panel = 0; panel < keys.count; panel += PANEL) {
    const int columns = keys.count - panel > LANES ? PANEL : LANES;
    const auto wide = multiply_tile<1, ROWS, false, 2, Unit<T>>, narrow = multiply_tile<1, ROWS, false, 1, Unit<T>>;
    const auto product = columns == PANEL ? wide : narrow;
    for (int first = 0; first < count; first += ROWS) {
      const int64_t tile = first / ROWS * tile_size<T>(shape);
      product(queries.query_tiles + tile, keys.key_panels + panel * depth, depth, scores, PANEL);
      product(queries.grad_tiles + tile, keys.value_panels + panel * depth, depth, grads, PANEL);
      for (int row = 0; row < std::min(ROWS, count - first); row += PER<T>)
        for (int at = 0; at < columns; at += LANES) {
          Vec weights[PER<T>], slopes[PER<T>];
          for (int i = 0; i < PER<T>; i++) {
            const int query = std::min(first + row + i, count - 1), from = (row + i) * PANEL + at;
            weights[i] = exp(load(scores + from) * scale + load(keys.bias + panel + at) - queries.lse[query]);
            slopes[i] = weights[i] * (load(grads + from) - queries.delta[query]);
            if (PER<T> == 2) store((T*)keys.slopes_of_query + (first + row + i) * KEYS + panel + at, slopes[i]);
          }
          const int64_t to = (first + row) / PER<T> * KEYS + panel + at;
          store_units(keys.weights + to, weights), store_units(keys.slopes + to, slopes);
        }
    }
  }
}

// Adds what `count` queries and a block of keys give to the three gradients.
template <typename T>
void add_gradients(const Queries<T>& queries, const Keys<T>& keys, int count, const Shape& shape, float scale,
                   float* grad) {
  weigh(queries, keys, count, shape, scale);
  const int64_t apart = shape.padded / PER<T> * PANEL, width = shape.width;
  const int64_t depth = units_of<T>(count), key_depth = units_of<T>(keys.count);
  for (int key = 0; key < keys.count; key += ROWS)
    add_products<1, KEYS>(keys.weights + key, queries.grad_rows, apart, depth, shape, keys.grad_value + key * width);
  for (int key = 0; key < keys.count; key += ROWS)
    add_products<1, KEYS>(keys.slopes + key, queries.query_rows, apart, depth, shape, keys.grad_key + key * width);
  for (int row = 0; row < count; row += ROWS)
    add_products<KEYS / PER<T>, 1>(keys.slopes_of_query + row * (KEYS / PER<T>), keys.key_rows, KEYS / PER<T> * PANEL,
                                   key_depth, shape, grad + row * width);
}

template <typename T>
void pack_keys(const Shape& shape, const T* key, const float* bias, const Keys<T>& keys) {
  const int64_t stride = shape.token_stride;
  for (int token = 0; token < keys.count; token += LANES) {
    const int64_t rows = std::min(LANES, keys.count - token);
    const int64_t panel = token / PANEL * PANEL * units_of<T>(shape.dim) + token % PANEL;
    transpose(key + token * stride, stride, rows, shape.dim, keys.key_panels + panel, PANEL);
    transpose(key + shape.kind_stride + token * stride, stride, rows, shape.dim, keys.value_panels + panel, PANEL);
  }
  pack_rows(key, stride, keys.count, shape.dim, keys.key_rows, KEYS / PER<T>);
  for (int token = 0; token < KEYS; token++) keys.bias[token] = bias ? bias[std::min(token, keys.count - 1)] : 0.0f;
}

template <typename T>
struct Tensors {
  const T *grad_out, *out, *qkv;
  const float *lse, *bias;
  T* grad;
};

// ROWS queries of a head from `token`.
template <typename T>
void pack_queries(const Shape& shape, const Tensors<T>& tensors, int64_t head, int64_t token, const Queries<T>& all) {
  const Queries<T> queries = all.from(token, shape);
  const int64_t rows = std::min<int64_t>(ROWS, shape.tokens - token), dim = shape.dim, stride = shape.heads * dim;
  const int64_t at = shape.output(head) + token * stride, pairs = shape.padded / PER<T>;
  const T *grad_out = tensors.grad_out + at, *out = tensors.out + at;
  const T* query = tensors.qkv + shape.projection(head) + token * shape.token_stride;
  transpose(query, shape.token_stride, rows, dim, queries.query_tiles, ROWS);
  transpose(grad_out, stride, rows, dim, queries.grad_tiles, ROWS);
  pack_rows(query, shape.token_stride, rows, dim, queries.query_rows, pairs);
  pack_rows(grad_out, stride, rows, dim, queries.grad_rows, pairs);
  for (int64_t row = 0; row < rows; row++, grad_out += stride, out += stride) {
    Vec total = fill(0.0f);
    for (int64_t d = 0; d < dim; d += LANES) total += load_some(grad_out + d, dim - d) * load_some(out + d, dim - d);
    queries.delta[row] = sum(total);
  }
}

template <typename T>
void store_row(const float* from, float scale, int64_t dim, T* to) {
  for (int64_t d = 0; d < dim; d += LANES) store_some(to + d, load(from + d) * scale, dim - d);
}

template <typename T>
void run_task(const Shape& shape, const Tensors<T>& tensors, int64_t task, float scale, const Queries<T>& queries,
              float* part, Keys<T> keys) {
  const int64_t blocks = (shape.tokens + shape.keys - 1) / shape.keys, width = shape.width;
  const int64_t head = task / shape.chunks, chunk = task % shape.chunks, kind = shape.heads * shape.dim;
  std::fill_n(part, shape.padded * width, 0.0f);
  for (int64_t block = chunk * blocks / shape.chunks; block < (chunk + 1) * blocks / shape.chunks; block++) {
    const int64_t first = block * shape.keys;
    keys.count = int(std::min(shape.keys, shape.tokens - first));
    const T* key = tensors.qkv + shape.projection(head) + shape.kind_stride + first * shape.token_stride;
    pack_keys(shape, key, tensors.bias ? tensors.bias + head / shape.heads * shape.tokens + first : nullptr, keys);
    for (float* grad : {keys.grad_key, keys.grad_value}) std::fill_n(grad, round_up(keys.count, ROWS) * width, 0.0f);
    for (int64_t query = 0; query < shape.tokens; query += shape.queries) {
      const int count = int(std::min(shape.queries, shape.tokens - query));
      add_gradients(queries.from(query, shape), keys, count, shape, scale, part + query * width);
    }
    T* to = tensors.grad + shape.gradient(head) + first * 3 * kind + kind;
    for (int64_t at = 0; at < keys.count; at++, to += 3 * kind) {
      store_row(keys.grad_key + at * width, scale, shape.dim, to);
      store_row(keys.grad_value + at * width, 1.0f, shape.dim, to + kind);
    }
  }
}

// dQ of a query: the sum of its parts, the first of which is at `part`.
template <typename T>
void add_parts(const Shape& shape, const Tensors<T>& tensors, int64_t head, int64_t token, float scale, float* part) {
  part += token * shape.width;
  for (int64_t chunk = 1; chunk < shape.chunks; chunk++)
    for (int64_t d = 0; d < shape.dim; d += LANES)
      store(part + d, load(part + d) + load(part + chunk * shape.padded * shape.width + d));
  store_row(part, scale, shape.dim, tensors.grad + shape.gradient(head) + token * 3 * shape.heads * shape.dim);
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
  const int64_t packed_size = Queries<T>::size(shape), part_size = shape.padded * shape.width;
  Buffer packed(shared * packed_size), parts(shared * shape.chunks * part_size);
  auto queries = [&](int64_t head, float* at) { return Queries<T>(shape, at, tensors.lse + head * shape.tokens); };
#pragma omp parallel num_threads(threads)
  {
    Buffer scratch(Keys<T>::size(shape)), own(shared ? 0 : packed_size + part_size);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < shared * tiles; task++)
      pack_queries(shape, tensors, task / tiles, task % tiles * ROWS,
                   queries(task / tiles, &packed[task / tiles * packed_size]));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < shared * shape.chunks; task++)
      run_task(shape, tensors, task, scale, queries(task / shape.chunks, &packed[task / shape.chunks * packed_size]),
               &parts[task * part_size], Keys<T>(shape, &scratch[0]));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < shared * shape.tokens; task++)
      add_parts(shape, tensors, task / shape.tokens, task % shape.tokens, scale,
                &parts[task / shape.tokens * shape.chunks * part_size]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t head = 0; head < heads - shared; head++) {
      const Queries<T> all = queries(head, &own[part_size]);
      for (int64_t tile = 0; tile < tiles; tile++) pack_queries(shape, tensors, head, tile * ROWS, all);
      run_task(shape, tensors, head, scale, all, &own[0], Keys<T>(shape, &scratch[0]));
      for (int64_t token = 0; token < shape.tokens; token++) add_parts(shape, tensors, head, token, scale, &own[0]);
    }
  }
}

}  // namespace

// grad_out, out (batch, tokens, heads, dim); qkv (batch, tokens, 3, heads, dim) with these strides of elements and a
// last stride of 1; lse (batch, heads, tokens), natural logarithms; bias (batch, tokens) or null; grad as qkv, whole.
extern "C" void attention_backward(const void* grad_out, const void* out, const void* qkv, const float* lse,
                                   const float* bias, void* grad, int64_t batch, int64_t tokens, int64_t heads,
                                   int64_t dim, int64_t batch_stride, int64_t token_stride, int64_t kind_stride,
                                   int64_t head_stride, int64_t is_bfloat16, int64_t threads, float scale) {
  const int64_t queries = even_part(tokens, QUERIES, ROWS), keys = even_part(tokens, MOST_KEYS, LANES);
  const int64_t blocks = (tokens + keys - 1) / keys, wanted = (TASKS + batch * heads - 1) / (batch * heads);
  const Shape shape{batch, tokens, heads, dim, batch_stride, token_stride, kind_stride, head_stride,
                    round_up(tokens, ROWS), round_up(dim, PANEL), queries, keys, std::min(blocks, wanted)};
  auto run_as = [&](auto element) {
    using T = decltype(element);
    run(shape, Tensors<T>{(const T*)grad_out, (const T*)out, (const T*)qkv, lse, bias, (T*)grad}, scale, int(threads));
  };
  if (is_bfloat16)
    run_as(bfloat16());
  else
    run_as(float());
}
