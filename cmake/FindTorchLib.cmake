# Finds libtorch inside a Python installation of torch, without find_package(Torch): no CUDA toolkit,
# no ABI-tied flags, and a CPU-only torch is enough to build the op library for every torch.
#
# Input:  TORCH_ROOT (cache or environment), the directory that holds lib/ and include/; otherwise the
#         interpreter Python_EXECUTABLE is asked, without importing torch.
# Output: TorchLib_FOUND, TorchLib_VERSION, TorchLib_ROOT, TorchLib_INCLUDE_DIR, TorchLib_LIBRARY_DIR
#         TorchLib::stable   headers and libraries for code on the stable ABI
#         TorchLib::libtorch the same with the C++ API (ATen, autograd); tied to this torch
set(_torch_root "${TORCH_ROOT}")
if(NOT _torch_root AND DEFINED ENV{TORCH_ROOT})
  set(_torch_root "$ENV{TORCH_ROOT}")
endif()
if(NOT _torch_root)
  find_package(Python QUIET COMPONENTS Interpreter)
  # purelib is asked too: under pip's build isolation it still names the user's environment.
  set(_torch_query "import importlib.util as u, os, sysconfig
s = u.find_spec('torch')
c = list(s.submodule_search_locations) if s else []
c += [os.path.join(sysconfig.get_path(k), 'torch') for k in ('purelib', 'platlib')]
print(next((p for p in c if os.path.isfile(os.path.join(p, 'lib', 'libtorch_cpu.so'))), ''), end='')")
  if(Python_EXECUTABLE)
    execute_process(COMMAND "${Python_EXECUTABLE}" -c "${_torch_query}"
                    OUTPUT_VARIABLE _torch_root ERROR_QUIET)
  endif()
endif()

set(TorchLib_ROOT "${_torch_root}")
unset(TorchLib_INCLUDE_DIR)
if(EXISTS "${TorchLib_ROOT}/include/torch/csrc/stable/library.h")
  set(TorchLib_INCLUDE_DIR "${TorchLib_ROOT}/include")
endif()
foreach(_name torch torch_cpu c10)
  find_library(TorchLib_${_name} ${_name} PATHS "${TorchLib_ROOT}/lib" NO_DEFAULT_PATH NO_CACHE)
endforeach()
if(TorchLib_INCLUDE_DIR)
  file(STRINGS "${TorchLib_INCLUDE_DIR}/torch/headeronly/version.h" _torch_lines
       REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "[^0-9;]+" "" _torch_version "${_torch_lines}")
  list(JOIN _torch_version "." TorchLib_VERSION)
  get_filename_component(TorchLib_LIBRARY_DIR "${TorchLib_torch_cpu}" DIRECTORY)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TorchLib
  REQUIRED_VARS TorchLib_ROOT TorchLib_INCLUDE_DIR TorchLib_torch TorchLib_torch_cpu TorchLib_c10
  VERSION_VAR TorchLib_VERSION
  REASON_FAILURE_MESSAGE "set TORCH_ROOT, or Python_EXECUTABLE to an interpreter with torch >= 2.11")

if(TorchLib_FOUND AND NOT TARGET TorchLib::stable)
  # libtorch.so must stay in DT_NEEDED: in a CUDA torch it brings libtorch_cuda.so, which holds the
  # stream shim. One string, because CMake drops repeated flags that stand alone.
  add_library(TorchLib::stable INTERFACE IMPORTED)
  target_include_directories(TorchLib::stable SYSTEM INTERFACE "${TorchLib_INCLUDE_DIR}")
  target_link_libraries(
    TorchLib::stable INTERFACE "-Wl,--push-state,--no-as-needed,${TorchLib_torch},--pop-state"
                               "${TorchLib_torch_cpu}")
  target_link_options(TorchLib::stable INTERFACE LINKER:--allow-shlib-undefined)
  add_library(TorchLib::libtorch INTERFACE IMPORTED)
  target_include_directories(TorchLib::libtorch SYSTEM
                             INTERFACE "${TorchLib_INCLUDE_DIR}/torch/csrc/api/include")
  target_link_libraries(TorchLib::libtorch INTERFACE TorchLib::stable "${TorchLib_c10}")
  target_compile_features(TorchLib::libtorch INTERFACE cxx_std_20)
endif()
