// Parsed statements -> executable instructions: opcode table lookup, then register assignment.
#include "decode.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>

#include "parse.h"
#include "registers.h"

namespace ptx {

const OpTable& op_table() {
  static const OpTable table = [] {
    OpTable t;
    add_integer_ops(t);
    add_float_ops(t);
    add_half_ops(t);
    add_convert_ops(t);
    add_compare_ops(t);
    add_move_ops(t);
    add_memory_ops(t);
    add_atomic_ops(t);
    add_copy_ops(t);
    add_warp_ops(t);
    add_matrix_ops(t);
    add_control_ops(t);
    add_mbarrier_ops(t);
    add_bulk_ops(t);
    add_wgmma_ops(t);
    add_fence_ops(t);
    return t;
  }();
  return table;
}

namespace {

uint32_t round_up(uint32_t x, uint32_t to) { return (x + to - 1) / to * to; }

bool is_wide_special(std::string_view name) {
  return name == "%clock64" || name == "%globaltimer" || name == "%gridid";
}

bool is_known_special(std::string_view name) {
  static const char* const kNames[] = {"%tid.x",          "%tid.y",       "%tid.z",
                                       "%ntid.x",         "%ntid.y",      "%ntid.z",
                                       "%ctaid.x",        "%ctaid.y",     "%ctaid.z",
                                       "%nctaid.x",       "%nctaid.y",    "%nctaid.z",
                                       "%laneid",         "%warpid",      "%nwarpid",
                                       "%smid",           "%nsmid",       "%lanemask_eq",
                                       "%lanemask_lt",    "%lanemask_le", "%lanemask_gt",
                                       "%lanemask_ge",    "%clock",       "%clock64",
                                       "%globaltimer",    "%gridid",      "%dynamic_smem_size",
                                       "%total_smem_size"};
  return std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames);
}

class Decoder {
 public:
  explicit Decoder(Kernel& kernel) : kernel_(kernel), body_(parse_body(kernel)) {}

  bool run() {
    if (!body_.error.empty()) return fail(body_.error, body_.error_line);
    place_variables();
    layout_ = kFirstSlot;
    flow_.resize(body_.code.size());
    for (size_t i = 0; i < body_.code.size(); ++i) {
      if (!instruction(static_cast<int>(i))) return false;
    }
    if (!ends_with_exit())
      return fail("the kernel does not end with ret or exit", kernel_.body_line);
    assign();
    kernel_.decoded = true;
    return true;
  }

 private:
  // Slot 0 takes results written to `_`.
  static constexpr uint32_t kFirstSlot = 256;

  struct Patch {  // operands_[entry] becomes the place of register `reg`
    size_t entry;
    int reg;
  };

  bool fail(const std::string& text, int line) {
    kernel_.decode_error = text;
    kernel_.decode_error_line = line;
    return false;
  }

  void place_variables() {
    uint32_t at = 0;
    for (const auto& [name, v] : body_.shared) {
      at = round_up(at, v.align);
      symbols_[name] = kSharedBase + at;
      at += v.bytes;
    }
    for (const auto& [name, v] : kernel_.module->shared) {
      if (v.bytes == 0 || !mentions(name)) continue;
      at = round_up(at, v.align);
      symbols_[name] = kSharedBase + at;
      at += v.bytes;
    }
    uint32_t dynamic_align = 16;
    for (const auto& [name, v] : kernel_.module->shared) {
      if (v.bytes == 0) dynamic_align = std::max(dynamic_align, v.align);
    }
    kernel_.static_shared = at == 0 ? 0 : round_up(at, dynamic_align);
    for (const auto& [name, v] : kernel_.module->shared) {
      if (v.bytes == 0) symbols_[name] = kSharedBase + kernel_.static_shared;
    }
    uint32_t local = 0;
    for (const auto& [name, v] : body_.local) {
      local = round_up(local, v.align);
      symbols_[name] = local;
      local += v.bytes;
    }
    kernel_.local_bytes = round_up(local, 16);
    for (const Param& p : kernel_.params) symbols_[p.name] = p.offset;
    for (const auto& v : kernel_.module->variables) symbols_[v.name] = v.address;
  }

