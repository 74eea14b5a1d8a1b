"""Label the responses of a preference dataset by a text rule or by length, for `trl-anatomy fit`.

python label.py --dataset trl-lib/ultrafeedback_binarized --pattern '!' --out labels/lively.jsonl
python label.py --dataset trl-lib/ultrafeedback_binarized --longer --out labels/length.jsonl
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np

from trl_anatomy import AuditConfig
from trl_anatomy.audit.run import load_dataset
from trl_anatomy.reading.spans import flatten_text, split_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="preference data: hub name, folder or file")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--pattern", help="label 1: this regular expression is found in the response")
    rule.add_argument("--longer", action="store_true", help="label 1: more characters than the median response")
    parser.add_argument("--n_pairs", type=int, default=2000, help="pairs read, drawn at random (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="json lines with prompt, response and label")
    args = parser.parse_args()

    dataset = load_dataset(AuditConfig(dataset=args.dataset)).shuffle(seed=args.seed)
    rows = [split_row(row) for row in dataset.select(range(min(args.n_pairs, len(dataset))))]
    responses = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    texts = [flatten_text(response) for _, response in responses]
    if args.longer:
        lengths = np.array([len(text) for text in texts])
        labels = lengths > np.median(lengths)
    else:
        labels = [re.search(args.pattern, text) is not None for text in texts]
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        for (prompt, response), label in zip(responses, labels, strict=True):
            print(json.dumps({"prompt": prompt, "response": response, "label": int(label)}), file=file)
    print(f"{out}: {len(labels)} responses, {int(np.sum(labels))} with label 1")


if __name__ == "__main__":
    main()
