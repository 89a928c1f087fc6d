// The visits of a step, and between those of groups that share a budget its shares (math/envelope.h).
#pragma once

#include <vector>

#include "../math/envelope.h"
#include "../plan/step_args.h"

namespace bregman {

// Finds how far the shares of the groups rise, from the sums that each of them left. Pieces of a fixed size, added up in
// their order: threads make no difference.
template <bool kHalfSpace, class Share>
void share_budget(const PlanView& plan, const Budget& budget, Share share) {
  constexpr int64_t kPiece = 16384;
  struct Piece {
    const double* squares;
    double* slopes;  // kept, as each turn would take square roots again
    double decay;
    int64_t count;
  };
  std::vector<Piece> pieces;
  int64_t groups = 0;
  for (int32_t tensor = budget.first_tensor; tensor < budget.end_tensor; ++tensor) {
    const TensorRecord& record = plan.records()[tensor];
    if (record.numel == 0) continue;
    const double *squares = plan.group_numbers(record), decay = plan.sharing()[tensor].decay;
    const int64_t size = record.layout.groups();
    for (int64_t g = 0; g < size; g += kPiece)
      pieces.push_back({squares + g, plan.group_slopes(record) + g, decay, std::min(kPiece, size - g)});
    groups += size;
  }
  const auto each_piece = [&](auto f) {
    const auto one = [&](int64_t i) { f(i, pieces[size_t(i)]); };
    if (groups > kPiece) return share(int64_t(pieces.size()), one);
    for (int64_t i = 0; i < int64_t(pieces.size()); ++i) one(i);  // waking threads would take longer
  };
  each_piece([](int64_t, const Piece& piece) {
    for (int64_t g = 0; g < piece.count; ++g) piece.slopes[g] = rise_of<kHalfSpace>(piece.squares[g], piece.decay).slope;
  });
  const double eta = envelope_root(double(budget.k), [&](auto total, auto f) {
    std::vector<decltype(total)> sums(pieces.size(), total);
    each_piece([&](int64_t i, const Piece& piece) {
      auto sum = total;
      for (int64_t g = 0; g < piece.count; ++g) sum = plus(sum, f(rise_from<kHalfSpace>(piece.slopes[g], piece.decay)));
      sums[size_t(i)] = sum;
    });
    for (const auto& sum : sums) total = plus(total, sum);
    return total;
  });
  for (int32_t tensor = budget.first_tensor; tensor < budget.end_tensor; ++tensor) plan.sharing()[tensor].eta = eta;
}

// Where strips end that take all their visits before the next do: `least` of them or more, of whole tensors.
inline int64_t end_of_strips(const PlanView& plan, int64_t begin, int64_t least) {
  const Item* items = plan.items();
  int64_t end = begin + 1;
  while (end < plan.header().items && (end - begin < least || items[end].tensor == items[end - 1].tensor)) ++end;
  return end;
}

// visit(phase, begin, end) takes items, all at once and of about one size; share(count, f) calls f(i) for all i below count.
// So many strips, or more, take all their visits before the next ones do.
template <class Visit, class Share>
void all_visits(const PlanView& plan, bool counting, int64_t together, Visit visit, Share share) {
  const PlanHeader& header = plan.header();
  int64_t begin = header.items - header.strips;
  if (header.budgets) {
    visit(Phase::norms, 0, header.items);
    if (header.strips) visit(Phase::sum_strips, begin, header.items);
    share(header.budgets, [&](int64_t i) {  // several budgets at once, one by all threads
      (header.group_sums == 2 ? share_budget<true, Share> : share_budget<false, Share>)(plan, plan.budgets()[i], share);
    });
    visit(Phase::scale, 0, header.items);
    if (header.strips && counting) visit(Phase::count_strips, begin, header.items);
    return;
  }
  if (begin > 0) visit(Phase::whole, 0, begin);
  for (int64_t end = begin; begin < header.items; begin = end) {
    end = end_of_strips(plan, begin, together);
    for (Phase phase : {Phase::whole, Phase::sum_strips, Phase::finish_strips}) visit(phase, begin, end);
    if (counting) visit(Phase::count_strips, begin, end);
  }
}

}  // namespace bregman
