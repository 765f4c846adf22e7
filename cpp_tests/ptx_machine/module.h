// PTX text -> kernels. A module is scanned once for its entries; a kernel is decoded when it is
// first launched.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace ptx {

struct Warp;
struct Inst;
using Handler = void (*)(Warp& warp, const Inst& inst, uint32_t mask);

// One decoded instruction. `operand` points at int32 values whose meaning the opcode's signature
// gives (decode.h): byte offsets of registers in the warp's register file, or plain integers.
struct Inst {
  Handler run = nullptr;
  const int32_t* operand = nullptr;
  int32_t guard = -1;       // byte offset of the guarding predicate, or -1
  uint32_t guard_flip = 0;  // ~0 for @!p
};

// Where an instruction came from.
struct Site {
  std::string_view opcode;
  int ptx_line = 0;
  int file = 0;
  int line = 0;
  int outer_file = 0;  // of the outermost inlined_at
  int outer_line = 0;
};

// A register-file slot that holds a constant, the same in all lanes.
struct Constant {
  int32_t offset = 0;  // bytes in the register file
  bool wide = false;   // 64 bits per lane
  uint64_t value = 0;
};

// A special register (%tid.x, ...) that the kernel reads.
struct Special {
  std::string name;
  int32_t offset = 0;
  bool wide = false;
};

struct Param {
  std::string name;
  uint32_t offset = 0;
  uint32_t size = 0;
};

struct Module;

struct Kernel {
  std::string name;
  const Module* module = nullptr;
  std::string_view header;  // between the name and the body: directives such as .maxntid
  std::string_view body;
  int body_line = 0;
  std::vector<Param> params;
  uint32_t param_bytes = 0;
  uint32_t max_threads = 1024;

  bool decoded = false;
  std::string decode_error;  // nonempty: cannot run
  int decode_error_line = 0;
  std::vector<Inst> code;
  std::vector<Site> sites;        // same index as code
  std::vector<int32_t> operands;  // Inst::operand points into it
  std::vector<Constant> constants;
  std::vector<Special> specials;
  uint32_t launch_registers = 0;  // per thread, where setmaxnreg works; 0: it does not
  uint32_t pinned_begin = 0;      // bytes of the register file that wgmmas use
  uint32_t pinned_end = 0;
  uint32_t register_bytes = 0;  // of one warp's register file, a multiple of 256
  uint32_t static_shared = 0;   // bytes before the dynamic part
  uint32_t local_bytes = 0;     // per thread
};

struct Module {
  std::string path;
  std::string text;
  int target = 0;         // 80, 89, 90
  bool specific = false;  // 90a: for this architecture only
  std::map<int, std::string> files;
  std::unordered_map<std::string, std::unique_ptr<Kernel>> kernels;
  struct Variable {
    std::string name;
    uint64_t address = 0;
    size_t bytes = 0;
  };
  std::vector<Variable> variables;                    // .global and .const
  std::unordered_map<std::string, uint64_t> globals;  // their addresses by name
  struct Shared {
    uint32_t align = 0;
    uint32_t bytes = 0;  // 0: the dynamic part
  };
  std::unordered_map<std::string, Shared> shared;  // declared outside of functions
  std::vector<std::unique_ptr<char[]>> storage;
};

// Null and a sentence in `error` when the text cannot be understood.
std::unique_ptr<Module> load_module(const std::string& path, std::string& error);
// The same from PTX text; reports call it `name`.
std::unique_ptr<Module> parse_module(const std::string& name, std::string text, std::string& error);

// Fills code and the rest; false leaves the reason in kernel.decode_error.
bool decode_kernel(Kernel& kernel);

// Numeric windows of the address spaces that are not plain host memory.
inline constexpr uint64_t kSharedBase = 0x400;                    // a .shared address
inline constexpr uint64_t kSharedWindow = 0x0001'0000'0000'0000;  // + .shared address: generic
inline constexpr uint64_t kLocalWindow = 0x0002'0000'0000'0000;   // + .local address: generic
inline constexpr uint64_t kParamWindow = 0x0003'0000'0000'0000;   // + .param offset: generic
inline constexpr uint64_t kWindowMask = 0xFFFF'0000'0000'0000;

}  // namespace ptx
