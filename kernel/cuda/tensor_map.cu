// Encodes tensor maps through the driver. Host code only; the driver is found at run time, so that
// nothing links against it.
#include "cuda/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>

#include "tile/smem_tile.cuh"

namespace flashtile {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

using Encode = decltype(&cuTensorMapEncodeTiled);

constexpr int64_t kAlignment = 16;  // of rows
constexpr int64_t kStrideLimit = int64_t{1} << 40;
constexpr int kMostBoxRows = 256;

constexpr int kFirstDriver = 12000;  // that has the function

std::atomic<Encode> known = nullptr;  // of this process, once found

// Null where the driver does not have it.
Encode find_encode() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver < kFirstDriver) {
    cudaGetLastError();  // the caller's next check must not find it
    return nullptr;
  }
  if (const Encode encode = known.load(std::memory_order_relaxed)) return encode;
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &entry, kFirstDriver, cudaEnableDefault, &found);
  if (error != cudaSuccess) cudaGetLastError();
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  known.store(reinterpret_cast<Encode>(entry), std::memory_order_relaxed);
  return reinterpret_cast<Encode>(entry);
}

// Bytes; along a dimension of one element a stride is never used, and any legal one will do.
int64_t stride_bytes(int64_t stride, int64_t extent) {
  return extent <= 1 ? kAlignment : 2 * stride;
}

TmaObstacle obstacle(const MappedTensor& tensor, const char* field, int64_t value) {
  TmaObstacle result;
  std::snprintf(result.text, sizeof result.text, "%s%s is %lld", tensor.name, field,
                static_cast<long long>(value));
  return result;
}

}  // namespace

bool driver_encodes_tensor_maps() { return find_encode() != nullptr; }

TmaObstacle tma_obstacle(const MappedTensor& tensor) {
  const View& view = tensor.view;
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  if (tensor.rows == 0) return obstacle(tensor, "'s number of rows", 0);
  if (tensor.head_dim % (kAlignment / 2) != 0) {
    return obstacle(tensor, "'s head dim", tensor.head_dim);
  }
  if (address % kAlignment != 0) {
    return obstacle(tensor, ".data modulo 16", static_cast<int64_t>(address % kAlignment));
  }
  const struct {
    const char* name;
    int64_t stride, extent;
  } strides[] = {{".stride_seq", view.stride_seq, tensor.rows},
                 {".stride_head", view.stride_head, tensor.heads},
                 {".stride_batch", view.stride_batch, tensor.batch}};
  for (const auto& [name, stride, extent] : strides) {
    const bool takes = stride > 0 && stride < kStrideLimit / 2 && 2 * stride % kAlignment == 0;
    if (extent > 1 && !takes) return obstacle(tensor, name, stride);
  }
  return {};
}

TmaObstacle page_obstacle(const Cache& cache) {
  TmaObstacle result;
  result.takes = "pages of a multiple of 8 rows and no cache_leftpad";
  if (cache.block_table != nullptr && cache.page_size % kPageBoxRows != 0) {
    std::snprintf(result.text, sizeof result.text, "page_size is %lld",
                  static_cast<long long>(cache.page_size));
  } else if (cache.leftpad != nullptr) {
    std::snprintf(result.text, sizeof result.text, "cache_leftpad is given");
  } else if (cache.num_pages == 0) {
    std::snprintf(result.text, sizeof result.text, "num_pages is 0");
  }
  return result;
}

Status encode_tensor_map(const MappedTensor& tensor, int box_rows, TensorMap& map) {
  // A call asks driver_encodes_tensor_maps() before, so it is known as a rule.
  Encode encode = known.load(std::memory_order_relaxed);
  if (encode == nullptr) encode = find_encode();
  if (encode == nullptr) {
    return fail(
        FLASHTILE_DEVICE_ERROR,
        "the driver has no cuTensorMapEncodeTiled; allowed: drivers of CUDA 12.0 and later");
  }
  const View& view = tensor.view;
  const int64_t row = stride_bytes(view.stride_seq, tensor.rows);
  const cuuint64_t extents[] = {
      static_cast<cuuint64_t>(tensor.head_dim), static_cast<cuuint64_t>(box_rows),
      static_cast<cuuint64_t>(tensor.rows + box_rows), static_cast<cuuint64_t>(tensor.heads),
      static_cast<cuuint64_t>(tensor.batch)};
  const cuuint64_t strides[] = {
      static_cast<cuuint64_t>(row), static_cast<cuuint64_t>(row),
      static_cast<cuuint64_t>(stride_bytes(view.stride_head, tensor.heads)),
      static_cast<cuuint64_t>(stride_bytes(view.stride_batch, tensor.batch))};
  const cuuint32_t box[] = {kPanelCols, static_cast<cuuint32_t>(box_rows), 1, 1, 1};
  const cuuint32_t every[] = {1, 1, 1, 1, 1};
  void* const first = static_cast<char*>(view.data) - box_rows * row;
  const CUresult result = encode(
      reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, first, extents,
      strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return FLASHTILE_OK;
  return fail(FLASHTILE_DEVICE_ERROR, "cuTensorMapEncodeTiled refused %s: error %d", tensor.name,
              static_cast<int>(result));
}

}  // namespace flashtile
