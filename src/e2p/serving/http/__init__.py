"""The server: routes, keys, limits, streams. Knows no tensors. All of it needs the extra ``serve``."""

from importlib.util import find_spec

from e2p.errors import MissingExtraError

for _package in ("fastapi", "uvicorn", "prometheus_client", "orjson"):
    if find_spec(_package) is None:
        raise MissingExtraError(_package.replace("_", "-"), "serve", "Serving")
