"""Backends turn a model into an artifact. Each module offers `quantizer` and `lower`; `BACKENDS` is the registry."""

from edgebuild.backends import torchscript, xnnpack

BACKENDS = {"pte": xnnpack, "torchscript": torchscript}
