// An append to a cache of cache_case.h, with rotation or without, and what it has to leave behind:
// every byte of the caches, and rotated numbers by their formula in fp64. Runs on the CPU or on a
// backend.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cache_case.h"
#include "device_memory.h"
#include "flashtile/flashtile.h"

namespace flashtile::test {

struct RotaryTable {
  HostTensor cos, sin;  // [1, rows, 1, dim / 2]
  int dim;
  uint32_t flags;

  // padding: numbers between two rows.
  RotaryTable(Dtype dtype, int64_t rows, int dim, uint32_t flags, int padding = 3);
  // Number d of a head at a position, and the largest number that it is made of.
  std::pair<double, double> rotated(const HostTensor& x, int64_t b, int64_t s, int64_t h, int64_t d,
                                    int64_t position) const;
};

// Everything that a call reads and writes, in host memory.
struct Appending {
  CacheCall call;
  std::optional<RotaryTable> table = std::nullopt;
  HostTensor q_out = {};
  bool in_place = false;  // q_out is q

  HostTensor& rotated_q() { return in_place ? call.q : q_out; }
};

// Host tensors and vectors with a copy in a backend's memory; they must outlive this.
class Mirror {
 public:
  explicit Mirror(const Backend& backend) : backend_(backend) {}

  const int32_t* ints(const std::vector<int32_t>& values);
  flashtile_tensor tensor(HostTensor& host);
  // Everything once more, after the host's values have changed; and the tensors back.
  void copy_in() const;
  void copy_out() const;

 private:
  struct Copy {
    DeviceBytes memory;
    const void* from;
    size_t bytes;
    void* to;  // null: never copied back

    Copy(const Backend& backend, const void* from, size_t bytes, void* to)
        : memory(backend, from, bytes), from(from), bytes(bytes), to(to) {}
  };
  uint8_t* copy(const void* from, size_t bytes, void* to);

  const Backend& backend_;
  std::list<Copy> copies_;
};

// The problem with its numbers in a backend's memory; `problem` is of `call`.
flashtile_problem mirrored(Mirror& mirror, const Backend& backend, const CacheCall& call,
                           flashtile_problem problem);

// What flashtile_append_kv is given, with everything in a backend's memory. `problem` must outlive
// it.
flashtile_append_kv_params append_params(Mirror& mirror, Appending& what,
                                         const flashtile_problem& problem);

// Appends on a backend. Returns the error.
std::string append_on(const Backend& backend, Appending& what, const flashtile_problem& problem);

using AppendRun = std::function<std::string(Appending&, const flashtile_problem&)>;

std::string append_on_cpu(Appending& what, const flashtile_problem& problem);

// The library on some device: append and forward on what lies in host memory.
struct CacheBackend {
  AppendRun append;
  std::function<CacheResult(CacheCall&, const flashtile_problem&)> forward;
  bool reads_numbers = false;  // on the host: an append without a place is refused
};

CacheBackend cpu_cache_backend();

// New rows of a dense call whose numbers may be wrong: a row has a place if its page exists. A
// sequence with a negative length has no new rows.
struct PossibleRows {
  int64_t without_place = 0;
  std::vector<int64_t> places = {};  // page * page_size + row, of the others
};

// Writes the rows that have a place into k and v.
PossibleRows expect_possible_rows(const CacheCall& call, const flashtile_problem& problem,
                                  HostTensor& k, HostTensor& v);

// What the cache should hold: `call`'s own, before it appends, plus the new rows that belong there.
void expect_rows(const CacheCall& call, HostTensor& k, HostTensor& v);

// Without a rotation: every byte of the caches.
void check_append(const CacheSpec& spec, const AppendRun& run);

// The largest error of k in the cache and of the rotated q, in units of what is allowed. `before`:
// the tensors that `what` had before it ran.
double rotation_error(const CacheCall& before, const RotaryTable& table, Appending& what);

// k in the cache and q_out, at the positions that the header promises.
void check_rotation(const CacheSpec& spec, const RotaryTable& table, const AppendRun& run);

// A position without a row in the tables: k stays unwritten, q is NaN.
void check_missing_angles(Dtype dtype, const AppendRun& run);

}  // namespace flashtile::test
