// The numbers of the CUDA drivers, each with its evidence. None was measured on a GPU yet: they follow torch's and
// CUB's choices and the ptxas report.
#pragma once

#include <cstdint>

#include "../plan/plan.h"

namespace bregman {

#ifdef BREGMAN_EMULATE
constexpr int kThreads = 64;  // two warps: every path is taken, and a block costs 64 OS threads
constexpr int64_t kChunk = 512, kTile = 256, kMaxTileBytes = 2048, kMaxGroups = 128, kWorkers = 8;
#else
constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;
constexpr int64_t kTile = 4096;           // 16 KB of fp32
constexpr int64_t kMaxTileBytes = 98304;
constexpr int64_t kWorkers = 400;         // blocks: three on each of an H200's 132 multiprocessors
constexpr int64_t kMaxGroups = 512;       // per tile: the per-group arrays take 10 KB, in a metric 20
#endif
// Two blocks per SM as a floor: without it ptxas aims at more and spills in two kernels (sm_90, nvcc 13.0, 2026-11-21).
constexpr int kMinBlocks = 2;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kVector = 16;        // bytes of a memory access
constexpr int64_t kSegment = 128;      // bytes: a memory line
constexpr int64_t kLeastSegment = 32;  // bytes: a memory sector
constexpr int kMaxGrads = 1000;        // gradient pointers that travel as a kernel argument (8 KB)

// `state_bytes` are those that an element takes on chip, `shared_bytes` those that a tile may have there.
inline Tuning cuda_tuning(int64_t element_bytes, int64_t state_bytes, int64_t shared_bytes) {
  const int64_t capacity = std::min(kMaxTileBytes, shared_bytes) / state_bytes;
  return {kChunk, kTile, kTile, kSegment / element_bytes, kLeastSegment / element_bytes, kMaxGroups,
          kVector / element_bytes, capacity, std::min(kTile, capacity), kWorkers};
}

}  // namespace bregman
