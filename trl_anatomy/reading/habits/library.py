"""The library of habits: what a person would name after reading fifty pairs. Each can be checked by eye."""

from collections.abc import Mapping

from . import counts
from .habit import TOKENS, Habit
from .parts import PARTS

_REFUSED = (
    "help|assist|provide|do|create|write|generate|give|share|fulfil+|comply|engage|support|answer|discuss|offer|produce|"
    "continue|encourage|complete|participate|make|suggest|promote|condone|respond|access|browse|satisfy|recommend|"
    "advise|process|perform|tell|teach|explain|describe|send|translate|endorse|accept|agree|allow|be able|feel|have|"
    "see|view|open|predict|identify|determine|verify|speak|express|use|show"
)
_UNABLE = (
    r"i(?: can(?:['’]?t|not| not)| won['’]?t| will not| do(?:n['’]?t| not) have the ability| could not| couldn['’]t|"
    r"(?: am|['’]m) (?:unable|not able|not comfortable|not allowed|not programmed))"
)
# Numerals, not the writer
_ROMAN = "".join(
    f"(?<!{word} I)"
    for word in (
        *("War", "Type", "Part", "Phase", "Class", "Act", "Grade", "Stage", "Book"),
        *("Elizabeth", "Charles", "James", "Francis", "Napoleon", "Henry"),
    )
)
_ADJECTIVES = ("great", "good", "excellent", "fantastic", "amazing", "brilliant", "wonderful")
_DEEDS = ("job", "question", "point", "thinking", "idea")
_AN_AI = r"an? (?:\w+ )?(?:ai|a\.i\.|artificial intelligence|(?:large )?language model|virtual assistant|chatbot)\b"

_LOOKS = (
    Habit(
        "bold",
        "`**text**` or `<b>`",
        "use bold",
        pattern=r"\*\*(?<![A-Za-z0-9*\\]\*\*)\*?(?=[^\s*])(?:[^*\n]|\*(?!\*))*?(?<=[^\s*])\*\*|<(?:b|strong)>",
        needs=("**", "<b>", "<strong>"),
    ),
    Habit(
        "italic",
        "`*text*`, `_text_`, `<i>` or `<em>`",
        "use italics",
        pattern=r"\*(?<![\w*\\]\*)(?=[^\s*])[^*\n]*?(?<=[^\s*])\*(?![\w*])|"
        r"_(?<![\w\\]_)(?=[^\s_])[^_\n]*?(?<=[^\s_])_(?!\w)|<(?:i|em)>",
        needs=("*", "_", "<i>", "<em>"),
    ),
    Habit(
        "header",
        "a line that begins with `#` to `######`",
        "use headings",
        pattern=r"(?m)^ {0,3}#{1,6}[ \t]+(?=\S)",
        needs=("# ", "#\t"),
    ),
    Habit(
        "bullet",
        "a line that begins with `-`, `*` or a bullet sign and a blank",
        "use bullets",
        pattern=r"(?m)^[ \t]*[-*•‣◦●▪][ \t]+(?=\S)(?!\||(?:[-*_][ \t]+)*[-*_][ \t]*$)",
        needs=("- ", "* ", "•", "‣", "◦", "●", "▪", "-\t", "*\t"),
    ),
    Habit(
        "numbered",
        "a line that begins with a number of up to three digits, `.` or `)` and a blank",
        "use numbered lists",
        pattern=r"(?m)^[ \t]*\d{1,3}[.)][ \t]+(?=\S)",
        needs=(". ", ") ", ".\t", ")\t"),
    ),
    Habit(
        "table",
        "a row between pipes, or the rule under a table's head, with or without outer pipes",
        "use tables",
        pattern=r"(?m)^[ \t]*\|[ \t]+\S.*[ \t]\|[ \t]*$|"
        r"^[ \t]*\|?[ \t]*:?-{2,}:?[ \t]*(?:\|[ \t]*:?-{2,}:?[ \t]*)+\|?[ \t]*$",
        needs=("|",),
    ),
    Habit(
        "horizontal_rule",
        "a line of three or more `-`, `*` or `_`",
        "use horizontal rules",
        pattern=r"(?m)^[ \t]*(?:-{3,}|\*{3,}|_{3,})[ \t]*$",
        needs=("---", "***", "___"),
    ),
    Habit(
        "code_fence",
        "a code block between three backticks",
        "use code blocks",
        pattern="```",
        reads="text",
        needs=("```",),
    ),
    Habit(
        "inline_code",
        "`text` between single backticks, outside code blocks",
        "use inline code",
        pattern=r"`(?<!``)(?!`)[^`\n]+`(?!`)",
        reads="unfenced",
        needs=("`",),
    ),
    Habit(
        "latex",
        "a formula between `$`, `$$`, `\\(` or `\\[`; an amount of money is none",
        "use formulas",
        pattern=r"\\\(.+?\\\)|\\\[[\s\S]+?\\\]|\$\$[^$]+\$\$|"
        r"\$(?<![\\\w$]\$)(?=[^\s$])[^$\n]*?[\\^_={][^$\n]*?(?<=\S)\$(?!\d)",
        needs=("$", "\\(", "\\["),
    ),
    Habit(
        "link",
        "a web address, or a link of Markdown",
        "use links",
        pattern=r"https?://[^\s)\]>]+|\[(?<![A-Za-z0-9_]\[)[^\]\n]+\]\([^)\s]+[^)\n]*\)|www\.\w[^\s)\]>]+",
        needs=("://", "](", "www."),
    ),
    Habit(
        "emoji",
        "a pictograph, dingbat or flag; arrows and signs such as © are none",
        "use emoji",
        pattern="[\U0001f1e6-\U0001f1ff\U0001f300-\U0001faff\u2600-\u2775\u2795-\u2797\u27b0\u27bf\u2b50\u2b55]+",
    ),
    Habit(
        "em_dash",
        "a single em dash; the double one of Chinese is none",
        "use em dashes",
        pattern="—(?<!——)(?!—)",
        needs=("—",),
    ),
    Habit(
        "exclamation",
        "an exclamation mark after a word; `!=`, images and factorials are none",
        "use exclamation marks",
        pattern=r"[!！](?<=[\w)\]\"'”’*~][!！])(?![\w=\[]|\s*[=/^×·])(?<!\d[!！])(?<![\s/(+=*-][a-z]!)|[!！](?<=\d[!！])(?=\s+[A-Z]|\s*$)",
        needs=("!", "！"),
    ),
)

