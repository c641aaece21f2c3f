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
        ${MONARCH_DIR}/monarch-codec.cpp
        ${MONARCH_DIR}/monarch-cpu.cpp
        ${MONARCH_DIR}/monarch-policy.cpp
        ${MONARCH_DIR}/monarch-summary.cpp)
    target_include_directories(${target} PRIVATE ${MONARCH_DIR})

    # records are the same bytes on every machine
    set_source_files_properties(
        ${MONARCH_DIR}/monarch-codec.cpp
        ${MONARCH_DIR}/monarch-summary.cpp
        PROPERTIES COMPILE_OPTIONS "$<$<CXX_COMPILER_ID:GNU,Clang,AppleClang>:-ffp-contract=off>")
endfunction()

function(monarch_add_llama target)
    target_sources(${target} PRIVATE
        ${MONARCH_DIR}/monarch-api.cpp
        ${MONARCH_DIR}/monarch-graph.cpp
        ${MONARCH_DIR}/monarch-knobs.cpp
        ${MONARCH_DIR}/monarch-kv-cache.cpp
        ${MONARCH_DIR}/monarch-page-table.cpp)
    target_include_directories(${target} PRIVATE ${MONARCH_DIR})
    set_source_files_properties(
        ${MONARCH_DIR}/monarch-api.cpp
        ${MONARCH_DIR}/monarch-graph.cpp
        ${MONARCH_DIR}/monarch-knobs.cpp
        ${MONARCH_DIR}/monarch-kv-cache.cpp
        ${MONARCH_DIR}/monarch-page-table.cpp
        PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
endfunction()
