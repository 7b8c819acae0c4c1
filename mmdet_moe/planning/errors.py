"""What the planner says when it cannot plan."""

from __future__ import annotations


class PlanError(ValueError):
    """The input is bad: the message names the culprit and what would be right (exit code 2)."""


class InfeasibleError(PlanError):
    """No expert map exists for this problem, and that is proven (exit code 2)."""


class NoPlanFoundError(RuntimeError):
    """No map was found within the limit, and none was proven impossible (exit code 3)."""
