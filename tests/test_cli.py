"""The `stitchvm` command."""

from __future__ import annotations

import sys

import pytest

from stitchvm_ext import __version__, cli
from stitchvm_ext.ops import _info


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["stitchvm", *arguments])
    cli.main()


def test_info_prints_versions_and_backends(monkeypatch, capsys):
    run(monkeypatch, "info")
    printed = capsys.readouterr().out
    assert __version__ in printed and all(op in printed for op in _info.OPS)


def test_user_errors_are_one_line(monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "demo", "--prompts", "0", "--out", str(tmp_path / "out"))
    assert stop.value.code == "stitchvm: prompts: expected at least 1, got 0"


def test_an_unknown_subcommand_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "dmeo")
    assert stop.value.code not in (0, None)
