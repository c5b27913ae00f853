// Types and constants as arguments, and loops whose counters are constants.
#pragma once
#include <utility>

#if defined(__GNUC__)
#define HFL_INLINE __attribute__((always_inline))
#else
#define HFL_INLINE
#endif

namespace {

template <int n> struct Constant { static constexpr int value = n; };
template <class T> struct Type { using type = T; };

template <class Use, int... i> HFL_INLINE inline void repeat(Use&& use, std::integer_sequence<int, i...>) {
    (use(Constant<i>()), ...);
}

// use(constant 0), ..., use(constant n - 1): compilers keep what constants count in registers.
template <int n, class Use> HFL_INLINE inline void repeat(Use&& use) {
    repeat(use, std::make_integer_sequence<int, n>());
}

}  // namespace
