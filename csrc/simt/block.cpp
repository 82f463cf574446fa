// block.cpp - the scheduler: resumes ready threads until all have exited, or none can go on.
#include "simt/block.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simt/sanitizer.h"

namespace simt {

__thread Position here;
static __thread Block* current_block = nullptr;

Block* Block::current() { return current_block; }

void* fresh_sync_address() {
  constexpr std::size_t kAddresses = 1 << 16;
  alignas(8) static char addresses[8 * kAddresses];
  static std::size_t next = 0;
  return addresses + 8 * (__atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) % kAddresses);
}

void* join_sync() {
  alignas(8) static char address[8];
  return address;
}

Block::~Block() {
  for (Fiber* fiber : idle_) delete fiber;
}

// Without a race detector the last stack used is the next one taken: it is in the cache, and a kernel without barriers
// runs on one stack. With it every CUDA thread is a TSan thread, and a fiber rests for some blocks before it is used
// again: what it did before is ordered before what it does next, and a barrier there hands that order to a whole block,
// so a race between two blocks is only seen while no fiber has served both.
Fiber* Block::take_fiber() {
  const std::size_t wanted = under_tsan() ? std::min<std::size_t>(2 * static_cast<std::size_t>(count_) + 17, 4000) : 0;
  if (idle_.empty() || fibers_ < wanted) {
    ++fibers_;
    return new Fiber();
  }
  Fiber* fiber = nullptr;
  if (!under_tsan()) {
    fiber = idle_.back();
    idle_.pop_back();
  } else {
    fiber = idle_.front();
    idle_.erase(idle_.begin());
  }
  return fiber;
}

void Block::order(Thread** threads, int count) {
  if (options.order == Order::reverse) std::reverse(threads, threads + count);
  if (options.order != Order::random) return;
  for (int i = count - 1; i > 0; --i) {
    random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(threads[i], threads[(random_ >> 33) % static_cast<unsigned>(i + 1)]);
  }
}

bool Block::run(const Job& job, const Options& opts, uint3 index, std::uint64_t seed) {
  job_ = job;
  options = opts;
  index_ = index;
  random_ = seed;
  count_ = static_cast<int>(job.extent.x * job.extent.y * job.extent.z);
  exited_ = 0;
  failed_ = false;
  fault_ = Fault{};
  for (Barrier& barrier : barriers_) barrier = Barrier{};
  const auto count = static_cast<std::size_t>(count_);
  if (threads_.size() < count) threads_.resize(count);
  if (ready_.size() < count) ready_.resize(count);
  woken_.resize(count);
  ready_head_ = ready_size_ = 0;
  Block* const outer = current_block;
  current_block = this;
  here.block = index;
  here.block_extent = job.extent;
  here.grid_extent = job.grid;
  arena.reset(options.fill, job.shared_bytes);
  start_sync_ = fresh_sync_address();
  release(start_sync_);

  for (int i = 0; i < count_; ++i) {
    Thread& thread = threads_[static_cast<std::size_t>(i)];
    const unsigned rank = static_cast<unsigned>(i);
    thread.index = {rank % job.extent.x, rank / job.extent.x % job.extent.y, rank / (job.extent.x * job.extent.y)};
    thread.rank = i;
    thread.state = State::ready;
    thread.fiber = nullptr;
    thread.copies.clear();
    thread.copies_made = 0;
    thread.copy_groups = 0;
    woken_[static_cast<std::size_t>(i)] = &thread;
  }
  wake(count_);
  while (ready_size_ > 0 && !fault_.noted) {
    Thread& thread = *ready_[ready_head_];
    ready_head_ = ready_head_ + 1 == ready_.size() ? 0 : ready_head_ + 1;
    --ready_size_;
    resume(thread);
  }
  if (fault_.noted && fault_.what) report(fault_.what, fault_.thread, fault_.file, fault_.line);
  else if (exited_ < count_) report_stuck();
  if (!failed_) {
    if (const char* name = arena.damaged()) {
      char text[160];
      std::snprintf(text, sizeof text, "shared array '%s' was written out of bounds", name);
      report(text, nullptr, nullptr, 0);
    }
  }
  if (failed_) abandon();
  running = nullptr;
  current_block = outer;
  return !failed_;
}

