// What is asked of memory before it is needed.
#pragma once
#include <cstdint>

#include "unroll.h"

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

// How codes are asked for that are read from front to back.
struct ReadAhead {
    // past_caches: without a trace in the larger caches, which keep what runs between products instead. Measured on AMD's
    // Zen 5, where models that fit into these caches are still found there. Other processors may drop such lines instead
    // of handing them on, and would then read a small model from memory for every token.
    // second_level: there first, and shortly before they are needed into the first level. Measured on Zen 4, whose first
    // level waits for too few lines at once: 10 to 30 % faster, of 2 to 4 bits, than past_caches. Zen 3 is of its family.
    enum Into : char { all_caches, past_caches, second_level } into;
    int64_t words;  // that lie between, at least: memory takes as long to answer

    static ReadAhead of_codes(bool may_pass_caches) {
#if defined(HFL_X86)
        static const bool is_zen_3_or_4 = __builtin_cpu_is("amdfam19h"), is_amd = __builtin_cpu_is("amd");
        if (is_zen_3_or_4) return {second_level, 3072};
        if (is_amd && may_pass_caches) return {past_caches, 2048};
#endif
        return {all_caches, 2048};
    }
};

constexpr int64_t near_words = 256;  // between the second level and the first

HFL_INLINE inline void prefetch(const uint32_t* codes, const uint32_t* near, ReadAhead::Into into) {
    if (into == ReadAhead::second_level) {
        __builtin_prefetch(codes, 0, 2);
        __builtin_prefetch(near, 0, 0);
    } else if (into == ReadAhead::past_caches) {
        __builtin_prefetch(codes, 0, 0);
    } else {
        __builtin_prefetch(codes);
    }
}

}  // namespace
