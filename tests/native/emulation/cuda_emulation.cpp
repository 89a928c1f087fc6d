#include "cuda_emulation.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace emulation {
namespace {

constexpr unsigned kMaxThreads = 1024, kMaxShared = 227 * 1024, kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;
constexpr std::size_t kMaxArguments = 32764;  // bytes of kernel arguments, CUDA >= 12.1
constexpr int kGarbage = 0xff;                // all ones: NaN in every float format, and no valid index
constexpr int kMaxMasks = 16;                 // different masks that one warp uses in one launch

// A raw futex: std::atomic::wait counts its waiters in atomics that all barriers share, and TSan would take those for
// synchronisation between threads that never met.
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t seen) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void futex_wake(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, kMaxThreads, nullptr, nullptr, 0);
}
std::uint32_t wait_while(std::atomic<std::uint32_t>& word, std::uint32_t seen) {
  constexpr int kYields = 3;  // before it sleeps: 0.30 s instead of 0.40 s for 200 blocks x 128 threads on 2 cores
  for (int i = 0; i < kYields && word.load(std::memory_order_relaxed) == seen; ++i) sched_yield();
  std::uint32_t now;
  while ((now = word.load(std::memory_order_acquire)) == seen) futex_wait(word, seen);
  return now;
}

struct Barrier {
  alignas(64) std::atomic<std::uint32_t> arrived{0};
  std::atomic<std::uint32_t> generation{0};

  // The last thread to arrive calls `last` before it wakes the others; they call `sleep` before they sleep.
  template <class Last, class Sleep> void wait(std::uint32_t expected, Last last, Sleep sleep) {
    const std::uint32_t seen = generation.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == expected) {
      arrived.store(0, std::memory_order_relaxed);
      last();
      generation.store(seen + 1, std::memory_order_release);
      if (expected > 1) futex_wake(generation);
    } else {
      sleep();
      wait_while(generation, seen);
    }
  }
};

struct Exchange {  // the meeting point of the lanes of one mask
  std::atomic<std::uint32_t> mask{0};
  Barrier barrier;
  // Two sets in turn: a lane posts to a set again only after the meeting in between, so nobody still reads it.
  std::uint64_t slots[2][32];
};

struct Worker {
  std::atomic<std::uint32_t> ticket{0};
  // What it waits for, or null; read only to explain a deadlock.
  std::atomic<const char*> what{nullptr}, file{nullptr};
  std::atomic<unsigned> line{0};
};

struct Launch {
  unsigned threads;
  dim3 grid;
  void (*body)(void*);
  void* context;
  std::size_t shared_bytes;
  unsigned char* shared;
};

constexpr std::uint64_t kExited = std::uint64_t{1} << 32;

Launch g_launch;
Barrier g_syncthreads, g_block_end;
std::atomic<unsigned> g_sync_line{0};   // of the threads that are at __syncthreads now
std::atomic<std::uint32_t> g_working;   // workers that have not finished the launch
// Threads of the block that run (low half) and that have left the kernel (high half). When the last running thread
// starts to wait, nobody is left to wake it: so a divergent barrier is found, and without a timeout. Relaxed
// throughout, as these counts must order nothing.
std::atomic<std::uint64_t> g_state;
std::array<std::array<Exchange, kMaxMasks>, kMaxThreads / 32> g_warps;
std::deque<Worker>& g_workers = *new std::deque<Worker>;  // never destroyed: the threads sleep in it at exit
pid_t g_workers_of = 0;                                   // threads do not survive a fork
std::mutex g_one_launch, g_shared_list;
SharedBase* g_shared_arrays = nullptr;
thread_local cudaError_t t_last_error = cudaSuccess;
thread_local unsigned t_thread = 0;  // linear index in the block

