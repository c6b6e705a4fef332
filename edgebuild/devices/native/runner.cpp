// Runs a .pte and answers over its standard input and output: `runner MODEL.pte THREADS`. Without a host,
// `runner --time MODEL.pte THREADS RUNS` times runs on made-up inputs and prints a line: "latency_ns MEDIAN P95 MIN RUNS".
// For the simulator, `runner --simulate MODEL.pte THREADS` runs two inferences of each method, `--sample` the essential
// parts of two, `--sample-layers` the same with nothing but the inputs and outputs in the caches before the second; they
// print "method NAME", and the names of the operators of the second, one a line.
//
// Protocol (integers little-endian; the guest is the one that runs this program):
//   guest, once the model is loaded:  u32 MIDR of the first core as cpuinfo read it
//                                     heap at the peak of loading, heap kept after loading
//   host, for each inference:         tensors
//   guest:                            heap at the peak of this inference, tensors
//   host, for timed inferences:       u32 TIMED, u32 warm-ups, u32 runs, tensors
//   guest:                            u64 nanoseconds[runs] of CLOCK_MONOTONIC, from inputs handed in to outputs
//   host, to end:                     closes the guest's standard input
//   heap := i64 total, i64 program, i64 weights, i64 arena, i64 workspace, i64 runtime
//   tensors := u32 count, then for each: u32 dtype, u32 rank, u64 size[rank], the elements in C order
// A dtype is the number of ExecuTorch's ScalarType: 0 uint8, 1 int8, 2 int16, 3 int32, 4 int64, 5 float16, 6 float32,
// 7 float64, 11 bool. TIMED is 2^32 - 1, which is no count of tensors. Heap is in bytes above the empty runtime (threads
// started, nothing loaded) and counts what the model holds; the buffers of this protocol are left out. Its kinds
// (heap.h) are what is live at the very moment of the peak, and their sum is the total. Anything wrong ends the program
// with a line on standard error.
#include "heap.h"
#include "simulation.h"

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>

#include <executorch/extension/data_loader/file_data_loader.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

// The wheel has these symbols in its libraries, but not their headers.
namespace executorch::extension::threadpool {
class ThreadPool {
  public:
    bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool *get_threadpool();
}  // namespace executorch::extension::threadpool

extern "C" {
struct cpuinfo_uarch_info {
    uint32_t uarch, midr, processors, cores;
};
bool cpuinfo_initialize();
const cpuinfo_uarch_info *cpuinfo_get_uarch(uint32_t index);
}

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

constexpr size_t MAX_RANK = 16;
constexpr uint32_t TIMED = UINT32_MAX;
constexpr uint32_t WARM_UPS = 10;        // of `--time`
constexpr uint32_t MOST_RUNS = 1000000;  // of a request

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char *format, ...) {
    std::fputs("edgebuild runner: ", stderr);
    va_list rest;
    va_start(rest, format);
    std::vfprintf(stderr, format, rest);
    va_end(rest);
    std::fputs("\n", stderr);
    std::exit(2);
}

void require(Error error, const char *doing) {
    if (error != Error::Ok) fail("%s: %s", doing, executorch::runtime::to_string(error));
}

// ------------------------------------------------------------------------------------------------------- the wire

// Answers go through a descriptor of their own, so that a library that prints cannot spoil them.
int answers = -1;

// Fills the whole buffer. False at the end of input, which may come before a request but not inside of one.
bool read_exactly(void *buffer, size_t size, bool may_end = false) {
    auto *at = static_cast<char *>(buffer);
    for (size_t done = 0; done < size;) {
        const ssize_t got = read(STDIN_FILENO, at + done, size - done);
        if (got == 0 && done == 0 && may_end) return false;
        if (got <= 0) fail("the request ends in the middle");
        done += static_cast<size_t>(got);
    }
    return true;
}

void write_exactly(const void *buffer, size_t size) {
    const auto *at = static_cast<const char *>(buffer);
    for (size_t done = 0; done < size;) {
        const ssize_t put = write(answers, at + done, size - done);
        if (put <= 0) fail("the answer cannot be written");
        done += static_cast<size_t>(put);
    }
}

