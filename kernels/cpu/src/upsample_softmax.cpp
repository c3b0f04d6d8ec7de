// Softmax of bilinearly upsampled scores and its backward, and the mean softmax over several lattices of scores.

#include "resize.h"

namespace {

constexpr int64_t ROWS = 16;  // of a task

// Where the probabilities of lattice ``number`` of ``count`` go: (classes, plane), a row of them from ``out`` on.
struct Mean {
  int64_t number, count, plane;
};

// Probabilities of a row of a group, for which ``scratch.wide`` is ready.
template <typename T>
void write(const Group& group, const Mean& mean, float weight, Scratch& scratch, T* out) {
  float* logits = &scratch.logits[0];
  const Vec peak = mix(&scratch.wide[0], scratch.classes, weight, logits);
  const Vec scale = 1.0f / (exponentials(logits, scratch.classes, peak) * float(mean.count));
  for (int64_t k = 0; k < scratch.classes; k++, out += mean.plane) {
    __builtin_prefetch(out + LANES, 1, 2);  // of the next group: the processor follows no more than a few classes
    const Vec share = load(logits + k * LANES) * scale;
    store_some(out, mean.number ? load_some(out, group.count) + share : share, group.count);
  }
}

// Rows from ``y`` to ``end``, which mix the two rows of points in ``scratch``.
template <typename T, typename Weight>
void write_rows(Columns& columns, const Mean& mean, int64_t y, int64_t end, Weight weight, Scratch& scratch, T* out) {
  for (int64_t x = 0; x < columns.count; x += LANES) {
    widen(columns[x], scratch.classes, scratch);
    for (int64_t row = y; row < end; row++)
      write(columns[x], mean, weight(row), scratch, out + row * columns.count + x);
  }
}

template <typename T>
void softmax(const Masks& masks, const T* scores, const int64_t* index, T* out, int threads) {
  const Axis &vertical = masks.vertical, &horizontal = masks.horizontal;
  const int64_t tasks = (vertical.kept + ROWS - 1) / ROWS, plane = vertical.kept * horizontal.kept;
  Columns columns(horizontal.kept, [&](int64_t x) { return tap(horizontal, x); });
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(masks.classes, horizontal.size_in);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < masks.batch * tasks; task++) {
      const int64_t image = task / tasks, stop = std::min((task % tasks + 1) * ROWS, vertical.kept);
      for (int64_t y = task % tasks * ROWS, end; y < stop; y = end) {
        const Tap first = tap(vertical, y);
        end = std::min(stop, first_output(vertical, first.lower + 1));
        load_rows(masks, scores, index, image, first.lower, first.upper, scratch);
        auto weight = [&](int64_t row) { return tap(vertical, row).weight; };
        write_rows(columns, {0, 1, plane}, y, end, weight, scratch, out + image * masks.classes * plane);
      }
    }
  }
}

struct Strides {
  int64_t batch, classes, row, column;
};

// LANES elements ``stride`` apart; zeros behind ``count``.
template <typename T>
Vec load_apart(const T* from, int64_t stride, int count) {
  if (stride == 1) return load_some(from, count);
  Vec vec = fill(0.0f);
  for (int lane = 0; lane < count; lane++) vec[lane] = to_float(from[lane * stride]);
  return vec;
}

template <typename T>
void backward(const Masks& masks, const T* grad, const Strides& grads, const T* out, const Strides& outs,
              const int64_t* index, int64_t groups, float* gradient, int threads) {
  const int64_t classes = masks.classes, row = masks.horizontal.size_in * classes;
  Columns columns(masks.horizontal.kept, [&](int64_t x) { return tap(masks.horizontal, x); });
  for_cells(masks, index, groups, gradient, threads, [&](int64_t image, int64_t cell, float* rows, Scratch& scratch) {
    const int64_t begin = first_output(masks.vertical, cell), end = first_output(masks.vertical, cell + 1);
    for (int64_t x = 0; begin < end && x < columns.count; x += LANES) {
      const Group& group = columns[x];
      std::fill_n(&scratch.sums[0], 2 * classes * LANES, 0.0f);
      for (int64_t y = begin; y < end; y++) {
        const T* g = grad + image * grads.batch + y * grads.row + x * grads.column;
        const T* p = out + image * outs.batch + y * outs.row + x * outs.column;
        const float weight = tap(masks.vertical, y).weight;
        Vec total = fill(0.0f);
        for (int64_t k = 0; k < classes; k++) {
          const Vec probability = load_apart(p + k * outs.classes, outs.column, group.count);
          const Vec product = probability * load_apart(g + k * grads.classes, grads.column, group.count);
          __builtin_prefetch(p + k * outs.classes + LANES * outs.column, 0, 2);
          __builtin_prefetch(g + k * grads.classes + LANES * grads.column, 0, 2);
          store(&scratch.logits[k * LANES], product), store(&scratch.wide[k * LANES], probability);
          total += product;
        }
        for (int64_t k = 0; k < classes; k++)
          unmix(load(&scratch.logits[k * LANES]) - load(&scratch.wide[k * LANES]) * total, k * LANES, classes, weight,
                &scratch.sums[0]);
      }
      narrow(group, scratch, classes, rows, rows + (tap(masks.vertical, begin).upper - cell) * row);
    }
  });
}

