// Tensor maps: what the encoder refuses, and boxes loaded, stored and added against plain C++.
#include <array>
#include <cstring>
#include <random>
#include <thread>

#include "conformance.h"
#include "text_kernel.h"

namespace {

using ptx_test::Buffer;

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

Encode encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
  CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &status) == cudaSuccess);
  CHECK(status == cudaDriverEntryPointSuccess);
  return reinterpret_cast<Encode>(function);
}

// Legal as it stands; tests change one thing.
struct Request {
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint32_t rank = 3;
  size_t shift = 0;  // of the address
  std::array<cuuint64_t, 6> dims = {100, 9, 5, 4, 3, 1};
  std::array<cuuint64_t, 5> strides = {208, 2080, 10400, 41600, 0};
  std::array<cuuint32_t, 6> box = {64, 4, 2, 1, 1, 1};
  std::array<cuuint32_t, 6> steps = {1, 1, 1, 1, 1, 1};
  CUtensorMapInterleave interleave = CU_TENSOR_MAP_INTERLEAVE_NONE;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  CUtensorMapFloatOOBfill fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
};

CUresult encode(CUtensorMap* map, const Request& r, void* address) {
  return encoder()(map, r.type, r.rank, static_cast<char*>(address) + r.shift, r.dims.data(),
                   r.strides.data(), r.box.data(), r.steps.data(), r.interleave, r.swizzle,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, r.fill);
}

void refuses(const char* what, const Request& r) {
  static Buffer<char> memory(1024);
  CUtensorMap map;
  CHECK_MESSAGE(encode(&map, r, memory.get()) == CUDA_ERROR_INVALID_VALUE, what);
}

std::string coordinates(int rank) { return "{" + ptx_test::names("%c", rank) + "}"; }

// Dynamic shared memory begins at address 1024 on compute capability 9.0: the mbarrier there, the
// tile at 2048. Loads a box, waits, copies it to global memory as it lies; then stores the same
// shared memory with the map, or adds it, `times` times.
std::string box_kernel(int rank) {
  const std::string r = std::to_string(rank);
  const std::string at = "[%d0, " + coordinates(rank) + "]";
  std::string t =
      ".visible .entry box" + r +
      "(.param .align 64 .b8 map[128], .param .align 64 .b8 out[128], "
      ".param .align 4 .b8 at[20], .param .u32 bytes, .param .u64 copy, "
      ".param .u32 adds)\n{\n"
      ".reg .pred %p<4>; .reg .b32 %r<9>; .reg .b32 %b<2>; .reg .b32 %c<5>; .reg .b64 %d<9>;\n"
      "mov.u32 %b0, 1024; mov.u32 %b1, 2048; mov.b64 %d0, map; cvta.param.u64 %d0, %d0;\n"
      "ld.param.u32 %r0, [bytes]; ld.param.u64 %d1, [copy]; mov.u32 %r1, %tid.x;\n";
  for (int d = 0; d < rank; ++d)
    t += "ld.param.u32 %c" + std::to_string(d) + ", [at+" + std::to_string(4 * d) + "];\n";
  t += "setp.ne.u32 %p0, %r1, 0;\n@%p0 bra WAIT;\n"
       "mbarrier.init.shared::cta.b64 [%b0], 1;\nfence.mbarrier_init.release.cluster;\n"
       "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b0], %r0;\n"
       "cp.async.bulk.tensor." +
       r + "d.shared::cluster.global.mbarrier::complete_tx::bytes [%b1], " + at +
       ", [%b0];\n"
       "WAIT:\nbar.sync 0;\n"
       "TRY:\nmbarrier.try_wait.parity.shared::cta.b64 %p1, [%b0], 0;\n@!%p1 bra TRY;\n"
       "LOOP:\nshl.b32 %r2, %r1, 2; setp.ge.u32 %p2, %r2, %r0;\n@%p2 bra DONE;\n"
       "add.s32 %r3, %r2, 2048; ld.shared.u32 %r4, [%r3];\n"
       "cvt.u64.u32 %d2, %r2; add.s64 %d2, %d2, %d1; st.global.u32 [%d2], %r4;\n"
       "add.s32 %r1, %r1, 32;\nbra LOOP;\nDONE:\n"
       "@%p0 bra END;\n"
       "mov.b64 %d0, out; cvta.param.u64 %d0, %d0; ld.param.u32 %r5, [adds];\n"
       "setp.ne.u32 %p3, %r5, 0;\n@%p3 bra ADD;\n"
       "cp.async.bulk.tensor." +
       r + "d.global.shared::cta.bulk_group " + at +
       ", [%b1];\n"
       "bra COMMIT;\nADD:\n"
       "cp.reduce.async.bulk.tensor." +
       r + "d.global.shared::cta.add.bulk_group " + at +
       ", [%b1];\nsub.u32 %r5, %r5, 1; setp.ne.u32 %p3, %r5, 0;\n@%p3 bra ADD;\nCOMMIT:\n"
       "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\nEND:\nret;\n}\n";
  return t;
}

