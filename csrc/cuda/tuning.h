// The numbers of the CUDA drivers, each with its evidence. None was measured on a GPU yet: they follow torch's and
// CUB's choices and the ptxas report.
#pragma once

#include <cstdint>

#include "../plan/plan.h"

namespace bregman {

#ifdef BREGMAN_EMULATE
constexpr int kThreads = 64;  // two warps: every path is taken, and a block costs 64 OS threads
constexpr int64_t kChunk = 512, kTile = 256, kMaxTileBytes = 2048;
#else
constexpr int kThreads = 256;
constexpr int64_t kChunk = 32768;       // 8 KB per warp and array at 16-bit: several vectors in flight per thread
constexpr int64_t kTile = 4096;         // 16 KB of fp32: eight blocks of a tile kernel fit an SM's shared memory
constexpr int64_t kMaxTileBytes = 98304;  // what sm_86 and sm_89 can give a block, minus the per-group arrays
#endif
// Two blocks per SM as a floor: without it ptxas aims at more and spills in two kernels (sm_90, nvcc 13.0, 2026-11-21).
constexpr int kMinBlocks = 2;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxGroups = 256;    // per tile: the per-group arrays then take 4 KB
constexpr int64_t kAlign = 8;          // groups: 16 bytes of bf16
constexpr int64_t kMinSegment = 8;     // 32 bytes, a memory sector
constexpr int kMaxGrads = 1000;        // gradient pointers that travel as a kernel argument (8 KB)

inline Tuning cuda_tuning(int64_t state_bytes, int64_t shared_bytes) {
  int64_t capacity = std::min(kMaxTileBytes, shared_bytes) / state_bytes;
  return {kChunk, kTile, kTile, kMinSegment, kMaxGroups, kAlign, capacity};
}

}  // namespace bregman
