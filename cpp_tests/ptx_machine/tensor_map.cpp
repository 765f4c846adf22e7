// cuTensorMapEncodeTiled with the limits that the driver API documents. The machine's runtime hands
// it out through cudaGetDriverEntryPointByVersion.
#include "tensor_map.h"

#include <cuda.h>

#include <cstddef>
#include <cstring>

#include "machine.h"

namespace ptx {

uint64_t TensorMap::checksum() const {
  unsigned char bytes[sizeof(TensorMap)];
  std::memcpy(bytes, this, sizeof bytes);
  std::memset(bytes + offsetof(TensorMap, check), 0, sizeof check);
  uint64_t hash = 0xCBF29CE484222325ull;
  for (const unsigned char b : bytes) hash = (hash ^ b) * 0x100000001B3ull;
  return hash;
}

namespace {

struct ElementType {
  uint8_t bytes;  // 0: not supported here
  Element kind;
};

ElementType element_type(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return {1, Element::kInteger};
    case CU_TENSOR_MAP_DATA_TYPE_UINT16: return {2, Element::kInteger};
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32: return {4, Element::kInteger};
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64: return {8, Element::kInteger};
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16: return {2, Element::kF16};
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return {2, Element::kBf16};
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ: return {4, Element::kF32};
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return {8, Element::kF64};
    default: return {0, Element::kInteger};
  }
}

struct Request {
  CUtensorMapDataType type;
  uint32_t rank;
  void* address;
  const cuuint64_t* dims;
  const cuuint64_t* strides;
  const cuuint32_t* box;
  const cuuint32_t* steps;
  CUtensorMapSwizzle swizzle;
  CUtensorMapL2promotion promotion;
  CUtensorMapFloatOOBfill fill;
};

uint32_t span_of(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_32B: return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B: return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B: return 128;
    default: return 0;
  }
}

bool dimensions_are_legal(const Request& r, uint32_t element_bytes) {
  for (uint32_t d = 0; d < r.rank; ++d) {
    if (r.dims[d] == 0 || r.dims[d] > (uint64_t{1} << 32)) return false;
    if (r.box[d] == 0 || r.box[d] > 256) return false;
    if (r.steps[d] == 0 || r.steps[d] > 8) return false;
    if (d + 1 < r.rank && (r.strides[d] % 16 != 0 || r.strides[d] >= (uint64_t{1} << 40)))
      return false;
  }
  const uint32_t inner = r.box[0] * element_bytes;
  const uint32_t span = span_of(r.swizzle);
  return inner % 16 == 0 && (span == 0 || inner <= span);
}

CUresult encode(CUtensorMap* map, const Request& r) {
  const ElementType element = element_type(r.type);
  const bool pointers = map != nullptr && r.address != nullptr && r.dims != nullptr &&
                        r.box != nullptr && r.steps != nullptr;
  if (!pointers || reinterpret_cast<uintptr_t>(map) % 64 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (element.bytes == 0 || r.rank == 0 || r.rank > kMaxRank) return CUDA_ERROR_INVALID_VALUE;
  if (r.rank > 1 && r.strides == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (reinterpret_cast<uintptr_t>(r.address) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (r.swizzle < CU_TENSOR_MAP_SWIZZLE_NONE || r.swizzle > CU_TENSOR_MAP_SWIZZLE_128B)
    return CUDA_ERROR_INVALID_VALUE;
  if (r.promotion < CU_TENSOR_MAP_L2_PROMOTION_NONE ||
      r.promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B)
    return CUDA_ERROR_INVALID_VALUE;
  if (r.fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && element.kind == Element::kInteger)
    return CUDA_ERROR_INVALID_VALUE;
  if (!dimensions_are_legal(r, element.bytes)) return CUDA_ERROR_INVALID_VALUE;
  TensorMap out;
  out.address = reinterpret_cast<uint64_t>(r.address);
  out.rank = static_cast<uint8_t>(r.rank);
  out.element = element.kind;
  out.element_bytes = element.bytes;
  out.swizzle = static_cast<Swizzle>(r.swizzle);
  out.nan_fill = r.fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  for (uint32_t d = 0; d < r.rank; ++d) {
    out.last[d] = static_cast<uint32_t>(r.dims[d] - 1);
    out.box[d] = static_cast<uint16_t>(r.box[d]);
    // The innermost dimension has no step without interleave.
    out.step[d] = static_cast<uint8_t>(d == 0 ? 1 : r.steps[d]);
    if (d > 0) out.stride[d - 1] = r.strides[d - 1];
  }
  out.check = out.checksum();
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &out, sizeof out);
  return CUDA_SUCCESS;
}

}  // namespace

}  // namespace ptx

extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
    const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
    const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (!ptx::has_context()) return CUDA_ERROR_INVALID_CONTEXT;
  if (ptx::machine().device().compute_capability() < 90) return CUDA_ERROR_NOT_SUPPORTED;
  // Interleaved layouts are legal on a GPU; the machine does not know them.
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return CUDA_ERROR_INVALID_VALUE;
  const std::lock_guard<std::mutex> turn(ptx::machine().turns());
  ++ptx::machine().mutable_counters().tensor_maps;
  return ptx::encode(map,
                     {type, rank, address, dims, strides, box, steps, swizzle, promotion, fill});
}
