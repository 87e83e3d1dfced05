"""A small local app over a run: the report's pages, and one that explains an uploaded image.

It listens on this machine only. What a stranger's web page in the same browser could try is refused: another ``Host``
than this address (DNS rebinding), a POST from another origin, a form post (the body's type must be
``application/octet-stream``, which other origins may not send unasked). Uploads carry a length, are at most
:data:`MAX_BYTES` long and :data:`MAX_PIXELS` large (read from the header, before anything is decoded), live in memory
only, and have no name. There is one address to read and one to post to; no path ever reaches the file system.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import json
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from netgloss.activations.layer import LayerReader
from netgloss.errors import UserError
from netgloss.explanations.heatmaps import recorded_ranges
from netgloss.explanations.images import explain_images
from netgloss.report import build_report
from netgloss.report.build import to_json as page_json
from netgloss.report.pack import pack_map
from netgloss.runs.files import clean, read_run
from netgloss.runs.run import Run, to_json
from netgloss.training.execution import Execution

if TYPE_CHECKING:
    from torch import Tensor

    from netgloss.explanations.heatmaps import recorded_ranges

MAX_BYTES = 20_000_000
"""Longest upload."""
MAX_PIXELS = 50_000_000
"""Largest picture that is decoded."""
_DRIVERS = 6
_SIDE = 256

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class UploadExplainer:
    """Explains pictures given as bytes, with a run's first explainer and its classifier, both loaded once.

    Raises
    ------
    UserError : the classifier cannot be loaded, or the method's concepts do not lead to logits.
    """

    def __init__(self, run: Run, *, device: str | Execution = "auto") -> None:
        self.run = run
        self.explainer = run.explainer
        if self.explainer.target == "image":
            raise UserError(f"{run.method} rebuilds images, not logits: netgloss show explains single images with it")
        classifier = run.network or run.classifier()
        classifier.require_head("explaining an upload")
        self.classifier = classifier.to(Execution.of(device).torch_device)
        self.explainer.to(self.classifier.device)
        self.reader = LayerReader(self.classifier, run.layer, self.explainer)
        self.affine = self.reader.tail.mode == "graph" and bool(run.manifest.get("tail", {}).get("affine"))
        self.ranges = recorded_ranges(read_run(run.path).concepts["concepts"])
        self._one_at_a_time = threading.Lock()

    def explain(self, data: bytes) -> dict[str, Any]:
        """``image`` as the report's page reads it; in base64 ``picture``, ``figure`` (PNG) and ``numbers`` (JSON).

        Raises
        ------
        UserError : not a picture, or one that is too large, or that the network answers with NaN or Inf.
        """
        from netgloss.data.images import image_size, open_image

        file = io.BytesIO(data)
        width, height = image_size(file, name="upload")
        if width * height > MAX_PIXELS:
            raise UserError(f"the picture has {width} x {height} pixels; at most {MAX_PIXELS:,} are read")
        image = open_image(file, name="upload")
        with self._one_at_a_time:
            return self._explain(self.classifier.preprocessing.pixels(image))

    def _explain(self, shown: Tensor) -> dict[str, Any]:
        from torchvision.transforms.v2.functional import to_pil_image

        batch = self.reader.batch(self.classifier.preprocessing.normalise(shown)[None])
        picture = shown.permute(1, 2, 0).clamp(0, 1).numpy()
        (explanation,) = explain_images(
            self.explainer,
            batch,
            self.classifier.class_names,
            drivers=_DRIVERS,
            affine=self.affine,
            pictures=[picture],
            ranges=self.ranges,
        )
        record = explanation.record(self.ranges)
        for driver in record["drivers"]:
            driver["map"] = driver["map"] and pack_map(driver["map"])
        small = to_pil_image(shown.clamp(0, 1)).convert("RGB")
        small.thumbnail((_SIDE, _SIDE))
        page = {
            "label": None,
            "prediction": explanation.prediction,
            "probability": explanation.probability,
            "split": None,
            "size": list(small.size),
            "explained": record,
        }
        return {
            "image": clean(page),
            "picture": _png(lambda out: small.save(out, "PNG")),
            "figure": _png(lambda out: explanation.figure().savefig(out, format="png", dpi=130)),
            "numbers": base64.b64encode(to_json(explanation.numbers()).encode()).decode(),
        }


def _png(write: Callable[[io.BytesIO], Any]) -> str:
    buffer = io.BytesIO()
    write(buffer)
    return base64.b64encode(buffer.getvalue()).decode()


class Server(ThreadingHTTPServer):
    """The app of one run; ``serve_forever`` runs it, ``address`` says where.

    Parameters
    ----------
    page : the report's HTML. explain : bytes of a picture -> what the page reads; may raise UserError.
    host : a loopback address. port : 0 picks a free one.

    Raises
    ------
    UserError : an address of another machine or of the network, or a port that is taken.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self, page: str, explain: Callable[[bytes], dict[str, Any]], *, host: str = "127.0.0.1", port: int = 8765
    ) -> None:
        host = "127.0.0.1" if host == "localhost" else host
        try:
            own = ipaddress.ip_address(host)
        except ValueError:
            own = None
        if own is None or not own.is_loopback:
            raise UserError(f"netgloss serve listens on this machine only (127.0.0.1 or ::1), not on {host!r}")
        if not 0 <= port < 65536:
            raise UserError(f"a port is a number from 0 to 65535, got {port}")
        self.address_family = socket.AF_INET6 if own.version == 6 else socket.AF_INET
        self.page = page.encode()
        self.explain = explain
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UserError(f"port {port} of {host} cannot be used ({error.strerror}); say another by --port") from None
        name = f"[{host}]" if own.version == 6 else host
        self.address = f"http://{name}:{self.server_port}/"
        self.hosts = {f"{n}:{self.server_port}" for n in (name, "localhost", "127.0.0.1")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error of ours; nothing is printed."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30
    server_version = "netgloss"
    sys_version = ""

    def do_GET(self) -> None:
        if self._is_ours() and self._is_at("/"):
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if not (self._is_ours() and self._is_at("/explain")):
            return
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "same-origin")
        if (origin is not None and origin.removeprefix("http://") not in self.server.hosts) or site != "same-origin":
            self._refuse(HTTPStatus.FORBIDDEN, "posts from other pages are refused")
        elif self.headers.get("Content-Type") != "application/octet-stream":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the picture's bytes as application/octet-stream")
        elif (length := self._length()) is None:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "say the upload's length")
        elif length > MAX_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_BYTES:,} bytes")
        else:
            self._explain(length)

    def _length(self) -> int | None:
        """The one Content-Length of a body that is not sent in chunks; None if that is not so."""
        lengths = self.headers.get_all("Content-Length", [])
        chunked = self.headers.get("Transfer-Encoding") is not None
        digits = len(lengths) == 1 and lengths[0].isascii() and lengths[0].isdigit()
        return int(lengths[0]) if digits and not chunked and len(lengths[0]) < 20 else None

    def _explain(self, length: int) -> None:
        data = self.rfile.read(length)
        if len(data) < length:
            self._refuse(HTTPStatus.BAD_REQUEST, "the upload broke off")
            return
        try:
            answer = self.server.explain(data)
        except UserError as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except Exception as error:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            self._answer(HTTPStatus.OK, "application/json", page_json(answer).encode())

    def _is_ours(self) -> bool:
        """False, and refused, if the request names another host: a stranger's name that points to this machine."""
        names = self.headers.get_all("Host", [])
        if len(names) == 1 and names[0].lower() in self.server.hosts:
            return True
        self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "another host name than this machine's own")
        return False

    def _is_at(self, place: str) -> bool:
        if urlsplit(self.path).path == place if self.path.startswith("/") else False:
            return True
        self._refuse(HTTPStatus.NOT_FOUND, "nothing is here")
        return False

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True
        self._answer(status, "application/json", json.dumps({"error": why}).encode())

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing is printed for a request."""


def make_server(run: Run, *, host: str = "127.0.0.1", port: int = 8765, device: str = "auto") -> Server:
    """The app of a finished run, ready for ``serve_forever()``.

    Raises
    ------
    UserError : an unfinished run, a network that cannot be loaded, an address that is not this machine's own.
    """
    explainer = UploadExplainer(run, device=device)
    return Server(build_report(run.path, served=True), explainer.explain, host=host, port=port)
