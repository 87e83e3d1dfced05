"""netgloss serve: only this machine, only pictures, and the answer that the saved explainer gives."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import netgloss
from netgloss.errors import UserError
from netgloss.runs.run import Run
from netgloss.workflows.serve import MAX_BYTES, Server, UploadExplainer, make_server

BYTES = {"Content-Type": "application/octet-stream"}


def png(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "orange").save(buffer, "PNG")
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it unpacks to ``width * height`` grey pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(200)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("serve") / "run"
    plain = netgloss.EvaluationOptions(untrained_images=0)
    return netgloss.explain(
        "nmf", "critters", "block5", "critters:40", out=out, num_concepts=6, seeds=1, evaluation=plain
    )


@pytest.fixture(scope="module")
def server(run: Run) -> Iterator[Server]:
    with make_server(run, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: Server, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, body=body, headers=headers or {})
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def raw(server: Server, *lines: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and answer of a request that is sent byte for byte."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as line:
        line.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        line.shutdown(socket.SHUT_WR)
        parts = []
        while part := line.recv(65536):
            parts.append(part)
    answer = b"".join(parts)
    return int(answer.split(b" ", 2)[1]), answer


def test_the_report_with_one_more_page(server: Server, run: Run) -> None:
    status, headers, body = ask(server, "GET", "/")
    assert status == 200
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert b"connect-src 'self'" in body
    assert b'href="#/try"' in body
    sent_around = (run.path / "report.html").read_bytes()
    assert b"connect-src" not in sent_around
    assert b"fetch(" not in sent_around
    assert ask(server, "HEAD", "/")[2] == b""


def test_an_upload_gets_the_answer_of_show(server: Server, run: Run, tmp_path: Path) -> None:
    picture = netgloss.open_images("critters:4,seed=9").image(2)
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(buffer, "PNG")
    status, _, body = ask(server, "POST", "/explain", buffer.getvalue(), BYTES)
    assert status == 200
    answer = json.loads(body)
    (tmp_path / "one.png").write_bytes(buffer.getvalue())
    netgloss.show(run, tmp_path / "one.png", out=tmp_path / "shown")
    shown = json.loads((tmp_path / "shown/one.json").read_text())
    why = answer["image"]["explained"]
    assert answer["image"]["prediction"] == shown["prediction"]
    assert answer["image"]["probability"] == pytest.approx(shown["probability"], rel=1e-3)
    contributions = {f"concept {d['concept']}": d["contribution"] for d in why["drivers"]}
    for name, value in contributions.items():
        assert value == pytest.approx(shown["contributions"][name], rel=1e-3, abs=1e-3)
    total = why["base"] + why["gap"] + sum(contributions.values()) + why["others"]
    assert total == pytest.approx(shown["logit"], abs=2e-3)
    assert json.loads(base64.b64decode(answer["numbers"]))["logit"] == pytest.approx(shown["logit"], rel=1e-4)
    for name in ("picture", "figure"):
        assert Image.open(io.BytesIO(base64.b64decode(answer[name]))).format == "PNG"
    rows, columns, packed, *_ = why["drivers"][0]["map"]
    assert (rows, columns, len(base64.b64decode(packed))) == (8, 8, 64)


def test_maps_of_an_upload_are_on_the_scale_of_the_galleries(run: Run) -> None:
    scale = UploadExplainer(run, device="cpu").ranges[0]
    drawn = run.concepts["concepts"][0]["gallery"][0]["map"]
    assert (scale.low, scale.high) == (drawn["low"], drawn["high"])
    record = scale.encode(np.full((8, 8), scale.contour))
    assert record is not None
    assert record["threshold"] == drawn["threshold"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "empty"),
        (b"#!/bin/sh\nrm -rf /", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "not a picture"),
        (b"\x80\x04\x95cposix\nsystem\n", "not a picture"),
        (png()[:60], "unreadable image upload"),
        (bomb(60_000, 60_000), "pixels"),
        (bomb(9_000, 9_000), "at most 50,000,000"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not a picture"),
    ],
    ids=["empty", "script", "svg", "pickle", "truncated", "bomb", "large", "postscript"],
)
def test_what_is_no_picture_is_told_in_one_line(server: Server, body: bytes, told: str) -> None:
    status, _, answer = ask(server, "POST", "/explain", body, BYTES)
    assert status == 422
    error = json.loads(answer)["error"]
    assert told in error
    assert "\n" not in error


def test_odd_pictures_are_explained(server: Server) -> None:
    for picture in (png(1, 1), png(3000, 2)):
        status, _, body = ask(server, "POST", "/explain", picture, BYTES)
        assert (status, json.loads(body)["image"]["label"]) == (200, None)


def test_a_body_too_long_is_refused_before_it_is_read(server: Server) -> None:
    start = (
        "POST /explain HTTP/1.1",
        f"Host: 127.0.0.1:{server.server_port}",
        f"Content-Type: {BYTES['Content-Type']}",
    )
    for length, status in ((str(MAX_BYTES + 1), 413), ("9" * 12, 413), ("-1", 411), ("1_0", 411), ("²", 411)):
        assert raw(server, *start, f"Content-Length: {length}")[0] == status, length
    assert raw(server, *start)[0] == 411
    assert raw(server, *start, "Content-Length: 5", "Content-Length: 3", body=b"abcde")[0] == 411
    assert raw(server, *start, "Transfer-Encoding: chunked", "Content-Length: 3", body=b"0\r\n")[0] == 411
    assert raw(server, *start, "Content-Length: 500", body=b"only this")[0] == 400


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "10.0.0.1:{port}"]
)
def test_another_host_name_is_refused(server: Server, host: str) -> None:
    status, answer = raw(server, "GET / HTTP/1.1", f"Host: {host.format(port=server.server_port)}")
    assert status == 421
    assert b"<html" not in answer
    assert raw(server, "GET / HTTP/1.1")[0] == 421


def test_other_pages_may_not_post(server: Server) -> None:
    own = f"http://127.0.0.1:{server.server_port}"
    for headers, status in (
        ({"Origin": "http://evil.example", **BYTES}, 403),
        ({"Origin": "null", **BYTES}, 403),
        ({"Sec-Fetch-Site": "cross-site", **BYTES}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Origin": own, "Sec-Fetch-Site": "same-origin", **BYTES}, 200),
    ):
        assert ask(server, "POST", "/explain", png(), headers)[0] == status, headers


@pytest.mark.parametrize(
    "path",
    [
        "/run.json",
        "/../run.json",
        "/..%2frun.json",
        "//etc/passwd",
        "/explain",
        "/images/0.jpg",
        "http://evil/",
        "/%00",
    ],
)
def test_no_path_reaches_a_file(server: Server, path: str) -> None:
    status, answer = raw(server, f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{server.server_port}")
    assert status == 404
    assert b"format_version" not in answer
    assert b"root:" not in answer
    assert ask(server, "POST", "/", png(), BYTES)[0] == 404
    assert ask(server, "PUT", "/explain", png())[0] == 501


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", "", "127.0.0.1.evil.example"])
def test_it_listens_on_this_machine_only(host: str) -> None:
    with pytest.raises(UserError, match="this machine only"):
        Server("", lambda data: {}, host=host, port=0)


def test_ports(server: Server) -> None:
    with pytest.raises(UserError, match=f"port {server.server_port} .*--port"):
        Server("", lambda data: {}, port=server.server_port)
    with pytest.raises(UserError, match="from 0 to 65535"):
        Server("", lambda data: {}, port=70000)
    with Server("", lambda data: {}, host="localhost", port=0) as local:
        assert local.address.startswith("http://127.0.0.1:")


def test_an_unfinished_run_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text((run.path / "run.json").read_text())
    with pytest.raises(UserError, match=r"explainer\.safetensors|not finished"):
        make_server(Run(tmp_path), port=0)


def test_a_failure_inside_is_one_line() -> None:
    def fail(data: bytes) -> dict[str, Any]:
        raise RuntimeError("first line\nsecond line")

    with Server("", fail, port=0) as broken:
        threading.Thread(target=broken.serve_forever, daemon=True).start()
        status, _, body = ask(broken, "POST", "/explain", png(), BYTES)
        broken.shutdown()
    assert (status, json.loads(body)["error"]) == (500, "RuntimeError: first line")
