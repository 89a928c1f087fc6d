// One tensor as the CPU loops see it: its arrays, its mask bits, and writes past the caches.
#pragma once

#include <type_traits>

#include "../math/dtypes.h"
#include "../math/radial.h"
#include "../math/rule_list.h"
#include "../math/scalars.h"
#include "../plan/plan.h"
#include "step.h"

BREGMAN_BEGIN

constexpr int kBlock = 64;  // elements per mask word
template <class T>
constexpr int64_t kLine = int64_t(64 / sizeof(T));  // elements per memory line

template <class C>
using flag_t = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;

// The arrays of one tensor, and how one element is loaded and stored.
template <class Rule, class T>
struct Arrays {
  using C = compute_t<T>;
  static constexpr int kSlots = Rule::kStateSlots;
  static constexpr bool kMaster = Rule::kReadsParam && sizeof(T) == 2;
  T* __restrict__ param;
  const T* __restrict__ grad;
  C* __restrict__ slot0;
  C* __restrict__ slot1;
  C* __restrict__ slot2;
  C* __restrict__ master;

  Arrays(const TensorRecord& t, const void* grads)
      : param(static_cast<T*>(t.param)),
        grad(static_cast<const T*>(grads)),
        slot0(static_cast<C*>(t.state[0])),
        slot1(static_cast<C*>(t.state[1])),
        slot2(static_cast<C*>(t.state[2])),
        master(static_cast<C*>(t.state[kSlots])) {
    static_assert(kSlots <= 3 && kSlots + kMaster <= kMaxSlots);
  }

  BREGMAN_HD void load_state(int64_t i, C* s) const {
    if constexpr (kSlots > 0) s[0] = slot0[i];
    if constexpr (kSlots > 1) s[1] = slot1[i];
    if constexpr (kSlots > 2) s[2] = slot2[i];
  }
  BREGMAN_HD void store_state(int64_t i, const C* s) const {
    if constexpr (kSlots > 0 && Rule::kFixedSlots <= 0) slot0[i] = s[0];
    if constexpr (kSlots > 1 && Rule::kFixedSlots <= 1) slot1[i] = s[1];
    if constexpr (kSlots > 2 && Rule::kFixedSlots <= 2) slot2[i] = s[2];
  }
  BREGMAN_HD C old_param(int64_t i) const {
    if constexpr (kMaster) return master[i];
    return widen(param[i]);
  }
  BREGMAN_HD C load_param(int64_t i) const {  // what a rule reads
    if constexpr (Rule::kReadsParam) return old_param(i);
    return C(0);
  }
  BREGMAN_HD bool store_param(int64_t i, C value) const {
    T stored;
    narrow(value, stored);
    param[i] = stored;
    if constexpr (kMaster) master[i] = value;
    return nonzero(stored);
  }
};

// Functions of their own: inlined, GCC 12 moves parts of these loops out and does not vectorise a sixth of them.
#define BREGMAN_LOOP __attribute__((noinline))

// The point of one element before any prox. The first visit advances the state.
template <bool kAdvance, class Rule, class T, class C, bool kMasked>
BREGMAN_HD Point<C> point_of(const Arrays<Rule, T>& a, int64_t i, const Scalars<Rule, C>& k, C* s,
                             const flag_t<C>* keep, int64_t j) {
  const C grad = widen(a.grad[i]) * k.grad_scale, param = a.load_param(i);
  a.load_state(i, s);
  if constexpr (kAdvance && !Rule::kLate) {
    Rule::update(grad, param, s, k.h);
    if constexpr (kMasked)
      for (int m = 0; m < Rule::kStateSlots; ++m) s[m] = select(keep[j] != 0, s[m], C(0));
    a.store_state(i, s);
  }
  Point<C> p = Rule::point(grad, param, s, k.h);
  if constexpr (kMasked) {
    p.z = select(keep[j] != 0, p.z, C(0));
    p.scale = select(keep[j] != 0, p.scale, C(0));  // 1 / 0 where a metric has no eps
  }
  return p;
}

// The same with the elementwise prox, before any group's factor.
template <bool kAdvance, class Rule, class Elementwise, class T, class C, bool kMasked>
BREGMAN_HD C prox_point(const Arrays<Rule, T>& a, int64_t i, const Scalars<Rule, C>& k, C* s, const flag_t<C>* keep,
                        int64_t j) {
  const Point<C> p = point_of<kAdvance, Rule, T, C, kMasked>(a, i, k, s, keep, j);
  return Elementwise::prox(p.z, p.scale, k.elementwise);
}

