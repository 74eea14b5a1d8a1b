"""Documents that repeat what code knows say the same thing."""

import re
from pathlib import Path

from trl_anatomy.trainers.loss_support import support_table

ROOT = Path(__file__).parents[1]


def test_losses_page_is_the_table_of_the_refusals():
    assert support_table() in (ROOT / "docs" / "losses.md").read_text()


def test_readme_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"