_SAYS = (
    Habit(
        "opening_sure",
        "begins with “Sure”, “Certainly”, “Of course”, “Absolutely”, “I'd be happy to”, ...",
        "open with “Sure”, “Certainly” or the like",
        pattern=r"(?i)^\W*(?:sure(?: thing)?|certainly|of course|absolutely|definitely|no problem|gladly|"
        r"(?:i(?:['’]d| would) be|i['’]m) (?:more than )?(?:happy|glad|delighted) to)\b(?! (?:not|enough|as|that)\b)",
        reads="opening",
    ),
    Habit(
        "opening_here",
        "begins with “Here is”, “Here are”, “Below is”, ..., also after “Sure”",
        "open with “Here is”",
        pattern=r"(?i)^\W*(?:(?:sure|certainly|of course|absolutely)\b[^\w\n]*(?:thing)?\W*)?"
        r"(?:here(?:['’]s|['’]re|\s+is|\s+are|\s+you go)|below (?:is|are|you will find))\b",
        reads="opening",
    ),
    Habit(
        "flattery",
        "begins with praise of the question or its writer",
        "open with praise",
        pattern=r"(?i)^\W*(?:(?:what|that(?:['’]s| is| sounds like)|this is|you(?:['’]ve| have) asked)\s+)?"
        r"(?:such\s+)?(?:an?\s+)?(?:really\s+|very\s+|truly\s+|absolutely\s+)?"
        r"(?:great|excellent|wonderful|fantastic|brilliant|amazing|awesome|fascinating|interesting|insightful|"
        r"thoughtful|good|lovely|superb|impressive)"
        r"(?:(?: \w+)? (?:question|idea|choice|point|request|topic|observation|insight|job|work|start|thought|thinking|"
        r"goal|plan|project|decision|news)\b|(?=[!.,:])(?!, but))",
        reads="opening",
    ),
    Habit(
        "closing_question",
        "ends with a question mark",
        "end with a question",
        pattern=r"(?<![^.!?。！？\n])[^.!?。！？\n]*+[?？]\W*$",
        reads="ending",
        needs=("?", "？"),
    ),
    Habit(
        "closing_offer",
        "ends with an offer of more help: “Let me know if”, “I hope this helps”, ...",
        "end with an offer of more help",
        pattern=r"(?i)\b(?:let me know (?:if|what|how|which|whether)|feel free to (?:ask|reach|let|share|contact)|"
        r"(?:i )?hope (?:this|that|it|these) (?:helps?|information|answers?)|"
        r"if you (?:have|['’]d like|need|want|would like) "
        r"(?:any |some |more |me |further |additional |help |to (?:know|learn|see|discuss|explore))|"
        r"(?:is there )?anything else (?:i can|you)|would you like (?:me|to|some|more|help)|"
        r"do you (?:want|need) (?:me|more|any)|(?:happy|glad|here) to help|(?:do not|don['’]t) hesitate to)",
        reads="ending",
        needs=(
            *("let me know", "feel free", "hope", "if you", "anything else", "would you like", "do you"),
            *("to help", "hesitate"),
        ),
    ),
    Habit(
        "praise",
        "praise of the reader anywhere: “you're absolutely right”, “great question!”, “well done”",
        "praise the reader",
        pattern=r"(?i)\byou(?:['’]re| are) (?:absolutely|so|completely|totally|exactly|quite|very|really) right\b|"
        rf"\bwell done\b[!.,]|\b(?:{'|'.join(_ADJECTIVES)}) (?:{'|'.join(_DEEDS)})[!.,]|"
        r"\bi (?:really |truly |deeply )?(?:love|admire|applaud|commend) (?:your|that you|how you|you for)\b",
        reads="spoken",
        needs=(
            *("y right", "so right", "quite right", "well done", "love your", "love that", "love how"),
            *("admire", "applaud", "commend"),
            *(f"{adjective} {deed}" for adjective in _ADJECTIVES for deed in _DEEDS),
        ),
    ),
    Habit(
        "apology",
        "the writer says sorry; the word in a quotation is none",
        "apologise",
        pattern=r"(?i)\b(?:i['’]?m|i am|we are|we['’]re) (?:so |very |really |truly |terribly |deeply )*sorry\b|"
        r"\bi (?:do |sincerely |must )?apologi[sz]e\b|\b(?:my|our) (?:\w+ )?apolog(?:y|ies)\b|"
        r"\bapologies (?:for|if|but)\b|\bsorry (?:for|about|if|but|to hear|to say|that i|i|we)\b|"
        r"^\W*sorry\b(?! (?:state|tale|sight))",
        reads="spoken",
        needs=("sorry", "apolog"),
    ),
    Habit(
        "refusal",
        "the opening declines the request",
        "refuse",
        pattern=r"(?i)^\W*(?:i['’]?m|i am) (?:so |very |really )?sorry,? (?:but|i can|however|as an)|"
        rf"\b{_UNABLE}(?: and will not| and won['’]t| ethically| legally| really| with)?(?: to)? (?:{_REFUSED})\b|"
        rf"\b{_UNABLE} (?:with )?\w+ing\b|"
        r"\bi(?: must| have to| need to| will have to|['’]ll have to) (?:respectfully |politely )?(?:decline|refuse)\b|"
        r"^\W*sorry,? (?:but )?i (?:can|don|am|won)",
        reads="opening",
        needs=(
            *("i'm", "i’m", "i am", "i can", "i won", "i will", "i do", "i must", "i have", "i need", "i could"),
            *("i'll", "i’ll", "sorry"),
        ),
    ),
    Habit(
        "hedging",
        "a word of doubt: “perhaps”, “maybe”, “might be”, “it depends”, “I think”, ...",
        "hedge",
        pattern=r"(?i)\b(?:perhaps|maybe|might be|it depends|i think|possibly|i believe|it seems|presumably|arguably|"
        r"i(?: am|['’]m) not (?:entirely )?sure)\b",
        reads="spoken",
        needs=(
            *("perhaps", "maybe", "might be", "depends", "i think", "possibly", "i believe", "it seems"),
            *("not sure", "not entirely sure", "presumably", "arguably"),
        ),
    ),
    Habit(
        "first_person",
        "the writer says I, me or my; a numeral such as “World War I” is none",
        "speak in the first person",
        pattern=rf"[IMm](?<!\w[IMm])(?:(?<=I)(?:['’](?:m|ve|ll|d)\b|{_ROMAN}(?= [a-z]))|(?<=[Mm])(?:e|y|yself)\b)",
        reads="spoken",
    ),
    Habit(
        "as_an_ai",
        "the writer calls itself an AI, a language model or a virtual assistant",
        "call themselves an AI",
        pattern=rf"(?i)\bas {_AN_AI}|\bi(?:['’]m| am) (?:just |only |simply )?{_AN_AI}|"
        r"\bmy (?:training data|knowledge cutoff|programming)\b",
        reads="spoken",
        needs=(
            *(" ai", "a.i.", "artificial", "language model", "virtual assistant", "chatbot"),
            *("my training", "cutoff", "my programming"),
        ),
    ),
    Habit(
        "quotation",
        "words between quotation marks, or a line quoted with `>`; inches are none",
        "use quotation marks",
        pattern=r'"(?<!\w")(?=\S)[^"\n]{2,400}(?<=\S)"|“[^”\n]{2,400}”|«[^»\n]{2,400}»|'
        r"「[^」\n]{2,400}」|(?m:^[ \t]*> ?\S)",
        needs=('"', "“", "«", "「", ">"),
    ),
    Habit(
        "citation",
        "`[1]`, “(Smith, 2020)”, “et al.” or a DOI; the index of an array is none",
        "cite sources",
        pattern=r"\[(?<![\w)]\[)\d{1,3}(?:[-–]\d{1,3})?\](?=[\s.,;:)\[]|$)|"
        r"\([A-Z][\w’'.-]+(?:,? (?:and |& )?[A-Z][\w’'.-]+){0,4}(?:,| et al\.?,?) "
        r"(?:19|20)\d\d[a-z]?(?:, pp?\. ?\d+)?\)|"
        r"et al\b|doi(?:\.org|:)",
        needs=("[", "(", "et al", "doi"),
    ),
    Habit(
        "other_script",
        "at least a third of the letters are not Latin",
        "are in another script",
        measure=counts.other_script,
    ),
    Habit(
        "other_language",
        "another language than English, by script and commonest words",
        "are in another language",
        measure=counts.other_language,
    ),
)

