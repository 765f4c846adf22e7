// Instructions of one warp against plain C++: matrices between registers and shared memory,
// products, conversions, phases of an mbarrier.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "conformance.h"
#include "half.h"
#include "text_kernel.h"

namespace {

using ptx_test::Buffer;

constexpr int kWords = 16;            // of each lane, in and out
using Lanes = std::vector<uint32_t>;  // [32][kWords]

// A kernel of one warp: %x0.. are the lane's words in, %y0.. those out, %l the lane, %s its 16
// bytes of shared memory.
std::string warp_kernel(const std::string& name, const std::string& body) {
  std::string t = ".visible .entry " + name +
                  "(.param .u64 in, .param .u64 out)\n{\n"
                  ".reg .b32 %x<16>; .reg .b32 %y<16>; .reg .b32 %l; .reg .b32 %s;\n"
                  ".reg .b32 %r<8>; .reg .b64 %d<4>; .reg .b64 %t<4>; .reg .pred %p<4>;\n"
                  "mov.u32 %l, %tid.x; shl.b32 %s, %l, 4; add.s32 %s, %s, 1024;\n"
                  "ld.param.u64 %d0, [in]; ld.param.u64 %d1, [out]; mul.wide.u32 %d2, %l, 64;\n"
                  "add.s64 %d0, %d0, %d2; add.s64 %d1, %d1, %d2;\n";
  for (int i = 0; i < kWords; ++i) {
    const std::string n = std::to_string(i);
    t +=
        "ld.global.u32 %x" + n + ", [%d0+" + std::to_string(4 * i) + "]; mov.u32 %y" + n + ", 0;\n";
  }
  t += body + "\n";
  for (int i = 0; i < kWords; ++i)
    t += "st.global.u32 [%d1+" + std::to_string(4 * i) + "], %y" + std::to_string(i) + ";\n";
  return t + "ret;\n}\n";
}

Lanes run(const std::string& name, const Lanes& in) {
  const Buffer<uint32_t> from(in), to(in.size());
  uint32_t* source = from.get();
  uint32_t* target = to.get();
  ptx_test::begin_text(1);
  ptx_test::launch_text(name, 32, 1024, {static_cast<void*>(&source), static_cast<void*>(&target)});
  return to.fetch();
}

// Words [0, count) of every lane.
Lanes first_words(const Lanes& lanes, int count) {
  Lanes words;
  for (size_t at = 0; at < lanes.size(); at += kWords)
    words.insert(words.end(), &lanes[at], &lanes[at] + count);
  return words;
}

// Bit for bit as the machine's own.
void check_words(const std::string& name, unsigned seed, const Lanes& out, int count) {
  ptx_test::check_stored(name, seed, first_words(out, count));
}

Lanes random_words(unsigned seed) {
  std::mt19937 random(seed);
  Lanes words(32 * kWords);
  for (uint32_t& w : words) w = static_cast<uint32_t>(random());
  return words;
}

// Matrices of 8 x 8 halves: row r of matrix m is what lane 8 m + r has in its words 0 to 3.
uint16_t element(const Lanes& rows, int m, int row, int column) {
  const uint32_t word = rows[static_cast<size_t>(8 * m + row) * kWords + column / 2];
  return static_cast<uint16_t>(column % 2 ? word >> 16 : word);
}
// What lane l holds of matrix m as a fragment.
uint32_t fragment(const Lanes& rows, int m, int l, bool transposed) {
  const int a = l / 4, b = 2 * (l % 4);
  return transposed ? element(rows, m, b, a) | uint32_t{element(rows, m, b + 1, a)} << 16
                    : element(rows, m, a, b) | uint32_t{element(rows, m, a, b + 1)} << 16;
}

std::string matrix_name(bool load, int count, bool transposed) {
  return std::string(load ? "ld" : "st") + "x" + std::to_string(count) + (transposed ? "t" : "");
}

std::string matrix_kernel(bool load, int count, bool transposed) {
  const std::string form = "matrix.sync.aligned.m8n8.x" + std::to_string(count) +
                           (transposed ? ".trans" : "") + ".shared.b16 ";
  const std::string body =
      load ? "st.shared.v4.u32 [%s], {%x0,%x1,%x2,%x3};\nbar.warp.sync 0xffffffff;\nld" + form +
                 "{" + ptx_test::names("%y", count) + "}, [%s];"
           : "st.shared.v4.u32 [%s], {%y0,%y0,%y0,%y0};\nbar.warp.sync 0xffffffff;\nst" + form +
                 "[%s], {" + ptx_test::names("%x", count) +
                 "};\nbar.warp.sync 0xffffffff;\nld.shared.v4.u32 {%y0,%y1,%y2,%y3}, [%s];";
  return warp_kernel(matrix_name(load, count, transposed), body);
}

template <class Check>
void for_matrices(Check&& check) {
  for (const bool load : {true, false})
    for (const int count : {1, 2, 4})
      for (const bool transposed : {false, true}) check(load, count, transposed);
}

float as_float(uint32_t x) { return std::bit_cast<float>(x); }

std::string product_kernel(const std::string& type) {
  return warp_kernel("mma_" + type, "mma.sync.aligned.m16n8k16.row.col.f32." + type + "." + type +
                                        ".f32 {%y0,%y1,%y2,%y3}, {%x0,%x1,%x2,%x3}, {%x4,%x5}, "
                                        "{%x6,%x7,%x8,%x9};");
}

template <class H>
void check_product(const std::string& type, unsigned seed) {
  std::mt19937 random(seed);
  const auto draw = [&] { return static_cast<float>(static_cast<int>(random() % 17) - 8); };
  float a[16][16], b[16][8], c[16][8];  // small integers: sums are exact
  for (auto& row : a)
    for (float& x : row) x = draw();
  for (auto& row : b)
    for (float& x : row) x = draw();
  for (auto& row : c)
    for (float& x : row) x = draw();
  const auto pair = [](float low, float high) {
    return H::narrow(low) | uint32_t{H::narrow(high)} << 16;
  };
  Lanes in(32 * kWords);
  for (int l = 0; l < 32; ++l) {
    uint32_t* x = &in[static_cast<size_t>(l) * kWords];
    const int g = l / 4, k = 2 * (l % 4);
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i % 2), column = k + 8 * (i / 2);
      x[i] = pair(a[row][column], a[row][column + 1]);
    }
    for (int i = 0; i < 2; ++i) x[4 + i] = pair(b[k + 8 * i][g], b[k + 8 * i + 1][g]);
    for (int i = 0; i < 4; ++i) x[6 + i] = std::bit_cast<uint32_t>(c[g + i / 2 * 8][k + i % 2]);
  }
  const Lanes out = run("mma_" + type, in);
  check_words("mma_" + type, seed, out, 4);
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8, column = 2 * (l % 4) + i % 2;
      float sum = c[row][column];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      CHECK_EQ(as_float(out[static_cast<size_t>(l) * kWords + i]), sum);
    }
  }
}

