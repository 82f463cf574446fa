// memory.h - the shared memory of the block that runs on this host thread (runtime only).
#pragma once
#include <cstddef>
#include <vector>

namespace simt {

void* map_pages(std::size_t bytes);
void unmap_pages(void* pages, std::size_t bytes);

// What grows on a fiber may be freed on another: a race detector that intercepts malloc would call that a race of the
// kernel.
template <class T> struct MappedAllocator {
  using value_type = T;
  T* allocate(std::size_t n) { return static_cast<T*>(map_pages(n * sizeof(T))); }
  void deallocate(T* p, std::size_t n) { unmap_pages(p, n * sizeof(T)); }
  friend bool operator==(MappedAllocator, MappedAllocator) { return true; }
  friend bool operator!=(MappedAllocator, MappedAllocator) { return false; }
};

class Arena {
 public:
  static constexpr std::size_t kStaticLimit = 48 * 1024;  // the device's, for arrays declared in the kernel
  static constexpr std::size_t kTotalLimit = 227 * 1024;  // compute capability 9.0; 8.0 has 163 KB, 12.0 has 99 KB

  Arena();
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Forgets all arrays: a new block begins.
  void reset(unsigned char fill, std::size_t dynamic_bytes);
  // Null when the limit is passed.
  void* array(const void* tag, std::size_t bytes, const char* name);
  void* dynamic() const { return dynamic_; }
  std::size_t dynamic_bytes() const { return dynamic_bytes_; }
  // The name of an array whose redzone was written, or null. (AddressSanitizer reports the write itself.)
  const char* damaged() const;

 private:
  struct Array {
    const void* tag;
    unsigned char* data;
    std::size_t bytes;
    const char* name;
  };
  unsigned char* place(std::size_t bytes);

  unsigned char* base_ = nullptr;
  std::size_t used_ = 0, total_ = 0, dynamic_bytes_ = 0;
  unsigned char* dynamic_ = nullptr;
  unsigned char fill_ = 0;
  std::vector<Array, MappedAllocator<Array>> arrays_;
};

}  // namespace simt