std::string describe_block() {
  std::vector<std::pair<std::string, int>> counts;
  for (unsigned i = 0; i < g_launch.threads; ++i) {
    const Worker& w = g_workers[i];
    const char* what = w.what.load(std::memory_order_relaxed);
    const std::string text =
        what ? std::string("wait at ") + what + " (" + w.file.load() + ":" + std::to_string(w.line.load()) + ")"
             : "left the kernel";
    if (counts.empty() || counts.back().first != text) counts.emplace_back(text, 0);
    ++counts.back().second;
  }
  std::string result;
  for (const auto& [text, count] : counts) result += "\n  " + std::to_string(count) + " threads " + text;
  return result;
}

void stop_running(std::uint64_t change) {
  const std::uint64_t now = g_state.fetch_add(change - 1, std::memory_order_relaxed) + change - 1;
  if (now % kExited == 0 && now / kExited != g_launch.threads)
    fail("barrier divergence: the block cannot go on; in thread order%s", describe_block().c_str());
}

template <class Last> void meet(Barrier& barrier, unsigned expected, const char* what, const Site& site, Last last) {
  Worker& me = g_workers[t_thread];
  me.file.store(site.file_name(), std::memory_order_relaxed);
  me.line.store(site.line(), std::memory_order_relaxed);
  me.what.store(what, std::memory_order_relaxed);
  const auto wake = [&] {
    last();
    g_state.fetch_add(expected - 1, std::memory_order_relaxed);
  };
  barrier.wait(expected, wake, [] { stop_running(0); });
  me.what.store(nullptr, std::memory_order_relaxed);
}

void prepare_block() {
  std::memset(g_launch.shared, kGarbage, g_launch.shared_bytes);
  const std::lock_guard lock(g_shared_list);
  for (SharedBase* s = g_shared_arrays; s; s = s->next_) std::memset(s->data_, kGarbage, s->bytes_);
  g_state.store(g_launch.threads, std::memory_order_relaxed);
}

void run_blocks() {
  const dim3 grid = g_launch.grid;
  const unsigned i = t_thread, x = blockDim.x, y = blockDim.y;
  threadIdx = {i % x, i / x % y, i / (x * y)};
  for (unsigned bz = 0; bz < grid.z; ++bz)
    for (unsigned by = 0; by < grid.y; ++by)
      for (unsigned bx = 0; bx < grid.x; ++bx) {
        blockIdx = {bx, by, bz};
        g_launch.body(g_launch.context);
        stop_running(kExited);
        const bool more = bx + 1 < grid.x || by + 1 < grid.y || bz + 1 < grid.z;
        if (more) g_block_end.wait(g_launch.threads, prepare_block, [] {});
      }
}

void work(Worker* me, unsigned thread) {
  t_thread = thread;
  for (std::uint32_t seen = 0;;) {
    seen = wait_while(me->ticket, seen);
    run_blocks();
    if (g_working.fetch_sub(1, std::memory_order_acq_rel) == 1) futex_wake(g_working);
  }
}

cudaError_t check(dim3 grid, dim3 block, std::size_t smem, std::size_t argument_bytes) {
  const bool blocks = grid.x && grid.y && grid.z && grid.x <= kMaxGridX && grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ;
  const bool threads = block.x && block.y && block.z && block.x <= kMaxThreads && block.y <= kMaxThreads &&
                       block.z <= 64 && block.x * block.y * block.z <= kMaxThreads;
  if (!blocks || !threads) return cudaErrorInvalidConfiguration;
  return smem <= kMaxShared && argument_bytes <= kMaxArguments ? cudaSuccess : cudaErrorInvalidValue;
}

void start_workers(unsigned threads) {
  if (g_workers_of != getpid()) g_workers.clear();
  g_workers_of = getpid();
  while (g_workers.size() < threads) {
    Worker* worker = &g_workers.emplace_back();
    std::thread(work, worker, static_cast<unsigned>(g_workers.size() - 1)).detach();
  }
}

}  // namespace

void fail(const char* format, ...) {
  char text[4096];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  std::fprintf(stderr, "CUDA emulation, block (%u, %u, %u), thread (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y,
               blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, text);
  std::abort();
}

void check_alignment(const void* p, std::size_t alignment, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignment)
    fail("%s: misaligned address %p, %zu bytes need an address that is a multiple of %zu", what, p, alignment,
         alignment);
}

