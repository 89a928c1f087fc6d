// Minimax concave penalty: slope lam - |x| / gamma up to |x| = gamma lam, constant beyond.
#pragma once

#include "../penalty.h"

BREGMAN_BEGIN

struct MCP {
  static constexpr const char* kParameterNames = "lam gamma";

  template <class C>
  BREGMAN_HD static C prox(C x, C scale, const Penalty<C>& k) {
    C a = absolute(x), threshold = scale * k.a, flat = k.a * k.b, slack = k.b - scale;
    // slack <= 0: the objective is concave below `flat`, and its minimum 0 or x: hard threshold at lam sqrt(gamma scale).
    bool convex = slack > C(0);
    C soft = x - clamp(x, -threshold, threshold);
    C shrunk = select(convex, soft * (k.b / slack), C(0));
    C end = select(convex, flat, flat * (threshold / a));
    return select(a <= end, shrunk, x);  // NaN stays
  }
};

BREGMAN_END
