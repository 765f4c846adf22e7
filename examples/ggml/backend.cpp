// The backend library that ggml loads: one device of the kind that works on the CPU's memory beside
// the CPU, whose only operation is FLASH_ATTN_EXT. ggml computes with the CPU what it refuses.
//
// FLASHTILE_GGML_COUNT=1: a line on stderr says how many operations ran here, when a backend goes.
// The same numbers are those of the exported functions flashtile_ggml_operations*.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <set>
#include <string>

#include "flash_attn_ext.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

using ggml_flashtile::counts;
using ggml_flashtile::FlashAttention;

constexpr const char* kName = "FLASHTILE";

// Into the log of the program that loaded ggml.
void log(ggml_log_level level, const std::string& sentence) {
  ggml_log_callback callback = nullptr;
  void* user_data = nullptr;
  ggml_log_get(&callback, &user_data);
  if (callback != nullptr)
    callback(level, (std::string(kName) + ": " + sentence + "\n").c_str(), user_data);
}

// A refusal is no error, but nothing else shows it: each reason is logged once.
void log_once(const std::string& why) {
  static std::mutex mutex;
  static std::set<std::string> known;
  const std::lock_guard lock(mutex);
  if (known.insert(why).second) log(GGML_LOG_LEVEL_WARN, "FLASH_ATTN_EXT is left to ggml: " + why);
}

// ---- the backend: what a context of llama.cpp has of its own ----

struct Context {
  FlashAttention attention;
  int num_threads = GGML_DEFAULT_N_THREADS;
};

Context* context_of(ggml_backend_t backend) { return static_cast<Context*>(backend->context); }

const char* get_name(ggml_backend_t) { return kName; }

void free_backend(ggml_backend_t backend) {
  const char* const wanted = std::getenv("FLASHTILE_GGML_COUNT");
  if (wanted != nullptr && std::strcmp(wanted, "1") == 0) {
    std::fprintf(stderr,
                 "%s: %llu operations computed in this process, %llu with the mask as a bias\n",
                 kName, static_cast<unsigned long long>(counts.computed),
                 static_cast<unsigned long long>(counts.with_bias));
  }
  delete context_of(backend);
  delete backend;
}

ggml_status compute_node(Context* context, const ggml_tensor* node) {
  try {
    const flashtile_status status = context->attention.compute(node, context->num_threads);
    if (status == FLASHTILE_OK) return GGML_STATUS_SUCCESS;
    log(GGML_LOG_LEVEL_ERROR, std::string(node->name) + ": " + flashtile_last_error());
    return GGML_STATUS_FAILED;
  } catch (const std::bad_alloc&) {
    log(GGML_LOG_LEVEL_ERROR, std::string(node->name) + ": no memory for the workspace");
    return GGML_STATUS_ALLOC_FAILED;
  }
}

ggml_status compute_graph(ggml_backend_t backend, ggml_cgraph* graph) {
  for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
    const ggml_tensor* const node = ggml_graph_node(graph, i);
    if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 || node->op != GGML_OP_FLASH_ATTN_EXT)
      continue;
    if (const ggml_status status = compute_node(context_of(backend), node);
        status != GGML_STATUS_SUCCESS)
      return status;
  }
  return GGML_STATUS_SUCCESS;
}

// Found by name, as ggml_backend_set_n_threads.
void set_num_threads(ggml_backend_t backend, int num_threads) {
  context_of(backend)->num_threads = num_threads;
}

// ---- the device ----

const char* device_name(ggml_backend_dev_t) { return kName; }
const char* device_description(ggml_backend_dev_t) { return "exact attention on the CPU"; }
void device_memory(ggml_backend_dev_t, size_t* free, size_t* total) { *free = *total = 0; }
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
  return GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

void device_properties(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
  *props = {};
  props->name = device_name(device);
  props->description = device_description(device);
  props->type = device_type(device);
  props->caps.mmap_support = true;
}

ggml_backend_t new_backend(ggml_backend_dev_t device, const char*) {
  static ggml_guid guid = {0x5e, 0x1d, 0x0c, 0x8a, 0x7b, 0x42, 0x4f, 0x69,
                           0x9a, 0x33, 0xc1, 0x26, 0xe4, 0xd0, 0x58, 0xb7};
  ggml_backend_i functions{};
  functions.get_name = get_name;
  functions.free = free_backend;
  functions.graph_compute = compute_graph;
  return new ggml_backend{&guid, functions, device, new Context};
}

// The CPU's: then the scheduler moves nothing to bring a node here.
ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t) {
  return ggml_backend_cpu_buffer_type();
}
bool supports_buffer_type(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
  return ggml_backend_buft_is_host(type);
}

bool supports_operation(ggml_backend_dev_t, const ggml_tensor* node) {
  switch (node->op) {
    case GGML_OP_NONE:
    case GGML_OP_RESHAPE:
    case GGML_OP_VIEW:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE: return true;  // nothing is computed
    case GGML_OP_FLASH_ATTN_EXT: break;
    default: return false;
  }
  const std::string why = ggml_flashtile::why_not(node);
  if (!why.empty()) log_once(why);
  return why.empty();
}

// ---- the registry ----

const char* registry_name(ggml_backend_reg_t) { return kName; }
size_t device_count(ggml_backend_reg_t) { return 1; }

ggml_backend_dev_t get_device(ggml_backend_reg_t registry, size_t) {
  static ggml_backend_device device = [&] {
    ggml_backend_device one{};
    one.iface.get_name = device_name;
    one.iface.get_description = device_description;
    one.iface.get_memory = device_memory;
    one.iface.get_type = device_type;
    one.iface.get_props = device_properties;
    one.iface.init_backend = new_backend;
    one.iface.get_buffer_type = buffer_type;
    one.iface.supports_op = supports_operation;
    one.iface.supports_buft = supports_buffer_type;
    one.reg = registry;
    return one;
  }();
  return &device;
}

void* get_function(ggml_backend_reg_t, const char* name);

}  // namespace

EXPORTED uint64_t flashtile_ggml_operations(void) { return counts.computed; }
EXPORTED uint64_t flashtile_ggml_operations_with_bias(void) { return counts.with_bias; }

EXPORTED ggml_backend_reg_t ggml_backend_init(void) {
  if (std::strcmp(ggml_version(), GGML_HEADERS_VERSION) != 0) {
    log(GGML_LOG_LEVEL_ERROR, std::string("ggml is ") + ggml_version() +
                                  "; this library was built for " GGML_HEADERS_VERSION);
    return nullptr;
  }
  static ggml_backend_reg registry = {
      GGML_BACKEND_API_VERSION, {registry_name, device_count, get_device, get_function}, nullptr};
  return &registry;
}

namespace {

void* get_function(ggml_backend_reg_t, const char* name) {
  if (std::strcmp(name, "ggml_backend_set_n_threads") == 0)
    return reinterpret_cast<void*>(set_num_threads);
  if (std::strcmp(name, "flashtile_ggml_operations") == 0)
    return reinterpret_cast<void*>(flashtile_ggml_operations);
  if (std::strcmp(name, "flashtile_ggml_operations_with_bias") == 0)
    return reinterpret_cast<void*>(flashtile_ggml_operations_with_bias);
  return nullptr;
}

}  // namespace
