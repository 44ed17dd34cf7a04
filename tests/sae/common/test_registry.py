"""The ways of a package, found by their files."""

from __future__ import annotations

import pytest

from autointerp.explaining.explainers import EXPLAINERS
from autointerp.scoring.judges import JUDGES
from autointerp.scoring.scorers import SCORERS
from sae.common.errors import BadInput
from sae.common.registry import Registry
from sae.dictionaries.architectures import ARCHITECTURES


@pytest.mark.parametrize(
    ("found", "names", "attribute"),
    [
        (EXPLAINERS, ["contrastive", "input_output", "llm", "ngram"], "name"),
        (JUDGES, ["llm", "ngram"], "name"),
        (SCORERS, ["detection", "fuzzing"], "name"),
        (ARCHITECTURES, ["batchtopk", "gated", "jumprelu", "relu", "topk"], "architecture"),
    ],
)
def test_each_file_is_one(found: Registry[object], names: list[str], attribute: str) -> None:
    assert list(found) == names
    assert len(found) == len(names)
    for name, kind in found.items():
        assert getattr(kind, attribute) == name
        assert found.check(name, "--flag") == found.check(name.replace("_", "-"), "--flag") == name
        assert found[name] is kind


def test_what_is_no_way_is_not_found() -> None:
    for name in ("base", "__init__", "_private", "", "tests"):
        assert name not in SCORERS
        with pytest.raises(KeyError):
            SCORERS[name]
    with pytest.raises(BadInput, match="--scorer 'fuzing' is not known; choose 'fuzzing'"):
        SCORERS.check("fuzing", "--scorer")
    assert JUDGES.check("auto", "--judge", "auto") == "auto"
    assert JUDGES.join_names("auto") == "auto, llm, ngram"
