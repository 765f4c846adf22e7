// Prints what the tuning table plans for every kernel of this build, one JSON object a line: what
// machine code does not tell. benchmarks/sass_report.py reads it. Host code only.
#include <cstdio>

#include "backward/sm80.cuh"
#include "build_config.h"
#include "forward/sm80.cuh"

using namespace flashtile;

namespace {

struct Plan {
  const char* pass;
  int head_dim;
  Memory memory;
  int block_q, block_k, threads, blocks_per_sm, shared_bytes;
};

void print(const Plan& p) {
  std::printf("{\"kernel\": \"%s d%d %s\", \"plan\": \"%d x %d, %d, %d\", \"shared_bytes\": %d}\n",
              p.pass, p.head_dim, p.memory == Memory::kLarge ? "large" : "small", p.block_q,
              p.block_k, p.threads / 32, p.blocks_per_sm, p.shared_bytes);
}

template <class Kernel>
void print_kernel(const char* pass, int head_dim, Memory memory) {
  print({pass, head_dim, memory, Kernel::kConfig.block_q, Kernel::kConfig.block_k, Kernel::kThreads,
         Kernel::kBlocksPerSm, Kernel::kSharedBytes});
}

template <Memory kMemory, int... kDims>
void print_forward(std::integer_sequence<int, kDims...>) {
  (print_kernel<ForwardSm80<kDims, kMemory, __half>>("forward", kDims, kMemory), ...);
}
template <Memory kMemory, int... kDims>
void print_backward(std::integer_sequence<int, kDims...>) {
  (print_kernel<BackwardSm80<__half, kDims, kMemory, false>>("backward", kDims, kMemory), ...);
}

}  // namespace

int main() {
  print_forward<Memory::kLarge>(LargeHeadDims());
  print_backward<Memory::kLarge>(LargeHeadDims());
  print_forward<Memory::kSmall>(SmallHeadDims());
  print_backward<Memory::kSmall>(SmallHeadDims());
}
