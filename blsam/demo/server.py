"""The demo's HTTP interface: a file in, then json and pictures. Every request names its photo, keep ratio and prompts.

    POST api/photos                     the file as body      -> id, width, height in pixels, note on how it was read
    GET  api/photos/ID/preview                                -> JPEG
    POST api/photos/ID/encode           keep_ratio            -> seconds, runtime
    POST api/photos/ID/masks            ... points, box       -> masks (score, overlay as base64 PNG), times
    POST api/photos/ID/everything       keep_ratio            -> count, overlay
    GET  api/photos/ID/routing?keep_ratio=&stage=             -> JPEG
    POST api/photos/ID/export/KIND      ... candidate, name   -> mask.png, cutout.png, coco.json, everything.json

What cannot be done is {"error": one line} with a status of 400 or above.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image
from starlette.concurrency import run_in_threadpool

from . import exports
from .photos import MAX_BYTES, Photo, Refused, decode_pixels
from .segmenter import Prompt, Segmenter

STATIC = Path(__file__).with_name("static")
MAX_JSON = 2**20
MAX_UPLOADS, UPLOAD_SECONDS = 8, 60  # files that are read at once, and how long one may take
# The page runs what this server sends and asks nobody else; Gradio's own scripts are inline and evaluate templates.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'self'"
)


def api(segmenter: Segmenter) -> FastAPI:
    """The interface above as an application of its own; blocking work runs on the thread pool."""
    app = FastAPI(title="blsam demo", docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/canvas", StaticFiles(directory=STATIC))  # Gradio has its own /static
    app.add_middleware(LimitBody)
    app.add_middleware(StayHere)
    uploads = asyncio.Semaphore(MAX_UPLOADS)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return JSONResponse({"error": str(error)}, error.status)

    @app.post("/api/photos")
    async def add(request: Request) -> dict[str, Any]:
        async with uploads:
            try:
                data = await asyncio.wait_for(request.body(), UPLOAD_SECONDS)
            except asyncio.TimeoutError:  # Python 3.10 has another TimeoutError
                raise Refused("The upload took too long.", 408) from None
            photo = await run_in_threadpool(segmenter.add, data)
        return {"id": photo.id, "width": photo.size[1], "height": photo.size[0], "note": photo.note}

    @app.get("/api/photos/{id}/preview")
    def preview(id: str) -> Response:
        return Response(segmenter.photo(id).preview, media_type="image/jpeg")

    @app.get("/api/photos/{id}/routing")
    def routing(id: str, keep_ratio: str, stage: str = "") -> Response:
        photo = segmenter.photo(id)
        found = segmenter.encode(photo, checked_ratio(keep_ratio)).encoded.routing
        if not found.stages:
            raise Refused("An exact model has no routing: every token runs through every block.")
        if stage and stage not in map(str, range(len(found.stages))):
            raise Refused(f"stage must be 0 to {len(found.stages) - 1}, or left out")
        pixels = np.asarray(Image.open(BytesIO(photo.preview)))
        number = int(stage) if stage else None
        picture = exports.routing_picture(pixels, found, photo.resized.shape[:2], number)
        return Response(picture, media_type="image/jpeg")

    @app.post("/api/photos/{id}/{action:path}")
    async def act(id: str, action: str, request: Request) -> Response:
        wanted = parse_json(await request.body())
        answer = ACTIONS.get(action)
        if answer is None:
            raise Refused(f"there is no {action!r} here", 404)
        return await run_in_threadpool(answer, segmenter, segmenter.photo(id), wanted)

    return app


# --- what a photo can be asked for -----------------------------------------------------------------------------------


def encode(segmenter: Segmenter, photo: Photo, wanted: dict[str, Any]) -> Response:
    encoding = segmenter.encode(photo, checked_ratio(wanted.get("keep_ratio")))
    return JSONResponse({"seconds": encoding.seconds, "runtime": encoding.runtime})


def masks(segmenter: Segmenter, photo: Photo, wanted: dict[str, Any]) -> Response:
    start = time.perf_counter()
    found = segmenter.masks(photo, *_click(photo, wanted))
    overlays = [base64.b64encode(exports.mask_overlay(mask)).decode() for mask in found.masks]
    seconds = {"encoder": found.encoder, "decoder": found.decoder, "request": time.perf_counter() - start}
    rows = [{"score": float(score), "overlay": overlay} for score, overlay in zip(found.scores, overlays)]
    return JSONResponse({"masks": rows, "seconds": seconds})


def everything(segmenter: Segmenter, photo: Photo, wanted: dict[str, Any]) -> Response:
    records = segmenter.everything(photo, checked_ratio(wanted.get("keep_ratio")))
    overlay = exports.everything_overlay(records, photo.preview_size)
    return JSONResponse({"count": len(records), "overlay": base64.b64encode(overlay).decode()})


MAX_EXPORTS = 8  # files that are made or wait to be; more visitors are told to come back
_exports = ThreadPoolExecutor(1, thread_name_prefix="exports")
_exports_waiting = threading.BoundedSemaphore(MAX_EXPORTS)


def one_at_a_time(answer: Callable[..., Response]) -> Callable[..., Response]:
    """Make files on one thread: 40 megapixels take several hundred MB, which the next file then uses again."""

    @functools.wraps(answer)
    def queued(*args: Any) -> Response:
        if not _exports_waiting.acquire(blocking=False):
            raise Refused(f"{MAX_EXPORTS} other files are being made; try again.", 503)
        try:
            return _exports.submit(answer, *args).result()
        finally:
            _exports_waiting.release()

    return queued


@one_at_a_time
def export_mask(segmenter: Segmenter, photo: Photo, wanted: dict[str, Any]) -> Response:
    mask, _ = segmenter.full_mask(photo, *_click(photo, wanted), _candidate(wanted))
    return Response(exports.png(mask * np.uint8(255)), media_type="image/png")


@one_at_a_time
def export_cut_out(segmenter: Segmenter, photo: Photo, wanted: dict[str, Any]) -> Response:
    mask, _ = segmenter.full_mask(photo, *_click(photo, wanted), _candidate(wanted))
    return Response(exports.cut_out(decode_pixels(photo.data), mask), media_type="image/png")


@one_at_a_time
def export_coco(segmenter: Segmenter, photo: Photo, wanted: dict[str, Any]) -> Response:
    found = [segmenter.full_mask(photo, *_click(photo, wanted), _candidate(wanted))]
    return Response(exports.coco_file(found, _name(wanted), photo.size), media_type="application/json")


@one_at_a_time
def export_everything(segmenter: Segmenter, photo: Photo, wanted: dict[str, Any]) -> Response:
    found = segmenter.full_everything(photo, checked_ratio(wanted.get("keep_ratio")))
    return Response(exports.coco_file(found, _name(wanted), photo.size), media_type="application/json")


ACTIONS: dict[str, Callable[[Segmenter, Photo, dict[str, Any]], Response]] = {
    "encode": encode,
    "masks": masks,
    "everything": everything,
    "export/mask.png": export_mask,
    "export/cutout.png": export_cut_out,
    "export/coco.json": export_coco,
    "export/everything.json": export_everything,
}


# --- what comes over the wire ----------------------------------------------------------------------------------------


def parse_json(body: bytes) -> dict[str, Any]:
    """The body of a request; Refused unless it is a json object."""
    try:
        wanted = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("the request must be json") from None
    if not isinstance(wanted, dict):
        raise Refused("the request must be a json object")
    return wanted


def checked_ratio(value: Any) -> float:
    """A keep ratio, above 0 and at most 1, in hundredths, so that one photo has at most a hundred encodings."""
    try:
        ratio = round(float(value), 2)
    except (TypeError, ValueError, OverflowError):
        ratio = math.nan
    if not 0.01 <= ratio <= 1:
        raise Refused("keep_ratio must lie between 0.01 and 1")
    return ratio


def _click(photo: Photo, wanted: dict[str, Any]) -> tuple[float, Prompt]:
    prompt = Prompt.parse(wanted.get("points", []), wanted.get("box"), photo.size)
    return checked_ratio(wanted.get("keep_ratio")), prompt


def _candidate(wanted: dict[str, Any]) -> int:
    candidate = wanted.get("candidate")
    if type(candidate) is not int:
        raise Refused("candidate must be 0, 1 or 2")
    return candidate


def _name(wanted: dict[str, Any]) -> str:
    name = wanted.get("name", "photo")
    if not isinstance(name, str):
        raise Refused("name must be text")
    return name[:255]


class LimitBody:
    """ASGI middleware: a body above the limit of its path is answered with 413 as soon as that is known."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_upload = scope["path"].rstrip("/") == "/api/photos"
        limit = MAX_BYTES if is_upload else MAX_JSON
        what = "The file" if is_upload else "The request"
        too_large = JSONResponse({"error": f"{what} is larger than {limit >> 20} MB."}, 413)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            await too_large(scope, receive, send)
            return
        seen = 0

        async def counted() -> dict[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:  # sent in chunks, without a length
                raise Refused(f"{what} is larger than {limit >> 20} MB.", 413)
            return message

        await self.app(scope, counted, send)


class StayHere:
    """ASGI middleware: every answer tells the browser to load nothing from anywhere else."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        async def with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *policy]}
            await send(message)

        await self.app(scope, receive, with_policy)
