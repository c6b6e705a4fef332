"""Measurements wait for each other."""

import tempfile
import threading

from edgebuild.devices.turn import turn


def test_a_second_one_waits_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    order = []

    def second() -> None:
        with turn("a/b"):
            order.append("second")

    thread = threading.Thread(target=second)
    with turn("a/b"):
        thread.start()
        thread.join(0.5)
        order.append("first")
        with turn("another"):  # no reason to wait
            order.append("another")
    thread.join()
    assert order == ["first", "another", "second"]
    assert "waiting for another build that measures on a/b" in capsys.readouterr().err
