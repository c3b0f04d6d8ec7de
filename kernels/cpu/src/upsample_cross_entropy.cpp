// Cross-entropy of bilinearly upsampled scores and its gradient, in one pass; kernels/cpu/upsample_cross_entropy.py has
// the formulas.

#include "resize.h"

namespace {

constexpr int64_t CHUNK = 1 << 15;

struct Loss {
  const int32_t* target;      // (batch, height, width), -1 for ignored pixels
  const float* weight;        // (classes) or null
  const float* grad;          // of the loss: one, or with ``pixel_grads`` (batch, height, width)
  bool pixel_grads;
  float hard, soft;           // 1 - smoothing, smoothing / classes
  float total;                // of the weights
  float* pixel_loss;          // (batch, height, width) or null
  double* row_loss;           // (batch, height of the scores)
  float* gradient;            // (batch, points, classes) or null
};

// Classes of pixels, -1 where they are ignored; ``found`` takes the sum of their weights, smallest and largest class.
template <typename T>
void find_classes(const T* target, int64_t count, int64_t ignored, const float* weight, int64_t classes, int32_t* out,
                  double* found) {
  int64_t smallest = 0, largest = 0, counted = 0;
  for (int64_t at = 0; at < count; at++) {
    const int64_t given = target[at];
    const bool counts = given != ignored;
    out[at] = counts ? int32_t(given) : -1;
    smallest = std::min(smallest, counts ? given : 0);
    largest = std::max(largest, counts ? given : 0);
    counted += counts;
  }
  double total = double(counted);
  if (weight && smallest >= 0 && largest < classes) {
    total = 0;
    for (int64_t at = 0; at < count; at++) total += out[at] < 0 ? 0.0 : double(weight[out[at]]);
  }
  found[0] = total, found[1] = double(smallest), found[2] = double(largest);
}

template <typename T>
void find_all_classes(const T* target, int64_t count, int64_t ignored, const float* weight, int64_t classes,
                      int32_t* out, double* found, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t begin = 0; begin < count; begin += CHUNK)
    find_classes(target + begin, std::min(CHUNK, count - begin), ignored, weight, classes, out + begin,
                 found + begin / CHUNK * 3);
}

// Weights of the pixels' classes, 0 for ignored ones.
Vec weights_of(Ints target, const float* weight) {
  return target < 0 ? fill(0.0f) : weight ? gather(weight, target < 0 ? target - target : target) : fill(1.0f);
}

// Loss of ``count`` pixels of a row; adds the gradient of their logits to the sums.
Vec pixels(const Loss& loss, int64_t classes, int64_t at, int64_t count, float weight, Scratch& scratch) {
  float *logits = &scratch.logits[0], *sums = &scratch.sums[0];
  Ints target = lane_numbers() - lane_numbers() - 1;
  std::memcpy(&target, loss.target + at, 4 * count);
  const Vec none = fill(0.0f), hard = weights_of(target, loss.weight) * loss.hard;
  const Vec peak = mix(&scratch.wide[0], classes, weight, logits);
  const Vec chosen = gather(logits, (target < 0 ? target - target : target) * LANES + lane_numbers()) - peak;
  Vec smooth = none;
  if (loss.soft != 0.0f)
    for (int64_t k = 0; k < classes; k++)
      smooth += (load(logits + k * LANES) - peak) * (loss.weight ? loss.weight[k] : 1.0f);
  const Vec sum = exponentials(logits, classes, peak), log_sum = log(sum);
  Vec result = hard * (log_sum - chosen);
  if (loss.soft != 0.0f) result += loss.soft * (loss.total * log_sum - smooth);
  if (loss.gradient) {
    const Vec grad = target < 0 ? none : loss.pixel_grads ? load_some(loss.grad + at, count) : fill(*loss.grad);
    const Vec hard_grad = grad * hard, scale = (hard_grad + grad * (loss.soft * loss.total)) / sum;
    for (int64_t k = 0; k < classes; k++) {
      const Vec gradient = load(logits + k * LANES) * scale - (target == int(k) ? hard_grad : none);
      unmix(gradient, k * LANES, classes, weight, sums);
    }
    if (loss.soft != 0.0f)
      for (int64_t k = 0; k < classes; k++)
        unmix(grad * (-loss.soft * (loss.weight ? loss.weight[k] : 1.0f)), k * LANES, classes, weight, sums);
  }
  return target < 0 ? none : result;
}

