// Between the two visits of groups that share a budget: the shares of one budget (math/envelope.h).
#pragma once

#include "../math/envelope.h"
#include "../plan/plan.h"

namespace bregman {

// Turns the groups' squared norms into the factors that the budget leaves them.
inline void share_budget(const PlanView& plan, const Budget& budget) {
  auto for_groups = [&](auto f) {
    for (int32_t tensor = budget.first_tensor; tensor < budget.end_tensor; ++tensor) {
      const TensorRecord& record = plan.records()[tensor];
      const int64_t groups = record.numel == 0 ? 0 : record.layout.groups();
      for (int64_t g = 0; g < groups; ++g) f(plan.groups(record)[g], plan.decays()[tensor]);
    }
  };
  for_groups([](double& value, double) { value = square_root(value); });
  const double eta = envelope_root(double(budget.k), [&](auto none, auto f) {
    for_groups([&](double& value, double decay) { none = plus(none, f(value, decay)); });
    return none;
  });
  for_groups([&](double& value, double decay) { value = envelope_factor(value, decay, share(value, decay, eta)); });
}

}  // namespace bregman
