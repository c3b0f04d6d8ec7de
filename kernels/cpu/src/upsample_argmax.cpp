// Labels of bilinearly mixed scores: pixel (y, x) mixes the points rows[i][y] + columns[positions[j][x]], i and j in
// (0, 1).
//
// A lane is a column. The two rows of points that an output row mixes are kept class by class, (classes, columns), so
// that vectors along the columns are mixed, and each vector of pixels picks its two columns out of vectors of them.
//
// Pruning: along an output row, the pixels of a cell lie between its two mixed columns. A class whose larger column is
// below another class's smaller one cannot win in the cell. Each tile of pixels compares only the classes that are left
// in its cells. For noise a sixth of 150 classes is left, for the maps of a trained model one or two.

#include "resize.h"

#include <algorithm>
#include <vector>

namespace {

#ifdef __AVX512F__
inline unsigned at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
#else
inline unsigned at_least(Vec a, Vec b) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ)));
}
#endif

constexpr int WORD = 32;  // classes of a word of bits
// Fewer pixels of a row in a cell, or fewer classes, are compared in less time than pruned.
constexpr int64_t PRUNE_PIXELS = 3, PRUNE_CLASSES = 24;
constexpr int64_t LOGITS_PER_THREAD = 1 << 18;  // fewer are not worth a thread

// Pixels that are compared together. Lanes behind the last pixel repeat it. A cell is a column and the next one.
struct Tile {
  Ints left, right;  // columns, counted from first_left and first_right
  Vec weight;        // of the right columns
  int64_t first, first_left, first_right, first_cell, last_cell;
};

struct Problem {
  const int64_t *index, *rows, *columns, *positions;
  const float *row_weights, *col_weights;
  int64_t batch, classes, height, width, column_count, batch_stride, class_stride, point_stride, points;
};

struct Across {
  std::vector<int64_t> columns;  // points of a row
  std::vector<Tile> tiles;
  int64_t count, stride;  // columns in whole vectors; floats from class to class, as a vector begins at any column
  bool prune;
};

// Makes the tiles of pixels that mix these columns. False if the columns of one do not fit a vector. Tiles end where a
// cell ends if that leaves few lanes empty.
bool make_tiles(const Problem& problem, const int64_t* left, const int64_t* right, std::vector<Tile>& tiles) {
  tiles.clear();
  for (int64_t first = 0, end; first < problem.width; first = end) {
    int64_t last = end = std::min(first + LANES, problem.width);
    while (last > first + LANES / 2 && left[last] == left[last - 1] && right[last] == right[last - 1]) last--;
    if (end < problem.width && last > first + LANES / 2) end = last;
    const auto lefts = std::minmax_element(left + first, left + end);
    const auto rights = std::minmax_element(right + first, right + end);
    if (*lefts.second - *lefts.first >= LANES || *rights.second - *rights.first >= LANES) return false;
    Tile tile{{}, {}, {}, first, *lefts.first, *rights.first, std::min(*lefts.first, *rights.first), 0};
    for (int64_t lane = 0; lane < LANES; lane++) {
      const int64_t x = std::min(first + lane, end - 1);
      tile.left[lane] = int32_t(left[x] - tile.first_left), tile.right[lane] = int32_t(right[x] - tile.first_right);
      tile.weight[lane] = problem.col_weights[x];
      tile.last_cell = std::max(tile.last_cell, std::min(left[x], right[x]));
    }
    tiles.push_back(tile);
  }
  return true;
}

Across lay_out(const Problem& problem) {
  const int64_t width = problem.width, *left = problem.positions, *right = left + width;
  Across across{{problem.columns, problem.columns + problem.column_count}, {}, 0, 0, false};
  if (make_tiles(problem, left, right, across.tiles)) {
    across.prune = width >= PRUNE_PIXELS * problem.column_count && problem.classes >= PRUNE_CLASSES;
    for (int64_t x = 0; x < width; x++) across.prune = across.prune && std::abs(left[x] - right[x]) <= 1;
  } else {  // two columns for each pixel
    std::vector<int64_t> own(2 * width);
    across.columns.clear();
    for (int64_t x = 0; x < 2 * width; x++) own[x] = x, across.columns.push_back(problem.columns[left[x]]);
    make_tiles(problem, own.data(), own.data() + width, across.tiles);
  }
  across.count = round_up(int64_t(across.columns.size()), LANES);
  across.stride = across.count + LANES;
  return across;
}

