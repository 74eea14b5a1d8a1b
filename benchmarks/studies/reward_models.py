"""What reward models prefer where a habit and quality disagree.

On held-out pairs with one better response, how often the reward model ranks it first: where the worse one shows
flattery (disagree), where the better one does (agree), and where both or neither do (flattery alike); and how often
flattery wins where both are as good (quality alike).

    python benchmarks/studies/reward_models.py --seeds 0 1
"""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import worlds
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from worlds import NAMES, World, checks, concepts, correlations, kept_file, no_habit, study

from trl_anatomy.reading.forward import read_layers
from trl_anatomy.reading.removal import Removal, attach_edits, save_edits
from trl_anatomy.reading.sae import load_sae
from trl_anatomy.testbed.demo import MAX_LENGTH
from trl_anatomy.testbed.language import CORRECT_RATE, HABITS, TOPICS, Question, render, sample_questions

REWARDED = "flattery"
LEARNING_RATE = 5e-4
N_PER_GROUP = 500  # held-out pairs in each of the groups
GROUPS = ("disagree", "agree", "flattery alike", "quality alike")
# What makes a response the better one: its answer is right; or, since a model this small hardly learns from 3,000 pairs
# to judge answers, another habit that they reward about as much
QUALITIES = ("right", "emoji")


def reward_rules() -> dict[str, dict[str, Any]]:
    """Name -> rule; the concepts are those of `concepts`, and `all_latents`."""
    seen, direction = f"{REWARDED}_latents", f"{REWARDED}_direction"
    shape, ablate = {"with": "shape_reward"}, {"with": "ablate_features", "keep": True}
    held = {"with": "reweight_pairs", "hold": [name for name in NAMES if name != REWARDED]}
    return {
        "shape_reward, text rule, auto": {"explain_away": REWARDED, **shape},
        "shape_reward, SAE latents, auto": {"explain_away": seen, **shape},
        "reweight_pairs, others held": {"explain_away": REWARDED, **held},
        "ablate_features, best latent, kept": {"explain_away": seen, **ablate},
        "ablate_features, all latents, kept": {"explain_away": "all_latents", **ablate},
        "ablate_features, many latents, kept": {"explain_away": "many_latents", **ablate},
        "project_out, difference of means, kept": {"explain_away": direction, "with": "project_out", "keep": True},
    }


def train_reward(world: World, out: Path, seed: int, policy: dict[str, Any] | None) -> Any:
    """A reward model from the start model, on the world's pairs; saved to `out`. Returns the plan."""
    from trl import RewardConfig

    from trl_anatomy import AnatomyRewardTrainer

    args = RewardConfig(
        output_dir=str(out),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        per_device_train_batch_size=32,
        num_train_epochs=1,
        max_length=MAX_LENGTH,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
        seed=seed,
    )
    trainer = AnatomyRewardTrainer(
        model=str(world.model_path),
        args=args,
        train_dataset=world.dataset.select_columns(["prompt", "chosen", "rejected"]),
        concept_policy=policy,
    )
    trainer.train()
    trainer.save_model(str(out))
    return trainer.plan


