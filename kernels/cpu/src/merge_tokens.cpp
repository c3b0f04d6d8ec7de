// Groups of tokens and their means, for merge_tokens and bipartite_groups of tokens.py.
#include <vector>

#include "simd.h"

namespace {

constexpr int64_t ELEMENTS_PER_THREAD = 1 << 14;

// Smaller for larger values and, of equal ones, for earlier sources; largest for NaN.
uint64_t rank_of(float value, int64_t source) {
  value += 0.0f;  // -0 equals 0
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t falling = value != value ? 0xffffffff : bits >> 31 ? bits : ~(bits | 0x80000000);
  return uint64_t(falling) << 32 | uint64_t(source);
}

// Rank below which ``merged`` of the sources are.
uint64_t bound_of(const float* value, int64_t sources, int64_t merged) {
  if (merged >= sources) return UINT64_MAX;
  std::vector<uint64_t> ranks(sources);
  for (int64_t source = 0; source < sources; source++) ranks[source] = rank_of(value[source], source);
  std::nth_element(ranks.begin(), ranks.begin() + merged, ranks.end());
  return ranks[merged];
}

// Groups of an image; false if a match is outside.
bool group_tokens(const float* value, const int64_t* match, int64_t tokens, int64_t merged, int64_t prefix,
                  float threshold, int64_t* index) {
  const int64_t sources = tokens / 2, pending = -1;
  const uint64_t bound = merged < 0 ? 0 : bound_of(value, sources, merged);
  int64_t groups = 0;
  for (; groups < prefix; groups++) index[groups] = groups;
  index += prefix;
  for (int64_t token = 0; token < tokens; token++) {
    const int64_t source = token / 2;
    const bool merges = token % 2 && (merged < 0 ? value[source] > threshold : rank_of(value[source], source) < bound);
    index[token] = merges ? pending : groups;
    groups += !merges;
  }
  for (int64_t source = 0; source < sources; source++) {
    if (index[2 * source + 1] != pending) continue;
    if (match[source] < 0 || match[source] >= tokens - sources) return false;
    index[2 * source + 1] = index[2 * match[source]];
  }
  return true;
}

float share_of(const float* weights, int64_t token, float size) {
  return size == 0 ? 0 : (weights ? weights[token] : 1.0f) / size;
}

// Tokens of groups, in order, and their shares of the groups' weights.
struct Members {
  std::vector<int64_t> ends, tokens;
  std::vector<float> shares;
};

// Lists the members of an image's groups; false if an index is outside.
bool list_members(const int64_t* index, const float* weights, int64_t tokens, int64_t groups, Members& members,
                  float* sizes) {
  members.ends.assign(groups + 1, 0);
  members.tokens.resize(tokens);
  members.shares.resize(tokens);
  std::fill_n(sizes, groups, 0.0f);
  int64_t* ends = members.ends.data();
  for (int64_t token = 0; token < tokens; token++) {
    const int64_t group = index[token];
    if (group < 0 || group >= groups) return false;
    ends[group + 1]++;
    sizes[group] += weights ? weights[token] : 1.0f;
  }
  for (int64_t group = 0; group < groups; group++) ends[group + 1] += ends[group];
  for (int64_t token = 0; token < tokens; token++) {  // the start of each group moves to its end
    const int64_t group = index[token], place = ends[group]++;
    members.tokens[place] = token;
    members.shares[place] = share_of(weights, token, sizes[group]);
  }
  return true;
}

// Sum of the rows of ``members`` times their shares; one row with share 1 keeps its bits.
template <typename T>
void mix_rows(const T* rows, int64_t stride, const int64_t* members, const float* shares, int64_t count, int64_t dim,
              T* out) {
  auto mix = [&](int64_t column, int64_t width) {
    Vec total = count ? shares[0] * load_some(rows + members[0] * stride + column, width) : fill(0.0f);
    for (int64_t n = 1; n < count; n++) total += shares[n] * load_some(rows + members[n] * stride + column, width);
    store_some(out + column, total, width);
  };
  int64_t column = 0;
  for (; column + LANES <= dim; column += LANES) mix(column, LANES);
  if (column < dim) mix(column, dim - column);
}

template <typename T>
bool merge(const T* tokens, const int64_t* index, const float* weights, T* merged, float* sizes, int64_t batch,
           int64_t count, int64_t dim, int64_t groups, int64_t batch_stride, int64_t stride, int64_t threads) {
  std::vector<Members> images(batch);
  std::vector<char> inside(batch);
#pragma omp parallel for num_threads(threads_for(batch * count, ELEMENTS_PER_THREAD, threads))
  for (int64_t image = 0; image < batch; image++)
    inside[image] = list_members(index + image * count, weights ? weights + image * count : nullptr, count, groups,
                                 images[image], sizes + image * groups);
  if (std::count(inside.begin(), inside.end(), 0)) return false;
#pragma omp parallel for num_threads(threads_for(batch * count * dim, ELEMENTS_PER_THREAD, threads))
  for (int64_t row = 0; row < batch * groups; row++) {
    const int64_t image = row / groups, group = row % groups;
    const Members& members = images[image];
    const int64_t start = group ? members.ends[group - 1] : 0;
    mix_rows(tokens + image * batch_stride, stride, members.tokens.data() + start, members.shares.data() + start,
             members.ends[group] - start, dim, merged + row * dim);
  }
  return true;
}

template <typename T>
void spread(const T* grad, const int64_t* index, const float* weights, const float* sizes, T* out, int64_t batch,
            int64_t count, int64_t dim, int64_t groups, int64_t batch_stride, int64_t stride, int64_t threads) {
#pragma omp parallel for num_threads(threads_for(batch * count * dim, ELEMENTS_PER_THREAD, threads))
  for (int64_t row = 0; row < batch * count; row++) {
    const int64_t image = row / count;
    const float share = share_of(weights, row, sizes[image * groups + index[row]]);
    mix_rows(grad + image * batch_stride, stride, index + row, &share, 1, dim, out + row * dim);
  }
}

}  // namespace

