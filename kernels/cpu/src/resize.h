// A bilinear resize and its transpose, for LANES neighbouring outputs of a row at a time.
//
// Outputs are the lanes of a vector and classes lie LANES apart, so softmax needs no sum across lanes. All rows of a
// cell mix the same two input rows: these are resized along x once for each group of outputs, and a row of outputs is a
// mix of the two. The transpose sums the gradients of all rows of a cell before it gives them to columns.
#pragma once

#include "simd.h"

#include <algorithm>

// kernels/bilinear.py explains the numbers.
struct Axis {
  int64_t size_in, size_out, kept, step, offset, denominator;
};

struct Tap {
  int64_t lower, upper;
  float weight;  // of the upper one
};

inline Tap tap(const Axis& axis, int64_t output) {
  const int64_t numerator = std::max<int64_t>(output * axis.step + axis.offset, 0);
  const int64_t cell = numerator / axis.denominator, last = axis.size_in - 1, next = axis.size_in != axis.size_out;
  const double weight = double(numerator - cell * axis.denominator) / double(axis.denominator);
  return {std::min(cell, last), std::min(cell + next, last), float(weight)};
}

// First kept output whose lower tap is ``cell`` or a later one; cells run from 0 to size_in.
inline int64_t first_output(const Axis& axis, int64_t cell) {
  if (cell == 0) return 0;
  if (cell == axis.size_in || axis.step == 0) return axis.kept;
  const int64_t least = std::max<int64_t>(cell * axis.denominator - axis.offset, 0);
  return std::min((least + axis.step - 1) / axis.step, axis.kept);
}

// Scores ``from`` (batch, classes, points) and the resize of their points (height, width).
struct Masks {
  int64_t batch, classes, batch_stride, class_stride, row_stride, column_stride;
  Axis vertical, horizontal;
};

// LANES neighbouring outputs.
struct Group {
  Ints lower, upper;  // columns from ``first`` on
  Vec left, right;    // their weights
  int first, count;   // ``count`` lanes are real
  int columns;        // 0 if there are more than LANES
  int ends[LANES];    // of the parts of a column
  int lanes[2 * LANES];
  float weights[2 * LANES];  // of the parts
};

// The outputs of a row, in groups of which the last one repeats its last output.
class Columns {
 public:
  const int64_t count;

  template <typename TapOf>
  Columns(int64_t outputs, TapOf tap_of) : count(outputs), memory_(groups() * int64_t(sizeof(Group) / 4)) {
    for (int64_t x = 0; x < count; x += LANES) {
      Group& group = (*this)[x];
      for (int lane = 0; lane < LANES; lane++) {
        const Tap tap = tap_of(std::min(x + lane, count - 1));
        group.lower[lane] = int(tap.lower), group.upper[lane] = int(tap.upper), group.right[lane] = tap.weight;
      }
      finish(group, int(std::min<int64_t>(LANES, count - x)));
    }
  }
  Group& operator[](int64_t x) { return ((Group*)&memory_[0])[x / LANES]; }

 private:
  Buffer memory_;

  int64_t groups() const { return (count + LANES - 1) / LANES; }

  static void finish(Group& group, int lanes) {
    int first = group.lower[0], last = first, part = 0;
    for (int lane = 0; lane < LANES; lane++) {
      first = std::min({first, group.lower[lane], group.upper[lane]});
      last = std::max({last, group.lower[lane], group.upper[lane]});
    }
    group.left = 1.0f - group.right, group.lower -= first, group.upper -= first;
    group.first = first, group.count = lanes, group.columns = last - first < LANES ? last - first + 1 : 0;
    for (int column = 0; column < group.columns; group.ends[column++] = part)
      for (int lane = 0; lane < lanes; lane++) {
        if (group.lower[lane] == column) group.lanes[part] = lane, group.weights[part++] = group.left[lane];
        if (group.upper[lane] == column) group.lanes[part] = lane, group.weights[part++] = group.right[lane];
      }
  }
};

// What a thread needs: two rows of points, each (classes, stride), and of a group of outputs these rows resized along
// x, logits, and sums of gradients.
struct Scratch {
  int64_t classes, stride;  // a vector may begin at any point
  Buffer rows, wide, logits, sums, offsets;

