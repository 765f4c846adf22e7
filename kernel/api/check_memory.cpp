// What can be seen of tensors in memory from addresses, strides and extents: that numbers are
// aligned, and that nothing is written where something else is read or written. What is refused is
// proven: two indices with one address. Slices of one buffer that interleave pass, and so does an
// overlap that only a search through all rows would find.
#include <algorithm>

#include "api/check_scores.h"

namespace flashtile {
namespace {

constexpr size_t kMostArguments = 10;  // tensors and rows
constexpr size_t kMostAreas = 22;
constexpr int kDims = 4;

// The numbers low + (sum of index * stride, index < extent) + (0 to dim - 1), times `bytes`, with
// strides that are not negative, the largest first. `exists` is false where there is none, or where
// the strides leave 64 bits.
struct Area {
  struct Dim {
    const char* name;
    int64_t stride, extent;
  };
  const char* name;
  const char* dot;  // between the name and that of a stride
  int64_t dim, bytes;
  Dim dims[kDims] = {};
  intptr_t low = 0, high = 0;
  bool written = false, exists = false;
};

void place(const void* data, const Area::Dim (&dims)[kDims], Area& area) {
  constexpr int64_t kMost = int64_t{1} << 60;
  int64_t below = 0, above = area.dim;
  bool fits = true;
  for (int i = 0; i < kDims; ++i) {
    const auto& [name, stride, extent] = dims[i];
    int64_t reach = 0;
    if (extent > 1) {
      fits = fits && -kMost < stride && stride < kMost &&
             !__builtin_mul_overflow(stride, extent - 1, &reach);
    }
    int64_t& end = reach < 0 ? below : above;
    fits = fits && !__builtin_add_overflow(end, reach, &end);
    area.dims[i] = {name, !fits || extent <= 1 ? 0 : stride < 0 ? -stride : stride, extent};
  }
  fits = fits && !__builtin_mul_overflow(below, area.bytes, &below) &&
         !__builtin_mul_overflow(above, area.bytes, &above);
  const auto start = reinterpret_cast<intptr_t>(data);
  area.exists = fits && !__builtin_add_overflow(start, below, &area.low) &&
                !__builtin_add_overflow(start, above, &area.high);
  std::sort(area.dims, area.dims + kDims,
            [](const Area::Dim& a, const Area::Dim& b) { return a.stride > b.stride; });
}

Area area_of(const TensorArgument& argument, const Problem& problem) {
  const auto& [name, t, rows, heads, batch, dim, written, dtype] = argument;
  Area area = {.name = name, .dot = ".", .dim = dim, .bytes = bytes_of(dtype), .written = written};
  if (rows == 0 || batch == 0 || problem.batch == 0 || t.data == nullptr) return area;
  place(t.data,
        {{"stride_batch", t.stride_batch, batch},
         {"stride_seq", t.stride_seq, rows},
         {"stride_head", t.stride_head, heads},
         {"", 0, 1}},
        area);
  return area;
}

Area area_of(const RowArgument& argument, const Problem& problem) {
  const auto& [name, short_name, data, stride_batch, stride_head, written] = argument;
  Area area = {.name = name,
               .dot = "_",
               .dim = problem.rows_q(),
               .bytes = bytes_of_lse(problem),
               .written = written};
  if (data == nullptr || problem.rows_q() == 0 || problem.batch == 0) return area;
  place(data,
        {{"stride_batch", stride_batch, problem.is_varlen() ? 1 : problem.batch},
         {"stride_head", stride_head, problem.num_heads},
         {"", 0, 1},
         {"", 0, 1}},
        area);
  return area;
}

Area area_of(const ScoreArgument& argument, const Problem& problem) {
  const auto& [name, view, extents, written] = argument;
  Area area = {
      .name = name, .dot = ".", .dim = 1, .bytes = bytes_of(view.dtype), .written = written};
  for (const int64_t extent : extents) {
    if (extent == 0 || problem.batch == 0) return area;
  }
  place(view.data,
        {{"stride_batch", view.stride_batch, extents[0]},
         {"stride_head", view.stride_head, extents[1]},
         {"stride_q", view.stride_q, extents[2]},
         {"stride_k", view.stride_k, extents[3]}},
        area);
  return area;
}

// Whether the number `offset` behind the first is found to be of the area, without using the
// dimension `left_out`.
bool finds(const Area& area, int64_t offset, int left_out = -1) {
  for (int i = 0; i < kDims; ++i) {
    const auto& [_, stride, extent] = area.dims[i];
    if (i == left_out || stride == 0) continue;
    offset -= std::min(offset / stride, extent - 1) * stride;
  }
  return offset < area.dim;
}

bool finds_address(const Area& area, intptr_t address) {
  const int64_t offset = address - area.low;
  return offset >= 0 && address < area.high && offset % area.bytes == 0 &&
         finds(area, offset / area.bytes);
}

// Whether every stride steps over all that the smaller ones reach.
bool is_nested(const Area& area) {
  int64_t reach = area.dim;
  for (int i = kDims - 1; i >= 0; --i) {
    const auto& [_, stride, extent] = area.dims[i];
    if (extent <= 1) continue;
    if (stride < reach) return false;
    reach += stride * (extent - 1);  // place() has found that it fits
  }
  return true;
}

// `short_name`: of what has the strides.
Status check_itself(const Area& area, const char* short_name) {
  if (!area.exists || is_nested(area)) return FLASHTILE_OK;
  for (int i = 0; i < kDims; ++i) {
    const auto& [name, stride, extent] = area.dims[i];
    if (extent <= 1 || !finds(area, stride, i)) continue;
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "%s%s%s is %lld over %lld entries, which share memory; allowed: strides that keep "
                "them apart, they are written",
                short_name, area.dot, name, static_cast<I64>(stride), static_cast<I64>(extent));
  }
  return FLASHTILE_OK;
}

Status check_pair(const Area& a, const Area& b) {
  if (!a.exists || !b.exists || a.low >= b.high || b.low >= a.high) return FLASHTILE_OK;
  if (!finds_address(a, b.low) && !finds_address(b, a.low)) return FLASHTILE_OK;
  return fail(FLASHTILE_INVALID_ARGUMENT, "%s shares memory with %s; allowed: memory of its own",
              a.name, b.name);
}

Status check_aligned(const char* name, const char* field, const void* data, int64_t bytes) {
  // A power of 2.
  if ((reinterpret_cast<uintptr_t>(data) & static_cast<uintptr_t>(bytes - 1)) == 0)
    return FLASHTILE_OK;
  return fail(FLASHTILE_INVALID_ARGUMENT,
              "%s%s is %p; allowed: a multiple of %lld, a number's size", name, field, data,
              static_cast<I64>(bytes));
}

// All pairs and all that is written, for calls in which something is not as it is in most.
Status check_closely(std::span<const TensorArgument> tensors, std::span<const RowArgument> rows,
                     std::span<const ScoreArgument> scores, const Problem& problem) {
  Area areas[kMostAreas];
  size_t count = 0;
  for (const TensorArgument& t : tensors) {
    const Area& area = areas[count++] = area_of(t, problem);
    if (Status s = t.written ? check_itself(area, t.name) : FLASHTILE_OK) return s;
  }
  for (const RowArgument& r : rows) {
    const Area& area = areas[count++] = area_of(r, problem);
    if (Status s = r.written ? check_itself(area, r.short_name) : FLASHTILE_OK) return s;
  }
  for (const ScoreArgument& t : scores) {
    if (Status s = check_aligned(t.name, ".data", t.view.data, bytes_of(t.view.dtype))) return s;
    const Area& area = areas[count++] = area_of(t, problem);
    if (Status s = t.written ? check_itself(area, t.name) : FLASHTILE_OK) return s;
  }
  for (size_t i = 0; i < count; ++i) {
    for (size_t j = 0; areas[i].written && j < count; ++j) {
      if (i == j || (j < i && areas[j].written)) continue;  // each pair once
      if (Status s = check_pair(areas[i], areas[j])) return s;
    }
  }
  return FLASHTILE_OK;
}

// The bytes from an argument's first number to its last, for a look that costs nothing: no stride
// is negative, and what is written has rows inside of sequences and heads inside of rows.
struct Reach {
  intptr_t low = 0, high = 0;
  bool written = false;
};

struct Axis {
  int64_t stride, extent;
};

// `axes`: the innermost first. Whether the argument is as Reach says.
bool find_reach(const void* data, const Axis (&axes)[3], int64_t dim, int64_t bytes, Reach& reach) {
  int64_t end = dim;
  for (const auto& [stride, extent] : axes) {
    if (extent <= 1) continue;
    int64_t behind = 0;
    if (stride < (reach.written ? end : 0) || __builtin_mul_overflow(stride, extent - 1, &behind) ||
        __builtin_add_overflow(end, behind, &end)) {
      return false;
    }
  }
  reach.low = reinterpret_cast<intptr_t>(data);
  return !__builtin_mul_overflow(end, bytes, &end) &&
         !__builtin_add_overflow(reach.low, end, &reach.high);
}

// Whether nothing that is written meets anything else.
bool are_apart(std::span<const Reach> all) {
  for (size_t i = 0; i < all.size(); ++i) {
    for (size_t j = 0; all[i].written && j < all.size(); ++j) {
      if (i != j && all[i].low < all[j].high && all[j].low < all[i].high) return false;
    }
  }
  return true;
}

}  // namespace

