// The walker for group penalties: a block takes a tile of neighbouring groups, in whatever way they lie in memory.
//
// A tile is a matrix of rows of contiguous columns (plan/groups.h). Where it fits, its pre-prox points stay in shared
// memory between the norms and the write, and memory is read and written once. Where it does not, the block walks it
// in panels twice: once for the norms, without writing, and once more for the step (the gradient and the state are
// then read twice). In a diagonal metric the prox scales are kept beside the points, and every step of the root
// (math/weighted.h) is one more reduction, over what is on chip where the tile fits.
#include "walker.cuh"

namespace bregman {

// What is summed over a group: the squares of its points, the sums of a step of the root (or of a curve), or those of a
// half-space step.
template <class Rule>
using sums_t = std::conditional_t<Rule::kMetric, Moments<double>, std::conditional_t<kPaired<Rule>, Sums, double>>;

__device__ __forceinline__ double plus(double x, double y) { return x + y; }
__device__ __forceinline__ Sums plus(Sums x, Sums y) { return {x.a + y.a, x.b + y.b}; }
template <class C>
__device__ __forceinline__ Moments<C> plus(Moments<C> x, Moments<C> y) { return {x.a + y.a, x.b + y.b, x.c + y.c}; }
__device__ __forceinline__ double from_lane(double x, int offset) { return __shfl_xor_sync(~0u, x, offset); }
__device__ __forceinline__ Sums from_lane(Sums x, int offset) { return {from_lane(x.a, offset), from_lane(x.b, offset)}; }
__device__ __forceinline__ Moments<double> from_lane(Moments<double> x, int offset) {
  return {from_lane(x.a, offset), from_lane(x.b, offset), from_lane(x.c, offset)};
}
// What a thread has added up, for others to go on with.
__device__ __forceinline__ void widen_sums(double x, double& sum) { sum = x; }
__device__ __forceinline__ void widen_sums(Sums x, Sums& sum) { sum = x; }
__device__ __forceinline__ void widen_sums(Sums x, Moments<double>& sum) { sum = {x.a, x.b, 0}; }
template <class C>
__device__ __forceinline__ void widen_sums(Moments<C> x, Moments<double>& sum) { sum = {double(x.a), double(x.b), double(x.c)}; }
template <class S, class X>
__device__ __forceinline__ S widened(X x) {
  S sum;
  widen_sums(x, sum);
  return sum;
}

// Per-group arrays, in front of the points in dynamic shared memory.
template <class Rule, class C>
struct GroupArrays {
  sums_t<Rule> partial[kThreads];
  sums_t<Rule> sum[kMaxGroups];
  double norm[Rule::kMetric ? kMaxGroups : 2];  // or rho, along a curve
  C factor[kMaxGroups];
  int alive[kMaxGroups];
  Search search[Rule::kMetric ? kMaxGroups : 16];
  int moved[2];  // whether a norm did in a pass: in turns, so that a thread may still read the last one's
  int unused[2];
};

// Where the elements of a tile lie. Indices within a tile fit 31 bits (make_plan refuses others), memory offsets do not.
struct TileGeometry {
  const TensorRecord& t;
  int64_t base, row_stride;
  int row, groups;  // row: elements of one group in a row of the tile
  bool one_row;
  Divider by_columns;

  __device__ __forceinline__ TileGeometry(const TensorRecord& record, const Item& item)
      : t(record), row_stride(t.layout.g2 * t.layout.r2), row(int(t.layout.r2)), groups(item.count),
        one_row(t.layout.rows() == 1) {
    const GroupLayout& g = t.layout;
    const int64_t slab = item.begin / g.g2;
    base = ((slab / g.g1) * g.r0 * g.g1 + slab % g.g1) * g.r1 * row_stride + (item.begin % g.g2) * g.r2;
    by_columns = t.by_columns[t.by_columns[0].divisor != unsigned(groups * g.r2)];
  }
  __device__ __forceinline__ int columns() const { return int(by_columns.divisor); }
  __device__ __forceinline__ int64_t elements() const { return t.layout.group_size() * groups; }
  // Whether every run of V elements from a multiple of V is contiguous and 16-byte aligned in memory.
  __device__ __forceinline__ bool vectors(int v) const {
    if (base % v) return false;
    return one_row || (columns() % v == 0 && row_stride % v == 0);
  }
  __device__ __forceinline__ int group_at(int column) const {
    return groups == 1 ? 0 : int(t.by_row.quotient(unsigned(column)));
  }
};

// A part of a tile that fits in shared memory.
struct Panel {
  int64_t start;
  int size, row, column;  // where it begins