struct Box {
  Request request;
  std::array<int32_t, 5> at;
  uint32_t adds = 0;
};

uint32_t element_bytes(const Request& r) {
  return r.type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
}

void multiply(char* at, uint32_t size, float factor) {
  float x = 0;
  _Float16 h;
  if (size == 4) {
    std::memcpy(&x, at, 4);
    x *= factor;
    std::memcpy(at, &x, 4);
  } else {
    std::memcpy(&h, at, 2);
    h = static_cast<_Float16>(static_cast<float>(h) * factor);
    std::memcpy(at, &h, 2);
  }
}

// The box as it should lie in shared memory, and the tensor after the store, from element
// arithmetic.
void check_box(const Box& box, uint64_t seed) {
  ptx_test::begin_text(seed);
  const Request& r = box.request;
  const uint32_t size = element_bytes(r);
  size_t total = r.dims[0] * size;
  for (cuuint32_t d = 1; d < r.rank; ++d) total += (r.dims[d] - 1) * r.strides[d - 1];
  std::vector<char> host(total);
  std::mt19937 random(static_cast<unsigned>(seed));
  for (size_t i = 0; i < total; i += size) {  // small integers, exact in every format
    const float x = static_cast<float>(static_cast<int>(random() % 15) - 7);
    const _Float16 h = static_cast<_Float16>(x);
    size == 4 ? std::memcpy(&host[i], &x, 4) : std::memcpy(&host[i], &h, 2);
  }
  ptx_test::begin_text(seed);  // chooses the device, whose driver encodes
  const Buffer<char> in(host), out(host);
  CUtensorMap in_map, out_map;
  CHECK(encode(&in_map, r, in.get()) == CUDA_SUCCESS);
  CHECK(encode(&out_map, r, out.get()) == CUDA_SUCCESS);
  uint32_t bytes = size;
  for (cuuint32_t d = 0; d < r.rank; ++d) bytes *= r.box[d];
  Buffer<char> copy(bytes);
  char* copy_pointer = copy.get();
  uint32_t adds = box.adds;
  std::array<int32_t, 5> at = box.at;
  if (!ptx_test::launch_text(
          "box" + std::to_string(r.rank), 32, 1024 + bytes,
          {&in_map, &out_map, at.data(), &bytes, static_cast<void*>(&copy_pointer), &adds}))
    return;
  ptx_test::check_bulk_loads(bytes);
  const std::vector<char> loaded = copy.fetch(), stored = out.fetch();
  std::vector<char> expected(host);
  const int span = r.swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 7
                   : r.swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 3
                   : r.swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 1
                                                            : 0;
  std::vector<char> tile(bytes);  // as it should lie in shared memory
  for (uint32_t e = 0; e < bytes / size; ++e) {
    uint32_t rest = e;
    bool inside = true;
    size_t place = 0;
    for (cuuint32_t d = 0; d < r.rank; ++d) {
      const int64_t c = int64_t{at[d]} + rest % r.box[d];
      rest /= r.box[d];
      inside = inside && c >= 0 && c < static_cast<int64_t>(r.dims[d]);
      place += static_cast<size_t>(c) * (d == 0 ? size : r.strides[d - 1]);
    }
    const uint32_t linear = 2048 + e * size;  // shared address
    const uint32_t physical = (linear ^ ((linear >> 7 & span) << 4)) - 2048;
    if (inside) std::memcpy(&tile[physical], &host[place], size);
    if (inside) multiply(&expected[place], size, static_cast<float>(adds + 1));
  }
  const std::string name =
      "box" + std::to_string(r.rank) + (size == 4 ? "f" : "h") + "_" + std::to_string(span);
  ptx_test::check_stored(name + "_loaded", seed, ptx_test::as_words(loaded.data(), bytes),
                         ptx_test::as_words(tile.data(), bytes));
  ptx_test::check_stored(name + "_stored", seed, ptx_test::as_words(stored.data(), total),
                         ptx_test::as_words(expected.data(), total));
  CHECK(loaded == tile);
  CHECK(stored == expected);
}

void load_box_kernels() {
  static const bool loaded = [] {
    std::string text;
    for (int rank = 1; rank <= 5; ++rank) text += box_kernel(rank);
    ptx_test::load_text(text);
    return true;
  }();
  CHECK(loaded);
}

}  // namespace