unsigned char* dynamic_shared() { return g_launch.shared; }
int lane() { return static_cast<int>(t_thread % 32); }

void block_barrier(const Site& site) {
  unsigned line = 0;
  if (!g_sync_line.compare_exchange_strong(line, site.line(), std::memory_order_relaxed) && line != site.line())
    fail("barrier divergence: this thread is at __syncthreads in line %u, others of its block in line %u of %s",
         site.line(), line, site.file_name());
  meet(g_syncthreads, g_launch.threads, "__syncthreads", site,
       [] { g_sync_line.store(0, std::memory_order_relaxed); });
}

const std::uint64_t* warp_exchange(unsigned mask, std::uint64_t bits, const char* what, const Site& site) {
  const unsigned warp = t_thread / 32, first = warp * 32;
  const unsigned existing = std::min(32u, g_launch.threads - first);
  if (existing < 32 && mask == 0xffffffffu) mask = (1u << existing) - 1;  // a full mask means the whole warp
  if (!(mask >> lane() & 1) || (existing < 32 && mask >> existing))
    fail("%s (%s:%u): mask %08x leaves out lane %d, which calls, or names lanes that do not exist", what,
         site.file_name(), site.line(), mask, lane());
  for (Exchange& e : g_warps[warp]) {
    std::uint32_t owner = 0;
    if (!e.mask.compare_exchange_strong(owner, mask, std::memory_order_relaxed) && owner != mask) continue;
    std::uint64_t* slots = e.slots[e.barrier.generation.load(std::memory_order_relaxed) % 2];
    slots[lane()] = bits;
    meet(e.barrier, static_cast<unsigned>(std::popcount(mask)), what, site, [] {});
    return slots;
  }
  fail("%s: more than %d different masks in one warp", what, kMaxMasks);
}

std::uint64_t posted_by(const std::uint64_t* slots, unsigned mask, int source, const char* what, const Site& site) {
  const bool exists = source >= 0 && source < 32 && t_thread / 32 * 32 + source < g_launch.threads;
  if (!exists || !(mask >> source & 1))
    fail("%s (%s:%u) reads lane %d, which is not in mask %08x or not in the block", what, site.file_name(), site.line(),
         source, mask);
  return slots[source];
}

SharedBase::SharedBase(void* data, std::size_t bytes) : data_(data), bytes_(bytes) {
  std::memset(data, kGarbage, bytes);
  const std::lock_guard lock(g_shared_list);
  next_ = g_shared_arrays;
  g_shared_arrays = this;
}

cudaError_t run(dim3 grid, dim3 block, std::size_t smem, std::size_t argument_bytes, void (*body)(void*),
                void* context) {
  t_last_error = check(grid, block, smem, argument_bytes);
  if (t_last_error != cudaSuccess) return t_last_error;
  const std::lock_guard lock(g_one_launch);
  void* shared = nullptr;  // exactly the size asked for, so that ASan sees the first byte past it
  if (posix_memalign(&shared, 16, smem)) fail("no memory for %zu bytes of shared memory", smem);
  const unsigned threads = block.x * block.y * block.z;
  start_workers(threads);
  g_launch = {threads, grid, body, context, smem, static_cast<unsigned char*>(shared)};
  gridDim = grid;
  blockDim = block;
  for (unsigned warp = 0; warp * 32 < threads; ++warp)
    for (Exchange& e : g_warps[warp]) e.mask.store(0, std::memory_order_relaxed);
  prepare_block();
  g_working.store(threads, std::memory_order_relaxed);
  for (unsigned i = 0; i < threads; ++i) {
    g_workers[i].ticket.fetch_add(1, std::memory_order_release);
    futex_wake(g_workers[i].ticket);
  }
  for (std::uint32_t left; (left = g_working.load(std::memory_order_acquire)) != 0;) futex_wait(g_working, left);
  std::free(shared);
  return cudaSuccess;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
  }
  return "unknown error";
}

cudaError_t cudaGetLastError() { return std::exchange(emulation::t_last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : static_cast<int>(emulation::kMaxShared);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