_AMOUNTS = (
    Habit(
        TOKENS,
        "tokens, after template and truncation; only with a tokenizer",
        "tokens",
        kind="mean",
        unit="tokens",
        reads="text",
    ),
    Habit(
        "words",
        "words; in scripts without blanks characters",
        "words",
        kind="mean",
        unit="words",
        reads="text",
        measure=counts.words,
    ),
    Habit(
        "sentences",
        "sentences, by the signs that end them",
        "sentences",
        kind="mean",
        unit="sentences",
        measure=counts.sentences,
    ),
    Habit(
        "paragraphs",
        "blocks between blank lines",
        "paragraphs",
        kind="mean",
        unit="paragraphs",
        reads="text",
        measure=counts.paragraphs,
    ),
    Habit(
        "repetition",
        "share of runs of four words that stood before in the response",
        "repeat their wording",
        kind="mean",
        unit="share",
        measure=counts.repetition,
    ),
    Habit(
        "digits",
        "numbers in figures per 100 words, without those of lists and headings",
        "use numbers",
        kind="mean",
        unit="per 100 words",
        measure=counts.numerals,
    ),
)

HABITS: Mapping[str, Habit] = {habit.name: habit for habit in (*_LOOKS, *_SAYS, *_AMOUNTS)}
"""The library, by name."""

