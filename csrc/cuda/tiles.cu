// The walker for group penalties: a block takes a tile of neighbouring groups, in whatever way they lie in memory.
//
// A tile is a matrix of rows of contiguous columns (plan/groups.h). Where it fits, its pre-prox points stay in shared
// memory between the norms and the write, and memory is read and written once. Where it does not, the block walks it
// in panels twice: once for the norms, without writing, and once more for the step (the gradient and the state are
// then read twice). In a diagonal metric the prox scales are kept beside the points, and every step of the root
// (math/weighted.h) is one more reduction, over what is on chip where the tile fits.
#include "walker.cuh"

namespace bregman {

// What is summed over a group: the squares of its points, or the two sums of a step of the root.
template <bool kPair>
using sums_t = std::conditional_t<kPair, Sums, double>;

__device__ __forceinline__ double plus(double x, double y) { return x + y; }
__device__ __forceinline__ Sums plus(Sums x, Sums y) { return {x.a + y.a, x.b + y.b}; }
__device__ __forceinline__ double from_lane(double x, int offset) { return __shfl_xor_sync(~0u, x, offset); }
__device__ __forceinline__ Sums from_lane(Sums x, int offset) { return {from_lane(x.a, offset), from_lane(x.b, offset)}; }

// Per-group arrays, in front of the points in dynamic shared memory.
template <class C, bool kPair>
struct GroupArrays {
  sums_t<kPair> sum[kMaxGroups];
  sums_t<kPair> partial[kWarps];
  double norm[kPair ? kMaxGroups : 1];
  C factor[kMaxGroups];
  int alive[kMaxGroups];
};

// Where the elements of a tile lie. Indices within a tile fit 32 bits (make_plan refuses others), memory offsets do not.
struct TileGeometry {
  int64_t base, row_stride, r0_stride, elements;
  int rows, rows_inner, columns, row, groups;  // row: elements of one group in a row of the tile

  __device__ __forceinline__ TileGeometry(const GroupLayout& g, const Item& item)
      : row_stride(g.g2 * g.r2), rows(int(g.rows())), rows_inner(int(g.r1)), columns(int(item.count * g.r2)),
        row(int(g.r2)), groups(item.count) {
    const int64_t slab = item.begin / g.g2;
    r0_stride = g.g1 * g.r1 * row_stride;
    base = (slab / g.g1) * g.r0 * r0_stride + (slab % g.g1) * g.r1 * row_stride + (item.begin % g.g2) * g.r2;
    elements = g.rows() * (item.count * g.r2);
  }
  // Whether every run of V elements from a multiple of V is contiguous and 16-byte aligned in memory.
  __device__ __forceinline__ bool vectors(int v) const {
    if (base % v) return false;
    return rows == 1 || (columns % v == 0 && row_stride % v == 0);
  }
};

// A part of a tile that fits in shared memory.
struct Panel {
  int64_t start;
  int size, row, column;  // where it begins

