// Groups whose points are kept in a buffer: with elementwise penalties other than none and L1, in a diagonal metric,
// and for half-space steps.
#pragma once

#include "group_prox.h"

BREGMAN_BEGIN

// Groups of one tensor, tile by tile.
template <class T>
struct PointGroups : TileOf<T> {
  using C = compute_t<T>;
  using Base = TileOf<T>;
  using Base::row, Base::rows, Base::scratch, Base::step, Base::stored, Base::t;
  const Phase phase;
  double* const values;  // where the sums of half-space steps with budgets lie
  const Sharing* const sharing;

  PointGroups(const PlanView& plan, const Item& item, const void* grad, const Step<C>& step, Phase phase)
      : Base(plan.records()[item.tensor], grad, step), phase(phase), values(plan.numbers(t)),
        sharing(plan.sharing() + item.tensor) {}

  // The half-space step: in phases, if there is a budget, of which the first leaves sums.
  void project(BufferedGroups<C>& groups, int64_t first, int64_t count, bool straight, const Line<C>& line) const {
    double* const left = values + kBudgetSums<HalfSpace> * first;
    C* const pulls = groups.found();
    if (phase == Phase::scale) {
      for (int64_t g = 0; g < count; ++g)
        pulls[g] = envelope_pull(left + 2 * g, sharing->decay, sharing->eta, step.lr, step.epsilon);
      return;
    }
    groups.sum_half_spaces([&](int64_t g, const Sums& sums) {
      if (phase == Phase::norms) left[2 * g] = sums.a, left[2 * g + 1] = sums.b;
      else pulls[g] = half_space_pull(sums, half_space_rate(square_root(sums.a), straight, line, step.radial, C(t.weight)),
                                      step.lr, step.epsilon);
    });
  }

  int32_t run(int64_t base, int64_t first, int64_t count, int32_t* alive) const {
    const int64_t columns = count * row, elements = rows * columns;
    C* z = scratch.template get<C>(4, elements);
    C* scales = step.rule.paired() ? scratch.template get<C>(5, elements) : z;
    BufferedGroups<C> groups(scratch, z, scales, rows, row, count);
    Line<C> line{};
    bool straight = false;
    if (step.rule.paired()) straight = line_of(step.radial, C(t.weight), step.rule.metric, line);
    C* squares = step.rule.metric && straight ? groups.squares() : nullptr;
    const auto make = phase == Phase::scale ? step.rule.repeat_points
                      : squares             ? step.rule.advance_squares
                                            : step.rule.advance_points;
    if (groups.folds && squares) {
      const int64_t whole = columns / groups.columns, rest = whole * groups.columns;
      make_any(stored, base, {1, whole, 0, groups.columns}, groups.columns, step, make, z, scales, squares);
      if (rest < columns)
        make_any(stored, base + rest, {1, 1, 0, 0}, columns - rest, step, make, z + rest, scales + rest, squares);
    } else {
      make_any(stored, base, this->all_rows(), columns, step, make, z, scales, squares);
    }
    if (step.elementwise.kind != 0) prox_buffer<C>(z, scales, elements, step);
    if (step.rule.metric) {
      const int64_t level = std::min(rows, this->inner);
      if (straight) groups.shrink_in_metric(line, {stored, base + columns, level, columns, this->row_stride});
      else groups.shrink_along(step.radial, C(t.weight));
    } else if (step.rule.half_space) {
      project(groups, first, count, straight, line);
      if (phase == Phase::norms) return 0;
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
  int32_t run_long(int64_t base, int64_t first, int64_t count, int32_t* alive) const {
    int32_t nonzeros = 0;
    for (int64_t m = 0; m < count; ++m) nonzeros += run(base + m * row, first + m, 1, alive);
    return nonzeros;
  }
  int32_t run_columns(int64_t base, int64_t first, int64_t count, int32_t* alive) const {
    return run(base, first, count, alive);
  }
};

template <class T>
void run_points(const PlanView& plan, const Item& item, const void* grad, const Step<compute_t<T>>& step, Phase phase,
                int32_t* counts) {
  const TensorRecord& t = plan.records()[item.tensor];
  const PointGroups<T> groups(plan, item, grad, step, phase);
  if (phase == Phase::norms) note_decay(plan, item, compute_t<T>(1), step.radial);
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
