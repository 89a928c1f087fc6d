// The visits of a step, and between those of groups that share a budget its shares (math/envelope.h).
#pragma once

#include "../math/envelope.h"
#include "../plan/step_args.h"

namespace bregman {

// Turns the groups' squared norms into the factors that the budget leaves them.
inline void share_budget(const PlanView& plan, const Budget& budget) {
  auto for_groups = [&](auto f) {
    for (int32_t tensor = budget.first_tensor; tensor < budget.end_tensor; ++tensor) {
      const TensorRecord& record = plan.records()[tensor];
      const int64_t groups = record.numel == 0 ? 0 : record.layout.groups();
      for (int64_t g = 0; g < groups; ++g) f(plan.numbers(record)[g], plan.decays()[tensor]);
    }
  };
  for_groups([](double& value, double) { value = square_root(value); });
  const double eta = envelope_root(double(budget.k), [&](auto none, auto f) {
    for_groups([&](double& value, double decay) { none = plus(none, f(value, decay)); });
    return none;
  });
  for_groups([&](double& value, double decay) { value = envelope_factor(value, decay, share(value, decay, eta)); });
}

// visit(phase, begin, end) takes items, all at once and of about one size; share(count, f) calls f(i) for all i below count.
template <class Visit, class Share>
void all_visits(const PlanView& plan, bool counting, Visit visit, Share share) {
  const PlanHeader& header = plan.header();
  if (header.budgets) {
    visit(Phase::norms, 0, header.items);
    share(header.budgets, [&](int64_t i) { share_budget(plan, plan.budgets()[i]); });
    visit(Phase::scale, 0, header.items);
    return;
  }
  const int64_t strips = header.items - header.strips;
  if (strips > 0) visit(Phase::whole, 0, strips);
  if (strips == header.items) return;
  for (Phase phase : {Phase::whole, Phase::sum_strips, Phase::finish_strips}) visit(phase, strips, header.items);
  if (counting) visit(Phase::count_strips, strips, header.items);
}

}  // namespace bregman
