// One line per rule: functor, name in Python. Everything else (ids, instantiations, dispatch) derives from this list.
#pragma once

#include "rules/adabreg.h"
#include "rules/averaged_proxsgd.h"
#include "rules/half_space.h"
#include "rules/linbreg.h"
#include "rules/linbreg_momentum.h"
#include "rules/proxadam.h"
#include "rules/proxadam_amsgrad.h"
#include "rules/proxsgd.h"
#include "rules/proxsgd_momentum.h"
#include "rules/ramda.h"
#include "rules/ramda_point.h"
#include "rules/rmda.h"
#include "rules/rmda_point.h"
#include "rules/splitlbi.h"
#include "rules/splitlbi_momentum.h"

#define BREGMAN_RULES(X)                  \
  X(LinBreg, linbreg)                     \
  X(LinBregMomentum, linbreg_momentum)    \
  X(AdaBreg, adabreg)                     \
  X(ProxSGD, proxsgd)                     \
  X(ProxSGDMomentum, proxsgd_momentum)    \
  X(AveragedProxSGD, averaged_proxsgd)    \
  X(ProxAdam, proxadam)                   \
  X(ProxAdamAMSGrad, proxadam_amsgrad)    \
  X(RMDA, rmda)                           \
  X(RMDAPoint, rmda_point)                \
  X(RAMDA, ramda)                         \
  X(RAMDAPoint, ramda_point)              \
  X(SplitLBI, splitlbi)                   \
  X(SplitLBIMomentum, splitlbi_momentum)  \
  X(HalfSpace, half_space)

BREGMAN_BEGIN

enum RuleId : int {
#define X(Functor, name) rule_##name,
  BREGMAN_RULES(X)
#undef X
};

BREGMAN_END