// Asking what the device and the driver are leaves a thread without a context; what the launchers
// of flashtile call first gives it one.
TEST("the encoder wants a current context, which a thread has not from the start") {
  SKIP_WITHOUT_HOPPER();
  ptx_test::load_text(".visible .entry nothing()\n{\nret;\n}\n");
  ptx_test::begin_text(1);
  Buffer<char> memory(1024);
  std::thread([&] {
    CUtensorMap map;
    int device = -1, major = 0, driver = 0;
    CHECK(cudaGetDevice(&device) == cudaSuccess);
    CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess);
    CHECK(cudaDriverGetVersion(&driver) == cudaSuccess);
    CHECK(encode(&map, Request{}, memory.get()) == CUDA_ERROR_INVALID_CONTEXT);
    ptx_test::allow_shared("nothing", 100 * 1024);
    CHECK(encode(&map, Request{}, memory.get()) == CUDA_SUCCESS);
  }).join();
}
TEST("the encoder refuses what the driver refuses") {
  SKIP_WITHOUT_HOPPER();
  ptx_test::begin_text(1);
  Buffer<char> memory(1024);
  CUtensorMap map;
  CHECK(encode(&map, Request{}, memory.get()) == CUDA_SUCCESS);
  const auto with = [](auto change) {
    Request r;
    change(r);
    return r;
  };
  refuses("address", with([](Request& r) { r.shift = 8; }));
  refuses("rank 0", with([](Request& r) { r.rank = 0; }));
  refuses("rank 6", with([](Request& r) { r.rank = 6; }));
  refuses("empty dimension", with([](Request& r) { r.dims[1] = 0; }));
  refuses("long dimension", with([](Request& r) { r.dims[2] = (uint64_t{1} << 32) + 1; }));
  refuses("stride of 8", with([](Request& r) { r.strides[0] = 216; }));
  refuses("stride of 2^40", with([](Request& r) { r.strides[1] = uint64_t{1} << 40; }));
  refuses("box of 0", with([](Request& r) { r.box[1] = 0; }));
  refuses("box of 257", with([](Request& r) { r.box[1] = 257; }));
  refuses("row of 8 bytes", with([](Request& r) { r.box[0] = 4; }));
  refuses("row wider than the swizzle", with([](Request& r) { r.box[0] = 72; }));
  refuses("row wider than 64", with([](Request& r) { r.swizzle = CU_TENSOR_MAP_SWIZZLE_64B; }));
  refuses("row wider than 32", with([](Request& r) { r.swizzle = CU_TENSOR_MAP_SWIZZLE_32B; }));
  refuses("step 0", with([](Request& r) { r.steps[1] = 0; }));
  refuses("step 9", with([](Request& r) { r.steps[1] = 9; }));
  refuses("NaN fill of integers", with([](Request& r) {
            r.type = CU_TENSOR_MAP_DATA_TYPE_UINT16;
            r.fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;
          }));
  // The last stride of a rank is not looked at, nor is the step of the innermost dimension.
  CHECK(encode(&map, with([](Request& r) { r.rank = 1, r.strides[0] = 3; }), memory.get()) ==
        CUDA_SUCCESS);
  CHECK(encode(&map, with([](Request& r) { r.box[1] = 256; }), memory.get()) == CUDA_SUCCESS);
}
TEST("boxes of every rank and swizzle, inside and clipped") {
  SKIP_WITHOUT_HOPPER();
  load_box_kernels();
  const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                         CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  const std::array<int32_t, 5> places[] = {{0, 0, 0, 0, 0},  {40, 3, 2, 1, 1},  {-8, -2, -1, 0, 0},
                                           {96, 7, 4, 3, 2}, {200, 0, 0, 0, 0}, {3, 8, 0, -1, 2},
                                           {-64, 9, 5, 4, 3}};
  uint64_t seed = 1;
  for (cuuint32_t rank = 1; rank <= 5; ++rank) {
    for (const CUtensorMapSwizzle swizzle : swizzles) {
      for (const auto& at : places) {
        for (const auto type : {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT32}) {
          Box box;
          box.request.rank = rank;
          box.request.type = type;
          box.request.swizzle = swizzle;
          const uint32_t row = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE  ? 160
                               : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                               : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                                                                      : 128;
          box.request.box = {row / element_bytes(box.request), 4, 2, 2, 2, 1};
          box.request.dims[0] = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 51 : 100;
          box.at = at;
          box.adds = seed % 3;
          check_box(box, seed++);
        }
      }
    }
  }
}
