# Attaches the paged cache to upstream's targets. Included by the patched CMakeLists.txt files; this folder lies at the
# root of the patched tree.

set(MONARCH_DIR ${CMAKE_CURRENT_LIST_DIR})

function(monarch_add_ggml_base target)
    target_sources(${target} PRIVATE ${MONARCH_DIR}/monarch-op.c)
    target_include_directories(${target} PRIVATE ${MONARCH_DIR})
endfunction()

function(monarch_add_ggml_cpu target)
    target_sources(${target} PRIVATE
        ${MONARCH_DIR}/monarch-attend.cpp
        ${MONARCH_DIR}/monarch-attend-avx2.cpp
        ${MONARCH_DIR}/monarch-attend-avx512.cpp
        ${MONARCH_DIR}/monarch-attend-neon.cpp
        ${MONARCH_DIR}/monarch-attend-plain.cpp
        ${MONARCH_DIR}/monarch-codec.cpp
        ${MONARCH_DIR}/monarch-cpu.cpp
        ${MONARCH_DIR}/monarch-page.cpp
        ${MONARCH_DIR}/monarch-policy.cpp
        ${MONARCH_DIR}/monarch-summary.cpp)
    target_include_directories(${target} PRIVATE ${MONARCH_DIR})

    # records are the same bytes on every machine
    set_source_files_properties(
        ${MONARCH_DIR}/monarch-codec.cpp
        ${MONARCH_DIR}/monarch-page.cpp
        ${MONARCH_DIR}/monarch-summary.cpp
        PROPERTIES COMPILE_OPTIONS "$<$<CXX_COMPILER_ID:GNU,Clang,AppleClang>:-ffp-contract=off>")

    # kernels for instructions that the rest may be compiled without; chosen at run time
    if (CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
        if (CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
            set_source_files_properties(
                ${MONARCH_DIR}/monarch-attend-avx512.cpp
                PROPERTIES COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni;-mavx512vbmi;-mfma;-mf16c")
            set_source_files_properties(
                ${MONARCH_DIR}/monarch-attend-avx2.cpp
                PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
        elseif (CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
            set_source_files_properties(
                ${MONARCH_DIR}/monarch-attend-neon.cpp
                PROPERTIES COMPILE_OPTIONS "-march=armv8.2-a+dotprod")
        endif()
    endif()
endfunction()

function(monarch_add_ggml_cuda target)
    # by themselves: none of the target's flags, which are for speed; pages hold the same bytes on every machine
    add_library(monarch-cuda OBJECT ${MONARCH_DIR}/monarch-cuda.cu)
    set_target_properties(monarch-cuda PROPERTIES CUDA_STANDARD 17 POSITION_INDEPENDENT_CODE ON)
    target_compile_options(monarch-cuda PRIVATE -fmad=false)
    target_include_directories(monarch-cuda PRIVATE ${MONARCH_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/../../include)

    target_sources(${target} PRIVATE $<TARGET_OBJECTS:monarch-cuda> ${MONARCH_DIR}/monarch-cuda-backend.cu)
    target_include_directories(${target} PRIVATE ${MONARCH_DIR})
endfunction()

function(monarch_add_llama target)
    set(sources
        ${MONARCH_DIR}/monarch-api.cpp
        ${MONARCH_DIR}/monarch-cold-store.cpp
        ${MONARCH_DIR}/monarch-graph.cpp
        ${MONARCH_DIR}/monarch-knobs.cpp
        ${MONARCH_DIR}/monarch-kv-cache.cpp
        ${MONARCH_DIR}/monarch-kv-cache-graph.cpp
        ${MONARCH_DIR}/monarch-kv-cache-state.cpp
        ${MONARCH_DIR}/monarch-kv-cache-stats.cpp
        ${MONARCH_DIR}/monarch-kv-cache-stock.cpp
        ${MONARCH_DIR}/monarch-page-table.cpp
        ${MONARCH_DIR}/monarch-place.cpp
        ${MONARCH_DIR}/monarch-stats.cpp)
    target_sources(${target} PRIVATE ${sources})
    target_include_directories(${target} PRIVATE ${MONARCH_DIR})
    set_source_files_properties(${sources} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
endfunction()
