"""Whom a server lets in."""

import pytest

from lite.errors import ExportError
from lite.serve.serve import Door, require_guarded


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "localhost", "::1"])
def test_this_machine_needs_no_key(host: str) -> None:
    require_guarded(Door(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "box.example"])
def test_the_network_needs_one(host: str) -> None:
    require_guarded(Door(host=host, api_key="sesame"))
    for none in (None, ""):
        with pytest.raises(ExportError, match="no --api-key is set"):
            require_guarded(Door(host=host, api_key=none))
