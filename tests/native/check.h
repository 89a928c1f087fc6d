// The whole test framework: CHECK counts and reports, and the process fails if any check did.
#pragma once

#include <cstdio>

inline int g_failures = 0;

#define CHECK(condition, ...)                                                   \
  do {                                                                          \
    if (!(condition) && ++g_failures <= 20) {                                   \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed:", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, " " __VA_ARGS__);                                    \
      std::fputc('\n', stderr);                                                 \
    }                                                                           \
  } while (false)

inline int report() {
  std::fprintf(stderr, g_failures ? "%d checks failed\n" : "all checks passed\n", g_failures);
  return g_failures ? 1 : 0;
}
