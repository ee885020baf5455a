"""What `make` does before there is an environment: which Python it takes, what it installs, what the locks say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bootstrap

ROOT = Path(bootstrap.__file__).parent


@pytest.mark.parametrize(
    ("version", "problem"),
    [((3, 8), "too old"), ((2, 7), "too old"), ((3, 11), None), ((3, 14), None), ((3, 15), "too new")],
)
def test_python_that_does_not_fit(version: tuple[int, int], problem: str | None) -> None:
    said = bootstrap.python_problem(version)
    assert (said is None) if problem is None else (problem in str(said))


def test_old_pythons_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: "/usr/bin/python3" if name == "python3" else None)
    monkeypatch.setattr(bootstrap, "_version", lambda path: (3, 8))
    with pytest.raises(bootstrap.SetupError, match=r"3\.11 to 3\.14 is needed.*3\.8 is too old \(/usr/bin/python3\)"):
        bootstrap.find_python()


def test_python_range_is_that_of_the_project() -> None:
    wanted = re.search(r'requires-python = "(.+)"', (ROOT / "pyproject.toml").read_text())
    oldest, newest = bootstrap.OLDEST, bootstrap.NEWEST
    assert wanted is not None
    assert wanted[1] == f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"


def test_set_up_without_disk_is_refused() -> None:
    with pytest.raises(bootstrap.SetupError, match=r"needs 9 GB of disk and .* has 2\.0 GB free"):
        bootstrap.check_disk(2.0, needed_gb=9)


@pytest.mark.parametrize(
    ("words", "is_network"),
    [
        ("error: Failed to fetch: `x`\n  Caused by: client error (Connect)", True),
        ("npm error code ENOTFOUND", True),
        ("NewConnectionError: Temporary failure in name resolution", True),
        ("THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", False),
    ],
)
def test_missing_network_is_told_from_other_failures(words: str, is_network: bool) -> None:
    assert bootstrap.network_failed(words) is is_network


def test_run_needs_nothing_where_all_is_installed_for_tests() -> None:
    uv, dev = bootstrap._lock_hash("requirements/uv.txt"), bootstrap._lock_hash("requirements/dev.txt")
    assert bootstrap._satisfies({"uv": uv, "dev": dev}, "run")
    assert not bootstrap._satisfies({"uv": uv, "run": bootstrap._lock_hash("requirements/run.txt")}, "dev")
    assert not bootstrap._satisfies({"uv": uv, "dev": "an older lock"}, "run")


def test_what_runs_has_the_same_versions_under_test() -> None:
    def pins(name: str) -> set[str]:
        return set(re.findall(r"^[\w.\[\]-]+==\S+", (ROOT / "requirements" / name).read_text(), re.MULTILINE))

    assert pins("run.txt") <= pins("dev.txt")
    assert pins("web.txt") | pins("engine.txt") <= pins("run.txt")


def test_locks_name_no_host() -> None:
    for path in [*(ROOT / "requirements").glob("*.txt"), ROOT / "package-lock.json"]:
        assert "://" not in path.read_text(), path.name
