// Arithmetic opcodes on edge cases and random values, against the same computation in plain C++.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "run.h"

namespace {

using ptx_test::Array;
using I16 = int16_t;
using U16 = uint16_t;
using I32 = int32_t;
using U32 = uint32_t;
using I64 = int64_t;
using U64 = uint64_t;

template <class Op>
__global__ void apply(const typename Op::A* a, const typename Op::B* b, const typename Op::C* c,
                      typename Op::D* d) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  d[i] = Op::device(a[i], b[i], c[i]);
}

// An opcode: result type and constraint, three operand types and constraints, text, plain C++.
#define OPCODE(Name, TD, cd, TA, ca, TB, cb, TC, cc, text, expression)                \
  struct Name {                                                                       \
    using D = TD;                                                                     \
    using A = TA;                                                                     \
    using B = TB;                                                                     \
    using C = TC;                                                                     \
    __device__ static D device(A a, B b, C c) {                                       \
      D d;                                                                            \
      asm volatile(text : cd(d) : ca(a), cb(b), cc(c));                               \
      return d;                                                                       \
    }                                                                                 \
    static D host([[maybe_unused]] A a, [[maybe_unused]] B b, [[maybe_unused]] C c) { \
      return static_cast<D>(expression);                                              \
    }                                                                                 \
  };
#define OPCODE_32(Name, T, text, expression) \
  OPCODE(Name, T, "=r", T, "r", T, "r", T, "r", text, expression)
#define OPCODE_64(Name, T, text, expression) \
  OPCODE(Name, T, "=l", T, "l", T, "l", T, "l", text, expression)
#define OPCODE_16(Name, T, text, expression) \
  OPCODE(Name, T, "=h", T, "h", T, "h", T, "h", text, expression)
#define OPCODE_F(Name, text, expression) \
  OPCODE(Name, float, "=f", float, "f", float, "f", float, "f", text, expression)

OPCODE_32(AddS32, I32, "add.s32 %0, %1, %2;", U32(a) + U32(b))
OPCODE_32(SubS32, I32, "sub.s32 %0, %1, %2;", U32(a) - U32(b))
OPCODE_32(MulLoS32, I32, "mul.lo.s32 %0, %1, %2;", U32(a) * U32(b))
OPCODE_32(MulHiS32, I32, "mul.hi.s32 %0, %1, %2;", (I64(a) * b) >> 32)
OPCODE_32(MulHiU32, U32, "mul.hi.u32 %0, %1, %2;", (U64(a) * b) >> 32)
OPCODE_32(MadLoS32, I32, "mad.lo.s32 %0, %1, %2, %3;", U32(a) * U32(b) + U32(c))
OPCODE_32(DivS32, I32, "div.s32 %0, %1, %2;", b == 0 ? -1 : I64(a) / b)
OPCODE_32(RemU32, U32, "rem.u32 %0, %1, %2;", b == 0 ? a : a % b)
OPCODE_32(MinS32, I32, "min.s32 %0, %1, %2;", a < b ? a : b)
OPCODE_32(MaxU32, U32, "max.u32 %0, %1, %2;", a > b ? a : b)
OPCODE_32(AbsS32, I32, "abs.s32 %0, %1;", a < 0 ? 0 - U32(a) : U32(a))
OPCODE_32(AndNotXor, U32, "{ .reg .b32 t; and.b32 t, %1, %2; not.b32 t, t; xor.b32 %0, t, %3; }",
          ~(a& b) ^ c)