ALSO: Mapping[str, str] = {
    "heading": "header",
    "bullet_list": "bullet",
    "numbered_list": "numbered",
    "code_block": "code_fence",
    "code": "code_fence",
    "follow_up": "closing_question",
    "opening_praise": "flattery",
    "ai_selfref": "as_an_ai",
    "language": "other_language",
    "script": "other_script",
    "length": "words",
}
"""Other names under which a habit is found, and its name."""

LENGTHS = (TOKENS, "words", "sentences", "paragraphs")
"""The habits that say how long a response is, the surest first."""

FORMATTING = ("bold", "italic", "header", "bullet", "numbered", "table", "horizontal_rule")
"""The habits that say how a response is laid out."""


def habit_table() -> str:
    """The library as a Markdown table."""
    also: dict[str, list[str]] = {}
    for other, name in ALSO.items():
        also.setdefault(name, []).append(f"`{other}`")
    lines = ["| name | counted | looked for | as |", "|---|---|---|---|"]
    for habit in HABITS.values():
        names = f"`{habit.name}`" + (f" ({', '.join(also[habit.name])})" if habit.name in also else "")
        counted = habit.description.replace("|", r"\|")
        lines.append(f"| {names} | {counted} | {PARTS[habit.reads]} | {habit.kind} |")
    return "\n".join(lines)
