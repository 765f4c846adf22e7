// One tiny kernel per error class: it must be reported, under every seed, and its benign twin not.
#include <cstring>

#include "run.h"

namespace {

using ptx_test::Array;

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ void copy_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__global__ void write_then_read(int* out, bool sync) {  // another warp's element
  __shared__ int s[64];
  const int t = static_cast<int>(threadIdx.x);
  s[t] = 0;
  __syncthreads();
  s[t] = t;
  if (sync) __syncthreads();
  out[t] = s[t ^ 32];
}
__global__ void read_then_write(int* out, bool sync) {
  __shared__ int s[64];
  const int t = static_cast<int>(threadIdx.x);
  s[t] = t;
  __syncthreads();
  out[t] = s[t ^ 32];
  if (sync) __syncthreads();
  s[t] = 3;
}
__global__ void inside_a_warp(int* out, bool sync) {
  __shared__ int s[32];
  const int t = static_cast<int>(threadIdx.x);
  s[t] = t;
  if (sync) __syncwarp();
  out[t] = s[t ^ 1];
}
__global__ void two_blocks(int* out, bool apart) {
  out[apart ? blockIdx.x : 0] = static_cast<int>(blockIdx.x);
}
__global__ void block_reads_other(const int* in, int* out, bool same) {
  if (threadIdx.x == 0) out[blockIdx.x] = in[same ? blockIdx.x + 2 : 1 - blockIdx.x];
}
__global__ void no_wait(const int4* in, int4* out, bool waits) {
  __shared__ int4 s[64];
  const int t = static_cast<int>(threadIdx.x);
  copy_16(&s[t], in + t);
  commit();
  if (waits) wait<0>();
  __syncthreads();
  out[t] = s[63 - t];
}
__global__ void wait_without_barrier(const int4* in, int4* out, bool sync) {
  __shared__ int4 s[64];
  const int t = static_cast<int>(threadIdx.x);
  copy_16(&s[t], in + t);
  commit();
  wait<0>();
  if (sync) __syncthreads();
  out[t] = s[63 - t];
}
__global__ void wait_too_lax(const int4* in, int4* out, bool strict) {
  __shared__ int4 s[2][32];
  const int t = static_cast<int>(threadIdx.x);
  copy_16(&s[0][t], in + t);
  commit();
  copy_16(&s[1][t], in + t);
  commit();
  if (strict)
    wait<0>();
  else
    wait<1>();
  out[t] = s[0][t];
  out[t] = s[1][t];
}
__global__ void overwrite_in_flight(const int4* in, int4* out, bool waits) {
  __shared__ int4 s[32];
  const int t = static_cast<int>(threadIdx.x);
  copy_16(&s[t], in + t);
  commit();
  if (waits) wait<0>();
  s[t] = make_int4(1, 2, 3, 4);
  wait<0>();
  out[t] = s[t];
}
__global__ void uninitialised(int* out, int written) {
  __shared__ int s[64];
  const int t = static_cast<int>(threadIdx.x);
  if (t < written) s[t] = t;
  __syncthreads();
  out[t] = s[t];
}
__global__ void global_index(const int* in, int* out, int read, int write) {
  out[static_cast<int>(threadIdx.x) + write] = in[static_cast<int>(threadIdx.x) + read];
}
__global__ void shared_index(int* out, int shift) {
  extern __shared__ int dynamic[];
  dynamic[threadIdx.x + shift] = 1;
  out[threadIdx.x] = 0;
}
__global__ void vector_load(const int* in, int4* out, int shift) {
  out[threadIdx.x] = *reinterpret_cast<const int4*>(in + 4 * threadIdx.x + shift);
}
__global__ void barrier_in_branch(int* out, int limit) {
  out[threadIdx.x] = 1;
  if (static_cast<int>(threadIdx.x) < limit)
    asm volatile("bar.sync 0; // some" ::: "memory");
  else
    asm volatile("bar.sync 0; // others" ::: "memory");
  out[threadIdx.x] = 2;
}
__global__ void shuffle_in_branch(int* out, int limit) {
  const int t = static_cast<int>(threadIdx.x);
  int v = t;
  if (t < limit) asm volatile("shfl.sync.bfly.b32 %0, %0, 16, 31, 0xffffffff;" : "+r"(v));
  out[t] = v;
}
__global__ void missing_warp(int* out, int participants) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (warp == 0)
    asm volatile("bar.sync 1, %0;" ::"r"(participants) : "memory");
  else
    asm volatile("bar.sync 2, %0;" ::"r"(participants) : "memory");
  out[threadIdx.x] = warp;
}
__global__ void spin(volatile int* flag, int* out) {
  while (*flag == 0) {
  }
  out[0] = 1;
}
__global__ void odd_opcode(uint32_t* out, bool run) {
  uint32_t x = 1;
  if (run) asm volatile("dp4a.u32.u32 %0, %0, %0, %0;" : "+r"(x));
  out[0] = x;
}
__global__ void __launch_bounds__(64) small_block(int* out) { out[threadIdx.x] = 1; }
__global__ void gives_up(int* out, bool fails) {
  if (fails) __trap();
  out[0] = 1;
}

