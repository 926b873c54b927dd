"""The page and its command, without a browser."""

import io
import socket
import sys

import pytest
from PIL import Image

from blsam.cli import main

pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'blsam[demo]'")

from fastapi.testclient import TestClient  # noqa: E402


def test_the_page_is_built_without_a_look_at_the_network(shared, monkeypatch):
    from blsam.demo import page

    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: pytest.fail(f"asked for {host}"))
    client = TestClient(page.build_app(shared, "blsam_vit_t", 0.25))
    answer = client.get("/")
    assert answer.status_code == 200 and "canvas/app.js" in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert client.get("/canvas/app.js").status_code == 200
    assert Image.open(io.BytesIO(client.get("/api/examples/coffee.jpg").content)).size == (600, 400)
    assert client.get("/api/examples/none.jpg").status_code == 404
    files = {"files": ("a.txt", b"x" * 1000)}  # Gradio's own door is shut
    assert client.post("/gradio_api/upload", files=files).status_code == 413


def test_the_command_says_what_is_wrong(capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["demo", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --port" in capsys.readouterr().err
    assert main(["demo", "--model", "vit_b"]) == 2 and "no weights ship" in capsys.readouterr().err
    assert main(["demo", "--keep-ratio", "0"]) == 2 and "keep ratio" in capsys.readouterr().err
    import blsam.demo

    monkeypatch.delattr(blsam.demo, "page", raising=False)
    monkeypatch.setitem(sys.modules, "blsam.demo.page", None)  # as where gradio is not installed
    assert main(["demo"]) == 2 and "pip install 'blsam[demo]'" in capsys.readouterr().err