void Block::thread_entry(void* argument) {
  Block& block = *current_block;
  Thread& thread = *static_cast<Thread*>(argument);
  acquire(block.start_sync_);
  block.job_.thread_main(block.job_.arguments);
  if (thread.copies_made < thread.copies.size()) {
    block.fail("the thread exits with asynchronous copies that were never waited for", nullptr, 0);
  }
  release(join_sync());
}

void Block::resume(Thread& thread) {
  if (!thread.fiber) {
    thread.fiber = take_fiber();
    thread.fiber->start(&Block::thread_entry, &thread);
  }
  running = &thread;
  here.thread = thread.index;
  thread.fiber->resume();
  if (!thread.fiber->finished()) return;
  idle_.push_back(thread.fiber);
  thread.fiber = nullptr;
  on_exit(thread);
}

void Block::mark(Thread& thread, State state, const char* operation, const char* file, int line) {
  thread.state = state;
  thread.operation = operation;
  thread.file = file;
  thread.line = line;
}

void Block::wake(int count) {
  order(woken_.data(), count);
  for (int i = 0; i < count; ++i) {
    Thread* thread = woken_[static_cast<std::size_t>(i)];
    thread->state = State::ready;
    std::size_t tail = ready_head_ + ready_size_;
    if (tail >= ready_.size()) tail -= ready_.size();
    ready_[tail] = thread;
    ++ready_size_;
  }
}

void Block::note(const char* what, const char* file, int line) {
  if (!fault_.noted) fault_ = {true, what, running, file, line};
}

void Block::fail(const char* what, const char* file, int line) {
  note(what, file, line);
  running->fiber->suspend();
  std::abort();  // a failed block's threads are never resumed
}

// Fibers left halfway go with their stacks (and TSan threads): nothing of them may meet the next launch.
void Block::abandon() {
  for (int i = 0; i < count_; ++i) {
    Thread& thread = threads_[static_cast<std::size_t>(i)];
    if (!thread.fiber) continue;
    delete thread.fiber;
    thread.fiber = nullptr;
    --fibers_;
  }
}

void Block::report(const char* what, const Thread* thread, const char* file, int line) {
  failed_ = true;
  // LAUNCH((kernel<A, B>), ...) names the kernel with its parentheses.
  const int length = static_cast<int>(std::strlen(job_.name));
  const bool wrapped = length > 1 && job_.name[0] == '(' && job_.name[length - 1] == ')';
  int n = std::snprintf(message_, sizeof message_, "%.*s: block (%u, %u, %u)", wrapped ? length - 2 : length,
                        job_.name + wrapped, index_.x, index_.y, index_.z);
  const auto add = [&](auto... arguments) {
    if (n < static_cast<int>(sizeof message_)) {
      n += std::snprintf(message_ + n, sizeof message_ - static_cast<std::size_t>(n), arguments...);
    }
  };
  if (thread) add(", thread (%u, %u, %u)", thread->index.x, thread->index.y, thread->index.z);
  add(": %s", what);
  if (file && line) add(" at %s:%d", file, line);
  else if (file) add(" (%s)", file);
}

// Who waits where. Threads that exited while others wait at a barrier have diverged just as well.
void Block::report_stuck() {
  char text[480];
  int n = 0;
  bool barrier = false;
  const auto add = [&](auto... arguments) {
    if (n < static_cast<int>(sizeof text)) {
      n += std::snprintf(text + n, sizeof text - static_cast<std::size_t>(n), arguments...);
    }
  };
  for (int i = 0; i < count_; ++i) barrier |= threads_[static_cast<std::size_t>(i)].state == State::at_barrier;
  add("%s", barrier ? "divergent barrier: " : "deadlock: ");
  bool first = true;
  for (int i = 0; i < count_; ++i) {
    const Thread& thread = threads_[static_cast<std::size_t>(i)];
    if (thread.state == State::exited) continue;
    int same = 0;
    bool seen = false;
    for (int j = 0; j < count_; ++j) {
      const Thread& other = threads_[static_cast<std::size_t>(j)];
      if (other.state != thread.state || other.line != thread.line || other.file != thread.file) continue;
      if (other.operation != thread.operation) continue;
      seen |= j < i;
      ++same;
    }
    if (seen) continue;
    add("%s%d wait at %s %s:%d (first: thread %u, %u, %u)", first ? "" : ", ", same, thread.operation, thread.file,
        thread.line, thread.index.x, thread.index.y, thread.index.z);
    first = false;
  }
  if (exited_) add(", %d of %d have exited", exited_, count_);
  report(text, nullptr, nullptr, 0);
}

}  // namespace simt
