// Warp exchange, matrices, memory, atomics, control flow: against plain C++.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "run.h"

namespace {

using ptx_test::Array;

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__global__ void exchange(int* out) {
  const int l = static_cast<int>(threadIdx.x);
  out[l] = __shfl_xor_sync(~0u, l * 10, 5);
  out[32 + l] = __shfl_up_sync(~0u, l, 3, 8);
  out[64 + l] = __shfl_down_sync(~0u, l, 3, 16);
  out[96 + l] = __shfl_sync(~0u, l, l * 7, 8);
  out[128 + l] = static_cast<int>(__ballot_sync(~0u, l % 3 == 0));
  out[160 + l] = __any_sync(~0u, l == 9) * 2 + __all_sync(~0u, l < 32);
  out[192 + l] = static_cast<int>(__match_any_sync(~0u, l / 4));
  out[224 + l] = static_cast<int>(__reduce_add_sync(~0u, static_cast<unsigned>(l)));
  out[256 + l] = static_cast<int>(__reduce_max_sync(~0u, l - 40));
  if (l & 1)
    out[288 + l] = static_cast<int>(__activemask());
  else
    out[288 + l] = static_cast<int>(__shfl_xor_sync(0x55555555u, l, 2));
}

// One warp, row-major halves: d = a b^T + c with a 16x16, b 8x16, through shared memory.
template <class T>
__global__ void multiply(const T* a, const T* b, const float* c, float* d, uint32_t* raw) {
  __shared__ __align__(128) T sa[16 * 16];
  __shared__ __align__(128) T sb[8 * 16];
  const int l = static_cast<int>(threadIdx.x);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(sa) + l * 16),
               "l"(a + l * 8)
               : "memory");
  if (l < 16) {
    const int bytes = l == 15 ? 8 : 16;  // the last four elements become zero
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(sb) + l * 16),
                 "l"(b + l * 8), "r"(bytes)
                 : "memory");
  }
  asm volatile("cp.async.commit_group; cp.async.wait_group 0;" ::: "memory");
  __syncwarp();
  uint32_t x[4], y[2], z[2];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(sa + (l % 16) * 16 + (l / 16) * 8))
               : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(y[0]), "=r"(y[1])
               : "r"(shared_address(sb + (l % 8) * 16 + (l / 8 % 2) * 8))
               : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(z[0]), "=r"(z[1])
               : "r"(shared_address(sa + (l % 16) * 16))
               : "memory");
  float r[4];
  const int row = l / 4, col = l % 4 * 2;
  const float* c0 = c + row * 8 + col;
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%11,%12,%13};"
        : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]), "f"(c0[0]), "f"(c0[1]),
          "f"(c0[64]), "f"(c0[65]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%10,%11,%12,%13};"
        : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]), "f"(c0[0]), "f"(c0[1]),
          "f"(c0[64]), "f"(c0[65]));
  }
  float* d0 = d + row * 8 + col;
  d0[0] = r[0], d0[1] = r[1], d0[64] = r[2], d0[65] = r[3];
  raw[2 * l] = z[0], raw[2 * l + 1] = z[1];
}

template <class T>
void check_multiply() {
  std::mt19937 random(3);
  std::vector<T> a(256), b(128);
  std::vector<float> c(128);
  for (T& v : a) v = T(static_cast<float>(static_cast<int>(random() % 200) - 100) / 16);
  for (T& v : b) v = T(static_cast<float>(static_cast<int>(random() % 200) - 100) / 32);
  for (float& v : c) v = static_cast<float>(random() % 100);
  ptx_test::fresh_machine();
  const Array<T> da(a), db(b);
  const Array<float> dc(c), dd(128);
  const Array<uint32_t> raw(64);
  multiply<T><<<1, 32>>>(da.get(), db.get(), dc.get(), dd.get(), raw.get());
  ptx_test::check_clean();
  for (int i = 124; i < 128; ++i) b[i] = T(0.0f);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float sum = c[m * 8 + n];  // exact here: small multiples of 1/512
      for (int k = 0; k < 16; ++k)
        sum += static_cast<float>(a[m * 16 + k]) * static_cast<float>(b[n * 16 + k]);
      CHECK_EQ(dd[m * 8 + n], sum);
    }
  }
  for (int l = 0; l < 32;
       ++l) {  // transposed: lane l holds a[2(l%4)][l/4], a[2(l%4)+1][l/4] of each 8x8
    for (int tile = 0; tile < 2; ++tile) {
      T pair[2] = {a[(8 * tile + l % 4 * 2) * 16 + l / 4],
                   a[(8 * tile + l % 4 * 2 + 1) * 16 + l / 4]};
      uint32_t expected;
      std::memcpy(&expected, pair, 4);
      CHECK_EQ(raw[2 * l + tile], expected);
    }
  }
  CHECK_EQ(ptx::machine().counters().mma, 1u);
  CHECK_EQ(ptx::machine().counters().ldmatrix, 3u);
}