template <typename T>
T read_number() {
    T value;
    read_exactly(&value, sizeof value);
    return value;
}

template <typename T>
void write_number(T value) {
    write_exactly(&value, sizeof value);
}

// ----------------------------------------------------------------------------------------------- memory layouts

// Elements between neighbours along each dimension, for a tensor whose dimensions lie in memory in the given order.
std::vector<size_t> strides_of(const std::vector<SizesType> &sizes, const std::vector<uint8_t> &order) {
    std::vector<size_t> strides(sizes.size());
    size_t step = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
        strides[order[i]] = step;
        step *= static_cast<size_t>(sizes[order[i]]);
    }
    return strides;
}

std::vector<uint8_t> c_order(size_t rank) {
    std::vector<uint8_t> order(rank);
    for (size_t i = 0; i < rank; ++i) order[i] = static_cast<uint8_t>(i);
    return order;
}

// Copies a tensor from one order of its dimensions in memory to another.
std::vector<uint8_t> reorder(const uint8_t *from, const std::vector<SizesType> &sizes, size_t element,
                             const std::vector<uint8_t> &from_order, const std::vector<uint8_t> &to_order) {
    size_t count = 1;
    for (const SizesType size : sizes) count *= static_cast<size_t>(size);
    if (from_order == to_order) return std::vector<uint8_t>(from, from + count * element);
    std::vector<uint8_t> to(count * element);
    const auto from_strides = strides_of(sizes, from_order), to_strides = strides_of(sizes, to_order);
    std::vector<size_t> index(sizes.size(), 0);
    for (size_t i = 0; i < count; ++i) {
        size_t source = 0, sink = 0;
        for (size_t d = 0; d < sizes.size(); ++d) {
            source += index[d] * from_strides[d];
            sink += index[d] * to_strides[d];
        }
        for (size_t byte = 0; byte < element; ++byte) to[sink * element + byte] = from[source * element + byte];
        for (size_t d = sizes.size(); d-- > 0;) {
            if (++index[d] < static_cast<size_t>(sizes[d])) break;
            index[d] = 0;
        }
    }
    return to;
}

// -------------------------------------------------------------------------------------------------------- tensors

TensorPtr read_tensor(size_t position, const executorch::runtime::TensorInfo &wanted) {
    const auto dtype = static_cast<ScalarType>(read_number<uint32_t>());
    const auto rank = read_number<uint32_t>();
    if (dtype != wanted.scalar_type()) {
        fail("input %zu has dtype %d, but the model takes %d", position, static_cast<int>(dtype),
             static_cast<int>(wanted.scalar_type()));
    }
    if (rank != wanted.sizes().size() || rank > MAX_RANK) {
        fail("input %zu has %u dimensions, but the model takes %zu", position, rank, wanted.sizes().size());
    }
    std::vector<SizesType> sizes;
    size_t bytes = executorch::runtime::elementSize(dtype);
    const size_t element = bytes;
    for (uint32_t d = 0; d < rank; ++d) {
        const auto size = read_number<uint64_t>();
        if (size > static_cast<uint64_t>(wanted.sizes()[d])) {
            fail("input %zu has size %llu in dimension %u, but the model takes %d", position,
                 static_cast<unsigned long long>(size), d, static_cast<int>(wanted.sizes()[d]));
        }
        sizes.push_back(static_cast<SizesType>(size));
        bytes *= size;
    }
    std::vector<uint8_t> data(bytes);
    read_exactly(data.data(), bytes);
    const std::vector<uint8_t> order(wanted.dim_order().begin(), wanted.dim_order().end());
    data = reorder(data.data(), sizes, element, c_order(rank), order);
    return executorch::extension::make_tensor_ptr(std::move(sizes), std::move(data), order, {}, dtype);
}

void write_tensor(const Tensor &tensor) {
    const std::vector<SizesType> sizes(tensor.sizes().begin(), tensor.sizes().end());
    const std::vector<uint8_t> order(tensor.dim_order().begin(), tensor.dim_order().end());
    write_number(static_cast<uint32_t>(tensor.scalar_type()));
    write_number(static_cast<uint32_t>(sizes.size()));
    for (const SizesType size : sizes) write_number(static_cast<uint64_t>(size));
    const auto data = reorder(static_cast<const uint8_t *>(tensor.const_data_ptr()), sizes,
                              static_cast<size_t>(tensor.element_size()), order, c_order(sizes.size()));
    write_exactly(data.data(), data.size());
}

