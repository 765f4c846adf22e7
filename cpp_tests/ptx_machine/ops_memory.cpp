// ld and st of every space, scalar and vector.
#include "access.h"
#include "grid.h"
#include "ops.h"

namespace ptx {

namespace {

// Loads kVector elements of type T into registers that store R per lane.
template <Space kSpace, class T, class R, int kVector>
void load(Warp& warp, const Inst& inst, uint32_t mask) {
  Request r;
  r.warp = &warp;
  r.pc = pc_of(warp, inst);
  r.mask = mask;
  r.bytes = sizeof(T) * kVector;
  read_addresses(warp, inst.operand + kVector, r.address);
  const int32_t order = inst.operand[kVector + 3];
  r.how = how_of(order);
  resolve(r, kSpace);
  if (order != kWeak) {
    if (kSpace != Space::kShared) acquire_words(warp, r.address, mask, order);
    yield_poll(warp);
  }
  for (int v = 0; v < kVector; ++v) {
    R* to = warp.at<R>(inst.operand[v]);
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
      const int l = __builtin_ctz(lanes);
      T value;
      std::memcpy(&value, r.host[l] + v * sizeof(T), sizeof(T));
      to[l] = static_cast<R>(value);
    }
  }
}

// 16-bit registers keep their upper half zero, so a sign extension stops at 16 bits.
template <Space kSpace, class T, int kVector>
void load_narrow(Warp& warp, const Inst& inst, uint32_t mask) {
  load<kSpace, T, uint32_t, kVector>(warp, inst, mask);
  for (int v = 0; v < kVector; ++v) {
    uint32_t* to = warp.at<uint32_t>(inst.operand[v]);
    for (int l = 0; l < kLanes; ++l) {
      if ((mask >> l) & 1) to[l] &= 0xFFFF;
    }
  }
}

template <Space kSpace, class T, class R, int kVector>
void store(Warp& warp, const Inst& inst, uint32_t mask) {
  Request r;
  r.warp = &warp;
  r.pc = pc_of(warp, inst);
  r.mask = mask;
  r.bytes = sizeof(T) * kVector;
  r.access = Access::kWrite;
  read_addresses(warp, inst.operand, r.address);
  const int32_t order = inst.operand[3 + kVector];
  r.how = how_of(order);
  resolve(r, kSpace);
  if (kSpace != Space::kShared && order != kWeak)
    release_words(warp, r.address, mask, order, false);
  for (int v = 0; v < kVector; ++v) {
    const R* from = warp.at<const R>(inst.operand[3 + v]);
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
      const int l = __builtin_ctz(lanes);
      const T value = static_cast<T>(from[l]);
      std::memcpy(r.host[l] + v * sizeof(T), &value, sizeof(T));
    }
  }
}

template <Space kSpace, class T, int kVector>
void add_type(OpTable& t, const std::string& load_prefix, const std::string& store_prefix,
              const std::string& type, int32_t order) {
  const std::string vector = kVector == 1 ? "." : kVector == 2 ? ".v2." : ".v4.";
  const auto letters = [](char c) { return std::string(kVector, c); };
  if constexpr (sizeof(T) <= 2) {
    if (!load_prefix.empty())
      t.add(load_prefix + vector + type, letters('h') + "=M#", load_narrow<kSpace, T, kVector>,
            order);
    if (!store_prefix.empty())
      t.add(store_prefix + vector + type, "M" + letters('h') + "#",
            store<kSpace, T, uint32_t, kVector>, order);
  }
  if constexpr (sizeof(T) <= 4) {
    if (!load_prefix.empty())
      t.add(load_prefix + vector + type, letters('r') + "=M#", load<kSpace, T, uint32_t, kVector>,
            order);
    if (!store_prefix.empty())
      t.add(store_prefix + vector + type, "M" + letters('r') + "#",
            store<kSpace, T, uint32_t, kVector>, order);
  }
  if constexpr (sizeof(T) * kVector <= 16) {
    if (!load_prefix.empty())
      t.add(load_prefix + vector + type, letters('d') + "=M#", load<kSpace, T, uint64_t, kVector>,
            order);
    if (!store_prefix.empty())
      t.add(store_prefix + vector + type, "M" + letters('d') + "#",
            store<kSpace, T, uint64_t, kVector>, order);
  }
}

