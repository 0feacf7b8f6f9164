"""A port that is a test's own before anybody listens on it, and between two who do."""

import socket


def held_port() -> socket.socket:
    """Bound on loopback and not listened on: as long as it is open the kernel gives the port to nobody who asks for
    any, and a server that names it may still take it (both say SO_REUSEADDR)."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
