# Takes -ffast-math and its parts back, wherever they come from: CMAKE_CXX_FLAGS, CXXFLAGS or the
# add_compile_options of a project that contains this one. exp2 of the CPU op adds and subtracts a
# constant, and a NaN must be seen to be refused. Directory options come after all of those.
#
# Each is one item with SHELL:, so that CMake drops no flag that was named before. The parts
# are named too: what -fno-fast-math takes back differs between compilers.
set(flashtile_ieee_flags
    -fno-fast-math
    -fno-unsafe-math-optimizations
    -fno-associative-math
    -fno-reciprocal-math
    -fno-finite-math-only
    -fsigned-zeros
)
list(JOIN flashtile_ieee_flags " " flashtile_ieee_flags)
add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:SHELL:${flashtile_ieee_flags}>")

# A library linked with these flags, or -Ofast, turns denormals off in every process that loads it. No
# other -O than the last one counts, and at a link it means nothing else.
add_link_options("$<$<LINK_LANGUAGE:C,CXX>:SHELL:-fno-fast-math -fno-unsafe-math-optimizations -O3>")
