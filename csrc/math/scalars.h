// Everything of a step that is the same for all elements, in the compute type.
#pragma once

#include "penalty.h"

BREGMAN_BEGIN

template <class Rule, class C>
struct Scalars {
  using Hyper = typename Rule::template Hyper<C>;
  C grad_scale;
  Hyper h;
  Penalty<C> elementwise, radial;

  template <class Args>  // a StepArgs
  static Scalars from(const Args& args) {
    constexpr int n = sizeof(Hyper) / sizeof(C);
    C values[n];
    for (int i = 0; i < n; ++i) values[i] = C(args.scalars[1 + i]);
    const double* k = args.scalars + 1 + n;
    Scalars s{C(args.scalars[0]), {}, {args.elementwise, C(k[0]), C(k[1])}, {args.radial, C(k[2]), C(k[3])}};
    __builtin_memcpy(&s.h, values, sizeof(values));
    return s;
  }
};

BREGMAN_END
