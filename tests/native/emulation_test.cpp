// The emulation layer itself, against what the CUDA programming guide says.
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "check.h"
#include "launch.h"

namespace {

using bregman::launch;
constexpr unsigned kFull = 0xffffffffu;

// --- warps --------------------------------------------------------------------------------------------------------
template <class T> __global__ void shuffles(T* out, int width) {
  const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  const T v = static_cast<T>(100 + i);
  out[i] = __shfl_sync(kFull, v, 3, width);
  out[n + i] = __shfl_xor_sync(kFull, v, 5, width);
  out[2 * n + i] = __shfl_down_sync(kFull, v, 2, width);
  out[3 * n + i] = __shfl_up_sync(kFull, v, 2, width);
}

template <class T> void test_shuffles() {
  const int n = 64;
  for (int width : {8, 32}) {
    std::vector<T> out(4 * n);
    CHECK(launch(shuffles<T>, 1, n, 0, nullptr, out.data(), width) == cudaSuccess);
    for (int i = 0; i < n; ++i) {
      const int first = i / width * width, last = first + width - 1;
      CHECK(out[i] == T(100 + first + 3), "shfl, lane %d of width %d", i, width);
      CHECK(out[n + i] == T(100 + (i ^ 5)), "xor, lane %d", i);
      CHECK(out[2 * n + i] == T(100 + (i + 2 <= last ? i + 2 : i)), "down, lane %d of width %d", i, width);
      CHECK(out[3 * n + i] == T(100 + (i - 2 >= first ? i - 2 : i)), "up, lane %d of width %d", i, width);
    }
  }
}

// Each quarter of a warp reduces on its own, a different number of times: the masks must not disturb each other.
__global__ void quarters(int* out) {
  const int quarter = static_cast<int>(threadIdx.x) % 32 / 8;
  const unsigned mask = 0xffu << (8 * quarter);
  int v = 1;
  for (int round = 0; round <= quarter; ++round)
    for (int d = 4; d; d /= 2) v += __shfl_xor_sync(mask, v, d, 8);
  v = __shfl_sync(kFull, v, 8 * quarter);  // and the same lanes meet under another mask
  out[threadIdx.x] = v;
}

__global__ void votes(unsigned* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  unsigned* mine = out + 4 * threadIdx.x;
  mine[0] = __ballot_sync(kFull, lane % 3 == 0);
  mine[1] = static_cast<unsigned>(__any_sync(kFull, lane == 7 && threadIdx.x < 32));
  mine[2] = static_cast<unsigned>(__all_sync(kFull, lane < 31 || threadIdx.x >= 32));
  mine[3] = static_cast<unsigned>(__popc(mine[0]));
}

void test_masks_and_votes() {
  const int n = 64;
  std::vector<int> sums(n);
  launch(quarters, 1, n, 0, nullptr, sums.data());
  for (int i = 0; i < n; ++i) CHECK(sums[i] == 1 << 3 * (i % 32 / 8 + 1), "lane %d sums to %d", i, sums[i]);
  std::vector<unsigned> out(4 * n);
  launch(votes, 1, n, 0, nullptr, out.data());
  for (int i = 0; i < n; ++i) {
    CHECK(out[4 * i] == 0x49249249u && out[4 * i + 3] == 11u);
    CHECK(out[4 * i + 1] == (i < 32) && out[4 * i + 2] == (i >= 32), "any and all, thread %d", i);
  }
}

// --- memory --------------------------------------------------------------------------------------------------------
template <class T> __global__ void add(T* total) { atomicAdd(total, static_cast<T>(threadIdx.x + 1)); }

template <class T> void test_atomics() {
  T total = 0;
  launch(add<T>, 3, 100, 0, nullptr, &total);
  CHECK(total == T(3 * 5050));
}

__global__ void garbage(unsigned* fresh) {
  BREGMAN_DYNAMIC_SHARED(unsigned, dynamic);
  BREGMAN_SHARED(unsigned, fixed, 64);
  fresh[blockIdx.x * blockDim.x + threadIdx.x] = dynamic[threadIdx.x] & fixed[threadIdx.x];
  dynamic[threadIdx.x] = fixed[threadIdx.x] = 0;
}

void test_shared_is_garbage_in_every_block() {
  std::vector<unsigned> fresh(3 * 64);
  for (int round = 0; round < 2; ++round) {
    launch(garbage, 3, 64, 64 * sizeof(unsigned), nullptr, fresh.data());
    for (unsigned v : fresh) CHECK(v == kFull);
  }
}

struct Table {  // as large as a launch table
  const double* p;
  int padding[2200];
  int last;
};
__global__ void read_table(__grid_constant__ const Table table, double* out, float factor) {
  out[threadIdx.x] = *table.p * table.last * factor;
}

__global__ void indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicAdd(out + block * blockDim.x * blockDim.y * blockDim.z + thread, 1);
}

