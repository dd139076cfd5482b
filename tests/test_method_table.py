"""The table of methods: complete, true to the code, and what the README and refusals say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftType

from loraswarm.adapters.config_keys import ConfigKeys
from loraswarm.adapters.methods import METHODS, method_of
from loraswarm.adapters.methods.table import (
    CONVERT,
    INSTEAD,
    ROWS,
    readme_table,
    served_types,
    with_table,
)
from loraswarm.errors import AdapterError

README = Path(__file__).parents[1] / "README.md"
COMMAND = "python -m loraswarm.adapters.methods.table README.md"
REFUSED_TYPES = sorted(
    peft_type
    for row in ROWS
    if not row.is_served and not row.option
    for peft_type in row.peft_types
)


def refusal(peft_type: object) -> str:
    with pytest.raises(AdapterError) as caught:
        method_of(ConfigKeys({"peft_type": peft_type}))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_every_method_of_peft_is_in_the_table():
    listed = {peft_type for row in ROWS for peft_type in row.peft_types}
    assert {peft_type.value for peft_type in PeftType} <= listed
    assert listed - {peft_type.value for peft_type in PeftType} == {"TIED_LORA", "BONE"}


def test_served_rows_are_the_methods_there_are():
    assert served_types() == set(METHODS)


def test_no_method_is_both_served_and_refused():
    types = [peft_type for row in ROWS if not row.option for peft_type in row.peft_types]
    assert len(types) == len(set(types))


def test_options_belong_to_methods_that_are_served():
    for row in ROWS:
        if row.option:
            assert set(row.peft_types) <= served_types(), row.name


def test_every_refusal_says_what_to_do_instead():
    for row in ROWS:
        assert row.note
        assert (row.instead in INSTEAD) != row.is_served, row.name


@pytest.mark.parametrize("peft_type", REFUSED_TYPES)
def test_a_known_method_is_refused_with_its_reason(peft_type):
    (row,) = (row for row in ROWS if peft_type in row.peft_types and not row.option)
    message = refusal(peft_type)
    assert repr(peft_type) in message
    assert row.note in message
    assert INSTEAD[row.instead] in message
    assert "unknown" not in message


@pytest.mark.parametrize("peft_type", ["NO_SUCH_METHOD", "lora", "", None, 3, ["LORA"], {}])
def test_an_unknown_method_is_refused_with_the_known_ones(peft_type):
    message = refusal(peft_type)
    assert f"peft_type is {peft_type!r}: unknown" in message
    assert "LORA" in message


@pytest.mark.parametrize("peft_type", sorted(METHODS))
def test_a_served_method_is_found(peft_type):
    assert method_of(ConfigKeys({"peft_type": peft_type})) is METHODS[peft_type]


def test_only_what_peft_converts_is_said_to_convert():
    """By the word of PEFT's own layers."""
    convertible = {"FOURIERFT", "WAVEFT", "C3A", "RANDLORA", "PSOFT", "TINYLORA", "UNILORA"}
    advised = {
        peft_type
        for row in ROWS
        if row.instead == CONVERT and not row.option
        for peft_type in row.peft_types
    }
    assert advised == convertible
    assert all(_converts(peft_type) for peft_type in convertible)
    assert not any(_converts(peft_type) for peft_type in set(REFUSED_TYPES) - convertible)


def _converts(peft_type: str) -> bool:
    """Whether PEFT's layers of a method override BaseTunerLayer's refusal to convert."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer

    if peft_type not in PeftType.__members__:
        return False
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(peft_type))
    layer = getattr(tuner, "tuner_layer_cls", None)
    if layer is None or not issubclass(layer, BaseTunerLayer):
        return False
    kinds = [layer, *layer.__subclasses__()]
    refusing = ("SHIRA", "HIRA")  # they override it to return False
    return peft_type not in refusing and any(
        kind.supports_lora_conversion is not BaseTunerLayer.supports_lora_conversion
        for kind in kinds
    )


def test_the_readme_has_the_table():
    readme = README.read_text(encoding="utf-8")
    assert with_table(readme) == readme, f"the table has changed; run: {COMMAND}"


def test_the_command_rewrites_the_table_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- methods -->\nold\n<!-- /methods -->\nafter\n", encoding="utf-8")
    command = [sys.executable, "-W", "error", *COMMAND.split()[1:]]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert readme.read_text(encoding="utf-8") == f"before\n{readme_table()}\nafter\n"


def test_the_table_imports_no_torch():
    code = "import sys, loraswarm.adapters.methods.table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
