# Compiles attention.c as C99 with nothing but a compiler and runs it. MODE is "plain" (-I, -L, -l) or
# "pkg-config": the command that its comment prints, as it stands there. Prints SKIPPED where
# pkg-config is not installed.
file(MAKE_DIRECTORY "${OUTPUT}")
if(MODE STREQUAL "pkg-config")
  find_program(PKG_CONFIG NAMES pkg-config)
  if(NOT PKG_CONFIG)
    message("SKIPPED: no pkg-config on this machine")
    return()
  endif()
  file(READ "${SOURCE}" program)
  if(NOT program MATCHES "\n \\*   (rpath=[^\n]*)\n \\*   (cc [^\n]* && ./a[.]out) \\*/")
    message(FATAL_ERROR "no command in the comment of ${SOURCE}")
  endif()
  set(command "${CMAKE_MATCH_1}\n${CMAKE_MATCH_2}")
  message("${command}")
  file(COPY "${SOURCE}" DESTINATION "${OUTPUT}")
  set(ENV{PKG_CONFIG_PATH} "${PREFIX}/${LIBDIR}/pkgconfig")
  execute_process(COMMAND sh -c "${command}" WORKING_DIRECTORY "${OUTPUT}" COMMAND_ERROR_IS_FATAL ANY)
else()
  execute_process(
    COMMAND
      "${CC}" -std=c99 -pedantic -Wall -Wextra -Werror "${SOURCE}" -o "${OUTPUT}/program"
      "-I${PREFIX}/include" "-L${PREFIX}/${LIBDIR}" -lflashtile -lm "-Wl,-rpath,${PREFIX}/${LIBDIR}"
    COMMAND_ERROR_IS_FATAL ANY
  )
  execute_process(COMMAND "${OUTPUT}/program" COMMAND_ERROR_IS_FATAL ANY)
endif()