OPCODE_32(ShlB32, U32, "shl.b32 %0, %1, %2;", b > 31 ? 0 : a << b)
OPCODE_32(ShrU32, U32, "shr.u32 %0, %1, %2;", b > 31 ? 0 : a >> b)
OPCODE_32(ShrS32, I32, "shr.s32 %0, %1, %2;", a >> (U32(b) > 31 ? 31 : b))
OPCODE_32(Majority, U32, "lop3.b32 %0, %1, %2, %3, 0xE8;", (a & b) | (a & c) | (b & c))
OPCODE_32(Lop3Mixed, U32, "lop3.b32 %0, %1, %2, %3, 0x2D;", (~a & (b | ~c)) | (a & ~b & c))
OPCODE_32(Popc, U32, "popc.b32 %0, %1;", std::popcount(a))
OPCODE_32(Clz, U32, "clz.b32 %0, %1;", std::countl_zero(a))
OPCODE_32(Brev, U32, "brev.b32 %0, %1;", [&] {
  U32 r = 0;
  for (int i = 0; i < 32; ++i) r = r << 1 | (a >> i & 1);
  return r;
}())
OPCODE_32(BfeU32, U32, "bfe.u32 %0, %1, 5, 9;", (a >> 5) & 0x1FF)
OPCODE_32(BfeS32, I32, "bfe.s32 %0, %1, 5, 9;", I32(U32(a) << 18) >> 23)
OPCODE_32(BfiB32, U32, "bfi.b32 %0, %1, %2, 8, 12;", (b & ~0xFFF00u) | ((a & 0xFFF) << 8))
OPCODE_32(ShfLeft, U32, "shf.l.wrap.b32 %0, %1, %2, %3;", ((U64(b) << 32 | a) << (c & 31)) >> 32)
OPCODE_32(ShfRight, U32, "shf.r.wrap.b32 %0, %1, %2, %3;", (U64(b) << 32 | a) >> (c & 31))
OPCODE_32(Prmt, U32, "prmt.b32 %0, %1, %2, 0x9075;", [&] {
  const U64 bytes = U64(b) << 32 | a;
  const auto byte = [&](int i) { return U32(bytes >> (8 * i)) & 0xFF; };
  return byte(5) | byte(7) << 8 | byte(0) << 16 | (byte(1) & 0x80 ? 0xFFu : 0u) << 24;
}())
OPCODE(MulWideS32, I64, "=l", I32, "r", I32, "r", I32, "r", "mul.wide.s32 %0, %1, %2;", I64(a) * b)
OPCODE(MulWideU32, U64, "=l", U32, "r", U32, "r", U32, "r", "mul.wide.u32 %0, %1, %2;", U64(a) * b)
OPCODE(MulWideU16, U32, "=r", U16, "h", U16, "h", U16, "h", "mul.wide.u16 %0, %1, %2;", U32(a) * b)
OPCODE(MadWideS32, I64, "=l", I32, "r", I32, "r", I64, "l", "mad.wide.s32 %0, %1, %2, %3;",
       U64(I64(a) * b) + U64(c))
OPCODE_64(AddS64, I64, "add.s64 %0, %1, %2;", U64(a) + U64(b))
OPCODE_64(MulLoS64, I64, "mul.lo.s64 %0, %1, %2;", U64(a) * U64(b))
OPCODE_64(MulHiU64, U64, "mul.hi.u64 %0, %1, %2;", (static_cast<unsigned __int128>(a) * b) >> 64)
OPCODE_64(DivU64, U64, "div.u64 %0, %1, %2;", b == 0 ? ~U64(0) : a / b)
OPCODE_64(MinS64, I64, "min.s64 %0, %1, %2;", a < b ? a : b)
OPCODE(ShlB64, U64, "=l", U64, "l", U32, "r", U32, "r", "shl.b64 %0, %1, %2;", b > 63 ? 0 : a << b)
OPCODE(ShrS64, I64, "=l", I64, "l", U32, "r", U32, "r", "shr.s64 %0, %1, %2;",
       a >> (b > 63 ? 63 : b))
OPCODE_16(AddS16, I16, "add.s16 %0, %1, %2;", a + b)
OPCODE_16(MulLoU16, U16, "mul.lo.u16 %0, %1, %2;", U32(a) * b)
OPCODE(ShrS16, I16, "=h", I16, "h", U32, "r", U32, "r", "shr.s16 %0, %1, %2;",
       a >> (b > 15 ? 15 : b))

