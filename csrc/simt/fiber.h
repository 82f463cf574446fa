// fiber.h - a stack of its own and the switch to it and back.
#pragma once
#include <cstddef>
#include <memory>

namespace simt {

class Fiber {
 public:
  using Entry = void (*)(void* argument);

  Fiber();
  ~Fiber();  // a fiber left halfway through takes its stack along
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(Entry entry, void* argument);  // the next resume() calls entry(argument) on this stack
  void resume();                            // host -> fiber; returns at the fiber's next suspend() or at its end
  void suspend();                           // fiber -> host
  bool finished() const { return finished_; }

 private:
  struct Context;
  static void trampoline() noexcept;
  static void run(Fiber* fiber);

  std::unique_ptr<Context> context_;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  bool finished_ = true;
  char* mapping_ = nullptr;  // guard page, then the stack
  char* stack_ = nullptr;
  std::size_t stack_bytes_ = 0;
  void* tsan_fiber_ = nullptr;
  void* tsan_host_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's, kept while this fiber is switched out
  void* host_fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  std::size_t host_stack_bytes_ = 0;
};

}  // namespace simt
