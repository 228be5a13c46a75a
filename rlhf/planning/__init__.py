"""A run before it begins: its steps, the memory at its peak, its disk, and its hours."""

from rlhf.planning.memory import MemoryPlan
from rlhf.planning.plan import RunPlan, plan_run
from rlhf.planning.report import plan_lines

__all__ = ["MemoryPlan", "RunPlan", "plan_lines", "plan_run"]
