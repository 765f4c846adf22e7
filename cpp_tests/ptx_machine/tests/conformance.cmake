# The conformance set, written by the machine: compares it with FILE, or writes it there.
#   cmake -DPROGRAMS=a,b -DFILE=conformance.txt -DWORK=DIR [-DWRITE=ON] -P conformance.cmake
# The comment on top of FILE stays.

set(lines "${WORK}/conformance_lines.txt")
file(REMOVE "${lines}")
string(REPLACE "," ";" PROGRAMS "${PROGRAMS}")
foreach(program IN LISTS PROGRAMS)
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E env "FLASHTILE_CONFORMANCE_OUT=${lines}" "${program}"
    RESULT_VARIABLE result
    OUTPUT_VARIABLE output
  )
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${program} failed:\n${output}")
  endif()
endforeach()

file(READ "${FILE}" stored)
string(REGEX MATCH "^(#[^\n]*\n)*" comment "${stored}")
file(READ "${lines}" now)
if(WRITE)
  file(WRITE "${FILE}" "${comment}${now}")
elseif(NOT stored STREQUAL "${comment}${now}")
  message(
    FATAL_ERROR
    "${FILE} is not what the machine gives now; if that is meant: cmake --build <build> --target conformance_file, and look at the difference"
  )
endif()
