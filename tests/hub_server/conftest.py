from . import client_waits, hub, hub_api  # noqa: F401
