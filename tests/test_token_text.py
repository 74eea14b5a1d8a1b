"""Characters and tokens of real tokenizations, of every kind of tokenizer, found from each other."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from reading_world import build_tokenizer

from trl_anatomy.reading.firings import token_texts
from trl_anatomy.reading.token_text import decode, token_text, tokens_of, whole_words, words

TEXT = " It is **bold** — naïve 😀🇫🇷 café.\n\n- item —\n\n日本語 end"


def tokenizer_of(kind: str) -> Any:
    """A tokenizer of a kind, trained on the text (all but `bytes` know its characters)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "byte-level BPE":
        return build_tokenizer()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if kind == "byte fallback":  # as Llama 2: characters, and bytes for those that it does not know
        vocab = [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Itisbolde.*\n-afm", "bo", "ld"]
        model = models.BPE({t: i for i, t in enumerate(vocab)}, [("b", "o"), ("l", "d")], byte_fallback=True)
        backend = Tokenizer(model)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        backend.train_from_iterator(
            [TEXT], trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
        )
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
        backend.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=60, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("kind", ["byte-level BPE", "byte fallback", "unigram", "word pieces"])
def test_texts_of_tokens_are_the_text(kind: str) -> None:
    """For the page, special tokens too: no blank is lost before a character in parts, and no character comes twice."""
    tokenizer = tokenizer_of(kind)
    for text in (TEXT, "bold — bold  — it\n→ a", "It^β is ^^β^ b\u00a0d", "\ufffd a \ufffd"):
        every = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for ids in (every, every[3:], []):
            texts = token_texts(tokenizer, ids)
            assert len(texts) == len(ids)
            assert "".join(texts) == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["byte-level BPE", "byte fallback", "unigram", "word pieces"])
def test_every_token_has_its_own_characters(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    text, bounds = token_text(tokenizer, ids)
    assert text == decode(tokenizer, ids)
    assert bounds[-1].tolist() == [len(text), len(text)], "the end of sequence has no text"
    assert (bounds[1:, 0] >= bounds[:-1, 0]).all()
    # Without a hole, and overlapping only where tokens are bytes of one character
    assert bounds[0, 0] == 0
    for (begin, end), (following, _) in pairwise(bounds):
        assert following in (begin, end)
    if "byte" in kind:
        assert text.strip() == TEXT.strip()
        emoji = text.index("😀")
        n_bytes = tokens_of(np.arange(len(text)) == emoji, bounds).sum()
        assert n_bytes == 4
        dash = tokens_of(np.array([c == "—" for c in text]), bounds)
        assert {text[a:b].strip() for a, b in bounds[dash]} == {"—"}
        assert dash.sum() >= 2 * 2
    # Each token decodes to what is said of it, but for blanks at its front and bytes of a character
    for token, (begin, end) in zip(ids, bounds, strict=True):
        alone = decode(tokenizer, [token]).strip()
        if "\ufffd" not in alone:
            assert alone.removeprefix("##") == text[begin:end].strip()


def test_response_in_the_middle_of_a_character() -> None:
    """Truncation may cut within a character; what is left of it is nobody's text but costs no token its own."""
    tokenizer = build_tokenizer()
    ids = tokenizer("a 😀")["input_ids"][1:-2]
    text, bounds = token_text(tokenizer, ids)
    assert text == decode(tokenizer, ids)
    assert len(bounds) == len(ids)


def test_whole_words() -> None:
    text = "one (two) three"
    marked = np.zeros(len(text), bool)
    marked[text.index("w")] = True
    assert "".join(c for c, m in zip(text, whole_words(text, marked), strict=True) if m) == "(two)"
    marked[:] = False
    marked[3] = True  # a blank belongs to no word
    assert whole_words(text, marked).tolist() == marked.tolist()


@pytest.mark.parametrize(
    ("text", "sign", "gone"),
    [
        ("今天天气很好，这里有三个步骤！", "！", "！"),
        ("天気はいいですね。テレビを見る", "ビ", "テレビ"),  # a run of katakana is a word
        ("สวัสดีครับ! ดีมาก", "!", "!"),
        ("ខ្ញុំស្រឡាញ់អ្នក។ ល្អ", "។", "។"),
        ("用 **bold** 写 iPhone15 真好", "o", "**bold**"),
        ("안녕하세요 (세계)! 좋다", "!", "(세계)!"),  # Korean has blanks
        ("It is (so), isn't it?", "(", "(so),"),
    ],
)
def test_a_word_of_a_language_without_blanks_is_not_the_whole_sentence(text: str, sign: str, gone: str) -> None:
    marked = np.zeros(len(text), bool)
    marked[text.index(sign)] = True
    assert "".join(c for c, m in zip(text, whole_words(text, marked), strict=True) if m) == gone
    assert "".join(text[start:stop] for start, stop in words(text)) == "".join(text.split())


def test_clusters_of_signs_stay_whole() -> None:
    """A vowel or tone sign of Thai belongs to the sign that it stands on, and a skin tone to its emoji."""
    for text, parts in (("ที่นี่", ["ที่", "นี่"]), ("好👍🏽", ["好", "👍🏽"])):
        assert [text[start:stop] for start, stop in words(text)] == parts
