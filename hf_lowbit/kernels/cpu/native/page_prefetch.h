// Memory is read a page at a time: processors ask for the lines that follow only within one, and where it lies has to be
// looked up in tables that lie in memory, too.
#pragma once
#include <cstdint>

namespace {

constexpr int64_t page_bytes = 4096, pages_ahead = 4;

// Of every page that begins within so many bytes, some pages further on, the first line.
inline void prefetch_pages(const void* from, int64_t bytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(from) + pages_ahead * page_bytes;
    for (uintptr_t page = (begin + page_bytes - 1) & -page_bytes; page < begin + bytes; page += page_bytes)
        __builtin_prefetch(reinterpret_cast<const void*>(page), 0, 1);
}

}  // namespace
