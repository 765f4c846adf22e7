# Finds nvcc without insisting on it and decides what is compiled for which architecture.
#
#   FLASHTILE_HAS_CUDA            whether CUDA is enabled
#   FLASHTILE_LARGE_ARCHITECTURES for kernels of the 163 KB shared memory class
#   FLASHTILE_SMALL_ARCHITECTURES for kernels of the 99 KB class
#   FLASHTILE_HAS_SM90            whether sm_90a is built, whose kernels run on compute capability 9.0 only

include(CheckLanguage)

set(FLASHTILE_HAS_CUDA FALSE)
set(FLASHTILE_LARGE_ARCHITECTURES "")
set(FLASHTILE_SMALL_ARCHITECTURES "")
set(FLASHTILE_HAS_SM90 false)

if(FLASHTILE_CUDA STREQUAL "OFF")
  message(STATUS "flashtile: CUDA kernels off (FLASHTILE_CUDA=OFF)")
  return()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80-real;89-real;90a-real;90-virtual")
endif()

# Why there are no kernels: AUTO goes on, ON does not.
macro(flashtile_without_cuda reason)
  set(switches "-DFLASHTILE_CUDA=OFF for cmake, CUDA=OFF for make, FLASHTILE_CUDA=OFF in pip's environment")
  if(FLASHTILE_CUDA STREQUAL "ON")
    message(
      FATAL_ERROR
      "FLASHTILE_CUDA is ON and ${reason}. Set CUDACXX to nvcc 13.0 or later, or CUDA_HOME to its toolkit. To build without CUDA: ${switches}"
    )
  endif()
  message(STATUS "flashtile: ${reason}: CUDA kernels are left out, CUDA calls will say so (to choose that: ${switches})")
  return()
endmacro()

if(CMAKE_CUDA_COMPILER)
  set(nvcc "${CMAKE_CUDA_COMPILER}")
elseif(DEFINED ENV{CUDACXX})
  set(nvcc "$ENV{CUDACXX}")
else()
  find_program(
    FLASHTILE_NVCC nvcc
    HINTS ENV CUDA_HOME
    PATHS /usr/local/cuda
    PATH_SUFFIXES bin
  )
  mark_as_advanced(FLASHTILE_NVCC)
  set(nvcc "${FLASHTILE_NVCC}")
endif()
if(NOT nvcc)
  flashtile_without_cuda("no nvcc was found")
endif()

# Asked before CMake is: what enable_language has begun cannot be taken back.
execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE nvcc_version ERROR_QUIET)
if(nvcc_version MATCHES "release ([0-9]+\\.[0-9]+)" AND CMAKE_MATCH_1 VERSION_LESS 13.0)
  flashtile_without_cuda("${nvcc} is nvcc ${CMAKE_MATCH_1}, the kernels need 13.0 or later")
endif()

# check_language tests what CUDACXX names; CMAKE_CUDA_COMPILER would skip the test.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  set(ENV{CUDACXX} "${nvcc}")
  check_language(CUDA)
  unset(ENV{CUDACXX}) # a project around this one sees it as it was
else()
  check_language(CUDA)
endif()
if(NOT CMAKE_CUDA_COMPILER)
  flashtile_without_cuda("${nvcc} does not work")
endif()

enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(FLASHTILE_HAS_CUDA TRUE)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
# CMake 3.25 does not know that nvcc 12 and later have C++20.
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()

# 90a stands for two things: the kernels that only sm_90a has, and machine code of the general ones.
# sm_80 machine code also runs on sm_86 (99 KB) and sm_87 (163 KB), PTX on both classes.
foreach(arch IN LISTS CMAKE_CUDA_ARCHITECTURES)
  if(arch MATCHES "^90a(-real)?$")
    set(FLASHTILE_HAS_SM90 true)
  endif()
  string(REGEX REPLACE "^90a" "90" arch "${arch}")
  if(NOT arch MATCHES "^([0-9]+)(-real|-virtual)?$")
    message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES has '${arch}'; allowed: numbers from 80 on, with -real or -virtual")
  endif()
  set(number "${CMAKE_MATCH_1}")
  if(number LESS 80)
    message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES has '${arch}'; allowed: 80 and later")
  endif()
  if(arch MATCHES "-virtual$" OR NOT arch MATCHES "-real$" OR number EQUAL 80)
    list(APPEND FLASHTILE_LARGE_ARCHITECTURES "${arch}")
    list(APPEND FLASHTILE_SMALL_ARCHITECTURES "${arch}")
  elseif(number MATCHES "^(86|89|120|121)$")
    list(APPEND FLASHTILE_SMALL_ARCHITECTURES "${arch}")
  else()
    list(APPEND FLASHTILE_LARGE_ARCHITECTURES "${arch}")
  endif()
endforeach()
list(REMOVE_DUPLICATES FLASHTILE_LARGE_ARCHITECTURES)
list(REMOVE_DUPLICATES FLASHTILE_SMALL_ARCHITECTURES)
message(STATUS "flashtile: CUDA ${CUDAToolkit_VERSION}, 163 KB class: ${FLASHTILE_LARGE_ARCHITECTURES}; 99 KB class: ${FLASHTILE_SMALL_ARCHITECTURES}")

# The mma.sync kernels are compiled to PTX once, for 8.0, and that becomes the machine code of every
# architecture: nvcc makes the same PTX of them for 8.9 and 9.0. So what the tests execute is what
# devices run. NN-virtual takes this PTX along, for whatever comes later.
function(flashtile_compile_for target)
  set(codes "")
  foreach(arch IN LISTS ARGN)
    string(REGEX MATCH "^[0-9]+" number "${arch}")
    if(NOT arch MATCHES "-virtual$")
      list(APPEND codes sm_${number})
    endif()
    if(NOT arch MATCHES "-real$")
      list(APPEND codes compute_80)
    endif()
  endforeach()
  list(REMOVE_DUPLICATES codes)
  list(JOIN codes "," codes)
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES OFF CUDA_RUNTIME_LIBRARY None)
  target_compile_options(${target} PRIVATE "SHELL:--generate-code=arch=compute_80,code=[${codes}]")
endfunction()
