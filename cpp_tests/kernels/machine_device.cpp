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
};

const std::vector<Model>& models() {
  // sm_90 runs the kernels of sm_80 through PTX of its own.
  static const std::vector<Model> all = {{"machine sm_80", ptx::kSm80, {1, 2, 3}},
                                         {"machine sm_89", ptx::kSm89, {4, 5, 6}},
                                         {"machine sm_90", ptx::kSm90, {7, 8, 9}}};
  return all;
}

}  // namespace

std::string device_unavailable() {
  static const std::string reason = load_kernels();
  return reason;
}

// Whether this build has code for the model: sm_80 code also serves 8.9, sm_90 needs its own.
bool is_built(const ptx::Device& device) {
  flashtile_build_info info = {};
  info.struct_size = sizeof info;
  if (flashtile_get_build_info(&info) != FLASHTILE_OK) return false;
  const std::string built = info.cuda_architectures;
  const std::string own = std::to_string(device.compute_capability());
  return built.find(own) != std::string::npos ||
         (own[0] == '8' && built.find("80") != std::string::npos);
}

// FLASHTILE_TEST_DEVICE picks one model (mutation tests run only what a mutant can break).
std::vector<Schedule> schedules() {
  const char* only = std::getenv("FLASHTILE_TEST_DEVICE");
  std::vector<Schedule> all;
  for (size_t round = 0; round < 3; ++round) {
    for (const Model& model : models()) {
      if (!is_built(model.device)) continue;
      if (only != nullptr && std::string(model.name).find(only) == std::string::npos) continue;
      all.push_back({model.name, model.device.smem_optin, model.seeds[round]});
    }
  }
  return all;
}

void begin(const Schedule& schedule) {
  for (const Model& model : models()) {
    if (schedule.device == model.name) ptx::machine().configure(model.device);
  }
  ptx::machine().set_seed(schedule.seed);
  ptx::machine().clear_reports();
  ptx::machine().reset_counters();
}

std::string finish() {
  return ptx::machine().reports().empty() ? "" : ptx::machine().reports_text();
}

}  // namespace flashtile::test
