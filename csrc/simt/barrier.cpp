// barrier.cpp - block-wide and named barriers, and what a thread's exit means to those who wait.
#include <cstring>

#include "simt/block.h"
#include "simt/sanitizer.h"

namespace simt {

int Block::wait_at_barrier(Vote vote, int predicate, const char* file, int line) {
  Thread& thread = *running;
  Barrier& barrier = barriers_[0];
  if (barrier.arrived == 0) {
    barrier.sync = fresh_sync_address();
    barrier.votes = 0;
  }
  thread.sync = barrier.sync;
  thread.barrier = 0;
  release(thread.sync);
  ++barrier.arrived;
  barrier.votes += predicate != 0;
  mark(thread, State::at_barrier, "__syncthreads", file, line);
  if (barrier.arrived == count_) complete_barrier(barrier, 0);
  thread.fiber->suspend();
  acquire(thread.sync);
  switch (vote) {
    case Vote::none: return 0;
    case Vote::count: return barrier.result;
    case Vote::all: return barrier.result == count_;
    case Vote::any: return barrier.result != 0;
  }
  return 0;
}

void Block::wait_at_named_barrier(int id, int threads, bool wait, const char* file, int line) {
  if (id < 1 || id > 15) fail("a named barrier's id must be 1..15", file, line);
  if (threads <= 0 || threads % 32) fail("a named barrier's thread count must be a multiple of 32", file, line);
  Thread& thread = *running;
  Barrier& barrier = barriers_[id];
  if (barrier.arrived == 0) {
    barrier.sync = fresh_sync_address();
    barrier.expected = threads;
  }
  if (barrier.expected != threads) fail("threads disagree on a named barrier's thread count", file, line);
  thread.sync = barrier.sync;
  thread.barrier = id;
  release(thread.sync);
  ++barrier.arrived;
  if (wait) mark(thread, State::at_named_barrier, "named barrier", file, line);
  if (barrier.arrived == barrier.expected) complete_barrier(barrier, id);
  if (!wait) return;
  thread.fiber->suspend();
  acquire(thread.sync);
}

void Block::complete_barrier(Barrier& barrier, int id) {
  const State state = id == 0 ? State::at_barrier : State::at_named_barrier;
  barrier.result = barrier.votes;
  barrier.arrived = 0;
  int count = 0;
  for (int i = 0; i < count_; ++i) {
    Thread& thread = threads_[static_cast<std::size_t>(i)];
    if (thread.state == state && thread.barrier == id) woken_[static_cast<std::size_t>(count++)] = &thread;
  }
  // __syncthreads must be one place in the source for all: the device does not promise to tell two apart.
  for (int i = 1; id == 0 && i < count; ++i) {
    const Thread &one = *woken_[0], &other = *woken_[static_cast<std::size_t>(i)];
    if (one.line != other.line || (one.file != other.file && std::strcmp(one.file, other.file) != 0)) {
      note(nullptr, nullptr, 0);
      return;
    }
  }
  wake(count);
}

void Block::on_exit(Thread& thread) {
  thread.state = State::exited;
  ++exited_;
  // A collective waits only for the lanes that have not exited: this exit may complete one.
  const int first = thread.rank / 32 * 32;
  for (int i = first; i < first + 32 && i < count_; ++i) {
    Thread& other = threads_[static_cast<std::size_t>(i)];
    if (other.state == State::at_warp) complete_warp(other);
  }
}

int block_barrier(Vote vote, int predicate, const char* file, int line) {
  return Block::current()->wait_at_barrier(vote, predicate, file, line);
}
void named_barrier(int id, int threads, bool wait, const char* file, int line) {
  Block::current()->wait_at_named_barrier(id, threads, wait, file, line);
}
void device_fence() {
  // Coarser than the device's: orders this thread after every earlier fence. Enough for "last block done".
  alignas(8) static char address[8];
  acquire(address);
  release(address);
}
void fail(const char* what, const char* file, int line) { Block::current()->fail(what, file, line); }

}  // namespace simt
