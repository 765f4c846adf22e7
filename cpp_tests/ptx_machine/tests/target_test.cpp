// Which of several modules with one kernel a device runs.
#include "text_kernel.h"

namespace {

using ptx_test::Buffer;

std::string stores(int value) {
  return ".visible .entry which(.param .u64 out)\n{\n.reg .b64 %d<2>;\n"
         "ld.param.u64 %d0, [out];\nst.global.u32 [%d0], " +
         std::to_string(value) + ";\nret;\n}\n";
}

uint32_t run_on(const ptx::Device& device) {
  Buffer<uint32_t> out(1);
  uint32_t* pointer = out.get();
  ptx_test::hopper_machine();
  ptx::machine().configure(device);
  return ptx_test::launch_text("which", 1, 0, {&pointer}) ? out[0] : 0;
}

}  // namespace

TEST("sm_90a code runs on 9.0 alone, and before that of sm_90") {
  ptx_test::load_text(stores(801), "sm_80");
  CHECK_EQ(run_on(ptx::kSm90), 801u);
  ptx_test::load_text(stores(911), "sm_90a");
  CHECK_EQ(run_on(ptx::kSm90), 911u);
  ptx_test::load_text(stores(901), "sm_90");
  CHECK_EQ(run_on(ptx::kSm90), 911u);
  ptx::Device later = ptx::kSm90;
  later.cc_major = 10;
  CHECK_EQ(run_on(later), 901u);
  CHECK_EQ(run_on(ptx::kSm89), 801u);
}
