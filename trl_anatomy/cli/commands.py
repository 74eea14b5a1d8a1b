"""The commands and what each does, in the order of the overview; each has a file of its name beside this one."""

COMMANDS = {
    "audit": "Read a preference dataset: what sets its sides apart, where, and how surely.",
    "plan": "Show what each rule of a policy would touch, before any training.",
    "predict": "Predict what a `dpo` recipe will change, from its first steps.",
    "dpo": "Train with DPO: the flags and YAML of `trl dpo`, plus a concept policy.",
    "sft": "Fine-tune: the flags and YAML of `trl sft`, plus a concept policy for rows.",
    "reward": "Train a reward model: the flags and YAML of `trl reward`, plus a concept policy.",
    "fit": "Learn a concept from labelled text, judge it on held-out text, and store it for policies.",
    "compare": "Set what the audit predicts beside what training changed.",
    "report": "Rebuild or open the page of an audit.",
    "sae": "Train an SAE on a model's own activations, or judge one on the pairs it is to read.",
    "demo": "See all of it on a small model with planted habits, in minutes on a CPU.",
}
