# Compiler flags of every host target (pyflowmap_flags, pyflowmap_instrumented), and the instruction sets a CPU kernel is compiled for.

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
if(NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  message(FATAL_ERROR "pyflowmap: the compiler is ${CMAKE_CXX_COMPILER_ID}; the kernels need GCC or Clang "
                      "(set CXX=g++ or CXX=clang++)")
endif()
include(CheckCXXCompilerFlag)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_CXX_FLAGS_RELEASE -O3)  # no -DNDEBUG: the few internal asserts of the core are cheap and stay

add_library(pyflowmap_flags INTERFACE)
target_compile_features(pyflowmap_flags INTERFACE cxx_std_17)
target_include_directories(pyflowmap_flags INTERFACE ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
set(host_flags
    -ffp-contract=off    # a*b+c rounds twice on every instruction set: the same noise, the same sums
    -fno-math-errno -fno-trapping-math    # without these two, loops with sqrt or a comparison stay scalar
    -Wall -Wextra)
if(PYFLOWMAP_WERROR)
  list(APPEND host_flags -Werror)
endif()
target_compile_options(pyflowmap_flags INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${host_flags}>")

# ---- threads --------------------------------------------------------------------------------------------------------
# Linked by SONAME (libgomp.so.1) and never bundled: at run time it is the copy that torch, imported first, has loaded.
set(openmp ${PYFLOWMAP_OPENMP})
if(openmp STREQUAL AUTO AND (APPLE OR PYFLOWMAP_SANITIZE MATCHES thread))
  set(openmp OFF)  # a second libomp beside torch's crashes; a libgomp without instrumentation reports false races
endif()
if(openmp STREQUAL AUTO)
  find_package(OpenMP QUIET COMPONENTS CXX)
elseif(openmp)
  find_package(OpenMP REQUIRED COMPONENTS CXX)
endif()
if(openmp AND OpenMP_CXX_FOUND)
  target_link_libraries(pyflowmap_flags INTERFACE OpenMP::OpenMP_CXX)
endif()

# ---- sanitizers -----------------------------------------------------------------------------------------------------
# Everything but the emulator's own bookkeeping, which is not part of the program it emulates: csrc/simt/sanitizer.h.
add_library(pyflowmap_instrumented INTERFACE)
target_link_libraries(pyflowmap_instrumented INTERFACE pyflowmap_flags)
if(PYFLOWMAP_SANITIZE)
  set(sanitize -fsanitize=${PYFLOWMAP_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  target_compile_options(pyflowmap_instrumented INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${sanitize};-O1>")
  target_link_options(pyflowmap_instrumented INTERFACE ${sanitize})
endif()
if(NOT APPLE)
  target_link_options(pyflowmap_flags INTERFACE -Wl,--exclude-libs,ALL -Wl,--as-needed)
endif()

# ---- instruction sets -----------------------------------------------------------------------------------------------
# <kernel>_isa.cpp is compiled once per entry with PYFLOWMAP_ISA=<entry>; <kernel>.cpp picks one at run time, among
# those for which PYFLOWMAP_HAS_V3 / PYFLOWMAP_HAS_V4 is 1. Portable to Arm, musl and clang, where target_clones is not.
set(PYFLOWMAP_ISAS base)
set(PYFLOWMAP_ISA_FLAGS_base "")
set(PYFLOWMAP_ISA_FLAGS_v3 -march=x86-64-v3)
set(PYFLOWMAP_ISA_FLAGS_v4 -march=x86-64-v4 -mprefer-vector-width=512)
check_cxx_compiler_flag(-march=x86-64-v3 PYFLOWMAP_COMPILER_HAS_V3)
check_cxx_compiler_flag("-march=x86-64-v4 -mprefer-vector-width=512" PYFLOWMAP_COMPILER_HAS_V4)
foreach(isa v3 v4)
  string(TOUPPER ${isa} ISA)
  # Under the sanitizers only what this machine would choose: nothing there depends on the instruction set but time.
  if(PYFLOWMAP_SANITIZE MATCHES thread OR (PYFLOWMAP_SANITIZE AND isa STREQUAL v3))
    continue()
  endif()
  if(PYFLOWMAP_COMPILER_HAS_${ISA})
    list(APPEND PYFLOWMAP_ISAS ${isa})
    target_compile_definitions(pyflowmap_flags INTERFACE PYFLOWMAP_HAS_${ISA}=1)
  endif()
endforeach()

function(pyflowmap_isa_objects target source)
  get_filename_component(name ${source} NAME_WE)
  foreach(isa IN LISTS PYFLOWMAP_ISAS)
    set(object ${name}_${isa})
    add_library(${object} OBJECT ${source})
    target_link_libraries(${object} PRIVATE pyflowmap_instrumented)
    target_compile_definitions(${object} PRIVATE PYFLOWMAP_ISA=${isa})
    target_compile_options(${object} PRIVATE ${PYFLOWMAP_ISA_FLAGS_${isa}})
    if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)  # its own AVX-512 headers read a variable that is never set (GCC bug 105593)
      target_compile_options(${object} PRIVATE -Wno-maybe-uninitialized)
    endif()
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
  endforeach()
endfunction()
