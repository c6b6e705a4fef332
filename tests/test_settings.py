"""A profile in a bundle: complete, the same values again, and never a way out of the bundle."""

import pytest
from bundles import contents

from edgebuild import bundle, catalog, settings
from edgebuild.errors import SpecError, UsageError

SSH = """
name = "lab-pi"
title = "a board"
device = "ssh"
status = "measured"
costs_of = "mine.toml"
[ssh]
host = "pi@lab"
options = ["ProxyCommand=touch /tmp/pwned"]
"""


@pytest.mark.parametrize("name", catalog.names("profiles"))
def test_a_shipped_profile_is_the_same_again(name, tmp_path):
    files = settings.pack(name)
    bundle.write(tmp_path / "out", files, contents(files))
    found, profile = settings.read(bundle.read(tmp_path / "out")), catalog.load_profile(name)
    assert found.profile == profile and found.targets == catalog.targets_of(profile) and found.unreached == ()
    assert settings.pack(name) == files


@pytest.fixture
def own(tmp_path):
    """The files of a user's own profile: an ssh target, whose costs are of a target with a core of its own."""
    core = (catalog.folder("targets") / "cores" / "cortex-a72.toml").read_text()
    (tmp_path / "core.toml").write_text(core.replace('name = "cortex-a72"', 'name = "my core"'))
    target = (catalog.folder("targets") / "raspberry-pi-4.toml").read_text()
    target = target.replace('model = "cortex-a72"', 'model = "core.toml"').replace('"raspberry-pi-4"', '"mine"')
    (tmp_path / "mine.toml").write_text(f"# a comment\n{target}")
    (tmp_path / "pi.toml").write_text(SSH)
    profile = (catalog.folder("profiles") / "raspberry-pi-4.toml").read_text().replace('"raspberry-pi-4"', '"p"', 1)
    profile = profile.replace('target = "raspberry-pi-4"', 'target = "pi.toml"\nalso_on = ["mine.toml"]')
    (tmp_path / "p.toml").write_text(profile)
    return settings.pack(str(tmp_path / "p.toml"))


def test_a_profile_of_the_users_own_is_complete(own, tmp_path):
    names = {"profile.toml", "targets/lab-pi.toml", "targets/mine.toml", "targets/cores/my-core.toml"}
    assert set(own) == names and own["targets/mine.toml"].startswith(b"# a comment\n")
    for path in tmp_path.iterdir():
        path.unlink()
    found = settings.read(own)
    assert [target.name for target in found.targets] == ["mine"]
    assert found.targets[0].cluster[0].model.name == "my core"
    assert found.profile.targets == ("lab-pi", "mine") and found.profile.threads == 4


def test_a_bundle_does_not_say_where_to_connect(own, tmp_path):
    found = settings.read(own)
    assert [target.name for target in found.unreached] == ["lab-pi"]
    given = settings.read(own, devices=[str(tmp_path / "pi.toml")])
    assert [target.name for target in given.targets] == ["lab-pi"] and given.unreached == ()


def test_devices_replace_the_targets(own, tmp_path):
    assert settings.read(own, devices=["mine"]).profile.targets == ("mine",)
    assert settings.read(own, devices=["host", "raspberry-pi-4"]).profile.targets == ("host", "raspberry-pi-4")
    with pytest.raises(UsageError, match="unknown target 'hots'"):
        settings.read(own, devices=["hots"])
    with pytest.raises(UsageError, match="two devices have the same name"):
        settings.read(own, devices=["mine", str(tmp_path / "mine.toml")])
    with pytest.raises(SpecError, match="threads = 4, but 'pixel-7' runs models on the 2 cores"):
        settings.read(own, devices=["pixel-7"])


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("profile.toml", "targets/mine.toml", "/etc/passwd.toml", "leads to '/etc/passwd.toml'"),
        ("profile.toml", "targets/mine.toml", "targets/../profile.toml", "not in the bundle"),
        ("profile.toml", "targets/mine.toml", "raspberry-pi-4", "not in the bundle"),
        ("targets/mine.toml", "cores/my-core.toml", "../../core.toml", "not in the bundle"),
        ("targets/lab-pi.toml", '"mine.toml"', '"host"', "not in the bundle"),
        ("profile.toml", "threads = 4", "threads = 1000000000", "not between 1 and 256"),
        ("targets/mine.toml", "count = 4", "count = 1000000000", "not between 1 and 256"),
        ("profile.toml", "threads = 4", "threads = " + "[" * 5000, "the bundle's profile.toml"),
        ("profile.toml", "size", "\0", "the bundle's profile.toml"),
    ],
)
def test_what_leads_out_of_the_bundle_or_is_absurd_is_refused(own, name, old, new, message):
    assert old.encode() in own[name]
    files = own | {name: own[name].replace(old.encode(), new.encode(), 1)}
    with pytest.raises(SpecError, match=message) as caught:
        settings.read(files)
    assert "/tmp/" not in str(caught.value)


def test_a_bundle_without_a_profile_takes_the_users():
    with pytest.raises(SpecError, match="no profile.toml in the bundle"):
        settings.read({})
    assert settings.read({}, "mobile-cpu").profile.name == "mobile-cpu"