  Scratch(int64_t classes, int64_t width)
      : classes(classes),
        stride(round_up(width, LANES) + LANES),
        rows(2 * classes * stride),
        wide(2 * classes * LANES),
        logits(classes * LANES),
        sums(2 * classes * LANES),
        offsets(2 * width) {
    std::fill_n(&rows[0], 2 * classes * stride, 0.0f);
  }
  float* row(int second) { return &rows[second * classes * stride]; }
  int64_t* point() { return (int64_t*)&offsets[0]; }
};

// Loads a row of points: classes outermost.
template <typename T>
void load_points(const T* from, const int64_t* point, int64_t count, int64_t classes, int64_t class_stride, float* to,
                 int64_t stride) {
  if (class_stride != 1) {
    bool contiguous = true;
    for (int64_t x = 1; x < count; x++) contiguous = contiguous && point[x] == point[0] + x;
    for (int64_t k = 0; k < classes; k++, from += class_stride, to += stride)
      if (contiguous)
        for (int64_t x = 0; x < count; x++) to[x] = to_float(from[point[0] + x]);
      else
        for (int64_t x = 0; x < count; x++) to[x] = to_float(from[point[x]]);
    return;
  }
  for (int64_t x = 0; x < count; x += LANES)
    for (int64_t k = 0; k < classes; k += LANES) {
      Vec tile[LANES];
      for (int64_t at = 0; at < LANES; at++)
        tile[at] = load_some(from + point[std::min(x + at, count - 1)] + k, classes - k);
      transpose(tile);
      for (int64_t at = 0; at < LANES && k + at < classes; at++) store(to + (k + at) * stride + x, tile[at]);
    }
}

// Loads two rows of an image; ``index`` has the groups of its points, whose scores these are, or is null.
template <typename T>
void load_rows(const Masks& masks, const T* scores, const int64_t* index, int64_t image, int64_t lower, int64_t upper,
               Scratch& scratch) {
  const int64_t width = masks.horizontal.size_in, row = masks.row_stride, column = masks.column_stride;
  int64_t* point = scratch.point();
  scores += image * masks.batch_stride;
  if (index) index += image * masks.vertical.size_in * width;
  for (int second = 0; second < 2; second++) {
    const int64_t y = second ? upper : lower;
    for (int64_t x = 0; x < width; x++) point[x] = index ? index[y * width + x] * column : y * row + x * column;
    load_points(scores, point, width, masks.classes, masks.class_stride, scratch.row(second), scratch.stride);
  }
}

// Resizes the points of a group along x, in both rows.
inline void widen(const Group& group, int64_t classes, Scratch& scratch) {
  const float* row = scratch.row(0) + group.first;  // the other one follows
  for (int64_t k = 0; k < 2 * classes; k++, row += scratch.stride) {
    const Vec points = load(row);
    const Vec lower = group.columns ? permute(points, group.lower) : gather(row, group.lower);
    const Vec upper = group.columns ? permute(points, group.upper) : gather(row, group.upper);
    store(&scratch.wide[k * LANES], lower * group.left + upper * group.right);
  }
}

// Logits of a row of a group, mixed from two resized rows. Returns the largest; a NaN is not the largest.
inline Vec mix(const float* wide, int64_t classes, float weight, float* logits) {
  Vec peak = fill(-INFINITY);
  for (int64_t at = 0; at < classes * LANES; at += LANES) {
    const Vec logit = load(wide + at) * (1.0f - weight) + load(wide + classes * LANES + at) * weight;
    store(logits + at, logit);
    peak = maximum(logit, peak);
  }
  return peak;
}

// Replaces logits by e^(logit - peak), and returns their sum.
inline Vec exponentials(float* logits, int64_t classes, Vec peak) {
  Vec total = fill(0.0f);
  for (int64_t at = 0; at < classes * LANES; at += LANES) {
    const Vec power = exp(load(logits + at) - peak);
    store(logits + at, power);
    total += power;
  }
  return total;
}

