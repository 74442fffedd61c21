"""Help pages, translations and blueprints: complete, up to date, and served where the front end looks for them."""

import json
import re
from typing import Any

import pytest
from support.server_prompts import ROOT

from dev.make_texts import english, render
from dev.server import PACK, Server

LANGUAGES = ("en", "ja", "zh")


@pytest.fixture(scope="module")
def object_info(server: Server) -> dict[str, Any]:
    return server.get_json("/object_info")


def node_texts(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def flat(texts: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found = {}
    for key, value in texts.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_what_follows_from_the_nodes_is_up_to_date(object_info: dict[str, Any]) -> None:
    for path, text in render(object_info).items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: run `python dev/make_texts.py`"


def test_languages_are_complete(object_info: dict[str, Any]) -> None:
    expected = flat(english(object_info))
    for language in LANGUAGES:
        texts = flat(node_texts(language))
        assert sorted(texts) == sorted(expected), language
        assert all(text.strip() for text in texts.values()), language


@pytest.mark.parametrize("language", sorted(set(LANGUAGES) - {"en"}))
def test_tooltips_are_translated(language: str) -> None:
    for key, text in flat(node_texts(language)).items():
        if not key.endswith("name"):
            assert re.search("[\u3040-\u30ff\u4e00-\u9fff]", text), f"{language} {key}: {text}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_messages_have_no_stray_syntax(language: str) -> None:
    """Names and descriptions are messages of vue-i18n: | { } @ stand for themselves in quotes only."""
    for node_id, texts in node_texts(language).items():
        for key in ("display_name", "description"):
            assert not re.search(r"[|{}@]", re.sub(r"\{'[|{}@]'\}", "", texts[key])), f"{language} {node_id} {key}"


def test_languages_are_served(server: Server) -> None:
    served = server.get_json("/i18n")
    for language in LANGUAGES:
        assert node_texts(language).items() <= served[language]["nodeDefs"].items()


def test_every_node_has_a_help_page_with_a_picture(server: Server, object_info: dict[str, Any]) -> None:
    own = {name: node for name, node in object_info.items() if node["python_module"] == f"custom_nodes.{PACK}"}
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(own)
    for name, node in own.items():
        page = server.get(f"/extensions/{PACK}/docs/{name}.md").decode()
        head = page.partition("\n## ")[0]
        assert head.startswith(f"# {node['display_name']}\n"), name
        assert len(head.split()) > 30, name
        for key in english({name: node})[name]["inputs"].values():
            assert f"* **{key['name']}**" in page, f"{name}: {key['name']}"
        (picture,) = re.findall(r"!\[[^\]]+\]\((pictures/\w+\.webp)\)", head)
        assert server.get(f"/extensions/{PACK}/docs/{picture}")[8:12] == b"WEBP", name


def test_blueprints_are_offered(server: Server) -> None:
    offered = {entry["name"]: key for key, entry in server.get_json("/global_subgraphs").items() if "data" not in entry}
    written = list((ROOT / "subgraphs").glob("*.json"))
    assert len(written) == 3
    for path in written:
        entry = server.get_json(f"/global_subgraphs/{offered[path.stem]}")
        assert entry["info"]["node_pack"] == f"custom_nodes.{PACK}"
        assert json.loads(entry["data"]) == json.loads(path.read_text())
