"""From path and method to a handler.

It does not know HTTP beyond these two, nor what the handlers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from mlxd.errors import MethodNotAllowedError, NotFoundError

H = TypeVar("H")


@dataclass(frozen=True, slots=True)
class Match(Generic[H]):
    """The handlers of a path by method, the path as added, and what stood in the place of its parameter."""

    handlers: Mapping[str, H]
    route: str
    param: str

    @property
    def allow(self) -> str:
        """The Allow header: the methods that the path takes."""
        methods = set(self.handlers) | {"OPTIONS"}
        if "GET" in methods:
            methods.add("HEAD")
        return ", ".join(sorted(methods))

    def handler(self, method: str) -> H:
        """The handler of `method`; HEAD is a GET whose body is not sent.

        Raises:
            MethodNotAllowedError: the path does not take it.
        """
        found = self.handlers.get("GET" if method == "HEAD" else method)
        if found is None:
            raise MethodNotAllowedError(f"this path takes {self.allow}, not {method}", allow=self.allow)
        return found


class Router(Generic[H]):
    """Fixed paths, and paths with one parameter, which may contain slashes (`/v1/models/{id}`)."""

    __slots__ = ("_fixed", "_open")

    def __init__(self) -> None:
        self._fixed: dict[str, dict[str, H]] = {}
        self._open: dict[str, tuple[str, str, dict[str, H]]] = {}
        """by path as added: what stands before and after its parameter"""

    def add(self, method: str, path: str, handler: H) -> None:
        """`path` may hold one `{name}`. Of several open paths that fit, the one added first wins."""
        prefix, brace, rest = path.partition("{")
        if brace:
            suffix = rest.partition("}")[2]
            self._open.setdefault(path, (prefix, suffix, {}))[2][method] = handler
        else:
            self._fixed.setdefault(path, {})[method] = handler

    def match(self, path: str) -> Match[H]:
        """The route of `path`; one trailing slash is forgiven.

        Raises:
            NotFoundError: there is none.
        """
        for route in (path, path.removesuffix("/")):
            handlers = self._fixed.get(route)
            if handlers is not None:
                return Match(handlers, route, "")
        for route, (prefix, suffix, handlers) in self._open.items():
            param = path[len(prefix) : len(path) - len(suffix)]
            if param and path.startswith(prefix) and path.endswith(suffix):
                return Match(handlers, route, param)
        raise NotFoundError(f"no such path: {path[:200]}")