// ------------------------------------------------------------------------------------------------------- the model

// Reads a program from its file, and has what it reads counted as such.
class Loader final : public executorch::runtime::DataLoader {
  public:
    explicit Loader(executorch::extension::FileDataLoader &&file) : file(std::move(file)) {}

    executorch::runtime::Result<executorch::runtime::FreeableBuffer> load(size_t offset, size_t size,
                                                                          const SegmentInfo &segment) const override {
        const heap::Only counted(heap::PROGRAM);
        return file.load(offset, size, segment);
    }
    Error load_into(size_t offset, size_t size, const SegmentInfo &segment, void *buffer) const override {
        return file.load_into(offset, size, segment, buffer);
    }
    executorch::runtime::Result<size_t> size() const override { return file.size(); }

  private:
    executorch::extension::FileDataLoader file;
};

[[noreturn]] void refuse(const char *path, Error error) {
    fail("%s is no program that can be loaded: %s", path, executorch::runtime::to_string(error));
}

std::unique_ptr<Loader> loader(const char *path) {
    auto file = executorch::extension::FileDataLoader::from(path);
    if (!file.ok()) refuse(path, file.error());
    return std::make_unique<Loader>(std::move(*file));
}

// The buffers that a method's planned tensors live in. Left to itself the module would make the very same.
class Arena {
  public:
    explicit Arena(const executorch::runtime::MethodMeta &meta) {
        const size_t count = meta.num_memory_planned_buffers();
        buffers.reserve(count);
        for (size_t i = 0; i < count; ++i) {
            const auto size = meta.memory_planned_buffer_size(i);
            require(size.error(), "the method `forward` has a buffer without a size");
            const heap::Only counted(heap::ARENA);
            buffers.emplace_back(static_cast<size_t>(*size));
        }
        for (auto &buffer : buffers) spans.emplace_back(buffer.data(), buffer.size());
        memory.emplace(executorch::runtime::Span(spans.data(), spans.size()));
    }

    executorch::runtime::HierarchicalAllocator *allocator() { return &*memory; }

  private:
    std::vector<std::vector<uint8_t>> buffers;
    std::vector<executorch::runtime::Span<uint8_t>> spans;
    std::optional<executorch::runtime::HierarchicalAllocator> memory;
};

struct Model {
    heap::Bytes empty = heap::live();
    std::optional<Arena> arena;  // outlives the module, whose method writes to it
    Module module;
    std::vector<executorch::runtime::TensorInfo> inputs;
    heap::Bytes kept;  // that the model holds now

    explicit Model(const char *path) : module(loader(path)) {}
};

std::vector<executorch::runtime::TensorInfo> tensors_of(const executorch::runtime::MethodMeta &meta) {
    std::vector<executorch::runtime::TensorInfo> tensors;
    for (size_t i = 0; i < meta.num_inputs(); ++i) {
        const auto info = meta.input_tensor_meta(i);
        if (!info.ok()) fail("input %zu of the model is not a tensor", i);
        tensors.push_back(*info);
    }
    return tensors;
}

struct Loading {
    heap::Bytes peak, kept;
};

Loading load(Model &model, const char *path) {
    heap::reset_peak();
    heap::delegate_takes(heap::WEIGHTS);
    if (const Error error = model.module.load(); error != Error::Ok) refuse(path, error);
    const auto meta = model.module.method_meta("forward");
    require(meta.error(), "the method `forward` cannot be described");
    model.arena.emplace(*meta);
    require(model.module.load_method("forward", model.arena->allocator()), "the method `forward` cannot be loaded");
    heap::delegate_takes(heap::WORKSPACE);
    const heap::Bytes peak = heap::peak() - model.empty;
    model.kept = heap::live() - model.empty;

    model.inputs = tensors_of(*meta);
    return {peak, model.kept};
}

