"""Methods are found through entry points, and a broken plugin harms no other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

import pytest
import torch

import hf_lowbit
from hf_lowbit import method as method_module
from hf_lowbit.config import LowbitConfig, MethodName
from hf_lowbit.formats import WeightSpec
from hf_lowbit.method import ENTRY_POINT_GROUP, Method, method_of, methods

RTN = methods()["rtn"]
Install = Callable[..., None]


@dataclass(frozen=True)
class FakeEntry:
    """An entry point that loads to a value, or raises it."""

    name: str
    loads: Any
    value: str = "some_package:METHOD"

    def load(self) -> Any:
        """As importlib's."""
        if isinstance(self.loads, Exception):
            raise self.loads
        return self.loads


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make these entry points the only installed ones."""

    def install(*entries: FakeEntry) -> None:
        def found(group: str) -> list[FakeEntry]:
            assert group == ENTRY_POINT_GROUP
            return list(entries)

        monkeypatch.setattr(method_module, "entry_points", found)
        methods.cache_clear()

    yield install
    monkeypatch.undo()
    methods.cache_clear()


@dataclass(kw_only=True, repr=False)
class OtherConfig(LowbitConfig):
    """A third party's."""

    quant_method: ClassVar[MethodName] = MethodName("lowbit_other")


OTHER = Method("other", OtherConfig, "somewhere:make", "a summary", "a paper")


def test_rtn_is_found_as_a_third_partys_plugin_would_be() -> None:
    (entry,) = [entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name == "rtn"]
    assert isinstance(entry, EntryPoint) and entry.load() is hf_lowbit.methods()["rtn"]


def test_plugins_are_found_by_the_name_of_their_method(installed: Install) -> None:
    installed(FakeEntry("zzz", RTN), FakeEntry("aaa", OTHER))
    assert list(methods()) == ["other", "rtn"]
    assert hf_lowbit.OtherConfig is OtherConfig
    assert "OtherConfig" in dir(hf_lowbit)


@pytest.mark.parametrize("failure", [ImportError("no torchfoo"), ValueError("bad"), SyntaxError("worse")])
def test_a_broken_plugin_warns_and_the_others_work(installed: Install, failure: Exception) -> None:
    installed(FakeEntry("broken", failure), FakeEntry("rtn", RTN))
    with pytest.warns(UserWarning, match=r"'broken' \(some_package:METHOD\) failed to load: .*" + str(failure)):
        assert list(methods()) == ["rtn"]


def test_something_else_than_a_method_warns(installed: Install) -> None:
    installed(FakeEntry("odd", "a string"), FakeEntry("rtn", RTN))
    with pytest.warns(UserWarning, match="'odd' .* is not a Method"):
        assert list(methods()) == ["rtn"]


def test_a_name_taken_twice_raises(installed: Install) -> None:
    installed(FakeEntry("rtn", RTN), FakeEntry("rtn2", replace(RTN, summary="mine")))
    with pytest.raises(ValueError, match="two plugins provide the method 'rtn'"):
        methods()


def test_the_same_plugin_found_twice_is_harmless(installed: Install) -> None:
    """An editable install beside a wheel."""
    installed(FakeEntry("rtn", RTN), FakeEntry("rtn", RTN))
    assert list(methods()) == ["rtn"]


def test_method_of_a_config_whose_plugin_is_missing(installed: Install) -> None:
    installed(FakeEntry("rtn", RTN))
    assert method_of(hf_lowbit.RTNConfig()) is RTN
    with pytest.raises(ValueError, match="the method 'other' is not installed; installed: rtn"):
        method_of(OtherConfig())


def test_name_and_quant_method_agree() -> None:
    with pytest.raises(ValueError, match=r"OtherConfig.quant_method must be MethodName\('lowbit_another'\)"):
        replace(OTHER, name="another")


def test_the_contract_of_every_installed_method() -> None:
    for name, method in methods().items():
        config = method.config_class()  # type: ignore[call-arg]
        assert method.name == name and config.quant_method == f"lowbit_{name}"
        assert method.summary and method.paper and set(method.domains) <= set(method_module.DOMAINS)
        packed = method.make_recipe(config).rounding(torch.randn(4, 32), WeightSpec())
        assert packed.weight.dtype == torch.int32


def test_listing_methods_imports_no_algorithm() -> None:
    loaded = "[name for name in sys.modules if 'recipe' in name or 'rounding' in name]"
    code = f"import sys, hf_lowbit; hf_lowbit.methods(); print({loaded})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'FooConfig'"):
        _ = hf_lowbit.FooConfig
