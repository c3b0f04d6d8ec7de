// Best match of rows: for each row of a (B, S, D) its largest scalar product with a row of b (B, T, D), and which it is.
//
// The rows of b are packed into panels. A task owns up to GROUPS groups of ROWS rows of a and multiplies them all with
// one panel before the next. Each lane keeps the best of its columns, of equal ones the first; lanes are compared at
// the end. NaN is larger than nothing and never chosen. Where b has no more rows, copies of its last row fill the vector:
// they equal it and come later.

#include "tiles.h"

namespace {

constexpr int GROUPS = 8;

struct Shape {
  int64_t batch, rows, columns, dim, a_image, a_row, b_image, b_row;  // S, T, D and strides

  int64_t panels() const { return (columns + PANEL - 1) / PANEL; }
  int64_t groups() const { return (rows + ROWS - 1) / ROWS; }
};

// Of the columns that each lane has seen.
struct Best {
  Vec value;
  Ints column;  // the first of its vector
};

// Products of ROWS rows with V vectors of a panel, of which ``first`` is the first column.
template <int V, typename U>
void visit(const U* rows, const U* panel, int64_t steps, int first, Best* best) {
  Vec sums[ROWS][V];
  product<ROWS, V, 1, ROWS>(sums, rows, panel, steps);
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; row++) {
    Best found = best[row];
    for (int half = 0; half < V; half++) {
      const Ints better = sums[row][half] > found.value;
      found.value = better ? sums[row][half] : found.value;
      found.column = better ? first + half * LANES : found.column;
    }
    best[row] = found;
  }
}

// The lowest column of the lanes that have the largest value.
void write(const Best& best, float& value, int64_t& match) {
  value = largest(best.value);
  const Ints columns = best.value == value ? best.column + lane_numbers() : INT32_MAX;
  int column = columns[0];
  for (int lane = 1; lane < LANES; lane++) column = std::min(column, columns[lane]);
  match = column;
}

// Panel ``number`` of an image: units (D, PANEL) of its first ``count`` rows.
template <typename T>
void pack(const Shape& shape, const T* b, int64_t count, int64_t number, Unit<T>* panel) {
  for (int64_t first = number * PANEL, last = std::min(first + PANEL, count); first < last; first += LANES)
    transpose(b + first * shape.b_row, shape.b_row, std::min<int64_t>(LANES, last - first), shape.dim,
              panel + first % PANEL, PANEL);
}

template <typename T>
void run(const Shape& shape, const T* a, const T* b, const int64_t* lengths, float* value, int64_t* match,
         int threads) {
  const int64_t panels = shape.panels(), panel_size = units_of<T>(shape.dim) * PANEL, groups = shape.groups();
  const int64_t blocks = round_up((groups + GROUPS - 1) / GROUPS, threads);  // of groups, as equal as can be
  const int64_t group_size = round_up(units_of<T>(shape.dim) * ROWS + LANES, LANES);  // transpose writes whole vectors
  Buffer packed(shape.batch * panels * panel_size);
  auto panel = [&](int64_t image, int64_t number) { return (Unit<T>*)&packed[(image * panels + number) * panel_size]; };
  auto count = [&](int64_t image) {
    return lengths ? std::clamp<int64_t>(lengths[image], 0, shape.columns) : shape.columns;
  };
#pragma omp parallel num_threads(threads)
  {
    Buffer scratch(GROUPS * (2 * ROWS * LANES + group_size));
    Best* best = (Best*)&scratch[0];
    Unit<T>* own = (Unit<T>*)(best + GROUPS * ROWS);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < shape.batch * panels; task++) {
      const int64_t image = task / panels, number = task % panels;
      pack(shape, b + image * shape.b_image, count(image), number, panel(image, number));
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < shape.batch * blocks; task++) {
      const int64_t image = task / blocks, columns = count(image);
      const int64_t from = task % blocks * groups / blocks, to = (task % blocks + 1) * groups / blocks;
      const int64_t first = from * ROWS, last = std::min(to * ROWS, shape.rows);
      for (int64_t row = first; row < last; row += ROWS)
        transpose(a + image * shape.a_image + row * shape.a_row, shape.a_row, std::min<int64_t>(ROWS, last - row),
                  shape.dim, own + (row - first) / ROWS * group_size, ROWS);
      std::fill_n(best, GROUPS * ROWS, Best{fill(-INFINITY), Ints{}});
      for (int64_t column = 0; column < columns; column += PANEL) {
        const auto tile = columns - column > LANES ? visit<2, Unit<T>> : visit<1, Unit<T>>;
        for (int64_t group = 0; group < to - from; group++)
          tile(own + group * group_size, panel(image, column / PANEL), units_of<T>(shape.dim), int(column),
               best + group * ROWS);
      }
      for (int64_t row = first; row < last; row++)
        write(best[row - first], value[image * shape.rows + row], match[image * shape.rows + row]);
    }
  }
}

}  // namespace

// a (batch, rows, dim) and b (batch, columns, dim) with the given strides of elements and a last stride of 1; lengths
// (batch), rows of b that take part, or null; value and match (batch, rows). A row without a product gets -inf and 0.
extern "C" void best_match(const void* a, const void* b, const int64_t* lengths, float* value, int64_t* match,
                           int64_t batch, int64_t rows, int64_t dim, int64_t columns, int64_t a_image, int64_t a_row,
                           int64_t b_image, int64_t b_row, int64_t is_bfloat16, int64_t threads) {
  const Shape shape{batch, rows, columns, dim, a_image, a_row, b_image, b_row};
  if (is_bfloat16)
    run(shape, (const bfloat16*)a, (const bfloat16*)b, lengths, value, match, int(threads));
  else
    run(shape, (const float*)a, (const float*)b, lengths, value, match, int(threads));
}