  bool mentions(const std::string& name) const {
    return kernel_.body.find(name) != std::string_view::npos;
  }

  bool ends_with_exit() const {
    if (body_.code.empty()) return false;
    const RawInst& last = body_.code.back();
    return last.guard < 0 &&
           (last.opcode == "ret" || last.opcode == "exit" || last.opcode == "trap" ||
            last.opcode == "bra" || last.opcode == "bra.uni");
  }

  bool instruction(int index) {
    RawInst& raw = body_.code[index];
    if (raw.opcode.substr(0, 4) == "call") return call(index);
    if (raw.opcode.substr(0, 9) == "st.param." || is_call_result(raw)) {
      raw.opcode = "nop";  // arguments and result of a call, which is refused or needs none
      raw.operands.clear();
    }
    if (raw.opcode == "brx.idx" || raw.opcode == "brx.idx.uni") return indexed_branch(index);
    const std::vector<Op>* ops = op_table().find(raw.opcode);
    if (ops == nullptr) {
      return fail("unknown opcode '" + std::string(raw.opcode) + "'", raw.site.ptx_line);
    }
    for (const Op& op : *ops) {
      if (match(raw, op, index)) return true;
    }
    return fail("opcode '" + std::string(raw.opcode) + "' with operands that are not known",
                raw.site.ptx_line);
  }

  bool is_call_result(const RawInst& raw) const {
    if (raw.opcode.substr(0, 9) != "ld.param.") return false;
    for (const RawOperand& o : raw.operands) {
      if (o.kind == RawOperand::kAddress && o.name.substr(0, 6) == "retval") return true;
    }
    return false;
  }

  // Only the calls that the compiler itself makes: a failed assert ends the launch, printf is
  // dropped.
  bool call(int index) {
    RawInst& raw = body_.code[index];
    const auto calls = [&](std::string_view name) {
      return std::any_of(raw.operands.begin(), raw.operands.end(),
                         [&](const RawOperand& o) { return o.name == name; });
    };
    if (calls("__assertfail")) {
      raw.opcode = "trap";
    } else if (calls("vprintf")) {
      raw.opcode = "nop";
    } else {
      return fail("call of a function that was not inlined", raw.site.ptx_line);
    }
    raw.operands.clear();
    return match(raw, op_table().find(raw.opcode)->front(), index);
  }

  bool indexed_branch(int index) {
    RawInst& raw = body_.code[index];
    const auto targets = raw.operands.size() == 2 ? body_.branch_targets.find(raw.operands[1].name)
                                                  : body_.branch_targets.end();
    if (targets == body_.branch_targets.end())
      return fail("brx.idx without its targets", raw.site.ptx_line);
    std::vector<RawOperand> rest;
    raw.operands.pop_back();
    if (!match(raw, op_table().find("brx.idx")->front(), index)) return false;
    operands_.push_back(static_cast<int32_t>(targets->second.size()));
    for (std::string_view name : targets->second) {
      const int target = body_.find_label(raw.scope, name);
      if (target < 0) return fail("unknown label '" + std::string(name) + "'", raw.site.ptx_line);
      operands_.push_back(target);
      flow_[index].targets.push_back(target);
    }
    return true;
  }

