"""A profile with its targets as files of a bundle, so that another machine can hold the artifact against them.

`profile.toml`, `targets/NAME.toml` and `targets/cores/NAME.toml` are the texts that were used; only the names by which
they lead to each other are rewritten, to paths within the bundle.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgebuild import catalog
from edgebuild.errors import SpecError, UsageError
from edgebuild.spec import Profile, Target

PROFILE = "profile.toml"


@dataclass(frozen=True)
class Settings:
    """What an artifact is held against. `unreached`: the bundle's own ssh targets.

    Where to connect, and by which program, is for the user to say and not for a file that came along.
    """

    profile: Profile
    targets: tuple[Target, ...]
    unreached: tuple[Target, ...] = ()

    @property
    def calibrated(self) -> bool:
        """Whether the gating target's figures can be trusted, so that an undecided budget fails a build."""
        return (*self.targets, *self.unreached)[0].status != "unvalidated"


# ------------------------------------------------------------------------------------------------------- writing


def pack(profile: str) -> dict[str, bytes]:
    """The files of a profile, shipped or at a path, by their names in a bundle. Raises as `catalog` does."""
    files: dict[str, bytes] = {}
    loaded = catalog.load_profile(profile)
    document = _document(catalog.find("profiles", profile))
    document["target"] = _pack_target(loaded.target, files)
    if loaded.also_on:
        document["also_on"] = [_pack_target(name, files) for name in loaded.also_on]
    return {PROFILE: document.as_string().encode()} | files


def _pack_target(name: str, files: dict[str, bytes]) -> str:
    path = catalog.find("targets", name)
    document = _document(path)
    if "costs_of" in document:
        document["costs_of"] = Path(_pack_target(catalog.beside(path, document["costs_of"]), files)).name
    for cluster in document.get("cluster", ()):
        core = _document(catalog.core_file(cluster["model"], path.parent))
        kept = _put(files, "targets/cores", core)
        cluster["model"] = str(Path(kept).relative_to("targets"))
    return _put(files, "targets", document)


def _put(files: dict[str, bytes], folder: str, document: Any) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", document["name"]).lstrip(".-") or "unnamed"
    name, text = f"{folder}/{stem}.toml", document.as_string().encode()
    if files.setdefault(name, text) != text:
        raise SpecError(f"two files of the profile are named {document['name']!r}", "a bundle needs a name for each")
    return name


def _document(path: Path) -> Any:
    import tomlkit

    return tomlkit.parse(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------- reading


def read(files: Mapping[str, bytes], profile: str = "", devices: Sequence[str] = ()) -> Settings:
    """What the bundle of `files` is to be held against: its own profile or the one that the user names, on its targets.

    `devices` replace the targets: paths, shipped names, or names of the bundle's own targets. Raises UsageError, and
    SpecError where the bundle's files cannot be used or lead out of it.
    """
    with tempfile.TemporaryDirectory(prefix="edgebuild-") as folder:
        try:
            own = _unpack(files, Path(folder))
            if not profile and not own:
                raise SpecError(f"no {PROFILE} in the bundle", "name one with --profile, or build it again")
            loaded = catalog.load_profile(profile or f"{folder}/{PROFILE}")
            if devices:
                first, *others = (_device(name, own) for name in devices)
                loaded = replace(loaded, target=first, also_on=tuple(others))
            targets = catalog.targets_of(loaded)
        except (SpecError, UsageError) as error:
            raise type(error)(error.what.replace(f"{folder}/", "the bundle's "), error.remedy) from None
        paths = {target.name: path for target, path in zip(targets, loaded.targets, strict=True)}
        if len(paths) < len(targets):
            raise UsageError("two devices have the same name", "name each once")
    unreached = [t for t in targets if t.device == "ssh" and paths[t.name].startswith(f"{folder}/")]
    reached = tuple(target for target in targets if target not in unreached)
    return Settings(replace(loaded, target=targets[0].name, also_on=tuple(paths)[1:]), reached, tuple(unreached))


def _unpack(files: Mapping[str, bytes], folder: Path) -> dict[str, str]:
    """Write the bundle's settings down; its targets' paths by name, empty where it has no settings."""
    ours = {name: data for name, data in files.items() if name == PROFILE or name.startswith("targets/")}
    if PROFILE not in ours:
        return {}
    for name, data in ours.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    own = {}
    for name in ours:
        table = catalog.read(folder / name)
        if name == PROFILE:
            leads = [table.get("target"), *_list(table.get("also_on"))]
        elif name.count("/") == 1:
            own[str(table.get("name"))] = str(folder / name)
            models = [cluster.get("model") for cluster in _list(table.get("cluster")) if isinstance(cluster, dict)]
            leads = [f"targets/{lead}" for lead in [*models, table.get("costs_of")] if lead is not None]
        else:
            leads = []
        for lead in leads:
            if not isinstance(lead, str) or lead not in ours:
                raise SpecError(f"{folder / name} leads to {lead!r}, which is not in the bundle")
    return own


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _device(name: str, own: Mapping[str, str]) -> str:
    return own[name] if name in own and name not in catalog.names("targets") else name
