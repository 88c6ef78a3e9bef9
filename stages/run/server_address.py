"""Where a server of the model listens, and where it is asked. Standard library only; make imports
this at every start, and what costs milliseconds only where it is needed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from stages.run.errors import InputError

if TYPE_CHECKING:
    import ipaddress

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*", re.ASCII)


def check_host(text: str) -> None:
    """Raise InputError unless `text` is an IP address or the name of a host."""
    if (len(text) > 253 or not _HOST_NAME.fullmatch(text)) and _address(text) is None:
        raise InputError(
            f"{text[:60]!r} is no address to listen on. Write 127.0.0.1, 0.0.0.0 or another IP "
            "address of this machine."
        )


def check_url(text: str) -> None:
    """Raise InputError unless `text` is http(s)://HOST[:PORT][/PATH], or empty."""
    if not text:
        return
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        whole = False
    if "@" in text:  # do not print what may be a password
        raise InputError(
            "a URL holds no password. Write http://HOST:8000, and export VLLM_API_KEY."
        )
    if not whole or re.search(r"[\s?#]", text) or not text.isascii():
        raise InputError(f"{text[:60]!r} is no server. Write http://HOST:8000.")


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches `host`."""
    address = _address(host or "")
    return host == "localhost" if address is None else address.is_loopback


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    import ipaddress

    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
