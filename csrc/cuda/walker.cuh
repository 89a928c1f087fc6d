// What the two walkers share: kernel arguments, vector access to a tensor's arrays, and block reductions.
#pragma once

#include "../math/dtypes.h"
#include "../math/radial.h"
#include "../math/rule_list.h"
#include "../math/scalars.h"
#include "../math/curved.h"
#include "../math/envelope.h"
#include "step.h"
#include "tuning.h"

namespace bregman {

template <class Rule, class C>
struct KernelArgs {
  const char* plan;
  int32_t* counts;
  const double* live;  // scalars to read from the device instead of k, or null
  Scalars<Rule, C> k;
  int32_t first_item, first_tensor;
  Phase phase;
  bool brain;  // of bits16: that they are bf16
  const void* grads[kMaxGrads];
};

template <class P>
__device__ __forceinline__ P* global(P* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));  // pointers from a table would get generic accesses
#endif
  return p;
}

template <class Rule, class C>
__device__ __forceinline__ bool is_skipped(const KernelArgs<Rule, C>& args) {
  return args.live != nullptr && global(args.live)[0] != 0;
}

template <class Rule, class C>
__device__ __forceinline__ Scalars<Rule, C> scalars_of(const KernelArgs<Rule, C>& args) {
  if (args.live == nullptr) return args.k;
  return Scalars<Rule, C>::from(global(args.live), args.k.elementwise.kind, args.k.radial.kind);
}

__device__ __forceinline__ bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class E>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(E);
  E v[kSize];
};

// One tensor of the plan. A thread works on V neighbouring elements at a time, 16 bytes of parameter and gradient from a
// 16-byte boundary, or on one: W is either.
template <class Rule, class T>
struct Tile {
  using C = compute_t<T>;
  static constexpr int V = 16 / sizeof(T);
  static constexpr int kSlots = Rule::kStateSlots;
  static constexpr bool kMaster = Rule::kReadsParam && sizeof(T) == 2;
  const TensorRecord& t;
  const T* grad;
  bool vectors;       // parameter and state lie at 16-byte boundaries
  bool grad_vectors;  // so does the gradient (a view into a communication bucket may not)
  bool brain;

  __device__ __forceinline__ Tile(const TensorRecord& record, const void* grads, bool brain)
      : t(record), grad(global(static_cast<const T*>(grads))), grad_vectors(is_aligned(grads)), brain(brain) {
    vectors = is_aligned(t.param);
    for (int m = 0; m < kSlots + kMaster; ++m) vectors = vectors && is_aligned(t.state[m]);
  }

