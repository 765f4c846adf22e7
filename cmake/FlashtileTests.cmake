# flashtile_add_tests(<target> [LABELS label...] [TIMEOUT seconds] [ENVIRONMENT VAR=value...]
#                     [TESTS_OF target...] [FIRST_WORD_IS_LABEL] [ERROR_TABLE] [MATRIX_REPORT])
#
# TESTS_OF: targets whose objects the target is linked with, and whose tests it has, too.
#
# FIRST_WORD_IS_LABEL: the first word of a test's name is one more label of it.
#
# ERROR_TABLE: the tests add to the table of error ratios that the test error_table/print prints.
#
# MATRIX_REPORT: the tests run cells of cpp_tests/support/matrix.h; the test matrix/count counts them.
#
# What may take longest starts first (COST), so that no long test runs alone at the end.
#
# Registers every TEST("name") of the target's sources with ctest as <target>/<name>. Reading the
# sources needs no run of the executable at build time; editing one reconfigures.
function(flashtile_add_tests target)
  cmake_parse_arguments(ARG "FIRST_WORD_IS_LABEL;ERROR_TABLE;MATRIX_REPORT" "TIMEOUT" "LABELS;ENVIRONMENT;TESTS_OF"
                        ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300) # sanitizers and busy machines are slow
  endif()
  math(EXPR cost "${ARG_TIMEOUT} / 60")
  if(ARG_ERROR_TABLE)
    list(APPEND ARG_ENVIRONMENT "FLASHTILE_ERROR_TABLE=${PROJECT_BINARY_DIR}/error_table")
  endif()
  if(ARG_MATRIX_REPORT)
    list(APPEND ARG_ENVIRONMENT "FLASHTILE_MATRIX_REPORT=${PROJECT_BINARY_DIR}/matrix_report")
  endif()
  # Tests run side by side: threads that spin while they wait would take the others' cores.
  list(APPEND ARG_ENVIRONMENT "OMP_WAIT_POLICY=passive")
  set(sources "")
  foreach(owner IN ITEMS ${target} ${ARG_TESTS_OF})
    get_target_property(owned ${owner} SOURCES)
    list(APPEND sources ${owned})
  endforeach()
  foreach(source IN LISTS sources)
    if(NOT source MATCHES "_test\\.(cpp|cu)$")
      continue()
    endif()
    get_filename_component(source "${source}" ABSOLUTE)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${source}")
    file(STRINGS "${source}" lines REGEX "^TEST\\(\"")
    foreach(line IN LISTS lines)
      string(REGEX REPLACE "^TEST\\(\"([^\"]*)\".*" "\\1" name "${line}")
      set(labels ${ARG_LABELS})
      if(ARG_FIRST_WORD_IS_LABEL)
        string(REGEX MATCH "^[a-z]+" word "${name}")
        list(APPEND labels ${word})
      endif()
      add_test(NAME "${target}/${name}" COMMAND ${target} "${name}")
      set_tests_properties(
        "${target}/${name}"
        PROPERTIES SKIP_RETURN_CODE 77
                   TIMEOUT ${ARG_TIMEOUT}
                   COST ${cost}
                   LABELS "${labels}"
                   ENVIRONMENT "${ARG_ENVIRONMENT}"
      )
      set(fixtures "")
      if(ARG_ERROR_TABLE)
        list(APPEND fixtures flashtile_error_table)
      endif()
      if(ARG_MATRIX_REPORT)
        list(APPEND fixtures flashtile_matrix_report)
      endif()
      if(fixtures)
        set_tests_properties("${target}/${name}" PROPERTIES FIXTURES_REQUIRED "${fixtures}")
      endif()
    endforeach()
  endforeach()
endfunction()
