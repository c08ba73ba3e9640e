"""The five forms of the report, the rules' page, and the fixture for the rest of the tests."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
import torch

from ostinato.check import all_rules, check_factory, explain, rule, to_github, to_html, to_json, to_sarif, to_text
from ostinato.check.report import from_json
from ostinato.errors import UsageError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def report():
    log = []

    def inner(x):
        log.append(f"{x.sum()}")
        return x[x > 0]

    def fn(x):
        return inner(x).sum() + torch.tensor(1.0, device=x.device)

    return check_factory(lambda dev: (fn, [(torch.ones(3, device=dev),)]), gpu=False)


def test_json_round_trip(report):
    again = from_json(to_json(report))
    assert replace(again, passes=()) == replace(report, passes=())  # seconds are rounded
    assert [p.name for p in again.passes] == ["pretend", "trace", "tape"]
    data = json.loads(to_json(report))
    assert data["schema"] == 1
    assert {f["code"] for f in data["findings"]} == {"CG101", "CG102", "CG103"}
    assert all(f["remedy"] and f["source"] and f["fingerprint"] for f in data["findings"])


# The part of the SARIF 2.1.0 schema that the report uses, written from the standard (OASIS, sections 3.13 to 3.49).
_MESSAGE = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}}
_LOCATION = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "physicalLocation": {
            "type": "object",
            "required": ["artifactLocation"],
            "additionalProperties": False,
            "properties": {
                "artifactLocation": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "uri": {"type": "string", "pattern": "^[^\\\\ ]+$"},
                        "uriBaseId": {"type": "string"},
                    },
                },
                "region": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"startLine": {"type": "integer", "minimum": 1}, "snippet": _MESSAGE},
                },
            },
        },
        "logicalLocations": {
            "type": "array",
            "items": {"type": "object", "properties": {"name": {"type": "string"}, "kind": {"type": "string"}}},
        },
    },
}
_RESULT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["message"],
    "properties": {
        "ruleId": {"type": "string"},
        "ruleIndex": {"type": "integer", "minimum": -1},
        "level": {"enum": ["none", "note", "warning", "error"]},
        "message": _MESSAGE,
        "locations": {"type": "array", "items": _LOCATION},
        "partialFingerprints": {"type": "object", "additionalProperties": {"type": "string"}},
        "occurrenceCount": {"type": "integer", "minimum": 1},
        "codeFlows": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["threadFlows"],
                "properties": {
                    "threadFlows": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["locations"],
                            "properties": {
                                "locations": {
                                    "type": "array",
                                    "minItems": 1,
                                    "items": {"type": "object", "properties": {"location": _LOCATION}},
                                }
                            },
                        },
                    }
                },
            },
        },
        "suppressions": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["kind"],
                "properties": {"kind": {"enum": ["inSource", "external"]}},
            },
        },
        "properties": {"type": "object"},
    },
}
SARIF = {
    "type": "object",
    "additionalProperties": False,
    "required": ["version", "runs"],
    "properties": {
        "$schema": {"type": "string"},
        "version": {"enum": ["2.1.0"]},
        "runs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["tool"],
                "additionalProperties": False,
                "properties": {
                    "tool": {
                        "type": "object",
                        "required": ["driver"],
                        "properties": {"driver": {"type": "object", "required": ["name"]}},
                    },
                    "originalUriBaseIds": {"type": "object"},
                    "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
                    "invocations": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["executionSuccessful"],
                            "properties": {"executionSuccessful": {"type": "boolean"}},
                        },
                    },
                    "results": {"type": "array", "items": _RESULT},
                    "properties": {"type": "object"},
                },
            },
        },
    },
}


def test_sarif_is_valid(report):
    data = json.loads(to_sarif(report, ROOT))
    jsonschema.validate(data, SARIF)
    results = data["runs"][0]["results"]
    rules = data["runs"][0]["tool"]["driver"]["rules"]
    assert all(rules[r["ruleIndex"]]["id"] == r["ruleId"] for r in results)
    uris = {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in results}
    assert uris == {"tests/unit/check/test_reports.py"}
    assert any("codeFlows" in r for r in results)


def test_github_annotations_are_escaped_and_capped(report):
    lines = to_github(report, ROOT).splitlines()
    assert lines[0].startswith("::error file=tests/unit/check/test_reports.py,line=")
    assert "%2C" not in lines[-1]
    assert lines[-1].startswith("::notice title=ostinato check::")
    assert all("\n" not in line for line in lines)


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links = []

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href")]


def test_html_is_one_file(report):
    page = to_html(report)
    parser = _Tags()
    parser.feed(page)
    assert parser.links == []
    assert "<script" not in page
    assert "log.append(f&quot;{x.sum()}&quot;)" in page


def test_text_puts_the_first_fix_on_top_and_has_no_colour(report):
    text = to_text(report)
    assert text.startswith("fix first")
    assert "\x1b[" not in text
    assert "errors in 4 calls" in text
    assert "assumed: torch" in text


def test_every_rule_has_its_section_with_before_and_after():
    for item in all_rules():
        section = explain(item.code)
        assert section.startswith(f"## {item.code} {item.name}")
        for part in ("**Why.**", "**At run time.**", "**Remedy.**", "Before:", "After:"):
            assert part in section, f"{item.code} lacks {part}"
        assert explain(item.name.lower()) == section
    assert len({r.code for r in all_rules()}) == len(all_rules())
    with pytest.raises(UsageError, match="no rule 'CG999'"):
        rule("CG999")


def test_docs_page_is_the_packaged_one():
    packaged = ROOT / "src" / "ostinato" / "check" / "capture-rules.md"
    assert (ROOT / "docs" / "capture-rules.md").read_text() == packaged.read_text()
