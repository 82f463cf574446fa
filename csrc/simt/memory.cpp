// memory.cpp - the shared-memory arena and the queue of asynchronous copies.
#include "simt/memory.h"

#include <sys/mman.h>

#include <new>

#include "simt/block.h"
#include "simt/sanitizer.h"

namespace simt {

namespace {

constexpr std::size_t kReserved = 1 << 20;
constexpr std::size_t kRedzone = 128;  // also keeps every array aligned for any access
constexpr unsigned char kCanary = 0xA5;

// Not memset: the sanitizers intercept it, and the fill is the emulator's act, not the kernel's.
void fill_bytes(unsigned char* begin, unsigned char* end, unsigned char value) {
  for (volatile unsigned char* p = begin; p != end; ++p) *p = value;
}

std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

void* map_pages(std::size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return pages;
}

void unmap_pages(void* pages, std::size_t bytes) { munmap(pages, bytes); }

Arena::Arena() {
  base_ = static_cast<unsigned char*>(map_pages(kReserved));
  poison(base_, kReserved);
  arrays_.reserve(4096 / sizeof(Array));
}

Arena::~Arena() {
  unpoison(base_, kReserved);
  unmap_pages(base_, kReserved);
}

void Arena::reset(unsigned char fill, std::size_t dynamic_bytes) {
  poison(base_, used_);
  if (under_tsan() && used_) {
    // A fresh mapping: otherwise the last block's accesses to these bytes would race with the new block's.
    void* again =
        mmap(base_, round_up(used_, 4096), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (again == MAP_FAILED) throw std::bad_alloc();
  }
  arrays_.clear();
  used_ = total_ = 0;
  fill_ = fill;
  dynamic_bytes_ = dynamic_bytes;
  dynamic_ = place(dynamic_bytes);
  arrays_.push_back({&dynamic_, dynamic_, dynamic_bytes, "(dynamic)"});
}

unsigned char* Arena::place(std::size_t bytes) {
  unsigned char* data = base_ + used_ + kRedzone;
  unsigned char* end = data + round_up(bytes, kRedzone) + kRedzone;
  unpoison(data, bytes);
  if (!under_asan()) {
    fill_bytes(data - kRedzone, data, kCanary);
    fill_bytes(data + bytes, end, kCanary);
  }
  fill_bytes(data, data + bytes, fill_);
  used_ = static_cast<std::size_t>(end - base_);
  total_ += bytes;
  return data;
}

void* Arena::array(const void* tag, std::size_t bytes, const char* name) {
  for (const Array& array : arrays_) {
    if (array.tag == tag) return array.data;
  }
  if (total_ - dynamic_bytes_ + bytes > kStaticLimit || total_ + bytes > kTotalLimit) return nullptr;
  unsigned char* data = place(bytes);
  arrays_.push_back({tag, data, bytes, name});
  return data;
}

const char* Arena::damaged() const {
  if (under_asan()) return nullptr;
  for (const Array& array : arrays_) {
    const unsigned char* end = array.data + round_up(array.bytes, kRedzone) + kRedzone;
    for (const unsigned char* p = array.data - kRedzone; p != end; ++p) {
      if (p == array.data) p += array.bytes;
      if (*p != kCanary) return array.name;
    }
  }
  return nullptr;
}

// ---- what kernels call ----------------------------------------------------------------------------------------------

void* shared_array(const void* tag, std::size_t bytes, const char* name) {
  Block& block = *Block::current();
  void* data = block.arena.array(tag, bytes, name);
  if (!data) block.fail("the kernel's static shared memory exceeds 48 KB", name, 0);
  return data;
}

void* dynamic_shared() { return Block::current()->arena.dynamic(); }
std::size_t dynamic_shared_bytes() { return Block::current()->arena.dynamic_bytes(); }

bool defer_copy(const Copy& copy, const char* file, int line) {
  Block& block = *Block::current();
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % static_cast<unsigned>(copy.bytes) != 0;
  };
  if (misaligned(copy.to) || misaligned(copy.from)) block.fail("cp.async: an address is not aligned", file, line);
  Thread& thread = *block.running;
  if (block.options.async_copy == AsyncCopy::at_issue) return false;
  if (thread.copies.capacity() == 0) thread.copies.reserve(4096 / sizeof(QueuedCopy));
  thread.copies.push_back({copy, thread.copy_groups});
  return true;
}

void commit_copies() { ++Block::current()->running->copy_groups; }

bool next_copy(int groups_in_flight, Copy* copy) {
  Thread& thread = *Block::current()->running;
  if (thread.copies_made == thread.copies.size()) return false;
  const QueuedCopy& next = thread.copies[thread.copies_made];
  if (groups_in_flight >= 0 && next.group >= thread.copy_groups - groups_in_flight) return false;
  *copy = next.copy;
  ++thread.copies_made;
  if (thread.copies_made == thread.copies.size()) {
    thread.copies.clear();
    thread.copies_made = 0;
  }
  return true;
}

}  // namespace simt
