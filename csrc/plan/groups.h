// Where the elements of a group lie in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../math/hd.h"

namespace bregman {

// A dense tensor in memory order, dimensions collapsed into alternating runs of group (G) and reduced (R) indices:
// [G0][R0][G1][R1][G2][R2]. Group (g0, g1, g2) holds the elements of all (r0, r1, r2). A row of a group is its
// contiguous run of R2 elements; neighbouring groups g2 lie side by side, so that a tile of them is a matrix with
// R0 * R1 rows of contiguous columns.
struct GroupLayout {
  int64_t g0 = 1, r0 = 1, g1 = 1, r1 = 1, g2 = 1, r2 = 1;

  BREGMAN_HD int64_t groups() const { return g0 * g1 * g2; }
  BREGMAN_HD int64_t rows() const { return r0 * r1; }
  BREGMAN_HD int64_t group_size() const { return r0 * r1 * r2; }
};

// Division of numbers below 2^31 by one that is known when a plan is made: a product and a shift, where a GPU divides
// by a variable in about twenty instructions.
struct Divider {
  uint32_t divisor = 1, factor = 1, shift = 0;

  static Divider by(int64_t divisor) {
    Divider d;
    d.divisor = uint32_t(divisor);
    while ((uint64_t(1) << d.shift) < d.divisor) ++d.shift;
    d.factor = uint32_t((((uint64_t(1) << d.shift) - d.divisor) << 32) / d.divisor + 1);
    return d;
  }
  BREGMAN_HD uint32_t quotient(uint32_t x) const { return (uint32_t((uint64_t(x) * factor) >> 32) + x) >> shift; }
};

// Empty, or why a tensor is not dense: its elements must cover a memory range once, in any order of dimensions.
inline std::string why_not_dense(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  std::vector<std::pair<int64_t, int64_t>> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return "";
    if (sizes[d] != 1) order.push_back({strides[d], sizes[d]});
  }
  std::sort(order.begin(), order.end());
  int64_t expected = 1;
  for (auto [stride, size] : order) {
    if (stride != expected) return "its memory has gaps or overlaps (a strided or expanded view)";
    expected *= size;
  }
  return "";
}

// The layout of a dense tensor whose groups are identified by the dims in `group_dims` (bit d = dim d).
// Returns empty and fills `layout`, or says why kernels cannot serve it.
inline std::string collapse(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            int64_t group_dims, GroupLayout& layout) {
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t* runs[6] = {&layout.r2, &layout.g2, &layout.r1, &layout.g1, &layout.r0, &layout.g0};
  layout = GroupLayout();
  int run = 0;  // even: reduced, odd: group
  for (size_t d : order) {
    bool is_group = (group_dims >> d) & 1;
    if (is_group != bool(run % 2)) ++run;
    if (run == 6) return "its group dims alternate with the others more than five times in memory";
    *runs[run] *= sizes[d];
  }
  return "";
}

}  // namespace bregman
