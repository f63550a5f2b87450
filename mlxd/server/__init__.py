"""The ASGI server: bytes to ASGI 3 and back, on uvloop and httptools.

It knows nothing of models, APIs or JSON requests: the application is a callable, and the only bodies written
here are the few errors that end a connection before, or instead of, the application's answer.
"""

from mlxd.server.lifespan import StartupFailed
from mlxd.server.server import Server, serve

__all__ = ["Server", "StartupFailed", "serve"]
