// swift-tools-version:5.9
// {{ model.artifact | comment }} as a package of an app. Written by edgebuild; do not edit.
import PackageDescription

let package = Package(
    name: "{{ name }}Kit",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [
        .library(name: "{{ name }}Kit", targets: ["{{ name }}Kit"])
    ],
    dependencies: [
        .package(url: "https://github.com/pytorch/executorch.git", branch: "swiftpm-{{ model.runtime }}")
    ],
    targets: [
        .target(
            name: "{{ name }}Kit",
            dependencies: [
                .product(name: "executorch", package: "executorch"),
                .product(name: "backend_xnnpack", package: "executorch"),
                .product(name: "kernels_optimized", package: "executorch"),
                .product(name: "kernels_quantized", package: "executorch"),
            ],
            resources: [.copy({{ model.artifact | swift }})],
            // the linker would drop kernels and backends, which register themselves and are never called by name
            linkerSettings: [.unsafeFlags(["-Wl,-all_load"])]
        )
    ]
)
