# cmake --install: libraries, headers, CMake package (components core and torch), pkg-config file.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/flashtile")
find_package(OpenMP COMPONENTS CXX) # kernel/ has found it in its own scope

# Two exports: who uses the shared library needs neither OpenMP nor the CUDA runtime.
foreach(kind IN ITEMS shared static)
  install(
    TARGETS flashtile_${kind}
    EXPORT flashtile_${kind}
    LIBRARY COMPONENT runtime NAMELINK_COMPONENT dev
    ARCHIVE COMPONENT dev
    FILE_SET HEADERS COMPONENT dev
  )
  install(
    EXPORT flashtile_${kind}
    NAMESPACE flashtile::
    FILE flashtile-${kind}-targets.cmake
    DESTINATION "${package_dir}"
    COMPONENT dev
  )
endforeach()

set(FLASHTILE_PC_PRIVATE "-lstdc++ -lm")
if(OpenMP_CXX_FOUND)
  string(APPEND FLASHTILE_PC_PRIVATE " -lgomp")
endif()
if(FLASHTILE_HAS_CUDA)
  string(APPEND FLASHTILE_PC_PRIVATE " -L${CUDAToolkit_LIBRARY_DIR} -lcudart_static -lpthread -ldl -lrt")
endif()
# Relative to the file itself, so that an installed tree can be moved; where it lies outside of the
# prefix, it cannot.
set(FLASHTILE_PC_PREFIX "${CMAKE_INSTALL_PREFIX}")
if(NOT IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")
  file(RELATIVE_PATH FLASHTILE_PC_PREFIX "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/")
  string(PREPEND FLASHTILE_PC_PREFIX "\${pcfiledir}/")
endif()
foreach(dir IN ITEMS LIBDIR INCLUDEDIR)
  cmake_path(ABSOLUTE_PATH CMAKE_INSTALL_${dir} BASE_DIRECTORY "\${prefix}" OUTPUT_VARIABLE FLASHTILE_PC_${dir})
endforeach()
configure_file(cmake/flashtile.pc.in flashtile.pc @ONLY)
install(
  FILES "${PROJECT_BINARY_DIR}/flashtile.pc"
  DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig"
  COMPONENT dev
)

configure_package_config_file(
  cmake/flashtileConfig.cmake.in
  "${PROJECT_BINARY_DIR}/flashtileConfig.cmake"
  INSTALL_DESTINATION "${package_dir}"
  PATH_VARS CMAKE_INSTALL_LIBDIR CMAKE_INSTALL_INCLUDEDIR
)
write_basic_package_version_file(
  "${PROJECT_BINARY_DIR}/flashtileConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion
)
install(
  FILES
    "${PROJECT_BINARY_DIR}/flashtileConfig.cmake"
    "${PROJECT_BINARY_DIR}/flashtileConfigVersion.cmake"
    cmake/FindTorchLib.cmake
  DESTINATION "${package_dir}"
  COMPONENT dev
)

if(FLASHTILE_TORCH)
  # The torch component: the operator library and the header-only C++ API. The consumer's own torch
  # is found by its find_package(Torch) or by FindTorchLib.
  install(
    DIRECTORY include/flashtile
    DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
    COMPONENT dev
    FILES_MATCHING
    PATTERN "torch*.h"
  )
  install(FILES $<TARGET_FILE:flashtile_torch> DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT runtime)
endif()