// The new parameter from the prox point, stored in `to`; whether it is non-zero. `s` is the element's state.
template <class Rule, class T, class C, bool kMasked>
BREGMAN_HD bool finish_element(const Arrays<Rule, T>& a, const Arrays<Rule, T>& to, int64_t i,
                               const Scalars<Rule, C>& k, C q, C* s, const flag_t<C>* keep, int64_t j) {
  C value = finish_rule<Rule, C>(q, widen(a.grad[i]) * k.grad_scale, a.load_param(i), s, k.h);
  if constexpr (kMasked) value = select(keep[j] != 0, value, C(0));
  if constexpr (Rule::kLate) {
    if constexpr (kMasked)
      for (int m = 0; m < Rule::kStateSlots; ++m) s[m] = select(keep[j] != 0, s[m], C(0));
    a.store_state(i, s);
  }
  return to.store_param(i, value);
}

// Mask bits [offset, offset + n), n <= 64, one flag per element.
template <class F>
void expand_mask(const uint64_t* mask, int64_t offset, int64_t n, F* keep) {
  int shift = int(offset % kBlock);
  uint64_t bits = mask[offset / kBlock] >> shift;
  if (shift + n > kBlock) bits |= mask[offset / kBlock + 1] << (kBlock - shift);
  for (int64_t j = 0; j < kBlock; ++j) keep[j] = F((bits >> j) & 1);
}

// Calls f(start, length, keep) over [0, n): at once without a mask, in blocks with one.
template <class C, class F>
void for_blocks(const uint64_t* mask, int64_t offset, int64_t n, F f) {
  flag_t<C> keep[kBlock];
  for (int64_t j = 0; j < n; j += kBlock) {
    int64_t length = n - j < kBlock ? n - j : kBlock;
    expand_mask(mask, offset + j, length, keep);
    f(j, length, keep);
  }
}

// Whether parameters are written past the caches: nobody reads them in this step, and there are too many to stay.
constexpr int64_t kStreamBytes = 16 << 20;
template <class Rule, class T>
bool streams(const PlanView& plan, const TensorRecord& t) {
  return !Rule::kReadsParam && plan.header().elements * int64_t(sizeof(T)) >= kStreamBytes &&
         reinterpret_cast<uintptr_t>(t.param) % 64 == 0;
}

// Copies to a 16-byte boundary past the caches. A plain store to a line that nobody reads fetches it first: on
// ResNet-18 shapes that is a fifth of LinBreg's traffic (20 bytes per parameter instead of 16). Whole lines at once are
// a tenth faster than quarters.
inline void stream_copy(void* to, const void* from, int64_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  int64_t done = 0;
#if defined(__SSE2__)
  auto copy_16 = [&] {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + done),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + done)));
    done += 16;
  };
#if defined(BREGMAN_AVX512)
  while (done + 16 <= bytes && reinterpret_cast<uintptr_t>(target + done) % 64) copy_16();
  for (; done + 64 <= bytes; done += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + done), _mm512_loadu_si512(source + done));
#elif defined(BREGMAN_FMA)
  auto copy_32 = [&] {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + done),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + done)));
    done += 32;
  };
  while (done + 16 <= bytes && reinterpret_cast<uintptr_t>(target + done) % 64) copy_16();
  while (done + 64 <= bytes) copy_32(), copy_32();
#endif
  while (done + 16 <= bytes) copy_16();
#endif
  std::memcpy(target + done, source + done, size_t(bytes - done));
}
// Streamed stores are seen by other threads only after this.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Runs f with a tensor whose parameter elements [begin, begin + n), n <= kBuffer, go to a buffer, and streams them out.
constexpr int64_t kBuffer = 1024;
template <class Rule, class T, class F>
int32_t streamed(const Arrays<Rule, T>& a, int64_t begin, int64_t n, F f) {
  alignas(64) T buffer[kBuffer];
  Arrays<Rule, T> redirected = a;
  redirected.param = buffer - begin;
  const int32_t count = f(redirected);
  stream_copy(a.param + begin, buffer, n * int64_t(sizeof(T)));
  return count;
}

BREGMAN_END