  __device__ __forceinline__ Panel(const TileGeometry& tile, int64_t begin, int most)
      : start(begin), size(int(std::min<int64_t>(tile.elements() - begin, most))), row(0), column(0) {
    if (!tile.one_row && begin) {
      row = int(begin / tile.columns());
      column = int(begin % tile.columns());
    }
  }
  // Memory position of the panel's element j, and its column in the tile.
  __device__ __forceinline__ int64_t position(const TileGeometry& tile, int j, int& at) const {
    if (tile.one_row) {
      at = tile.groups == 1 ? 0 : int(start) + j;
      return tile.base + start + j;
    }
    const unsigned x = unsigned(column + j), skipped = tile.by_columns.quotient(x), r = unsigned(row) + skipped;
    at = int(x - skipped * unsigned(tile.columns()));
    int64_t rows = r;
    if (tile.t.layout.r0 > 1) {  // rows in two levels
      const unsigned outer = tile.t.by_inner.quotient(r);
      rows += int64_t(outer) * ((tile.t.layout.g1 - 1) * tile.t.by_inner.divisor);
    }
    return tile.base + rows * tile.row_stride + at;
  }
};

// The sum over a team of neighbouring threads, a power of two of them, in its first thread. All threads call it.
template <class S>
__device__ __forceinline__ S team_sum(S sum, int team, S* partial) {
  for (int offset = (team < 32 ? team : 32) / 2; offset > 0; offset /= 2) sum = plus(sum, from_lane(sum, offset));
  if (team <= 32) return sum;
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (int(threadIdx.x) % team == 0) {
    sum = partial[threadIdx.x / 32];
    for (int w = 1; w < team / 32; ++w) sum = plus(sum, partial[threadIdx.x / 32 + w]);
  }
  __syncthreads();
  return sum;
}

// Adds term(j, group), j < length, to the sum of each group: a team per group.
template <class S, class Term>
__device__ __forceinline__ void add_teams(int groups, int length, S* partial, S* sums, bool first, Term term) {
  int team = 1;
  while (team < kThreads && team * 8 <= length) team *= 2;
  const int teams = kThreads / team, lane = int(threadIdx.x) % team;
  for (int start = 0; start < groups; start += teams) {
    const int group = start + int(threadIdx.x) / team;
    decltype(term(0, 0)) own{};
    if (group < groups)
      for (int j = lane; j < length; j += team) own = plus(own, term(j, group));
    const S sum = team_sum(widened<S>(own), team, partial);
    if (lane == 0 && group < groups) sums[group] = first ? sum : plus(sums[group], sum);
  }
}

// Adds term(j, group) of a panel's elements j to the sums of their groups, in an order that depends on the panel's shape
// alone. Neighbouring threads read neighbouring elements where they can.
template <class S, class Term>
__device__ __forceinline__ void add_panel(int size, const TileGeometry& tile, S* partial, S* sums, bool first, Term term) {
  const int row = tile.row;
  if (tile.one_row) {
    add_teams(tile.groups, row, partial, sums, first, [&](int j, int group) { return term(group * row + j, group); });
    return;
  }
  auto in_rows = [&](int j, int group) {
    const int above = int(tile.t.by_row.quotient(unsigned(j)));
    return above * tile.columns() + group * row + (j - above * row);
  };
  const int rows = int(tile.by_columns.quotient(unsigned(size)));
  if (tile.columns() > kThreads) {
    add_teams(tile.groups, rows * row, partial, sums, first, [&](int j, int group) { return term(in_rows(j, group), group); });
    return;
  }
  // A thread per column walks down the rows; what threads found is added up by teams, none of which exceeds a warp.
  const int at_once = int(tile.by_columns.quotient(kThreads)), r = int(tile.by_columns.quotient(threadIdx.x));
  decltype(term(0, 0)) own{};
  if (r < at_once) {
    const int column = int(threadIdx.x) - r * tile.columns(), group = tile.group_at(column);
    for (int j = int(threadIdx.x); j < size; j += at_once * tile.columns()) own = plus(own, term(j, group));
  }
  partial[threadIdx.x] = widened<S>(own);
  __syncthreads();
  add_teams(tile.groups, at_once * row, partial, sums, first, [&](int j, int group) { return partial[in_rows(j, group)]; });
}

// Blocks per multiprocessor that registers have to leave room for: the most without spills (sm_80, sm_90, nvcc 13.0).
template <class Rule, class T>
constexpr int kTileBlocks = sizeof(T) == 8 ? 1 : sizeof(T) == 4 && !kPaired<Rule> ? 3 : 2;

// Groups that share a budget take it twice, once for each phase; between them nothing stays on chip.
template <class Rule, class T>
__global__ void __launch_bounds__(kThreads, kTileBlocks<Rule, T>)
    tile_kernel(const __grid_constant__ KernelArgs<Rule, compute_t<T>> args) {
  using Part = Tile<Rule, T>;
  using C = typename Part::C;
  constexpr int V = Part::V;
  constexpr bool kPair = kPaired<Rule>, kBudgets = kGroupSums<Rule> > 0;
  using S = sums_t<Rule>;
  using Shared = GroupArrays<Rule, C>;
  static_assert(sizeof(Shared) % 16 == 0 && sizeof(Shared) + 512 <= kGroupBytes);
  BREGMAN_DYNAMIC_SHARED(unsigned char, memory);
  Shared& arrays = *reinterpret_cast<Shared*>(memory);
  C* const z = reinterpret_cast<C*>(memory + sizeof(Shared));

  if (is_skipped(args)) return;
  const Scalars<Rule, C> k = scalars_of(args);
  const PlanView plan{global(args.plan)};
  const int index = args.first_item + int(blockIdx.x);
  const Item item = plan.items()[index];
  const Part part(plan.records()[item.tensor], args.grads[item.tensor - args.first_tensor], args.brain);
  const TileGeometry tile(part.t, item);
  const bool wide = part.vectors && tile.vectors(V), alone = tile.groups == 1;
  const bool fits = tile.elements() <= plan.header().tile_capacity;
  // Panels are whole rows, or pieces of one row when the tile is a single group.
  const int most = int(plan.header().panel);
  const int panel_size = fits ? int(tile.elements()) : alone ? most / V * V : int(most - most % tile.columns());
  C* const scales = z + panel_size;
  auto sum_of = [&](int which, int g) -> double& {  // that a group with a budget leaves
    return global(plan.group_numbers(part.t))[which * part.t.layout.groups() + item.begin + g];
  };

  // Calls f(width, j) for this thread's elements of a panel, `width` from j on. Element j is the same thread's in every
  // panel, whatever its size: nobody waits before the next one takes its place.
  auto for_own = [&](const Panel& panel, auto f) {
    const int whole = wide ? panel.size - panel.size % V : 0;
#pragma unroll 1
    for (int j = int(threadIdx.x) * V; j < whole; j += kThreads * V) f(Width<V>(), j);
    int j = whole + int(threadIdx.x);
    if (wide) j = whole / V % kThreads == int(threadIdx.x) ? whole : panel.size;
#pragma unroll 1
    for (const int step = wide ? 1 : kThreads; j < panel.size; j += step) f(Width<1>(), j);
  };
  // The same with where they lie: f(width, position, column, j).
  auto walk = [&](const Panel& panel, auto f) {
    for_own(panel, [&](auto width, int j) {
      int column;
      const int64_t i = panel.position(tile, j, column);
      f(width, i, column, j);
    });
  };

  Line<C> line{};
  bool curved = false;
  if constexpr (Rule::kMetric) curved = !line_of(k.radial, C(part.t.weight), true, line);
  // Passes that sum over groups. The first of a root search sums the squares of the old parameter.
  const int sums = !Rule::kMetric ? 1 : curved ? kCurvePasses : kRootSteps + 1;
  const bool first = kBudgets && args.phase == Phase::norms, second = kBudgets && args.phase == Phase::scale;
  for (int g = int(threadIdx.x); g < tile.groups; g += kThreads) {
    arrays.alive[g] = 0;
    if constexpr (Rule::kMetric) arrays.norm[g] = 0, arrays.factor[g] = 0, arrays.search[g] = Search::begun;
    if constexpr (kBudgets)
      if (second) {
        const auto [decay, eta] = global(plan.sharing())[item.tensor];
        const double squares = sum_of(0, g);
        if constexpr (!Rule::kHalfSpace) arrays.factor[g] = C(envelope_factor(squares, decay, eta));
        else
          arrays.factor[g] =
              half_space_pull({squares, sum_of(1, g)}, envelope_rate(squares, decay, eta), k.h.lr, k.h.epsilon);
      }
  }
  __syncthreads();

  int count = 0;
  bool on_chip = false;
#pragma unroll 1
  for (int pass = second ? sums : 0; pass <= (first ? 0 : sums); ++pass) {
    const bool writes = pass == sums, begins = Rule::kMetric && !curved && pass == 0;
    auto root_of = [&](C x, C scale, int group) {
      return begins ? Moments<C>{x * x, 0, 0} : root_terms(x, scale, C(arrays.norm[group]), line);
    };
    auto curve_of = [&](C x, C scale, int group) {
      const C rho = C(arrays.norm[group]);
      return pass && pass + 1 < sums ? curve_terms(x, scale, rho) : gain_terms(x, scale, rho);
    };
    auto others_of = [&](C x, C scale, int) {
      if constexpr (Rule::kHalfSpace) return half_space_terms(x, scale);
      else return double(x) * double(x);
    };
    // Calls f with the terms that are to be summed in this pass.
    auto with_terms = [&](auto f) {
      if constexpr (!Rule::kMetric) f(others_of);
      else if (curved) f(curve_of);
      else f(root_of);
    };
    // A single group that stays on chip begins as its points are made, and needs no pass for that.
    const bool at_once = begins && alone && fits;
    S own{};  // of a group that has the block for itself
    C squares = 0;
    if (pass + 1 < sums && threadIdx.x == 0) arrays.moved[pass % 2] = 0;
#pragma unroll 1
    for (int64_t start = 0; start < tile.elements(); start += panel_size) {
      const Panel panel(tile, start, panel_size);
      if (!on_chip)
        walk(panel, [&](auto width, int64_t i, int, int j) {
          constexpr int W = width.value;
          C points[W], scale[W];
          if (begins) {
            part.old_param(i, points);
#pragma unroll
            for (int m = 0; m < W; ++m) {
              if (at_once) squares += points[m] * points[m];
              else z[j + m] = points[m];
            }
            if (!at_once) return;
          }
          part.template point<true>(i, part.template keep<W>(i), k, !second, !second && (first || fits || writes), points,
                                    scale);
#pragma unroll
          for (int m = 0; m < W; ++m) {
            z[j + m] = points[m];
            if constexpr (kPair) scales[j + m] = scale[m];
          }
        });
      if (writes) {
        walk(panel, [&](auto width, int64_t i, int column, int j) {
          constexpr int W = width.value;
          // The first group is divided out once; its successors are counted.
          int group = tile.group_at(column), left = (group + 1) * tile.row - column;
          int groups_of[W];
          C q[W];
#pragma unroll
          for (int m = 0; m < W; ++m) {
            groups_of[m] = group;
            const C x = z[j + m], factor = arrays.factor[group];
            if constexpr (Rule::kHalfSpace) q[m] = half_space(x, scales[j + m], factor);
            else if constexpr (kPair) q[m] = shrink_weighted(x, scales[j + m], factor);
            else q[m] = x * factor;
            if (!alone && --left == 0) ++group, left = tile.row;
          }
          const uint32_t alive = part.finish(i, part.template keep<W>(i), k, q);
          count += __popc(alive);
          if (args.counts != nullptr) {
#pragma unroll
            for (int m = 0; m < W; ++m)
              if ((alive >> m) & 1) atomicAdd(&arrays.alive[groups_of[m]], 1);
          }
        });
      } else if (at_once) {
        if constexpr (Rule::kMetric) own = {double(squares), 0, 0};
      } else if (alone) {
        with_terms([&](auto term) {
          decltype(term(C(0), C(0), 0)) few{};
          for_own(panel, [&](auto width, int j) {
#pragma unroll
            for (int m = 0; m < width.value; ++m) few = plus(few, term(z[j + m], kPair ? scales[j + m] : C(0), 0));
          });
          own = plus(own, widened<S>(few));
        });
      } else {
        __syncthreads();
        with_terms([&](auto term) {
          add_panel(panel.size, tile, arrays.partial, arrays.sum, start == 0,
                    [&](int j, int group) { return term(z[j], kPair ? scales[j] : C(0), group); });
        });
        __syncthreads();
      }
    }
    on_chip = fits && (!begins || at_once);
    if (writes) break;
    if (alone) {
      own = team_sum(own, kThreads, arrays.partial);
      if (threadIdx.x == 0) arrays.sum[0] = own;
      __syncthreads();
    }
    for (int g = int(threadIdx.x); g < tile.groups; g += kThreads) {
      const S sum = arrays.sum[g];
      if constexpr (kBudgets)
        if (first) {
          if constexpr (Rule::kHalfSpace) sum_of(0, g) = sum.a, sum_of(1, g) = sum.b;
          else sum_of(0, g) = sum;
          continue;
        }
      if constexpr (Rule::kHalfSpace) {
        const double rate = half_space_rate(square_root(sum.a), k.radial, C(part.t.weight));
        arrays.factor[g] = half_space_pull(sum, rate, k.h.lr, k.h.epsilon);
      } else if constexpr (Rule::kMetric) {
        const double before = double(C(arrays.norm[g]));
        if (curved) {
          double gain = double(arrays.factor[g]);  // kept there, in C, until the last pass
          arrays.norm[g] = group_curve(pass, arrays.norm[g], {sum.a, sum.b}, k.radial, C(part.t.weight), gain);
          arrays.factor[g] = C(pass + 1 < sums ? gain : arrays.norm[g]);
          if (double(C(arrays.norm[g])) != before) atomicOr(&arrays.moved[pass % 2], 1);
        } else if (arrays.search[g] != Search::settled) {
          Search search = arrays.search[g];
          arrays.norm[g] = begins ? root_start<C>(sum.a) : root_step<C>(before, sum, search);
          arrays.search[g] = search;
          arrays.factor[g] = root_rho(arrays.norm[g], line);
          if (search != Search::settled) atomicOr(&arrays.moved[pass % 2], 1);
        }
      } else {
        const C scale = uniform_scale<Rule, C>(k.h) * C(part.t.weight);
        arrays.factor[g] = radial_factor<AnyPenalty>(C(square_root(sum)), scale, k.radial);
      }
    }
    __syncthreads();
    // Where no group goes on, or no rho of type C has changed, neither will the next pass.
    if (Rule::kMetric && !arrays.moved[pass % 2] && pass + 1 < sums) pass = sums - 1 - curved;
  }
  if (first) {
    if (item.begin == 0 && threadIdx.x == 0) {
      double scale = 1;
      if constexpr (!kPair) scale = double(uniform_scale<Rule, C>(k.h));
      global(plan.sharing())[item.tensor].decay = budget_decay(scale, k.radial, part.t.weight);
    }
    return;
  }
  if (args.counts == nullptr) return;
  __syncthreads();
  int groups = 0;
  for (int g = int(threadIdx.x); g < tile.groups; g += kThreads) groups += arrays.alive[g] > 0;
  count = block_sum(count);
  groups = block_sum(groups);
  if (threadIdx.x == 0) {
    global(args.counts)[2 * index] = count;
    global(args.counts)[2 * index + 1] = groups;
  }
}

cudaError_t step_tiles(const PlanView& plan, const void* device_plan, const void* const* grads, const StepArgs& args,
                       int32_t* counts, cudaStream_t stream) {
  return visit_rule(plan.header().rule, [&](auto rule) {
    return visit_dtype(DType(plan.header().dtype), [&](auto storage) {
      using Rule = decltype(rule);
      using T = decltype(storage);
      using C = compute_t<T>;
      const size_t points = size_t(plan.header().scratch_elements) * (1 + kPaired<Rule>);
      const size_t bytes = sizeof(GroupArrays<Rule, C>) + points * sizeof(C);
      return for_launches<Rule, C>(plan, device_plan, grads, args, counts, [&](const auto& kernel_args, dim3 blocks) {
        return launch(tile_kernel<Rule, T>, blocks, dim3(kThreads), bytes, stream, kernel_args);
      });
    });
  });
}

}  // namespace bregman
