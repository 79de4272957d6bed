"""How a model of a region is run: on a pager of its own, which has no region afterwards."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from userfault import Pager


class PagedMachine(RuleBasedStateMachine):
    """A model that uses a pager."""

    pager: Pager


def run_machine(machine: type[PagedMachine], *, soak: bool, lives: int) -> None:
    """Play so many lives of a machine in a soak run, and a few of them otherwise."""
    with Pager() as pager:
        machine.pager = pager
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=lives if soak else 16,
                stateful_step_count=60 if soak else 25,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        assert pager.regions == 0