  bool match(const RawInst& raw, const Op& op, int index) {
    const size_t operand_mark = operands_.size();
    const size_t patch_mark = patches_.size();
    Flow flow;
    bool result = op.signature.find('=') != std::string::npos;
    size_t next = 0;
    for (const char letter : op.signature) {
      if (letter == '=') {
        result = false;
        continue;
      }
      if (letter == '#') {
        operands_.push_back(op.number);
        continue;
      }
      if (next == raw.operands.size() || !operand(raw, raw.operands[next], letter, result, flow)) {
        next = raw.operands.size() + 1;
        break;
      }
      ++next;
    }
    if (next != raw.operands.size()) {
      operands_.resize(operand_mark);
      patches_.resize(patch_mark);
      return false;
    }
    finish(raw, op, index, operand_mark, flow);
    return true;
  }

  void finish(const RawInst& raw, const Op& op, int index, size_t operand_mark, Flow& flow) {
    flow.guarded = raw.guard >= 0;
    flow.ends = !flow.guarded && (raw.opcode == "ret" || raw.opcode == "exit" ||
                                  raw.opcode == "bra" || raw.opcode == "bra.uni" ||
                                  raw.opcode == "trap" || raw.opcode.substr(0, 7) == "brx.idx");
    if (flow.guarded) flow.uses.push_back(raw.guard);
    flow_[index] = std::move(flow);
    Inst inst;
    inst.run = op.run;
    inst.guard_flip = raw.guard_negated ? ~0u : 0;
    kernel_.code.push_back(inst);
    kernel_.sites.push_back(raw.site);
    starts_.push_back(operand_mark);
  }

  void use_register(int reg, bool result, Flow& flow) {
    patches_.push_back({operands_.size(), reg});
    operands_.push_back(0);
    (result ? flow.defs : flow.uses).push_back(reg);
  }

  bool operand(const RawInst& raw, const RawOperand& o, char letter, bool result, Flow& flow) {
    switch (letter) {
      case 'r':
      case 'h':
      case 'd': return value(o, letter, result, flow);
      case 'w':
      case 'a': return kept(o, letter == 'w', flow);
      case 'p':
      case 'q': return predicate(o, letter, result, flow);
      case 'M': return address(o, flow);
      case 'i':
        if (o.kind != RawOperand::kImmediate) return false;
        operands_.push_back(static_cast<int32_t>(o.bits));
        return true;
      case 'L': {
        const int target = o.kind == RawOperand::kName ? body_.find_label(raw.scope, o.name) : -1;
        if (target < 0) return false;
        operands_.push_back(target);
        flow.targets.push_back(target);
        return true;
      }
      default: return false;
    }
  }

  bool value(const RawOperand& o, char letter, bool result, Flow& flow) {
    const RegisterClass wanted = letter == 'r'   ? RegisterClass::k32
                                 : letter == 'h' ? RegisterClass::k16
                                                 : RegisterClass::k64;
    const bool wide = letter == 'd';
    if (o.kind == RawOperand::kRegister) {
      if (body_.registers[o.reg] != wanted || o.negated) return false;
      use_register(o.reg, result, flow);
      return true;
    }
    if (result) {
      if (o.kind != RawOperand::kSink) return false;
      operands_.push_back(0);
      return true;
    }
    uint64_t bits = o.bits;
    if (o.kind == RawOperand::kFloat) {
      bits = wide ? std::bit_cast<uint64_t>(o.number)
                  : std::bit_cast<uint32_t>(static_cast<float>(o.number));
    } else if (o.kind == RawOperand::kSpecial) {
      return special(o.name, wide);
    } else if (o.kind == RawOperand::kName) {
      if (letter == 'h' || !symbol(o.name, bits)) return false;
    } else if (o.kind != RawOperand::kImmediate) {
      return false;
    }
    if (letter == 'h') bits &= 0xFFFF;
    operands_.push_back(constant(wide ? bits : static_cast<uint32_t>(bits), wide));
    return true;
  }

  // A register with a place of its own: an asynchronous operation reads it after its last use here.
  bool kept(const RawOperand& o, bool written, Flow& flow) {
    if (o.kind != RawOperand::kRegister || body_.registers[o.reg] != RegisterClass::k32)
      return false;
    use_register(o.reg, false, flow);
    if (written) flow.defs.push_back(o.reg);
    flow.kept.push_back(o.reg);
    return true;
  }