struct Wide {
  int8_t byte;
  int16_t half;
  int64_t word;
  float values[5];
};

__global__ void memory(const __grid_constant__ Wide p, const int4* in, int4* out, int64_t* scalars,
                       int pick) {
  const int t = static_cast<int>(threadIdx.x);
  __shared__ int4 tile[64];
  __shared__ int8_t bytes[64];
  tile[t ^ 1] = in[t];
  bytes[t] = static_cast<int8_t>(t - 32);
  float local[8];
  for (int i = 0; i < 8; ++i) local[i] = static_cast<float>(i * t);
  local[(pick + t) & 7] += 0.5f;
  __syncthreads();
  int4 v = tile[t];
  v.x += bytes[63 - t];
  v.y = static_cast<int>(local[pick] * 2);
  out[t] = v;
  if (t == 0)
    scalars[0] = p.byte, scalars[1] = p.half, scalars[2] = p.word,
    scalars[3] = static_cast<int64_t>(p.values[pick] * 8);
}

__global__ void atomics(int* i, float* f, unsigned* u, unsigned long long* w, int* old) {
  const int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(i, t);
  old[t] = atomicAdd(i + 1, 1);
  atomicMax(i + 2, t % 50);
  atomicAdd(f, 0.5f);
  atomicInc(u, 6);
  atomicOr(u + 1, 1u << (t % 32));
  atomicAdd(w, 1ull << 33);
  atomicCAS(i + 3, t, t + 1);
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, 2);
  __syncthreads();
  if (threadIdx.x == 0) atomicExch(i + 4, sum);
}

__device__ int walk(int n) {
  int steps = 0;
  while (n > 1) n = n % 2 == 0 ? n / 2 : 3 * n + 1, ++steps;
  return steps;
}

__global__ void control(const int* in, int* out) {
  const int t = static_cast<int>(threadIdx.x);
  const int x = in[t];
  if (x < 0) {
    out[t] = -1;
    return;
  }
  int r = walk(x + 1);
  switch (x % 9) {
    case 0: r += in[0] * 3; break;
    case 1: r ^= 0x55; break;
    case 2: r = r * r; break;
    case 3: r -= 17; break;
    case 4: r = ~r; break;
    case 5: r <<= 2; break;
    case 6: r = max(r, 40); break;
    default: r += 1000; break;
  }
  for (int i = 0; i < x % 5; ++i) r += walk(i * x + 3) & 3;
  out[t] = r;
}

int control_on_host(const std::vector<int>& in, int x) {
  const auto steps = [](int n) {
    int s = 0;
    while (n > 1) n = n % 2 == 0 ? n / 2 : 3 * n + 1, ++s;
    return s;
  };
  if (x < 0) return -1;
  int r = steps(x + 1);
  switch (x % 9) {
    case 0: r += in[0] * 3; break;
    case 1: r ^= 0x55; break;
    case 2: r = r * r; break;
    case 3: r -= 17; break;
    case 4: r = ~r; break;
    case 5: r <<= 2; break;
    case 6: r = std::max(r, 40); break;
    default: r += 1000; break;
  }
  for (int i = 0; i < x % 5; ++i) r += steps(i * x + 3) & 3;
  return r;
}

// Warps 0 and 1 hand a value through shared memory by named barriers 1 and 2, many times.
__global__ void relay(int* out, int rounds) {
  __shared__ int slot[32];
  const int lane = static_cast<int>(threadIdx.x % 32);
  int sum = 0;
  for (int i = 0; i < rounds; ++i) {
    if (threadIdx.x < 32) {
      slot[lane] = i * lane;
      asm volatile("bar.arrive 1, 64;" ::: "memory");
      asm volatile("bar.sync 2, 64;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 64;" ::: "memory");
      sum += slot[31 - lane];
      asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
  }
  if (threadIdx.x >= 32) out[lane] = sum;
}

// Two warps, of which one thread may differ from the others.
__global__ void block_votes(int* out) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = __syncthreads_or(t == 37);
  out[64 + t] = __syncthreads_or(t == 100);
  out[128 + t] = __syncthreads_and(t != 37);
  out[192 + t] = __syncthreads_and(t != 100);
}

}  // namespace