// Launches under several seeds; every one must end in a report of `kind`, or in none.
template <class Launch>
void expect(ptx::Error kind, Launch launch, const char* mention = "") {
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    ptx::Machine& machine = ptx_test::fresh_machine(seed);
    machine.set_budget(20000);
    launch();
    const bool failed = cudaGetLastError() != cudaSuccess;
    if (kind == ptx::Error::kNone) {
      CHECK(!failed);
      ptx_test::check_clean();
      continue;
    }
    CHECK(failed);
    CHECK_EQ(machine.reports().size(), 1u);
    if (machine.reports().size() != 1) return;
    const ptx::Report& report = machine.reports().front();
    CHECK_MESSAGE(report.kind == kind, report.to_string());
    CHECK_MESSAGE(report.to_string().find(mention) != std::string::npos, report.to_string());
    const bool runs = kind != ptx::Error::kLaunch && kind != ptx::Error::kUnsupported;
    if (runs)
      CHECK_MESSAGE(report.file.ends_with("errors_test.cu") && report.line > 0, report.to_string());
  }
}

constexpr ptx::Error kNone = ptx::Error::kNone;

}  // namespace

TEST("a race on shared memory is reported") {
  const Array<int> out(64);
  expect(ptx::Error::kRace, [&] { write_then_read<<<1, 64>>>(out.get(), false); }, "by thread");
  expect(kNone, [&] { write_then_read<<<1, 64>>>(out.get(), true); });
  expect(ptx::Error::kRace, [&] { read_then_write<<<1, 64>>>(out.get(), false); });
  expect(kNone, [&] { read_then_write<<<1, 64>>>(out.get(), true); });
  expect(ptx::Error::kRace, [&] { inside_a_warp<<<1, 32>>>(out.get(), false); });
  expect(kNone, [&] { inside_a_warp<<<1, 32>>>(out.get(), true); });
}
TEST("a race of two blocks on global memory is reported") {
  const Array<int> out(4), in(4);
  expect(ptx::Error::kRace, [&] { two_blocks<<<2, 1>>>(out.get(), false); }, "another block");
  expect(kNone, [&] { two_blocks<<<2, 1>>>(out.get(), true); });
  expect(ptx::Error::kRace, [&] { block_reads_other<<<2, 32>>>(out.get(), out.get(), false); });
  expect(kNone, [&] { block_reads_other<<<2, 32>>>(out.get(), out.get(), true); });
  expect(kNone, [&] { block_reads_other<<<2, 32>>>(in.get(), out.get(), false); });
}
TEST("cp.async without its wait is reported") {
  const Array<int4> in(64), out(64);
  expect(
      ptx::Error::kInFlight, [&] { no_wait<<<1, 64>>>(in.get(), out.get(), false); }, "in flight");
  expect(kNone, [&] { no_wait<<<1, 64>>>(in.get(), out.get(), true); });
  expect(ptx::Error::kInFlight, [&] { wait_too_lax<<<1, 32>>>(in.get(), out.get(), false); });
  expect(kNone, [&] { wait_too_lax<<<1, 32>>>(in.get(), out.get(), true); });
  expect(ptx::Error::kInFlight,
         [&] { overwrite_in_flight<<<1, 32>>>(in.get(), out.get(), false); });
  expect(kNone, [&] { overwrite_in_flight<<<1, 32>>>(in.get(), out.get(), true); });
}
TEST("cp.async data of another thread without a barrier is reported") {
  const Array<int4> in(64), out(64);
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    ptx::Machine& machine = ptx_test::fresh_machine(seed);
    wait_without_barrier<<<1, 64>>>(in.get(), out.get(), false);
    CHECK_EQ(machine.reports().size(), 1u);
    // Which of the three depends on how far the other thread has come.
    const ptx::Error kind = machine.reports().empty() ? kNone : machine.reports()[0].kind;
    CHECK(kind == ptx::Error::kRace || kind == ptx::Error::kInFlight ||
          kind == ptx::Error::kUninitialised);
  }
  expect(kNone, [&] { wait_without_barrier<<<1, 64>>>(in.get(), out.get(), true); });
}
TEST("reading shared memory that nobody wrote is reported") {
  const Array<int> out(64);
  expect(
      ptx::Error::kUninitialised, [&] { uninitialised<<<1, 64>>>(out.get(), 63); },
      "nothing has written");
  expect(kNone, [&] { uninitialised<<<1, 64>>>(out.get(), 64); });
}
TEST("accesses out of bounds are reported") {
  const Array<int> in(32), out(32);
  expect(
      ptx::Error::kOutOfBounds, [&] { global_index<<<1, 32>>>(in.get(), out.get(), 1, 0); },
      "read of 4 bytes");
  expect(
      ptx::Error::kOutOfBounds, [&] { global_index<<<1, 32>>>(in.get(), out.get(), -1, 0); },
      "before its begin");
  expect(
      ptx::Error::kOutOfBounds, [&] { global_index<<<1, 32>>>(in.get(), out.get(), 0, 1); },
      "write of 4 bytes");
  expect(kNone, [&] { global_index<<<1, 32>>>(in.get(), out.get(), 0, 0); });
  expect(
      ptx::Error::kOutOfBounds, [&] { shared_index<<<1, 32, 128>>>(out.get(), 1); },
      "128 bytes of shared");
  expect(kNone, [&] { shared_index<<<1, 32, 128>>>(out.get(), 0); });
}
TEST("misaligned accesses are reported") {
  const Array<int> in(132);
  const Array<int4> out(32);
  expect(
      ptx::Error::kMisaligned, [&] { vector_load<<<1, 32>>>(in.get(), out.get(), 1); },
      "multiple of 16");
  expect(kNone, [&] { vector_load<<<1, 32>>>(in.get(), out.get(), 4); });
}
TEST("divergent collectives are reported") {
  const Array<int> out(64);
  expect(
      ptx::Error::kDivergence, [&] { barrier_in_branch<<<1, 64>>>(out.get(), 16); },
      "different instructions");
  expect(kNone, [&] { barrier_in_branch<<<1, 64>>>(out.get(), 32); });
  expect(ptx::Error::kDivergence, [&] { shuffle_in_branch<<<1, 32>>>(out.get(), 16); });
  expect(kNone, [&] { shuffle_in_branch<<<1, 32>>>(out.get(), 32); });
}
TEST("a deadlock is reported with where everybody waits") {
  const Array<int> out(64);
  expect(
      ptx::Error::kDeadlock, [&] { missing_warp<<<1, 64>>>(out.get(), 64); },
      "warp 1: lanes 0xffffffff wait at barrier 2");
  expect(kNone, [&] { missing_warp<<<1, 64>>>(out.get(), 32); });
}
TEST("an endless loop is reported") {
  const Array<int> off(std::vector<int>{0}), on(std::vector<int>{1}), out(1);
  expect(ptx::Error::kLivelock, [&] { spin<<<1, 1>>>(off.get(), out.get()); }, "without an end");
  expect(kNone, [&] { spin<<<1, 1>>>(on.get(), out.get()); });
}
TEST("an unknown instruction is reported") {
  const Array<uint32_t> out(1);
  expect(ptx::Error::kUnsupported, [&] { odd_opcode<<<1, 1>>>(out.get(), true); }, "dp4a.u32.u32");
}
TEST("a trap is reported") {
  const Array<int> out(1);
  expect(ptx::Error::kTrap, [&] { gives_up<<<1, 1>>>(out.get(), true); });
  expect(kNone, [&] { gives_up<<<1, 1>>>(out.get(), false); });
}
TEST("launches that the device refuses are reported") {
  const Array<int> out(64);
  expect(
      ptx::Error::kLaunch, [&] { shared_index<<<1, 32, 50000>>>(out.get(), 0); },
      "cudaFuncSetAttribute allows 49152");
  expect(ptx::Error::kLaunch, [&] { small_block<<<1, 65>>>(out.get()); }, "at most 64");
  expect(kNone, [&] { small_block<<<1, 64>>>(out.get()); });
  ptx_test::fresh_machine(1, ptx::kSm89);
  CHECK(cudaFuncSetAttribute(shared_index, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             100 * 1024) != cudaSuccess);
  cudaGetLastError();
  CHECK(cudaFuncSetAttribute(shared_index, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             99 * 1024) == cudaSuccess);
  shared_index<<<1, 32, 99 * 1024>>>(out.get(), 0);
  ptx_test::check_clean();
}
