// Runs the bundle's test vectors: `{{ snake }}_check BUNDLE`. Exits with 0 where the outputs come near enough to the
// expected ones, with 1 where they do not, with 2 where it cannot tell. Written by edgebuild; do not edit.
#include "{{ snake }}.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>

namespace {

constexpr int samples = {{ model.samples }};

// A file of safetensors: u64 size of the header, the header in JSON, the tensors (all little-endian).
class Vectors {
  public:
    static std::optional<Vectors> open(const std::string &path) {
        std::ifstream file(path, std::ios::binary);
        Vectors vectors;
        vectors.data_.assign(std::istreambuf_iterator<char>(file), {});
        std::uint64_t size = 0;
        if (vectors.data_.size() < sizeof size) return std::nullopt;
        std::memcpy(&size, vectors.data_.data(), sizeof size);
        if (size > vectors.data_.size() - sizeof size) return std::nullopt;
        vectors.begin_ = sizeof size + static_cast<std::size_t>(size);
        vectors.header_ = vectors.data_.substr(sizeof size, static_cast<std::size_t>(size));
        return vectors;
    }

    // Fills a tensor with the one of that name, which has to be of its dtype and size.
    template <typename T>
    bool read(const std::string &name, const char *dtype, T &tensor) const {
        const auto entry = header_.find('"' + name + "\":{");
        if (entry == std::string::npos) return false;
        const std::string text = header_.substr(entry, header_.find('}', entry) - entry);
        if (text.find(std::string("\"dtype\":\"") + dtype + '"') == std::string::npos) return false;
        const std::string key = "\"data_offsets\":[";
        const auto at = text.find(key);
        if (at == std::string::npos) return false;
        char *next = nullptr;
        const auto first = std::strtoull(text.c_str() + at + key.size(), &next, 10);
        if (*next != ',') return false;
        const auto last = std::strtoull(next + 1, nullptr, 10);
        constexpr std::size_t bytes = T::size * sizeof(typename T::Element);
        const std::size_t held = data_.size() - begin_;
        if (last > held || first > last || last - first != bytes) return false;
        std::memcpy(tensor.data(), data_.data() + begin_ + first, bytes);
        return true;
    }

  private:
    std::string data_, header_;
    std::size_t begin_ = 0;
};

// Every value of an output has to be within `atol` of the expected one.
struct Comparison {
    const char *name;
    double atol;
    double largest = 0;
    bool passes = true, equal = true;

    template <typename T>
    void add(const T &found, const T &expected) {
        equal = equal && std::memcmp(found.data(), expected.data(), T::size * sizeof(typename T::Element)) == 0;
        for (std::size_t i = 0; i < T::size; ++i) {
            const auto want = static_cast<double>(expected[i]), got = static_cast<double>(found[i]);
            if (got == want || (std::isnan(got) && std::isnan(want))) continue;
            const double difference = std::fabs(got - want);
            passes = passes && difference <= atol;
            largest = std::fmax(largest, difference);
        }
    }

    bool report() const {
        std::printf("%s: %s, largest difference %g (allowed %g): %s\n", name, equal ? "bit-equal" : "not bit-equal",
                    largest, atol, passes ? "pass" : "fail");
        return passes;
    }
};

}  // namespace

int main(int argc, char **argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s BUNDLE\n", argv[0]);
        return 2;
    }
    const std::string folder = argv[1];
    const auto vectors = Vectors::open(folder + "/vectors.safetensors");
    if (!vectors) {
        std::fprintf(stderr, "%s/vectors.safetensors cannot be read\n", folder.c_str());
        return 2;
    }
    auto model = {{ name }}::load(folder + '/' + {{ name }}::artifact);
    if (!model.ok()) {
        std::fprintf(stderr, "%s/%s cannot be loaded: %s\n", folder.c_str(), {{ name }}::artifact,
                     executorch::runtime::to_string(model.error()));
        return 2;
    }

    {{ name }}::Inputs inputs;
    {{ name }}::Outputs outputs, expected;
    struct {
{% for field in outputs %}
        Comparison {{ field.name }}{{ "{" }}{{ field.name | cpp }}, {{ field.tensor.atol | float }}};
{% endfor %}
    } comparisons;
    for (int i = 0; i < samples; ++i) {
        const std::string sample = std::to_string(i) + '_';
{% for kind, fields, into in (("input", inputs, "inputs"), ("output", outputs, "expected")) %}
{% for field in fields %}
        if (!vectors->read("{{ kind }}_" + sample + "{{ loop.index0 }}", "{{ field.type.safetensors }}", {{ into }}.{{ field.name }})) {
            std::fprintf(stderr, "vectors.safetensors has no such {{ kind }}_%s{{ loop.index0 }} as this model\n", sample.c_str());
            return 2;
        }
{% endfor %}
{% endfor %}
        const auto error = model->run(inputs, outputs);
        if (error != executorch::runtime::Error::Ok) {
            std::fprintf(stderr, "sample %d cannot be run: %s\n", i, executorch::runtime::to_string(error));
            return 2;
        }
{% for field in outputs %}
        comparisons.{{ field.name }}.add(outputs.{{ field.name }}, expected.{{ field.name }});
{% endfor %}
    }
    bool passes = true;
{% for field in outputs %}
    passes = comparisons.{{ field.name }}.report() && passes;
{% endfor %}
    return passes ? 0 : 1;
}
