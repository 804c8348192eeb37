"""A page to ask the same question for different users, side by side: ``e2p serve RUN --playground``.

It stands in the server itself and asks it as clients do, so what it shows is what the API answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from e2p.config_serving import ServingConfig, is_loopback
from e2p.errors import ConfigError, MissingExtraError
from e2p.serving.known_people import known_people

if TYPE_CHECKING:
    from e2p.serving.http.auth import Key


def require_playground(config: ServingConfig, keys: Sequence[Key]) -> None:
    """Check that there may be a playground, before anything is loaded.

    The page shows people's data: ids, profiles, answers. So it is there for whoever is on this machine, or for a key
    that may read users and generate.

    Raises:
        ConfigError: nobody could open it, or everybody beyond this machine could.
        MissingExtraError: the extra playground is not installed.
    """
    if find_spec("gradio") is None:
        raise MissingExtraError("gradio", "playground", "The playground")
    needed = {"generate", "users:read"}
    if keys and not any(needed <= key.scopes for key in keys):
        raise ConfigError("playground: expected a key with the scopes generate and users:read, got none; add one")
    if not keys and not is_loopback(config.host):
        raise ConfigError(
            f"playground: it shows people's data, so {config.host}, which is reached from other machines, needs keys, "
            "also with --insecure; name a file by --keys, or listen on 127.0.0.1"
        )


def add_playground(app: Any, folders: Mapping[str, str]) -> None:
    """Put the page under /playground of a server's application.

    Args:
        app: as :func:`e2p.serving.http.app.create_app` makes it.
        folders: by adapter, the folder of its run, which tells users, their places on the map, profiles and prompts;
            without them, users are suggested out of the store.
    """
    from starlette.responses import RedirectResponse
    from starlette.routing import Route

    from e2p.serving.http.inside import PAGE
    from e2p.serving.http.page import Page
    from e2p.serving.http.page_form import mount

    async def slash(_: Any) -> RedirectResponse:
        return RedirectResponse(f"{PAGE}/")

    app.router.routes.append(Route(PAGE, slash))
    mount(Page(app, app.state.service, {name: known_people(folder) for name, folder in folders.items()}))
