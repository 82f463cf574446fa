// warp.cpp - warp collectives: the lanes named in a mask meet, and the last to arrive computes for all.
#include <cstring>

#include "simt/block.h"
#include "simt/sanitizer.h"

namespace simt {

namespace {

struct ShuffleCall {
  Shuffle kind;
  std::uint64_t value;
  int lane, width;
  std::uint64_t result;
};

void complete_shuffle(void* const (&lanes)[32], unsigned, unsigned char fill) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!lanes[lane]) continue;
    ShuffleCall& call = *static_cast<ShuffleCall*>(lanes[lane]);
    const int first = lane / call.width * call.width;  // the segment this lane belongs to
    const int end = first + call.width;
    int source = lane;
    switch (call.kind) {
      case Shuffle::index: source = first + (call.lane & (call.width - 1)); break;
      case Shuffle::up: source = lane - call.lane < first ? lane : lane - call.lane; break;
      case Shuffle::down: source = lane + call.lane >= end ? lane : lane + call.lane; break;
      case Shuffle::butterfly: source = (lane ^ call.lane) >= end ? lane : (lane ^ call.lane); break;
    }
    // The value of a lane that does not take part is undefined: it follows the fill, so a use of it shows.
    if (source >= 0 && source < 32 && lanes[source]) call.result = static_cast<ShuffleCall*>(lanes[source])->value;
    else std::memset(&call.result, fill, sizeof call.result);
  }
}

struct BallotCall {
  bool predicate;
  unsigned result;
};

void complete_ballot(void* const (&lanes)[32], unsigned, unsigned char) {
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane] && static_cast<BallotCall*>(lanes[lane])->predicate) ballot |= 1u << lane;
  }
  for (void* lane : lanes) {
    if (lane) static_cast<BallotCall*>(lane)->result = ballot;
  }
}

struct MatchCall {
  std::uint64_t value;
  unsigned result;
};

void complete_match(void* const (&lanes)[32], unsigned, unsigned char) {
  for (void* one : lanes) {
    if (!one) continue;
    MatchCall& call = *static_cast<MatchCall*>(one);
    call.result = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane] && static_cast<MatchCall*>(lanes[lane])->value == call.value) call.result |= 1u << lane;
    }
  }
}

struct ReduceCall {
  Reduce kind;
  std::uint32_t value, result;
};

std::uint32_t reduced(Reduce kind, std::uint32_t a, std::uint32_t b) {
  const auto sa = static_cast<std::int32_t>(a), sb = static_cast<std::int32_t>(b);
  switch (kind) {
    case Reduce::add_u: return a + b;
    case Reduce::min_u: return a < b ? a : b;
    case Reduce::max_u: return a < b ? b : a;
    case Reduce::min_s: return sa < sb ? a : b;
    case Reduce::max_s: return sa < sb ? b : a;
    case Reduce::and_u: return a & b;
    case Reduce::or_u: return a | b;
    case Reduce::xor_u: return a ^ b;
  }
  return 0;
}

void complete_reduce(void* const (&lanes)[32], unsigned, unsigned char) {
  std::uint32_t total = 0;
  bool first = true;
  for (void* lane : lanes) {
    if (!lane) continue;
    const ReduceCall& call = *static_cast<ReduceCall*>(lane);
    total = first ? call.value : reduced(call.kind, total, call.value);
    first = false;
  }
  for (void* lane : lanes) {
    if (lane) static_cast<ReduceCall*>(lane)->result = total;
  }
}

void complete_barrier(void* const (&)[32], unsigned, unsigned char) {}

}  // namespace

void Block::wait_for_warp(const char* operation, unsigned mask, Complete complete, void* payload, bool orders_memory,
                          const char* file, int line) {
  Thread& thread = *running;
  const int first = thread.rank / 32 * 32;
  if (!(mask >> (thread.rank - first) & 1u))
    fail("the mask of a warp operation does not name the calling lane", file, line);
  thread.sync = nullptr;
  if (orders_memory) {
    for (int lane = 0; lane < 32 && first + lane < count_; ++lane) {
      const Thread& other = threads_[static_cast<std::size_t>(first) + static_cast<std::size_t>(lane)];
      if (other.state != State::at_warp || other.mask != mask || other.complete != complete) continue;
      thread.sync = other.sync;
      break;
    }
    if (!thread.sync) thread.sync = fresh_sync_address();
    release(thread.sync);
  }
  thread.mask = mask;
  thread.complete = complete;
  thread.payload = payload;
  mark(thread, State::at_warp, operation, file, line);
  complete_warp(thread);
  thread.fiber->suspend();
  acquire(thread.sync);
}

// Completes the collective that `member` waits in, if every lane of its mask is there or has exited.
bool Block::complete_warp(const Thread& member) {
  const int first = member.rank / 32 * 32;
  void* payloads[32] = {};
  unsigned participants = 0;
  int count = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(member.mask >> lane & 1u) || first + lane >= count_) continue;
    Thread& other = threads_[static_cast<std::size_t>(first) + static_cast<std::size_t>(lane)];
    if (other.state == State::exited) continue;
    if (other.state != State::at_warp || other.mask != member.mask || other.complete != member.complete) return false;
    payloads[lane] = other.payload;
    participants |= 1u << lane;
    woken_[static_cast<std::size_t>(count++)] = &other;
  }
  member.complete(payloads, participants, options.fill);
  wake(count);
  return true;
}

unsigned Block::live_lanes() const {
  const int first = running->rank / 32 * 32;
  unsigned mask = 0;
  for (int lane = 0; lane < 32 && first + lane < count_; ++lane) {
    if (threads_[static_cast<std::size_t>(first) + static_cast<std::size_t>(lane)].state != State::exited)
      mask |= 1u << lane;
  }
  return mask;
}

// ---- what kernels call ----------------------------------------------------------------------------------------------

void warp_barrier(unsigned mask, const char* file, int line) {
  static char none;
  Block::current()->wait_for_warp("__syncwarp", mask, complete_barrier, &none, true, file, line);
}

std::uint64_t warp_shuffle(Shuffle kind, unsigned mask, std::uint64_t value, int lane, int width, const char* file,
                           int line) {
  Block& block = *Block::current();
  if (width < 1 || width > 32 || (width & (width - 1))) {
    block.fail("the width of a shuffle must be a power of two up to 32", file, line);
  }
  ShuffleCall call{kind, value, lane, width, 0};
  block.wait_for_warp("a shuffle", mask, complete_shuffle, &call, false, file, line);
  return call.result;
}

unsigned warp_ballot(unsigned mask, bool predicate, const char* file, int line) {
  BallotCall call{predicate, 0};
  Block::current()->wait_for_warp("a vote", mask, complete_ballot, &call, false, file, line);
  return call.result;
}

unsigned warp_match(unsigned mask, std::uint64_t value, const char* file, int line) {
  MatchCall call{value, 0};
  Block::current()->wait_for_warp("__match_any_sync", mask, complete_match, &call, false, file, line);
  return call.result;
}

std::uint32_t warp_reduce(Reduce kind, unsigned mask, std::uint32_t value, const char* file, int line) {
  ReduceCall call{kind, value, 0};
  Block::current()->wait_for_warp("a warp reduction", mask, complete_reduce, &call, false, file, line);
  return call.result;
}

unsigned warp_active() { return Block::current()->live_lanes(); }

}  // namespace simt
