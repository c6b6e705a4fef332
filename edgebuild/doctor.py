"""Checks that torch, torchvision, torchao and executorch, which are built against one another, fit each other."""

from importlib.metadata import PackageNotFoundError, version

PINNED = {"torch": "2.13.0", "torchvision": "0.28.0", "executorch": "1.5.1", "torchao": "0.18.0"}


def packages() -> list[tuple[str, bool, str]]:
    """For each pinned package its name, whether it fits, and what was found or the command that mends it."""
    rows = []
    for name, wanted in PINNED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        fits = found.split("+")[0] == wanted
        rows.append((name, fits, found if fits else f"found {found}; pip install {name}=={wanted}"))
    return rows
