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
    """The accepted keys, each with its entry of the configuration. Without keys everybody is let in."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Sequence[tuple[ApiKeyConfig, bytes]]) -> None:
        self._keys = tuple(keys)

    @classmethod
    def load(cls, configs: Sequence[ApiKeyConfig], environ: Mapping[str, str]) -> ApiKeys:
        """Read the secrets from where each entry of `limits.api_keys` says.

        Raises:
            ConfigError: a key that is nowhere, unreadable or empty.
        """
        return cls(
            [(config, _secret(config, f"limits.api_keys[{i}]", environ)) for i, config in enumerate(configs)]
        )

    def __len__(self) -> int:
        return len(self._keys)

    def authenticate(self, request: HTTPRequest) -> ApiKeyConfig | None:
        """The key that the request shows, as Bearer token or x-api-key; None when none is needed.

        SDKs that were given two keys send both; one of them has to be right.

        Raises:
            AuthenticationError: no key, or a wrong one.
        """
        if not self._keys:
            return None
        shown = _shown_keys(request)
        if not shown:
            raise AuthenticationError(
                "no API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`",
                headers={"www-authenticate": "Bearer"},
            )
        # All keys are compared, each in constant time, so that the answer's timing says nothing.
        found = [config for key in shown for config, secret in self._keys if hmac.compare_digest(key, secret)]
        if not found:
            raise AuthenticationError("the API key is wrong", headers={"www-authenticate": "Bearer"})
        return found[0]


def _shown_keys(request: HTTPRequest) -> list[bytes]:
    shown = []
    scheme, _, token = (request.header(b"authorization") or b"").partition(b" ")
    if scheme.lower() == b"bearer":
        shown.append(token.strip())
    key = request.header(b"x-api-key")
    if key is not None:
        shown.append(key)
    return shown


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
