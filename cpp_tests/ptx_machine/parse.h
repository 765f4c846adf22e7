// The body of a kernel as a list of statements with resolved registers, before opcodes are looked
// up.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "module.h"

namespace ptx {

enum class RegisterClass : uint8_t { kPred, k16, k32, k64 };

struct RawOperand {
  enum Kind { kRegister, kImmediate, kFloat, kSpecial, kAddress, kName, kSink } kind = kSink;
  int reg = -1;           // kRegister; kAddress: its base, or -1
  bool negated = false;   // !%p
  uint64_t bits = 0;      // kImmediate; kAddress: displacement
  double number = 0;      // kFloat
  std::string_view name;  // kSpecial, kName; kAddress without base register: symbol or empty
};

struct RawInst {
  std::string_view opcode;
  std::vector<RawOperand> operands;
  std::vector<int> groups;  // operands per comma-separated position, not used by most opcodes
  int guard = -1;           // register
  bool guard_negated = false;
  int scope = 0;
  Site site;
};

struct ParsedBody {
  std::vector<RawInst> code;
  std::vector<RegisterClass> registers;
  std::vector<int> scope_parent;
  std::map<std::pair<int, std::string_view>, int> labels;  // (scope, name) -> instruction index
  std::map<std::string_view, std::vector<std::string_view>> branch_targets;
  struct Variable {
    uint32_t align = 1;
    uint32_t bytes = 0;
  };
  std::map<std::string, Variable> shared;
  std::map<std::string, Variable> local;
  std::string error;
  int error_line = 0;

  int find_label(int scope, std::string_view name) const;
};

ParsedBody parse_body(const Kernel& kernel);

}  // namespace ptx
