"""Work that is killed at a random moment again and again until it is finished, in a process of its own."""

import atexit
import ctypes
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from audit_files import config_for, digests, write_inputs
from conftest import build_tokenizer as chat_tokenizer
from conftest import preference_rows
from datasets import Dataset, load_from_disk
from hidden_world import policy, rule
from huggingface_hub import constants
from parity import EXACT
from reading_world import build_tokenizer, dataset, tiny_model
from test_audit_folder import word_pairs, write_start_model
from test_fit import labelled
from test_restart import ended, in_a_process
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, RewardConfig

from trl_anatomy import AnatomyDPOTrainer, AnatomyRewardTrainer
from trl_anatomy.audit import labelling, run
from trl_anatomy.audit import report as audit_report
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import load_audit
from trl_anatomy.audit.report import write_report
from trl_anatomy.checking import compare as comparing
from trl_anatomy.checking import first_step as stepping
from trl_anatomy.checking import pilot as piloting
from trl_anatomy.checking import prediction as predicting
from trl_anatomy.cli import main
from trl_anatomy.reading import fit as fitting
from trl_anatomy.reading import harvest as harvesting
from trl_anatomy.reading import sae_check, score, storage
from trl_anatomy.reading import sae_training as sae_trainings
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.trainers.checkpoints import flaw, last_whole

PR_SET_PDEATHSIG = 1


def half_written(folder: Path) -> set[str]:
    """Files that are being written under a name of their own.

    The work renames and removes folders while this looks: `os.walk` passes over one that is gone, where pathlib raises.
    """
    found = (name for _, folders, files in os.walk(folder) for name in (*folders, *files))
    return {name.split(".partial")[0] for name in found if name.endswith(".partial")}


def half_checkpoints(folder: Path) -> set[str]:
    made = next(os.walk(folder / "out"), ("", [], []))[1]
    begun = {name for name in made if name.startswith("checkpoint-")}
    return half_written(folder) | {
        name for name in begun if not (folder / "out" / name / "trainer_state.json").is_file()
    }


@dataclass(frozen=True)
class Work:
    """Something that is done in a folder.

    Attributes:
        do: folder -> nothing; goes on from what is in the folder.
        result: folder -> file -> hash, of all that must not depend on interruptions.
        victims: process of the work, random numbers -> whom to kill.
        writing: folder -> what is being written into it.
    """

    do: Callable[[Path], Any]
    result: Callable[[Path], dict[str, str]]
    victims: Callable[[int, random.Random], list[int]] = lambda child, rng: [child]
    writing: Callable[[Path], set[str]] = half_written


@dataclass
class Record:
    """What came of killing a piece of work.

    Attributes:
        undisturbed_seconds: what the work takes.
        kills: how often it was killed.
        aimed: how many of these were aimed at the moment in which a file is written.
        finishes: how often it was then finished.
        different: finishes whose result was not the undisturbed one.
        failures: restarts that ended in an error.
        half_written: kills after which a half-written file (under a name of its own) or checkpoint lay in the folder,
            left by this kill or by one before it.
        stages: where it was killed.
        changed: files that differed.
    """

    undisturbed_seconds: float = 0.0
    kills: int = 0
    aimed: int = 0
    finishes: int = 0
    different: int = 0
    failures: int = 0
    half_written: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)


def hashed(folder: Path, pattern: str) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob(pattern)) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def stage_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".stage")


def tell(folder: Path, *places: tuple[Any, str, str]) -> None:
    """From now on in this process, calls of functions (owner, name, stage) tell what stage the work is in."""
    file, before = stage_file(folder), ["starting"]

    def wrap(owner: Any, name: str, stage: str) -> None:
        real = getattr(owner, name)

        def told(*args: Any, **kwargs: Any) -> Any:
            before.append(stage)
            file.write_text(stage)
            try:
                return real(*args, **kwargs)
            finally:
                before.pop()
                file.write_text(before[-1])

        setattr(owner, name, told)

    file.write_text(before[-1])
    for place in places:
        wrap(*place)