// Numbers of every size, ties and limits of both formats, infinities, NaN.
Lanes floats(unsigned seed) {
  Lanes words = random_words(seed);
  const float special[] = {0.0f,     -0.0f,    1.0f,       1.00390625f, 1.01171875f, 65504.0f,
                           65519.9f, 65520.0f, 5.9604e-8f, 2.9802e-8f,  2.9803e-8f,  6.0976e-5f,
                           3.4e38f,  -1e-40f,  INFINITY,   -INFINITY,   NAN};
  for (size_t i = 0; i < std::size(special); ++i)
    words[i * 5] = std::bit_cast<uint32_t>(special[i]);
  return words;
}

}  // namespace

TEST("ldmatrix and stmatrix of every form") {
  SKIP_WITHOUT_HOPPER();
  std::string text;
  for_matrices([&](bool load, int count, bool transposed) {
    text += matrix_kernel(load, count, transposed);
  });
  ptx_test::load_text(text);
  const Lanes in = random_words(1);
  for_matrices([&](bool load, int count, bool transposed) {
    const Lanes out = run(matrix_name(load, count, transposed), in);
    int wrong = 0;
    for (int m = 0; m < count; ++m) {
      for (int l = 0; l < 32; ++l) {
        // stmatrix is the way back: what it stored, read as a fragment, is what it was given.
        wrong += load ? out[static_cast<size_t>(l) * kWords + m] != fragment(in, m, l, transposed)
                      : in[static_cast<size_t>(l) * kWords + m] != fragment(out, m, l, transposed);
      }
    }
    CHECK_MESSAGE(wrong == 0, matrix_name(load, count, transposed));
    check_words(matrix_name(load, count, transposed), 1, out, load ? count : 4);
  });
}
TEST("movmatrix") {
  SKIP_WITHOUT_HOPPER();
  ptx_test::load_text(warp_kernel("mov_matrix", "movmatrix.sync.aligned.m8n8.trans.b16 %y0, %x0;"));
  const Lanes in = random_words(2), out = run("mov_matrix", in);
  check_words("mov_matrix", 2, out, 1);
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 2;
         ++i) {  // element (row l / 4, column 2 (l % 4) + i) comes from its mirror
      const int row = 2 * (l % 4) + i, column = l / 4;
      const uint32_t word = in[static_cast<size_t>(4 * row + column / 2) * kWords];
      CHECK_EQ(out[static_cast<size_t>(l) * kWords] >> 16 * i & 0xFFFF,
               word >> 16 * (column % 2) & 0xFFFF);
    }
  }
}
TEST("mma.sync of both formats") {
  SKIP_WITHOUT_HOPPER();
  ptx_test::load_text(product_kernel("f16") + product_kernel("bf16"));
  for (unsigned seed = 1; seed <= 4; ++seed) {
    check_product<ptx::Fp16>("f16", seed);
    check_product<ptx::Bf16>("bf16", seed);
  }
}
TEST("conversions to pairs of halves") {
  SKIP_WITHOUT_HOPPER();
  ptx_test::load_text(warp_kernel("pairs",
                                  "cvt.rn.bf16x2.f32 %y0, %x0, %x1;\n"
                                  "cvt.rn.f16x2.f32 %y1, %x0, %x1;\n"
                                  "cvt.rn.relu.bf16x2.f32 %y2, %x0, %x1;\n"
                                  "cvt.rn.relu.f16x2.f32 %y3, %x0, %x1;"));
  for (unsigned seed = 1; seed <= 8; ++seed) {
    const Lanes in = floats(seed), out = run("pairs", in);
    check_words("pairs", seed, out, 4);
    for (size_t at = 0; at < in.size(); at += kWords) {
      const float high = as_float(in[at]), low = as_float(in[at + 1]);
      const auto pair = [&](auto narrow) { return narrow(low) | uint32_t{narrow(high)} << 16; };
      const auto relu = [](uint16_t x) -> uint16_t { return x & 0x8000 ? 0 : x; };
      CHECK_EQ(out[at], pair(ptx::float_to_bf16));
      CHECK_EQ(out[at + 1], pair(ptx::float_to_fp16));
      CHECK_EQ(out[at + 2], pair([&](float x) { return relu(ptx::float_to_bf16(x)); }));
      CHECK_EQ(out[at + 3], pair([&](float x) { return relu(ptx::float_to_fp16(x)); }));
    }
  }
}
TEST("ex2.approx is within two units of the last place") {
  SKIP_WITHOUT_HOPPER();
  ptx_test::load_text(warp_kernel("exponentials", "ex2.approx.ftz.f32 %y0, %x0;"));
  std::mt19937 random(5);
  const auto uniform = [&] {  // in [-126, 127), the same everywhere
    return std::ldexp(static_cast<float>(random() >> 8), -24) * 253.0f - 126.0f;
  };
  Lanes all;
  for (int round = 0; round < 32; ++round) {
    Lanes in(32 * kWords);
    for (size_t at = 0; at < in.size(); at += kWords) in[at] = std::bit_cast<uint32_t>(uniform());
    in[0] = std::bit_cast<uint32_t>(-INFINITY);
    const Lanes out = run("exponentials", in), results = first_words(out, 1);
    all.insert(all.end(), results.begin(), results.end());
    CHECK_EQ(out[0], 0u);
    for (size_t at = kWords; at < in.size(); at += kWords) {
      const double exact = std::exp2(static_cast<double>(as_float(in[at])));
      const double unit = std::ldexp(1.0, std::ilogb(exact) - 23);
      CHECK(std::fabs(as_float(out[at]) - exact) <= 2 * unit);
    }
  }
  ptx_test::check_stored_near("exponentials", 5, all, 2);
}
TEST("phases of an mbarrier, one thread") {
  SKIP_WITHOUT_HOPPER();
  const auto parity = [](int y, int p) {
    return "mbarrier.test_wait.parity.shared::cta.b64 %p0, [%s], " + std::to_string(p) +
           ";\nselp.u32 %y" + std::to_string(y) + ", 1, 0, %p0;\n";
  };
  const auto token = [](int y) {
    return "mbarrier.test_wait.shared::cta.b64 %p0, [%s], %t0;\nselp.u32 %y" + std::to_string(y) +
           ", 1, 0, %p0;\n";
  };
  const std::string body =
      "setp.ne.u32 %p1, %l, 0;\n@%p1 bra END;\n"
      "mbarrier.init.shared::cta.b64 [%s], 3;\n" +
      parity(0, 0) + parity(1, 1) + "mbarrier.arrive.shared::cta.b64 %t0, [%s];\n" + token(2) +
      "mbarrier.arrive.shared::cta.b64 _, [%s], 2;\n" + token(3) + parity(4, 0) + parity(5, 1) +
      "mbarrier.arrive.expect_tx.shared::cta.b64 %t0, [%s], 48;\n"
      "mbarrier.arrive.shared::cta.b64 _, [%s], 2;\n" +
      token(6) + "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%s], 32;\n" + token(7) +
      "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%s], 16;\n" + token(8) + parity(9, 1) +
      "END:";
  ptx_test::load_text(warp_kernel("phases", body));
  const Lanes out = run("phases", Lanes(32 * kWords));
  const std::vector<uint32_t> expected = {0, 1, 0, 1, 1, 0, 0, 0, 1, 1};
  for (size_t i = 0; i < expected.size(); ++i)
    CHECK_MESSAGE(out[i] == expected[i], "answer " + std::to_string(i));
  ptx_test::check_stored("phases", 0, {&out[0], &out[expected.size()]});
}
