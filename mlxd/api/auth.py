"""Who may ask: API keys, and how a request shows one.

It does not know what the holder of a key may do.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlxd.api.http import HTTPRequest
from mlxd.config import ApiKeyConfig
from mlxd.errors import AuthenticationError, ConfigError


class ApiKeys:
    """The accepted keys, each with a name. Without keys everybody is let in."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Sequence[tuple[str, bytes]]) -> None:
        self._keys = tuple(keys)

    @classmethod
    def load(cls, configs: Sequence[ApiKeyConfig], environ: Mapping[str, str]) -> ApiKeys:
        """Read the secrets from where each entry of `limits.api_keys` says.

        Raises:
            ConfigError: a key that is nowhere, unreadable or empty.
        """
        return cls(
            [
                (config.name, _secret(config, f"limits.api_keys[{i}]", environ))
                for i, config in enumerate(configs)
            ]
        )

    def authenticate(self, request: HTTPRequest) -> str | None:
        """The name of the key that the request shows, as Bearer token or x-api-key; None when none is needed.

        Raises:
            AuthenticationError: no key, or a wrong one.
        """
        if not self._keys:
            return None
        shown = _shown_key(request)
        if shown is None:
            raise AuthenticationError(
                "no API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`",
                headers={"www-authenticate": "Bearer"},
            )
        # All keys are compared, each in constant time, so that the answer's timing says nothing.
        names = [name for name, key in self._keys if hmac.compare_digest(shown, key)]
        if not names:
            raise AuthenticationError("the API key is wrong", headers={"www-authenticate": "Bearer"})
        return names[0]


def _shown_key(request: HTTPRequest) -> bytes | None:
    authorization = request.header(b"authorization")
    if authorization is not None:
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() == b"bearer":
            return token.strip()
    return request.header(b"x-api-key")


def _secret(config: ApiKeyConfig, where: str, environ: Mapping[str, str]) -> bytes:
    sources = [source for source in (config.key, config.key_file, config.key_env) if source is not None]
    if len(sources) != 1:
        raise ConfigError(f"{where}: set exactly one of key, key_file and key_env")
    secret = config.key
    if config.key_file is not None:
        try:
            secret = Path(config.key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}.key_file: cannot read {config.key_file}: {error}") from error
    elif config.key_env is not None:
        secret = environ.get(config.key_env)
        if secret is None:
            raise ConfigError(f"{where}.key_env: the environment has no {config.key_env}")
    if not secret:
        raise ConfigError(f"{where}: the key is empty")
    return secret.encode()
