// What the torch modules share: the schema, the checks at the border, and a plan from tensors. LibTorch stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <tuple>
#include <vector>

#include "../math/penalty_list.h"
#include "../math/rule_list.h"
#include "../plan/step_args.h"

namespace bregman {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Every op passes torch.library.opcheck, which shapes them. It compares what a call and its traced copy return, and
// knows no str: text is its bytes. It copies the tensors: a plan is made of `addresses` (of params, state and masks)
// and of the tensors' layouts alone. An op that changes tensors may not return a number: `step` leaves in `odd` the
// index of a gradient whose memory layout differs from its parameter's (nothing was changed then), or -1.
//
// `step` writes parameters and state through the addresses in the plan, as naming them would cost a list entry each at
// every step. In its schema the plan's copy on the device stands for them; it is itself written where groups share
// budgets, and on the CPU where large tensors are visited in strips. Compiled steps call `fused_step_`
// (bregman_cuda/optim/_traced.py), which names them all.
//
// The scalars are numbers, or, when these are none, the float64 tensor `live` on the parameters' device, which kernels
// read when they run: in a captured graph, at every replay.
#define BREGMAN_SCHEMA(m)                                                                                          \
  m.def("describe() -> int[]");                                                                                    \
  m.def("why_not(int[] sizes, int[] strides, int group_dims) -> int[]");                                           \
  m.def(                                                                                                           \
      "plan(Tensor[] params, Tensor[] state, Tensor[] masks, int[] addresses, int[] group_dims, float[] weights, " \
      "int[] budgets, int rule) -> (Tensor plan, Tensor item_tensor)");                                            \
  m.def(                                                                                                           \
      "step(Tensor plan, Tensor(a!) device_plan, Tensor[] grads, Tensor(b!) odd, Tensor(c!) counts, int[] kinds, " \
      "float[] scalars, Tensor live) -> ()")

using Text = std::vector<int64_t>;

// What runs, then one line per rule and penalty, from the lists: Python resolves names with it.
inline Text describe(const std::string& isa) {
  std::string text = "isa;" + isa + "\n";
#define X(Functor, name) \
  text += std::string("rule;" #name ";") + Functor::kSlotNames + ";" + Functor::kHyperNames + ";" + \
          (Functor::kMetric ? "metric" : "") + ";" + std::to_string(Functor::kFixedSlots) + "\n";
  BREGMAN_RULES(X)
#undef X
#define X(Functor, name) text += std::string("penalty;" #name ";") + Functor::kParameterNames + "\n";
  BREGMAN_PENALTIES(X)
#undef X
  return Text(text.begin(), text.end());
}

inline std::vector<int64_t> to_vector(torch::headeronly::IntHeaderOnlyArrayRef ref) {
  return std::vector<int64_t>(ref.begin(), ref.end());
}

inline Text why_not(const std::vector<int64_t> sizes, const std::vector<int64_t> strides, int64_t group_dims) {
  std::string why = why_not_dense(sizes, strides);
  GroupLayout layout;
  const bool empty = std::count(sizes.begin(), sizes.end(), 0) > 0;
  if (why.empty() && !empty && group_dims >= 0) why = collapse(sizes, strides, group_dims, layout);
  return Text(why.begin(), why.end());
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::fp16;
    default: break;
  }
  STD_TORCH_CHECK(false, "parameters must be float32, float64, bfloat16 or float16");
  return DType::f32;
}

// What a plan depends on of a rule.
struct RuleTraits {
  size_t slots;  // state tensors, a 16-bit parameter's master included
  bool reads_param, paired;
  int group_sums;  // 0: it knows no budgets, nor strips
};

inline RuleTraits rule_traits(int64_t rule, bool sixteen_bits) {
  int64_t id = 0;
#define X(Functor, name) \
  if (rule == id++) \
    return {Functor::kStateSlots + size_t(Functor::kReadsParam && sixteen_bits), Functor::kReadsParam, kPaired<Functor>, \
            kGroupSums<Functor>};
  BREGMAN_RULES(X)
#undef X
  STD_TORCH_CHECK(false, "rule ", rule, " is not one of the ", id, " compiled rules");
  return {};
}

// The plan, and the tensor that each of its items belongs to.
using Plan = std::tuple<Tensor, Tensor>;

inline Plan plan_tensors(const Tensors& params, const Tensors& state, const Tensors& masks,
                         const std::vector<int64_t>& addresses, const std::vector<int64_t>& group_dims,
                         const std::vector<double>& weights, const std::vector<int64_t>& budgets, int64_t rule,
                         const Tuning& tuning) {
  const size_t n = params.size();
  STD_TORCH_CHECK(n > 0, "a plan needs at least one tensor");
  const DType dtype = dtype_of(params[0]);
  const bool sixteen = dtype == DType::bf16 || dtype == DType::fp16;
  const RuleTraits traits = rule_traits(rule, sixteen);
  const size_t slots = traits.slots;
  STD_TORCH_CHECK(state.size() == n * slots, "expected ", n * slots, " state tensors (", slots, " for each of ", n,
                  " parameters), got ", state.size());
  STD_TORCH_CHECK(masks.size() == n && group_dims.size() == n && weights.size() == n && budgets.size() == n, "expected ",
                  n, " masks, group_dims, weights and budgets, got ", masks.size(), ", ", group_dims.size(), ", ",
                  weights.size(), " and ", budgets.size());
  STD_TORCH_CHECK(addresses.size() == n * (2 + slots), "expected ", n * (2 + slots), " addresses, got ",
                  addresses.size());
  auto address = [&](size_t i) { return reinterpret_cast<void*>(addresses[i]); };
  const ScalarType wide = dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  std::vector<TensorSpec> specs;
  for (size_t i = 0; i < n; ++i) {
    const Tensor& p = params[i];
    STD_TORCH_CHECK(dtype_of(p) == dtype, "params[", i, "] has another dtype than params[0]");
    TensorSpec spec{address(i), {}, nullptr, to_vector(p.sizes()), to_vector(p.strides()), group_dims[i], weights[i],
                    budgets[i]};
    for (size_t k = 0; k < slots; ++k) {
      const Tensor& s = state[i * slots + k];
      STD_TORCH_CHECK(s.scalar_type() == wide, "state ", k, " of params[", i, "] must be ",
                      dtype == DType::f64 ? "float64" : "float32");
      STD_TORCH_CHECK(to_vector(s.sizes()) == spec.sizes && (p.numel() == 0 || to_vector(s.strides()) == spec.strides),
                      "state ", k, " of params[", i, "] differs from it in shape or strides");
      spec.state.push_back(address(n + i * slots + k));
    }
    if (masks[i].numel()) {
      STD_TORCH_CHECK(masks[i].numel() == ceil_div(p.numel(), 64) * 8, "the packed mask of params[", i, "] has ",
                      masks[i].numel(), " bytes, expected ", ceil_div(p.numel(), 64) * 8);
      spec.mask = address(n * (1 + slots) + i);
    }
    specs.push_back(std::move(spec));
  }
  STD_TORCH_CHECK(traits.group_sums || std::all_of(budgets.begin(), budgets.end(), [](int64_t k) { return k == 0; }),
                  "rule ", rule, " knows no shared budgets");
  std::vector<char> plan;
  try {
    plan = make_plan(specs, int(rule), dtype, int(slots), tuning, traits.group_sums);
  } catch (const std::invalid_argument& error) {
    STD_TORCH_CHECK(false, error.what());
  }
  Tensor blob = torch::stable::empty({int64_t(plan.size())}, ScalarType::Byte);
  std::memcpy(blob.data_ptr(), plan.data(), plan.size());
  const PlanView view{plan.data()};
  Tensor item_tensor = torch::stable::empty({view.header().items}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(item_tensor.data_ptr());
  for (int64_t i = 0; i < view.header().items; ++i) out[i] = view.items()[i].tensor;
  return {blob, item_tensor};
}

// Fills `pointers` with the gradients' addresses and `odd`; whether the step can go on.
inline bool check_grads(const PlanView& plan, const Tensors& grads, const Tensor& odd_tensor,
                        std::vector<const void*>& pointers) {
  STD_TORCH_CHECK(odd_tensor.is_cpu() && odd_tensor.scalar_type() == ScalarType::Long && odd_tensor.numel() == 1,
                  "odd must be one int64 on the CPU");
  int64_t& odd = *static_cast<int64_t*>(odd_tensor.data_ptr());
  const PlanHeader& header = plan.header();
  STD_TORCH_CHECK(int64_t(grads.size()) == header.tensors, "expected ", header.tensors, " gradients, got ", grads.size());
  pointers.resize(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& g = grads[i];
    const int64_t* shape = plan.shape(int64_t(i));
    const int64_t ndim = shape[0];
    auto sizes = g.sizes(), strides = g.strides();
    STD_TORCH_CHECK(int64_t(sizes.size()) == ndim && std::equal(sizes.begin(), sizes.end(), shape + 1), "grads[", i,
                    "] differs in shape from its parameter");
    STD_TORCH_CHECK(int32_t(dtype_of(g)) == header.dtype, "grads[", i, "] differs in dtype from its parameter");
    for (int64_t d = 0; d < ndim; ++d)
      if (shape[1 + d] > 1 && strides[d] != shape[1 + ndim + d] && plan.records()[i].numel) {
        odd = int64_t(i);
        return false;
      }
    pointers[i] = g.data_ptr();
  }
  odd = -1;
  return true;
}

inline StepArgs check_step(const PlanView& plan, const Tensor& counts, const std::vector<int64_t>& kinds,
                           const std::vector<double>& scalars, const Tensor& live) {
  size_t hypers = 0;
  bool half_space = false;
  int64_t id = 0;
#define X(Functor, name) \
  if (plan.header().rule == id++) \
    hypers = sizeof(Functor::Hyper<double>) / sizeof(double), half_space = Functor::kHalfSpace;
  BREGMAN_RULES(X)
#undef X
  const size_t wanted = 2 + hypers + 4;
  STD_TORCH_CHECK(kinds.size() == 3 && kinds[0] == plan.header().rule, "kinds must be [rule, elementwise, radial], with "
                  "the plan's rule ", plan.header().rule);
  const bool alone = half_space || plan.header().budgets;
  STD_TORCH_CHECK(kinds[1] == int(PenaltyKind::none) ||
                      !(alone || (plan.header().grouped && !is_homogeneous(int(kinds[1])))),
                  alone ? "half-space steps and budgets take no penalty on elements"
                        : "below group norms stand penalties with phi(t x) = t phi(x) only",
                  ", got kind ", kinds[1]);
  STD_TORCH_CHECK(scalars.size() == wanted || (scalars.empty() && size_t(live.numel()) == wanted &&
                                               live.scalar_type() == ScalarType::Double && live.is_contiguous()),
                  "expected ", wanted, " scalars, as numbers or as a float64 tensor, got ", scalars.size(), " and ",
                  live.numel());
  STD_TORCH_CHECK(counts.numel() == 0 || (counts.numel() == 2 * plan.header().items &&
                                          counts.scalar_type() == ScalarType::Int && counts.is_contiguous()),
                  "counts must be empty or int32 of shape (", plan.header().items, ", 2)");
  const double* values = scalars.empty() ? static_cast<const double*>(live.data_ptr()) : scalars.data();
  return {int(kinds[1]), int(kinds[2]), values, scalars.empty()};
}

}  // namespace bregman
