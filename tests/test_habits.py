"""The library of habits: what is counted, what only looks like it, places, one's own, and what the documents say."""

import time
from pathlib import Path

import numpy as np
import pytest

from trl_anatomy import AnatomyError
from trl_anatomy.reading.habits import ALSO, HABITS, TOKENS, Habit, find_habit, habit_table, measure, read_habits
from trl_anatomy.reading.habits.parts import PARTS, Parts

CODE = "```python\n# Header\n- x\n1. y\n**kwargs and **more**\n| a | b |\nI = 'I am sorry!'\nhttps://a.b\n```\n"
# habit -> (responses that have it, responses that do not)
RESPONSES: dict[str, tuple[list[str], list[str]]] = {
    "bold": (
        [
            "Use **two** eggs.",
            "1. **Heat the oil:** until hot",
            "这是**粗体**字。",
            "<b>Note</b>: read on",
            "***Both*** of it",
        ],
        [
            CODE,
            "The area is 2**3 and 4**5 units",
            "Call `f(**kw)` and `g(**kw)`",
            "* one item\n* another item",
            "a ** b ** c",
        ],
    ),
    "italic": (
        ["*waves at you* Hello!", "the word _never_ is", "in <em>this</em> case", "from *The Times* today"],
        ["* one\n* two", "the variable snake_case_name", "5*3*2 is 30", "**only bold**", "Name: ____ Date: ____"],
    ),
    "header": (
        ["# Title\ntext", "Intro\n\n### 1. Steps\n", "## Zusammenfassung"],
        [CODE, "#hashtag and #more", "We are number # 1", "issue #12 was closed"],
    ),
    "bullet": (
        ["You need:\n- flour\n- eggs", "* **Milk:** one cup", "• Paris\n• Rome", "1. A\n   - nested"],
        [CODE, "Intro\n---\nmore", "* * *", "a well-known half-truth", "| - | - |\n", "- | -", "-5 degrees"],
    ),
    "numbered": (
        ["1. Mix\n2. Bake", "Steps:\n  1) open\n  2) close", "10. The tenth"],
        [
            CODE,
            "1990. It was a good year",
            "## 1. Introduction\ntext",
            "**1. Heading**\ntext",
            "It costs 3.50 in 2. Class",
        ],
    ),
    "table": (
        ["| a | b |\n|---|---|\n| 1 | 2 |", "Name | Age\n--- | ---\nBob | 3", "|a|b|\n|:--|--:|\n|1|2|"],
        [CODE, "a | b", "the value |x| = |-x|", "cat file | grep x | sort", "---\ntext\n---"],
    ),
    "horizontal_rule": (
        ["a\n\n---\n\nb", "***\n", "x\n_____\ny"],
        ["a --- b", "--- | ---", "- - a", "```\n---\n```"],
    ),
    "code_fence": (
        ["```py\nx\n```", "Run this:\n```\nls\n```", "```js\ncut off"],
        ["use `ls` here", "'''docstring'''", "~~~", "no code"],
    ),
    "inline_code": (
        ["use `ls` here", "the `--flag` option\n```\nx\n```", "set `x = 1`."],
        ["```py\nx\n```", "``quoted'' as in TeX", "it's a 'word'", "a ` alone"],
    ),
    "latex": (
        [r"so \(x^2\) is", "where $x_1 = 2$ holds", "$$\\frac{1}{2}$$", "\\[ a = b \\]", "of $10^5$ cells"],
        ["It costs $5 and $10.", "between $20 and $30 (USD)", "`$x = 1$` in shell", "the price is $3.50"],
    ),
    "link": (
        ["see https://a.org/x", "the [manual](docs/a.md) says", "at www.example.com today"],
        ["see a.org", "f[i](x) is called", "[1] and (2)", "`https://a.b`", "[a note] (in brackets)"],
    ),
    "emoji": (
        ["nice 😀", "✅ done", "Bravo 🇫🇷!", "I ❤️ it"],
        ["nice :)", "a → b ➔ c", "Acme™ © 2020", "你好", "① first ❶"],
    ),
    "em_dash": (
        ["so — yes", "he came—late", "“Wait”—no"],
        ["so - yes", "pages 3–5", "他说——不", "-- yes", "`a — b`"],
    ),
    "exclamation": (
        ["Yes! Of course.", "**Great!**", "太好了！", "It's 2024! Happy New Year", "Good luck :)!"],
        ["a != b", "if (!x) return", "![cat](cat.png)", "5! = 120", "n! / k!", "`Oh!`"],
    ),
    "opening_sure": (
        [
            "Sure! Here",
            "Certainly, the answer",
            "Of course. It",
            "**Absolutely!** Yes",
            "I'd be happy to help",
            "\n\nSure thing: x",
        ],
        [
            "I am sure it is",
            "Make sure that",
            "Surely not",
            "Absolutely not.",
            "The course of it",
            "Sure enough, he came",
        ],
    ),
    "opening_here": (
        ["Here are five ideas:", "Here's a poem", "Sure! Here is a list", "Below is the code", "Here’s why"],
        ["Here we go again", "Where is it", "There are five", "The answer is here: Here is", "Heres"],
    ),
    "flattery": (
        [
            "Great question! It",
            "What a wonderful idea.",
            "That's an excellent point.",
            "Excellent! Let's",
            "This is a really good question",
        ],
        [
            "The great wall",
            "Great Britain is an island",
            "Good morning",
            "Interesting facts about bees:",
            "Excellent service is",
        ],
    ),
    "closing_question": (
        ["It is. Does that help?", "Which one do you want?**", "你怎么看？", "Would you like more? 😊"],
        ["Why? Because it is.", "a ? b : c", "Who knows? Nobody.", "Ask “why?” and go on."],
    ),
    "closing_offer": (
        [
            "Done. Let me know if you need more.",
            "I hope this helps!",
            "If you have any questions, ask.",
            "Feel free to ask.",
            "Anything else I can do?",
        ],
        [
            "Let me know by Friday " + "x " * 300,
            "I hope to see Rome",
            "If you have a dog, walk it",
            "They feel free",
            "A letter of hope",
        ],
    ),
    "praise": (
        [
            "Yes, you're absolutely right.",
            "Well done! Next",
            "It was a great point, and",
            "I love how you put it",
            "Ah. Great job!",
        ],
        [
            "turn right",
            "a good job offer",
            "He said “well done!”",
            "They love how it works",
            "the right great question of our time",
        ],
    ),
    "apology": (
        [
            "I'm sorry to hear that.",
            "I apologize for the error",
            "Sorry, that was wrong",
            "My apologies!",
            "Sorry for the wait",
        ],
        [
            "a sorry state",
            'She said "I am sorry" and left',
            "> I'm sorry\nhe wrote",
            "sorrow",
            "`I'm sorry`",
            "an apologist",
        ],
    ),
    "refusal": (
        [
            "I'm sorry, but I can't help with that.",
            "I cannot provide this.",
            "As an AI, I am not able to give advice",
            "Unfortunately I won't write that.",
            "I must decline.",
            "I can’t assist with it",
        ],
        [
            "I can't wait to tell you",
            "I'm sorry to hear that you are ill. Rest.",
            "The sorry tale",
            "You cannot provide it",
            'He said "I cannot help you" and left',
            "I can help. " + "x " * 200 + "I cannot provide more.",
        ],
    ),
    "hedging": (
        ["it is perhaps so", "Maybe later", "I'm not sure", "It depends on", "I think so"],
        ["it is so", "in the month of May be kind", "the maybes", 'the word "perhaps"', "think about it", "I am sure"],
    ),
    "first_person": (
        ["I think so", "Let me see", "I’m here", "in my view", "So I did it myself"],
        [
            "World War I ended",
            "Type I errors",
            'He said "I am here"',
            "Elizabeth I was queen",
            "army and mystery",
            "I. Introduction",
            "menu",
        ],
    ),
    "as_an_ai": (
        [
            "As an AI language model, I",
            "I'm just an AI.",
            "I am a large language model",
            "my training data ends",
            "as an artificial intelligence",
        ],
        ["as an aid to", "I am an airman", "Train an AI model", "AI is big", "the virtual assistant market", "my data"],
    ),
    "quotation": (
        [
            'He said "come here" and',
            "the “roaring twenties”",
            "> quoted line",
            "er sagte «ja» dazu",
            "「こんにちは」と",
        ],
        ['a 5" x 7" photo', "it's John's", "2 > 1", '`print("x y")`', "no quotes"],
    ),
    "citation": (
        ["as shown [1].", "(Smith, 2020)", "(Potetz & Lee, 2003)", "Cecil et al. found", "doi:10.1/x"],
        ["a[1] = 2", "the list [1, 2, 3]", "[1](http://a.b)", "(Avtomat Kalashnikova 1947)", "(in 2020)", "(May 2020)"],
    ),
    "other_script": (
        ["Привет, как дела?", "你好，世界", "नमस्ते दुनिया", "こんにちは"],
        [
            "The word 水 means water",
            "Café über naïve",
            "12345 !!!",
            "",
            "Ελλάδα is the Greek name of Greece, a country",
        ],
    ),
    "other_language": (
        [
            "El perro es de los vecinos, pero no lo sabe.",
            "Das ist nicht ein Hund und die Katze ist auch da.",
            "Привет, как дела?",
            "Les chats sont dans la maison et je ne les vois pas.",
            "这是中文",
        ],
        [
            "The dog is in the house.",
            "Los Angeles, Las Vegas, San Jose, Los Gatos",
            "Paris\nRome\nBerlin",
            "",
            "def f(x): return x",
            "La Bohème, The Magic Flute and other operas are on stage in the city",
        ],
    ),
}
# measure -> (response, value)
AMOUNTS: dict[str, list[tuple[str, float]]] = {
    "words": [("one two\nthree", 3), ("你好，世界", 4), ("东京 is big", 4), ("", 0), ("สวัสดี", 6), ("Привет мир", 2)],
    "sentences": [
        *(("It is. Is it? Yes!", 3), ("Dr. Smith met Mr. Jones, e.g. at 5 p.m. sharp.", 2), ("1. Bread\n2. Milk", 1)),
        *(("It costs 3.50 in v. 2.", 1), ("你好。世界！", 2), ('He said "go." Then left.', 2), ("", 0), ("no end", 1)),
    ],
    "paragraphs": [("One.\n\nTwo.", 2), ("a\nb", 1), ("\n\na\n \n\n\nb\n\nc\n", 3), ("", 0)],
    "repetition": [("a b c d a b c d", 0.2), ("a b c", 0), ("x x x x x x", 2 / 3), ("The cat is on the cat", 0)],
    "digits": [
        *(("1. Pay $5.00\n2. Or 3", 100 * 2 / 6), ("in 2004 he", 100 / 3), ("none", 0), ("", 0), ("x1 and y2", 0)),
        ("# 1. Head\nten", 0),
    ],
}