void write_heap(const heap::Bytes &bytes) {
    write_number<int64_t>(bytes.total);
    for (const long long part : bytes.of) write_number<int64_t>(part);
}

void greet(const Loading &heap) {
    const auto *core = cpuinfo_initialize() ? cpuinfo_get_uarch(0) : nullptr;
    write_number<uint32_t>(core == nullptr ? 0 : core->midr);
    write_heap(heap.peak);
    write_heap(heap.kept);
}

struct Inputs {
    std::vector<TensorPtr> tensors;
    std::vector<EValue> values;

    void add(TensorPtr tensor) {
        tensors.push_back(std::move(tensor));
        values.emplace_back(*tensors.back());
    }
};

Inputs read_inputs(const Model &model, uint32_t count) {
    if (count != model.inputs.size()) fail("%u inputs given, but the model takes %zu", count, model.inputs.size());
    Inputs inputs;
    for (size_t i = 0; i < count; ++i) inputs.add(read_tensor(i, model.inputs[i]));
    return inputs;
}

void infer(Model &model, const Inputs &inputs) {
    const heap::Bytes before = heap::live();
    heap::reset_peak();
    const auto outputs = model.module.execute("forward", inputs.values);
    require(outputs.error(), "the inference failed");
    const heap::Bytes peak = model.kept + (heap::peak() - before);
    model.kept += heap::live() - before;

    write_heap(peak);
    write_number(static_cast<uint32_t>(outputs->size()));
    for (size_t i = 0; i < outputs->size(); ++i) {
        if (!(*outputs)[i].isTensor()) fail("output %zu of the model is not a tensor", i);
        write_tensor((*outputs)[i].toTensor());
    }
}

uint64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<uint64_t>(time.tv_sec) * 1000000000 + static_cast<uint64_t>(time.tv_nsec);
}

std::vector<uint64_t> time_runs(Model &model, const Inputs &inputs, uint32_t warm_ups, uint32_t runs) {
    if (runs > MOST_RUNS || warm_ups > MOST_RUNS) fail("%u runs are too many", std::max(runs, warm_ups));
    std::vector<uint64_t> nanoseconds(runs);
    const heap::Bytes before = heap::live();
    for (uint32_t i = 0; i < warm_ups + runs; ++i) {
        const uint64_t began = now();
        const auto outputs = model.module.execute("forward", inputs.values);
        const uint64_t ended = now();
        require(outputs.error(), "the inference failed");
        if (i >= warm_ups) nanoseconds[i - warm_ups] = ended - began;
    }
    model.kept += heap::live() - before;
    return nanoseconds;
}

void answer(Model &model, uint32_t count) {
    if (count != TIMED) return infer(model, read_inputs(model, count));
    const auto warm_ups = read_number<uint32_t>(), runs = read_number<uint32_t>();
    const auto nanoseconds = time_runs(model, read_inputs(model, read_number<uint32_t>()), warm_ups, runs);
    write_exactly(nanoseconds.data(), nanoseconds.size() * sizeof nanoseconds[0]);
}

// Floats lie between -1 and 1 and are always the same; everything else is 0. Floats that are 0 would not do: an emulator
// takes longer for exact results, which it must tell from rounded ones.
Inputs made_up_inputs(const std::vector<executorch::runtime::TensorInfo> &wanted) {
    Inputs inputs;
    for (const auto &info : wanted) {
        std::vector<SizesType> sizes(info.sizes().begin(), info.sizes().end());
        const std::vector<uint8_t> order(info.dim_order().begin(), info.dim_order().end());
        std::vector<uint8_t> data(info.nbytes());
        if (info.scalar_type() == ScalarType::Float) {
            auto *values = reinterpret_cast<float *>(data.data());
            for (uint32_t i = 0; i < data.size() / sizeof *values; ++i) {
                values[i] = static_cast<float>(i * 2654435761u % 1000u) / 500.0f - 1.0f;
            }
        }
        using executorch::extension::make_tensor_ptr;
        inputs.add(make_tensor_ptr(std::move(sizes), std::move(data), order, {}, info.scalar_type()));
    }
    return inputs;
}