template <Space kSpace, int kVector>
void add_types(OpTable& t, const std::string& load_prefix, const std::string& store_prefix,
               int32_t order) {
  const auto add = [&]<class T>(std::type_identity<T>, const char* type) {
    if constexpr (sizeof(T) * kVector <= 16)
      add_type<kSpace, T, kVector>(t, load_prefix, store_prefix, type, order);
  };
  add(std::type_identity<int8_t>{}, "s8");
  for (const char* type : {"b8", "u8"}) add(std::type_identity<uint8_t>{}, type);
  add(std::type_identity<int16_t>{}, "s16");
  for (const char* type : {"b16", "u16"}) add(std::type_identity<uint16_t>{}, type);
  add(std::type_identity<int32_t>{}, "s32");
  for (const char* type : {"b32", "u32", "f32"}) add(std::type_identity<uint32_t>{}, type);
  for (const char* type : {"b64", "u64", "s64", "f64"}) add(std::type_identity<uint64_t>{}, type);
}

template <Space kSpace>
void add_space(OpTable& t, const std::string& load_prefix, const std::string& store_prefix,
               int32_t order = kWeak) {
  add_types<kSpace, 1>(t, load_prefix, store_prefix, order);
  add_types<kSpace, 2>(t, load_prefix, store_prefix, order);
  add_types<kSpace, 4>(t, load_prefix, store_prefix, order);
}

}  // namespace

void add_memory_ops(OpTable& t) {
  const auto add_all = [&](const std::string& load, const std::string& store, int32_t order) {
    const auto both = [&]<Space kSpace>(std::integral_constant<Space, kSpace>, const char* space) {
      add_space<kSpace>(t, load.empty() ? "" : load + space, store.empty() ? "" : store + space,
                        order);
    };
    both(std::integral_constant<Space, Space::kGlobal>{}, ".global");
    both(std::integral_constant<Space, Space::kShared>{}, ".shared");
    both(std::integral_constant<Space, Space::kShared>{}, ".shared::cta");
    both(std::integral_constant<Space, Space::kGeneric>{}, "");
  };
  for (const char* weak : {"", ".weak"}) {
    add_all(std::string("ld") + weak, std::string("st") + weak, kWeak);
  }
  add_all("ld.volatile", "st.volatile", kRelaxed);
  for (const auto& [scope, in_block] : kScopes) {
    const std::string end = scope;
    add_all("ld.relaxed" + end, "st.relaxed" + end, kRelaxed | in_block);
    add_all("ld.acquire" + end, "", kAcquire | in_block);
    add_all("", "st.release" + end, kRelease | in_block);
  }
  add_space<Space::kLocal>(t, "ld.local", "st.local");
  add_space<Space::kParam>(t, "ld.param", "");
  add_space<Space::kConst>(t, "ld.const", "");
  for (const char* cache :
       {".ca", ".cg", ".cs", ".lu", ".cv", ".nc", ".nc.L1::no_allocate", ".L1::no_allocate",
        ".L1::evict_last", ".L1::evict_first", ".nc.L1::evict_last", ".nc.L1::evict_first",
        ".nc.L2::128B", ".L2::128B", ".nc.L1::no_allocate.L2::128B", ".nc.L2::256B"}) {
    add_space<Space::kGlobal>(t, std::string("ld.global") + cache, "");
  }
  for (const char* cache : {".wb", ".cg", ".cs", ".wt", ".L1::no_allocate", ".L1::evict_first"}) {
    add_space<Space::kGlobal>(t, "", std::string("st.global") + cache);
  }
}

}  // namespace ptx
