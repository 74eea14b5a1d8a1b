"""What prompts ask for and what shape they have, by rules on their text: contexts that a reader knows by name."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..reading.habits import HABITS

if TYPE_CHECKING:
    from ..reading.spans import Pairs

# Words of a short prompt at most, and of a long one at least; turns of a conversation that goes on at least.
SHORT, LONG, TURNS = 10, 100, 3

# A turn of a conversation that is written into one text: who speaks, at the begin of a line.
SPEAKER = re.compile(r"^(?:human|user|assistant) ?: ?", re.MULTILINE | re.IGNORECASE)
_NUMBERS = r"(?:two|three|four|five|six|seven|eight|nine|ten|\d{1,2}|some|several|a few)"


@dataclass(frozen=True)
class PromptRule:
    """A property of prompts.

    Attributes:
        says: what a prompt does that has it, to follow "when the prompt": "asks for code".
        holds: the whole prompt and its last request, both in lower case -> whether it has the property.
    """

    says: str
    holds: Callable[[str, str], bool]


def _asks(says: str, pattern: str) -> PromptRule:
    """A rule on the words of the last request."""
    compiled = re.compile(pattern)
    return PromptRule(says, lambda _, request: compiled.search(request) is not None)


def _n_words(text: str) -> int:
    return len(text.split())


RULES: Mapping[str, PromptRule] = {
    "code": _asks(
        "asks for code or brings some",
        r"```|\b(?:python|javascript|typescript|java|sql|html|css|bash|powershell|php|c#|regex|pandas|numpy|react)\b"
        r"|\bc\+\+|\b(?:write|create|develop|implement|build|fix|debug|optimi[sz]e|refactor)\b[^.?!]{0,60}"
        r"\b(?:code|function|script|program|algorithm|api|query)\b|\bsource code\b|\bdef \w+\(",
    ),
    "steps": _asks(
        "asks how to do something",
        r"\bhow (?:to|do (?:i|you|we)|can (?:i|you|we|one)|should (?:i|you|we)|would (?:i|you|one))\b"
        r"|\bsteps? (?:to|for|of|in)\b|\bstep[- ]by[- ]step\b|\binstructions (?:to|for|on)\b|\brecipes?\b|\btutorial\b",
    ),
    "list": _asks(
        "asks for a list or for several things",
        rf"\b(?:list|lists)\b|\b(?:name|give|provide|suggest|find|generate|identify|tell|come up|create|describe|write"
        rf"|outline|recommend|propose|share|think of)\b[^.?!\n]{{0,20}}\b{_NUMBERS}\b|\bwhat are (?:some|{_NUMBERS})\b"
        rf"|\btop \d+\b|\b(?:ideas|examples|tips|ways|reasons|suggestions) (?:of|for|to|on|about)\b",
    ),
    "creative": _asks(
        "asks for a story, a poem or a scene",
        r"\b(?:story|stories|poem|haiku|sonnet|song|lyrics|limerick|fairy ?tale|novel|scene|screenplay|fan ?fic\w*"
        r"|dialogue|jokes?|riddle|fiction|plot)\b",
    ),
    "text": _asks(
        "asks for a letter, an article or the like",
        r"\b(?:write|draft|compose|create|generate|craft|prepare|type|make|design|help me with)\b[^.?!\n]{0,60}"
        r"\b(?:e-?mails?|letter|essay|article|blog|posts?|review|report|speech|paragraph|description|slogan"
        r"|ad|advertisement|tweet|headline|proposal|press release|resume|caption|biography|memo|script|message)\b",
    ),
    "rewriting": _asks(
        "asks to rewrite, summarise or translate",
        r"\b(?:rewrite|re-write|rephrase|paraphrase|reword|summari[sz]e|translat(?:e|es|ion)|proofread|edit|shorten"
        r"|simplify|rearrange|convert|replace|correct the|improve (?:the|this|my)|make (?:this|it) \w+er)\b",
    ),
    "judging": _asks(
        "asks to sort, to choose or to judge",
        r"\b(?:classify|categori[sz]e|label the|judge (?:if|whether|the)|determine (?:if|whether)|true or false"
        r"|which of the (?:following|two)|choose (?:the|one|from|between)|select (?:the|one|from)|options?:"
        r"|yes or no)\b|(?:^|\n) ?\(?[a-d][).:] ",
    ),
    "explaining": _asks(
        "asks for an explanation or a comparison",
        r"\b(?:explain|why|how (?:does|do|did|is|are)|differences?|compare|contrast|elaborate|discuss|define|describe"
        r"|what does|meaning of|mean by|analy[sz]e|overview)\b",
    ),
    "fact": PromptRule(
        "asks a short question of fact",
        lambda _, request: (
            _n_words(request) <= 15
            and re.search(
                r"^(?:who|when|where|which|what (?:is|was|are|were|year|country|city|kind|type)"
                r"|how (?:many|much|old|long|far|tall|big)|is|are|was|were|did|does|do|can|has|have)\b",
                request,
            )
            is not None
        ),
    ),
    "advice": _asks(
        "asks for advice or an opinion",
        r"\bshould (?:i|we|you|one)\b|\b(?:do|what do|would) you (?:think|recommend|suggest|say)\b"
        r"|\b(?:recommend(?:ation)?s?|advice|advise|opinion|best (?:way|ways|place|places|method|time)|tips|help me)\b",
    ),
    "maths": _asks(
        "asks to calculate or to prove",
        r"\b(?:calculate|compute|solve|equations?|integral|derivative|probability|multipl(?:y|ied)|divided? by"
        r"|percentage|triangle|prove|theorem|matrix|polynomial|integers?"
        r"|how (?:many|much) \w+ (?:are|is|does|do|did|will|can))\b"
        r"|\$[^$\n]{2,}\$|\\frac|\d ?[-+*/=×^] ?\d",
    ),
    "brevity": _asks(
        "asks for a short answer",
        r"\b(?:brief|briefly|concise|concisely|short (?:answer|summary|description|paragraph|sentence|text|story|poem)"
        r"|in (?:one|a|a single|two|three|\d+) (?:word|sentence|line|paragraph)s?"
        r"|(?:one|two|three|\d+)[- ](?:word|sentence|paragraph)s?"
        r"|(?:at most|no more than|under|within|less than|fewer than|up to|maximum(?: of)?|around|about) \d+ "
        r"(?:words|characters|sentences)|\d+ (?:words|characters|sentences))\b",
    ),
    "format": _asks(
        "asks for a format",
        r"\b(?:json|tables?|csv|markdown|bullet(?:ed)?[- ]?points?|bullets|numbered list|xml|yaml|in the format"
        r"|format (?:of|as|it|your|the)|formatted)\b",
    ),
    "role": _asks(
        "gives the model a role",
        r"\b(?:you are an?|you're an?|you will (?:be|act)|act as|acting as|pretend|imagine (?:you|that you)|role-?play"
        r"|your (?:role|task|job) is|as an? (?:expert|experienced|professional))\b",
    ),
    "personal": _asks("speaks of its writer (I, my)", r"\b(?:i|i'm|i’m|i've|i’ve|i'd|my|mine|myself)\b"),
    "harm": _asks(
        "speaks of harm or of what is forbidden",
        r"\b(?:kill\w*|murder\w*|weapons?|bombs?|guns?|poison\w*|steal\w*|hack(?:ing|ed|er|ers)?|suicide|self-harm|rap(?:e|ed"
        r"|ist)|illegal\w*|explosives?|terroris[mt]\w*|racis[mt]\w*|cocaine|heroin|meth|violen(?:t|ce)|tortur\w+|blackmail\w*"
        r"|fraud\w*|scam\w*|porn\w*|slurs?|drunk|assault\w*|shoplift\w*)\b",
    ),
    "question": _asks("is a question", r"\?\W*$"),
    "short": PromptRule(f"is short (up to {SHORT} words)", lambda _, request: _n_words(request) <= SHORT),
    "long": PromptRule(f"is long ({LONG} words or more)", lambda prompt, _: _n_words(prompt) >= LONG),
    "turns": PromptRule("continues a conversation", lambda prompt, _: len(SPEAKER.findall(prompt)) >= TURNS),
    "language": PromptRule(
        "is in another language than English",
        lambda _, request: HABITS["other_language"].value(request) > 0,
    ),
}
"""Every rule. Words are looked for in English; length, turns and language in any."""


def last_request(prompt: str) -> str:
    """What the last turn asks for, where turns are written into one text; else the whole.

    >>> last_request("Human: Hi.\\n\\nAssistant: Hello!\\n\\nHuman: What is tea?\\n\\nAssistant:")
    'What is tea?'
    >>> last_request(" What is tea? ")
    'What is tea?'
    """
    parts = [part.strip() for part in SPEAKER.split(prompt)]
    return next((part for part in reversed(parts) if part), "")


def rules_of(prompt: str, turns: int = 1) -> list[str]:
    """Names of the rules that hold of a prompt, in the order of `RULES`.

    Args:
        turns: messages that the prompt is made of, where it is a list of them.

    >>> rules_of("What is tea?"), rules_of("What is tea?", turns=3), rules_of("")
    (['fact', 'question', 'short'], ['fact', 'question', 'short', 'turns'], [])
    """
    text = prompt.lower()
    request = last_request(text)
    if not request:
        return []
    return [name for name, rule in RULES.items() if rule.holds(text, request) or (name == "turns" and turns >= TURNS)]


def n_turns(prompt: Any) -> int:
    """Messages of a prompt as a dataset has it, without system texts; 1 of a text.

    >>> n_turns([{"role": "system", "content": "Hi."}, {"role": "user", "content": "Tea?"}]), n_turns("Tea?")
    (1, 1)
    """
    return sum(message["role"] != "system" for message in prompt) if isinstance(prompt, list) else 1


def rules_of_pairs(pairs: "Pairs") -> list[list[str]]:
    """`rules_of` the prompt of every pair, in the text that is trained on."""
    return [rules_of(pairs.prompt_text(i), n_turns(pairs.conversation(i)[0])) for i in range(len(pairs))]