template <typename T>
void cell_loss(const Masks& masks, const T* scores, const int64_t* index, const Loss& loss, Columns& columns,
               int64_t image, int64_t cell, float* gradient, Scratch& scratch) {
  const int64_t height = masks.vertical.size_in, width = masks.horizontal.size_in, classes = masks.classes;
  const int64_t begin = first_output(masks.vertical, cell), end = first_output(masks.vertical, cell + 1);
  double total = 0;
  if (begin < end) {
    const int64_t upper = tap(masks.vertical, begin).upper;
    load_rows(masks, scores, index, image, cell, upper, scratch);
    for (int64_t x = 0; x < columns.count; x += LANES) {
      const Group& group = columns[x];
      widen(group, classes, scratch);
      if (gradient) std::fill_n(&scratch.sums[0], 2 * classes * LANES, 0.0f);
      for (int64_t y = begin; y < end; y++) {
        const int64_t at = (image * masks.vertical.kept + y) * columns.count + x;
        const Vec losses = pixels(loss, classes, at, group.count, tap(masks.vertical, y).weight, scratch);
        if (loss.pixel_loss) store_some(loss.pixel_loss + at, losses, group.count);
        total += sum(losses);
      }
      if (gradient) narrow(group, scratch, classes, gradient, gradient + (upper - cell) * width * classes);
    }
  }
  loss.row_loss[image * height + cell] = total;
}

template <typename T>
void run(const Masks& masks, const T* scores, const int64_t* index, int64_t groups, Loss loss, int threads) {
  Columns columns(masks.horizontal.kept, [&](int64_t x) { return tap(masks.horizontal, x); });
  auto cell_of = [&](int64_t image, int64_t cell, float* gradient, Scratch& scratch) {
    cell_loss(masks, scores, index, loss, columns, image, cell, gradient, scratch);
  };
  for_cells(masks, index, groups, loss.gradient, threads, cell_of);
}

}  // namespace

// target (count), of ``bytes`` each, unsigned if one; out (count); found (chunks of 2^15 pixels, 3).
extern "C" void target_classes(const void* target, int64_t bytes, int64_t count, int64_t ignored, const float* weight,
                               int64_t classes, int32_t* out, double* found, int64_t threads) {
  auto find = [&](auto* typed) {
    find_all_classes(typed, count, ignored, weight, classes, out, found, int(threads));
  };
  if (bytes == 1) find((const uint8_t*)target);
  if (bytes == 2) find((const int16_t*)target);
  if (bytes == 4) find((const int32_t*)target);
  if (bytes == 8) find((const int64_t*)target);
}

// index (batch, height, width) or null; gradient (batch, height * width or groups, classes).
extern "C" void upsample_cross_entropy(const Masks* masks, const void* scores, int64_t is_bfloat16,
                                       const int64_t* index, int64_t groups, const int32_t* target, const float* weight,
                                       const float* grad, int64_t pixel_grads, float hard, float soft,
                                       float total, float* pixel_loss, double* row_loss, float* gradient,
                                       int64_t threads) {
  const Loss loss{target, weight, grad, pixel_grads != 0, hard, soft, total, pixel_loss, row_loss, gradient};
  if (is_bfloat16)
    run(*masks, (const bfloat16*)scores, index, groups, loss, int(threads));
  else
    run(*masks, (const float*)scores, index, groups, loss, int(threads));
}
