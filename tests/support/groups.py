"""Fixtures: groups of processes that tests share, and groups in which ranks may die.

Test modules name this one in ``pytest_plugins``, so that all of them share the same groups.
"""

import pytest
from processes import Group


class Groups:
    """Starts groups of processes when they are first asked for, and anew after a test that broke them."""

    def __init__(self, folder):
        self.folder, self.kept, self.started = folder, {}, 0

    def get(self, size):
        if size not in self.kept or not self.kept[size].alive:
            self.started += 1
            self.kept[size] = Group(size, self.folder / f"group-{self.started}")
        return self.kept[size]

    def check(self, size):
        group = self.kept[size]
        if group.alive and not group.in_step():
            group.kill()
            pytest.fail("The ranks are out of step after this test.")


@pytest.fixture(scope="session")
def groups(tmp_path_factory):
    groups = Groups(tmp_path_factory.mktemp("groups"))
    yield groups
    for group in groups.kept.values():
        group.kill()


@pytest.fixture(params=[2, 3])
def group(request, groups):
    yield groups.get(request.param)
    groups.check(request.param)


@pytest.fixture
def two(groups):
    yield groups.get(2)
    groups.check(2)


@pytest.fixture
def three(groups):
    yield groups.get(3)
    groups.check(3)


@pytest.fixture
def fresh(tmp_path):
    """Start groups in which ranks may die."""
    made = []

    def make(size, timeout=3.0):
        made.append(Group(size, tmp_path / f"fresh-{len(made)}", timeout))
        return made[-1]

    yield make
    for group in made:
        group.kill()