OPCODE_F(AddF32, "add.f32 %0, %1, %2;", a + b)
OPCODE_F(SubF32, "sub.rn.f32 %0, %1, %2;", a - b)
OPCODE_F(MulF32, "mul.f32 %0, %1, %2;", a* b)
OPCODE_F(FmaF32, "fma.rn.f32 %0, %1, %2, %3;", std::fma(a, b, c))
OPCODE_F(MinF32, "min.f32 %0, %1, %2;", a == b ? (std::signbit(a) ? a : b) : std::fmin(a, b))
OPCODE_F(MaxF32, "max.f32 %0, %1, %2;", a == b ? (std::signbit(a) ? b : a) : std::fmax(a, b))
OPCODE_F(NegAbs, "{ .reg .f32 t; abs.f32 t, %1; neg.f32 %0, t; }", -std::fabs(a))
OPCODE_F(DivF32, "div.rn.f32 %0, %1, %2;", a / b)
OPCODE_F(SqrtF32, "sqrt.rn.f32 %0, %1;", std::sqrt(a))
OPCODE_F(RcpF32, "rcp.rn.f32 %0, %1;", 1.0f / a)
OPCODE(FmaF64, double, "=d", double, "d", double, "d", double, "d", "fma.rn.f64 %0, %1, %2, %3;",
       std::fma(a, b, c))

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
OPCODE_F(AddFtz, "add.ftz.f32 %0, %1, %2;", flush(flush(a) + flush(b)))
OPCODE_F(MulFtz, "mul.ftz.f32 %0, %1, %2;", flush(flush(a) * flush(b)))
OPCODE_F(MaxFtz, "max.ftz.f32 %0, %1, %2;", MaxF32::host(flush(a), flush(b), c))
OPCODE_F(NegFtz, "neg.ftz.f32 %0, %1;", -flush(a))

OPCODE(Rzi, I32, "=r", float, "f", float, "f", float, "f", "cvt.rzi.s32.f32 %0, %1;",
       a != a               ? 0
       : a >= 2147483648.0f ? 2147483647
       : a < -2147483648.0f ? I32(-2147483648ll)
                            : I32(a))
OPCODE(Rni, I32, "=r", float, "f", float, "f", float, "f", "cvt.rni.s32.f32 %0, %1;",
       a != a               ? 0
       : a >= 2147483648.0f ? 2147483647
       : a < -2147483648.0f ? I32(-2147483648ll)
                            : std::nearbyint(a))
OPCODE(FromS32, float, "=f", I32, "r", I32, "r", I32, "r", "cvt.rn.f32.s32 %0, %1;", a)
OPCODE(FromU64, float, "=f", U64, "l", U64, "l", U64, "l", "cvt.rn.f32.u64 %0, %1;", a)
OPCODE(SignExtend, I64, "=l", I32, "r", I32, "r", I32, "r", "cvt.s64.s32 %0, %1;", a)
OPCODE(ZeroExtend, U64, "=l", U32, "r", U32, "r", U32, "r", "cvt.u64.u32 %0, %1;", a)
OPCODE(Byte, I32, "=r", I32, "r", I32, "r", I32, "r", "cvt.s32.s8 %0, %1;", static_cast<int8_t>(a))
OPCODE(Narrow, U16, "=h", U32, "r", U32, "r", U32, "r", "cvt.u16.u32 %0, %1;", a)
OPCODE(Widen64, double, "=d", float, "f", float, "f", float, "f", "cvt.f64.f32 %0, %1;", a)
OPCODE(Narrow64, float, "=f", double, "d", double, "d", double, "d", "cvt.rn.f32.f64 %0, %1;", a)
OPCODE(Pack, U64, "=l", U32, "r", U32, "r", U32, "r", "mov.b64 %0, {%2, %1};", U64(a) << 32 | b)
OPCODE(Unpack, U32, "=r", U64, "l", U64, "l", U64, "l", "{ .reg .b32 t; mov.b64 {t, %0}, %1; }",
       a >> 32)
OPCODE(SwapHalves, U32, "=r", U32, "r", U32, "r", U32, "r",
       "{ .reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, l}; }", a << 16 | a >> 16)

