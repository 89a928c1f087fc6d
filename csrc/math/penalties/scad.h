// Smoothly clipped absolute deviation: slope lam up to |x| = lam, falling to 0 at |x| = a lam, constant beyond.
#pragma once

#include "../penalty.h"

BREGMAN_BEGIN

struct SCAD {
  static constexpr const char* kParameterNames = "lam a";

  template <class C>
  BREGMAN_HD static C prox(C x, C scale, const Penalty<C>& k) {
    C a = absolute(x), threshold = scale * k.a, slack = (k.b - C(1)) - scale, both = k.b + C(1);
    bool convex = slack > C(0);
    C soft = x - clamp(x, -threshold, threshold);
    C beyond = soft - clamp(soft, -k.a, k.a);  // past the part of slope lam
    C ratio = select(convex, scale, threshold) / select(convex, slack, a);  // one division serves both
    C shrunk = soft + select(convex, beyond * ratio, C(0));
    // slack <= 0: the falling part is concave, so that the minimum is the soft threshold or x. The two are equally good
    // at lam (a + 1 + scale) / 2, or at lam sqrt(scale (a + 1)) where the soft threshold is 0 there.
    C end = select(scale < both, C(0.5) * (k.a * (both + scale)), k.a * both * ratio);
    end = select(convex, k.a * k.b, end);
    return select(a <= end, shrunk, x);  // NaN stays
  }

  template <class C>
  BREGMAN_HD static Curve curve(const Penalty<C>& k, double t) {
    const double lam = double(k.a), slope = 1 / (double(k.b) - 1), end = double(k.b) * lam;
    const bool near = t <= lam;
    const double pull = (near ? lam : end * slope) / t, falling = near ? 0 : slope;
    const bool flat = pull <= falling;
    const double reach = t < end ? t : end, past = near ? 0 : reach - lam;
    return {lam * reach - 0.5 * slope * (past * past), flat ? 0 : pull - falling, flat ? 0 : pull};
  }
  template <class C>
  BREGMAN_HD static double middle(const Penalty<C>& k) {
    return 0.5 * ((double(k.b) + 1) * double(k.a));
  }
};

BREGMAN_END
