"""The last requests that ended, for whoever asks how one of them fared.

It does not know HTTP; what it keeps of a prompt is what its report does.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass

from mlxd.engine.prefix_report import PrefixReport

MAX_ENDED = 512

_CHOICES = re.compile("(-[0-9]+)*")


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """A sequence that is over. `figures` are those of /v1/status, `prefix` is None if it never ran."""

    request_id: str
    client: str
    figures: dict[str, object]
    prefix: PrefixReport | None
    also_known_as: str = ""


class RequestLog:
    """The last MAX_ENDED of them."""

    def __init__(self) -> None:
        self._ended: OrderedDict[str, EndedRequest] = OrderedDict()

    def add(self, ended: EndedRequest) -> None:
        self._ended[ended.request_id] = ended
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def find(self, request_id: str, client: str | None) -> list[EndedRequest]:
        """Those of `request_id`, by either of its ids, and its choices `request_id-…`, in the order of their
        end; of `client`, or anybody's."""
        return [
            ended
            for key, ended in self._ended.items()
            if is_of(key, request_id, ended.also_known_as) and client in (None, ended.client)
        ]


def is_of(key: str, request_id: str, also_known_as: str = "") -> bool:
    """Whether a sequence's id `key` is that of request `request_id` or of one of its choices, or the other id
    of its request is `request_id`.

    Only numbers make a choice's id of a request's: `chatcmpl` is not every chat's.
    """
    if also_known_as and also_known_as == request_id:
        return True
    return key.startswith(request_id) and _CHOICES.fullmatch(key, len(request_id)) is not None
