"""How far log-likelihoods over HTTP are from mlx-lm's: `python -m bench.loglikelihood FOLDER --items 300`.

It does not know how either side computes. With --lm-eval PYTHON (an environment with lm-eval, which needs no
torch: `pip install "lm_eval[api]" transformers`) its local-completions asks; else the same requests are sent
from here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.loglikelihood.items import Score, ask_lm_eval, ask_mlx_lm, ask_server, encode, make_docs, pairs_of
from bench.server import ServerProcess


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the differences; 1 if one is above --tolerance."""
    parser = argparse.ArgumentParser(prog="bench.loglikelihood", description=__doc__)
    parser.add_argument("folder", type=Path, help="the model, served with default settings on the CPU")
    parser.add_argument("--items", type=int, default=300, help="documents of four choices each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lm-eval", metavar="PYTHON", default=None)
    parser.add_argument("--tolerance", type=float, default=1e-2, help="of a sum of log-probabilities")
    args = parser.parse_args(argv)
    docs = make_docs(args.items, args.seed)
    texts = pairs_of(docs)
    pairs = encode(texts, args.folder)
    with ServerProcess({"model": {"path": str(args.folder)}, "cache": {"memory_mb": 1024}}) as server:
        began = time.perf_counter()
        if args.lm_eval:
            found = ask_lm_eval(args.lm_eval, server.url, docs, args.folder)
            ours = [found[text] for text in texts]
        else:
            ours = ask_server(server.url, pairs)
        seconds = time.perf_counter() - began
    theirs = ask_mlx_lm(pairs, args.folder)
    num_tokens = sum(len(context) + len(continuation) for context, continuation in pairs)
    print(f"{len(pairs)} log-likelihoods, {num_tokens} tokens, {seconds:.1f} s over HTTP")
    return 0 if report(ours, theirs) <= args.tolerance else 1


def report(ours: Sequence[Score], theirs: Sequence[Score]) -> float:
    """Prints how far they are apart; returns the largest difference."""
    differences = [abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    largest, mean = max(differences), sum(differences) / len(differences)
    num_same = sum(a is b for (_, a), (_, b) in zip(ours, theirs, strict=True))
    print(f"difference: largest {largest:.2e}, mean {mean:.2e}; is_greedy is the same in {num_same}")
    return largest


if __name__ == "__main__":
    sys.exit(main())
