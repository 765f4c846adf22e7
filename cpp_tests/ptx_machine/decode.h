// The opcode table: full opcode text -> handler. There is no pattern matching: an opcode that is
// not in the table, with every modifier spelled out, is refused.
//
// A signature lists the operands in the order of the PTX text, vectors flattened, results before
// '='.
//   r  32-bit register or immediate      d  64-bit        h  16-bit (kept in a 32-bit slot)
//   p  predicate                         q  predicate source, maybe negated: offset, flip
//   M  [address]: base offset, displacement, 1 if the base is 64 bits wide
//   i  plain integer                     L  label: instruction index
//   w  32-bit register, read and written, that an asynchronous operation keeps; a  the same, read
//   #  no operand: the number given to add()
// Each letter is one entry of Inst::operand, q is two and M is three.
#pragma once

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "module.h"

namespace ptx {

struct Op {
  std::string signature;
  Handler run = nullptr;
  int32_t number = 0;
};

class OpTable {
 public:
  void add(const std::string& opcode, const std::string& signature, Handler run,
           int32_t number = 0) {
    ops_[opcode].push_back({signature, run, number});
  }
  const std::vector<Op>* find(std::string_view opcode) const {
    auto it = ops_.find(std::string(opcode));
    return it == ops_.end() ? nullptr : &it->second;
  }
  size_t size() const { return ops_.size(); }

 private:
  std::unordered_map<std::string, std::vector<Op>> ops_;
};

const OpTable& op_table();

void add_integer_ops(OpTable& table);
void add_float_ops(OpTable& table);
void add_half_ops(OpTable& table);
void add_convert_ops(OpTable& table);
void add_compare_ops(OpTable& table);
void add_move_ops(OpTable& table);
void add_memory_ops(OpTable& table);
void add_atomic_ops(OpTable& table);
void add_copy_ops(OpTable& table);
void add_warp_ops(OpTable& table);
void add_matrix_ops(OpTable& table);
void add_control_ops(OpTable& table);
void add_mbarrier_ops(OpTable& table);
void add_bulk_ops(OpTable& table);
void add_wgmma_ops(OpTable& table);
void add_fence_ops(OpTable& table);

}  // namespace ptx
