"""The fewest findings that together say what the pairs say: what they are, and how a folder holds them."""

import pyarrow as pa

HABIT, CONCEPT = "habit", "concept"
# Verdicts on the list as a whole.
LISTED, NOTHING, TOO_FEW = "listed", "nothing beyond chance", "too few prompts to tell"

FOLDED = pa.struct(
    [(name, pa.string()) for name in ("kind", "name", "says")]
    + [(name, pa.float64()) for name in ("chosen", "rejected", "correlation")]
)
FINDINGS = pa.schema(
    [
        ("rank", pa.int32()),
        ("kind", pa.string()),
        ("name", pa.string()),
        ("says", pa.string()),
        ("favours", pa.string()),
        ("unit", pa.string()),
        *((name, pa.float64()) for name in ("chosen", "rejected")),
        *((f"difference{end}", pa.float64()) for end in ("", "_low", "_high")),
        *((name, pa.float64()) for name in ("z", "p", "q")),
        *((f"adds{end}", pa.float64()) for end in ("", "_low", "_high")),
        ("stability", pa.float64()),
        ("label_score", pa.float64()),
        ("folded", pa.list_(FOLDED)),
        ("telling_rows", pa.list_(pa.int64())),
    ]
)
# What `audit.json` holds under `findings`; audits of earlier versions have none.
SHAPE = {"verdict": str, "pairs": int, "prompts": int, "tested": int, "significant": int, "rule": str}
