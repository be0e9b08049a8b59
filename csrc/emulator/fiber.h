// Fibers: functions that run on stacks of their own and hand control back and forth, all on one thread.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(STITCHVM_EMULATOR_UCONTEXT)
#define STITCHVM_FIBER_UCONTEXT
#include <ucontext.h>
#endif

namespace stitchvm::emulator {

// A suspended flow of control. The thread that starts the fibers has one as well.
struct Context {
#ifdef STITCHVM_FIBER_UCONTEXT
  ucontext_t saved;
#else
  void* stack_pointer = nullptr;
#endif
  // Where the stack lies, which the address sanitizer must be told at every switch.
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

// Prepares `fiber` to run entry() on the given stack at the first switch to it. entry must not return.
void start(Context& fiber, void* stack, size_t stack_bytes, void (*entry)());

// Suspends the running context into `from` and resumes `to`.
void switch_context(Context& from, Context& to);

}  // namespace stitchvm::emulator
