// The scalars of a step as they come from the binding.
#pragma once

#include "plan.h"

namespace bregman {

struct StepArgs {
  int elementwise, radial;  // penalty ids
  const double* scalars;    // grad_scale, the rule's Hyper, two parameters of each penalty
};

}  // namespace bregman
