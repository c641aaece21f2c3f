#pragma once

// What libggml's backends export to libllama and to tests; needs no ggml header, so that the codec compiles alone.

#if defined(_WIN32) && defined(GGML_BACKEND_SHARED)
#    ifdef GGML_BACKEND_BUILD
#        define MONARCH_API __declspec(dllexport) extern
#    else
#        define MONARCH_API __declspec(dllimport) extern
#    endif
#elif defined(_WIN32)
#    define MONARCH_API extern
#else
#    define MONARCH_API __attribute__((visibility("default"))) extern
#endif