void test_launches() {
  const double p = 2;
  Table table = {};
  table.p = &p;
  table.last = 21;
  std::vector<double> out(32);
  CHECK(launch(read_table, 1, 32, 0, nullptr, table, out.data(), 2) == cudaSuccess);  // 2: converted to float
  for (double v : out) CHECK(v == 84);

  const dim3 grid(3, 2, 2), block(5, 3, 2);
  std::vector<int> seen(12 * 30);
  launch(indices, grid, block, 0, nullptr, seen.data());
  for (int n : seen) CHECK(n == 1);
  std::vector<int> wide(1024);
  launch(indices, 1, 1024, 0, nullptr, wide.data());
  CHECK(std::accumulate(wide.begin(), wide.end(), 0) == 1024);

  CHECK(launch(indices, 0, 32, 0, nullptr, seen.data()) == cudaErrorInvalidConfiguration);
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
  CHECK(launch(indices, dim3(1, 65536), 32, 0, nullptr, seen.data()) == cudaErrorInvalidConfiguration);
  CHECK(launch(indices, 1, 1025, 0, nullptr, seen.data()) == cudaErrorInvalidConfiguration);
  CHECK(launch(indices, 1, 32, 228 * 1024, nullptr, seen.data()) == cudaErrorInvalidValue);
  CHECK(std::strcmp(cudaGetErrorString(cudaErrorInvalidValue), "invalid argument") == 0);
}

__global__ void rotate(int* data, int rounds) {  // as many barriers as it takes to notice one that lets a thread by
  BREGMAN_DYNAMIC_SHARED(int, s);
  int v = data[threadIdx.x];
  for (int r = 0; r < rounds; ++r) {
    s[threadIdx.x] = v;
    __syncthreads();
    v = s[(threadIdx.x + 1) % blockDim.x];
    __syncthreads();
  }
  data[threadIdx.x] = v;
}

void test_two_hosts() {
  const auto host = [](int threads, int* wrong) {
    std::vector<int> data(threads);
    for (int round = 0; round < 5; ++round) {
      std::iota(data.begin(), data.end(), 0);
      launch(rotate, 1, threads, threads * sizeof(int), nullptr, data.data(), 20);
      for (int i = 0; i < threads; ++i) *wrong += data[i] != (i + 20) % threads;
    }
  };
  int wrong_a = 0, wrong_b = 0;
  std::thread a(host, 48, &wrong_a), b(host, 96, &wrong_b);
  a.join(), b.join();
  CHECK(wrong_a == 0 && wrong_b == 0, "%d and %d wrong", wrong_a, wrong_b);
}

}  // namespace

int main() {
  test_shuffles<int>();
  test_shuffles<unsigned>();
  test_shuffles<float>();
  test_shuffles<double>();
  test_shuffles<long long>();
  test_masks_and_votes();
  test_atomics<int>();
  test_atomics<unsigned>();
  test_atomics<unsigned long long>();
  test_atomics<float>();
  test_atomics<double>();
  test_shared_is_garbage_in_every_block();
  test_launches();
  test_two_hosts();
  return report();
}
