"""Rows for SFT from a preference dataset: its prompts, with the chosen responses as completions.

python rows.py --dataset trl-lib/ultrafeedback_binarized --out rows
"""

import argparse
from pathlib import Path

from trl_anatomy import AuditConfig
from trl_anatomy.audit.run import load_dataset
from trl_anatomy.reading.preparation import split_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="preference data: hub name, folder or file")
    parser.add_argument("--out", required=True, help="folder for train.parquet")
    args = parser.parse_args()

    dataset = load_dataset(AuditConfig(dataset=args.dataset))
    dataset = dataset.map(
        lambda row: {"prompt": split_row(row)["prompt"], "completion": split_row(row)["chosen"]},
        remove_columns=["chosen", "rejected"],
    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(out / "train.parquet")
    print(f"{out}: {len(dataset)} rows")


if __name__ == "__main__":
    main()
