// The PTX machine as the device of the kernel tests. Kernels come from the manifest that CMake wrote
// (FLASHTILE_PTX_MANIFEST; the environment variable of the same name overrides it).
#include <cstdlib>
#include <fstream>

#include "device.h"
#include "machine.h"

namespace flashtile::test {
namespace {

std::string manifest_path() {
  const char* path = std::getenv("FLASHTILE_PTX_MANIFEST");
  return path != nullptr ? path : FLASHTILE_PTX_MANIFEST;
}

// Loads what the manifest names, once; returns why that failed.
std::string load_kernels() {
  std::ifstream manifest(manifest_path());
  if (!manifest) return "no PTX manifest at " + manifest_path();
  int count = 0;
  std::string path;
  for (int capability = 0; manifest >> capability >> path; ++count) {
    if (!ptx::machine().load_ptx(path)) return "cannot load " + path + ": " + ptx::machine().reports_text();
  }
  return count == 0 ? "the PTX manifest is empty" : "";
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

// FLASHTILE_TEST_DEVICE picks one model (mutation tests run only what a mutant can break).
std::vector<Schedule> schedules() {
  const char* only = std::getenv("FLASHTILE_TEST_DEVICE");
  std::vector<Schedule> all;
  for (size_t round = 0; round < 3; ++round) {
    for (const Model& model : models()) {
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

std::string finish() { return ptx::machine().reports().empty() ? "" : ptx::machine().reports_text(); }

}  // namespace flashtile::test
