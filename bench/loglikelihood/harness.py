"""lm-eval on a local task: `PYTHON harness.py URL TOKENIZER DOCS.json OUT.json`, with a Python that has it.

It does not know mlxd or this repository: it is run by an environment of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

TASK = """
task: made_up
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
metadata:
  version: 1
"""


def main() -> None:
    """Writes [[context, continuation, log-likelihood, is_greedy], …]."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    url, tokenizer, docs, out = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "docs.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in json.loads(Path(docs).read_text())))
        (Path(folder) / "made_up.yaml").write_text(TASK.format(data=data))
        results = simple_evaluate(
            model="local-completions",
            model_args={
                "model": "default",
                "base_url": f"{url}/v1/completions",
                "tokenizer": tokenizer,
                "tokenizer_backend": "huggingface",
                "num_concurrent": 4,
                "batch_size": 8,
            },
            tasks=["made_up"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    rows = []
    for sample in results["samples"]["made_up"]:
        for arguments, [response] in zip(sample["arguments"], sample["resps"], strict=True):
            rows.append([*arguments, float(response[0]), str(response[1]) == "True"])
    Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
