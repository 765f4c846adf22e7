# Compiles attention.c as C99 with nothing but a compiler and runs it. MODE is "plain" (-I, -L, -l) or
# "pkg-config". Prints SKIPPED where pkg-config is not installed.
if(MODE STREQUAL "pkg-config")
  find_program(PKG_CONFIG NAMES pkg-config pkgconf)
  if(NOT PKG_CONFIG)
    message("SKIPPED: no pkg-config on this machine")
    return()
  endif()
  set(ENV{PKG_CONFIG_PATH} "${PREFIX}/${LIBDIR}/pkgconfig")
  execute_process(
    COMMAND "${PKG_CONFIG}" --cflags --libs flashtile
    OUTPUT_VARIABLE flags
    OUTPUT_STRIP_TRAILING_WHITESPACE
    COMMAND_ERROR_IS_FATAL ANY
  )
  separate_arguments(flags)
else()
  set(flags "-I${PREFIX}/include" "-L${PREFIX}/${LIBDIR}" -lflashtile)
endif()
file(MAKE_DIRECTORY "${OUTPUT}")
execute_process(
  COMMAND
    "${CC}" -std=c99 -pedantic -Wall -Wextra -Werror "${SOURCE}" -o "${OUTPUT}/program" ${flags} -lm
    "-Wl,-rpath,${PREFIX}/${LIBDIR}"
  COMMAND_ERROR_IS_FATAL ANY
)
execute_process(COMMAND "${OUTPUT}/program" COMMAND_ERROR_IS_FATAL ANY)
