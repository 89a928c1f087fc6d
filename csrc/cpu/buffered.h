// Groups whose points are kept in a buffer: with elementwise penalties other than none and L1, and in a diagonal metric.
#pragma once

#include "group_prox.h"

BREGMAN_BEGIN

// Groups of one tensor, tile by tile.
template <class T>
struct PointGroups : TileOf<T> {
  using C = compute_t<T>;
  using Base = TileOf<T>;
  using Base::row, Base::rows, Base::scratch, Base::step, Base::stored, Base::t;

  PointGroups(const TensorRecord& record, const void* grad, const Step<C>& step) : Base(record, grad, step) {}

  int32_t run(int64_t base, int64_t count, int32_t* alive) const {
    const int64_t columns = count * row, elements = rows * columns;
    C* z = scratch.template get<C>(4, elements);
    C* scales = step.rule.metric ? scratch.template get<C>(5, elements) : z;
    BufferedGroups<C> groups(scratch, z, scales, rows, row, count);
    Line<C> line{};
    const bool straight = step.rule.metric && line_of(step.radial, C(t.weight), true, line);
    C* squares = straight ? groups.squares() : nullptr;
    if (groups.folds && squares) {
      const int64_t whole = columns / groups.columns, rest = whole * groups.columns;
      advance_any(stored, base, {1, whole, 0, groups.columns}, groups.columns, step, z, scales, squares);
      if (rest < columns)
        advance_any(stored, base + rest, {1, 1, 0, 0}, columns - rest, step, z + rest, scales + rest, squares);
    } else {
      advance_any(stored, base, this->all_rows(), columns, step, z, scales, squares);
    }
    if (step.elementwise.kind != 0) prox_buffer<C>(z, scales, elements, step);
    if (step.rule.metric) {
      const int64_t level = std::min(rows, this->inner);
      if (straight) groups.shrink_in_metric(line, {stored, base + columns, level, columns, this->row_stride});
      else groups.shrink_along(step.radial, C(t.weight));
    } else {
      groups.shrink(step.scale * C(t.weight), step.radial);
    }
    const C* numbers = groups.numbers();
    const int64_t width = groups.folds ? kBuffer : columns;
    int32_t nonzeros = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < columns; j += width) {
        const int64_t begin = this->offset(base, r) + j, i = r * columns + j;
        nonzeros += finish_any(stored, begin, std::min(width, columns - j), step, z + i, scales + i, numbers);
      }
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

template <class T>
void run_points(const PlanView& plan, const Item& item, const void* grad, const Step<compute_t<T>>& step, Phase phase,
                int32_t* counts) {
  const TensorRecord& t = plan.records()[item.tensor];
  const PointGroups<T> groups(t, grad, step);
  if (t.strip_rows == 0) return run_tile(groups, item, counts);
  if (phase != Phase::whole) return;
  // Points are kept for whole groups: tiles of these in turn, instead of rows.
  const int64_t width = t.by_columns[0].divisor / t.layout.r2;
  int32_t total[2] = {}, found[2] = {};
  for (int64_t begin = item.begin / t.strip_rows * width; begin < t.layout.g2; begin += strips_of(t) * width) {
    run_tile(groups, {begin, int32_t(std::min(width, t.layout.g2 - begin)), item.tensor}, counts ? found : nullptr);
    for (int m : {0, 1}) total[m] += found[m];
  }
  if (counts != nullptr) counts[0] = total[0], counts[1] = total[1];
}

BREGMAN_END
