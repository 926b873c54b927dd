"""The Gradio page around our canvas, and the server that shows it. Nothing is asked of any other machine."""

from __future__ import annotations

import json
import os
import socket
from html import escape
from string import Template
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI, Response  # noqa: E402
from skimage import data  # noqa: E402

from ..images import encode_image  # noqa: E402
from .photos import MAX_BYTES, MAX_PIXELS, Refused  # noqa: E402
from .segmenter import Segmenter  # noqa: E402
from .server import STATIC, api  # noqa: E402

EXAMPLES = {"coffee": data.coffee, "astronaut": data.astronaut, "cat": data.chelsea, "rocket": data.rocket}
HEAD = """
<link rel="stylesheet" href="canvas/page.css">
<link rel="icon" href="canvas/icon.svg">
<script type="module" src="canvas/app.js"></script>
"""
KEYS = """
| key, with the photo in focus | what it does |
|---|---|
| arrows (with Shift: finer) | move the cross |
| Enter, Space | add the point under the cross |
| Shift + Enter, R | take away the point under the cross |
| B, then B again | one corner of a box, then the other |
| Z or Backspace, Escape | undo, clear |
| 1, 2, 3 | choose a candidate |
"""


def build_app(segmenter: Segmenter, model: str, keep_ratio: float) -> FastAPI:
    """The page at "/", the interface of `server` beside it."""
    app = api(segmenter)
    pictures = {name: encode_image(read(), "JPEG", quality=92) for name, read in EXAMPLES.items()}

    @app.get("/api/examples/{name}.jpg")
    def example(name: str) -> Response:
        if name not in pictures:
            raise Refused(f"there is no example {name!r}", 404)
        return Response(pictures[name], media_type="image/jpeg")

    # none to download
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.mount_gradio_app(
        app,
        _blocks(_config(segmenter, model, keep_ratio)),
        path="/",
        theme=gr.themes.Base(**fonts),
        head=HEAD,
        footer_links=[],
        ssr_mode=False,
        max_file_size=1,  # of Gradio's own upload, which the page has no use for
    )


def _config(segmenter: Segmenter, model: str, keep_ratio: float) -> dict[str, Any]:
    """What the scripts in the page must know of the model and the limits."""
    encoder = segmenter.sam.image_encoder
    return {
        "model": model,
        "keep_ratio": keep_ratio,
        "layers": list(encoder.config.predictor_layers),  # empty: an exact model
        "image_size": encoder.img_size,
        "dtype": str(encoder.patch_embed.proj.weight.dtype).removeprefix("torch."),
        "max_bytes": MAX_BYTES,
        "examples": list(EXAMPLES),
    }


def _blocks(config: dict[str, Any]) -> gr.Blocks:
    canvas = Template((STATIC / "page.html").read_text(encoding="utf-8"))
    limits = f"{MAX_BYTES >> 20} MB, {MAX_PIXELS // 10**6} megapixels"
    with gr.Blocks(title="blsam", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            canvas.substitute(config=escape(json.dumps(config)), limits=limits, **config),
            html_template="${value}",
            js_on_load=None,
            apply_default_css=False,
        )
        with gr.Accordion("Keyboard", open=False, elem_classes="blsam-more"):
            gr.Markdown(KEYS)
    return page


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens, before any model is loaded; OSError in one line when the port is taken. 0: any free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol named: asyncio sends small answers at once only then (TCP_NODELAY), 40 ms earlier
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # who comes before the server runs waits instead of being turned away
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from None
    return listener


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Until Ctrl-C."""
    host, port = listener.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(app, log_level="warning", limit_concurrency=200, timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listener])