  __device__ __forceinline__ Panel(const TileGeometry& tile, int64_t begin, int most)
      : start(begin), size(int(tile.elements - begin < most ? tile.elements - begin : most)), row(0), column(0) {
    if (tile.rows > 1) {
      row = int(begin / tile.columns);
      column = int(begin % tile.columns);
    }
  }
  // Memory position of the panel's element j, and its column in the tile.
  __device__ __forceinline__ int64_t position(const TileGeometry& tile, int j, int& at) const {
    if (tile.rows == 1) {
      at = tile.groups == 1 ? 0 : int(start) + j;
      return tile.base + start + j;
    }
    const unsigned x = unsigned(column) + unsigned(j), skipped = x / unsigned(tile.columns);
    const unsigned r = unsigned(row) + skipped, outer = r / unsigned(tile.rows_inner);
    at = int(x - skipped * unsigned(tile.columns));
    return tile.base + outer * tile.r0_stride + int64_t(r - outer * unsigned(tile.rows_inner)) * tile.row_stride + at;
  }
};

// Adds terms(j, group) of a panel's points to the sums of their groups: a team of neighbouring threads per group, in an
// order that depends on the panel's shape alone.
template <class C, bool kPair, class Terms>
__device__ __forceinline__ void add_sums(int panel, const TileGeometry& tile, GroupArrays<C, kPair>& arrays, bool first,
                                         Terms terms) {
  // With a single group a panel may end within a row; it is one run then.
  const int row = tile.groups == 1 ? panel : tile.row;
  const int length = tile.groups == 1 ? panel : panel / tile.columns * tile.row;
  int team = 1;
  while (team < kThreads && team * 8 <= length) team *= 2;
  const int teams = kThreads / team, lane = int(threadIdx.x) % team;
  for (int start = 0; start < tile.groups; start += teams) {
    const int group = start + int(threadIdx.x) / team;
    sums_t<kPair> sum{};
    if (group < tile.groups)
      for (int j = lane; j < length; j += team)
        sum = plus(sum, terms((j / row) * tile.columns + group * tile.row + j % row, group));
    for (int offset = (team < 32 ? team : 32) / 2; offset > 0; offset /= 2) sum = plus(sum, from_lane(sum, offset));
    if (team > 32) {
      if (threadIdx.x % 32 == 0) arrays.partial[threadIdx.x / 32] = sum;
      __syncthreads();
      if (lane == 0) {
        sum = {};
        for (int w = 0; w < team / 32; ++w) sum = plus(sum, arrays.partial[threadIdx.x / 32 + w]);
      }
      __syncthreads();
    }
    if (lane == 0 && group < tile.groups) arrays.sum[group] = first ? sum : plus(arrays.sum[group], sum);
  }
}

// kShared: one of the two visits of groups that share a budget; between them nothing stays on chip. Kernels of their own,
// or every group kernel would pay for them in registers, a block per multiprocessor in four cases.
template <class Rule, class T, bool kShared>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : kMinBlocks) tile_kernel(const __grid_constant__ KernelArgs<Rule, compute_t<T>> args) {
  using Part = Tile<Rule, T>;
  using C = typename Part::C;
  constexpr int V = Part::V;
  constexpr bool kPair = kPaired<Rule>;
  using Shared = GroupArrays<C, kPair>;
  BREGMAN_DYNAMIC_SHARED(unsigned char, memory);
  Shared& arrays = *reinterpret_cast<Shared*>(memory);
  C* z = reinterpret_cast<C*>(memory + sizeof(Shared));

  Scalars<Rule, compute_t<T>> k;
  if (!read_scalars(args, k)) return;
  const PlanView plan{global(args.plan)};
  const int index = args.first_item + int(blockIdx.x);
  const Item item = plan.items()[index];
  const Part part(plan.records()[item.tensor], args.grads[item.tensor - args.first_tensor]);
  const TileGeometry tile(part.t.layout, item);
  const bool wide = part.vectors && tile.vectors(V);
  const int capacity = int(plan.header().tile_capacity);
  const bool fits = tile.elements <= capacity;
  // Panels are whole rows, or pieces of one row when the tile is a single group.
  const int panel_size = fits ? int(tile.elements) : tile.groups == 1 ? capacity / V * V : capacity / tile.columns * tile.columns;

  // Calls f(full, position, column, j, n) for the elements [j, j + n) of a panel.
  auto walk = [&](const Panel& panel, auto f) {
    const int stride = wide ? V : 1;
#pragma unroll 1
    for (int j = int(threadIdx.x) * stride; j < panel.size; j += kThreads * stride) {
      int column;
      const int64_t i = panel.position(tile, j, column);
      if (wide && j + V <= panel.size)
        f(std::true_type{}, i, column, j, V);
      else
        f(std::false_type{}, i, column, j, wide ? panel.size - j : 1);
    }
  };

  C* scales = z + panel_size;
  // Sums terms(j, group) over all groups; points that do not stay on chip are computed again.
  bool loaded = false;
  auto reduce = [&](auto terms) {
    for (int64_t start = 0; start < tile.elements; start += panel_size) {
      const Panel panel(tile, start, panel_size);
      if (!loaded)
        walk(panel, [&](auto full, int64_t i, int, int j, int n) {
          C points[V], scale[V];
          part.template point<full.value>(i, n, part.keep(i), k, fits || kShared, points, scale);
#pragma unroll
          for (int m = 0; m < V; ++m)
            if (full.value || m < n) {
              z[j + m] = points[m];
              if constexpr (kPair) scales[j + m] = scale[m];
            }
        });
      loaded = fits;
      __syncthreads();
      add_sums(panel.size, tile, arrays, start == 0, terms);
      __syncthreads();
    }
  };
  auto for_groups = [&](auto f) {
    for (int g = int(threadIdx.x); g < tile.groups; g += kThreads) f(g);
    __syncthreads();
  };

  Line<C> line{};
  if constexpr (kPair) line_of(k.radial, C(part.t.weight), line);
  if constexpr (Rule::kHalfSpace) {
    reduce([&](int j, int) { return half_space_terms(z[j], scales[j]); });
    for_groups([&](int g) { arrays.factor[g] = half_space_pull(arrays.sum[g], line, k.h.lr, k.h.epsilon); });
  } else if constexpr (kPair) {
    reduce([&](int j, int) { return start_terms(z[j], scales[j], line); });
    for_groups([&](int g) { arrays.norm[g] = root_start(arrays.sum[g], line); });
#pragma unroll 1
    for (int step = 0; step < kRootSteps<C>; ++step) {
      reduce([&](int j, int g) { return step_terms(z[j], scales[j], C(arrays.norm[g]), line); });
      for_groups([&](int g) { arrays.norm[g] = root_step<C>(arrays.norm[g], arrays.sum[g]); });
    }
    for_groups([&](int g) { arrays.factor[g] = root_rho(arrays.norm[g], line); });
  } else {
    auto square = [&](int j, int) { return double(z[j]) * double(z[j]); };
    if constexpr (kShared) {
      double* values = global(plan.groups(part.t)) + item.begin;
      if (args.phase == Phase::norms) {
        reduce(square);
        for_groups([&](int g) { values[g] = arrays.sum[g]; });
        if (item.begin == 0 && threadIdx.x == 0) global(plan.decays())[item.tensor] = budget_decay(k, part.t.weight);
        return;
      }
      for_groups([&](int g) { arrays.factor[g] = C(values[g]); });
    } else {
      const C scale = uniform_scale<Rule, C>(k.h) * C(part.t.weight);
      reduce(square);
      for_groups([&](int g) { arrays.factor[g] = radial_factor<AnyPenalty>(C(square_root(arrays.sum[g])), scale, k.radial); });
    }
  }
  for_groups([&](int g) { arrays.alive[g] = 0; });

  int count = 0;
  for (int64_t start = 0; start < tile.elements; start += panel_size) {
    walk(Panel(tile, start, panel_size), [&](auto full, int64_t i, int column, int j, int n) {
      const uint32_t bits = part.keep(i);
      C q[V], scale[V];
      if (fits && !kShared) {
#pragma unroll
        for (int m = 0; m < V; ++m) {
          q[m] = full.value || m < n ? z[j + m] : C(0);
          if constexpr (kPair) scale[m] = full.value || m < n ? scales[j + m] : C(0);
        }
      } else {
        part.template point<full.value, !kShared>(i, n, bits, k, true, q, scale);
      }
      // The first group is divided out once; its successors are counted.
      int group = tile.groups == 1 ? 0 : column / tile.row, left = (group + 1) * tile.row - column;
      int groups_of[V];
#pragma unroll
      for (int m = 0; m < V; ++m) {
        groups_of[m] = group;
        if (full.value || m < n) {
          if constexpr (Rule::kHalfSpace) q[m] = half_space(q[m], scale[m], arrays.factor[group]);
          else if constexpr (kPair) q[m] = shrink_weighted(q[m], scale[m], arrays.factor[group]);
          else q[m] *= arrays.factor[group];
        }
        if (tile.groups > 1 && --left == 0) ++group, left = tile.row;
      }
      const uint32_t alive = part.template finish<full.value>(i, n, bits, k, q);
      count += __popc(alive);
      if (args.counts != nullptr) {
#pragma unroll
        for (int m = 0; m < V; ++m)
          if ((alive >> m) & 1) atomicAdd(&arrays.alive[groups_of[m]], 1);
      }
    });
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
      const int64_t points = std::min(plan.header().scratch_elements, plan.header().tile_capacity);
      const size_t bytes = sizeof(GroupArrays<C, kPaired<Rule>>) + size_t(points) * sizeof(C) * (1 + kPaired<Rule>);
      return for_launches<Rule, C>(plan, device_plan, grads, args, counts, [&](const auto& kernel_args, dim3 blocks) {
        if constexpr (!kPaired<Rule>)  // the others know no budgets
          if (plan.header().budgets)
            return launch(tile_kernel<Rule, T, true>, blocks, dim3(kThreads), bytes, stream, kernel_args);
        return launch(tile_kernel<Rule, T, false>, blocks, dim3(kThreads), bytes, stream, kernel_args);
      });
    });
  });
}

}  // namespace bregman
