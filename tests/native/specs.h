// Random tensors for the tests of the plan and of the kernels.
#pragma once

#include <functional>
#include <numeric>
#include <random>

#include "plan/plan.h"

using namespace bregman;
using Dims = std::vector<int64_t>;

inline std::mt19937 g_random(1);
inline int64_t pick(const Dims& from) { return from[g_random() % from.size()]; }

inline int64_t product(const Dims& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<>());
}

inline Dims dense_strides(const Dims& sizes, const std::vector<int>& outer_to_inner) {
  Dims strides(sizes.size());
  int64_t next = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[outer_to_inner[i]] = next;
    next *= std::max<int64_t>(1, sizes[outer_to_inner[i]]);
  }
  return strides;
}

inline std::vector<int> in_order(size_t ndim) {
  std::vector<int> order(ndim);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

inline TensorSpec spec_of(const Dims& sizes, const Dims& strides, int64_t group_dims) {
  void* const fake = reinterpret_cast<void*>(0x1000);  // a plan never looks at the data
  return {fake, {fake, fake}, nullptr, sizes, strides, group_dims, 1.5};
}

inline TensorSpec random_spec(bool grouped) {
  Dims sizes(g_random() % 6);
  for (int64_t& size : sizes) size = pick({1, 1, 2, 3, 4, 5, 7});
  if (!sizes.empty() && g_random() % 16 == 0) sizes[g_random() % sizes.size()] = 0;
  if (!sizes.empty() && g_random() % 8 == 0) sizes[g_random() % sizes.size()] = pick({31, 64, 129});
  std::vector<int> order = in_order(sizes.size());
  if (g_random() % 2) std::shuffle(order.begin(), order.end(), g_random);
  return spec_of(sizes, dense_strides(sizes, order), grouped ? int64_t(g_random() % (1u << sizes.size())) : -1);
}

inline Tuning random_tuning() {
  Tuning tuning{};
  tuning.chunk = pick({64, 128, 4096});
  tuning.tile = pick({1, 64, 256});
  tuning.strided_tile = pick({1, 64, 256});
  tuning.min_segment = pick({1, 8, 32});
  tuning.least_segment = std::min<int64_t>(tuning.min_segment, pick({1, 4, 8}));
  tuning.max_groups = pick({1, 3, 1024});
  tuning.align = pick({1, 8, 16});
  tuning.capacity = pick({64, 512, 1 << 20});
  tuning.panel = std::min<int64_t>(tuning.capacity, pick({64, 256}));
  tuning.workers = pick({1, 4, 400});
  tuning.strip_rows = pick({1, 2, 7});
  tuning.strip_columns = pick({0, 16, 1 << 20});
  return tuning;
}

// The oracle: which group the element at each memory offset belongs to, by walking the tensor's own indices.
inline std::vector<int64_t> group_of_offset(const TensorSpec& spec) {
  std::vector<int64_t> groups(product(spec.sizes), -1);
  Dims index(spec.sizes.size());
  for (size_t n = 0; n < groups.size(); ++n) {
    int64_t offset = 0, group = 0;
    for (size_t d = 0; d < index.size(); ++d) {
      offset += index[d] * spec.strides[d];
      if (spec.group_dims >> d & 1) group = group * spec.sizes[d] + index[d];
    }
    groups[offset] = group;
    for (size_t d = index.size(); d-- > 0;) {
      if (++index[d] < spec.sizes[d]) break;
      index[d] = 0;
    }
  }
  return groups;
}
