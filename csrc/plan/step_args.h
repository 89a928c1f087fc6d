// The scalars of a step as they come from the binding.
#pragma once

#include "plan.h"

namespace bregman {

struct StepArgs {
  int elementwise, radial;  // penalty ids
  const double* scalars;    // skip, grad_scale, the rule's Hyper, two parameters of each penalty
  bool on_device;           // they lie in the memory of the tensors' device: a captured graph reads them anew
};

}  // namespace bregman