// Mixes two rows of all classes; true if all results are finite.
bool mix_rows(const float* top, const float* bottom, float weight, int64_t classes, const Across& across, float* to) {
  Vec check = fill(0.0f);
  const float other = 1.0f - weight;
  for (int64_t k = 0; k < classes; k++, top += across.stride, bottom += across.stride, to += across.stride)
    for (int64_t column = 0; column < across.count; column += LANES) {
      const Vec mixed = load(top + column) * other + load(bottom + column) * weight;
      check += mixed * 0.0f;
      store(to + column, mixed);
    }
  return sum(check) == 0.0f;
}

// Bits (cells, words) of the classes that can win in each cell. `bytes` (8 cells each, classes) are scratch.
void find_candidates(const float* mixed, int64_t classes, const Across& across, uint8_t* bytes, uint32_t* bits) {
  const int64_t words = (classes + WORD - 1) / WORD, padded = words * WORD;
  for (int64_t column = 0; column < across.count; column += LANES) {
    Vec bound = fill(-INFINITY);
    const float* row = mixed + column;
    for (int64_t k = 0; k < classes; k++, row += across.stride)
      bound = maximum(bound, minimum(load(row), load(row + 1)));
    row = mixed + column;
    for (int64_t k = 0; k < classes; k++, row += across.stride) {
      const unsigned left = at_least(maximum(load(row), load(row + 1)), bound);
      for (int part = 0; part < LANES / 8; part++) bytes[part * padded + k] = uint8_t(left >> 8 * part);
    }
    for (int64_t part = 0; part < LANES / 8; part++)
      for (int64_t word = 0; word < words; word++) {
        __m256i eight = _mm256_loadu_si256((const __m256i*)(bytes + part * padded + word * WORD));
        for (int64_t bit = 7; bit >= 0; bit--) {
          bits[(column + part * 8 + bit) * words + word] = uint32_t(_mm256_movemask_epi8(eight));
          eight = _mm256_add_epi8(eight, eight);
        }
      }
  }
}

// Appends the classes of a word of bits to a list with room for WORD more; returns its new end.
inline int32_t* append(uint32_t bits, int32_t first, int32_t* list) {
#ifdef __AVX512F__
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int half = 0; half < 2; half++) {
    const __mmask16 mask = __mmask16(bits >> 16 * half);
    const __m512i classes = _mm512_add_epi32(lanes, _mm512_set1_epi32(first + 16 * half));
    _mm512_storeu_si512(list, _mm512_maskz_compress_epi32(mask, classes));
    list += __builtin_popcount(mask);
  }
#else
  for (; bits; bits &= bits - 1) *list++ = first + __builtin_ctz(bits);
#endif
  return list;
}

// The best of `count` classes, all or those of a list, for the pixels of N tiles. With SPECIAL, the first NaN wins.
template <int N, bool SPECIAL>
void compare(const float* mixed, int64_t stride, const Tile* tiles, const int32_t* list, int64_t count,
             int32_t* labels) {
  Vec best[N];
  Ints label[N];
  for (int n = 0; n < N; n++) best[n] = fill(-INFINITY), label[n] = Ints{};
  for (int64_t at = 0; at < count; at++) {
    const int32_t k = list ? list[at] : int32_t(at);
    const float* row = mixed + k * stride;
    const Ints candidate = Ints{} + k;
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const Vec weight = tiles[n].weight;
      const Vec left = permute(load(row + tiles[n].first_left), tiles[n].left);
      const Vec right = permute(load(row + tiles[n].first_right), tiles[n].right);
      const Vec value = left * (1.0f - weight) + right * weight;
      if (SPECIAL) {
        const Ints better = (value > best[n]) | ((value != value) & (best[n] == best[n]));
        best[n] = better ? value : best[n];
        label[n] = better ? candidate : label[n];
      } else {
        label[n] = value > best[n] ? candidate : label[n];
        best[n] = maximum(best[n], value);
      }
    }
  }
  for (int n = 0; n < N; n++) std::memcpy(labels + tiles[n].first, &label[n], sizeof label[n]);
}

struct Memory {
  std::vector<int64_t> points;
  std::vector<float> rows[2], mixed;
  std::vector<uint8_t> bytes;
  std::vector<uint32_t> bits;
  std::vector<int32_t> list, labels;
};

void label_row(const Problem& problem, const Across& across, bool finite, Memory& memory) {
  const float* mixed = memory.mixed.data();
  const int64_t classes = problem.classes, words = (classes + WORD - 1) / WORD;
  int32_t* labels = memory.labels.data();
  const Tile *tile = across.tiles.data(), *end = tile + across.tiles.size();
  if (!finite) {
    for (; tile < end; tile++) compare<1, true>(mixed, across.stride, tile, nullptr, classes, labels);
    return;
  }
  if (!across.prune) {
    constexpr int TILES = LANES == 16 ? 4 : 2;
    for (; tile + TILES <= end; tile += TILES)
      compare<TILES, false>(mixed, across.stride, tile, nullptr, classes, labels);
    for (; tile < end; tile++) compare<1, false>(mixed, across.stride, tile, nullptr, classes, labels);
    return;
  }
  find_candidates(mixed, classes, across, memory.bytes.data(), memory.bits.data());
  for (; tile < end; tile++) {
    int32_t *list = memory.list.data(), *last = list;
    for (int64_t word = 0; word < words; word++) {
      uint32_t bits = 0;
      for (int64_t cell = tile->first_cell; cell <= tile->last_cell; cell++) bits |= memory.bits[cell * words + word];
      last = append(bits, int32_t(word * WORD), last);
    }
    compare<1, false>(mixed, across.stride, tile, list, last - list, labels);
  }
}

