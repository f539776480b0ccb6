import pytest

from training_runs import write_stores


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """Prefixes of `training_runs.write_stores`: text, text for validation, instructions. Tests don't write there."""
    return write_stores(tmp_path_factory.mktemp("data"))
