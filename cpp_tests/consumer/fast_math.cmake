# The core's sources refuse to be compiled with -ffast-math or a part of it that the compiler tells;
# the flags that CMake appends (IEEE) take each of them back, at a link too.
set(flags
    -ffast-math
    -Ofast
    -funsafe-math-optimizations
    -ffinite-math-only
    -freciprocal-math
    "-fassociative-math -fno-signed-zeros -fno-trapping-math"
    -fno-signed-zeros
)
separate_arguments(ieee UNIX_COMMAND "${IEEE}")
foreach(flag IN LISTS flags)
  separate_arguments(options UNIX_COMMAND "${flag}")
  set(compile "${CXX}" -std=c++20 -fsyntax-only "-I${SOURCE}/include" "-I${SOURCE}/kernel" ${options})
  set(file "${SOURCE}/kernel/api/check_problem.cpp")
  execute_process(COMMAND ${compile} "${file}" RESULT_VARIABLE status ERROR_VARIABLE sentence OUTPUT_QUIET)
  if(status EQUAL 0 OR NOT sentence MATCHES "flashtile needs IEEE arithmetic")
    message(FATAL_ERROR "compiled with ${flag}, where the compiler says that it is on: ${sentence}")
  endif()
  execute_process(COMMAND ${compile} ${ieee} "${file}" COMMAND_ERROR_IS_FATAL ANY)
endforeach()
