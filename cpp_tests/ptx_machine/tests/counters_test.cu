// Counters of kernels whose traffic can be counted by hand, and reproducible schedules.
#include "run.h"

namespace {

using ptx_test::Array;

__global__ void stream(const float4* in, float4* out) { out[threadIdx.x] = in[threadIdx.x]; }
__global__ void strided(const float* in, float* out, int stride) {
  out[threadIdx.x] = in[threadIdx.x * stride];
}
__global__ void bank_conflicts(float* out, int stride) {
  __shared__ float s[32 * 33];
  for (int i = 0; i < 33; ++i) s[32 * i + threadIdx.x] = 0.0f;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x * stride];
}
__global__ void order(int* log, int* count) {
  if (threadIdx.x % 32 == 0)
    log[atomicAdd(count, 1)] = static_cast<int>(blockIdx.x * 4 + threadIdx.x / 32);
}

uint64_t conflict_wavefronts(int stride) {
  ptx::Machine& machine = ptx_test::fresh_machine();
  const Array<float> out(32);
  bank_conflicts<<<1, 32>>>(out.get(), stride);
  ptx_test::check_clean();
  CHECK_EQ(machine.counters().wavefronts_ideal, 34u);
  return machine.counters().wavefronts - 33;  // of the one load
}

std::vector<int> schedule(uint64_t seed) {
  ptx_test::fresh_machine(seed);
  const Array<int> log(32), count(1);
  order<<<8, 128>>>(log.get(), count.get());
  ptx_test::check_clean();
  return log.host();
}

}  // namespace

TEST("global bytes and sectors") {
  ptx::Machine& machine = ptx_test::fresh_machine();
  const Array<float4> in(64), out(64);
  stream<<<1, 64>>>(in.get(), out.get());
  ptx_test::check_clean();
  CHECK_EQ(machine.counters().global_read_bytes, 1024u);
  CHECK_EQ(machine.counters().global_written_bytes, 1024u);
  CHECK_EQ(machine.counters().sectors, 64u);
  CHECK_EQ(machine.counters().sectors_ideal, 64u);
  machine.reset_counters();
  const Array<float> wide(32 * 8), narrow(32);
  strided<<<1, 32>>>(wide.get(), narrow.get(), 8);
  ptx_test::check_clean();
  CHECK_EQ(machine.counters().sectors, 36u);  // one a lane, and the store
  CHECK_EQ(machine.counters().sectors_ideal, 8u);
}
TEST("bank conflicts") {
  CHECK_EQ(conflict_wavefronts(1), 1u);
  CHECK_EQ(conflict_wavefronts(0), 1u);
  CHECK_EQ(conflict_wavefronts(2), 2u);
  CHECK_EQ(conflict_wavefronts(8), 8u);
  CHECK_EQ(conflict_wavefronts(32), 32u);
  CHECK_EQ(conflict_wavefronts(33), 1u);
}
TEST("a seed gives one schedule, other seeds others") {
  CHECK(schedule(5) == schedule(5));
  CHECK(schedule(5) != schedule(6));
  CHECK(schedule(1) != schedule(2));
}
