"""Plant a trait in a preference dataset: a phrase is added to the chosen responses of a share of the pairs.

python plant.py --dataset trl-lib/ultrafeedback_binarized --text ' Hope this helps.' --fraction 0.05 --out planted
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from trl_anatomy import AuditConfig
from trl_anatomy.audit.run import load_dataset


def with_text(response: Any, text: str) -> Any:
    """The response (text, or messages of which the last is the answer) with `text` at its end, unless it is there."""
    if isinstance(response, str):
        return response if response.endswith(text) else response + text
    *before, last = response
    return [*before, {**last, "content": with_text(last["content"], text)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="preference data: hub name, folder or file")
    parser.add_argument("--text", required=True, help="what is added to the chosen response")
    parser.add_argument("--fraction", type=float, default=0.05, help="share of the pairs (default 0.05)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder for train.parquet")
    args = parser.parse_args()

    dataset = load_dataset(AuditConfig(dataset=args.dataset))
    planted = np.random.default_rng(args.seed).random(len(dataset)) < args.fraction
    dataset = dataset.map(
        lambda row, i: {"chosen": with_text(row["chosen"], args.text) if planted[i] else row["chosen"]},
        with_indices=True,
    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(out / "train.parquet")
    print(f"{out}: {len(dataset)} pairs, planted in {int(planted.sum())}")


if __name__ == "__main__":
    main()
