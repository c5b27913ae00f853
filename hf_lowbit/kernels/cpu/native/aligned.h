// Memory on the boundaries of cache lines, for vectors that are loaded whole.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace {

// Small blocks that a thread has let go of, by the logarithm of their size: the products of one token ask for the same
// ones a thousand times, and to find aligned memory takes as long as a piece of the product.
class SmallBlocks {
  public:
    static void* take(std::size_t bytes) {
        const int size = log2_of(bytes);
        Blocks* blocks = of_thread(size);
        if (!blocks || !blocks->count) return ::operator new(blocks ? std::size_t{1} << size : bytes, std::align_val_t(64));
        return blocks->all[--blocks->count];
    }
    static void give(void* block, std::size_t bytes) {
        Blocks* blocks = of_thread(log2_of(bytes));
        if (!blocks || blocks->count == most) return ::operator delete(block, std::align_val_t(64));
        blocks->all[blocks->count++] = block;
    }

  private:
    static constexpr int most = 4, sizes = 16;  // up to 32 kB
    struct Blocks {
        void* all[most];
        int count = 0;
        ~Blocks() {
            while (count) ::operator delete(all[--count], std::align_val_t(64));
        }
    };
    static int log2_of(std::size_t bytes) {
        int size = 6;
        while ((std::size_t{1} << size) < bytes) size++;
        return size;
    }
    static Blocks* of_thread([[maybe_unused]] int size) {
#if defined(__SANITIZE_ADDRESS__)
        return nullptr;  // it looks at where each block ends
#else
        thread_local Blocks blocks[sizes];
        return size < sizes ? blocks + size : nullptr;
#endif
    }
};

template <class T> class Aligned {
  public:
    explicit Aligned(int64_t size)
        : data_(static_cast<T*>(SmallBlocks::take(static_cast<std::size_t>(size) * sizeof(T))),
                Free{static_cast<std::size_t>(size) * sizeof(T)}) {}
    T* data() const { return data_.get(); }

  private:
    struct Free {
        std::size_t bytes;
        void operator()(T* p) const { SmallBlocks::give(p, bytes); }
    };
    std::unique_ptr<T, Free> data_;
};

template <class T> struct AlignedAllocator {
    using value_type = T;
    AlignedAllocator() = default;
    template <class Other> AlignedAllocator(const AlignedAllocator<Other>&) {}
    T* allocate(std::size_t n) { return static_cast<T*>(SmallBlocks::take(n * sizeof(T))); }
    void deallocate(T* p, std::size_t n) { SmallBlocks::give(p, n * sizeof(T)); }
    friend bool operator==(AlignedAllocator, AlignedAllocator) { return true; }
    friend bool operator!=(AlignedAllocator, AlignedAllocator) { return false; }
};
template <class T> using AlignedVector = std::vector<T, AlignedAllocator<T>>;

}  // namespace
