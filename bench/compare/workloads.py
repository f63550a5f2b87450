"""What is asked of every server: chats, agents with a long common prompt, ragged lengths, an open loop.

It does not know servers. Every request is a function of (seed, index), so that all servers get the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.serve.workload import Lengths, Workload

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": key} for key in keys},
                "required": list(keys),
            },
        },
    }
    for name, description, keys in (
        ("read_file", "Read a file of the workspace.", ("path",)),
        ("write_file", "Write a file of the workspace.", ("path", "content")),
        ("search", "Search the workspace for a pattern.", ("pattern", "folder")),
        ("run", "Run a command and give what it prints.", ("command",)),
    )
]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A workload and its pace: `clients` at a time (closed loop), or `rate` requests a second (open loop)."""

    name: str
    workload: Workload
    num_requests: int
    clients: int = 0
    rate: float = 0.0


def scenarios(
    *, clients: list[int], output_tokens: int, requests_per_client: int, rate: float, seed: int
) -> list[Scenario]:
    """The whole comparison: chat at each number of clients; the others at the largest."""

    def workload(prompt: Lengths, output: Lengths, **more: Any) -> Workload:
        return Workload(seed=seed, prompt_tokens=prompt, output_tokens=output, **more)

    fixed = Lengths("fixed", output_tokens)
    chat = workload(Lengths("fixed", 64), fixed)
    many = max(clients)
    some = min(8, many)
    ragged = workload(
        Lengths("lognormal", 64, 1024, 1.0), Lengths("lognormal", output_tokens, 4 * output_tokens, 0.6)
    )
    agent = workload(Lengths("fixed", 1200), fixed, shared_prefix=0.9, body={"tools": TOOLS})
    return [
        *(Scenario(f"chat, {n} clients", chat, n * requests_per_client, clients=n) for n in clients),
        Scenario(f"ragged, {many} clients", ragged, many * requests_per_client, clients=many),
        Scenario(f"agent, {some} clients", agent, some * requests_per_client, clients=some),
        Scenario(f"chat, {rate:g} a second", chat, many * requests_per_client, rate=rate),
    ]
