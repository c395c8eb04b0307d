"""The page's addresses. If the router has API keys, the page's data needs a key with the scope `admin`."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from typing import Any, Final, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from antefix.errors import AntefixError
from antefix.whole_number import whole_number
from antefix_router.gateway.http_errors import Provider, error_response

_FILES: Final = {
    "/ui/": ("index.html", "text/html"),
    "/ui/page.js": ("page.js", "text/javascript"),
    "/ui/draw.js": ("draw.js", "text/javascript"),
    "/ui/page.css": ("page.css", "text/css"),
}
# The page may load nothing from elsewhere, and run no script that is written into the page itself.
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_SECONDS_MAX: Final = 4 * 3600


class PageView(Protocol):
    """The source of the page's data."""

    async def data(self, seconds: int) -> dict[str, Any]:
        """seconds: the length of the time series before now."""


def page_routes(view: PageView, check: Callable[[Request], object]) -> list[Route]:
    """check: raises Unauthenticated or PermissionDenied for a request that may not see the deployment."""
    files = importlib.resources.files("antefix_router.page") / "static"

    def shown(name: str, kind: str) -> Callable[[Request], Response]:
        return lambda request: Response((files / name).read_bytes(), media_type=kind, headers=_HEADERS)

    async def data(request: Request) -> Response:
        try:
            check(request)
            seconds = _seconds(request.query_params.get("seconds", "3600"))
            return JSONResponse(await view.data(seconds), headers={"cache-control": "no-store"})
        except AntefixError as err:
            return error_response(err, Provider.OPENAI)

    routes = [Route(path, shown(name, kind), methods=["GET"]) for path, (name, kind) in _FILES.items()]
    routes.append(Route("/ui", lambda request: RedirectResponse("/ui/"), methods=["GET"]))
    return [*routes, Route("/ui/data", data, methods=["GET"])]


def _seconds(text: str) -> int:
    seconds = whole_number(text)
    return 3600 if seconds is None else min(max(seconds, 60), _SECONDS_MAX)
