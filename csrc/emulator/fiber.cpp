#include "fiber.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef STITCHVM_FIBER_UCONTEXT
// ucontext asks the kernel for the signal mask at every switch, which is a hundred times the cost of what is needed:
// to save the registers that a function must preserve, and to exchange the stacks.
extern "C" void stitchvm_switch_stack(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.type stitchvm_switch_stack, @function
.hidden stitchvm_switch_stack
.globl stitchvm_switch_stack
stitchvm_switch_stack:
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
.size stitchvm_switch_stack, . - stitchvm_switch_stack
)");
#endif

namespace stitchvm::emulator {
namespace {

#if defined(__SANITIZE_ADDRESS__)
Context* switching_from = nullptr;
#endif

// Runs first in every context that is resumed.
void arrive([[maybe_unused]] Context* self) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self ? self->fake_stack : nullptr, &switching_from->stack,
                                  &switching_from->stack_bytes);
#endif
}

void (*first_entry)() = nullptr;

void enter() {
  arrive(nullptr);
  first_entry();
}

}  // namespace

void start(Context& fiber, void* stack, size_t stack_bytes, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_bytes = stack_bytes;
  fiber.fake_stack = nullptr;
  first_entry = entry;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, stack_bytes);  // what an abandoned fiber left behind
#endif
#ifdef STITCHVM_FIBER_UCONTEXT
  getcontext(&fiber.saved);
  fiber.saved.uc_stack.ss_sp = stack;
  fiber.saved.uc_stack.ss_size = stack_bytes;
  fiber.saved.uc_link = nullptr;
  makecontext(&fiber.saved, enter, 0);
#else
  // As stitchvm_switch_stack leaves a stack: six registers, and the address that `ret` goes to. Above it the return
  // address of `enter`, which never returns; the stack is then aligned as after a call.
  uintptr_t* top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(stack) + stack_bytes) - 1;
  *top = 0;
  *--top = reinterpret_cast<uintptr_t>(&enter);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.stack_pointer = top;
#endif
}

void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  switching_from = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef STITCHVM_FIBER_UCONTEXT
  swapcontext(&from.saved, &to.saved);
#else
  stitchvm_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
  arrive(&from);
}

}  // namespace stitchvm::emulator
