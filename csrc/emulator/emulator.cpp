#include "emulator.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace stitchvm::emulator {

Indices indices;

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || info.dli_sname == nullptr || info.dli_saddr != kernel) return "kernel";
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  std::string name = demangled ? demangled : info.dli_sname;
  std::free(demangled);
  name = name.substr(0, name.find('('));                    // without the parameters,
  name = name.substr(name.rfind(' ', name.find('<')) + 1);  // the return type
  const size_t scope = name.rfind("::", name.find('<'));    // and the namespace
  return scope == std::string::npos ? name : name.substr(scope + 2);
}

namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = (64 << 10) + 448;  // not 64 KiB: the stacks would compete for the same cache lines
constexpr uint64_t kCanary = 0x5ca1ab1edeadbeef;  // at the end of every stack

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Thread {
  Context context;
  uint3 index;
  State state;
  Site site;  // where it waits
  // Of the shuffle that it waits at: the lanes that take part, the lane to read from, and what goes in and comes out.
  unsigned mask;
  int source;
  uint64_t value;
  uint64_t result;
};

// Shared variables are `static thread_local`, and nothing else in the library is: together they are the block of
// thread-local variables that the library has. This one makes sure that there is such a block, and finds it.
thread_local char shared_memory_anchor;

struct SharedMemory {
  ptrdiff_t anchor = 0;  // where the anchor lies in it
  size_t bytes = 0;
};

int read_shared_memory(dl_phdr_info* library, size_t, void* result) {
  const auto* end = library->dlpi_phdr + library->dlpi_phnum;
  const auto is_here = [&](const ElfW(Phdr) & part) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(&indices) - library->dlpi_addr - part.p_vaddr;
    return part.p_type == PT_LOAD && offset < part.p_memsz;
  };
  if (std::none_of(library->dlpi_phdr, end, is_here)) return 0;  // goes on to the next library
  const auto* tls = std::find_if(library->dlpi_phdr, end, [](const auto& part) { return part.p_type == PT_TLS; });
  const ptrdiff_t anchor = &shared_memory_anchor - static_cast<char*>(library->dlpi_tls_data);
  *static_cast<SharedMemory*>(result) = {anchor, tls->p_memsz};
  return 1;
}

void fill_shared_memory(unsigned char garbage) {
  static const SharedMemory memory = [] {
    shared_memory_anchor = 0;  // the first access allocates
    SharedMemory found;
    dl_iterate_phdr(read_shared_memory, &found);
    return found;
  }();
  std::memset(&shared_memory_anchor - memory.anchor, garbage, memory.bytes);
}

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string text(Site site) {
  std::string where = std::string(site.function);
  if (site.line != 0) where += " at " + std::string(site.file) + ":" + std::to_string(site.line);
  return where;
}

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool operator==(const Site& a, const Site& b) {
  return a.line == b.line && same_text(a.function, b.function) && same_text(a.file, b.file);
}

bool same_shuffle(const Thread& a, const Thread& b) {
  return a.state == State::kAtShuffle && b.state == State::kAtShuffle && a.mask == b.mask && a.site == b.site;
}

class Launch;
Launch* launch = nullptr;  // the one in progress

class Launch {
 public:
  Launch(const void* kernel, dim3 grid, dim3 block, Schedule schedule, const std::function<void()>& body)
      : kernel_(kernel), body_(body), schedule_(schedule) {
    launch = this;
    indices.block_dim = block;
    indices.grid_dim = grid;
    count_ = static_cast<int>(block.x * block.y * block.z);
    threads_.resize(count_);
    if (memory_ == nullptr) memory_.reset(new char[(kMaxThreads + 1) * kStackBytes]);
  }

  ~Launch() { launch = nullptr; }

  void run_block(uint3 block);

  // The running thread waits in `state` until the scheduler makes it ready again.
  void wait(State state, Site site) {
    Thread& me = *current_;
    me.state = state;
    me.site = site;
    switch_context(me.context, scheduler_);
  }

  Thread& current() { return *current_; }
  int current_lane() const { return static_cast<int>(current_ - threads_.data()) % kWarp; }
  [[noreturn]] void error(const Thread& t, const std::string& what) const {
    throw std::runtime_error("emulator: " + kernel_name(kernel_) + ": block " + text(indices.block) + ", thread " +
                             text(t.index) + ": " + what);
  }