// One of several lattices of points (points, classes): outputs mix the points rows + columns.
struct Lattice {
  const int64_t *rows, *columns, *index;   // (2, height), (2, width), (points) or null
  const float *row_weights, *column_weights;
};

// The points of the columns that a lattice uses, in order; returns their number.
int64_t used_columns(const Lattice& lattice, int64_t width, int64_t* used) {
  std::copy_n(lattice.columns, 2 * width, used);
  std::sort(used, used + 2 * width);
  return std::unique(used, used + 2 * width) - used;
}

// Adds the probabilities of a lattice to rows from ``y`` to ``stop``.
void add_lattice(const Lattice& lattice, const float* scores, const Mean& mean, int64_t height, int64_t y, int64_t stop,
                 Scratch& scratch, float* out) {
  const int64_t width = mean.plane / height, classes = scratch.classes;
  Buffer memory(4 * width);
  int64_t *used = (int64_t*)&memory[0], *point = scratch.point(), count = used_columns(lattice, width, used);
  auto place = [&](int64_t column) { return std::lower_bound(used, used + count, column) - used; };
  Columns columns(width, [&](int64_t x) {
    return Tap{place(lattice.columns[x]), place(lattice.columns[width + x]), lattice.column_weights[x]};
  });
  for (int64_t end; y < stop; y = end) {
    for (end = y + 1; end < stop; end++)
      if (lattice.rows[end] != lattice.rows[y] || lattice.rows[height + end] != lattice.rows[height + y]) break;
    for (int second = 0; second < 2; second++) {
      for (int64_t x = 0; x < count; x++) {
        const int64_t at = lattice.rows[second * height + y] + used[x];
        point[x] = (lattice.index ? lattice.index[at] : at) * classes;
      }
      load_points(scores, point, count, classes, 1, scratch.row(second), scratch.stride);
    }
    write_rows(columns, mean, y, end, [&](int64_t row) { return lattice.row_weights[row]; }, scratch, out);
  }
}

}  // namespace

// index (batch, height, width) or null; out (batch, classes, kept height, kept width).
extern "C" void upsample_softmax(const Masks* masks, const void* scores, int64_t is_bfloat16, const int64_t* index,
                                 void* out, int64_t threads) {
  if (is_bfloat16)
    softmax(*masks, (const bfloat16*)scores, index, (bfloat16*)out, int(threads));
  else
    softmax(*masks, (const float*)scores, index, (float*)out, int(threads));
}

// ``strides`` are those of grad and out; gradient (batch, height * width or groups, classes).
extern "C" void upsample_softmax_backward(const Masks* masks, const void* grad, const void* out, const Strides* strides,
                                          int64_t is_bfloat16, const int64_t* index, int64_t groups, float* gradient,
                                          int64_t threads) {
  auto run = [&](auto* typed, auto* result) {
    backward(*masks, typed, strides[0], result, strides[1], index, groups, gradient, int(threads));
  };
  if (is_bfloat16)
    run((const bfloat16*)grad, (const bfloat16*)out);
  else
    run((const float*)grad, (const float*)out);
}

// scores (points or groups, classes); rows (lattices, 2, height), columns (lattices, 2, width) and their weights
// (lattices, height) and (lattices, width); index (points) or null; out (classes, height, width).
extern "C" void lattice_softmax(const float* scores, const int64_t* rows, const float* row_weights,
                                const int64_t* columns, const float* column_weights, const int64_t* index, float* out,
                                int64_t lattices, int64_t classes, int64_t height, int64_t width, int64_t threads) {
#pragma omp parallel num_threads(int(threads))
  {
    Scratch scratch(classes, 2 * width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t y = 0; y < height; y += ROWS)
      for (int64_t at = 0, stop = std::min(y + ROWS, height); at < lattices; at++) {
        const Lattice lattice{rows + at * 2 * height, columns + at * 2 * width, index, row_weights + at * height,
                              column_weights + at * width};
        add_lattice(lattice, scores, {at, lattices, height * width}, height, y, stop, scratch, out);
      }
  }
}
