"""Hosts that are not installed here: stand-ins with other modules, backends, constructors and factories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import laplace
import pytest
from helpers import build, mlp
from laplace.curvature import AsdlEF, AsdlGGN, BackPackEF, BackPackGGN, CurvlinopsEF, CurvlinopsGGN

import laplace_ella
from laplace_ella import AsdlNystromGGN, BackPackNystromGGN, NystromGGN, host

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests/host/stand_in"
# What of the contract uses the host, or could be lost with it.
CONTRACT = "every_form or class_probabilities or regression_moments or reward or mapping or evidence"


def run_with_the_stand_in(variant, *arguments):
    path = os.pathsep.join([str(STAND_IN), str(Path(laplace_ella.__file__).parents[1])])
    env = {**os.environ, "STAND_IN": variant, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    options = ["-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, STAND_IN / "check_stand_in.py", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("variant", ["keys", "registry"])
def test_another_host_does(variant):
    """Its factory finds classes by their keys, or in a registry of its own."""
    contract = () if variant == "registry" else (ROOT / "tests/host/test_contract.py",)
    warned = ["-W", "ignore:The factory of laplace-torch"] if variant == "registry" else []
    run = run_with_the_stand_in(variant, *contract, *warned, "-k", f"stand_in or {CONTRACT}")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


def python(code, *path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True
    )


def test_a_host_without_a_name_is_refused_at_import_with_its_version_and_the_fix(tmp_path):
    (tmp_path / "laplace").mkdir()
    (tmp_path / "laplace/__init__.py").write_text("BaseLaplace = Laplace = object\n")
    (tmp_path / "laplace_torch-9.7.dist-info").mkdir()
    (tmp_path / "laplace_torch-9.7.dist-info/METADATA").write_text("Name: laplace-torch\nVersion: 9.7\n")
    error = python("import laplace_ella", tmp_path).stderr.splitlines()[-1]
    assert error.startswith(
        "ImportError: laplace_ella cannot use laplace-torch 9.7: cannot import name 'Parametric"
    )
    assert 'pip install "laplace-torch>=0.2.3,<=0.3"' in error


class Later(laplace.ParametricLaplace):
    def __init__(self, model, likelihood, approximation):
        pass

    def optimize_prior_precision(self, pred_type, method, steps=100, lr=0.1):
        pass


@pytest.mark.parametrize(
    ("function", "call", "reason"),
    [
        (Later, host.USED[host.ParametricLaplace], r"Later\(\).*'approximation'"),
        (
            Later.optimize_prior_precision,
            host.USED[host.ParametricLaplace.optimize_prior_precision],
            r"optimize_prior_precision\(\).*'n_steps'",
        ),
    ],
    ids=["a new argument", "an argument renamed"],
)
def test_a_host_that_is_called_otherwise_is_refused(function, call, reason):
    with pytest.raises(ImportError, match=reason) as caught:
        host.check_calls({function: call})
    assert laplace_ella.host._version() in str(caught.value)


def test_what_is_used_of_the_host_is_in_the_table():
    assert {function.__qualname__.partition(".")[0] for function in host.USED} == set(host.__all__)


def test_the_hosts_own_backends_are_known_and_imported_when_they_are_named():
    ours = {CurvlinopsGGN: NystromGGN, BackPackGGN: BackPackNystromGGN, AsdlGGN: AsdlNystromGGN}
    for theirs, expected in ours.items():

        class Mine(theirs):
            pass

        for backend in (theirs, Mine, theirs(mlp(), "classification")):
            assert type(build(backend=backend).backend) is expected
    for theirs in (CurvlinopsEF, BackPackEF, AsdlEF):
        with pytest.raises(ValueError, match="empirical Fisher"):
            build(backend=theirs)


def test_a_class_of_the_same_name_that_is_no_backend_is_refused():
    with pytest.raises(ValueError, match="backend=CurvlinopsGGN cannot be used"):
        build(backend=type("CurvlinopsGGN", (), {}))


def test_a_factory_for_other_packages_finds_ella():
    assert host.FINDS_SUBCLASSES
    assert host.finds_subclasses(laplace.Laplace)
    assert not host.finds_subclasses(lambda *args: {}[args])
    assert "probe of laplace_ella" not in str(laplace_ella.ella._structures())
