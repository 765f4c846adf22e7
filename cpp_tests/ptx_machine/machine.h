// A machine that executes, on a CPU, the PTX that nvcc emitted for a CUDA kernel.
//
// It stands behind the CUDA runtime entry points (runtime.cpp), so a test links the library's own
// objects with this library in place of libcudart and calls the library as on a GPU. README.md says
// what is checked and what cannot be seen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace ptx {

struct Kernel;

// What the selected GPU offers. Memory sizes in bytes.
struct Device {
  int cc_major = 8;
  int cc_minor = 0;
  int smem_optin = 163 * 1024;  // dynamic + static shared memory of one block, after opting in
  int smem_per_sm = 164 * 1024;
  int sm_count = 108;
  int driver_version = 13000;  // below 12000 there is no cuTensorMapEncodeTiled
  int compute_capability() const { return cc_major * 10 + cc_minor; }
};
inline constexpr int kMostDevices = 2;
inline constexpr Device kSm80 = {8, 0, 163 * 1024, 164 * 1024, 108};
inline constexpr Device kSm89 = {8, 9, 99 * 1024, 100 * 1024, 128};
inline constexpr Device kSm90 = {9, 0, 227 * 1024, 228 * 1024, 132};

enum class Error {
  kNone,
  kRace,      // two accesses of different threads, one a plain write, with no order between them
  kInFlight,  // memory that a cp.async of this or another thread may still be writing
  kUninitialised,  // shared memory read before it was written
  kOutOfBounds,
  kMisaligned,
  kDivergence,  // a collective that not all of its lanes or warps reach
  kDeadlock,
  kLivelock,      // the instruction budget is spent
  kLaunch,        // refused launch: shared memory, threads, missing kernel
  kUnsupported,   // PTX the machine does not know
  kTrap,          // trap or a failed device assert
  kProxy,         // the async proxy need not see an ordinary write: no fence.proxy.async
  kBarrier,       // misuse of an mbarrier
  kWgmma,         // registers or descriptors of a wgmma
  kRegisters,     // misuse of setmaxnreg
  kTensorMap,     // not a tensor map, or not of the instruction's rank
  kUnorderedSum,  // two floating-point additions to one word, and no order: see set_ordered_sums
};
const char* name(Error kind);

struct Report {
  Error kind = Error::kNone;
  std::string kernel;  // demangled
  std::string file;    // of the PTX .loc, needs -lineinfo
  int line = 0;
  std::string inlined_at;  // "file:line" of the outermost caller, where nvcc inlined
  int ptx_line = 0;
  uint32_t block[3] = {};
  uint32_t thread = 0;  // linear index in the block
  std::string text;     // what happened
  std::string to_string() const;
};

// Exact and independent of the schedule for kernels without data-dependent spinning.
struct Counters {
  uint64_t instructions = 0;       // executed by a warp
  uint64_t lane_instructions = 0;  // executed by a thread
  uint64_t blocks = 0;
  uint64_t mma = 0;        // warp-wide mma.sync
  uint64_t mma_flops = 0;  // 2 per multiply-add
  uint64_t ex2 = 0;        // per thread
  uint64_t shuffles = 0;   // warp-wide
  uint64_t barriers = 0;   // bar.sync, per warp
  uint64_t atomics = 0;    // atom and red, per thread
  uint64_t ldmatrix = 0;   // warp-wide
  uint64_t cp_async_bytes = 0;
  uint64_t global_read_bytes = 0;  // cp.async included
  uint64_t global_written_bytes = 0;
  uint64_t local_accesses = 0;    // per thread: nonzero means arrays that live in memory
  uint64_t sectors = 0;           // 32-byte sectors touched, summed over warp requests
  uint64_t sectors_ideal = 0;     // the bytes of those requests / 32, rounded up
  uint64_t wavefronts = 0;        // of shared memory: ld, st, ldmatrix, cp.async
  uint64_t wavefronts_ideal = 0;  // the same without bank conflicts
  uint64_t wgmma = 0;             // warpgroup-wide wgmma.mma_async
  uint64_t wgmma_flops = 0;
  uint64_t bulk_load_bytes = 0;   // into shared memory, zero fill included
  uint64_t bulk_store_bytes = 0;  // out of it, reductions and clipped parts included
  uint64_t mbarrier_waits = 0;    // test_wait and try_wait that succeeded, warp-wide
  uint64_t tensor_maps = 0;       // cuTensorMapEncodeTiled calls, refused ones included
  uint64_t shared_bytes_max = 0;  // largest static + dynamic shared memory of a block
};