// Adds a gradient of a row of a group to those of the two resized rows.
inline void unmix(Vec gradient, int64_t at, int64_t classes, float weight, float* sums) {
  store(sums + at, load(sums + at) + gradient * (1.0f - weight));
  store(sums + classes * LANES + at, load(sums + classes * LANES + at) + gradient * weight);
}

// Adds the gradient of a resized row (classes, LANES) to its points (width, classes).
inline void narrow(const Group& group, const float* sums, int64_t classes, float* to) {
  to += group.first * classes;
  for (int64_t k = 0; k < classes; k += LANES) {
    const int64_t count = classes - k;
    Vec tile[LANES];
    for (int64_t at = 0; at < LANES; at++) tile[at] = at < count ? load(sums + (k + at) * LANES) : fill(0.0f);
    transpose(tile);
    for (int column = 0, part = 0; column < group.columns; column++) {
      Vec total = fill(0.0f);
      for (; part < group.ends[column]; part++) total += tile[group.lanes[part]] * group.weights[part];
      float* point = to + column * classes + k;
      store_some(point, load_some(point, count) + total, count);
    }
    for (int lane = 0; lane < group.count && !group.columns; lane++) {
      float *lower = to + group.lower[lane] * classes + k, *upper = to + group.upper[lane] * classes + k;
      store_some(lower, load_some(lower, count) + tile[lane] * group.left[lane], count);
      store_some(upper, load_some(upper, count) + tile[lane] * group.right[lane], count);
    }
  }
}

// Does so for both resized rows, whose points may be the same.
inline void narrow(const Group& group, Scratch& scratch, int64_t classes, float* lower, float* upper) {
  float *sums = &scratch.sums[0], *second = sums + classes * LANES;
  for (int64_t at = 0; lower == upper && at < classes * LANES; at += LANES)
    store(sums + at, load(sums + at) + load(second + at));
  narrow(group, sums, classes, lower);
  if (lower != upper) narrow(group, second, classes, upper);
}

// Adds the gradients of the points of an image to those of their groups, in the order of the points.
inline void add_to_groups(const int64_t* index, int64_t points, int64_t groups, int64_t classes, const float* from,
                          float* to, int threads) {
  constexpr int64_t STEP = 4 * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < classes; k += STEP) {
    const int64_t count = std::min(STEP, classes - k);
    for (int64_t group = 0; group < groups; group++) std::fill_n(to + group * classes + k, count, 0.0f);
    for (int64_t point = 0; point < points; point++)
      for (int64_t at = k; at < k + count; at++) to[index[point] * classes + at] += from[point * classes + at];
  }
}

// Runs ``cell(image, row of cells, gradient, scratch)`` for all rows of cells. Those with even numbers, and then those
// with odd ones, share no row of points, so each point takes its parts in one order for any number of threads.
//
// A cell adds to the rows that begin at its ``gradient`` (2, width, classes), null if no gradient is wanted. Those of
// the points of a group are added to ``gradient`` (batch, height * width or groups, classes).
template <typename Cell>
void for_cells(const Masks& masks, const int64_t* index, int64_t groups, float* gradient, int threads, Cell cell) {
  const int64_t height = masks.vertical.size_in, row = masks.horizontal.size_in * masks.classes;
  Buffer of_points(index && gradient ? masks.batch * height * row : 0);
  float* begin = index && gradient ? &of_points[0] : gradient;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(masks.classes, masks.horizontal.size_in);
    for (int64_t odd = 0; odd < 2; odd++) {
      const int64_t count = (height + 1 - odd) / 2;
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < masks.batch * count; task++) {
        const int64_t image = task / count, y = 2 * (task % count) + odd;
        float* rows = gradient ? begin + (image * height + y) * row : nullptr;
        if (rows && !odd) std::fill_n(rows, (y + 1 < height ? 2 : 1) * row, 0.0f);
        cell(image, y, rows, scratch);
      }
    }
  }
  const int64_t points = height * masks.horizontal.size_in;
  for (int64_t image = 0; index && gradient && image < masks.batch; image++)
    add_to_groups(index + image * points, points, groups, masks.classes, begin + image * height * row,
                  gradient + image * groups * masks.classes, threads);
}
