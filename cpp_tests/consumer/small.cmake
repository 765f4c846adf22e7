# Builds and installs a small flashtile as a packager would who has flags and folders of his own:
# -ffast-math, CMAKE_CXX_FLAGS_RELEASE, an absolute library and a relative include folder.
set(options -DFLASHTILE_CUDA=OFF -DFLASHTILE_TORCH=OFF -DFLASHTILE_BUILD_TESTS=OFF -DFLASHTILE_CXX_HAS_AVX2=OFF)
execute_process(
  COMMAND
    "${CMAKE_COMMAND}" -G "${GENERATOR}" -S "${SOURCE}" -B "${BUILD}" ${options} -DCMAKE_BUILD_TYPE=Release
    "-DCMAKE_C_COMPILER=${CC}" "-DCMAKE_CXX_COMPILER=${CXX}" -DCMAKE_CXX_FLAGS=-ffast-math
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DOF_THE_USER" "-DCMAKE_INSTALL_PREFIX=${BUILD}/prefix"
    "-DCMAKE_INSTALL_LIBDIR=${BUILD}/prefix/lib"
  COMMAND_ERROR_IS_FATAL ANY
)
execute_process(COMMAND "${CMAKE_COMMAND}" --build "${BUILD}" COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND "${CMAKE_COMMAND}" --install "${BUILD}" COMMAND_ERROR_IS_FATAL ANY)
