// The scalars of a step as they come from the binding.
#pragma once

#include "plan.h"

namespace bregman {

// Groups that share a budget (math/envelope.h) take a step in two visits, with the shares worked out between them. So do
// strips, with the sums of all strips of a tensor left in the plan.
enum class Phase : int32_t {
  whole,  // of strips: advance the state, and leave the sums
  norms,  // advance the state, and leave the squared norm of each group in the plan
  scale,  // finish with the factor that stands there instead
  sum_strips,  // turn the sums into the factor of each group
  finish_strips,
  count_strips,  // non-zero groups, once all strips are there
};

struct StepArgs {
  int elementwise, radial;  // penalty ids
  const double* scalars;    // skip, grad_scale, the rule's Hyper, two parameters of each penalty
  bool on_device;           // they lie in the memory of the tensors' device: a captured graph reads them anew
  Phase phase = Phase::whole;
};

}  // namespace bregman
