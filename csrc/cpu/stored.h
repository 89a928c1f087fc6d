// One tensor as it lies in memory: what loops of the compute type make of 16-bit arrays, masks, and writes past the
// caches.
#pragma once

#include <type_traits>

#include "../plan/plan.h"
#include "loops.h"

BREGMAN_BEGIN

constexpr int64_t kBuffer = 1024;  // elements that are converted or masked at a time
static_assert(kBuffer % kLanes == 0);
template <class T>
constexpr int64_t kLine = int64_t(64 / sizeof(T));  // elements per memory line

// Whether parameters are written past the caches: nobody reads them in this step, and there are too many to stay.
constexpr int64_t kStreamBytes = 16 << 20;
template <class T>
bool streams(const PlanView& plan, const TensorRecord& t, const Loops<compute_t<T>>& rule) {
  return !rule.reads_param && t.mask == nullptr && plan.header().elements * int64_t(sizeof(T)) >= kStreamBytes &&
         reinterpret_cast<uintptr_t>(t.param) % 64 == 0;
}

// stream_lines from anywhere on.
inline void stream_copy(void* to, const void* from, int64_t bytes) {
  const int64_t edge = std::min(bytes, int64_t(-reinterpret_cast<uintptr_t>(to) % 64));
  std::memcpy(to, from, size_t(edge));
  stream_lines(static_cast<char*>(to) + edge, static_cast<const char*>(from) + edge, bytes - edge);
}
// Streamed stores are seen by other threads only after this.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Asks meanwhile for what lies `ahead` elements on: an address, not a pointer.
template <class T>
BREGMAN_LOOP void widen_all(const T* __restrict__ from, int64_t n, int64_t ahead, float* __restrict__ to) {
  in_parts(n, [&](int64_t begin, int64_t m) BREGMAN_VISIT {
    const T* part = from + begin;
    for (int64_t j = 0; j < m; j += kLine<T>) prefetch(reinterpret_cast<uintptr_t>(part + j) + uintptr_t(ahead) * sizeof(T));
    int64_t j = 0;
#if defined(BREGMAN_FMA)
    if constexpr (std::is_same_v<T, fp16>)
      for (; j + 8 <= m; j += 8)
        _mm256_storeu_ps(to + begin + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(part + j))));
#endif
#pragma GCC ivdep
    for (; j < m; ++j) to[begin + j] = widen(part[j]);
  });
}
// At most kBuffer elements; returns how many are non-zero as stored.
template <class T>
BREGMAN_LOOP int32_t narrow_all(const float* __restrict__ from, int64_t n, T* __restrict__ to) {
  int64_t j = 0;
#if defined(BREGMAN_FMA)
  if constexpr (std::is_same_v<T, fp16>)
    for (; j + 8 <= n; j += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT));
#endif
#pragma GCC ivdep
  for (; j < n; ++j) narrow(from[j], to[j]);
  uint16_t count = 0;  // as wide as the elements: twice as fast as in 32 bits, with the conversion in one loop
#pragma GCC ivdep
  for (int64_t m = 0; m < n; ++m) count = uint16_t(count + nonzero(to[m]));
  return count;
}

// One flag per element of a mask's bits [offset, offset + n), n <= kBuffer.
template <class C>
using flag_t = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;  // as wide as the element
template <class C>
struct Keep {
  flag_t<C> flags[kBuffer];

  Keep(const uint64_t* mask, int64_t offset, int64_t n) {
    constexpr int kBits = 64;
    for (int64_t j = 0; j < n; j += kBits, offset += kBits) {
      const int shift = int(offset % kBits);
      uint64_t bits = mask[offset / kBits] >> shift;
      if (shift + std::min<int64_t>(n - j, kBits) > kBits) bits |= mask[offset / kBits + 1] << (kBits - shift);
      const uint32_t halves[] = {uint32_t(bits), uint32_t(bits >> 32)};  // 64-bit shifts take ten times as long
      for (int half = 0; half < 2; ++half)
        for (int m = 0; m < 32; ++m) flags[j + 32 * half + m] = flag_t<C>((halves[half] >> m) & 1);
    }
  }
};
// Sets to zero those of n elements that a mask leaves out; returns how many are non-zero then.
template <class C>
BREGMAN_LOOP int32_t clear_masked(C* __restrict__ x, int64_t n, const flag_t<C>* __restrict__ keep) {
  int32_t count = 0;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const C value = select(keep[j] != 0, x[j], C(0));
    x[j] = value;
    count += nonzero(value);
  }
  return count;
}

enum class Visit { first, second, only };

