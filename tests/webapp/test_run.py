"""`make run` before anything starts: what it refuses and how it says so, what it makes, what it leaves out."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import sqlite3
from pathlib import Path

import pytest

from webapp.run import ROOT, StartError
from webapp.run.data_dir import check_data_dir, load_secrets, lock
from webapp.run.network import check_port, ensure_certificate, free_port
from webapp.run.options import Options, environment
from webapp.run.preparation import fingerprints
from webapp.run.supervisor import Supervisor

NOW = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)


def options(data_dir: Path, **env: str) -> Options:
    return Options.from_environment({"DATA_DIR": str(data_dir), **env})


# What is refused ------------------------------------------------------------------------------------------------------


def test_port_in_use_names_another_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StartError, match=f"Port {port} is in use.*make run PORT={port + 1}"):
            check_port("127.0.0.1", port)


def test_free_port_is_taken() -> None:
    check_port("127.0.0.1", free_port())


@pytest.mark.parametrize("port", ["0", "70000", "http", "-1"])
def test_port_that_is_none_is_named(port: str, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"PORT is '{port}'"):
        options(tmp_path, PORT=port)


def test_foreign_host_is_named() -> None:
    with pytest.raises(StartError, match=r"192\.0\.2\.7"):
        check_port("192.0.2.7", 8000)


def test_data_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(StartError, match=r"cannot be written.*make run DATA_DIR="):
        check_data_dir(tmp_path / "data")


def test_full_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"0\.1 GB free and 0\.5 GB is the least"):
        check_data_dir(tmp_path, free_gb=lambda path: 0.1)


def test_second_run_on_one_data_dir_is_told_of_the_first(tmp_path: Path) -> None:
    first = options(tmp_path)
    with lock(first.data_dir):
        Supervisor(first, {"REDIS_URL": ""})._write_state()
        with pytest.raises(StartError, match=rf"already runs on .*http://localhost:8000/ \(process {os.getpid()}\)"):
            lock(first.data_dir).__enter__()
    with lock(first.data_dir):
        pass  # and it may start once the first is gone


def test_damaged_secrets_are_not_replaced_in_silence(tmp_path: Path) -> None:
    (tmp_path / "secrets.json").write_text("{")
    with pytest.raises(StartError, match="damaged"):
        load_secrets(tmp_path)


# What is made at the first start --------------------------------------------------------------------------------------


def test_secrets_are_private_and_kept(tmp_path: Path) -> None:
    first = load_secrets(tmp_path)
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600
    assert len(first["secret_key"]) >= 50
    assert load_secrets(tmp_path) == first


def test_secrets_that_others_could_read_are_closed(tmp_path: Path) -> None:
    load_secrets(tmp_path)
    (tmp_path / "secrets.json").chmod(0o644)
    load_secrets(tmp_path)
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600


def test_children_are_told_the_settings(tmp_path: Path) -> None:
    own = {"secret_key": "generated", "redis_password": "x"}
    told = environment(options(tmp_path), own, "unix://:x@/s?db=0", {"MAKELEVEL": "1", "LANG": "C.UTF-8"})
    assert told["SECRET_KEY"] == "generated"
    assert told["REDIS_URL"] == "unix://:x@/s?db=0"
    assert told["DATA_DIR"] == str(tmp_path)
    assert told["DATABASE_URL"] == f"sqlite:///{tmp_path}/db.sqlite3"
    assert told["HTTPS"] == "0"
    assert told["LANG"] == "C.UTF-8"
    assert "MAKELEVEL" not in told


def test_what_the_person_set_wins(tmp_path: Path) -> None:
    env = {"SECRET_KEY": "mine", "DATABASE_URL": "postgres://u@h/d", "ALLOWED_HOSTS": "studio.example"}
    told = environment(options(tmp_path), {"secret_key": "generated"}, "redis://", env)
    assert (told["SECRET_KEY"], told["DATABASE_URL"]) == ("mine", "postgres://u@h/d")
    assert told["ALLOWED_HOSTS"] == "studio.example,127.0.0.1"


def test_open_host_is_served_over_tls_to_its_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webapp.run.options.local_addresses", lambda host: ["192.168.1.5"])
    chosen = options(tmp_path, HOST="0.0.0.0", PORT="8443")
    told = environment(chosen, {"secret_key": "x"}, "redis://", {})
    assert chosen.address == "https://192.168.1.5:8443/"
    assert told["HTTPS"] == "1"
    assert "192.168.1.5" in told["ALLOWED_HOSTS"].split(",")
    assert "https://192.168.1.5:8443" in told["CSRF_TRUSTED_ORIGINS"].split(",")


def test_certificate_is_kept_until_a_name_is_new_or_it_expires(tmp_path: Path) -> None:
    certificate, key = ensure_certificate(tmp_path, ["localhost", "192.168.1.5"], NOW)
    assert key.stat().st_mode & 0o777 == 0o600
    first = certificate.read_bytes()
    ensure_certificate(tmp_path, ["192.168.1.5"], NOW)
    assert certificate.read_bytes() == first
    ensure_certificate(tmp_path, ["localhost", "10.0.0.9"], NOW)
    second = certificate.read_bytes()
    assert second != first
    ensure_certificate(tmp_path, ["localhost"], NOW + datetime.timedelta(days=799))
    assert certificate.read_bytes() != second


# What a second start leaves out ------------------------------------------------------------------------------------


def prepared(data_dir: Path, database: str = "") -> dict[str, str]:
    return fingerprints(options(data_dir), {"DATABASE_URL": database or f"sqlite:///{data_dir}/db.sqlite3"})


def test_database_is_migrated_again_once_it_is_another(tmp_path: Path) -> None:
    assert prepared(tmp_path)["migrate"] == "", "there is none yet"
    with contextlib.closing(sqlite3.connect(tmp_path / "db.sqlite3")) as database:
        assert prepared(tmp_path)["migrate"] == "", "it is empty"
        database.execute("CREATE TABLE django_migrations (id INTEGER PRIMARY KEY)")
        database.execute("INSERT INTO django_migrations VALUES (1), (2)")
        database.commit()
        migrated = prepared(tmp_path)["migrate"]
        assert migrated
        assert prepared(tmp_path)["migrate"] == migrated
        database.execute("DELETE FROM django_migrations WHERE id = 2")  # as after a backup is brought back
        database.commit()
    assert prepared(tmp_path)["migrate"] != migrated


def test_database_server_is_always_asked(tmp_path: Path) -> None:
    assert prepared(tmp_path, "postgres://u@h/d")["migrate"] == ""


def test_static_files_are_collected_where_there_are_none(tmp_path: Path) -> None:
    assert prepared(tmp_path)["collectstatic"] == ""
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "staticfiles.json").write_text("{}")
    assert prepared(tmp_path)["collectstatic"] != ""


# Documentation --------------------------------------------------------------------------------------------------------


def test_every_setting_is_in_the_readme() -> None:
    read = re.findall(r'env\.\w+\(\s*"([A-Z_]+)"', (ROOT / "webapp" / "settings.py").read_text())
    for path in (ROOT / "webapp" / "run").glob("*.py"):
        read += re.findall(r'env\.get\("([A-Z_]+)"', path.read_text())
    documented = re.findall(r"^\| `([A-Z_]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(read) > 10
    assert set(read) == set(documented)
