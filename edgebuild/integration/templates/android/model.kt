// {{ model.artifact | comment }}, made for ExecuTorch {{ model.runtime | comment }}. Written by edgebuild; do not edit.
package {{ package }}

import android.content.Context
import java.io.Closeable
import java.io.File
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** The model. Arrays hold tensors in C order (the last dimension varies fastest). */
class {{ name }} private constructor(private val module: Module) : Closeable {

{% for kind, fields in (("Inputs", inputs), ("Outputs", outputs)) %}
    class {{ kind }}(
{% for field in fields %}
        // {{ field.tensor.name | comment }}: {{ field.tensor.dtype }}, {{ field.tensor.shape | join(" x ") }}{{ ", as the bits of each number" if field.tensor.dtype == "float16" }}
        val {{ field.camel }}: {{ field.type.kotlin[0] }},
{% endfor %}
    )

{% endfor %}
    /**
     * One inference. Throws IllegalArgumentException for an array of another size, IllegalStateException where the file
     * is another model's, and what ExecuTorch throws.
     */
    fun run(inputs: Inputs): Outputs {
        val values = module.forward(
{% for field in inputs %}
            tensor({{ field.camel | kotlin }}, inputs.{{ field.camel }}.size, {{ field.size }}) {
{% if field.order %}
                val positions = positions(longArrayOf({{ field.tensor.shape | join(", ") }}), intArrayOf({{ field.order | join(", ") }}))
                val memory = {{ field.type.kotlin[0] }}({{ field.size }}) { inputs.{{ field.camel }}[positions[it]] }
                Tensor.{{ field.type.kotlin[1] }}(memory, longArrayOf({{ field.tensor.shape | join(", ") }}))
{% else %}
                Tensor.{{ field.type.kotlin[1] }}(inputs.{{ field.camel }}, longArrayOf({{ field.tensor.shape | join(", ") }}))
{% endif %}
            },
{% endfor %}
        )
        check(values.size == {{ outputs | length }}) { "the model gives ${values.size} outputs, {{ outputs | length }} were expected" }
        return Outputs(
{% for field in outputs %}
            output(values[{{ loop.index0 }}], longArrayOf({{ field.tensor.shape | join(", ") }})).{{ field.type.kotlin[2] }}{% if field.order %}.let { memory ->
                val positions = positions(longArrayOf({{ field.tensor.shape | join(", ") }}), intArrayOf({{ field.order | join(", ") }}))
                {{ field.type.kotlin[0] }}({{ field.size }}).also { for (m in positions.indices) it[positions[m]] = memory[m] }
            }{% endif %},
{% endfor %}
        )
    }

    override fun close() = module.destroy()

    private inline fun tensor(name: String, size: Int, expected: Int, make: () -> Tensor): EValue {
        require(size == expected) { "$name has $size elements, $expected were expected" }
        return EValue.from(make())
    }

    private fun output(value: EValue, shape: LongArray): Tensor {
        val tensor = value.toTensor()
        check(tensor.shape().contentEquals(shape)) { "an output has the shape ${tensor.shape().contentToString()}" }
        return tensor
    }

{% if reordered %}
    /** The position in C order of each element, in the order of memory; `order`: the dimensions there, outermost first. */
    private fun positions(shape: LongArray, order: IntArray): IntArray {
        val strides = IntArray(shape.size)
        var step = 1
        for (d in shape.indices.reversed()) {
            strides[d] = step
            step *= shape[d].toInt()
        }
        val index = IntArray(shape.size)
        return IntArray(step) {
            val position = index.indices.sumOf { d -> index[d] * strides[d] }
            for (d in order.reversed()) {
                if (++index[d] < shape[d]) break
                index[d] = 0
            }
            position
        }
    }

{% endif %}
    companion object {
        const val ARTIFACT = {{ model.artifact | kotlin }}
{% for field in outputs if field.tensor.labels %}

        /** The classes in the last dimension of `{{ field.camel }}`. */
        val {{ field.camel }}Labels = listOf(
{% for label in field.tensor.labels %}
            {{ label | kotlin }},
{% endfor %}
        )
{% endfor %}

        /** Maps the file into memory and makes the model ready to run. */
        fun load(file: File): {{ name }} {
            val module = Module.load(file.absolutePath, Module.LOAD_MODE_MMAP)
            module.loadMethod("forward")
            return {{ name }}(module)
        }

        /** Loads the model from the app's assets, by way of a file, as the runtime maps files alone. */
        fun load(context: Context): {{ name }} {
            val file = File(context.noBackupFilesDir, ARTIFACT)
            val fresh = File(context.noBackupFilesDir, "$ARTIFACT.new")
            context.assets.open(ARTIFACT).use { asset -> fresh.outputStream().use { asset.copyTo(it) } }
            check(fresh.renameTo(file)) { "cannot write $file" }
            return load(file)
        }
    }
}