@pytest.mark.parametrize("name", RESPONSES)
def test_what_has_the_habit_and_what_only_looks_like_it(name: str) -> None:
    habit, (having, lacking) = HABITS[name], RESPONSES[name]
    assert len(having) >= 3
    assert len(lacking) >= 3
    assert {text: habit.value(text) for text in having} == dict.fromkeys(having, 1.0)
    assert {text: habit.value(text) for text in lacking} == dict.fromkeys(lacking, 0.0)


@pytest.mark.parametrize("name", AMOUNTS)
def test_amounts(name: str) -> None:
    for text, wanted in AMOUNTS[name]:
        assert HABITS[name].value(text) == pytest.approx(wanted), text


def test_every_habit_of_the_library_has_its_examples() -> None:
    assert {*RESPONSES, *AMOUNTS, TOKENS} == {*HABITS}


@pytest.mark.parametrize("name", RESPONSES)
def test_what_is_passed_over_unsearched_would_not_have_been_found(name: str) -> None:
    """`needs` is a way out, not a condition: without it the answers are the same, in upper case too."""
    habit = HABITS[name]
    plain = Habit(name, habit.description, habit.says, pattern=habit.pattern, measure=habit.measure, reads=habit.reads)
    every = [text for having, lacking in RESPONSES.values() for text in (*having, *lacking)]
    every += [text.upper() for text in every]
    assert [habit.value(text) for text in every] == [plain.value(text) for text in every]


