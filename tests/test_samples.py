"""Tokens that fire, for the pairs worth looking at: the same as the harvest counts, on the text that they are of."""

import numpy as np
import pytest
from audit_world import make_audit, make_world
from reading_world import build_tokenizer, dataset, tiny_model, tiny_sae

from trl_anatomy.audit.folder import load_audit
from trl_anatomy.audit.maps import plane
from trl_anatomy.audit.report.explore import excerpt, marked
from trl_anatomy.audit.samples import SAMPLES, sample_rows, sample_table
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.firings import span_tokens, token_firings, token_texts
from trl_anatomy.reading.harvest import harvest
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.spans import SPANS, read_pairs

LAYER = 1


@pytest.mark.parametrize("kind", ["explicit", "conversational"])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_firing_tokens_are_those_that_the_harvest_counts(kind, architecture, tmp_path):
    tokenizer, model, sae = build_tokenizer(), tiny_model(), SAE(tiny_sae(architecture))
    pairs = read_pairs(dataset(kind), tokenizer, max_length=60)
    read = harvest(model, sae, pairs, tmp_path, layer=LAYER, batch_tokens=150, shard_pairs=3, progress=False)
    counted = {span: read.count(span).toarray() for span in SPANS}
    groups = [np.array([f]) for f in range(sae.d_sae)] + [np.array([3, 7, 12, 20])]
    wanted = dict.fromkeys((7, 0, 4), groups)
    for i, spans in token_firings(model, sae, pairs, wanted, layer=LAYER, batch_tokens=90).items():
        for span, share in spans.items():
            assert share.shape == (len(span_tokens(pairs, i)[span]), len(groups))
            np.testing.assert_array_equal(share[:, :-1].sum(axis=0), counted[span][i])
            np.testing.assert_allclose(share[:, -1], share[:, [3, 7, 12, 20]].mean(axis=1))
    assert sum(counted[span].sum() for span in SPANS) > 0


def test_texts_of_tokens_are_the_text():
    tokenizer = build_tokenizer()
    text = "It is **air**. Zażółć gęślą 日本語 🙂🙂🙂 שלום\n\n  done"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "" in texts  # a token that ends inside a character
    assert token_texts(tokenizer, []) == []
    assert "".join(token_texts(tokenizer, [*ids, tokenizer.eos_token_id])) == text + "</s>"


def test_a_table_of_samples_keeps_tokens_and_firings(tmp_path):
    tokenizer, model, sae = build_tokenizer(), tiny_model(), SAE(tiny_sae())
    pairs = read_pairs(dataset("explicit"), tokenizer, max_length=60)
    features = {"T1": np.array([0, 1, 2]), "R1": np.arange(30)}
    row = int(pairs.rows[3])
    table = sample_table({row: ["T1", "R1"]}, features, model, sae, pairs, tokenizer, layer=LAYER)
    assert table.schema == SAMPLES
    (sample,) = table.to_pylist()
    assert sample["row"] == row
    assert "".join(sample["chosen"]).removesuffix("</s>") == pairs.texts(3)[1]
    fired = token_firings(model, sae, pairs, {3: list(features.values())}, layer=LAYER)[3]
    for entry in sample["fired"]:
        share = fired[entry["span"]][:, list(features).index(entry["concept"])]
        np.testing.assert_array_equal(entry["tokens"], np.flatnonzero(share))
        np.testing.assert_allclose(entry["share"], share[share > 0])
    assert {entry["concept"] for entry in sample["fired"]} >= {"R1"}


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    return make_audit(tmp_path_factory.mktemp("samples"), make_world(), samples=True)


def test_the_largest_shift_is_sampled_first_and_the_limit_holds(audit):
    tables = (audit.concepts, audit.hypotheses, audit.pairs)
    wanted = sample_rows(*tables, n_pairs=5)
    assert len(wanted) == 5
    largest = max(audit.concepts.to_pylist(), key=lambda c: abs(c["predicted"]))
    row, names = next(iter(wanted.items()))
    assert row == largest["telling_rows"][0]
    assert names[0] == largest["concept"]
    own = dict(zip(audit.pairs["row"].to_pylist(), audit.pairs["concepts"].to_pylist(), strict=True))
    more = sample_rows(*tables)
    assert all(set(own[row]) <= set(names) for row, names in more.items())
    kept = [h for h in audit.hypotheses.to_pylist() if h["kept"] and h["view"] == "feature"]
    inside = {
        row: contexts[0]
        for row, contexts in zip(*(audit.pairs[c].to_pylist() for c in ("row", "contexts")), strict=True)
    }
    for h in kept[:3]:
        assert any(inside[row] == h["context"] and h["concept"] in names for row, names in more.items())


def test_samples_are_read_back_and_a_damaged_file_is_told(audit, tmp_path):
    again = load_audit(audit.path)
    assert again.samples.to_pylist() == audit.samples.to_pylist()
    plain = make_audit(tmp_path, make_world(n=60))
    assert plain.samples is None
    (tmp_path / "samples.parquet").write_bytes(b"PAR1")
    with pytest.raises(AnatomyError, match="truncated or damaged"):
        _ = load_audit(tmp_path).samples


def test_a_new_audit_leaves_no_old_samples(tmp_path):
    make_audit(tmp_path, make_world(n=60), samples=True)
    assert (tmp_path / "samples.parquet").is_file()
    assert make_audit(tmp_path, make_world(n=60)).samples is None


def test_an_excerpt_is_the_stretch_that_fires_most():
    words = [f" w{i}" for i in range(40)]
    sample = {"chosen": words, "fired": {"T1": {"chosen": [[2, 30, 31], [1, 3, 2]]}}}
    parts = excerpt(sample, "T1", "chosen", 18)
    assert (" w30", 3) in parts
    assert (" w31", 2) in parts
    assert parts[0][0] == "… "
    assert parts[-1][0] == " …"
    assert "".join(text for text, _ in marked(sample, "T1", "chosen")) == "".join(words)
    assert excerpt(sample, "T9", "chosen", 500) == [("".join(words), 0)]


def test_the_plane_keeps_the_distances_that_a_plane_can_hold():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 7)) + 5
    found = plane(flat @ flat.T)

    def distances(points: np.ndarray) -> np.ndarray:
        return np.linalg.norm(points[:, None] - points[None], axis=-1)

    ratio = distances(flat)[np.triu_indices(30, 1)] / distances(found)[np.triu_indices(30, 1)]
    np.testing.assert_allclose(ratio, ratio[0], rtol=5e-3)
    assert np.abs(found).max() == 1
    assert plane(np.zeros((0, 0))).shape == (0, 2)
    assert plane(np.ones((3, 3))).tolist() == [[0, 0]] * 3


def test_every_context_and_concept_has_a_place(audit):
    places = audit.info["maps"]
    names = [*audit.concepts["concept"].to_pylist(), *audit.responses["concept"].to_pylist(), *audit.info["contexts"]]
    assert set(places) == set(names)
    at = {name: np.array(places[name]) for name in names}
    # Contexts of one topic lie closer together than those of two.
    topic = {k: "soup" in entry["terms"] for k, entry in audit.info["contexts"].items() if k[0] == "B" and k != "B0"}
    near = [np.linalg.norm(at[a] - at[b]) for a in topic for b in topic if a < b and topic[a] == topic[b]]
    far = [np.linalg.norm(at[a] - at[b]) for a in topic for b in topic if a < b and topic[a] != topic[b]]
    assert set(topic.values()) == {True, False}
    assert np.mean(near or [0.0]) < np.mean(far)
