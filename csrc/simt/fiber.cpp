// fiber.cpp - the context switch: save the callee-saved registers, exchange the stack pointer, return.
// swapcontext makes two system calls (the signal mask) and costs some 180 ns; this costs about 9.
#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#include "simt/memory.h"
#include "simt/sanitizer.h"

#if !defined(PYFLOWMAP_SIMT_UCONTEXT) && !(defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)))
#define PYFLOWMAP_SIMT_UCONTEXT 1
#endif
#ifdef PYFLOWMAP_SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {

// The fiber that the current host thread is switching to: the trampoline cannot take an argument.
static __thread Fiber* starting = nullptr;

#ifdef PYFLOWMAP_SIMT_UCONTEXT

struct Fiber::Context {
  ucontext_t host, fiber;
  void prepare(char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&fiber);
    fiber.uc_stack.ss_sp = stack;
    fiber.uc_stack.ss_size = bytes;
    fiber.uc_link = nullptr;
    makecontext(&fiber, entry, 0);
  }
  void enter() { swapcontext(&host, &fiber); }
  void leave() { swapcontext(&fiber, &host); }
};

#else

// simt_switch_stack(void** save_sp, void* new_sp)
extern "C" void pyflowmap_simt_switch_stack(void** save, void* target);

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl pyflowmap_simt_switch_stack
.hidden pyflowmap_simt_switch_stack
.type pyflowmap_simt_switch_stack, @function
pyflowmap_simt_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size pyflowmap_simt_switch_stack, .-pyflowmap_simt_switch_stack
)");

static void* first_frame(char* top, void (*entry)()) {
  // Six zero registers, the entry as return address, a null return address under it: on entry the stack pointer is
  // 8 modulo 16, as after a call.
  auto* words = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 8; ++i) words[i] = nullptr;
  words[6] = reinterpret_cast<void*>(entry);
  return words;
}

#else  // aarch64

asm(R"(
.text
.p2align 4
.globl pyflowmap_simt_switch_stack
.hidden pyflowmap_simt_switch_stack
.type pyflowmap_simt_switch_stack, %function
pyflowmap_simt_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size pyflowmap_simt_switch_stack, .-pyflowmap_simt_switch_stack
)");

static void* first_frame(char* top, void (*entry)()) {
  auto* words = reinterpret_cast<void**>(top) - 20;
  for (int i = 0; i < 20; ++i) words[i] = nullptr;
  words[11] = reinterpret_cast<void*>(entry);  // x30
  return words;
}

#endif

struct Fiber::Context {
  void* host = nullptr;
  void* fiber = nullptr;
  void prepare(char* stack, std::size_t bytes, void (*entry)()) { fiber = first_frame(stack + bytes, entry); }
  void enter() { pyflowmap_simt_switch_stack(&host, fiber); }
  void leave() { pyflowmap_simt_switch_stack(&fiber, host); }
};

#endif

Fiber::Fiber() : context_(new Context()) {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  stack_bytes_ = under_asan() ? 512 * 1024 : 128 * 1024;  // untouched pages cost nothing; ASan's frames are fat
  mapping_ = static_cast<char*>(map_pages(page + stack_bytes_));
  stack_ = mapping_ + page;
  mprotect(mapping_, page, PROT_NONE);
  if (under_tsan()) tsan_fiber_ = __tsan_create_fiber(0);
}

Fiber::~Fiber() {
  if (tsan_fiber_) __tsan_destroy_fiber(tsan_fiber_);
  unpoison(stack_, stack_bytes_);  // frames that never returned left their redzones
  unmap_pages(mapping_, static_cast<std::size_t>(stack_ - mapping_) + stack_bytes_);
}

void Fiber::start(Entry entry, void* argument) {
  entry_ = entry;
  argument_ = argument;
  finished_ = false;
  fake_stack_ = nullptr;
  context_->prepare(stack_, stack_bytes_, &Fiber::trampoline);
}

void Fiber::trampoline() noexcept {
  run(starting);
  abort();  // a finished fiber is never resumed
}

void Fiber::run(Fiber* fiber) {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &fiber->host_stack_, &fiber->host_stack_bytes_);
  fiber->entry_(fiber->argument_);
  fiber->finished_ = true;
  fiber->suspend();
}

void Fiber::resume() {
  starting = this;
  if (tsan_fiber_) {
    tsan_host_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_fiber_, /*no_sync*/ 1);
  }
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&host_fake_stack_, stack_, stack_bytes_);
  context_->enter();
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(host_fake_stack_, nullptr, nullptr);
}

void Fiber::suspend() {
  if (tsan_fiber_) __tsan_switch_to_fiber(tsan_host_, /*no_sync*/ 1);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(finished_ ? nullptr : &fake_stack_, host_stack_, host_stack_bytes_);
  context_->leave();
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack_, &host_stack_, &host_stack_bytes_);
}

}  // namespace simt
