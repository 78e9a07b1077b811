"""The monitor's web server: a page, its data as JSON, and two things that can be sent: readings, acknowledgements.

No request names a path, a file or code. Whatever a request is, the answer is JSON or HTML with a sentence; what went
wrong inside stays in the log. Scripts come from the page's own address only, requests for other host names are refused
(another site's page could send them), and what is sent has to be JSON (which another site's page cannot send unasked).
"""

import asyncio
import hashlib
import hmac
import logging
import socket
import sqlite3
from collections.abc import Awaitable, Callable
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fem_diffusion.errors import DataError, InputError, InstallError
from fem_diffusion.monitor.incoming import json_of, reading_of
from fem_diffusion.monitor.report import report_of
from fem_diffusion.monitor.site import Site

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise InstallError("The monitor needs Starlette and uvicorn: pip install 'fem_diffusion[monitor]'.") from error

__all__ = ["application", "is_local", "serve"]

_LOG = logging.getLogger("fem_diffusion.monitor")
_ASSETS = Path(__file__).parent / "assets"
_KINDS = {"page.html": "text/html", "page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml",
          "token.html": "text/html"}
# Bytes of a body, seconds until it has to be there, characters of a name and of a token.
_BODY, _WAIT, _NAME, LEAST_TOKEN = 2**16, 10.0, 80, 16
_COOKIE = "fem_diffusion_monitor"
_ALWAYS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
           "form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
_OWN = {404: "There is nothing here.", 405: "This cannot be done here."}
# A report is one file, with its style inside and no script.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"


