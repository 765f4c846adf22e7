// What the argument checks share. No other file includes it.
#pragma once

#include <cstddef>
#include <cstring>
#include <span>

#include "api/check.h"

namespace flashtile {

using I64 = long long;

// A tensor argument with the extents that its strides run over.
struct TensorArgument {
  const char* name;
  const flashtile_tensor& tensor;
  int64_t rows_per_batch;  // seqlen; varlen: total; cache: page_size
  int64_t heads;
  int64_t batch;  // entries that stride_batch runs over: 1 when varlen; cache: num_pages
  int64_t dim;
  bool written;
  Dtype dtype;
};

// A number per query row: softmax_lse, dsoftmax_lse.
struct RowArgument {
  const char* name;
  const char* short_name;  // as in lse_stride_head
  const void* data;        // may be null
  int64_t stride_batch, stride_head;
  bool written;
};

constexpr int64_t bytes_of(Dtype dtype) {
  constexpr int64_t kBytes[] = {2, 2, 4, 8, 1, 1};
  return kBytes[static_cast<int>(dtype)];
}
constexpr int64_t bytes_of_lse(const Problem& problem) { return problem.lse_is_double ? 8 : 4; }

// No later version's struct will be larger: a larger size was never initialised.
inline constexpr uint32_t kLargestStruct = 4096;

// Copies what the caller's version of a struct has over our defaults; `least` is the size of the
// first version. Fields that a newer caller added must be zero: they ask for something that this
// version would silently ignore.
template <class T>
Status read_struct(const T* user, T& out, const char* name, size_t least = sizeof(T)) {
  if (user == nullptr)
    return fail(FLASHTILE_INVALID_ARGUMENT, "%s is NULL; allowed: a pointer to the struct", name);
  uint32_t size = 0;
  std::memcpy(&size, user, sizeof size);
  if (size < least || size > kLargestStruct) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "%s.struct_size is %u; allowed: %zu to %u", name, size,
                least, kLargestStruct);
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(user);
  for (size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      return fail(FLASHTILE_UNSUPPORTED,
                  "%s.struct_size is %u and a field past byte %zu is set; allowed: fields of "
                  "version %d.%d.%d",
                  name, size, sizeof(T), FLASHTILE_VERSION_MAJOR, FLASHTILE_VERSION_MINOR,
                  FLASHTILE_VERSION_PATCH);
    }
  }
  std::memcpy(&out, user, size < sizeof(T) ? size : sizeof(T));
  return FLASHTILE_OK;
}

// NULL also where the caller's struct ends before the field.
inline const flashtile_scores* scores_of(const flashtile_problem& user) {
  constexpr size_t kEnd = offsetof(flashtile_problem, scores) + sizeof(void*);
  return user.struct_size >= kEnd ? user.scores : nullptr;
}

Status check_range(const char* name, int64_t value, int64_t low, int64_t high);

// Everything about the problem but its offsets in device memory.
Status convert_problem(const flashtile_problem* user, Target& target, Problem& out);

// Host memory can be read, so on the CPU the offsets themselves are checked.
Status check_cu_seqlens(const char* name, const int32_t* cu, int64_t batch, int64_t total);
Status check_offsets(const Target& target, const Problem& problem);

Status check_tensor(const TensorArgument& argument, const Problem& problem);

template <size_t kCount>
Status check_tensors(const TensorArgument (&arguments)[kCount], const Problem& problem) {
  for (const TensorArgument& argument : arguments) {
    if (Status s = check_tensor(argument, problem)) return s;
  }
  return FLASHTILE_OK;
}

struct ScoreArgument;

// Alignment, and what is written where: api/check_memory.cpp. At most ten tensors and rows.
Status check_memory(std::span<const TensorArgument> tensors, std::span<const RowArgument> rows,
                    std::span<const ScoreArgument> scores, const Problem& problem);

inline View view(const flashtile_tensor& t) {
  return {t.data, t.stride_batch, t.stride_seq, t.stride_head};
}

}  // namespace flashtile
