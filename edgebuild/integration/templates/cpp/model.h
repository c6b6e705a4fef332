// {{ model.artifact | comment }}, made for ExecuTorch {{ model.runtime | comment }}. Written by edgebuild; do not edit.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include <executorch/extension/module/module.h>
#include <executorch/runtime/core/error.h>
#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/core/result.h>

class {{ name }} {
  public:
    /// A dense tensor in C order (the last dimension varies fastest) of a shape that the compiler knows, on the heap.
    template <typename T, std::int32_t... Sizes>
    class Tensor {
      public:
        using Element = T;
        static constexpr std::size_t rank = sizeof...(Sizes);
        static constexpr std::array<std::int32_t, rank> shape{Sizes...};
        static constexpr std::size_t size = (std::size_t{1} * ... * static_cast<std::size_t>(Sizes));

        T *data() { return elements_.get(); }
        const T *data() const { return elements_.get(); }
        T &operator[](std::size_t i) { return elements_[i]; }
        const T &operator[](std::size_t i) const { return elements_[i]; }
        T *begin() { return data(); }
        T *end() { return data() + size; }
        const T *begin() const { return data(); }
        const T *end() const { return data() + size; }

      private:
        std::unique_ptr<T[]> elements_ = std::make_unique<T[]>(size);  // zeros
    };

{% for kind, fields in (("Inputs", inputs), ("Outputs", outputs)) %}
    struct {{ kind }} {
{% for field in fields %}
        Tensor<{{ ([field.type.cpp] + (field.tensor.shape | list)) | join(", ") }}> {{ field.name }};{{ "  // " ~ (field.tensor.name | comment) if field.tensor.name != field.name }}
{% endfor %}
    };

{% endfor %}
    /// The model's file in its bundle.
    static constexpr const char *artifact = {{ model.artifact | cpp }};
{% for field in outputs if field.tensor.labels %}
    /// The classes in the last dimension of `{{ field.name }}`, in UTF-8.
    static constexpr std::array<const char *, {{ field.tensor.labels | length }}> {{ field.name }}_labels{
{% for label in field.tensor.labels %}
        {{ label | cpp }},
{% endfor %}
    };
{% endfor %}

    /// Maps the file into memory and makes the model ready to run.
    /// InvalidProgram: it is no program, or takes or gives other tensors than this code was made for. AccessFailed: it
    /// cannot be read. OperatorMissing, NotFound: a kernel or a backend is not linked.
    static executorch::runtime::Result<{{ name }}> load(const std::string &path);

    /// One inference. `outputs` may be used again and again. An object is for one thread at a time.
    [[nodiscard]] executorch::runtime::Error run(const Inputs &inputs, Outputs &outputs);

  private:
    explicit {{ name }}(std::unique_ptr<executorch::extension::Module> module) : module_(std::move(module)) {}

    std::unique_ptr<executorch::extension::Module> module_;
};