def is_local(host: str) -> bool:
    """Whether only this machine can reach a host name or address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(site: Site, host: str, port: int, token: str | None = None, certificate: tuple[str, str] | None = None,
          told: Callable[[str], None] = print) -> None:
    """Serve a site until the process is asked to stop; `told` gets the address once it listens.

    InputError if the address cannot be had, or others can reach it and there is no token of 16 characters at least.
    """
    if token is not None and len(token) < LEAST_TOKEN or token is None and not is_local(host):
        raise InputError(f"{host} can be reached from other machines: set FEM_DIFFUSION_TOKEN to a secret of at least "
                         f"{LEAST_TOKEN} characters that those who may see the page know."
                         if token is None else f"The token has {len(token)} characters: take {LEAST_TOKEN} or more.")
    if not 0 <= port < 2**16:
        raise InputError(f"The monitor cannot listen on port {port}: choose one below 65536 with --port.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise InputError(f"The monitor cannot listen on {host}, port {port} ({error}): choose others with --host and "
                         "--port.") from error
    more: dict[str, Any] = {} if certificate is None else dict(zip(("ssl_certfile", "ssl_keyfile"), certificate))
    try:
        config = uvicorn.Config(application(site, token, None if is_local(host) else ["*"]), log_level="warning",
                                access_log=False, server_header=False, lifespan="off", http=_Impatient, ws="none",
                                limit_concurrency=200, timeout_keep_alive=20, timeout_graceful_shutdown=3, **more)
        config.load()
    except (OSError, ValueError) as error:
        listening.close()
        raise InputError(f"The certificate cannot be used ({error}): give --certificate and --key in PEM.") from error
    address = f"[{host}]" if ":" in host else host
    told(f"http{'s' if certificate else ''}://{address}:{listening.getsockname()[1]}/")
    site.start()
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        site.stop()


class _Impatient(H11Protocol):
    """Closes connections on which no request comes: many of them would keep others out."""

    def connection_made(self, transport: asyncio.Transport) -> None:   # pyright: ignore
        super().connection_made(transport)
        self._seen, self._timer = None, self.loop.call_later(_WAIT, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        if self.cycle is self._seen and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
            return
        self._seen, self._timer = self.cycle, self.loop.call_later(_WAIT, self._look)


def application(site: Site, token: str | None = None, hosts: list[str] | None = None) -> Starlette:
    """The web application of a site; without `hosts`, requests for names of this machine alone are answered."""
    views = _Views(site, None if token is None else token.encode())
    assets = [Route(f"/{name}", views.asset(name)) for name in ("page.js", "page.css", "icon.svg")]
    routes = [*assets, Route("/", views.page), Route("/report", views.report), Route("/api/state", views.state),
              Route("/api/mesh", views.mesh), Route("/api/map", views.map), Route("/api/series", views.series),
              Route("/api/readings", views.add, methods=["POST"]), Route("/token", views.token, methods=["POST"]),
              Route("/api/alarms/{number}/acknowledge", views.acknowledge, methods=["POST"])]
    handlers: Any = dict.fromkeys((HTTPException, DataError, sqlite3.Error, ClientDisconnect, Exception), _told)
    named = Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["localhost", "127.0.0.1", "[::1]", "::1"],
                       www_redirect=False)
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[named, Middleware(_Guard, views=views)])


class _Guard:
    """Refuses requests without the token, and adds to every answer what browsers have to know."""

    def __init__(self, app: Any, views: "_Views") -> None:
        self.app, self.views = app, views

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                more = _ALWAYS | {"Content-Security-Policy": _POLICY}
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in
                                                             more.items() if name.lower().encode() not in names)]
            await send(message)
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        if self.views.secret is not None and request.url.path != "/token" and not self.views.knows(request):
            await asyncio.sleep(0.2)    # whoever tries secrets waits
            wants_page = request.method == "GET" and "text/html" in request.headers.get("accept", "")
            answer = _asset("token.html", 401) if wants_page else JSONResponse(
                {"error": "Give the token of this monitor: Authorization: Bearer ..."}, 401,
                {"WWW-Authenticate": "Bearer"})
            await answer(scope, receive, marked)
            return
        await self.app(scope, receive, marked)


class _Views:
    """What each address answers."""

    def __init__(self, site: Site, secret: bytes | None) -> None:
        self.site, self.secret = site, secret

    def knows(self, request: Request) -> bool:
        """Whether a request brings the token, or the cookie of one who has."""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        good = kind.lower() == "bearer" and self._same(given)
        return good or hmac.compare_digest(request.cookies.get(_COOKIE, "").encode(), self._mark().encode())

    def _same(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), self.secret or b"")

    def _mark(self) -> str:
        """What a browser keeps in place of the token."""
        return hmac.new(self.secret or b"", b"page of the monitor", hashlib.sha256).hexdigest()

    async def token(self, request: Request) -> Response:
        """Take the token from the page's form."""
        if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
            raise HTTPException(415, "Send the token by the form.")
        body = (await _body(request, 1024)).decode(errors="replace")
        given = parse_qs(body, max_num_fields=2).get("token", [""])[0]
        if self.secret is None or not self._same(given):
            await asyncio.sleep(1.0)
            return _asset("token.html", 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(_COOKIE, self._mark(), max_age=30 * 86400, httponly=True, samesite="strict",
                          secure=request.url.scheme == "https")
        return answer

    async def page(self, request: Request) -> Response:
        """The page."""
        return _asset("page.html")

    def asset(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        """A file of the page."""
        async def given(request: Request) -> Response:
            return _asset(name)
        return given

    async def state(self, request: Request) -> Response:
        """The state, at present or ``?at=`` a time."""
        when = _number(request, "at", None)
        return JSONResponse(await run_in_threadpool(self.site.state, when))

    async def mesh(self, request: Request) -> Response:
        """The mesh of the map."""
        return JSONResponse(await run_in_threadpool(self.site.mesh))

    async def map(self, request: Request) -> Response:
        """The map of a reading, by ``?reading=`` its number."""
        number = _number(request, "reading", None)
        if number is None or number != int(number) or not 0 < number < 2**53:
            raise HTTPException(422, "Give the number of a reading: ?reading=1.")
        found = await run_in_threadpool(self.site.map, int(number))
        if found is None:
            raise HTTPException(404, "There is no map of this reading.")
        return JSONResponse(found)

    async def series(self, request: Request) -> Response:
        """Quantities ``?from=`` a time ``&to=`` another."""
        start, stop = _number(request, "from", 0.0), _number(request, "to", 1e11)
        assert start is not None and stop is not None
        return JSONResponse(await run_in_threadpool(self.site.series, start, stop))

    async def add(self, request: Request) -> Response:
        """Keep a reading; the answer comes when it is on the disk."""
        reading = reading_of(await _json(request), self.site.bundle.names)
        outcome = await run_in_threadpool(self.site.add, reading)
        if outcome == "other":
            raise HTTPException(409, "There are other values of that time.")
        return JSONResponse({"kept": True}, 201 if outcome == "new" else 200)

    async def acknowledge(self, request: Request) -> Response:
        """Note who has seen an alarm."""
        given, text = await _json(request), request.path_params["number"]
        name = given.get("name") if isinstance(given, dict) and set(given) == {"name"} else None
        if not isinstance(name, str) or not name.strip() or len(name) > _NAME or not name.isprintable():
            raise HTTPException(422, f'Give {{"name": ...}} of at most {_NAME} characters.')
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
        done = await run_in_threadpool(self.site.history.acknowledge, number, name.strip())
        if done is None:
            raise HTTPException(404, "There is no such alarm.")
        if not done:
            raise HTTPException(409, "Somebody has acknowledged it before.")
        return JSONResponse({"acknowledged": True})

    async def report(self, request: Request) -> Response:
        """The report of the last reading, or ``?at=`` a time."""
        when = _number(request, "at", None)
        text = await run_in_threadpool(report_of, self.site, when)
        if text is None:
            raise HTTPException(404, "There is no reading so early.")
        name = datetime.fromtimestamp(when).strftime("-%Y%m%d-%H%M%S") if when else ""
        return HTMLResponse(text, headers={"Content-Security-Policy": _REPORT_POLICY,
                                           "Content-Disposition": f'inline; filename="report{name}.html"'})


def _asset(name: str, status: int = 200) -> Response:
    return Response((_ASSETS / name).read_bytes(), status, media_type=_KINDS[name])


def _number(request: Request, name: str, default: float | None) -> float | None:
    """A finite number of seconds from the query."""
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(text) if len(text) < 40 else float("nan")
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1e11:
        raise HTTPException(422, f"{name} is no time in seconds since 1970.")
    return value


async def _json(request: Request) -> Any:
    """The JSON body of a request."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Send JSON: Content-Type: application/json.")
    return json_of(await _body(request, _BODY))


async def _body(request: Request, most: int) -> bytes:
    """The body of a request, no larger than so many bytes and in time."""
    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise HTTPException(413, f"The body is larger than {most // 1024} KiB.")
            parts.append(part)
        return b"".join(parts)
    try:
        return await asyncio.wait_for(read(), _WAIT)
    except TimeoutError as error:
        raise HTTPException(408, "The body did not come in time.") from error


async def _told(request: Request, error: Exception) -> Response:
    """An error as a sentence; what is inside stays in the log."""
    if isinstance(error, HTTPException):
        # Those that Starlette raises itself are no sentences.
        words = error.detail if error.detail.endswith(".") else _OWN.get(error.status_code, "This cannot be answered.")
        return JSONResponse({"error": words}, error.status_code, error.headers)
    if isinstance(error, DataError):
        return JSONResponse({"error": str(error)}, 422)
    if isinstance(error, ClientDisconnect):
        return JSONResponse({"error": "The body did not come."}, 400)
    _LOG.error("A request fails.", exc_info=error)
    if isinstance(error, sqlite3.Error):
        return JSONResponse({"error": "The history cannot be written: send it again later."}, 503)
    return JSONResponse({"error": "The monitor fails at this; its log says why."}, 500)
