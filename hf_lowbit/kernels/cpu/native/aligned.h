// Memory on the boundaries of cache lines, for vectors that are loaded whole.
#pragma once
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace {

template <class T> class Aligned {
  public:
    explicit Aligned(int64_t size)
        : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), std::align_val_t(64)))) {}
    T* data() const { return data_.get(); }

  private:
    struct Free { void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); } };
    std::unique_ptr<T, Free> data_;
};

template <class T> struct AlignedAllocator {
    using value_type = T;
    AlignedAllocator() = default;
    template <class Other> AlignedAllocator(const AlignedAllocator<Other>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    friend bool operator==(AlignedAllocator, AlignedAllocator) { return true; }
    friend bool operator!=(AlignedAllocator, AlignedAllocator) { return false; }
};
using AlignedVector = std::vector<float, AlignedAllocator<float>>;

}  // namespace
