// The steps that keep all points in a buffer (points.h): for elementwise penalties other than none and L1, and for group
// penalties in a diagonal metric.
#pragma once

#include "group_prox.h"

BREGMAN_BEGIN

template <class Rule, class T>
void run_separable_buffered(const PlanView& plan, const Item& item, const void* grad, const StepArgs& args,
                            int32_t* counts) {
  using C = compute_t<T>;
  const TensorRecord& t = plan.records()[item.tensor];
  const auto k = Scalars<Rule, C>::from(args.scalars, args.elementwise, args.radial);
  const Stored<Rule, T> stored(t, grad);
  alignas(64) C z[kBuffer], scales[kBuffer];
  int32_t count = 0;
  for (int64_t j = 0; j < item.count; j += kBuffer) {
    const int64_t begin = item.begin + j, n = item.count - j < kBuffer ? item.count - j : kBuffer;
    advance_any(stored, begin, {1, 1, 0, 0}, n, k, z, scales);
    prox_buffer<Rule, C>(z, scales, n, k);
    count += finish_any(stored, begin, n, k, z);
  }
  if (counts == nullptr) return;
  counts[0] = count;
  counts[1] = 0;
}

// Groups of one tensor, tile by tile.
template <class Rule, class T>
struct PointGroups : TileOf<Rule, T> {
  using C = compute_t<T>;
  using Base = TileOf<Rule, T>;
  using Base::k, Base::row, Base::rows, Base::scratch, Base::stored, Base::t;

  PointGroups(const TensorRecord& record, const void* grad, const StepArgs& args) : Base(record, grad, args) {}

  int32_t run(int64_t base, int64_t count, int32_t* alive) const {
    const int64_t columns = count * row, elements = rows * columns;
    C* z = scratch.template get<C>(4, elements);
    C* scales = kPaired<Rule> ? scratch.template get<C>(5, elements) : z;
    BufferedGroups<C> groups(scratch, z, scales, rows, row, count);
    Line<C> line{};
    bool straight = false;
    if constexpr (kPaired<Rule>) straight = line_of(k.radial, C(t.weight), Rule::kMetric, line);
    advance_any(stored, base, this->all_rows(), columns, k, z, scales);
    if (k.elementwise.kind != 0) prox_buffer<Rule, C>(z, scales, elements, k);
    if constexpr (Rule::kMetric) {
      auto add_old = [&](int64_t first, const Rows& part, int64_t n, double* sums) {
        for (int64_t r = 0; r < part.outer * part.inner; ++r)
          stored.old_params(part.at(base + first, r), n, [&](const C* params, int64_t j, int64_t m) {
            add_squares<C>(params, 1, m, sums + j);
          });
      };
      const bool one_level = rows <= this->inner;
      const Ahead ahead = one_level ? Ahead(stored, base + columns, groups.folded(this->row_stride)) : Ahead();
      if (straight) groups.shrink_in_metric(line, this->all_rows(), add_old, ahead);
      else groups.shrink_along(k.radial, C(t.weight));
    } else if constexpr (Rule::kHalfSpace) {
      groups.project(line, k.h.lr, k.h.epsilon);
    } else {
      groups.shrink(uniform_scale<Rule, C>(k.h) * C(t.weight), k.radial);
    }
    int32_t nonzeros = 0;
    for (int64_t r = 0; r < rows; ++r)
      nonzeros += finish_any(stored, this->offset(base, r), columns, k, z + r * columns);
    if (alive != nullptr)
      for (int64_t m = 0; m < count; ++m) *alive += this->any_nonzero(base + m * row);
    return nonzeros;
  }
  int32_t run_long(int64_t base, int64_t, int64_t count, int32_t* alive) const {
    int32_t nonzeros = 0;
    for (int64_t m = 0; m < count; ++m) nonzeros += run(base + m * row, 1, alive);
    return nonzeros;
  }
  int32_t run_columns(int64_t base, int64_t, int64_t count, int32_t* alive) const { return run(base, count, alive); }
};

template <class Rule, class T>
void run_grouped_buffered(const PlanView& plan, const Item& item, const void* grad, const StepArgs& args,
                          int32_t* counts) {
  const TensorRecord& t = plan.records()[item.tensor];
  PointGroups<Rule, T> groups(t, grad, args);
  if (t.strip_rows == 0) return run_tile(groups, item, counts);
  if (args.phase != Phase::whole) return;
  // Points are kept for whole groups: tiles of these in turn, instead of rows.
  const int64_t step = t.by_columns[0].divisor / t.layout.r2;
  int32_t total[2] = {}, found[2] = {};
  for (int64_t begin = item.begin / t.strip_rows * step; begin < t.layout.g2; begin += strips_of(t) * step) {
    run_tile(groups, {begin, int32_t(std::min(step, t.layout.g2 - begin)), item.tensor}, counts ? found : nullptr);
    for (int m : {0, 1}) total[m] += found[m];
  }
  if (counts != nullptr) counts[0] = total[0], counts[1] = total[1];
}

BREGMAN_END