  template <int W, class E>
  __device__ __forceinline__ static void load(const E* p, int64_t i, bool wide, E (&out)[W]) {
    if (W > 1 && wide) {
      constexpr int kPacks = W / Pack<E>::kSize;
#pragma unroll
      for (int m = 0; m < kPacks; ++m) {
        auto pack = load_vector<Pack<E>>(p + i + m * Pack<E>::kSize);
#pragma unroll
        for (int j = 0; j < Pack<E>::kSize; ++j) out[m * Pack<E>::kSize + j] = pack.v[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < W; ++j) out[j] = p[i + j];
    }
  }

  template <int W, class E>
  __device__ __forceinline__ static void store(E* p, int64_t i, const E (&in)[W]) {
    if constexpr (W == 1) {
      p[i] = in[0];
    } else {
      constexpr int kPacks = W / Pack<E>::kSize;
#pragma unroll
      for (int m = 0; m < kPacks; ++m) {
        Pack<E> pack;
#pragma unroll
        for (int j = 0; j < Pack<E>::kSize; ++j) pack.v[j] = in[m * Pack<E>::kSize + j];
        store_vector(p + i + m * Pack<E>::kSize, pack);
      }
    }
  }

  // Parameters and gradients in the compute type, and back.
  template <int W>
  __device__ __forceinline__ void load_stored(const T* p, int64_t i, bool wide, C (&out)[W]) const {
    T raw[W];
    load(p, i, wide, raw);
    if constexpr (std::is_same_v<T, bits16>) {
      if (brain) {
#pragma unroll
        for (int j = 0; j < W; ++j) out[j] = widen(bf16{raw[j].bits});
      } else {
#pragma unroll
        for (int j = 0; j < W; ++j) out[j] = widen(fp16{raw[j].bits});
      }
    } else {
#pragma unroll
      for (int j = 0; j < W; ++j) out[j] = widen(raw[j]);
    }
  }
  template <int W>
  __device__ __forceinline__ void narrow_all(const C (&values)[W], T (&raw)[W]) const {
    auto narrow_to = [&](auto stored) {
#pragma unroll
      for (int j = 0; j < W; ++j) {
        narrow(values[j], stored);
        if constexpr (std::is_same_v<T, bits16>) raw[j] = {stored.bits};
        else raw[j] = stored;
      }
    };
    if constexpr (!std::is_same_v<T, bits16>) narrow_to(T{});
    else if (brain) narrow_to(bf16{});
    else narrow_to(fp16{});
  }

  __device__ __forceinline__ C* slot(int m) const { return global(static_cast<C*>(t.state[m])); }
  __device__ __forceinline__ T* param() const { return global(static_cast<T*>(t.param)); }

  // Mask bits of elements [i, i + W).
  template <int W>
  __device__ __forceinline__ uint32_t keep(int64_t i) const {
    if (t.mask == nullptr) return ~0u;
    const uint64_t* words = global(t.mask);
    const int shift = int(i % 64);
    uint64_t bits = words[i / 64] >> shift;
    if (shift + W > 64 && i / 64 + 1 < (t.numel + 63) / 64) bits |= words[i / 64 + 1] << (64 - shift);
    return uint32_t(bits);
  }

  template <int W>
  __device__ __forceinline__ void old_param(int64_t i, C (&out)[W]) const {
    if constexpr (kMaster) {
      load(static_cast<const C*>(slot(kSlots)), i, true, out);
    } else {
      load_stored(param(), i, true, out);
    }
  }

  // What the rule reads.
  template <int W>
  __device__ __forceinline__ void load_param(int64_t i, C (&out)[W]) const {
    if constexpr (Rule::kReadsParam) {
      old_param(i, out);
    } else {
#pragma unroll
      for (int j = 0; j < W; ++j) out[j] = C(0);
    }
  }

  // The point with the elementwise prox applied, and its prox scale. Without `advance` the state is the new one already;
  // it is stored when `commit`.
  template <bool kBelowNorms, int W>
  __device__ __forceinline__ void point(int64_t i, uint32_t bits, const Scalars<Rule, C>& k, bool advance, bool commit,
                                        C (&z)[W], C (&scale)[W]) const {
    C g[W], p[W], s[kMaxSlots][W];
    load_stored(grad, i, grad_vectors, g);
    load_param(i, p);
#pragma unroll
    for (int m = 0; m < kSlots; ++m) load(static_cast<const C*>(slot(m)), i, true, s[m]);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      C one[kMaxSlots];
#pragma unroll
      for (int m = 0; m < kSlots; ++m) one[m] = s[m][j];
      const C gradient = g[j] * k.grad_scale;
      if constexpr (!Rule::kLate)
        if (advance) Rule::update(gradient, p[j], one, k.h);
      const Point<C> r = Rule::point(gradient, p[j], one, k.h);
      const bool kept = (bits >> j) & 1;
      scale[j] = kept ? r.scale : C(0);
      z[j] = kept ? r.z : C(0);
      if constexpr (!Rule::kHalfSpace) z[j] = prox<kBelowNorms>(z[j], scale[j], k.elementwise);
#pragma unroll
      for (int m = 0; m < kSlots; ++m) s[m][j] = kept ? one[m] : C(0);
    }
    if (!Rule::kLate && commit) {
#pragma unroll
      for (int m = Rule::kFixedSlots; m < kSlots; ++m) store(slot(m), i, s[m]);
    }
  }