// Rows [first, end) of an image.
template <typename T, typename Label>
void label_rows(const Problem& problem, const Across& across, const T* scores, const int64_t* index, int64_t first,
                int64_t end, Label* out) {
  const int64_t height = problem.height, classes = problem.classes, size = classes * across.stride + LANES;
  const int64_t words = (classes + WORD - 1) / WORD;
  Memory memory;
  for (auto& row : memory.rows) row.assign(size, 0.0f);
  memory.mixed.assign(size, 0.0f);
  memory.labels.resize(problem.width + LANES);
  if (across.prune) {
    memory.bytes.assign(LANES / 8 * words * WORD, 0);
    memory.bits.resize(across.count * words);
    memory.list.resize((words + 1) * WORD);
  }
  int64_t held[2] = {-1, -1};
  for (int64_t y = first; y < end; y++) {
    const int64_t wanted[2] = {problem.rows[y], problem.rows[height + y]};
    if (held[0] != wanted[0] && held[1] == wanted[0]) {
      std::swap(held[0], held[1]);
      std::swap(memory.rows[0], memory.rows[1]);
    }
    for (int i = 0; i < 2; i++) {
      if (held[i] == wanted[i] || (i == 1 && wanted[1] == wanted[0])) continue;
      held[i] = wanted[i];
      memory.points.clear();
      for (int64_t column : across.columns) {
        const int64_t point = wanted[i] + column;
        memory.points.push_back((index ? index[point] : point) * problem.point_stride);
      }
      load_points(scores, memory.points.data(), int64_t(across.columns.size()), classes, problem.class_stride,
                  memory.rows[i].data(), across.stride);
    }
    const float *top = memory.rows[0].data(), *bottom = memory.rows[wanted[0] != wanted[1]].data();
    const bool finite = mix_rows(top, bottom, problem.row_weights[y], classes, across, memory.mixed.data());
    label_row(problem, across, finite, memory);
    std::copy_n(memory.labels.data(), problem.width, out + y * problem.width);
  }
}

template <typename T, typename Label>
void run(const Problem& problem, const T* scores, Label* out, int64_t threads) {
  const Across across = lay_out(problem);
  const int64_t logits = problem.batch * problem.classes * problem.height * problem.width;
  threads = threads_for(logits, LOGITS_PER_THREAD, threads);
  const int64_t parts = std::min((4 * threads + problem.batch - 1) / problem.batch, problem.height);
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic, 1)
  for (int64_t task = 0; task < problem.batch * parts; task++) {
    const int64_t image = task / parts, part = task % parts;
    label_rows(problem, across, scores + image * problem.batch_stride,
               problem.index ? problem.index + image * problem.points : nullptr, problem.height * part / parts,
               problem.height * (part + 1) / parts, out + image * problem.height * problem.width);
  }
}

}  // namespace

// Point p of an image has the scores scores[p * point_stride + k * class_stride], with an index those of index[p].
// rows (2, height); columns (column_count), of which positions (2, width) choose; index (batch, points); labels (batch,
// height, width), int32 if is_wide and uint8 otherwise.
extern "C" void upsample_argmax(const void* scores, const int64_t* index, const int64_t* rows, const float* row_weights,
                                const int64_t* columns, const int64_t* positions, const float* col_weights,
                                void* labels, int64_t batch, int64_t classes, int64_t height, int64_t width,
                                int64_t column_count, int64_t batch_stride, int64_t class_stride, int64_t point_stride,
                                int64_t points, int64_t is_bfloat16, int64_t is_wide, int64_t threads) {
  const Problem problem{index,  rows,  columns,      positions,    row_weights,  col_weights,  batch, classes,
                        height, width, column_count, batch_stride, class_stride, point_stride, points};
  auto choose_labels = [&](auto* typed) {
    is_wide ? run(problem, typed, (int32_t*)labels, threads) : run(problem, typed, (uint8_t*)labels, threads);
  };
  is_bfloat16 ? choose_labels((const bfloat16*)scores) : choose_labels((const float*)scores);
}