def test_places_are_those_of_the_text() -> None:
    text = "`**no**` and\n" + "“**quoted**” then **yes**, İ **ja**\n"
    assert [text[a:b] for a, b in HABITS["bold"].spans(text)] == ["**quoted**", "**yes**", "**ja**"]
    ending = "Line. " * 100 + "I hope this helps!\n\n"
    assert [ending[a:b] for a, b in HABITS["closing_offer"].spans(ending)] == ["I hope this helps"]
    opening = "\n\n  Sure! Here"
    assert [opening[a:b] for a, b in HABITS["opening_sure"].spans(opening)] == ["Sure"]
    assert HABITS["words"].spans(text) == HABITS["other_script"].spans("你好") == []


@pytest.mark.parametrize("text", [CODE, 'a `b` "c" “d”\n> e\nf', "~~~\nx\n~~~\n“a\nb”", "İ `İ` “İ”", ""])
def test_parts_keep_places_and_lines(text: str) -> None:
    parts = Parts(text)
    for name in PARTS:
        part, at = parts.part(name)
        assert len(part) <= len(text) - at
        assert [i for i, c in enumerate(part) if c == "\n"] == [
            i for i, c in enumerate(text[at : at + len(part)]) if c == "\n"
        ]
        assert all(a in (b, "\ufffc") for a, b in zip(part, text[at:], strict=False))