OPCODE_32(SetpS32, I32, "{ .reg .pred p; setp.lt.s32 p, %1, %2; selp.s32 %0, %1, %3, p; }",
          a < b ? a : c)
OPCODE_32(SetpHi, U32, "{ .reg .pred p; setp.hi.u32 p, %1, %2; selp.u32 %0, 1, 0, p; }", a > b)
OPCODE(SetpF, U32, "=r", float, "f", float, "f", float, "f",
       "{ .reg .pred p, q, r; setp.gtu.f32 r, %2, %3; setp.le.and.f32 p|q, %1, %2, !r; .reg .u32 t;"
       " selp.u32 t, 1, 0, p; @q add.u32 t, t, 2; mov.u32 %0, t; }",
       ((a <= b) && !(b > c || b != b || c != c) ? 1 : 0) +
           (!(a <= b) && !(b > c || b != b || c != c) ? 2 : 0))
OPCODE(SetpNan, U32, "=r", float, "f", float, "f", float, "f",
       "{ .reg .pred p; setp.nan.f32 p, %1, %2; selp.u32 %0, 1, 0, p; }", a != a || b != b)
OPCODE(SetpNeu, U32, "=r", float, "f", float, "f", float, "f",
       "{ .reg .pred p, q; setp.neu.f32 p, %1, %2; setp.ne.f32 q, %1, %2; .reg .u32 t; selp.u32 t, "
       "2, 0, p;"
       " @q or.b32 t, t, 1; mov.u32 %0, t; }",
       (a == b ? 0 : 2) | (a == b || a != a || b != b ? 0 : 1))
OPCODE_32(PredLogic, U32,
          "{ .reg .pred p, q, r; setp.eq.u32 p, %1, %2; setp.lt.u32 q, %2, %3; xor.pred r, p, q; "
          "not.pred q, q;"
          " and.pred p, p, q; or.pred r, r, p; selp.b32 %0, 7, 3, r; }",
          (((a == b) != (b < c)) || ((a == b) && !(b < c))) ? 7 : 3)

template <class T>
std::vector<T> samples(size_t count, uint32_t seed) {
  std::mt19937_64 random(seed);
  std::vector<T> edges;
  if constexpr (std::is_floating_point_v<T>) {
    const T inf = std::numeric_limits<T>::infinity();
    edges = {0,
             T(-0.0),
             1,
             -1,
             T(0.5),
             T(1.5),
             T(2.5),
             inf,
             -inf,
             std::numeric_limits<T>::quiet_NaN(),
             T(1e-40),
             T(-3e-39),
             T(1e30),
             T(-1e38),
             T(2147483648.0),
             T(-2147483648.0),
             T(65504),
             T(1.17549435e-38)};
  } else {
    using L = std::numeric_limits<T>;
    edges = {0,  1,  T(-1), 2,        5,        T(-7),           15,           16, 31, 32,
             33, 63, 64,    L::min(), L::max(), T(L::max() - 1), T(0x12345678)};
  }
  std::vector<T> values(count);
  for (T& v : values) {
    const uint64_t r = random();
    if (r % 2 == 0)
      v = edges[(r >> 8) % edges.size()];
    else if constexpr (std::is_floating_point_v<T>)
      v = static_cast<T>(static_cast<double>(static_cast<int64_t>(random())) /
                         (1ull << (random() % 64)));
    else
      v = static_cast<T>(random() >> (random() % 64));
  }
  return values;
}

template <class T>
bool same(T x, T y) {
  if (x != x && y != y) return true;
  return std::memcmp(&x, &y, sizeof(T)) == 0;
}

