// Where the warps of a block are and what they wait for, in words.
#include <cstdio>

#include "grid.h"

namespace ptx {

std::string hex(uint32_t x) {
  char buffer[16];
  std::snprintf(buffer, sizeof(buffer), "0x%08x", x);
  return buffer;
}

namespace {

// Barriers and wgmmas resume behind themselves.
uint32_t waiting_pc(const Split& s) {
  const bool behind =
      s.wait == Wait::kBarrier || s.wait == Wait::kWarpSync || s.wait == Wait::kWarpgroup;
  return behind ? s.pc - 1 : s.pc;
}

}  // namespace

std::string Block::where(uint32_t pc) const {
  if (pc >= kernel->sites.size()) return "the end of the kernel";
  const Site& site = kernel->sites[pc];
  std::string text;
  const auto& files = kernel->module->files;
  const auto add = [&](int file, int line) {
    const auto it = files.find(file);
    const std::string path = it == files.end() ? "?" : it->second;
    text += path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(line);
  };
  if (site.line > 0) {
    add(site.file, site.line);
    if (site.outer_line > 0) {
      text += " (from ";
      add(site.outer_file, site.outer_line);
      text += ')';
    }
    text += ", ";
  }
  return text + "PTX line " + std::to_string(site.ptx_line) + " " + std::string(site.opcode);
}

std::string Block::describe(const Warp& warp) const {
  const auto what = [](const Split& s) -> std::string {
    switch (s.wait) {
      case Wait::kNone: return "can run";
      case Wait::kLanes: return "wait for lanes " + hex(s.detail);
      case Wait::kBarrier: return "wait at barrier " + std::to_string(s.detail);
      case Wait::kWarpSync: return "wait at bar.warp.sync for lanes " + hex(s.detail);
      case Wait::kMbarrier: return "wait at the mbarrier at offset " + std::to_string(s.detail);
      case Wait::kWarpgroup: return "wait for the other warps of their warpgroup";
      case Wait::kRegisters:
        return "wait for registers, " + std::to_string(s.detail) + " a thread,";
    }
    return "?";
  };
  std::string text;
  for (const Split& s : warp.others) {
    if (!text.empty()) text += "; ";
    text += "lanes " + hex(s.mask) + " " + what(s) + " at " + where(waiting_pc(s));
  }
  if (warp.mask != 0) text += "lanes " + hex(warp.mask) + " run at " + where(warp.pc);
  return text.empty() ? "exited" : text;
}

std::string Block::dump() const {
  std::string text;
  for (const Warp& warp : warps)
    text += "\n    warp " + std::to_string(warp.index) + ": " + describe(warp);
  for (int id = 0; id < kBarriers; ++id) {
    const BarrierState& b = barriers[id];
    if (b.arrived.empty()) continue;
    text +=
        "\n    barrier " + std::to_string(id) + ": " + std::to_string(b.arrived.size()) +
        " threads arrived, " +
        (b.expected != 0 ? std::to_string(b.expected) : "all " + std::to_string(live_threads())) +
        " expected";
  }
  for (const auto& [offset, b] : mbarriers) {
    text += "\n    mbarrier at offset " + std::to_string(offset) + ": phase " +
            std::to_string(b.phase) + ", " + std::to_string(b.pending) + " of " +
            std::to_string(b.expected) + " arrivals and " + std::to_string(b.bytes) +
            " bytes missing";
  }
  if (kernel->launch_registers != 0)
    text += "\n    setmaxnreg: " + std::to_string(register_pool / kLanes) +
            " registers a thread of one warp are free";
  return text;
}

void Block::report_stuck(const std::string& others) {
  const Warp* stuck = &warps.front();
  for (const Warp& warp : warps) {
    if (!warp.others.empty()) stuck = &warp;
    if (!warp.others.empty()) break;
  }
  const bool waits = !stuck->others.empty();
  fail(Error::kDeadlock, *stuck, waits ? waiting_pc(stuck->others.front()) : 0,
       waits ? __builtin_ctz(stuck->others.front().mask) : 0,
       "no warp can go on" + dump() + others);
}

}  // namespace ptx
