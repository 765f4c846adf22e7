// Results, and refusals of NaN, rest on IEEE arithmetic. CMakeLists.txt turns -ffast-math and its
// parts off; a build that turns them on all the same ends here. Macros alone: cpu/vec.h includes
// this once per instruction set.
#pragma once

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__NO_SIGNED_ZEROS__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ != 0)
#error "flashtile needs IEEE arithmetic: compile it without -ffast-math and every part of it"
#endif
static_assert(0.1 != 0.1f,
              "flashtile is fp64, too: compile it without -fsingle-precision-constant");