TEST("shuffles, votes, match, redux") {
  ptx_test::fresh_machine();
  const Array<int> out(320);
  exchange<<<1, 32>>>(out.get());
  ptx_test::check_clean();
  for (int l = 0; l < 32; ++l) {
    CHECK_EQ(out[l], (l ^ 5) * 10);
    CHECK_EQ(out[32 + l], l % 8 < 3 ? l : l - 3);
    CHECK_EQ(out[64 + l], l % 16 + 3 > 15 ? l : l + 3);
    CHECK_EQ(out[96 + l], l / 8 * 8 + l * 7 % 8);
    CHECK_EQ(static_cast<uint32_t>(out[128 + l]), 0x49249249u);
    CHECK_EQ(out[160 + l], 3);
    CHECK_EQ(static_cast<uint32_t>(out[192 + l]), 0xFu << (l / 4 * 4));
    CHECK_EQ(out[224 + l], 496);
    CHECK_EQ(out[256 + l], -9);
    CHECK_EQ(static_cast<uint32_t>(out[288 + l]),
             l & 1 ? 0xAAAAAAAAu : static_cast<uint32_t>(l ^ 2));
  }
}
TEST("cp.async, ldmatrix and mma in fp16") { check_multiply<__half>(); }
TEST("cp.async, ldmatrix and mma in bf16") { check_multiply<__nv_bfloat16>(); }
TEST("loads and stores of every space and width") {
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    ptx_test::fresh_machine(seed);
    std::vector<int4> in(64);
    for (int i = 0; i < 64; ++i) in[i] = {i, 2 * i, 3 * i, -i};
    const Array<int4> a(in), out(64);
    const Array<int64_t> scalars(4);
    memory<<<1, 64>>>({-5, -300, 1ll << 40, {1, 2, 3, 4.5f, 5}}, a.get(), out.get(), scalars.get(),
                      3);
    ptx_test::check_clean();
    for (int t = 0; t < 64; ++t) {
      CHECK_EQ(out[t].x, (t ^ 1) + 31 - t);
      CHECK_EQ(out[t].y, 6 * t + (((3 + t) & 7) == 3 ? 1 : 0));
      CHECK_EQ(out[t].z, 3 * (t ^ 1));
      CHECK_EQ(out[t].w, -(t ^ 1));
    }
    CHECK(scalars.host() == (std::vector<int64_t>{-5, -300, 1ll << 40, 36}));
  }
}
TEST("atomics") {
  ptx_test::fresh_machine();
  const Array<int> i({0, 0, -1, 0, 0});
  const Array<float> f(std::vector<float>{1.0f});
  const Array<unsigned> u({0, 0});
  const Array<unsigned long long> w(std::vector<unsigned long long>{5});
  const Array<int> old(256);
  atomics<<<4, 64>>>(i.get(), f.get(), u.get(), w.get(), old.get());
  ptx_test::check_clean();
  CHECK_EQ(i[0], 256 * 255 / 2);
  CHECK_EQ(i[1], 256);
  CHECK_EQ(i[2], 49);
  CHECK_EQ(i[4], 128);
  CHECK_EQ(f[0], 129.0f);
  CHECK_EQ(u[0], 256u % 7);
  CHECK_EQ(u[1], ~0u);
  CHECK_EQ(w[0], 5 + 256 * (1ull << 33));
  std::vector<int> tickets = old.host();
  std::sort(tickets.begin(), tickets.end());
  for (int t = 0; t < 256; ++t) CHECK_EQ(tickets[t], t);
}
TEST("divergent control flow") {
  std::vector<int> in(100);
  for (int t = 0; t < 100; ++t) in[t] = t % 11 == 10 ? -t : t * 37 % 101;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    ptx_test::fresh_machine(seed);
    const Array<int> a(in), out(100);
    control<<<1, 100>>>(a.get(), out.get());
    ptx_test::check_clean();
    for (int t = 0; t < 100; ++t) CHECK_EQ(out[t], control_on_host(in, in[t]));
  }
}
TEST("named barriers hand over without a report") {
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    ptx_test::fresh_machine(seed);
    const Array<int> out(32);
    relay<<<1, 64>>>(out.get(), 50);
    ptx_test::check_clean();
    for (int l = 0; l < 32; ++l) CHECK_EQ(out[l], 1225 * (31 - l));
  }
}
TEST("votes of a whole block") {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    ptx_test::fresh_machine(seed);
    const Array<int> out(4 * 64);
    block_votes<<<1, 64>>>(out.get());
    ptx_test::check_clean();
    for (int t = 0; t < 64; ++t) {
      CHECK(out[t] != 0 && out[64 + t] == 0 && out[128 + t] == 0 && out[192 + t] != 0);
    }
  }
}
