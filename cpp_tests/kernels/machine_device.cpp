// The PTX machine as the device of the kernel tests. Kernels come from the manifest that CMake
// wrote (FLASHTILE_PTX_MANIFEST; the environment variable of the same name overrides it).
#include <cstdlib>

#include "device.h"
#include "machine.h"

namespace flashtile::test {
namespace {

std::string manifest_path() {
  const char* path = std::getenv("FLASHTILE_PTX_MANIFEST");
  return path != nullptr ? path : FLASHTILE_PTX_MANIFEST;
}

// Returns why the kernels could not be loaded.
std::string load_kernels() {
  if (ptx::machine().load_manifest(manifest_path())) return "";
  return "cannot load " + manifest_path() + ": " + ptx::machine().reports_text();
}

struct Model {
  const char* name;
  const ptx::Device& device;
  std::vector<uint64_t> seeds;
  bool has_sm90 = false;
  bool repeats_sm80 = false;  // the same PTX
};

const std::vector<Model>& models() {
  // sm_90 has a driver without tensor maps: it runs the PTX of sm_80, where there is one in make
  // test-nightly alone.
  // sm_90a runs those that only it has, with so few multiprocessors that a block gets many tiles.
  static const ptx::Device sm90_old_driver = [] {
    ptx::Device device = ptx::kSm90;
    device.driver_version = 11080;
    return device;
  }();
  static const ptx::Device sm90a = [] {
    ptx::Device device = ptx::kSm90;
    device.sm_count = 3;
    return device;
  }();
  static const std::vector<Model> all = {{"machine sm_80", ptx::kSm80, {1, 2, 3}},
                                         {"machine sm_89", ptx::kSm89, {4, 5, 6}},
                                         {"machine sm_90", sm90_old_driver, {7, 8, 9}, false, true},
                                         {"machine sm_90a", sm90a, {10, 11, 12, 14, 15}, true}};
  return all;
}

}  // namespace

std::string device_unavailable() {
  static const std::string reason = load_kernels();
  return reason;
}

// Whether this build has code for the model: sm_80 code also serves 8.9, sm_90 and sm_90a need
// their own.
bool is_built(const Model& model) {
  flashtile_build_info info = {};
  info.struct_size = sizeof info;
  if (flashtile_get_build_info(&info) != FLASHTILE_OK) return false;
  const std::string built = info.cuda_architectures;
  if (model.has_sm90) return built.find("90a") != std::string::npos;
  const std::string own = std::to_string(model.device.compute_capability());
  return built.find(own) != std::string::npos ||
         (own[0] == '8' && built.find("80") != std::string::npos);
}

// FLASHTILE_TEST_DEVICE picks one model, "sm_80" (mutation tests run only what a mutant can break).
std::vector<Schedule> schedules() {
  const char* only = std::getenv("FLASHTILE_TEST_DEVICE");
  std::vector<Schedule> all;
  constexpr size_t kMostSeeds = 5;
  for (size_t round = 0; round < kMostSeeds; ++round) {
    for (const Model& model : models()) {
      if (!is_built(model) || round >= model.seeds.size()) continue;
      const bool repeats = model.repeats_sm80 && is_built(models().front()) && !is_nightly();
      if (only == nullptr ? repeats : model.name != std::string("machine ") + only) continue;
      all.push_back({model.name, model.device.smem_optin, model.seeds[round], model.has_sm90});
    }
  }
  return all;
}

// Most seeds have several blocks side by side, as blocks that take turns at dQ need.
void begin(const Schedule& schedule, bool deterministic) {
  for (const Model& model : models()) {
    if (schedule.device == model.name) ptx::machine().configure(model.device);
  }
  ptx::machine().set_seed(schedule.seed);
  ptx::machine().set_resident_blocks(schedule.seed % 5 == 0 ? 1 : 4);
  ptx::machine().set_ordered_sums(deterministic);
  ptx::machine().clear_reports();
  ptx::machine().reset_counters();
}

std::string finish() {
  return ptx::machine().reports().empty() ? "" : ptx::machine().reports_text();
}

std::string second_device_unavailable() {
  ptx::machine().set_device_count(2);
  return "";
}

std::function<void()> captured(const std::function<void(CUstream_st*)>& enqueue) {
  return [enqueue] { enqueue(nullptr); };
}

}  // namespace flashtile::test
