# flashtile.pc names the folders that the files are in: PREFIX/lib was given as an absolute path, the
# include folder as a relative one (BUILD, which small.cmake made); then the other way round.
find_program(PKG_CONFIG NAMES pkg-config pkgconf)
if(NOT PKG_CONFIG)
  message("SKIPPED: no pkg-config on this machine")
  return()
endif()

# expect(<folder of flashtile.pc> <variable> <right>)
function(expect folder variable right)
  set(ENV{PKG_CONFIG_PATH} "${folder}")
  execute_process(
    COMMAND "${PKG_CONFIG}" "--variable=${variable}" flashtile
    OUTPUT_VARIABLE value
    OUTPUT_STRIP_TRAILING_WHITESPACE
    COMMAND_ERROR_IS_FATAL ANY
  )
  cmake_path(NORMAL_PATH value)
  if(NOT value STREQUAL right)
    message(FATAL_ERROR "${folder}/flashtile.pc: ${variable} is ${value}; right: ${right}")
  endif()
endfunction()

expect("${BUILD}/prefix/lib/pkgconfig" libdir "${BUILD}/prefix/lib")
expect("${BUILD}/prefix/lib/pkgconfig" includedir "${BUILD}/prefix/include")
foreach(file IN ITEMS lib/libflashtile.so include/flashtile/flashtile.h)
  if(NOT EXISTS "${BUILD}/prefix/${file}")
    message(FATAL_ERROR "${BUILD}/prefix/${file} was not installed")
  endif()
endforeach()

# Without a build: the file is put where an installation would put it, into a tree that has moved.
set(options -DFLASHTILE_CUDA=OFF -DFLASHTILE_TORCH=OFF -DFLASHTILE_BUILD_TESTS=OFF -DFLASHTILE_CXX_HAS_AVX2=OFF)
foreach(include IN ITEMS /elsewhere/include include)
  execute_process(
    COMMAND
      "${CMAKE_COMMAND}" -G "${GENERATOR}" -S "${SOURCE}" -B "${BUILD}/other" ${options}
      "-DCMAKE_C_COMPILER=${CC}" "-DCMAKE_CXX_COMPILER=${CXX}" -DCMAKE_INSTALL_PREFIX=/nowhere
      -DCMAKE_INSTALL_LIBDIR=lib/deep "-DCMAKE_INSTALL_INCLUDEDIR=${include}"
    COMMAND_ERROR_IS_FATAL ANY
  )
  set(moved "${BUILD}/moved/lib/deep/pkgconfig")
  file(MAKE_DIRECTORY "${moved}")
  file(COPY_FILE "${BUILD}/other/flashtile.pc" "${moved}/flashtile.pc")
  expect("${moved}" libdir "${BUILD}/moved/lib/deep")
  if(IS_ABSOLUTE "${include}")
    expect("${moved}" includedir "${include}")
  else()
    expect("${moved}" includedir "${BUILD}/moved/include")
  endif()
endforeach()
