// Written by edgebuild; do not edit.
#include "{{ snake }}.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include <executorch/extension/tensor/tensor.h>

using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::CppTypeToScalarType;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Result;
using executorch::runtime::TensorInfo;

namespace {

// The dimensions as they lie in memory, outermost first.
template <typename T>
using Order = std::array<std::uint8_t, T::rank>;

template <typename T>
bool matches(const Result<TensorInfo> &info, const Order<T> &order) {
    return info.ok() && info->scalar_type() == CppTypeToScalarType<typename T::Element>::value &&
           std::equal(info->sizes().begin(), info->sizes().end(), T::shape.begin(), T::shape.end()) &&
           std::equal(info->dim_order().begin(), info->dim_order().end(), order.begin(), order.end());
}

template <typename T>
[[maybe_unused]] TensorPtr wrap(const T &tensor) {
    void *data = const_cast<void *>(static_cast<const void *>(tensor.data()));  // the runtime only reads its inputs
    return executorch::extension::from_blob(data, {T::shape.begin(), T::shape.end()},
                                            CppTypeToScalarType<typename T::Element>::value);
}

template <typename T>
bool holds(const EValue &value) {
    return value.isTensor() && value.toTensor().scalar_type() == CppTypeToScalarType<typename T::Element>::value &&
           static_cast<std::size_t>(value.toTensor().numel()) == T::size;
}

template <typename T>
[[maybe_unused]] Error copy(const EValue &value, T &tensor) {
    if (!holds<T>(value)) return Error::InvalidState;
    std::memcpy(tensor.data(), value.toTensor().const_data_ptr(), T::size * sizeof(typename T::Element));
    return Error::Ok;
}

{% if reordered %}
// Calls `each(c, m)` with every element's position in C order and in memory.
template <typename T, typename Each>
void visit(const Order<T> &order, Each each) {
    std::array<std::size_t, T::rank> strides{}, index{};
    std::size_t step = 1;
    for (std::size_t i = T::rank; i-- > 0;) {
        strides[order[i]] = step;
        step *= static_cast<std::size_t>(T::shape[order[i]]);
    }
    for (std::size_t c = 0; c < T::size; ++c) {
        std::size_t m = 0;
        for (std::size_t d = 0; d < T::rank; ++d) m += index[d] * strides[d];
        each(c, m);
        for (std::size_t d = T::rank; d-- > 0;) {
            if (++index[d] < static_cast<std::size_t>(T::shape[d])) break;
            index[d] = 0;
        }
    }
}

template <typename T>
[[maybe_unused]] TensorPtr reordered(const T &tensor, const Order<T> &order) {
    std::vector<std::uint8_t> bytes(T::size * sizeof(typename T::Element));
    auto *memory = reinterpret_cast<typename T::Element *>(bytes.data());
    visit<T>(order, [&](std::size_t c, std::size_t m) { memory[m] = tensor[c]; });
    return executorch::extension::make_tensor_ptr({T::shape.begin(), T::shape.end()}, std::move(bytes),
                                                  {order.begin(), order.end()}, {},
                                                  CppTypeToScalarType<typename T::Element>::value);
}

template <typename T>
[[maybe_unused]] Error copy(const EValue &value, T &tensor, const Order<T> &order) {
    if (!holds<T>(value)) return Error::InvalidState;
    const auto *memory = static_cast<const typename T::Element *>(value.toTensor().const_data_ptr());
    visit<T>(order, [&](std::size_t c, std::size_t m) { tensor[c] = memory[m]; });
    return Error::Ok;
}

{% endif %}
}  // namespace

Result<{{ name }}> {{ name }}::load(const std::string &path) {
    auto module = std::make_unique<Module>(path, Module::LoadMode::Mmap);
    Error error = module->load();
    if (error != Error::Ok) return error;
    const auto meta = module->method_meta("forward");
    if (!meta.ok()) return meta.error();
    if (meta->num_inputs() != {{ inputs | length }} || meta->num_outputs() != {{ outputs | length }}) return Error::InvalidProgram;
{% for kind, fields in (("input", inputs), ("output", outputs)) %}
{% for field in fields %}
    if (!matches<decltype({{ kind | capitalize }}s::{{ field.name }})>(meta->{{ kind }}_tensor_meta({{ loop.index0 }}), { {{- (field.order or range(field.tensor.shape | length)) | join(", ") -}} })) {
        return Error::InvalidProgram;
    }
{% endfor %}
{% endfor %}
    error = module->load_method("forward");
    if (error != Error::Ok) return error;
    return {{ name }}(std::move(module));
}

Error {{ name }}::run(const Inputs &inputs, Outputs &outputs) {
    const TensorPtr tensors[] = {
{% for field in inputs %}
        {%+ if field.order %}reordered(inputs.{{ field.name }}, { {{- field.order | join(", ") -}} }){% else %}wrap(inputs.{{ field.name }}){% endif %},
{% endfor %}
    };
    const auto values = module_->forward(std::vector<EValue>(std::begin(tensors), std::end(tensors)));
    if (!values.ok()) return values.error();
    if (values->size() != {{ outputs | length }}) return Error::InvalidState;
    Error error = Error::Ok;
{% for field in outputs %}
    error = copy((*values)[{{ loop.index0 }}], outputs.{{ field.name }}{% if field.order %}, { {{- field.order | join(", ") -}} }{% endif %});
    if (error != Error::Ok) return error;
{% endfor %}
    return error;
}
