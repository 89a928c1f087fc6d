// The visits of a step, and between those of groups that share a budget its shares (math/envelope.h).
#pragma once

#include "../math/envelope.h"
#include "../plan/step_args.h"

namespace bregman {

// Finds how far the shares of the groups rise, from the sums that each of them left.
template <bool kHalfSpace>
void share_budget(const PlanView& plan, const Budget& budget) {
  const double eta = envelope_root(double(budget.k), [&](auto sum, auto f) {
    for (int32_t tensor = budget.first_tensor; tensor < budget.end_tensor; ++tensor) {
      const TensorRecord& record = plan.records()[tensor];
      const int64_t groups = record.numel == 0 ? 0 : record.layout.groups();
      const double* squares = plan.group_numbers(record);
      const double decay = plan.sharing()[tensor].decay;
      for (int64_t g = 0; g < groups; ++g) sum = plus(sum, f(rise_of<kHalfSpace>(squares[g], decay)));
    }
    return sum;
  });
  for (int32_t tensor = budget.first_tensor; tensor < budget.end_tensor; ++tensor) plan.sharing()[tensor].eta = eta;
}

// Where strips end that take all their visits before the next do: `least` of them or more, of whole tensors.
inline int64_t end_of_strips(const PlanView& plan, int64_t begin, int64_t least) {
  const Item* items = plan.items();
  int64_t end = begin + 1;
  while (end < plan.header().items && (end - begin < least || items[end].tensor == items[end - 1].tensor)) ++end;
  return end;
}

// visit(phase, begin, end) takes items, all at once and of about one size; share(count, f) calls f(i) for all i below count.
// So many strips, or more, take all their visits before the next ones do.
template <class Visit, class Share>
void all_visits(const PlanView& plan, bool counting, int64_t together, Visit visit, Share share) {
  const PlanHeader& header = plan.header();
  int64_t begin = header.items - header.strips;
  if (header.budgets) {
    visit(Phase::norms, 0, header.items);
    if (header.strips) visit(Phase::sum_strips, begin, header.items);
    share(header.budgets, [&](int64_t i) {
      (header.group_sums == 2 ? share_budget<true> : share_budget<false>)(plan, plan.budgets()[i]);
    });
    visit(Phase::scale, 0, header.items);
    if (header.strips && counting) visit(Phase::count_strips, begin, header.items);
    return;
  }
  if (begin > 0) visit(Phase::whole, 0, begin);
  for (int64_t end = begin; begin < header.items; begin = end) {
    end = end_of_strips(plan, begin, together);
    for (Phase phase : {Phase::whole, Phase::sum_strips, Phase::finish_strips}) visit(phase, begin, end);
    if (counting) visit(Phase::count_strips, begin, end);
  }
}

}  // namespace bregman