template <class Op>
void check_opcode(const char* name) {
  constexpr int kCount = 1024;
  ptx_test::fresh_machine();
  const Array<typename Op::A> a(samples<typename Op::A>(kCount, 1));
  const Array<typename Op::B> b(samples<typename Op::B>(kCount, 2));
  const Array<typename Op::C> c(samples<typename Op::C>(kCount, 3));
  const Array<typename Op::D> d(kCount);
  apply<Op><<<8, 128>>>(a.get(), b.get(), c.get(), d.get());
  ptx_test::check_clean();
  const auto x = a.host();
  const auto y = b.host();
  const auto z = c.host();
  const auto got = d.host();
  int wrong = 0;
  for (int i = 0; i < kCount; ++i) wrong += !same(got[i], Op::host(x[i], y[i], z[i]));
  CHECK_MESSAGE(wrong == 0,
                std::string(name) + ": " + std::to_string(wrong) + " of 1024 results differ");
}
#define CHECK_OPCODE(Name) check_opcode<Name>(#Name)

}  // namespace

TEST("integer arithmetic") {
  CHECK_OPCODE(AddS32), CHECK_OPCODE(SubS32), CHECK_OPCODE(MulLoS32), CHECK_OPCODE(MulHiS32),
      CHECK_OPCODE(MulHiU32);
  CHECK_OPCODE(MadLoS32), CHECK_OPCODE(DivS32), CHECK_OPCODE(RemU32), CHECK_OPCODE(MinS32),
      CHECK_OPCODE(MaxU32);
  CHECK_OPCODE(AbsS32), CHECK_OPCODE(MulWideS32), CHECK_OPCODE(MulWideU32),
      CHECK_OPCODE(MulWideU16);
  CHECK_OPCODE(MadWideS32), CHECK_OPCODE(AddS64), CHECK_OPCODE(MulLoS64), CHECK_OPCODE(MulHiU64),
      CHECK_OPCODE(DivU64);
  CHECK_OPCODE(MinS64), CHECK_OPCODE(AddS16), CHECK_OPCODE(MulLoU16);
}
TEST("logic, shifts and bit fields") {
  CHECK_OPCODE(AndNotXor), CHECK_OPCODE(ShlB32), CHECK_OPCODE(ShrU32), CHECK_OPCODE(ShrS32),
      CHECK_OPCODE(Majority);
  CHECK_OPCODE(Lop3Mixed), CHECK_OPCODE(Popc), CHECK_OPCODE(Clz), CHECK_OPCODE(Brev),
      CHECK_OPCODE(BfeU32);
  CHECK_OPCODE(BfeS32), CHECK_OPCODE(BfiB32), CHECK_OPCODE(ShfLeft), CHECK_OPCODE(ShfRight),
      CHECK_OPCODE(Prmt);
  CHECK_OPCODE(ShlB64), CHECK_OPCODE(ShrS64), CHECK_OPCODE(ShrS16);
}
TEST("floating point") {
  CHECK_OPCODE(AddF32), CHECK_OPCODE(SubF32), CHECK_OPCODE(MulF32), CHECK_OPCODE(FmaF32),
      CHECK_OPCODE(MinF32);
  CHECK_OPCODE(MaxF32), CHECK_OPCODE(NegAbs), CHECK_OPCODE(DivF32), CHECK_OPCODE(SqrtF32),
      CHECK_OPCODE(RcpF32);
  CHECK_OPCODE(FmaF64);
}
TEST("flush to zero") {
  CHECK_OPCODE(AddFtz), CHECK_OPCODE(MulFtz), CHECK_OPCODE(MaxFtz), CHECK_OPCODE(NegFtz);
}
TEST("conversions and moves") {
  CHECK_OPCODE(Rzi), CHECK_OPCODE(Rni), CHECK_OPCODE(FromS32), CHECK_OPCODE(FromU64),
      CHECK_OPCODE(SignExtend);
  CHECK_OPCODE(ZeroExtend), CHECK_OPCODE(Byte), CHECK_OPCODE(Narrow), CHECK_OPCODE(Widen64),
      CHECK_OPCODE(Narrow64);
  CHECK_OPCODE(Pack), CHECK_OPCODE(Unpack), CHECK_OPCODE(SwapHalves);
}
TEST("comparisons and predicates") {
  CHECK_OPCODE(SetpS32), CHECK_OPCODE(SetpHi), CHECK_OPCODE(SetpF), CHECK_OPCODE(SetpNan),
      CHECK_OPCODE(SetpNeu);
  CHECK_OPCODE(PredLogic);
}
