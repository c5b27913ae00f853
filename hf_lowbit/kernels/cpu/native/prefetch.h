// What is asked of memory before it is needed.
#pragma once
#include <cstdint>

namespace {

// Memory is read a page at a time: processors ask for the lines that follow only within one, and where it lies has to be
// looked up in tables that lie in memory, too.

constexpr int64_t page_bytes = 4096, pages_ahead = 4;

// Of every page that begins within so many bytes, some pages further on, the first line.
inline void prefetch_pages(const void* from, int64_t bytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(from) + pages_ahead * page_bytes;
    for (uintptr_t page = (begin + page_bytes - 1) & -page_bytes; page < begin + bytes; page += page_bytes)
        __builtin_prefetch(reinterpret_cast<const void*>(page), 0, 1);
}

// Whether codes that are read once for every token are asked for without a trace in the larger caches, which keep what
// runs between products instead. Measured on AMD's Zen 5, where models that fit into these caches are still found there.
// Other processors may drop such lines instead of handing them on, and would then read a small model from memory for
// every token.
inline bool codes_pass_caches() {
#if defined(HFL_X86)
    static const bool is_amd = __builtin_cpu_is("amd");
    return is_amd;
#else
    return false;
#endif
}

}  // namespace