Status check_memory(std::span<const TensorArgument> tensors, std::span<const RowArgument> rows,
                    std::span<const ScoreArgument> scores, const Problem& problem) {
  const int64_t lse_bytes = bytes_of_lse(problem);
  Reach all[kMostArguments];
  size_t count = 0;
  bool is_usual = true;
  for (const auto& [name, t, length, heads, batch, dim, written, dtype] : tensors) {
    const int64_t bytes = bytes_of(dtype);
    if (Status s = check_aligned(name, ".data", t.data, bytes)) return s;
    if (length == 0 || batch == 0 || problem.batch == 0 || t.data == nullptr) continue;
    Reach& reach = all[count++] = {.written = written};
    is_usual &= find_reach(
        t.data, {{t.stride_head, heads}, {t.stride_seq, length}, {t.stride_batch, batch}}, dim,
        bytes, reach);
  }
  const int64_t length = problem.rows_q(), batch = problem.is_varlen() ? 1 : problem.batch;
  for (const auto& [name, short_name, data, stride_batch, stride_head, written] : rows) {
    if (Status s = check_aligned(name, "", data, lse_bytes)) return s;
    if (data == nullptr || length == 0 || problem.batch == 0) continue;
    Reach& reach = all[count++] = {.written = written};
    is_usual &= find_reach(data, {{stride_head, problem.num_heads}, {stride_batch, batch}, {0, 1}},
                           length, lse_bytes, reach);
  }
  if (scores.empty() && is_usual && are_apart({all, count})) return FLASHTILE_OK;
  return check_closely(tensors, rows, scores, problem);
}

}  // namespace flashtile
