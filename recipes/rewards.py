"""The reward function that grpo.yaml names: a concept policy on generated text."""

from pathlib import Path

from trl_anatomy import ConceptReward

concept = ConceptReward(Path(__file__).with_name("grpo.policy.yaml"))
