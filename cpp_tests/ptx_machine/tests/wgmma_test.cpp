// wgmma of every N, format, major-ness and swizzle, A from shared memory and from registers,
// against plain C++.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "conformance.h"
#include "half.h"
#include "text_kernel.h"

namespace {

using ptx_test::Buffer;
using ptx_test::Words;

enum Mode { kNone, k128, k64, k32 };  // as a descriptor encodes it

struct Shape {
  int n;
  bool bf16;
  bool registers;  // A
  bool a_mn, b_mn;
  Mode a_mode, b_mode;
  int sign_a = 1, sign_b = 1;
};

int span(Mode m) { return m == k128 ? 128 : m == k64 ? 64 : m == k32 ? 32 : 16; }

// How `rows` x kDepth halves lie in shared memory, and how a descriptor says so.
constexpr int kDepth = 32;  // two instructions
struct Layout {
  int rows;
  bool mn;
  Mode mode;
  int bytes() const {
    if (mode == kNone) return rows * kDepth * 2;
    const int width = span(mode);
    // The last panel of MN-major rows, and the rows of K-major ones, may be wider than what they
    // hold.
    return mn ? (rows * 2 + width - 1) / width * kDepth * width
              : rows * std::max(kDepth * 2, width);
  }

  int offset(int row, int k) const {  // of an element, before the swizzle
    const int width = span(mode);
    if (mode == kNone) {  // 8 x 16-byte core matrices, k outermost or innermost
      const int core = mn ? (row / 8) * (kDepth / 8) + k / 8 : (k / 8) * (rows / 8) + row / 8;
      return core * 128 + (mn ? k % 8 * 16 + row % 8 * 2 : row % 8 * 16 + k % 8 * 2);
    }
    if (mn) {  // panels of `width` bytes, a row for each k
      const int column = row * 2;
      return column / width * (kDepth * width) + k * width + column % width;
    }
    const int column = k * 2;  // panels of `width` bytes, a row for each row
    return column / width * (rows * width) + row * width + column % width;
  }
  int physical(int row, int k) const {
    const int at = offset(row, k);
    const int lines = span(mode) / 16 - 1;  // bits of the swizzle
    return at ^ ((at >> 7 & lines) << 4);
  }
  int leading() const {
    if (mode == kNone) return mn ? 128 : rows / 8 * 128;
    return mn ? kDepth * span(mode) : 0;
  }
  int stride() const {
    if (mode == kNone) return mn ? kDepth / 8 * 128 : 128;
    return 8 * span(mode);
  }
  int step() const {  // bytes to the next 16 of k
    if (mode == kNone) return mn ? 256 : 2 * leading();
    if (mn) return 16 * span(mode);
    return span(mode) >= 64 ? 32 : rows * 32;
  }
  uint64_t descriptor(int address) const {
    return static_cast<uint64_t>(address >> 4) | static_cast<uint64_t>(leading() >> 4) << 16 |
           static_cast<uint64_t>(stride() >> 4) << 32 | static_cast<uint64_t>(mode) << 62;
  }
};

std::string kernel_name(const Shape& s) {
  return "k" + std::to_string(s.n) + (s.bf16 ? "b" : "h") + (s.registers ? "r" : "s") +
         (s.a_mn ? "1" : "0") + (s.b_mn ? "1" : "0") + (s.sign_a < 0 ? "m" : "p") +
         (s.sign_b < 0 ? "m" : "p");
}

// With the swizzles, which are the descriptors'.
std::string full_name(const Shape& s) {
  return kernel_name(s) + "_" + std::to_string(s.a_mode) + std::to_string(s.b_mode);
}

// Copies an image into shared memory, multiplies twice (the second time adding), stores d[n / 2] of
// each thread. Parameters: image, words, descriptors of A and B, their steps, A fragments, result.
std::string kernel_text(const Shape& s) {
  const std::string f = s.bf16 ? "bf16" : "f16";
  const std::string tail = ", " + std::to_string(s.sign_a) + ", " + std::to_string(s.sign_b) +
                           (s.registers ? ""
                            : s.a_mn    ? ", 1"
                                        : ", 0") +
                           (s.b_mn ? ", 1" : ", 0");
  const std::string op = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(s.n) + "k16.f32." +
                         f + "." + f + " {" + ptx_test::names("%f", s.n / 2) + "}, ";
  std::string t =
      ".visible .entry " + kernel_name(s) +
      "(.param .u64 image, .param .u32 words, .param .u64 da, .param .u64 db, "
      ".param .u64 sa, .param .u64 sb, .param .u64 fragments, .param .u64 result)\n"
      ".maxntid 128, 1, 1\n{\n.reg .pred %p<3>; .reg .b32 %r<20>; .reg .b64 %d<20>;\n"
      ".reg .f32 %f<" +
      std::to_string(s.n / 2) +
      ">; .reg .b32 %a<8>;\n"
      "ld.param.u64 %d0, [image]; ld.param.u32 %r0, [words]; mov.u32 %r1, %tid.x;\n"
      "ld.param.u64 %d1, [da]; ld.param.u64 %d2, [db]; ld.param.u64 %d3, [sa];\n"
      "ld.param.u64 %d4, [sb]; ld.param.u64 %d5, [fragments]; ld.param.u64 %d6, [result];\n"
      "LOOP:\nsetp.ge.u32 %p0, %r1, %r0;\n@%p0 bra DONE;\n"
      "mul.wide.u32 %d7, %r1, 4; add.s64 %d7, %d7, %d0; ld.global.u32 %r2, [%d7];\n"
      "shl.b32 %r3, %r1, 2; add.s32 %r3, %r3, 1024; st.shared.u32 [%r3], %r2;\n"
      "add.s32 %r1, %r1, 128;\nbra LOOP;\nDONE:\n"
      "mov.u32 %r1, %tid.x; mul.wide.u32 %d7, %r1, 32; add.s64 %d7, %d7, %d5;\n"
      "ld.global.v4.u32 {%a0,%a1,%a2,%a3}, [%d7];\n"
      "ld.global.v4.u32 {%a4,%a5,%a6,%a7}, [%d7+16];\n"
      "fence.proxy.async;\nbar.sync 0;\n"
      "wgmma.fence.sync.aligned;\n";
  t += op + (s.registers ? "{%a0,%a1,%a2,%a3}" : "%d1") + ", %d2, 0" + tail + ";\n";
  t += "add.s64 %d1, %d1, %d3; add.s64 %d2, %d2, %d4;\n";
  t += op + (s.registers ? "{%a4,%a5,%a6,%a7}" : "%d1") + ", %d2, 1" + tail + ";\n";
  t += "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
       "mul.wide.u32 %d7, %r1, " +
       std::to_string(s.n * 2) + "; add.s64 %d7, %d7, %d6;\n";
  for (int i = 0; i < s.n / 2; ++i)
    t += "st.global.f32 [%d7+" + std::to_string(4 * i) + "], %f" + std::to_string(i) + ";\n";
  return t + "ret;\n}\n";
}

uint16_t narrow(float x, bool bf16) { return bf16 ? ptx::float_to_bf16(x) : ptx::float_to_fp16(x); }
float widen(uint16_t x, bool bf16) { return bf16 ? ptx::bf16_to_float(x) : ptx::fp16_to_float(x); }

// What is multiplied: small integers, whose sums are exact in any order and which are the same
// everywhere, or numbers whose sums are rounded.
enum class Values { kIntegers, kRounded };

// The number of wrong elements, -1 if the launch failed. `spoiled` bits of B's descriptor are
// flipped; a run with integers and without them belongs to the conformance set.
int count_wrong(const Shape& s, uint64_t seed, Values values, uint64_t spoiled = 0) {
  std::mt19937 random(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  const auto draw = [&] {
    if (values == Values::kRounded) return narrow(normal(random), s.bf16);
    return narrow(static_cast<float>(static_cast<int>(random() % 17) - 8), s.bf16);
  };
  std::vector<uint16_t> a(64 * kDepth), b(static_cast<size_t>(s.n) * kDepth);
  for (uint16_t& x : a) x = draw();
  for (uint16_t& x : b) x = draw();
  const Layout la{64, s.a_mn, s.a_mode}, lb{s.n, s.b_mn, s.b_mode};
  const int b_at = (la.bytes() + 1023) / 1024 * 1024;
  const int bytes = b_at + lb.bytes();
  std::vector<uint16_t> image(bytes / 2), fragments(128 * 16);
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < kDepth; ++k) image[la.physical(m, k) / 2] = a[m * kDepth + k];
  for (int n = 0; n < s.n; ++n)
    for (int k = 0; k < kDepth; ++k) image[(b_at + lb.physical(n, k)) / 2] = b[n * kDepth + k];
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 16; ++i) {  // step i / 8, register i / 2 % 4
      const int row = t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2);
      fragments[t * 16 + i] = a[row * kDepth + i / 8 * 16 + i / 4 % 2 * 8 + t % 4 * 2 + i % 2];
    }
  const Buffer<uint16_t> image_there(image), fragments_there(fragments);
  const Buffer<float> result(static_cast<size_t>(64) * s.n);

  ptx_test::begin_text(seed);
  void* pointers[] = {image_there.get(), fragments_there.get(), result.get()};
  uint32_t words = static_cast<uint32_t>(bytes / 4);
  uint64_t da = la.descriptor(1024), db = lb.descriptor(1024 + b_at) ^ spoiled;
  uint64_t sa = static_cast<uint64_t>(la.step() / 16), sb = static_cast<uint64_t>(lb.step() / 16);
  if (!ptx_test::launch_text(kernel_name(s), 128, bytes,
                             {static_cast<void*>(&pointers[0]), &words, &da, &db, &sa, &sb,
                              static_cast<void*>(&pointers[1]), static_cast<void*>(&pointers[2])}))
    return -1;
  ptx_test::check_wgmma(2, 2ull * 64 * s.n * kDepth);
  const std::vector<float> products = result.fetch();
  std::vector<float> expected(products.size());
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < s.n; ++n) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k)
        sum = std::fma(s.sign_a * widen(a[m * kDepth + k], s.bf16),
                       s.sign_b * widen(b[n * kDepth + k], s.bf16), sum);
      const int thread = m / 16 * 32 + m % 8 * 4 + n % 8 / 2;
      const int i = n / 8 * 4 + m % 16 / 8 * 2 + n % 2;
      expected[static_cast<size_t>(thread) * (s.n / 2) + i] = sum;
    }
  }
  const Words got = ptx_test::as_words(products.data(), products.size() * sizeof(float));
  const Words plain = ptx_test::as_words(expected.data(), expected.size() * sizeof(float));
  if (values == Values::kIntegers && spoiled == 0)
    ptx_test::check_stored("wgmma_" + full_name(s), seed, got, plain);
  int wrong = 0;
  for (size_t i = 0; i < got.size(); ++i) wrong += got[i] != plain[i];
  return wrong;
}