 private:
  static void fiber_entry();

  // They grow downwards: thread 0 has the space of one more stack to overflow into.
  char* stack(int thread) const { return memory_.get() + (thread + 1) * kStackBytes; }
  int lanes(int warp) const { return std::min(kWarp, count_ - warp * kWarp); }
  int warps() const { return (count_ + kWarp - 1) / kWarp; }
  bool runnable(int warp) const;
  int next_warp();
  void step(int warp);
  bool release_lanes(int warp);
  bool release_block();
  [[noreturn]] void explain(const Thread& waiting, const Thread& other) const;

  const void* kernel_;
  const std::function<void()>& body_;
  Schedule schedule_;
  std::minstd_rand random_;  // the same choices on every run
  int count_;
  std::vector<Thread> threads_;
  Context scheduler_;
  Thread* current_ = nullptr;
  std::exception_ptr thrown_;
  static std::unique_ptr<char[]> memory_;  // kept from launch to launch
};

std::unique_ptr<char[]> Launch::memory_;
Schedule chosen_schedule = Schedule::kForward;

void Launch::fiber_entry() {
  Launch& me = *launch;
  try {
    me.body_();
  } catch (...) {
    me.thrown_ = std::current_exception();
  }
  me.wait(State::kDone, {});
  std::abort();  // a thread that is done is not resumed
}

bool Launch::runnable(int warp) const {
  const Thread* begin = &threads_[warp * kWarp];
  return std::any_of(begin, begin + lanes(warp), [](const Thread& t) { return t.state == State::kReady; });
}

int Launch::next_warp() {
  const int n = warps();
  int first = 0;
  int stride = 1;
  if (schedule_ == Schedule::kReverse) {
    first = n - 1;
    stride = n - 1;  // -1 modulo n
  } else if (schedule_ == Schedule::kShuffled) {
    first = static_cast<int>(random_() % n);
  }
  for (int i = 0, warp = first; i < n; ++i, warp = (warp + stride) % n) {
    if (runnable(warp)) return warp;
  }
  return -1;
}

// Runs every lane of the warp that can run until it waits, then lets those go on whose shuffle is complete.
void Launch::step(int warp) {
  const int n = lanes(warp);
  const int turn = schedule_ == Schedule::kShuffled ? static_cast<int>(random_() % kWarp) : 0;
  for (int i = 0; i < kWarp; ++i) {
    const int lane = schedule_ == Schedule::kReverse ? kWarp - 1 - i : (5 * turn + (2 * turn + 1) * i) % kWarp;
    if (lane >= n) continue;
    Thread& t = threads_[warp * kWarp + lane];
    if (t.state != State::kReady) continue;
    current_ = &t;
    indices.thread = t.index;
    switch_context(scheduler_, t.context);
    if (thrown_) std::rethrow_exception(thrown_);
  }
  while (!runnable(warp) && release_lanes(warp)) {
  }
}

// Makes the lanes of one complete shuffle ready.
bool Launch::release_lanes(int warp) {
  Thread* begin = &threads_[warp * kWarp];
  const int n = lanes(warp);
  for (int i = 0; i < n; ++i) {
    if (begin[i].state != State::kAtShuffle) continue;
    const unsigned mask = begin[i].mask;
    bool complete = true;
    for (int j = 0; complete && j < kWarp; ++j) {
      if (mask >> j & 1) complete = j < n && same_shuffle(begin[i], begin[j]);
    }
    if (!complete) continue;
    for (int j = 0; j < n; ++j) {
      if (!(mask >> j & 1)) continue;
      begin[j].state = State::kReady;
      begin[j].result = begin[begin[j].source].value;
    }
    return true;
  }
  return false;
}

void Launch::explain(const Thread& waiting, const Thread& other) const {
  const std::string it = "but thread " + text(other.index);
  std::string what = "waits at " + text(waiting.site) + ", ";
  if (other.state == State::kDone) {
    what += it + " has returned";
  } else if (other.site == waiting.site) {
    what += it + " is there with another mask";
  } else {
    what += it + " waits at " + text(other.site);
  }
  error(waiting, what);
}