// value, match (batch, tokens / 2); index (batch, prefix + tokens), written. Without a number to be merged, -1, values
// above the threshold merge. Sets ``outside`` if a match is none of the tokens at even positions.
extern "C" void bipartite_groups(const float* value, const int64_t* match, int64_t* index, int64_t* outside,
                                 int64_t batch, int64_t tokens, int64_t merged, int64_t prefix, int64_t threads,
                                 float threshold) {
  const int64_t sources = tokens / 2;
  std::vector<char> inside(batch);
#pragma omp parallel for num_threads(threads_for(batch * sources, ELEMENTS_PER_THREAD, threads))
  for (int64_t image = 0; image < batch; image++)
    inside[image] = group_tokens(value + image * sources, match + image * sources, tokens, merged, prefix, threshold,
                                 index + image * (prefix + tokens));
  *outside = std::count(inside.begin(), inside.end(), 0);
}

// tokens (batch, count, dim) with these strides of images and tokens; index, weights (batch, count), weights may be
// null; merged (batch, groups, dim) and sizes (batch, groups), written. Sets ``outside`` if an index is none of a group.
extern "C" void merge_tokens(const void* tokens, const int64_t* index, const float* weights, const float* sizes,
                             void* merged, int64_t* outside, int64_t batch, int64_t count, int64_t dim, int64_t groups,
                             int64_t batch_stride, int64_t stride, int64_t is_bfloat16, int64_t threads) {
  auto run = [&](auto* typed) {
    *outside = !merge((decltype(typed))tokens, index, weights, typed, (float*)sizes, batch, count, dim, groups,
                      batch_stride, stride, threads);
  };
  is_bfloat16 ? run((bfloat16*)merged) : run((float*)merged);
}

// The transpose: grad (batch, groups, dim) with these strides; out (batch, count, dim), written.
extern "C" void merge_tokens_backward(const void* grad, const int64_t* index, const float* weights, const float* sizes,
                                      void* out, int64_t*, int64_t batch, int64_t count, int64_t dim, int64_t groups,
                                      int64_t batch_stride, int64_t stride, int64_t is_bfloat16, int64_t threads) {
  auto run = [&](auto* typed) {
    spread((decltype(typed))grad, index, weights, sizes, typed, batch, count, dim, groups, batch_stride, stride,
           threads);
  };
  is_bfloat16 ? run((bfloat16*)out) : run((float*)out);
}
