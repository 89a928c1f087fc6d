// Minimax concave penalty: slope lam - |x| / gamma up to |x| = gamma lam, constant beyond.
#pragma once

#include "../penalty.h"

BREGMAN_BEGIN

struct MCP {
  static constexpr const char* kParameterNames = "lam gamma";

  template <class C>
  BREGMAN_HD static C prox(C x, C scale, const Penalty<C>& k) {
    C a = absolute(x), threshold = scale * k.a, flat = k.a * k.b, slack = k.b - scale;
    // slack <= 0: the objective is concave below `flat`, so that its minimum is 0 or x, equally good at
    // lam sqrt(gamma scale).
    bool convex = slack > C(0);
    C ratio = select(convex, k.b, threshold) / select(convex, slack, a);  // one division serves both
    C shrunk = select(convex, (x - clamp(x, -threshold, threshold)) * ratio, C(0));
    C end = select(convex, flat, flat * ratio);
    return select(a <= end, shrunk, x);  // NaN stays
  }

  // Up to the knee, where the slope ends at 0.
  template <class C>
  BREGMAN_HD static Line<C> line(const Penalty<C>& k) {
    return {k.a, C(1) / k.b};
  }

  template <class C>
  BREGMAN_HD static Curve curve(const Penalty<C>& k, double t) {
    const double lam = double(k.a), slope = 1 / double(k.b), end = double(k.b) * lam, pull = lam / t;
    const bool flat = pull <= slope;
    const double reach = t < end ? t : end;
    return {lam * reach - 0.5 * slope * (reach * reach), flat ? 0 : pull - slope, flat ? 0 : pull};
  }
  template <class C>
  BREGMAN_HD static double middle(const Penalty<C>& k) {
    return 0.5 * (double(k.b) * double(k.a));
  }
};

BREGMAN_END