// No thread can run: opens the barrier that all wait at, returns false when all are done, or says who waits for whom.
bool Launch::release_block() {
  for (int i = 0; i < count_; ++i) {
    const Thread& t = threads_[i];
    if (t.state != State::kAtShuffle) continue;
    const int first = i / kWarp * kWarp;
    const int n = lanes(i / kWarp);
    for (int j = 0; j < kWarp; ++j) {
      if (!(t.mask >> j & 1)) continue;
      if (j >= n) {
        error(t, text(t.site) + ": the mask names lane " + std::to_string(j) + " of a warp of " + std::to_string(n));
      }
      if (!same_shuffle(t, threads_[first + j])) explain(t, threads_[first + j]);
    }
  }
  const auto waits = [](const Thread& t) { return t.state == State::kAtBarrier; };
  const auto waiting = std::find_if(threads_.begin(), threads_.end(), waits);
  if (waiting == threads_.end()) return false;
  for (const Thread& other : threads_) {
    if (!waits(other) || !(other.site == waiting->site)) explain(*waiting, other);
  }
  for (Thread& t : threads_) t.state = State::kReady;
  return true;
}

void Launch::run_block(uint3 block) {
  indices.block = block;
  constexpr unsigned char kGarbage[] = {0xff, 0xcd, 0x55};  // NaN; negative; positive
  fill_shared_memory(kGarbage[static_cast<int>(schedule_)]);
  const dim3 dim = indices.block_dim;
  for (int i = 0; i < count_; ++i) {
    Thread& t = threads_[i];
    const auto n = static_cast<unsigned>(i);
    t.index = {n % dim.x, n / dim.x % dim.y, n / (dim.x * dim.y)};
    t.state = State::kReady;
    std::memcpy(stack(i), &kCanary, sizeof kCanary);
    start(t.context, stack(i), kStackBytes, fiber_entry);
  }
  do {
    for (int warp = next_warp(); warp >= 0; warp = next_warp()) step(warp);
  } while (release_block());
  for (int i = 0; i < count_; ++i) {
    if (std::memcmp(stack(i), &kCanary, sizeof kCanary) != 0) {
      error(threads_[i], "needs more than the emulator's " + std::to_string(kStackBytes) + " bytes of stack");
    }
  }
}

// GPUs have these limits; the emulator has no others.
void check_launch(const void* kernel, dim3 grid, dim3 block) {
  const bool blocks =
      grid.x >= 1 && grid.x <= INT32_MAX && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
  const bool sides =
      block.x >= 1 && block.x <= 1024 && block.y >= 1 && block.y <= 1024 && block.z >= 1 && block.z <= 64;
  if (blocks && sides && static_cast<uint64_t>(block.x) * block.y * block.z <= kMaxThreads) return;
  throw std::runtime_error("emulator: " + kernel_name(kernel) + ": a grid of " + text({grid.x, grid.y, grid.z}) +
                           " blocks of " + text({block.x, block.y, block.z}) + " threads cannot be launched");
}

}  // namespace

void set_schedule(Schedule schedule) { chosen_schedule = schedule; }

void run_grid(const void* kernel, dim3 grid, dim3 block, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check_launch(kernel, grid, block);
  Launch current(kernel, grid, block, chosen_schedule, thread);
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t n = chosen_schedule == Schedule::kReverse ? blocks - 1 - i : i;
    current.run_block({static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                       static_cast<unsigned>(n / grid.x / grid.y)});
  }
}

void fail(const char* what, Site site) { launch->error(launch->current(), text(site) + ": " + what); }

void block_barrier(Site site) { launch->wait(State::kAtBarrier, site); }

void warp_barrier(unsigned mask, Site site) { warp_exchange(mask, 0, lane(), site); }

int lane() { return launch->current_lane(); }

uint64_t warp_exchange(unsigned mask, uint64_t value, int source, Site site) {
  if (!(mask >> lane() & 1)) fail("the mask does not name the calling lane", site);
  if (source < 0 || source >= kWarp || !(mask >> source & 1)) fail("reads from a lane outside its mask", site);
  Thread& me = launch->current();
  me.mask = mask;
  me.source = source;
  me.value = value;
  launch->wait(State::kAtShuffle, site);
  return me.result;
}

}  // namespace stitchvm::emulator

extern "C" __attribute__((visibility("default"))) void stitchvm_emulator_set_schedule(int schedule) {
  stitchvm::emulator::set_schedule(static_cast<stitchvm::emulator::Schedule>(schedule));
}
