"""Which layer becomes what: building plans, storing them, and swapping modules accordingly."""

from hf_lowbit.plan.build import ModelFacts, build_plan, install, packed_modules, replace_module, replace_modules
from hf_lowbit.plan.plan import Plan, PlanError, PlannedLayer, check_entries

__all__ = [
    "ModelFacts",
    "Plan",
    "PlanError",
    "PlannedLayer",
    "build_plan",
    "check_entries",
    "install",
    "packed_modules",
    "replace_module",
    "replace_modules",
]