template <class T>
struct Stored {
  using C = compute_t<T>;
  static constexpr bool kNarrow = sizeof(T) == 2;
  static constexpr int64_t kOnwards = kAheadBytes / int64_t(sizeof(T));
  const Loops<C>& rule;
  T* param;
  const T* grad;
  const uint64_t* mask;
  Arrays<C> state;  // its slots
  C* master;  // of 16-bit parameters that the rule reads

  Stored(const TensorRecord& t, const void* grads, const Loops<C>& rule)
      : rule(rule), param(static_cast<T*>(t.param)), grad(static_cast<const T*>(grads)), mask(t.mask),
        state{nullptr, nullptr, slot(t, 0), slot(t, 1), slot(t, 2), kNarrow},
        master(kNarrow && rule.reads_param ? static_cast<C*>(t.state[rule.slots]) : nullptr) {}

  // The arrays from an element on, as they are.
  Arrays<C> at(int64_t begin) const {
    static_assert(!kNarrow);
    return state.with(param + begin, grad + begin, begin);
  }

  // Calls f(arrays, j, m, keep) for runs of m elements from `begin` + j on, n in all, before parameters are stored; `keep`
  // has the flags of a mask, if there is one. State that it leaves out becomes zero behind f. 16-bit parameters are there
  // if the rule or `reads_param` says so. What is read next lies `ahead` elements on, as far as 16-bit arrays go.
  template <class F>
  void advance(int64_t begin, int64_t n, const F& f, bool reads_param = false, int64_t ahead = kOnwards) const {
    auto masked = [&](const Arrays<C>& a, int64_t j, int64_t m) {
      if (mask == nullptr) return f(a, j, m, nullptr);
      const Keep<C> keep(mask, begin + j, m);
      f(a, j, m, keep.flags);
      if (!rule.late) clear_state(begin + j, m, keep);
    };
    if constexpr (kNarrow) converted<Visit::first>(begin, n, masked, reads_param, ahead);
    else if (mask == nullptr) f(at(begin), 0, n, nullptr);
    else for_buffers(n, [&](int64_t j, int64_t m) { masked(at(begin + j), j, m); });
  }

  // Calls f(arrays, j, m, stream) likewise, storing parameters, past the caches if `stream`, zeros where a mask says so;
  // returns how many are non-zero, as f does. f stores in the arrays' `param`.
  template <Visit kVisit, class F>
  int32_t store(int64_t begin, int64_t n, bool stream, const F& f) const {
    int32_t count = 0;
    auto masked = [&](const Arrays<C>& a, int64_t i, int64_t m) {
      const Keep<C> keep(mask, i, m);
      if (kVisit == Visit::only || rule.late) clear_state(i, m, keep);
      return clear_masked(a.param, m, keep.flags);
    };
    if constexpr (kNarrow) {
      T stored[kBuffer];
      converted<kVisit>(begin, n, [&](const Arrays<C>& a, int64_t j, int64_t m) {
        f(a, j, m, false);
        if (mask != nullptr) masked(a, begin + j, m);
        count += narrow_all(a.param, m, stream ? stored : param + begin + j);
        if (stream) stream_copy(param + begin + j, stored, m * int64_t(sizeof(T)));
      });
    } else if (mask != nullptr) {
      for_buffers(n, [&](int64_t j, int64_t m) {
        const Arrays<C> a = at(begin + j);
        f(a, j, m, false);
        count += masked(a, begin + j, m);
      });
    } else {
      count = f(at(begin), 0, n, stream);
    }
    return count;
  }

 private:
  C* slot(const TensorRecord& t, int number) const {
    return number < rule.slots ? static_cast<C*>(t.state[number]) : nullptr;
  }
  // To a second visit the state tells all, if there is any, but for late rules.
  bool reads_grad(Visit visit) const {
    return visit == Visit::only || rule.late == (visit == Visit::second) || rule.slots == 0;
  }
  template <class F>
  static void for_buffers(int64_t n, const F& f) {
    for (int64_t j = 0; j < n; j += kBuffer) f(j, std::min(kBuffer, n - j));
  }
  template <Visit kVisit, class F>
  void converted(int64_t begin, int64_t n, const F& f, bool reads_param = false, int64_t ahead = kOnwards) const {
    alignas(64) C grads[kBuffer], params[kBuffer];
    for_buffers(n, [&](int64_t j, int64_t m) {
      if (reads_grad(kVisit)) widen_all(grad + begin + j, m, ahead, grads);
      if (reads_param && !master) widen_all(param + begin + j, m, ahead, params);
      f(state.with(master ? master + begin + j : params, grads, begin + j), j, m);
    });
  }
  void clear_state(int64_t begin, int64_t n, const Keep<C>& keep) const {
    C* const slots[] = {state.slot0, state.slot1, state.slot2};
    for (int s = rule.fixed; s < rule.slots; ++s) clear_masked(slots[s] + begin, n, keep.flags);
  }
};

BREGMAN_END
