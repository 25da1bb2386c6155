"""The examples in docstrings run and show what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["cprec.schedule", "cprec.data.sampler", "data_prep.plan"])
def test_the_examples_of_a_module_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted >= 3 and found.failed == 0
