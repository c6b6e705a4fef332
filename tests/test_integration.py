"""The integration code: C++ that is built and run natively and on simulated Arm, Kotlin and Swift that parse."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import cmake
import ninja
import numpy as np
import pytest
import torch
import tree_sitter
import tree_sitter_kotlin
import tree_sitter_swift
from bundles import contents
from executorch.runtime import Runtime
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edgebuild import bundle, integration
from edgebuild.backends import xnnpack
from edgebuild.devices import toolchain
from edgebuild.errors import MissingEnvironment
from edgebuild.integration import Model, Normalization, TensorInfo, names
from edgebuild.lift import lift

CMAKE, NINJA = Path(cmake.CMAKE_BIN_DIR) / "cmake", Path(ninja.BIN_DIR) / "ninja"
HOSTILE = (
    *('"); system("true', "\\", "*/ // ??/", "${x} \\(y)", "a\nb\r\t\0"),
    *("Größe", "日本 😀", "\ud800", "%s%n", "`|<b>", "operator", "8 bit", ""),
)
SHAPES = ((1, 7), (1, 3, 8, 6), (1, 5), (1, 4, 8, 6))


class Net(nn.Module):
    """Takes int64 tokens and an image, gives logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.classify = nn.Embedding(16, 4), nn.Linear(4, 5)
        self.convolve = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.convolve(image))
        return self.classify(self.embed(tokens).mean(1) + features.mean((2, 3))), features


def model_of(orders: list[tuple[int, ...]]) -> Model:
    """Of Net, with names that are no identifiers."""
    tokens, image, logits, features = (
        TensorInfo(name, shape, dtype, order)
        for name, shape, dtype, order in zip(
            ("class", "Ein Bild", "x", "x"), SHAPES, ("int64", "float32", "float32", "float32"), orders, strict=True
        )
    )
    image = replace(image, layout="NCHW", normalization=Normalization((0.5,), (0.25, 0.5, 1.0), 1 / 255))
    outputs = (replace(logits, labels=HOSTILE, atol=1e-5), replace(features, atol=1e-5))
    return Model('my "net"*/ \\', "pte", "net.pte", "1.5.1", (tokens, image), outputs, 3)


