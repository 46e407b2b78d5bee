"""Who may ask: hosts, origins, a token, sizes; and the headers of every answer."""

import hmac
import http.cookies
import ipaddress
import json
import urllib.parse
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

COOKIE = "vdit_token"
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
READING = ("GET", "HEAD")
JSON_BYTES = 2**20  # of a body, at most
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data:; media-src 'self'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}  # fmt: skip


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Answers what `app` must not see.

    hosts: names under which the page may be called (None: any, with a token). A page of another
    name, that has been pointed at this address (DNS rebinding), is refused by its Host, and
    requests of other sites' pages by their Origin. With a `token` all need it: as Authorization:
    Bearer, as a cookie, or once as /?token=, which sets the cookie. largest: path to bytes of its
    body.
    """

    def __init__(
        self, app: App, hosts: frozenset[str] | None, token: str = "",
        largest: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.app, self.hosts, self.token, self.largest = app, hosts, token, largest or {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no sockets here: the server refuses them
        headers: dict[str, str] = {}
        for key, value in scope["headers"]:
            name = key.decode("latin-1").lower()
            twice = name in headers and name in ("host", "origin", "content-length")
            headers[name] = "" if twice else value.decode("latin-1")

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                pairs = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *pairs]}
            await send(message)

        if (refused := self._refusal(scope, headers)) is not None:
            await _answer(sealed, *refused)
        elif scope["path"] == "/" and self.token and b"token=" in scope["query_string"]:
            cookie = f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict"
            more = [(b"location", b"/"), (b"set-cookie", cookie.encode())]
            await _answer(sealed, 303, "token", "accepted", more)
        else:
            await self.app(scope, receive, sealed)

    def _refusal(self, scope: Message, headers: dict[str, str]) -> tuple[int, str, str] | None:
        """Status, field and sentence for what is refused."""
        host, method = headers.get("host", ""), scope["method"]
        if self.hosts is not None and _name(host) not in self.hosts:
            return 421, "host", f"this page is called {' or '.join(sorted(self.hosts))} only"
        if method not in READING:
            origin = headers.get("origin")
            site = headers.get("sec-fetch-site", "none")
            if origin is not None and origin != f"{scope.get('scheme', 'http')}://{host}":
                return 403, "origin", "pages of other sites may not ask for anything here"
            if site not in ("none", "same-origin"):
                return 403, "origin", "pages of other sites may not ask for anything here"
            if wrong := self._body(scope, headers):
                return wrong
        if self.token and not self._has_token(scope, headers):
            return 401, "token", "a token is needed: open the address that vdit serve printed"
        return None

    def _body(self, scope: Message, headers: dict[str, str]) -> tuple[int, str, str] | None:
        most = self.largest.get(scope["path"], JSON_BYTES)
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
            return 411, "body", "its length is needed"
        if int(length[:20]) > most:
            return 413, "body", f"{int(length[:20])} bytes: at most {most} are allowed"
        return None

    def _has_token(self, scope: Message, headers: dict[str, str]) -> bool:
        given = [headers.get("authorization", "").removeprefix("Bearer ")]
        try:
            cookies = http.cookies.SimpleCookie(headers.get("cookie", ""))
        except http.cookies.CookieError:
            cookies = http.cookies.SimpleCookie()
        if COOKIE in cookies:
            given.append(cookies[COOKIE].value)
        if scope["path"] == "/":
            query = urllib.parse.parse_qs(scope["query_string"].decode("latin-1"))
            given += query.get("token", [])
        right = self.token.encode()
        return any(hmac.compare_digest(one.encode(), right) for one in given)


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


async def _answer(
    send: Send, status: int, field: str, message: str, more: list[tuple[bytes, bytes]] | None = None
) -> None:
    """A JSON answer of one sentence."""
    body = json.dumps({"errors": [{"field": field, "message": message}]}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *(more or ())]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
