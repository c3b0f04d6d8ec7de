// Rows whose products tell how alike tokens are, for unit_rows.py: LayerNorm, sums of channels, length 1.

#include "simd.h"

namespace {

constexpr int64_t ELEMENTS_PER_THREAD = 1 << 14;
constexpr int64_t BLOCK = 4;              // rows side by side, as a row's sums wait for one another
constexpr int CHAINS = 4;                 // sums side by side, as one addition waits for another
constexpr int64_t STEP = CHAINS * LANES;  // of columns

// Sum of term(column) over columns [0, size), a multiple of STEP.
template <typename Term>
inline float total(int64_t size, Term term) {
  Vec sums[CHAINS] = {};
  for (int64_t column = 0; column < size; column += STEP) {
#pragma GCC unroll 4
    for (int n = 0; n < CHAINS; n++) sums[n] += term(column + n * LANES);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

struct Problem {
  int64_t dim, channels, batch, rows, batch_stride, row_stride;
  float eps;
};

// Memory of rows, zeros at first. Each has a multiple of STEP columns; those behind the ones in use stay zero.
class Rows {
 public:
  Rows(int64_t count, int64_t columns) : size(round_up(columns, STEP)), values_(count * size) {
    std::fill_n(&values_[0], count * size, 0.0f);
  }
  float* operator[](int64_t row) { return &values_[row * size]; }
  const int64_t size;

 private:
  Buffer values_;
};

void normalise(const Problem& problem, float mean, const float* weight, const float* bias, float* row) {
  const int64_t dim = problem.dim, size = round_up(dim, STEP);
  std::fill(row + dim, row + size, mean);
  const float squares = total(size, [&](int64_t column) {
    const Vec centred = load(row + column) - mean;
    return centred * centred;
  });
  const float scale = 1 / std::sqrt(squares / float(dim) + problem.eps);
  for (int64_t column = 0; column < dim; column += LANES) {
    const Vec centred = load(row + column) - mean;
    store(row + column, centred * scale * load(weight + column) + load(bias + column));
  }
  std::fill(row + dim, row + size, 0.0f);
}

void sum_channels(const Problem& problem, const float* row, float* sums) {
  const int64_t channels = problem.channels;
  for (int64_t column = 0; column < channels; column += LANES) {
    Vec sum = {};
    for (int64_t first = 0; first < problem.dim; first += channels)
      sum += load_some(row + first + column, channels - column);
    store(sums + column, sum);
  }
}

template <typename T>
void scale_to_length_1(const float* row, int64_t size, int64_t channels, T* out) {
  const float squares = total(size, [&](int64_t column) {
    const Vec values = load(row + column);
    return values * values;
  });
  const float scale = 1 / std::max(std::sqrt(squares), 1e-12f);
  for (int64_t column = 0; column < channels; column += LANES)
    store_some(out + column, load(row + column) * scale, channels - column);
}

template <typename T>
void run(const Problem& problem, const T* x, const T* weight, const T* bias, T* out, int64_t threads) {
  const int64_t dim = problem.dim, channels = problem.channels, count = problem.batch * problem.rows;
  auto copy = [&](const T* from, float* to) {
    for (int64_t column = 0; column < dim; column += LANES) store(to + column, load_some(from + column, dim - column));
  };
  Rows affine(2, dim);
  copy(weight, affine[0]);
  if (bias) copy(bias, affine[1]);
#pragma omp parallel num_threads(threads_for(count * dim, ELEMENTS_PER_THREAD, threads))
  {
    Rows rows(BLOCK, round_up(dim, channels)), sums(BLOCK, channels);
    float means[BLOCK];
#pragma omp for schedule(static)
    for (int64_t start = 0; start < count; start += BLOCK) {
      const int64_t block = std::min(BLOCK, count - start);
      for (int64_t n = 0; n < block; n++) {
        const int64_t image = (start + n) / problem.rows, row = (start + n) % problem.rows;
        copy(x + image * problem.batch_stride + row * problem.row_stride, rows[n]);
        means[n] = total(round_up(dim, STEP), [&](int64_t column) { return load(rows[n] + column); }) / float(dim);
      }
      for (int64_t n = 0; n < block; n++) normalise(problem, means[n], affine[0], affine[1], rows[n]);
      for (int64_t n = 0; n < block; n++) sum_channels(problem, rows[n], sums[n]);
      for (int64_t n = 0; n < block; n++) scale_to_length_1(sums[n], sums.size, channels, out + (start + n) * channels);
    }
  }
}

}  // namespace

// x (batch, rows, dim) with these strides of images and rows; weight, bias (dim), bias may be null; out (batch, rows,
// channels), written, with channels at most dim.
extern "C" void unit_rows(const void* x, const void* weight, const void* bias, void* out, int64_t batch, int64_t rows,
                          int64_t dim, int64_t channels, int64_t batch_stride, int64_t row_stride, int64_t is_bfloat16,
                          int64_t threads, float eps) {
  const Problem problem{dim, channels, batch, rows, batch_stride, row_stride, eps};
  auto run_typed = [&](auto* typed) {
    using T = decltype(typed);
    run(problem, (T)x, (T)weight, (T)bias, typed, threads);
  };
  is_bfloat16 ? run_typed((bfloat16*)out) : run_typed((float*)out);
}