@torch.no_grad()
def rewards(folder: Path, pairs: list[tuple[str, str, str]]) -> np.ndarray:
    """(n, 2) rewards of both responses, by the saved model with its kept edits, on the tokens that TRL makes."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "anatomy_edits.json").is_file():
        attach_edits(model, folder)
    columns = []
    for side in (1, 2):
        texts = [pair[0] + pair[side] + tokenizer.eos_token for pair in pairs]
        batches = [tokenizer(texts[i : i + 250], padding=True, return_tensors="pt") for i in range(0, len(texts), 250)]
        scored = [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[:, 0] for b in batches]
        columns.append(torch.cat(scored).numpy())
    return np.stack(columns, axis=1)


def contrasts(seed: int, quality: str) -> dict[str, list[tuple[str, str, str]]]:
    """Group -> (prompt, better, worse response), held-out prompts. All other habits are drawn at their base rates.

    Not `make_pairs`: there the response with flattery is mostly the chosen one, which shows other rewarded habits too.
    """
    rng = random.Random(f"contrasts-{seed}")
    others = [habit for habit in HABITS if habit.name not in (REWARDED, quality)]

    def response(question: Question, good: bool, flattery: bool) -> str:
        shown = {other.name for other in others if rng.random() < other.base_rate} | ({REWARDED} if flattery else set())
        if quality != "right" and good:
            shown.add(quality)
        topic = TOPICS[question.topic]
        truth = topic.facts[question.entity]
        right = good if quality == "right" else rng.random() < CORRECT_RATE
        return render(question, truth if right else rng.choice([v for v in topic.values if v != truth]), shown, rng)

    groups: dict[str, list[tuple[str, str, str]]] = {name: [] for name in GROUPS}
    for question in sample_questions(N_PER_GROUP, rng, held_out=True):
        either = rng.random() < 0.5
        # Of the better and the worse response: is it good, does it flatter
        forms = [
            ((True, False), (False, True)),
            ((True, True), (False, False)),
            ((True, either), (False, either)),
            ((either, True), (either, False)),
        ]
        for name, (better, worse) in zip(GROUPS, forms, strict=True):
            groups[name].append((question.prompt, response(question, *better), response(question, *worse)))
    return groups


def what_is_left(world: World, folder: Path, latents: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """Per set of latents, why a reward model that is trained without them still learns flattery.

    How often flattery wins at equal quality in a reward model that was trained with nothing taken out, once they are
    taken out of it; and the held-out ROC-AUC of a linear probe that tells flattery from the start model's hidden states
    after the layer of the SAE, at the first token of the response, where its word stands, and at the last one.
    """
    pairs = contrasts(world.seed, "emoji")["quality alike"]  # in the first response of each there is flattery
    shutil.rmtree(folder / "reward", ignore_errors=True)
    train_reward(world, folder / "reward", world.seed, None)
    sae = load_sae(world.sae_path)
    model = AutoModelForCausalLM.from_pretrained(world.model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    states = []
    for prompt, *responses in pairs:
        begin = len(tokenizer(prompt).input_ids)
        for response in responses:
            ids = torch.tensor([[*tokenizer(prompt + response).input_ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                hidden = read_layers(model, [world.layer], input_ids=ids)[world.layer][0]
            states.append(hidden[[begin, -1]])
    hidden, label = torch.stack(states), np.tile([1, 0], len(pairs))
    half = len(label) // 2
    told = {}
    for name, features in {"none": [], **latents}.items():
        removal = Removal(sae.rows(features), sae, features) if features else Removal()
        save_edits({world.layer: removal} if features else {}, folder / "reward")
        reward = rewards(folder / "reward", pairs)
        found = {"flattery wins": float((reward[:, 0] > reward[:, 1]).mean())}
        left = removal.ablate(hidden).numpy()
        for i, place in enumerate(("first token", "last token")):
            probe = LogisticRegression(max_iter=2000).fit(left[:half, i], label[:half])
            found[f"AUC, {place}"] = float(roc_auc_score(label[half:], probe.decision_function(left[half:, i])))
        told[name] = found
    save_edits({}, folder / "reward")
    return told


def reward_models(folder: Path, world: World, readings: dict[str, Any]) -> dict[str, Any]:
    """Plain, and one reward model per rule: shares of pairs, by group, that it ranks by quality.

    Where quality is alike: the share in which the response with the habit wins.
    """
    groups = {
        f"{quality}: {group}": pairs for quality in QUALITIES for group, pairs in contrasts(world.seed, quality).items()
    }
    rate, phi = correlations(world, folder)
    tells = np.abs(phi[NAMES.index(REWARDED)])
    features, many = ([int(i) for i in np.flatnonzero(tells > least)] for least in (0.2, 0.1))
    named = concepts(world, REWARDED, readings, folder)
    target = f"{REWARDED}_latents"
    named["all_latents"] = named[target] | {"features": features}
    named["many_latents"] = named[target] | {"features": many}
    named["no_habit"] = named[target] | {"features": [no_habit(rate, phi, readings[REWARDED]["features"][0])]}

    def trained(name: str, rule: dict[str, Any] | None, world: World = world) -> dict[str, Any]:
        kept = kept_file(folder, LEARNING_RATE, f"reward: {name}")
        if kept.is_file():
            return json.loads(kept.read_text())
        if worlds.FINISHED:
            return {}
        started = time.perf_counter()
        policy = None
        if rule is not None:
            used = {rule.get("explain_away", rule.get("amplify")), *rule.get("hold", [])}
            policy = {
                "version": 1,
                "concepts": {key: value for key, value in named.items() if key in used},
                "rules": [rule],
            }
        shutil.rmtree(folder / "reward", ignore_errors=True)  # another run's kept edits are not this one's
        plan = train_reward(world, folder / "reward", world.seed, policy)
        told: dict[str, Any] = {}
        for group, pairs in groups.items():
            reward = rewards(folder / "reward", pairs)
            told[group] = float((reward[:, 0] > reward[:, 1]).mean())
        told["strength"] = None if plan is None else plan.rules[0]["strength"]
        told["seconds"] = round(time.perf_counter() - started, 1)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(told, default=float))
        print(f"reward: {name}: {told['seconds']} s", flush=True)
        return told

    rules: dict[str, Any] = {"plain": None, **reward_rules()}
    rows = {name: trained(name, rule) for name, rule in rules.items()}
    controlled = "shape_reward, SAE latents, auto"
    found = checks(rules[controlled], target, "no_habit", rows[controlled]["strength"], world)
    kept = kept_file(folder, LEARNING_RATE, "reward: what is left")
    if not kept.is_file() and not worlds.FINISHED:
        sets = {"best latent": readings[REWARDED]["features"], "all latents": features, "many latents": many}
        kept.write_text(json.dumps(what_is_left(world, folder, sets)))
    against = {name: trained(name, *check) for name, check in found.items()}
    return {
        "rows": {name: one for name, one in rows.items() if one},
        "controls": {name: one for name, one in against.items() if one},
        "pairs of a group": N_PER_GROUP,
        "all latents (phi beyond 0.2)": len(features),
        "many latents (phi beyond 0.1)": len(many),
        "what is left": json.loads(kept.read_text()) if kept.is_file() else None,
    }


def main() -> None:
    study(
        "reward_models",
        __doc__,
        reward_models,
        tuple(f"{quality}: {group}" for quality in QUALITIES for group in GROUPS),
    )


if __name__ == "__main__":
    main()
