"""Whether requests go through a proxy of the environment (``HTTP_PROXY`` and the like)."""

from ipaddress import ip_address
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, which no proxy reaches.

    Args:
        host: a name or an IP address.
    Returns:
        True for ``localhost`` and addresses such as 127.0.0.1.
    """
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def proxy_of(url: str) -> str | None:
    """The proxy that requests to an address go through.

    Args:
        url: http:// or https://.
    Returns:
        The proxy's address; None where requests go there directly.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")
