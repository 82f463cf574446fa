// block.h - one thread block: its threads, its barriers, its shared memory and the scheduler (runtime only).
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "simt/async_copy.h"
#include "simt/fiber.h"
#include "simt/memory.h"
#include "simt/options.h"
#include "simt/sync.h"
#include "simt/types.h"

namespace simt {

enum class State : unsigned char { ready, at_barrier, at_named_barrier, at_warp, exited };

struct QueuedCopy {
  Copy copy;
  int group;
};

// A warp collective: `complete` sees what each participating lane brought (null for the others).
using Complete = void (*)(void* const (&lanes)[32], unsigned participants, unsigned char fill);

struct Thread {
  uint3 index;
  int rank;
  State state;
  Fiber* fiber;
  // Where it waits, and for what.
  const char* file;
  int line;
  const char* operation;
  void* sync;  // the race detector's address of this rendezvous; null where memory is not ordered
  int barrier;
  unsigned mask;
  Complete complete;
  void* payload;
  // cp.async
  std::vector<QueuedCopy, MappedAllocator<QueuedCopy>> copies;
  std::size_t copies_made;
  int copy_groups;
};

struct Barrier {
  int arrived = 0, expected = 0, votes = 0, result = 0;
  void* sync = nullptr;
};

struct Job {
  const char* name = "";
  uint3 grid{}, extent{};
  std::size_t shared_bytes = 0;
  void (*thread_main)(const void*) = nullptr;
  const void* arguments = nullptr;
};

class Block {
 public:
  Block() = default;
  ~Block();
  static Block* current();  // the one that runs on this host thread

  // False when the block failed; then message() says how.
  bool run(const Job& job, const Options& options, uint3 index, std::uint64_t seed);
  const char* message() const { return message_; }

  // Called by the running thread. fail() does not return: the scheduler writes the message and leaves the block.
  [[noreturn]] void fail(const char* what, const char* file, int line);
  int wait_at_barrier(Vote vote, int predicate, const char* file, int line);
  void wait_at_named_barrier(int id, int threads, bool wait, const char* file, int line);
  void wait_for_warp(const char* operation, unsigned mask, Complete complete, void* payload, bool orders_memory,
                     const char* file, int line);
  unsigned live_lanes() const;

  Arena arena;
  Options options;
  Thread* running = nullptr;

 private:
  static void thread_entry(void* thread);
  void resume(Thread& thread);
  void mark(Thread& thread, State state, const char* operation, const char* file, int line);
  void wake(int count);  // the threads in woken_, in the order asked for
  void complete_barrier(Barrier& barrier, int id);
  bool complete_warp(const Thread& member);
  void on_exit(Thread& thread);
  void report_stuck();
  void report(const char* what, const Thread* thread, const char* file, int line);
  void note(const char* what, const char* file, int line);
  Fiber* take_fiber();
  void abandon();
  void order(Thread** threads, int count);

  Job job_;
  uint3 index_{};
  int count_ = 0, exited_ = 0;
  bool failed_ = false;
  struct Fault {  // noted by a fiber, put into words by the scheduler
    bool noted = false;
    const char* what = nullptr;  // null: threads wait at barriers that do not match
    const Thread* thread = nullptr;
    const char* file = nullptr;
    int line = 0;
  } fault_;
  std::uint64_t random_ = 0;
  void* start_sync_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Thread*> ready_;  // a ring: each thread is in it at most once
  std::size_t ready_head_ = 0, ready_size_ = 0;
  std::vector<Thread*> woken_;
  std::vector<Fiber*> idle_;  // first in, first out under TSan, else a stack
  std::size_t fibers_ = 0;
  Barrier barriers_[16];
  char message_[640] = {};
};

// Everything the threads of a launch did happens before what the host does after it.
void* join_sync();

}  // namespace simt