void check_shape(const Shape& s, uint64_t seed) {
  for (const Values values : {Values::kIntegers, Values::kRounded}) {
    if (values == Values::kRounded && !ptx_test::order_is_known()) continue;
    const int wrong = count_wrong(s, seed, values);
    CHECK_MESSAGE(wrong == 0, full_name(s) + ": " + std::to_string(wrong) + " elements differ");
  }
}

}  // namespace

TEST("wgmma of every N and format") {
  SKIP_WITHOUT_HOPPER();
  std::string text;
  std::vector<Shape> shapes;
  for (int n = 8; n <= 256; n += 8)
    for (const bool bf16 : {false, true})
      for (const bool registers : {false, true})
        shapes.push_back({n, bf16, registers, false, false, k128, k128});
  for (const Shape& s : shapes) text += kernel_text(s);
  ptx_test::load_text(text);
  for (const Shape& s : shapes) check_shape(s, static_cast<uint64_t>(s.n));
}
TEST("wgmma of every major-ness and swizzle") {
  SKIP_WITHOUT_HOPPER();
  std::string text;
  std::vector<Shape> shapes;
  const auto add = [&](const Shape& s, bool first) {
    if (first) text += kernel_text(s);
    shapes.push_back(s);
  };
  for (const bool registers : {false, true})
    for (const bool a_mn : {false, true})
      for (const bool b_mn : {false, true}) {
        if (registers && a_mn) continue;
        bool first = true;
        for (const Mode a_mode : {kNone, k128, k64, k32})
          for (const Mode b_mode : {kNone, k128, k64, k32}) {
            add({192, a_mn != b_mn, registers, a_mn, b_mn, a_mode, b_mode}, first);
            first = false;
          }
      }
  ptx_test::load_text(text);
  for (const Shape& s : shapes) check_shape(s, 7);
}
// B as the kernels have it in products with V, dO, Q and K: its N in whole 128-byte panels, in half
// of one, and in one and a half.
TEST("wgmma of MN-major B of every width that kernels have") {
  SKIP_WITHOUT_HOPPER();
  std::string text;
  std::vector<Shape> shapes;
  for (const int n : {32, 64, 96, 128, 192, 256})
    for (const bool bf16 : {false, true})
      for (const bool registers : {false, true})
        shapes.push_back({n, bf16, registers, false, true, k128, k128});
  for (const Shape& s : shapes) text += kernel_text(s);
  ptx_test::load_text(text);
  for (const Shape& s : shapes) check_shape(s, static_cast<uint64_t>(s.n) + 1);
}
TEST("wgmma with negated operands") {
  SKIP_WITHOUT_HOPPER();
  std::string text;
  std::vector<Shape> shapes;
  for (const int a : {1, -1})
    for (const int b : {1, -1})
      shapes.push_back({40, true, a == b, false, true, k128, kNone, a, b});
  for (const Shape& s : shapes) text += kernel_text(s);
  ptx_test::load_text(text);
  for (const Shape& s : shapes) check_shape(s, 3);
}
TEST("wgmma with a wrong descriptor gives other results") {
  SKIP_WITHOUT_HOPPER();
  const Shape k_major = {56, true, false, false, false, k128, k128};
  const Shape mn_major = {128, true, false, true, true, k128, k128};
  ptx_test::load_text(kernel_text(k_major) + kernel_text(mn_major));
  const uint64_t swizzle = uint64_t{3} << 62;          // 128 -> 64 bytes
  const uint64_t stride = uint64_t{64 ^ 32} << 32;     // half of it
  const uint64_t leading = uint64_t{256 ^ 128} << 16;  // half a panel
  for (const Shape& s : {k_major, mn_major}) {
    CHECK_EQ(count_wrong(s, 5, Values::kIntegers), 0);
    CHECK(count_wrong(s, 5, Values::kIntegers, stride) > 64);
  }
  CHECK(count_wrong(k_major, 5, Values::kIntegers, swizzle) > 64);
  CHECK(count_wrong(mn_major, 5, Values::kIntegers, leading) > 64);
  // K-major rows of 128 bytes have no leading offset.
  CHECK_EQ(count_wrong(k_major, 5, Values::kIntegers, leading), 0);
}
