# A bare make prints the targets, and the demos build what they need, no test: at most 90 steps, and
# a few more for the library that the engine links.
unset(ENV{MAKEFLAGS}) # of a make that runs this

# make_says(<variable> <argument>...)
function(make_says variable)
  execute_process(
    COMMAND "${MAKE}" --no-print-directory -C "${SOURCE}" ${ARGN}
    OUTPUT_VARIABLE output
    COMMAND_ERROR_IS_FATAL ANY
  )
  set(${variable} "${output}" PARENT_SCOPE)
endfunction()

make_says(bare -n)
if(NOT bare MATCHES "^sed [^\n]*\n$")
  message(FATAL_ERROR "a bare make does more than print: ${bare}")
endif()
make_says(help help)
message("${help}")
file(READ "${SOURCE}/Makefile" makefile)
if(NOT makefile MATCHES "\n[.]PHONY: help ([^\n]*)")
  message(FATAL_ERROR "no .PHONY line in the Makefile")
endif()
string(REPLACE " " ";" targets "${CMAKE_MATCH_1}")
foreach(target IN LISTS targets)
  if(NOT help MATCHES "make ${target}[^-a-z]")
    message(FATAL_ERROR "make help has no word of ${target}")
  endif()
endforeach()

# Beside those that compile scores: sources of that name, and slices of that variant.
set(most_scores 35)
set(most_demo 90)
set(most_demo-engine 95)
foreach(demo IN ITEMS demo demo-engine)
  make_says(commands -n ${demo})
  string(REGEX MATCHALL "cmake --build --preset [^\n]*" builds "${commands}")
  string(REGEX MATCHALL "--target [a-z_]+" targets "${builds}")
  list(LENGTH builds build_count)
  list(LENGTH targets target_count)
  if(build_count EQUAL 0 OR NOT build_count EQUAL target_count)
    message(FATAL_ERROR "make ${demo} builds more than it names: ${builds}")
  endif()
  list(TRANSFORM targets REPLACE "--target " "")
  execute_process(
    COMMAND "${NINJA}" -C "${BUILD}" -t commands ${targets} OUTPUT_VARIABLE steps COMMAND_ERROR_IS_FATAL ANY
  )
  string(REGEX MATCHALL "\n" count "${steps}")
  list(LENGTH count count)
  string(REGEX MATCHALL " -o [^ ]*(_scores[.]dir/|/scores[.]cpp|/check_scores[.]cpp)[^\n]*\n" scores "${steps}")
  list(LENGTH scores scores)
  math(EXPR others "${count} - ${scores}")
  message("make ${demo}: ${targets}, ${others} steps and ${scores} of scores")
  if(count LESS 5 OR others GREATER most_${demo} OR scores GREATER most_scores OR steps MATCHES "/cpp_tests/")
    message(
      FATAL_ERROR
        "make ${demo} takes ${others} steps and ${scores} of scores; allowed: ${most_${demo}} and "
        "${most_scores}, without tests"
    )
  endif()
endforeach()
