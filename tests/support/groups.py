"""Fixtures: groups of processes that tests share, and groups in which ranks may die.

Test modules name this one in ``pytest_plugins``, so that all of them share the same groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Group


class Groups:
    """Starts groups of processes when they are first asked for, and anew after a test that broke them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept, self.started = folder, {}, 0

    def get(self, size: int) -> Group:
        if size not in self.kept or not self.kept[size].alive:
            self.started += 1
            self.kept[size] = Group(size, self.folder / f"group-{self.started}")
        return self.kept[size]

    def check(self, size: int) -> None:
        group = self.kept[size]
        if group.alive and not group.in_step():
            group.kill()
            pytest.fail("The ranks are out of step after this test.")


@pytest.fixture(scope="session")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Groups]:
    groups = Groups(tmp_path_factory.mktemp("groups"))
    yield groups
    for group in groups.kept.values():
        group.kill()


@pytest.fixture(params=[2, 3])
def group(request: pytest.FixtureRequest, groups: Groups) -> Iterator[Group]:
    yield groups.get(request.param)
    groups.check(request.param)


@pytest.fixture
def two(groups: Groups) -> Iterator[Group]:
    yield groups.get(2)
    groups.check(2)


@pytest.fixture
def three(groups: Groups) -> Iterator[Group]:
    yield groups.get(3)
    groups.check(3)


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Any]:
    """Start groups in which ranks may die."""
    made: list[Group] = []

    def make(size: int, timeout: float = 3.0) -> Group:
        made.append(Group(size, tmp_path / f"fresh-{len(made)}", timeout))
        return made[-1]

    yield make
    for group in made:
        group.kill()
