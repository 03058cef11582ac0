"""The page over HTTP: what gradio may do, who may ask, and that nothing is fetched from elsewhere."""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from opensora_repro.app.studio import Studio
from opensora_repro.app.uploads import MAX_BYTES

# Of this page's own origin alone. gradio's templates are compiled in the browser, and its styles are inline.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
FETCHES = ("/file=http", "/proxy=")  # addresses under which gradio fetches from elsewhere for a browser
TITLE = "opensora-repro"


class Guard:
    """Middleware of ASGI."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and any(part in scope["path"].lower() for part in FETCHES):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        await self.app(scope, receive, with_headers)


class Server:
    """Serves from its making to its `close`."""

    def __init__(self, studio: Studio, *, host: str, port: int, auth: tuple[str, str] | None, local: bool) -> None:
        self.studio = studio
        # Read when gradio is imported: uploads lie in our folder, and nothing is told to anybody.
        cache = studio.folder / "cache"
        os.environ |= {
            "GRADIO_TEMP_DIR": str(cache), "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False",
        }  # fmt: skip
        import gradio as gr
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from opensora_repro.app.page import Page

        hosts = ["localhost", "127.0.0.1", "[::1]"] if local else ["*"]  # a name of somebody's that leads here is none
        middleware = [Middleware(Guard), Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
        fonts = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]
        code = [gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")]
        self.page = Page(studio, title=TITLE, shows_commands=local)
        self.blocks = self.page.blocks
        _, self.address, _ = self.blocks.queue(api_open=False).launch(
            server_name=host,
            server_port=port,
            auth=None if auth is None else matches(auth),
            allowed_paths=[str(studio.folder / "results")],
            max_file_size=MAX_BYTES,
            theme=gr.themes.Base(primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=code),
            css_paths=Path(__file__).with_name("templates") / "page.css",
            app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None, "openapi_url": None},
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            show_error=True,
            footer_links=[],
        )

    def close(self) -> None:
        self.studio.close()
        self.blocks.close(verbose=False)


def matches(auth: tuple[str, str]) -> Callable[[str, str], bool]:
    expected = ":".join(auth).encode()
    return lambda user, password: hmac.compare_digest(f"{user}:{password}".encode(), expected)
