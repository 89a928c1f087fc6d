// The numbers of the CUDA drivers, each with its evidence: an H200 on 2026-11-26, fp32, 268 M parameters in 16 matrices
// ("large"), GPT-2 small and ResNet-18, as shares of a copy's bandwidth or in ms.
#pragma once

#include <cstdint>

#include "../plan/plan.h"

namespace bregman {

#ifdef BREGMAN_EMULATE
constexpr int kThreads = 64;  // two warps: every path is taken, and a block costs 64 OS threads
constexpr int kBudgetThreads = 64;
constexpr int64_t kChunk = 512, kTile = 256, kMaxTileBytes = 2048, kMaxGroups = 128, kWorkers = 8;
#else
constexpr int kThreads = 256;
constexpr int kBudgetThreads = 512;  // one block finds the root of a budget and waits for memory; 1024 spill (not measured)
// LinBreg, AdaBreg at 2048, 4096, 8192, 16384, 32768, 65536: large 90 and 97%, 93 and 95, 93 and 94, 90 and 93, 94 and
// 96, 87 and 90; GPT-2 70 and 84%, 73 and 83, 70 and 81, 61 and 74, 71 and 82, 69 and 78.
constexpr int64_t kChunk = 4096;
constexpr int64_t kTile = 4096;           // 2048 and 8192: groups of rows within 8%
constexpr int64_t kMaxTileBytes = 98304;  // input channels of ResNet-18: 0.23 ms; with 49152 0.39, with 24576 0.42
constexpr int64_t kWorkers = 400;         // blocks: three on each of 132 multiprocessors
constexpr int64_t kMaxGroups = 512;       // per tile: the per-group arrays take 10 KB, in a metric 29
#endif
constexpr int64_t kGroupBytes = 30720;  // of shared memory, for these and what is static
// Two blocks per SM as a floor: without it ptxas aims at more and spills in two kernels (sm_90, nvcc 13.0, 2026-11-21).
constexpr int kMinBlocks = 2;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kVector = 16;        // bytes of a memory access
constexpr int64_t kSegment = 128;      // bytes: input channels of large 3.0 ms; with 64 3.6, with 256 2.7 (see groups_per_tile)
constexpr int64_t kLeastSegment = 32;  // bytes: a memory sector
constexpr int kMaxGrads = 1000;        // gradient pointers that travel as a kernel argument (8 KB)

// `state_bytes` are those that an element takes on chip, `shared_bytes` those that a tile may have there.
inline Tuning cuda_tuning(int64_t element_bytes, int64_t state_bytes, int64_t shared_bytes) {
  const int64_t capacity = std::min(kMaxTileBytes, shared_bytes) / state_bytes;
  return {kChunk, kTile, kTile, kSegment / element_bytes, kLeastSegment / element_bytes, kMaxGroups,
          kVector / element_bytes, capacity, std::min(kTile, capacity), kWorkers, /*strip_rows=*/1, /*strip_columns=*/0};
}

}  // namespace bregman