def interrupt(work: Work, root: Path, kills: int, seed: int, name: str, aimed: float = 0.5) -> Record:
    """Do `work` undisturbed once; then kill it at least `kills` times, and compare what each finish leaves.

    A share `aimed` of the kills falls as soon as one of the next writes (up to the eighth) of a file is seen, the
    others between start and where the undisturbed work ends, evenly. A run that ends before its moment comes is a
    finish, and the next one begins in an empty folder. `*.partial` files, which nothing reads, are not compared.
    """
    rng, record, most = random.Random(seed), Record(), 1
    straight = root / f"{name}-undisturbed"
    start = time.monotonic()
    seen: set[str] = set()
    child = in_a_process(partial(work.do, straight))
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        most = max(1, min(8, _writes_seen(work, straight, seen)))
        time.sleep(0.001)
    assert found[1] == 0, f"{name} fails undisturbed"
    record.undisturbed_seconds = round(time.monotonic() - start, 2)
    expected = work.result(straight)
    assert expected, f"{name} leaves nothing to compare"
    folder = root / f"{name}-killed"
    while record.kills < kills or folder.exists():
        moment, writes = float("inf"), 0
        if record.kills < kills and rng.random() < aimed:
            writes = rng.randint(1, most)
        elif record.kills < kills:
            moment = rng.uniform(0, record.undisturbed_seconds)
        seen = work.writing(folder)
        stage_file(folder).unlink(missing_ok=True)
        child = in_a_process(partial(work.do, folder))
        start, status, killed = time.monotonic(), None, False
        while status is None:
            found, code = os.waitpid(child, os.WNOHANG)
            if found:
                status = os.waitstatus_to_exitcode(code)
            elif time.monotonic() - start > moment or (writes and _writes_seen(work, folder, seen) >= writes):
                for victim in work.victims(child, rng):
                    os.kill(victim, signal.SIGKILL)
                status, killed = ended(child), True
            else:
                time.sleep(0.001 if writes else 0.002)
        if killed and status != 0:
            record.kills += 1
            record.aimed += bool(writes)
            stage = stage_file(folder)
            record.stages[(stage.read_text() if stage.exists() else "") or "starting"] += 1
            record.half_written += bool(work.writing(folder))
            continue
        record.finishes += 1
        record.failures += status != 0
        found_files = work.result(folder) if status == 0 else expected
        names = {name for name in {*expected, *found_files} if not name.endswith(".partial")}
        changed = {name for name in names if found_files.get(name) != expected.get(name)}
        record.different += bool(changed)
        record.changed.update(changed)
        shutil.rmtree(folder, ignore_errors=True)
    return record


def _writes_seen(work: Work, folder: Path, seen: set[str]) -> int:
    """How many writes began since the work did; `seen` is extended by them, and begins with what earlier kills left."""
    seen |= {f"+{name}" for name in work.writing(folder) if name not in seen}
    return sum(name.startswith("+") for name in seen)


# The pieces of work

AUDIT_STAGES = (
    (run, "find_communities", "communities"),
    (run, "feature_view", "tests by response"),
    (run, "prompt_view", "prompt clusters"),
    (run, "_describe", "terms"),
    (run, "concept_table", "predicted shifts"),
    (run, "sample_table", "samples"),
    (run, "write_audit", "tables"),
    (labelling, "label_audit", "labels"),
    (audit_report, "write_report", "page"),
    (harvesting, "harvest", "harvest"),
    (harvesting, "_write_shard", "writing a shard"),
)


