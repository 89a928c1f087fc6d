// One line per scalar penalty: functor, name in Python. `none` stays first: id 0 means that nothing is applied.
#pragma once

#include "penalties/elastic_net.h"
#include "penalties/l0.h"
#include "penalties/l1.h"
#include "penalties/l_half.h"
#include "penalties/l_two_thirds.h"
#include "penalties/mcp.h"
#include "penalties/none.h"
#include "penalties/nonneg_l1.h"
#include "penalties/scad.h"

#define BREGMAN_PENALTIES(X)    \
  X(NoPenalty, none)            \
  X(L1, l1)                     \
  X(NonnegL1, nonneg_l1)        \
  X(ElasticNet, elastic_net)    \
  X(L0, l0)                     \
  X(LHalf, l_half)              \
  X(LTwoThirds, l_two_thirds)   \
  X(MCP, mcp)                   \
  X(SCAD, scad)

BREGMAN_BEGIN

enum class PenaltyKind : int {
#define X(Functor, name) name,
  BREGMAN_PENALTIES(X)
#undef X
};

inline bool is_homogeneous(int kind) {
  switch (PenaltyKind(kind)) {
#define X(Functor, name) \
  case PenaltyKind::name: \
    return kHomogeneous<Functor>;
    BREGMAN_PENALTIES(X)
#undef X
  }
  return false;
}

// The prox chosen at run time: uniform over a CUDA launch, once per group on the CPU. kBelowNorms: among the penalties
// that may stand there.
template <bool kBelowNorms = false, class C>
BREGMAN_HD C prox(C x, C scale, Penalty<C> k) {
  scale = varying(scale, x);
  k.a = varying(k.a, x);
  k.b = varying(k.b, x);
  switch (PenaltyKind(k.kind)) {
#define X(Functor, name) \
  case PenaltyKind::name: \
    if constexpr (!kBelowNorms || kHomogeneous<Functor>) return Functor::template prox<C>(x, scale, k); \
    break;
    BREGMAN_PENALTIES(X)
#undef X
  }
  return x;
}

BREGMAN_END