void time_by_hand(Model &model, uint32_t runs) {
    auto nanoseconds = time_runs(model, made_up_inputs(model.inputs), WARM_UPS, runs);
    std::sort(nanoseconds.begin(), nanoseconds.end());
    const size_t half = runs / 2;
    const uint64_t median = runs % 2 ? nanoseconds[half] : (nanoseconds[half - 1] + nanoseconds[half]) / 2;
    const uint64_t p95 = nanoseconds[(runs * size_t{95} + 99) / 100 - 1];
    dprintf(answers, "latency_ns %llu %llu %llu %u\n", static_cast<unsigned long long>(median),
            static_cast<unsigned long long>(p95), static_cast<unsigned long long>(nanoseconds[0]), runs);
}

void touch(const Tensor &tensor) {
    constexpr size_t line = 64;
    const auto *bytes = static_cast<const volatile uint8_t *>(tensor.const_data_ptr());
    for (size_t at = 0; at < tensor.nbytes(); at += line) (void)bytes[at];
}

// Each method of the program is run twice, and the second time counts: the first one fills the caches and lets the runtime
// set itself up. `layers` says that each method is a single layer: inside of a
// model it finds what the layer before has just written, and memory for its output that was in use a moment ago, but not
// its weights. The time that touching these takes is that of the delegate's set-up.
void simulate(const char *path, bool layers) {
    Module module(path, Module::LoadMode::File, simulation::tracer());
    require(module.load(), "the program cannot be loaded");
    const auto methods = module.method_names();
    require(methods.error(), "the program's methods cannot be named");
    simulation::follow();
    for (const std::string &method : std::set<std::string>(methods->begin(), methods->end())) {
        require(module.load_method(method), "a method cannot be loaded");
        const auto meta = module.method_meta(method);
        require(meta.error(), "a method cannot be described");
        const Inputs inputs = made_up_inputs(tensors_of(*meta));
        std::vector<EValue> warmed;
        for (const bool counts : {false, true}) {
            simulation::begin(counts && layers);
            if (counts && layers) {
                for (const EValue &output : warmed) touch(output.toTensor());
                for (const TensorPtr &input : inputs.tensors) touch(*input);
            }
            const auto outputs = module.execute(method, inputs.values);
            simulation::end(counts);
            require(outputs.error(), "the inference failed");
            warmed.assign(outputs->begin(), outputs->end());
        }
        dprintf(answers, "method %s\n", method.c_str());
        for (const std::string &name : simulation::operators()) dprintf(answers, "%s\n", name.c_str());
        module.unload_method(method);
    }
}

int positive(const char *text, const char *what) {
    const int number = std::atoi(text);
    if (number < 1) fail("%s is no number of %s", text, what);
    return number;
}

}  // namespace

int main(int argc, char **argv) {
    const std::string mode = argc > 3 ? argv[1] : "";
    const bool by_hand = mode == "--time", simulated = mode == "--simulate" || mode.starts_with("--sample");
    const bool sampled = mode.starts_with("--sample"), layers = mode == "--sample-layers";
    if (argc != 3 + (simulated ? 1 : by_hand ? 2 : 0)) fail("usage: see the head of runner.cpp");
    const char *path = argv[mode.empty() ? 1 : 2];
    const int threads = positive(argv[mode.empty() ? 2 : 3], "threads");
    const int runs = by_hand ? positive(argv[4], "runs") : 0;
    answers = dup(STDOUT_FILENO);
    if (answers < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0) fail("standard output cannot be moved");

    auto *pool = executorch::extension::threadpool::get_threadpool();
    if (pool == nullptr || !pool->_unsafe_reset_threadpool(simulated ? 1 : static_cast<uint32_t>(threads))) {
        fail("%d threads cannot be started", threads);
    }
    if (simulated) {
        simulation::start(static_cast<unsigned>(threads), sampled);
        simulate(path, layers);
        return 0;
    }
    Model model(path);
    const Loading heap = load(model, path);
    if (by_hand) {
        time_by_hand(model, static_cast<uint32_t>(runs));
        return 0;
    }
    greet(heap);
    uint32_t count;
    while (read_exactly(&count, sizeof count, true)) answer(model, count);
    return 0;
}
