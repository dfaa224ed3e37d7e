"""The README shows on a package index: its links are absolute, and lead to what is here."""

import re

import pytest

from tests.links import ROOT, anchors, check, target_of

TEXT = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
LINKS = sorted({link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("#")})


def test_every_link_is_absolute():
    assert all(link.startswith("https://") for link in LINKS)


@pytest.mark.parametrize("link", [link for link in LINKS if target_of(link)])
def test_a_link_to_the_project_leads_to_a_file_and_a_heading(link):
    check(link)


def test_links_within_the_page_lead_to_headings():
    own = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert own
    assert set(own) <= anchors(ROOT / "README.md")