def test_measure_is_the_value_of_each() -> None:
    texts = ["**a**! b", "", "I'm sorry, but no."]
    found = measure(texts, HABITS)
    assert found.shape == (3, len(HABITS))
    for k, habit in enumerate(HABITS.values()):
        if habit.name == TOKENS:
            assert np.isnan(found[:, k]).all()
        else:
            assert found[:, k].tolist() == [habit.value(text) for text in texts]
    assert measure([], HABITS).shape == (0, len(HABITS))


def test_two_hundred_pairs_take_a_second() -> None:
    """The bound is loose, for machines that are shared; a pattern that runs away takes minutes."""
    line = (
        'We use **bold**, "quotes", `code` and [links](https://a.b): I think 3 of them, e.g. here! \n- It is *so*?\n\n'
    )
    texts = [line * 20 + str(i) for i in range(400)]
    start = time.process_time()
    measure(texts, HABITS)
    assert time.process_time() - start < 4


@pytest.mark.parametrize(
    "text",
    [
        "*" * 20000,
        "_ " * 10000,
        "`" * 9999,
        '"' * 9999,
        "(A" * 9000,
        "| " * 9000,
        "$" * 9999,
        "\n" * 9999,
        "I am " * 5000,
        "[" * 9999,
        "- " * 9999,
        "--|" * 5000,
        ">" * 9999,
        "A, " * 9000,
        "# " * 9999,
        "“" * 9999,
        "**a " * 5000,
        "$a" * 9000,
        "<" * 9999,
        "http" * 5000,
    ],
)
def test_no_text_makes_a_pattern_run_away(text: str) -> None:
    start = time.process_time()
    measure([text], HABITS)
    assert time.process_time() - start < 5


def test_other_names_lead_to_a_habit() -> None:
    assert find_habit("numbered_list") is HABITS["numbered"]
    assert find_habit("bold") is HABITS["bold"]
    assert not {*ALSO} & {*HABITS}
    assert {*ALSO.values()} <= {*HABITS}
    with pytest.raises(AnatomyError, match=r"found habit 'bolt', allowed: bold, .*Did you mean 'bold'\?"):
        find_habit("bolt")


def test_own_habits_from_yaml_and_from_python(tmp_path: Path) -> None:
    file = tmp_path / "habits.yaml"
    file.write_text("habits:\n  wow: '(?i)\\bwow\\b'\n  in_code: 'x = 1'\n", encoding="utf-8")
    own = read_habits(file)
    assert measure(["Wow, yes", "`x = 1`", "wowed"], own).tolist() == [[1, 0], [0, 1], [0, 0]]
    assert read_habits({"a": "b"})["a"].spans("abab") == [(1, 2), (3, 4)]
    long = Habit("long", "More than three words.", "are long", measure=lambda text: float(len(text.split()) > 3))
    mean = Habit("commas", "Commas.", "commas", kind="mean", unit="commas", measure=lambda text: float(text.count(",")))
    assert measure(["a, b, c, d", "a"], {"long": long, "commas": mean}).tolist() == [[1, 3], [0, 0]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("habits: {bold: x}", "bold is a habit of the library"),
        ("habits: {numbered_list: x}", "numbered_list is a habit of the library"),
        ("habits: {a: '('}", "is not a regular expression"),
        ("habits: {a: 3}", "allowed: a regular expression"),
        ("habits: {'a b': x}", "a name is made of"),
        ("habits: []", "found no habits"),
        ("rules: {a: b}", "write the key habits"),
        ("habits: {a: [}", "not valid YAML"),
        ("", "write the key habits"),
    ],
)
def test_own_habits_that_are_none(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(AnatomyError, match=told) as error:
        read_habits(file)
    assert "own.yaml" in str(error.value)


def test_a_habit_that_cannot_be() -> None:
    with pytest.raises(AnatomyError, match="no such file of habits"):
        read_habits("nowhere/habits.yaml")
    with pytest.raises(AnatomyError, match="one of the two"):
        Habit("a", "", "")
    with pytest.raises(AnatomyError, match="a rate, not a mean"):
        Habit("a", "", "", kind="mean", pattern="x")
    with pytest.raises(AnatomyError, match="allowed: 0 or 1"):
        Habit("a", "", "", measure=lambda text: 2.0).value("x")
    with pytest.raises(AnatomyError, match="allowed: a finite number"):
        Habit("a", "", "", kind="mean", measure=lambda text: float("nan")).value("x")


def test_the_page_of_habits_is_the_library() -> None:
    assert habit_table() in (Path(__file__).parents[1] / "docs" / "reference" / "habits.md").read_text(encoding="utf-8")
