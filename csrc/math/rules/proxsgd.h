// Proximal SGD: p <- prox(p - lr g) with scale lr.
#pragma once

#include "../point.h"

BREGMAN_BEGIN

struct ProxSGD : Rule {
  static constexpr int kStateSlots = 0;
  static constexpr bool kReadsParam = true;
  static constexpr const char* kSlotNames = "";
  static constexpr const char* kHyperNames = "lr";
  template <class C>
  struct Hyper {
    C lr;
  };

  template <class C>
  BREGMAN_HD static void update(C, C, C*, const Hyper<C>&) {}

  template <class C>
  BREGMAN_HD static Point<C> point(C grad, C param, const C*, const Hyper<C>& h) {
    return {param - grad * h.lr, h.lr};
  }

  template <class C>
  BREGMAN_HD static C finish(C q, C, const C*, const Hyper<C>&) {
    return q;
  }
};

BREGMAN_END
