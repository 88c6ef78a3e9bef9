"""Where a server of the model listens, and where it is asked. Standard library only."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from stages.run.errors import InputError

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*", re.ASCII)


def check_host(text: str) -> None:
    """Raise InputError unless `text` is an IP address or the name of a host."""
    if _address(text) is None and (len(text) > 253 or not _HOST_NAME.fullmatch(text)):
        raise InputError(
            f"{text[:60]!r} is no address to listen on. Write 127.0.0.1, 0.0.0.0 or another IP "
            "address of this machine."
        )


def check_url(text: str) -> None:
    """Raise InputError unless `text` is http(s)://HOST[:PORT][/PATH], or empty."""
    try:
        parts = urlsplit(text)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        whole = False
    if text and "@" in text:  # do not print what may be a password
        raise InputError(
            "a URL holds no password. Write http://HOST:8000, and export VLLM_API_KEY."
        )
    if text and (not whole or re.search(r"[\s?#]", text) or not text.isascii()):
        raise InputError(f"{text[:60]!r} is no server. Write http://HOST:8000.")


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches `host`."""
    address = _address(host or "")
    return host == "localhost" if address is None else address.is_loopback


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
