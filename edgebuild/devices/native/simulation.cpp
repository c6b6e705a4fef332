#include "simulation.h"

#include "library.h"
#include "pool.h"

#include <cstdint>
#include <cstring>
#include <ctime>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

using namespace executorch::runtime;

// Where an inference is traced, XNNPACK reads the clock when its run begins and after each operator, and the names come
// when the run is over (XNNPACK, src/runtime.c, XNN_FLAG_BASIC_PROFILING; ExecuTorch's XNNProfiler sets the flag where
// there is a tracer, and hands the names over).
bool inferring = false;
std::vector<std::string> names;   // of what ended at each mark
std::vector<size_t> unnamed;      // marks of the delegate's run whose names are still to come
size_t named = 0;
bool delegate_runs = false;

Code xnnpack;

void end_operator(const char *name) {
    names.emplace_back(name);
    mark(MARK_OPERATOR);
}

void xnnpack_read_the_clock() {
    if (!delegate_runs) {
        delegate_runs = true;
        unnamed.clear();
        named = 0;
        end_operator("set-up of the delegate");
    } else {
        unnamed.push_back(names.size());
        end_operator("");
    }
}

// Operators outside of a delegate begin and end one by one. A delegate reads the clock in between.
class Tracer final : public EventTracer {
  public:
    void create_event_block(const char *) override {}

    EventTracerEntry start_profiling(const char *name, ChainID, DebugHandle) override {
        const bool is_operator = std::strcmp(name, "OPERATOR_CALL") == 0;
        if (inferring && is_operator) end_operator("between operators");
        return EventTracerEntry{is_operator, 0, 0, 0, DelegateDebugIdType::kNone};
    }

    void end_profiling(EventTracerEntry entry) override {
        if (inferring && entry.event_id != 0) end_operator("outside of the delegate");
    }

    EventTracerEntry start_profiling_delegate(const char *, DelegateDebugIntId) override { return {}; }
    void end_profiling_delegate(EventTracerEntry, const void *, size_t) override {}

    void log_profiling_delegate(const char *name, DelegateDebugIntId, et_timestamp_t, et_timestamp_t, const void *,
                                size_t) override {
        delegate_runs = false;
        if (named < unnamed.size() && name != nullptr) names[unnamed[named++]] = name;
    }

    void track_allocation(AllocatorID, size_t) override {}
    AllocatorID track_allocator(const char *) override { return 0; }
    void set_delegation_intermediate_output_filter(EventTracerFilterBase *) override {}
    Result<bool> log_evalue(const EValue &, LoggedEValueType) override { return false; }
    Result<bool> log_intermediate_output_delegate(const char *, DelegateDebugIntId, const executorch::aten::Tensor &) override {
        return false;
    }
    Result<bool> log_intermediate_output_delegate(const char *, DelegateDebugIntId,
                                                  ArrayRef<executorch::aten::Tensor>) override {
        return false;
    }
    Result<bool> log_intermediate_output_delegate(const char *, DelegateDebugIntId, const int &) override { return false; }
    Result<bool> log_intermediate_output_delegate(const char *, DelegateDebugIntId, const bool &) override { return false; }
    Result<bool> log_intermediate_output_delegate(const char *, DelegateDebugIntId, const double &) override {
        return false;
    }
};

}  // namespace

extern "C" int clock_gettime(clockid_t clock, timespec *time) {
    const auto caller = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
    if (inferring && caller >= xnnpack.begin && caller < xnnpack.end) xnnpack_read_the_clock();
    return static_cast<int>(syscall(SYS_clock_gettime, clock, time));
}

namespace simulation {

void start(unsigned threads, bool sampled) {
    xnnpack = xnnpack_code();
    names.reserve(4096);
    unnamed.reserve(4096);
    simulated_pool::enable(threads, sampled);
}

void follow() { mark(MARK_FOLLOW); }

void begin(bool cold) {
    names.clear();
    delegate_runs = false;
    inferring = true;
    mark(MARK_BEGIN, cold);
}

void end(bool counts) {
    mark(MARK_END, counts);
    inferring = false;
    names.emplace_back("end of the inference");
}

std::unique_ptr<EventTracer> tracer() { return std::make_unique<Tracer>(); }

const std::vector<std::string> &operators() { return names; }

}  // namespace simulation