def inputs_for(root: Path) -> Callable[[str], AuditConfig]:
    """Inputs with 800 pairs, so that the statistics take as long as the pass."""
    write_inputs(root)
    with gzip.open(root / "pairs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in word_pairs(800))
    return lambda name: config_for(root, name)


def audit(root: Path) -> Work:
    """From pairs, model and SAE on disk to the page."""
    config = inputs_for(root)

    def do(folder: Path) -> None:
        tell(folder, *AUDIT_STAGES)
        run.run_audit(config(folder.name), progress=False)

    return Work(do, lambda folder: digests(folder / "audit"))


def in_two_ranks(work: Callable[[int], Any]) -> None:
    """Do the work of both ranks of a launch, in two processes; where one fails, the other is ended too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def rank(index: int) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody is left behind
        PartialState._reset_state()
        os.environ |= {**common, "RANK": str(index), "LOCAL_RANK": str(index), "ACCELERATE_USE_CPU": "true"}
        work(index)

    ranks = [in_a_process(partial(rank, index)) for index in (0, 1)]
    first, code = os.wait()
    other = ranks[0] if first == ranks[1] else ranks[1]
    if code:
        os.kill(other, signal.SIGKILL)
    codes = [code, os.waitpid(other, 0)[1]]
    assert codes == [0, 0], codes


def audit_by_two(root: Path) -> Work:
    """The same by two processes, of which one or both are killed; then the other is ended too, as a launcher does."""
    config = inputs_for(root)

    def do(folder: Path) -> None:
        def rank(index: int) -> None:
            if index == 0:
                tell(folder, *AUDIT_STAGES)
            run.run_audit(config(folder.name), progress=False)

        in_two_ranks(rank)

    def victims(child: int, rng: random.Random) -> list[int]:
        found = Path(f"/proc/{child}/task/{child}/children").read_text().split()
        ranks = [int(pid) for pid in found]
        return rng.choice([ranks[:1], ranks[1:], ranks]) or [child]

    return Work(do, lambda folder: digests(folder / "audit"), victims)


def audit_at_s3(root: Path) -> Work:
    """From pairs on disk to a bucket, each time on another machine: without the copy of the one before.

    The bucket is behind a slow wire, and kills are aimed at up to 30 ms after an upload begins. A shard that the
    manifest there tells of must not be read again.
    """
    import s3fs  # noqa: F401  # before the works fork
    from object_store import BUCKET, served

    config = inputs_for(root)
    # So that what datasets keeps is there also for the undisturbed run, whose time the others are killed in.
    assert ended(in_a_process(lambda: run.run_audit(config("before"), progress=False) and None)) == 0
    serving = served(rate=2 << 20)
    store = serving.__enter__()
    atexit.register(serving.__exit__, None, None, None)

    def prefix(folder: Path) -> str:
        return (folder / "prefix").read_text()

    def do(folder: Path) -> None:
        os.environ |= store.environment
        constants.HF_HOME = str(folder / "home")
        tell(folder, *AUDIT_STAGES, (storage, "send", "uploading"), (storage, "fetch", "fetching"))
        shutil.rmtree(folder / "home", ignore_errors=True)
        for left in folder.glob("*.partial"):
            left.unlink()
        if not (folder / "prefix").exists():
            folder.mkdir(exist_ok=True)
            (folder / "prefix.partial").write_text(uuid.uuid4().hex)
            (folder / "prefix.partial").rename(folder / "prefix")
        manifest, entries = "harvest/manifest.json", []
        if manifest in store.names(prefix(folder)):
            entries = json.loads(store.get(f"{prefix(folder)}/{manifest}"))["shards"]
        whole, write = {entry["file"] for entry in entries}, harvesting._write_shard

        def written(out: Path, name: str, tensors: Any) -> Any:
            assert name not in whole, f"{name} was there, and is read again"
            return write(out, name, tensors)

        harvesting._write_shard = written
        send = storage.send

        def sent(file: Path) -> None:
            moment = threading.Timer(random.uniform(0, 0.03), (folder / f"{file.name}.partial").touch)
            moment.start()
            send(file)
            moment.cancel()
            moment.join()
            (folder / f"{file.name}.partial").unlink(missing_ok=True)

        storage.send = sent
        url = f"s3://{BUCKET}/{prefix(folder)}"
        run.run_audit(replace(config("x"), out=url), progress=False)

    def result(folder: Path) -> dict[str, str]:
        found = store.copy(prefix(folder), folder / "found")
        url = f"s3://{BUCKET}/{prefix(folder)}".encode()
        for file in (found / "audit.json", found / "report.html"):
            file.write_bytes(file.read_bytes().replace(url, str(found).encode()))
        return digests(found)

    def uploading(folder: Path) -> set[str]:
        return {file.name for file in folder.glob("*.partial")}

    return Work(do, result, writing=uploading)


def finished_audit(root: Path) -> AuditConfig:
    write_inputs(root)
    config = config_for(root, "finished")
    assert ended(in_a_process(lambda: run.run_audit(config, progress=False) and None)) == 0
    return config


def copied(config: AuditConfig, folder: Path) -> Path:
    """A copy of a finished audit in `folder`, whole or not there."""
    if not (folder / "audit").exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(config.out, folder / "copying")
        (folder / "copying").rename(folder / "audit")
    return folder / "audit"


def page(root: Path) -> Work:
    """The page of a finished audit, written anew."""
    config = finished_audit(root)

    def do(folder: Path) -> None:
        tell(folder, (audit_report.page, "render", "making the page"))
        folder.mkdir(exist_ok=True)
        write_report(load_audit(config.out), run.load_dataset(config), folder / "report.html")

    return Work(do, lambda folder: hashed(folder, "*.html"))


def naming(root: Path) -> Work:
    """`report` with names by a local chat model, which answers at random but always the same."""
    config = finished_audit(root)
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 8192}
    LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, vocab_size=len(tokenizer))
    ).save_pretrained(root / "namer")
    tokenizer.save_pretrained(root / "namer")

    def do(folder: Path) -> None:
        out = copied(config, folder)
        tell(folder, (labelling, "label_audit", "names"), (audit_report, "write_report", "page"))
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            assert main(["report", "--audit", str(out), "--label_model", str(root / "namer")]) == 0

    return Work(do, lambda folder: digests(folder / "audit"))


def planning(root: Path) -> Work:
    """`plan` of a policy on hidden states, whose scores are saved after every batch."""
    config = finished_audit(root)
    generator = torch.Generator().manual_seed(0)
    DirectionScorer(torch.randn(32, generator=generator), 1).save(root / "concept")
    concepts = {"v": {"scorer": "direction", "path": str(root / "concept")}}
    rules = [rule("v", "shape_reward"), rule("v", "filter_pairs", fraction=0.1)]
    (root / "policy.yaml").write_text(yaml.safe_dump({"version": 1, "concepts": concepts, "rules": rules}))

    def do(folder: Path) -> None:
        score._SAVE_SECONDS = -1.0
        out = copied(config, folder)
        tell(folder, (score, "score_pairs", "scoring"), (score, "keep", "saving scores"))
        with open(folder / "plan.json", "w") as file, redirect_stdout(file):
            assert main(["plan", "--audit", str(out), "--policy", str(root / "policy.yaml"), "--json"]) == 0
        plan = json.loads((folder / "plan.json").read_text())
        (folder / "plan.json").write_text(json.dumps(plan).replace(str(folder), "OUT"))

    return Work(do, lambda folder: {**hashed(folder, "plan.json"), **digests(folder / "audit")})


def compared(root: Path) -> Work:
    """`compare`: responses of two models, read by the start model."""
    config = finished_audit(root)
    changed = AutoModelForCausalLM.from_pretrained(root / "model")
    with torch.no_grad():
        changed.get_input_embeddings().weight[5:9] *= 3
    changed.save_pretrained(root / "after")

    def do(folder: Path) -> None:
        stages = (
            (comparing, "sampled", "responses"),
            (comparing, "cheap_predictions", "cheap predictions"),
            (comparing, "_random_features", "random clusters"),
            (comparing, "write_comparison", "page"),
            (harvesting, "harvest", "harvest"),
        )
        tell(folder, *stages)
        words = ["compare", "--audit", config.out, "--before", str(root / "model"), "--after", str(root / "after")]
        sizes = ["--n_prompts", "60", "--max_new_tokens", "12", "--batch_size", "20", "--out", str(folder / "out")]
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            assert main([*words, *sizes]) == 0

    return Work(do, lambda folder: digests(folder / "out"))


def foretold(root: Path) -> Work:
    """`predict`: responses of the start model, and what the first steps with and without a policy do to them."""
    config = finished_audit(root)
    (root / "pairs").mkdir()
    shutil.copy(config.dataset, root / "pairs")
    concepts = {"bold": {"scorer": "text", "pattern": "bold"}}
    rules = [rule("bold", "shape_reward", strength=0.5)]
    (root / "policy.yaml").write_text(yaml.safe_dump({"version": 1, "concepts": concepts, "rules": rules}))

    def do(folder: Path) -> None:
        stages = (
            (predicting, "sampled", "responses"),
            (harvesting, "harvest", "harvest"),
            (score, "score_pairs", "scoring"),
            (stepping, "first_step", "a first step"),
            (stepping, "log_prob_changes", "what it changes"),
            (piloting, "train_pilot", "a pilot"),
            (piloting, "carry_on", "its margins"),
        )
        tell(folder, *stages)
        words = ["predict", "--model_name_or_path", str(root / "model"), "--dataset_name", str(root / "pairs")]
        words += ["--output_dir", str(folder / "nothing"), "--bf16=false", "--use_cpu", "--n_pairs=32"]
        words += ["--audit", config.out, "--concept_policy", str(root / "policy.yaml"), "--n_prompts=20"]
        words += ["--n_per_prompt=4", "--max_new_tokens=8", "--prediction", str(folder / "out")]
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            assert main(words) == 0

    return Work(do, lambda folder: digests(folder / "out"))


def fitted(root: Path) -> Work:
    """`fit` of a probe, stored over one of another layer."""
    tiny_model().save_pretrained(root / "model")
    build_tokenizer().save_pretrained(root / "model")
    Dataset.from_dict(labelled(120)).to_json(str(root / "texts.jsonl"))

    def do(folder: Path) -> None:
        out = folder / "concept"
        tell(folder, (fitting, "fit_concept", "fit"), (fitting, "read_hidden", "hidden states"))
        words = ["fit", "--model", str(root / "model"), "--dataset", str(root / "texts.jsonl"), "--scorer", "probe"]
        words += ["--layers", "1"]
        if not out.exists():  # a concept of another model's width and layer, which this fit replaces
            folder.mkdir(exist_ok=True)
            DirectionScorer(torch.ones(8), 0).save(folder / "before")
            (folder / "before").rename(out)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            assert main([*words, "--out", str(out)]) == 0

    return Work(do, lambda folder: hashed(folder, "*"))


def scoring(root: Path) -> Work:
    """Scores of two concepts over 300 pairs, saved after every batch."""
    pairs = read_pairs(dataset("explicit", 300), build_tokenizer(), max_length=200)
    model = tiny_model()
    vector = model.get_input_embeddings().weight[5].detach().clone()

    def do(folder: Path) -> None:
        score._SAVE_SECONDS = -1.0
        tell(folder, (score, "score_pairs", "scoring"), (score, "keep", "saving scores"))
        scorers = {"a": DirectionScorer(vector, 1), "b": DirectionScorer(-vector, 2, "mean")}
        found = score.score_pairs(pairs, scorers, model, cache_dir=folder, progress=False, batch_tokens=2000)
        (folder / "gaps.txt").write_text("".join(str(found.gap(name).tolist()) for name in "ab"))

    def result(folder: Path) -> dict[str, str]:
        return {**hashed(folder, "scores-*.safetensors"), **hashed(folder, "gaps.txt")}

    return Work(do, result)


def sae_training(root: Path, *words: str) -> Work:
    """`sae`: from pairs to SAE, card and figures, its state kept after every step, in several rounds an epoch."""
    write_start_model(root / "model")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in word_pairs(1000)))

    def do(folder: Path) -> None:
        sae_trainings._SAVE_SECONDS, sae_trainings._SAVE_SHARE = 0.0, 0
        sae_trainings.train_saes.__kwdefaults__["buffer_bytes"] = 1  # the smallest round there is
        stages = (
            (sae_trainings._Run, "_read", "reading activations"),
            (sae_trainings._Run, "_step", "a step"),
            (sae_trainings._Run, "_keep", "writing the state"),
            (sae_trainings._Run, "save", "writing the SAE"),
            (sae_check, "check_fit", "judging it"),
        )
        tell(folder, *stages)
        given = ["sae", "--model", str(root / "model"), "--dataset", str(root / "pairs.jsonl"), "--device", "cpu"]
        sizes = ["--tokens", "40960", "--latents", "64", "--k", "4", "--out", str(folder / "sae")]
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            assert main([*given, *sizes, *words]) == 0

    return Work(do, lambda folder: hashed(folder, "*"))


def training(root: Path, model_dir: Path, reward: bool = False, precompute: bool = False) -> Work:
    """Eight steps with a policy, a checkpoint after each; goes on from the last whole one."""
    Dataset.from_list(preference_rows(24)).save_to_disk(root / "pairs")
    shaped = policy(root / "concepts", rule("v", "shape_reward"), rule("t", "filter_pairs", fraction=0.1))
    cls, config = (AnatomyRewardTrainer, RewardConfig) if reward else (AnatomyDPOTrainer, DPOConfig)

    def do(folder: Path) -> None:
        settings = {**EXACT, "save_strategy": "steps", "save_steps": 1, "max_steps": 8, "save_only_model": False}
        if precompute:
            settings["precompute_ref_log_probs"] = True
        data, out = folder / "pairs", folder / "out"
        if not data.exists():  # a copy, since the score cache lies beside the data
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(root / "pairs", folder / "copying")
            (folder / "copying").rename(data)
        stages = [(cls, "_precompute_ref_logps", "reference pass")] if precompute else []
        stages += [(cls, "__init__", "scores"), (cls, "training_step", "a step"), (cls, "train", "between steps")]
        tell(folder, *stages, (cls, "_save_checkpoint", "writing a checkpoint"))
        trainer = cls(
            model=str(model_dir),
            args=config(output_dir=str(out), **settings),
            train_dataset=load_from_disk(str(data)),
            concept_policy=shaped,
        )
        trainer.train(resume_from_checkpoint=last_whole(out)[0] is not None)
        trainer.save_model(str(folder / "final"))
        (folder / "final" / "log.json").write_text(json.dumps(log(trainer), sort_keys=True))

    def result(folder: Path) -> dict[str, str]:
        whole = [path.name for path in (folder / "out").glob("checkpoint-*") if flaw(path) is None]
        assert len(whole) == 8, whole
        return {**hashed(folder / "final", "*.safetensors"), **hashed(folder / "final", "log.json")}

    return Work(do, result, writing=half_checkpoints)


def log(trainer: Any) -> list[dict[str, Any]]:
    """What was logged of each step, without times, and without TRL's count of tokens, which a restart begins anew."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if key != "num_tokens"} for entry in steps]


def works(model_dir: Path) -> dict[str, Callable[[Path], Work]]:
    """Every piece of work; `model_dir` holds the model that is trained."""
    return {
        "audit": audit,
        "audit by two processes": audit_by_two,
        "audit at s3": audit_at_s3,
        "page": page,
        "names": naming,
        "plan": planning,
        "scoring": scoring,
        "sae": lambda root: sae_training(root, "--layer", "0", "1"),
        "sae, jumprelu": lambda root: sae_training(root, "--architecture", "jumprelu"),
        "compare": compared,
        "predict": foretold,
        "fit": fitted,
        "training": lambda root: training(root, model_dir),
        "training, reference precomputed": lambda root: training(root, model_dir, precompute=True),
        "reward training": lambda root: training(root, model_dir, reward=True),
    }