@dataclass(frozen=True)
class Made:
    folder: Path
    inputs: list[tuple[np.ndarray, ...]]
    outputs: list[tuple[np.ndarray, ...]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bundle of Net, whose image and features lie in memory as channels last, with the artifact's own outputs."""
    torch.manual_seed(0)

    def sample() -> tuple[Tensor, ...]:
        return torch.randint(0, 16, SHAPES[0]), torch.randn(SHAPES[1]).to(memory_format=torch.channels_last)

    samples = [sample() for _ in range(3)]
    net = Net().eval()
    artifact = xnnpack.lower(lift(net, samples[0]), samples[0])
    takes, gives = xnnpack.memory_orders(artifact.data)
    assert [*takes, *gives] == [(0, 1), (0, 2, 3, 1), (0, 1), (0, 2, 3, 1)]
    method = Runtime.get().load_program(artifact.data).load_method("forward")
    assert method is not None
    outputs = [tuple(y.contiguous().numpy().copy() for y in method.execute(x)) for x in samples]
    with torch.no_grad():
        for x, y in zip(samples, outputs, strict=True):
            assert all(np.allclose(a, b.numpy(), atol=1e-5) for a, b in zip(y, net(*x), strict=True))
    inputs = [tuple(x.contiguous().numpy() for x in sample) for sample in samples]
    folder = tmp_path_factory.mktemp("bundle") / "net"
    code = integration.files(model_of([*takes, *gives]))
    files = {"net.pte": artifact.data, "vectors.safetensors": bundle.vectors(inputs, outputs), **code}
    bundle.write(folder, files, contents(files))
    return Made(folder, inputs, outputs)


def build(source: Path, made: Path, *options: str) -> Path:
    """The check program, built without a warning."""
    flags = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror -O1"
    configure = [CMAKE, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}", "-S", source, "-B", made, flags, *options]
    for command in (configure, [CMAKE, "--build", made, "-j1"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return made / "my_net_model_check"


def run(command: list, folder: Path) -> tuple[int, str]:
    done = subprocess.run([*command, folder], capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr


APP = """
cmake_minimum_required(VERSION 3.19)
project(app LANGUAGES CXX)
add_subdirectory("{code}" model)
add_executable(my_net_model_check "{code}/check.cpp")
target_link_libraries(my_net_model_check PRIVATE my_net_model)
"""


@pytest.fixture(scope="module")
def native(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        cxx, root = toolchain.native_compiler(), toolchain.native_sdk()
    except MissingEnvironment as missing:
        pytest.skip(str(missing))
    app = tmp_path_factory.mktemp("app")  # adds the folder to a project of its own, as apps do
    (app / "CMakeLists.txt").write_text(APP.format(code=made.folder / "integration/cpp"))
    return build(app, app / "build", f"-DCMAKE_CXX_COMPILER={cxx}", f"-DEXECUTORCH_ROOT={root}")


# ----------------------------------------------------------------------------------------------------------- C++


def test_cpp_gives_the_outputs_of_the_artifact(native: Path, made: Made) -> None:
    code, said = run([native], made.folder)
    assert code == 0, said
    assert re.findall(r"^(\w+): bit-equal, largest difference 0 \(allowed 1e-05\): pass$", said, re.M) == ["x", "x_2"]


@pytest.mark.parametrize("output", [0, 1])
def test_cpp_fails_on_an_output_that_is_too_far_off(native: Path, made: Made, tmp_path: Path, output: int) -> None:
    def moved(by: float) -> bytes:
        outputs = [[y.copy() for y in sample] for sample in made.outputs]
        outputs[2][output].flat[-1] += by
        return bundle.vectors(made.inputs, [tuple(sample) for sample in outputs])

    shutil.copy(made.folder / "net.pte", tmp_path)
    for by, code in ((1e-3, 1), (float("nan"), 1), (3e-6, 0)):
        (tmp_path / "vectors.safetensors").write_bytes(moved(by))
        assert run([native], tmp_path)[0] == code, by


def test_cpp_says_what_it_cannot_use(native: Path, made: Made, tmp_path: Path) -> None:
    vectors, program = (made.folder / "vectors.safetensors").read_bytes(), (made.folder / "net.pte").read_bytes()
    x = (torch.ones(1, 4),)
    other = xnnpack.lower(lift(nn.Linear(4, 2).eval(), x), x).data
    swapped = bundle.vectors([x[::-1] for x in made.inputs], made.outputs)
    for data, artifact, reason in (
        (vectors, b"", "net.pte cannot be loaded: Error::"),
        (vectors, program[:1000], "net.pte cannot be loaded: Error::"),
        (vectors, other, "net.pte cannot be loaded: Error::InvalidProgram"),
        (vectors[:-4], program, "has no such output_2_1"),
        (vectors[:7], program, "vectors.safetensors cannot be read"),
        (b"\xff" * 64, program, "vectors.safetensors cannot be read"),
        (swapped, program, "has no such input_0_0"),
        (bundle.vectors(made.inputs[:2], made.outputs[:2]), program, "has no such input_2_0"),
    ):
        (tmp_path / "vectors.safetensors").write_bytes(data)
        (tmp_path / "net.pte").write_bytes(artifact)
        code, said = run([native], tmp_path)
        assert code == 2 and reason in said, said


def test_cpp_for_arm_gives_the_outputs_too(made: Made, tmp_path: Path) -> None:
    try:
        qemu, cxx, sdk = toolchain.qemu(), toolchain.compiler(), toolchain.sdk()
    except MissingEnvironment as missing:
        pytest.skip(str(missing))
    root = tmp_path / "executorch"  # laid out as the wheel is, of which the cache keeps two folders
    shutil.copytree(sdk / "lib/cmake/executorch", root / "lib/cmake/executorch")
    shutil.copytree(sdk / "lib/cmake/executorch", root / "share/cmake")
    (root / "include").symlink_to(sdk / "include")
    for library in (sdk / "lib").glob("*.so"):
        (root / "lib" / library.name).symlink_to(library)
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={cxx}")
    check = build(made.folder / "integration/cpp", tmp_path / "arm", *target, f"-DEXECUTORCH_ROOT={root}")
    assert check.read_bytes()[18:20] == b"\xb7\x00"  # ELF's number for AArch64
    emulator = [qemu, "-cpu", "cortex-a76", "-L", toolchain.library_prefix(cxx), check]
    code, said = run(emulator, made.folder)
    assert code == 0 and said.count(": pass\n") == 2, said


def test_cpp_strings_hold_what_was_written(tmp_path: Path) -> None:
    literals = [names.cpp_string(text) for text in HOSTILE]
    writes = "".join(f"  {{ static const char x[] = {x}; fwrite(x, 1, sizeof x - 1, stdout); }}\n" for x in literals)
    (tmp_path / "s.c").write_text(f"#include <stdio.h>\nint main(void) {{\n{writes}}}\n")
    try:
        cc = toolchain.c_compiler()
    except MissingEnvironment as missing:
        pytest.skip(str(missing))
    subprocess.run([cc, "-trigraphs", "-Wall", "-Werror", tmp_path / "s.c", "-o", tmp_path / "s"], check=True)
    written = subprocess.run([tmp_path / "s"], capture_output=True, check=True).stdout
    assert written == "".join(HOSTILE).encode("utf-8", "replace")


# ------------------------------------------------------------------------------------------------ Kotlin and Swift


def broken(path: Path) -> list[str]:
    """The places that the language's grammar does not take."""
    language = tree_sitter_swift.language() if path.suffix == ".swift" else tree_sitter_kotlin.language()
    tree = tree_sitter.Parser(tree_sitter.Language(language)).parse(path.read_bytes())
    found, nodes = [], [tree.root_node]
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.is_error or node.is_missing:
            found.append(f"{path.name}:{node.start_point.row + 1}")
    return found


def test_kotlin_and_swift_parse(made: Made) -> None:
    code = [path for suffix in ("*.kt", "*.kts", "*.swift") for path in (made.folder / "integration").rglob(suffix)]
    assert {path.name for path in code} == {"MyNetModel.kt", "MyNetModel.swift", "Package.swift", "build.gradle.kts"}
    assert not [place for path in code for place in broken(path)]


def test_the_parsers_see_what_is_wrong(tmp_path: Path) -> None:
    for name in ("a.kt", "a.swift"):
        (tmp_path / name).write_text("class A { let x = [1, }\n")
        assert broken(tmp_path / name)


# ----------------------------------------------------------------------------------------------------------- files


def test_the_same_model_gives_the_same_bytes() -> None:
    model = model_of([(), (0, 2, 3, 1), (), ()])
    script = f"from edgebuild.integration import *; print(sorted(files({model!r}).items()))"
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert again.stdout == f"{sorted(integration.files(model).items())}\n"


def test_the_readme_says_what_the_app_has_to_do(made: Made) -> None:
    text = (made.folder / "integration/README.md").read_text()
    assert "| input 0 | `class` | int64 | 1 x 7 |  | C order |" in text
    assert "| input 1 | `Ein Bild` | float32 | 1 x 3 x 8 x 6 | `NCHW` | dimensions 0, 2, 3, 1 |" in text
    assert f"Prepare `Ein Bild` as (x * {1 / 255} - mean) / std, by channel: mean 0.5; std 0.25, 0.5, 1.0." in text
    assert "Prepare `class` as the task's calibration inputs were" in text
    assert text.count("**Not compiled by edgebuild**") == 2


def test_torchscript_gets_no_code_and_a_word_on_its_runtime() -> None:
    model = replace(model_of([()] * 4), kind="torchscript", artifact="net.pt", runtime="2.13.0")
    made = integration.files(model)
    assert list(made) == ["integration/README.md"]
    assert "link libtorch 2.13.0" in made["integration/README.md"].decode()


def test_what_an_api_lacks_is_said() -> None:
    model = model_of([()] * 4)
    for dtype, without in (("bool", "android"), ("int16", "android"), ("float16", "ios"), ("uint16", "cpp")):
        tokens = replace(model.inputs[0], dtype=dtype)
        made = integration.files(replace(model, inputs=(tokens, *model.inputs[1:])))
        assert not [name for name in made if name.startswith(f"integration/{without}/")]
        assert re.search(f"no tensors of {dtype}|No code is written", made["integration/README.md"].decode())
        assert without == "cpp" or any(name.startswith("integration/cpp/") for name in made)


@given(st.lists(st.text(max_size=20) | st.sampled_from(sorted(names.RESERVED)), max_size=6))
def test_any_name_becomes_an_identifier(given: list[str]) -> None:
    made = names.unique(given, "tensor")
    assert all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*_?", name) and name not in names.RESERVED for name in made)
    camels = [names.camel(name) for name in made]
    assert len(set(made)) == len(set(camels)) == len(given)
    assert all(re.fullmatch(r"[a-z][A-Za-z0-9]*_?", name) and name not in names.RESERVED for name in camels)


@pytest.mark.parametrize("task", [*HOSTILE, "x" * 500, "model", "../../etc"])
def test_any_task_gives_names_that_a_bundle_takes(task: str, tmp_path: Path) -> None:
    files = integration.files(replace(model_of([()] * 4), task=task))
    bundle.write(tmp_path / "b", files, contents(files))
