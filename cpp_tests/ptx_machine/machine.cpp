// Modules, launches, reports.
#include "machine.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

#include "ops.h"
#include "warp.h"

namespace ptx {

namespace {

std::vector<std::unique_ptr<Module>>& modules() {
  static std::vector<std::unique_ptr<Module>> all;
  return all;
}

std::string demangle(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 && text != nullptr ? text : name;
  std::free(text);
  return result;
}

// The kernel compiled for the highest architecture that the device can run.
Kernel* find_kernel(const std::string& name, int capability, std::string& others) {
  Kernel* best = nullptr;
  int best_target = -1;
  for (const auto& module : modules()) {
    const auto it = module->kernels.find(name);
    if (it == module->kernels.end()) continue;
    others += (others.empty() ? "" : ", ") + std::to_string(module->target);
    if (module->specific) others += 'a';
    const bool runs =
        module->specific ? module->target == capability : module->target <= capability;
    // sm_90a before sm_90.
    const int rank = 2 * module->target + (module->specific ? 1 : 0);
    if (runs && rank > best_target) {
      best = it->second.get();
      best_target = rank;
    }
  }
  return best;
}

std::string path_tail(const std::string& path) {
  const size_t kernel = path.rfind("/kernel/");
  return kernel != std::string::npos ? path.substr(kernel + 1) : path;
}

}  // namespace

const char* name(Error kind) {
  switch (kind) {
    case Error::kNone: return "NONE";
    case Error::kRace: return "RACE";
    case Error::kInFlight: return "IN FLIGHT";
    case Error::kUninitialised: return "UNINITIALISED";
    case Error::kOutOfBounds: return "OUT OF BOUNDS";
    case Error::kMisaligned: return "MISALIGNED";
    case Error::kDivergence: return "DIVERGENCE";
    case Error::kDeadlock: return "DEADLOCK";
    case Error::kLivelock: return "LIVELOCK";
    case Error::kLaunch: return "LAUNCH";
    case Error::kUnsupported: return "UNSUPPORTED";
    case Error::kTrap: return "TRAP";
    case Error::kProxy: return "PROXY";
    case Error::kBarrier: return "MBARRIER";
    case Error::kWgmma: return "WGMMA";
    case Error::kRegisters: return "REGISTERS";
    case Error::kTensorMap: return "TENSOR MAP";
    case Error::kUnorderedSum: return "UNORDERED SUM";
  }
  return "?";
}

std::string Report::to_string() const {
  std::ostringstream out;
  out << name(kind) << ": " << text;
  if (!kernel.empty()) out << "\n    in " << kernel;
  if (line > 0) out << "\n    at " << path_tail(file) << ":" << line;
  if (!inlined_at.empty()) out << ", called from " << path_tail(inlined_at);
  if (ptx_line > 0) {
    out << (line > 0 ? ", " : "\n    at ") << "PTX line " << ptx_line << "; block (" << block[0]
        << ", " << block[1] << ", " << block[2] << "), thread " << thread;
  }
  return out.str();
}

Machine& machine() {
  static Machine instance;
  return instance;
}

bool& has_context() {
  thread_local bool has = false;
  return has;
}

void Machine::configure(const Device& device) { device_ = device; }

void Machine::set_seed(uint64_t seed) {
  seed_ = seed;
  launches_ = 0;
}

bool Machine::load_ptx(const std::string& path) {
  std::string error;
  std::unique_ptr<Module> module = load_module(path, error);
  return add_module(std::move(module), error);
}

bool Machine::load_text(const std::string& text) {
  std::string error;
  std::unique_ptr<Module> module = parse_module("PTX text", text, error);
  return add_module(std::move(module), error);
}

bool Machine::add_module(std::unique_ptr<Module> module, const std::string& error) {
  if (!module) {
    Report report;
    report.kind = Error::kUnsupported;
    report.text = error;
    add_report(std::move(report));
    return false;
  }
  for (const Module::Variable& v : module->variables) {
    register_memory(reinterpret_cast<const void*>(v.address), v.bytes, "device variable " + v.name);
  }
  modules().push_back(std::move(module));
  return true;
}

bool Machine::load_manifest(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  bool good = static_cast<bool>(in);
  int count = 0;
  while (std::getline(in, line)) {
    std::istringstream words(line);
    std::string target, file;
    if (!(words >> target)) continue;
    if (!(words >> file)) file = target;  // a line with a path only
    good &= load_ptx(file);
    ++count;
  }
  if (count == 0) {
    Report report;
    report.kind = Error::kUnsupported;
    report.text = "the PTX list " + path + " is missing or empty";
    add_report(std::move(report));
    return false;
  }
  return good;
}

int Machine::decode_all() {
  int count = 0;
  bool good = true;
  for (const auto& module : modules()) {
    for (const auto& [name, kernel] : module->kernels) {
      ++count;
      if (decode_kernel(*kernel)) continue;
      good = false;
      Launch launch;
      launch.kernel = name;
      refuse(launch, Error::kUnsupported, kernel->decode_error + " in " + kernel->module->path,
             kernel->decode_error_line);
    }
  }
  return good ? count : -1;
}

void Machine::register_memory(const void* pointer, size_t bytes, const std::string& label,
                              bool read_only) {
  global_memory().add(pointer, bytes, label, read_only);
}

void Machine::unregister_memory(const void* pointer) {
  global_memory().remove(reinterpret_cast<uint64_t>(pointer));
}

void Machine::poison(void* pointer, size_t bytes) { std::memset(pointer, 0xFF, bytes); }

void Machine::add_report(Report report) { reports_.push_back(std::move(report)); }

std::string Machine::reports_text() const {
  std::string text;
  for (const Report& r : reports_) text += r.to_string() + "\n";
  return text;
}

bool Machine::refuse(const Launch& launch, Error kind, const std::string& text, int ptx_line) {
  Report report;
  report.kind = kind;
  report.kernel = demangle(launch.kernel);
  report.text = text;
  report.ptx_line = ptx_line;
  add_report(std::move(report));
  return false;
}

// The sentence why the device refuses the launch, or "".
std::string Machine::launch_error(const Launch& launch, const Kernel& kernel) const {
  const uint64_t threads = uint64_t{launch.block[0]} * launch.block[1] * launch.block[2];
  const size_t total = kernel.static_shared + launch.dynamic_shared;
  const auto number = [](uint64_t x) { return std::to_string(x); };
  if (threads == 0 || launch.grid[0] == 0 || launch.grid[1] == 0 || launch.grid[2] == 0)
    return "an empty grid or block";
  if (threads > kernel.max_threads) {
    return number(threads) + " threads in a block; the kernel was compiled for at most " +
           number(kernel.max_threads);
  }
  if (launch.grid[0] > 0x7FFFFFFFu || launch.grid[1] > 65535 || launch.grid[2] > 65535)
    return "the grid is too large";
  if (launch.dynamic_shared > launch.max_dynamic_shared) {
    return number(launch.dynamic_shared) +
           " bytes of dynamic shared memory; cudaFuncSetAttribute allows " +
           number(launch.max_dynamic_shared);
  }
  if (total > static_cast<size_t>(device_.smem_optin)) {
    return number(total) + " bytes of shared memory; a block of this device has at most " +
           number(device_.smem_optin);
  }
  return "";
}

bool Machine::launch(const Launch& launch) {
  ++host_calls_.launches;
  if (!executes_) return true;
  std::string targets;
  Kernel* kernel = find_kernel(launch.kernel, device_.compute_capability(), targets);
  if (kernel == nullptr) {
    return refuse(launch, Error::kLaunch,
                  targets.empty() ? "no loaded PTX has this kernel"
                                  : "the loaded PTX has this kernel for compute capability " +
                                        targets + " only, the device has " +
                                        std::to_string(device_.compute_capability()));
  }
  if (!decode_kernel(*kernel)) {
    return refuse(launch, Error::kUnsupported, kernel->decode_error + " in " + kernel->module->path,
                  kernel->decode_error_line);
  }
  const std::string error = launch_error(launch, *kernel);
  if (!error.empty()) return refuse(launch, Error::kLaunch, error);
  global_memory().set_device(launch.device);
  return run_grid(launch, *kernel);
}

void Block::fail(Error kind, const Warp& warp, uint32_t pc, int lane, const std::string& text) {
  Report report;
  report.kind = kind;
  report.kernel = demangle(kernel->name);
  report.text = text;
  std::copy(index, index + 3, report.block);
  report.thread = static_cast<uint32_t>(warp.index * kLanes + lane);
  if (pc < kernel->sites.size()) {
    const Site& site = kernel->sites[pc];
    const auto file = [&](int number) {
      const auto it = kernel->module->files.find(number);
      return it == kernel->module->files.end() ? std::string("?") : it->second;
    };
    report.ptx_line = site.ptx_line;
    report.line = site.line;
    if (site.line > 0) report.file = file(site.file);
    if (site.outer_line > 0)
      report.inlined_at = file(site.outer_file) + ":" + std::to_string(site.outer_line);
  }
  machine->add_report(std::move(report));
  throw LaunchAborted{};
}

}  // namespace ptx
