import pytest

from worker import vectors


@pytest.fixture(autouse=True)
def _no_open_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of a shard goes with its test's transaction, so the next test's writer begins anew."""
    monkeypatch.setattr(vectors, "_mine", {})
