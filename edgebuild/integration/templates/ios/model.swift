// {{ model.artifact | comment }}, made for ExecuTorch {{ model.runtime | comment }}. Written by edgebuild; do not edit.
import ExecuTorch
import Foundation

/// The model. Arrays hold tensors in C order (the last dimension varies fastest). For one thread at a time.
public final class {{ name }} {
{% for kind, fields in (("Inputs", inputs), ("Outputs", outputs)) %}
    public struct {{ kind }} {
{% for field in fields %}
        /// {{ field.tensor.name | comment }}: {{ field.tensor.dtype }}, {{ field.tensor.shape | join(" x ") }}
        public var {{ field.camel }}: [{{ field.type.swift }}]
{% endfor %}

        public init({% for field in fields %}{{ field.camel }}: [{{ field.type.swift }}]{{ ", " if not loop.last }}{% endfor %}) {
{% for field in fields %}
            self.{{ field.camel }} = {{ field.camel }}
{% endfor %}
        }
    }

{% endfor %}
    public enum Failure: Swift.Error {
        /// No such file in the package's resources.
        case missing(String)
        /// An input with another count of elements.
        case wrongInput(String)
        /// The file is another model's.
        case wrongOutput(String)
    }

    public static let artifact = {{ model.artifact | swift }}
{% for field in outputs if field.tensor.labels %}

    /// The classes in the last dimension of `{{ field.camel }}`.
    public static let {{ field.camel }}Labels = [
{% for label in field.tensor.labels %}
        {{ label | swift }},
{% endfor %}
    ]
{% endfor %}

    private let module: Module

    /// Maps the file into memory and makes the model ready to run.
    public init(path: String) throws {
        module = Module(filePath: path, loadMode: .mmap)
        try module.load("forward")
    }

    /// Loads the model from the package's resources.
    public convenience init() throws {
        guard let path = Bundle.module.path(forResource: Self.artifact, ofType: nil) else {
            throw Failure.missing(Self.artifact)
        }
        try self.init(path: path)
    }

    /// One inference.
    public func run(_ inputs: Inputs) throws -> Outputs {
        let values: [Value] = try module.forward([
{% for field in inputs %}
            try tensor({{ field.camel | swift }}, inputs.{{ field.camel }}, [{{ field.tensor.shape | join(", ") }}], order: [{{ (field.order or range(field.tensor.shape | length)) | join(", ") }}]),
{% endfor %}
        ])
        guard values.count == {{ outputs | length }} else { throw Failure.wrongOutput("\(values.count) outputs") }
        return Outputs(
{% for field in outputs %}
            {{ field.camel }}: try elements({{ field.camel | swift }}, values[{{ loop.index0 }}], [{{ field.tensor.shape | join(", ") }}], order: [{{ (field.order or range(field.tensor.shape | length)) | join(", ") }}]){{ "," if not loop.last }}
{% endfor %}
        )
    }

    private func tensor<T: Scalar>(_ name: String, _ elements: [T], _ shape: [Int], order: [Int]) throws -> Tensor<T> {
        guard elements.count == shape.reduce(1, *) else { throw Failure.wrongInput(name) }
        let memory = positions(shape, order).map { elements[$0] }
        return Tensor<T>(memory, shape: shape, dimensionOrder: order)
    }

    private func elements<T: Scalar>(_ name: String, _ value: Value, _ shape: [Int], order: [Int]) throws -> [T] {
        guard let tensor: Tensor<T> = value.tensor(), tensor.shape == shape, tensor.dimensionOrder == order else {
            throw Failure.wrongOutput(name)
        }
        let memory = tensor.scalars()
        var elements = memory
        for (m, c) in positions(shape, order).enumerated() { elements[c] = memory[m] }
        return elements
    }

    /// The position in C order of each element, in the order of memory.
    private func positions(_ shape: [Int], _ order: [Int]) -> [Int] {
        var strides = [Int](repeating: 1, count: shape.count)
        for d in shape.indices.dropLast().reversed() { strides[d] = strides[d + 1] * shape[d + 1] }
        var index = [Int](repeating: 0, count: shape.count)
        return (0..<shape.reduce(1, *)).map { _ in
            let position = zip(index, strides).reduce(0) { $0 + $1.0 * $1.1 }
            for d in order.reversed() {
                index[d] += 1
                if index[d] < shape[d] { break }
                index[d] = 0
            }
            return position
        }
    }
}
