"""Downloads: weights that the user named are fetched; without a network this ends soon, with one line."""

from __future__ import annotations

import contextlib
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

from netgloss.errors import UserError


@contextlib.contextmanager
def downloading(name: str, advice: str = "pass --checkpoint FILE or --random-weights") -> Iterator[None]:
    """What is published under ``name`` is fetched inside.

    Raises
    ------
    UserError : it cannot be fetched; the line ends with ``advice``.
    """
    from huggingface_hub import constants

    patience, offline = socket.getdefaulttimeout(), constants.HF_HUB_OFFLINE
    socket.setdefaulttimeout(20)
    constants.HF_HUB_OFFLINE = offline or not _reachable(constants.ENDPOINT)
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the published weights of {name} could not be downloaded ({beginning(error)}); {advice}"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
        constants.HF_HUB_OFFLINE = offline


def beginning(error: Exception, length: int = 100) -> str:
    """The beginning of an error's text, in one line."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def _reachable(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