  bool predicate(const RawOperand& o, char letter, bool result, Flow& flow) {
    if (result && o.kind == RawOperand::kSink) {
      operands_.push_back(0);
      return true;
    }
    if (letter == 'q' && o.kind == RawOperand::kImmediate) {  // a constant predicate
      operands_.push_back(constant(o.bits != 0 ? ~0u : 0u, false));
      operands_.push_back(0);
      return true;
    }
    if (o.kind != RawOperand::kRegister || body_.registers[o.reg] != RegisterClass::kPred)
      return false;
    if (letter == 'p' && o.negated) return false;
    use_register(o.reg, result, flow);
    if (letter == 'q') operands_.push_back(o.negated ? -1 : 0);
    return true;
  }

  bool address(const RawOperand& o, Flow& flow) {
    if (o.kind != RawOperand::kAddress) return false;
    if (o.reg >= 0) {
      const RegisterClass width = body_.registers[o.reg];
      if (width != RegisterClass::k32 && width != RegisterClass::k64) return false;
      use_register(o.reg, false, flow);
      operands_.push_back(static_cast<int32_t>(o.bits));
      operands_.push_back(width == RegisterClass::k64 ? 1 : 0);
      return true;
    }
    uint64_t base = 0;
    if (!o.name.empty() && !symbol(o.name, base)) return false;
    operands_.push_back(constant(base, true));
    operands_.push_back(static_cast<int32_t>(o.bits));
    operands_.push_back(1);
    return true;
  }

  bool symbol(std::string_view name, uint64_t& value) const {
    const auto it = symbols_.find(std::string(name));
    if (it == symbols_.end()) return false;
    value = it->second;
    return true;
  }

  bool special(std::string_view name, bool wide) {
    if (!is_known_special(name) || wide != is_wide_special(name)) return false;
    for (const Special& s : kernel_.specials) {
      if (s.name == name) {
        operands_.push_back(s.offset);
        return true;
      }
    }
    kernel_.specials.push_back({std::string(name), static_cast<int32_t>(layout_), wide});
    operands_.push_back(static_cast<int32_t>(layout_));
    layout_ += wide ? 256 : 128;
    return true;
  }

  int32_t constant(uint64_t bits, bool wide) {
    const auto [it, fresh] = constants_.try_emplace({bits, wide}, static_cast<int32_t>(layout_));
    if (fresh) {
      kernel_.constants.push_back({it->second, wide, bits});
      layout_ += wide ? 256 : 128;
    }
    return it->second;
  }

  void assign() {
    kernel_.pinned_begin = layout_;
    const std::vector<int32_t> places =
        assign_registers(flow_, body_.registers, layout_, kernel_.pinned_end);
    for (const Patch& patch : patches_) operands_[patch.entry] = places[patch.reg];
    kernel_.register_bytes = round_up(layout_, 256);
    kernel_.operands = std::move(operands_);
    for (size_t i = 0; i < kernel_.code.size(); ++i) {
      kernel_.code[i].operand = kernel_.operands.data() + starts_[i];
      if (body_.code[i].guard >= 0) kernel_.code[i].guard = places[body_.code[i].guard];
    }
  }

  Kernel& kernel_;
  ParsedBody body_;
  std::vector<int32_t> operands_;
  std::vector<size_t> starts_;
  std::vector<Patch> patches_;
  std::vector<Flow> flow_;
  std::unordered_map<std::string, uint64_t> symbols_;
  std::map<std::pair<uint64_t, bool>, int32_t> constants_;
  uint32_t layout_ = 0;
};

}  // namespace

bool decode_kernel(Kernel& kernel) {
  if (kernel.decoded) return true;
  if (!kernel.decode_error.empty()) return false;
  return Decoder(kernel).run();
}

}  // namespace ptx
