from tests.hub_server.fixtures import client_waits, hub, hub_api  # noqa: F401

from .reports import local  # noqa: F401