// Calls of runtime and driver, failed ones included: what a launch costs the host.
struct HostCalls {
  uint64_t launches = 0;
  uint64_t function_attributes = 0;  // cudaFuncSetAttribute
  uint64_t device_attributes = 0;    // cudaDeviceGetAttribute
  uint64_t current_devices = 0;      // cudaGetDevice, cudaSetDevice
  uint64_t driver_versions = 0;      // cudaDriverGetVersion
  uint64_t entry_points = 0;         // cudaGetDriverEntryPointByVersion
  uint64_t others = 0;               // of memory, streams, properties, occupancy
};

struct Module;

class Machine {
 public:
  // Selects the GPU that the runtime entry points report. Allocations stay.
  void configure(const Device& device);
  const Device& device() const { return device_; }

  // How many of it there are, 1 or 2. Each has its own memory, which kernels on the other cannot
  // access, and its own attributes of functions.
  void set_device_count(int count) { device_count_ = count; }
  int device_count() const { return device_count_; }

  // Whose turn it is among threads that call the runtime.
  std::mutex& turns() { return turns_; }

  // Adds the kernels of a PTX file; its .target says which architecture it serves. Returns false
  // and reports when the file cannot be read. A launch takes the highest target <= the device's.
  bool load_ptx(const std::string& path);
  bool load_text(const std::string& text);
  // A text file with one PTX file a line, each "compute-capability path".
  bool load_manifest(const std::string& path);

  // Decodes every kernel now; the number of kernels, or -1 with a report for each that has an
  // opcode the machine does not know.
  int decode_all();

  // Decides block order, warp order, preemption and the moments at which cp.async data lands.
  void set_seed(uint64_t seed);
  uint64_t seed() const { return seed_; }

  // Warp instructions one warp may execute before the launch is a livelock.
  void set_budget(uint64_t instructions) { budget_ = instructions; }
  uint64_t budget() const { return budget_; }

  // Blocks of a launch that run side by side, their turns mixed at random; 1: one after another.
  // Blocks that wait for each other need as many as the GPU would have resident.
  void set_resident_blocks(int count) { resident_blocks_ = count; }
  int resident_blocks() const { return resident_blocks_; }

  // On: floating-point additions to one word of global memory (atom, red, bulk reductions) must be
  // ordered among each other, as in kernels that promise the same bits every time.
  void set_ordered_sums(bool on) { ordered_sums_ = on; }
  bool ordered_sums() const { return ordered_sums_; }

  // Off: no race, in-flight or uninitialised-read check (bounds stay); for timing only.
  void set_checks(bool on) { checks_ = on; }
  bool checks() const { return checks_; }

  // Off: a launch succeeds and nothing runs; for the cost of calls alone.
  void set_execution(bool on) { executes_ = on; }

  // Names host memory that kernels may access, with exact bounds. cudaMalloc does it by itself.
  void register_memory(const void* pointer, size_t bytes, const std::string& label,
                       bool read_only = false);
  void unregister_memory(const void* pointer);
  // Fills with 0xFF: NaN in every floating-point format.
  static void poison(void* pointer, size_t bytes);

  const std::vector<Report>& reports() const { return reports_; }
  void clear_reports() { reports_.clear(); }
  std::string reports_text() const;

  const Counters& counters() const { return counters_; }
  void reset_counters() { counters_ = {}, host_calls_ = {}; }
  const HostCalls& host_calls() const { return host_calls_; }

  // Used by runtime.cpp and the interpreter.
  struct Launch {
    std::string kernel;  // mangled
    uint32_t grid[3] = {1, 1, 1};
    uint32_t block[3] = {1, 1, 1};
    size_t dynamic_shared = 0;
    size_t max_dynamic_shared = 48 * 1024;  // raised by cudaFuncSetAttribute
    int device = 0;
    void** args = nullptr;
  };
  bool launch(const Launch& launch);
  void add_report(Report report);
  Counters& mutable_counters() { return counters_; }
  HostCalls& mutable_host_calls() { return host_calls_; }

 private:
  bool add_module(std::unique_ptr<Module> module, const std::string& error);
  bool refuse(const Launch& launch, Error kind, const std::string& text, int ptx_line = 0);
  std::string launch_error(const Launch& launch, const Kernel& kernel) const;
  bool run_grid(const Launch& launch, const Kernel& kernel);

  Device device_ = kSm80;
  int device_count_ = 1;
  std::mutex turns_;
  uint64_t seed_ = 1;
  uint64_t launches_ = 0;  // since set_seed
  uint64_t budget_ = 20'000'000;
  bool checks_ = true;
  bool ordered_sums_ = false;
  bool executes_ = true;
  int resident_blocks_ = 1;
  std::vector<Report> reports_;
  Counters counters_;
  HostCalls host_calls_;
};

// The one machine of this process, behind the CUDA runtime entry points.
Machine& machine();

}  // namespace ptx
