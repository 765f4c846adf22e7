# An nvcc that is too old: AUTO builds without CUDA and says so in one line, ON stops; both name the
# switch for cmake, make and pip.
file(WRITE "${BUILD}/bin/nvcc" "#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
file(CHMOD "${BUILD}/bin/nvcc" PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
set(ENV{CUDACXX} "${BUILD}/bin/nvcc")
set(options -DFLASHTILE_TORCH=OFF -DFLASHTILE_BUILD_TESTS=OFF -DFLASHTILE_CXX_HAS_AVX2=OFF)
foreach(cuda IN ITEMS AUTO ON)
  execute_process(
    COMMAND
      "${CMAKE_COMMAND}" -G "${GENERATOR}" -S "${SOURCE}" -B "${BUILD}/${cuda}" ${options}
      "-DFLASHTILE_CUDA=${cuda}" "-DCMAKE_C_COMPILER=${CC}" "-DCMAKE_CXX_COMPILER=${CXX}"
    RESULT_VARIABLE status
    OUTPUT_VARIABLE output
    ERROR_VARIABLE output
  )
  message("${output}")
  if(cuda STREQUAL "AUTO")
    if(NOT status EQUAL 0 OR NOT output MATCHES "-- (flashtile: [^\n]*)\n")
      message(FATAL_ERROR "FLASHTILE_CUDA=AUTO: one line and a build without CUDA was expected")
    endif()
    set(sentence "${CMAKE_MATCH_1}")
  else()
    if(status EQUAL 0)
      message(FATAL_ERROR "FLASHTILE_CUDA=ON was configured with nvcc 12.4")
    endif()
    string(REGEX REPLACE "[ \n]+" " " sentence "${output}")
    foreach(word IN ITEMS "FLASHTILE_CUDA is ON and" "Set CUDACXX to nvcc 13[.]0 or later, or CUDA_HOME")
      if(NOT sentence MATCHES "${word}")
        message(FATAL_ERROR "FLASHTILE_CUDA=ON: no word of ${word}")
      endif()
    endforeach()
  endif()
  foreach(
    word IN
    ITEMS "nvcc is nvcc 12[.]4, the kernels need 13[.]0 or later" "-DFLASHTILE_CUDA=OFF for cmake"
          " CUDA=OFF for make" "FLASHTILE_CUDA=OFF in pip's"
  )
    if(NOT sentence MATCHES "${word}")
      message(FATAL_ERROR "FLASHTILE_CUDA=${cuda}: no word of ${word}")
    endif()
  endforeach()
endforeach()
