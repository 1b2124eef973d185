"""Every write finished before the next read, as where a layer's output goes through foreign hands."""

from contextlib import contextmanager
from unittest.mock import PropertyMock, patch

from megatron_vwn.modules.connection import Connection


@contextmanager
def unfused():
    """Inside, no write waits for the next sublayer's read."""
    with patch.object(Connection, "fuses_write_read", new_callable=PropertyMock, return_value=False):
        yield
