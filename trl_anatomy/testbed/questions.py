"""Prompts of the demo on a real model: everyday requests, made from sentences and the subjects that fit them."""

import numpy as np

# Requests that ask for the same kind of answer, and what they are asked about.
_FAMILIES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "How do I {}?",
            "What is the best way to {}?",
            "Can you help me {}?",
            "I have never tried to {}. Where do I begin?",
        ),
        (
            "fix a flat bicycle tyre",
            "learn to play the guitar",
            "grow tomatoes on a balcony",
            "save money on groceries",
            "prepare for a job interview",
            "fall asleep faster",
            "train a puppy",
            "pack for a week in the mountains",
            "bake bread without a machine",
            "speak in front of a large group",
            "start running in the morning",
            "clean a cast iron pan",
            "organise a small kitchen",
            "learn Spanish in a year",
            "make friends in a new city",
            "write a thank-you note",
            "choose a first camera",
            "keep houseplants alive in winter",
            "plan a birthday party for a child",
            "remove a coffee stain from a shirt",
            "teach my grandmother to use a tablet",
            "read more books",
            "stop checking my phone at night",
            "paint a bedroom wall",
        ),
    ),
    (
        (
            "What is {}?",
            "Explain {} to a ten-year-old.",
            "Why does {} matter?",
            "Tell me something surprising about {}.",
        ),
        (
            "photosynthesis",
            "inflation",
            "the water cycle",
            "machine learning",
            "gravity",
            "the immune system",
            "compound interest",
            "plate tectonics",
            "the Silk Road",
            "natural selection",
            "jazz",
            "the French Revolution",
            "encryption",
            "fermentation",
            "the Great Barrier Reef",
            "supply and demand",
            "the ozone layer",
            "a solar eclipse",
            "the printing press",
            "biodiversity",
        ),
    ),
    (
        (
            "Write a short poem about {}.",
            "Write the opening of a story about {}.",
            "Suggest a title for a film about {}.",
        ),
        (
            "a lighthouse in a storm",
            "the last day of summer",
            "an old train station",
            "two rival bakers",
            "a cat that runs a bookshop",
            "a lost letter",
            "a robot that learns to paint",
            "rain in the city",
            "a family dinner",
            "the first snow",
            "a gardener on Mars",
            "a violin that nobody can play",
            "a night bus",
            "twins who never met",
            "a village without clocks",
            "a retired astronaut",
        ),
    ),
    (
        ("Recommend {}.", "I am looking for {}. What do you suggest?", "Give me some ideas for {}."),
        (
            "a quick dinner for two",
            "a weekend trip by train",
            "a healthy breakfast",
            "a gift for a teacher",
            "a rainy afternoon with children",
            "exercises that need no equipment",
            "a team meeting that is not boring",
            "a vegetarian picnic",
            "a hobby that costs nothing",
            "a first date",
            "games for a long car ride",
            "a small garden",
            "a school science project",
            "a simple dessert",
            "decorating a tiny flat",
            "a book club evening",
            "a surprise for my sister",
            "a walk in an unknown town",
        ),
    ),
    (
        ("Should I {}?", "What are the pros and cons if I {}?", "My friend says that I should {}. What do you think?"),
        (
            "buy a used car",
            "work from home",
            "go back to university",
            "adopt a second dog",
            "move to a smaller town",
            "learn to code",
            "give up coffee",
            "start a blog",
            "cycle to work",
            "rent instead of buying a house",
            "take a year off",
            "keep a diary",
            "switch to a vegetarian diet",
            "invest in an index fund",
            "join a gym",
            "sell my old records",
        ),
    ),
    (
        ("Write an email to {}.", "Draft a polite message to {}.", "Help me word a note to {}."),
        (
            "my landlord about a broken heater",
            "a colleague who is leaving",
            "a customer whose order is late",
            "my neighbour about loud music",
            "a professor to ask for more time",
            "my team after a successful project",
            "a friend who passed an exam",
            "a hotel about a lost jacket",
            "my manager to ask for a day off",
            "parents about a school trip",
            "a company that I want to work for",
            "my aunt who sent me a present",
        ),
    ),
)


def questions() -> list[str]:
    """All prompts, each once, in a fixed order.

    >>> len(questions()) == len(set(questions())) > 300
    True
    """
    return [
        sentence.format(subject) for sentences, subjects in _FAMILIES for subject in subjects for sentence in sentences
    ]


def drawn_questions(n: int, n_held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Prompts to make pairs of, and others that are held out.

    >>> [len(part) for part in drawn_questions(200, 100, seed=0)]
    [200, 100]
    """
    every = questions()
    drawn = [every[i] for i in np.random.default_rng(seed).permutation(len(every))[: n + n_held_out]]
    return drawn[:n], drawn[n:]