  // The new parameter from the prox point; returns a bit per non-zero.
  template <int W>
  __device__ __forceinline__ uint32_t finish(int64_t i, uint32_t bits, const Scalars<Rule, C>& k, const C (&q)[W]) const {
    C p[W], g[W], s[kMaxSlots][W], value[W];
    T raw[W];
    load_param(i, p);
    if constexpr (Rule::kLate) load_stored(grad, i, grad_vectors, g);
#pragma unroll
    for (int m = 0; m < kSlots; ++m) load(static_cast<const C*>(slot(m)), i, true, s[m]);
    uint32_t alive = 0;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      C one[kMaxSlots];
#pragma unroll
      for (int m = 0; m < kSlots; ++m) one[m] = s[m][j];
      const bool kept = (bits >> j) & 1;
      const C gradient = Rule::kLate ? g[j] * k.grad_scale : C(0);
      value[j] = finish_rule<Rule, C>(q[j], gradient, p[j], one, k.h);
      if (!kept) value[j] = C(0);
#pragma unroll
      for (int m = 0; m < kSlots; ++m) s[m][j] = kept ? one[m] : C(0);
    }
    narrow_all(value, raw);
#pragma unroll
    for (int j = 0; j < W; ++j)
      if (nonzero(raw[j])) alive |= 1u << j;
    if constexpr (Rule::kLate) {
#pragma unroll
      for (int m = Rule::kFixedSlots; m < kSlots; ++m) store(slot(m), i, s[m]);
    }
    store(param(), i, raw);
    if constexpr (kMaster) store(slot(kSlots), i, value);
    return alive;
  }
};

template <int W>
using Width = std::integral_constant<int, W>;

// Sum over the block in a fixed order; the result is valid in thread 0. All threads call it.
__device__ __forceinline__ int block_sum(int value) {
  BREGMAN_SHARED(int, partial, kWarps);
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  int total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kWarps; ++w) total += partial[w];
  __syncthreads();
  return total;
}

// Calls launch_one(item range, tensor range) so that no launch needs more than kMaxGrads gradient pointers.
template <class Rule, class C, class F>
cudaError_t for_launches(const PlanView& plan, const void* device_plan, const void* const* grads, const StepArgs& args,
                         int32_t* counts, F launch_one) {
  const PlanHeader& header = plan.header();
  KernelArgs<Rule, C> kernel_args;
  kernel_args.plan = static_cast<const char*>(device_plan);
  kernel_args.counts = counts;
  kernel_args.live = args.on_device ? args.scalars : nullptr;
  kernel_args.phase = args.phase;
  kernel_args.brain = DType(header.dtype) == DType::bf16;
  kernel_args.k = {};
  kernel_args.k.elementwise.kind = args.elementwise;
  kernel_args.k.radial.kind = args.radial;
  if (!args.on_device) kernel_args.k = Scalars<Rule, C>::from(args.scalars, args.elementwise, args.radial);
  int64_t item = 0;
  while (item < header.items) {
    const int32_t first_tensor = plan.items()[item].tensor;
    const int64_t tensors = std::min<int64_t>(kMaxGrads, header.tensors - first_tensor);
    const Item* end = std::lower_bound(plan.items() + item, plan.items() + header.items, first_tensor + tensors,
                                       [](const Item& a, int64_t tensor) { return a.tensor < tensor; });
    const int64_t blocks = std::min<int64_t>(end - (plan.items() + item), INT32_MAX);
    kernel_args.first_item = int32_t(item);
    kernel_args.first_tensor = first_tensor;
    std::copy(grads + first_tensor, grads + first_tensor + tensors, kernel_args.grads);
    if (cudaError_t status = launch_one(kernel_args, dim3(unsigned(blocks))); status != cudaSuccess) return status;
    item += blocks;
  }
  return cudaSuccess;
}

// Calls f(T{}) with the storage type of a plan.
template <class F>
cudaError_t visit_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16:
    case DType::fp16: return f(bits16{});
  }
  return cudaErrorInvalidValue;
}

// Calls f(Rule{}) with the rule of a plan.
template <class F>
cudaError_t visit_rule(int rule, F f) {
  switch (rule) {
#define X(Functor, name) \
  case rule_##name: \
    return f(Functor{});
    BREGMAN_RULES(X)
#undef X
  }
  return cudaErrorInvalidValue;
}

cudaError_t step_separable(const PlanView& plan, const void* device_plan, const void* const* grads,
                           const StepArgs& args, int32_t* counts, cudaStream_t stream);
cudaError_t step_tiles(const PlanView& plan, const void* device_plan, const void* const* grads, const StepArgs& args,
                       int32_t* counts, cudaStream_t stream);

}  // namespace bregman
