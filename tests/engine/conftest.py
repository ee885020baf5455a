import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Where pretrained encoders keep what they export, once for all tests."""
    return tmp_path_factory.mktemp("exported")
